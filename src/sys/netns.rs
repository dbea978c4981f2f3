//! Network namespaces: `unshare(2)`, `setns(2)` and the identity maps of `user_namespaces(7)`.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

use super::syscall;

/// Moves the calling thread into a new network namespace. Needs CAP_SYS_ADMIN.
pub(crate) fn unshare_net() -> io::Result<()> {
    // SAFETY: unshare(2) takes no pointers; it changes which namespace this thread's later system calls see.
    unsafe { syscall!(unshare(libc::CLONE_NEWNET)) }.map(drop)
}

/// Moves the calling process into a new user namespace and a network namespace owned by it. EINVAL in a process of several threads.
pub(crate) fn unshare_user_and_net() -> io::Result<()> {
    // SAFETY: as above; the kernel refuses CLONE_NEWUSER for a process with several threads.
    unsafe { syscall!(unshare(libc::CLONE_NEWUSER | libc::CLONE_NEWNET)) }.map(drop)
}

/// Moves the calling thread into the network namespace behind `fd`. Needs CAP_SYS_ADMIN here and in the namespace's owner.
pub(crate) fn enter_net(fd: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: setns(2) takes no pointers; `fd` is open for the duration of the call because it is borrowed.
    unsafe { syscall!(setns(fd.as_raw_fd(), libc::CLONE_NEWNET)) }.map(drop)
}

/// The calling thread's network namespace. It lives at least as long as this descriptor.
pub(crate) fn current_net() -> io::Result<OwnedFd> {
    Ok(File::open("/proc/thread-self/ns/net")?.into())
}

/// Effective user and group of the calling thread.
pub(crate) fn effective_ids() -> (libc::uid_t, libc::gid_t) {
    // SAFETY: both calls take nothing and cannot fail.
    unsafe { (libc::geteuid(), libc::getegid()) }
}
