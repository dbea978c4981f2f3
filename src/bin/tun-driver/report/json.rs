//! The report for machines; `docs/bench.schema.json` describes it.

use std::time::SystemTime;

use serde_json::{Value, json};
use tun_driver::lab::measure::quantiles_json;
use tun_driver::lab::results::{Acts, Curve, Scaling};

use crate::bench::Results;

pub(crate) fn json(results: &Results) -> Value {
    let cases = results.outcomes.iter().map(|outcome| {
        let latency = outcome
            .histograms
            .iter()
            .zip(&outcome.report.ways)
            .map(|(histogram, way)| {
                let mut told = quantiles_json(histogram);
                told["way"] = json!(way.name);
                told
            });
        json!({
            "case": outcome.key, "title": outcome.title, "packet_bytes": outcome.packet_len, "sink": outcome.note,
            "report": outcome.report.to_json(), "latency": latency.collect::<Vec<_>>(),
        })
    });
    json!({
        "schema_version": 2,
        "tool_version": env!("CARGO_PKG_VERSION"),
        "command": results.command,
        "began_unix_s": results.began.duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_secs()),
        "duration_s": results.seconds,
        "citable": !results.quick && !results.debug_build && results.incomplete.is_none(),
        "debug_build": results.debug_build,
        "complete": results.incomplete.is_none(),
        "incomplete_because": results.incomplete,
        "rounds": results.rounds,
        "rootless": results.rootless,
        "machine": results.machine.to_json(),
        "missing": results.missing,
        "cases": cases.collect::<Vec<_>>(),
        "curves": results.curves.iter().map(Curve::to_json).collect::<Vec<_>>(),
        "scaling": results.scalings.iter().map(Scaling::to_json).collect::<Vec<_>>(),
        "acts": results.acts.iter().map(Acts::to_json).collect::<Vec<_>>(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::sample;

    fn schema() -> Value {
        serde_json::from_str(include_str!("../../../../docs/bench.schema.json")).unwrap()
    }

    #[test]
    fn the_schema_is_one_and_describes_all_that_is_written() {
        assert!(jsonschema::draft202012::meta::is_valid(&schema()));
        let validator = jsonschema::draft202012::new(&schema()).unwrap();
        let told = json(&sample::results());
        let errors: Vec<String> = validator
            .iter_errors(&told)
            .map(|error| format!("{}: {error}", error.instance_path()))
            .collect();
        assert!(errors.is_empty(), "{errors:#?}");
    }

    #[test]
    fn the_schema_refuses_what_it_does_not_know_and_what_is_missing() {
        let validator = jsonschema::draft202012::new(&schema()).unwrap();
        let told = json(&sample::results());
        for place in [
            "",
            "/machine",
            "/cases/0",
            "/cases/0/report",
            "/curves/0",
            "/curves/0/lines/0/points/0",
            "/scaling/0/rows/0",
            "/acts/0/rows/0",
        ] {
            let mut more = told.clone();
            more.pointer_mut(place).unwrap()["nobody_knows"] = json!(1);
            assert!(!validator.is_valid(&more), "{place}: an unknown key");
            let keys: Vec<String> = told
                .pointer(place)
                .unwrap()
                .as_object()
                .unwrap()
                .keys()
                .cloned()
                .collect();
            for key in keys {
                let mut less = told.clone();
                less.pointer_mut(place).unwrap().as_object_mut().unwrap().remove(&key);
                assert!(!validator.is_valid(&less), "{place}: without {key}");
            }
        }
    }
}
