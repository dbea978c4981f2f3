//! What the kernel says of this process: descriptors, memory, threads, CPU time; and of the whole machine's CPU time.
//!
//! For checks that a thing leaves nothing behind. All but [`MachineCpu`] is per process: let nothing else run meanwhile.

use std::fs;
use std::io;
use std::thread::JoinHandle;
use std::time::Duration;

use crate::sys::{cpu, lab};

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

/// Ends this process by SIGKILL when its parent ends, however that comes about: a parent that is
/// killed cannot clean up.
///
/// `parent` is the process ID that the parent passed on: an ending before this call would go
/// unnoticed otherwise.
///
/// # Errors
/// The parent is another process: the one that is meant has ended.
pub fn die_with_parent(parent: u32) -> io::Result<()> {
    lab::kill_with_parent()?;
    // After the call: from here on the kernel reports the end, before it the parent's ID has
    // changed.
    if std::os::unix::process::parent_id() == parent {
        return Ok(());
    }
    Err(io::Error::other(format!(
        "process {parent} did not start this one, or has ended"
    )))
}

/// CPU time of the whole machine since it was started, all CPUs together, from the first line of `/proc/stat`.
///
/// What a process causes is not all charged to it: softirqs run in whatever thread they interrupt. So what a load costs in all is what the
/// machine did between two moments, less what it does without the load over as long a time:
///
/// ```no_run
/// use std::{thread, time::Duration};
/// use tun_driver::lab::process::MachineCpu;
///
/// # fn main() -> std::io::Result<()> {
/// let busy = |work: &dyn Fn()| -> std::io::Result<Duration> {
///     let before = MachineCpu::now()?;
///     work();
///     Ok(MachineCpu::now()?.since(&before).busy())
/// };
/// let idle = busy(&|| thread::sleep(Duration::from_secs(5)))?;
/// let load = busy(&|| thread::sleep(Duration::from_secs(5)))?; // the load runs meanwhile
/// println!("{:?} above idle", load.saturating_sub(idle));
/// # Ok(())
/// # }
/// ```
///
/// # Resolution
///
/// The kernel prints ticks of USER_HZ, 10 ms on every architecture we know; each field is one sum over all CPUs, cut to a tick. What lies
/// behind the fields differs:
///
/// - `idle` and `io_wait`: on a kernel with NO_HZ (all distributions) measured by the clock at each entry and exit of the idle loop, so
///   exact but for the printing. [`busy`](Self::busy) stands on them and on the elapsed time, and so does not depend on sampling: over five
///   seconds on two CPUs it is right to 0.2 % of the machine.
/// - the others: without VIRT_CPU_ACCOUNTING whoever runs when the timer interrupt comes is charged the whole tick (1 to 10 ms by
///   CONFIG_HZ): a statistical sample, and blind to what always runs between two ticks. `irq` and `softirq` too, unless the kernel has
///   IRQ_TIME_ACCOUNTING; without it much softirq work on behalf of packets appears as `system`, and hard interrupts as nothing. Use them as a
///   hint at where time goes, over seconds at least.
/// - `steal` is what the hypervisor says it gave to others. It is not idle, so it is within `busy`; look at it before you trust a figure.
///
/// `/proc/stat` is the machine's, not the container's, unless lxcfs stands in front of it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct MachineCpu {
    /// CLOCK_MONOTONIC times the number of CPUs: what there was to spend, in ns.
    pub capacity_ns: u64,
    /// CPUs that are online.
    pub cpus: u32,
    /// In programs, niced ones and guests included, in ns.
    pub user_ns: u64,
    /// In the kernel, but for interrupts, in ns.
    pub system_ns: u64,
    /// With nothing to do, in ns.
    pub idle_ns: u64,
    /// With nothing to do but a disk to wait for, in ns. Idle, too.
    pub io_wait_ns: u64,
    /// In hard interrupts, in ns.
    pub irq_ns: u64,
    /// In soft interrupts, in ns.
    pub softirq_ns: u64,
    /// Taken by the hypervisor for others, in ns.
    pub steal_ns: u64,
}

impl MachineCpu {
    /// As it stands.
    ///
    /// # Errors
    ///
    /// `/proc/stat` cannot be read, or does not read as documented in proc(5).
    pub fn now() -> io::Result<Self> {
        let text = fs::read_to_string("/proc/stat")?;
        let now = lab::monotonic_ns();
        Self::parse(&text, now, lab::clock_ticks()).ok_or_else(|| {
            io::Error::new(
                io::ErrorKind::InvalidData,
                "/proc/stat does not begin with the CPUs' times",
            )
        })
    }

    /// What passed since an earlier moment. Nothing is negative: `io_wait` may go backwards in the kernel's books.
    pub fn since(&self, earlier: &Self) -> Self {
        let less = |field: fn(&Self) -> u64| field(self).saturating_sub(field(earlier));
        Self {
            capacity_ns: less(|cpu| cpu.capacity_ns),
            cpus: self.cpus,
            user_ns: less(|cpu| cpu.user_ns),
            system_ns: less(|cpu| cpu.system_ns),
            idle_ns: less(|cpu| cpu.idle_ns),
            io_wait_ns: less(|cpu| cpu.io_wait_ns),
            irq_ns: less(|cpu| cpu.irq_ns),
            softirq_ns: less(|cpu| cpu.softirq_ns),
            steal_ns: less(|cpu| cpu.steal_ns),
        }
    }

    /// CPU time that was not idle. Of a difference ([`since`](Self::since)), with the same CPUs online at both ends.
    pub fn busy(&self) -> Duration {
        Duration::from_nanos(self.capacity_ns.saturating_sub(self.idle_ns + self.io_wait_ns))
    }

    /// CPU time that was not idle, as the sum of the other fields: sampled, see above. For comparison with [`busy`](Self::busy).
    pub fn busy_sampled(&self) -> Duration {
        Duration::from_nanos(self.user_ns + self.system_ns + self.irq_ns + self.softirq_ns + self.steal_ns)
    }

    /// `now` is the time when `text` was read, in ns.
    fn parse(text: &str, now: u64, ticks_per_second: u64) -> Option<Self> {
        let mut lines = text.lines();
        let fields: Vec<u64> = lines
            .next()?
            .strip_prefix("cpu ")?
            .split_whitespace()
            .map(|field| field.parse().ok())
            .collect::<Option<_>>()?;
        let cpus = lines.take_while(|line| line.starts_with("cpu")).count() as u32;
        // guest and guest_nice follow, and are within user and nice.
        let &[user, nice, system, idle, io_wait, irq, softirq, steal, ..] = &fields[..] else {
            return None;
        };
        let ns = |ticks: u64| ticks * (1_000_000_000 / ticks_per_second.max(1));
        Some(Self {
            capacity_ns: now * u64::from(cpus),
            cpus,
            user_ns: ns(user + nice),
            system_ns: ns(system),
            idle_ns: ns(idle),
            io_wait_ns: ns(io_wait),
            irq_ns: ns(irq),
            softirq_ns: ns(softirq),
            steal_ns: ns(steal),
        })
    }
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

/// Keeps the calling thread on one CPU.
///
/// # Errors
///
/// EINVAL where there is no such CPU, or the process may not use it.
pub fn pin_thread(cpu: usize) -> io::Result<()> {
    cpu::pin_thread(cpu)
}

/// CPU time of the calling thread, user and system (CLOCK_THREAD_CPUTIME_ID).
pub fn thread_cpu_time() -> Duration {
    lab::thread_cpu_time()
}

/// CPU time of another thread of this process, user and system.
///
/// # Errors
///
/// ESRCH or EINVAL once it has ended.
pub fn cpu_time_of<T>(thread: &JoinHandle<T>) -> io::Result<Duration> {
    lab::cpu_time_of(thread)
}

/// The CPUs that the calling thread may use, in rising order.
pub fn allowed_cpus() -> io::Result<Vec<usize>> {
    cpu::allowed()
}

/// CPU time of all threads of the process, user and system (CLOCK_PROCESS_CPUTIME_ID).
pub fn process_cpu_time() -> Duration {
    lab::process_cpu_time()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_machine_is_busy_where_it_is_not_idle() {
        let before = "cpu  100 10 50 1000 20 1 2 3 40 5\ncpu0 1 2 3\ncpu1 1 2 3\nintr 1\n";
        let after = "cpu  150 10 60 1100 19 2 5 4 50 5\ncpu0 1 2 3\ncpu1 1 2 3\nintr 1\n";
        let before = MachineCpu::parse(before, 1_000_000_000, 100).unwrap();
        let after = MachineCpu::parse(after, 1_850_000_000, 100).unwrap();
        assert_eq!(
            (before.cpus, before.user_ns, before.steal_ns),
            (2, 1_100_000_000, 30_000_000)
        );
        let spent = after.since(&before);
        // 2 CPUs for 850 ms, of which one second was idle; waiting for disks went backwards.
        assert_eq!(spent.io_wait_ns, 0);
        assert_eq!(spent.busy(), Duration::from_millis(700));
        assert_eq!(spent.busy_sampled(), Duration::from_millis(500 + 100 + 10 + 30 + 10));
        assert_eq!(MachineCpu::parse("intr 1", 0, 100), None);
        assert_eq!(MachineCpu::parse("cpu  1 2 3 4", 0, 100), None);
    }

    #[test]
    fn the_machine_s_time_goes_on() {
        let before = MachineCpu::now().unwrap();
        let start = thread_cpu_time();
        while thread_cpu_time() - start < Duration::from_millis(50) {}
        let spent = MachineCpu::now().unwrap().since(&before);
        assert!(spent.cpus >= 1 && spent.capacity_ns >= 50_000_000, "{spent:?}");
        // Each of two idle fields is cut to a tick of 10 ms at both ends.
        assert!(spent.busy() >= Duration::from_millis(30), "{spent:?}");
        assert!(before.idle_ns > 0 && before.user_ns > 0);
    }
}
