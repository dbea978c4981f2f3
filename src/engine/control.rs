//! Commands to a running worker.

use std::error::Error;
use std::fmt;
use std::io;

use crate::buf::RemoteBuf;
use crate::error::{OpenError, PortError};
use crate::stats::Counters;
use crate::worker::{Detached, Endpoint, Worker};

pub(super) type Work<H> = Box<dyn FnOnce(&mut H, &mut Worker) + Send>;

/// What the engine asks of a worker's thread.
pub(super) enum Command<H> {
    /// To call this between two rounds.
    Run(Work<H>),
    /// To hand out a copy of its histograms.
    #[cfg(feature = "metrics")]
    Histograms(crossbeam_channel::Sender<Option<Box<super::histograms::Histograms>>>),
}

/// Why a command was not carried out.
#[derive(Debug)]
#[non_exhaustive]
pub enum ControlError {
    /// There is no worker of that number.
    NoSuchWorker,
    /// The worker has ended, or ended before it came to the command.
    WorkerEnded,
    /// The call came from the worker's own thread, which would wait for itself.
    OwnThread,
    /// The time was over. The command may still be carried out.
    TimedOut,
    /// What was asked for was refused.
    Refused(OpenError),
    /// The port could not be detached, or was not there.
    Port(PortError),
    /// The engine was started without it.
    NotEnabled,
}

impl fmt::Display for ControlError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoSuchWorker => f.write_str("there is no worker of that number"),
            Self::WorkerEnded => f.write_str("the worker has ended"),
            Self::OwnThread => f.write_str("a worker cannot wait for a command to itself"),
            Self::TimedOut => f.write_str("the worker did not answer in time; it may still do what it was asked"),
            Self::Refused(error) => error.fmt(f),
            Self::Port(error) => error.fmt(f),
            Self::NotEnabled => f.write_str("the engine was started without it"),
        }
    }
}

impl Error for ControlError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        match self {
            Self::Refused(error) => Some(error),
            Self::Port(error) => Some(error),
            _ => None,
        }
    }
}

impl From<ControlError> for io::Error {
    fn from(error: ControlError) -> Self {
        match error {
            ControlError::Refused(error) => error.into(),
            ControlError::Port(error) => error.into(),
            error => io::Error::other(error),
        }
    }
}

/// What is left when a port was detached from a running worker: [`Detached`] for another thread.
#[derive(Debug)]
#[non_exhaustive]
pub struct Released {
    /// The queue or socket, ready for another worker.
    pub endpoint: Endpoint,
    /// Packets that had been received and not asked for yet. What was still in the kernel's queue is there as long as the queue is attached.
    pub undelivered: Vec<RemoteBuf>,
    /// The port's counters at the end; `undelivered` counts as received.
    pub counters: Counters,
}

impl From<Detached> for Released {
    fn from(mut detached: Detached) -> Self {
        Self {
            endpoint: detached.endpoint,
            undelivered: detached
                .undelivered
                .drain()
                .map(|packet| packet.into_remote())
                .collect(),
            counters: detached.counters,
        }
    }
}
