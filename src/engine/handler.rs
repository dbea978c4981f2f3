//! What an engine's user writes.

use std::time::Instant;

use crate::buf::Batch;
use crate::error::PortError;
use crate::worker::{PortId, Worker};

/// What one worker of an engine does with its packets.
///
/// Each worker has a handler of its own, made on the worker's thread by the engine's factory and never moved: it needs no lock and may hold
/// what is not `Send`. All calls come from that thread, one at a time; while one of them runs, the worker serves nobody else.
///
/// A closure `FnMut(&mut Worker, PortId, &mut Batch)` is a handler that only looks at packets.
pub trait Handler {
    /// Packets came in at `port`. What is left in the batch afterwards is dropped and counted ([`WorkerCounters::discarded`]).
    ///
    /// [`WorkerCounters::discarded`]: crate::WorkerCounters::discarded
    fn packets(&mut self, worker: &mut Worker, port: PortId, batch: &mut Batch);

    /// All ports that were ready have been served; the worker is about to look for more, or to sleep. The place to send what was collected.
    fn flush(&mut self, worker: &mut Worker) {
        let _ = worker;
    }

    /// When to call [`timer`](Self::timer) next, if nothing else happens before. Asked before each wait; one in the past does not wait.
    fn deadline(&mut self) -> Option<Instant> {
        None
    }

    /// The deadline has passed. If [`deadline`](Self::deadline) still names it afterwards, the worker never sleeps.
    fn timer(&mut self, worker: &mut Worker) {
        let _ = worker;
    }

    /// A receive told something else than packets: the device is down, a packet was truncated, no buffer is free. Counted already.
    fn trouble(&mut self, worker: &mut Worker, port: PortId, error: &PortError) {
        let _ = (worker, port, error);
    }

    /// A port was added to the running worker by [`Engine::attach`](crate::Engine::attach) or [`Engine::handoff`](crate::Engine::handoff).
    fn attached(&mut self, worker: &mut Worker, port: PortId) {
        let _ = (worker, port);
    }

    /// A port was taken away: by [`Engine::detach`](crate::Engine::detach), or because its device or sender is gone.
    fn detached(&mut self, worker: &mut Worker, port: PortId) {
        let _ = (worker, port);
    }

    /// The engine stops: the last call. Nothing is received any more; what is still to be sent can be sent here.
    fn stopping(&mut self, worker: &mut Worker) {
        let _ = worker;
    }
}

impl<F: FnMut(&mut Worker, PortId, &mut Batch)> Handler for F {
    fn packets(&mut self, worker: &mut Worker, port: PortId, batch: &mut Batch) {
        self(worker, port, batch);
    }
}
