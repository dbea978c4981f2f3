//! What a person reads: the table, the report, and histograms for the usual plotters.

use std::fmt::Write;

use comfy_table::{CellAlignment, Table, presets};
use hdrhistogram::Histogram;
use tun_driver::lab::measure::{Figure, Spread};

use crate::bench::{Outcome, Results};

/// For the terminal: the verdict, and a table per case.
pub(crate) fn text(results: &Results) -> String {
    render(results, "")
}

/// The same as Markdown, with how it was measured.
pub(crate) fn markdown(results: &Results) -> String {
    let mut out = String::from("# tun-driver bench\n\n");
    out.push_str(&render(results, "## "));
    out.push_str(
        "\n## How to read this\n\n\
         In each round every way has one turn, in changing order; the figures are medians over the rounds, with the quartiles in brackets. \
         A ratio is taken within a round against the first way of its table, so that the machine's drift cancels out; below 1 is better. \
         CPU is the measuring thread's own time. All ways drive the same kind of device in the same throw-away network namespace, and every \
         packet is accounted for: a round in which one is missing fails the run.\n",
    );
    out
}

fn render(results: &Results, heading: &str) -> String {
    let mut out = String::new();
    for sentence in verdict(results) {
        let _ = writeln!(out, "{sentence}");
    }
    let _ = writeln!(out, "\n{}", results.machine);
    let _ = writeln!(
        out,
        "{} rounds in {:.0} s, {}.{}",
        results.rounds,
        results.seconds,
        if results.rootless {
            "in a user namespace"
        } else {
            "as root"
        },
        if results.quick {
            " A quick run: not to be cited."
        } else {
            ""
        },
    );
    for line in &results.missing {
        let _ = writeln!(out, "{line}");
    }
    for outcome in &results.outcomes {
        let note = outcome.note.map(|note| format!(" ({note})")).unwrap_or_default();
        let _ = writeln!(out, "\n{heading}{}{note}\n", outcome.title);
        let _ = writeln!(out, "{}", table(outcome));
    }
    out
}

/// Three sentences: what was gained in receiving and sending, in forwarding, and in latency.
fn verdict(results: &Results) -> Vec<String> {
    let ratio = |key: &str, way: &str, figure: &str| {
        let outcome = results.outcomes.iter().find(|outcome| outcome.title.starts_with(key))?;
        let way = outcome
            .report
            .ways
            .iter()
            .find(|candidate| candidate.name.contains(way))?;
        Some(way.figure(figure)?.ratio?.median)
    };
    let cpu = |key: &str| ratio(key, "io_uring", "cpu_ns_per_packet");
    let mut sentences = Vec::new();
    if let (Some(receive), Some(send)) = (cpu("receive"), cpu("send")) {
        sentences.push(format!(
            "Through io_uring a small packet costs {:.0} % of the plain loop's CPU to receive and {:.0} % to send.",
            receive * 100.0,
            send * 100.0
        ));
    }
    if let Some(forward) = cpu("forward, 1400") {
        sentences.push(format!(
            "Forwarding 1400-byte packets through the kernel costs {:.0} %.",
            forward * 100.0
        ));
    }
    if let (Some(block), Some(spin)) = (
        ratio("round trip", "io_uring", "p50_us"),
        ratio("round trip", "io_uring, spin", "p50_us"),
    ) {
        sentences.push(format!(
            "A single packet's round trip takes {:.0} % of the plain loop's median when the worker sleeps, and {:.0} % when it watches first.",
            block * 100.0,
            spin * 100.0
        ));
    }
    sentences
}

fn table(outcome: &Outcome) -> Table {
    let latency = !outcome.histograms.is_empty();
    let figures: &[(&str, &str, f64)] = if latency {
        &[
            ("p50_us", "p50 µs", 1.0),
            ("p99_us", "p99 µs", 1.0),
            ("p99_9_us", "p99.9 µs", 1.0),
            ("cpu_ns_per_packet", "CPU µs", 1e-3),
        ]
    } else {
        &[("cpu_ns_per_packet", "CPU ns/packet", 1.0)]
    };
    let mut header = vec!["way".to_owned()];
    if !latency {
        header.push("Mpps of one core".to_owned());
    }
    for (_, heading, _) in figures {
        header.push((*heading).to_owned());
        header.push("ratio".to_owned());
    }
    let mut table = Table::new();
    table.load_style(presets::ASCII_MARKDOWN).set_header(header);
    for way in &outcome.report.ways {
        let mut row = vec![way.name.clone()];
        if !latency {
            row.push(
                way.figure("wall_ns_per_packet")
                    .map_or(String::new(), |wall| format!("{:.2}", 1e3 / wall.value.median)),
            );
        }
        for (name, _, scale) in figures {
            let figure = way.figure(name);
            row.push(figure.map_or(String::new(), |figure| spread(&figure.value, *scale)));
            row.push(figure.map_or(String::new(), ratio));
        }
        table.add_row(row);
    }
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table
}

fn spread(value: &Spread, scale: f64) -> String {
    let digits = if value.median * scale < 100.0 { 1 } else { 0 };
    let [low, median, high] = [value.lower_quartile, value.median, value.upper_quartile].map(|value| value * scale);
    format!("{median:.digits$} [{low:.digits$}–{high:.digits$}]")
}

fn ratio(figure: &Figure) -> String {
    figure.ratio.map_or("1".to_owned(), |ratio| {
        format!(
            "{:.2} [{:.2}–{:.2}]",
            ratio.median, ratio.lower_quartile, ratio.upper_quartile
        )
    })
}

/// A percentile table as HdrHistogram's plotters read it; values in microseconds.
pub(crate) fn hgrm(histogram: &Histogram<u64>) -> String {
    let mut out = String::from("       Value     Percentile TotalCount 1/(1-Percentile)\n\n");
    let mut count = 0;
    for step in histogram.iter_quantiles(5) {
        count += step.count_since_last_iteration();
        let (value, share) = (step.value_iterated_to() as f64 / 1e3, step.quantile_iterated_to());
        let _ = write!(out, "{value:12.3} {share:2.12} {count:10}");
        let _ = if share < 1.0 {
            writeln!(out, " {:14.2}", 1.0 / (1.0 - share))
        } else {
            writeln!(out)
        };
    }
    let _ = writeln!(
        out,
        "#[Mean    = {:12.3}, StdDeviation   = {:12.3}]",
        histogram.mean() / 1e3,
        histogram.stdev() / 1e3
    );
    let _ = writeln!(
        out,
        "#[Max     = {:12.3}, Total count    = {:12}]",
        histogram.max() as f64 / 1e3,
        histogram.len()
    );
    let _ = writeln!(
        out,
        "#[Buckets = {:12}, SubBuckets     = {:12}]",
        histogram.buckets(),
        histogram.distinct_values()
    );
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentile_table_counts_every_value_and_ends_with_the_greatest() {
        let mut histogram = Histogram::<u64>::new(3).unwrap();
        for value in 1..=1_000 {
            histogram.record(value * 1_000).unwrap();
        }
        let table = hgrm(&histogram);
        let rows: Vec<Vec<f64>> = table
            .lines()
            .skip(2)
            .filter(|line| !line.starts_with('#'))
            .map(|line| line.split_whitespace().map(|word| word.parse().unwrap()).collect())
            .collect();
        let last = rows.last().unwrap();
        assert_eq!(last[2], 1_000.0);
        assert!((last[0] - 1_000.0).abs() <= 1.0, "{last:?}");
        assert!(
            rows.windows(2)
                .all(|pair| pair[0][0] <= pair[1][0] && pair[0][2] <= pair[1][2])
        );
        assert!(rows.iter().all(|row| row.len() == if row[1] < 1.0 { 4 } else { 3 }));
    }
}
