//! Plain descriptor calls: read, write, poll, eventfd.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::ptr::NonNull;
use std::time::Duration;

use super::syscall;

/// read(2) into memory that is not Rust's to look at meanwhile.
///
/// # Safety
/// `len` bytes at `at` are writable, and nobody else uses them during the call.
pub(crate) unsafe fn read_raw(fd: RawFd, at: NonNull<u8>, len: usize) -> io::Result<usize> {
    // SAFETY: the caller vouches for the memory.
    unsafe { syscall!(read(fd, at.as_ptr().cast(), len)) }.map(|count| count as usize)
}

/// As [`read_raw`], but EAGAIN instead of waiting also where the descriptor is blocking: preadv2(2)
/// with RWF_NOWAIT (for tun since Linux 6.4; EOPNOTSUPP before).
///
/// # Safety
/// As of `read_raw`.
pub(crate) unsafe fn read_nowait(fd: RawFd, at: NonNull<u8>, len: usize) -> io::Result<usize> {
    let part = libc::iovec {
        iov_base: at.as_ptr().cast(),
        iov_len: len,
    };
    // SAFETY: one iovec that lives through the call; the caller vouches for the memory.
    unsafe { syscall!(preadv2(fd, &raw const part, 1, -1, libc::RWF_NOWAIT)) }.map(|count| count as usize)
}

/// write(2).
pub(crate) fn write(fd: RawFd, bytes: &[u8]) -> io::Result<usize> {
    // SAFETY: the slice is readable for its length.
    unsafe { syscall!(write(fd, bytes.as_ptr().cast(), bytes.len())) }.map(|count| count as usize)
}

/// write(2) of memory that is named by its address.
///
/// # Safety
/// `len` bytes at `at` are readable during the call.
pub(crate) unsafe fn write_raw(fd: RawFd, at: *const u8, len: usize) -> io::Result<usize> {
    // SAFETY: the caller vouches for the memory.
    unsafe { syscall!(write(fd, at.cast(), len)) }.map(|count| count as usize)
}

/// writev(2): one packet out of several pieces.
///
/// # Safety
/// `count` iovecs at `parts` are readable during the call, and what they name is.
pub(crate) unsafe fn write_parts(fd: RawFd, parts: *const libc::iovec, count: usize) -> io::Result<usize> {
    // SAFETY: the caller vouches for the memory.
    unsafe { syscall!(writev(fd, parts, count as libc::c_int)) }.map(|count| count as usize)
}

/// eventfd(2), non-blocking and closed on exec.
pub(crate) fn eventfd() -> io::Result<OwnedFd> {
    // SAFETY: eventfd takes no pointers; the descriptor is new and ours.
    unsafe { syscall!(eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK)).map(|fd| OwnedFd::from_raw_fd(fd)) }
}

/// Adds one to an eventfd. It can only fail by overflow, and then it is readable anyway.
pub(crate) fn eventfd_ring(fd: BorrowedFd<'_>) {
    let _ = write(fd.as_raw_fd(), &1u64.to_ne_bytes());
}

/// Sets an eventfd back to zero.
pub(crate) fn eventfd_reset(fd: BorrowedFd<'_>) {
    let mut count = [0u8; 8];
    // SAFETY: eight writable bytes, as eventfd wants.
    let _ = unsafe { read_raw(fd.as_raw_fd(), NonNull::from(&mut count).cast(), 8) };
}

/// ppoll(2). `None` waits for ever. Returns how many entries have events; an interrupted wait is 0.
pub(crate) fn poll(fds: &mut [libc::pollfd], timeout: Option<Duration>) -> io::Result<usize> {
    let timespec = timeout.map(|timeout| libc::timespec {
        tv_sec: libc::time_t::try_from(timeout.as_secs()).unwrap_or(libc::time_t::MAX),
        tv_nsec: timeout.subsec_nanos() as libc::c_long,
    });
    let timespec = timespec.as_ref().map_or(std::ptr::null(), std::ptr::from_ref);
    // SAFETY: the slice and the timespec live through the call; no signal mask is given.
    match unsafe {
        syscall!(ppoll(
            fds.as_mut_ptr(),
            fds.len() as libc::nfds_t,
            timespec,
            std::ptr::null()
        ))
    } {
        Ok(count) => Ok(count as usize),
        Err(error) if error.raw_os_error() == Some(libc::EINTR) => Ok(0),
        Err(error) => Err(error),
    }
}
