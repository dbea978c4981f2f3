//! Plots. They are drawn 480 units wide and shown at about that many pixels, so that letters keep their size in a narrow window.
//!
//! Colours come from the page's style sheet: an element of class `wN` has the colour of way N. Each way also has a marker and a dash pattern of
//! its own, and every mark says its numbers when it is pointed at.

use super::markup::{Node, node};
use super::numbers;

const WIDTH: f64 = 480.0;
/// Roughly, of the letters in plots.
const LETTER: f64 = 6.6;

/// How many ways look different from each other. The first look is that of the baseline.
pub(super) const LOOKS: usize = 12;

/// From values to places between 0 and 1.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Scale {
    Linear {
        low: f64,
        high: f64,
    },
    /// Both ends are above 0.
    Log {
        low: f64,
        high: f64,
    },
}

impl Scale {
    /// From 0 to a round number at or above `greatest`.
    pub(super) fn from_zero(greatest: f64) -> Self {
        let greatest = if greatest > 0.0 { greatest } else { 1.0 };
        let step = round_step(greatest / 5.0);
        Self::Linear {
            low: 0.0,
            high: (greatest / step - 1e-9).ceil() * step,
        }
    }

    /// Around all the values that are above 0, out to 1, 2 or 5 times a power of ten.
    pub(super) fn log_around(values: impl IntoIterator<Item = f64>) -> Self {
        let (mut low, mut high) = (f64::INFINITY, 0.0_f64);
        for value in values.into_iter().filter(|value| value.is_finite() && *value > 0.0) {
            (low, high) = (low.min(value), high.max(value));
        }
        if high == 0.0 {
            return Self::Log { low: 1.0, high: 10.0 };
        }
        let (low, high) = (one_two_five_below(low), one_two_five_above(high));
        Self::Log {
            low,
            high: if high > low { high } else { low * 10.0 },
        }
    }

    /// 0 at the low end, 1 at the high end; beyond them it stays there.
    pub(super) fn place(&self, value: f64) -> f64 {
        let place = match *self {
            Self::Linear { low, high } => (value - low) / (high - low),
            Self::Log { low, high } => (value.max(low) / low).ln() / (high / low).ln(),
        };
        place.clamp(0.0, 1.0)
    }

    /// Round values to write at the axis.
    pub(super) fn ticks(&self) -> Vec<f64> {
        match *self {
            Self::Linear { low, high } => {
                let step = round_step((high - low) / 5.0);
                let first = (low / step - 1e-9).ceil();
                let count = ((high / step + 1e-9).floor() - first) as usize;
                (0..=count).map(|number| (first + number as f64) * step).collect()
            }
            Self::Log { low, high } => {
                let decades = (high / low).log10();
                let within: &[f64] = if decades <= 2.4 { &[1.0, 2.0, 5.0] } else { &[1.0] };
                let exponents = low.log10().floor() as i32..=high.log10().ceil() as i32;
                exponents
                    .flat_map(|exponent| within.iter().map(move |factor| factor * 10_f64.powi(exponent)))
                    .filter(|tick| (low * 0.999..=high * 1.001).contains(tick))
                    .collect()
            }
        }
    }
}

/// 1, 2 or 5 times a power of ten, at or above `least`.
fn round_step(least: f64) -> f64 {
    one_two_five_above(least)
}

fn one_two_five_above(value: f64) -> f64 {
    let decade = 10_f64.powf(value.log10().floor());
    let factors = [1.0, 2.0, 5.0, 10.0];
    let factor = factors.into_iter().find(|factor| factor * decade >= value * 0.999_999);
    factor.unwrap_or(10.0) * decade
}

fn one_two_five_below(value: f64) -> f64 {
    let decade = 10_f64.powf(value.log10().floor());
    let factors = [10.0, 5.0, 2.0, 1.0];
    let factor = factors.into_iter().find(|factor| factor * decade <= value * 1.000_001);
    factor.unwrap_or(1.0) * decade
}

/// Horizontal bars, a line of text above each.
pub(super) struct Bars {
    /// For those who cannot see the plot.
    pub(super) told: String,
    /// What is along the axis, with its unit.
    pub(super) axis: String,
    pub(super) scale: Scale,
    pub(super) rows: Vec<Bar>,
}

pub(super) struct Bar {
    pub(super) name: String,
    /// Written at the right.
    pub(super) text: String,
    pub(super) look: usize,
    pub(super) value: f64,
    /// The ends of the whisker: quartiles.
    pub(super) whisker: (f64, f64),
    pub(super) hint: String,
}

pub(super) fn bars(plot: &Bars) -> Node {
    const ROW: f64 = 38.0;
    let (left, right, top) = (8.0, WIDTH - 14.0, 4.0);
    let bottom = top + ROW * plot.rows.len() as f64 + 4.0;
    let x = |value: f64| left + plot.scale.place(value) * (right - left);
    let mut rows = Vec::new();
    for (number, row) in plot.rows.iter().enumerate() {
        let y = top + ROW * number as f64;
        let (bar, middle) = (y + 19.0, y + 26.0);
        let whisker = format!(
            "M{:.1} {middle:.1}H{:.1}M{:.1} {:.1}v8M{:.1} {:.1}v8",
            x(row.whisker.0),
            x(row.whisker.1),
            x(row.whisker.0),
            middle - 4.0,
            x(row.whisker.1),
            middle - 4.0
        );
        rows.push(
            node("g")
                .class(format!("w{}", row.look % LOOKS))
                .child(node("title").text(&row.hint))
                .child(text(left, y + 14.0, "", &row.name))
                .child(text(right, y + 14.0, "end", &row.text))
                .child(
                    node("rect")
                        .class("bar")
                        .at("x", left)
                        .at("y", bar)
                        .at("height", 14.0)
                        .at("width", (x(row.value) - left).max(1.0)),
                )
                .child(node("path").class("halo").with("d", &whisker))
                .child(node("path").class("whisker").with("d", &whisker)),
        );
    }
    let ticks = plot.scale.ticks();
    let grid = ticks.iter().map(|tick| {
        let class = if *tick == 0.0 { "axis" } else { "grid" };
        node("path")
            .class(class)
            .with("d", format!("M{:.1} {top:.1}V{bottom:.1}", x(*tick)))
    });
    let labels = ticks
        .iter()
        .map(|tick| text(x(*tick), bottom + 15.0, "middle", &numbers::plain(*tick)).class("tick"));
    svg(bottom + 38.0, &plot.told)
        .children(grid)
        .children(rows)
        .children(labels)
        .child(text(left, bottom + 33.0, "", &plot.axis).class("label"))
}

/// Lines over two axes.
pub(super) struct Lines {
    /// For those who cannot see the plot.
    pub(super) told: String,
    pub(super) x: Axis,
    pub(super) y: Axis,
    pub(super) lines: Vec<Trace>,
}

pub(super) struct Axis {
    /// What it is, with its unit.
    pub(super) label: String,
    pub(super) scale: Scale,
    /// Where something is written, and what; [`Scale::ticks`] if there is nothing.
    pub(super) ticks: Vec<(f64, String)>,
}

pub(super) struct Trace {
    pub(super) look: usize,
    pub(super) dots: Vec<Dot>,
}

pub(super) struct Dot {
    pub(super) x: f64,
    pub(super) y: f64,
    /// Quartiles of y.
    pub(super) whisker: Option<(f64, f64)>,
    pub(super) mark: Mark,
    pub(super) hint: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mark {
    /// Only the line passes here.
    None,
    Full,
    Hollow,
}

pub(super) fn lines(plot: &Lines) -> Node {
    // Room for "100 ms", in broad letters too.
    let (left, right, top, bottom) = (54.0, WIDTH - 14.0, 26.0, 250.0);
    let x = |value: f64| left + plot.x.scale.place(value) * (right - left);
    let y = |value: f64| bottom - plot.y.scale.place(value) * (bottom - top);
    let ticks = |axis: &Axis| {
        if axis.ticks.is_empty() {
            axis.scale
                .ticks()
                .into_iter()
                .map(|tick| (tick, numbers::plain(tick)))
                .collect()
        } else {
            axis.ticks.clone()
        }
    };

    let mut svg = svg(bottom + 42.0, &plot.told).child(text(0.0, 13.0, "", &plot.y.label).class("label"));
    let mut beyond = f64::NEG_INFINITY; // where the last label ended
    for (value, label) in ticks(&plot.x) {
        let at = x(value);
        svg = svg.child(
            node("path")
                .class("grid")
                .with("d", format!("M{at:.1} {top:.1}V{bottom:.1}")),
        );
        let half = label.chars().count() as f64 * LETTER / 2.0;
        if at - half >= beyond {
            let shown = at.min(WIDTH - half - 5.0);
            svg = svg.child(text(shown, bottom + 16.0, "middle", &label).class("tick"));
            beyond = shown + half + 4.0;
        }
    }
    for (value, label) in ticks(&plot.y) {
        let at = y(value);
        svg = svg
            .child(
                node("path")
                    .class("grid")
                    .with("d", format!("M{left:.1} {at:.1}H{right:.1}")),
            )
            .child(text(left - 6.0, at + 4.0, "end", &label).class("tick"));
    }
    svg = svg.child(
        node("path")
            .class("axis")
            .with("d", format!("M{left:.1} {top:.1}V{bottom:.1}H{right:.1}")),
    );
    svg = svg.child(text(left, bottom + 36.0, "", &plot.x.label).class("label"));
    for trace in &plot.lines {
        let path: String = trace
            .dots
            .iter()
            .enumerate()
            .map(|(number, dot)| format!("{}{:.1} {:.1}", if number == 0 { 'M' } else { 'L' }, x(dot.x), y(dot.y)))
            .collect();
        let mut group = node("g").class(format!("w{}", trace.look % LOOKS)).child(
            node("path")
                .class("line")
                .with("stroke-dasharray", dashes(trace.look))
                .with("d", path),
        );
        for dot in trace.dots.iter().filter(|dot| dot.mark != Mark::None) {
            if let Some((low, high)) = dot.whisker {
                let path = format!("M{:.1} {:.1}V{:.1}", x(dot.x), y(low), y(high));
                group = group.child(node("path").class("range").with("d", path));
            }
            let mark = marker(trace.look, x(dot.x), y(dot.y), dot.mark);
            group = group.child(mark.child(node("title").text(&dot.hint)));
        }
        svg = svg.child(group);
    }
    svg
}

/// How each thing is divided: a bar of the same length each, cut into its parts.
pub(super) fn divided(told: &str, axis: &str, rows: &[(String, Vec<f64>)]) -> Node {
    const ROW: f64 = 46.0;
    let (left, right, top) = (8.0, WIDTH - 14.0, 4.0);
    let bottom = top + ROW * rows.len() as f64;
    let mut svg = svg(bottom + 22.0, told);
    for (number, (name, parts)) in rows.iter().enumerate() {
        let y = top + ROW * number as f64;
        let mut group = node("g").child(text(left, y + 14.0, "", name));
        let whole: f64 = parts.iter().sum();
        let mut from = left;
        for (part, share) in parts.iter().enumerate() {
            let share = if whole > 0.0 { share / whole } else { 0.0 };
            let width = share * (right - left);
            let hint = format!("queue {part}: {:.1} % of the packets", share * 100.0);
            group = group.child(
                node("rect")
                    .class("part")
                    .at("x", from)
                    .at("y", y + 19.0)
                    .at("width", width)
                    .at("height", 20.0)
                    .child(node("title").text(hint)),
            );
            let labels = [
                format!("q{part}: {:.0} %", share * 100.0),
                format!("{:.0}", share * 100.0),
            ];
            if let Some(label) = labels
                .iter()
                .find(|label| label.chars().count() as f64 * LETTER + 4.0 <= width)
            {
                group = group.child(text(from + width / 2.0, y + 33.0, "middle", label).class("inside"));
            }
            from += width;
        }
        // Where the cuts would be if all had the same.
        for cut in 1..parts.len() {
            let at = left + (right - left) * cut as f64 / parts.len() as f64;
            group = group.child(
                node("path")
                    .class("even")
                    .with("d", format!("M{at:.1} {:.1}v5M{at:.1} {:.1}v5", y + 15.0, y + 38.0)),
            );
        }
        svg = svg.child(group);
    }
    svg.child(text(left, bottom + 16.0, "", axis).class("label"))
}

/// A piece of a way's line with its marker, for legends.
pub(super) fn swatch(look: usize) -> Node {
    node("svg")
        .with("viewBox", "0 0 36 14")
        .with("width", 36)
        .with("height", 14)
        .with("aria-hidden", "true")
        .class(format!("w{}", look % LOOKS))
        .child(
            node("path")
                .class("line")
                .with("stroke-dasharray", dashes(look))
                .with("d", "M0 7H36"),
        )
        .child(marker(look, 18.0, 7.0, Mark::Full))
}

/// A plot with a title and a legend above it, on a ground of its own.
pub(super) fn titled(title: &str, legend: &[(usize, &str)], plot: Node) -> Node {
    const MARGIN: f64 = 12.0;
    let above = if legend.is_empty() { 34.0 } else { 56.0 };
    let height: f64 = plot
        .get("viewBox")
        .and_then(|view| view.rsplit(' ').next()?.parse().ok())
        .expect("a plot has a height");
    let (width, height) = (WIDTH + 2.0 * MARGIN, height + above + 2.0 * MARGIN);
    let (left, top) = (-MARGIN, -above - MARGIN);
    let ground = node("rect")
        .at("x", left)
        .at("y", top)
        .at("width", width)
        .at("height", height);
    let mut head = node("g").child(text(0.0, top + 24.0, "", title).with("font-weight", "bold"));
    let mut at = 0.0;
    for &(look, name) in legend {
        let line = swatch(look).at("x", at).at("y", top + 35.0);
        head = head
            .child(line)
            .child(text(at + 42.0, top + 46.0, "", name).class("label"));
        at += 62.0 + LETTER * name.chars().count() as f64;
    }
    // The ground is to lie below all else.
    plot.first(head)
        .first(ground.with("fill", "var(--page)"))
        .replace("viewBox", format!("{left} {top} {width} {height}"))
        .at("width", 2.0 * width)
        .at("height", 2.0 * height)
}

fn svg(height: f64, told: &str) -> Node {
    node("svg")
        .with("viewBox", format!("0 0 {WIDTH} {height}"))
        .with("role", "img")
        .with("aria-label", told)
        .class("plot")
}

fn text(x: f64, y: f64, anchor: &str, text: &str) -> Node {
    let node = node("text").at("x", x).at("y", y);
    let node = if anchor.is_empty() {
        node
    } else {
        node.with("text-anchor", anchor)
    };
    node.text(text)
}

fn dashes(look: usize) -> &'static str {
    [
        "none",
        "14 2",
        "7 3",
        "2 3",
        "9 3 2 3",
        "4 2",
        "12 5",
        "2 2 6 2",
        "5 5",
        "9 2 2 2 2 2",
        "1 2",
        "16 3 6 3",
    ][look % LOOKS]
}

fn marker(look: usize, x: f64, y: f64, mark: Mark) -> Node {
    let shape = [
        "m-4-4h8v8h-8z",                                // square
        "m-4.5 0a4.5 4.5 0 1 0 9 0a4.5 4.5 0 1 0-9 0z", // circle
        "m0-5.5l5 9h-10z",                              // triangle
        "m0-5.5l5 5.5l-5 5.5l-5-5.5z",                  // diamond
        "m0 5.5l5-9h-10z",                              // triangle on its tip
        "m-6-2h12v4h-12z",                              // lying bar
        "m-2-6h4v12h-4z",                               // standing bar
        "m-5-5l5 2l5-2l-2 5l2 5l-5-2l-5 2l2-5z",        // star
        "m-5-2h3v-3h4v3h3v4h-3v3h-4v-3h-3z",            // cross
        "m-5-5h10l-10 10h10z",                          // hourglass
        "m-5-5v10l10-10v10z",                           // hourglass on its side
        "m-3-5h6l3 5l-3 5h-6l-3-5z",                    // hexagon
    ][look % LOOKS];
    let class = if mark == Mark::Hollow { "mark hollow" } else { "mark" };
    node("path").class(class).with("d", format!("M{x:.1} {y:.1}{shape}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn linear_scales_start_at_zero_and_end_at_a_round_number() {
        assert_eq!(Scale::from_zero(1.53), Scale::Linear { low: 0.0, high: 2.0 });
        let ticks = Scale::from_zero(1.53).ticks();
        assert_eq!(
            ticks.iter().map(|tick| numbers::plain(*tick)).collect::<Vec<_>>(),
            ["0", "0.5", "1", "1.5", "2"]
        );
        assert_eq!(
            Scale::from_zero(2.0),
            Scale::Linear { low: 0.0, high: 2.0 },
            "no space above a round number"
        );
        for nothing in [0.0, f64::NAN, -1.0] {
            assert_eq!(Scale::from_zero(nothing), Scale::Linear { low: 0.0, high: 1.0 });
        }
    }

    #[test]
    fn log_scales_go_out_to_one_two_or_five() {
        assert_eq!(Scale::log_around([23.0, 480.0]), Scale::Log { low: 20.0, high: 500.0 });
        let ticks = Scale::log_around([23.0, 480.0]).ticks();
        assert_eq!(
            ticks.iter().map(|tick| tick.round()).collect::<Vec<_>>(),
            [20.0, 50.0, 100.0, 200.0, 500.0]
        );
        let wide = Scale::log_around([0.7, 40_000.0]);
        assert_eq!(
            wide,
            Scale::Log {
                low: 0.5,
                high: 50_000.0
            }
        );
        assert_eq!(wide.ticks().len(), 5, "1, 10, 100, 1000, 10000: {:?}", wide.ticks());
        assert_eq!(Scale::log_around([]), Scale::Log { low: 1.0, high: 10.0 });
        assert_eq!(
            Scale::log_around([0.0, 1000.0]),
            Scale::Log {
                low: 1000.0,
                high: 10_000.0
            },
            "0 has no place"
        );
    }

    #[test]
    fn places_run_from_end_to_end_and_stay_inside() {
        let linear = Scale::Linear { low: 0.0, high: 4.0 };
        assert_eq!(
            [-1.0, 0.0, 1.0, 4.0, 9.0].map(|value| linear.place(value)),
            [0.0, 0.0, 0.25, 1.0, 1.0]
        );
        let log = Scale::Log { low: 1.0, high: 100.0 };
        assert_eq!(log.place(0.0), 0.0);
        assert!((log.place(10.0) - 0.5).abs() < 1e-9);
        assert_eq!(log.place(100.0), 1.0);
    }

    #[test]
    fn every_way_looks_different_also_without_colour() {
        let looks: std::collections::BTreeSet<String> = (0..LOOKS)
            .map(|look| marker(look, 0.0, 0.0, Mark::Full).to_string())
            .collect();
        assert_eq!(looks.len(), LOOKS);
        let lines: std::collections::BTreeSet<&str> = (0..LOOKS).map(dashes).collect();
        assert_eq!(lines.len(), LOOKS);
    }

    #[test]
    fn every_way_has_a_colour_in_light_and_in_dark() {
        let style = include_str!("style.css");
        for look in 0..LOOKS {
            let of_page: Vec<&str> = style
                .split(&format!("--w{look}: "))
                .skip(1)
                .map(|rest| rest.split(';').next().unwrap())
                .collect();
            assert_eq!(of_page.len(), 2, "light and dark of {look}");
            for colour in of_page {
                assert_eq!(style.matches(colour).count(), 1, "{colour} is another's, too");
            }
            assert!(
                style.contains(&format!(".w{look} {{ --c: var(--w{look}); }}")),
                "{look}"
            );
        }
    }

    #[test]
    fn labels_at_an_axis_do_not_overlap() {
        let told = lines(&Lines {
            told: String::new(),
            x: Axis {
                label: String::new(),
                scale: Scale::Linear { low: 0.0, high: 1.0 },
                ticks: vec![(0.5, "first".into()), (0.51, "second".into()), (0.9, "third".into())],
            },
            y: Axis {
                label: String::new(),
                scale: Scale::from_zero(1.0),
                ticks: vec![],
            },
            lines: vec![],
        })
        .to_string();
        assert!(told.contains("first") && !told.contains("second") && told.contains("third"));
    }
}
