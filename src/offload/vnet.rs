//! The driver's header of a packet, checked.
//!
//! What a driver says of a packet is a claim: it may come from another host by way of a network card, from another process by way of a packet
//! socket, or from a kernel with a fault. [`VnetHdr::check`] holds it against the packet itself; what passes can be cut and finished without
//! looking again.
//!
//! | field | what becomes of it |
//! |---|---|
//! | `gso_type` | has to agree with the packet's version of IP and protocol; the ECN bit is told apart |
//! | `hdr_len` | ignored, since the kernel itself is wrong about it where it forwards; the headers are found anew |
//! | `gso_size` | not zero for a superpacket; below 8 of TCP, 8 (see [`GsoType::size_min`]) |
//! | `csum_start`, `csum_offset` | inside the packet and behind its IP header; of a superpacket, exactly where the protocol has its checksum |
//!
//! Behind the IP header, the claims of a plain packet that is to be finished are not held against
//! other headers: it may be inside another (VXLAN), of which nothing is known here.

use std::fmt;

use super::checksum::sum;
use super::headers::{HeaderFault, Headers, Link, TCP, UDP, Version};
use crate::sys::virtio_net::virtio_net_hdr;

/// `struct virtio_net_hdr` (linux/virtio_net.h): what a driver says of the packet behind it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct VnetHdr(virtio_net_hdr);

/// What is to be done with a packet, as far as it was believed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Meta {
    /// Nothing: it is as it goes over a wire.
    Plain,
    /// Nothing: and its checksum was verified by somebody before.
    Verified,
    /// A checksum is to be written: [`finish`].
    Unfinished {
        /// Where the bytes begin over which it goes.
        start: usize,
        /// Where it belongs, from the packet's start.
        field: usize,
    },
    /// It is a superpacket.
    Gso(Gso),
}

/// A superpacket's shape. All offsets lie inside the packet, and the headers are what `kind` says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Gso {
    /// What it is to be cut into.
    pub kind: GsoType,
    /// Bytes of payload per segment; the last may have less. At least [`GsoType::size_min`].
    pub size: u16,
    /// The first segment alone is to have CWR (RFC 3168).
    pub ecn: bool,
    /// Where the headers lie.
    pub headers: Headers,
}

/// What a superpacket is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GsoType {
    /// TCP segments over IPv4.
    Tcp4,
    /// TCP segments over IPv6.
    Tcp6,
    /// UDP datagrams, each of its own (`UDP_SEGMENT`, USO; not the fragments of UFO).
    Udp,
}

/// Why a driver's header was not believed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum VnetFault {
    /// A type that nobody asked for: UFO, tunnels, or none that exists.
    Type(u8),
    /// The type does not go with the packet's version of IP or protocol, or the packet is a fragment.
    Mismatch,
    /// A superpacket with segments of no length, or below [`GsoType::size_min`].
    Size,
    /// The checksum's place is not where the protocol has it, inside the IP header, or not inside
    /// the packet.
    Checksum,
    /// The packet is longer or shorter than its own headers say.
    Length,
    /// The packet's headers.
    Headers(HeaderFault),
}

impl VnetHdr {
    /// Its length in bytes. Devices may have more in front of each packet (`TUNSETVNETHDRSZ`), which means nothing.
    pub const LEN: usize = virtio_net_hdr::LEN;

    /// As it stands in front of a packet, in the machine's byte order.
    #[inline]
    pub fn from_bytes(bytes: [u8; Self::LEN]) -> Self {
        Self(virtio_net_hdr::from_bytes(bytes))
    }

    /// As it is put in front of a packet.
    #[inline]
    pub fn to_bytes(self) -> [u8; Self::LEN] {
        self.0.to_bytes()
    }

    /// For a packet that is as it goes over a wire.
    pub const fn plain() -> Self {
        Self(virtio_net_hdr {
            flags: 0,
            gso_type: virtio_net_hdr::GSO_NONE,
            hdr_len: 0,
            gso_size: 0,
            csum_start: 0,
            csum_offset: 0,
        })
    }

    /// For a packet whose checksum is to be finished: over all from `start` on, written at `field`.
    pub(crate) const fn unfinished(start: u16, field: u16) -> Self {
        Self(virtio_net_hdr {
            flags: virtio_net_hdr::F_NEEDS_CSUM,
            csum_start: start,
            csum_offset: field - start,
            ..Self::plain().0
        })
    }

    /// What it says that the packet is to be cut into, if it is one of the types that are known.
    pub(crate) fn kind(&self) -> Option<GsoType> {
        match self.0.gso_type & !virtio_net_hdr::GSO_ECN {
            virtio_net_hdr::GSO_TCPV4 => Some(GsoType::Tcp4),
            virtio_net_hdr::GSO_TCPV6 => Some(GsoType::Tcp6),
            virtio_net_hdr::GSO_UDP_L4 => Some(GsoType::Udp),
            _ => None,
        }
    }

    /// Whether it says nothing at all, as of most packets.
    #[inline]
    pub(crate) fn is_plain(&self) -> bool {
        self.0.flags == 0 && self.0.gso_type == virtio_net_hdr::GSO_NONE
    }

    /// For a superpacket of this shape, whose checksum field holds the sum over the pseudo-header.
    pub fn of(gso: &Gso) -> Self {
        let kind = match gso.kind {
            GsoType::Tcp4 => virtio_net_hdr::GSO_TCPV4,
            GsoType::Tcp6 => virtio_net_hdr::GSO_TCPV6,
            GsoType::Udp => virtio_net_hdr::GSO_UDP_L4,
        };
        Self(virtio_net_hdr {
            flags: virtio_net_hdr::F_NEEDS_CSUM,
            gso_type: kind | if gso.ecn { virtio_net_hdr::GSO_ECN } else { 0 },
            // Offsets of headers are far below 64 KiB.
            hdr_len: gso.headers.payload as u16,
            gso_size: gso.size,
            csum_start: gso.headers.transport as u16,
            csum_offset: gso.kind.checksum_offset() as u16,
        })
    }

    /// Holds what it says against the packet behind it.
    ///
    /// # Errors
    /// It contradicts the packet; see [`VnetFault`]. Nothing of such a packet can be relied upon.
    #[inline]
    pub fn check(&self, packet: &[u8], link: Link) -> Result<Meta, VnetFault> {
        let said = &self.0;
        if said.gso_type != virtio_net_hdr::GSO_NONE {
            return self.check_gso(packet, link).map(Meta::Gso);
        }
        if said.flags & virtio_net_hdr::F_NEEDS_CSUM != 0 {
            let start = usize::from(said.csum_start);
            let field = start + usize::from(said.csum_offset);
            // Inside the IP header it would be written over an address.
            if field + 2 > packet.len() || start < Headers::network_end(packet, link) {
                return Err(VnetFault::Checksum);
            }
            return Ok(Meta::Unfinished { start, field });
        }
        Ok(if said.flags & virtio_net_hdr::F_DATA_VALID != 0 {
            Meta::Verified
        } else {
            Meta::Plain
        })
    }

    fn check_gso(&self, packet: &[u8], link: Link) -> Result<Gso, VnetFault> {
        let said = &self.0;
        let ecn = said.gso_type & virtio_net_hdr::GSO_ECN != 0;
        let kind = match said.gso_type & !virtio_net_hdr::GSO_ECN {
            virtio_net_hdr::GSO_TCPV4 => GsoType::Tcp4,
            virtio_net_hdr::GSO_TCPV6 => GsoType::Tcp6,
            virtio_net_hdr::GSO_UDP_L4 if !ecn => GsoType::Udp,
            _ => return Err(VnetFault::Type(said.gso_type)),
        };
        if said.gso_size == 0 {
            return Err(VnetFault::Size);
        }
        let headers = Headers::parse(packet, link).map_err(VnetFault::Headers)?;
        let gso = Gso {
            kind,
            size: said.gso_size.max(kind.size_min()),
            ecn,
            headers,
        };
        gso.check(packet)?;
        let places = (usize::from(said.csum_start), usize::from(said.csum_offset));
        if said.flags & virtio_net_hdr::F_NEEDS_CSUM == 0 || places != (headers.transport, kind.checksum_offset()) {
            return Err(VnetFault::Checksum);
        }
        Ok(gso)
    }
}

impl Gso {
    /// Whether a kernel may drop it on its way to another device: `qdisc_pkt_len_init` of Linux
    /// 6.12.117 takes the first extension header of IPv6 for TCP's.
    pub(crate) fn may_be_lost(&self) -> bool {
        self.kind == GsoType::Tcp6 && self.headers.options
    }

    /// Whether the headers that were found in the packet are those of such a superpacket.
    pub(crate) fn check(&self, packet: &[u8]) -> Result<(), VnetFault> {
        let headers = &self.headers;
        let (version, protocol) = match self.kind {
            GsoType::Tcp4 => (Version::V4, TCP),
            GsoType::Tcp6 => (Version::V6, TCP),
            GsoType::Udp => (headers.version, UDP),
        };
        if version != headers.version || headers.protocol != protocol || headers.fragment {
            return Err(VnetFault::Mismatch);
        }
        if headers.end != packet.len() {
            return Err(VnetFault::Length);
        }
        if self.size < self.kind.size_min() {
            return Err(VnetFault::Size);
        }
        Ok(())
    }
}

impl GsoType {
    /// The fewest bytes of payload per segment: 8 of TCP, 1 of UDP.
    ///
    /// A driver's header may claim less of TCP; [`VnetHdr::check`] then takes 8, so that 64 KiB
    /// become at most 8,192 segments. The stream stays the same. Newer kernels do this too where
    /// such a header enters them (`TCP_MIN_GSO_SIZE` in `virtio_net_hdr_to_skb`; Linux 6.12.117 has
    /// it). Datagrams keep their length whatever it is.
    pub const fn size_min(self) -> u16 {
        match self {
            Self::Tcp4 | Self::Tcp6 => 8,
            Self::Udp => 1,
        }
    }

    /// Where the protocol has its checksum, from its own header's start.
    pub(crate) fn checksum_offset(self) -> usize {
        match self {
            Self::Tcp4 | Self::Tcp6 => 16,
            Self::Udp => 6,
        }
    }
}

/// Writes the checksum of a packet that is [`Unfinished`](Meta::Unfinished): over all from `start` on, where the field at `field` holds what is to be
/// added (the pseudo-header's sum). A zero is written as all ones, as the kernel does for every protocol. Nothing is done where the places lie
/// outside.
///
/// The packet ends where its IP length says; padding of an Ethernet frame has to be cut off before.
pub fn finish(packet: &mut [u8], start: usize, field: usize) {
    let Some(part) = packet.get(start..) else { return };
    let checksum = sum(part).checksum_udp();
    if let Some(field) = packet.get_mut(field..).and_then(<[u8]>::first_chunk_mut::<2>) {
        *field = checksum;
    }
}

/// The EtherTypes that are commonly first in a frame: IPv4, IPv6, ARP, and the two VLAN tags.
const COMMON_TYPES: [u16; 5] = [ETHERTYPE_IPV4, ETHERTYPE_IPV6, 0x0806, 0x8100, 0x88a8];
const ETHERTYPE_IPV4: u16 = 0x0800;
const ETHERTYPE_IPV6: u16 = 0x86dd;
const ETHERTYPE_AT: usize = 12;
const ETHERNET_LEN: usize = 14;

/// Whether a packet that is no superpacket stands where the header's size says, as far as its first
/// bytes tell: an IP packet of exactly this length, or a frame of a common type. One that does not
/// may still be right.
///
/// The header's size belongs to the device, and any holder may change it (TUNSETVNETHDRSZ). Every
/// packet is shifted then, and its header still says nothing wrong.
#[inline]
pub(crate) fn stands_in_place(packet: &[u8], link: Link) -> bool {
    match link {
        Link::None => is_exact_ip(packet),
        Link::Ethernet => match ether_type(packet) {
            Some(ETHERTYPE_IPV4) => is_framed_ip(packet, 4),
            Some(ETHERTYPE_IPV6) => is_framed_ip(packet, 6),
            Some(ether_type) => COMMON_TYPES.contains(&ether_type),
            None => false,
        },
    }
}

/// Whether a frame carries an IP packet of this version, which fills the frame unless it was padded
/// to the shortest one that there is.
#[inline]
fn is_framed_ip(frame: &[u8], version: u8) -> bool {
    /// ETH_ZLEN, and two VLAN tags that were taken off.
    const PADDED: usize = 60 + 8;
    let packet = &frame[ETHERNET_LEN..];
    packet.first().is_some_and(|first| first >> 4 == version) && (is_exact_ip(packet) || frame.len() <= PADDED)
}

/// Whether a packet that does not stand in place would do so further on, as one read with a longer
/// header than expected.
pub(crate) fn stands_further_on(packet: &[u8], link: Link) -> bool {
    /// A header of a size beyond this one is found by asking alone.
    const FURTHEST: usize = 64;
    (1..FURTHEST).any(|shift| match (packet.get(shift..), link) {
        (Some(rest), Link::None) => is_exact_ip(rest),
        (Some(rest), Link::Ethernet) => match ether_type(rest) {
            Some(ETHERTYPE_IPV4 | ETHERTYPE_IPV6) => is_exact_ip(&rest[ETHERNET_LEN..]),
            _ => false,
        },
        (None, _) => false,
    })
}

/// The EtherType of a frame that does not stand in place and may still be right: it is none of the
/// common ones, or the frame has bytes behind its IP packet.
pub(crate) fn rare_type(frame: &[u8]) -> Option<u16> {
    let ether_type = ether_type(frame)?;
    let version = match ether_type {
        ETHERTYPE_IPV4 => 4,
        ETHERTYPE_IPV6 => 6,
        _ => return (!COMMON_TYPES.contains(&ether_type)).then_some(ether_type),
    };
    let packet = &frame[ETHERNET_LEN..];
    let has_trailer = packet.first().is_some_and(|first| first >> 4 == version)
        && ip_len(packet).is_some_and(|len| len < packet.len());
    has_trailer.then_some(ether_type)
}

/// Whether the driver refuses a packet for its content, whatever the size of its header
/// (`tun_get_user` in drivers/net/tun.c).
pub(crate) fn is_no_packet(packet: &[u8], link: Link) -> bool {
    match link {
        Link::None => !matches!(packet.first().map(|first| first >> 4), Some(4 | 6)),
        Link::Ethernet => packet.len() < ETHERNET_LEN,
    }
}

/// The EtherType of a frame that has a whole Ethernet header.
fn ether_type(frame: &[u8]) -> Option<u16> {
    let bytes = frame.get(ETHERTYPE_AT..ETHERNET_LEN)?;
    Some(u16::from_be_bytes([bytes[0], bytes[1]]))
}

/// Whether it is an IP packet whose header gives exactly its length.
#[inline]
fn is_exact_ip(packet: &[u8]) -> bool {
    ip_len(packet) == Some(packet.len())
}

/// The length of an IP packet by its header.
#[inline]
fn ip_len(packet: &[u8]) -> Option<usize> {
    /// Where the length stands, and what it does not count.
    const V4: (usize, usize) = (2, 0);
    const V6: (usize, usize) = (4, 40);
    let (at, more) = match packet.first()? >> 4 {
        4 => V4,
        6 => V6,
        _ => return None,
    };
    let length = packet.get(at..at + 2)?;
    Some(usize::from(u16::from_be_bytes([length[0], length[1]])) + more)
}

impl fmt::Display for VnetFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Type(number) => write!(f, "vnet header: a superpacket of type {number:#x}, which is not known"),
            Self::Mismatch => f.write_str("vnet header: its type does not go with the packet"),
            Self::Size => f.write_str("vnet header: a superpacket with segments of no length, or of TCP below 8 bytes"),
            Self::Checksum => f.write_str("vnet header: a checksum where the packet has none"),
            Self::Length => f.write_str("vnet header: the packet's length is not what its headers say"),
            Self::Headers(fault) => write!(f, "vnet header: a packet {fault}"),
        }
    }
}

impl std::error::Error for VnetFault {}

#[cfg(test)]
mod tests {
    use super::*;

    /// An IP packet of `len` bytes, filled with what must not matter.
    fn ip(version: u8, len: usize) -> Vec<u8> {
        let mut packet = vec![0xa5; len];
        packet[0] = version << 4 | 5;
        let (at, length) = if version == 4 { (2, len) } else { (4, len - 40) };
        packet[at..at + 2].copy_from_slice(&(length as u16).to_be_bytes());
        packet
    }

    fn frame(ether_type: u16, payload: &[u8]) -> Vec<u8> {
        let mut frame = vec![0x02, 0, 0, 0, 0, 1, 0x02, 0, 0, 0, 0, 2];
        frame.extend(ether_type.to_be_bytes());
        frame.extend(payload);
        frame
    }

    #[test]
    fn a_packet_in_place_is_believed_and_a_shifted_one_is_found() {
        for len in [48, 60, 576, 1500] {
            for (version, ether_type) in [(4, ETHERTYPE_IPV4), (6, ETHERTYPE_IPV6)] {
                let packet = ip(version, len);
                for (link, bytes) in [
                    (Link::None, packet.clone()),
                    (Link::Ethernet, frame(ether_type, &packet)),
                ] {
                    assert!(stands_in_place(&bytes, link) && !stands_further_on(&bytes, link));
                    assert!(!is_no_packet(&bytes, link));
                    if link == Link::Ethernet {
                        assert_eq!(rare_type(&bytes), None, "{len}");
                        let longer = [&bytes[..], &[0; 40]].concat();
                        assert_eq!(rare_type(&longer), Some(ether_type), "{len}");
                        assert_eq!(rare_type(&bytes[..bytes.len() - 1]), None, "{len}");
                    }
                    for shift in [1, 2, 4, 10, 14, 62] {
                        // The kernel leaves zeros between a longer header and the packet, or what
                        // was there before.
                        for filler in [vec![0; shift], bytes[..shift.min(bytes.len())].to_vec()] {
                            let shifted = [filler.as_slice(), &bytes].concat();
                            assert!(!stands_in_place(&shifted, link), "{link:?} {len} {shift}");
                            assert!(stands_further_on(&shifted, link), "{link:?} {len} {shift}");
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn frames_of_common_types_are_believed_and_nothing_panics() {
        for ether_type in COMMON_TYPES.into_iter().skip(2) {
            assert!(stands_in_place(&frame(ether_type, &[0; 28]), Link::Ethernet));
        }
        assert!(!stands_in_place(&frame(0x8847, &[0; 28]), Link::Ethernet));
        for len in 0..80 {
            for byte in [0, 0x45, 0x60, 0xff] {
                for link in [Link::None, Link::Ethernet] {
                    let bytes = vec![byte; len];
                    let _ = (stands_in_place(&bytes, link), stands_further_on(&bytes, link));
                    let _ = (rare_type(&bytes), is_no_packet(&bytes, link));
                }
            }
        }
    }
}
