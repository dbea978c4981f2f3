//! Where the headers of a packet lie.
//!
//! Only what can be cut or merged is looked at in full: IPv4 and IPv6 with their extension headers, and TCP or UDP behind them.
//!
//! ```
//! use tun_driver::offload::{Headers, Link};
//!
//! let mut packet = [0; 32];
//! packet[0] = 0x45; // IPv4, five words of header
//! packet[3] = 32; // its length
//! packet[9] = 17; // UDP
//! packet[25] = 12; // UDP's length
//! let headers = Headers::parse(&packet, Link::None)?;
//! assert_eq!((headers.network, headers.transport, headers.payload), (0, 20, 28));
//! # Ok::<(), tun_driver::offload::HeaderFault>(())
//! ```

use std::fmt;

/// What stands in front of the IP header.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Link {
    /// Nothing: a TUN device.
    #[default]
    None,
    /// An Ethernet header, with VLAN tags if there are any (802.1Q, 802.1ad; two at most): a TAP device.
    Ethernet,
}

/// Of IP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Version {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

/// The headers of a packet, as offsets from its start in bytes. All of them lie inside it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Headers {
    /// The version of IP.
    pub version: Version,
    /// Where the IP header begins.
    pub network: usize,
    /// Where that of TCP, UDP or another protocol begins.
    pub transport: usize,
    /// Where the payload of TCP or UDP begins. With other protocols, and fragments, the same as `transport`.
    pub payload: usize,
    /// Where the packet ends by IP's own length. What lies behind it is padding of the link.
    pub end: usize,
    /// The protocol by its number: 6 TCP, 17 UDP.
    pub protocol: u8,
    /// It is a fragment; its payload is not looked at.
    pub fragment: bool,
    /// IPv4 options, or extension headers of IPv6.
    pub options: bool,
}

/// Why no headers were found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum HeaderFault {
    /// Neither IPv4 nor IPv6.
    NotIp,
    /// A header, or what a length claims, goes beyond the packet.
    Short,
    /// A length that cannot be: a header shorter than the least, or a packet shorter than its headers.
    Length,
    /// More extension headers than anybody needs.
    Options,
}

/// The number of TCP.
pub const TCP: u8 = 6;
/// The number of UDP.
pub const UDP: u8 = 17;

/// Bytes of an Ethernet header without tags.
const ETHERNET: usize = 14;

/// The most extension headers that are passed over.
const EXTENSIONS_MAX: usize = 8;

impl Headers {
    /// Finds the headers of a packet.
    ///
    /// # Errors
    /// The packet is not IP, or contradicts itself. See [`HeaderFault`].
    #[inline]
    pub fn parse(packet: &[u8], link: Link) -> Result<Self, HeaderFault> {
        let network = match link {
            Link::None => 0,
            Link::Ethernet => behind_ethernet(packet)?,
        };
        Self::parse_at(packet, network)
    }

    /// Finds the headers of a packet whose IP header begins at `network`, whatever stands in front of it.
    ///
    /// # Errors
    /// As [`parse`](Self::parse).
    #[inline]
    pub fn parse_at(packet: &[u8], network: usize) -> Result<Self, HeaderFault> {
        match byte(packet, network)? >> 4 {
            4 => Self::parse_v4(packet, network),
            6 => Self::parse_v6(packet, network),
            _ => Err(HeaderFault::NotIp),
        }
    }

    /// The source and the target address, 4 or 16 bytes each, of the packet that these headers are of.
    #[inline]
    pub fn addresses<'a>(&self, packet: &'a [u8]) -> Option<(&'a [u8], &'a [u8])> {
        let header = packet.get(self.network..)?;
        match self.version {
            Version::V4 => Some(header.get(12..20)?.split_at(4)),
            Version::V6 => Some(header.get(8..40)?.split_at(16)),
        }
    }

    /// Where the IP header ends and a checksum may begin: behind its extension headers, as far as
    /// they can be read, and at least behind the fixed part. Of a packet that is not IP, where the
    /// link header ends.
    #[inline]
    pub(crate) fn network_end(packet: &[u8], link: Link) -> usize {
        let network = match link {
            Link::None => 0,
            // What is not IP may have another layer here, of which nothing is known.
            Link::Ethernet => match behind_ethernet(packet) {
                Ok(network) => network,
                Err(_) => return ETHERNET,
            },
        };
        match packet.get(network) {
            Some(first) if first >> 4 == 4 => network + 4 * usize::from(first & 0xf).max(5),
            Some(first) if first >> 4 == 6 => match packet.get(network + 6) {
                Some(&next) if is_extension(next) => {
                    Self::parse_v6(packet, network).map_or(network + 40, |headers| headers.transport)
                }
                _ => network + 40,
            },
            _ => network,
        }
    }

    fn parse_v4(packet: &[u8], network: usize) -> Result<Self, HeaderFault> {
        let header = packet.get(network..network + 20).ok_or(HeaderFault::Short)?;
        let transport = network + usize::from(header[0] & 0xf) * 4;
        let end = network + usize::from(u16::from_be_bytes([header[2], header[3]]));
        if transport < network + 20 || end < transport {
            return Err(HeaderFault::Length);
        }
        if end > packet.len() {
            return Err(HeaderFault::Short);
        }
        // More fragments, or not the first one.
        let fragment = u16::from_be_bytes([header[6], header[7]]) & 0x3fff != 0;
        Self {
            version: Version::V4,
            network,
            transport,
            payload: transport,
            end,
            protocol: header[9],
            fragment,
            options: transport > network + 20,
        }
        .with_payload(packet)
    }

    fn parse_v6(packet: &[u8], network: usize) -> Result<Self, HeaderFault> {
        let header = packet.get(network..network + 40).ok_or(HeaderFault::Short)?;
        let end = network + 40 + usize::from(u16::from_be_bytes([header[4], header[5]]));
        if end > packet.len() {
            return Err(HeaderFault::Short);
        }
        let (mut protocol, mut transport, mut fragment) = (header[6], network + 40, false);
        let mut extensions = 0;
        while is_extension(protocol) {
            if fragment {
                break;
            }
            extensions += 1;
            if extensions > EXTENSIONS_MAX {
                return Err(HeaderFault::Options);
            }
            let [next, len] = *packet
                .get(transport..end)
                .and_then(<[u8]>::first_chunk::<2>)
                .ok_or(HeaderFault::Length)?;
            let len = match protocol {
                44 => {
                    fragment = true;
                    8
                }
                51 => (usize::from(len) + 2) * 4,
                _ => (usize::from(len) + 1) * 8,
            };
            protocol = next;
            transport += len;
            if transport > end {
                return Err(HeaderFault::Length);
            }
        }
        Self {
            version: Version::V6,
            network,
            transport,
            payload: transport,
            end,
            protocol,
            fragment,
            options: extensions > 0,
        }
        .with_payload(packet)
    }

    /// Looks into TCP and UDP.
    #[inline]
    fn with_payload(mut self, packet: &[u8]) -> Result<Self, HeaderFault> {
        if self.fragment {
            return Ok(self);
        }
        let transport = packet.get(self.transport..self.end).ok_or(HeaderFault::Short)?;
        let len = match self.protocol {
            TCP => {
                let header = transport.first_chunk::<20>().ok_or(HeaderFault::Length)?;
                let len = usize::from(header[12] >> 4) * 4;
                if len < 20 || len > transport.len() {
                    return Err(HeaderFault::Length);
                }
                len
            }
            UDP => {
                transport.first_chunk::<8>().ok_or(HeaderFault::Length)?;
                8
            }
            _ => 0,
        };
        self.payload += len;
        Ok(self)
    }
}

/// Whether an IPv6 header of this number is followed by another one.
#[inline]
fn is_extension(header: u8) -> bool {
    matches!(header, 0 | 43 | 44 | 51 | 60 | 135 | 139 | 140)
}

/// Where the IP header begins behind an Ethernet header.
fn behind_ethernet(packet: &[u8]) -> Result<usize, HeaderFault> {
    let mut at = 12;
    for _ in 0..3 {
        match u16::from_be_bytes([byte(packet, at)?, byte(packet, at + 1)?]) {
            0x8100 | 0x88a8 => at += 4,
            0x0800 | 0x86dd => return Ok(at + 2),
            _ => return Err(HeaderFault::NotIp),
        }
    }
    Err(HeaderFault::NotIp)
}

#[inline]
fn byte(packet: &[u8], at: usize) -> Result<u8, HeaderFault> {
    packet.get(at).copied().ok_or(HeaderFault::Short)
}

impl fmt::Display for HeaderFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::NotIp => "neither IPv4 nor IPv6",
            Self::Short => "shorter than its headers say",
            Self::Length => "a length in its headers that cannot be",
            Self::Options => "too many extension headers",
        })
    }
}

impl std::error::Error for HeaderFault {}

#[cfg(test)]
mod tests {
    use etherparse::{PacketBuilder, SlicedPacket, TransportSlice};
    use proptest::prelude::*;

    use super::*;

    fn tcp4(options: &[u8]) -> Vec<u8> {
        let mut packet = Vec::new();
        PacketBuilder::ipv4([10, 0, 0, 1], [10, 0, 0, 2], 64)
            .tcp(1, 2, 3, 4)
            .options_raw(options)
            .unwrap()
            .write(&mut packet, b"payload")
            .unwrap();
        packet
    }

    #[test]
    fn ipv4_with_tcp_options_and_padding() {
        let mut packet = tcp4(&[1; 12]);
        packet.extend([0; 9]);
        let headers = Headers::parse(&packet, Link::None).unwrap();
        assert_eq!((headers.network, headers.transport, headers.payload), (0, 20, 52));
        assert_eq!((headers.end, headers.protocol), (59, TCP));
        assert!(!headers.options && !headers.fragment);
        assert_eq!(
            headers.addresses(&packet),
            Some((&[10, 0, 0, 1][..], &[10, 0, 0, 2][..]))
        );
    }

    #[test]
    fn ethernet_with_no_one_and_two_tags() {
        let ip = tcp4(&[]);
        for (tags, at) in [
            (&[][..], 14),
            (&[0x81, 0, 0, 1], 18),
            (&[0x88, 0xa8, 0, 1, 0x81, 0, 0, 2], 22),
        ] {
            let frame = [&[2; 12][..], tags, &[8, 0], &ip].concat();
            let headers = Headers::parse(&frame, Link::Ethernet).unwrap();
            assert_eq!((headers.network, headers.transport), (at, at + 20));
        }
        let frame = [&[2; 12][..], &[0x08, 0x06], &ip].concat();
        assert_eq!(Headers::parse(&frame, Link::Ethernet), Err(HeaderFault::NotIp));
        let many = [&[2; 12][..], &[0x81, 0, 0, 1].repeat(3), &[8, 0], &ip].concat();
        assert_eq!(Headers::parse(&many, Link::Ethernet), Err(HeaderFault::NotIp));
    }

    #[test]
    fn ipv6_with_extension_headers() {
        // Hop-by-hop, destination options of 16 bytes, UDP.
        let mut packet = vec![0x60, 0, 0, 0, 0, 8 + 16 + 8 + 3, 0, 64];
        packet.extend([0; 32]);
        packet.extend([60, 0, 1, 4, 0, 0, 0, 0]);
        packet.extend([17, 1, 1, 12]);
        packet.extend([0; 12]);
        packet.extend([0, 1, 0, 2, 0, 11, 0, 0, 1, 2, 3]);
        let headers = Headers::parse(&packet, Link::None).unwrap();
        assert_eq!((headers.transport, headers.payload, headers.end), (64, 72, 75));
        assert!(headers.options && !headers.fragment && headers.protocol == UDP);
        // The same as a fragment: nothing behind it is looked at.
        packet[40] = 44;
        let headers = Headers::parse(&packet, Link::None).unwrap();
        assert_eq!((headers.transport, headers.payload, headers.protocol), (56, 56, UDP));
        assert!(headers.fragment);
    }

    #[test]
    fn what_contradicts_itself_is_refused() {
        let good = tcp4(&[]);
        let with = |change: &dyn Fn(&mut Vec<u8>)| {
            let mut packet = good.clone();
            change(&mut packet);
            Headers::parse(&packet, Link::None)
        };
        assert_eq!(with(&|packet| packet.truncate(19)), Err(HeaderFault::Short));
        assert_eq!(with(&|packet| packet.truncate(0)), Err(HeaderFault::Short));
        assert_eq!(with(&|packet| packet[0] = 0x55), Err(HeaderFault::NotIp));
        assert_eq!(with(&|packet| packet[0] = 0x44), Err(HeaderFault::Length));
        assert_eq!(with(&|packet| packet[3] = 19), Err(HeaderFault::Length));
        assert_eq!(with(&|packet| packet[3] = 200), Err(HeaderFault::Short));
        assert_eq!(with(&|packet| packet[32] = 0x40), Err(HeaderFault::Length));
        assert_eq!(with(&|packet| packet[32] = 0xf0), Err(HeaderFault::Length));
        assert_eq!(with(&|packet| packet[3] = 30), Err(HeaderFault::Length));
    }

    #[test]
    fn a_checksum_begins_behind_the_ip_header() {
        let v4 = tcp4(&[]);
        let ethernet = |tags: &[u8], ip: &[u8]| [&[2; 12][..], tags, ip].concat();
        assert_eq!(Headers::network_end(&v4, Link::None), 20);
        for (tags, end) in [
            (&[8, 0][..], 34),
            (&[0x81, 0, 0, 1, 8, 0], 38),
            (&[0x88, 0xa8, 0, 1, 0x81, 0, 0, 2, 8, 0], 42),
            // Not IP: nothing is known behind the addresses.
            (&[0x88, 0x47], 14),
        ] {
            assert_eq!(Headers::network_end(&ethernet(tags, &v4), Link::Ethernet), end);
        }
        // Options, also where the packet is not as long as it says; and fewer words than there are.
        let mut short = v4.clone();
        short[0] = 0x4f;
        assert_eq!(Headers::network_end(&short, Link::None), 60);
        short[0] = 0x41;
        assert_eq!(Headers::network_end(&short, Link::None), 20);
        let mut v6 = vec![0x60, 0, 0, 0, 0, 32, 60, 64];
        v6.resize(72, 0);
        v6[40..42].copy_from_slice(&[17, 2]);
        assert_eq!(Headers::network_end(&v6, Link::None), 64);
        v6[41] = 200;
        assert_eq!(Headers::network_end(&v6, Link::None), 40);
        v6[6] = 6;
        assert_eq!(Headers::network_end(&v6, Link::None), 40);
        assert_eq!(Headers::network_end(&[], Link::None), 0);
        assert_eq!(Headers::network_end(&[0x60], Link::None), 40);
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic_and_offsets_lie_inside(
            bytes in prop::collection::vec(any::<u8>(), 0..200), first in prop::sample::select(vec![0x45u8, 0x46, 0x4f, 0x60, 0]), ethernet in any::<bool>()
        ) {
            let mut bytes = bytes;
            let (link, at) = if ethernet { (Link::Ethernet, 14) } else { (Link::None, 0) };
            if let Some(byte) = bytes.get_mut(at) {
                *byte = first;
            }
            if ethernet && bytes.len() > 13 {
                bytes[12..14].copy_from_slice(if first == 0x60 { &[0x86, 0xdd] } else { &[8, 0] });
            }
            if let Ok(headers) = Headers::parse(&bytes, link) {
                prop_assert!(headers.network <= headers.transport && headers.transport <= headers.payload);
                prop_assert!(headers.payload <= headers.end && headers.end <= bytes.len());
                prop_assert!(headers.addresses(&bytes).is_some());
            }
        }

        #[test]
        fn another_library_finds_the_same(payload in prop::collection::vec(any::<u8>(), 0..100), v6 in any::<bool>(), tcp in any::<bool>()) {
            let mut packet = Vec::new();
            let ip = if v6 {
                PacketBuilder::ipv6([1; 16], [2; 16], 9)
            } else {
                PacketBuilder::ipv4([1; 4], [2; 4], 9)
            };
            if tcp {
                ip.tcp(7, 8, 9, 10).write(&mut packet, &payload).unwrap();
            } else {
                ip.udp(7, 8).write(&mut packet, &payload).unwrap();
            }
            let ours = Headers::parse(&packet, Link::None).unwrap();
            let theirs = SlicedPacket::from_ip(&packet).unwrap();
            let rest = match theirs.transport.unwrap() {
                TransportSlice::Tcp(tcp) => tcp.payload().len(),
                TransportSlice::Udp(udp) => udp.payload().len(),
                _ => unreachable!(),
            };
            prop_assert_eq!(ours.end - ours.payload, rest);
            prop_assert_eq!(rest, payload.len());
        }
    }
}
