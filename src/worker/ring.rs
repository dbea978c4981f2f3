//! The io_uring backend.
//!
//! Receive: one armed READ_FIXED per idle port waits and receives in one entry; what lies behind it is taken by bursts of READ_FIXED with
//! per-entry RWF_NOWAIT, all executed inline. Send: bursts of WRITE_FIXED, also with RWF_NOWAIT, executed inline in order. The ring is
//! entered by one thread only (SINGLE_ISSUER) and completes only when entered (DEFER_TASKRUN), so completions of a port come in the order
//! in which its packets left the queue.
//!
//! Every slot named by an entry is owned by the ring from `push` until its completion is reaped.
#![allow(unsafe_code)]

use std::io;
use std::mem::ManuallyDrop;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::time::{Duration, Instant};

use io_uring::squeue::{Entry, Flags};
use io_uring::types::{CancelBuilder, Fixed, Timespec};
use io_uring::{IoUring, Probe, opcode};

use super::Context;
use super::burst::{LONGEST, SUPERPACKETS};
use super::config::{MOST_PORTS, RING_COMPLETIONS, RING_ENTRIES, Wait};
use super::outgoing::{Outbox, Unperformed, Writer};
use super::port::{Delivery, POLLED, Port, Ports};
use super::{handoff, udp};
use crate::buf::{Batch, SizeClass};
use crate::error::{ENTER, OpenError, OpenErrorKind, PortError, PortErrorKind};
use crate::sys::forked::Origin;
use crate::sys::uring::RingHandle;
use crate::sys::{host, tun};

/// The doorbell's place among the registered files; port `k` has place `k + 1`.
const DOORBELL: u32 = 0;

/// How long a worker that ends waits for the kernel to let go of its memory.
const DRAIN_BOUND: Duration = Duration::from_secs(2);
/// Tries to have it let go, at least: as many as fit into the bound if each one waits twice in
/// vain.
const DRAIN_ROUNDS: u32 = 10;
/// How long a refusal to enter the ring (EAGAIN, EBUSY, ENOMEM) may last before it is an error of
/// a wait, or, with writes in flight, the end of the ring.
const PATIENCE: Duration = Duration::from_secs(10);
/// The same for writes once the worker was asked to stop, and for every call that can leave what it
/// pushed to a later one.
const CALL_PATIENCE: Duration = Duration::from_secs(1);
/// The same for such a call once the worker was asked to stop.
const STOP_PATIENCE: Duration = Duration::from_millis(100);
/// Pauses between two tries: each twice as long as the one before.
const FIRST_PAUSE: Duration = Duration::from_micros(100);
const LONGEST_BACK_OFF: Duration = Duration::from_millis(20);
/// Signals that may interrupt one submission before it counts as refused.
const MOST_INTERRUPTS: u32 = 100;

pub(super) struct RingBackend {
    /// Dropped only in the process that made it: a forked child does not have its memory.
    ring: ManuallyDrop<IoUring>,
    origin: Origin,
    handle: RingHandle,
    /// Whether the slots of a class are registered, as the buffer of the class's number.
    registered: [bool; 2],
    books: Books,
    /// The ring cannot be entered any more: the errno.
    broken: Option<i32>,
    /// The last try to enter the ring was refused; the next one may succeed.
    refusal: Option<Refusal>,
}

/// A refusal to enter the ring that passes: what was pushed stays in the submission queue.
#[derive(Clone, Copy)]
struct Refusal {
    /// When the kernel first refused; it refused every try since.
    since: Instant,
    /// Why it refused last.
    errno: i32,
}

/// How long the caller of `enter` has.
#[derive(Clone, Copy)]
enum Bound {
    /// A call that does not wait for packets.
    Call,
    /// A wait, which a wake-up or the time (if any) ends.
    Wait(Option<Duration>),
}

impl Bound {
    /// One try: what follows tries again.
    const NOW: Self = Self::Wait(Some(Duration::ZERO));

    /// A wait that is over at the deadline, if there is one.
    fn until(deadline: Option<Instant>) -> Self {
        Self::Wait(deadline.map(|deadline| deadline.saturating_duration_since(Instant::now())))
    }
}

/// What is in flight.
struct Books {
    doorbell_armed: bool,
    /// Entries pushed whose completion was not reaped yet.
    outstanding: usize,
    /// Of these, writes.
    sending: usize,
    /// Results of the current burst of writes, by place.
    results: Box<[i32]>,
    /// The serial number of the last check of a queue, and its result. An earlier one, whose caller
    /// gave up, may complete later.
    checks: u32,
    checked: Option<i32>,
}

impl Books {
    /// Files a completion. Returns whether it tells of something to receive.
    fn file(&mut self, cx: &mut Context, ports: &mut Ports, completion: &io_uring::cqueue::Entry) -> bool {
        self.outstanding -= 1;
        let (tag, result) = (Tag(completion.user_data()), completion.result());
        match tag.kind() {
            Tag::BURST => return ports.at(tag.port()).read_ended(&cx.arena, tag.value(), result),
            Tag::ARMED => {
                let port = ports.at(tag.port());
                port.armed = false;
                if port.read_ended(&cx.arena, tag.value(), result) {
                    port.burst.woke();
                    return true;
                }
            }
            Tag::SOCKET => {
                let port = ports.at(tag.port());
                port.armed = false;
                port.polled(result.max(0) as libc::c_short);
                return port.readable;
            }
            Tag::WRITE => {
                self.sending -= 1;
                self.results[tag.value() as usize] = result;
            }
            Tag::DOORBELL => {
                self.doorbell_armed = false;
                // Not if it was cancelled.
                if result >= 0 {
                    cx.doorbell_rang();
                }
            }
            Tag::CHECK if tag.value() == self.checks => self.checked = Some(result),
            Tag::CHECK => {}
            _ => debug_assert!(false, "a completion that nobody asked for"),
        }
        false
    }
}

/// A write's result that has not come yet.
const PENDING: i32 = i32::MIN;

/// What a completion is about: 8 bits of kind, 16 bits of port index, 32 bits of slot or place.
#[derive(Clone, Copy)]
struct Tag(u64);

impl Tag {
    const BURST: u64 = 1 << 48;
    const ARMED: u64 = 2 << 48;
    const WRITE: u64 = 3 << 48;
    const SOCKET: u64 = 4 << 48;
    const DOORBELL: u64 = 5 << 48;
    const CHECK: u64 = 6 << 48;

    fn of(kind: u64, port: u16, value: u32) -> u64 {
        kind | u64::from(port) << 32 | u64::from(value)
    }

    fn kind(self) -> u64 {
        self.0 & (0xff << 48)
    }

    fn port(self) -> usize {
        (self.0 >> 32) as u16 as usize
    }

    fn value(self) -> u32 {
        self.0 as u32
    }
}

/// What a host lacks for this backend, in words, as far as it can be known before a ring is made.
pub(super) fn lacks() -> Result<(), String> {
    // The tun driver executes non-blocking reads of a ring inline since 6.4 (FMODE_NOWAIT). The node tells; where it may not be opened
    // (queues handed over by a privileged helper), the version has to do. `attach` asks each queue.
    let nowait = tun::open_node(true)
        .ok()
        // A file in the node's place knows nothing of the kernel.
        .filter(|node| tun::is_tun(node.as_fd()).unwrap_or(false))
        .and_then(|node| tun::unattached_takes_nowait(node.as_fd()));
    if nowait.unwrap_or_else(|| host::kernel_version() >= (6, 4)) {
        return Ok(());
    }
    Err("this kernel's tun driver serves a ring only by blocking; 6.4 and later do without".to_owned())
}

impl Writer for RingBackend {
    fn fault(&mut self, cx: &Context) -> Option<PortError> {
        self.is_open(cx, Bound::Call);
        self.error()
    }

    fn perform(
        &mut self,
        cx: &mut Context,
        ports: &mut Ports,
        index: usize,
        outbox: &mut Outbox,
    ) -> Result<(), Unperformed> {
        let port = ports.at(index);
        let (file, count) = (Fixed(index as u32 + 1), outbox.writes.len());
        // Two parts of a chain that are submitted one by one do not wait for each other.
        if self.room() < count {
            self.enter(cx, 0, false, Bound::Call);
            if self.room() < count {
                // Nothing was pushed, so nothing is lost. What is full is no receiver but the ring.
                let error = self.error().unwrap_or_else(|| enter_error(libc::EAGAIN));
                return Err(Unperformed::Refused(error));
            }
        }
        let mut linked = port.linked;
        for (place, write) in outbox.writes.iter().enumerate() {
            port.tally.foreign_sent.add(u64::from(write.foreign));
            let registered = write.class.filter(|&class| self.registered[class as usize]);
            let (at, len, flags) = (write.at, write.len, libc::RWF_NOWAIT);
            let entry = match (write.parts, registered) {
                (0, Some(class)) => opcode::WriteFixed::new(file, at, len, class as u16)
                    .offset(u64::MAX)
                    .rw_flags(flags)
                    .build(),
                (0, None) => opcode::Write::new(file, at, len)
                    .offset(u64::MAX)
                    .rw_flags(flags)
                    .build(),
                (parts, _) => opcode::Writev::new(file, at.cast(), parts)
                    .offset(u64::MAX)
                    .rw_flags(flags)
                    .build(),
            };
            // Nothing overtakes a superpacket that is refused.
            linked |= write.kind.is_some();
            let link = if linked && place + 1 < count {
                Flags::IO_LINK
            } else {
                Flags::empty()
            };
            self.books.results[place] = PENDING;
            self.books.sending += 1;
            let entry = entry
                .flags(link)
                .user_data(Tag::of(Tag::WRITE, port.id.index, place as u32));
            let pushed = self.push(cx, &entry, || Bound::Call);
            debug_assert!(pushed, "there is room for all of them");
        }
        port.tally.system_calls.add(1);
        // Linked ones go on as completions are asked for: all in this entry.
        let complete = if linked { self.books.sending as u32 } else { 0 };
        self.enter(cx, complete, linked, Bound::Call);
        self.reap(cx, ports);
        while self.books.sending > 0 && self.broken.is_none() {
            self.enter(cx, 1, true, Bound::Call);
            self.reap(cx, ports);
        }
        outbox.results[..count].copy_from_slice(&self.books.results[..count]);
        match self.broken {
            // A ring that broke after the last completion came: nothing of these is in flight.
            Some(errno) if self.books.sending > 0 => Err(Unperformed::Lost(enter_error(errno))),
            _ => Ok(()),
        }
    }
}

impl RingBackend {
    /// A ring for the calling thread.
    pub(super) fn new(doorbell: BorrowedFd<'_>) -> Result<Self, OpenError> {
        let ring = build().map_err(|error| call_error("io_uring_setup", &error))?;
        let submitter = ring.submitter();
        let mut probe = Probe::new();
        let call = "io_uring_register(PROBE)";
        submitter
            .register_probe(&mut probe)
            .map_err(|error| call_error(call, &error))?;
        let needed = [
            (opcode::ReadFixed::CODE, "READ_FIXED"),
            (opcode::WriteFixed::CODE, "WRITE_FIXED"),
            (opcode::Read::CODE, "READ"),
            (opcode::Write::CODE, "WRITE"),
            (opcode::Writev::CODE, "WRITEV"),
            (opcode::PollAdd::CODE, "POLL_ADD"),
        ];
        if let Some((_, name)) = needed.iter().find(|(code, _)| !probe.is_supported(*code)) {
            let detail = format!("the kernel's io_uring has no {name}; use Backend::Syscalls");
            return Err(OpenError::refused(OpenErrorKind::IoUring, call, detail));
        }
        // A sandbox may refuse any single call. What ends a ring is tried before there is one to
        // end; the kernel answers ENXIO or ENOENT then.
        permitted("io_uring_register(UNREGISTER_FILES)", submitter.unregister_files())?;
        permitted("io_uring_register(UNREGISTER_BUFFERS)", submitter.unregister_buffers())?;
        permitted(
            "io_uring_register(SYNC_CANCEL)",
            submitter.register_sync_cancel(None, CancelBuilder::any()),
        )?;
        let mut files = [-1; MOST_PORTS + 1];
        files[DOORBELL as usize] = doorbell.as_raw_fd();
        submitter
            .register_files(&files)
            .map_err(|error| call_error("io_uring_register(FILES)", &error))?;
        submitter
            .register_files_update(DOORBELL + 1, &[-1])
            .map_err(|error| call_error("io_uring_register(FILES_UPDATE)", &error))?;
        // SAFETY: the descriptor is the ring's, which lives through the calls.
        let fd = unsafe { BorrowedFd::borrow_raw(ring.as_raw_fd()) };
        permitted("io_uring_register(UNREGISTER_RING_FDS)", RingHandle::try_unregister(fd))?;
        let (handle, registered) = RingHandle::register(fd);
        let backend = Self {
            ring: ManuallyDrop::new(ring),
            origin: Origin::here(),
            handle,
            registered: [false; 2],
            books: Books {
                doorbell_armed: false,
                outstanding: 0,
                sending: 0,
                results: vec![PENDING; RING_ENTRIES as usize].into(),
                checks: 0,
                checked: None,
            },
            broken: None,
            refusal: None,
        };
        // From here on dropping it gives the index back.
        permitted("io_uring_register(RING_FDS)", registered)?;
        match backend.handle.enter(0, 0, true, None) {
            Err(error) if !passes(error.raw_os_error()) => Err(call_error("io_uring_enter", &error)),
            _ => Ok(backend),
        }
    }

    /// Registers the memory of a class of slots.
    ///
    /// # Safety
    /// The memory stays mapped until this backend is gone, or is leaked by whoever finds that it was not drained.
    pub(super) unsafe fn register(&mut self, class: SizeClass, memory: libc::iovec) -> Result<(), OpenError> {
        let submitter = self.ring.submitter();
        if self.registered == [false; 2] {
            // Before the first; EBUSY after a first that failed.
            match submitter.register_buffers_sparse(2) {
                Err(error) if error.raw_os_error() != Some(libc::EBUSY) => {
                    return Err(call_error("io_uring_register(BUFFERS2)", &error));
                }
                _ => {}
            }
        }
        // SAFETY: as the caller says.
        unsafe { submitter.register_buffers_update(class as u32, &[memory], None) }
            .map_err(|error| call_error("io_uring_register(BUFFERS_UPDATE)", &error))?;
        self.registered[class as usize] = true;
        Ok(())
    }

    pub(super) fn has_registered(&self, class: SizeClass) -> bool {
        self.registered[class as usize]
    }

    pub(super) fn has_registered_ring(&self) -> bool {
        self.handle.is_registered()
    }

    /// Entries pushed and not reaped.
    #[cfg(all(test, feature = "lab"))]
    pub(super) fn outstanding(&self) -> usize {
        self.books.outstanding
    }

    /// Takes a port's descriptor into the table, and makes sure that the kernel serves it without blocking.
    pub(super) fn attach(&mut self, cx: &mut Context, ports: &mut Ports, index: usize) -> Result<(), OpenError> {
        let port = ports.at(index);
        if port.is_handoff() {
            return Ok(());
        }
        let (fd, udp) = (port.fd, port.is_udp());
        self.set_file(index, fd).map_err(|error| {
            let detail = "the descriptor could not be registered; use Backend::Syscalls";
            OpenError::new(OpenErrorKind::Other, "io_uring_register(FILES_UPDATE)", &error, detail)
        })?;
        if udp {
            return Ok(());
        }
        if let Err(error) = self.check(cx, ports, index) {
            // If this fails too, the next port of this index, or the end of the ring, replaces it.
            let _ = self.set_file(index, -1);
            return Err(error);
        }
        Ok(())
    }

    /// Whether the driver reads a registered queue without blocking: an empty read, which takes no
    /// packet, with RWF_NOWAIT.
    fn check(&mut self, cx: &mut Context, ports: &mut Ports, index: usize) -> Result<(), OpenError> {
        self.books.checks = self.books.checks.wrapping_add(1);
        self.books.checked = None;
        // Of no bytes, so it may lie in a slot that is in use, and outlive this call.
        let at = cx.arena.address(0, 0);
        let entry = opcode::Read::new(Fixed(index as u32 + 1), at.as_ptr(), 0)
            .offset(u64::MAX)
            .rw_flags(libc::RWF_NOWAIT)
            .build()
            .user_data(Tag::of(Tag::CHECK, index as u16, self.books.checks));
        let pushed = self.push(cx, &entry, || Bound::Call);
        while pushed && self.books.checked.is_none() {
            self.enter(cx, 1, true, Bound::Call);
            self.reap(cx, ports);
            if self.error().is_some() {
                break;
            }
        }
        let result = match self.books.checked {
            Some(result) => result,
            None => {
                let errno = self.error().map_or(libc::EAGAIN, |error| error.raw_os_error());
                return Err(call_error("io_uring_enter", &io::Error::from_raw_os_error(errno)));
            }
        };
        if result >= 0 {
            return Ok(());
        }
        let error = io::Error::from_raw_os_error(-result);
        let detail = match error.raw_os_error() {
            Some(libc::EOPNOTSUPP) => {
                "this kernel's tun driver cannot be read without blocking through a ring; use Backend::Syscalls"
            }
            Some(libc::EACCES | libc::EPERM) => "this ring may not read; use Backend::Syscalls",
            _ => "the queue cannot be read, so its device is probably gone; open it again",
        };
        Err(OpenError::new(
            OpenErrorKind::Unsupported,
            "read(RWF_NOWAIT)",
            &error,
            detail,
        ))
    }

    /// Puts a descriptor at a port's place among the registered files; -1 clears it. Tries again
    /// where that may help.
    fn set_file(&self, index: usize, fd: RawFd) -> io::Result<()> {
        let deadline = Instant::now() + STOP_PATIENCE;
        let mut pause = FIRST_PAUSE;
        loop {
            match self.ring.submitter().register_files_update(index as u32 + 1, &[fd]) {
                Err(error) if passes(error.raw_os_error()) && Instant::now() < deadline => {
                    std::thread::sleep(pause);
                    pause *= 2;
                }
                result => return result.map(drop),
            }
        }
    }

    /// Ends all operations on a port and forgets its descriptor. Packets that came meanwhile are in
    /// its inbox.
    ///
    /// # Errors
    /// The kernel did not let go in time, or keeps the descriptor: the port is as before.
    pub(super) fn detach(&mut self, cx: &mut Context, ports: &mut Ports, index: usize) -> Result<(), PortError> {
        if ports.at(index).is_handoff() {
            return Ok(());
        }
        // Not only its own requests: until Linux 6.13 a registered file is held until all requests on registered files have ended that began
        // before it was taken out (io_uring/rsrc.c). A queue would stay attached for as long as another port waits, and keep its flows.
        self.disarm(cx, ports, index)?;
        // While the ring has the file, the queue stays attached and gets packets that none reads.
        self.set_file(index, -1).map_err(|error| {
            let errno = error.raw_os_error().unwrap_or(libc::EIO);
            PortError::new(PortErrorKind::Other, "io_uring_register(FILES_UPDATE)", errno)
        })
    }

    /// Ends all operations. Packets that came meanwhile are in the inboxes.
    ///
    /// # Errors
    /// The kernel did not let go of this port in time.
    pub(super) fn disarm(&mut self, cx: &mut Context, ports: &mut Ports, index: usize) -> Result<(), PortError> {
        // What was pushed can be cancelled once it is submitted.
        if !self.ring.submission().is_empty() {
            self.enter(cx, 0, true, Bound::Call);
            if let Some(error) = self.error() {
                return Err(error);
            }
        }
        self.cancel_all(cx, ports);
        if ports.at(index).armed {
            let call = "io_uring_register(SYNC_CANCEL)";
            return Err(PortError::new(PortErrorKind::Other, call, libc::ETIME));
        }
        Ok(())
    }

    /// Receives from a queue: waits for the first packet if `block`, then takes what is there, up to the batch's room.
    pub(super) fn receive(
        &mut self,
        cx: &mut Context,
        ports: &mut Ports,
        index: usize,
        batch: &mut Batch,
        block: bool,
    ) -> Result<usize, PortError> {
        let before = batch.len();
        ports.at(index).more = false;
        let mut paused = false;
        // A wake-up ends this call also while the ring is refused, unless it only looks.
        let bound = if block { Bound::Wait(None) } else { Bound::Call };
        loop {
            let port = ports.at(index);
            if !port.holds_back() {
                port.hand_over(&cx.arena, batch);
            }
            let got = batch.len() - before;
            if batch.is_full() {
                port.more = true;
                return port.conclude(got);
            }
            if port.is_gone() {
                port.hand_over(&cx.arena, batch);
                return port.conclude(batch.len() - before);
            }
            if port.armed {
                // An armed read that has not stirred says that the port is empty, for nothing.
                if self.task_work_is_due() || self.refusal.is_some() {
                    self.enter(cx, 0, true, bound);
                }
                if self.reap(cx, ports) > 0 {
                    continue;
                }
            } else if port.is_udp() {
                udp::receive(cx, port, batch);
            } else if port.is_handoff() {
                handoff::receive(&cx.arena, port, batch);
            } else if !port.has_news() {
                // What is in doubt came alone only if nothing lies behind it.
                let may_wait = block && !paused && !port.is_in_doubt();
                if self.ask(cx, ports, index, batch, got > 0, may_wait, bound) {
                    continue;
                }
            }
            let port = ports.at(index);
            port.hand_over(&cx.arena, batch);
            let got = batch.len() - before;
            if got > 0 || port.has_news() {
                return port.conclude(got);
            }
            // A ring that cannot be entered has not asked: the port may well have packets.
            if let Some(error) = self.error().filter(|_| !block || self.health().is_err()) {
                return Err(error);
            }
            if !block || cx.interrupted() {
                return port.conclude(0);
            }
            if let Some(pause) = cx.moderation.pause(None) {
                self.pause(cx, ports, pause);
                ports.at(index).more = false;
                paused = true;
                continue;
            }
            paused = false;
            if self.refusal.is_none() {
                if !self.arm(cx, ports, index, None) {
                    ports.at(index).starved();
                    continue;
                }
                self.arm_doorbell(cx, None);
            }
            if self.refusal.is_some() {
                // How long is looked at above.
                let _ = self.try_again(cx, ports, None);
                continue;
            }
            cx.doze(ports, Some(index), |cx, ports| self.sleep(cx, ports, None));
        }
    }

    /// Asks a queue for a burst. Returns whether another look is worth while: something came, and there may be more.
    #[expect(clippy::too_many_arguments, reason = "the parts of a worker, borrowed one by one")]
    fn ask(
        &mut self,
        cx: &mut Context,
        ports: &mut Ports,
        index: usize,
        batch: &mut Batch,
        in_hand: bool,
        block: bool,
        bound: Bound,
    ) -> bool {
        let port = ports.at(index);
        let next = if std::mem::take(&mut port.gathered) {
            port.burst.gathered()
        } else if block && !in_hand && !port.readable {
            // With leave to wait, the armed read is the cheapest way to ask for what is not expected.
            port.burst.rest_of_run()
        } else {
            port.burst.next(in_hand)
        };
        port.readable = false;
        // No more is pushed onto what the kernel does not take.
        if next == 0 || !self.is_open(cx, bound) {
            return false;
        }
        let longest = if port.heavy { SUPERPACKETS } else { LONGEST };
        let most = next.min(batch.room() as u32).min(longest).min(port.longest_burst());
        let can = cx.arena.available(port.account, port.class, most);
        let mut asked = 0;
        while asked < can
            && let Some(slot) = cx.arena.check_out(port.account, port.class)
        {
            let entry = self.read_entry(cx, port, slot, libc::RWF_NOWAIT);
            let entry = entry.user_data(Tag::of(Tag::BURST, port.id.index, slot));
            if !self.push(cx, &entry, || bound) {
                cx.arena.release(slot);
                break;
            }
            asked += 1;
        }
        if asked == 0 {
            if !in_hand && can == 0 {
                port.starved();
            }
            return false;
        }
        port.tally.system_calls.add(1);
        self.enter(cx, 0, false, bound);
        let got = self.reap_burst(cx, ports, index, batch);
        ports.at(index).burst.answered(asked, got);
        got == asked
    }

    /// Arms one read (queue) or poll (socket, and a busy queue), for a wait until the deadline.
    /// `false` if there is no buffer for it.
    pub(super) fn arm(&mut self, cx: &mut Context, ports: &mut Ports, index: usize, deadline: Option<Instant>) -> bool {
        let port = ports.at(index);
        if port.armed || port.is_gone() {
            return true;
        }
        if port.is_handoff() {
            return port.lend(&cx.arena);
        }
        if cx.arena.available(port.account, port.class, 1) == 0 {
            return false;
        }
        // Where several come at a time, the first one is best received with the others.
        let entry = if port.is_udp() || port.burst.expects_several() {
            opcode::PollAdd::new(Fixed(index as u32 + 1), POLLED as u32)
                .build()
                .user_data(Tag::of(Tag::SOCKET, port.id.index, 0))
        } else {
            let Some(slot) = cx.arena.check_out(port.account, port.class) else {
                return false;
            };
            self.read_entry(cx, port, slot, 0)
                .user_data(Tag::of(Tag::ARMED, port.id.index, slot))
        };
        port.armed = self.push(cx, &entry, || Bound::until(deadline));
        if !port.armed && entry.get_user_data() >> 48 == Tag::ARMED >> 48 {
            cx.arena.release(Tag(entry.get_user_data()).value());
        }
        true
    }

    fn arm_doorbell(&mut self, cx: &Context, deadline: Option<Instant>) {
        if !self.books.doorbell_armed {
            let entry = opcode::PollAdd::new(Fixed(DOORBELL), libc::POLLIN as u32).build();
            let entry = entry.user_data(Tag::DOORBELL);
            self.books.doorbell_armed = self.push(cx, &entry, || Bound::until(deadline));
        }
    }

    fn read_entry(&self, cx: &Context, port: &Port, slot: u32, flags: i32) -> Entry {
        let file = Fixed(u32::from(port.id.index) + 1);
        let at = cx.arena.address(slot, port.read_at).as_ptr();
        if self.registered[port.class as usize] {
            opcode::ReadFixed::new(file, at, port.read_len, port.class as u16)
                .offset(u64::MAX)
                .rw_flags(flags)
                .build()
        } else {
            opcode::Read::new(file, at, port.read_len)
                .offset(u64::MAX)
                .rw_flags(flags)
                .build()
        }
    }

    /// Waits until a port is ready, the deadline, or the doorbell. Spurious returns are possible.
    pub(super) fn wait(&mut self, cx: &mut Context, ports: &mut Ports, deadline: Option<Instant>) -> io::Result<()> {
        if self.task_work_is_due() {
            // Where this is refused, trying again is bounded by the deadline and the waker below.
            self.enter(cx, 0, true, Bound::NOW);
        }
        self.reap(cx, ports);
        if ports.any_ready() || cx.interrupted() {
            return Ok(());
        }
        if let Some(pause) = cx.moderation.pause(deadline) {
            self.pause(cx, ports, pause);
            return self.health();
        }
        if self.refusal.is_some() {
            return self.try_again(cx, ports, deadline);
        }
        let mut starved = false;
        for index in 0..ports.len() {
            if ports.exists(index) && !self.arm(cx, ports, index, deadline) {
                ports.at(index).tally.no_buffers.add(1);
                starved = true;
            }
        }
        self.arm_doorbell(cx, deadline);
        if starved {
            cx.arena.announce_hunger();
            // What came back until now rang no doorbell.
            for index in 0..ports.len() {
                let _ = ports.exists(index) && self.arm(cx, ports, index, deadline);
            }
        }
        if self.refusal.is_some() {
            return self.try_again(cx, ports, deadline);
        }
        cx.doze(ports, None, |cx, ports| self.sleep(cx, ports, deadline));
        self.health()
    }

    /// Tries to enter a ring that was refused. Not all ports are armed, so it does not sleep there.
    fn try_again(&mut self, cx: &mut Context, ports: &mut Ports, deadline: Option<Instant>) -> io::Result<()> {
        self.enter(cx, 0, true, Bound::until(deadline));
        self.reap(cx, ports);
        self.health()
    }

    /// Whether waiting goes on: also while the kernel refuses to, for a time.
    fn health(&self) -> io::Result<()> {
        match (self.broken, self.refusal) {
            (Some(errno), _) => Err(io::Error::from_raw_os_error(errno)),
            (None, Some(refusal)) if refusal.since.elapsed() >= PATIENCE => {
                Err(io::Error::from_raw_os_error(refusal.errno))
            }
            _ => Ok(()),
        }
    }

    /// Sleeps for a set time, so that packets gather on the ports that were busy; these are looked at again then. Only the time ends it.
    fn pause(&mut self, cx: &mut Context, ports: &mut Ports, pause: Duration) {
        let end = Instant::now() + pause;
        for index in 0..ports.len() {
            if ports.exists(index) && !ports.at(index).recent {
                let _ = self.arm(cx, ports, index, Some(end));
            }
        }
        cx.books.worker.lingers.add(1);
        // One more than can complete.
        let all = self.books.outstanding as u32;
        self.enter(cx, all + 1, true, Bound::Wait(Some(pause)));
        self.reap(cx, ports);
        ports.paused(&cx.arena);
    }

    /// Submits what was pushed and sleeps, or watches, until something completes or the deadline is over.
    fn sleep(&mut self, cx: &mut Context, ports: &mut Ports, deadline: Option<Instant>) {
        ports.iter_mut().for_each(|port| port.recent = false);
        if let Wait::Spin { duration } = cx.wait {
            self.enter(cx, 0, false, Bound::NOW);
            // What the kernel did not take does not stir.
            if self.refusal.is_none() && self.watch(cx, duration, deadline) {
                self.enter(cx, 0, true, Bound::NOW);
                self.reap(cx, ports);
                return;
            }
        }
        let timeout = match deadline {
            None => None,
            Some(deadline) => match deadline.checked_duration_since(Instant::now()) {
                Some(left) if !left.is_zero() => Some(left),
                _ => Some(Duration::ZERO),
            },
        };
        match timeout {
            Some(Duration::ZERO) => self.enter(cx, 0, true, Bound::Wait(timeout)),
            timeout => {
                cx.books.worker.sleeps.add(1);
                self.enter(cx, 1, true, Bound::Wait(timeout));
            }
        }
        self.reap(cx, ports);
    }

    /// Watches the ring without entering it. Returns whether something stirred or the deadline passed.
    fn watch(&mut self, cx: &Context, duration: Duration, deadline: Option<Instant>) -> bool {
        let start = Instant::now();
        let end = start.checked_add(duration);
        loop {
            for _ in 0..16 {
                if self.task_work_is_due() || !self.ring.completion().is_empty() || cx.interrupted() {
                    return true;
                }
                std::hint::spin_loop();
            }
            let now = Instant::now();
            if deadline.is_some_and(|deadline| now >= deadline) {
                return true;
            }
            if end.is_some_and(|end| now >= end) {
                return false;
            }
        }
    }

    #[inline]
    fn task_work_is_due(&mut self) -> bool {
        // SAFETY: the submission queue is only read, and this thread is the only one that has it.
        let queue = unsafe { self.ring.submission_shared() };
        // What overflowed the completion queue comes with the next entry, too.
        queue.taskrun() || queue.cq_overflow()
    }

    /// How many entries can be pushed.
    fn room(&mut self) -> usize {
        let mut queue = self.ring.submission();
        queue.sync();
        queue.capacity() - queue.len()
    }

    /// How many entries were pushed and not taken by the kernel.
    fn unsubmitted(&mut self) -> usize {
        let mut queue = self.ring.submission();
        queue.sync();
        queue.len()
    }

    /// Queues an entry. The ring owns what it points to until its completion is reaped. `false` if
    /// there is no room and the kernel does not make any within the bound: the entry was not queued.
    #[inline]
    #[must_use]
    fn push(&mut self, cx: &Context, entry: &Entry, bound: impl FnOnce() -> Bound) -> bool {
        // SAFETY: slots are checked out and stay so until `reap` sees the completion; packets of a batch are kept by `send` until then;
        // registered files are kept open until they are unregistered.
        if unsafe { self.ring.submission().push(entry) }.is_err() && !self.push_full(cx, entry, bound()) {
            return false;
        }
        self.books.outstanding += 1;
        true
    }

    /// Queues an entry in a submission queue that is full. `false` if there is no room to be had.
    #[cold]
    #[inline(never)]
    fn push_full(&mut self, cx: &Context, entry: &Entry, bound: Bound) -> bool {
        // Not where that was just refused: each port would wait for itself.
        if self.refusal.is_none() {
            self.enter(cx, 0, false, bound);
        }
        // SAFETY: as in `push`.
        unsafe { self.ring.submission().push(entry) }.is_ok()
    }

    /// Enters the kernel: submits all that was pushed, and waits for `complete` completions if not
    /// zero. Returns early on a signal and at the bound; the caller looks at what completed.
    ///
    /// A ring that cannot be entered for the moment is left with a `refusal`, and what was pushed
    /// stays in it. One that can never be entered, or keeps writes for too long, is `broken`.
    #[inline]
    fn enter(&mut self, cx: &Context, complete: u32, events: bool, bound: Bound) {
        if self.broken.is_some() {
            return;
        }
        let pending = self.unsubmitted() as u32;
        let timeout = match bound {
            Bound::Wait(timeout) if complete > 0 => timeout,
            _ => None,
        };
        let result = self.handle.enter(pending, complete, events, timeout);
        if !matches!(result, Ok(taken) if taken >= pending && self.refusal.is_none()) {
            self.insist(cx, complete, events, bound, (pending, result));
        }
    }

    /// Goes on where entering the ring did not succeed at once.
    #[cold]
    fn insist(
        &mut self,
        cx: &Context,
        complete: u32,
        events: bool,
        bound: Bound,
        (mut pending, mut result): (u32, io::Result<u32>),
    ) {
        let start = Instant::now();
        let mut pause = FIRST_PAUSE;
        let mut interrupts = 0;
        loop {
            let refused = match &result {
                Ok(taken) if *taken >= pending => {
                    self.refusal = None;
                    return;
                }
                // Stopped in the middle: go on with the rest.
                Ok(1..) => None,
                Ok(0) => Some(libc::EAGAIN),
                Err(error) => match error.raw_os_error().unwrap_or(libc::EIO) {
                    libc::ETIME => {
                        self.refusal = None;
                        return;
                    }
                    libc::EINTR if pending == 0 => {
                        self.refusal = None;
                        return;
                    }
                    libc::EINTR if interrupts < MOST_INTERRUPTS => {
                        interrupts += 1;
                        None
                    }
                    errno if passes(Some(errno)) => Some(errno),
                    errno => {
                        self.broken = Some(errno);
                        return;
                    }
                },
            };
            match refused {
                None => self.refusal = None,
                Some(errno) => {
                    let Some(left) = self.patience(cx, errno, bound, start) else {
                        return;
                    };
                    std::thread::sleep(pause.min(left));
                    pause = (pause * 2).min(LONGEST_BACK_OFF);
                }
            }
            let timeout = match bound {
                Bound::Wait(Some(timeout)) => Some(timeout.saturating_sub(start.elapsed())),
                _ => None,
            };
            pending = self.unsubmitted() as u32;
            result = self.handle.enter(pending, complete, events, timeout);
        }
    }

    /// Notes a refusal. Returns how much longer to try; `None` to give up.
    fn patience(&mut self, cx: &Context, errno: i32, bound: Bound, start: Instant) -> Option<Duration> {
        cx.books.worker.refused_entries.add(1);
        let now = Instant::now();
        let since = self.refusal.map_or(now, |refusal| refusal.since);
        self.refusal = Some(Refusal { since, errno });
        let stopped = cx.waker.stopped();
        let limit = match bound {
            // What these write belongs to the caller, and cannot be left to a later call.
            _ if self.books.sending > 0 => {
                if stopped {
                    CALL_PATIENCE
                } else {
                    PATIENCE
                }
            }
            Bound::Wait(_) if cx.interrupted() => Duration::ZERO,
            Bound::Wait(Some(timeout)) => timeout.min(CALL_PATIENCE),
            _ if stopped => STOP_PATIENCE,
            _ => CALL_PATIENCE,
        };
        let left = limit.saturating_sub(now - start);
        if !left.is_zero() {
            return Some(left);
        }
        if self.books.sending > 0 {
            self.broken = Some(errno);
        }
        None
    }

    /// Whether the ring can be entered; one that was refused is tried again.
    fn is_open(&mut self, cx: &Context, bound: Bound) -> bool {
        if self.refusal.is_some() {
            self.enter(cx, 0, false, bound);
        }
        self.broken.is_none() && self.refusal.is_none()
    }

    /// Why the ring could not be entered the last time.
    fn error(&self) -> Option<PortError> {
        let refused = self.refusal.map(|refusal| refusal.errno);
        self.broken.or(refused).map(enter_error)
    }

    /// Takes all completions and files them with their ports. Returns how many of them tell of something to receive.
    fn reap(&mut self, cx: &mut Context, ports: &mut Ports) -> usize {
        let mut news = 0;
        let mut completions = self.ring.completion();
        completions.sync();
        for completion in &mut completions {
            news += usize::from(self.books.file(cx, ports, &completion));
        }
        news
    }

    /// Takes all completions; packets of a burst on port `index` go straight into the batch, as long as
    /// none is held back. Returns how many came of that burst.
    fn reap_burst(&mut self, cx: &mut Context, ports: &mut Ports, index: usize, batch: &mut Batch) -> u32 {
        let mut got = 0;
        let (mut packets, mut bytes) = (0, 0);
        let mut completions = self.ring.completion();
        completions.sync();
        for completion in &mut completions {
            let (tag, result) = (Tag(completion.user_data()), completion.result());
            let burst = tag.0 >> 32 == Tag::of(Tag::BURST, index as u16, 0) >> 32;
            let delivery = if burst {
                ports.at(index).deliver(&cx.arena, tag.value(), result, batch)
            } else {
                Delivery::Nothing
            };
            match delivery {
                Delivery::Packet(len) => {
                    self.books.outstanding -= 1;
                    packets += 1;
                    bytes += u64::from(len);
                }
                Delivery::Dropped | Delivery::Held => {
                    self.books.outstanding -= 1;
                    got += 1;
                }
                Delivery::Nothing => got += u32::from(self.books.file(cx, ports, &completion) && burst),
            }
        }
        if packets > 0 {
            ports.at(index).tally.received(packets, bytes);
        }
        got + packets as u32
    }

    /// Cancels all, waits for the kernel to let go, unregisters. `false` if it did not let go within the bound: the memory must stay.
    ///
    /// In a forked child it touches nothing: all of it is the parent's.
    pub(super) fn close(&mut self, cx: &mut Context, ports: &mut Ports) -> bool {
        if !self.origin.is_here() {
            return true;
        }
        let idle = self.cancel_all(cx, ports);
        // The devices are held by the ring until then, and ring teardown is asynchronous.
        let _ = self.ring.submitter().unregister_files();
        if self.registered != [false; 2] {
            let _ = self.ring.submitter().unregister_buffers();
        }
        idle
    }

    /// Cancels what the kernel has in hand, and files what came of it. `false` if it did not let go within the bound.
    fn cancel_all(&mut self, cx: &mut Context, ports: &mut Ports) -> bool {
        let deadline = Instant::now() + DRAIN_BOUND;
        // What was pushed and never submitted is not in the kernel's hands.
        let unsubmitted = self.unsubmitted();
        let mut rounds = 0;
        // Time alone would be over without a try where the thread was kept from running meanwhile:
        // by load, by SIGSTOP, or with its whole machine.
        while self.books.outstanding > unsubmitted && (rounds < DRAIN_ROUNDS || Instant::now() < deadline) {
            rounds += 1;
            // Again in each round: a signal ends it early.
            let _ = self
                .handle
                .sync_cancel(&self.ring.submitter(), Timespec::from(DRAIN_BOUND / 20));
            // Not through `enter`: nothing more may be submitted, and a broken ring may still
            // complete.
            let entered = self.handle.enter(0, 1, true, Some(DRAIN_BOUND / 20));
            if entered.is_err_and(|error| error.raw_os_error() != Some(libc::ETIME)) {
                std::thread::sleep(FIRST_PAUSE);
            }
            self.reap(cx, ports);
        }
        self.books.outstanding <= unsubmitted
    }
}

impl Drop for RingBackend {
    fn drop(&mut self) {
        if self.origin.is_here() {
            // The kernel keeps the index for the thread, not for the ring.
            self.handle.unregister(self.as_fd());
            // SAFETY: it is dropped here only, and not used afterwards.
            unsafe { ManuallyDrop::drop(&mut self.ring) };
        } else {
            // The ring's memory is not mapped here, and something else may lie in its place. Only
            // this process's descriptor is given up.
            // SAFETY: the descriptor is this process's copy, and the ring is not used afterwards.
            drop(unsafe { OwnedFd::from_raw_fd(self.ring.as_raw_fd()) });
        }
    }
}

impl AsFd for RingBackend {
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the descriptor is the ring's, which lives as long as `self`.
        unsafe { BorrowedFd::borrow_raw(self.ring.as_raw_fd()) }
    }
}

/// The ring with all that this kernel has of what is wanted.
fn build() -> io::Result<IoUring> {
    let build = |no_sqarray: bool| {
        let mut builder = IoUring::builder();
        builder
            .setup_single_issuer()
            .setup_defer_taskrun()
            .setup_taskrun_flag()
            .setup_submit_all()
            .setup_cqsize(RING_COMPLETIONS)
            .dontfork();
        if no_sqarray {
            builder.setup_no_sqarray();
        }
        builder.build(RING_ENTRIES)
    };
    match build(true) {
        // Before 6.6.
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => build(false),
        result => result,
    }
}

/// Whether an errno of entering or changing a ring may go away by itself.
fn passes(errno: Option<i32>) -> bool {
    matches!(errno, Some(libc::EINTR | libc::EAGAIN | libc::EBUSY | libc::ENOMEM))
}

/// Whether a call may not be made at all: by a sysctl, a sandbox, or an old kernel.
pub(super) fn is_refused(errno: Option<i32>) -> bool {
    matches!(errno, Some(libc::EPERM | libc::EACCES | libc::ENOSYS))
}

/// Lets everything pass but a refusal of the call.
fn permitted<T>(call: &'static str, result: io::Result<T>) -> Result<(), OpenError> {
    match result {
        Err(error) if is_refused(error.raw_os_error()) => Err(call_error(call, &error)),
        _ => Ok(()),
    }
}

fn enter_error(errno: i32) -> PortError {
    PortError::new(PortErrorKind::Other, ENTER, errno)
}

fn call_error(call: &'static str, error: &io::Error) -> OpenError {
    let disabled = std::fs::read_to_string("/proc/sys/kernel/io_uring_disabled").unwrap_or_default();
    let (kind, detail) = explain(call, error.raw_os_error(), disabled.trim());
    OpenError::new(kind, call, error, detail)
}

/// What an errno of an io_uring call means, given the sysctl `kernel.io_uring_disabled`.
fn explain(call: &str, errno: Option<i32>, disabled: &str) -> (OpenErrorKind, String) {
    match errno {
        Some(libc::EPERM) if call == "io_uring_setup" && matches!(disabled, "1" | "2") => (
            OpenErrorKind::IoUring,
            format!(
                "io_uring is switched off: sysctl kernel.io_uring_disabled is {disabled}; set it to 0, or use \
                 Backend::Syscalls"
            ),
        ),
        Some(libc::EPERM | libc::EACCES) => (
            OpenErrorKind::IoUring,
            "the call is refused, most likely by a container's seccomp profile; allow it there, or use \
             Backend::Syscalls"
                .to_owned(),
        ),
        Some(libc::ENOSYS) => (
            OpenErrorKind::IoUring,
            "the call is not in this kernel, or a sandbox hides it; allow it there, or use Backend::Syscalls"
                .to_owned(),
        ),
        Some(libc::ENOMEM) => (
            OpenErrorKind::MemoryLimit,
            "no memory for the ring; raise RLIMIT_MEMLOCK (ulimit -l)".to_owned(),
        ),
        Some(libc::EMFILE | libc::ENFILE) => (
            OpenErrorKind::DescriptorLimit,
            "out of descriptors; raise the limit of open files (ulimit -n) above 257".to_owned(),
        ),
        _ => (
            OpenErrorKind::IoUring,
            "io_uring cannot be used; use Backend::Syscalls".to_owned(),
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // T28: the sysctl is the whole machine's, so only the sorting of its errno is tried.
    #[test]
    fn a_refusal_names_its_cause_and_remedy() {
        for disabled in ["1", "2"] {
            let (kind, detail) = explain("io_uring_setup", Some(libc::EPERM), disabled);
            assert_eq!(kind, OpenErrorKind::IoUring);
            assert!(
                detail.contains(&format!("kernel.io_uring_disabled is {disabled}")),
                "{detail}"
            );
        }
        for (call, errno, disabled) in [
            ("io_uring_setup", libc::EPERM, "0"),
            ("io_uring_setup", libc::EPERM, ""),
            ("io_uring_register(FILES)", libc::EPERM, "1"),
            ("io_uring_enter", libc::EACCES, "0"),
        ] {
            let (kind, detail) = explain(call, Some(errno), disabled);
            assert_eq!(kind, OpenErrorKind::IoUring);
            assert!(
                detail.contains("seccomp") && !detail.contains("sysctl"),
                "{call}: {detail}"
            );
        }
        let (kind, _) = explain("io_uring_register(FILES)", Some(libc::EMFILE), "0");
        assert_eq!(kind, OpenErrorKind::DescriptorLimit);
    }
}
