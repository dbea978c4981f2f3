//! `/dev/net/tun` and its ioctls: linux/if_tun.h, implemented by drivers/net/tun.c.
//!
//! Each function is one request. They check nothing and decide nothing; the errnos are explained where they are called.

use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;

use super::netdevice::{IfName, ifreq_named};
use super::{FailedCall, syscall};

/// The node through which every TUN/TAP queue is opened.
pub(crate) const NODE: &str = "/dev/net/tun";

/// MAX_TAP_QUEUES of tun.c: attached and disabled queues of one device together.
pub(crate) const MAX_QUEUES: usize = 256;

/// The misc device number of tun: MISC_MAJOR and TUN_MINOR (linux/miscdevice.h).
pub(crate) const NODE_DEVICE: (u32, u32) = (10, 200);

// The flags of `ifr_flags`, as the unsigned 16 bits that the kernel keeps there.
pub(crate) const IFF_TUN: u16 = libc::IFF_TUN as u16;
pub(crate) const IFF_TAP: u16 = libc::IFF_TAP as u16;
pub(crate) const IFF_NAPI: u16 = libc::IFF_NAPI as u16;
pub(crate) const IFF_NAPI_FRAGS: u16 = libc::IFF_NAPI_FRAGS as u16;
pub(crate) const IFF_NO_PI: u16 = libc::IFF_NO_PI as u16;
pub(crate) const IFF_VNET_HDR: u16 = libc::IFF_VNET_HDR as u16;
pub(crate) const IFF_TUN_EXCL: u16 = libc::IFF_TUN_EXCL as u16;
pub(crate) const IFF_MULTI_QUEUE: u16 = libc::IFF_MULTI_QUEUE as u16;
pub(crate) const IFF_ATTACH_QUEUE: u16 = libc::IFF_ATTACH_QUEUE as u16;
pub(crate) const IFF_DETACH_QUEUE: u16 = libc::IFF_DETACH_QUEUE as u16;
pub(crate) const IFF_PERSIST: u16 = libc::IFF_PERSIST as u16;

// What TUNSETOFFLOAD is given.
pub(crate) const TUN_F_CSUM: u32 = 0x01;
pub(crate) const TUN_F_TSO4: u32 = 0x02;
pub(crate) const TUN_F_TSO6: u32 = 0x04;
pub(crate) const TUN_F_TSO_ECN: u32 = 0x08;
/// Since Linux 6.2, with the next one; libc and older headers do not have them.
pub(crate) const TUN_F_USO4: u32 = 0x20;
pub(crate) const TUN_F_USO6: u32 = 0x40;

/// The size of `struct virtio_net_hdr`, what a new device starts with.
pub(crate) const VNET_HDR_SIZE_DEFAULT: i32 = 10;

/// Opens the node: one descriptor, attached to no device yet. It belongs to the network namespace of the calling thread.
pub(crate) fn open_node(nonblocking: bool) -> io::Result<OwnedFd> {
    // std adds O_CLOEXEC.
    let flags = if nonblocking { libc::O_NONBLOCK } else { 0 };
    OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(flags)
        .open(NODE)
        .map(OwnedFd::from)
}

/// TUNSETIFF: creates the device `name`, or attaches to it. Returns the name that the kernel gave.
pub(crate) fn set_iff(fd: BorrowedFd<'_>, name: &IfName, flags: u16) -> io::Result<IfName> {
    let mut ifreq = ifreq_named(name);
    ifreq.ifr_ifru.ifru_flags = flags as libc::c_short;
    // SAFETY: `ifreq` is a whole struct ifreq, which the kernel copies in and, with the name filled in, out.
    unsafe { syscall!(ioctl(fd.as_raw_fd(), libc::TUNSETIFF, &raw mut ifreq)) }?;
    Ok(IfName::from_ifreq(&ifreq))
}

/// TUNGETIFF: the device's name as it is now, and the flags of device and queue. EBADFD where the descriptor is attached to none.
///
/// IFF_NO_PI cannot be told from the flags: the kernel also sets that bit, as IFF_NOFILTER, on each queue without a classic filter.
/// See [`has_packet_info`].
pub(crate) fn iff(fd: BorrowedFd<'_>) -> io::Result<(IfName, u16)> {
    let mut ifreq = ifreq_named(&IfName::EMPTY);
    // SAFETY: `ifreq` is a whole struct ifreq, which the kernel fills.
    unsafe { syscall!(ioctl(fd.as_raw_fd(), libc::TUNGETIFF, &raw mut ifreq)) }?;
    // SAFETY: the kernel wrote ifr_flags; every bit pattern of it is valid.
    let flags = unsafe { ifreq.ifr_ifru.ifru_flags } as u16;
    Ok((IfName::from_ifreq(&ifreq), flags))
}

/// TUNSETQUEUE: attaches (IFF_ATTACH_QUEUE) or detaches (IFF_DETACH_QUEUE) one queue of a multi-queue device.
pub(crate) fn set_queue(fd: BorrowedFd<'_>, flag: u16) -> io::Result<()> {
    let mut ifreq = ifreq_named(&IfName::EMPTY);
    ifreq.ifr_ifru.ifru_flags = flag as libc::c_short;
    // SAFETY: `ifreq` is a whole struct ifreq, which the kernel reads.
    unsafe { syscall!(ioctl(fd.as_raw_fd(), libc::TUNSETQUEUE, &raw mut ifreq)) }?;
    Ok(())
}

/// TUNGETFEATURES: the flags that TUNSETIFF of this kernel knows.
pub(crate) fn features(fd: BorrowedFd<'_>) -> io::Result<u32> {
    get_int(fd, libc::TUNGETFEATURES).map(|flags| flags as u32)
}

/// TUNSETPERSIST: whether the device outlives its last descriptor.
pub(crate) fn set_persist(fd: BorrowedFd<'_>, persist: bool) -> io::Result<()> {
    set_by_value(fd, libc::TUNSETPERSIST, persist.into())
}

/// TUNSETOWNER: the user who may attach without CAP_NET_ADMIN.
pub(crate) fn set_owner(fd: BorrowedFd<'_>, uid: u32) -> io::Result<()> {
    set_by_value(fd, libc::TUNSETOWNER, uid.into())
}

/// TUNSETGROUP: the group whose members may attach without CAP_NET_ADMIN.
pub(crate) fn set_group(fd: BorrowedFd<'_>, gid: u32) -> io::Result<()> {
    set_by_value(fd, libc::TUNSETGROUP, gid.into())
}

/// TUNSETOFFLOAD: the TUN_F_* that this side takes; a property of the device.
pub(crate) fn set_offload(fd: BorrowedFd<'_>, offload: u32) -> io::Result<()> {
    set_by_value(fd, libc::TUNSETOFFLOAD, offload.into())
}

/// TUNGETVNETHDRSZ: the size of the header in front of each packet where IFF_VNET_HDR is set; a property of the device.
pub(crate) fn vnet_hdr_size(fd: BorrowedFd<'_>) -> io::Result<i32> {
    get_int(fd, libc::TUNGETVNETHDRSZ)
}

/// TUNSETVNETHDRSZ.
pub(crate) fn set_vnet_hdr_size(fd: BorrowedFd<'_>, size: i32) -> io::Result<()> {
    set_int(fd, libc::TUNSETVNETHDRSZ, size)
}

/// TUNGETSNDBUF: bytes that this queue may have under way in the stack before a write says EAGAIN.
pub(crate) fn send_buffer(fd: BorrowedFd<'_>) -> io::Result<i32> {
    get_int(fd, libc::TUNGETSNDBUF)
}

/// TUNSETCARRIER (Linux 5.0).
pub(crate) fn set_carrier(fd: BorrowedFd<'_>, on: bool) -> io::Result<()> {
    set_int(fd, libc::TUNSETCARRIER, on.into())
}

/// TUNSETSTEERINGEBPF with -1: back to the kernel's own choice of the queue (Linux 4.16).
pub(crate) fn clear_steering(fd: BorrowedFd<'_>) -> io::Result<()> {
    set_int(fd, libc::TUNSETSTEERINGEBPF, -1)
}

/// TUNSETFILTEREBPF with -1: no eBPF filter (Linux 4.16).
pub(crate) fn clear_filter(fd: BorrowedFd<'_>) -> io::Result<()> {
    set_int(fd, libc::TUNSETFILTEREBPF, -1)
}

/// TUNSETTXFILTER without addresses: a TAP device passes every destination again. EINVAL on TUN.
pub(crate) fn clear_address_filter(fd: BorrowedFd<'_>) -> io::Result<()> {
    /// `struct tun_filter` of linux/if_tun.h with no address behind it.
    #[repr(C)]
    #[derive(Default)]
    struct tun_filter {
        flags: u16,
        count: u16,
    }
    const _: () = assert!(size_of::<tun_filter>() == 4);

    let filter = tun_filter::default();
    // SAFETY: the kernel reads the four bytes of `filter`, and `count` (0) addresses behind it.
    unsafe { syscall!(ioctl(fd.as_raw_fd(), libc::TUNSETTXFILTER, &raw const filter)) }?;
    Ok(())
}

/// TUNGETDEVNETNS (Linux 5.2): a descriptor of the network namespace the device is in now. EPERM without CAP_NET_ADMIN there.
pub(crate) fn device_netns(fd: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    // SAFETY: the request takes no argument.
    let netns = unsafe { syscall!(ioctl(fd.as_raw_fd(), libc::TUNGETDEVNETNS)) }?;
    // SAFETY: the kernel has just made this descriptor (close-on-exec) for us, and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(netns) })
}

/// Whether reads and writes of this descriptor take RWF_NOWAIT (Linux 6.4). Asked of a descriptor that is attached to no device, where
/// the flag is looked at before the missing device is: EOPNOTSUPP against EBADFD. `None`: an answer that tells neither.
pub(crate) fn unattached_takes_nowait(fd: BorrowedFd<'_>) -> Option<bool> {
    let mut byte = 0_u8;
    let iovec = libc::iovec {
        iov_base: (&raw mut byte).cast(),
        iov_len: 1,
    };
    // SAFETY: one iovec over one byte that lives until the call is over.
    let error = unsafe { syscall!(preadv2(fd.as_raw_fd(), &raw const iovec, 1, -1, libc::RWF_NOWAIT)) }.err()?;
    match error.raw_os_error() {
        Some(libc::EBADFD) => Some(true),
        Some(libc::EOPNOTSUPP) => Some(false),
        _ => None,
    }
}

/// Whether four bytes of packet information are in front of each packet, and in front of the `vnet_hdr` bytes of header that a device with
/// IFF_VNET_HDR has. `None`: an answer that tells neither.
///
/// No ioctl says so. A write does: the kernel looks at the length that is left behind the packet information (EINVAL if it is too short)
/// before it reads the packet (EFAULT if the memory is not there). So this offers a packet which is long enough only without packet
/// information, and lies in memory that nobody may read. No packet enters the stack; the EFAULT counts one in the device's rx_dropped.
pub(crate) fn has_packet_info(fd: BorrowedFd<'_>, tap: bool, vnet_hdr: usize) -> io::Result<Option<bool>> {
    const ETH_HLEN: usize = 14;
    const PI_LEN: usize = 4;
    /// More than any header that a device is set to here.
    const VNET_HDR_MAX: usize = 32;

    if vnet_hdr > VNET_HDR_MAX {
        return Ok(None);
    }

    let mut page = memmap2::MmapOptions::new().len(4096).map_anon()?;
    // SAFETY: no reference into the page exists; from here on it is only an address.
    unsafe { syscall!(mprotect(page.as_mut_ptr().cast(), page.len(), libc::PROT_NONE)) }?;
    // TAP is refused below ETH_HLEN without EFAULT, so there the packet information is readable and the rest is not.
    let mut info = [0_u8; PI_LEN + VNET_HDR_MAX];
    let iovec = [
        libc::iovec {
            iov_base: info.as_mut_ptr().cast(),
            iov_len: vnet_hdr + if tap { PI_LEN } else { 0 },
        },
        libc::iovec {
            iov_base: page.as_mut_ptr().cast(),
            iov_len: if tap { ETH_HLEN - PI_LEN } else { 1 },
        },
    ];
    // SAFETY: writev only reads; the first part lives, and that the second cannot be read is the kernel's to find out (EFAULT).
    let result = unsafe { syscall!(writev(fd.as_raw_fd(), iovec.as_ptr(), iovec.len() as libc::c_int)) };
    match result.map_err(|error| error.raw_os_error()) {
        Err(Some(libc::EINVAL)) => Ok(Some(true)),
        Err(Some(libc::EFAULT)) => Ok(Some(false)),
        Err(Some(errno)) => Err(io::Error::from_raw_os_error(errno)),
        _ => Ok(None),
    }
}

/// Whether `fd` was opened from the tun node, wherever that lies and however it is called.
pub(crate) fn is_tun(fd: BorrowedFd<'_>) -> io::Result<bool> {
    let mut stat = std::mem::MaybeUninit::<libc::stat>::uninit();
    // SAFETY: fstat fills the struct or fails.
    unsafe { syscall!(fstat(fd.as_raw_fd(), stat.as_mut_ptr())) }?;
    // SAFETY: fstat succeeded, so it is filled.
    let stat = unsafe { stat.assume_init() };
    Ok(stat.st_mode & libc::S_IFMT == libc::S_IFCHR
        && (libc::major(stat.st_rdev), libc::minor(stat.st_rdev)) == NODE_DEVICE)
}

/// F_GETFL and F_SETFL: changes the status flags, which every holder of the same open file shares.
pub(crate) fn change_status_flags(fd: BorrowedFd<'_>, set: i32, clear: i32) -> Result<(), FailedCall> {
    let now = status_flags(fd)?;
    let new = (now | set) & !clear;
    if new != now {
        // SAFETY: F_SETFL takes an integer.
        unsafe { syscall!(fcntl(fd.as_raw_fd(), libc::F_SETFL, new)) }.map_err(FailedCall::of("fcntl(F_SETFL)"))?;
    }
    Ok(())
}

/// F_GETFL.
pub(crate) fn status_flags(fd: BorrowedFd<'_>) -> Result<i32, FailedCall> {
    // SAFETY: F_GETFL takes no argument.
    unsafe { syscall!(fcntl(fd.as_raw_fd(), libc::F_GETFL)) }.map_err(FailedCall::of("fcntl(F_GETFL)"))
}

/// F_SETFD with FD_CLOEXEC.
pub(crate) fn set_close_on_exec(fd: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: F_SETFD takes an integer.
    unsafe { syscall!(fcntl(fd.as_raw_fd(), libc::F_SETFD, libc::FD_CLOEXEC)) }?;
    Ok(())
}

fn get_int(fd: BorrowedFd<'_>, request: libc::Ioctl) -> io::Result<i32> {
    let mut value: libc::c_int = 0;
    // SAFETY: only called with requests of this module that write one int through the pointer.
    unsafe { syscall!(ioctl(fd.as_fd().as_raw_fd(), request, &raw mut value)) }?;
    Ok(value)
}

fn set_int(fd: BorrowedFd<'_>, request: libc::Ioctl, value: i32) -> io::Result<()> {
    // SAFETY: only called with requests of this module that read one int through the pointer.
    unsafe { syscall!(ioctl(fd.as_raw_fd(), request, &raw const value)) }?;
    Ok(())
}

fn set_by_value(fd: BorrowedFd<'_>, request: libc::Ioctl, value: libc::c_ulong) -> io::Result<()> {
    // SAFETY: only called with requests of this module whose argument is the value itself, no pointer.
    unsafe { syscall!(ioctl(fd.as_raw_fd(), request, value)) }?;
    Ok(())
}
