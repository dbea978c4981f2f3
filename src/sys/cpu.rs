//! Placement of threads: sched_setaffinity(2), sched_getaffinity(2).

#[cfg(any(feature = "engine", feature = "lab"))]
use std::{io, mem};

/// Keeps the calling thread on one CPU.
#[cfg(any(feature = "engine", feature = "lab"))]
pub(crate) fn pin_thread(cpu: usize) -> io::Result<()> {
    if cpu >= libc::CPU_SETSIZE as usize {
        return Err(io::Error::from_raw_os_error(libc::EINVAL));
    }
    // SAFETY: cpu_set_t is an array of integers, for which all zeroes is a value: the empty set.
    let mut set: libc::cpu_set_t = unsafe { mem::zeroed() };
    // SAFETY: the index is below CPU_SETSIZE, checked above, so the bit lies inside the set.
    unsafe { libc::CPU_SET(cpu, &mut set) };
    // SAFETY: the kernel reads as many bytes as the set has; 0 names the calling thread.
    unsafe { super::syscall!(sched_setaffinity(0, mem::size_of::<libc::cpu_set_t>(), &set)) }.map(drop)
}

/// The CPUs that the calling thread may run on, in rising order; at least one.
#[cfg(any(feature = "engine", feature = "lab"))]
pub(crate) fn allowed() -> io::Result<Vec<usize>> {
    // SAFETY: cpu_set_t is an array of integers, for which all zeroes is a value: the empty set.
    let mut set: libc::cpu_set_t = unsafe { mem::zeroed() };
    // SAFETY: the kernel writes at most as many bytes as the set has; 0 names the calling thread.
    unsafe { super::syscall!(sched_getaffinity(0, mem::size_of::<libc::cpu_set_t>(), &mut set)) }?;
    // SAFETY: the index is below CPU_SETSIZE, so the bit lies inside the set.
    Ok((0..libc::CPU_SETSIZE as usize)
        .filter(|&cpu| unsafe { libc::CPU_ISSET(cpu, &set) })
        .collect())
}

/// Keeps the calling thread's timers from being late for the sake of saving power; gives the old setting back at the end. prctl(2).
#[derive(Debug)]
pub(crate) struct TimerSlack {
    before: libc::c_ulong,
}

impl TimerSlack {
    /// One nanosecond: the least there is.
    pub(crate) fn least() -> Self {
        // SAFETY: takes and gives no pointer.
        let before = unsafe { libc::prctl(libc::PR_GET_TIMERSLACK) };
        set_timer_slack(1);
        // Negative: not supported; 0 sets the thread's default back.
        Self {
            before: libc::c_ulong::try_from(before).unwrap_or(0),
        }
    }
}

impl Drop for TimerSlack {
    fn drop(&mut self) {
        set_timer_slack(self.before);
    }
}

fn set_timer_slack(nanoseconds: libc::c_ulong) {
    // SAFETY: takes and gives no pointer. Without it, sleeps are a little longer.
    let _ = unsafe { libc::prctl(libc::PR_SET_TIMERSLACK, nanoseconds) };
}

#[cfg(all(test, any(feature = "engine", feature = "lab")))]
mod tests {
    use super::*;

    #[test]
    fn a_pinned_thread_stays_where_it_was_put() {
        let run = || {
            let last = *allowed()?.last().expect("this thread runs somewhere");
            pin_thread(last)?;
            assert_eq!(allowed()?, [last]);
            assert!(pin_thread(libc::CPU_SETSIZE as usize).is_err());
            io::Result::Ok(())
        };
        std::thread::spawn(run).join().expect("no panic").expect("no error");
    }
}
