//! Superpackets through ports: real TCP and UDP between two namespaces, through a worker that passes, cuts and merges; on both backends.

mod common;
mod device;

use std::collections::hash_map::DefaultHasher;
use std::hash::Hasher;
use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::sync::mpsc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use common::{Trial, again, await_address, need_backend, need_receive_buffer, repeats, skip, trial};
use tun_driver::lab::{Namespace, sysctl};
use tun_driver::netlink::Handle;
use tun_driver::offload::{Link, Meta, VnetHdr, vnet};
use tun_driver::{
    Backend, Batch, Builder, Counters, Device, Endpoint, Engine, Event, Handler, Mode, MultiQueue, Offloads, PacketBuf,
    PortErrorKind, PortId, Superpackets, Wait, Waker, Worker, WorkerConfig,
};

fn main() {
    let mut trials: Vec<Trial> = Vec::new();
    for backend in [Backend::IoUring, Backend::Syscalls] {
        let mut add = |name: &str, work: fn(Backend)| {
            trials.push(trial(format!("{name}: {backend:?}"), move || {
                need_backend(backend);
                work(backend);
            }));
        };
        add("TCP through every combination of offloads", tcp_combinations);
        add("TCP over TAP", tcp_over_tap);
        add("frames with a VLAN tag are superpackets too", tagged_frames);
        add("a frame with two VLAN tags fits at every MTU", frames_with_two_tags);
        add("TCP at other MTUs", tcp_at_other_mtus);
        add("no change of a packet survives as verified", changed_after_the_verdict);
        add(
            "no change of a packet survives the kernel's own verdict",
            changed_after_the_kernels_verdict,
        );
        add(
            "an unfinished packet with another sum in its field is not merged",
            another_sum,
        );
        add(
            "a checksum inside the IP header is refused, received and sent",
            checksums_inside_the_header,
        );
        add("UDP superpackets are passed, cut and merged", udp_combinations);
        add("a superpacket that is split by hand arrives whole", split_by_hand);
        add("what does not fit stays a superpacket", split_bit_by_bit);
        add("segments are lent one after another", lent_segments);
        add("a superpacket goes out of a socket in pieces", into_a_socket);
        add("without a free buffer a superpacket is cut in its place", cut_in_place);
        add(
            "a refused superpacket goes in pieces, in its place",
            refused_by_the_kernel,
        );
        add(
            "a header that contradicts its packet is counted, and the port goes on",
            lying_headers,
        );
        add(
            "a kind that is refused at the start is cut from then on",
            refused_at_the_start,
        );
        add(
            "an IPv4 header that is wrong stays wrong in a superpacket",
            wrong_header,
        );
        add("an engine tells that superpackets are refused", told_by_an_engine);
        add("switched off, nothing is passed or merged", switched_off);
        add("a packet that no longer fits is refused", mangled);
        add("TCP behind extension headers is cut, since kernels lose it", extended);
        add("a superpacket that lost a segment is refused in the end", torn);
        add("a device that is down refuses no superpackets", down);
        add("short packets leave large buffers", short_packets);
        add("a packet received by copy has its checksum", received_by_copy);
        add("a hand-off carries superpackets", through_a_handoff);
        add("a device reopened without offloads carries bulk TCP whole", reopened);
    }
    trials.push(trial(
        "superpackets that a write refuses go in pieces, without loss",
        || {
            need_backend(Backend::Syscalls);
            refused_by_a_write();
        },
    ));
    trials.push(trial("a persistent device forgets its offloads", persistent));
    common::run(trials)
}

const LEFT: Ipv4Addr = Ipv4Addr::new(10, 9, 0, 1);
const RIGHT: Ipv4Addr = Ipv4Addr::new(10, 9, 0, 2);
const LEFT6: Ipv6Addr = Ipv6Addr::new(0xfd00, 9, 0, 0, 0, 0, 0, 1);
const RIGHT6: Ipv6Addr = Ipv6Addr::new(0xfd00, 9, 0, 0, 0, 0, 0, 2);

/// One worker that carries packets between a device in each of two namespaces.
struct Wire {
    ends: [Namespace; 2],
    waker: Waker,
    thread: Option<JoinHandle<[(Counters, Endpoint); 2]>>,
}

/// What the worker does with a batch between receiving and sending.
type Between = fn(&mut Batch, &mut Batch);

struct Setting {
    backend: Backend,
    mode: Mode,
    offloads: [Offloads; 2],
    mtu: u32,
    between: Option<Between>,
    superpackets: Superpackets,
    /// The devices were there before, with all offloads.
    reopened: bool,
}

impl Setting {
    fn new(backend: Backend, offloads: [Offloads; 2]) -> Self {
        Self {
            backend,
            mode: Mode::Tun,
            offloads,
            mtu: 1500,
            between: None,
            superpackets: Superpackets::default(),
            reopened: false,
        }
    }
}

fn config(backend: Backend) -> WorkerConfig {
    WorkerConfig {
        backend: Some(backend),
        wait: Wait::Block,
        ..WorkerConfig::default()
    }
}

impl Wire {
    fn new(setting: Setting) -> Self {
        let ends = [Namespace::new().unwrap(), Namespace::new().unwrap()];
        let open = |side: usize| -> MultiQueue {
            ends[side]
                .run(|| {
                    let (v4, v6) = [(LEFT, LEFT6), (RIGHT, RIGHT6)][side];
                    let mut device = Builder::new("wire", setting.mode)
                        .offloads(setting.offloads[side])
                        .mtu(setting.mtu)
                        .txqueuelen(5_000)
                        .address(v4, 24);
                    if setting.mode == Mode::Tap {
                        device = device.mac([2, 0, 0, 0, 0, side as u8 + 1]);
                    }
                    sysctl("net/ipv6/conf/default/accept_dad", 0).unwrap();
                    if setting.reopened {
                        let before = Builder::new("wire", setting.mode)
                            .offloads(Offloads::all())
                            .persist(true);
                        drop(before.open().unwrap());
                        device = device.attach_existing(true);
                    }
                    let device = device.address(v6, 64).up(true).open().unwrap();
                    await_address(v6.into());
                    device
                })
                .unwrap()
        };
        let queues = [open(0), open(1)].map(|device| device.into_queues().remove(0));
        let (tell, told) = mpsc::channel();
        let thread = thread::spawn(move || {
            let mut worker = Worker::new(&config(setting.backend)).unwrap();
            let ports = queues.map(|queue| worker.attach(queue).unwrap());
            for port in ports {
                worker.set_superpackets(port, setting.superpackets).unwrap();
            }
            tell.send(worker.waker()).unwrap();
            carry(&mut worker, ports, setting.between);
            ports.map(|port| {
                let detached = worker.detach(port).unwrap();
                (detached.counters, detached.endpoint)
            })
        });
        Self {
            ends,
            waker: told.recv().unwrap(),
            thread: Some(thread),
        }
    }

    /// Ends it, and holds its books against the kernel's.
    fn end(mut self) -> [Counters; 2] {
        // What is on its way arrives.
        thread::sleep(Duration::from_millis(100));
        self.waker.stop();
        // Nothing is read or written any more, and the devices are still there.
        let ended = self.thread.take().unwrap().join().unwrap();
        let kernel = [0, 1].map(|side: usize| {
            self.ends[side]
                .run(|| {
                    let netlink = Handle::new().unwrap();
                    netlink.stats(netlink.index_of("wire").unwrap()).unwrap()
                })
                .unwrap()
        });
        let counters = ended.map(|(counters, _)| counters);
        for (counters, kernel) in counters.iter().zip(kernel) {
            let writes = counters.sent_packets - counters.merged_packets + counters.merged_superpackets
                - counters.cut_superpackets
                + counters.cut_segments;
            // Those that were tried at attach are the device's, not the port's.
            assert!(
                (0..=3).contains(&(kernel.rx_packets - writes)),
                "{counters:?} {kernel:?}"
            );
            assert_eq!(counters.received_packets + counters.bad_headers, kernel.tx_packets);
            assert_eq!(
                (
                    counters.refused_packets,
                    counters.bad_headers,
                    counters.offloads_refused
                ),
                (0, 0, 0),
                "{counters:?}"
            );
        }
        counters
    }
}

impl Drop for Wire {
    fn drop(&mut self) {
        self.waker.stop();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn carry(worker: &mut Worker, ports: [PortId; 2], between: Option<Between>) {
    let (mut batch, mut whole) = (Batch::with_capacity(64), Batch::with_capacity(128));
    while !worker.wait(None).unwrap().stopped {
        while let Some(port) = worker.next_ready() {
            let _ = worker.try_recv_many(port, &mut batch);
            let to = ports[usize::from(port == ports[0])];
            match between {
                None => send_all(worker, to, &mut batch),
                Some(between) => {
                    while !batch.is_empty() {
                        between(&mut batch, &mut whole);
                        send_all(worker, to, &mut whole);
                    }
                }
            }
        }
    }
}

fn send_all(worker: &mut Worker, to: PortId, batch: &mut Batch) {
    let sent = worker.send_many(to, batch);
    assert_eq!(sent.refused, 0, "{sent:?}");
    assert!(batch.is_empty() || sent.stopped.is_some(), "{sent:?}");
    batch.clear();
}

/// Bytes that tell where they are wrong.
fn pattern(len: usize, seed: u64) -> Vec<u8> {
    let mut state = seed | 1;
    std::iter::repeat_with(|| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state as u8
    })
    .take(len)
    .collect()
}

fn hash(bytes: &[u8]) -> u64 {
    let mut hasher = DefaultHasher::new();
    hasher.write(bytes);
    hasher.finish()
}

/// Sends `len` bytes over TCP both ways at the same time; what arrives has to be what was sent.
fn transfer(wire: &Wire, to: IpAddr, len: usize) {
    // Less on a slow machine, but enough for superpackets to come.
    let len = len / common::slowness().min(3) as usize;
    let (tell, told) = mpsc::channel();
    thread::scope(|scope| {
        let server = scope.spawn(|| {
            wire.ends[1]
                .run(move || {
                    let listener = TcpListener::bind((to, 0)).unwrap();
                    tell.send(listener.local_addr().unwrap()).unwrap();
                    talk(listener.accept().unwrap().0, len, 2)
                })
                .unwrap()
        });
        let address = told.recv().unwrap();
        let client = wire.ends[0]
            .run(|| talk(TcpStream::connect(address).unwrap(), len, 1))
            .unwrap();
        assert_eq!(server.join().unwrap(), hash(&pattern(len, 1)), "left to right");
        assert_eq!(client, hash(&pattern(len, 2)), "right to left");
    });
}

fn talk(stream: TcpStream, len: usize, seed: u64) -> u64 {
    stream
        .set_read_timeout(Some(Duration::from_secs(20) * common::slowness()))
        .unwrap();
    let mut writer = stream.try_clone().unwrap();
    let sender = thread::spawn(move || writer.write_all(&pattern(len, seed)).unwrap());
    let mut received = vec![0; len];
    (&stream).read_exact(&mut received).unwrap();
    sender.join().unwrap();
    hash(&received)
}

fn tcp_combinations(backend: Backend) {
    let sets = [
        Offloads::none(),
        Offloads::CSUM,
        Offloads::TSO4,
        Offloads::all() - Offloads::USO,
        Offloads::all(),
    ];
    for left in sets {
        for right in sets {
            let wire = Wire::new(Setting::new(backend, [left, right]));
            transfer(&wire, RIGHT.into(), 2 << 20);
            transfer(&wire, RIGHT6.into(), 2 << 20);
            let [left_port, right_port] = wire.end();
            let whole = |set: Offloads| set.contains(Offloads::TSO4 | Offloads::TSO6);
            // What came out of the left device goes into the right one.
            if whole(left) && whole(right) {
                assert!(right_port.sent_superpackets > 10, "{left} {right} {right_port:?}");
                assert_eq!(right_port.cut_superpackets, 0, "{left} {right}");
                assert!(left_port.sent_superpackets > 10, "{left} {right} {left_port:?}");
            } else if whole(left) && !right.has_superpackets() {
                assert!(right_port.cut_superpackets > 10, "{left} {right} {right_port:?}");
                assert_eq!(right_port.sent_superpackets, 0);
            } else if !left.has_superpackets() && whole(right) {
                assert!(right_port.merged_packets > 100, "{left} {right} {right_port:?}");
            } else if left.is_empty() && right.is_empty() {
                assert_eq!(right_port.sent_superpackets + right_port.cut_superpackets, 0);
            }
        }
    }
}

fn tcp_over_tap(backend: Backend) {
    for offloads in [[Offloads::all(); 2], [Offloads::all(), Offloads::none()]] {
        let wire = Wire::new(Setting {
            mode: Mode::Tap,
            ..Setting::new(backend, offloads)
        });
        transfer(&wire, RIGHT.into(), 2 << 20);
        transfer(&wire, RIGHT6.into(), 2 << 20);
        let [left, right] = wire.end();
        if offloads[1].is_empty() {
            assert!(
                right.cut_superpackets > 10 && left.merged_packets > 100,
                "{left:?} {right:?}"
            );
        } else {
            assert!(
                right.sent_superpackets > 10 && left.sent_superpackets > 10,
                "{left:?} {right:?}"
            );
        }
    }
}

/// T19. Of 802.1ad with a tag of 802.1Q inside, each as long as the device's MTU allows.
fn frames_with_two_tags(backend: Backend) {
    let mut worker = Worker::new(&config(backend)).unwrap();
    // About the length of an ordinary buffer, byte by byte.
    for mtu in 1_820..=1_860_u32 {
        let device = Builder::new("qinq%d", Mode::Tap).mtu(mtu).up(true).open().unwrap();
        let handle = device.device().unwrap().clone();
        let port = worker.attach(device.into_queues().remove(0)).unwrap();
        // A VLAN device on a VLAN device hands its tags over beyond the MTU, as part of the link
        // header. Not every kernel has them; a packet socket may send what a higher MTU allows.
        handle.set_mtu(mtu + 8).unwrap();
        let tags = [0x88, 0xa8, 0, 9, 0x81, 0, 0, 7, 8, 0];
        let frame = [&[2; 12][..], &tags, &pattern(mtu as usize, mtu.into())].concat();
        send_to_device(handle.index(), 0x88a8, false, &frame);
        let mut batch = Batch::with_capacity(8);
        let deadline = Instant::now() + Duration::from_secs(5) * common::slowness();
        loop {
            assert!(Instant::now() < deadline, "MTU {mtu}");
            worker.recv_many(port, &mut batch).unwrap();
            batch.retain_mut(|packet| packet[12..].starts_with(&tags));
            if !batch.is_empty() {
                break;
            }
        }
        assert!(batch[0][..] == frame, "MTU {mtu}");
        assert_eq!(worker.counters(port).unwrap().truncated, 0);
        drop(worker.detach(port).unwrap());
    }
}

/// A whole datagram, from `from` to a port.
fn datagram(from: Ipv4Addr, to: Ipv4Addr, port: u16, payload: &[u8]) -> Vec<u8> {
    let mut packet = Vec::new();
    etherparse::PacketBuilder::ipv4(from.octets(), to.octets(), 64)
        .udp(9_000, port)
        .write(&mut packet, payload)
        .unwrap();
    packet
}

/// Sends four datagrams, the third of which was corrupted, and looks which ones arrive.
fn third_is_corrupt(worker: &mut Worker, port: PortId, receiver: &UdpSocket, batch: &mut Batch, what: &str) {
    let before = worker.counters(port).unwrap().merged_packets;
    assert_eq!(batch.len(), 4, "{what}");
    let sent = worker.send_many(port, batch);
    assert_eq!((sent.accepted, sent.refused, sent.stopped), (4, 0, None), "{what}");
    // The stack drops the third, for its checksum is still as wrong as it was made.
    for index in [0, 1, 3] {
        assert!(
            received(receiver) == vec![index; 500],
            "{what}: a corrupt datagram was delivered"
        );
    }
    // It only ended the run of the first two.
    assert_eq!(worker.counters(port).unwrap().merged_packets - before, 2, "{what}");
}

/// Ways to make the third packet another one than the one that was verified.
type Change = fn(&Worker, &Worker, PacketBuf) -> PacketBuf;

fn changed_after_the_verdict(backend: Backend) {
    fn verified(mut packet: PacketBuf) -> PacketBuf {
        packet.set_meta(Meta::Verified).unwrap();
        packet
    }
    fn corrupt(mut packet: PacketBuf) -> PacketBuf {
        packet[100] ^= 1;
        packet
    }
    // In each, `packet` is whole, and what comes back is corrupt and as long.
    let changes: [(&str, Change); 18] = [
        ("written", |_, _, packet| corrupt(verified(packet))),
        ("written by as_mut", |_, _, packet| {
            let mut packet = verified(packet);
            packet.as_mut()[100] ^= 1;
            packet
        }),
        ("behind an outer header", |_, _, packet| {
            let mut packet = corrupt(packet);
            packet.prepend(&[7; 20]).unwrap();
            let mut packet = verified(packet);
            packet.trim_front(20);
            packet
        }),
        ("before a trailer", |_, _, packet| {
            let mut packet = corrupt(packet);
            packet.append(&[7; 20]).unwrap();
            let mut packet = verified(packet);
            packet.truncate(528);
            packet
        }),
        ("split off a trailer", |_, _, packet| {
            let mut packet = corrupt(packet);
            packet.append(&[7; 20]).unwrap();
            verified(packet).split_to(528)
        }),
        ("split off an outer header", |_, _, packet| {
            let mut packet = corrupt(packet);
            packet.prepend(&[7; 20]).unwrap();
            let mut packet = verified(packet);
            drop(packet.split_to(20));
            packet
        }),
        ("prepended", |_, _, packet| {
            let mut packet = corrupt(packet);
            let first = packet[..4].to_vec();
            packet.trim_front(4);
            let mut packet = verified(packet);
            packet.prepend(&first).unwrap();
            packet
        }),
        ("appended", |_, _, packet| {
            let mut packet = corrupt(packet);
            let last = packet[524..].to_vec();
            packet.truncate(524);
            let mut packet = verified(packet);
            packet.append(&last).unwrap();
            packet
        }),
        ("grown in front", |_, _, packet| {
            let mut packet = packet;
            let mut first = packet[..101].to_vec();
            first[100] ^= 1;
            packet.trim_front(101);
            let mut packet = verified(packet);
            packet.grow_front(101).unwrap().copy_from_slice(&first);
            packet
        }),
        ("grown behind", |_, _, packet| {
            let mut packet = packet;
            packet.truncate(527);
            let mut packet = verified(packet);
            packet.grow_back(1).unwrap()[0] = 99;
            packet
        }),
        ("written as it travels", |worker, _, packet| {
            let mut remote = verified(packet).into_remote();
            remote[100] ^= 1;
            worker.import(remote).unwrap()
        }),
        ("written as it travels, on another thread", |worker, _, packet| {
            let mut remote = verified(packet).into_remote();
            let remote = thread::spawn(move || {
                remote[100] ^= 1;
                remote
            });
            worker.import(remote.join().unwrap()).unwrap()
        }),
        ("written and come to another worker", |_, other, packet| {
            let mut remote = verified(packet).into_remote();
            remote[100] ^= 1;
            other.import(remote).unwrap()
        }),
        ("written after it came to another worker", |_, other, packet| {
            corrupt(other.import(verified(packet).into_remote()).unwrap())
        }),
        ("cut and come to another worker", |_, other, packet| {
            let mut packet = corrupt(packet);
            packet.prepend(&[7; 20]).unwrap();
            let mut packet = verified(packet);
            packet.trim_front(20);
            other.import(packet.into_remote()).unwrap()
        }),
        ("written in a batch", |_, _, packet| {
            let mut batch = Batch::with_capacity(1);
            batch.push(verified(packet)).unwrap();
            batch.iter_mut().for_each(|packet| packet[100] ^= 1);
            batch.pop().unwrap()
        }),
        ("written by retain_mut", |_, _, packet| {
            let mut batch = Batch::with_capacity(1);
            batch.push(verified(packet)).unwrap();
            batch.retain_mut(|packet| {
                packet[100] ^= 1;
                true
            });
            batch.pop().unwrap()
        }),
        ("lent as a segment", |_, _, packet| {
            let mut packet = verified(packet);
            packet.segments().unwrap().next().unwrap()[100] ^= 1;
            packet
        }),
    ];
    let (mut worker, port, _device) = with_device(backend, Offloads::all());
    if !worker.port_info(port).unwrap().passes.contains(Offloads::USO) {
        skip("this kernel takes no UDP superpackets");
    }
    let other = Worker::new(&config(backend)).unwrap();
    let receiver = receiver();
    let to = receiver.local_addr().unwrap().port();
    let mut batch = Batch::with_capacity(4);
    let fill = |worker: &Worker, batch: &mut Batch, change: Change| {
        for index in 0..4 {
            let bytes = datagram(RIGHT, LEFT, to, &[index; 500]);
            let packet = worker.packet_from(&bytes).unwrap();
            let packet = if index == 2 {
                change(worker, &other, packet)
            } else {
                verified(packet)
            };
            assert_eq!(packet.len(), 528);
            batch.push(packet).unwrap();
        }
    };
    // Unchanged, the verdict is believed.
    fill(&worker, &mut batch, |worker, _, packet| {
        worker.import(verified(packet).into_remote()).unwrap()
    });
    assert!(batch.iter().all(|packet| packet.meta() == Ok(Meta::Verified)));
    assert_eq!(worker.send_many(port, &mut batch).accepted, 4);
    (0..4).for_each(|index| assert_eq!(received(&receiver), [index; 500]));
    assert_eq!(worker.counters(port).unwrap().merged_packets, 4);
    for (what, change) in changes {
        fill(&worker, &mut batch, change);
        assert_eq!(batch[2].meta(), Ok(Meta::Plain), "{what}");
        third_is_corrupt(&mut worker, port, &receiver, &mut batch, what);
    }
    // By way of a hand-off: refilled, and given through.
    let (handed, mut handoff) = worker.open_handoff(8).unwrap();
    fill(&worker, &mut batch, |_, _, packet| corrupt(verified(packet)));
    assert_eq!(handoff.send_many(&mut batch).accepted, 4);
    assert_eq!(worker.try_recv_many(handed, &mut batch), Ok(4));
    assert_eq!(
        (batch[1].meta(), batch[2].meta()),
        (Ok(Meta::Verified), Ok(Meta::Plain))
    );
    third_is_corrupt(&mut worker, port, &receiver, &mut batch, "handed over");
    fill(&worker, &mut batch, |_, _, packet| packet);
    for (index, packet) in batch.drain().enumerate() {
        let mut remote = verified(packet).into_remote();
        if index == 2 {
            remote[100] ^= 1;
        }
        handoff.send_remote(remote).unwrap();
    }
    assert_eq!(worker.try_recv_many(handed, &mut batch), Ok(4));
    assert_eq!(
        (batch[1].meta(), batch[2].meta()),
        (Ok(Meta::Verified), Ok(Meta::Plain))
    );
    third_is_corrupt(&mut worker, port, &receiver, &mut batch, "given through");
}

/// The same with a verdict of the kernel's: GRO verifies what a NAPI device brings, and it is
/// forwarded to a device with offloads (VIRTIO_NET_HDR_F_DATA_VALID).
fn changed_after_the_kernels_verdict(backend: Backend) {
    const SOURCE: Ipv4Addr = Ipv4Addr::new(198, 18, 1, 2);
    type Change = fn(&Worker, PacketBuf) -> PacketBuf;
    let changes: [(&str, Change); 3] = [
        ("written", |_, mut packet| {
            packet[100] ^= 1;
            packet
        }),
        ("written as it travels", |worker, packet| {
            let mut remote = packet.into_remote();
            remote[100] ^= 1;
            worker.import(remote).unwrap()
        }),
        ("another end", |_, mut packet| {
            packet.truncate(527);
            packet.append(&[99]).unwrap();
            packet
        }),
    ];
    sysctl("net/ipv4/ip_forward", 1).unwrap();
    let (mut worker, port, _device) = with_device(backend, Offloads::all());
    let far = Namespace::new().unwrap();
    let open = || {
        let device = Builder::new("far", Mode::Tun).offloads(Offloads::all());
        device.address(RIGHT, 24).up(true).open().unwrap().into_queues()
    };
    let out = worker.attach(far.run(open).unwrap().remove(0)).unwrap();
    let receiver = far
        .run(|| {
            let socket = UdpSocket::bind((RIGHT, 0)).unwrap();
            socket
                .set_read_timeout(Some(Duration::from_secs(5) * common::slowness()))
                .unwrap();
            // The source lies behind another device.
            let netlink = Handle::new().unwrap();
            let index = netlink.index_of("far").unwrap();
            netlink.add_route(SOURCE.into(), 32, None, index).unwrap();
            socket
        })
        .unwrap();
    if !worker.port_info(out).unwrap().passes.contains(Offloads::USO) {
        skip("this kernel takes no UDP superpackets");
    }
    let to = receiver.local_addr().unwrap().port();
    let napi = device::raw_tun("napi0", libc::IFF_TUN | libc::IFF_NO_PI | libc::IFF_NAPI).unwrap();
    let netlink = Handle::new().unwrap();
    let index = netlink.index_of("napi0").unwrap();
    netlink.set_up(index, true).unwrap();
    netlink.add_route(SOURCE.into(), 32, None, index).unwrap();
    let mut batch = Batch::with_capacity(4);
    let mut one = Batch::with_capacity(8);
    for (what, change) in changes {
        for index in 0..4_u8 {
            // One by one: GRO is not to merge them itself.
            device::write(&napi, &datagram(SOURCE, RIGHT, to, &[index; 500])).unwrap();
            let deadline = Instant::now() + Duration::from_secs(5) * common::slowness();
            while one.is_empty() {
                assert!(Instant::now() < deadline, "{what}: nothing is forwarded");
                worker.recv_many(port, &mut one).unwrap();
                one.retain_mut(|packet| packet.len() == 528 && packet.ends_with(&[index; 500]));
            }
            let packet = one.pop().unwrap();
            if packet.meta() != Ok(Meta::Verified) {
                skip(format!("this kernel says {:?} of what GRO verified", packet.meta()));
            }
            let packet = if index == 2 { change(&worker, packet) } else { packet };
            batch.push(packet).unwrap();
        }
        third_is_corrupt(&mut worker, out, &receiver, &mut batch, what);
    }
}

/// Four unfinished datagrams. The field of the third holds the sum for another address, as after a
/// translation that forgot it.
fn another_sum(backend: Backend) {
    let (mut worker, port, _device) = with_device(backend, Offloads::all());
    if !worker.port_info(port).unwrap().passes.contains(Offloads::USO) {
        skip("this kernel takes no UDP superpackets");
    }
    let receiver = receiver();
    let to = receiver.local_addr().unwrap().port();
    let mut batch = Batch::with_capacity(4);
    for index in 0..4 {
        let (_, bytes) = udp_superpacket(&[index; 500], 500, to);
        let mut packet = worker.packet_from(&bytes).unwrap();
        packet.set_meta(Meta::Unfinished { start: 20, field: 26 }).unwrap();
        if index == 2 {
            let pseudo = tun_driver::offload::checksum::pseudo_header(&[10, 9, 0, 3], &bytes[16..20], 17, 508);
            packet[26..28].copy_from_slice(&pseudo.seed());
        }
        assert!(matches!(packet.meta(), Ok(Meta::Unfinished { .. })));
        batch.push(packet).unwrap();
    }
    assert_eq!(worker.send_many(port, &mut batch).accepted, 4);
    // It went alone, with what its field held. The local stack takes an unfinished packet without
    // a look; sent on, it gets the wrong checksum that it deserves.
    assert_eq!(worker.counters(port).unwrap().merged_packets, 2);
    (0..4).for_each(|index| assert_eq!(received(&receiver), [index; 500]));
}

/// A checksum that would be written over an address.
fn checksums_inside_the_header(backend: Backend) {
    let (mut worker, port, device) = with_device(backend, Offloads::all());
    let v6 = udp_superpacket_v6(&[1; 100], 100, 0).1;
    let mut v4 = vec![0x46, 0, 0, 132, 0, 1, 0x40, 0, 64, 17, 0, 0];
    v4.extend(RIGHT.octets());
    v4.extend(LEFT.octets());
    v4.extend([1, 1, 1, 0]);
    v4.extend([0, 9, 0, 9, 0, 108, 0, 0]);
    v4.extend([1; 100]);
    // The kernel takes what lies behind the shortest IP header that there is.
    let lies = [(0x86dd, &v6, 24, 6), (0x0800, &v4, 20, 2)];
    let mut batch = Batch::with_capacity(8);
    for (count, (protocol, packet, start, offset)) in (1..).zip(lies) {
        let mut claim = header(0, 0, start, offset).to_bytes().to_vec();
        claim.extend(packet);
        send_to_device(device.index(), protocol, true, &claim);
        let deadline = Instant::now() + Duration::from_secs(5) * common::slowness();
        loop {
            assert!(Instant::now() < deadline, "{protocol:#x}");
            match worker.recv_many(port, &mut batch) {
                Err(error) if error.kind() == PortErrorKind::BadPacket => break,
                Err(error) => panic!("{error}"),
                // Other packets of the stack.
                Ok(_) => assert!(batch.iter().all(|packet| !packet.ends_with(&[1; 100]))),
            }
            batch.clear();
        }
        assert_eq!(worker.counters(port).unwrap().bad_headers, count);
    }
    // The same to send, and to a device without offloads, where the library writes it.
    let plain = Builder::new("plain0", Mode::Tun).up(true).open().unwrap();
    let plain = worker.attach(plain.into_queues().remove(0)).unwrap();
    for port in [port, plain] {
        let before = worker.counters(port).unwrap().refused.count(libc::EINVAL);
        for (packet, start, field) in [(&v6, 24, 30), (&v6, 38, 40), (&v4, 12, 16), (&v4, 20, 22), (&v4, 0, 10)] {
            let mut packet = worker.packet_from(packet).unwrap();
            packet.set_meta(Meta::Unfinished { start, field }).unwrap();
            batch.push(packet).unwrap();
        }
        let mut good = worker.packet_from(&v4).unwrap();
        good.set_meta(Meta::Unfinished { start: 24, field: 30 }).unwrap();
        batch.push(good).unwrap();
        let sent = worker.send_many(port, &mut batch);
        assert_eq!((sent.accepted, sent.refused, sent.stopped), (1, 5, None));
        assert_eq!(sent.refusal.map(|error| error.kind()), Some(PortErrorKind::BadPacket));
        assert_eq!(worker.counters(port).unwrap().refused.count(libc::EINVAL) - before, 5);
    }
}

fn tcp_at_other_mtus(backend: Backend) {
    for mtu in [1280, 4000, 9000] {
        for offloads in [
            [Offloads::all(); 2],
            [Offloads::all(), Offloads::none()],
            [Offloads::none(), Offloads::all()],
        ] {
            let wire = Wire::new(Setting {
                mtu,
                ..Setting::new(backend, offloads)
            });
            transfer(&wire, RIGHT.into(), 2 << 20);
            transfer(&wire, RIGHT6.into(), 2 << 20);
            wire.end();
        }
    }
}

/// A packet socket sends these bytes to a device, with a driver's header in front if `vnet`.
fn send_to_device(index: u32, protocol: u16, vnet: bool, bytes: &[u8]) {
    // SAFETY: the call takes no pointers; the descriptor is new and ours.
    let socket = unsafe {
        let fd = libc::socket(libc::AF_PACKET, libc::SOCK_RAW, 0);
        assert!(fd >= 0, "{}", std::io::Error::last_os_error());
        OwnedFd::from_raw_fd(fd)
    };
    if vnet {
        option(&socket, libc::SOL_PACKET, libc::PACKET_VNET_HDR, 1);
    }
    // SAFETY: all zero is a value of it.
    let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    address.sll_family = libc::AF_PACKET as u16;
    address.sll_protocol = protocol.to_be();
    address.sll_ifindex = index as i32;
    // SAFETY: the bytes and the address live through the call.
    let sent = unsafe {
        libc::sendto(
            socket.as_raw_fd(),
            bytes.as_ptr().cast(),
            bytes.len(),
            0,
            (&raw const address).cast(),
            size_of_val(&address) as libc::socklen_t,
        )
    };
    assert_eq!(sent, bytes.len() as isize, "{}", std::io::Error::last_os_error());
}

/// A packet socket sends a tagged superpacket to the device; it comes to the worker as one, and goes out in pieces that have the tag.
fn tagged_frames(backend: Backend) {
    let device = Builder::new("tagged", Mode::Tap)
        .offloads(Offloads::all())
        .up(true)
        .open()
        .unwrap();
    let index = device.device().unwrap().index();
    let mut worker = Worker::new(&config(backend)).unwrap();
    let port = worker.attach(device.into_queues().remove(0)).unwrap();
    let payload = pattern(20_000, 11);
    let (_, ip) = tcp_superpacket(&payload, 1_000);
    let tagged = [&[2; 12][..], &[0x81, 0, 0, 7, 8, 0], &ip].concat();
    let mut frame = header(1, 1_000, 18 + 20, 16).to_bytes().to_vec();
    // The packet socket wants to know how long the headers are.
    frame[2..4].copy_from_slice(&58_u16.to_ne_bytes());
    frame.extend(&tagged);
    // The socket leaves the pseudo-header's sum to the sender.
    let pseudo = tun_driver::offload::checksum::pseudo_header(&ip[12..16], &ip[16..20], 6, ip.len() as u32 - 20);
    let field = 10 + 18 + 20 + 16;
    frame[field..field + 2].copy_from_slice(&pseudo.seed());
    send_to_device(index, 0x8100, true, &frame);
    let (mut batch, mut whole) = (Batch::with_capacity(8), Batch::with_capacity(64));
    let deadline = Instant::now() + Duration::from_secs(5) * common::slowness();
    loop {
        assert!(Instant::now() < deadline);
        worker.recv_many(port, &mut batch).unwrap();
        batch.retain_mut(|packet| packet[12..].starts_with(&[0x81, 0, 0, 7]));
        if !batch.is_empty() {
            break;
        }
    }
    assert_eq!(batch.len(), 1);
    let Ok(Meta::Gso(gso)) = batch[0].meta() else {
        panic!("{batch:?}")
    };
    assert_eq!((gso.size, gso.headers.network, gso.headers.transport), (1_000, 18, 38));
    assert_eq!(batch.split_into(&mut whole), 20);
    let mut got = Vec::new();
    for segment in &whole {
        assert_eq!(segment[..18], tagged[..18]);
        let sliced = etherparse::SlicedPacket::from_ethernet(segment).unwrap();
        let (Some(etherparse::NetSlice::Ipv4(ip)), Some(etherparse::TransportSlice::Tcp(tcp))) =
            (sliced.net, sliced.transport)
        else {
            panic!("{segment:?}")
        };
        let checksum = tcp
            .to_header()
            .calc_checksum_ipv4(&ip.header().to_header(), tcp.payload())
            .unwrap();
        assert_eq!(tcp.checksum(), checksum);
        got.extend_from_slice(tcp.payload());
    }
    assert_eq!(got, payload);
}

const UDP: libc::c_int = 17;
/// So that a burst fits into it.
const RECEIVE_BUFFER: libc::c_int = 8 << 20;
const UDP_SEGMENT: libc::c_int = 103;
const UDP_GRO: libc::c_int = 104;

fn option(socket: &impl AsRawFd, level: libc::c_int, option: libc::c_int, value: libc::c_int) {
    // SAFETY: the option takes an int.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            level,
            option,
            (&raw const value).cast(),
            size_of::<libc::c_int>() as libc::socklen_t,
        )
    };
    assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
}

/// Sends numbered datagrams of 1,000 bytes in groups of 40 and one short one; they arrive as they were, in order, to sockets with and without GRO.
fn datagrams(wire: &Wire, to: IpAddr, gro: bool) {
    const GROUPS: usize = 50;
    need_receive_buffer(RECEIVE_BUFFER as u64);
    let (tell, told) = mpsc::channel();
    thread::scope(|scope| {
        let receiver = scope.spawn(|| {
            wire.ends[1]
                .run(move || {
                    let socket = UdpSocket::bind((to, 0)).unwrap();
                    if gro {
                        option(&socket, UDP, UDP_GRO, 1);
                    }
                    option(&socket, libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, RECEIVE_BUFFER);
                    socket
                        .set_read_timeout(Some(Duration::from_secs(10) * common::slowness()))
                        .unwrap();
                    tell.send(socket.local_addr().unwrap()).unwrap();
                    let (mut buffer, mut bytes) = (vec![0; 70_000], Vec::new());
                    while bytes.len() < GROUPS * (40_000 + 77) {
                        let len = again(|| socket.recv(&mut buffer)).unwrap();
                        bytes.extend_from_slice(&buffer[..len]);
                    }
                    bytes
                })
                .unwrap()
        });
        let address: SocketAddr = told.recv().unwrap();
        wire.ends[0]
            .run(|| {
                let socket =
                    UdpSocket::bind((if to.is_ipv4() { IpAddr::from(LEFT) } else { LEFT6.into() }, 0)).unwrap();
                option(&socket, UDP, UDP_SEGMENT, 1_000);
                let mut whole = true;
                for group in 0..GROUPS {
                    let bytes = pattern(40_077, group as u64 + 1);
                    if whole {
                        match socket.send_to(&bytes, address) {
                            // Before Linux 6.11 the device has to finish checksums for it.
                            Err(error) if error.raw_os_error() == Some(libc::EIO) && common::kernel() < (6, 11) => {
                                option(&socket, UDP, UDP_SEGMENT, 0);
                                whole = false;
                            }
                            result => assert_eq!(result.unwrap(), bytes.len()),
                        }
                    }
                    if !whole {
                        for datagram in bytes.chunks(1_000) {
                            assert_eq!(socket.send_to(datagram, address).unwrap(), datagram.len());
                        }
                    }
                    thread::sleep(Duration::from_millis(1));
                }
            })
            .unwrap();
        let received = receiver.join().unwrap();
        let expected: Vec<u8> = (0..GROUPS)
            .flat_map(|group| pattern(40_077, group as u64 + 1))
            .collect();
        assert_eq!(received.len(), expected.len());
        assert_eq!(hash(&received), hash(&expected));
    });
}

fn udp_combinations(backend: Backend) {
    for offloads in [
        [Offloads::all(); 2],
        [Offloads::all(), Offloads::none()],
        [Offloads::none(), Offloads::all()],
        [Offloads::CSUM, Offloads::all()],
        [Offloads::all(), Offloads::TSO4],
    ] {
        let wire = Wire::new(Setting::new(backend, offloads));
        for to in [IpAddr::from(RIGHT), RIGHT6.into()] {
            datagrams(&wire, to, false);
            datagrams(&wire, to, true);
        }
        let [_, right] = wire.end();
        if common::kernel() >= (6, 2) {
            match offloads.map(|set| set.contains(Offloads::USO)) {
                [true, true] => assert!(
                    right.sent_superpackets >= 100 && right.cut_superpackets == 0,
                    "{right:?}"
                ),
                [true, false] => assert!(right.cut_superpackets >= 100, "{right:?}"),
                [false, true] => assert!(right.merged_packets >= 1_000, "{right:?}"),
                _ => {}
            }
        }
    }
}

fn split_by_hand(backend: Backend) {
    let wire = Wire::new(Setting {
        between: Some(|batch, whole| {
            // Passed on, they would keep the checksum of the IPv4 header that they come with.
            for packet in batch
                .iter()
                .filter(|packet| packet.is_superpacket() && packet[0] >> 4 == 4)
            {
                assert!(
                    tun_driver::offload::checksum::sum(&packet[..20]).is_whole(),
                    "the kernel left the header's checksum out"
                );
            }
            batch.split_into(whole);
            assert!(
                whole
                    .iter()
                    .all(|packet| packet.len() <= 1500 && packet.meta() == Ok(Meta::Plain)
                        || packet.meta() == Ok(Meta::Verified))
            );
        }),
        ..Setting::new(backend, [Offloads::all(); 2])
    });
    transfer(&wire, RIGHT.into(), 4 << 20);
    transfer(&wire, RIGHT6.into(), 4 << 20);
    let [_, right] = wire.end();
    assert!(right.merged_packets > 1_000, "cut, and merged again: {right:?}");
}

/// A superpacket of TCP over IPv4, from `LEFT` to `RIGHT`, with a driver's header that says so.
fn tcp_superpacket(payload: &[u8], size: u16) -> (VnetHdr, Vec<u8>) {
    let total = 40 + payload.len();
    let mut packet = vec![0x45, 0, (total >> 8) as u8, total as u8, 0, 1, 0x40, 0, 64, 6, 0, 0];
    packet.extend(LEFT.octets());
    packet.extend(RIGHT.octets());
    packet.extend([0x9c, 0x40, 0, 80, 0, 0, 0, 1, 0, 0, 0, 1, 0x50, 0x10, 2, 0, 0, 0, 0, 0]);
    packet.extend(payload);
    let checksum = tun_driver::offload::checksum::sum(&packet[..20]).checksum();
    packet[10..12].copy_from_slice(&checksum);
    (header(1, size, 20, 16), packet)
}

/// The same of UDP, to a port.
fn udp_superpacket(payload: &[u8], size: u16, port: u16) -> (VnetHdr, Vec<u8>) {
    let total = 28 + payload.len();
    let mut packet = vec![0x45, 0, (total >> 8) as u8, total as u8, 0, 1, 0x40, 0, 64, 17, 0, 0];
    packet.extend(RIGHT.octets());
    packet.extend(LEFT.octets());
    packet.extend(9_000_u16.to_be_bytes());
    packet.extend(port.to_be_bytes());
    packet.extend(((total - 20) as u16).to_be_bytes());
    packet.extend([0, 0]);
    packet.extend(payload);
    let checksum = tun_driver::offload::checksum::sum(&packet[..20]).checksum();
    packet[10..12].copy_from_slice(&checksum);
    let pseudo = tun_driver::offload::checksum::pseudo_header(&packet[12..16], &packet[16..20], 17, total as u32 - 20);
    packet[26..28].copy_from_slice(&pseudo.seed());
    (header(5, size, 20, 6), packet)
}

/// The same over IPv6, behind an extension header. It goes to LEFT6.
fn tcp_superpacket_v6(payload: &[u8], size: u16) -> (VnetHdr, Vec<u8>) {
    let mut packet = vec![0x60, 0, 0, 0];
    packet.extend(((8 + 20 + payload.len()) as u16).to_be_bytes());
    packet.extend([60, 64]);
    packet.extend(RIGHT6.octets());
    packet.extend(LEFT6.octets());
    packet.extend([6, 0, 1, 4, 0, 0, 0, 0]);
    packet.extend([0x9c, 0x40, 0, 80, 0, 0, 0, 1, 0, 0, 0, 1, 0x50, 0x10, 2, 0, 0, 0, 0, 0]);
    packet.extend(payload);
    (header(4, size, 48, 16), packet)
}

/// The same over IPv6, behind so many extension headers of 128 bytes.
fn udp_superpacket_v6(payload: &[u8], size: u16, extensions: usize) -> (VnetHdr, Vec<u8>) {
    let transport = 40 + extensions * 128;
    let mut packet = vec![0x60, 0, 0, 0];
    packet.extend(((transport - 40 + 8 + payload.len()) as u16).to_be_bytes());
    packet.extend([60, 64]);
    packet.extend(RIGHT6.octets());
    packet.extend(LEFT6.octets());
    for left in (0..extensions).rev() {
        packet.extend([if left > 0 { 60 } else { 17 }, 15]);
        packet.extend([0; 126]);
    }
    packet.extend([0, 9, 0, 9]);
    packet.extend(((8 + payload.len()) as u16).to_be_bytes());
    packet.extend([0, 0]);
    packet.extend(payload);
    (header(5, size, transport as u16, 6), packet)
}

fn header(kind: u8, size: u16, start: u16, offset: u16) -> VnetHdr {
    let mut bytes = [1, kind, 0, 0, 0, 0, 0, 0, 0, 0];
    bytes[4..6].copy_from_slice(&size.to_ne_bytes());
    bytes[6..8].copy_from_slice(&start.to_ne_bytes());
    bytes[8..10].copy_from_slice(&offset.to_ne_bytes());
    VnetHdr::from_bytes(bytes)
}

/// A packet of a worker that is a superpacket.
fn superpacket(worker: &Worker, (header, bytes): &(VnetHdr, Vec<u8>)) -> PacketBuf {
    let mut packet = worker.packet_from(bytes).expect("a large buffer");
    packet.set_meta(header.check(bytes, Link::None).unwrap()).unwrap();
    packet
}

/// A worker with a device here.
fn with_device(backend: Backend, offloads: Offloads) -> (Worker, PortId, Device) {
    let device = Builder::new("super%d", Mode::Tun)
        .offloads(offloads)
        .address(LEFT, 24)
        .up(true)
        .open()
        .unwrap();
    let handle = device.device().unwrap().clone();
    let mut worker = Worker::new(&WorkerConfig {
        large_buffers: 32,
        ..config(backend)
    })
    .unwrap();
    let port = worker.attach(device.into_queues().remove(0)).unwrap();
    (worker, port, handle)
}

fn split_bit_by_bit(backend: Backend) {
    let worker = Worker::new(&WorkerConfig {
        large_buffers: 4,
        ..config(backend)
    })
    .unwrap();
    let payload = pattern(10_000, 3);
    let mut packet = superpacket(&worker, &tcp_superpacket(&payload, 1_000));
    // Before the IP header, and so in front of each segment.
    packet.prepend(b"outer").unwrap();
    let mut got = Vec::new();
    for (room, left) in [(3, 7), (1, 6), (4, 2), (5, 0)] {
        let mut batch = Batch::with_capacity(room);
        let count = packet.split_into(&mut batch).unwrap();
        assert_eq!((count, batch.len()), (room.min(10 - got.len() / 1_000), batch.len()));
        for segment in &batch {
            assert!(segment.starts_with(b"outer") && segment.len() == 1_045 && segment.headroom() >= 64);
            let sequence = u32::from_be_bytes(segment[29..33].try_into().unwrap());
            assert_eq!(sequence as usize, 1 + got.len());
            got.extend_from_slice(&segment[45..]);
        }
        batch.drain().for_each(drop);
        assert_eq!(packet.is_superpacket(), left > 0);
        if left > 0 {
            let Ok(Meta::Gso(gso)) = packet.meta() else {
                panic!("{packet:?}")
            };
            assert_eq!(gso.headers.end - gso.headers.payload, left * 1_000);
        }
    }
    assert_eq!(got, payload);
    assert!(packet.is_empty());
    drop(packet);
    let (free, all) = worker.buffers();
    assert_eq!(free, all);
}

fn lent_segments(backend: Backend) {
    let worker = Worker::new(&WorkerConfig {
        large_buffers: 4,
        ..config(backend)
    })
    .unwrap();
    // More than 128.
    let payload = pattern(3_000, 5);
    let mut packet = superpacket(&worker, &tcp_superpacket(&payload, 10));
    let mut segments = packet.segments().unwrap();
    assert_eq!(segments.remaining(), 300);
    let mut got = Vec::new();
    while let Some(segment) = segments.next() {
        got.extend_from_slice(&segment[40..]);
    }
    assert_eq!(got, payload);
    let mut plain = worker.packet_from(b"plain").unwrap();
    let mut segments = plain.segments().unwrap();
    assert_eq!(segments.next().map(|segment| segment.to_vec()), Some(b"plain".to_vec()));
    assert!(segments.next().is_none());
}

fn into_a_socket(backend: Backend) {
    let mut worker = Worker::new(&WorkerConfig {
        large_buffers: 4,
        ..config(backend)
    })
    .unwrap();
    Handle::new().unwrap().set_up(1, true).unwrap();
    let receiver = UdpSocket::bind("127.0.0.1:0").unwrap();
    receiver
        .set_read_timeout(Some(Duration::from_secs(5) * common::slowness()))
        .unwrap();
    let sender = UdpSocket::bind("127.0.0.1:0").unwrap();
    sender.connect(receiver.local_addr().unwrap()).unwrap();
    let port = worker.attach(sender).unwrap();
    let payload = pattern(60_000, 9);
    let mut batch = Batch::with_capacity(2);
    let mut packet = superpacket(&worker, &tcp_superpacket(&payload, 900));
    packet.prepend(b"tunnel").unwrap();
    batch.push(packet).unwrap();
    batch.push(worker.packet_from(b"behind").unwrap()).unwrap();
    let mut got = Vec::new();
    let sent = worker.send_many(port, &mut batch);
    assert_eq!((sent.accepted, sent.refused, sent.stopped), (2, 0, None));
    let mut buffer = [0; 2_000];
    while got.len() < payload.len() {
        let len = again(|| receiver.recv(&mut buffer)).unwrap();
        assert!(buffer.starts_with(b"tunnel") && len <= 946);
        assert_eq!(u16::from_be_bytes([buffer[8], buffer[9]]) as usize, len - 6);
        got.extend_from_slice(&buffer[46..len]);
    }
    assert_eq!(got, payload);
    let len = again(|| receiver.recv(&mut buffer)).unwrap();
    assert_eq!(buffer[..len], *b"behind");
    let counters = worker.counters(port).unwrap();
    assert_eq!(
        (counters.sent_packets, counters.cut_superpackets, counters.cut_segments),
        (2, 1, 67)
    );
}

fn receiver() -> UdpSocket {
    need_receive_buffer(RECEIVE_BUFFER as u64);
    let receiver = UdpSocket::bind((LEFT, 0)).unwrap();
    option(&receiver, libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, RECEIVE_BUFFER);
    receiver
        .set_read_timeout(Some(Duration::from_secs(5) * common::slowness()))
        .unwrap();
    receiver
}

fn received(receiver: &UdpSocket) -> Vec<u8> {
    let mut buffer = [0; 70_000];
    let len = again(|| receiver.recv(&mut buffer)).unwrap();
    buffer[..len].to_vec()
}

fn cut_in_place(backend: Backend) {
    for offloads in [Offloads::none(), Offloads::CSUM, Offloads::all()] {
        let (mut worker, port, _device) = with_device(backend, offloads);
        // None is passed on before Linux 6.2.
        let passes = worker.port_info(port).unwrap().passes.contains(Offloads::USO);
        let cut = if passes { 0 } else { 20 };
        let receiver = receiver();
        let payload = pattern(20_000, 7);
        let mut batch = Batch::with_capacity(1);
        let bytes = udp_superpacket(&payload, 1_000, receiver.local_addr().unwrap().port());
        batch.push(superpacket(&worker, &bytes)).unwrap();
        let held: Vec<_> = std::iter::from_fn(|| worker.packet(1)).collect();
        assert!(worker.packet(1).is_none());
        let sent = worker.send_many(port, &mut batch);
        assert_eq!((sent.accepted, sent.refused, sent.stopped), (1, 0, None), "{offloads}");
        for piece in payload.chunks(1_000) {
            assert_eq!(received(&receiver), piece, "{offloads}");
        }
        assert_eq!(worker.counters(port).unwrap().cut_segments, cut, "{offloads}");
        drop(held);
    }
}

/// From now on this thread's write(2) of so many bytes fails.
fn refuse_writes(len: usize, errno: i32) {
    let step = |code: u32, jt, jf, k| libc::sock_filter {
        code: code as u16,
        jt,
        jf,
        k,
    };
    let equal = libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K;
    let load = libc::BPF_LD | libc::BPF_W | libc::BPF_ABS;
    let mut filter = [
        step(load, 0, 0, 0), // the system call's number
        step(equal, 0, 3, libc::SYS_write as u32),
        step(load, 0, 0, 32), // the lower half of its third argument
        step(equal, 0, 1, len as u32),
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
    // SAFETY: prctl reads the program, which lives through the call. Both settings are of this
    // thread and end with it.
    unsafe {
        assert_eq!(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), 0);
        let set = libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const program);
        if set != 0 {
            skip(format!("no seccomp filter: {}", std::io::Error::last_os_error()));
        }
    }
}

/// T22. The probe at attach finds a kernel that grants TCP over IPv4 and does not take it.
fn refused_at_the_start(backend: Backend) {
    // The driver's header, 40 bytes of headers and 64 of payload: only this kind's probe is so
    // long.
    refuse_writes(10 + 40 + 64, libc::EINVAL);
    let (mut worker, port, _device) = with_device(backend, Offloads::all());
    let passes = worker.port_info(port).unwrap().passes;
    assert!(
        !passes.contains(Offloads::TSO4) && passes.contains(Offloads::TSO6),
        "{passes}"
    );
    let mut batch = Batch::with_capacity(1);
    batch
        .push(superpacket(&worker, &tcp_superpacket(&pattern(5_000, 1), 1_000)))
        .unwrap();
    let sent = worker.send_many(port, &mut batch);
    assert_eq!((sent.accepted, sent.refused, sent.stopped), (1, 0, None));
    let counters = worker.counters(port).unwrap();
    assert_eq!(
        (
            counters.cut_superpackets,
            counters.cut_segments,
            counters.offloads_refused
        ),
        (1, 5, 0)
    );
}

/// T22. With either errno that kernels have given, at any time.
fn refused_by_a_write() {
    let (mut worker, port, _device) = with_device(Backend::Syscalls, Offloads::all());
    if !worker.port_info(port).unwrap().passes.contains(Offloads::USO) {
        skip("this kernel takes no UDP superpackets");
    }
    let receiver = receiver();
    let to = receiver.local_addr().unwrap().port();
    refuse_writes(10 + 28 + 5_000, libc::EINVAL);
    refuse_writes(10 + 28 + 6_000, libc::EIO);
    let mut batch = Batch::with_capacity(8);
    let rounds = common::repeats(5, 100);
    for round in 0..rounds {
        // One that is taken ends the row of those that are not.
        let lens = [5_000, 6_000, 7_000];
        for len in lens {
            let bytes = udp_superpacket(&pattern(len, round as u64), 500, to);
            batch.push(superpacket(&worker, &bytes)).unwrap();
        }
        let sent = worker.send_many(port, &mut batch);
        assert_eq!((sent.accepted, sent.refused, sent.stopped), (3, 0, None));
        for len in lens {
            for piece in pattern(len, round as u64).chunks(500) {
                assert!(received(&receiver) == piece, "round {round}, {len} bytes");
            }
        }
    }
    let counters = worker.counters(port).unwrap();
    assert_eq!(
        (counters.offloads_refused, counters.cut_segments),
        (2 * rounds as u64, 22 * rounds as u64)
    );
    assert!(worker.port_info(port).unwrap().passes.contains(Offloads::USO));
}

/// Passed on, the stack drops it, as it drops a packet with such a header. (Cut, each segment gets
/// a header of its own.)
fn wrong_header(backend: Backend) {
    let (mut worker, port, _device) = with_device(backend, Offloads::all());
    if !worker.port_info(port).unwrap().passes.contains(Offloads::USO) {
        skip("this kernel takes no UDP superpackets");
    }
    let receiver = receiver();
    let to = receiver.local_addr().unwrap().port();
    let mut batch = Batch::with_capacity(3);
    let mut wrong = udp_superpacket(&[1; 2_000], 500, to);
    wrong.1[10..12].fill(0);
    batch.push(superpacket(&worker, &wrong)).unwrap();
    let mut plain = datagram(RIGHT, LEFT, to, &[2; 500]);
    plain[10..12].fill(0);
    batch.push(worker.packet_from(&plain).unwrap()).unwrap();
    batch
        .push(superpacket(&worker, &udp_superpacket(&[3; 1_000], 500, to)))
        .unwrap();
    assert_eq!(worker.send_many(port, &mut batch).accepted, 3);
    (0..2).for_each(|_| assert_eq!(received(&receiver), [3; 500]));
}

/// T22. The kernel takes no UDP superpackets of more than 128 segments, which are superpackets like
/// others to us.
fn refused_by_the_kernel(backend: Backend) {
    let (mut worker, port, _device) = with_device(backend, Offloads::all());
    if !worker.port_info(port).unwrap().passes.contains(Offloads::USO) {
        skip("this kernel takes no UDP superpackets");
    }
    let receiver = receiver();
    let to = receiver.local_addr().unwrap().port();
    let mut batch = Batch::with_capacity(8);
    let sizes = [(0, 500), (1, 7), (2, 500), (3, 7), (4, 500)];
    for round in 0..20_u8 {
        for (place, size) in sizes {
            let payload = [vec![round, place], vec![0; 998]].concat();
            let packet = superpacket(&worker, &udp_superpacket(&payload, size, to));
            batch.push(packet).unwrap();
        }
        let sent = worker.send_many(port, &mut batch);
        assert_eq!((sent.accepted, sent.refused, sent.stopped), (5, 0, None));
        for (place, size) in sizes {
            let first = received(&receiver);
            assert_eq!(
                (first[0], first[1], first.len()),
                (round, place, size as usize),
                "in its place"
            );
            let mut rest = 1_000 - first.len();
            while rest > 0 {
                let next = received(&receiver);
                assert_eq!(next, vec![0; rest.min(size as usize)]);
                rest -= next.len();
            }
        }
    }
    let counters = worker.counters(port).unwrap();
    assert_eq!((counters.sent_packets, counters.refused_packets), (100, 0));
    assert_eq!((counters.offloads_refused, counters.cut_segments), (40, 40 * 143));
    assert!(
        worker.port_info(port).unwrap().passes.contains(Offloads::USO),
        "others were taken between"
    );
    // Only such: they are not tried for ever.
    for _ in 0..20 {
        let packet = superpacket(&worker, &udp_superpacket(&[7; 1_000], 7, to));
        batch.push(packet).unwrap();
        assert_eq!(worker.send_many(port, &mut batch).accepted, 1);
        (0..143).for_each(|_| assert!(received(&receiver).len() <= 7));
    }
    assert_eq!(worker.counters(port).unwrap().offloads_refused, 56);
    let passes = worker.port_info(port).unwrap().passes;
    assert!(
        !passes.contains(Offloads::USO) && passes.contains(Offloads::TSO4),
        "{passes}"
    );
}

fn told_by_an_engine(backend: Backend) {
    struct Idle;
    impl Handler for Idle {
        fn packets(&mut self, _: &mut Worker, _: PortId, _: &mut Batch) {}
    }
    let device = Builder::new("told", Mode::Tun)
        .offloads(Offloads::all())
        .address(LEFT, 24)
        .up(true)
        .open()
        .unwrap();
    if !device.granted().offloads.contains(Offloads::USO) {
        skip("this kernel has no UDP superpackets");
    }
    let engine = Engine::builder()
        .device(device)
        .config(config(backend))
        .start(|_| Ok(Idle))
        .unwrap();
    engine
        .run_on(0, |_, worker| {
            let port = worker.ports().next().unwrap();
            let mut batch = Batch::with_capacity(1);
            for _ in 0..16 {
                let packet = superpacket(worker, &udp_superpacket(&[7; 1_000], 7, 9));
                batch.push(packet).unwrap();
                assert_eq!(worker.send_many(port, &mut batch).accepted, 1);
            }
        })
        .unwrap();
    let events = engine.events();
    let deadline = Instant::now() + Duration::from_secs(5) * common::slowness();
    loop {
        match events.next_within(deadline.saturating_duration_since(Instant::now())) {
            Some(Event::OffloadsRefused { device, passes }) => {
                assert_eq!(device, "told");
                assert!(!passes.contains(Offloads::USO) && passes.contains(Offloads::TSO4));
                break;
            }
            Some(_) => {}
            None => panic!("not told"),
        }
    }
}

/// Somebody else with a descriptor of the device makes the headers longer.
fn lying_headers(backend: Backend) {
    let device = Builder::new("lies", Mode::Tun)
        .offloads(Offloads::all())
        .address(LEFT, 24)
        .up(true)
        .open()
        .unwrap();
    let mut queues = device.into_queues();
    let other = queues[0].as_fd().try_clone_to_owned().unwrap();
    let mut worker = Worker::new(&config(backend)).unwrap();
    let port = worker.attach(queues.remove(0)).unwrap();
    let sender = UdpSocket::bind((LEFT, 0)).unwrap();
    option(&sender, UDP, UDP_SEGMENT, 500);
    let mut batch = Batch::with_capacity(8);
    let set = |size: libc::c_int| {
        // SAFETY: the request reads one int.
        let result = unsafe { libc::ioctl(other.as_raw_fd(), libc::TUNSETVNETHDRSZ, &raw const size) };
        assert_eq!(result, 0);
    };
    let deadline = Instant::now() + Duration::from_secs(5) * common::slowness();
    set(20);
    sender.send_to(&[1; 5_000], (RIGHT, 9)).unwrap();
    loop {
        worker.wait(Some(deadline)).unwrap();
        match worker.try_recv_many(port, &mut batch) {
            Err(error) if error.kind() == PortErrorKind::Changed => break,
            Err(error) => panic!("{error}"),
            // Other packets of the stack, of which the header says nothing.
            Ok(_) => batch.clear(),
        }
        assert!(Instant::now() < deadline);
    }
    assert!(worker.counters(port).unwrap().bad_headers >= 1);
    assert_eq!(worker.counters(port).unwrap().set_back, 1);
    sender.send_to(&[2; 5_000], (RIGHT, 9)).unwrap();
    // Before Linux 6.2 the kernel cuts it before the device.
    let whole = worker.port_info(port).unwrap().passes.contains(Offloads::USO);
    loop {
        assert!(Instant::now() < deadline);
        worker.wait(Some(deadline)).unwrap();
        match worker.try_recv_many(port, &mut batch) {
            Ok(_) | Err(_)
                if batch
                    .iter()
                    .any(|packet| packet.is_superpacket() == whole && packet.ends_with(&[2; 100])) =>
            {
                break;
            }
            _ => batch.clear(),
        }
    }
}

fn switched_off(backend: Backend) {
    let off = Superpackets {
        tso: false,
        uso: false,
        merge_tcp: false,
        merge_udp: false,
        ..Superpackets::default()
    };
    let wire = Wire::new(Setting {
        superpackets: off,
        ..Setting::new(backend, [Offloads::all(); 2])
    });
    transfer(&wire, RIGHT.into(), 1 << 20);
    datagrams(&wire, RIGHT.into(), false);
    let [left, right] = wire.end();
    assert_eq!((left.sent_superpackets, right.sent_superpackets), (0, 0));
    assert!(right.cut_superpackets > 10);
}

fn mangled(backend: Backend) {
    let (mut worker, port, _device) = with_device(backend, Offloads::all());
    let mut batch = Batch::with_capacity(4);
    let bytes = tcp_superpacket(&pattern(5_000, 1), 1_000);
    let mut short = superpacket(&worker, &bytes);
    short.truncate(3_000);
    assert!(short.meta().is_err() && short.segments().is_err());
    batch.push(short).unwrap();
    let mut other = superpacket(&worker, &bytes);
    other[0] = 0x65;
    batch.push(other).unwrap();
    batch.push(superpacket(&worker, &bytes)).unwrap();
    let sent = worker.send_many(port, &mut batch);
    assert_eq!((sent.accepted, sent.refused, sent.stopped), (1, 2, None));
    assert_eq!(sent.refusal.map(|error| error.kind()), Some(PortErrorKind::BadPacket));
    assert_eq!(worker.counters(port).unwrap().refused.count(libc::EINVAL), 2);
    // More extension headers than a superpacket is cut with; as it is it may go.
    let (header, long) = udp_superpacket_v6(&pattern(3_000, 1), 1_000, 2);
    let mut packet = worker.packet_from(&long).unwrap();
    packet.set_meta(header.check(&long, Link::None).unwrap()).unwrap();
    worker
        .set_superpackets(
            port,
            Superpackets {
                uso: false,
                ..Superpackets::default()
            },
        )
        .unwrap();
    batch.push(packet).unwrap();
    let sent = worker.send_many(port, &mut batch);
    assert_eq!((sent.accepted, sent.refused, sent.stopped), (0, 1, None));
    let mut packet = worker.packet_from(&bytes.1[..100]).unwrap();
    assert!(packet.set_meta(bytes.0.check(&bytes.1, Link::None).unwrap()).is_err());
    // Nor what fits no packet at all.
    for (start, field) in [(50, 40), (0, 99), (usize::MAX, usize::MAX), (40, usize::MAX)] {
        assert!(packet.set_meta(Meta::Unfinished { start, field }).is_err());
    }
    let Ok(Meta::Gso(gso)) = bytes.0.check(&bytes.1, Link::None) else {
        panic!("a superpacket")
    };
    let mut whole = worker.packet_from(&bytes.1).unwrap();
    let mut other = gso;
    other.size = 0;
    assert!(whole.set_meta(Meta::Gso(other)).is_err());
    other = gso;
    other.headers.network = usize::MAX;
    assert!(whole.set_meta(Meta::Gso(other)).is_err());
    assert_eq!((packet.meta(), whole.meta()), (Ok(Meta::Plain), Ok(Meta::Plain)));
}

/// Linux 6.12.117 drops such a superpacket where it is forwarded (`qdisc_pkt_len_init`).
fn extended(backend: Backend) {
    let (mut worker, port, _device) = with_device(backend, Offloads::all());
    let mut batch = Batch::with_capacity(1);
    let bytes = tcp_superpacket_v6(&pattern(5_000, 1), 1_000);
    batch.push(superpacket(&worker, &bytes)).unwrap();
    let sent = worker.send_many(port, &mut batch);
    assert_eq!((sent.accepted, sent.refused, sent.stopped), (1, 0, None));
    let counters = worker.counters(port).unwrap();
    assert_eq!((counters.cut_superpackets, counters.cut_segments), (1, 5));
    assert_eq!((counters.sent_superpackets, counters.offloads_refused), (0, 0));
}

fn torn(backend: Backend) {
    let (mut worker, port, device) = with_device(backend, Offloads::none());
    let receiver = receiver();
    let bytes = udp_superpacket(&[5; 20_000], 100, receiver.local_addr().unwrap().port());
    let mut batch = Batch::with_capacity(1);
    batch.push(superpacket(&worker, &bytes)).unwrap();
    device.set_up(false).unwrap();
    let sent = worker.send_many(port, &mut batch);
    assert_eq!((sent.accepted, sent.refused, sent.refusal), (0, 0, None));
    assert_eq!(sent.stopped.map(|error| error.kind()), Some(PortErrorKind::Down));
    assert_eq!(worker.counters(port).unwrap().refused_packets, 0);
    device.set_up(true).unwrap();
    let sent = worker.send_many(port, &mut batch);
    assert_eq!((sent.accepted, sent.refused, sent.stopped), (0, 1, None));
    assert_eq!(sent.refusal.map(|error| error.raw_os_error()), Some(libc::EIO));
    let counters = worker.counters(port).unwrap();
    assert_eq!((counters.sent_packets, counters.refused.count(libc::EIO)), (0, 1));
    assert!(counters.cut_segments > 0 && counters.cut_segments < 200);
}

fn down(backend: Backend) {
    let (mut worker, port, device) = with_device(backend, Offloads::all());
    device.set_up(false).unwrap();
    let mut batch = Batch::with_capacity(10);
    let mut all = superpacket(&worker, &udp_superpacket(&[5; 1_000], 100, 9));
    assert_eq!(all.split_into(&mut batch), Ok(10));
    let sent = worker.send_many(port, &mut batch);
    assert_eq!(sent.stopped.map(|error| error.kind()), Some(PortErrorKind::Down));
    let counters = worker.counters(port).unwrap();
    assert_eq!((counters.sent_packets, counters.offloads_refused), (0, 0));
    assert!(counters.refused_packets > 0);
}

fn short_packets(backend: Backend) {
    let (mut worker, port, _device) = with_device(backend, Offloads::all());
    let sender = UdpSocket::bind((LEFT, 0)).unwrap();
    (0..200).for_each(|_| assert_eq!(sender.send_to(&[1; 100], (RIGHT, 9)).unwrap(), 100));
    let mut batch = Batch::with_capacity(256);
    let deadline = Instant::now() + Duration::from_secs(5) * common::slowness();
    while batch.len() < 200 {
        assert!(Instant::now() < deadline);
        worker.recv_many(port, &mut batch).unwrap();
    }
    // 32 large buffers could not hold them.
    for packet in batch.iter_mut().filter(|packet| packet.ends_with(&[1; 100])) {
        packet.finish_checksum().unwrap();
        assert!(packet.headroom() >= 64 && packet.tailroom() < 4_096);
    }
    assert_eq!(worker.counters(port).unwrap().no_buffers, 0);
}

fn received_by_copy(backend: Backend) {
    let (mut worker, port, _device) = with_device(backend, Offloads::CSUM);
    let sender = UdpSocket::bind((LEFT, 0)).unwrap();
    assert_eq!(sender.send_to(&[1; 100], (RIGHT, 9)).unwrap(), 100);
    let mut buffer = [0; 2_000];
    // Others may come before it.
    let packet = loop {
        let len = worker.recv(port, &mut buffer).unwrap();
        if buffer[..len].ends_with(&[1; 100]) {
            break &buffer[..len];
        }
    };
    let pseudo = tun_driver::offload::checksum::pseudo_header(&packet[12..16], &packet[16..20], 17, 108);
    assert!((pseudo + tun_driver::offload::checksum::sum(&packet[20..])).is_whole());
}

fn through_a_handoff(backend: Backend) {
    let worker = Worker::new(&WorkerConfig {
        large_buffers: 4,
        ..config(backend)
    })
    .unwrap();
    let mut other = Worker::new(&config(backend)).unwrap();
    let (port, mut handoff) = other.open_handoff(16).unwrap();
    let payload = pattern(30_000, 2);
    let mut batch = Batch::with_capacity(2);
    batch
        .push(superpacket(&worker, &tcp_superpacket(&payload, 1_000)))
        .unwrap();
    let (mut got, mut arrived) = (Vec::new(), Batch::with_capacity(16));
    while got.len() < payload.len() {
        let _ = handoff.send_many(&mut batch);
        assert!(other.try_recv_many(port, &mut arrived).unwrap() > 0);
        for packet in &arrived {
            assert_eq!(packet.meta(), Ok(Meta::Plain));
            got.extend_from_slice(&packet[40..]);
        }
        arrived.clear();
    }
    assert_eq!(got, payload);
    assert!(batch.is_empty());
    // What is left to be finished is so on the other side.
    let (_, bytes) = udp_superpacket(&[1; 10], 10, 9);
    let mut packet = worker.packet_from(&bytes).unwrap();
    packet.set_meta(Meta::Unfinished { start: 20, field: 26 }).unwrap();
    batch.push(packet).unwrap();
    let _ = handoff.send_many(&mut batch);
    assert_eq!(other.try_recv_many(port, &mut arrived), Ok(1));
    let mut finished = bytes.clone();
    vnet::finish(&mut finished, 20, 26);
    arrived[0].finish_checksum().unwrap();
    assert_eq!(arrived[0][..], finished[..]);
}

/// T12. What a device was granted before does not come back with it: bulk TCP over two that were
/// reopened without offloads.
fn reopened(backend: Backend) {
    for _ in 0..repeats(1, 20) {
        let wire = Wire::new(Setting {
            reopened: true,
            ..Setting::new(backend, [Offloads::none(); 2])
        });
        transfer(&wire, RIGHT.into(), 4 << 20);
        transfer(&wire, RIGHT6.into(), 4 << 20);
        for counters in wire.end() {
            assert_eq!((counters.received_superpackets, counters.truncated), (0, 0));
        }
    }
}

fn persistent() {
    common::need_tun();
    common::need_program("ethtool", "ethtool");
    let open = |offloads| {
        Builder::new("keeps", Mode::Tun)
            .offloads(offloads)
            .attach_existing(true)
            .persist(true)
            .open()
            .unwrap()
    };
    let told = |device: &MultiQueue| {
        let ethtool = std::process::Command::new("ethtool")
            .args(["-k", "keeps"])
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&ethtool.stdout).into_owned();
        (
            text.contains("tcp-segmentation-offload: on"),
            device.granted().offloads.has_superpackets(),
        )
    };
    assert_eq!(told(&open(Offloads::all())), (true, true));
    assert_eq!(told(&open(Offloads::none())), (false, false));
    assert_eq!(told(&open(Offloads::CSUM)), (false, false));
    assert_eq!(told(&open(Offloads::all())), (true, true));
    let error = Builder::new("both", Mode::Tun)
        .offloads(Offloads::CSUM)
        .packet_info(true)
        .open()
        .unwrap_err();
    assert!(error.detail().contains("packet_info"), "{error}");
}
