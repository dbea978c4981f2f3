//! The arena: one mapping, two classes of slots, free lists without atomics, and a return queue for buffers that other threads held.
//!
//! The large slots are opened when something first needs them. Until then they are addresses without memory.
#![allow(unsafe_code)]

use std::cell::Cell;
use std::io;
use std::mem::ManuallyDrop;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use memmap2::{MmapMut, MmapRaw};

use crate::stats::Books;
use crate::sync::{AtomicBool, AtomicU32, fence};
use crate::sys::forked::Origin;
use crate::worker::WakeHandle;

/// In front of the user's headroom: space for the vnet header, and what alignment needs.
pub(crate) const HIDDEN_RESERVE: usize = 32;

/// End of a list of slots.
const NIL: u32 = u32::MAX;

/// How an arena is divided. All sizes in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ArenaConfig {
    pub(crate) headroom: usize,
    pub(crate) tailroom: usize,
    pub(crate) small_packet: usize,
    pub(crate) small_slots: usize,
    pub(crate) large_slots: usize,
}

/// An Ethernet header with two VLAN tags (802.1ad): the most that stands before an IP packet.
pub(crate) const LINK_HEADER: usize = 14 + 2 * 4;

/// The longest packet a large slot is made for: the largest IP packet and its link header.
pub(crate) const LARGE_PACKET: usize = 65_535 + LINK_HEADER;

impl ArenaConfig {
    /// Where a packet begins in its slot when nothing was prepended.
    pub(crate) fn data_offset(&self) -> usize {
        HIDDEN_RESERVE + self.headroom
    }

    /// Bytes from one slot of the class to the next.
    ///
    /// One byte more than the longest packet is offered to the kernel: a read that fills it all was cut short.
    pub(crate) fn stride(&self, class: SizeClass) -> usize {
        let packet = match class {
            SizeClass::Small => self.small_packet,
            SizeClass::Large => LARGE_PACKET,
        };
        // Settings that are out of range come here before they are refused: nothing may overflow.
        let need = self
            .data_offset()
            .saturating_add(packet)
            .saturating_add(1)
            .saturating_add(self.tailroom);
        // A slot that straddles fewer pages costs fewer segments of the registered region per operation.
        if need <= 4096 {
            need.next_power_of_two()
        } else {
            whole_pages(need)
        }
    }

    pub(crate) fn slots(&self, class: SizeClass) -> usize {
        match class {
            SizeClass::Small => self.small_slots,
            SizeClass::Large => self.large_slots,
        }
    }

    /// Bytes of all slots of a class, in whole pages.
    pub(crate) fn region_len(&self, class: SizeClass) -> usize {
        whole_pages(self.stride(class).saturating_mul(self.slots(class)))
    }

    /// Bytes of the mapping: the small slots, and behind them the large ones.
    pub(crate) fn mapping_len(&self) -> usize {
        self.region_len(SizeClass::Small)
            .saturating_add(self.region_len(SizeClass::Large))
    }

    /// Bytes of the tables beside the mapping.
    pub(crate) fn tables_len(&self) -> usize {
        // State and free-list entry, and for the return queue a count and a link.
        self.small_slots
            .saturating_add(self.large_slots)
            .saturating_mul(size_of::<SlotState>() + 3 * size_of::<u32>())
            .saturating_add(SizeClass::ALL.len() * MOST_ACCOUNTS * size_of::<Reserve>())
    }
}

fn whole_pages(bytes: usize) -> usize {
    bytes.checked_next_multiple_of(4096).unwrap_or(usize::MAX)
}

/// The two sizes of slots.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum SizeClass {
    /// For packets up to the configured length.
    Small,
    /// For packets and superpackets up to 64 KiB.
    Large,
}

impl SizeClass {
    const ALL: [SizeClass; 2] = [SizeClass::Small, SizeClass::Large];
}

/// Whom a slot is charged to: a port, or nobody in particular.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Account(u32);

impl Account {
    /// Buffers made by the user, and copies.
    pub(crate) const NONE: Account = Account(u32::MAX);

    pub(crate) const fn port(index: usize) -> Account {
        Account(index as u32)
    }
}

/// Ports that can have an account.
pub(crate) const MOST_ACCOUNTS: usize = 256;

/// The state of one slot: how many views it has, and whom it is charged to.
#[derive(Clone, Copy)]
struct SlotState {
    views: u32,
    owner: Account,
}

/// The free slots of one class, used from the end so that warm ones are used again first.
struct FreeList {
    slots: Box<[Cell<u32>]>,
    len: Cell<u32>,
}

impl FreeList {
    /// All slots of `range`, the first one on top.
    fn of(range: std::ops::Range<u32>) -> Self {
        let len = Cell::new(range.len() as u32);
        Self {
            slots: range.rev().map(Cell::new).collect(),
            len,
        }
    }

    /// None yet of that many.
    fn closed(count: u32) -> Self {
        Self {
            slots: (0..count).map(Cell::new).collect(),
            len: Cell::new(0),
        }
    }

    fn len(&self) -> u32 {
        self.len.get()
    }

    #[inline]
    fn push(&self, slot: u32) {
        let len = self.len.get();
        self.slots[len as usize].set(slot);
        self.len.set(len + 1);
    }

    #[inline]
    fn pop(&self) -> Option<u32> {
        let len = self.len.get().checked_sub(1)?;
        self.len.set(len);
        Some(self.slots[len as usize].get())
    }
}

/// What an account has of one class: slots that no other port can take away, and slots in use.
#[derive(Clone, Copy)]
struct Reserve {
    /// What the port asked for; 0 without a port.
    wanted: u32,
    promised: u32,
    held: u32,
}

impl Reserve {
    const EMPTY: Reserve = Reserve {
        wanted: 0,
        promised: 0,
        held: 0,
    };

    fn unfilled(&self) -> u32 {
        self.promised.saturating_sub(self.held)
    }
}

/// The part of an arena that any thread may touch: the memory and the return queue.
///
/// Thread contract: `give_back` from any thread; `take_returned` from the home thread only.
pub(crate) struct Shared {
    base: NonNull<u8>,
    /// Keeps the memory mapped until the last handle is gone.
    map: ManuallyDrop<MmapRaw>,
    origin: Origin,
    config: ArenaConfig,
    /// Views of each slot that came back and were not yet counted by the home thread. Never more
    /// than the slot has (`SlotState::views`), so the count cannot overflow.
    returned: Box<[AtomicU32]>,
    /// The slot below this one on the stack of slots with returned views.
    link: Box<[AtomicU32]>,
    head: AtomicU32,
    /// Set by a home thread that is about to sleep for want of buffers.
    hungry: AtomicBool,
    /// The memory stays mapped until the process ends, and is counted as leaked.
    leaked: AtomicBool,
    waker: WakeHandle,
}

// SAFETY: `base` points into `map`, which lives as long as this value. Which thread may access
// which bytes is decided by the owner of the slot's views (see the module's head), never by
// `Shared` itself.
unsafe impl Send for Shared {}
// SAFETY: as above; everything else in it is atomic or immutable.
unsafe impl Sync for Shared {}

impl Shared {
    /// Where a packet begins in its slot.
    pub(crate) fn data_offset(&self) -> u32 {
        self.config.data_offset() as u32
    }

    /// The address of `offset` in `slot`.
    #[inline]
    pub(crate) fn address(&self, slot: u32, offset: u32) -> NonNull<u8> {
        let start = self.start_of(slot);
        debug_assert!(start + offset as usize <= self.config.mapping_len());
        // SAFETY: slots are handed out by the arena only, and offsets stay within the slot's stride (kept by PacketBuf, RemoteBuf and
        // the receive path), so the sum lies within the mapping.
        unsafe { self.base.add(start + offset as usize) }
    }

    #[inline]
    fn start_of(&self, slot: u32) -> usize {
        let slot = slot as usize;
        let small = self.config.small_slots;
        if slot < small {
            slot * self.config.stride(SizeClass::Small)
        } else {
            self.config.region_len(SizeClass::Small) + (slot - small) * self.config.stride(SizeClass::Large)
        }
    }

    /// Gives one view of `slot` back to the home thread. Any thread; never blocks; rings the doorbell only when the home is starved.
    pub(crate) fn give_back(&self, slot: u32) {
        let index = slot as usize;
        if self.returned[index].fetch_add(1, Ordering::AcqRel) == 0 {
            let mut head = self.head.load(Ordering::Relaxed);
            loop {
                self.link[index].store(head, Ordering::Relaxed);
                match self
                    .head
                    .compare_exchange_weak(head, slot, Ordering::AcqRel, Ordering::Relaxed)
                {
                    Ok(_) => break,
                    Err(now) => head = now,
                }
            }
        }
        // Pairs with the fence in `announce_hunger`: either the home sees the slot, or this thread sees the hunger.
        fence(Ordering::SeqCst);
        // Only the thread that rings stores, as in `WakeHandle::knock`.
        if self.hungry.load(Ordering::Relaxed)
            && self
                .hungry
                .compare_exchange(true, false, Ordering::AcqRel, Ordering::Relaxed)
                .is_ok()
        {
            self.waker.ring();
        }
    }

    /// Takes all returned views, as (slot, count). Home thread only.
    fn take_returned(&self, mut each: impl FnMut(u32, u32)) {
        let mut slot = self.head.swap(NIL, Ordering::AcqRel);
        while slot != NIL {
            let index = slot as usize;
            // The link is read before the count is taken: once it is zero, another thread may push the slot again.
            let below = self.link[index].load(Ordering::Relaxed);
            let count = self.returned[index].swap(0, Ordering::AcqRel);
            each(slot, count);
            slot = below;
        }
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        // A forked child does not have the mapping, and may have something else in its place.
        if self.origin.is_here() {
            // SAFETY: it is dropped here only, and not used afterwards.
            unsafe { ManuallyDrop::drop(&mut self.map) };
        }
    }
}

/// The home thread's side of an arena. `!Send` through the `Rc` it is always held by; all cells, no atomics.
pub(crate) struct Arena {
    shared: Arc<Shared>,
    small_stride: u32,
    slots: Box<[Cell<SlotState>]>,
    free: [FreeList; 2],
    /// Large slots in use or free; 0 until they are opened.
    large_open: Cell<u32>,
    /// Per class and account. An account may hold slots of a class that it has no promise of: an earlier port of its index did.
    reserves: [Box<[Cell<Reserve>]>; 2],
    /// Per class: slots promised to ports and not taken up by them.
    unfilled: [Cell<u32>; 2],
    /// Where thrown away packets are counted.
    books: Arc<Books>,
}

impl Arena {
    /// Maps and zeroes the memory. The mapping is not inherited by children (MADV_DONTFORK).
    pub(crate) fn new(config: ArenaConfig, waker: WakeHandle, books: Arc<Books>) -> io::Result<Self> {
        let map = MmapMut::map_anon(config.mapping_len())?;
        map.advise(memmap2::Advice::DontFork)?;
        let map = MmapRaw::from(map);
        let base = NonNull::new(map.as_mut_ptr()).ok_or_else(|| io::Error::from_raw_os_error(libc::ENOMEM))?;
        let total = config.small_slots + config.large_slots;
        let shared = Shared {
            base,
            map: ManuallyDrop::new(map),
            origin: Origin::here(),
            config,
            returned: (0..total).map(|_| AtomicU32::new(0)).collect(),
            link: (0..total).map(|_| AtomicU32::new(NIL)).collect(),
            head: AtomicU32::new(NIL),
            hungry: AtomicBool::new(false),
            leaked: AtomicBool::new(false),
            waker,
        };
        let small = config.small_slots as u32;
        Ok(Self {
            shared: Arc::new(shared),
            small_stride: config.stride(SizeClass::Small) as u32,
            slots: (0..total)
                .map(|_| {
                    Cell::new(SlotState {
                        views: 0,
                        owner: Account::NONE,
                    })
                })
                .collect(),
            free: [FreeList::of(0..small), FreeList::closed(config.large_slots as u32)],
            large_open: Cell::new(0),
            reserves: SizeClass::ALL.map(|_| (0..MOST_ACCOUNTS).map(|_| Cell::new(Reserve::EMPTY)).collect()),
            unfilled: [Cell::new(0), Cell::new(0)],
            books,
        })
    }

    pub(crate) fn config(&self) -> &ArenaConfig {
        &self.shared.config
    }

    pub(crate) fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }

    /// The first `slots` slots of a class, for registration.
    pub(crate) fn as_iovec(&self, class: SizeClass, slots: usize) -> libc::iovec {
        let first = match class {
            SizeClass::Small => 0,
            SizeClass::Large => self.config().small_slots as u32,
        };
        libc::iovec {
            iov_base: self.shared.address(first, 0).as_ptr().cast(),
            iov_len: self.config().stride(class) * slots,
        }
    }

    /// Opens the first `slots` of the large slots, if none are yet.
    pub(crate) fn open_large(&self, slots: usize) {
        if self.large_open.get() == 0 {
            let (first, slots) = (self.config().small_slots as u32, slots as u32);
            self.large_open.set(slots);
            (first..first + slots)
                .rev()
                .for_each(|slot| self.free[SizeClass::Large as usize].push(slot));
        }
    }

    /// How many large slots there are to use.
    pub(crate) fn large_open(&self) -> usize {
        self.large_open.get() as usize
    }

    #[inline]
    pub(crate) fn address(&self, slot: u32, offset: u32) -> NonNull<u8> {
        if (slot as usize) < self.shared.config.small_slots {
            // SAFETY: as in `Shared::address`; this is its common case with the stride at hand.
            return unsafe {
                self.shared
                    .base
                    .add(slot as usize * self.small_stride as usize + offset as usize)
            };
        }
        self.shared.address(slot, offset)
    }

    /// The class that `slot` belongs to.
    #[inline]
    pub(crate) fn class_of(&self, slot: u32) -> SizeClass {
        if slot < self.shared.config.small_slots as u32 {
            SizeClass::Small
        } else {
            SizeClass::Large
        }
    }

    /// End of the bytes of `slot` that a view may use.
    #[inline]
    pub(crate) fn slot_end(&self, slot: u32) -> u32 {
        match self.class_of(slot) {
            SizeClass::Small => self.small_stride,
            SizeClass::Large => self.shared.config.stride(SizeClass::Large) as u32,
        }
    }

    /// How many bytes a receive into a slot of `class` offers to the kernel.
    pub(crate) fn read_len(&self, class: SizeClass) -> u32 {
        let config = self.config();
        (config.stride(class) - config.data_offset() - config.tailroom) as u32
    }

    /// Promises `wanted` slots of a class to a port. All promises together take at most half of the
    /// class: where this one would exceed that, each port has an equal share. `None` if it cannot
    /// have even one of half of what is left.
    pub(crate) fn open_account(&self, index: usize, class: SizeClass, wanted: u32) -> Option<u32> {
        self.collect_returned();
        let cell = &self.reserves[class as usize][index];
        cell.set(Reserve { wanted, ..cell.get() });
        let most = self.most_promised(class);
        self.shrink_promises(class, most);
        let promised = wanted.min(most).min(self.unpromised(class) / 2);
        if promised == 0 {
            cell.set(Reserve {
                wanted: 0,
                ..cell.get()
            });
            self.grow_promises(class);
            return None;
        }
        // Buffers that an earlier port of this index still has out stay charged to the account.
        let reserve = Reserve { promised, ..cell.get() };
        cell.set(reserve);
        let unfilled = &self.unfilled[class as usize];
        unfilled.set(unfilled.get() + reserve.unfilled());
        Some(promised)
    }

    /// Free slots of a class that no port is promised.
    fn unpromised(&self, class: SizeClass) -> u32 {
        self.free[class as usize].len() - self.unfilled[class as usize].get()
    }

    /// What each port may be promised of a class.
    fn most_promised(&self, class: SizeClass) -> u32 {
        let slots = match class {
            SizeClass::Small => self.config().small_slots as u32,
            SizeClass::Large => self.large_open.get(),
        };
        let wanted = self.reserves[class as usize].iter().map(|cell| cell.get().wanted);
        let (ports, sum) = wanted
            .filter(|&wanted| wanted > 0)
            .fold((0, 0u32), |(ports, sum), wanted| {
                (ports + 1, sum.saturating_add(wanted))
            });
        if sum <= slots / 2 {
            u32::MAX
        } else {
            (slots / 2 / ports).max(1)
        }
    }

    /// Promises no port more than `most` slots.
    fn shrink_promises(&self, class: SizeClass, most: u32) {
        for cell in &self.reserves[class as usize] {
            let promised = cell.get().promised.min(most);
            self.set_promise(class, cell, promised);
        }
    }

    /// Gives ports back what their promises were shrunk by, as far as there is room by now.
    fn grow_promises(&self, class: SizeClass) {
        let most = self.most_promised(class);
        for cell in &self.reserves[class as usize] {
            let Reserve { wanted, promised, .. } = cell.get();
            let missing = wanted.min(most).saturating_sub(promised);
            if promised > 0 && missing > 0 {
                let grown = promised + missing.min(self.unpromised(class));
                self.set_promise(class, cell, grown);
            }
        }
    }

    fn set_promise(&self, class: SizeClass, cell: &Cell<Reserve>, promised: u32) {
        let unfilled = &self.unfilled[class as usize];
        let before = cell.get();
        let after = Reserve { promised, ..before };
        unfilled.set(unfilled.get() - before.unfilled() + after.unfilled());
        cell.set(after);
    }

    /// Ends the promise to a port. What it holds goes home as it is released.
    pub(crate) fn close_account(&self, index: usize) {
        self.collect_returned();
        for class in SizeClass::ALL {
            let cell = &self.reserves[class as usize][index];
            self.set_promise(class, cell, 0);
            cell.set(Reserve {
                wanted: 0,
                ..cell.get()
            });
            self.grow_promises(class);
        }
    }

    /// How many slots of `class` the account may take now, at most `most`.
    pub(crate) fn available(&self, account: Account, class: SizeClass, most: u32) -> u32 {
        let mut can = self.available_now(account, class);
        if can < most {
            self.collect_returned();
            can = self.available_now(account, class);
        }
        can.min(most)
    }

    fn available_now(&self, account: Account, class: SizeClass) -> u32 {
        let spare = self.free[class as usize].len() - self.unfilled[class as usize].get();
        match self.reserve_of(account, class) {
            Some(reserve) => spare + reserve.get().unfilled(),
            None => spare,
        }
    }

    /// What the account has of this class; `None` for nobody in particular.
    #[inline]
    fn reserve_of(&self, account: Account, class: SizeClass) -> Option<&Cell<Reserve>> {
        self.reserves[class as usize].get(account.0 as usize)
    }

    /// Takes a slot for `account`, with one view. `None` when the account has no right to any that is left.
    #[inline]
    pub(crate) fn check_out(&self, account: Account, class: SizeClass) -> Option<u32> {
        let free = &self.free[class as usize];
        let unfilled = &self.unfilled[class as usize];
        let spare = free.len() > unfilled.get();
        match self.reserve_of(account, class) {
            Some(cell) => {
                let reserve = cell.get();
                match reserve.unfilled() {
                    0 if !spare => return None,
                    0 => {}
                    _ => unfilled.set(unfilled.get() - 1),
                }
                cell.set(Reserve {
                    held: reserve.held + 1,
                    ..reserve
                });
            }
            None if spare => {}
            None => return None,
        }
        let slot = free.pop()?;
        self.slots[slot as usize].set(SlotState {
            views: 1,
            owner: account,
        });
        Some(slot)
    }

    /// Copies a packet of `len` bytes out of a large slot into a small one, and releases the large one, so that short packets do not sit in it.
    /// Returns where the packet is then: still where it was if it is too long, or no small slot is free.
    #[inline]
    pub(crate) fn move_to_small(&self, account: Account, slot: u32, len: u32) -> u32 {
        if len >= self.read_len(SizeClass::Small) {
            return slot;
        }
        let Some(small) = self.check_out(account, SizeClass::Small) else {
            return slot;
        };
        let at = self.config().data_offset() as u32;
        // SAFETY: both slots are checked out and in nobody else's hands, they are different ones, and both have `len` bytes at `at`.
        unsafe {
            let (from, to) = (self.address(slot, at), self.address(small, at));
            std::ptr::copy_nonoverlapping(from.as_ptr(), to.as_ptr(), len as usize);
        }
        self.release(slot);
        small
    }

    /// Adds a view of `slot`. Aborts the process when the count is full, as `Rc` does: a count
    /// that wrapped around would free a slot that still has views.
    pub(crate) fn add_view(&self, slot: u32) {
        let cell = &self.slots[slot as usize];
        let state = cell.get();
        let Some(views) = state.views.checked_add(1) else {
            too_many_views()
        };
        cell.set(SlotState { views, ..state });
    }

    /// Ends one view of `slot`; the last one frees it.
    #[inline]
    pub(crate) fn release(&self, slot: u32) {
        self.release_views(slot, 1);
    }

    #[inline]
    fn release_views(&self, slot: u32, count: u32) {
        let cell = &self.slots[slot as usize];
        let state = cell.get();
        debug_assert!(state.views >= count);
        let views = state.views - count;
        cell.set(SlotState { views, ..state });
        if views == 0 {
            self.check_in(slot, state.owner);
        }
    }

    #[inline]
    fn check_in(&self, slot: u32, owner: Account) {
        let class = self.class_of(slot);
        if let Some(cell) = self.reserve_of(owner, class) {
            let mut reserve = cell.get();
            reserve.held -= 1;
            cell.set(reserve);
            if reserve.held < reserve.promised {
                let unfilled = &self.unfilled[class as usize];
                unfilled.set(unfilled.get() + 1);
            }
        }
        self.free[class as usize].push(slot);
    }

    /// Takes in what other threads gave back.
    pub(crate) fn collect_returned(&self) {
        if self.shared.head.load(Ordering::Relaxed) != NIL {
            self.shared.take_returned(|slot, count| self.release_views(slot, count));
        }
    }

    /// From now on the next buffer that comes back from another thread rings the doorbell. Look once more before sleeping.
    pub(crate) fn announce_hunger(&self) {
        self.shared.hungry.store(true, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        self.collect_returned();
    }

    pub(crate) fn count_discarded(&self, packets: u64) {
        self.books.worker.discarded.add(packets);
    }

    /// (free, total) slots over both classes.
    pub(crate) fn occupancy(&self) -> (usize, usize) {
        self.collect_returned();
        let all = self.config().small_slots + self.large_open();
        (self.free.iter().map(|list| list.len() as usize).sum(), all)
    }
}

/// Only reached by leaking packets with `mem::forget`. A panic could be caught, and then repeated.
#[cold]
fn too_many_views() -> ! {
    std::process::abort()
}

static LEAKED: AtomicU64 = AtomicU64::new(0);

/// Keeps the memory mapped for ever, because the kernel may still write into it.
///
/// Once per arena, however many of its packets the kernel may still read: `leaked_arenas` counts
/// arenas.
pub(crate) fn leak_memory(shared: &Arc<Shared>) {
    if !shared.leaked.swap(true, Ordering::Relaxed) {
        std::mem::forget(Arc::clone(shared));
        LEAKED.fetch_add(1, Ordering::Relaxed);
    }
}

/// How many arenas this process has leaked since it started.
///
/// A worker that cannot prove that the kernel has finished with its memory leaves the memory mapped for ever. Zero on a healthy system.
pub fn leaked_arenas() -> u64 {
    LEAKED.load(Ordering::Relaxed)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn arena(small: usize, large: usize) -> Arena {
        let config = ArenaConfig {
            headroom: 96,
            tailroom: 64,
            small_packet: 1536,
            small_slots: small,
            large_slots: large,
        };
        let arena = Arena::new(config, WakeHandle::new().expect("eventfd"), Arc::default()).expect("memory");
        arena.open_large(large);
        arena
    }

    #[test]
    fn layout_holds_what_it_promises() {
        let config = *arena(4, 2).config();
        assert_eq!(config.stride(SizeClass::Small), 2048);
        assert!(config.stride(SizeClass::Large) >= config.data_offset() + LARGE_PACKET + 1 + config.tailroom);
        assert_eq!(config.stride(SizeClass::Large) % 4096, 0);
    }

    #[test]
    fn a_port_never_starves_another() {
        let arena = arena(16, 0);
        assert_eq!(arena.open_account(0, SizeClass::Small, 4), Some(4));
        assert_eq!(arena.open_account(1, SizeClass::Small, 4), Some(4));
        let mut held = Vec::new();
        while let Some(slot) = arena.check_out(Account::port(0), SizeClass::Small) {
            held.push(slot);
        }
        // All but the other port's promise.
        assert_eq!(held.len(), 12);
        assert_eq!(arena.check_out(Account::NONE, SizeClass::Small), None);
        for _ in 0..4 {
            assert!(arena.check_out(Account::port(1), SizeClass::Small).is_some());
        }
        assert_eq!(arena.check_out(Account::port(1), SizeClass::Small), None);
    }

    #[test]
    fn promises_that_shrank_grow_again_when_ports_close() {
        let arena = arena(64, 0);
        let promised = |ports: std::ops::Range<usize>| -> Vec<u32> {
            let reserves = &arena.reserves[SizeClass::Small as usize];
            ports.map(|port| reserves[port].get().promised).collect()
        };
        for port in 0..8 {
            assert!(arena.open_account(port, SizeClass::Small, 8).is_some());
        }
        assert_eq!(promised(0..8), [4; 8]);
        (4..8).for_each(|port| arena.close_account(port));
        assert_eq!(promised(0..4), [8; 4]);
        // What is held elsewhere is not promised.
        while arena.check_out(Account::NONE, SizeClass::Small).is_some() {}
        assert_eq!(arena.open_account(4, SizeClass::Small, 8), Some(4));
        assert_eq!(promised(0..5), [6, 6, 6, 6, 4]);
    }

    #[test]
    fn a_port_that_gets_no_promise_costs_the_others_none() {
        let arena = arena(4, 0);
        assert_eq!(arena.open_account(0, SizeClass::Small, 2), Some(2));
        while arena.check_out(Account::NONE, SizeClass::Small).is_some() {}
        assert_eq!(arena.open_account(1, SizeClass::Small, 2), None);
        assert_eq!(arena.available(Account::port(0), SizeClass::Small, 4), 2);
    }

    #[test]
    fn slots_of_an_earlier_port_of_another_class_do_not_touch_the_promise() {
        let arena = arena(16, 8);
        assert_eq!(arena.open_account(0, SizeClass::Large, 4), Some(4));
        let large: Vec<_> = (0..6)
            .filter_map(|_| arena.check_out(Account::port(0), SizeClass::Large))
            .collect();
        assert_eq!(large.len(), 6);
        arena.close_account(0);
        assert_eq!(arena.open_account(0, SizeClass::Small, 4), Some(4));
        while arena.check_out(Account::NONE, SizeClass::Small).is_some() {}
        assert_eq!(arena.available(Account::port(0), SizeClass::Small, 16), 4);
        large.into_iter().for_each(|slot| arena.release(slot));
        assert_eq!(arena.available(Account::port(0), SizeClass::Small, 16), 4);
        assert_eq!(arena.available(Account::NONE, SizeClass::Small, 16), 0);
        assert_eq!(arena.available(Account::NONE, SizeClass::Large, 16), 8);
    }

    #[test]
    fn views_share_a_slot_until_the_last_is_gone() {
        let arena = arena(2, 0);
        let slot = arena.check_out(Account::NONE, SizeClass::Small).expect("free slot");
        arena.add_view(slot);
        arena.release(slot);
        assert_eq!(arena.occupancy(), (1, 2));
        arena.shared().give_back(slot);
        assert_eq!(arena.occupancy(), (2, 2));
    }

    #[test]
    fn returns_from_many_threads_are_all_counted() {
        let arena = arena(64, 0);
        for _ in 0..200 {
            let mut slots = Vec::new();
            while let Some(slot) = arena.check_out(Account::NONE, SizeClass::Small) {
                arena.add_view(slot);
                slots.push(slot);
            }
            assert_eq!(slots.len(), 64);
            std::thread::scope(|scope| {
                for _ in 0..2 {
                    let shared = Arc::clone(arena.shared());
                    let slots = slots.clone();
                    scope.spawn(move || slots.into_iter().for_each(|slot| shared.give_back(slot)));
                }
                // Taking in while others give back must lose nothing.
                for _ in 0..50 {
                    arena.collect_returned();
                }
            });
            assert_eq!(arena.occupancy(), (64, 64));
        }
    }

    /// Runs `work` in a child of this process: it ends the process, or changes what others count.
    fn in_child(test: &str, work: fn()) -> Option<std::process::Output> {
        const IN_CHILD: &str = "TUN_DRIVER_IN_CHILD";
        if std::env::var_os(IN_CHILD).is_some() {
            work();
            return None;
        }
        let child = std::process::Command::new(std::env::current_exe().expect("this program"))
            .args([&format!("buf::arena::tests::{test}"), "--exact", "--nocapture"])
            .env(IN_CHILD, "1")
            .output();
        Some(child.expect("a child"))
    }

    #[test]
    fn a_view_count_that_is_full_aborts_the_process() {
        use std::os::unix::process::ExitStatusExt;
        let child = in_child("a_view_count_that_is_full_aborts_the_process", || {
            let arena = arena(2, 0);
            let slot = arena.check_out(Account::NONE, SizeClass::Small).expect("free slot");
            // As after 2³² - 3 calls of `mem::forget(packet.split_to(0))`.
            arena.slots[slot as usize].set(SlotState {
                views: u32::MAX - 1,
                owner: Account::NONE,
            });
            arena.add_view(slot);
            println!("the last one");
            // What unwinds could be caught, and tried again.
            let _ = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| arena.add_view(slot)));
            println!("it goes on");
        });
        let Some(child) = child else { return };
        let text = String::from_utf8_lossy(&child.stdout);
        assert!(text.contains("the last one") && !text.contains("it goes on"), "{text}");
        assert_eq!(child.status.signal(), Some(libc::SIGABRT), "{text}");
    }

    #[test]
    fn an_arena_is_leaked_and_counted_once_whatever_is_in_flight() {
        let child = in_child("an_arena_is_leaked_and_counted_once_whatever_is_in_flight", || {
            let arenas = [arena(8, 0), arena(8, 0)];
            for arena in arenas {
                let arena = std::rc::Rc::new(arena);
                for _ in 0..5 {
                    let slot = arena.check_out(Account::NONE, SizeClass::Small).expect("free slot");
                    crate::PacketBuf::whole_slot(&arena, slot, 10).keep_for_ever();
                }
                // As a worker does that cannot drain its ring.
                leak_memory(arena.shared());
                assert_eq!(arena.occupancy(), (3, 8));
                assert_eq!(Arc::strong_count(arena.shared()), 2);
            }
            assert_eq!(leaked_arenas(), 2);
        });
        if let Some(child) = child {
            assert!(child.status.success(), "{}", String::from_utf8_lossy(&child.stdout));
        }
    }

    #[derive(Clone, Debug)]
    enum Step {
        Take(u32),
        Release(usize),
        Return(usize),
        Split(usize),
        Close(usize),
        Open(usize, u32),
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            4 => (0u32..4).prop_map(Step::Take),
            3 => any::<usize>().prop_map(Step::Release),
            2 => any::<usize>().prop_map(Step::Return),
            2 => any::<usize>().prop_map(Step::Split),
            1 => (0usize..3).prop_map(Step::Close),
            1 => (0usize..3, 1u32..6).prop_map(|(port, wanted)| Step::Open(port, wanted)),
        ]
    }

    proptest! {
        /// Against a model: no slot in two hands, nothing lost, promises kept.
        #[test]
        fn accounting_matches_a_model(steps in proptest::collection::vec(step(), 1..300)) {
            let arena = arena(24, 0);
            let mut out: Vec<u32> = Vec::new();
            let (mut asked, mut promised) = ([0u32; 3], [0u32; 3]);
            let mut held = [0u32; 3];
            let mut charged = std::collections::HashMap::new();
            for step in steps {
                match step {
                    Step::Take(port) => {
                        let account = if port == 3 { Account::NONE } else { Account::port(port as usize) };
                        if let Some(slot) = arena.check_out(account, SizeClass::Small) {
                            prop_assert!(!out.contains(&slot));
                            out.push(slot);
                            if port < 3 { held[port as usize] += 1; }
                            charged.insert(slot, port);
                        } else if port < 3 {
                            prop_assert!(held[port as usize] >= promised[port as usize]);
                        }
                    }
                    Step::Release(at) | Step::Return(at) if !out.is_empty() => {
                        let slot = out.swap_remove(at % out.len());
                        if matches!(step, Step::Return(_)) {
                            arena.shared().give_back(slot);
                            arena.collect_returned();
                        } else {
                            arena.release(slot);
                        }
                        if !out.contains(&slot) && let Some(port @ 0..3) = charged.remove(&slot) {
                            held[port as usize] -= 1;
                        }
                    }
                    Step::Split(at) if !out.is_empty() => {
                        let slot = out[at % out.len()];
                        arena.add_view(slot);
                        out.push(slot);
                    }
                    Step::Close(port) => {
                        arena.close_account(port);
                        asked[port] = 0;
                    }
                    Step::Open(port, wanted) if asked[port] == 0 => {
                        let promised = arena.open_account(port, SizeClass::Small, wanted);
                        asked[port] = promised.map_or(0, |_| wanted);
                    }
                    _ => {}
                }
                // A promise shrinks and grows as ports come and go; from one step to the next it is kept.
                let reserves = &arena.reserves[SizeClass::Small as usize];
                promised = std::array::from_fn(|port| reserves[port].get().promised);
                prop_assert!(promised.iter().zip(asked).all(|(&promised, asked)| promised <= asked));
                prop_assert!(promised.iter().zip(asked).all(|(&promised, asked)| (promised > 0) == (asked > 0)));
                prop_assert!(promised.iter().sum::<u32>() <= 12, "no more than half");
                let unique: std::collections::HashSet<_> = out.iter().collect();
                prop_assert_eq!(arena.occupancy().0, 24 - unique.len());
            }
        }
    }
}

/// Every order of events between threads that give slots back and the home thread
/// (`tests/loom/run`).
#[cfg(all(test, loom))]
mod models {
    use std::rc::Rc;

    use loom::cell::UnsafeCell;
    use loom::thread;

    use super::*;

    fn arena(slots: usize) -> Rc<Arena> {
        let config = ArenaConfig {
            headroom: 96,
            tailroom: 64,
            small_packet: 1536,
            small_slots: slots,
            large_slots: 0,
        };
        let waker = WakeHandle::new().expect("eventfd");
        Rc::new(Arena::new(config, waker, Arc::default()).expect("memory"))
    }

    fn take(arena: &Arena) -> Option<u32> {
        arena.check_out(Account::NONE, SizeClass::Small)
    }

    #[test]
    fn views_that_two_threads_give_back_are_all_counted() {
        loom::model(|| {
            let arena = arena(2);
            let (one, two) = (take(&arena).expect("a slot"), take(&arena).expect("a slot"));
            // Both threads hold a view of the first slot.
            arena.add_view(one);
            let threads = [vec![one], vec![one, two]].map(|views| {
                let shared = Arc::clone(arena.shared());
                thread::spawn(move || views.into_iter().for_each(|slot| shared.give_back(slot)))
            });
            // Taking in meanwhile loses nothing: what was lost would never come.
            while arena.occupancy() != (2, 2) {
                thread::yield_now();
            }
            for thread in threads {
                thread.join().expect("no panic");
            }
        });
    }

    #[test]
    fn a_slot_given_back_again_is_counted_again() {
        loom::model(|| {
            let arena = arena(1);
            let slot = take(&arena).expect("a slot");
            arena.add_view(slot);
            let shared = Arc::clone(arena.shared());
            let thread = thread::spawn(move || {
                shared.give_back(slot);
                shared.give_back(slot);
            });
            arena.collect_returned();
            arena.collect_returned();
            thread.join().expect("no panic");
            assert_eq!(arena.occupancy(), (1, 1));
        });
    }

    #[test]
    fn what_was_written_before_it_was_given_back_is_seen_by_who_takes_it_again() {
        loom::model(|| {
            let arena = arena(1);
            // Stands for the slot's bytes, which loom does not see.
            let bytes = Arc::new(UnsafeCell::new(0));
            let slot = take(&arena).expect("a slot");
            arena.add_view(slot);
            let threads = [0, 1].map(|index| {
                let (shared, bytes) = (Arc::clone(arena.shared()), Arc::clone(&bytes));
                thread::spawn(move || {
                    // SAFETY: one thread writes while it holds its view; loom looks whether another
                    // access may happen at the same time.
                    if index == 0 {
                        bytes.with_mut(|bytes| unsafe { *bytes = 7 });
                    }
                    shared.give_back(slot);
                })
            });
            let slot = loop {
                arena.collect_returned();
                match take(&arena) {
                    Some(slot) => break slot,
                    None => thread::yield_now(),
                }
            };
            // SAFETY: as above: the last view is back.
            bytes.with_mut(|bytes| unsafe {
                assert_eq!(*bytes, 7);
                *bytes = 8;
            });
            arena.release(slot);
            for thread in threads {
                thread.join().expect("no panic");
            }
            assert_eq!(arena.occupancy(), (1, 1));
        });
    }

    #[test]
    fn a_starved_home_is_woken() {
        loom::model(|| {
            let arena = arena(1);
            let slot = take(&arena).expect("a slot");
            arena.add_view(slot);
            let threads = [0, 1].map(|_| {
                let shared = Arc::clone(arena.shared());
                thread::spawn(move || shared.give_back(slot))
            });
            // As the backends wait: a sleep that nothing ends is a deadlock.
            while arena.available(Account::NONE, SizeClass::Small, 1) == 0 {
                arena.announce_hunger();
                if arena.available(Account::NONE, SizeClass::Small, 1) > 0 {
                    break;
                }
                arena.shared().waker.wait_for_ring();
                arena.shared().waker.silence();
            }
            for thread in threads {
                thread.join().expect("no panic");
            }
        });
    }
}
