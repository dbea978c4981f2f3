//! One device with its queues, and one queue of it.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU32, Ordering};

use crate::attach;
use crate::device::{Device, in_netns};
use crate::error::{OpenError, OpenErrorKind};
use crate::iface::Mode;
use crate::offload::Offloads;
use crate::sys::FailedCall;
use crate::sys::netdevice::{ControlSocket, IfName};
use crate::sys::setns::NetnsId;
use crate::sys::tun;

/// A TUN or TAP device with the queues that were opened with it, made by [`Builder::open`](crate::Builder::open) or adopted by
/// [`from_fds`](Self::from_fds).
///
/// The device lives while a queue of it is open somewhere, unless it is persistent. So keep the `MultiQueue`, or its queues.
#[derive(Debug)]
pub struct MultiQueue {
    queues: Vec<Queue>,
    flags: u16,
    device: Option<Device>,
    verified: bool,
}

/// What the kernel granted, as TUNGETIFF said when the device was opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Granted {
    /// TUN or TAP.
    pub mode: Mode,
    /// Four bytes of packet information are in front of each packet (no `IFF_NO_PI`).
    pub packet_info: bool,
    /// The device may have several queues (`IFF_MULTI_QUEUE`).
    pub multi_queue: bool,
    /// A virtio-net header is in front of each packet (`IFF_VNET_HDR`).
    pub vnet_hdr: bool,
    /// Packets sent go through NAPI (`IFF_NAPI`), as far as the first queue goes.
    pub napi: bool,
    /// The device outlives its queues (`IFF_PERSIST`).
    pub persist: bool,
    /// What the kernel may hand over unfinished or uncut. The same may be sent so.
    pub offloads: Offloads,
    /// Enabled queues of the device now, those of other processes included; `None` where it is not
    /// known: without the feature `netlink`, for a single-queue device, for adopted queues whose
    /// namespace the kernel does not tell, and after a move to another namespace.
    pub queues: Option<u32>,
    /// Disabled queues of the device now, likewise.
    pub disabled_queues: Option<u32>,
}

impl MultiQueue {
    pub(crate) fn opened(fds: Vec<OwnedFd>, info: QueueInfo, flags: u16, device: Device) -> Self {
        let info = Arc::new(QueueInfo {
            device: Some(device.clone()),
            ..info
        });
        let queues = fds.into_iter().map(|fd| Queue::new(fd, Arc::clone(&info))).collect();
        Self {
            queues,
            flags,
            device: Some(device),
            verified: true,
        }
    }

    /// Adopts descriptors that somebody else opened: one of any TUN/TAP device, or several of one multi-queue device. This is for
    /// programs that get their device from a privileged helper (SCM_RIGHTS) or a service manager (LISTEN_FDS).
    ///
    /// Each descriptor must be of the tun driver (a character device 10:200), attached, and all must have the same name, flags and header
    /// size. Where the kernel allows it (TUNGETDEVNETNS, which takes CAP_NET_ADMIN) they are shown to be of the same network namespace,
    /// so of the same device; where it does not, [`verified`](Self::verified) says false, the answer rests on the names, and there is
    /// no [`device`](Self::device) handle.
    ///
    /// Descriptors are made close-on-exec and non-blocking. Note that
    ///
    /// * Whether there is packet information is found out by offering each queue a packet that cannot be read; it counts one in the device's
    ///   `rx_dropped` per queue, and nothing enters the stack.
    /// * `O_NONBLOCK` belongs to the open file, not to the descriptor: whoever else holds a copy of it finds it non-blocking too.
    /// * Copies held elsewhere keep the queue and with it the device alive, and whoever reads from one takes packets away from here.
    /// * The offloads are switched off for all who hold queues of the device, and where it has `IFF_VNET_HDR` the header is made ten bytes long.
    ///
    /// On failure all descriptors are closed.
    ///
    /// # Errors
    ///
    /// [`NotATunDescriptor`](OpenErrorKind::NotATunDescriptor): not of the tun driver, not attached, or its device was deleted; a queue
    /// given twice; queues of several devices. [`QueueModeMismatch`](OpenErrorKind::QueueModeMismatch): several of a single-queue device.
    /// [`TooManyQueues`](OpenErrorKind::TooManyQueues). [`NotGranted`](OpenErrorKind::NotGranted): differing flags.
    /// [`InvalidSetting`](OpenErrorKind::InvalidSetting): no descriptors at all.
    pub fn from_fds(fds: Vec<OwnedFd>) -> Result<Self, OpenError> {
        Self::adopt(fds, Offloads::none())
    }

    /// Like [`from_fds`](Self::from_fds), and asks for offloads, which takes a device that was opened with `IFF_VNET_HDR`.
    ///
    /// Offloads belong to the device: those who hold other queues of it get superpackets too. [`from_fds`](Self::from_fds) switches them off.
    ///
    /// # Errors
    ///
    /// As [`from_fds`](Self::from_fds); and [`QueueModeMismatch`](OpenErrorKind::QueueModeMismatch) if the device has no `IFF_VNET_HDR`.
    pub fn from_fds_with_offloads(fds: Vec<OwnedFd>, offloads: Offloads) -> Result<Self, OpenError> {
        Self::adopt(fds, offloads)
    }

    fn adopt(fds: Vec<OwnedFd>, wanted: Offloads) -> Result<Self, OpenError> {
        let mut adopted = check_adopted(&fds)?;
        let netns = common_netns(&fds)?;
        for fd in &fds {
            tun::set_close_on_exec(fd.as_fd()).map_err(|error| attach::os_error("fcntl(F_SETFD)", &error))?;
            tun::change_status_flags(fd.as_fd(), libc::O_NONBLOCK, 0)
                .map_err(|failed| attach::os_error(failed.call, &failed.error))?;
        }
        adopt_packet_info(&fds, &mut adopted)?;
        let offloads = Arc::new(SharedOffloads::default());
        if adopted.flags & tun::IFF_VNET_HDR != 0 {
            if adopted.flags & tun::IFF_NO_PI == 0 {
                let detail = format!(
                    "{:?} has packet information and a virtio-net header in front of each packet; open it with IFF_NO_PI",
                    adopted.name
                );
                return Err(OpenError::refused(OpenErrorKind::Unsupported, "from_fds", detail));
            }
            offloads.set(attach::negotiate(fds[0].as_fd(), wanted)?);
        } else if !wanted.is_empty() {
            let detail = format!(
                "{:?} was opened without IFF_VNET_HDR, so it has no offloads",
                adopted.name
            );
            return Err(OpenError::refused(OpenErrorKind::QueueModeMismatch, "from_fds", detail));
        } else {
            // Without a header nothing says which packets are unfinished.
            tun::set_offload(fds[0].as_fd(), 0).map_err(|error| attach::os_error("ioctl(TUNSETOFFLOAD)", &error))?;
        }
        let verified = netns.is_some() || fds.len() == 1;
        let device = match netns {
            Some(netns) => device_in(netns, &adopted, &offloads)?,
            None => None,
        };
        let mtu = device.as_ref().and_then(|device| device.mtu().ok());
        let info = Arc::new(QueueInfo {
            device: device.clone(),
            ..QueueInfo::new(&adopted.name, adopted.flags, mtu, offloads)
        });
        let queues = fds.into_iter().map(|fd| Queue::new(fd, Arc::clone(&info))).collect();
        Ok(Self {
            queues,
            flags: adopted.flags,
            device,
            verified,
        })
    }

    /// The name that the device had when it was opened. See [`Device::current_name`] for what it is called now.
    pub fn name(&self) -> &str {
        self.info().name.as_str()
    }

    /// Whether it carries IP packets or Ethernet frames.
    pub fn mode(&self) -> Mode {
        self.info().mode
    }

    /// The number of queues held here.
    pub fn len(&self) -> usize {
        self.queues.len()
    }

    /// Whether there are no queues; never so.
    pub fn is_empty(&self) -> bool {
        self.queues.is_empty()
    }

    /// What the kernel granted. With the feature `netlink` it is asked for the queues of a
    /// multi-queue device at every call.
    pub fn granted(&self) -> Granted {
        let (queues, disabled_queues) = self.all_queues().unzip();
        Granted {
            mode: self.mode(),
            packet_info: self.flags & tun::IFF_NO_PI == 0,
            multi_queue: self.flags & tun::IFF_MULTI_QUEUE != 0,
            vnet_hdr: self.flags & tun::IFF_VNET_HDR != 0,
            napi: self.flags & tun::IFF_NAPI != 0,
            persist: self.flags & tun::IFF_PERSIST != 0,
            offloads: self.info().offloads.get(),
            queues,
            disabled_queues,
        }
    }

    /// Enabled and disabled queues, those of other processes included.
    #[cfg(feature = "netlink")]
    fn all_queues(&self) -> Option<(u32, u32)> {
        let device = self.device.as_ref()?;
        let ask = || crate::netlink::Handle::new()?.link(device.index());
        let link = device.in_its_namespace(ask).ok()?.ok()?;
        // After the answer, so that it is about this device.
        let tun = link
            .tun
            .filter(|tun| tun.multi_queue && matches!(device.departed(), Ok(None)))?;
        Some((tun.queues, tun.disabled_queues))
    }

    #[cfg(not(feature = "netlink"))]
    fn all_queues(&self) -> Option<(u32, u32)> {
        None
    }

    /// Whether the queues are known to be of one device. Always so unless they were adopted without CAP_NET_ADMIN
    /// (see [`from_fds`](Self::from_fds)).
    pub fn verified(&self) -> bool {
        self.verified
    }

    /// The interface index; `None` for adopted queues whose namespace the kernel does not tell.
    pub fn index(&self) -> Option<u32> {
        self.device.as_ref().map(Device::index)
    }

    /// The handle for the device's settings, which may be cloned and kept beside the queues; `None` for adopted queues whose namespace the
    /// kernel does not tell.
    pub fn device(&self) -> Option<&Device> {
        self.device.as_ref()
    }

    /// The device's MTU now, in bytes. See [`Device::mtu`].
    pub fn mtu(&self) -> io::Result<u32> {
        self.known_device()?.mtu()
    }

    /// Changes the MTU. See [`Device::set_mtu`]. [`Queue::mtu`] still tells the one at opening.
    pub fn set_mtu(&self, mtu: u32) -> io::Result<()> {
        self.known_device()?.set_mtu(mtu)
    }

    /// Sets the device up or down. See [`Device::set_up`].
    pub fn set_up(&self, up: bool) -> io::Result<()> {
        self.known_device()?.set_up(up)
    }

    /// Changes the length of each queue in packets. See [`Device::set_txqueuelen`].
    pub fn set_txqueuelen(&self, packets: u32) -> io::Result<()> {
        self.known_device()?.set_txqueuelen(packets)
    }

    /// Says whether the device outlives its last descriptor (TUNSETPERSIST). Takes no privilege but the descriptors.
    ///
    /// A persistent device without owner and group may be attached by anybody who can open the node. [`Builder`](crate::Builder) gives
    /// one an owner; this call does not: see [`set_owner`](Self::set_owner).
    pub fn set_persist(&mut self, persist: bool) -> io::Result<()> {
        tun::set_persist(self.queues[0].as_fd(), persist)?;
        self.flags = if persist {
            self.flags | tun::IFF_PERSIST
        } else {
            self.flags & !tun::IFF_PERSIST
        };
        Ok(())
    }

    /// Names the user who may attach to the device without CAP_NET_ADMIN (TUNSETOWNER).
    pub fn set_owner(&self, uid: u32) -> io::Result<()> {
        tun::set_owner(self.queues[0].as_fd(), uid)
    }

    /// Names the group whose members may attach to the device without CAP_NET_ADMIN (TUNSETGROUP).
    pub fn set_group(&self, gid: u32) -> io::Result<()> {
        tun::set_group(self.queues[0].as_fd(), gid)
    }

    /// Opens one more queue and hands it out. See [`Device::add_queue`].
    pub fn add_queue(&self) -> Result<Queue, OpenError> {
        match &self.device {
            Some(device) => device.add_queue(),
            None => Err(OpenError::refused(
                OpenErrorKind::Namespace,
                "ioctl(TUNSETIFF)",
                UNKNOWN_NETNS,
            )),
        }
    }

    /// The queues, in the order in which they were opened or given.
    pub fn queues(&self) -> &[Queue] {
        &self.queues
    }

    /// Takes the queues out, so that each may go to its own thread. To keep a handle on the device, clone [`device`](Self::device) first.
    pub fn into_queues(self) -> Vec<Queue> {
        self.queues
    }

    fn info(&self) -> &QueueInfo {
        // Never empty: `open` makes at least one queue and `from_fds` refuses none.
        &self.queues[0].info
    }

    fn known_device(&self) -> io::Result<&Device> {
        self.device
            .as_ref()
            .ok_or_else(|| io::Error::new(io::ErrorKind::Unsupported, UNKNOWN_NETNS))
    }
}

const UNKNOWN_NETNS: &str =
    "the queues were adopted, and the kernel tells their network namespace only to CAP_NET_ADMIN";

/// One queue of a TUN or TAP device: a descriptor of its own, attached to the device, non-blocking and close-on-exec.
///
/// It is `Send`: open all queues at one place and hand each to the thread that serves it. Dropping it closes the descriptor; the device
/// goes with its last one, unless it is persistent.
///
/// The kernel spreads the packets it sends over the enabled queues by flow, and what is sent through a queue draws the answers of that flow
/// to the same queue. Queues have no stable number: closing or disabling one moves the last of them into its place.
#[derive(Debug)]
pub struct Queue {
    fd: OwnedFd,
    info: Arc<QueueInfo>,
}

/// What all queues of a device have in common.
#[derive(Debug)]
pub(crate) struct QueueInfo {
    pub(crate) name: String,
    pub(crate) mode: Mode,
    pub(crate) packet_info: bool,
    pub(crate) multi_queue: bool,
    pub(crate) mtu: Option<u32>,
    pub(crate) vnet_hdr: bool,
    /// The same for all queues and handles of a device, and for those of no other device.
    pub(crate) offloads: Arc<SharedOffloads>,
    /// The way to ask about the device; `None` for an adopted queue whose namespace the kernel does
    /// not tell.
    pub(crate) device: Option<Device>,
}

/// What a device was granted last: one for all its queues and handles.
#[derive(Debug, Default)]
pub(crate) struct SharedOffloads {
    granted: AtomicU8,
    /// How often a queue of the device found its header changed and set it back.
    headers_restored: AtomicU32,
}

impl SharedOffloads {
    pub(crate) fn get(&self) -> Offloads {
        Offloads::from_bits(self.granted.load(Ordering::Relaxed))
    }

    pub(crate) fn set(&self, offloads: Offloads) {
        self.granted.store(offloads.bits(), Ordering::Relaxed);
    }

    pub(crate) fn headers_restored(&self) -> u32 {
        self.headers_restored.load(Ordering::Relaxed)
    }
}

/// What another holder of a device had changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Changed {
    /// The size of the virtio-net header that was found, if it was not ours.
    pub(crate) header: Option<u32>,
    /// The offloads that were found, if there were more than granted.
    pub(crate) offloads: Option<Offloads>,
    /// The descriptor was made blocking.
    pub(crate) blocking: bool,
}

impl Changed {
    const NOTHING: Self = Self {
        header: None,
        offloads: None,
        blocking: false,
    };
}

impl QueueInfo {
    pub(crate) fn new(name: &IfName, flags: u16, mtu: Option<u32>, offloads: Arc<SharedOffloads>) -> Self {
        Self {
            name: name.lossy().into_owned(),
            mode: Mode::from_iff(flags),
            packet_info: flags & tun::IFF_NO_PI == 0,
            multi_queue: flags & tun::IFF_MULTI_QUEUE != 0,
            mtu,
            vnet_hdr: flags & tun::IFF_VNET_HDR != 0,
            offloads,
            device: None,
        }
    }
}

impl Queue {
    pub(crate) fn new(fd: OwnedFd, info: Arc<QueueInfo>) -> Self {
        Self { fd, info }
    }

    /// The name that the device had when this queue was opened.
    pub fn name(&self) -> &str {
        &self.info.name
    }

    /// What the device is called now (TUNGETIFF). EBADFD once it is deleted.
    pub fn current_name(&self) -> io::Result<String> {
        let (name, _) = tun::iff(self.as_fd())?;
        Ok(name.lossy().into_owned())
    }

    /// The handle for the device's settings; `None` for a queue that was adopted where the kernel
    /// does not tell its namespace.
    #[cfg(feature = "engine")]
    pub(crate) fn device(&self) -> Option<&Device> {
        self.info.device.as_ref()
    }

    /// What stands for the device: see [`Device::mark`].
    #[cfg(feature = "engine")]
    pub(crate) fn mark(&self) -> &Arc<SharedOffloads> {
        &self.info.offloads
    }

    /// Whether it carries IP packets or Ethernet frames.
    pub fn mode(&self) -> Mode {
        self.info.mode
    }

    /// Whether four bytes of packet information are in front of each packet.
    pub fn packet_info(&self) -> bool {
        self.info.packet_info
    }

    /// Whether the device was made for several queues, which is what [`disable`](Self::disable) needs.
    pub fn multi_queue(&self) -> bool {
        self.info.multi_queue
    }

    /// The device's MTU in bytes when this queue was opened or adopted; `None` for an adopted one whose namespace the kernel does not tell.
    pub fn mtu(&self) -> Option<u32> {
        self.info.mtu
    }

    /// Whether a virtio-net header is in front of each packet. A worker's ports take it off and put it on.
    pub fn vnet_hdr(&self) -> bool {
        self.info.vnet_hdr
    }

    /// What the kernel may hand over unfinished or uncut, on all queues of the device.
    pub fn offloads(&self) -> Offloads {
        self.info.offloads.get()
    }

    /// Changes the offloads of the device (TUNSETOFFLOAD), for all its queues, also while they are in use: to `wanted`, or as much of it as the
    /// kernel takes, which is returned. What lies in the queues already may still come as it was, and a port that was attached before passes on what
    /// was granted then. Takes no privilege.
    ///
    /// # Errors
    ///
    /// EINVAL: the device was opened without offloads ([`Builder::offloads`](crate::Builder::offloads)). EBADFD once it is deleted.
    pub fn set_offloads(&self, wanted: Offloads) -> io::Result<Offloads> {
        if !self.info.vnet_hdr {
            return Err(io::Error::from_raw_os_error(libc::EINVAL));
        }
        let before = self.info.offloads.get();
        // What is about to be switched on is no other holder's doing.
        self.info.offloads.set(before | wanted);
        let granted = attach::offer(self.as_fd(), wanted);
        self.info.offloads.set(*granted.as_ref().unwrap_or(&before));
        granted
    }

    /// Asks the kernel whether another holder of the device changed the size of its header, or
    /// switched on more offloads than were granted here, and sets that back. `None` if not, or if
    /// the device is gone.
    ///
    /// Fewer offloads than granted are left alone: nothing comes in another shape for it, and an
    /// administrator may want it so (ethtool -K). The requests wait for the kernel's lock of all
    /// network settings (rtnl_lock in __tun_chr_ioctl, drivers/net/tun.c), which others may hold
    /// for long.
    pub(crate) fn restore(&self) -> Option<Changed> {
        let info = &*self.info;
        let mut changed = self.restore_nonblocking().unwrap_or(Changed::NOTHING);
        if info.vnet_hdr
            && let Ok(size) = tun::vnet_hdr_size(self.as_fd())
            && size != tun::VNET_HDR_SIZE_DEFAULT
            && tun::set_vnet_hdr_size(self.as_fd(), tun::VNET_HDR_SIZE_DEFAULT).is_ok()
        {
            info.offloads.headers_restored.fetch_add(1, Ordering::Relaxed);
            changed.header = Some(size as u32);
        }
        let granted = info.offloads.get();
        if let Some(device) = &info.device
            && let Ok(active) = device.active_offloads()
            && !granted.contains(active)
            && tun::set_offload(self.as_fd(), attach::offload_flags(granted)).is_ok()
        {
            changed.offloads = Some(active);
        }
        (changed != Changed::NOTHING).then_some(changed)
    }

    /// Whether another holder of the device changed the size of its header. One request, which
    /// waits for the same lock.
    pub(crate) fn has_foreign_header(&self) -> bool {
        self.info.vnet_hdr && tun::vnet_hdr_size(self.as_fd()).is_ok_and(|size| size != tun::VNET_HDR_SIZE_DEFAULT)
    }

    /// Makes the descriptor non-blocking again if another holder of the same open file made it
    /// blocking. One call (F_GETFL) if not.
    #[inline]
    pub(crate) fn restore_nonblocking(&self) -> Option<Changed> {
        let flags = tun::status_flags(self.as_fd()).ok()?;
        if flags & libc::O_NONBLOCK != 0 {
            return None;
        }
        tun::change_status_flags(self.as_fd(), libc::O_NONBLOCK, 0).ok()?;
        Some(Changed {
            blocking: true,
            ..Changed::NOTHING
        })
    }

    /// How often one of the device's queues found its header changed and set it back.
    pub(crate) fn headers_restored(&self) -> u32 {
        self.info.offloads.headers_restored()
    }

    /// The device's MTU now, or else when this queue was opened.
    pub(crate) fn mtu_now(&self) -> Option<u32> {
        let asked = self.info.device.as_ref().and_then(|device| device.mtu().ok());
        asked.or(self.info.mtu)
    }

    /// How many bytes of packets sent through this queue may be under way in the stack before sending says EAGAIN (TUNGETSNDBUF):
    /// `i32::MAX`, so never, unless somebody set it.
    pub fn send_buffer(&self) -> io::Result<i32> {
        tun::send_buffer(self.as_fd())
    }

    /// Takes the queue out of use (TUNSETQUEUE with IFF_DETACH_QUEUE): the kernel sends no more packets to it and spreads them over the
    /// other ones. Packets that wait in it are lost, and no counter tells. What is sent through it still goes. It counts against the
    /// 256 queues of the device. Takes no privilege.
    ///
    /// # Errors
    ///
    /// EINVAL: not of a multi-queue device, disabled already, or the device was deleted.
    pub fn disable(&self) -> io::Result<()> {
        tun::set_queue(self.as_fd(), tun::IFF_DETACH_QUEUE)
    }

    /// Takes the queue into use again. Takes no privilege.
    ///
    /// # Errors
    ///
    /// EINVAL: not disabled, or the device was deleted.
    pub fn enable(&self) -> io::Result<()> {
        tun::set_queue(self.as_fd(), tun::IFF_ATTACH_QUEUE)
    }

    /// Whether the queue is out of use. EBADFD once the device is deleted.
    pub fn is_disabled(&self) -> io::Result<bool> {
        let (_, flags) = tun::iff(self.as_fd())?;
        Ok(flags & tun::IFF_DETACH_QUEUE != 0)
    }
}

impl AsFd for Queue {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl AsRawFd for Queue {
    fn as_raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}

impl From<Queue> for OwnedFd {
    fn from(queue: Queue) -> Self {
        queue.fd
    }
}

/// Bits of TUNGETIFF that may differ between the queues of a device: being disabled, and IFF_NOFILTER, which looks like IFF_NO_PI.
const PER_QUEUE: u16 = tun::IFF_DETACH_QUEUE | tun::IFF_NO_PI;

/// What descriptors offered for adoption have in common.
struct Adopted {
    name: IfName,
    flags: u16,
}

/// Checks all that needs no privilege, and changes nothing.
fn check_adopted(fds: &[OwnedFd]) -> Result<Adopted, OpenError> {
    const CALL: &str = "ioctl(TUNGETIFF)";
    let not_tun = |call, detail: String| OpenError::refused(OpenErrorKind::NotATunDescriptor, call, detail);
    let Some(first) = fds.first() else {
        return Err(OpenError::refused(
            OpenErrorKind::InvalidSetting,
            "from_fds",
            "no descriptors were given",
        ));
    };
    if fds.len() > tun::MAX_QUEUES {
        let detail = format!(
            "{} descriptors; a device has at most {} queues",
            fds.len(),
            tun::MAX_QUEUES
        );
        return Err(OpenError::refused(OpenErrorKind::TooManyQueues, "from_fds", detail));
    }
    for (i, fd) in fds.iter().enumerate() {
        if !tun::is_tun(fd.as_fd()).map_err(|error| attach::os_error("fstat", &error))? {
            return Err(not_tun(
                "fstat",
                format!("descriptor {i} is not of /dev/net/tun (a character device 10:200)"),
            ));
        }
    }
    let ask = |i: usize, fd: &OwnedFd| {
        tun::iff(fd.as_fd()).map_err(|error| match error.raw_os_error() {
            Some(libc::EBADFD) => {
                let detail = format!("descriptor {i} is attached to no device, or its device was deleted");
                OpenError::new(OpenErrorKind::NotATunDescriptor, CALL, &error, detail)
            }
            _ => attach::os_error(CALL, &error),
        })
    };
    let size = |fd: &OwnedFd| {
        tun::vnet_hdr_size(fd.as_fd()).map_err(|error| attach::os_error("ioctl(TUNGETVNETHDRSZ)", &error))
    };
    let (name, flags) = ask(0, first).map(|(name, flags)| (name, flags & !PER_QUEUE))?;
    let header = size(first)?;
    for (i, fd) in fds.iter().enumerate().skip(1) {
        let (other, other_flags) = ask(i, fd).map(|(name, flags)| (name, flags & !PER_QUEUE))?;
        if other != name {
            return Err(not_tun(
                CALL,
                format!("descriptor 0 is of {name:?} and descriptor {i} of {other:?}"),
            ));
        }
        if other_flags != flags {
            let detail = format!(
                "descriptor 0 has {} and descriptor {i} has {}",
                attach::flag_names(flags),
                attach::flag_names(other_flags)
            );
            return Err(OpenError::refused(OpenErrorKind::NotGranted, CALL, detail));
        }
        let other_header = size(fd)?;
        if other_header != header {
            let detail = format!("descriptor 0 has headers of {header} bytes and descriptor {i} of {other_header}");
            return Err(OpenError::refused(
                OpenErrorKind::NotGranted,
                "ioctl(TUNGETVNETHDRSZ)",
                detail,
            ));
        }
    }
    if let Some(i) = given_twice(fds).map_err(|failed| attach::os_error(failed.call, &failed.error))? {
        return Err(not_tun(
            "from_fds",
            format!("descriptor {i} is a copy of an earlier one: the same queue twice"),
        ));
    }
    if fds.len() > 1 && flags & tun::IFF_MULTI_QUEUE == 0 {
        // One device has one queue then, so these are devices of the same name in several namespaces.
        let detail = format!(
            "{} descriptors, but {name:?} was created without IFF_MULTI_QUEUE",
            fds.len()
        );
        return Err(OpenError::refused(OpenErrorKind::QueueModeMismatch, CALL, detail));
    }
    Ok(Adopted { name, flags })
}

/// The first descriptor that shares its open file with an earlier one, so is the same queue.
///
/// Copies share their status flags. O_APPEND means nothing to tun, so it serves as a mark for a moment; kcmp(2), made for the question, is
/// commonly forbidden in containers.
fn given_twice(fds: &[OwnedFd]) -> Result<Option<usize>, FailedCall> {
    let mut had = Vec::with_capacity(fds.len());
    for fd in fds {
        had.push(tun::status_flags(fd.as_fd())? & libc::O_APPEND);
        tun::change_status_flags(fd.as_fd(), 0, libc::O_APPEND)?;
    }
    let mut twice = None;
    for (i, fd) in fds.iter().enumerate() {
        if tun::status_flags(fd.as_fd())? & libc::O_APPEND != 0 {
            twice = twice.or(Some(i));
        }
        tun::change_status_flags(fd.as_fd(), libc::O_APPEND, 0)?;
    }
    for (fd, had) in fds.iter().zip(had) {
        tun::change_status_flags(fd.as_fd(), had, libc::O_APPEND & !had)?;
    }
    Ok(twice)
}

/// The network namespace that all descriptors' devices are in; `None` where the kernel does not tell.
fn common_netns(fds: &[OwnedFd]) -> Result<Option<(File, NetnsId)>, OpenError> {
    let mut first: Option<(File, NetnsId)> = None;
    for (i, fd) in fds.iter().enumerate() {
        // EPERM without CAP_NET_ADMIN there; ENOTTY or EINVAL on kernels before 5.2.
        let Ok(netns) = tun::device_netns(fd.as_fd()) else {
            return Ok(None);
        };
        let netns = File::from(netns);
        let id = NetnsId::of(&netns).map_err(|error| attach::os_error("fstat", &error))?;
        match &first {
            None => first = Some((netns, id)),
            Some((_, first)) if *first == id => {}
            Some(_) => {
                let detail = format!("descriptors 0 and {i} are of devices in different network namespaces");
                return Err(OpenError::refused(
                    OpenErrorKind::NotATunDescriptor,
                    "ioctl(TUNGETDEVNETNS)",
                    detail,
                ));
            }
        }
    }
    Ok(first)
}

/// Finds out whether packet information is in front of the packets, and sets IFF_NO_PI of the flags accordingly.
fn adopt_packet_info(fds: &[OwnedFd], adopted: &mut Adopted) -> Result<(), OpenError> {
    let packet_info = attach::packet_info(fds[0].as_fd(), adopted.flags)?;
    for (i, fd) in fds.iter().enumerate().skip(1) {
        if attach::packet_info(fd.as_fd(), adopted.flags)? != packet_info {
            let detail = format!("one of descriptors 0 and {i} has packet information and the other one has not");
            return Err(OpenError::refused(OpenErrorKind::NotGranted, "writev", detail));
        }
    }
    adopted.flags = adopted.flags & !tun::IFF_NO_PI | if packet_info { 0 } else { tun::IFF_NO_PI };
    Ok(())
}

/// A handle for the device; `None` if its namespace is another one, and may not be entered.
fn device_in(
    (netns, id): (File, NetnsId),
    adopted: &Adopted,
    offloads: &Arc<SharedOffloads>,
) -> Result<Option<Device>, OpenError> {
    let here = |entrance| {
        let control = ControlSocket::new().map_err(|error| attach::os_error("socket(AF_UNIX)", &error))?;
        Device::here(control, &adopted.name, adopted.flags, entrance, Arc::clone(offloads))
    };
    if NetnsId::current().is_ok_and(|current| current == id) {
        return here(Some(netns)).map(Some);
    }
    let entrance = netns
        .try_clone()
        .map_err(|error| attach::os_error("fcntl(F_DUPFD_CLOEXEC)", &error))?;
    match in_netns(&netns, || here(Some(entrance))) {
        Ok(device) => device.map(Some),
        // Telling where the device is takes CAP_NET_ADMIN there, entering takes more. There is no handle then, and no harm.
        Err(_) => Ok(None),
    }
}
