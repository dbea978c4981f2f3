//! What lies at the edges of what a device takes: every first nibble and length written, and MTUs
//! that change under load.

mod common;

use std::net::{Ipv4Addr, UdpSocket};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use common::{Trial, again, need_backend, repeats, trial};
use tun_driver::netlink::Handle;
use tun_driver::offload::{Link, Meta, VnetHdr};
use tun_driver::{Backend, Batch, Builder, Device, Mode, Offloads, PortErrorKind, PortId, Wait, Worker, WorkerConfig};

fn main() {
    let mut trials: Vec<Trial> = Vec::new();
    for backend in [Backend::IoUring, Backend::Syscalls] {
        let mut add = |name: &str, work: fn(Backend)| {
            let work = move || {
                need_backend(backend);
                work(backend);
            };
            trials.push(trial(format!("{name}: {backend:?}"), work).bound(Duration::from_secs(120)));
        };
        add("a TUN device takes what it is known to take", |backend| {
            written(backend, Mode::Tun, Offloads::none());
        });
        add("a TUN device with offloads takes what it is known to take", |backend| {
            written(backend, Mode::Tun, Offloads::all());
        });
        add("a TAP device takes what it is known to take", |backend| {
            written(backend, Mode::Tap, Offloads::none());
        });
        add("a TAP device with offloads takes what it is known to take", |backend| {
            written(backend, Mode::Tap, Offloads::all());
        });
        add(
            "no place of a checksum does more than have its packet refused",
            checksums,
        );
        add("MTUs that change under load cost no packet unseen", mtus);
    }
    common::run(trials)
}

const OURS: Ipv4Addr = Ipv4Addr::new(10, 7, 0, 1);
const THEIRS: Ipv4Addr = Ipv4Addr::new(10, 7, 0, 2);

struct Bench {
    worker: Worker,
    port: PortId,
    device: Device,
    /// The same open file: what it answers to write(2) is the oracle.
    raw: OwnedFd,
    mode: Mode,
    /// Bytes of the driver's header.
    vnet: usize,
}

impl Bench {
    fn new(backend: Backend, mode: Mode, offloads: Offloads) -> Self {
        let mut builder = Builder::new("limits%d", mode).offloads(offloads).address(OURS, 24);
        if mode == Mode::Tap {
            builder = builder.mac([2, 0, 0, 0, 0, 1]);
        }
        let opened = builder.up(true).open().unwrap();
        let device = opened.device().unwrap().clone();
        let queue = opened.into_queues().remove(0);
        let raw = queue.as_fd().try_clone_to_owned().unwrap();
        let vnet = if queue.vnet_hdr() { VnetHdr::LEN } else { 0 };
        let config = WorkerConfig {
            backend: Some(backend),
            wait: Wait::Block,
            large_buffers: 16,
            ..WorkerConfig::default()
        };
        let mut worker = Worker::new(&config).unwrap();
        let port = worker.attach(queue).unwrap();
        Self {
            worker,
            port,
            device,
            raw,
            mode,
            vnet,
        }
    }

    /// What write(2) says: 0, or an errno.
    fn learn(&self, header: VnetHdr, packet: &[u8]) -> i32 {
        let bytes = [&header.to_bytes()[..self.vnet], packet].concat();
        // SAFETY: the bytes live through the call.
        let result = unsafe { libc::write(self.raw.as_raw_fd(), bytes.as_ptr().cast(), bytes.len()) };
        if result >= 0 {
            assert_eq!(result as usize, bytes.len());
            return 0;
        }
        std::io::Error::last_os_error().raw_os_error().unwrap()
    }

    /// What the worker says: 0, or an errno. `None` if the packet is longer than its buffers.
    fn send(&mut self, packet: &[u8], meta: Meta) -> Option<i32> {
        let mut batch = Batch::with_capacity(1);
        let Some(mut buffer) = self.worker.packet_from(packet) else {
            assert!(packet.len() > self.worker.longest_packet());
            let error = self.worker.send(self.port, packet).unwrap_err();
            assert_eq!(
                (error.kind(), error.raw_os_error()),
                (PortErrorKind::BadPacket, libc::EMSGSIZE)
            );
            return None;
        };
        if buffer.set_meta(meta).is_err() {
            return Some(libc::EINVAL);
        }
        batch.push(buffer).unwrap();
        let sent = self.worker.send_many(self.port, &mut batch);
        assert_eq!((sent.accepted + sent.refused, sent.stopped), (1, None), "{meta:?}");
        Some(sent.refusal.map_or(0, |error| {
            assert_eq!(error.kind(), PortErrorKind::BadPacket);
            error.raw_os_error()
        }))
    }

    /// A thousand good packets pass, in order.
    fn prove(&mut self) {
        let socket = UdpSocket::bind((OURS, 0)).unwrap();
        socket
            .set_read_timeout(Some(Duration::from_secs(5) * common::slowness()))
            .unwrap();
        let to = socket.local_addr().unwrap().port();
        let mut batch = Batch::with_capacity(50);
        for round in 0..20_u16 {
            for index in 0..50 {
                let number = (round * 50 + index).to_be_bytes();
                let mut packet = Vec::new();
                let builder = match self.mode {
                    Mode::Tun => etherparse::PacketBuilder::ipv4(THEIRS.octets(), OURS.octets(), 64),
                    Mode::Tap => etherparse::PacketBuilder::ethernet2([2, 0, 0, 0, 0, 2], [2, 0, 0, 0, 0, 1]).ipv4(
                        THEIRS.octets(),
                        OURS.octets(),
                        64,
                    ),
                };
                builder.udp(9, to).write(&mut packet, &number).unwrap();
                batch.push(self.worker.packet_from(&packet).unwrap()).unwrap();
            }
            let sent = self.worker.send_many(self.port, &mut batch);
            assert_eq!((sent.accepted, sent.refused, sent.stopped), (50, 0, None));
            for index in 0..50 {
                let mut number = [0; 8];
                assert_eq!(again(|| socket.recv(&mut number)).unwrap(), 2);
                assert_eq!(number[..2], (round * 50 + index).to_be_bytes());
            }
        }
    }
}

/// T18. Every first nibble and length: the worker answers as write(2) does, and that is what is
/// known of it.
fn written(backend: Backend, mode: Mode, offloads: Offloads) {
    let mut bench = Bench::new(backend, mode, offloads);
    // A short run takes every length below 100, and of the long ones each so many.
    let step = repeats(23, 1);
    let long = repeats(331, 1);
    let lengths = (0..100)
        .chain((1_279..1_501).step_by(step))
        .chain((65_530..=70_000).step_by(long))
        .chain([1_500, 65_535, 65_536, 65_557, 65_558, 70_000]);
    let (mut taken, mut refused, mut too_long) = (0, 0, 0);
    for len in lengths {
        let mut packet = vec![0; len];
        for nibble in 0..16_u8 {
            if let Some(first) = packet.first_mut() {
                *first = nibble << 4 | 5;
            }
            let known = match mode {
                Mode::Tun if len == 0 || nibble != 4 && nibble != 6 => libc::EINVAL,
                Mode::Tap if len < 14 => libc::EINVAL,
                _ => 0,
            };
            assert_eq!(
                bench.learn(VnetHdr::plain(), &packet),
                known,
                "{len} bytes, nibble {nibble}"
            );
            match bench.send(&packet, Meta::Plain) {
                Some(answer) => assert_eq!(answer, known, "{len} bytes, nibble {nibble}"),
                None => too_long += 1,
            }
            if known == 0 {
                taken += 1;
            } else {
                refused += 1;
            }
        }
    }
    assert!(
        taken > 100 && refused > 100 && too_long > 0,
        "{taken} {refused} {too_long}"
    );
    bench.prove();
}

/// T18. Every place of a checksum near a bound. What the worker sends, write(2) takes; what it
/// refuses is EINVAL.
fn checksums(backend: Backend) {
    for mode in [Mode::Tun, Mode::Tap] {
        let mut bench = Bench::new(backend, mode, Offloads::all());
        let link = if mode == Mode::Tap { Link::Ethernet } else { Link::None };
        let ethernet = if mode == Mode::Tap { 14 } else { 0 };
        let (mut taken, mut refused) = (0, 0);
        for v6 in [false, true] {
            for payload in [0, 1, 100, 1_400] {
                let mut packet = vec![2; ethernet];
                let ip = if v6 {
                    etherparse::PacketBuilder::ipv6([0xfd; 16], [0xfd; 16], 64)
                } else {
                    etherparse::PacketBuilder::ipv4(THEIRS.octets(), OURS.octets(), 64)
                };
                ip.udp(9, 9).write(&mut packet, &vec![7; payload]).unwrap();
                if mode == Mode::Tap {
                    packet[12..14].copy_from_slice(if v6 { &[0x86, 0xdd] } else { &[8, 0] });
                }
                let len = packet.len();
                let near = [0, 1, 19, 20, 39, 40, len - 1, len, len + 1, 0x7fff, 0xfff0, 0xffff];
                for start in near.into_iter().chain([ethernet + if v6 { 40 } else { 20 }]) {
                    for offset in near.into_iter().chain([6]) {
                        let mut header = [1, 0, 0, 0, 0, 0, 0, 0, 0, 0];
                        header[6..8].copy_from_slice(&(start as u16).to_ne_bytes());
                        header[8..10].copy_from_slice(&(offset as u16).to_ne_bytes());
                        let header = VnetHdr::from_bytes(header);
                        let answer = bench.send(
                            &packet,
                            Meta::Unfinished {
                                start,
                                field: start + offset,
                            },
                        );
                        let answer = answer.expect("it fits a buffer");
                        let what = format!("{mode:?}, {len} bytes, start {start}, offset {offset}");
                        assert_eq!(answer == 0, header.check(&packet, link).is_ok(), "{what}");
                        if answer == 0 {
                            taken += 1;
                            assert_eq!(bench.learn(header, &packet), 0, "{what}");
                        } else {
                            refused += 1;
                            assert_eq!(answer, libc::EINVAL, "{what}");
                        }
                    }
                }
            }
        }
        assert!(taken > 20 && refused > 500, "{taken} {refused}");
        bench.prove();
    }
}

/// T20, T19. The books agree with the kernel's whatever the MTU is, and no packet is shorter than
/// its header says.
fn mtus(backend: Backend) {
    for offloads in [Offloads::none(), Offloads::all()] {
        let mut bench = Bench::new(backend, Mode::Tun, offloads);
        let changes = repeats(50, 1_000);
        let (over, quiet) = (AtomicBool::new(false), AtomicBool::new(false));
        thread::scope(|scope| {
            scope.spawn(|| {
                // Ends the sender also when a change fails.
                let _end = End(&over);
                let bounds = [
                    68, 69, 576, 1_279, 1_280, 1_500, 1_827, 1_828, 1_855, 1_856, 9_000, 65_535,
                ];
                for change in 0..changes as u32 {
                    let mtu = match bounds.get(change as usize % 20) {
                        Some(&mtu) => mtu,
                        // Others, all over the range.
                        None => 68 + change.wrapping_mul(2_654_435_761) % (65_535 - 67),
                    };
                    bench.device.set_mtu(mtu).unwrap();
                    thread::sleep(Duration::from_millis(2));
                }
                bench.device.set_mtu(1_500).unwrap();
            });
            scope.spawn(|| {
                let _end = End(&quiet);
                let socket = UdpSocket::bind((OURS, 0)).unwrap();
                let bytes = vec![7; 60_000];
                let sizes = [0, 40, 41, 548, 1_472, 1_473, 1_827, 1_828, 3_000, 9_000, 60_000];
                for size in sizes.into_iter().cycle() {
                    if over.load(Ordering::Relaxed) {
                        break;
                    }
                    // Whatever the MTU makes of it: pieces, or an error meanwhile.
                    let _ = socket.send_to(&bytes[..size], (THEIRS, 9));
                    thread::sleep(Duration::from_micros(200));
                }
            });
            let mut batch = Batch::with_capacity(64);
            // Until nothing came for a while after the last was sent.
            let (mut idle, mut truncations) = (0, 0);
            while idle < 20 {
                let woken = bench
                    .worker
                    .wait(Some(Instant::now() + Duration::from_millis(10)))
                    .unwrap();
                if woken.ready == 0 {
                    idle += usize::from(quiet.load(Ordering::Relaxed));
                    continue;
                }
                idle = 0;
                match bench.worker.try_recv_many(bench.port, &mut batch) {
                    Ok(_) => {}
                    // The batch holds more than there are large buffers; it is emptied below.
                    Err(error) if error.kind() == PortErrorKind::NoBuffers => {}
                    Err(error) => {
                        assert_eq!(error.kind(), PortErrorKind::Truncated, "{error}");
                        truncations += 1;
                    }
                }
                for packet in batch.drain() {
                    let total = match packet[0] >> 4 {
                        4 => usize::from(u16::from_be_bytes([packet[2], packet[3]])),
                        _ => 40 + usize::from(u16::from_be_bytes([packet[4], packet[5]])),
                    };
                    assert_eq!(total, packet.len(), "cut without a word");
                }
            }
            let counters = bench.worker.counters(bench.port).unwrap();
            let netlink = Handle::new().unwrap();
            let kernel = netlink.stats(bench.device.index()).unwrap();
            assert_eq!(
                counters.received_packets + counters.truncated + counters.bad_headers,
                kernel.tx_packets,
                "{counters:?}"
            );
            assert_eq!(counters.bad_headers, 0);
            assert!(truncations <= counters.truncated);
            // Superpackets' buffers hold the longest packet that there is.
            assert_eq!(counters.truncated > 0, offloads.is_empty(), "{counters:?}");
        });
        bench.prove();
    }
}

struct End<'a>(&'a AtomicBool);

impl Drop for End<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}
