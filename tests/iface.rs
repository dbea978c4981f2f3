//! The plain device, on real devices.

mod common;
mod device;

use std::error::Error;
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, IntoRawFd, OwnedFd};
use std::sync::{Arc, mpsc};
use std::time::Duration;

use common::{again, need_ids, need_tun, trial};
use device::{NOBODY, Node, descriptor_flags, exists, link, socket_behind, udp_packet, udp_payload, unprivileged};
use tun_driver::netlink::Handle;
use tun_driver::{Builder, Iface, Mode, OpenError};

fn main() {
    common::run(vec![
        trial("a name is taken as given", || {
            need_tun();
            for mode in [Mode::Tun, Mode::Tap] {
                for open in [Iface::new, Iface::without_packet_info] {
                    let iface = open("given", mode).unwrap();
                    assert_eq!((iface.name(), iface.mode()), ("given", mode));
                    assert!(exists("given"));
                    assert!(format!("{iface:?}").contains("given"));
                }
            }
        }),
        trial("the kernel fills templates", || {
            need_tun();
            let numbered: Vec<Iface> = (0..3).map(|_| Iface::new("gw%d", Mode::Tun).unwrap()).collect();
            assert_eq!(
                numbered.iter().map(Iface::name).collect::<Vec<_>>(),
                ["gw0", "gw1", "gw2"]
            );
            assert_eq!(Iface::new("", Mode::Tun).unwrap().name(), "tun0");
            assert_eq!(Iface::new("", Mode::Tap).unwrap().name(), "tap0");
        }),
        trial("a long name is cut to fifteen bytes", || {
            need_tun();
            let iface = Iface::new("abcdefghijklmnopqrstuvwxyz", Mode::Tun).unwrap();
            assert_eq!(iface.name(), "abcdefghijklmno");
            assert!(exists("abcdefghijklmno"));
        }),
        trial("an inner NUL ends the name", || {
            need_tun();
            let iface = Iface::new("ab\0cd", Mode::Tun).unwrap();
            assert_eq!(iface.name(), "ab");
            assert!(exists("ab"));
            assert_eq!(Iface::new("\0ab", Mode::Tun).unwrap().name(), "tun0");
        }),
        trial("names that are none are EINVAL", || {
            need_tun();
            for name in ["a/b", "a b", "a:b", ".", "..", "%s", "a%d%d", "à", "all", "default"] {
                let error = Iface::new(name, Mode::Tun).unwrap_err();
                assert_eq!(errno(&error), Some(libc::EINVAL), "{name:?}");
            }
        }),
        trial("a taken name is refused", || {
            need_tun();
            let _held = Iface::new("held", Mode::Tun).unwrap();
            let again = Iface::new("held", Mode::Tun).unwrap_err();
            assert_eq!(errno(&again), Some(libc::EBUSY), "the same mode");
            let other = Iface::new("held", Mode::Tap).unwrap_err();
            assert_eq!(errno(&other), Some(libc::EINVAL), "the other mode");
            let lo = Iface::new("lo", Mode::Tun).unwrap_err();
            assert_eq!(errno(&lo), Some(libc::EINVAL), "not a TUN/TAP device at all");
            let _queues = Builder::new("many", Mode::Tun).queues(2).open().unwrap();
            let many = Iface::new("many", Mode::Tun).unwrap_err();
            assert_eq!(errno(&many), Some(libc::EINVAL), "a device of several queues");
        }),
        trial("an error names the call, the cause and a remedy", || {
            need_tun();
            // T29
            let _tap = Iface::new("tap", Mode::Tap).unwrap();
            let _queues = Builder::new("many", Mode::Tun).queues(2).open().unwrap();
            let _held = Iface::new("held", Mode::Tun).unwrap();
            for (name, errno, words) in [
                ("a%d%d", libc::EINVAL, "at most one %d"),
                ("lo", libc::EINVAL, "another kind of device"),
                ("many", libc::EINVAL, "multi_queue(true)"),
                ("tap", libc::EINVAL, "the other mode"),
                ("held", libc::EBUSY, "end the program that has it"),
            ] {
                let error = Iface::new(name, Mode::Tun).unwrap_err();
                let text = error.to_string();
                assert!(text.starts_with("ioctl(TUNSETIFF): ") && text.contains(words), "{text}");
                assert_eq!(error.kind(), io::Error::from_raw_os_error(errno).kind(), "{text}");
                let inner = error
                    .get_ref()
                    .and_then(|inner| inner.downcast_ref::<OpenError>())
                    .unwrap();
                assert_eq!(inner.raw_os_error(), Some(errno), "{text}");
            }
        }),
        trial("a device is gone when its drop returns", || {
            need_tun();
            for round in 0..100 {
                // The other mode each time: a device left over would be EINVAL.
                let mode = if round % 2 == 0 { Mode::Tun } else { Mode::Tap };
                let iface = Iface::new("again", mode).unwrap_or_else(|error| panic!("round {round}: {error}"));
                drop(iface);
                assert!(!exists("again"), "round {round}");
            }
        }),
        trial("nothing is set that nobody asked for", || {
            need_tun();
            for packet_info in [true, false] {
                let open = if packet_info {
                    Iface::new
                } else {
                    Iface::without_packet_info
                };
                let iface = open("plain", Mode::Tun).unwrap();
                let link = link("plain");
                assert!(!link.up);
                assert_eq!(link.mtu, 1500);
                let tun = link.tun.unwrap();
                assert_eq!(tun.packet_info, packet_info);
                assert!(!tun.multi_queue && !tun.persistent && !tun.vnet_header && !tun.tap);
                assert_eq!((tun.owner, tun.group), (None, None));
                let (status, close_on_exec) = descriptor_flags(&iface);
                assert!(close_on_exec);
                assert_eq!(status & libc::O_NONBLOCK, 0, "it blocks");
            }
        }),
        trial("packets carry packet information unless told not to", || {
            need_tun();
            for packet_info in [true, false] {
                let open = if packet_info {
                    Iface::new
                } else {
                    Iface::without_packet_info
                };
                let iface = open("pi", Mode::Tun).unwrap();
                let socket = socket_behind(link("pi").index);
                let front: &[u8] = if packet_info { &[0, 0, 0x08, 0x00] } else { &[] };

                socket.send_to(b"out", "198.18.0.2:9").unwrap();
                let packet = recv_udp(&iface, front.len());
                assert_eq!(&packet[..front.len()], front);
                assert_eq!(udp_payload(&packet[front.len()..]).unwrap(), b"out");

                let answer = [front, &udp_packet(socket.local_addr().unwrap().port(), b"in")].concat();
                assert_eq!(iface.send(&answer).unwrap(), answer.len(), "all bytes count");
                let mut buf = [0; 16];
                let (len, from) = again(|| socket.recv_from(&mut buf)).unwrap();
                assert_eq!((&buf[..len], from.port()), (&b"in"[..], 1111));
            }
        }),
        trial("a TAP device carries Ethernet frames", || {
            need_tun();
            for front in [4, 0] {
                let open = if front == 4 {
                    Iface::new
                } else {
                    Iface::without_packet_info
                };
                let iface = open("frames", Mode::Tap).unwrap();
                let socket = socket_behind(link("frames").index);
                socket.send_to(b"who has it", "198.18.0.2:9").unwrap();
                let mut buf = vec![0; 1518];
                // Others speak on a new Ethernet too (MLD); ours is the ARP request.
                let frame = (0..20)
                    .map(|_| {
                        let len = iface.recv(&mut buf).unwrap();
                        buf[..len].to_vec()
                    })
                    .find(|frame| frame[front + 12..front + 14] == [0x08, 0x06])
                    .expect("an ARP request");
                assert_eq!(frame[front..front + 6], [0xff; 6], "to all");
                assert_eq!(
                    frame[front + 6..front + 12],
                    link("frames").mac.unwrap(),
                    "from the device"
                );
                if front == 4 {
                    assert_eq!(frame[..4], [0, 0, 0x08, 0x06]);
                }
            }
        }),
        trial(
            "a packet longer than the buffer is cut, an empty buffer takes none",
            || {
                need_tun();
                let iface = Iface::without_packet_info("cut", Mode::Tun).unwrap();
                let socket = socket_behind(link("cut").index);
                socket.send_to(&[7; 500], "198.18.0.2:9").unwrap();
                socket.send_to(b"next", "198.18.0.2:9").unwrap();
                assert_eq!(iface.recv(&mut []).unwrap(), 0);
                let mut small = [0; 100];
                assert_eq!(iface.recv(&mut small).unwrap(), 100);
                assert_eq!(small[28..], [7; 72]);
                assert_eq!(
                    udp_payload(&recv_udp(&iface, 0)).unwrap(),
                    b"next",
                    "the rest of it is lost"
                );
            },
        ),
        trial("what cannot be sent says why", || {
            need_tun();
            let iface = Iface::without_packet_info("refuse", Mode::Tun).unwrap();
            let packet = udp_packet(9, b"x");
            assert_eq!(iface.send(&packet).unwrap_err().raw_os_error(), Some(libc::EIO), "down");
            Handle::new().unwrap().set_up(link("refuse").index, true).unwrap();
            assert_eq!(iface.send(&packet).unwrap(), packet.len(), "up");
            assert_eq!(
                iface.send(&[0; 20]).unwrap_err().raw_os_error(),
                Some(libc::EINVAL),
                "not IP"
            );
            assert_eq!(iface.send(&[]).unwrap_err().raw_os_error(), Some(libc::EINVAL), "empty");
            let tap = Iface::without_packet_info("short", Mode::Tap).unwrap();
            assert_eq!(
                tap.send(&[0; 13]).unwrap_err().raw_os_error(),
                Some(libc::EINVAL),
                "shorter than a header"
            );
        }),
        trial("one thread receives while another one sends", || {
            need_tun();
            const PACKETS: u32 = 2000;
            // Fewer under way than the socket's buffer (and the device's queue) hold, in each direction, so that none may be lost.
            const WINDOW: usize = 64;
            let iface = Iface::without_packet_info("both", Mode::Tun).unwrap();
            let socket = socket_behind(link("both").index);
            let port = socket.local_addr().unwrap().port();
            let (start_out, finish_out) = mpsc::sync_channel(WINDOW);
            let (start_in, finish_in) = mpsc::sync_channel(WINDOW);
            let (received, sent) = std::thread::scope(|scope| {
                let receiver = scope.spawn(|| {
                    let finish_out = finish_out;
                    let packets = (0..PACKETS).map(|_| {
                        let payload = udp_payload(&recv_udp(&iface, 0)).unwrap();
                        finish_out.recv().unwrap();
                        payload
                    });
                    packets.collect::<Vec<_>>()
                });
                scope.spawn(|| {
                    for i in 0..PACKETS {
                        start_in.send(()).unwrap();
                        let packet = udp_packet(port, &i.to_be_bytes());
                        assert_eq!(iface.send(&packet).unwrap(), packet.len());
                    }
                });
                scope.spawn(|| {
                    for i in 0..PACKETS {
                        start_out.send(()).unwrap();
                        socket.send_to(&i.to_be_bytes(), "198.18.0.2:9").unwrap();
                    }
                });
                let reader = scope.spawn(|| {
                    let finish_in = finish_in;
                    let packets = (0..PACKETS).map(|_| {
                        let mut buf = [0; 16];
                        let (len, _) = again(|| socket.recv_from(&mut buf)).unwrap();
                        finish_in.recv().unwrap();
                        buf[..len].to_vec()
                    });
                    packets.collect::<Vec<_>>()
                });
                (receiver.join().unwrap(), reader.join().unwrap())
            });
            let want: Vec<Vec<u8>> = (0..PACKETS).map(|i| i.to_be_bytes().to_vec()).collect();
            assert_eq!(received, want);
            assert_eq!(sent, want);
        }),
        trial("a deleted device ends a waiting recv and all that follows", || {
            need_tun();
            let iface = Arc::new(Iface::new("deleted", Mode::Tun).unwrap());
            let netlink = Handle::new().unwrap();
            let index = netlink.index_of("deleted").unwrap();
            let waiting = {
                let iface = Arc::clone(&iface);
                std::thread::spawn(move || iface.recv(&mut [0; 2000]).unwrap_err())
            };
            // Whether it waits already when the device goes decides which of two errnos it gets.
            std::thread::sleep(Duration::from_millis(20));
            netlink.delete(index).unwrap();
            let error = waiting.join().unwrap();
            assert!(matches!(errno(&error), Some(libc::EFAULT | libc::EBADFD)), "{error:?}");
            assert!(
                error.to_string().contains("read: ") && error.to_string().contains("is gone"),
                "{error}"
            );
            assert_eq!(errno(&iface.recv(&mut [0; 2000]).unwrap_err()), Some(libc::EBADFD));
            assert_eq!(
                errno(&iface.send(&udp_packet(9, b"x")).unwrap_err()),
                Some(libc::EBADFD)
            );
        }),
        trial("a descriptor taken out keeps the device", || {
            need_tun();
            let iface = Iface::new("raw", Mode::Tun).unwrap();
            let number = iface.as_raw_fd();
            assert_eq!(iface.as_fd().as_raw_fd(), number);
            let fd = iface.into_raw_fd();
            assert_eq!(fd, number);
            assert!(exists("raw"));
            // SAFETY: it was given away just now.
            drop(unsafe { OwnedFd::from_raw_fd(fd) });
            assert!(!exists("raw"));
            drop(OwnedFd::from(Iface::new("raw", Mode::Tun).unwrap()));
            assert!(!exists("raw"));
        }),
        trial("the owner attaches to a persistent device without privilege", || {
            need_tun();
            need_ids(&[NOBODY]);
            let made = Builder::new("owned", Mode::Tun)
                .persist(true)
                .owner(NOBODY)
                .open()
                .unwrap();
            drop(made);
            assert!(exists("owned"));
            unprivileged(NOBODY, Node::Mode(0o666), || {
                let iface = Iface::new("owned", Mode::Tun).expect("its owner may");
                assert_eq!(iface.name(), "owned");
                assert_eq!(
                    errno(&Iface::new("owned", Mode::Tun).unwrap_err()),
                    Some(libc::EBUSY),
                    "in use"
                );
                assert_eq!(
                    errno(&Iface::new("fresh", Mode::Tun).unwrap_err()),
                    Some(libc::EPERM),
                    "create"
                );
            });
            unprivileged(NOBODY - 1, Node::Mode(0o666), || {
                assert_eq!(
                    errno(&Iface::new("owned", Mode::Tun).unwrap_err()),
                    Some(libc::EPERM),
                    "not its owner"
                );
            });
            unprivileged(NOBODY, Node::Mode(0o600), || {
                assert_eq!(
                    errno(&Iface::new("owned", Mode::Tun).unwrap_err()),
                    Some(libc::EACCES),
                    "node"
                );
            });
            unprivileged(NOBODY, Node::Missing, || {
                assert_eq!(
                    errno(&Iface::new("owned", Mode::Tun).unwrap_err()),
                    Some(libc::ENOENT),
                    "node"
                );
            });
            assert!(exists("owned"), "it is still persistent");
        }),
        trial(
            "a persistent device takes the packet information of its next user",
            || {
                need_tun();
                drop(Builder::new("next", Mode::Tun).persist(true).open().unwrap());
                let iface = Iface::new("next", Mode::Tun).unwrap();
                assert!(link("next").tun.unwrap().packet_info);
                drop(iface);
                let _iface = Iface::without_packet_info("next", Mode::Tun).unwrap();
                assert!(!link("next").tun.unwrap().packet_info);
            },
        ),
    ])
}

/// The errno at the end of an error's sources.
fn errno(error: &io::Error) -> Option<i32> {
    let source = error.source().and_then(|source| source.downcast_ref::<io::Error>());
    source.unwrap_or(error).raw_os_error()
}

/// The next UDP packet, with `front` bytes of packet information before it.
fn recv_udp(iface: &Iface, front: usize) -> Vec<u8> {
    let mut buf = vec![0; 2048];
    for _ in 0..50 {
        let len = iface.recv(&mut buf).expect("recv");
        if udp_payload(&buf[front..len]).is_some() {
            return buf[..len].to_vec();
        }
    }
    panic!("no UDP packet among fifty");
}
