//! One queue or socket with a worker of its own, for programs that have no more than that.

use std::io;
use std::time::Instant;

use super::{Detached, Endpoint, PortId, Sent, Wake, Worker, WorkerConfig};
use crate::buf::Batch;
use crate::error::{OpenError, PortError};
use crate::queue::Queue;

/// A worker with one port.
///
/// ```no_run
/// use tun_driver::{Batch, Builder, Mode, WorkerConfig};
///
/// fn main() -> Result<(), Box<dyn std::error::Error>> {
///     let queue = Builder::new("gw0", Mode::Tun).up(true).open()?.into_queues().remove(0);
///     let mut port = queue.drive(&WorkerConfig::default())?;
///     let mut batch = Batch::with_capacity(64);
///     loop {
///         port.recv_many(&mut batch)?;
///         let _sent = port.send_many(&mut batch); // every packet goes back to where it came from
///         batch.clear();
///     }
/// }
/// ```
///
/// Everything else is on the [`Worker`], which [`worker`](Self::worker) lends.
#[derive(Debug)]
pub struct SinglePort {
    worker: Worker,
    port: PortId,
}

impl SinglePort {
    /// Makes a worker for the calling thread and attaches the endpoint to it.
    ///
    /// # Errors
    /// As [`Worker::new`] and [`Worker::attach`].
    pub fn new(endpoint: impl Into<Endpoint>, config: &WorkerConfig) -> Result<Self, OpenError> {
        let mut worker = Worker::new(config)?;
        let port = worker.attach(endpoint)?;
        Ok(Self { worker, port })
    }

    /// Waits for the first packet, then takes what is there. See [`Worker::recv_many`].
    ///
    /// # Errors
    /// As [`Worker::recv_many`].
    pub fn recv_many(&mut self, batch: &mut Batch) -> Result<usize, PortError> {
        self.worker.recv_many(self.port, batch)
    }

    /// Takes what is there without waiting. See [`Worker::try_recv_many`].
    ///
    /// # Errors
    /// As [`Worker::recv_many`].
    pub fn try_recv_many(&mut self, batch: &mut Batch) -> Result<usize, PortError> {
        self.worker.try_recv_many(self.port, batch)
    }

    /// Sends from the front of the batch. See [`Worker::send_many`].
    pub fn send_many(&mut self, batch: &mut Batch) -> Sent {
        self.worker.send_many(self.port, batch)
    }

    /// Receives one packet, with a copy. See [`Worker::recv`].
    ///
    /// # Errors
    /// As [`Worker::recv`].
    pub fn recv(&mut self, buf: &mut [u8]) -> Result<usize, PortError> {
        self.worker.recv(self.port, buf)
    }

    /// Sends one packet, with a copy. See [`Worker::send`].
    ///
    /// # Errors
    /// As [`Worker::send`].
    pub fn send(&mut self, packet: &[u8]) -> Result<(), PortError> {
        self.worker.send(self.port, packet)
    }

    /// Waits for the port, a deadline or the waker. See [`Worker::wait`].
    ///
    /// # Errors
    /// As [`Worker::wait`].
    pub fn wait(&mut self, deadline: Option<Instant>) -> io::Result<Wake> {
        self.worker.wait(deadline)
    }

    /// The port's name on its worker.
    pub fn id(&self) -> PortId {
        self.port
    }

    /// The worker.
    pub fn worker(&self) -> &Worker {
        &self.worker
    }

    /// The worker, to change it.
    pub fn worker_mut(&mut self) -> &mut Worker {
        &mut self.worker
    }

    /// Takes the endpoint back. See [`Worker::detach`].
    ///
    /// # Errors
    /// As [`Worker::detach`].
    pub fn into_endpoint(mut self) -> Result<Detached, PortError> {
        self.worker.detach(self.port)
    }
}

impl Queue {
    /// Gives the queue a worker of its own, on the calling thread.
    ///
    /// # Errors
    /// As [`Worker::new`] and [`Worker::attach`].
    pub fn drive(self, config: &WorkerConfig) -> Result<SinglePort, OpenError> {
        SinglePort::new(self, config)
    }
}
