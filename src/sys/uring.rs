//! The two io_uring calls that the `io-uring` crate cannot make for a ring it does not lend out: entering through a registered ring
//! descriptor, and registering it. `include/uapi/linux/io_uring.h`.
//!
//! In tests a fake kernel may stand in for entering and cancelling: see [`fake`].

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::time::Duration;

use io_uring::Submitter;
use io_uring::types::{CancelBuilder, Timespec};

const IORING_REGISTER_RING_FDS: libc::c_uint = 20;
const IORING_UNREGISTER_RING_FDS: libc::c_uint = 21;
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
#[derive(Debug)]
pub(crate) struct RingHandle {
    fd: i32,
    flags: u32,
}

impl RingHandle {
    /// The ring by its registered index where the kernel (5.18 and later) gives one, which saves
    /// the look-up per call; else by its descriptor. The index belongs to the calling thread, which
    /// has 16 of them, and stays taken until [`unregister`](Self::unregister). Returns what the
    /// kernel answered, too.
    pub(crate) fn register(ring: BorrowedFd<'_>) -> (Self, io::Result<()>) {
        let mut update = io_uring_rsrc_update {
            offset: u32::MAX,
            resv: 0,
            data: ring.as_raw_fd() as u64,
        };
        // SAFETY: IORING_REGISTER_RING_FDS reads and writes one io_uring_rsrc_update, which
        // outlives the call.
        let result = unsafe { update_ring_fds(ring, IORING_REGISTER_RING_FDS, &raw mut update, 1) };
        let plain = Self {
            fd: ring.as_raw_fd(),
            flags: 0,
        };
        match result {
            Ok(1) => (
                Self {
                    fd: update.offset as i32,
                    flags: IORING_ENTER_REGISTERED_RING,
                },
                Ok(()),
            ),
            Ok(_) => (plain, Ok(())),
            Err(error) => (plain, Err(error)),
        }
    }

    /// Gives the index back. Called on the thread that registered it, and nothing is entered later.
    pub(crate) fn unregister(&self, ring: BorrowedFd<'_>) {
        if self.flags & IORING_ENTER_REGISTERED_RING != 0 {
            let mut update = io_uring_rsrc_update {
                offset: self.fd as u32,
                resv: 0,
                data: 0,
            };
            // SAFETY: IORING_UNREGISTER_RING_FDS reads one io_uring_rsrc_update, which outlives the
            // call.
            let _ = unsafe { update_ring_fds(ring, IORING_UNREGISTER_RING_FDS, &raw mut update, 1) };
        }
    }

    /// Asks to give no index back, which the kernel answers with EINVAL, if it may be asked.
    pub(crate) fn try_unregister(ring: BorrowedFd<'_>) -> io::Result<()> {
        // SAFETY: with a count of zero the kernel reads nothing.
        unsafe { update_ring_fds(ring, IORING_UNREGISTER_RING_FDS, std::ptr::null_mut(), 0) }.map(drop)
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
        #[cfg(all(test, feature = "lab"))]
        if let Some(result) = fake::enter(to_submit, min_complete, events, timeout) {
            return result;
        }
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

    /// Cancels every request of the ring, and waits for that at most as long as `timeout` says.
    pub(crate) fn sync_cancel(&self, submitter: &Submitter<'_>, timeout: Timespec) -> io::Result<()> {
        #[cfg(all(test, feature = "lab"))]
        if let Some(result) = fake::cancel() {
            return result;
        }
        submitter.register_sync_cancel(Some(timeout), CancelBuilder::any())
    }
}

/// # Safety
/// `update` points to `count` io_uring_rsrc_update that live through the call.
unsafe fn update_ring_fds(
    ring: BorrowedFd<'_>,
    operation: libc::c_uint,
    update: *mut io_uring_rsrc_update,
    count: libc::c_uint,
) -> io::Result<i64> {
    let fd = ring.as_raw_fd();
    // SAFETY: the caller vouches for the memory.
    match unsafe { libc::syscall(libc::SYS_io_uring_register, fd, operation, update, count) } {
        result @ 0.. => Ok(result),
        _ => Err(io::Error::last_os_error()),
    }
}

/// A kernel of a test's own, on one thread, for what the real one cannot be made to do: it takes
/// the place of the two calls by which a worker's ring makes progress.
#[cfg(all(test, feature = "lab"))]
pub(crate) mod fake {
    use std::cell::RefCell;
    use std::io;
    use std::time::Duration;

    pub(crate) trait Kernel {
        fn enter(
            &mut self,
            to_submit: u32,
            min_complete: u32,
            events: bool,
            timeout: Option<Duration>,
        ) -> io::Result<u32>;
        fn cancel(&mut self) -> io::Result<()>;
    }

    thread_local! {
        static KERNEL: RefCell<Option<Box<dyn Kernel>>> = const { RefCell::new(None) };
    }

    /// From now on `kernel` stands in on this thread; `None` brings the real one back.
    pub(crate) fn install(kernel: Option<Box<dyn Kernel>>) {
        KERNEL.with(|installed| *installed.borrow_mut() = kernel);
    }

    pub(super) fn enter(
        to_submit: u32,
        min_complete: u32,
        events: bool,
        timeout: Option<Duration>,
    ) -> Option<io::Result<u32>> {
        KERNEL.with(|kernel| {
            let mut kernel = kernel.borrow_mut();
            Some(kernel.as_mut()?.enter(to_submit, min_complete, events, timeout))
        })
    }

    pub(super) fn cancel() -> Option<io::Result<()>> {
        KERNEL.with(|kernel| Some(kernel.borrow_mut().as_mut()?.cancel()))
    }
}
