//! The traits that callers rely on without naming them, held at compile time.

use std::panic::{RefUnwindSafe, UnwindSafe};

use tun_driver::{Builder, Device, Iface, Mode, MultiQueue, OpenError, Queue, Support};

const fn everywhere<T: Send + Sync + Unpin + RefUnwindSafe + UnwindSafe>() {}
const fn shared<T: Clone + Send + Sync>() {}
const fn travels<T: Send>() {}
const fn value<T: Copy + std::fmt::Debug + Eq + std::hash::Hash + Ord>() {}
const fn error<T: std::error::Error + Send + Sync + 'static>() {}

const _: () = {
    everywhere::<Iface>();
    everywhere::<Queue>();
    everywhere::<MultiQueue>();
    shared::<Device>();
    shared::<Support>();
    travels::<Builder>();
    value::<Mode>();
    error::<OpenError>();
};

/// Nothing is left to run: the assertions are above. This makes the file count as a test.
#[test]
fn the_traits_hold_if_this_compiles() {
    everywhere::<Iface>();
}
