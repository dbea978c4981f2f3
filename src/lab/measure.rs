//! Comparing several ways of doing one thing on a machine that drifts.
//!
//! Absolute figures of a shared or virtual machine move by a third from minute to minute; what can be trusted is the ratio of two ways that ran
//! within the same second. So [`compare`] runs the ways in turn (A B C, then B C A, …), one short sample each, throws the first round away,
//! and reports per way the spread of each figure and, against a chosen baseline, the spread of the ratio formed inside each round.
//!
//! ```
//! use std::io;
//! use tun_driver::lab::measure::{Clock, Plan, Sample, compare};
//!
//! # fn main() -> io::Result<()> {
//! let plan = Plan { rounds: 3, ..Plan::default() };
//! let report = compare(&plan, &["add", "multiply"], |turn| {
//!     let clock = Clock::start();
//!     let mut product = 1_u64;
//!     for factor in 0..1_000_u64 {
//!         product = std::hint::black_box(if turn.way == 0 { product + factor } else { product * (factor | 1) % 997 });
//!     }
//!     let mut sample = Sample::default();
//!     sample.add(clock.elapsed(), 1_000);
//!     Ok(sample)
//! })?;
//! assert_eq!(report.ways.len(), 2);
//! println!("{}", report.ways[1].cpu_ratio().expect("the baseline is the first way").median);
//! # Ok(())
//! # }
//! ```

use std::fmt;
use std::fs;
use std::io;
use std::time::{Duration, Instant};

use super::process;

/// The figure that every sample has: CPU time of the measuring thread per packet.
pub const CPU_NS: &str = "cpu_ns_per_packet";

/// The figure that every sample has: elapsed time per packet.
pub const WALL_NS: &str = "wall_ns_per_packet";

/// How a comparison runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    /// Rounds that count. In each round every way gives one sample.
    pub rounds: usize,
    /// Rounds before them, whose samples are thrown away.
    pub warm_up: usize,
    /// Index of the way that the others are compared with.
    pub baseline: usize,
    /// Run the baseline a second time in each round, under its own name with `(again)`: the ratio of a thing to itself shows how far any other
    /// ratio of the same run can be trusted.
    pub against_itself: bool,
}

/// Ten rounds after one of warm-up, against the first way.
impl Default for Plan {
    fn default() -> Self {
        Self {
            rounds: 10,
            warm_up: 1,
            baseline: 0,
            against_itself: false,
        }
    }
}

impl Plan {
    /// Three rounds after one of warm-up: shows that everything works, not to be quoted.
    pub fn quick() -> Self {
        Self {
            rounds: 3,
            ..Self::default()
        }
    }
}

/// Whose turn it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Turn {
    /// Index of the way in the list given to [`compare`]. A second run of the baseline carries the baseline's index.
    pub way: usize,
    /// The round, warm-up rounds included, from 0.
    pub round: usize,
    /// How many samples were taken before this one.
    pub done: usize,
    /// How many samples will be taken in all.
    pub total: usize,
}

/// CPU time of the calling thread and elapsed time, from one moment on.
#[derive(Clone, Copy, Debug)]
pub struct Clock {
    cpu: Duration,
    wall: Instant,
}

impl Clock {
    /// Starts now. [`elapsed`](Self::elapsed) must be called on the same thread.
    pub fn start() -> Self {
        let wall = Instant::now();
        Self {
            cpu: process::thread_cpu_time(),
            wall,
        }
    }

    /// What has passed since.
    pub fn elapsed(&self) -> Elapsed {
        let cpu = process::thread_cpu_time();
        Elapsed {
            cpu: cpu.saturating_sub(self.cpu),
            wall: self.wall.elapsed(),
        }
    }
}

/// What passed between two readings of a [`Clock`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Elapsed {
    /// CPU time of the thread.
    pub cpu: Duration,
    /// Elapsed time.
    pub wall: Duration,
}

/// What one way gave in one round.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Sample {
    /// Packets moved.
    pub packets: u64,
    /// CPU time of the measuring thread, for all of them.
    pub cpu: Duration,
    /// Elapsed time, for all of them.
    pub wall: Duration,
    /// Further figures by name, with the unit in the name. Every sample of a way names the same ones.
    pub figures: Vec<(&'static str, f64)>,
}

impl Sample {
    /// Adds a timed stretch in which `packets` were moved.
    pub fn add(&mut self, elapsed: Elapsed, packets: u64) {
        self.packets += packets;
        self.cpu += elapsed.cpu;
        self.wall += elapsed.wall;
    }

    /// A figure by name: [`CPU_NS`], [`WALL_NS`], or one of its own. No number where there is none of that name.
    pub fn figure(&self, name: &str) -> f64 {
        let per_packet = |time: Duration| time.as_nanos() as f64 / self.packets as f64;
        match name {
            CPU_NS => per_packet(self.cpu),
            WALL_NS => per_packet(self.wall),
            _ => self
                .figures
                .iter()
                .find(|(known, _)| *known == name)
                .map_or(f64::NAN, |(_, value)| *value),
        }
    }
}

/// The outcome of a comparison.
#[derive(Clone, Debug, PartialEq)]
pub struct Report {
    /// Rounds that counted.
    pub rounds: usize,
    /// Index in `ways` of the way that the ratios refer to.
    pub baseline: usize,
    /// The ways in the order they were given; the second run of the baseline, if any, comes last.
    pub ways: Vec<WayReport>,
}

impl Report {
    /// A figure of one way divided by that of another of the same round, over the rounds. `None` where one of them is not there or 0.
    pub fn ratio(&self, figure: &str, way: &str, by: &str) -> Option<Spread> {
        let samples = |name: &str| self.ways.iter().find(|way| way.name == name).map(|way| &way.samples);
        let ratios = samples(way)?.iter().zip(samples(by)?);
        let ratios = ratios.map(|(own, other)| own.figure(figure) / other.figure(figure));
        Spread::of(&ratios.collect::<Vec<f64>>())
    }
}

/// One way's part of a [`Report`].
#[derive(Clone, Debug, PartialEq)]
pub struct WayReport {
    /// Its name.
    pub name: String,
    /// Its samples, one per round that counted.
    pub samples: Vec<Sample>,
    /// Its figures: [`CPU_NS`], [`WALL_NS`], then those of the samples.
    pub figures: Vec<Figure>,
}

impl WayReport {
    /// A figure by name.
    pub fn figure(&self, name: &str) -> Option<&Figure> {
        self.figures.iter().find(|figure| figure.name == name)
    }

    /// CPU time per packet against the baseline; `None` for the baseline itself.
    pub fn cpu_ratio(&self) -> Option<Spread> {
        self.figure(CPU_NS).and_then(|figure| figure.ratio)
    }
}

/// One figure of one way.
#[derive(Clone, Debug, PartialEq)]
pub struct Figure {
    /// What it is, with its unit.
    pub name: &'static str,
    /// Over the rounds.
    pub value: Spread,
    /// This way's value divided by the baseline's of the same round, over the rounds. `None` for the baseline itself, for a figure that the
    /// baseline does not have, and where the baseline's value was 0 in a round.
    pub ratio: Option<Spread>,
}

/// Five numbers that describe a set of values. Quartiles are interpolated linearly between neighbours (R's type 7, the common choice).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Spread {
    /// The smallest.
    pub min: f64,
    /// A quarter of the values lie below.
    pub lower_quartile: f64,
    /// Half of the values lie below.
    pub median: f64,
    /// Three quarters of the values lie below.
    pub upper_quartile: f64,
    /// The greatest.
    pub max: f64,
}

impl Spread {
    /// The spread of `values`, in any order; `None` if there are none or one of them is no finite number.
    pub fn of(values: &[f64]) -> Option<Self> {
        if values.is_empty() || values.iter().any(|value| !value.is_finite()) {
            return None;
        }
        let mut sorted = values.to_vec();
        sorted.sort_by(f64::total_cmp);
        Some(Self {
            min: sorted[0],
            lower_quartile: quantile(&sorted, 0.25),
            median: quantile(&sorted, 0.5),
            upper_quartile: quantile(&sorted, 0.75),
            max: sorted[sorted.len() - 1],
        })
    }
}

fn quantile(sorted: &[f64], share: f64) -> f64 {
    let place = share * (sorted.len() - 1) as f64;
    let below = place as usize;
    let above = (below + 1).min(sorted.len() - 1);
    sorted[below] + (sorted[above] - sorted[below]) * (place - below as f64)
}

/// The error by which `run` ends a [`compare`] early. Rounds that were complete by then are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stopped;

impl Stopped {
    /// Whether this is what `error` says.
    pub fn is(error: &io::Error) -> bool {
        error.get_ref().is_some_and(|inner| inner.is::<Self>())
    }
}

impl fmt::Display for Stopped {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("stopped before the first round was complete")
    }
}

impl std::error::Error for Stopped {}

impl From<Stopped> for io::Error {
    fn from(stopped: Stopped) -> Self {
        io::Error::other(stopped)
    }
}

/// Runs `names.len()` ways in turn and compares them. `run` gives one sample of the way whose turn it is, and may show progress.
///
/// If `run` fails with [`Stopped`] and at least one round that counts is complete, the report is
/// over the complete rounds.
///
/// # Errors
/// The first other error of `run` ends the comparison. InvalidInput where the plan names a baseline
/// that is not there or no round at all, InvalidData where a sample moved no packets or has a
/// figure that is no finite number.
pub fn compare(plan: &Plan, names: &[&str], mut run: impl FnMut(Turn) -> io::Result<Sample>) -> io::Result<Report> {
    if plan.baseline >= names.len() || plan.rounds == 0 {
        let told = format!(
            "{} rounds over {} ways with baseline {}",
            plan.rounds,
            names.len(),
            plan.baseline
        );
        return Err(io::Error::new(io::ErrorKind::InvalidInput, told));
    }
    let mut names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
    let given = names.len();
    if plan.against_itself {
        names.push(format!("{} (again)", names[plan.baseline]));
    }

    let rounds = plan.warm_up + plan.rounds;
    let mut samples = vec![Vec::with_capacity(plan.rounds); names.len()];
    let mut done = 0;
    'rounds: for round in 0..rounds {
        for place in order(names.len(), round) {
            let way = if place == given { plan.baseline } else { place };
            let turn = Turn {
                way,
                round,
                done,
                total: rounds * names.len(),
            };
            let sample = match run(turn) {
                // The complete rounds, so that each ratio has both of its figures.
                Err(error) if Stopped::is(&error) && round > plan.warm_up => {
                    samples
                        .iter_mut()
                        .for_each(|samples| samples.truncate(round - plan.warm_up));
                    break 'rounds;
                }
                outcome => outcome?,
            };
            check(&names[place], &sample)?;
            if round >= plan.warm_up {
                samples[place].push(sample);
            }
            done += 1;
        }
    }
    Ok(report(plan, names, samples))
}

/// Who runs in which place of a round: each round starts one further, so that over the rounds each way runs in each place.
fn order(ways: usize, round: usize) -> impl Iterator<Item = usize> {
    (0..ways).map(move |place| (place + round) % ways)
}

fn check(name: &str, sample: &Sample) -> io::Result<()> {
    let bad = |told: String| Err(io::Error::new(io::ErrorKind::InvalidData, format!("{name}: {told}")));
    if sample.packets == 0 {
        return bad("no packet was moved".to_owned());
    }
    match sample.figures.iter().find(|(_, value)| !value.is_finite()) {
        Some((figure, value)) => bad(format!("{figure} is {value}")),
        None => Ok(()),
    }
}

fn report(plan: &Plan, names: Vec<String>, samples: Vec<Vec<Sample>>) -> Report {
    let baseline = samples[plan.baseline].clone();
    let rounds = baseline.len();
    let ways = names
        .into_iter()
        .zip(samples)
        .enumerate()
        .map(|(index, (name, samples))| {
            let wanted = [CPU_NS, WALL_NS]
                .into_iter()
                .chain(samples[0].figures.iter().map(|(figure, _)| *figure));
            let figures = wanted
                .filter_map(|figure| {
                    let values: Vec<f64> = samples.iter().map(|sample| sample.figure(figure)).collect();
                    let ratios = samples
                        .iter()
                        .zip(&baseline)
                        .map(|(own, other)| own.figure(figure) / other.figure(figure));
                    let ratio = if index == plan.baseline {
                        None
                    } else {
                        Spread::of(&ratios.collect::<Vec<f64>>())
                    };
                    Some(Figure {
                        name: figure,
                        value: Spread::of(&values)?,
                        ratio,
                    })
                })
                .collect();
            WayReport { name, samples, figures }
        })
        .collect();
    Report {
        rounds,
        baseline: plan.baseline,
        ways,
    }
}

/// A table: one line per way and figure, medians with quartiles, ratios to the baseline with theirs.
impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let width = self
            .ways
            .iter()
            .map(|way| way.name.chars().count())
            .max()
            .unwrap_or(0)
            .max(3);
        let names = self
            .ways
            .iter()
            .flat_map(|way| &way.figures)
            .map(|figure| figure.name.len())
            .max()
            .unwrap_or(0);
        writeln!(
            f,
            "{:width$}  {:names$}  {:>9} {:>9} {:>9}  {:>6} {:>6} {:>6}",
            "way", "figure", "quartile", "median", "quartile", "ratio", "from", "to"
        )?;
        for way in &self.ways {
            for figure in &way.figures {
                let Spread {
                    lower_quartile,
                    median,
                    upper_quartile,
                    ..
                } = figure.value;
                write!(
                    f,
                    "{:width$}  {:names$}  {lower_quartile:>9.1} {median:>9.1} {upper_quartile:>9.1}",
                    way.name, figure.name
                )?;
                match figure.ratio {
                    Some(ratio) => writeln!(
                        f,
                        "  {:>6.3} {:>6.3} {:>6.3}",
                        ratio.median, ratio.lower_quartile, ratio.upper_quartile
                    )?,
                    None => writeln!(
                        f,
                        "  {:>6}",
                        if way.name == self.ways[self.baseline].name {
                            "1"
                        } else {
                            "-"
                        }
                    )?,
                }
            }
        }
        Ok(())
    }
}

/// What a figure must be quoted with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Machine {
    /// The processor's name as the kernel tells it.
    pub cpu_model: String,
    /// Processors that this process may run on.
    pub cpus: usize,
    /// Release of the running kernel.
    pub kernel: String,
    /// Mitigations, which make system calls and branches dearer: `name: what the kernel says`, one per vulnerability that this processor has.
    /// Those told as `Vulnerable` are among them: the kernel may have taken a measure that it thinks incomplete.
    pub mitigations: Vec<String>,
    /// Whether the processor reports a hypervisor above it.
    pub virtual_machine: bool,
}

impl Machine {
    /// Reads it from `/proc` and `/sys`; what cannot be read is `unknown` or absent.
    pub fn read() -> Self {
        let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let line = |key: &str| {
            let mut lines = cpuinfo.lines().filter_map(|line| line.split_once(':'));
            lines
                .find(|(name, _)| name.trim() == key)
                .map(|(_, value)| value.trim().to_owned())
        };
        let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_else(|_| "unknown".to_owned());
        Self {
            cpu_model: line("model name").unwrap_or_else(|| "unknown".to_owned()),
            cpus: std::thread::available_parallelism().map_or(1, usize::from),
            kernel: kernel.trim().to_owned(),
            mitigations: mitigations(),
            virtual_machine: line("flags")
                .is_some_and(|flags| flags.split_whitespace().any(|flag| flag == "hypervisor")),
        }
    }
}

fn mitigations() -> Vec<String> {
    let Ok(entries) = fs::read_dir("/sys/devices/system/cpu/vulnerabilities") else {
        return Vec::new();
    };
    let mut found: Vec<String> = entries
        .filter_map(|entry| {
            let entry = entry.ok()?;
            let told = fs::read_to_string(entry.path()).ok()?;
            let told = told.trim();
            let measure = told.strip_prefix("Mitigation: ").unwrap_or(told);
            if measure == "Not affected" {
                return None;
            }
            Some(format!("{}: {measure}", entry.file_name().to_string_lossy()))
        })
        .collect();
    found.sort();
    found
}

impl fmt::Display for Machine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = if self.virtual_machine {
            "virtual machine"
        } else {
            "bare metal"
        };
        write!(
            f,
            "{}, {} CPUs, {kind}, Linux {}",
            self.cpu_model, self.cpus, self.kernel
        )?;
        if self.mitigations.is_empty() {
            f.write_str(", no mitigations")
        } else {
            write!(f, ", {}", self.mitigations.join("; "))
        }
    }
}

#[cfg(feature = "cli")]
pub use json::quantiles_json;

#[cfg(feature = "cli")]
mod json {
    use hdrhistogram::Histogram;
    use serde_json::{Value, json};

    use super::{Figure, Machine, Report, Sample, Spread, WayReport};

    impl Report {
        /// The report as JSON: units are in the key names, samples in the order of the rounds.
        pub fn to_json(&self) -> Value {
            let ways: Vec<Value> = self.ways.iter().map(WayReport::to_json).collect();
            json!({ "rounds": self.rounds, "baseline": self.ways[self.baseline].name, "ways": ways })
        }
    }

    impl WayReport {
        fn to_json(&self) -> Value {
            let figures = self
                .figures
                .iter()
                .map(|figure| (figure.name.to_owned(), figure.to_json()));
            let samples: Vec<Value> = self.samples.iter().map(Sample::to_json).collect();
            json!({ "name": self.name, "figures": figures.collect::<serde_json::Map<_, _>>(), "samples": samples })
        }
    }

    impl Figure {
        fn to_json(&self) -> Value {
            json!({ "value": self.value.to_json(), "ratio_to_baseline": self.ratio.map(Spread::to_json) })
        }
    }

    impl Spread {
        /// The five numbers as JSON; the unit is in the key that it is put under.
        pub fn to_json(self) -> Value {
            json!({
                "min": self.min,
                "lower_quartile": self.lower_quartile,
                "median": self.median,
                "upper_quartile": self.upper_quartile,
                "max": self.max,
            })
        }
    }

    impl Sample {
        fn to_json(&self) -> Value {
            let mut told = json!({
                "packets": self.packets,
                "cpu_ns": self.cpu.as_nanos() as u64,
                "wall_ns": self.wall.as_nanos() as u64,
            });
            for (name, value) in &self.figures {
                told[*name] = json!(value);
            }
            told
        }
    }

    /// A histogram of nanoseconds as JSON: how many there are, and the usual quantiles.
    pub fn quantiles_json(histogram: &Histogram<u64>) -> Value {
        let at = |share| histogram.value_at_quantile(share);
        json!({
            "count": histogram.len(), "min_ns": histogram.min(), "p50_ns": at(0.5), "p90_ns": at(0.9), "p99_ns": at(0.99),
            "p99_9_ns": at(0.999), "p99_99_ns": at(0.9999), "max_ns": histogram.max(),
        })
    }

    impl Machine {
        /// The machine as JSON.
        pub fn to_json(&self) -> Value {
            json!({
                "cpu_model": self.cpu_model,
                "cpus": self.cpus,
                "kernel": self.kernel,
                "mitigations": self.mitigations,
                "virtual_machine": self.virtual_machine,
            })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(packets: u64, cpu_ns: u64, wall_ns: u64) -> Sample {
        Sample {
            packets,
            cpu: Duration::from_nanos(cpu_ns),
            wall: Duration::from_nanos(wall_ns),
            figures: vec![("calls", cpu_ns as f64 / 10.0)],
        }
    }

    #[test]
    fn quartiles_interpolate_between_neighbours() {
        let four = Spread::of(&[4.0, 1.0, 3.0, 2.0]).expect("four numbers");
        let expected = Spread {
            min: 1.0,
            lower_quartile: 1.75,
            median: 2.5,
            upper_quartile: 3.25,
            max: 4.0,
        };
        assert_eq!(four, expected, "R: quantile(1:4)");

        let nine = Spread::of(&[9.0, 8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0]).expect("nine numbers");
        let expected = Spread {
            min: 1.0,
            lower_quartile: 3.0,
            median: 5.0,
            upper_quartile: 7.0,
            max: 9.0,
        };
        assert_eq!(nine, expected, "quartiles that fall on a value are that value");

        let one = Spread::of(&[7.0]).expect("one number");
        assert_eq!(
            (one.min, one.lower_quartile, one.median, one.upper_quartile, one.max),
            (7.0, 7.0, 7.0, 7.0, 7.0)
        );
    }

    #[test]
    fn spread_of_nothing_or_of_no_number_is_none() {
        assert_eq!(Spread::of(&[]), None);
        assert_eq!(Spread::of(&[1.0, f64::NAN]), None);
        assert_eq!(Spread::of(&[1.0, f64::INFINITY]), None);
    }

    #[test]
    fn every_way_runs_in_every_place_and_once_per_round() {
        let mut turns = Vec::new();
        let plan = Plan {
            rounds: 3,
            warm_up: 1,
            ..Plan::default()
        };
        compare(&plan, &["a", "b", "c"], |turn| {
            turns.push((turn.round, turn.way, turn.done, turn.total));
            Ok(sample(1, 1, 1))
        })
        .expect("nothing fails");
        let ways: Vec<usize> = turns.iter().map(|turn| turn.1).collect();
        assert_eq!(
            ways,
            [0, 1, 2, 1, 2, 0, 2, 0, 1, 0, 1, 2],
            "four rounds, each starting one further"
        );
        assert_eq!(turns[0], (0, 0, 0, 12));
        assert_eq!(turns[11], (3, 2, 11, 12));
    }

    #[test]
    fn ratios_are_formed_inside_a_round() {
        // The machine slows down tenfold from round to round; the second way takes half of the first's time in every round.
        let plan = Plan {
            rounds: 3,
            warm_up: 1,
            ..Plan::default()
        };
        let report = compare(&plan, &["a", "b"], |turn| {
            let slow = 10_u64.pow(turn.round as u32);
            Ok(sample(10, if turn.way == 0 { 2000 } else { 1000 } * slow, 4000 * slow))
        })
        .expect("nothing fails");
        let (a, b) = (&report.ways[0], &report.ways[1]);
        assert_eq!(a.samples.len(), 3, "the warm-up round is gone");
        assert_eq!(
            a.figure(CPU_NS).map(|figure| figure.value.min),
            Some(2000.0),
            "round 1: 20,000 ns over 10 packets"
        );
        assert_eq!(a.figure(CPU_NS).map(|figure| figure.value.median), Some(20_000.0));
        assert_eq!(a.cpu_ratio(), None);
        let half = Spread {
            min: 0.5,
            lower_quartile: 0.5,
            median: 0.5,
            upper_quartile: 0.5,
            max: 0.5,
        };
        assert_eq!(b.cpu_ratio(), Some(half));
        assert_eq!(
            b.figure(WALL_NS)
                .and_then(|figure| figure.ratio)
                .map(|ratio| ratio.median),
            Some(1.0)
        );
        assert_eq!(b.figure("calls").and_then(|figure| figure.ratio), Some(half));
    }

    #[test]
    fn ratio_spread_differs_from_the_ratio_of_medians() {
        // Per round: 100/50, 100/100, 400/100; the median of ratios is 2 although the ratio of the medians is 1.
        let own = [100, 100, 400];
        let other = [50, 100, 100];
        let plan = Plan {
            rounds: 3,
            warm_up: 0,
            ..Plan::default()
        };
        let report = compare(&plan, &["base", "own"], |turn| {
            Ok(sample(
                1,
                if turn.way == 0 {
                    other[turn.round]
                } else {
                    own[turn.round]
                },
                1,
            ))
        })
        .expect("nothing fails");
        let ratio = report.ways[1].cpu_ratio().expect("not the baseline");
        assert_eq!(
            (
                ratio.min,
                ratio.lower_quartile,
                ratio.median,
                ratio.upper_quartile,
                ratio.max
            ),
            (1.0, 1.5, 2.0, 3.0, 4.0)
        );
    }

    #[test]
    fn baseline_runs_again_on_demand() {
        let plan = Plan {
            rounds: 2,
            warm_up: 0,
            baseline: 1,
            against_itself: true,
        };
        let mut ways = Vec::new();
        let report = compare(&plan, &["a", "b"], |turn| {
            ways.push(turn.way);
            Ok(sample(1, 100, 100))
        })
        .expect("nothing fails");
        assert_eq!(ways, [0, 1, 1, 1, 1, 0], "the third place runs the baseline");
        assert_eq!(report.ways[2].name, "b (again)");
        assert_eq!(report.ways[2].cpu_ratio().map(|ratio| ratio.median), Some(1.0));
        assert_eq!(report.ways[1].cpu_ratio(), None);
    }

    #[test]
    fn missing_or_zero_baseline_figures_give_no_ratio() {
        let plan = Plan {
            rounds: 1,
            warm_up: 0,
            ..Plan::default()
        };
        let report = compare(&plan, &["a", "b"], |turn| {
            let figures = if turn.way == 0 {
                vec![("none", 0.0)]
            } else {
                vec![("none", 3.0), ("own", 1.0)]
            };
            Ok(Sample {
                figures,
                ..sample(1, 1, 1)
            })
        })
        .expect("nothing fails");
        let own = report.ways[1].figure("own").expect("reported");
        assert_eq!((own.value.median, own.ratio), (1.0, None));
        assert_eq!(report.ways[1].figure("none").and_then(|figure| figure.ratio), None);
    }

    #[test]
    fn a_comparison_that_is_stopped_keeps_its_complete_rounds() {
        let stop_at = |stop: usize| {
            let plan = Plan {
                rounds: 5,
                warm_up: 1,
                ..Plan::default()
            };
            compare(&plan, &["a", "b"], |turn| {
                if turn.done == stop {
                    Err(Stopped.into())
                } else {
                    Ok(sample(1, 1, 1))
                }
            })
        };
        // Turns 0 and 1 are the warm-up.
        for (stop, rounds) in [(4, 1), (5, 1), (6, 2), (11, 4), (12, 5)] {
            let report = stop_at(stop).expect("a round is complete");
            let samples: Vec<usize> = report.ways.iter().map(|way| way.samples.len()).collect();
            assert_eq!(
                (report.rounds, samples),
                (rounds, vec![rounds; 2]),
                "stopped at turn {stop}"
            );
        }
        for stop in 0..4 {
            assert!(
                Stopped::is(&stop_at(stop).expect_err("no round is complete")),
                "turn {stop}"
            );
        }
    }

    #[test]
    fn nonsense_is_refused() {
        let run =
            |sample: Sample| compare(&Plan::quick(), &["a"], |_| Ok(sample.clone())).map_err(|error| error.kind());
        assert_eq!(
            run(Sample::default()).err(),
            Some(io::ErrorKind::InvalidData),
            "no packets"
        );
        let unlucky = Sample {
            figures: vec![("x", f64::NAN)],
            ..sample(1, 1, 1)
        };
        assert_eq!(run(unlucky).err(), Some(io::ErrorKind::InvalidData), "no number");
        let plan = Plan {
            baseline: 1,
            ..Plan::quick()
        };
        let kind = compare(&plan, &["a"], |_| Ok(sample(1, 1, 1)))
            .map_err(|error| error.kind())
            .err();
        assert_eq!(kind, Some(io::ErrorKind::InvalidInput), "no such baseline");
        let failed =
            compare(&Plan::quick(), &["a"], |_| Err(io::Error::other("broken"))).map_err(|error| error.to_string());
        assert_eq!(
            failed.err().as_deref(),
            Some("broken"),
            "the way's own error comes through"
        );
    }

    #[test]
    fn clock_counts_work_of_this_thread() {
        let clock = Clock::start();
        let mut sum = 0_u64;
        while clock.elapsed().cpu < Duration::from_millis(1) {
            sum = std::hint::black_box(sum + 1);
        }
        let elapsed = clock.elapsed();
        assert!(elapsed.cpu >= Duration::from_millis(1));
        assert!(
            elapsed.wall >= Duration::from_millis(1),
            "CPU time of one thread cannot pass faster than time itself"
        );
    }
}
