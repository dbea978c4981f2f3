//! `tun-driver bench`: the measurements, one after the other.

use std::io::{self, IsTerminal, Write};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant, SystemTime};

use clap::{Args, ValueEnum};
use hdrhistogram::Histogram;
use indicatif::{ProgressBar, ProgressStyle};
use tun_driver::lab::Sandbox;
use tun_driver::lab::acts;
use tun_driver::lab::cases::{self, Load, Way};
use tun_driver::lab::measure::{Machine, Plan, Report, Stopped, Turn};
use tun_driver::lab::offered::{self, Offer, RATES};
use tun_driver::lab::offload_cases::{self, Load64K, Traffic};
use tun_driver::lab::results::{Acts, Curve, Scaling};
use tun_driver::lab::scaling::{self, Stretch};
use tun_driver::lab::ways::{ByWorker, IfaceLoop, PollLoop};
use tun_driver::{Backend, Support, Wait, Worker, WorkerConfig};

use crate::doctor::need_node;
use crate::{DEBUG_BUILD, Failure, report, results_folder, shown, until_interrupted, warn_of_debug_build};

#[derive(Args)]
pub(crate) struct Options {
    /// Three rounds instead of twenty: ends within half a minute, shows that everything works, and is not to be cited.
    #[arg(long)]
    quick: bool,
    /// Rounds that count, after one of warm-up. In each, every way has one turn.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=10_000))]
    rounds: Option<u32>,
    /// Only these measurements.
    #[arg(long, value_enum, value_delimiter = ',', value_name = "CASE,…")]
    only: Vec<Case>,
    /// The folder for report.html, report.md, bench.json and the histograms.
    #[arg(long, value_name = "DIR", default_value = "results")]
    out: PathBuf,
    /// Print the JSON on standard output instead of the table.
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Case {
    /// Receive: a filled queue is emptied.
    Drain,
    /// Send: packets are written to a device behind which they are dropped.
    Sink,
    /// Forward: packets go through the kernel from one device to another.
    Forward,
    /// Superpackets: TCP of 64 KiB through the kernel, beside plain packets.
    Superpackets,
    /// Round trip of single packets.
    RoundTrip,
    /// Rates: packets come at set rates, and each way waits for them in its manner.
    Rates,
    /// Scaling: several queues are emptied by one worker and by several.
    Scaling,
    /// Acts: how long it takes to reach a worker and to stop an engine.
    Acts,
}

impl Case {
    /// How many measurements it consists of, each with a line of progress.
    fn parts(self) -> usize {
        match self {
            Case::Drain | Case::Sink | Case::Forward => SIZES.len(),
            Case::Superpackets | Case::RoundTrip | Case::Rates | Case::Scaling | Case::Acts => 1,
        }
    }
}

/// What one case gave.
pub(crate) struct Outcome {
    pub(crate) title: String,
    /// What the sink was, and the like.
    pub(crate) note: Option<&'static str>,
    pub(crate) report: Report,
    /// For round trips: per way, all trips in nanoseconds.
    pub(crate) histograms: Vec<Histogram<u64>>,
    /// Name for machines.
    pub(crate) key: &'static str,
    pub(crate) packet_len: Option<usize>,
}

/// All that a run found out.
pub(crate) struct Results {
    pub(crate) machine: Machine,
    /// The command line, for who wants to repeat it.
    pub(crate) command: String,
    pub(crate) began: SystemTime,
    pub(crate) quick: bool,
    /// The program was built without optimisation.
    pub(crate) debug_build: bool,
    pub(crate) rounds: usize,
    pub(crate) rootless: bool,
    pub(crate) seconds: f64,
    /// Why measurements are missing or rest on fewer rounds: the run was interrupted, or one of
    /// them failed.
    pub(crate) incomplete: Option<String>,
    /// Ways that could not run here, with the reason.
    pub(crate) missing: Vec<String>,
    pub(crate) outcomes: Vec<Outcome>,
    /// Behaviour over offered rates.
    pub(crate) curves: Vec<Curve>,
    /// Throughput over queues and workers.
    pub(crate) scalings: Vec<Scaling>,
    /// How long stopping, waking and the like take.
    pub(crate) acts: Vec<Acts>,
}

/// Packet lengths of the cases that move packets.
const SIZES: [usize; 2] = [64, 1400];

/// How long the spinning worker watches before it sleeps.
const SPIN: Duration = Duration::from_micros(100);

pub(crate) fn run(options: &Options) -> Result<(), Failure> {
    let support = Support::probe();
    need_node(&support)?;
    let machine = Machine::read();
    // Before any thread is started: without root, the whole process moves.
    let sandbox = Sandbox::enter().map_err(|error| Failure::Lacking(format!("no network namespace: {error}")))?;
    // The results' folder is made first, so that a run does not end with nowhere to write.
    results_folder(&options.out)?;
    warn_of_debug_build();
    let start = Instant::now();
    // After the sandbox: the handler is a thread.
    let stop = until_interrupted()?;
    let mut results = empty(options, &sandbox, machine);
    let outcome = measure(options, &sandbox, &mut results, stop);
    results.seconds = start.elapsed().as_secs_f64();
    if let Err(Failure::Interrupted(why) | Failure::Failed(why)) = &outcome {
        results.incomplete = Some(why.clone());
    }

    let object = report::json(&results);
    let mut out = io::stdout().lock();
    // First: a disk may be full, and what was measured is seen all the same.
    let seen = shown(match options.json {
        true => writeln!(out, "{object:#}"),
        false => write!(out, "{}", report::text(&results)),
    });
    report::write_files(&options.out, &results, &object)?;
    seen?;
    if !options.json {
        shown(writeln!(
            out,
            "\nwritten to {}: {}",
            options.out.display(),
            report::FILES
        ))?;
    }
    outcome?;
    // Written as "NOT KEPT"; where the machine was too busy to judge, the report says that.
    let acts = results.acts.iter().flat_map(|acts| &acts.rows);
    let missed: Vec<String> = acts
        .filter(|act| act.kept() == Some(false))
        .map(|act| format!("“{}” took longer than promised", act.name))
        .collect();
    match missed.is_empty() {
        true => Ok(()),
        false => Err(Failure::Missed(missed.join(", "))),
    }
}

/// Results in which nothing is measured yet.
fn empty(options: &Options, sandbox: &Sandbox, machine: Machine) -> Results {
    let default_rounds = if options.quick { Plan::quick().rounds } else { 20 };
    Results {
        machine,
        command: command(),
        began: SystemTime::now(),
        quick: options.quick,
        debug_build: DEBUG_BUILD,
        rounds: options.rounds.map_or(default_rounds, |rounds| rounds as usize),
        rootless: sandbox.is_rootless(),
        seconds: 0.0,
        incomplete: None,
        missing: vec![],
        outcomes: vec![],
        curves: vec![],
        scalings: vec![],
        acts: vec![],
    }
}

/// Measures one case after the other, and adds each to the results as soon as it is there.
fn measure(options: &Options, sandbox: &Sandbox, results: &mut Results, stop: &AtomicBool) -> Result<(), Failure> {
    let plan = Plan {
        rounds: results.rounds,
        ..Plan::default()
    };
    let (backends, missing) = backends();
    results.missing = missing;
    let wanted = |case: &Case| options.only.is_empty() || options.only.contains(case);
    let parts = Case::value_variants()
        .iter()
        .filter(|case| wanted(case))
        .map(|case| case.parts());
    let mut course = Course {
        number: 0,
        count: parts.sum(),
        stop,
        cut: None,
    };

    let mut moving: Vec<Box<dyn Way>> = vec![Box::new(IfaceLoop { nonblocking: true })];
    let mut waiting: Vec<Box<dyn Way>> = vec![Box::new(IfaceLoop { nonblocking: false })];
    for &backend in &backends {
        moving.push(Box::new(ByWorker::new(backend, Wait::Block)));
        waiting.push(Box::new(ByWorker::new(backend, Wait::Block)));
        waiting.push(Box::new(ByWorker::new(backend, Wait::Spin { duration: SPIN })));
    }
    let moving: Vec<&dyn Way> = moving.iter().map(|way| &**way).collect();
    let waiting: Vec<&dyn Way> = waiting.iter().map(|way| &**way).collect();

    if wanted(&Case::Drain) {
        for packet_len in SIZES {
            let title = format!("receive, {packet_len} B: a queue of 256 packets is emptied");
            let report = course.case(&title, |progress| {
                cases::drain(sandbox, &moving, Load::of(packet_len), &plan, progress)
            })?;
            results
                .outcomes
                .push(Outcome::of("drain", title, report, Some(packet_len)));
        }
    }
    if wanted(&Case::Sink) {
        for packet_len in SIZES {
            let title = format!("send, {packet_len} B: dropped right behind the device");
            let (report, sink) = course.case(&title, |progress| {
                cases::sink(sandbox, &moving, Load::of(packet_len), &plan, progress)
            })?;
            results.outcomes.push(Outcome {
                note: Some(sink),
                ..Outcome::of("sink", title, report, Some(packet_len))
            });
        }
    }
    if wanted(&Case::Forward) {
        for packet_len in SIZES {
            let title = format!("forward, {packet_len} B: written to one device, read from another, by one thread");
            let load = Load::forwarding(packet_len);
            let report = course.case(&title, |progress| {
                cases::forward(sandbox, &moving, load, &plan, progress)
            })?;
            results
                .outcomes
                .push(Outcome::of("forward", title, report, Some(packet_len)));
        }
    }
    if wanted(&Case::Superpackets) {
        superpackets(sandbox, &backends, &plan, &mut course, results)?;
    }
    if wanted(&Case::RoundTrip) {
        let title = "round trip of one small packet at a time".to_owned();
        let trips = course.case(&title, |progress| {
            cases::round_trip(sandbox, &waiting, 1_000, &plan, progress)
        })?;
        let outcome = Outcome::of("round_trip", title, trips.report, None);
        results.outcomes.push(Outcome {
            histograms: trips.histograms,
            ..outcome
        });
    }
    if wanted(&Case::Rates) {
        results
            .curves
            .push(rates(options, sandbox, &backends, &plan, &mut course)?);
    }
    if wanted(&Case::Scaling) {
        let stretch = Stretch::default();
        let (found, beside) = course.case("several queues are emptied at once", |progress| {
            scaling::scaling(sandbox, stretch, &plan, progress)
        })?;
        results.scalings.push(found);
        let title = "an engine beside a bare worker loop".to_owned();
        results
            .outcomes
            .push(Outcome::of("engine", title, beside, Some(stretch.packet_len)));
    }
    if wanted(&Case::Acts) {
        let (wakes, stops) = if options.quick { (100, 5) } else { (1_000, 30) };
        results
            .acts
            .push(course.case("reach a worker, stop an engine", |_| acts::acts(sandbox, wakes, stops))?);
    }
    course.end()
}

/// TCP in one direction, in superpackets and in plain packets.
fn superpackets(
    sandbox: &Sandbox,
    backends: &[Backend],
    plan: &Plan,
    course: &mut Course<'_>,
    results: &mut Results,
) -> Result<(), Failure> {
    let title =
        "superpackets, TCP, 65,000 B of payload: written to one device, read from another, by one thread".to_owned();
    let movers = offload_cases::movers(Traffic::Tcp, backends);
    let report = course.case(&title, |progress| {
        offload_cases::superpackets(sandbox, Traffic::Tcp, &movers, Load64K::default(), plan, progress)
    })?;
    results.outcomes.push(Outcome::of("superpackets", title, report, None));
    Ok(())
}

/// Middling load at set rates.
fn rates(
    options: &Options,
    sandbox: &Sandbox,
    backends: &[Backend],
    plan: &Plan,
    course: &mut Course<'_>,
) -> Result<Curve, Failure> {
    let mut ways: Vec<Box<dyn Way>> = vec![Box::new(PollLoop)];
    for &backend in backends {
        ways.push(Box::new(ByWorker::new(backend, Wait::Block)));
        ways.push(Box::new(ByWorker::new(backend, Wait::default())));
        if backend == Backend::IoUring {
            ways.push(Box::new(ByWorker::new(backend, Wait::Spin { duration: SPIN })));
        }
    }
    let ways: Vec<&dyn Way> = ways.iter().map(|way| &**way).collect();
    // The default of the better backend.
    let chosen = 2.min(ways.len() - 1);
    let offer = Offer {
        time: Duration::from_millis(150),
        ..Offer::at(None)
    };
    let few = [Some(50_000), Some(200_000), None];
    let rates: &[Option<u64>] = if options.quick { &few } else { &RATES };
    course.case("packets come at set rates", |progress| {
        offered::curve(sandbox, &ways, chosen, rates, offer, plan, progress)
    })
}

impl Outcome {
    fn of(key: &'static str, title: String, report: Report, packet_len: Option<usize>) -> Self {
        Self {
            title,
            note: None,
            report,
            histograms: Vec::new(),
            key,
            packet_len,
        }
    }
}

/// As it was typed, without the path of the program. Bytes that are no UTF-8 are replaced.
pub(crate) fn command() -> String {
    let arguments = std::env::args_os()
        .skip(1)
        .map(|word| word.to_string_lossy().into_owned());
    std::iter::once("tun-driver".to_owned())
        .chain(arguments)
        .collect::<Vec<_>>()
        .join(" ")
}

/// The backends that this host has, and why not the others.
fn backends() -> (Vec<Backend>, Vec<String>) {
    let (mut usable, mut missing) = (Vec::new(), Vec::new());
    let no_ring = Support::probe().tun_nowait == Some(false);
    for backend in [Backend::IoUring, Backend::Syscalls] {
        if backend == Backend::IoUring && no_ring {
            missing.push("IoUring is not measured: it drives devices from Linux 6.4 on".to_owned());
            continue;
        }
        match Worker::new(&WorkerConfig {
            backend: Some(backend),
            ..WorkerConfig::default()
        }) {
            Ok(_) => usable.push(backend),
            Err(error) => missing.push(format!("{backend:?} is not measured: {error}")),
        }
    }
    (usable, missing)
}

/// Where a run is: it says so on standard error, and ends early when it is interrupted.
struct Course<'a> {
    /// Of the case that is measured, from 1.
    number: usize,
    count: usize,
    stop: &'a AtomicBool,
    /// Where it was interrupted, with the number of that case.
    cut: Option<String>,
}

impl Course<'_> {
    /// Measures a case. On a terminal a bar shows how far it is; elsewhere a line says that it
    /// begins.
    fn case<T>(
        &mut self,
        title: &str,
        case: impl FnOnce(&mut (dyn FnMut(Turn) -> io::Result<()> + Send)) -> io::Result<T>,
    ) -> Result<T, Failure> {
        self.number += 1;
        if self.stop.load(Ordering::Relaxed) {
            let (number, count) = (self.number, self.count);
            self.cut
                .get_or_insert_with(|| format!("before “{title}”, case {number} of {count}"));
        }
        self.end()?;
        let bar = if io::stderr().is_terminal() {
            ProgressBar::new(0)
        } else {
            eprintln!("{} of {}: {title}", self.number, self.count);
            ProgressBar::hidden()
        };
        // A template that is not understood leaves the usual bar.
        if let Ok(style) = ProgressStyle::with_template("{msg} {wide_bar} {pos}/{len}") {
            bar.set_style(style);
        }
        bar.set_message(format!("{} of {}: {title}", self.number, self.count));
        let mut stopped = false;
        let result = case(&mut |turn: Turn| {
            if self.stop.load(Ordering::Relaxed) {
                stopped = true;
                return Err(Stopped.into());
            }
            bar.set_length(turn.total as u64);
            bar.set_position(turn.done as u64);
            Ok(())
        });
        bar.finish_and_clear();
        if stopped {
            self.cut = Some(format!("in “{title}”, case {} of {}", self.number, self.count));
        }
        match result {
            Err(error) if Stopped::is(&error) => {
                self.end()?;
                Err(Failure::Interrupted(format!("interrupted in “{title}”")))
            }
            result => result.map_err(|error| Failure::Failed(format!("{title}: {error}"))),
        }
    }

    /// Fails if it was interrupted.
    fn end(&self) -> Result<(), Failure> {
        match &self.cut {
            Some(place) => Err(Failure::Interrupted(format!("interrupted {place}"))),
            None => Ok(()),
        }
    }
}
