//! The report of throughput runs: text, Markdown, JSON, a page of HTML, and histograms.

use std::fmt::Write;
use std::fs;
use std::path::Path;
use std::time::{Duration, SystemTime};

use hdrhistogram::Histogram;
use serde_json::{Value, json};
use tun_driver::lab::measure::{Spread, quantiles_json};
use tun_driver::lab::throughput::{Measured, Mode, Size};

use super::histograms::{self, Group};
use super::markup::{Node, node};
use super::svg::{self, Axis, Bar, Bars, Lines, Scale, Trace};
use super::tables::{Cell, Column, Table, column};
use super::text::rendered;
use super::{html, numbers, utc};
use crate::throughput::{Latency, Results, Row};
use crate::{Failure, Files};

/// For the terminal.
pub(crate) fn text(results: &Results) -> String {
    let mut out = String::new();
    if let Some(why) = incomplete(results) {
        let _ = writeln!(out, "{why}\n");
    }
    for (about, told) in provenance(results) {
        let _ = writeln!(out, "{about}: {told}");
    }
    for (title, table) in tables(results) {
        let _ = writeln!(out, "\n{title}\n\n{}", rendered(&table));
    }
    let _ = writeln!(out, "\n{}", balance(results));
    out
}

pub(crate) fn markdown(results: &Results) -> String {
    let mut out = String::from("# Throughput over veth\n\n");
    if let Some(why) = incomplete(results) {
        let _ = writeln!(out, "**{why}**\n");
    }
    for (about, told) in provenance(results) {
        let _ = writeln!(out, "{about}: {told}  ");
    }
    for (title, table) in tables(results) {
        let _ = writeln!(out, "\n## {title}\n\n{}", rendered(&table));
    }
    let _ = writeln!(out, "\n{}\n\n## How to read this\n", balance(results));
    for (about, told) in READING {
        let _ = writeln!(out, "- {about}: {told}");
    }
    out
}

pub(crate) fn write_files(folder: &Path, results: &Results, object: &Value) -> Result<(), Failure> {
    let mut files = Files::new(folder);
    files.write("throughput.json", &format!("{object:#}\n"));
    files.write("throughput.md", &markdown(results));
    files.write("throughput.html", &page(results));
    for (name, title, plot) in plots(results) {
        let legend = if name.starts_with("latency") {
            waits()
        } else {
            Vec::new()
        };
        files.write(&format!("{name}.svg"), &html::alone(&title, &legend, plot));
    }
    for (group, took) in groups(results) {
        for (tag, histogram) in &group.entries {
            files.write(&format!("{}-{tag}.hgrm", group.name), &histograms::hgrm(histogram));
        }
        files.write(
            &format!("{}.hlog", group.name),
            &histograms::hlog(
                &group,
                results.began,
                took,
                "The interval is as long as the trial; the log's start is that of the run.",
            )?,
        );
    }
    let removed = remove_earlier(folder, &files.written);
    files.end().and(removed)
}

/// Removes the latencies of an earlier run: beside this report they would pass for this run's.
fn remove_earlier(folder: &Path, written: &[String]) -> Result<(), Failure> {
    let failed = |path: &Path, error| Failure::Failed(format!("{}: {error}", path.display()));
    for entry in fs::read_dir(folder).map_err(|error| failed(folder, error))? {
        let path = entry.map_err(|error| failed(folder, error))?.path();
        let Some(name) = path.file_name().and_then(|name| name.to_str()) else {
            continue;
        };
        if is_ours(name) && !written.iter().any(|written| written == name) {
            fs::remove_file(&path).map_err(|error| failed(&path, error))?;
        }
    }
    Ok(())
}

/// Whether a file is called as those that [`write_files`] makes of latencies:
/// `latency-MODE-SIZEB-…PERCENTpct….hgrm` and the like.
fn is_ours(name: &str) -> bool {
    let Some((stem, "hgrm" | "hlog" | "svg")) = name.rsplit_once('.') else {
        return false;
    };
    let of_mode = |mode: Mode| {
        let rest = stem.strip_prefix(&format!("latency-{mode}-"))?;
        let (size, rest) = rest.split_once("B-")?;
        size.parse::<Size>().ok()?;
        rest.contains("pct").then_some(())
    };
    Mode::ALL.into_iter().any(|mode| of_mode(mode).is_some())
}

/// A group per mode, manner of waiting and load: the way as a whole (`all`), and each queue up to the engine. And how long the trial was.
fn groups(results: &Results) -> Vec<(Group<'_>, Duration)> {
    results
        .latencies
        .iter()
        .filter(|one| !one.measured.latency.is_empty())
        .map(|one| {
            let mut entries = vec![("all".to_owned(), &one.measured.latency)];
            let queues = one.measured.queue_latency.iter().enumerate();
            entries.extend(queues.map(|(queue, histogram)| (format!("q{queue}"), histogram)));
            let name = format!("latency-{}-{}B-{}-{}pct", one.mode, one.size, one.wait, one.share);
            (Group { name, entries }, one.measured.wall)
        })
        .collect()
}

/// One page of HTML that needs nothing else.
fn page(results: &Results) -> String {
    let mut header = node("header").child(node("h1").text("Throughput over veth"));
    if results.unexplained + results.wrong > 0 {
        header = header.child(
            node("p")
                .class("warning")
                .text("The books do not balance. Do not cite these figures."),
        );
    }
    if let Some(why) = incomplete(results) {
        header = header.child(node("p").class("warning").text(&why));
    }
    let lines = provenance(results).into_iter();
    let header = header
        .child(node("div").class("verdict").child(node("p").text(balance(results))))
        .child(html::described(lines.map(|(about, told)| (about.to_owned(), told))));
    let mut body = node("body").child(header);
    let mut plots = plots(results);
    let latency_plots = plots.split_off(1.min(plots.len()));
    for (heading, told, plots, (table, more), words) in [
        (
            "Rates",
            "As much as can be offered (MRR), and the highest rate without loss (NDR) and with half a per cent (PDR).",
            plots,
            rates(results),
            3,
        ),
        (
            "Latency",
            "Packets are sent on a fixed schedule, at shares of the rate that was found, and each counts from the time at which it was due.",
            latency_plots,
            latencies(results),
            4,
        ),
    ] {
        if table.rows.is_empty() {
            continue;
        }
        let figures = plots.into_iter().map(|(_, caption, plot)| html::figure(&caption, plot));
        body = body.child(
            node("section")
                .child(node("h2").text(heading))
                .child(node("p").text(told))
                .child(legend(&if heading == "Latency" { waits() } else { Vec::new() }))
                .child(node("div").class("plots").children(figures))
                .child(html::drawn(&table, words))
                .child(
                    node("details")
                        .child(node("summary").text("More columns"))
                        .child(html::drawn(&more, words)),
                )
                .child(html::columns(&both(table, more, words))),
        );
    }
    html::whole("Throughput over veth", body.child(html::footer(READING, SILENCE)))
}

/// What the lines are.
fn legend(lines: &[(usize, &str)]) -> Node {
    let entries = lines
        .iter()
        .map(|&(look, name)| node("li").child(svg::swatch(look)).text(name));
    node("ul").class("legend").children(entries)
}

/// The looks of the manners of waiting.
fn waits() -> Vec<(usize, &'static str)> {
    WAITS.into_iter().enumerate().collect()
}

/// All plots: a name for the file, a caption, and the plot. That of the rates comes first.
fn plots(results: &Results) -> Vec<(String, String, Node)> {
    let mut plots = Vec::new();
    let rates = results.rows.iter().filter_map(|row| row.rate);
    let most = rates.map(|rate| rate.max / 1e3).fold(1.0, f64::max);
    let bars = Bars {
        told: "Bars: packets per second by mode, size and goal. The table below has the figures.".to_owned(),
        axis: "thousand packets per second; higher is better".to_owned(),
        scale: Scale::from_zero(most),
        rows: results.rows.iter().map(bar).collect(),
    };
    plots.push((
        "rates".to_owned(),
        "Rates, with the range of the repeats".to_owned(),
        svg::bars(&bars),
    ));
    let mut done: Vec<(String, u32)> = Vec::new();
    for one in &results.latencies {
        let key = (format!("{}-{}B", one.mode, one.size), one.share);
        if done.contains(&key) {
            continue;
        }
        let same: Vec<&Latency> = results
            .latencies
            .iter()
            .filter(|other| (other.mode, other.size, other.share) == (one.mode, one.size, one.share))
            .collect();
        let title = format!(
            "{}, {} B, at {} % of the rate that was found",
            one.mode, one.size, one.share
        );
        plots.push((
            format!("latency-{}-{}pct", key.0, key.1),
            title.clone(),
            svg::lines(&distribution(&title, &same)),
        ));
        done.push(key);
    }
    plots
}

fn bar(row: &Row) -> Bar {
    let name = format!("{}, {} B, {}", row.mode, row.size, row.what);
    let text = match &row.rate {
        Some(rate) => format!("{} kpps", numbers::short(rate.median / 1e3)),
        None => none(row).to_owned(),
    };
    let (value, whisker) = row.rate.map_or((0.0, (0.0, 0.0)), |rate| {
        (rate.median / 1e3, (rate.min / 1e3, rate.max / 1e3))
    });
    Bar {
        hint: format!("{name}: {text}"),
        look: match row.what {
            "NDR" => 1,
            "PDR" => 2,
            _ => 0,
        },
        name: if row.generator_bound {
            format!("{name} (generator-bound)")
        } else {
            name
        },
        text,
        value,
        whisker,
    }
}

/// In place of a rate that was not found.
fn none(row: &Row) -> &'static str {
    if row.complete {
        "none passed"
    } else {
        "none found in time"
    }
}

fn distribution(title: &str, lines: &[&Latency]) -> Lines {
    let count = lines
        .iter()
        .map(|one| one.measured.latency.len())
        .max()
        .unwrap_or(1)
        .max(10);
    let rarest = (count as f64).log10();
    let ticks: Vec<(f64, String)> = html::SHARES
        .iter()
        .map(|(share, label)| (html::rarity(*share), (*label).to_owned()))
        .filter(|(place, _)| *place <= rarest)
        .collect();
    let traces: Vec<Trace> = lines
        .iter()
        .filter(|one| !one.measured.latency.is_empty())
        .map(|one| Trace {
            look: WAITS.iter().position(|name| *name == one.wait).unwrap_or(0),
            dots: html::distribution(one.wait, &one.measured.latency),
        })
        .collect();
    let all = traces.iter().flat_map(|trace| trace.dots.iter().map(|dot| dot.y));
    let scale = Scale::log_around(all);
    let time = |micros: f64| match micros {
        ..1e3 => format!("{} µs", numbers::plain(micros)),
        ..1e6 => format!("{} ms", numbers::plain(micros / 1e3)),
        _ => format!("{} s", numbers::plain(micros / 1e6)),
    };
    let times = scale.ticks().into_iter().map(|tick| (tick, time(tick))).collect();
    Lines {
        told: format!(
            "Lines: latency over percentile, one line per manner of waiting; {title}. The table below has the usual percentiles."
        ),
        y: Axis {
            label: "latency, logarithmic; lower is better".to_owned(),
            scale,
            ticks: times,
        },
        x: Axis {
            label: "share of the packets that took at most this long".to_owned(),
            scale: Scale::Linear { low: 0.0, high: rarest },
            ticks,
        },
        lines: traces,
    }
}

pub(crate) fn json(results: &Results) -> Value {
    json!({
        "schema_version": 1,
        "tool_version": env!("CARGO_PKG_VERSION"),
        "verb": "throughput",
        "command": results.command,
        "commit": results.commit,
        "began_unix_s": results.began.duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_secs()),
        "duration_s": results.seconds,
        "machine": results.machine.to_json(),
        "topology": results.topology,
        "generator": results.generator.split(' ').next().unwrap_or_default(),
        "generator_told": results.generator,
        "backend": results.backend,
        "offloads": results.offloads,
        "queues": results.queues,
        "flows": results.flows,
        "repeats": results.repeats,
        "trial_s": results.trial.as_secs_f64(),
        "incomplete": results.incomplete,
        "trials": results.trials,
        "offered_packets": results.offered,
        "unexplained_packets": results.unexplained,
        "wrong_packets": results.wrong,
        "rates": results.rows.iter().map(row_json).collect::<Vec<_>>(),
        "latencies": results.latencies.iter().map(latency_json).collect::<Vec<_>>(),
    })
}

fn row_json(row: &Row) -> Value {
    json!({
        "mode": row.mode.to_string(),
        "frame": row.size.to_string(),
        "what": row.what,
        "rate_pps": row.rate.as_ref().map(spread_json),
        "upper_pps": row.upper.as_ref().map(spread_json),
        "none_found": row.none_found,
        "generator_bound": row.generator_bound,
        "complete": row.complete,
        "trial": row.measured.as_ref().map(measured_json),
    })
}

fn latency_json(one: &Latency) -> Value {
    json!({
        "mode": one.mode.to_string(),
        "frame": one.size.to_string(),
        "wait": one.wait,
        "load_percent": one.share,
        "complete": one.complete,
        "trial": measured_json(&one.measured),
    })
}

fn spread_json(spread: &Spread) -> Value {
    json!({
        "min": spread.min, "lower_quartile": spread.lower_quartile, "median": spread.median,
        "upper_quartile": spread.upper_quartile, "max": spread.max,
    })
}

fn measured_json(one: &Measured) -> Value {
    let drops: Vec<Value> = one
        .drops
        .iter()
        .map(|(place, packets)| json!({ "place": place, "packets": packets }))
        .collect();
    let hops: Vec<Value> = one
        .hops
        .iter()
        .map(|(hop, packets)| json!({ "counter": hop, "packets": packets }))
        .collect();
    let histogram = |histogram: &Histogram<u64>| (!histogram.is_empty()).then(|| quantiles_json(histogram));
    json!({
        "generator": one.way,
        "offered_packets": one.offered,
        "received_packets": one.received,
        "drops": drops,
        "hops": hops,
        "unexplained_packets": one.unexplained,
        "softnet_dropped_machine_packets": one.softnet_machine,
        "late_packets": one.summary.late,
        "duplicate_packets": one.summary.duplicates,
        "damaged_packets": one.summary.damaged,
        "foreign_packets": one.summary.foreign,
        "loss_percent": one.loss() * 100.0,
        "offered_pps": one.offered_pps,
        "received_pps": one.received_pps,
        "kept_rate": one.kept,
        "l2_gbits_per_s": one.l2_gbits(),
        "wall_s": one.wall.as_secs_f64(),
        "engine_cpu_s": one.engine_cpu.as_secs_f64(),
        "generator_cpu_s": one.generator_cpu.as_secs_f64(),
        "machine_above_idle_cpu_s": one.machine_cpu.as_secs_f64(),
        "softirq_cpu_approx_s": one.softirq_cpu.as_secs_f64(),
        "engine_cpu_ns_per_packet": one.engine_ns(),
        "packets_per_enter": one.packets_per_enter,
        "queue_packets": one.queues,
        "queue_spread": one.queue_spread(),
        "latency": histogram(&one.latency),
        "latency_to_engine_by_queue": one.queue_latency.iter().map(histogram).collect::<Vec<_>>(),
    })
}

fn provenance(results: &Results) -> Vec<(&'static str, String)> {
    let machine = &results.machine;
    vec![
        ("Machine", machine.to_string()),
        (
            "Run",
            format!(
                "{} UTC, {} trials in {:.0} s, deciding trials of {} s, {} repeats, tun-driver {}",
                utc(results.began),
                results.trials,
                results.seconds,
                results.trial.as_secs_f64(),
                results.repeats,
                env!("CARGO_PKG_VERSION")
            ),
        ),
        ("Generator", results.generator.clone()),
        (
            "Engine",
            format!(
                "{}, {} queue{}, {} flows, backend: {}, offloads {}",
                results.topology,
                results.queues,
                if results.queues == 1 { "" } else { "s" },
                results.flows,
                results.backend,
                if results.offloads { "on" } else { "off" }
            ),
        ),
        ("Command", results.command.clone()),
        ("Commit", results.commit.clone().unwrap_or_else(|| "unknown".to_owned())),
    ]
}

fn balance(results: &Results) -> String {
    format!(
        "Books of all {} trials: {} packets offered, {} unexplained (neither received nor dropped at a place that counts it), {} late, twice or \
         damaged.",
        results.trials, results.offered, results.unexplained, results.wrong
    )
}

/// What a run that ended early says of itself, in each form of the report.
fn incomplete(results: &Results) -> Option<String> {
    results.incomplete.as_ref().map(|why| {
        format!("INCOMPLETE: {why}. Rows that are not whole are marked; what was to be measured after them is missing.")
    })
}

fn tables(results: &Results) -> Vec<(&'static str, Table)> {
    let (main, more) = rates(results);
    let mut tables = vec![("Rates", main), ("Rates: drops and CPU", more)];
    if !results.latencies.is_empty() {
        let (main, more) = latencies(results);
        tables.extend([("Latency", main), ("Latency: more percentiles and CPU", more)]);
    }
    tables
}

/// The columns of both, once each, of tables that share their first `words`.
fn both(main: Table, more: Table, words: usize) -> Table {
    let mut columns = main.columns;
    columns.extend(more.columns.into_iter().skip(words));
    Table {
        columns,
        rows: Vec::new(),
    }
}

/// What a reader wants first, and the rest.
fn rates(results: &Results) -> (Table, Table) {
    let key = [
        ("mode", "what the engine does"),
        ("frame", "bytes with the frame check sequence"),
        (
            "rate",
            "MRR: received of as much as could be offered; NDR: the highest without loss; PDR: with 0.5 % at most",
        ),
    ];
    let main = [
        (
            "kpps",
            "packets received per second; lower bounds for NDR and PDR; median, least to greatest of the repeats",
        ),
        (
            "upper",
            "the lowest rate that failed or could not be offered, kpps; where none did, the most that could be offered",
        ),
        ("Gbit/s", "of frames with their frame check sequence (L2)"),
        ("loss", "share of what was offered in the trial shown"),
        ("engine CPU", "of one core: the engine's threads"),
        ("ns/packet", "CPU time of the engine's threads per packet received"),
        ("remarks", "what to know before citing the row"),
    ];
    let more = [
        (
            "offered",
            "packets offered per second in the trial shown, kpps; for MRR that is the generator's ceiling",
        ),
        ("dropped where", "by the counters of each place"),
        (
            "unexplained",
            "offered, neither received nor dropped at a place that counts it",
        ),
        (
            "generator CPU",
            "of one core: the generator's thread, with the way of the packet up to the device's queue",
        ),
        ("machine CPU", "of one core: the whole machine above idle"),
        (
            "softirq (approx.)",
            "of one core: sampled by the kernel, so approximate",
        ),
        (
            "packets/enter",
            "packets that the engine moved for each time it entered the kernel, waiting included",
        ),
        ("queue spread", "(most - least) by mean of the packets of the queues"),
    ];
    let keys = |row: &Row| [Cell::of(row.mode), Cell::of(row.size), Cell::of(row.what)];
    let main_rows = results.rows.iter().map(|row| {
        // Without a trial, no figures of it.
        let of = |figure: fn(&Measured) -> String| Cell::of(row.measured.as_ref().map_or(String::new(), figure));
        let rate = match &row.rate {
            Some(rate) => Cell {
                value: numbers::short(rate.median / 1e3),
                range: Some(format!(
                    "{}–{}",
                    numbers::short(rate.min / 1e3),
                    numbers::short(rate.max / 1e3)
                )),
            },
            None => Cell::of(none(row)),
        };
        let upper = row
            .upper
            .map_or(String::new(), |upper| numbers::short(upper.median / 1e3));
        let cells = [
            rate,
            Cell::of(upper),
            of(|one| numbers::short(one.l2_gbits())),
            of(|one| percent_fine(one.loss())),
            of(|one| percent(cores(one, one.engine_cpu))),
            of(|one| numbers::short(one.engine_ns())),
            Cell::of(remarks(row)),
        ];
        keys(row).into_iter().chain(cells).collect()
    });
    let more_rows = results.rows.iter().map(|row| {
        let of = |figure: fn(&Measured) -> String| Cell::of(row.measured.as_ref().map_or(String::new(), figure));
        let cells = [
            of(|one| numbers::short(one.offered_pps / 1e3)),
            of(places),
            of(|one| one.unexplained.to_string()),
            of(|one| {
                if one.generator_cpu.is_zero() {
                    String::new()
                } else {
                    percent(cores(one, one.generator_cpu))
                }
            }),
            of(|one| percent(cores(one, one.machine_cpu))),
            of(|one| percent(cores(one, one.softirq_cpu))),
            of(|one| numbers::short(one.packets_per_enter)),
            of(|one| {
                if one.queues.len() > 1 {
                    percent(one.queue_spread())
                } else {
                    String::new()
                }
            }),
        ];
        keys(row).into_iter().chain(cells).collect()
    });
    (
        table(&[&key[..], &main].concat(), main_rows),
        table(&[&key[..], &more].concat(), more_rows),
    )
}

fn remarks(row: &Row) -> String {
    let mut remarks = Vec::new();
    if row.generator_bound {
        remarks.push("generator-bound".to_owned());
    }
    if row.none_found > 0 && row.rate.is_some() {
        let searches = if row.none_found == 1 { "search" } else { "searches" };
        remarks.push(format!("none found in {} {searches}", row.none_found));
    }
    if !row.complete {
        let word = if row.cut_short {
            "cut short"
        } else {
            "search not complete"
        };
        remarks.push(word.to_owned());
    }
    if let Some(one) = &row.measured {
        if one.unexplained != 0 {
            remarks.push("UNEXPLAINED PACKETS".to_owned());
        }
        if one.wrong() > 0 {
            remarks.push("WRONG PACKETS".to_owned());
        }
    }
    remarks.join(", ")
}

/// As [`rates`].
fn latencies(results: &Results) -> (Table, Table) {
    let key = [
        ("mode", "what the engine does"),
        ("frame", "bytes with the frame check sequence"),
        ("load", "per cent of the rate that was found"),
        ("waiting", "how the engine's threads wait"),
    ];
    let main = [
        ("kpps", "offered"),
        ("loss", "share of what was offered"),
        ("p50 µs", "half took at most as long"),
        ("p99 µs", ""),
        ("p99.9 µs", ""),
        ("max µs", ""),
        ("remarks", "what to know before citing the row"),
    ];
    let more = [
        ("p90 µs", ""),
        ("p99.99 µs", ""),
        ("engine CPU", "of one core: the engine's threads"),
        (
            "ns/packet",
            "CPU time of the engine's threads per packet received; looking at each packet is within it",
        ),
        (
            "unexplained",
            "offered, neither received nor dropped at a place that counts it",
        ),
    ];
    let keys = |row: &Latency| {
        let share = Cell::of(format!("{} %", row.share));
        [Cell::of(row.mode), Cell::of(row.size), share, Cell::of(row.wait)]
    };
    let at = |row: &Latency, share: f64| {
        Cell::of(numbers::short(
            row.measured.latency.value_at_quantile(share) as f64 / 1e3,
        ))
    };
    let main_rows = results.latencies.iter().map(|row| {
        let cells = [
            Cell::of(numbers::short(row.measured.offered_pps / 1e3)),
            Cell::of(percent_fine(row.measured.loss())),
            at(row, 0.5),
            at(row, 0.99),
            at(row, 0.999),
            Cell::of(numbers::short(row.measured.latency.max() as f64 / 1e3)),
            Cell::of(if row.complete { "" } else { "cut short" }),
        ];
        keys(row).into_iter().chain(cells).collect()
    });
    let more_rows = results.latencies.iter().map(|row| {
        let one = &row.measured;
        let cells = [
            at(row, 0.9),
            at(row, 0.9999),
            Cell::of(percent(cores(one, one.engine_cpu))),
            Cell::of(numbers::short(one.engine_ns())),
            Cell::of(one.unexplained),
        ];
        keys(row).into_iter().chain(cells).collect()
    });
    (
        table(&[&key[..], &main].concat(), main_rows),
        table(&[&key[..], &more].concat(), more_rows),
    )
}

/// CPU time of a trial, in cores.
fn cores(one: &Measured, time: Duration) -> f64 {
    time.as_secs_f64() / one.wall.as_secs_f64().max(1e-9)
}

fn table(columns: &[(&str, &str)], rows: impl Iterator<Item = Vec<Cell>>) -> Table {
    let columns: Vec<Column> = columns.iter().map(|(name, told)| column(name, told)).collect();
    Table {
        columns,
        rows: rows.collect(),
    }
}

fn places(one: &Measured) -> String {
    let told: Vec<String> = one
        .drops
        .iter()
        .map(|(place, count)| format!("{place}: {count}"))
        .collect();
    told.join("; ")
}

fn percent(share: f64) -> String {
    format!("{:.0} %", share * 100.0)
}

fn percent_fine(share: f64) -> String {
    if share == 0.0 {
        "0".to_owned()
    } else {
        format!("{:.4} %", share * 100.0)
    }
}

/// The manners of waiting, in the order of their looks.
const WAITS: [&str; 3] = ["block", "moderate", "spin"];

/// What must not be concluded.
const SILENCE: &[(&str, &str)] = &[
    (
        "A network",
        "there is no network card. Generator, kernel and engine share the cores, caches and memory of one host; with few cores they take turns on them.",
    ),
    (
        "The engine alone",
        "in echo and forward the engine's threads carry each packet back through the stack, which costs several times what the engine does itself.",
    ),
    (
        "Rare delays",
        "a virtual machine is stopped now and then for milliseconds. The far right of the plots, and losses near the limit, tell of that as much as of the engine.",
    ),
];

/// How the figures came about.
const READING: &[(&str, &str)] = &[
    (
        "Rates",
        "RFC 2544-style: a rate passes if no more than the goal's share is lost in most trials of it, twice at least in trials of the length given. Generator and engine share one \
         host, and trials are shorter than the minute that the RFC wants, so these are figures for comparison, not a certificate.",
    ),
    (
        "Generator-bound",
        "nothing was lost at the most that the generator could offer: the engine can do more than the figure says.",
    ),
    (
        "Latency",
        "from the time at which each packet was meant to be sent (a generator that is late is part of it) to its arrival: in the engine where packets end there, \
         else at the far end of the link. With pktgen from the time at which it was sent, to a microsecond.",
    ),
    (
        "CPU",
        "the engine's is its threads' own time, what the kernel does inside their calls included: in echo and forward the whole way back through the stack. \
         Softirq is sampled by the kernel's tick and only approximate.",
    ),
];

#[cfg(test)]
mod tests {
    use roxmltree::{Document, ParsingOptions};
    use tun_driver::lab::measure::Machine;

    use super::*;

    fn measured(unexplained: i64) -> Measured {
        let mut latency = Histogram::new(3).unwrap();
        (1..=1_000u64).for_each(|value| latency.record(value * 997).unwrap());
        Measured {
            offered: 1_000,
            unsent: 0,
            received: 990,
            drops: vec![("tun0 <queue> full".to_owned(), 10)],
            hops: vec![("gen0 tx_packets".to_owned(), 1_000)],
            unexplained,
            softnet_machine: 0,
            summary: Default::default(),
            l2_bytes: 64_000,
            offered_pps: 1e6,
            received_pps: 9.9e5,
            kept: true,
            wall: Duration::from_millis(1),
            engine_cpu: Duration::from_micros(800),
            generator_cpu: Duration::from_micros(900),
            machine_cpu: Duration::from_micros(1_900),
            softirq_cpu: Duration::ZERO,
            packets_per_enter: 20.0,
            queues: vec![500, 490],
            latency: latency.clone(),
            queue_latency: vec![latency.clone(), latency],
            way: "builtin".to_owned(),
        }
    }

    fn results(unexplained: i64) -> Results {
        let rate = Spread::of(&[9e5, 9.5e5, 9.9e5]).unwrap();
        Results {
            machine: Machine::read(),
            command: "bench-scripts/pktgen.sh --mode <echo>".to_owned(),
            commit: Some("abc".to_owned()),
            began: SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000),
            seconds: 12.0,
            topology: "route, TUN",
            generator: "builtin (no pktgen)".to_owned(),
            backend: "io_uring".to_owned(),
            offloads: false,
            queues: 2,
            flows: 64,
            repeats: 3,
            trial: Duration::from_secs(1),
            incomplete: None,
            rows: ["MRR", "NDR", "PDR"]
                .map(|what| Row {
                    mode: Mode::Echo,
                    size: Size::Frame(64),
                    what,
                    rate: Some(rate),
                    upper: (what != "MRR").then_some(rate),
                    none_found: 0,
                    generator_bound: what == "MRR",
                    complete: what != "PDR",
                    cut_short: false,
                    measured: Some(measured(unexplained)),
                })
                .into(),
            latencies: [(10, "block"), (10, "spin"), (50, "block")]
                .map(|(share, wait)| Latency {
                    mode: Mode::Echo,
                    size: Size::Frame(64),
                    wait,
                    share,
                    complete: true,
                    measured: measured(unexplained),
                })
                .into(),
            trials: 6,
            offered: 6_000,
            unexplained: unexplained.unsigned_abs(),
            wrong: 0,
        }
    }

    #[test]
    fn text_and_markdown_tell_each_row_and_the_balance() {
        for told in [text(&results(0)), markdown(&results(0))] {
            for word in [
                "NDR",
                "generator-bound",
                "search not complete",
                "tun0 <queue> full: 10",
                "0 unexplained",
                "10 %",
                "spin",
            ] {
                assert!(told.contains(word), "{word}: {told}");
            }
        }
    }

    #[test]
    fn the_page_and_the_plots_are_well_formed_and_warn_of_books_that_do_not_balance() {
        for (unexplained, warns) in [(0, false), (3, true)] {
            let page = page(&results(unexplained));
            let options = ParsingOptions {
                allow_dtd: true,
                ..ParsingOptions::default()
            };
            Document::parse_with_options(&page, options).unwrap();
            assert_eq!(page.contains("do not balance"), warns);
        }
        let plots = plots(&results(0));
        let names: Vec<&str> = plots.iter().map(|(name, ..)| name.as_str()).collect();
        assert_eq!(names, ["rates", "latency-echo-64B-10pct", "latency-echo-64B-50pct"]);
        for (_, title, plot) in plots {
            let file = html::alone(&title, &waits(), plot);
            Document::parse(&file).unwrap();
            assert!(file.contains(&title) && WAITS.iter().all(|wait| file.contains(wait)));
        }
    }

    #[test]
    fn a_run_that_was_interrupted_says_so_in_each_form() {
        let whole = results(0);
        for told in [text(&whole), markdown(&whole), page(&whole)] {
            assert!(!told.contains("INCOMPLETE") && !told.contains("cut short"), "{told}");
        }
        assert_eq!(json(&whole)["incomplete"], Value::Null);
        let mut cut = results(0);
        cut.incomplete = Some("interrupted".to_owned());
        for row in cut.rows.iter_mut().filter(|row| !row.complete) {
            row.cut_short = true;
        }
        cut.latencies.last_mut().unwrap().complete = false;
        for told in [text(&cut), markdown(&cut), page(&cut)] {
            assert!(told.contains("INCOMPLETE: interrupted"), "{told}");
            assert!(told.matches("cut short").count() >= 2, "{told}");
        }
        let told = json(&cut);
        assert_eq!(told["incomplete"], "interrupted");
        assert_eq!(told["rates"][2]["complete"], false);
        assert_eq!(told["latencies"][2]["complete"], false);
    }

    #[test]
    fn a_rate_that_was_not_found_is_a_row_in_each_form() {
        for (complete, word) in [(true, "none passed"), (false, "none found in time")] {
            let mut results = results(0);
            let row = &mut results.rows[1];
            (row.rate, row.measured, row.none_found, row.complete) = (None, None, 3, complete);
            results.rows[2].none_found = 1;
            for told in [text(&results), markdown(&results), page(&results)] {
                assert!(told.contains(word), "{word}: {told}");
                assert!(told.contains("none found in 1 search"), "{told}");
            }
            let told = json(&results);
            assert_eq!(told["rates"][1]["rate_pps"], Value::Null);
            assert_eq!(told["rates"][1]["none_found"], 3);
            valid(&told);
            let plot = plots(&results).swap_remove(0).2.to_string();
            assert!(plot.contains(word), "{plot}");
        }
    }

    #[test]
    fn latencies_of_an_earlier_run_do_not_stay() {
        let folder = std::env::temp_dir().join(format!("tun-driver-report-{}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        let others = ["latency-notes.svg", "latency-echo-64B-10pct.txt", "mine.hlog"];
        let earlier = [
            "latency-recv-many-1518B-spin-90pct-q1.hgrm",
            "latency-forward-imixB-10pct.svg",
        ];
        for name in others.iter().chain(&earlier) {
            fs::write(folder.join(name), "").unwrap();
        }
        let results = results(0);
        write_files(&folder, &results, &json(&results)).ok().expect("written");
        let there = |name: &str| folder.join(name).exists();
        assert!(others.iter().all(|name| there(name)));
        assert!(!earlier.iter().any(|name| there(name)));
        assert!(
            there("latency-echo-64B-spin-10pct-q1.hgrm") && there("latency-echo-64B-10pct.svg") && there("rates.svg")
        );
        fs::remove_dir_all(&folder).unwrap();
    }

    #[test]
    fn each_load_has_its_histograms_with_a_tag_per_queue() {
        let results = results(0);
        let groups: Vec<_> = groups(&results).into_iter().map(|(group, _)| group).collect();
        assert_eq!(groups.len(), 3);
        for group in &groups {
            let tags: Vec<&str> = group.entries.iter().map(|(tag, _)| tag.as_str()).collect();
            assert_eq!(tags, ["all", "q0", "q1"]);
        }
        assert_eq!(groups[1].name, "latency-echo-64B-spin-10pct");
    }

    /// Checks against the schema.
    fn valid(told: &Value) -> jsonschema::Validator {
        let schema: Value = serde_json::from_str(include_str!("../../../../docs/throughput.schema.json")).unwrap();
        let validator = jsonschema::draft202012::new(&schema).unwrap();
        let errors: Vec<String> = validator
            .iter_errors(told)
            .map(|error| format!("{}: {error}", error.instance_path()))
            .collect();
        assert!(errors.is_empty(), "{errors:#?}");
        validator
    }

    #[test]
    fn the_schema_describes_all_that_is_written_and_nothing_else() {
        let told = json(&results(0));
        let validator = valid(&told);
        for place in ["", "/rates/0", "/rates/0/trial", "/latencies/0", "/latencies/0/trial"] {
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
