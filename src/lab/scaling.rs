//! Several queues and workers: how fast an engine empties them, and what an engine costs beside a bare worker loop.
//!
//! The queues of one device are filled while all workers stand at a gate; then the gate opens, and what counts is the time until the last
//! packet was handled. So the kernel's sending side, which shares the cores with the workers on a small machine, is not part of it. The
//! flows are chosen so that each queue gets as many.

use std::io;
use std::net::UdpSocket;
use std::sync::mpsc::{self, Receiver, Sender};
use std::thread;
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;

use super::Sandbox;
use super::cases::{DISCARD, Net, Progress};
use super::measure::{self, Plan, Report, Sample, Spread};
use super::process;
use super::results::{Scaling, Setup};
use crate::sys::cpu;
use crate::{Batch, Builder, Engine, Handler, Mode, MultiQueue, Placement, PortId, Worker, WorkerConfig};

/// How much load makes one sample.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stretch {
    /// Length of each IP packet in bytes.
    pub packet_len: usize,
    /// Packets per queue that are handled at once.
    pub packets_per_queue: usize,
    /// Flows per queue.
    pub flows_per_queue: usize,
    /// How often the queues are filled and emptied.
    pub stretches: usize,
}

impl Default for Stretch {
    fn default() -> Self {
        Self {
            packet_len: 64,
            packets_per_queue: 2048,
            flows_per_queue: 8,
            stretches: 20,
        }
    }
}

/// One way to empty the queues.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Crew {
    /// One queue and a loop over a worker, without an engine.
    Bare,
    /// An engine, perhaps with histograms.
    Engine {
        queues: usize,
        workers: usize,
        histograms: bool,
    },
}

impl Crew {
    fn queues(self) -> usize {
        match self {
            Crew::Bare => 1,
            Crew::Engine { queues, .. } => queues,
        }
    }

    fn workers(self) -> usize {
        match self {
            Crew::Bare => 1,
            Crew::Engine { workers, .. } => workers,
        }
    }

    fn name(self) -> String {
        let count = |count: usize, what: &str| format!("{count} {what}{}", if count == 1 { "" } else { "s" });
        match self {
            Crew::Bare => "1 queue, a bare worker loop".to_owned(),
            Crew::Engine {
                queues,
                workers,
                histograms,
            } => {
                let with = if histograms { ", histograms" } else { "" };
                format!("{}, {}{with}", count(queues, "queue"), count(workers, "worker"))
            }
        }
    }
}

/// How throughput grows from one queue to as many as there are CPUs. The rows: one queue with one worker; `n` queues with one worker; `n`
/// queues with `n` workers. Also, beside a bare worker loop as the baseline, an engine with one queue and one worker, without and with histograms.
///
/// # Errors
/// What the engine or the kernel says; InvalidData where a packet is missing.
pub fn scaling(_: &Sandbox, stretch: Stretch, plan: &Plan, progress: Progress<'_>) -> io::Result<(Scaling, Report)> {
    let many = cpu::allowed()?.len().clamp(2, 8);
    let engine = |queues, workers, histograms| Crew::Engine {
        queues,
        workers,
        histograms,
    };
    let crews = [
        Crew::Bare,
        engine(1, 1, false),
        engine(many, 1, false),
        engine(many, many, false),
        engine(1, 1, true),
        engine(many, many, true),
    ];
    let names: Vec<String> = crews.iter().map(|crew| crew.name()).collect();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    let mut hand_over = Vec::new();
    let mut shares: Vec<Vec<u64>> = crews.iter().map(|crew| vec![0; crew.queues()]).collect();
    let report = measure::compare(plan, &names, |turn| {
        progress(turn)?;
        let run = one_run(crews[turn.way], stretch)?;
        for (share, handled) in shares[turn.way].iter_mut().zip(run.handled) {
            *share += handled;
        }
        if turn.round >= plan.warm_up && !run.hand_over.is_empty() && crews[turn.way].workers() == many {
            merge(&mut hand_over, run.hand_over)?;
        }
        Ok(run.sample)
    })?;
    let pps = |way: usize| -> Vec<f64> {
        let samples = report.ways[way].samples.iter();
        samples
            .map(|sample| sample.packets as f64 / sample.wall.as_secs_f64())
            .collect()
    };
    let first = pps(1);
    let rows = (1..4)
        .map(|way| {
            let own = pps(way);
            let ratios: Vec<f64> = own.iter().zip(&first).map(|(own, first)| own / first).collect();
            let all: u64 = shares[way].iter().sum();
            Ok(Setup {
                name: crews[way].name(),
                queues: crews[way].queues(),
                workers: crews[way].workers(),
                pps: Spread::of(&own).ok_or_else(|| io::Error::other("no round"))?,
                ratio: if way == 1 { None } else { Spread::of(&ratios) },
                hand_over: if way == 3 {
                    std::mem::take(&mut hand_over)
                } else {
                    Vec::new()
                },
                per_queue_share: shares[way].iter().map(|&share| share as f64 / all as f64).collect(),
            })
        })
        .collect::<io::Result<Vec<Setup>>>()?;
    let mut beside = report;
    // What has one queue and one worker.
    let mut way = 0;
    beside.ways.retain(|_| {
        way += 1;
        [0, 1, 4].contains(&(way - 1))
    });
    let scaling = Scaling {
        title: format!("{many} queues with as many packets each are emptied at once"),
        packet_bytes: stretch.packet_len,
        flows: stretch.flows_per_queue * many,
        rows,
    };
    Ok((scaling, beside))
}

/// Counts, and says when it had as many as it was to have.
#[derive(Default)]
struct Counting {
    left: usize,
    done: Option<Sender<Done>>,
    /// The thread's CPU time when the gate opened.
    cpu: Duration,
    /// What to wait for before going on, while the queues are filled.
    gate: Option<Receiver<()>>,
    /// Which port is which queue.
    queues: Vec<(PortId, usize)>,
    /// Per packet its queue and source port, while flows are being found.
    seen: Option<Vec<(usize, u16)>>,
}

impl Handler for Counting {
    fn packets(&mut self, _: &mut Worker, port: PortId, batch: &mut Batch) {
        let count = batch.len();
        if let Some(seen) = &mut self.seen {
            let queue = self
                .queues
                .iter()
                .find(|(id, _)| *id == port)
                .map_or(0, |&(_, queue)| queue);
            let packets = batch
                .iter()
                .filter(|packet| packet.len() > HEADERS && packet[0] == 0x45);
            seen.extend(packets.map(|packet| (queue, u16::from_be_bytes([packet[20], packet[21]]))));
        }
        // Not by `clear`, which would count them as discarded.
        drop(batch.drain());
        if self.left > 0 {
            self.left = self.left.saturating_sub(count);
            if let (0, Some(done)) = (self.left, &self.done) {
                // Nobody listens any more only if the measurement failed.
                let _ = done.send(Done {
                    at: Instant::now(),
                    cpu: process::thread_cpu_time() - self.cpu,
                });
            }
        }
    }

    fn flush(&mut self, _: &mut Worker) {
        if let Some(gate) = self.gate.take() {
            // It opens by being dropped.
            let _ = gate.recv();
            self.cpu = process::thread_cpu_time();
        }
    }
}

/// A worker has handled all that it was to have.
struct Done {
    at: Instant,
    /// What it took of the thread.
    cpu: Duration,
}

/// IPv4 without options, and UDP.
const HEADERS: usize = 28;

/// How long the last packet may take.
const PATIENCE: Duration = Duration::from_secs(10);

/// What one turn gave.
struct Run {
    sample: Sample,
    /// Packets per queue.
    handled: Vec<u64>,
    /// Per worker, from its wake-up to the handler, in nanoseconds; empty if it was not recorded.
    hand_over: Vec<Histogram<u64>>,
}

fn one_run(crew: Crew, stretch: Stretch) -> io::Result<Run> {
    let net = Net::next();
    let device = Builder::new(&net.name, Mode::Tun)
        .queues(crew.queues())
        .address(net.address(1), 24)
        .txqueuelen(stretch.packets_per_queue as u32 + 64)
        .up(true)
        .open()?;
    match crew {
        Crew::Bare => bare(device, &net, stretch),
        Crew::Engine { .. } => engine(device, &net, crew, stretch),
    }
}

/// In a loop of its own on the last CPU.
fn bare(device: MultiQueue, net: &Net, stretch: Stretch) -> io::Result<Run> {
    let sockets = flows(net, stretch.flows_per_queue)?;
    let last = *cpu::allowed()?.last().unwrap_or(&0);
    let (done, ended) = mpsc::channel();
    let (go, going) = mpsc::channel::<()>();
    thread::scope(|scope| {
        let worker = thread::Builder::new()
            .name("bare".to_owned())
            .spawn_scoped(scope, move || {
                cpu::pin_thread(last)?;
                let mut worker = Worker::new(&WorkerConfig::default())?;
                for queue in device.into_queues() {
                    worker.attach(queue)?;
                }
                let mut batch = Batch::with_capacity(64);
                let mut counting = Counting {
                    done: Some(done),
                    ..Counting::default()
                };
                while going.recv().is_ok() {
                    counting.left = stretch.packets_per_queue;
                    counting.cpu = process::thread_cpu_time();
                    while counting.left > 0 {
                        if worker.wait(Some(Instant::now() + PATIENCE))?.timer {
                            return Err(missing());
                        }
                        while let Some(port) = worker.next_ready() {
                            if worker.try_recv_many(port, &mut batch)? > 0 {
                                counting.packets(&mut worker, port, &mut batch);
                            }
                        }
                    }
                }
                io::Result::Ok(())
            })?;
        let mut sample = Sample::default();
        let result = (0..stretch.stretches).try_for_each(|_| {
            fill(std::slice::from_ref(&sockets), stretch)?;
            let start = Instant::now();
            let _ = go.send(());
            sample.packets += stretch.packets_per_queue as u64;
            let done: Done = ended.recv_timeout(PATIENCE).map_err(|_| missing())?;
            sample.wall += done.at - start;
            sample.cpu += done.cpu;
            io::Result::Ok(())
        });
        drop(go);
        worker.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
        result?;
        let handled = vec![sample.packets];
        Ok(Run {
            sample,
            handled,
            hand_over: Vec::new(),
        })
    })
}

fn engine(device: MultiQueue, net: &Net, crew: Crew, stretch: Stretch) -> io::Result<Run> {
    let (queues, workers) = (crew.queues(), crew.workers());
    // A single one where the bare loop is, too.
    let placement = match workers {
        1 => Placement::Cores(cpu::allowed()?.last().copied().into_iter().collect()),
        _ => Placement::OnePerCore,
    };
    let engine = Engine::builder()
        .device(device)
        .workers(workers)
        .placement(placement)
        .histograms(matches!(crew, Crew::Engine { histograms: true, .. }))
        .start(|seat| {
            let ports = seat.ports().iter();
            Ok(Counting {
                queues: ports.map(|port| (port.id, port.number)).collect(),
                ..Counting::default()
            })
        })?;
    let sockets = balanced_flows(&engine, net, queues, stretch)?;
    let mut sample = Sample::default();
    let (done, ended) = mpsc::channel();
    for _ in 0..stretch.stretches {
        let gates = (0..workers)
            .map(|worker| {
                let (open, gate) = mpsc::channel();
                let done = done.clone();
                engine.run_on(worker, move |handler, _| {
                    handler.left = handler.queues.len() * stretch.packets_per_queue;
                    handler.done = Some(done);
                    handler.gate = Some(gate);
                })?;
                Ok(open)
            })
            .collect::<io::Result<Vec<Sender<()>>>>()?;
        fill(&sockets, stretch)?;
        let start = Instant::now();
        drop(gates);
        let mut end = start;
        for _ in 0..workers {
            let done: Done = ended.recv_timeout(PATIENCE).map_err(|_| missing())?;
            end = end.max(done.at);
            sample.cpu += done.cpu;
        }
        sample.packets += (queues * stretch.packets_per_queue) as u64;
        sample.wall += end - start;
    }
    let stats = engine.stats();
    let mut handled = vec![0; queues];
    for worker in &stats.workers {
        for port in &worker.ports {
            let queue = port
                .name
                .rsplit_once(":q")
                .and_then(|(_, number)| number.parse::<usize>().ok());
            if let Some(handled) = queue.and_then(|queue| handled.get_mut(queue)) {
                *handled = port.counters.received_packets;
            }
        }
    }
    let hand_over = match crew {
        Crew::Engine { histograms: true, .. } => (0..workers)
            .map(|worker| Ok(engine.worker_histograms(worker, PATIENCE)?.wake_to_handler_ns))
            .collect::<io::Result<_>>()?,
        _ => Vec::new(),
    };
    Ok(Run {
        sample,
        handled,
        hand_over,
    })
}

/// Adds histograms place by place.
fn merge(sums: &mut Vec<Histogram<u64>>, more: Vec<Histogram<u64>>) -> io::Result<()> {
    for (place, histogram) in more.into_iter().enumerate() {
        match sums.get_mut(place) {
            Some(sum) => sum.add(&histogram).map_err(io::Error::other)?,
            None => sums.push(histogram),
        }
    }
    Ok(())
}

/// Per queue, sockets of flows that come to it.
fn balanced_flows(
    engine: &Engine<Counting>,
    net: &Net,
    queues: usize,
    stretch: Stretch,
) -> io::Result<Vec<Vec<UdpSocket>>> {
    // Three times as many as are needed: a queue that gets less than a third of its share would be a strange hash.
    let candidates = flows(net, 3 * queues * stretch.flows_per_queue)?;
    for worker in 0..engine.workers().len() {
        engine.run_on(worker, |handler, _| handler.seen = Some(Vec::new()))?;
    }
    candidates
        .iter()
        .try_for_each(|socket| socket.send(&[0; 8]).map(drop))?;
    let deadline = Instant::now() + PATIENCE;
    let mut seen = Vec::new();
    while seen.len() < candidates.len() {
        if Instant::now() > deadline {
            return Err(missing());
        }
        thread::sleep(Duration::from_millis(1));
        for worker in 0..engine.workers().len() {
            seen.extend(engine.run_on(worker, |handler, _| {
                std::mem::take(handler.seen.get_or_insert_default())
            })?);
        }
    }
    for worker in 0..engine.workers().len() {
        engine.run_on(worker, |handler, _| handler.seen = None)?;
    }
    let mut chosen: Vec<Vec<UdpSocket>> = (0..queues).map(|_| Vec::new()).collect();
    for socket in candidates {
        let port = socket.local_addr()?.port();
        let queue = seen.iter().find(|(_, source)| *source == port).map(|&(queue, _)| queue);
        if let Some(sockets) = queue.and_then(|queue| chosen.get_mut(queue))
            && sockets.len() < stretch.flows_per_queue
        {
            sockets.push(socket);
        }
    }
    if chosen.iter().any(Vec::is_empty) {
        return Err(io::Error::other("no flow was found for one of the queues"));
    }
    Ok(chosen)
}

/// Sockets of so many flows into the device.
fn flows(net: &Net, count: usize) -> io::Result<Vec<UdpSocket>> {
    let one = || {
        let socket = UdpSocket::bind((net.address(1), 0))?;
        socket.connect(net.peer(DISCARD))?;
        Ok(socket)
    };
    (0..count).map(|_| one()).collect()
}

/// Sends what the queues are to get; from the first CPU always, because packets are read faster where they were made.
fn fill(queues: &[Vec<UdpSocket>], stretch: Stretch) -> io::Result<()> {
    let payload = vec![0; stretch.packet_len.saturating_sub(HEADERS)];
    let first = *cpu::allowed()?.first().unwrap_or(&0);
    let send = || {
        cpu::pin_thread(first)?;
        queues.iter().try_for_each(|sockets| {
            (0..stretch.packets_per_queue)
                .try_for_each(|number| sockets[number % sockets.len()].send(&payload).map(drop))
        })
    };
    thread::scope(|scope| {
        let sender = thread::Builder::new()
            .name("fill".to_owned())
            .spawn_scoped(scope, send)?;
        sender.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

fn missing() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, "a packet did not come through")
}
