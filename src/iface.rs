//! The plain device: one TUN or TAP interface, one packet per call.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, IntoRawFd, OwnedFd, RawFd};

use crate::attach;
use crate::error::PortError;
use crate::sys::netdevice::{ControlSocket, IfName};
use crate::sys::tun;

/// Which kind of packets a device carries.
#[derive(Clone, Copy, Debug, Eq, PartialEq, Hash, Ord, PartialOrd)]
pub enum Mode {
    /// IP packets (layer 3). The device has no Ethernet address.
    Tun,
    /// Ethernet frames (layer 2), without the frame check sequence.
    Tap,
}

impl Mode {
    /// The bit of `ifr_flags` that asks for it.
    pub(crate) fn iff(self) -> u16 {
        match self {
            Mode::Tun => tun::IFF_TUN,
            Mode::Tap => tun::IFF_TAP,
        }
    }

    pub(crate) fn from_iff(flags: u16) -> Self {
        if flags & tun::IFF_TAP != 0 {
            Mode::Tap
        } else {
            Mode::Tun
        }
    }
}

/// A TUN or TAP device with blocking calls, one packet each.
///
/// What the network stack sends out through the device, [`recv`](Self::recv) returns; what [`send`](Self::send) is given, the network
/// stack receives. Both take `&self`, and one thread may receive while another one sends (share it with an [`Arc`](std::sync::Arc)).
///
/// The device has one queue. It comes up without address, with the kernel's MTU (1500) and *down*: nothing arrives, and sending fails
/// with EIO, until it is set up, for instance by `ip link set dev mytun up`. Unless it was made persistent elsewhere it is removed when
/// the `Iface` is dropped, and is gone when the drop returns.
///
/// To have several queues, to set addresses and such, or to move packets in batches, see [`Builder`](crate::Builder).
///
/// # Example
///
/// ```no_run
/// use tun_driver::{Iface, Mode};
///
/// let iface = Iface::new("mytun", Mode::Tun).expect("Failed to create a TUN device");
/// println!("created {}", iface.name());
/// // Configure the device (`ip addr add …; ip link set … up`), then:
/// let mut buffer = vec![0; 1504]; // MTU + 4 bytes of packet information
/// loop {
///     let len = iface.recv(&mut buffer).unwrap();
///     println!("received {:?}", &buffer[4..len]);
/// }
/// ```
#[derive(Debug)]
pub struct Iface {
    file: File,
    mode: Mode,
    name: String,
}

impl Iface {
    /// Creates the device `ifname`, or attaches to an existing persistent one that nobody else has open, with four bytes of packet
    /// information in front of each packet (`struct tun_pi`): two bytes of flags in the byte order
    /// of this machine, and the EtherType, big-endian.
    ///
    /// `ifname` may be a template with one `%d`, for which the kernel puts the lowest free number, or empty for `tun%d` or `tap%d`.
    /// [`name`](Self::name) says what came of it. The name ends at its first NUL, and is cut to 15 bytes.
    ///
    /// # Errors
    ///
    /// Those of open(2) and of the TUNSETIFF ioctl. Each has an [`OpenError`](crate::OpenError)
    /// inside (`get_ref`), whose text names the call, the likely cause and a remedy, and whose
    /// `raw_os_error` is the errno; the [`kind`](io::Error::kind) is that of the errno.
    /// `raw_os_error` of the [`io::Error`] itself is `None`, since std keeps either a text or a
    /// number. Its [`source`](std::error::Error::source) is the [`io::Error`] that has the number:
    ///
    /// ```no_run
    /// use std::{error::Error, io};
    /// use tun_driver::{Iface, Mode};
    ///
    /// let error = Iface::new("lo", Mode::Tun).unwrap_err();
    /// let cause = error.source().and_then(|cause| cause.downcast_ref::<io::Error>());
    /// let errno = cause.and_then(io::Error::raw_os_error);
    /// eprintln!("{error} ({errno:?})");
    /// ```
    ///
    /// * **EPERM**: the caller may not create devices here, which takes CAP_NET_ADMIN (run as root, or give the program the capability
    ///   by `setcap cap_net_admin+ep`); or the device exists and belongs to another user.
    /// * **EBUSY**: the name is taken by a device that is in use, and was for at least 200 ms and
    ///   ten tries: the device of a program that was killed stays for a moment.
    /// * EINVAL: the name is not one for a device, or belongs to a device of another kind (TAP and not TUN, Ethernet, multi-queue).
    /// * ENOENT, EACCES: `/dev/net/tun` is missing, or may not be opened by this user. ENODEV: the kernel has no `tun` driver loaded.
    pub fn new(ifname: &str, mode: Mode) -> io::Result<Self> {
        Self::open(ifname, mode, 0)
    }

    /// Like [`new`](Self::new), but without the packet information: packets start with their IP header (TUN) or Ethernet header (TAP).
    ///
    /// # Errors
    ///
    /// Those of [`new`](Self::new).
    pub fn without_packet_info(ifname: &str, mode: Mode) -> io::Result<Self> {
        Self::open(ifname, mode, tun::IFF_NO_PI)
    }

    /// The mode it was opened with.
    pub fn mode(&self) -> Mode {
        self.mode
    }

    /// The name that the kernel gave the device when it was opened. Renaming the device later does not change it here.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Waits for a packet and puts it into `buf`. Returns how many bytes of `buf` it fills, packet information included.
    ///
    /// A packet longer than `buf` is cut, and the rest is lost. So `buf` should be as long as the
    /// device's MTU, plus 14 bytes of Ethernet header for TAP (18 with a VLAN tag, 22 with two),
    /// plus 4 bytes of packet information if there is any. An empty `buf` gives 0 and takes no
    /// packet.
    ///
    /// It is one read(2) on the device and blocks as that does. The descriptor can be made non-blocking (through
    /// [`as_raw_fd`](AsRawFd::as_raw_fd)); an empty queue is then EAGAIN ([`WouldBlock`](io::ErrorKind::WouldBlock)).
    ///
    /// # Errors
    ///
    /// EBADFD, or EFAULT if it was waiting at that moment: the device was deleted; such an error
    /// has a [`PortError`](crate::PortError) inside, which says so. EINTR: a signal handler ran.
    /// EINVAL: `buf` is shorter than the packet information.
    pub fn recv(&self, buf: &mut [u8]) -> io::Result<usize> {
        (&self.file).read(buf).map_err(|error| explain("read", error))
    }

    /// Gives the packet in `buf` to the network stack. Returns how many bytes were taken: all of them.
    ///
    /// With packet information, `buf` starts with its four bytes. The stack handles the packet before the call returns (routing,
    /// filters, the receiving socket's queue); whether it keeps or drops the packet is not reported. It is one write(2) on the device.
    ///
    /// # Errors
    ///
    /// EIO: the device is down; set it up. EINVAL: not a packet (TUN without packet information: not IPv4 or IPv6 by its first four
    /// bits; TAP: shorter than an Ethernet header). EBADFD: the device was deleted.
    pub fn send(&self, buf: &[u8]) -> io::Result<usize> {
        (&self.file).write(buf).map_err(|error| explain("write", error))
    }

    fn open(ifname: &str, mode: Mode, flags: u16) -> io::Result<Self> {
        // Neither IFF_MULTI_QUEUE, with which a second open of the name would attach, nor IFF_TUN_EXCL, which refuses persistent devices.
        let asked = mode.iff() | flags;
        let fd = attach::open_node(false)?;
        let control = ControlSocket::new().map_err(|error| attach::os_error("socket(AF_UNIX)", &error))?;
        let name = attach::set_iff_once_free(fd.as_fd(), &IfName::truncated(ifname), asked, &control)?;
        // The kernel ignores what it does not know, so ask what it did. (It does not tell IFF_NO_PI, but a device with a single queue takes
        // that from its first user.)
        attach::verify(fd.as_fd(), &name, asked)?;
        // A persistent device keeps the offloads of whoever had it before: packets up to 64 KiB would come without their header.
        tun::set_offload(fd.as_fd(), 0).map_err(|error| attach::os_error("ioctl(TUNSETOFFLOAD)", &error))?;
        Ok(Self {
            file: fd.into(),
            mode,
            name: name.lossy().into_owned(),
        })
    }
}

/// Says what the errnos of a deleted device mean. All others may be about one packet or one moment:
/// they stay as they are, and cost nothing.
fn explain(call: &'static str, error: io::Error) -> io::Error {
    match error.raw_os_error() {
        Some(errno @ (libc::EBADFD | libc::EFAULT)) => PortError::from_errno(call, errno).into(),
        _ => error,
    }
}

impl AsFd for Iface {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl AsRawFd for Iface {
    fn as_raw_fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }
}

impl IntoRawFd for Iface {
    fn into_raw_fd(self) -> RawFd {
        self.file.into_raw_fd()
    }
}

impl From<Iface> for OwnedFd {
    fn from(iface: Iface) -> Self {
        iface.file.into()
    }
}
