//! A packet in the arena.
#![allow(unsafe_code)]

use std::fmt;
use std::net::SocketAddr;
use std::ops::{Deref, DerefMut};
use std::rc::Rc;

use super::arena::{Account, Arena, HIDDEN_RESERVE, SizeClass};
use super::remote::RemoteBuf;

/// One packet: a range of a slot of its worker's arena.
///
/// It derefs to `[u8]`. Headers are put on and taken off by moving its ends: [`prepend`](Self::prepend), [`append`](Self::append),
/// [`trim_front`](Self::trim_front), [`truncate`](Self::truncate); no packet byte is copied by that. [`split_to`](Self::split_to) makes
/// two packets of one without a copy.
///
/// It stays on its worker's thread (`!Send`) and goes home when dropped, without atomics; [`into_remote`](Self::into_remote) makes a
/// handle that may travel. It may outlive its worker: the memory lives until the last packet is gone.
///
/// ```
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let worker = tun_driver::Worker::new(&tun_driver::WorkerConfig::default())?;
/// let mut packet = worker.packet_from(b"payload").ok_or("no free buffer")?;
/// packet.prepend(b"header ")?;
/// assert_eq!(&packet[..], b"header payload");
/// packet.trim_front(7);
/// assert_eq!(&packet[..], b"payload");
/// # Ok(())
/// # }
/// ```
pub struct PacketBuf {
    arena: Rc<Arena>,
    slot: u32,
    /// The bytes `low..high` of the slot belong to this view alone; the packet is `start..start + len` within them.
    low: u32,
    high: u32,
    start: u32,
    len: u32,
    peer: Option<SocketAddr>,
}

/// A packet has not that much headroom or tailroom left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NoRoom {
    /// Bytes that were asked for.
    pub wanted: usize,
    /// Bytes that were there.
    pub available: usize,
}

impl PacketBuf {
    /// Takes over the one view of a slot just checked out, with `len` bytes of packet at the usual place.
    #[inline]
    pub(crate) fn whole_slot(arena: &Rc<Arena>, slot: u32, len: u32) -> Self {
        let start = arena.config().data_offset() as u32;
        let high = arena.slot_end(slot);
        debug_assert!(start + len <= high);
        Self {
            arena: Rc::clone(arena),
            slot,
            low: HIDDEN_RESERVE as u32,
            high,
            start,
            len,
            peer: None,
        }
    }

    /// Takes back a view that had travelled. The caller has made sure that `arena` is its home.
    pub(crate) fn from_remote_parts(arena: &Rc<Arena>, parts: Parts) -> Self {
        let Parts {
            slot,
            low,
            high,
            start,
            len,
            peer,
        } = parts;
        Self {
            arena: Rc::clone(arena),
            slot,
            low,
            high,
            start,
            len,
            peer,
        }
    }

    /// A copy in a small slot that is charged to `account`. `None` if it has no right to one, or the bytes are too long.
    pub(crate) fn copied(arena: &Rc<Arena>, account: Account, bytes: &[u8]) -> Option<Self> {
        if bytes.len() >= arena.read_len(SizeClass::Small) as usize
            || arena.available(account, SizeClass::Small, 1) == 0
        {
            return None;
        }
        let slot = arena.check_out(account, SizeClass::Small)?;
        let mut packet = Self::whole_slot(arena, slot, bytes.len() as u32);
        packet.copy_from_slice(bytes);
        Some(packet)
    }

    /// Whether its memory belongs to `arena`.
    #[inline]
    pub(crate) fn is_home(&self, arena: &Rc<Arena>) -> bool {
        Rc::ptr_eq(&self.arena, arena)
    }

    pub(crate) fn arena(&self) -> &Rc<Arena> {
        &self.arena
    }

    /// Keeps the memory out of all hands until the process ends, because the kernel may still read it.
    pub(crate) fn keep_for_ever(&self) {
        self.arena.add_view(self.slot);
        super::arena::leak_memory(self.arena.shared());
    }

    /// Bytes that can be put in front without moving the packet.
    pub fn headroom(&self) -> usize {
        (self.start - self.low) as usize
    }

    /// Bytes that can be put behind without moving the packet.
    pub fn tailroom(&self) -> usize {
        (self.high - self.start - self.len) as usize
    }

    /// Puts `header` in front of the packet.
    ///
    /// # Errors
    /// [`NoRoom`] if the headroom is shorter than `header`; the packet is then unchanged.
    #[inline]
    pub fn prepend(&mut self, header: &[u8]) -> Result<(), NoRoom> {
        let available = self.headroom();
        if header.len() > available {
            return Err(NoRoom {
                wanted: header.len(),
                available,
            });
        }
        self.start -= header.len() as u32;
        self.len += header.len() as u32;
        self[..header.len()].copy_from_slice(header);
        Ok(())
    }

    /// Puts `trailer` behind the packet.
    ///
    /// # Errors
    /// [`NoRoom`] if the tailroom is shorter than `trailer`; the packet is then unchanged.
    #[inline]
    pub fn append(&mut self, trailer: &[u8]) -> Result<(), NoRoom> {
        let (available, end) = (self.tailroom(), self.len as usize);
        if trailer.len() > available {
            return Err(NoRoom {
                wanted: trailer.len(),
                available,
            });
        }
        self.len += trailer.len() as u32;
        self[end..].copy_from_slice(trailer);
        Ok(())
    }

    /// Makes the packet `count` bytes longer at its front and returns them, zeroed, to be written in place.
    ///
    /// # Errors
    /// [`NoRoom`] if the headroom is shorter; the packet is then unchanged.
    #[inline]
    pub fn grow_front(&mut self, count: usize) -> Result<&mut [u8], NoRoom> {
        let available = self.headroom();
        if count > available {
            return Err(NoRoom {
                wanted: count,
                available,
            });
        }
        self.start -= count as u32;
        self.len += count as u32;
        let front = &mut self[..count];
        front.fill(0);
        Ok(front)
    }

    /// Makes the packet `count` bytes longer at its end and returns them, zeroed, to be written in place.
    ///
    /// # Errors
    /// [`NoRoom`] if the tailroom is shorter; the packet is then unchanged.
    #[inline]
    pub fn grow_back(&mut self, count: usize) -> Result<&mut [u8], NoRoom> {
        let (available, end) = (self.tailroom(), self.len as usize);
        if count > available {
            return Err(NoRoom {
                wanted: count,
                available,
            });
        }
        self.len += count as u32;
        let back = &mut self[end..];
        back.fill(0);
        Ok(back)
    }

    /// Takes `count` bytes off the front; they become headroom. All of the packet if it is shorter.
    #[inline]
    pub fn trim_front(&mut self, count: usize) {
        let count = count.min(self.len as usize) as u32;
        self.start += count;
        self.len -= count;
    }

    /// Cuts the packet to its first `len` bytes; the rest becomes tailroom. Nothing happens if it is shorter already.
    #[inline]
    pub fn truncate(&mut self, len: usize) {
        self.len = self.len.min(len.min(u32::MAX as usize) as u32);
    }

    /// Takes the first `at` bytes off as a packet of their own, without a copy; `self` keeps the rest.
    ///
    /// The two share the slot: the front part keeps the headroom, the rest keeps the tailroom, and between them there is none. The peer
    /// address is kept by both.
    ///
    /// # Panics
    /// If `at` is more than the packet's length.
    pub fn split_to(&mut self, at: usize) -> PacketBuf {
        assert!(
            at <= self.len as usize,
            "split_to({at}) of a packet of {} bytes",
            self.len
        );
        let cut = self.start + at as u32;
        self.arena.add_view(self.slot);
        let front = PacketBuf {
            arena: Rc::clone(&self.arena),
            slot: self.slot,
            low: self.low,
            high: cut,
            start: self.start,
            len: at as u32,
            peer: self.peer,
        };
        self.low = cut;
        self.start = cut;
        self.len -= at as u32;
        front
    }

    /// Where the packet came from or shall go to on a UDP port; `None` on a queue, and for the connected peer.
    #[inline]
    pub fn peer(&self) -> Option<SocketAddr> {
        self.peer
    }

    /// Sets where a UDP port shall send the packet; `None` for the peer that the socket is connected to. A queue does not look at it.
    #[inline]
    pub fn set_peer(&mut self, peer: Option<SocketAddr>) {
        self.peer = peer;
    }

    /// Makes a handle that any thread may hold. Dropping that gives the memory back to this worker.
    pub fn into_remote(self) -> RemoteBuf {
        let shared = self.arena.shared().clone();
        let this = std::mem::ManuallyDrop::new(self);
        let PacketBuf {
            slot,
            low,
            high,
            start,
            len,
            peer,
            ..
        } = *this;
        // SAFETY: `this` is never used again, so its reference to the arena is dropped once, here. The view itself (one count of the
        // slot) passes to the RemoteBuf.
        drop(unsafe { std::ptr::read(&this.arena) });
        RemoteBuf::from_parts(
            shared,
            Parts {
                slot,
                low,
                high,
                start,
                len,
                peer,
            },
        )
    }
}

/// What a view is, without the arena it is in.
#[derive(Clone, Copy)]
pub(crate) struct Parts {
    pub(crate) slot: u32,
    pub(crate) low: u32,
    pub(crate) high: u32,
    pub(crate) start: u32,
    pub(crate) len: u32,
    pub(crate) peer: Option<SocketAddr>,
}

impl Deref for PacketBuf {
    type Target = [u8];

    #[inline]
    fn deref(&self) -> &[u8] {
        let at = self.arena.address(self.slot, self.start);
        // SAFETY: `start..start + len` lies in `low..high`, which belongs to this view alone (kept by every method of this type), in a
        // slot that is checked out, in a mapping that was zeroed at first and lives as long as `arena`.
        unsafe { std::slice::from_raw_parts(at.as_ptr(), self.len as usize) }
    }
}

impl DerefMut for PacketBuf {
    #[inline]
    fn deref_mut(&mut self) -> &mut [u8] {
        let at = self.arena.address(self.slot, self.start);
        // SAFETY: as in `deref`; `&mut self` makes it the only access.
        unsafe { std::slice::from_raw_parts_mut(at.as_ptr(), self.len as usize) }
    }
}

impl AsRef<[u8]> for PacketBuf {
    fn as_ref(&self) -> &[u8] {
        self
    }
}

impl AsMut<[u8]> for PacketBuf {
    fn as_mut(&mut self) -> &mut [u8] {
        self
    }
}

impl Drop for PacketBuf {
    #[inline]
    fn drop(&mut self) {
        self.arena.release(self.slot);
    }
}

impl fmt::Debug for PacketBuf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PacketBuf")
            .field("len", &self.len())
            .field("headroom", &self.headroom())
            .field("tailroom", &self.tailroom())
            .field("peer", &self.peer)
            .finish_non_exhaustive()
    }
}

impl fmt::Display for NoRoom {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "no room for {} bytes beside the packet, {} are left; raise WorkerConfig::headroom or tailroom",
            self.wanted, self.available
        )
    }
}

impl std::error::Error for NoRoom {}

impl From<NoRoom> for std::io::Error {
    fn from(error: NoRoom) -> Self {
        std::io::Error::new(std::io::ErrorKind::InvalidInput, error)
    }
}
