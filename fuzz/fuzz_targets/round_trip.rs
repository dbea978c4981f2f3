//! Good runs of several flows, mixed: they merge as far as they may, and cut again they are what they were. And a superpacket: cut and merged again, it
//! is what it was.
#![no_main]

use arbitrary::{Arbitrary, Unstructured};
use libfuzzer_sys::fuzz_target;
use tun_driver::offload::{GroTable, Limits, Meta, VnetHdr};
use tun_driver_fuzz::{Shape, cut, expected, link, payload, rarely, shape, superpacket};

#[derive(Debug)]
enum Case {
    Runs {
        packets: Vec<(usize, Vec<u8>)>,
        flows: Vec<Shape>,
        limits: Limits,
    },
    Whole {
        shape: Shape,
        size: u16,
        hdr_len: u16,
    },
}

impl<'a> Arbitrary<'a> for Case {
    fn arbitrary(bytes: &mut Unstructured<'a>) -> arbitrary::Result<Self> {
        if bytes.arbitrary()? { runs(bytes) } else { whole(bytes) }
    }
}

const SYN_RST_URG: u8 = 0x26;
const FIN_PSH: u8 = 0x09;
const CWR: u8 = 0x80;

fn runs(bytes: &mut Unstructured<'_>) -> arbitrary::Result<Case> {
    let limits = Limits {
        segments: bytes.int_in_range(1..=130)?,
        bytes: if bytes.arbitrary()? {
            65_535
        } else {
            bytes.int_in_range(0..=65_535)?
        },
        ..Limits::default()
    };
    let mut flows = Vec::<Shape>::new();
    let mut left = Vec::new();
    for number in 0..bytes.int_in_range(1..=4)? {
        let mut flow = shape(bytes)?;
        flow.tags = flows.first().map_or(flow.tags, |first| first.tags);
        flow.flags &= !(SYN_RST_URG | FIN_PSH | CWR);
        // All of them different flows, between the same addresses.
        flow.ports[0] = number;
        if !flow.v6 || flow.tcp {
            flow.extra = 0;
        }
        // Long runs take most of the time: rare.
        let count = if rarely(bytes, 32)? {
            bytes.int_in_range(1u8..=140)?
        } else {
            bytes.int_in_range(1..=9)?
        };
        // At most a little more than one superpacket.
        let most = if rarely(bytes, 8)? {
            (70_000 / usize::from(count)).min(20_000)
        } else {
            100
        };
        let size = bytes.int_in_range(1..=most)?;
        // An identification that stays the same.
        let stays = flow.keep_whole && rarely(bytes, 4)?;
        left.push((
            count,
            size,
            stays,
            bytes.int_in_range(1..=size)?,
            bytes.arbitrary::<u8>()?,
        ));
        flows.push(flow);
    }
    let original = flows.clone();
    let mut packets = Vec::new();
    while left.iter().any(|&(left, ..)| left > 0) {
        let mut number = bytes.int_in_range(0..=flows.len() - 1).unwrap_or(0);
        while left[number].0 == 0 {
            number = (number + 1) % flows.len();
        }
        let (count, size, stays, last, end) = &mut left[number];
        *count -= 1;
        let flow = &mut flows[number];
        let mut packet = flow.clone();
        packet.payload = payload(packets.len() as u8, if *count == 0 { *last } else { *size });
        if *count == 0 && flow.tcp {
            packet.flags |= *end & FIN_PSH;
        }
        flow.sequence = flow.sequence.wrapping_add(*size as u32);
        flow.identification = flow.identification.wrapping_add(u16::from(!*stays));
        packets.push((number, packet.packet()));
    }
    Ok(Case::Runs {
        packets,
        flows: original,
        limits,
    })
}

fn whole(bytes: &mut Unstructured<'_>) -> arbitrary::Result<Case> {
    let mut shape = shape(bytes)?;
    shape.flags &= !SYN_RST_URG;
    if !shape.v6 {
        shape.extra = 0;
    }
    let headers = shape.headers() - shape.network() - if shape.v6 { 40 } else { 0 };
    let most = if rarely(bytes, 16)? { 65_535 - headers } else { 2_000 };
    let len = bytes.int_in_range(0..=most)?;
    let size = bytes.int_in_range(1..=u16::MAX)?;
    // Many of a long superpacket are slow, and rare.
    let least = if rarely(bytes, 16)? { 1 } else { (len / 50) as u16 };
    let size = if bytes.ratio(3, 4)? { size % 1_500 + 1 } else { size }.max(least);
    shape.payload = payload(bytes.arbitrary()?, len);
    Ok(Case::Whole {
        shape,
        size,
        hdr_len: bytes.arbitrary()?,
    })
}

fuzz_target!(|case: Case| match case {
    Case::Runs { packets, flows, limits } => merge_and_cut(packets, &flows, limits),
    Case::Whole { shape, size, hdr_len } => cut_and_merge(&shape, size, hdr_len),
});

fn merge_and_cut(packets: Vec<(usize, Vec<u8>)>, flows: &[Shape], limits: Limits) {
    let link = link(&flows[0]);
    let (flow_of, packets): (Vec<usize>, Vec<Vec<u8>>) = packets.into_iter().unzip();
    // As many as fit, flow by flow.
    let mut wanted: Vec<Vec<usize>> = Vec::new();
    let mut open: Vec<Option<(usize, usize)>> = vec![None; flows.len()];
    for (index, packet) in packets.iter().enumerate() {
        let flow = &flows[flow_of[index]];
        let payload = packet.len() - flow.headers();
        let short = payload < if flow.tcp { 8 } else { 1 };
        let ended = short || flow.tcp && packet[flow.transport() + 13] & FIN_PSH != 0;
        match &mut open[flow_of[index]] {
            Some((group, bytes)) if wanted[*group].len() < limits.segments && *bytes + payload <= limits.bytes => {
                wanted[*group].push(index);
                *bytes += payload;
            }
            none => {
                wanted.push(vec![index]);
                *none = (!ended).then(|| (wanted.len() - 1, packet.len() - flow.network()));
            }
        }
    }
    let mut table = GroTable::new(packets.len(), limits);
    let groups = table.coalesce(&packets, link);
    assert_eq!(groups.len(), wanted.len());
    for (group, wanted) in groups.zip(wanted) {
        let places: Vec<usize> = group.parts().map(|(index, _)| index).collect();
        assert_eq!(places, wanted);
        let Some((_, gso, merged)) = superpacket(&group, &packets, link) else {
            continue;
        };
        let segments = cut(&gso, &merged);
        assert_eq!(segments.len(), places.len());
        for (place, (segment, &index)) in segments.iter().zip(&places).enumerate() {
            assert_eq!(
                *segment,
                expected(&packets[index], &packets[places[0]], place, link),
                "packet {index}"
            );
        }
    }
}

fn cut_and_merge(shape: &Shape, size: u16, hdr_len: u16) {
    let link = link(shape);
    let original = shape.seeded();
    let (kind, ecn) = match (shape.tcp, shape.v6) {
        (true, false) => (1, shape.flags & CWR),
        (true, true) => (4, shape.flags & CWR),
        (false, _) => (5, 0),
    };
    let mut said = [1, kind | ecn, 0, 0, 0, 0, 0, 0, 0, 0];
    let words = [hdr_len, size, shape.transport() as u16, shape.offset() as u16];
    for (field, word) in said[2..].chunks_exact_mut(2).zip(words) {
        field.copy_from_slice(&word.to_ne_bytes());
    }
    let said = VnetHdr::from_bytes(said);
    let Ok(Meta::Gso(gso)) = said.check(&original, link) else {
        panic!("{:?}", said.check(&original, link))
    };
    let segments = cut(&gso, &original);
    // IPv6 can say more than is merged; CWR and TCP behind extension headers go alone.
    if original.len() - shape.network() > 65_535 || shape.tcp && (shape.flags & CWR != 0 || shape.extra > 0) {
        return;
    }
    let limits = Limits {
        segments: usize::MAX,
        ..Limits::default()
    };
    let mut table = GroTable::new(segments.len(), limits);
    let mut groups = table.coalesce(&segments, link);
    assert_eq!(groups.len(), 1);
    let Some((vnet, again, merged)) = superpacket(&groups.next().unwrap(), &segments, link) else {
        // One segment: as it would be on a wire.
        assert_eq!(segments, [shape.packet()]);
        return;
    };
    assert_eq!(merged, original);
    assert_eq!((again, vnet), (gso, VnetHdr::of(&gso)));
}
