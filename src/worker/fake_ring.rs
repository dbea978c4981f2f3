//! The ring backend on a kernel of this test's own: what the real one does once in a blue moon, and
//! strace cannot make it do. Submissions that stop in the middle, entries that are refused, late
//! and reordered completions, a completion queue that overflows, a submission queue that stays
//! full.
//!
//! The backend is the real one, with the memory of a real ring. The fake stands behind the two
//! calls that make it move (`sys::uring::fake`), and reads and writes the queues through mappings
//! of its own.
#![allow(unsafe_code)]

use std::cell::RefCell;
use std::collections::VecDeque;
use std::io;
use std::net::UdpSocket;
use std::os::fd::{AsFd, AsRawFd};
use std::rc::Rc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use proptest::prelude::*;

use super::config::{RING_COMPLETIONS, RING_ENTRIES};
use super::{Imp, PortId, Worker, WorkerConfig};
use crate::lab::Sandbox;
use crate::sys::uring::fake;
use crate::{Backend, Batch, Builder, Mode, PacketBuf, PortErrorKind, Support, Wait};

/// Bytes of `struct io_uring_sqe` and `struct io_uring_cqe`.
const SQE: usize = 64;
const CQE: usize = 16;
const IORING_OFF_SQES: libc::off_t = 0x1000_0000;
const IORING_OP_WRITEV: u8 = 2;
const IORING_OP_READ_FIXED: u8 = 4;
const IORING_OP_WRITE_FIXED: u8 = 5;
const IORING_OP_POLL_ADD: u8 = 6;
const IORING_OP_READ: u8 = 22;
const IORING_OP_WRITE: u8 = 23;
const IOSQE_IO_LINK: u8 = 1 << 2;
const IORING_SQ_CQ_OVERFLOW: u32 = 1 << 1;
const IORING_SQ_TASKRUN: u32 = 1 << 2;

/// `struct io_uring_params`, as far as the places in the ring's memory go.
#[repr(C)]
#[derive(Default)]
struct Params {
    sq_entries: u32,
    cq_entries: u32,
    flags: u32,
    rest: [u32; 7],
    /// head, tail, ring_mask, ring_entries, flags, dropped, array, resv1, user_addr
    sq_off: [u32; 10],
    /// head, tail, ring_mask, ring_entries, overflow, cqes, flags, resv1, user_addr
    cq_off: [u32; 10],
}

const _: () = assert!(size_of::<Params>() == 120);

/// The kernel's side of a ring's memory.
struct Memory {
    rings: *mut u8,
    rings_len: usize,
    entries: *mut u8,
    params: Params,
}

impl Memory {
    fn of(ring: &impl AsFd) -> Self {
        let params = Self::layout();
        let fd = ring.as_fd().as_raw_fd();
        let array = params.sq_off[6] as usize + params.sq_entries as usize * 4;
        let rings_len = array.max(params.cq_off[5] as usize + params.cq_entries as usize * CQE);
        let map = |len: usize, offset: libc::off_t| {
            let (prot, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED);
            // SAFETY: a new mapping at the kernel's choice.
            let at = unsafe { libc::mmap(std::ptr::null_mut(), len, prot, flags, fd, offset) };
            assert_ne!(at, libc::MAP_FAILED, "{}", io::Error::last_os_error());
            at.cast::<u8>()
        };
        Self {
            rings: map(rings_len, 0),
            rings_len,
            entries: map(params.sq_entries as usize * SQE, IORING_OFF_SQES),
            params,
        }
    }

    /// Asks the kernel where things lie, by a ring with the settings of the backend's.
    fn layout() -> Params {
        // CQSIZE, SUBMIT_ALL, TASKRUN_FLAG, SINGLE_ISSUER, DEFER_TASKRUN; and NO_SQARRAY from 6.6
        // on.
        let flags = 1 << 3 | 1 << 7 | 1 << 9 | 1 << 12 | 1 << 13;
        for flags in [flags | 1 << 16, flags] {
            let mut params = Params {
                cq_entries: RING_COMPLETIONS,
                flags,
                ..Params::default()
            };
            // SAFETY: io_uring_setup reads and writes one io_uring_params; the descriptor is
            // closed.
            let fd = unsafe { libc::syscall(libc::SYS_io_uring_setup, RING_ENTRIES, &raw mut params) };
            if fd >= 0 {
                // SAFETY: the descriptor is new, and this is its only use.
                unsafe { libc::close(fd as i32) };
                return params;
            }
        }
        panic!("no ring: {}", io::Error::last_os_error());
    }

    fn word(&self, offset: u32) -> &AtomicU32 {
        // SAFETY: the kernel named the place, in a mapping that lives as long as `self`.
        unsafe { &*self.rings.add(offset as usize).cast::<AtomicU32>() }
    }

    /// The next entry that was pushed.
    fn take_entry(&self) -> Option<[u8; SQE]> {
        let (head, tail) = (self.word(self.params.sq_off[0]), self.word(self.params.sq_off[1]));
        let at = head.load(Ordering::Relaxed);
        if at == tail.load(Ordering::Acquire) {
            return None;
        }
        let mut index = at & (self.params.sq_entries - 1);
        if self.params.flags & 1 << 16 == 0 {
            index = self.word(self.params.sq_off[6] + 4 * index).load(Ordering::Relaxed);
        }
        // SAFETY: the index is below the number of entries, and the worker has filled this one.
        let entry = unsafe { self.entries.add(index as usize * SQE).cast::<[u8; SQE]>().read() };
        head.store(at.wrapping_add(1), Ordering::Release);
        Some(entry)
    }

    fn completions(&self) -> u32 {
        let (head, tail) = (self.word(self.params.cq_off[0]), self.word(self.params.cq_off[1]));
        tail.load(Ordering::Relaxed).wrapping_sub(head.load(Ordering::Acquire))
    }

    fn complete(&self, done: Done) {
        let tail = self.word(self.params.cq_off[1]);
        let at = tail.load(Ordering::Relaxed);
        let place = self.params.cq_off[5] as usize + (at & (self.params.cq_entries - 1)) as usize * CQE;
        // SAFETY: a place of the completion queue that the worker has read, as there is room.
        unsafe {
            self.rings.add(place).cast::<u64>().write(done.tag);
            self.rings.add(place + 8).cast::<[i32; 2]>().write([done.result, 0]);
        }
        tail.store(at.wrapping_add(1), Ordering::Release);
    }

    fn flag(&self, flag: u32, set: bool) {
        let flags = self.word(self.params.sq_off[4]);
        if set {
            flags.fetch_or(flag, Ordering::AcqRel);
        } else {
            flags.fetch_and(!flag, Ordering::AcqRel);
        }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: both are this value's own mappings.
        unsafe {
            libc::munmap(self.rings.cast(), self.rings_len);
            libc::munmap(self.entries.cast(), self.params.sq_entries as usize * SQE);
        }
    }
}

#[derive(Clone, Copy, Debug)]
struct Done {
    tag: u64,
    result: i32,
    write: bool,
}

/// One entry, taken apart.
#[derive(Clone, Copy, Debug)]
struct Asked {
    operation: u8,
    flags: u8,
    file: usize,
    at: *mut u8,
    len: usize,
    nowait: bool,
    tag: u64,
}

impl Asked {
    fn of(entry: &[u8; SQE]) -> Self {
        let long = |at: usize| u64::from_ne_bytes(entry[at..at + 8].try_into().unwrap());
        let word = |at: usize| u32::from_ne_bytes(entry[at..at + 4].try_into().unwrap());
        Self {
            operation: entry[0],
            flags: entry[1],
            file: word(4) as usize,
            at: std::ptr::with_exposed_provenance_mut(long(16) as usize),
            len: word(24) as usize,
            nowait: word(28) & libc::RWF_NOWAIT as u32 != 0,
            tag: long(32),
        }
    }

    fn is_read(&self) -> bool {
        matches!(self.operation, IORING_OP_READ | IORING_OP_READ_FIXED)
    }
}

/// What the fake may do apart from its duty.
#[derive(Clone, Copy, Debug)]
struct Faults {
    /// Of a hundred entries into the kernel: those that are refused, and that stop in the middle.
    refuse: u32,
    partial: u32,
    /// Of a hundred completions: those that come with a later entry.
    late: u32,
    /// Completions that have room.
    room: u32,
    /// Of a hundred writes: EAGAIN and EINVAL.
    full: u32,
    bad: u32,
}

impl Faults {
    const NONE: Self = Self {
        refuse: 0,
        partial: 0,
        late: 0,
        room: RING_COMPLETIONS,
        full: 0,
        bad: 0,
    };
}

struct State {
    memory: Memory,
    faults: Faults,
    chance: u64,
    /// What lies in the queue of each file, and what was written to it.
    queued: Vec<VecDeque<Vec<u8>>>,
    written: Vec<Vec<Vec<u8>>>,
    /// Reads and polls that wait.
    waiting: Vec<Asked>,
    /// Completions that are to come.
    backlog: VecDeque<Done>,
    /// Refuses this often from now on, with this errno.
    refusals: (u32, i32),
    /// Takes no cancellation.
    stuck: bool,
    /// Keeps the next cancellation waiting for so long, and does not take it.
    stall: Duration,
    taken: u64,
    completed: u64,
    overflows: u64,
    partials: u64,
    refused: u64,
}

impl State {
    fn dice(&mut self, of_a_hundred: u32) -> bool {
        self.draw(100) < of_a_hundred
    }

    fn draw(&mut self, below: u32) -> u32 {
        // xorshift64*
        self.chance ^= self.chance >> 12;
        self.chance ^= self.chance << 25;
        self.chance ^= self.chance >> 27;
        ((self.chance.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) % u64::from(below)) as u32
    }

    fn enter(&mut self, to_submit: u32, min_complete: u32, events: bool, timeout: bool) -> io::Result<u32> {
        if self.refusals.0 > 0 || self.dice(self.faults.refuse) {
            let drawn = [libc::EAGAIN, libc::EBUSY, libc::ENOMEM, libc::EINTR][self.draw(4) as usize];
            let errno = if self.refusals.0 > 0 { self.refusals.1 } else { drawn };
            self.refusals.0 = self.refusals.0.saturating_sub(1);
            self.refused += 1;
            return Err(io::Error::from_raw_os_error(errno));
        }
        let mut most = to_submit;
        if to_submit > 0 && self.dice(self.faults.partial) {
            most = self.draw(to_submit);
            self.partials += 1;
        }
        let taken = self.submit(most);
        if taken < to_submit {
            return Ok(taken);
        }
        if events {
            self.memory.flag(IORING_SQ_TASKRUN, false);
            self.serve_waiting();
            self.flush(self.faults.late);
            if self.memory.completions() < min_complete {
                self.flush(0);
            }
            if self.memory.completions() < min_complete && taken == 0 {
                // Nothing is going to happen: the time is over, or a signal comes.
                return Err(io::Error::from_raw_os_error(if timeout {
                    libc::ETIME
                } else {
                    libc::EINTR
                }));
            }
        } else if self.waiting.iter().any(|asked| self.is_ready(asked)) {
            self.memory.flag(IORING_SQ_TASKRUN, true);
        }
        Ok(taken)
    }

    /// Takes up to `most` entries and performs them: writes in order, reads in any order, since any
    /// of them may be the first at the queue.
    fn submit(&mut self, most: u32) -> u32 {
        let mut entries = Vec::new();
        while (entries.len() as u32) < most
            && let Some(entry) = self.memory.take_entry()
        {
            entries.push(Asked::of(&entry));
        }
        let taken = entries.len() as u32;
        self.taken += u64::from(taken);
        let mut cancelled = false;
        while !entries.is_empty() {
            let reads = entries.iter().take_while(|asked| asked.is_read()).count();
            let next = if reads > 1 && self.dice(self.faults.late) {
                self.draw(reads as u32) as usize
            } else {
                0
            };
            let asked = entries.remove(next);
            let linked = asked.flags & IOSQE_IO_LINK != 0;
            let result = if cancelled {
                Some(-libc::ECANCELED)
            } else {
                self.perform(&asked)
            };
            match result {
                Some(result) => {
                    cancelled = linked && (cancelled || result < 0);
                    let write = !asked.is_read();
                    self.done(asked.tag, result, write);
                }
                None => self.waiting.push(asked),
            }
        }
        taken
    }

    /// A packet comes: who waits for it is woken.
    fn arrive(&mut self, file: usize, packet: Vec<u8>) {
        self.queued[file].push_back(packet);
        if self.waiting.iter().any(|asked| asked.file == file) {
            self.memory.flag(IORING_SQ_TASKRUN, true);
        }
    }

    fn is_ready(&self, asked: &Asked) -> bool {
        !self.queued[asked.file].is_empty()
    }

    /// The result; `None` if it waits.
    fn perform(&mut self, asked: &Asked) -> Option<i32> {
        match asked.operation {
            IORING_OP_POLL_ADD => self.is_ready(asked).then_some(libc::POLLIN.into()),
            IORING_OP_READ | IORING_OP_READ_FIXED if asked.len == 0 => Some(0),
            IORING_OP_READ | IORING_OP_READ_FIXED => match self.queued[asked.file].pop_front() {
                Some(packet) => {
                    assert!(packet.len() < asked.len);
                    // SAFETY: the worker lends these bytes until the read completes.
                    unsafe { asked.at.copy_from_nonoverlapping(packet.as_ptr(), packet.len()) };
                    Some(packet.len() as i32)
                }
                None => asked.nowait.then_some(-libc::EAGAIN),
            },
            IORING_OP_WRITE | IORING_OP_WRITE_FIXED | IORING_OP_WRITEV => {
                assert_ne!(asked.operation, IORING_OP_WRITEV, "no offloads here");
                if self.dice(self.faults.full) {
                    return Some(-libc::EAGAIN);
                }
                if self.dice(self.faults.bad) {
                    return Some(-libc::EINVAL);
                }
                // SAFETY: the worker keeps these bytes until the write completes.
                let packet = unsafe { std::slice::from_raw_parts(asked.at, asked.len) }.to_vec();
                self.written[asked.file].push(packet);
                Some(asked.len as i32)
            }
            operation => panic!("operation {operation}"),
        }
    }

    fn serve_waiting(&mut self) {
        for asked in std::mem::take(&mut self.waiting) {
            match self.perform(&asked) {
                Some(result) => self.done(asked.tag, result, false),
                None => self.waiting.push(asked),
            }
        }
    }

    fn done(&mut self, tag: u64, result: i32, write: bool) {
        let done = Done { tag, result, write };
        if !self.backlog.is_empty() || self.dice(self.faults.late) || !self.has_room() {
            if !self.has_room() {
                self.overflows += 1;
                self.memory.flag(IORING_SQ_CQ_OVERFLOW, true);
            } else {
                self.memory.flag(IORING_SQ_TASKRUN, true);
            }
            // Results of writes may come in any order; reads give away packets, in theirs.
            let first_write = self
                .backlog
                .iter()
                .rposition(|other| !other.write)
                .map_or(0, |at| at + 1);
            let place = if write && self.backlog.len() > first_write {
                first_write + self.draw((self.backlog.len() - first_write) as u32 + 1) as usize
            } else {
                self.backlog.len()
            };
            return self.backlog.insert(place, done);
        }
        self.completed += 1;
        self.memory.complete(done);
    }

    fn has_room(&self) -> bool {
        self.memory.completions() < self.faults.room
    }

    /// Posts what is to come, and stops at any with this chance.
    fn flush(&mut self, stop: u32) {
        while self.has_room() && !self.dice(stop) {
            let Some(done) = self.backlog.pop_front() else { break };
            self.completed += 1;
            self.memory.complete(done);
        }
        let room = self.has_room();
        self.memory
            .flag(IORING_SQ_CQ_OVERFLOW, !self.backlog.is_empty() && !room);
        self.memory.flag(IORING_SQ_TASKRUN, !self.backlog.is_empty() && room);
    }

    fn cancel(&mut self) -> io::Result<()> {
        if self.dice(self.faults.refuse) {
            return Err(io::Error::from_raw_os_error(libc::EINTR));
        }
        let stall = std::mem::take(&mut self.stall);
        std::thread::sleep(stall);
        if !self.stuck && stall.is_zero() {
            // What was there in time is not cancelled.
            self.serve_waiting();
            for asked in std::mem::take(&mut self.waiting) {
                self.done(asked.tag, -libc::ECANCELED, false);
            }
        }
        Ok(())
    }
}

struct Standin(Rc<RefCell<State>>);

impl fake::Kernel for Standin {
    fn enter(&mut self, to_submit: u32, min_complete: u32, events: bool, timeout: Option<Duration>) -> io::Result<u32> {
        let mut state = self.0.borrow_mut();
        state.enter(to_submit, min_complete, events, timeout.is_some())
    }

    fn cancel(&mut self) -> io::Result<()> {
        self.0.borrow_mut().cancel()
    }
}

/// A worker on a fake kernel.
struct Rig {
    worker: Worker,
    ports: Vec<PortId>,
    kernel: Rc<RefCell<State>>,
}

impl Rig {
    fn new(queues: usize, chance: u64) -> Self {
        Self::with_reserve(queues, chance, 8)
    }

    fn with_reserve(queues: usize, chance: u64, receive_reserve: usize) -> Self {
        let device = Builder::new("", Mode::Tun).queues(queues).open().expect("a device");
        let mut worker = Worker::new(&WorkerConfig {
            backend: Some(Backend::IoUring),
            buffers: 512,
            receive_reserve,
            wait: Wait::Block,
            ..WorkerConfig::default()
        })
        .expect("a worker");
        let Imp::Ring(ring) = &worker.backend else {
            unreachable!("forced")
        };
        let files = super::config::MOST_PORTS + 1;
        let kernel = Rc::new(RefCell::new(State {
            memory: Memory::of(&**ring),
            faults: Faults::NONE,
            chance: chance | 1,
            queued: vec![VecDeque::new(); files],
            written: vec![Vec::new(); files],
            waiting: Vec::new(),
            backlog: VecDeque::new(),
            refusals: (0, 0),
            stuck: false,
            stall: Duration::ZERO,
            taken: 0,
            completed: 0,
            overflows: 0,
            partials: 0,
            refused: 0,
        }));
        fake::install(Some(Box::new(Standin(Rc::clone(&kernel)))));
        let queues = device.into_queues().into_iter();
        let ports = queues.map(|queue| worker.attach(queue).expect("a port")).collect();
        Self { worker, ports, kernel }
    }

    fn state(&self) -> std::cell::RefMut<'_, State> {
        self.kernel.borrow_mut()
    }

    /// Ends all of it: nothing is in flight, each entry was completed and reaped, each buffer is
    /// back.
    fn end(mut self, batches: impl Sized) {
        self.state().faults = Faults::NONE;
        drop(batches);
        // What could not be submitted before is now.
        self.worker.wait(Some(Instant::now())).expect("a ring that works");
        for port in self.worker.ports().collect::<Vec<_>>() {
            drop(self.worker.detach(port).expect("the port comes off"));
        }
        let (free, all) = self.worker.buffers();
        assert_eq!(free, all, "a buffer is lost");
        assert!(self.worker.let_go(), "the kernel has let go");
        let Imp::Ring(ring) = &self.worker.backend else {
            unreachable!("forced")
        };
        assert_eq!(ring.outstanding(), 0);
        let state = self.kernel.borrow();
        assert_eq!(state.taken, state.completed);
        assert_eq!((state.memory.completions(), state.backlog.len()), (0, 0));
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        // Not before the worker is closed.
        let _ = self.worker.let_go();
        fake::install(None);
    }
}

/// Whether devices and rings can be had here. The namespace is this thread's.
fn ready() -> bool {
    let entered = std::fs::File::options()
        .read(true)
        .write(true)
        .open("/dev/net/tun")
        .and_then(|_| Sandbox::enter());
    if let Err(error) = entered {
        assert!(
            std::env::var_os("TUN_DRIVER_REQUIRE_NETNS").is_none(),
            "no network namespace: {error}"
        );
        eprintln!("skipped: no device in a namespace can be had: {error}");
        return false;
    }
    if Support::probe().tun_nowait == Some(false) {
        eprintln!("skipped: the ring backend needs Linux 6.4");
        return false;
    }
    true
}

fn packet(number: u32) -> Vec<u8> {
    let mut packet = vec![0x45; 20 + number as usize % 200];
    packet[4..8].copy_from_slice(&number.to_ne_bytes());
    packet
}

fn number(packet: &[u8]) -> u32 {
    assert!(packet.len() >= 20 && packet[0] == 0x45, "not a packet of this test");
    let number = u32::from_ne_bytes(packet[4..8].try_into().unwrap());
    assert!(packet.len() == 20 + number as usize % 200, "of another length");
    number
}

/// What is done with the worker.
#[derive(Clone, Debug)]
enum Act {
    Arrive(usize, u32),
    Receive(usize, usize),
    Send(usize, usize),
    Wait,
    Release,
    Detach(usize),
}

fn acts() -> impl Strategy<Value = Vec<Act>> {
    let act = prop_oneof![
        4 => (0usize..3, 1u32..80).prop_map(|(port, count)| Act::Arrive(port, count)),
        5 => (0usize..3, 1usize..70).prop_map(|(port, room)| Act::Receive(port, room)),
        4 => (0usize..3, 1usize..100).prop_map(|(port, count)| Act::Send(port, count)),
        3 => Just(Act::Wait),
        2 => Just(Act::Release),
        1 => (0usize..3).prop_map(Act::Detach),
    ];
    prop::collection::vec(act, 1..60)
}

fn faults() -> impl Strategy<Value = Faults> {
    let room = prop::sample::select(vec![8, 32, RING_COMPLETIONS]);
    let per_cent = || prop::sample::select(vec![0u32, 0, 10, 40]);
    (per_cent(), per_cent(), per_cent(), room, per_cent(), per_cent()).prop_map(
        |(refuse, partial, late, room, full, bad)| Faults {
            refuse,
            partial,
            late,
            room,
            full: full / 4,
            bad: bad / 4,
        },
    )
}

// T3, T14, T15, T16
#[test]
fn whatever_the_ring_does_each_packet_and_each_buffer_is_accounted_for() {
    if !ready() {
        return;
    }
    let cases = if std::env::var_os("TUN_DRIVER_LONG").is_some_and(|long| long != "0" && !long.is_empty()) {
        5_000
    } else {
        200
    };
    let seen = RefCell::new([0_u64; 3]);
    let config = ProptestConfig {
        max_shrink_iters: 60,
        ..ProptestConfig::with_cases(cases)
    };
    proptest!(config, |(acts in acts(), faults in faults(), chance in any::<u64>())| {
        let mut rig = Rig::new(3, chance);
        rig.state().faults = faults;
        let state = play(&mut rig, &acts);
        let mut seen = seen.borrow_mut();
        let kernel = rig.kernel.clone();
        rig.end(state);
        let kernel = kernel.borrow();
        seen[0] += kernel.partials;
        seen[1] += kernel.overflows;
        seen[2] += kernel.refused;
    });
    let seen = *seen.borrow();
    assert!(seen.iter().all(|&count| count > 0), "a fault never came: {seen:?}");
}

/// Plays the acts and checks what becomes of each packet. Returns what is still held.
fn play(rig: &mut Rig, acts: &[Act]) -> Vec<PacketBuf> {
    let mut held: Vec<PacketBuf> = Vec::new();
    let mut arrived = [0_u32; 3];
    let mut received = [0_u32; 3];
    let (mut offered, mut consumed) = ([0_u32; 3], [0_usize; 3]);
    let mut outgoing: [Batch; 3] = std::array::from_fn(|_| Batch::with_capacity(100));
    let mut gone = [false; 3];
    let mut accepted = [0_usize; 3];
    let take = |batch: &mut Batch, port: usize, received: &mut [u32; 3], held: &mut Vec<PacketBuf>| {
        for packet in batch.drain() {
            assert_eq!(number(&packet), received[port], "lost, doubled or overtaken");
            received[port] += 1;
            held.push(packet);
        }
    };
    let receive = |rig: &mut Rig, port: usize, room: usize, received: &mut [u32; 3], held: &mut Vec<PacketBuf>| {
        let mut batch = Batch::with_capacity(room);
        match rig.worker.try_recv_many(rig.ports[port], &mut batch) {
            Ok(count) => assert_eq!(count, batch.len()),
            Err(error) => {
                assert!(batch.is_empty());
                let kinds = [PortErrorKind::NoBuffers, PortErrorKind::Other];
                assert!(kinds.contains(&error.kind()), "{error}");
            }
        }
        take(&mut batch, port, received, held);
    };
    for act in acts {
        match *act {
            Act::Arrive(port, count) if !gone[port] => {
                for _ in 0..count {
                    rig.state().arrive(port + 1, packet(arrived[port]));
                    arrived[port] += 1;
                }
            }
            Act::Receive(port, room) if !gone[port] => receive(rig, port, room, &mut received, &mut held),
            Act::Send(port, count) if !gone[port] => {
                let batch = &mut outgoing[port];
                while batch.len() < count
                    && let Some(new) = rig.worker.packet_from(&packet(offered[port]))
                {
                    batch.push(new).unwrap();
                    offered[port] += 1;
                }
                let before = batch.len();
                let sent = rig.worker.send_many(rig.ports[port], batch);
                assert_eq!(before, sent.accepted + sent.refused + batch.len());
                assert!(batch.is_empty() || sent.stopped.is_some(), "{sent:?}");
                consumed[port] += sent.accepted + sent.refused;
                accepted[port] += sent.accepted;
            }
            Act::Wait => {
                rig.worker.wait(Some(Instant::now())).unwrap();
            }
            Act::Release => held.clear(),
            Act::Detach(port) if !gone[port] => match rig.worker.detach(rig.ports[port]) {
                Ok(mut detached) => {
                    take(&mut detached.undelivered, port, &mut received, &mut held);
                    gone[port] = true;
                }
                // Refused for the moment: it stays.
                Err(error) => assert_eq!(error.kind(), PortErrorKind::Other),
            },
            _ => {}
        }
    }
    // What arrived is all there, once there are buffers and the kernel is well again.
    rig.state().faults = Faults::NONE;
    for port in (0..3).filter(|&port| !gone[port]) {
        let deadline = Instant::now() + Duration::from_secs(20);
        while received[port] < arrived[port] {
            assert!(Instant::now() < deadline, "{} of {}", received[port], arrived[port]);
            held.clear();
            rig.worker.wait(Some(Instant::now())).unwrap();
            receive(rig, port, 64, &mut received, &mut held);
        }
    }
    for port in 0..3 {
        let state = rig.state();
        let written: Vec<u32> = state.written[port + 1].iter().map(|packet| number(packet)).collect();
        assert!(
            written.is_sorted_by(|one, next| one < next),
            "doubled or overtaken: {written:?}"
        );
        assert_eq!(written.len(), accepted[port]);
        assert_eq!(consumed[port] + outgoing[port].len(), offered[port] as usize);
    }
    held.extend(
        outgoing
            .into_iter()
            .flat_map(|mut batch| batch.drain().collect::<Vec<_>>()),
    );
    held
}

// T3
#[test]
fn a_ring_that_is_refused_for_seconds_recovers_and_loses_nothing() {
    if !ready() {
        return;
    }
    for errno in [libc::EAGAIN, libc::ENOMEM, libc::EBUSY] {
        let mut rig = Rig::new(1, 7);
        let port = rig.ports[0];
        rig.state().refusals = (110, errno);
        let mut batch = Batch::with_capacity(64);
        (0..10).for_each(|number| batch.push(rig.worker.packet_from(&packet(number)).unwrap()).unwrap());
        let end = Instant::now() + Duration::from_secs(60);
        while !batch.is_empty() {
            // A ring that is given up takes nothing ever.
            assert!(Instant::now() < end, "{} packets left", batch.len());
            // What stopped it is what the kernel said; then the rest may be sent.
            let sent = rig.worker.send_many(port, &mut batch);
            assert!(
                sent.stopped.is_none_or(|error| error.raw_os_error() == errno),
                "{sent:?}"
            );
        }
        assert_eq!(rig.state().written[1].len(), 10);
        assert!(rig.worker.stats().counters.refused_entries >= 110);
        // A receive says so, where nothing came; a wait goes on, and the time ends it.
        rig.state().arrive(1, packet(0));
        rig.state().refusals = (u32::MAX, errno);
        let error = rig.worker.try_recv_many(port, &mut batch).unwrap_err();
        assert_eq!((error.call(), error.raw_os_error()), ("io_uring_enter", errno));
        let bound = Instant::now() + Duration::from_millis(50);
        assert!(rig.worker.wait(Some(bound)).unwrap().timer);
        let waker = rig.worker.waker();
        waker.wake();
        assert!(rig.worker.wait(None).unwrap().woken);
        let error = rig.worker.detach(port).unwrap_err();
        assert_eq!((error.call(), error.raw_os_error()), ("io_uring_enter", errno));
        rig.state().refusals = (0, 0);
        while rig.worker.recv_many(port, &mut batch).unwrap() == 0 {}
        assert_eq!(number(&batch[0]), 0);
        rig.end(batch);
    }
}

// T3
#[test]
fn a_ring_that_stays_refused_keeps_the_cause_in_every_call() {
    if !ready() {
        return;
    }
    // With writes in flight it is given up: the packets are not touched again.
    let sending = std::thread::spawn(|| {
        assert!(ready());
        let mut rig = Rig::new(1, 7);
        let port = rig.ports[0];
        let mut batch = Batch::with_capacity(4);
        batch.push(rig.worker.packet_from(&packet(0)).unwrap()).unwrap();
        rig.state().refusals = (u32::MAX, libc::ENOMEM);
        let sent = rig.worker.send_many(port, &mut batch);
        assert_eq!((sent.accepted, sent.refused, batch.len()), (0, 0, 1));
        let error = sent.stopped.expect("a cause");
        assert_eq!((error.call(), error.raw_os_error()), ("io_uring_enter", libc::ENOMEM));
        rig.state().refusals = (0, 0);
        let mut none = Batch::with_capacity(4);
        for error in [
            rig.worker.try_recv_many(port, &mut none).unwrap_err(),
            rig.worker.recv_many(port, &mut none).unwrap_err(),
            rig.worker.send_many(port, &mut batch).stopped.unwrap(),
            rig.worker.detach(port).unwrap_err(),
        ] {
            assert_eq!((error.call(), error.raw_os_error()), ("io_uring_enter", libc::ENOMEM));
        }
        let error = rig.worker.wait(None).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ENOMEM));
        let device = Builder::new("", Mode::Tun).open().unwrap();
        let error = rig.worker.attach(device.into_queues().remove(0)).unwrap_err();
        assert_eq!(
            (error.call(), error.raw_os_error()),
            ("io_uring_enter", Some(libc::ENOMEM))
        );
        // The write was never taken, and is not taken by the end.
        drop(rig);
    });
    // Without, a wait ends after some time, and the next one tries again.
    let mut rig = Rig::new(1, 7);
    rig.state().refusals = (u32::MAX, libc::EBUSY);
    let error = rig.worker.wait(None).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EBUSY));
    rig.state().refusals = (0, 0);
    rig.state().arrive(1, packet(0));
    assert_eq!(rig.worker.wait(None).unwrap().ready, 1);
    rig.end(());
    sending.join().expect("no panic");
}

// T3
#[test]
fn a_wait_whose_time_is_over_does_not_insist_on_a_ring_that_is_refused() {
    if !ready() {
        return;
    }
    for wait in [
        Wait::Block,
        Wait::Spin {
            duration: Duration::from_micros(1),
        },
    ] {
        let mut rig = Rig::new(1, 7);
        rig.worker.cx.wait = wait;
        {
            let mut state = rig.state();
            state.refusals = (u32::MAX, libc::EAGAIN);
            // Completions are due, which only an entry brings.
            state.memory.flag(IORING_SQ_TASKRUN, true);
        }
        assert!(rig.worker.wait(Some(Instant::now())).unwrap().timer);
        let tries = rig.state().refused;
        assert!(tries <= 4, "{wait:?}: {tries}");
        rig.state().refusals = (0, 0);
        rig.end(());
    }
}

// T3
#[test]
fn a_stop_ends_every_call_on_a_ring_that_is_refused() {
    if !ready() {
        return;
    }
    let mut rig = Rig::new(1, 7);
    let port = rig.ports[0];
    let waker = rig.worker.waker();
    rig.state().refusals = (u32::MAX, libc::EAGAIN);
    let stopping = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(50));
        waker.stop();
    });
    assert!(rig.worker.wait(None).unwrap().stopped);
    stopping.join().unwrap();
    let mut batch = Batch::with_capacity(4);
    assert!(rig.worker.try_recv_many(port, &mut batch).is_err());
    assert!(rig.worker.detach(port).is_err());
    rig.state().refusals = (0, 0);
    rig.end(batch);
}

// T15
#[test]
fn more_ports_than_the_submission_queue_has_room_for_are_served_while_the_kernel_takes_few() {
    if !ready() {
        return;
    }
    let mut rig = Rig::with_reserve(1, 7, 1);
    let sockets = 200;
    for _ in 0..sockets {
        let socket = UdpSocket::bind("127.0.0.1:0").expect("a socket");
        rig.worker.attach(socket).expect("a port");
    }
    // Nothing is taken: what has no room is not armed, and nothing is lost by it.
    rig.state().refusals = (u32::MAX, libc::EAGAIN);
    rig.worker.waker().wake();
    for _ in 0..3 {
        rig.worker.wait(Some(Instant::now())).unwrap();
    }
    rig.state().refusals = (0, 0);
    rig.state().faults.partial = 60;
    // Three calls, unless a slow machine is still in the pause that follows a refusal.
    let deadline = Instant::now() + Duration::from_secs(10);
    while rig.state().waiting.len() < sockets + 2 && Instant::now() < deadline {
        rig.worker.wait(Some(Instant::now())).unwrap();
    }
    // The queue, all sockets, and the doorbell, each once.
    let mut files: Vec<usize> = rig.state().waiting.iter().map(|asked| asked.file).collect();
    files.sort_unstable();
    assert_eq!(files, (0..sockets + 2).collect::<Vec<_>>());
    rig.state().arrive(sockets + 1, Vec::new());
    assert_eq!(rig.worker.wait(None).unwrap().ready, 1);
    rig.end(());
}

/// A worker with so many ports that arming them fills the submission queue.
fn with_many_ports() -> Rig {
    let mut rig = Rig::with_reserve(1, 7, 1);
    for _ in 0..200 {
        let socket = UdpSocket::bind("127.0.0.1:0").expect("a socket");
        rig.worker.attach(socket).expect("a port");
    }
    rig
}

// T3, T15
#[test]
fn a_wait_that_finds_no_room_for_all_ports_ends_in_time_while_the_ring_is_refused() {
    if !ready() {
        return;
    }
    let mut rig = with_many_ports();
    rig.state().refusals = (u32::MAX, libc::EAGAIN);
    // Each refusal is followed by a pause, so tries stand for time.
    assert!(rig.worker.wait(Some(Instant::now())).unwrap().timer);
    let tries = rig.state().refused;
    assert!(tries <= 4, "{tries}");
    rig.state().refusals = (0, 0);
    rig.end(());
}

// T3
#[test]
fn a_wake_up_ends_a_receive_while_the_ring_is_refused() {
    if !ready() {
        return;
    }
    for armed in [false, true] {
        let mut rig = with_many_ports();
        let port = rig.ports[0];
        if armed {
            rig.worker.wait(Some(Instant::now())).unwrap();
        }
        {
            let mut state = rig.state();
            state.refusals = (u32::MAX, libc::EAGAIN);
            // Completions are due, which only an entry brings.
            state.memory.flag(IORING_SQ_TASKRUN, true);
        }
        let mut batch = Batch::with_capacity(4);
        assert!(rig.worker.try_recv_many(port, &mut batch).is_err());
        let before = rig.state().refused;
        rig.worker.waker().wake();
        assert_eq!(rig.worker.recv_many(port, &mut batch), Ok(0));
        let tries = rig.state().refused - before;
        assert!(tries <= 4, "{tries}");
        rig.state().refusals = (0, 0);
        rig.end(batch);
    }
}

// T3
#[test]
fn what_a_full_ring_does_not_take_stays_with_the_true_cause() {
    if !ready() {
        return;
    }
    let mut rig = with_many_ports();
    let port = rig.ports[0];
    // Half of the submission queue is taken by what is to be armed, and stays so.
    let mut batch = Batch::with_capacity(64);
    for number in 0..64 {
        batch.push(rig.worker.packet_from(&packet(number)).unwrap()).unwrap();
    }
    let Imp::Ring(ring) = &mut rig.worker.backend else {
        unreachable!("forced")
    };
    for index in 1..100 {
        ring.arm(&mut rig.worker.cx, &mut rig.worker.ports, index, None);
    }
    rig.state().refusals = (u32::MAX, libc::EAGAIN);
    let sent = rig.worker.send_many(port, &mut batch);
    assert_eq!((sent.accepted, sent.refused, batch.len()), (0, 0, 64));
    let error = sent.stopped.expect("a cause");
    assert_eq!((error.call(), error.raw_os_error()), ("io_uring_enter", libc::EAGAIN));
    assert_eq!(error.kind(), PortErrorKind::Other);
    assert!(error.to_string().contains("use Backend::Syscalls"), "{error}");
    // Nothing of it was lost or left with the kernel.
    rig.state().refusals = (0, 0);
    assert_eq!(rig.worker.send_many(port, &mut batch).accepted, 64);
    rig.end(batch);
}

// T1, T24
#[test]
fn a_worker_that_was_stopped_while_it_ended_leaks_nothing() {
    if !ready() {
        return;
    }
    let mut rig = Rig::new(1, 7);
    rig.worker.wait(Some(Instant::now())).unwrap();
    // All the time that is allowed goes by in the first call.
    rig.state().stall = Duration::from_millis(2_100);
    assert!(rig.worker.let_go(), "the kernel has let go");
}

// T1
#[test]
fn memory_that_the_kernel_does_not_let_go_of_is_leaked_and_counted() {
    // In a process whose count of leaked arenas is its own.
    const IN_CHILD: &str = "TUN_DRIVER_IN_CHILD";
    if std::env::var_os(IN_CHILD).is_some() {
        return leaks_what_the_kernel_keeps();
    }
    let name = "worker::fake_ring::memory_that_the_kernel_does_not_let_go_of_is_leaked_and_counted";
    let output = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", name])
        .env(IN_CHILD, "1")
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && said.contains("1 passed"), "{said}");
}

fn leaks_what_the_kernel_keeps() {
    if !ready() {
        return;
    }
    let mut rig = Rig::new(1, 7);
    rig.worker.wait(Some(Instant::now())).unwrap();
    rig.state().stuck = true;
    let Imp::Ring(ring) = &rig.worker.backend else {
        unreachable!("forced")
    };
    assert!(ring.outstanding() > 0);
    assert!(!rig.worker.let_go());
    assert_eq!(crate::leaked_arenas(), 1);
    // The read ends late: the memory is still there.
    let late = std::mem::take(&mut rig.state().waiting);
    let read = late.iter().find(|asked| asked.is_read()).expect("an armed read");
    // SAFETY: the arena was leaked for this.
    unsafe { read.at.write_bytes(0xa5, read.len) };
}
