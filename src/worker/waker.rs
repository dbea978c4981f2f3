//! Waking a worker from another thread.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering, fence};

use crate::sys::fd;

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
        self.0.0.stopped.store(true, Ordering::Release);
        self.0.ring();
    }
}

/// The doorbell of a worker.
#[derive(Clone, Debug)]
pub(crate) struct WakeHandle(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    eventfd: OwnedFd,
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
            woken: AtomicBool::new(false),
            stopped: AtomicBool::new(false),
            asleep: AtomicBool::new(false),
        })))
    }

    /// Ends the worker's sleep without telling it why.
    pub(crate) fn ring(&self) {
        fd::eventfd_ring(self.0.eventfd.as_fd());
    }

    /// Ends the worker's sleep, if it sleeps, after something was put where it looks before it falls asleep.
    pub(super) fn knock(&self) {
        // Pairs with the fence in `fall_asleep`: either the worker sees what was put there, or this thread sees that it sleeps.
        fence(Ordering::SeqCst);
        if self.0.asleep.load(Ordering::Relaxed) && self.0.asleep.swap(false, Ordering::AcqRel) {
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
    pub(super) fn silence(&self) {
        fd::eventfd_reset(self.0.eventfd.as_fd());
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
