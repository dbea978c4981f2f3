//! Floor 3: a worker moves packets between its ports, on one thread.

mod burst;
#[cfg(all(test, feature = "lab"))]
mod canary;
mod config;
#[cfg(all(test, feature = "lab"))]
mod fake_ring;
mod handoff;
mod moderation;
mod outgoing;
mod port;
#[cfg(all(test, feature = "lab"))]
mod refusals;
mod ring;
mod single;
mod syscalls;
mod udp;
mod waker;

use std::fmt;
use std::io;
use std::net::UdpSocket;
use std::os::fd::{AsFd, AsRawFd};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Instant;

#[cfg(feature = "engine")]
pub(crate) use config::LARGE_BUFFERS;
pub use config::{Backend, BackendReport, MemoryBudget, Wait, WorkerConfig};
pub use handoff::{Handoff, HandoffCounters, HandoffEnd};
pub use outgoing::Superpackets;
pub use port::{Detached, Endpoint, PortId, PortInfo, Sent};
pub use single::SinglePort;
pub(crate) use waker::WakeHandle;
pub use waker::Waker;

use crate::Mode;
use crate::attach;
use crate::buf::{
    Account, Arena, ArenaConfig, Batch, LARGE_PACKET, LINK_HEADER, PacketBuf, RemoteBuf, SizeClass, leak_memory,
};
use crate::error::{OpenError, OpenErrorKind, PortError, PortErrorKind};
#[cfg(feature = "engine")]
use crate::offload::Offloads;
#[cfg(feature = "engine")]
use crate::queue::Changed;
use crate::queue::Queue;
use crate::stats::{Books, Counters, StatsReader, WorkerStats};
use crate::sys::socket::Datagrams;
use crate::sys::socket_options::{SocketOptions, Unfit};
use config::{DATAGRAMS, LONGEST_PAUSE, MOST_PORTS};
use moderation::Moderation;
use outgoing::Outbox;
use port::{Port, Ports};
use ring::RingBackend;
use syscalls::SyscallBackend;

/// One thread's packet mover: one ring, one arena of registered buffers, any number of ports.
///
/// A worker is made on the thread that uses it and stays there (`!Send`). Queues and sockets are attached as ports; a packet received on
/// one port is sent on another without a copy. Other threads reach it by its [`Waker`] and by what was made [`RemoteBuf`].
///
/// ```no_run
/// use tun_driver::{Batch, Builder, Mode, Worker, WorkerConfig};
///
/// fn main() -> Result<(), Box<dyn std::error::Error>> {
///     let mut queues = Builder::new("gw0", Mode::Tun).up(true).open()?.into_queues();
///     let mut worker = Worker::new(&WorkerConfig::default())?;
///     let port = worker.attach(queues.remove(0))?;
///     let mut batch = Batch::with_capacity(64);
///     loop {
///         worker.wait(None)?;
///         while let Some(port) = worker.next_ready() {
///             match worker.try_recv_many(port, &mut batch) {
///                 Ok(_) => { /* look at or change the packets of the batch, then send them somewhere */ }
///                 Err(error) if error.is_permanent() => return Err(error.into()),
///                 Err(error) => eprintln!("{error}"),
///             }
///             batch.clear();
///         }
///     }
/// }
/// ```
///
/// # Dropping
/// Ends all operations in flight, waits (at most two seconds) until the kernel has let go of the buffers, and closes the queues and
/// sockets: when it returns, this process holds the devices no more. If the kernel does not let go, the memory is leaked and counted
/// ([`leaked_arenas`](crate::leaked_arenas)) rather than freed.
///
/// In a child of fork(2), a worker, its packets, batches and hand-offs may only be dropped: that
/// touches neither the parent's memory nor its doorbells, and closes the child's copies of the
/// descriptors. Everything else faults there, as neither the ring nor the buffers are inherited.
/// Descriptors are closed on exec.
///
/// The kernel takes a ring down a little later and interrupts the thread for it: a call that sleeps there may fail with EINTR, as after a
/// signal, and wants to be made again.
pub struct Worker {
    backend: Imp,
    ports: Ports,
    cx: Context,
    report: BackendReport,
    /// Buffers to promise to each port.
    reserve: u32,
    outbox: Outbox,
    /// One packet at a time, for the plain calls.
    single: Batch,
    /// What was in flight has been ended.
    closed: bool,
}

/// The backends. A known set of two, matched once per batch. Each supplies `receive`, `send` and `wait`; the ring also attaches, detaches
/// and closes.
enum Imp {
    Ring(Box<RingBackend>),
    Syscalls(SyscallBackend),
}

/// What an engine reports of a device.
#[cfg(feature = "engine")]
pub(crate) enum DeviceNews {
    /// The kernel refuses superpackets; these are still passed on.
    GivenUp(Offloads),
    /// Another holder changed it, and it was set back.
    Changed(Changed),
}

/// What the backends share.
struct Context {
    arena: Rc<Arena>,
    waker: WakeHandle,
    wait: Wait,
    moderation: Moderation,
    datagrams: Datagrams,
    books: Arc<Books>,
    now: Instant,
}

impl Context {
    /// Whether a wake-up or a stop asks the worker to return to its user.
    fn interrupted(&self) -> bool {
        self.waker.is_due()
    }

    /// Sleeps for all ports or for `only` one of them, unless another thread handed something over meanwhile.
    fn doze<T>(
        &mut self,
        ports: &mut Ports,
        only: Option<usize>,
        sleep: impl FnOnce(&mut Self, &mut Ports) -> T,
    ) -> Option<T> {
        // What was handed over for another port must not keep it awake: nobody takes it now.
        if !only.map_or(ports.have_handoffs(), |index| ports.at(index).is_handoff()) {
            return Some(sleep(self, ports));
        }
        self.waker.fall_asleep();
        let ready = match only {
            Some(index) => ports.at(index).is_ready(),
            None => ports.any_ready(),
        };
        let slept = (!ready).then(|| sleep(self, ports));
        self.waker.awake();
        slept
    }

    fn doorbell_rang(&self) {
        self.books.worker.wake_ups.add(1);
        self.waker.silence();
        self.arena.collect_returned();
    }
}

/// Why [`Worker::wait`] returned. Several may be true at once.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Wake {
    /// How many ports are ready; [`Worker::next_ready`] names them.
    pub ready: usize,
    /// The deadline has passed.
    pub timer: bool,
    /// Somebody called [`Waker::wake`].
    pub woken: bool,
    /// Somebody called [`Waker::stop`]. Stays true.
    pub stopped: bool,
}

impl Worker {
    /// Makes a worker for the calling thread.
    ///
    /// Without a forced backend, io_uring is tried first and system calls serve where it is refused or too old;
    /// [`backend`](Self::backend) says which it is and why.
    ///
    /// # Errors
    /// A setting out of range; no memory; a forced backend that this host lacks.
    pub fn new(config: &WorkerConfig) -> Result<Self, OpenError> {
        let waker = WakeHandle::new().map_err(|error| {
            OpenError::new(
                OpenErrorKind::DescriptorLimit,
                "eventfd",
                &error,
                "no descriptor for the doorbell",
            )
        })?;
        Self::with_waker(config, waker)
    }

    /// A worker whose waker was made before it.
    pub(crate) fn with_waker(config: &WorkerConfig, waker: WakeHandle) -> Result<Self, OpenError> {
        check(config)?;
        let books = Arc::new(Books::default());
        let (backend, arena, report) = match config.backend {
            Some(Backend::IoUring) => open_ring(config, &waker, &books)?,
            Some(Backend::Syscalls) => open_syscalls(config, &waker, &books, "forced".to_owned())?,
            None => {
                match ring::lacks()
                    .map_err(|why| OpenError::refused(OpenErrorKind::IoUring, "uname", why))
                    .and_then(|()| open_ring(config, &waker, &books))
                {
                    Ok(opened) => opened,
                    Err(error) => open_syscalls(config, &waker, &books, format!("io_uring is not usable: {error}"))?,
                }
            }
        };
        let cx = Context {
            arena: Rc::new(arena),
            waker,
            wait: config.wait,
            moderation: Moderation::new(config.wait),
            datagrams: Datagrams::new(DATAGRAMS),
            books,
            now: Instant::now(),
        };
        let reserve = u32::try_from(config.receive_reserve).unwrap_or(u32::MAX);
        let mut worker = Self {
            backend,
            ports: Ports::new(),
            cx,
            report,
            reserve,
            outbox: Outbox::new(),
            single: Batch::with_capacity(1),
            closed: false,
        };
        if config.large_buffers > 0 {
            worker.open_large();
        }
        Ok(worker)
    }

    /// What runs, and why.
    pub fn backend(&self) -> &BackendReport {
        &self.report
    }

    /// Takes a queue or a UDP socket as a port.
    ///
    /// A socket needs no preparation: all calls on it are made without blocking. A port gets a reserve of buffers that it can always
    /// receive into ([`WorkerConfig::receive_reserve`]; less when many ports share a small arena).
    ///
    /// # Options of a socket
    /// The port relies on one packet for each datagram. So UDP_GRO, UDP_SEGMENT and UDP_CORK are
    /// switched off while the socket is a port; what lay in a socket with UDP_GRO on is dropped and
    /// counted as `truncated`, since one of its datagrams may be several. On a socket that is bound
    /// to all addresses, IP_PKTINFO and IPV6_RECVPKTINFO are switched on, so that packets carry the
    /// address that they were sent to ([`PacketBuf::local`]). `detach` sets them all back. The
    /// error queue (IP_RECVERR, SO_TIMESTAMPING) is emptied when something is in it. All else stays
    /// as it was set. Do not switch these options yourself meanwhile: UDP_SEGMENT would change what
    /// is sent, unseen.
    ///
    /// # Errors
    /// A socket that is not one of UDP over IPv4 or IPv6, or whose options cannot be set.
    /// Too many ports (256); no buffer left to reserve; a queue that cannot be read (its
    /// device is gone). The endpoint is closed with the error.
    pub fn attach(&mut self, endpoint: impl Into<Endpoint>) -> Result<PortId, OpenError> {
        let endpoint = endpoint.into();
        let name = name_of(&endpoint);
        self.attach_as(endpoint, name)
    }

    /// Attaches under a name of the caller's choice.
    pub(crate) fn attach_as(&mut self, endpoint: Endpoint, name: String) -> Result<PortId, OpenError> {
        if let Endpoint::Handoff(_) = endpoint {
            let detail = "a hand-off belongs to the worker that opened it; open another one";
            return Err(OpenError::refused(OpenErrorKind::InvalidSetting, "attach", detail));
        }
        if let Endpoint::Queue(queue) = &endpoint {
            // A ring would find out by its first read, and plain calls never: a port must not begin
            // with its end.
            queue
                .current_name()
                .map_err(|error| attach::os_error("ioctl(TUNGETIFF)", &error))?;
        }
        let class = self.class_for(&endpoint)?;
        if class == SizeClass::Large {
            self.open_large();
        }
        if let Endpoint::Queue(queue) = &endpoint
            && queue.vnet_hdr()
        {
            self.outbox.expect_superpackets();
        }
        self.open_port(endpoint, name, class, self.reserve)
    }

    fn open_port(
        &mut self,
        endpoint: Endpoint,
        name: String,
        class: SizeClass,
        reserve: u32,
    ) -> Result<PortId, OpenError> {
        let index = self.ports.free_index();
        if index >= MOST_PORTS {
            let detail = format!("a worker has at most {MOST_PORTS} ports; use another worker");
            return Err(OpenError::refused(OpenErrorKind::InvalidSetting, "attach", detail));
        }
        let socket = match &endpoint {
            Endpoint::Udp(socket) => Some(prepare(socket)?),
            _ => None,
        };
        if class == SizeClass::Large {
            // For the short ones among its packets; without, these stay where they were received.
            let _ = self.cx.arena.open_account(index, SizeClass::Small, reserve);
        }
        if self.cx.arena.open_account(index, class, reserve).is_none() {
            self.cx.arena.close_account(index);
            let detail =
                "every buffer is promised to a port or in use; raise WorkerConfig::buffers or lower receive_reserve";
            return Err(OpenError::refused(OpenErrorKind::MemoryLimit, "attach", detail));
        }
        let id = PortId::new(index);
        let tally = self.cx.books.open(id, name);
        let mut port = Port::new(id, endpoint, &self.cx.arena, class, tally);
        port.socket = socket;
        if let Some(socket) = &port.socket {
            if socket.wildcard {
                self.cx.datagrams.expect_ancillary();
            }
            let dropped = socket.dropped;
            port.coalesced(dropped);
        }
        self.ports.insert(port);
        if let Imp::Ring(ring) = &mut self.backend
            && let Err(error) = ring.attach(&mut self.cx, &mut self.ports, index)
        {
            self.ports.remove(index);
            self.cx.arena.close_account(index);
            self.cx.books.close(id);
            return Err(error);
        }
        let port = self.ports.at(index);
        // Back-pressure is to be expected; without a limit there is none.
        if let Endpoint::Queue(queue) = &port.endpoint {
            port.linked = queue.send_buffer().is_ok_and(|bytes| bytes < i32::MAX);
        }
        port.probe();
        Ok(id)
    }

    /// Opens a port to which another thread hands packets, at most `capacity` at a time. The port takes up to `capacity` buffers of this worker.
    ///
    /// ```
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let mut worker = tun_driver::Worker::new(&tun_driver::WorkerConfig::default())?;
    /// let (port, mut handoff) = worker.open_handoff(128)?;
    /// handoff.send(b"a packet")?; // from any one thread
    /// # let mut batch = tun_driver::Batch::with_capacity(1);
    /// # assert_eq!(worker.try_recv_many(port, &mut batch)?, 1);
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// No room for the port, or no buffers left to lend.
    pub fn open_handoff(&mut self, capacity: usize) -> Result<(PortId, Handoff), OpenError> {
        if capacity == 0 || capacity > self.cx.arena.config().small_slots / 2 {
            let detail = format!(
                "a hand-off for {capacity} packets: 1 to half of WorkerConfig::buffers ({}) are possible",
                self.cx.arena.config().small_slots / 2
            );
            return Err(OpenError::refused(
                OpenErrorKind::InvalidSetting,
                "open_handoff",
                detail,
            ));
        }
        let longest = self.cx.arena.read_len(SizeClass::Small) as usize - 1;
        let (end, handoff) = handoff::new(capacity, longest, self.cx.waker.clone());
        let port = self.open_port(
            Endpoint::Handoff(end),
            "handoff".to_owned(),
            SizeClass::Small,
            capacity as u32,
        )?;
        let index = self.ports.check(port).unwrap_or_else(|_| unreachable!("just opened"));
        self.ports.at(index).lend(&self.cx.arena);
        Ok((port, handoff))
    }

    /// Gives a port's queue or socket back, with the packets that were received and not handed over yet.
    ///
    /// # Errors
    /// [`PortErrorKind::Gone`] if it was detached before. [`PortErrorKind::Other`] if the kernel
    /// did not end the read in flight within two seconds, could not be entered, or did not let go
    /// of the descriptor: the port then stays.
    pub fn detach(&mut self, port: PortId) -> Result<Detached, PortError> {
        let index = self.ports.check(port)?;
        if let Imp::Ring(ring) = &mut self.backend {
            ring.detach(&mut self.cx, &mut self.ports, index)?;
        }
        let Some(removed) = self.ports.remove(index) else {
            unreachable!("checked above")
        };
        let detached = removed.into_detached(&self.cx.arena);
        self.cx.arena.close_account(index);
        self.cx.books.close(port);
        Ok(detached)
    }

    /// Waits until a port is ready, the deadline passes, or the waker is used; then tells which.
    ///
    /// `None` waits without end, a deadline in the past does not wait. A port that was ready and not emptied since is still ready. A port
    /// whose buffers are all held elsewhere is not ready until one comes back. A port that was busy may be told ready and turn out to be
    /// empty. Signals do not end the wait.
    ///
    /// # Errors
    /// Only if the kernel refuses to wait: for good, or for ten seconds on end for want of memory
    /// or the like (EAGAIN, EBUSY, ENOMEM; [`WorkerCounters`](crate::WorkerCounters) counts these).
    /// In the latter case another call tries again. Until then it goes on trying, and the deadline
    /// and the waker end the wait as ever.
    pub fn wait(&mut self, deadline: Option<Instant>) -> io::Result<Wake> {
        loop {
            match &mut self.backend {
                Imp::Ring(ring) => ring.wait(&mut self.cx, &mut self.ports, deadline)?,
                Imp::Syscalls(calls) => calls.wait(&mut self.cx, &mut self.ports, deadline)?,
            }
            self.cx.now = Instant::now();
            let wake = Wake {
                ready: self.ports.announce(),
                timer: deadline.is_some_and(|deadline| self.cx.now >= deadline),
                woken: self.cx.waker.take_woken(),
                stopped: self.cx.waker.stopped(),
            };
            if wake.ready > 0 || wake.timer || wake.woken || wake.stopped {
                return Ok(wake);
            }
        }
    }

    /// The next of the ports that the last [`wait`](Self::wait) found ready, each once, taking turns.
    pub fn next_ready(&mut self) -> Option<PortId> {
        self.ports.next_ready()
    }

    /// Receives into the batch: waits for the first packet only, then takes what is there, up to the batch's room.
    ///
    /// Returns how many packets were added at the end of the batch; 0 if the batch was full already, or if the [`Waker`] ended the wait.
    /// The next [`wait`](Self::wait) tells that, and until it did, no receive waits.
    ///
    /// To ask an empty queue costs about half of what a packet costs. Where packets have been coming one by one, the ring backend does not
    /// ask for more behind each of them, so some may be left that came meanwhile: the port is ready then, and they come with the next call.
    ///
    /// # Errors
    /// Told when there are no packets to hand over first: [`PortErrorKind::Truncated`], [`PortErrorKind::NoBuffers`], and [`PortErrorKind::BadPacket`]
    /// for a virtio-net header that contradicts its packet, once each time that they happen, [`PortErrorKind::Gone`] from then on at every call.
    ///
    /// [`PortErrorKind::Other`] with `io_uring_enter` and its errno while the ring cannot be
    /// entered ([`wait`](Self::wait)). Nothing is lost by it: what arrived comes once the kernel is
    /// asked again.
    pub fn recv_many(&mut self, port: PortId, batch: &mut Batch) -> Result<usize, PortError> {
        self.receive(port, batch, true)
    }

    /// Receives like [`recv_many`](Self::recv_many), but never waits: 0 if nothing is there.
    ///
    /// # Errors
    /// As [`recv_many`](Self::recv_many).
    pub fn try_recv_many(&mut self, port: PortId, batch: &mut Batch) -> Result<usize, PortError> {
        self.receive(port, batch, false)
    }

    #[inline]
    fn receive(&mut self, port: PortId, batch: &mut Batch, block: bool) -> Result<usize, PortError> {
        let index = self.ports.check(port)?;
        if batch.is_full() {
            return Ok(0);
        }
        let result = match &mut self.backend {
            Imp::Ring(ring) => ring.receive(&mut self.cx, &mut self.ports, index, batch, block),
            Imp::Syscalls(calls) => calls.receive(&mut self.cx, &mut self.ports, index, batch, block),
        };
        if let Ok(packets) = result {
            self.cx.moderation.received(packets);
        }
        result
    }

    /// Sends the packets of the batch, in order, without waiting.
    ///
    /// What was accepted or refused is taken from the front of the batch; what remains may be sent again. A packet that the kernel refuses
    /// for its content does not stop those behind it. Packets of other workers' arenas are sent too, from unregistered memory.
    ///
    /// A packet's [`peer`](PacketBuf::peer) says where a socket sends it; a queue does not look at it.
    ///
    /// What was received from a device with offloads may be sent on any port. Where the port's device was granted the same
    /// ([`port_info`](Self::port_info)), superpackets and unfinished packets go as they are; elsewhere superpackets are cut and checksums finished.
    /// To a device with offloads, runs of plain packets of a flow go merged, by the rules of the kernel's GRO
    /// ([`offload::coalesce`](crate::offload::coalesce)): no packet overtakes another of its flow, and flows may change places.
    /// [`set_superpackets`](Self::set_superpackets) switches each of this on and off. A superpacket counts as one packet, also if it is cut, and one of
    /// which a part was sent stays in the batch as a shorter one.
    ///
    /// The kernel may refuse superpackets in spite of what it granted (some did by mistake): such a one goes in pieces, in its place, and after 16 in a row
    /// its kind is not tried again on this port. [`Counters::offloads_refused`] tells.
    pub fn send_many(&mut self, port: PortId, batch: &mut Batch) -> Sent {
        let index = match self.ports.check(port) {
            Ok(index) => index,
            Err(error) => {
                return Sent {
                    stopped: Some(error),
                    ..Sent::default()
                };
            }
        };
        let (outbox, cx, ports) = (&mut self.outbox, &mut self.cx, &mut self.ports);
        match &mut self.backend {
            Imp::Ring(ring) => outgoing::send(&mut **ring, outbox, cx, ports, index, batch),
            Imp::Syscalls(calls) => outgoing::send(calls, outbox, cx, ports, index, batch),
        }
    }

    /// Receives one packet into `buf`, waiting for it, and returns its length. Copies the packet once; [`recv_many`](Self::recv_many) does not.
    ///
    /// Returns 0 if the [`Waker`] ended the wait (see [`recv_many`](Self::recv_many)), and for an empty datagram. Checksums are finished, but a
    /// superpacket comes as it is, and nothing tells: for devices with offloads other than CSUM there is [`recv_many`](Self::recv_many).
    ///
    /// # Errors
    /// As [`recv_many`](Self::recv_many); also [`PortErrorKind::Truncated`] for a packet longer than `buf`: it is dropped and counted.
    pub fn recv(&mut self, port: PortId, buf: &mut [u8]) -> Result<usize, PortError> {
        let mut single = std::mem::replace(&mut self.single, Batch::with_capacity(0));
        let result = self.recv_many(port, &mut single);
        let packet = single.pop();
        self.single = single;
        result?;
        let Some(mut packet) = packet else { return Ok(0) };
        // Nobody could tell that it is not finished. Cannot fail: it was checked as it came.
        let _ = packet.finish_checksum();
        let Some(target) = buf.get_mut(..packet.len()) else {
            let index = self.ports.check(port)?;
            let tally = &self.ports.at(index).tally;
            // It was counted as handed over, which it is not.
            tally.received_packets.take_back(1);
            tally.received_bytes.take_back(packet.len() as u64);
            tally.truncated.add(1);
            return Err(PortError::new(PortErrorKind::Truncated, "recv", libc::EMSGSIZE));
        };
        target.copy_from_slice(&packet);
        Ok(packet.len())
    }

    /// Sends one packet, without waiting. Copies the packet once; [`send_many`](Self::send_many) does not.
    ///
    /// # Errors
    /// The packet was not sent. [`PortErrorKind::Backpressure`], [`PortErrorKind::NoBuffers`]: it may be sent again later; every other
    /// refusal is counted.
    pub fn send(&mut self, port: PortId, packet: &[u8]) -> Result<(), PortError> {
        let index = self.ports.check(port)?;
        if packet.len() > self.longest_packet() {
            self.ports.at(index).tally.refuse(libc::EMSGSIZE, 1);
            return Err(PortError::new(PortErrorKind::BadPacket, "send", libc::EMSGSIZE));
        }
        let Some(packet) = self.packet_from(packet) else {
            return Err(PortError::new(PortErrorKind::NoBuffers, "send", libc::ENOBUFS));
        };
        let mut single = std::mem::replace(&mut self.single, Batch::with_capacity(0));
        let _ = single.push(packet);
        let sent = self.send_many(port, &mut single);
        let _unsent = single.pop();
        self.single = single;
        match sent.refusal.or(sent.stopped) {
            Some(error) => Err(error),
            None => Ok(()),
        }
    }

    /// A packet of `len` zero bytes with the configured headroom and tailroom. `None` if no buffer is free or `len` is beyond
    /// [`longest_packet`](Self::longest_packet).
    pub fn packet(&self, len: usize) -> Option<PacketBuf> {
        let mut packet = self.empty_packet(len)?;
        packet.grow_back(len).ok()?;
        Some(packet)
    }

    /// A packet with these bytes, with the configured headroom and tailroom. `None` as for [`packet`](Self::packet).
    pub fn packet_from(&self, bytes: &[u8]) -> Option<PacketBuf> {
        let mut packet = self.empty_packet(bytes.len())?;
        packet.append(bytes).ok()?;
        Some(packet)
    }

    fn empty_packet(&self, len: usize) -> Option<PacketBuf> {
        let arena = &self.cx.arena;
        let fits = |class| len < arena.read_len(class) as usize;
        let class = [SizeClass::Small, SizeClass::Large]
            .into_iter()
            .find(|&class| fits(class) && arena.available(Account::NONE, class, 1) > 0)?;
        let slot = arena.check_out(Account::NONE, class)?;
        Some(PacketBuf::whole_slot(arena, slot, 0))
    }

    /// The longest packet that this worker's buffers hold: 64 KiB once there are large ones ([`WorkerConfig::large_buffers`]).
    pub fn longest_packet(&self) -> usize {
        let class = if self.cx.arena.large_open() > 0 {
            SizeClass::Large
        } else {
            SizeClass::Small
        };
        self.cx.arena.read_len(class) as usize - 1
    }

    /// Makes a packet of this worker of one that travelled.
    ///
    /// Without a copy if it came from here; else its bytes are copied into a buffer of this worker and its own is given back.
    ///
    /// # Errors
    /// Hands it back if it is a foreign one and no buffer is free or long enough.
    pub fn import(&self, packet: RemoteBuf) -> Result<PacketBuf, RemoteBuf> {
        if packet.is_home(self.cx.arena.shared()) {
            return Ok(PacketBuf::from_remote_parts(&self.cx.arena, packet.into_parts()));
        }
        match self.packet_from(&packet) {
            Some(mut copy) => {
                copy.set_peer(packet.peer());
                copy.set_local(packet.local());
                let (shape, start) = packet.shape();
                copy.copy_shape(shape, start);
                Ok(copy)
            }
            None => Err(packet),
        }
    }

    /// A handle by which other threads wake or stop this worker.
    pub fn waker(&self) -> Waker {
        Waker::new(self.cx.waker.clone())
    }

    /// When the last [`wait`](Self::wait) returned: a clock that costs nothing to read, for timers.
    pub fn now(&self) -> Instant {
        self.cx.now
    }

    /// A port's counters; `None` if it was detached.
    pub fn counters(&self, port: PortId) -> Option<Counters> {
        self.ports.find(port).map(|port| port.tally.read())
    }

    /// All that is counted on this worker and its ports.
    pub fn stats(&self) -> WorkerStats {
        self.stats_reader().read()
    }

    /// A handle by which other threads read what [`stats`](Self::stats) tells, without this worker's help.
    pub fn stats_reader(&self) -> StatsReader {
        self.cx.books.reader()
    }

    /// What a port takes, so that one can tell beforehand what becomes of a superpacket there; `None` if it was detached.
    pub fn port_info(&self, port: PortId) -> Option<PortInfo> {
        self.ports.find(port).map(|port| port.info())
    }

    /// A device whose superpackets were given up, or that another holder changed, since the last
    /// call.
    #[cfg(feature = "engine")]
    pub(crate) fn device_news(&mut self) -> Option<(String, DeviceNews)> {
        let is_news = |port: &&mut Port| port.outgoing.untold || port.changed.is_some();
        let port = self.ports.iter_mut().find(is_news)?;
        let news = match port.changed.take() {
            Some(changed) => DeviceNews::Changed(changed),
            None => {
                port.outgoing.untold = false;
                DeviceNews::GivenUp(port.outgoing.pass)
            }
        };
        Some((name_of(&port.endpoint), news))
    }

    /// Asks the kernel whether another holder of a port's device changed the size of its virtio-net
    /// header, or switched on offloads that were not granted here, and sets both back. Returns
    /// whether that was so.
    ///
    /// A worker asks by itself where a packet looks wrong, and an engine where the kernel reports a
    /// change. What is left to ask from time to time, for a worker without an engine: whether the
    /// device of a port without a header hands out packets with unfinished checksums. The call
    /// waits for the kernel's lock of all network settings.
    ///
    /// # Errors
    /// [`PortErrorKind::Gone`] if the port was detached.
    pub fn restore(&mut self, port: PortId) -> Result<bool, PortError> {
        let index = self.ports.check(port)?;
        Ok(self.ports.at(index).restore())
    }

    /// Gives a port the buffers that its device's MTU wants now. Returns whether they were too
    /// short before.
    ///
    /// # Errors
    /// There are none that are long enough, or none is free.
    #[cfg(feature = "engine")]
    pub(crate) fn fit(&mut self, port: PortId) -> Result<bool, OpenError> {
        let Some(found) = self.ports.find(port) else {
            return Ok(false);
        };
        if found.class == SizeClass::Large && found.outgoing.vnet {
            return Ok(false);
        }
        let (class, now) = (self.class_for(&found.endpoint)?, found.class);
        if class == SizeClass::Small || now == SizeClass::Large {
            return Ok(false);
        }
        self.open_large();
        let index = usize::from(port.index);
        // A read that is in flight would end in a buffer of the other size.
        if let Imp::Ring(ring) = &mut self.backend {
            ring.disarm(&mut self.cx, &mut self.ports, index).map_err(|error| {
                let (kind, call) = (OpenErrorKind::IoUring, error.call());
                let errno = io::Error::from_raw_os_error(error.raw_os_error());
                OpenError::new(kind, call, &errno, "the reads in flight could not be ended; try again")
            })?;
        }
        let arena = &self.cx.arena;
        if arena.open_account(index, class, self.reserve).is_none() {
            let detail = "every large buffer is promised to a port or in use; raise WorkerConfig::large_buffers";
            return Err(OpenError::refused(OpenErrorKind::MemoryLimit, "fit", detail));
        }
        self.ports.at(index).widen(arena);
        Ok(true)
    }

    /// Switches what a port does with superpackets on or off, from the next packet on. Nothing is lost by it: what is not passed on is cut.
    ///
    /// What the kernel hands over is another matter: [`Queue::set_offloads`].
    ///
    /// # Errors
    /// [`PortErrorKind::Gone`] if the port was detached.
    pub fn set_superpackets(&mut self, port: PortId, switches: Superpackets) -> Result<(), PortError> {
        let index = self.ports.check(port)?;
        self.ports.at(index).outgoing.set(switches);
        Ok(())
    }

    /// The queue of a port, to enable or disable it, or to ask its name; `None` for a socket or a detached port.
    ///
    /// Do not read from its descriptor: that would take packets out of order.
    pub fn queue(&self, port: PortId) -> Option<&Queue> {
        match &self.ports.find(port)?.endpoint {
            Endpoint::Queue(queue) => Some(queue),
            Endpoint::Udp(_) | Endpoint::Handoff(_) => None,
        }
    }

    /// What a port is called in messages: its device as it was named when it was opened, or its
    /// socket's address. `None` if it was detached.
    ///
    /// A [`PortError`] does not name its port, since it is copied about on the data path.
    pub fn port_name(&self, port: PortId) -> Option<String> {
        self.ports.find(port).map(|port| name_of(&port.endpoint))
    }

    /// The socket of a port, to ask its addresses or set its options; `None` for a queue or a detached port.
    pub fn udp(&self, port: PortId) -> Option<&UdpSocket> {
        match &self.ports.find(port)?.endpoint {
            Endpoint::Queue(_) | Endpoint::Handoff(_) => None,
            Endpoint::Udp(socket) => Some(socket),
        }
    }

    /// The ports, in the order of their places.
    pub fn ports(&self) -> impl Iterator<Item = PortId> + '_ {
        self.ports.iter().map(|port| port.id)
    }

    /// (free, all) buffers of this worker.
    pub fn buffers(&self) -> (usize, usize) {
        self.cx.arena.occupancy()
    }

    /// Packets of this worker that were thrown away from batches ([`Batch::clear`], [`Batch::retain_mut`], dropping a batch).
    pub fn discarded(&self) -> u64 {
        self.cx.books.worker.discarded.get()
    }

    /// Drops the worker. Returns whether the kernel let go of its memory.
    #[cfg(feature = "engine")]
    pub(crate) fn close(mut self) -> bool {
        self.let_go()
    }

    /// Ends all that is in flight, once. `false` if the kernel does not let go of the memory, which is leaked then.
    fn let_go(&mut self) -> bool {
        if std::mem::replace(&mut self.closed, true) {
            return true;
        }
        let clean = match &mut self.backend {
            Imp::Ring(ring) => ring.close(&mut self.cx, &mut self.ports),
            Imp::Syscalls(_) => true,
        };
        if !clean {
            leak_memory(self.cx.arena.shared());
        }
        clean
    }

    /// Opens the buffers for superpackets and long packets, if they are not yet: registered, if the small ones are and the memlock limit allows.
    fn open_large(&mut self) {
        let arena = &self.cx.arena;
        let wanted = arena.config().large_slots;
        if let Imp::Ring(ring) = &mut self.backend
            && ring.has_registered(SizeClass::Small)
            && !ring.has_registered(SizeClass::Large)
        {
            // Once they are in use there is no shrinking.
            let (mut slots, fewest) = match arena.large_open() {
                0 => (wanted, FEWEST_LARGE.min(wanted)),
                open => (open, open),
            };
            while slots >= fewest {
                // SAFETY: as in `open_ring`.
                #[allow(unsafe_code)]
                let result = unsafe { ring.register(SizeClass::Large, arena.as_iovec(SizeClass::Large, slots)) };
                match result {
                    Ok(()) => {
                        arena.open_large(slots);
                        break;
                    }
                    Err(error) if error.raw_os_error() == Some(libc::ENOMEM) => slots /= 2,
                    Err(_) => break,
                }
            }
            self.report.registered_large_buffers = ring.has_registered(SizeClass::Large);
        }
        arena.open_large(wanted);
        self.report.large_buffers = arena.large_open();
    }

    /// The smallest class of buffers that holds every packet of the endpoint.
    fn class_for(&self, endpoint: &Endpoint) -> Result<SizeClass, OpenError> {
        let Endpoint::Queue(queue) = endpoint else {
            return Ok(SizeClass::Small);
        };
        let mtu = match queue.mtu_now() {
            // It may be switched on later; a superpacket is as long as IP can be.
            _ if queue.vnet_hdr() => 65_535,
            Some(mtu) => mtu,
            None => return Ok(SizeClass::Small),
        };
        // The link header; the packet information.
        let link = if queue.mode() == Mode::Tap { LINK_HEADER } else { 0 } + if queue.packet_info() { 4 } else { 0 };
        let longest = mtu as usize + link;
        let arena = &self.cx.arena;
        if longest < arena.read_len(SizeClass::Small) as usize {
            return Ok(SizeClass::Small);
        }
        if longest < arena.read_len(SizeClass::Large) as usize {
            return Ok(SizeClass::Large);
        }
        let detail = format!(
            "packets of {} can be {longest} bytes long, the buffers hold {}; give WorkerConfig::large_buffers",
            queue.name(),
            self.longest_packet()
        );
        Err(OpenError::refused(OpenErrorKind::InvalidSetting, "attach", detail))
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.let_go();
        // What lies in the inboxes needs no release: the tables go with the arena, or with the last packet.
    }
}

impl fmt::Debug for Worker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Worker")
            .field("backend", &self.report.backend)
            .field("ports", &self.ports.len())
            .finish_non_exhaustive()
    }
}

/// What an endpoint is called in the books.
fn name_of(endpoint: &Endpoint) -> String {
    match endpoint {
        Endpoint::Queue(queue) => queue.name().to_owned(),
        Endpoint::Udp(socket) => match socket.local_addr() {
            Ok(address) => format!("udp {address}"),
            Err(_) => "udp".to_owned(),
        },
        Endpoint::Handoff(_) => "handoff".to_owned(),
    }
}

/// Sets on a socket what a port relies on.
fn prepare(socket: &UdpSocket) -> Result<SocketOptions, OpenError> {
    SocketOptions::prepare(socket.as_raw_fd()).map_err(|unfit| match unfit {
        Unfit::NoSocket(error) => OpenError::new(
            OpenErrorKind::InvalidSetting,
            "getsockopt(SO_TYPE)",
            &error,
            "the descriptor is not a socket; attach a UDP socket",
        ),
        Unfit::Foreign => OpenError::refused(
            OpenErrorKind::InvalidSetting,
            "getsockopt(SO_PROTOCOL)",
            "the socket is not one of UDP over IPv4 or IPv6; attach a UDP socket",
        ),
        Unfit::Stream => OpenError::refused(
            OpenErrorKind::InvalidSetting,
            "getsockopt(SO_TYPE)",
            "the socket is not one of datagrams (SOCK_DGRAM); attach a UDP socket",
        ),
        Unfit::Refused(call, error) => {
            let detail = "the socket's options cannot be read or set; allow getsockname, getsockopt and setsockopt in the sandbox";
            OpenError::new(OpenErrorKind::Other, call, &error, detail)
        }
    })
}

type Opened = (Imp, Arena, BackendReport);

/// Few enough that an arena of them is of little use; below it is better not to register at all.
const FEWEST_REGISTERED: usize = 64;
/// The same of those for superpackets.
const FEWEST_LARGE: usize = 8;

fn open_ring(config: &WorkerConfig, waker: &WakeHandle, books: &Arc<Books>) -> Result<Opened, OpenError> {
    let mut ring = RingBackend::new(waker.as_fd())?;
    let wanted = config.arena();
    let mut granted = wanted;
    let mut unregistered = None;
    let arena = loop {
        let arena = new_arena(granted, waker, books)?;
        // SAFETY: a worker keeps the arena until its ring is closed, and leaks it if that could not be drained.
        #[allow(unsafe_code)]
        match unsafe { ring.register(SizeClass::Small, arena.as_iovec(SizeClass::Small, granted.small_slots)) } {
            Ok(()) => break arena,
            Err(error) if ring::is_refused(error.raw_os_error()) => return Err(error),
            // The memlock limit: a smaller arena may fit below it.
            Err(error)
                if error.raw_os_error() == Some(libc::ENOMEM) && granted.small_slots / 2 >= FEWEST_REGISTERED =>
            {
                granted.small_slots /= 2;
            }
            Err(error) => {
                unregistered = Some(error).filter(|error| error.raw_os_error() != Some(libc::ENOMEM));
                granted = wanted;
                break new_arena(granted, waker, books)?;
            }
        }
    };
    let registered = ring.has_registered(SizeClass::Small);
    let why = match (registered, granted == wanted) {
        (true, true) => "io_uring is usable".to_owned(),
        (true, false) => format!(
            "io_uring is usable; the memlock limit (ulimit -l) allows {} of {} registered buffers",
            granted.small_slots, wanted.small_slots
        ),
        (false, _) => match unregistered {
            Some(error) => format!("io_uring is usable, without registered buffers: {error}"),
            None => "io_uring is usable; the memlock limit (ulimit -l) allows no registered buffers".to_owned(),
        },
    };
    let report = BackendReport {
        backend: Backend::IoUring,
        why,
        registered_buffers: registered,
        registered_ring: ring.has_registered_ring(),
        buffers: granted.small_slots,
        large_buffers: 0,
        registered_large_buffers: false,
    };
    Ok((Imp::Ring(Box::new(ring)), arena, report))
}

fn open_syscalls(
    config: &WorkerConfig,
    waker: &WakeHandle,
    books: &Arc<Books>,
    why: String,
) -> Result<Opened, OpenError> {
    let arena = new_arena(config.arena(), waker, books)?;
    let report = BackendReport {
        backend: Backend::Syscalls,
        why,
        registered_buffers: false,
        registered_ring: false,
        buffers: config.buffers,
        large_buffers: 0,
        registered_large_buffers: false,
    };
    Ok((Imp::Syscalls(SyscallBackend::new(config.wait)), arena, report))
}

fn new_arena(config: ArenaConfig, waker: &WakeHandle, books: &Arc<Books>) -> Result<Arena, OpenError> {
    Arena::new(config, waker.clone(), Arc::clone(books)).map_err(|error| {
        let detail = format!(
            "no {} bytes for packet buffers; lower WorkerConfig::buffers",
            config.mapping_len()
        );
        OpenError::new(OpenErrorKind::MemoryLimit, "mmap", &error, detail)
    })
}

/// Refuses settings that could not work, before anything is opened.
fn check(config: &WorkerConfig) -> Result<(), OpenError> {
    let refuse = |detail: String| Err(OpenError::refused(OpenErrorKind::InvalidSetting, "Worker::new", detail));
    // The most that io_uring registers as one buffer.
    const MOST_BYTES: usize = 1 << 30;
    const MOST_BUFFERS: usize = 1 << 20;
    if !(16..=MOST_BUFFERS).contains(&config.buffers) || config.large_buffers > MOST_BUFFERS {
        return refuse(format!(
            "buffers is {} and large_buffers {}; 16 to {MOST_BUFFERS} are possible",
            config.buffers, config.large_buffers
        ));
    }
    if !(64..=LARGE_PACKET).contains(&config.max_packet) {
        return refuse(format!(
            "max_packet is {}; 64 to {LARGE_PACKET} bytes are possible",
            config.max_packet
        ));
    }
    if config.headroom > 4096 || config.tailroom > 4096 {
        return refuse("headroom and tailroom can be at most 4096 bytes each".to_owned());
    }
    if config.receive_reserve == 0 {
        return refuse("receive_reserve must be at least 1, or a port could wait for ever".to_owned());
    }
    if let Wait::Moderate { max } = config.wait
        && max > LONGEST_PAUSE
    {
        return refuse(format!(
            "Wait::Moderate may pause for {max:?}; {LONGEST_PAUSE:?} is the most, as a stop waits for it"
        ));
    }
    let bytes = config.arena().mapping_len();
    if bytes > MOST_BYTES {
        return refuse(format!(
            "the buffers would take {bytes} bytes; one gibibyte is the most"
        ));
    }
    Ok(())
}
