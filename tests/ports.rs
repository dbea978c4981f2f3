//! Every public behaviour of the worker, on both backends, against real devices and sockets.

mod common;
mod offer;

use std::collections::HashSet;
use std::net::{SocketAddr, UdpSocket};
use std::os::fd::{AsRawFd, RawFd};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use common::{again, need_locked_memory, need_program, once_quiet, repeats, skip, trial};
use offer::{
    HERE, Offer, PORT, THERE, await_sleep, batch_of, both, build, config, numbers, on_both, outward, quiet, receive,
    single, stamp, switches, this_thread, tun, with_tun, worker,
};
use tun_driver::lab::packet::{Ethernet, Framing, Spec};
use tun_driver::lab::{Catcher, Filler, Namespace, Tracker, process};
use tun_driver::netlink::Handle;
use tun_driver::{
    Backend, Batch, Builder, Endpoint, Mode, OpenErrorKind, PortError, PortErrorKind, PortId, SinglePort, Wait, Waker,
    Worker, WorkerConfig,
};

fn main() {
    let mut trials = vec![trial("settings that cannot work are refused with a reason", settings)];
    let all = &mut trials;

    on_both(
        all,
        "receive takes what is there up to the room of the batch",
        takes_what_is_there,
    );
    on_both(all, "receive waits for the first packet only", waits_for_the_first);
    on_both(
        all,
        "receive after a row of single packets leaves none behind",
        after_single_packets,
    );
    on_both(all, "receive without waiting never waits", never_waits);

    on_both(all, "wait: deadlines none, past and to come", deadlines);
    on_both(all, "wait: ready ports take turns, each once", turns);
    on_both(all, "wait: a port that was not emptied is still ready", not_emptied);
    on_both(all, "wait: an idle worker makes no wake-ups", idle_blocked_in_wait);
    on_both(
        all,
        "receive: an idle worker makes no wake-ups",
        idle_blocked_in_receive,
    );

    on_both(
        all,
        "waker: ends wait and receive, before and during",
        waker_ends_waiting,
    );
    on_both(all, "waker: stop stays", stop_stays);
    on_both(all, "waker: no wake-up of 10,000 is lost by wait", wakes_in_wait);
    on_both(all, "waker: no wake-up of 10,000 is lost by receive", wakes_in_receive);
    on_both(
        all,
        "waker: no wake-up of 10,000 is lost under traffic",
        wakes_under_traffic,
    );

    on_both(
        all,
        "spin: without end, packets, deadline and waker end it",
        spin_without_end,
    );
    on_both(all, "spin: for a while, then it sleeps", spin_for_a_while);

    on_both(all, "send keeps the order and empties the batch", send_in_order);
    on_both(
        all,
        "send: what the kernel refuses is counted, what is behind it goes",
        bad_packets,
    );
    on_both(all, "device down is told, counted, and passes", device_down);
    on_both(
        all,
        "device deleted: packets first, then gone, told once",
        device_deleted,
    );
    on_both(all, "device deleted under a sleeping receive", deleted_while_receiving);
    on_both(all, "device deleted is found by sending", deleted_found_by_send);
    on_both(
        all,
        "finite send buffer: back-pressure keeps order and loses nothing",
        send_buffer_before_attach,
    );
    on_both(
        all,
        "finite send buffer: a descriptor made blocking does not hold up the sender",
        send_buffer_and_blocking,
    );
    on_both(
        all,
        "finite send buffer set later: nothing lost unaccounted",
        send_buffer_after_attach,
    );
    on_both(
        all,
        "finite send buffer: a bad packet does not stop those behind it",
        bad_packet_under_back_pressure,
    );

    on_both(all, "truncation is told once, and counted", truncation);
    on_both(
        all,
        "an MTU beyond the ordinary buffers takes large ones",
        mtu_beyond_the_buffers,
    );
    on_both(
        all,
        "a port attached again after its MTU was raised takes large buffers",
        attached_again,
    );
    on_both(all, "large buffers take large packets", large_packets);
    on_both(all, "packet information is in front, both ways", packet_information);
    on_both(all, "TAP: frames, both ways", tap);

    on_both(all, "UDP: peers in and out, IPv4 and IPv6", udp_peers);
    on_both(all, "UDP: a connected socket", udp_connected);
    on_both(
        all,
        "UDP: an oversize datagram is truncated, told and counted",
        udp_oversize,
    );
    on_both(all, "UDP: a port that was refused by ICMP goes on", udp_refused_by_icmp);
    on_both(
        all,
        "UDP: what cannot be sent is refused by errno, the rest goes",
        udp_unreachable,
    );
    on_both(all, "UDP: an empty datagram is a packet", udp_empty_datagram);
    on_both(all, "TUN to UDP to TUN without a copy", encapsulation);

    on_both(all, "detach gives back the queue and what was not handed over", detach);
    on_both(
        all,
        "detach: another worker goes on with the queue",
        move_to_another_worker,
    );
    on_both(all, "a stale port name is gone", stale_names);
    on_both(all, "256 ports, and not one more", many_ports);
    on_both(all, "a queue is disabled and enabled at run time", disable_and_enable);
    on_both(all, "the plain calls", plain_calls);
    on_both(all, "a worker with one port", single_port);
    on_both(all, "buffers stuck on one port do not starve another", receive_reserve);
    on_both(
        all,
        "buffers stuck on a UDP port do not starve another",
        receive_reserve_udp,
    );
    on_both(
        all,
        "buffers given back by another thread wake a starved worker, always",
        hunger_race,
    );

    all.extend(both("idle: the process takes no CPU time", idle_process).map(common::Trial::alone));
    common::run(trials)
}

fn kind(result: Result<usize, PortError>) -> PortErrorKind {
    result.expect_err("an error").kind()
}

fn past() -> Option<Instant> {
    Some(Instant::now())
}

fn soon() -> Option<Instant> {
    Some(Instant::now() + Duration::from_millis(300))
}

// ------------------------------------------------------------------------------------------------------------------ settings

fn settings() {
    let refused = |config: WorkerConfig| {
        let error = Worker::new(&config).expect_err("refused");
        assert_eq!(error.kind(), OpenErrorKind::InvalidSetting, "{error}");
        assert!(!error.detail().is_empty());
    };
    let default = WorkerConfig::default;
    refused(WorkerConfig {
        buffers: 15,
        ..default()
    });
    refused(WorkerConfig {
        buffers: usize::MAX,
        ..default()
    });
    refused(WorkerConfig {
        large_buffers: usize::MAX,
        ..default()
    });
    refused(WorkerConfig {
        large_buffers: 1 << 20,
        ..default()
    });
    refused(WorkerConfig {
        max_packet: 63,
        ..default()
    });
    refused(WorkerConfig {
        max_packet: 70_000,
        ..default()
    });
    refused(WorkerConfig {
        headroom: 5000,
        ..default()
    });
    refused(WorkerConfig {
        tailroom: usize::MAX,
        ..default()
    });
    refused(WorkerConfig {
        receive_reserve: 0,
        ..default()
    });
    for backend in [Backend::IoUring, Backend::Syscalls] {
        let worker = worker(backend);
        assert_eq!(worker.backend().backend, backend);
        assert!(!worker.backend().why.is_empty());
        assert_eq!(worker.backend().buffers, 1024);
        assert_eq!(worker.buffers(), (1024, 1024));
        assert_eq!(worker.ports().count(), 0);
        assert!(worker.longest_packet() >= 1536);
        assert!(format!("{worker:?}").contains("Worker"));
    }
}

// ------------------------------------------------------------------------------------------------------------------- receive

fn takes_what_is_there(backend: Backend) {
    let (mut worker, port, _device) = with_tun(backend);
    Offer::new().send(100);
    let mut batch = Batch::with_capacity(64);
    assert_eq!(worker.recv_many(port, &mut batch), Ok(64));
    assert_eq!(
        worker.recv_many(port, &mut batch),
        Ok(0),
        "a full batch takes none, at once"
    );
    assert_eq!(numbers(&batch), (0..64).collect::<Vec<_>>());
    batch.clear();
    assert_eq!(worker.recv_many(port, &mut batch), Ok(36));
    assert_eq!(numbers(&batch), (64..100).collect::<Vec<_>>());
    // Added behind what is there.
    Offer::new().send(1);
    assert_eq!(worker.recv_many(port, &mut batch), Ok(1));
    assert_eq!(batch.len(), 37);
    assert_eq!(batch.last().map(|packet| stamp(packet).unwrap().sequence), Some(0));
    let counters = worker.counters(port).unwrap();
    assert_eq!(counters.received_packets, 101);
    assert_eq!(counters.received_bytes, 101 * (64 + 28));
    assert_eq!(counters.batches, 3);
    assert!(counters.system_calls > 0);
    assert_eq!(worker.discarded(), 64);
}

fn waits_for_the_first(backend: Backend) {
    let (mut worker, port, _device) = with_tun(backend);
    let receiver = this_thread();
    let mut batch = Batch::with_capacity(64);
    for round in 0..20 {
        thread::scope(|scope| {
            let mut offer = Offer::new();
            scope.spawn(move || {
                await_sleep(receiver);
                offer.send(1);
            });
            // There will not be a second one: if it waited for more than the first, it would not return.
            assert_eq!(worker.recv_many(port, &mut batch), Ok(1), "round {round}");
        });
    }
}

fn after_single_packets(backend: Backend) {
    let (mut worker, port, _device) = with_tun(backend);
    let mut offer = Offer::new();
    let mut batch = Batch::with_capacity(256);
    for singles in 0..40 {
        for _ in 0..singles {
            offer.send(1);
            assert_eq!(worker.recv_many(port, &mut batch), Ok(1));
        }
        batch.clear();
        offer.send(100);
        let mut calls = 0;
        while batch.len() < 100 {
            // What is left behind in the queue is told by wait, and comes at the next call.
            assert_eq!(worker.wait(None).unwrap().ready, 1);
            assert!(worker.recv_many(port, &mut batch).unwrap() > 0);
            calls += 1;
        }
        assert!(calls <= 9, "{calls} calls for 100 packets after {singles} single ones");
        assert!(numbers(&batch).is_sorted());
        batch.clear();
    }
    assert_eq!(worker.try_recv_many(port, &mut batch), Ok(0));
}

fn never_waits(backend: Backend) {
    let (mut worker, port, _device) = with_tun(backend);
    let mut batch = Batch::with_capacity(64);
    assert_eq!(worker.try_recv_many(port, &mut batch), Ok(0));
    // With and without a read that was armed by waiting.
    for waited in [false, true] {
        if waited {
            assert!(worker.wait(past()).unwrap().timer);
        }
        assert_eq!(worker.try_recv_many(port, &mut batch), Ok(0));
        let mut offer = Offer::new();
        offer.send(30);
        let mut calls = 0;
        while batch.len() < 30 {
            assert!(
                worker.try_recv_many(port, &mut batch).unwrap() > 0,
                "what is there is found"
            );
            calls += 1;
        }
        assert!(calls <= 9, "{calls} calls for 30 packets");
        assert_eq!(numbers(&batch), (0..30).collect::<Vec<_>>());
        batch.clear();
        assert_eq!(worker.try_recv_many(port, &mut batch), Ok(0));
    }
    let mut none = Batch::with_capacity(0);
    assert_eq!(worker.try_recv_many(port, &mut none), Ok(0));
    assert!(worker.counters(port).unwrap().empty_asks > 0);
}

// ---------------------------------------------------------------------------------------------------------------------- wait

fn deadlines(backend: Backend) {
    let (mut worker, port, _device) = with_tun(backend);
    let mut batch = Batch::with_capacity(8);
    let long_ago = Instant::now().checked_sub(Duration::from_secs(1)).unwrap();
    let wake = worker.wait(Some(long_ago)).unwrap();
    assert!(wake.timer && wake.ready == 0 && !wake.woken && !wake.stopped);
    let deadline = Instant::now() + Duration::from_millis(30);
    let wake = worker.wait(Some(deadline)).unwrap();
    assert!(wake.timer && wake.ready == 0);
    assert!(Instant::now() >= deadline, "not before the deadline");
    assert!(worker.now() >= deadline && worker.now() <= Instant::now());
    assert_eq!(worker.next_ready(), None);
    let mut offer = Offer::new();
    offer.send(1);
    let wake = worker.wait(None).unwrap();
    assert!(!wake.timer && wake.ready == 1);
    assert_eq!(worker.next_ready(), Some(port));
    assert_eq!(worker.next_ready(), None, "each once");
    // Both are told together.
    let wake = worker.wait(Some(long_ago)).unwrap();
    assert!(wake.timer && wake.ready == 1);
    assert_eq!(worker.try_recv_many(port, &mut batch), Ok(1));
    // A deadline that no clock reaches is as good as none.
    offer.send(1);
    let far = Instant::now() + Duration::from_secs(1 << 40);
    assert_eq!(worker.wait(Some(far)).unwrap().ready, 1);
}

fn turns(backend: Backend) {
    quiet();
    let mut worker = worker(backend);
    let mut ports = Vec::new();
    for net in 0..3 {
        let builder = Builder::new("t%d", Mode::Tun).up(true);
        let address: std::net::IpAddr = format!("10.0.{net}.1").parse().unwrap();
        let (queue, _) = single(builder.address(address, 24).open().unwrap());
        ports.push(worker.attach(queue).unwrap());
        Offer::to(format!("10.0.{net}.2:9").parse().unwrap()).send(2 * 4);
    }
    assert_eq!(worker.ports().collect::<Vec<_>>(), ports);
    let mut batch = Batch::with_capacity(2);
    let mut served = Vec::new();
    for _ in 0..3 * 4 {
        assert!(worker.wait(None).unwrap().ready > 0);
        // Only one is served each time: the others must not wait for ever.
        let port = worker.next_ready().unwrap();
        served.push(port);
        while batch.len() < 2 {
            assert!(worker.try_recv_many(port, &mut batch).unwrap() > 0);
        }
        batch.clear();
    }
    for round in served.chunks(3) {
        assert_eq!(round.iter().collect::<HashSet<_>>().len(), 3, "{served:?}");
    }
    for &port in &ports {
        assert_eq!(worker.counters(port).unwrap().received_packets, 8);
    }
    // All of them in one wait.
    for net in 0..3 {
        Offer::to(format!("10.0.{net}.2:9").parse().unwrap()).send(1);
    }
    let mut named = HashSet::new();
    while named.len() < 3 {
        let wake = worker.wait(None).unwrap();
        let before = named.len();
        let mut told = 0;
        while let Some(port) = worker.next_ready() {
            told += 1;
            if worker.try_recv_many(port, &mut batch).unwrap() > 0 {
                named.insert(port);
            }
            batch.clear();
        }
        assert_eq!(told, wake.ready);
        assert!(named.len() > before || told > 0);
    }
}

fn not_emptied(backend: Backend) {
    let (mut worker, port, _device) = with_tun(backend);
    Offer::new().send(10);
    let mut batch = Batch::with_capacity(4);
    let mut seen = Vec::new();
    for _ in 0..3 {
        assert_eq!(worker.wait(None).unwrap().ready, 1);
        assert_eq!(worker.wait(soon()).unwrap().ready, 1, "nothing was taken in between");
        assert_eq!(worker.next_ready(), Some(port));
        worker.recv_many(port, &mut batch).unwrap();
        seen.extend(numbers(&batch));
        batch.clear();
    }
    while seen.len() < 10 {
        assert_eq!(worker.wait(None).unwrap().ready, 1);
        worker.try_recv_many(port, &mut batch).unwrap();
        seen.extend(numbers(&batch));
        batch.clear();
    }
    assert_eq!(seen, (0..10).collect::<Vec<_>>());
    assert_eq!(worker.try_recv_many(port, &mut batch), Ok(0));
    let wake = worker.wait(past()).unwrap();
    assert_eq!(wake.ready, 0, "emptied");
}

fn idle_blocked_in_wait(backend: Backend) {
    idle(backend, |worker, _| worker.wait(None).unwrap().stopped);
}

fn idle_blocked_in_receive(backend: Backend) {
    idle(backend, |worker, port| {
        worker.recv_many(port, &mut Batch::with_capacity(8)) == Ok(0)
    });
}

/// A worker that waits for a queue and a socket gets no wake-up while nothing comes.
fn idle(backend: Backend, block: fn(&mut Worker, PortId) -> bool) {
    let (tell, told) = mpsc::channel::<(i32, Waker)>();
    let device = tun(1).open().unwrap();
    let handle = device.device().unwrap().clone();
    let thread = thread::spawn(move || {
        let mut worker = worker(backend);
        let queue = single(device).0;
        let port = worker.attach(queue).unwrap();
        worker.attach(UdpSocket::bind("127.0.0.1:0").unwrap()).unwrap();
        tell.send((this_thread(), worker.waker())).unwrap();
        assert!(block(&mut worker, port));
    });
    let (id, waker) = told.recv().unwrap();
    await_sleep(id);
    once_quiet(|| {
        let before = switches(id);
        thread::sleep(Duration::from_millis(300));
        let after = switches(id);
        if after.0 - before.0 <= 1 {
            return Ok(());
        }
        Err(format!("{before:?} to {after:?}"))
    });
    waker.stop();
    thread.join().unwrap();
    drop(handle);
}

fn idle_process(backend: Backend) {
    let (tell, told) = mpsc::channel::<(i32, Waker)>();
    let device = tun(1).open().unwrap();
    let thread = thread::spawn(move || {
        let mut worker = worker(backend);
        worker.attach(single(device).0).unwrap();
        tell.send((this_thread(), worker.waker())).unwrap();
        worker.wait(None).unwrap()
    });
    let (id, waker) = told.recv().unwrap();
    await_sleep(id);
    once_quiet(|| {
        let before = process::process_cpu_time();
        thread::sleep(Duration::from_millis(500));
        let took = process::process_cpu_time() - before;
        if took < Duration::from_millis(20) {
            return Ok(());
        }
        Err(format!("{took:?} of CPU time in 500 ms of nothing"))
    });
    waker.wake();
    assert!(thread.join().unwrap().woken);
}

// --------------------------------------------------------------------------------------------------------------------- waker

fn waker_ends_waiting(backend: Backend) {
    let (mut worker, port, _device) = with_tun(backend);
    let mut batch = Batch::with_capacity(8);
    let waker = worker.waker();
    let me = this_thread();
    // Before: it is kept for the next wait, however often it was used.
    waker.wake();
    waker.clone().wake();
    let wake = worker.wait(None).unwrap();
    assert!(wake.woken && !wake.stopped && wake.ready == 0 && !wake.timer);
    assert!(!worker.wait(past()).unwrap().woken, "taken");
    // During.
    for _ in 0..50 {
        thread::scope(|scope| {
            scope.spawn(|| {
                await_sleep(me);
                waker.wake();
            });
            assert!(worker.wait(None).unwrap().woken);
        });
        thread::scope(|scope| {
            scope.spawn(|| {
                await_sleep(me);
                waker.wake();
            });
            assert_eq!(worker.recv_many(port, &mut batch), Ok(0));
        });
        let wake = worker.wait(None).unwrap();
        assert!(wake.woken, "receive leaves it to wait to tell");
    }
    // A wake-up does not hide what is there.
    Offer::new().send(1);
    waker.wake();
    assert_eq!(worker.recv_many(port, &mut batch), Ok(1));
    Offer::new().send(1);
    let wake = worker.wait(None).unwrap();
    assert!(wake.woken);
    receive(&mut worker, port, &mut batch, 2).unwrap();
    // A waker may outlive its worker.
    drop((batch, worker));
    waker.wake();
    waker.stop();
}

fn stop_stays(backend: Backend) {
    let (mut worker, port, _device) = with_tun(backend);
    let mut batch = Batch::with_capacity(8);
    let waker = worker.waker();
    let me = this_thread();
    thread::scope(|scope| {
        scope.spawn(|| {
            await_sleep(me);
            waker.stop();
        });
        assert!(worker.wait(None).unwrap().stopped);
    });
    for _ in 0..3 {
        let wake = worker.wait(None).unwrap();
        assert!(wake.stopped && !wake.woken);
        assert_eq!(worker.recv_many(port, &mut batch), Ok(0));
    }
    // What is there can still be taken.
    Offer::new().send(3);
    while batch.len() < 3 {
        assert!(worker.try_recv_many(port, &mut batch).unwrap() > 0);
    }
}

/// Two threads wake 5,000 times each and wait for the answer to each: a lost one hangs the trial.
fn ping_pong(worker: &mut Worker, mut turn: impl FnMut(&mut Worker) -> bool) {
    const EACH: u32 = 5_000;
    let (asked, answered) = (AtomicU32::new(0), AtomicU32::new(0));
    let waker = worker.waker();
    thread::scope(|scope| {
        for _ in 0..2 {
            let (asked, answered, waker) = (&asked, &answered, waker.clone());
            scope.spawn(move || {
                for _ in 0..EACH {
                    let mine = asked.fetch_add(1, Ordering::SeqCst) + 1;
                    waker.wake();
                    while answered.load(Ordering::SeqCst) < mine {
                        thread::yield_now();
                    }
                }
            });
        }
        let mut woken = 0u32;
        while answered.load(Ordering::SeqCst) < 2 * EACH {
            if turn(worker) {
                woken += 1;
                answered.store(asked.load(Ordering::SeqCst), Ordering::SeqCst);
            }
        }
        assert!(woken >= EACH, "{woken} wake-ups told: one for each answer at least");
    });
    assert!(!worker.wait(past()).unwrap().woken, "none invented");
}

fn wakes_in_wait(backend: Backend) {
    let (mut worker, _port, _device) = with_tun(backend);
    ping_pong(&mut worker, |worker| worker.wait(None).unwrap().woken);
}

fn wakes_in_receive(backend: Backend) {
    let (mut worker, port, _device) = with_tun(backend);
    let mut batch = Batch::with_capacity(8);
    ping_pong(&mut worker, |worker| {
        assert_eq!(worker.recv_many(port, &mut batch), Ok(0));
        worker.wait(past()).unwrap().woken
    });
}

fn wakes_under_traffic(backend: Backend) {
    let (mut worker, port, _device) = with_tun(backend);
    let mut batch = Batch::with_capacity(8);
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        let mut offer = Offer::new();
        let over = &over;
        scope.spawn(move || {
            while !over.load(Ordering::SeqCst) {
                offer.send(3);
                thread::yield_now();
            }
        });
        ping_pong(&mut worker, |worker| {
            let woken = worker.wait(None).unwrap().woken;
            while let Some(port) = worker.next_ready() {
                worker.try_recv_many(port, &mut batch).unwrap();
                batch.clear();
            }
            woken
        });
        over.store(true, Ordering::SeqCst);
    });
    assert!(worker.counters(port).unwrap().received_packets > 0);
}

// ---------------------------------------------------------------------------------------------------------------------- spin

fn spinning(backend: Backend, duration: Duration) -> (Worker, PortId, tun_driver::Device) {
    let (queue, device) = single(tun(1).open().unwrap());
    let mut worker = Worker::new(&WorkerConfig {
        wait: Wait::Spin { duration },
        ..config(backend)
    })
    .unwrap();
    let port = worker.attach(queue).unwrap();
    (worker, port, device)
}

fn spin_without_end(backend: Backend) {
    let (mut worker, port, _device) = spinning(backend, Duration::MAX);
    let mut batch = Batch::with_capacity(64);
    assert!(worker.wait(past()).unwrap().timer);
    let deadline = Instant::now() + Duration::from_millis(20);
    assert!(worker.wait(Some(deadline)).unwrap().timer);
    assert!(Instant::now() >= deadline);
    let before = switches(this_thread());
    let waker = worker.waker();
    for _ in 0..20 {
        thread::scope(|scope| {
            scope.spawn(|| {
                thread::sleep(Duration::from_millis(1));
                waker.wake();
            });
            assert!(worker.wait(None).unwrap().woken);
            let mut offer = Offer::new();
            scope.spawn(move || {
                thread::sleep(Duration::from_millis(1));
                offer.send(1);
            });
            assert_eq!(worker.recv_many(port, &mut batch), Ok(1));
        });
    }
    // Joining the threads sleeps; waiting must not: 40 waits, 20 joins.
    let after = switches(this_thread());
    assert!(after.0 - before.0 <= 30, "{before:?} to {after:?}: it slept");
    thread::scope(|scope| {
        scope.spawn(|| {
            thread::sleep(Duration::from_millis(1));
            waker.stop();
        });
        assert_eq!(worker.recv_many(port, &mut batch), Ok(0));
    });
    assert!(worker.wait(None).unwrap().stopped);
}

fn spin_for_a_while(backend: Backend) {
    let (mut worker, port, _device) = spinning(backend, Duration::from_micros(50));
    let mut batch = Batch::with_capacity(64);
    let me = this_thread();
    let waker = worker.waker();
    for _ in 0..50 {
        thread::scope(|scope| {
            let mut offer = Offer::new();
            scope.spawn(move || {
                // It falls asleep although it spins at first.
                await_sleep(me);
                offer.send(1);
            });
            assert_eq!(worker.recv_many(port, &mut batch), Ok(1));
        });
        thread::scope(|scope| {
            scope.spawn(|| {
                await_sleep(me);
                waker.wake();
            });
            assert!(worker.wait(None).unwrap().woken);
        });
    }
}

// ---------------------------------------------------------------------------------------------------------------------- send

fn catcher() -> Catcher {
    Catcher::bind(format!("{HERE}:{PORT}").parse().unwrap()).unwrap()
}

/// What the catcher has: all of it is there when the write has returned.
fn caught(catcher: &mut Catcher, flows: &[(u16, u32)]) -> Tracker {
    let mut tracker = Tracker::new(flows.len());
    catcher.take(&mut tracker).unwrap();
    for &(flow, count) in flows {
        tracker.sent(flow, count);
    }
    tracker
}

fn send_in_order(backend: Backend) {
    let (mut worker, port, device) = with_tun(backend);
    let mut catcher = catcher();
    let before = Handle::new().unwrap().stats(device.index()).unwrap();
    let mut batch = batch_of(&worker, 0..150);
    let sent = worker.send_many(port, &mut batch);
    assert_eq!((sent.accepted, sent.refused), (150, 0));
    assert_eq!((sent.refusal, sent.stopped), (None, None));
    assert!(batch.is_empty());
    caught(&mut catcher, &[(0, 150)]).summary().assert_all();
    let sent = worker.send_many(port, &mut batch);
    assert_eq!(
        (sent.accepted, sent.refused, sent.stopped),
        (0, 0, None),
        "an empty batch"
    );
    let counters = worker.counters(port).unwrap();
    assert_eq!((counters.sent_packets, counters.sent_bytes), (150, 15_000));
    let kernel = Handle::new().unwrap().stats(device.index()).unwrap().since(&before);
    assert_eq!(kernel.rx_packets, 150);
    assert_eq!(worker.buffers(), (1024, 1024));
    assert_eq!(worker.discarded(), 0, "what was sent is not discarded");
}

/// Good and bad packets by turns: 0, bad, 1, bad, … with a bad one at each end.
fn mixed(worker: &Worker, good: u32) -> Batch {
    let mut batch = Batch::with_capacity(2 * good as usize + 1);
    let bad = |batch: &mut Batch, index: u32| {
        let packet = if index.is_multiple_of(2) {
            worker.packet(40)
        } else {
            worker.packet(0)
        };
        batch.push(packet.unwrap()).unwrap();
    };
    for sequence in 0..good {
        bad(&mut batch, sequence);
        batch.push(build(worker, &outward(), 100, sequence)).unwrap();
    }
    bad(&mut batch, good);
    batch
}

fn bad_packets(backend: Backend) {
    let (mut worker, port, device) = with_tun(backend);
    let mut catcher = catcher();
    let before = Handle::new().unwrap().stats(device.index()).unwrap();
    let mut batch = mixed(&worker, 100);
    let sent = worker.send_many(port, &mut batch);
    assert_eq!((sent.accepted, sent.refused, sent.stopped), (100, 101, None));
    let refusal = sent.refusal.unwrap();
    assert_eq!(
        (refusal.kind(), refusal.raw_os_error()),
        (PortErrorKind::BadPacket, libc::EINVAL)
    );
    assert!(batch.is_empty());
    let counters = worker.counters(port).unwrap();
    assert_eq!((counters.sent_packets, counters.refused_packets), (100, 101));
    assert_eq!(counters.refused.count(libc::EINVAL), 101);
    assert_eq!(counters.refused.iter().count(), 1);
    caught(&mut catcher, &[(0, 100)]).summary().assert_all();
    let kernel = Handle::new().unwrap().stats(device.index()).unwrap().since(&before);
    assert_eq!(kernel.rx_packets, 100);
    assert!(worker.wait(past()).unwrap().ready == 0, "the port goes on as before");
}

fn device_down(backend: Backend) {
    let (mut worker, port, device) = with_tun(backend);
    let mut catcher = catcher();
    let mut received = Batch::with_capacity(64);
    for round in 1..=3 {
        // Packets that lie in the queue are still read.
        Offer::new().send(3);
        device.set_up(false).unwrap();
        receive(&mut worker, port, &mut received, 3).unwrap();
        received.clear();
        let mut batch = batch_of(&worker, 0..200);
        let sent = worker.send_many(port, &mut batch);
        assert_eq!(sent.accepted, 0);
        let stopped = sent.stopped.expect("told");
        assert_eq!(
            (stopped.kind(), stopped.raw_os_error()),
            (PortErrorKind::Down, libc::EIO)
        );
        assert!(sent.refused >= 1 && sent.refused + batch.len() == 200, "{sent:?}");
        assert!(!stopped.is_permanent());
        // Each further try costs one packet.
        let left = batch.len();
        let sent = worker.send_many(port, &mut batch);
        assert_eq!((sent.accepted, sent.refused, batch.len()), (0, 1, left - 1));
        let counters = worker.counters(port).unwrap();
        assert_eq!(counters.refused.count(libc::EIO), counters.refused_packets);
        // Receiving sees an empty queue, no error.
        assert_eq!(worker.try_recv_many(port, &mut received), Ok(0));
        assert_eq!(worker.wait(past()).unwrap().ready, 0);
        device.set_up(true).unwrap();
        batch.clear();
        let mut batch = batch_of(&worker, 0..100);
        let sent = worker.send_many(port, &mut batch);
        assert_eq!(
            (sent.accepted, sent.refused, sent.stopped),
            (100, 0, None),
            "round {round}"
        );
        caught(&mut catcher, &[(0, 100)]).summary().assert_all();
        Offer::new().send(20);
        receive(&mut worker, port, &mut received, 20).unwrap();
        assert_eq!(numbers(&received), (0..20).collect::<Vec<_>>());
        received.clear();
    }
}

fn delete(device: &tun_driver::Device) {
    Handle::new().unwrap().delete(device.index()).unwrap();
}

fn device_deleted(backend: Backend) {
    let (mut worker, port, device) = with_tun(backend);
    let mut batch = Batch::with_capacity(8);
    Offer::new().send(1);
    assert_eq!(worker.wait(None).unwrap().ready, 1);
    delete(&device);
    if backend == Backend::IoUring {
        // The read that was armed has it; what the kernel still had is lost with the device.
        assert_eq!(worker.try_recv_many(port, &mut batch), Ok(1), "packets first");
    }
    if backend == Backend::Syscalls {
        assert_eq!(worker.wait(None).unwrap().ready, 1);
    } else {
        // Nobody asked the device since: waiting finds out.
        let wake = worker.wait(Some(Instant::now() + Duration::from_secs(10))).unwrap();
        assert_eq!((wake.ready, wake.timer), (1, false));
    }
    assert_eq!(worker.next_ready(), Some(port));
    assert_eq!(kind(worker.try_recv_many(port, &mut batch)), PortErrorKind::Gone);
    // Told once by wait, which then sleeps; at every call by the others.
    let (cpu, slept) = (process::thread_cpu_time(), soon());
    for _ in 0..3 {
        let wake = worker.wait(slept).unwrap();
        assert!(wake.timer && wake.ready == 0, "{wake:?}");
    }
    let took = process::thread_cpu_time() - cpu;
    assert!(
        took < Duration::from_millis(100),
        "{took:?} of CPU time in a wait of 300 ms"
    );
    let error = worker.recv_many(port, &mut batch).unwrap_err();
    assert!(error.is_permanent() && error.raw_os_error() == libc::EBADFD, "{error}");
    assert_eq!(kind(worker.try_recv_many(port, &mut batch)), PortErrorKind::Gone);
    let mut unsent = batch_of(&worker, 0..3);
    let sent = worker.send_many(port, &mut unsent);
    assert_eq!((sent.accepted, sent.refused, unsent.len()), (0, 0, 3));
    assert_eq!(sent.stopped.unwrap().kind(), PortErrorKind::Gone);
    assert_eq!(worker.send(port, &[0x45; 40]).unwrap_err().kind(), PortErrorKind::Gone);
    // It can be taken off, and the worker goes on.
    assert!(worker.detach(port).unwrap().endpoint.into_queue().is_some());
    let (queue, _device) = single(tun(1).open().unwrap());
    let port = worker.attach(queue).unwrap();
    Offer::new().send(1);
    batch.clear();
    receive(&mut worker, port, &mut batch, 1).unwrap();
}

fn deleted_while_receiving(backend: Backend) {
    for in_wait in [false, true] {
        let (mut worker, port, device) = with_tun(backend);
        let mut batch = Batch::with_capacity(8);
        let me = this_thread();
        thread::scope(|scope| {
            // In this namespace.
            let netlink = Handle::new().unwrap();
            scope.spawn(move || {
                await_sleep(me);
                netlink.delete(device.index()).unwrap();
            });
            if in_wait {
                assert_eq!(worker.wait(None).unwrap().ready, 1);
            }
            assert_eq!(kind(worker.recv_many(port, &mut batch)), PortErrorKind::Gone);
        });
    }
}

fn deleted_found_by_send(backend: Backend) {
    let (mut worker, port, device) = with_tun(backend);
    delete(&device);
    let mut batch = batch_of(&worker, 0..100);
    let sent = worker.send_many(port, &mut batch);
    assert_eq!((sent.accepted, sent.refused, batch.len()), (0, 0, 100));
    let stopped = sent.stopped.unwrap();
    assert_eq!(
        (stopped.kind(), stopped.raw_os_error()),
        (PortErrorKind::Gone, libc::EBADFD)
    );
    let wake = worker.wait(soon()).unwrap();
    assert_eq!((wake.ready, wake.timer), (1, false), "wait tells it, too");
    let mut received = Batch::with_capacity(8);
    assert_eq!(kind(worker.recv_many(port, &mut received)), PortErrorKind::Gone);
    let wake = worker.wait(soon()).unwrap();
    assert_eq!((wake.ready, wake.timer), (0, true), "once");
}

/// A TAP device behind which a slow link (TBF) takes all frames, so that they stay charged to the queue until the link has sent them.
///
/// By redirection on the way in: IP and a bridge with netfilter take the charge off.
struct Slow {
    queue: Option<tun_driver::Queue>,
    spec: Spec,
    catcher: Catcher,
    _beyond: Namespace,
}

impl Slow {
    fn new() -> Self {
        need_program("tc", "iproute2");
        quiet();
        let netlink = Handle::new().unwrap();
        let beyond = Namespace::new().unwrap();
        let (near, far) = netlink.add_veth("near", "far").unwrap();
        let (queue, _device) = single(Builder::new("t0", Mode::Tap).up(true).open().unwrap());
        netlink.set_up(near, true).unwrap();
        let mac = [2, 0, 0, 0, 0, 9];
        netlink.set_mac(far, mac).unwrap();
        netlink
            .move_to_namespace(far, std::os::fd::AsFd::as_fd(&beyond))
            .unwrap();
        let catcher = beyond
            .run(|| {
                quiet();
                let netlink = Handle::new().unwrap();
                let far = netlink.index_of("far").unwrap();
                netlink.add_address(far, HERE.parse().unwrap(), 24).unwrap();
                netlink.set_up(far, true).unwrap();
                // Until then it drops what comes.
                netlink.wait_running(far, Duration::from_secs(10)).unwrap();
                catcher()
            })
            .unwrap();
        netlink.wait_running(near, Duration::from_secs(10)).unwrap();
        for arguments in [
            "qdisc add dev near root tbf rate 20mbit burst 4kb limit 10mb",
            "qdisc add dev t0 clsact",
            "filter add dev t0 ingress u32 match u32 0 0 action mirred egress redirect dev near",
        ] {
            let output = Command::new("tc").args(arguments.split(' ')).output().unwrap();
            if !output.status.success() {
                skip(format!("tc {arguments}: {}", String::from_utf8_lossy(&output.stderr)));
            }
        }
        let ethernet = Ethernet {
            source: [2, 0, 0, 0, 0, 1],
            target: mac,
        };
        let spec = outward().framing(Framing {
            ethernet: Some(ethernet),
            ..Framing::NONE
        });
        Self {
            queue: Some(queue),
            spec,
            catcher,
            _beyond: beyond,
        }
    }

    fn batch(&self, worker: &Worker, numbers: std::ops::Range<u32>) -> Batch {
        let mut batch = Batch::with_capacity(numbers.len());
        for sequence in numbers {
            batch.push(build(worker, &self.spec, 600, sequence)).unwrap();
        }
        batch
    }
}

fn set_send_buffer(queue: RawFd, bytes: i32) {
    const TUNSETSNDBUF: libc::c_ulong = 0x4004_54d4;
    // SAFETY: TUNSETSNDBUF reads one int, which outlives the call.
    assert_eq!(unsafe { libc::ioctl(queue, TUNSETSNDBUF, &raw const bytes) }, 0);
}

/// Sends the batch to its end, waiting where the kernel takes no more.
fn send_all(worker: &mut Worker, port: PortId, batch: &mut Batch) -> (usize, usize) {
    let (mut accepted, mut refused) = (0, 0);
    let end = Instant::now() + Duration::from_secs(30) * common::slowness();
    while !batch.is_empty() {
        let before = batch.len();
        let sent = worker.send_many(port, batch);
        assert_eq!(batch.len(), before - sent.accepted - sent.refused);
        accepted += sent.accepted;
        refused += sent.refused;
        match sent.stopped {
            Some(error) => {
                assert_eq!(
                    (error.kind(), error.raw_os_error()),
                    (PortErrorKind::Backpressure, libc::EAGAIN)
                );
                thread::sleep(Duration::from_micros(300));
            }
            None => assert!(batch.is_empty(), "it stopped without saying why: {sent:?}"),
        }
        assert!(Instant::now() < end);
    }
    (accepted, refused)
}

/// T17: the buffer holds a few packets, what is refused is sent again, in order.
fn send_buffer_before_attach(backend: Backend) {
    for _ in 0..repeats(1, 20) {
        // The devices of one round go a little after it.
        let here = Namespace::new().unwrap();
        here.run(|| slow_in_order(backend, |_| {})).unwrap();
    }
}

/// A copy of the descriptor in other hands shares O_NONBLOCK: a write would wait for room instead
/// of saying that there is none.
fn send_buffer_and_blocking(backend: Backend) {
    slow_in_order(backend, |queue| {
        // SAFETY: no pointers.
        assert_eq!(unsafe { libc::fcntl(queue, libc::F_SETFL, libc::O_RDWR) }, 0);
    });
}

fn slow_in_order(backend: Backend, change: impl Fn(RawFd)) {
    let mut slow = Slow::new();
    let queue = slow.queue.take().unwrap();
    let fd = queue.as_raw_fd();
    set_send_buffer(fd, 20_000);
    assert_eq!(queue.send_buffer().unwrap(), 20_000);
    let mut worker = worker(backend);
    let port = worker.attach(queue).unwrap();
    change(fd);
    let mut batch = slow.batch(&worker, 0..800);
    assert_eq!(send_all(&mut worker, port, &mut batch), (800, 0));
    let counters = worker.counters(port).unwrap();
    assert!(counters.backpressure > 0, "the buffer never was full");
    assert_eq!((counters.sent_packets, counters.refused_packets), (800, 0));
    let mut tracker = Tracker::new(1);
    slow.catcher.catch(&mut tracker, 800, Duration::from_secs(10)).unwrap();
    tracker.sent(0, 800);
    tracker.summary().assert_all();
}

fn send_buffer_after_attach(backend: Backend) {
    let mut slow = Slow::new();
    let mut worker = worker(backend);
    let port = worker.attach(slow.queue.take().unwrap()).unwrap();
    set_send_buffer(worker.queue(port).unwrap().as_raw_fd(), 20_000);
    let mut batch = slow.batch(&worker, 0..800);
    let (accepted, refused) = send_all(&mut worker, port, &mut batch);
    assert_eq!(accepted + refused, 800);
    // In the first burst, before anybody knew, a packet may have been overtaken; it is refused then, not sent late.
    assert!(refused <= 64, "{refused}");
    let counters = worker.counters(port).unwrap();
    assert!(counters.backpressure > 0);
    assert_eq!(counters.refused.count(libc::EAGAIN), refused as u64);
    let mut tracker = Tracker::new(1);
    slow.catcher
        .catch(&mut tracker, accepted, Duration::from_secs(10))
        .unwrap();
    tracker.sent(0, 800);
    let summary = tracker.summary();
    summary.assert_orderly();
    assert_eq!((summary.received, summary.lost), (accepted as u64, refused as u64));
}

fn bad_packet_under_back_pressure(backend: Backend) {
    let mut slow = Slow::new();
    let queue = slow.queue.take().unwrap();
    set_send_buffer(queue.as_raw_fd(), 20_000);
    let mut worker = worker(backend);
    let port = worker.attach(queue).unwrap();
    let mut batch = slow.batch(&worker, 0..200);
    send_all(&mut worker, port, &mut batch);
    assert!(worker.counters(port).unwrap().backpressure > 0);
    let mut tracker = Tracker::new(1);
    slow.catcher.catch(&mut tracker, 200, Duration::from_secs(10)).unwrap();
    // A frame shorter than its header is refused, the buffer is empty again: all others go at once.
    let before = worker.counters(port).unwrap().backpressure;
    let mut batch = Batch::with_capacity(7);
    for sequence in 200..206 {
        if sequence == 202 {
            batch.push(worker.packet_from(&[1; 10]).unwrap()).unwrap();
        }
        batch.push(build(&worker, &slow.spec, 100, sequence)).unwrap();
    }
    let sent = worker.send_many(port, &mut batch);
    assert_eq!((sent.accepted, sent.refused, sent.stopped), (6, 1, None));
    assert_eq!(sent.refusal.unwrap().kind(), PortErrorKind::BadPacket);
    assert_eq!(worker.counters(port).unwrap().backpressure, before);
    slow.catcher.catch(&mut tracker, 6, Duration::from_secs(10)).unwrap();
    tracker.sent(0, 206);
    tracker.summary().assert_all();
}

// ----------------------------------------------------------------------------------------------------------- sizes and framing

fn truncation(backend: Backend) {
    let (mut worker, port, device) = with_tun(backend);
    device.set_mtu(4000).unwrap();
    let longest = worker.longest_packet();
    let mut batch = Batch::with_capacity(64);
    for waited in [false, true] {
        let before = worker.counters(port).unwrap().clone();
        let mut offer = Offer::new();
        if waited {
            worker.wait(past()).unwrap();
        }
        offer.send_long(longest - 28);
        offer.send_long(longest - 28 + 1);
        offer.send_long(3000);
        offer.send(2);
        let mut told = 0;
        let end = soon();
        while batch.len() < 3 || told == 0 {
            assert!(!worker.wait(end).unwrap().timer, "{} packets, told {told}", batch.len());
            match worker.try_recv_many(port, &mut batch) {
                Ok(_) => {}
                Err(error) => {
                    assert_eq!(
                        (error.kind(), error.raw_os_error()),
                        (PortErrorKind::Truncated, libc::EMSGSIZE)
                    );
                    assert!(!error.is_permanent());
                    told += 1;
                }
            }
        }
        assert_eq!(numbers(&batch), [0, 3, 4]);
        batch.clear();
        assert_eq!(worker.try_recv_many(port, &mut batch), Ok(0));
        assert!((1..=2).contains(&told), "told {told} times");
        let counters = worker.counters(port).unwrap();
        assert_eq!(counters.truncated - before.truncated, 2);
        assert_eq!(counters.received_packets - before.received_packets, 3);
    }
    worker.detach(port).unwrap();
    assert_eq!(worker.buffers(), (1024, 1024), "truncated packets leave their buffers");
}

fn mtu_beyond_the_buffers(backend: Backend) {
    if backend == Backend::IoUring {
        need_locked_memory(WorkerConfig::default().memory().total_with_large_buffers() as u64);
    }
    let wide = WorkerConfig {
        max_packet: 9000,
        buffers: 64,
        ..config(backend)
    };
    for (config, large) in [(config(backend), 128), (wide, 0)] {
        let mut worker = Worker::new(&config).unwrap();
        assert_eq!(worker.backend().large_buffers, 0, "none before they are needed");
        let (queue, device) = single(tun(1).mtu(9000).open().unwrap());
        let port = worker.attach(queue).unwrap();
        assert_eq!(worker.backend().large_buffers, large);
        assert_eq!(
            worker.backend().registered_large_buffers,
            large > 0 && backend == Backend::IoUring
        );
        Offer::new().send_long(9000 - 28);
        let mut batch = Batch::with_capacity(4);
        receive(&mut worker, port, &mut batch, 1).unwrap();
        assert_eq!(batch[0].len(), 9000);
        assert_eq!(numbers(&batch), [0]);
        drop((batch, worker, device));
    }
}

/// The remedy that the error names.
fn attached_again(backend: Backend) {
    let (mut worker, port, device) = with_tun(backend);
    device.set_mtu(9_000).unwrap();
    let mut offer = Offer::new();
    offer.send_long(9_000 - 28);
    let mut batch = Batch::with_capacity(4);
    let error = worker.recv_many(port, &mut batch).unwrap_err();
    assert_eq!(error.kind(), PortErrorKind::Truncated);
    assert!(error.to_string().contains("attach it again"), "{error}");
    assert_eq!(
        worker.port_name(port).as_deref(),
        Some(worker.queue(port).unwrap().name())
    );
    let queue = worker.detach(port).unwrap().endpoint.into_queue().unwrap();
    assert_eq!(worker.port_name(port), None);
    let port = worker.attach(queue).unwrap();
    offer.send_long(9_000 - 28);
    receive(&mut worker, port, &mut batch, 1).unwrap();
    assert_eq!((batch[0].len(), numbers(&batch)), (9_000, vec![1]));
}

fn large_packets(backend: Backend) {
    let mut worker = Worker::new(&WorkerConfig {
        large_buffers: 16,
        ..config(backend)
    })
    .unwrap();
    let (large, _device) = single(tun(1).mtu(65_535).open().unwrap());
    let port = worker.attach(large).unwrap();
    let mut offer = Offer::new();
    offer.send_long(65_507);
    offer.send(1);
    let mut batch = Batch::with_capacity(4);
    receive(&mut worker, port, &mut batch, 2).unwrap();
    assert_eq!(batch[0].len(), 65_535);
    assert_eq!(numbers(&batch), [0, 1]);
    assert!(batch[0].headroom() >= 64);
    batch.clear();
    let mut catcher = catcher();
    let mut batch = Batch::with_capacity(4);
    for (sequence, len) in [(0, 60_000), (1, 100), (2, 65_535)] {
        batch.push(build(&worker, &outward(), len, sequence)).unwrap();
    }
    let sent = worker.send_many(port, &mut batch);
    assert_eq!(sent.accepted, 3);
    caught(&mut catcher, &[(0, 3)]).summary().assert_all();
    assert!(worker.packet(worker.longest_packet()).is_some());
    assert!(worker.packet(worker.longest_packet() + 1).is_none());
}

fn packet_information(backend: Backend) {
    let (queue, _device) = single(tun(1).packet_info(true).open().unwrap());
    let mut worker = worker(backend);
    let port = worker.attach(queue).unwrap();
    let mut catcher = catcher();
    Offer::new().send(5);
    let mut batch = Batch::with_capacity(8);
    receive(&mut worker, port, &mut batch, 5).unwrap();
    for (index, packet) in batch.iter().enumerate() {
        assert_eq!(packet[..4], [0, 0, 8, 0], "no flags, IPv4");
        assert_eq!(Framing::PACKET_INFO.check(packet).unwrap().sequence, index as u32);
    }
    let mut batch = Batch::with_capacity(8);
    for sequence in 0..5 {
        let spec = outward().framing(Framing::PACKET_INFO);
        batch.push(build(&worker, &spec, 200, sequence)).unwrap();
    }
    assert_eq!(worker.send_many(port, &mut batch).accepted, 5);
    caught(&mut catcher, &[(0, 5)]).summary().assert_all();
}

fn tap(backend: Backend) {
    quiet();
    let mac = [2, 0, 0, 0, 0, 7];
    let builder = Builder::new("t%d", Mode::Tap).mac(mac).up(true);
    let here: std::net::IpAddr = HERE.parse().unwrap();
    let (queue, device) = single(builder.address(here, 24).open().unwrap());
    let beyond = [2, 0, 0, 0, 0, 8];
    let netlink = Handle::new().unwrap();
    netlink
        .add_neighbour(device.index(), THERE.parse().unwrap(), beyond)
        .unwrap();
    let mut worker = worker(backend);
    let port = worker.attach(queue).unwrap();
    let mut catcher = catcher();
    let frame = |source, target| Framing {
        ethernet: Some(Ethernet { source, target }),
        ..Framing::NONE
    };
    let mut offer = Offer::new();
    offer.send(5);
    offer.send_long(1500 - 28);
    let mut batch = Batch::with_capacity(8);
    receive(&mut worker, port, &mut batch, 6).unwrap();
    for (index, packet) in batch.iter().enumerate() {
        assert_eq!((&packet[..6], &packet[6..12]), (&beyond[..], &mac[..]));
        assert_eq!(frame(mac, beyond).check(packet).unwrap().sequence, index as u32);
    }
    assert_eq!(batch[5].len(), 1514);
    let mut batch = Batch::with_capacity(8);
    for sequence in 0..5 {
        batch
            .push(build(&worker, &outward().framing(frame(beyond, mac)), 200, sequence))
            .unwrap();
    }
    batch.push(worker.packet(13).unwrap()).unwrap();
    let sent = worker.send_many(port, &mut batch);
    assert_eq!(
        (sent.accepted, sent.refused),
        (5, 1),
        "a frame shorter than its header is refused"
    );
    caught(&mut catcher, &[(0, 5)]).summary().assert_all();
}

// ----------------------------------------------------------------------------------------------------------------------- UDP

fn loopback(family: &str) -> UdpSocket {
    let socket = UdpSocket::bind(if family == "v4" { "127.0.0.1:0" } else { "[::1]:0" }).unwrap();
    socket
        .set_read_timeout(Some(Duration::from_secs(10) * common::slowness()))
        .unwrap();
    socket
}

fn udp_peers(backend: Backend) {
    for family in ["v4", "v6"] {
        let mut worker = worker(backend);
        let socket = loopback(family);
        let address = socket.local_addr().unwrap();
        let port = worker.attach(socket).unwrap();
        assert_eq!(worker.udp(port).unwrap().local_addr().unwrap(), address);
        assert!(worker.queue(port).is_none());
        let clients = [loopback(family), loopback(family)];
        let mut batch = Batch::with_capacity(200);
        for round in 0..3u8 {
            for index in 0..100u8 {
                clients[usize::from(index % 2)]
                    .send_to(&[round, index], address)
                    .unwrap();
            }
            receive(&mut worker, port, &mut batch, 100).unwrap();
            for (index, packet) in batch.iter_mut().enumerate() {
                assert_eq!(packet[..], [round, index as u8]);
                assert_eq!(packet.peer(), Some(clients[index % 2].local_addr().unwrap()));
                assert!(packet.headroom() >= 64);
                packet.append(b"!").unwrap();
            }
            let sent = worker.send_many(port, &mut batch);
            assert_eq!((sent.accepted, sent.stopped), (100, None));
            for index in 0..100u8 {
                let mut answer = [0; 8];
                let (len, from) = again(|| clients[usize::from(index % 2)].recv_from(&mut answer)).unwrap();
                assert_eq!((&answer[..len], from), (&[round, index, b'!'][..], address));
            }
        }
        assert_eq!(worker.try_recv_many(port, &mut batch), Ok(0));
        let counters = worker.counters(port).unwrap();
        assert_eq!((counters.received_packets, counters.received_bytes), (300, 600));
        assert_eq!((counters.sent_packets, counters.sent_bytes), (300, 900));
        // Blocking, with the datagram yet to come.
        let me = this_thread();
        thread::scope(|scope| {
            scope.spawn(|| {
                await_sleep(me);
                clients[0].send_to(b"late", address).unwrap();
            });
            assert_eq!(worker.recv_many(port, &mut batch), Ok(1));
        });
        assert_eq!(batch[0][..], *b"late");
    }
}

fn udp_connected(backend: Backend) {
    let mut worker = worker(backend);
    let (socket, other, stranger) = (loopback("v4"), loopback("v4"), loopback("v4"));
    let address = socket.local_addr().unwrap();
    socket.connect(other.local_addr().unwrap()).unwrap();
    other.connect(address).unwrap();
    let port = worker.attach(socket).unwrap();
    worker.send(port, b"to the peer").unwrap();
    let mut bytes = [0; 32];
    assert_eq!(again(|| other.recv(&mut bytes)).unwrap(), 11);
    stranger.send_to(b"stranger", address).unwrap();
    other.send(b"from the peer").unwrap();
    let mut batch = Batch::with_capacity(8);
    receive(&mut worker, port, &mut batch, 1).unwrap();
    assert_eq!(batch[0][..], *b"from the peer");
    batch[0].set_peer(None);
    assert_eq!(worker.send_many(port, &mut batch).accepted, 1);
    assert_eq!(again(|| other.recv(&mut bytes)).unwrap(), 13);
}

fn udp_oversize(backend: Backend) {
    let mut worker = worker(backend);
    let socket = loopback("v4");
    let address = socket.local_addr().unwrap();
    let port = worker.attach(socket).unwrap();
    let client = loopback("v4");
    let longest = worker.longest_packet();
    client.send_to(&vec![1; longest], address).unwrap();
    client.send_to(&vec![2; longest + 1], address).unwrap();
    client.send_to(&[3; 10], address).unwrap();
    let mut batch = Batch::with_capacity(8);
    receive(&mut worker, port, &mut batch, 2).unwrap();
    assert_eq!(
        batch.iter().map(|packet| (packet[0], packet.len())).collect::<Vec<_>>(),
        [(1, longest), (3, 10)]
    );
    assert_eq!(worker.wait(soon()).unwrap().ready, 1, "there is something to tell");
    assert_eq!(kind(worker.try_recv_many(port, &mut batch)), PortErrorKind::Truncated);
    assert_eq!(worker.try_recv_many(port, &mut batch), Ok(0), "once");
    let counters = worker.counters(port).unwrap();
    assert_eq!((counters.truncated, counters.received_packets), (1, 2));
    batch.clear();
    assert_eq!(worker.buffers(), (1024, 1024));
}

fn udp_refused_by_icmp(backend: Backend) {
    let mut worker = worker(backend);
    let socket = loopback("v4");
    let (address, absent) = (socket.local_addr().unwrap(), loopback("v4").local_addr().unwrap());
    socket.connect(absent).unwrap();
    let port = worker.attach(socket).unwrap();
    let mut batch = Batch::with_capacity(8);
    for round in 0..20 {
        // The answer to each is an ICMP error on the socket, met by sending, receiving or waiting.
        worker.send(port, b"anybody?").unwrap();
        match round % 3 {
            0 => assert_eq!(worker.try_recv_many(port, &mut batch), Ok(0)),
            1 => worker.send(port, b"anybody?").unwrap(),
            _ => {
                let wake = worker.wait(soon()).unwrap();
                assert!(wake.ready == 1 || wake.timer);
                assert_eq!(worker.try_recv_many(port, &mut batch), Ok(0));
            }
        }
    }
    assert_eq!(worker.counters(port).unwrap().refused_packets, 0);
    let present = UdpSocket::bind(absent).unwrap();
    present.send_to(b"now I am", address).unwrap();
    receive(&mut worker, port, &mut batch, 1).unwrap();
    assert_eq!(batch[0][..], *b"now I am");
    assert_eq!(worker.send_many(port, &mut batch).accepted, 1);
    present
        .set_read_timeout(Some(Duration::from_secs(10) * common::slowness()))
        .unwrap();
    assert_eq!(again(|| present.recv(&mut [0; 32])).unwrap(), 8);
    // And nothing is left that wait would spin on.
    let wake = worker.wait(soon()).unwrap();
    assert!(wake.timer, "{wake:?}");
}

fn udp_unreachable(backend: Backend) {
    let mut worker = worker(backend);
    let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
    let port = worker.attach(socket).unwrap();
    let receiver = loopback("v4");
    let good = receiver.local_addr().unwrap();
    let nowhere: SocketAddr = "198.18.0.1:9".parse().unwrap();
    let other_family: SocketAddr = "[fd00::1]:9".parse().unwrap();
    let mut batch = Batch::with_capacity(150);
    for index in 0..150u8 {
        let mut packet = worker.packet_from(&[index]).unwrap();
        packet.set_peer(match index % 3 {
            0 => Some(good),
            1 => Some(nowhere),
            _ if index == 101 => None,
            _ => Some(other_family),
        });
        batch.push(packet).unwrap();
    }
    let sent = worker.send_many(port, &mut batch);
    assert_eq!((sent.accepted, sent.refused, sent.stopped), (50, 100, None));
    assert_eq!(
        sent.refusal.unwrap().raw_os_error(),
        libc::ENETUNREACH,
        "the first one's"
    );
    let refused = &worker.counters(port).unwrap().refused;
    assert_eq!(refused.count(libc::ENETUNREACH), 50);
    assert_eq!(refused.count(libc::EDESTADDRREQ), 1);
    assert_eq!(refused.count(libc::EAFNOSUPPORT), 49, "{refused:?}");
    let mut bytes = [0; 8];
    for index in 0..50u8 {
        assert_eq!(again(|| receiver.recv(&mut bytes)).unwrap(), 1);
        assert_eq!(bytes[0], 3 * index);
    }
}

fn udp_empty_datagram(backend: Backend) {
    let mut worker = worker(backend);
    let (socket, other) = (loopback("v4"), loopback("v4"));
    let address = socket.local_addr().unwrap();
    let port = worker.attach(socket).unwrap();
    other.send_to(&[], address).unwrap();
    other.send_to(&[1], address).unwrap();
    let mut batch = Batch::with_capacity(8);
    receive(&mut worker, port, &mut batch, 2).unwrap();
    assert_eq!((batch[0].len(), batch[1].len()), (0, 1));
    let sent = worker.send_many(port, &mut batch);
    assert_eq!((sent.accepted, sent.refused), (2, 0));
    let mut bytes = [0; 8];
    assert_eq!(again(|| other.recv(&mut bytes)).unwrap(), 0);
    assert_eq!(again(|| other.recv(&mut bytes)).unwrap(), 1);
}

fn encapsulation(backend: Backend) {
    quiet();
    let mut worker = worker(backend);
    let mut device = |net: u8| {
        let builder = Builder::new("t%d", Mode::Tun).up(true);
        let address: std::net::IpAddr = format!("10.0.{net}.1").parse().unwrap();
        let (queue, _) = single(builder.address(address, 24).open().unwrap());
        worker.attach(queue).unwrap()
    };
    let (left, right) = (device(1), device(2));
    let (near, far) = (loopback("v4"), loopback("v4"));
    let far_address = far.local_addr().unwrap();
    let (near, far) = (worker.attach(near).unwrap(), worker.attach(far).unwrap());
    // It goes into the first device, through the two sockets, and out of the second one to a socket here.
    let target: SocketAddr = "10.0.2.1:5000".parse().unwrap();
    let mut catcher = Catcher::bind(target).unwrap();
    const HEADER: [u8; 16] = *b"a tunnel header.";
    let mut batch = Batch::with_capacity(64);
    let mut tracker = Tracker::new(1);
    let spec = Spec::new("10.0.1.9:4000".parse().unwrap(), target);
    for round in 0..10 {
        // As nothing is routed there, the packets are sent in by a raw sender: the other side of the first device.
        let first = round * 20;
        let mut offer = Vec::new();
        for sequence in first..first + 20 {
            let mut bytes = vec![0; 300];
            spec.build(&mut bytes, 300, sequence, 0);
            offer.push(bytes);
        }
        send_raw(&offer);
        receive(&mut worker, left, &mut batch, 20).unwrap();
        let places: Vec<_> = batch.iter().map(|packet| packet.as_ptr()).collect();
        for (packet, place) in batch.iter_mut().zip(&places) {
            packet.prepend(&HEADER).unwrap();
            assert_eq!(packet.as_ptr(), place.wrapping_sub(HEADER.len()), "not moved");
            packet.set_peer(Some(far_address));
        }
        let sent = worker.send_many(near, &mut batch);
        assert_eq!((sent.accepted, batch.len()), (20, 0));
        receive(&mut worker, far, &mut batch, 20).unwrap();
        let places: Vec<_> = batch.iter().map(|packet| packet.as_ptr()).collect();
        for (packet, place) in batch.iter_mut().zip(&places) {
            assert_eq!(packet[..16], HEADER);
            packet.trim_front(16);
            assert_eq!(packet.as_ptr(), place.wrapping_add(16), "not moved");
            // The inner packet comes from the raw sender's address; what it is for is its own.
        }
        let mut inner = Batch::with_capacity(64);
        for packet in batch.drain() {
            inner.push(packet).unwrap();
        }
        for packet in &inner {
            tracker.record(stamp(packet));
        }
        let sent = worker.send_many(right, &mut inner);
        assert_eq!((sent.accepted, sent.refused), (20, 0));
        assert_eq!(
            worker.counters(right).unwrap().foreign_sent,
            0,
            "home memory all the way"
        );
    }
    tracker.sent(0, 200);
    tracker.summary().assert_all();
    let mut arrived = Tracker::new(1);
    catcher.take(&mut arrived).unwrap();
    arrived.sent(0, 200);
    arrived.summary().assert_all();
}

/// Puts IP packets into the device that 10.0.1.0/24 is routed to, whatever their target is: a raw socket bound to it.
fn send_raw(packets: &[Vec<u8>]) {
    // SAFETY: socket takes no pointers.
    let raw = unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0) };
    assert!(raw >= 0);
    let index = Handle::new().unwrap().index_of("t0").unwrap();
    // SAFETY: all zero is a value of this C struct.
    let mut to: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    to.sll_family = libc::AF_PACKET as u16;
    to.sll_protocol = (libc::ETH_P_IP as u16).to_be();
    to.sll_ifindex = index as i32;
    for packet in packets {
        // SAFETY: packet and address are readable for the lengths given.
        let sent = unsafe {
            libc::sendto(
                raw,
                packet.as_ptr().cast(),
                packet.len(),
                0,
                (&raw const to).cast(),
                size_of::<libc::sockaddr_ll>() as u32,
            )
        };
        assert_eq!(sent, packet.len() as isize, "{}", std::io::Error::last_os_error());
    }
    // SAFETY: the descriptor is ours and closed once.
    unsafe { libc::close(raw) };
}

// --------------------------------------------------------------------------------------------------------------- attach, detach

fn detach(backend: Backend) {
    let (mut worker, port, _device) = with_tun(backend);
    assert_eq!(worker.queue(port).unwrap().name(), "t0");
    assert!(worker.udp(port).is_none());
    let mut offer = Offer::new();
    let mut batch = Batch::with_capacity(8);
    // One at a time, so that a read is armed; where several come at a time it is a poll.
    offer.send(1);
    receive(&mut worker, port, &mut batch, 1).unwrap();
    // Armed before the packets come, and told of them.
    worker.wait(past()).unwrap();
    offer.send(5);
    assert_eq!(worker.wait(None).unwrap().ready, 1);
    let detached = worker.detach(port).unwrap();
    let undelivered = numbers(&detached.undelivered);
    assert_eq!(
        undelivered.len(),
        usize::from(backend == Backend::IoUring),
        "what the armed read had"
    );
    assert_eq!(detached.counters.received_packets, 1 + undelivered.len() as u64);
    assert_eq!(worker.ports().count(), 0);
    assert_eq!(worker.wait(past()).unwrap().ready, 0);
    // Back to the same worker: it goes on where it stopped.
    let port = worker.attach(detached.endpoint).unwrap();
    batch.clear();
    receive(&mut worker, port, &mut batch, 5 - undelivered.len()).unwrap();
    let mut all = undelivered;
    all.extend(numbers(&batch));
    assert_eq!(all, (1..6).collect::<Vec<_>>());
    assert_eq!(
        worker.counters(port).unwrap().received_packets,
        batch.len() as u64,
        "from zero"
    );
    drop((batch, detached.undelivered));
    worker.detach(port).unwrap();
    assert_eq!(worker.buffers(), (1024, 1024));
    // A socket comes back as what it was.
    let socket = loopback("v4");
    let address = socket.local_addr().unwrap();
    let port = worker.attach(socket).unwrap();
    worker.wait(past()).unwrap();
    let socket = worker.detach(port).unwrap().endpoint.into_udp().unwrap();
    assert_eq!(socket.local_addr().unwrap(), address);
    assert!(Endpoint::from(socket).into_queue().is_none());
}

fn move_to_another_worker(backend: Backend) {
    let (mut first, port, _device) = with_tun(backend);
    let mut offer = Offer::new();
    offer.send(1);
    let mut batch = Batch::with_capacity(8);
    receive(&mut first, port, &mut batch, 1).unwrap();
    first.wait(past()).unwrap();
    let mut endpoint = first.detach(port).unwrap().endpoint;
    drop((batch, first));
    // A queue may go to another thread; then the next worker has it.
    for round in 1..10u32 {
        let (give, given) = mpsc::channel();
        thread::scope(|scope| {
            let offer = &mut offer;
            scope.spawn(move || {
                let mut worker = worker(backend);
                let port = worker.attach(endpoint).unwrap();
                worker.wait(past()).unwrap();
                offer.send(1);
                let mut batch = Batch::with_capacity(8);
                receive(&mut worker, port, &mut batch, 1).unwrap();
                assert_eq!(numbers(&batch), [round]);
                worker.wait(past()).unwrap();
                give.send(worker.detach(port).unwrap().endpoint).unwrap();
            });
        });
        endpoint = given.recv().unwrap();
    }
}

fn stale_names(backend: Backend) {
    let (mut worker, port, _device) = with_tun(backend);
    let endpoint = worker.detach(port).unwrap().endpoint;
    let again = worker.attach(endpoint).unwrap();
    assert_ne!(port, again);
    // The same place is in use again: the old name does not reach it.
    let mut batch = batch_of(&worker, 0..1);
    assert_eq!(
        worker.send_many(port, &mut batch).stopped.unwrap().kind(),
        PortErrorKind::Gone
    );
    assert_eq!(batch.len(), 1);
    assert_eq!(
        kind(worker.recv_many(port, &mut Batch::with_capacity(1))),
        PortErrorKind::Gone
    );
    assert_eq!(
        kind(worker.try_recv_many(port, &mut Batch::with_capacity(1))),
        PortErrorKind::Gone
    );
    assert_eq!(kind(worker.recv(port, &mut [0; 64])), PortErrorKind::Gone);
    assert_eq!(worker.send(port, &[0x45; 40]).unwrap_err().kind(), PortErrorKind::Gone);
    assert_eq!(worker.detach(port).unwrap_err().kind(), PortErrorKind::Gone);
    assert!(worker.counters(port).is_none() && worker.queue(port).is_none() && worker.udp(port).is_none());
    assert!(worker.counters(again).is_some());
}

fn many_ports(backend: Backend) {
    let mut worker = Worker::new(&WorkerConfig {
        receive_reserve: 4,
        ..config(backend)
    })
    .unwrap();
    let mut ports = Vec::new();
    let mut addresses = Vec::new();
    let (queue, _device) = single(tun(1).open().unwrap());
    let first = worker.attach(queue).unwrap();
    for _ in 1..256 {
        let socket = loopback("v4");
        addresses.push(socket.local_addr().unwrap());
        ports.push(worker.attach(socket).unwrap());
    }
    let error = worker.attach(loopback("v4")).unwrap_err();
    assert_eq!(error.kind(), OpenErrorKind::InvalidSetting);
    assert!(error.detail().contains("256"), "{error}");
    let client = loopback("v4");
    for address in &addresses {
        client.send_to(b"all", address).unwrap();
    }
    Offer::new().send(1);
    let mut named = HashSet::new();
    let mut batch = Batch::with_capacity(64);
    while named.len() < 256 {
        assert!(worker.wait(None).unwrap().ready > 0);
        while let Some(port) = worker.next_ready() {
            let got = worker.try_recv_many(port, &mut batch).unwrap();
            assert_eq!(got, usize::from(named.insert(port)));
            batch.clear();
        }
    }
    assert!(worker.wait(past()).unwrap().timer);
    // A place that was given up can be taken again.
    worker.detach(ports[100]).unwrap();
    worker.detach(first).unwrap();
    worker.attach(loopback("v4")).unwrap();
    worker.attach(loopback("v4")).unwrap();
    assert_eq!(
        worker.attach(loopback("v4")).unwrap_err().kind(),
        OpenErrorKind::InvalidSetting
    );
}

fn disable_and_enable(backend: Backend) {
    let opened = tun(2).open().unwrap();
    let index = opened.device().unwrap().index();
    let mut worker = worker(backend);
    let ports: Vec<_> = opened
        .into_queues()
        .into_iter()
        .map(|queue| worker.attach(queue).unwrap())
        .collect();
    let mut filler = Filler::new(index, THERE.parse().unwrap(), 64).unwrap();
    let mut tracker = Tracker::new(64);
    let mut batch = Batch::with_capacity(300);
    for round in 0..6 {
        let disabled = round % 2 == 1;
        // Reads are armed while the queue is taken out and put back.
        worker.wait(past()).unwrap();
        let queue = worker.queue(ports[1]).unwrap();
        if disabled {
            queue.disable().unwrap();
        } else if round > 0 {
            queue.enable().unwrap();
        }
        let before = ports
            .iter()
            .map(|&port| worker.counters(port).unwrap().received_packets)
            .collect::<Vec<_>>();
        assert_eq!(filler.fill(256, 100).unwrap().queued(), 256);
        let mut got = [0, 0];
        while got[0] + got[1] < 256 {
            assert!(
                worker
                    .wait(Some(Instant::now() + Duration::from_secs(10)))
                    .unwrap()
                    .ready
                    > 0,
                "{got:?}"
            );
            while let Some(port) = worker.next_ready() {
                got[usize::from(port == ports[1])] += worker.try_recv_many(port, &mut batch).unwrap();
                batch.drain().for_each(|packet| tracker.record(stamp(&packet)));
            }
        }
        for (index, &port) in ports.iter().enumerate() {
            assert_eq!(
                worker.counters(port).unwrap().received_packets - before[index],
                got[index] as u64
            );
        }
        assert_eq!(got[1] == 0, disabled, "round {round}: {got:?}");
        assert!(got[0] > 0);
        if disabled {
            // What is sent through it still goes.
            let mut catcher = catcher();
            let mut batch = batch_of(&worker, 0..10);
            assert_eq!(worker.send_many(ports[1], &mut batch).accepted, 10);
            caught(&mut catcher, &[(0, 10)]).summary().assert_all();
        }
    }
    filler.tell(&mut tracker);
    tracker.summary().assert_all();
}

fn plain_calls(backend: Backend) {
    let (mut worker, port, _device) = with_tun(backend);
    let mut catcher = catcher();
    let mut offer = Offer::new();
    offer.send(3);
    let mut buffer = [0; 92];
    assert_eq!(worker.recv(port, &mut buffer), Ok(92));
    assert_eq!(stamp(&buffer).unwrap().sequence, 0);
    // Too short: dropped, told, counted as truncated and not as received.
    let error = worker.recv(port, &mut buffer[..91]).unwrap_err();
    assert_eq!(error.kind(), PortErrorKind::Truncated);
    let counters = worker.counters(port).unwrap();
    assert_eq!(
        (counters.received_packets, counters.truncated),
        (1, 1),
        "the books balance"
    );
    assert_eq!(counters.received_bytes, 92);
    assert_eq!(worker.recv(port, &mut buffer), Ok(92));
    assert_eq!(stamp(&buffer).unwrap().sequence, 2);
    // Between a wait and the batch calls.
    offer.send(2);
    assert_eq!(worker.wait(None).unwrap().ready, 1);
    assert_eq!(worker.recv(port, &mut buffer), Ok(92));
    assert_eq!(worker.wait(None).unwrap().ready, 1);
    assert_eq!(worker.recv(port, &mut buffer), Ok(92));
    assert_eq!(stamp(&buffer).unwrap().sequence, 4);
    let waker = worker.waker();
    waker.wake();
    assert_eq!(worker.recv(port, &mut buffer), Ok(0), "the waker ends it");
    assert!(worker.wait(None).unwrap().woken);

    for sequence in 0..5 {
        let mut bytes = [0; 200];
        outward().build(&mut bytes, 200, sequence, 0);
        worker.send(port, &bytes).unwrap();
    }
    caught(&mut catcher, &[(0, 5)]).summary().assert_all();
    let error = worker.send(port, &[0; 40]).unwrap_err();
    assert_eq!(
        (error.kind(), error.raw_os_error()),
        (PortErrorKind::BadPacket, libc::EINVAL)
    );
    let error = worker.send(port, &vec![0x45; worker.longest_packet() + 1]).unwrap_err();
    assert_eq!(
        (error.kind(), error.raw_os_error()),
        (PortErrorKind::BadPacket, libc::EMSGSIZE)
    );
    let counters = worker.counters(port).unwrap();
    assert_eq!(
        (counters.sent_packets, counters.refused_packets),
        (5, 2),
        "every refusal is counted"
    );
    assert_eq!(
        (
            counters.refused.count(libc::EINVAL),
            counters.refused.count(libc::EMSGSIZE)
        ),
        (1, 1)
    );
    let held: Vec<_> = std::iter::from_fn(|| worker.packet(100)).collect();
    assert!(!held.is_empty());
    let error = worker.send(port, &[0x45; 40]).unwrap_err();
    assert_eq!(error.kind(), PortErrorKind::NoBuffers);
}

fn single_port(backend: Backend) {
    let (queue, _device) = single(tun(1).open().unwrap());
    let mut port = queue.drive(&config(backend)).unwrap();
    let mut catcher = catcher();
    let mut offer = Offer::new();
    let mut batch = Batch::with_capacity(64);
    assert_eq!(port.try_recv_many(&mut batch), Ok(0));
    offer.send(10);
    assert_eq!(port.wait(None).unwrap().ready, 1);
    let mut got = 0;
    while got < 10 {
        got += port.recv_many(&mut batch).unwrap();
    }
    assert_eq!(numbers(&batch), (0..10).collect::<Vec<_>>());
    offer.send(1);
    assert_eq!(port.recv(&mut [0; 92]), Ok(92));
    let mut batch = batch_of(port.worker(), 0..10);
    assert_eq!(port.send_many(&mut batch).accepted, 10);
    let mut bytes = [0; 100];
    outward().build(&mut bytes, 100, 10, 0);
    port.send(&bytes).unwrap();
    caught(&mut catcher, &[(0, 11)]).summary().assert_all();
    assert_eq!(port.worker().counters(port.id()).unwrap().sent_packets, 11);
    assert_eq!(port.worker_mut().next_ready(), Some(port.id()));
    let waker = port.worker().waker();
    waker.stop();
    assert!(port.wait(None).unwrap().stopped);
    let detached = port.into_endpoint().unwrap();
    assert_eq!(detached.counters.received_packets, 11);
    let socket = SinglePort::new(loopback("v6"), &config(backend)).unwrap();
    assert!(socket.worker().udp(socket.id()).is_some());
    let error = SinglePort::new(
        loopback("v6"),
        &WorkerConfig {
            buffers: 1,
            ..config(backend)
        },
    )
    .unwrap_err();
    assert_eq!(error.kind(), OpenErrorKind::InvalidSetting);
}

// ------------------------------------------------------------------------------------------------------------------ starvation

fn small(backend: Backend) -> Worker {
    Worker::new(&WorkerConfig {
        buffers: 64,
        receive_reserve: 8,
        ..config(backend)
    })
    .unwrap()
}

/// Takes from port `a`, which has more than enough, until there are no buffers for it, and holds all.
fn take_all(worker: &mut Worker, a: PortId) -> Batch {
    let mut held = Batch::with_capacity(100);
    let end = Instant::now() + Duration::from_secs(10) * common::slowness();
    loop {
        assert!(Instant::now() < end);
        // Found ready by the wait, and short of buffers only then.
        worker.wait(past()).unwrap();
        match worker.try_recv_many(a, &mut held) {
            Ok(_) => {}
            Err(error) => {
                assert_eq!(
                    (error.kind(), error.raw_os_error()),
                    (PortErrorKind::NoBuffers, libc::ENOBUFS)
                );
                assert!(!error.is_permanent());
                return held;
            }
        }
    }
}

fn starve(worker: &mut Worker, a: PortId, b: PortId, mut offer_to_b: impl FnMut(u32), wake_a: usize) {
    let mut held = take_all(worker, a);
    assert_eq!(held.len(), 64 - 8, "all but what the other port was promised");
    assert!(worker.counters(a).unwrap().no_buffers > 0);
    assert!(
        worker.packet(1).is_none(),
        "promised buffers are not for making packets"
    );
    // A port without buffers is not ready, and wait does not spin on it.
    let cpu = process::thread_cpu_time();
    let wake = worker.wait(soon()).unwrap();
    assert_eq!((wake.ready, wake.timer), (0, true), "while nothing comes back");
    let took = process::thread_cpu_time() - cpu;
    assert!(
        took < Duration::from_millis(100),
        "{took:?} of CPU time in a wait of 300 ms"
    );
    // The other port is not starved.
    let mut batch = Batch::with_capacity(64);
    for _ in 0..10 {
        offer_to_b(8);
        let mut got = 0;
        while got < 8 {
            assert_eq!(worker.wait(None).unwrap().ready, 1);
            assert_eq!(worker.next_ready(), Some(b));
            match worker.try_recv_many(b, &mut batch) {
                Ok(count) => got += count,
                // With all it was promised in hand it is out of buffers, too.
                Err(error) => assert_eq!(error.kind(), PortErrorKind::NoBuffers),
            }
            batch.clear();
        }
    }
    match worker.try_recv_many(b, &mut batch) {
        Ok(got) => assert_eq!(got, 0),
        Err(error) => assert_eq!(error.kind(), PortErrorKind::NoBuffers, "told late"),
    }
    // What another thread gives back wakes the sleeping worker.
    let me = this_thread();
    let remote: Vec<_> = held.drain().map(|packet| packet.into_remote()).collect();
    thread::scope(|scope| {
        scope.spawn(move || {
            await_sleep(me);
            drop(remote);
        });
        let end = Instant::now() + Duration::from_secs(10) * common::slowness();
        let mut got = 0;
        while got < wake_a {
            let wake = worker.wait(Some(end)).unwrap();
            assert!(!wake.timer, "{got} of {wake_a} came");
            while let Some(port) = worker.next_ready() {
                match worker.try_recv_many(port, &mut batch) {
                    Ok(count) => got += if port == a { count } else { 0 },
                    Err(error) => assert_eq!(error.kind(), PortErrorKind::NoBuffers),
                }
                batch.clear();
            }
        }
    });
    drop(held);
    let armed = usize::from(worker.backend().backend == Backend::IoUring) * worker.ports().count();
    let free = worker.buffers().0;
    assert!(free >= 64 - armed, "{free} of 64 are free");
}

fn second_device(worker: &mut Worker) -> PortId {
    let address: std::net::IpAddr = "10.0.7.1".parse().unwrap();
    let (queue, _) = single(
        Builder::new("t%d", Mode::Tun)
            .up(true)
            .address(address, 24)
            .open()
            .unwrap(),
    );
    worker.attach(queue).unwrap()
}

fn receive_reserve(backend: Backend) {
    let mut worker = small(backend);
    let (queue, _device) = single(tun(1).open().unwrap());
    let a = worker.attach(queue).unwrap();
    let b = second_device(&mut worker);
    Offer::new().send(100);
    let mut offer = Offer::to("10.0.7.2:9".parse().unwrap());
    starve(&mut worker, a, b, |count| offer.send(count), 100 - 56);
}

fn receive_reserve_udp(backend: Backend) {
    quiet();
    let mut worker = small(backend);
    let socket = loopback("v4");
    let address = socket.local_addr().unwrap();
    let a = worker.attach(socket).unwrap();
    let b = second_device(&mut worker);
    let client = loopback("v4");
    for _ in 0..100 {
        client.send_to(b"more than enough", address).unwrap();
    }
    let mut offer = Offer::to("10.0.7.2:9".parse().unwrap());
    starve(&mut worker, a, b, |count| offer.send(count), 100 - 56);
}

/// The last moment before sleep: whatever the order of events, a buffer that comes back is seen or rings the doorbell.
fn hunger_race(backend: Backend) {
    const ROUNDS: usize = 20_000;
    let mut worker = Worker::new(&WorkerConfig {
        buffers: 16,
        receive_reserve: 4,
        ..config(backend)
    })
    .unwrap();
    let (queue, _device) = single(tun(1).open().unwrap());
    let port = worker.attach(queue).unwrap();
    let mut offer = Offer::new();
    let mut held = Batch::with_capacity(16);
    while held.len() < 16 {
        offer.send(1);
        worker.recv_many(port, &mut held).unwrap();
    }
    let (give, given) = mpsc::sync_channel::<tun_driver::RemoteBuf>(1);
    thread::scope(|scope| {
        scope.spawn(move || {
            for round in 0..ROUNDS {
                let buffer = loop {
                    // Without sleep, to be quick enough for the moment.
                    match given.try_recv() {
                        Ok(buffer) => break buffer,
                        Err(mpsc::TryRecvError::Empty) => std::hint::spin_loop(),
                        Err(mpsc::TryRecvError::Disconnected) => return,
                    }
                };
                // At ever other moments of the worker's way into sleep.
                for _ in 0..round % 500 {
                    std::hint::spin_loop();
                }
                drop(buffer);
            }
        });
        for round in 0..ROUNDS {
            // One packet and no buffer for it, until the other thread gives back the only one.
            offer.send(1);
            give.send(held.pop().unwrap().into_remote()).unwrap();
            while held.len() < 16 {
                let wake = worker.wait(Some(Instant::now() + Duration::from_secs(5))).unwrap();
                assert_eq!(
                    wake.ready, 1,
                    "round {round}: the buffer is back, a packet is there, and it sleeps"
                );
                match worker.try_recv_many(port, &mut held) {
                    Ok(_) => {}
                    Err(error) => assert_eq!(error.kind(), PortErrorKind::NoBuffers),
                }
            }
        }
        drop(give);
    });
}
