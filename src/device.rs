//! Settings of an open device.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::attach;
use crate::error::{OpenError, OpenErrorKind};
use crate::iface::Mode;
use crate::offload::Offloads;
use crate::queue::{Queue, QueueInfo, SharedOffloads};
use crate::sys::FailedCall;
use crate::sys::netdevice::{ControlSocket, IfName};
use crate::sys::notices::{self, Departure};
use crate::sys::setns::{self, NetnsId};
use crate::sys::tun;

/// The settings of a device, apart from its queues: a handle for the control side, which any thread may hold and copy.
///
/// It speaks of the device by its index, in the network namespace where the device was when this
/// handle was made, so it follows a device that is renamed, and does not follow one that is moved
/// to another namespace. It keeps no queue and no device alive: once the device has left that
/// namespace, by deletion or by a move, every call fails with ENODEV for good, also when another
/// device takes its name or its index, and when it comes back.
///
/// The kernel's notice of that departure (rtnetlink) is looked for before and after each call. A
/// change that races with the departure itself may still reach a device that took the name in that
/// moment; the call then fails with ENODEV. Where a sandbox refuses netlink sockets, the driver and
/// the mode of the device that has the index are compared instead, which cannot tell one TUN device
/// from another.
///
/// All clones of a handle share two descriptors: a socket for ioctls, and a netlink socket.
///
/// Changing a setting takes CAP_NET_ADMIN (EPERM without it), asking does not. The calls are the ioctls of netdevice(7).
#[derive(Clone, Debug)]
pub struct Device {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    control: ControlSocket,
    index: u32,
    /// Brings the notice that the device has left its namespace; `None` where netlink is refused.
    departure: Option<OwnedFd>,
    /// A notice was lost, so that its absence proves nothing any more.
    unsure: AtomicBool,
    mode: Mode,
    packet_info: bool,
    multi_queue: bool,
    vnet_hdr: bool,
    offloads: Arc<SharedOffloads>,
    /// Where the device is, if /proc could tell.
    netns: Option<NetnsId>,
    /// The way there, if it is not where the device was opened from.
    entrance: Option<File>,
}

impl Device {
    /// A handle for the device `name` of the namespace that `control` belongs to and the caller's thread is in.
    pub(crate) fn here(
        control: ControlSocket,
        name: &IfName,
        flags: u16,
        entrance: Option<File>,
        offloads: Arc<SharedOffloads>,
    ) -> Result<Self, OpenError> {
        let index = control
            .index(name)
            .map_err(|error| attach::os_error("ioctl(SIOCGIFINDEX)", &error))?;
        let departure = match notices::of_departure(index) {
            Ok(notices) => Some(notices),
            // A sandbox without netlink.
            Err(failed)
                if matches!(
                    failed.error.raw_os_error(),
                    Some(libc::EPERM | libc::EACCES | libc::EAFNOSUPPORT | libc::EPROTONOSUPPORT | libc::ENOSYS)
                ) =>
            {
                None
            }
            Err(failed) => return Err(attach::os_error(failed.call, &failed.error)),
        };
        let device = Self {
            inner: Arc::new(Inner {
                control,
                index,
                departure,
                unsure: AtomicBool::new(false),
                mode: Mode::from_iff(flags),
                packet_info: flags & tun::IFF_NO_PI == 0,
                multi_queue: flags & tun::IFF_MULTI_QUEUE != 0,
                vnet_hdr: flags & tun::IFF_VNET_HDR != 0,
                offloads,
                netns: NetnsId::current().ok(),
                entrance,
            }),
        };
        // What left before the notices were asked for is not among them.
        let now = device
            .name()
            .map_err(|error| attach::os_error("ioctl(SIOCGIFNAME)", &error))?;
        if now != *name {
            let detail = format!("the device {name:?} was renamed or replaced while it was being opened; try again");
            return Err(OpenError::refused(
                OpenErrorKind::NotGranted,
                "ioctl(SIOCGIFNAME)",
                detail,
            ));
        }
        Ok(device)
    }

    /// The interface index, which stays the same while the device lives and stays in its namespace.
    pub fn index(&self) -> u32 {
        self.inner.index
    }

    /// Whether it carries IP packets or Ethernet frames.
    pub fn mode(&self) -> Mode {
        self.inner.mode
    }

    /// What the device is called now.
    pub fn current_name(&self) -> io::Result<String> {
        Ok(self.name()?.lossy().into_owned())
    }

    /// What the kernel may hand over unfinished or uncut. [`Queue::set_offloads`] changes it.
    pub fn offloads(&self) -> Offloads {
        self.inner.offloads.get()
    }

    /// What the device leaves unfinished or uncut now, also if another holder of it switched that
    /// on.
    pub(crate) fn active_offloads(&self) -> io::Result<Offloads> {
        self.call(ControlSocket::active_offloads).map(attach::offloads_of)
    }

    /// The largest IP packet, in bytes.
    pub fn mtu(&self) -> io::Result<u32> {
        self.call(ControlSocket::mtu)
    }

    /// Changes the MTU: 68 … 65535 for TUN, 68 … 65521 for TAP, else EINVAL.
    pub fn set_mtu(&self, mtu: u32) -> io::Result<()> {
        self.call(|control, name| control.set_mtu(name, mtu))
    }

    /// How many packets the kernel keeps in each queue before it drops: the `txqueuelen`, 500 (TUN) or 1000 (TAP) at first.
    pub fn txqueuelen(&self) -> io::Result<u32> {
        self.call(ControlSocket::tx_queue_len)
    }

    /// Changes the length of every queue, in packets. Packets that find no room in a shorter queue are lost and counted nowhere.
    ///
    /// In a user namespace this takes the feature `netlink`: the ioctl wants CAP_NET_ADMIN in the
    /// initial one.
    pub fn set_txqueuelen(&self, packets: u32) -> io::Result<()> {
        match self.call(|control, name| control.set_tx_queue_len(name, packets)) {
            // This ioctl alone wants CAP_NET_ADMIN in the initial user namespace (`dev_ioctl` in
            // net/core/dev_ioctl.c); rtnetlink wants it in the one that owns the network namespace.
            #[cfg(feature = "netlink")]
            Err(error) if error.raw_os_error() == Some(libc::EPERM) => {
                self.name()?;
                let by_netlink = || crate::netlink::Handle::new()?.set_txqueuelen(self.inner.index, packets);
                match self.in_its_namespace(by_netlink).and_then(std::convert::identity) {
                    Ok(()) => self.name().map(drop),
                    Err(_) => Err(error),
                }
            }
            outcome => outcome,
        }
    }

    /// The Ethernet address; `None` for TUN, which has none.
    pub fn mac(&self) -> io::Result<Option<[u8; 6]>> {
        match self.inner.mode {
            Mode::Tun => Ok(None),
            Mode::Tap => self.call(ControlSocket::mac).map(Some),
        }
    }

    /// Changes the Ethernet address of a TAP device: EADDRNOTAVAIL for a multicast address or all zero, EINVAL for TUN.
    pub fn set_mac(&self, mac: [u8; 6]) -> io::Result<()> {
        match self.inner.mode {
            Mode::Tun => Err(io::Error::from_raw_os_error(libc::EINVAL)),
            Mode::Tap => self.call(|control, name| control.set_mac(name, mac)),
        }
    }

    /// Whether the device is set up.
    pub fn is_up(&self) -> io::Result<bool> {
        self.call(ControlSocket::is_up)
    }

    /// Sets the device up or down. While it is down nothing arrives and writing fails with EIO; the queues stay attached.
    pub fn set_up(&self, up: bool) -> io::Result<()> {
        self.call(|control, name| control.set_up(name, up))
    }

    /// Opens one more queue of this multi-queue device. Takes being the device's owner or in its group, or CAP_NET_ADMIN.
    ///
    /// # Errors
    ///
    /// [`QueueModeMismatch`](OpenErrorKind::QueueModeMismatch) if it was created without `IFF_MULTI_QUEUE`,
    /// [`TooManyQueues`](OpenErrorKind::TooManyQueues) beyond 256, [`Namespace`](OpenErrorKind::Namespace) where the calling thread is
    /// in another network namespace than the device and may not enter that one, and those of [`Builder::open`](crate::Builder::open).
    pub fn add_queue(&self) -> Result<Queue, OpenError> {
        const CALL: &str = "ioctl(TUNSETIFF)";
        let inner = &*self.inner;
        let name = self
            .name()
            .map_err(|error| attach::os_error("ioctl(SIOCGIFNAME)", &error))?;
        if !inner.multi_queue {
            let detail = format!("{name:?} was created without IFF_MULTI_QUEUE and has one queue for good");
            return Err(OpenError::refused(OpenErrorKind::QueueModeMismatch, CALL, detail));
        }
        let mut asked = inner.mode.iff() | tun::IFF_MULTI_QUEUE;
        if !inner.packet_info {
            asked |= tun::IFF_NO_PI;
        }
        if inner.vnet_hdr {
            asked |= tun::IFF_VNET_HDR;
        }
        let open = || attach::open_further(&name, asked, &inner.control);
        let fd = if NetnsId::current().ok() == inner.netns {
            open()?
        } else if let Some(entrance) = &inner.entrance {
            in_netns(entrance, open)??
        } else {
            let detail = "the calling thread is in another network namespace than the device";
            return Err(OpenError::refused(OpenErrorKind::Namespace, CALL, detail));
        };
        // A device of that name was opened; is it this one? A rename between the two calls would have made a new device.
        match self.name() {
            Ok(now) if now == name => {}
            _ => {
                let detail = format!("{name:?} was renamed or deleted meanwhile; try again");
                return Err(OpenError::refused(OpenErrorKind::NotGranted, CALL, detail));
            }
        }
        if inner.vnet_hdr {
            // Whoever attached meanwhile may have changed what belongs to the device.
            inner.offloads.set(attach::negotiate(fd.as_fd(), inner.offloads.get())?);
        }
        let info = QueueInfo {
            name: name.lossy().into_owned(),
            mode: inner.mode,
            packet_info: inner.packet_info,
            multi_queue: true,
            mtu: inner.control.mtu(&name).ok(),
            vnet_hdr: inner.vnet_hdr,
            offloads: Arc::clone(&inner.offloads),
            device: Some(self.clone()),
        };
        Ok(Queue::new(fd, Arc::new(info)))
    }

    /// Runs `work` on a thread in the device's network namespace; on this thread if it is there already.
    #[cfg(any(feature = "engine", feature = "netlink"))]
    pub(crate) fn in_its_namespace<T: Send>(&self, work: impl FnOnce() -> T + Send) -> io::Result<T> {
        match &self.inner.entrance {
            _ if NetnsId::current().ok() == self.inner.netns => Ok(work()),
            Some(entrance) => in_netns(entrance, work).map_err(io::Error::from),
            None => Err(io::Error::from_raw_os_error(libc::ENOENT)),
        }
    }

    /// What stands for the device itself, wherever it is: compared by address, it is the same for
    /// all its handles and queues.
    #[cfg(feature = "engine")]
    pub(crate) fn mark(&self) -> &Arc<SharedOffloads> {
        &self.inner.offloads
    }

    /// A handle for the same device in the namespace that it was moved to, which is asked of a
    /// queue of it.
    #[cfg(feature = "engine")]
    pub(crate) fn follow(&self, queue: &impl AsFd) -> io::Result<Self> {
        // Takes CAP_NET_ADMIN there, and entering takes CAP_SYS_ADMIN.
        let netns = File::from(tun::device_netns(queue.as_fd())?);
        let (name, flags) = tun::iff(queue.as_fd())?;
        let entrance = netns.try_clone()?;
        let inner = &*self.inner;
        let no_pi = if inner.packet_info { 0 } else { tun::IFF_NO_PI };
        let flags = flags & !tun::IFF_NO_PI | no_pi;
        let here = || {
            let control = ControlSocket::new().map_err(|error| attach::os_error("socket(AF_UNIX)", &error))?;
            Self::here(control, &name, flags, Some(entrance), Arc::clone(&inner.offloads))
        };
        Ok(in_netns(&netns, here)??)
    }

    /// Makes a call that takes the name of the device, which must mean the same device before and
    /// after.
    fn call<T>(&self, call: impl Fn(&ControlSocket, &IfName) -> io::Result<T>) -> io::Result<T> {
        /// Renames that may come in between.
        const TRIES: usize = 16;

        let mut name = self.name()?;
        for _ in 0..TRIES {
            let result = call(&self.inner.control, &name);
            let now = self.name()?;
            let missed = result
                .as_ref()
                .is_err_and(|error| error.raw_os_error() == Some(libc::ENODEV));
            // One that was not found under its name, and has the name again, was renamed twice.
            if now == name && !missed {
                return result;
            }
            name = now;
        }
        Err(io::Error::from_raw_os_error(libc::EBUSY))
    }

    /// What the device is called now; ENODEV if it is not in its namespace any more.
    fn name(&self) -> io::Result<IfName> {
        let inner = &*self.inner;
        // In this order: the device has the index now, unless it has left.
        let name = inner.control.name(inner.index)?;
        if self.departed()?.is_some() {
            return Err(io::Error::from_raw_os_error(libc::ENODEV));
        }
        Ok(name)
    }

    /// Whether the device has left its namespace, and how.
    pub(crate) fn departed(&self) -> io::Result<Option<Departure>> {
        let inner = &*self.inner;
        if let Some(notices) = &inner.departure {
            match notices::departure(notices.as_fd()) {
                Ok(Some(departure)) => return Ok(Some(departure)),
                Ok(None) if !inner.unsure.load(Ordering::Relaxed) => return Ok(None),
                Ok(None) => {}
                Err(_) => inner.unsure.store(true, Ordering::Relaxed),
            }
        }
        let bus = match inner.mode {
            Mode::Tun => "tun",
            Mode::Tap => "tap",
        };
        let driver = inner
            .control
            .name(inner.index)
            .and_then(|name| inner.control.driver(&name));
        match driver {
            Ok((driver, at)) if driver == "tun" && at == bus => Ok(None),
            // Of another driver, or without any.
            Ok(_) => Ok(Some(Departure::Deleted)),
            Err(error) if matches!(error.raw_os_error(), Some(libc::ENODEV | libc::EOPNOTSUPP)) => {
                Ok(Some(Departure::Deleted))
            }
            Err(error) => Err(error),
        }
    }
}

/// Runs `work` on a thread of its own inside the namespace.
pub(crate) fn in_netns<T: Send>(netns: &File, work: impl FnOnce() -> T + Send) -> Result<T, OpenError> {
    setns::run_in(netns.as_fd(), work).map_err(|FailedCall { call, error }| {
        let detail = match error.raw_os_error() {
            _ if call == setns::THREAD => "no thread could be started there; raise RLIMIT_NPROC (ulimit -u)",
            Some(libc::EPERM) => {
                "this user may not enter the network namespace; it takes CAP_SYS_ADMIN in the user namespaces of both sides"
            }
            Some(libc::EINVAL) => "the file is not a network namespace",
            _ => "the network namespace could not be entered",
        };
        OpenError::new(OpenErrorKind::Namespace, call, &error, detail)
    })
}
