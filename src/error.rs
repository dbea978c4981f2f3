//! What can go wrong, told so that the reader knows what to do about it.

use std::fmt;
use std::io;
use std::sync::OnceLock;

/// Why a device, a queue or a worker could not be opened.
///
/// It keeps the call that failed and its errno, and says the likely cause in words;
/// [`source`](std::error::Error::source) is the [`io::Error`] of that errno.
///
/// It converts into an [`io::Error`] of the same [`kind`](io::Error::kind) and text. Such an error
/// carries no errno of its own: its `raw_os_error()` is `None`, since std keeps either a text or a
/// number. Both are inside:
///
/// ```
/// use std::error::Error;
/// use std::io;
/// use tun_driver::{Builder, Mode, OpenError};
///
/// let error = Builder::new("many", Mode::Tun).queues(257).open().unwrap_err();
/// let error = io::Error::from(error);
/// let inner = error.get_ref().and_then(|inner| inner.downcast_ref::<OpenError>()).unwrap();
/// assert_eq!(inner.raw_os_error(), Some(7)); // E2BIG
/// let source = error.source().and_then(|source| source.downcast_ref::<io::Error>()).unwrap();
/// assert_eq!(source.raw_os_error(), Some(7));
/// ```
#[derive(Debug)]
pub struct OpenError {
    kind: OpenErrorKind,
    call: &'static str,
    errno: Option<i32>,
    detail: String,
}

/// The likely cause of an [`OpenError`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum OpenErrorKind {
    /// The caller lacks CAP_NET_ADMIN in the user namespace that owns the network namespace, and is not the device's owner or in its group.
    Permission,
    /// `/dev/net/tun` is missing or may not be opened.
    NoTunNode,
    /// The name belongs to a device that exists already.
    NameTaken,
    /// The existing device has one queue only, or several were asked of a device that was created without `IFF_MULTI_QUEUE` (or the reverse).
    QueueModeMismatch,
    /// More queues than the kernel allows for one device (256, detached ones included).
    TooManyQueues,
    /// The name is not one the kernel takes.
    InvalidName,
    /// A setting that no kernel accepts, or two settings that contradict each other.
    InvalidSetting,
    /// The kernel granted something else than what was asked (flags read back with TUNGETIFF differ).
    NotGranted,
    /// The network namespace to create the device in does not exist or may not be entered.
    Namespace,
    /// A limit on locked memory (RLIMIT_MEMLOCK) or memory itself ran out.
    MemoryLimit,
    /// io_uring is missing, too old, or refused by sysctl or seccomp.
    IoUring,
    /// Out of file descriptors.
    DescriptorLimit,
    /// The descriptor is not what the caller said it was.
    NotATunDescriptor,
    /// The factory of an engine's handlers failed or panicked.
    Factory,
    /// This kernel does not know the request.
    Unsupported,
    /// Anything else: see the errno.
    Other,
}

impl OpenError {
    /// An error from `call` with the errno that `source` carries.
    pub(crate) fn new(kind: OpenErrorKind, call: &'static str, source: &io::Error, detail: impl Into<String>) -> Self {
        Self {
            kind,
            call,
            errno: source.raw_os_error(),
            detail: detail.into(),
        }
    }

    /// An error that this library found itself, before or after asking the kernel.
    pub(crate) fn refused(kind: OpenErrorKind, call: &'static str, detail: impl Into<String>) -> Self {
        Self {
            kind,
            call,
            errno: None,
            detail: detail.into(),
        }
    }

    /// The same with the name of what it is about before the cause.
    pub(crate) fn about(self, subject: &str) -> Self {
        Self {
            detail: format!("{subject}: {}", self.detail),
            ..self
        }
    }

    /// The likely cause.
    pub fn kind(&self) -> OpenErrorKind {
        self.kind
    }

    /// The system call or step that failed, such as `ioctl(TUNSETIFF)`.
    pub fn call(&self) -> &'static str {
        self.call
    }

    /// The kernel's error number; `None` where this library refused before asking the kernel.
    pub fn raw_os_error(&self) -> Option<i32> {
        self.errno
    }

    /// The likely cause and what to do about it, without the call and the errno.
    pub fn detail(&self) -> &str {
        &self.detail
    }
}

impl fmt::Display for OpenError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: ", self.call)?;
        if let Some(errno) = self.errno {
            write!(f, "{}: ", io::Error::from_raw_os_error(errno))?;
        }
        f.write_str(&self.detail)
    }
}

impl std::error::Error for OpenError {
    /// The [`io::Error`] of the errno, if there is one.
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        os_error(self.errno?)
    }
}

impl From<OpenError> for io::Error {
    fn from(error: OpenError) -> Self {
        let kind = match error.errno {
            Some(errno) => io::Error::from_raw_os_error(errno).kind(),
            None => io::ErrorKind::InvalidInput,
        };
        io::Error::new(kind, error)
    }
}

/// Why packets could not be moved through a port.
///
/// [`kind`](Self::kind) sorts the errnos by what the caller should do; the errno and the call are
/// kept. The caller knows the port; in messages, put
/// [`Worker::port_name`](crate::Worker::port_name) in front. [`source`](std::error::Error::source)
/// is the [`io::Error`] of the errno, also after conversion into an [`io::Error`], as with
/// [`OpenError`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PortError {
    kind: PortErrorKind,
    call: &'static str,
    errno: i32,
}

/// What a [`PortError`] means for the caller.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum PortErrorKind {
    /// The device or socket no longer exists, or the port was detached. Permanent: stop using the
    /// port. For a queue: EBADFD, ENODEV, EBADF, ENXIO, and EFAULT after deletion. For a socket
    /// only EBADF and ENOTSOCK, and ESHUTDOWN where another holder shut it down for reading: every
    /// other errno concerns one datagram.
    Gone,
    /// The device is administratively down (EIO). Writes work again once it is up.
    Down,
    /// The other side takes no more just now (EAGAIN, ENOBUFS). Try again a little later, in the same order.
    /// [`Worker::wait`](crate::Worker::wait) tells of packets to receive, not of room to send: give it a deadline.
    Backpressure,
    /// A packet was longer than the buffer it was read into; it was dropped and counted.
    Truncated,
    /// The kernel refused a packet for its content (EINVAL, EMSGSIZE). The packet is dropped and counted, the port goes on.
    BadPacket,
    /// Another holder of the device changed the size of its virtio-net header or switched on
    /// offloads, or made the descriptor blocking. This was set back; what came in between in the
    /// wrong shape was dropped and counted.
    Changed,
    /// No free buffer is left for this port; packets wait in the kernel until some are given back.
    NoBuffers,
    /// Anything else: see the errno.
    Other,
}

impl PortError {
    pub(crate) fn from_errno(call: &'static str, errno: i32) -> Self {
        let kind = match errno {
            libc::EBADFD | libc::ENODEV | libc::EFAULT | libc::EBADF | libc::ENXIO => PortErrorKind::Gone,
            libc::EIO | libc::ENETDOWN => PortErrorKind::Down,
            libc::EAGAIN | libc::ENOBUFS => PortErrorKind::Backpressure,
            libc::EINVAL | libc::EMSGSIZE => PortErrorKind::BadPacket,
            _ => PortErrorKind::Other,
        };
        Self { kind, call, errno }
    }

    /// The error of a call on a socket. A route, an interface or a peer that is gone is a matter of
    /// one datagram, so only a dead descriptor is permanent, and a socket is never down.
    pub(crate) fn from_socket_errno(call: &'static str, errno: i32) -> Self {
        let kind = match SocketErrno::of(errno) {
            SocketErrno::Dead => PortErrorKind::Gone,
            SocketErrno::Full => PortErrorKind::Backpressure,
            _ if matches!(errno, libc::EINVAL | libc::EMSGSIZE) => PortErrorKind::BadPacket,
            _ => PortErrorKind::Other,
        };
        Self { kind, call, errno }
    }

    pub(crate) const fn new(kind: PortErrorKind, call: &'static str, errno: i32) -> Self {
        Self { kind, call, errno }
    }

    /// What it means for the caller.
    pub fn kind(&self) -> PortErrorKind {
        self.kind
    }

    /// The kernel's error number, or the one that comes nearest where this library found the fault itself.
    pub fn raw_os_error(&self) -> i32 {
        self.errno
    }

    /// The system call or operation that failed.
    pub fn call(&self) -> &'static str {
        self.call
    }

    /// Whether the port is of no further use. Everything else passes, or is about single packets.
    pub fn is_permanent(&self) -> bool {
        self.kind == PortErrorKind::Gone
    }
}

/// The call by which a ring makes progress.
pub(crate) const ENTER: &str = "io_uring_enter";

/// What an errno of recvmmsg(2) or sendmmsg(2) is about.
///
/// The kernel keeps an error that ICMP reports (`sk_err`, `udp_err` in net/ipv4/udp.c) and returns
/// it from the next call on the socket, whichever datagram that call is about. It clears the error
/// by that, and has neither received nor sent anything.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum SocketErrno {
    /// The descriptor is no socket any more.
    Dead,
    /// No room for the datagram now.
    Full,
    /// A signal came first.
    Interrupted,
    /// A report about an earlier datagram: no call returns this errno for the datagram it sends.
    Reported,
    /// A report about an earlier datagram, or the datagram has no route, is too long, or may not be
    /// sent.
    Ambiguous,
    /// The datagram that was to be sent.
    Datagram,
}

impl SocketErrno {
    pub(crate) fn of(errno: i32) -> Self {
        match errno {
            libc::EBADF | libc::ENOTSOCK => Self::Dead,
            libc::EAGAIN | libc::ENOBUFS | libc::ENOMEM => Self::Full,
            libc::EINTR => Self::Interrupted,
            // `icmp_err_convert` in net/ipv4/icmp.c; ECONNABORTED is SOCK_DESTROY's (`udp_abort`).
            libc::ECONNREFUSED
            | libc::EHOSTDOWN
            | libc::ENONET
            | libc::ENOPROTOOPT
            | libc::EOPNOTSUPP
            | libc::EPROTO
            | libc::ECONNABORTED => Self::Reported,
            libc::ENETUNREACH | libc::EHOSTUNREACH | libc::EACCES | libc::EMSGSIZE => Self::Ambiguous,
            _ => Self::Datagram,
        }
    }
}

impl fmt::Display for PortError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let advice = match self.kind {
            PortErrorKind::Gone => "the device or socket is gone; close or detach what used it",
            PortErrorKind::Down => "the device is down; bring it up (ip link set … up) and send again",
            PortErrorKind::Backpressure => "the receiver is full; wait a little, then send the rest",
            PortErrorKind::Truncated if self.call == "recv" => {
                "the packet was longer than the slice that it was to be copied into and was dropped; pass a slice of Worker::longest_packet bytes"
            }
            PortErrorKind::Truncated if self.call == "UDP_GRO" => {
                "datagrams that the kernel may have coalesced were dropped; leave UDP_GRO off while the socket is a port"
            }
            PortErrorKind::Truncated => {
                "a packet was longer than the buffers of this worker and was dropped; lower the MTU, raise WorkerConfig::max_packet, or detach the port and attach it again, which gives it large buffers"
            }
            PortErrorKind::BadPacket => "the kernel refused the packet's content; it was dropped",
            PortErrorKind::Changed => {
                "another holder of the device changed its virtio-net header or offloads, or made the descriptor blocking; this was set back, keep other programs from it"
            }
            PortErrorKind::NoBuffers => "no free buffer; give packets back or raise WorkerConfig::buffers",
            PortErrorKind::Other if self.call == ENTER => {
                "the kernel does not take what the ring asks, which passes if it is for want of memory; call again, or use Backend::Syscalls"
            }
            PortErrorKind::Other if self.errno == libc::EDESTADDRREQ => {
                "the socket is not connected, and the packet says no peer; connect the socket, or call PacketBuf::set_peer"
            }
            PortErrorKind::Other if self.errno == libc::EAFNOSUPPORT => {
                "the packet's peer is of another address family than the socket; name a peer of the socket's"
            }
            PortErrorKind::Other if matches!(self.errno, libc::ENETUNREACH | libc::EHOSTUNREACH) => {
                "no route leads to the packet's peer; add a route, or name another peer"
            }
            PortErrorKind::Other => "unexpected error",
        };
        write!(
            f,
            "{}: {}: {advice}",
            self.call,
            io::Error::from_raw_os_error(self.errno)
        )
    }
}

impl std::error::Error for PortError {
    /// The [`io::Error`] of the errno.
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        os_error(self.errno)
    }
}

/// The [`io::Error`] of an errno, to be lent by errors that keep the number only.
fn os_error(errno: i32) -> Option<&'static (dyn std::error::Error + 'static)> {
    /// One more than EHWPOISON, the largest errno of most architectures.
    const ERRNOS: usize = 134;
    static ERRORS: [OnceLock<io::Error>; ERRNOS] = [const { OnceLock::new() }; ERRNOS];

    let place = ERRORS.get(usize::try_from(errno).ok()?)?;
    Some(place.get_or_init(|| io::Error::from_raw_os_error(errno)))
}

impl From<PortError> for io::Error {
    fn from(error: PortError) -> Self {
        io::Error::new(io::Error::from_raw_os_error(error.errno).kind(), error)
    }
}
