//! Creating and destroying a thousand times, dropping with reads in flight, faults under load, and hosts that refuse io_uring.

mod common;

use std::net::Ipv4Addr;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use common::{Trial, need_backend, need_locked_memory, need_tun, trial};
use tun_driver::lab::{Filler, Namespace, process};
use tun_driver::netlink::Handle;
use tun_driver::{
    Backend, Batch, Builder, Iface, Mode, OpenErrorKind, PortErrorKind, SinglePort, Worker, WorkerConfig, leaked_arenas,
};

fn main() {
    let mut trials: Vec<Trial> = Vec::new();
    for backend in [Backend::IoUring, Backend::Syscalls] {
        let long = Duration::from_secs(150);
        let cycles = trial(
            format!("1,000 times made and dropped, nothing is left {backend:?}"),
            move || cycles(backend),
        );
        trials.push(cycles.alone().bound(long));
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
    }
    for errno in [libc::EPERM, libc::ENOSYS] {
        let name = format!("io_uring refused with errno {errno}: system calls serve, and it is told");
        trials.push(trial(name, move || refused(errno)));
    }
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

fn cycles(backend: Backend) {
    need_backend(backend);
    let mut batch = Batch::with_capacity(64);
    let mut cycle = || {
        // The same name at once: the one before must be gone, or this is EBUSY.
        let (mut port, index) = driven(backend);
        Filler::new(index, THERE.into(), 1).unwrap().fill(3, 64).unwrap();
        port.recv_many(&mut batch).unwrap();
        port.wait(Some(Instant::now())).unwrap(); // a read is armed
        batch.clear();
        drop(port);
        drop(Iface::without_packet_info("t0", Mode::Tun).unwrap());
    };
    (0..50).for_each(|_| cycle());
    let (descriptors, threads, memory) = (
        process::open_descriptors().unwrap(),
        process::threads().unwrap().len(),
        process::memory().unwrap(),
    );
    (0..1_000).for_each(|_| cycle());
    assert_eq!(process::open_descriptors().unwrap(), descriptors);
    assert_eq!(process::threads().unwrap().len(), threads);
    // The kernel takes its time with pinned pages.
    let deadline = Instant::now() + Duration::from_secs(5);
    while process::memory().unwrap().pinned > memory.pinned && Instant::now() < deadline {
        thread::sleep(Duration::from_millis(20));
    }
    let after = process::memory().unwrap();
    assert!(after.pinned <= memory.pinned, "{after:?} {memory:?}");
    assert!(after.resident <= memory.resident + (4 << 20), "{after:?} {memory:?}");
    assert_eq!(leaked_arenas(), 0);
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
        let deadline = Instant::now() + Duration::from_secs(5);
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
    under_load(backend, 100, |netlink, index, time| {
        netlink.set_up(index, time % 2 == 1).unwrap();
        if time % 2 == 1 {
            // Going down took the route along with it; the address brought it back.
            netlink.set_mtu(index, 600 + time as u32).unwrap();
        }
    });
    under_load(backend, 50, |netlink, index, time| {
        // A device that is up keeps its name before Linux 6.2.
        if common::kernel() >= (6, 2) {
            netlink.rename(index, &format!("n{time}")).unwrap();
        }
        netlink.set_txqueuelen(index, 100 + time as u32).unwrap();
    });
}

fn deleted(backend: Backend) {
    need_backend(backend);
    for _ in 0..20 {
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
    let step = |code: u32, jt, jf, k| libc::sock_filter {
        code: code as u16,
        jt,
        jf,
        k,
    };
    let mut filter = [
        step(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, 0), // the system call's number
        step(
            libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K,
            0,
            1,
            libc::SYS_io_uring_setup as u32,
        ),
        step(
            libc::BPF_RET | libc::BPF_K,
            0,
            0,
            libc::SECCOMP_RET_ERRNO | errno as u32,
        ),
        step(libc::BPF_RET | libc::BPF_K, 0, 0, libc::SECCOMP_RET_ALLOW),
    ];
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
