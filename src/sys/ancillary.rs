//! Ancillary data of datagrams, cmsg(3): the local address (IP_PKTINFO of ip(7), IPV6_PKTINFO of
//! ipv6(7)).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::socket_options::{SOL_UDP, UDP_GRO};

/// The address of this host that a datagram was sent to, or that it is to be sent from.
///
/// ```
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// use tun_driver::LocalAddr;
///
/// let from = LocalAddr::from("10.0.0.2".parse::<std::net::IpAddr>()?);
/// assert_eq!(from.interface, 0);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct LocalAddr {
    /// The address. On a socket of IPv6, an IPv4 address is mapped (`::ffff:a.b.c.d`), as in the
    /// peer's address.
    pub ip: IpAddr,
    /// The index of the interface that a link-local address of IPv6 belongs to; 0 for all others:
    /// the route decides.
    pub interface: u32,
}

impl LocalAddr {
    /// The address as a datagram that came through `interface` carries it.
    pub(crate) fn received(ip: IpAddr, interface: u32) -> Option<Self> {
        let usable = !ip.is_unspecified() && !ip.is_multicast();
        let interface = if is_link_local(ip) { interface } else { 0 };
        usable.then_some(Self { ip, interface })
    }
}

impl From<IpAddr> for LocalAddr {
    fn from(ip: IpAddr) -> Self {
        Self { ip, interface: 0 }
    }
}

fn is_link_local(ip: IpAddr) -> bool {
    matches!(ip, IpAddr::V6(ip) if Ipv6Addr::is_unicast_link_local(&ip))
}

/// Room for the ancillary data of one datagram: both addresses, after what else a socket may be set
/// to give (timestamps, drops, marks).
#[derive(Clone, Copy)]
#[repr(C, align(8))]
pub(crate) struct Control([u8; 256]);

impl Default for Control {
    fn default() -> Self {
        Self([0; 256])
    }
}

impl Control {
    /// Puts down where a datagram is to be sent from. Returns how many bytes that takes.
    ///
    /// An IPv4 address is understood by sockets of both families (`ip_cmsg_send`), also where it is
    /// mapped.
    pub(crate) fn write(&mut self, local: LocalAddr) -> usize {
        match local.ip {
            IpAddr::V4(ip) => self.put_v4(ip),
            IpAddr::V6(ip) => match ip.to_ipv4_mapped() {
                Some(ip) => self.put_v4(ip),
                None => self.put(
                    libc::IPPROTO_IPV6,
                    libc::IPV6_PKTINFO,
                    libc::in6_pktinfo {
                        ipi6_addr: libc::in6_addr { s6_addr: ip.octets() },
                        ipi6_ifindex: local.interface,
                    },
                ),
            },
        }
    }

    fn put_v4(&mut self, ip: Ipv4Addr) -> usize {
        let info = libc::in_pktinfo {
            // The route decides.
            ipi_ifindex: 0,
            ipi_spec_dst: libc::in_addr {
                s_addr: u32::from_ne_bytes(ip.octets()),
            },
            ipi_addr: libc::in_addr { s_addr: 0 },
        };
        self.put(libc::IPPROTO_IP, libc::IP_PKTINFO, info)
    }

    fn put<T: Copy>(&mut self, level: libc::c_int, kind: libc::c_int, value: T) -> usize {
        const { assert!(size_of::<T>() <= 64) };
        // SAFETY: zero is a value of this C struct.
        let mut header: libc::cmsghdr = unsafe { std::mem::zeroed() };
        let value_len = size_of::<T>() as libc::c_uint;
        // SAFETY: plain arithmetic.
        let (len, space) = unsafe { (libc::CMSG_LEN(value_len), libc::CMSG_SPACE(value_len)) };
        header.cmsg_len = len as _;
        header.cmsg_level = level;
        header.cmsg_type = kind;
        let at = self.0.as_mut_ptr();
        // SAFETY: header and value end within 256 bytes, as asserted; the start is aligned for a
        // cmsghdr, and CMSG_DATA begins right after the header, at CMSG_LEN(0).
        unsafe {
            at.cast::<libc::cmsghdr>().write(header);
            at.add(libc::CMSG_LEN(0) as usize).cast::<T>().write_unaligned(value);
        }
        space as usize
    }
}

/// The local address that a datagram was sent to, and whether the kernel coalesced several
/// datagrams into this one (UDP_GRO).
pub(crate) fn read(header: &libc::msghdr) -> (Option<LocalAddr>, bool) {
    let (mut v4, mut v6, mut coalesced) = (None, None, false);
    // SAFETY: the kernel wrote `msg_controllen` bytes of messages to `msg_control`, which belongs
    // to the caller's `Control`.
    let mut message = unsafe { libc::CMSG_FIRSTHDR(header) };
    while !message.is_null() {
        // SAFETY: CMSG_FIRSTHDR and CMSG_NXTHDR return whole headers within the control data.
        let (header_at, data) = unsafe { (message.read_unaligned(), libc::CMSG_DATA(message)) };
        let (level, kind) = (header_at.cmsg_level, header_at.cmsg_type);
        // The last one is cut short where the room ended (MSG_CTRUNC).
        let whole = |size: usize| {
            // SAFETY: plain arithmetic.
            let len = unsafe { libc::CMSG_LEN(size as libc::c_uint) };
            header_at.cmsg_len as u64 >= u64::from(len)
        };
        match (level, kind) {
            (libc::IPPROTO_IP, libc::IP_PKTINFO) if whole(size_of::<libc::in_pktinfo>()) => {
                // SAFETY: the kernel wrote a whole in_pktinfo, as its length says.
                let info = unsafe { data.cast::<libc::in_pktinfo>().read_unaligned() };
                // Not ipi_addr, which may be a group or a broadcast address.
                v4 = Some(Ipv4Addr::from(info.ipi_spec_dst.s_addr.to_ne_bytes()));
            }
            (libc::IPPROTO_IPV6, libc::IPV6_PKTINFO) if whole(size_of::<libc::in6_pktinfo>()) => {
                // SAFETY: as above, of an in6_pktinfo.
                let info = unsafe { data.cast::<libc::in6_pktinfo>().read_unaligned() };
                v6 = Some((Ipv6Addr::from(info.ipi6_addr.s6_addr), info.ipi6_ifindex));
            }
            (SOL_UDP, UDP_GRO) => coalesced = true,
            _ => {}
        }
        // SAFETY: as of CMSG_FIRSTHDR.
        message = unsafe { libc::CMSG_NXTHDR(header, message) };
    }
    let local = match (v4, v6) {
        (Some(ip), None) => LocalAddr::received(ip.into(), 0),
        // A socket of IPv6 says both of a datagram over IPv4; only the first is surely an address
        // of this host.
        (Some(ip), Some(_)) if !ip.is_unspecified() => LocalAddr::received(ip.to_ipv6_mapped().into(), 0),
        (_, Some((ip, interface))) if ip.to_ipv4_mapped().is_none() => LocalAddr::received(ip.into(), interface),
        _ => None,
    };
    (local, coalesced)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_survive_the_round_trip() {
        for (text, interface) in [("10.0.0.2", 0), ("::ffff:10.0.0.2", 0), ("fd00::2", 0), ("fe80::2", 7)] {
            let (mut control, ip) = (Control::default(), text.parse().expect("an address"));
            let len = control.write(LocalAddr { ip, interface });
            // SAFETY: zero is a value of this C struct.
            let mut header: libc::msghdr = unsafe { std::mem::zeroed() };
            header.msg_control = (&raw mut control).cast();
            header.msg_controllen = len as _;
            let (local, coalesced) = read(&header);
            let expected = match ip {
                IpAddr::V6(ip) => ip.to_ipv4_mapped().map_or(ip.into(), IpAddr::from),
                ip => ip,
            };
            assert_eq!(
                local.map(|local| (local.ip, local.interface)),
                Some((expected, interface))
            );
            assert!(!coalesced);
        }
    }
}
