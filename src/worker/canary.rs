//! Proof that the kernel no longer writes into a worker's memory once the worker was dropped: after each drop with a read in flight and
//! packets on their way, the whole arena is painted, and the paint must stay.
#![allow(unsafe_code)]

use std::net::UdpSocket;
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use crate::buf::{Arena, SizeClass};
use crate::lab::{Namespace, Sandbox};
use crate::{Backend, Batch, Builder, Mode, Support, Worker, WorkerConfig};

/// T1: how often, and in a long run.
const DROPS: [usize; 2] = [1_000, 10_000];
const PAINT: u8 = 0xa5;

#[test]
fn memory_stays_as_it_is_after_a_drop_with_reads_in_flight() {
    // A thread of its own, because the namespace is one's for good.
    thread::spawn(drop_under_traffic).join().expect("the paint stayed");
}

fn drop_under_traffic() {
    let ready = std::fs::File::options()
        .read(true)
        .write(true)
        .open("/dev/net/tun")
        .and_then(|_| Sandbox::enter());
    if let Err(error) = ready {
        assert!(std::env::var_os("TUN_DRIVER_REQUIRE_NETNS").is_none(), "{error}");
        println!("skipped: no device in a namespace can be had: {error}");
        return;
    }
    if Support::probe().tun_nowait == Some(false) {
        println!("skipped: the ring backend needs Linux 6.4");
        return;
    }
    // Two queues: one keeps the device and its packets coming while the other comes and goes.
    let device = Builder::new("canary0", Mode::Tun)
        .queues(2)
        .address([10, 9, 0, 1], 24)
        .up(true)
        .open()
        .expect("a device");
    let control = device.device().expect("made here").clone();
    let mut queues = device.into_queues();
    let _keep = queues.pop();
    let mut next = queues.pop();
    let netns = Namespace::current().expect("this namespace");
    let over = AtomicBool::new(false);
    let mut leaked = 0;
    thread::scope(|scope| {
        let _end = End(&over);
        scope.spawn(|| {
            netns.run(|| {
                let socket = UdpSocket::bind("0.0.0.0:0").expect("a socket");
                while !over.load(Ordering::Relaxed) {
                    // To many ports, so that both queues get some.
                    for port in 1..200 {
                        let _ = socket.send_to(&[0; 200], (std::net::Ipv4Addr::new(10, 9, 0, 2), port));
                    }
                }
            })
        });
        let config = WorkerConfig {
            backend: Some(Backend::IoUring),
            buffers: 64,
            receive_reserve: 8,
            ..WorkerConfig::default()
        };
        let mut batch = Batch::with_capacity(16);
        let mut received = 0;
        let long = std::env::var_os("TUN_DRIVER_LONG").is_some_and(|long| !long.is_empty() && long != "0");
        for round in 0..DROPS[usize::from(long)] {
            let mut worker = Worker::new(&config).expect("a worker");
            let queue = next.take().expect("a queue");
            let port = worker.attach(queue).expect("a port");
            // A worker that has not received yet is sure to arm a read.
            if round % 10 == 9 {
                received += worker.recv_many(port, &mut batch).expect("packets come");
                batch.clear();
            }
            worker.wait(Some(Instant::now())).expect("a read is armed");
            let arena = Rc::clone(&worker.cx.arena);
            if round == 0 {
                // That the paint shows a write at all: a worker that lives receives into it.
                paint(&arena);
                worker.recv_many(port, &mut batch).expect("packets come");
                batch.clear();
                assert!(!is_painted(&arena), "a write does not show");
            }
            // Asked of this worker, not of the process's count, in which other tests have a part.
            let clean = worker.let_go();
            drop(worker);
            leaked += usize::from(!clean);
            next = Some(control.add_queue().expect("a queue again"));
            paint(&arena);
            thread::sleep(Duration::from_micros(300));
            assert!(is_painted(&arena), "written to after drop {round}");
        }
        assert!(received > 0);
    });
    // A drop waits for the kernel for a bounded time only, which may be too short on an emulated
    // machine: it leaks then, and nothing else.
    let slow = std::env::var_os("TUN_DRIVER_SLOWNESS").is_some();
    assert!(leaked == 0 || slow && leaked < 10, "{leaked}");
}

/// Ends the traffic, also when a check fails.
struct End<'a>(&'a AtomicBool);

impl Drop for End<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

fn paint(arena: &Arena) {
    let memory = arena.as_iovec(SizeClass::Small, arena.config().small_slots);
    // SAFETY: the mapping lives as long as `arena`. No packet of it is alive; the kernel may write to it meanwhile, which is what is looked for.
    unsafe { std::ptr::write_bytes(memory.iov_base.cast::<u8>(), PAINT, memory.iov_len) };
}

fn is_painted(arena: &Arena) -> bool {
    let memory = arena.as_iovec(SizeClass::Small, arena.config().small_slots);
    let start = memory.iov_base.cast::<u64>();
    // SAFETY: as in `paint`; volatile, because the kernel is not known to the compiler.
    (0..memory.iov_len / 8).all(|at| unsafe { start.add(at).read_volatile() } == u64::from_ne_bytes([PAINT; 8]))
}
