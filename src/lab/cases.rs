//! What is measured, apart from who does it.
//!
//! A [`Way`] is one way of driving TUN devices (a loop over read(2), a hand-written ring, a worker of this library). The cases here put load
//! on its devices, time only what the way itself does, check that every packet is accounted for, and compare the ways by
//! [`measure`]. They need a [`Sandbox`], in which they make devices with names and addresses of their own.
//!
//! | case | timed | not timed |
//! |---|---|---|
//! | [`drain`] | emptying a queue that was filled before | filling it |
//! | [`sink`] | writing packets that a program drops right behind the driver | putting them into the way's buffers |
//! | [`forward`] | writing to one device, reading from another what the kernel forwarded | putting them into the way's buffers |
//! | [`round_trip`] | each trip of one packet from a socket through the way and back | |

use std::io;
use std::net::{Ipv4Addr, SocketAddrV4, UdpSocket};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;

use super::measure::{self, Clock, Elapsed, Plan, Report, Sample, Turn};
use super::{Sandbox, Sink, sysctl};
use crate::netlink;
use crate::sys::cpu;

/// One way of driving TUN devices.
pub trait Way: Sync {
    /// Its name in reports.
    fn name(&self) -> &str;

    /// Creates the TUN devices of these names (one queue each, no packet info) on the calling thread, without setting them up.
    ///
    /// The case brings them up afterwards and uses what is returned on this thread only.
    fn open(&self, devices: &[&str]) -> io::Result<Box<dyn Runner>>;
}

/// A way at work. `device` is the index in the list given to [`Way::open`].
pub trait Runner {
    /// Receives packets without waiting, until there are `expected` or the queue is empty.
    fn drain(&mut self, device: usize, expected: usize) -> io::Result<Drained>;

    /// Puts `count` copies of `packet` into this way's buffers, to be sent by the next [`send`](Self::send). Not timed.
    fn fill(&mut self, device: usize, packet: &[u8], count: usize) -> io::Result<()>;

    /// Sends what was filled and returns how many packets the kernel took.
    fn send(&mut self, device: usize) -> io::Result<usize>;

    /// Receives on the first device, waiting as this way waits, and sends back what [`turn_around`] wants back, until it says stop.
    fn echo(&mut self) -> io::Result<()>;

    /// Receives on the first device, waiting as this way waits, and gives each packet with the time of its batch to `each`, until `over` is
    /// set. It may be looked at only when packets come.
    fn serve(&mut self, each: &mut dyn FnMut(&[u8], u64), over: &AtomicBool) -> io::Result<()> {
        let _ = (each, over);
        Err(io::Error::new(
            io::ErrorKind::Unsupported,
            "this way does not wait for middling load",
        ))
    }

    /// Entries into the kernel so far (system calls on the data path). 0 where nobody counts.
    fn calls(&self) -> u64 {
        0
    }
}

/// What [`Runner::drain`] received.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Drained {
    /// Packets.
    pub packets: usize,
    /// Their lengths, added up.
    pub bytes: usize,
}

/// How much load makes one sample.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Load {
    /// Length of each IP packet in bytes, at least 36.
    pub packet_len: usize,
    /// Packets per stretch that is timed at once.
    pub packets: usize,
    /// Stretches per sample.
    pub stretches: usize,
}

impl Load {
    /// As [`drain`] and [`sink`] are meant: 256 packets, half a default transmit queue, a hundred times.
    pub fn of(packet_len: usize) -> Self {
        Self {
            packet_len,
            packets: 256,
            stretches: 100,
        }
    }

    /// As [`forward`] is meant: 64 packets, four hundred times.
    pub fn forwarding(packet_len: usize) -> Self {
        Self {
            packet_len,
            packets: 64,
            stretches: 400,
        }
    }
}

/// Called before each sample. An error ends the case; see [`Stopped`](measure::Stopped).
pub type Progress<'a> = &'a mut (dyn FnMut(Turn) -> io::Result<()> + Send);

/// Receive: the queue is filled through a socket, then the way empties it. One thread, pinned; only the emptying is timed.
///
/// # Errors
/// What the way or the kernel says, and InvalidData where a way did not deliver exactly what was sent.
pub fn drain(_: &Sandbox, ways: &[&dyn Way], load: Load, plan: &Plan, progress: Progress<'_>) -> io::Result<Report> {
    on_measuring_thread(|| {
        let mut stages: Vec<(Stage, UdpSocket)> = Vec::new();
        for way in ways {
            let stage = Stage::open(*way, 1)?;
            let socket = stage.nets[0].client(DISCARD)?;
            stages.push((stage, socket));
        }
        let payload = vec![0; payload_len(load)?];
        measure::compare(plan, &names(ways), |turn| {
            progress(turn)?;
            let (stage, socket) = &mut stages[turn.way];
            let mut sample = Sample::default();
            let calls = stage.runner.calls();
            for _ in 0..load.stretches {
                for _ in 0..load.packets {
                    socket.send(&payload)?;
                }
                let clock = Clock::start();
                let drained = stage.runner.drain(0, load.packets)?;
                sample.add(clock.elapsed(), load.packets as u64);
                expect(
                    Drained {
                        packets: load.packets,
                        bytes: load.packets * load.packet_len,
                    },
                    drained,
                )?;
            }
            count_calls(&mut sample, stage.runner.calls() - calls);
            Ok(sample)
        })
    })
}

/// Send: the way writes packets to a device behind which a [`Sink`] drops them. One thread, pinned; only the writing is timed.
///
/// Returns also which sink it was, since figures with different sinks do not compare.
///
/// # Errors
/// What the way or the kernel says, and InvalidData where packets were refused or did not arrive at the device.
pub fn sink(
    _: &Sandbox,
    ways: &[&dyn Way],
    load: Load,
    plan: &Plan,
    progress: Progress<'_>,
) -> io::Result<(Report, &'static str)> {
    on_measuring_thread(|| {
        let mut stages: Vec<(Stage, Sink)> = Vec::new();
        for way in ways {
            let stage = Stage::open(*way, 1)?;
            let sink = Sink::behind(stage.index()?)?;
            stages.push((stage, sink));
        }
        let kind = stages.first().map_or("", |(_, sink)| sink.kind());
        let report = measure::compare(plan, &names(ways), |turn| {
            progress(turn)?;
            let (stage, _) = &mut stages[turn.way];
            let packet = udp_packet(
                stage.nets[0].peer(DISCARD),
                stage.nets[0].beyond(DISCARD),
                payload_len(load)?,
            );
            let before = stage.accepted()?;
            let mut sample = Sample::default();
            let calls = stage.runner.calls();
            for _ in 0..load.stretches {
                stage.runner.fill(0, &packet, load.packets)?;
                let clock = Clock::start();
                let accepted = stage.runner.send(0)?;
                sample.add(clock.elapsed(), load.packets as u64);
                expect(load.packets, accepted)?;
            }
            count_calls(&mut sample, stage.runner.calls() - calls);
            expect((load.packets * load.stretches) as u64, stage.accepted()? - before)?;
            Ok(sample)
        })?;
        Ok((report, kind))
    })
}

/// Forward: the way writes packets to one device, the kernel forwards them to a second one, the way reads them there. One thread, pinned;
/// writing and reading are timed.
///
/// # Errors
/// What the way or the kernel says, and InvalidData where a packet did not come through.
pub fn forward(_: &Sandbox, ways: &[&dyn Way], load: Load, plan: &Plan, progress: Progress<'_>) -> io::Result<Report> {
    on_measuring_thread(|| {
        sysctl("net/ipv4/ip_forward", 1)?;
        let mut stages = ways
            .iter()
            .map(|way| Stage::open(*way, 2))
            .collect::<io::Result<Vec<Stage>>>()?;
        measure::compare(plan, &names(ways), |turn| {
            progress(turn)?;
            let stage = &mut stages[turn.way];
            let packet = udp_packet(
                stage.nets[0].peer(DISCARD),
                stage.nets[1].peer(DISCARD),
                payload_len(load)?,
            );
            let mut sample = Sample::default();
            let calls = stage.runner.calls();
            for _ in 0..load.stretches {
                stage.runner.fill(0, &packet, load.packets)?;
                let clock = Clock::start();
                let accepted = stage.runner.send(0)?;
                let drained = stage.runner.drain(1, load.packets)?;
                sample.add(clock.elapsed(), load.packets as u64);
                expect(load.packets, accepted)?;
                expect(
                    Drained {
                        packets: load.packets,
                        bytes: load.packets * load.packet_len,
                    },
                    drained,
                )?;
            }
            count_calls(&mut sample, stage.runner.calls() - calls);
            Ok(sample)
        })
    })
}

/// How long trips took.
#[derive(Clone, Debug)]
pub struct Trips {
    /// Per round: quantiles in microseconds, and the echoing thread's CPU time as the usual figures.
    pub report: Report,
    /// Per way: all trips of the rounds that count, in nanoseconds, to three digits.
    pub histograms: Vec<Histogram<u64>>,
}

/// Round trip of one small UDP packet, one at a time: a client with a socket on one CPU, the way's echo on another.
///
/// Each sample starts the way afresh, makes 200 trips to warm up and `trips` that count.
///
/// # Errors
/// What the way or the kernel says; TimedOut where an answer did not come within a second.
pub fn round_trip(
    _: &Sandbox,
    ways: &[&dyn Way],
    trips: usize,
    plan: &Plan,
    progress: Progress<'_>,
) -> io::Result<Trips> {
    let mut histograms = (0..ways.len()).map(|_| histogram()).collect::<io::Result<Vec<_>>>()?;
    let report = measure::compare(plan, &names(ways), |turn| {
        progress(turn)?;
        let own = histogram()?;
        let (sample, own) = one_echo(ways[turn.way], trips, own)?;
        if turn.round >= plan.warm_up {
            histograms[turn.way].add(&own).map_err(io::Error::other)?;
        }
        Ok(sample)
    })?;
    Ok(Trips { report, histograms })
}

/// What an echo does with a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reply {
    /// Send it back; addresses and ports are exchanged already.
    Send,
    /// Not a packet of the test: forget it.
    Ignore,
    /// The test is over.
    Stop,
}

/// Exchanges addresses and ports of an IPv4 UDP packet in place, and says what to do with it. The checksums stay right, as sums do not care
/// about order.
#[inline]
pub fn turn_around(packet: &mut [u8]) -> Reply {
    if packet.len() < 36 || packet[0] != 0x45 || packet[9] != UDP || packet[22..24] != ECHO.to_be_bytes() {
        return Reply::Ignore;
    }
    if packet[28..36] == STOP.to_be_bytes() {
        return Reply::Stop;
    }
    let (source, destination) = packet[12..20].split_at_mut(4);
    source.swap_with_slice(destination);
    let (source, destination) = packet[20..24].split_at_mut(2);
    source.swap_with_slice(destination);
    Reply::Send
}

/// IPv4 without options, and UDP.
const HEADERS: usize = 20 + 8;
const UDP: u8 = 17;
const ECHO: u16 = 7;
pub(super) const DISCARD: u16 = 9;
const STOP: u64 = u64::MAX;
const WARM_UP_TRIPS: usize = 200;

/// A way with its devices, set up and addressed.
pub(super) struct Stage {
    pub(super) runner: Box<dyn Runner>,
    pub(super) nets: Vec<Net>,
    netlink: netlink::Handle,
}

impl Stage {
    pub(super) fn open(way: &dyn Way, devices: usize) -> io::Result<Self> {
        let nets: Vec<Net> = (0..devices).map(|_| Net::next()).collect();
        let device_names: Vec<&str> = nets.iter().map(|net| net.name.as_str()).collect();
        let runner = way.open(&device_names).map_err(|error| told(way, &error))?;
        let netlink = netlink::Handle::new()?;
        for net in &nets {
            let index = netlink.index_of(&net.name)?;
            netlink.add_address(index, net.address(1).into(), 24)?;
            netlink.set_up(index, true)?;
        }
        Ok(Self { runner, nets, netlink })
    }

    /// Packets that the first device has taken from the way so far, as the kernel counts.
    fn accepted(&self) -> io::Result<u64> {
        Ok(self.netlink.stats(self.index()?)?.rx_packets)
    }

    /// The first device's number.
    fn index(&self) -> io::Result<u32> {
        self.netlink.index_of(&self.nets[0].name)
    }
}

/// A device's name and its subnet, both used once per process: a device may outlive its last user for a moment.
pub(super) struct Net {
    pub(super) name: String,
    number: u16,
}

impl Net {
    pub(super) fn next() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed) as u16;
        Self {
            name: format!("case{number}"),
            number,
        }
    }

    pub(super) fn address(&self, host: u8) -> Ipv4Addr {
        let [high, low] = self.number.to_be_bytes();
        Ipv4Addr::new(10, high, low, host)
    }

    /// An address behind the device.
    pub(super) fn peer(&self, port: u16) -> SocketAddrV4 {
        SocketAddrV4::new(self.address(2), port)
    }

    /// Another one.
    fn beyond(&self, port: u16) -> SocketAddrV4 {
        SocketAddrV4::new(self.address(3), port)
    }

    /// A socket on this side that talks to the peer.
    fn client(&self, port: u16) -> io::Result<UdpSocket> {
        let socket = UdpSocket::bind((self.address(1), 0))?;
        socket.connect(self.peer(port))?;
        socket.set_read_timeout(Some(Duration::from_secs(1)))?;
        Ok(socket)
    }
}

/// One sample of [`round_trip`].
fn one_echo(way: &dyn Way, trips: usize, mut histogram: Histogram<u64>) -> io::Result<(Sample, Histogram<u64>)> {
    let cpus = cpu::allowed()?;
    thread::scope(|scope| {
        let (ready, opened) = mpsc::channel();
        let echo_cpu = cpus[cpus.len() - 1];
        let echo =
            thread::Builder::new()
                .name("echo".to_owned())
                .spawn_scoped(scope, move || -> io::Result<Elapsed> {
                    cpu::pin_thread(echo_cpu)?;
                    let mut stage = Stage::open(way, 1)?;
                    let client = stage.nets[0].client(ECHO)?;
                    let _ = ready.send(client); // the receiver is gone only if the client's thread could not start
                    let clock = Clock::start();
                    stage.runner.echo().map_err(|error| told(way, &error))?;
                    Ok(clock.elapsed())
                })?;
        let client =
            thread::Builder::new()
                .name("client".to_owned())
                .spawn_scoped(scope, move || -> io::Result<_> {
                    cpu::pin_thread(cpus[0])?;
                    let Ok(socket) = opened.recv() else {
                        return Ok(histogram);
                    }; // the echo tells why it did not open
                    let result = (0..WARM_UP_TRIPS + trips).try_for_each(|trip| {
                        let took = one_trip(&socket, trip as u64)?;
                        if trip >= WARM_UP_TRIPS {
                            histogram.saturating_record(took.as_nanos() as u64);
                        }
                        Ok(())
                    });
                    socket.send(&STOP.to_be_bytes())?;
                    result.map(|()| histogram)
                })?;
        let client = client.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        let elapsed = echo.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
        let histogram = client?;

        let mut sample = Sample::default();
        sample.add(elapsed, (WARM_UP_TRIPS + trips) as u64);
        let micros = |share: f64| histogram.value_at_quantile(share) as f64 / 1e3;
        sample.figures = vec![
            ("p50_us", micros(0.5)),
            ("p99_us", micros(0.99)),
            ("p99_9_us", micros(0.999)),
        ];
        Ok((sample, histogram))
    })
}

fn one_trip(socket: &UdpSocket, trip: u64) -> io::Result<Duration> {
    let mut answer = [0; 16];
    let start = Instant::now();
    socket.send(&trip.to_be_bytes())?;
    let len = loop {
        match socket.recv(&mut answer) {
            // The process was stopped meanwhile: a call with a time-out is not resumed (signal(7)).
            Err(error) if error.kind() == io::ErrorKind::Interrupted => (),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                return Err(io::Error::new(
                    io::ErrorKind::TimedOut,
                    format!("no answer to trip {trip}"),
                ));
            }
            outcome => break outcome?,
        }
    };
    let took = start.elapsed();
    expect(&trip.to_be_bytes()[..], &answer[..len])?;
    Ok(took)
}

/// Up to ten seconds, to three digits.
fn histogram() -> io::Result<Histogram<u64>> {
    Histogram::new_with_bounds(1, 10_000_000_000, 3).map_err(io::Error::other)
}

/// Runs `work` on a thread pinned to the last CPU that this process may use: the first one tends to have the interrupts.
pub(super) fn on_measuring_thread<T: Send>(work: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
    thread::scope(|scope| {
        let thread = thread::Builder::new()
            .name("measure".to_owned())
            .spawn_scoped(scope, || {
                let cpus = cpu::allowed()?;
                cpu::pin_thread(cpus[cpus.len() - 1])?;
                work()
            })?;
        thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

pub(super) fn names<'a>(ways: &[&'a dyn Way]) -> Vec<&'a str> {
    ways.iter().map(|way| way.name()).collect()
}

fn count_calls(sample: &mut Sample, calls: u64) {
    if calls > 0 {
        sample
            .figures
            .push(("packets_per_call", sample.packets as f64 / calls as f64));
    }
}

/// An IPv4 UDP packet with `payload_len` zero bytes, without UDP checksum.
fn udp_packet(from: SocketAddrV4, to: SocketAddrV4, payload_len: usize) -> Vec<u8> {
    let mut packet = vec![0; HEADERS + payload_len];
    let (all, udp) = (packet.len() as u16, (packet.len() - 20) as u16);
    packet[0] = 0x45; // version 4, header of 5 words
    packet[2..4].copy_from_slice(&all.to_be_bytes());
    packet[8] = 64; // hops
    packet[9] = UDP;
    packet[12..16].copy_from_slice(&from.ip().octets());
    packet[16..20].copy_from_slice(&to.ip().octets());
    let words = packet[..20]
        .chunks_exact(2)
        .map(|word| u32::from(u16::from_be_bytes([word[0], word[1]])));
    let sum: u32 = words.sum();
    let folded = (sum & 0xffff) + (sum >> 16); // ten words carry at most 9, so that one more carry is enough
    let checksum = !((folded & 0xffff) + (folded >> 16)) as u16;
    packet[10..12].copy_from_slice(&checksum.to_be_bytes());
    packet[20..22].copy_from_slice(&from.port().to_be_bytes());
    packet[22..24].copy_from_slice(&to.port().to_be_bytes());
    packet[24..26].copy_from_slice(&udp.to_be_bytes());
    packet
}

fn payload_len(load: Load) -> io::Result<usize> {
    if (HEADERS + 8..=1500).contains(&load.packet_len) {
        Ok(load.packet_len - HEADERS)
    } else {
        let told = format!("packets of {} bytes: 36 to 1500 can be made", load.packet_len);
        Err(io::Error::new(io::ErrorKind::InvalidInput, told))
    }
}

pub(super) fn expect<T: PartialEq + std::fmt::Debug>(expected: T, found: T) -> io::Result<()> {
    if expected == found {
        Ok(())
    } else {
        Err(io::Error::new(
            io::ErrorKind::InvalidData,
            format!("expected {expected:?}, found {found:?}"),
        ))
    }
}

pub(super) fn told(way: &dyn Way, error: &io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("{}: {error}", way.name()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn echo_request(payload: u64) -> Vec<u8> {
        let mut packet = udp_packet("10.0.0.1:1234".parse().unwrap(), "10.0.0.2:7".parse().unwrap(), 8);
        packet[28..].copy_from_slice(&payload.to_be_bytes());
        packet
    }

    #[test]
    fn an_echo_exchanges_both_ends() {
        let mut packet = echo_request(5);
        assert_eq!(turn_around(&mut packet), Reply::Send);
        assert_eq!(packet[12..20], [10, 0, 0, 2, 10, 0, 0, 1]);
        assert_eq!(
            packet[20..24],
            [0, 7, 1234_u16.to_be_bytes()[0], 1234_u16.to_be_bytes()[1]]
        );
    }

    #[test]
    fn an_echo_stops_when_told_and_ignores_what_is_not_its_own() {
        assert_eq!(turn_around(&mut echo_request(STOP)), Reply::Stop);
        let mut other_port = echo_request(5);
        other_port[23] = 9;
        let before = other_port.clone();
        assert_eq!(turn_around(&mut other_port), Reply::Ignore);
        assert_eq!(other_port, before, "what is ignored is not touched");
        let mut tcp = echo_request(5);
        tcp[9] = 6;
        assert_eq!(turn_around(&mut tcp), Reply::Ignore);
        assert_eq!(
            turn_around(&mut echo_request(5)[..35]),
            Reply::Ignore,
            "too short to tell"
        );
        assert_eq!(turn_around(&mut []), Reply::Ignore);
    }

    #[test]
    fn loads_that_make_no_packet_are_refused() {
        assert_eq!(payload_len(Load::of(64)).ok(), Some(36));
        assert_eq!(
            payload_len(Load::of(35)).map_err(|error| error.kind()),
            Err(io::ErrorKind::InvalidInput)
        );
        assert_eq!(
            payload_len(Load::of(1501)).map_err(|error| error.kind()),
            Err(io::ErrorKind::InvalidInput)
        );
    }

    #[test]
    fn packets_are_what_the_kernel_takes() {
        let packet = udp_packet("10.1.2.3:1000".parse().unwrap(), "10.4.5.6:2000".parse().unwrap(), 36);
        let (ip, rest) = etherparse::Ipv4Header::from_slice(&packet).expect("an IPv4 header");
        assert_eq!(
            (ip.source, ip.destination, usize::from(ip.total_len)),
            ([10, 1, 2, 3], [10, 4, 5, 6], 64)
        );
        assert_eq!(ip.header_checksum, ip.calc_header_checksum());
        let (udp, payload) = etherparse::UdpHeader::from_slice(rest).expect("a UDP header");
        assert_eq!(
            (udp.source_port, udp.destination_port, udp.length, udp.checksum),
            (1000, 2000, 44, 0)
        );
        assert_eq!(payload, [0; 36]);
    }
}
