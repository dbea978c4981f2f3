//! UDP ports against a network that answers: ICMP errors, options that others set on a socket, and
//! wildcard sockets with several addresses.

mod common;
mod device;
mod offer;

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, UdpSocket};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use etherparse::{NetSlice, PacketBuilder, SlicedPacket, TransportSlice};
use offer::{config, named, on_both, receive, worker};
use tun_driver::netlink::Handle;
use tun_driver::offload::{Link, VnetHdr};
use tun_driver::{Backend, Batch, LocalAddr, OpenErrorKind, PacketBuf, PortErrorKind, PortId, Worker, WorkerConfig};

fn main() {
    let mut trials = Vec::new();
    let all = &mut trials;
    on_both(
        all,
        "a datagram for an interface that is gone does not end the port",
        multicast_interface_deleted,
    );
    on_both(all, "no ICMP error over IPv4 costs a datagram", icmp4);
    on_both(all, "no ICMP error over IPv6 costs a datagram", icmp6);
    on_both(all, "ICMP for every datagram costs none", icmp_for_every_datagram);
    on_both(
        all,
        "an unconnected socket with IP_RECVERR loses nothing and does not spin",
        error_queue,
    );
    on_both(
        all,
        "a wildcard socket answers from the address that was asked",
        answers_from_the_asked_address,
    );
    on_both(
        all,
        "a wildcard socket answers a broadcast from an address of its host",
        broadcast_and_group,
    );
    on_both(
        all,
        "a local address that the host lost costs one datagram",
        lost_address,
    );
    on_both(
        all,
        "a socket bound to one address pays for no local addresses",
        bound_socket,
    );
    on_both(all, "a socket with UDP_GRO on gives each datagram as one packet", gro);
    on_both(
        all,
        "datagrams that were coalesced before attach are not delivered as one",
        gro_before,
    );
    on_both(
        all,
        "UDP_GRO switched on by another holder is found and undone",
        gro_meanwhile,
    );
    on_both(
        all,
        "a socket with UDP_SEGMENT or UDP_CORK on sends what it is given",
        segment_and_cork,
    );
    on_both(
        all,
        "timestamps and other options of a socket do no harm",
        other_options,
    );
    on_both(
        all,
        "a socket that another holder shut down gives what it has, and ends without spinning",
        shut_down,
    );
    on_both(all, ANCILLARY, ancillary);
    on_both(
        all,
        "a socket with ancillary options of its own costs no call for each receive",
        ancillary_asks_once,
    );
    on_both(
        all,
        "a first receive of many datagrams with ancillary data asks once",
        ancillary_of_many,
    );
    on_both(all, "a stream socket is refused", stream);
    on_both(
        all,
        "a descriptor that is no UDP socket is refused, and said to be none",
        no_udp,
    );
    on_both(
        all,
        "a packet without a peer or a route is refused with cause and remedy",
        no_way,
    );
    on_both(
        all,
        "a slice that is too short for a packet is named as such",
        short_slice,
    );
    common::run(trials)
}

// ---- a network that answers ----

/// A TUN device with 10.0.0.1/8 and fd00::1/64, and the far side of it in our hands.
struct Far {
    queue: OwnedFd,
    index: u32,
}

impl Far {
    fn new() -> Self {
        let queue = device::raw_tun("far0", libc::IFF_TUN | libc::IFF_NO_PI).expect("a device");
        // SAFETY: no pointers.
        unsafe { libc::fcntl(queue.as_raw_fd(), libc::F_SETFL, libc::O_NONBLOCK) };
        let netlink = Handle::new().unwrap();
        let index = netlink.index_of("far0").unwrap();
        netlink.set_up(index, true).unwrap();
        netlink.add_address(index, v4(0, 1), 8).unwrap();
        netlink.add_address(index, v6(0, 1), 64).unwrap();
        common::await_address(v6(0, 1));
        let far = Self { queue, index };
        // What went out before the address was the host's.
        far.drain();
        far
    }

    /// The next UDP packet that the host sends, within two seconds.
    fn next(&self) -> Vec<u8> {
        let mut bytes = vec![0; 65_536];
        loop {
            let len = device::read_packet(&self.queue, &mut bytes);
            if is_udp(&bytes[..len]) {
                return bytes[..len].to_vec();
            }
        }
    }

    /// How many whole or first pieces of datagrams of UDP are there.
    fn drain(&self) -> usize {
        let mut bytes = vec![0; 65_536];
        let mut count = 0;
        while let Ok(len) = device::try_read(&self.queue, &mut bytes) {
            count += usize::from(is_udp(&bytes[..len]));
        }
        count
    }

    /// Sends a datagram to the host.
    fn send(&self, from: SocketAddr, to: SocketAddr, payload: &[u8]) {
        let packet = datagram(from, to, payload);
        assert_eq!(device::write(&self.queue, &packet).unwrap(), packet.len());
    }

    /// Answers `packet` with an ICMP error. `rest` are the four bytes after the checksum.
    fn refuse(&self, packet: &[u8], kind: u8, code: u8, rest: u32) {
        let answer = icmp(packet, kind, code, rest);
        assert_eq!(device::write(&self.queue, &answer).unwrap(), answer.len());
    }
}

fn v4(high: u8, low: u8) -> IpAddr {
    Ipv4Addr::new(10, 0, high, low).into()
}

fn v6(high: u16, low: u16) -> IpAddr {
    Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, high, low).into()
}

/// Whether it is a datagram, or the first piece of one.
fn is_udp(packet: &[u8]) -> bool {
    match packet[0] >> 4 {
        4 => packet[9] == 17 && packet[6] & 0x1f == 0 && packet[7] == 0,
        _ => packet[6] == 17 || packet[6] == 44 && packet[40] == 17 && packet[42] == 0 && packet[43] & 0xf8 == 0,
    }
}

fn datagram(from: SocketAddr, to: SocketAddr, payload: &[u8]) -> Vec<u8> {
    let mut packet = Vec::new();
    match (from, to) {
        (SocketAddr::V4(from), SocketAddr::V4(to)) => PacketBuilder::ipv4(from.ip().octets(), to.ip().octets(), 64)
            .udp(from.port(), to.port())
            .write(&mut packet, payload),
        (SocketAddr::V6(from), SocketAddr::V6(to)) => PacketBuilder::ipv6(from.ip().octets(), to.ip().octets(), 64)
            .udp(from.port(), to.port())
            .write(&mut packet, payload),
        _ => panic!("two families"),
    }
    .unwrap();
    packet
}

/// Where a packet comes from, where it goes, and its payload.
fn parse(packet: &[u8]) -> (SocketAddr, SocketAddr, Vec<u8>) {
    let sliced = SlicedPacket::from_ip(packet).unwrap();
    let (from, to): (IpAddr, IpAddr) = match sliced.net.unwrap() {
        NetSlice::Ipv4(ip) => (ip.header().source_addr().into(), ip.header().destination_addr().into()),
        NetSlice::Ipv6(ip) => (ip.header().source_addr().into(), ip.header().destination_addr().into()),
        NetSlice::Arp(_) => panic!("no datagram"),
    };
    let Some(TransportSlice::Udp(udp)) = sliced.transport else {
        panic!("no datagram")
    };
    (
        SocketAddr::new(from, udp.source_port()),
        SocketAddr::new(to, udp.destination_port()),
        udp.payload().to_vec(),
    )
}

/// An ICMP error about `packet`, from where that was to go.
fn icmp(packet: &[u8], kind: u8, code: u8, rest: u32) -> Vec<u8> {
    let quoted = &packet[..packet.len().min(128)];
    let mut message = vec![kind, code, 0, 0];
    message.extend(rest.to_be_bytes());
    message.extend(quoted);
    if packet[0] >> 4 == 4 {
        let mut answer = vec![0x45, 0, 0, (20 + message.len()) as u8, 0, 0, 0, 0, 64, 1, 0, 0];
        answer.extend([&packet[16..20], &packet[12..16]].concat());
        let checksum = checksum(&[&answer]);
        answer[10..12].copy_from_slice(&checksum);
        let checksum = self::checksum(&[&message]);
        message[2..4].copy_from_slice(&checksum);
        return [answer, message].concat();
    }
    let addresses = [&packet[24..40], &packet[8..24]].concat();
    let pseudo = [&(message.len() as u32).to_be_bytes()[..], &[0, 0, 0, 58]].concat();
    let checksum = checksum(&[&addresses, &pseudo, &message]);
    message[2..4].copy_from_slice(&checksum);
    let mut answer = vec![0x60, 0, 0, 0, 0, message.len() as u8, 58, 64];
    answer.extend(addresses);
    [answer, message].concat()
}

fn checksum(parts: &[&[u8]]) -> [u8; 2] {
    let bytes = parts.concat();
    let words = bytes
        .chunks(2)
        .map(|word| u32::from(word[0]) << 8 | u32::from(*word.get(1).unwrap_or(&0)));
    let mut sum: u32 = words.sum();
    while sum > 0xffff {
        sum = (sum >> 16) + (sum & 0xffff);
    }
    (!sum as u16).to_be_bytes()
}

fn set_option(socket: &UdpSocket, level: i32, option: i32, value: i32) -> io::Result<()> {
    // SAFETY: these options read one int, which outlives the call.
    let result = unsafe { libc::setsockopt(socket.as_raw_fd(), level, option, (&raw const value).cast(), 4) };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

fn get_option(socket: &UdpSocket, level: i32, option: i32) -> i32 {
    let (mut value, mut len) = (0i32, 4);
    // SAFETY: these options write one int, which outlives the call.
    let result = unsafe { libc::getsockopt(socket.as_raw_fd(), level, option, (&raw mut value).cast(), &raw mut len) };
    assert_eq!(result, 0, "{}", io::Error::last_os_error());
    value
}

/// A moment at which nothing is under way any more.
fn soon() -> Option<Instant> {
    Some(Instant::now() + Duration::from_millis(100))
}

/// Datagrams of these lengths, without a peer.
fn datagrams(worker: &Worker, lengths: &[usize]) -> Batch {
    let mut batch = Batch::with_capacity(lengths.len());
    for &len in lengths {
        batch.push(worker.packet(len).unwrap()).unwrap();
    }
    batch
}

fn reported(worker: &Worker, port: PortId) -> BTreeMap<i32, u64> {
    worker.counters(port).unwrap().reported.iter().collect()
}

// ---- one datagram's error ----

fn multicast_interface_deleted(backend: Backend) {
    let mut worker = worker(backend);
    let queue = device::raw_tun("gone0", libc::IFF_TUN | libc::IFF_NO_PI).expect("a device");
    let index = Handle::new().unwrap().index_of("gone0").unwrap();
    let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
    let request = libc::ip_mreqn {
        imr_multiaddr: libc::in_addr { s_addr: 0 },
        imr_address: libc::in_addr { s_addr: 0 },
        imr_ifindex: index as i32,
    };
    // SAFETY: the option reads one ip_mreqn, which outlives the call.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::IPPROTO_IP,
            libc::IP_MULTICAST_IF,
            (&raw const request).cast(),
            size_of_val(&request) as u32,
        )
    };
    assert_eq!(result, 0, "{}", io::Error::last_os_error());
    drop(queue);
    let (socket_port, other) = (
        socket.local_addr().unwrap().port(),
        UdpSocket::bind("127.0.0.1:0").unwrap(),
    );
    let port = worker.attach(socket).unwrap();
    let group: SocketAddr = "239.1.1.1:9".parse().unwrap();
    for round in 0..3 {
        let mut batch = datagrams(&worker, &[10, 10, 10]);
        batch[0].set_peer(Some(other.local_addr().unwrap()));
        batch[1].set_peer(Some(group));
        batch[2].set_peer(Some(other.local_addr().unwrap()));
        let sent = worker.send_many(port, &mut batch);
        assert_eq!((sent.accepted, sent.refused, sent.stopped), (2, 1, None), "{sent:?}");
        let refusal = sent.refusal.unwrap();
        assert_eq!((refusal.raw_os_error(), refusal.is_permanent()), (libc::ENODEV, false));
        other.send_to(&[round], ("127.0.0.1", socket_port)).unwrap();
        receive(&mut worker, port, &mut batch, 1).unwrap();
        assert_eq!(batch[0][..], [round]);
    }
    assert_eq!(reported(&worker, port), BTreeMap::new());
}

// ---- ICMP ----

/// Every mode of IP_MTU_DISCOVER and IPV6_MTU_DISCOVER: don't, want, do, probe, interface, omit.
const MODES: std::ops::RangeInclusive<i32> = 0..=5;
const DONT: i32 = 0;
const DO: i32 = 2;
const INTERFACE: i32 = 4;

fn icmp4(backend: Backend) {
    use libc::*;
    // `icmp_err_convert` in net/ipv4/icmp.c; 0 where the error is not kept for a socket without
    // IP_RECVERR.
    let unreachable = [
        0,
        0,
        ENOPROTOOPT,
        ECONNREFUSED,
        EMSGSIZE,
        0,
        ENETUNREACH,
        EHOSTDOWN,
        ENONET,
        ENETUNREACH,
        EHOSTUNREACH,
        0,
        0,
        EHOSTUNREACH,
        EHOSTUNREACH,
        EHOSTUNREACH,
    ];
    let mut cases: Vec<(u8, u8, i32)> = unreachable
        .iter()
        .enumerate()
        .map(|(code, &errno)| (3, code as u8, errno))
        .collect();
    cases.extend([(4, 0, 0), (11, 0, 0), (11, 1, 0), (12, 0, EPROTO), (12, 1, EPROTO)]);
    let peer = |case: u8, mode: u8| SocketAddr::new(v4(case + 1, mode + 1), 9);
    icmp_cases(backend, &cases, IPPROTO_IP, IP_MTU_DISCOVER, (3, 4), 600, peer);
}

fn icmp6(backend: Backend) {
    use libc::*;
    // `tab_unreach` and `icmpv6_err_convert` in net/ipv6/icmp.c.
    let unreachable = [0, EACCES, 0, 0, ECONNREFUSED, EACCES, EACCES];
    let mut cases: Vec<(u8, u8, i32)> = unreachable
        .iter()
        .enumerate()
        .map(|(code, &errno)| (1, code as u8, errno))
        .collect();
    cases.extend([
        (2, 0, EMSGSIZE),
        (3, 0, 0),
        (3, 1, 0),
        (4, 0, EPROTO),
        (4, 1, EPROTO),
        (4, 2, EPROTO),
    ]);
    let peer = |case: u8, mode: u8| SocketAddr::new(v6(u16::from(case) + 1, u16::from(mode) + 1), 9);
    icmp_cases(backend, &cases, IPPROTO_IPV6, IPV6_MTU_DISCOVER, (2, 0), 1280, peer);
}

/// Each error in each mode of path-MTU discovery, met by sending and by receiving.
fn icmp_cases(
    backend: Backend,
    cases: &[(u8, u8, i32)],
    level: i32,
    option: i32,
    too_big: (u8, u8),
    mtu: u32,
    peer: impl Fn(u8, u8) -> SocketAddr,
) {
    let far = Far::new();
    let mut worker = worker(backend);
    for (number, &(kind, code, errno)) in cases.iter().enumerate() {
        for mode in MODES {
            let what = format!("type {kind} code {code} mode {mode}");
            let peer = peer(number as u8, mode as u8);
            let socket = UdpSocket::bind(if peer.is_ipv4() { "10.0.0.1:0" } else { "[fd00::1]:0" }).unwrap();
            set_option(&socket, level, option, mode).unwrap();
            socket.connect(peer).unwrap();
            let port = worker.attach(socket).unwrap();
            let is_too_big = (kind, code) == too_big;
            // Over IPv6, interface and omit do not believe what was reported
            // (`ip6_sk_accept_pmtu`).
            let deaf = mode == DONT || (mode >= INTERFACE && level == libc::IPPROTO_IPV6);
            let errno = if is_too_big && deaf { 0 } else { errno };
            let mut expected = 0;
            for receive_first in [false, true] {
                assert_eq!(
                    worker.send_many(port, &mut datagrams(&worker, &[1300])).accepted,
                    1,
                    "{what}"
                );
                // Too long by now, where the mode goes by what was reported.
                if !(is_too_big && receive_first && mode == DO) {
                    far.refuse(&far.next(), kind, code, mtu);
                    expected += u64::from(errno != 0);
                }
                if receive_first {
                    let mut batch = Batch::with_capacity(4);
                    assert_eq!(worker.try_recv_many(port, &mut batch), Ok(0), "{what}");
                }
                far.drain();
                let sent = worker.send_many(port, &mut datagrams(&worker, &[10, 20, 30, 40]));
                assert_eq!(
                    (sent.accepted, sent.refused, sent.stopped),
                    (4, 0, None),
                    "{what}: {sent:?}"
                );
                assert_eq!(far.drain(), 4, "{what}");
                let counted = if errno == 0 {
                    BTreeMap::new()
                } else {
                    BTreeMap::from([(errno, expected)])
                };
                assert_eq!(reported(&worker, port), counted, "{what}");
                if is_too_big && mode == DO && !receive_first {
                    // These are too long indeed, and it is they that are refused.
                    let sent = worker.send_many(port, &mut datagrams(&worker, &[1300, 10, 1300, 10]));
                    assert_eq!(
                        (sent.accepted, sent.refused, sent.stopped),
                        (2, 2, None),
                        "{what}: {sent:?}"
                    );
                    let refusal = sent.refusal.unwrap();
                    assert_eq!(
                        (refusal.kind(), refusal.raw_os_error()),
                        (PortErrorKind::BadPacket, libc::EMSGSIZE)
                    );
                    assert_eq!(far.drain(), 2, "{what}");
                    break;
                }
            }
            let counters = worker.detach(port).unwrap().counters;
            let refused = if is_too_big && mode == DO { 2 } else { 0 };
            assert_eq!(counters.refused_packets, refused, "{what}: {counters:?}");
        }
    }
}

fn icmp_for_every_datagram(backend: Backend) {
    let far = Far::new();
    let mut worker = worker(backend);
    // One of each sort: no other call returns it, and route, permission and length could be meant.
    for (number, (code, errno)) in [(3, libc::ECONNREFUSED), (13, libc::EHOSTUNREACH), (4, libc::EMSGSIZE)]
        .into_iter()
        .enumerate()
    {
        let socket = UdpSocket::bind("10.0.0.1:0").unwrap();
        socket.connect((v4(9, number as u8 + 1), 9)).unwrap();
        let port = worker.attach(socket).unwrap();
        far.drain();
        assert_eq!(worker.send_many(port, &mut datagrams(&worker, &[100])).accepted, 1);
        let answer = icmp(&far.next(), 3, code, 600);
        let done = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !done.load(Ordering::Relaxed) {
                    device::write(&far.queue, &answer).unwrap();
                    if code == 4 {
                        // Sixteen of these in a row without a pause are taken for the datagram's
                        // own.
                        std::thread::sleep(Duration::from_micros(200));
                    }
                }
            });
            for _ in 0..common::repeats(300, 10_000) {
                let sent = worker.send_many(port, &mut datagrams(&worker, &[10; 16]));
                let ok = (sent.accepted, sent.refused, sent.stopped) == (16, 0, None);
                if !ok {
                    done.store(true, Ordering::Relaxed);
                    panic!("{sent:?}");
                }
                far.drain();
            }
            done.store(true, Ordering::Relaxed);
        });
        // One that is surely not lost in the middle of a batch.
        device::write(&far.queue, &answer).unwrap();
        assert_eq!(worker.send_many(port, &mut datagrams(&worker, &[10])).accepted, 1);
        assert!(reported(&worker, port)[&errno] > 0);
        assert_eq!(worker.detach(port).unwrap().counters.refused_packets, 0);
    }
}

fn error_queue(backend: Backend) {
    let far = Far::new();
    let mut worker = worker(backend);
    let socket = UdpSocket::bind("10.0.0.1:0").unwrap();
    set_option(&socket, libc::IPPROTO_IP, libc::IP_RECVERR, 1).unwrap();
    let port = worker.attach(socket).unwrap();
    for round in 0..3 {
        let mut batch = datagrams(&worker, &[10; 4]);
        for packet in &mut batch[..] {
            packet.set_peer(Some(SocketAddr::new(v4(1, 1), 9)));
        }
        let sent = worker.send_many(port, &mut batch);
        assert_eq!((sent.accepted, sent.refused, sent.stopped), (4, 0, None), "{sent:?}");
        for _ in 0..4 {
            far.refuse(&far.next(), 3, 1, 0);
        }
        // Wakes for what was reported, and then not any more.
        let deadline = Instant::now() + Duration::from_secs(10) * common::slowness();
        let mut wakes = 0;
        while !worker.wait(soon()).unwrap().timer {
            assert_eq!(worker.try_recv_many(port, &mut batch), Ok(0));
            wakes += 1;
            assert!(
                wakes < 20 && Instant::now() < deadline,
                "round {round}: the worker spins"
            );
        }
    }
    assert!(reported(&worker, port)[&libc::EHOSTUNREACH] >= 3);
}

// ---- local addresses ----

/// What becomes of a packet between its arrival and the answer.
const WAYS: [&str; 8] = [
    "itself", "remote", "foreign", "split", "handoff", "another", "segments", "cut",
];

fn answers_from_the_asked_address(backend: Backend) {
    let far = Far::new();
    let netlink = Handle::new().unwrap();
    netlink.add_address(far.index, v4(0, 2), 8).unwrap();
    netlink.add_address(far.index, v6(0, 2), 64).unwrap();
    common::await_address(v6(0, 2));
    let link_local = |low| Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, low);
    for low in [7, 8] {
        netlink.add_address(far.index, link_local(low).into(), 64).unwrap();
        common::await_address(link_local(low).into());
    }
    let config = WorkerConfig {
        large_buffers: 16,
        ..config(backend)
    };
    let (mut worker, other) = (Worker::new(&config).unwrap(), Worker::new(&config).unwrap());
    for (bound, addresses, peer) in [
        ("0.0.0.0:0", [v4(0, 1), v4(0, 2)], v4(9, 9)),
        ("[::]:0", [v4(0, 1), v4(0, 2)], v4(9, 9)),
        ("[::]:0", [v6(0, 1), v6(0, 2)], v6(9, 9)),
        (
            "[::]:0",
            [link_local(7).into(), link_local(8).into()],
            link_local(99).into(),
        ),
    ] {
        let socket = UdpSocket::bind(bound).unwrap();
        let own = socket.local_addr().unwrap().port();
        let port = worker.attach(socket).unwrap();
        for (number, way) in WAYS.into_iter().cycle().take(2 * WAYS.len()).enumerate() {
            let asked = addresses[number / WAYS.len()];
            let what = format!("{bound} {asked} {way}");
            far.drain();
            let (header, payload) = tcp_superpacket(900, 300);
            far.send(SocketAddr::new(peer, 7), SocketAddr::new(asked, own), &payload);
            let mut batch = Batch::with_capacity(8);
            receive(&mut worker, port, &mut batch, 1).unwrap();
            let local = batch[0].local().unwrap();
            assert_eq!(local.ip.to_canonical(), asked, "{what}");
            assert_eq!(
                local.interface,
                if asked == v6(0, 1) || asked == v6(0, 2) || asked.is_ipv4() {
                    0
                } else {
                    far.index
                }
            );
            let packet = batch.pop().unwrap();
            let answers = answer(&mut worker, &other, way, packet, header, &mut batch);
            let sent = worker.send_many(port, &mut batch);
            assert_eq!((sent.refused, sent.stopped), (0, None), "{what}: {sent:?}");
            for _ in 0..answers {
                let (from, to, _) = parse(&far.next());
                assert_eq!(
                    (from, to),
                    (SocketAddr::new(asked, own), SocketAddr::new(peer, 7)),
                    "{what}"
                );
            }
            assert_eq!(far.drain(), 0, "{what}");
        }
        worker.detach(port).unwrap();
    }
}

/// Puts the answers to a packet into the batch. Returns how many datagrams that makes.
fn answer(
    worker: &mut Worker,
    other: &Worker,
    way: &str,
    mut packet: PacketBuf,
    header: VnetHdr,
    batch: &mut Batch,
) -> usize {
    let meta = header.check(&packet, Link::None).unwrap();
    match way {
        "remote" => packet = worker.import(packet.into_remote()).unwrap(),
        "foreign" => {
            let copy = other.import(packet.into_remote()).unwrap();
            packet = worker.import(copy.into_remote()).unwrap();
        }
        "split" => {
            batch.push(packet.split_to(10)).unwrap();
            batch.push(packet).unwrap();
            return 2;
        }
        "handoff" => {
            let (port, mut handoff) = worker.open_handoff(8).unwrap();
            batch.push(packet).unwrap();
            assert_eq!(handoff.send_many(batch).accepted, 1);
            receive(worker, port, batch, 1).unwrap();
            worker.detach(port).unwrap();
            return 1;
        }
        "another" => {
            let mut fresh = worker.packet_from(b"an answer").unwrap();
            fresh.set_peer(packet.peer());
            fresh.set_local(packet.local());
            packet = fresh;
        }
        "segments" => {
            packet.set_meta(meta).unwrap();
            return packet.split_into(batch).unwrap();
        }
        "cut" => {
            packet.set_meta(meta).unwrap();
            batch.push(packet).unwrap();
            return 3;
        }
        _ => {}
    }
    batch.push(packet).unwrap();
    1
}

/// A superpacket of TCP with so many bytes of payload.
fn tcp_superpacket(payload: usize, size: u16) -> (VnetHdr, Vec<u8>) {
    let mut packet = Vec::new();
    PacketBuilder::ipv4([10, 1, 0, 1], [10, 1, 0, 2], 64)
        .tcp(1, 2, 3, 100)
        .ack(4)
        .write(&mut packet, &vec![5; payload])
        .unwrap();
    let seed = tun_driver::offload::checksum::pseudo_header(&packet[12..16], &packet[16..20], 6, payload as u32 + 20);
    packet[36..38].copy_from_slice(&seed.seed());
    let mut header = [1, 1, 0, 0, 0, 0, 0, 0, 0, 0];
    header[2..4].copy_from_slice(&40u16.to_ne_bytes());
    header[4..6].copy_from_slice(&size.to_ne_bytes());
    header[6..8].copy_from_slice(&20u16.to_ne_bytes());
    header[8..10].copy_from_slice(&16u16.to_ne_bytes());
    (VnetHdr::from_bytes(header), packet)
}

fn broadcast_and_group(backend: Backend) {
    let far = Far::new();
    let mut worker = worker(backend);
    for bound in ["0.0.0.0:0", "[::]:0"] {
        let socket = UdpSocket::bind(bound).unwrap();
        set_option(&socket, libc::SOL_SOCKET, libc::SO_BROADCAST, 1).unwrap();
        if bound.starts_with('[') {
            socket
                .join_multicast_v6(&Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 0x77), far.index)
                .unwrap();
        } else {
            socket
                .join_multicast_v4(&Ipv4Addr::new(239, 1, 1, 1), &Ipv4Addr::new(10, 0, 0, 1))
                .unwrap();
        }
        let own = socket.local_addr().unwrap().port();
        let port = worker.attach(socket).unwrap();
        let mut asked: Vec<(IpAddr, IpAddr)> = vec![(v4(9, 9), Ipv4Addr::new(10, 255, 255, 255).into())];
        if bound.starts_with('[') {
            asked.push((v6(9, 9), Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 0x77).into()));
        } else {
            asked.push((v4(9, 9), Ipv4Addr::new(239, 1, 1, 1).into()));
        }
        for (peer, group) in asked {
            far.drain();
            far.send(SocketAddr::new(peer, 7), SocketAddr::new(group, own), b"all of you");
            let mut batch = Batch::with_capacity(8);
            receive(&mut worker, port, &mut batch, 1).unwrap();
            let local = batch[0].local().map(|local| local.ip.to_canonical());
            assert_eq!(local, group.is_ipv4().then_some(v4(0, 1)), "{group}");
            assert_eq!(worker.send_many(port, &mut batch).accepted, 1, "{group}");
            let (from, to, _) = parse(&far.next());
            assert_eq!(to, SocketAddr::new(peer, 7));
            assert!(!from.ip().is_multicast() && from.port() == own, "{group}: from {from}");
        }
        worker.detach(port).unwrap();
    }
}

fn lost_address(backend: Backend) {
    let far = Far::new();
    let netlink = Handle::new().unwrap();
    netlink.add_address(far.index, v4(0, 2), 8).unwrap();
    let mut worker = worker(backend);
    let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
    let own = socket.local_addr().unwrap().port();
    let port = worker.attach(socket).unwrap();
    let mut batch = Batch::with_capacity(8);
    for low in [1, 2, 1] {
        far.send(SocketAddr::new(v4(9, 9), 7), SocketAddr::new(v4(0, low), own), &[low]);
    }
    receive(&mut worker, port, &mut batch, 3).unwrap();
    netlink.del_address(far.index, v4(0, 2), 8).unwrap();
    let sent = worker.send_many(port, &mut batch);
    assert_eq!((sent.accepted, sent.refused, sent.stopped), (2, 1, None), "{sent:?}");
    let errno = sent.refusal.unwrap().raw_os_error();
    assert!(matches!(errno, libc::EINVAL | libc::ENETUNREACH), "{errno}");
    // Another peer is another conversation: the kernel chooses.
    far.send(SocketAddr::new(v4(9, 9), 7), SocketAddr::new(v4(0, 1), own), b"x");
    receive(&mut worker, port, &mut batch, 1).unwrap();
    batch[0].set_local(Some(LocalAddr::from(v4(0, 2))));
    batch[0].set_peer(Some(SocketAddr::new(v4(8, 8), 7)));
    assert_eq!(batch[0].local(), None);
    assert_eq!(worker.send_many(port, &mut batch).accepted, 1);
}

fn bound_socket(backend: Backend) {
    let far = Far::new();
    let mut worker = worker(backend);
    let (bound, connected) = (
        UdpSocket::bind("10.0.0.1:0").unwrap(),
        UdpSocket::bind("0.0.0.0:0").unwrap(),
    );
    connected.connect((v4(9, 9), 7)).unwrap();
    for socket in [bound, connected] {
        let own = socket.local_addr().unwrap();
        let port = worker.attach(socket).unwrap();
        let socket = worker.udp(port).unwrap();
        assert_eq!(get_option(socket, libc::IPPROTO_IP, libc::IP_PKTINFO), 0);
        far.drain();
        far.send(SocketAddr::new(v4(9, 9), 7), own, b"x");
        let mut batch = Batch::with_capacity(8);
        receive(&mut worker, port, &mut batch, 1).unwrap();
        assert_eq!(batch[0].local(), None);
        // It sends from where it is bound, whatever is said.
        batch[0].set_local(Some(LocalAddr::from(v4(7, 7))));
        assert_eq!(worker.send_many(port, &mut batch).accepted, 1);
        assert_eq!(parse(&far.next()).0, own);
    }
}

// ---- options that others set ----

const SOL_UDP: i32 = 17;
const UDP_CORK: i32 = 1;
const UDP_SEGMENT: i32 = 103;
const UDP_GRO: i32 = 104;

/// Two sockets on loopback, connected with each other.
fn pair() -> (UdpSocket, UdpSocket) {
    let bind = || UdpSocket::bind("127.0.0.1:0").unwrap();
    let (a, b) = (bind(), bind());
    a.connect(b.local_addr().unwrap()).unwrap();
    b.connect(a.local_addr().unwrap()).unwrap();
    b.set_read_timeout(Some(Duration::from_secs(5) * common::slowness()))
        .unwrap();
    (a, b)
}

/// Sends `count` datagrams of 500 bytes as one superpacket.
fn send_group(socket: &UdpSocket, count: u8) {
    set_option(socket, SOL_UDP, UDP_SEGMENT, 500).unwrap();
    let bytes: Vec<u8> = (0..count).flat_map(|number| [number; 500]).collect();
    assert_eq!(socket.send(&bytes).unwrap(), bytes.len());
}

fn need_gro(socket: &UdpSocket) {
    if let Err(error) = set_option(socket, SOL_UDP, UDP_GRO, 1) {
        common::skip(format!("this kernel has no UDP_GRO: {error}"));
    }
}

fn gro(backend: Backend) {
    let (ours, theirs) = pair();
    need_gro(&ours);
    let mut worker = worker(backend);
    let port = worker.attach(ours).unwrap();
    for count in [2, 10] {
        send_group(&theirs, count);
        let mut batch = Batch::with_capacity(64);
        receive(&mut worker, port, &mut batch, usize::from(count)).unwrap();
        let got: Vec<_> = batch.iter().map(|packet| (packet.len(), packet[0])).collect();
        assert_eq!(got, (0..count).map(|number| (500, number)).collect::<Vec<_>>());
    }
    let detached = worker.detach(port).unwrap();
    assert_eq!(detached.counters.truncated, 0);
    assert_eq!(
        get_option(&detached.endpoint.into_udp().unwrap(), SOL_UDP, UDP_GRO),
        1,
        "as it was"
    );
}

fn gro_before(backend: Backend) {
    let (ours, theirs) = pair();
    need_gro(&ours);
    send_group(&theirs, 2);
    let mut worker = worker(backend);
    let port = worker.attach(ours).unwrap();
    let mut batch = Batch::with_capacity(64);
    let error = worker.try_recv_many(port, &mut batch).unwrap_err();
    assert_eq!(error.kind(), PortErrorKind::Truncated);
    assert_eq!(worker.counters(port).unwrap().truncated, 1);
    send_group(&theirs, 2);
    receive(&mut worker, port, &mut batch, 2).unwrap();
    assert!(batch.iter().all(|packet| packet.len() == 500));
}

fn gro_meanwhile(backend: Backend) {
    for wildcard in [false, true] {
        let (mut ours, theirs) = pair();
        if wildcard {
            ours = UdpSocket::bind("0.0.0.0:0").unwrap();
            theirs
                .connect(("127.0.0.1", ours.local_addr().unwrap().port()))
                .unwrap();
        }
        let holder = ours.try_clone().unwrap();
        let mut worker = worker(backend);
        let port = worker.attach(ours).unwrap();
        need_gro(&holder);
        send_group(&theirs, 3);
        let mut batch = Batch::with_capacity(64);
        assert!(
            !worker
                .wait(Some(Instant::now() + Duration::from_secs(5)))
                .unwrap()
                .timer
        );
        let error = worker.try_recv_many(port, &mut batch).unwrap_err();
        assert_eq!((error.kind(), batch.len()), (PortErrorKind::Truncated, 0));
        send_group(&theirs, 3);
        receive(&mut worker, port, &mut batch, 3).unwrap();
        assert!(batch.iter().all(|packet| packet.len() == 500));
        assert_eq!(get_option(&holder, SOL_UDP, UDP_GRO), 0);
    }
}

const ANCILLARY: &str = "a socket with ancillary options of its own gives each datagram";
const DATAGRAMS: u8 = 100;

/// Options of ip(7) that make the kernel say more of each datagram.
fn ancillary(backend: Backend) {
    for options in [
        &[libc::IP_RECVTTL][..],
        &[libc::IP_RECVTTL, libc::IP_RECVTOS, libc::IP_PKTINFO],
    ] {
        let (ours, theirs) = pair();
        for &option in options {
            set_option(&ours, libc::IPPROTO_IP, option, 1).unwrap();
        }
        let holder = ours.try_clone().unwrap();
        let mut worker = worker(backend);
        let port = worker.attach(ours).unwrap();
        let mut batch = Batch::with_capacity(64);
        for number in 0..DATAGRAMS {
            theirs.send(&[number; 100]).unwrap();
            receive(&mut worker, port, &mut batch, 1).unwrap();
            assert_eq!((batch[0].len(), batch[0][0]), (100, number));
            assert_eq!(batch[0].local(), None, "the socket has one address");
            batch.clear();
        }
        // What another holder switches on is still found.
        if set_option(&holder, SOL_UDP, UDP_GRO, 1).is_ok() {
            send_group(&theirs, 3);
            assert!(
                !worker
                    .wait(Some(Instant::now() + Duration::from_secs(5)))
                    .unwrap()
                    .timer
            );
            let error = worker.try_recv_many(port, &mut batch).unwrap_err();
            assert_eq!((error.kind(), batch.len()), (PortErrorKind::Truncated, 0));
            send_group(&theirs, 3);
            receive(&mut worker, port, &mut batch, 3).unwrap();
            assert!(batch.iter().all(|packet| packet.len() == 500));
        }
        for &option in options {
            assert_eq!(get_option(&holder, libc::IPPROTO_IP, option), 1, "as it was");
        }
    }
}

fn ancillary_asks_once(backend: Backend) {
    let trace = common::traced(&named(ANCILLARY, backend), "getsockopt");
    let asked = trace.matches("getsockopt(").count();
    // Some when a port is attached.
    assert!(asked < usize::from(DATAGRAMS), "asked {asked} times");
}

/// One receive that takes several calls.
fn ancillary_of_many(backend: Backend) {
    let (ours, theirs) = pair();
    set_option(&ours, libc::IPPROTO_IP, libc::IP_RECVTTL, 1).unwrap();
    let mut worker = worker(backend);
    let port = worker.attach(ours).unwrap();
    (0..150).for_each(|number| assert_eq!(theirs.send(&[number; 100]).unwrap(), 100));
    let mut batch = Batch::with_capacity(200);
    assert_eq!(worker.try_recv_many(port, &mut batch), Ok(150));
    // Three calls of at most 64 datagrams, and the question.
    assert_eq!(worker.counters(port).unwrap().system_calls, 4);
}

fn segment_and_cork(backend: Backend) {
    for option in [UDP_SEGMENT, UDP_CORK] {
        let (ours, theirs) = pair();
        if let Err(error) = set_option(&ours, SOL_UDP, option, 400) {
            common::skip(format!("this kernel has no UDP_SEGMENT: {error}"));
        }
        let before = get_option(&ours, SOL_UDP, option);
        let mut worker = worker(backend);
        let port = worker.attach(ours).unwrap();
        assert_eq!(
            worker
                .send_many(port, &mut datagrams(&worker, &[1000, 10, 500]))
                .accepted,
            3
        );
        for len in [1000, 10, 500] {
            assert_eq!(
                common::again(|| theirs.recv(&mut [0; 2000])).unwrap(),
                len,
                "option {option}"
            );
        }
        let socket = worker.detach(port).unwrap().endpoint.into_udp().unwrap();
        assert_eq!(get_option(&socket, SOL_UDP, option), before, "as it was");
    }
}

fn other_options(backend: Backend) {
    const SO_TIMESTAMPING_NEW: i32 = 65;
    let far = Far::new();
    let mut worker = worker(backend);
    let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
    let own = socket.local_addr().unwrap().port();
    let sockets = [
        (libc::SO_RXQ_OVFL, 1),
        (libc::SO_TIMESTAMPNS, 1),
        (libc::SO_PEEK_OFF, 3),
        (libc::SO_NO_CHECK, 1),
        // Of what is sent and received, in software: the error queue fills with what was sent.
        (SO_TIMESTAMPING_NEW, (1 << 1) | (1 << 3) | (1 << 4)),
    ];
    for (option, value) in sockets {
        set_option(&socket, libc::SOL_SOCKET, option, value).unwrap();
    }
    for option in [
        libc::IP_RECVTTL,
        libc::IP_RECVTOS,
        libc::IP_RECVOPTS,
        libc::IP_RECVORIGDSTADDR,
        libc::IP_RECVERR,
    ] {
        set_option(&socket, libc::IPPROTO_IP, option, 1).unwrap();
    }
    socket
        .set_read_timeout(Some(Duration::from_secs(1) * common::slowness()))
        .unwrap();
    let port = worker.attach(socket).unwrap();
    let mut batch = Batch::with_capacity(64);
    for round in 0..10 {
        for number in 0..3 {
            far.send(
                SocketAddr::new(v4(9, 9), 7),
                SocketAddr::new(v4(0, 1), own),
                &[number, round],
            );
        }
        receive(&mut worker, port, &mut batch, 3).unwrap();
        for (number, packet) in batch.iter().enumerate() {
            assert_eq!(packet[..], [number as u8, round]);
            assert_eq!(packet.local(), Some(LocalAddr::from(v4(0, 1))));
        }
        assert_eq!(worker.send_many(port, &mut batch).accepted, 3);
        for _ in 0..3 {
            let (from, _, payload) = parse(&far.next());
            assert_eq!((from, payload[1]), (SocketAddr::new(v4(0, 1), own), round));
        }
        assert_eq!(far.drain(), 0);
    }
    let mut wakes = 0;
    while !worker.wait(soon()).unwrap().timer {
        assert_eq!(worker.try_recv_many(port, &mut batch), Ok(0));
        wakes += 1;
        assert!(wakes < 20, "the worker spins");
    }
}

/// The socket is readable from then on, with and without datagrams (`datagram_poll`).
fn shut_down(backend: Backend) {
    for how in [libc::SHUT_RD, libc::SHUT_RDWR] {
        let (ours, theirs) = pair();
        let holder = ours.try_clone().unwrap();
        let mut worker = worker(backend);
        let port = worker.attach(ours).unwrap();
        assert_eq!(worker.wait(Some(Instant::now())).unwrap().ready, 0);
        theirs.send(b"first").unwrap();
        // SAFETY: no pointers.
        unsafe { libc::shutdown(holder.as_raw_fd(), how) };
        let mut batch = Batch::with_capacity(4);
        receive(&mut worker, port, &mut batch, 1).unwrap();
        assert_eq!(batch[0][..], *b"first");
        batch.clear();
        let (mut wakes, mut gone) = (0, 0);
        while !worker.wait(soon()).unwrap().timer {
            match worker.try_recv_many(port, &mut batch) {
                Ok(got) => assert_eq!(got, 0),
                Err(error) => {
                    let kind = (error.kind(), error.raw_os_error());
                    assert_eq!(kind, (PortErrorKind::Gone, libc::ESHUTDOWN), "{error}");
                    gone += 1;
                }
            }
            wakes += 1;
            assert!(wakes < 20, "the worker spins");
        }
        assert_eq!(gone, 1);
        // The others go on.
        let (ours, theirs) = pair();
        let other = worker.attach(ours).unwrap();
        theirs.send(b"second").unwrap();
        receive(&mut worker, other, &mut batch, 1).unwrap();
        assert_eq!(batch[0][..], *b"second");
        worker.detach(port).unwrap();
    }
}

fn stream(backend: Backend) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let socket = UdpSocket::from(OwnedFd::from(listener));
    let error = worker(backend).attach(socket).unwrap_err();
    assert_eq!(error.kind(), OpenErrorKind::InvalidSetting, "{error}");
}

fn no_udp(backend: Backend) {
    let mut worker = worker(backend);
    // SAFETY: no pointers; the descriptor is new.
    let socket = |family, kind, protocol| unsafe {
        let fd = libc::socket(family, kind | libc::SOCK_CLOEXEC, protocol);
        assert!(fd >= 0, "{family} {kind} {protocol}: {}", io::Error::last_os_error());
        OwnedFd::from_raw_fd(fd)
    };
    let (datagrams, udp_lite) = (libc::SOCK_DGRAM, 136);
    let mut foreign = vec![
        socket(libc::AF_UNIX, datagrams, 0),
        socket(libc::AF_PACKET, datagrams, 0),
        socket(libc::AF_NETLINK, datagrams, libc::NETLINK_ROUTE),
        socket(libc::AF_INET, libc::SOCK_RAW, libc::IPPROTO_UDP),
    ];
    // SAFETY: as above. Newer kernels have no UDP-Lite.
    let lite = unsafe { libc::socket(libc::AF_INET, datagrams | libc::SOCK_CLOEXEC, udp_lite) };
    if lite >= 0 {
        // SAFETY: as above.
        foreign.push(unsafe { OwnedFd::from_raw_fd(lite) });
    }
    for fd in foreign {
        let error = worker.attach(UdpSocket::from(fd)).expect_err("no UDP socket");
        assert_eq!(error.kind(), OpenErrorKind::InvalidSetting, "{error}");
        assert!(error.detail().contains("attach a UDP socket"), "{error}");
    }
    // SAFETY: no pointers; the descriptor is new.
    let eventfd = unsafe { OwnedFd::from_raw_fd(libc::eventfd(0, libc::EFD_CLOEXEC)) };
    for fd in [File::open("/dev/null").unwrap().into(), eventfd] {
        let error = worker.attach(UdpSocket::from(fd)).expect_err("no socket");
        assert_eq!(error.raw_os_error(), Some(libc::ENOTSOCK));
        assert!(error.detail().contains("is not a socket"), "{error}");
    }
    for address in ["127.0.0.1:0", "[::1]:0"] {
        worker.attach(UdpSocket::bind(address).unwrap()).unwrap();
    }
}

fn no_way(backend: Backend) {
    let mut worker = worker(backend);
    let port = worker.attach(UdpSocket::bind("0.0.0.0:0").unwrap()).unwrap();
    let mut refusal = |peer: Option<&str>| {
        let mut batch = datagrams(&worker, &[10]);
        batch[0].set_peer(peer.map(|peer| peer.parse().unwrap()));
        worker.send_many(port, &mut batch).refusal.expect("refused").to_string()
    };
    for (peer, words) in [
        (None, "PacketBuf::set_peer"),
        (Some("[::1]:9"), "another address family"),
        (Some("10.99.0.1:9"), "add a route"),
    ] {
        let text = refusal(peer);
        assert!(text.contains(words), "{text}");
    }
}

fn short_slice(backend: Backend) {
    let mut worker = worker(backend);
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    let other = UdpSocket::bind("127.0.0.1:0").unwrap();
    other.connect(socket.local_addr().unwrap()).unwrap();
    let port = worker.attach(socket).unwrap();
    other.send(b"two bytes and more").unwrap();
    let error = worker.recv(port, &mut [0]).unwrap_err();
    assert_eq!(error.kind(), PortErrorKind::Truncated);
    assert!(error.to_string().contains("longer than the slice"), "{error}");
}
