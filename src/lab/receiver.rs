//! A counting receiver of stamped test packets: loss, order, duplicates, damage, and latency from the intended send time.
//!
//! A [`Receiver`] is fed by whoever receives: a handler, a loop over read(2). A [`SocketReceiver`] has a socket of its own.
//!
//! Packets of the kernel's pktgen are known by their own header ([`PktgenStamp`](super::packet::PktgenStamp)) and counted like ours; see
//! [`Receiver::packet`] for what that can tell and what not.
//!
//! | figure | what it is | what it is not |
//! |---|---|---|
//! | [`Receiver::latency`] | from the time in the stamp to `now` as it was given, each whole packet, duplicates too; ns, three digits | the time of the generator's system call: a generator that is late is part of it, as is its [`window`](super::generator::Config::window) |
//! | [`Receiver::summary`] | what came of each flow, and what is missing in between | what is missing at the end, unless the tracker is told how many were sent ([`Generated::tell`](super::generator::Generated::tell)) |
//! | [`Receiver::span`] | from the first packet to the last | |
//!
//! Latencies are right below 4.29 seconds, which is where the stamp's clock begins anew.
//!
//! # What it costs
//!
//! A packet costs the books (an array's element, a histogram's counter) and the check of it. The checksum goes over the whole payload, so it
//! costs by length: all together some 45 ns for 64 bytes and 200 ns for 1,400. Without ([`verify(false)`](Receiver::verify)) headers, lengths
//! and the stamp's fields are looked at and nothing else, some 25 to 40 ns, and the measured thread is disturbed as little as possible.
//!
//! Nothing is allocated but for 8 bytes per gap in a flow, the first time that something is damaged, and where a flow's number is beyond those
//! that were announced.
//!
//! ```
//! use tun_driver::lab::monotonic_ns;
//! use tun_driver::lab::packet::Spec;
//! use tun_driver::lab::receiver::Receiver;
//!
//! let spec = Spec::new("10.0.0.2:4000".parse().unwrap(), "10.0.0.1:5000".parse().unwrap());
//! let mut packet = [0; 64];
//! spec.build(&mut packet, 64, 0, monotonic_ns());
//!
//! let mut receiver = Receiver::new(1);
//! let now = monotonic_ns(); // once per batch
//! receiver.packet(&packet, now);
//! assert_eq!(receiver.summary().received, 1);
//! assert_eq!(receiver.latency().len(), 1);
//! ```

use std::fmt;
use std::io;
use std::net::{SocketAddr, UdpSocket};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use hdrhistogram::Histogram;

use super::monotonic_ns;
use super::packet::{Fault, Framing, Stamp, check_payload, read_stamp};
use super::tracker::{Summary, Tracker};
use crate::netlink::Handle;
use crate::sys::fd;
use crate::sys::frames::FrameRing;
use crate::sys::lab::{DatagramBatch, realtime_ahead_ns, set_receive_buffer, socket_drops, take_socket_error};

/// The books of what was received by one thread. Those of several are put together by [`merge`](Self::merge).
#[derive(Clone)]
pub struct Receiver {
    tracker: Tracker,
    latency: Histogram<u64>,
    framing: Framing,
    verify: bool,
    bytes: u64,
    /// When the first and the last whole packet came.
    span: Option<(u64, u64)>,
    pktgen: Option<Pktgen>,
}

/// How packets of the kernel's pktgen are read.
#[derive(Clone, Copy, Debug)]
struct Pktgen {
    /// The destination port of its first thread.
    port: u16,
    /// CLOCK_REALTIME less CLOCK_MONOTONIC, in ns.
    ahead: i64,
}

/// Receives datagrams at an address, or frames at an interface, and keeps the books.
pub struct SocketReceiver {
    source: Source,
    receiver: Receiver,
}

enum Source {
    Datagrams(UdpSocket, DatagramBatch),
    Frames(FrameRing),
}

/// When a [`SocketReceiver`] has received enough: as soon as one of these holds, or it is told to stop.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Until {
    /// As many datagrams have come.
    pub packets: Option<u64>,
    /// None has come for so long, after the first.
    pub quiet: Option<Duration>,
    /// So much time has passed.
    pub time: Option<Duration>,
}

/// Datagrams per system call.
const BATCH: usize = 64;

/// The largest UDP payload.
const PAYLOAD_MAX: usize = 65_507;

/// What a socket or a ring may hold, in bytes of kernel memory. In a ring that is room for 40,000 frames of 1,514 bytes or 400,000 of 60.
const RECEIVE_BUFFER: u32 = 64 << 20;

/// How many batches are taken after a stop, where they do not end: more than the socket's buffer holds.
const LAST_BATCHES: usize = 4_096;

/// How long a ring is waited for after a stop, if it keeps frames back: as long as a busy machine may take to hand them over.
const LAST_WAIT: Duration = Duration::from_secs(2);

/// The longest wait without a look at the stop flag.
const LOOK: Duration = Duration::from_millis(10);

impl Receiver {
    /// Room for flows 0 … `flows` - 1, packets without framing, checksums verified.
    pub fn new(flows: usize) -> Self {
        Self {
            tracker: Tracker::new(flows),
            latency: Histogram::new_with_bounds(1, 1 << 32, 3).expect("bounds that the histogram takes"),
            framing: Framing::NONE,
            verify: true,
            bytes: 0,
            span: None,
            pktgen: None,
        }
    }

    /// Takes packets of the kernel's pktgen, too, whose threads send to `port` and those after it: the thread is their flow.
    pub fn pktgen(mut self, port: u16) -> Self {
        self.pktgen = Some(Pktgen {
            port,
            ahead: realtime_ahead_ns(),
        });
        self
    }

    /// Says what stands in front of the IP header.
    pub fn framing(mut self, framing: Framing) -> Self {
        self.framing = framing;
        self
    }

    /// Whether an Ethernet header is expected.
    pub fn has_ethernet(&self) -> bool {
        self.framing.ethernet.is_some()
    }

    /// Says whether checksums are verified. Without, a changed payload is not found, and UDP of others may pass for packets of ours; see
    /// [`Framing::check_unverified`].
    pub fn verify(mut self, verify: bool) -> Self {
        self.verify = verify;
        self
    }

    /// Takes a packet that came at `now`, by [`monotonic_ns`].
    ///
    /// One of pktgen's, if those are expected ([`pktgen`](Self::pktgen)), has no checksum, so that damage is not found, and tells when it was
    /// in fact sent, to a microsecond: what it waited before is not in its latency.
    #[inline]
    pub fn packet(&mut self, bytes: &[u8], now: u64) {
        if let Some(pktgen) = self.pktgen
            && let Some(stamp) = self.framing.read_pktgen(bytes)
        {
            self.record(Ok(stamp.as_ours(pktgen.port, pktgen.ahead)), bytes.len(), now);
            return;
        }
        let checked = if self.verify {
            self.framing.check(bytes)
        } else {
            self.framing.check_unverified(bytes)
        };
        self.record(checked, bytes.len(), now);
    }

    /// Takes a UDP payload, as a socket receives it.
    #[inline]
    pub fn payload(&mut self, payload: &[u8], now: u64) {
        let checked = if self.verify {
            check_payload(payload)
        } else {
            read_stamp(payload)
        };
        self.record(checked, payload.len(), now);
    }

    /// Takes what somebody else has checked; `len` bytes of it.
    #[inline]
    pub fn record(&mut self, checked: Result<Stamp, Fault>, len: usize, now: u64) {
        if let Ok(stamp) = checked {
            self.latency.saturating_record(stamp.age(now).as_nanos() as u64);
            self.bytes += len as u64;
            let first = self.span.map_or(now, |(first, _)| first);
            self.span = Some((first, now));
        }
        self.tracker.record(checked);
    }

    /// Takes over the books of another thread, exactly but for the count of what came late; see [`Tracker::merge`].
    pub fn merge(&mut self, other: &Self) {
        self.tracker.merge(&other.tracker);
        self.latency.add(&other.latency).expect("histograms of the same bounds");
        self.bytes += other.bytes;
        self.span = match (self.span, other.span) {
            (Some(one), Some(two)) => Some((one.0.min(two.0), one.1.max(two.1))),
            (one, two) => one.or(two),
        };
    }

    /// The books of each flow, to be told how many were sent.
    pub fn tracker_mut(&mut self) -> &mut Tracker {
        &mut self.tracker
    }

    /// The books of each flow.
    pub fn tracker(&self) -> &Tracker {
        &self.tracker
    }

    /// The books as they stand.
    pub fn summary(&self) -> Summary {
        self.tracker.summary()
    }

    /// Latencies of all whole packets, in ns, to three digits.
    pub fn latency(&self) -> &Histogram<u64> {
        &self.latency
    }

    /// Bytes of all whole packets as they were given: with framing, or payloads.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// From the first whole packet to the last.
    pub fn span(&self) -> Duration {
        self.span.map_or(Duration::ZERO, |(first, last)| {
            Duration::from_nanos(last.saturating_sub(first))
        })
    }
}

impl SocketReceiver {
    /// Binds to an address of the calling thread's namespace, with as large a receive buffer as the kernel gives, and tells `receiver` what
    /// comes there.
    pub fn bind(address: SocketAddr, receiver: Receiver) -> io::Result<Self> {
        Self::bind_with(address, RECEIVE_BUFFER, receiver)
    }

    /// The same with a receive buffer of `bytes` of kernel memory, which the kernel doubles for its own overhead.
    pub fn bind_with(address: SocketAddr, bytes: u32, receiver: Receiver) -> io::Result<Self> {
        let socket = UdpSocket::bind(address)?;
        set_receive_buffer(socket.as_fd(), i32::try_from(bytes).unwrap_or(i32::MAX))?;
        Ok(Self {
            source: Source::Datagrams(socket, DatagramBatch::new(BATCH, PAYLOAD_MAX)),
            receiver,
        })
    }

    /// Takes all frames that come in at an interface of the calling thread's namespace from now on, whatever the stack does with them, by
    /// packet(7). The interface needs no address. `receiver` has to expect an Ethernet header.
    ///
    /// The frames lie in a ring that the kernel shares (TPACKET_V3), each with the time when it was put there, which is what latencies are taken
    /// to. Measured over a veth, a frame costs the receiving thread 0.07 to 0.1 µs; by recvmmsg(2) it was 1.9 µs. A frame can be up to 10 ms in
    /// the ring before it can be taken, and they are taken by blocks of 128 KiB.
    ///
    /// # Errors
    ///
    /// ENODEV: no such interface; EPERM: no CAP_NET_RAW in that namespace; ENOPROTOOPT before Linux 4.20; ENOMEM.
    pub fn on_interface(name: &str, receiver: Receiver) -> io::Result<Self> {
        Self::on_interface_with(name, RECEIVE_BUFFER, receiver)
    }

    /// The same with a ring of `bytes`, rounded up to blocks of 128 KiB, two at least. In a trickle each block is begun anew every 10 ms, so
    /// nobody should keep away from a small ring for long.
    ///
    /// # Errors
    ///
    /// As [`on_interface`](Self::on_interface).
    pub fn on_interface_with(name: &str, bytes: u32, receiver: Receiver) -> io::Result<Self> {
        let ring = Handle::new()?
            .index_of(name)
            .and_then(|index| FrameRing::new(index, bytes as usize))
            .map_err(|error| io::Error::new(error.kind(), format!("packet socket on {name}: {error}")))?;
        Ok(Self {
            source: Source::Frames(ring),
            receiver,
        })
    }

    /// The address it is bound to; `Unsupported` where it takes frames.
    pub fn address(&self) -> io::Result<SocketAddr> {
        match &self.source {
            Source::Datagrams(socket, _) => socket.local_addr(),
            Source::Frames(_) => Err(io::ErrorKind::Unsupported.into()),
        }
    }

    /// Receives until one of the conditions holds or `stop` is set, which is looked at every 10 ms and after each batch; what is in the socket
    /// or the ring by then is taken, too. Returns how many came: whole batches, so they may be more than were asked for. Sleeps in poll(2) while
    /// there is nothing. The time of a batch of datagrams is taken once, when recvmmsg(2) has returned; each frame has its own.
    ///
    /// # Errors
    ///
    /// ENETDOWN once when the interface goes down or away; what came before is counted, and the call may be made again.
    pub fn run(&mut self, until: Until, stop: &AtomicBool) -> io::Result<u64> {
        let start = monotonic_ns();
        let mut last = None;
        let mut total = 0;
        let passed = |since: u64, bound: Option<Duration>, now: u64| {
            bound.is_some_and(|bound| u128::from(now.saturating_sub(since)) >= bound.as_nanos())
        };
        while !stop.load(Ordering::Relaxed) && until.packets.is_none_or(|packets| total < packets) {
            let count = self.take()?;
            total += count as u64;
            let now = monotonic_ns();
            if count > 0 {
                last = Some(now);
            }
            if passed(start, until.time, now) || last.is_some_and(|last| passed(last, until.quiet, now)) {
                break;
            }
            if count < self.source.batch() {
                self.source.wait(LOOK.min(until.quiet.unwrap_or(LOOK)))?;
            }
        }
        if stop.load(Ordering::Relaxed) {
            total += self.take_rest()?;
        }
        Ok(total)
    }

    /// Takes what has come by now.
    fn take_rest(&mut self) -> io::Result<u64> {
        let mut total = 0;
        let start = monotonic_ns();
        for _ in 0..LAST_BATCHES {
            match self.take()? {
                0 if self.source.keeps_back()? && u128::from(monotonic_ns() - start) < LAST_WAIT.as_nanos() => {
                    self.source.wait(LOOK)?;
                }
                0 => break,
                count => total += count as u64,
            }
        }
        Ok(total)
    }

    /// Receives one batch of what is there; never waits. Returns how many datagrams or frames it was.
    pub fn take(&mut self) -> io::Result<usize> {
        let receiver = &mut self.receiver;
        match &mut self.source {
            Source::Datagrams(socket, batch) => {
                let mut now = 0;
                batch.receive(socket.as_fd(), |payload, truncated| {
                    if now == 0 {
                        now = monotonic_ns();
                    }
                    if truncated {
                        receiver.record(Err(Fault::Length), payload.len(), now);
                    } else {
                        receiver.payload(payload, now);
                    }
                })
            }
            Source::Frames(ring) => {
                let ahead = realtime_ahead_ns();
                Ok(ring.take(|frame| {
                    let came = frame.time.wrapping_add_signed(-ahead);
                    if frame.truncated {
                        receiver.record(Err(Fault::Length), frame.bytes.len(), came);
                    } else {
                        receiver.packet(frame.bytes, came);
                    }
                }))
            }
        }
    }

    /// Datagrams that its socket dropped because the receive buffer was full, or frames because the ring was: lost here, and not on the way.
    pub fn dropped(&mut self) -> io::Result<u64> {
        match &mut self.source {
            Source::Datagrams(socket, _) => socket_drops(socket.as_fd()).map(u64::from),
            Source::Frames(ring) => ring.counts().map(|counts| counts.dropped),
        }
    }

    /// The books.
    pub fn receiver(&self) -> &Receiver {
        &self.receiver
    }

    /// The books, for good.
    pub fn into_receiver(self) -> Receiver {
        self.receiver
    }
}

/// One line.
impl fmt::Display for Receiver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let at = |share| self.latency.value_at_quantile(share) as f64 / 1e3;
        write!(
            f,
            "{}; latency {:.1} µs (p50), {:.1} µs (p99), {:.1} µs (most)",
            self.summary(),
            at(0.5),
            at(0.99),
            self.latency.max() as f64 / 1e3
        )
    }
}

impl fmt::Debug for Receiver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Receiver")
            .field("tracker", &self.tracker)
            .field("framing", &self.framing)
            .field("verify", &self.verify)
            .finish_non_exhaustive()
    }
}

impl Source {
    /// After how many there may be more.
    fn batch(&self) -> usize {
        match self {
            Self::Datagrams(..) => BATCH,
            Self::Frames(_) => 1,
        }
    }

    /// Whether there is something that cannot be taken yet.
    fn keeps_back(&mut self) -> io::Result<bool> {
        match self {
            Self::Datagrams(..) => Ok(false),
            Self::Frames(ring) => ring.counts().map(|counts| counts.taken < counts.put),
        }
    }

    /// Sleeps until something comes, no longer than `bound`. An error of the socket, of which poll(2) would tell again and again, is taken and
    /// returned.
    fn wait(&self, bound: Duration) -> io::Result<()> {
        let mut wait = [libc::pollfd {
            fd: self.as_fd().as_raw_fd(),
            events: libc::POLLIN,
            revents: 0,
        }];
        fd::poll(&mut wait, Some(bound))?;
        if wait[0].revents & libc::POLLERR != 0 {
            take_socket_error(self.as_fd())?;
        }
        Ok(())
    }
}

impl AsFd for Source {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Datagrams(socket, _) => socket.as_fd(),
            Self::Frames(ring) => ring.as_fd(),
        }
    }
}

impl fmt::Debug for SocketReceiver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SocketReceiver")
            .field("socket", &self.source.as_fd())
            .field("receiver", &self.receiver)
            .finish_non_exhaustive()
    }
}
