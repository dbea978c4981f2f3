//! Frames on an interface: what the generator sends past the stack arrives whole at the other end of the link, each frame on its own.

mod common;

use std::net::{SocketAddr, UdpSocket};
use std::process::Command;
use std::sync::atomic::AtomicBool;
use std::thread;
use std::time::{Duration, SystemTime};

use common::{Trial, kernel, need_program, trial};
use tun_driver::lab::generator::{Config, GROUP_MAX, Generated, Generator, IMIX, Limit, Link, Way, cut_frames};
use tun_driver::lab::packet::{Ethernet, Framing, PKTGEN_MAGIC};
use tun_driver::lab::receiver::{Receiver, SocketReceiver, Until};
use tun_driver::netlink::Handle;

fn main() {
    let mut trials: Vec<Trial> = Vec::new();
    for (family, least) in [("IPv4", 46), ("IPv6", 64)] {
        for length in [least, 552, 1_500] {
            for flows in [1, 64, 10_000] {
                trials.push(trial(
                    format!("{length} bytes in {flows} flows over {family} arrive whole"),
                    move || {
                        let generated = arrive(family == "IPv6", flows, |config| config.length = length);
                        assert!(generated.group == GROUP_MAX.min(65_507 / length) || length > 552);
                        assert_eq!(generated.way, best());
                    },
                ));
            }
        }
    }
    trials.extend([
        trial("a mix of lengths arrives whole", mixed),
        trial("paced frames go one by one and keep the rate", paced),
        trial(
            "an interface that takes large frames gets each on its own",
            whole_interface,
        ),
        trial("an interface that is down refuses all, and the run ends", down),
        trial("no interface of that name is told", nameless),
        trial(
            "a mix without a link, and a link without a source, are refused",
            senseless,
        ),
        trial("frames that find no room are told as dropped", no_room),
        trial("what goes out is not received", outgoing),
        trial("pktgen's header is read", pktgen),
        trial("others' frames are foreign", foreign),
    ]);
    common::run(trials)
}

const NEAR: &str = "v0";
const FAR: &str = "v1";
const ETHERNET: Ethernet = Ethernet {
    source: [2, 0, 0, 0, 0, 1],
    target: [2, 0, 0, 0, 0, 2],
};
const BEHIND_ETHERNET: Framing = Framing {
    ethernet: Some(ETHERNET),
    ..Framing::NONE
};

/// How many are sent: at least one of each flow, and no more on a slow machine.
fn packets() -> u64 {
    20_000 / u64::from(common::slowness().min(2))
}

/// A link whose near end cuts large frames.
fn link() {
    let netlink = Handle::new().unwrap();
    let (near, far) = netlink.add_veth(NEAR, FAR).unwrap();
    cut_frames(NEAR).unwrap();
    for index in [near, far] {
        netlink.set_up(index, true).unwrap();
    }
    netlink.wait_running(near, Duration::from_secs(5)).unwrap();
}

fn config(ipv6: bool, flows: usize) -> Config {
    let [source, target]: [SocketAddr; 2] = if ipv6 {
        ["[fd00::1]:20000", "[fd00::2]:9"]
    } else {
        ["198.18.0.1:20000", "198.18.0.2:9"]
    }
    .map(|address| address.parse().unwrap());
    Config {
        source: Some(source),
        flows,
        link: Some(Link {
            interface: NEAR.to_owned(),
            ethernet: ETHERNET,
        }),
        rate: None,
        limit: Limit::Packets(packets()),
        length: 552,
        ..Config::new(target)
    }
}

fn receiver(flows: usize) -> SocketReceiver {
    SocketReceiver::on_interface(FAR, Receiver::new(flows).framing(BEHIND_ETHERNET)).unwrap()
}

/// Sends by a configuration, and asserts that all arrives, each in order and unchanged.
fn arrive(ipv6: bool, flows: usize, change: impl FnOnce(&mut Config)) -> Generated {
    link();
    let mut config = config(ipv6, flows);
    change(&mut config);
    transfer(&config)
}

fn transfer(config: &Config) -> Generated {
    let mut receiver = receiver(config.flows);
    let generated = thread::scope(|scope| {
        let receive = scope.spawn(|| {
            let until = Until {
                packets: Some(packets()),
                quiet: Some(Duration::from_secs(2)),
                time: Some(Duration::from_secs(20) * common::slowness()),
            };
            receiver.run(until, &AtomicBool::new(false)).unwrap()
        });
        let generated = Generator::new(config).unwrap().run(&AtomicBool::new(false)).unwrap();
        receive.join().unwrap();
        generated
    });
    assert_eq!((generated.sent, generated.refused.len()), (packets(), 0), "{generated}");
    assert_eq!(receiver.dropped().unwrap(), 0);
    let mut books = receiver.into_receiver();
    generated.tell(books.tracker_mut());
    books.summary().assert_all();
    assert_eq!(books.summary().received, packets());
    let frames: u64 = books.bytes();
    if config.mix.is_empty() {
        assert_eq!(frames, packets() * (config.length as u64 + 14));
    }
    generated
}

/// The way that groups take: UDP GSO if packet sockets have it.
fn best() -> Way {
    if kernel() >= (6, 2) { Way::Gso } else { Way::Batch }
}

fn mixed() {
    let generated = arrive(false, 16, |config| config.mix = IMIX.to_vec());
    assert_eq!(generated.way, best());
    assert!(generated.group > 1);
}

fn paced() {
    let generated = arrive(false, 8, |config| config.rate = Some(20_000));
    assert_eq!((generated.way, generated.group), (Way::Single, 1));
    assert_eq!(generated.lateness.len(), packets());
}

fn whole_interface() {
    let netlink = Handle::new().unwrap();
    let (near, far) = netlink.add_veth(NEAR, FAR).unwrap();
    for index in [near, far] {
        netlink.set_up(index, true).unwrap();
    }
    netlink.wait_running(near, Duration::from_secs(5)).unwrap();
    assert_ne!(transfer(&config(false, 4)).way, Way::Gso);
    let forced = Config {
        way: Some(Way::Gso),
        ..config(false, 4)
    };
    let error = Generator::new(&forced).unwrap_err();
    assert!(error.to_string().contains("tx off"), "{error}");
}

fn down() {
    link();
    let netlink = Handle::new().unwrap();
    netlink.set_up(netlink.index_of(NEAR).unwrap(), false).unwrap();
    let generated = Generator::new(&config(false, 4))
        .unwrap()
        .run(&AtomicBool::new(false))
        .unwrap();
    assert_eq!(generated.sent, 0);
    assert_eq!(generated.refused[&libc::ENETDOWN], packets());
}

fn nameless() {
    let error = Generator::new(&config(false, 1)).unwrap_err();
    assert!(error.to_string().contains(NEAR), "{error}");
    let error = SocketReceiver::on_interface("nobody", Receiver::new(1)).unwrap_err();
    assert!(error.to_string().contains("nobody"), "{error}");
}

fn senseless() {
    let base = config(false, 1);
    for wrong in [
        Config {
            source: None,
            ..base.clone()
        },
        Config {
            link: None,
            mix: IMIX.to_vec(),
            ..base.clone()
        },
        Config {
            mix: vec![46, 20],
            ..base.clone()
        },
    ] {
        let error = Generator::new(&wrong).unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::InvalidInput, "{error}");
    }
}

fn no_room() {
    link();
    let books = Receiver::new(4).framing(BEHIND_ETHERNET);
    let mut receiver = SocketReceiver::on_interface_with(FAR, 1, books).unwrap();
    let generated = Generator::new(&config(false, 4))
        .unwrap()
        .run(&AtomicBool::new(false))
        .unwrap();
    let received = receiver.run(Until::default(), &AtomicBool::new(true)).unwrap();
    let dropped = receiver.dropped().unwrap();
    assert!(dropped > 0 && received > 0);
    assert_eq!(received + dropped, generated.sent);
}

fn outgoing() {
    link();
    let near = SocketReceiver::on_interface(NEAR, Receiver::new(4).framing(BEHIND_ETHERNET)).unwrap();
    let (mut near, mut far) = (near, receiver(4));
    Generator::new(&config(false, 4))
        .unwrap()
        .run(&AtomicBool::new(false))
        .unwrap();
    let stopped = AtomicBool::new(true);
    assert_eq!(near.run(Until::default(), &stopped).unwrap(), 0);
    assert_eq!(far.run(Until::default(), &stopped).unwrap(), packets());
}

fn pktgen() {
    link();
    let netlink = Handle::new().unwrap();
    let [near, far] = [NEAR, FAR].map(|name| netlink.index_of(name).unwrap());
    netlink.add_address(near, "198.18.0.1".parse().unwrap(), 24).unwrap();
    netlink
        .add_neighbour(near, "198.18.0.2".parse().unwrap(), ETHERNET.target)
        .unwrap();
    let _ = far;
    let books = Receiver::new(2).framing(BEHIND_ETHERNET).pktgen(9);
    let mut receiver = SocketReceiver::on_interface(FAR, books).unwrap();
    let socket = UdpSocket::bind("198.18.0.1:0").unwrap();
    // Of 1 to 4, packet 3 is lost; 4 comes twice; another thread's packet 1.
    for (sequence, port) in [(1u32, 9), (2, 9), (4, 9), (4, 9), (1, 10)] {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap();
        let mut payload = [0u8; 18];
        for (at, word) in [PKTGEN_MAGIC, sequence, now.as_secs() as u32, now.subsec_micros()]
            .into_iter()
            .enumerate()
        {
            payload[4 * at..4 * at + 4].copy_from_slice(&word.to_be_bytes());
        }
        socket.send_to(&payload, ("198.18.0.2", port)).unwrap();
    }
    let until = Until {
        packets: Some(5),
        time: Some(Duration::from_secs(5)),
        ..Until::default()
    };
    receiver.run(until, &AtomicBool::new(false)).unwrap();
    let summary = receiver.receiver().summary();
    assert_eq!(summary.received, 4, "{summary}");
    assert_eq!(
        (summary.lost, summary.duplicates, summary.damaged),
        (1, 1, 0),
        "{summary}"
    );
    let latency = receiver.receiver().latency();
    assert_eq!(latency.len(), 5);
    assert!(
        latency.max() < 2_000_000_000,
        "the clocks are the same: {}",
        latency.max()
    );
}

fn foreign() {
    need_program("ping", "iputils-ping");
    link();
    let netlink = Handle::new().unwrap();
    let near = netlink.index_of(NEAR).unwrap();
    netlink.add_address(near, "198.18.0.1".parse().unwrap(), 24).unwrap();
    netlink
        .add_neighbour(near, "198.18.0.2".parse().unwrap(), ETHERNET.target)
        .unwrap();
    let mut receiver = receiver(1);
    let _no_answer = Command::new("ping")
        .args(["-c1", "-W1", "198.18.0.2"])
        .output()
        .unwrap();
    receiver.take().unwrap();
    let summary = receiver.receiver().summary();
    assert!(summary.foreign >= 1 && summary.damaged == 0, "{summary}");
}
