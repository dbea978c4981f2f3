//! Opening a device with its queues and settings, on real devices.

mod common;
mod device;

use std::fs::File;
use std::io;
use std::net::{IpAddr, Ipv4Addr, UdpSocket};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::time::Duration;

use common::{need_ids, need_tun, trial};
use device::{
    NOBODY, Node, exists, ioctl_int, ioctl_value, link, namespace, open_descriptors, raw_tun, read_packet,
    socket_behind, udp_payload, unprivileged,
};
use tun_driver::netlink::Handle;
use tun_driver::{Builder, Iface, Mode, MultiQueue, OpenError, OpenErrorKind, Support, TunNode};

const OWN_ROUTES: &str = "routes of the device's are taken, and taken again";

fn main() {
    common::run(vec![
        trial("one to 256 queues", || {
            need_tun();
            for mode in [Mode::Tun, Mode::Tap] {
                for queues in [1, 2, 3, 8, 256] {
                    let device = Builder::new("mq", mode).queues(queues).open().unwrap();
                    assert_eq!((device.len(), device.name(), device.mode()), (queues, "mq", mode));
                    assert!(!device.is_empty() && device.verified());
                    let granted = device.granted();
                    assert_eq!((granted.mode, granted.multi_queue), (mode, queues > 1));
                    assert!(!granted.packet_info && !granted.vnet_hdr && !granted.persist && !granted.napi);
                    let link = link("mq");
                    assert_eq!(device.index(), Some(link.index));
                    let tun = link.tun.unwrap();
                    assert_eq!(
                        (tun.multi_queue, tun.tap, tun.packet_info),
                        (queues > 1, mode == Mode::Tap, false)
                    );
                    if queues > 1 {
                        assert_eq!((tun.queues, tun.disabled_queues), (queues as u32, 0));
                    }
                    drop(device);
                    assert!(!exists("mq"));
                }
            }
        }),
        trial("no 257 queues and not none", || {
            need_tun();
            // T11
            let error = Builder::new("many", Mode::Tun).queues(257).open().unwrap_err();
            assert_eq!(
                (error.kind(), error.raw_os_error()),
                (OpenErrorKind::TooManyQueues, Some(libc::E2BIG))
            );
            assert_eq!(
                kind(Builder::new("many", Mode::Tun).queues(0).open()),
                OpenErrorKind::InvalidSetting
            );
            assert!(!exists("many"));
            // And what the kernel says when all are taken, disabled ones included.
            let device = Builder::new("many", Mode::Tun).queues(256).open().unwrap();
            let error = device.add_queue().unwrap_err();
            assert_eq!(
                (error.kind(), error.raw_os_error()),
                (OpenErrorKind::TooManyQueues, Some(libc::E2BIG))
            );
            assert_eq!(error.call(), "ioctl(TUNSETIFF)");
            device.queues()[9].disable().unwrap();
            assert_eq!(kind(device.add_queue().map(drop)), OpenErrorKind::TooManyQueues);
            let mut queues = device.into_queues();
            queues.pop();
        }),
        trial("out of descriptors, nothing is left", || {
            need_tun();
            let before = open_descriptors();
            let limit = |soft: u64| {
                let mut limit = libc::rlimit {
                    rlim_cur: 0,
                    rlim_max: 0,
                };
                // SAFETY: the struct lives through both calls.
                unsafe {
                    assert_eq!(libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit), 0);
                    let old = limit.rlim_cur;
                    limit.rlim_cur = soft;
                    assert_eq!(libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit), 0);
                    old
                }
            };
            // Each step of the way in turn; the largest numbers leave room for all.
            let mut failed = 0;
            for soft in 3..before as u64 + 40 {
                let old = limit(soft);
                let result = Builder::new("fds", Mode::Tun).queues(8).persist(true).open();
                limit(old);
                match result {
                    Err(error) => {
                        failed += 1;
                        assert_eq!(
                            (error.kind(), error.raw_os_error()),
                            (OpenErrorKind::DescriptorLimit, Some(libc::EMFILE))
                        );
                        assert!(!exists("fds"), "left behind at a limit of {soft}");
                    }
                    Ok(mut device) => device.set_persist(false).unwrap(),
                }
                assert_eq!(open_descriptors(), before, "leaked at a limit of {soft}");
            }
            assert!((8..before + 30).contains(&failed), "{failed} failures");
        })
        .alone(),
        trial("settings are applied", || {
            need_tun();
            need_ids(&[12, 34]);
            let mac = [0x02, 0, 0x5e, 0x10, 0, 1];
            let device = Builder::new("set", Mode::Tap)
                .queues(2)
                .packet_info(true)
                .mtu(1400)
                .mac(mac)
                .txqueuelen(123)
                .up(true)
                .owner(12)
                .group(34)
                .open()
                .unwrap();
            let link = link("set");
            assert_eq!(
                (link.mtu, link.mac, link.txqueuelen, link.up),
                (1400, Some(mac), 123, true)
            );
            let tun = link.tun.unwrap();
            assert_eq!(
                (tun.owner, tun.group, tun.packet_info, tun.persistent),
                (Some(12), Some(34), true, false)
            );
            assert!(device.granted().packet_info && device.queues().iter().all(|queue| queue.packet_info()));
            assert!(device.queues().iter().all(|queue| queue.mtu() == Some(1400)));
            let handle = device.device().unwrap();
            assert_eq!(handle.mac().unwrap(), Some(mac));
            assert_eq!(
                (
                    handle.mtu().unwrap(),
                    handle.txqueuelen().unwrap(),
                    handle.is_up().unwrap()
                ),
                (1400, 123, true)
            );
        }),
        trial("nothing is set that nobody asked for", || {
            need_tun();
            let _device = Builder::new("bare", Mode::Tun).open().unwrap();
            let link = link("bare");
            assert_eq!((link.mtu, link.up, link.txqueuelen), (1500, false, 500));
            let tun = link.tun.unwrap();
            assert_eq!((tun.owner, tun.group, tun.multi_queue), (None, None, false));
            drop(_device);
            let forced = Builder::new("bare", Mode::Tun).multi_queue(true).open().unwrap();
            assert_eq!(forced.len(), 1);
            assert!(forced.granted().multi_queue);
            assert_eq!(forced.add_queue().unwrap().name(), "bare");
        }),
        trial("a setting that fails leaves nothing behind", || {
            need_tun();
            let tap = || Builder::new("fail", Mode::Tap).queues(2).persist(true);
            let cases: Vec<(Builder, &str, i32)> = vec![
                (tap().mtu(67), "ioctl(SIOCSIFMTU)", libc::EINVAL),
                (tap().mtu(65_522), "ioctl(SIOCSIFMTU)", libc::EINVAL),
                (tap().mtu(u32::MAX), "ioctl(SIOCSIFMTU)", libc::EINVAL),
                (
                    tap().mac([1, 0, 0, 0, 0, 0]),
                    "ioctl(SIOCSIFHWADDR)",
                    libc::EADDRNOTAVAIL,
                ),
                (tap().mac([0; 6]), "ioctl(SIOCSIFHWADDR)", libc::EADDRNOTAVAIL),
                (tap().txqueuelen(u32::MAX), "ioctl(SIOCSIFTXQLEN)", libc::EINVAL),
                (tap().owner(u32::MAX), "ioctl(TUNSETOWNER)", libc::EINVAL),
                (tap().group(u32::MAX), "ioctl(TUNSETGROUP)", libc::EINVAL),
                (
                    tap().up(true).route(Ipv4Addr::new(10, 1, 2, 3), 8, None),
                    "RTM_NEWROUTE",
                    libc::EINVAL,
                ),
            ];
            for (builder, call, errno) in cases {
                let error = builder.open().unwrap_err();
                assert_eq!((error.call(), error.raw_os_error()), (call, Some(errno)), "{error}");
                assert_eq!(error.kind(), OpenErrorKind::InvalidSetting, "{error}");
                assert!(!exists("fail"), "{error}");
            }
            let refused = [
                Builder::new("fail", Mode::Tun).mac([2, 0, 0, 0, 0, 1]),
                Builder::new("fail", Mode::Tun).address(Ipv4Addr::LOCALHOST, 33),
                Builder::new("fail", Mode::Tun).route(Ipv4Addr::UNSPECIFIED, 0, None),
            ];
            for builder in refused {
                let error = builder.open().unwrap_err();
                assert_eq!(
                    (error.kind(), error.raw_os_error()),
                    (OpenErrorKind::InvalidSetting, None),
                    "{error}"
                );
            }
        }),
        trial("names that are none are refused", || {
            need_tun();
            let long = "a".repeat(16);
            for name in [
                long.as_str(),
                "a/b",
                "a b",
                "a\0b",
                "..",
                "%s",
                "a:b",
                "a\n",
                "%d%d",
                "all",
                "default",
            ] {
                let error = Builder::new(name, Mode::Tun).open().unwrap_err();
                assert_eq!(
                    (error.kind(), error.raw_os_error()),
                    (OpenErrorKind::InvalidName, None),
                    "{name:?}"
                );
            }
            assert_eq!(Builder::new("gw%d", Mode::Tun).queues(2).open().unwrap().name(), "gw0");
            assert_eq!(Builder::new("", Mode::Tap).queues(2).open().unwrap().name(), "tap0");
            assert_eq!(
                Builder::new("a23456789012345", Mode::Tap).open().unwrap().name(),
                "a23456789012345"
            );
        }),
        trial("a taken name is refused, and told by whom", || {
            need_tun();
            let _tun = Builder::new("t", Mode::Tun).queues(2).open().unwrap();
            let _tap = Iface::new("e", Mode::Tap).unwrap();
            Handle::new().unwrap().add_veth("v", "w").unwrap();
            for (name, words) in [
                ("t", "a TUN device"),
                ("e", "a TAP device"),
                ("v", "driver veth"),
                ("lo", "another kind"),
            ] {
                for queues in [1, 2] {
                    let error = Builder::new(name, Mode::Tun).queues(queues).open().unwrap_err();
                    assert_eq!(
                        (error.kind(), error.raw_os_error()),
                        (OpenErrorKind::NameTaken, Some(libc::EBUSY)),
                        "{name}"
                    );
                    assert!(error.detail().contains(words), "{error}");
                    assert!(error.to_string().contains("TUNSETIFF"), "{error}");
                    // Attaching helps only where the modes agree.
                    assert_eq!(error.detail().contains("attach_existing"), name == "t", "{error}");
                    let source =
                        std::error::Error::source(&error).and_then(|source| source.downcast_ref::<io::Error>());
                    assert_eq!(source.and_then(io::Error::raw_os_error), Some(libc::EBUSY));
                    assert_eq!(std::io::Error::from(error).kind(), std::io::ErrorKind::ResourceBusy);
                }
            }
        }),
        trial("a name that becomes free in a moment is waited for", || {
            need_tun();
            // As after kill -9: the kernel takes the device down a little later. How late this
            // thread is does not matter in each round.
            type Open = fn() -> bool;
            let ways: [(&str, Open); 4] = [
                ("Builder", || Builder::new("busy", Mode::Tun).open().is_ok()),
                ("Builder, several queues", || {
                    Builder::new("busy", Mode::Tap).queues(2).open().is_ok()
                }),
                ("Builder, attaching", || {
                    Builder::new("busy", Mode::Tun).attach_existing(true).open().is_ok()
                }),
                ("Iface", || Iface::new("busy", Mode::Tun).is_ok()),
            ];
            for (way, open) in ways {
                let waited = (0..20).any(|_| {
                    let held = Builder::new("busy", Mode::Tun).open().unwrap();
                    let going = std::thread::spawn(move || {
                        std::thread::sleep(std::time::Duration::from_millis(20));
                        drop(held);
                    });
                    let opened = open();
                    going.join().unwrap();
                    opened
                });
                assert!(waited, "{way} does not wait");
            }
        }),
        trial("queues of others are seen in what was granted", || {
            need_tun();
            let device = Builder::new("shared", Mode::Tun).queues(2).open().unwrap();
            let seen = || (device.granted().queues, device.granted().disabled_queues);
            assert_eq!(seen(), (Some(2), Some(0)));
            let other = Builder::new("shared", Mode::Tun)
                .queues(3)
                .attach_existing(true)
                .open()
                .unwrap();
            assert_eq!(seen(), (Some(5), Some(0)));
            other.queues()[0].disable().unwrap();
            assert_eq!(seen(), (Some(4), Some(1)));
            drop(other);
            assert_eq!(seen(), (Some(2), Some(0)));
            let single = Builder::new("single", Mode::Tun).open().unwrap();
            assert_eq!(single.granted().queues, None);
        }),
        trial("an address that the MTU forbids is refused in one sentence", || {
            need_tun();
            let error = Builder::new("short", Mode::Tun)
                .mtu(1279)
                .address("fd00::1".parse::<IpAddr>().unwrap(), 64)
                .open()
                .unwrap_err();
            let text = error.to_string();
            assert_eq!(
                (text.matches("os error").count(), text.matches("RTM_NEWADDR").count()),
                (1, 1),
                "{text}"
            );
            assert!(text.contains("fd00::1/64") && text.contains("1280"), "{text}");
        }),
        trial("attaching says what is in the way", || {
            need_tun();
            let attach = |name: &str, mode| Builder::new(name, mode).attach_existing(true);
            Handle::new().unwrap().add_veth("v", "w").unwrap();
            assert_eq!(kind(attach("v", Mode::Tap).open()), OpenErrorKind::NameTaken, "a veth");
            let single = Builder::new("s", Mode::Tun).open().unwrap();
            assert_eq!(
                kind(attach("s", Mode::Tun).open()),
                OpenErrorKind::NameTaken,
                "its only queue is in use"
            );
            assert_eq!(
                kind(attach("s", Mode::Tap).open()),
                OpenErrorKind::NameTaken,
                "the other mode"
            );
            assert_eq!(
                kind(attach("s", Mode::Tun).queues(2).open()),
                OpenErrorKind::QueueModeMismatch,
                "two of one"
            );
            let many = Builder::new("m", Mode::Tun).queues(2).open().unwrap();
            assert_eq!(
                kind(attach("m", Mode::Tun).open()),
                OpenErrorKind::QueueModeMismatch,
                "one of two"
            );
            let more = attach("m", Mode::Tun).queues(2).open().unwrap();
            assert_eq!(more.index(), many.index());
            assert_eq!(link("m").tun.unwrap().queues, 4);
            drop((many, more, single));
            let fresh = attach("m", Mode::Tun).open().unwrap();
            assert_eq!(fresh.name(), "m", "where there is none, one is made");
        }),
        trial("packet information other than granted is found out", || {
            need_tun();
            // The kernel takes the second queue without an error, and ignores what it asks.
            for mode in [Mode::Tun, Mode::Tap] {
                for held in [true, false] {
                    let _held = Builder::new("pi", mode).queues(2).packet_info(held).open().unwrap();
                    let attach = |info| {
                        Builder::new("pi", mode)
                            .queues(2)
                            .packet_info(info)
                            .attach_existing(true)
                    };
                    let error = attach(!held).open().unwrap_err();
                    assert_eq!(error.kind(), OpenErrorKind::NotGranted, "{error}");
                    assert_eq!(link("pi").tun.unwrap().queues, 2, "what was attached is closed");
                    assert_eq!(attach(held).open().unwrap().granted().packet_info, held);
                }
            }
        }),
        trial("other flags than granted are found out", || {
            need_tun();
            // T11
            let flags = libc::IFF_TUN | libc::IFF_NO_PI | libc::IFF_MULTI_QUEUE | libc::IFF_VNET_HDR;
            let _held = raw_tun("vnet", flags).unwrap();
            let error = Builder::new("vnet", Mode::Tun)
                .queues(2)
                .attach_existing(true)
                .open()
                .unwrap_err();
            assert_eq!(error.kind(), OpenErrorKind::NotGranted, "{error}");
            assert!(error.detail().contains("IFF_VNET_HDR"), "{error}");
            assert_eq!(link("vnet").tun.unwrap().queues, 1);
        }),
        trial("what survives on a persistent device is put back", || {
            need_tun();
            let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
            let before = raw_tun("kept", flags).unwrap();
            let fd = before.as_fd();
            ioctl_int(fd, libc::TUNSETVNETHDRSZ, 12).unwrap();
            ioctl_int(fd, libc::TUNSETSNDBUF, 5000).unwrap();
            ioctl_int(fd, libc::TUNSETCARRIER, 0).unwrap();
            let offload = libc::TUN_F_CSUM | libc::TUN_F_TSO4 | libc::TUN_F_TSO6;
            ioctl_value(fd, libc::TUNSETOFFLOAD, offload.into()).unwrap();
            ioctl_value(fd, libc::TUNSETPERSIST, 1).unwrap();
            drop(before);
            assert!(tso("kept"), "the device keeps it, or this test tests nothing");
            let device = Builder::new("kept", Mode::Tap)
                .attach_existing(true)
                .up(true)
                .open()
                .unwrap();
            assert!(!tso("kept"));
            let queue = &device.queues()[0];
            assert_eq!(ioctl_int(queue.as_fd(), libc::TUNGETVNETHDRSZ, 0).unwrap(), 10);
            assert_eq!(queue.send_buffer().unwrap(), i32::MAX);
            assert!(link("kept").running, "carrier");
            assert!(!device.granted().vnet_hdr);
        }),
        trial("filters on a persistent device are taken off", || {
            need_tun();
            // A list of one address that nobody has, and a program that drops every packet: each keeps all from the reader.
            let address = |fd: BorrowedFd<'_>| {
                let filter: [u8; 10] = [0, 0, 1, 0, 2, 0, 0, 0, 0, 0xaa];
                let filter = if cfg!(target_endian = "big") {
                    [0, 0, 0, 1, 2, 0, 0, 0, 0, 0xaa]
                } else {
                    filter
                };
                ioctl_value(fd, libc::TUNSETTXFILTER, filter.as_ptr() as u64).unwrap();
            };
            let program = |fd: BorrowedFd<'_>| {
                let program = drop_all().unwrap_or_else(|error| common::skip(format!("no BPF: {error}")));
                ioctl_int(fd, libc::TUNSETFILTEREBPF, program.as_raw_fd()).unwrap();
            };
            let filters: [&dyn Fn(BorrowedFd<'_>); 2] = [&address, &program];
            for filter in filters {
                let before = raw_tun("filter", libc::IFF_TAP | libc::IFF_NO_PI).unwrap();
                filter(before.as_fd());
                ioctl_value(before.as_fd(), libc::TUNSETPERSIST, 1).unwrap();
                drop(before);
                let reader = || Builder::new("filter", Mode::Tap).attach_existing(true).up(true);
                // The plain device leaves filters alone, which shows that they are there.
                let plain = Iface::without_packet_info("filter", Mode::Tap).unwrap();
                let socket = socket_behind(link("filter").index);
                let dropped = link("filter").stats.tx_dropped;
                socket.send_to(b"dropped", "198.18.0.2:9").unwrap();
                assert!(
                    link("filter").stats.tx_dropped > dropped,
                    "the filter survives, or this test tests nothing"
                );
                drop(plain);
                let device = reader().persist(false).open().unwrap();
                // The carrier went and came; until the kernel has seen to that, packets are dropped.
                let netlink = Handle::new().unwrap();
                netlink
                    .wait_running(device.index().unwrap(), Duration::from_secs(10))
                    .unwrap();
                let broadcast = UdpSocket::bind("198.18.0.1:0").unwrap();
                broadcast.set_broadcast(true).unwrap();
                broadcast.send_to(b"passed", "198.18.0.255:9").unwrap();
                let mut buf = [0; 2048];
                let passed = (0..20).any(|_| {
                    let len = read_packet(&device.queues()[0], &mut buf);
                    udp_payload(&buf[14..len]).is_some_and(|payload| payload == b"passed")
                });
                assert!(passed);
            }
        }),
        trial("the plain device puts offloads back too", || {
            need_tun();
            let before = raw_tun("plain", libc::IFF_TUN | libc::IFF_NO_PI | libc::IFF_VNET_HDR).unwrap();
            let offload = libc::TUN_F_CSUM | libc::TUN_F_TSO4 | libc::TUN_F_TSO6;
            ioctl_value(before.as_fd(), libc::TUNSETOFFLOAD, offload.into()).unwrap();
            ioctl_value(before.as_fd(), libc::TUNSETPERSIST, 1).unwrap();
            drop(before);
            assert!(tso("plain"));
            let _iface = Iface::new("plain", Mode::Tun).unwrap();
            assert!(!tso("plain"));
        }),
        trial("persistence, owner and group", || {
            need_tun();
            need_ids(&[7, 8, 9, 10]);
            let owners = |name: &str| {
                let tun = link(name).tun.unwrap();
                (tun.owner, tun.group)
            };
            drop(Builder::new("a", Mode::Tun).queues(2).persist(true).open().unwrap());
            assert_eq!(
                owners("a"),
                (Some(0), None),
                "the caller's, so that not everybody may attach"
            );
            drop(Builder::new("b", Mode::Tun).persist(true).owner(7).open().unwrap());
            assert_eq!(owners("b"), (Some(7), None));
            drop(Builder::new("c", Mode::Tun).persist(true).group(8).open().unwrap());
            assert_eq!(owners("c"), (None, Some(8)));
            // Taken into use again, the owner stays, and the device does.
            let again = Builder::new("b", Mode::Tun)
                .attach_existing(true)
                .persist(true)
                .open()
                .unwrap();
            assert!(again.granted().persist);
            drop(again);
            assert_eq!(owners("b"), (Some(7), None));
            // Persistent no more, it goes with its last queue.
            let last = Builder::new("a", Mode::Tun)
                .queues(2)
                .attach_existing(true)
                .persist(false)
                .open()
                .unwrap();
            assert!(!last.granted().persist);
            drop(last);
            assert!(!exists("a"));
            let mut last = Builder::new("b", Mode::Tun).attach_existing(true).open().unwrap();
            last.set_persist(false).unwrap();
            assert!(!last.granted().persist);
            drop(last);
            assert!(!exists("b"));
            let mut kept = Builder::new("d", Mode::Tun).open().unwrap();
            kept.set_owner(9).unwrap();
            kept.set_group(10).unwrap();
            kept.set_persist(true).unwrap();
            assert!(kept.granted().persist);
            drop(kept);
            assert_eq!(owners("d"), (Some(9), Some(10)));
        }),
        trial("addresses and routes", || {
            need_tun();
            let v6: IpAddr = "fd00::1".parse().unwrap();
            let device = Builder::new("net", Mode::Tun)
                .up(true)
                .address(Ipv4Addr::new(198, 18, 0, 1), 24)
                .address(Ipv4Addr::new(198, 18, 1, 1), 24)
                .address(v6, 64)
                .route(Ipv4Addr::new(10, 9, 0, 0), 16, None)
                .route(
                    Ipv4Addr::new(10, 8, 0, 0),
                    16,
                    Some(Ipv4Addr::new(198, 18, 0, 2).into()),
                )
                .open()
                .unwrap();
            for (from, to) in [
                ("198.18.0.1:0", "10.9.1.1:9"),
                ("198.18.0.1:0", "10.8.1.1:9"),
                ("198.18.1.1:0", "198.18.1.7:9"),
                ("[fd00::1]:0", "[fd00::9]:9"),
            ] {
                let socket = UdpSocket::bind(from).unwrap_or_else(|error| panic!("{from}: {error}"));
                socket
                    .send_to(to.as_bytes(), to)
                    .unwrap_or_else(|error| panic!("{to}: {error}"));
                assert_eq!(next_payload(&device), to.as_bytes());
            }
            let again = || Builder::new("net", Mode::Tun).address(Ipv4Addr::new(198, 18, 0, 1), 24);
            let mut device = device;
            device.set_persist(true).unwrap();
            drop(device);
            let attached = again()
                .up(true)
                .route(Ipv4Addr::new(10, 9, 0, 0), 16, None)
                .attach_existing(true)
                .persist(false);
            attached
                .open()
                .expect("the same address and route again are no error on a device that has them");
            assert!(!exists("net"));
            let error = again().address(Ipv4Addr::new(198, 18, 0, 1), 24).open().unwrap_err();
            assert_eq!(
                (error.kind(), error.raw_os_error()),
                (OpenErrorKind::InvalidSetting, Some(libc::EEXIST))
            );
            assert_eq!(error.call(), "RTM_NEWADDR");
            assert!(!exists("net"));
        }),
        trial(
            "a route that leads around the device is refused, and its device named",
            || {
                need_tun();
                let netlink = Handle::new().unwrap();
                let (eth, _peer) = netlink.add_veth("eth9", "peer9").unwrap();
                netlink.set_up(eth, true).unwrap();
                netlink.set_up(netlink.index_of("peer9").unwrap(), true).unwrap();
                let any = |text: &str| text.parse::<IpAddr>().unwrap();
                netlink.add_address(eth, any("198.18.7.1"), 24).unwrap();
                netlink.add_address(eth, any("fd00:7::1"), 64).unwrap();
                for (net, prefix) in [("0.0.0.0", 0), ("::", 0), ("10.7.0.0", 16), ("fd00:8::", 32)] {
                    netlink.add_route(any(net), prefix, None, eth).unwrap();
                }
                netlink.add_blackhole(any("10.66.0.0"), 16).unwrap();
                netlink.add_blackhole(any("fd00:66::"), 32).unwrap();
                drop(Builder::new("gw", Mode::Tun).persist(true).open().unwrap());
                // The IPv6 network of eth9 has metric 256 and a route of ours 1024: the kernel
                // takes that one without an error.
                for (net, prefix, words) in [
                    ("0.0.0.0", 0, "eth9"),
                    ("::", 0, "eth9"),
                    ("10.7.0.0", 16, "eth9"),
                    ("fd00:8::", 32, "eth9"),
                    ("198.18.7.0", 24, "eth9"),
                    ("fd00:7::", 64, "eth9"),
                    ("10.66.0.0", 16, "drops"),
                    ("fd00:66::", 32, "drops"),
                ] {
                    for attach in [true, false] {
                        let name = if attach { "gw" } else { "fresh" };
                        let opened = Builder::new(name, Mode::Tun)
                            .attach_existing(attach)
                            .up(true)
                            .route(any(net), prefix, None)
                            .open();
                        let error = opened.expect_err(net);
                        assert_eq!(
                            (error.kind(), error.raw_os_error(), error.call()),
                            (OpenErrorKind::InvalidSetting, Some(libc::EEXIST), "RTM_NEWROUTE"),
                            "{error}"
                        );
                        assert!(error.detail().contains(words), "{error}");
                    }
                }
                // Ours, and again ours, with a gateway too; another gateway is another way.
                let routes = |gateway: &str, gateway6: &str| {
                    Builder::new("gw", Mode::Tun)
                        .attach_existing(true)
                        .up(true)
                        .address(Ipv4Addr::new(198, 18, 9, 1), 24)
                        .address(any("fd00:9::1"), 64)
                        .route(Ipv4Addr::new(10, 5, 0, 0), 16, None)
                        .route(any("fd00:5::"), 32, None)
                        .route(Ipv4Addr::new(10, 6, 0, 0), 16, Some(any(gateway)))
                        .route(any("fd00:6::"), 32, Some(any(gateway6)))
                        .open()
                };
                for _ in 0..2 {
                    routes("198.18.9.2", "fd00:9::2").expect("our own routes");
                }
                for (gateway, gateway6) in [("198.18.9.3", "fd00:9::2"), ("198.18.9.2", "fd00:9::3")] {
                    let error = routes(gateway, gateway6).unwrap_err();
                    assert_eq!(error.raw_os_error(), Some(libc::EEXIST), "{error}");
                    assert!(error.detail().contains("through \"gw\" by way of"), "{error}");
                }
            },
        ),
        trial(OWN_ROUTES, || {
            need_tun();
            for _ in 0..2 {
                let opened = Builder::new("gw", Mode::Tun)
                    .attach_existing(true)
                    .persist(true)
                    .address("fd00:9::1".parse::<IpAddr>().unwrap(), 64)
                    .route("fd00:5::".parse::<IpAddr>().unwrap(), 32, None)
                    .route(
                        "fd00:6::".parse::<IpAddr>().unwrap(),
                        48,
                        Some("fd00:9::2".parse().unwrap()),
                    )
                    .route("::".parse::<IpAddr>().unwrap(), 0, None)
                    .route(Ipv4Addr::new(10, 5, 0, 0), 16, None)
                    .up(true)
                    .open();
                drop(opened.unwrap());
            }
        }),
        trial(
            "routes of the device's are checked without a list of all routes",
            || {
                let trace = common::traced(OWN_ROUTES, "sendto");
                // strace decodes the numbers only where it knows the socket's protocol.
                let is = |line: &str, name: &str, number: &str| line.contains(name) || line.contains(number);
                let asked = |line: &&str| is(line, "RTM_GETROUTE", "nlmsg_type=0x1a ");
                assert!(trace.lines().any(|line| asked(&line)), "{trace}");
                let dumps = trace
                    .lines()
                    .filter(asked)
                    .filter(|line| is(line, "NLM_F_DUMP", "|0x300"))
                    .count();
                assert_eq!(dumps, 0, "{trace}");
            },
        ),
        trial(
            "an address in another device's network is refused, and the device named",
            || {
                need_tun();
                let any = |text: &str| text.parse::<IpAddr>().unwrap();
                let mut other = Builder::new("other", Mode::Tun)
                    .address(any("198.18.7.1"), 24)
                    .address(any("fd00:7::1"), 64)
                    .address(any("198.18.8.1"), 32)
                    .up(true)
                    .open()
                    .unwrap();
                drop(Builder::new("gw", Mode::Tun).persist(true).open().unwrap());
                let open = |attach: bool, address: &str, prefix| {
                    Builder::new(if attach { "gw" } else { "fresh" }, Mode::Tun)
                        .attach_existing(attach)
                        .up(true)
                        .address(any(address), prefix)
                        .open()
                };
                for (address, prefix) in [
                    ("198.18.7.1", 24),
                    ("198.18.7.2", 24),
                    ("fd00:7::1", 64),
                    ("fd00:7::2", 64),
                ] {
                    for attach in [true, false] {
                        let error = open(attach, address, prefix).expect_err(address);
                        assert_eq!(
                            (error.kind(), error.raw_os_error(), error.call()),
                            (OpenErrorKind::InvalidSetting, Some(libc::EEXIST), "RTM_NEWADDR"),
                            "{error}"
                        );
                        assert!(error.detail().contains("\"other\""), "{error}");
                    }
                }
                // A longer prefix is ours, and a single address has no network.
                open(false, "198.18.7.1", 25).unwrap();
                open(false, "198.18.8.1", 32).unwrap();
                // A device that is down draws nothing.
                other.set_up(false).unwrap();
                open(false, "198.18.7.2", 24).unwrap();
                other.set_persist(false).unwrap();
            },
        ),
        trial("a device in another namespace", || {
            need_tun();
            let there = namespace();
            let inode = || {
                File::open("/proc/thread-self/ns/net")
                    .unwrap()
                    .metadata()
                    .unwrap()
                    .ino()
            };
            let here = inode();
            let before = Builder::new("blue", Mode::Tap).open().unwrap();
            let device = Builder::new("blue", Mode::Tun)
                .queues(2)
                .netns(&there)
                .mtu(1300)
                .address(Ipv4Addr::new(198, 18, 0, 1), 24)
                .up(true)
                .open()
                .unwrap();
            assert_eq!(inode(), here, "this thread has not moved");
            assert!(link("blue").tun.unwrap().tap, "the one here is another one");
            let seen = there.run(|| link("blue")).unwrap();
            assert_eq!((seen.mtu, seen.up, Some(seen.index)), (1300, true, device.index()));
            // The queues work from here, and so does the handle.
            there
                .run(|| {
                    UdpSocket::bind("198.18.0.1:0")
                        .unwrap()
                        .send_to(b"there", "198.18.0.2:9")
                        .unwrap()
                })
                .unwrap();
            assert_eq!(next_payload(&device), b"there");
            device.set_mtu(1280).unwrap();
            assert_eq!(there.run(|| link("blue").mtu).unwrap(), 1280);
            assert_eq!(link("blue").mtu, 1500);
            let third = device.add_queue().unwrap();
            assert_eq!(there.run(|| link("blue").tun.unwrap().queues).unwrap(), 3);
            drop((device, third, before));
            assert!(!there.run(|| exists("blue")).unwrap());
        }),
        trial("a namespace by its file", || {
            need_tun();
            let there = namespace();
            let path = format!("/proc/self/fd/{}", there.as_fd().as_raw_fd());
            let device = Builder::new("path", Mode::Tun).netns_path(path).open().unwrap();
            assert!(there.run(|| exists("path")).unwrap() && !exists("path"));
            drop(device);
            let error = Builder::new("path", Mode::Tun)
                .netns_path("/nowhere/at/all")
                .open()
                .unwrap_err();
            assert_eq!(
                (error.kind(), error.raw_os_error()),
                (OpenErrorKind::Namespace, Some(libc::ENOENT))
            );
            let error = Builder::new("path", Mode::Tun)
                .netns_path("/dev/null")
                .open()
                .unwrap_err();
            assert_eq!(
                (error.kind(), error.raw_os_error()),
                (OpenErrorKind::Namespace, Some(libc::EINVAL))
            );
            let error = Builder::new("path", Mode::Tun).netns_path("").open().unwrap_err();
            assert_eq!(error.kind(), OpenErrorKind::Namespace);
            assert!(error.detail().contains("the path is empty"), "{error}");
            // An error inside is that error, not one of the namespace.
            let _held = there.run(|| Iface::new("held", Mode::Tun).unwrap()).unwrap();
            assert_eq!(
                kind(Builder::new("held", Mode::Tun).netns(&there).open()),
                OpenErrorKind::NameTaken
            );
            drop(Builder::new("held", Mode::Tun).open().expect("it is free here"));
        }),
        trial("a FIFO in a namespace's place is refused, and not waited for", || {
            need_tun();
            let path = std::env::temp_dir().join(format!("tun-driver-fifo-{}", std::process::id()));
            let name = std::ffi::CString::new(path.to_str().unwrap()).unwrap();
            // SAFETY: a C string that outlives the call.
            assert_eq!(unsafe { libc::mkfifo(name.as_ptr(), 0o600) }, 0);
            let error = Builder::new("path", Mode::Tun).netns_path(&path).open().unwrap_err();
            let lab = tun_driver::lab::Namespace::open(&path).and_then(|there| there.run(|| ()));
            std::fs::remove_file(&path).unwrap();
            assert_eq!(
                (error.kind(), error.raw_os_error()),
                (OpenErrorKind::Namespace, Some(libc::EINVAL))
            );
            assert!(error.detail().contains("not a network namespace"), "{error}");
            let error = lab.unwrap_err();
            assert!(error.to_string().contains("not a network namespace"), "{error}");
        })
        .bound(Duration::from_secs(60)),
        trial(
            "an address whose network is routed elsewhere or dropped is refused",
            || {
                need_tun();
                let any = |text: &str| text.parse::<IpAddr>().unwrap();
                let netlink = Handle::new().unwrap();
                let (eth, peer) = netlink.add_veth("eth9", "peer9").unwrap();
                netlink.set_up(eth, true).unwrap();
                netlink.set_up(peer, true).unwrap();
                netlink.add_blackhole(any("10.67.1.0"), 24).unwrap();
                netlink.add_route(any("10.68.0.0"), 16, None, eth).unwrap();
                // Metric 1024, and the network of an address of ours has 256.
                netlink.add_blackhole(any("fd00:67::"), 64).unwrap();
                let open = |address: &str, prefix| {
                    let device = Builder::new("fresh", Mode::Tun).up(true);
                    device.address(any(address), prefix).open()
                };
                for (address, prefix, words) in [("10.67.1.1", 24, "drops the packets"), ("10.68.0.1", 16, "\"eth9\"")]
                {
                    let error = open(address, prefix).expect_err(address);
                    assert_eq!(
                        (error.kind(), error.raw_os_error(), error.call()),
                        (OpenErrorKind::InvalidSetting, Some(libc::EEXIST), "RTM_NEWADDR"),
                        "{error}"
                    );
                    assert!(error.detail().contains(words), "{error}");
                    assert!(!exists("fresh"));
                }
                for (address, prefix) in [
                    ("10.67.1.1", 25),
                    ("10.67.1.1", 32),
                    ("10.9.0.1", 0),
                    ("fd00:67::1", 64),
                ] {
                    open(address, prefix).unwrap_or_else(|error| panic!("{address}/{prefix}: {error}"));
                }
            },
        ),
        trial(
            "an address that no host can have is refused before the kernel is asked",
            || {
                for (address, words) in [
                    ("0.0.0.0", "none in particular"),
                    ("::", "none in particular"),
                    ("224.0.0.1", "multicast"),
                    ("ff02::1", "multicast"),
                    ("255.255.255.255", "every host"),
                    ("::1", "loopback"),
                ] {
                    let any: IpAddr = address.parse().unwrap();
                    let error = Builder::new("fresh", Mode::Tun).address(any, 24).open().unwrap_err();
                    assert_eq!(
                        (error.kind(), error.raw_os_error()),
                        (OpenErrorKind::InvalidSetting, None)
                    );
                    assert!(
                        error.detail().starts_with(address) && error.detail().contains(words),
                        "{error}"
                    );
                }
            },
        ),
        trial(
            "a gateway of another family than its route is refused and said to be",
            || {
                for (net, gateway) in [("fd01::", "10.9.0.2"), ("10.5.0.0", "fd00:9::2")] {
                    let any = |text: &str| text.parse::<IpAddr>().unwrap();
                    let device = Builder::new("fresh", Mode::Tun).up(true);
                    let error = device.route(any(net), 16, Some(any(gateway))).open().unwrap_err();
                    assert_eq!(
                        (error.kind(), error.raw_os_error()),
                        (OpenErrorKind::InvalidSetting, None)
                    );
                    assert!(error.detail().contains("another address family"), "{error}");
                    assert!(error.detail().contains(gateway), "{error}");
                }
            },
        ),
        trial("without privilege it says which one is missing", || {
            need_tun();
            // T29
            need_ids(&[NOBODY]);
            drop(
                Builder::new("mine", Mode::Tun)
                    .queues(2)
                    .persist(true)
                    .owner(NOBODY)
                    .open()
                    .unwrap(),
            );
            drop(
                Builder::new("theirs", Mode::Tun)
                    .queues(2)
                    .persist(true)
                    .open()
                    .unwrap(),
            );
            let there = namespace();
            unprivileged(NOBODY, Node::Mode(0o666), || {
                let error = Builder::new("fresh", Mode::Tun).open().unwrap_err();
                assert_eq!(
                    (error.kind(), error.raw_os_error()),
                    (OpenErrorKind::Permission, Some(libc::EPERM))
                );
                assert!(error.detail().contains("CAP_NET_ADMIN"), "{error}");
                let attach = |name| Builder::new(name, Mode::Tun).queues(2).attach_existing(true);
                let error = attach("theirs").open().unwrap_err();
                assert_eq!(error.kind(), OpenErrorKind::Permission);
                assert!(error.detail().contains("belongs to another user"), "{error}");
                let mine = attach("mine").open().expect("the owner may");
                assert_eq!((mine.len(), mine.queues()[1].mtu()), (2, Some(1500)));
                assert_eq!(mine.add_queue().expect("and add one").name(), "mine");
                assert_eq!(mine.set_mtu(1400).unwrap_err().raw_os_error(), Some(libc::EPERM));
                drop(mine);
                let error = attach("mine").mtu(1400).open().unwrap_err();
                assert_eq!(
                    (error.kind(), error.call()),
                    (OpenErrorKind::Permission, "ioctl(SIOCSIFMTU)")
                );
                let error = Builder::new("fresh", Mode::Tun).netns(&there).open().unwrap_err();
                assert_eq!(
                    (error.kind(), error.raw_os_error()),
                    (OpenErrorKind::Namespace, Some(libc::EPERM))
                );
            });
            unprivileged(NOBODY, Node::Mode(0o600), || {
                let error = Builder::new("fresh", Mode::Tun).open().unwrap_err();
                assert_eq!(
                    (error.kind(), error.raw_os_error()),
                    (OpenErrorKind::NoTunNode, Some(libc::EACCES))
                );
            });
            for node in [Node::File, Node::Null] {
                unprivileged(NOBODY, node, || {
                    let error = Builder::new("fresh", Mode::Tun).open().unwrap_err();
                    assert_eq!(
                        (error.kind(), error.raw_os_error()),
                        (OpenErrorKind::NoTunNode, None),
                        "{error}"
                    );
                    assert!(error.detail().contains("10:200"), "{error}");
                    let error = Iface::new("fresh", Mode::Tun).unwrap_err();
                    assert!(error.to_string().contains("10:200"), "{error}");
                    let support = Support::probe();
                    assert_eq!(support.tun_node, TunNode::Foreign);
                    assert_eq!((support.tun_features, support.tun_nowait), (None, None));
                });
            }
            unprivileged(NOBODY, Node::Missing, || {
                let error = Builder::new("fresh", Mode::Tun).open().unwrap_err();
                assert_eq!(
                    (error.kind(), error.raw_os_error()),
                    (OpenErrorKind::NoTunNode, Some(libc::ENOENT))
                );
            });
        }),
        trial("devices made and dropped again and again leak nothing", || {
            need_tun();
            let before = open_descriptors();
            for round in 0..common::repeats(200, 1_000) {
                let device = Builder::new("cycle", Mode::Tun).queues(1 + round % 3).open();
                device.unwrap_or_else(|error| panic!("round {round}: {error}"));
            }
            assert_eq!(open_descriptors(), before);
            assert!(!exists("cycle"));
        })
        .alone(),
        trial("what the host can do is found out", || {
            need_tun();
            let support = Support::probe();
            assert_eq!(support.tun_node, TunNode::Opens);
            assert_eq!(support.multi_queue, Some(true));
            assert!(support.tun_features.unwrap() & libc::IFF_NO_PI as u32 != 0);
            assert!(support.cap_net_admin);
            assert!(!support.allowed_cpus.is_empty());
            let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
            assert_eq!(support.kernel_release.as_deref(), Some(release.trim()));
            assert_eq!(support.io_uring.available, support.io_uring.errno.is_none());
            if support.io_uring.available {
                assert!(support.io_uring.read_fixed && support.io_uring.write_fixed && support.io_uring.poll_add);
                assert!(support.io_uring.single_issuer || !support.io_uring.defer_taskrun);
            }
            // The answer for RWF_NOWAIT came from a descriptor without a device; here is one with a device.
            let device = Builder::new("nowait", Mode::Tun).up(true).open().unwrap();
            let mut byte = [0_u8; 1];
            let iovec = libc::iovec {
                iov_base: byte.as_mut_ptr().cast(),
                iov_len: 1,
            };
            let fd = device.queues()[0].as_raw_fd();
            // SAFETY: one iovec over one byte.
            let result = unsafe { libc::preadv2(fd, &raw const iovec, 1, -1, libc::RWF_NOWAIT) };
            let unsupported = result == -1 && std::io::Error::last_os_error().raw_os_error() == Some(libc::EOPNOTSUPP);
            assert_eq!(support.tun_nowait, Some(!unsupported));
            unprivileged(NOBODY, Node::Mode(0o600), || {
                let support = Support::probe();
                assert_eq!(support.tun_node, TunNode::Refused(libc::EACCES));
                assert_eq!(
                    (support.multi_queue, support.tun_nowait, support.cap_net_admin),
                    (None, None, false)
                );
                assert!(!support.cap_ipc_lock);
            });
            unprivileged(NOBODY, Node::Missing, || {
                assert_eq!(Support::probe().tun_node, TunNode::Missing)
            });
        }),
    ])
}

fn kind<T: std::fmt::Debug>(result: Result<T, OpenError>) -> OpenErrorKind {
    result.expect_err("an error").kind()
}

/// The payload of the next UDP packet, from whichever queue.
fn next_payload(device: &MultiQueue) -> Vec<u8> {
    let mut buf = vec![0; 2048];
    for _ in 0..50 {
        // The flow may be on any queue; poll them in turn.
        let ready = device
            .queues()
            .iter()
            .find_map(|queue| device::try_read(queue, &mut buf).ok());
        let len = ready.unwrap_or_else(|| {
            std::thread::sleep(std::time::Duration::from_millis(5));
            0
        });
        if let Some(payload) = udp_payload(&buf[..len]) {
            return payload;
        }
    }
    panic!("no UDP packet");
}

/// ETHTOOL_GTSO: whether the stack may send the device packets of more than its MTU.
fn tso(name: &str) -> bool {
    const ETHTOOL_GTSO: u32 = 0x1e;
    let mut value = [ETHTOOL_GTSO, 0];
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    // SAFETY: all zero is a valid ifreq.
    let mut ifreq: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in ifreq.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    ifreq.ifr_ifru.ifru_data = value.as_mut_ptr().cast();
    // SAFETY: the request fills the struct ethtool_value (two u32) behind ifr_data.
    let result = unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCETHTOOL as libc::Ioctl, &raw mut ifreq) };
    assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
    value[1] != 0
}

/// A socket filter that keeps no byte of any packet: `r0 = 0; exit`.
fn drop_all() -> std::io::Result<OwnedFd> {
    const BPF_PROG_LOAD: i32 = 5;
    const BPF_PROG_TYPE_SOCKET_FILTER: u32 = 1;
    /// The head of `union bpf_attr` of linux/bpf.h, for BPF_PROG_LOAD; the kernel takes the rest as zero.
    #[repr(C)]
    struct Attributes {
        prog_type: u32,
        insn_cnt: u32,
        insns: u64,
        license: u64,
        log: [u32; 6],
    }
    let instructions: [[u8; 8]; 2] = [[0xb7, 0, 0, 0, 0, 0, 0, 0], [0x95, 0, 0, 0, 0, 0, 0, 0]];
    let attributes = Attributes {
        prog_type: BPF_PROG_TYPE_SOCKET_FILTER,
        insn_cnt: 2,
        insns: instructions.as_ptr() as u64,
        license: c"MIT".as_ptr() as u64,
        log: [0; 6],
    };
    // SAFETY: the attributes and what they point to live through the call; the descriptor is new.
    unsafe {
        let fd = libc::syscall(
            libc::SYS_bpf,
            BPF_PROG_LOAD,
            &raw const attributes,
            size_of_val(&attributes),
        );
        if fd == -1 {
            Err(std::io::Error::last_os_error())
        } else {
            Ok(OwnedFd::from_raw_fd(fd as i32))
        }
    }
}
