//! Send: writing packets that are dropped right behind the driver. See `tun_driver::lab::cases::sink`.

mod harness;

use std::process::ExitCode;

use serde_json::json;
use tun_driver::lab::cases::{self, Load};

fn main() -> ExitCode {
    harness::run("sink", |options, sandbox| {
        let ways = harness::moving_ways(options);
        let (ways, plan) = options.choose(&ways)?;
        let mut told = Vec::new();
        for packet_len in [64, 1400] {
            let load = Load::of(packet_len);
            let mut progress = harness::progress(&format!("sink, {packet_len} B"));
            let (report, sink) = cases::sink(sandbox, &ways, load, &plan, &mut progress)?;
            println!(
                "\nsink: {} packets of {packet_len} B at a time, dropped by {sink}\n{report}",
                load.packets
            );
            told.push(json!({
                "case": "sink", "packet_bytes": packet_len, "packets_at_a_time": load.packets, "sink": sink,
                "report": report.to_json(),
            }));
        }
        Ok(told)
    })
}
