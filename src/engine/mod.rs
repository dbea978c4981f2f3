//! Floor 4: an engine runs workers on threads of their own, one per core, and looks after them.
//!
//! Nothing of the engine is on the data path: a worker's thread waits, receives and calls its handler; commands, statistics and events
//! go past it.

mod builder;
mod control;
mod events;
mod handler;
#[cfg(feature = "metrics")]
mod histograms;
mod placement;
mod report;
mod shared;
mod thread;

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{JoinHandle, ThreadId};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender};

pub use builder::{EngineBuilder, FactoryError, Seat, SeatPort};
pub use control::{ControlError, Released};
pub use events::{Event, Events};
pub use handler::Handler;
#[cfg(feature = "metrics")]
pub use histograms::Histograms;
pub use placement::{Pin, Placement};
pub use report::{Ended, OnPanic, Stats, StopReport, WorkerEnd, WorkerInfo, WorkerReport};

use crate::stats::StatsReader;
use crate::sys::forked::Origin;
use crate::worker::{Endpoint, Handoff, PortId, Worker};
use control::Command;
use events::Watch;
use shared::Shared;

/// Workers on threads of their own that serve the queues of any number of devices, and sockets.
///
/// Worker k owns queue k of each device: what comes in there is handled on one core from beginning to end. See [`Handler`] for what runs on
/// a worker, [`EngineBuilder`] for what can be set.
///
/// ```no_run
/// use tun_driver::{Batch, Builder, Engine, Mode, PortId, Worker};
///
/// fn main() -> Result<(), Box<dyn std::error::Error>> {
///     let device = Builder::new("gw0", Mode::Tun).queues(2).address([10, 0, 0, 1], 24).up(true).open()?;
///     let engine = Engine::builder().device(device).start_fn(|worker: &mut Worker, port: PortId, batch: &mut Batch| {
///         let _sent = worker.send_many(port, batch); // every packet goes back to where it came from
///     })?;
///     println!("{:?}", engine.wait());
///     println!("{}", engine.stop_within(std::time::Duration::from_secs(1)));
///     Ok(())
/// }
/// ```
///
/// # Threads
/// All methods may be called from any thread, but those that wait for a worker not from a handler of that worker
/// ([`ControlError::OwnThread`]). None of them takes a lock that a worker needs while it moves packets. Two handlers that each wait for a
/// command to the other's worker wait for ever; where that can happen, use [`run_on_within`](Self::run_on_within).
///
/// # Which worker sees a flow
/// The kernel steers by itself (tun_flow_update and tun_automq_select_queue in drivers/net/tun.c): a flow's packets go to the queue on which
/// this device's user last wrote a packet of it, in either direction; flows that were not written to go by a hash of addresses, protocol
/// and ports. So if a worker sends the answers of a flow on the queue on which the flow came in, both directions stay on that worker; and
/// if worker k forwards from queue k of one device to queue k of another, both directions of what it forwards stay on worker k.
///
/// What moves a flow to another queue:
/// - One packet of it that is written there: the flow follows at once. What lies in the old queue stays there, so that order between the
///   two workers is lost for a moment.
/// - Nothing being written to it for three seconds (TUN_FLOW_EXPIRE; four or more, as the kernel looks seldom): it goes by its hash again.
///   Packets that come do not count. To write is enough to bring it back.
/// - More than 4,096 flows: those beyond are not remembered, and go by their hash.
/// - Fragments: they go by addresses and protocol alone, all fragments between two hosts to one queue, wherever their flow is.
/// - A queue more: flows that are not remembered are spread anew. A queue less: the device's last queue takes its number and its flows, and
///   the last one's flows go to the first queue, until they are written to again.
///
/// # The end
/// [`stop_within`](Self::stop_within) ends all workers and says how they ended. Dropping the engine
/// does the same, within three seconds, and says nothing. In a child of fork(2), an engine may only
/// be dropped, which touches nothing of its parent's; the child has none of the threads. A queue
/// that is closed or detached loses what the kernel still had in it: what could be read was counted
/// as undelivered.
pub struct Engine<H> {
    links: Vec<Link<H>>,
    infos: Vec<WorkerInfo>,
    events: Events,
    /// `None` if the kernel lets nobody listen; then only the data path tells of devices.
    watch: Option<Watch>,
    shared: Arc<Shared>,
    origin: Origin,
}

/// The engine's end of one worker.
struct Link<H> {
    number: usize,
    commands: Sender<Command<H>>,
    thread: Mutex<Option<JoinHandle<()>>>,
    id: ThreadId,
    stats: StatsReader,
}

/// Stops an engine, from any thread and from its handlers. Clones stop the same engine.
#[derive(Clone, Debug)]
pub struct Stopper(Arc<Shared>);

impl Stopper {
    /// Asks all workers to stop, and ends [`Engine::wait`]. Does not wait for them.
    pub fn stop(&self) {
        self.0.stop();
    }
}

/// How long dropping an engine waits for its workers.
const DROP_BOUND: Duration = Duration::from_secs(3);

impl Engine<()> {
    /// An engine without devices, sockets and settings yet.
    pub fn builder() -> EngineBuilder {
        EngineBuilder::new()
    }
}

impl<H> Engine<H> {
    /// The workers, as they were started.
    pub fn workers(&self) -> &[WorkerInfo] {
        &self.infos
    }

    /// The books of all workers. Waits for none of them, so that also a stuck one is seen.
    pub fn stats(&self) -> Stats {
        Stats {
            workers: self.links.iter().map(|link| link.stats.read()).collect(),
        }
    }

    /// What happens to the devices and workers. All that ask share one row of events; the newest 1,024 are kept for them.
    pub fn events(&self) -> Events {
        self.events.clone()
    }

    /// Whether changes of the devices (up, down, MTU, moved) are reported, for those given at the
    /// start and those of queues that [`attach`](Self::attach) brought. Not where the sandbox
    /// refuses netlink sockets; that a device is gone is reported all the same.
    pub fn watches_devices(&self) -> bool {
        self.watch.is_some()
    }

    /// A handle that stops the engine.
    pub fn stopper(&self) -> Stopper {
        Stopper(Arc::clone(&self.shared))
    }

    /// Blocks until the engine was asked to stop, a device is gone, or a worker failed, and says which. Each is told once, `Stopped` for ever.
    pub fn wait(&self) -> Ended {
        loop {
            if let Some(ended) = self.shared.wait(None) {
                return ended;
            }
        }
    }

    /// Waits like [`wait`](Self::wait), but not longer than `bound`.
    pub fn wait_within(&self, bound: Duration) -> Option<Ended> {
        // Too far away to be named is never.
        self.shared.wait(Instant::now().checked_add(bound))
    }

    /// Stops all workers and waits for them, at most for `bound`.
    ///
    /// Each worker finishes what its handler does at the moment, receives nothing more, calls [`Handler::stopping`], lets the kernel
    /// finish, and closes its queues and sockets. One that does not come back from its handler is reported as stuck and ends when it does;
    /// calling this again finds out. When all others are reported, this process holds their devices no more.
    ///
    /// Called by a handler, it does not wait for that handler's worker, which is reported as stuck and ends when the handler returns.
    pub fn stop_within(&self, bound: Duration) -> StopReport {
        let start = Instant::now();
        self.shared.stop();
        let deadline = start.checked_add(bound);
        let reports = self.shared.wait_for_ends(deadline, self.own_worker());
        let ended = self.links.iter().filter(|link| reports[link.number].is_some());
        join_until(ended.filter_map(Link::take).collect(), deadline);
        // It keeps the namespaces that devices were moved to, and has no port left to speak of. A
        // worker that is stuck still has some.
        if let Some(watch) = &self.watch
            && reports.iter().all(Option::is_some)
        {
            watch.end();
        }
        let stats = self.stats();
        StopReport {
            workers: reports
                .iter()
                .zip(&self.infos)
                .zip(&stats.workers)
                .map(|((report, info), stats)| {
                    let stuck = || WorkerReport::new(&info.name, WorkerEnd::Stuck, 0, stats);
                    report.clone().unwrap_or_else(stuck)
                })
                .collect(),
            stats,
            took: start.elapsed(),
        }
    }

    /// The worker whose thread this is.
    fn own_worker(&self) -> Option<usize> {
        let here = std::thread::current().id();
        self.links.iter().find(|link| link.id == here).map(|link| link.number)
    }

    fn link(&self, worker: usize) -> Result<&Link<H>, ControlError> {
        self.links.get(worker).ok_or(ControlError::NoSuchWorker)
    }
}

impl<H: Handler + 'static> Engine<H> {
    /// Runs `work` on a worker's thread, between two rounds, and returns what it returns. Waits for that: for ever if the handler is stuck.
    ///
    /// Configuration is changed this way, and needs no lock:
    ///
    /// ```no_run
    /// # use tun_driver::{Batch, ControlError, Engine, Handler, PortId, Worker};
    /// # struct Nat { mappings: Vec<u16> }
    /// # impl Handler for Nat { fn packets(&mut self, _: &mut Worker, _: PortId, _: &mut Batch) {} }
    /// # fn change(engine: &Engine<Nat>) -> Result<(), ControlError> {
    /// let mappings = engine.run_on(0, |nat, _worker| {
    ///     nat.mappings.push(4500);
    ///     nat.mappings.len()
    /// })?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// The worker does not exist, has ended, or is the one that calls. If `work` panics, that is the handler's panic.
    pub fn run_on<R: Send + 'static>(
        &self,
        worker: usize,
        work: impl FnOnce(&mut H, &mut Worker) -> R + Send + 'static,
    ) -> Result<R, ControlError> {
        self.ask(worker, work)?.recv().map_err(|_| ControlError::WorkerEnded)
    }

    /// As [`run_on`](Self::run_on), but waits at most for `bound`.
    ///
    /// # Errors
    /// As [`run_on`](Self::run_on); [`ControlError::TimedOut`], and `work` may still be run later.
    pub fn run_on_within<R: Send + 'static>(
        &self,
        worker: usize,
        bound: Duration,
        work: impl FnOnce(&mut H, &mut Worker) -> R + Send + 'static,
    ) -> Result<R, ControlError> {
        self.ask(worker, work)?
            .recv_timeout(bound)
            .map_err(|error| match error {
                RecvTimeoutError::Timeout => ControlError::TimedOut,
                RecvTimeoutError::Disconnected => ControlError::WorkerEnded,
            })
    }

    /// Gives a queue or a socket to a worker. Its handler is called ([`Handler::attached`]), and
    /// the queue's device is watched from then on.
    ///
    /// # Errors
    /// As [`run_on`](Self::run_on); [`ControlError::Refused`] as [`Worker::attach`] says, and the endpoint is closed.
    pub fn attach(&self, worker: usize, endpoint: impl Into<Endpoint>) -> Result<PortId, ControlError> {
        let endpoint = endpoint.into();
        let device = match &endpoint {
            Endpoint::Queue(queue) => queue.device().cloned(),
            _ => None,
        };
        let port = self.run_on(worker, move |handler, worker| {
            let port = worker.attach(endpoint).map_err(ControlError::Refused)?;
            handler.attached(worker, port);
            Ok(port)
        })??;
        if let (Some(watch), Some(device)) = (&self.watch, device) {
            watch.add(device, &self.shared);
        }
        Ok(port)
    }

    /// Takes a queue or a socket away from a worker. The handler is told ([`Handler::detached`]).
    ///
    /// # Errors
    /// As [`run_on`](Self::run_on); [`ControlError::Port`] as [`Worker::detach`] says.
    pub fn detach(&self, worker: usize, port: PortId) -> Result<Released, ControlError> {
        self.run_on(worker, move |handler, worker| {
            let detached = worker.detach(port).map_err(ControlError::Port)?;
            handler.detached(worker, port);
            Ok(Released::from(detached))
        })?
    }

    /// Opens a way by which one other thread gives packets to a worker, `capacity` at a time. They come to its handler as packets of the port
    /// that is returned ([`Handler::attached`]), in order; a full way is told to the sender.
    ///
    /// # Errors
    /// As [`run_on`](Self::run_on); [`ControlError::Refused`] as [`Worker::open_handoff`] says.
    pub fn handoff(&self, worker: usize, capacity: usize) -> Result<(PortId, Handoff), ControlError> {
        self.run_on(worker, move |handler, worker| {
            let (port, handoff) = worker.open_handoff(capacity).map_err(ControlError::Refused)?;
            handler.attached(worker, port);
            Ok((port, handoff))
        })?
    }

    /// The histograms of all workers, merged. Waits at most `bound` for each.
    ///
    /// # Errors
    /// As [`run_on_within`](Self::run_on_within); [`ControlError::NotEnabled`] if the engine was started without them.
    #[cfg(feature = "metrics")]
    pub fn histograms(&self, bound: Duration) -> Result<Histograms, ControlError> {
        let mut merged = Histograms::new();
        for worker in 0..self.links.len() {
            merged.merge(&self.worker_histograms(worker, bound)?);
        }
        Ok(merged)
    }

    /// The histograms of one worker, as they stand. Waits at most `bound` for it.
    ///
    /// # Errors
    /// As [`histograms`](Self::histograms).
    #[cfg(feature = "metrics")]
    pub fn worker_histograms(&self, worker: usize, bound: Duration) -> Result<Histograms, ControlError> {
        let (reply, answer) = crossbeam_channel::bounded(1);
        self.command(worker, Command::Histograms(reply))?;
        match answer.recv_timeout(bound) {
            Ok(histograms) => histograms.map(|histograms| *histograms).ok_or(ControlError::NotEnabled),
            Err(RecvTimeoutError::Timeout) => Err(ControlError::TimedOut),
            Err(RecvTimeoutError::Disconnected) => Err(ControlError::WorkerEnded),
        }
    }

    /// Sends `work` to a worker; what it returns comes by the channel.
    fn ask<R: Send + 'static>(
        &self,
        worker: usize,
        work: impl FnOnce(&mut H, &mut Worker) -> R + Send + 'static,
    ) -> Result<Receiver<R>, ControlError> {
        let (reply, answer) = crossbeam_channel::bounded(1);
        let work = move |handler: &mut H, worker: &mut Worker| {
            // Whoever asked may have given up.
            let _ = reply.send(work(handler, worker));
        };
        self.command(worker, Command::Run(Box::new(work)))?;
        Ok(answer)
    }

    fn command(&self, worker: usize, command: Command<H>) -> Result<(), ControlError> {
        let link = self.link(worker)?;
        if link.id == std::thread::current().id() {
            return Err(ControlError::OwnThread);
        }
        link.commands.send(command).map_err(|_| ControlError::WorkerEnded)?;
        if let Some(waker) = self.shared.waker(worker) {
            waker.wake();
        }
        Ok(())
    }
}

impl<H> Link<H> {
    /// The thread, to be joined by the caller.
    fn take(&self) -> Option<JoinHandle<()>> {
        self.thread.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

/// Joins threads that have reported their end, for as long as `deadline` allows.
///
/// All they had is closed by then. But the kernel may keep a thread that exits for seconds, where
/// others hold the lock of all network settings; std joins without a bound, so a thread does it.
fn join_until(threads: Vec<JoinHandle<()>>, deadline: Option<Instant>) {
    if threads.is_empty() {
        return;
    }
    let (done, all) = crossbeam_channel::bounded(1);
    let joining = move || {
        for thread in threads {
            // It catches its handler's panics.
            let _ = thread.join();
        }
        let _ = done.send(());
    };
    // Without a thread to be had they are left to themselves.
    if std::thread::Builder::new()
        .name("tun-join".to_owned())
        .spawn(joining)
        .is_ok()
    {
        let _ = match deadline {
            Some(deadline) => all.recv_deadline(deadline).ok(),
            None => all.recv().ok(),
        };
    }
}

impl<H> Drop for Engine<H> {
    fn drop(&mut self) {
        if !self.origin.is_here() {
            // Its threads are the parent's, and may hold any lock at the moment of the fork.
            std::mem::forget((std::mem::take(&mut self.links), self.watch.take(), self.events.clone()));
            std::mem::forget(Arc::clone(&self.shared));
            return;
        }
        self.stop_within(DROP_BOUND);
        self.shared.events.close();
    }
}

impl<H> fmt::Debug for Engine<H> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Engine")
            .field("workers", &self.infos)
            .finish_non_exhaustive()
    }
}
