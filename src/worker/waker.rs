//! Waking a worker from another thread.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use crate::sync::{AtomicBool, fence};
use crate::sys::fd;
use crate::sys::forked::Origin;

/// Wakes a worker, or tells it to stop, from any thread.
///
/// Clones wake the same worker. Waking is one eventfd write, and none while an earlier wake-up has not been taken yet. A wake-up is never
/// lost: one that comes while the worker is busy ends its next wait at once.
#[derive(Clone, Debug)]
pub struct Waker(WakeHandle);

impl Waker {
    pub(crate) fn new(handle: WakeHandle) -> Self {
        Self(handle)
    }

    /// Ends the worker's current or next wait; [`Wake::woken`](crate::Wake::woken) tells it.
    pub fn wake(&self) {
        if !self.0.0.woken.swap(true, Ordering::AcqRel) {
            self.0.ring();
        }
    }

    /// Asks the worker to stop: ends its current and every later wait; [`Wake::stopped`](crate::Wake::stopped) tells it. Cannot be undone.
    pub fn stop(&self) {
        // Once: the flag stays, so every later wait ends by itself.
        if !self.0.0.stopped.swap(true, Ordering::AcqRel) {
            self.0.ring();
        }
    }
}

/// The doorbell of a worker.
#[derive(Clone, Debug)]
pub(crate) struct WakeHandle(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    eventfd: OwnedFd,
    #[cfg(loom)]
    bell: crate::sync::Bell,
    origin: Origin,
    woken: AtomicBool,
    stopped: AtomicBool,
    /// The worker sleeps, or is about to: who hands something over has to ring.
    asleep: AtomicBool,
}

impl WakeHandle {
    pub(crate) fn new() -> io::Result<Self> {
        let eventfd = fd::eventfd()?;
        Ok(Self(Arc::new(Inner {
            eventfd,
            #[cfg(loom)]
            bell: crate::sync::Bell::new(),
            origin: Origin::here(),
            woken: AtomicBool::new(false),
            stopped: AtomicBool::new(false),
            asleep: AtomicBool::new(false),
        })))
    }

    /// Ends the worker's sleep without telling it why. Nothing in a forked child, which shares the
    /// doorbell with its parent's worker.
    pub(crate) fn ring(&self) {
        if self.0.origin.is_here() {
            fd::eventfd_ring(self.0.eventfd.as_fd());
            #[cfg(loom)]
            self.0.bell.ring();
        }
    }

    /// Ends the worker's sleep, if it sleeps, after something was put where it looks before it falls asleep.
    pub(super) fn knock(&self) {
        // Pairs with the fence in `fall_asleep`: either the worker sees what was put there, or this thread sees that it sleeps.
        fence(Ordering::SeqCst);
        // Only the thread that rings stores: the flag of a later sleep is not touched.
        if self.0.asleep.load(Ordering::Relaxed)
            && self
                .0
                .asleep
                .compare_exchange(true, false, Ordering::AcqRel, Ordering::Relaxed)
                .is_ok()
        {
            self.ring();
        }
    }

    /// From now on who knocks rings. Look once more before sleeping.
    pub(super) fn fall_asleep(&self) {
        self.0.asleep.store(true, Ordering::Relaxed);
        fence(Ordering::SeqCst);
    }

    pub(super) fn awake(&self) {
        self.0.asleep.store(false, Ordering::Relaxed);
    }

    /// Silences the doorbell. Before the flags are read, so that no ring is lost between the two.
    pub(crate) fn silence(&self) {
        fd::eventfd_reset(self.0.eventfd.as_fd());
        #[cfg(loom)]
        self.0.bell.silence();
    }

    /// Sleeps until the doorbell rings, as the models do instead of poll(2).
    #[cfg(loom)]
    pub(crate) fn wait_for_ring(&self) {
        self.0.bell.wait();
    }

    /// Whether somebody asked for a wake-up since the last call.
    pub(super) fn take_woken(&self) -> bool {
        self.0.woken.load(Ordering::Relaxed) && self.0.woken.swap(false, Ordering::AcqRel)
    }

    /// Whether a wake-up or a stop is due.
    pub(super) fn is_due(&self) -> bool {
        self.0.woken.load(Ordering::Acquire) || self.stopped()
    }

    pub(super) fn stopped(&self) -> bool {
        self.0.stopped.load(Ordering::Acquire)
    }
}

impl AsFd for WakeHandle {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.eventfd.as_fd()
    }
}

/// Every order of events between a worker and those that wake it (`tests/loom/run`).
#[cfg(all(test, loom))]
mod models {
    use loom::sync::atomic::{AtomicU32, Ordering};
    use loom::thread;

    use super::*;

    #[test]
    fn what_is_handed_over_is_found_before_a_sleep_or_ends_it() {
        loom::model(|| {
            let waker = WakeHandle::new().expect("eventfd");
            // Stand for the ends of two hand-offs, which other threads store and the worker loads.
            let sent = Arc::new([AtomicU32::new(0), AtomicU32::new(0)]);
            let threads = [0, 1].map(|index: usize| {
                let (waker, sent) = (waker.clone(), Arc::clone(&sent));
                thread::spawn(move || {
                    sent[index].store(1, Ordering::Release);
                    waker.knock();
                })
            });
            let look = || sent.iter().map(|sent| sent.load(Ordering::Acquire)).sum::<u32>();
            let mut found = look();
            // As `Context::doze`: a sleep that nothing ends is a deadlock.
            while found < 2 {
                waker.fall_asleep();
                let now = look();
                if now == found {
                    waker.wait_for_ring();
                    waker.silence();
                }
                waker.awake();
                found = look();
            }
            for thread in threads {
                thread.join().expect("no panic");
            }
        });
    }

    #[test]
    fn one_that_hands_over_twice_is_heard_twice() {
        loom::model(|| {
            let waker = WakeHandle::new().expect("eventfd");
            let sent = Arc::new(AtomicU32::new(0));
            let thread = {
                let (waker, sent) = (waker.clone(), Arc::clone(&sent));
                thread::spawn(move || {
                    for count in [1, 2] {
                        sent.store(count, Ordering::Release);
                        waker.knock();
                    }
                })
            };
            let mut found = 0;
            while found < 2 {
                waker.fall_asleep();
                if sent.load(Ordering::Acquire) == found {
                    waker.wait_for_ring();
                    waker.silence();
                }
                waker.awake();
                found = sent.load(Ordering::Acquire);
            }
            thread.join().expect("no panic");
        });
    }

    #[test]
    fn no_wake_up_and_no_stop_is_lost() {
        loom::model(|| {
            let handle = WakeHandle::new().expect("eventfd");
            // What each thread has to say before it wakes.
            let said = Arc::new([AtomicU32::new(0), AtomicU32::new(0)]);
            let threads = [0, 1].map(|index: usize| {
                let (waker, said) = (Waker::new(handle.clone()), Arc::clone(&said));
                thread::spawn(move || {
                    said[index].store(1, Ordering::Relaxed);
                    waker.wake();
                    if index == 1 {
                        waker.stop();
                    }
                })
            });
            let (mut heard, mut stopped) = (0, false);
            while heard < 2 || !stopped {
                handle.wait_for_ring();
                handle.silence();
                if handle.take_woken() {
                    heard = said.iter().map(|said| said.load(Ordering::Relaxed)).sum();
                }
                stopped = handle.stopped();
            }
            for thread in threads {
                thread.join().expect("no panic");
            }
        });
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use std::fs::File;
    use std::io::Read;

    #[test]
    fn stopping_again_rings_no_second_time() {
        let handle = WakeHandle::new().expect("eventfd");
        (0..5).for_each(|_| Waker::new(handle.clone()).stop());
        let mut rings = [0; 8];
        let mut doorbell = File::from(handle.as_fd().try_clone_to_owned().expect("a descriptor"));
        doorbell.read_exact(&mut rings).expect("it rang");
        assert_eq!(u64::from_ne_bytes(rings), 1);
    }
}
