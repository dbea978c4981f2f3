//! The generator and the receiver: what is sent is what arrives, when it was due is what it says, and what is wrong is found.

mod common;

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use common::{Trial, kernel, need_program, need_tun, skip, trial};
use tun_driver::lab::generator::{self, Config, GROUP_MAX, Generated, Generator, Limit, Way};
use tun_driver::lab::packet::{Fault, Framing, MIN_IPV4, MIN_IPV6, Spec, Stamp};
use tun_driver::lab::receiver::{Receiver, SocketReceiver, Until};
use tun_driver::lab::{Namespace, monotonic_ns};
use tun_driver::netlink::Handle;
use tun_driver::{Backend, Batch, Builder, Mode, SinglePort, WorkerConfig};

fn main() {
    let mut trials: Vec<Trial> = Vec::new();
    for way in [None, Some(Way::Single), Some(Way::Batch), Some(Way::Gso)] {
        for (rate, packets, flows) in [(1_000, 100, 1), (50_000, 1_500, 3), (400_000, 2_000, 5)] {
            let name = way.map_or("the chosen way".to_owned(), |way| format!("{way:?}"));
            trials.push(trial(
                format!("all arrive, stamped with their time, {rate} per second in {flows} flows, {name}"),
                move || arrives(way, rate, packets, flows),
            ));
        }
    }
    trials.extend([
        trial("lengths at both ends arrive whole, IPv4 and IPv6, by each way", lengths),
        trial("without a rate all arrive, too", unpaced),
        trial("an impossible rate is told, and what was left out", impossible_rate),
        trial("the ceiling is told", ceiling),
        trial("a stop ends it early and is told", stopped),
        trial("without a window each packet goes alone, the flows in turn", alone),
        trial("a group goes when its last packet is due", grouped),
        trial(
            "a thread of another namespace sends where the sockets are",
            from_elsewhere,
        ),
        trial("a pinned generator stays on its CPU; none that is not there", pinned),
        trial("the source is as asked", source),
        trial("too long a packet is refused and told, not cut in pieces", too_long),
        trial("a target without listener is told", nobody_listens),
        trial(
            "a full socket buffer is waited for, and told; nothing is lost",
            held_back,
        ),
        trial("no route is an error", no_route),
        trial(
            "loss, duplicates, disorder and damage made on purpose are found",
            faults,
        ),
        trial("without verification damage passes and the rest is found", unverified),
        trial("latency is from the intended time", latency),
        trial("books of two workers merge into one's", merging),
        trial(
            "the socket's receiver ends by count, time, quiet and stop",
            udp_receiver,
        ),
    ]);
    common::run(trials)
}

const HERE: Ipv4Addr = Ipv4Addr::new(10, 9, 0, 1);
const HERE6: Ipv6Addr = Ipv6Addr::new(0xfd00, 9, 0, 0, 0, 0, 0, 1);
const PATIENCE: Duration = Duration::from_secs(20);
static NEVER: &AtomicBool = &NEVER_SET;
static NEVER_SET: AtomicBool = AtomicBool::new(false);

fn target() -> SocketAddr {
    "10.9.0.2:9".parse().unwrap()
}

fn target6() -> SocketAddr {
    "[fd00:9::2]:9".parse().unwrap()
}

fn config(flows: usize, rate: u64, packets: u64) -> Config {
    Config {
        flows,
        rate: Some(rate),
        limit: Limit::Packets(packets),
        ..Config::new(target())
    }
}

/// A device whose queue holds more than any test here sends, so that nothing is lost for want of room.
struct Device {
    port: SinglePort,
    batch: Batch,
}

impl Device {
    fn new(mtu: u32) -> Self {
        need_tun();
        let device = Builder::new("g0", Mode::Tun)
            .mtu(mtu)
            .address(HERE, 24)
            .address(HERE6, 64)
            .up(true)
            .open()
            .unwrap();
        // Not by the builder: the ioctl wants privilege over the host.
        let netlink = Handle::new().unwrap();
        netlink.set_txqueuelen(device.index().unwrap(), 8_000).unwrap();
        let config = WorkerConfig {
            // Without registered memory, of which an ordinary user may not have much.
            backend: Some(Backend::Syscalls),
            max_packet: mtu as usize,
            buffers: 256,
            ..WorkerConfig::default()
        };
        Self {
            port: device.into_queues().remove(0).drive(&config).unwrap(),
            batch: Batch::with_capacity(64),
        }
    }

    /// Shows packets with the time when they came, until `count` have come that are no strangers, and then what else is there.
    fn drain(&mut self, count: u64, mut show: impl FnMut(&[u8], u64)) {
        let deadline = Instant::now() + PATIENCE * common::slowness();
        let mut seen = 0;
        loop {
            if seen < count {
                assert!(Instant::now() < deadline, "{seen} packets came of {count}");
                self.port.wait(Some(deadline)).unwrap();
            }
            if self.port.try_recv_many(&mut self.batch).unwrap() == 0 && seen >= count {
                return;
            }
            let now = monotonic_ns();
            for packet in &self.batch {
                seen += u64::from(Framing::NONE.check(packet) != Err(Fault::Foreign));
                show(packet, now);
            }
            self.batch.clear();
        }
    }

    /// All that was sent, with the verdict that it is all there and on schedule.
    fn receive(&mut self, generated: &Generated) -> Vec<Stamp> {
        let mut receiver = Receiver::new(generated.flows.len());
        let mut stamps = Vec::new();
        self.drain(generated.sent, |packet, now| {
            receiver.packet(packet, now);
            stamps.extend(Framing::NONE.check(packet));
        });
        generated.tell(receiver.tracker_mut());
        let summary = receiver.summary();
        summary.assert_all();
        assert_eq!(summary.received, generated.sent, "{summary}");
        assert_eq!(receiver.latency().len(), generated.sent);
        if let Some(schedule) = generated.schedule {
            let mut due: Vec<u32> = stamps.iter().map(|stamp| stamp.sent).collect();
            for stamp in &stamps {
                let due = generated.due_of(stamp.flow, stamp.sequence).unwrap();
                assert_eq!(stamp.sent, due as u32, "{stamp:?}");
            }
            // And these are the times of the schedule, each once.
            let mut expected: Vec<u32> = (0..generated.sent).map(|number| schedule.due(number) as u32).collect();
            due.sort_unstable();
            expected.sort_unstable();
            assert!(due == expected, "not every time of the schedule, or one twice");
        }
        stamps
    }
}

fn run(config: &Config) -> Generated {
    let generated = Generator::new(config).unwrap().run(NEVER).unwrap();
    assert!(generated.refused.is_empty() && !generated.stopped, "{generated}");
    assert_eq!(
        generated.flows.iter().map(|&count| u64::from(count)).sum::<u64>(),
        generated.sent
    );
    generated
}

/// The way that a group takes to a device without checksum offload: UDP GSO if the kernel has it there.
fn best() -> Way {
    if kernel() >= (6, 11) { Way::Gso } else { Way::Batch }
}

/// The ways by which packets come to such a device.
fn ways() -> Vec<Way> {
    let mut ways = vec![Way::Single, Way::Batch];
    ways.extend((best() == Way::Gso).then_some(Way::Gso));
    ways
}

fn arrives(way: Option<Way>, rate: u64, packets: u64, flows: usize) {
    if way == Some(Way::Gso) && best() != Way::Gso {
        skip("UDP GSO to a device without checksum offload wants Linux 6.11");
    }
    let mut device = Device::new(1_500);
    for length in [64, 576, 1_500] {
        let generated = run(&Config {
            way,
            length,
            ..config(flows, rate, packets)
        });
        assert_eq!(
            (generated.sent, generated.due, generated.unsent()),
            (packets, packets, 0),
            "{generated}"
        );
        assert_eq!(generated.lateness.len(), packets);
        assert_eq!(generated.group, if rate == 400_000 { 8 } else { 1 });
        assert!(
            generated.cpu > Duration::ZERO && generated.rate() <= rate as f64,
            "{generated}"
        );
        // It cannot have ended before the last one was due: none goes before its time.
        let schedule = generated.schedule.unwrap();
        assert!(
            generated.wall.as_nanos() >= u128::from(schedule.due(packets - 1) - schedule.start_ns),
            "{generated}"
        );
        let calls = match way.unwrap_or(best()) {
            Way::Single => packets,
            Way::Batch | Way::Gso => packets.div_ceil(generated.group as u64),
        };
        // The first group by UDP GSO is refused where there is none.
        let refused = u64::from(way.is_none() && generated.group > 1 && best() != Way::Gso);
        assert_eq!(generated.calls, calls + refused, "{generated}");
        let stamps = device.receive(&generated);
        let headers = 28;
        assert!(stamps.iter().all(|stamp| stamp.length == length - headers));
        for (flow, &count) in generated.flows.iter().enumerate() {
            assert_eq!(
                stamps.iter().filter(|stamp| usize::from(stamp.flow) == flow).count(),
                count as usize
            );
            assert!(count > 0, "a flow without packets");
        }
    }
}

fn lengths() {
    let mut device = Device::new(9_000);
    for way in ways() {
        for (target, shortest) in [(target(), MIN_IPV4), (target6(), MIN_IPV6)] {
            for length in [shortest, shortest + 1, 1_501, 8_999, 9_000] {
                let config = Config {
                    target,
                    length,
                    way: Some(way),
                    // Forty are due within a window; of the long ones, no more go together than 64 KiB hold.
                    ..config(2, 2_000_000, 160)
                };
                let generated = run(&config);
                assert_eq!(generated.way, way);
                assert_eq!(generated.group, 40.min(65_507 / (length - (shortest - 16))));
                assert_eq!(device.receive(&generated).len(), 160, "{config:?}");
            }
        }
    }
}

fn unpaced() {
    let mut device = Device::new(1_500);
    let generated = run(&Config {
        rate: None,
        ..config(3, 1, 3_000)
    });
    assert_eq!(
        (generated.group, generated.way, generated.schedule),
        (GROUP_MAX, best(), None)
    );
    assert!(generated.kept_rate() && generated.lateness.is_empty() && generated.due_of(0, 0).is_none());
    assert_eq!(device.receive(&generated).len(), 3_000);
}

fn impossible_rate() {
    let _device = Device::new(1_500);
    let config = Config {
        way: Some(Way::Single),
        limit: Limit::Time(Duration::from_millis(50)),
        ..config(1, 1_000_000_000, 0)
    };
    let generated = run(&config);
    assert!(!generated.kept_rate(), "{generated}");
    assert_eq!(generated.due, 50_000_000);
    assert_eq!(generated.unsent(), 50_000_000 - generated.sent);
    // All those that were left out were due before the last one that was sent late.
    assert!(generated.lateness.max() > 1_000_000, "{generated}");
    assert!(generated.to_string().contains("was not kept"), "{generated}");
}

fn ceiling() {
    let _device = Device::new(1_500);
    let asked = Config {
        length: 1_400,
        ..config(4, 1, 1)
    };
    let ceiling = generator::ceiling(&asked, Duration::from_millis(100)).unwrap();
    let slow = common::slowness();
    assert!(
        ceiling.rate() > 1_000.0 / f64::from(slow) && ceiling.sent > 100 / u64::from(slow),
        "{ceiling}"
    );
    assert_eq!(
        (ceiling.schedule, ceiling.group, ceiling.unsent()),
        (None, 65_507 / 1_372, 0)
    );
}

fn stopped() {
    let mut device = Device::new(1_500);
    // Far apart, so that the flag is set during a sleep; and close together.
    for (rate, packets) in [(1, 100), (2_000, 1_000_000)] {
        let stop = AtomicBool::new(false);
        let mut generator = Generator::new(&config(1, rate, packets)).unwrap();
        let generated = thread::scope(|scope| {
            let running = scope.spawn(|| generator.run(&stop).unwrap());
            thread::sleep(Duration::from_millis(50));
            stop.store(true, Ordering::Relaxed);
            running.join().unwrap()
        });
        assert!(generated.stopped && generated.sent < packets, "{generated}");
        assert!(
            generated.due >= generated.sent && generated.due < packets,
            "{generated:?}"
        );
        if generated.sent > 0 {
            device.receive(&generated);
        }
    }
}

fn alone() {
    let mut device = Device::new(1_500);
    let generated = run(&Config {
        window: Duration::ZERO,
        ..config(4, 500_000, 400)
    });
    assert_eq!((generated.group, generated.way, generated.calls), (1, Way::Single, 400));
    let flows: Vec<u16> = device.receive(&generated).iter().map(|stamp| stamp.flow).collect();
    assert!(flows.chunks(4).all(|round| round == [0, 1, 2, 3]), "{flows:?}");
}

fn grouped() {
    let mut device = Device::new(1_500);
    let window = Duration::from_millis(10);
    let generated = run(&Config {
        window,
        ..config(2, 1_000, 25)
    });
    assert_eq!(
        (generated.group, generated.calls),
        (10, 3 + u64::from(best() != Way::Gso))
    );
    assert_eq!(generated.flows, [15, 10]);
    // By the time when the tenth is due, the first has waited for nine others.
    assert!(generated.lateness.max() >= 9_000_000, "{generated}");
    assert!(generated.wall >= Duration::from_millis(24), "{generated}");
    device.receive(&generated);
}

fn from_elsewhere() {
    let mut device = Device::new(1_500);
    let mut generator = Generator::new(&config(2, 100_000, 500)).unwrap();
    let elsewhere = Namespace::new().unwrap();
    let generated = elsewhere.run(|| generator.run(NEVER).unwrap()).unwrap();
    assert_eq!(device.receive(&generated).len(), 500);
    assert!(
        elsewhere.run(|| Generator::new(&config(1, 1, 1)).is_err()).unwrap(),
        "no route there"
    );
}

fn pinned() {
    let mut device = Device::new(1_500);
    let cpu = allowed_cpus().pop().unwrap();
    let generated = thread::spawn(move || {
        let generated = run(&Config {
            cpu: Some(cpu),
            ..config(1, 100_000, 100)
        });
        assert_eq!(allowed_cpus(), [cpu]);
        generated
    });
    device.receive(&generated.join().unwrap());
    let nowhere = Config {
        cpu: Some(1_000_000),
        ..config(1, 1, 1)
    };
    let error = Generator::new(&nowhere).unwrap().run(NEVER).unwrap_err();
    assert!(error.to_string().contains("CPU 1000000"), "{error}");
}

/// The CPUs of the calling thread, as /proc says them: "0-1,4".
fn allowed_cpus() -> Vec<usize> {
    let status = std::fs::read_to_string("/proc/thread-self/status").unwrap();
    let list = status
        .lines()
        .find_map(|line| line.strip_prefix("Cpus_allowed_list:"))
        .unwrap();
    list.trim()
        .split(',')
        .flat_map(|range| {
            let (first, last) = range.split_once('-').unwrap_or((range, range));
            first.parse::<usize>().unwrap()..=last.parse().unwrap()
        })
        .collect()
}

fn source() {
    let mut device = Device::new(1_500);
    let generated = run(&Config {
        source: Some("10.9.0.1:40000".parse().unwrap()),
        ..config(3, 100_000, 60)
    });
    let mut ports = Vec::new();
    device.drain(generated.sent, |packet, _| {
        let Ok(stamp) = Framing::NONE.check(packet) else { return };
        assert_eq!(packet[12..16], HERE.octets());
        ports.push((stamp.flow, u16::from_be_bytes([packet[20], packet[21]])));
    });
    ports.sort_unstable();
    ports.dedup();
    assert_eq!(ports, [(0, 40_000), (1, 40_001), (2, 40_002)]);
}

fn too_long() {
    let mut device = Device::new(1_500);
    for target in [target(), target6()] {
        for way in [Way::Single, Way::Batch, Way::Gso] {
            let long = Config {
                target,
                length: 1_501,
                way: Some(way),
                ..config(1, 1_000_000, 40)
            };
            let generated = Generator::new(&long).unwrap().run(NEVER).unwrap();
            assert_eq!((generated.sent, generated.unsent()), (0, 0), "{generated}");
            let told: u64 = generated.refused.values().sum();
            assert_eq!(told, 40, "{generated}");
            assert!(!generated.kept_rate(), "{generated}");
        }
    }
    device.drain(0, |packet, _| {
        assert_eq!(Framing::NONE.check(packet), Err(Fault::Foreign))
    });
}

fn nobody_listens() {
    let closed = UdpSocket::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let generated = run(&Config {
        target: closed,
        ..config(1, 5_000, 50)
    });
    assert!(generated.answers > 0, "{generated}");
    // Being told of an earlier packet takes nothing away from the later ones.
    assert_eq!(generated.sent, 50, "{generated}");
}

fn held_back() {
    need_program("tc", "iproute2");
    const PACKETS: u64 = 1_000;
    // A way that is slower than what is sent, with more room in its queue than in the socket's buffer.
    let rate = format!("{}kbit", 4_000 / common::slowness());
    let tc = Command::new("tc")
        .args(["qdisc", "add", "dev", "lo", "root", "tbf"])
        .args(["rate", &rate, "burst", "16kb", "limit", "8mb"])
        .output()
        .unwrap();
    if !tc.status.success() {
        skip(format!("tbf is missing: {}", String::from_utf8_lossy(&tc.stderr)));
    }
    for way in [Way::Single, Way::Batch, Way::Gso] {
        let mut receiver = SocketReceiver::bind("127.0.0.1:0".parse().unwrap(), Receiver::new(1)).unwrap();
        let generated = run(&Config {
            target: receiver.address().unwrap(),
            length: 576,
            way: Some(way),
            ..config(1, 1_000_000, PACKETS)
        });
        assert_eq!((generated.sent, generated.unsent()), (PACKETS, 0), "{generated}");
        // Unless it was as slow itself, for which a busy machine must hold it up a thousand times as
        // long as it takes: 576 kB pass in 1.1 s, of which the socket's buffer takes less than half.
        assert!(
            generated.stalls > 0 || generated.wall > Duration::from_secs(1) * common::slowness(),
            "{generated}; it took {:?}",
            generated.wall
        );
        assert!(!generated.kept_rate(), "{generated}");
        let until = Until {
            packets: Some(PACKETS),
            time: Some(PATIENCE * common::slowness()),
            ..Until::default()
        };
        receiver.run(until, NEVER).unwrap();
        let mut books = receiver.into_receiver();
        generated.tell(books.tracker_mut());
        books.summary().assert_all();
        // The last ones were due within a millisecond and waited for the others: that is in their latency, and it is at least what they took
        // on the way: 16 kB of 576 kB at once, the rest at 500 kB/s.
        assert!(books.latency().max() > 1_000_000_000, "{books}");
    }
}

fn no_route() {
    let error = Generator::new(&config(1, 1, 1)).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::NetworkUnreachable, "{error}");
}

/// Packets 0..`count` of `flows` flows in turn, as they would arrive.
fn packets(flows: u16, count: u32) -> Vec<Vec<u8>> {
    let spec = Spec::new("10.9.0.1:1000".parse().unwrap(), target());
    let packet = |flow, sequence| {
        let mut buffer = vec![0; 100];
        spec.flow(flow).build(&mut buffer, 100, sequence, 1_000_000);
        buffer
    };
    (0..count)
        .flat_map(|sequence| (0..flows).map(move |flow| packet(flow, sequence)))
        .collect()
}

fn faults() {
    let mut packets = packets(2, 100);
    let damaged = packets.len() - 1;
    packets[damaged][60] ^= 1; // flow 1, 99
    packets[10].truncate(90); // flow 0, 5
    packets.swap(20, 22); // flow 0: 11 before 10
    packets.insert(50, packets[40].clone()); // flow 0, 20 again
    packets.remove(31); // flow 1, 15
    let mut receiver = Receiver::new(2);
    packets.iter().for_each(|packet| receiver.packet(packet, 1_000_500));
    let mut stranger = [0; 48];
    (stranger[0], stranger[6]) = (0x60, 58);
    receiver.packet(&stranger, 0);
    (0..2).for_each(|flow| receiver.tracker_mut().sent(flow, 100));
    let summary = receiver.summary();
    assert_eq!(
        (
            summary.received,
            summary.lost,
            summary.late,
            summary.duplicates,
            summary.damaged,
            summary.foreign
        ),
        (197, 3, 1, 1, 2, 1),
        "{summary}"
    );
    assert_eq!(summary.faults.get("corrupted"), Some(&1), "{summary}");
    assert_eq!(summary.faults.get("length"), Some(&1), "{summary}");
    assert_eq!(receiver.latency().len(), 198, "whole packets, the duplicate too");
    assert_eq!((receiver.latency().min(), receiver.latency().max()), (500, 500));
    assert_eq!(receiver.bytes(), 198 * 100);
}

fn unverified() {
    let mut packets = packets(1, 10);
    packets[3][60] ^= 1;
    packets[5].truncate(99);
    packets.swap(7, 8);
    let mut receiver = Receiver::new(1).verify(false);
    packets.iter().for_each(|packet| receiver.packet(packet, 1_000_000));
    receiver.tracker_mut().sent(0, 11);
    let summary = receiver.summary();
    assert_eq!(
        (summary.received, summary.lost, summary.late, summary.damaged),
        (9, 2, 1, 1),
        "{summary}"
    );
}

fn latency() {
    let mut device = Device::new(1_500);
    let generated = run(&config(2, 20_000, 100));
    let schedule = generated.schedule.unwrap();
    let mut receiver = Receiver::new(2);
    let now = monotonic_ns();
    device.drain(generated.sent, |packet, _| receiver.packet(packet, now));
    let latency = receiver.latency();
    for (found, number) in [(latency.max(), 0), (latency.min(), 99)] {
        let expected = now - schedule.due(number);
        assert!(
            latency.equivalent(found, expected),
            "packet {number}: {found} and not {expected}"
        );
    }
    // That the stamp's clock has begun anew in the meantime does not matter.
    let stamp = Stamp {
        flow: 0,
        sequence: 0,
        length: 16,
        sent: u32::MAX - 9,
    };
    let mut receiver = Receiver::new(1);
    receiver.record(Ok(stamp), 16, (1 << 32) + 90);
    assert_eq!(receiver.latency().max(), 100);
}

fn merging() {
    let packets = packets(2, 200);
    let mut whole = Receiver::new(2);
    let mut parts = [Receiver::new(2), Receiver::new(2)];
    for (index, packet) in packets.iter().enumerate() {
        if index % 50 == 7 {
            continue;
        }
        let now = 1_000_000 + index as u64 * 1_000;
        whole.packet(packet, now);
        // Flow 0 on one, flow 1 on both.
        parts[usize::from(index % 2 == 1 && index % 3 == 0)].packet(packet, now);
    }
    let [mut merged, other] = parts;
    assert_ne!(merged.summary(), whole.summary());
    merged.merge(&other);
    for receiver in [&mut merged, &mut whole] {
        (0..2).for_each(|flow| receiver.tracker_mut().sent(flow, 201));
    }
    assert_eq!(merged.summary(), whole.summary());
    assert_eq!(merged.summary().lost, 8 + 2);
    assert_eq!(merged.latency(), whole.latency());
    assert_eq!((merged.bytes(), merged.span()), (whole.bytes(), whole.span()));
    // The same packets once more are duplicates.
    let again = whole.clone();
    merged.merge(&again);
    assert_eq!((merged.summary().received, merged.summary().duplicates), (392, 392));
}

fn udp_receiver() {
    let bind = || SocketReceiver::bind("127.0.0.1:0".parse().unwrap(), Receiver::new(2)).unwrap();
    let send = |receiver: &SocketReceiver, packets| {
        let target = receiver.address().unwrap();
        let generated = run(&Config {
            target,
            ..config(2, 200_000, packets)
        });
        assert_eq!(generated.sent, packets);
        generated
    };

    let mut receiver = bind();
    let generated = send(&receiver, 300);
    let until = Until {
        packets: Some(300),
        ..Until::default()
    };
    assert_eq!(receiver.run(until, NEVER).unwrap(), 300);
    assert_eq!(receiver.dropped().unwrap(), 0);
    let mut books = receiver.into_receiver();
    generated.tell(books.tracker_mut());
    books.summary().assert_all();
    assert_eq!(books.bytes(), 300 * 36);

    let mut receiver = bind();
    send(&receiver, 100);
    let until = Until {
        quiet: Some(Duration::from_millis(30)),
        ..Until::default()
    };
    assert_eq!(receiver.run(until, NEVER).unwrap(), 100);
    let until = Until {
        time: Some(Duration::from_millis(30)),
        ..Until::default()
    };
    assert_eq!(receiver.run(until, NEVER).unwrap(), 0);
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        let running = scope.spawn(|| receiver.run(Until::default(), &stop).unwrap());
        thread::sleep(Duration::from_millis(30));
        stop.store(true, Ordering::Relaxed);
        assert_eq!(running.join().unwrap(), 0);
    });
    send(&receiver, 100);
    assert_eq!(
        receiver.run(Until::default(), &stop).unwrap(),
        100,
        "what is there is not left behind"
    );

    // What the socket has no room for is told.
    let mut receiver = SocketReceiver::bind_with("127.0.0.1:0".parse().unwrap(), 4_096, Receiver::new(1)).unwrap();
    send(&receiver, 2_000);
    let until = Until {
        quiet: Some(Duration::from_millis(10)),
        ..Until::default()
    };
    let came = receiver.run(until, NEVER).unwrap();
    assert!(came < 2_000, "{came}");
    assert_eq!(came + receiver.dropped().unwrap(), 2_000);
}
