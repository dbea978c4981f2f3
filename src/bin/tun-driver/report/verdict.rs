//! What was found, in a few sentences. What matters in them stands between `**`, as in Markdown.

use tun_driver::lab::measure::WayReport;
use tun_driver::lab::offload_cases::{GBIT, MINIMAL};

use super::numbers;
use crate::bench::Results;

/// Throughput, superpackets, latency, and moderate rates with scaling. A sentence whose
/// measurements are missing is left out.
pub(super) fn sentences(results: &Results) -> Vec<String> {
    let sentences: Vec<String> = [
        throughput(results),
        superpackets(results),
        latency(results),
        rates(results),
    ]
    .into_iter()
    .flatten()
    .collect();
    if sentences.is_empty() {
        return vec!["Nothing that this summary speaks of was measured.".to_owned()];
    }
    sentences
}

fn throughput(results: &Results) -> Option<String> {
    let mut parts = Vec::new();
    for (key, verb) in [("drain", "to receive"), ("sink", "to send"), ("forward", "to forward")] {
        let Some(ratio) = ratio(results, key, "io_uring", "cpu_ns_per_packet") else {
            continue;
        };
        parts.push(format!("**{:.0} %** {verb}", ratio * 100.0));
    }
    let first = results.outcomes.iter().find(|outcome| outcome.histograms.is_empty())?;
    let bytes = first.packet_len.map_or(String::new(), |bytes| format!("{bytes}-byte "));
    match parts.len() {
        0 => None,
        _ => Some(format!(
            "Of the CPU time that a plain loop of read(2) and write(2) spends on a {bytes}packet, a worker on io_uring spends {}.",
            listed(&parts)
        )),
    }
}

/// The worker beside both loops: the one that it is compared with, and the one that moves the same
/// superpackets by system calls alone.
fn superpackets(results: &Results) -> Option<String> {
    let outcome = results.outcomes.iter().find(|outcome| outcome.key == "superpackets")?;
    let ways = &outcome.report.ways;
    let gbit = |way: &WayReport| way.figure(GBIT).map(|figure| figure.value.median);
    let worker = ways.iter().find(|way| way.name.starts_with("worker, "))?;
    let (baseline, minimal) = (
        ways.get(outcome.report.baseline)?,
        ways.iter().find(|way| way.name == MINIMAL)?,
    );
    let (own, bare, plain) = (gbit(worker)?, gbit(minimal)?, gbit(baseline)?);
    let word = if bare > own { "more" } else { "less" };
    Some(format!(
        "With superpackets of 64 KiB “{}” moves **{} Gbit/s** of TCP through the kernel; a bare loop of read(2) and write(2) over the same \
         superpackets moves {word}, **{} Gbit/s**; “{}” moves {} Gbit/s.",
        worker.name,
        numbers::short(own),
        numbers::short(bare),
        baseline.name,
        numbers::short(plain),
    ))
}

fn latency(results: &Results) -> Option<String> {
    let case = results.outcomes.iter().find(|outcome| !outcome.histograms.is_empty())?;
    let median = |way: &WayReport| way.figure("p50_us").map(|figure| numbers::short(figure.value.median));
    let way = |name: &str| {
        case.report
            .ways
            .iter()
            .find(|way| way.name == name || (name.ends_with(' ') && way.name.starts_with(name)))
    };
    let plain = median(case.report.ways.get(case.report.baseline)?)?;
    let asleep = way("worker, io_uring").and_then(median)?;
    let watching = way("worker, io_uring, spin ").and_then(median);
    Some(match watching {
        Some(watching) => format!(
            "A single packet's round trip takes **{asleep} µs** in the median when the worker sleeps until it comes, **{watching} µs** when it \
             watches for it first, and {plain} µs with the plain loop."
        ),
        None => format!(
            "A single packet's round trip takes **{asleep} µs** in the median, and {plain} µs with the plain loop."
        ),
    })
}

/// The verdict speaks of the first rate from here on: there, packets come often enough for waiting to matter, and the machine is not full.
const MIDDLING_PPS: u64 = 200_000;

fn rates(results: &Results) -> Option<String> {
    let curve = results.curves.first().and_then(|curve| {
        let (chosen, baseline) = (curve.lines.get(curve.chosen)?, curve.lines.get(curve.baseline)?);
        let point = chosen.points.iter().find(|point| point.offered_pps.is_some_and(|pps| pps >= MIDDLING_PPS))?;
        let other = baseline.points.iter().find(|other| other.offered_pps == point.offered_pps)?;
        let ratio = point.cpu_ratio?.median;
        Some(format!(
            "at {},000 packets per second the default waiting costs **{:.0} %** of the CPU of “{}”, and 99 in 100 packets \
             take at most **{} µs** (there {} µs)",
            point.offered_pps? / 1_000,
            ratio * 100.0,
            baseline.way,
            numbers::short(point.p99_us.median),
            numbers::short(other.p99_us.median),
        ))
    });
    let scaling = results.scalings.first().and_then(|scaling| {
        let (first, last) = (scaling.rows.first()?, scaling.rows.last()?);
        let ratio = last.ratio?.median;
        Some(format!(
            "“{}” move **{ratio:.2} times** as much as “{}”",
            last.name, first.name
        ))
    });
    let sentence = match (curve, scaling) {
        (Some(curve), Some(scaling)) => format!("{curve}; {scaling}."),
        (Some(one), None) | (None, Some(one)) => format!("{one}."),
        (None, None) => return None,
    };
    let mut letters = sentence.chars();
    letters
        .next()
        .map(|letter| letter.to_uppercase().chain(letters).collect())
}

/// The median of a figure's ratio in the first case of this kind, for the first way whose name has `way` in it.
fn ratio(results: &Results, key: &str, way: &str, figure: &str) -> Option<f64> {
    let outcome = results.outcomes.iter().find(|outcome| outcome.key == key)?;
    let way = outcome
        .report
        .ways
        .iter()
        .find(|candidate| candidate.name.contains(way))?;
    Some(way.figure(figure)?.ratio?.median)
}

/// `a`, `a and b`, `a, b and c`.
fn listed(parts: &[String]) -> String {
    match parts {
        [] => String::new(),
        [one] => one.clone(),
        [first @ .., last] => format!("{} and {last}", first.join(", ")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::sample;

    #[test]
    fn four_sentences_with_the_numbers_that_matter() {
        let results = sample::results();
        let told = sentences(&results);
        assert_eq!(told.len(), 4, "{told:#?}");
        let ratio = ratio(&results, "drain", "io_uring", "cpu_ns_per_packet").unwrap();
        assert!(
            told[0].contains(&format!("**{:.0} %** to receive", ratio * 100.0)),
            "{}",
            told[0]
        );
        assert!(
            told[3].starts_with("At 200,000 packets") && told[3].contains("“2 queues, 2 workers” move"),
            "{}",
            told[3]
        );
        assert!(
            told.iter()
                .all(|one| one.ends_with('.') && one.matches("**").count() % 2 == 0)
        );
    }

    #[test]
    fn the_bare_loop_stands_beside_the_worker_with_superpackets() {
        let mut results = sample::results();
        let told = |results: &Results| sentences(results)[1].clone();
        let gbit = |results: &Results, way: &str| {
            let outcome = results
                .outcomes
                .iter()
                .find(|outcome| outcome.key == "superpackets")
                .unwrap();
            let way = outcome.report.ways.iter().find(|known| known.name == way).unwrap();
            numbers::short(way.figure(GBIT).unwrap().value.median)
        };
        let (own, bare) = (gbit(&results, "worker, io_uring, offloads"), gbit(&results, MINIMAL));
        let sentence = told(&results);
        assert!(sentence.contains(&format!("**{own} Gbit/s**")), "{sentence}");
        assert!(
            sentence.contains(&format!("moves more, **{bare} Gbit/s**")),
            "{sentence}"
        );
        results.outcomes.retain(|outcome| outcome.key != "superpackets");
        assert!(!told(&results).contains("superpackets"));
    }

    #[test]
    fn what_was_not_measured_is_not_spoken_of() {
        let mut results = sample::results();
        results.outcomes.retain(|outcome| outcome.key == "sink");
        results.curves.clear();
        results.scalings.clear();
        let told = sentences(&results);
        assert_eq!(told.len(), 1);
        assert!(told[0].contains("to send") && !told[0].contains("to receive"));
        results.outcomes.clear();
        assert_eq!(sentences(&results).len(), 1, "never nothing at all");
    }
}
