//! Opens a device with all its queues and settings as one act.

#[cfg(feature = "netlink")]
use std::fmt;
use std::fs::File;
use std::io;
#[cfg(feature = "netlink")]
use std::net::IpAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;

use crate::attach;
use crate::device::{Device, in_netns};
use crate::error::{OpenError, OpenErrorKind};
use crate::iface::Mode;
#[cfg(feature = "netlink")]
use crate::netlink::{self, Handle, RequestError};
use crate::offload::Offloads;
use crate::queue::{MultiQueue, QueueInfo, SharedOffloads};
use crate::sys::netdevice::{ControlSocket, IfName};
use crate::sys::{host, setns, tun};

/// Describes a device, and opens it: all of it or nothing.
///
/// # Example
///
/// ```no_run
/// use tun_driver::{Builder, Mode};
///
/// # fn main() -> Result<(), tun_driver::OpenError> {
/// let device = Builder::new("gw%d", Mode::Tun).queues(4).mtu(1420).up(true).open()?;
/// println!("{} has {} queues", device.name(), device.len());
/// for queue in device.into_queues() {
///     // Give each to its own worker.
/// }
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct Builder {
    name: String,
    mode: Mode,
    queues: usize,
    multi_queue: bool,
    packet_info: bool,
    offloads: Offloads,
    attach_existing: bool,
    persist: Option<bool>,
    owner: Option<u32>,
    group: Option<u32>,
    netns: Option<Netns>,
    mtu: Option<u32>,
    mac: Option<[u8; 6]>,
    txqueuelen: Option<u32>,
    up: Option<bool>,
    #[cfg(feature = "netlink")]
    addresses: Vec<(IpAddr, u8)>,
    #[cfg(feature = "netlink")]
    routes: Vec<Route>,
}

#[derive(Debug)]
enum Netns {
    /// The copy of the caller's descriptor, or why there is none.
    Descriptor(io::Result<OwnedFd>),
    Path(PathBuf),
}

#[cfg(feature = "netlink")]
#[derive(Clone, Copy, Debug)]
struct Route {
    destination: IpAddr,
    prefix: u8,
    gateway: Option<IpAddr>,
}

impl Builder {
    /// A device of this name with one queue and no packet information, down, without address, and as the kernel makes it otherwise.
    ///
    /// The name may have one `%d`, for which the kernel puts the lowest free number, and may be empty for `tun%d` or `tap%d`. It has at
    /// most 15 bytes, without `/`, `:`, NUL and white space; a longer one is refused, not cut.
    pub fn new(name: &str, mode: Mode) -> Self {
        Self {
            name: name.to_owned(),
            mode,
            queues: 1,
            multi_queue: false,
            packet_info: false,
            offloads: Offloads::none(),
            attach_existing: false,
            persist: None,
            owner: None,
            group: None,
            netns: None,
            mtu: None,
            mac: None,
            txqueuelen: None,
            up: None,
            #[cfg(feature = "netlink")]
            addresses: Vec::new(),
            #[cfg(feature = "netlink")]
            routes: Vec::new(),
        }
    }

    /// How many queues to open, 1 (the default) to 256. One queue is opened without `IFF_MULTI_QUEUE`, and the device then has one for good.
    pub fn queues(mut self, queues: usize) -> Self {
        self.queues = queues;
        self
    }

    /// Opens even a single queue with `IFF_MULTI_QUEUE`, so that others may be added. Several queues always are.
    pub fn multi_queue(mut self, multi_queue: bool) -> Self {
        self.multi_queue = multi_queue;
        self
    }

    /// Whether four bytes of packet information (`struct tun_pi`) are in front of each packet. Not so by default.
    pub fn packet_info(mut self, packet_info: bool) -> Self {
        self.packet_info = packet_info;
        self
    }

    /// Asks for offloads: none by default. What the kernel grants of them is told by [`MultiQueue::granted`].
    ///
    /// With any, the device is opened with `IFF_VNET_HDR`. What a worker receives from it may then be a superpacket of up to 64 KiB, or have a
    /// checksum that is to be finished; [`PacketBuf::meta`](crate::PacketBuf::meta) tells. [`Worker::send_many`](crate::Worker::send_many) passes
    /// such packets on where they can go so, cuts and finishes them where not, and merges plain packets into superpackets. Not together with
    /// [`packet_info`](Self::packet_info).
    ///
    /// ```no_run
    /// use tun_driver::{Builder, Mode, Offloads};
    ///
    /// # fn main() -> Result<(), tun_driver::OpenError> {
    /// let device = Builder::new("gw%d", Mode::Tun).offloads(Offloads::all()).up(true).open()?;
    /// println!("granted: {}", device.granted().offloads);
    /// # Ok(())
    /// # }
    /// ```
    pub fn offloads(mut self, offloads: Offloads) -> Self {
        self.offloads = offloads;
        self
    }

    /// Attaches to a device of that name if there is one, instead of refusing. It must be of the same mode, and multi-queue or not, as
    /// asked here. Its owner may do so without privilege, if the settings need none.
    ///
    /// What survives on a persistent device from earlier users is put back: header size, offloads (set anew if asked for), carrier, steering and filter
    /// programs, address filter. Not put back is what anybody may see and set: addresses, MTU, up or down.
    pub fn attach_existing(mut self, attach: bool) -> Self {
        self.attach_existing = attach;
        self
    }

    /// Makes the device outlive its queues (`true`), or makes an existing persistent one go with them (`false`).
    ///
    /// A device made persistent belongs to the caller's effective user unless [`owner`](Self::owner) or [`group`](Self::group) say
    /// otherwise: the kernel lets anybody attach to one that has neither. It is the last setting made, so a failure leaves nothing behind.
    pub fn persist(mut self, persist: bool) -> Self {
        self.persist = Some(persist);
        self
    }

    /// The user who may attach to the device without CAP_NET_ADMIN.
    pub fn owner(mut self, uid: u32) -> Self {
        self.owner = Some(uid);
        self
    }

    /// The group whose members may attach to the device without CAP_NET_ADMIN.
    pub fn group(mut self, gid: u32) -> Self {
        self.group = Some(gid);
        self
    }

    /// Creates the device in this network namespace. The queues can be used from anywhere; the calling thread stays where it is.
    ///
    /// Takes CAP_SYS_ADMIN in the user namespaces of both sides. The node `/dev/net/tun` is that of the caller.
    pub fn netns(mut self, netns: impl AsFd) -> Self {
        self.netns = Some(Netns::Descriptor(netns.as_fd().try_clone_to_owned()));
        self
    }

    /// Like [`netns`](Self::netns), by a file such as `/run/netns/blue` (made by `ip netns add blue`) or `/proc/1234/ns/net`.
    pub fn netns_path(mut self, path: impl Into<PathBuf>) -> Self {
        self.netns = Some(Netns::Path(path.into()));
        self
    }

    /// The largest IP packet in bytes: 68 … 65535 for TUN, 68 … 65521 for TAP. 1500 by default.
    pub fn mtu(mut self, mtu: u32) -> Self {
        self.mtu = Some(mtu);
        self
    }

    /// The Ethernet address of a TAP device. Random by default.
    pub fn mac(mut self, mac: [u8; 6]) -> Self {
        self.mac = Some(mac);
        self
    }

    /// How many packets the kernel keeps in each queue before it drops: 500 (TUN) or 1000 (TAP) by
    /// default. What it takes at most differs: 32,767 on some kernels (Debian's 6.1 and 6.12), and
    /// 524,288 on others (6.18).
    pub fn txqueuelen(mut self, packets: u32) -> Self {
        self.txqueuelen = Some(packets);
        self
    }

    /// Sets the device up (or down, if it exists) once it is configured. A new one is down by default.
    pub fn up(mut self, up: bool) -> Self {
        self.up = Some(up);
        self
    }

    /// Adds an address with the length of its prefix. May be called again for more.
    ///
    /// [`open`](Self::open) refuses an address whose network another device that is up has already
    /// (EEXIST, with the name of that device): the kernel would take it and send to that network
    /// through the other device. With [`up(true)`](Self::up) it also refuses one whose network
    /// another route of the main table takes, be it one that drops the packets. Single addresses
    /// (/32, /128) may be shared. An address that no host can have (all zero, of multicast,
    /// 255.255.255.255, `::1`) is refused before the kernel is asked.
    ///
    /// The kernel completes an IPv6 address a moment after the device is up, on another thread.
    /// Packets to the address that are written before then are dropped.
    #[cfg(feature = "netlink")]
    pub fn address(mut self, address: impl Into<IpAddr>, prefix: u8) -> Self {
        self.addresses.push((address.into(), prefix));
        self
    }

    /// Adds a route through the device to `destination`/`prefix`, by way of `gateway` if there is one. The device must be
    /// [`up`](Self::up). May be called again for more.
    ///
    /// A route that exists already is no error if it is this one. If packets to exactly this
    /// destination take another route of the main table, [`open`](Self::open) fails with EEXIST and
    /// names the device that they go through. Longer prefixes are not looked at.
    #[cfg(feature = "netlink")]
    pub fn route(mut self, destination: impl Into<IpAddr>, prefix: u8, gateway: Option<IpAddr>) -> Self {
        self.routes.push(Route {
            destination: destination.into(),
            prefix,
            gateway,
        });
        self
    }

    /// Opens the device and all its queues, and applies the settings. Flags are read back from each queue and compared.
    ///
    /// A name that is in use by a TUN or TAP device is tried again for at least 200 ms and ten
    /// tries, each of which can wait for a lock of the kernel: the device of a program that was
    /// killed stays for a moment.
    ///
    /// If any step fails, everything opened is closed, and a device that was created here is gone. Settings changed on a device that
    /// existed before ([`attach_existing`](Self::attach_existing)) stay changed.
    ///
    /// # Errors
    ///
    /// [`OpenError`] names the call and the likely cause. The most common ones are [`Permission`](OpenErrorKind::Permission) (EPERM:
    /// creating a device takes CAP_NET_ADMIN), [`NameTaken`](OpenErrorKind::NameTaken) (EBUSY) and
    /// [`NoTunNode`](OpenErrorKind::NoTunNode) (ENOENT, EACCES).
    pub fn open(&self) -> Result<MultiQueue, OpenError> {
        self.validate()?;
        match &self.netns {
            None => self.open_here(None),
            Some(netns) => {
                let file = netns.file()?;
                let entrance = file
                    .try_clone()
                    .map_err(|error| attach::os_error("fcntl(F_DUPFD_CLOEXEC)", &error))?;
                in_netns(&file, || self.open_here(Some(entrance))).map_err(|error| match netns {
                    Netns::Path(path) => error.about(&path.display().to_string()),
                    Netns::Descriptor(_) => error,
                })?
            }
        }
    }

    fn validate(&self) -> Result<(), OpenError> {
        let refused = |kind, detail: &str| Err(OpenError::refused(kind, "Builder::open", detail));
        if let Some(why) = invalid_name(&self.name) {
            return refused(
                OpenErrorKind::InvalidName,
                &format!("{:?} is no name for a device: {why}", self.name),
            );
        }
        if self.queues == 0 {
            return refused(OpenErrorKind::InvalidSetting, "a device has at least one queue");
        }
        if self.queues > tun::MAX_QUEUES {
            let detail = format!("{} queues asked; a device has at most {}", self.queues, tun::MAX_QUEUES);
            let error = io::Error::from_raw_os_error(libc::E2BIG);
            return Err(OpenError::new(
                OpenErrorKind::TooManyQueues,
                "Builder::open",
                &error,
                detail,
            ));
        }
        if self.mac.is_some() && self.mode == Mode::Tun {
            return refused(
                OpenErrorKind::InvalidSetting,
                "a TUN device has no Ethernet address; mac() is for TAP",
            );
        }
        if self.packet_info && !self.offloads.is_empty() {
            return refused(
                OpenErrorKind::InvalidSetting,
                "offloads and packet_info(true) do not go together; the virtio-net header tells more than packet information does",
            );
        }
        #[cfg(feature = "netlink")]
        {
            for (address, prefix) in self
                .addresses
                .iter()
                .copied()
                .chain(self.routes.iter().map(|route| (route.destination, route.prefix)))
            {
                if prefix > if address.is_ipv4() { 32 } else { 128 } {
                    let detail = format!("{address}/{prefix}: the prefix is longer than the address");
                    return refused(OpenErrorKind::InvalidSetting, &detail);
                }
            }
            for &(address, prefix) in &self.addresses {
                if let Some(why) = no_hosts(address) {
                    let detail = format!("{address}/{prefix} is no address for a device: {why}; take another address");
                    return refused(OpenErrorKind::InvalidSetting, &detail);
                }
            }
            for route in &self.routes {
                if let Some(gateway) = route.gateway
                    && gateway.is_ipv4() != route.destination.is_ipv4()
                {
                    let detail = format!(
                        "the route to {}/{}: its gateway {gateway} is of another address family; name one of the same",
                        route.destination, route.prefix
                    );
                    return refused(OpenErrorKind::InvalidSetting, &detail);
                }
            }
            if self.up != Some(true) && !self.attach_existing && !self.routes.is_empty() {
                return refused(
                    OpenErrorKind::InvalidSetting,
                    "routes need the device to be up; say up(true)",
                );
            }
        }
        Ok(())
    }

    /// Opens in the namespace of the calling thread.
    fn open_here(&self, entrance: Option<File>) -> Result<MultiQueue, OpenError> {
        let control = ControlSocket::new().map_err(|error| attach::os_error("socket(AF_UNIX)", &error))?;
        let asked = self.flags();
        let Opened {
            fds,
            name,
            mut flags,
            attached,
        } = self.open_queues(asked, &control)?;
        if attached {
            reset(&fds, self.mode)?;
        }
        let offloads = Arc::new(SharedOffloads::default());
        if flags & tun::IFF_VNET_HDR != 0 {
            offloads.set(attach::negotiate(fds[0].as_fd(), self.offloads)?);
        }
        let device = Device::here(control, &name, flags, entrance, Arc::clone(&offloads))?;
        self.configure(&fds, &device, attached)?;
        // Last, so that nothing that fails leaves a device behind.
        self.apply_persist(&fds, &mut flags)?;
        let mtu = device
            .mtu()
            .map_err(|error| attach::os_error("ioctl(SIOCGIFMTU)", &error))?;
        let info = QueueInfo::new(&name, flags, Some(mtu), offloads);
        Ok(MultiQueue::opened(fds, info, flags, device))
    }

    fn flags(&self) -> u16 {
        let mut flags = self.mode.iff();
        if !self.packet_info {
            flags |= tun::IFF_NO_PI;
        }
        if !self.offloads.is_empty() {
            flags |= tun::IFF_VNET_HDR;
        }
        if self.queues > 1 || self.multi_queue {
            flags |= tun::IFF_MULTI_QUEUE;
        }
        flags
    }

    fn open_queues(&self, asked: u16, control: &ControlSocket) -> Result<Opened, OpenError> {
        let mut fds = Vec::with_capacity(self.queues);
        let first = attach::open_node(true)?;
        let wanted = IfName::truncated(&self.name);
        let mut attached = false;
        // Exclusive, so that we know whether the device is ours.
        let exclusive = asked | tun::IFF_TUN_EXCL;
        let name = if self.attach_existing {
            match attach::set_iff(first.as_fd(), &wanted, exclusive, control) {
                Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {
                    attached = true;
                    attach::set_iff_once_free(first.as_fd(), &wanted, asked, control)?
                }
                result => result?,
            }
        } else {
            attach::set_iff_once_free(first.as_fd(), &wanted, exclusive, control)?
        };
        fds.push(first);
        for _ in 1..self.queues {
            fds.push(attach::open_further(&name, asked, control)?);
        }
        // Only now: the first one too must still be on the device of this name.
        let mut flags = 0;
        for fd in &fds {
            flags = attach::verify(fd.as_fd(), &name, asked)?;
        }
        if attached {
            attach::check_packet_info(fds[0].as_fd(), &name, asked)?;
        }
        Ok(Opened {
            fds,
            name,
            flags,
            attached,
        })
    }

    fn configure(&self, fds: &[OwnedFd], device: &Device, attached: bool) -> Result<(), OpenError> {
        let first = fds[0].as_fd();
        if let Some(uid) = self.owner {
            tun::set_owner(first, uid)
                .map_err(|error| setting_error("ioctl(TUNSETOWNER)", &error, "no such user id"))?;
        }
        if let Some(gid) = self.group {
            tun::set_group(first, gid)
                .map_err(|error| setting_error("ioctl(TUNSETGROUP)", &error, "no such group id"))?;
        }
        if let Some(mac) = self.mac {
            device.set_mac(mac).map_err(|error| {
                setting_error(
                    "ioctl(SIOCSIFHWADDR)",
                    &error,
                    "an Ethernet address of a device is neither multicast nor zero",
                )
            })?;
        }
        if let Some(mtu) = self.mtu {
            let limit = match self.mode {
                Mode::Tun => 65_535,
                Mode::Tap => 65_521,
            };
            device.set_mtu(mtu).map_err(|error| {
                setting_error(
                    "ioctl(SIOCSIFMTU)",
                    &error,
                    &format!("an MTU of {mtu}; the kernel takes 68 to {limit}"),
                )
            })?;
        }
        if let Some(packets) = self.txqueuelen {
            const CALL: &str = "ioctl(SIOCSIFTXQLEN)";
            /// Packets that every kernel takes.
            const MOST_EVERYWHERE: u32 = 32_767;
            device.set_txqueuelen(packets).map_err(|error| match error.raw_os_error() {
                // No ring is longer than KMALLOC_MAX_SIZE (`__ptr_ring_init_queue_alloc`); the
                // driver refuses in a notifier (`tun_device_event`), and that comes as EPERM.
                Some(libc::EPERM) if packets > MOST_EVERYWHERE => OpenError::new(
                    OpenErrorKind::Permission,
                    CALL,
                    &error,
                    format!(
                        "a queue of {packets} packets is more than this kernel can hold, or the caller lacks \
                         CAP_NET_ADMIN in the initial user namespace; ask for fewer packets, or run as root"
                    ),
                ),
                Some(libc::EPERM) => OpenError::new(
                    OpenErrorKind::Permission,
                    CALL,
                    &error,
                    "the caller lacks CAP_NET_ADMIN in the initial user namespace, or without it the feature `netlink`; \
                     run as root, or build with that feature",
                ),
                _ => setting_error(
                    CALL,
                    &error,
                    &format!("a queue of {packets} packets is more than the kernel can hold"),
                ),
            })?;
        }
        #[cfg(feature = "netlink")]
        self.add_addresses(device, attached)?;
        if let Some(up) = self.up {
            device
                .set_up(up)
                .map_err(|error| setting_error("ioctl(SIOCSIFFLAGS)", &error, "the device does not come up"))?;
        }
        // Routes over a device that is down are refused.
        #[cfg(feature = "netlink")]
        {
            self.check_addresses(device)?;
            self.add_routes(device)?;
        }
        #[cfg(not(feature = "netlink"))]
        let _ = attached;
        Ok(())
    }

    #[cfg(feature = "netlink")]
    fn add_addresses(&self, device: &Device, attached: bool) -> Result<(), OpenError> {
        if self.addresses.is_empty() {
            return Ok(());
        }
        let netlink = open_netlink()?;
        for &(address, prefix) in &self.addresses {
            check_network(&netlink, device.index(), address, prefix)?;
            let result = netlink.add_address(device.index(), address, prefix);
            there_already(result, attached).map_err(|error| netlink_error(&error, format!("{address}/{prefix}")))?;
        }
        Ok(())
    }

    /// Refuses an address whose network is not reached over this device. The kernel routes the
    /// network over it once it is up.
    #[cfg(feature = "netlink")]
    fn check_addresses(&self, device: &Device) -> Result<(), OpenError> {
        // No network is routed for a single address, nor for all of IPv4.
        let has_network = |address: IpAddr, prefix: u8| (1..if address.is_ipv4() { 32 } else { 128 }).contains(&prefix);
        let mut networks = self.addresses.iter().filter(|at| has_network(at.0, at.1)).peekable();
        if self.up != Some(true) || networks.peek().is_none() {
            return Ok(());
        }
        let netlink = open_netlink()?;
        for &(address, prefix) in networks {
            let network = Route {
                destination: netlink::network_of(address, prefix),
                prefix,
                gateway: None,
            };
            // None at all: it is in another table (a VRF's), or left out (IFA_F_NOPREFIXROUTE).
            if let Some(way) = way_around(&netlink, device.index(), &network)?.filter(|way| !way.is_missing()) {
                let detail = format!("{address}/{prefix}: a route to its network {way}");
                return Err(exists_already("RTM_NEWADDR", detail));
            }
        }
        Ok(())
    }

    #[cfg(feature = "netlink")]
    fn add_routes(&self, device: &Device) -> Result<(), OpenError> {
        if self.routes.is_empty() {
            return Ok(());
        }
        let netlink = open_netlink()?;
        for route in &self.routes {
            let &Route {
                destination,
                prefix,
                gateway,
            } = route;
            let added = netlink.add_route(destination, prefix, gateway, device.index());
            match added {
                // Another metric is another route: the kernel takes both, and packets follow the
                // lesser one. IPv4 routes get the least.
                Ok(()) if destination.is_ipv6() => check_route(&netlink, device.index(), route)?,
                Err(error) if netlink_errno(&error) == Some(libc::EEXIST) => {
                    check_route(&netlink, device.index(), route)?;
                }
                result => {
                    result.map_err(|error| netlink_error(&error, format!("the route to {destination}/{prefix}")))?
                }
            }
        }
        Ok(())
    }

    fn apply_persist(&self, fds: &[OwnedFd], flags: &mut u16) -> Result<(), OpenError> {
        let first = fds[0].as_fd();
        let is_persistent = *flags & tun::IFF_PERSIST != 0;
        match self.persist {
            Some(true) if !is_persistent => {
                if self.owner.is_none() && self.group.is_none() {
                    tun::set_owner(first, host::effective_uid())
                        .map_err(|error| attach::os_error("ioctl(TUNSETOWNER)", &error))?;
                }
                tun::set_persist(first, true).map_err(|error| attach::os_error("ioctl(TUNSETPERSIST)", &error))?;
                *flags |= tun::IFF_PERSIST;
            }
            Some(false) if is_persistent => {
                tun::set_persist(first, false).map_err(|error| attach::os_error("ioctl(TUNSETPERSIST)", &error))?;
                *flags &= !tun::IFF_PERSIST;
            }
            _ => {}
        }
        Ok(())
    }
}

struct Opened {
    fds: Vec<OwnedFd>,
    name: IfName,
    flags: u16,
    /// The device was there before.
    attached: bool,
}

impl Netns {
    fn file(&self) -> Result<File, OpenError> {
        let (result, call, detail) = match self {
            Netns::Descriptor(Ok(fd)) => (
                fd.try_clone(),
                "fcntl(F_DUPFD_CLOEXEC)",
                "the namespace's descriptor cannot be copied".to_owned(),
            ),
            Netns::Descriptor(Err(error)) => {
                // io::Error is not Clone; the errno is all there is to it.
                let error = io::Error::from_raw_os_error(error.raw_os_error().unwrap_or(libc::EBADF));
                (
                    Err(error),
                    "fcntl(F_DUPFD_CLOEXEC)",
                    "the namespace's descriptor cannot be copied".to_owned(),
                )
            }
            Netns::Path(path) if path.as_os_str().is_empty() => (
                Err(io::Error::from_raw_os_error(libc::ENOENT)),
                "open(netns)",
                "the path is empty; name the file of a network namespace, such as /run/netns/blue".to_owned(),
            ),
            Netns::Path(path) => (
                setns::open(path).map(OwnedFd::from),
                "open(netns)",
                format!(
                    "there is no network namespace at {}, or this user may not open it",
                    path.display()
                ),
            ),
        };
        result
            .map(File::from)
            .map_err(|error| OpenError::new(OpenErrorKind::Namespace, call, &error, detail))
    }
}

/// Puts back what a persistent device keeps from whoever had it before. What older kernels do not know, they do not keep. The send buffer
/// is the queue's own, and a new one has the default; setting it would change that of others' queues.
fn reset(fds: &[OwnedFd], mode: Mode) -> Result<(), OpenError> {
    let first = fds[0].as_fd();
    let must = |call, result: io::Result<()>| result.map_err(|error| attach::os_error(call, &error));
    must("ioctl(TUNSETOFFLOAD)", tun::set_offload(first, 0))?;
    must(
        "ioctl(TUNSETVNETHDRSZ)",
        tun::set_vnet_hdr_size(first, tun::VNET_HDR_SIZE_DEFAULT),
    )?;
    let known = |call, result: io::Result<()>| match result {
        Err(error) if matches!(error.raw_os_error(), Some(libc::EINVAL | libc::ENOTTY)) => Ok(()),
        result => must(call, result),
    };
    known("ioctl(TUNSETCARRIER)", tun::set_carrier(first, true))?;
    known("ioctl(TUNSETSTEERINGEBPF)", tun::clear_steering(first))?;
    known("ioctl(TUNSETFILTEREBPF)", tun::clear_filter(first))?;
    if mode == Mode::Tap {
        must("ioctl(TUNSETTXFILTER)", tun::clear_address_filter(first))?;
    }
    Ok(())
}

fn setting_error(call: &'static str, error: &io::Error, invalid: &str) -> OpenError {
    match error.raw_os_error() {
        Some(libc::EINVAL | libc::ERANGE | libc::EADDRNOTAVAIL) => {
            OpenError::new(OpenErrorKind::InvalidSetting, call, error, invalid)
        }
        _ => attach::os_error(call, error),
    }
}

/// A device that existed before may well have the address or route: then there is nothing to do.
#[cfg(feature = "netlink")]
fn there_already(result: io::Result<()>, attached: bool) -> io::Result<()> {
    match result {
        Err(error) if attached && netlink_errno(&error) == Some(libc::EEXIST) => Ok(()),
        result => result,
    }
}

#[cfg(feature = "netlink")]
fn open_netlink() -> Result<Handle, OpenError> {
    Handle::new().map_err(|error| {
        let call = RequestError::of(&error).map_or("socket(AF_NETLINK)", RequestError::request);
        let errno = netlink_errno(&error).map_or_else(|| io::Error::from(error.kind()), io::Error::from_raw_os_error);
        match errno.raw_os_error() {
            Some(libc::EPERM | libc::EACCES | libc::EAFNOSUPPORT | libc::EPROTONOSUPPORT | libc::ENOSYS) => {
                OpenError::new(
                    OpenErrorKind::Unsupported,
                    call,
                    &errno,
                    "addresses and routes are set through rtnetlink, which the kernel or a sandbox (seccomp, \
                 RestrictAddressFamilies) refuses; allow AF_NETLINK, or set them from outside",
                )
            }
            _ => attach::os_error(call, &errno),
        }
    })
}

/// Refuses an address whose network another device that is up has already: the kernel takes it, and
/// sends to that network through the other device. A single address (/32, /128) has no network, and
/// tunnels may share one.
#[cfg(feature = "netlink")]
fn check_network(netlink: &Handle, index: u32, address: IpAddr, prefix: u8) -> Result<(), OpenError> {
    if prefix == if address.is_ipv4() { 32 } else { 128 } {
        return Ok(());
    }
    let subject = format!("{address}/{prefix}");
    let others = netlink
        .addresses(address)
        .map_err(|error| netlink_error(&error, subject.clone()))?;
    for (other, held, length) in others {
        if other == index || length != prefix || !netlink::same_network(held, address, prefix) {
            continue;
        }
        // One that is gone by now, or is down, draws no packets.
        let Some(link) = netlink.link(other).ok().filter(|link| link.up) else {
            continue;
        };
        let detail = format!(
            "{subject}: its network is reached through {:?} already, which has {held}/{length}; take the address from that device, or use another network",
            link.name
        );
        let error = io::Error::from_raw_os_error(libc::EEXIST);
        return Err(OpenError::new(
            OpenErrorKind::InvalidSetting,
            "RTM_NEWADDR",
            &error,
            detail,
        ));
    }
    Ok(())
}

/// Whether packets to the destination really take this route: over this device, and by the gateway
/// asked for.
#[cfg(feature = "netlink")]
fn check_route(netlink: &Handle, index: u32, asked: &Route) -> Result<(), OpenError> {
    let Some(way) = way_around(netlink, index, asked)? else {
        return Ok(());
    };
    let detail = format!("the route to {}/{} {way}", asked.destination, asked.prefix);
    Err(exists_already("RTM_NEWROUTE", detail))
}

#[cfg(feature = "netlink")]
fn exists_already(call: &'static str, detail: String) -> OpenError {
    let error = io::Error::from_raw_os_error(libc::EEXIST);
    OpenError::new(OpenErrorKind::InvalidSetting, call, &error, detail)
}

/// Why packets do not take the route that was asked for.
#[cfg(feature = "netlink")]
enum Around {
    /// It was there a moment ago, or is in no table that can be listed.
    Missing,
    /// The metric of the route that they take, and its way.
    Taken(u32, String),
}

#[cfg(feature = "netlink")]
impl Around {
    fn is_missing(&self) -> bool {
        matches!(self, Self::Missing)
    }
}

#[cfg(feature = "netlink")]
impl fmt::Display for Around {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Missing => f.write_str("was there, and changed meanwhile; try again"),
            Self::Taken(metric, way) => write!(
                f,
                "exists already, with metric {metric}, and {way}; delete that route, or use a longer prefix"
            ),
        }
    }
}

/// Which way packets to the destination take instead of the one asked for; `None` if they take
/// that one.
#[cfg(feature = "netlink")]
fn way_around(netlink: &Handle, index: u32, asked: &Route) -> Result<Option<Around>, OpenError> {
    let is_ours = |route: &netlink::Route| {
        route.gateway == asked.gateway && !route.links.is_empty() && route.links.iter().all(|&link| link == index)
    };
    // Mostly this is the answer. Without it the whole table is to be looked through, which may have
    // a million routes.
    if netlink
        .route_in_use(asked.destination, asked.prefix)
        .is_some_and(|route| is_ours(&route))
    {
        return Ok(None);
    }
    let routes = netlink
        .routes_to(asked.destination, asked.prefix)
        .map_err(|error| netlink_error(&error, format!("the route to {}/{}", asked.destination, asked.prefix)))?;
    // The first of those with the least metric is the one in use; of IPv6 routes without gateway,
    // that is the oldest.
    let Some(used) = routes.iter().min_by_key(|route| route.metric) else {
        return Ok(Some(Around::Missing));
    };
    if is_ours(used) {
        return Ok(None);
    }
    let via = used
        .gateway
        .map_or_else(String::new, |gateway| format!(" by way of {gateway}"));
    let way = match used.links.iter().find(|&&link| link != index).or(used.links.first()) {
        Some(&link) => match netlink.link(link) {
            Ok(link) => format!("leads through {:?}{via}", link.name),
            Err(_) => format!("leads through device {link}{via}"),
        },
        None => "drops the packets".to_owned(),
    };
    Ok(Some(Around::Taken(used.metric, way)))
}

/// Why no host can have this address, if none can. Loopback addresses of IPv4 are left to the
/// kernel, which takes them.
#[cfg(feature = "netlink")]
fn no_hosts(address: IpAddr) -> Option<&'static str> {
    match address {
        _ if address.is_unspecified() => Some("it means none in particular"),
        _ if address.is_multicast() => Some("it is that of a multicast group"),
        IpAddr::V4(address) if address.is_broadcast() => Some("it means every host"),
        IpAddr::V6(address) if address.is_loopback() => Some("it is that of the loopback device"),
        _ => None,
    }
}

#[cfg(feature = "netlink")]
fn netlink_error(error: &io::Error, subject: String) -> OpenError {
    let call = RequestError::of(error).map_or("rtnetlink", RequestError::request);
    let Some(errno) = netlink_errno(error) else {
        return OpenError::refused(OpenErrorKind::Other, call, format!("{subject}: {error}"));
    };
    let source = io::Error::from_raw_os_error(errno);
    let detail = match errno {
        libc::EEXIST => format!("{subject} is there already, on this or another device"),
        libc::ENETUNREACH | libc::EHOSTUNREACH => format!("{subject}: the gateway cannot be reached over this device"),
        libc::ENETDOWN => format!("{subject}: the device is down; say up(true)"),
        libc::EINVAL | libc::EADDRNOTAVAIL => {
            let why = RequestError::of(error).map_or("", RequestError::explanation);
            let why = if why.is_empty() {
                String::new()
            } else {
                format!(": {why}")
            };
            format!(
                "{subject} is not taken by the kernel{why}; clear the bits after the prefix, and give IPv6 an MTU of at least 1280"
            )
        }
        libc::EACCES | libc::EOPNOTSUPP | libc::EAFNOSUPPORT => {
            format!("{subject}: this address family is off (sysctl net.ipv6.conf.all.disable_ipv6)")
        }
        _ => return attach::os_error(call, &source),
    };
    OpenError::new(OpenErrorKind::InvalidSetting, call, &source, detail)
}

#[cfg(feature = "netlink")]
fn netlink_errno(error: &io::Error) -> Option<i32> {
    RequestError::of(error).map_or(error.raw_os_error(), RequestError::raw_os_error)
}

/// Why the kernel would refuse the name, or cut it: dev_valid_name and dev_alloc_name of net/core/dev.c, and
/// sysctl_dev_name_is_allowed of net/ipv4/devinet.c.
fn invalid_name(name: &str) -> Option<&'static str> {
    if name.len() > IfName::MAX_LEN {
        return Some("it has more than 15 bytes");
    }
    if name == "." || name == ".." {
        return Some("it is a directory");
    }
    // The folders of net.ipv4.conf and net.ipv6.conf that are no device's.
    if name == "all" || name == "default" {
        return Some("it means every device to sysctl");
    }
    if name.bytes().any(|byte| byte == 0) {
        return Some("it has a NUL inside");
    }
    // isspace() of the kernel works on Latin-1, where 0xa0 is a space.
    if name
        .bytes()
        .any(|byte| matches!(byte, b'/' | b':' | b' ' | b'\t'..=b'\r' | 0xa0))
    {
        return Some("it has a slash, a colon, white space or the byte 0xa0 in it");
    }
    match name.split_once('%') {
        Some((_, rest)) if !rest.starts_with('d') || rest.contains('%') => {
            Some("a percent sign must be that of a single %d")
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::invalid_name;

    #[test]
    fn names_that_the_kernel_takes_are_valid() {
        for name in ["", "tun0", "gw%d", "%d", "123456789012345", "ünï", "a.b-c_d"] {
            assert_eq!(invalid_name(name), None, "{name:?}");
        }
    }

    #[test]
    fn names_that_the_kernel_refuses_or_cuts_are_invalid() {
        // "à" is C3 A0 in UTF-8.
        for name in [
            "1234567890123456",
            ".",
            "..",
            "a/b",
            "a:b",
            "a b",
            "a\tb",
            "a\nb",
            "a\0b",
            "%",
            "%s",
            "%d%d",
            "à",
            "all",
            "default",
        ] {
            assert!(invalid_name(name).is_some(), "{name:?}");
        }
    }
}
