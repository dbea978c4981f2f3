//! Order per flow, payload integrity, and books that balance against the kernel's counters, over one to eight queues.

mod common;

use std::net::Ipv4Addr;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use common::{Trial, need_backend, need_locked_memory, repeats, trial};
use tun_driver::lab::packet::{Framing, Spec};
use tun_driver::lab::{Catcher, Filler, Namespace, Tracker, process, sysctl};
use tun_driver::netlink::Handle;
use tun_driver::{Backend, Batch, Builder, Counters, Mode, PortErrorKind, WorkerConfig};

fn main() {
    let mut trials: Vec<Trial> = Vec::new();
    for backend in [Backend::IoUring, Backend::Syscalls] {
        for queues in [1, 2, 4, 8] {
            trials.push(trial(
                format!("received in order, all accounted for, {queues} queues {backend:?}"),
                move || {
                    need_backend(backend);
                    for _ in 0..repeats(1, 20) {
                        FLOWS.into_iter().for_each(|flows| received(backend, queues, flows));
                    }
                },
            ));
            trials.push(trial(
                format!("sent in order, all accounted for, {queues} queues {backend:?}"),
                move || {
                    need_backend(backend);
                    (0..repeats(1, 20)).for_each(|_| sent(backend, queues));
                },
            ));
        }
        let overload = trial(
            format!("twice as much as is taken: memory stays, books balance {backend:?}"),
            move || {
                need_backend(backend);
                overloaded(backend);
            },
        );
        trials.push(overload.alone());
        trials.push(trial(
            format!("a consumer that keeps every buffer loses only what the device drops {backend:?}"),
            move || {
                need_backend(backend);
                (0..repeats(3, 1_000)).for_each(|_| keeps_all(backend));
            },
        ));
    }
    common::run(trials)
}

const HERE: Ipv4Addr = Ipv4Addr::new(10, 7, 0, 1);
const THERE: Ipv4Addr = Ipv4Addr::new(10, 7, 0, 2);
/// From one flow to more than the kernel remembers queues of (TUN_NUM_FLOW_ENTRIES of tun.c,
/// 4,096).
const FLOWS: [usize; 3] = [1, 120, 10_000];

/// Workers on rings register their buffers, which the memlock limit bounds.
fn need_memory(backend: Backend, workers: usize) {
    if backend == Backend::IoUring {
        need_locked_memory((workers * WorkerConfig::default().memory().total()) as u64);
    }
}

fn config(backend: Backend) -> WorkerConfig {
    WorkerConfig {
        backend: Some(backend),
        ..WorkerConfig::default()
    }
}

/// T33. What the stack sends is what the kernel counts is what the workers hand over; nothing is
/// invented, lost without a counter, or reordered within a flow.
fn received(backend: Backend, queues: usize, flows: usize) {
    // Several of each flow where it is few enough.
    let packets: u64 = if flows == 120 { 24_000 } else { 12_000 };
    need_memory(backend, queues);
    let device = Builder::new("t0", Mode::Tun)
        .queues(queues)
        .address(HERE, 24)
        .up(true)
        .open()
        .unwrap();
    let index = device.index().unwrap();
    let netlink = Handle::new().unwrap();
    let tracker = Mutex::new(Tracker::new(flows));
    let expected = AtomicU64::new(u64::MAX);
    let done = AtomicU64::new(0);
    let counters: Vec<Counters> = thread::scope(|scope| {
        let workers: Vec<_> = device
            .into_queues()
            .into_iter()
            .map(|queue| {
                let (tracker, expected, done) = (&tracker, &expected, &done);
                scope.spawn(move || {
                    let mut port = queue.drive(&config(backend)).unwrap();
                    let mut batch = Batch::with_capacity(64);
                    while done.load(Ordering::Acquire) < expected.load(Ordering::Acquire) {
                        port.wait(Some(Instant::now() + Duration::from_millis(10))).unwrap();
                        let count = port.try_recv_many(&mut batch).unwrap();
                        let mut tracker = tracker.lock().unwrap();
                        for packet in &batch {
                            tracker.record(Framing::default().check(packet));
                        }
                        drop(tracker);
                        batch.clear();
                        done.fetch_add(count as u64, Ordering::AcqRel);
                    }
                    port.worker().counters(port.id()).unwrap().clone()
                })
            })
            .collect();
        let mut filler = Filler::new(index, THERE.into(), flows).unwrap();
        let (mut offered, mut dropped) = (0, 0);
        let lengths = [64, 100, 576, 1400, 1500];
        for round in 0..packets / 120 {
            let filled = filler.fill(120, lengths[round as usize % lengths.len()]).unwrap();
            offered += filled.sent;
            dropped += filled.dropped;
        }
        filler.tell(&mut tracker.lock().unwrap());
        assert_eq!(offered, packets);
        expected.store(offered - dropped, Ordering::Release);
        workers.into_iter().map(|worker| worker.join().unwrap()).collect()
    });
    let summary = tracker.into_inner().unwrap().summary();
    summary.assert_orderly();
    let handed_over: u64 = counters.iter().map(|counters| counters.received_packets).sum();
    assert_eq!(handed_over, summary.received + summary.foreign);
    assert_eq!(summary.foreign, 0);
    assert_eq!(summary.received + summary.lost, packets);
    assert!(
        counters
            .iter()
            .all(|counters| counters.truncated == 0 && counters.no_buffers == 0)
    );
    assert!(netlink.stats(index).is_err(), "the device outlived its last queue");
    if queues > 1 && flows > 1 {
        let busy = counters.iter().filter(|counters| counters.received_packets > 0).count();
        assert!(busy > 1, "all flows came by one queue");
    }
}

/// T33. What workers send arrives in order at a socket; what is accepted is what the kernel counts.
fn sent(backend: Backend, queues: usize) {
    const PER_QUEUE: u32 = 3_000;
    need_memory(backend, queues);
    let device = Builder::new("t0", Mode::Tun)
        .queues(queues)
        .address(HERE, 24)
        .up(true)
        .open()
        .unwrap();
    let index = device.index().unwrap();
    let netlink = Handle::new().unwrap();
    let before = netlink.stats(index).unwrap();
    let mut catcher = Catcher::bind((HERE, 5000).into()).unwrap();
    catcher.set_receive_buffer(64 << 20).unwrap();
    let mut tracker = Tracker::new(queues);
    let total = queues * PER_QUEUE as usize;
    // Keeps the device until its counters are read.
    let _spare = (queues > 1).then(|| device.add_queue().unwrap());
    let (sent, caught) = thread::scope(|scope| {
        let workers: Vec<_> = device
            .into_queues()
            .into_iter()
            .enumerate()
            .map(|(flow, queue)| {
                scope.spawn(move || {
                    let mut port = queue.drive(&config(backend)).unwrap();
                    let spec = Spec::new((THERE, 4000 + flow as u16).into(), (HERE, 5000).into()).flow(flow as u16);
                    let mut batch = Batch::with_capacity(64);
                    let mut next = 0;
                    while next < PER_QUEUE {
                        while next < PER_QUEUE && !batch.is_full() {
                            let length = 64 + (next as usize * 7) % 1400;
                            let mut packet = port.worker().packet(length).unwrap();
                            spec.build(&mut packet, length, next, 0);
                            batch.push(packet).unwrap();
                            next += 1;
                        }
                        let sent = port.send_many(&mut batch);
                        assert_eq!((sent.refused, sent.stopped), (0, None));
                    }
                    port.worker().counters(port.id()).unwrap().sent_packets
                })
            })
            .collect();
        let caught = catcher.catch(&mut tracker, total, Duration::from_secs(5)).unwrap();
        let sent: u64 = workers.into_iter().map(|worker| worker.join().unwrap()).sum();
        (sent, caught)
    });
    assert_eq!(sent, total as u64);
    if queues > 1 {
        assert_eq!(netlink.stats(index).unwrap().since(&before).rx_packets, sent);
    }
    let lost_at_socket = catcher.dropped().unwrap() as usize;
    assert_eq!(caught + lost_at_socket, total, "unexplained loss");
    for flow in 0..queues {
        tracker.sent(flow as u16, PER_QUEUE);
    }
    tracker.summary().assert_orderly();
}

/// T32. A generator that never waits against a worker that does: what is not taken is counted by
/// the device, and memory stays as it is.
fn overloaded(backend: Backend) {
    // The first one pays for what the process needs only once.
    overload(backend);
    let before = process::memory().unwrap();
    (0..repeats(2, 200)).for_each(|_| overload(backend));
    let after = process::memory().unwrap();
    assert!(after.resident <= before.resident + (4 << 20), "{after:?} {before:?}");
}

fn overload(backend: Backend) {
    let flows = 120;
    quiet();
    let device = Builder::new("t0", Mode::Tun).address(HERE, 24).up(true).open().unwrap();
    let index = device.index().unwrap();
    let netlink = Handle::new().unwrap();
    let before = netlink.stats(index).unwrap();
    let mut port = device.into_queues().remove(0).drive(&config(backend)).unwrap();
    let netns = Namespace::current().unwrap();
    let mut tracker = Tracker::new(flows);
    let mut batch = Batch::with_capacity(64);
    let buffers = port.worker().buffers();
    let (offered, filler) = thread::scope(|scope| {
        let generator = scope.spawn(|| {
            netns
                .run(|| {
                    let mut filler = Filler::new(index, THERE.into(), flows).unwrap();
                    let offered: u64 = (0..40).map(|_| filler.fill(1_000, 200).unwrap().sent).sum();
                    (offered, filler)
                })
                .unwrap()
        });
        while !generator.is_finished() {
            port.try_recv_many(&mut batch).unwrap();
            for packet in &batch {
                tracker.record(Framing::default().check(packet));
            }
            batch.clear();
            thread::sleep(Duration::from_micros(500));
        }
        generator.join().unwrap()
    });
    while port.try_recv_many(&mut batch).unwrap() > 0 {
        for packet in &batch {
            tracker.record(Framing::default().check(packet));
        }
        batch.clear();
    }
    let counted = netlink.stats(index).unwrap().since(&before);
    filler.tell(&mut tracker);
    let summary = tracker.summary();
    summary.assert_orderly();
    assert_eq!(offered, 40_000);
    assert!(counted.tx_dropped > 0, "the generator was too slow to overload");
    assert_eq!(
        counted.tx_packets,
        port.worker().counters(port.id()).unwrap().received_packets
    );
    assert_eq!(counted.tx_packets, summary.received);
    assert_eq!(counted.tx_packets + counted.tx_dropped, offered, "unexplained");
    assert!(port.worker().buffers().0 + 1 >= buffers.0);
}

/// Keeps IPv6 from sending through devices made from now on: each packet is counted.
fn quiet() {
    let _ = sysctl("net/ipv6/conf/default/disable_ipv6", 1);
}

/// T16. A consumer that keeps what it gets runs out of buffers, gets an error, and goes on where it
/// stopped when it gives them back.
fn keeps_all(backend: Backend) {
    quiet();
    let device = Builder::new("t0", Mode::Tun)
        .txqueuelen(100)
        .address(HERE, 24)
        .up(true)
        .open()
        .unwrap();
    let index = device.index().unwrap();
    let netlink = Handle::new().unwrap();
    let before = netlink.stats(index).unwrap();
    let config = WorkerConfig {
        buffers: 64,
        ..config(backend)
    };
    let mut port = device.into_queues().remove(0).drive(&config).unwrap();
    let mut filler = Filler::new(index, THERE.into(), 10).unwrap();
    let mut tracker = Tracker::new(10);
    let mut kept = Batch::with_capacity(1_000);
    let mut offered = 0;
    // 200 at a time, of which 64 find a buffer and 100 room in the queue.
    for _ in 0..3 {
        offered += filler.fill(200, 200).unwrap().sent;
        let end = Instant::now() + Duration::from_secs(10) * common::slowness();
        loop {
            assert!(Instant::now() < end, "{} kept", kept.len());
            match port.try_recv_many(&mut kept) {
                Ok(_) => {}
                Err(error) if error.kind() == PortErrorKind::NoBuffers => break,
                Err(error) => panic!("{error}"),
            }
        }
        assert!(kept.len() <= 64);
        kept.drain()
            .for_each(|packet| tracker.record(Framing::default().check(&packet)));
    }
    // What waited in the queue comes.
    let end = Instant::now() + Duration::from_secs(10) * common::slowness();
    let counted = loop {
        if matches!(port.try_recv_many(&mut kept), Ok(1..)) {
            kept.drain()
                .for_each(|packet| tracker.record(Framing::default().check(&packet)));
        }
        let counted = netlink.stats(index).unwrap().since(&before);
        if counted.tx_packets + counted.tx_dropped == offered {
            break counted;
        }
        assert!(Instant::now() < end, "{counted:?} of {offered}");
    };
    while port.try_recv_many(&mut kept).unwrap() > 0 {
        kept.drain()
            .for_each(|packet| tracker.record(Framing::default().check(&packet)));
    }
    filler.tell(&mut tracker);
    let summary = tracker.summary();
    summary.assert_orderly();
    assert_eq!(summary.received, counted.tx_packets);
    assert_eq!(summary.lost, counted.tx_dropped);
    let counters = port.worker().counters(port.id()).unwrap();
    assert!(counters.no_buffers >= 3 && counters.truncated == 0, "{counters:?}");
    assert_eq!(port.worker().buffers().1, 64);
}
