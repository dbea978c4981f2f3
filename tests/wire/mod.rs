//! Packets by the book: written and read without the crate, for the tests and the fuzz targets of `offload`. Words are added up one at a time, and
//! etherparse looks at each packet as well.
#![allow(dead_code, unreachable_pub)] // each user uses its share

use etherparse::{NetSlice, SlicedPacket, TransportSlice};

/// What a packet is made of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shape {
    pub v6: bool,
    pub tcp: bool,
    /// An Ethernet header with as many tags, two at most.
    pub tags: Option<usize>,
    /// IPv4 options, up to 4, or IPv6 destination options, in units of eight bytes.
    pub extra: usize,
    /// TCP options in words, up to 10.
    pub options: usize,
    pub flags: u8,
    /// IPv4 alone.
    pub keep_whole: bool,
    pub identification: u16,
    pub sequence: u32,
    pub ports: [u8; 4],
    pub payload: Vec<u8>,
}

impl Shape {
    pub const PLAIN: Self = Self {
        v6: false,
        tcp: false,
        tags: None,
        extra: 0,
        options: 0,
        flags: 0x10,
        keep_whole: true,
        identification: 0xfffe,
        sequence: 0xffff_ffb0,
        ports: [0x12, 0x34, 0, 80],
        payload: Vec::new(),
    };

    /// Where the IP header begins.
    pub fn network(&self) -> usize {
        self.tags.map_or(0, |tags| 14 + 4 * tags)
    }

    /// Where that of TCP or UDP begins.
    pub fn transport(&self) -> usize {
        self.network() + if self.v6 { 40 } else { 20 } + 8 * self.extra
    }

    /// Bytes of all headers.
    pub fn headers(&self) -> usize {
        self.transport() + if self.tcp { 20 + 4 * self.options } else { 8 }
    }

    /// Where the checksum is, from the transport header's start.
    pub fn offset(&self) -> usize {
        if self.tcp { 16 } else { 6 }
    }

    /// The packet, as it goes over a wire.
    pub fn packet(&self) -> Vec<u8> {
        let mut packet = self.unfinished();
        let field = self.transport() + self.offset();
        let checksum = transport_checksum(
            &packet[self.network()..],
            self.transport() - self.network(),
            field - self.network(),
        );
        packet[field..field + 2].copy_from_slice(&checksum.to_be_bytes());
        packet
    }

    /// The same with the sum over the pseudo-header where the checksum belongs: what a driver takes and gives.
    pub fn seeded(&self) -> Vec<u8> {
        let mut packet = self.unfinished();
        let (network, transport) = (self.network(), self.transport());
        let seed = pseudo(&packet[network..], self.tcp, packet.len() - transport);
        let field = transport + self.offset();
        packet[field..field + 2].copy_from_slice(&seed.to_be_bytes());
        packet
    }

    fn unfinished(&self) -> Vec<u8> {
        let mut packet = Vec::with_capacity(self.headers() + self.payload.len());
        if let Some(tags) = self.tags {
            packet.extend([2; 12]);
            for tag in 0..tags {
                let outer = tag + 1 < tags;
                packet.extend(if outer { [0x88, 0xa8, 0, 9] } else { [0x81, 0, 0x20, 7] });
            }
            packet.extend(if self.v6 { [0x86, 0xdd] } else { [8, 0] });
        }
        let protocol = if self.tcp { 6 } else { 17 };
        let length = self.headers() - self.transport() + self.payload.len();
        if self.v6 {
            packet.extend([0x6a, 0xbc, 0xde, 0xf0]);
            packet.extend(((8 * self.extra + length) as u16).to_be_bytes());
            packet.extend([if self.extra > 0 { 60 } else { protocol }, 63]);
            packet.extend((0..32).map(|byte| 0xfd ^ byte));
            if self.extra > 0 {
                packet.extend([protocol, (self.extra - 1) as u8, 1, (8 * self.extra - 4) as u8]);
                packet.resize(packet.len() + 8 * self.extra - 4, 0);
            }
        } else {
            packet.extend([0x45 + 2 * self.extra as u8, 0x1b]);
            packet.extend(((20 + 8 * self.extra + length) as u16).to_be_bytes());
            packet.extend(self.identification.to_be_bytes());
            packet.extend([if self.keep_whole { 0x40 } else { 0 }, 0, 63, protocol, 0, 0]);
            packet.extend([10, 1, 2, 3, 10, 4, 5, 6]);
            packet.resize(packet.len() + 8 * self.extra, 1);
            let checksum = !sum(0, &packet[self.network()..]);
            packet[self.network() + 10..][..2].copy_from_slice(&checksum.to_be_bytes());
        }
        packet.extend(self.ports);
        if self.tcp {
            packet.extend(self.sequence.to_be_bytes());
            packet.extend([1, 2, 3, 4, (5 + self.options as u8) << 4, self.flags, 9, 9, 0, 0, 0, 0]);
            packet.resize(packet.len() + 4 * self.options, 1);
        } else {
            packet.extend((length as u16).to_be_bytes());
            packet.extend([0, 0]);
        }
        packet.extend(&self.payload);
        packet
    }
}

/// The ones'-complement sum of words, a word at a time.
pub fn sum(start: u16, bytes: &[u8]) -> u16 {
    let (words, rest) = bytes.as_chunks();
    // Fewer than 2³² of them; without a look at overflow, which is slow where each look is recorded.
    let last = rest.first().map_or(0, |&last| u64::from(last) << 8);
    let add = |sum: u64, &word: &[u8; 2]| sum.wrapping_add(u16::from_be_bytes(word).into());
    let mut sum = words.iter().fold(u64::from(start) + last, add);
    while sum > 0xffff {
        sum = (sum >> 16) + (sum & 0xffff);
    }
    sum as u16
}

fn pseudo(ip: &[u8], tcp: bool, length: usize) -> u16 {
    let addresses = if ip[0] >> 4 == 4 { &ip[12..20] } else { &ip[8..40] };
    let protocol = if tcp { 6 } else { 17 };
    let length = (length as u32).to_be_bytes();
    sum(sum(sum(0, addresses), &[0, protocol]), &length)
}

/// What belongs into the field of a packet that begins with its IP header.
pub fn transport_checksum(ip: &[u8], transport: usize, field: usize) -> u16 {
    let tcp = field == transport + 16;
    let without = sum(pseudo(ip, tcp, ip.len() - transport), &ip[transport..field]);
    match !sum(without, &ip[field + 2..]) {
        0 if !tcp => 0xffff,
        checksum => checksum,
    }
}

/// What belongs into the field of an IPv4 header.
pub fn network_checksum(header: &[u8]) -> u16 {
    !sum(sum(0, &header[..10]), &header[12..])
}

/// Where the parts of a packet lie, from its IP header on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Places {
    pub tcp: bool,
    pub transport: usize,
    pub payload: usize,
}

/// Reads a packet of TCP or UDP that begins with its IP header, and is whole: its lengths are that of the bytes, its checksums those that this
/// module computes.
///
/// # Panics
/// If it is not.
pub fn read(ip: &[u8]) -> Places {
    let word = |at: usize| usize::from(u16::from_be_bytes([ip[at], ip[at + 1]]));
    let (transport, protocol) = if ip[0] >> 4 == 4 {
        assert_eq!(word(2), ip.len(), "total length");
        assert_eq!(word(6) & 0x3fff, 0, "a fragment");
        let transport = usize::from(ip[0] & 0xf) * 4;
        assert_eq!(
            word(10),
            usize::from(network_checksum(&ip[..transport])),
            "IPv4 checksum"
        );
        (transport, ip[9])
    } else {
        assert_eq!(ip[0] >> 4, 6, "IP");
        assert_eq!(40 + word(4), ip.len(), "payload length");
        let (mut at, mut next) = (40, ip[6]);
        while next != 6 && next != 17 {
            assert_ne!(next, 44, "a fragment");
            let len = usize::from(ip[at + 1]);
            let len = if next == 51 { 4 * (len + 2) } else { 8 * (len + 1) };
            next = ip[at];
            at += len;
        }
        (at, next)
    };
    let tcp = protocol == 6;
    assert!(tcp || protocol == 17, "protocol {protocol}");
    let field = transport + if tcp { 16 } else { 6 };
    assert_eq!(
        word(field),
        usize::from(transport_checksum(ip, transport, field)),
        "checksum"
    );
    let payload = if tcp {
        transport + usize::from(ip[transport + 12] >> 4) * 4
    } else {
        assert_eq!(word(transport + 4), ip.len() - transport, "UDP length");
        transport + 8
    };
    assert!(payload <= ip.len(), "payload");
    Places {
        tcp,
        transport,
        payload,
    }
}

/// The same by etherparse, which has to find what [`read`] found. Returns false where it cannot say: of some orders of extension headers, and of bits
/// that are reserved, which it does not add up.
pub fn another_reads(ip: &[u8], places: Places) -> bool {
    if ip[0] >> 4 == 4 && ip[6] & 0x80 != 0 || places.tcp && ip[places.transport + 12] & 0x0e != 0 {
        return false;
    }
    let Ok(parsed) = SlicedPacket::from_ip(ip) else {
        return false;
    };
    let four = |bytes: &[u8]| <[u8; 4]>::try_from(bytes).unwrap();
    let sixteen = |bytes: &[u8]| <[u8; 16]>::try_from(bytes).unwrap();
    let v4 = match parsed.net.as_ref().unwrap() {
        NetSlice::Ipv4(ip) => {
            let header = ip.header();
            assert_eq!(header.header_checksum(), header.to_header().calc_header_checksum());
            true
        }
        NetSlice::Ipv6(_) => false,
        NetSlice::Arp(_) => panic!("ARP"),
    };
    let payload = match parsed.transport {
        Some(TransportSlice::Tcp(tcp)) => {
            let header = tcp.to_header();
            let right = if v4 {
                header.calc_checksum_ipv4_raw(four(&ip[12..16]), four(&ip[16..20]), tcp.payload())
            } else {
                header.calc_checksum_ipv6_raw(sixteen(&ip[8..24]), sixteen(&ip[24..40]), tcp.payload())
            };
            assert!(places.tcp && tcp.checksum() == right.unwrap());
            tcp.payload()
        }
        Some(TransportSlice::Udp(udp)) => {
            let header = udp.to_header();
            let right = if v4 {
                header.calc_checksum_ipv4_raw(four(&ip[12..16]), four(&ip[16..20]), udp.payload())
            } else {
                header.calc_checksum_ipv6_raw(sixteen(&ip[8..24]), sixteen(&ip[24..40]), udp.payload())
            };
            assert!(!places.tcp && udp.checksum() == right.unwrap());
            udp.payload()
        }
        // Behind extension headers that it does not know.
        _ => return false,
    };
    assert_eq!(payload, &ip[places.payload..]);
    true
}
