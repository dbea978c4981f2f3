//! The kernel as oracle: it cuts superpackets, and its GRO merges packets, on the way from one TUN device to another; byte for byte what the library
//! makes of the same ones.
//!
//! Packets are written into device `a` and routed to device `b`, in a namespace of the trial's own. On the way the kernel takes one from TTL or hop
//! limit, which is done to the library's packets too before they are compared.

mod common;
mod device;

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::ffi::CString;
use std::fs;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::time::{Duration, Instant};

use common::{Trial, need_tun, skip, trial};
use device::{ioctl_value, raw_tun, try_read, write};
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use tun_driver::lab::sysctl;
use tun_driver::netlink::Handle;
use tun_driver::offload::checksum::{pseudo_header, sum};
use tun_driver::offload::coalesce::HEADERS_MAX;
use tun_driver::offload::headers::{TCP, UDP};
use tun_driver::offload::{GroTable, GsoType, Headers, Limits, Link, Meta, Plan, Segments, VnetHdr, vnet};

fn main() {
    let mut trials: Vec<Trial> = Vec::new();
    for (v6, tcp) in KINDS {
        let kind = name(v6, tcp);
        trials.extend([
            trial(format!("{kind}: any superpacket is cut the same"), move || {
                cut_any(v6, tcp)
            }),
            trial(
                format!("{kind}: superpackets at the bounds are cut the same"),
                move || cut_bounds(v6, tcp),
            ),
            trial(format!("{kind}: checksums of zero are written the same"), move || {
                cut_zero(v6, tcp)
            }),
            trial(
                format!("{kind}: the kernel cuts merged packets to what they were"),
                move || round_trip(v6, tcp),
            ),
            trial(format!("{kind}: any batch is merged the same"), move || {
                merge_any(v6, tcp)
            }),
            trial(format!("{kind}: each rule of merging is the kernel's"), move || {
                merge_rules(v6, tcp)
            }),
        ]);
    }
    common::run(trials)
}

const KINDS: [(bool, bool); 4] = [(false, true), (true, true), (false, false), (true, false)];

fn name(v6: bool, tcp: bool) -> String {
    format!("{} over IPv{}", if tcp { "TCP" } else { "UDP" }, if v6 { 6 } else { 4 })
}

/// Tries a property as often as the environment wants (`PROPTEST_CASES`), or `default` times: fewer
/// on a slow machine, more in a long run.
///
/// Prints the first case that fails before it looks for a simpler one, which is bounded in count
/// and time.
fn property<S: Strategy>(default: u32, cases: &S, check: impl Fn(S::Value) -> Result<(), String>) {
    let count = std::env::var("PROPTEST_CASES")
        .ok()
        .and_then(|count| count.parse().ok())
        .unwrap_or(common::repeats(default as usize, 50 * default as usize) as u32 / common::slowness());
    let mut runner = TestRunner::new(Config {
        cases: count.max(1),
        failure_persistence: None,
        max_shrink_iters: 100,
        max_shrink_time: 5_000 * common::slowness(),
        ..Config::default()
    });
    let first = Cell::new(true);
    let result = runner.run(cases, |case| {
        // A panic is printed by the panic hook.
        check(case).map_err(|mismatch| {
            if first.replace(false) {
                eprintln!("the first mismatch, not yet simplified: {mismatch}");
            }
            TestCaseError::fail(mismatch)
        })
    });
    if let Err(error) = result {
        // A batch takes thousands of lines.
        let text: String = error.to_string().chars().take(6_000).collect();
        panic!("{text}");
    }
}

/// What the kernel counted of its drops in this namespace, to be printed where packets are missing.
fn drops() -> String {
    let mut all = String::new();
    for file in ["snmp6", "netstat", "dev"] {
        let text = fs::read_to_string(format!("/proc/thread-self/net/{file}")).unwrap_or_default();
        for line in text.lines().filter(|line| file == "dev" || !line.ends_with("\t0")) {
            all += &format!("{}\n", line.split_whitespace().collect::<Vec<_>>().join(" "));
        }
    }
    all.chars().take(3_000).collect()
}

// ----------------------------------------------------------------------------------------------------------------------------- packets

const FIN: u8 = 0x01;
const SYN: u8 = 0x02;
const RST: u8 = 0x04;
const PSH: u8 = 0x08;
const ACK: u8 = 0x10;
const URG: u8 = 0x20;
const ECE: u8 = 0x40;
const CWR: u8 = 0x80;

const DF: u16 = 0x4000;

/// What the headers of a packet say.
#[derive(Clone, Debug)]
struct Recipe {
    v6: bool,
    tcp: bool,
    tos: u8,
    ttl: u8,
    /// DF and its neighbours.
    fragment: u16,
    identification: u16,
    label: u32,
    /// Extension headers of IPv6, by number and length in units of eight bytes.
    extensions: Vec<(u8, usize)>,
    port: u16,
    sequence: u32,
    acknowledgement: u32,
    window: u16,
    urgent: u16,
    flags: u8,
    /// Of TCP; a multiple of four.
    options: Vec<u8>,
}

fn plain(v6: bool, tcp: bool) -> Recipe {
    Recipe {
        v6,
        tcp,
        tos: 0,
        ttl: 64,
        fragment: DF,
        identification: 0xfffd,
        label: 0,
        extensions: Vec::new(),
        port: 40_000,
        sequence: 0xffff_ff00,
        acknowledgement: 7,
        window: 500,
        urgent: 0,
        flags: ACK,
        options: vec![1, 1, 8, 10, 9, 8, 7, 6, 5, 4, 3, 2],
    }
}

impl Recipe {
    /// Bytes of all headers.
    fn len(&self) -> usize {
        let network = if self.v6 { 40 } else { 20 };
        let extensions: usize = self.extensions.iter().map(|(_, units)| 8 * units).sum();
        network + extensions + if self.tcp { 20 + self.options.len() } else { 8 }
    }

    /// A whole packet.
    fn packet(&self, payload: &[u8]) -> Vec<u8> {
        let mut packet = Vec::new();
        let protocol = if self.tcp { TCP } else { UDP };
        let whole = self.len() + payload.len();
        if self.v6 {
            let next = |at: usize| self.extensions.get(at).map_or(protocol, |extension| extension.0);
            packet.extend((0x6000_0000 | u32::from(self.tos) << 20 | self.label).to_be_bytes());
            packet.extend(((whole - 40) as u16).to_be_bytes());
            packet.extend([next(0), self.ttl]);
            packet.extend(SOURCE6.octets());
            packet.extend(TARGET6.octets());
            for (at, (_, units)) in self.extensions.iter().enumerate() {
                // An option of no known kind, which is to be passed over; long padding is refused.
                packet.extend([next(at + 1), (units - 1) as u8, 0x1e, (8 * units - 4) as u8]);
                packet.extend(vec![0; 8 * units - 4]);
            }
        } else {
            packet.extend([0x45, self.tos]);
            packet.extend((whole as u16).to_be_bytes());
            packet.extend(self.identification.to_be_bytes());
            packet.extend(self.fragment.to_be_bytes());
            packet.extend([self.ttl, protocol, 0, 0]);
            packet.extend(SOURCE4.octets());
            packet.extend(TARGET4.octets());
        }
        packet.extend(self.port.to_be_bytes());
        packet.extend([0, 80]);
        if self.tcp {
            packet.extend(self.sequence.to_be_bytes());
            packet.extend(self.acknowledgement.to_be_bytes());
            packet.extend([((5 + self.options.len() / 4) as u8) << 4, self.flags]);
            packet.extend(self.window.to_be_bytes());
            packet.extend([0, 0]);
            packet.extend(self.urgent.to_be_bytes());
            packet.extend(&self.options);
        } else {
            packet.extend(((8 + payload.len()) as u16).to_be_bytes());
            packet.extend([0, 0]);
        }
        packet.extend(payload);
        mend(&mut packet);
        packet
    }

    /// A superpacket, and what the kernel is to be told of it.
    fn superpacket(&self, payload: &[u8], size: u16) -> (VnetHdr, Vec<u8>) {
        let mut packet = self.packet(payload);
        let headers = Headers::parse(&packet, Link::None).unwrap();
        let offset = checksum_offset(&headers);
        let (source, target) = headers.addresses(&packet).unwrap();
        let length = (headers.end - headers.transport) as u32;
        let seed = pseudo_header(source, target, headers.protocol, length).seed();
        packet[headers.transport + offset..][..2].copy_from_slice(&seed);
        let kind = match (self.tcp, self.v6) {
            (true, false) => 1,
            (true, true) => 4,
            (false, _) => 5,
        };
        let ecn = if self.tcp && self.flags & CWR != 0 { 0x80 } else { 0 };
        let mut bytes = [1, kind | ecn, 0, 0, 0, 0, 0, 0, 0, 0];
        let words = [headers.payload as u16, size, headers.transport as u16, offset as u16];
        for (at, word) in words.into_iter().enumerate() {
            bytes[2 + 2 * at..][..2].copy_from_slice(&word.to_ne_bytes());
        }
        (VnetHdr::from_bytes(bytes), packet)
    }
}

fn checksum_offset(headers: &Headers) -> usize {
    if headers.protocol == TCP { 16 } else { 6 }
}

/// Sets the checksums right.
fn mend(packet: &mut [u8]) {
    mend_network(packet);
    let headers = Headers::parse(packet, Link::None).unwrap();
    if headers.fragment || ![TCP, UDP].contains(&headers.protocol) {
        return;
    }
    let field = headers.transport + checksum_offset(&headers);
    packet[field..field + 2].fill(0);
    let (source, target) = headers.addresses(packet).unwrap();
    let segment = &packet[headers.transport..headers.end];
    let sum = pseudo_header(source, target, headers.protocol, segment.len() as u32) + sum(segment);
    let checksum = if headers.protocol == TCP {
        sum.checksum()
    } else {
        sum.checksum_udp()
    };
    packet[field..field + 2].copy_from_slice(&checksum);
}

/// Sets the checksum of an IPv4 header right.
fn mend_network(packet: &mut [u8]) {
    if packet[0] >> 4 == 4 {
        let transport = usize::from(packet[0] & 0xf) * 4;
        packet[10..12].fill(0);
        let checksum = sum(&packet[..transport]).checksum();
        packet[10..12].copy_from_slice(&checksum);
    }
}

/// What becomes of a packet on its way through a router. Padding behind it is cut off.
fn forwarded(packet: &[u8]) -> Vec<u8> {
    let mut packet = packet.to_vec();
    let (at, len) = match packet[0] >> 4 {
        4 => (8, u16::from_be_bytes([packet[2], packet[3]]).into()),
        _ => (7, 40 + usize::from(u16::from_be_bytes([packet[4], packet[5]]))),
    };
    packet[at] -= 1;
    mend_network(&mut packet);
    packet.truncate(len);
    packet
}

/// Bytes that tell one from the other.
fn bytes(len: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 32) as u8
    };
    std::iter::repeat_with(next).take(len).collect()
}

// ----------------------------------------------------------------------------------------------------------------------------- devices

const SOURCE4: Ipv4Addr = Ipv4Addr::new(10, 1, 0, 2);
const TARGET4: Ipv4Addr = Ipv4Addr::new(10, 2, 0, 2);
const SOURCE6: Ipv6Addr = Ipv6Addr::new(0xfd00, 1, 0, 0, 0, 0, 0, 2);
const TARGET6: Ipv6Addr = Ipv6Addr::new(0xfd00, 2, 0, 0, 0, 0, 0, 2);

const TUN_F_CSUM: u64 = 1;
const TUN_F_TSO4: u64 = 2;
const TUN_F_TSO6: u64 = 4;
const TUN_F_TSO_ECN: u64 = 8;
const TUN_F_USO4: u64 = 0x20;
const TUN_F_USO6: u64 = 0x40;

/// What is before a packet on a device with a header of the driver's.
const HEADER: usize = VnetHdr::LEN;

/// Two devices, and a router between them.
struct Route {
    a: OwnedFd,
    b: OwnedFd,
    buffer: Vec<u8>,
    /// Bytes of the driver's header before each packet that comes out.
    skip: usize,
    /// Bytes of TCP below which the kernel is not asked to cut, since it would: see
    /// [`GsoType::size_min`].
    size_min: u16,
    /// The kernel drops superpackets of TCP that have extension headers of IPv6, see
    /// `Gso::may_be_lost`.
    loses_extensions: bool,
}

impl Route {
    fn new(a_flags: i32, b_flags: i32) -> Self {
        need_tun();
        let flags = libc::IFF_TUN | libc::IFF_NO_PI;
        let [a, b] = [("a", a_flags), ("b", b_flags)].map(|(name, more)| {
            let fd = raw_tun(name, flags | more).expect(name);
            // SAFETY: no pointers.
            let set = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_SETFL, libc::O_RDWR | libc::O_NONBLOCK) };
            assert_eq!(set, 0, "O_NONBLOCK");
            fd
        });
        for (name, value) in [
            ("net/ipv4/ip_forward", 1),
            ("net/ipv6/conf/all/forwarding", 1),
            ("net/ipv4/conf/all/rp_filter", 0),
            ("net/ipv4/conf/a/rp_filter", 0),
        ] {
            sysctl(name, value).unwrap();
        }
        let netlink = Handle::new().unwrap();
        for (name, net) in [("a", 1), ("b", 2)] {
            let index = netlink.index_of(name).unwrap();
            netlink.set_mtu(index, 65_535).unwrap();
            netlink.set_txqueuelen(index, 4_096).unwrap();
            netlink.set_up(index, true).unwrap();
            let v4 = IpAddr::from([10, net, 0, 1]);
            let v6 = IpAddr::from([0xfd00, net.into(), 0, 0, 0, 0, 0, 1]);
            netlink.add_address(index, v4, 24).unwrap();
            netlink.add_address(index, v6, 64).unwrap();
        }
        Self {
            a,
            b,
            buffer: vec![0; HEADER + 65_536],
            skip: if b_flags & libc::IFF_VNET_HDR != 0 { HEADER } else { 0 },
            size_min: 1,
            loses_extensions: false,
        }
    }

    /// Superpackets go in at `a`; what comes out of `b` was cut.
    fn cutting(tcp: bool) -> Self {
        let mut route = Self::new(libc::IFF_VNET_HDR, 0);
        if !tcp {
            let (header, packet) = plain(false, false).superpacket(&[0; 20], 10);
            match route.write(Some(header), &packet) {
                Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
                    skip("this kernel takes no UDP superpackets (Linux 6.2)")
                }
                result => result.unwrap(),
            }
            assert_eq!(route.read_all(2).len(), 2);
        } else {
            // A kernel that cuts by less than the library is asked for what the library makes of
            // it.
            let recipe = Recipe {
                options: Vec::new(),
                ..plain(false, true)
            };
            let (header, packet) = recipe.superpacket(&[0; 20], 2);
            route.write(Some(header), &packet).unwrap();
            let pieces = route.read_all(10).len();
            let least = GsoType::Tcp4.size_min();
            route.size_min = match pieces {
                3 => 1,
                10 => least,
                other => panic!("20 bytes of TCP by 2 came in {other} pieces"),
            };
            // Its byte 12 is a zero, which is no length of a TCP header.
            let recipe = Recipe {
                extensions: vec![(60, 2)],
                ..plain(true, true)
            };
            let (header, packet) = recipe.superpacket(&[0; 200], 100);
            route.write(Some(header), &packet).unwrap();
            route.loses_extensions = match route.read_all(2).len() {
                0 => true,
                2 => false,
                other => panic!("200 bytes of TCP by 100 came in {other} pieces"),
            };
        }
        route
    }

    fn write(&self, header: Option<VnetHdr>, packet: &[u8]) -> io::Result<()> {
        let header = header.map(VnetHdr::to_bytes);
        let all = [header.as_ref().map_or(&[][..], |header| header), packet].concat();
        let len = write(&self.a, &all)?;
        assert_eq!(len, all.len());
        Ok(())
    }

    /// What came out, of what was sent; with the driver's header.
    fn read(&mut self) -> Option<(VnetHdr, Vec<u8>)> {
        loop {
            let len = match try_read(&self.b, &mut self.buffer) {
                Ok(len) => len,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return None,
                Err(error) => panic!("read: {error}"),
            };
            let (header, packet) = self.buffer[..len].split_at(self.skip);
            let ours = match packet[0] >> 4 {
                4 => packet[16..20] == TARGET4.octets(),
                _ => packet[24..40] == TARGET6.octets(),
            };
            if ours {
                let header = header.try_into().map_or(VnetHdr::plain(), VnetHdr::from_bytes);
                return Some((header, packet.to_vec()));
            }
        }
    }

    /// Waits for something to read.
    fn wait(&self, bound: Duration) -> bool {
        let mut poll = libc::pollfd {
            fd: self.b.as_raw_fd(),
            events: libc::POLLIN,
            revents: 0,
        };
        // SAFETY: one pollfd.
        unsafe { libc::poll(&raw mut poll, 1, bound.as_millis() as i32) == 1 }
    }

    /// Reads until as many packets as are wanted came out, and whatever else there is by then.
    fn read_all(&mut self, count: usize) -> Vec<Vec<u8>> {
        let mut all = Vec::new();
        loop {
            while let Some((_, packet)) = self.read() {
                all.push(packet);
            }
            // Writes go all the way through; only a busy machine defers the rest.
            if all.len() >= count || !self.wait(Duration::from_millis(200) * common::slowness()) {
                return all;
            }
        }
    }

    /// What the kernel makes of a superpacket; `None` if it refuses one of more datagrams than it ever makes (`UDP_MAX_SEGMENTS`).
    fn cut(&mut self, header: VnetHdr, packet: &[u8], count: usize) -> Option<Vec<Vec<u8>>> {
        let mut bytes = header.to_bytes();
        let udp = bytes[1] == 5;
        if !udp {
            let size = u16::from_ne_bytes([bytes[4], bytes[5]]).max(self.size_min);
            bytes[4..6].copy_from_slice(&size.to_ne_bytes());
        }
        let header = VnetHdr::from_bytes(bytes);
        let most = if common::kernel() < (6, 9) { 64 } else { 128 };
        match self.write(Some(header), packet) {
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) && udp && count > most => return None,
            result => result.unwrap(),
        }
        Some(self.read_all(count))
    }
}

// ----------------------------------------------------------------------------------------------------------------------------- cutting

/// What the library makes of a superpacket, sent through a router.
fn expected(header: VnetHdr, packet: &[u8]) -> Vec<Vec<u8>> {
    let mut packet = packet.to_vec();
    let gso = match header.check(&packet, Link::None) {
        Ok(Meta::Gso(gso)) => gso,
        other => panic!("{other:?}"),
    };
    let plan = Plan::new(&gso, &packet).unwrap();
    let apart: Vec<Vec<u8>> = (0..plan.count())
        .map(|index| {
            let mut segment = vec![0; plan.header_len()];
            let payload = plan.header(index, &packet, &mut segment).unwrap();
            segment.extend(&packet[payload]);
            segment
        })
        .collect();
    let mut segments = Segments::new(&gso, &mut packet).unwrap();
    let mut all = Vec::new();
    while let Some(segment) = segments.next() {
        all.push(segment.to_vec());
    }
    assert_eq!(all, apart);
    if let [segment] = &mut all[..] {
        // To the kernel it is a packet to be finished, which has no zero whatever the protocol (`skb_checksum_help`).
        let field = &mut segment[gso.headers.transport + checksum_offset(&gso.headers)..][..2];
        if field == [0, 0] {
            field.fill(0xff);
        }
    }
    all.iter().map(|segment| forwarded(segment)).collect()
}

fn assert_cut(route: &mut Route, recipe: &Recipe, payload: &[u8], size: u16) {
    let (header, packet) = recipe.superpacket(payload, size);
    let expected = expected(header, &packet);
    assert_cut_to(route, header, &packet, &expected, || {
        format!("{} bytes of payload by {size}, {recipe:?}", payload.len())
    });
}

fn assert_cut_to(route: &mut Route, header: VnetHdr, packet: &[u8], expected: &[Vec<u8>], what: impl Fn() -> String) {
    let Some(got) = route.cut(header, packet, expected.len()) else {
        return;
    };
    for (index, (got, expected)) in got.iter().zip(expected).enumerate() {
        let end = expected.len().min(120);
        let all = got == expected;
        assert!(
            all,
            "segment {index} of {}\nkernel  {:02x?}\nlibrary {:02x?}",
            what(),
            &got[..end.min(got.len())],
            &expected[..end]
        );
    }
    assert_eq!(got.len(), expected.len(), "{}\n{}", what(), drops());
}

/// What is left of a superpacket when segments were taken from the front is one, for the kernel too.
fn assert_rest(route: &mut Route, recipe: &Recipe, payload: &[u8], size: u16, from: usize) {
    let (header, packet) = recipe.superpacket(payload, size);
    let segments = expected(header, &packet);
    // Two at least: see `is_lost`.
    if from + 2 > segments.len() {
        return;
    }
    let Ok(Meta::Gso(gso)) = header.check(&packet, Link::None) else {
        unreachable!()
    };
    let mut rest = packet.clone();
    let start = Plan::new(&gso, &packet).unwrap().keep_from(from, &mut rest).unwrap();
    assert_cut_to(route, header, &rest[start..], &segments[from..], || {
        format!("{} bytes of payload by {size} from {from}, {recipe:?}", payload.len())
    });
}

/// Whether the kernel takes a superpacket of one segment for one, and drops it: it looks at its length before it knows of TCP's options
/// (`virtio_net_hdr_to_skb`), and again behind them (`tcp_gso_segment`).
fn is_lost(recipe: &Recipe, payload: usize, size: u16) -> bool {
    let size = usize::from(size.max(GsoType::Tcp4.size_min()));
    recipe.tcp && payload <= size && payload + recipe.options.len() > size
}

fn recipe(v6: bool, tcp: bool) -> impl Strategy<Value = Recipe> {
    let network = (any::<u8>(), 2u8.., any::<bool>(), any::<u16>(), 0u32..1 << 20);
    let extensions = prop_oneof![
        3 => Just(vec![]),
        1 => prop::collection::vec((Just(60u8), 1usize..4), 1..3),
        1 => Just(vec![(0, 1)]),
        1 => Just(vec![(0, 2), (60, 1)]),
    ];
    let transport = (any::<u16>(), any::<u32>(), any::<u32>(), any::<u16>(), any::<u16>());
    let options = (0usize..=10).prop_flat_map(|words| prop::collection::vec(any::<u8>(), 4 * words));
    let flags = prop_oneof![any::<u8>(), Just(ACK), Just(ACK | PSH | FIN | CWR | ECE)];
    (network, extensions, transport, options, flags).prop_map(
        move |((tos, ttl, df, identification, label), extensions, transport, options, flags)| {
            let (port, sequence, acknowledgement, window, urgent) = transport;
            Recipe {
                v6,
                tcp,
                tos,
                ttl,
                fragment: if df { DF } else { 0 },
                identification,
                label,
                extensions: if v6 { extensions } else { Vec::new() },
                port,
                sequence,
                acknowledgement,
                window,
                urgent,
                flags,
                options,
            }
        },
    )
}

fn cut_any(v6: bool, tcp: bool) {
    let route = RefCell::new(Route::cutting(tcp));
    let shape = prop_oneof![
        (1u16..40, 1usize..=128),
        (40u16..600, 1usize..=128),
        (600u16..9_000, 1usize..=64)
    ];
    let cases = (recipe(v6, tcp), shape, 0.0..1.0f64, any::<u64>());
    property(120, &cases, |(recipe, (size, count), last, seed)| {
        let most = 65_535 + if v6 { 40 } else { 0 } - recipe.len();
        // The last one is shorter, or full.
        let last = usize::from(size) - (last * 1.5 * f64::from(size)) as usize % usize::from(size);
        let payload = (usize::from(size) * (count - 1) + last).min(most);
        let (mut route, bytes) = (route.borrow_mut(), bytes(payload, seed));
        let lost = route.loses_extensions && tcp && !recipe.extensions.is_empty();
        if !lost && !is_lost(&recipe, payload, size) {
            assert_cut(&mut route, &recipe, &bytes, size);
            assert_rest(&mut route, &recipe, &bytes, size, seed as usize % count);
        }
        Ok(())
    });
}

fn cut_bounds(v6: bool, tcp: bool) {
    let mut route = Route::cutting(tcp);
    let most = |recipe: &Recipe| 65_535 + if v6 { 40 } else { 0 } - recipe.len();
    let base = plain(v6, tcp);
    let bare = Recipe {
        options: Vec::new(),
        ..base.clone()
    };
    // As long as can be, with sizes from few segments to many.
    for recipe in [&base, &bare] {
        for size in [40, 536, 1_220, 1_448, 1_460, 8_948, 32_767, 65_000] {
            assert_cut(&mut route, recipe, &bytes(most(recipe), 1), size);
        }
    }
    // Every number of segments, the last one full or of one byte.
    for count in 1..=128 {
        for last in [1, 100] {
            assert_cut(&mut route, &bare, &bytes(100 * (count - 1) + last, 2), 100);
        }
    }
    // The least there can be, and what is one byte more or less than full.
    for (payload, size) in [
        (1, 1),
        (2, 1),
        (300, 1),
        (7, 2),
        (99, 100),
        (101, 100),
        (199, 100),
        (201, 100),
    ] {
        assert_cut(&mut route, &bare, &bytes(payload, 3), size);
    }
    if tcp {
        for flags in 0..=u8::MAX {
            assert_cut(&mut route, &Recipe { flags, ..base.clone() }, &bytes(250, 4), 100);
        }
        // A segment of its own with options: see `is_lost`. Where the kernel mends this, it comes out.
        let (header, packet) = base.superpacket(&bytes(95, 5), 100);
        assert!(is_lost(&base, 95, 100));
        let got = route.cut(header, &packet, 0).unwrap();
        assert!(got.is_empty() || got == expected(header, &packet));
    }
    if !v6 {
        for fragment in [0, DF] {
            for identification in [0, 0x7fff, 0xfff0, 0xffff] {
                let recipe = Recipe {
                    fragment,
                    identification,
                    ..base.clone()
                };
                assert_cut(&mut route, &recipe, &bytes(6_000, 6), 100);
            }
        }
    }
}

/// Payload with which the checksum of each segment is computed as 0: UDP has 0xFFFF for it, TCP has it as it is.
fn cut_zero(v6: bool, tcp: bool) {
    let mut route = Route::cutting(tcp);
    let recipe = Recipe {
        options: Vec::new(),
        ..plain(v6, tcp)
    };
    let (size, count, last) = (100, 5, 60);
    let mut payload = bytes(size * (count - 1) + last, 7);
    for index in 0..count {
        payload[index * size..][..2].fill(0);
    }
    let (header, packet) = recipe.superpacket(&payload, size as u16);
    for (index, segment) in expected(header, &packet).iter().enumerate() {
        // A word of zero replaced by the checksum makes the sum all ones.
        let field = recipe.len() - if tcp { 4 } else { 2 };
        payload[index * size..][..2].copy_from_slice(&segment[field..field + 2]);
    }
    let (header, packet) = recipe.superpacket(&payload, size as u16);
    for segment in expected(header, &packet) {
        let field = recipe.len() - if tcp { 4 } else { 2 };
        assert_eq!(segment[field..field + 2], if tcp { [0, 0] } else { [0xff, 0xff] });
    }
    assert_cut(&mut route, &recipe, &payload, size as u16);
    // Each alone, too.
    for payload in payload.chunks(size) {
        assert_cut(&mut route, &recipe, payload, size as u16);
    }
}

// ----------------------------------------------------------------------------------------------------------------------------- merging

type Batch = Vec<Vec<u8>>;

/// Packets that went together: their places in the batch, and the superpacket if there is more than one.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Merged {
    places: Vec<usize>,
    superpacket: Option<(Shape, Vec<u8>)>,
}

/// What the driver's header says of a superpacket; `hdr_len` is not looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Shape {
    flags: u8,
    kind: u8,
    size: u16,
    start: u16,
    offset: u16,
}

impl Shape {
    fn of(header: VnetHdr) -> Self {
        let bytes = header.to_bytes();
        let word = |at: usize| u16::from_ne_bytes([bytes[at], bytes[at + 1]]);
        Self {
            flags: bytes[0],
            kind: bytes[1],
            size: word(4),
            start: word(6),
            offset: word(8),
        }
    }
}

/// What the kernel's GRO does without a limit of its own to segments of TCP; of UDP it takes 64.
fn limits(packets: &[Vec<u8>]) -> Limits {
    let udp = packets
        .iter()
        .any(|packet| packet[if packet[0] >> 4 == 4 { 9 } else { 6 }] == UDP);
    Limits {
        segments: if udp { 64 } else { usize::MAX },
        ..Limits::default()
    }
}

/// What the library merges of those packets of a batch whose places are told, as it comes out of a router.
fn merged_by_library(batch: &[Vec<u8>], places: &[usize]) -> Vec<Merged> {
    let packets: Batch = places.iter().map(|&place| batch[place].clone()).collect();
    let mut table = GroTable::new(256, limits(batch));
    let groups = table.coalesce(&packets, Link::None);
    groups
        .map(|group| {
            let mut headers = [0; HEADERS_MAX];
            let superpacket = group.headers(&packets, &mut headers).map(|(header, headers)| {
                let mut packet = headers.to_vec();
                group
                    .parts()
                    .for_each(|(index, payload)| packet.extend(&packets[index][payload]));
                (Shape::of(header), forwarded(&packet))
            });
            Merged {
                places: group.parts().map(|(index, _)| places[index]).collect(),
                superpacket,
            }
        })
        .collect()
}

/// Device `a` has NAPI, which puts its packets through GRO; `b` takes superpackets.
struct Merger {
    route: Route,
    tick: Duration,
    /// Batches that were never written within a tick.
    late: usize,
    /// A batch was not read to its end.
    dirty: bool,
}

impl Merger {
    fn new(tcp: bool) -> Self {
        if !tcp && common::kernel() < (6, 10) {
            skip(
                "this kernel merges UDP whatever TTL, TOS and identification say (udp_gro_receive_segment; Linux 6.10)",
            );
        }
        let route = Route::new(libc::IFF_NAPI, libc::IFF_VNET_HDR);
        let usual = TUN_F_CSUM | TUN_F_TSO4 | TUN_F_TSO6 | TUN_F_TSO_ECN;
        let all = usual | TUN_F_USO4 | TUN_F_USO6;
        if ioctl_value(route.b.as_fd(), libc::TUNSETOFFLOAD, all).is_err() {
            if !tcp {
                skip("this kernel hands out no UDP superpackets (Linux 6.2)");
            }
            ioctl_value(route.b.as_fd(), libc::TUNSETOFFLOAD, usual).unwrap();
        }
        if !tcp {
            set_feature("a", "rx-udp-gro-forwarding");
        }
        // Else runs of one identification are cut again before they come out.
        set_feature("b", "tx-tcp-mangleid-segmentation");
        let tick = clock(libc::CLOCK_MONOTONIC_COARSE, true);
        hold("a", tick + Duration::from_millis(1)).unwrap_or_else(|error| {
            skip(format!(
                "GRO cannot be told to hold packets, for want of a sysfs of this namespace: {error}"
            ))
        });
        Self {
            route,
            tick,
            late: 0,
            dirty: false,
        }
    }

    /// What the kernel merges of a batch, in the order in which it comes out.
    ///
    /// It holds runs over several writes until a timer rings, but none that is older than a tick; so all are written within one.
    fn merge(&mut self, batch: &[Vec<u8>]) -> Option<Vec<Merged>> {
        if self.dirty {
            while self.route.wait(8 * self.tick) {
                self.route.read();
            }
        }
        let now = || clock(libc::CLOCK_MONOTONIC_COARSE, false);
        // Where that fails a few times, this machine is too slow for it.
        let until = Instant::now() + Duration::from_secs(5);
        while self.late < 3 && Instant::now() < until {
            let before = now();
            let mut start = before;
            while start == before {
                std::hint::spin_loop();
                start = now();
            }
            for packet in batch {
                self.route.write(None, packet).unwrap();
            }
            let within = now() == start;
            self.dirty = true;
            let merged = self.collect(batch, within);
            self.dirty = false;
            if within {
                return Some(merged);
            }
        }
        self.late += 1;
        None
    }

    /// Says if not all was tried.
    fn finish(&self) {
        if self.late > 0 {
            skip(format!(
                "{} batches were never written within a tick of the clock",
                self.late
            ));
        }
    }

    fn collect(&mut self, batch: &[Vec<u8>], wanted: bool) -> Vec<Merged> {
        let sent: Batch = batch.iter().map(|packet| forwarded(packet)).collect();
        let mut free: Vec<bool> = vec![true; batch.len()];
        let mut all = Vec::new();
        // Nothing is lost but by a wrong IPv4 checksum, which is not sent here.
        while free.contains(&true) {
            let Some((header, mut packet)) = self.route.read() else {
                let bound = Duration::from_secs(1).max(4 * self.tick) * common::slowness();
                assert!(self.route.wait(bound), "lost {free:?}\n{}", drops());
                continue;
            };
            let mut merged = Merged {
                places: Vec::new(),
                superpacket: None,
            };
            let segments = match header.check(&packet, Link::None).unwrap() {
                Meta::Gso(_) => {
                    merged.superpacket = Some((Shape::of(header), packet.clone()));
                    cut_again(header, &packet)
                }
                // Merged, and cut again before the device: CWR, and see `identifications`.
                Meta::Unfinished { start, field } => {
                    vnet::finish(&mut packet, start, field);
                    // It was written as the other zero.
                    if packet[field..field + 2] == [0xff, 0xff] {
                        packet[field..field + 2].fill(0);
                    }
                    vec![packet]
                }
                _ => vec![packet],
            };
            let whole = segments.len() == 1;
            for segment in &segments {
                let place = (0..sent.len()).find(|&place| {
                    free[place]
                        && if whole {
                            sent[place] == *segment
                        } else {
                            is_same(&sent[place], segment)
                        }
                });
                let place = place.unwrap_or_else(|| panic!("never sent: {segment:02x?}"));
                free[place] = false;
                merged.places.push(place);
            }
            all.push(merged);
        }
        let more = self.route.read();
        assert!(more.is_none() || !wanted, "more than was sent: {more:?}");
        all
    }
}

fn cut_again(header: VnetHdr, packet: &[u8]) -> Vec<Vec<u8>> {
    let mut packet = packet.to_vec();
    let Meta::Gso(gso) = header.check(&packet, Link::None).unwrap() else {
        unreachable!()
    };
    let mut segments = Segments::new(&gso, &mut packet).unwrap();
    let mut all = Vec::new();
    while let Some(segment) = segments.next() {
        all.push(segment.to_vec());
    }
    all
}

/// Whether a segment is the packet: ports, sequence and payload.
fn is_same(packet: &[u8], segment: &[u8]) -> bool {
    let of = |packet: &[u8]| {
        let headers = Headers::parse(packet, Link::None).unwrap();
        let fixed = if headers.protocol == TCP { 8 } else { 4 };
        let fixed = packet
            .get(headers.transport..headers.transport + fixed)
            .map(<[u8]>::to_vec);
        (fixed, packet[headers.payload..headers.end].to_vec())
    };
    of(packet) == of(segment)
}

/// The clock's time, or the length of its step.
fn clock(id: libc::clockid_t, step: bool) -> Duration {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: one timespec is written.
    let result = unsafe {
        if step {
            libc::clock_getres(id, &raw mut time)
        } else {
            libc::clock_gettime(id, &raw mut time)
        }
    };
    assert_eq!(result, 0);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

/// Makes GRO of a device hold its packets for a while, through a sysfs of the namespace that this thread alone sees.
fn hold(device: &str, time: Duration) -> io::Result<()> {
    let c = |text: &str| CString::new(text).expect("no NUL");
    let (none, root, sysfs, sys) = (c("none"), c("/"), c("sysfs"), c("/sys"));
    let private = libc::MS_REC | libc::MS_PRIVATE;
    let null = std::ptr::null;
    // SAFETY: strings that live through the calls; the mount namespace is this thread's own from the first call on.
    let refused = unsafe {
        libc::unshare(libc::CLONE_NEWNS) != 0
            || libc::mount(none.as_ptr(), root.as_ptr(), null(), private, null().cast()) != 0
            || libc::mount(sysfs.as_ptr(), sys.as_ptr(), sysfs.as_ptr(), 0, null().cast()) != 0
    };
    if refused {
        return Err(io::Error::last_os_error());
    }
    let folder = format!("/sys/class/net/{device}");
    fs::write(format!("{folder}/napi_defer_hard_irqs"), "0")?;
    fs::write(format!("{folder}/gro_flush_timeout"), time.as_nanos().to_string())
}

/// Switches a feature of a device on, as `ethtool -K` does.
fn set_feature(device: &str, feature: &str) {
    const GSSET_INFO: u32 = 0x37;
    const GSTRINGS: u32 = 0x1b;
    const SFEATURES: u32 = 0x3b;
    const FEATURES: u32 = 4;
    const NAME: usize = 32;
    let ask = |words: &mut Vec<u32>| {
        // SAFETY: all zero is a valid ifreq.
        let mut ifreq: libc::ifreq = unsafe { std::mem::zeroed() };
        for (to, from) in ifreq.ifr_name.iter_mut().zip(device.bytes()) {
            *to = from as libc::c_char;
        }
        ifreq.ifr_ifru.ifru_data = words.as_mut_ptr().cast();
        let socket = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        // SAFETY: the words have room for all that each request writes.
        let result = unsafe { libc::ioctl(socket.as_raw_fd(), 0x8946, &raw mut ifreq) };
        assert!(result >= 0, "{feature}: {}", io::Error::last_os_error());
    };
    let mut info = vec![GSSET_INFO, 0, 1 << FEATURES, 0, 0];
    ask(&mut info);
    let count = info[4];
    let mut strings = vec![GSTRINGS, FEATURES, count];
    strings.resize(3 + count as usize * NAME / 4, 0);
    ask(&mut strings);
    let names: Vec<u8> = strings[3..].iter().flat_map(|word| word.to_ne_bytes()).collect();
    let place = names
        .chunks(NAME)
        .position(|name| name.split(|&byte| byte == 0).next() == Some(feature.as_bytes()))
        .unwrap_or_else(|| panic!("no feature {feature}"));
    let blocks = count.div_ceil(32);
    let mut set = vec![SFEATURES, blocks];
    for block in 0..blocks as usize {
        let bit = if block == place / 32 { 1 << (place % 32) } else { 0 };
        set.extend([bit, bit]);
    }
    ask(&mut set);
}

/// Packets of one flow, with payloads of these lengths, one behind the other.
fn run(recipe: &Recipe, lens: &[usize]) -> Batch {
    let mut recipe = recipe.clone();
    let packets = lens.iter().enumerate().map(|(index, &len)| {
        let packet = recipe.packet(&bytes(len, index as u64 + 1_000 * u64::from(recipe.port)));
        recipe.identification = recipe.identification.wrapping_add(1);
        recipe.sequence = recipe.sequence.wrapping_add(len as u32);
        packet
    });
    packets.collect()
}

/// What is expected of the kernel.
enum Kernel {
    /// What the library does.
    Same,
    /// It looks at these packets apart from all others, so that they may pass by, or be passed by. The library has them end the run of their flow.
    Apart(Vec<usize>),
    /// Other groups.
    Other(Vec<Vec<usize>>),
}

/// The groups by flow and in their order; groups of different flows have none.
fn by_flow(batch: &[Vec<u8>], merged: &[Merged]) -> BTreeMap<Vec<u8>, Vec<Merged>> {
    let mut flows: BTreeMap<Vec<u8>, Vec<Merged>> = BTreeMap::new();
    for group in merged {
        let packet = &batch[group.places[0]];
        let headers = Headers::parse(packet, Link::None).unwrap();
        let flow = packet[headers.transport..headers.transport + 4].to_vec();
        flows.entry(flow).or_default().push(normal(group));
    }
    flows
}

/// The superpackets that are not the same, and the headers of their packets.
fn differences(batch: &[Vec<u8>], theirs: &[Merged], ours: &[Merged]) -> String {
    let mut all = String::new();
    for (who, groups, others) in [("kernel", theirs, ours), ("library", ours, theirs)] {
        let others: Vec<Merged> = others.iter().map(normal).collect();
        for group in groups.iter().map(normal).filter(|group| !others.contains(group)) {
            all += &format!("{who} {:?}\n", group.places);
            if let Some((shape, packet)) = &group.superpacket {
                all += &format!(
                    "    {shape:?} {} bytes {:02x?}\n",
                    packet.len(),
                    &packet[..packet.len().min(80)]
                );
            }
            for place in group.places {
                let packet = &batch[place];
                all += &format!(
                    "    {place}: {} bytes {:02x?}\n",
                    packet.len(),
                    &packet[..packet.len().min(80)]
                );
            }
        }
    }
    all
}

/// Without the IPv4 checksum, once it is found right: zero has two forms.
fn normal(group: &Merged) -> Merged {
    let mut group = group.clone();
    if let Some((_, packet)) = &mut group.superpacket
        && packet[0] >> 4 == 4
    {
        assert!(sum(&packet[..20]).is_whole());
        packet[10..12].fill(0);
    }
    group
}

fn places(merged: &[Merged]) -> Vec<Vec<usize>> {
    merged.iter().map(|group| group.places.clone()).collect()
}

/// Holds the kernel's groups against the library's; says what differs from what is expected.
fn compare(merger: &mut Merger, what: &str, batch: &[Vec<u8>], kernel: &Kernel) -> Result<(), String> {
    // A kernel that puts its own work off, on a busy machine, may do it in two ticks.
    let mut tries = (0..3).map(|_| compare_once(merger, what, batch, kernel));
    tries
        .find(Result::is_ok)
        .map_or_else(|| compare_once(merger, what, batch, kernel), |_| Ok(()))
}

fn compare_once(merger: &mut Merger, what: &str, batch: &[Vec<u8>], kernel: &Kernel) -> Result<(), String> {
    let Some(theirs) = merger.merge(batch) else {
        return Ok(());
    };
    let all: Vec<usize> = (0..batch.len()).collect();
    let ours = merged_by_library(batch, &all);
    let same = by_flow(batch, &theirs) == by_flow(batch, &ours);
    let right = match kernel {
        Kernel::Same => same,
        Kernel::Apart(apart) => {
            let (some, others): (Vec<usize>, Vec<usize>) = all.iter().partition(|place| apart.contains(place));
            let (their_some, their_others): (Vec<Merged>, Vec<Merged>) = theirs
                .iter()
                .cloned()
                .partition(|group| apart.contains(&group.places[0]));
            [(some, their_some), (others, their_others)]
                .iter()
                .all(|(part, theirs)| by_flow(batch, &merged_by_library(batch, part)) == by_flow(batch, theirs))
        }
        // Another kernel may do as the library does.
        Kernel::Other(groups) => same || places(&theirs) == *groups,
    };
    if right {
        return Ok(());
    }
    let (kernel, library) = (places(&theirs), places(&ours));
    let differences = if kernel == library {
        differences(batch, &theirs, &ours)
    } else {
        String::new()
    };
    Err(format!("{what}: kernel {kernel:?}, library {library:?}\n{differences}"))
}

/// Changes one packet of a batch, and sets its checksums right.
fn change(batch: &mut Batch, place: usize, change: impl FnOnce(&mut Vec<u8>)) {
    change(&mut batch[place]);
    mend(&mut batch[place]);
}

fn merge_rules(v6: bool, tcp: bool) {
    use Kernel::{Apart, Other, Same};
    let mut merger = Merger::new(tcp);
    let base = plain(v6, tcp);
    let transport = base.len() - if tcp { 20 + base.options.len() } else { 8 };
    let mut wrong = String::new();
    let mut check = |what: &str, batch: &Batch, kernel: Kernel| {
        wrong += &compare(&mut merger, what, batch, &kernel).err().unwrap_or_default();
    };
    let six = run(&base, &[100; 6]);
    let with = |changes: &dyn Fn(&mut Batch)| {
        let mut batch = six.clone();
        changes(&mut batch);
        batch
    };
    // Bits flipped in one packet, in the first one, in all from one on.
    const WHICH: [(&str, Range<usize>); 3] = [("one", 3..4), ("first", 0..1), ("rest", 3..6)];
    let flipped = |range: Range<usize>, at: usize, bits: u8| {
        with(&|batch| {
            for place in range.clone() {
                change(batch, place, |packet| packet[at] ^= bits);
            }
        })
    };

    check("nothing", &six, Same);
    check("one", &run(&base, &[100]), Same);
    for lens in [
        &[100, 100, 100, 50][..],
        &[100, 100, 50, 100, 100],
        &[100, 100, 101, 100, 100],
        &[50, 100, 100],
        &[8; 20],
        // 64 KiB.
        &[1_400; 50],
        &[8_000; 10],
        &[3_999; 20],
        &[20_000; 5],
        // 64 datagrams; of TCP any number.
        &[100; 70],
        &[100; 200],
    ] {
        check(&format!("lengths {lens:?}"), &run(&base, lens), Same);
    }
    // The kernel merges such short ones of TCP too, but the library neither merges nor cuts to
    // them: `GsoType::size_min`.
    if !tcp {
        check("lengths of 1", &run(&base, &[1; 20]), Same);
        check("lengths of 1 behind 100", &run(&base, &[100, 1, 1, 1]), Same);
    }
    let network: &[(&str, usize, u8)] = if v6 {
        &[("traffic class", 0, 1), ("ECN", 1, 0x10), ("hop limit", 7, 1)]
    } else {
        &[
            ("TOS", 1, 4),
            ("ECN", 1, 1),
            ("DF", 6, 0x40),
            ("TTL", 8, 1),
            ("identification", 5, 8),
        ]
    };
    let fields: &[(&str, usize, u8)] = &[
        ("acknowledgement", 11, 1),
        ("window", 15, 1),
        ("timestamp", 27, 1),
        ("echo", 31, 1),
        ("sequence", 6, 1),
        ("FIN", 13, FIN),
        ("SYN", 13, SYN),
        ("RST", 13, RST),
        ("PSH", 13, PSH),
        ("ACK", 13, ACK),
        ("URG", 13, URG),
        ("ECE", 13, ECE),
        ("FIN and PSH", 13, FIN | PSH),
        ("accurate ECN", 12, 1),
    ];
    let fields = fields.iter().map(|&(what, at, bits)| (what, transport + at, bits));
    for (what, at, bits) in network.iter().copied().chain(fields.filter(|_| tcp)) {
        for (which, range) in WHICH {
            check(&format!("{what}, {which}"), &flipped(range, at, bits), Same);
        }
    }

    // The kernel does not look at it where URG is not set, and writes that of the first packet into all; the library leaves each its own.
    if tcp {
        for (which, range) in WHICH {
            let all = Other(vec![(0..6).collect()]);
            check(
                &format!("urgent pointer, {which}"),
                &flipped(range, transport + 19, 1),
                all,
            );
        }
    }

    // What the kernel does not look into goes by at once, and overtakes what it holds of the flow.
    let last = six[0].len() - 1;
    for place in [0, 3, 5] {
        check(
            &format!("checksum, {place}"),
            &with(&|batch| batch[place][last] ^= 1),
            Apart(vec![place]),
        );
    }
    check(
        "checksums",
        &with(&|batch| batch.iter_mut().for_each(|packet| packet[last] ^= 1)),
        Same,
    );
    let fragment = |packet: &mut Vec<u8>| {
        if v6 {
            packet[6] = 44;
            packet[5] += 8;
            packet.splice(40..40, [if tcp { TCP } else { UDP }, 0, 0, 1, 0, 0, 0, 9]);
        } else {
            packet[6] = 0x20;
            mend_network(packet);
        }
    };
    check("a fragment", &with(&|batch| fragment(&mut batch[3])), Apart(vec![3]));
    // Padding, which the library leaves out: GRO comes before it is cut off. Not so for TCP: it ends the run there.
    let padded = with(&|batch| batch[3].extend([0; 6]));
    check(
        "padding",
        &padded,
        if tcp {
            Other(vec![vec![0, 1, 2], vec![3], vec![4, 5]])
        } else {
            Apart(vec![3])
        },
    );
    if v6 {
        // To the kernel these are other flows, whose runs it holds side by side.
        for (which, range) in WHICH {
            let batch = flipped(range.clone(), 3, 1);
            check(&format!("flow label, {which}"), &batch, Apart(range.collect()));
        }
        for extensions in [vec![(60, 1)], vec![(0, 1)], vec![(0, 1), (60, 2)]] {
            let what = format!("extensions {extensions:?}");
            let extended = run(
                &Recipe {
                    extensions,
                    ..base.clone()
                },
                &[100; 6],
            );
            // The kernel merges them, and some then lose them.
            if !tcp {
                check(&what, &extended, Same);
            }
            check(&what, &with(&|batch| batch[3] = extended[3].clone()), Apart(vec![3]));
        }
    } else {
        let lengthen = |packet: &mut Vec<u8>| {
            packet.splice(20..20, [1; 4]);
            packet[0] = 0x46;
            packet[3] += 4;
            mend(packet);
        };
        check("options, one", &with(&|batch| lengthen(&mut batch[3])), Apart(vec![3]));
        check("options", &with(&|batch| batch.iter_mut().for_each(lengthen)), Same);
        // The reserved bit: for the kernel, as bad as a fragment. For the library it has to be equal, and is in each segment afterwards.
        check("reserved, one", &flipped(3..4, 6, 0x80), Same);
        let reserved = flipped(3..6, 6, 0x80);
        check(
            "reserved, rest",
            &reserved,
            Other(vec![vec![0, 1, 2], vec![3], vec![4], vec![5]]),
        );
        identifications(&base, &mut check);
    }

    if tcp {
        // Before Linux 6.15, which knows of accurate ECN, CWR began a run.
        check(
            "CWR, first",
            &flipped(0..1, transport + 13, CWR),
            Other(vec![vec![0, 1, 2, 3, 4, 5]]),
        );
        let groups = vec![vec![0, 1, 2], vec![3, 4, 5]];
        check("CWR, one", &flipped(3..4, transport + 13, CWR), Other(groups));
        // The kernel merges these, and cuts them before a device whose header has no word for it.
        check("CWR", &flipped(0..6, transport + 13, CWR), Same);
        let bare = Recipe {
            options: vec![],
            ..base.clone()
        };
        check("acknowledgements", &run(&bare, &[0; 4]), Same);
        let acknowledgement = Recipe {
            sequence: base.sequence.wrapping_add(300),
            ..base.clone()
        };
        check(
            "an acknowledgement",
            &with(&|batch| batch.insert(3, acknowledgement.packet(&[]))),
            Same,
        );
        check("a repetition", &with(&|batch| batch.insert(3, batch[2].clone())), Same);
        check("a gap", &with(&|batch| drop(batch.remove(3))), Same);
        check("a swap", &with(&|batch| batch.swap(2, 3)), Same);
        let mut batch = run(&bare, &[100; 3]);
        batch.extend_from_slice(&six[3..]);
        check("options come", &batch, Same);
    } else {
        let field = transport + 6;
        check(
            "no payload",
            &with(&|batch| batch.insert(3, base.packet(&[]))),
            Apart(vec![3]),
        );
        check("a gap", &with(&|batch| drop(batch.remove(3))), Same);
        let short = with(&|batch| change(batch, 3, |packet| packet[transport + 5] -= 1));
        check("length", &short, Apart(vec![3]));
        if !v6 {
            for (which, range) in WHICH {
                let batch = with(&|batch| {
                    for packet in &mut batch[range.clone()] {
                        packet[field..field + 2].fill(0);
                    }
                });
                check(&format!("no checksum, {which}"), &batch, Apart(range.collect()));
            }
        }
    }

    for flows in [2, 8, 9, 12] {
        let runs: Vec<Batch> = (0..flows)
            .map(|flow| {
                let recipe = Recipe {
                    port: 40_000 + flow,
                    ..base.clone()
                };
                run(&recipe, &[100; 5])
            })
            .collect();
        let batch: Batch = (0..5)
            .flat_map(|at| runs.iter().map(move |run| run[at].clone()))
            .collect();
        // Eight runs are held per hash (`MAX_GRO_SKBS`), which is the same for all on a TUN device: the ninth drives out the first.
        let alone = (0..batch.len()).map(|place| vec![place]).collect();
        check(
            &format!("{flows} flows"),
            &batch,
            if flows > 8 { Other(alone) } else { Same },
        );
    }
    assert!(wrong.is_empty(), "\n{wrong}");
    merger.finish();
}

/// IPv4 identifications.
fn identifications(base: &Recipe, check: &mut dyn FnMut(&str, &Batch, Kernel)) {
    for of in [
        [5, 5, 5, 5, 5, 5],
        [5, 5, 5, 6, 7, 8],
        [5, 6, 7, 7, 7, 7],
        [5, 7, 9, 11, 13, 15],
        [5, 4, 3, 2, 1, 0],
        [0, 0, 0, 0, 0, 0],
        [0xfffe, 0xffff, 0, 1, 2, 3],
        [5, 5, 6, 6, 7, 7],
    ] {
        let with = |fragment: u16| {
            let recipe = Recipe {
                fragment,
                ..base.clone()
            };
            let mut batch = run(&recipe, &[100; 6]);
            for (place, of) in of.iter().enumerate() {
                change(&mut batch, place, |packet| {
                    packet[4..6].copy_from_slice(&u16::to_be_bytes(*of))
                });
            }
            batch
        };
        check(&format!("identifications {of:?} with DF"), &with(DF), Kernel::Same);
        // Since Linux 6.18 one that stays merges without DF, too, though the superpacket of UDP counts up when it is cut. Of TCP the kernel remembers
        // it (`SKB_GSO_TCP_FIXEDID`), and cuts before a device which would not.
        let stays = |group: &Vec<usize>| group.len() > 1 && of[group[0]] == of[group[1]];
        let groups = places(&merged_by_library(&with(DF), &[0, 1, 2, 3, 4, 5]));
        let groups = groups.into_iter().flat_map(|group| {
            if base.tcp && stays(&group) {
                group.into_iter().map(|place| vec![place]).collect()
            } else {
                vec![group]
            }
        });
        let what = format!("identifications {of:?} without DF");
        check(&what, &with(0), Kernel::Other(groups.collect()));
    }
}

/// One more packet of a flow.
#[derive(Clone, Copy, Debug)]
enum Step {
    Next,
    Short,
    Long,
    Gap,
    Flag(u8),
    Tos,
    Ttl,
    Df,
    Identification(u16),
    /// The identification stays from here on, or counts up again.
    Keep,
    Acknowledgement,
    Window,
    Option,
    Empty,
    /// A wrong checksum.
    Wrong,
    /// No checksum.
    Unsummed,
}

/// A batch of several flows, and which of its packets the kernel does not look into.
/// Packets of several flows. With `extensions`, some of those of IPv6 have extension headers.
fn batch(v6: bool, tcp: bool, extensions: bool) -> impl Strategy<Value = (Batch, Vec<usize>)> {
    let mut flags = vec![PSH, FIN, SYN, RST, URG, ECE];
    if common::kernel() >= (6, 15) {
        flags.push(CWR);
    }
    let step = prop_oneof![
        60 => Just(Step::Next),
        4 => Just(Step::Short),
        2 => Just(Step::Long),
        2 => Just(Step::Gap),
        6 => prop::sample::select(flags).prop_map(Step::Flag),
        2 => Just(Step::Tos),
        2 => Just(Step::Ttl),
        2 => Just(Step::Df),
        2 => (1u16..4).prop_map(Step::Identification),
        4 => Just(Step::Keep),
        2 => Just(Step::Acknowledgement),
        2 => Just(Step::Window),
        2 => Just(Step::Option),
        2 => Just(Step::Empty),
        1 => Just(Step::Wrong),
        1 => Just(Step::Unsummed),
    ];
    // Of TCP no shorter payload begins a run of the library's, not even a half of it.
    let least = if tcp {
        2 * usize::from(GsoType::Tcp4.size_min())
    } else {
        1
    };
    let flow = (recipe(v6, tcp), least..1_500, any::<bool>());
    let flows = prop::collection::vec(flow, 1..=6);
    let steps = prop::collection::vec((any::<prop::sample::Index>(), step), 1..90);
    (flows, steps).prop_map(move |(flows, steps)| {
        let mut flows: Vec<(Recipe, usize, bool)> = flows
            .into_iter()
            .enumerate()
            .map(|(index, (recipe, size, keeps))| {
                let whole = Recipe {
                    port: 40_000 + index as u16,
                    flags: ACK,
                    extensions: if extensions {
                        recipe.extensions.clone()
                    } else {
                        Vec::new()
                    },
                    ..recipe
                };
                (whole, size, keeps)
            })
            .collect();
        let (mut batch, mut apart) = (Vec::new(), Vec::new());
        for (place, (flow, step)) in steps.into_iter().enumerate() {
            let flow = flow.index(flows.len());
            let (recipe, size, keeps) = &mut flows[flow];
            let (mut len, mut flag) = (*size, 0);
            match step {
                Step::Next | Step::Wrong | Step::Unsummed => (),
                Step::Short => len = size.div_ceil(2),
                Step::Long => len += 1,
                Step::Gap => recipe.sequence = recipe.sequence.wrapping_add(1),
                Step::Flag(which) => flag = which,
                Step::Tos => recipe.tos ^= 4,
                Step::Ttl => recipe.ttl = recipe.ttl.max(3) - 1,
                Step::Df => recipe.fragment ^= DF,
                Step::Identification(by) => recipe.identification = recipe.identification.wrapping_add(by),
                Step::Keep => *keeps ^= true,
                Step::Acknowledgement => recipe.acknowledgement = recipe.acknowledgement.wrapping_add(1),
                Step::Window => recipe.window ^= 1,
                Step::Option => {
                    if let Some(last) = recipe.options.last_mut() {
                        *last ^= 1;
                    }
                }
                Step::Empty => len = 0,
            }
            let whole = Recipe {
                flags: recipe.flags ^ flag,
                ..recipe.clone()
            };
            let mut packet = whole.packet(&bytes(len, place as u64));
            let end = packet.len() - 1;
            match step {
                Step::Wrong => packet[end] ^= 1,
                // In IPv6 that is a wrong one.
                Step::Unsummed if !tcp => packet[end - len - 1..=end - len].fill(0),
                _ => (),
            }
            if matches!(step, Step::Wrong) || !tcp && matches!(step, Step::Unsummed | Step::Empty) {
                apart.push(place);
            }
            batch.push(packet);
            recipe.sequence = recipe.sequence.wrapping_add(len as u32);
            // Without DF it has to count up, see `identifications`.
            let counts = !*keeps || recipe.fragment != DF;
            recipe.identification = recipe.identification.wrapping_add(u16::from(counts));
        }
        (batch, apart)
    })
}

fn merge_any(v6: bool, tcp: bool) {
    let merger = RefCell::new(Merger::new(tcp));
    property(
        80, // The library merges no TCP behind extension headers, which some kernels lose.
        &batch(v6, tcp, !tcp),
        |(batch, apart)| {
            let mut merger = merger.borrow_mut();
            compare(&mut merger, "a batch", &batch, &Kernel::Apart(apart))
        },
    );
    merger.borrow().finish();
}

/// What the library merged goes to the kernel, which cuts it: what comes out are the packets that went in, in the order of the groups.
fn round_trip(v6: bool, tcp: bool) {
    let route = RefCell::new(Route::cutting(tcp));
    property(60, &batch(v6, tcp, true), |(batch, _)| {
        let mut route = route.borrow_mut();
        let mut table = GroTable::new(256, limits(&batch));
        let mut expected = Vec::new();
        for group in table.coalesce(&batch, Link::None) {
            let mut headers = [0; HEADERS_MAX];
            match group.headers(&batch, &mut headers) {
                None => route.write(Some(VnetHdr::plain()), &batch[group.first()]).unwrap(),
                Some((header, headers)) => {
                    let mut packet = headers.to_vec();
                    group
                        .parts()
                        .for_each(|(index, payload)| packet.extend(&batch[index][payload]));
                    route.write(Some(header), &packet).unwrap();
                }
            }
            let mut places: Vec<usize> = group.parts().map(|(index, _)| index).collect();
            let identification = |place: usize| [batch[place][4], batch[place][5]];
            // Where it stays the same, it counts up afterwards.
            let keeps = !v6 && places.len() > 1 && identification(places[0]) == identification(places[1]);
            let first = u16::from_be_bytes(identification(places[0]));
            for (number, place) in places.drain(..).enumerate() {
                let mut packet = batch[place].clone();
                if keeps {
                    packet[4..6].copy_from_slice(&first.wrapping_add(number as u16).to_be_bytes());
                }
                expected.push(forwarded(&packet));
            }
        }
        let got = route.read_all(expected.len());
        assert_eq!(got.len(), expected.len());
        for (index, (got, expected)) in got.iter().zip(&expected).enumerate() {
            assert!(
                got == expected,
                "packet {index}\nkernel {got:02x?}\nwas    {expected:02x?}"
            );
        }
        Ok(())
    });
}
