//! A paced open-loop generator of stamped test packets.
//!
//! Packet `i` is due at `start + i / rate`, whatever became of the packets before it, and carries that intended time in its stamp. When the
//! generator falls behind it sends at once and keeps the intended times, so a latency that is taken from the stamp has in it what the packet
//! waited for its turn to be sent (no coordinated omission).
//!
//! | figure | what it is | what it is not |
//! |---|---|---|
//! | [`Generated::sent`] | packets that the socket took | packets that arrived: a full device queue drops behind the socket's back |
//! | [`Generated::lateness`] | from the intended time to the moment before the system call, each packet | the way through the stack to the device |
//! | [`Generated::cpu`] | the sending thread: building, waiting, and the stack down to the device's queue | what the receiver costs |
//! | [`Generated::rate`] | packets sent by elapsed time | |
//!
//! # Groups
//!
//! At low rates each packet goes on its own, on time. Where several are due within [`Config::window`] (20 µs), they go as one group of one
//! flow with one system call, at the time when the last of them is due: none is sent before its time, and the first is late by the window at
//! most. So the window is the error that grouping adds to a latency; [`Generated::group`] says how many packets it was. The flows take turns
//! group by group.
//!
//! # Which way to send
//!
//! Measured to a TUN device without offloads that is read on the other CPU, four flows: CPU time of the sending thread per packet in
//! µs, 64 and 1,400 bytes (two virtual CPUs, Linux 6.18, middle of three runs that differ by up to a third):
//!
//! | packets in a group | send(2) each | sendmmsg(2) | UDP GSO |
//! |---|---|---|---|
//! | 1 | 2.7, 3.1 | 2.8, 3.5 | 2.6, 3.9 |
//! | 2 | 2.5, 3.7 | 2.5, 3.6 | 2.5, 2.6 |
//! | 4 | 2.6, 2.8 | 2.1, 2.5 | 1.4, 2.0 |
//! | 8 | 2.5, 3.4 | 2.1, 2.9 | 1.1, 1.6 |
//! | 16 | 2.5, 3.8 | 2.0, 3.5 | 0.8, 1.6 |
//! | 64 (47 of 1,400 bytes) | 2.3, 3.9 | 1.7, 3.4 | 0.6, 1.3 |
//!
//! So a single packet goes by send(2), a group by UDP GSO. The ceilings there: 1.3 to 2.1 million packets of 64 bytes per second, 0.8 to 1.0
//! million of 1,400.
//!
//! UDP GSO (`UDP_SEGMENT`) hands the stack one large packet, which it cuts in software right before such a device: every packet arrives
//! whole, with checksums, on its own. To devices without checksum offload Linux takes it since 6.11 (EIO before); the generator falls back to
//! sendmmsg(2) then.
//!
//! # Frames
//!
//! With a [`Link`] the generator sends whole Ethernet frames out of an interface through one packet socket. CPU time of the sending thread per frame
//! in µs, 60 and 1,514 bytes, four flows, over a veth without transmit offloads whose peer discards them, and over one whose peer routes them into a
//! TUN device that is read on the other CPU (the same machine, middle of five runs that differ by up to a half). What the receiving end does until
//! the frame lies in a queue is in it, because the kernel does that on the sender's time:
//!
//! | frames in a group | discarded: send(2) each | sendmmsg(2) | UDP GSO | into a TUN device: send(2) each | sendmmsg(2) | UDP GSO |
//! |---|---|---|---|---|---|---|
//! | 1 | 2.7, 2.7 | 2.7, 2.7 | 2.7, 2.9 | 3.5, 3.8 | 3.5, 3.6 | 3.5, 3.7 |
//! | 4 | 2.7, 2.7 | 2.0, 2.3 | 1.5, 1.7 | 3.4, 3.7 | 2.7, 2.8 | 1.9, 2.1 |
//! | 16 | 2.6, 2.7 | 1.9, 1.9 | 1.1, 1.2 | 3.5, 3.6 | 2.5, 2.6 | 1.1, 1.3 |
//! | 64 (44 of 1,514 bytes) | 2.6, 2.6 | 1.8, 1.9 | 0.9, 1.0 | 3.4, 3.5 | 2.3, 2.5 | 1.2, 1.2 |
//!
//! So a group goes by UDP GSO where packet sockets take it (Linux 6.2) and the kernel cuts before the interface (`ethtool -K … tx off`).
//! PACKET_TX_RING gains nothing: bare, in groups of 64, discarded, it was 2.3 and 2.1. Besides, its slots are given back when a frame loses its
//! owner, which may be while it still waits in a queue.
//!
//! ```no_run
//! use std::sync::atomic::AtomicBool;
//! use std::time::Duration;
//! use tun_driver::lab::generator::{Config, Generator, Limit};
//!
//! # fn main() -> std::io::Result<()> {
//! let config = Config {
//!     flows: 4,
//!     rate: Some(100_000),
//!     limit: Limit::Time(Duration::from_secs(1)),
//!     ..Config::new("10.0.0.2:9".parse().unwrap())
//! };
//! let generated = Generator::new(&config)?.run(&AtomicBool::new(false))?;
//! println!("{generated}");
//! # Ok(())
//! # }
//! ```

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::os::fd::{AsFd, AsRawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use hdrhistogram::Histogram;

use super::packet::{Ethernet, Framing, STAMP_LEN, Spec, UDP_LEN, write_payload};
use super::tracker::Tracker;
use super::{monotonic_ns, process};
use crate::netlink::Handle;
use crate::sys::cpu::TimerSlack;
use crate::sys::frames::FrameSocket;
use crate::sys::lab::Row;
use crate::sys::netdevice::{ControlSocket, IfName};
use crate::sys::socket::{set_do_not_fragment, set_udp_segment};
use crate::sys::virtio_net::virtio_net_hdr;
use crate::sys::{cpu, fd};

/// The most packets of one group, and so of one system call. The kernel's own bound for UDP GSO was 64 until 6.9.
pub const GROUP_MAX: usize = 64;

/// What to send, where to, and when.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// Where to: an address that is routed into the device, and a port.
    pub target: SocketAddr,
    /// The source address and the source port of flow 0, flow `f` has the `f`th port after it; unless set, the kernel chooses.
    pub source: Option<SocketAddr>,
    /// How many flows, each with a source port (and a descriptor) of its own and with sequences from 0. 1 to 65,536.
    pub flows: usize,
    /// Out of this interface as Ethernet frames, past the stack of the namespace, instead of by sockets. [`source`](Self::source) is needed then,
    /// and flows cost no descriptors.
    pub link: Option<Link>,
    /// Lengths that take turns group by group instead of one [`length`](Self::length), with a [`link`](Self::link) only; see [`IMIX`].
    pub mix: Vec<usize>,
    /// Length of each packet in bytes, from the IP header on: at least [`MIN_IPV4`](super::packet::MIN_IPV4) or [`MIN_IPV6`](super::packet::MIN_IPV6), at
    /// most the MTU of the way.
    pub length: usize,
    /// Packets per second, all flows together; as fast as possible unless set.
    pub rate: Option<u64>,
    /// When it is over.
    pub limit: Limit,
    /// Packets that are due within as long a time go together. Zero sends each on its own, the flows in turn.
    pub window: Duration,
    /// How the packets of a group are sent; unless set, the cheapest that the kernel takes.
    pub way: Option<Way>,
    /// The CPU to send from. The thread that runs the generator stays there.
    pub cpu: Option<usize>,
    /// How long before a packet's time the thread wakes up, to watch the clock from then on: 60 µs unless set, which a wake-up seldom exceeds.
    /// Zero only sleeps, and each packet is late by what a wake-up takes, but the CPU is left to others. [`Duration::MAX`] never sleeps.
    pub wake_ahead: Duration,
}

/// The interface by which frames leave, and the addresses on them.
///
/// In the calling thread's network namespace, with CAP_NET_RAW. Groups go as one frame that the kernel cuts (Linux 6.2; before, each frame
/// goes on its own), if the interface does not take it whole: one without checksum offload has it cut (`ethtool -K … tx off`,
/// [`cut_frames`]). On others each frame goes on its own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Link {
    /// Its name.
    pub interface: String,
    /// The hardware addresses in the frames.
    pub ethernet: Ethernet,
}

/// Frames of 64, 570 and 1,518 bytes (with the frame check sequence) as 7 : 4 : 1, the "simple IMIX", as lengths from the IP header on.
pub const IMIX: [usize; 12] = [46, 552, 46, 46, 552, 46, 1500, 46, 552, 46, 552, 46];

/// When a generator has done its work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Limit {
    /// When as many packets were due, however long it takes to send them.
    Packets(u64),
    /// After this time. What was due within it and is not sent 10 ms after its end stays unsent.
    Time(Duration),
}

/// How the packets of a group are sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// Each with send(2).
    Single,
    /// With one sendmmsg(2).
    Batch,
    /// With one send(2) of all of them, which the kernel cuts (UDP_SEGMENT).
    Gso,
}

/// When each packet is due.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Schedule {
    /// When packet 0 is due, by [`monotonic_ns`].
    pub start_ns: u64,
    /// Packets per second.
    pub rate: u64,
}

/// Sends by sockets of the network namespace in which it was made, from any thread.
pub struct Generator {
    config: Config,
    outlet: Outlet,
    way: Way,
    row: Row,
    /// [`ROOM`] bytes for headers, then the payloads of a group.
    memory: Box<[u8]>,
    /// The lengths of the groups' payloads, in turn.
    payloads: Vec<usize>,
    /// That of the group at hand.
    payload: usize,
    group: usize,
}

/// Where packets leave.
enum Outlet {
    /// A connected socket per flow.
    Sockets(Vec<UdpSocket>),
    /// One packet socket; the packets of flow 0.
    Link(FrameSocket, Spec),
}

/// For a vnet header and the headers of a frame.
const ROOM: usize = 80;

/// What a generator did.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Generated {
    /// When packets were due; `None` where there was no rate to keep, and each was stamped when it was built.
    pub schedule: Option<Schedule>,
    /// Packets in a row of one flow, which went together.
    pub group: usize,
    /// How groups were sent.
    pub way: Way,
    /// Packets that were due. Without a rate: that were tried.
    pub due: u64,
    /// Packets that the kernel took.
    pub sent: u64,
    /// The same by flow: sequences 0 to this, exclusive, were sent.
    pub flows: Vec<u32>,
    /// Packets that the kernel refused, by errno; their sequence numbers went to the next ones of the flow.
    pub refused: BTreeMap<i32, u64>,
    /// ICMP errors that told of earlier packets (ECONNREFUSED: nobody listens at the target).
    pub answers: u64,
    /// Times that the socket's buffer was full and had to be waited for: the device's queue holds back.
    pub stalls: u64,
    /// Groups out of a link of which some frames may have been dropped at its other end (ENOBUFS); they count as sent, and the link's
    /// `tx_dropped` tells how many it was.
    pub congested: u64,
    /// System calls that send.
    pub calls: u64,
    /// From the start to the last packet's end.
    pub wall: Duration,
    /// CPU time of the sending thread, user and system. Waiting for the time to send is within it where it watches the clock.
    pub cpu: Duration,
    /// How much later than intended each packet was handed to the kernel, in ns, to two digits. Empty without a rate.
    pub lateness: Histogram<u64>,
    /// Whether it was told to stop before the end.
    pub stopped: bool,
}

/// How long after the call of `run` packet 0 is due.
const LEAD: u64 = 100_000;

/// The longest sleep without a look at the stop flag.
const LONGEST_SLEEP: u64 = 10_000_000;

/// How long after the end of its time a generator may still send.
const GRACE: u64 = 10_000_000;

/// The largest payload of a UDP packet over IPv4.
const PAYLOAD_MAX: usize = 65_507;

/// How often a call is made again because of an error that told of an earlier packet.
const RETRIES: usize = 8;

impl Config {
    /// One flow of 64-byte packets, 10,000 per second, for a second, to `target`.
    pub fn new(target: SocketAddr) -> Self {
        Self {
            target,
            source: None,
            flows: 1,
            link: None,
            mix: Vec::new(),
            length: 64,
            rate: Some(10_000),
            limit: Limit::Time(Duration::from_secs(1)),
            window: Duration::from_micros(20),
            way: None,
            cpu: None,
            wake_ahead: Duration::from_micros(60),
        }
    }

    fn headers(&self) -> usize {
        if self.target.is_ipv4() { 28 } else { 48 }
    }

    fn check(&self) -> io::Result<()> {
        let least = self.headers() + STAMP_LEN;
        let most = self.headers() + PAYLOAD_MAX;
        let wrong = if !(1..=1 << 16).contains(&self.flows) {
            format!("{} flows: 1 to 65,536 are possible", self.flows)
        } else if self.link.is_some() && self.source.is_none_or(|source| source.port() == 0) {
            "frames need a source address and port".to_owned()
        } else if self.link.is_none() && !self.mix.is_empty() {
            "a mix of lengths needs a link to leave by".to_owned()
        } else if let Some(length) = self.mix.iter().find(|length| !(least..=most).contains(*length)) {
            format!("packets of {length} bytes in the mix: {least} to {most} are possible")
        } else if !(least..=most).contains(&self.length) {
            format!("packets of {} bytes: {least} to {most} are possible", self.length)
        } else if self.rate == Some(0) {
            "a rate of 0 packets per second sends nothing".to_owned()
        } else if self
            .source
            .is_some_and(|source| source.is_ipv4() != self.target.is_ipv4())
        {
            "source and target are of two families".to_owned()
        } else if self
            .source
            .is_some_and(|source| source.port() != 0 && usize::from(source.port()) + self.flows > 1 << 16)
        {
            "the flows' source ports go beyond 65,535".to_owned()
        } else {
            return Ok(());
        };
        Err(io::Error::new(io::ErrorKind::InvalidInput, wrong))
    }
}

impl Schedule {
    /// When packet `number` is due, by [`monotonic_ns`].
    #[inline]
    pub fn due(&self, number: u64) -> u64 {
        const NS: u64 = 1_000_000_000;
        self.start_ns
            + match number.checked_mul(NS) {
                Some(product) => product / self.rate,
                None => (u128::from(number) * u128::from(NS) / u128::from(self.rate)) as u64,
            }
    }

    /// How many packets are due within `time`: numbers 0 to this, exclusive.
    pub fn within(&self, time: Duration) -> u64 {
        let packets = (time.as_nanos() * u128::from(self.rate)).div_ceil(1_000_000_000);
        u64::try_from(packets).unwrap_or(u64::MAX)
    }
}

impl Generator {
    /// Opens the flows' sockets in the calling thread's network namespace.
    ///
    /// # Errors
    ///
    /// `InvalidInput` for a configuration that makes no sense; ENETUNREACH without a route to the target; EADDRINUSE where a source port is
    /// taken; EMFILE if the process may not have as many descriptors as there are flows (RLIMIT_NOFILE).
    pub fn new(config: &Config) -> io::Result<Self> {
        config.check()?;
        let lengths = if config.mix.is_empty() {
            std::slice::from_ref(&config.length)
        } else {
            &config.mix[..]
        };
        let payloads: Vec<usize> = lengths.iter().map(|length| length - config.headers()).collect();
        let longest = payloads.iter().copied().max().unwrap_or(STAMP_LEN);
        let group = match config.rate {
            _ if config.window.is_zero() => 1,
            None => GROUP_MAX,
            Some(rate) => {
                let within = config.window.as_nanos() * u128::from(rate) / 1_000_000_000;
                within.clamp(1, GROUP_MAX as u128) as usize
            }
        }
        .min(PAYLOAD_MAX / longest)
        .max(1);
        let outlet = match &config.link {
            Some(link) => Self::link(config, link)?,
            None => Self::sockets(config)?,
        };
        let mut generator = Self {
            config: config.clone(),
            outlet,
            way: Way::Single,
            row: Row::new(GROUP_MAX),
            memory: vec![0; ROOM + group * longest].into(),
            payload: payloads[0],
            payloads,
            group,
        };
        match config.way {
            Some(way) => generator.set_way(way)?,
            None if group == 1 => {}
            // A kernel before 4.18 has no UDP_SEGMENT; not every link cuts.
            None => {
                let ways = [Way::Gso, Way::Batch];
                let _ = ways.into_iter().any(|way| generator.set_way(way).is_ok());
            }
        }
        Ok(generator)
    }

    fn link(config: &Config, link: &Link) -> io::Result<Outlet> {
        let named = |error: io::Error| io::Error::new(error.kind(), format!("interface {}: {error}", link.interface));
        let index = Handle::new()?.index_of(&link.interface).map_err(named)?;
        let socket = FrameSocket::sender(index)
            .and_then(FrameSocket::with_vnet_header)
            .map_err(named)?;
        let source = config.source.unwrap_or(config.target); // checked
        let spec = Spec::new(source, config.target).framing(Framing {
            ethernet: Some(link.ethernet),
            ..Framing::NONE
        });
        Ok(Outlet::Link(socket, spec))
    }

    fn sockets(config: &Config) -> io::Result<Outlet> {
        let any: IpAddr = if config.target.is_ipv4() {
            Ipv4Addr::UNSPECIFIED.into()
        } else {
            Ipv6Addr::UNSPECIFIED.into()
        };
        let first = config.source.unwrap_or(SocketAddr::new(any, 0));
        let mut sockets = Vec::with_capacity(config.flows);
        for flow in 0..config.flows {
            let mut source = first;
            if source.port() != 0 {
                source.set_port(first.port() + flow as u16);
            }
            let socket = UdpSocket::bind(source)?;
            set_do_not_fragment(socket.as_raw_fd(), config.target.is_ipv4())?;
            socket.connect(config.target)?;
            socket.set_nonblocking(true)?;
            sockets.push(socket);
        }
        Ok(Outlet::Sockets(sockets))
    }

    /// How many packets of one flow go together.
    pub fn group(&self) -> usize {
        self.group
    }

    /// Sends until the limit is reached or `stop` is set, which is looked at before each group and every 10 ms of sleep. Every run begins with
    /// sequence 0.
    ///
    /// # Errors
    ///
    /// The CPU is none that the thread may run on (EINVAL). What the kernel says to packets is no error here; see [`Generated::refused`].
    pub fn run(&mut self, stop: &AtomicBool) -> io::Result<Generated> {
        if let Some(cpu) = self.config.cpu {
            cpu::pin_thread(cpu).map_err(|error| io::Error::new(error.kind(), format!("CPU {cpu}: {error}")))?;
        }
        // The kernel may lengthen each sleep by that much; not being able to set it makes the generator late, which it tells.
        let _slack = TimerSlack::least();
        self.send_all(stop)
    }

    fn send_all(&mut self, stop: &AtomicBool) -> io::Result<Generated> {
        let lateness = Histogram::new_with_bounds(1, 3_600_000_000_000, 2).map_err(io::Error::other)?;
        let cpu = process::thread_cpu_time();
        let start = monotonic_ns();
        // The first packet is due a little later, so that not even it is late.
        let schedule = self.config.rate.map(|rate| Schedule {
            start_ns: start + LEAD,
            rate,
        });
        let begin = schedule.map_or(start, |schedule| schedule.start_ns);
        let (total, end) = match (self.config.limit, schedule) {
            (Limit::Packets(packets), _) => (packets, u64::MAX),
            (Limit::Time(time), None) => (u64::MAX, begin + time.as_nanos() as u64),
            (Limit::Time(time), Some(schedule)) => (schedule.within(time), begin + time.as_nanos() as u64 + GRACE),
        };
        let mut done = Generated {
            schedule,
            group: self.group,
            way: self.way,
            due: 0,
            sent: 0,
            flows: vec![0; self.config.flows],
            refused: BTreeMap::new(),
            answers: 0,
            stalls: 0,
            congested: 0,
            calls: 0,
            wall: Duration::ZERO,
            cpu: Duration::ZERO,
            lateness,
            stopped: false,
        };
        let (mut next, mut flow, mut groups) = (0, 0, 0);
        while next < total {
            if stop.load(Ordering::Relaxed) {
                done.stopped = true;
                break;
            }
            let now = monotonic_ns();
            if now >= end {
                break;
            }
            let count = (self.group as u64).min(total - next) as usize;
            self.payload = self.payloads[groups % self.payloads.len()];
            self.build(&done, flow, next, count, now);
            let now = match schedule {
                None => now,
                Some(schedule) => match self.wait(schedule.due(next + count as u64 - 1), stop) {
                    Some(now) => now,
                    None => continue, // the flag is set
                },
            };
            if let Some(schedule) = schedule {
                for packet in next..next + count as u64 {
                    done.lateness
                        .saturating_record(now.saturating_sub(schedule.due(packet)));
                }
            }
            self.send(&mut done, flow, count, end, stop);
            next += count as u64;
            flow = (flow + 1) % self.config.flows;
            groups += 1;
        }
        done.wall = Duration::from_nanos(monotonic_ns().saturating_sub(begin));
        done.cpu = process::thread_cpu_time().saturating_sub(cpu);
        done.way = self.way;
        done.due = match (schedule, self.config.limit) {
            // What a stop cut off was due up to then only.
            (Some(schedule), _) if done.stopped => schedule.within(done.wall).clamp(next, total),
            (Some(_), _) => total,
            (None, _) => next,
        };
        Ok(done)
    }

    /// Writes the payloads of packets `next..next + count`, the next ones of `flow`.
    fn build(&mut self, done: &Generated, flow: usize, next: u64, count: usize, now: u64) {
        for (index, payload) in self.memory[ROOM..]
            .chunks_exact_mut(self.payload)
            .take(count)
            .enumerate()
        {
            let intended = done.schedule.map_or(now, |schedule| schedule.due(next + index as u64));
            let sequence = done.flows[flow].wrapping_add(index as u32);
            write_payload(payload, flow as u16, sequence, intended);
        }
    }

    /// Waits until `due`, and returns what time it is; `None` if told to stop.
    fn wait(&self, due: u64, stop: &AtomicBool) -> Option<u64> {
        let ahead = u64::try_from(self.config.wake_ahead.as_nanos()).unwrap_or(u64::MAX);
        loop {
            let now = monotonic_ns();
            let left = due.saturating_sub(now);
            if left == 0 {
                return Some(now);
            }
            if left > ahead {
                thread::sleep(Duration::from_nanos((left - ahead).min(LONGEST_SLEEP)));
            } else {
                std::hint::spin_loop();
            }
            if stop.load(Ordering::Relaxed) {
                return None;
            }
        }
    }

    /// Sends the first `count` payloads, and counts what came of it.
    fn send(&mut self, done: &mut Generated, flow: usize, count: usize, end: u64, stop: &AtomicBool) {
        let (mut from, mut retries) = (0, RETRIES);
        while from < count {
            done.calls += 1;
            let (result, fd) = match &self.outlet {
                Outlet::Sockets(sockets) => {
                    let bytes = &self.memory[ROOM + from * self.payload..ROOM + count * self.payload];
                    let socket = &sockets[flow];
                    let result = match self.way {
                        Way::Single => socket.send(&bytes[..self.payload]).map(|_| 1),
                        Way::Gso => socket.send(bytes).map(|_| count - from),
                        Way::Batch => self.row.send(socket.as_fd(), bytes, self.payload),
                    };
                    (result, socket.as_raw_fd())
                }
                Outlet::Link(socket, spec) => {
                    let packets = if self.way == Way::Gso { count - from } else { 1 };
                    let end = ROOM + (from + packets) * self.payload;
                    // The headers come to lie over payloads that are sent already.
                    let start = write_front(&mut self.memory[..end], &spec.flow(flow as u16), self.payload, packets);
                    let result = socket.send(&self.memory[start..end]).map(|()| packets);
                    (result, socket.as_fd().as_raw_fd())
                }
            };
            let error = match result {
                Ok(taken) => {
                    done.sent += taken as u64;
                    done.flows[flow] = done.flows[flow].wrapping_add(taken as u32);
                    from += taken;
                    continue;
                }
                Err(error) => error,
            };
            let errno = error.raw_os_error().unwrap_or(libc::EIO);
            match errno {
                libc::EINTR => continue,
                libc::EAGAIN if monotonic_ns() < end && !stop.load(Ordering::Relaxed) => {
                    done.stalls += 1;
                    let mut room = [libc::pollfd {
                        fd,
                        events: libc::POLLOUT,
                        revents: 0,
                    }];
                    // Whatever it says, the call is made again, and the flag and the time are looked at.
                    let _ = fd::poll(&mut room, Some(Duration::from_millis(10)));
                    continue;
                }
                libc::ECONNREFUSED if retries > 0 => {
                    retries -= 1;
                    done.answers += 1;
                    continue;
                }
                // Of a frame that was cut, some may have gone and some not: the link counts which. The last one decides what is said here.
                libc::ENOBUFS if self.way == Way::Gso && self.config.link.is_some() => {
                    done.congested += 1;
                    done.sent += (count - from) as u64;
                    done.flows[flow] = done.flows[flow].wrapping_add((count - from) as u32);
                    from = count;
                    continue;
                }
                // The device cannot do checksums, and the kernel is older than 6.11; a packet socket, and it is older than 6.2.
                libc::EIO | libc::EINVAL
                    if self.way == Way::Gso && self.config.way.is_none() && self.set_way(Way::Batch).is_ok() =>
                {
                    continue;
                }
                _ => {}
            }
            // A batch fails by its first datagram, and a large packet as a whole. What was refused leaves a hole at the front: the rest is
            // refused with it, so that sequences have none.
            *done.refused.entry(errno).or_default() += (count - from) as u64;
            from = count;
        }
    }

    fn set_way(&mut self, way: Way) -> io::Result<()> {
        match &self.outlet {
            Outlet::Sockets(sockets) if way == Way::Gso || self.way == Way::Gso => {
                let segment = if way == Way::Gso { self.payload as u16 } else { 0 };
                for socket in sockets {
                    set_udp_segment(socket.as_raw_fd(), segment)?;
                }
            }
            Outlet::Sockets(_) => {}
            Outlet::Link(..) if way == Way::Gso && !self.link_cuts()? => {
                return Err(io::Error::new(
                    io::ErrorKind::Unsupported,
                    "the interface takes large frames whole; ethtool -K … tx off makes the kernel cut them",
                ));
            }
            Outlet::Link(..) => {}
        }
        self.way = way;
        Ok(())
    }

    /// Whether the kernel cuts frames of several packets in front of the interface.
    fn link_cuts(&self) -> io::Result<bool> {
        let Some(link) = &self.config.link else {
            return Ok(false);
        };
        let offloads = ControlSocket::new()?.tx_checksum_offload(&IfName::truncated(&link.interface))?;
        Ok(!offloads)
    }
}

/// Makes the kernel cut superpackets and finish checksums in front of an interface of the calling thread's namespace (`ethtool -K … tx off`),
/// so that what crosses it are frames as on a wire, and a generator may send them in groups.
///
/// # Errors
///
/// ENODEV: no such interface; EPERM: no CAP_NET_ADMIN in that namespace; EOPNOTSUPP: the interface has no such switch.
pub fn cut_frames(interface: &str) -> io::Result<()> {
    ControlSocket::new()?.set_tx_checksum_offload(&IfName::truncated(interface), false)
}

/// Writes the headers of `packets` payloads of `payload` bytes that lie at the end of `memory`. Returns where the frame begins, its vnet header
/// in front.
fn write_front(memory: &mut [u8], spec: &Spec, payload: usize, packets: usize) -> usize {
    let headers = spec.headers_len();
    let at = memory.len() - packets * payload - headers;
    spec.write_headers(&mut memory[at..at + headers], packets * payload);
    let datagram = (headers - UDP_LEN) as u16;
    let cut = packets > 1;
    let vnet = virtio_net_hdr {
        flags: virtio_net_hdr::F_NEEDS_CSUM,
        gso_type: if cut { virtio_net_hdr::GSO_UDP_L4 } else { 0 },
        hdr_len: if cut { headers as u16 } else { 0 },
        gso_size: if cut { payload as u16 } else { 0 },
        csum_start: datagram,
        csum_offset: 6,
    };
    let start = at - virtio_net_hdr::LEN;
    memory[start..at].copy_from_slice(&vnet.to_bytes());
    start
}

/// Finds the greatest rate of a configuration in packets per second, by sending without pause for `time` (300 ms tell enough). Its rate and
/// limit are passed over. That traffic goes to the device: nobody should count meanwhile.
///
/// What comes near the ceiling tells of the generator and not of what it is pointed at: offer no more than some two thirds of it.
///
/// # Errors
///
/// Those of [`Generator::new`] and [`Generator::run`].
pub fn ceiling(config: &Config, time: Duration) -> io::Result<Generated> {
    let config = Config {
        rate: None,
        limit: Limit::Time(time),
        ..config.clone()
    };
    Generator::new(&config)?.run(&AtomicBool::new(false))
}

impl Generated {
    /// Packets per second that were sent. Over the schedule's time if that is longer than it took: the last packet has a gap behind it, too.
    pub fn rate(&self) -> f64 {
        let scheduled = self
            .schedule
            .map_or(0.0, |schedule| (self.sent as f64 / schedule.rate as f64).max(0.0));
        self.sent as f64 / self.wall.as_secs_f64().max(scheduled).max(1e-9)
    }

    /// Whether it sent at the rate that was asked, to one percent, and left nothing out. Always so where no rate was asked.
    ///
    /// Packets that the kernel refused are missing from the rate.
    pub fn kept_rate(&self) -> bool {
        self.schedule
            .is_none_or(|schedule| self.rate() >= 0.99 * schedule.rate as f64 && self.unsent() == 0)
    }

    /// Packets that were due and were not tried: it was too late for them.
    pub fn unsent(&self) -> u64 {
        self.due - self.sent - self.refused.values().sum::<u64>()
    }

    /// CPU time of the sending thread per packet sent, in ns.
    pub fn cpu_ns_per_packet(&self) -> f64 {
        self.cpu.as_nanos() as f64 / self.sent.max(1) as f64
    }

    /// Tells a tracker how many packets of each flow were sent.
    pub fn tell(&self, tracker: &mut Tracker) {
        for (flow, &count) in self.flows.iter().enumerate() {
            tracker.sent(flow as u16, count);
        }
    }

    /// When the packet with this flow and sequence was due, by [`monotonic_ns`]. Right where nothing was refused; `None` without a rate.
    pub fn due_of(&self, flow: u16, sequence: u32) -> Option<u64> {
        let (group, flows) = (self.group as u64, self.flows.len() as u64);
        let (round, within) = (u64::from(sequence) / group, u64::from(sequence) % group);
        Some(self.schedule?.due((round * flows + u64::from(flow)) * group + within))
    }
}

/// One line.
impl fmt::Display for Generated {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} sent in {:.3} s, {:.0}/s",
            self.sent,
            self.wall.as_secs_f64(),
            self.rate()
        )?;
        if let Some(schedule) = self.schedule {
            let kept = if self.kept_rate() { "" } else { ", which was not kept" };
            let late = |share| self.lateness.value_at_quantile(share) as f64 / 1e3;
            write!(
                f,
                " of {}/s{kept}, {} unsent, late by {:.1} µs (p99) to {:.1} µs",
                schedule.rate,
                self.unsent(),
                late(0.99),
                self.lateness.max() as f64 / 1e3
            )?;
        }
        write!(
            f,
            ", {:?} in groups of {}, {:.0} ns CPU per packet",
            self.way,
            self.group,
            self.cpu_ns_per_packet()
        )?;
        if !self.refused.is_empty() {
            write!(f, ", refused by errno {:?}", self.refused)?;
        }
        if self.answers > 0 {
            write!(f, ", {} refused by the target", self.answers)?;
        }
        Ok(())
    }
}

impl fmt::Debug for Generator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Generator")
            .field("config", &self.config)
            .field("way", &self.way)
            .field("group", &self.group)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::super::packet::MIN_IPV4;
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn packets_are_due_by_number_alone(start_ns in 0u64..1 << 60, rate in 1u64..50_000_000, number in 0u64..1 << 40) {
            let schedule = Schedule { start_ns, rate };
            let exact = u128::from(start_ns) + u128::from(number) * 1_000_000_000 / u128::from(rate);
            if let Ok(exact) = u64::try_from(exact) {
                prop_assert_eq!(schedule.due(number), exact);
            }
        }

        #[test]
        fn as_many_are_due_within_a_time_as_have_their_time_in_it(rate in 1u64..5_000_000, ns in 0u64..1 << 32) {
            let schedule = Schedule { start_ns: 0, rate };
            let count = schedule.within(Duration::from_nanos(ns));
            prop_assert!(count == 0 || schedule.due(count - 1) <= ns);
            prop_assert!(schedule.due(count) >= ns);
        }
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        let config = Config::new("127.0.0.1:9".parse().unwrap());
        let wrongs = [
            Config {
                flows: 0,
                ..config.clone()
            },
            Config {
                length: MIN_IPV4 - 1,
                ..config.clone()
            },
            Config {
                length: 65_536,
                ..config.clone()
            },
            Config {
                rate: Some(0),
                ..config.clone()
            },
            Config {
                source: Some("[::1]:0".parse().unwrap()),
                ..config.clone()
            },
            Config {
                source: Some("127.0.0.1:65535".parse().unwrap()),
                flows: 2,
                ..config.clone()
            },
        ];
        for wrong in wrongs {
            assert_eq!(
                Generator::new(&wrong).unwrap_err().kind(),
                io::ErrorKind::InvalidInput,
                "{wrong:?}"
            );
        }
        Generator::new(&config).unwrap();
    }
}
