//! What offloads are worth: superpackets through the kernel beside plain packets, and what the driver's header costs where there are none.
//!
//! | case | timed | not timed |
//! |---|---|---|
//! | [`superpackets`] | writing to one device, reading from another what the kernel forwarded | putting it into the way's buffers |
//! | [`small_drain`] | emptying a queue of small packets, with offloads and without | filling it |
//!
//! Every packet is accounted for, by number and bytes: superpackets have to come out as they went in, or as all of their segments where the way
//! gets it so.

use std::fs::File;
use std::io::{self, Read, Write};
use std::net::SocketAddrV4;
use std::os::fd::AsFd;

use super::Sandbox;
use super::cases::{self, DISCARD, Drained, Load, Progress, Runner, Stage, Way, expect, names, on_measuring_thread};
use super::measure::{self, Clock, Plan, Report, Sample, Spread};
use super::sysctl;
use super::ways::ByWorker;
use crate::offload::checksum::{Sum, pseudo_header, sum};
use crate::offload::{Gso, GsoType, Headers, Link, VnetHdr};
use crate::sys::tun;
use crate::{Backend, Builder, Mode, Offloads, Wait};

/// Payload per second.
pub const GBIT: &str = "gbit_per_s";

/// CPU time of the measuring thread per 1,024 bytes of payload.
pub const CPU_KIB: &str = "cpu_ns_per_kib";

/// What superpackets are made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Traffic {
    /// TCP over IPv4: 65,000 bytes of payload, 1,448 per segment.
    Tcp,
    /// UDP over IPv4: 54 datagrams of 1,200 bytes.
    Udp,
}

impl Traffic {
    /// Bytes of payload of a superpacket.
    fn payload(self) -> usize {
        match self {
            Self::Tcp => 65_000,
            Self::Udp => 54 * 1_200,
        }
    }

    /// Bytes of payload per segment.
    fn segment(self) -> usize {
        match self {
            Self::Tcp => 1_448,
            Self::Udp => 1_200,
        }
    }

    /// Bytes of payload of what goes without offload: of TCP, packets of 1,400 bytes.
    fn plain(self) -> usize {
        match self {
            Self::Tcp => 1_400 - self.headers(),
            Self::Udp => 1_200,
        }
    }

    fn headers(self) -> usize {
        20 + match self {
            Self::Tcp => 20,
            Self::Udp => 8,
        }
    }
}

/// What a way is given, and what it gets on the other side.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Course {
    /// Plain packets, and the same.
    Plain,
    /// Superpackets with the driver's header, and the same.
    Whole,
    /// Superpackets, and their segments.
    Cut,
}

/// One way of moving superpackets, or what it is compared with.
pub struct Mover {
    way: Box<dyn Way>,
    course: Course,
}

/// The ways that are compared: a loop over read and write with plain packets, the same with superpackets in one buffer and in several, and a worker on each of `backends`. Of UDP,
/// also a worker on each whose devices have no USO: what it is offered as superpackets it cuts.
pub fn movers(traffic: Traffic, backends: &[Backend]) -> Vec<Mover> {
    let mut movers = Vec::new();
    let mut take = |way: Box<dyn Way>, course| movers.push(Mover { way, course });
    take(
        Box::new(ReadWrite {
            name: format!("read/write, {} B", traffic.plain() + traffic.headers()),
            offloads: Offloads::none(),
            buffers: 1,
        }),
        Course::Plain,
    );
    for (name, buffers) in [(MINIMAL, 1), (EACH, Load64K::default().superpackets)] {
        take(
            Box::new(ReadWrite {
                name: name.to_owned(),
                offloads: Offloads::all(),
                buffers,
            }),
            Course::Whole,
        );
    }
    for &backend in backends {
        let way = ByWorker::new(backend, Wait::Block).with_offloads(Offloads::all());
        take(Box::new(way), Course::Whole);
    }
    for &backend in backends.iter().filter(|_| traffic == Traffic::Udp) {
        let way = ByWorker::new(backend, Wait::Block).with_offloads(Offloads::all() - Offloads::USO);
        take(Box::new(way.renamed(&without_uso(backend))), Course::Cut);
    }
    movers
}

/// Name of the loop over read and write with superpackets.
pub const MINIMAL: &str = "read/write, superpackets";

/// Name of the same loop with as many buffers as packets at a time, as whoever holds packets has it: the worker's buffers are no warmer.
pub const EACH: &str = "read/write, superpackets, a buffer each";

/// Name of the worker whose devices have no USO.
pub fn without_uso(backend: Backend) -> String {
    format!("{}, without USO", ByWorker::new(backend, Wait::Block).name())
}

/// How much makes one sample.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Load64K {
    /// Superpackets per stretch that is timed at once. All of their segments have to fit into a device's queue.
    pub superpackets: usize,
    /// Plain packets per stretch of the ways that get those.
    pub plain: usize,
    /// Stretches per sample.
    pub stretches: usize,
}

impl Default for Load64K {
    fn default() -> Self {
        Self {
            superpackets: 8,
            plain: 64,
            stretches: 100,
        }
    }
}

/// Forward: the way writes superpackets to one device, the kernel forwards them to a second one, the way reads them there. One thread, pinned;
/// writing and reading are timed. Packets in the figures are segments.
///
/// # Errors
/// What the way or the kernel says, and InvalidData where something did not come through as it should. Unsupported where the kernel does not grant the
/// offload.
pub fn superpackets(
    _: &Sandbox,
    traffic: Traffic,
    movers: &[Mover],
    load: Load64K,
    plan: &Plan,
    progress: Progress<'_>,
) -> io::Result<Report> {
    on_measuring_thread(|| {
        sysctl("net/ipv4/ip_forward", 1)?;
        let ways: Vec<&dyn Way> = movers.iter().map(|mover| &*mover.way).collect();
        let mut stages = ways
            .iter()
            .map(|way| Stage::open(*way, 2))
            .collect::<io::Result<Vec<Stage>>>()?;
        measure::compare(plan, &names(&ways), |turn| {
            progress(turn)?;
            let stage = &mut stages[turn.way];
            let (from, to) = (stage.nets[0].peer(DISCARD), stage.nets[1].peer(DISCARD));
            let round = Round::new(traffic, movers[turn.way].course, load, from, to)?;
            round
                .run(&mut *stage.runner, load.stretches)
                .map_err(|error| cases::told(ways[turn.way], &error))
        })
    })
}

/// What goes in and what has to come out, of each stretch.
struct Round {
    packet: Vec<u8>,
    count: usize,
    expected: Drained,
    payload: usize,
    segments: usize,
}

impl Round {
    fn new(traffic: Traffic, course: Course, load: Load64K, from: SocketAddrV4, to: SocketAddrV4) -> io::Result<Self> {
        let (count, payload, segments) = match course {
            Course::Plain => (load.plain, traffic.plain(), 1),
            Course::Whole | Course::Cut => {
                let payload = traffic.payload();
                (load.superpackets, payload, payload.div_ceil(traffic.segment()))
            }
        };
        let packet = match course {
            Course::Plain => packet(traffic, from, to, payload, true),
            Course::Whole | Course::Cut => superpacket(traffic, from, to)?,
        };
        let (packets, headers) = match course {
            Course::Plain | Course::Whole => (count, count * traffic.headers()),
            Course::Cut => (count * segments, count * segments * traffic.headers()),
        };
        Ok(Self {
            packet,
            count,
            expected: Drained {
                packets,
                bytes: count * payload + headers,
            },
            payload: count * payload,
            segments: count * segments,
        })
    }

    fn run(&self, runner: &mut dyn Runner, stretches: usize) -> io::Result<Sample> {
        let mut sample = Sample::default();
        for _ in 0..stretches {
            runner.fill(0, &self.packet, self.count)?;
            let clock = Clock::start();
            let accepted = runner.send(0)?;
            let drained = runner.drain(1, self.expected.packets)?;
            sample.add(clock.elapsed(), self.segments as u64);
            expect(self.count, accepted)?;
            expect(self.expected, drained)?;
        }
        let bytes = (self.payload * stretches) as f64;
        sample.figures = vec![
            (GBIT, bytes * 8e-9 / sample.wall.as_secs_f64()),
            (CPU_KIB, sample.cpu.as_nanos() as f64 / (bytes / 1024.0)),
        ];
        Ok(sample)
    }
}

/// The ways of [`small_drain`]: each backend without offloads, then with all.
pub fn small_drain_ways(backends: &[Backend]) -> Vec<ByWorker> {
    let both = |&backend| {
        let way = ByWorker::new(backend, Wait::Block);
        [way.clone(), way.with_offloads(Offloads::all())]
    };
    backends.iter().flat_map(both).collect()
}

/// Receive: a queue of small packets is emptied by workers with offloads and without.
///
/// # Errors
/// As [`cases::drain`].
pub fn small_drain(
    sandbox: &Sandbox,
    ways: &[ByWorker],
    load: Load,
    plan: &Plan,
    progress: Progress<'_>,
) -> io::Result<Report> {
    let ways: Vec<&dyn Way> = ways.iter().map(|way| way as &dyn Way).collect();
    cases::drain(sandbox, &ways, load, plan, progress)
}

/// One way's figure by that of another, of the same round each.
#[derive(Clone, Debug, PartialEq)]
pub struct Ratio {
    /// Whose figure.
    pub way: String,
    /// By whose.
    pub by: String,
    /// Which one.
    pub figure: &'static str,
    /// Over the rounds.
    pub ratio: Spread,
}

/// Rate and CPU time of each way with superpackets by those that it is held against: the plain loop, the minimal ones, and of UDP its own without USO.
pub fn rate_ratios(report: &Report, backends: &[Backend]) -> Vec<Ratio> {
    let plain = report.ways[report.baseline].name.clone();
    let mut pairs = vec![(MINIMAL.to_owned(), plain.clone())];
    for &backend in backends {
        let way = ByWorker::new(backend, Wait::Block).with_offloads(Offloads::all());
        for by in [plain.clone(), MINIMAL.to_owned(), EACH.to_owned(), without_uso(backend)] {
            pairs.push((way.name().to_owned(), by));
        }
    }
    let mut all = ratios(report, GBIT, pairs.clone());
    all.extend(ratios(report, CPU_KIB, pairs));
    all
}

/// The CPU time of each backend with offloads by that without.
pub fn drain_ratios(report: &Report, backends: &[Backend]) -> Vec<Ratio> {
    let pairs = backends.iter().map(|&backend| {
        let way = ByWorker::new(backend, Wait::Block);
        (
            way.clone().with_offloads(Offloads::all()).name().to_owned(),
            way.name().to_owned(),
        )
    });
    ratios(report, measure::CPU_NS, pairs.collect())
}

fn ratios(report: &Report, figure: &'static str, pairs: Vec<(String, String)>) -> Vec<Ratio> {
    let found = pairs.into_iter().filter_map(|(way, by)| {
        let ratio = report.ratio(figure, &way, &by)?;
        Some(Ratio { way, by, figure, ratio })
    });
    found.collect()
}

impl std::fmt::Display for Ratio {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Spread {
            lower_quartile,
            median,
            upper_quartile,
            ..
        } = self.ratio;
        let Self { way, by, figure, .. } = self;
        write!(
            f,
            "{figure}: {way} ÷ {by}: {median:.3} ({lower_quartile:.3}–{upper_quartile:.3})"
        )
    }
}

#[cfg(feature = "cli")]
impl Ratio {
    /// As JSON.
    pub fn to_json(&self) -> serde_json::Value {
        serde_json::json!({ "way": self.way, "by": self.by, "figure": self.figure, "ratio": self.ratio.to_json() })
    }
}

/// A loop over read(2) and write(2).
struct ReadWrite {
    name: String,
    offloads: Offloads,
    /// To write from, and as many to read into.
    buffers: usize,
}

impl Way for ReadWrite {
    fn name(&self) -> &str {
        &self.name
    }

    fn open(&self, devices: &[&str]) -> io::Result<Box<dyn Runner>> {
        let mut files = Vec::with_capacity(devices.len());
        for name in devices {
            let device = Builder::new(name, Mode::Tun).offloads(self.offloads).open()?;
            granted(device.granted().offloads, self.offloads)?;
            for queue in device.into_queues() {
                let file = File::from(queue.as_fd().try_clone_to_owned()?);
                tun::change_status_flags(file.as_fd(), libc::O_NONBLOCK, 0)?;
                files.push(file);
            }
        }
        Ok(Box::new(ReadWriteRunner {
            files,
            header: if self.offloads.is_empty() { 0 } else { VnetHdr::LEN },
            buffers: vec![vec![0; VnetHdr::LEN + 65_536]; self.buffers],
            filled: vec![Vec::new(); self.buffers],
            count: 0,
        }))
    }
}

struct ReadWriteRunner {
    files: Vec<File>,
    /// Bytes in front of each packet.
    header: usize,
    buffers: Vec<Vec<u8>>,
    /// What is sent, in turns, and how many times in all.
    filled: Vec<Vec<u8>>,
    count: usize,
}

impl Runner for ReadWriteRunner {
    fn drain(&mut self, device: usize, expected: usize) -> io::Result<Drained> {
        let mut drained = Drained::default();
        while drained.packets < expected {
            let place = drained.packets % self.buffers.len();
            match (&self.files[device]).read(&mut self.buffers[place]) {
                Ok(len) => {
                    drained.packets += 1;
                    drained.bytes += len - self.header;
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => return Err(error),
            }
        }
        Ok(drained)
    }

    fn fill(&mut self, _device: usize, packet: &[u8], count: usize) -> io::Result<()> {
        for filled in &mut self.filled {
            filled.clear();
            filled.extend_from_slice(packet);
        }
        self.count = count;
        Ok(())
    }

    fn send(&mut self, device: usize) -> io::Result<usize> {
        let mut accepted = 0;
        for packet in self.filled.iter().cycle().take(self.count) {
            accepted += usize::from((&self.files[device]).write(packet)? == packet.len());
        }
        Ok(accepted)
    }

    fn echo(&mut self) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }
}

/// USO may be missing (before Linux 6.2): who needs it will find everything cut.
pub(super) fn granted(granted: Offloads, wanted: Offloads) -> io::Result<()> {
    if granted.contains(wanted - Offloads::USO) {
        return Ok(());
    }
    let told = format!("the kernel grants the offloads {granted}, and not {wanted}");
    Err(io::Error::new(io::ErrorKind::Unsupported, told))
}

/// A superpacket behind the driver's header.
fn superpacket(traffic: Traffic, from: SocketAddrV4, to: SocketAddrV4) -> io::Result<Vec<u8>> {
    let packet = packet(traffic, from, to, traffic.payload(), false);
    let headers = Headers::parse(&packet, Link::None).map_err(|fault| io::Error::other(fault.to_string()))?;
    let kind = match traffic {
        Traffic::Tcp => GsoType::Tcp4,
        Traffic::Udp => GsoType::Udp,
    };
    let header = VnetHdr::of(&Gso {
        kind,
        size: traffic.segment() as u16,
        ecn: false,
        headers,
    });
    Ok([&header.to_bytes()[..], &packet].concat())
}

/// An IPv4 packet whose checksum is finished, or holds the sum over the pseudo-header.
fn packet(traffic: Traffic, from: SocketAddrV4, to: SocketAddrV4, payload: usize, whole: bool) -> Vec<u8> {
    const IP: usize = 20;
    let front = traffic.headers();
    let mut packet = vec![0; front + payload];
    let (all, inner) = (packet.len() as u16, packet.len() - IP);
    let (source, target) = (from.ip().octets(), to.ip().octets());
    let (protocol, field) = match traffic {
        Traffic::Tcp => (6, IP + 16),
        Traffic::Udp => (17, IP + 6),
    };
    packet[0] = 0x45;
    packet[2..4].copy_from_slice(&all.to_be_bytes());
    packet[6] = 0x40; // not to be fragmented
    packet[8..10].copy_from_slice(&[64, protocol]);
    packet[12..16].copy_from_slice(&source);
    packet[16..20].copy_from_slice(&target);
    let checksum = sum(&packet[..IP]).checksum();
    packet[10..12].copy_from_slice(&checksum);
    packet[IP..IP + 2].copy_from_slice(&from.port().to_be_bytes());
    packet[IP + 2..IP + 4].copy_from_slice(&to.port().to_be_bytes());
    match traffic {
        Traffic::Tcp => {
            packet[IP + 7] = 1; // sequence
            packet[IP + 12..IP + 16].copy_from_slice(&[0x50, 0x10, 0xff, 0xff]); // five words, ACK, window
        }
        Traffic::Udp => packet[IP + 4..IP + 6].copy_from_slice(&(inner as u16).to_be_bytes()),
    }
    for (place, byte) in packet[front..].iter_mut().enumerate() {
        *byte = place as u8;
    }
    let pseudo: Sum = pseudo_header(&source, &target, protocol, inner as u32);
    let checksum = if whole {
        (pseudo + sum(&packet[IP..])).checksum_udp()
    } else {
        pseudo.seed()
    };
    packet[field..field + 2].copy_from_slice(&checksum);
    packet
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::offload::Meta;

    #[test]
    fn superpackets_are_what_their_headers_say() {
        let (from, to) = ("10.0.0.2:9".parse().unwrap(), "10.0.1.2:9".parse().unwrap());
        for (traffic, segments) in [(Traffic::Tcp, 45), (Traffic::Udp, 54)] {
            let bytes = superpacket(traffic, from, to).expect("a packet");
            let (header, packet) = bytes.split_first_chunk().expect("the driver's header");
            let Ok(Meta::Gso(gso)) = VnetHdr::from_bytes(*header).check(packet, Link::None) else {
                panic!("{traffic:?}: no superpacket");
            };
            assert_eq!((packet.len() - gso.headers.payload).div_ceil(gso.size.into()), segments);
        }
    }

    #[test]
    fn plain_packets_are_whole() {
        let (from, to) = ("10.0.0.2:9".parse().unwrap(), "10.0.1.2:9".parse().unwrap());
        for traffic in [Traffic::Tcp, Traffic::Udp] {
            let packet = packet(traffic, from, to, traffic.plain(), true);
            let sliced = etherparse::SlicedPacket::from_ip(&packet).expect("a packet");
            let (Some(etherparse::NetSlice::Ipv4(ip)), Some(transport)) = (sliced.net, sliced.transport) else {
                panic!("IPv4 and a transport");
            };
            let ip = ip.header().to_header();
            assert_eq!(ip.header_checksum, ip.calc_header_checksum());
            match transport {
                etherparse::TransportSlice::Tcp(tcp) => {
                    let sum = tcp.to_header().calc_checksum_ipv4(&ip, tcp.payload()).unwrap();
                    assert_eq!((tcp.checksum(), packet.len()), (sum, 1400));
                }
                etherparse::TransportSlice::Udp(udp) => {
                    let sum = udp.to_header().calc_checksum_ipv4(&ip, udp.payload()).unwrap();
                    assert_eq!((udp.checksum(), udp.payload().len()), (sum, 1200));
                }
                _ => panic!("another transport"),
            }
        }
    }
}
