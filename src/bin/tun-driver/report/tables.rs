//! The tables of a run, whatever they are written as.

use tun_driver::lab::measure::{Figure, Report, Spread};
use tun_driver::lab::offload_cases::{CPU_KIB, GBIT};
use tun_driver::lab::results::{Acts, Curve, Scaling};

use super::numbers;
use crate::bench::Outcome;

pub(super) struct Table {
    pub(super) columns: Vec<Column>,
    pub(super) rows: Vec<Vec<Cell>>,
}

pub(super) struct Column {
    pub(super) name: String,
    /// A sentence for the legend.
    pub(super) told: String,
}

/// A value, and in brackets what belongs to it: quartiles.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Cell {
    pub(super) value: String,
    pub(super) range: Option<String>,
}

impl Cell {
    pub(super) fn of(value: impl ToString) -> Self {
        Self {
            value: value.to_string(),
            range: None,
        }
    }

    fn spread(value: &Spread, scale: f64) -> Self {
        Self {
            value: numbers::short(value.median * scale),
            range: Some(numbers::quartiles(value, scale)),
        }
    }

    fn ratio(value: Option<&Spread>, otherwise: &str) -> Self {
        match value {
            Some(value) => {
                let (value, range) = numbers::ratio(value);
                Self {
                    value,
                    range: Some(range),
                }
            }
            None => Self::of(otherwise),
        }
    }
}

pub(super) fn column(name: &str, told: &str) -> Column {
    Column {
        name: name.to_owned(),
        told: told.to_owned(),
    }
}

/// Throughput or round trips, one row per way.
pub(super) fn outcome(outcome: &Outcome) -> Table {
    let ways = &outcome.report.ways;
    let baseline = ways
        .get(outcome.report.baseline)
        .map_or("the first way", |way| way.name.as_str());
    let mut columns = vec![column(
        "way",
        "How the device is driven; “How to read this” lists the ways.",
    )];
    let mut rows: Vec<Vec<Cell>> = ways.iter().map(|way| vec![Cell::of(&way.name)]).collect();
    let mut add = |column: Column, cell: &dyn Fn(usize) -> Cell| {
        columns.push(column);
        for (index, row) in rows.iter_mut().enumerate() {
            row.push(cell(index));
        }
    };
    let figure = |way: usize, name: &str| ways[way].figure(name);
    let against = |way: usize, name: &str| {
        let same = if way == outcome.report.baseline { "1" } else { "–" };
        Cell::ratio(
            figure(way, name).and_then(|figure: &Figure| figure.ratio.as_ref()),
            same,
        )
    };
    let ratio_told =
        |what: &str| format!("{what}, divided by that of “{baseline}” in the same round; below 1 is better.");
    if outcome.histograms.is_empty() {
        add(
            column(
                "Mpps",
                "Million packets per second that one core moves while it does nothing else; higher is better.",
            ),
            &|way| mpps(&outcome.report, way).map_or(Cell::default(), |value| Cell::ratio(Some(&value), "")),
        );
        add(
            column(
                "CPU ns/packet",
                "Nanoseconds of the measuring thread's CPU time for each packet; lower is better.",
            ),
            &|way| figure(way, "cpu_ns_per_packet").map_or(Cell::default(), |figure| Cell::spread(&figure.value, 1.0)),
        );
        add(column("CPU ratio", &ratio_told("CPU time per packet")), &|way| {
            against(way, "cpu_ns_per_packet")
        });
        if (0..ways.len()).any(|way| figure(way, GBIT).is_some()) {
            add(
                column(
                    "Gbit/s",
                    "Thousand million bits of payload per second; higher is better.",
                ),
                &|way| figure(way, GBIT).map_or(Cell::default(), |figure| Cell::spread(&figure.value, 1.0)),
            );
            let told =
                format!("Payload per second, divided by that of “{baseline}” in the same round; above 1 is better.");
            add(column("Gbit/s ratio", &told), &|way| against(way, GBIT));
            add(
                column(
                    "CPU ns/KiB",
                    "Nanoseconds of the measuring thread's CPU time for each 1,024 bytes of payload; lower is better.",
                ),
                &|way| figure(way, CPU_KIB).map_or(Cell::default(), |figure| Cell::spread(&figure.value, 1.0)),
            );
        }
        if (0..ways.len()).any(|way| figure(way, "packets_per_call").is_some()) {
            add(
                column(
                    "packets/call",
                    "Packets for each entry into the kernel, where the way counts its entries.",
                ),
                &|way| {
                    figure(way, "packets_per_call")
                        .map_or(Cell::of("–"), |figure| Cell::of(numbers::short(figure.value.median)))
                },
            );
        }
    } else {
        for (name, heading, told) in [
            ("p50_us", "p50 µs", "Microseconds that half of the trips did not exceed"),
            ("p99_us", "p99 µs", "Microseconds that 99 in 100 trips did not exceed"),
            (
                "p99_9_us",
                "p99.9 µs",
                "Microseconds that 999 in 1000 trips did not exceed",
            ),
        ] {
            add(column(heading, &format!("{told}; lower is better.")), &|way| {
                figure(way, name).map_or(Cell::default(), |figure| Cell::spread(&figure.value, 1.0))
            });
            let short = heading.trim_end_matches(" µs");
            add(column(&format!("{short} ratio"), &ratio_told(short)), &|way| {
                against(way, name)
            });
        }
        add(
            column(
                "CPU µs/trip",
                "Microseconds of the echoing thread's CPU time for each trip, waiting included where it waits awake.",
            ),
            &|way| figure(way, "cpu_ns_per_packet").map_or(Cell::default(), |figure| Cell::spread(&figure.value, 1e-3)),
        );
        add(column("CPU ratio", &ratio_told("CPU time per trip")), &|way| {
            against(way, "cpu_ns_per_packet")
        });
    }
    Table { columns, rows }
}

/// Million packets per second of one core.
pub(super) fn mpps(report: &Report, way: usize) -> Option<Spread> {
    let wall = report.ways.get(way)?.figure("wall_ns_per_packet")?.value;
    // The reciprocal turns the order around.
    Some(Spread {
        min: 1e3 / wall.max,
        lower_quartile: 1e3 / wall.upper_quartile,
        median: 1e3 / wall.median,
        upper_quartile: 1e3 / wall.lower_quartile,
        max: 1e3 / wall.min,
    })
}

/// One row per rate and way.
pub(super) fn curve(curve: &Curve) -> Table {
    let baseline = curve
        .lines
        .get(curve.baseline)
        .map_or("the baseline", |line| line.way.as_str());
    let columns = vec![
        column(
            "offered",
            "Packets per second that the generator was told to send; “max”: as fast as it can.",
        ),
        column(
            "way",
            "How the receiver waits and reads; “How to read this” lists the ways.",
        ),
        column("arrived kpps", "Thousand packets per second that the receiver got."),
        column(
            "lost",
            "Share of the packets sent that did not arrive, over all rounds.",
        ),
        column(
            "CPU µs",
            "Microseconds of the measured process's CPU time for each packet that arrived; lower is better.",
        ),
        column(
            "CPU ratio",
            &format!(
                "CPU time per packet, divided by that of “{baseline}” in the same round at the same rate; below 1 is better."
            ),
        ),
        column(
            "machine µs",
            "Microseconds of the whole machine's CPU time above idle, but for the generator's thread, for each packet that arrived: with what the kernel does in interrupts and to put CPUs to sleep and wake them.",
        ),
        column(
            "p50 µs",
            "Microseconds that half of the packets did not exceed, from the moment each was due to be sent.",
        ),
        column("p99 µs", "The same for 99 in 100 packets."),
        column(
            "p99 more µs",
            &format!("p99 minus that of “{baseline}” in the same round at the same rate; below 0 is better."),
        ),
        column(
            "remarks",
            "“generator's limit”: the generator could not send faster, so the way may be able to do more. Also packets that came late (behind a later one of their flow), twice, or damaged; nothing said: none.",
        ),
    ];
    let mut keyed: Vec<((u64, usize), Vec<Cell>)> = Vec::new();
    for (index, line) in curve.lines.iter().enumerate() {
        for point in &line.points {
            let mut remarks = Vec::new();
            if point.generator_bound {
                remarks.push("generator's limit".to_owned());
            }
            for (count, what) in [
                (point.late, "late"),
                (point.duplicates, "twice"),
                (point.damaged, "damaged"),
            ] {
                if count > 0 {
                    remarks.push(format!("{count} {what}"));
                }
            }
            let same = if index == curve.baseline { "1" } else { "–" };
            let more = match point.p99_above_baseline_us {
                Some(more) => {
                    let tenth = |value: f64| format!("{value:+.1}").replace('-', "−");
                    Cell {
                        value: tenth(more.median),
                        range: Some(format!(
                            "{} to {}",
                            tenth(more.lower_quartile),
                            tenth(more.upper_quartile)
                        )),
                    }
                }
                None => Cell::of(if index == curve.baseline { "0" } else { "–" }),
            };
            let row = vec![
                Cell::of(
                    point
                        .offered_pps
                        .map_or("max".to_owned(), |rate| numbers::rate(rate as f64)),
                ),
                Cell::of(&line.way),
                Cell::spread(&point.achieved_pps, 1e-3),
                Cell::of(numbers::percent(point.loss())),
                Cell::spread(&point.cpu_ns_per_packet, 1e-3),
                Cell::ratio(point.cpu_ratio.as_ref(), same),
                Cell::spread(&point.machine_cpu_ns_per_packet, 1e-3),
                Cell::spread(&point.p50_us, 1.0),
                Cell::spread(&point.p99_us, 1.0),
                more,
                Cell::of(remarks.join(", ")),
            ];
            keyed.push(((point.offered_pps.unwrap_or(u64::MAX), index), row));
        }
    }
    keyed.sort_by_key(|(key, _)| *key);
    Table {
        columns,
        rows: keyed.into_iter().map(|(_, row)| row).collect(),
    }
}

/// One row per set-up.
pub(super) fn scaling(scaling: &Scaling) -> Table {
    let first = scaling.rows.first().map_or("the first set-up", |row| row.name.as_str());
    let columns = vec![
        column(
            "set-up",
            "How many queues the device has, and how many workers (threads, each on a core of its own as long as there are any) serve them.",
        ),
        column(
            "kpps",
            "Thousand packets per second, all queues together; higher is better.",
        ),
        column(
            "ratio",
            &format!("That, divided by that of “{first}” in the same round; higher is better."),
        ),
        column(
            "per queue",
            "Share of the packets that the busiest and the idlest queue had. A flow stays on one queue.",
        ),
    ];
    let rows = scaling.rows.iter().enumerate().map(|(index, row)| {
        let shares = row.per_queue_share.iter().copied();
        let (least, most) = shares.fold((f64::INFINITY, 0.0_f64), |(least, most), share| {
            (least.min(share), most.max(share))
        });
        let spread = if row.per_queue_share.len() < 2 {
            "all on one".to_owned()
        } else {
            format!("{} to {}", numbers::percent(least), numbers::percent(most))
        };
        vec![
            Cell::of(&row.name),
            Cell::spread(&row.pps, 1e-3),
            Cell::ratio(row.ratio.as_ref(), if index == 0 { "1" } else { "–" }),
            Cell::of(spread),
        ]
    });
    Table {
        columns,
        rows: rows.collect(),
    }
}

/// One row per act.
pub(super) fn acts(acts: &Acts) -> Table {
    let columns = vec![
        column("what", "The act that was timed."),
        column("times", "How often."),
        column("p50", "Half of them took no longer."),
        column("p99", "99 in 100 took no longer; nothing is said of fewer than 100."),
        column("longest", "The longest of all."),
        column("promised", "What none may exceed, and whether none did."),
    ];
    let rows = acts.rows.iter().map(|act| {
        let at = |share| numbers::time(act.took.value_at_quantile(share) as f64);
        let promised = match (act.bound, act.kept()) {
            (Some(bound), Some(kept)) => {
                let kept = if kept { "kept" } else { "NOT KEPT" };
                format!(
                    "{}: {kept}",
                    numbers::time(bound.as_nanos() as f64)
                        .replace(".00", "")
                        .replace(".0 ", " ")
                )
            }
            (Some(_), None) => format!(
                "not judged: the machine was busy, a sleeping thread woke {} late",
                numbers::time(act.delay.as_nanos() as f64)
            ),
            (None, _) => "–".to_owned(),
        };
        vec![
            Cell::of(&act.name),
            Cell::of(act.took.len()),
            Cell::of(at(0.5)),
            // Of fewer, it would be the longest under another name.
            Cell::of(if act.took.len() < 100 {
                "–".to_owned()
            } else {
                at(0.99)
            }),
            Cell::of(numbers::time(act.took.max() as f64)),
            Cell::of(promised),
        ]
    });
    Table {
        columns,
        rows: rows.collect(),
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use hdrhistogram::Histogram;
    use tun_driver::lab::results::Act;

    use super::*;
    use crate::report::sample;

    #[test]
    fn every_row_has_a_cell_for_every_column() {
        let results = sample::results();
        let tables = results.outcomes.iter().map(outcome).chain([
            curve(&results.curves[0]),
            scaling(&results.scalings[0]),
            acts(&results.acts[0]),
        ]);
        for table in tables {
            assert!(!table.rows.is_empty());
            assert!(table.rows.iter().all(|row| row.len() == table.columns.len()));
        }
    }

    #[test]
    fn rates_come_in_rising_order_and_the_maximum_last() {
        let table = curve(&sample::results().curves[0]);
        let mut rates: Vec<&str> = table.rows.iter().map(|row| row[0].value.as_str()).collect();
        rates.dedup();
        assert_eq!(rates, ["20 k", "50 k", "100 k", "200 k", "400 k", "max"]);
    }

    #[test]
    fn no_99th_percentile_of_a_handful() {
        let row = |count| {
            let mut took = Histogram::new(3).unwrap();
            took.record_n(1_000, count).unwrap();
            let rows = vec![Act {
                name: String::new(),
                took,
                bound: None,
                delay: Duration::ZERO,
            }];
            acts(&Acts {
                title: String::new(),
                rows,
            })
            .rows[0][3]
                .value
                .clone()
        };
        assert_eq!((row(99), row(100)), ("–".to_owned(), "1.00 µs".to_owned()));
    }
}
