//! The two io_uring calls that the `io-uring` crate cannot make for a ring it does not lend out: entering through a registered ring
//! descriptor, and registering it. `include/uapi/linux/io_uring.h`.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::time::Duration;

const IORING_REGISTER_RING_FDS: libc::c_uint = 20;
const IORING_ENTER_GETEVENTS: u32 = 1 << 0;
const IORING_ENTER_EXT_ARG: u32 = 1 << 3;
const IORING_ENTER_REGISTERED_RING: u32 = 1 << 4;

/// `struct io_uring_rsrc_update`
#[repr(C)]
struct io_uring_rsrc_update {
    offset: u32,
    resv: u32,
    data: u64,
}

/// `struct io_uring_getevents_arg`
#[repr(C)]
struct io_uring_getevents_arg {
    sigmask: u64,
    sigmask_sz: u32,
    min_wait_usec: u32,
    ts: u64,
}

/// `struct __kernel_timespec`
#[repr(C)]
struct __kernel_timespec {
    tv_sec: i64,
    tv_nsec: i64,
}

const _: () = assert!(size_of::<io_uring_rsrc_update>() == 16);
const _: () = assert!(size_of::<io_uring_getevents_arg>() == 24);
const _: () = assert!(size_of::<__kernel_timespec>() == 16);

/// How a ring is named in `io_uring_enter`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RingHandle {
    fd: i32,
    flags: u32,
}

impl RingHandle {
    /// The ring by its registered index where the kernel (5.18 and later) gives one, which saves the look-up per call; else by its
    /// descriptor. The index belongs to the calling thread.
    pub(crate) fn register(ring: BorrowedFd<'_>) -> Self {
        let mut update = io_uring_rsrc_update {
            offset: u32::MAX,
            resv: 0,
            data: ring.as_raw_fd() as u64,
        };
        // SAFETY: IORING_REGISTER_RING_FDS reads and writes one io_uring_rsrc_update, which outlives the call.
        let result = unsafe {
            libc::syscall(
                libc::SYS_io_uring_register,
                ring.as_raw_fd(),
                IORING_REGISTER_RING_FDS,
                &raw mut update,
                1 as libc::c_uint,
            )
        };
        if result == 1 {
            Self {
                fd: update.offset as i32,
                flags: IORING_ENTER_REGISTERED_RING,
            }
        } else {
            Self {
                fd: ring.as_raw_fd(),
                flags: 0,
            }
        }
    }

    pub(crate) fn is_registered(&self) -> bool {
        self.flags != 0
    }

    /// Submits `to_submit` entries and waits until `min_complete` completions are there or `timeout` is over; `events` runs deferred
    /// task work even if nothing is waited for. Returns how many entries were taken.
    pub(crate) fn enter(
        &self,
        to_submit: u32,
        min_complete: u32,
        events: bool,
        timeout: Option<Duration>,
    ) -> io::Result<u32> {
        let mut flags = self.flags;
        if events || min_complete > 0 {
            flags |= IORING_ENTER_GETEVENTS;
        }
        let timespec = timeout.map(|timeout| __kernel_timespec {
            tv_sec: i64::try_from(timeout.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: i64::from(timeout.subsec_nanos()),
        });
        let arg = timespec.as_ref().map(|timespec| io_uring_getevents_arg {
            sigmask: 0,
            sigmask_sz: 0,
            min_wait_usec: 0,
            ts: std::ptr::from_ref(timespec) as u64,
        });
        let (arg, size) = match &arg {
            Some(arg) => {
                flags |= IORING_ENTER_EXT_ARG;
                (std::ptr::from_ref(arg), size_of::<io_uring_getevents_arg>())
            }
            None => (std::ptr::null(), 0),
        };
        // SAFETY: `arg` is null or points to an argument that points to a timespec, both alive until the call returns. What the entries
        // themselves point to is the promise of whoever pushed them.
        let result = unsafe {
            libc::syscall(
                libc::SYS_io_uring_enter,
                self.fd,
                to_submit,
                min_complete,
                flags,
                arg,
                size,
            )
        };
        if result < 0 {
            Err(io::Error::last_os_error())
        } else {
            Ok(result as u32)
        }
    }
}
