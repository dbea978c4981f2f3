//! A packet in the arena.
#![allow(unsafe_code)]

use std::fmt;
use std::net::SocketAddr;
use std::ops::{Deref, DerefMut};
use std::rc::Rc;

use super::arena::{Account, Arena, HIDDEN_RESERVE, SizeClass};
use super::batch::Batch;
use super::remote::RemoteBuf;
use super::shape::Shape;
use crate::offload::vnet::finish;
use crate::offload::{Gso, Meta, Plan, Segments, VnetFault, VnetHdr};
use crate::sys::ancillary::LocalAddr;

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
    local: Option<LocalAddr>,
    shape: Shape,
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
            local: None,
            shape: Shape::Plain,
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
            local,
            shape,
        } = parts;
        Self {
            arena: Rc::clone(arena),
            slot,
            low,
            high,
            start,
            len,
            peer,
            local,
            shape,
        }
    }

    /// A packet that was received: what the driver's header said of it was checked.
    #[inline]
    pub(crate) fn shaped(arena: &Rc<Arena>, slot: u32, len: u32, shape: Shape) -> Self {
        let mut packet = Self::whole_slot(arena, slot, len);
        packet.shape = shape;
        packet
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

    #[inline]
    pub(crate) fn shape(&self) -> Shape {
        self.shape
    }

    /// Takes over what is said of a packet that this is a copy of.
    pub(crate) fn copy_shape(&mut self, shape: Shape, start: u32) {
        self.shape = shape.moved(start, self.start);
    }

    /// Where the packet begins in its slot.
    #[inline]
    pub(crate) fn start(&self) -> u32 {
        self.start
    }

    /// The slot's number and class, for what is registered with a ring.
    #[inline]
    pub(crate) fn class(&self) -> SizeClass {
        self.arena.class_of(self.slot)
    }

    /// Puts the driver's header right in front of the packet, where it leaves alone what belongs to others. Returns where header and packet lie.
    /// `None` if there is no room: the packet is the rest of another one.
    #[inline]
    pub(crate) fn with_vnet_hdr(&mut self, header: VnetHdr) -> Option<&[u8]> {
        const LEN: u32 = VnetHdr::LEN as u32;
        // In front of a slot's first view is the hidden reserve, which is longer.
        if self.start - self.low < LEN && self.low != HIDDEN_RESERVE as u32 {
            return None;
        }
        let at = self.arena.address(self.slot, self.start - LEN);
        // SAFETY: the bytes from `start - LEN` to `start` are this view's own headroom, or the hidden reserve of a slot whose first view this is;
        // `start..start + len` is the packet. `&mut self` makes it the only access.
        let bytes = unsafe { std::slice::from_raw_parts_mut(at.as_ptr(), (LEN + self.len) as usize) };
        bytes[..VnetHdr::LEN].copy_from_slice(&header.to_bytes());
        Some(bytes)
    }

    /// What is still to be done with the packet: nothing, a checksum, or cutting. Packets of devices without offloads are
    /// [`Meta::Plain`].
    ///
    /// It stays right while headers are taken off the front or put there. What stands in front of the IP header of a superpacket comes in front of
    /// each of its segments.
    ///
    /// [`Meta::Verified`] ends with any change of the packet's bytes or bounds, and with any call
    /// that lends its bytes for writing.
    ///
    /// Whoever changes addresses or ports of an unfinished packet or a superpacket has to correct its checksum field all the same
    /// ([`offload::checksum::update`](crate::offload::checksum::update) takes the complement of what the field holds).
    ///
    /// # Errors
    /// What was said of the packet when it came does not fit it any more: it was cut shorter or longer, or its headers were overwritten. A port
    /// refuses to send it. [`set_meta`](Self::set_meta) tells otherwise.
    #[inline]
    pub fn meta(&self) -> Result<Meta, VnetFault> {
        self.shape.meta(self, self.start)
    }

    /// Says what is still to be done with the packet. [`Meta::Gso`] makes a superpacket of it; its
    /// checksum field has to hold the sum over the pseudo-header then. The checksum of its IPv4
    /// header has to be right: a stack that it is passed on to drops it otherwise, though its
    /// segments get headers with checksums of their own.
    ///
    /// # Errors
    /// It does not fit the packet; nothing is changed then.
    pub fn set_meta(&mut self, meta: Meta) -> Result<(), VnetFault> {
        match &meta {
            Meta::Unfinished { start, field } if start > field || *field >= self.len() => {
                return Err(VnetFault::Checksum);
            }
            Meta::Gso(gso) if gso.headers.network >= self.len() => return Err(VnetFault::Length),
            _ => {}
        }
        let shape = Shape::of(&meta, self.start);
        shape.meta(self, self.start)?;
        self.shape = shape;
        Ok(())
    }

    /// Whether it is to be cut into segments: up to 64 KiB of TCP or UDP behind one set of headers.
    #[inline]
    pub fn is_superpacket(&self) -> bool {
        self.shape.is_gso()
    }

    /// Writes the packet's checksum if it was left to be finished. Superpackets are left as they are: their segments get theirs as they are cut.
    ///
    /// # Errors
    /// As [`meta`](Self::meta).
    #[inline]
    pub fn finish_checksum(&mut self) -> Result<(), VnetFault> {
        if let Shape::Unfinished { .. } = self.shape
            && let Meta::Unfinished { start, field } = self.meta()?
        {
            finish(self, start, field);
            self.shape = Shape::Plain;
        }
        Ok(())
    }

    /// Lends the packets that this one stands for, one after another, each whole and with its checksums: the segments of a superpacket, or just
    /// the packet. Nothing is copied but headers, which are written over the payload of the segments before; so each is to be done with before
    /// the next, and the packet is of no use afterwards.
    ///
    /// # Errors
    /// As [`meta`](Self::meta).
    ///
    /// ```
    /// # fn example(mut packet: tun_driver::PacketBuf) -> Result<(), tun_driver::offload::VnetFault> {
    /// let mut segments = packet.segments()?;
    /// while let Some(segment) = segments.next() {
    ///     println!("{} bytes", segment.len()); // encrypt it into a buffer, count it, …
    /// }
    /// # Ok(())
    /// # }
    /// ```
    pub fn segments(&mut self) -> Result<Segments<'_>, VnetFault> {
        self.finish_checksum()?;
        match self.plan()? {
            Some(plan) => {
                // Its headers are written over from now on.
                self.shape = Shape::Plain;
                Ok(Segments::planned(plan, self))
            }
            None => Ok(Segments::whole(self)),
        }
    }

    /// Takes segments off the front of a superpacket and puts them into the batch as packets of their own, each with the worker's headroom and
    /// tailroom and this packet's peer. Returns how many.
    ///
    /// It ends when the batch is full or no buffer is free, and what is left stays a superpacket, for the next call or to be sent; it is empty once
    /// all are out. [`Batch::split_into`] does it for all packets of a batch.
    ///
    /// # Errors
    /// As [`meta`](Self::meta). Nothing is taken from a packet that is no superpacket: 0.
    pub fn split_into(&mut self, batch: &mut Batch) -> Result<usize, VnetFault> {
        let Some(plan) = self.plan()? else { return Ok(0) };
        let mut count = 0;
        while !batch.is_full() && count < plan.count() {
            let Some(mut segment) = self.cut(&plan, count, Account::NONE) else {
                break;
            };
            segment.copy_addresses(self);
            count += 1;
            let _ = batch.push(segment);
        }
        self.keep_from(&plan, count);
        Ok(count)
    }

    fn gso(&self) -> Result<Option<Gso>, VnetFault> {
        if !self.is_superpacket() {
            return Ok(None);
        }
        match self.meta()? {
            Meta::Gso(gso) => Ok(Some(gso)),
            _ => Ok(None),
        }
    }

    /// How it is to be cut, if it is a superpacket.
    pub(crate) fn plan(&self) -> Result<Option<Plan>, VnetFault> {
        self.gso()?.map(|gso| Plan::of_checked(&gso, self)).transpose()
    }

    /// One segment as a packet of its own. `None` if there is no slot for it.
    #[inline]
    pub(crate) fn cut(&self, plan: &Plan, index: usize, account: Account) -> Option<Self> {
        let arena = &self.arena;
        let class = [SizeClass::Small, SizeClass::Large]
            .into_iter()
            .find(|&class| plan.longest() < arena.read_len(class) as usize && arena.available(account, class, 1) > 0)?;
        let slot = arena.check_out(account, class)?;
        // As long as it can be, until its length is known.
        let mut segment = Self::whole_slot(arena, slot, plan.longest() as u32);
        let payload = plan.header(index, self, &mut segment)?;
        let (front, payload) = (plan.header_len(), self.get(payload)?);
        segment.len = (front + payload.len()) as u32;
        segment[front..].copy_from_slice(payload);
        Some(segment)
    }

    /// Makes the first segment of a superpacket in its place, so that the packet is just that, until [`lent_back`](Self::lent_back). Returns what to
    /// give there.
    pub(crate) fn lend_first(&mut self, plan: &Plan) -> (u32, Shape) {
        let whole = (self.len, self.shape);
        if let Some(segment) = plan.segment(0, self) {
            let len = segment.len();
            self.shape = Shape::Plain;
            self.truncate(len);
        }
        whole
    }

    /// Makes the packet as long as it was. Its headers are still those of the first segment: [`keep_from`](Self::keep_from) mends them.
    pub(crate) fn lent_back(&mut self, (len, shape): (u32, Shape)) {
        self.len = len;
        self.shape = shape;
    }

    /// Forgets the first `count` segments: what is left is a superpacket, or nothing.
    pub(crate) fn keep_from(&mut self, plan: &Plan, count: usize) {
        match plan.keep_from(count, self) {
            Some(start) => {
                self.trim_front(start);
                if let Shape::Gso { network, .. } = &mut self.shape {
                    *network += start as u32;
                }
            }
            None => {
                self.shape = Shape::Plain;
                self.truncate(0);
            }
        }
    }

    /// The errno with which a segment of this superpacket was refused that is not in it any more; 0 for none.
    pub(crate) fn torn(&self) -> i32 {
        match self.shape {
            Shape::Gso { torn, .. } => torn.into(),
            _ => 0,
        }
    }

    /// Remembers that a segment was refused, for when the last one is out.
    pub(crate) fn tear(&mut self, errno: i32) {
        if let Shape::Gso { torn, .. } = &mut self.shape {
            *torn = errno as u16;
        }
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
        // Also ends a verdict, as `append`, `grow_front` and `grow_back` do.
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
        if count > 0 {
            self.shape.unverify();
        }
        self.start += count;
        self.len -= count;
    }

    /// Cuts the packet to its first `len` bytes; the rest becomes tailroom. Nothing happens if it is shorter already.
    #[inline]
    pub fn truncate(&mut self, len: usize) {
        if len < self.len as usize {
            self.shape.unverify();
            self.len = len as u32;
        }
    }

    /// Takes the first `at` bytes off as a packet of their own, without a copy; `self` keeps the rest.
    ///
    /// The two share the slot: the front part keeps the headroom, the rest keeps the tailroom, and between them there is none. The peer
    /// address is kept by both. What [`meta`](Self::meta) says stays with the front part, which it no longer fits if this is a superpacket.
    ///
    /// # Panics
    /// If `at` is more than the packet's length. The process aborts if the slot has 2³² − 1 views
    /// already, which takes leaking them ([`mem::forget`](std::mem::forget)).
    pub fn split_to(&mut self, at: usize) -> PacketBuf {
        assert!(
            at <= self.len as usize,
            "split_to({at}) of a packet of {} bytes",
            self.len
        );
        let cut = self.start + at as u32;
        self.arena.add_view(self.slot);
        if at < self.len as usize {
            self.shape.unverify();
        }
        let front = PacketBuf {
            arena: Rc::clone(&self.arena),
            slot: self.slot,
            low: self.low,
            high: cut,
            start: self.start,
            len: at as u32,
            peer: self.peer,
            local: self.local,
            shape: self.shape,
        };
        self.shape = Shape::Plain;
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
    ///
    /// Another peer than before forgets the [`local`](Self::local) address, which was that of the
    /// conversation with the old one.
    #[inline]
    pub fn set_peer(&mut self, peer: Option<SocketAddr>) {
        if self.peer != peer {
            self.peer = peer;
            self.local = None;
        }
    }

    /// The address of this host that the datagram was sent to, which an answer is to come from.
    /// `None` where the kernel chooses: on a queue, on a socket that is connected or bound to one
    /// address, and for what was sent to a group.
    ///
    /// A packet that is sent back keeps it. An answer in another packet needs both: `set_peer`,
    /// then [`set_local`](Self::set_local).
    #[inline]
    pub fn local(&self) -> Option<LocalAddr> {
        self.local
    }

    /// Sets the address that a UDP port on a wildcard socket (bound to `0.0.0.0` or `::`) sends the
    /// packet from; `None` for the one that the kernel chooses by the route. Set it after
    /// [`set_peer`](Self::set_peer). Other ports do not look at it.
    ///
    /// The packet is refused (EINVAL or ENETUNREACH) where the host does not have the address.
    #[inline]
    pub fn set_local(&mut self, local: Option<LocalAddr>) {
        self.local = local;
    }

    /// Sets what the kernel said of a datagram that was received.
    #[inline]
    pub(crate) fn set_addresses(&mut self, peer: Option<SocketAddr>, local: Option<LocalAddr>) {
        (self.peer, self.local) = (peer, local);
    }

    /// Takes over where `other` came from and shall go to.
    #[inline]
    pub(crate) fn copy_addresses(&mut self, other: &PacketBuf) {
        (self.peer, self.local) = (other.peer, other.local);
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
            local,
            shape,
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
                local,
                shape,
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
    pub(crate) local: Option<LocalAddr>,
    pub(crate) shape: Shape,
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
        // What was verified may be changed.
        self.shape.unverify();
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
            .field("local", &self.local)
            .field("shape", &self.shape)
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
