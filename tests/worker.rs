//! The worker, its ports and batches, on real devices and both backends.

mod common;

use std::net::{Ipv4Addr, UdpSocket};
use std::thread;
use std::time::{Duration, Instant};

use common::{Trial, again, need_backend, once_quiet, trial};
use tun_driver::lab::packet::{Framing, Spec};
use tun_driver::lab::{Catcher, Filler, Tracker, process};
use tun_driver::netlink::Handle;
use tun_driver::{
    Backend, Batch, Builder, Mode, OpenErrorKind, PortError, PortErrorKind, PortId, SinglePort, Wait, Worker,
    WorkerConfig,
};

fn main() {
    type Check = (&'static str, fn(Backend));
    let each: [Check; 16] = [
        ("receives what is there, in order, up to the batch's room", receives),
        ("waits for a deadline, names ready ports, and sleeps between", waits),
        ("loses no wake-up and stops for good", wakes),
        ("spins until something comes", spins),
        ("sends in order and passes over what the kernel refuses", sends),
        ("tells a device that is down, and goes on when it is up", goes_down),
        ("tells once that the device is gone", goes_away),
        ("tells what was truncated", truncates),
        (
            "moves packets between a queue and a socket without a copy",
            encapsulates,
        ),
        ("UDP: peers, long datagrams, errors of earlier ones", datagrams),
        ("detaches with what was not handed over, and attaches again", detaches),
        (
            "a stuck port starves no other, and buffers from afar wake a worker",
            starves_nobody,
        ),
        ("plain recv and send", plain),
        ("carries packets of another worker, and counts them", carries_foreign),
        ("TAP, packet information, and large packets", other_devices),
        ("an idle worker is not woken", idles),
    ];
    let mut trials: Vec<Trial> = Vec::new();
    for (name, work) in each {
        for backend in [Backend::IoUring, Backend::Syscalls] {
            trials.push(trial(format!("{name} {backend:?}"), move || {
                need_backend(backend);
                work(backend);
            }));
        }
    }
    trials.push(trial("256 ports, and no more", many_ports));
    for errno in ["EINTR", "EAGAIN", "EBUSY", "ENOMEM"] {
        let name = format!("all of it while every fourth entry into the ring fails with {errno}");
        trials.push(
            trial(name, move || entries_fail(errno))
                .alone()
                .bound(Duration::from_secs(120)),
        );
    }
    common::run(trials)
}

const HERE: Ipv4Addr = Ipv4Addr::new(10, 7, 0, 1);
const THERE: Ipv4Addr = Ipv4Addr::new(10, 7, 0, 2);

fn config(backend: Backend) -> WorkerConfig {
    WorkerConfig {
        backend: Some(backend),
        ..WorkerConfig::default()
    }
}

/// A TUN device `name` with 10.x.0.1/24, up, driven by a worker of its own.
fn driven(name: &str, x: u8, config: &WorkerConfig) -> (SinglePort, u32) {
    let device = Builder::new(name, Mode::Tun)
        .address(Ipv4Addr::new(10, x, 0, 1), 24)
        .up(true)
        .open()
        .unwrap();
    let index = device.index().unwrap();
    (device.into_queues().remove(0).drive(config).unwrap(), index)
}

fn take(port: &mut SinglePort, batch: &mut Batch, tracker: &mut Tracker) -> usize {
    let count = port.try_recv_many(batch).unwrap();
    for packet in batch.iter() {
        tracker.record(Framing::default().check(packet));
    }
    batch.clear();
    count
}

fn spec(flow: u16) -> Spec {
    Spec::new((THERE, 4000).into(), (HERE, 5000).into()).flow(flow)
}

fn stamped(port: &SinglePort, sequence: u32) -> tun_driver::PacketBuf {
    let mut packet = port.worker().packet(100).unwrap();
    spec(0).build(&mut packet, 100, sequence, 0);
    packet
}

fn receives(backend: Backend) {
    let (mut port, index) = driven("t0", 7, &config(backend));
    let mut filler = Filler::new(index, THERE.into(), 3).unwrap();
    let mut tracker = Tracker::new(3);
    let mut batch = Batch::with_capacity(64);
    for length in [60, 64, 576, 1500] {
        assert_eq!(filler.fill(200, length).unwrap().queued(), 200);
        let mut counts = Vec::new();
        while counts.iter().sum::<usize>() < 200 {
            // The queue is full enough: waiting for the first one must not end with that one alone.
            counts.push(port.recv_many(&mut batch).unwrap());
            assert!(
                batch
                    .iter()
                    .all(|packet| packet.len() == length && packet.headroom() >= 64)
            );
            for packet in batch.iter() {
                tracker.record(Framing::default().check(packet));
            }
            batch.clear();
        }
        assert!(counts[0] > 1, "{counts:?}");
        assert!(counts.iter().all(|&count| count <= 64), "{counts:?}");
    }
    assert_eq!(port.try_recv_many(&mut batch), Ok(0));
    filler.tell(&mut tracker);
    tracker.summary().assert_all();
    let counters = port.worker().counters(port.id()).unwrap();
    assert_eq!(counters.received_packets, 800);
    assert_eq!(counters.received_bytes, 200 * (60 + 64 + 576 + 1500));
    assert_eq!(port.worker().discarded(), 800);
    assert_eq!(port.worker().backend().backend, backend);
}

fn waits(backend: Backend) {
    let mut worker = Worker::new(&config(backend)).unwrap();
    let mut indices = Vec::new();
    let ports: Vec<PortId> = (0..3u8)
        .map(|x| {
            let address = Ipv4Addr::new(10, x, 0, 1);
            let device = Builder::new("t%d", Mode::Tun)
                .address(address, 24)
                .up(true)
                .open()
                .unwrap();
            indices.push(device.index().unwrap());
            worker.attach(device.into_queues().remove(0)).unwrap()
        })
        .collect();
    let before = Instant::now();
    let wake = worker.wait(Some(before + Duration::from_millis(30))).unwrap();
    assert!(wake.timer && wake.ready == 0 && !wake.woken && !wake.stopped);
    assert!(before.elapsed() >= Duration::from_millis(30) && worker.now() >= before);
    assert!(worker.wait(Some(before)).unwrap().timer);

    let mut fillers: Vec<Filler> = (0..3)
        .map(|x| Filler::new(indices[x], Ipv4Addr::new(10, x as u8, 0, 2).into(), 1).unwrap())
        .collect();
    fillers[0].fill(100, 64).unwrap();
    fillers[2].fill(1, 64).unwrap();
    let mut batch = Batch::with_capacity(40);
    let (mut first, mut third) = (0, 0);
    while first < 100 || third < 1 {
        assert!(worker.wait(None).unwrap().ready > 0);
        let mut told = Vec::new();
        while let Some(port) = worker.next_ready() {
            assert!(!told.contains(&port), "each once");
            told.push(port);
            assert_ne!(port, ports[1]);
            let count = worker.try_recv_many(port, &mut batch).unwrap();
            *(if port == ports[0] { &mut first } else { &mut third }) += count;
            batch.clear();
        }
    }
    assert_eq!((first, third), (100, 1));
    // After a pause the busy ones may be told once more; they are empty.
    while worker
        .wait(Some(Instant::now() + Duration::from_millis(5)))
        .unwrap()
        .ready
        > 0
    {
        while let Some(port) = worker.next_ready() {
            assert_eq!(worker.try_recv_many(port, &mut batch), Ok(0));
        }
    }
    let stranger = Worker::new(&config(backend)).unwrap();
    assert!(stranger.counters(ports[0]).is_none());
}

fn wakes(backend: Backend) {
    const WAKES: usize = 2_000;
    let (mut port, _) = driven("t0", 7, &config(backend));
    let waker = port.worker().waker();
    waker.wake();
    assert!(port.wait(None).unwrap().woken, "a wake-up before the wait");
    let (asked, answered) = std::sync::mpsc::channel();
    let other = {
        let waker = waker.clone();
        thread::spawn(move || {
            for _ in 0..WAKES {
                waker.wake();
                // Lost wake-ups show as a hang here.
                answered
                    .recv_timeout(Duration::from_secs(5))
                    .expect("a wake-up was lost");
            }
        })
    };
    for _ in 0..WAKES {
        while !port.wait(Some(Instant::now() + Duration::from_secs(5))).unwrap().woken {}
        asked.send(()).unwrap();
    }
    other.join().unwrap();
    let mut batch = Batch::with_capacity(4);
    let late = waker.clone();
    let other = thread::spawn(move || {
        thread::sleep(Duration::from_millis(20));
        late.wake();
    });
    assert_eq!(
        port.recv_many(&mut batch),
        Ok(0),
        "a wake-up ends the wait for a packet"
    );
    other.join().unwrap();
    assert!(port.wait(None).unwrap().woken);
    waker.stop();
    assert!(port.wait(None).unwrap().stopped && port.wait(None).unwrap().stopped);
    assert_eq!(port.recv_many(&mut batch), Ok(0));
}

fn spins(backend: Backend) {
    for duration in [Duration::from_micros(50), Duration::MAX] {
        let (mut port, index) = driven(
            "t%d",
            7,
            &WorkerConfig {
                wait: Wait::Spin { duration },
                ..config(backend)
            },
        );
        let filler = thread::spawn({
            let netns = tun_driver::lab::Namespace::current().unwrap();
            move || {
                thread::sleep(Duration::from_millis(20));
                netns
                    .run(|| Filler::new(index, THERE.into(), 1).unwrap().fill(5, 64).unwrap())
                    .unwrap();
            }
        });
        let mut batch = Batch::with_capacity(64);
        let mut got = 0;
        while got < 5 {
            got += port.recv_many(&mut batch).unwrap();
            batch.clear();
        }
        filler.join().unwrap();
        assert!(
            port.wait(Some(Instant::now() + Duration::from_millis(10)))
                .unwrap()
                .timer
        );
        let waker = port.worker().waker();
        let other = thread::spawn(move || waker.wake());
        while !port.wait(None).unwrap().woken {}
        other.join().unwrap();
    }
}

fn sends(backend: Backend) {
    let (mut port, index) = driven("t0", 7, &config(backend));
    let netlink = Handle::new().unwrap();
    let before = netlink.stats(index).unwrap();
    let mut catcher = Catcher::bind((HERE, 5000).into()).unwrap();
    let mut tracker = Tracker::new(1);
    let mut batch = Batch::with_capacity(256);
    for sequence in 0..200 {
        if sequence % 10 == 3 {
            batch.push(port.worker().packet(60).unwrap()).unwrap(); // version 0: neither IPv4 nor IPv6
        }
        batch.push(stamped(&port, sequence)).unwrap();
    }
    let sent = port.send_many(&mut batch);
    assert_eq!((sent.accepted, sent.refused, sent.stopped), (200, 20, None));
    assert_eq!(sent.refusal.unwrap().kind(), PortErrorKind::BadPacket);
    assert!(batch.is_empty());
    assert_eq!(catcher.catch(&mut tracker, 200, Duration::from_secs(5)).unwrap(), 200);
    tracker.sent(0, 200);
    tracker.summary().assert_all();
    let counters = port.worker().counters(port.id()).unwrap().clone();
    assert_eq!((counters.sent_packets, counters.refused_packets), (200, 20));
    assert_eq!(counters.refused.count(libc::EINVAL), 20);
    assert_eq!(netlink.stats(index).unwrap().since(&before).rx_packets, 200);
    // Every buffer is home again, but for the one that waits armed for a packet.
    let (free, all) = port.worker().buffers();
    assert!(all - free <= 1, "{free} of {all}");
}

fn goes_down(backend: Backend) {
    let (mut port, index) = driven("t0", 7, &config(backend));
    let netlink = Handle::new().unwrap();
    let mut batch = Batch::with_capacity(64);
    let fill = |port: &SinglePort, batch: &mut Batch| (0..10).for_each(|n| batch.push(stamped(port, n)).unwrap());
    netlink.set_up(index, false).unwrap();
    for _ in 0..3 {
        fill(&port, &mut batch);
        let sent = port.send_many(&mut batch);
        assert_eq!(sent.stopped.map(|error| error.kind()), Some(PortErrorKind::Down));
        assert_eq!(sent.accepted, 0);
        assert!(sent.refused >= 1);
        assert_eq!(batch.len(), 10 - sent.refused);
        batch.clear();
    }
    assert_eq!(port.try_recv_many(&mut batch), Ok(0));
    netlink.set_up(index, true).unwrap();
    fill(&port, &mut batch);
    let sent = port.send_many(&mut batch);
    assert_eq!((sent.accepted, sent.refused, sent.stopped), (10, 0, None));
    Filler::new(index, THERE.into(), 1).unwrap().fill(5, 64).unwrap();
    assert!(port.recv_many(&mut batch).unwrap() > 0);
}

fn goes_away(backend: Backend) {
    for sleeping in [true, false] {
        let (mut port, index) = driven("t0", 7, &config(backend));
        let mut batch = Batch::with_capacity(64);
        if sleeping {
            let other = thread::spawn({
                let netns = tun_driver::lab::Namespace::current().unwrap();
                move || {
                    thread::sleep(Duration::from_millis(30));
                    netns.run(|| Handle::new().unwrap().delete(index).unwrap()).unwrap();
                }
            });
            assert_eq!(port.recv_many(&mut batch).unwrap_err().kind(), PortErrorKind::Gone);
            other.join().unwrap();
        } else {
            Handle::new().unwrap().delete(index).unwrap();
            assert!(port.wait(None).unwrap().ready == 1);
            assert!(port.try_recv_many(&mut batch).unwrap_err().is_permanent());
        }
        // Told once by the wait, and then no more: no spinning.
        let before = process::thread_cpu_time();
        assert_eq!(
            port.wait(Some(Instant::now() + Duration::from_millis(100)))
                .unwrap()
                .ready,
            0
        );
        assert!(process::thread_cpu_time() - before < Duration::from_millis(50));
        let packet = stamped(&port, 0);
        batch.push(packet).unwrap();
        let sent = port.send_many(&mut batch);
        assert_eq!((sent.accepted, sent.refused, batch.len()), (0, 0, 1));
        assert!(sent.stopped.unwrap().is_permanent());
    }
    assert_eq!(tun_driver::leaked_arenas(), 0);
}

fn truncates(backend: Backend) {
    let (mut port, index) = driven("t0", 7, &config(backend));
    Handle::new().unwrap().set_mtu(index, 9000).unwrap();
    let mut filler = Filler::new(index, THERE.into(), 1).unwrap();
    let mut batch = Batch::with_capacity(64);
    let longest = port.worker().longest_packet();
    filler.fill(1, longest).unwrap();
    filler.fill(1, longest + 1).unwrap();
    filler.fill(1, 8000).unwrap();
    filler.fill(1, 64).unwrap();
    let (mut lengths, mut told) = (Vec::new(), 0);
    while lengths.len() < 2 || told < 1 {
        match port.try_recv_many(&mut batch) {
            Ok(0) => panic!("{lengths:?}, told {told} times"),
            Ok(_) => lengths.extend(batch.drain().map(|packet| packet.len())),
            Err(error) => {
                assert_eq!((error.kind(), error.is_permanent()), (PortErrorKind::Truncated, false));
                told += 1;
            }
        }
    }
    assert_eq!(lengths, [longest, 64]);
    assert_eq!(told, 1);
    assert_eq!(port.try_recv_many(&mut batch), Ok(0));
    let counters = port.worker().counters(port.id()).unwrap();
    assert_eq!((counters.truncated, counters.received_packets), (2, 2));
    // At attach, it is known beforehand, and there are larger buffers.
    let device = Builder::new("big0", Mode::Tun).mtu(9000).open().unwrap();
    let port = device.into_queues().remove(0).drive(&config(backend)).unwrap();
    assert!(port.worker().port_info(port.id()).unwrap().longest >= 9000);
}

fn encapsulates(backend: Backend) {
    let mut worker = Worker::new(&config(backend)).unwrap();
    let device = Builder::new("t0", Mode::Tun).address(HERE, 24).up(true).open().unwrap();
    let index = device.index().unwrap();
    let tun = worker.attach(device.into_queues().remove(0)).unwrap();
    let (near, far) = (
        UdpSocket::bind("127.0.0.1:0").unwrap(),
        UdpSocket::bind("127.0.0.1:0").unwrap(),
    );
    near.connect(far.local_addr().unwrap()).unwrap();
    far.connect(near.local_addr().unwrap()).unwrap();
    far.set_read_timeout(Some(Duration::from_secs(5) * common::slowness()))
        .unwrap();
    let udp = worker.attach(near).unwrap();
    let mut catcher = Catcher::bind((HERE, 5000).into()).unwrap();
    let mut tracker = Tracker::new(1);
    let mut batch = Batch::with_capacity(64);

    Filler::new(index, THERE.into(), 1).unwrap().fill(10, 500).unwrap();
    let mut got = 0;
    while got < 10 {
        worker.wait(None).unwrap();
        got += worker.try_recv_many(tun, &mut batch).unwrap();
        for packet in batch.iter_mut() {
            let before = packet.as_ptr();
            packet.prepend(b"\x01\x02\x03\x04\x05\x06\x07\x08").unwrap();
            assert_eq!(packet.as_ptr(), before.wrapping_sub(8), "the packet stays where it is");
        }
        let sent = worker.send_many(udp, &mut batch);
        assert_eq!((sent.refused, sent.stopped, batch.len()), (0, None, 0));
    }
    let mut buffer = [0; 2000];
    for _ in 0..10 {
        assert_eq!(again(|| far.recv(&mut buffer)).unwrap(), 508);
        assert_eq!(buffer[..9], [1, 2, 3, 4, 5, 6, 7, 8, 0x45]);
    }
    for sequence in 0..10 {
        buffer[..8].fill(9);
        spec(0).build(&mut buffer[8..], 300, sequence, 0);
        far.send(&buffer[..308]).unwrap();
    }
    got = 0;
    while got < 10 {
        worker.wait(None).unwrap();
        while let Some(port) = worker.next_ready() {
            assert_eq!(port, udp);
            got += worker.try_recv_many(udp, &mut batch).unwrap();
            assert!(
                batch
                    .iter()
                    .all(|packet| packet.peer() == Some(far.local_addr().unwrap()))
            );
            batch.iter_mut().for_each(|packet| packet.trim_front(8));
            let sent = worker.send_many(tun, &mut batch);
            assert_eq!((sent.refused, sent.stopped), (0, None));
        }
    }
    assert_eq!(catcher.catch(&mut tracker, 10, Duration::from_secs(5)).unwrap(), 10);
    tracker.sent(0, 10);
    tracker.summary().assert_all();
    assert_eq!(worker.udp(udp).unwrap().peer_addr().unwrap(), far.local_addr().unwrap());
    assert!(worker.udp(tun).is_none() && worker.queue(udp).is_none());
}

fn datagrams(backend: Backend) {
    for address in ["127.0.0.1:0", "[::1]:0"] {
        let socket = UdpSocket::bind(address).unwrap();
        let here = socket.local_addr().unwrap();
        let mut port = SinglePort::new(socket, &config(backend)).unwrap();
        let others: Vec<UdpSocket> = (0..3).map(|_| UdpSocket::bind(address).unwrap()).collect();
        let mut batch = Batch::with_capacity(64);
        for (number, other) in others.iter().enumerate() {
            other
                .set_read_timeout(Some(Duration::from_secs(5) * common::slowness()))
                .unwrap();
            other.send_to(&[number as u8; 5], here).unwrap();
        }
        others[0].send_to(&[7; 4000], here).unwrap();
        others[0].send_to(&[], here).unwrap();
        let mut seen = 0;
        while seen < 4 {
            match port.recv_many(&mut batch) {
                Ok(count) => seen += count,
                Err(error) => assert_eq!(error.kind(), PortErrorKind::Truncated),
            }
        }
        assert_eq!(port.worker().counters(port.id()).unwrap().truncated, 1);
        for (number, packet) in batch.iter().take(3).enumerate() {
            assert_eq!(packet[..], [number as u8; 5]);
            assert_eq!(packet.peer(), Some(others[number].local_addr().unwrap()));
        }
        assert!(batch[3].is_empty());
        // Each goes back to where it came from; one to nobody: the error that comes of it harms neither sending nor receiving.
        let nobody = UdpSocket::bind(address).unwrap().local_addr().unwrap();
        batch.last_mut().unwrap().set_peer(Some(nobody));
        let sent = port.send_many(&mut batch);
        assert_eq!((sent.accepted, sent.refused, sent.stopped), (4, 0, None));
        let mut buffer = [0; 16];
        for (number, other) in others.iter().enumerate() {
            assert_eq!(again(|| other.recv_from(&mut buffer)).unwrap(), (5, here));
            assert_eq!(buffer[..5], [number as u8; 5]);
        }
        // Without a peer, on a socket that is not connected: refused for good, with its errno.
        batch.push(port.worker().packet_from(b"where to").unwrap()).unwrap();
        let sent = port.send_many(&mut batch);
        assert_eq!((sent.accepted, sent.refused), (0, 1));
        assert_eq!(sent.refusal.unwrap().raw_os_error(), libc::EDESTADDRREQ);
        others[1].send_to(b"still there", here).unwrap();
        assert_eq!(port.recv_many(&mut batch), Ok(1));
    }
    // A connected socket learns by ICMP that nobody listens; the port goes on.
    let (socket, peer) = (
        UdpSocket::bind("127.0.0.1:0").unwrap(),
        UdpSocket::bind("127.0.0.1:0").unwrap(),
    );
    let there = peer.local_addr().unwrap();
    socket.connect(there).unwrap();
    let here = socket.local_addr().unwrap();
    drop(peer);
    let mut port = SinglePort::new(socket, &config(backend)).unwrap();
    for _ in 0..5 {
        port.send(b"anybody?").unwrap();
    }
    let peer = UdpSocket::bind(there).unwrap();
    peer.send_to(b"now", here).unwrap();
    let mut buffer = [0; 16];
    assert_eq!(port.recv(&mut buffer), Ok(3));
}

fn detaches(backend: Backend) {
    let (mut port, index) = driven("t0", 7, &config(backend));
    let mut filler = Filler::new(index, THERE.into(), 1).unwrap();
    let mut tracker = Tracker::new(1);
    let mut batch = Batch::with_capacity(64);
    for _ in 0..50 {
        // A read is armed now, on the ring; it may take a packet or not.
        port.wait(Some(Instant::now())).unwrap();
        filler.fill(3, 64).unwrap();
        let stale = port.id();
        let mut detached = port.into_endpoint().unwrap();
        for packet in detached.undelivered.drain() {
            tracker.record(Framing::default().check(&packet));
        }
        let mut worker = Worker::new(&config(backend)).unwrap();
        let fresh = worker.attach(detached.endpoint).unwrap();
        assert_eq!(
            worker.try_recv_many(stale, &mut batch).unwrap_err().kind(),
            PortErrorKind::Gone
        );
        assert_eq!(worker.detach(stale).unwrap_err().kind(), PortErrorKind::Gone);
        let queue = worker.detach(fresh).unwrap().endpoint.into_queue().unwrap();
        port = queue.drive(&config(backend)).unwrap();
        take(&mut port, &mut batch, &mut tracker);
    }
    while take(&mut port, &mut batch, &mut tracker) > 0 {}
    filler.tell(&mut tracker);
    tracker.summary().assert_all();
    // Disabled, the queue gets nothing; enabled, it does.
    port.worker().queue(port.id()).unwrap().disable().unwrap_err(); // a single-queue device has none to spare
    drop(port);
    let device = Builder::new("mq0", Mode::Tun).queues(2).open().unwrap();
    let mut worker = Worker::new(&config(backend)).unwrap();
    let ports: Vec<PortId> = device
        .into_queues()
        .into_iter()
        .map(|queue| worker.attach(queue).unwrap())
        .collect();
    worker.queue(ports[0]).unwrap().disable().unwrap();
    assert_eq!(worker.try_recv_many(ports[0], &mut batch), Ok(0));
    worker.queue(ports[0]).unwrap().enable().unwrap();
}

fn starves_nobody(backend: Backend) {
    let small = WorkerConfig {
        buffers: 64,
        receive_reserve: 8,
        ..config(backend)
    };
    let mut worker = Worker::new(&small).unwrap();
    let mut fillers = Vec::new();
    let ports: Vec<PortId> = (0..2u8)
        .map(|x| {
            let address = Ipv4Addr::new(10, x, 0, 1);
            let device = Builder::new("t%d", Mode::Tun)
                .address(address, 24)
                .up(true)
                .open()
                .unwrap();
            fillers.push(Filler::new(device.index().unwrap(), Ipv4Addr::new(10, x, 0, 2).into(), 1).unwrap());
            worker.attach(device.into_queues().remove(0)).unwrap()
        })
        .collect();
    fillers[0].fill(100, 64).unwrap();
    let mut held = Batch::with_capacity(128);
    let error = loop {
        match worker.try_recv_many(ports[0], &mut held) {
            Ok(0) => panic!("{} held, and nothing more", held.len()),
            Ok(_) => {}
            Err(error) => break error,
        }
    };
    assert_eq!(error.kind(), PortErrorKind::NoBuffers);
    assert!(held.len() >= 48 && held.len() <= 56, "{}", held.len());
    assert!(worker.packet(10).is_none());
    // The other port has its reserve.
    fillers[1].fill(5, 64).unwrap();
    let mut batch = Batch::with_capacity(64);
    let mut got = 0;
    while got < 5 {
        assert!(
            worker
                .wait(Some(Instant::now() + Duration::from_secs(5)))
                .unwrap()
                .ready
                > 0
        );
        got += worker.try_recv_many(ports[1], &mut batch).unwrap();
        batch.clear();
    }
    // The first port waits for buffers; they come back from another thread, and wake the worker.
    let travelling: Vec<_> = held.drain().map(|packet| packet.into_remote()).collect();
    let taken = travelling.len();
    let other = thread::spawn(move || {
        thread::sleep(Duration::from_millis(30));
        drop(travelling);
    });
    let mut rest = 0;
    while rest < 100 - taken {
        assert!(
            worker
                .wait(Some(Instant::now() + Duration::from_secs(5)))
                .unwrap()
                .ready
                > 0,
            "not woken by buffers"
        );
        match worker.try_recv_many(ports[0], &mut batch) {
            Ok(count) => rest += count,
            Err(error) => assert_eq!(error.kind(), PortErrorKind::NoBuffers),
        }
        batch.clear();
    }
    other.join().unwrap();
}

fn plain(backend: Backend) {
    let (mut port, index) = driven("t0", 7, &config(backend));
    let mut filler = Filler::new(index, THERE.into(), 1).unwrap();
    filler.fill(3, 200).unwrap();
    let mut buffer = [0; 1500];
    assert_eq!(port.recv(&mut buffer), Ok(200));
    assert!(Framing::default().check(&buffer[..200]).is_ok());
    assert_eq!(
        port.recv(&mut buffer[..199]).unwrap_err().kind(),
        PortErrorKind::Truncated
    );
    assert_eq!(port.recv(&mut buffer), Ok(200));
    let mut catcher = Catcher::bind((HERE, 5000).into()).unwrap();
    let mut tracker = Tracker::new(1);
    spec(0).build(&mut buffer, 100, 0, 0);
    port.send(&buffer[..100]).unwrap();
    assert_eq!(catcher.catch(&mut tracker, 1, Duration::from_secs(5)).unwrap(), 1);
    let kind = |result: Result<(), PortError>| result.unwrap_err().kind();
    assert_eq!(kind(port.send(&[0; 60])), PortErrorKind::BadPacket);
    assert_eq!(kind(port.send(&[0x45; 9_000])), PortErrorKind::BadPacket);
}

fn carries_foreign(backend: Backend) {
    let (mut port, _) = driven("t0", 7, &config(backend));
    let mut catcher = Catcher::bind((HERE, 5000).into()).unwrap();
    let mut tracker = Tracker::new(1);
    let other = Worker::new(&config(backend)).unwrap();
    let mut batch = Batch::with_capacity(8);
    for sequence in 0..6 {
        let worker = if sequence % 2 == 0 { &other } else { port.worker() };
        let mut packet = worker.packet(100).unwrap();
        spec(0).build(&mut packet, 100, sequence, 0);
        batch.push(packet).unwrap();
    }
    let sent = port.send_many(&mut batch);
    assert_eq!((sent.accepted, sent.refused), (6, 0));
    assert_eq!(port.worker().counters(port.id()).unwrap().foreign_sent, 3);
    assert_eq!(catcher.catch(&mut tracker, 6, Duration::from_secs(5)).unwrap(), 6);
    tracker.summary().assert_orderly();
    // Home without a copy, elsewhere with one.
    let packet = other.packet_from(b"travels").unwrap();
    let at = packet.as_ptr();
    let remote = thread::spawn({
        let mut remote = packet.into_remote();
        move || {
            remote[0] = b'T';
            remote
        }
    });
    let packet = other.import(remote.join().unwrap()).unwrap();
    assert_eq!((&packet[..], packet.as_ptr()), (&b"Travels"[..], at));
    let copy = port.worker().import(packet.into_remote()).unwrap();
    assert_eq!(&copy[..], b"Travels");
    assert_ne!(copy.as_ptr(), at);
    let (free, all) = other.buffers();
    assert_eq!(free, all);
    drop(port);
    assert_eq!(&copy[..], b"Travels", "a packet outlives its worker");
}

fn other_devices(backend: Backend) {
    let large = WorkerConfig {
        large_buffers: 64,
        receive_reserve: 8,
        ..config(backend)
    };
    let device = Builder::new("t0", Mode::Tun)
        .packet_info(true)
        .mtu(60_000)
        .address(HERE, 24)
        .up(true)
        .open()
        .unwrap();
    let index = device.index().unwrap();
    let mut port = device.into_queues().remove(0).drive(&large).unwrap();
    Filler::new(index, THERE.into(), 1).unwrap().fill(3, 50_000).unwrap();
    let mut batch = Batch::with_capacity(8);
    let framing = Framing {
        packet_info: true,
        ..Framing::default()
    };
    let mut got = 0;
    while got < 3 {
        got += port.recv_many(&mut batch).unwrap();
    }
    assert!(
        batch
            .iter()
            .all(|packet| packet.len() == 50_004 && framing.check(packet).is_ok())
    );

    let device = Builder::new("tap0", Mode::Tap)
        .address(Ipv4Addr::new(10, 8, 0, 1), 24)
        .up(true)
        .open()
        .unwrap();
    let index = device.index().unwrap();
    Handle::new()
        .unwrap()
        .add_neighbour(index, Ipv4Addr::new(10, 8, 0, 2).into(), [2, 0, 0, 0, 0, 9])
        .unwrap();
    let mut tap = device.into_queues().remove(0).drive(&config(backend)).unwrap();
    Filler::new(index, Ipv4Addr::new(10, 8, 0, 2).into(), 1)
        .unwrap()
        .fill(1, 1500)
        .unwrap();
    batch.clear();
    while !batch
        .iter()
        .any(|frame| frame.len() == 1514 && frame[..6] == [2, 0, 0, 0, 0, 9])
    {
        tap.recv_many(&mut batch).unwrap();
    }
    assert_eq!(tap.send(&[0; 13]).unwrap_err().kind(), PortErrorKind::BadPacket);
    tap.send(&[0xff; 60]).unwrap();
}

/// A worker that sleeps costs nothing: no switch to its thread, no CPU time.
fn idles(backend: Backend) {
    let (mut port, _) = driven("t0", 7, &config(backend));
    let switches = || {
        let status = std::fs::read_to_string("/proc/thread-self/status").unwrap();
        let line = status
            .lines()
            .find(|line| line.starts_with("voluntary_ctxt_switches"))
            .unwrap()
            .to_owned();
        line.rsplit('\t').next().unwrap().trim().parse::<u64>().unwrap()
    };
    port.wait(Some(Instant::now())).unwrap();
    once_quiet(|| {
        let (before, cpu) = (switches(), process::thread_cpu_time());
        let until = Instant::now() + Duration::from_millis(400);
        assert!(port.wait(Some(until)).unwrap().timer);
        // One, and what else happens inside the call: the kernel switches once or twice more on some days.
        let (switched, used) = (switches() - before, process::thread_cpu_time() - cpu);
        if switched < 8 && used < Duration::from_millis(5) {
            return Ok(());
        }
        Err(format!("{switched} switches and {used:?} in one wait"))
    });
}

fn many_ports() {
    let mut worker = Worker::new(&WorkerConfig {
        buffers: 4096,
        receive_reserve: 4,
        ..WorkerConfig::default()
    })
    .unwrap();
    for _ in 0..256 {
        worker.attach(UdpSocket::bind("127.0.0.1:0").unwrap()).unwrap();
    }
    let refused = worker.attach(UdpSocket::bind("127.0.0.1:0").unwrap()).unwrap_err();
    assert_eq!(refused.kind(), OpenErrorKind::InvalidSetting);
    let last = worker.ports().last().unwrap();
    let here = worker.udp(last).unwrap().local_addr().unwrap();
    UdpSocket::bind("127.0.0.1:0").unwrap().send_to(b"you", here).unwrap();
    assert_eq!(worker.wait(None).unwrap().ready, 1);
    assert_eq!(worker.next_ready(), Some(last));
    let mut batch = Batch::with_capacity(4);
    assert_eq!(worker.try_recv_many(last, &mut batch), Ok(1));
}

/// Runs this file's checks of the ring once more, with failures put into its system calls.
fn entries_fail(errno: &str) {
    need_backend(Backend::IoUring);
    common::need_program("strace", "strace");
    let output = std::process::Command::new("strace")
        .args(["-f", "-o", "/dev/null", "-e", "trace=io_uring_enter"])
        .args(["-e", &format!("inject=io_uring_enter:error={errno}:when=3+4")])
        .arg(std::env::current_exe().unwrap())
        // The tracer's stops are switches of the idle worker.
        .args(["IoUring", "--skip", "an idle worker"])
        .output()
        .unwrap();
    let told = String::from_utf8_lossy(&output.stdout);
    let traced = !String::from_utf8_lossy(&output.stderr).contains("ptrace(PTRACE");
    if !traced {
        common::skip("strace may not trace here");
    }
    assert!(
        output.status.success() && told.contains("15 passed"),
        "{told}{}",
        String::from_utf8_lossy(&output.stderr)
    );
}
