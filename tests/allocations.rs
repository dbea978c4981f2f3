//! No allocation per packet or per batch in steady state, counted by the allocator itself.

mod common;

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::net::{Ipv4Addr, UdpSocket};
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use common::{need_backend, trial};
use tun_driver::lab::generator::{Config, Generator, Limit, Way};
use tun_driver::lab::packet::Spec;
use tun_driver::lab::receiver::Receiver;
use tun_driver::{Backend, Batch, Builder, Mode, Worker, WorkerConfig};

/// Counts what the calling thread asks for.
struct Counting;

thread_local! {
    static ALLOCATIONS: Cell<u64> = const { Cell::new(0) };
}

// SAFETY: everything is passed on to the system's allocator; the counter is a plain cell of this thread without a destructor.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.with(|count| count.set(count.get() + 1));
        // SAFETY: as the caller promises.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        // SAFETY: as the caller promises.
        unsafe { System.dealloc(at, layout) }
    }

    unsafe fn realloc(&self, at: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        ALLOCATIONS.with(|count| count.set(count.get() + 1));
        // SAFETY: as the caller promises.
        unsafe { System.realloc(at, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn main() {
    let trials = [Backend::IoUring, Backend::Syscalls].into_iter().map(|backend| {
        trial(format!("steady state allocates nothing {backend:?}"), move || {
            need_backend(backend);
            steady_state(backend);
        })
    });
    let counting = trial(
        "the counting receiver allocates nothing, nor does the generator per packet",
        counting,
    );
    common::run(trials.chain([counting]).collect())
}

fn counting() {
    let mut receiver = Receiver::new(3);
    let mut buffer = [0; 100];
    let before = ALLOCATIONS.with(Cell::get);
    for sequence in 0..100_000 {
        // In order, each latency another one.
        let spec =
            Spec::new("10.7.0.2:4000".parse().unwrap(), "10.7.0.1:9".parse().unwrap()).flow((sequence % 3) as u16);
        spec.build(&mut buffer, 100, sequence / 3, 0);
        receiver.packet(&buffer, u64::from(sequence) * 40_000);
    }
    assert_eq!(ALLOCATIONS.with(Cell::get) - before, 0);
    receiver.summary().assert_all();

    let here = UdpSocket::bind("127.0.0.1:0").unwrap();
    for way in [Way::Single, Way::Batch, Way::Gso] {
        let allocations = [100, 1_000].map(|packets| {
            let mut generator = Generator::new(&Config {
                rate: Some(500_000),
                limit: Limit::Packets(packets),
                way: Some(way),
                ..Config::new(here.local_addr().unwrap())
            })
            .unwrap();
            let before = ALLOCATIONS.with(Cell::get);
            generator.run(&AtomicBool::new(false)).unwrap();
            ALLOCATIONS.with(Cell::get) - before
        });
        assert_eq!(
            allocations[0], allocations[1],
            "as many for ten times as many packets, {way:?}"
        );
    }
}

fn steady_state(backend: Backend) {
    let mut worker = Worker::new(&WorkerConfig {
        backend: Some(backend),
        ..WorkerConfig::default()
    })
    .unwrap();
    let device = Builder::new("t0", Mode::Tun)
        .address(Ipv4Addr::new(10, 7, 0, 1), 24)
        .up(true)
        .open()
        .unwrap();
    let tun = worker.attach(device.into_queues().remove(0)).unwrap();
    let (near, far) = (
        UdpSocket::bind("127.0.0.1:0").unwrap(),
        UdpSocket::bind("127.0.0.1:0").unwrap(),
    );
    near.connect(far.local_addr().unwrap()).unwrap();
    far.connect(near.local_addr().unwrap()).unwrap();
    let udp = worker.attach(near).unwrap();
    let host = UdpSocket::bind("10.7.0.1:5000").unwrap();
    host.connect("10.7.0.2:9").unwrap();
    let (mut batch, mut buffer) = (Batch::with_capacity(64), [0; 2048]);
    let spec = Spec::new("10.7.0.2:4000".parse().unwrap(), "10.7.0.1:9".parse().unwrap());
    let length = 100;
    spec.build(&mut buffer, length, 0, 0);

    let mut moved = 0;
    let mut round = |worker: &mut Worker| {
        for _ in 0..40 {
            host.send(&[1; 60]).unwrap();
            far.send(&[2; 60]).unwrap();
        }
        let mut got = 0;
        while got < 80 {
            worker.wait(Some(Instant::now() + Duration::from_secs(5))).unwrap();
            while let Some(port) = worker.next_ready() {
                got += worker.try_recv_many(port, &mut batch).unwrap();
                // Half of what came goes out by the other port, the rest is thrown away.
                let mut kept = 0;
                batch.retain_mut(|packet| {
                    kept += 1;
                    packet.prepend(b"header").unwrap();
                    packet.trim_front(6);
                    kept % 2 == 0
                });
                moved += worker
                    .send_many(if port == tun { udp } else { tun }, &mut batch)
                    .accepted;
                batch.clear();
            }
        }
        let packet = worker.packet_from(&buffer[..length]).unwrap();
        let packet = worker.import(packet.into_remote()).unwrap();
        batch.push(packet).unwrap();
        assert_eq!(worker.send_many(tun, &mut batch).accepted, 1);
        worker.send(tun, &buffer[..length]).unwrap();
        far.send(b"one").unwrap();
        while worker.recv(udp, &mut buffer[1000..]).unwrap() != 3 {}
        let mut scrap = [0; 100];
        far.set_nonblocking(true).unwrap();
        while far.recv(&mut scrap).is_ok() {}
    };
    for _ in 0..50 {
        round(&mut worker);
    }
    let before = ALLOCATIONS.with(Cell::get);
    for _ in 0..1_000 {
        round(&mut worker);
    }
    assert_eq!(ALLOCATIONS.with(Cell::get) - before, 0);
    assert!(moved > 10_000, "{moved}");
}
