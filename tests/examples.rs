//! The examples do what they say: each runs as a process of its own, on both backends, and real programs talk to it.

mod common;

use std::ffi::OsStr;
use std::io::{self, BufRead, BufReader, Read};
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::mpsc::{self, Receiver};
use std::time::{Duration, Instant};
use std::{env, fs, process, thread};

use common::{Trial, again, await_address, need_backend, need_program, need_tun, skip, trial};
use tun_driver::lab::Namespace;
use tun_driver::netlink::Handle;
use tun_driver::{Backend, Worker, WorkerConfig};

/// Bounds all waiting here. Below the runner's bound on a trial, so that what was started is ended by its trial.
const PATIENCE: Duration = Duration::from_secs(20);

fn main() {
    let mut trials = vec![
        trial("per_packet prints what the stack sends", per_packet),
        trial(
            "per_packet says which packets are cut, and ends after its seconds",
            per_packet_cut,
        ),
        trial("udp_tunnel names the address that cannot be used", udp_tunnel_addresses),
        trial("a file that is no namespace is named", no_namespace),
        trial("a refusal is told in words", refusal_in_words),
        trial("an unknown option is refused", unknown_option),
        trial(
            "arguments of any bytes are taken or refused, without a panic",
            any_bytes,
        ),
        trial("the name that was granted is printed", granted_name),
        trial("surplus words and options of other examples are refused", surplus),
        trial(
            "udp_tunnel names a wrong pair of addresses, and prints its port",
            udp_tunnel_words,
        ),
        trial(
            "a closed or full standard output ends an example without a panic",
            closed_output,
        ),
    ];
    type Check = fn(Backend);
    let checks: [(&str, Check); 12] = [
        ("a device that is moved to another namespace is reported", moved),
        ("packets beyond a raised MTU are reported and counted", mtu_raised),
        ("worker_loop echoes UDP", worker_loop),
        ("icmp_echo answers ping", icmp_echo),
        ("icmp_echo answers only what it should", icmp_echo_is_choosy),
        ("forward carries UDP between two namespaces", forward),
        ("forward drops for a device that is down, and goes on", forward_down),
        ("gateway carries UDP between two namespaces, on two workers", gateway),
        ("gateway ends with either device, and tells", gateway_ends),
        ("udp_tunnel carries UDP and TCP between two processes", udp_tunnel),
        (
            "worker_loop, forward and udp_tunnel end with their device",
            end_with_device,
        ),
        ("udp_tunnel keeps order under back-pressure", udp_tunnel_backpressure),
    ];
    for (name, check) in checks {
        for backend in [Backend::IoUring, Backend::Syscalls] {
            trials.push(each_backend(name, check, backend));
        }
    }
    common::run(trials)
}

fn each_backend(name: &str, check: fn(Backend), backend: Backend) -> Trial {
    trial(format!("{name} ({})", option(backend)), move || {
        need_backend(backend);
        let config = WorkerConfig {
            backend: Some(backend),
            ..WorkerConfig::default()
        };
        if let Err(error) = Worker::new(&config) {
            skip(error.to_string());
        }
        check(backend);
    })
}

fn per_packet() {
    need_tun();
    let mut running = example("per_packet", &["plain0", "--packets", "3"]);
    running.line("created plain0");
    let netlink = Handle::new().unwrap();
    let index = netlink.index_of("plain0").unwrap();
    netlink.add_address(index, ip("198.18.9.1"), 24).unwrap();
    netlink.set_up(index, true).unwrap();
    let socket = UdpSocket::bind("198.18.9.1:0").unwrap();
    for byte in [0xa5, 0xa6, 0xa7] {
        socket.send_to(&[byte; 5], "198.18.9.2:9").unwrap();
        // 20 bytes of IPv4 header, 8 of UDP.
        let line = running.line("EtherType 0800, 33 bytes: [45, ");
        assert!(
            line.ends_with(&format!("{byte:02x}, {byte:02x}, {byte:02x}, {byte:02x}, {byte:02x}]")),
            "{line}"
        );
    }
    let status = running.wait();
    assert!(status.success(), "{status}: {}", running.errors());
}

fn per_packet_cut() {
    need_tun();
    let mut running = example("per_packet", &["plain0", "--seconds", &seconds()]);
    running.line("created plain0");
    let netlink = Handle::new().unwrap();
    let index = netlink.index_of("plain0").unwrap();
    netlink.add_address(index, ip("198.18.9.1"), 24).unwrap();
    netlink.set_mtu(index, 4000).unwrap();
    netlink.set_up(index, true).unwrap();
    let socket = UdpSocket::bind("198.18.9.1:0").unwrap();
    for (length, told) in [
        (1472, "EtherType 0800, 1500 bytes: "),
        (1473, "EtherType 0800, 1500 bytes of a longer packet"),
    ] {
        socket.send_to(&vec![1; length], "198.18.9.2:9").unwrap();
        running.line(told);
    }
    running.stop();
    let mut running = example("per_packet", &["plain1", "--seconds", "1"]);
    assert!(running.wait().success(), "it ends, though no packet comes");
}

fn udp_tunnel_addresses() {
    need_tun();
    for (local, peer, told) in [
        ("10.9.9.9:4789", "127.0.0.1:9", "bind(10.9.9.9:4789): "),
        ("0.0.0.0:0", "10.9.9.9:4789", "connect(10.9.9.9:4789): "),
    ] {
        let mut running = example(
            "udp_tunnel",
            &["t0", "198.18.4.1", local, peer, "--seconds", &seconds()],
        );
        assert_eq!(running.wait().code(), Some(1));
        let errors = running.errors();
        assert!(errors.starts_with(told), "{errors}");
    }
}

fn no_namespace() {
    need_tun();
    for arguments in [
        &["gateway", "/proc/self/status"][..],
        &["forward", "l0", "r0", "198.18.3.1", "198.18.3.2", "/proc/self/status"],
    ] {
        let mut running = example(arguments[0], &arguments[1..]);
        assert_eq!(running.wait().code(), Some(1));
        let errors = running.errors();
        assert!(
            errors.contains("/proc/self/status: the file is not a network namespace"),
            "{errors}"
        );
    }
}

fn refusal_in_words() {
    need_tun();
    let mut first = example("per_packet", &["taken0"]);
    first.line("created taken0");
    let mut second = example("worker_loop", &["taken0", "--seconds", &seconds()]);
    assert_eq!(second.wait().code(), Some(1));
    let errors = second.errors();
    assert!(
        errors.contains("\"taken0\" is the name of a TUN device already"),
        "{errors}"
    );
}

fn unknown_option() {
    let mut running = example("forward", &["--no-such-option"]);
    assert_eq!(running.wait().code(), Some(2));
    assert!(running.errors().contains("usage: forward [LEFT"));
}

fn any_bytes() {
    let run_with = |name: &str, arguments: &[&[u8]]| {
        let arguments = arguments.iter().map(|bytes| OsStr::from_bytes(bytes));
        run(Command::new(path(name)).args(arguments))
    };
    let wrong: &[u8] = b"\xff\xfe";
    for (name, before) in [
        ("per_packet", &[][..]),
        ("icmp_echo", &[]),
        ("worker_loop", &[]),
        ("udp_tunnel", &[b"t0" as &[u8]]),
        ("forward", &[b"l0", b"r0"]),
        ("gateway", &[b"/run/netns/blue"]),
    ] {
        for bad in [
            &[wrong][..],
            &[b"--seconds", wrong],
            &[b"-\xff"],
            &[b"--backend", wrong],
            &[b"--packets", b""],
        ] {
            let told = run_with(name, &[before, bad].concat());
            assert_eq!(told.status.code(), Some(2), "{name} {bad:?}");
            assert!(
                String::from_utf8_lossy(&told.stderr).contains("usage: "),
                "{name} {bad:?}"
            );
        }
    }
    // A path may be anything; this one does not exist.
    need_tun();
    let told = run_with("gateway", &[b"/nowhere/\xff\xfe"]);
    assert_eq!(told.status.code(), Some(1));
    let told = String::from_utf8_lossy(&told.stderr).into_owned();
    assert!(!told.contains("panicked") && told.contains("/nowhere/"), "{told}");
}

fn granted_name() {
    need_tun();
    for (name, arguments) in [
        ("icmp_echo", &["e%d"][..]),
        ("worker_loop", &["e%d"]),
        ("udp_tunnel", &["e%d", "198.18.4.1", "127.0.0.1:0", "127.0.0.1:9"]),
    ] {
        let mut process = example(name, arguments);
        let ready = process.line("ready: ");
        assert!(ready.contains(" on e0"), "{name}: {ready}");
        process.stop();
    }
}

fn surplus() {
    for arguments in [
        &["per_packet", "a", "b"][..],
        &["per_packet", "--backend", "syscalls"],
        &["icmp_echo", "a", "198.18.2.1", "fd00:18:2::1", "x"],
        &["icmp_echo", "--packets", "1"],
        &["worker_loop", "a", "198.18.1.1", "fd00:18:1::1", "x"],
        &[
            "forward",
            "l0",
            "r0",
            "198.18.3.1",
            "198.18.3.2",
            "/run/netns/blue",
            "x",
        ],
        &["gateway", "/run/netns/blue", "2", "x", "y", "z"],
        &["udp_tunnel", "t0", "198.18.4.1", "127.0.0.1:0", "127.0.0.1:9", "x"],
        &["udp_tunnel", "--keepalive-ms", "0"],
    ] {
        let told = run(Command::new(path(arguments[0])).args(&arguments[1..]));
        assert_eq!(told.status.code(), Some(2), "{arguments:?}");
        let errors = String::from_utf8_lossy(&told.stderr).into_owned();
        assert!(errors.contains("is not understood\nusage: "), "{arguments:?}: {errors}");
    }
}

fn udp_tunnel_words() {
    for (local, peer, told) in [
        ("127.0.0.1:0", "[::1]:9", "PEER [::1]:9 of IPv6"),
        ("[::1]:0", "127.0.0.1:9", "PEER 127.0.0.1:9 of IPv4"),
        ("127.0.0.1:0", "127.0.0.1:0", "port 0"),
        ("[::]:0", "[fe80::1]:9", "[fe80::1%2]:9"),
    ] {
        let mut running = example("udp_tunnel", &["t0", "198.18.4.1", local, peer]);
        assert_eq!(running.wait().code(), Some(1));
        let errors = running.errors();
        assert!(errors.contains(told), "{errors}");
    }
    need_tun();
    let words = [
        "t0",
        "198.18.4.1",
        "127.0.0.1:0",
        "127.0.0.1:9",
        "--seconds",
        &seconds(),
    ];
    let mut running = example("udp_tunnel", &words);
    let ready = running.line("ready: ");
    assert!(!ready.contains("127.0.0.1:0 "), "{ready}");
    running.stop();
}

fn closed_output() {
    need_tun();
    for name in ["icmp_echo", "worker_loop", "per_packet"] {
        let output = |stdout: Stdio| {
            let mut command = Command::new(path(name));
            command.args(["out0", "--seconds", &seconds()]).stdin(Stdio::null());
            let child = command.stdout(stdout).stderr(Stdio::piped()).spawn().unwrap();
            let mut process = Process {
                child,
                lines: mpsc::channel().1,
                name: name.to_owned(),
            };
            let status = process.wait();
            (status.code(), process.errors())
        };
        // Its reader is gone.
        let (reader, writer) = io::pipe().unwrap();
        drop(reader);
        assert_eq!(output(writer.into()), (Some(0), String::new()), "{name}");
        let full = fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
        let (code, errors) = output(full.into());
        assert_eq!(code, Some(1), "{name}: {errors}");
        assert!(
            errors.starts_with("standard output: ") && !errors.contains("panicked"),
            "{name}: {errors}"
        );
    }
}

fn worker_loop(backend: Backend) {
    const DATAGRAMS: u64 = 300;
    let mut running = example(
        "worker_loop",
        &["echo0", "--seconds", &seconds(), "--backend", option(backend)],
    );
    running.line("ready");
    for (own, far) in [
        ("198.18.1.1:0", "198.18.1.2:7"),
        ("[fd00:18:1::1]:0", "[fd00:18:1::77]:4242"),
    ] {
        await_address(own.parse::<SocketAddr>().unwrap().ip());
        let socket = socket(own);
        let far: SocketAddr = far.parse().unwrap();
        for number in 0..DATAGRAMS / 2 {
            let length = 1 + number as usize * 9;
            socket.send_to(&stamped(number, length), far).unwrap();
            let mut buffer = [0; 2000];
            let (length, from) = again(|| socket.recv_from(&mut buffer)).expect("an echo");
            assert_eq!((from, &buffer[..length]), (far, &stamped(number, length)[..]));
        }
    }
    let counters = running.stop();
    let [received, sent, refused] = port(&counters, "echo0");
    assert!(received >= DATAGRAMS, "{counters}");
    assert_eq!((sent, refused), (DATAGRAMS, 0), "{counters}");
    assert_eq!(value(&counters, "discarded"), received - DATAGRAMS, "{counters}");
}

fn icmp_echo(backend: Backend) {
    need_program("ping", "iputils-ping");
    let mut running = example(
        "icmp_echo",
        &["ping0", "--seconds", &seconds(), "--backend", option(backend)],
    );
    running.line("ready");
    let mut pings = 0;
    for (target, size) in [
        ("198.18.2.2", "56"),
        ("198.18.2.99", "1472"), // the MTU filled
        ("fd00:18:2::2", "57"),  // an odd length
        ("fd00:18:2::99", "1452"),
    ] {
        let output = run(Command::new("ping").args(["-c", "3", "-i", "0.2", "-w", "15", "-s", size, target]));
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(
            output.status.success(),
            "{text}{}",
            String::from_utf8_lossy(&output.stderr)
        );
        assert!(
            text.contains("3 packets transmitted, 3 received, 0% packet loss"),
            "{text}"
        );
        assert!(
            !text.contains("BAD CHECKSUM") && !text.contains("wrong data byte"),
            "{text}"
        );
        pings += 3;
    }
    // The stack checks what ping may not.
    for (file, errors) in [
        ("snmp", "Icmp:"),
        ("snmp6", "Icmp6InErrors"),
        ("snmp6", "Icmp6InCsumErrors"),
    ] {
        let table = fs::read_to_string(format!("/proc/thread-self/net/{file}")).unwrap();
        let lines: Vec<Vec<&str>> = table.lines().map(|line| line.split_whitespace().collect()).collect();
        let matching: Vec<_> = lines.iter().filter(|words| words.first() == Some(&errors)).collect();
        let found = match matching[..] {
            [names, numbers] => numbers[names.iter().position(|&name| name == "InCsumErrors").unwrap()],
            [pair] => pair[1],
            _ => panic!("{table}"),
        };
        assert_eq!(found, "0", "{errors} in {table}");
    }
    let counters = running.stop();
    let [received, sent, refused] = port(&counters, "ping0");
    assert!(received >= pings, "{counters}");
    assert_eq!((sent, refused), (pings, 0), "{counters}");
}

/// Fragments, other protocols and other ICMP types draw no answer, and do not disturb.
fn icmp_echo_is_choosy(backend: Backend) {
    need_program("ping", "iputils-ping");
    let mut running = example(
        "icmp_echo",
        &["ping0", "--seconds", &seconds(), "--backend", option(backend)],
    );
    running.line("ready");
    let output = run(Command::new("ping").args(["-c", "2", "-i", "0.2", "-W", "1", "-s", "3000", "198.18.2.2"]));
    assert!(String::from_utf8_lossy(&output.stdout).contains("2 packets transmitted, 0 received"));
    let socket = socket("198.18.2.1:0");
    for length in 0..64 {
        // Among them are payloads that look like an echo request.
        socket
            .send_to(&[8, 0, 0xf7, 0xff].repeat(16)[..length], "198.18.2.2:2048")
            .unwrap();
    }
    let output = run(Command::new("ping").args(["-c", "1", "-w", "15", "198.18.2.2"]));
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
    let counters = running.stop();
    // Two pings of three fragments each, the datagrams, and the good ping.
    let [received, sent, refused] = port(&counters, "ping0");
    assert!(received > 2 * 3 + 64, "{counters}");
    assert_eq!((sent, refused), (1, 0), "{counters}");
}

fn forward(backend: Backend) {
    const ROUNDS: u64 = 20;
    const BURST: u64 = 64;
    let right = Namespace::new().unwrap();
    let mut running = start_forward(&right, backend);
    let near = socket("198.18.3.1:5000");
    let far = right.run(|| socket("198.18.3.2:5000")).unwrap();
    near.connect("198.18.3.2:5000").unwrap();
    far.connect("198.18.3.1:5000").unwrap();
    for round in 0..ROUNDS {
        let numbers = round * BURST..(round + 1) * BURST;
        for number in numbers.clone() {
            near.send(&stamped(number, 30 + number as usize)).unwrap();
            far.send(&stamped(number, 1472)).unwrap();
        }
        for number in numbers {
            assert_received(&far, &stamped(number, 30 + number as usize));
            assert_received(&near, &stamped(number, 1472));
        }
    }
    let counters = running.stop();
    for name in ["left0", "right0"] {
        let [received, sent, refused] = port(&counters, name);
        assert!(received >= ROUNDS * BURST, "{counters}");
        assert!(sent >= ROUNDS * BURST, "{counters}");
        assert_eq!(refused, 0, "{counters}");
    }
    let ([from_left, to_left, _], [from_right, to_right, _]) = (port(&counters, "left0"), port(&counters, "right0"));
    assert_eq!((from_left, from_right), (to_right, to_left), "{counters}");
}

fn forward_down(backend: Backend) {
    let right = Namespace::new().unwrap();
    let mut running = start_forward(&right, backend);
    let near = socket("198.18.3.1:5000");
    let far = right.run(|| socket("198.18.3.2:5000")).unwrap();
    near.connect("198.18.3.2:5000").unwrap();
    near.send(b"before").unwrap();
    assert_received(&far, b"before");

    let there = right.run(Handle::new).unwrap().unwrap();
    let index = there.index_of("right0").unwrap();
    there.set_up(index, false).unwrap();
    for _ in 0..200 {
        near.send(b"meanwhile").unwrap();
    }
    let handle = Handle::new().unwrap();
    let left = handle.index_of("left0").unwrap();
    until("the forwarder has taken all", || {
        handle.stats(left).unwrap().tx_packets >= 201
    });
    until("the forwarder has dropped them", || {
        there.stats(index).unwrap().rx_dropped >= 1
    });
    there.set_up(index, true).unwrap();
    // Some of the last may still be on their way while the device comes up; what is sent from now on is behind them.
    near.send(b"after").unwrap();
    let mut buffer = [0; 2000];
    loop {
        let length = again(|| far.recv(&mut buffer)).expect("what was sent after");
        match &buffer[..length] {
            b"after" => break,
            other => assert_eq!(other, b"meanwhile"),
        }
    }
    let counters = running.stop();
    let ([received, ..], [_, sent, refused]) = (port(&counters, "left0"), port(&counters, "right0"));
    assert!(refused >= 1, "{counters}");
    assert!(received >= 202, "{counters}");
    // Each packet is accounted for, whatever came the other way.
    let ([_, sent_left, refused_left], [received_right, ..]) = (port(&counters, "left0"), port(&counters, "right0"));
    assert_eq!(
        received + received_right,
        sent + refused + sent_left + refused_left + value(&counters, "discarded"),
        "{counters}"
    );
}

fn udp_tunnel(backend: Backend) {
    let pair = Pair::new();
    let (mut near, mut far) = pair.start_tunnels(backend);
    let here = socket("198.18.4.1:5000");
    let there = pair.other.run(|| socket("198.18.4.2:5000")).unwrap();
    here.connect("198.18.4.2:5000").unwrap();
    there.connect("198.18.4.1:5000").unwrap();
    for number in 0..200 {
        // Up to the tunnel's MTU.
        let question = stamped(number, 1 + number as usize * 6);
        here.send(&question).unwrap();
        assert_received(&there, &question);
        let answer = stamped(number + 1_000_000, 1372);
        there.send(&answer).unwrap();
        assert_received(&here, &answer);
    }
    let with_tcp = pair.transfer();
    for running in [&mut near, &mut far] {
        let counters = running.stop();
        let [received, sent, refused] = port(&counters, "tunnel0");
        let [datagrams_received, datagrams_sent, datagrams_refused] = port(&counters, "udp");
        assert!(received >= 200 && sent >= 200, "{counters}");
        let most = 1000 / u64::from(common::slowness());
        assert!(!with_tcp || received + sent > most, "{counters}");
        // A datagram for each packet, and keep-alives beside them, on both sides.
        let keepalives = value(&counters, "keepalives");
        assert!(keepalives >= 1, "{counters}");
        assert_eq!(datagrams_received, sent + keepalives, "{counters}");
        assert_eq!(
            value(&counters, "datagrams"),
            datagrams_sent + datagrams_refused,
            "{counters}"
        );
        assert!(datagrams_sent > received, "{counters}");
        assert_eq!((refused, value(&counters, "late")), (0, 0), "{counters}");
    }
    if !with_tcp {
        eprintln!("without the TCP transfer: iperf3 is missing (apt-get install iperf3)");
    }
}

/// The link between the tunnels is slower than what comes in, so the socket's send buffer fills. Whatever the first tunnel took in must
/// come out behind the second one in order, and without a gap between the two.
fn udp_tunnel_backpressure(backend: Backend) {
    need_program("tc", "iproute2");
    const DATAGRAMS: u64 = 400;
    let pair = Pair::new();
    // The queue has more room than the socket's send buffer, so that nothing is lost in it.
    let output = run(Command::new("tc")
        .args(["qdisc", "add", "dev", "near", "root", "tbf"])
        // So slow that the second tunnel's socket, which holds more than half a second of it, does
        // not overflow on a busy machine.
        .args([
            "rate",
            &format!("{}kbit", 1_000 / common::slowness()),
            "burst",
            "16kb",
            "limit",
            "8mb",
        ]));
    if !output.status.success() {
        skip(format!("tbf is missing: {}", String::from_utf8_lossy(&output.stderr)));
    }
    let (mut near, mut far) = pair.start_tunnels(backend);
    // The device keeps what the first tunnel leaves in it meanwhile.
    let netlink = Handle::new().unwrap();
    netlink
        .set_txqueuelen(netlink.index_of("tunnel0").unwrap(), 2 * DATAGRAMS as u32)
        .unwrap();
    let here = socket("198.18.4.1:5000");
    let there = pair.other.run(|| socket("198.18.4.2:5000")).unwrap();
    here.connect("198.18.4.2:5000").unwrap();
    let receiver = thread::spawn(move || {
        let mut next = 0;
        let mut buffer = [0; 2000];
        while next < DATAGRAMS {
            let length = again(|| there.recv(&mut buffer))
                .unwrap_or_else(|error| panic!("datagram {next} of {DATAGRAMS}: {error}"));
            assert_eq!(buffer[..length], stamped(next, 1000), "datagram {next}");
            next += 1;
        }
    });
    for number in 0..DATAGRAMS {
        here.send(&stamped(number, 1000)).unwrap();
    }
    receiver.join().unwrap();
    let sender = near.stop();
    let counters = far.stop();
    assert!(value(line_of(&sender, "udp:"), "backpressure") > 0, "{sender}");
    assert_eq!(port(&sender, "udp")[2], 0, "nothing is refused: {sender}");
    assert_eq!(
        (value(&counters, "missing"), value(&counters, "late")),
        (0, 0),
        "{counters}"
    );
}

/// A permanent error ends an example, with words, instead of being asked for again and again.
fn end_with_device(backend: Backend) {
    let options = ["--seconds", &seconds(), "--backend", option(backend)];
    let netlink = Handle::new().unwrap();
    let right = Namespace::new().unwrap();
    let netns = path_of(&right);
    let forward = ["left0", "right0", "198.18.3.1", "198.18.3.2", &netns];
    let tunnel = ["tunnel0", "198.18.4.1", "127.0.0.1:4789", "127.0.0.1:4790"];
    for (name, arguments, device) in [
        ("worker_loop", &["echo0"][..], "echo0"),
        ("forward", &forward, "left0"),
        ("udp_tunnel", &tunnel, "tunnel0"),
    ] {
        let mut running = example(name, &[arguments, &options].concat());
        running.line("ready");
        netlink.delete(netlink.index_of(device).unwrap()).unwrap();
        assert_eq!(running.wait().code(), Some(1), "{name}");
        let errors = running.errors();
        assert!(errors.contains("is gone"), "{name}: {errors}");
        assert!(errors.starts_with(&format!("{device}: ")), "which device: {errors}");
    }
}

/// The example goes on, says which device it was, and why nothing comes.
fn moved(backend: Backend) {
    let options = ["--seconds", &seconds(), "--backend", option(backend)];
    let netlink = Handle::new().unwrap();
    let right = Namespace::new().unwrap();
    let away = Namespace::new().unwrap();
    let netns = path_of(&right);
    let forward = ["left0", "right0", "198.18.3.1", "198.18.3.2", &netns];
    let tunnel = ["tunnel0", "198.18.4.1", "127.0.0.1:4789", "127.0.0.1:4790"];
    for (name, arguments, device) in [
        ("worker_loop", &["echo0"][..], "echo0"),
        ("icmp_echo", &["ping0"], "ping0"),
        ("forward", &forward, "left0"),
        ("udp_tunnel", &tunnel, "tunnel0"),
    ] {
        let mut running = example(name, &[arguments, &options].concat());
        running.line("ready");
        let mut errors = BufReader::new(running.child.stderr.take().unwrap());
        netlink
            .move_to_namespace(netlink.index_of(device).unwrap(), away.as_fd())
            .unwrap();
        // Its end, after its seconds at the latest, closes the pipe.
        let mut line = String::new();
        while !line.contains("another network namespace") {
            line.clear();
            assert_ne!(errors.read_line(&mut line).unwrap(), 0, "{name} says nothing");
        }
        assert!(line.starts_with(&format!("{device}: ")), "which device: {line}");
        running.stop();
    }
}

fn mtu_raised(backend: Backend) {
    let options = ["--seconds", &seconds(), "--backend", option(backend)];
    let netlink = Handle::new().unwrap();
    let tunnel = ["tunnel0", "198.18.4.1", "127.0.0.1:4789", "127.0.0.1:4790"];
    for (name, arguments, device, near, far) in [
        ("worker_loop", &["echo0"][..], "echo0", "198.18.1.1:0", "198.18.1.2:7"),
        ("icmp_echo", &["ping0"], "ping0", "198.18.2.1:0", "198.18.2.2:7"),
        ("udp_tunnel", &tunnel, "tunnel0", "198.18.4.1:0", "198.18.4.2:7"),
    ] {
        let mut running = example(name, &[arguments, &options].concat());
        running.line("ready");
        let index = netlink.index_of(device).unwrap();
        netlink.set_mtu(index, 9000).unwrap();
        let socket = socket(near);
        let mut errors = BufReader::new(running.child.stderr.take().unwrap());
        (0..20).for_each(|_| assert_eq!(socket.send_to(&[1; 5000], far).unwrap(), 5000));
        // Its end, after its seconds at the latest, closes the pipe.
        let mut line = String::new();
        while !line.contains("longer than the buffers") {
            line.clear();
            assert_ne!(errors.read_line(&mut line).unwrap(), 0, "{name} says nothing");
        }
        assert!(line.starts_with(&format!("{device}: ")), "which device: {line}");
        let counters = running.stop();
        let line = line_of(&counters, &format!("{device}:")).replace('(', "");
        // Those that it had not come to by then are not among them.
        assert!((1..=20).contains(&value(&line.replace(')', ""), "truncated")), "{line}");
    }
}

/// Two namespaces joined by a veth pair: this one at 10.0.0.1, the other one at 10.0.0.2.
struct Pair {
    other: Namespace,
}

impl Pair {
    fn new() -> Self {
        let netlink = Handle::new().unwrap();
        let other = Namespace::new().unwrap();
        let (near, far) = netlink.add_veth("near", "far").unwrap();
        netlink.move_to_namespace(far, other.as_fd()).unwrap();
        let there = other.run(Handle::new).unwrap().unwrap();
        let far = there.index_of("far").unwrap();
        for (netlink, index, address) in [(&netlink, near, "10.0.0.1"), (&there, far, "10.0.0.2")] {
            netlink.add_address(index, ip(address), 24).unwrap();
            netlink.set_up(index, true).unwrap();
        }
        until("the link runs", || netlink.link(near).unwrap().running);
        Self { other }
    }

    /// A tunnel on each side, both having heard of the other one.
    fn start_tunnels(&self, backend: Backend) -> (Process, Process) {
        let start = |address, local, peer| {
            let ends = ["tunnel0", address, local, peer];
            let options = [
                "--keepalive-ms",
                "50",
                "--seconds",
                &seconds(),
                "--backend",
                option(backend),
            ];
            example("udp_tunnel", &[&ends[..], &options[..]].concat())
        };
        let mut near = start("198.18.4.1", "10.0.0.1:4789", "10.0.0.2:4789");
        near.line("ready");
        // Before the second one is there, the first one's keep-alives are answered by ICMP; it must not mind.
        let mut far = self
            .other
            .run(|| start("198.18.4.2", "10.0.0.2:4789", "10.0.0.1:4789"))
            .unwrap();
        far.line("ready");
        far.line("the peer is there");
        near.line("the peer is there");
        (near, far)
    }

    /// A short TCP transfer through the tunnel. Whether it was done.
    fn transfer(&self) -> bool {
        if Command::new("iperf3").arg("-v").output().is_err() {
            return false;
        }
        let mut server = Process::start(Command::new("iperf3").args(["-s", "-1", "-B", "198.18.4.1", "--forceflush"]));
        server.line("Server listening");
        let client = self.other.run(|| {
            run(Command::new("iperf3").args(["-c", "198.18.4.1", "-t", "1", "-J", "--connect-timeout", "5000"]))
        });
        let client = client.unwrap();
        let report = String::from_utf8_lossy(&client.stdout).into_owned();
        assert!(client.status.success(), "{report}");
        let at = report.find("\"sum_received\"").expect("a report of what was received");
        let bytes = report[at..].split("\"bytes\":").nth(1).unwrap();
        let bytes: u64 = bytes
            .trim_start()
            .split(|c: char| !c.is_ascii_digit())
            .next()
            .unwrap()
            .parse()
            .unwrap();
        assert!(
            bytes > 1_000_000 / u64::from(common::slowness()),
            "{bytes} bytes were transferred: {report}"
        );
        assert!(server.wait().success());
        true
    }
}

fn gateway(backend: Backend) {
    const FLOWS: u64 = 16;
    const ROUNDS: u64 = 20;
    let right = Namespace::new().unwrap();
    let mut running = start_gateway(&right, backend);
    let far = right.run(|| socket("198.18.5.2:5000")).unwrap();
    let near: Vec<UdpSocket> = (0..FLOWS).map(|_| socket("198.18.5.1:0")).collect();
    for number in 0..ROUNDS {
        for socket in &near {
            socket.send_to(&stamped(number, 1472), "198.18.5.2:5000").unwrap();
            let mut buffer = [0; 2000];
            let (length, from) = again(|| far.recv_from(&mut buffer)).expect("a datagram");
            assert_eq!(buffer[..length], stamped(number, 1472));
            far.send_to(&stamped(number + 1000, 100), from).unwrap();
            assert_received(socket, &stamped(number + 1000, 100));
        }
    }
    // Each worker says so, now and then.
    let mut silent = vec!["worker 0: ", "worker 1: "];
    while !silent.is_empty() {
        let line = running.line("worker ");
        silent.retain(|worker| !line.starts_with(worker));
    }
    let report = running.stop();
    assert!(report.contains("the engine stops"), "{report}");
    for worker in [
        "worker 0 (left0:q0, right0:q0): clean",
        "worker 1 (left0:q1, right0:q1): clean",
    ] {
        line_of(&report, worker);
    }
    let total = line_of(&report, "total: ");
    let numbers: Vec<u64> = total.split(' ').filter_map(|word| word.parse().ok()).collect();
    let &[received, sent, refused] = &numbers[..3] else {
        panic!("{report}")
    };
    assert!(received >= sent && sent >= 2 * FLOWS * ROUNDS, "{report}");
    assert_eq!(refused, 0, "{report}");
}

fn gateway_ends(backend: Backend) {
    let right = Namespace::new().unwrap();
    let mut running = start_gateway(&right, backend);
    let there = right.run(Handle::new).unwrap().unwrap();
    there.set_up(there.index_of("right0").unwrap(), false).unwrap();
    running.line("right0 is down");
    let netlink = Handle::new().unwrap();
    netlink.delete(netlink.index_of("left0").unwrap()).unwrap();
    assert_eq!(running.wait().code(), Some(1));
    let errors = running.errors();
    assert!(errors.contains("left0 is gone"), "{errors}");
}

fn start_gateway(right: &Namespace, backend: Backend) -> Process {
    let options = [
        &path_of(right),
        "2",
        "--seconds",
        &seconds(),
        "--backend",
        option(backend),
    ];
    let mut running = example("gateway", &options);
    running.line("ready");
    running
}

fn start_forward(right: &Namespace, backend: Backend) -> Process {
    let netns = path_of(right);
    let ends = ["left0", "right0", "198.18.3.1", "198.18.3.2", &netns];
    let options = ["--seconds", &seconds(), "--backend", option(backend)];
    let mut running = example("forward", &[&ends[..], &options[..]].concat());
    running.line("ready");
    running
}

/// The file of a namespace without a name: this process's descriptor.
fn path_of(namespace: &Namespace) -> String {
    format!("/proc/{}/fd/{}", process::id(), namespace.as_fd().as_raw_fd())
}

/// Starts an example, which cargo built beside this test, in the namespace of the calling thread.
fn example(name: &str, arguments: &[&str]) -> Process {
    Process::start(Command::new(path(name)).args(arguments))
}

/// The program of an example.
fn path(name: &str) -> PathBuf {
    // target/<profile>/deps/<this test>: the examples are two floors up.
    let test = env::current_exe().unwrap();
    let path = test.ancestors().nth(2).unwrap().join("examples").join(name);
    assert!(
        path.is_file(),
        "{} is missing; `cargo test --features lab` builds the examples, `cargo test --test examples` does not",
        path.display()
    );
    path
}

/// A child process. Dropping it kills it, and waits until it is gone.
struct Process {
    child: Child,
    lines: Receiver<String>,
    name: String,
}

impl Process {
    fn start(command: &mut Command) -> Self {
        let name = command.get_program().to_string_lossy().into_owned();
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap_or_else(|error| panic!("{name}: {error}"));
        let stdout = BufReader::new(child.stdout.take().unwrap());
        let (sender, lines) = mpsc::channel();
        // Ends with the child, which holds the other end of the pipe.
        thread::spawn(move || {
            for line in stdout.lines().map_while(Result::ok) {
                if sender.send(line).is_err() {
                    break;
                }
            }
        });
        Self { child, lines, name }
    }

    /// The next line that starts with `start`; lines before it are passed over.
    fn line(&mut self, start: &str) -> String {
        let deadline = Instant::now() + PATIENCE * common::slowness();
        while let Ok(line) = self
            .lines
            .recv_timeout(deadline.saturating_duration_since(Instant::now()))
        {
            if line.starts_with(start) {
                return line;
            }
        }
        let _ = self.child.kill();
        let errors = self.errors();
        panic!("{} does not say {start:?}: {errors}", self.name);
    }

    /// Stops it as Ctrl-C does, and returns what it prints at the end.
    fn stop(&mut self) -> String {
        let pid = libc::pid_t::try_from(self.child.id()).unwrap();
        // SAFETY: no memory is passed; the child was not waited for yet, so the number is still its own.
        assert_eq!(unsafe { libc::kill(pid, libc::SIGINT) }, 0);
        let status = self.wait();
        let rest: Vec<String> = self.lines.iter().collect();
        let errors = self.errors();
        assert!(status.success(), "{}: {status}: {errors}", self.name);
        rest.join("\n")
    }

    fn wait(&mut self) -> ExitStatus {
        let deadline = Instant::now() + PATIENCE * common::slowness();
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            assert!(Instant::now() < deadline, "{} does not end", self.name);
            thread::sleep(Duration::from_millis(5));
        }
    }

    /// What it said on stderr. Once it has ended.
    fn errors(&mut self) -> String {
        let mut text = String::new();
        if let Some(mut stderr) = self.child.stderr.take() {
            let _ = stderr.read_to_string(&mut text);
        }
        text
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Runs a program that ends on its own; kills it if it does not.
fn run(command: &mut Command) -> Output {
    let mut process = Process::start(command);
    let status = process.wait();
    let stdout: Vec<String> = process.lines.iter().collect();
    Output {
        status,
        stdout: stdout.join("\n").into_bytes(),
        stderr: process.errors().into_bytes(),
    }
}

fn option(backend: Backend) -> &'static str {
    match backend {
        Backend::IoUring => "io_uring",
        Backend::Syscalls => "syscalls",
    }
}

/// The examples' own end, should this process be killed before it can end them.
fn seconds() -> String {
    (25 * common::slowness()).to_string()
}

fn ip(address: &str) -> IpAddr {
    address.parse().unwrap()
}

fn socket(address: &str) -> UdpSocket {
    let socket = UdpSocket::bind(address).unwrap();
    socket
        .set_read_timeout(Some(PATIENCE / 2 * common::slowness()))
        .unwrap();
    socket
}

/// A payload that tells its number at every place.
fn stamped(number: u64, length: usize) -> Vec<u8> {
    (0..length)
        .map(|at| (number.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> (at % 8 * 8)) as u8 ^ at as u8)
        .collect()
}

fn assert_received(socket: &UdpSocket, expected: &[u8]) {
    let mut buffer = [0; 2000];
    let length = again(|| socket.recv(&mut buffer)).expect("a datagram");
    assert!(
        buffer[..length] == *expected,
        "{:02x?} instead of {expected:02x?}",
        &buffer[..length]
    );
}

fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE * common::slowness();
    while !holds() {
        assert!(Instant::now() < deadline, "not so: {what}");
        thread::sleep(Duration::from_millis(2));
    }
}

/// What a port received, sent and had refused, as the example printed it.
fn port(counters: &str, name: &str) -> [u64; 3] {
    let line = line_of(counters, &format!("{name}:"));
    ["received", "sent", "refused"].map(|word| value(line, word))
}

fn line_of<'a>(counters: &'a str, start: &str) -> &'a str {
    let found = counters.lines().find(|line| line.starts_with(start));
    found.unwrap_or_else(|| panic!("no {start} in {counters}"))
}

/// The number behind a word.
fn value(text: &str, word: &str) -> u64 {
    let mut words = text.split_whitespace().skip_while(|&found| found != word).skip(1);
    let number = words.next().and_then(|number| number.parse().ok());
    number.unwrap_or_else(|| panic!("no number behind {word} in {text}"))
}
