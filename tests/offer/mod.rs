//! Devices, sockets and packets for the tests of the worker.
#![allow(dead_code, unreachable_pub)] // each test file uses its share

use std::fs;
use std::net::{SocketAddr, UdpSocket};
use std::time::{Duration, Instant};

use tun_driver::lab::packet::{Fault, Framing, Spec, Stamp, write_payload};
use tun_driver::lab::sysctl;
use tun_driver::{
    Backend, Batch, Builder, Device, Mode, MultiQueue, PacketBuf, PortError, PortId, Queue, Worker, WorkerConfig,
};

use super::common::{Trial, need_backend, trial};

/// The device's own address, where what is written into it for a socket goes.
pub const HERE: &str = "10.0.0.1";
/// An address behind the device: what is sent there comes out of its queues.
pub const THERE: &str = "10.0.0.2";
/// The port at [`HERE`] that [`outward`] packets are for.
pub const PORT: u16 = 5000;

/// The check for each backend, named after it.
pub fn on_both(trials: &mut Vec<Trial>, name: &str, check: fn(Backend)) {
    trials.extend(both(name, check));
}

/// As [`on_both`], to be changed further.
pub fn both(name: &str, check: fn(Backend)) -> [Trial; 2] {
    [Backend::IoUring, Backend::Syscalls].map(|backend| {
        trial(named(name, backend), move || {
            need_backend(backend);
            check(backend);
        })
    })
}

/// What the check for a backend is called.
pub fn named(name: &str, backend: Backend) -> String {
    let word = match backend {
        Backend::IoUring => "io_uring",
        _ => "syscalls",
    };
    format!("{name}: {word}")
}

pub fn config(backend: Backend) -> WorkerConfig {
    WorkerConfig {
        backend: Some(backend),
        ..WorkerConfig::default()
    }
}

pub fn worker(backend: Backend) -> Worker {
    Worker::new(&config(backend)).unwrap()
}

/// A builder of a TUN device that is up, with [`HERE`] as its address, and without IPv6.
pub fn tun(queues: usize) -> Builder {
    quiet();
    Builder::new("t%d", Mode::Tun)
        .queues(queues)
        .address(HERE.parse::<std::net::IpAddr>().unwrap(), 24)
        .up(true)
}

/// Keeps IPv6 from sending on its own through devices made from now on.
pub fn quiet() {
    let _ = sysctl("net/ipv6/conf/default/disable_ipv6", 1);
}

/// The only queue, and a handle for the device.
pub fn single(opened: MultiQueue) -> (Queue, Device) {
    let device = opened.device().expect("a device made here has a handle").clone();
    (opened.into_queues().remove(0), device)
}

/// A worker with the queue of a fresh TUN device.
pub fn with_tun(backend: Backend) -> (Worker, PortId, Device) {
    let (queue, device) = single(tun(1).open().unwrap());
    let mut worker = worker(backend);
    let port = worker.attach(queue).unwrap();
    (worker, port, device)
}

/// Sends numbered packets into the device from the host's side.
pub struct Offer {
    socket: UdpSocket,
    target: SocketAddr,
    next: u32,
}

impl Offer {
    pub fn to(target: SocketAddr) -> Self {
        let any: SocketAddr = if target.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" }.parse().unwrap();
        Self {
            socket: UdpSocket::bind(any).unwrap(),
            target,
            next: 0,
        }
    }

    /// To an address behind the device of [`tun`].
    pub fn new() -> Self {
        Self::to(SocketAddr::new(THERE.parse().unwrap(), 9))
    }

    pub fn send(&mut self, count: u32) {
        (0..count).for_each(|_| self.send_long(64));
    }

    /// One packet with a UDP payload of `len` bytes.
    pub fn send_long(&mut self, len: usize) {
        let mut payload = vec![0; len];
        write_payload(&mut payload, 0, self.next, 0);
        assert_eq!(self.socket.send_to(&payload, self.target).unwrap(), len);
        self.next += 1;
    }
}

/// Verifies a packet that came out of a device without framing.
pub fn stamp(packet: &[u8]) -> Result<Stamp, Fault> {
    Framing::NONE.check(packet)
}

/// The sequence numbers of the packets in the batch; panics on a damaged or foreign one.
pub fn numbers(batch: &Batch) -> Vec<u32> {
    batch.iter().map(|packet| stamp(packet).unwrap().sequence).collect()
}

/// The packets to be written into the device of [`tun`] for a socket at [`HERE`]:[`PORT`].
pub fn outward() -> Spec {
    Spec::new(
        SocketAddr::new(THERE.parse().unwrap(), 4000),
        SocketAddr::new(HERE.parse().unwrap(), PORT),
    )
}

/// Packet `sequence` of `spec` in a buffer of the worker.
pub fn build(worker: &Worker, spec: &Spec, len: usize, sequence: u32) -> PacketBuf {
    let mut bytes = vec![0; len + spec.framing.len()];
    let len = spec.build(&mut bytes, len, sequence, 0);
    worker.packet_from(&bytes[..len]).expect("a free buffer")
}

/// A batch with the packets of these numbers, for [`HERE`]:[`PORT`].
pub fn batch_of(worker: &Worker, numbers: std::ops::Range<u32>) -> Batch {
    let mut batch = Batch::with_capacity(numbers.len());
    for sequence in numbers {
        batch.push(build(worker, &outward(), 100, sequence)).unwrap();
    }
    batch
}

/// Receives until `count` packets have come or ten seconds are over; the packets are in the batch.
pub fn receive(worker: &mut Worker, port: PortId, batch: &mut Batch, count: usize) -> Result<(), PortError> {
    let deadline = Instant::now() + Duration::from_secs(10);
    while batch.len() < count {
        let wake = worker.wait(Some(deadline)).unwrap();
        assert!(!wake.timer, "{} of {count} packets came", batch.len());
        worker.try_recv_many(port, batch)?;
    }
    Ok(())
}

/// (voluntary, involuntary) context switches of a thread of this process.
pub fn switches(thread: libc::pid_t) -> (u64, u64) {
    let status = fs::read_to_string(format!("/proc/self/task/{thread}/status")).unwrap();
    let field = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap();
        line.trim().parse().unwrap()
    };
    (field("voluntary_ctxt_switches:"), field("nonvoluntary_ctxt_switches:"))
}

/// Waits until a thread of this process sleeps in the kernel.
pub fn await_sleep(thread: libc::pid_t) {
    let end = Instant::now() + Duration::from_secs(10);
    loop {
        let stat = fs::read_to_string(format!("/proc/self/task/{thread}/stat")).unwrap();
        let state = stat.rsplit_once(')').unwrap().1.trim_start().chars().next();
        if state == Some('S') {
            return;
        }
        assert!(Instant::now() < end, "the thread does not fall asleep: {stat}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// The calling thread, as /proc names it.
pub fn this_thread() -> libc::pid_t {
    // SAFETY: gettid takes no arguments and cannot fail.
    unsafe { libc::gettid() }
}
