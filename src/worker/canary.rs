//! Proof that the kernel no longer writes into a worker's memory once the worker was dropped: after each drop with a read in flight and
//! packets on their way, the whole arena is painted, and the paint must stay.
#![allow(unsafe_code)]

use std::net::UdpSocket;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use crate::buf::{Shared, SizeClass};
use crate::lab::{Namespace, Sandbox};
use crate::{Backend, Batch, Builder, Mode, Queue, Support, Worker, WorkerConfig};

/// T1: how often, and in a long run.
const DROPS: [usize; 2] = [1_000, 10_000];
/// How many workers are forgotten.
const FORGOTTEN: [usize; 2] = [10, 100];
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
            let queue = next.take().expect("a queue");
            if round % 10 == 5 {
                // By a panic on another thread, which has the worker.
                let memory = end_by_a_panic(&config, queue);
                next = Some(control.add_queue().expect("a queue again"));
                stays_painted(&memory, round);
                continue;
            }
            let mut worker = Worker::new(&config).expect("a worker");
            let port = worker.attach(queue).expect("a port");
            // A worker that has not received yet is sure to arm a read.
            if round % 10 == 9 {
                received += worker.recv_many(port, &mut batch).expect("packets come");
                batch.clear();
            }
            worker.wait(Some(Instant::now())).expect("a read is armed");
            let memory = Memory::of(&worker);
            if round == 0 {
                // That the paint shows a write at all: a worker that lives receives into it.
                memory.paint();
                worker.recv_many(port, &mut batch).expect("packets come");
                batch.clear();
                assert!(!memory.is_painted(), "a write does not show");
            }
            // Asked of this worker, not of the process's count, in which other tests have a part.
            let clean = worker.let_go();
            drop(worker);
            leaked += usize::from(!clean);
            next = Some(control.add_queue().expect("a queue again"));
            stays_painted(&memory, round);
        }
        for round in 0..FORGOTTEN[usize::from(long)] {
            // Its memory stays mapped and its queue attached; the kernel goes on with its read, and with nothing else.
            let mut forgotten = Worker::new(&config).expect("a worker");
            forgotten.attach(next.take().expect("a queue")).expect("a port");
            forgotten.wait(Some(Instant::now())).expect("a read is armed");
            std::mem::forget(forgotten);
            let mut worker = Worker::new(&config).expect("a worker");
            let queue = control.add_queue().expect("a queue beside it");
            worker.attach(queue).expect("a port");
            worker.wait(Some(Instant::now())).expect("a read is armed");
            let memory = Memory::of(&worker);
            drop(worker);
            next = Some(control.add_queue().expect("a queue again"));
            stays_painted(&memory, round);
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

/// Has a worker with a read in flight dropped by the unwinding of a thread, and returns what its memory was.
fn end_by_a_panic(config: &WorkerConfig, queue: Queue) -> Memory {
    let config = config.clone();
    let (say, said) = std::sync::mpsc::channel();
    let ended = thread::spawn(move || {
        let mut worker = Worker::new(&config).expect("a worker");
        worker.attach(queue).expect("a port");
        worker.wait(Some(Instant::now())).expect("a read is armed");
        say.send(Memory::of(&worker)).expect("it is waited for");
        std::panic::resume_unwind(Box::new("on purpose"));
    });
    assert!(ended.join().is_err());
    said.recv().expect("it came before the panic")
}

fn stays_painted(memory: &Memory, round: usize) {
    memory.paint();
    thread::sleep(Duration::from_micros(300));
    assert!(memory.is_painted(), "written to after drop {round}");
}

/// The memory of a worker's small buffers, which stays mapped as long as this lives.
struct Memory {
    start: *mut u64,
    len: usize,
    _shared: Arc<Shared>,
}

// SAFETY: the place of memory that `_shared` keeps mapped, on any thread.
unsafe impl Send for Memory {}

impl Memory {
    fn of(worker: &Worker) -> Self {
        let arena = &worker.cx.arena;
        let memory = arena.as_iovec(SizeClass::Small, arena.config().small_slots);
        Self {
            start: memory.iov_base.cast(),
            len: memory.iov_len / 8,
            _shared: Arc::clone(arena.shared()),
        }
    }

    fn paint(&self) {
        // SAFETY: it is mapped. No packet of it is alive; the kernel may write to it meanwhile, which is what is looked for.
        unsafe { std::ptr::write_bytes(self.start.cast::<u8>(), PAINT, self.len * 8) };
    }

    fn is_painted(&self) -> bool {
        let paint = u64::from_ne_bytes([PAINT; 8]);
        // SAFETY: as in `paint`; volatile, because the kernel is not known to the compiler.
        (0..self.len).all(|at| unsafe { self.start.add(at).read_volatile() } == paint)
    }
}
