//! Packets that other threads hand to a worker: order, books, back-pressure, wake-ups, and both ends' end.

mod common;

use std::thread;
use std::time::{Duration, Instant};

use common::{run, trial};
use tun_driver::{Backend, Batch, Handoff, PortErrorKind, PortId, Wait, Worker, WorkerConfig};

fn main() {
    let mut trials = Vec::new();
    for (backend, name) in [(Backend::IoUring, "io_uring"), (Backend::Syscalls, "syscalls")] {
        let mut add =
            |title: &str, test: fn(Backend)| trials.push(trial(format!("{title}: {name}"), move || test(backend)));
        add("a long stream arrives whole and in order", stream);
        add("each packet wakes a sleeping worker", ping_pong);
        add("a full ring is told, and nothing is lost", back_pressure);
        add(
            "buffers that are held are not lent, and come back by themselves",
            held_buffers,
        );
        add("a packet beyond the buffers is refused and counted", too_long);
        add("the end of the sender is told after its packets", sender_ends);
        add("the end of the worker is told to the sender", worker_ends);
        add("detaching gives back what was not asked for", detach);
        add(
            "a travelling packet comes home without a copy, a foreign one with one",
            travelling,
        );
        add("peer addresses travel along", peers);
        add("a wait that spins or pauses sees packets too", other_waits);
    }
    for backend in [Backend::IoUring, Backend::Syscalls] {
        let name = format!("what waits on a hand-off keeps no other receive awake: {backend:?}");
        trials.push(trial(name, move || other_port(backend)));
    }
    trials.push(trial("a hand-off is for receiving, and for its own worker", one_way));
    trials.push(trial("an impossible capacity is refused", capacity));
    run(trials);
}

fn worker(backend: Backend) -> Worker {
    with_wait(backend, Wait::Block)
}

fn with_wait(backend: Backend, wait: Wait) -> Worker {
    Worker::new(&WorkerConfig {
        backend: Some(backend),
        wait,
        ..WorkerConfig::default()
    })
    .unwrap()
}

fn numbered(number: u32) -> [u8; 60] {
    let mut packet = [number as u8; 60];
    packet[..4].copy_from_slice(&number.to_be_bytes());
    packet
}

/// Checks that the next packet is number `next` and whole.
fn check(packet: &[u8], next: &mut u32) {
    assert_eq!(packet, numbered(*next));
    *next += 1;
}

fn send_patiently(handoff: &mut Handoff, packet: &[u8]) {
    while let Err(error) = handoff.send(packet) {
        assert_eq!(error.kind(), PortErrorKind::Backpressure, "{error}");
        thread::yield_now();
    }
}

fn stream(backend: Backend) {
    const PACKETS: u32 = 100_000;
    let mut worker = worker(backend);
    let (port, mut handoff) = worker.open_handoff(64).unwrap();
    let sender = thread::spawn(move || {
        for number in 0..PACKETS {
            send_patiently(&mut handoff, &numbered(number));
        }
        handoff.counters()
    });
    let (mut next, mut batch) = (0, Batch::with_capacity(32));
    while next < PACKETS {
        worker.recv_many(port, &mut batch).unwrap();
        batch.drain().for_each(|packet| check(&packet, &mut next));
    }
    let counters = sender.join().unwrap();
    assert_eq!(
        (counters.sent_packets, counters.refused_packets),
        (u64::from(PACKETS), 0)
    );
    let received = worker.counters(port);
    // The sender may be gone already, which ends the port, not its books.
    let received = received.unwrap();
    assert_eq!(received.received_packets, u64::from(PACKETS));
    assert_eq!(received.received_bytes, u64::from(PACKETS) * 60);
}

/// Two workers that answer each other: a lost wake-up would hang it.
fn ping_pong(backend: Backend) {
    const TRIPS: u32 = 5_000;
    let mut here = worker(backend);
    let (port, handoff) = here.open_handoff(4).unwrap();
    let (send_back, back) = std::sync::mpsc::channel();
    let other = thread::spawn(move || {
        let mut there = worker(backend);
        let (port, to_there) = there.open_handoff(4).unwrap();
        send_back.send(to_there).unwrap();
        let (mut handoff, mut batch, mut next) = (handoff, Batch::with_capacity(4), 0);
        while next < TRIPS {
            there.recv_many(port, &mut batch).unwrap();
            let count = batch.len() as u32;
            let sent = handoff.send_many(&mut batch);
            assert_eq!((sent.accepted as u32, sent.stopped), (count, None));
            next += count;
        }
        there.stats().counters.sleeps
    });
    let mut to_there: Handoff = back.recv().unwrap();
    let (mut next, mut batch) = (0, Batch::with_capacity(4));
    while next < TRIPS {
        to_there.send(&numbered(next)).unwrap();
        here.recv_many(port, &mut batch).unwrap();
        batch.drain().for_each(|packet| check(&packet, &mut next));
    }
    assert!(
        other.join().unwrap() > 100,
        "the other side never slept, so nothing was tested"
    );
}

fn back_pressure(backend: Backend) {
    let mut worker = worker(backend);
    let (port, mut handoff) = worker.open_handoff(8).unwrap();
    assert_eq!(handoff.capacity(), 8);
    let mut source = Batch::with_capacity(20);
    for number in 0..20 {
        source.push(worker.packet_from(&numbered(number)).unwrap()).unwrap();
    }
    let (mut next, mut batch) = (0, Batch::with_capacity(20));
    while next < 20 {
        let before = source.len();
        let sent = handoff.send_many(&mut source);
        assert_eq!(source.len(), before - sent.accepted);
        assert!(sent.accepted <= 8 && sent.refused == 0);
        assert_eq!(sent.stopped.is_some(), !source.is_empty());
        if let Some(error) = sent.stopped {
            assert_eq!(
                (error.kind(), error.raw_os_error()),
                (PortErrorKind::Backpressure, libc::EAGAIN)
            );
        }
        assert_eq!(worker.try_recv_many(port, &mut batch).unwrap(), sent.accepted);
        batch.drain().for_each(|packet| check(&packet, &mut next));
        // Lends again what was just given back.
        worker.wait(Some(Instant::now())).unwrap();
    }
    assert!(handoff.counters().backpressure >= 2);
}

fn held_buffers(backend: Backend) {
    let mut worker = Worker::new(&WorkerConfig {
        backend: Some(backend),
        buffers: 16,
        receive_reserve: 1,
        wait: Wait::Block,
        ..WorkerConfig::default()
    })
    .unwrap();
    let (port, mut handoff) = worker.open_handoff(8).unwrap();
    let mut held = Vec::new();
    let mut batch = Batch::with_capacity(16);
    // The sender is told when the worker has no more buffers to lend.
    let mut next = 0;
    loop {
        match handoff.send(&numbered(next)) {
            Ok(()) => next += 1,
            Err(error) => {
                assert_eq!(error.kind(), PortErrorKind::Backpressure);
                if worker.try_recv_many(port, &mut batch).unwrap() == 0 {
                    break;
                }
                held.extend(batch.drain().map(|packet| packet.into_remote()));
            }
        }
    }
    assert_eq!((held.len(), worker.buffers().0), (16, 0));
    // They come back while the worker sleeps; it lends them then without being asked.
    let sender = thread::spawn(move || {
        thread::sleep(Duration::from_millis(20));
        drop(held);
        send_patiently(&mut handoff, &numbered(next));
        handoff
    });
    while let Err(error) = worker.recv_many(port, &mut batch) {
        assert_eq!(error.kind(), PortErrorKind::NoBuffers);
    }
    assert_eq!(batch.len(), 1);
    check(&batch[0], &mut next);
    sender.join().unwrap();
}

fn too_long(backend: Backend) {
    let mut worker = worker(backend);
    let (port, mut handoff) = worker.open_handoff(8).unwrap();
    let longest = worker.longest_packet();
    let error = handoff.send(&vec![0; longest + 1]).unwrap_err();
    assert_eq!(
        (error.kind(), error.raw_os_error()),
        (PortErrorKind::BadPacket, libc::EMSGSIZE)
    );
    handoff.send(&vec![7; longest]).unwrap();
    let mut batch = Batch::with_capacity(8);
    assert_eq!(worker.recv_many(port, &mut batch).unwrap(), 1);
    assert_eq!(&batch[0][..], vec![7; longest]);
    assert!(batch[0].headroom() >= 64);
    assert_eq!(handoff.counters().refused_packets, 1);
}

fn sender_ends(backend: Backend) {
    let mut worker = worker(backend);
    let (port, mut handoff) = worker.open_handoff(8).unwrap();
    (0..3).for_each(|number| handoff.send(&numbered(number)).unwrap());
    let ended = thread::spawn(move || {
        thread::sleep(Duration::from_millis(20));
        drop(handoff);
    });
    let (mut next, mut batch) = (0, Batch::with_capacity(2));
    while next < 3 {
        worker.recv_many(port, &mut batch).unwrap();
        batch.drain().for_each(|packet| check(&packet, &mut next));
    }
    let error = worker.recv_many(port, &mut batch).unwrap_err();
    assert_eq!(error.kind(), PortErrorKind::Gone);
    ended.join().unwrap();
    // Told once; it does not keep the worker from sleeping.
    let wake = worker.wait(Some(Instant::now() + Duration::from_millis(5))).unwrap();
    assert_eq!((wake.ready, wake.timer), (0, true));
    worker.detach(port).unwrap();
}

fn worker_ends(backend: Backend) {
    let mut worker = worker(backend);
    let (port, mut handoff) = worker.open_handoff(8).unwrap();
    let (_, mut other) = worker.open_handoff(8).unwrap();
    handoff.send(&numbered(0)).unwrap();
    drop(worker.detach(port).unwrap());
    assert_eq!(handoff.send(&numbered(1)).unwrap_err().kind(), PortErrorKind::Gone);
    drop(worker);
    assert_eq!(other.send(&numbered(1)).unwrap_err().kind(), PortErrorKind::Gone);
    let mut stranger = self::worker(backend);
    let packet = stranger.packet_from(&numbered(2)).unwrap().into_remote();
    let (error, packet) = other.send_remote(packet).unwrap_err();
    assert_eq!((error.kind(), &packet[..]), (PortErrorKind::Gone, &numbered(2)[..]));
    let mut batch = Batch::with_capacity(1);
    batch.push(stranger.import(packet).unwrap()).unwrap();
    let sent = other.send_many(&mut batch);
    assert_eq!((sent.accepted, sent.refused, batch.len()), (0, 0, 1));
    assert_eq!(sent.stopped.unwrap().kind(), PortErrorKind::Gone);
    stranger.wait(Some(Instant::now())).unwrap();
}

fn detach(backend: Backend) {
    let mut worker = worker(backend);
    let (free, all) = worker.buffers();
    assert_eq!(free, all);
    let (port, mut handoff) = worker.open_handoff(8).unwrap();
    handoff.send(&numbered(0)).unwrap();
    let mut detached = worker.detach(port).unwrap();
    let mut batch = Batch::with_capacity(8);
    assert_eq!(detached.undelivered.len(), 1);
    batch.push(detached.undelivered.pop().unwrap()).unwrap();
    check(&batch[0], &mut 0);
    assert_eq!(detached.counters.received_packets, 1);
    assert!(worker.attach(detached.endpoint).is_err());
    drop((batch, handoff));
    worker.wait(Some(Instant::now())).unwrap();
    assert_eq!(worker.buffers(), (all, all), "all that was lent is home again");
}

fn travelling(backend: Backend) {
    let mut worker = worker(backend);
    let (port, mut handoff) = worker.open_handoff(8).unwrap();
    let mut packet = worker.packet_from(&numbered(0)).unwrap();
    let at = packet.as_ptr();
    packet.set_peer(Some("10.1.2.3:4".parse().unwrap()));
    handoff.send_remote(packet.into_remote()).unwrap();
    let foreign = thread::spawn(move || {
        let stranger = self::worker(backend);
        stranger.packet_from(&numbered(1)).unwrap().into_remote()
    });
    handoff.send_remote(foreign.join().unwrap()).unwrap();
    let mut batch = Batch::with_capacity(8);
    assert_eq!(worker.recv_many(port, &mut batch).unwrap(), 2);
    assert_eq!(batch[0].as_ptr(), at);
    assert_eq!(batch[0].peer(), Some("10.1.2.3:4".parse().unwrap()));
    let mut next = 0;
    batch.drain().for_each(|packet| check(&packet, &mut next));
}

fn peers(backend: Backend) {
    let mut worker = worker(backend);
    let (port, mut handoff) = worker.open_handoff(8).unwrap();
    let mut batch = Batch::with_capacity(2);
    let peer = Some("[fd00::1]:9".parse().unwrap());
    for peer in [peer, None] {
        let mut packet = worker.packet_from(&numbered(0)).unwrap();
        packet.set_peer(peer);
        batch.push(packet).unwrap();
    }
    assert_eq!(handoff.send_many(&mut batch).accepted, 2);
    worker.recv_many(port, &mut batch).unwrap();
    assert_eq!((batch[0].peer(), batch[1].peer()), (peer, None));
}

fn other_waits(backend: Backend) {
    let spin = Wait::Spin {
        duration: Duration::from_micros(200),
    };
    for wait in [spin, Wait::default()] {
        let mut worker = with_wait(backend, wait);
        let (port, mut handoff) = worker.open_handoff(16).unwrap();
        let sender = thread::spawn(move || {
            for number in 0..2_000 {
                send_patiently(&mut handoff, &numbered(number));
                if number % 100 == 0 {
                    thread::sleep(Duration::from_micros(500));
                }
            }
            handoff
        });
        let (mut next, mut batch) = (0, Batch::with_capacity(8));
        while next < 2_000 {
            let wake = worker.wait(Some(Instant::now() + Duration::from_secs(10))).unwrap();
            assert!(!wake.timer, "packets came and nobody was told");
            while let Some(ready) = worker.next_ready() {
                assert_eq!(ready, port);
                worker.try_recv_many(port, &mut batch).unwrap();
                batch.drain().for_each(|packet| check(&packet, &mut next));
            }
        }
        sender.join().unwrap();
    }
}

fn one_way() {
    let mut worker = worker(Backend::Syscalls);
    let (port, _handoff): (PortId, Handoff) = worker.open_handoff(8).unwrap();
    let mut batch = Batch::with_capacity(1);
    batch.push(worker.packet_from(&numbered(0)).unwrap()).unwrap();
    let sent = worker.send_many(port, &mut batch);
    assert_eq!((sent.accepted, sent.refused, batch.len()), (0, 0, 1));
    assert_eq!(sent.stopped.unwrap().raw_os_error(), libc::EOPNOTSUPP);
    assert!(worker.queue(port).is_none() && worker.udp(port).is_none());
    assert_eq!(worker.stats().ports[0].name, "handoff");
}

fn capacity() {
    let mut worker = worker(Backend::Syscalls);
    assert!(worker.open_handoff(0).is_err());
    assert!(worker.open_handoff(513).is_err());
    assert!(worker.open_handoff(512).is_ok());
}

fn other_port(backend: Backend) {
    let (tell, told) = std::sync::mpsc::channel();
    let receiver = thread::spawn(move || {
        let mut worker = worker(backend);
        let (handed, mut handoff) = worker.open_handoff(4).unwrap();
        let socket = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        tell.send((worker.stats_reader(), socket.local_addr().unwrap()))
            .unwrap();
        let port = worker.attach(socket).unwrap();
        handoff.send(&numbered(0)).unwrap();
        let mut batch = Batch::with_capacity(4);
        assert_eq!(worker.recv_many(port, &mut batch).unwrap(), 1);
        assert_eq!(&batch[0][..], b"datagram");
        batch.clear();
        assert_eq!(worker.recv_many(handed, &mut batch).unwrap(), 1);
    });
    let (stats, address) = told.recv().unwrap();
    let end = Instant::now() + Duration::from_secs(20) * common::slowness();
    while stats.read().counters.sleeps == 0 {
        assert!(Instant::now() < end, "it never sleeps");
        thread::sleep(Duration::from_millis(1));
    }
    let socket = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    socket.send_to(b"datagram", address).unwrap();
    receiver.join().unwrap();
}
