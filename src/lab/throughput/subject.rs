//! What is measured: an engine, or plain loops, on the queues of a device.

use std::io;
use std::mem;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver as Commands, Sender};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use super::Mode;
use crate::lab::generator::Schedule;
use crate::lab::monotonic_ns;
use crate::lab::packet::Spec;
use crate::lab::process::thread_cpu_time;
use crate::lab::receiver::Receiver;
use crate::stats::WorkerCounters;
use crate::worker::{PortId, Waker};
use crate::{
    Batch, Counters, Engine, Handler, MultiQueue, Placement, PortErrorKind, Queue, Seat, StatsReader, Worker,
    WorkerConfig,
};

/// An engine or plain loops, one thread a queue.
pub(super) enum Subject {
    Engine(Engine<Server>),
    Loops(Vec<Loop>),
}

/// What all threads have done since they were made.
#[derive(Clone, Debug, Default)]
pub(super) struct Reading {
    /// Of each queue that packets come from (or, for sending, go to).
    pub(super) queues: Vec<Counters>,
    /// Of all ports.
    pub(super) total: Counters,
    pub(super) workers: WorkerCounters,
    /// CPU time of all threads.
    pub(super) cpu: Duration,
}

/// What a thread was told to send, and did.
#[derive(Clone, Debug, Default)]
pub(super) struct Emitted {
    pub(super) due: u64,
    pub(super) sent: u64,
    pub(super) refused: u64,
    pub(super) wall: Duration,
    /// By flow: sequences 0 to this, exclusive, were sent.
    pub(super) flows: Vec<(u16, u32)>,
}

/// What a thread is to send.
#[derive(Clone, Debug)]
pub(super) struct Emission {
    pub(super) spec: Spec,
    /// Its flows: of `flows` in all, those from `first` on in steps of `step`.
    pub(super) flows: usize,
    pub(super) first: usize,
    pub(super) step: usize,
    pub(super) lengths: Vec<usize>,
    pub(super) rate: Option<u64>,
    pub(super) time: Duration,
    /// Ends it before its time.
    pub(super) stop: &'static AtomicBool,
}

/// Packets that are due within this time go together, in nanoseconds.
const WINDOW: u64 = 20_000;

/// The most packets of one call.
const BATCH: usize = 64;

/// Longer than any packet here.
const LONGEST: usize = 2_048;

impl Subject {
    /// Starts the threads. `second` is where a forwarding engine sends what comes from `first`, and the other way round. Worker `k` runs on the
    /// `k`th of `cpus`. `receiver` is what each queue's books begin as.
    pub(super) fn start(
        mode: Mode,
        first: MultiQueue,
        second: Option<MultiQueue>,
        config: &WorkerConfig,
        cpus: &[usize],
        receiver: &Receiver,
    ) -> io::Result<Self> {
        if matches!(mode, Mode::Recv | Mode::Send | Mode::SendMany) {
            let loops = first.into_queues().into_iter().enumerate();
            return loops
                .map(|(number, queue)| {
                    Loop::start(mode, queue, config.clone(), cpus[number % cpus.len()], receiver.clone())
                })
                .collect::<io::Result<_>>()
                .map(Self::Loops);
        }
        let workers = first.len();
        let mut builder = Engine::builder().device(first);
        if let Some(second) = second {
            builder = builder.device(second);
        }
        let receiver = receiver.clone();
        let engine = builder
            .workers(workers)
            .placement(Placement::Cores(cpus.to_vec()))
            .config(config.clone())
            .start(move |seat: &mut Seat<'_>| {
                Ok(Server {
                    mode,
                    first: seat.port(0).ok_or("the device has no queue for this worker")?,
                    second: seat.port(1),
                    fresh: receiver.clone(),
                    receiver: receiver.clone(),
                    watch: mode == Mode::RecvMany,
                })
            })
            .map_err(io::Error::other)?;
        Ok(Self::Engine(engine))
    }

    /// Begins new books. `watch` says whether packets that are only passed on are looked at, too.
    pub(super) fn begin(&self, watch: bool) -> io::Result<()> {
        match self {
            Self::Engine(engine) => {
                for worker in 0..engine.workers().len() {
                    engine
                        .run_on_within(worker, ANSWER, move |server, _| {
                            server.receiver = server.fresh.clone();
                            server.watch = watch || server.mode == Mode::RecvMany;
                        })
                        .map_err(io::Error::other)?;
                }
                Ok(())
            }
            Self::Loops(loops) => loops.iter().try_for_each(|one| {
                one.ask(|state| {
                    state.receiver = state.fresh.clone();
                })
            }),
        }
    }

    /// Counters as they stand, without asking the threads.
    pub(super) fn counters(&self) -> Reading {
        let mut reading = Reading::default();
        let stats: Vec<_> = match self {
            Self::Engine(engine) => engine.stats().workers,
            Self::Loops(loops) => loops.iter().map(|one| one.stats.read()).collect(),
        };
        for worker in stats {
            reading.total += &worker.total();
            reading.workers += &worker.counters;
            reading
                .queues
                .extend(worker.ports.first().map(|port| port.counters.clone()));
        }
        reading
    }

    /// The same with the threads' CPU time.
    pub(super) fn read(&self) -> io::Result<Reading> {
        let mut cpu = Duration::ZERO;
        match self {
            Self::Engine(engine) => {
                for worker in 0..engine.workers().len() {
                    let spent = engine.run_on_within(worker, ANSWER, |_, _| thread_cpu_time());
                    cpu += spent.map_err(io::Error::other)?;
                }
            }
            Self::Loops(loops) => {
                for one in loops {
                    cpu += one.ask(|_| thread_cpu_time())?;
                }
            }
        }
        Ok(Reading { cpu, ..self.counters() })
    }

    /// The books of each queue since [`begin`](Self::begin).
    pub(super) fn books(&self) -> io::Result<Vec<Receiver>> {
        match self {
            Self::Engine(engine) => (0..engine.workers().len())
                .map(|worker| engine.run_on_within(worker, ANSWER, |server, _| server.receiver.clone()))
                .collect::<Result<_, _>>()
                .map_err(io::Error::other),
            Self::Loops(loops) => loops
                .iter()
                .map(|one| one.ask(|state| state.receiver.clone()))
                .collect(),
        }
    }

    /// Lets each loop send its share, all at the same time.
    pub(super) fn emit(&self, emission: &Emission) -> io::Result<Emitted> {
        let Self::Loops(loops) = self else {
            return Err(io::Error::other("an engine sends what it receives"));
        };
        let share = |number: usize| Emission {
            first: number,
            step: loops.len(),
            rate: emission.rate.map(|rate| (rate / loops.len() as u64).max(1)),
            ..emission.clone()
        };
        let answers: Vec<_> = loops
            .iter()
            .enumerate()
            .map(|(number, one)| {
                let share = share(number);
                one.post(move |state| state.emit(&share))
            })
            .collect::<io::Result<_>>()?;
        let mut all = Emitted::default();
        for answer in answers {
            let bound = emission.time + ANSWER;
            let one: Emitted = answer.recv_timeout(bound).map_err(|_| ended())?;
            all.due += one.due;
            all.sent += one.sent;
            all.refused += one.refused;
            all.wall = all.wall.max(one.wall);
            all.flows.extend(one.flows);
        }
        Ok(all)
    }

    /// Ends the threads.
    pub(super) fn stop(self) -> io::Result<()> {
        match self {
            Self::Engine(engine) => {
                let report = engine.stop_within(ANSWER);
                if report.is_clean() {
                    Ok(())
                } else {
                    Err(io::Error::other(report.to_string()))
                }
            }
            Self::Loops(loops) => loops.into_iter().try_for_each(Loop::stop),
        }
    }
}

/// How long a thread may take to answer.
const ANSWER: Duration = Duration::from_secs(5);

fn ended() -> io::Error {
    io::Error::other("a worker does not answer; its device is gone, or it is stuck")
}

/// What an engine's worker does with packets: counts them, sends them back, or sends them on.
pub(super) struct Server {
    mode: Mode,
    first: PortId,
    second: Option<PortId>,
    fresh: Receiver,
    receiver: Receiver,
    /// Whether packets are looked at.
    watch: bool,
}

impl Handler for Server {
    fn packets(&mut self, worker: &mut Worker, port: PortId, batch: &mut Batch) {
        if self.watch && port == self.first {
            let now = monotonic_ns();
            for packet in batch.iter() {
                self.receiver.packet(packet, now);
            }
        }
        let out = match self.mode {
            Mode::Echo => {
                let ethernet = self.receiver.has_ethernet();
                batch.retain_mut(|packet| turn_back(packet, ethernet));
                port
            }
            Mode::Forward => match self.second {
                Some(second) if port == self.first => second,
                _ => self.first,
            },
            _ => return,
        };
        // What finds no room is dropped when this returns, and counted.
        let _ = worker.send_many(out, batch);
    }
}

/// Exchanges the addresses of a packet, not its ports: the checksums stay right. `false` for what is not IP.
fn turn_back(packet: &mut [u8], ethernet: bool) -> bool {
    let ip = if ethernet { 14 } else { 0 };
    let Some(first) = packet.get(ip) else { return false };
    let (from, len) = match first >> 4 {
        4 => (ip + 12, 4),
        6 => (ip + 8, 16),
        _ => return false,
    };
    let Some(addresses) = packet.get_mut(from..from + 2 * len) else {
        return false;
    };
    let (source, target) = addresses.split_at_mut(len);
    source.swap_with_slice(target);
    if ethernet {
        let (target, source) = packet[..12].split_at_mut(6);
        target.swap_with_slice(source);
    }
    true
}

/// A thread with a worker and one queue, which receives packet by packet, or sends what it is told to.
pub(super) struct Loop {
    commands: Sender<Command>,
    waker: Waker,
    stats: StatsReader,
    thread: JoinHandle<()>,
}

type Command = Box<dyn FnOnce(&mut State) + Send>;

struct State {
    mode: Mode,
    worker: Worker,
    port: PortId,
    fresh: Receiver,
    receiver: Receiver,
}

impl Loop {
    fn start(mode: Mode, queue: Queue, config: WorkerConfig, cpu: usize, receiver: Receiver) -> io::Result<Self> {
        let (commands, inbox) = mpsc::channel();
        let (ready, opened) = mpsc::channel();
        let thread = thread::Builder::new()
            .name(format!("queue on CPU {cpu}"))
            .spawn(move || {
                let state = crate::sys::cpu::pin_thread(cpu).and_then(|()| {
                    let mut worker = Worker::new(&config).map_err(io::Error::other)?;
                    let port = worker.attach(queue).map_err(io::Error::other)?;
                    Ok(State {
                        mode,
                        worker,
                        port,
                        fresh: receiver.clone(),
                        receiver,
                    })
                });
                match state {
                    Ok(mut state) => {
                        let _ = ready.send(Ok((state.worker.waker(), state.worker.stats_reader())));
                        state.run(&inbox);
                    }
                    Err(error) => drop(ready.send(Err(error))),
                }
            })?;
        let (waker, stats) = opened.recv().map_err(|_| ended())??;
        Ok(Self {
            commands,
            waker,
            stats,
            thread,
        })
    }

    fn post<R: Send + 'static>(
        &self,
        work: impl FnOnce(&mut State) -> R + Send + 'static,
    ) -> io::Result<mpsc::Receiver<R>> {
        let (answer, answered) = mpsc::channel();
        self.commands
            .send(Box::new(move |state| drop(answer.send(work(state)))))
            .map_err(|_| ended())?;
        self.waker.wake();
        Ok(answered)
    }

    fn ask<R: Send + 'static>(&self, work: impl FnOnce(&mut State) -> R + Send + 'static) -> io::Result<R> {
        self.post(work)?.recv_timeout(ANSWER).map_err(|_| ended())
    }

    fn stop(self) -> io::Result<()> {
        self.waker.stop();
        self.thread.join().map_err(|_| io::Error::other("a worker panicked"))
    }
}

impl State {
    fn run(&mut self, inbox: &Commands<Command>) {
        let mut buffer = vec![0; LONGEST];
        loop {
            if self.mode == Mode::Recv {
                // Waits, and returns 0 where it is woken.
                match self.worker.recv(self.port, &mut buffer) {
                    Ok(0) => {}
                    Ok(len) => {
                        self.receiver.packet(&buffer[..len], monotonic_ns());
                        continue;
                    }
                    Err(error) if error.kind() == PortErrorKind::Gone => return,
                    Err(_) => continue, // counted
                }
            }
            let deadline = (self.mode == Mode::Recv).then(std::time::Instant::now);
            match self.worker.wait(deadline) {
                Ok(wake) if !wake.stopped => {}
                _ => return,
            }
            while let Ok(command) = inbox.try_recv() {
                command(self);
            }
        }
    }

    fn emit(&mut self, emission: &Emission) -> Emitted {
        let step = emission.step.max(1);
        let mut flows: Vec<(u16, u32)> = (emission.first..emission.flows)
            .step_by(step)
            .map(|flow| (flow as u16, 0))
            .collect();
        if flows.is_empty() {
            flows.push((emission.first as u16, 0));
        }
        let start = monotonic_ns();
        let schedule = emission.rate.map(|rate| Schedule { start_ns: start, rate });
        let end = start + emission.time.as_nanos() as u64;
        let total = schedule.map_or(u64::MAX, |schedule| schedule.within(emission.time));
        let plain = self.mode == Mode::Send;
        let mut batch = Batch::with_capacity(if plain { 1 } else { BATCH });
        let mut frame = vec![0; LONGEST];
        let mut done = Emitted::default();
        let (mut turn, mut groups) = (0, 0);
        while done.due < total {
            let now = monotonic_ns();
            if now >= end || emission.stop.load(Ordering::Relaxed) {
                break;
            }
            let ready = match schedule {
                None => batch.capacity() as u64,
                Some(schedule) => {
                    // As many as are due within the window, at the time of the last one; one if none is.
                    let mut count = 1;
                    while count < batch.capacity() as u64
                        && schedule.due(done.due + count) <= schedule.due(done.due) + WINDOW
                    {
                        count += 1;
                    }
                    let count = count.min(total - done.due);
                    while monotonic_ns() < schedule.due(done.due + count - 1) {
                        std::hint::spin_loop();
                    }
                    count
                }
            };
            let length = emission.lengths[groups % emission.lengths.len()];
            groups += 1;
            for index in 0..ready {
                let at = turn % flows.len();
                let (flow, sequence) = flows[at];
                let intended = schedule.map_or(now, |schedule| schedule.due(done.due + index));
                let spec = emission.spec.flow(flow);
                if plain {
                    let len = spec.build(&mut frame, length, sequence, intended);
                    match self.worker.send(self.port, &frame[..len]) {
                        Ok(()) => {
                            done.sent += 1;
                            flows[at].1 += 1;
                        }
                        Err(_) => done.refused += 1,
                    }
                } else if let Some(mut packet) = self.worker.packet(spec.framing.len() + length) {
                    spec.build(&mut packet, length, sequence, intended);
                    flows[at].1 += 1;
                    let _room = batch.push(packet);
                } else {
                    done.refused += 1;
                }
                turn += 1;
            }
            done.due += ready;
            while !batch.is_empty() {
                let sent = self.worker.send_many(self.port, &mut batch);
                done.sent += sent.accepted as u64;
                done.refused += sent.refused as u64;
                if sent.accepted + sent.refused == 0 && monotonic_ns() >= end {
                    done.refused += batch.len() as u64;
                    batch.clear();
                }
            }
        }
        done.wall = Duration::from_nanos(monotonic_ns() - start);
        done.flows = mem::take(&mut flows);
        done
    }
}
