//! What offloads are worth, and what they cost where there is nothing to gain. See `tun_driver::lab::offload_cases`.

mod harness;

use std::process::ExitCode;

use serde_json::json;
use tun_driver::Backend;
use tun_driver::lab::cases::Load;
use tun_driver::lab::measure::Report;
use tun_driver::lab::offload_cases::{self, Load64K, Ratio, Traffic};

const BACKENDS: [Backend; 2] = [Backend::IoUring, Backend::Syscalls];

fn main() -> ExitCode {
    harness::run("offload", |options, sandbox| {
        let plan = &options.plan;
        let mut told = Vec::new();
        for (traffic, case, title) in [
            (
                Traffic::Tcp,
                "forward-superpackets",
                "TCP, 65,000 B of payload, segments of 1448 B",
            ),
            (Traffic::Udp, "forward-uso", "UDP, 54 datagrams of 1200 B each"),
        ] {
            let load = Load64K::default();
            let movers = offload_cases::movers(traffic, &BACKENDS);
            let mut progress = harness::progress(case);
            let report = offload_cases::superpackets(sandbox, traffic, &movers, load, plan, &mut progress)?;
            println!(
                "\n{case}: {title}, {} superpackets at a time\n{report}",
                load.superpackets
            );
            let ratios = offload_cases::rate_ratios(&report, &BACKENDS);
            told.push(case_json(case, load.superpackets, &report, &ratios));
        }
        let load = Load::of(64);
        let ways = offload_cases::small_drain_ways(&BACKENDS);
        let mut progress = harness::progress("drain, 64 B");
        let report = offload_cases::small_drain(sandbox, &ways, load, plan, &mut progress)?;
        println!("\ndrain-offloads: {} packets of 64 B at a time\n{report}", load.packets);
        let ratios = offload_cases::drain_ratios(&report, &BACKENDS);
        told.push(case_json("drain-offloads", load.packets, &report, &ratios));
        Ok(told)
    })
}

fn case_json(case: &str, packets: usize, report: &Report, ratios: &[Ratio]) -> serde_json::Value {
    for ratio in ratios {
        println!("{ratio}");
    }
    let ratios: Vec<_> = ratios.iter().map(Ratio::to_json).collect();
    json!({ "case": case, "packets_at_a_time": packets, "report": report.to_json(), "ratios": ratios })
}
