//! The ways that need nothing of this library: loops over read(2) and write(2), and the floor.
//!
//! The floor is the least that a program can do with io_uring: one file, one region, fixed offsets, no accounting, no choice. What the library
//! costs beyond it is the price of its comforts.

use std::ffi::CString;
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::mem::ManuallyDrop;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicBool, Ordering};

use io_uring::types::Fixed;
use io_uring::{CompletionQueue, IoUring, SubmissionQueue, Submitter, opcode, squeue};
use tun_driver::lab::cases::{Drained, Reply, Runner, Way, turn_around};
use tun_driver::lab::monotonic_ns;

/// One read(2) or write(2) per packet, with one buffer.
#[derive(Clone, Copy, Debug)]
pub(crate) struct PlainLoop {
    /// Whether the descriptor is O_NONBLOCK. A blocking one serves the echo only.
    pub(crate) nonblocking: bool,
}

impl Way for PlainLoop {
    fn name(&self) -> &str {
        if self.nonblocking {
            "read/write, non-blocking"
        } else {
            "read/write, blocking"
        }
    }

    fn open(&self, devices: &[&str]) -> io::Result<Box<dyn Runner>> {
        let devices = devices
            .iter()
            .map(|name| open_tun(name, self.nonblocking))
            .collect::<io::Result<Vec<File>>>()?;
        Ok(Box::new(PlainRunner {
            devices,
            nonblocking: self.nonblocking,
            buffer: vec![0; SLOT_LEN],
            filled: (0, 0),
            calls: 0,
        }))
    }
}

struct PlainRunner {
    devices: Vec<File>,
    nonblocking: bool,
    buffer: Vec<u8>,
    /// Length and number of the packets to send.
    filled: (usize, usize),
    calls: u64,
}

impl Runner for PlainRunner {
    fn drain(&mut self, device: usize, expected: usize) -> io::Result<Drained> {
        if !self.nonblocking {
            return Err(io::Error::new(
                io::ErrorKind::Unsupported,
                "a blocking descriptor cannot be drained",
            ));
        }
        let mut drained = Drained::default();
        while drained.packets < expected {
            self.calls += 1;
            match (&self.devices[device]).read(&mut self.buffer) {
                Ok(len) => {
                    drained.packets += 1;
                    drained.bytes += len;
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => return Err(error),
            }
        }
        Ok(drained)
    }

    fn fill(&mut self, _device: usize, packet: &[u8], count: usize) -> io::Result<()> {
        self.buffer[..packet.len()].copy_from_slice(packet);
        self.filled = (packet.len(), count);
        Ok(())
    }

    fn send(&mut self, device: usize) -> io::Result<usize> {
        let (len, count) = self.filled;
        let mut accepted = 0;
        for _ in 0..count {
            self.calls += 1;
            if (&self.devices[device]).write(&self.buffer[..len])? == len {
                accepted += 1;
            }
        }
        Ok(accepted)
    }

    fn echo(&mut self) -> io::Result<()> {
        let mut device = &self.devices[0];
        loop {
            self.calls += 2;
            if self.nonblocking {
                wait_readable(device)?;
            }
            let len = match device.read(&mut self.buffer) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => continue,
                result => result?,
            };
            match turn_around(&mut self.buffer[..len]) {
                Reply::Send => device.write_all(&self.buffer[..len])?,
                Reply::Ignore => {}
                Reply::Stop => return Ok(()),
            }
        }
    }

    fn calls(&self) -> u64 {
        self.calls
    }
}

/// How the floor sets itself up. The default is what was found best; the other values show what each choice is worth.
#[derive(Clone, Debug)]
pub(crate) struct Floor {
    /// Its name in reports.
    pub(crate) name: &'static str,
    /// Most operations per entry, at most [`BURST`].
    pub(crate) burst: usize,
    /// IORING_ENTER_GETEVENTS in the entry of a burst, though all of its operations complete while they are submitted.
    pub(crate) get_events: bool,
    /// IORING_SETUP_NO_SQARRAY.
    pub(crate) no_sqarray: bool,
    /// IORING_SETUP_SUBMIT_ALL.
    pub(crate) submit_all: bool,
    /// The region is one huge page (MADV_HUGEPAGE).
    pub(crate) huge_page: bool,
    /// The region's buffers are registered and used by READ_FIXED and WRITE_FIXED.
    pub(crate) registered_buffers: bool,
    /// Bytes from one slot to the next.
    pub(crate) stride: usize,
    /// While the echo waits, look for completions instead of sleeping.
    pub(crate) spin: bool,
}

impl Default for Floor {
    fn default() -> Self {
        Self {
            name: "floor",
            burst: BURST,
            get_events: false,
            no_sqarray: true,
            submit_all: true,
            huge_page: false,
            registered_buffers: true,
            stride: SLOT_LEN,
            spin: false,
        }
    }
}

/// The longest burst.
pub(crate) const BURST: usize = 64;

/// Bytes of a slot: a packet of up to 1500 bytes fits.
pub(crate) const SLOT_LEN: usize = 2048;

const SLOTS: usize = 256;
const HUGE_PAGE: usize = 2 << 20;

impl Floor {
    /// The floor, and next to it the same with one choice altered each.
    #[allow(dead_code)] // one of several benchmarks asks for it
    pub(crate) fn variants() -> Vec<Self> {
        let floor = Self::default();
        vec![
            Self {
                name: "floor, GETEVENTS",
                get_events: true,
                ..floor.clone()
            },
            Self {
                name: "floor, with SQ array",
                no_sqarray: false,
                ..floor.clone()
            },
            Self {
                name: "floor, no SUBMIT_ALL",
                submit_all: false,
                ..floor.clone()
            },
            Self {
                name: "floor, huge page",
                huge_page: true,
                ..floor.clone()
            },
            Self {
                name: "floor, unregistered",
                registered_buffers: false,
                ..floor.clone()
            },
            Self {
                name: "floor, stride 2112",
                stride: 2112,
                ..floor.clone()
            },
            Self {
                name: "floor, burst 16",
                burst: 16,
                ..floor.clone()
            },
            Self {
                name: "floor, burst 1",
                burst: 1,
                ..floor
            },
        ]
    }
}

impl Way for Floor {
    fn name(&self) -> &str {
        self.name
    }

    fn open(&self, devices: &[&str]) -> io::Result<Box<dyn Runner>> {
        let devices = devices
            .iter()
            .map(|name| open_tun(name, true))
            .collect::<io::Result<Vec<File>>>()?;
        Ok(Box::new(self.on(devices)?))
    }
}

impl Floor {
    /// On devices that are open already. The thread that calls this is the one that uses it.
    pub(crate) fn on(&self, devices: Vec<File>) -> io::Result<FloorRunner> {
        let region = Region::new(self.stride * SLOTS, self.huge_page)?;
        let ring = Ring::new(self, &devices, &region)?;
        Ok(FloorRunner {
            ring,
            region,
            setup: self.clone(),
            filled: (0, 0),
            came: Vec::with_capacity(BURST),
            calls: 0,
            _devices: devices,
        })
    }
}

// The ring must be dropped before the region that its operations point to.
pub(crate) struct FloorRunner {
    ring: Ring,
    region: Region,
    setup: Floor,
    /// Length and number of the packets to send.
    filled: (usize, usize),
    /// Slots with packets, and their lengths.
    came: Vec<(usize, usize)>,
    calls: u64,
    _devices: Vec<File>,
}

impl FloorRunner {
    fn slot(&self, index: usize) -> *mut u8 {
        debug_assert!(index < SLOTS);
        self.region.at.as_ptr().wrapping_add(index * self.setup.stride)
    }

    fn read(&self, device: usize, slot: usize, flags: i32) -> squeue::Entry {
        let (file, at, len) = (Fixed(device as u32), self.slot(slot), SLOT_LEN as u32);
        if self.setup.registered_buffers {
            opcode::ReadFixed::new(file, at, len, 0).rw_flags(flags).build()
        } else {
            opcode::Read::new(file, at, len).rw_flags(flags).build()
        }
    }

    fn write(&self, device: usize, slot: usize, len: usize, flags: i32) -> squeue::Entry {
        let (file, at, len) = (Fixed(device as u32), self.slot(slot).cast_const(), len as u32);
        if self.setup.registered_buffers {
            opcode::WriteFixed::new(file, at, len, 0).rw_flags(flags).build()
        } else {
            opcode::Write::new(file, at, len).rw_flags(flags).build()
        }
    }

    /// Enters the kernel once; with SUBMIT_ALL that takes all of the `entries`.
    fn run_burst(&mut self, entries: usize) -> io::Result<()> {
        self.calls += 1;
        let taken = self.ring.enter(entries as u32, 0, self.setup.get_events)?;
        if taken == entries {
            Ok(())
        } else {
            Err(io::Error::other(format!("{taken} of {entries} entries taken")))
        }
    }
}

impl Runner for FloorRunner {
    fn drain(&mut self, device: usize, expected: usize) -> io::Result<Drained> {
        let mut drained = Drained::default();
        while drained.packets < expected {
            let asked = (expected - drained.packets).min(self.setup.burst);
            for slot in 0..asked {
                let read = self.read(device, slot, libc::RWF_NOWAIT);
                // SAFETY: the read goes to a slot of the region, which outlives the ring, and which nobody looks at before it has completed.
                unsafe { self.ring.push(&read) }?;
            }
            self.run_burst(asked)?;
            let (mut got, mut bytes) = (0, 0);
            self.ring.reap(asked, |result| match result {
                len if len >= 0 => {
                    got += 1;
                    bytes += len as usize;
                    Ok(())
                }
                empty if empty == -libc::EAGAIN => Ok(()),
                errno => Err(io::Error::from_raw_os_error(-errno)),
            })?;
            drained.packets += got;
            drained.bytes += bytes;
            if got < asked {
                break;
            }
        }
        Ok(drained)
    }

    fn fill(&mut self, _device: usize, packet: &[u8], count: usize) -> io::Result<()> {
        assert!(packet.len() <= SLOT_LEN && count <= SLOTS);
        for slot in 0..count {
            // SAFETY: the slot has SLOT_LEN bytes, enough for the packet, and no operation is under way in it.
            unsafe { ptr::copy_nonoverlapping(packet.as_ptr(), self.slot(slot), packet.len()) };
        }
        self.filled = (packet.len(), count);
        Ok(())
    }

    fn send(&mut self, device: usize) -> io::Result<usize> {
        let (len, count) = self.filled;
        let mut accepted = 0;
        let mut from = 0;
        while from < count {
            let burst = (count - from).min(self.setup.burst);
            for slot in from..from + burst {
                let write = self.write(device, slot, len, libc::RWF_NOWAIT);
                // SAFETY: the write reads a slot of the region, which outlives the ring, and which nobody alters before it has completed.
                unsafe { self.ring.push(&write) }?;
            }
            self.run_burst(burst)?;
            self.ring.reap(burst, |result| {
                accepted += usize::from(result == len as i32);
                Ok(())
            })?;
            from += burst;
        }
        Ok(accepted)
    }

    fn echo(&mut self) -> io::Result<()> {
        // Packets arrive in two slots in turn, so that one may be read into while the other is still being sent.
        let mut slot = 0;
        let read = self.read(0, slot, 0).user_data(READ);
        // SAFETY: as in `drain`; the slot is looked at only after the completion.
        unsafe { self.ring.push(&read) }?;
        let mut under_way = 1;
        loop {
            let len = self.ring.wait(&mut under_way, self.setup.spin)?;
            self.calls += 1;
            // SAFETY: the read into this slot has completed with `len` bytes, at most SLOT_LEN, and no other operation is under way in it.
            let packet = unsafe { std::slice::from_raw_parts_mut(self.slot(slot), len) };
            let reply = turn_around(packet);
            match reply {
                Reply::Send => {
                    let write = self.write(0, slot, len, 0).user_data(WRITE);
                    // SAFETY: as in `send`; the slot is read into again only one packet later, and `wait` waits for this write as well.
                    unsafe { self.ring.push(&write) }?;
                    under_way += 1;
                }
                Reply::Ignore => {}
                Reply::Stop => return Ok(()),
            }
            slot ^= 1;
            let read = self.read(0, slot, 0).user_data(READ);
            // SAFETY: as above.
            unsafe { self.ring.push(&read) }?;
            under_way += 1;
        }
    }

    fn serve(&mut self, each: &mut dyn FnMut(&[u8], u64), over: &AtomicBool) -> io::Result<()> {
        let mut ask = LEAST_ASKED;
        while !over.load(Ordering::Acquire) {
            let read = self.read(0, 0, 0).user_data(READ);
            // SAFETY: as in `drain`; `wait` returns when the read has completed.
            unsafe { self.ring.push(&read) }?;
            let len = self.ring.wait(&mut 1, self.setup.spin)?;
            let now = monotonic_ns();
            // SAFETY: the read into this slot has completed with `len` bytes, at most SLOT_LEN, and no other operation is under way in it.
            each(unsafe { std::slice::from_raw_parts(self.slot(0), len) }, now);
            loop {
                let came = self.burst_in(0, 0, ask)?;
                let now = monotonic_ns();
                for &(slot, len) in &self.came {
                    // SAFETY: as above.
                    each(unsafe { std::slice::from_raw_parts(self.slot(slot), len) }, now);
                }
                if next_ask(&mut ask, came, self.setup.burst) {
                    break;
                }
            }
        }
        Ok(())
    }

    fn calls(&self) -> u64 {
        self.calls
    }
}

impl FloorRunner {
    /// Reads packets that are there into up to `asked` slots from `first` on; `came` has the slots that have one, and its length, in order.
    fn burst_in(&mut self, device: usize, first: usize, asked: usize) -> io::Result<usize> {
        for slot in first..first + asked {
            let read = self.read(device, slot, libc::RWF_NOWAIT).user_data(slot as u64);
            // SAFETY: as in `drain`.
            unsafe { self.ring.push(&read) }?;
        }
        self.run_burst(asked)?;
        self.came.clear();
        let (mut slot, came) = (first, &mut self.came);
        self.ring.reap(asked, |result| {
            match result {
                len if len >= 0 => came.push((slot, len as usize)),
                empty if empty == -libc::EAGAIN => {}
                errno => return Err(io::Error::from_raw_os_error(-errno)),
            }
            slot += 1;
            Ok(())
        })?;
        Ok(self.came.len())
    }

    /// Writes what `came`.
    fn burst_out(&mut self, device: usize) -> io::Result<()> {
        let came = std::mem::take(&mut self.came);
        for &(slot, len) in &came {
            let write = self.write(device, slot, len, libc::RWF_NOWAIT);
            // SAFETY: as in `send`.
            unsafe { self.ring.push(&write) }?;
        }
        self.run_burst(came.len())?;
        // What the device refuses is dropped, as it would be on any wire.
        self.ring.reap(came.len(), |_| Ok(()))?;
        self.came = came;
        Ok(())
    }

    /// Carries packets from each of two devices to the other, until one of them tells an error.
    ///
    /// A read waits at each device; when one has completed, bursts take what else is there. Only entries that wait let the kernel finish what
    /// was armed (DEFER_TASKRUN), so the completions of a burst are in a row.
    #[allow(dead_code)] // for the comparison with other libraries
    pub(crate) fn carry(&mut self) -> io::Result<()> {
        let mut ask = [LEAST_ASKED; 2];
        let mut armed = [false; 2];
        loop {
            for device in [0, 1] {
                if !armed[device] {
                    let read = self.read(device, device * BURST, 0).user_data(device as u64);
                    // SAFETY: as in `drain`; no burst touches the slot before this read has completed.
                    unsafe { self.ring.push(&read) }?;
                    armed[device] = true;
                }
            }
            let mut ready = [None; 2];
            self.ring.wait_any(|device, result| {
                if result < 0 {
                    return Err(io::Error::from_raw_os_error(-result));
                }
                ready[device as usize] = Some(result as usize);
                Ok(())
            })?;
            for (device, first) in ready.into_iter().enumerate() {
                let Some(len) = first else { continue };
                armed[device] = false;
                self.came.clear();
                self.came.push((device * BURST, len));
                self.burst_out(1 - device)?;
                loop {
                    let came = self.burst_in(device, device * BURST, ask[device])?;
                    if came > 0 {
                        self.burst_out(1 - device)?;
                    }
                    if next_ask(&mut ask[device], came, self.setup.burst) {
                        break;
                    }
                }
            }
        }
    }
}

/// Whether all there was came; and how much to ask for next.
fn next_ask(ask: &mut usize, came: usize, most: usize) -> bool {
    let all = came < *ask;
    *ask = if all {
        (came + 1).clamp(LEAST_ASKED, most)
    } else {
        (2 * *ask).min(most)
    };
    all
}

/// The fewest packets that are asked for where it is not known how many there are.
const LEAST_ASKED: usize = 4;

const READ: u64 = 1;
const WRITE: u64 = 2;

/// A ring with its views held open, so that the registered ring descriptor is remembered and the queues' ends are kept between bursts.
struct Ring {
    // The views borrow what `ring` owns; `drop` lets them go first.
    submitter: ManuallyDrop<Submitter<'static>>,
    submission: ManuallyDrop<SubmissionQueue<'static>>,
    completion: ManuallyDrop<CompletionQueue<'static>>,
    ring: NonNull<IoUring>,
}

impl Ring {
    fn new(setup: &Floor, devices: &[File], region: &Region) -> io::Result<Self> {
        let mut builder = IoUring::builder();
        builder
            .dontfork()
            .setup_single_issuer()
            .setup_coop_taskrun()
            .setup_defer_taskrun()
            .setup_taskrun_flag();
        if setup.submit_all {
            builder.setup_submit_all();
        }
        if setup.no_sqarray {
            builder.setup_no_sqarray();
        }
        let ring = NonNull::from(Box::leak(Box::new(builder.build(2 * BURST as u32)?)));
        // SAFETY: the ring was boxed just now; from here on only the three views touch it, and `drop` frees it after them.
        let (submitter, submission, completion) = unsafe { &mut *ring.as_ptr() }.split();
        let mut this = Self {
            submitter: ManuallyDrop::new(submitter),
            submission: ManuallyDrop::new(submission),
            completion: ManuallyDrop::new(completion),
            ring,
        };
        let fds: Vec<_> = devices.iter().map(AsRawFd::as_raw_fd).collect();
        this.submitter.register_files(&fds)?;
        if setup.registered_buffers {
            let whole = [libc::iovec {
                iov_base: region.at.as_ptr().cast(),
                iov_len: region.len,
            }];
            // SAFETY: the caller keeps the region until the ring is dropped.
            unsafe { this.submitter.register_buffers(&whole) }?;
        }
        this.submitter.register_ring_fd()?;
        Ok(this)
    }

    /// # Safety
    /// The memory that the entry points to stays valid, and nobody else uses it, until its completion was reaped.
    unsafe fn push(&mut self, entry: &squeue::Entry) -> io::Result<()> {
        // SAFETY: passed on.
        unsafe { self.submission.push(entry) }.map_err(io::Error::other)
    }

    fn enter(&mut self, submit: u32, wait: u32, get_events: bool) -> io::Result<usize> {
        const IORING_ENTER_GETEVENTS: u32 = 1;
        self.submission.sync();
        let flags = if get_events || wait > 0 {
            IORING_ENTER_GETEVENTS
        } else {
            0
        };
        // SAFETY: no argument is passed; what the entries point to is the promise of whoever pushed them.
        let taken = unsafe { self.submitter.enter::<libc::sigset_t>(submit, wait, flags, None) };
        self.submission.sync();
        taken
    }

    fn reap(&mut self, expected: usize, mut each: impl FnMut(i32) -> io::Result<()>) -> io::Result<()> {
        self.completion.sync();
        for _ in 0..expected {
            let Some(entry) = self.completion.next() else {
                return Err(io::Error::other("an operation did not complete while it was submitted"));
            };
            each(entry.result())?;
        }
        self.completion.sync();
        Ok(())
    }

    /// Submits what was pushed, waits for at least one completion, and shows all that there are.
    fn wait_any(&mut self, mut each: impl FnMut(u64, i32) -> io::Result<()>) -> io::Result<()> {
        let submit = self.submission.len() as u32;
        match self.enter(submit, 1, true) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            result => drop(result?),
        }
        self.completion.sync();
        self.completion
            .by_ref()
            .try_for_each(|entry| each(entry.user_data(), entry.result()))
    }

    /// Submits what was pushed and waits until all of the `under_way` operations have completed. Returns the length that the read gave.
    fn wait(&mut self, under_way: &mut u32, spin: bool) -> io::Result<usize> {
        let mut received = None;
        while *under_way > 0 {
            let submit = self.submission.len() as u32;
            if submit > 0 || !spin || self.submission.taskrun() {
                match self.enter(submit, if spin { 0 } else { *under_way }, true) {
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    result => drop(result?),
                }
            } else {
                std::hint::spin_loop();
            }
            self.completion.sync();
            for entry in self.completion.by_ref() {
                *under_way -= 1;
                if entry.result() < 0 {
                    return Err(io::Error::from_raw_os_error(-entry.result()));
                }
                if entry.user_data() == READ {
                    received = Some(entry.result() as usize);
                }
            }
        }
        received.ok_or_else(|| io::Error::other("nothing was read"))
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        // The devices must not outlive this by the kernel's leisurely end of a ring. Operations are under way only after an error of the
        // echo: a read armed into registered buffers, whose pages the kernel holds itself.
        let _ = self.submitter.unregister_files();
        // SAFETY: each view is dropped once, here, and before the ring that it borrows; the ring came out of a box and is freed once, here.
        unsafe {
            ManuallyDrop::drop(&mut self.completion);
            ManuallyDrop::drop(&mut self.submission);
            ManuallyDrop::drop(&mut self.submitter);
            drop(Box::from_raw(self.ring.as_ptr()));
        }
    }
}

/// Anonymous memory for the slots, aligned to a huge page.
struct Region {
    at: NonNull<u8>,
    len: usize,
}

impl Region {
    fn new(len: usize, huge_page: bool) -> io::Result<Self> {
        let len = len.next_multiple_of(HUGE_PAGE);
        let all = len + HUGE_PAGE;
        // SAFETY: a fresh private mapping at an address of the kernel's choice touches nothing that exists.
        let at = unsafe {
            libc::mmap(
                ptr::null_mut(),
                all,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        if at == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let before = at.cast::<u8>().align_offset(HUGE_PAGE);
        let aligned = at.cast::<u8>().wrapping_add(before);
        let advice = if huge_page {
            libc::MADV_HUGEPAGE
        } else {
            libc::MADV_NOHUGEPAGE
        };
        // SAFETY: the three ranges lie inside the mapping made above, which nobody uses yet. The ends beyond the aligned part are given back.
        let result = unsafe {
            if before > 0 {
                libc::munmap(at, before);
            }
            if HUGE_PAGE > before {
                libc::munmap(aligned.wrapping_add(len).cast(), HUGE_PAGE - before);
            }
            libc::madvise(aligned.cast(), len, advice)
        };
        if result != 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the aligned part is `len` bytes long and mapped for writing.
        unsafe { ptr::write_bytes(aligned, 0, len) };
        let at = NonNull::new(aligned).ok_or_else(|| io::Error::other("a mapping at address 0"))?;
        Ok(Self { at, len })
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        // SAFETY: the mapping is this value's own; the ring that pointed into it was dropped before (field order of its owner).
        unsafe { libc::munmap(self.at.as_ptr().cast(), self.len) };
    }
}

/// Creates a TUN device with one queue and no packet info.
pub(crate) fn open_tun(name: &str, nonblocking: bool) -> io::Result<File> {
    let flags = if nonblocking { libc::O_NONBLOCK } else { 0 };
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(flags)
        .open("/dev/net/tun")?;
    let name = CString::new(name)?;
    // SAFETY: an ifreq is plain data, for which all zeroes is a value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    let bytes = name.as_bytes_with_nul();
    if bytes.len() > request.ifr_name.len() {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "device names have at most 15 bytes",
        ));
    }
    for (place, byte) in request.ifr_name.iter_mut().zip(bytes) {
        *place = *byte as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_TUN | libc::IFF_NO_PI | libc::IFF_TUN_EXCL) as libc::c_short;
    // SAFETY: TUNSETIFF reads and writes one whole ifreq, which lives on this stack.
    if unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF as _, &mut request) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(file)
}

fn wait_readable(device: &File) -> io::Result<()> {
    let mut poll = libc::pollfd {
        fd: device.as_raw_fd(),
        events: libc::POLLIN,
        revents: 0,
    };
    // SAFETY: one pollfd, on this stack.
    if unsafe { libc::poll(&mut poll, 1, -1) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}
