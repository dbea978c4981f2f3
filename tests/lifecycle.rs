//! Creating and destroying a thousand times, dropping with reads in flight, faults under load, and hosts that refuse io_uring.

mod common;
mod device;

use std::io::{Read, Write};
use std::net::Ipv4Addr;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixStream;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use common::{Trial, need_backend, need_locked_memory, need_tun, repeats, trial};
use device::{ping, ping_back};
use tun_driver::lab::{Filler, Namespace, process};
use tun_driver::netlink::Handle;
use tun_driver::{
    Backend, Batch, Builder, Iface, Mode, OpenErrorKind, PortErrorKind, SinglePort, Worker, WorkerConfig, leaked_arenas,
};

fn main() {
    let mut trials: Vec<Trial> = Vec::new();
    for backend in [Backend::IoUring, Backend::Syscalls] {
        let long = Duration::from_secs(150);
        // T31
        for (queues, short) in [(1, 300), (2, 100), (8, 50)] {
            let name = format!("made and dropped again and again with {queues} queues, nothing is left {backend:?}");
            let times = common::repeats(short, 10_000);
            trials.push(trial(name, move || cycles(backend, queues, times)).alone().bound(long));
        }
        let name = format!("made and dropped again and again under a flood, nothing is left {backend:?}");
        trials.push(trial(name, move || cycles_under_traffic(backend)).alone().bound(long));
        let name = format!("a read ended under traffic brings its packet, or leaves it {backend:?}");
        trials.push(trial(name, move || ended_reads(backend)));
        trials.push(trial(format!("changed under load {backend:?}"), move || {
            changed(backend)
        }));
        trials.push(trial(
            format!("dropped by a panic, after its device, and before its packets {backend:?}"),
            move || {
                odd_ends(backend);
            },
        ));
        trials.push(trial(format!("deleted under load {backend:?}"), move || {
            deleted(backend)
        }));
        let name = format!("a forked child drops a worker, and the parent goes on {backend:?}");
        trials.push(trial(name, move || forks(backend)).alone());
        let name = format!("a forked child drops an engine, and the parent goes on {backend:?}");
        trials.push(trial(name, move || fork_of_an_engine(backend)).alone());
        let name = format!("a worker that is killed leaves its device's name to the next one {backend:?}");
        trials.push(trial(name, move || killed(backend)).alone());
        for engine in [false, true] {
            let what = if engine { "an engine" } else { "a worker" };
            let name = format!("{what} that is stopped under traffic and goes on loses nothing {backend:?}");
            trials.push(trial(name, move || stopped(backend, engine)).alone());
        }
        let name = format!("signals at 10 kHz end no call and lose nothing {backend:?}");
        trials.push(trial(name, move || under_signals(backend)));
        trials.push(trial(
            format!("deleted while idle and in mid-batch, gone once on every queue {backend:?}"),
            move || deleted_idle(backend),
        ));
        let name = format!("a namespace that goes takes its device, gone once on every queue {backend:?}");
        trials.push(trial(name, move || namespace_gone(backend)).alone().bound(long));
    }
    for errno in [libc::EPERM, libc::ENOSYS] {
        let name = format!("io_uring refused with errno {errno}: system calls serve, and it is told");
        trials.push(trial(name, move || refused(errno)));
    }
    // T28
    let name = "one io_uring call refused: system calls serve, and the call is named";
    trials.push(trial(name, one_call_refused));
    trials.push(
        trial(
            "entering a ring refused: the tests of the other backend pass",
            refused_suite,
        )
        .bound(Duration::from_secs(400)),
    );
    let name = "a queue's number that names something else now is not read or written";
    trials.push(trial(name, closed_behind_its_back));
    let name = "100 workers, one after another on a thread, each with a registered ring";
    trials.push(trial(name, many_workers_on_a_thread));
    trials.push(
        trial(
            "a worker takes the memory that its configuration says",
            takes_what_it_says,
        )
        .alone(),
    );
    trials.push(trial("a memlock limit shrinks the arena, and it is told", limited));
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

fn driven(backend: Backend) -> (SinglePort, u32) {
    let device = Builder::new("t0", Mode::Tun).address(HERE, 24).up(true).open().unwrap();
    let index = device.index().unwrap();
    (device.into_queues().remove(0).drive(&config(backend)).unwrap(), index)
}

fn cycles(backend: Backend, queues: u32, times: usize) {
    need_backend(backend);
    let mut batch = Batch::with_capacity(64);
    nothing_is_left(times, || {
        // The same name at once: the one before must be gone, or this is EBUSY.
        let device = Builder::new("t0", Mode::Tun)
            .queues(queues as usize)
            .address(HERE, 24)
            .up(true);
        let device = device.open().unwrap();
        let index = device.index().unwrap();
        let mut worker = Worker::new(&config(backend)).unwrap();
        for queue in device.into_queues() {
            worker.attach(queue).unwrap();
        }
        Filler::new(index, THERE.into(), 1).unwrap().fill(3, 64).unwrap();
        worker.wait(None).unwrap();
        let port = worker.next_ready().unwrap();
        worker.recv_many(port, &mut batch).unwrap();
        worker.wait(Some(Instant::now())).unwrap(); // reads are armed
        batch.clear();
        drop(worker);
        drop(Iface::without_packet_info("t0", Mode::Tun).unwrap());
    });
}

/// The same under a flood, with packets received, sent, and on their way at the end.
fn cycles_under_traffic(backend: Backend) {
    need_backend(backend);
    let netns = Namespace::current().unwrap();
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        let _end = End(&over);
        scope.spawn(|| flood(&netns, &over));
        let mut batch = Batch::with_capacity(64);
        nothing_is_left(repeats(60, 1_000), || {
            let (mut port, _) = driven(backend);
            let mut received = 0;
            while received < 200 {
                received += port.recv_many(&mut batch).unwrap();
                let sent = port.send_many(&mut batch);
                assert_eq!(sent.stopped, None);
                batch.clear();
            }
            port.wait(Some(Instant::now())).unwrap(); // a read is armed
        });
    });
}

/// Ends a flood, also when a check fails.
struct End<'a>(&'a AtomicBool);

impl Drop for End<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Sends to the device until `over`; what is refused meanwhile is refused.
fn flood(netns: &Namespace, over: &AtomicBool) {
    let send = || {
        let socket = std::net::UdpSocket::bind("0.0.0.0:0").unwrap();
        while !over.load(Ordering::Relaxed) {
            if socket.send_to(&[0; 100], (THERE, 9)).is_err() {
                thread::sleep(Duration::from_micros(100)); // there is no device just now
            }
        }
    };
    netns.run(send).unwrap();
}

/// Samples of a run of cycles.
const SAMPLES: usize = 60;

/// Repeats `cycle`: descriptors, resident and pinned memory must not rise with the number of
/// cycles.
fn nothing_is_left(times: usize, mut cycle: impl FnMut()) {
    (0..50).for_each(|_| cycle());
    // The kernel takes its time with pinned pages and closed rings.
    let rest = || {
        thread::sleep(Duration::from_millis(20));
        process::memory().unwrap().pinned
    };
    let rest = (0..20).map(|_| rest()).min().unwrap();
    let descriptors = process::open_descriptors().unwrap();
    let threads = process::threads().unwrap().len();
    let mut samples = Vec::with_capacity(2 * SAMPLES);
    for cycles in 1..=times {
        cycle();
        if cycles % (times / SAMPLES).max(1) == 0 {
            let pinned = settled(rest) as f64;
            let resident = process::memory().unwrap().resident as f64;
            let open = process::open_descriptors().unwrap() as f64;
            samples.push((cycles as f64, [open, resident, pinned]));
        }
    }
    for (place, what) in ["descriptors", "resident bytes", "pinned bytes"]
        .into_iter()
        .enumerate()
    {
        let points: Vec<_> = samples.iter().map(|&(cycles, all)| (cycles, all[place])).collect();
        // What rises with each cycle does so all the time. A few steps, such as the heap's, are none
        // of it.
        let thirds: Vec<_> = points.chunks(points.len().div_ceil(3)).map(slope).collect();
        let rises = points.windows(2).filter(|pair| pair[1].1 > pair[0].1).count();
        assert!(
            thirds.iter().any(|(slope, margin)| slope - margin <= 0.0) || rises < points.len() / 6,
            "{what} a cycle, in each third of the run: {thirds:?}; {points:?}"
        );
    }
    assert_eq!(process::open_descriptors().unwrap(), descriptors);
    assert_eq!(process::threads().unwrap().len(), threads);
    assert!(settled(rest) <= rest);
    let (first, last) = (samples[0].1[1], samples[samples.len() - 1].1[1]);
    assert!(last <= first + f64::from(6 << 20), "{first} bytes, then {last}");
    assert_eq!(leaked_arenas(), 0);
}

/// How much is pinned, as soon as that is no more than `rest`, or after a while.
fn settled(rest: u64) -> u64 {
    let deadline = Instant::now() + Duration::from_secs(5) * common::slowness();
    loop {
        let pinned = process::memory().unwrap().pinned;
        if pinned <= rest || Instant::now() > deadline {
            return pinned;
        }
        thread::sleep(Duration::from_millis(2));
    }
}

/// The least-squares slope of points, and half the width of its 95 % confidence interval.
fn slope(points: &[(f64, f64)]) -> (f64, f64) {
    let count = points.len() as f64;
    let mean = |of: fn(&(f64, f64)) -> f64| points.iter().map(of).sum::<f64>() / count;
    let (x_mean, y_mean) = (mean(|point| point.0), mean(|point| point.1));
    let sum = |of: &dyn Fn(f64, f64) -> f64| points.iter().map(|&(x, y)| of(x - x_mean, y - y_mean)).sum::<f64>();
    let spread = sum(&|x, _| x * x);
    let slope = sum(&|x, y| x * y) / spread;
    let residuals = sum(&|x, y| (y - slope * x).powi(2));
    // Student's t at 97.5 %, of 18 degrees of freedom; at most that for more.
    (slope, 2.101 * (residuals / (count - 2.0) / spread).sqrt())
}

// T2
fn ended_reads(backend: Backend) {
    need_backend(backend);
    let times = common::repeats(300, 10_000);
    let device = Builder::new("t0", Mode::Tun).address(HERE, 24).up(true).open().unwrap();
    let index = device.index().unwrap();
    let mut queue = Some(device.into_queues().remove(0));
    let netns = Namespace::current().unwrap();
    let mut worker = Worker::new(&config(backend)).unwrap();
    let mut batch = Batch::with_capacity(64);
    let (mut filled, mut received, mut undelivered) = (0, 0, 0);
    thread::scope(|scope| {
        let (ask, asked) = std::sync::mpsc::channel::<usize>();
        let (say, said) = std::sync::mpsc::channel();
        scope.spawn(|| {
            netns.run(move || {
                let mut filler = Filler::new(index, THERE.into(), 1).unwrap();
                for count in asked {
                    filler.fill(count as u64, 64).unwrap();
                    say.send(()).unwrap();
                }
            })
        });
        for round in 0..times {
            let port = worker.attach(queue.take().unwrap()).unwrap();
            worker.wait(Some(Instant::now())).unwrap(); // a read is armed
            // It ends while packets come.
            let count = 1 + round % 40;
            ask.send(count).unwrap();
            filled += count;
            if round % 3 == 0 {
                received += worker.try_recv_many(port, &mut batch).unwrap();
                batch.clear();
            }
            let detached = worker.detach(port).unwrap();
            undelivered += detached.undelivered.len();
            queue = detached.endpoint.into_queue();
            said.recv().unwrap();
            // Fewer than the device's queue holds, so that it drops none.
            if round % 10 == 9 || round + 1 == times {
                let port = worker.attach(queue.take().unwrap()).unwrap();
                while received + undelivered < filled {
                    received += worker.recv_many(port, &mut batch).unwrap();
                    batch.clear();
                }
                assert_eq!(worker.try_recv_many(port, &mut batch), Ok(0));
                queue = worker.detach(port).unwrap().endpoint.into_queue();
            }
        }
        drop(ask);
    });
    assert_eq!(received + undelivered, filled);
    let (free, all) = worker.buffers();
    assert_eq!(free, all);
}

// T4
fn closed_behind_its_back() {
    need_backend(Backend::IoUring);
    const SENTINEL: [u8; 64] = [0xc3; 64];
    for _ in 0..common::repeats(200, 10_000) {
        let (mut port, index) = driven(Backend::IoUring);
        port.wait(Some(Instant::now())).unwrap(); // a read is armed
        let (mut near, mut far) = UnixStream::pair().unwrap();
        far.write_all(&SENTINEL).unwrap();
        let number = port.worker().queue(port.id()).unwrap().as_raw_fd();
        // SAFETY: the number stays open; what it names now is closed by the queue's end.
        assert_eq!(unsafe { libc::dup2(near.as_raw_fd(), number) }, number);
        // The ring goes on with the queue, which it holds, and with nothing else.
        Filler::new(index, THERE.into(), 1).unwrap().fill(5, 64).unwrap();
        let mut batch = Batch::with_capacity(64);
        let mut got = 0;
        while got < 5 {
            got += port.recv_many(&mut batch).unwrap();
        }
        assert_eq!(port.send_many(&mut batch).accepted, 5);
        port.wait(Some(Instant::now())).unwrap(); // armed again
        drop(port);
        let mut bytes = [0; SENTINEL.len()];
        near.read_exact(&mut bytes).unwrap();
        assert_eq!(bytes, SENTINEL);
        drop(near);
        assert_eq!(far.read(&mut bytes).unwrap(), 0, "something was written");
    }
}

/// Runs `act` a number of times beside a flood to the device, while the worker receives and sends; nothing may panic, hang or end.
fn under_load(backend: Backend, times: usize, act: impl Fn(&Handle, u32, usize) + Send + Sync) {
    let (mut port, index) = driven(backend);
    let netns = Namespace::current().unwrap();
    let over = AtomicBool::new(false);
    /// Also after a panic: the flood is waited for.
    struct End<'a>(&'a AtomicBool);
    impl Drop for End<'_> {
        fn drop(&mut self) {
            self.0.store(true, Ordering::Relaxed);
        }
    }
    thread::scope(|scope| {
        let (over, netns) = (&over, &netns);
        let _end = End(over);
        let flood = scope.spawn(move || {
            netns.run(|| {
                let socket = std::net::UdpSocket::bind("0.0.0.0:0").unwrap();
                while !over.load(Ordering::Relaxed) {
                    let _ = socket.send_to(&[0; 100], (THERE, 9)); // refused while the device is down
                }
            })
        });
        let acting = scope.spawn(move || {
            netns.run(|| {
                let netlink = Handle::new().unwrap();
                for time in 0..times {
                    act(&netlink, index, time);
                    thread::sleep(Duration::from_millis(2));
                }
            })
        });
        let (mut batch, mut received) = (Batch::with_capacity(64), 0);
        let mut serve = |port: &mut SinglePort| {
            port.wait(Some(Instant::now() + Duration::from_millis(5))).unwrap();
            let _ = port.try_recv_many(&mut batch).unwrap();
            received += batch.len();
            let sent = port.send_many(&mut batch);
            assert!(
                sent.stopped.is_none_or(|error| error.kind() == PortErrorKind::Down),
                "{sent:?}"
            );
            batch.clear();
        };
        while !acting.is_finished() {
            serve(&mut port);
        }
        acting.join().unwrap().unwrap();
        // Traffic goes on afterwards.
        let before = port.worker().counters(port.id()).unwrap().received_packets;
        let deadline = Instant::now() + Duration::from_secs(5) * common::slowness();
        while port.worker().counters(port.id()).unwrap().received_packets < before + 100 {
            assert!(Instant::now() < deadline, "no traffic afterwards");
            serve(&mut port);
        }
        over.store(true, Ordering::Relaxed);
        flood.join().unwrap().unwrap();
        assert!(received > 0);
    });
}

fn changed(backend: Backend) {
    need_backend(backend);
    // T6: each second act is a way up, with another MTU (T20).
    under_load(backend, repeats(100, 2_000), |netlink, index, time| {
        netlink.set_up(index, time % 2 == 1).unwrap();
        if time % 2 == 1 {
            // Going down took the route along with it; the address brought it back.
            netlink.set_mtu(index, 600 + time as u32 % 900).unwrap();
        }
    });
    // T9 and T35.
    under_load(backend, repeats(50, 1_000), |netlink, index, time| {
        // A device that is up keeps its name before Linux 6.2.
        if common::kernel() >= (6, 2) {
            netlink.rename(index, &format!("n{time}")).unwrap();
        }
        // Longer and shorter: what finds no room any more is dropped and counted nowhere.
        let packets = [1_000, 2, 500, 1][time % 4];
        netlink.set_txqueuelen(index, packets).unwrap();
    });
}

fn deleted(backend: Backend) {
    need_backend(backend);
    // T5, in a flood.
    for _ in 0..repeats(20, 1_000) {
        let (mut port, index) = driven(backend);
        let netns = Namespace::current().unwrap();
        let over = AtomicBool::new(false);
        thread::scope(|scope| {
            scope.spawn(|| {
                netns
                    .run(|| {
                        let socket = std::net::UdpSocket::bind("0.0.0.0:0").unwrap();
                        for round in 0.. {
                            if over.load(Ordering::Relaxed) {
                                break;
                            }
                            if round == 500 {
                                Handle::new().unwrap().delete(index).unwrap();
                            }
                            let _ = socket.send_to(&[0; 100], (THERE, 9));
                        }
                    })
                    .unwrap();
            });
            let mut batch = Batch::with_capacity(64);
            let error = loop {
                match port.recv_many(&mut batch) {
                    Ok(_) => batch.clear(),
                    Err(error) => break error,
                }
            };
            over.store(true, Ordering::Relaxed);
            assert_eq!(error.kind(), PortErrorKind::Gone);
        });
    }
    assert_eq!(leaked_arenas(), 0);
}

/// T5, idle and with a batch in the middle: gone is returned once by waiting on every queue, by
/// sending, and from then on at every call.
fn deleted_idle(backend: Backend) {
    need_backend(backend);
    for round in 0..repeats(20, 1_000) {
        let device = Builder::new("t0", Mode::Tun)
            .queues(4)
            .address(HERE, 24)
            .up(true)
            .open()
            .unwrap();
        let index = device.index().unwrap();
        let mut worker = Worker::new(&config(backend)).unwrap();
        let queues = device.into_queues();
        let ports: Vec<_> = queues.into_iter().map(|queue| worker.attach(queue).unwrap()).collect();
        let mut batch = Batch::with_capacity(8);
        if round % 2 == 0 {
            // Reads are armed, or the ports polled.
            worker.wait(Some(Instant::now())).unwrap();
        } else {
            // A batch is in hand, and more lie in the queues and the inboxes.
            Filler::new(index, THERE.into(), 50).unwrap().fill(100, 200).unwrap();
            worker.wait(None).unwrap();
            while let Some(port) = worker.next_ready() {
                worker.try_recv_many(port, &mut batch).unwrap();
            }
            assert!(!batch.is_empty());
        }
        Handle::new().unwrap().delete(index).unwrap();
        if round % 2 == 1 {
            let held = batch.len();
            let sent = worker.send_many(ports[0], &mut batch);
            assert!(sent.stopped.is_some_and(|error| error.is_permanent()), "{sent:?}");
            assert_eq!(
                (sent.accepted + sent.refused, batch.len()),
                (0, held),
                "they are still the caller's"
            );
        }
        batch.clear();
        let mut gone = Vec::new();
        let end = Instant::now() + Duration::from_secs(10) * common::slowness();
        while gone.len() < ports.len() {
            assert!(
                !worker.wait(Some(end)).unwrap().timer,
                "{} of {}",
                gone.len(),
                ports.len()
            );
            while let Some(port) = worker.next_ready() {
                match worker.try_recv_many(port, &mut batch) {
                    Ok(_) => batch.clear(),
                    Err(error) => {
                        assert_eq!(error.kind(), PortErrorKind::Gone);
                        assert!(!gone.contains(&port), "announced twice");
                        gone.push(port);
                    }
                }
            }
        }
        // No port is ready any more, so that nothing spins; asked, each says so again.
        assert_eq!(worker.wait(Some(Instant::now())).unwrap().ready, 0);
        for port in ports {
            assert_eq!(
                worker.try_recv_many(port, &mut batch).unwrap_err().kind(),
                PortErrorKind::Gone
            );
        }
    }
    assert_eq!(leaked_arenas(), 0);
}

/// T7: the last reference to a namespace goes while packets pass a device in it, whose queues are
/// attached here.
fn namespace_gone(backend: Backend) {
    need_backend(backend);
    let netlink = Handle::new().unwrap();
    let mut batch = Batch::with_capacity(64);
    let mut before = None;
    for _ in 0..=repeats(5, 200) {
        let device = Builder::new("t0", Mode::Tun).queues(4).open().unwrap();
        let index = device.index().unwrap();
        let mut worker = Worker::new(&config(backend)).unwrap();
        let queues = device.into_queues();
        let ports: Vec<_> = queues.into_iter().map(|queue| worker.attach(queue).unwrap()).collect();
        // A queue holds the namespace that it was opened in (tun_chr_open), not the device's.
        let there = Namespace::new().unwrap();
        netlink.move_to_namespace(index, there.as_fd()).unwrap();
        let furnish = || {
            let netlink = Handle::new().unwrap();
            let index = netlink.index_of("t0").unwrap();
            netlink.add_address(index, HERE.into(), 24).unwrap();
            netlink.set_up(index, true).unwrap();
        };
        there.run(furnish).unwrap();
        // Each answer is sent back as the next ping, and no socket keeps the namespace.
        for (id, &port) in (0..).zip(&ports) {
            worker.send(port, &ping(THERE, HERE, id)).unwrap();
        }
        let mut there = Some(there);
        let (mut answers, mut gone) = (0, Vec::new());
        let end = Instant::now() + Duration::from_secs(60) * common::slowness();
        while gone.len() < ports.len() {
            assert!(
                !worker.wait(Some(end)).unwrap().timer,
                "{answers} answers, {} of {} queues gone",
                gone.len(),
                ports.len()
            );
            while let Some(port) = worker.next_ready() {
                match worker.try_recv_many(port, &mut batch) {
                    Ok(_) => {
                        batch.retain_mut(|packet| ping_back(packet));
                        answers += batch.len();
                        // The kernel sets the device down first.
                        let stopped = worker.send_many(port, &mut batch).stopped;
                        assert!(
                            stopped
                                .is_none_or(|error| matches!(error.kind(), PortErrorKind::Down | PortErrorKind::Gone)),
                            "{stopped:?}"
                        );
                        batch.clear();
                    }
                    Err(error) => {
                        assert_eq!(error.kind(), PortErrorKind::Gone);
                        assert!(!gone.contains(&port), "announced twice");
                        gone.push(port);
                    }
                }
            }
            // In the middle of the traffic.
            if answers >= 200 {
                there = None;
            }
        }
        assert!(there.is_none(), "the device is gone before its namespace");
        // No port is ready any more, so that nothing spins; asked, each says so again.
        let pause = Instant::now() + Duration::from_millis(5);
        let awake = worker.wait(Some(pause)).unwrap();
        assert_eq!((awake.ready, awake.timer), (0, true));
        for port in ports {
            let error = worker.try_recv_many(port, &mut batch).unwrap_err();
            assert_eq!(error.kind(), PortErrorKind::Gone);
            let queue = worker.detach(port).unwrap().endpoint.into_queue().unwrap();
            let name = queue.current_name();
            assert_eq!(name.unwrap_err().raw_os_error(), Some(libc::EBADFD));
        }
        let (free, all) = worker.buffers();
        assert_eq!(free, all);
        drop(worker);
        assert!(netlink.index_of("t0").is_err(), "the device came back");
        let pinned = settled(before.map_or(0, |(_, pinned)| pinned));
        let left = (process::open_descriptors().unwrap(), pinned);
        assert!(
            left.0 == before.unwrap_or(left).0 && left.1 <= before.unwrap_or(left).1,
            "descriptors and pinned bytes: {before:?}, then {left:?}"
        );
        before = Some(left);
    }
    assert_eq!(leaked_arenas(), 0);
}

fn odd_ends(backend: Backend) {
    need_backend(backend);
    // A panic on the worker's thread.
    let ended = catch_unwind(AssertUnwindSafe(|| {
        let (mut port, _) = driven(backend);
        port.wait(Some(Instant::now())).unwrap();
        std::panic::resume_unwind(Box::new("on purpose"));
    }));
    assert!(ended.is_err());
    // The device first.
    let (mut port, index) = driven(backend);
    port.wait(Some(Instant::now())).unwrap();
    Handle::new().unwrap().delete(index).unwrap();
    drop(port);
    // The worker before its packets, of which one is on another thread.
    let (port, _) = driven(backend);
    let (mut packet, remote) = (
        port.worker().packet_from(b"stays").unwrap(),
        port.worker().packet_from(b"far").unwrap(),
    );
    let remote = remote.into_remote();
    drop(port);
    packet.append(b" and may be changed").unwrap();
    assert_eq!(&packet[..], b"stays and may be changed");
    thread::spawn(move || assert_eq!(&remote[..], b"far")).join().unwrap();
    drop(driven(backend));
    assert_eq!(leaked_arenas(), 0);
}

fn takes_what_it_says() {
    let said = WorkerConfig::default().memory();
    assert!(said.total() <= 4 << 20, "{said:?}");
    need_locked_memory(8 * said.total() as u64);
    // Huge pages round up what is not the library's to round.
    // SAFETY: no pointers.
    assert_eq!(unsafe { libc::prctl(libc::PR_SET_THP_DISABLE, 1, 0, 0, 0) }, 0);
    // The first one pays for what the process needs only once.
    drop(Worker::new(&WorkerConfig::default()).unwrap());
    let before = process::memory().unwrap().resident;
    let workers: Vec<Worker> = (0..8).map(|_| Worker::new(&WorkerConfig::default()).unwrap()).collect();
    let mut batch = Batch::with_capacity(2_000);
    for worker in &workers {
        // Every buffer is touched.
        while let Some(packet) = worker.packet(1_500) {
            batch.push(packet).unwrap();
        }
        assert!(batch.len() >= 1_000, "{}", batch.len());
        batch.clear();
    }
    let taken = process::memory().unwrap().resident - before;
    let allowed = (workers.len() * (said.total() + (256 << 10))) as u64;
    assert!(
        taken <= allowed,
        "{taken} bytes for {} workers, {said:?}",
        workers.len()
    );
    // And it is no idle promise: most of it is there.
    assert!(taken >= allowed / 2, "{taken}");
}

/// A seccomp filter on this thread answers io_uring_setup with `errno`, as container runtimes do.
fn refused(errno: i32) {
    need_tun();
    refuse_ring(errno);
    let forced = Worker::new(&config(Backend::IoUring)).unwrap_err();
    assert_eq!(
        (forced.kind(), forced.raw_os_error()),
        (OpenErrorKind::IoUring, Some(errno)),
        "{forced}"
    );
    let device = Builder::new("t0", Mode::Tun).address(HERE, 24).up(true).open().unwrap();
    let index = device.index().unwrap();
    let mut port = device.into_queues().remove(0).drive(&WorkerConfig::default()).unwrap();
    let report = port.worker().backend();
    assert_eq!(report.backend, Backend::Syscalls);
    assert!(report.why.contains("io_uring"), "{}", report.why);
    Filler::new(index, THERE.into(), 1).unwrap().fill(5, 64).unwrap();
    let mut batch = Batch::with_capacity(64);
    assert_eq!(port.recv_many(&mut batch), Ok(5));
    // An engine's threads are children of this one, and refused too.
    let start = |backend| {
        let config = WorkerConfig {
            backend,
            ..WorkerConfig::default()
        };
        let device = Builder::new("t1", Mode::Tun).queues(2).open().unwrap();
        let builder = tun_driver::Engine::builder().device(device).workers(2).config(config);
        builder.start_fn(|_: &mut Worker, _: tun_driver::PortId, _: &mut Batch| {})
    };
    let error = start(Some(Backend::IoUring)).unwrap_err();
    assert_eq!(
        (error.kind(), error.raw_os_error()),
        (OpenErrorKind::IoUring, Some(errno))
    );
    let engine = start(None).unwrap();
    for worker in engine.workers() {
        assert_eq!(worker.backend.backend, Backend::Syscalls);
        assert!(worker.backend.why.contains("io_uring"), "{}", worker.backend.why);
    }
    assert!(engine.stop_within(Duration::from_secs(10)).is_clean());
}

fn refuse_ring(errno: i32) {
    refuse(libc::SYS_io_uring_setup, None, errno);
}

/// Installs a seccomp filter on this thread that answers a system call with `errno`: every one, or
/// those whose second argument, the operation of io_uring_register, is `operation`.
fn refuse(call: i64, operation: Option<u32>, errno: i32) {
    let step = |code: u32, jt, jf, k| libc::sock_filter {
        code: code as u16,
        jt,
        jf,
        k,
    };
    let (load, equals, give) = (
        libc::BPF_LD | libc::BPF_W | libc::BPF_ABS,
        libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K,
        libc::BPF_RET | libc::BPF_K,
    );
    // `struct seccomp_data`: the number, 12 bytes on, and the arguments of 8 bytes each.
    const SECOND_ARGUMENT: u32 = if cfg!(target_endian = "little") { 24 } else { 28 };
    let mut filter = vec![step(load, 0, 0, 0), step(equals, 0, 1, call as u32)];
    if let Some(operation) = operation {
        filter[1].jf = 3;
        filter.extend([step(load, 0, 0, SECOND_ARGUMENT), step(equals, 0, 1, operation)]);
    }
    filter.extend([
        step(give, 0, 0, libc::SECCOMP_RET_ERRNO | errno as u32),
        step(give, 0, 0, libc::SECCOMP_RET_ALLOW),
    ]);
    let program = libc::sock_fprog {
        len: filter.len() as u16,
        filter: filter.as_mut_ptr(),
    };
    // SAFETY: prctl reads the program, which lives through the call. Both settings are of this thread and end with it.
    unsafe {
        assert_eq!(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), 0);
        assert_eq!(
            libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const program),
            0
        );
    }
}

/// The system calls of io_uring that a worker makes, and the operations of io_uring_register.
const CALLS: [(&str, i64, Option<u32>); 12] = [
    ("io_uring_setup", libc::SYS_io_uring_setup, None),
    ("io_uring_enter", libc::SYS_io_uring_enter, None),
    ("io_uring_register", libc::SYS_io_uring_register, None),
    ("UNREGISTER_BUFFERS", libc::SYS_io_uring_register, Some(1)),
    ("FILES", libc::SYS_io_uring_register, Some(2)),
    ("UNREGISTER_FILES", libc::SYS_io_uring_register, Some(3)),
    ("FILES_UPDATE", libc::SYS_io_uring_register, Some(6)),
    ("PROBE", libc::SYS_io_uring_register, Some(8)),
    ("BUFFERS2", libc::SYS_io_uring_register, Some(15)),
    ("BUFFERS_UPDATE", libc::SYS_io_uring_register, Some(16)),
    ("RING_FDS", libc::SYS_io_uring_register, Some(20)),
    ("SYNC_CANCEL", libc::SYS_io_uring_register, Some(24)),
];

/// Half a sandbox: one call is refused, and all others are there.
fn one_call_refused() {
    need_backend(Backend::IoUring);
    for (name, call, operation) in CALLS {
        for errno in [libc::EPERM, libc::ENOSYS, libc::EACCES] {
            thread::spawn(move || {
                refuse(call, operation, errno);
                let forced = Worker::new(&config(Backend::IoUring)).unwrap_err();
                assert_eq!(forced.kind(), OpenErrorKind::IoUring, "{name}: {forced}");
                assert_eq!(forced.raw_os_error(), Some(errno), "{name}: {forced}");
                assert!(forced.call().contains(name), "{name}: {forced}");
                let device = Builder::new("", Mode::Tun).address(HERE, 24).up(true).open().unwrap();
                let index = device.index().unwrap();
                let queue = device.into_queues().remove(0);
                let mut port = queue.drive(&WorkerConfig::default()).unwrap();
                let report = port.worker().backend();
                assert_eq!(report.backend, Backend::Syscalls, "{name}");
                assert!(report.why.contains(name), "{name}: {}", report.why);
                Filler::new(index, THERE.into(), 1).unwrap().fill(5, 64).unwrap();
                let mut batch = Batch::with_capacity(64);
                assert_eq!(port.recv_many(&mut batch), Ok(5), "{name}");
                let sent = port.send_many(&mut batch);
                assert_eq!((sent.accepted, sent.stopped), (5, None), "{name}");
            })
            .join()
            .unwrap();
        }
    }
}

/// Runs what workers and engines promise of the system-call backend in processes that may not enter
/// a ring: they inherit the filter of this thread.
fn refused_suite() {
    need_backend(Backend::IoUring);
    for file in ["worker", "ports", "engine", "handoff"] {
        let Some(program) = sibling(file) else {
            common::skip(format!("the tests of {file} are not built"));
        };
        let output = thread::spawn(move || {
            refuse(libc::SYS_io_uring_enter, None, libc::EPERM);
            std::process::Command::new(program)
                .args(["Syscalls", "--skip", "an idle worker"])
                .output()
                .unwrap()
        })
        .join()
        .unwrap();
        let said = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success(), "{file}: {said}");
    }
}

/// The newest program of another test file.
fn sibling(file: &str) -> Option<std::path::PathBuf> {
    let folder = std::env::current_exe().ok()?.parent()?.to_owned();
    let programs = std::fs::read_dir(folder).ok()?.flatten().filter(|entry| {
        let name = entry.file_name();
        let name = name.to_string_lossy();
        let hash = name.strip_prefix(file).and_then(|rest| rest.strip_prefix('-'));
        hash.is_some_and(|hash| hash.bytes().all(|byte| byte.is_ascii_hexdigit()))
    });
    programs
        .max_by_key(|entry| entry.metadata().and_then(|data| data.modified()).ok())
        .map(|entry| entry.path())
}

/// The kernel has 16 places for a thread's rings.
fn many_workers_on_a_thread() {
    need_backend(Backend::IoUring);
    for round in 0..100 {
        let worker = Worker::new(&config(Backend::IoUring)).unwrap();
        assert!(worker.backend().registered_ring, "worker {round}");
    }
}

/// Runs `child` in a forked child, and checks that it ends well.
fn in_a_child(child: impl FnOnce()) {
    // SAFETY: the child runs on this thread alone; it allocates, which glibc allows after a fork,
    // and ends by _exit.
    match unsafe { libc::fork() } {
        -1 => panic!("fork: {}", std::io::Error::last_os_error()),
        0 => {
            let ended = catch_unwind(AssertUnwindSafe(child));
            // SAFETY: it ends the child at once.
            unsafe { libc::_exit(i32::from(ended.is_err())) }
        }
        pid => {
            let deadline = Instant::now() + Duration::from_secs(30) * common::slowness();
            let mut status = 0;
            // SAFETY: both calls are about the child made above, which is waited for once.
            unsafe {
                while libc::waitpid(pid, &raw mut status, libc::WNOHANG) == 0 {
                    if Instant::now() > deadline {
                        libc::kill(pid, libc::SIGKILL);
                        libc::waitpid(pid, &raw mut status, 0);
                        panic!("the child hangs");
                    }
                    thread::sleep(Duration::from_micros(200));
                }
            }
            assert_eq!(status, 0, "the child's status");
        }
    }
}

// T25
fn forks(backend: Backend) {
    need_backend(backend);
    let (mut port, index) = driven(backend);
    let mut filler = Filler::new(index, THERE.into(), 1).unwrap();
    let mut batch = Batch::with_capacity(64);
    let mut received = 0;
    for round in 0..common::repeats(50, 1_000) {
        let other = Worker::new(&config(backend)).unwrap();
        let (_, handoff) = {
            let worker = port.worker_mut();
            worker.open_handoff(4).unwrap()
        };
        let packet = port.worker().packet_from(b"here").unwrap();
        let remote = port.worker().packet_from(b"there").unwrap().into_remote();
        filler.fill(3, 64).unwrap();
        port.wait(Some(Instant::now())).unwrap(); // a read is armed
        let mut left = Some((other, handoff, packet, remote));
        if round % 2 == 0 {
            // It maps memory where the parent's is, and drops copies of all of it.
            let (other, handoff, packet, remote) = left.take().unwrap();
            in_a_child(|| {
                // SAFETY: the child's copies, which it alone uses; the parent's stay as they are.
                let copies = unsafe {
                    (
                        std::ptr::read(&raw const port),
                        std::ptr::read(&raw const other),
                        std::ptr::read(&raw const handoff),
                        std::ptr::read(&raw const packet),
                        std::ptr::read(&raw const remote),
                    )
                };
                let mine: Vec<Vec<u8>> = (0..8).map(|_| vec![0xa5; 4 << 20]).collect();
                drop(copies);
                assert!(mine.iter().all(|bytes| bytes.iter().all(|&byte| byte == 0xa5)));
            });
            left = Some((other, handoff, packet, remote));
        } else {
            in_a_child(|| {});
        }
        let (other, handoff, packet, remote) = left.unwrap();
        assert_eq!((&packet[..], &remote[..]), (&b"here"[..], &b"there"[..]));
        drop((other, handoff, packet, remote));
        // The parent goes on: all packets come, none twice.
        let mut got = 0;
        while got < 3 {
            got += port.recv_many(&mut batch).unwrap();
            let sent = port.send_many(&mut batch);
            assert_eq!(sent.stopped, None);
            batch.clear();
        }
        assert_eq!(got, 3, "round {round}");
        received += got;
        // The handoff's port.
        let worker = port.worker_mut();
        for other in worker.ports().skip(1).collect::<Vec<_>>() {
            worker.detach(other).unwrap();
        }
    }
    assert!(received > 0);
    assert_eq!(leaked_arenas(), 0);
}

// T25
fn fork_of_an_engine(backend: Backend) {
    need_backend(backend);
    let device = Builder::new("t0", Mode::Tun)
        .queues(2)
        .address(HERE, 24)
        .up(true)
        .open()
        .unwrap();
    let index = device.index().unwrap();
    let engine = tun_driver::Engine::builder()
        .device(device)
        .workers(2)
        .config(config(backend))
        .start_fn(|worker: &mut Worker, port, batch: &mut Batch| {
            let _ = worker.send_many(port, batch);
        })
        .unwrap();
    let mut filler = Filler::new(index, THERE.into(), 4).unwrap();
    let wake_ups = || {
        engine
            .stats()
            .workers
            .iter()
            .map(|one| one.counters.wake_ups)
            .sum::<u64>()
    };
    let before = wake_ups();
    for _ in 0..common::repeats(50, 1_000) {
        filler.fill(8, 64).unwrap();
        in_a_child(|| {
            // SAFETY: the child's copy, which it alone uses.
            drop(unsafe { std::ptr::read(&raw const engine) });
        });
    }
    assert_eq!(wake_ups(), before, "a child rang the parent's doorbells");
    // An exec'd child has no descriptor of the engine.
    let listed = std::process::Command::new("ls")
        .args(["-l", "/proc/self/fd"])
        .output()
        .unwrap();
    let listed = String::from_utf8_lossy(&listed.stdout).into_owned();
    for kind in ["io_uring", "net/tun", "eventfd"] {
        assert!(!listed.contains(kind), "{listed}");
    }
    let all = || {
        let stats = engine.stats();
        let ports = stats.workers.iter().flat_map(|worker| &worker.ports);
        ports.map(|port| port.counters.received_packets).sum::<u64>()
    };
    let expected = 8 * common::repeats(50, 1_000) as u64;
    let deadline = Instant::now() + Duration::from_secs(20) * common::slowness();
    while all() < expected {
        assert!(Instant::now() < deadline, "{} of {expected} packets", all());
        thread::sleep(Duration::from_millis(5));
    }
    assert!(engine.stop_within(Duration::from_secs(10)).is_clean());
}

/// A forked child, which is killed unless it has ended.
struct Child(libc::pid_t);

impl Child {
    fn start(work: impl FnOnce()) -> Self {
        // SAFETY: the child runs on this thread alone; it allocates, which glibc allows after a fork, and
        // ends by _exit.
        match unsafe { libc::fork() } {
            -1 => panic!("fork: {}", std::io::Error::last_os_error()),
            0 => {
                let ended = catch_unwind(AssertUnwindSafe(work));
                // SAFETY: it ends the child at once.
                unsafe { libc::_exit(i32::from(ended.is_err())) }
            }
            pid => Self(pid),
        }
    }

    fn signal(&self, signal: i32) {
        // SAFETY: no pointers; a child that was not waited for.
        assert_eq!(unsafe { libc::kill(self.0, signal) }, 0);
    }

    /// Waits until it has ended or, with WUNTRACED, was stopped, and returns the status of waitpid(2).
    fn status(&mut self, flags: i32) -> i32 {
        let mut status = 0;
        eventually("the child's state changes", || {
            // SAFETY: `status` is writable, and the child was not waited for.
            unsafe { libc::waitpid(self.0, &raw mut status, flags | libc::WNOHANG) == self.0 }
        });
        if !libc::WIFSTOPPED(status) {
            self.0 = 0;
        }
        status
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        if self.0 > 0 {
            // SAFETY: a child that was not waited for, and is here.
            unsafe {
                libc::kill(self.0, libc::SIGKILL);
                libc::waitpid(self.0, std::ptr::null_mut(), 0);
            }
        }
    }
}

fn eventually(what: &str, mut done: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(20) * common::slowness();
    while !done() {
        assert!(Instant::now() < end, "never: {what}");
        thread::sleep(Duration::from_micros(200));
    }
}

/// What a child and its parent have in common: zeroes at first.
fn shared_words() -> &'static [AtomicU64; 2] {
    let (prot, flags) = (
        libc::PROT_READ | libc::PROT_WRITE,
        libc::MAP_SHARED | libc::MAP_ANONYMOUS,
    );
    // SAFETY: a new mapping at the kernel's choice, which is never unmapped, and large and aligned enough.
    unsafe {
        let at = libc::mmap(std::ptr::null_mut(), 4096, prot, flags, -1, 0);
        assert_ne!(at, libc::MAP_FAILED, "{}", std::io::Error::last_os_error());
        &*at.cast()
    }
}

// T1, by SIGKILL.
fn killed(backend: Backend) {
    need_backend(backend);
    let netns = Namespace::current().unwrap();
    let over = AtomicBool::new(false);
    let [received, _] = shared_words();
    thread::scope(|scope| {
        let _end = End(&over);
        scope.spawn(|| flood(&netns, &over));
        for _ in 0..repeats(20, 300) {
            received.store(0, Ordering::Relaxed);
            let mut child = Child::start(|| {
                let (mut port, _) = driven(backend);
                let mut batch = Batch::with_capacity(64);
                loop {
                    let got = port.recv_many(&mut batch).unwrap();
                    assert_eq!(port.send_many(&mut batch).stopped, None);
                    received.fetch_add(got as u64, Ordering::Relaxed);
                }
            });
            eventually("the child receives", || received.load(Ordering::Relaxed) > 50);
            child.signal(libc::SIGKILL);
            let status = child.status(0);
            assert!(libc::WIFSIGNALED(status), "{status:#x}");
            // The same name and address, and packets come. A ring is taken apart behind its process's end, which takes
            // longer than an opening waits where the machine is busy. A name that is free is never refused.
            let free = || match Builder::new("t0", Mode::Tun).open() {
                Ok(_) => true,
                Err(error) => {
                    assert_eq!(error.kind(), OpenErrorKind::NameTaken, "{error}");
                    assert!(error.detail().contains("a TUN device already"), "{error}");
                    false
                }
            };
            eventually("the name is free", free);
            let (mut port, _) = driven(backend);
            assert!(port.recv_many(&mut Batch::with_capacity(64)).unwrap() > 0);
        }
    });
}

// T24
fn stopped(backend: Backend, engine: bool) {
    need_backend(backend);
    let device = Builder::new("t0", Mode::Tun)
        .queues(2)
        .address(HERE, 24)
        .up(true)
        .open()
        .unwrap();
    let index = device.index().unwrap();
    let [received, over] = shared_words();
    let mut device = Some(device);
    let mut child = Child::start(|| {
        let count = |batch: &Batch| received.fetch_add(batch.len() as u64, Ordering::Relaxed);
        let device = device.take().unwrap();
        if engine {
            let engine = tun_driver::Engine::builder()
                .device(device)
                .workers(2)
                .config(config(backend));
            let engine = engine.start_fn(move |worker: &mut Worker, port, batch: &mut Batch| {
                count(batch);
                let _ = worker.send_many(port, batch);
            });
            let engine = engine.unwrap();
            while over.load(Ordering::Relaxed) == 0 {
                thread::sleep(Duration::from_millis(1));
            }
            assert!(engine.stop_within(Duration::from_secs(20)).is_clean());
            return;
        }
        let mut worker = Worker::new(&config(backend)).unwrap();
        for queue in device.into_queues() {
            worker.attach(queue).unwrap();
        }
        let mut batch = Batch::with_capacity(64);
        while over.load(Ordering::Relaxed) == 0 {
            worker.wait(Some(Instant::now() + Duration::from_millis(10))).unwrap();
            while let Some(port) = worker.next_ready() {
                worker.try_recv_many(port, &mut batch).unwrap();
                count(&batch);
                assert_eq!(worker.send_many(port, &mut batch).stopped, None);
                batch.clear();
            }
        }
        let (free, all) = worker.buffers();
        drop(worker);
        assert!(free > 0 && free <= all);
    });
    // The queues are the child's alone.
    drop(device);
    let mut filler = Filler::new(index, THERE.into(), 8).unwrap();
    let mut offer = |count| {
        let filled = filler.fill(count, 64).unwrap();
        filled.sent - filled.dropped
    };
    let mut expected = 0;
    for round in 0..repeats(20, 300) {
        expected += offer(30);
        // While these are on their way.
        child.signal(libc::SIGSTOP);
        assert!(libc::WIFSTOPPED(child.status(libc::WUNTRACED)));
        // What the queues hold, and in each fifth round more: the device says how many it dropped.
        let count = if round % 5 == 4 { 3_000 } else { 100 };
        expected += offer(count);
        child.signal(libc::SIGCONT);
        expected += offer(30);
        eventually("all come", || received.load(Ordering::Relaxed) >= expected);
        assert_eq!(received.load(Ordering::Relaxed), expected, "round {round}");
    }
    over.store(1, Ordering::Relaxed);
    assert_eq!(child.status(0), 0, "it ends as it should");
}

extern "C" fn nothing(_: i32) {}

// T24
fn under_signals(backend: Backend) {
    need_backend(backend);
    // SAFETY: a handler that does nothing, without SA_RESTART: calls that sleep end with EINTR.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = nothing as extern "C" fn(i32) as libc::sighandler_t;
        assert_eq!(
            libc::sigaction(libc::SIGUSR2, &raw const action, std::ptr::null_mut()),
            0
        );
    }
    // SAFETY: this thread's own number.
    let (process, thread) = unsafe { (libc::getpid(), libc::gettid()) };
    let over = AtomicBool::new(false);
    let sent = std::sync::atomic::AtomicU64::new(0);
    let (mut port, index) = driven(backend);
    let end = Instant::now() + Duration::from_secs(common::repeats(1, 60) as u64);
    thread::scope(|scope| {
        scope.spawn(|| {
            while !over.load(Ordering::Relaxed) {
                // SAFETY: a thread of this process that outlives this one.
                unsafe { libc::syscall(libc::SYS_tgkill, process, thread, libc::SIGUSR2) };
                sent.fetch_add(1, Ordering::Relaxed);
                thread::sleep(Duration::from_micros(50));
            }
        });
        struct End<'a>(&'a AtomicBool);
        impl Drop for End<'_> {
            fn drop(&mut self) {
                self.0.store(true, Ordering::Relaxed);
            }
        }
        let _end = End(&over);
        let mut filler = Filler::new(index, THERE.into(), 1).unwrap();
        let mut batch = Batch::with_capacity(64);
        let control = Builder::new("", Mode::Tun);
        let mut round = 0;
        while Instant::now() < end || round < 20 {
            round += 1;
            filler.fill(16, 64).unwrap();
            let mut got = 0;
            while got < 16 {
                got += port.recv_many(&mut batch).unwrap();
                let sent = port.send_many(&mut batch);
                assert!(
                    batch.is_empty() && sent.stopped.is_none() && sent.refused == 0,
                    "{sent:?}"
                );
            }
            assert_eq!(got, 16);
            // A wait lasts until its deadline, however often it is interrupted.
            let deadline = Instant::now() + Duration::from_millis(2);
            assert!(port.wait(Some(deadline)).unwrap().timer && Instant::now() >= deadline);
            if round % 10 == 0 {
                // And so do the beginning and the end of a port, with a read in flight.
                let mut other = control
                    .open()
                    .unwrap()
                    .into_queues()
                    .remove(0)
                    .drive(&config(backend))
                    .unwrap();
                other.wait(Some(Instant::now())).unwrap();
                drop(other);
            }
        }
    });
    assert!(sent.load(Ordering::Relaxed) > 100);
    assert_eq!(leaked_arenas(), 0);
}

/// Without CAP_IPC_LOCK, which this thread gives up, registered buffers count against RLIMIT_MEMLOCK.
fn limited() {
    need_backend(Backend::IoUring);
    let device = Builder::new("t0", Mode::Tun).address(HERE, 24).up(true).open().unwrap();
    let index = device.index().unwrap();
    let limit = tun_driver::Support::probe().memlock_limit;
    let full = WorkerConfig::default().memory().buffers as u64;
    if limit.is_none_or(|limit| limit < full) {
        common::skip(format!("the memlock limit is {limit:?}, which does not suit the test"));
    }
    give_up_ipc_lock();
    // Four times what is allowed.
    let buffers = WorkerConfig::default().buffers * (limit.unwrap_or(full) / full) as usize * 4;
    let config = WorkerConfig {
        backend: Some(Backend::IoUring),
        buffers,
        ..WorkerConfig::default()
    };
    let mut port = device.into_queues().remove(0).drive(&config).unwrap();
    let report = port.worker().backend();
    assert!(
        report.registered_buffers && report.buffers < buffers && report.buffers >= 64,
        "{report:?}"
    );
    assert!(report.why.contains("memlock"), "{}", report.why);
    Filler::new(index, THERE.into(), 1).unwrap().fill(5, 64).unwrap();
    let mut batch = Batch::with_capacity(64);
    assert!(port.recv_many(&mut batch).unwrap() > 0);
}

fn give_up_ipc_lock() {
    #[repr(C)]
    struct Header {
        version: u32,
        pid: i32,
    }
    const LINUX_CAPABILITY_VERSION_3: u32 = 0x2008_0522;
    const CAP_IPC_LOCK: u32 = 14;
    let header = Header {
        version: LINUX_CAPABILITY_VERSION_3,
        pid: 0,
    };
    let mut sets = [[0_u32; 3]; 2];
    // SAFETY: the header and two sets of three words are what version 3 of both calls takes.
    unsafe {
        assert_eq!(libc::syscall(libc::SYS_capget, &raw const header, sets.as_mut_ptr()), 0);
        sets[0][0] &= !(1 << CAP_IPC_LOCK);
        assert_eq!(libc::syscall(libc::SYS_capset, &raw const header, sets.as_ptr()), 0);
    }
}
