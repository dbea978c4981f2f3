//! How an engine is made.

use std::error::Error;
use std::net::UdpSocket;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use crossbeam_channel::{Receiver, Sender};

use super::control::Command;
use super::events::{Answer, Ask, Events, Watch};
use super::handler::Handler;
#[cfg(feature = "metrics")]
use super::histograms::Histograms;
use super::placement::{Pin, Place, Placement, pin, usable_cores};
use super::report::{OnPanic, WorkerEnd, WorkerInfo, WorkerReport};
use super::shared::Shared;
use super::thread::{Thread, message};
use super::{Engine, Link, Stopper};
use crate::buf::Batch;
use crate::device::Device;
use crate::error::{OpenError, OpenErrorKind};
use crate::queue::MultiQueue;
use crate::stats::{StatsReader, WorkerStats};
use crate::sys::forked::Origin;
use crate::worker::{Endpoint, LARGE_BUFFERS, PortId, WakeHandle, Waker, Worker, WorkerConfig};

/// Devices, sockets and settings of an engine that is to be started. Made by [`Engine::builder`].
#[derive(Debug)]
#[must_use = "nothing runs before `start`"]
pub struct EngineBuilder {
    sources: Vec<Source>,
    workers: Option<usize>,
    placement: Placement,
    config: WorkerConfig,
    batch: usize,
    on_panic: OnPanic,
    #[cfg(feature = "metrics")]
    histograms: bool,
}

/// One device, or one group of sockets: what each worker owns one of.
#[derive(Debug)]
struct Source {
    device: Option<Device>,
    endpoints: Vec<(Endpoint, String)>,
}

/// Why a factory could not make a handler.
pub type FactoryError = Box<dyn Error + Send + Sync>;

/// A worker on its own thread, ready for its handler: what the factory builds on.
#[derive(Debug)]
pub struct Seat<'a> {
    worker: &'a mut Worker,
    number: usize,
    pin: &'a Pin,
    ports: &'a [SeatPort],
    stopper: &'a Stopper,
}

/// A port that a worker begins with.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct SeatPort {
    /// Its name on the worker.
    pub id: PortId,
    /// Which device or group of sockets it is of: the count of the calls to [`EngineBuilder`] that
    /// gave one, from 0.
    pub source: usize,
    /// Its number within that: the queue's place among the device's queues, or the socket's in its
    /// group.
    pub number: usize,
}

impl EngineBuilder {
    pub(super) fn new() -> Self {
        Self {
            sources: Vec::new(),
            workers: None,
            placement: Placement::default(),
            config: WorkerConfig::default(),
            batch: 64,
            on_panic: OnPanic::default(),
            #[cfg(feature = "metrics")]
            histograms: false,
        }
    }

    /// Adds a device: worker k serves its queue k, and where there are fewer workers than queues,
    /// they share them in turn.
    pub fn device(mut self, device: MultiQueue) -> Self {
        let settings = device.device().cloned();
        let endpoints = device
            .into_queues()
            .into_iter()
            .enumerate()
            .map(|(number, queue)| {
                let name = format!("{}:q{number}", queue.name());
                (Endpoint::from(queue), name)
            })
            .collect();
        self.sources.push(Source {
            device: settings,
            endpoints,
        });
        self
    }

    /// Adds a group of UDP sockets: worker k serves the k-th. Bound to one address with
    /// SO_REUSEPORT, the kernel spreads flows over them.
    pub fn sockets(mut self, sockets: impl IntoIterator<Item = UdpSocket>) -> Self {
        let endpoints = sockets
            .into_iter()
            .map(|socket| {
                let name = socket
                    .local_addr()
                    .map_or_else(|_| "udp".to_owned(), |at| format!("udp {at}"));
                (Endpoint::from(socket), name)
            })
            .collect();
        self.sources.push(Source {
            device: None,
            endpoints,
        });
        self
    }

    /// Sets the number of workers. Otherwise as many as the largest source has members, but no more
    /// than there are cores.
    pub fn workers(mut self, count: usize) -> Self {
        self.workers = Some(count);
        self
    }

    /// Sets where the workers run: one on each core unless set.
    pub fn placement(mut self, placement: Placement) -> Self {
        self.placement = placement;
        self
    }

    /// Sets how the workers are made: backend, buffers, waiting.
    ///
    /// Each worker takes what [`WorkerConfig::memory`] says, however many queues it serves: its
    /// ports share the buffers. With offloads there are two large buffers for each queue, at least
    /// 128, unless [`WorkerConfig::large_buffers`] is set: about 137 KiB for each queue beyond 64.
    pub fn config(mut self, config: WorkerConfig) -> Self {
        self.config = config;
        self
    }

    /// Sets how many packets a handler gets at once at most: 64 unless set.
    pub fn batch(mut self, packets: usize) -> Self {
        self.batch = packets;
        self
    }

    /// Sets what a handler's panic does to the other workers: they stop unless set.
    pub fn on_panic(mut self, on_panic: OnPanic) -> Self {
        self.on_panic = on_panic;
        self
    }

    /// Keeps [`Histograms`](super::Histograms) of every batch: two clock readings and three
    /// recordings each.
    #[cfg(feature = "metrics")]
    pub fn histograms(mut self, keep: bool) -> Self {
        self.histograms = keep;
        self
    }

    /// Starts the engine with a copy of this closure on each worker.
    ///
    /// # Errors
    /// As [`start`](Self::start).
    pub fn start_fn<F>(self, packets: F) -> Result<Engine<F>, OpenError>
    where
        F: FnMut(&mut Worker, PortId, &mut Batch) + Clone + Send + Sync + 'static,
    {
        self.start(move |_| Ok(packets.clone()))
    }

    /// Starts a thread for each worker; on it makes the worker, attaches its queues and sockets,
    /// and lets `factory` make its handler.
    ///
    /// Returns when all workers are ready; the first of them serve already then.
    ///
    /// # Errors
    /// A setting out of range; what [`Worker::new`] and [`Worker::attach`] say;
    /// [`OpenErrorKind::Factory`] with the words of the factory. All workers have ended and all
    /// devices are closed then.
    pub fn start<H, F>(self, factory: F) -> Result<Engine<H>, OpenError>
    where
        H: Handler + 'static,
        F: Fn(&mut Seat<'_>) -> Result<H, FactoryError> + Send + Sync + 'static,
    {
        let usable = usable_cores();
        let count = self.worker_count(
            usable
                .as_ref()
                .map_or_else(|_| thread::available_parallelism().map_or(1, usize::from), Vec::len),
        )?;
        let cores = self.placement.assign(count, &usable)?;
        let handles = (0..count)
            .map(|_| WakeHandle::new())
            .collect::<Result<Vec<_>, _>>()
            .map_err(|error| {
                let detail = "no descriptor for a worker's doorbell (ulimit -n)";
                OpenError::new(OpenErrorKind::DescriptorLimit, "eventfd", &error, detail)
            })?;
        let (sender, events) = Events::channel();
        let wakers = handles.iter().cloned().map(Waker::new).collect();
        let shared = Arc::new(Shared::new(sender, self.on_panic, wakers));
        let devices = self.devices();
        let settings = Arc::new(Settings {
            config: self.config,
            batch: self.batch,
            #[cfg(feature = "metrics")]
            histograms: self.histograms,
        });
        let factory = Arc::new(factory);
        let mut threads = Vec::with_capacity(count);
        // Dropping it stops and joins what was started by then.
        let mut engine = Engine {
            links: Vec::with_capacity(count),
            infos: Vec::with_capacity(count),
            events,
            watch: None,
            shared: Arc::clone(&shared),
            origin: Origin::here(),
        };
        for (number, members) in deal(self.sources, count).into_iter().enumerate() {
            let seating = Seating {
                number,
                name: thread_name(number, &members),
                place: cores[number].clone(),
                waker: handles[number].clone(),
                members,
                settings: Arc::clone(&settings),
                shared: Arc::clone(&shared),
            };
            let (factory, told) = (Arc::clone(&factory), Arc::clone(&shared));
            let (commands, obeyed) = crossbeam_channel::unbounded();
            let (ready, started) = crossbeam_channel::bounded(1);
            let name = seating.name.clone();
            let body = move || {
                let name = seating.name.clone();
                let life = catch_unwind(AssertUnwindSafe(|| match seating.take(obeyed, &*factory) {
                    Ok((info, stats, thread, handler)) => {
                        drop(factory);
                        let _ = ready.send(Ok((info, stats)));
                        thread.run(handler)
                    }
                    Err(error) => {
                        let report = failed(&name, error.to_string());
                        let _ = ready.send(Err(error));
                        report
                    }
                }));
                let report = life.unwrap_or_else(|panic| {
                    // What the factory, a command or a panic held may panic when it is dropped.
                    let why = format!("a destructor panicked: {}", message(&*panic));
                    told.worker_failed(number, &why);
                    failed(&name, why)
                });
                told.worker_ended(number, report);
            };
            let thread = thread::Builder::new().name(name).spawn(body).map_err(|error| {
                OpenError::new(OpenErrorKind::Other, "pthread_create", &error, "no thread for a worker")
            });
            threads.push((number, thread, started, commands));
        }
        let mut failure = None;
        for (number, thread, started, commands) in threads {
            match thread.map(|thread| (thread, started.recv())) {
                Ok((thread, Ok(Ok((info, stats))))) => {
                    engine.links.push(Link {
                        number,
                        commands,
                        id: thread.thread().id(),
                        thread: Mutex::new(Some(thread)),
                        stats,
                    });
                    engine.infos.push(info);
                }
                Ok((thread, answer)) => {
                    let _ = thread.join();
                    let error = match answer {
                        Ok(Err(error)) => error,
                        _ => factory_error(number, "what the factory holds panicked when it was dropped"),
                    };
                    failure.get_or_insert(error);
                }
                Err(error) => {
                    shared.worker_ended(number, failed("", error.to_string()));
                    failure.get_or_insert(error);
                }
            }
        }
        match failure {
            Some(error) => Err(error),
            None => {
                let asked = engine
                    .links
                    .iter()
                    .map(|link| (link.number, link.commands.clone()))
                    .collect();
                engine.watch = Watch::start(devices, shared, ask_workers(asked, &engine.shared)).ok();
                Ok(engine)
            }
        }
    }

    /// The devices, as far as their settings can be asked for.
    fn devices(&self) -> Vec<Device> {
        self.sources.iter().filter_map(|source| source.device.clone()).collect()
    }

    fn worker_count(&self, cores: usize) -> Result<usize, OpenError> {
        let members = self
            .sources
            .iter()
            .map(|source| source.endpoints.len())
            .max()
            .unwrap_or(0);
        let count = self.workers.unwrap_or_else(|| members.min(cores.max(1)).max(1));
        let refuse = |detail: String| {
            Err(OpenError::refused(
                OpenErrorKind::InvalidSetting,
                "Engine::start",
                detail,
            ))
        };
        if count == 0 || count > 1024 {
            return refuse(format!("{count} workers; 1 to 1024 are possible"));
        }
        if self.batch == 0 || self.batch > 4096 {
            return refuse(format!("batches of {} packets; 1 to 4096 are possible", self.batch));
        }
        Ok(count)
    }
}

/// How the watch asks the queues of a device what became of it: by commands to the workers that
/// have them.
fn ask_workers<H: Handler + 'static>(workers: Vec<(usize, Sender<Command<H>>)>, shared: &Arc<Shared>) -> Ask {
    /// For one worker that does not come back from its handler.
    const PATIENCE: Duration = Duration::from_millis(500);

    let shared = Arc::clone(shared);
    Box::new(move |device| {
        for (number, commands) in &workers {
            let (reply, answer) = crossbeam_channel::bounded(1);
            let device = device.clone();
            let work = move |_: &mut H, worker: &mut Worker| {
                let queue = worker
                    .ports()
                    .filter_map(|port| worker.queue(port))
                    .find(|queue| Arc::ptr_eq(queue.mark(), device.mark()));
                // The watch may have given up.
                let _ = reply.send(queue.map(|queue| Answer::of(queue, &device)));
            };
            if commands.send(Command::Run(Box::new(work))).is_err() {
                continue;
            }
            if let Some(waker) = shared.waker(*number) {
                waker.wake();
            }
            if let Ok(Some(answer)) = answer.recv_timeout(PATIENCE) {
                return Some(answer);
            }
        }
        None
    })
}

/// What all workers of an engine begin with.
struct Settings {
    config: WorkerConfig,
    batch: usize,
    #[cfg(feature = "metrics")]
    histograms: bool,
}

/// One queue or socket on its way to its worker.
struct Member {
    endpoint: Endpoint,
    name: String,
    source: usize,
    number: usize,
    is_device: bool,
}

/// All that one worker's thread begins with.
struct Seating {
    number: usize,
    name: String,
    place: Place,
    waker: WakeHandle,
    members: Vec<Member>,
    settings: Arc<Settings>,
    shared: Arc<Shared>,
}

/// Gives worker k the k-th of each source, in turn.
fn deal(sources: Vec<Source>, workers: usize) -> Vec<Vec<Member>> {
    let mut dealt: Vec<Vec<Member>> = (0..workers).map(|_| Vec::new()).collect();
    for (source, group) in sources.into_iter().enumerate() {
        for (number, (endpoint, name)) in group.endpoints.into_iter().enumerate() {
            dealt[number % workers].push(Member {
                is_device: matches!(endpoint, Endpoint::Queue(_)),
                endpoint,
                name,
                source,
                number,
            });
        }
    }
    dealt
}

/// At most 15 bytes, which is what the kernel keeps: the first queue's device, cut if need be, and
/// its number.
fn thread_name(worker: usize, members: &[Member]) -> String {
    const LONGEST: usize = 15;
    let queue = members.iter().find(|member| member.is_device);
    let Some((device, number)) = queue.and_then(|member| member.name.rsplit_once(":q")) else {
        return format!("tun-worker{worker}");
    };
    let number = format!(":q{number}");
    let mut end = device.len().min(LONGEST - number.len());
    while !device.is_char_boundary(end) {
        end -= 1;
    }
    format!("{}{number}", &device[..end]).replace('\0', "")
}

/// The configuration of a worker with these members: at least two large buffers for each device
/// with offloads, unless their number is set.
fn fit(config: &WorkerConfig, members: &[Member]) -> WorkerConfig {
    let offloads = members
        .iter()
        .filter(|member| matches!(&member.endpoint, Endpoint::Queue(queue) if queue.vnet_hdr()))
        .count();
    let mut config = config.clone();
    if config.large_buffers == 0 && 2 * offloads > LARGE_BUFFERS {
        config.large_buffers = 2 * offloads;
    }
    config
}

type Taken<H> = (WorkerInfo, StatsReader, Thread<H>, H);

impl Seating {
    /// On the worker's own thread: makes the worker, its ports and its handler.
    fn take<H: Handler>(
        self,
        commands: Receiver<Command<H>>,
        factory: &dyn Fn(&mut Seat<'_>) -> Result<H, FactoryError>,
    ) -> Result<Taken<H>, OpenError> {
        let pin = pin(self.place);
        let config = fit(&self.settings.config, &self.members);
        let mut worker = Worker::with_waker(&config, self.waker)?;
        let mut ports = Vec::new();
        for member in self.members {
            let id = worker.attach_as(member.endpoint, member.name)?;
            ports.push(SeatPort {
                id,
                source: member.source,
                number: member.number,
            });
        }
        let mut seat = Seat {
            worker: &mut worker,
            number: self.number,
            pin: &pin,
            ports: &ports,
            stopper: &Stopper(Arc::clone(&self.shared)),
        };
        let handler = match catch_unwind(AssertUnwindSafe(|| factory(&mut seat))) {
            Ok(Ok(handler)) => handler,
            Ok(Err(error)) => return Err(factory_error(self.number, &error.to_string())),
            Err(panic) => {
                let why = format!("it panicked: {}", message(&*panic));
                return Err(factory_error(self.number, &why));
            }
        };
        let info = WorkerInfo {
            name: self.name.clone(),
            pin,
            backend: worker.backend().clone(),
        };
        let stats = worker.stats_reader();
        let thread = Thread {
            number: self.number,
            name: self.name,
            worker,
            commands,
            batch: Batch::with_capacity(self.settings.batch),
            shared: self.shared,
            looked: 0,
            too_short: Vec::new(),
            #[cfg(feature = "metrics")]
            histograms: self.settings.histograms.then(|| Box::new(Histograms::new())),
        };
        Ok((info, stats, thread, handler))
    }
}

/// The report of a worker that never served.
fn failed(name: &str, why: String) -> WorkerReport {
    WorkerReport::new(name, WorkerEnd::Failed(why), 0, &WorkerStats::default())
}

fn factory_error(worker: usize, why: &str) -> OpenError {
    let detail = format!("the handler of worker {worker} could not be made: {why}");
    OpenError::refused(OpenErrorKind::Factory, "Engine::start", detail)
}

impl Seat<'_> {
    /// The worker, with its ports attached.
    pub fn worker(&mut self) -> &mut Worker {
        self.worker
    }

    /// Its number, from 0.
    pub fn number(&self) -> usize {
        self.number
    }

    /// Where it runs.
    pub fn pin(&self) -> &Pin {
        self.pin
    }

    /// Its ports.
    pub fn ports(&self) -> &[SeatPort] {
        self.ports
    }

    /// Its first port of this source (see [`SeatPort::source`]).
    pub fn port(&self, source: usize) -> Option<PortId> {
        self.ports.iter().find(|port| port.source == source).map(|port| port.id)
    }

    /// A handle by which the handler can stop the engine.
    pub fn stopper(&self) -> Stopper {
        self.stopper.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn member(name: &str) -> Member {
        let socket = UdpSocket::bind("127.0.0.1:0").expect("a socket");
        Member {
            endpoint: socket.into(),
            name: name.to_owned(),
            source: 0,
            number: 0,
            is_device: true,
        }
    }

    #[test]
    fn a_threads_name_keeps_the_queue() {
        assert_eq!(thread_name(3, &[]), "tun-worker3");
        assert_eq!(thread_name(0, &[member("gw0:q1")]), "gw0:q1");
        assert_eq!(thread_name(0, &[member("abcdefghijklmno:q11")]), "abcdefghijk:q11");
        assert_eq!(thread_name(0, &[member("ääääääää:q1")]).len(), 15);
    }
}
