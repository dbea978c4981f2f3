//! The laboratory itself: what the other tests and the benchmarks stand on.

mod common;

use std::collections::HashSet;
use std::fs;
use std::net::{IpAddr, UdpSocket};
use std::os::fd::AsFd;
use std::os::linux::fs::MetadataExt;
use std::process::Command;
use std::thread;
use std::time::Duration;

use common::{need_tun, trial};
use tun_driver::lab::{Namespace, Sandbox, sysctl};
use tun_driver::netlink::{Handle, RequestError};
use tun_driver::{Iface, Mode};

fn main() {
    common::run(vec![
        trial(
            "a trial stands alone in its namespace, loopback up",
            alone_with_loopback,
        ),
        trial(
            "a namespace is another one, and its sockets stay in it",
            namespace_is_another,
        ),
        trial("a panic inside a namespace reaches the caller", panic_in_namespace),
        trial("a setting is the namespace's own", sysctl_is_local),
        trial("a thread can sandbox itself again", sandbox_again),
        trial("child processes start inside", children_start_inside),
        trial("netlink: what is set on a link is read back", link_settings),
        trial(
            "netlink: packets pass a veth pair over two namespaces",
            veth_between_namespaces,
        ),
        trial("netlink: bridge and its ports", bridge_ports),
        trial("netlink: addresses and routes come and go", addresses_and_routes),
        trial("netlink: a refusal names request, errno and reason", refusals),
        trial("netlink: a TUN device is described", tun_is_described),
    ])
}

fn inode() -> u64 {
    fs::metadata("/proc/thread-self/ns/net").unwrap().st_ino()
}

fn devices() -> HashSet<String> {
    let table = fs::read_to_string("/proc/thread-self/net/dev").unwrap();
    table
        .lines()
        .skip(2)
        .filter_map(|line| Some(line.split_once(':')?.0.trim().to_owned()))
        .collect()
}

fn alone_with_loopback() {
    // Kernels with tunnel modules built in put their fallback devices (sit0, tunl0, …) into each namespace; real ones are not among them.
    assert!(devices().contains("lo"));
    assert!(
        !devices().contains("eth0"),
        "the host's devices are visible: {:?}",
        devices()
    );
    assert_ne!(inode(), fs::metadata("/proc/1/ns/net").map_or(0, |host| host.st_ino()));
    let receiver = UdpSocket::bind("127.0.0.1:0").unwrap();
    let sender = UdpSocket::bind("127.0.0.1:0").unwrap();
    sender.send_to(b"up", receiver.local_addr().unwrap()).unwrap();
    assert_eq!(receiver.recv(&mut [0; 16]).unwrap(), 2);
}

fn namespace_is_another() {
    let here = inode();
    let other = Namespace::new().unwrap();
    let there = other.run(inode).unwrap();
    assert_ne!(here, there);
    assert_eq!(inode(), here, "the caller does not move");
    let fd = fs::metadata(format!(
        "/proc/self/fd/{}",
        std::os::fd::AsRawFd::as_raw_fd(&other.as_fd())
    ))
    .unwrap();
    assert_eq!(fd.st_ino(), there);

    // The same port twice: only possible in two namespaces.
    let first = UdpSocket::bind("127.0.0.1:4000").unwrap();
    let second = other.run(|| UdpSocket::bind("127.0.0.1:4000").unwrap()).unwrap();
    let stranger = UdpSocket::bind("127.0.0.1:0").unwrap();
    second.set_nonblocking(true).unwrap();
    stranger.send_to(b"x", "127.0.0.1:4000").unwrap();
    assert_eq!(first.recv(&mut [0; 4]).unwrap(), 1);
    assert_eq!(
        second.recv(&mut [0; 4]).unwrap_err().kind(),
        std::io::ErrorKind::WouldBlock
    );

    thread::spawn(move || {
        other.enter().unwrap();
        assert_eq!(inode(), there);
    })
    .join()
    .unwrap();
}

fn panic_in_namespace() {
    let other = Namespace::new().unwrap();
    let outcome = std::panic::catch_unwind(|| {
        other
            .run(|| std::panic::resume_unwind(Box::new("inside")))
            .map(|(): ()| ())
            .unwrap();
    });
    assert_eq!(*outcome.unwrap_err().downcast::<&str>().unwrap(), "inside");
}

fn sysctl_is_local() {
    let read = || {
        fs::read_to_string("/proc/sys/net/ipv4/ip_forward")
            .unwrap()
            .trim()
            .to_owned()
    };
    let other = Namespace::new().unwrap();
    sysctl("net/ipv4/ip_forward", 1).unwrap();
    assert_eq!(read(), "1");
    other.run(|| sysctl("net/ipv4/ip_forward", 0)).unwrap().unwrap();
    assert_eq!(other.run(read).unwrap(), "0");
    assert_eq!(read(), "1");

    assert_eq!(
        sysctl("kernel/hostname", "x").unwrap_err().kind(),
        std::io::ErrorKind::InvalidInput
    );
    assert_eq!(
        sysctl("net/../kernel/hostname", "x").unwrap_err().kind(),
        std::io::ErrorKind::InvalidInput
    );
    let unknown = sysctl("net/ipv4/no_such_setting", 1).unwrap_err();
    assert!(unknown.to_string().contains("no_such_setting"), "{unknown}");
}

fn sandbox_again() {
    let before = inode();
    let sandbox = Sandbox::enter().unwrap();
    assert_ne!(inode(), before);
    assert!(
        !sandbox.is_rootless(),
        "the process is privileged over its namespaces by now"
    );
}

fn children_start_inside() {
    let output = Command::new("readlink").arg("/proc/self/ns/net").output().unwrap();
    assert!(output.status.success());
    assert_eq!(
        String::from_utf8(output.stdout).unwrap().trim(),
        format!("net:[{}]", inode())
    );
}

fn ip(address: &str) -> IpAddr {
    address.parse().unwrap()
}

fn errno(error: &std::io::Error) -> Option<i32> {
    RequestError::of(error).expect("an error of netlink").raw_os_error()
}

fn link_settings() {
    let netlink = Handle::new().unwrap();
    let (left, right) = netlink.add_veth("left", "right").unwrap();
    assert_ne!(left, right);
    netlink.set_mtu(left, 1400).unwrap();
    netlink.set_txqueuelen(left, 77).unwrap();
    netlink.set_mac(left, [2, 0, 0, 0, 0, 1]).unwrap();
    netlink.set_gso_max_size(left, 20_000).unwrap();
    netlink.set_gro_max_size(left, 30_000).unwrap();
    netlink.rename(left, "port").unwrap();
    netlink.set_up(left, true).unwrap();
    let link = netlink.link(left).unwrap();
    assert_eq!(
        (link.index, link.name.as_str(), link.kind.as_str()),
        (left, "port", "veth")
    );
    assert_eq!(
        (link.mtu, link.txqueuelen, link.mac),
        (1400, 77, Some([2, 0, 0, 0, 0, 1]))
    );
    assert_eq!((link.gso_max_size, link.gro_max_size), (Some(20_000), Some(30_000)));
    assert!(link.num_tx_queues >= 1 && link.num_rx_queues >= 1);
    assert!(link.up && !link.running, "no carrier while the other end is down");
    netlink.set_up(right, true).unwrap();
    assert!(netlink.link(left).unwrap().running);
    netlink.set_up(left, false).unwrap();
    assert!(!netlink.link(left).unwrap().up);
    assert_eq!(netlink.index_of("port").unwrap(), left);

    let names: HashSet<_> = netlink.links().unwrap().into_iter().map(|link| link.name).collect();
    assert_eq!(names, devices(), "the dump has what /proc has");

    netlink.delete(left).unwrap();
    assert_eq!(errno(&netlink.index_of("port").unwrap_err()), Some(libc::ENODEV));
    assert_eq!(
        errno(&netlink.link(right).unwrap_err()),
        Some(libc::ENODEV),
        "the other end goes too"
    );
}

fn veth_between_namespaces() {
    let netlink = Handle::new().unwrap();
    let other = Namespace::new().unwrap();
    let (near, far) = netlink.add_veth("near", "far").unwrap();
    netlink.move_to_namespace(far, other.as_fd()).unwrap();
    assert_eq!(errno(&netlink.index_of("far").unwrap_err()), Some(libc::ENODEV));
    netlink.add_address(near, ip("10.0.0.1"), 24).unwrap();
    netlink.add_address(near, ip("fd00::1"), 64).unwrap();
    netlink.set_up(near, true).unwrap();
    // A handle belongs to the namespace it was made in, wherever it is used.
    let there = other.run(Handle::new).unwrap().unwrap();
    let far = there.index_of("far").unwrap();
    there.add_address(far, ip("10.0.0.2"), 24).unwrap();
    there.add_address(far, ip("fd00::2"), 64).unwrap();
    there.set_up(far, true).unwrap();
    let near_mac = netlink.link(near).unwrap().mac.unwrap();
    let far_mac = there.link(far).unwrap().mac.unwrap();
    netlink.add_neighbour(near, ip("10.0.0.2"), far_mac).unwrap();
    netlink.add_neighbour(near, ip("fd00::2"), far_mac).unwrap();
    there.add_neighbour(far, ip("10.0.0.1"), near_mac).unwrap();

    for (bound, target) in [("10.0.0.2:5000", "10.0.0.1:0"), ("[fd00::2]:5000", "[fd00::1]:0")] {
        let receiver = other.run(|| UdpSocket::bind(bound).unwrap()).unwrap();
        receiver.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        let sender = UdpSocket::bind(target).unwrap();
        let before = netlink.stats(near).unwrap();
        assert_eq!(sender.send_to(&[7; 100], bound).unwrap(), 100);
        let (length, from) = receiver.recv_from(&mut [0; 200]).unwrap();
        assert_eq!((length, from), (100, sender.local_addr().unwrap()));
        let sent = netlink.stats(near).unwrap().since(&before);
        assert_eq!((sent.tx_packets, sent.tx_errors, sent.tx_dropped), (1, 0, 0), "{bound}");
        assert!(sent.tx_bytes > 100);
    }
}

fn bridge_ports() {
    let netlink = Handle::new().unwrap();
    let bridge = match netlink.add_bridge("bridge") {
        Err(error) if errno(&error) == Some(libc::EOPNOTSUPP) => common::skip("this kernel has no bridge"),
        result => result.unwrap(),
    };
    assert_eq!(netlink.link(bridge).unwrap().kind, "bridge");
    let (port, _) = netlink.add_veth("port", "peer").unwrap();
    assert_eq!(netlink.link(port).unwrap().master, None);
    netlink.set_master(port, Some(bridge)).unwrap();
    assert_eq!(netlink.link(port).unwrap().master, Some(bridge));
    netlink.set_master(port, None).unwrap();
    assert_eq!(netlink.link(port).unwrap().master, None);
}

fn addresses_and_routes() {
    let netlink = Handle::new().unwrap();
    let (left, right) = netlink.add_veth("left", "right").unwrap();
    netlink.set_up(left, true).unwrap();
    netlink.set_up(right, true).unwrap();
    // Which source address the kernel would take tells which route it found; nothing is sent by connect(2).
    let source = |target: &str| -> std::io::Result<IpAddr> {
        let any = if target.starts_with('[') { "[::]:0" } else { "0.0.0.0:0" };
        let socket = UdpSocket::bind(any)?;
        socket.connect(target)?;
        Ok(socket.local_addr()?.ip())
    };
    for (own, prefix, net, net_prefix, gateway, target) in [
        ("10.1.0.1", 24, "198.18.0.0", 15, "10.1.0.2", "198.19.1.1:9"),
        ("fd00:1::1", 64, "fd00:2::", 32, "fd00:1::2", "[fd00:2::9]:9"),
    ] {
        netlink.add_address(left, ip(own), prefix).unwrap();
        assert_eq!(
            errno(&netlink.add_address(left, ip(own), prefix).unwrap_err()),
            Some(libc::EEXIST)
        );
        source(target).unwrap_err();
        for gateway in [None, Some(ip(gateway))] {
            netlink.add_route(ip(net), net_prefix, gateway, left).unwrap();
            assert_eq!(source(target).unwrap(), ip(own));
            netlink.del_route(ip(net), net_prefix).unwrap();
            source(target).unwrap_err();
        }
        netlink.add_blackhole(ip(net), net_prefix).unwrap();
        source(target).unwrap_err();
        netlink.del_route(ip(net), net_prefix).unwrap();
        assert_eq!(
            errno(&netlink.del_route(ip(net), net_prefix).unwrap_err()),
            Some(libc::ESRCH)
        );

        let any = if ip(own).is_ipv4() { ip("0.0.0.0") } else { ip("::") };
        netlink.add_route(any, 0, None, left).unwrap();
        assert_eq!(source(target).unwrap(), ip(own), "the default route");
        netlink.del_route(any, 0).unwrap();
        netlink.del_address(left, ip(own), prefix).unwrap();
        assert_eq!(
            errno(&netlink.del_address(left, ip(own), prefix).unwrap_err()),
            Some(libc::EADDRNOTAVAIL)
        );
    }
}

fn refusals() {
    let netlink = Handle::new().unwrap();
    let (left, _) = netlink.add_veth("left", "right").unwrap();
    let taken = netlink.add_veth("left", "other").unwrap_err();
    assert_eq!(taken.kind(), std::io::ErrorKind::AlreadyExists);
    assert_eq!(errno(&taken), Some(libc::EEXIST));
    assert!(taken.to_string().starts_with("RTM_NEWLINK (veth): "), "{taken}");
    let mtu = netlink.set_mtu(left, 70_000).unwrap_err();
    assert_eq!(errno(&mtu), Some(libc::EINVAL));
    assert_eq!(
        RequestError::of(&mtu).unwrap().explanation(),
        "mtu greater than device maximum"
    );
    assert_eq!(RequestError::of(&mtu).unwrap().request(), "RTM_SETLINK (mtu)");
    assert_eq!(errno(&netlink.set_up(9999, true).unwrap_err()), Some(libc::ENODEV));
    // The handle goes on after refusals.
    assert_eq!(netlink.link(left).unwrap().mtu, 1500);
}

fn tun_is_described() {
    need_tun();
    let netlink = Handle::new().unwrap();
    let tun = Iface::without_packet_info("tun%d", Mode::Tun).unwrap();
    let tap = Iface::new("tap%d", Mode::Tap).unwrap();
    let link = netlink.link(netlink.index_of(tun.name()).unwrap()).unwrap();
    assert_eq!(
        (link.name.as_str(), link.kind.as_str(), link.mac, link.mtu),
        (tun.name(), "tun", None, 1500)
    );
    let described = link.tun.unwrap();
    assert!(!described.tap && !described.packet_info && !described.vnet_header && !described.multi_queue);
    assert!(!described.persistent && described.owner.is_none() && described.group.is_none());
    let link = netlink.link(netlink.index_of(tap.name()).unwrap()).unwrap();
    assert!(link.mac.is_some());
    assert!(link.tun.unwrap().tap && link.tun.unwrap().packet_info);
}
