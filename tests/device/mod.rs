//! What the tests of devices share: raw descriptors of the tun driver, packets, and threads without privilege.
#![allow(dead_code, unreachable_pub)] // each test file uses its share

use std::ffi::CString;
use std::io;
use std::net::{Ipv4Addr, UdpSocket};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use etherparse::{PacketBuilder, SlicedPacket, TransportSlice};
use tun_driver::lab::Namespace;
use tun_driver::netlink::{Handle, RequestError};

/// The user of [`unprivileged`] threads: nobody.
pub const NOBODY: u32 = 65_534;

/// The state of `/dev/net/tun` that an unprivileged thread finds.
#[derive(Clone, Copy)]
pub enum Node {
    Mode(u32),
    Missing,
    /// An empty file in its place.
    File,
    /// `/dev/null` in its place.
    Null,
}

/// Runs `work` on a thread of user and group `id` without capabilities, in the caller's network namespace. The thread sees a
/// `/dev/net/tun` of its own, so that neither the host's node nor its mode matter. Skips the test where that takes more than we have.
pub fn unprivileged<T: Send>(id: u32, node: Node, work: impl FnOnce() -> T + Send) -> T {
    let outcome = std::thread::scope(|scope| {
        scope
            .spawn(move || {
                private_node(node)?;
                drop_privileges(id)?;
                Ok(work())
            })
            .join()
    });
    match outcome {
        Ok(Ok(value)) => value,
        Ok(Err(error)) => {
            let error: io::Error = error;
            crate::common::skip(format!("no thread of another user with a node of its own: {error}"))
        }
        Err(panic) => std::panic::resume_unwind(panic),
    }
}

fn private_node(node: Node) -> io::Result<()> {
    let c = |text: &str| CString::new(text).expect("no NUL");
    // SAFETY: plain system calls on strings that live through each call. The mount namespace is this thread's own from the first one on,
    // so nothing that follows is seen by others.
    unsafe {
        check(libc::unshare(libc::CLONE_NEWNS))?;
        let private = libc::MS_REC | libc::MS_PRIVATE;
        check(libc::mount(
            c("none").as_ptr(),
            c("/").as_ptr(),
            std::ptr::null(),
            private,
            std::ptr::null(),
        ))?;
        check(libc::mount(
            c("tmpfs").as_ptr(),
            c("/dev/net").as_ptr(),
            c("tmpfs").as_ptr(),
            0,
            std::ptr::null(),
        ))?;
        check(libc::chmod(c("/dev/net").as_ptr(), 0o755))?;
        let (kind, mode, number) = match node {
            Node::Mode(mode) => (libc::S_IFCHR, mode, libc::makedev(10, 200)),
            Node::File => (libc::S_IFREG, 0o666, 0),
            Node::Null => (libc::S_IFCHR, 0o666, libc::makedev(1, 3)),
            Node::Missing => return Ok(()),
        };
        check(libc::mknod(c("/dev/net/tun").as_ptr(), kind | mode, number))?;
        check(libc::chmod(c("/dev/net/tun").as_ptr(), mode))?;
    }
    Ok(())
}

fn drop_privileges(id: u32) -> io::Result<()> {
    // SAFETY: no pointers. The raw calls change this thread only, where libc's functions would change all; leaving uid 0 drops the capabilities.
    unsafe {
        check(libc::syscall(libc::SYS_setgroups, 0, 0) as i32)?;
        check(libc::syscall(libc::SYS_setresgid, id, id, id) as i32)?;
        check(libc::syscall(libc::SYS_setresuid, id, id, id) as i32)
    }
}

fn check(result: i32) -> io::Result<()> {
    if result == -1 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

/// A queue opened by hand, as another program would.
pub fn raw_tun(name: &str, flags: i32) -> io::Result<OwnedFd> {
    let fd = raw_unattached();
    // SAFETY: all zero is a valid ifreq.
    let mut ifreq: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in ifreq.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    ifreq.ifr_ifru.ifru_flags = flags as libc::c_short;
    // SAFETY: a whole ifreq.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNSETIFF, &raw mut ifreq) })?;
    Ok(fd)
}

/// A descriptor of the node, attached to nothing.
pub fn raw_unattached() -> OwnedFd {
    let node = std::fs::OpenOptions::new().read(true).write(true).open("/dev/net/tun");
    node.expect("/dev/net/tun").into()
}

/// An ioctl that takes a pointer to an int.
pub fn ioctl_int(fd: BorrowedFd<'_>, request: libc::Ioctl, value: i32) -> io::Result<i32> {
    let mut value = value;
    // SAFETY: the requests of these tests read or write one int.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), request, &raw mut value) })?;
    Ok(value)
}

/// An ioctl that takes the value itself.
pub fn ioctl_value(fd: BorrowedFd<'_>, request: libc::Ioctl, value: u64) -> io::Result<()> {
    // SAFETY: no pointer.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), request, value) })
}

/// A copy of the descriptor: the same open file.
pub fn copy(fd: impl AsFd) -> OwnedFd {
    fd.as_fd().try_clone_to_owned().expect("dup")
}

/// Status flags (F_GETFL) and whether it is close-on-exec.
pub fn descriptor_flags(fd: impl AsFd) -> (i32, bool) {
    let fd = fd.as_fd().as_raw_fd();
    // SAFETY: no pointers.
    let (status, descriptor) = unsafe { (libc::fcntl(fd, libc::F_GETFL), libc::fcntl(fd, libc::F_GETFD)) };
    assert!(status != -1 && descriptor != -1);
    (status, descriptor & libc::FD_CLOEXEC != 0)
}

/// read(2) until a packet comes, within two seconds, on a non-blocking descriptor.
pub fn read_packet(fd: impl AsFd, buf: &mut [u8]) -> usize {
    let until = Instant::now() + Duration::from_secs(2);
    loop {
        match try_read(&fd, buf) {
            Ok(len) => return len,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock && Instant::now() < until => {
                std::thread::sleep(Duration::from_millis(1));
            }
            Err(error) => panic!("no packet: {error}"),
        }
    }
}

/// read(2).
pub fn try_read(fd: impl AsFd, buf: &mut [u8]) -> io::Result<usize> {
    // SAFETY: the slice is writable for its length.
    let len = unsafe { libc::read(fd.as_fd().as_raw_fd(), buf.as_mut_ptr().cast(), buf.len()) };
    usize::try_from(len).map_err(|_| io::Error::last_os_error())
}

/// write(2).
pub fn write(fd: impl AsFd, buf: &[u8]) -> io::Result<usize> {
    // SAFETY: the slice is readable for its length.
    let len = unsafe { libc::write(fd.as_fd().as_raw_fd(), buf.as_ptr().cast(), buf.len()) };
    usize::try_from(len).map_err(|_| io::Error::last_os_error())
}

/// A UDP packet from 198.18.0.2:1111, which lies beyond the device, to 198.18.0.1, which is the device's address.
pub fn udp_packet(port: u16, payload: &[u8]) -> Vec<u8> {
    let builder = PacketBuilder::ipv4([198, 18, 0, 2], [198, 18, 0, 1], 64).udp(1111, port);
    let mut packet = Vec::new();
    builder.write(&mut packet, payload).expect("a packet");
    packet
}

/// A ping of `to` by `from`, which the kernel answers itself: it takes no socket to have traffic.
pub fn ping(from: Ipv4Addr, to: Ipv4Addr, id: u16) -> Vec<u8> {
    let builder = PacketBuilder::ipv4(from.octets(), to.octets(), 64).icmpv4_echo_request(id, 0);
    let mut packet = Vec::new();
    builder.write(&mut packet, &[0x5a; 64]).expect("a packet");
    packet
}

/// Makes the answer to a ping a ping of who answered. Anything else stays, and gives `false`.
pub fn ping_back(packet: &mut [u8]) -> bool {
    const HEADER: usize = 20;
    const ECHO_REPLY: u8 = 0;
    const ECHO_REQUEST: u8 = 8;
    if packet.len() < HEADER + 8 || packet[0] != 0x45 || packet[9] != 1 || packet[HEADER] != ECHO_REPLY {
        return false;
    }
    // The IPv4 header's checksum stays right.
    let (source, destination) = packet[12..HEADER].split_at_mut(4);
    source.swap_with_slice(destination);
    packet[HEADER] = ECHO_REQUEST;
    let (high, borrow) = packet[HEADER + 2].overflowing_sub(ECHO_REQUEST);
    packet[HEADER + 2] = high;
    // One's complement: what is borrowed comes from the other end.
    if borrow {
        let checksum = u16::from_be_bytes([packet[HEADER + 2], packet[HEADER + 3]]).wrapping_sub(1);
        packet[HEADER + 2..HEADER + 4].copy_from_slice(&checksum.to_be_bytes());
    }
    true
}

/// The payload of a UDP packet over IP; `None` for any other packet.
pub fn udp_payload(packet: &[u8]) -> Option<Vec<u8>> {
    match SlicedPacket::from_ip(packet).ok()?.transport? {
        TransportSlice::Udp(udp) => Some(udp.payload().to_vec()),
        _ => None,
    }
}

/// Gives the device 198.18.0.1/24, sets it up, and returns a socket there whose packets to 198.18.0.2 go out through the device.
pub fn socket_behind(index: u32) -> UdpSocket {
    let netlink = Handle::new().expect("netlink");
    netlink
        .add_address(index, Ipv4Addr::new(198, 18, 0, 1).into(), 24)
        .expect("the address");
    netlink.set_up(index, true).expect("up");
    let socket = UdpSocket::bind((Ipv4Addr::new(198, 18, 0, 1), 0)).expect("a socket");
    socket
        .set_read_timeout(Some(Duration::from_secs(2) * crate::common::slowness()))
        .expect("a timeout");
    socket
}

/// Whether there is a device of this name in the calling thread's namespace.
pub fn exists(name: &str) -> bool {
    match Handle::new().expect("netlink").index_of(name) {
        Ok(_) => true,
        Err(error) => {
            let errno = RequestError::of(&error).map_or(error.raw_os_error(), RequestError::raw_os_error);
            assert_eq!(errno, Some(libc::ENODEV), "{error}");
            false
        }
    }
}

/// What rtnetlink says of the device.
pub fn link(name: &str) -> tun_driver::netlink::Link {
    let netlink = Handle::new().expect("netlink");
    netlink
        .link(netlink.index_of(name).expect("the device"))
        .expect("the link")
}

/// How many descriptors this process has open.
pub fn open_descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").expect("/proc").count()
}

/// Another namespace.
pub fn namespace() -> Namespace {
    Namespace::new().expect("a namespace")
}
