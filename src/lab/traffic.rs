//! Traffic on the host's side of a device: into its queues, and out of what was written to it.

use std::fmt;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use super::monotonic_ns;
use super::packet::{Fault, STAMP_LEN, check_payload, write_payload};
use super::tracker::Tracker;
use crate::netlink::Handle;
use crate::sys::fd;
use crate::sys::lab::{DatagramBatch, set_receive_buffer, socket_drops};

/// Datagrams per system call.
const BATCH: usize = 64;

/// The largest UDP payload.
const PAYLOAD_MAX: usize = 65_507;

/// How long a full socket buffer may take to empty.
const ROOM_BOUND: Duration = Duration::from_secs(5);

/// What the socket of a [`Catcher`] may hold, in bytes of kernel memory.
const RECEIVE_BUFFER: i32 = 64 << 20;

/// Puts stamped packets into a device's queues, by UDP sockets that send to an address routed to it.
///
/// Flow `f` goes from one source port to target port [`FIRST_PORT`](Self::FIRST_PORT) + `f`, so that the kernel spreads flows over queues.
/// Sequences go on from call to call.
pub struct Filler {
    socket: UdpSocket,
    netlink: Handle,
    device: u32,
    target: IpAddr,
    next: Vec<u32>,
    flow: usize,
    batch: DatagramBatch,
}

/// What came of [`Filler::fill`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Filled {
    /// Packets handed to the device.
    pub sent: u64,
    /// Those of them that the device dropped because the queue was full (its `tx_dropped`).
    pub dropped: u64,
}

/// Receives and checks what was written into a device for an address of the namespace.
pub struct Catcher {
    socket: UdpSocket,
    batch: DatagramBatch,
}

impl Filler {
    /// The target port of flow 0.
    pub const FIRST_PORT: u16 = 10_000;

    /// A filler of device `index` in the calling thread's namespace. The device is up, and `target` is routed to it and not its own
    /// address; on TAP, `target` has a neighbour entry.
    ///
    /// # Panics
    ///
    /// If `flows` is 0 or above 50,000.
    pub fn new(index: u32, target: IpAddr, flows: usize) -> io::Result<Self> {
        assert!((1..=50_000).contains(&flows), "1 to 50,000 flows");
        let any = if target.is_ipv4() {
            IpAddr::from(Ipv4Addr::UNSPECIFIED)
        } else {
            Ipv6Addr::UNSPECIFIED.into()
        };
        Ok(Self {
            socket: UdpSocket::bind((any, 0))?,
            netlink: Handle::new()?,
            device: index,
            target,
            next: vec![0; flows],
            flow: 0,
            batch: DatagramBatch::new(BATCH, PAYLOAD_MAX),
        })
    }

    /// Sends `count` packets of `length` bytes (from the IP header on), flow after flow in turn, and says how many found room in the queue.
    ///
    /// What was dropped is read from the device's `tx_dropped`: let nothing else send to the device meanwhile.
    ///
    /// # Errors
    ///
    /// `InvalidInput` if `length` is too short for a stamp or longer than the device's MTU; `TimedOut` if the socket's buffer does not empty
    /// within five seconds; else what sendmmsg(2) says (ENETUNREACH without a route).
    pub fn fill(&mut self, count: u64, length: usize) -> io::Result<Filled> {
        let before = self.netlink.link(self.device)?;
        let headers = if self.target.is_ipv4() { 28 } else { 48 };
        if length < headers + STAMP_LEN || length > before.mtu as usize {
            let least = headers + STAMP_LEN;
            let message = format!("packets of {length} bytes: {least} to {} are possible", before.mtu);
            return Err(io::Error::new(io::ErrorKind::InvalidInput, message));
        }
        let mut sent = 0;
        while sent < count {
            let wanted = (count - sent).min(BATCH as u64) as usize;
            let (next, flow, target) = (&self.next, self.flow, self.target);
            let flows = next.len();
            let went = self.batch.send(
                self.socket.as_fd(),
                wanted,
                length - headers,
                ROOM_BOUND,
                |index, payload| {
                    let turn = flow + index;
                    let of = turn % flows;
                    // Earlier packets of this batch with the same flow; where the batch began in mid-round, one round less.
                    let ahead = (turn / flows - usize::from(of < flow)) as u32;
                    write_payload(payload, of as u16, next[of].wrapping_add(ahead), monotonic_ns());
                    SocketAddr::new(target, Self::FIRST_PORT + of as u16)
                },
            )?;
            for _ in 0..went {
                self.next[self.flow] = self.next[self.flow].wrapping_add(1);
                self.flow = (self.flow + 1) % flows;
            }
            sent += went as u64;
            if went < wanted {
                return Err(io::Error::new(
                    io::ErrorKind::TimedOut,
                    "the socket's buffer does not empty",
                ));
            }
        }
        let after = self.netlink.stats(self.device)?;
        Ok(Filled {
            sent,
            dropped: after.since(&before.stats).tx_dropped,
        })
    }

    /// Tells a tracker how many packets of each flow were handed to the device so far.
    pub fn tell(&self, tracker: &mut Tracker) {
        for (flow, &count) in self.next.iter().enumerate() {
            tracker.sent(flow as u16, count);
        }
    }
}

impl Filled {
    /// Packets that found room in the queue.
    pub fn queued(&self) -> u64 {
        self.sent - self.dropped
    }
}

impl Catcher {
    /// Binds to an address of the calling thread's namespace, with as large a receive buffer as the kernel gives.
    pub fn bind(address: SocketAddr) -> io::Result<Self> {
        let socket = UdpSocket::bind(address)?;
        set_receive_buffer(socket.as_fd(), RECEIVE_BUFFER)?;
        Ok(Self {
            socket,
            batch: DatagramBatch::new(BATCH, PAYLOAD_MAX),
        })
    }

    /// Changes the receive buffer's size in bytes of kernel memory (the kernel doubles it for its own overhead).
    pub fn set_receive_buffer(&self, bytes: u32) -> io::Result<()> {
        set_receive_buffer(self.socket.as_fd(), i32::try_from(bytes).unwrap_or(i32::MAX))
    }

    /// The address it is bound to.
    pub fn address(&self) -> io::Result<SocketAddr> {
        self.socket.local_addr()
    }

    /// Records what is there; never waits. Returns how many datagrams it was.
    pub fn take(&mut self, tracker: &mut Tracker) -> io::Result<usize> {
        let mut total = 0;
        loop {
            let count = self.batch.receive(self.socket.as_fd(), |payload, truncated| {
                tracker.record(if truncated {
                    Err(Fault::Length)
                } else {
                    check_payload(payload)
                });
            })?;
            total += count;
            if count < BATCH {
                return Ok(total);
            }
        }
    }

    /// Records until `count` datagrams have come or none has come for `patience`. Returns how many came.
    pub fn catch(&mut self, tracker: &mut Tracker, count: usize, patience: Duration) -> io::Result<usize> {
        use std::os::fd::AsRawFd;

        let mut total = 0;
        let mut last = Instant::now();
        while total < count && last.elapsed() < patience {
            let mut wait = [libc::pollfd {
                fd: self.socket.as_raw_fd(),
                events: libc::POLLIN,
                revents: 0,
            }];
            if fd::poll(&mut wait, Some(patience.saturating_sub(last.elapsed())))? > 0 {
                total += self.take(tracker)?;
                last = Instant::now();
            }
        }
        Ok(total)
    }

    /// Datagrams that its socket dropped because the receive buffer was full: lost here, not in the device.
    pub fn dropped(&self) -> io::Result<u32> {
        socket_drops(self.socket.as_fd())
    }
}

impl fmt::Debug for Filler {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Filler")
            .field("device", &self.device)
            .field("target", &self.target)
            .finish_non_exhaustive()
    }
}

impl fmt::Debug for Catcher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Catcher")
            .field("socket", &self.socket)
            .finish_non_exhaustive()
    }
}
