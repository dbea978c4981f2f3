//! Middling load: CPU per packet and latency at set rates, for each way of waiting. See `tun_driver::lab::offered`.

mod harness;

use std::process::ExitCode;
use std::time::Duration;

use serde_json::json;
use tun_driver::lab::cases::Way;
use tun_driver::lab::offered::{Offer, RATES, offered};
use tun_driver::lab::ways::{ByWorker, PollLoop};
use tun_driver::{Backend, Wait};

fn main() -> ExitCode {
    harness::run("offered", |options, sandbox| {
        let spin = Wait::Spin {
            duration: Duration::from_micros(100),
        };
        let ways: Vec<Box<dyn Way>> = vec![
            Box::new(PollLoop),
            Box::new(ByWorker::new(Backend::IoUring, Wait::Block)),
            Box::new(ByWorker::new(Backend::IoUring, Wait::default())),
            Box::new(ByWorker::new(Backend::IoUring, spin)),
            Box::new(ByWorker::new(Backend::Syscalls, Wait::Block)),
            Box::new(ByWorker::new(Backend::Syscalls, Wait::default())),
        ];
        let (ways, plan) = options.choose(&ways)?;
        let mut told = Vec::new();
        for rate in RATES {
            let title = rate.map_or("as many as can be sent".to_owned(), |rate| {
                format!("{rate} packets per second")
            });
            let mut progress = harness::progress(&title);
            let served = offered(sandbox, &ways, Offer::at(rate), &plan, &mut progress)?;
            println!("\n{title}\n{}", served.report);
            let sent: Vec<_> = ways
                .iter()
                .zip(&served.tallies)
                .map(|(way, tally)| {
                    json!({ "way": way.name(), "sent": tally.sent, "lost": tally.lost, "kept_rate": tally.kept_rate })
                })
                .collect();
            told.push(json!({
                "case": "offered", "rate_pps": rate, "sent": sent, "report": served.report.to_json(),
            }));
        }
        Ok(told)
    })
}
