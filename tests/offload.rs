//! Superpackets without I/O, held against another library: every segment is a whole packet with right checksums, the segments are the superpacket,
//! and no header of a driver, however it lies, does harm.

use etherparse::{NetSlice, SlicedPacket, TransportSlice};
use proptest::prelude::*;
use tun_driver::offload::coalesce::HEADERS_MAX;
use tun_driver::offload::headers::{TCP, UDP};
use tun_driver::offload::{GroTable, Gso, Limits, Link, Meta, Plan, Segments, VnetFault, VnetHdr, vnet};

/// What a superpacket of a test is made of.
#[derive(Clone, Debug)]
struct Recipe {
    v6: bool,
    tcp: bool,
    /// IPv4 options or extension headers of IPv6, in units of eight bytes.
    extra: usize,
    /// TCP options, in words.
    options: usize,
    flags: u8,
    payload: Vec<u8>,
    size: u16,
    /// An Ethernet header with as many tags.
    tags: Option<usize>,
    identification: u16,
    sequence: u32,
}

impl Recipe {
    fn link(&self) -> Link {
        if self.tags.is_some() {
            Link::Ethernet
        } else {
            Link::None
        }
    }

    /// Where the IP header begins.
    fn network(&self) -> usize {
        self.tags.map_or(0, |tags| 14 + 4 * tags)
    }

    fn build(&self) -> (VnetHdr, Vec<u8>) {
        let mut packet = Vec::new();
        if let Some(tags) = self.tags {
            packet.extend([2; 12]);
            (0..tags).for_each(|tag| {
                packet.extend([
                    if tag == 0 && tags == 2 { 0x88 } else { 0x81 },
                    if tag == 0 && tags == 2 { 0xa8 } else { 0 },
                    0,
                    7,
                ])
            });
            packet.extend(if self.v6 { [0x86, 0xdd] } else { [8, 0] });
        }
        let protocol = if self.tcp { TCP } else { UDP };
        let transport = if self.tcp { 20 + 4 * self.options } else { 8 };
        let length = transport + self.payload.len();
        if self.v6 {
            let first = if self.extra > 0 { 60 } else { protocol };
            packet.extend([0x6a, 0xbc, 0xde, 0xf0]);
            packet.extend(((8 * self.extra + length) as u16).to_be_bytes());
            packet.extend([first, 63]);
            packet.extend((0..32).map(|byte| 0xfd ^ byte));
            if self.extra > 0 {
                packet.extend([protocol, (self.extra - 1) as u8, 1, (8 * self.extra - 4) as u8]);
                packet.extend(vec![0; 8 * self.extra - 4]);
            }
        } else {
            packet.extend([0x45 + 2 * self.extra as u8, 0x1b]);
            packet.extend(((20 + 8 * self.extra + length) as u16).to_be_bytes());
            packet.extend(self.identification.to_be_bytes());
            packet.extend([0x40, 0, 63, protocol, 0xaa, 0xaa, 10, 1, 2, 3, 10, 4, 5, 6]);
            packet.extend(vec![1; 8 * self.extra]);
        }
        let start = packet.len();
        packet.extend([0x12, 0x34, 0x56, 0x78]);
        if self.tcp {
            packet.extend(self.sequence.to_be_bytes());
            packet.extend([
                1,
                2,
                3,
                4,
                ((5 + self.options) as u8) << 4,
                self.flags,
                9,
                9,
                0x55,
                0x55,
                0,
                0,
            ]);
            packet.extend(vec![1; 4 * self.options]);
        } else {
            packet.extend((length as u16).to_be_bytes());
            packet.extend([0x55, 0x55]);
        }
        packet.extend(&self.payload);
        let kind = match (self.tcp, self.v6) {
            (true, false) => 1,
            (true, true) => 4,
            (false, _) => 5,
        };
        let header = claim(1, kind, 0, self.size, start as u16, if self.tcp { 16 } else { 6 });
        (header, packet)
    }
}

/// A driver's header, field by field.
fn claim(flags: u8, kind: u8, hdr_len: u16, gso_size: u16, csum_start: u16, csum_offset: u16) -> VnetHdr {
    let mut bytes = [flags, kind, 0, 0, 0, 0, 0, 0, 0, 0];
    for (at, word) in [(2, hdr_len), (4, gso_size), (6, csum_start), (8, csum_offset)] {
        bytes[at..at + 2].copy_from_slice(&word.to_ne_bytes());
    }
    VnetHdr::from_bytes(bytes)
}

fn recipe() -> impl Strategy<Value = Recipe> {
    let shape = (any::<bool>(), any::<bool>(), 0usize..4, 0usize..=10, any::<u8>());
    let rest = (
        prop::option::of(0usize..3),
        any::<u16>(),
        any::<u32>(),
        prop::collection::vec(any::<u8>(), 0..4_000),
        prop_oneof![1u16..20, 500u16..1_500, Just(u16::MAX)],
    );
    (shape, rest).prop_map(
        |((v6, tcp, extra, options, flags), (tags, identification, sequence, payload, size))| Recipe {
            v6,
            tcp,
            extra,
            options,
            flags,
            payload,
            size,
            tags,
            identification,
            sequence,
        },
    )
}

/// A packet by another library: its TCP or UDP payload, its checksums having been found right.
fn checked(packet: &[u8]) -> Vec<u8> {
    let parsed = SlicedPacket::from_ip(packet).unwrap();
    if let Some(NetSlice::Ipv4(ip)) = &parsed.net {
        assert_eq!(
            ip.header().header_checksum(),
            ip.header().to_header().calc_header_checksum()
        );
        assert_eq!(usize::from(ip.header().total_len()), packet.len());
    }
    let ends = match parsed.net.as_ref().unwrap() {
        NetSlice::Ipv4(ip) => (ip.header().source().to_vec(), ip.header().destination().to_vec()),
        NetSlice::Ipv6(ip) => (ip.header().source().to_vec(), ip.header().destination().to_vec()),
        NetSlice::Arp(_) => panic!("ARP"),
    };
    let four = |bytes: &[u8]| <[u8; 4]>::try_from(bytes).unwrap();
    let sixteen = |bytes: &[u8]| <[u8; 16]>::try_from(bytes).unwrap();
    let v4 = ends.0.len() == 4;
    match parsed.transport.unwrap() {
        TransportSlice::Tcp(tcp) => {
            let header = tcp.to_header();
            let right = if v4 {
                header.calc_checksum_ipv4_raw(four(&ends.0), four(&ends.1), tcp.payload())
            } else {
                header.calc_checksum_ipv6_raw(sixteen(&ends.0), sixteen(&ends.1), tcp.payload())
            };
            // Both forms of zero are right for TCP; the kernel writes either, and so does what does its work.
            let number = |checksum: u16| if checksum == 0xffff { 0 } else { checksum };
            assert_eq!(number(tcp.checksum()), number(right.unwrap()));
            tcp.payload().to_vec()
        }
        TransportSlice::Udp(udp) => {
            let header = udp.to_header();
            let right = if v4 {
                header.calc_checksum_ipv4_raw(four(&ends.0), four(&ends.1), udp.payload())
            } else {
                header.calc_checksum_ipv6_raw(sixteen(&ends.0), sixteen(&ends.1), udp.payload())
            };
            assert_eq!(udp.checksum(), right.unwrap());
            assert_eq!(usize::from(udp.length()), 8 + udp.payload().len());
            udp.payload().to_vec()
        }
        other => panic!("{other:?}"),
    }
}

/// How often a property is tried: as often as the environment wants, or this; less on an emulated
/// machine.
fn cases(default: u32) -> u32 {
    let number = |name: &str| std::env::var(name).ok().and_then(|number| number.parse().ok());
    number("PROPTEST_CASES").unwrap_or(default / number("TUN_DRIVER_SLOWNESS").unwrap_or(1))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(cases(400)))]

    #[test]
    fn segments_are_whole_packets_and_together_the_superpacket(recipe in recipe()) {
        let (header, mut packet) = recipe.build();
        let original = packet.clone();
        let Ok(Meta::Gso(gso)) = header.check(&packet, recipe.link()) else {
            panic!("{:?}", header.check(&packet, recipe.link()));
        };
        let plan = Plan::new(&gso, &packet).unwrap();
        let size = recipe.size.max(gso.kind.size_min());
        prop_assert_eq!(gso.size, size);
        prop_assert_eq!(plan.count(), recipe.payload.len().div_ceil(size.into()).max(1));
        // Side by side, and one after another in place: the same bytes.
        let apart: Vec<Vec<u8>> = (0..plan.count())
            .map(|index| {
                let mut segment = vec![0; plan.header_len()];
                let payload = plan.header(index, &packet, &mut segment).unwrap();
                segment.extend(&packet[payload]);
                segment
            })
            .collect();
        prop_assert_eq!(&packet, &original);
        let mut segments = Segments::new(&gso, &mut packet).unwrap();
        let mut place = 0;
        let mut payload = Vec::new();
        while let Some(segment) = segments.next() {
            prop_assert_eq!(&*segment, &apart[place][..]);
            prop_assert!(segment.len() <= plan.longest());
            prop_assert_eq!(&segment[..recipe.network()], &original[..recipe.network()]);
            let network = &segment[recipe.network()..];
            payload.extend(checked(network));
            let (first, last) = (place == 0, place + 1 == plan.count());
            if !recipe.v6 {
                let identification = u16::from_be_bytes([network[4], network[5]]);
                prop_assert_eq!(identification, recipe.identification.wrapping_add(place as u16));
            }
            if recipe.tcp {
                let tcp = &segment[gso.headers.transport..];
                let sequence = u32::from_be_bytes([tcp[4], tcp[5], tcp[6], tcp[7]]);
                prop_assert_eq!(sequence, recipe.sequence.wrapping_add((place * usize::from(size)) as u32));
                let mut flags = recipe.flags;
                if !first {
                    flags &= !0x80;
                }
                if !last {
                    flags &= !0x09;
                }
                prop_assert_eq!(tcp[13], flags);
            }
            place += 1;
        }
        prop_assert_eq!(place, plan.count());
        prop_assert_eq!(payload, recipe.payload);
    }

    #[test]
    fn an_unfinished_checksum_is_finished(recipe in recipe()) {
        let (_, mut packet) = Recipe { tags: None, ..recipe.clone() }.build();
        let headers = tun_driver::offload::Headers::parse(&packet, Link::None).unwrap();
        // The kernel leaves the sum over the pseudo-header in the field.
        let (source, target) = headers.addresses(&packet).unwrap();
        let length = (headers.end - headers.transport) as u32;
        let seed = tun_driver::offload::checksum::pseudo_header(source, target, headers.protocol, length).seed();
        let offset = if recipe.tcp { 16 } else { 6 };
        let field = headers.transport + offset;
        packet[field..field + 2].copy_from_slice(&seed);
        if !recipe.v6 {
            packet[10..12].fill(0);
            let checksum = tun_driver::offload::checksum::sum(&packet[..headers.transport]).checksum();
            packet[10..12].copy_from_slice(&checksum);
        }
        let said = claim(1, 0, 0, 0, headers.transport as u16, offset as u16);
        prop_assert_eq!(said.check(&packet, Link::None), Ok(Meta::Unfinished { start: headers.transport, field }));
        vnet::finish(&mut packet, headers.transport, field);
        prop_assert_eq!(checked(&packet), recipe.payload);
    }

    #[test]
    fn arbitrary_bytes_do_no_harm(header in any::<[u8; 10]>(), mut packet in prop::collection::vec(any::<u8>(), 0..300), ethernet in any::<bool>()) {
        let link = if ethernet { Link::Ethernet } else { Link::None };
        use_up(VnetHdr::from_bytes(header), &mut packet, link);
    }
}

/// Does with a packet what its header says, if it is believed. Returns whether it was.
fn use_up(header: VnetHdr, packet: &mut [u8], link: Link) -> bool {
    match header.check(packet, link) {
        Ok(Meta::Gso(gso)) => {
            let Ok(mut segments) = Segments::new(&gso, packet) else {
                return false;
            };
            while let Some(segment) = segments.next() {
                assert!(segment.len() >= gso.headers.payload);
            }
        }
        Ok(Meta::Unfinished { start, field }) => vnet::finish(packet, start, field),
        Ok(_) => (),
        Err(_) => return false,
    }
    true
}

/// Every combination of what lies near a bound, in every field: nothing panics, and only what is so is believed.
#[test]
fn lying_headers_do_no_harm_and_only_the_truth_is_believed() {
    let recipes = [(false, true), (true, true), (false, false), (true, false)].map(|(v6, tcp)| Recipe {
        v6,
        tcp,
        extra: 0,
        options: 3,
        flags: 0x18,
        payload: vec![7; 60],
        size: 20,
        tags: None,
        identification: 1,
        sequence: 2,
    });
    let (mut tried, mut believed) = (0u32, 0u32);
    for recipe in recipes {
        let (_, packet) = recipe.build();
        let len = packet.len() as u16;
        let start = len - 60 - if recipe.tcp { 32 } else { 8 };
        let offset = if recipe.tcp { 16 } else { 6 };
        let right = match (recipe.tcp, recipe.v6) {
            (true, false) => 1,
            (true, true) => 4,
            (false, _) => 5,
        };
        let lengths = [0, 1, 19, 20, 39, 40, len - 1, len, len + 1, 0x7fff, 0xfff0, 0xffff];
        for flags in [0, 1, 2, 3, 0xff] {
            for kind in [0, 1, 2, 3, 4, 5, 6, 0x20, 0x80, 0x81, 0x84, 0x85, 0xff] {
                for hdr_len in [0, len, 0xffff] {
                    for gso_size in lengths {
                        for csum_start in lengths.into_iter().chain([start]) {
                            for csum_offset in [0, 6, 16, 19, 20, len - 1, 0x7fff, 0xffff] {
                                let said = claim(flags, kind, hdr_len, gso_size, csum_start, csum_offset);
                                let mut packet = packet.clone();
                                let accepted = use_up(said, &mut packet, Link::None);
                                tried += 1;
                                believed += u32::from(accepted);
                                let ecn_allowed = if recipe.tcp { 0x80 } else { 0 };
                                let true_gso = kind & !ecn_allowed == right
                                    && flags & 1 == 1
                                    && gso_size > 0
                                    && (csum_start, csum_offset) == (start, offset);
                                let plain = kind == 0
                                    && (flags & 1 == 0
                                        || csum_start >= start
                                            && usize::from(csum_start) + usize::from(csum_offset) + 2 <= packet.len());
                                assert_eq!(accepted, true_gso || plain, "{said:?}");
                            }
                        }
                    }
                }
            }
        }
    }
    assert!(
        tried >= 500_000 && believed > 1_000,
        "{tried} tried, {believed} believed"
    );
}

/// A lying header must not make 64 KiB into 64 Ki packets, and a stream survives longer segments.
#[test]
fn tcp_is_cut_into_segments_of_eight_bytes_at_least() {
    for v6 in [false, true] {
        for size in 1..=9 {
            let recipe = Recipe {
                payload: vec![7; 65_000],
                size,
                ..plain(v6, true)
            };
            let (header, packet) = recipe.build();
            let gso = gso_of(header, &packet, Link::None);
            assert_eq!(gso.size, size.max(8));
            let count = Plan::new(&gso, &packet).unwrap().count();
            assert_eq!(count, 65_000usize.div_ceil(size.max(8).into()));
            let mut own = gso;
            own.size = size;
            let planned = Plan::new(&own, &packet).err();
            assert_eq!(planned, (size < 8).then_some(VnetFault::Size));
        }
        // Datagrams cannot be joined without being others.
        let recipe = Recipe {
            payload: vec![7; 20],
            size: 1,
            ..plain(v6, false)
        };
        let (header, packet) = recipe.build();
        let gso = gso_of(header, &packet, Link::None);
        assert_eq!(Plan::new(&gso, &packet).unwrap().count(), 20);
    }
}

// ----------------------------------------------------------------------------------------------------------------------------- merging

impl Recipe {
    /// One packet as it goes over a wire.
    fn packet(&self) -> Vec<u8> {
        let whole = Recipe {
            size: u16::MAX,
            ..self.clone()
        };
        let (header, mut packet) = whole.build();
        let gso = gso_of(header, &packet, whole.link());
        let mut segments = Segments::new(&gso, &mut packet).unwrap();
        segments.next().unwrap().to_vec()
    }

    /// A run of packets that belong together.
    fn run(&self, count: usize) -> Vec<Vec<u8>> {
        let len = self.payload.len() as u32;
        (0..count)
            .map(|number| {
                Recipe {
                    identification: self.identification.wrapping_add(number as u16),
                    sequence: self.sequence.wrapping_add(len * number as u32),
                    ..self.clone()
                }
                .packet()
            })
            .collect()
    }
}

fn plain(v6: bool, tcp: bool) -> Recipe {
    Recipe {
        v6,
        tcp,
        extra: 0,
        options: 3,
        flags: 0x10,
        payload: (0..100).collect(),
        size: u16::MAX,
        tags: None,
        identification: 0xfffe,
        sequence: 0xffff_ffb0,
    }
}

const KINDS: [(bool, bool); 4] = [(false, true), (true, true), (false, false), (true, false)];

fn gso_of(header: VnetHdr, packet: &[u8], link: Link) -> Gso {
    match header.check(packet, link) {
        Ok(Meta::Gso(gso)) => gso,
        other => panic!("{other:?}"),
    }
}

/// Which packets were put together.
fn grouped(packets: &[Vec<u8>], link: Link, limits: Limits) -> Vec<Vec<usize>> {
    let mut table = GroTable::new(256, limits);
    let groups = table.coalesce(packets, link);
    groups
        .map(|group| group.parts().map(|(index, _)| index).collect())
        .collect()
}

/// The packets of each group, cut out of it again if it was put together, with their places.
fn round_trip(packets: &[Vec<u8>], link: Link, limits: Limits) -> Vec<Vec<(usize, Vec<u8>)>> {
    let mut table = GroTable::new(256, limits);
    let mut all = Vec::new();
    for group in table.coalesce(packets, link) {
        let places: Vec<usize> = group.parts().map(|(index, _)| index).collect();
        assert_eq!((places[0], places.len()), (group.first(), group.len()));
        let mut headers = [0; HEADERS_MAX];
        let Some((vnet, headers)) = group.headers(packets, &mut headers) else {
            assert_eq!(places.len(), 1);
            all.push(vec![(places[0], packets[places[0]].clone())]);
            continue;
        };
        let mut superpacket = headers.to_vec();
        group
            .parts()
            .for_each(|(index, payload)| superpacket.extend(&packets[index][payload]));
        let gso = gso_of(vnet, &superpacket, link);
        let mut segments = Segments::new(&gso, &mut superpacket).unwrap();
        assert_eq!(segments.remaining(), places.len());
        let mut cut = Vec::new();
        while let Some(segment) = segments.next() {
            cut.push((places[cut.len()], segment.to_vec()));
        }
        all.push(cut);
    }
    all
}

#[test]
fn a_run_is_one_superpacket_and_cut_again_the_same_packets() {
    for (v6, tcp) in KINDS {
        for tags in [None, Some(0), Some(2)] {
            let recipe = Recipe { tags, ..plain(v6, tcp) };
            let mut packets = recipe.run(9);
            // A shorter one ends the run.
            let last = Recipe {
                payload: vec![1; 33],
                identification: recipe.identification.wrapping_add(9),
                sequence: recipe.sequence.wrapping_add(900),
                flags: 0x19,
                ..recipe.clone()
            };
            packets.push(last.packet());
            packets.push(last.packet());
            let expected = vec![(0..10).collect::<Vec<_>>(), vec![10]];
            assert_eq!(
                grouped(&packets, recipe.link(), Limits::default()),
                expected,
                "{v6} {tcp}"
            );
            for (index, packet) in round_trip(&packets, recipe.link(), Limits::default()).concat() {
                assert_eq!(packet, packets[index], "{v6} {tcp} {tags:?} {index}");
            }
        }
    }
}

#[test]
fn limits_hold() {
    for (v6, tcp) in KINDS {
        let packets = plain(v6, tcp).run(130);
        let sizes = |limits| -> Vec<usize> { grouped(&packets, Link::None, limits).iter().map(Vec::len).collect() };
        assert_eq!(sizes(Limits::default()), [64, 64, 2]);
        let most = Limits {
            segments: 128,
            ..Limits::default()
        };
        assert_eq!(sizes(most), [128, 2]);
        let short = Limits {
            bytes: 400,
            ..Limits::default()
        };
        assert!(sizes(short).iter().all(|&size| size <= 3) && sizes(short)[0] == 3);
        let neither = Limits {
            tcp: !tcp,
            udp: tcp,
            ..Limits::default()
        };
        assert_eq!(sizes(neither), [1; 130]);
        // Never more than IP can say.
        let long = Recipe {
            payload: vec![3; 1_400],
            ..plain(v6, tcp)
        };
        let packets = long.run(50);
        let sizes: Vec<usize> = grouped(&packets, Link::None, Limits::default())
            .iter()
            .map(Vec::len)
            .collect();
        assert_eq!(sizes, [46, 4], "{v6} {tcp}");
    }
}

#[test]
fn tcp_behind_extension_headers_goes_alone() {
    for (v6, tcp) in KINDS {
        let recipe = Recipe {
            extra: 1,
            ..plain(v6, tcp)
        };
        let groups = grouped(&recipe.run(20), Link::None, Limits::default());
        assert_eq!(groups.len(), if v6 && !tcp { 1 } else { 20 }, "{v6} {tcp}");
    }
}

#[test]
fn tcp_of_less_than_eight_bytes_begins_no_run() {
    for (v6, tcp) in KINDS {
        for len in [1, 7, 8] {
            let recipe = Recipe {
                payload: vec![3; len],
                ..plain(v6, tcp)
            };
            let groups = grouped(&recipe.run(20), Link::None, Limits::default());
            let merges = !tcp || len == 8;
            assert_eq!(groups.len(), if merges { 1 } else { 20 }, "{v6} {tcp} {len}");
        }
    }
}

/// Sets the checksums right after a change by hand.
fn mend(packet: &mut [u8]) {
    use tun_driver::offload::checksum::{pseudo_header, sum};
    let headers = tun_driver::offload::Headers::parse(packet, Link::None).unwrap();
    if packet[0] >> 4 == 4 {
        packet[10..12].fill(0);
        let checksum = sum(&packet[..headers.transport]).checksum();
        packet[10..12].copy_from_slice(&checksum);
    }
    let field = headers.transport + if headers.protocol == TCP { 16 } else { 6 };
    packet[field..field + 2].fill(0);
    let (source, target) = headers.addresses(packet).unwrap();
    let pseudo = pseudo_header(
        source,
        target,
        headers.protocol,
        (headers.end - headers.transport) as u32,
    );
    let sum = pseudo + sum(&packet[headers.transport..headers.end]);
    // Both forms of zero are right for TCP; senders write this one, and cutting does too.
    let checksum = if headers.protocol == TCP {
        sum.checksum()
    } else {
        sum.checksum_udp()
    };
    packet[field..field + 2].copy_from_slice(&checksum);
}

#[test]
fn whatever_differs_keeps_packets_apart() {
    type Change = (&'static str, usize, u8);
    let v4: &[Change] = &[
        ("TOS", 1, 4),
        ("DF", 6, 0x40),
        ("TTL", 8, 1),
        ("identification", 5, 8),
        ("target", 19, 1),
    ];
    let v6: &[Change] = &[
        ("traffic class", 1, 0x10),
        ("flow label", 3, 1),
        ("hop limit", 7, 1),
        ("target", 39, 1),
    ];
    let tcp: &[Change] = &[
        ("source port", 1, 1),
        ("sequence", 7, 1),
        ("acknowledgement", 11, 1),
        ("ECE", 13, 0x40),
        ("CWR", 13, 0x80),
        ("URG", 13, 0x20),
        ("SYN", 13, 0x02),
        ("RST", 13, 0x04),
        ("window", 15, 1),
        ("urgent pointer", 19, 1),
        ("an option", 22, 4),
    ];
    let udp: &[Change] = &[("source port", 1, 1), ("target port", 3, 1)];
    for (is_v6, is_tcp) in KINDS {
        let (network, transport) = if is_v6 { (v6, 40) } else { (v4, 20) };
        let behind = if is_tcp { tcp } else { udp };
        let changes = network
            .iter()
            .map(|change| (change, 0))
            .chain(behind.iter().map(|change| (change, transport)));
        for (&(what, at, bits), base) in changes {
            let mut packets = plain(is_v6, is_tcp).run(3);
            packets[1][base + at] ^= bits;
            mend(&mut packets[1]);
            let groups = grouped(&packets, Link::None, Limits::default());
            assert!(
                !groups.contains(&vec![0, 1, 2]) && groups[0] != [0, 1],
                "{what}: {groups:?}"
            );
            for (index, packet) in round_trip(&packets, Link::None, Limits::default()).concat() {
                assert_eq!(packet, packets[index], "{what}");
            }
        }
    }
}

#[test]
fn a_wrong_checksum_stays_wrong_and_alone() {
    for (v6, tcp) in KINDS {
        for wrong in 0..4 {
            let mut packets = plain(v6, tcp).run(4);
            let last = packets[wrong].len() - 1;
            packets[wrong][last] ^= 0x10;
            let groups = round_trip(&packets, Link::None, Limits::default());
            assert!(groups.iter().any(|group| group.len() == 1 && group[0].0 == wrong));
            for (index, packet) in groups.concat() {
                assert_eq!(packet, packets[index]);
            }
            // Without looking, it is merged and made right: that is what the switch says.
            let trusting = Limits {
                verify: false,
                ..Limits::default()
            };
            assert_eq!(grouped(&packets, Link::None, trusting), [[0, 1, 2, 3]]);
        }
        if !v6 {
            let mut packets = plain(v6, tcp).run(2);
            packets[1][10] ^= 1;
            assert_eq!(
                grouped(&packets, Link::None, Limits::default()),
                [[0], [1]],
                "the IP header's"
            );
        }
    }
}

#[test]
fn what_cannot_join_ends_the_run_so_that_nothing_overtakes() {
    for (v6, tcp) in KINDS {
        let recipe = plain(v6, tcp);
        let mut packets = recipe.run(4);
        // In the middle: nothing but headers, as a pure ACK or an empty datagram is.
        let empty = Recipe {
            payload: Vec::new(),
            sequence: recipe.sequence.wrapping_add(200),
            ..recipe.clone()
        };
        packets.insert(2, empty.packet());
        assert_eq!(
            grouped(&packets, Link::None, Limits::default()),
            [vec![0, 1], vec![2], vec![3, 4]]
        );
        if !v6 {
            // A fragment of somebody between the same two ends, and options.
            let mut fragment = recipe.packet();
            fragment[6] |= 0x20;
            mend_network(&mut fragment);
            packets[2] = fragment;
            assert_eq!(
                grouped(&packets, Link::None, Limits::default()),
                [vec![0, 1], vec![2], vec![3, 4]]
            );
            packets[2] = Recipe {
                extra: 1,
                ..recipe.clone()
            }
            .packet();
            assert_eq!(
                grouped(&packets, Link::None, Limits::default()),
                [vec![0, 1], vec![2], vec![3, 4]]
            );
        }
    }
}

fn mend_network(packet: &mut [u8]) {
    packet[10..12].fill(0);
    let checksum = tun_driver::offload::checksum::sum(&packet[..20]).checksum();
    packet[10..12].copy_from_slice(&checksum);
}

#[test]
fn datagrams_without_a_checksum_keep_none() {
    let mut packets = plain(false, false).run(3);
    packets.iter_mut().for_each(|packet| packet[26..28].fill(0));
    for limits in [
        Limits::default(),
        Limits {
            verify: false,
            ..Limits::default()
        },
    ] {
        assert_eq!(grouped(&packets, Link::None, limits), [[0], [1], [2]]);
    }
}

#[test]
fn congestion_marks_are_kept() {
    for v6 in [false, true] {
        // All with ECE; CWR on the first only, which accurate ECN takes for another number.
        let recipe = Recipe {
            flags: 0x50,
            ..plain(v6, true)
        };
        let mut packets = recipe.run(3);
        let transport = if v6 { 40 } else { 20 };
        packets[0][transport + 13] |= 0x80;
        mend(&mut packets[0]);
        assert_eq!(grouped(&packets, Link::None, Limits::default()), [&[0][..], &[1, 2]]);
        for (index, packet) in round_trip(&packets, Link::None, Limits::default()).concat() {
            assert_eq!(packet, packets[index]);
        }
    }
}

#[test]
fn an_identification_that_stays_merges_only_with_df() {
    for (df, merges) in [(true, true), (false, false)] {
        let mut packets = vec![plain(false, false).packet(); 3];
        for packet in &mut packets {
            packet[6] = if df { 0x40 } else { 0 };
            mend(packet);
        }
        assert_eq!(grouped(&packets, Link::None, Limits::default()).len() == 1, merges);
    }
}

#[test]
fn a_checksum_of_an_ipv4_header_has_one_zero_after_cutting() {
    for tcp in [false, true] {
        let with = |identification, sequence| Recipe {
            identification,
            sequence,
            ..plain(false, tcp)
        };
        // Such an identification that the checksum is zero, which may be written in either form.
        let packet = with(0, 0).packet();
        let identification = u16::from_be_bytes([packet[10], packet[11]]);
        let original = [0, 100].map(|sequence| with(identification, sequence).packet());
        assert_eq!(original[0][10..12], [0, 0]);
        let mut packets = original.to_vec();
        packets.iter_mut().for_each(|packet| packet[10..12].fill(0xff));
        let groups = round_trip(&packets, Link::None, Limits::default());
        assert_eq!((groups.len(), &groups[0][0].1), (1, &original[0]));
    }
}

/// What may come next in a flow.
#[derive(Clone, Debug)]
struct Step {
    flow: usize,
    len: usize,
    what: u8,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let length = prop_oneof![8 => Just(200usize), 1 => 0usize..200, 1 => 201usize..400];
    let what = prop_oneof![20 => Just(0u8), 1 => 1u8..10];
    let step = (0usize..6, length, what).prop_map(|(flow, len, what)| Step { flow, len, what });
    prop::collection::vec(step, 1..200)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(cases(300)))]

    #[test]
    fn merged_and_cut_again_all_is_as_it_was(steps in steps(), verify in any::<bool>()) {
        let mut flows: Vec<Recipe> = (0..6).map(|flow| Recipe { identification: 100 * flow as u16, ..plain(flow % 2 == 1, flow / 2 % 2 == 0) }).collect();
        let mut corrupted = Vec::new();
        let packets: Vec<Vec<u8>> = steps.iter().enumerate().map(|(index, step)| {
            let flow = &mut flows[step.flow];
            flow.payload = vec![index as u8; step.len];
            flow.flags = match step.what { 1 => 0x18, 2 => 0x11, 3 => 0x90, 4 => 0x50, _ => 0x10 };
            if step.what == 5 {
                flow.identification = flow.identification.wrapping_add(7);
            }
            let mut packet = flow.packet();
            flow.identification = flow.identification.wrapping_add(1);
            flow.sequence = flow.sequence.wrapping_add(step.len as u32);
            // The last two flows have the addresses of the first two, and other ports.
            if step.flow >= 4 {
                let at = if flow.v6 { 40 } else { 20 };
                packet[at + 1] ^= 0x0f;
                mend(&mut packet);
            }
            if step.what == 6 {
                let last = packet.len() - 1;
                packet[last] ^= 1;
                corrupted.push(index);
            }
            if step.what == 7 && !flow.v6 {
                packet[6] |= 0x20;
                mend_network(&mut packet);
            }
            packet
        }).collect();
        let limits = Limits { verify, ..Limits::default() };
        let groups = round_trip(&packets, Link::None, limits);
        let mut seen = vec![false; packets.len()];
        let mut last_of = [None; 6];
        let mut last_first = None;
        for group in &groups {
            prop_assert!(last_first < Some(group[0].0));
            last_first = Some(group[0].0);
            for (index, packet) in group {
                prop_assert!(!std::mem::replace(&mut seen[*index], true));
                if verify || !corrupted.contains(index) {
                    prop_assert_eq!(packet, &packets[*index]);
                }
                // In its flow nothing was overtaken.
                let last = &mut last_of[steps[*index].flow];
                prop_assert!(*last < Some(*index));
                *last = Some(*index);
            }
        }
        prop_assert!(seen.into_iter().all(|seen| seen));
    }

    #[test]
    fn arbitrary_packets_are_each_in_one_group(packets in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..120), 0..40), ethernet in any::<bool>()) {
        let link = if ethernet { Link::Ethernet } else { Link::None };
        let mut all: Vec<usize> = grouped(&packets, link, Limits::default()).concat();
        all.sort_unstable();
        prop_assert_eq!(all, (0..packets.len()).collect::<Vec<_>>());
    }
}
