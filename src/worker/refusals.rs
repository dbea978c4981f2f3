//! A test of what goes out, against a kernel that refuses at will: nothing is lost, nothing comes twice, nothing overtakes within a flow.
#![allow(unsafe_code)]

use std::collections::HashMap;

use proptest::prelude::*;

use super::outgoing::{self, Outbox, Writer};
use super::port::Ports;
use super::{Context, Worker, WorkerConfig};
use crate::error::PortError;
use crate::lab::Sandbox;
use crate::offload::checksum::{pseudo_header, sum};
use crate::offload::{Headers, Link, Meta, Offloads, Segments, VnetHdr, vnet};
use crate::{Backend, Batch, Builder, Mode, PortErrorKind};

/// A kernel: takes what it is given onto a wire, except what it refuses.
struct Kernel {
    vnet: bool,
    /// Of the writes to come: what is refused, and how.
    moods: std::vec::IntoIter<Mood>,
    /// Whole packets, in the order in which they came.
    wire: Vec<Vec<u8>>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mood {
    Takes,
    /// Superpackets only.
    RefusesSuperpackets,
    Full,
}

impl Writer for Kernel {
    fn fault(&mut self, _: &Context) -> Option<PortError> {
        None
    }

    fn perform(
        &mut self,
        _: &mut Context,
        _: &mut Ports,
        _: usize,
        outbox: &mut Outbox,
    ) -> Result<(), outgoing::Unperformed> {
        let mut over = false;
        for (write, result) in outbox.writes.iter().zip(&mut outbox.results) {
            let mood = self.moods.next().unwrap_or(Mood::Takes);
            *result = match mood {
                _ if over => -libc::ECANCELED,
                Mood::Full => -libc::EAGAIN,
                Mood::RefusesSuperpackets if write.kind.is_some() => -libc::EINVAL,
                _ => {
                    self.take(&bytes_of(write));
                    write.len as i32
                }
            };
            over |= *result < 0;
        }
        Ok(())
    }
}

fn bytes_of(write: &outgoing::Write) -> Vec<u8> {
    // SAFETY: the outbox names memory that lives while a write is performed.
    let slice = |at: *const u8, len: usize| unsafe { std::slice::from_raw_parts(at, len) };
    let bytes = match write.parts {
        0 => slice(write.at, write.len as usize).to_vec(),
        parts => {
            // SAFETY: as above; it names that many iovecs.
            let parts = unsafe { std::slice::from_raw_parts(write.at.cast::<libc::iovec>(), parts as usize) };
            parts
                .iter()
                .flat_map(|part| slice(part.iov_base.cast(), part.iov_len))
                .copied()
                .collect()
        }
    };
    assert_eq!(bytes.len(), write.len as usize);
    bytes
}

impl Kernel {
    fn take(&mut self, bytes: &[u8]) {
        if !self.vnet {
            return self.wire.push(bytes.to_vec());
        }
        let (header, packet) = bytes.split_first_chunk().expect("a header");
        let mut packet = packet.to_vec();
        match VnetHdr::from_bytes(*header)
            .check(&packet, Link::None)
            .expect("a header that fits")
        {
            Meta::Gso(gso) => {
                let mut segments = Segments::new(&gso, &mut packet).unwrap();
                while let Some(segment) = segments.next() {
                    self.wire.push(segment.to_vec());
                }
            }
            Meta::Unfinished { start, field } => {
                vnet::finish(&mut packet, start, field);
                self.wire.push(packet);
            }
            _ => self.wire.push(packet),
        }
    }
}

/// What is offered: packets of some flows, each the next of its flow.
#[derive(Clone, Copy, Debug)]
struct Offer {
    flow: u8,
    tcp: bool,
    /// Payloads of one size; 0 sizes: a pure ACK or an empty datagram.
    pieces: usize,
    size: usize,
    push: bool,
    unfinished: bool,
}

fn offers() -> impl Strategy<Value = Vec<Offer>> {
    let offer = (
        0u8..3,
        any::<bool>(),
        0usize..12,
        prop::sample::select(vec![1usize, 100, 1000]),
        any::<bool>(),
        any::<bool>(),
    );
    prop::collection::vec(
        offer.prop_map(|(flow, tcp, pieces, size, push, unfinished)| Offer {
            flow,
            tcp,
            // Mostly plain packets.
            pieces: if pieces > 6 { pieces - 4 } else { pieces.min(1) },
            size,
            push,
            unfinished,
        }),
        1..90,
    )
}

/// One packet, plain or super, that continues its flow, and the packets that it stands for.
fn build(offer: &Offer, flows: &mut HashMap<(u8, bool), (u32, u16)>) -> (Vec<u8>, Option<Meta>, Vec<Vec<u8>>) {
    let (sequence, identification) = flows.entry((offer.flow, offer.tcp)).or_insert((1, 1));
    let payload: Vec<u8> = (0..offer.pieces * offer.size)
        .map(|at| (at as u32 + *sequence) as u8)
        .collect();
    let transport = if offer.tcp { 20 } else { 8 };
    let total = 20 + transport + payload.len();
    let protocol = if offer.tcp { 6 } else { 17 };
    let mut packet = vec![0x45, 0, (total >> 8) as u8, total as u8];
    packet.extend(identification.to_be_bytes());
    packet.extend([0x40, 0, 64, protocol, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
    packet.extend([0x10, offer.flow, 0, 80]);
    if offer.tcp {
        packet.extend(sequence.to_be_bytes());
        packet.extend([0, 0, 0, 9, 0x50, if offer.push { 0x18 } else { 0x10 }, 1, 0, 0, 0, 0, 0]);
    } else {
        packet.extend(((total - 20) as u16).to_be_bytes());
        packet.extend([0, 0]);
    }
    packet.extend(&payload);
    *sequence = sequence.wrapping_add(payload.len() as u32);
    *identification = identification.wrapping_add(offer.pieces.max(1) as u16);
    let checksum = sum(&packet[..20]).checksum();
    packet[10..12].copy_from_slice(&checksum);
    let field = if offer.tcp { 36 } else { 26 };
    let seed = pseudo_header(&[10, 0, 0, 1], &[10, 0, 0, 2], protocol, total as u32 - 20).seed();
    packet[field..field + 2].copy_from_slice(&seed);
    let mut whole = packet.clone();
    vnet::finish(&mut whole, 20, field);
    if offer.pieces < 2 {
        return if offer.unfinished {
            (packet, Some(Meta::Unfinished { start: 20, field }), vec![whole])
        } else {
            (whole.clone(), None, vec![whole])
        };
    }
    let mut header = [1, if offer.tcp { 1 } else { 5 }, 0, 0, 0, 0, 20, 0, field as u8 - 20, 0];
    header[4..6].copy_from_slice(&(offer.size as u16).to_ne_bytes());
    header[6..8].copy_from_slice(&20_u16.to_ne_bytes());
    header[8..10].copy_from_slice(&(field as u16 - 20).to_ne_bytes());
    let meta = VnetHdr::from_bytes(header).check(&packet, Link::None).unwrap();
    let Meta::Gso(gso) = meta else { panic!("{meta:?}") };
    let mut copy = packet.clone();
    let mut segments = Segments::new(&gso, &mut copy).unwrap();
    let mut all = Vec::new();
    while let Some(segment) = segments.next() {
        all.push(segment.to_vec());
    }
    (packet, Some(meta), all)
}

fn by_flow(packets: &[Vec<u8>]) -> HashMap<(u8, Vec<u8>), Vec<&[u8]>> {
    let mut flows: HashMap<_, Vec<&[u8]>> = HashMap::new();
    for packet in packets {
        let headers = Headers::parse(packet, Link::None).unwrap();
        let ports = packet[headers.transport..headers.transport + 4].to_vec();
        flows.entry((headers.protocol, ports)).or_default().push(packet);
    }
    flows
}

#[test]
// T22
fn nothing_is_lost_doubled_or_overtaken() {
    if let Err(error) = Sandbox::enter() {
        assert!(
            std::env::var_os("TUN_DRIVER_REQUIRE_NETNS").is_none(),
            "no network namespace: {error}"
        );
        return eprintln!("skipped: no network namespace: {error}");
    }
    let moods = prop::collection::vec(
        prop_oneof![6 => Just(Mood::Takes), 2 => Just(Mood::RefusesSuperpackets), 1 => Just(Mood::Full)],
        0..200,
    );
    let offloads = prop::sample::select(vec![
        Offloads::none(),
        Offloads::CSUM,
        Offloads::TSO4,
        Offloads::USO,
        Offloads::all(),
    ]);
    proptest!(ProptestConfig::with_cases(300), |(offers in offers(), moods in moods, offloads in offloads, hoard in any::<bool>())| {
        let device = Builder::new("", Mode::Tun).offloads(offloads).open().unwrap();
        let mut worker = Worker::new(&WorkerConfig {
            backend: Some(Backend::Syscalls),
            buffers: 256,
            large_buffers: 128,
            ..WorkerConfig::default()
        }).unwrap();
        let port = worker.attach(device.into_queues().remove(0)).unwrap();
        let (mut flows, mut expected) = (HashMap::new(), Vec::new());
        let mut batch = Batch::with_capacity(offers.len());
        for offer in &offers {
            let (bytes, meta, whole) = build(offer, &mut flows);
            let mut packet = worker.packet_from(&bytes).unwrap();
            if let Some(meta) = meta {
                packet.set_meta(meta).unwrap();
            }
            batch.push(packet).unwrap();
            expected.extend(whole);
        }
        // Without a free buffer, what has to be cut is cut in its place.
        let held: Vec<_> = std::iter::from_fn(|| worker.packet(1).filter(|_| hoard)).collect();
        let mut kernel = Kernel { vnet: !offloads.is_empty(), moods: moods.into_iter(), wire: Vec::new() };
        let Worker { outbox, cx, ports, .. } = &mut worker;
        let index = ports.check(port).unwrap();
        let mut accepted = 0;
        for _ in 0..2_000 {
            let sent = outgoing::send(&mut kernel, outbox, cx, ports, index, &mut batch);
            accepted += sent.accepted;
            if let Some(error) = sent.stopped {
                prop_assert_eq!(error.kind(), PortErrorKind::Backpressure);
            }
            if batch.is_empty() {
                break;
            }
            prop_assert!(sent.stopped.is_some(), "it goes on until something stops it");
        }
        drop(held);
        let counters = worker.counters(port).unwrap();
        prop_assert_eq!(accepted as u64, counters.sent_packets);
        prop_assert_eq!(counters.sent_packets + counters.refused_packets, offers.len() as u64);
        prop_assert_eq!(counters.refused_packets, 0);
        prop_assert_eq!(by_flow(&kernel.wire), by_flow(&expected));
        let (free, all) = worker.buffers();
        prop_assert_eq!(free, all);
    });
}
