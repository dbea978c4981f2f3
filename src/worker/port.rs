//! A port: what a worker serves, with all that it remembers about it.
#![allow(unsafe_code)]

use std::collections::VecDeque;
use std::net::UdpSocket;
use std::os::fd::{AsRawFd, RawFd};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::burst::{Burst, LONGEST};
use super::handoff::{self, HandoffEnd};
use super::outgoing::{self, OutgoingRules, Superpackets};
use crate::buf::{Account, Arena, Batch, PacketBuf, Shape, SizeClass};
use crate::error::{PortError, PortErrorKind};
use crate::offload::{GsoType, Link, Offloads, VnetHdr, vnet};
use crate::queue::{Changed, Queue};
use crate::stats::{Counters, PortTally};
use crate::sys::fd;
use crate::sys::socket_options::SocketOptions;

/// Names a port of one worker. A name is never used twice in a process, so that a stale one is told from a new one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PortId {
    pub(super) index: u16,
    /// 64 bits, so that it never comes around.
    serial: u64,
}

impl PortId {
    pub(crate) fn new(index: usize) -> Self {
        static SERIAL: AtomicU64 = AtomicU64::new(0);
        Self {
            index: index as u16,
            serial: SERIAL.fetch_add(1, Ordering::Relaxed),
        }
    }
}

/// What a port stands on: a queue of a TUN or TAP device, a UDP socket, or packets that other threads hand over.
#[derive(Debug)]
#[non_exhaustive]
pub enum Endpoint {
    /// One attached queue.
    Queue(Queue),
    /// A bound, and perhaps connected, UDP socket.
    Udp(UdpSocket),
    /// The receiving end of a [`Handoff`](super::Handoff). Dropped, it tells the sender that the port is gone.
    Handoff(HandoffEnd),
}

impl Endpoint {
    /// The queue, if it is one.
    pub fn into_queue(self) -> Option<Queue> {
        match self {
            Endpoint::Queue(queue) => Some(queue),
            Endpoint::Udp(_) | Endpoint::Handoff(_) => None,
        }
    }

    /// The socket, if it is one.
    pub fn into_udp(self) -> Option<UdpSocket> {
        match self {
            Endpoint::Queue(_) | Endpoint::Handoff(_) => None,
            Endpoint::Udp(socket) => Some(socket),
        }
    }

    pub(super) fn raw_fd(&self) -> RawFd {
        match self {
            Endpoint::Queue(queue) => queue.as_raw_fd(),
            Endpoint::Udp(socket) => socket.as_raw_fd(),
            Endpoint::Handoff(_) => -1,
        }
    }
}

impl From<Queue> for Endpoint {
    fn from(queue: Queue) -> Self {
        Endpoint::Queue(queue)
    }
}

impl From<UdpSocket> for Endpoint {
    fn from(socket: UdpSocket) -> Self {
        Endpoint::Udp(socket)
    }
}

/// What a port takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct PortInfo {
    /// What may be sent unfinished or uncut and goes so: granted to the device when the port was attached, not refused by the kernel since, and not
    /// switched off. Everything else is finished and cut by the worker.
    pub passes: Offloads,
    /// What is switched on.
    pub superpackets: Superpackets,
    /// The longest packet that a receive on this port can bring, in bytes.
    pub longest: usize,
}

/// What is left when a port was detached.
#[derive(Debug)]
#[non_exhaustive]
pub struct Detached {
    /// The queue or socket, ready for another worker.
    pub endpoint: Endpoint,
    /// Packets that had been received and not asked for yet.
    pub undelivered: Batch,
    /// The port's counters at the end; `undelivered` counts as received.
    pub counters: Counters,
}

/// What became of a batch that was sent.
///
/// `accepted + refused` packets were taken from its front; the rest stays in the batch.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[must_use = "what was not accepted or refused is still in the batch"]
pub struct Sent {
    /// Packets that the kernel took.
    pub accepted: usize,
    /// Packets that the kernel refused for good: dropped, and counted by errno.
    pub refused: usize,
    /// Why the first of these was refused.
    pub refusal: Option<PortError>,
    /// Why sending stopped before the end of the batch, or that the device was found down.
    pub stopped: Option<PortError>,
}

impl Sent {
    /// The port only receives.
    pub(super) fn one_way() -> Self {
        let error = PortError::new(PortErrorKind::Other, "send_many", libc::EOPNOTSUPP);
        Self {
            stopped: Some(error),
            ..Self::default()
        }
    }

    /// Adds what became of the packets behind.
    pub(super) fn add(&mut self, next: Sent) {
        self.accepted += next.accepted;
        self.refused += next.refused;
        self.refusal = self.refusal.or(next.refusal);
        self.stopped = next.stopped;
    }
}

/// Batches sent to a device with a header, between two proofs that the header has the right size.
const MOST_UNPROVED: u32 = 1024;

/// Packets beyond the buffers, between two questions whether they are superpackets that another
/// holder switched on.
const TRUNCATED_ASK: u64 = 1024;

/// What ports are polled for. POLLRDHUP tells a socket with packets from one that was shut down,
/// which is readable for good (`datagram_poll`).
pub(super) const POLLED: libc::c_short = libc::POLLIN | libc::POLLRDHUP;

/// One packet that lies in a slot and waits to be asked for.
#[derive(Clone, Copy)]
struct Received {
    slot: u32,
    len: u32,
    shape: Shape,
    /// It does not stand in place, and is delivered only if the kernel says that the header has our
    /// size.
    held: bool,
}

/// What became of a read's result.
pub(super) enum Delivery {
    /// It is to be filed otherwise.
    Nothing,
    /// It is in the batch, with that many bytes.
    Packet(u32),
    /// Its header contradicted it.
    Dropped,
    /// It is in the inbox.
    Held,
}

/// How far it is known that the device's header has the size that is counted with.
#[derive(Default)]
struct HeaderPlace {
    /// Batches sent since a packet came that stood in place, or since the kernel was asked.
    unproved: u32,
    /// Times that the device's header was set back, as far as this port knows.
    restored: u32,
    /// Packets read before it was set back may still come: at most that many.
    strays: u32,
    /// Uncommon types of frames that stood in place when the kernel was asked, the latest first: a
    /// bridge may mix some, and the kernel cannot be asked for each frame.
    known_types: [Option<u16>; 4],
    /// Packets that were read since the kernel was asked last, and that it is to be asked about:
    /// once for all of them, as a sender of bad packets must not make this thread ask for each.
    in_doubt: u32,
    /// What was dropped meanwhile, to be reported if the header has our size.
    bad: Option<PortError>,
    /// Reads that had no room for the header.
    unreadable: u64,
}

/// Which reads of the backend on system calls are known not to wait, whatever another holder makes
/// of the descriptor.
#[derive(Default)]
pub(super) struct Reads {
    /// What the last receive brought until the queue was empty; no end if it was not.
    pub(super) expected: u32,
    /// Another holder made the descriptor blocking once, so no read is trusted any more.
    cautious: bool,
    /// The kernel does not take RWF_NOWAIT here.
    pub(super) refused: bool,
}

impl Reads {
    /// How many reads of the next receive may be plain ones: `readable` says that poll(2) found a
    /// packet. What comes after these is likely to find the queue empty.
    pub(super) fn plain(&self, readable: bool) -> u32 {
        if self.cautious {
            0
        } else {
            self.expected.max(u32::from(readable))
        }
    }
}

pub(super) struct Port {
    pub(super) id: PortId,
    /// What was set on a socket. Before the endpoint, which closes it: fields are dropped in this
    /// order.
    pub(super) socket: Option<SocketOptions>,
    pub(super) endpoint: Endpoint,
    pub(super) fd: RawFd,
    pub(super) account: Account,
    pub(super) class: SizeClass,
    /// Where reads go in a slot, and how much is offered; the driver's header included.
    pub(super) read_at: u32,
    pub(super) read_len: u32,
    /// One read (queue) or poll (socket) is in flight in the ring.
    pub(super) armed: bool,
    /// Polling found an error on the socket: its error queue may hold reports.
    pub(super) errored: bool,
    /// Polling found that another holder of the socket shut it down for reading.
    pub(super) shut: bool,
    pub(super) burst: Burst,
    /// The last receive ended with a full batch: there may be more.
    pub(super) more: bool,
    /// Readiness that was found by polling and not used yet.
    pub(super) readable: bool,
    /// Something was received since the worker last slept or paused.
    pub(super) recent: bool,
    /// The worker paused so that packets gather here; they have not been asked for yet.
    pub(super) gathered: bool,
    /// To be told by `next_ready`.
    pub(super) announced: bool,
    /// Writes depend on each other, so that back-pressure cannot make one overtake another.
    pub(super) linked: bool,
    pub(super) down: bool,
    /// The last packet that came was a superpacket.
    pub(super) heavy: bool,
    /// What is sent are pieces of one packet, which is counted when they are through.
    pub(super) cutting: bool,
    pub(super) outgoing: OutgoingRules,
    pub(super) tally: Arc<PortTally>,
    /// What another holder of the device had changed, for an engine to report.
    pub(super) changed: Option<Changed>,
    pub(super) reads: Reads,
    place: HeaderPlace,
    inbox: VecDeque<Received>,
    /// A permanent end, and whether it was told.
    gone: Option<PortError>,
    gone_told: bool,
    /// Something to tell once.
    notice: Option<PortError>,
}

impl Port {
    pub(super) fn new(id: PortId, endpoint: Endpoint, arena: &Arena, class: SizeClass, tally: Arc<PortTally>) -> Self {
        let outgoing = OutgoingRules::new(&endpoint);
        Self {
            id,
            socket: None,
            fd: endpoint.raw_fd(),
            account: Account::port(usize::from(id.index)),
            class,
            read_len: read_len(arena, class, outgoing.vnet),
            read_at: arena.config().data_offset() as u32 - if outgoing.vnet { VnetHdr::LEN as u32 } else { 0 },
            endpoint,
            armed: false,
            errored: false,
            shut: false,
            burst: Burst::default(),
            more: false,
            readable: false,
            recent: false,
            gathered: false,
            announced: false,
            linked: false,
            down: false,
            heavy: false,
            cutting: false,
            outgoing,
            tally,
            changed: None,
            reads: Reads::default(),
            place: HeaderPlace::default(),
            // A burst, and the read that was armed before it.
            inbox: VecDeque::with_capacity(LONGEST as usize + 1),
            gone: None,
            gone_told: false,
            notice: None,
        }
    }

    pub(super) fn info(&self) -> PortInfo {
        PortInfo {
            passes: self.outgoing.pass,
            superpackets: self.outgoing.switches(),
            longest: self.read_len as usize - 1 - if self.outgoing.vnet { VnetHdr::LEN } else { 0 },
        }
    }

    /// Offers the kernel one superpacket of each kind that was granted, and gives up the kinds that it refuses. They are such that the stack drops
    /// them; the device counts them as received. A device that is down cannot be asked: what it refuses is found out later.
    pub(super) fn probe(&mut self) {
        if !self.outgoing.vnet || !self.outgoing.pass.has_superpackets() {
            return;
        }
        for (kind, probe) in outgoing::probes(self.outgoing.link) {
            if self.outgoing.passes(kind)
                && let Err(error) = fd::write(self.fd, &probe)
                && error.raw_os_error() == Some(libc::EINVAL)
            {
                self.outgoing.give_up(kind);
            }
        }
    }

    /// The kernel took in pieces what it did not take as a superpacket.
    pub(super) fn offload_refused(&mut self, kind: GsoType) {
        self.tally.offloads_refused.add(1);
        self.outgoing.refused(kind);
    }

    pub(super) fn is_udp(&self) -> bool {
        matches!(self.endpoint, Endpoint::Udp(_))
    }

    /// The receiving end of a hand-off, if it is one.
    pub(super) fn handoff(&mut self) -> Option<&mut HandoffEnd> {
        match &mut self.endpoint {
            Endpoint::Handoff(end) => Some(end),
            _ => None,
        }
    }

    pub(super) fn is_handoff(&self) -> bool {
        matches!(self.endpoint, Endpoint::Handoff(_))
    }

    /// Lends buffers to the sender of a hand-off. Returns whether packets can come.
    pub(super) fn lend(&mut self, arena: &Rc<Arena>) -> bool {
        let account = self.account;
        self.handoff().is_none_or(|end| end.lend(arena, account))
    }

    /// Whether a receive would return at once.
    pub(super) fn is_ready(&self) -> bool {
        !self.inbox.is_empty()
            || self.notice.is_some()
            || self.is_in_doubt()
            || match (&self.gone, &self.endpoint) {
                // What was found readable before cannot be read any more, and must not keep the
                // worker awake.
                (Some(_), _) => !self.gone_told,
                (None, Endpoint::Handoff(end)) => self.more || self.readable || end.is_ready(),
                _ => self.more || self.readable,
            }
    }

    pub(super) fn is_gone(&self) -> bool {
        self.gone.is_some()
    }

    /// Takes the result of a read of this port into `slot`. Returns whether the slot now holds a packet; else it was released.
    pub(super) fn read_ended(&mut self, arena: &Arena, slot: u32, result: i32) -> bool {
        match result {
            len if len > 0 && (len as u32) < self.read_len => {
                let received = self.examine(arena, slot, len as u32);
                self.inbox.extend(received);
                return received.is_some();
            }
            len if len > 0 => self.truncated(),
            0 => {}
            error => self.failed("read", -error),
        }
        arena.release(slot);
        false
    }

    /// Takes the driver's header off what was read, and moves a short packet out of a slot for superpackets. `None` if the header contradicts the
    /// packet: then the slot was released, and that counted.
    #[inline]
    fn examine(&mut self, arena: &Arena, slot: u32, len: u32) -> Option<Received> {
        let plain = Received {
            slot,
            len,
            shape: Shape::Plain,
            held: false,
        };
        if !self.outgoing.vnet {
            return Some(plain);
        }
        self.examine_header(arena, plain)
    }

    fn examine_header(&mut self, arena: &Arena, read: Received) -> Option<Received> {
        let Received { slot, len, .. } = read;
        // SAFETY: the slot is checked out for this read, which ended with `len` bytes at `read_at`; nobody else has a view of it yet.
        let bytes = unsafe { std::slice::from_raw_parts(arena.address(slot, self.read_at).as_ptr(), len as usize) };
        let link = self.outgoing.link;
        let examined = bytes
            .split_first_chunk::<{ VnetHdr::LEN }>()
            .and_then(|(header, packet)| {
                let header = VnetHdr::from_bytes(*header);
                let shape = if header.is_plain() {
                    Shape::Plain
                } else {
                    let meta = header.check(packet, link).ok()?;
                    Shape::of(&meta, arena.config().data_offset() as u32)
                };
                // The headers of a superpacket were found where they should be.
                let in_place = shape.is_gso() || vnet::stands_in_place(packet, link);
                if in_place {
                    return Some((shape, false));
                }
                (!packet.is_empty() && !self.is_stray(packet)).then(|| (shape, !self.is_known(packet)))
            });
        let Some((shape, held)) = examined else {
            arena.release(slot);
            self.tally.bad_headers.add(1);
            self.doubt(PortError::new(PortErrorKind::BadPacket, "read", libc::EBADMSG));
            return None;
        };
        self.place.in_doubt += u32::from(held);
        let len = len - VnetHdr::LEN as u32;
        self.heavy = shape.is_gso();
        if shape.is_gso() {
            self.tally.received_superpackets.add(1);
        }
        let slot = if self.class == SizeClass::Large {
            arena.move_to_small(self.account, slot, len)
        } else {
            slot
        };
        Some(Received { slot, len, shape, held })
    }

    /// Whether a packet that does not stand in place was surely read with a header of another size
    /// than ours.
    #[cold]
    fn is_stray(&mut self, packet: &[u8]) -> bool {
        // This queue or another one of the device may have found out before, with reads under way.
        let restored = match &self.endpoint {
            Endpoint::Queue(queue) => queue.headers_restored(),
            _ => 0,
        };
        if restored != self.place.restored {
            self.place.restored = restored;
            self.place.strays = LONGEST + 1;
        }
        let stray = self.place.strays > 0 && vnet::stands_further_on(packet, self.outgoing.link);
        self.place.strays -= u32::from(stray);
        stray
    }

    /// Whether frames of this type stood in place when the kernel was asked.
    fn is_known(&self, packet: &[u8]) -> bool {
        let ether_type = self.rare_type(packet);
        ether_type.is_some() && self.place.known_types.contains(&ether_type)
    }

    fn rare_type(&self, packet: &[u8]) -> Option<u16> {
        vnet::rare_type(packet).filter(|_| self.outgoing.link == Link::Ethernet)
    }

    /// Something was dropped for `error`, unless another holder of the device is to blame.
    #[cold]
    fn doubt(&mut self, error: PortError) {
        self.place.in_doubt += 1;
        self.place.bad.get_or_insert(error);
    }

    /// Asks the kernel about all that was read since it was asked last, and lets go of what it holds
    /// back. All these reads are over, so one answer is about each of them.
    #[cold]
    fn resolve(&mut self, arena: &Arena) {
        self.place.in_doubt = 0;
        let bad = self.place.bad.take();
        let unreadable = std::mem::take(&mut self.place.unreadable);
        let changed = self.restore_header();
        let mut inbox = std::mem::take(&mut self.inbox);
        inbox.retain_mut(|received| {
            if !std::mem::take(&mut received.held) {
                return true;
            }
            let at = arena.config().data_offset() as u32;
            // SAFETY: the slot is checked out for this packet of `len` bytes, and nothing else has a
            // view of it while it lies in the inbox.
            let packet =
                unsafe { std::slice::from_raw_parts(arena.address(received.slot, at).as_ptr(), received.len as usize) };
            // If the header was set back before, by another queue or for a packet that came since,
            // the kernel has nothing wrong to say any more.
            if changed || self.is_stray(packet) {
                arena.release(received.slot);
                self.tally.bad_headers.add(1);
                return false;
            }
            let ether_type = self.rare_type(packet);
            if ether_type.is_some() && !self.place.known_types.contains(&ether_type) {
                self.place.known_types.rotate_right(1);
                self.place.known_types[0] = ether_type;
            }
            true
        });
        self.inbox = inbox;
        if changed {
            self.tally.bad_headers.add(unreadable);
        } else if let Some(error) = bad {
            self.notice.get_or_insert(error);
        }
    }

    /// Asks the kernel for the header's size alone, and only if that is not ours, for all that
    /// another holder may have changed; sets it back. Returns whether that was so.
    #[cold]
    pub(super) fn restore_header(&mut self) -> bool {
        self.place.unproved = 0;
        matches!(&self.endpoint, Endpoint::Queue(queue) if queue.has_foreign_header()) && self.restore()
    }

    /// Asks the kernel whether another holder of the device changed its header or its offloads, and
    /// sets both back. Returns whether that was so.
    ///
    /// The kernel may keep one waiting for its answer ([`Queue::restore`]), so this is only called
    /// where something is wrong.
    #[cold]
    pub(super) fn restore(&mut self) -> bool {
        self.place.unproved = 0;
        let Endpoint::Queue(queue) = &self.endpoint else {
            return false;
        };
        let Some(changed) = queue.restore() else {
            return false;
        };
        self.was_changed(changed);
        true
    }

    /// Makes sure that a call on a queue's descriptor does not wait. Copies of the descriptor in
    /// other hands share O_NONBLOCK, and a read that sleeps hears neither the doorbell nor a stop.
    #[inline]
    pub(super) fn assure_nonblocking(&mut self) {
        if let Endpoint::Queue(queue) = &self.endpoint
            && let Some(changed) = queue.restore_nonblocking()
        {
            self.reads.cautious = true;
            self.was_changed(changed);
        }
    }

    /// Another holder had changed what is shared, and it was set back.
    #[cold]
    fn was_changed(&mut self, changed: Changed) {
        // The call that set back what is worst: shifted packets, unfinished ones, a sleep.
        let call = match changed {
            Changed { header: Some(_), .. } => "ioctl(TUNSETVNETHDRSZ)",
            Changed { offloads: Some(_), .. } => "ioctl(TUNSETOFFLOAD)",
            _ => "fcntl(F_SETFL)",
        };
        self.tally.set_back.add(1);
        self.changed = Some(changed);
        self.notice = Some(PortError::new(PortErrorKind::Changed, call, libc::EBADMSG));
    }

    /// Called for each batch that is sent. The kernel takes frames behind a header of the wrong
    /// size without a word; where nothing comes back that would show it, it is asked now and then.
    #[inline]
    pub(super) fn sends(&mut self) {
        if self.outgoing.vnet {
            self.place.unproved += 1;
            if self.place.unproved >= MOST_UNPROVED {
                self.restore();
            }
        }
    }

    /// Takes larger buffers from now on. No read is in flight.
    #[cfg(feature = "engine")]
    pub(super) fn widen(&mut self, arena: &Arena) {
        debug_assert!(!self.armed);
        self.class = SizeClass::Large;
        self.read_len = read_len(arena, self.class, self.outgoing.vnet);
    }

    /// Puts the result of a read straight into the batch, if it is a packet that may go there; the caller counts it.
    #[inline]
    pub(super) fn deliver(&mut self, arena: &Rc<Arena>, slot: u32, result: i32, batch: &mut Batch) -> Delivery {
        let fits = result > 0 && (result as u32) < self.read_len && self.inbox.is_empty() && !batch.is_full();
        if !fits {
            return Delivery::Nothing;
        }
        match self.examine(arena, slot, result as u32) {
            // What comes after it lines up there as well, so the order stays.
            Some(received) if received.held => {
                self.inbox.push_back(received);
                Delivery::Held
            }
            Some(Received { slot, len, shape, .. }) => {
                // Cannot fail: the batch has room.
                let _ = batch.push(PacketBuf::shaped(arena, slot, len, shape));
                Delivery::Packet(len)
            }
            None => Delivery::Dropped,
        }
    }

    /// A packet filled its buffer: more of it may be lost.
    pub(super) fn truncated(&mut self) {
        let before = self.tally.truncated.get();
        self.tally.truncated.add(1);
        if before.is_multiple_of(TRUNCATED_ASK) && self.restore() {
            return;
        }
        self.notice = Some(PortError::new(PortErrorKind::Truncated, "read", libc::EMSGSIZE));
    }

    /// What an errno of a call on this port means: a socket outlives what ends a queue.
    pub(super) fn error(&self, call: &'static str, errno: i32) -> PortError {
        if self.is_udp() {
            PortError::from_socket_errno(call, errno)
        } else {
            PortError::from_errno(call, errno)
        }
    }

    /// Datagrams were dropped that may have been several: the socket coalesced them.
    pub(super) fn coalesced(&mut self, dropped: u64) {
        if dropped > 0 {
            self.tally.truncated.add(dropped);
            self.notice = Some(PortError::new(PortErrorKind::Truncated, "UDP_GRO", libc::EMSGSIZE));
        }
    }

    /// A receive failed.
    pub(super) fn failed(&mut self, call: &'static str, errno: i32) {
        match errno {
            libc::EAGAIN => self.tally.empty_asks.add(1),
            libc::EINTR | libc::ECANCELED => {}
            // No room for the header that the kernel wants to put in front.
            libc::EINVAL if self.outgoing.vnet => {
                self.place.unreadable += 1;
                self.doubt(self.error(call, errno));
            }
            _ => {
                let error = self.error(call, errno);
                if error.is_permanent() {
                    self.gone.get_or_insert(error);
                } else {
                    self.notice = Some(error);
                }
            }
        }
    }

    /// What poll(2) found on the port.
    pub(super) fn polled(&mut self, events: libc::c_short) {
        self.readable = events != 0;
        self.errored = events & libc::POLLERR != 0;
        self.shut = events & libc::POLLRDHUP != 0;
    }

    /// There is no buffer to receive into. What lies in the kernel is found again once one came back.
    pub(super) fn starved(&mut self) {
        self.readable = false;
        self.tally.no_buffers.add(1);
        self.notice
            .get_or_insert(PortError::new(PortErrorKind::NoBuffers, "receive", libc::ENOBUFS));
    }

    /// Moves what lies in the inbox into the batch, as far as it goes.
    #[inline]
    pub(super) fn hand_over(&mut self, arena: &Rc<Arena>, batch: &mut Batch) {
        if self.is_in_doubt() {
            self.resolve(arena);
        }
        let (mut packets, mut bytes) = (0, 0);
        while !batch.is_full() {
            let Some(Received { slot, len, shape, .. }) = self.inbox.pop_front() else {
                break;
            };
            packets += 1;
            bytes += u64::from(len);
            // Cannot fail: the batch has room.
            let _ = batch.push(PacketBuf::shaped(arena, slot, len, shape));
        }
        if packets > 0 {
            self.tally.received(packets, bytes);
        }
    }

    /// Ends a receive that put `got` packets into the batch: packets first, errors when there are none.
    pub(super) fn conclude(&mut self, got: usize) -> Result<usize, PortError> {
        if got > 0 {
            self.tally.batches.add(1);
            self.recent = true;
            self.place.unproved = 0;
            return Ok(got);
        }
        if let Some(notice) = self.notice.take() {
            return Err(notice);
        }
        if let Some(gone) = self.gone {
            self.gone_told = true;
            return Err(gone);
        }
        Ok(0)
    }

    /// Whether a receive that has nothing yet should end all the same.
    pub(super) fn has_news(&self) -> bool {
        self.notice.is_some() || self.gone.is_some()
    }

    /// Whether the kernel is to be asked about what was read.
    #[inline]
    pub(super) fn is_in_doubt(&self) -> bool {
        self.place.in_doubt > 0
    }

    /// Whether what lies in the inbox should wait there for what comes behind it, so that the kernel
    /// is asked about all of it at once. Not for long: a flood must not keep the worker here.
    #[inline]
    pub(super) fn holds_back(&self) -> bool {
        self.is_in_doubt() && self.place.in_doubt < LONGEST && self.inbox.len() < LONGEST as usize
    }

    /// How many packets may be asked for at once: no more than a burst is held back, nor lies in the
    /// inbox. At least one where all was handed over, or where what is held back waits for more.
    #[inline]
    pub(super) fn longest_burst(&self) -> u32 {
        LONGEST.saturating_sub(self.place.in_doubt.max(self.inbox.len() as u32))
    }

    /// Whether what lies in the inbox fills the batch.
    pub(super) fn fills(&self, batch: &Batch) -> bool {
        batch.room() <= self.inbox.len()
    }

    /// Why nothing can be sent any more.
    pub(super) fn gone(&self) -> Option<PortError> {
        self.gone
    }

    /// Sending found out that the device or socket is gone.
    pub(super) fn set_gone(&mut self, error: PortError) {
        self.gone.get_or_insert(error);
    }

    pub(super) fn into_detached(mut self, arena: &Rc<Arena>) -> Detached {
        let handed = self.handoff().map_or(0, |end| end.waiting());
        let mut undelivered = Batch::with_capacity(self.inbox.len() + handed);
        self.hand_over(arena, &mut undelivered);
        handoff::receive(arena, &mut self, &mut undelivered);
        // The socket gets its options back.
        drop(self.socket);
        Detached {
            endpoint: self.endpoint,
            undelivered,
            counters: self.tally.read(),
        }
    }
}

/// How much a read offers: one byte more than the longest packet, and the driver's header.
fn read_len(arena: &Arena, class: SizeClass, vnet: bool) -> u32 {
    arena.read_len(class) + if vnet { VnetHdr::LEN as u32 } else { 0 }
}

/// The ports of a worker, by index.
pub(super) struct Ports {
    slots: Vec<Option<Port>>,
    /// How many of them are hand-offs.
    handoffs: usize,
    scan: usize,
}

impl Ports {
    pub(super) fn new() -> Self {
        Self {
            slots: Vec::new(),
            handoffs: 0,
            scan: 0,
        }
    }

    pub(super) fn free_index(&self) -> usize {
        self.slots.iter().position(Option::is_none).unwrap_or(self.slots.len())
    }

    pub(super) fn insert(&mut self, port: Port) {
        let index = usize::from(port.id.index);
        if index == self.slots.len() {
            self.slots.push(None);
        }
        self.handoffs += usize::from(port.is_handoff());
        self.slots[index] = Some(port);
    }

    pub(super) fn remove(&mut self, index: usize) -> Option<Port> {
        let port = self.slots.get_mut(index)?.take();
        self.handoffs -= usize::from(port.as_ref().is_some_and(Port::is_handoff));
        port
    }

    /// Whether a thread may hand packets over while the worker falls asleep.
    pub(super) fn have_handoffs(&self) -> bool {
        self.handoffs > 0
    }

    pub(super) fn check(&self, id: PortId) -> Result<usize, PortError> {
        let index = usize::from(id.index);
        match self.slots.get(index) {
            Some(Some(port)) if port.id == id => Ok(index),
            _ => Err(PortError::new(PortErrorKind::Gone, "port", libc::EBADF)),
        }
    }

    /// The port of an index that `check` gave, or that a completion named.
    #[inline]
    pub(super) fn at(&mut self, index: usize) -> &mut Port {
        self.slots[index]
            .as_mut()
            .expect("ports are removed only after their last operation ended")
    }

    pub(super) fn find(&self, id: PortId) -> Option<&Port> {
        self.slots
            .get(usize::from(id.index))?
            .as_ref()
            .filter(|port| port.id == id)
    }

    pub(super) fn len(&self) -> usize {
        self.slots.len()
    }

    pub(super) fn exists(&self, index: usize) -> bool {
        self.slots.get(index).is_some_and(Option::is_some)
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &Port> {
        self.slots.iter().flatten()
    }

    pub(super) fn iter_mut(&mut self) -> impl Iterator<Item = &mut Port> {
        self.slots.iter_mut().flatten()
    }

    pub(super) fn any_ready(&self) -> bool {
        self.iter().any(Port::is_ready)
    }

    /// The worker paused instead of waiting for those that were busy before: they are to be looked at again.
    pub(super) fn paused(&mut self, arena: &Arena) {
        for port in self.iter_mut() {
            let busy = std::mem::take(&mut port.recent) && !port.armed && !port.is_handoff();
            port.gathered = busy && arena.available(port.account, port.class, 1) > 0;
            port.more |= port.gathered;
        }
    }

    /// Notes which ports are ready, for `next_ready` to tell one by one. Returns how many.
    pub(super) fn announce(&mut self) -> usize {
        let mut ready = 0;
        for port in self.iter_mut() {
            port.announced = port.is_ready();
            ready += usize::from(port.announced);
        }
        ready
    }

    /// The next port that was announced, beginning behind the one told last, so that none is always first.
    pub(super) fn next_ready(&mut self) -> Option<PortId> {
        let count = self.slots.len();
        for step in 0..count {
            let index = (self.scan + step) % count;
            if let Some(port) = &mut self.slots[index]
                && std::mem::take(&mut port.announced)
            {
                self.scan = index + 1;
                return Some(port.id);
            }
        }
        None
    }
}

/// What a write is, for the books.
#[derive(Clone, Copy)]
pub(super) struct Weight {
    /// What the result says if all of it was taken.
    pub(super) len: u32,
    /// Of packets.
    pub(super) bytes: u64,
    pub(super) packets: u32,
}

impl Weight {
    /// Of one packet.
    pub(super) fn of(len: usize) -> Self {
        Self {
            len: len as u32,
            bytes: len as u64,
            packets: 1,
        }
    }
}

/// What became of the packets of one burst, from their results in order: how many from the front are done with.
///
/// A burst of writes that do not depend on each other runs on past a refused one. What was refused before the last accepted packet
/// cannot be sent again without overtaking, so it is refused for good; behind it, what may be retried stays in the batch.
pub(super) fn judge(port: &mut Port, call: &'static str, results: &[i32], weigh: impl Fn(usize) -> Weight) -> Sent {
    let mut sent = Sent::default();
    let behind_last_accepted = results
        .iter()
        .rposition(|&result| result >= 0)
        .map_or(0, |last| last + 1);
    for (index, &result) in results.iter().enumerate() {
        let Weight { len, bytes, packets } = weigh(index);
        // Pieces of a packet are no packets in the books.
        let counted = if port.cutting { 0 } else { u64::from(packets) };
        if result >= 0 && result as u32 == len {
            sent.accepted += packets as usize;
            port.tally.sent_packets.add(counted);
            port.tally.sent_bytes.add(bytes);
            port.down = false;
            continue;
        }
        let errno = if result < 0 { -result } else { libc::EIO };
        let error = port.error(call, errno);
        if errno == libc::ECANCELED && index >= behind_last_accepted.max(1) {
            // Not tried, because one before it in the chain failed. That one is done with, or sending has stopped there.
            return sent;
        }
        let retriable = matches!(
            errno,
            libc::EAGAIN | libc::ENOBUFS | libc::ENOMEM | libc::EINTR | libc::ECANCELED
        );
        if retriable && sent.stopped.is_none() {
            port.tally.backpressure.add(1);
            port.linked = true;
            sent.stopped = Some(error);
        }
        if error.is_permanent() {
            port.set_gone(error);
            sent.stopped = Some(error);
        }
        if index >= behind_last_accepted && (retriable || error.is_permanent()) {
            return sent;
        }
        sent.refused += packets as usize;
        sent.refusal.get_or_insert(error);
        port.tally.refuse(errno, counted);
        if error.kind() == PortErrorKind::Down {
            port.down = true;
            sent.stopped = Some(error);
        }
    }
    sent
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::buf::ArenaConfig;
    use crate::worker::WakeHandle;
    use proptest::prelude::*;

    fn arena() -> Rc<Arena> {
        let config = ArenaConfig {
            headroom: 96,
            tailroom: 64,
            small_packet: 1536,
            small_slots: 16,
            large_slots: 0,
        };
        Rc::new(Arena::new(config, WakeHandle::new().expect("eventfd"), Arc::default()).expect("memory"))
    }

    fn port() -> Port {
        // No device: the rules of queues are those of everything but sockets.
        let (end, _) = handoff::new(1, 1536, WakeHandle::new().expect("eventfd"));
        Port::new(
            PortId::new(0),
            Endpoint::Handoff(end),
            &arena(),
            SizeClass::Small,
            Arc::default(),
        )
    }

    fn judged(results: &[i32]) -> Sent {
        judge(&mut port(), "write", results, |_| Weight::of(100))
    }

    #[test]
    fn what_may_be_retried_stays_unless_a_later_one_was_accepted() {
        let again = -libc::EAGAIN;
        let sent = judged(&[100, 100, again, -libc::ECANCELED, -libc::ECANCELED]);
        assert_eq!((sent.accepted, sent.refused), (2, 0));
        assert_eq!(
            sent.stopped.map(|error| error.kind()),
            Some(PortErrorKind::Backpressure)
        );
        // Sent again, the second one would come behind the third.
        let sent = judged(&[100, again, 100, again]);
        assert_eq!((sent.accepted, sent.refused), (2, 1));
    }

    #[test]
    fn what_was_not_tried_behind_a_bad_packet_stays_without_a_stop() {
        let sent = judged(&[100, -libc::EINVAL, -libc::ECANCELED, -libc::ECANCELED]);
        assert_eq!((sent.accepted, sent.refused, sent.stopped), (1, 1, None));
        let sent = judged(&[-libc::EIO, -libc::ECANCELED]);
        assert_eq!((sent.accepted, sent.refused), (0, 1));
        assert_eq!(sent.stopped.map(|error| error.kind()), Some(PortErrorKind::Down));
        // Nothing before it explains it: no progress, so it must not go on by itself.
        assert!(judged(&[-libc::ECANCELED]).stopped.is_some());
    }

    #[test]
    fn a_bad_packet_is_passed_over_and_a_device_that_is_gone_keeps_the_rest() {
        let sent = judged(&[-libc::EINVAL, 100, -libc::EINVAL]);
        assert_eq!((sent.accepted, sent.refused, sent.stopped), (1, 2, None));
        let sent = judged(&[100, -libc::EBADFD, -libc::EBADFD]);
        assert_eq!((sent.accepted, sent.refused), (1, 0));
        assert!(sent.stopped.is_some_and(|error| error.is_permanent()));
    }

    #[test]
    fn only_a_dead_descriptor_ends_a_socket() {
        let mut port = port();
        port.endpoint = UdpSocket::bind("127.0.0.1:0").expect("a socket").into();
        for errno in 1..=133 {
            let sent = judge(&mut port, "sendmmsg", &[-errno, 100], |_| Weight::of(100));
            let dead = matches!(errno, libc::EBADF | libc::ENOTSOCK);
            assert_eq!(port.gone.take().is_some(), dead, "errno {errno}");
            assert_eq!((sent.accepted, sent.refused), (1, 1), "errno {errno}");
            port.failed("recvmmsg", errno);
            assert_eq!(port.gone.take().is_some(), dead, "errno {errno}");
        }
    }

    // T13, the header set back by another queue of the device while this one holds packets back.
    #[cfg(feature = "lab")]
    #[test]
    fn a_shifted_packet_is_dropped_though_a_rare_one_came_after_the_header_was_set_back() {
        let thread = std::thread::spawn(|| {
            let sandbox = std::fs::File::open("/dev/net/tun").and_then(|_| crate::lab::Sandbox::enter());
            if let Err(error) = sandbox {
                assert!(std::env::var_os("TUN_DRIVER_REQUIRE_NETNS").is_none(), "{error}");
                return eprintln!("skipped: no device in a namespace can be had: {error}");
            }
            shifted_then_rare();
        });
        thread.join().expect("the packet that is right comes alone");
    }

    #[cfg(feature = "lab")]
    fn shifted_then_rare() {
        let builder = crate::Builder::new("", crate::Mode::Tun).offloads(Offloads::CSUM);
        let queue = builder.open().unwrap().into_queues().remove(0);
        let arena = arena();
        let mut port = Port::new(PortId::new(0), queue.into(), &arena, SizeClass::Small, Arc::default());
        let read = |port: &mut Port, parts: &[&[u8]]| {
            let bytes = parts.concat();
            let slot = arena.check_out(port.account, port.class).expect("a slot");
            let at = arena.address(slot, port.read_at);
            // SAFETY: the slot was just checked out, and a read may fill it so far.
            unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), at.as_ptr(), bytes.len()) };
            assert!(port.read_ended(&arena, slot, bytes.len() as i32));
        };
        let ip = [[0x45, 0, 0, 40].as_slice(), &[0; 36]].concat();
        let trailer = [1; 3];
        read(&mut port, &[&[0; 12], &ip]);
        let Endpoint::Queue(queue) = &port.endpoint else {
            unreachable!("as made")
        };
        let longer: libc::c_int = 12;
        // SAFETY: the request reads one int.
        let result = unsafe { libc::ioctl(port.fd, libc::TUNSETVNETHDRSZ, &raw const longer) };
        assert_eq!(result, 0);
        assert!(queue.restore().is_some());
        read(&mut port, &[&[0; 10], &ip, &trailer]);
        let mut batch = Batch::with_capacity(4);
        port.hand_over(&arena, &mut batch);
        assert_eq!(batch.len(), 1);
        assert_eq!(batch[0][..], [&ip[..], &trailer].concat());
        assert_eq!(port.tally.bad_headers.get(), 1);
    }

    proptest! {
        /// Whatever the kernel answers: each packet is accepted, refused, or stays behind all others; the counters agree.
        #[test]
        fn every_result_is_accounted_for(
            results in proptest::collection::vec(
                prop_oneof![
                    4 => Just(100),
                    1 => Just(-libc::EAGAIN),
                    1 => Just(-libc::EINVAL),
                    1 => Just(-libc::EIO),
                    1 => Just(-libc::ECANCELED),
                    1 => Just(-libc::EBADFD),
                    1 => Just(50), // a short write, which the driver does not make
                ],
                1..64,
            )
        ) {
            let mut port = port();
            let sent = judge(&mut port, "write", &results, |_| Weight::of(100));
            let consumed = sent.accepted + sent.refused;
            prop_assert!(consumed <= results.len());
            prop_assert_eq!(sent.accepted, results.iter().filter(|&&result| result == 100).count());
            prop_assert!(results[consumed..].iter().all(|&result| result < 0));
            // Where it just goes on, the front is another one than before: it comes to an end.
            let not_tried = consumed > 0 && results.get(consumed) == Some(&-libc::ECANCELED);
            prop_assert!(sent.stopped.is_some() || consumed == results.len() || not_tried);
            prop_assert_eq!(port.tally.sent_packets.get(), sent.accepted as u64);
            prop_assert_eq!(port.tally.refused_packets.get(), sent.refused as u64);
            let by_errno: u64 = port.tally.read().refused.iter().map(|(_, count)| count).sum();
            prop_assert_eq!(by_errno, sent.refused as u64);
        }
    }
}
