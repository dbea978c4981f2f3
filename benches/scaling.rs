//! One queue and several, one worker and several, and an engine beside a bare worker loop. See `tun_driver::lab::scaling`.

mod harness;

use std::process::ExitCode;

use serde_json::json;
use tun_driver::lab::scaling::{Stretch, scaling};

fn main() -> ExitCode {
    harness::run("scaling", |options, sandbox| {
        let mut progress = harness::progress("scaling");
        let (found, report) = scaling(sandbox, Stretch::default(), &options.plan, &mut progress)?;
        println!("\n{}: and one queue beside a bare worker loop\n{report}", found.title);
        for row in &found.rows {
            let ratio = row.ratio.map_or(1.0, |ratio| ratio.median);
            println!(
                "{:>22}  {:>9.0} packets per second, {ratio:.2} of the first, shares {:.2?}",
                row.name, row.pps.median, row.per_queue_share
            );
        }
        Ok(vec![
            json!({ "case": "scaling", "scaling": found.to_json(), "report": report.to_json() }),
        ])
    })
}
