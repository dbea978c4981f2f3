//! How long it takes to reach a worker, and to stop an engine. See `tun_driver::lab::acts`.

mod harness;

use std::process::ExitCode;

use serde_json::json;
use tun_driver::lab::acts::acts;

fn main() -> ExitCode {
    harness::run("acts", |options, sandbox| {
        let (wakes, stops) = if options.quick { (100, 5) } else { (2_000, 50) };
        let acts = acts(sandbox, wakes, stops)?;
        println!("{:>44}  {:>9} {:>9} {:>9}  µs", acts.title, "p50", "p99", "max");
        for act in &acts.rows {
            let micros = |share: f64| act.took.value_at_quantile(share) as f64 / 1e3;
            println!(
                "{:>44}  {:>9.1} {:>9.1} {:>9.1}",
                act.name,
                micros(0.5),
                micros(0.99),
                micros(1.0)
            );
        }
        Ok(vec![json!({ "case": "acts", "acts": acts.to_json() })])
    })
}
