//! What happened on a port, in numbers.

use std::fmt;

/// Counters of one port since it was attached.
///
/// The books balance: what the kernel handed over is `received_packets + truncated`, and what was given to `send` or `send_many` and
/// consumed is `sent_packets + refused_packets`.
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
    /// Their bytes.
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

    pub(crate) fn add(&mut self, errno: i32) {
        for entry in &mut self.entries {
            if entry.0 == errno || entry.1 == 0 {
                *entry = (errno, entry.1 + 1);
                return;
            }
        }
        self.others += 1;
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

impl fmt::Debug for ErrnoCounts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_map().entries(self.iter()).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::ErrnoCounts;

    #[test]
    fn no_refusal_is_lost_when_the_table_is_full() {
        let mut counts = ErrnoCounts::default();
        for errno in 1..=10 {
            counts.add(errno);
            counts.add(errno);
        }
        assert_eq!(counts.count(3), 2);
        assert_eq!(counts.count(9), 0);
        assert_eq!(counts.iter().map(|(_, count)| count).sum::<u64>() + counts.others(), 20);
    }
}
