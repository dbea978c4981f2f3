//! The report as one page of HTML that needs nothing else: no script, no font, no picture from elsewhere.

use hdrhistogram::Histogram;
use tun_driver::lab::measure::{Report, Spread};
use tun_driver::lab::offload_cases::GBIT;
use tun_driver::lab::results::{Acts, Curve, Point, Scaling};

use super::markup::{Node, node};
use super::svg::{self, Axis, Bar, Bars, Dot, LOOKS, Lines, Mark, Scale, Trace};
use super::tables::{self, Table};
use super::{READING, SILENCE, numbers, provenance, verdict};
use crate::bench::{Outcome, Results};

pub(super) fn page(results: &Results) -> String {
    let looks = Looks::of(results);
    let mut body = node("body").child(header(results));
    for (key, heading, told) in CASES {
        let outcomes: Vec<&Outcome> = results.outcomes.iter().filter(|outcome| outcome.key == *key).collect();
        if !outcomes.is_empty() {
            body = body.child(case(heading, told, &outcomes, &looks));
        }
    }
    body = body
        .children(results.curves.iter().map(|one| curve(one, &looks)))
        .children(results.scalings.iter().map(scaling))
        .children(results.acts.iter().map(acts))
        .child(footer(READING, SILENCE));
    whole("tun-driver bench", body)
}

/// A body as a page.
pub(super) fn whole(title: &str, body: Node) -> String {
    let head = node("head")
        .child(node("meta").with("charset", "utf-8"))
        .child(
            node("meta")
                .with("name", "viewport")
                .with("content", "width=device-width, initial-scale=1"),
        )
        .child(node("title").text(title))
        .child(node("style").text(include_str!("style.css")));
    format!(
        "<!DOCTYPE html>\n{}\n",
        node("html").with("lang", "en").child(head).child(body)
    )
}

/// A plot as a file of its own, with a title, and what the lines are.
pub(super) fn alone(title: &str, legend: &[(usize, &str)], plot: Node) -> String {
    let plot = svg::titled(title, legend, plot)
        .with("xmlns", "http://www.w3.org/2000/svg")
        .child(node("style").text(include_str!("style.css")));
    format!("{plot}\n")
}

/// The cases in reading order.
const CASES: &[(&str, &str, &str)] = &[
    (
        "drain",
        "Receive",
        "A queue that was filled with packets is emptied, by one thread. Filling it is not timed.",
    ),
    (
        "sink",
        "Send",
        "Packets are written to a device, by one thread, and dropped right behind it, so that little but the sending itself is timed.",
    ),
    (
        "forward",
        "Forward",
        "One thread writes packets to one device; the kernel routes them to another, where the same thread reads them.",
    ),
    (
        "superpackets",
        "Superpackets",
        "One thread writes TCP to one device; the kernel routes it to another, where the same thread reads it: in plain packets, or in superpackets of \
         64 KiB, which devices with offloads take and give. In the table, packets are the segments that a superpacket stands for.",
    ),
    (
        "round_trip",
        "Round trip",
        "One small packet at a time: a socket on one core sends it, the echo on another core sends it back.",
    ),
    (
        "engine",
        "Engine",
        "A queue that was filled with packets is emptied by a loop over a worker, and by an engine whose handler does as much.",
    ),
];

/// How each way is drawn, the same everywhere. Baselines share the first look. No two ways of one
/// plot look the same, as long as there are looks enough for that plot.
struct Looks {
    ways: Vec<(String, usize)>,
    baselines: Vec<String>,
}

impl Looks {
    fn of(results: &Results) -> Self {
        let mut looks = Self {
            ways: Vec::new(),
            baselines: Vec::new(),
        };
        let in_cases = results.outcomes.iter().map(|outcome| {
            let report = &outcome.report;
            (report.baseline, report.ways.iter().map(|way| &way.name).collect())
        });
        let in_curves = results
            .curves
            .iter()
            .map(|curve| (curve.baseline, curve.lines.iter().map(|line| &line.way).collect()));
        let all: Vec<(usize, Vec<&String>)> = in_cases.chain(in_curves).collect();
        looks.baselines = all
            .iter()
            .filter_map(|(baseline, ways)| ways.get(*baseline))
            .map(|way| (*way).clone())
            .collect();
        for way in all.iter().flat_map(|(_, ways)| ways) {
            if looks.baselines.contains(way) || looks.ways.iter().any(|(known, _)| known == *way) {
                continue;
            }
            let beside: Vec<usize> = all
                .iter()
                .filter(|(_, ways)| ways.contains(way))
                .flat_map(|(_, ways)| ways)
                .map(|other| looks.look(other))
                .collect();
            let taken = |look: &usize| looks.ways.iter().any(|(_, other)| other == look);
            // One that no way has; if there is none, one that no way beside it has.
            let own = (1..LOOKS).find(|look| !taken(look));
            let own = own.or_else(|| (1..LOOKS).find(|look| !beside.contains(look)));
            looks.ways.push(((*way).clone(), own.unwrap_or(LOOKS - 1)));
        }
        looks
    }

    fn look(&self, way: &str) -> usize {
        let found = self.ways.iter().find(|(known, _)| known == way);
        found.map_or(0, |&(_, look)| look)
    }
}

fn header(results: &Results) -> Node {
    let sentences = verdict::sentences(results).into_iter().map(|sentence| {
        // Every other piece is what matters.
        sentence
            .split("**")
            .enumerate()
            .fold(node("p"), |paragraph, (number, piece)| {
                if number % 2 == 1 {
                    paragraph.child(node("strong").text(piece))
                } else {
                    paragraph.text(piece)
                }
            })
    });
    let mut header = node("header").child(node("h1").text("tun-driver bench"));
    if let Some(why) = &results.incomplete {
        let told = format!("Incomplete: {why}. What is missing here was not measured.");
        header = header.child(node("p").class("warning").text(told));
    }
    if results.quick {
        header = header.child(
            node("p")
                .class("warning")
                .text("A quick run: too few rounds to be cited. It shows that everything works."),
        );
    }
    let from = provenance(results)
        .into_iter()
        .filter(|(about, _)| !["Quick run", "INCOMPLETE"].contains(about));
    header
        .child(node("div").class("verdict").children(sentences))
        .child(described(from.map(|(about, told)| (about.to_owned(), told))))
}

fn case(heading: &str, told: &str, outcomes: &[&Outcome], looks: &Looks) -> Node {
    let mut section = node("section")
        .child(node("h2").text(heading))
        .child(node("p").text(told));
    if let Some(note) = outcomes.iter().find_map(|outcome| outcome.note) {
        section = section.child(node("p").class("note").text(format!("How they are dropped: {note}.")));
    }
    let (moving, trips): (Vec<&Outcome>, Vec<&Outcome>) =
        outcomes.iter().partition(|outcome| outcome.histograms.is_empty());
    if !moving.is_empty() {
        let unit = Unit::of(&moving);
        let all = moving
            .iter()
            .flat_map(|outcome| (0..outcome.report.ways.len()).filter_map(|way| unit.value(&outcome.report, way)));
        // One scale for all, so that bars of different plots compare.
        let scale = Scale::from_zero(all.map(|value| value.upper_quartile).fold(0.0, f64::max));
        let cells = moving.iter().map(|outcome| {
            let plot = figure(&size(outcome), svg::bars(&throughput(outcome, looks, scale, unit)));
            node("div")
                .class("cell")
                .child(plot)
                .child(drawn(&tables::outcome(outcome), 1))
        });
        section = section.child(node("div").class("plots").children(cells));
    }
    for outcome in trips {
        let ways = outcome.report.ways.iter().map(|way| way.name.as_str());
        let plots = node("div")
            .class("plots")
            .child(figure(
                "How often a trip takes how long",
                svg::lines(&percentiles(outcome, looks)),
            ))
            .child(figure(
                "Half of the trips are faster than",
                svg::bars(&medians(outcome, looks)),
            ));
        section = section
            .child(legend(ways, looks))
            .child(plots)
            .child(drawn(&tables::outcome(outcome), 1));
    }
    outcomes
        .first()
        .map(|outcome| columns(&tables::outcome(outcome)))
        .into_iter()
        .fold(section, Node::child)
}

fn size(outcome: &Outcome) -> String {
    outcome
        .packet_len
        .map_or(outcome.title.clone(), |bytes| format!("Packets of {bytes} bytes"))
}

/// What the bars of a case show.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Unit {
    /// Where the ways' packets are of one length.
    Packets,
    /// Where a packet of one way stands for many of another.
    Bytes,
}

impl Unit {
    fn of(outcomes: &[&Outcome]) -> Self {
        let has_bytes = outcomes
            .iter()
            .any(|outcome| outcome.report.ways.iter().any(|way| way.figure(GBIT).is_some()));
        if has_bytes { Unit::Bytes } else { Unit::Packets }
    }

    fn value(self, report: &Report, way: usize) -> Option<Spread> {
        match self {
            Unit::Packets => tables::mpps(report, way),
            Unit::Bytes => Some(report.ways.get(way)?.figure(GBIT)?.value),
        }
    }

    fn short(self) -> &'static str {
        match self {
            Unit::Packets => "Mpps",
            Unit::Bytes => "Gbit/s",
        }
    }

    fn long(self) -> &'static str {
        match self {
            Unit::Packets => "million packets per second of one core",
            Unit::Bytes => "Gbit/s of payload, by one core",
        }
    }
}

fn throughput(outcome: &Outcome, looks: &Looks, scale: Scale, unit: Unit) -> Bars {
    let report = &outcome.report;
    let rows = report.ways.iter().enumerate().filter_map(|(index, way)| {
        let value = unit.value(report, index)?;
        let ratio = way.cpu_ratio().map_or(String::new(), |ratio| {
            format!(", CPU ratio {}", numbers::ratio(&ratio).0)
        });
        let told = match unit {
            Unit::Packets => format!("{:.2}", value.median),
            Unit::Bytes => numbers::short(value.median),
        };
        Some(bar(
            &way.name,
            &format!("{told} {}{ratio}", unit.short()),
            looks.look(&way.name),
            &value,
            unit.short(),
        ))
    });
    Bars {
        told: format!(
            "Bars: {}, for each way; {}. The table below has the numbers.",
            unit.long(),
            outcome.title
        ),
        axis: format!("{}; longer is better", unit.long()),
        scale,
        rows: rows.collect(),
    }
}

fn medians(outcome: &Outcome, looks: &Looks) -> Bars {
    let values: Vec<(&str, Spread)> = outcome
        .report
        .ways
        .iter()
        .filter_map(|way| Some((way.name.as_str(), way.figure("p50_us")?.value)))
        .collect();
    Bars {
        told: format!(
            "Bars: median of the round trip in microseconds, for each way; {}. The table below has the numbers.",
            outcome.title
        ),
        axis: "median in µs; shorter is better".to_owned(),
        scale: Scale::from_zero(values.iter().map(|(_, value)| value.upper_quartile).fold(0.0, f64::max)),
        rows: values
            .iter()
            .map(|(way, value)| {
                bar(
                    way,
                    &format!("{} µs", numbers::short(value.median)),
                    looks.look(way),
                    value,
                    "µs",
                )
            })
            .collect(),
    }
}

pub(super) fn bar(name: &str, text: &str, look: usize, value: &Spread, unit: &str) -> Bar {
    Bar {
        name: name.to_owned(),
        text: text.to_owned(),
        look,
        value: value.median,
        whisker: (value.lower_quartile, value.upper_quartile),
        hint: format!(
            "{name}: median {} {unit}, quartiles {} {unit}",
            numbers::short(value.median),
            numbers::quartiles(value, 1.0)
        ),
    }
}

/// Shares by how rare what lies above them is: each ten times rarer than the one before is one step further right.
pub(super) const SHARES: [(f64, &str); 7] = [
    (0.5, "50 %"),
    (0.9, "90 %"),
    (0.99, "99 %"),
    (0.999, "99.9 %"),
    (0.9999, "99.99 %"),
    (0.99999, "99.999 %"),
    (0.999999, "99.9999 %"),
];

pub(super) fn rarity(share: f64) -> f64 {
    -(1.0 - share).log10()
}

fn percentiles(outcome: &Outcome, looks: &Looks) -> Lines {
    let count = outcome.histograms.iter().map(Histogram::len).max().unwrap_or(1).max(10);
    let rarest = (count as f64).log10();
    let ticks: Vec<(f64, String)> = SHARES
        .iter()
        .map(|(share, label)| (rarity(*share), (*label).to_owned()))
        .filter(|(place, _)| *place <= rarest)
        .collect();
    let traces: Vec<Trace> = outcome
        .histograms
        .iter()
        .zip(&outcome.report.ways)
        .map(|(histogram, way)| Trace {
            look: looks.look(&way.name),
            dots: distribution(&way.name, histogram),
        })
        .collect();
    let all = traces.iter().flat_map(|trace| trace.dots.iter().map(|dot| dot.y));
    Lines {
        told: format!(
            "Lines: latency over percentile, one line per way; {}. The table below has the usual percentiles.",
            outcome.title
        ),
        y: Axis {
            label: "µs, logarithmic; lower is better".to_owned(),
            scale: Scale::log_around(all),
            ticks: vec![],
        },
        x: Axis {
            label: "share of the trips that were at most this long".to_owned(),
            scale: Scale::Linear { low: 0.0, high: rarest },
            ticks,
        },
        lines: traces,
    }
}

pub(super) fn distribution(name: &str, histogram: &Histogram<u64>) -> Vec<Dot> {
    let rarest = (histogram.len().max(1) as f64).log10();
    let dot = |share: f64, mark, what: &str| {
        let micros = histogram.value_at_quantile(share) as f64 / 1e3;
        let hint = format!("{name}: {what} took at most {} µs", numbers::short(micros));
        Dot {
            x: rarity(share).min(rarest),
            y: micros,
            whisker: None,
            mark,
            hint,
        }
    };
    // Twenty to a step are more than can be told apart.
    let steps =
        (0..=(rarest * 20.0) as u32).map(|step| dot(1.0 - 10_f64.powf(-f64::from(step) / 20.0), Mark::None, ""));
    let marked = SHARES
        .iter()
        .filter(|(share, _)| rarity(*share) <= rarest)
        .map(|(share, label)| dot(*share, Mark::Full, label));
    let mut dots: Vec<Dot> = steps.chain(marked).chain([dot(1.0, Mark::None, "all")]).collect();
    dots.sort_by(|one, other| one.x.total_cmp(&other.x));
    dots
}

fn curve(curve: &Curve, looks: &Looks) -> Node {
    let points = || curve.lines.iter().flat_map(|line| &line.points);
    let sent = || {
        points()
            .map(|point| point.sent_pps.median / 1e3)
            .filter(|rate| *rate > 0.0)
    };
    let (least, most) = (sent().fold(f64::INFINITY, f64::min), sent().fold(0.0, f64::max));
    // A little room at both ends for the marks.
    let x = if most > 0.0 {
        Scale::Log {
            low: least / 1.2,
            high: most * 1.2,
        }
    } else {
        Scale::log_around([])
    };
    let mut rates: Vec<u64> = points().filter_map(|point| point.offered_pps).collect();
    rates.sort_unstable();
    rates.dedup();
    let mut ticks: Vec<f64> = rates.iter().map(|rate| *rate as f64 / 1e3).collect();
    let last = ticks.last().copied().unwrap_or(0.0);
    ticks.extend(x.ticks().into_iter().filter(|tick| *tick >= last * 2.0));
    let ticks: Vec<(f64, String)> = ticks.into_iter().map(|rate| (rate, numbers::plain(rate))).collect();

    let plot = |what: &str, unit: &str, value: &dyn Fn(&Point) -> Spread| {
        let values = points()
            .map(value)
            .flat_map(|value| [value.lower_quartile, value.median, value.upper_quartile]);
        let lines = curve.lines.iter().map(|line| Trace {
            look: looks.look(&line.way),
            dots: line
                .points
                .iter()
                .map(|point| dot(&line.way, point, &value(point), unit))
                .collect(),
        });
        let plot = Lines {
            told: format!(
                "Lines: {what} over the rate sent, one line per way; {}. The table below has the numbers.",
                curve.title
            ),
            x: Axis {
                label: "sent, thousand packets per second, logarithmic".to_owned(),
                scale: x,
                ticks: ticks.clone(),
            },
            y: Axis {
                label: format!("{unit}, logarithmic; lower is better"),
                scale: Scale::log_around(values),
                ticks: vec![],
            },
            lines: lines.collect(),
        };
        figure(what, svg::lines(&plot))
    };
    let micros = |spread: Spread| scaled(spread, 1e-3);
    let plots = node("div")
        .class("plots")
        .child(plot("CPU of the process per packet", "µs", &|point| {
            micros(point.cpu_ns_per_packet)
        }))
        .child(plot(
            "CPU of the whole machine but for the generator, per packet",
            "µs",
            &|point| micros(point.machine_cpu_ns_per_packet),
        ))
        .child(plot("Latency: half of the packets are faster than", "µs", &|point| {
            point.p50_us
        }))
        .child(plot("Latency: 99 in 100 packets are faster than", "µs", &|point| {
            point.p99_us
        }));

    let ceiling = curve.generator_ceiling_pps.map_or(String::new(), |pps| {
        format!(
            " Alone, the generator reaches {} packets per second.",
            numbers::rate(pps)
        )
    });
    let table = tables::curve(curve);
    let count = table.rows.len();
    node("section")
        .child(node("h2").text(format!("Over offered rates: {}", curve.title)))
        .child(node("p").text(format!(
            "A generator sends packets of {} bytes by the clock, whether or not the receiver keeps up; the receiver counts and checks them.{ceiling}",
            curve.packet_bytes
        )))
        .child(legend(curve.lines.iter().map(|line| line.way.as_str()), looks))
        .child(node("p").class("note").text(
            "A hollow mark: the generator sent as fast as it could, or not as fast as it should. Thin upright lines: quartiles.",
        ))
        .child(plots)
        .child(
            node("details")
                .child(node("summary").text(format!("The numbers: {count} rows, by rate and way")))
                .child(drawn(&table, 2)),
        )
        .child(columns(&table))
}

fn dot(way: &str, point: &Point, value: &Spread, unit: &str) -> Dot {
    let forced = point.offered_pps.is_none() || point.generator_bound;
    let offered = point.offered_pps.map_or("as fast as it goes".to_owned(), |rate| {
        format!("{} packets/s offered", numbers::rate(rate as f64))
    });
    Dot {
        x: point.sent_pps.median / 1e3,
        y: value.median,
        whisker: Some((value.lower_quartile, value.upper_quartile)),
        mark: if forced { Mark::Hollow } else { Mark::Full },
        hint: format!(
            "{way}, {offered}: {} {unit} [{}], {} packets/s arrived, lost {}",
            numbers::short(value.median),
            numbers::quartiles(value, 1.0),
            numbers::rate(point.achieved_pps.median),
            numbers::percent(point.loss()),
        ),
    }
}

fn scaled(spread: Spread, scale: f64) -> Spread {
    Spread {
        min: spread.min * scale,
        lower_quartile: spread.lower_quartile * scale,
        median: spread.median * scale,
        upper_quartile: spread.upper_quartile * scale,
        max: spread.max * scale,
    }
}

fn scaling(scaling: &Scaling) -> Node {
    let rows: Vec<Bar> = scaling
        .rows
        .iter()
        .map(|row| {
            let value = scaled(row.pps, 1e-6);
            let ratio = row
                .ratio
                .map_or(String::new(), |ratio| format!(", ratio {}", numbers::ratio(&ratio).0));
            bar(
                &row.name,
                &format!("{:.2} Mpps{ratio}", value.median),
                1,
                &value,
                "Mpps",
            )
        })
        .collect();
    let totals = Bars {
        told: format!(
            "Bars: million packets per second for each set-up; {}. The table below has the numbers.",
            scaling.title
        ),
        axis: "million packets per second, all queues; longer is better".to_owned(),
        scale: Scale::from_zero(rows.iter().map(|row| row.whisker.1.max(row.value)).fold(0.0, f64::max)),
        rows,
    };
    let shares: Vec<(String, Vec<f64>)> = scaling
        .rows
        .iter()
        .filter(|row| row.per_queue_share.len() > 1)
        .map(|row| (row.name.clone(), row.per_queue_share.clone()))
        .collect();
    let mut plots = node("div").class("plots").child(figure("Total", svg::bars(&totals)));
    if !shares.is_empty() {
        let told = format!(
            "Bars: share of the packets that each queue had; {}. The table below has the extremes.",
            scaling.title
        );
        let axis = "share of the packets per queue; the short strokes: an even spread";
        plots = plots.child(figure("Spread over the queues", svg::divided(&told, axis, &shares)));
    }
    let table = tables::scaling(scaling);
    node("section")
        .child(node("h2").text(format!("Scaling over queues: {}", scaling.title)))
        .child(node("p").text(format!(
            "Packets of {} bytes in {} flows, each of which stays on one queue.",
            scaling.packet_bytes, scaling.flows
        )))
        .child(plots)
        .child(drawn(&table, 1))
        .child(columns(&table))
}

fn acts(acts: &Acts) -> Node {
    let table = tables::acts(acts);
    let mut title = acts.title.chars();
    let title: String = title
        .next()
        .map(|letter| letter.to_uppercase().chain(title).collect())
        .unwrap_or_default();
    node("section")
        .child(node("h2").text(title))
        .child(drawn(&table, 1))
        .child(columns(&table))
}

pub(super) fn footer(reading: &[(&str, &str)], silence: &[(&str, &str)]) -> Node {
    let points = |points: &[(&str, &str)]| {
        described(
            points
                .iter()
                .map(|(about, told)| ((*about).to_owned(), (*told).to_owned())),
        )
    };
    node("footer")
        .child(node("h2").text("How to read this"))
        .child(points(reading))
        .child(node("h2").text("What it does not show"))
        .child(points(silence))
}

pub(super) fn figure(caption: &str, plot: Node) -> Node {
    node("figure").child(node("figcaption").text(caption)).child(plot)
}

fn legend<'a>(ways: impl Iterator<Item = &'a str>, looks: &Looks) -> Node {
    let entries = ways.map(|way| node("li").child(svg::swatch(looks.look(way))).text(way));
    node("ul").class("legend").children(entries)
}

/// A table whose first `words` columns are words.
pub(super) fn drawn(table: &Table, words: usize) -> Node {
    // The last column of words stays in view when a narrow window scrolls.
    let class = |index: usize| match index {
        _ if index + 1 == words => "words key",
        _ if index < words => "words",
        _ if ["remarks", "dropped where"].contains(&table.columns[index].name.as_str()) => "words long",
        _ => "number",
    };
    let heads = table.columns.iter().enumerate().map(|(index, column)| {
        node("th")
            .with("scope", "col")
            .with("title", &column.told)
            .class(class(index))
            .text(&column.name)
    });
    let mut before = None;
    let rows = table.rows.iter().map(|row| {
        // Where the first of several words changes, a thicker line: rows of one rate belong together.
        let first = row.first().map(|cell| &cell.value);
        let fresh = words > 1 && before != first;
        before = first;
        let cells = row.iter().enumerate().map(|(index, cell)| {
            let made = if index + 1 == words {
                node("th").with("scope", "row")
            } else {
                node("td")
            };
            let made = made.class(class(index)).text(&cell.value);
            match &cell.range {
                Some(range) => made.text(" ").child(node("span").class("range-text").text(range)),
                None => made,
            }
        });
        let made = node("tr").children(cells);
        if fresh { made.class("first") } else { made }
    });
    let body = node("tbody").children(rows);
    node("div").class("scroll").with("tabindex", 0).child(
        node("table")
            .child(node("thead").child(node("tr").children(heads)))
            .child(body),
    )
}

pub(super) fn columns(table: &Table) -> Node {
    node("details")
        .child(node("summary").text("What the columns mean"))
        .child(described(
            table
                .columns
                .iter()
                .map(|column| (column.name.clone(), column.told.clone())),
        ))
}

pub(super) fn described(points: impl Iterator<Item = (String, String)>) -> Node {
    node("dl").children(points.flat_map(|(about, told)| [node("dt").text(about), node("dd").text(told)]))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use roxmltree::{Document, ParsingOptions};

    use super::*;
    use crate::report::{json, sample, write_files};

    fn parsed(page: &str) -> Document<'_> {
        let options = ParsingOptions {
            allow_dtd: true,
            ..ParsingOptions::default()
        };
        Document::parse_with_options(page, options).unwrap()
    }

    #[test]
    fn the_page_is_well_formed_and_whole() {
        let results = sample::results();
        let page = page(&results);
        let document = parsed(&page);
        let words: String = document
            .descendants()
            .filter(|node| node.is_text())
            .filter_map(|node| node.text())
            .collect();
        for outcome in &results.outcomes {
            assert!(
                outcome.report.ways.iter().all(|way| words.contains(&way.name)),
                "{}",
                outcome.title
            );
        }
        for (_, heading, _) in CASES {
            assert!(words.contains(heading), "{heading}");
        }
        let curve = &results.curves[0];
        assert!(words.contains(&curve.title) && curve.lines.iter().all(|line| words.contains(&line.way)));
        assert!(results.scalings[0].rows.iter().all(|row| words.contains(&row.name)));
        assert!(results.acts[0].rows.iter().all(|row| words.contains(&row.name)));
        // Two plots of throughput for each of three cases, two of round trips, one of the engine, one of superpackets, four over rates, two of scaling.
        assert_eq!(
            document
                .descendants()
                .filter(|node| node.has_tag_name("figure"))
                .count(),
            16
        );
        let described = document
            .descendants()
            .filter(|node| node.has_tag_name("th"))
            .filter(|node| node.attribute("scope") == Some("col"));
        assert!(
            described.clone().count() > 30
                && described
                    .clone()
                    .all(|node| node.attribute("title").is_some_and(|told| told.len() > 8))
        );
    }

    #[test]
    fn no_two_lines_of_a_plot_look_the_same() {
        let page = page(&sample::results());
        let page = parsed(&page);
        let class = |node: &roxmltree::Node<'_, '_>| node.attribute("class").unwrap_or("").to_owned();
        let mut plots = 0;
        for plot in page.descendants().filter(|node| class(node) == "plot") {
            let lines = plot
                .descendants()
                .filter(|node| node.has_tag_name("g") && node.children().any(|child| class(&child) == "line"));
            let mut looks: Vec<String> = lines.map(|line| class(&line)).collect();
            let count = looks.len();
            looks.sort();
            looks.dedup();
            assert_eq!(looks.len(), count, "{:?}", plot.attribute("aria-label"));
            plots += usize::from(count > 1);
        }
        assert!(plots >= 5, "round trips, and four over rates");
        for legend in page.descendants().filter(|node| class(node) == "legend") {
            let mut looks: Vec<String> = legend
                .descendants()
                .filter(|node| node.has_tag_name("svg"))
                .map(|one| class(&one))
                .collect();
            let count = looks.len();
            looks.sort();
            looks.dedup();
            assert_eq!(looks.len(), count);
        }
    }

    #[test]
    fn plots_beyond_the_number_of_looks_still_differ_inside_each() {
        let mut results = sample::results();
        // Cases of three ways each, all with names that nothing else has.
        for (number, outcome) in results.outcomes.iter_mut().enumerate() {
            for way in &mut outcome.report.ways[1..] {
                way.name = format!("{} {number}", way.name);
            }
        }
        let looks = Looks::of(&results);
        for outcome in &results.outcomes {
            let mut used: Vec<usize> = outcome.report.ways.iter().map(|way| looks.look(&way.name)).collect();
            let count = used.len();
            used.sort_unstable();
            used.dedup();
            assert_eq!(used.len(), count, "{}", outcome.title);
        }
    }

    #[test]
    fn superpackets_are_drawn_in_gbit_and_all_else_in_packets() {
        let page = page(&sample::results());
        let section = |heading: &str| {
            let from = page.find(&format!("<h2>{heading}</h2>")).unwrap();
            let section = &page[from..];
            section[..section.find("<table").unwrap()].to_owned()
        };
        let supers = section("Superpackets");
        assert!(
            supers.contains("Gbit/s of payload") && !supers.contains("Mpps"),
            "{supers}"
        );
        let small = section("Receive");
        assert!(small.contains("Mpps") && !small.contains("Gbit/s"), "{small}");
    }

    #[test]
    fn an_incomplete_run_says_so_first_and_a_complete_one_does_not() {
        let mut results = sample::results();
        assert!(!page(&results).contains("Incomplete"));
        results.incomplete = Some("interrupted in “receive”".to_owned());
        let page = page(&results);
        let (told, first) = (
            page.find("Incomplete: interrupted in “receive”").unwrap(),
            page.find("class=\"verdict\"").unwrap(),
        );
        assert!(told < first);
    }

    #[test]
    fn the_page_needs_nothing_from_elsewhere() {
        let page = page(&sample::results());
        for foreign in [
            "http:",
            "https:",
            "url(",
            "@import",
            "<script",
            "<link",
            "<img",
            "<iframe",
            " src=",
            " href=",
            " onclick=",
        ] {
            assert!(!page.contains(foreign), "{foreign}");
        }
    }

    #[test]
    fn the_style_sheet_is_not_changed_by_escaping() {
        // In HTML, the content of <style> is taken as it stands.
        assert!(!include_str!("style.css").contains(['<', '>', '&', '"']));
    }

    #[test]
    fn names_cannot_become_markup() {
        let mut results = sample::results();
        results.machine.cpu_model = "<b>CPU</b> & \"co\"".to_owned();
        results.curves[0].lines[0].way = "<i>way</i>".to_owned();
        let page = page(&results);
        parsed(&page);
        assert!(!page.contains("<b>") && !page.contains("<i>"));
        assert!(page.contains("&lt;b&gt;CPU&lt;/b&gt; &amp; &quot;co&quot;"));
    }

    #[test]
    fn marks_lie_inside_their_plot() {
        let page = page(&sample::results());
        let document = parsed(&page);
        let plots: Vec<_> = document
            .descendants()
            .filter(|node| node.attribute("class") == Some("plot"))
            .collect();
        assert!(!plots.is_empty());
        for plot in plots {
            let size: Vec<f64> = plot
                .attribute("viewBox")
                .unwrap()
                .split(' ')
                .map(|word| word.parse().unwrap())
                .collect();
            let inside = |node: &roxmltree::Node<'_, '_>, name: &str, most: f64| {
                let value = node.attribute(name).map_or(0.0, |value| value.parse::<f64>().unwrap());
                assert!((0.0..=most).contains(&value), "{node:?}");
            };
            for node in plot.descendants().filter(|node| node.is_element()) {
                assert!(
                    !node
                        .attribute("d")
                        .is_some_and(|path| path.contains("NaN") || path.contains("inf")),
                    "{node:?}"
                );
                if node.has_tag_name("text") || node.has_tag_name("rect") {
                    inside(&node, "x", size[2]);
                    inside(&node, "y", size[3]);
                }
                if node.has_tag_name("rect") {
                    let right = ["x", "width"].map(|name| node.attribute(name).unwrap().parse::<f64>().unwrap());
                    assert!(right[0] + right[1] <= size[2] + 0.2, "{node:?}");
                }
            }
        }
    }

    /// To be looked at: `target/debug/sample-report/report.html`.
    #[test]
    fn all_files_are_written() {
        let binary = std::env::current_exe().unwrap();
        let folder = binary.ancestors().nth(2).unwrap().join("sample-report");
        fs::create_dir_all(&folder).unwrap();
        let results = sample::results();
        assert!(write_files(&folder, &results, &json(&results)).is_ok());
        let names: Vec<String> = fs::read_dir(&folder)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        for name in [
            "report.html",
            "report.md",
            "bench.json",
            "round_trip.hlog",
            "rates.hlog",
            "hand-over.hlog",
            "acts.hlog",
        ] {
            assert!(names.iter().any(|known| known == name), "{names:?}");
        }
        assert!(names.iter().any(|name| name.ends_with(".hgrm")));
    }
}
