//! Throughput runs over veth: generator → link → bridge or routing → TAP or TUN → engine → back, onward, or into its books.
//!
//! ```text
//!   namespace gen          caller's namespace                       namespaces out and sink (Forward)
//!   gen0 ───────── dut0 ─ routing or bridge ─ tun0 ─ engine ─ tun1 ─ routing or bridge ─ out0 ───────── sink0
//! ```
//!
//! The links are made by the caller (`bench-scripts/pktgen.sh`); a [`Rig`] puts a generator, an engine and a receiver to them, and each
//! [`Rig::trial`] offers one load and closes the books over it: what was offered is what was received and what the counters of each place say
//! was dropped there. What is left is [`Measured::unexplained`], and ought to be 0.

pub mod pktgen;
pub mod search;

mod links;
mod subject;

use std::fmt;
use std::io;
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;

use super::Namespace;
use super::generator::{self, Generator, IMIX, Limit};
use super::packet::{Ethernet, Framing, Spec};
use super::process::MachineCpu;
use super::receiver::{Receiver, SocketReceiver, Until};
use super::tracker::Summary;
use crate::sys::cpu;
use crate::{Builder, Mode as DeviceMode, MultiQueue, Offloads, WorkerConfig};
use links::{Counts, Links, softnet_dropped};
use subject::{Emission, Reading, Subject};

/// What the engine does with packets.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Mode {
    /// Receives them one by one ([`Worker::recv`](crate::Worker::recv)) and keeps books of them.
    Recv,
    /// The same in batches, by an [`Engine`](crate::Engine).
    RecvMany,
    /// Makes them and sends them one by one ([`Worker::send`](crate::Worker::send)); the receiver is at the link's other end.
    Send,
    /// The same in batches.
    SendMany,
    /// An engine sends each back to where it came from.
    Echo,
    /// An engine sends each on by a second device.
    Forward,
}

/// Lengths of the frames that are offered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Size {
    /// All of this many bytes, with the 4 bytes of the frame check sequence: 64 to 1,518.
    Frame(usize),
    /// [`IMIX`].
    Imix,
}

/// Who makes the packets.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Source {
    /// [`Generator`] on a packet socket.
    Builtin,
    /// The kernel's [`pktgen`].
    Pktgen,
}

/// Where the links are, and what crosses them.
#[derive(Clone, Debug)]
pub struct Layout {
    /// TAP devices in bridges instead of TUN devices behind routes.
    pub bridge: bool,
    /// The namespace of `gen0`, where the generator is and where what is sent back arrives.
    pub gen_netns: PathBuf,
    /// That of `tun1` and `out0`, for [`Mode::Forward`].
    pub out_netns: PathBuf,
    /// That of `sink0`, for [`Mode::Forward`].
    pub sink_netns: PathBuf,
    /// The generator's link, `gen0` unless the caller wants it otherwise.
    pub gen_interface: String,
    /// Source address, and source port of flow 0.
    pub source: std::net::SocketAddr,
    /// Target address and port.
    pub target: std::net::SocketAddr,
    /// The hardware addresses of what is generated.
    pub ethernet: Ethernet,
}

/// One way of doing it.
#[derive(Clone, Debug)]
pub struct Setup {
    /// What the engine does.
    pub mode: Mode,
    /// How its workers work.
    pub config: WorkerConfig,
    /// Whether the engine's devices have all offloads.
    pub offloads: bool,
    /// Queues, each with a worker.
    pub queues: usize,
    /// Flows.
    pub flows: usize,
    /// Lengths.
    pub size: Size,
    /// Who makes the packets.
    pub source: Source,
    /// Threads of pktgen, the first on CPU `first_thread`.
    pub threads: usize,
    /// Where the generator runs.
    pub first_thread: usize,
    /// Whether the receiver verifies each packet's checksum.
    pub verify: bool,
    /// Whether pktgen finishes UDP checksums.
    pub checksum: bool,
    /// Whether pktgen's configuration is added to (`-a`).
    pub append: bool,
    /// Ends a trial before its time, with what was offered until then.
    pub stop: &'static AtomicBool,
}

/// What is offered in one trial.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Load {
    /// Packets per second; as many as possible unless set.
    pub rate: Option<f64>,
    /// For how long.
    pub time: Duration,
    /// As many packets instead.
    pub count: Option<u64>,
    /// Whether the engine looks at the packets that it only passes on, so that their latency is known per queue. Costs it some 40 ns each.
    pub watch: bool,
}

/// What came of one trial.
#[derive(Clone, Debug)]
pub struct Measured {
    /// Packets that were due.
    pub offered: u64,
    /// Those among them that the generator did not send, because it fell behind.
    pub unsent: u64,
    /// Whole packets that arrived, each counted once.
    pub received: u64,
    /// Where packets were dropped, in the order of their way, by the counters of each place; only where there were any.
    pub drops: Vec<(String, u64)>,
    /// What each place on the way counted, in the kernel's words: where drops do not explain a loss, these tell between which two it is.
    pub hops: Vec<(String, u64)>,
    /// Offered, neither received nor dropped anywhere that counts. Negative: more was dropped than was offered.
    pub unexplained: i64,
    /// Packets that the backlog of some CPU had no room for, on the whole machine (`/proc/net/softnet_stat`). Those at our links are in
    /// [`drops`](Self::drops) already.
    pub softnet_machine: u64,
    /// The receiver's books.
    pub summary: Summary,
    /// Bytes of received frames on the link, frame check sequence included.
    pub l2_bytes: u64,
    /// Packets due per second.
    pub offered_pps: f64,
    /// Packets received per second of sending.
    pub received_pps: f64,
    /// Whether the generator kept its rate.
    pub kept: bool,
    /// From the first packet to the last.
    pub wall: Duration,
    /// CPU time of the engine's threads.
    pub engine_cpu: Duration,
    /// CPU time of the generator's thread; zero for pktgen and where the engine is the generator.
    pub generator_cpu: Duration,
    /// What the whole machine spent above idle.
    pub machine_cpu: Duration,
    /// Of that, in soft interrupts: sampled, so approximate.
    pub softirq_cpu: Duration,
    /// Packets moved by the engine for each time that it entered the kernel, waiting included.
    pub packets_per_enter: f64,
    /// Packets of each queue.
    pub queues: Vec<u64>,
    /// From the intended time of sending to arrival, in ns. From the actual time for pktgen.
    pub latency: Histogram<u64>,
    /// To the arrival in the engine, by queue. Empty where the engine does not look.
    pub queue_latency: Vec<Histogram<u64>>,
    /// How the generator sent.
    pub way: String,
}

/// A generator, links, an engine and a receiver.
pub struct Rig {
    layout: Layout,
    setup: Setup,
    subject: Subject,
    generator_side: Links,
    here: Links,
    beyond: Option<(Links, Links)>,
    idle: f64,
}

/// Names that the script gives.
const NEAR_LINK: &str = "dut0";
const BRIDGE: &str = "br0";
const DEVICE: &str = "tun0";
const SECOND: &str = "tun1";
const FAR_LINK: &str = "out0";
const FAR_BRIDGE: &str = "br1";
const SINK: &str = "sink0";

/// A place that drops, on both ways.
const QUEUE_FULL: &str = "tun0 tx_dropped (queue full)";

/// Bytes of an Ethernet header, and of the frame check sequence.
const ETHERNET: usize = 14;
const FCS: usize = 4;

/// Nothing is under way any more when all has come, or when nothing came between so many looks at such a distance.
const QUIET: Duration = Duration::from_millis(5);
const LOOKS: u32 = 20;

/// However much still moves after so long: it does not end.
const ENOUGH: Duration = Duration::from_secs(10);

impl Mode {
    /// All, as the command line names them.
    pub const ALL: [Self; 6] = [
        Self::Recv,
        Self::RecvMany,
        Self::Send,
        Self::SendMany,
        Self::Echo,
        Self::Forward,
    ];

    /// Whether the engine itself makes the packets.
    pub fn sends(self) -> bool {
        matches!(self, Self::Send | Self::SendMany)
    }

    /// Whether packets end in the engine.
    pub fn ends(self) -> bool {
        matches!(self, Self::Recv | Self::RecvMany)
    }
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Recv => "recv",
            Self::RecvMany => "recv-many",
            Self::Send => "send",
            Self::SendMany => "send-many",
            Self::Echo => "echo",
            Self::Forward => "forward",
        })
    }
}

impl FromStr for Mode {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let found = Self::ALL.into_iter().find(|mode| mode.to_string() == text);
        found.ok_or_else(|| format!("{text:?}: a mode is one of recv, recv-many, send, send-many, echo, forward"))
    }
}

impl Size {
    /// IP lengths, in turn.
    pub fn lengths(self) -> Vec<usize> {
        match self {
            Self::Frame(bytes) => vec![bytes - ETHERNET - FCS],
            Self::Imix => IMIX.to_vec(),
        }
    }
}

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Frame(bytes) => write!(f, "{bytes}"),
            Self::Imix => f.write_str("imix"),
        }
    }
}

impl FromStr for Size {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text.eq_ignore_ascii_case("imix") {
            return Ok(Self::Imix);
        }
        let bytes = text.parse().ok().filter(|bytes| (64..=1_518).contains(bytes));
        let bytes = bytes.ok_or_else(|| format!("{text:?}: a frame has 64 to 1518 bytes, or is of the imix"))?;
        Ok(Self::Frame(bytes))
    }
}

impl Rig {
    /// Opens the devices of the calling thread's namespace and starts the engine.
    ///
    /// # Errors
    /// A namespace, link or device is missing, or the engine does not start.
    pub fn new(layout: &Layout, setup: &Setup) -> io::Result<Self> {
        let forward = setup.mode == Mode::Forward;
        let kind = if layout.bridge {
            DeviceMode::Tap
        } else {
            DeviceMode::Tun
        };
        let open = |name: &str, netns: Option<&PathBuf>| -> io::Result<MultiQueue> {
            let mut builder = Builder::new(name, kind)
                .queues(setup.queues)
                .multi_queue(setup.queues > 1)
                .attach_existing(true)
                .offloads(if setup.offloads {
                    Offloads::all()
                } else {
                    Offloads::none()
                })
                .up(true);
            if let Some(path) = netns {
                builder = builder.netns_path(path);
            }
            builder.open().map_err(io::Error::other)
        };
        let first = open(DEVICE, None)?;
        let second = if forward {
            Some(open(SECOND, Some(&layout.out_netns))?)
        } else {
            None
        };
        let bridged = |link, bridge, device| {
            if layout.bridge {
                vec![link, bridge, device]
            } else {
                vec![link, device]
            }
        };
        let here = Links::new(Namespace::current()?, &bridged(NEAR_LINK, BRIDGE, DEVICE))?;
        let generator_side = Links::new(Namespace::open(&layout.gen_netns)?, &[&layout.gen_interface])?;
        let beyond = if forward {
            let out = Links::new(
                Namespace::open(&layout.out_netns)?,
                &bridged(FAR_LINK, FAR_BRIDGE, SECOND),
            )?;
            Some((out, Links::new(Namespace::open(&layout.sink_netns)?, &[SINK])?))
        } else {
            None
        };
        let framing = Framing {
            ethernet: layout.bridge.then_some(layout.ethernet),
            ..Framing::NONE
        };
        let cpus = cpu::allowed()?;
        // The first CPU is the generator's, if there is another.
        let own: Vec<usize> = if setup.queues < cpus.len() {
            cpus[cpus.len() - setup.queues..].to_vec()
        } else {
            cpus.into_iter().rev().collect()
        };
        let books = receiver(layout, setup, framing);
        let subject = Subject::start(setup.mode, first, second, &setup.config, &own, &books)?;
        let handle = crate::netlink::Handle::new()?;
        handle.wait_running(handle.index_of(DEVICE)?, Duration::from_secs(5))?;
        Ok(Self {
            layout: layout.clone(),
            setup: setup.clone(),
            subject,
            generator_side,
            here,
            beyond,
            idle: idle_share()?,
        })
    }

    /// Changes the lengths that are offered from now on.
    pub fn size(&mut self, size: Size) {
        self.setup.size = size;
    }

    /// Offers a load and closes the books over it.
    ///
    /// # Errors
    /// The generator or a worker does not work. Lost packets are no error.
    pub fn trial(&self, load: Load) -> io::Result<Measured> {
        self.subject.begin(load.watch)?;
        let mut sink = self.sink()?;
        let over = AtomicBool::new(false);
        thread::scope(|scope| {
            let sink_thread = sink.take().map(|mut sink| {
                let over = &over;
                scope.spawn(move || sink.run(Until::default(), over).map(|_| sink))
            });
            let before = self.moment()?;
            let source = self.emit(load);
            let after = match &source {
                Ok(source) => self.wait_quiet(source.offered, &before).and_then(|()| self.moment()),
                Err(_) => self.moment(),
            };
            over.store(true, Ordering::Relaxed);
            let sink = sink_thread
                .map(|thread| thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
                .transpose()?;
            self.close(source?, &before, &after?, sink)
        })
    }

    /// What the generator can offer here, by offering as much as it can.
    ///
    /// # Errors
    /// As [`trial`](Self::trial).
    pub fn ceiling(&self, time: Duration) -> io::Result<Measured> {
        self.trial(Load {
            rate: None,
            time,
            count: None,
            watch: false,
        })
    }

    /// Stops the engine.
    ///
    /// # Errors
    /// A worker did not end well.
    pub fn stop(self) -> io::Result<()> {
        self.subject.stop()
    }

    fn sink(&self) -> io::Result<Option<SocketReceiver>> {
        if self.setup.mode.ends() {
            return Ok(None);
        }
        let (links, name) = match &self.beyond {
            Some((_, sink)) => (sink, SINK),
            None => (&self.generator_side, self.layout.gen_interface.as_str()),
        };
        let framing = Framing {
            ethernet: Some(self.layout.ethernet),
            ..Framing::NONE
        };
        let books = receiver(&self.layout, &self.setup, framing);
        links
            .namespace()
            .run(|| SocketReceiver::on_interface(name, books))?
            .map(Some)
    }

    fn emit(&self, load: Load) -> io::Result<Emitted> {
        let setup = &self.setup;
        let lengths = setup.size.lengths();
        if setup.mode.sends() {
            // The other way round: to where the generator's packets come from. The source ports tell the flows here, too.
            let (mut from, mut to) = (self.layout.target, self.layout.source);
            from.set_port(self.layout.source.port());
            to.set_port(self.layout.target.port());
            let mut spec = Spec::new(from, to);
            if self.layout.bridge {
                let Ethernet { source, target } = self.layout.ethernet;
                let ethernet = Ethernet {
                    source: target,
                    target: source,
                };
                spec = spec.framing(Framing {
                    ethernet: Some(ethernet),
                    ..Framing::NONE
                });
            }
            let time = match (load.count, load.rate) {
                (Some(count), Some(rate)) => Duration::from_secs_f64(count as f64 / rate),
                _ => load.time,
            };
            let emitted = self.subject.emit(&Emission {
                spec,
                flows: setup.flows,
                first: 0,
                step: 1,
                lengths,
                rate: load.rate.map(|rate| rate as u64),
                time,
                stop: setup.stop,
            })?;
            let asked = load.rate.map_or(0.0, |rate| rate * time.as_secs_f64());
            return Ok(Emitted {
                offered: emitted.due,
                refused: emitted.refused,
                unsent: 0,
                wall: emitted.wall,
                cpu: Duration::ZERO,
                kept: emitted.due as f64 >= 0.99 * asked,
                flows: emitted.flows,
                way: format!("{} by the engine's own threads", setup.mode),
            });
        }
        match setup.source {
            Source::Builtin => self.builtin(load, &lengths),
            Source::Pktgen => self.pktgen(load),
        }
    }

    fn builtin(&self, load: Load, lengths: &[usize]) -> io::Result<Emitted> {
        let config = generator::Config {
            source: Some(self.layout.source),
            flows: self.setup.flows,
            link: Some(generator::Link {
                interface: self.layout.gen_interface.clone(),
                ethernet: self.layout.ethernet,
            }),
            length: lengths[0],
            mix: if lengths.len() > 1 {
                lengths.to_vec()
            } else {
                Vec::new()
            },
            rate: load.rate.map(|rate| rate.max(1.0) as u64),
            limit: load.count.map_or(Limit::Time(load.time), Limit::Packets),
            cpu: Some(self.setup.first_thread),
            ..generator::Config::new(self.layout.target)
        };
        let run = || Generator::new(&config)?.run(self.setup.stop);
        let generated = self.generator_side.namespace().run(run)??;
        let refused = generated.refused.values().sum::<u64>();
        Ok(Emitted {
            offered: generated.due,
            refused,
            unsent: generated.unsent(),
            wall: generated.wall,
            cpu: generated.cpu,
            kept: generated.unsent() == 0
                && generated.schedule.is_none_or(|schedule| {
                    generated.due as f64 / generated.wall.as_secs_f64() >= 0.98 * schedule.rate as f64
                }),
            flows: generated
                .flows
                .iter()
                .enumerate()
                .map(|(flow, &sent)| (flow as u16, sent))
                .collect(),
            way: format!("builtin, {:?} in groups of {}", generated.way, generated.group).to_lowercase(),
        })
    }

    fn pktgen(&self, load: Load) -> io::Result<Emitted> {
        let Size::Frame(frame) = self.setup.size else {
            return Err(io::Error::new(
                io::ErrorKind::Unsupported,
                "pktgen sends frames of one length, not the imix",
            ));
        };
        let threads = self.setup.threads.max(1);
        let rate = load.rate.map(|rate| rate.max(1.0) as u64);
        let count = load
            .count
            .or_else(|| rate.map(|rate| (rate as f64 * load.time.as_secs_f64()) as u64));
        let config = pktgen::Config {
            interface: self.layout.gen_interface.clone(),
            ethernet: self.layout.ethernet,
            source: self.layout.source,
            target: self.layout.target,
            flows: self.setup.flows.min(usize::from(u16::MAX)) as u16,
            frame: frame - FCS,
            first_thread: self.setup.first_thread,
            threads,
            rate,
            count: count.map_or(0, |count| (count / threads as u64).max(1)),
            checksum: self.setup.checksum,
            append: self.setup.append,
        };
        let sent = self
            .generator_side
            .namespace()
            .run(|| config.run(load.time, self.setup.stop))??;
        let total: u64 = sent.threads.iter().sum();
        let wall = sent.time.max(Duration::from_micros(1));
        Ok(Emitted {
            offered: total + sent.errors,
            refused: sent.errors,
            unsent: 0,
            wall,
            cpu: Duration::ZERO,
            kept: rate.is_none_or(|rate| total as f64 / wall.as_secs_f64() >= 0.98 * rate as f64),
            flows: sent
                .threads
                .iter()
                .enumerate()
                .map(|(thread, &sent)| (thread as u16, sent as u32))
                .collect(),
            way: format!("pktgen, {threads} thread{}", if threads == 1 { "" } else { "s" }),
        })
    }

    /// Waits until all that was offered has arrived or was dropped, and nothing moves any more; or until nothing moved for so long that what is
    /// missing will not come.
    fn wait_quiet(&self, offered: u64, before: &Moment) -> io::Result<()> {
        let bound = Instant::now() + ENOUGH;
        let moved = || -> io::Result<(u64, u64, u64)> {
            let total = self.subject.counters().total;
            let dropped = self.here.read()?.since(&before.here).link(DEVICE).tx_dropped;
            Ok((total.received_packets, total.sent_packets, dropped))
        };
        let earlier = before.engine.total.received_packets;
        let mut last = moved()?;
        let mut unmoved = 0;
        loop {
            thread::sleep(QUIET);
            // Each worker answers, so each had a CPU since the last look: on a busy machine that may take a while.
            self.subject.read()?;
            let now = moved()?;
            unmoved = if now == last { unmoved + 1 } else { 0 };
            last = now;
            let arrived = self.setup.mode.sends() || now.0 - earlier + now.2 >= offered;
            if unmoved >= if arrived { 1 } else { LOOKS } || Instant::now() > bound {
                return Ok(());
            }
        }
    }

    fn moment(&self) -> io::Result<Moment> {
        Ok(Moment {
            generator_side: self.generator_side.read()?,
            here: self.here.read()?,
            out: self.beyond.as_ref().map(|(out, _)| out.read()).transpose()?,
            softnet: softnet_dropped(),
            machine: MachineCpu::now()?,
            engine: self.subject.read()?,
        })
    }

    fn close(
        &self,
        source: Emitted,
        before: &Moment,
        after: &Moment,
        mut sink: Option<SocketReceiver>,
    ) -> io::Result<Measured> {
        let setup = &self.setup;
        let at_receiver = sink.as_mut().map_or(Ok(0), SocketReceiver::dropped)?;
        let queue_books = self.subject.books()?;
        let mut books = match sink {
            Some(sink) => sink.into_receiver(),
            None => {
                let mut books = queue_books.iter().cloned();
                let mut all = books
                    .next()
                    .ok_or_else(|| io::Error::other("an engine without queues"))?;
                books.for_each(|one| all.merge(&one));
                all
            }
        };
        for &(flow, sent) in &source.flows {
            books.tracker_mut().sent(flow, sent);
        }
        let summary = books.summary();
        let engine = after.engine.total.clone();
        let earlier = &before.engine.total;
        let less = |field: fn(&crate::Counters) -> u64| field(&engine) - field(earlier);
        let drops = self.drops(&source, before, after, at_receiver);
        let dropped: u64 = drops.iter().map(|(_, count)| count).sum();
        let wall = source.wall.as_secs_f64().max(1e-9);
        let overhead = if setup.mode.ends() && !self.layout.bridge {
            ETHERNET + FCS
        } else {
            FCS
        };
        let machine = after.machine.since(&before.machine);
        let above_idle = machine.busy().as_nanos() as f64 - self.idle * machine.capacity_ns as f64;
        let moved = less(|counters| counters.received_packets) + less(|counters| counters.sent_packets);
        let sleeps = |reading: &Reading| reading.workers.sleeps + reading.workers.lingers;
        let enters = less(|counters| counters.system_calls) + sleeps(&after.engine) - sleeps(&before.engine);
        let of_queue = |counters: &crate::Counters| {
            if setup.mode.sends() {
                counters.sent_packets
            } else {
                counters.received_packets
            }
        };
        Ok(Measured {
            offered: source.offered,
            unsent: source.unsent,
            received: summary.received,
            unexplained: source.offered as i64 - summary.received as i64 - dropped as i64,
            drops,
            hops: self.hops(before, after),
            softnet_machine: after.softnet.saturating_sub(before.softnet),
            l2_bytes: books.bytes() + summary.received * overhead as u64,
            summary,
            offered_pps: source.offered as f64 / wall,
            received_pps: books.summary().received as f64 / wall,
            kept: source.kept,
            wall: source.wall,
            engine_cpu: after.engine.cpu.saturating_sub(before.engine.cpu),
            generator_cpu: source.cpu,
            machine_cpu: Duration::from_nanos(above_idle.max(0.0) as u64),
            softirq_cpu: Duration::from_nanos(machine.softirq_ns),
            packets_per_enter: moved as f64 / enters.max(1) as f64,
            queues: after
                .engine
                .queues
                .iter()
                .zip(&before.engine.queues)
                .map(|(now, then)| of_queue(now) - of_queue(then))
                .collect(),
            latency: books.latency().clone(),
            queue_latency: queue_books
                .iter()
                .filter(|books| !books.latency().is_empty())
                .map(|books| books.latency().clone())
                .collect(),
            way: source.way,
        })
    }

    /// What each place counted, in the order of the way; only where it is not 0.
    fn hops(&self, before: &Moment, after: &Moment) -> Vec<(String, u64)> {
        let mut hops = Vec::new();
        let mut side = |counts: &Counts, names: &[&str]| {
            for name in names {
                let link = counts.link(name);
                hops.extend([
                    (format!("{name} rx_packets"), link.rx_packets),
                    (format!("{name} rx_dropped"), link.rx_dropped),
                    (format!("{name} tx_packets"), link.tx_packets),
                    (format!("{name} tx_dropped"), link.tx_dropped),
                ]);
            }
            hops.push(("dropped by IP".to_owned(), counts.stack()));
        };
        let generator_side = after.generator_side.since(&before.generator_side);
        side(&generator_side, &[&self.layout.gen_interface]);
        side(&after.here.since(&before.here), &[NEAR_LINK, BRIDGE, DEVICE]);
        if let Some((after, before)) = after.out.as_ref().zip(before.out.as_ref()) {
            side(&after.since(before), &[SECOND, FAR_BRIDGE, FAR_LINK]);
        }
        let (now, then) = (&after.engine.total, &before.engine.total);
        hops.extend([
            (
                "engine received".to_owned(),
                now.received_packets - then.received_packets,
            ),
            ("engine sent".to_owned(), now.sent_packets - then.sent_packets),
        ]);
        hops.retain(|&(_, count)| count > 0);
        hops
    }

    /// What each place says it dropped, in the order of the way.
    fn drops(&self, source: &Emitted, before: &Moment, after: &Moment, at_receiver: u64) -> Vec<(String, u64)> {
        let generator_side = after.generator_side.since(&before.generator_side);
        let here = after.here.since(&before.here);
        let out = after.out.as_ref().zip(before.out.as_ref());
        let out = out.map(|(after, before)| after.since(before));
        let gen0 = self.layout.gen_interface.as_str();
        let mut drops = Vec::new();
        let mut drop = |place: &str, count: u64| {
            if count > 0 {
                drops.push((place.to_owned(), count));
            }
        };
        let engine = (&after.engine, &before.engine);
        if self.setup.mode.sends() {
            drop("engine: refused by the kernel", source.refused);
            drop(QUEUE_FULL, here.link(DEVICE).tx_dropped);
        } else {
            drop("generator: not sent in time", source.unsent);
            drop("generator: refused by the link", source.refused);
            // A packet that finds the backlog full is counted at both ends of the link, in softnet_stat, and perhaps as a refusal.
            let both = generator_side
                .link(gen0)
                .tx_dropped
                .max(here.link(NEAR_LINK).rx_dropped);
            drop("veth gen0 to dut0 (backlog)", both.saturating_sub(source.refused));
            drop(QUEUE_FULL, here.link(DEVICE).tx_dropped);
            let less = |field: fn(&Reading) -> u64| field(engine.0) - field(engine.1);
            drop("engine: truncated", less(|reading| reading.total.truncated));
            drop(
                "engine: refused by the kernel",
                less(|reading| reading.total.refused_packets),
            );
            if !self.setup.mode.ends() {
                drop(
                    "engine: dropped by the handler",
                    less(|reading| reading.workers.discarded),
                );
            }
        }
        drop("routing", here.stack());
        let bridge = here.link(BRIDGE);
        drop("bridge", bridge.rx_dropped + bridge.tx_dropped);
        if let Some(out) = &out {
            drop("routing behind tun1", out.stack());
            let bridge = out.link(FAR_BRIDGE);
            drop("bridge behind tun1", bridge.rx_dropped + bridge.tx_dropped);
            drop("veth out0 to sink0 (backlog)", out.link(FAR_LINK).tx_dropped);
        }
        if self.setup.mode.sends() || self.setup.mode == Mode::Echo {
            drop("veth dut0 to gen0 (backlog)", here.link(NEAR_LINK).tx_dropped);
        }
        drop("receiver's socket", at_receiver);
        drops
    }
}

/// What was offered, whoever did it.
struct Emitted {
    offered: u64,
    refused: u64,
    unsent: u64,
    wall: Duration,
    cpu: Duration,
    kept: bool,
    flows: Vec<(u16, u32)>,
    way: String,
}

/// All counters at one moment.
struct Moment {
    generator_side: Counts,
    here: Counts,
    out: Option<Counts>,
    softnet: u64,
    machine: MachineCpu,
    engine: Reading,
}

fn receiver(layout: &Layout, setup: &Setup, framing: Framing) -> Receiver {
    let flows = match setup.source {
        Source::Pktgen if !setup.mode.sends() => setup.threads.max(1),
        _ => setup.flows,
    };
    let receiver = Receiver::new(flows).framing(framing).verify(setup.verify);
    match setup.source {
        Source::Pktgen => receiver.pktgen(layout.target.port()),
        Source::Builtin => receiver,
    }
}

/// What part of its time the machine is busy while nothing is measured: the least of several looks.
fn idle_share() -> io::Result<f64> {
    let mut least = 1.0f64;
    for _ in 0..3 {
        let before = MachineCpu::now()?;
        thread::sleep(Duration::from_millis(100));
        let idle = MachineCpu::now()?.since(&before);
        least = least.min(idle.busy().as_nanos() as f64 / idle.capacity_ns.max(1) as f64);
    }
    Ok(least)
}

impl Measured {
    /// The share of what was offered that did not arrive.
    pub fn loss(&self) -> f64 {
        self.offered.saturating_sub(self.received) as f64 / self.offered.max(1) as f64
    }

    /// Packets that were sent per second.
    pub fn sent_pps(&self) -> f64 {
        self.sent() as f64 / self.wall.as_secs_f64().max(1e-9)
    }

    /// The share of what was sent that did not arrive: what the generator did not send is no loss
    /// of the engine's.
    pub fn loss_of_sent(&self) -> f64 {
        self.sent().saturating_sub(self.received) as f64 / self.sent().max(1) as f64
    }

    fn sent(&self) -> u64 {
        self.offered.saturating_sub(self.unsent)
    }

    /// Packets that came wrongly: late within their flow, twice, invented, or damaged.
    pub fn wrong(&self) -> u64 {
        self.summary.late + self.summary.duplicates + self.summary.invented + self.summary.damaged
    }

    /// CPU time of the engine per packet received, in ns.
    pub fn engine_ns(&self) -> f64 {
        self.engine_cpu.as_nanos() as f64 / self.received.max(1) as f64
    }

    /// Gbit/s of frames with their frame check sequence, as RFC 2544 counts them.
    pub fn l2_gbits(&self) -> f64 {
        self.l2_bytes as f64 * 8.0 / self.wall.as_secs_f64().max(1e-9) / 1e9
    }

    /// How unevenly the queues were used: (most - least) by mean.
    pub fn queue_spread(&self) -> f64 {
        let most = self.queues.iter().max().copied().unwrap_or(0) as f64;
        let least = self.queues.iter().min().copied().unwrap_or(0) as f64;
        let mean = self.queues.iter().sum::<u64>() as f64 / self.queues.len().max(1) as f64;
        if mean > 0.0 { (most - least) / mean } else { 0.0 }
    }
}
