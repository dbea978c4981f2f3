//! Whether a value is still in the process that made it, or was copied into a forked child.
//!
//! A child of fork(2) has copies of a worker's and an engine's values, but neither their threads
//! nor their memory (MADV_DONTFORK), and shares their descriptors. Dropping them there must touch
//! nothing.

use std::ptr;
use std::sync::atomic::{AtomicPtr, AtomicU64, Ordering};

/// The process in which a value was made.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Origin(u64);

/// A page that the kernel fills with zeros in every child (MADV_WIPEONFORK, Linux 4.14), however it
/// was forked; pthread_atfork would miss those of clone(2). Its first word is this process's
/// number.
static PAGE: AtomicPtr<AtomicU64> = AtomicPtr::new(ptr::null_mut());
/// The last number that was given. A child counts on from its parent's, so that no number is given
/// twice along a line of descent.
static LAST: AtomicU64 = AtomicU64::new(0);

impl Origin {
    /// This process.
    pub(crate) fn here() -> Self {
        let Some(number) = page() else {
            return Self(u64::from(std::process::id()));
        };
        if number.load(Ordering::Relaxed) == 0 {
            let next = LAST.fetch_add(1, Ordering::Relaxed) + 1;
            // Another thread may have been faster.
            let _ = number.compare_exchange(0, next, Ordering::Relaxed, Ordering::Relaxed);
        }
        Self(number.load(Ordering::Relaxed))
    }

    /// Whether this is the process that made it.
    pub(crate) fn is_here(self) -> bool {
        match page() {
            Some(number) => number.load(Ordering::Relaxed) == self.0,
            None => u64::from(std::process::id()) == self.0,
        }
    }
}

/// The page; `None` where the kernel has no such pages, and the process's id has to do.
fn page() -> Option<&'static AtomicU64> {
    let mut page = PAGE.load(Ordering::Acquire);
    if page.is_null() {
        let new = map();
        match PAGE.compare_exchange(ptr::null_mut(), new, Ordering::AcqRel, Ordering::Acquire) {
            Ok(_) => page = new,
            // Another thread was faster. Its answer counts, and one page is left over, once.
            Err(first) => page = first,
        }
    }
    if page == none() {
        return None;
    }
    // SAFETY: `map` made it: a page that is never unmapped, zeroed, and aligned.
    Some(unsafe { &*page })
}

/// Stands for a page that cannot be had.
fn none() -> *mut AtomicU64 {
    ptr::without_provenance_mut(align_of::<AtomicU64>())
}

fn map() -> *mut AtomicU64 {
    // SAFETY: a new anonymous mapping at the kernel's choice, and advice about it alone.
    unsafe {
        let page = libc::mmap(
            ptr::null_mut(),
            size_of::<AtomicU64>(),
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
            -1,
            0,
        );
        if page == libc::MAP_FAILED {
            return none();
        }
        if libc::madvise(page, size_of::<AtomicU64>(), libc::MADV_WIPEONFORK) != 0 {
            libc::munmap(page, size_of::<AtomicU64>());
            return none();
        }
        page.cast()
    }
}
