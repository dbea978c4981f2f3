//! Placement of threads: sched_setaffinity(2), sched_getaffinity(2).

#[cfg(any(feature = "engine", feature = "lab"))]
use std::io;

/// One word of a CPU mask, as the kernel counts them.
#[cfg(any(feature = "engine", feature = "lab"))]
type Word = libc::c_ulong;

/// The masks that are tried: `cpu_set_t` is the first, and no kernel has as many CPUs as the last
/// holds.
#[cfg(any(feature = "engine", feature = "lab"))]
const MASK_BYTES: std::ops::RangeInclusive<u32> = 7..=16;

/// Keeps the calling thread on one CPU.
#[cfg(any(feature = "engine", feature = "lab"))]
pub(crate) fn pin_thread(cpu: usize) -> io::Result<()> {
    let bits = Word::BITS as usize;
    if cpu >= 8 << MASK_BYTES.end() {
        return Err(io::Error::from_raw_os_error(libc::EINVAL));
    }
    let mut mask = vec![0 as Word; (cpu / bits + 1).max((1 << MASK_BYTES.start()) / size_of::<Word>())];
    mask[cpu / bits] = 1 << (cpu % bits);
    // SAFETY: the kernel reads as many bytes as the mask has; 0 names the calling thread.
    unsafe { super::syscall!(sched_setaffinity(0, size_of_val(&mask[..]), mask.as_ptr().cast())) }.map(drop)
}

/// The CPUs that the calling thread may run on, in rising order; at least one.
///
/// The kernel refuses a mask that is shorter than all possible CPUs (EINVAL), so it is asked with
/// longer ones.
#[cfg(any(feature = "engine", feature = "lab"))]
pub(crate) fn allowed() -> io::Result<Vec<usize>> {
    let mut refusal = io::Error::from_raw_os_error(libc::EINVAL);
    for power in MASK_BYTES {
        let mut mask = vec![0 as Word; (1 << power) / size_of::<Word>()];
        // SAFETY: the kernel writes at most as many bytes as the mask has; 0 names the calling
        // thread.
        match unsafe { super::syscall!(sched_getaffinity(0, size_of_val(&mask[..]), mask.as_mut_ptr().cast())) } {
            Ok(_) => {
                let bits = Word::BITS as usize;
                return Ok((0..mask.len() * bits)
                    .filter(|cpu| mask[cpu / bits] >> (cpu % bits) & 1 == 1)
                    .collect());
            }
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => refusal = error,
            Err(error) => return Err(error),
        }
    }
    Err(refusal)
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
            // Beyond what cpu_set_t holds, and beyond what any kernel has.
            for cpu in [libc::CPU_SETSIZE as usize, 100_000, 8 << 16, usize::MAX] {
                assert_eq!(pin_thread(cpu).unwrap_err().raw_os_error(), Some(libc::EINVAL));
            }
            io::Result::Ok(())
        };
        std::thread::spawn(run).join().expect("no panic").expect("no error");
    }
}
