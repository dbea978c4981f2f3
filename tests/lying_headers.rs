//! Every driver's header that lies near a bound, in front of packets good and bad: it is believed exactly where it tells the truth, and what is believed
//! is cut and finished as it should be.

mod wire;

use std::collections::HashSet;

use tun_driver::offload::{GsoType, Link, Meta, Plan, Segments, VnetHdr, vnet};
use wire::Shape;

/// A packet, and what is true of it.
struct Sample {
    what: &'static str,
    packet: Vec<u8>,
    link: Link,
    shape: Shape,
    /// It is a superpacket that can be cut, if the header says so.
    good: bool,
}

impl Sample {
    fn new(what: &'static str, shape: Shape, good: bool, change: fn(&mut Vec<u8>)) -> Self {
        let mut packet = shape.packet();
        change(&mut packet);
        let link = if shape.tags.is_some() {
            Link::Ethernet
        } else {
            Link::None
        };
        Self {
            what,
            packet,
            link,
            shape,
            good,
        }
    }
}

impl Sample {
    /// Where its IP header ends.
    fn network_end(&self) -> usize {
        match self.what {
            "neither" => 0,
            _ => self.shape.transport(),
        }
    }
}

fn samples() -> Vec<Sample> {
    let shape = |v6, tcp, extra, payload: usize| Shape {
        v6,
        tcp,
        extra,
        options: if tcp { 3 } else { 0 },
        flags: 0x99,
        payload: (0..payload).map(|byte| (byte * 31 + byte / 256) as u8).collect(),
        ..Shape::PLAIN
    };
    let tagged = Shape {
        tags: Some(2),
        ..shape(true, false, 1, 77)
    };
    vec![
        Sample::new("TCP, IPv4 with options", shape(false, true, 2, 300), true, |_| ()),
        Sample::new("UDP, IPv4", shape(false, false, 0, 1_001), true, |_| ()),
        Sample::new(
            "TCP, IPv6 with an extension header",
            shape(true, true, 2, 500),
            true,
            |_| (),
        ),
        Sample::new("UDP, IPv6", shape(true, false, 0, 64), true, |_| ()),
        Sample::new("UDP, IPv6, tags", tagged, true, |_| ()),
        Sample::new("TCP without payload", shape(false, true, 0, 0), true, |_| ()),
        Sample::new("UDP, longer than most", shape(false, false, 0, 65_000), true, |_| ()),
        Sample::new("padding", shape(false, true, 0, 100), false, |packet| packet.push(0)),
        Sample::new("truncated", shape(true, true, 0, 100), false, |packet| {
            packet.truncate(139)
        }),
        Sample::new("a fragment", shape(false, false, 0, 100), false, |packet| {
            packet[6] = 0x20
        }),
        Sample::new("another protocol", shape(true, false, 1, 100), false, |packet| {
            packet[40] = 58
        }),
        Sample::new("neither", shape(true, true, 0, 100), false, |packet| packet[0] = 0x50),
        Sample::new("nothing", shape(false, true, 0, 0), false, Vec::clear),
    ]
}

/// A driver's header, field by field.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Claim {
    flags: u8,
    kind: u8,
    hdr_len: u16,
    gso_size: u16,
    csum_start: u16,
    csum_offset: u16,
}

impl Claim {
    fn header(self) -> VnetHdr {
        let mut bytes = [self.flags, self.kind, 0, 0, 0, 0, 0, 0, 0, 0];
        let words = [self.hdr_len, self.gso_size, self.csum_start, self.csum_offset];
        for (field, word) in bytes[2..].chunks_exact_mut(2).zip(words) {
            field.copy_from_slice(&word.to_ne_bytes());
        }
        VnetHdr::from_bytes(bytes)
    }
}

const NEEDS_CSUM: u8 = 1;
const ECN: u8 = 0x80;
const KINDS: [u8; 6] = [0, 1, 3, 4, 5, 2];

/// What a header may be taken for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Taken {
    Refused,
    Plain,
    Unfinished { start: usize, field: usize },
    Gso { kind: u8, size: u16, ecn: bool },
}

/// By what is known of the sample.
fn truth(said: Claim, sample: &Sample) -> Taken {
    let shape = &sample.shape;
    let (kind, ecn) = (said.kind & !ECN, said.kind & ECN != 0);
    let needs = said.flags & NEEDS_CSUM != 0;
    let (start, offset) = (usize::from(said.csum_start), usize::from(said.csum_offset));
    if said.kind == 0 {
        return match needs {
            false => Taken::Plain,
            true if start + offset + 2 > sample.packet.len() => Taken::Refused,
            // Inside the IP header.
            true if start < sample.network_end() => Taken::Refused,
            true => Taken::Unfinished {
                start,
                field: start + offset,
            },
        };
    }
    let right = match (shape.tcp, shape.v6) {
        (true, false) => 1,
        (true, true) => 4,
        (false, _) => 5,
    };
    let places = (start, offset) == (shape.transport(), shape.offset());
    if sample.good && kind == right && (shape.tcp || !ecn) && needs && said.gso_size > 0 && places {
        Taken::Gso {
            kind,
            // See `GsoType::size_min`.
            size: said.gso_size.max(if shape.tcp { 8 } else { 1 }),
            ecn,
        }
    } else {
        Taken::Refused
    }
}

fn taken(said: Claim, sample: &Sample) -> Taken {
    match said.header().check(&sample.packet, sample.link) {
        Ok(Meta::Gso(gso)) => {
            let kind = match gso.kind {
                GsoType::Tcp4 => 1,
                GsoType::Tcp6 => 4,
                GsoType::Udp => 5,
            };
            Taken::Gso {
                kind,
                size: gso.size,
                ecn: gso.ecn,
            }
        }
        Ok(Meta::Unfinished { start, field }) => Taken::Unfinished { start, field },
        Ok(_) => Taken::Plain,
        Err(_) => Taken::Refused,
    }
}

/// Cuts a superpacket, in place and apart, and reads every segment.
fn cut(said: Claim, sample: &Sample) {
    let Ok(Meta::Gso(gso)) = said.header().check(&sample.packet, sample.link) else {
        panic!("{said:?}");
    };
    let (shape, size) = (&sample.shape, usize::from(gso.size));
    assert_eq!(
        (gso.headers.transport, gso.headers.payload),
        (shape.transport(), shape.headers())
    );
    let plan = Plan::new(&gso, &sample.packet).unwrap();
    let mut packet = sample.packet.clone();
    let mut segments = Segments::new(&gso, &mut packet).unwrap();
    let mut rest = &shape.payload[..];
    let count = rest.len().div_ceil(size).max(1);
    assert_eq!((plan.count(), segments.remaining()), (count, count));
    for index in 0..count {
        let segment = segments.next().unwrap();
        assert!(segment.len() <= shape.headers() + size);
        let ip = &segment[shape.network()..];
        let places = wire::read(ip);
        // The other library is slow without optimization: some of each.
        if count < 1_000 || index % 97 == 0 || index + 1 == count {
            assert!(wire::another_reads(ip, places));
        }
        let (payload, behind) = rest.split_at(size.min(rest.len()));
        assert_eq!(&ip[places.payload..], payload);
        rest = behind;
        let mut apart = vec![0; plan.header_len()];
        let range = plan.header(index, &sample.packet, &mut apart).unwrap();
        assert_eq!((&segment[..apart.len()], payload), (&apart[..], &sample.packet[range]));
    }
    assert!(segments.next().is_none() && rest.is_empty());
}

/// Finishes a checksum, wherever it is: only its field changes.
fn finish(start: usize, field: usize, sample: &Sample) {
    let mut packet = sample.packet.clone();
    vnet::finish(&mut packet, start, field);
    let mut expected = sample.packet.clone();
    let checksum = match !wire::sum(0, &expected[start..]) {
        0 => 0xffff,
        checksum => checksum,
    };
    expected[field..field + 2].copy_from_slice(&checksum.to_be_bytes());
    assert!(packet == expected, "{}: {start} {field}", sample.what);
}

/// Each once.
fn distinct(mut words: Vec<u16>) -> Vec<u16> {
    words.sort_unstable();
    words.dedup();
    words
}

// T21
#[test]
fn all_small_lies_are_seen_through_and_all_truths_are_cut() {
    let (mut tried, mut cuts, mut finished) = (0u32, 0, 0);
    // On an emulated machine, three of what is never looked at.
    let slow = std::env::var_os("TUN_DRIVER_SLOWNESS").is_some();
    for sample in samples() {
        let len = sample.packet.len() as u16;
        let near = [
            0,
            1,
            19,
            20,
            39,
            40,
            len.wrapping_sub(1),
            len,
            len.wrapping_add(1),
            0x7fff,
            0xfff0,
            0xffff,
        ];
        let with = |truth: usize| distinct(near.iter().copied().chain([truth as u16]).collect());
        let (lengths, starts, offsets) = (
            distinct(near.to_vec()),
            with(sample.shape.transport()),
            with(sample.shape.offset()),
        );
        let mut seen = HashSet::new();
        for flags in [0, NEEDS_CSUM] {
            for kind in KINDS.into_iter().flat_map(|kind| [kind, kind | ECN]) {
                for &hdr_len in if slow { &lengths[..3] } else { &lengths } {
                    for &gso_size in &lengths {
                        for &csum_start in &starts {
                            for &csum_offset in &offsets {
                                let said = Claim {
                                    flags,
                                    kind,
                                    hdr_len,
                                    gso_size,
                                    csum_start,
                                    csum_offset,
                                };
                                let taken = taken(said, &sample);
                                tried += 1;
                                if taken != truth(said, &sample) {
                                    panic!("{}: {said:?} taken for {taken:?}", sample.what);
                                }
                                // Whatever it claims of its headers' length.
                                match taken {
                                    Taken::Gso { .. } if seen.insert(taken) => {
                                        cut(said, &sample);
                                        cuts += 1;
                                    }
                                    Taken::Unfinished { start, field } if seen.insert(taken) => {
                                        finish(start, field, &sample);
                                        finished += 1;
                                    }
                                    _ => (),
                                }
                            }
                        }
                    }
                }
            }
        }
    }
    assert!(
        tried > if slow { 1_500_000 } else { 6_000_000 } && cuts > 80 && finished > 150,
        "{tried} tried, {cuts} cut, {finished} finished"
    );
}
