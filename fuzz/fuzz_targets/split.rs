//! Any header of a driver in front of any bytes: what is believed can be cut and finished.
#![no_main]

use libfuzzer_sys::fuzz_target;
use tun_driver::offload::split::HEADERS_MAX;
use tun_driver::offload::{GsoType, Headers, Link, Meta, Plan, VnetHdr, vnet};
use tun_driver_fuzz::{cut, wire};

fuzz_target!(|bytes: &[u8]| {
    let Some((&choice, bytes)) = bytes.split_first() else {
        return;
    };
    let Some((header, packet)) = bytes.split_first_chunk::<{ VnetHdr::LEN }>() else {
        return;
    };
    let link = if choice & 1 == 0 { Link::None } else { Link::Ethernet };
    let mut header = *header;
    // What a fuzzer does not guess easily: the truth about the packet.
    if choice & 2 != 0
        && let Ok(headers) = Headers::parse(packet, link)
    {
        header[0] |= 1;
        header[6..8].copy_from_slice(&(headers.transport as u16).to_ne_bytes());
        header[8..10].copy_from_slice(&(if headers.protocol == 6 { 16u16 } else { 6 }).to_ne_bytes());
    }
    let size = u16::from_ne_bytes([header[4], header[5]]);
    match VnetHdr::from_bytes(header).check(packet, link) {
        Ok(Meta::Gso(gso)) => {
            assert_eq!(
                (gso.size, gso.ecn),
                (size.max(gso.kind.size_min()), header[1] & 0x80 != 0)
            );
            let at = gso.headers;
            let tcp = gso.kind != GsoType::Udp;
            if at.payload > HEADERS_MAX {
                assert!(Plan::new(&gso, packet).is_err());
                return;
            }
            let segments = cut(&gso, packet);
            for (index, segment) in segments.iter().enumerate() {
                same_but_for_what_counts(segment, packet, index, segments.len(), gso.size, at, tcp);
            }
            // A packet of other bytes is refused, or cut without harm.
            let mut other = packet.to_vec();
            other.reverse();
            if let Ok(plan) = Plan::new(&gso, &other) {
                (0..plan.count().min(3)).for_each(|index| assert!(plan.segment(index, &mut other).is_some()));
            }
        }
        Ok(Meta::Unfinished { start, field }) => {
            let mut finished = packet.to_vec();
            vnet::finish(&mut finished, start, field);
            let checksum = match !wire::sum(0, &packet[start..]) {
                0 => 0xffff,
                checksum => checksum,
            };
            assert_eq!(finished[field..field + 2], checksum.to_be_bytes());
            finished[field..field + 2].copy_from_slice(&packet[field..field + 2]);
            assert_eq!(finished, packet);
        }
        Ok(_) => assert_eq!((header[0] & 1, header[1]), (0, 0)),
        Err(_) => (),
    }
});

/// Holds a segment's headers against the superpacket's, field by field, by the table of `split`.
fn same_but_for_what_counts(
    segment: &[u8],
    superpacket: &[u8],
    index: usize,
    count: usize,
    size: u16,
    at: Headers,
    tcp: bool,
) {
    let word = |packet: &[u8], at: usize| u16::from_be_bytes([packet[at], packet[at + 1]]);
    let long = |packet: &[u8], at: usize| u32::from(word(packet, at)) << 16 | u32::from(word(packet, at + 2));
    let mut expected = superpacket[..at.payload].to_vec();
    // Lengths and checksums were read before.
    let mut copy = |range: std::ops::Range<usize>| expected[range.clone()].copy_from_slice(&segment[range]);
    let (network, transport) = (at.network, at.transport);
    if superpacket[network] >> 4 == 4 {
        copy(network + 2..network + 6);
        copy(network + 10..network + 12);
        assert_eq!(
            word(segment, network + 4),
            word(superpacket, network + 4).wrapping_add(index as u16)
        );
    } else {
        copy(network + 4..network + 6);
    }
    if tcp {
        copy(transport + 4..transport + 8);
        copy(transport + 16..transport + 18);
        let ahead = index as u32 * u32::from(size);
        assert_eq!(
            long(segment, transport + 4),
            long(superpacket, transport + 4).wrapping_add(ahead)
        );
        let flags = &mut expected[transport + 13];
        if index > 0 {
            *flags &= !0x80;
        }
        if index + 1 < count {
            *flags &= !0x09;
        }
    } else {
        copy(transport + 4..transport + 8);
    }
    assert_eq!(segment[..at.payload], expected);
}
