//! The tool `tun-driver`: what this host can do, and how fast it does it.
//!
//! Exit codes: 0 done, 1 failed, 2 wrong usage, 3 a limit that the caller set was missed, 77 skipped because the host lacks something.

mod bench;
mod doctor;
mod generate;
mod receive;
mod report;
mod throughput;

use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use clap::{Parser, Subcommand};

/// Packet I/O for Linux gateways: look at this host, and measure it.
#[derive(Parser)]
#[command(version, arg_required_else_help = true)]
struct Arguments {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Measures receive, send, forward and round trip in a network namespace of its own, each backend against the plain loop.
    ///
    /// Changes nothing on the host: devices, addresses and packets live in a namespace that ends with the run. Needs root, or user
    /// namespaces and a /dev/net/tun that may be opened.
    Bench(bench::Options),
    /// Tells what this host can do, a line each, with the remedy for what is missing.
    Doctor(doctor::Options),
    /// Sends stamped test packets on a fixed schedule, from the network namespace in which it is started.
    ///
    /// A packet carries the time when it was due, so that `receive` counts what a late one waited. Ends early, with its report, on Ctrl-C.
    Generate(generate::Options),
    /// Receives what `generate` sends, in the network namespace in which it is started: loss, order, duplicates, damage, latency.
    ///
    /// Both have to run on one machine: latencies are by its monotonic clock. Ends with its report on Ctrl-C.
    Receive(receive::Options),
    /// Measures over links that the caller has made what an engine takes, sends, or passes on without loss, and how long packets take.
    ///
    /// `bench-scripts/pktgen.sh` makes the links in namespaces of its own and calls this.
    Throughput(Box<throughput::Options>),
}

/// How a verb ended, if not well.
enum Failure {
    /// The run failed.
    Failed(String),
    /// The options contradict each other or the kernel.
    Usage(String),
    /// It ran, and a limit that the caller set was missed.
    Missed(String),
    /// The host lacks something.
    Lacking(String),
}

impl From<std::io::Error> for Failure {
    fn from(error: std::io::Error) -> Self {
        Failure::Failed(error.to_string())
    }
}

fn main() -> ExitCode {
    let outcome = match Arguments::parse().verb {
        Verb::Bench(options) => bench::run(&options),
        Verb::Doctor(options) => doctor::run(&options),
        Verb::Generate(options) => generate::run(&options),
        Verb::Receive(options) => receive::run(&options),
        Verb::Throughput(options) => throughput::run(&options),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(Failure::Failed(why)) => {
            eprintln!("tun-driver: {why}");
            ExitCode::FAILURE
        }
        Err(Failure::Usage(why)) => {
            eprintln!("tun-driver: {why}");
            ExitCode::from(2)
        }
        Err(Failure::Missed(what)) => {
            eprintln!("tun-driver: missed: {what}");
            ExitCode::from(3)
        }
        Err(Failure::Lacking(what)) => {
            eprintln!("tun-driver: skipped: {what}\n`tun-driver doctor` tells what this host can do.");
            ExitCode::from(77)
        }
    }
}

/// A flag that Ctrl-C sets, or SIGTERM or SIGHUP. Once per process.
fn until_interrupted() -> Result<&'static AtomicBool, Failure> {
    static STOP: AtomicBool = AtomicBool::new(false);
    ctrlc::set_handler(|| STOP.store(true, Ordering::Relaxed))
        .map_err(|error| Failure::Failed(format!("no handler for Ctrl-C: {error}")))?;
    Ok(&STOP)
}

/// A time on the command line, in seconds, such as 0.5; less than a year.
fn seconds(text: &str) -> Result<Duration, String> {
    text.parse()
        .ok()
        .filter(|&seconds| seconds > 0.0 && seconds < 31_536_000.0)
        .map(Duration::from_secs_f64)
        .ok_or_else(|| "seconds, such as 10 or 0.5".to_owned())
}
