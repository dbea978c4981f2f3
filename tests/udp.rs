//! UDP ports against a network that answers: ICMP errors, options that others set on a socket, and wildcard sockets with several addresses.

mod common;
mod device;
mod offer;

use std::collections::BTreeMap;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use offer::{on_both, receive, worker};
use tun_driver::netlink::Handle;
use tun_driver::{Backend, Batch, PortErrorKind, PortId, Worker};

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
    common::run(trials)
}

// ---- a network that answers ----

/// A TUN device with 10.0.0.1/8 and fd00::1/64, and the far side of it in our hands.
struct Far {
    queue: OwnedFd,
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
        await_address(v6(0, 1));
        Self { queue }
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

    /// Answers `packet` with an ICMP error. `rest` are the four bytes after the checksum.
    fn refuse(&self, packet: &[u8], kind: u8, code: u8, rest: u32) {
        let answer = icmp(packet, kind, code, rest);
        assert_eq!(device::write(&self.queue, &answer).unwrap(), answer.len());
    }
}

/// Waits until the host answers to an IPv6 address: it becomes usable a little after it was added.
fn await_address(address: IpAddr) {
    let socket = loop_until(|| UdpSocket::bind((address, 0)).ok());
    socket.set_nonblocking(true).unwrap();
    loop_until(|| {
        socket.send_to(&[1], socket.local_addr().unwrap()).ok()?;
        socket.recv(&mut [0]).ok()
    });
}

/// Asks every millisecond, for at most ten seconds.
fn loop_until<T>(mut ask: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        if let Some(answer) = ask() {
            return answer;
        }
        assert!(Instant::now() < deadline, "it does not come");
        std::thread::sleep(Duration::from_millis(1));
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
    // `icmp_err_convert` in net/ipv4/icmp.c; 0 where the error is not kept for a socket without IP_RECVERR.
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
            // Over IPv6, interface and omit do not believe what was reported (`ip6_sk_accept_pmtu`).
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
                        // Sixteen of these in a row without a pause are taken for the datagram's own.
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
        let deadline = Instant::now() + Duration::from_secs(10);
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
