//! What was measured, as Markdown for people and as JSON.

use std::fmt::Write;

use serde_json::{Value, json};
use tun_driver::lab::measure::{CPU_NS, Machine, Spread};

use crate::compare::{Against, Better, Shown, Table};
use crate::ways::{BASELINE, CUTTING, OURS, PASSING, PLAIN, TWO_THREADS, Whose, not_offered};

/// Everything that figures must be quoted with.
pub(crate) struct Context {
    pub(crate) machine: Machine,
    pub(crate) commit: Option<String>,
    pub(crate) command: String,
    pub(crate) quick: bool,
    pub(crate) rounds: usize,
    /// Name and version of what takes part.
    pub(crate) versions: Vec<(String, String)>,
}

/// A case that gave nothing, or not all, and why.
pub(crate) struct Missing {
    pub(crate) case: &'static str,
    pub(crate) why: String,
}

/// A goal of this library, and what was measured of it.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Target {
    /// For people.
    pub(crate) what: String,
    /// `≤ 0.75`
    pub(crate) bound: String,
    pub(crate) ratio: Spread,
    /// By the median.
    pub(crate) kept: bool,
}

impl Context {
    /// The head of the report.
    pub(crate) fn markdown(&self) -> String {
        let mut text = String::from("# tun_driver beside other TUN/TAP libraries\n\n");
        let _ = writeln!(text, "- machine: {}", self.machine);
        let versions: Vec<String> = self
            .versions
            .iter()
            .map(|(name, version)| format!("{name} {version}"))
            .collect();
        let _ = writeln!(text, "- versions: {}", versions.join(", "));
        let commit = self.commit.as_deref().unwrap_or("unknown");
        let _ = writeln!(text, "- commit {commit}, command: `{}`", self.command);
        let _ = writeln!(
            text,
            "- {} rounds after one of warm-up, the ways in turn; ratios are formed within rounds; medians, quartiles in brackets",
            self.rounds
        );
        if self.quick {
            text.push_str("- **a quick run: it shows that everything works, and is not to be quoted**\n");
        }
        let _ = writeln!(
            text,
            "- `{BASELINE} (again)` is the baseline run a second time in each round: its ratio says how far others can be trusted (A/A)"
        );
        text.push_str(
            "- LOSES: the median ratio of a way of tun_driver to the best peer is on the wrong side of 1. The floor is no peer.\n",
        );
        text
    }

    fn json(&self) -> Value {
        json!({
            "machine": self.machine.to_json(),
            "commit": self.commit,
            "command": self.command,
            "quick": self.quick,
            "rounds": self.rounds,
            "versions": self.versions.iter().cloned().collect::<std::collections::BTreeMap<_, _>>(),
        })
    }
}

impl Table {
    /// One line per figure and way.
    pub(crate) fn markdown(&self) -> String {
        let mut text = format!("\n## {}\n\n", self.title);
        for note in &self.notes {
            let _ = writeln!(text, "- {note}");
        }
        let head = [
            "figure",
            "way",
            "tier",
            "median",
            "÷ tun-rs sync",
            "÷ plain loop",
            "against the best peer",
        ];
        let mut rows = vec![head.map(str::to_owned).to_vec()];
        for &shown in &self.figures {
            rows.extend((0..self.report.ways.len()).map(|way| self.row(shown, way)));
        }
        text.push('\n');
        text.push_str(&aligned(&rows));
        text
    }

    fn row(&self, shown: Shown, way: usize) -> Vec<String> {
        let own = &self.report.ways[way];
        let entry = self.entries.get(way);
        let value = own.figure(shown.name).map(|figure| figure.value);
        let ratio_to = |name: &str| {
            self.place(name)
                .filter(|&other| other != way)
                .and_then(|other| self.ratio(shown.name, way, other))
                .map_or("-".to_owned(), |ratio| {
                    format!(
                        "{:.2} [{:.2}–{:.2}]",
                        ratio.median, ratio.lower_quartile, ratio.upper_quartile
                    )
                })
        };
        let ratios = if shown.better == Better::Told {
            ["-".to_owned(), "-".to_owned()]
        } else {
            [ratio_to(BASELINE), ratio_to(PLAIN)]
        };
        let judged: Vec<String> = self.against(shown, way).iter().map(Against::told).collect();
        let [to_baseline, to_plain] = ratios;
        vec![
            shown.name.to_owned(),
            own.name.clone(),
            entry.map_or(String::new(), |entry| entry.tier.to_string()),
            value.map_or("-".to_owned(), |value| {
                format!(
                    "{} [{}–{}]",
                    number(value.median),
                    number(value.lower_quartile),
                    number(value.upper_quartile)
                )
            }),
            to_baseline,
            to_plain,
            judged.join("; "),
        ]
    }

    fn json(&self) -> Value {
        let ways = self
            .entries
            .iter()
            .map(|entry| {
                let whose = match entry.whose {
                    Whose::Ours => "tun_driver",
                    Whose::Peer => "peer",
                    Whose::Floor => "floor",
                };
                json!({ "name": entry.name, "whose": whose, "tier": entry.tier })
            })
            .collect::<Vec<_>>();
        let mut comparisons = Vec::new();
        for &shown in &self.figures {
            for way in 0..self.report.ways.len() {
                let ratio = |name: &str| {
                    let other = self.place(name).filter(|&other| other != way)?;
                    self.ratio(shown.name, way, other).map(Spread::to_json)
                };
                comparisons.push(json!({
                    "figure": shown.name,
                    "better": match shown.better {
                        Better::Lower => "lower",
                        Better::Higher => "higher",
                        Better::Told => "neither",
                    },
                    "way": self.report.ways[way].name,
                    "ratio_to_tun_rs_sync": ratio(BASELINE),
                    "ratio_to_plain_loop": ratio(PLAIN),
                    "best_peers": self.against(shown, way).iter().map(Against::json).collect::<Vec<_>>(),
                }));
            }
        }
        json!({
            "case": self.case,
            "title": self.title,
            "notes": self.notes,
            "ways": ways,
            "comparisons": comparisons,
            "report": self.report.to_json(),
        })
    }
}

impl Against {
    fn told(&self) -> String {
        let verdict = if self.loses { "LOSES to" } else { "beats" };
        let unsure = if self.unsure {
            ", 1 is between the quartiles"
        } else {
            ""
        };
        format!(
            "{verdict} {} (tier {}): {:.2}{unsure}",
            self.peer, self.tier, self.ratio.median
        )
    }

    fn json(&self) -> Value {
        json!({
            "peer": self.peer, "tier": self.tier, "ratio": self.ratio.to_json(), "loses": self.loses,
            "one_is_between_the_quartiles": self.unsure,
        })
    }
}

/// What stands for the best peer with offload.
const OFFLOAD: &str = "offload";

/// The peer with offload that has the best median.
fn best_offload(table: &Table, shown: Shown) -> Option<usize> {
    table.best_peer_of(shown, |entry| entry.tier == 2 && entry.name.ends_with(OFFLOAD))
}

/// The goals that the tables say something of.
pub(crate) fn targets(tables: &[Table]) -> Vec<Target> {
    let mut found = Vec::new();
    let mut look = |title: &str, shown: Shown, way: &str, bound: f64, other: Option<&str>| {
        for table in tables.iter().filter(|table| table.title.starts_with(title)) {
            let peer = match other {
                Some(OFFLOAD) => best_offload(table, shown),
                Some(name) => table.place(name),
                None => table.best_peer(shown, 1),
            };
            let (Some(place), Some(peer)) = (table.place(way), peer) else {
                continue;
            };
            let Some(ratio) = table.ratio(shown.name, place, peer) else {
                continue;
            };
            let higher = shown.better == Better::Higher;
            found.push(Target {
                what: format!("{}, {}: {way} ÷ {}", table.title, shown.name, table.entries[peer].name),
                bound: format!("{} {bound:.2}", if higher { "≥" } else { "≤" }),
                ratio,
                kept: if higher {
                    ratio.median >= bound
                } else {
                    ratio.median <= bound
                },
            });
        }
    };
    let lower = |name| Shown {
        name,
        better: Better::Lower,
    };
    let gbit = Shown {
        name: "gbit_per_s",
        better: Better::Higher,
    };
    look("drain: 256 packets of 64 B", lower(CPU_NS), OURS, 0.78, Some(BASELINE));
    look("sink: 256 packets of 64 B", lower(CPU_NS), OURS, 0.80, Some(BASELINE));
    // The default, which is one thread, and as many threads as the baseline has.
    for way in [OURS, TWO_THREADS] {
        look("wire, TCP:", gbit, way, 1.30, Some(BASELINE));
        look("wire, TCP:", lower("cpu_s_per_gb"), way, 0.75, Some(BASELINE));
    }
    for (ways, bound) in [(PASSING, 0.60), (CUTTING, 0.80)] {
        for way in ways {
            look("wire, TCP:", lower("cpu_s_per_gb"), way, bound, Some(OFFLOAD));
        }
    }
    let spin = "tun_driver io_uring, Spin";
    look("latency:", lower("p50_us"), spin, 0.45, None);
    look("latency:", lower("p99_us"), spin, 0.65, None);
    let block = "tun_driver io_uring, Block";
    look("latency:", lower("p50_us"), block, 1.10, None);
    look("latency:", lower("p99_us"), block, 1.10, None);
    found
}

/// The end of the report: what the goals come to, where we lose, what is missing.
pub(crate) fn conclusion(tables: &[Table], missing: &[Missing]) -> String {
    let mut text = String::from("\n## Targets\n\n");
    let mut rows = vec![["what", "target", "measured", ""].map(str::to_owned).to_vec()];
    rows.extend(targets(tables).into_iter().map(|target| {
        let Spread {
            lower_quartile,
            median,
            upper_quartile,
            ..
        } = target.ratio;
        vec![
            target.what,
            target.bound,
            format!("{median:.2} [{lower_quartile:.2}–{upper_quartile:.2}]"),
            if target.kept { "kept" } else { "MISSED" }.to_owned(),
        ]
    }));
    text.push_str(&aligned(&rows));
    text.push_str("\n## Where tun_driver loses\n\n");
    let mut none = true;
    for table in tables {
        for &shown in &table.figures {
            for (way, entry) in table.entries.iter().enumerate() {
                let lost = table.against(shown, way).into_iter().filter(|against| against.loses);
                let lost: Vec<String> = lost.map(|against| against.told()).collect();
                if !lost.is_empty() {
                    none = false;
                    let _ = writeln!(
                        text,
                        "- {}, {}: {} {}",
                        table.title,
                        shown.name,
                        entry.name,
                        lost.join("; ")
                    );
                }
            }
        }
    }
    if none {
        text.push_str("In nothing that was measured here.\n");
    }
    text.push_str("\n## What is missing\n\n");
    for missing in missing {
        let _ = writeln!(text, "- {}: **not measured**: {}", missing.case, missing.why);
    }
    let mut cases: Vec<&str> = tables.iter().map(|table| table.case).collect();
    cases.dedup();
    for case in cases {
        for (way, why) in not_offered(case) {
            let _ = writeln!(text, "- {case}: {way}: {why}");
        }
    }
    text
}

/// All of it.
pub(crate) fn json(context: &Context, tables: &[Table], missing: &[Missing]) -> Value {
    let mut told = context.json();
    told["schema_version"] = json!(1);
    told["cases"] = tables.iter().map(Table::json).collect();
    told["targets"] = targets(tables)
        .into_iter()
        .map(|target| {
            json!({
                "what": target.what, "target": target.bound, "ratio": target.ratio.to_json(), "kept": target.kept,
            })
        })
        .collect();
    told["not_measured"] = missing
        .iter()
        .map(|missing| json!({ "case": missing.case, "why": missing.why }))
        .collect();
    let not_offered = tables
        .iter()
        .map(|table| (table.case, not_offered(table.case)))
        .collect::<std::collections::BTreeMap<_, _>>();
    told["not_offered"] = json!(not_offered);
    told
}

/// A Markdown table that can be read as it is.
fn aligned(rows: &[Vec<String>]) -> String {
    let columns = rows.first().map_or(0, Vec::len);
    let width = |column: usize| {
        let cells = rows.iter().map(|row| row[column].chars().count());
        cells.max().unwrap_or(0).max(3)
    };
    let widths: Vec<usize> = (0..columns).map(width).collect();
    let mut text = String::new();
    for (number, row) in rows.iter().enumerate() {
        for (cell, width) in row.iter().zip(&widths) {
            let _ = write!(text, "| {cell:width$} ");
        }
        text.push_str("|\n");
        if number == 0 {
            for width in &widths {
                let _ = write!(text, "|{:-<width$}", "", width = width + 2);
            }
            text.push_str("|\n");
        }
    }
    text
}

/// Three or four digits that count.
fn number(value: f64) -> String {
    match value.abs() {
        0.0 => "0".to_owned(),
        small if small < 10.0 => format!("{value:.2}"),
        middling if middling < 100.0 => format!("{value:.1}"),
        _ => format!("{value:.0}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::compare::tests::table;

    fn some() -> Table {
        let mut table = table(&[
            (BASELINE, Whose::Peer, 1, [100; 3]),
            (PLAIN, Whose::Peer, 1, [80; 3]),
            (OURS, Whose::Ours, 1, [90; 3]),
        ]);
        table.title = "drain: 256 packets of 64 B at a time".to_owned();
        table
    }

    #[test]
    fn a_lost_row_is_marked() {
        let text = some().markdown();
        let row = |figure: &str, way: &str| {
            let found = text.lines().find(|line| {
                let cells: Vec<&str> = line.split('|').map(str::trim).collect();
                cells.get(1) == Some(&figure) && cells.get(2) == Some(&way)
            });
            found.unwrap_or_else(|| panic!("no row of {way} in {text}")).to_owned()
        };
        let ours = row(CPU_NS, OURS);
        assert!(
            ours.contains("LOSES to plain read/write (tier 1): 1.12") && ours.contains("0.90 [0.90–0.90]"),
            "{ours}"
        );
        assert!(row("rate", OURS).contains("LOSES to tun-rs sync"), "{text}");
        assert!(
            row(CPU_NS, &format!("{BASELINE} (again)")).contains("1.00 [1.00–1.00]"),
            "A/A"
        );
        assert!(!row(CPU_NS, PLAIN).contains("LOSES"));
    }

    #[test]
    fn targets_are_judged_by_the_median() {
        let tables = [some()];
        let found = targets(&tables);
        assert_eq!(found.len(), 1, "{found:?}");
        assert!(!found[0].kept && found[0].bound == "≤ 0.78", "{found:?}");
        let text = conclusion(
            &tables,
            &[Missing {
                case: "wire-tcp",
                why: "there is no iperf3".to_owned(),
            }],
        );
        assert!(text.contains("MISSED") && text.contains("wire-tcp: **not measured**: there is no iperf3"));
        assert!(text.contains("- drain: 256 packets of 64 B at a time, cpu_ns_per_packet: tun_driver io_uring LOSES"));
    }

    #[test]
    fn json_has_all_that_figures_must_be_quoted_with() {
        let context = Context {
            machine: Machine::read(),
            commit: Some("abc".to_owned()),
            command: "peers --quick".to_owned(),
            quick: true,
            rounds: 3,
            versions: vec![("tun-rs".to_owned(), "2.8.16".to_owned())],
        };
        let told = json(&context, &[some()], &[]);
        assert_eq!(told["versions"]["tun-rs"], "2.8.16");
        assert_eq!(told["commit"], "abc");
        assert!(told["machine"]["kernel"].is_string() && told["machine"]["mitigations"].is_array());
        assert_eq!(
            told["cases"][0]["report"]["ways"].as_array().map(Vec::len),
            Some(4),
            "A/A is among them"
        );
        let comparisons = told["cases"][0]["comparisons"].as_array().expect("comparisons");
        assert_eq!(comparisons.len(), 3 * 4, "a figure of a way each");
        let ours = comparisons
            .iter()
            .find(|one| one["way"] == OURS && one["figure"] == CPU_NS);
        assert_eq!(ours.expect("ours is there")["best_peers"][0]["loses"], true);
        assert!(context.markdown().contains("not to be quoted"));
    }

    #[test]
    fn numbers_are_short() {
        let told: Vec<String> = [0.0, 0.123, 9.87, 12.34, 123.4, 98_765.4, -3.0]
            .into_iter()
            .map(number)
            .collect();
        assert_eq!(told, ["0", "0.12", "9.87", "12.3", "123", "98765", "-3.00"]);
    }
}
