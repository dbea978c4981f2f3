//! Network namespaces: setns(2), namespaces(7).
//!
//! A thread that has changed its namespace is never given back to anybody: the work is done on a thread of its own that ends with it.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;

use super::{FailedCall, syscall};

/// Which namespace it is, as the inode of its file in nsfs says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct NetnsId {
    device: u64,
    inode: u64,
}

impl NetnsId {
    /// The calling thread's. Fails where /proc is not mounted.
    pub(crate) fn current() -> io::Result<Self> {
        Self::of(&File::open("/proc/thread-self/ns/net")?)
    }

    pub(crate) fn of(file: &File) -> io::Result<Self> {
        let metadata = file.metadata()?;
        Ok(Self {
            device: metadata.dev(),
            inode: metadata.ino(),
        })
    }
}

/// Opens a namespace by its file, such as `/run/netns/blue` or `/proc/1234/ns/net`.
pub(crate) fn open(path: &Path) -> io::Result<File> {
    // A FIFO would wait for its other end: a file that is no namespace is found out by setns(2).
    File::options().read(true).custom_flags(libc::O_NONBLOCK).open(path)
}

/// What a thread is started by, in errors.
pub(crate) const THREAD: &str = "clone";

/// Runs `work` on a new thread inside `netns`, and waits for it. The caller's thread stays where it is.
///
/// Errors are those of starting the thread and of setns(2): EPERM without CAP_SYS_ADMIN both here and there, EINVAL where the
/// descriptor is no network namespace.
pub(crate) fn run_in<T: Send>(netns: BorrowedFd<'_>, work: impl FnOnce() -> T + Send) -> Result<T, FailedCall> {
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new()
            .name("netns".to_owned())
            .spawn_scoped(scope, move || {
                // SAFETY: no pointers; it changes the namespace of this new thread only.
                unsafe { syscall!(setns(netns.as_raw_fd(), libc::CLONE_NEWNET)) }
                    .map_err(FailedCall::of("setns(CLONE_NEWNET)"))?;
                Ok(work())
            })
            .map_err(FailedCall::of(THREAD))?;
        match thread.join() {
            Ok(result) => result,
            Err(panic) => std::panic::resume_unwind(panic),
        }
    })
}
