//! What the kernel says of this process: descriptors, memory, threads, CPU time.
//!
//! For checks that a thing leaves nothing behind. All of it is per process: let nothing else run meanwhile.

use std::fs;
use std::io;
use std::time::Duration;

use crate::sys::lab;

/// Memory of this process in bytes, from `/proc/self/status`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Memory {
    /// In memory now (VmRSS).
    pub resident: u64,
    /// Pinned by the kernel for I/O, such as buffers registered with io_uring (VmPin). Goes down asynchronously after a ring is closed.
    pub pinned: u64,
    /// Locked by mlock(2) (VmLck).
    pub locked: u64,
}

/// Open file descriptors.
pub fn open_descriptors() -> io::Result<usize> {
    // One of them is the one that reads the directory.
    Ok(fs::read_dir("/proc/self/fd")?.count() - 1)
}

/// Resident, pinned and locked memory.
pub fn memory() -> io::Result<Memory> {
    let status = fs::read_to_string("/proc/self/status")?;
    let bytes = |field: &str| {
        let line = status
            .lines()
            .find_map(|line| line.strip_prefix(field)?.strip_prefix(':'));
        let kib = line.and_then(|rest| rest.trim().strip_suffix("kB")?.trim().parse::<u64>().ok());
        kib.map(|kib| kib * 1024).ok_or_else(|| {
            io::Error::new(
                io::ErrorKind::InvalidData,
                format!("/proc/self/status has no {field} in kB"),
            )
        })
    };
    Ok(Memory {
        resident: bytes("VmRSS")?,
        pinned: bytes("VmPin")?,
        locked: bytes("VmLck")?,
    })
}

/// The names of this process's threads. io_uring's worker threads are among them, as `iou-wrk-…`.
pub fn threads() -> io::Result<Vec<String>> {
    let mut names = Vec::new();
    for task in fs::read_dir("/proc/self/task")? {
        match fs::read_to_string(task?.path().join("comm")) {
            Ok(name) => names.push(name.trim_end().to_owned()),
            // It ended since the directory was read: ENOENT or, while it was opened, ESRCH.
            Err(error) if error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(libc::ESRCH) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(names)
}

/// How many io_uring worker threads the process has: work that the kernel could not do inline.
pub fn io_workers() -> io::Result<usize> {
    Ok(threads()?.iter().filter(|name| name.starts_with("iou-wrk")).count())
}

/// CPU time of the calling thread, user and system (CLOCK_THREAD_CPUTIME_ID).
pub fn thread_cpu_time() -> Duration {
    lab::thread_cpu_time()
}

/// CPU time of all threads of the process, user and system (CLOCK_PROCESS_CPUTIME_ID).
pub fn process_cpu_time() -> Duration {
    lab::process_cpu_time()
}
