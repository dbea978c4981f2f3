//! Notices that something about a link has changed: rtnetlink(7), group RTNLGRP_LINK. What has changed is asked otherwise, so a lost notice
//! (ENOBUFS) does no harm.

use std::io;
use std::mem;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use super::syscall;

/// Notices of all links of the calling thread's network namespace. Non-blocking; readable when there is one.
pub(crate) fn of_links() -> io::Result<OwnedFd> {
    let kind = libc::SOCK_RAW | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
    // SAFETY: takes no pointer.
    let fd = unsafe { syscall!(socket(libc::AF_NETLINK, kind, libc::NETLINK_ROUTE)) }?;
    // SAFETY: the kernel just made it, and nobody else has it.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
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
    }?;
    Ok(socket)
}

/// Throws the notices away that are there.
pub(crate) fn discard(notices: BorrowedFd<'_>) {
    let mut byte = 0u8;
    // A notice is cut to one byte. Bounded, so that a flood of them cannot hold the thread: what is left makes the next poll return at once.
    for _ in 0..1024 {
        // SAFETY: the kernel writes at most one byte, to a place of one byte.
        let result = unsafe { syscall!(recv(notices.as_raw_fd(), (&raw mut byte).cast(), 1, 0)) };
        match result {
            Ok(_) => {}
            // Some were lost; there may be more.
            Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => {}
            Err(_) => return,
        }
    }
}
