//! Receive: emptying a queue that was filled before. See `tun_driver::lab::cases::drain`.

mod harness;

use std::process::ExitCode;

use serde_json::json;
use tun_driver::lab::cases::{self, Load};

fn main() -> ExitCode {
    harness::run("drain", |options, sandbox| {
        let ways = harness::moving_ways(options);
        let (ways, plan) = options.choose(&ways)?;
        let mut told = Vec::new();
        for packet_len in [64, 1400] {
            let load = Load::of(packet_len);
            let mut progress = harness::progress(&format!("drain, {packet_len} B"));
            let report = cases::drain(sandbox, &ways, load, &plan, &mut progress)?;
            println!(
                "\ndrain: {} packets of {packet_len} B at a time\n{report}",
                load.packets
            );
            told.push(json!({
                "case": "drain", "packet_bytes": packet_len, "packets_at_a_time": load.packets, "report": report.to_json(),
            }));
        }
        Ok(told)
    })
}
