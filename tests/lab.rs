//! The laboratory itself: what the other tests and the benchmarks stand on.

mod common;

use std::collections::HashSet;
use std::fs;
use std::net::{IpAddr, UdpSocket};
use std::os::fd::AsFd;
use std::os::linux::fs::MetadataExt;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use common::{again, await_address, need_tun, trial};
use tun_driver::lab::packet::{self, Ethernet, Framing, Spec};
use tun_driver::lab::{Catcher, Filler, Namespace, Sandbox, Sink, Tracker, monotonic_ns, process, sysctl};
use tun_driver::netlink::{Handle, RequestError};
use tun_driver::{Iface, Mode};

fn main() {
    if std::env::var_os(SAMPLE).is_some() {
        common::run(sample_trials());
    }
    common::run(vec![
        trial(
            "the runner tells passed, panicked, hanging and skipped trials apart",
            runner_tells_apart,
        ),
        trial("the runner refuses to pass over what is required", runner_requires),
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
        trial("sink: BPF drops behind the device what a socket would get", sink_by_bpf),
        trial("sink: a routing rule drops what would be forwarded", sink_by_routing),
        trial("sink: one is found without privilege over the host, too", sink_behind),
        trial(
            "traffic: what the filler sends is read from the device, whole and in order",
            filler_to_device,
        ),
        trial("traffic: what the queue has no room for is counted", filler_overflow),
        trial(
            "traffic: what is written into a TUN device is caught, IPv4 and IPv6, with packet info",
            tun_to_catcher,
        ),
        trial("traffic: what is written into a TAP device is caught", tap_to_catcher),
        trial(
            "process: descriptors, memory, threads and CPU time follow what is done",
            process_figures,
        )
        .alone(),
    ])
}

/// Set in the environment, this file's trials are those of `sample_trials`.
const SAMPLE: &str = "TUN_DRIVER_RUNNER_SAMPLE";

fn sample_trials() -> Vec<common::Trial> {
    vec![
        trial("passes", || {}),
        trial("panics", || panic!("as it must: {}", 6 * 7)),
        trial("hangs", || thread::sleep(Duration::from_secs(1000))).bound(Duration::from_millis(200)),
        trial("skips", || common::skip("for a reason")),
        trial("needs", || common::need_program("no-such-program", "no-such-package")),
    ]
}

/// Runs the sample in a child process: whether it passed, and what it printed.
fn sample(arguments: &[&str], environment: &[(&str, &str)]) -> (bool, String) {
    let output = Command::new(std::env::current_exe().unwrap())
        .args(arguments)
        .env(SAMPLE, "1")
        .env_remove("TUN_DRIVER_REQUIRE_ALL")
        .env_remove("TUN_DRIVER_SLOWNESS")
        .env_remove("TUN_DRIVER_LONG")
        .env_remove("TUN_DRIVER_REQUIRE_NETNS")
        .envs(environment.iter().copied())
        .output()
        .unwrap();
    (output.status.success(), String::from_utf8(output.stdout).unwrap())
}

fn runner_tells_apart() {
    let (passed, text) = sample(&[], &[]);
    assert!(!passed, "{text}");
    assert!(text.contains("1 passed; 2 failed; 2 ignored"), "{text}");
    assert!(text.contains("as it must: 42"), "{text}");
    assert!(text.contains("`hangs` hangs: it did not end within 200ms"), "{text}");
    assert!(
        text.contains("for a reason") && text.contains("apt-get install no-such-package"),
        "{text}"
    );
    let (passed, text) = sample(&["passes"], &[]);
    assert!(passed && text.contains("1 passed; 0 failed; 0 ignored"), "{text}");
    let (passed, text) = sample(&["--list"], &[]);
    assert!(passed && text.contains("hangs: test"), "{text}");
}

fn runner_requires() {
    let (passed, _) = sample(&["skips"], &[]);
    assert!(passed);
    let (passed, text) = sample(&["skips"], &[("TUN_DRIVER_REQUIRE_ALL", "1")]);
    assert!(
        !passed && text.contains("skipped, but all are required: for a reason"),
        "{text}"
    );
    // Without any namespace to be had: in a user namespace that may make none.
    let refused = |require: &str| {
        let script = "echo 0 > /proc/sys/user/max_net_namespaces && exec \"$0\" passes";
        let output = Command::new("unshare")
            .args(["--user", "--map-root-user", "sh", "-c", script])
            .arg(std::env::current_exe().unwrap())
            .env(SAMPLE, "1")
            .env("TUN_DRIVER_REQUIRE_NETNS", require)
            .output()
            .unwrap();
        if output.stdout.is_empty() {
            common::skip(format!(
                "no user namespace: {}",
                String::from_utf8_lossy(&output.stderr).trim()
            ));
        }
        (output.status.success(), String::from_utf8(output.stdout).unwrap())
    };
    common::need_program("unshare", "util-linux");
    let (passed, text) = refused("0");
    assert!(passed && text.contains("0 passed; 0 failed; 1 ignored"), "{text}");
    assert!(
        text.contains("ignored (no network namespace: unshare(CLONE_NEWNET)"),
        "{text}"
    );
    let (passed, text) = refused("1");
    assert!(!passed && text.contains("0 passed; 1 failed"), "{text}");
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
    assert!(link.up);
    // The kernel takes its time to tell.
    let end = Instant::now() + Duration::from_secs(5) * common::slowness();
    while netlink.link(left).unwrap().running {
        assert!(Instant::now() < end, "no carrier while the other end is down");
        std::thread::sleep(Duration::from_millis(1));
    }
    let error = netlink.wait_running(left, Duration::from_millis(5)).unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::TimedOut);
    netlink.set_up(right, true).unwrap();
    netlink.wait_running(left, Duration::from_secs(10)).unwrap();
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
    netlink.wait_running(near, Duration::from_secs(10)).unwrap();
    there.wait_running(far, Duration::from_secs(10)).unwrap();
    // Until then its owner drops what comes.
    await_address("fd00::1".parse().unwrap());
    other.run(|| await_address("fd00::2".parse().unwrap())).unwrap();
    let near_mac = netlink.link(near).unwrap().mac.unwrap();
    let far_mac = there.link(far).unwrap().mac.unwrap();
    netlink.add_neighbour(near, ip("10.0.0.2"), far_mac).unwrap();
    netlink.add_neighbour(near, ip("fd00::2"), far_mac).unwrap();
    there.add_neighbour(far, ip("10.0.0.1"), near_mac).unwrap();

    for (bound, target) in [("10.0.0.2:5000", "10.0.0.1:0"), ("[fd00::2]:5000", "[fd00::1]:0")] {
        let receiver = other.run(|| UdpSocket::bind(bound).unwrap()).unwrap();
        receiver
            .set_read_timeout(Some(Duration::from_secs(5) * common::slowness()))
            .unwrap();
        let sender = UdpSocket::bind(target).unwrap();
        let before = netlink.stats(near).unwrap();
        assert_eq!(sender.send_to(&[7; 100], bound).unwrap(), 100);
        let (length, from) = again(|| receiver.recv_from(&mut [0; 200]))
            .unwrap_or_else(|error| panic!("{bound}: {error}, {:?}, {:?}", netlink.stats(near), there.stats(far)));
        assert_eq!((length, from), (100, sender.local_addr().unwrap()));
        let sent = netlink.stats(near).unwrap().since(&before);
        // IPv6 has things of its own to say now and then.
        assert!((1..10).contains(&sent.tx_packets), "{bound}: {sent:?}");
        assert_eq!((sent.tx_errors, sent.tx_dropped), (0, 0), "{bound}");
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

/// A TUN device that is up, with 10.0.0.1/24 and fd00::1/64; its number.
fn tun_up(tun: &Iface, netlink: &Handle) -> u32 {
    let index = netlink.index_of(tun.name()).unwrap();
    netlink.add_address(index, ip("10.0.0.1"), 24).unwrap();
    netlink.add_address(index, ip("fd00::1"), 64).unwrap();
    netlink.set_up(index, true).unwrap();
    index
}

fn send_all(tun: &Iface, spec: Spec, length: usize, sequences: std::ops::Range<u32>) {
    let mut buffer = vec![0; spec.framing.len() + length];
    for sequence in sequences {
        let total = spec.build(&mut buffer, length, sequence, monotonic_ns());
        assert_eq!(tun.send(&buffer[..total]).unwrap(), total);
    }
}

const PATIENCE: Duration = Duration::from_millis(500);

fn sink_by_bpf() {
    need_tun();
    let netlink = Handle::new().unwrap();
    let tun = Iface::without_packet_info("tun%d", Mode::Tun).unwrap();
    let index = tun_up(&tun, &netlink);
    let mut catcher = Catcher::bind("10.0.0.1:5000".parse().unwrap()).unwrap();
    let mut tracker = Tracker::new(1);
    let spec = Spec::new("10.0.0.2:4000".parse().unwrap(), "10.0.0.1:5000".parse().unwrap());

    let sink = match Sink::with_bpf(index) {
        Ok(sink) => sink,
        Err(error) => common::skip(format!("no BPF link at tc ingress (kernel 6.6 and root): {error}")),
    };
    assert_eq!(sink.kind(), "BPF drop at tc ingress");
    let before = netlink.stats(index).unwrap();
    send_all(&tun, spec, 64, 0..100);
    let counted = netlink.stats(index).unwrap().since(&before);
    assert_eq!(
        (counted.rx_packets, counted.rx_bytes, counted.rx_errors),
        (100, 6400, 0)
    );
    // A packet sent after the sink is gone comes; were any of the hundred on their way, they would come before it.
    drop(sink);
    // The link may hold for a moment after its descriptor was closed.
    let came = (100..150).any(|sequence| {
        send_all(&tun, spec, 64, sequence..sequence + 1);
        catcher.catch(&mut tracker, 1, PATIENCE).unwrap() == 1
    });
    assert!(came);
    assert_eq!(catcher.catch(&mut tracker, 1, PATIENCE).unwrap(), 0);
    assert_eq!(tracker.summary().received, 1);
    assert!(tracker.summary().lost >= 100);
}

fn sink_by_routing() {
    need_tun();
    let netlink = Handle::new().unwrap();
    let tun = Iface::without_packet_info("tun%d", Mode::Tun).unwrap();
    let index = tun_up(&tun, &netlink);
    let out = Iface::without_packet_info("out%d", Mode::Tun).unwrap();
    let out_index = netlink.index_of(out.name()).unwrap();
    netlink.set_up(out_index, true).unwrap();
    netlink.add_route(ip("198.18.0.0"), 15, None, out_index).unwrap();
    netlink.add_route(ip("fd01::"), 32, None, out_index).unwrap();
    sysctl("net/ipv4/ip_forward", 1).unwrap();
    sysctl("net/ipv6/conf/all/forwarding", 1).unwrap();
    for (source, target) in [
        ("10.0.0.2:4000", "198.18.0.9:5000"),
        ("[fd00::2]:4000", "[fd01::9]:5000"),
    ] {
        let spec = Spec::new(source.parse().unwrap(), target.parse().unwrap());
        let sink = Sink::with_routing(index).unwrap();
        assert_eq!(sink.kind(), "routing drop");
        let before = netlink.stats(index).unwrap();
        send_all(&tun, spec, 64, 0..100);
        assert_eq!(netlink.stats(index).unwrap().since(&before).rx_packets, 100);
        drop(sink);
        send_all(&tun, spec, 64, 100..101);
        // The first test packet that is forwarded is the one from after the sink.
        let mut buffer = [0; 1500];
        let stamp = loop {
            let length = out.recv(&mut buffer).unwrap();
            match Framing::NONE.check(&buffer[..length]) {
                Err(packet::Fault::Foreign) => {}
                result => break result.unwrap(),
            }
        };
        assert_eq!(stamp.sequence, 100, "{target}");
    }
}

fn sink_behind() {
    need_tun();
    let netlink = Handle::new().unwrap();
    let tun = Iface::without_packet_info("tun%d", Mode::Tun).unwrap();
    let index = tun_up(&tun, &netlink);
    let sink = Sink::behind(index).unwrap();
    assert!(["BPF drop at tc ingress", "routing drop"].contains(&sink.kind()));
    assert!(Sink::behind(9999).is_err(), "no such device");
}

fn filler_to_device() {
    need_tun();
    let netlink = Handle::new().unwrap();
    let tun = Iface::new("tun%d", Mode::Tun).unwrap();
    let index = tun_up(&tun, &netlink);
    for target in ["10.0.0.9", "fd00::9"] {
        let mut filler = Filler::new(index, ip(target), 7).unwrap();
        let mut tracker = Tracker::new(7);
        let mut buffer = [0; 1504];
        for (round, (count, length)) in [(100, 64), (1, 1500), (399, 1400)].into_iter().enumerate() {
            let filled = filler.fill(count, length).unwrap();
            assert_eq!((filled.sent, filled.dropped, filled.queued()), (count, 0, count));
            let mut seen = 0;
            while seen < count {
                let got = tun.recv(&mut buffer).unwrap();
                let packet = Framing::PACKET_INFO.check(&buffer[..got]);
                if packet != Err(packet::Fault::Foreign) {
                    assert_eq!(got, length + 4, "round {round}");
                    assert!(packet.unwrap().age(monotonic_ns()) < Duration::from_secs(4));
                    seen += 1;
                }
                tracker.record(packet);
            }
        }
        filler.tell(&mut tracker);
        tracker.summary().assert_all();
        assert_eq!((tracker.summary().received, tracker.summary().flows), (500, 7));
        assert!(filler.fill(1, 1501).is_err(), "longer than the MTU");
        assert!(filler.fill(1, 43).is_err(), "too short for a stamp");
    }
    assert_eq!(
        Filler::new(index, ip("198.18.0.1"), 1)
            .unwrap()
            .fill(1, 100)
            .unwrap_err()
            .raw_os_error(),
        Some(libc::ENETUNREACH)
    );
}

fn filler_overflow() {
    need_tun();
    let netlink = Handle::new().unwrap();
    let tun = Iface::without_packet_info("tun%d", Mode::Tun).unwrap();
    let index = tun_up(&tun, &netlink);
    netlink.set_txqueuelen(index, 50).unwrap();
    let mut filler = Filler::new(index, ip("10.0.0.9"), 1).unwrap();
    let filled = filler.fill(200, 100).unwrap();
    assert_eq!((filled.sent, filled.queued()), (200, 50));
    let mut tracker = Tracker::new(1);
    let mut buffer = [0; 1500];
    for _ in 0..50 {
        let length = tun.recv(&mut buffer).unwrap();
        tracker.record(Framing::NONE.check(&buffer[..length]));
    }
    filler.tell(&mut tracker);
    tracker.summary().assert_orderly();
    assert_eq!((tracker.summary().received, tracker.summary().lost), (50, 150));
}

fn tun_to_catcher() {
    need_tun();
    let netlink = Handle::new().unwrap();
    let tun = Iface::new("tun%d", Mode::Tun).unwrap();
    tun_up(&tun, &netlink);
    await_address("fd00::1".parse().unwrap());
    for (source, target, least) in [
        ("10.0.0.2:4000", "10.0.0.1:5000", packet::MIN_IPV4),
        ("[fd00::2]:4000", "[fd00::1]:5000", packet::MIN_IPV6),
    ] {
        let mut catcher = Catcher::bind(target.parse().unwrap()).unwrap();
        let mut tracker = Tracker::new(3);
        let spec = Spec::new(source.parse().unwrap(), target.parse().unwrap()).framing(Framing::PACKET_INFO);
        for flow in 0..3 {
            send_all(&tun, spec.flow(flow), least, 0..100);
            send_all(&tun, spec.flow(flow), 1400, 100..200);
            tracker.sent(flow, 200);
        }
        assert_eq!(catcher.catch(&mut tracker, 600, Duration::from_secs(5)).unwrap(), 600);
        assert_eq!(catcher.dropped().unwrap(), 0);
        tracker.summary().assert_all();

        // A packet changed on the way, past the UDP checksum, is told from a whole one.
        let mut buffer = [0; 104];
        spec.build(&mut buffer, 100, 200, 0);
        let payload = 4 + 100 - (100 - least + packet::STAMP_LEN);
        buffer[payload + packet::STAMP_LEN + 1] ^= 0x10;
        buffer[payload + packet::STAMP_LEN + 3] ^= 0x10; // may leave the sum as it was, or not
        let udp_checksum = payload - 2..payload;
        if ip(target.rsplit_once(':').unwrap().0.trim_matches(['[', ']'])).is_ipv4() {
            buffer[udp_checksum].fill(0); // none
            tun.send(&buffer).unwrap();
            assert_eq!(catcher.catch(&mut tracker, 1, Duration::from_secs(5)).unwrap(), 1);
            assert_eq!(tracker.summary().damaged, 1);
        }
    }

    // A catcher that does not look loses packets, and says so.
    let mut catcher = Catcher::bind("10.0.0.1:6000".parse().unwrap()).unwrap();
    catcher.set_receive_buffer(1 << 20).unwrap();
    let spec = Spec::new("10.0.0.2:1".parse().unwrap(), "10.0.0.1:6000".parse().unwrap()).framing(Framing::PACKET_INFO);
    let mut sent = 0;
    while catcher.dropped().unwrap() == 0 {
        send_all(&tun, spec, 1400, sent..sent + 1000);
        sent += 1000;
        assert!(sent < 1_000_000, "its buffer has an end");
    }
    let mut tracker = Tracker::new(1);
    catcher.catch(&mut tracker, sent as usize, PATIENCE).unwrap();
    tracker.sent(0, sent);
    assert_eq!(tracker.summary().lost, u64::from(catcher.dropped().unwrap()));
    tracker.summary().assert_orderly();
}

fn tap_to_catcher() {
    need_tun();
    let netlink = Handle::new().unwrap();
    let tap = Iface::without_packet_info("tap%d", Mode::Tap).unwrap();
    let index = tun_up(&tap, &netlink);
    let own = netlink.link(index).unwrap().mac.unwrap();
    let peer = [2, 0, 0, 0, 0, 9];
    let framing = Framing {
        ethernet: Some(Ethernet {
            source: peer,
            target: own,
        }),
        ..Framing::NONE
    };
    let mut catcher = Catcher::bind("10.0.0.1:5000".parse().unwrap()).unwrap();
    let spec = Spec::new("10.0.0.9:4000".parse().unwrap(), "10.0.0.1:5000".parse().unwrap()).framing(framing);
    let mut tracker = Tracker::new(1);
    send_all(&tap, spec, 46, 0..100);
    send_all(&tap, spec, 1500, 100..200);
    assert_eq!(catcher.catch(&mut tracker, 200, Duration::from_secs(5)).unwrap(), 200);
    tracker.sent(0, 200);
    tracker.summary().assert_all();

    netlink.add_neighbour(index, ip("10.0.0.9"), peer).unwrap();
    let mut filler = Filler::new(index, ip("10.0.0.9"), 2).unwrap();
    assert_eq!(filler.fill(10, 100).unwrap().queued(), 10);
    let mut tracker = Tracker::new(2);
    let mut buffer = [0; 1514];
    while tracker.received() < 10 {
        let length = tap.recv(&mut buffer).unwrap();
        tracker.record(framing.check(&buffer[..length]));
    }
    filler.tell(&mut tracker);
    tracker.summary().assert_all();
}

fn process_figures() {
    let before = process::open_descriptors().unwrap();
    let held: Vec<_> = (0..10).map(|_| fs::File::open("/dev/null").unwrap()).collect();
    assert_eq!(process::open_descriptors().unwrap(), before + 10);
    drop(held);
    assert_eq!(process::open_descriptors().unwrap(), before);

    let before = process::memory().unwrap();
    let block = vec![1u8; 64 << 20];
    let grown = process::memory().unwrap().resident - before.resident;
    assert!(grown > 60 << 20, "64 MiB touched, {grown} bytes more");
    drop(block);
    assert_eq!(before.locked % 1024, 0);

    let thread = thread::Builder::new().name("counted".to_owned());
    let (stop, stopped) = std::sync::mpsc::channel::<()>();
    let thread = thread.spawn(move || stopped.recv().unwrap_err()).unwrap();
    let began = Instant::now();
    // A thread takes its name itself, after it has begun.
    while !process::threads().unwrap().iter().any(|name| name == "counted") {
        assert!(began.elapsed() < Duration::from_secs(10));
    }
    drop(stop);
    thread.join().unwrap();
    let began = Instant::now();
    // It is gone from /proc a little after join returns.
    while process::threads().unwrap().iter().any(|name| name == "counted") {
        assert!(began.elapsed() < Duration::from_secs(10));
    }
    assert_eq!(process::io_workers().unwrap(), 0);

    let (all, own) = (process::process_cpu_time(), process::thread_cpu_time());
    while process::thread_cpu_time() < own + Duration::from_millis(20) {}
    assert!(process::process_cpu_time() >= all + Duration::from_millis(20));
    let own = process::thread_cpu_time();
    thread::spawn(|| {
        let own = process::thread_cpu_time();
        while process::thread_cpu_time() < own + Duration::from_millis(50) {}
    })
    .join()
    .unwrap();
    assert!(
        process::thread_cpu_time() < own + Duration::from_millis(50),
        "another thread's time is not counted"
    );
}
