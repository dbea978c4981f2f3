//! TCP over a wire in user space, for each way of waiting. See `tun_driver::lab::wire`.

mod harness;

use std::process::ExitCode;
use std::time::Duration;

use serde_json::json;
use tun_driver::lab::wire::{Transfer, wire};
use tun_driver::{Backend, Wait, WorkerConfig};

fn main() -> ExitCode {
    harness::run("wire", |options, sandbox| {
        let config = |backend, wait| WorkerConfig {
            backend: Some(backend),
            wait,
            ..WorkerConfig::default()
        };
        let ways = [
            ("io_uring, block", config(Backend::IoUring, Wait::Block)),
            ("io_uring, moderate", config(Backend::IoUring, Wait::default())),
            ("system calls, block", config(Backend::Syscalls, Wait::Block)),
            ("system calls, moderate", config(Backend::Syscalls, Wait::default())),
        ];
        let mut told = Vec::new();
        for streams in [1, 8] {
            let title = format!("iperf3 TCP, {streams} streams");
            let transfer = Transfer {
                streams,
                time: Duration::from_secs(1),
            };
            let report = wire(sandbox, &ways, transfer, &options.plan, &mut harness::progress(&title))?;
            println!("\n{title}\n{report}");
            told.push(json!({ "case": "wire", "streams": streams, "report": report.to_json() }));
        }
        Ok(told)
    })
}
