//! What happened on the ports and workers, in numbers.
//!
//! The worker's thread is the only writer of its counters; any thread may read them at any time, without waking or waiting for it. So a
//! counter is a relaxed atomic that is loaded and stored, never a locked instruction.

use std::fmt;
use std::ops::AddAssign;
use std::sync::atomic::{AtomicI32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::worker::PortId;

/// Counters of one port since it was attached.
///
/// The books balance: what the kernel handed over is `received_packets + truncated`, and what was given to `send` or `send_many` and
/// consumed is `sent_packets + refused_packets`; for a queue with offloads, of what the kernel handed over `bad_headers` comes on top. The kernel counts
/// writes: `sent_packets - merged_packets + merged_superpackets - cut_superpackets + cut_segments`, as long as nothing that was cut was refused; and up to
/// three that asked it, as the port was attached, whether it takes superpackets.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Counters {
    /// Packets handed to the user.
    pub received_packets: u64,
    /// Their bytes.
    pub received_bytes: u64,
    /// Packets that were longer than the buffers and were dropped.
    pub truncated: u64,
    /// Packets that the kernel took.
    pub sent_packets: u64,
    /// Their bytes as they were written: merged, the headers count once; cut, in each segment.
    pub sent_bytes: u64,
    /// Packets that the kernel refused for good; they were dropped. By errno in [`refused`](Self::refused).
    pub refused_packets: u64,
    /// The refusals by errno.
    pub refused: ErrnoCounts,
    /// Times that sending stopped because the kernel took no more.
    pub backpressure: u64,
    /// Times that receiving found no free buffer.
    pub no_buffers: u64,
    /// Calls that handed over at least one packet.
    pub batches: u64,
    /// System calls made for this port: ring entries, or reads, writes, recvmmsg and sendmmsg. Waiting is not among them.
    pub system_calls: u64,
    /// Questions to the kernel that found the port empty.
    pub empty_asks: u64,
    /// Packets sent from memory that is not this worker's, and therefore not registered.
    pub foreign_sent: u64,
    /// Of the packets received, superpackets: each counts as one packet.
    pub received_superpackets: u64,
    /// Packets whose virtio-net header contradicted them, or that stood elsewhere than the header's
    /// size says; they were dropped.
    pub bad_headers: u64,
    /// Superpackets that the kernel took in one write: passed on as they came, or merged.
    pub sent_superpackets: u64,
    /// Of the packets sent, those that went merged into superpackets.
    pub merged_packets: u64,
    /// The superpackets that these went in.
    pub merged_superpackets: u64,
    /// Superpackets that were cut before they were sent. Each counts as one packet sent, or refused if one of its segments was.
    pub cut_superpackets: u64,
    /// The segments of these that the kernel took.
    pub cut_segments: u64,
    /// Superpackets that the kernel refused, and that went in pieces.
    pub offloads_refused: u64,
    /// Errors that the network reported to a socket about earlier datagrams (ICMP), by errno. No
    /// packet counts as refused for them.
    pub reported: ErrnoCounts,
    /// Times that another holder of the device had changed the size of its header or its offloads,
    /// or had made the descriptor blocking, and this port set that back.
    pub set_back: u64,
}

impl AddAssign<&Counters> for Counters {
    fn add_assign(&mut self, other: &Counters) {
        let Counters {
            received_packets,
            received_bytes,
            truncated,
            sent_packets,
            sent_bytes,
            refused_packets,
            refused,
            backpressure,
            no_buffers,
            batches,
            system_calls,
            empty_asks,
            foreign_sent,
            received_superpackets,
            bad_headers,
            sent_superpackets,
            merged_packets,
            merged_superpackets,
            cut_superpackets,
            cut_segments,
            offloads_refused,
            reported,
            set_back,
        } = other;
        self.received_packets += received_packets;
        self.received_bytes += received_bytes;
        self.truncated += truncated;
        self.sent_packets += sent_packets;
        self.sent_bytes += sent_bytes;
        self.refused_packets += refused_packets;
        self.refused += refused;
        self.backpressure += backpressure;
        self.no_buffers += no_buffers;
        self.batches += batches;
        self.system_calls += system_calls;
        self.empty_asks += empty_asks;
        self.foreign_sent += foreign_sent;
        self.received_superpackets += received_superpackets;
        self.bad_headers += bad_headers;
        self.sent_superpackets += sent_superpackets;
        self.merged_packets += merged_packets;
        self.merged_superpackets += merged_superpackets;
        self.cut_superpackets += cut_superpackets;
        self.cut_segments += cut_segments;
        self.offloads_refused += offloads_refused;
        self.reported += reported;
        self.set_back += set_back;
    }
}

/// A small table of error numbers and how often each was seen.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct ErrnoCounts {
    entries: [(i32, u64); Self::KINDS],
    others: u64,
}

impl ErrnoCounts {
    /// Different errnos that are told apart; more are counted together.
    const KINDS: usize = 8;

    fn add(&mut self, errno: i32, count: u64) {
        for entry in &mut self.entries {
            if entry.0 == errno || entry.1 == 0 {
                *entry = (errno, entry.1 + count);
                return;
            }
        }
        self.others += count;
    }

    /// How often `errno` was seen.
    pub fn count(&self, errno: i32) -> u64 {
        self.iter()
            .find(|&(seen, _)| seen == errno)
            .map_or(0, |(_, count)| count)
    }

    /// (errno, count) in the order in which they were first seen.
    pub fn iter(&self) -> impl Iterator<Item = (i32, u64)> + '_ {
        self.entries.iter().copied().filter(|&(_, count)| count > 0)
    }

    /// Those beyond the errnos that are told apart.
    pub fn others(&self) -> u64 {
        self.others
    }
}

impl AddAssign<&ErrnoCounts> for ErrnoCounts {
    fn add_assign(&mut self, other: &ErrnoCounts) {
        for (errno, count) in other.iter() {
            self.add(errno, count);
        }
        self.others += other.others;
    }
}

impl fmt::Debug for ErrnoCounts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_map().entries(self.iter()).finish()
    }
}

/// What a worker did apart from its ports, since it was made.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct WorkerCounters {
    /// Times that it slept until something happened.
    pub sleeps: u64,
    /// Times that it slept for a set time to let packets gather ([`Wait::Moderate`](crate::Wait::Moderate)).
    pub lingers: u64,
    /// Times that the doorbell rang: wake-ups, commands, packets handed in, buffers that came back.
    pub wake_ups: u64,
    /// Packets thrown away from batches ([`Batch::clear`](crate::Batch::clear), [`Batch::retain_mut`](crate::Batch::retain_mut), dropping a
    /// batch): in an engine, what the handler dropped.
    pub discarded: u64,
    /// Times that the kernel refused to enter the ring for the moment (EAGAIN, EBUSY, ENOMEM), and
    /// the worker tried again.
    pub refused_entries: u64,
}

impl AddAssign<&WorkerCounters> for WorkerCounters {
    fn add_assign(&mut self, other: &WorkerCounters) {
        let WorkerCounters {
            sleeps,
            lingers,
            wake_ups,
            discarded,
            refused_entries,
        } = other;
        self.sleeps += sleeps;
        self.lingers += lingers;
        self.wake_ups += wake_ups;
        self.discarded += discarded;
        self.refused_entries += refused_entries;
    }
}

/// One port's line in a worker's books.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct PortStats {
    /// Its name on its worker.
    pub port: PortId,
    /// What it is, in words: a device and its queue, or a socket's address.
    pub name: String,
    /// What happened on it.
    pub counters: Counters,
}

/// A worker's books at one moment. Each number is exact; two of them may be some packets apart, because the worker goes on meanwhile.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct WorkerStats {
    /// What it did apart from its ports.
    pub counters: WorkerCounters,
    /// Its ports, in the order in which they were attached.
    pub ports: Vec<PortStats>,
    /// The sum of the ports that were detached.
    pub detached: Counters,
}

impl WorkerStats {
    /// The sum over all ports, the detached ones included.
    pub fn total(&self) -> Counters {
        let mut total = self.detached.clone();
        for port in &self.ports {
            total += &port.counters;
        }
        total
    }
}

/// Reads a worker's books from any thread, also while its handler is stuck or after it ended.
///
/// ```
/// use tun_driver::{Worker, WorkerConfig};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let worker = Worker::new(&WorkerConfig::default())?;
/// let reader = worker.stats_reader();
/// std::thread::spawn(move || assert_eq!(reader.read().counters.sleeps, 0)).join().unwrap();
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
pub struct StatsReader(Arc<Books>);

impl StatsReader {
    /// The books as they stand. Waits for nobody but a thread that attaches or detaches a port at this very moment.
    pub fn read(&self) -> WorkerStats {
        self.0.read()
    }
}

impl fmt::Debug for StatsReader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("StatsReader").field(&self.read()).finish()
    }
}

/// A worker's books, shared with its readers.
#[derive(Debug, Default)]
pub(crate) struct Books {
    pub(crate) worker: WorkerTally,
    ports: Mutex<PortList>,
}

#[derive(Debug, Default)]
struct PortList {
    attached: Vec<(PortId, String, Arc<PortTally>)>,
    detached: Counters,
}

impl Books {
    /// Takes a port up.
    pub(crate) fn open(&self, port: PortId, name: String) -> Arc<PortTally> {
        let tally = Arc::new(PortTally::default());
        self.ports().attached.push((port, name, Arc::clone(&tally)));
        tally
    }

    /// Closes a port's line.
    pub(crate) fn close(&self, port: PortId) {
        let mut ports = self.ports();
        let PortList { attached, detached } = &mut *ports;
        attached.retain(|(id, _, tally)| {
            if *id == port {
                *detached += &tally.read();
            }
            *id != port
        });
    }

    pub(crate) fn reader(self: &Arc<Self>) -> StatsReader {
        StatsReader(Arc::clone(self))
    }

    fn read(&self) -> WorkerStats {
        let ports = self.ports();
        WorkerStats {
            counters: self.worker.read(),
            ports: ports
                .attached
                .iter()
                .map(|(port, name, tally)| PortStats {
                    port: *port,
                    name: name.clone(),
                    counters: tally.read(),
                })
                .collect(),
            detached: ports.detached.clone(),
        }
    }

    fn ports(&self) -> MutexGuard<'_, PortList> {
        // The list is whole at every moment at which a panic could happen.
        self.ports.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A number with one writer.
#[derive(Debug, Default)]
pub(crate) struct Count(AtomicU64);

impl Count {
    #[inline]
    pub(crate) fn add(&self, more: u64) {
        self.0.store(self.get().wrapping_add(more), Ordering::Relaxed);
    }

    /// Takes back what was counted too much.
    pub(crate) fn take_back(&self, less: u64) {
        self.0.store(self.get().wrapping_sub(less), Ordering::Relaxed);
    }

    #[inline]
    pub(crate) fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// [`Counters`] as they are kept: on lines of their own, so that readers cost the worker little and workers cost each other nothing.
#[derive(Debug, Default)]
#[repr(align(128))]
pub(crate) struct PortTally {
    pub(crate) received_packets: Count,
    pub(crate) received_bytes: Count,
    pub(crate) truncated: Count,
    pub(crate) sent_packets: Count,
    pub(crate) sent_bytes: Count,
    pub(crate) refused_packets: Count,
    pub(crate) refused: ErrnoTally,
    pub(crate) backpressure: Count,
    pub(crate) no_buffers: Count,
    pub(crate) batches: Count,
    pub(crate) system_calls: Count,
    pub(crate) empty_asks: Count,
    pub(crate) foreign_sent: Count,
    pub(crate) received_superpackets: Count,
    pub(crate) bad_headers: Count,
    pub(crate) sent_superpackets: Count,
    pub(crate) merged_packets: Count,
    pub(crate) merged_superpackets: Count,
    pub(crate) cut_superpackets: Count,
    pub(crate) cut_segments: Count,
    pub(crate) offloads_refused: Count,
    pub(crate) reported: ErrnoTally,
    pub(crate) set_back: Count,
}

impl PortTally {
    /// Counts packets that were handed to the user.
    #[inline]
    pub(crate) fn received(&self, packets: u64, bytes: u64) {
        self.received_packets.add(packets);
        self.received_bytes.add(bytes);
    }

    /// Counts packets that were refused for good.
    pub(crate) fn refuse(&self, errno: i32, packets: u64) {
        self.refused_packets.add(packets);
        (0..packets).for_each(|_| self.refused.add(errno));
    }

    pub(crate) fn read(&self) -> Counters {
        Counters {
            received_packets: self.received_packets.get(),
            received_bytes: self.received_bytes.get(),
            truncated: self.truncated.get(),
            sent_packets: self.sent_packets.get(),
            sent_bytes: self.sent_bytes.get(),
            refused_packets: self.refused_packets.get(),
            refused: self.refused.read(),
            backpressure: self.backpressure.get(),
            no_buffers: self.no_buffers.get(),
            batches: self.batches.get(),
            system_calls: self.system_calls.get(),
            empty_asks: self.empty_asks.get(),
            foreign_sent: self.foreign_sent.get(),
            received_superpackets: self.received_superpackets.get(),
            bad_headers: self.bad_headers.get(),
            sent_superpackets: self.sent_superpackets.get(),
            merged_packets: self.merged_packets.get(),
            merged_superpackets: self.merged_superpackets.get(),
            cut_superpackets: self.cut_superpackets.get(),
            cut_segments: self.cut_segments.get(),
            offloads_refused: self.offloads_refused.get(),
            reported: self.reported.read(),
            set_back: self.set_back.get(),
        }
    }
}

/// [`WorkerCounters`] as they are kept.
#[derive(Debug, Default)]
#[repr(align(128))]
pub(crate) struct WorkerTally {
    pub(crate) sleeps: Count,
    pub(crate) lingers: Count,
    pub(crate) wake_ups: Count,
    pub(crate) discarded: Count,
    pub(crate) refused_entries: Count,
}

impl WorkerTally {
    fn read(&self) -> WorkerCounters {
        WorkerCounters {
            sleeps: self.sleeps.get(),
            lingers: self.lingers.get(),
            wake_ups: self.wake_ups.get(),
            discarded: self.discarded.get(),
            refused_entries: self.refused_entries.get(),
        }
    }
}

/// [`ErrnoCounts`] as they are kept.
#[derive(Debug, Default)]
pub(crate) struct ErrnoTally {
    entries: [(AtomicI32, Count); ErrnoCounts::KINDS],
    others: Count,
}

impl ErrnoTally {
    pub(crate) fn add(&self, errno: i32) {
        for (seen, count) in &self.entries {
            if count.get() == 0 {
                seen.store(errno, Ordering::Relaxed);
            }
            if seen.load(Ordering::Relaxed) == errno {
                // Release: who sees the count sees what it counts.
                count.0.store(count.get() + 1, Ordering::Release);
                return;
            }
        }
        self.others.add(1);
    }

    fn read(&self) -> ErrnoCounts {
        let mut counts = ErrnoCounts::default();
        for (entry, (seen, count)) in counts.entries.iter_mut().zip(&self.entries) {
            let count = count.0.load(Ordering::Acquire);
            *entry = (seen.load(Ordering::Relaxed), count);
        }
        counts.others = self.others.get();
        counts
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_refusal_is_lost_when_the_table_is_full() {
        let tally = ErrnoTally::default();
        for errno in 1..=10 {
            tally.add(errno);
            tally.add(errno);
        }
        let counts = tally.read();
        assert_eq!(counts.count(3), 2);
        assert_eq!(counts.count(9), 0);
        assert_eq!(counts.iter().map(|(_, count)| count).sum::<u64>() + counts.others(), 20);
    }

    #[test]
    fn a_sum_keeps_errnos_apart_and_loses_none() {
        let mut sum = ErrnoCounts::default();
        for errnos in [1..=6, 4..=12] {
            let tally = ErrnoTally::default();
            errnos.for_each(|errno| tally.add(errno));
            sum += &tally.read();
        }
        assert_eq!(sum.count(4), 2);
        assert_eq!(sum.iter().map(|(_, count)| count).sum::<u64>() + sum.others(), 15);
    }

    #[test]
    fn a_detached_port_stays_in_the_total() {
        let books = Arc::new(Books::default());
        let (first, second) = (PortId::new(0), PortId::new(1));
        books.open(first, "a".to_owned()).received(3, 300);
        let tally = books.open(second, "b".to_owned());
        tally.received(4, 400);
        tally.refuse(libc::EINVAL, 1);
        books.close(first);
        let stats = books.reader().read();
        assert_eq!((stats.ports.len(), stats.detached.received_packets), (1, 3));
        assert_eq!(stats.ports[0].counters.refused.count(libc::EINVAL), 1);
        assert_eq!((stats.total().received_packets, stats.total().received_bytes), (7, 700));
    }
}
