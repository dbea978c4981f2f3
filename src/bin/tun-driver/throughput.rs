//! `tun-driver throughput`: what an engine forwards without loss, and how long packets take, over links that the caller has made.

use std::io::{self, IsTerminal, Write};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant, SystemTime};

use clap::{ArgAction, Args, ValueEnum};
use tun_driver::lab::Namespace;
use tun_driver::lab::measure::{Machine, Spread};
use tun_driver::lab::packet::Ethernet;
use tun_driver::lab::process::die_with_parent;
use tun_driver::lab::throughput::search::{Bounds, Outcome, Search, Settings};
use tun_driver::lab::throughput::{Layout, Load, Measured, Mode, Rig, Setup, Size, Source, pktgen};
use tun_driver::netlink::Handle;
use tun_driver::{Backend, Support, Wait, WorkerConfig};

use crate::doctor::need_node;
use crate::{Failure, positive, report, results_folder, seconds, shown, until_interrupted, warn_of_debug_build};

#[derive(Args)]
pub(crate) struct Options {
    /// How packets get from the link to the engine: TAP in a bridge, or TUN behind a route.
    #[arg(long, value_enum, default_value = "route")]
    topology: Topology,
    /// What the engine does; several are measured one after the other.
    #[arg(
        long,
        value_delimiter = ',',
        value_name = "MODE,…",
        default_value = "recv-many,send-many,echo"
    )]
    mode: Vec<Mode>,
    /// How the engine talks to the kernel; the best that there is unless given.
    #[arg(long, value_enum)]
    backend: Option<BackendName>,
    /// Whether the engine's devices have all offloads that the kernel grants.
    #[arg(long, value_enum, default_value = "off")]
    offloads: Switch,
    /// Queues, each with a worker of its own.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=256))]
    queues: u16,
    /// Flows, told apart by their source ports.
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..=40_000))]
    flows: u32,
    /// Bytes of each frame with its frame check sequence, 64 to 1518, or imix.
    #[arg(long, value_delimiter = ',', value_name = "BYTES,…", default_value = "64,1518")]
    sizes: Vec<Size>,
    /// Packets per second, such as 200000, 200k or 1.5M, instead of a search.
    #[arg(long, value_name = "N", value_parser = positive)]
    rate: Option<u64>,
    /// Packets of each trial, instead of a time and a search.
    #[arg(long, value_name = "N", value_parser = positive)]
    count: Option<u64>,
    /// The highest rate without loss (ndr), and with no more than half a per cent (pdr); none measures the maximum only.
    #[arg(
        long,
        value_enum,
        value_delimiter = ',',
        value_name = "GOAL,…",
        default_value = "ndr,pdr"
    )]
    search: Vec<Goal>,
    /// Length of the trials that decide, in seconds.
    #[arg(long, value_name = "SECONDS", default_value = "1", value_parser = seconds)]
    duration: Duration,
    /// Searches, each from the beginning.
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=1_000))]
    repeat: u32,
    /// Latency at 10, 50 and 90 % of the rate that was found, in each manner of waiting.
    #[arg(long, value_name = "BOOL", default_value_t = true, action = ArgAction::Set)]
    latency: bool,
    /// Who makes the packets: the kernel's pktgen where it is to be had, else our own generator.
    #[arg(long = "gen", value_enum, default_value = "auto")]
    generator: GeneratorName,
    /// Threads of pktgen.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=1_024))]
    threads: u16,
    /// The generator's CPU; the first thread's, for pktgen.
    #[arg(long, value_name = "CPU", default_value_t = 0)]
    first_thread: u16,
    /// Keep what pktgen is configured to do already.
    #[arg(long)]
    append: bool,
    /// Let pktgen finish UDP checksums.
    #[arg(long)]
    udp_checksum: bool,
    /// Verify the checksum of each packet that is received.
    #[arg(long, value_name = "BOOL", default_value_t = true, action = ArgAction::Set)]
    verify: bool,
    /// The namespace of the generator's link.
    #[arg(long, value_name = "PATH", default_value = "/run/netns/gen")]
    gen_netns: PathBuf,
    /// The namespace of the second device, for the mode forward.
    #[arg(long, value_name = "PATH", default_value = "/run/netns/out")]
    out_netns: PathBuf,
    /// The namespace of the receiver's link, for the mode forward.
    #[arg(long, value_name = "PATH", default_value = "/run/netns/sink")]
    sink_netns: PathBuf,
    /// The generator's link.
    #[arg(long, value_name = "NAME", default_value = "gen0")]
    interface: String,
    /// Source address, and source port of the first flow.
    #[arg(long, value_name = "ADDRESS:PORT", default_value = "198.18.0.2:20000")]
    source: SocketAddr,
    /// Target address and port.
    #[arg(long, value_name = "ADDRESS:PORT", default_value = "198.19.0.2:9")]
    target: SocketAddr,
    /// The hardware address that frames come from.
    #[arg(long, value_name = "MAC", default_value = "02:00:00:00:00:02", value_parser = mac)]
    source_mac: [u8; 6],
    /// The hardware address that frames go to.
    #[arg(long, value_name = "MAC", default_value = "02:00:00:00:00:01", value_parser = mac)]
    target_mac: [u8; 6],
    /// The folder for the report, the JSON and the histograms.
    #[arg(long, value_name = "DIR", default_value = "results")]
    out: PathBuf,
    /// What the report gives as the command that was run.
    #[arg(long, value_name = "TEXT", hide = true)]
    command: Option<String>,
    /// The commit of the sources, for the report.
    #[arg(long, value_name = "TEXT", hide = true)]
    commit: Option<String>,
    /// End when this process, which started this one, ends.
    #[arg(long, value_name = "PID", hide = true)]
    parent: Option<u32>,
    /// Print the JSON on standard output instead of the table.
    #[arg(long)]
    json: bool,
    /// Tell of each trial.
    #[arg(long, short)]
    verbose: bool,
    /// Print what pktgen would be told, and do nothing.
    #[arg(long)]
    dry_run: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Topology {
    Bridge,
    Route,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Switch {
    On,
    Off,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum BackendName {
    #[value(name = "io_uring")]
    IoUring,
    Syscalls,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Goal {
    Ndr,
    Pdr,
    None,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum GeneratorName {
    Auto,
    Pktgen,
    Builtin,
}

/// All that a run found out.
pub(crate) struct Results {
    pub(crate) machine: Machine,
    pub(crate) command: String,
    /// Of the sources, `-dirty` where they differ from it; none outside a repository.
    pub(crate) commit: Option<String>,
    pub(crate) began: SystemTime,
    pub(crate) seconds: f64,
    pub(crate) topology: &'static str,
    /// Who made the packets, and why not pktgen if that was to be taken.
    pub(crate) generator: String,
    pub(crate) backend: String,
    /// Whether the devices were opened with all offloads.
    pub(crate) offloads: bool,
    pub(crate) queues: usize,
    pub(crate) flows: usize,
    pub(crate) repeats: usize,
    pub(crate) trial: Duration,
    /// Why it ended before all was measured, if it did.
    pub(crate) incomplete: Option<String>,
    pub(crate) rows: Vec<Row>,
    pub(crate) latencies: Vec<Latency>,
    pub(crate) trials: usize,
    /// Over all trials, also those that only narrowed a search.
    pub(crate) offered: u64,
    pub(crate) unexplained: u64,
    pub(crate) wrong: u64,
}

/// One rate of one mode with frames of one size.
pub(crate) struct Row {
    pub(crate) mode: Mode,
    pub(crate) size: Size,
    /// `MRR`, `NDR`, `PDR` or `fixed`.
    pub(crate) what: &'static str,
    /// Packets received per second, over the repeats: for a search, the lower bounds. None if no
    /// search found one.
    pub(crate) rate: Option<Spread>,
    /// The upper bounds of searches.
    pub(crate) upper: Option<Spread>,
    /// Searches that found no rate.
    pub(crate) none_found: usize,
    pub(crate) generator_bound: bool,
    /// Whether each repeat was made, and each search came to its end.
    pub(crate) complete: bool,
    /// Whether that is because the run ended.
    pub(crate) cut_short: bool,
    /// A trial at that rate.
    pub(crate) measured: Option<Measured>,
}

/// Latency at one load in one manner of waiting.
pub(crate) struct Latency {
    pub(crate) mode: Mode,
    pub(crate) size: Size,
    pub(crate) wait: &'static str,
    /// Per cent of the rate that was found.
    pub(crate) share: u32,
    /// Whether the trial lasted as long as it was to.
    pub(crate) complete: bool,
    pub(crate) measured: Measured,
}

/// How the latency runs wait.
const WAITS: [(&str, Wait); 3] = [
    ("block", Wait::Block),
    (
        "moderate",
        Wait::Moderate {
            max: Duration::from_micros(50),
        },
    ),
    (
        "spin",
        Wait::Spin {
            duration: Duration::from_micros(100),
        },
    ),
];

/// A search that took longer than so many of its long trials ends with what it has. On a quiet
/// machine it takes eight or so; one that always loses packets by chance takes many.
const PATIENCE: u32 = 100;

/// The bounds of a search are this near: searches of one machine differ by more.
const RESOLUTION: f64 = 0.01;

/// Loads of the latency runs, in per cent of the rate that was found.
const SHARES: [u32; 3] = [10, 50, 90];

pub(crate) fn run(options: &Options) -> Result<(), Failure> {
    let began = SystemTime::now();
    let start = Instant::now();
    if let Some(parent) = options.parent {
        die_with_parent(parent).map_err(|error| Failure::Failed(format!("--parent {parent}: {error}")))?;
    }
    let layout = layout(options)?;
    if options.dry_run {
        return dry_run(options, &layout);
    }
    need_node(&Support::probe())?;
    let source = check(options, &layout)?;
    results_folder(&options.out)?;
    warn_of_debug_build();
    let stop = until_interrupted()?;
    let mut run = Run {
        options,
        layout,
        source: source.0,
        stop,
        results: Results {
            machine: Machine::read(),
            command: options.command.clone().unwrap_or_else(crate::bench::command),
            commit: options.commit.clone(),
            began,
            seconds: 0.0,
            topology: match options.topology {
                Topology::Bridge => "bridge, TAP",
                Topology::Route => "route, TUN",
            },
            generator: source.1,
            backend: match options.backend {
                None => "the best that there is".to_owned(),
                Some(BackendName::IoUring) => "io_uring".to_owned(),
                Some(BackendName::Syscalls) => "system calls".to_owned(),
            },
            offloads: options.offloads == Switch::On,
            queues: options.queues.into(),
            flows: options.flows as usize,
            repeats: options.repeat as usize,
            trial: options.duration,
            incomplete: None,
            rows: Vec::new(),
            latencies: Vec::new(),
            trials: 0,
            offered: 0,
            unexplained: 0,
            wrong: 0,
        },
    };
    eprintln!("generator: {}", run.results.generator);
    let outcome = options.mode.iter().try_for_each(|&mode| run.mode(mode));
    let mut results = run.results;
    results.seconds = start.elapsed().as_secs_f64();
    results.incomplete = match &outcome {
        Err(Failure::Failed(why)) => Some(why.clone()),
        _ => stop.load(Ordering::Relaxed).then(|| "interrupted".to_owned()),
    };
    // A run that fails at once has nothing to report, and leaves an earlier report as it is.
    if results.trials == 0 && outcome.is_err() {
        return outcome;
    }
    let object = report::throughput::json(&results);
    let mut out = io::stdout().lock();
    // First: a disk may be full, and what was measured is seen all the same.
    let seen = shown(match options.json {
        true => writeln!(out, "{object:#}"),
        false => write!(out, "{}", report::throughput::text(&results)),
    });
    report::throughput::write_files(&options.out, &results, &object)?;
    seen?;
    if !options.json {
        shown(writeln!(out, "\nwritten to {}", options.out.display()))?;
    }
    outcome?;
    if results.incomplete.is_some() {
        return Err(Failure::Interrupted("interrupted".to_owned()));
    }
    let (unexplained, wrong) = (results.unexplained, results.wrong);
    if unexplained != 0 || wrong != 0 {
        return Err(Failure::Failed(format!(
            "the books do not balance: {unexplained} packets are unexplained, {wrong} came late, twice or damaged"
        )));
    }
    Ok(())
}

fn layout(options: &Options) -> Result<Layout, Failure> {
    // The second would be measured into the files of the first.
    let twice = |option: &str, word: Option<String>| match word {
        Some(word) => Err(Failure::Usage(format!("{option}: {word} is given twice"))),
        None => Ok(()),
    };
    twice("--mode", repeated(&options.mode).map(Mode::to_string))?;
    twice("--sizes", repeated(&options.sizes).map(Size::to_string))?;
    if options.search.len() > 1 && options.search.contains(&Goal::None) || repeated(&options.search).is_some() {
        return Err(Failure::Usage("--search: each goal once, and none alone".to_owned()));
    }
    if options.source.is_ipv4() != options.target.is_ipv4() {
        return Err(Failure::Usage("source and target are of two families".to_owned()));
    }
    if usize::from(options.source.port()) + options.flows as usize > 65_536 || options.source.port() == 0 {
        return Err(Failure::Usage(format!(
            "{} flows from source port {} on go beyond 65535",
            options.flows,
            options.source.port()
        )));
    }
    // 14 + 40 + 8 + 16 of the stamp + 4
    let short = |size: &Size| !matches!(size, Size::Frame(bytes) if *bytes >= 82);
    if options.source.is_ipv6() && options.sizes.iter().any(short) {
        return Err(Failure::Usage(
            "over IPv6 the shortest frame that holds a stamp has 82 bytes, and there is no imix".to_owned(),
        ));
    }
    Ok(Layout {
        bridge: options.topology == Topology::Bridge,
        gen_netns: options.gen_netns.clone(),
        out_netns: options.out_netns.clone(),
        sink_netns: options.sink_netns.clone(),
        gen_interface: options.interface.clone(),
        source: options.source,
        target: options.target,
        ethernet: Ethernet {
            source: options.source_mac,
            target: options.target_mac,
        },
    })
}

/// The first that was there before.
fn repeated<T: PartialEq>(list: &[T]) -> Option<&T> {
    let mut numbered = list.iter().enumerate();
    numbered
        .find(|(index, one)| list[..*index].contains(one))
        .map(|(_, one)| one)
}

/// Who makes the packets, and that the links are such as this may send out of.
fn check(options: &Options, layout: &Layout) -> Result<(Source, String), Failure> {
    let gen_side = Namespace::open(&layout.gen_netns).map_err(|error| {
        Failure::Usage(format!(
            "{error}; bench-scripts/pktgen.sh makes the namespaces and links that this needs"
        ))
    })?;
    let kind = gen_side.run(|| -> io::Result<String> {
        let handle = Handle::new()?;
        Ok(handle.link(handle.index_of(&layout.gen_interface)?)?.kind)
    })?;
    match kind {
        Ok(kind) if kind == "veth" => {}
        Ok(kind) => {
            return Err(Failure::Usage(format!(
                "{} is of the kind {kind:?}: this sends out of a veth only, so that nothing leaves the machine",
                layout.gen_interface
            )));
        }
        Err(error) => return Err(Failure::Usage(format!("{}: {error}", layout.gen_interface))),
    }
    let there = || gen_side.run(pktgen::available);
    let mixed = options.sizes.contains(&Size::Imix);
    Ok(match options.generator {
        GeneratorName::Builtin => (Source::Builtin, "builtin".to_owned()),
        GeneratorName::Auto if mixed => (Source::Builtin, "builtin (pktgen has no imix)".to_owned()),
        GeneratorName::Pktgen if mixed => {
            return Err(Failure::Usage(
                "pktgen sends frames of one length, not the imix".to_owned(),
            ));
        }
        name => match there()? {
            Ok(()) => {
                let (first, threads) = (options.first_thread, options.threads);
                let missing = gen_side.run(|| pktgen::missing_thread(first.into(), threads.into()))?;
                if let Some(thread) = missing {
                    return Err(Failure::Usage(format!(
                        "--threads {threads}, --first-thread {first}: pktgen has no thread \
                         kpktgend_{thread}, but one for each CPU; ask for fewer"
                    )));
                }
                (Source::Pktgen, "pktgen".to_owned())
            }
            Err(why) if name == GeneratorName::Auto => (Source::Builtin, format!("builtin ({why})")),
            Err(why) => return Err(Failure::Lacking(why)),
        },
    })
}

fn dry_run(options: &Options, layout: &Layout) -> Result<(), Failure> {
    if options.generator == GeneratorName::Builtin {
        return Ok(());
    }
    let mut out = io::stdout().lock();
    for size in &options.sizes {
        let Size::Frame(bytes) = size else { continue };
        let config = pktgen::Config {
            interface: layout.gen_interface.clone(),
            ethernet: layout.ethernet,
            source: layout.source,
            target: layout.target,
            flows: options.flows.min(65_535) as u16,
            frame: bytes - 4,
            first_thread: options.first_thread.into(),
            threads: options.threads.into(),
            rate: options.rate,
            count: options.count.unwrap_or(0),
            checksum: options.udp_checksum,
            append: options.append,
        };
        for (file, line) in config.lines() {
            writeln!(out, "echo '{line}' > /proc/net/pktgen/{file}")?;
        }
    }
    Ok(())
}

struct Run<'a> {
    options: &'a Options,
    layout: Layout,
    source: Source,
    stop: &'static AtomicBool,
    results: Results,
}

impl Run<'_> {
    fn rig(&self, mode: Mode, wait: Option<Wait>) -> Result<Rig, Failure> {
        let options = self.options;
        let config = WorkerConfig {
            backend: options.backend.map(|backend| match backend {
                BackendName::IoUring => Backend::IoUring,
                BackendName::Syscalls => Backend::Syscalls,
            }),
            wait: wait.unwrap_or_default(),
            ..WorkerConfig::default()
        };
        let setup = Setup {
            mode,
            config,
            offloads: options.offloads == Switch::On,
            queues: options.queues.into(),
            flows: options.flows as usize,
            size: options.sizes[0],
            source: self.source,
            threads: options.threads.into(),
            first_thread: options.first_thread.into(),
            verify: options.verify,
            checksum: options.udp_checksum,
            append: options.append,
            stop: self.stop,
        };
        Rig::new(&self.layout, &setup).map_err(|error| Failure::Failed(format!("{mode}: {error}")))
    }

    fn mode(&mut self, mode: Mode) -> Result<(), Failure> {
        let mut rig = self.rig(mode, None)?;
        let mut found = Vec::new();
        for &size in &self.options.sizes {
            if self.stopped() {
                break;
            }
            rig.size(size);
            if let Some(rate) = self.rates(&rig, mode, size)? {
                found.push((size, rate));
            }
        }
        rig.stop()
            .map_err(|error| Failure::Failed(format!("{mode}: {error}")))?;
        // One size tells how long packets take; the others differ by their copying.
        if let Some(&(size, rate)) = found.first()
            && self.options.latency
        {
            self.latency(mode, size, rate)?;
        }
        Ok(())
    }

    /// Returns the rate that latencies are taken against.
    fn rates(&mut self, rig: &Rig, mode: Mode, size: Size) -> Result<Option<f64>, Failure> {
        let options = self.options;
        let repeats = options.repeat as usize;
        if options.rate.is_some() || options.count.is_some() {
            let load = Load {
                rate: options.rate.map(|rate| rate as f64),
                time: options.duration,
                count: options.count,
                watch: false,
            };
            return self.repeat(rig, mode, size, "fixed", load, repeats).map(Some);
        }
        let most = Load {
            rate: None,
            time: options.duration / 2,
            count: None,
            watch: false,
        };
        let through = self.repeat(rig, mode, size, "MRR", most, repeats)?;
        if self.stopped() {
            return Ok(None);
        }
        let offered = self.results.rows.last().and_then(|row| row.measured.as_ref());
        let ceiling = offered.map_or(through, |measured| measured.offered_pps);
        if !mode.sends() {
            eprintln!("{mode}, {size} B: the generator offers at most {ceiling:.0} packets per second");
        }
        let goals: Vec<(f64, &'static str)> = options
            .search
            .iter()
            .filter_map(|goal| match goal {
                Goal::Ndr => Some((0.0, "NDR")),
                Goal::Pdr => Some((0.005, "PDR")),
                Goal::None => None,
            })
            .collect();
        // What sends on its own has nothing in front of it that could lose packets.
        if goals.is_empty() || mode.sends() {
            return Ok(Some(through));
        }
        let shares: Vec<f64> = goals.iter().map(|(share, _)| *share).collect();
        let settings = Settings {
            time: options.duration,
            short: options.duration / 4,
            resolution: RESOLUTION,
            ..Settings::default()
        };
        let mut searches = Vec::new();
        let mut start = through;
        while searches.len() < repeats && !self.stopped() {
            // A little above what it offered, since that was one moment's ceiling.
            let search = Search::new(&settings, &shares, ceiling * 1.05).starting_at(start);
            let found = self.search(rig, mode, size, search)?;
            // What passed is near what passes next; where nothing did, the start was as good as
            // any.
            let passed = found.bounds.iter().filter_map(|bounds| bounds.lower);
            start = passed.reduce(f64::min).unwrap_or(start);
            searches.push(found);
        }
        let mut found = None;
        for (goal, &(_, what)) in goals.iter().enumerate() {
            let mut row = found_row(mode, size, what, goal, &searches, repeats);
            row.cut_short = self.stopped();
            found = row.rate.map(|rate| rate.median).or(found);
            self.results.rows.push(row);
        }
        Ok((!self.stopped()).then_some(found.unwrap_or(through)))
    }

    /// One search, until its end, its patience's, or an interruption.
    fn search(&mut self, rig: &Rig, mode: Mode, size: Size, mut search: Search) -> Result<Found, Failure> {
        let began = Instant::now();
        let mut trials = Vec::new();
        while let Some(trial) = search.next() {
            if began.elapsed() > self.options.duration * PATIENCE {
                break;
            }
            let load = Load {
                rate: Some(trial.rate),
                time: trial.time,
                count: None,
                watch: false,
            };
            let measured = self.trial(rig, mode, size, load)?;
            // A trial that was cut short proves nothing.
            if self.stopped() {
                break;
            }
            let outcome = Outcome {
                rate: measured.sent_pps(),
                kept: measured.kept,
                loss: measured.loss_of_sent(),
            };
            search.record(trial, outcome);
            trials.push((if outcome.kept { trial.rate } else { outcome.rate }, measured));
        }
        Ok(Found {
            bounds: search.bounds(),
            trials,
        })
    }

    fn stopped(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    /// The same load several times: a row. Returns what came through.
    fn repeat(
        &mut self,
        rig: &Rig,
        mode: Mode,
        size: Size,
        what: &'static str,
        load: Load,
        repeats: usize,
    ) -> Result<f64, Failure> {
        let mut all = Vec::new();
        for _ in 0..repeats {
            let measured = self.trial(rig, mode, size, load)?;
            // One that was cut short stands for the load only where there is no other.
            if self.stopped() && !all.is_empty() {
                break;
            }
            all.push(measured);
            if self.stopped() {
                break;
            }
        }
        // A count may be reached in the moment of the interruption.
        let complete = all.len() == repeats && !self.stopped();
        let rates: Vec<f64> = all.iter().map(|one| one.received_pps).collect();
        let rate = Spread::of(&rates).ok_or_else(|| Failure::Failed("a rate is no number".to_owned()))?;
        // Who sends is the generator itself, and is what is measured.
        let lossless = all.iter().filter(|one| one.loss() == 0.0).count();
        let generator_bound = load.rate.is_none() && !mode.sends() && 2 * lossless > all.len();
        // The one in the middle stands for all.
        all.sort_by(|one, other| one.received_pps.total_cmp(&other.received_pps));
        let measured = all.swap_remove(all.len() / 2);
        self.results.rows.push(Row {
            mode,
            size,
            what,
            rate: Some(rate),
            upper: None,
            none_found: 0,
            generator_bound,
            complete,
            cut_short: self.stopped(),
            measured: Some(measured),
        });
        Ok(rate.median)
    }

    fn latency(&mut self, mode: Mode, size: Size, rate: f64) -> Result<(), Failure> {
        for (name, wait) in WAITS {
            // Who only sends does not wait.
            if mode.sends() && name != "block" {
                continue;
            }
            let mut rig = self.rig(mode, Some(wait))?;
            rig.size(size);
            for share in SHARES {
                if self.stopped() {
                    break;
                }
                let load = Load {
                    rate: Some((rate * f64::from(share) / 100.0).max(1.0)),
                    time: self.options.duration,
                    count: None,
                    watch: true,
                };
                let measured = self.trial(&rig, mode, size, load)?;
                self.results.latencies.push(Latency {
                    mode,
                    size,
                    wait: name,
                    share,
                    complete: !self.stopped(),
                    measured,
                });
            }
            rig.stop()
                .map_err(|error| Failure::Failed(format!("{mode}: {error}")))?;
        }
        Ok(())
    }

    fn trial(&mut self, rig: &Rig, mode: Mode, size: Size, load: Load) -> Result<Measured, Failure> {
        let measured = rig
            .trial(load)
            .map_err(|error| Failure::Failed(format!("{mode}, {size} B: {error}")))?;
        self.results.trials += 1;
        self.results.offered += measured.offered;
        self.results.unexplained += measured.unexplained.unsigned_abs();
        self.results.wrong += measured.wrong();
        if measured.unexplained != 0 || measured.wrong() != 0 {
            let hops: Vec<String> = measured
                .hops
                .iter()
                .map(|(hop, count)| format!("{hop} {count}"))
                .collect();
            eprintln!(
                "{mode}, {size} B: {} packets unexplained: offered {}, received {}, dropped {:?}; {}; counted on the way: {}; dropped by backlogs \
                 anywhere: {}",
                measured.unexplained,
                measured.offered,
                measured.received,
                measured.drops,
                measured.summary,
                hops.join(", "),
                measured.softnet_machine
            );
        }
        if self.options.verbose {
            eprintln!(
                "{mode}, {size} B: offered {:.0}/s{}, received {:.0}/s, lost {}, unexplained {}, {}",
                measured.offered_pps,
                if measured.kept { "" } else { " (less than asked)" },
                measured.received_pps,
                measured.offered - measured.received.min(measured.offered),
                measured.unexplained,
                measured.way
            );
        } else if io::stderr().is_terminal() {
            eprint!("\r{mode}, {size} B: trial {}\x1b[K\r", self.results.trials);
        }
        if measured.received == 0 && measured.offered > 0 && load.rate.is_none() {
            return Err(Failure::Failed(format!(
                "{mode}, {size} B: of {} packets none arrived; dropped: {:?}, foreign: {}, damaged: {:?}",
                measured.offered, measured.drops, measured.summary.foreign, measured.summary.faults
            )));
        }
        Ok(measured)
    }
}

/// What came of one search.
struct Found {
    bounds: Vec<Bounds>,
    /// The rate that was offered in each trial, and its books.
    trials: Vec<(f64, Measured)>,
}

/// What several searches say of one goal. A search that found no rate is part of it.
fn found_row(mode: Mode, size: Size, what: &'static str, goal: usize, searches: &[Found], repeats: usize) -> Row {
    let bounds: Vec<Bounds> = searches.iter().map(|search| search.bounds[goal]).collect();
    let lowers: Vec<f64> = bounds.iter().filter_map(|bounds| bounds.lower).collect();
    let uppers: Vec<f64> = bounds.iter().map(|bounds| bounds.upper).collect();
    // The trial that is shown: of the search in the middle, the last one that passed nearest to its
    // lower bound.
    let mut order: Vec<(f64, &Found)> = bounds
        .iter()
        .zip(searches)
        .filter_map(|(bounds, search)| Some((bounds.lower?, search)))
        .collect();
    order.sort_by(|one, other| one.0.total_cmp(&other.0));
    let shown = order.get(order.len() / 2).and_then(|&(lower, search)| {
        let share = search.bounds[goal].goal;
        let passed = search
            .trials
            .iter()
            .rev()
            .filter(|(rate, measured)| *rate >= lower * (1.0 - 1e-6) && measured.loss_of_sent() <= share);
        passed.min_by(|one, other| one.0.total_cmp(&other.0))
    });
    Row {
        mode,
        size,
        what,
        rate: Spread::of(&lowers),
        upper: Spread::of(&uppers),
        none_found: searches.len() - lowers.len(),
        // The median is one of these then.
        generator_bound: 2 * bounds.iter().filter(|bounds| bounds.generator_bound).count() > searches.len(),
        complete: searches.len() == repeats && bounds.iter().all(|bounds| bounds.complete),
        cut_short: false,
        measured: shown.map(|(_, measured)| measured.clone()),
    }
}

fn mac(text: &str) -> Result<[u8; 6], String> {
    let wrong = || format!("{text}: a hardware address is six bytes, as 02:00:00:00:00:01");
    let bytes: Vec<u8> = text
        .split(':')
        .map(|byte| u8::from_str_radix(byte, 16).map_err(|_| wrong()))
        .collect::<Result<_, _>>()?;
    bytes.try_into().map_err(|_| wrong())
}
