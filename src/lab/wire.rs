//! A wire in user space: two namespaces, each with a TUN device, and something that carries what comes out of one into the other.
//!
//! | load | from | what is told of each round |
//! |---|---|---|
//! | [`tcp`] | iperf3 | `gbit_per_s` as received, `cpu_s_per_gb` of the carrying threads, `machine_cpu_s_per_gb` of all, `retransmits` |
//! | [`datagrams`] | the built-in generator | `received_pps`, `gbit_per_s`, and where what did not arrive was lost |
//!
//! The ends of the load and the carrier share the machine's cores: what the carrier spends may be taken from them, so that the rate alone says
//! little without the CPU time beside it. Who runs where is told by [`Places`].

use std::fmt;
use std::io;
use std::net::Ipv4Addr;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;
use serde_json::Value;

use super::cases::Progress;
use super::generator::{Config, Generated, Generator, Limit};
use super::measure::{self, Plan, Report, Sample};
use super::process::MachineCpu;
use super::receiver::{Receiver, SocketReceiver, Until};
use super::{Namespace, Sandbox, Sink, process};
use crate::netlink::{Handle, LinkStats};
use crate::{
    Batch, Builder, Engine, Handler, Mode, MultiQueue, Offloads, Placement, PortError, PortId, Seat, Worker,
    WorkerConfig,
};

/// One way of carrying packets between two TUN devices.
pub trait Carrier: Sync {
    /// Its name in reports.
    fn name(&self) -> &str;

    /// Creates a TUN device of this name (one queue, no packet info) in each of the two namespaces, without setting it up; [`open_both`]
    /// helps. What is returned is called once they have addresses and are up.
    ///
    /// # Errors
    /// What the way or the kernel says. `Unsupported` if it cannot do this.
    fn open(&self, ends: [&Namespace; 2], device: &str) -> io::Result<Opened>;
}

/// Starts carrying, on threads that stay on the CPU that is given, if one is.
pub type Opened = Box<dyn FnOnce(Option<usize>) -> io::Result<Box<dyn Carrying>>>;

/// What carries packets until it is dropped; its devices are deleted before that.
pub trait Carrying {
    /// CPU time that all of its threads have spent.
    ///
    /// # Errors
    /// If one of them has ended: why.
    fn cpu_time(&mut self) -> io::Result<Duration>;
}

/// Does the same in each of two namespaces.
///
/// # Errors
/// As `open`; or the namespace cannot be entered.
pub fn open_both<T: Send>(ends: [&Namespace; 2], open: impl Fn() -> io::Result<T> + Sync) -> io::Result<[T; 2]> {
    Ok([ends[0].run(&open)??, ends[1].run(&open)??])
}

/// Threads that carry packets until their device is deleted.
#[derive(Debug)]
pub struct CarryingThreads {
    threads: Vec<JoinHandle<io::Result<()>>>,
}

impl CarryingThreads {
    /// Runs each of the loops on a thread of its own, on the CPU that is given, if one is.
    ///
    /// # Errors
    /// A thread could not be started.
    pub fn start(cpu: Option<usize>, loops: Vec<Box<dyn FnOnce() -> io::Result<()> + Send>>) -> io::Result<Self> {
        let mut this = Self { threads: Vec::new() };
        for carry in loops {
            let thread = thread::Builder::new().name("carry".to_owned()).spawn(move || {
                if let Some(cpu) = cpu {
                    process::pin_thread(cpu)?;
                }
                carry()
            })?;
            this.threads.push(thread);
        }
        Ok(this)
    }
}

impl Carrying for CarryingThreads {
    fn cpu_time(&mut self) -> io::Result<Duration> {
        if let Some(index) = self.threads.iter().position(JoinHandle::is_finished) {
            let ended = self.threads.remove(index).join();
            ended.unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
            return Err(io::Error::other("a carrying thread has ended"));
        }
        self.threads.iter().map(process::cpu_time_of).sum()
    }
}

impl Drop for CarryingThreads {
    fn drop(&mut self) {
        let deadline = Instant::now() + Duration::from_secs(5);
        for thread in self.threads.drain(..) {
            while !thread.is_finished() && Instant::now() < deadline {
                thread::sleep(Duration::from_millis(1));
            }
            if thread.is_finished() {
                // It says that its device is gone.
                let _ = thread.join();
            }
        }
    }
}

/// Carries packets from each of its two ports to the other.
#[derive(Debug)]
pub struct Wire {
    ends: [PortId; 2],
    /// Where superpackets are cut first, if they are.
    whole: Option<Batch>,
}

impl Wire {
    /// Between the first ports of an engine's first two sources.
    pub fn new(seat: &mut Seat<'_>) -> Option<Self> {
        Some(Self {
            ends: [seat.port(0)?, seat.port(1)?],
            whole: None,
        })
    }

    /// The same, and superpackets are cut before they are sent.
    pub fn cutting(self) -> Self {
        Self {
            whole: Some(Batch::with_capacity(CUT)),
            ..self
        }
    }
}

/// Sends what was received: as it is, or cut into `whole` first. What is left of the latter could not be sent and is dropped, as on any wire. Returns why
/// sending stopped.
pub fn pass_on(worker: &mut Worker, to: PortId, batch: &mut Batch, whole: Option<&mut Batch>) -> Option<PortError> {
    let Some(whole) = whole else {
        return worker.send_many(to, batch).stopped;
    };
    let mut stopped = None;
    while batch.split_into(whole) > 0 {
        stopped = stopped.or(worker.send_many(to, whole).stopped);
        whole.clear();
    }
    stopped
}

/// Packets that superpackets are cut into at once: what [`Worker::send_many`] looks at together.
pub const CUT: usize = 128;

impl Handler for Wire {
    fn packets(&mut self, worker: &mut Worker, port: PortId, batch: &mut Batch) {
        let other = self.ends[usize::from(port == self.ends[0])];
        let _stopped = pass_on(worker, other, batch, self.whole.as_mut());
    }
}

/// An [`Engine`] of one worker with the handler [`Wire`].
#[derive(Clone, Debug)]
pub struct ByEngine {
    /// Its name in reports.
    pub name: String,
    /// How its worker is made.
    pub config: WorkerConfig,
    /// Of its devices.
    pub offloads: Offloads,
    /// Whether superpackets are cut before they are sent, so that they have to be merged again.
    pub cut: bool,
}

impl Carrier for ByEngine {
    fn name(&self) -> &str {
        &self.name
    }

    fn open(&self, ends: [&Namespace; 2], device: &str) -> io::Result<Opened> {
        let open = || {
            let builder = Builder::new(device, Mode::Tun).offloads(self.offloads);
            builder.open().map_err(io::Error::from)
        };
        let [near, far]: [MultiQueue; 2] = open_both(ends, open)?;
        let (config, cut) = (self.config.clone(), self.cut);
        Ok(Box::new(move |cpu| {
            let engine = Engine::builder()
                .device(near)
                .device(far)
                .placement(cpu.map_or(Placement::Unpinned, |cpu| Placement::Cores(vec![cpu])))
                .config(config)
                .start(move |seat| {
                    let wire = Wire::new(seat).ok_or("two devices are needed")?;
                    Ok(if cut { wire.cutting() } else { wire })
                })?;
            Ok(Box::new(engine))
        }))
    }
}

impl Carrying for Engine<Wire> {
    fn cpu_time(&mut self) -> io::Result<Duration> {
        self.run_on(0, |_, _| process::thread_cpu_time())
            .map_err(io::Error::from)
    }
}

/// Which CPU each part of the test stays on; `None`: wherever the scheduler puts it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Places {
    /// The carrying threads.
    pub carrier: Option<usize>,
    /// What sends: iperf3's client, the generator.
    pub sender: Option<usize>,
    /// What receives: iperf3's server, the counting receiver.
    pub receiver: Option<usize>,
}

impl Places {
    /// Everything wherever the scheduler puts it.
    pub const FREE: Self = Self {
        carrier: None,
        sender: None,
        receiver: None,
    };

    /// The carrier alone on the last CPU, the sender on the first, the receiver on the last but one.
    ///
    /// # Errors
    /// The kernel does not tell which CPUs there are.
    pub fn apart() -> io::Result<Self> {
        let cpus = process::allowed_cpus()?;
        let from_end = |back: usize| cpus[cpus.len().saturating_sub(back)];
        Ok(Self {
            carrier: Some(from_end(1)),
            sender: Some(cpus[0]),
            receiver: Some(from_end(2)),
        })
    }
}

impl fmt::Display for Places {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if *self == Self::FREE {
            return f.write_str("everything on any CPU");
        }
        let place = |cpu: Option<usize>| cpu.map_or("on any CPU".to_owned(), |cpu| format!("on CPU {cpu}"));
        write!(
            f,
            "carrier {}, sender {}, receiver {}",
            place(self.carrier),
            place(self.sender),
            place(self.receiver)
        )
    }
}

/// One transfer by TCP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Transfer {
    /// TCP connections at once.
    pub streams: usize,
    /// How long: whole seconds, at least one, as iperf3 takes no other.
    pub time: Duration,
}

/// Datagrams in one direction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Datagrams {
    /// Packets per second; `None`: as many as the generator can.
    pub rate: Option<u64>,
    /// Length of each IP packet.
    pub packet_len: usize,
    /// How many flows take turns.
    pub flows: usize,
    /// How long.
    pub time: Duration,
    /// Where they end.
    pub end: DatagramsEnd,
}

/// Where datagrams end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DatagramsEnd {
    /// A [`Sink`] behind the far device drops them, and the device counts: nothing disturbs the carrier.
    Sink,
    /// A thread receives each, checks that it is whole and in order, and takes its latency. With few CPUs it has to share one.
    Receiver,
}

/// How the carriers did with datagrams.
#[derive(Clone, Debug)]
pub struct Datagramed {
    /// Per round and way, besides the usual: `sent_pps`, `received_pps`, `gbit_per_s`, `lost_ppm` and where: `dropped_queue_ppm` (the near device's
    /// queue was full), `dropped_socket_ppm` (the receiver was too slow), `unexplained` (packets of which nobody knows). With a receiver `p50_us`
    /// and `p99_us`, too.
    pub report: Report,
    /// Per way: latency in nanoseconds of all packets of the rounds that count, from the time at which each was due. Empty without a receiver.
    pub latency: Vec<Histogram<u64>>,
}

/// What iperf3 calls itself: `iperf 3.12`.
///
/// # Errors
/// `NotFound` if there is none.
pub fn iperf3_version() -> io::Result<String> {
    let output = Command::new("iperf3").arg("--version").output()?;
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let words: Vec<&str> = said.split_whitespace().take(2).collect();
    Ok(words.join(" "))
}

/// Runs a transfer over a wire of each configuration in turn, as [`tcp`] does, the worker on the first CPU.
///
/// # Errors
/// As [`tcp`].
pub fn wire(
    sandbox: &Sandbox,
    ways: &[(&str, WorkerConfig)],
    transfer: Transfer,
    plan: &Plan,
    progress: Progress<'_>,
) -> io::Result<Report> {
    let engines: Vec<ByEngine> = ways
        .iter()
        .map(|(name, config)| ByEngine {
            name: (*name).to_owned(),
            config: config.clone(),
            offloads: Offloads::none(),
            cut: false,
        })
        .collect();
    let ways: Vec<&dyn Carrier> = engines.iter().map(|engine| engine as &dyn Carrier).collect();
    let places = Places {
        carrier: process::allowed_cpus()?.first().copied(),
        ..Places::FREE
    };
    tcp(sandbox, &ways, transfer, places, plan, progress)
}

/// Runs a transfer by iperf3 over each carrier in turn. All wires exist from the beginning, and those whose turn it is not have nothing to do.
///
/// # Errors
/// `NotFound` if there is no iperf3; what the carrier, the kernel or iperf3 says.
pub fn tcp(
    _: &Sandbox,
    ways: &[&dyn Carrier],
    transfer: Transfer,
    places: Places,
    plan: &Plan,
    progress: Progress<'_>,
) -> io::Result<Report> {
    iperf3_version()?;
    let mut stages = Vec::with_capacity(ways.len());
    for way in ways {
        let stage = Stage::open(*way, places)?;
        let server = Server::start(&stage, places)?;
        stages.push((stage, server));
    }
    measure::compare(plan, &names(ways), |turn| {
        progress(turn)?;
        let (stage, _) = &mut stages[turn.way];
        stage
            .transfer(transfer, places)
            .map_err(|error| told(ways[turn.way], &error))
    })
}

/// Sends datagrams over each carrier in turn. All wires exist from the beginning, and those whose turn it is not have nothing to do.
///
/// # Errors
/// What the carrier or the kernel says; InvalidData where packets were doubled, reordered within a flow, or changed.
pub fn datagrams(
    _: &Sandbox,
    ways: &[&dyn Carrier],
    load: Datagrams,
    places: Places,
    plan: &Plan,
    progress: Progress<'_>,
) -> io::Result<Datagramed> {
    let mut stages = ways
        .iter()
        .map(|way| Stage::open(*way, places))
        .collect::<io::Result<Vec<_>>>()?;
    let empty = Histogram::new_with_bounds(1, 1 << 32, 3).map_err(io::Error::other)?;
    let mut latency = vec![empty; ways.len()];
    let report = measure::compare(plan, &names(ways), |turn| {
        progress(turn)?;
        let (sample, receiver) = stages[turn.way]
            .datagrams(load, places)
            .map_err(|error| told(ways[turn.way], &error))?;
        if turn.round >= plan.warm_up {
            let own = receiver.as_ref().map(Receiver::latency);
            own.map_or(Ok(()), |own| latency[turn.way].add(own))
                .map_err(io::Error::other)?;
        }
        Ok(sample)
    })?;
    Ok(Datagramed { report, latency })
}

/// Two namespaces with a carrier between them.
struct Stage {
    // Dropped before the namespaces, after its devices.
    carrying: Box<dyn Carrying>,
    netlinks: [(Handle, u32); 2],
    near: Namespace,
    far: Namespace,
}

struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        for (netlink, index) in &self.netlinks {
            // It may have gone with its carrier.
            let _ = netlink.delete(*index);
        }
    }
}

const DEVICE: &str = "wire0";
const MTU: u32 = 1500;
/// The kernel's own default for a TUN device.
const TXQUEUELEN: u32 = 500;
const NEAR: Ipv4Addr = Ipv4Addr::new(10, 250, 0, 1);
const FAR: Ipv4Addr = Ipv4Addr::new(10, 250, 0, 2);
/// An address that nobody has: for what ends in a sink.
const BEYOND: Ipv4Addr = Ipv4Addr::new(10, 250, 0, 3);
const DISCARD: u16 = 9;

/// Bytes of a TCP segment at an MTU of 1500 with timestamps.
const SEGMENT: f64 = 1448.0;

/// How long nothing has to move before what has not arrived is given up.
const SETTLE: Duration = Duration::from_millis(500);

impl Stage {
    fn open(way: &dyn Carrier, places: Places) -> io::Result<Self> {
        let (near, far) = (Namespace::new()?, Namespace::new()?);
        let opened = way.open([&near, &far], DEVICE).map_err(|error| told(way, &error))?;
        let set_up = |end: &Namespace, address: Ipv4Addr| {
            end.run(|| {
                let netlink = Handle::new()?;
                let index = netlink.index_of(DEVICE)?;
                netlink.set_mtu(index, MTU)?;
                netlink.set_txqueuelen(index, TXQUEUELEN)?;
                netlink.add_address(index, address.into(), 24)?;
                netlink.set_up(index, true)?;
                io::Result::Ok((netlink, index))
            })?
        };
        let netlinks = [set_up(&near, NEAR)?, set_up(&far, FAR)?];
        Ok(Self {
            carrying: opened(places.carrier).map_err(|error| told(way, &error))?,
            netlinks,
            near,
            far,
        })
    }

    fn stats(&self, end: usize) -> io::Result<LinkStats> {
        let (netlink, index) = &self.netlinks[end];
        netlink.stats(*index)
    }

    fn transfer(&mut self, transfer: Transfer, places: Places) -> io::Result<Sample> {
        let (before, machine) = (self.carrying.cpu_time()?, MachineCpu::now()?);
        let answer = self.ask(transfer, places)?;
        let machine = MachineCpu::now()?.since(&machine).busy();
        let spent = self.carrying.cpu_time()?.saturating_sub(before);
        let found = |pointer: &str| {
            let end = answer.pointer(pointer).and_then(Value::as_f64);
            end.ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, format!("iperf3 said nothing of {pointer}")))
        };
        let (bytes, seconds) = (found("/end/sum_received/bytes")?, found("/end/sum_received/seconds")?);
        Ok(Sample {
            packets: (bytes / SEGMENT) as u64,
            cpu: spent,
            wall: Duration::from_secs_f64(seconds),
            figures: vec![
                ("gbit_per_s", bytes * 8e-9 / seconds),
                ("cpu_s_per_gb", spent.as_secs_f64() / (bytes * 1e-9)),
                ("machine_cpu_s_per_gb", machine.as_secs_f64() / (bytes * 1e-9)),
                ("retransmits", found("/end/sum_sent/retransmits")?),
            ],
        })
    }

    /// What the client says, as JSON. The server may still be busy with its start or with the client before.
    fn ask(&self, transfer: Transfer, places: Places) -> io::Result<Value> {
        let deadline = Instant::now() + Duration::from_secs(10);
        let seconds = transfer.time.as_secs().max(1);
        // A transfer that hangs is an error, and not the end of the measurement.
        let bound = (seconds + 15).to_string();
        loop {
            let output = self.near.run(|| {
                pin(places.sender)?;
                Command::new("timeout")
                    .args([&bound, "iperf3", "-c", &FAR.to_string(), "-J"])
                    .args(["-t", &seconds.to_string(), "-P", &transfer.streams.to_string()])
                    .output()
            })??;
            let said = String::from_utf8_lossy(&output.stdout).into_owned();
            // It ends with 0 even where it failed; then there is an error in what it says.
            let answer = serde_json::from_str::<Value>(&said).ok();
            let error = answer.as_ref().and_then(|answer| answer.get("error")).cloned();
            match (answer, error) {
                (Some(answer), None) if output.status.success() => return Ok(answer),
                (_, error) if Instant::now() > deadline => {
                    let why = error.map_or(said, |error| error.to_string());
                    return Err(io::Error::other(format!("iperf3 failed, {}: {why}", output.status)));
                }
                _ => thread::sleep(Duration::from_millis(50)),
            }
        }
    }

    fn datagrams(&mut self, load: Datagrams, places: Places) -> io::Result<(Sample, Option<Receiver>)> {
        match load.end {
            DatagramsEnd::Sink => Ok((self.drop_behind(load, places)?, None)),
            DatagramsEnd::Receiver => {
                let (sample, receiver) = self.receive_behind(load, places)?;
                Ok((sample, Some(receiver)))
            }
        }
    }

    fn drop_behind(&mut self, load: Datagrams, places: Places) -> io::Result<Sample> {
        let index = self.netlinks[1].1;
        let _sink = self.far.run(|| Sink::behind(index))??;
        let (before, start) = (self.carrying.cpu_time()?, self.passed()?);
        let generated = self.generate(load, places, BEYOND)?;
        let passed = self.settle(start, generated.sent)?;
        let spent = self.carrying.cpu_time()?.saturating_sub(before);
        let received = passed.arrived - start.arrived;
        let drops = Drops {
            queue: passed.dropped - start.dropped,
            socket: 0,
        };
        Ok(datagram_sample(
            load,
            &generated,
            received,
            generated.wall,
            &drops,
            spent,
        ))
    }

    fn receive_behind(&mut self, load: Datagrams, places: Places) -> io::Result<(Sample, Receiver)> {
        let stop = AtomicBool::new(false);
        let mut receiver = self
            .far
            .run(|| SocketReceiver::bind((FAR, DISCARD).into(), Receiver::new(load.flows)))??;
        let (before, start) = (self.carrying.cpu_time()?, self.passed()?);
        let (generated, passed) = thread::scope(|scope| {
            let receive = thread::Builder::new()
                .name("receive".to_owned())
                .spawn_scoped(scope, || {
                    pin(places.receiver)?;
                    receiver.run(Until::default(), &stop)
                })?;
            let generated = self.generate(load, places, FAR);
            let passed = generated
                .as_ref()
                .map_or(Ok(start), |generated| self.settle(start, generated.sent));
            stop.store(true, Ordering::Relaxed);
            receive
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
            io::Result::Ok((generated?, passed?))
        })?;
        let spent = self.carrying.cpu_time()?.saturating_sub(before);
        let drops = Drops {
            queue: passed.dropped - start.dropped,
            socket: receiver.dropped()?,
        };
        let mut receiver = receiver.into_receiver();
        generated.tell(receiver.tracker_mut());
        let summary = receiver.summary();
        if summary.late + summary.duplicates + summary.damaged + summary.invented > 0 {
            return Err(io::Error::new(io::ErrorKind::InvalidData, summary.to_string()));
        }
        let wall = receiver.span().max(generated.wall);
        let mut sample = datagram_sample(load, &generated, summary.received, wall, &drops, spent);
        let micros = |share: f64| receiver.latency().value_at_quantile(share) as f64 / 1e3;
        sample
            .figures
            .extend([("p50_us", micros(0.5)), ("p99_us", micros(0.99))]);
        Ok((sample, receiver))
    }

    fn passed(&self) -> io::Result<Passed> {
        Ok(Passed {
            dropped: self.stats(0)?.tx_dropped,
            arrived: self.stats(1)?.rx_packets,
        })
    }

    /// Waits until all of the `sent` packets have arrived or were dropped, or nothing has moved for long. A carrier that has to wait for its CPU
    /// takes a while to empty the queue.
    fn settle(&self, start: Passed, sent: u64) -> io::Result<Passed> {
        let mut last = self.passed()?;
        let mut moved = Instant::now();
        while last.dropped + last.arrived < start.dropped + start.arrived + sent && moved.elapsed() < SETTLE {
            thread::sleep(Duration::from_millis(1));
            let now = self.passed()?;
            if now != last {
                (last, moved) = (now, Instant::now());
            }
        }
        Ok(last)
    }

    fn generate(&self, load: Datagrams, places: Places, target: Ipv4Addr) -> io::Result<Generated> {
        let config = Config {
            flows: load.flows,
            length: load.packet_len,
            rate: load.rate,
            limit: Limit::Time(load.time),
            window: Duration::from_micros(5),
            cpu: places.sender,
            ..Config::new((target, DISCARD).into())
        };
        self.near
            .run(|| Generator::new(&config)?.run(&AtomicBool::new(false)))?
    }
}

/// What the devices have counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Passed {
    /// In the near device's queue.
    dropped: u64,
    /// At the far device.
    arrived: u64,
}

/// Where packets were lost.
struct Drops {
    queue: u64,
    socket: u64,
}

fn datagram_sample(
    load: Datagrams,
    generated: &Generated,
    received: u64,
    wall: Duration,
    drops: &Drops,
    spent: Duration,
) -> Sample {
    let share = |packets: f64| packets * 1e6 / generated.sent.max(1) as f64;
    let lost = generated.sent as f64 - received as f64;
    let pps = received as f64 / wall.as_secs_f64();
    Sample {
        packets: received,
        cpu: spent,
        wall,
        figures: vec![
            ("sent_pps", generated.rate()),
            ("received_pps", pps),
            ("gbit_per_s", pps * load.packet_len as f64 * 8e-9),
            ("lost_ppm", share(lost)),
            ("dropped_queue_ppm", share(drops.queue as f64)),
            ("dropped_socket_ppm", share(drops.socket as f64)),
            ("unexplained", lost - drops.queue as f64 - drops.socket as f64),
        ],
    }
}

impl Server {
    fn start(stage: &Stage, places: Places) -> io::Result<Self> {
        let child = stage.far.run(|| {
            pin(places.receiver)?;
            Command::new("iperf3")
                .args(["-s", "-B", &FAR.to_string()])
                .stdout(Stdio::null())
                .spawn()
        })??;
        Ok(Self(child))
    }
}

fn pin(cpu: Option<usize>) -> io::Result<()> {
    cpu.map_or(Ok(()), process::pin_thread)
}

fn names<'a>(ways: &[&'a dyn Carrier]) -> Vec<&'a str> {
    ways.iter().map(|way| way.name()).collect()
}

fn told(way: &dyn Carrier, error: &io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("{}: {error}", way.name()))
}
