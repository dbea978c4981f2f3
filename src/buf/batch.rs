//! Packets that travel together.

use std::cell::Cell;
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
        // The second condition never holds. It shows the compiler that the vector does not grow, so
        // the packet is built in place instead of being copied there: 2 % of a receive.
        if self.is_full() || self.packets.len() == self.packets.capacity() {
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

    /// Moves the packets to `whole`, in order, as they go over a wire: superpackets are cut into packets of their own
    /// ([`PacketBuf::split_into`]), checksums finished. Returns how many packets `whole` got.
    ///
    /// It ends when `whole` is full or no buffer is free; what is left stays, for the next call. A packet that does not fit what was said of it
    /// any more ([`PacketBuf::meta`]) is discarded and counted.
    ///
    /// ```
    /// # use tun_driver::Batch;
    /// # fn encrypt(_: &mut [u8]) {}
    /// fn all(received: &mut Batch, whole: &mut Batch) {
    ///     while received.split_into(whole) > 0 {
    ///         whole.iter_mut().for_each(|packet| encrypt(packet));
    ///         // … and send them
    ///         whole.clear();
    ///     }
    /// }
    /// ```
    pub fn split_into(&mut self, whole: &mut Batch) -> usize {
        let before = whole.len();
        let over = Cell::new(whole.is_full());
        let mut rest = None;
        for mut packet in self.packets.extract_if(.., |_| !over.get()) {
            let was_superpacket = packet.is_superpacket();
            let split = if was_superpacket {
                packet.split_into(whole).map(drop)
            } else {
                packet.finish_checksum()
            };
            if split.is_err() {
                packet.arena().count_discarded(1);
            } else if packet.is_superpacket() {
                rest = Some(packet);
                over.set(true);
            } else if !was_superpacket {
                let _ = whole.push(packet);
            }
            over.set(over.get() || whole.is_full());
        }
        if let Some(rest) = rest {
            self.packets.insert(0, rest);
        }
        whole.len() - before
    }

    /// Drops the packets whose places are marked.
    pub(crate) fn consume_marked(&mut self, marked: &[bool]) {
        let mut place = 0;
        self.packets.retain(|_| {
            place += 1;
            !marked.get(place - 1).is_some_and(|&marked| marked)
        });
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
