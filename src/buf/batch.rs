//! Packets that travel together.

use std::ops::{Deref, DerefMut};

use super::packet::PacketBuf;

/// A bounded list of packets: what `recv_many` fills and `send_many` takes from the front.
///
/// It never grows beyond its capacity and never allocates after it was made. It derefs to a slice of packets. What is thrown away from it
/// ([`clear`](Self::clear), [`retain_mut`](Self::retain_mut), or dropping the batch with packets in it) is counted as discarded by the
/// worker that the packets belong to.
#[derive(Debug)]
pub struct Batch {
    packets: Vec<PacketBuf>,
    capacity: usize,
}

/// Takes all packets out of a [`Batch`], in order. What is not taken is dropped with it.
pub type Drain<'a> = std::vec::Drain<'a, PacketBuf>;

impl Batch {
    /// An empty batch for at most `capacity` packets.
    pub fn with_capacity(capacity: usize) -> Self {
        Self {
            packets: Vec::with_capacity(capacity),
            capacity,
        }
    }

    /// How many packets it can hold.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// How many more packets it can take.
    pub fn room(&self) -> usize {
        self.capacity - self.packets.len()
    }

    /// Whether it can take no more.
    pub fn is_full(&self) -> bool {
        self.room() == 0
    }

    /// Adds a packet at the end.
    ///
    /// # Errors
    /// A full batch hands the packet back.
    #[inline]
    pub fn push(&mut self, packet: PacketBuf) -> Result<(), PacketBuf> {
        if self.is_full() {
            return Err(packet);
        }
        self.packets.push(packet);
        Ok(())
    }

    /// Takes the last packet out.
    pub fn pop(&mut self) -> Option<PacketBuf> {
        self.packets.pop()
    }

    /// Takes all packets out, in order.
    pub fn drain(&mut self) -> Drain<'_> {
        self.packets.drain(..)
    }

    /// Keeps the packets that `keep` says yes to, in order; the others are discarded and counted.
    pub fn retain_mut(&mut self, mut keep: impl FnMut(&mut PacketBuf) -> bool) {
        self.packets.retain_mut(|packet| {
            let kept = keep(packet);
            if !kept {
                packet.arena().count_discarded(1);
            }
            kept
        });
    }

    /// Discards all packets, and counts them.
    pub fn clear(&mut self) {
        for packet in self.packets.drain(..) {
            packet.arena().count_discarded(1);
        }
    }

    /// Drops the first `count` packets: the kernel has taken them, or refused them and that was counted.
    pub(crate) fn consume_front(&mut self, count: usize) {
        self.packets.drain(..count);
    }
}

impl Deref for Batch {
    type Target = [PacketBuf];

    #[inline]
    fn deref(&self) -> &[PacketBuf] {
        &self.packets
    }
}

impl DerefMut for Batch {
    #[inline]
    fn deref_mut(&mut self) -> &mut [PacketBuf] {
        &mut self.packets
    }
}

impl<'a> IntoIterator for &'a Batch {
    type Item = &'a PacketBuf;
    type IntoIter = std::slice::Iter<'a, PacketBuf>;

    fn into_iter(self) -> Self::IntoIter {
        self.packets.iter()
    }
}

impl<'a> IntoIterator for &'a mut Batch {
    type Item = &'a mut PacketBuf;
    type IntoIter = std::slice::IterMut<'a, PacketBuf>;

    fn into_iter(self) -> Self::IntoIter {
        self.packets.iter_mut()
    }
}

impl Drop for Batch {
    fn drop(&mut self) {
        self.clear();
    }
}
