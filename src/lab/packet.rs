//! Test packets that know what they are: UDP over IPv4 or IPv6 with a stamp in the payload.
//!
//! ```text
//! | packet info 4 | vnet header | Ethernet 14 | IPv4 20 or IPv6 40 | UDP 8 | stamp 16 | pattern … |
//!   `--------------- Framing ---------------'                              `---- checksummed ----'
//! stamp: checksum u32 | flow u16 | payload length u16 | sequence u32 | sent u32      (all big endian)
//! ```
//!
//! The stamp's checksum finds any change within one aligned word of the payload for certain, and other changes but for one in 2³².
//!
//! ```
//! use tun_driver::lab::packet::{Framing, Spec};
//!
//! let spec = Spec::new("10.0.0.2:4000".parse().unwrap(), "10.0.0.1:5000".parse().unwrap());
//! let mut buffer = [0; 1500];
//! let length = spec.build(&mut buffer, 1400, 7, 0);
//! assert_eq!(length, 1400);
//! let stamp = Framing::NONE.check(&buffer[..length]).unwrap();
//! assert_eq!((stamp.flow, stamp.sequence), (0, 7));
//! ```

use std::fmt;
use std::net::SocketAddr;
use std::ops::Range;
use std::time::Duration;

/// Bytes of the stamp at the payload's start; no payload is shorter.
pub const STAMP_LEN: usize = 16;

/// The shortest IPv4 packet that holds a stamp.
pub const MIN_IPV4: usize = IPV4_LEN + UDP_LEN + STAMP_LEN;

/// The shortest IPv6 packet that holds a stamp.
pub const MIN_IPV6: usize = IPV6_LEN + UDP_LEN + STAMP_LEN;

const PACKET_INFO_LEN: usize = 4;
const ETHERNET_LEN: usize = 14;
const IPV4_LEN: usize = 20;
const IPV6_LEN: usize = 40;
pub(super) const UDP_LEN: usize = 8;
const PROTOCOL_UDP: u8 = 17;
const ETHERTYPE_IPV4: u16 = 0x0800;
const ETHERTYPE_IPV6: u16 = 0x86dd;

/// Where the stamp's fields are, from the payload's start.
mod field {
    use super::Range;

    pub(super) const CHECKSUM: Range<usize> = 0..4;
    pub(super) const FLOW: Range<usize> = 4..6;
    pub(super) const LENGTH: Range<usize> = 6..8;
    pub(super) const SEQUENCE: Range<usize> = 8..12;
    pub(super) const SENT: Range<usize> = 12..16;
}

/// What stands in front of the IP header.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Framing {
    /// The four bytes of a device opened with packet info.
    pub packet_info: bool,
    /// Length of a virtio net header; it is written as zeros (no offload).
    pub vnet_header: usize,
    /// An Ethernet header, for TAP.
    pub ethernet: Option<Ethernet>,
}

/// The addresses of an Ethernet header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ethernet {
    /// The sender's hardware address.
    pub source: [u8; 6],
    /// The receiver's hardware address.
    pub target: [u8; 6],
}

/// The packets of one flow: where from, where to, and what stands in front of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Spec {
    /// The source address and port.
    pub source: SocketAddr,
    /// The target address and port; of the same family.
    pub target: SocketAddr,
    /// The flow's number in the stamps.
    pub flow: u16,
    /// What stands in front of the IP header.
    pub framing: Framing,
}

/// What a packet says of itself, verified.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stamp {
    /// Its flow's number.
    pub flow: u16,
    /// Its number within the flow.
    pub sequence: u32,
    /// Bytes of the UDP payload.
    pub length: usize,
    /// The lower half of [`monotonic_ns`](super::monotonic_ns) at the time it was built or sent.
    pub sent: u32,
}

/// What a packet of the kernel's pktgen says of itself (`struct pktgen_hdr`, net/core/pktgen.c).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PktgenStamp {
    /// Its number: each pktgen device counts its own packets from 1 on, those of all its flows together.
    pub sequence: u32,
    /// When it was sent: CLOCK_REALTIME in microseconds.
    pub sent_us: u64,
    /// The UDP destination port.
    pub port: u16,
    /// Bytes of the UDP payload.
    pub length: usize,
}

/// What pktgen's header begins with.
pub const PKTGEN_MAGIC: u32 = 0xbe9b_e955;

/// Why bytes are not one of our packets, whole and unchanged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Fault {
    /// Not UDP over IP: something else was on the wire (ARP, neighbour discovery, …), not a damaged packet of ours.
    Foreign,
    /// Shorter than its headers and a stamp, or a length that disagrees with the bytes at hand: cut off or padded.
    Length,
    /// A header field that we never write so.
    Header,
    /// The IPv4 header's checksum is wrong.
    HeaderChecksum,
    /// The payload is not the one that was sent.
    Corrupted,
}

impl Framing {
    /// A bare IP packet, as a TUN device without packet info has it.
    pub const NONE: Self = Self {
        packet_info: false,
        vnet_header: 0,
        ethernet: None,
    };

    /// Packet info in front.
    pub const PACKET_INFO: Self = Self {
        packet_info: true,
        ..Self::NONE
    };

    /// Bytes in front of the IP header.
    pub fn len(&self) -> usize {
        self.ethernet_at() + if self.ethernet.is_some() { ETHERNET_LEN } else { 0 }
    }

    /// Whether the IP header comes first.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Verifies a packet with this framing: headers, lengths, checksums. Addresses are not compared.
    ///
    /// The UDP checksum is not looked at: with offloads the kernel leaves it unfinished. The stamp's own covers the payload.
    pub fn check(&self, bytes: &[u8]) -> Result<Stamp, Fault> {
        check_payload(self.payload(bytes, true)?)
    }

    /// The same without the two checksums: about the price of reading the headers, whatever the length. A change of the payload, of the
    /// addresses or of the stamp itself passes, and UDP of others passes for a packet of ours if bytes 6 and 7 of its payload happen to say
    /// its length.
    pub fn check_unverified(&self, bytes: &[u8]) -> Result<Stamp, Fault> {
        read_stamp(self.payload(bytes, false)?)
    }

    /// What pktgen's header says, if the packet is one of pktgen's.
    pub fn read_pktgen(&self, bytes: &[u8]) -> Option<PktgenStamp> {
        let datagram = self.datagram(bytes, false).ok()?;
        let mut stamp = PktgenStamp::read(&datagram[UDP_LEN..])?;
        stamp.port = u16_at(datagram, 2..4);
        Some(stamp)
    }

    fn payload<'a>(&self, bytes: &'a [u8], verify: bool) -> Result<&'a [u8], Fault> {
        self.datagram(bytes, verify).map(|datagram| &datagram[UDP_LEN..])
    }

    fn datagram<'a>(&self, bytes: &'a [u8], verify: bool) -> Result<&'a [u8], Fault> {
        let packet = bytes.get(self.len()..).ok_or(Fault::Length)?;
        let ethertype = match packet.first().ok_or(Fault::Length)? >> 4 {
            4 => ETHERTYPE_IPV4,
            6 => ETHERTYPE_IPV6,
            _ => return Err(Fault::Foreign),
        };
        if self.packet_info && bytes[2..PACKET_INFO_LEN] != ethertype.to_be_bytes() {
            return Err(Fault::Header);
        }
        if self.ethernet.is_some() && bytes[self.len() - 2..self.len()] != ethertype.to_be_bytes() {
            return Err(Fault::Foreign);
        }
        let datagram = match ethertype {
            ETHERTYPE_IPV4 => check_ipv4(packet, verify)?,
            _ => check_ipv6(packet)?,
        };
        if datagram.len() < UDP_LEN || u16_at(datagram, 4..6) as usize != datagram.len() {
            return Err(Fault::Length);
        }
        Ok(datagram)
    }

    fn ethernet_at(&self) -> usize {
        self.vnet_header + if self.packet_info { PACKET_INFO_LEN } else { 0 }
    }
}

impl Spec {
    /// Flow 0 between two addresses, without framing.
    pub fn new(source: SocketAddr, target: SocketAddr) -> Self {
        Self {
            source,
            target,
            flow: 0,
            framing: Framing::NONE,
        }
    }

    /// The same with another flow number; its ports move along, so that the kernel sees another flow too.
    pub fn flow(mut self, flow: u16) -> Self {
        self.source
            .set_port(self.source.port().wrapping_add(flow.wrapping_sub(self.flow)));
        self.flow = flow;
        self
    }

    /// The same behind `framing`.
    pub fn framing(mut self, framing: Framing) -> Self {
        self.framing = framing;
        self
    }

    /// Writes packet number `sequence`, `length` bytes from the IP header on, sent at `now` (see [`monotonic_ns`](super::monotonic_ns)),
    /// to the front of `buffer`. Returns how many bytes it takes with its framing. Nothing is allocated.
    ///
    /// # Panics
    ///
    /// If `length` is below [`MIN_IPV4`] or [`MIN_IPV6`] or above 65,535, if the buffer is too short, or if the families differ.
    pub fn build(&self, buffer: &mut [u8], length: usize, sequence: u32, now: u64) -> usize {
        let total = self.framing.len() + length;
        let headers = self.headers_len();
        let (front, payload) = buffer[..total].split_at_mut(headers);
        let pseudo = self.write_headers(front, payload.len());
        write_payload(payload, self.flow, sequence, now);
        let datagram = &mut buffer[headers - UDP_LEN..total];
        let checksum = match !fold(u64::from(pseudo) + sum(&datagram[..6]) + sum(&datagram[UDP_LEN..])) {
            0 => 0xffff, // zero would say "none"
            checksum => checksum,
        };
        datagram[6..8].copy_from_slice(&checksum.to_be_bytes());
        total
    }

    /// Bytes in front of the payload: framing, IP and UDP headers.
    pub fn headers_len(&self) -> usize {
        let ip = if self.source.is_ipv4() { IPV4_LEN } else { IPV6_LEN };
        self.framing.len() + ip + UDP_LEN
    }

    /// Writes what stands in front of `payload_len` bytes of payload, [`headers_len`](Self::headers_len) bytes. The UDP checksum is left as the
    /// sum over the pseudo header, which is returned: what whoever finishes it begins with.
    ///
    /// # Panics
    ///
    /// If `headers` has another length, if the packet is longer than 65,535 bytes, or if the families differ.
    pub fn write_headers(&self, headers: &mut [u8], payload_len: usize) -> u16 {
        assert_eq!(headers.len(), self.headers_len());
        let (front, packet) = headers.split_at_mut(self.framing.len());
        let ethertype = if self.source.is_ipv4() {
            ETHERTYPE_IPV4
        } else {
            ETHERTYPE_IPV6
        };
        front.fill(0);
        if self.framing.packet_info {
            front[2..PACKET_INFO_LEN].copy_from_slice(&ethertype.to_be_bytes());
        }
        if let Some(Ethernet { source, target }) = self.framing.ethernet {
            let header = &mut front[self.framing.ethernet_at()..];
            header[..6].copy_from_slice(&target);
            header[6..12].copy_from_slice(&source);
            header[12..].copy_from_slice(&ethertype.to_be_bytes());
        }
        let length = u16::try_from(packet.len() + payload_len).expect("an IP packet has at most 65,535 bytes");
        let (header_len, addresses) = match (self.source, self.target) {
            (SocketAddr::V4(source), SocketAddr::V4(target)) => {
                let header = &mut packet[..IPV4_LEN];
                header.fill(0);
                header[0] = 0x45;
                header[2..4].copy_from_slice(&length.to_be_bytes());
                header[6] = 0x40; // do not fragment
                header[8] = 64;
                header[9] = PROTOCOL_UDP;
                header[12..16].copy_from_slice(&source.ip().octets());
                header[16..20].copy_from_slice(&target.ip().octets());
                let checksum = !fold(sum(header));
                header[10..12].copy_from_slice(&checksum.to_be_bytes());
                (IPV4_LEN, sum(&packet[12..IPV4_LEN]))
            }
            (SocketAddr::V6(source), SocketAddr::V6(target)) => {
                let header = &mut packet[..IPV6_LEN];
                header.fill(0);
                header[0] = 0x60;
                header[4..6].copy_from_slice(&(length - IPV6_LEN as u16).to_be_bytes());
                header[6] = PROTOCOL_UDP;
                header[7] = 64;
                header[8..24].copy_from_slice(&source.ip().octets());
                header[24..40].copy_from_slice(&target.ip().octets());
                (IPV6_LEN, sum(&packet[8..IPV6_LEN]))
            }
            _ => panic!("source and target are of two families"),
        };
        let datagram_len = length - header_len as u16;
        let pseudo = fold(addresses + u64::from(PROTOCOL_UDP) + u64::from(datagram_len));
        let datagram = &mut packet[header_len..];
        datagram[0..2].copy_from_slice(&self.source.port().to_be_bytes());
        datagram[2..4].copy_from_slice(&self.target.port().to_be_bytes());
        datagram[4..6].copy_from_slice(&datagram_len.to_be_bytes());
        datagram[6..8].copy_from_slice(&pseudo.to_be_bytes());
        pseudo
    }
}

impl Stamp {
    /// How long ago it was sent, by the same clock; right for ages below 2.14 seconds. Zero for what was sent after `now`, as happens where one
    /// reading of the clock serves several packets.
    pub fn age(&self, now: u64) -> Duration {
        let age = (now as u32).wrapping_sub(self.sent) as i32;
        Duration::from_nanos(u64::try_from(age).unwrap_or(0))
    }
}

impl PktgenStamp {
    /// Reads it from the front of a UDP payload; its port is 0.
    pub fn read(payload: &[u8]) -> Option<Self> {
        let header = payload.get(..16)?;
        (u32_at(header, 0..4) == PKTGEN_MAGIC).then(|| Self {
            sequence: u32_at(header, 4..8),
            sent_us: u64::from(u32_at(header, 8..12)) * 1_000_000 + u64::from(u32_at(header, 12..16)),
            port: 0,
            length: payload.len(),
        })
    }

    /// As one of our own: the flow is the port's distance from `port`, and CLOCK_REALTIME is `ahead` ns before [`monotonic_ns`](super::monotonic_ns).
    pub(super) fn as_ours(self, port: u16, ahead: i64) -> Stamp {
        Stamp {
            flow: self.port.wrapping_sub(port),
            sequence: self.sequence.wrapping_sub(1),
            length: self.length,
            sent: (self.sent_us * 1_000).wrapping_sub(ahead as u64) as u32,
        }
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Foreign => "not a test packet",
            Self::Length => "cut off or padded",
            Self::Header => "wrong header",
            Self::HeaderChecksum => "wrong checksum of the IPv4 header",
            Self::Corrupted => "payload changed",
        })
    }
}

impl std::error::Error for Fault {}

/// Fills a UDP payload: the stamp, then a pattern.
///
/// # Panics
///
/// If it is shorter than [`STAMP_LEN`] or longer than 65,535 bytes.
pub fn write_payload(payload: &mut [u8], flow: u16, sequence: u32, now: u64) {
    let length = u16::try_from(payload.len()).expect("a UDP payload has less than 64 KiB");
    payload[field::FLOW].copy_from_slice(&flow.to_be_bytes());
    payload[field::LENGTH].copy_from_slice(&length.to_be_bytes());
    payload[field::SEQUENCE].copy_from_slice(&sequence.to_be_bytes());
    payload[field::SENT].copy_from_slice(&(now as u32).to_be_bytes());
    for (index, byte) in payload[STAMP_LEN..].iter_mut().enumerate() {
        *byte = (index as u8).wrapping_add(sequence as u8);
    }
    let checksum = digest(&payload[field::CHECKSUM.end..]);
    payload[field::CHECKSUM].copy_from_slice(&checksum.to_be_bytes());
}

/// Verifies a UDP payload, as a socket receives it.
pub fn check_payload(payload: &[u8]) -> Result<Stamp, Fault> {
    if payload.len() < STAMP_LEN {
        return Err(Fault::Length);
    }
    if u32_at(payload, field::CHECKSUM) != digest(&payload[field::CHECKSUM.end..]) {
        // The length field tells a cut from a change, unless that is what changed.
        let length = u16_at(payload, field::LENGTH) as usize;
        return Err(if length == payload.len() {
            Fault::Corrupted
        } else {
            Fault::Length
        });
    }
    read_stamp(payload)
}

/// What a UDP payload says of itself, with no more than its length verified; see [`Framing::check_unverified`].
pub fn read_stamp(payload: &[u8]) -> Result<Stamp, Fault> {
    if payload.len() < STAMP_LEN {
        return Err(Fault::Length);
    }
    let stamp = Stamp {
        flow: u16_at(payload, field::FLOW),
        sequence: u32_at(payload, field::SEQUENCE),
        length: u16_at(payload, field::LENGTH) as usize,
        sent: u32_at(payload, field::SENT),
    };
    if stamp.length == payload.len() {
        Ok(stamp)
    } else {
        Err(Fault::Length)
    }
}

fn check_ipv4(packet: &[u8], verify: bool) -> Result<&[u8], Fault> {
    if packet.len() < IPV4_LEN {
        return Err(Fault::Length);
    }
    if packet[9] != PROTOCOL_UDP {
        return Err(Fault::Foreign);
    }
    if packet[0] != 0x45 || u16_at(packet, 6..8) & 0x3fff != 0 {
        return Err(Fault::Header); // options, or a fragment
    }
    if u16_at(packet, 2..4) as usize != packet.len() {
        return Err(Fault::Length);
    }
    if verify && fold(sum(&packet[..IPV4_LEN])) != 0xffff {
        return Err(Fault::HeaderChecksum);
    }
    Ok(&packet[IPV4_LEN..])
}

fn check_ipv6(packet: &[u8]) -> Result<&[u8], Fault> {
    if packet.len() < IPV6_LEN {
        return Err(Fault::Length);
    }
    if packet[6] != PROTOCOL_UDP {
        return Err(Fault::Foreign);
    }
    if u16_at(packet, 4..6) as usize != packet.len() - IPV6_LEN {
        return Err(Fault::Length);
    }
    Ok(&packet[IPV6_LEN..])
}

/// Each step maps states one to one for a given word, and words one to one for a given state: two inputs of one length that differ in one
/// word have different digests. Words go to four states in turn, which a processor advances side by side, and which are folded by the same step.
fn digest(bytes: &[u8]) -> u32 {
    let step = |state: u32, word: u32| (state ^ word).wrapping_mul(0x9e37_79b1).rotate_left(13);
    let seed = 0x811c_9dc5 ^ bytes.len() as u32;
    let mut states = [seed, !seed, seed.rotate_left(8), !seed.rotate_left(8)];
    let mut blocks = bytes.chunks_exact(16);
    for block in &mut blocks {
        for (state, word) in states.iter_mut().zip(block.chunks_exact(4)) {
            *state = step(*state, u32_at(word, 0..4));
        }
    }
    let mut state = states.into_iter().fold(seed, step);
    for word in blocks.remainder().chunks(4) {
        let mut last = [0; 4];
        last[..word.len()].copy_from_slice(word);
        state = step(state, u32::from_be_bytes(last));
    }
    state
}

/// The internet checksum's sum (RFC 1071), not folded.
fn sum(bytes: &[u8]) -> u64 {
    let mut words = bytes.chunks_exact(2);
    let sum: u64 = words.by_ref().map(|word| u64::from(u16_at(word, 0..2))).sum();
    sum + words.remainder().first().map_or(0, |&byte| u64::from(byte) << 8)
}

fn fold(mut sum: u64) -> u16 {
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

fn u16_at(bytes: &[u8], at: Range<usize>) -> u16 {
    let mut value = [0; 2];
    value.copy_from_slice(&bytes[at]);
    u16::from_be_bytes(value)
}

fn u32_at(bytes: &[u8], at: Range<usize>) -> u32 {
    let mut value = [0; 4];
    value.copy_from_slice(&bytes[at]);
    u32::from_be_bytes(value)
}

#[cfg(test)]
mod tests {
    use super::*;
    use etherparse::{PacketHeaders, TransportHeader};
    use proptest::prelude::*;

    const TAP: Framing = Framing {
        ethernet: Some(Ethernet {
            source: [2, 0, 0, 0, 0, 1],
            target: [2, 0, 0, 0, 0, 2],
        }),
        ..Framing::NONE
    };

    fn framing() -> impl Strategy<Value = Framing> {
        (
            any::<bool>(),
            prop_oneof![Just(0usize), Just(10), Just(12), Just(24)],
            any::<bool>(),
        )
            .prop_map(|(packet_info, vnet_header, tap)| Framing {
                packet_info,
                vnet_header,
                ethernet: TAP.ethernet.filter(|_| tap),
            })
    }

    fn packets() -> impl Strategy<Value = (Spec, usize, u32, u64)> {
        (
            any::<bool>(),
            framing(),
            any::<u16>(),
            0usize..1600,
            any::<u32>(),
            any::<u64>(),
        )
            .prop_map(|(v4, framing, flow, extra, sequence, now)| {
                let (source, target, least) = if v4 {
                    ("10.0.0.2:4000", "198.18.3.4:5000", MIN_IPV4)
                } else {
                    ("[fd00::2]:4000", "[fd00::1:3]:5000", MIN_IPV6)
                };
                let spec = Spec::new(source.parse().unwrap(), target.parse().unwrap())
                    .flow(flow)
                    .framing(framing);
                (spec, least + extra, sequence, now)
            })
    }

    proptest! {
        #[test]
        fn what_was_built_is_found_again((spec, length, sequence, now) in packets()) {
            let mut buffer = vec![0xee; spec.framing.len() + length + 1];
            let total = spec.build(&mut buffer, length, sequence, now);
            prop_assert_eq!(total, spec.framing.len() + length);
            prop_assert_eq!(buffer[total], 0xee, "nothing behind it is touched");
            let stamp = spec.framing.check(&buffer[..total]).unwrap();
            prop_assert_eq!((stamp.flow, stamp.sequence, stamp.sent), (spec.flow, sequence, now as u32));
            prop_assert_eq!(stamp.age(now + 5), Duration::from_nanos(5));

            // Another reader of the same bytes agrees on headers and checksums.
            let packet = &buffer[spec.framing.len()..total];
            let headers = PacketHeaders::from_ip_slice(packet).unwrap();
            let Some(TransportHeader::Udp(udp)) = headers.transport else { panic!("not UDP") };
            prop_assert_eq!((udp.source_port, udp.destination_port), (spec.source.port(), spec.target.port()));
            let net = headers.net.unwrap();
            let payload = headers.payload.slice();
            let checksum = match &net {
                etherparse::NetHeaders::Ipv4(ip, _) => {
                    prop_assert_eq!(ip.header_checksum, ip.calc_header_checksum());
                    udp.calc_checksum_ipv4(ip, payload).unwrap()
                }
                etherparse::NetHeaders::Ipv6(ip, _) => udp.calc_checksum_ipv6(ip, payload).unwrap(),
                _ => panic!("not IP"),
            };
            prop_assert_eq!(udp.checksum, checksum);
            prop_assert_eq!(check_payload(payload), Ok(stamp));
            prop_assert_eq!(read_stamp(payload), Ok(stamp));
            prop_assert_eq!(spec.framing.check_unverified(&buffer[..total]), Ok(stamp));
        }

        #[test]
        fn one_changed_byte_of_the_payload_is_found((spec, length, sequence, now) in packets(), at in any::<prop::sample::Index>(), change in 1u8..) {
            let mut buffer = vec![0; spec.framing.len() + length];
            let total = spec.build(&mut buffer, length, sequence, now);
            let payload = if spec.source.is_ipv4() { IPV4_LEN } else { IPV6_LEN } + UDP_LEN + spec.framing.len();
            buffer[payload + at.index(total - payload)] ^= change;
            prop_assert!(matches!(spec.framing.check(&buffer), Err(Fault::Corrupted | Fault::Length)));
        }

        #[test]
        fn a_cut_or_padded_packet_is_found((spec, length, sequence, now) in packets(), at in any::<prop::sample::Index>()) {
            let mut buffer = vec![0; spec.framing.len() + length + 1];
            let total = spec.build(&mut buffer, length, sequence, now);
            prop_assert_eq!(spec.framing.check(&buffer[..at.index(total)]), Err(Fault::Length));
            prop_assert_eq!(spec.framing.check(&buffer), Err(Fault::Length));
            prop_assert_eq!(spec.framing.check_unverified(&buffer[..at.index(total)]), Err(Fault::Length));
            prop_assert_eq!(spec.framing.check_unverified(&buffer), Err(Fault::Length));
            // The same of payloads that a socket cut.
            let payload = if spec.source.is_ipv4() { IPV4_LEN } else { IPV6_LEN } + UDP_LEN + spec.framing.len();
            prop_assert_eq!(check_payload(&buffer[payload..payload + at.index(total - payload)]), Err(Fault::Length));
        }

        #[test]
        fn any_bytes_are_refused_or_right(bytes in prop::collection::vec(any::<u8>(), 0..200), framing in framing()) {
            // Must not panic; that random bytes carry a right stamp is not to be expected.
            prop_assert!(framing.check(&bytes).is_err());
            prop_assert!(check_payload(&bytes).is_err());
            let _ = (framing.check_unverified(&bytes), read_stamp(&bytes));
        }
    }

    #[test]
    fn every_byte_of_a_packet_counts() {
        let spec = Spec::new("10.0.0.2:4000".parse().unwrap(), "10.0.0.1:5000".parse().unwrap());
        let mut buffer = [0; 64];
        spec.build(&mut buffer, 64, 1, 2);
        let udp = IPV4_LEN..IPV4_LEN + UDP_LEN;
        for at in 0..64 {
            // Ports and UDP checksum are not verified here, and all of the rest is.
            if udp.contains(&at) && !(IPV4_LEN + 4..IPV4_LEN + 6).contains(&at) {
                continue;
            }
            for change in 1..=255u8 {
                let mut changed = buffer;
                changed[at] ^= change;
                assert!(Framing::NONE.check(&changed).is_err(), "byte {at} changed by {change}");
            }
        }
        // Two swapped words of the pattern, which a plain sum would not see.
        let mut swapped = buffer;
        swapped[44..52].rotate_left(4);
        assert_eq!(Framing::NONE.check(&swapped), Err(Fault::Corrupted));
        assert!(Framing::NONE.check_unverified(&swapped).is_ok());
    }

    #[test]
    fn strangers_are_told_from_damage() {
        assert_eq!(TAP.check(&[0; 60]), Err(Fault::Foreign));
        let mut icmp = [0; 64];
        icmp[0] = 0x60;
        icmp[6] = 58;
        assert_eq!(Framing::NONE.check(&icmp), Err(Fault::Foreign));
    }
}
