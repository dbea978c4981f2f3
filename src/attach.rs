//! Opens one queue of a device, and says what the errnos of that mean.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::thread;
use std::time::{Duration, Instant};

use crate::error::{OpenError, OpenErrorKind};
use crate::iface::Mode;
use crate::offload::Offloads;
use crate::sys::netdevice::{ControlSocket, IfName};
use crate::sys::tun;

/// The flags that TUNSETIFF is asked for and TUNGETIFF must repeat. IFF_PERSIST and IFF_DETACH_QUEUE are states, not requests, and
/// IFF_NO_PI it does not tell.
pub(crate) const COMPARED: u16 =
    tun::IFF_TUN | tun::IFF_TAP | tun::IFF_VNET_HDR | tun::IFF_MULTI_QUEUE | tun::IFF_NAPI | tun::IFF_NAPI_FRAGS;

/// Opens the tun node, non-blocking. The descriptor belongs to the calling thread's network namespace.
pub(crate) fn open_node(nonblocking: bool) -> Result<OwnedFd, OpenError> {
    const CALL: &str = "open(/dev/net/tun)";
    const FOREIGN: &str = "/dev/net/tun is a file or another device, not the character device 10:200; remove it, and make \
                           the node (mknod /dev/net/tun c 10 200)";
    let node = tun::open_node(nonblocking).map_err(|error| {
        let (kind, detail) = match error.raw_os_error() {
            Some(libc::ENOENT) => (
                OpenErrorKind::NoTunNode,
                "the node is missing; load the driver (modprobe tun), or give the container the device (--device /dev/net/tun)",
            ),
            Some(libc::EACCES) => (
                OpenErrorKind::NoTunNode,
                "this user may not open the node; run as root, or let the user in (it is commonly mode 0666; creating a device needs CAP_NET_ADMIN in any case)",
            ),
            Some(libc::EPERM) => (
                OpenErrorKind::NoTunNode,
                "a device cgroup forbids the node; give the container the device (--device /dev/net/tun)",
            ),
            // A directory, which opens for reading only.
            Some(libc::EISDIR) => (OpenErrorKind::NoTunNode, FOREIGN),
            Some(libc::ENODEV | libc::ENXIO) => {
                (OpenErrorKind::NoTunNode, "the node is there but the kernel has no driver behind it; load it (modprobe tun)")
            }
            _ => return os_error(CALL, &error),
        };
        OpenError::new(kind, CALL, &error, detail)
    })?;
    if !tun::is_tun(node.as_fd()).map_err(|error| os_error("fstat", &error))? {
        return Err(OpenError::refused(OpenErrorKind::NoTunNode, CALL, FOREIGN));
    }
    Ok(node)
}

/// How long a name that is taken may be that of a device which is about to go.
const GOING: Duration = Duration::from_millis(200);
/// How often it is asked for at least.
const LEAST_TRIES: u32 = 10;

/// Like [`set_iff`], but waits a moment for a TUN/TAP device that is in the way: after its holder
/// was killed it stays for some tens of milliseconds, until the kernel has taken its rings apart.
pub(crate) fn set_iff_once_free(
    fd: BorrowedFd<'_>,
    name: &IfName,
    flags: u16,
    control: &ControlSocket,
) -> Result<IfName, OpenError> {
    let deadline = Instant::now() + GOING;
    let mut tries = 0;
    loop {
        let error = match tun::set_iff(fd, name, flags) {
            Ok(name) => return Ok(name),
            Err(error) => error,
        };
        let present = present(name, control);
        let in_the_way = match (error.raw_os_error(), &present) {
            (Some(libc::EBUSY | libc::EINVAL), Some(Present::Tun(_))) => true,
            // It went between the two questions.
            (Some(libc::EBUSY), None) => true,
            _ => false,
        };
        tries += 1;
        // A single try can take that long: it waits for the lock that the device's end needs too. A
        // name that went meanwhile is worth more of them.
        let least = if present.is_none() {
            10 * LEAST_TRIES
        } else {
            LEAST_TRIES
        };
        if !in_the_way || Instant::now() >= deadline && tries >= least {
            return Err(explain_set_iff(&error, name, flags, present));
        }
        thread::sleep(Duration::from_millis(5));
    }
}

/// TUNSETIFF with the causes told apart, for which the control socket must be of the namespace of `fd`.
pub(crate) fn set_iff(
    fd: BorrowedFd<'_>,
    name: &IfName,
    flags: u16,
    control: &ControlSocket,
) -> Result<IfName, OpenError> {
    tun::set_iff(fd, name, flags).map_err(|error| explain_set_iff(&error, name, flags, present(name, control)))
}

/// TUNGETIFF of a queue just attached: it must be on the device `name`, with exactly the flags asked for. Returns all its flags, and
/// IFF_NO_PI as asked, which only [`check_packet_info`] can check.
pub(crate) fn verify(fd: BorrowedFd<'_>, name: &IfName, asked: u16) -> Result<u16, OpenError> {
    const CALL: &str = "ioctl(TUNGETIFF)";
    let (now, granted) = tun::iff(fd).map_err(|error| os_error(CALL, &error))?;
    if now != *name {
        // Without this check the queues opened after a rename would be those of a new device of the old name.
        let detail =
            format!("the device {name:?} was renamed to {now:?} while its queues were being opened; try again");
        return Err(OpenError::refused(OpenErrorKind::NotGranted, CALL, detail));
    }
    let no_pi = asked & tun::IFF_NO_PI;
    let asked = asked & COMPARED;
    if granted & COMPARED != asked {
        let detail = format!(
            "asked for {}, granted {}: others hold queues of {name:?} with other flags, or the kernel does not know one of them",
            flag_names(asked),
            flag_names(granted & COMPARED)
        );
        return Err(OpenError::refused(OpenErrorKind::NotGranted, CALL, detail));
    }
    Ok(granted & !tun::IFF_NO_PI | no_pi)
}

/// Whether packet information is really there or not as asked. A device that nobody had before takes the flag; one that others have
/// queues of keeps its own, without an error.
pub(crate) fn check_packet_info(fd: BorrowedFd<'_>, name: &IfName, flags: u16) -> Result<(), OpenError> {
    let asked = flags & tun::IFF_NO_PI == 0;
    if packet_info(fd, flags)? == asked {
        return Ok(());
    }
    let detail = format!(
        "others hold queues of {name:?}, which was opened {} packet information; ask for packet_info({})",
        if asked { "without" } else { "with" },
        !asked
    );
    Err(OpenError::refused(
        OpenErrorKind::NotGranted,
        "ioctl(TUNSETIFF)",
        detail,
    ))
}

/// Whether packet information is in front of the packets.
pub(crate) fn packet_info(fd: BorrowedFd<'_>, flags: u16) -> Result<bool, OpenError> {
    const CALL: &str = "writev";
    let header = if flags & tun::IFF_VNET_HDR == 0 {
        0
    } else {
        let size = tun::vnet_hdr_size(fd).map_err(|error| os_error("ioctl(TUNGETVNETHDRSZ)", &error))?;
        usize::try_from(size).unwrap_or(usize::MAX)
    };
    let found = tun::has_packet_info(fd, flags & tun::IFF_TAP != 0, header).map_err(|error| os_error(CALL, &error))?;
    found.ok_or_else(|| {
        let detail = "the kernel does not tell whether the device has packet information";
        OpenError::refused(OpenErrorKind::Unsupported, CALL, detail)
    })
}

/// Sets the device's header size and its offloads: `wanted`, or as much of it as the kernel takes. Returns what it took.
///
/// Both belong to the device, and stay on a persistent one; so they are set at every attach, also to nothing.
pub(crate) fn negotiate(fd: BorrowedFd<'_>, wanted: Offloads) -> Result<Offloads, OpenError> {
    tun::set_vnet_hdr_size(fd, tun::VNET_HDR_SIZE_DEFAULT)
        .map_err(|error| os_error("ioctl(TUNSETVNETHDRSZ)", &error))?;
    offer(fd, wanted).map_err(|error| os_error("ioctl(TUNSETOFFLOAD)", &error))
}

/// TUNSETOFFLOAD with `wanted`, or with less: it refuses all if it does not know one (EINVAL), and cannot be asked which.
pub(crate) fn offer(fd: BorrowedFd<'_>, wanted: Offloads) -> io::Result<Offloads> {
    // USO came last (Linux 6.2).
    let narrower = [
        Offloads::none(),
        Offloads::USO,
        Offloads::TSO_ECN,
        Offloads::USO | Offloads::TSO_ECN,
        Offloads::USO | Offloads::TSO_ECN | Offloads::TSO4 | Offloads::TSO6,
        Offloads::CSUM,
    ];
    let mut last = Ok(Offloads::none());
    for less in narrower {
        let mut less = wanted - less;
        if !less.contains(Offloads::TSO4) && !less.contains(Offloads::TSO6) {
            less = less - Offloads::TSO_ECN;
        }
        match tun::set_offload(fd, offload_flags(less)) {
            Ok(()) => return Ok(less),
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => last = Err(error),
            Err(error) => return Err(error),
        }
    }
    last
}

/// What TUNSETOFFLOAD switches each with.
const OFFLOAD_FLAGS: [(Offloads, u32); 5] = [
    (Offloads::CSUM, tun::TUN_F_CSUM),
    (Offloads::TSO4, tun::TUN_F_TSO4),
    (Offloads::TSO6, tun::TUN_F_TSO6),
    (Offloads::TSO_ECN, tun::TUN_F_TSO_ECN),
    (Offloads::USO, tun::TUN_F_USO4 | tun::TUN_F_USO6),
];

/// As TUNSETOFFLOAD wants it.
pub(crate) fn offload_flags(offloads: Offloads) -> u32 {
    OFFLOAD_FLAGS
        .into_iter()
        .filter(|&(offload, _)| offloads.contains(offload))
        .fold(0, |flags, (_, flag)| flags | flag)
}

/// The offloads that these flags switch on.
pub(crate) fn offloads_of(flags: u32) -> Offloads {
    OFFLOAD_FLAGS
        .into_iter()
        .filter(|&(_, flag)| flags & flag == flag)
        .fold(Offloads::none(), |offloads, (offload, _)| offloads | offload)
}

/// What any call may say: out of descriptors, out of memory, unknown to the kernel.
pub(crate) fn os_error(call: &'static str, error: &io::Error) -> OpenError {
    let (kind, detail) = match error.raw_os_error() {
        Some(libc::EMFILE) => (
            OpenErrorKind::DescriptorLimit,
            "this process has too many descriptors open; raise RLIMIT_NOFILE (ulimit -n)",
        ),
        Some(libc::ENFILE) => (
            OpenErrorKind::DescriptorLimit,
            "the system has too many files open; raise the sysctl fs.file-max",
        ),
        Some(libc::ENOMEM | libc::ENOBUFS) => (OpenErrorKind::MemoryLimit, "the kernel is out of memory"),
        Some(libc::EPERM | libc::EACCES) => (OpenErrorKind::Permission, NEEDS_NET_ADMIN),
        Some(libc::ENOTTY | libc::EOPNOTSUPP | libc::ENOSYS) => {
            (OpenErrorKind::Unsupported, "this kernel does not know the request")
        }
        Some(libc::ENODEV | libc::EBADFD) => (OpenErrorKind::Other, "the device was deleted or moved away meanwhile"),
        _ => (OpenErrorKind::Other, "unexpected error"),
    };
    OpenError::new(kind, call, error, detail)
}

/// The names of flags, as in linux/if_tun.h.
pub(crate) fn flag_names(flags: u16) -> String {
    const NAMES: [(u16, &str); 10] = [
        (tun::IFF_TUN, "IFF_TUN"),
        (tun::IFF_TAP, "IFF_TAP"),
        (tun::IFF_NO_PI, "IFF_NO_PI"),
        (tun::IFF_VNET_HDR, "IFF_VNET_HDR"),
        (tun::IFF_MULTI_QUEUE, "IFF_MULTI_QUEUE"),
        (tun::IFF_NAPI, "IFF_NAPI"),
        (tun::IFF_NAPI_FRAGS, "IFF_NAPI_FRAGS"),
        (tun::IFF_PERSIST, "IFF_PERSIST"),
        (tun::IFF_ATTACH_QUEUE, "IFF_ATTACH_QUEUE"),
        (tun::IFF_DETACH_QUEUE, "IFF_DETACH_QUEUE"),
    ];
    let set: Vec<&str> = NAMES
        .iter()
        .filter(|(flag, _)| flags & flag != 0)
        .map(|&(_, name)| name)
        .collect();
    set.join("|")
}

const NEEDS_NET_ADMIN: &str = "the caller lacks CAP_NET_ADMIN in the user namespace that owns this network namespace; \
     run as root, or give the program the capability (setcap cap_net_admin+ep)";

fn explain_set_iff(error: &io::Error, name: &IfName, flags: u16, present: Option<Present>) -> OpenError {
    const CALL: &str = "ioctl(TUNSETIFF)";
    let (kind, detail) = match error.raw_os_error() {
        Some(libc::EPERM) if present.is_some() => (
            OpenErrorKind::Permission,
            format!(
                "{name:?} belongs to another user; attaching takes being its owner or in its group, or CAP_NET_ADMIN"
            ),
        ),
        Some(libc::EPERM) => (OpenErrorKind::Permission, NEEDS_NET_ADMIN.to_owned()),
        Some(libc::EBUSY) if flags & tun::IFF_TUN_EXCL != 0 => (
            OpenErrorKind::NameTaken,
            match present {
                Some(Present::Tun(mode)) if mode.iff() & flags == 0 => other_mode(name, mode),
                Some(Present::Tun(mode)) => {
                    format!(
                        "{name:?} is the name of {} device already; use another name, or attach_existing(true) if it is persistent or has \
                         IFF_MULTI_QUEUE and is meant to be shared",
                        article(mode)
                    )
                }
                Some(Present::Other(what)) => other_driver(name, &what),
                None => format!("{name:?} was the name of another device just now"),
            },
        ),
        Some(libc::EBUSY) => (
            OpenErrorKind::NameTaken,
            format!(
                "{name:?} has a single queue, and another descriptor holds it; end the program that has it, or use another name"
            ),
        ),
        Some(libc::EINVAL) => match present {
            Some(Present::Other(what)) => (OpenErrorKind::NameTaken, other_driver(name, &what)),
            Some(Present::Tun(mode)) if mode.iff() & flags == 0 => (OpenErrorKind::NameTaken, other_mode(name, mode)),
            Some(Present::Tun(_)) if flags & tun::IFF_MULTI_QUEUE != 0 => (
                OpenErrorKind::QueueModeMismatch,
                format!(
                    "{name:?} was created without IFF_MULTI_QUEUE and has one queue for good; open it with queues(1)"
                ),
            ),
            Some(Present::Tun(_)) => (
                OpenErrorKind::QueueModeMismatch,
                format!(
                    "{name:?} was created with IFF_MULTI_QUEUE; use Builder::multi_queue(true) to attach a single queue"
                ),
            ),
            None => (
                OpenErrorKind::InvalidName,
                format!(
                    "the kernel takes no device named {name:?}; use at most one %d, and neither slash, colon nor white space"
                ),
            ),
        },
        Some(libc::E2BIG) => (
            OpenErrorKind::TooManyQueues,
            format!(
                "{name:?} has {} queues already, disabled ones included; a device has no more",
                tun::MAX_QUEUES
            ),
        ),
        Some(libc::ENFILE) => (
            OpenErrorKind::NameTaken,
            format!("no number is free for the template {name:?}"),
        ),
        _ => return os_error(CALL, error),
    };
    OpenError::new(kind, CALL, error, detail)
}

/// The device that has a name now.
enum Present {
    Tun(Mode),
    Other(String),
}

fn present(name: &IfName, control: &ControlSocket) -> Option<Present> {
    control.index(name).ok()?;
    Some(match control.driver(name) {
        Ok((driver, bus)) if driver == "tun" => Present::Tun(if bus == "tap" { Mode::Tap } else { Mode::Tun }),
        Ok((driver, _)) if !driver.is_empty() => Present::Other(format!("driver {driver}")),
        // It went meanwhile.
        Err(error) if error.raw_os_error() == Some(libc::ENODEV) => return None,
        _ => Present::Other("of unknown driver".to_owned()),
    })
}

fn other_mode(name: &IfName, mode: Mode) -> String {
    format!(
        "{name:?} is the name of {} device already, which is the other mode; use another name, or delete that device",
        article(mode)
    )
}

fn other_driver(name: &IfName, what: &str) -> String {
    format!("{name:?} is the name of another kind of device already ({what}); use another name")
}

fn article(mode: Mode) -> &'static str {
    match mode {
        Mode::Tun => "a TUN",
        Mode::Tap => "a TAP",
    }
}

/// Opens one more queue of a device that exists, in the calling thread's namespace.
pub(crate) fn open_further(name: &IfName, asked: u16, control: &ControlSocket) -> Result<OwnedFd, OpenError> {
    let fd = open_node(true)?;
    set_iff(fd.as_fd(), name, asked, control)?;
    verify(fd.as_fd(), name, asked)?;
    Ok(fd)
}
