//! Superpackets without I/O: ours beside tun-rs, in turns, on one thread.
//!
//! ```sh
//! cargo bench -p tun_driver_peers --bench offload
//! ```
//!
//! | case | what is timed | what is not |
//! |---|---|---|
//! | checksum | the sum over so many bytes, in cache; beside `copy_from_slice` of as many | |
//! | split, in place | each segment of a 64 KiB superpacket made and looked at, one after the other, out of the same memory | refilling that memory |
//! | split, apart | all segments in buffers of their own, as `gso_split` leaves them | |
//! | coalesce | a batch of packets of one flow grouped, the headers written; the payloads stay where they are, for a gathered write | `handle_gro`'s fresh tables; refilling its buffers |
//! | coalesce, copied | the same, and the payloads copied behind the headers, as `handle_gro` leaves them | as above |
//!
//! A row is the median of the rounds; the ratio is formed within rounds, ours by theirs, and its range is told.

use std::hint::black_box;
use std::time::Instant;

use tun_driver::offload::checksum::{pseudo_header, sum};
use tun_driver::offload::coalesce::HEADERS_MAX;
use tun_driver::offload::{GroTable, Headers, Limits, Link, Meta, Plan, Segments, VnetHdr};

const ROUNDS: usize = 41;
/// Calls per turn.
const CALLS: usize = 400;
const HEADROOM: usize = tun_rs::VIRTIO_NET_HDR_LEN;

fn main() {
    println!("| case | ours, ns | the other, ns | ours ÷ the other |");
    println!("|---|--:|--:|--:|");
    checksums();
    for (name, v6, tcp, size) in [
        ("TCP/IPv4, 1400 B", false, true, 1_400),
        ("TCP/IPv6, 1400 B", true, true, 1_400),
        ("UDP/IPv4, 1200 B", false, false, 1_200),
        ("TCP/IPv4, 500 B", false, true, 520),
    ] {
        splits(name, v6, tcp, size);
        coalesces(name, v6, tcp, size);
    }
}

/// Takes turns, and tells the medians per unit.
fn compare(name: &str, units: usize, mut ours: impl FnMut() -> f64, mut theirs: impl FnMut() -> f64) {
    let (mut a, mut b, mut ratios) = (Vec::new(), Vec::new(), Vec::new());
    for round in 0..=ROUNDS {
        let (one, two) = if round % 2 == 0 {
            let one = ours();
            (one, theirs())
        } else {
            let two = theirs();
            (ours(), two)
        };
        // The first round warms up.
        if round > 0 {
            a.push(one / units as f64);
            b.push(two / units as f64);
            ratios.push(one / two);
        }
    }
    let median = |values: &mut Vec<f64>| {
        values.sort_by(f64::total_cmp);
        values[values.len() / 2]
    };
    let (a, b, ratio) = (median(&mut a), median(&mut b), median(&mut ratios));
    let (low, high) = (ratios[ratios.len() / 10], ratios[ratios.len() * 9 / 10]);
    println!("| {name} | {a:.2} | {b:.2} | {ratio:.2} [{low:.2}–{high:.2}] |");
}

/// Nanoseconds of one call, of many.
fn timed(calls: usize, mut call: impl FnMut()) -> f64 {
    let start = Instant::now();
    (0..calls).for_each(|_| call());
    start.elapsed().as_nanos() as f64 / calls as f64
}

fn checksums() {
    for len in [20, 64, 256, 1_500, 9_000, 65_536] {
        let bytes: Vec<u8> = (0..len).map(|byte| byte as u8).collect();
        let mut copy = vec![0; len];
        let calls = (4 << 20) / len;
        compare(
            &format!("checksum, {len} B ÷ a copy"),
            1,
            || timed(calls, || _ = black_box(sum(black_box(&bytes)).checksum())),
            || timed(calls, || black_box(&mut copy).copy_from_slice(black_box(&bytes))),
        );
    }
}

/// A superpacket of 64 KiB at most, with the checksum's seed, as the kernel hands it up.
fn superpacket(v6: bool, tcp: bool, size: usize) -> (VnetHdr, Vec<u8>) {
    let transport = if tcp { 32 } else { 8 };
    let network = if v6 { 40 } else { 20 };
    let payload = (65_535 - network - transport) / size * size;
    let payload = payload.min(64 * size);
    let mut packet = if v6 {
        let mut header = vec![0x60, 0, 0, 0, 0, 0, if tcp { 6 } else { 17 }, 64];
        header[4..6].copy_from_slice(&((transport + payload) as u16).to_be_bytes());
        header.extend([0xfd; 32]);
        header
    } else {
        let mut header = vec![0x45, 0, 0, 0, 0, 1, 0x40, 0, 64, if tcp { 6 } else { 17 }, 0, 0];
        header[2..4].copy_from_slice(&((network + transport + payload) as u16).to_be_bytes());
        header.extend([10, 0, 0, 1, 10, 0, 0, 2]);
        let checksum = sum(&header).checksum();
        header[10..12].copy_from_slice(&checksum);
        header
    };
    packet.extend([0x9c, 0x40, 0, 80]);
    if tcp {
        packet.extend([0, 0, 1, 0, 1, 2, 3, 4, 0x80, 0x10, 2, 0, 0, 0, 0, 0]);
        packet.extend([1, 1, 8, 10, 9, 8, 7, 6, 5, 4, 3, 2]);
    } else {
        packet.extend(((8 + payload) as u16).to_be_bytes());
        packet.extend([0, 0]);
    }
    packet.extend((0..payload).map(|byte| (byte * 31) as u8));
    let headers = Headers::parse(&packet, Link::None).expect("headers");
    let (source, target) = headers.addresses(&packet).expect("addresses");
    let seed = pseudo_header(source, target, headers.protocol, (transport + payload) as u32).seed();
    let offset = if tcp { 16 } else { 6 };
    let field = headers.transport + offset;
    packet[field..field + 2].copy_from_slice(&seed);
    let kind = match (tcp, v6) {
        (true, false) => 1,
        (true, true) => 4,
        (false, _) => 5,
    };
    let mut said = [1, kind, 0, 0, 0, 0, 0, 0, 0, 0];
    for (at, word) in [(2, headers.payload), (4, size), (6, headers.transport), (8, offset)] {
        said[at..at + 2].copy_from_slice(&(word as u16).to_ne_bytes());
    }
    (VnetHdr::from_bytes(said), packet)
}

fn plan_of(header: VnetHdr, packet: &[u8]) -> tun_driver::offload::Gso {
    match header.check(packet, Link::None) {
        Ok(Meta::Gso(gso)) => gso,
        other => panic!("{other:?}"),
    }
}

fn their_header(header: VnetHdr) -> tun_rs::VirtioNetHdr {
    tun_rs::VirtioNetHdr::decode(&header.to_bytes()).expect("a header")
}

fn splits(name: &str, v6: bool, tcp: bool, size: usize) {
    let (header, original) = superpacket(v6, tcp, size);
    let gso = plan_of(header, &original);
    let count = Plan::new(&gso, &original).expect("a plan").count();
    let mut theirs = vec![vec![0; 2_048]; count];
    let mut sizes = vec![0; count];
    let mut input = original.clone();
    let mut gso_split = || {
        timed(CALLS, || {
            let done = tun_rs::gso_split(&mut input, their_header(header), &mut theirs, &mut sizes, 0, v6);
            assert_eq!(black_box(done).expect("split"), count);
        })
    };
    let mut packet = original.clone();
    compare(
        &format!("split in place, {name}: per segment"),
        count,
        || {
            let mut time = 0.0;
            for _ in 0..CALLS {
                packet.copy_from_slice(&original);
                time += timed(1, || {
                    let gso = plan_of(header, &packet);
                    let mut segments = Segments::new(&gso, &mut packet).expect("segments");
                    while let Some(segment) = segments.next() {
                        black_box(segment);
                    }
                });
            }
            time / CALLS as f64
        },
        &mut gso_split,
    );
    let mut ours = vec![vec![0; 2_048]; count];
    compare(
        &format!("split apart, {name}: per segment"),
        count,
        || {
            timed(CALLS, || {
                let gso = plan_of(header, &original);
                let plan = Plan::new(&gso, &original).expect("a plan");
                for (index, to) in ours.iter_mut().enumerate() {
                    let payload = plan.header(index, &original, to).expect("a segment");
                    to[plan.header_len()..plan.header_len() + payload.len()].copy_from_slice(&original[payload]);
                }
                black_box(&ours);
            })
        },
        &mut gso_split,
    );
    for (index, (ours, theirs)) in ours.iter().zip(&theirs).enumerate() {
        assert!(
            ours[..sizes[index]] == theirs[..sizes[index]],
            "{name}: segment {index} differs"
        );
    }
}

fn coalesces(name: &str, v6: bool, tcp: bool, size: usize) {
    let (header, mut packet) = superpacket(v6, tcp, size);
    let gso = plan_of(header, &packet);
    let mut segments = Segments::new(&gso, &mut packet).expect("segments");
    let mut packets = Vec::new();
    while let Some(segment) = segments.next() {
        packets.push(segment.to_vec());
    }
    let framed: Vec<Vec<u8>> = packets
        .iter()
        .map(|packet| [&[0; HEADROOM][..], packet].concat())
        .collect();
    let mut work = framed.clone();
    work.iter_mut().for_each(|buffer| buffer.reserve(70_000));
    let mut handle_gro = || {
        let mut time = 0.0;
        for _ in 0..CALLS {
            for (buffer, packet) in work.iter_mut().zip(&framed) {
                buffer.clear();
                buffer.extend(packet);
            }
            let (mut tcp_table, mut udp_table, mut to_write) = (Default::default(), Default::default(), Vec::new());
            time += timed(1, || {
                tun_rs::handle_gro(&mut work, HEADROOM, &mut tcp_table, &mut udp_table, true, &mut to_write)
                    .expect("gro");
                black_box(&work);
            });
            assert_eq!(to_write.len(), 1, "{name}: theirs");
        }
        time / CALLS as f64
    };
    let mut table = GroTable::new(128, Limits::default());
    compare(
        &format!("coalesce, {name}: per packet"),
        packets.len(),
        || {
            timed(CALLS, || {
                let mut groups = 0;
                for group in table.coalesce(&packets, Link::None) {
                    black_box(group.headers(&packets, &mut [0; HEADERS_MAX]));
                    black_box(group.parts().count());
                    groups += 1;
                }
                assert_eq!(groups, 1, "{name}: ours");
            })
        },
        &mut handle_gro,
    );
    let mut whole = Vec::with_capacity(70_000);
    compare(
        &format!("coalesce, copied, {name}: per packet"),
        packets.len(),
        || {
            timed(CALLS, || {
                for group in table.coalesce(&packets, Link::None) {
                    let mut headers = [0; HEADERS_MAX];
                    let (vnet, headers) = group.headers(&packets, &mut headers).expect("merged");
                    whole.clear();
                    whole.extend(vnet.to_bytes());
                    whole.extend(headers);
                    group
                        .parts()
                        .for_each(|(index, payload)| whole.extend(&packets[index][payload]));
                }
                black_box(&whole);
            })
        },
        &mut handle_gro,
    );
}
