//! System calls of the laboratory: clocks, socket buffers, batches of datagrams in memory of their own.

use std::io;
use std::mem::size_of;
use std::net::SocketAddr;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::thread::JoinHandleExt;
use std::ptr::NonNull;
use std::thread::JoinHandle;
use std::time::Duration;

use super::socket::Datagrams;
use super::syscall;

/// clock_gettime(2) of CLOCK_MONOTONIC, in nanoseconds; comparable between processes.
pub(crate) fn monotonic_ns() -> u64 {
    clock(libc::CLOCK_MONOTONIC).as_nanos() as u64
}

/// How far CLOCK_REALTIME is ahead of CLOCK_MONOTONIC now, in nanoseconds.
pub(crate) fn realtime_ahead_ns() -> i64 {
    clock(libc::CLOCK_REALTIME).as_nanos() as i64 - clock(libc::CLOCK_MONOTONIC).as_nanos() as i64
}

/// Has the kernel kill this process when the thread that started it ends. prctl(2),
/// PR_SET_PDEATHSIG.
pub(crate) fn kill_with_parent() -> io::Result<()> {
    // SAFETY: the call takes a number and touches no memory.
    unsafe { syscall!(prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL as libc::c_ulong)) }.map(drop)
}

/// CPU time that the calling thread has used.
pub(crate) fn thread_cpu_time() -> Duration {
    clock(libc::CLOCK_THREAD_CPUTIME_ID)
}

/// CPU time that another thread of the process has used; ESRCH or EINVAL once it has ended.
pub(crate) fn cpu_time_of<T>(thread: &JoinHandle<T>) -> io::Result<Duration> {
    let mut id = 0;
    // SAFETY: a thread that is not joined yet has a valid handle, and `id` is writable for the call.
    let refused = unsafe { libc::pthread_getcpuclockid(thread.as_pthread_t(), &mut id) };
    if refused != 0 {
        return Err(io::Error::from_raw_os_error(refused));
    }
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `time` is writable for the call.
    unsafe { syscall!(clock_gettime(id, &mut time)) }?;
    Ok(Duration::new(time.tv_sec as u64, time.tv_nsec as u32))
}

/// CPU time that all threads of the process have used.
pub(crate) fn process_cpu_time() -> Duration {
    clock(libc::CLOCK_PROCESS_CPUTIME_ID)
}

/// Ticks per second in `/proc` (USER_HZ).
pub(crate) fn clock_ticks() -> u64 {
    // SAFETY: no memory is passed.
    u64::try_from(unsafe { libc::sysconf(libc::_SC_CLK_TCK) }).unwrap_or(100)
}

fn clock(id: libc::clockid_t) -> Duration {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `time` is writable for the call. It cannot fail: each of these clocks exists on every kernel we know.
    unsafe { libc::clock_gettime(id, &mut time) };
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

/// Sets a socket's receive buffer: by SO_RCVBUFFORCE, which the host's limit does not bind, or else as much of it as SO_RCVBUF gives.
pub(crate) fn set_receive_buffer(fd: BorrowedFd<'_>, bytes: libc::c_int) -> io::Result<()> {
    let set = |option| {
        let (value, size) = (
            std::ptr::from_ref(&bytes).cast(),
            size_of::<libc::c_int>() as libc::socklen_t,
        );
        // SAFETY: both options read one int, which outlives the call.
        unsafe { syscall!(setsockopt(fd.as_raw_fd(), libc::SOL_SOCKET, option, value, size)) }.map(drop)
    };
    set(libc::SO_RCVBUFFORCE).or_else(|_| set(libc::SO_RCVBUF))
}

/// Takes what went wrong with a socket since the last look (SO_ERROR); it is as good as before then.
pub(crate) fn take_socket_error(fd: BorrowedFd<'_>) -> io::Result<()> {
    let mut errno: libc::c_int = 0;
    let mut size = size_of::<libc::c_int>() as libc::socklen_t;
    let at = (&raw mut errno).cast();
    // SAFETY: `errno` is writable for `size` bytes.
    unsafe {
        syscall!(getsockopt(
            fd.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_ERROR,
            at,
            &mut size
        ))
    }?;
    match errno {
        0 => Ok(()),
        errno => Err(io::Error::from_raw_os_error(errno)),
    }
}

/// Packets that a socket dropped because its buffer was full (SO_MEMINFO).
pub(crate) fn socket_drops(fd: BorrowedFd<'_>) -> io::Result<u32> {
    const SK_MEMINFO_DROPS: usize = 8; // linux/sock_diag.h
    const SK_MEMINFO_VARS: usize = 9;
    let mut values = [0u32; SK_MEMINFO_VARS];
    let mut size = size_of::<[u32; SK_MEMINFO_VARS]>() as libc::socklen_t;
    // SAFETY: `values` is writable for `size` bytes.
    unsafe {
        syscall!(getsockopt(
            fd.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_MEMINFO,
            values.as_mut_ptr().cast(),
            &mut size
        ))
    }?;
    Ok(values[SK_MEMINFO_DROPS])
}

/// The arrays of sendmmsg(2) for datagrams that lie one behind the other.
pub(crate) struct Row {
    datagrams: Datagrams,
}

// SAFETY: the addresses inside `datagrams` are used during `send` only, which sets those that it uses anew.
unsafe impl Send for Row {}

impl Row {
    pub(crate) fn new(capacity: usize) -> Self {
        Self {
            datagrams: Datagrams::new(capacity),
        }
    }

    /// Sends the whole datagrams of `size` bytes in `bytes`, at most the capacity, by a connected socket; never blocks. Returns how many were
    /// taken; the error is the first one's.
    pub(crate) fn send(&mut self, fd: BorrowedFd<'_>, bytes: &[u8], size: usize) -> io::Result<usize> {
        let mut count = 0;
        for datagram in bytes.chunks_exact(size).take(self.datagrams.capacity()) {
            // The kernel only reads it.
            self.datagrams.set(count, NonNull::from(datagram).cast(), size, None);
            count += 1;
        }
        // SAFETY: the entries 0..count point into `bytes`, which is borrowed for the call.
        unsafe { self.datagrams.send(fd.as_raw_fd(), 0, count) }
    }
}

/// A batch of datagrams with memory of its own, allocated once.
pub(crate) struct DatagramBatch {
    datagrams: Datagrams,
    memory: Box<[u8]>,
    slot: usize,
}

// SAFETY: the addresses inside `datagrams` point to boxed memory of this value only; both calls set them anew or leave them as they are.
unsafe impl Send for DatagramBatch {}

impl DatagramBatch {
    /// Room for `capacity` datagrams of at most `slot` bytes.
    pub(crate) fn new(capacity: usize, slot: usize) -> Self {
        Self {
            datagrams: Datagrams::new(capacity),
            memory: vec![0; capacity * slot].into(),
            slot,
        }
    }

    pub(crate) fn capacity(&self) -> usize {
        self.datagrams.capacity()
    }

    /// Sends `count` datagrams of `len` bytes, each filled and addressed by `fill(index, bytes)`. Waits for room, `bound` at most; returns how many went.
    pub(crate) fn send(
        &mut self,
        fd: BorrowedFd<'_>,
        count: usize,
        len: usize,
        bound: Duration,
        mut fill: impl FnMut(usize, &mut [u8]) -> SocketAddr,
    ) -> io::Result<usize> {
        let count = count.min(self.capacity());
        for (index, slot) in self.memory.chunks_exact_mut(self.slot).take(count).enumerate() {
            let bytes = &mut slot[..len];
            let target = fill(index, bytes);
            self.datagrams
                .set(index, NonNull::from(bytes).cast(), len, Some(target));
        }
        let mut sent = 0;
        while sent < count {
            // SAFETY: the entries point into `memory`, which nobody else touches meanwhile.
            match unsafe { self.datagrams.send(fd.as_raw_fd(), sent, count) } {
                Ok(more) => sent += more,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    let mut wait = [libc::pollfd {
                        fd: fd.as_raw_fd(),
                        events: libc::POLLOUT,
                        revents: 0,
                    }];
                    if super::fd::poll(&mut wait, Some(bound))? == 0 {
                        break;
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(sent)
    }

    /// Receives what is there and shows each datagram with whether it was cut; never waits.
    pub(crate) fn receive(&mut self, fd: BorrowedFd<'_>, mut show: impl FnMut(&[u8], bool)) -> io::Result<usize> {
        for (index, slot) in self.memory.chunks_exact_mut(self.slot).enumerate() {
            self.datagrams
                .set(index, NonNull::from(&mut *slot).cast(), slot.len(), None);
        }
        // SAFETY: the entries point into `memory`, which nobody else touches meanwhile.
        let count = match unsafe { self.datagrams.receive(fd.as_raw_fd(), self.capacity()) } {
            Ok(count) => count,
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => 0,
            Err(error) => return Err(error),
        };
        for (index, slot) in self.memory.chunks_exact(self.slot).take(count).enumerate() {
            let arrived = self.datagrams.arrived(index);
            show(&slot[..arrived.len.min(self.slot)], arrived.truncated);
        }
        Ok(count)
    }
}
