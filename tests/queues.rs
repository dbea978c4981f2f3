//! Queues of one device: in and out of use, adopted, shared; on real devices.

mod common;
mod device;

use std::io;
use std::net::UdpSocket;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use common::{again, need_tun, repeats, trial};
use device::{
    NOBODY, Node, copy, descriptor_flags, exists, ioctl_int, ioctl_value, link, namespace, raw_tun, raw_unattached,
    read_packet, socket_behind, try_read, udp_packet, udp_payload, unprivileged, write,
};
use tun_driver::netlink::Handle;
use tun_driver::{Builder, Mode, MultiQueue, Offloads, OpenErrorKind, Queue};

fn main() {
    common::run(vec![
        trial("a queue is what was asked", || {
            need_tun();
            let device = Builder::new("q", Mode::Tap)
                .queues(3)
                .packet_info(true)
                .mtu(1234)
                .open()
                .unwrap();
            for queue in device.queues() {
                assert_eq!(
                    (queue.name(), queue.mode(), queue.packet_info()),
                    ("q", Mode::Tap, true)
                );
                assert_eq!((queue.mtu(), queue.multi_queue()), (Some(1234), true));
                assert_eq!(queue.send_buffer().unwrap(), i32::MAX);
                assert_eq!(queue.current_name().unwrap(), "q");
                assert!(!queue.is_disabled().unwrap());
                let (status, close_on_exec) = descriptor_flags(queue);
                assert!(status & libc::O_NONBLOCK != 0 && close_on_exec);
                assert_eq!(
                    try_read(queue, &mut [0; 2000]).unwrap_err().raw_os_error(),
                    Some(libc::EAGAIN)
                );
                assert!(format!("{queue:?}").contains("\"q\""));
            }
        }),
        trial("each queue may go to its own thread", || {
            need_tun();
            let device = Builder::new("threads", Mode::Tun).queues(4).open().unwrap();
            let socket = socket_behind(device.index().unwrap());
            let port = socket.local_addr().unwrap().port();
            let threads: Vec<_> = device
                .into_queues()
                .into_iter()
                .enumerate()
                .map(|(i, queue)| {
                    std::thread::spawn(move || {
                        write(&queue, &udp_packet(port, &[i as u8])).unwrap();
                        queue
                    })
                })
                .collect();
            let queues: Vec<Queue> = threads.into_iter().map(|thread| thread.join().unwrap()).collect();
            let mut from = Vec::new();
            for _ in &queues {
                let mut buf = [0; 16];
                let (len, _) = again(|| socket.recv_from(&mut buf)).unwrap();
                from.extend_from_slice(&buf[..len]);
            }
            from.sort_unstable();
            assert_eq!(from, [0, 1, 2, 3]);
        }),
        trial("a disabled queue gets no packets and still sends", || {
            need_tun();
            let device = Builder::new("dis", Mode::Tun).queues(2).open().unwrap();
            let socket = socket_behind(device.index().unwrap());
            let (first, second) = (&device.queues()[0], &device.queues()[1]);
            // Flows go to either queue; with one disabled all come from the other.
            assert_eq!(spread(first, second, 64), None, "both have some while both are in use");
            second.disable().unwrap();
            assert!(second.is_disabled().unwrap() && !first.is_disabled().unwrap());
            let tun = link("dis").tun.unwrap();
            assert_eq!((tun.queues, tun.disabled_queues), (1, 1));
            assert_eq!(spread(first, second, 64), Some(0));
            write(second, &udp_packet(socket.local_addr().unwrap().port(), b"still")).unwrap();
            let mut buf = [0; 16];
            assert_eq!(again(|| socket.recv(&mut buf)).unwrap(), 5);
            second.enable().unwrap();
            assert!(!second.is_disabled().unwrap());
            first.disable().unwrap();
            assert_eq!(spread(first, second, 64), Some(1));
            first.enable().unwrap();
            assert_eq!(spread(first, second, 64), None);
        }),
        trial("packets waiting in a queue are lost when it is disabled", || {
            need_tun();
            let device = Builder::new("purge", Mode::Tun).queues(2).open().unwrap();
            let socket = socket_behind(device.index().unwrap());
            device.queues()[1].disable().unwrap();
            socket.send_to(b"lost", "198.18.0.2:9").unwrap();
            device.queues()[0].disable().unwrap();
            device.queues()[0].enable().unwrap();
            socket.send_to(b"kept", "198.18.0.2:9").unwrap();
            assert_eq!(next_udp(&device.queues()[0]), b"kept");
        }),
        trial("what cannot be disabled or enabled is EINVAL", || {
            need_tun();
            let errno = |result: io::Result<()>| result.unwrap_err().raw_os_error();
            let single = Builder::new("single", Mode::Tun).open().unwrap();
            assert_eq!(
                errno(single.queues()[0].disable()),
                Some(libc::EINVAL),
                "a single-queue device"
            );
            let device = Builder::new("multi", Mode::Tun).queues(2).open().unwrap();
            let queue = &device.queues()[0];
            assert_eq!(errno(queue.enable()), Some(libc::EINVAL), "in use already");
            queue.disable().unwrap();
            assert_eq!(errno(queue.disable()), Some(libc::EINVAL), "disabled already");
            queue.enable().unwrap();
        }),
        trial("queues go in and out of use without privilege", || {
            need_tun();
            let device = Builder::new("drop", Mode::Tun).queues(4).up(true).open().unwrap();
            unprivileged(NOBODY, Node::Missing, || {
                for queue in &device.queues()[1..] {
                    queue.disable().unwrap();
                }
                for queue in &device.queues()[1..] {
                    assert!(queue.is_disabled().unwrap());
                    queue.enable().unwrap();
                }
                device.queues()[3].disable().unwrap();
                assert_eq!(device.mtu().unwrap(), 1500, "asking takes none either");
                assert_eq!(device.set_up(false).unwrap_err().raw_os_error(), Some(libc::EPERM));
            });
            let tun = link("drop").tun.unwrap();
            assert_eq!((tun.queues, tun.disabled_queues), (3, 1));
        }),
        trial("a queue added is one more, and gone when dropped", || {
            need_tun();
            let device = Builder::new("add", Mode::Tun)
                .queues(2)
                .packet_info(true)
                .mtu(1300)
                .open()
                .unwrap();
            let third = device.add_queue().unwrap();
            assert_eq!(
                (third.name(), third.mtu(), third.packet_info()),
                ("add", Some(1300), true)
            );
            assert_eq!(link("add").tun.unwrap().queues, 3);
            let (status, close_on_exec) = descriptor_flags(&third);
            assert!(status & libc::O_NONBLOCK != 0 && close_on_exec);
            drop(third);
            assert_eq!(link("add").tun.unwrap().queues, 2);
            let single = Builder::new("one", Mode::Tun).open().unwrap();
            let error = single.add_queue().unwrap_err();
            assert_eq!(error.kind(), OpenErrorKind::QueueModeMismatch);
            // From a thread elsewhere there is no way back to a namespace that was not named.
            let there = namespace();
            let error = there.run(|| device.add_queue().unwrap_err()).unwrap();
            assert_eq!(error.kind(), OpenErrorKind::Namespace);
            assert!(!there.run(|| exists("add")).unwrap());
        }),
        trial("the handle follows a rename and outlives the queues", || {
            need_tun();
            let device = Builder::new("before", Mode::Tap).queues(2).open().unwrap();
            let handle = device.device().unwrap().clone();
            Handle::new().unwrap().rename(handle.index(), "after").unwrap();
            assert_eq!(
                (handle.current_name().unwrap().as_str(), device.name()),
                ("after", "before")
            );
            assert_eq!(device.queues()[0].current_name().unwrap(), "after");
            handle.set_mtu(1400).unwrap();
            handle.set_txqueuelen(77).unwrap();
            handle.set_mac([2, 0, 0, 0, 0, 9]).unwrap();
            handle.set_up(true).unwrap();
            let seen = link("after");
            assert_eq!(
                (seen.mtu, seen.txqueuelen, seen.mac, seen.up),
                (1400, 77, Some([2, 0, 0, 0, 0, 9]), true)
            );
            device.set_up(false).unwrap();
            assert!(!handle.is_up().unwrap());
            let more = device.add_queue().expect("by the new name");
            assert_eq!(more.name(), "after");
            let queues = device.into_queues();
            handle.set_mtu(1300).unwrap();
            drop((queues, more));
            assert!(!exists("after"), "the handle does not keep it");
            let gone = |result: io::Result<()>| assert_eq!(result.unwrap_err().raw_os_error(), Some(libc::ENODEV));
            gone(handle.mtu().map(drop));
            gone(handle.set_up(true));
            gone(handle.current_name().map(drop));
            assert!(handle.add_queue().is_err() && !exists("after"));
            // A new device of that name is not it.
            let _new = Builder::new("after", Mode::Tap).open().unwrap();
            gone(handle.set_mtu(1200));
            let tun = Builder::new("tun", Mode::Tun).open().unwrap();
            let tun = tun.device().unwrap();
            assert_eq!(tun.mac().unwrap(), None);
            assert_eq!(
                tun.set_mac([2, 0, 0, 0, 0, 9]).unwrap_err().raw_os_error(),
                Some(libc::EINVAL)
            );
        }),
        trial("the handle of a device that moved changes no other device", || {
            need_tun();
            // T8. The device moves away, and others take its index and its name.
            for (queues, mode) in [(1, Mode::Tun), (2, Mode::Tap)] {
                let device = Builder::new("moving", mode).queues(queues).up(true).open().unwrap();
                let handle = device.device().unwrap().clone();
                let index = handle.index();
                let netlink = Handle::new().unwrap();
                // What happens to other links, and a port that leaves its bridge, is not a
                // departure.
                let bridge = netlink.add_bridge("bridge").unwrap();
                if mode == Mode::Tap {
                    netlink.set_master(index, Some(bridge)).unwrap();
                    netlink.set_master(index, None).unwrap();
                }
                for _ in 0..repeats(20, 1_000) {
                    let (one, _) = netlink.add_veth("churn", "churn2").unwrap();
                    netlink.delete(one).unwrap();
                }
                assert_eq!(handle.mtu().unwrap(), 1500);
                let (away, other) = (namespace(), namespace());
                let here = tun_driver::lab::Namespace::current().unwrap();
                netlink.move_to_namespace(index, away.as_fd()).unwrap();
                // A device of the same driver, mode and name, which comes with the same index:
                // another one all the same.
                let twin = other
                    .run(|| {
                        let twin = twin_with(index, queues, mode);
                        Handle::new().unwrap().move_to_namespace(index, here.as_fd()).unwrap();
                        twin
                    })
                    .unwrap();
                assert_eq!(link("moving").index, index, "the twin has its index and its name");
                let gone = |result: io::Result<()>| assert_eq!(result.unwrap_err().raw_os_error(), Some(libc::ENODEV));
                gone(handle.current_name().map(drop));
                gone(handle.mtu().map(drop));
                gone(handle.set_mtu(1234));
                gone(handle.txqueuelen().map(drop));
                gone(handle.set_txqueuelen(7));
                gone(handle.is_up().map(drop));
                gone(handle.set_up(true));
                gone(device.set_mtu(1234));
                if mode == Mode::Tap {
                    gone(handle.mac().map(drop));
                    gone(handle.set_mac([2, 0, 0, 0, 0, 9]));
                }
                assert!(handle.add_queue().is_err());
                let seen = link("moving");
                assert_eq!((seen.mtu, seen.up), (1500, false), "the twin is as it was");
                // The queues still are of the device that moved.
                assert_eq!(device.queues()[0].current_name().unwrap(), "moving");
                drop(twin);
                // Also when it comes back.
                away.run(|| Handle::new().unwrap().move_to_namespace(index, here.as_fd()).unwrap())
                    .unwrap();
                assert_eq!(link("moving").index, index);
                gone(handle.mtu().map(drop));
                drop(device);
                netlink.delete(bridge).unwrap();
            }
        }),
        trial("a deleted device is told by every call", || {
            need_tun();
            let device = Builder::new("del", Mode::Tun).queues(2).open().unwrap();
            Handle::new().unwrap().delete(device.index().unwrap()).unwrap();
            let queue = &device.queues()[0];
            assert_eq!(queue.disable().unwrap_err().raw_os_error(), Some(libc::EINVAL));
            assert_eq!(queue.current_name().unwrap_err().raw_os_error(), Some(libc::EBADFD));
            assert_eq!(queue.send_buffer().unwrap_err().raw_os_error(), Some(libc::EBADFD));
            assert_eq!(device.mtu().unwrap_err().raw_os_error(), Some(libc::ENODEV));
            assert!(device.add_queue().is_err());
            assert!(!exists("del"), "asking for a queue has not made a new device");
        }),
        trial("the device goes with its last queue", || {
            need_tun();
            for order in [[0, 1, 2], [2, 1, 0], [1, 2, 0]] {
                let mut queues: Vec<_> = Builder::new("last", Mode::Tun)
                    .queues(3)
                    .open()
                    .unwrap()
                    .into_queues()
                    .into_iter()
                    .map(Some)
                    .collect();
                for (left, i) in [2, 1, 0].into_iter().zip(order) {
                    if left == 0 {
                        // Disabled, it counts all the same.
                        queues[i].as_ref().unwrap().disable().unwrap();
                        assert!(exists("last"));
                    }
                    queues[i] = None;
                    assert_eq!(exists("last"), left > 0);
                }
            }
        }),
        trial("adopting a descriptor of any device", || {
            need_tun();
            for mode in [Mode::Tun, Mode::Tap] {
                for packet_info in [true, false] {
                    let fd = raw_tun("adopt", bits(mode, packet_info)).unwrap();
                    // SAFETY: no pointers.
                    assert_eq!(unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_SETFD, 0) }, 0);
                    let held = copy(&fd);
                    Handle::new().unwrap().set_mtu(link("adopt").index, 1400).unwrap();
                    let device = MultiQueue::from_fds(vec![fd]).unwrap();
                    assert_eq!((device.name(), device.mode(), device.len()), ("adopt", mode, 1));
                    assert_eq!(device.granted().packet_info, packet_info, "{mode:?}");
                    assert!(!device.granted().multi_queue);
                    assert_eq!(device.index(), Some(link("adopt").index));
                    assert_eq!((device.mtu().unwrap(), device.queues()[0].mtu()), (1400, Some(1400)));
                    let (status, close_on_exec) = descriptor_flags(&device.queues()[0]);
                    assert!(status & libc::O_NONBLOCK != 0 && close_on_exec);
                    assert!(
                        descriptor_flags(&held).0 & libc::O_NONBLOCK != 0,
                        "shared with other holders"
                    );
                    assert_eq!(status & libc::O_APPEND, 0, "no mark is left");
                    let dropped = link("adopt").stats.rx_dropped;
                    assert_eq!(dropped, u64::from(!packet_info), "as documented, one at most");
                    drop(device);
                    assert!(exists("adopt"), "the copy keeps it");
                    drop(held);
                    assert!(!exists("adopt"));
                }
            }
        }),
        trial(
            "finding out packet information does not depend on the device being up",
            || {
                need_tun();
                for mode in [Mode::Tun, Mode::Tap] {
                    for packet_info in [true, false] {
                        let fd = raw_tun("up", bits(mode, packet_info)).unwrap();
                        let index = link("up").index;
                        let _socket = socket_behind(index);
                        let device = MultiQueue::from_fds(vec![fd]).unwrap();
                        assert_eq!(device.granted().packet_info, packet_info, "{mode:?}");
                        assert_eq!(link("up").stats.rx_packets, 0, "nothing came into the stack");
                    }
                }
            },
        ),
        trial("adopting all queues of a device", || {
            need_tun();
            let before = Builder::new("every", Mode::Tun).queues(5).open().unwrap();
            let socket = socket_behind(before.index().unwrap());
            let mut queues = before.into_queues();
            let kept = queues.pop().unwrap();
            queues[2].disable().unwrap();
            let device = MultiQueue::from_fds(queues.into_iter().map(OwnedFd::from).collect()).unwrap();
            assert_eq!(device.len(), 4);
            assert!(device.verified() && device.granted().multi_queue && !device.granted().packet_info);
            assert!(device.queues()[2].is_disabled().unwrap(), "as it came");
            device.queues()[2].enable().unwrap();
            let port = socket.local_addr().unwrap().port();
            for queue in device.queues() {
                write(queue, &udp_packet(port, b"adopted")).unwrap();
                let mut buf = [0; 16];
                assert_eq!(again(|| socket.recv(&mut buf)).unwrap(), 7);
            }
            assert_eq!(device.add_queue().unwrap().name(), "every");
            drop(device);
            assert!(exists("every"));
            drop(kept);
            assert!(!exists("every"));
        }),
        trial("adopting from another namespace", || {
            need_tun();
            let there = namespace();
            let fd = there
                .run(|| raw_tun("there", bits(Mode::Tun, false) | libc::IFF_MULTI_QUEUE).unwrap())
                .unwrap();
            let _same_name_here = Builder::new("there", Mode::Tun).mtu(1300).open().unwrap();
            let device = MultiQueue::from_fds(vec![fd]).unwrap();
            assert!(device.verified());
            assert_eq!(device.mtu().unwrap(), 1500, "not the one here");
            device.set_mtu(1400).unwrap();
            assert_eq!(
                (there.run(|| link("there").mtu).unwrap(), link("there").mtu),
                (1400, 1300)
            );
            let second = device.add_queue().unwrap();
            assert_eq!(there.run(|| link("there").tun.unwrap().queues).unwrap(), 2);
            drop(second);
        }),
        trial("adopting without privilege says what is not known", || {
            need_tun();
            let queues = || -> Vec<OwnedFd> {
                let device = Builder::new("given", Mode::Tun).queues(2).mtu(1400).open().unwrap();
                device.into_queues().into_iter().map(OwnedFd::from).collect()
            };
            let (two, device) = (queues(), |fds| MultiQueue::from_fds(fds).unwrap());
            unprivileged(NOBODY, Node::Missing, || {
                let device = device(two);
                assert!(!device.verified());
                assert!(device.device().is_none() && device.index().is_none());
                assert_eq!(device.queues()[0].mtu(), None);
                assert_eq!(device.set_up(true).unwrap_err().kind(), io::ErrorKind::Unsupported);
                assert_eq!(device.add_queue().unwrap_err().kind(), OpenErrorKind::Namespace);
                assert!(!device.granted().packet_info);
                device.queues()[1].disable().unwrap();
            });
            assert!(!exists("given"));
            let mut one = queues();
            one.pop();
            unprivileged(NOBODY, Node::Missing, || {
                assert!(device(one).verified(), "one is one device")
            });
        }),
        trial("offloads of adopted queues are off unless asked for", || {
            need_tun();
            let flags = bits(Mode::Tun, false) | libc::IFF_NO_PI | libc::IFF_MULTI_QUEUE | libc::IFF_VNET_HDR;
            let open = || {
                let queue = raw_tun("vnet", flags).unwrap();
                // As somebody before may have left it.
                ioctl_int(queue.as_fd(), libc::TUNSETVNETHDRSZ, 12).unwrap();
                ioctl_value(queue.as_fd(), libc::TUNSETOFFLOAD, 1).unwrap();
                queue
            };
            let device = MultiQueue::from_fds(vec![open()]).unwrap();
            assert!(device.granted().vnet_hdr && !device.granted().packet_info);
            assert_eq!(device.granted().offloads, Offloads::none());
            let mut size = 0;
            // SAFETY: the request writes one int.
            unsafe { libc::ioctl(device.queues()[0].as_raw_fd(), libc::TUNGETVNETHDRSZ, &raw mut size) };
            assert_eq!(size, 10);
            drop(device);
            let device = MultiQueue::from_fds_with_offloads(vec![open()], Offloads::all()).unwrap();
            let granted = device.granted().offloads;
            assert!(granted.contains(Offloads::TSO4 | Offloads::TSO6), "{granted}");
            // A queue that is added replays them.
            let added = device.add_queue().unwrap();
            assert!(added.vnet_hdr());
            assert_eq!(added.offloads(), granted);
            assert_eq!(added.set_offloads(Offloads::CSUM).unwrap(), Offloads::CSUM);
            assert_eq!(device.granted().offloads, Offloads::CSUM);
        }),
        trial("what cannot be adopted is refused", || {
            need_tun();
            let adopt = |fds: Vec<OwnedFd>| {
                let error = MultiQueue::from_fds(fds).unwrap_err();
                assert!(!error.detail().is_empty());
                error.kind()
            };
            assert_eq!(adopt(Vec::new()), OpenErrorKind::InvalidSetting, "none at all");
            let (reader, _writer) = io::pipe().unwrap();
            assert_eq!(adopt(vec![reader.into()]), OpenErrorKind::NotATunDescriptor, "a pipe");
            let null = std::fs::File::open("/dev/null").unwrap();
            assert_eq!(
                adopt(vec![null.into()]),
                OpenErrorKind::NotATunDescriptor,
                "another character device"
            );
            let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
            assert_eq!(adopt(vec![socket.into()]), OpenErrorKind::NotATunDescriptor, "a socket");
            assert_eq!(
                adopt(vec![raw_unattached()]),
                OpenErrorKind::NotATunDescriptor,
                "not attached"
            );

            let deleted = raw_tun("deleted", bits(Mode::Tun, false)).unwrap();
            Handle::new().unwrap().delete(link("deleted").index).unwrap();
            assert_eq!(adopt(vec![deleted]), OpenErrorKind::NotATunDescriptor, "deleted");

            let multi = bits(Mode::Tun, false) | libc::IFF_MULTI_QUEUE;
            let open = |name: &str, flags| raw_tun(name, flags).unwrap();
            assert_eq!(
                adopt(vec![open("a", multi), open("b", multi)]),
                OpenErrorKind::NotATunDescriptor,
                "two devices"
            );
            let queue = open("twice", multi);
            let again = copy(&queue);
            let other = open("twice", multi);
            assert_eq!(
                adopt(vec![queue, other, again]),
                OpenErrorKind::NotATunDescriptor,
                "a queue twice"
            );
            assert!(!exists("twice"), "what was refused is closed");

            let here = open("same", multi);
            let there = namespace().run(|| raw_tun("same", multi).unwrap()).unwrap();
            assert_eq!(
                adopt(vec![here, there]),
                OpenErrorKind::NotATunDescriptor,
                "one name in two namespaces"
            );
            let here = open("single", bits(Mode::Tun, false));
            let there = namespace()
                .run(|| raw_tun("single", bits(Mode::Tun, false)).unwrap())
                .unwrap();
            assert_eq!(
                adopt(vec![here, there]),
                OpenErrorKind::QueueModeMismatch,
                "two single-queue devices of a name"
            );
            let tun = open("mode", multi);
            let tap = namespace()
                .run(|| raw_tun("mode", bits(Mode::Tap, false) | libc::IFF_MULTI_QUEUE).unwrap())
                .unwrap();
            assert_eq!(
                adopt(vec![tun, tap]),
                OpenErrorKind::NotGranted,
                "a TUN and a TAP device of a name"
            );

            let vnet = open(
                "vnet",
                bits(Mode::Tun, true) | libc::IFF_MULTI_QUEUE | libc::IFF_VNET_HDR,
            );
            assert_eq!(
                adopt(vec![vnet]),
                OpenErrorKind::Unsupported,
                "a vnet header behind packet information"
            );
            let plain = open("plain", multi | libc::IFF_NO_PI);
            let error = MultiQueue::from_fds_with_offloads(vec![plain], Offloads::all()).unwrap_err();
            assert_eq!(
                error.kind(),
                OpenErrorKind::QueueModeMismatch,
                "offloads without a vnet header"
            );
            let many = (0..257).map(|_| copy(raw_unattached())).collect();
            assert_eq!(adopt(many), OpenErrorKind::TooManyQueues);
        }),
        trial("a refused adoption changes nothing for other holders", || {
            need_tun();
            let fd = raw_tun("untouched", bits(Mode::Tun, false)).unwrap();
            let held = copy(&fd);
            let before = descriptor_flags(&held);
            assert_eq!(before.0 & libc::O_NONBLOCK, 0);
            MultiQueue::from_fds(vec![fd, copy(&held)]).unwrap_err();
            assert_eq!(descriptor_flags(&held), before);
            assert_eq!(link("untouched").stats.rx_dropped, 0);
        }),
    ])
}

fn bits(mode: Mode, packet_info: bool) -> i32 {
    let mode = match mode {
        Mode::Tun => libc::IFF_TUN,
        Mode::Tap => libc::IFF_TAP,
    };
    if packet_info { mode } else { mode | libc::IFF_NO_PI }
}

/// Sends packets of many flows out, and says which of the two queues got them all; `None`: both had some. Each must arrive.
fn spread(first: &Queue, second: &Queue, flows: usize) -> Option<usize> {
    for _ in 0..flows {
        // Another source port each time, so another flow.
        let socket = UdpSocket::bind("198.18.0.1:0").unwrap();
        socket.send_to(b"flow", "198.18.0.2:9").unwrap();
    }
    let count = |queue: &Queue| {
        let mut buf = [0; 2048];
        let mut count = 0;
        while let Ok(len) = try_read(queue.as_fd(), &mut buf) {
            count += usize::from(udp_payload(&buf[..len]).is_some_and(|payload| payload == b"flow"));
        }
        count
    };
    let (on_first, on_second) = (count(first), count(second));
    assert_eq!(on_first + on_second, flows, "none is lost");
    match (on_first, on_second) {
        (_, 0) => Some(0),
        (0, _) => Some(1),
        _ => None,
    }
}

/// A device "moving" with this index: the kernel counts up, so they are made and dropped until its
/// turn comes.
fn twin_with(index: u32, queues: usize, mode: Mode) -> MultiQueue {
    for _ in 0..100_000 {
        let twin = Builder::new("moving", mode).queues(queues).open().unwrap();
        if twin.index() == Some(index) {
            return twin;
        }
    }
    panic!("no device with the index {index}");
}

/// The payload of the next UDP packet.
fn next_udp(queue: &Queue) -> Vec<u8> {
    let mut buf = [0; 2048];
    for _ in 0..50 {
        let len = read_packet(queue, &mut buf);
        if let Some(payload) = udp_payload(&buf[..len]) {
            return payload;
        }
    }
    panic!("no UDP packet among fifty");
}
