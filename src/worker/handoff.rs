//! Packets from other threads: a bounded ring with a doorbell, which the worker serves as one more port.
//!
//! The worker lends free buffers of its own to the sender through a second ring, so that a packet is copied once, by the sender, and lies in
//! the worker's registered memory from then on. Both rings have one producer and one consumer, and neither locks nor allocates.

use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;

use rtrb::{Consumer, Producer, RingBuffer};

use super::port::{Port, Sent};
use super::waker::WakeHandle;
use crate::buf::{Account, Arena, Batch, LocalAddr, PacketBuf, RemoteBuf, Shape, SizeClass};
use crate::error::{PortError, PortErrorKind};

/// The sending end of a hand-off: gives packets to a worker from any one thread. Made by [`Worker::open_handoff`](crate::Worker::open_handoff).
///
/// Packets arrive in the order in which they were sent, as packets of one port. Nothing is dropped on the way: what finds no room stays with
/// the sender. Nothing here waits. The worker is woken only if it sleeps.
///
/// What the worker has not taken when it ends or detaches the port comes back to who detaches; when the worker just ends, it is lost with the
/// worker, though it counts as sent.
///
/// Dropping it lets the worker take what was sent, and ends its port ([`PortErrorKind::Gone`]).
///
/// ```
/// use tun_driver::{Batch, Worker, WorkerConfig};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let mut worker = Worker::new(&WorkerConfig::default())?;
/// let (port, mut handoff) = worker.open_handoff(64)?;
/// let other = std::thread::spawn(move || handoff.send(b"from another thread"));
/// let mut batch = Batch::with_capacity(64);
/// worker.recv_many(port, &mut batch)?;
/// assert_eq!(&batch[0][..], b"from another thread");
/// # other.join().unwrap()?;
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct Handoff {
    full: Producer<RemoteBuf>,
    lent: Consumer<RemoteBuf>,
    waker: WakeHandle,
    longest: usize,
    counters: HandoffCounters,
}

/// What a sender counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct HandoffCounters {
    /// Packets that were taken.
    pub sent_packets: u64,
    /// Packets that are too long for the worker's buffers; they were dropped.
    pub refused_packets: u64,
    /// Times that there was no room.
    pub backpressure: u64,
}

/// The receiving end, inside its port.
#[derive(Debug)]
pub struct HandoffEnd {
    full: Consumer<RemoteBuf>,
    lent: Producer<RemoteBuf>,
    /// What comes next cannot be taken for want of a buffer.
    stalled: bool,
}

/// Makes a hand-off for `capacity` packets of at most `longest` bytes. Nothing is lent yet.
pub(super) fn new(capacity: usize, longest: usize, waker: WakeHandle) -> (HandoffEnd, Handoff) {
    let (full_in, full_out) = RingBuffer::new(capacity);
    let (lent_in, lent_out) = RingBuffer::new(capacity);
    let sender = Handoff {
        full: full_in,
        lent: lent_out,
        waker,
        longest,
        counters: HandoffCounters::default(),
    };
    (
        HandoffEnd {
            full: full_out,
            lent: lent_in,
            stalled: false,
        },
        sender,
    )
}

impl Handoff {
    /// Gives the packets of the batch to the worker, in order; each is copied once.
    ///
    /// What was accepted or refused is taken from the front; what remains found no room and may be sent again. Superpackets are cut: they would not
    /// fit into the buffers that the worker lends.
    pub fn send_many(&mut self, batch: &mut Batch) -> Sent {
        let mut sent = Sent::default();
        for packet in &mut *batch {
            match self.put_packet(packet) {
                Ok(()) => sent.accepted += 1,
                Err(error) if error.kind() == PortErrorKind::BadPacket => {
                    sent.refused += 1;
                    sent.refusal.get_or_insert(error);
                }
                Err(error) => {
                    sent.stopped = Some(error);
                    break;
                }
            }
        }
        batch.consume_front(sent.accepted + sent.refused);
        if sent.accepted > 0 {
            self.waker.knock();
        }
        sent
    }

    /// Gives one packet to the worker; it is copied once.
    ///
    /// # Errors
    /// [`PortErrorKind::Backpressure`]: no room, try again later. [`PortErrorKind::BadPacket`]: too long for the worker's buffers.
    /// [`PortErrorKind::Gone`]: the worker ended, or detached the port.
    pub fn send(&mut self, packet: &[u8]) -> Result<(), PortError> {
        self.put(packet, (None, None), Shape::Plain, 0)?;
        self.waker.knock();
        Ok(())
    }

    /// Gives a packet that travels already to the worker: without a copy if it came from there; else the worker copies it.
    ///
    /// # Errors
    /// As [`send`](Self::send); the packet comes back with the error.
    pub fn send_remote(&mut self, packet: RemoteBuf) -> Result<(), (PortError, RemoteBuf)> {
        if let Err(error) = self.room_for(packet.len()) {
            return Err((error, packet));
        }
        self.push(packet);
        self.waker.knock();
        Ok(())
    }

    /// How many packets it holds at most.
    pub fn capacity(&self) -> usize {
        self.full.buffer().capacity()
    }

    /// What was sent, and what not.
    pub fn counters(&self) -> HandoffCounters {
        self.counters
    }

    fn put_packet(&mut self, packet: &mut PacketBuf) -> Result<(), PortError> {
        let addresses = (packet.peer(), packet.local());
        let Ok(plan) = packet.plan() else {
            self.counters.refused_packets += 1;
            return Err(PortError::new(PortErrorKind::BadPacket, "handoff", libc::EINVAL));
        };
        let Some(plan) = plan else {
            return self.put(packet, addresses, packet.shape(), packet.start());
        };
        for index in 0..plan.count() {
            let Some(segment) = plan.segment(index, packet) else {
                break;
            };
            if let Err(error) = self.put(segment, addresses, Shape::Plain, 0) {
                // What went is with the worker. The rest may be tried again; what is too long is not going to fit.
                packet.keep_from(&plan, index);
                return Err(error);
            }
        }
        Ok(())
    }

    fn put(
        &mut self,
        bytes: &[u8],
        (peer, local): (Option<SocketAddr>, Option<LocalAddr>),
        shape: Shape,
        start: u32,
    ) -> Result<(), PortError> {
        self.room_for(bytes.len())?;
        let Ok(mut packet) = self.lent.pop() else {
            return Err(self.no_room());
        };
        packet.refill(bytes, shape, start);
        packet.set_peer(peer);
        packet.set_local(local);
        self.push(packet);
        Ok(())
    }

    fn room_for(&mut self, len: usize) -> Result<(), PortError> {
        if self.full.is_abandoned() {
            return Err(PortError::new(PortErrorKind::Gone, "handoff", libc::EPIPE));
        }
        if len > self.longest {
            self.counters.refused_packets += 1;
            return Err(PortError::new(PortErrorKind::BadPacket, "handoff", libc::EMSGSIZE));
        }
        if self.full.is_full() {
            return Err(self.no_room());
        }
        Ok(())
    }

    fn no_room(&mut self) -> PortError {
        self.counters.backpressure += 1;
        PortError::new(PortErrorKind::Backpressure, "handoff", libc::EAGAIN)
    }

    fn push(&mut self, packet: RemoteBuf) {
        // Cannot fail: only this end fills the ring, and there was room.
        let _ = self.full.push(packet);
        self.counters.sent_packets += 1;
    }
}

impl Drop for Handoff {
    fn drop(&mut self) {
        // First the ring's end, so that the worker finds it gone when it looks.
        let (nothing, _) = RingBuffer::new(0);
        drop(std::mem::replace(&mut self.full, nothing));
        self.waker.knock();
    }
}

impl HandoffEnd {
    /// Whether a receive would return at once.
    pub(super) fn is_ready(&self) -> bool {
        if self.full.is_empty() {
            self.full.is_abandoned()
        } else {
            !self.stalled
        }
    }

    /// How many packets wait to be taken.
    pub(super) fn waiting(&self) -> usize {
        self.full.slots()
    }

    /// Lends free buffers, as many as the port may have. Returns whether packets can come.
    pub(super) fn lend(&mut self, arena: &Rc<Arena>, account: Account) -> bool {
        self.stalled &= arena.available(account, SizeClass::Small, 1) == 0;
        // Not looked at afterwards: the sender takes what was lent meanwhile, and may have sent it already.
        let mut lends = self.lent.is_full();
        while !self.lent.is_full() && arena.available(account, SizeClass::Small, 1) > 0 {
            let Some(slot) = arena.check_out(account, SizeClass::Small) else {
                break;
            };
            // Cannot fail: only this end fills the ring, and there was room.
            let _ = self.lent.push(PacketBuf::whole_slot(arena, slot, 0).into_remote());
            lends = true;
        }
        let on_the_way = self.lent.slots() < self.lent.buffer().capacity() || !self.full.is_empty();
        !self.stalled && (lends || on_the_way)
    }
}

/// Takes what was handed over, at most the room of the batch.
pub(super) fn receive(arena: &Rc<Arena>, port: &mut Port, batch: &mut Batch) {
    let (account, tally) = (port.account, Arc::clone(&port.tally));
    let Some(end) = port.handoff() else { return };
    let (mut packets, mut bytes) = (0, 0);
    // Before the ring is looked at: what was sent before it was given up is not lost.
    let abandoned = end.full.is_abandoned();
    while !batch.is_full() {
        let Ok(packet) = end.full.peek() else { break };
        let packet = if packet.is_home(arena.shared()) {
            let Ok(packet) = end.full.pop() else { break };
            PacketBuf::from_remote_parts(arena, packet.into_parts())
        } else {
            // From elsewhere: its bytes move in.
            let Some(mut copy) = PacketBuf::copied(arena, account, packet) else {
                end.stalled = true;
                break;
            };
            copy.set_peer(packet.peer());
            copy.set_local(packet.local());
            let (shape, start) = packet.shape();
            copy.copy_shape(shape, start);
            drop(end.full.pop());
            copy
        };
        packets += 1;
        bytes += packet.len() as u64;
        // Cannot fail: the batch has room.
        let _ = batch.push(packet);
    }
    tally.received(packets, bytes);
    let _ = end.lend(arena, account);
    let (over, stalled) = (abandoned && end.full.is_empty(), end.stalled);
    if stalled {
        port.starved();
    }
    if over {
        port.set_gone(PortError::new(PortErrorKind::Gone, "handoff", libc::EPIPE));
    }
}
