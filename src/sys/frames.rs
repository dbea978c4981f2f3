//! Packet sockets (packet(7)): frames out of an interface, and those that come in at one, past the stack.

use std::io;
use std::mem::{offset_of, size_of};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU32, Ordering};

use super::syscall;

/// A packet socket on one interface.
#[derive(Debug)]
pub(crate) struct FrameSocket(OwnedFd);

impl FrameSocket {
    /// For sending only: it receives nothing. Never blocks. Needs CAP_NET_RAW in the calling thread's network namespace.
    pub(crate) fn sender(index: u32) -> io::Result<Self> {
        Self::open(index, 0)
    }

    /// From now on each frame has a [`virtio_net_hdr`](super::virtio_net::virtio_net_hdr) in front.
    pub(crate) fn with_vnet_header(self) -> io::Result<Self> {
        self.set(PACKET_VNET_HDR, &1i32)?;
        Ok(self)
    }

    /// Sends one frame, or what its header tells to cut.
    pub(crate) fn send(&self, frame: &[u8]) -> io::Result<()> {
        // SAFETY: `frame` is readable for its length.
        unsafe { syscall!(send(self.0.as_raw_fd(), frame.as_ptr().cast(), frame.len(), 0)) }.map(drop)
    }

    fn open(index: u32, protocol: u16) -> io::Result<Self> {
        use std::os::fd::FromRawFd;
        let kind = libc::SOCK_RAW | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
        // SAFETY: no memory is passed.
        let fd = unsafe { syscall!(socket(libc::AF_PACKET, kind, 0)) }?;
        // SAFETY: the descriptor is new and nobody else's.
        let socket = Self(unsafe { OwnedFd::from_raw_fd(fd) });
        if index != 0 {
            socket.bind(index, protocol)?;
        }
        Ok(socket)
    }

    fn bind(&self, index: u32, protocol: u16) -> io::Result<()> {
        // SAFETY: all fields are numbers, for which zero is a value.
        let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
        address.sll_family = libc::AF_PACKET as u16;
        address.sll_protocol = protocol.to_be();
        address.sll_ifindex = libc::c_int::try_from(index).map_err(|_| io::Error::from_raw_os_error(libc::ENODEV))?;
        let (at, size) = (
            std::ptr::from_ref(&address).cast(),
            size_of::<libc::sockaddr_ll>() as libc::socklen_t,
        );
        // SAFETY: `address` outlives the call.
        unsafe { syscall!(bind(self.0.as_raw_fd(), at, size)) }.map(drop)
    }

    fn set<T>(&self, option: libc::c_int, value: &T) -> io::Result<()> {
        let (at, size) = (std::ptr::from_ref(value).cast(), size_of::<T>() as libc::socklen_t);
        // SAFETY: `value` is readable for its size and outlives the call; a size that the option does not have is EINVAL.
        unsafe { syscall!(setsockopt(self.0.as_raw_fd(), libc::SOL_PACKET, option, at, size)) }.map(drop)
    }
}

impl AsFd for FrameSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// What comes in at an interface, in memory that the kernel shares (TPACKET_V3): it fills blocks with frames, one block after the other, and
/// hands each over when it is full or [`BLOCK_AGE_MS`] old.
pub(crate) struct FrameRing {
    // Unmapped before the socket is closed.
    memory: memmap2::MmapRaw,
    socket: FrameSocket,
    blocks: usize,
    next: usize,
    counts: RingCounts,
}

/// What became of the frames of a ring, since it was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct RingCounts {
    /// Put into the ring.
    pub(crate) put: u64,
    /// Lost, because no block was free.
    pub(crate) dropped: u64,
    /// Taken out of it.
    pub(crate) taken: u64,
}

/// A frame in the ring.
pub(crate) struct RingFrame<'a> {
    pub(crate) bytes: &'a [u8],
    /// It was longer than a block.
    pub(crate) truncated: bool,
    /// When the kernel put it into the ring: CLOCK_REALTIME in ns.
    pub(crate) time: u64,
}

/// Bytes of a block.
const BLOCK: usize = 128 << 10;

/// Milliseconds until a block is handed over that is not full. Not less: in a trickle each takes a whole block, so that a reader who keeps away
/// for as long as all blocks last loses frames though the ring is nearly empty.
const BLOCK_AGE_MS: u32 = 10;

impl FrameRing {
    /// What comes in from now on, in a ring of `bytes`; what goes out of the interface is not in it.
    pub(crate) fn new(index: u32, bytes: usize) -> io::Result<Self> {
        let socket = FrameSocket::open(0, 0)?;
        socket.set(PACKET_IGNORE_OUTGOING, &1i32)?;
        socket.set(PACKET_VERSION, &TPACKET_V3)?;
        // A number that the kernel wants and this version makes no use of.
        const FRAME: usize = 2 << 10;
        let blocks = bytes.div_ceil(BLOCK).max(2);
        let request = tpacket_req3 {
            tp_block_size: BLOCK as u32,
            tp_block_nr: blocks as u32,
            tp_frame_size: FRAME as u32,
            tp_frame_nr: (blocks * (BLOCK / FRAME)) as u32,
            tp_retire_blk_tov: BLOCK_AGE_MS,
            tp_sizeof_priv: 0,
            tp_feature_req_word: 0,
        };
        socket.set(PACKET_RX_RING, &request)?;
        let memory = memmap2::MmapOptions::new().len(blocks * BLOCK).map_raw(&socket.0)?;
        // Bound last, so that nothing comes before the ring is there, and nothing of other interfaces.
        socket.bind(index, libc::ETH_P_ALL as u16)?;
        Ok(Self {
            memory,
            socket,
            blocks,
            next: 0,
            counts: RingCounts::default(),
        })
    }

    /// Shows the frames of the next block and gives it back; never waits. Returns how many there were, 0 where no block is ready.
    pub(crate) fn take(&mut self, mut show: impl FnMut(RingFrame<'_>)) -> usize {
        // SAFETY: `next` is below `blocks`, so that the block lies inside the mapping, page-aligned, and lives as long as `self`.
        let block = unsafe { self.memory.as_mut_ptr().add(self.next * BLOCK) };
        // SAFETY: as above; both sides take this field for an atomic one.
        let status = unsafe { &(*block.cast::<tpacket_block_desc>()).block_status };
        if status.load(Ordering::Acquire) & TP_STATUS_USER == 0 {
            return 0;
        }
        // SAFETY: the kernel writes nothing of a block that is ours, and it is until the status is written, behind the last use of this slice.
        let bytes = unsafe { std::slice::from_raw_parts(block, BLOCK) };
        let word = |at: usize| u32::from_ne_bytes(bytes[at..at + 4].try_into().expect("four bytes")) as usize;
        let count = word(offset_of!(tpacket_block_desc, num_pkts));
        let mut at = word(offset_of!(tpacket_block_desc, offset_to_first_pkt));
        for _ in 0..count {
            let header = &bytes[at..at + size_of::<tpacket3_hdr>()];
            // SAFETY: as many bytes as the struct has, of which every pattern is a value.
            let header = unsafe { header.as_ptr().cast::<tpacket3_hdr>().read_unaligned() };
            let start = at + usize::from(header.tp_mac);
            show(RingFrame {
                bytes: &bytes[start..start + header.tp_snaplen as usize],
                truncated: header.tp_snaplen < header.tp_len,
                time: u64::from(header.tp_sec) * 1_000_000_000 + u64::from(header.tp_nsec),
            });
            at += header.tp_next_offset as usize;
        }
        status.store(TP_STATUS_KERNEL, Ordering::Release);
        self.next = (self.next + 1) % self.blocks;
        self.counts.taken += count as u64;
        count
    }

    /// What became of the frames so far.
    pub(crate) fn counts(&mut self) -> io::Result<RingCounts> {
        let mut stats = tpacket_stats_v3::default();
        let mut size = size_of::<tpacket_stats_v3>() as libc::socklen_t;
        let (fd, at) = (self.socket.0.as_raw_fd(), (&raw mut stats).cast());
        // SAFETY: `stats` is writable for `size` bytes.
        unsafe { syscall!(getsockopt(fd, libc::SOL_PACKET, PACKET_STATISTICS, at, &mut size)) }?;
        // The kernel begins anew with each look.
        self.counts.dropped += u64::from(stats.tp_drops);
        self.counts.put += u64::from(stats.tp_packets - stats.tp_drops);
        Ok(self.counts)
    }
}

impl AsFd for FrameRing {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

// linux/if_packet.h; not all of them are in libc for every target.
const PACKET_RX_RING: libc::c_int = 5;
const PACKET_STATISTICS: libc::c_int = 6;
const PACKET_VERSION: libc::c_int = 10;
const PACKET_VNET_HDR: libc::c_int = 15;
const PACKET_IGNORE_OUTGOING: libc::c_int = 23;
const TPACKET_V3: libc::c_int = 2;
const TP_STATUS_KERNEL: u32 = 0;
const TP_STATUS_USER: u32 = 1;

/// `struct tpacket_req3`.
#[repr(C)]
#[allow(non_camel_case_types)]
struct tpacket_req3 {
    tp_block_size: u32,
    tp_block_nr: u32,
    tp_frame_size: u32,
    tp_frame_nr: u32,
    tp_retire_blk_tov: u32,
    tp_sizeof_priv: u32,
    tp_feature_req_word: u32,
}

const _: () = assert!(size_of::<tpacket_req3>() == 28);

/// `struct tpacket_block_desc` with the `struct tpacket_hdr_v1` in it, up to what is read here.
#[repr(C)]
#[allow(non_camel_case_types)]
struct tpacket_block_desc {
    version: u32,
    offset_to_priv: u32,
    block_status: AtomicU32,
    num_pkts: u32,
    offset_to_first_pkt: u32,
}

const _: () = assert!(size_of::<tpacket_block_desc>() == 20);

/// `struct tpacket3_hdr` up to what is read here.
#[repr(C)]
#[derive(Clone, Copy)]
#[allow(non_camel_case_types)]
struct tpacket3_hdr {
    tp_next_offset: u32,
    tp_sec: u32,
    tp_nsec: u32,
    tp_snaplen: u32,
    tp_len: u32,
    tp_status: u32,
    tp_mac: u16,
    tp_net: u16,
}

const _: () = assert!(size_of::<tpacket3_hdr>() == 28);

/// `struct tpacket_stats_v3`.
#[repr(C)]
#[derive(Default)]
#[allow(non_camel_case_types)]
struct tpacket_stats_v3 {
    tp_packets: u32,
    tp_drops: u32,
    tp_freeze_q_cnt: u32,
}

const _: () = assert!(size_of::<tpacket_stats_v3>() == 12);
