//! Notices that something about a link has changed: rtnetlink(7), group RTNLGRP_LINK.
//!
//! What has changed is asked otherwise, so a lost notice (ENOBUFS) does no harm; only that a link
//! has left its namespace is read from here.

use std::io;
use std::mem;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use super::{FailedCall, syscall};

/// Notices of all links of the calling thread's network namespace. Non-blocking; readable when there is one.
#[cfg(feature = "engine")]
pub(crate) fn of_links() -> Result<OwnedFd, FailedCall> {
    let socket = socket()?;
    bind(&socket)?;
    Ok(socket)
}

/// The one notice that link `index` leaves the calling thread's network namespace, by deletion or
/// by a move; see [`departure`]. A filter of the socket keeps all other notices out, so that none
/// is lost for want of room.
pub(crate) fn of_departure(index: u32) -> Result<OwnedFd, FailedCall> {
    let socket = socket()?;
    // Loads of classic BPF are big-endian, rtnetlink is in the byte order of the host.
    let (load_half, load_byte, load_word) = (
        (libc::BPF_LD | libc::BPF_H | libc::BPF_ABS) as u16,
        (libc::BPF_LD | libc::BPF_B | libc::BPF_ABS) as u16,
        (libc::BPF_LD | libc::BPF_W | libc::BPF_ABS) as u16,
    );
    let equal = (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16;
    let give = (libc::BPF_RET | libc::BPF_K) as u16;
    let step = |code, jf, k| libc::sock_filter { code, jt: 0, jf, k };
    let mut program = [
        step(load_half, 0, TYPE_AT),
        step(equal, 5, u32::from(libc::RTM_DELLINK.to_be())),
        // A bridge says RTM_DELLINK of family AF_BRIDGE when a link ceases to be its port.
        step(load_byte, 0, HEADER),
        step(equal, 3, libc::AF_UNSPEC as u32),
        step(load_word, 0, INDEX_AT),
        step(equal, 1, index.to_be()),
        step(give, 0, u32::MAX),
        step(give, 0, 0),
    ];
    let filter = libc::sock_fprog {
        len: program.len() as u16,
        filter: program.as_mut_ptr(),
    };
    // SAFETY: the kernel copies the program, which lives through the call, as long as `len` says.
    unsafe {
        syscall!(setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_ATTACH_FILTER,
            (&raw const filter).cast(),
            mem::size_of::<libc::sock_fprog>() as libc::socklen_t
        ))
    }
    .map_err(FailedCall::of("setsockopt(SO_ATTACH_FILTER)"))?;
    bind(&socket)?;
    Ok(socket)
}

/// How a link left its namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Departure {
    Deleted,
    /// Moved to another namespace. Kernels before 4.15 do not say so, and a move is `Deleted`
    /// there.
    Moved,
}

// struct nlmsghdr and struct ifinfomsg (linux/netlink.h, linux/rtnetlink.h).
const HEADER: u32 = 16;
const TYPE_AT: u32 = 4;
const INDEX_AT: u32 = HEADER + 4;
const ATTRIBUTES_AT: usize = HEADER as usize + 16;
/// linux/if_link.h; set by dev_change_net_namespace.
const IFLA_NEW_NETNSID: u16 = 45;

/// What [`of_departure`] has to say by now; `None`: the link is still there. Asking does not take
/// the notice away. Fails with ENOBUFS, once, where the kernel had no memory for the notice.
pub(crate) fn departure(notices: BorrowedFd<'_>) -> io::Result<Option<Departure>> {
    let mut byte = 0u8;
    let peek = |place: *mut u8, len: usize| {
        // SAFETY: only called with places of that length, which the kernel fills at most.
        let result = unsafe {
            syscall!(recv(
                notices.as_raw_fd(),
                place.cast(),
                len,
                libc::MSG_PEEK | libc::MSG_TRUNC | libc::MSG_DONTWAIT
            ))
        };
        match result {
            Ok(len) => Ok(Some(len as usize)),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
            Err(error) => Err(error),
        }
    };
    let Some(len) = peek(&raw mut byte, 1)? else {
        return Ok(None);
    };
    let mut notice = vec![0; len];
    peek(notice.as_mut_ptr(), len)?;
    let mut attributes = notice.get(ATTRIBUTES_AT..).unwrap_or_default();
    while let Some((header, _)) = attributes.split_first_chunk::<4>() {
        let [len, kind] = [[header[0], header[1]], [header[2], header[3]]].map(u16::from_ne_bytes);
        if kind == IFLA_NEW_NETNSID {
            return Ok(Some(Departure::Moved));
        }
        let next = usize::from(len).max(4).next_multiple_of(4);
        attributes = attributes.get(next..).unwrap_or_default();
    }
    Ok(Some(Departure::Deleted))
}

fn socket() -> Result<OwnedFd, FailedCall> {
    let kind = libc::SOCK_RAW | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
    // SAFETY: takes no pointer.
    let fd = unsafe { syscall!(socket(libc::AF_NETLINK, kind, libc::NETLINK_ROUTE)) }
        .map_err(FailedCall::of("socket(AF_NETLINK)"))?;
    // SAFETY: the kernel just made it, and nobody else has it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Joins RTNLGRP_LINK.
fn bind(socket: &OwnedFd) -> Result<(), FailedCall> {
    // SAFETY: sockaddr_nl is a plain C struct for which zero is a value.
    let mut address: libc::sockaddr_nl = unsafe { mem::zeroed() };
    address.nl_family = libc::AF_NETLINK as libc::sa_family_t;
    address.nl_groups = libc::RTMGRP_LINK as u32;
    // SAFETY: the kernel reads an address of the size given.
    unsafe {
        syscall!(bind(
            socket.as_raw_fd(),
            (&raw const address).cast(),
            mem::size_of::<libc::sockaddr_nl>() as libc::socklen_t
        ))
    }
    .map(drop)
    .map_err(FailedCall::of("bind(AF_NETLINK)"))
}

/// Throws the notices away that are there.
#[cfg(feature = "engine")]
pub(crate) fn discard(notices: BorrowedFd<'_>) {
    let mut byte = 0u8;
    // A notice is cut to one byte. Bounded, so that a flood of them cannot hold the thread: what is left makes the next poll return at once.
    for _ in 0..1024 {
        // SAFETY: the kernel writes at most one byte, to a place of one byte.
        let result = unsafe { syscall!(recv(notices.as_raw_fd(), (&raw mut byte).cast(), 1, libc::MSG_DONTWAIT)) };
        match result {
            Ok(_) => {}
            // Some were lost; there may be more.
            Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => {}
            Err(_) => return,
        }
    }
}
