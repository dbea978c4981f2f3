//! Middling load: CPU per packet and latency at set rates, for each way of waiting. See `tun_driver::lab::offered`.

mod harness;

use std::process::ExitCode;
use std::time::Duration;

use serde_json::json;
use tun_driver::lab::cases::Way;
use tun_driver::lab::offered::{Offer, offered};
use tun_driver::lab::ways::{ByWorker, PollLoop};
use tun_driver::{Backend, Wait};

/// Packets per second, and as many as can be sent.
const RATES: [Option<u64>; 6] = [
    Some(20_000),
    Some(50_000),
    Some(100_000),
    Some(200_000),
    Some(400_000),
    None,
];

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
            let loss = served.lost as f64 * 1e2 / served.packets as f64;
            let kept = if served.kept_rate {
                ""
            } else {
                "; the generator did not always keep up"
            };
            println!("\n{title}: {loss:.3} % lost{kept}\n{}", served.report);
            told.push(json!({
                "case": "offered", "rate_pps": rate, "kept_rate": served.kept_rate, "packets": served.packets, "lost": served.lost,
                "report": served.report.to_json(),
            }));
        }
        Ok(told)
    })
}
