//! Other holders of a device or a descriptor change what is shared: it is noticed, set back,
//! counted and reported.

mod common;
mod device;
mod offer;

use std::net::{IpAddr, UdpSocket};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use common::{repeats, trial};
use device::{copy, ioctl_int, ioctl_value};
use offer::{HERE, Offer, PORT, THERE, build, config, named, on_both, outward, quiet, receive, single, worker};
use tun_driver::lab::packet::{Ethernet, Framing, Spec};
use tun_driver::lab::{Catcher, Tracker};
use tun_driver::netlink::Handle;
use tun_driver::{
    Backend, Batch, Builder, Device, Engine, Event, Mode, MultiQueue, Offloads, PortErrorKind, PortId, Queue, Worker,
};

fn main() {
    let mut trials = Vec::new();
    let all = &mut trials;
    on_both(
        all,
        "a longer header is set back, and no shifted packet is delivered, TUN",
        header_tun,
    );
    on_both(
        all,
        "a longer header is set back, and no shifted packet is delivered, TAP",
        header_tap,
    );
    on_both(all, "a header without room for a packet is set back", header_beyond_all);
    on_both(
        all,
        "one queue sets back, and the others deliver no shifted packet",
        header_of_two_queues,
    );
    on_both(all, "a longer header is found by sending, TUN", sends_tun);
    on_both(all, "a longer header is found by sending alone, TAP", sends_tap);
    on_both(all, "rare frames with the right header are delivered", rare_frames);
    on_both(all, RARE_FRAMES, rare_frames_mixed);
    on_both(all, MANY_TYPES, many_types);
    on_both(all, "a port holds no more rare frames back than one burst", held_back);
    on_both(all, BAD_HEADERS, bad_headers);
    on_both(all, NO_PACKETS, no_packets);
    on_both(
        all,
        "a packet among others that are none finds the header changed",
        packet_among_others,
    );
    on_both(
        all,
        "rare frames of several types are asked about once each",
        |backend| asks_at_most(RARE_FRAMES, backend, 5),
    );
    on_both(
        all,
        "rare frames of many types are asked about once for each burst",
        |backend| asks_at_most(MANY_TYPES, backend, 20),
    );
    on_both(
        all,
        "packets with bad headers are asked about once for each burst",
        |backend| asks_at_most(BAD_HEADERS, backend, 20),
    );
    on_both(
        all,
        "what is no packet raises no suspicion when it is sent",
        |backend| asks_at_most(NO_PACKETS, backend, 0),
    );
    on_both(
        all,
        "offloads on a device without a header are set back by an engine",
        offloads_engine,
    );
    on_both(
        all,
        "offloads on a device without a header are set back when asked",
        offloads_asked,
    );
    on_both(
        all,
        "superpackets that were not asked for are set back",
        offloads_beyond_granted,
    );
    on_both(all, "a queue's own change of offloads is no other holder's", own_change);
    on_both(all, "a descriptor made blocking does not hold up a stop", blocking_stop);
    on_both(
        all,
        "a descriptor made blocking is made non-blocking again, and reported",
        blocking_reported,
    );
    on_both(all, "a socket made blocking does not hold up a worker", blocking_socket);
    trials.push(trial(
        "adopting a device without a header switches its offloads off",
        adopted,
    ));
    common::run(trials)
}

const MAC: [u8; 6] = [2, 0, 0, 0, 0, 7];
const BEYOND: [u8; 6] = [2, 0, 0, 0, 0, 8];

const RARE_FRAMES: &str = "rare frames of several types are delivered";
const MANY_TYPES: &str = "rare frames of many types are delivered in order";
const BAD_HEADERS: &str = "packets with bad headers are dropped, counted and reported";
const NO_PACKETS: &str = "what is no packet is refused";

const TUN_F_CSUM: u64 = 1;
const TUN_F_TSO4: u64 = 2;

/// A device with a header, and another holder's descriptor of its first queue.
struct Shared {
    queues: Vec<Queue>,
    device: Device,
    other: OwnedFd,
    mode: Mode,
}

impl Shared {
    fn new(mode: Mode, queues: usize, offloads: Offloads) -> Self {
        quiet();
        let builder = Builder::new("s%d", mode).queues(queues).offloads(offloads).up(true);
        let builder = if mode == Mode::Tap { builder.mac(MAC) } else { builder };
        Self::of(
            builder.address(HERE.parse::<IpAddr>().unwrap(), 24).open().unwrap(),
            mode,
        )
    }

    fn of(opened: MultiQueue, mode: Mode) -> Self {
        let device = opened.device().unwrap().clone();
        if mode == Mode::Tap {
            let netlink = Handle::new().unwrap();
            netlink
                .add_neighbour(device.index(), THERE.parse().unwrap(), BEYOND)
                .unwrap();
        }
        let queues = opened.into_queues();
        let other = copy(&queues[0]);
        Self {
            queues,
            device,
            other,
            mode,
        }
    }

    /// What comes out of the device.
    fn incoming(&self) -> Framing {
        framing(self.mode, MAC, BEYOND)
    }

    /// What is written into it.
    fn outgoing(&self) -> Spec {
        outward().framing(framing(self.mode, BEYOND, MAC))
    }
}

fn framing(mode: Mode, source: [u8; 6], target: [u8; 6]) -> Framing {
    Framing {
        ethernet: (mode == Mode::Tap).then_some(Ethernet { source, target }),
        ..Framing::NONE
    }
}

fn set_header(fd: impl AsFd, size: i32) {
    ioctl_int(fd.as_fd(), libc::TUNSETVNETHDRSZ, size).unwrap();
}

fn header(fd: impl AsFd) -> i32 {
    ioctl_int(fd.as_fd(), libc::TUNGETVNETHDRSZ, 0).unwrap()
}

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(10)
}

/// Takes what is there; panics on a packet that is not whole. Returns how many came, and whether a
/// change was reported.
fn take(worker: &mut Worker, port: PortId, batch: &mut Batch, framing: Framing) -> (usize, bool) {
    let (mut came, mut changed) = (0, false);
    loop {
        match worker.try_recv_many(port, batch) {
            Ok(0) => return (came, changed),
            Ok(_) => {
                for mut packet in batch.drain() {
                    packet.finish_checksum().unwrap();
                    framing.check(&packet).expect("a shifted packet");
                    came += 1;
                }
            }
            Err(error) if error.kind() == PortErrorKind::Changed => changed = true,
            Err(error) => assert_eq!(error.kind(), PortErrorKind::BadPacket, "{error}"),
        }
    }
}

fn header_tun(backend: Backend) {
    header_changed(backend, Mode::Tun);
}

fn header_tap(backend: Backend) {
    header_changed(backend, Mode::Tap);
}

/// T13, the header's size.
fn header_changed(backend: Backend, mode: Mode) {
    let mut shared = Shared::new(mode, 1, Offloads::CSUM);
    let framing = shared.incoming();
    let mut worker = worker(backend);
    let port = worker.attach(shared.queues.remove(0)).unwrap();
    let mut batch = Batch::with_capacity(64);
    let mut offer = Offer::new();
    let rounds = repeats(20, 1_000);
    let mut dropped = 0;
    for round in 0..rounds {
        // Some packets before the change, some behind it; a read may be armed meanwhile.
        offer.send(round as u32 % 5);
        if round % 2 == 0 {
            worker.wait(Some(Instant::now())).unwrap();
        }
        set_header(&shared.other, [12, 20, 24, 11, 40][round % 5]);
        offer.send(10);
        let end = soon();
        let mut reported = false;
        while !reported {
            assert!(!worker.wait(Some(end)).unwrap().timer, "not noticed");
            reported |= take(&mut worker, port, &mut batch, framing).1;
        }
        assert_eq!(header(&shared.other), 10);
        let counters = worker.counters(port).unwrap();
        assert_eq!(counters.set_back, round as u64 + 1);
        assert!(counters.bad_headers > dropped && counters.bad_headers <= dropped + 15);
        dropped = counters.bad_headers;
        // In step again: all of the next ones come.
        offer.send(7);
        let mut came = 0;
        while came < 7 {
            assert!(!worker.wait(Some(end)).unwrap().timer, "{came} packets came");
            came += take(&mut worker, port, &mut batch, framing).0;
        }
        assert_eq!(worker.counters(port).unwrap().bad_headers, dropped);
    }
}

/// No buffer is long enough for the header alone: every read fails.
fn header_beyond_all(backend: Backend) {
    let mut shared = Shared::new(Mode::Tun, 1, Offloads::CSUM);
    let mut worker = worker(backend);
    let port = worker.attach(shared.queues.remove(0)).unwrap();
    let mut batch = Batch::with_capacity(64);
    set_header(&shared.other, 1 << 20);
    let mut offer = Offer::new();
    offer.send(3);
    let end = soon();
    let mut reported = false;
    while !reported {
        assert!(!worker.wait(Some(end)).unwrap().timer, "not noticed");
        reported |= take(&mut worker, port, &mut batch, Framing::NONE).1;
    }
    assert_eq!(header(&shared.other), 10);
    take(&mut worker, port, &mut batch, Framing::NONE);
    offer.send(5);
    receive(&mut worker, port, &mut batch, 5).unwrap();
}

/// The queue that finds out last asks a kernel that says nothing wrong any more.
fn header_of_two_queues(backend: Backend) {
    let mut shared = Shared::new(Mode::Tun, 2, Offloads::CSUM);
    let framing = shared.incoming();
    let mut worker = worker(backend);
    let ports = [(); 2].map(|()| worker.attach(shared.queues.remove(0)).unwrap());
    let mut batch = Batch::with_capacity(64);
    let mut offers: Vec<Offer> = (0..16).map(|_| Offer::new()).collect();
    for _ in 0..repeats(10, 1_000) {
        worker.wait(Some(Instant::now())).unwrap();
        // Reads are armed on both queues, and end with the header of that moment.
        set_header(&shared.other, 12);
        offers.iter_mut().for_each(|offer| offer.send(2));
        let end = soon();
        let mut reported = false;
        while !reported {
            assert!(!worker.wait(Some(end)).unwrap().timer, "not noticed");
            for port in ports {
                reported |= take(&mut worker, port, &mut batch, framing).1;
            }
        }
        for port in ports {
            take(&mut worker, port, &mut batch, framing);
        }
        assert_eq!(header(&shared.other), 10);
    }
    let dropped = ports.map(|port| worker.counters(port).unwrap().bad_headers);
    assert!(dropped.iter().sum::<u64>() > 0, "{dropped:?}");
    // System calls read one queue after the other, and the first one sets back.
    assert!(
        backend == Backend::Syscalls || dropped.iter().all(|&dropped| dropped > 0),
        "{dropped:?}"
    );
}

fn batch_for(worker: &Worker, spec: &Spec, numbers: std::ops::Range<u32>) -> Batch {
    let mut batch = Batch::with_capacity(numbers.len());
    for sequence in numbers {
        batch.push(build(worker, spec, 200, sequence)).unwrap();
    }
    batch
}

fn sends_tun(backend: Backend) {
    let mut shared = Shared::new(Mode::Tun, 1, Offloads::all());
    let spec = shared.outgoing();
    let mut worker = worker(backend);
    let port = worker.attach(shared.queues.remove(0)).unwrap();
    let passes = worker.port_info(port).unwrap().passes;
    let mut catcher = Catcher::bind((HERE.parse::<IpAddr>().unwrap(), PORT).into()).unwrap();
    for round in 0..repeats(10, 1_000) as u32 {
        set_header(&shared.other, 12);
        let mut batch = batch_for(&worker, &spec, 0..4);
        let sent = worker.send_many(port, &mut batch);
        // Plain packets are refused; what was merged goes again behind the right header.
        assert_eq!(sent.accepted + sent.refused, 4, "{sent:?}");
        assert_eq!(header(&shared.other), 10, "not noticed");
        let counters = worker.counters(port).unwrap();
        assert_eq!(counters.set_back, u64::from(round) + 1);
        let mut tracker = Tracker::new(1);
        let before = catcher
            .catch(&mut tracker, sent.accepted, Duration::from_secs(5))
            .unwrap();
        assert_eq!(before, sent.accepted);
        let mut batch = batch_for(&worker, &spec, 10..20);
        assert_eq!(worker.send_many(port, &mut batch).accepted, 10);
        assert_eq!(catcher.catch(&mut tracker, 10, Duration::from_secs(5)).unwrap(), 10);
        let error = worker.try_recv_many(port, &mut batch).unwrap_err();
        assert_eq!(error.kind(), PortErrorKind::Changed);
    }
    // The kernel refused no superpacket for its own sake.
    assert_eq!(worker.port_info(port).unwrap().passes, passes);
    assert_eq!(worker.counters(port).unwrap().offloads_refused, 0);
}

/// The kernel takes shifted frames without a word, and nothing comes that would show it: it is
/// asked after at most 1,024 batches.
fn sends_tap(backend: Backend) {
    let mut shared = Shared::new(Mode::Tap, 1, Offloads::CSUM);
    let spec = shared.outgoing();
    let mut worker = worker(backend);
    let port = worker.attach(shared.queues.remove(0)).unwrap();
    set_header(&shared.other, 12);
    for _ in 0..1_024 {
        let mut batch = batch_for(&worker, &spec, 0..1);
        let _ = worker.send_many(port, &mut batch);
    }
    assert_eq!(header(&shared.other), 10, "not noticed");
    let mut catcher = Catcher::bind((HERE.parse::<IpAddr>().unwrap(), PORT).into()).unwrap();
    let mut batch = batch_for(&worker, &spec, 0..10);
    assert_eq!(worker.send_many(port, &mut batch).accepted, 10);
    let mut tracker = Tracker::new(1);
    assert_eq!(catcher.catch(&mut tracker, 10, Duration::from_secs(5)).unwrap(), 10);
    assert_eq!(worker.counters(port).unwrap().set_back, 1);
}

/// Runs a trial of this file once more, and checks how often it asks the kernel for the size of a
/// device's header: each time waits for the kernel's lock of all network settings.
fn asks_at_most(name: &str, backend: Backend, most: usize) {
    let trace = common::traced(&named(name, backend), "ioctl");
    let asked = trace.matches("TUNGETVNETHDRSZ").count();
    assert!(asked <= most, "asked {asked} times");
}

/// A packet socket that sends through an interface what it is given, from the driver's header on
/// where `vnet`.
struct Sender {
    socket: OwnedFd,
    address: libc::sockaddr_ll,
}

impl Sender {
    fn new(index: u32, vnet: bool) -> Self {
        // SAFETY: no pointers but to an int, which outlives the call; the descriptor is new.
        let socket = unsafe {
            let fd = libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, 0);
            assert!(fd >= 0, "{}", std::io::Error::last_os_error());
            let value = libc::c_int::from(vnet);
            let size = size_of_val(&value) as u32;
            let result = libc::setsockopt(
                fd,
                libc::SOL_PACKET,
                libc::PACKET_VNET_HDR,
                (&raw const value).cast(),
                size,
            );
            assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
            OwnedFd::from_raw_fd(fd)
        };
        // SAFETY: all zero is a valid address.
        let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
        address.sll_family = libc::AF_PACKET as u16;
        address.sll_protocol = (libc::ETH_P_IP as u16).to_be();
        address.sll_ifindex = index as i32;
        Self { socket, address }
    }

    fn send(&self, bytes: &[u8]) {
        // SAFETY: bytes and address are readable for their lengths.
        let sent = unsafe {
            libc::sendto(
                self.socket.as_raw_fd(),
                bytes.as_ptr().cast(),
                bytes.len(),
                0,
                (&raw const self.address).cast(),
                size_of_val(&self.address) as u32,
            )
        };
        assert_eq!(sent, bytes.len() as isize, "{}", std::io::Error::last_os_error());
    }
}

/// Sends a frame through an interface as it is.
fn send_frame(index: u32, frame: &[u8]) {
    Sender::new(index, false).send(frame);
}

/// What the kernel hands over with a header that contradicts it: the checksum would lie inside the
/// IP header.
fn contradicted() -> Vec<u8> {
    let mut packet = [
        &[0x46, 0, 0, 132, 0, 1, 0x40, 0, 64, 17, 0, 0][..],
        &[10, 0, 0, 1, 10, 0, 0, 2],
    ]
    .concat();
    packet.extend([1; 112]);
    let mut bytes = vec![1, 0, 0, 0, 0, 0];
    bytes.extend(20_u16.to_ne_bytes());
    bytes.extend(2_u16.to_ne_bytes());
    bytes.extend(packet);
    bytes
}

/// Whoever sends many of them does not make the worker ask for each.
fn bad_headers(backend: Backend) {
    const COUNT: u64 = 200;
    let mut shared = Shared::new(Mode::Tun, 1, Offloads::CSUM);
    let mut worker = worker(backend);
    let port = worker.attach(shared.queues.remove(0)).unwrap();
    let sender = Sender::new(shared.device.index(), true);
    (0..COUNT).for_each(|_| sender.send(&contradicted()));
    let (mut batch, end) = (Batch::with_capacity(64), soon());
    let mut reports = 0;
    while worker.counters(port).unwrap().bad_headers < COUNT {
        assert!(!worker.wait(Some(end)).unwrap().timer, "they do not come");
        match worker.try_recv_many(port, &mut batch) {
            Ok(count) => assert_eq!(count, 0),
            Err(error) => {
                assert_eq!(error.kind(), PortErrorKind::BadPacket);
                reports += 1;
            }
        }
    }
    assert!(reports > 0);
    // One that is good still comes.
    Offer::new().send(1);
    while worker.recv_many(port, &mut batch).is_err() {}
    assert_eq!(worker.counters(port).unwrap().set_back, 0);
}

/// More types than a port remembers, each frame of another one than that before.
fn many_types(backend: Backend) {
    let mut shared = Shared::new(Mode::Tap, 1, Offloads::CSUM);
    let mut worker = worker(backend);
    let port = worker.attach(shared.queues.remove(0)).unwrap();
    let sender = Sender::new(shared.device.index(), false);
    let frame = |number: u8| [&BEYOND[..], &MAC, &[0x77, number % 20], &[number; 100]].concat();
    (0..200).for_each(|number| sender.send(&frame(number)));
    let mut batch = Batch::with_capacity(64);
    let mut next = 0;
    while next < 200 {
        receive(&mut worker, port, &mut batch, 1).unwrap();
        for packet in batch.drain() {
            assert_eq!(packet[..], frame(next));
            next += 1;
        }
    }
    let counters = worker.counters(port).unwrap();
    assert_eq!((counters.bad_headers, counters.received_packets), (0, 200));
}

/// What is held back takes buffers, and room of its own.
fn held_back(backend: Backend) {
    let mut shared = Shared::new(Mode::Tap, 1, Offloads::CSUM);
    let mut worker = worker(backend);
    let port = worker.attach(shared.queues.remove(0)).unwrap();
    let sender = Sender::new(shared.device.index(), false);
    (0..200).for_each(|number| sender.send(&[&BEYOND[..], &MAC, &[0x77, number], &[number; 100]].concat()));
    let mut batch = Batch::with_capacity(64);
    // As many as the port happened to ask for, and no more lie behind them.
    let came = worker.try_recv_many(port, &mut batch).unwrap();
    let behind = worker.detach(port).unwrap().undelivered.len();
    assert!((1..=64).contains(&(came + behind)), "{came}, and {behind} behind them");
}

/// MPLS and LLDP stand in place as well, and so does what is no IP packet on TUN.
fn rare_frames(backend: Backend) {
    for mode in [Mode::Tap, Mode::Tun] {
        let mut shared = Shared::new(mode, 1, Offloads::CSUM);
        let mut worker = worker(backend);
        let port = worker.attach(shared.queues.remove(0)).unwrap();
        let mut batch = Batch::with_capacity(16);
        for round in 1..5_u8 {
            for ether_type in [[0x88, 0x47], [0x88, 0xcc]] {
                let frame = [&BEYOND[..], &MAC, &ether_type, &[round; 100]].concat();
                send_frame(shared.device.index(), &frame);
                receive(&mut worker, port, &mut batch, 1).unwrap();
                assert_eq!(batch[0][..], frame);
                batch.clear();
            }
        }
        let counters = worker.counters(port).unwrap();
        assert_eq!((counters.bad_headers, counters.set_back), (0, 0));
    }
}

/// A port asks about a type of frame once, not for each: the kernel's answer may take long.
fn rare_frames_mixed(backend: Backend) {
    let mut shared = Shared::new(Mode::Tap, 1, Offloads::CSUM);
    let mut worker = worker(backend);
    let port = worker.attach(shared.queues.remove(0)).unwrap();
    let mut batch = Batch::with_capacity(16);
    let frame = |ether_type: [u8; 2], payload: &[u8]| [&BEYOND[..], &MAC, &ether_type, payload].concat();
    // Of 60 bytes by its own header, with more behind it.
    let ip = [&[0x45, 0, 0, 60][..], &[0; 140]].concat();
    let frames = [
        frame([0x88, 0x47], &[7; 100]),
        frame([0x88, 0xcc], &[7; 100]),
        frame([0x88, 0x64], &[7; 100]),
        frame([8, 0], &ip),
    ];
    let new = frame([0x88, 0xe5], &[7; 100]);
    for frame in std::iter::repeat_n(&frames, 10).flatten().chain([&new]) {
        send_frame(shared.device.index(), frame);
        receive(&mut worker, port, &mut batch, 1).unwrap();
        assert_eq!(batch[0][..], frame[..]);
        batch.clear();
    }
    assert_eq!(worker.counters(port).unwrap().bad_headers, 0);
}

/// What is no packet is refused for that, and raises no suspicion against the header's size.
fn no_packets(backend: Backend) {
    let mut shared = Shared::new(Mode::Tun, 1, Offloads::CSUM);
    let mut worker = worker(backend);
    let port = worker.attach(shared.queues.remove(0)).unwrap();
    for _ in 0..10 {
        let mut batch = Batch::with_capacity(8);
        (0..8).for_each(|_| batch.push(worker.packet_from(&[0x11; 100]).unwrap()).unwrap());
        let sent = worker.send_many(port, &mut batch);
        assert_eq!((sent.accepted, sent.refused), (0, 8), "{sent:?}");
    }
}

/// One packet among others that are none is enough to find the header changed.
fn packet_among_others(backend: Backend) {
    let mut shared = Shared::new(Mode::Tun, 1, Offloads::CSUM);
    let spec = shared.outgoing();
    let mut worker = worker(backend);
    let port = worker.attach(shared.queues.remove(0)).unwrap();
    set_header(&shared.other, 12);
    let mut batch = Batch::with_capacity(8);
    batch.push(worker.packet_from(&[0x11; 100]).unwrap()).unwrap();
    batch.push(build(&worker, &spec, 200, 0)).unwrap();
    let sent = worker.send_many(port, &mut batch);
    assert_eq!(sent.refused, 2, "{sent:?}");
    assert_eq!(header(&shared.other), 10);
}

/// Whether packets come with their checksums, as a device without a header must hand them out.
fn comes_finished(worker: &mut Worker, port: PortId, offer: &mut Offer) -> bool {
    let mut batch = Batch::with_capacity(1);
    offer.send(1);
    receive(worker, port, &mut batch, 1).unwrap();
    is_finished(&batch[0])
}

/// Whether the UDP checksum of an IPv4 packet is right.
fn is_finished(packet: &[u8]) -> bool {
    let udp = &packet[20..];
    let pseudo = [&packet[12..20], &[0, packet[9]], &packet[24..26]].concat();
    let words = [&pseudo, udp].concat();
    let sum: u32 = words
        .chunks(2)
        .map(|word| u32::from(u16::from_be_bytes([word[0], *word.get(1).unwrap_or(&0)])))
        .sum();
    ((sum & 0xffff) + (sum >> 16)) & 0xffff == 0xffff
}

fn plain(name: &str) -> Shared {
    quiet();
    let builder = Builder::new(name, Mode::Tun).address(HERE.parse::<IpAddr>().unwrap(), 24);
    Shared::of(builder.up(true).open().unwrap(), Mode::Tun)
}

fn set_offloads(fd: impl AsFd, flags: u64) {
    ioctl_value(fd.as_fd(), libc::TUNSETOFFLOAD, flags).unwrap();
}

/// T13, offloads on a device without a header.
fn offloads_asked(backend: Backend) {
    let mut shared = plain("s%d");
    let mut worker = worker(backend);
    let port = worker.attach(shared.queues.remove(0)).unwrap();
    let mut offer = Offer::new();
    assert!(comes_finished(&mut worker, port, &mut offer));
    assert!(!worker.restore(port).unwrap(), "nothing was changed");
    for round in 1..=repeats(5, 1_000) as u64 {
        set_offloads(&shared.other, TUN_F_CSUM);
        assert!(!comes_finished(&mut worker, port, &mut offer), "the harm is real");
        assert!(worker.restore(port).unwrap());
        let mut batch = Batch::with_capacity(1);
        assert_eq!(
            worker.try_recv_many(port, &mut batch).unwrap_err().kind(),
            PortErrorKind::Changed
        );
        assert!(comes_finished(&mut worker, port, &mut offer));
        assert!(!worker.restore(port).unwrap());
        assert_eq!(worker.counters(port).unwrap().set_back, round);
    }
}

fn offloads_engine(backend: Backend) {
    let shared = plain("s0");
    let Shared { queues, other, .. } = shared;
    let opened = MultiQueue::from_fds(queues.into_iter().map(OwnedFd::from).collect()).unwrap();
    let bad = Arc::new(AtomicU64::new(0));
    let came = Arc::new(AtomicU64::new(0));
    let (in_bad, in_came) = (Arc::clone(&bad), Arc::clone(&came));
    let engine = Engine::builder()
        .device(opened)
        .config(config(backend))
        .start_fn(move |_: &mut Worker, _: PortId, batch: &mut Batch| {
            for packet in batch.iter() {
                in_bad.fetch_add((!is_finished(packet)).into(), Ordering::Relaxed);
                in_came.fetch_add(1, Ordering::Relaxed);
            }
        })
        .unwrap();
    assert!(engine.watches_devices());
    let events = engine.events();
    let mut offer = Offer::new();
    for round in 1..=repeats(5, 1_000) as u64 {
        set_offloads(&other, TUN_F_CSUM | TUN_F_TSO4);
        let end = soon();
        let event = loop {
            match events.next_within(end.saturating_duration_since(Instant::now())) {
                Some(event @ Event::SetBack { .. }) => break event,
                Some(_) => {}
                None => panic!("not noticed"),
            }
        };
        assert_eq!(
            event,
            Event::SetBack {
                device: "s0".to_owned(),
                header: None,
                offloads: Some(Offloads::TSO4),
                blocking: false,
            }
        );
        assert!(
            event.to_string().contains("s0 changed its offloads to csum tso4"),
            "{event}"
        );
        bad.store(0, Ordering::Relaxed);
        let before = came.load(Ordering::Relaxed);
        offer.send(10);
        while came.load(Ordering::Relaxed) < before + 10 {
            assert!(Instant::now() < end);
            std::thread::sleep(Duration::from_millis(1));
        }
        assert_eq!(bad.load(Ordering::Relaxed), 0);
        assert_eq!(engine.stats().total().set_back, round);
    }
    assert!(engine.stop_within(Duration::from_secs(10)).is_clean());
}

/// Who asked for checksums alone gets no superpackets for long.
fn offloads_beyond_granted(backend: Backend) {
    let mut shared = Shared::new(Mode::Tun, 1, Offloads::CSUM);
    let mut worker = worker(backend);
    let port = worker.attach(shared.queues.remove(0)).unwrap();
    set_offloads(&shared.other, TUN_F_CSUM | TUN_F_TSO4);
    assert!(worker.restore(port).unwrap());
    assert!(!worker.restore(port).unwrap());
    // Fewer is a choice of the administrator's (ethtool -K), and left alone.
    set_offloads(&shared.other, 0);
    assert!(!worker.restore(port).unwrap());
}

fn own_change(backend: Backend) {
    let mut shared = Shared::new(Mode::Tun, 1, Offloads::CSUM);
    let mut worker = worker(backend);
    let port = worker.attach(shared.queues.remove(0)).unwrap();
    for wanted in [Offloads::all(), Offloads::none(), Offloads::TSO4, Offloads::CSUM] {
        let granted = worker.queue(port).unwrap().set_offloads(wanted).unwrap();
        assert!(!worker.restore(port).unwrap());
        assert_eq!(shared.device.offloads(), granted);
    }
}

fn adopted() {
    common::need_tun();
    let shared = plain("s%d");
    set_offloads(&shared.other, TUN_F_CSUM);
    let fds = shared.queues.into_iter().map(OwnedFd::from).collect();
    let (queue, _device) = single(MultiQueue::from_fds(fds).unwrap());
    let mut worker = worker(Backend::Syscalls);
    let port = worker.attach(queue).unwrap();
    assert!(comes_finished(&mut worker, port, &mut Offer::new()));
}

/// O_NONBLOCK belongs to the open file: each holder of a copy of the descriptor changes it for all.
fn make_blocking(fd: impl AsFd) {
    let fd = fd.as_fd().as_raw_fd();
    // SAFETY: no pointers.
    unsafe {
        let flags = libc::fcntl(fd, libc::F_GETFL);
        assert!(flags >= 0);
        assert_eq!(libc::fcntl(fd, libc::F_SETFL, flags & !libc::O_NONBLOCK), 0);
    }
}

fn blocking_stop(backend: Backend) {
    for _ in 0..repeats(5, 200) {
        let shared = plain("s0");
        let Shared { queues, other, .. } = shared;
        let opened = MultiQueue::from_fds(queues.into_iter().map(OwnedFd::from).collect()).unwrap();
        let engine = Engine::builder()
            .device(opened)
            .config(config(backend))
            .start_fn(|_: &mut Worker, _: PortId, _: &mut Batch| {})
            .unwrap();
        make_blocking(&other);
        // The worker reads what comes, and would sleep in the read behind the last packet.
        let mut offer = Offer::new();
        let end = soon();
        offer.send(3);
        while engine.stats().total().received_packets < 3 {
            assert!(Instant::now() < end);
            std::thread::sleep(Duration::from_millis(1));
        }
        let report = engine.stop_within(Duration::from_secs(20));
        assert!(report.is_clean(), "{report}");
    }
}

/// A ring does not mind (FMODE_NOWAIT), so there it stays as it is.
fn blocking_reported(backend: Backend) {
    let mut shared = plain("s%d");
    let mut worker = worker(backend);
    let port = worker.attach(shared.queues.remove(0)).unwrap();
    let mut offer = Offer::new();
    let mut batch = Batch::with_capacity(8);
    for round in 1..=repeats(10, 1_000) as u64 {
        make_blocking(&shared.other);
        // An empty queue is the worst case: this returns.
        let result = worker.try_recv_many(port, &mut batch);
        if backend == Backend::Syscalls {
            let error = result.unwrap_err();
            assert_eq!((error.kind(), error.call()), (PortErrorKind::Changed, "fcntl(F_SETFL)"));
            assert!(device::descriptor_flags(&shared.other).0 & libc::O_NONBLOCK != 0);
            assert_eq!(worker.counters(port).unwrap().set_back, round);
        }
        assert_eq!(worker.try_recv_many(port, &mut batch), Ok(0));
        offer.send(1);
        receive(&mut worker, port, &mut batch, 1).unwrap();
        batch.clear();
    }
}

fn blocking_socket(backend: Backend) {
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    let (other, address) = (copy(&socket), socket.local_addr().unwrap());
    let mut worker = worker(backend);
    let port = worker.attach(socket).unwrap();
    let mut batch = Batch::with_capacity(8);
    make_blocking(&other);
    assert_eq!(worker.try_recv_many(port, &mut batch), Ok(0));
    UdpSocket::bind("127.0.0.1:0")
        .unwrap()
        .send_to(b"one", address)
        .unwrap();
    receive(&mut worker, port, &mut batch, 1).unwrap();
    assert_eq!(worker.try_recv_many(port, &mut batch), Ok(0));
}
