//! Batches of datagrams: recvmmsg(2) and sendmmsg(2), and the kernel's form of a socket address.

use std::io;
use std::mem::zeroed;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6};
use std::os::fd::RawFd;
use std::ptr::NonNull;

use super::ancillary::{self, Control, LocalAddr};
#[cfg(feature = "lab")]
use super::socket_options::{SOL_UDP, UDP_SEGMENT, set_int};
use super::syscall;

/// The arrays that the kernel wants, allocated once.
pub(crate) struct Datagrams {
    headers: Box<[libc::mmsghdr]>,
    vectors: Box<[libc::iovec]>,
    names: Box<[libc::sockaddr_storage]>,
    /// Ancillary data: local addresses. None until a port needs them.
    controls: Box<[Control]>,
}

/// One datagram as it was received.
pub(crate) struct Arrived {
    pub(crate) len: usize,
    pub(crate) truncated: bool,
    pub(crate) peer: Option<SocketAddr>,
    pub(crate) local: Option<LocalAddr>,
    /// The kernel said that it consists of several.
    pub(crate) coalesced: bool,
    /// The kernel had something to say of it, and there was no room for it.
    pub(crate) unsaid: bool,
}

impl Datagrams {
    pub(crate) fn new(capacity: usize) -> Self {
        // SAFETY: all three are plain C structs for which zero is a value.
        let (header, name): (libc::mmsghdr, libc::sockaddr_storage) = unsafe { (zeroed(), zeroed()) };
        Self {
            headers: vec![header; capacity].into(),
            vectors: vec![
                libc::iovec {
                    iov_base: std::ptr::null_mut(),
                    iov_len: 0
                };
                capacity
            ]
            .into(),
            names: vec![name; capacity].into(),
            controls: Box::default(),
        }
    }

    pub(crate) fn capacity(&self) -> usize {
        self.headers.len()
    }

    /// Bytes of the arrays for `capacity` datagrams.
    pub(crate) fn memory(capacity: usize) -> usize {
        capacity
            * (size_of::<libc::mmsghdr>()
                + size_of::<libc::iovec>()
                + size_of::<libc::sockaddr_storage>()
                + size_of::<Control>())
    }

    /// Makes room for the local addresses of datagrams, and all else that a socket is set to say.
    pub(crate) fn expect_ancillary(&mut self) {
        if self.controls.is_empty() {
            self.controls = vec![Control::default(); self.capacity()].into();
        }
    }

    /// Sets where datagram `index` lies and, for sending, where it goes.
    pub(crate) fn set(&mut self, index: usize, at: NonNull<u8>, len: usize, peer: Option<SocketAddr>) {
        self.vectors[index] = libc::iovec {
            iov_base: at.as_ptr().cast(),
            iov_len: len,
        };
        let header = &mut self.headers[index].msg_hdr;
        header.msg_iov = &raw mut self.vectors[index];
        header.msg_iovlen = 1;
        header.msg_control = std::ptr::null_mut();
        header.msg_controllen = 0;
        match peer {
            Some(peer) => {
                header.msg_namelen = encode(peer, &mut self.names[index]);
                header.msg_name = (&raw mut self.names[index]).cast();
            }
            None => {
                header.msg_namelen = 0;
                header.msg_name = std::ptr::null_mut();
            }
        }
    }

    /// Asks the kernel for the sender of datagram `index`.
    pub(crate) fn want_peer(&mut self, index: usize) {
        let header = &mut self.headers[index].msg_hdr;
        header.msg_name = (&raw mut self.names[index]).cast();
        header.msg_namelen = size_of::<libc::sockaddr_storage>() as libc::socklen_t;
    }

    /// Asks the kernel for what it has to say of datagram `index`, after
    /// [`expect_ancillary`](Self::expect_ancillary).
    pub(crate) fn want_ancillary(&mut self, index: usize) {
        let header = &mut self.headers[index].msg_hdr;
        header.msg_control = (&raw mut self.controls[index]).cast();
        header.msg_controllen = size_of::<Control>() as _;
    }

    /// Sends datagram `index` from `local`, after [`expect_ancillary`](Self::expect_ancillary).
    pub(crate) fn set_local(&mut self, index: usize, local: LocalAddr) {
        let header = &mut self.headers[index].msg_hdr;
        header.msg_controllen = self.controls[index].write(local) as _;
        header.msg_control = (&raw mut self.controls[index]).cast();
    }

    /// Receives at most `count` datagrams into the memory that was set; never blocks. EAGAIN if there is none.
    ///
    /// # Safety
    /// The memory set for the first `count` entries is writable, and nobody else uses it during the call.
    pub(crate) unsafe fn receive(&mut self, fd: RawFd, count: usize) -> io::Result<usize> {
        let count = count.min(self.capacity()) as libc::c_uint;
        // SAFETY: the headers point to vectors and names of this value; the caller vouches for what the vectors point to.
        unsafe {
            syscall!(recvmmsg(
                fd,
                self.headers.as_mut_ptr(),
                count,
                libc::MSG_DONTWAIT as _,
                std::ptr::null_mut()
            ))
        }
        .map(|count| count as usize)
    }

    /// Datagram `index` of the last `receive`.
    pub(crate) fn arrived(&self, index: usize) -> Arrived {
        let header = &self.headers[index];
        let (local, coalesced) = if header.msg_hdr.msg_controllen == 0 {
            (None, false)
        } else {
            ancillary::read(&header.msg_hdr)
        };
        Arrived {
            len: header.msg_len as usize,
            truncated: header.msg_hdr.msg_flags & libc::MSG_TRUNC != 0,
            peer: decode(&self.names[index], header.msg_hdr.msg_namelen),
            local,
            coalesced,
            // Where there is room, what is cut off is something else: only what belongs to all
            // sockets comes before UDP_GRO (`udp_recvmsg`), and all of that leaves room for it.
            unsaid: header.msg_hdr.msg_control.is_null() && header.msg_hdr.msg_flags & libc::MSG_CTRUNC != 0,
        }
    }

    /// Sends the entries `from..to`; never blocks. Returns how many were taken; the error is the first one's.
    ///
    /// # Safety
    /// The memory set for these entries is readable during the call.
    pub(crate) unsafe fn send(&mut self, fd: RawFd, from: usize, to: usize) -> io::Result<usize> {
        let entries = &mut self.headers[from..to];
        // SAFETY: as in `receive`.
        unsafe {
            syscall!(sendmmsg(
                fd,
                entries.as_mut_ptr(),
                entries.len() as libc::c_uint,
                libc::MSG_DONTWAIT as _
            ))
        }
        .map(|count| count as usize)
    }

    /// Empties the socket's error queue, at most as many messages as a batch has datagrams. Returns
    /// how many calls that took.
    pub(crate) fn clear_errors(&mut self, fd: RawFd) -> u64 {
        // SAFETY: zero is a value of this C struct: no memory to receive into.
        let mut header: libc::msghdr = unsafe { zeroed() };
        for calls in 1..=self.capacity() as u64 {
            let flags = libc::MSG_ERRQUEUE | libc::MSG_DONTWAIT;
            // SAFETY: the header lives through the call and names no other memory.
            if unsafe { syscall!(recvmsg(fd, &raw mut header, flags)) }.is_err() {
                return calls;
            }
        }
        self.capacity() as u64
    }

    /// Asks whether entry `index` has a destination that the kernel would send to, without sending
    /// it: the address, the route, the permission and the ancillary data (`udp_sendmsg` up to
    /// `ip_make_skb`, which returns early). An error that is pending on the socket is neither
    /// returned nor cleared by this.
    ///
    /// # Safety
    /// The memory set for this entry is readable during the call.
    pub(crate) unsafe fn probe(&mut self, fd: RawFd, index: usize) -> io::Result<()> {
        // SAFETY: as in `receive`.
        unsafe {
            syscall!(sendmsg(
                fd,
                &raw const self.headers[index].msg_hdr,
                MSG_PROBE | libc::MSG_DONTWAIT
            ))
        }
        .map(drop)
    }
}

/// linux/socket.h: checks where a datagram would go, without sending it.
const MSG_PROBE: libc::c_int = 0x10;

/// Makes the kernel cut what a UDP socket is given into datagrams of `size` bytes (UDP_SEGMENT, udp(7); 0: no more). Kernel 4.18 and later.
#[cfg(feature = "lab")]
pub(crate) fn set_udp_segment(fd: RawFd, size: u16) -> io::Result<()> {
    set_int(fd, SOL_UDP, UDP_SEGMENT, size.into())
}

/// Keeps the kernel from fragmenting what a socket sends: too long a datagram is refused with EMSGSIZE.
#[cfg(feature = "lab")]
pub(crate) fn set_do_not_fragment(fd: RawFd, ipv4: bool) -> io::Result<()> {
    if ipv4 {
        set_int(fd, libc::IPPROTO_IP, libc::IP_MTU_DISCOVER, libc::IP_PMTUDISC_DO)
    } else {
        set_int(fd, libc::IPPROTO_IPV6, libc::IPV6_MTU_DISCOVER, libc::IPV6_PMTUDISC_DO)
    }
}

fn encode(peer: SocketAddr, name: &mut libc::sockaddr_storage) -> libc::socklen_t {
    match peer {
        SocketAddr::V4(peer) => {
            let value = libc::sockaddr_in {
                sin_family: libc::AF_INET as libc::sa_family_t,
                sin_port: peer.port().to_be(),
                sin_addr: libc::in_addr {
                    s_addr: u32::from_ne_bytes(peer.ip().octets()),
                },
                sin_zero: [0; 8],
            };
            // SAFETY: sockaddr_storage is large and aligned enough for every socket address.
            unsafe { std::ptr::from_mut(name).cast::<libc::sockaddr_in>().write(value) };
            size_of::<libc::sockaddr_in>() as libc::socklen_t
        }
        SocketAddr::V6(peer) => {
            let value = libc::sockaddr_in6 {
                sin6_family: libc::AF_INET6 as libc::sa_family_t,
                sin6_port: peer.port().to_be(),
                sin6_flowinfo: peer.flowinfo(),
                sin6_addr: libc::in6_addr {
                    s6_addr: peer.ip().octets(),
                },
                sin6_scope_id: peer.scope_id(),
            };
            // SAFETY: as above.
            unsafe { std::ptr::from_mut(name).cast::<libc::sockaddr_in6>().write(value) };
            size_of::<libc::sockaddr_in6>() as libc::socklen_t
        }
    }
}

fn decode(name: &libc::sockaddr_storage, len: libc::socklen_t) -> Option<SocketAddr> {
    let (name, len) = (std::ptr::from_ref(name), len as usize);
    // SAFETY: every sockaddr_storage begins with the family and was zeroed or written by the kernel.
    match i32::from(unsafe { (*name).ss_family }) {
        libc::AF_INET if len >= size_of::<libc::sockaddr_in>() => {
            // SAFETY: the family and the length say that it is a sockaddr_in.
            let value = unsafe { name.cast::<libc::sockaddr_in>().read() };
            let ip = Ipv4Addr::from(value.sin_addr.s_addr.to_ne_bytes());
            Some(SocketAddrV4::new(ip, u16::from_be(value.sin_port)).into())
        }
        libc::AF_INET6 if len >= size_of::<libc::sockaddr_in6>() => {
            // SAFETY: the family and the length say that it is a sockaddr_in6.
            let value = unsafe { name.cast::<libc::sockaddr_in6>().read() };
            let ip = Ipv6Addr::from(value.sin6_addr.s6_addr);
            let (port, flow) = (u16::from_be(value.sin6_port), value.sin6_flowinfo);
            Some(SocketAddrV6::new(ip, port, flow, value.sin6_scope_id).into())
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn addresses_survive_the_round_trip(peer: SocketAddr) {
            // SAFETY: zero is a value of this C struct.
            let mut name = unsafe { zeroed() };
            let len = encode(peer, &mut name);
            prop_assert_eq!(decode(&name, len), Some(peer));
        }
    }
}
