//! Any batch of packets, most of them nearly good: each is in one group, none overtakes another of its flow, and a superpacket cut again is what it was
//! made of.
#![no_main]

use std::collections::HashMap;

use arbitrary::{Arbitrary, Unstructured};
use libfuzzer_sys::fuzz_target;
use tun_driver::offload::headers::Version;
use tun_driver::offload::{GroTable, HeaderFault, Headers, Limits, Link};
use tun_driver_fuzz::{Ethernet, Shape, cut, expected, payload, rarely, shape, superpacket, wire};

#[derive(Debug)]
struct Batch {
    packets: Vec<Vec<u8>>,
    link: Link,
    limits: Limits,
    capacity: usize,
}

impl<'a> Arbitrary<'a> for Batch {
    fn arbitrary(bytes: &mut Unstructured<'a>) -> arbitrary::Result<Self> {
        let link = Ethernet::arbitrary(bytes)?.link();
        let limits = Limits {
            segments: if rarely(bytes, 4)? {
                bytes.arbitrary::<u8>()?.into()
            } else {
                64
            },
            bytes: if rarely(bytes, 4)? {
                bytes.arbitrary::<u16>()?.into()
            } else {
                65_535
            },
            tcp: bytes.ratio(15, 16)?,
            udp: bytes.ratio(15, 16)?,
            verify: bytes.ratio(3, 4)?,
        };
        let capacity = bytes.int_in_range(1..=128)?;
        let mut flows = Vec::<Shape>::new();
        for _ in 0..bytes.int_in_range(1..=3)? {
            let mut flow = shape(bytes)?;
            flow.tags = (link == Link::Ethernet).then(|| flow.tags.unwrap_or(0));
            // Mostly what merges.
            if bytes.ratio(3, 4)? {
                flow.flags &= 0xd0;
            }
            flows.push(flow);
        }
        let size = bytes.int_in_range(1..=300)?;
        let mut packets = Vec::new();
        while packets.len() < 150 && !bytes.is_empty() {
            let choice: u8 = bytes.arbitrary()?;
            let number = usize::from(choice >> 4) % flows.len();
            let flow = &mut flows[number];
            let mut step = flow.clone();
            let mut len = size;
            let mut packet = Vec::new();
            match choice & 0xf {
                0 => packet = bytes.arbitrary::<&[u8]>()?.to_vec(),
                1 => len = bytes.int_in_range(0..=size)?,
                2 => len = bytes.int_in_range(0..=1_500)?,
                3 => step.flags |= bytes.arbitrary::<u8>()? & 0xbf,
                4 => step.identification = bytes.arbitrary()?,
                5 => step.sequence = bytes.arbitrary()?,
                6 => {
                    step = Shape {
                        tags: step.tags,
                        ..shape(bytes)?
                    }
                }
                _ => (),
            }
            if packet.is_empty() {
                step.payload = payload(packets.len() as u8, len);
                packet = step.packet();
                flow.identification = flow.identification.wrapping_add(u16::from(choice & 0xf != 7));
                flow.sequence = flow.sequence.wrapping_add(len as u32);
            }
            match choice & 0xf {
                8 => change(bytes, &mut packet, step.headers())?,
                9 => {
                    change(bytes, &mut packet, step.headers())?;
                    mend(&mut packet, link);
                }
                10 => packet.resize(packet.len() + bytes.int_in_range(1..=40)?, 0),
                11 => packet.truncate(packet.len() - bytes.int_in_range(1..=packet.len().min(40))?),
                // The other form of zero, where there is one.
                12 => {
                    if let Some(identification) = other_zeros(&mut packet, link) {
                        flow.identification = identification.wrapping_add(1);
                    }
                }
                _ => (),
            }
            packets.push(packet);
        }
        Ok(Self {
            packets,
            link,
            limits,
            capacity,
        })
    }
}

/// Some bits of one byte, most often of the headers.
fn change(bytes: &mut Unstructured<'_>, packet: &mut [u8], headers: usize) -> arbitrary::Result<()> {
    let most = if bytes.ratio(7, 8)? { headers } else { packet.len() }.min(packet.len());
    let at = bytes.choose_index(most)?;
    packet[at] ^= bytes.arbitrary::<u8>()?;
    Ok(())
}

/// Sets checksums right, where there are any.
fn mend(packet: &mut [u8], link: Link) {
    let Ok(headers) = Headers::parse(packet, link) else {
        return;
    };
    let ip = &mut packet[headers.network..headers.end];
    let transport = headers.transport - headers.network;
    if headers.version == Version::V4 {
        let checksum = wire::network_checksum(&ip[..transport]);
        ip[10..12].copy_from_slice(&checksum.to_be_bytes());
    }
    if headers.payload > headers.transport {
        let field = transport + if headers.protocol == 6 { 16 } else { 6 };
        let checksum = wire::transport_checksum(ip, transport, field);
        ip[field..field + 2].copy_from_slice(&checksum.to_be_bytes());
    }
}

/// Makes checksums that are zero, by a change of identification and payload, and writes them as all ones. Returns the identification.
fn other_zeros(packet: &mut [u8], link: Link) -> Option<u16> {
    mend(packet, link);
    let headers = Headers::parse(packet, link).ok()?;
    let word = |packet: &[u8], at: usize| u16::from_be_bytes([packet[at], packet[at + 1]]);
    let mut zero = |at: usize, field: usize| {
        let sum = wire::sum(word(packet, at), &packet[field..field + 2]);
        packet[at..at + 2].copy_from_slice(&sum.to_be_bytes());
        packet[field..field + 2].fill(0xff);
    };
    if headers.protocol == 6 && headers.payload + 2 <= headers.end && !headers.fragment {
        zero(headers.payload, headers.transport + 16);
    }
    if headers.version == Version::V4 {
        zero(headers.network + 4, headers.network + 10);
        return Some(word(packet, headers.network + 4));
    }
    None
}

fuzz_target!(|batch: Batch| {
    let Batch {
        packets,
        link,
        limits,
        capacity,
    } = batch;
    let mut table = GroTable::new(capacity, limits);
    // Nothing is left of another batch.
    drop(table.coalesce(&packets[packets.len() / 2..], link));
    let count = packets.len().min(capacity);
    let parsed: Vec<_> = packets.iter().map(|packet| Headers::parse(packet, link)).collect();
    let mut group_of = vec![None; count];
    let mut before = None;
    let mut order = Vec::<usize>::new();
    for (number, group) in table.coalesce(&packets, link).enumerate() {
        let places: Vec<usize> = group.parts().map(|(index, _)| index).collect();
        assert_eq!((places[0], places.len()), (group.first(), group.len()));
        assert!(places.is_sorted() && before < Some(places[0]));
        before = Some(places[0]);
        for &place in &places {
            assert_eq!(group_of[place].replace(number), None);
        }
        order.extend(&places);
        let Some((_, gso, merged)) = superpacket(&group, &packets, link) else {
            continue;
        };
        let first = &packets[places[0]];
        assert!(places.len() <= limits.segments && merged.len() - gso.headers.network <= limits.bytes);
        assert!(if gso.headers.protocol == 6 {
            limits.tcp
        } else {
            limits.udp
        });
        let segments = cut(&gso, &merged);
        assert_eq!(segments.len(), places.len());
        for (place, (segment, &index)) in segments.iter().zip(&places).enumerate() {
            let mut expected = expected(&packets[index], first, place, link);
            if !limits.verify {
                let field = gso.headers.transport + if gso.headers.protocol == 6 { 16 } else { 6 };
                expected[field..field + 2].copy_from_slice(&segment[field..field + 2]);
            }
            assert_eq!(*segment, expected, "packet {index}");
        }
        // Nothing in between whose flow could be this one.
        for between in places[0]..places[places.len() - 1] {
            match &parsed[between] {
                Err(fault) => assert_eq!(*fault, HeaderFault::NotIp),
                Ok(headers) if headers.fragment => {
                    assert_ne!(
                        headers.addresses(&packets[between]),
                        parsed[places[0]].unwrap().addresses(first)
                    );
                }
                Ok(_) => (),
            }
        }
    }
    assert!(group_of.iter().all(Option::is_some) && order.len() == count);
    // Of each flow, as they came.
    let mut last = HashMap::new();
    for index in order {
        let Ok(headers) = &parsed[index] else { continue };
        let packet = &packets[index];
        let ports = (headers.payload > headers.transport).then(|| &packet[headers.transport..headers.transport + 4]);
        let flow = (headers.addresses(packet), headers.protocol, headers.fragment, ports);
        assert!(last.insert(flow, index) < Some(index), "packet {index} was overtaken");
    }
});
