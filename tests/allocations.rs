//! No allocation per packet or per batch in steady state, counted by the allocator itself.

mod common;

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::net::{Ipv4Addr, UdpSocket};
use std::os::fd::AsRawFd;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use common::{need_backend, trial};
use tun_driver::lab::generator::{Config, Generator, Limit, Way};
use tun_driver::lab::packet::Spec;
use tun_driver::lab::receiver::Receiver;
use tun_driver::{Backend, Batch, Builder, Mode, Offloads, Worker, WorkerConfig};

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
    let superpackets = [Backend::IoUring, Backend::Syscalls].into_iter().map(|backend| {
        trial(
            format!("cutting, merging and passing on allocate nothing {backend:?}"),
            move || {
                need_backend(backend);
                superpackets(backend);
            },
        )
    });
    common::run(trials.chain(superpackets).chain([counting]).collect())
}

/// Superpackets of a socket are received, split by hand, merged again, passed on, and cut for a device without offloads and for a socket.
fn superpackets(backend: Backend) {
    let open = |name: &str, offloads, last: u8| {
        let device = Builder::new(name, Mode::Tun)
            .offloads(offloads)
            .address(Ipv4Addr::new(10, last, 0, 1), 24)
            .up(true);
        device.open().unwrap().into_queues().remove(0)
    };
    let mut worker = Worker::new(&WorkerConfig {
        backend: Some(backend),
        ..WorkerConfig::default()
    })
    .unwrap();
    let from = worker.attach(open("from", Offloads::all(), 11)).unwrap();
    let same = worker.attach(open("same", Offloads::all(), 12)).unwrap();
    let plain = worker.attach(open("plain", Offloads::none(), 13)).unwrap();
    let socket = UdpSocket::bind("10.11.0.1:0").unwrap();
    socket.connect("10.11.0.1:9").unwrap();
    let udp = worker.attach(socket).unwrap();

    let sender = UdpSocket::bind("10.11.0.1:0").unwrap();
    let size: libc::c_int = 500;
    // SAFETY: UDP_SEGMENT of linux/udp.h takes an int.
    let set = unsafe { libc::setsockopt(sender.as_raw_fd(), 17, 103, (&raw const size).cast(), 4) };
    assert_eq!(set, 0);
    sender.connect("10.11.0.2:9").unwrap();
    let bytes = vec![7; 20_000];
    let (mut batch, mut whole) = (Batch::with_capacity(16), Batch::with_capacity(64));
    let mut round = |worker: &mut Worker| {
        for to in [same, plain, udp] {
            for by_hand in [false, true] {
                sender.send(&bytes).unwrap();
                let deadline = Instant::now() + Duration::from_secs(5) * common::slowness();
                while !batch.iter().any(|packet| packet.ends_with(&[7; 100])) {
                    assert!(Instant::now() < deadline);
                    let _ = worker.recv_many(from, &mut batch);
                }
                if by_hand {
                    while batch.split_into(&mut whole) > 0 {
                        let _ = worker.send_many(to, &mut whole);
                        whole.clear();
                    }
                } else {
                    let _ = worker.send_many(to, &mut batch);
                }
                batch.clear();
            }
        }
    };
    (0..20).for_each(|_| round(&mut worker));
    let before = ALLOCATIONS.with(Cell::get);
    (0..100).for_each(|_| round(&mut worker));
    assert_eq!(ALLOCATIONS.with(Cell::get) - before, 0);
    let counters = worker.counters(same).unwrap();
    assert!(
        counters.merged_superpackets >= 100 || common::kernel() < (6, 2),
        "{counters:?}"
    );
    assert!(worker.counters(plain).unwrap().cut_superpackets >= 100 || common::kernel() < (6, 2));
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
