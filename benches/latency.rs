//! Round trip of one small packet at a time. See `tun_driver::lab::cases::round_trip`.

mod harness;

use std::process::ExitCode;
use std::time::Duration;

use serde_json::json;
use tun_driver::lab::cases::{self, Way};
use tun_driver::lab::ways::{ByWorker, IfaceLoop};
use tun_driver::{Backend, Wait};

use harness::floor::{Floor, PlainLoop};

fn main() -> ExitCode {
    harness::run("latency", |options, sandbox| {
        let spin = Wait::Spin {
            duration: Duration::from_micros(100),
        };
        let ways: Vec<Box<dyn Way>> = vec![
            Box::new(IfaceLoop { nonblocking: false }),
            Box::new(PlainLoop { nonblocking: false }),
            Box::new(PlainLoop { nonblocking: true }),
            Box::new(Floor::default()),
            Box::new(Floor {
                name: "floor, spinning",
                spin: true,
                ..Floor::default()
            }),
            Box::new(ByWorker::new(Backend::IoUring, Wait::Block)),
            Box::new(ByWorker::new(Backend::IoUring, spin)),
            Box::new(ByWorker::new(Backend::Syscalls, Wait::Block)),
            Box::new(ByWorker::new(Backend::Syscalls, spin)),
        ];
        let (ways, plan) = options.choose(&ways)?;
        let trips = if options.quick { 2_000 } else { 1_000 };
        let mut progress = harness::progress("round trip");
        let outcome = cases::round_trip(sandbox, &ways, trips, &plan, &mut progress)?;
        println!("\nround trip: {trips} per round, one at a time\n{}", outcome.report);
        println!(
            "all rounds together, in µs\n{:>26}  {:>8} {:>8} {:>8} {:>8}",
            "way", "p50", "p99", "p99.9", "max"
        );
        let mut told = Vec::new();
        for (way, histogram) in ways.iter().zip(&outcome.histograms) {
            let micros = |share: f64| histogram.value_at_quantile(share) as f64 / 1e3;
            let [p50, p99, p99_9, max] = [micros(0.5), micros(0.99), micros(0.999), micros(1.0)];
            println!("{:>26}  {p50:>8.1} {p99:>8.1} {p99_9:>8.1} {max:>8.1}", way.name());
            told.push(json!({
                "way": way.name(), "trips": histogram.len(), "p50_us": p50, "p99_us": p99, "p99_9_us": p99_9, "max_us": max,
            }));
        }
        Ok(vec![
            json!({ "case": "round_trip", "all_rounds": told, "report": outcome.report.to_json() }),
        ])
    })
}
