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
use crate::sys::frames::FrameSocket;
use crate::sys::lab::{DatagramBatch, realtime_ahead_ns, set_receive_buffer, socket_drops};

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
    socket: Source,
    batch: DatagramBatch,
    receiver: Receiver,
}

enum Source {
    Datagrams(UdpSocket),
    Frames(FrameSocket),
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

/// What the socket may hold, in bytes of kernel memory.
const RECEIVE_BUFFER: i32 = 64 << 20;

/// How many batches are taken after a stop, where they do not end: more than the socket's buffer holds.
const LAST_BATCHES: usize = 4_096;

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
        Self::new(Source::Datagrams(UdpSocket::bind(address)?), receiver)
    }

    /// Takes all frames that come in at an interface of the calling thread's namespace, whatever the stack does with them, by packet(7). The
    /// interface needs no address. `receiver` has to expect an Ethernet header.
    ///
    /// # Errors
    ///
    /// ENODEV: no such interface; EPERM: no CAP_NET_RAW in that namespace; ENOPROTOOPT before Linux 4.20.
    pub fn on_interface(name: &str, receiver: Receiver) -> io::Result<Self> {
        let socket = Handle::new()?.index_of(name).and_then(FrameSocket::receiver);
        let socket =
            socket.map_err(|error| io::Error::new(error.kind(), format!("packet socket on {name}: {error}")))?;
        Self::new(Source::Frames(socket), receiver)
    }

    fn new(socket: Source, receiver: Receiver) -> io::Result<Self> {
        set_receive_buffer(socket.as_fd(), RECEIVE_BUFFER)?;
        Ok(Self {
            socket,
            batch: DatagramBatch::new(BATCH, PAYLOAD_MAX),
            receiver,
        })
    }

    /// The address it is bound to; `Unsupported` where it takes frames.
    pub fn address(&self) -> io::Result<SocketAddr> {
        match &self.socket {
            Source::Datagrams(socket) => socket.local_addr(),
            Source::Frames(_) => Err(io::ErrorKind::Unsupported.into()),
        }
    }

    /// Receives until one of the conditions holds or `stop` is set, which is looked at every 10 ms and after each batch; what is in the socket
    /// by then is taken, too. Returns how many datagrams came. Sleeps in poll(2) while there is nothing; the time of each batch is taken once, when recvmmsg(2) has returned.
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
            if count < BATCH {
                let mut wait = [libc::pollfd {
                    fd: self.socket.as_fd().as_raw_fd(),
                    events: libc::POLLIN,
                    revents: 0,
                }];
                fd::poll(&mut wait, Some(LOOK.min(until.quiet.unwrap_or(LOOK))))?;
            }
        }
        if stop.load(Ordering::Relaxed) {
            for _ in 0..LAST_BATCHES {
                match self.take()? {
                    0 => break,
                    count => total += count as u64,
                }
            }
        }
        Ok(total)
    }

    /// Receives one batch of what is there; never waits. Returns how many datagrams it was.
    pub fn take(&mut self) -> io::Result<usize> {
        let receiver = &mut self.receiver;
        let frames = matches!(self.socket, Source::Frames(_));
        let mut now = 0;
        self.batch.receive(self.socket.as_fd(), |payload, truncated| {
            if now == 0 {
                now = monotonic_ns();
            }
            if truncated {
                receiver.record(Err(Fault::Length), payload.len(), now);
            } else if frames {
                receiver.packet(payload, now);
            } else {
                receiver.payload(payload, now);
            }
        })
    }

    /// Changes the receive buffer's size in bytes of kernel memory (the kernel doubles it for its own overhead).
    pub fn set_receive_buffer(&self, bytes: u32) -> io::Result<()> {
        set_receive_buffer(self.socket.as_fd(), i32::try_from(bytes).unwrap_or(i32::MAX))
    }

    /// Datagrams that its socket dropped because the receive buffer was full: lost here, and not on the way.
    pub fn dropped(&self) -> io::Result<u32> {
        socket_drops(self.socket.as_fd())
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

impl AsFd for Source {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Datagrams(socket) => socket.as_fd(),
            Self::Frames(socket) => socket.as_fd(),
        }
    }
}

impl fmt::Debug for SocketReceiver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SocketReceiver")
            .field("socket", &self.socket.as_fd())
            .field("receiver", &self.receiver)
            .finish_non_exhaustive()
    }
}
