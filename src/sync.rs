//! The atomics of the protocols that this crate makes by hand: those of std, or, under
//! `--cfg loom`, those of loom, which tries every order of events that the memory model allows.
//!
//! `tests/loom/run` runs the models. They stand beside the code: `worker::waker::models` and
//! `buf::arena::models`.

#[cfg(not(loom))]
pub(crate) use std::sync::atomic::{AtomicBool, AtomicU32, fence};

#[cfg(loom)]
pub(crate) use loom::sync::atomic::{AtomicBool, AtomicU32, fence};

/// What an eventfd is to loom, which does not see the kernel's: a counter, and a sleep until it is
/// not zero. A sleeper that nothing rings for is a deadlock, which fails the model.
#[cfg(loom)]
#[derive(Debug)]
pub(crate) struct Bell {
    count: loom::sync::Mutex<u64>,
    rung: loom::sync::Condvar,
}

#[cfg(loom)]
impl Bell {
    pub(crate) fn new() -> Self {
        Self {
            count: loom::sync::Mutex::new(0),
            rung: loom::sync::Condvar::new(),
        }
    }

    pub(crate) fn ring(&self) {
        *self.count.lock().expect("no thread panics with it") += 1;
        self.rung.notify_one();
    }

    pub(crate) fn silence(&self) {
        *self.count.lock().expect("no thread panics with it") = 0;
    }

    pub(crate) fn wait(&self) {
        let mut count = self.count.lock().expect("no thread panics with it");
        while *count == 0 {
            count = self.rung.wait(count).expect("no thread panics with it");
        }
    }
}
