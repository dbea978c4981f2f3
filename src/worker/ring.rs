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
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::time::{Duration, Instant};

use io_uring::squeue::{Entry, Flags};
use io_uring::types::{CancelBuilder, Fixed, Timespec};
use io_uring::{IoUring, Probe, opcode};

use super::Context;
use super::burst::{LONGEST, SUPERPACKETS};
use super::config::{MOST_PORTS, RING_COMPLETIONS, RING_ENTRIES, Wait};
use super::outgoing::{Outbox, Writer};
use super::port::{Delivery, Endpoint, Port, Ports};
use super::{handoff, udp};
use crate::buf::{Batch, SizeClass};
use crate::error::{OpenError, OpenErrorKind, PortError, PortErrorKind};
use crate::sys::uring::RingHandle;
use crate::sys::{host, tun};

/// The doorbell's place among the registered files; port `k` has place `k + 1`.
const DOORBELL: u32 = 0;

/// How long a worker that ends waits for the kernel to let go of its memory.
const DRAIN_BOUND: Duration = Duration::from_secs(2);
/// Tries to enter a ring that says it is out of memory, 100 µs apart.
const ENTER_TRIES: u32 = 100;

pub(super) struct RingBackend {
    ring: IoUring,
    handle: RingHandle,
    /// Whether the slots of a class are registered, as the buffer of the class's number.
    registered: [bool; 2],
    books: Books,
    /// The ring cannot be entered any more: the errno.
    broken: Option<i32>,
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
            Tag::CHECK => self.results[0] = result,
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
        .and_then(|node| tun::unattached_takes_nowait(node.as_fd()));
    if nowait.unwrap_or_else(|| host::kernel_version() >= (6, 4)) {
        return Ok(());
    }
    Err("this kernel's tun driver serves a ring only by blocking; 6.4 and later do without".to_owned())
}

impl Writer for RingBackend {
    fn fault(&self) -> Option<PortError> {
        self.broken.map(|_| self.broken_error())
    }

    fn perform(
        &mut self,
        cx: &mut Context,
        ports: &mut Ports,
        index: usize,
        outbox: &mut Outbox,
    ) -> Result<(), PortError> {
        let port = ports.at(index);
        let (file, count) = (Fixed(index as u32 + 1), outbox.writes.len());
        // Two parts of a chain that are submitted one by one do not wait for each other.
        let queue = self.ring.submission();
        let room = queue.capacity() - queue.len();
        drop(queue);
        if room < count {
            self.enter(0, false, None);
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
            let entry = entry.flags(link);
            self.push(&entry.user_data(Tag::of(Tag::WRITE, port.id.index, place as u32)));
        }
        port.tally.system_calls.add(1);
        // Linked ones go on as completions are asked for: all in this entry.
        self.enter(if linked { self.books.sending as u32 } else { 0 }, linked, None);
        self.reap(cx, ports);
        while self.books.sending > 0 && self.broken.is_none() {
            self.enter(1, true, None);
            self.reap(cx, ports);
        }
        outbox.results[..count].copy_from_slice(&self.books.results[..count]);
        match self.broken {
            None => Ok(()),
            Some(_) => Err(self.broken_error()),
        }
    }
}

impl RingBackend {
    /// A ring for the calling thread.
    pub(super) fn new(doorbell: BorrowedFd<'_>) -> Result<Self, OpenError> {
        let ring = build().map_err(|error| set_up_error(&error))?;
        let submitter = ring.submitter();
        let mut probe = Probe::new();
        submitter.register_probe(&mut probe).map_err(|error| {
            OpenError::new(
                OpenErrorKind::IoUring,
                "io_uring_register(PROBE)",
                &error,
                "cannot ask the ring what it can do",
            )
        })?;
        let needed = [
            (opcode::ReadFixed::CODE, "READ_FIXED"),
            (opcode::WriteFixed::CODE, "WRITE_FIXED"),
            (opcode::Read::CODE, "READ"),
            (opcode::Write::CODE, "WRITE"),
            (opcode::PollAdd::CODE, "POLL_ADD"),
        ];
        if let Some((_, name)) = needed.iter().find(|(code, _)| !probe.is_supported(*code)) {
            return Err(OpenError::refused(
                OpenErrorKind::IoUring,
                "io_uring_register(PROBE)",
                format!("the kernel's io_uring has no {name}"),
            ));
        }
        let mut files = [-1; MOST_PORTS + 1];
        files[DOORBELL as usize] = doorbell.as_raw_fd();
        submitter.register_files(&files).map_err(|error| {
            let detail =
                "the table of registered files was refused; the limit of open files (ulimit -n) must be above 257";
            OpenError::new(
                OpenErrorKind::DescriptorLimit,
                "io_uring_register(FILES)",
                &error,
                detail,
            )
        })?;
        // SAFETY: the descriptor is the ring's, which lives through the call.
        let handle = RingHandle::register(unsafe { BorrowedFd::borrow_raw(ring.as_raw_fd()) });
        Ok(Self {
            ring,
            handle,
            registered: [false; 2],
            books: Books {
                doorbell_armed: false,
                outstanding: 0,
                sending: 0,
                results: vec![PENDING; RING_ENTRIES as usize].into(),
            },
            broken: None,
        })
    }

    /// Registers the memory of a class of slots.
    ///
    /// # Safety
    /// The memory stays mapped until this backend is gone, or is leaked by whoever finds that it was not drained.
    pub(super) unsafe fn register(&mut self, class: SizeClass, memory: libc::iovec) -> io::Result<()> {
        let submitter = self.ring.submitter();
        if self.registered == [false; 2] {
            // Before the first; EBUSY after a first that failed.
            match submitter.register_buffers_sparse(2) {
                Err(error) if error.raw_os_error() != Some(libc::EBUSY) => return Err(error),
                _ => {}
            }
        }
        // SAFETY: as the caller says.
        unsafe { submitter.register_buffers_update(class as u32, &[memory], None) }?;
        self.registered[class as usize] = true;
        Ok(())
    }

    pub(super) fn has_registered(&self, class: SizeClass) -> bool {
        self.registered[class as usize]
    }

    pub(super) fn has_registered_ring(&self) -> bool {
        self.handle.is_registered()
    }

    /// Takes a port's descriptor into the table, and makes sure that the kernel serves it without blocking.
    pub(super) fn attach(&mut self, cx: &mut Context, ports: &mut Ports, index: usize) -> Result<(), OpenError> {
        let port = ports.at(index);
        if port.is_handoff() {
            return Ok(());
        }
        let (fd, udp) = (port.fd, port.is_udp());
        self.ring
            .submitter()
            .register_files_update(index as u32 + 1, &[fd])
            .map_err(|error| {
                OpenError::new(
                    OpenErrorKind::Other,
                    "io_uring_register(FILES_UPDATE)",
                    &error,
                    "the descriptor could not be registered",
                )
            })?;
        if udp {
            return Ok(());
        }
        // An empty read takes no packet; with RWF_NOWAIT it tells whether the driver takes such requests at all.
        let slot = cx.arena.check_out(port.account, port.class);
        let Some(slot) = slot else {
            return Err(OpenError::refused(
                OpenErrorKind::MemoryLimit,
                "attach",
                "no free buffer for the port",
            ));
        };
        let at = cx.arena.address(slot, 0);
        let entry = opcode::Read::new(Fixed(index as u32 + 1), at.as_ptr(), 0)
            .offset(u64::MAX)
            .rw_flags(libc::RWF_NOWAIT)
            .build()
            .user_data(Tag::of(Tag::CHECK, index as u16, 0));
        self.books.results[0] = PENDING;
        self.push(&entry);
        while self.books.results[0] == PENDING && self.broken.is_none() {
            self.enter(1, true, None);
            self.reap(cx, ports);
        }
        cx.arena.release(slot);
        let result = self.books.results[0];
        if result < 0 {
            let _ = self.ring.submitter().register_files_update(index as u32 + 1, &[-1]);
            let error = io::Error::from_raw_os_error(if result == PENDING { libc::EIO } else { -result });
            let detail = match error.raw_os_error() {
                Some(libc::EOPNOTSUPP) => {
                    "this kernel's tun driver cannot be read without blocking through a ring; force Backend::Syscalls"
                }
                _ => "the queue cannot be read; is its device still there?",
            };
            return Err(OpenError::new(
                OpenErrorKind::Unsupported,
                "read(RWF_NOWAIT)",
                &error,
                detail,
            ));
        }
        // Back-pressure is to be expected; without a limit there is none.
        let port = ports.at(index);
        if let Endpoint::Queue(queue) = &port.endpoint {
            port.linked = queue.send_buffer().is_ok_and(|bytes| bytes < i32::MAX);
        }
        Ok(())
    }

    /// Ends all operations on a port and forgets its descriptor. Packets that came meanwhile are in its inbox. `false` if the kernel
    /// did not let go in time.
    pub(super) fn detach(&mut self, cx: &mut Context, ports: &mut Ports, index: usize) -> bool {
        // Not only its own requests: until Linux 6.13 a registered file is held until all requests on registered files have ended that began
        // before it was taken out (io_uring/rsrc.c). A queue would stay attached for as long as another port waits, and keep its flows.
        let idle = self.disarm(cx, ports, index);
        let _ = self.ring.submitter().register_files_update(index as u32 + 1, &[-1]);
        idle
    }

    /// Ends all operations. Packets that came meanwhile are in the inboxes. `false` if the kernel did not let go of this port in time.
    pub(super) fn disarm(&mut self, cx: &mut Context, ports: &mut Ports, index: usize) -> bool {
        // What was pushed can be cancelled once it is submitted.
        if !self.ring.submission().is_empty() {
            self.enter(0, true, None);
        }
        self.cancel_all(cx, ports);
        !ports.at(index).armed
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
        loop {
            let port = ports.at(index);
            port.hand_over(&cx.arena, batch);
            let got = batch.len() - before;
            if batch.is_full() {
                port.more = true;
                return port.conclude(got);
            }
            if port.is_gone() {
                return port.conclude(got);
            }
            if port.armed {
                // An armed read that has not stirred says that the port is empty, for nothing.
                if self.task_work_is_due() {
                    self.enter(0, true, None);
                }
                if self.reap(cx, ports) > 0 {
                    continue;
                }
            } else if port.is_udp() {
                udp::receive(cx, port, batch);
            } else if port.is_handoff() {
                handoff::receive(&cx.arena, port, batch);
            } else if !port.has_news() && self.ask(cx, ports, index, batch, got > 0, block && !paused) {
                continue;
            }
            let port = ports.at(index);
            port.hand_over(&cx.arena, batch);
            let got = batch.len() - before;
            if got > 0 || !block || port.has_news() {
                return port.conclude(got);
            }
            if cx.interrupted() {
                return Ok(0);
            }
            if let Some(pause) = cx.moderation.pause(None) {
                self.pause(cx, ports, pause);
                ports.at(index).more = false;
                paused = true;
                continue;
            }
            paused = false;
            if !self.arm(cx, ports, index) {
                ports.at(index).starved();
                continue;
            }
            self.arm_doorbell();
            cx.doze(ports, Some(index), |cx, ports| self.sleep(cx, ports, None));
            if self.broken.is_some() {
                return Err(self.broken_error());
            }
        }
    }

    /// Asks a queue for a burst. Returns whether another look is worth while: something came, and there may be more.
    fn ask(
        &mut self,
        cx: &mut Context,
        ports: &mut Ports,
        index: usize,
        batch: &mut Batch,
        in_hand: bool,
        block: bool,
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
        if next == 0 {
            return false;
        }
        let longest = if port.heavy { SUPERPACKETS } else { LONGEST };
        let most = next.min(batch.room() as u32).min(longest);
        let can = cx.arena.available(port.account, port.class, most);
        let mut asked = 0;
        while asked < can
            && let Some(slot) = cx.arena.check_out(port.account, port.class)
        {
            let entry = self.read_entry(cx, port, slot, libc::RWF_NOWAIT);
            self.push(&entry.user_data(Tag::of(Tag::BURST, port.id.index, slot)));
            asked += 1;
        }
        if asked == 0 {
            if !in_hand {
                port.starved();
            }
            return false;
        }
        port.tally.system_calls.add(1);
        self.enter(0, false, None);
        let got = self.reap_burst(cx, ports, index, batch);
        ports.at(index).burst.answered(asked, got);
        got == asked
    }

    /// Arms one read (queue) or poll (socket, and a busy queue). `false` if there is no buffer for it.
    fn arm(&mut self, cx: &mut Context, ports: &mut Ports, index: usize) -> bool {
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
            opcode::PollAdd::new(Fixed(index as u32 + 1), libc::POLLIN as u32)
                .build()
                .user_data(Tag::of(Tag::SOCKET, port.id.index, 0))
        } else {
            let Some(slot) = cx.arena.check_out(port.account, port.class) else {
                return false;
            };
            self.read_entry(cx, port, slot, 0)
                .user_data(Tag::of(Tag::ARMED, port.id.index, slot))
        };
        port.armed = true;
        self.push(&entry);
        true
    }

    fn arm_doorbell(&mut self) {
        if !self.books.doorbell_armed {
            self.books.doorbell_armed = true;
            let entry = opcode::PollAdd::new(Fixed(DOORBELL), libc::POLLIN as u32).build();
            self.push(&entry.user_data(Tag::DOORBELL));
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
            self.enter(0, true, None);
        }
        self.reap(cx, ports);
        if ports.any_ready() || cx.interrupted() {
            return Ok(());
        }
        if let Some(pause) = cx.moderation.pause(deadline) {
            self.pause(cx, ports, pause);
            return self.health();
        }
        let mut starved = false;
        for index in 0..ports.len() {
            if ports.exists(index) && !self.arm(cx, ports, index) {
                ports.at(index).tally.no_buffers.add(1);
                starved = true;
            }
        }
        self.arm_doorbell();
        if starved {
            cx.arena.announce_hunger();
            // What came back until now rang no doorbell.
            for index in 0..ports.len() {
                let _ = ports.exists(index) && self.arm(cx, ports, index);
            }
        }
        cx.doze(ports, None, |cx, ports| self.sleep(cx, ports, deadline));
        self.health()
    }

    fn health(&self) -> io::Result<()> {
        match self.broken {
            Some(errno) => Err(io::Error::from_raw_os_error(errno)),
            None => Ok(()),
        }
    }

    /// Sleeps for a set time, so that packets gather on the ports that were busy; these are looked at again then. Only the time ends it.
    fn pause(&mut self, cx: &mut Context, ports: &mut Ports, pause: Duration) {
        for index in 0..ports.len() {
            if ports.exists(index) && !ports.at(index).recent {
                let _ = self.arm(cx, ports, index);
            }
        }
        cx.books.worker.lingers.add(1);
        // One more than can complete.
        let all = self.books.outstanding as u32;
        self.enter(all + 1, true, Some(pause));
        self.reap(cx, ports);
        ports.paused(&cx.arena);
    }

    /// Submits what was pushed and sleeps, or watches, until something completes or the deadline is over.
    fn sleep(&mut self, cx: &mut Context, ports: &mut Ports, deadline: Option<Instant>) {
        ports.iter_mut().for_each(|port| port.recent = false);
        if let Wait::Spin { duration } = cx.wait {
            self.enter(0, false, None);
            if self.watch(cx, duration, deadline) {
                self.enter(0, true, None);
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
            Some(Duration::ZERO) => self.enter(0, true, None),
            timeout => {
                cx.books.worker.sleeps.add(1);
                self.enter(1, true, timeout);
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
        unsafe { self.ring.submission_shared() }.taskrun()
    }

    /// Queues an entry. The ring owns what it points to until its completion is reaped.
    #[inline]
    fn push(&mut self, entry: &Entry) {
        // SAFETY: slots are checked out and stay so until `reap` sees the completion; packets of a batch are kept by `send` until then;
        // registered files are kept open until they are unregistered.
        if unsafe { self.ring.submission().push(entry) }.is_err() {
            // Full: make room, then there is.
            self.enter(0, false, None);
            // SAFETY: as above.
            if unsafe { self.ring.submission().push(entry) }.is_err() {
                self.broken.get_or_insert(libc::EBUSY);
                return;
            }
        }
        self.books.outstanding += 1;
    }

    /// Enters the kernel: submits all that was pushed, and waits for `complete` completions if not zero. Returns early on a signal and on
    /// the timeout; the caller looks at what completed. A ring that cannot be entered is marked broken.
    fn enter(&mut self, complete: u32, events: bool, timeout: Option<Duration>) {
        let mut tries = 0;
        while self.broken.is_none() {
            let mut queue = self.ring.submission();
            queue.sync();
            let pending = queue.len() as u32;
            drop(queue);
            match self.handle.enter(pending, complete, events, timeout) {
                Ok(taken) if taken >= pending => return,
                // Stopped in the middle: go on with the rest.
                Ok(taken) if taken > 0 => {}
                Ok(_) => tries += 1,
                Err(error) => match error.raw_os_error().unwrap_or(libc::EIO) {
                    libc::ETIME => return,
                    libc::EINTR if pending == 0 => return,
                    libc::EINTR => {}
                    libc::EAGAIN | libc::EBUSY | libc::ENOMEM => {
                        tries += 1;
                        std::thread::sleep(Duration::from_micros(100));
                    }
                    errno => self.broken = Some(errno),
                },
            }
            if tries >= ENTER_TRIES {
                self.broken = Some(libc::EAGAIN);
            }
        }
    }

    fn broken_error(&self) -> PortError {
        PortError::new(PortErrorKind::Other, "io_uring_enter", self.broken.unwrap_or(libc::EIO))
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

    /// Takes all completions; packets of a burst on port `index`, whose inbox is empty, go straight into the batch. Returns how many these were.
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
                Delivery::Dropped => {
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
    pub(super) fn close(&mut self, cx: &mut Context, ports: &mut Ports) -> bool {
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
        let mut queue = self.ring.submission();
        queue.sync();
        let unsubmitted = queue.len();
        drop(queue);
        if self.books.outstanding > unsubmitted {
            let _ = self
                .ring
                .submitter()
                .register_sync_cancel(Some(Timespec::from(DRAIN_BOUND)), CancelBuilder::any());
            while self.books.outstanding > unsubmitted && Instant::now() < deadline {
                // Not through `enter`: nothing more may be submitted, and a broken ring may still complete.
                let _ = self.handle.enter(0, 1, true, Some(DRAIN_BOUND / 20));
                self.reap(cx, ports);
            }
        }
        self.books.outstanding <= unsubmitted
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

fn set_up_error(error: &io::Error) -> OpenError {
    let disabled = std::fs::read_to_string("/proc/sys/kernel/io_uring_disabled").unwrap_or_default();
    let (kind, detail) = match error.raw_os_error() {
        Some(libc::EPERM) if matches!(disabled.trim(), "1" | "2") => (
            OpenErrorKind::IoUring,
            format!(
                "io_uring is switched off: sysctl kernel.io_uring_disabled is {}",
                disabled.trim()
            ),
        ),
        Some(libc::EPERM | libc::EACCES) => (
            OpenErrorKind::IoUring,
            "io_uring is refused, most likely by a container's seccomp profile".to_owned(),
        ),
        Some(libc::ENOSYS) => (
            OpenErrorKind::IoUring,
            "io_uring is not in this kernel, or a sandbox hides it".to_owned(),
        ),
        Some(libc::ENOMEM) => (
            OpenErrorKind::MemoryLimit,
            "no memory for the ring; raise RLIMIT_MEMLOCK (ulimit -l)".to_owned(),
        ),
        Some(libc::EMFILE | libc::ENFILE) => (
            OpenErrorKind::DescriptorLimit,
            "out of descriptors (ulimit -n)".to_owned(),
        ),
        _ => (OpenErrorKind::IoUring, "io_uring could not be set up".to_owned()),
    };
    OpenError::new(kind, "io_uring_setup", error, detail)
}
