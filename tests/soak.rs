//! A tunnel that carries numbered packets for a long time: no unexplained loss, and nothing that
//! grows.
//!
//! T36. Ten seconds by default, twenty minutes with `TUN_DRIVER_LONG=1`; `TUN_DRIVER_SOAK_SECONDS`
//! sets the time of each backend. With `TUN_DRIVER_SOAK_OUT=DIR` each interval's figures are
//! appended to `DIR/soak-BACKEND.jsonl`.

mod common;

use std::fs::{self, OpenOptions};
use std::io::Write as _;
use std::net::{IpAddr, Ipv4Addr, UdpSocket};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc;
use std::time::{Duration, Instant};
use std::{env, thread};

use common::{need_backend, repeats, trial};
use tun_driver::lab::generator::{Config, Generator, Limit};
use tun_driver::lab::process::{self, Memory};
use tun_driver::lab::receiver::{Receiver, SocketReceiver, Until};
use tun_driver::lab::{Namespace, Tracker};
use tun_driver::netlink::Handle;
use tun_driver::{
    Backend, Batch, Builder, Engine, Handler, Mode, MultiQueue, Offloads, PortError, PortId, Worker, WorkerConfig,
};

fn main() {
    let time = Duration::from_secs(seconds());
    let trials = [Backend::IoUring, Backend::Syscalls].map(|backend| {
        trial(
            format!("a tunnel keeps its memory and loses nothing unexplained over time {backend:?}"),
            move || soak(backend, time),
        )
        .alone()
        .bound(time * 2 + Duration::from_secs(60))
    });
    common::run(trials.into())
}

const INNER: Ipv4Addr = Ipv4Addr::new(10, 8, 0, 1);
const OUTER: Ipv4Addr = Ipv4Addr::new(10, 9, 0, 1);
const HEADER: [u8; 8] = *b"soaktest";
const FLOWS: usize = 16;
const WORKERS: usize = 2;
/// Low enough that a loaded machine keeps up; what it cannot take is dropped and explained.
const RATE: u64 = 20_000;
/// Lengths of the packets, one per interval in turn.
const LENGTHS: [usize; 4] = [64, 1_300, 200, 576];
/// Intervals that pay for what is allocated once: one of each length.
const WARM_UP: u32 = LENGTHS.len() as u32;
/// What the allocators of the intervals' threads may keep after that: the receiver's batch is 4
/// MiB.
const SLACK: u64 = 8 << 20;

fn seconds() -> u64 {
    match env::var("TUN_DRIVER_SOAK_SECONDS") {
        Ok(text) => text.parse().expect("TUN_DRIVER_SOAK_SECONDS is a number of seconds"),
        Err(_) => repeats(10, 1_200) as u64,
    }
}

/// Packets that the handlers could not send.
static DROPPED: AtomicU64 = AtomicU64::new(0);

/// One end of the tunnel on one worker: packets of `inner` leave by `near` with a header, and what
/// comes in at `far` leaves by `outer` without it.
struct Tunnel {
    inner: PortId,
    outer: PortId,
    near: PortId,
    far: PortId,
}

impl Handler for Tunnel {
    fn packets(&mut self, worker: &mut Worker, port: PortId, batch: &mut Batch) {
        let out = if port == self.inner {
            batch.iter_mut().for_each(|packet| packet.prepend(&HEADER).unwrap());
            self.near
        } else if port == self.far {
            batch.retain_mut(|packet| packet.starts_with(&HEADER));
            batch.iter_mut().for_each(|packet| packet.trim_front(HEADER.len()));
            self.outer
        } else {
            return;
        };
        let sent = worker.send_many(out, batch);
        // What the device refuses is among its own drops.
        let refused = if out == self.near { sent.refused } else { 0 };
        DROPPED.fetch_add((refused + batch.len()) as u64, Ordering::Relaxed);
    }

    fn trouble(&mut self, _: &mut Worker, _: PortId, error: &PortError) {
        // A want of buffers passes; what waits in the kernel is not lost by it.
        assert!(!error.is_permanent(), "{error}");
    }
}

/// What an interval left.
#[derive(Clone, Copy, Debug)]
struct Interval {
    sent: u64,
    received: u64,
    explained: u64,
    p50_us: f64,
    p99_us: f64,
    memory: Memory,
    descriptors: usize,
    threads: usize,
}

fn soak(backend: Backend, time: Duration) {
    need_backend(backend);
    let far_side = Namespace::new().unwrap();
    let inner = device("in0", INNER, OUTER.into());
    let inner_index = inner.index().unwrap();
    let (outer, outer_index) = far_side
        .run(|| {
            let device = device("out0", OUTER, INNER.into());
            let index = device.index().unwrap();
            (device, index)
        })
        .unwrap();
    let engine = tunnel(backend, inner, outer);
    let intervals = (time.as_secs() / 60).clamp(8, 60) as u32;
    let mut log = Log::open(backend);
    let mut warm: Option<Interval> = None;
    let mut total = (0, 0);
    for number in 0..intervals {
        let length = LENGTHS[number as usize % LENGTHS.len()];
        let now = interval(&far_side, inner_index, outer_index, length, time / intervals);
        log.add(backend, number, length, time / intervals, &now);
        total = (total.0 + now.sent, total.1 + now.received);
        if number < WARM_UP {
            warm = Some(now);
            continue;
        }
        let first = warm.expect("there are intervals to warm up");
        assert_eq!(now.descriptors, first.descriptors, "interval {number}: {now:?}");
        assert_eq!(now.threads, first.threads, "interval {number}: {now:?}");
        assert!(
            now.memory.pinned <= first.memory.pinned,
            "interval {number}: {now:?} {first:?}"
        );
        assert!(
            now.memory.resident <= first.memory.resident + SLACK,
            "interval {number}: {now:?} {first:?}"
        );
    }
    assert!(
        total.1 > total.0 / 2,
        "only {} of {} packets came through",
        total.1,
        total.0
    );
    let report = engine.stop_within(Duration::from_secs(10));
    assert!(report.is_clean(), "{report}");
    assert_eq!(tun_driver::leaked_arenas(), 0);
}

fn device(name: &str, address: Ipv4Addr, other: IpAddr) -> MultiQueue {
    // Large enough that a pause of the scheduler drops nothing.
    Builder::new(name, Mode::Tun)
        .queues(WORKERS)
        .offloads(Offloads::none())
        .txqueuelen(10_000)
        .address(address, 24)
        .route(other, 32, None)
        .up(true)
        .open()
        .unwrap()
}

fn tunnel(backend: Backend, inner: MultiQueue, outer: MultiQueue) -> Engine<Tunnel> {
    let pairs: Vec<_> = (0..WORKERS).map(|_| pair()).collect();
    let (near, mut far): (Vec<_>, Vec<_>) = pairs.into_iter().unzip();
    // A pair's ends are on different workers.
    far.rotate_left(1);
    let config = WorkerConfig {
        backend: Some(backend),
        ..WorkerConfig::default()
    };
    Engine::builder()
        .workers(WORKERS)
        .config(config)
        .device(inner)
        .device(outer)
        .sockets(near)
        .sockets(far)
        .start(|seat| {
            let port = |source| seat.port(source).expect("each source has a port on each worker");
            Ok(Tunnel {
                inner: port(0),
                outer: port(1),
                near: port(2),
                far: port(3),
            })
        })
        .unwrap()
}

/// Two sockets that are connected to each other.
fn pair() -> (UdpSocket, UdpSocket) {
    let [near, far] = [0, 0].map(|_| UdpSocket::bind("127.0.0.1:0").unwrap());
    near.connect(far.local_addr().unwrap()).unwrap();
    far.connect(near.local_addr().unwrap()).unwrap();
    (near, far)
}

/// Sends for `time` and accounts for every packet.
fn interval(far_side: &Namespace, inner: u32, outer: u32, length: usize, time: Duration) -> Interval {
    let before = losses(far_side, inner, outer);
    let stop = AtomicBool::new(false);
    let (ready, bound) = mpsc::channel();
    let (generated, receiver, dropped) = thread::scope(|scope| {
        let stop = &stop;
        let receiving = scope.spawn(move || {
            far_side
                .run(|| {
                    let mut socket = SocketReceiver::bind((OUTER, 9).into(), Receiver::new(FLOWS)).unwrap();
                    ready.send(()).unwrap();
                    socket.run(Until::default(), stop).unwrap();
                    let dropped = socket.dropped().unwrap();
                    (socket.into_receiver(), dropped)
                })
                .unwrap()
        });
        bound.recv().unwrap();
        let config = Config {
            source: Some((INNER, 20_000).into()),
            flows: FLOWS,
            length,
            rate: Some(RATE),
            limit: Limit::Time(time),
            ..Config::new((OUTER, 9).into())
        };
        let generated = Generator::new(&config).unwrap().run(&AtomicBool::new(false)).unwrap();
        settle(far_side, outer);
        stop.store(true, Ordering::Relaxed);
        let (receiver, dropped) = receiving.join().unwrap();
        (generated, receiver, dropped)
    });
    let mut tracker = Tracker::new(FLOWS);
    for (flow, &count) in generated.flows.iter().enumerate() {
        tracker.sent(flow as u16, count);
    }
    let summary = receiver.summary();
    summary.assert_orderly();
    let explained = losses(far_side, inner, outer) - before + dropped;
    assert_eq!(
        summary.received + explained,
        generated.sent,
        "packets without an explanation: {summary}"
    );
    let at = |quantile| receiver.latency().value_at_quantile(quantile) as f64 / 1e3;
    Interval {
        sent: generated.sent,
        received: summary.received,
        explained,
        p50_us: at(0.5),
        p99_us: at(0.99),
        memory: process::memory().unwrap(),
        descriptors: process::open_descriptors().unwrap(),
        threads: process::threads().unwrap().len(),
    }
}

/// Waits until no packet has come out of the tunnel for a while.
fn settle(far_side: &Namespace, outer: u32) {
    far_side
        .run(|| {
            let netlink = Handle::new().unwrap();
            let deadline = Instant::now() + Duration::from_secs(10) * common::slowness();
            let mut last = u64::MAX;
            while Instant::now() < deadline {
                let now = netlink.stats(outer).unwrap().rx_packets;
                if now == last {
                    return;
                }
                last = now;
                thread::sleep(Duration::from_millis(100));
            }
            panic!("packets still come out of the tunnel");
        })
        .unwrap();
}

/// Packets that the devices, the sockets between the workers and the handlers dropped until now.
fn losses(far_side: &Namespace, inner: u32, outer: u32) -> u64 {
    let at_inner = Handle::new().unwrap().stats(inner).unwrap().tx_dropped;
    let at_outer = far_side
        .run(|| Handle::new().unwrap().stats(outer).unwrap().rx_dropped)
        .unwrap();
    at_inner + at_outer + datagrams_dropped() + DROPPED.load(Ordering::Relaxed)
}

/// Datagrams that found a full receive buffer in this thread's namespace.
fn datagrams_dropped() -> u64 {
    let text = fs::read_to_string("/proc/thread-self/net/snmp").unwrap();
    let mut lines = text.lines().filter_map(|line| line.strip_prefix("Udp: "));
    let (names, values) = (lines.next().unwrap(), lines.next().unwrap());
    let column = names.split(' ').position(|name| name == "RcvbufErrors").unwrap();
    values.split(' ').nth(column).unwrap().parse().unwrap()
}

/// The intervals' figures as lines of JSON, for a summary.
struct Log(Option<fs::File>);

impl Log {
    fn open(backend: Backend) -> Self {
        Self(env::var_os("TUN_DRIVER_SOAK_OUT").map(|folder| {
            let path = PathBuf::from(folder).join(format!("soak-{backend:?}.jsonl"));
            let file = OpenOptions::new().create(true).append(true).open(&path);
            file.unwrap_or_else(|error| panic!("{}: {error}", path.display()))
        }))
    }

    fn add(&mut self, backend: Backend, number: u32, length: usize, time: Duration, interval: &Interval) {
        let Some(file) = &mut self.0 else { return };
        let Interval { sent, received, .. } = interval;
        writeln!(
            file,
            "{{\"backend\": \"{backend:?}\", \"interval\": {number}, \"seconds\": {:.1}, \"packet_bytes\": {length}, \
             \"sent_packets\": {sent}, \"received_packets\": {received}, \"dropped_packets\": {}, \"rate_pps\": {:.0}, \
             \"p50_us\": {:.1}, \"p99_us\": {:.1}, \"resident_bytes\": {}, \"pinned_bytes\": {}, \"descriptors\": {}, \
             \"threads\": {}}}",
            time.as_secs_f64(),
            interval.explained,
            *received as f64 / time.as_secs_f64(),
            interval.p50_us,
            interval.p99_us,
            interval.memory.resident,
            interval.memory.pinned,
            interval.descriptors,
            interval.threads,
        )
        .unwrap();
    }
}
