//! What a worker is made with, and what it was granted.

use std::time::Duration;

use super::outgoing::Outbox;
use crate::buf::{ArenaConfig, HIDDEN_RESERVE, MOST_ACCOUNTS, SizeClass};
use crate::sys::socket::Datagrams;

/// How a worker is made. All fields have defaults that fit plain packets up to an MTU of 1500.
///
/// ```
/// use std::time::Duration;
/// use tun_driver::{Wait, WorkerConfig};
///
/// let config = WorkerConfig { buffers: 512, wait: Wait::Spin { duration: Duration::from_micros(50) }, ..WorkerConfig::default() };
/// assert!(config.memory().total() < 4 << 20);
/// ```
#[derive(Clone, Debug)]
pub struct WorkerConfig {
    /// The backend to use; `None` chooses by asking the kernel. A forced backend that the host lacks is an error.
    pub backend: Option<Backend>,
    /// Buffers for packets up to `max_packet`. At least 16.
    pub buffers: usize,
    /// Bytes of the longest packet, link header included, that an ordinary buffer must hold.
    pub max_packet: usize,
    /// Buffers for superpackets and for packets beyond `max_packet`, up to 64 KiB each. 0, the default: none until a port needs them, as that of a
    /// device with offloads or a longer MTU does, and 128 from then on; in an engine, two for each
    /// queue with offloads if that is more.
    pub large_buffers: usize,
    /// Bytes that can be prepended to a packet as it was received. At least 64; rounded up so that packets begin on a cache line.
    pub headroom: usize,
    /// Bytes that can be appended to a packet of the greatest length.
    pub tailroom: usize,
    /// Buffers that each port can always receive into, whatever is held or stuck elsewhere. With
    /// more ports than `buffers` suffice for, each has fewer: all ports together are promised at
    /// most half of the buffers then. 256 ports fit the default of 1024 buffers.
    pub receive_reserve: usize,
    /// What to do while there is nothing to do.
    pub wait: Wait,
}

impl Default for WorkerConfig {
    fn default() -> Self {
        Self {
            backend: None,
            buffers: 1024,
            max_packet: 1536,
            large_buffers: 0,
            headroom: 96,
            tailroom: 64,
            receive_reserve: 64,
            wait: Wait::default(),
        }
    }
}

impl WorkerConfig {
    /// What a worker of this configuration takes, at most. [`usize::MAX`] stands for what is beyond
    /// it, of a configuration that [`Worker::new`](crate::Worker::new) refuses.
    pub fn memory(&self) -> MemoryBudget {
        let arena = self.arena();
        MemoryBudget {
            buffers: arena.region_len(SizeClass::Small),
            large_buffers: arena.region_len(SizeClass::Large),
            tables: arena.tables_len(),
            // 64 bytes an entry and its place in the index array, 16 bytes a completion.
            ring: RING_ENTRIES as usize * (64 + 4) + RING_COMPLETIONS as usize * 16,
            scratch: Datagrams::memory(DATAGRAMS) + (RING_ENTRIES as usize) * size_of::<i32>(),
        }
    }

    pub(crate) fn arena(&self) -> ArenaConfig {
        ArenaConfig {
            // With the hidden reserve in front, packets begin on a cache line.
            headroom: self
                .headroom
                .max(64)
                .saturating_add(HIDDEN_RESERVE)
                .checked_next_multiple_of(64)
                .unwrap_or(usize::MAX)
                - HIDDEN_RESERVE,
            tailroom: self.tailroom,
            small_packet: self.max_packet,
            small_slots: self.buffers,
            large_slots: match self.large_buffers {
                0 => LARGE_BUFFERS,
                wanted => wanted,
            },
        }
    }
}

/// Large buffers, where the configuration leaves it open.
pub(crate) const LARGE_BUFFERS: usize = 128;
/// Entries of the submission queue. A burst never has more.
pub(super) const RING_ENTRIES: u32 = 128;
/// Ports that a worker can have: the size of its table of registered files.
pub(super) const MOST_PORTS: usize = MOST_ACCOUNTS;
/// Entries of the completion queue: whatever is in flight fits, so that it never overflows.
pub(super) const RING_COMPLETIONS: u32 = (2 * (RING_ENTRIES + MOST_PORTS as u32)).next_power_of_two();
/// What [`Wait::Moderate`] may pause for at most.
pub(super) const LONGEST_PAUSE: Duration = Duration::from_millis(100);
/// Datagrams per recvmmsg or sendmmsg.
pub(super) const DATAGRAMS: usize = 64;

/// The memory of one worker, in bytes, a line per use. Without the ports' own few hundred bytes each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct MemoryBudget {
    /// The ordinary buffers: what is registered with the kernel and counts against RLIMIT_MEMLOCK.
    pub buffers: usize,
    /// The same of the large buffers, once a port needs them.
    pub large_buffers: usize,
    /// Free lists, view counts, the return queue.
    pub tables: usize,
    /// Submission and completion queue.
    pub ring: usize,
    /// Arrays for datagrams and results.
    pub scratch: usize,
}

impl MemoryBudget {
    /// All of it while there are no large buffers.
    pub fn total(&self) -> usize {
        self.buffers
            .saturating_add(self.tables)
            .saturating_add(self.ring)
            .saturating_add(self.scratch)
    }

    /// All of it with a port of a device with offloads or with a long MTU, or with [`WorkerConfig::large_buffers`] set.
    pub fn total_with_large_buffers(&self) -> usize {
        self.total()
            .saturating_add(self.large_buffers)
            .saturating_add(Outbox::SUPERPACKETS)
    }
}

/// How packets get in and out of the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Backend {
    /// io_uring with registered buffers and files; kernel 6.4 and later.
    IoUring,
    /// poll(2) with non-blocking read(2), write(2), recvmmsg(2), sendmmsg(2); any kernel, any sandbox.
    Syscalls,
}

/// What a worker does while no packet is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Wait {
    /// Sleeps in the kernel until something happens.
    Block,
    /// Like `Block` while few packets come. While so many come that several are to be expected within `max`, sleeps for that long (less
    /// at high rates) before it looks again: one wake-up for several packets, at the price of up to `max` more latency. Where that turns
    /// out to bring nothing, as with a partner that waits for each answer, it refrains. A wake-up or a stop by the
    /// [`Waker`](crate::Waker) and packets of other ports can be delayed by as much. This is the default, with 50 µs. The timer's lateness comes
    /// on top: little on bare metal, tens of microseconds on some virtual machines.
    ///
    /// On the system-call backend the thread's timer slack (prctl(2), PR_SET_TIMERSLACK) is at its least while such a worker lives.
    Moderate {
        /// The longest pause: at most 100 ms.
        max: Duration,
    },
    /// Watches for `duration` without sleeping, then sleeps. [`Duration::MAX`] never sleeps. Saves the wake-up's latency for a core's time.
    Spin {
        /// How long to watch.
        duration: Duration,
    },
}

impl Default for Wait {
    fn default() -> Self {
        Wait::Moderate {
            max: Duration::from_micros(50),
        }
    }
}

/// What runs, and why.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct BackendReport {
    /// What runs.
    pub backend: Backend,
    /// Why it was chosen, or why not the other.
    pub why: String,
    /// Whether the buffers are registered with the ring. Not for system calls, and not where the memlock limit is too small even for a
    /// shrunken arena.
    pub registered_buffers: bool,
    /// Whether the ring is entered by a registered descriptor.
    pub registered_ring: bool,
    /// Ordinary buffers that were granted; fewer than configured under a tight memlock limit.
    pub buffers: usize,
    /// Large buffers that were granted: 0 until a port needs them, and fewer than configured under a tight memlock limit.
    pub large_buffers: usize,
    /// Whether they are registered with the ring.
    pub registered_large_buffers: bool,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn default_memory_is_small() {
        let memory = WorkerConfig::default().memory();
        assert!(memory.total() <= 4 << 20);
        assert!(memory.total_with_large_buffers() <= 12 << 20, "{memory:?}");
    }

    /// On 32 bits the most that is allowed of each setting is beyond `usize` already.
    #[test]
    fn sizes_beyond_all_memory_are_refused_and_never_overflow() {
        let huge = [usize::MAX, usize::MAX - 63, usize::MAX / 2, usize::MAX / 4096, 1 << 20];
        for value in huge {
            let settings: [fn(&mut WorkerConfig, usize); 6] = [
                |config, value| config.buffers = value,
                |config, value| config.large_buffers = value,
                |config, value| config.headroom = value,
                |config, value| config.tailroom = value,
                |config, value| config.max_packet = value,
                |config, value| {
                    *config = WorkerConfig {
                        buffers: value,
                        large_buffers: value,
                        headroom: value,
                        tailroom: value,
                        max_packet: value,
                        ..WorkerConfig::default()
                    };
                },
            ];
            for set in settings {
                let mut config = WorkerConfig::default();
                set(&mut config, value);
                let memory = config.memory();
                assert!(memory.total() >= WorkerConfig::default().memory().total(), "{config:?}");
                assert!(memory.total_with_large_buffers() >= memory.total());
                let error = crate::Worker::new(&config).expect_err("it takes more than a gibibyte");
                assert_eq!(
                    error.kind(),
                    crate::OpenErrorKind::InvalidSetting,
                    "{config:?}: {error}"
                );
            }
        }
    }

    #[test]
    fn packets_begin_on_a_cache_line_and_get_their_room() {
        for headroom in [0, 1, 32, 63, 64, 65, 95, 96, 97, 128, 200, 224, 256] {
            let arena = WorkerConfig {
                headroom,
                ..WorkerConfig::default()
            }
            .arena();
            assert_eq!(arena.data_offset() % 64, 0, "headroom {headroom}");
            assert!(
                arena.headroom >= headroom.max(64),
                "headroom {headroom} became {}",
                arena.headroom
            );
            assert!(
                arena.headroom <= headroom.max(64) + 64,
                "headroom {headroom} became {}",
                arena.headroom
            );
            assert!(arena.stride(SizeClass::Small) > arena.data_offset() + arena.small_packet + arena.tailroom);
        }
    }
}
