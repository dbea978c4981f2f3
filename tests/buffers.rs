//! Packets, travelling packets and batches, through the public API. No device is needed.

mod common;

use std::net::{SocketAddr, UdpSocket};
use std::sync::mpsc;
use std::thread;

use common::trial;
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use tun_driver::{Backend, Batch, Builder, Mode, NoRoom, PacketBuf, RemoteBuf, Worker, WorkerConfig};

fn main() {
    common::run(vec![
        trial("headroom and tailroom as configured", rooms),
        trial(
            "a packet changes as a vector does, with views that never overlap",
            model,
        ),
        trial("no room leaves a packet as it was, and says how much there is", no_room),
        trial("new bytes are zero, whatever was there", zeroed),
        trial("a split beyond the end panics and changes nothing", split_beyond),
        trial("buffers run out and come back", exhaustion),
        trial("packets outlive their worker", outlive),
        trial("a travelling packet comes home without a copy", home),
        trial("a travelling packet comes to another worker with a copy", foreign),
        trial("another worker without a buffer hands it back", handed_back),
        trial(
            "a travelling packet is dropped elsewhere, also after its worker",
            dropped_elsewhere,
        ),
        trial("parts of a packet go home one by one from many threads", parts),
        trial("a batch: capacity, order, what it hands back", batch),
        trial("a batch counts what is discarded from it", discarded),
        trial("large packets take large buffers, small ones small", classes),
        trial("a place is used by ports of two classes in turn", two_classes).alone(),
    ])
}

fn small(buffers: usize) -> Worker {
    Worker::new(&WorkerConfig {
        backend: Some(Backend::Syscalls),
        buffers,
        ..WorkerConfig::default()
    })
    .unwrap()
}

fn all_free(worker: &Worker) {
    let (free, all) = worker.buffers();
    assert_eq!(free, all);
}

fn rooms() {
    for (headroom, tailroom) in [(0, 0), (64, 0), (65, 1), (96, 64), (500, 700), (4096, 4096)] {
        for backend in [Backend::IoUring, Backend::Syscalls] {
            let worker = Worker::new(&WorkerConfig {
                backend: Some(backend),
                buffers: 16,
                headroom,
                tailroom,
                max_packet: 1500,
                ..WorkerConfig::default()
            })
            .unwrap();
            let mut packet = worker.packet(1500).unwrap();
            assert!(packet.headroom() >= headroom.max(64), "{headroom}: {packet:?}");
            assert!(packet.tailroom() >= tailroom, "{tailroom}: {packet:?}");
            // All of it may be used.
            let (front, back) = (packet.headroom(), packet.tailroom());
            packet.prepend(&vec![1; front]).unwrap();
            packet.append(&vec![2; back]).unwrap();
            assert_eq!((packet.headroom(), packet.tailroom()), (0, 0));
            assert_eq!(packet.len(), front + 1500 + back);
            assert_eq!(packet.iter().filter(|&&byte| byte == 0).count(), 1500);
            // The longest one, too.
            let packet = worker.packet(worker.longest_packet()).unwrap();
            assert!(packet.headroom() >= headroom.max(64) && packet.tailroom() >= tailroom);
            assert!(worker.packet(worker.longest_packet() + 1).is_none());
            assert!(worker.packet(usize::MAX).is_none());
        }
    }
}

#[derive(Clone, Debug)]
enum Step {
    Prepend(Vec<u8>),
    Append(Vec<u8>),
    GrowFront(usize),
    GrowBack(usize),
    TrimFront(usize),
    Truncate(usize),
    Write(usize, u8),
    Split(usize),
    Travel,
    Drop,
}

fn step() -> impl Strategy<Value = Step> {
    let bytes = || proptest::collection::vec(any::<u8>(), 0..150);
    prop_oneof![
        bytes().prop_map(Step::Prepend),
        bytes().prop_map(Step::Append),
        (0usize..150).prop_map(Step::GrowFront),
        (0usize..150).prop_map(Step::GrowBack),
        (0usize..100).prop_map(Step::TrimFront),
        (0usize..300).prop_map(Step::Truncate),
        (any::<usize>(), any::<u8>()).prop_map(|(at, byte)| Step::Write(at, byte)),
        any::<usize>().prop_map(Step::Split),
        Just(Step::Travel),
        Just(Step::Drop),
    ]
}

/// A view, and what must be in it.
struct Pair {
    packet: PacketBuf,
    bytes: Vec<u8>,
}

impl Pair {
    fn grow(&mut self, result: Result<(), NoRoom>, room: usize, wanted: usize, at_front: bool, new: &[u8]) {
        match result {
            Ok(()) => {
                assert!(wanted <= room);
                let at = if at_front { 0 } else { self.bytes.len() };
                self.bytes.splice(at..at, new.iter().copied());
            }
            Err(no_room) => {
                assert!(wanted > room);
                assert_eq!((no_room.wanted, no_room.available), (wanted, room));
            }
        }
    }
}

fn model() {
    let worker = small(16);
    let mut runner = TestRunner::new(Config {
        cases: 2_000 / common::slowness(),
        failure_persistence: None,
        max_shrink_time: 10_000,
        ..Config::default()
    });
    let steps = proptest::collection::vec((any::<usize>(), step()), 1..60);
    runner
        .run(&steps, |steps| {
            let bytes: Vec<u8> = (0..200).collect();
            let mut pairs = vec![Pair {
                packet: worker.packet_from(&bytes).unwrap(),
                bytes,
            }];
            for (which, step) in steps {
                if pairs.is_empty() {
                    break;
                }
                let which = which % pairs.len();
                let room_for_views = pairs.len() < 20;
                let pair = &mut pairs[which];
                let (head, tail) = (pair.packet.headroom(), pair.packet.tailroom());
                match step {
                    Step::Prepend(new) => {
                        let result = pair.packet.prepend(&new);
                        pair.grow(result, head, new.len(), true, &new);
                    }
                    Step::Append(new) => {
                        let result = pair.packet.append(&new);
                        pair.grow(result, tail, new.len(), false, &new);
                    }
                    Step::GrowFront(count) => {
                        let result = pair.packet.grow_front(count).map(|new| assert_eq!(new.len(), count));
                        pair.grow(result, head, count, true, &vec![0; count]);
                    }
                    Step::GrowBack(count) => {
                        let result = pair.packet.grow_back(count).map(|new| assert_eq!(new.len(), count));
                        pair.grow(result, tail, count, false, &vec![0; count]);
                    }
                    Step::TrimFront(count) => {
                        pair.packet.trim_front(count);
                        pair.bytes.drain(..count.min(pair.bytes.len()));
                    }
                    Step::Truncate(len) => {
                        pair.packet.truncate(len);
                        pair.bytes.truncate(len);
                    }
                    Step::Write(at, byte) if !pair.bytes.is_empty() => {
                        let at = at % pair.bytes.len();
                        pair.packet[at] = byte;
                        pair.bytes[at] = byte;
                    }
                    Step::Split(at) if room_for_views => {
                        let at = at % (pair.bytes.len() + 1);
                        let peer: SocketAddr = "10.0.0.1:1".parse().unwrap();
                        pair.packet.set_peer(Some(peer));
                        let front = pair.packet.split_to(at);
                        assert_eq!((front.headroom(), front.tailroom()), (head, 0));
                        assert_eq!((pair.packet.headroom(), pair.packet.tailroom()), (0, tail));
                        assert_eq!((front.peer(), pair.packet.peer()), (Some(peer), Some(peer)));
                        let rest = pair.bytes.split_off(at);
                        let bytes = std::mem::replace(&mut pair.bytes, rest);
                        pairs.push(Pair { packet: front, bytes });
                    }
                    Step::Travel => {
                        let Pair { packet, bytes } = pairs.swap_remove(which);
                        let place = packet.as_ptr();
                        let remote = packet.into_remote();
                        assert_eq!(remote[..], bytes[..]);
                        let packet = worker.import(remote).unwrap();
                        assert_eq!(
                            (packet.as_ptr(), packet.headroom(), packet.tailroom()),
                            (place, head, tail)
                        );
                        pairs.push(Pair { packet, bytes });
                    }
                    Step::Drop => drop(pairs.swap_remove(which)),
                    _ => {}
                }
                // Every view has its own bytes still: no other one wrote into them.
                for pair in &pairs {
                    prop_assert_eq!(&pair.packet[..], &pair.bytes[..]);
                }
                // What each may use, with its room, is its own.
                let mut ranges: Vec<_> = pairs
                    .iter()
                    .map(|Pair { packet, .. }| {
                        let start = packet.as_ptr() as usize;
                        (start - packet.headroom(), start + packet.len() + packet.tailroom())
                    })
                    .collect();
                ranges.sort_unstable();
                prop_assert!(ranges.windows(2).all(|pair| pair[0].1 <= pair[1].0), "{:?}", ranges);
                let used = usize::from(!pairs.is_empty());
                prop_assert_eq!(worker.buffers(), (16 - used, 16), "one buffer, however many views");
            }
            drop(pairs);
            prop_assert_eq!(worker.buffers(), (16, 16));
            Ok(())
        })
        .unwrap();
}

fn no_room() {
    let worker = small(16);
    let mut packet = worker.packet_from(b"unchanged").unwrap();
    let (head, tail) = (packet.headroom(), packet.tailroom());
    let check = |packet: &PacketBuf, error: NoRoom, room: usize| {
        assert_eq!((error.wanted, error.available), (room + 1, room));
        assert!(error.to_string().contains("headroom"), "{error}");
        assert_eq!(std::io::Error::from(error).kind(), std::io::ErrorKind::InvalidInput);
        assert_eq!(packet[..], *b"unchanged");
        assert_eq!((packet.headroom(), packet.tailroom()), (head, tail));
    };
    let error = packet.prepend(&vec![1; head + 1]).unwrap_err();
    check(&packet, error, head);
    let error = packet.grow_front(head + 1).unwrap_err();
    check(&packet, error, head);
    let error = packet.append(&vec![1; tail + 1]).unwrap_err();
    check(&packet, error, tail);
    let error = packet.grow_back(tail + 1).unwrap_err();
    check(&packet, error, tail);
    packet.grow_front(usize::MAX).unwrap_err();
    packet.grow_back(usize::MAX).unwrap_err();
    assert_eq!(packet[..], *b"unchanged");
    // Trimming and cutting know no error.
    packet.truncate(usize::MAX);
    assert_eq!(packet.len(), 9);
    packet.trim_front(usize::MAX);
    assert!(packet.is_empty());
    assert_eq!(packet.headroom(), head + 9);
}

fn zeroed() {
    let worker = small(16);
    // Dirty every byte of every buffer.
    let dirty: Vec<_> = std::iter::from_fn(|| {
        let mut packet = worker.packet(0)?;
        let (front, back) = (packet.headroom(), packet.tailroom());
        packet.grow_front(front).unwrap().fill(0xee);
        packet.grow_back(back).unwrap().fill(0xee);
        Some(packet)
    })
    .collect();
    assert_eq!(dirty.len(), 16);
    drop(dirty);
    for _ in 0..16 {
        let mut packet = worker.packet(700).unwrap();
        assert!(packet.iter().all(|&byte| byte == 0));
        assert!(packet.grow_front(50).unwrap().iter().all(|&byte| byte == 0));
        assert!(packet.grow_back(50).unwrap().iter().all(|&byte| byte == 0));
        packet.fill(0xdd);
        // Also what was part of the packet before.
        packet.truncate(400);
        packet.trim_front(100);
        assert!(packet.grow_back(200).unwrap().iter().all(|&byte| byte == 0));
        assert!(packet.grow_front(100).unwrap().iter().all(|&byte| byte == 0));
        assert_eq!(packet.iter().filter(|&&byte| byte == 0xdd).count(), 300);
    }
}

fn split_beyond() {
    let worker = small(16);
    let mut packet = worker.packet_from(b"four").unwrap();
    let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| drop(packet.split_to(5))));
    assert!(result.is_err());
    assert_eq!(packet[..], *b"four");
    let none = packet.split_to(0);
    let all = packet.split_to(4);
    assert_eq!((none.len(), &all[..], packet.len()), (0, &b"four"[..], 0));
    drop((none, all, packet));
    all_free(&worker);
}

fn exhaustion() {
    for backend in [Backend::IoUring, Backend::Syscalls] {
        let worker = Worker::new(&WorkerConfig {
            backend: Some(backend),
            buffers: 32,
            ..WorkerConfig::default()
        })
        .unwrap();
        for _ in 0..100 {
            let mut held: Vec<_> = std::iter::from_fn(|| worker.packet(100)).collect();
            assert_eq!(held.len(), 32);
            assert_eq!(worker.buffers(), (0, 32));
            assert!(worker.packet(0).is_none() && worker.packet_from(b"no").is_none());
            // No two of them share a byte.
            for (index, packet) in held.iter_mut().enumerate() {
                packet.fill(index as u8);
            }
            for (index, packet) in held.iter().enumerate() {
                assert!(packet.iter().all(|&byte| byte == index as u8));
            }
            held.pop();
            assert!(worker.packet(100).is_some());
            drop(held);
            all_free(&worker);
        }
    }
}

fn outlive() {
    for backend in [Backend::IoUring, Backend::Syscalls] {
        let worker = Worker::new(&WorkerConfig {
            backend: Some(backend),
            ..WorkerConfig::default()
        })
        .unwrap();
        let mut packet = worker.packet_from(b"still here").unwrap();
        let mut batch = Batch::with_capacity(4);
        batch.push(worker.packet_from(b"and here").unwrap()).unwrap();
        let remote = worker.packet_from(b"far away").unwrap().into_remote();
        drop(worker);
        packet.prepend(b"I am ").unwrap();
        let front = packet.split_to(5);
        assert_eq!((&front[..], &packet[..]), (&b"I am "[..], &b"still here"[..]));
        assert_eq!(batch[0][..], *b"and here");
        let travelled = packet.into_remote();
        thread::spawn(move || {
            assert_eq!((&remote[..], &travelled[..]), (&b"far away"[..], &b"still here"[..]));
        })
        .join()
        .unwrap();
        // It can be sent by another worker.
        let mut other = small(16);
        let (from, to) = (
            UdpSocket::bind("127.0.0.1:0").unwrap(),
            UdpSocket::bind("127.0.0.1:0").unwrap(),
        );
        from.connect(to.local_addr().unwrap()).unwrap();
        let port = other.attach(from).unwrap();
        assert_eq!(other.send_many(port, &mut batch).accepted, 1);
        let mut bytes = [0; 16];
        assert_eq!(to.recv(&mut bytes).unwrap(), 8);
        assert_eq!(&bytes[..8], b"and here");
    }
    assert_eq!(tun_driver::leaked_arenas(), 0);
}

fn home() {
    let worker = small(16);
    let peer: SocketAddr = "[fd00::1]:7".parse().unwrap();
    let mut packet = worker.packet_from(b"there and back").unwrap();
    packet.trim_front(6);
    packet.set_peer(Some(peer));
    let (place, head, tail) = (packet.as_ptr(), packet.headroom(), packet.tailroom());
    let remote = packet.into_remote();
    assert_eq!(worker.buffers(), (15, 16), "on its way");
    let (give, given) = mpsc::channel();
    thread::spawn(move || {
        let mut remote = remote;
        assert_eq!(remote[..], *b"and back");
        assert_eq!(remote.peer(), Some(peer));
        remote[0] = b'A';
        remote.set_peer(None);
        assert!(format!("{remote:?}").contains("len: 8"));
        give.send(remote).unwrap();
    })
    .join()
    .unwrap();
    let packet = worker.import(given.recv().unwrap()).unwrap();
    assert_eq!(packet.as_ptr(), place, "without a copy");
    assert_eq!(
        (packet.headroom(), packet.tailroom(), packet.peer()),
        (head, tail, None)
    );
    assert_eq!(packet[..], *b"And back");
    assert_eq!(worker.buffers(), (15, 16));
    drop(packet);
    all_free(&worker);
}

fn foreign() {
    let (worker, other) = (small(16), small(16));
    let peer: SocketAddr = "10.0.0.9:9".parse().unwrap();
    let mut packet = worker.packet_from(b"emigrant").unwrap();
    packet.set_peer(Some(peer));
    let place = packet.as_ptr();
    let packet = other.import(packet.into_remote()).unwrap();
    assert_ne!(packet.as_ptr(), place);
    assert_eq!((&packet[..], packet.peer()), (&b"emigrant"[..], Some(peer)));
    all_free(&worker);
    assert_eq!(other.buffers(), (15, 16));
    drop(packet);
    all_free(&other);
    // On another thread.
    let remote = worker.packet_from(b"far").unwrap().into_remote();
    thread::spawn(move || {
        let third = small(16);
        let packet = third.import(remote).unwrap();
        assert_eq!(packet[..], *b"far");
    })
    .join()
    .unwrap();
    all_free(&worker);
}

fn handed_back() {
    let (worker, other) = (small(16), small(16));
    let held: Vec<_> = std::iter::from_fn(|| other.packet(1)).collect();
    let remote = worker.packet_from(b"nobody takes me").unwrap().into_remote();
    let remote = other.import(remote).expect_err("no buffer is free");
    assert_eq!(remote[..], *b"nobody takes me");
    drop(held);
    assert!(other.import(remote).is_ok());
    // Too long for the other's buffers.
    let wide = Worker::new(&WorkerConfig {
        backend: Some(Backend::Syscalls),
        max_packet: 9000,
        buffers: 16,
        ..WorkerConfig::default()
    })
    .unwrap();
    let remote = wide.packet(9000).unwrap().into_remote();
    let remote = other.import(remote).expect_err("too long");
    assert_eq!(remote.len(), 9000);
    assert_eq!(wide.import(remote).unwrap().len(), 9000);
    all_free(&worker);
    all_free(&wide);
    all_free(&other);
}

fn dropped_elsewhere() {
    for backend in [Backend::IoUring, Backend::Syscalls] {
        let worker = Worker::new(&WorkerConfig {
            backend: Some(backend),
            buffers: 64,
            ..WorkerConfig::default()
        })
        .unwrap();
        for _ in 0..50 {
            let remote: Vec<RemoteBuf> = std::iter::from_fn(|| worker.packet(10))
                .map(PacketBuf::into_remote)
                .collect();
            assert_eq!((remote.len(), worker.buffers()), (64, (0, 64)));
            let thread = thread::spawn(move || drop(remote));
            // Some are back before the thread ends, perhaps; all of them after.
            assert!(worker.buffers().0 <= 64);
            thread.join().unwrap();
            assert_eq!(worker.buffers(), (64, 64));
            assert!(worker.packet(1).is_some());
        }
        let remote: Vec<RemoteBuf> = std::iter::from_fn(|| worker.packet(10))
            .map(PacketBuf::into_remote)
            .collect();
        drop(worker);
        thread::spawn(move || {
            assert!(remote.iter().all(|packet| packet.len() == 10));
            drop(remote);
        })
        .join()
        .unwrap();
    }
    assert_eq!(tun_driver::leaked_arenas(), 0);
}

fn parts() {
    let worker = small(32);
    for round in 0..200usize {
        let mut remote = Vec::new();
        let mut kept = Vec::new();
        while let Some(mut packet) = worker.packet(100) {
            for part in 0..4 {
                let front = packet.split_to(20);
                if (round + part) % 3 == 0 {
                    kept.push(front);
                } else {
                    remote.push(front.into_remote());
                }
            }
            remote.push(packet.into_remote());
        }
        assert_eq!(worker.buffers(), (0, 32));
        let other = remote.split_off(remote.len() / 2);
        thread::scope(|scope| {
            scope.spawn(move || remote.into_iter().rev().for_each(drop));
            scope.spawn(move || drop(other));
            kept.drain(..).for_each(drop);
        });
        assert_eq!(worker.buffers(), (32, 32), "round {round}");
    }
}

fn batch() {
    let worker = small(16);
    let mut batch = Batch::with_capacity(3);
    assert_eq!((batch.capacity(), batch.room(), batch.len()), (3, 3, 0));
    assert!(batch.is_empty() && !batch.is_full() && batch.pop().is_none());
    for byte in 0..3u8 {
        assert_eq!(batch.room(), 3 - usize::from(byte));
        batch.push(worker.packet_from(&[byte]).unwrap()).unwrap();
    }
    assert!(batch.is_full());
    let back = batch.push(worker.packet_from(&[9]).unwrap()).expect_err("full");
    assert_eq!(back[..], [9], "handed back whole");
    assert_eq!(batch.iter().map(|packet| packet[0]).collect::<Vec<_>>(), [0, 1, 2]);
    for packet in &mut batch {
        packet[0] += 10;
    }
    for packet in batch.iter_mut() {
        packet[0] += 10;
    }
    batch.swap(0, 2);
    assert_eq!(
        (&batch).into_iter().map(|packet| packet[0]).collect::<Vec<_>>(),
        [22, 21, 20]
    );
    assert_eq!(batch.pop().unwrap()[..], [20]);
    // What a drain leaves is dropped with it.
    let first = batch.drain().next().unwrap();
    assert_eq!((first[0], batch.len(), batch.capacity()), (22, 0, 3));
    drop((first, back));
    all_free(&worker);
    let mut none = Batch::with_capacity(0);
    assert!(none.is_full() && none.is_empty());
    assert!(none.push(worker.packet(1).unwrap()).is_err());
}

fn discarded() {
    let (worker, other) = (small(16), small(16));
    let fill = |worker: &Worker, batch: &mut Batch, count: u8| {
        for byte in 0..count {
            batch.push(worker.packet_from(&[byte]).unwrap()).unwrap();
        }
    };
    let mut batch = Batch::with_capacity(8);
    fill(&worker, &mut batch, 6);
    batch.retain_mut(|packet| {
        packet[0] += 1;
        packet[0] % 2 == 0
    });
    assert_eq!(batch.iter().map(|packet| packet[0]).collect::<Vec<_>>(), [2, 4, 6]);
    assert_eq!(worker.discarded(), 3);
    batch.clear();
    assert_eq!((worker.discarded(), batch.len()), (6, 0));
    fill(&worker, &mut batch, 2);
    fill(&other, &mut batch, 3);
    drop(batch);
    assert_eq!(
        (worker.discarded(), other.discarded()),
        (8, 3),
        "each by its own worker"
    );
    // Taken out is not thrown away.
    let mut batch = Batch::with_capacity(8);
    fill(&worker, &mut batch, 3);
    drop(batch.pop());
    batch.drain().for_each(drop);
    batch.clear();
    drop(batch);
    assert_eq!(worker.discarded(), 8);
    all_free(&worker);
    all_free(&other);
}

fn classes() {
    let worker = Worker::new(&WorkerConfig {
        backend: Some(Backend::Syscalls),
        buffers: 16,
        large_buffers: 4,
        ..WorkerConfig::default()
    })
    .unwrap();
    assert_eq!(worker.buffers(), (20, 20));
    assert!(worker.longest_packet() >= 65_535 + 18);
    let small: Vec<_> = (0..16).map(|_| worker.packet(1000).unwrap()).collect();
    // Small ones take large buffers only when no small one is left.
    let mut large: Vec<_> = (0..4)
        .map(|index| worker.packet(if index % 2 == 0 { 10 } else { 60_000 }).unwrap())
        .collect();
    assert!(worker.packet(1).is_none() && worker.packet(60_000).is_none());
    for (index, packet) in large.iter_mut().enumerate() {
        packet.fill(index as u8);
    }
    assert!(small.iter().all(|packet| packet.iter().all(|&byte| byte == 0)));
    assert!((0..4).all(|index| large[index].iter().all(|&byte| byte == index as u8)));
    drop(small);
    assert!(worker.packet(60_000).is_none() && worker.packet(1000).is_some());
    drop(large);
    all_free(&worker);
}

/// The packets of an earlier port, of the other class, come home while a new port has its place.
fn two_classes() {
    common::need_backend(Backend::IoUring);
    for backend in [Backend::IoUring, Backend::Syscalls] {
        let mut worker = Worker::new(&WorkerConfig {
            backend: Some(backend),
            buffers: 16,
            large_buffers: 16,
            receive_reserve: 4,
            ..WorkerConfig::default()
        })
        .unwrap();
        let device = Builder::new("big%d", Mode::Tun)
            .mtu(9000)
            .address([10, 3, 0, 1], 24)
            .up(true);
        let port = worker.attach(device.open().unwrap().into_queues().remove(0)).unwrap();
        let sender = UdpSocket::bind("0.0.0.0:0").unwrap();
        for _ in 0..8 {
            sender.send_to(&[7; 4000], "10.3.0.2:9").unwrap();
        }
        let mut held = Batch::with_capacity(8);
        while held.len() < 8 {
            worker.recv_many(port, &mut held).unwrap();
        }
        worker.detach(port).unwrap();
        let receiver = UdpSocket::bind("127.0.0.1:0").unwrap();
        let address = receiver.local_addr().unwrap();
        let port = worker.attach(receiver).unwrap();
        let taken: Vec<_> = std::iter::from_fn(|| worker.packet(1500)).collect();
        held.clear();
        // What the new port was promised is there, no more and no less.
        for _ in 0..8 {
            sender.send_to(b"small", address).unwrap();
        }
        let mut batch = Batch::with_capacity(8);
        assert_eq!(worker.recv_many(port, &mut batch), Ok(4));
        drop((taken, batch));
        let mut batch = Batch::with_capacity(8);
        while batch.len() < 4 {
            if let Err(error) = worker.try_recv_many(port, &mut batch) {
                assert_eq!(error.kind(), tun_driver::PortErrorKind::NoBuffers, "told late");
            }
        }
        drop(batch);
        worker.detach(port).unwrap();
        assert_eq!(worker.buffers(), (32, 32));
    }
}
