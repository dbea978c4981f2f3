//! The tool `tun-driver`: what this host can do, and how fast it does it.
//!
//! Exit codes: 0 done, 1 failed, 2 wrong usage, 77 skipped because the host lacks something.

mod bench;
mod doctor;
mod report;

use std::process::ExitCode;

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
}

/// How a verb ended, if not well.
enum Failure {
    /// The run failed.
    Failed(String),
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
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(Failure::Failed(why)) => {
            eprintln!("tun-driver: {why}");
            ExitCode::FAILURE
        }
        Err(Failure::Lacking(what)) => {
            eprintln!("tun-driver: skipped: {what}\n`tun-driver doctor` tells what this host can do.");
            ExitCode::from(77)
        }
    }
}
