//! What the targets share: flows of packets from arbitrary bytes, superpackets out of groups, and what cutting gives back.

use std::sync::LazyLock;

use arbitrary::{Arbitrary, Unstructured};
use tun_driver::offload::coalesce::HEADERS_MAX;
use tun_driver::offload::{Group, Gso, Headers, Link, Meta, Plan, Segments, VnetHdr};

#[path = "../../tests/wire/mod.rs"]
pub mod wire;

pub use wire::Shape;

/// Once in so many times; not when the bytes are used up.
pub fn rarely(bytes: &mut Unstructured<'_>, times: u8) -> arbitrary::Result<bool> {
    Ok(bytes.int_in_range(1..=times)? == times)
}

/// A shape without its payload.
pub fn shape(bytes: &mut Unstructured<'_>) -> arbitrary::Result<Shape> {
    let v6 = bytes.arbitrary()?;
    let tcp = bytes.arbitrary()?;
    Ok(Shape {
        v6,
        tcp,
        tags: if rarely(bytes, 4)? {
            Some(bytes.int_in_range(0..=2)?)
        } else {
            None
        },
        extra: if rarely(bytes, 4)? {
            bytes.int_in_range(0..=if v6 { 8 } else { 4 })?
        } else {
            0
        },
        options: bytes.int_in_range(0..=10)?,
        flags: bytes.arbitrary()?,
        keep_whole: bytes.arbitrary()?,
        identification: bytes.arbitrary()?,
        sequence: bytes.arbitrary()?,
        ports: bytes.arbitrary()?,
        payload: Vec::new(),
    })
}

/// Bytes that differ by place and by seed, so that what is moved or mixed up is seen.
pub fn payload(seed: u8, len: usize) -> Vec<u8> {
    static BYTES: LazyLock<Vec<u8>> = LazyLock::new(|| {
        let mut state = 1u32;
        let next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 24) as u8
        };
        std::iter::repeat_with(next).take(65_535 + 255).collect()
    });
    BYTES[seed.into()..][..len].to_vec()
}

pub fn link(shape: &Shape) -> Link {
    if shape.tags.is_some() {
        Link::Ethernet
    } else {
        Link::None
    }
}

/// A link layer from a bit.
#[derive(Arbitrary, Clone, Copy, Debug)]
pub struct Ethernet(bool);

impl Ethernet {
    pub fn link(self) -> Link {
        if self.0 { Link::Ethernet } else { Link::None }
    }
}

/// Cuts a superpacket in place and apart, and reads each segment. Returns them.
pub fn cut(gso: &Gso, superpacket: &[u8]) -> Vec<Vec<u8>> {
    let (at, size) = (gso.headers, usize::from(gso.size));
    let plan = Plan::new(gso, superpacket).unwrap();
    let mut packet = superpacket.to_vec();
    let mut segments = Segments::new(gso, &mut packet).unwrap();
    let mut rest = &superpacket[at.payload..];
    assert_eq!(plan.count(), rest.len().div_ceil(size).max(1));
    let mut all = Vec::with_capacity(plan.count());
    let mut apart = vec![0; plan.header_len()];
    while let Some(segment) = segments.next() {
        assert!(segment.len() <= at.payload + size && segment.len() <= plan.longest());
        let ip = &segment[at.network..];
        let places = wire::read(ip);
        // It costs more than all else here: the ends, which differ, and every eighth of what is between.
        if all.len() % 8 < 2 || all.len() + 1 == plan.count() {
            wire::another_reads(ip, places);
        }
        let (payload, behind) = rest.split_at(size.min(rest.len()));
        assert_eq!(segment[at.payload..], *payload);
        rest = behind;
        apart.fill(0);
        let range = plan.header(all.len(), superpacket, &mut apart).unwrap();
        assert_eq!((&segment[..at.payload], payload), (&apart[..], &superpacket[range]));
        all.push(segment.to_vec());
    }
    assert!(rest.is_empty() && all.len() == plan.count());
    all
}

/// The superpacket of a group, with what the driver is to be told; `None` of one packet.
pub fn superpacket(group: &Group<'_>, packets: &[Vec<u8>], link: Link) -> Option<(VnetHdr, Gso, Vec<u8>)> {
    let mut headers = [0; HEADERS_MAX];
    let Some((vnet, headers)) = group.headers(packets, &mut headers) else {
        assert_eq!(group.len(), 1);
        return None;
    };
    let mut superpacket = headers.to_vec();
    group
        .parts()
        .for_each(|(index, payload)| superpacket.extend(&packets[index][payload]));
    match vnet.check(&superpacket, link) {
        Ok(Meta::Gso(gso)) => {
            assert_eq!(VnetHdr::of(&gso), vnet);
            Some((vnet, gso, superpacket))
        }
        other => panic!("{other:?}"),
    }
}

/// What comes out of cutting for a packet that was merged behind `place` others, of which `first` is the first: itself, but for what is documented.
pub fn expected(packet: &[u8], first: &[u8], place: usize, link: Link) -> Vec<u8> {
    let headers = Headers::parse(packet, link).unwrap();
    // Padding is not the packet's.
    let mut packet = packet[..headers.end].to_vec();
    let ip = headers.network;
    if packet[ip] >> 4 == 4 {
        let header = &mut packet[ip..headers.transport];
        assert_eq!(wire::sum(0, header), 0xffff, "merged with a wrong checksum");
        // An identification that stays the same counts up; a checksum that is zero has one form.
        if header[4..6] == first[ip + 4..ip + 6] {
            let identification = u16::from_be_bytes([header[4], header[5]]).wrapping_add(place as u16);
            header[4..6].copy_from_slice(&identification.to_be_bytes());
        }
        let checksum = wire::network_checksum(header);
        header[10..12].copy_from_slice(&checksum.to_be_bytes());
    }
    let field = headers.transport + 16;
    if headers.protocol == 6 && packet[field..field + 2] == [0xff, 0xff] {
        packet[field..field + 2].fill(0);
    }
    packet
}
