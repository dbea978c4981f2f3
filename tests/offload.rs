//! Superpackets without I/O, held against another library: every segment is a whole packet with right checksums, the segments are the superpacket,
//! and no header of a driver, however it lies, does harm.

use etherparse::{NetSlice, SlicedPacket, TransportSlice};
use proptest::prelude::*;
use tun_driver::offload::headers::{TCP, UDP};
use tun_driver::offload::{Link, Meta, Plan, Segments, VnetHdr, vnet};

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
            assert_eq!(tcp.checksum(), right.unwrap());
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

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn segments_are_whole_packets_and_together_the_superpacket(recipe in recipe()) {
        let (header, mut packet) = recipe.build();
        let original = packet.clone();
        let Ok(Meta::Gso(gso)) = header.check(&packet, recipe.link()) else {
            panic!("{:?}", header.check(&packet, recipe.link()));
        };
        let plan = Plan::new(&gso, &packet).unwrap();
        prop_assert_eq!(plan.count(), recipe.payload.len().div_ceil(recipe.size.into()).max(1));
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
                prop_assert_eq!(sequence, recipe.sequence.wrapping_add((place * usize::from(recipe.size)) as u32));
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
                                        || usize::from(csum_start) + usize::from(csum_offset) + 2 <= packet.len());
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
