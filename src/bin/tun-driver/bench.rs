//! `tun-driver bench`: the measurements, one after the other.

use std::fs;
use std::io::{self, IsTerminal, Write};
use std::path::PathBuf;
use std::time::{Duration, Instant, SystemTime};

use clap::{Args, ValueEnum};
use hdrhistogram::Histogram;
use indicatif::{ProgressBar, ProgressStyle};
use tun_driver::lab::Sandbox;
use tun_driver::lab::acts;
use tun_driver::lab::cases::{self, Load, Way};
use tun_driver::lab::measure::{Machine, Plan, Report, Turn};
use tun_driver::lab::offered::{self, Offer, RATES};
use tun_driver::lab::offload_cases::{self, Load64K, Traffic};
use tun_driver::lab::results::{Acts, Curve, Scaling};
use tun_driver::lab::scaling::{self, Stretch};
use tun_driver::lab::ways::{ByWorker, IfaceLoop, PollLoop};
use tun_driver::{Backend, Support, TunNode, Wait, Worker, WorkerConfig};

use crate::{Failure, report};

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
    pub(crate) rounds: usize,
    pub(crate) rootless: bool,
    pub(crate) seconds: f64,
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

/// How long the spinning worker watches before it sleeps.
const SPIN: Duration = Duration::from_micros(100);

pub(crate) fn run(options: &Options) -> Result<(), Failure> {
    let support = Support::probe();
    if support.tun_node != TunNode::Opens {
        return Err(Failure::Lacking("/dev/net/tun cannot be opened".to_owned()));
    }
    let machine = Machine::read();
    // Before any thread is started: without root, the whole process moves.
    let sandbox = Sandbox::enter().map_err(|error| Failure::Lacking(format!("no network namespace: {error}")))?;
    // The results' folder is made first, so that a run does not end with nowhere to write.
    fs::create_dir_all(&options.out).map_err(|error| Failure::Failed(format!("{}: {error}", options.out.display())))?;
    let start = Instant::now();
    let mut results = measure(options, &sandbox, machine)?;
    results.seconds = start.elapsed().as_secs_f64();

    let object = report::json(&results);
    report::write_files(&options.out, &results, &object)?;
    let mut out = io::stdout().lock();
    if options.json {
        writeln!(out, "{object:#}")?;
    } else {
        write!(out, "{}", report::text(&results))?;
        writeln!(out, "\nwritten to {}: {}", options.out.display(), report::FILES)?;
    }
    Ok(())
}

fn measure(options: &Options, sandbox: &Sandbox, machine: Machine) -> Result<Results, Failure> {
    let default_rounds = if options.quick { Plan::quick().rounds } else { 20 };
    let rounds = options.rounds.map_or(default_rounds, |rounds| rounds as usize);
    let plan = Plan {
        rounds,
        ..Plan::default()
    };
    let (backends, missing) = backends();
    let mut results = Results {
        machine,
        command: command(),
        began: SystemTime::now(),
        quick: options.quick,
        rounds,
        rootless: sandbox.is_rootless(),
        seconds: 0.0,
        missing,
        outcomes: vec![],
        curves: vec![],
        scalings: vec![],
        acts: vec![],
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

    let wanted = |case| options.only.is_empty() || options.only.contains(&case);
    let sizes = [64, 1400];
    if wanted(Case::Drain) {
        for packet_len in sizes {
            let title = format!("receive, {packet_len} B: a queue of 256 packets is emptied");
            let report = with_progress(&title, |progress| {
                cases::drain(sandbox, &moving, Load::of(packet_len), &plan, progress)
            })?;
            results
                .outcomes
                .push(Outcome::of("drain", title, report, Some(packet_len)));
        }
    }
    if wanted(Case::Sink) {
        for packet_len in sizes {
            let title = format!("send, {packet_len} B: dropped right behind the device");
            let (report, sink) = with_progress(&title, |progress| {
                cases::sink(sandbox, &moving, Load::of(packet_len), &plan, progress)
            })?;
            results.outcomes.push(Outcome {
                note: Some(sink),
                ..Outcome::of("sink", title, report, Some(packet_len))
            });
        }
    }
    if wanted(Case::Forward) {
        for packet_len in sizes {
            let title = format!("forward, {packet_len} B: written to one device, read from another, by one thread");
            let load = Load::forwarding(packet_len);
            let report = with_progress(&title, |progress| {
                cases::forward(sandbox, &moving, load, &plan, progress)
            })?;
            results
                .outcomes
                .push(Outcome::of("forward", title, report, Some(packet_len)));
        }
    }
    if wanted(Case::Superpackets) {
        superpackets(sandbox, &backends, &plan, &mut results)?;
    }
    if wanted(Case::RoundTrip) {
        let title = "round trip of one small packet at a time".to_owned();
        let trips = with_progress(&title, |progress| {
            cases::round_trip(sandbox, &waiting, 1_000, &plan, progress)
        })?;
        let outcome = Outcome::of("round_trip", title, trips.report, None);
        results.outcomes.push(Outcome {
            histograms: trips.histograms,
            ..outcome
        });
    }
    if wanted(Case::Rates) {
        results.curves.push(rates(options, sandbox, &backends, &plan)?);
    }
    if wanted(Case::Scaling) {
        let stretch = Stretch::default();
        let (found, beside) = with_progress("several queues are emptied at once", |progress| {
            scaling::scaling(sandbox, stretch, &plan, progress)
        })?;
        results.scalings.push(found);
        let title = "an engine beside a bare worker loop".to_owned();
        results
            .outcomes
            .push(Outcome::of("engine", title, beside, Some(stretch.packet_len)));
    }
    if wanted(Case::Acts) {
        let (wakes, stops) = if options.quick { (100, 5) } else { (1_000, 30) };
        results.acts.push(with_progress("reach a worker, stop an engine", |_| {
            acts::acts(sandbox, wakes, stops)
        })?);
    }
    Ok(results)
}

/// TCP in one direction, in superpackets and in plain packets.
fn superpackets(sandbox: &Sandbox, backends: &[Backend], plan: &Plan, results: &mut Results) -> Result<(), Failure> {
    let title =
        "superpackets, TCP, 65,000 B of payload: written to one device, read from another, by one thread".to_owned();
    let movers = offload_cases::movers(Traffic::Tcp, backends);
    let report = with_progress(&title, |progress| {
        offload_cases::superpackets(sandbox, Traffic::Tcp, &movers, Load64K::default(), plan, progress)
    })?;
    results.outcomes.push(Outcome::of("superpackets", title, report, None));
    Ok(())
}

/// Middling load at set rates.
fn rates(options: &Options, sandbox: &Sandbox, backends: &[Backend], plan: &Plan) -> Result<Curve, Failure> {
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
    with_progress("packets come at set rates", |progress| {
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

/// As it was typed, without the path of the program.
fn command() -> String {
    let arguments = std::env::args().skip(1);
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

/// Shows on standard error how far a case is, if that is a terminal.
fn with_progress<T>(
    title: &str,
    case: impl FnOnce(&mut (dyn FnMut(Turn) + Send)) -> io::Result<T>,
) -> Result<T, Failure> {
    let bar = if io::stderr().is_terminal() {
        ProgressBar::new(0)
    } else {
        ProgressBar::hidden()
    };
    // A template that is not understood leaves the usual bar.
    if let Ok(style) = ProgressStyle::with_template("{msg} {wide_bar} {pos}/{len}") {
        bar.set_style(style);
    }
    bar.set_message(title.to_owned());
    let result = case(&mut |turn: Turn| {
        bar.set_length(turn.total as u64);
        bar.set_position(turn.done as u64);
    });
    bar.finish_and_clear();
    result.map_err(|error| Failure::Failed(format!("{title}: {error}")))
}
