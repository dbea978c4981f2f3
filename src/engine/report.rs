//! What an engine says of itself and of its end.

use std::fmt;
use std::time::Duration;

use super::placement::Pin;
use crate::stats::{Counters, WorkerStats};
use crate::worker::BackendReport;

/// One worker of an engine, as it was started.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct WorkerInfo {
    /// The name of its thread: its first queue, as in `gw0:q1`, or `tun-worker1`; at most 15 bytes.
    pub name: String,
    /// Where it runs.
    pub pin: Pin,
    /// How it moves packets, and why so.
    pub backend: BackendReport,
}

impl fmt::Display for WorkerInfo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { name, pin, backend } = self;
        write!(f, "{name}: {:?} ({}), {pin}", backend.backend, backend.why)
    }
}

/// The books of all workers at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Stats {
    /// A worker's books each, in their order.
    pub workers: Vec<WorkerStats>,
}

impl Stats {
    /// The sum over all ports of all workers.
    pub fn total(&self) -> Counters {
        let mut total = Counters::default();
        for worker in &self.workers {
            total += &worker.total();
        }
        total
    }
}

/// Why [`Engine::wait`](crate::Engine::wait) returned.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Ended {
    /// Somebody asked the engine to stop.
    Stopped,
    /// A device was deleted. Its ports were detached; the others go on. (One that was moved to
    /// another namespace is not gone: see [`Event::Moved`](crate::Event::Moved).)
    DeviceGone {
        /// What it was called.
        device: String,
    },
    /// A worker failed. Unless [`OnPanic::Continue`] was chosen, the others stop.
    WorkerFailed {
        /// Which one.
        worker: usize,
        /// The message of the panic, or the error.
        why: String,
    },
}

impl fmt::Display for Ended {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Stopped => f.write_str("the engine was asked to stop"),
            Self::DeviceGone { device } => write!(f, "{device} is gone"),
            Self::WorkerFailed { worker, why } => write!(f, "worker {worker} failed: {why}"),
        }
    }
}

/// What to do when a handler panics. Its queues and sockets are closed at once in any case, so that their flows move to other queues.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum OnPanic {
    /// Stop the whole engine.
    #[default]
    Stop,
    /// Let the other workers go on.
    Continue,
}

/// How one worker ended.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum WorkerEnd {
    /// All operations ended, all queues and sockets closed.
    Clean,
    /// It had ended before: its handler panicked, or the kernel refused to wait.
    Failed(String),
    /// It did not come back from its handler in time. Its thread, its queues and its memory are still there, and end when it does.
    Stuck,
    /// The kernel did not let go of its memory in time, which is therefore leaked. Its queues and sockets are closed.
    Leaked,
}

impl fmt::Display for WorkerEnd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Clean => "clean",
            Self::Failed(why) => why,
            Self::Stuck => "stuck in its handler",
            Self::Leaked => "ended, but the kernel kept its memory",
        })
    }
}

/// What a worker left.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct WorkerReport {
    /// Its name.
    pub name: String,
    /// Its queues and sockets when it ended, as in `gw0:q1`; none if it never served, or lost all.
    pub ports: Vec<String>,
    /// How it ended.
    pub end: WorkerEnd,
    /// Packets that had come and that no handler saw: they were taken out and dropped at the end, at most 4,096 of each port.
    pub undelivered: u64,
    /// Packets that were longer than the buffers and were dropped.
    pub truncated: u64,
    /// Packets behind a header that contradicted them; they were dropped.
    pub bad_headers: u64,
    /// Packets that the handler dropped, or left in a batch.
    pub discarded: u64,
}

impl WorkerReport {
    pub(super) fn new(name: &str, end: WorkerEnd, undelivered: u64, stats: &WorkerStats) -> Self {
        let total = stats.total();
        Self {
            name: name.to_owned(),
            ports: stats.ports.iter().map(|port| port.name.clone()).collect(),
            end,
            undelivered,
            truncated: total.truncated,
            bad_headers: total.bad_headers,
            discarded: stats.counters.discarded,
        }
    }

    /// Its ports, or its name if it has none; a long list is cut.
    fn served(&self) -> String {
        /// Ports that are listed.
        const LISTED: usize = 4;

        let listed = self.ports.iter().take(LISTED).map(String::as_str);
        let listed = listed.collect::<Vec<_>>().join(", ");
        match self.ports.len() {
            0 => self.name.clone(),
            1..=LISTED => listed,
            ports => format!("{listed} and {} more", ports - LISTED),
        }
    }

    /// What came and was not handled, in words; nothing if there is none.
    fn losses(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (count, what) in [
            (self.truncated, "truncated"),
            (self.bad_headers, "with bad headers"),
            (self.discarded, "discarded"),
        ] {
            if count > 0 {
                write!(f, ", {count} {what}")?;
            }
        }
        Ok(())
    }
}

/// What became of an engine that was stopped.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct StopReport {
    /// One result per worker.
    pub workers: Vec<WorkerReport>,
    /// The books at the end.
    pub stats: Stats,
    /// How long it took.
    pub took: Duration,
}

impl StopReport {
    /// Whether all workers ended well.
    pub fn is_clean(&self) -> bool {
        self.workers.iter().all(|worker| worker.end == WorkerEnd::Clean)
    }
}

impl fmt::Display for StopReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut sum = WorkerReport::new("total", WorkerEnd::Clean, 0, &WorkerStats::default());
        for (number, worker) in self.workers.iter().enumerate() {
            write!(
                f,
                "worker {number} ({}): {}, {} undelivered",
                worker.served(),
                worker.end,
                worker.undelivered
            )?;
            worker.losses(f)?;
            writeln!(f)?;
            sum.truncated += worker.truncated;
            sum.bad_headers += worker.bad_headers;
            sum.discarded += worker.discarded;
        }
        let total = self.stats.total();
        write!(
            f,
            "total: {} received, {} sent, {} refused",
            total.received_packets, total.sent_packets, total.refused_packets,
        )?;
        sum.losses(f)?;
        write!(f, "; stopped in {:.1} ms", self.took.as_secs_f64() * 1e3)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(ports: usize) -> String {
        let worker = WorkerReport {
            ports: (0..ports).map(|number| format!("gw{number}:q1")).collect(),
            ..WorkerReport::new("tun-worker1", WorkerEnd::Clean, 0, &WorkerStats::default())
        };
        StopReport {
            workers: vec![worker],
            stats: Stats::default(),
            took: Duration::ZERO,
        }
        .to_string()
    }

    #[test]
    fn a_stop_names_the_ports_of_each_worker_and_counts_those_beyond_a_handful() {
        for (ports, told) in [
            (0, "worker 0 (tun-worker1): clean"),
            (2, "worker 0 (gw0:q1, gw1:q1): clean"),
            (4, "worker 0 (gw0:q1, gw1:q1, gw2:q1, gw3:q1): clean"),
            (22, "worker 0 (gw0:q1, gw1:q1, gw2:q1, gw3:q1 and 18 more): clean"),
        ] {
            assert!(report(ports).starts_with(told), "{}", report(ports));
        }
    }
}
