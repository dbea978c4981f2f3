//! Forwarding by the kernel from one device to another, both served by one thread. See `tun_driver::lab::cases::forward`.

mod harness;

use std::process::ExitCode;

use serde_json::json;
use tun_driver::lab::cases::{self, Load};

fn main() -> ExitCode {
    harness::run("forward", |options, sandbox| {
        let ways = harness::moving_ways(options);
        let (ways, plan) = options.choose(&ways)?;
        let mut told = Vec::new();
        for packet_len in [1400, 64] {
            let load = Load::forwarding(packet_len);
            let mut progress = harness::progress(&format!("forward, {packet_len} B"));
            let report = cases::forward(sandbox, &ways, load, &plan, &mut progress)?;
            println!(
                "\nforward: {} packets of {packet_len} B at a time\n{report}",
                load.packets
            );
            told.push(json!({
                "case": "forward", "packet_bytes": packet_len, "packets_at_a_time": load.packets, "report": report.to_json(),
            }));
        }
        Ok(told)
    })
}
