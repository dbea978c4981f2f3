//! What a port sets on its socket, getsockopt(2) and setsockopt(2), and gives back.

use std::io;
use std::os::fd::RawFd;

use super::forked::Origin;
use super::syscall;

pub(crate) const SOL_UDP: libc::c_int = 17; // linux/socket.h; IPPROTO_UDP
const UDP_CORK: libc::c_int = 1; // linux/udp.h, as the next two
pub(crate) const UDP_SEGMENT: libc::c_int = 103;
pub(crate) const UDP_GRO: libc::c_int = 104;

/// Datagrams that are looked through at most when a socket has to be emptied.
const MOST_QUEUED: u64 = 4096;

/// Sets an option of a socket, under the names that its errors have.
macro_rules! set {
    ($options:ident, $name:literal, $($setting:expr),*) => {
        $options.set([concat!("getsockopt(", $name, ")"), concat!("setsockopt(", $name, ")")], $($setting),*)
    };
}

/// Why a socket cannot be a port.
pub(crate) enum Unfit {
    /// The descriptor is no socket.
    NoSocket(io::Error),
    /// It is no socket of datagrams.
    Stream,
    /// It is one of datagrams, but not of UDP over IPv4 or IPv6.
    Foreign,
    /// The option that could not be asked or set.
    Refused(&'static str, io::Error),
}

/// What was changed on a socket. Dropped, it sets everything back.
#[derive(Debug)]
pub(crate) struct SocketOptions {
    fd: RawFd,
    /// A forked child shares the socket with its parent, which goes on using it.
    process: Origin,
    /// Level, option, value before.
    changed: Vec<(libc::c_int, libc::c_int, libc::c_int)>,
    /// It is bound to all addresses, and each datagram comes with the one that it was sent to.
    pub(crate) wildcard: bool,
    /// Another option of the socket's makes the kernel say more of each datagram than nothing, so
    /// there has to be room for it: without, UDP_GRO could not be seen but by asking each time.
    pub(crate) talkative: bool,
    /// Datagrams that were dropped because each may have been several.
    pub(crate) dropped: u64,
}

impl SocketOptions {
    /// Takes what is reported of earlier datagrams (SO_ERROR), which would fail the next call on
    /// the socket.
    pub(crate) fn take_report(fd: RawFd) -> Option<i32> {
        get_int(fd, libc::SOL_SOCKET, libc::SO_ERROR)
            .ok()
            .filter(|&errno| errno != 0)
    }

    /// Makes a socket fit for a port: each datagram is one packet and each packet one datagram, and
    /// if it is bound to all addresses, each comes with the one that it was sent to. The descriptor
    /// stays open as long as the result lives.
    pub(crate) fn prepare(fd: RawFd) -> Result<Self, Unfit> {
        let kind = get_int(fd, libc::SOL_SOCKET, libc::SO_TYPE).map_err(|error| match error.raw_os_error() {
            Some(libc::ENOTSOCK) => Unfit::NoSocket(error),
            _ => Unfit::Refused("getsockopt(SO_TYPE)", error),
        })?;
        if kind != libc::SOCK_DGRAM {
            return Err(Unfit::Stream);
        }
        let family = get_int(fd, libc::SOL_SOCKET, libc::SO_DOMAIN)
            .map_err(|error| Unfit::Refused("getsockopt(SO_DOMAIN)", error))?;
        let protocol = get_int(fd, libc::SOL_SOCKET, libc::SO_PROTOCOL)
            .map_err(|error| Unfit::Refused("getsockopt(SO_PROTOCOL)", error))?;
        // AF_PACKET, AF_NETLINK and AF_UNIX have datagrams too, and ping sockets are of IP.
        if !matches!(family, libc::AF_INET | libc::AF_INET6) || protocol != libc::IPPROTO_UDP {
            return Err(Unfit::Foreign);
        }
        let mut options = Self {
            fd,
            process: Origin::here(),
            changed: Vec::new(),
            wildcard: false,
            talkative: false,
            dropped: 0,
        };
        set!(options, "UDP_CORK", SOL_UDP, UDP_CORK, 0)?;
        set!(options, "UDP_SEGMENT", SOL_UDP, UDP_SEGMENT, 0)?;
        if set!(options, "UDP_GRO", SOL_UDP, UDP_GRO, 0)? {
            options.dropped = discard(fd);
        }
        match wildcard_family(fd).map_err(|error| Unfit::Refused("getsockname", error))? {
            libc::AF_INET => set!(options, "IP_PKTINFO", libc::IPPROTO_IP, libc::IP_PKTINFO, 1)?,
            libc::AF_INET6 => {
                set!(
                    options,
                    "IPV6_RECVPKTINFO",
                    libc::IPPROTO_IPV6,
                    libc::IPV6_RECVPKTINFO,
                    1
                )?;
                // Of datagrams over IPv4, this one says the address even where they were sent to a
                // group or by broadcast.
                set!(options, "IP_PKTINFO", libc::IPPROTO_IP, libc::IP_PKTINFO, 1)?
            }
            _ => return Ok(options),
        };
        options.wildcard = true;
        Ok(options)
    }

    /// Sets an option, and remembers what it was. Returns whether it was otherwise. A kernel or a
    /// family that does not know it needs none.
    fn set(
        &mut self,
        [get, set]: [&'static str; 2],
        level: libc::c_int,
        option: libc::c_int,
        value: libc::c_int,
    ) -> Result<bool, Unfit> {
        let before = match get_int(self.fd, level, option) {
            Ok(before) => before,
            Err(error) if matches!(error.raw_os_error(), Some(libc::ENOPROTOOPT | libc::EOPNOTSUPP)) => {
                return Ok(false);
            }
            Err(error) => return Err(Unfit::Refused(get, error)),
        };
        if before == value {
            return Ok(false);
        }
        set_int(self.fd, level, option, value).map_err(|error| Unfit::Refused(set, error))?;
        self.changed.push((level, option, before));
        Ok(true)
    }

    /// Looks whether another holder of the socket has let the kernel coalesce datagrams again. If
    /// so, undoes that and empties the socket, since each datagram in it may be several. Returns
    /// how many were dropped, or `None`.
    pub(crate) fn recheck(&self) -> Option<u64> {
        if get_int(self.fd, SOL_UDP, UDP_GRO).ok()? == 0 {
            return None;
        }
        set_int(self.fd, SOL_UDP, UDP_GRO, 0).ok()?;
        Some(discard(self.fd))
    }
}

impl Drop for SocketOptions {
    fn drop(&mut self) {
        if !self.process.is_here() {
            return;
        }
        for &(level, option, before) in self.changed.iter().rev() {
            let _ = set_int(self.fd, level, option, before);
        }
    }
}

/// The family of a socket that is bound to all addresses, or to none yet; 0 of any other.
fn wildcard_family(fd: RawFd) -> io::Result<libc::c_int> {
    // SAFETY: zero is a value of this C struct.
    let mut name: libc::sockaddr_storage = unsafe { std::mem::zeroed() };
    let mut len = size_of_val(&name) as libc::socklen_t;
    // SAFETY: the name is as long as `len` says.
    unsafe { syscall!(getsockname(fd, (&raw mut name).cast(), &raw mut len)) }?;
    let family = libc::c_int::from(name.ss_family);
    let at = &raw const name;
    let wildcard = match family {
        // SAFETY: the storage is larger than a sockaddr_in, and the family says that it is one.
        libc::AF_INET => unsafe { (*at.cast::<libc::sockaddr_in>()).sin_addr.s_addr == 0 },
        // SAFETY: as above, of a sockaddr_in6.
        libc::AF_INET6 => unsafe { (*at.cast::<libc::sockaddr_in6>()).sin6_addr.s6_addr == [0; 16] },
        _ => false,
    };
    Ok(if wildcard { family } else { 0 })
}

/// Drops what lies in a socket. Returns how many datagrams.
fn discard(fd: RawFd) -> u64 {
    let (mut dropped, mut errors) = (0, 0);
    while dropped < MOST_QUEUED && errors < 64 {
        // SAFETY: no memory to receive into.
        match unsafe { syscall!(recv(fd, std::ptr::null_mut(), 0, libc::MSG_DONTWAIT)) } {
            Ok(_) => dropped += 1,
            Err(error) if error.raw_os_error() == Some(libc::EAGAIN) => break,
            // A report about an earlier datagram.
            Err(_) => errors += 1,
        }
    }
    dropped
}

fn get_int(fd: RawFd, level: libc::c_int, option: libc::c_int) -> io::Result<libc::c_int> {
    let mut value: libc::c_int = 0;
    let mut size = size_of::<libc::c_int>() as libc::socklen_t;
    // SAFETY: the kernel writes at most `size` bytes to the value.
    unsafe { syscall!(getsockopt(fd, level, option, (&raw mut value).cast(), &raw mut size)) }?;
    Ok(value)
}

pub(crate) fn set_int(fd: RawFd, level: libc::c_int, option: libc::c_int, value: libc::c_int) -> io::Result<()> {
    let size = size_of::<libc::c_int>() as libc::socklen_t;
    // SAFETY: these options read one int, which outlives the call.
    unsafe { syscall!(setsockopt(fd, level, option, (&raw const value).cast(), size)) }.map(drop)
}
