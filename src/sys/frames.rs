//! Packet sockets (packet(7)): frames out of and into an interface, past the stack.

use std::io;
use std::mem::size_of;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use super::syscall;

/// `struct virtio_net_hdr` (linux/virtio_net.h), in front of each frame once [`FrameSocket::with_vnet_header`] says so. All fields in the
/// machine's order.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
#[allow(non_camel_case_types)]
pub(crate) struct virtio_net_hdr {
    pub(crate) flags: u8,
    pub(crate) gso_type: u8,
    pub(crate) hdr_len: u16,
    pub(crate) gso_size: u16,
    pub(crate) csum_start: u16,
    pub(crate) csum_offset: u16,
}

const _: () = assert!(size_of::<virtio_net_hdr>() == virtio_net_hdr::LEN);

impl virtio_net_hdr {
    pub(crate) const LEN: usize = 10;
    /// `flags`: the checksum from `csum_start` on is to be finished.
    pub(crate) const F_NEEDS_CSUM: u8 = 1;
    /// `gso_type`: UDP payloads of `gso_size` bytes each, behind one header. Packet sockets take it since Linux 6.2.
    pub(crate) const GSO_UDP_L4: u8 = 5;

    pub(crate) fn to_bytes(self) -> [u8; Self::LEN] {
        let Self {
            flags,
            gso_type,
            hdr_len,
            gso_size,
            csum_start,
            csum_offset,
        } = self;
        let mut bytes = [flags, gso_type, 0, 0, 0, 0, 0, 0, 0, 0];
        for (at, field) in [(2, hdr_len), (4, gso_size), (6, csum_start), (8, csum_offset)] {
            bytes[at..at + 2].copy_from_slice(&field.to_ne_bytes());
        }
        bytes
    }
}

/// A packet socket on one interface.
#[derive(Debug)]
pub(crate) struct FrameSocket(OwnedFd);

impl FrameSocket {
    /// For sending only: it receives nothing. Never blocks. Needs CAP_NET_RAW in the calling thread's network namespace.
    pub(crate) fn sender(index: u32) -> io::Result<Self> {
        Self::open(index, 0)
    }

    /// For what comes in at the interface; not for what goes out of it. Never blocks.
    pub(crate) fn receiver(index: u32) -> io::Result<Self> {
        let socket = Self::open(0, 0)?; // not bound yet, so that nothing comes before the option is set
        socket.set(libc::SOL_PACKET, PACKET_IGNORE_OUTGOING, 1)?;
        socket.bind(index, libc::ETH_P_ALL as u16)?;
        Ok(socket)
    }

    /// From now on each frame has a [`virtio_net_hdr`] in front.
    pub(crate) fn with_vnet_header(self) -> io::Result<Self> {
        self.set(libc::SOL_PACKET, PACKET_VNET_HDR, 1)?;
        Ok(self)
    }

    /// Sends one frame, or what its header tells to cut.
    pub(crate) fn send(&self, frame: &[u8]) -> io::Result<()> {
        // SAFETY: `frame` is readable for its length.
        unsafe { syscall!(send(self.0.as_raw_fd(), frame.as_ptr().cast(), frame.len(), 0)) }.map(drop)
    }

    fn open(index: u32, protocol: u16) -> io::Result<Self> {
        use std::os::fd::FromRawFd;
        let kind = libc::SOCK_RAW | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
        // SAFETY: no memory is passed.
        let fd = unsafe { syscall!(socket(libc::AF_PACKET, kind, 0)) }?;
        // SAFETY: the descriptor is new and nobody else's.
        let socket = Self(unsafe { OwnedFd::from_raw_fd(fd) });
        if index != 0 {
            socket.bind(index, protocol)?;
        }
        Ok(socket)
    }

    fn bind(&self, index: u32, protocol: u16) -> io::Result<()> {
        // SAFETY: all fields are numbers, for which zero is a value.
        let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
        address.sll_family = libc::AF_PACKET as u16;
        address.sll_protocol = protocol.to_be();
        address.sll_ifindex = libc::c_int::try_from(index).map_err(|_| io::Error::from_raw_os_error(libc::ENODEV))?;
        let (at, size) = (
            std::ptr::from_ref(&address).cast(),
            size_of::<libc::sockaddr_ll>() as libc::socklen_t,
        );
        // SAFETY: `address` outlives the call.
        unsafe { syscall!(bind(self.0.as_raw_fd(), at, size)) }.map(drop)
    }

    fn set(&self, level: libc::c_int, option: libc::c_int, value: libc::c_int) -> io::Result<()> {
        let (at, size) = (
            std::ptr::from_ref(&value).cast(),
            size_of::<libc::c_int>() as libc::socklen_t,
        );
        // SAFETY: the option reads one int, which outlives the call.
        unsafe { syscall!(setsockopt(self.0.as_raw_fd(), level, option, at, size)) }.map(drop)
    }
}

impl AsFd for FrameSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

// linux/if_packet.h; not all of them are in libc for every target.
const PACKET_VNET_HDR: libc::c_int = 15;
const PACKET_IGNORE_OUTGOING: libc::c_int = 23;
