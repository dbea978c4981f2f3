//! Cutting superpackets, byte for byte as the kernel does before a device without offloads.
//!
//! What differs from segment to segment:
//!
//! | field | in segment `i` of `n` |
//! |---|---|
//! | IPv4 total length, IPv6 payload length, UDP length | its own |
//! | IPv4 identification | that of the superpacket + `i` |
//! | IPv4 header checksum | its own |
//! | TCP sequence number | that of the superpacket + `i` × size |
//! | TCP FIN, PSH | on the last only |
//! | TCP CWR | on the first only |
//! | TCP or UDP checksum | its own; a computed UDP 0 is written as 0xFFFF |
//!
//! All else is in each as in the superpacket: options, timestamps, flow label, extension headers.
//!
//! [`Segments`] lends one segment after another out of the superpacket's own memory: its headers are written over payload that was lent before,
//! so nothing is copied but the headers. Where segments have to exist side by side, [`Plan::header`] writes the headers elsewhere and tells where
//! the payload lies, for a gathered write. Either way the payload is read once, for its checksum; headers are added up once per superpacket and
//! adjusted.
//!
//! There is no limit to the number of segments but what follows from their size
//! ([`GsoType::size_min`]).
//!
//! ```
//! use tun_driver::offload::{Link, Meta, Segments, VnetHdr};
//!
//! fn receive(header: VnetHdr, packet: &mut [u8]) -> Result<(), tun_driver::offload::VnetFault> {
//!     match header.check(packet, Link::None)? {
//!         Meta::Gso(gso) => {
//!             let mut segments = Segments::new(&gso, packet)?;
//!             while let Some(segment) = segments.next() {
//!                 println!("{} bytes", segment.len()); // each a whole packet
//!             }
//!         }
//!         Meta::Unfinished { start, field } => tun_driver::offload::vnet::finish(packet, start, field),
//!         _ => (),
//!     }
//!     Ok(())
//! }
//! # let _ = receive;
//! ```

use std::ops::Range;

use super::checksum::{Sum, pseudo_header, sum};
use super::headers::{HeaderFault, Headers, TCP, UDP, Version};
use super::vnet::{Gso, GsoType, VnetFault};

/// The most bytes of headers that a superpacket may have: far more than any stack sends.
pub const HEADERS_MAX: usize = 256;

/// How a superpacket is cut: its headers, and what was added up of them.
#[derive(Clone, Debug)]
pub struct Plan {
    headers: [u8; HEADERS_MAX],
    len: usize,
    network: usize,
    transport: usize,
    version: Version,
    kind: GsoType,
    size: usize,
    payload: usize,
    count: usize,
    identification: u16,
    sequence: u32,
    flags: u8,
    /// Over the IPv4 header without what differs.
    network_sum: Sum,
    /// Over the pseudo-header and the transport header without what differs.
    transport_sum: Sum,
}

/// Lends the segments of a superpacket, one after another, each a whole packet. What is left of the superpacket is of no use afterwards.
#[derive(Debug)]
pub struct Segments<'a> {
    /// `None` for a packet that is no superpacket: it is its only segment.
    plan: Option<Plan>,
    packet: &'a mut [u8],
    next: usize,
}

const FIN: u8 = 0x01;
const PSH: u8 = 0x08;
const CWR: u8 = 0x80;

impl Plan {
    /// Looks at the headers of a superpacket. `gso` is what [`VnetHdr::check`](super::VnetHdr::check) said of this packet.
    ///
    /// # Errors
    /// The packet is not the one that `gso` is of, the fields of `gso` contradict each other, or
    /// there are more headers than [`HEADERS_MAX`]; or the segments are shorter than
    /// [`GsoType::size_min`].
    pub fn new(gso: &Gso, packet: &[u8]) -> Result<Self, VnetFault> {
        // The fields are public, so they are looked up again.
        if Headers::parse_at(packet, gso.headers.network).map_err(VnetFault::Headers)? != gso.headers {
            return Err(VnetFault::Length);
        }
        gso.check(packet)?;
        Self::of_checked(gso, packet)
    }

    /// The same of a `gso` that was just found in this very packet.
    pub(crate) fn of_checked(gso: &Gso, packet: &[u8]) -> Result<Self, VnetFault> {
        let at = &gso.headers;
        debug_assert!(gso.check(packet).is_ok());
        let payload = packet.len().checked_sub(at.payload).ok_or(VnetFault::Length)?;
        let mut headers = [0; HEADERS_MAX];
        let (Some(copy), Some(original)) = (headers.get_mut(..at.payload), packet.get(..at.payload)) else {
            return Err(VnetFault::Headers(HeaderFault::Options));
        };
        copy.copy_from_slice(original);
        let (source, target) = at.addresses(packet).ok_or(VnetFault::Length)?;
        let pseudo = pseudo_header(source, target, at.protocol, 0);

        // From here on, what differs is zero in the copy, so that it need not be taken out of any sum.
        let mut identification = 0;
        let network_sum = match at.version {
            Version::V4 => {
                let header = &mut headers[at.network..at.transport];
                identification = u16::from_be_bytes([header[4], header[5]]);
                for field in [2, 4, 10] {
                    header[field..field + 2].fill(0);
                }
                sum(header)
            }
            Version::V6 => Sum::default(),
        };
        let header = &mut headers[at.transport..at.payload];
        let (mut sequence, mut flags) = (0, 0);
        match gso.kind {
            GsoType::Udp => header[4..8].fill(0),
            GsoType::Tcp4 | GsoType::Tcp6 => {
                sequence = u32::from_be_bytes([header[4], header[5], header[6], header[7]]);
                flags = header[13];
                header[4..8].fill(0);
                header[13] = 0;
                header[16..18].fill(0);
            }
        }
        let transport_sum = pseudo + sum(header);
        let size = usize::from(gso.size);
        Ok(Self {
            headers,
            len: at.payload,
            network: at.network,
            transport: at.transport,
            version: at.version,
            kind: gso.kind,
            size,
            payload,
            count: payload.div_ceil(size).max(1),
            identification,
            sequence,
            flags,
            network_sum,
            transport_sum,
        })
    }

    /// How many segments there are: at least one.
    pub fn count(&self) -> usize {
        self.count
    }

    /// Bytes of headers that each segment has.
    pub fn header_len(&self) -> usize {
        self.len
    }

    /// Bytes of the longest segment.
    pub fn longest(&self) -> usize {
        self.len + self.size.min(self.payload)
    }

    /// Writes the headers of a segment to the start of `to`, and returns where its payload lies in the superpacket. `None` if there is no such
    /// segment, the superpacket is another one, or `to` has less room than [`header_len`](Self::header_len).
    #[inline]
    pub fn header(&self, index: usize, packet: &[u8], to: &mut [u8]) -> Option<Range<usize>> {
        let range = self.range(index)?;
        self.stamp(index, packet.get(range.clone())?, to.get_mut(..self.len)?);
        Some(range)
    }

    /// Makes a segment inside the superpacket, over payload of those before it, which therefore have to be done with.
    #[inline]
    pub fn segment<'a>(&self, index: usize, packet: &'a mut [u8]) -> Option<&'a mut [u8]> {
        let range = self.range(index)?;
        // The first one's headers are where they always were; each later one begins further behind.
        let start = range.start.checked_sub(self.len)?;
        let segment = packet.get_mut(start..range.end)?;
        let (header, payload) = segment.split_at_mut(self.len);
        self.stamp(index, payload, header);
        Some(segment)
    }

    /// Makes what is left of the superpacket, from segment `index` on, a superpacket of its own: its headers are written in front of its payload,
    /// over payload of the segments before it. Returns where it begins. `None` if there is no such segment, or the superpacket is another one.
    ///
    /// So segments may be taken from the front for as long as there is room for them, and what is left keeps for later.
    pub fn keep_from(&self, index: usize, packet: &mut [u8]) -> Option<usize> {
        let start = self.range(index)?.start.checked_sub(self.len)?;
        let rest = self.payload - index * self.size;
        let to = packet.get_mut(start..start + self.len)?;
        to.copy_from_slice(&self.headers[..self.len]);
        let behind = |from: usize| (self.len - from + rest) as u16;
        let network = &mut to[self.network..self.transport];
        let (source, target) = match self.version {
            Version::V4 => {
                self.stamp_v4(index, behind(self.network), network);
                network[12..20].split_at(4)
            }
            Version::V6 => {
                network[4..6].copy_from_slice(&behind(self.network + 40).to_be_bytes());
                network[8..40].split_at(16)
            }
        };
        let length = behind(self.transport);
        let protocol = if self.kind == GsoType::Udp { UDP } else { TCP };
        let seed = pseudo_header(source, target, protocol, length.into()).seed();
        let transport = &mut to[self.transport..];
        if self.kind == GsoType::Udp {
            transport[4..6].copy_from_slice(&length.to_be_bytes());
        } else {
            let sequence = self.sequence.wrapping_add((index * self.size) as u32);
            transport[4..8].copy_from_slice(&sequence.to_be_bytes());
            transport[13] = if index > 0 { self.flags & !CWR } else { self.flags };
        }
        let field = self.kind.checksum_offset();
        transport[field..field + 2].copy_from_slice(&seed);
        Some(start)
    }

    /// The fields of an IPv4 header that differ.
    #[inline]
    fn stamp_v4(&self, index: usize, total: u16, network: &mut [u8]) {
        let identification = self.identification.wrapping_add(index as u16);
        network[2..4].copy_from_slice(&total.to_be_bytes());
        network[4..6].copy_from_slice(&identification.to_be_bytes());
        let checksum = (self.network_sum + Sum::of(total) + Sum::of(identification)).checksum();
        network[10..12].copy_from_slice(&checksum);
    }

    #[inline]
    fn range(&self, index: usize) -> Option<Range<usize>> {
        if index >= self.count {
            return None;
        }
        let start = index * self.size;
        Some(self.len + start..self.len + (start + self.size).min(self.payload))
    }

    /// Writes the headers of a segment with this payload; `to` is as long as they are.
    #[inline]
    fn stamp(&self, index: usize, payload: &[u8], to: &mut [u8]) {
        to.copy_from_slice(&self.headers[..self.len]);
        // Lengths fit: the whole superpacket is below 64 KiB by its own headers.
        let behind = |from: usize| (self.len - from + payload.len()) as u16;
        let network = &mut to[self.network..];
        match self.version {
            Version::V4 => self.stamp_v4(index, behind(self.network), network),
            Version::V6 => network[4..6].copy_from_slice(&behind(self.network + 40).to_be_bytes()),
        }
        let length = behind(self.transport);
        let all = self.transport_sum + Sum::of(length) + sum(payload);
        let transport = &mut to[self.transport..];
        match self.kind {
            GsoType::Udp => {
                transport[4..6].copy_from_slice(&length.to_be_bytes());
                transport[6..8].copy_from_slice(&(all + Sum::of(length)).checksum_udp());
            }
            GsoType::Tcp4 | GsoType::Tcp6 => {
                let sequence = self.sequence.wrapping_add((index * self.size) as u32);
                let mut flags = self.flags;
                if index > 0 {
                    flags &= !CWR;
                }
                if index + 1 < self.count {
                    flags &= !(FIN | PSH);
                }
                transport[4..8].copy_from_slice(&sequence.to_be_bytes());
                transport[13] = flags;
                let checksum = (all + Sum::of_long(sequence) + Sum::of(flags.into())).checksum();
                transport[16..18].copy_from_slice(&checksum);
            }
        }
    }
}

impl<'a> Segments<'a> {
    /// For a superpacket; `gso` is what [`VnetHdr::check`](super::VnetHdr::check) said of it.
    ///
    /// # Errors
    /// As [`Plan::new`].
    pub fn new(gso: &Gso, packet: &'a mut [u8]) -> Result<Self, VnetFault> {
        Ok(Self::planned(Plan::new(gso, packet)?, packet))
    }

    pub(crate) fn planned(plan: Plan, packet: &'a mut [u8]) -> Self {
        Self {
            plan: Some(plan),
            packet,
            next: 0,
        }
    }

    /// For a packet that is not to be cut: it comes as it is.
    pub fn whole(packet: &'a mut [u8]) -> Self {
        Self {
            plan: None,
            packet,
            next: 0,
        }
    }

    /// The next segment. Not an iterator's, because each is lent out of the same memory.
    #[expect(clippy::should_implement_trait, reason = "it lends")]
    #[inline]
    pub fn next(&mut self) -> Option<&mut [u8]> {
        let segment = match &self.plan {
            Some(plan) => plan.segment(self.next, self.packet)?,
            None if self.next == 0 => &mut *self.packet,
            None => return None,
        };
        self.next += 1;
        Some(segment)
    }

    /// How many are left.
    pub fn remaining(&self) -> usize {
        self.plan.as_ref().map_or(1, Plan::count) - self.next
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::offload::{Link, Meta, VnetHdr};

    /// A superpacket and its driver's header, with options if it is TCP.
    pub(crate) fn superpacket(v6: bool, tcp: bool, payload: usize, size: u16, flags: u8) -> (VnetHdr, Vec<u8>) {
        let transport = if tcp { 32 } else { 8 };
        let mut packet = if v6 {
            let mut header = vec![0x60, 0x12, 0x34, 0x56, 0, 0, if tcp { 6 } else { 17 }, 64];
            header[4..6].copy_from_slice(&((transport + payload) as u16).to_be_bytes());
            header.extend((0..32).map(|byte| byte * 7));
            header
        } else {
            let mut header = vec![
                0x45,
                0x02,
                0,
                0,
                0xff,
                0xfe,
                0x40,
                0,
                64,
                if tcp { 6 } else { 17 },
                0,
                0,
            ];
            header[2..4].copy_from_slice(&((20 + transport + payload) as u16).to_be_bytes());
            header.extend([10, 0, 0, 1, 10, 0, 0, 2]);
            header
        };
        let at = packet.len();
        packet.extend([0x9c, 0x40, 0, 80]);
        if tcp {
            packet.extend([0xff, 0xff, 0xfe, 0, 1, 2, 3, 4, 0x80, flags, 2, 0, 0, 0, 0, 0]);
            packet.extend([1, 1, 8, 10, 9, 8, 7, 6, 5, 4, 3, 2]);
        } else {
            packet.extend(((8 + payload) as u16).to_be_bytes());
            packet.extend([0, 0]);
        }
        packet.extend((0..payload).map(|byte| (byte * 31 + byte / 256) as u8));
        let kind = match (tcp, v6) {
            (true, false) => GsoType::Tcp4,
            (true, true) => GsoType::Tcp6,
            (false, _) => GsoType::Udp,
        };
        let headers = Headers::parse(&packet, Link::None).unwrap();
        assert_eq!(headers.transport, at);
        let gso = Gso {
            kind,
            size,
            ecn: false,
            headers,
        };
        (VnetHdr::of(&gso), packet)
    }

    fn gso_of(header: VnetHdr, packet: &[u8]) -> Gso {
        match header.check(packet, Link::None) {
            Ok(Meta::Gso(gso)) => gso,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn flags_numbers_and_lengths_are_those_of_each_segment() {
        let (header, mut packet) = superpacket(false, true, 2_500, 1_000, FIN | PSH | CWR | 0x10);
        let original = packet.clone();
        let gso = gso_of(header, &packet);
        let mut segments = Segments::new(&gso, &mut packet).unwrap();
        let mut seen = Vec::new();
        while let Some(segment) = segments.next() {
            let word = |at: usize| u16::from_be_bytes([segment[at], segment[at + 1]]);
            let sequence = u32::from(word(24)) << 16 | u32::from(word(26));
            seen.push((word(2), word(4), segment[33], sequence, segment.len()));
            assert_eq!(segment[40..52], original[40..52], "options");
        }
        assert_eq!(
            seen,
            [
                (1_052, 0xfffe, CWR | 0x10, 0xffff_fe00, 1_052),
                (1_052, 0xffff, 0x10, 488, 1_052),
                (552, 0x0000, FIN | PSH | 0x10, 1_488, 552),
            ]
        );
        assert_eq!(segments.remaining(), 0);
    }

    #[test]
    fn more_than_128_segments_all_come() {
        let (header, mut packet) = superpacket(true, false, 3_000, 4, 0);
        let gso = gso_of(header, &packet);
        let mut segments = Segments::new(&gso, &mut packet).unwrap();
        assert_eq!(segments.remaining(), 750);
        let mut count = 0;
        while let Some(segment) = segments.next() {
            assert_eq!(segment.len(), 52);
            count += 1;
        }
        assert_eq!(count, 750);
    }

    #[test]
    fn a_computed_zero_of_udp_is_all_ones() {
        // Of all payloads of two bytes, one makes the sum all ones.
        let mut found = 0;
        for word in 0..=u16::MAX {
            let (header, mut packet) = superpacket(false, false, 2, 2, 0);
            packet[28..30].copy_from_slice(&word.to_be_bytes());
            let gso = gso_of(header, &packet);
            let mut segments = Segments::new(&gso, &mut packet).unwrap();
            let segment = segments.next().unwrap();
            assert_ne!(segment[26..28], [0, 0]);
            found += usize::from(segment[26..28] == [0xff, 0xff]);
        }
        assert_eq!(found, 1);
    }

    #[test]
    fn what_is_left_is_a_superpacket_that_cuts_into_the_same_segments() {
        for (v6, tcp) in [(false, true), (true, true), (false, false), (true, false)] {
            let (header, packet) = superpacket(v6, tcp, 2_500, 300, FIN | PSH | CWR | 0x10);
            let gso = gso_of(header, &packet);
            let plan = Plan::new(&gso, &packet).unwrap();
            let all: Vec<Vec<u8>> = (0..plan.count())
                .map(|index| plan.segment(index, &mut packet.clone()).unwrap().to_vec())
                .collect();
            for from in 0..plan.count() {
                let mut rest = packet.clone();
                let start = plan.keep_from(from, &mut rest).unwrap();
                let rest = &mut rest[start..];
                let headers = Headers::parse(rest, Link::None).unwrap();
                if !v6 {
                    assert!(sum(&rest[..headers.transport]).is_whole(), "it may be passed on");
                }
                let gso = gso_of(VnetHdr::of(&Gso { headers, ..gso }), rest);
                let mut segments = Segments::new(&gso, rest).unwrap();
                for expected in &all[from..] {
                    assert_eq!(segments.next().unwrap(), expected, "v6 {v6} tcp {tcp} from {from}");
                }
                assert!(segments.next().is_none());
            }
            assert!(plan.keep_from(plan.count(), &mut packet.clone()).is_none());
        }
    }

    proptest! {
        /// The fields of `Gso` and `Headers` are public. Whatever they hold, a plan is refused or
        /// cuts what is there, and nothing overflows.
        #[test]
        fn fields_that_contradict_each_other_are_refused(
            v6: bool,
            tcp: bool,
            kind in prop::sample::select(vec![GsoType::Tcp4, GsoType::Tcp6, GsoType::Udp]),
            size: u16,
            places in prop::array::uniform4(prop_oneof![
                Just(None),
                (0usize..200).prop_map(Some),
                (0usize..64).prop_map(|below| Some(usize::MAX - below)),
                any::<usize>().prop_map(Some),
            ]),
            wrong_version: bool,
            protocol in prop::option::of(any::<u8>()),
            flip in prop::option::of((0usize..100, any::<u8>())),
        ) {
            let (header, mut packet) = superpacket(v6, tcp, 300, 100, 0);
            let truth = gso_of(header, &packet);
            if let Some((at, bits)) = flip {
                packet[at] ^= bits;
            }
            let mut gso = Gso { kind, size, ..truth };
            let at = &mut gso.headers;
            for (field, place) in [&mut at.network, &mut at.transport, &mut at.payload, &mut at.end].into_iter().zip(places) {
                *field = place.unwrap_or(*field);
            }
            if wrong_version {
                at.version = if v6 { Version::V4 } else { Version::V6 };
            }
            at.protocol = protocol.unwrap_or(at.protocol);
            let _ = (gso.headers.addresses(&packet), VnetHdr::of(&gso));
            crate::offload::vnet::finish(&mut packet.clone(), gso.headers.transport, gso.headers.end);
            let found = Headers::parse_at(&packet, gso.headers.network);
            let Ok(plan) = Plan::new(&gso, &packet) else {
                let sound = found == Ok(gso.headers) && gso.check(&packet).is_ok();
                prop_assert!(!sound || gso.headers.payload > HEADERS_MAX);
                return Ok(());
            };
            prop_assert_eq!(found, Ok(gso.headers));
            let mut bytes = 0;
            for index in 0..plan.count() {
                let mut apart = vec![0; plan.header_len()];
                bytes += plan.header(index, &packet, &mut apart).expect("a segment").len();
                prop_assert!(plan.segment(index, &mut packet.clone()).is_some());
                prop_assert!(plan.keep_from(index, &mut packet.clone()).is_some());
            }
            prop_assert_eq!(bytes, packet.len() - gso.headers.payload);
            for index in [plan.count(), usize::MAX] {
                prop_assert!(plan.header(index, &packet, &mut [0; HEADERS_MAX]).is_none());
            }
        }
    }

    #[test]
    fn an_ipv6_superpacket_with_too_short_a_header_is_refused() {
        let (header, packet) = superpacket(true, false, 300, 100, 0);
        let mut gso = gso_of(header, &packet);
        gso.headers.transport = gso.headers.network + 24;
        assert!(Plan::new(&gso, &packet).is_err());
        assert!(Segments::new(&gso, &mut packet.clone()).is_err());
    }

    #[test]
    fn a_plan_for_another_packet_is_refused() {
        let (header, packet) = superpacket(false, true, 500, 100, 0);
        let gso = gso_of(header, &packet);
        assert!(Plan::new(&gso, &packet[..packet.len() - 1]).is_err());
        assert!(Plan::new(&gso, &[]).is_err());
        let plan = Plan::new(&gso, &packet).unwrap();
        assert!(plan.header(5, &packet, &mut [0; 100]).is_none());
        assert!(plan.header(0, &packet, &mut [0; 51]).is_none());
        assert!(plan.header(4, &packet[..400], &mut [0; 100]).is_none());
        assert!(plan.segment(0, &mut [0; 20]).is_none());
    }
}
