//! Merging runs of packets of a flow into superpackets, by the rules of the kernel's GRO.
//!
//! [`GroTable::coalesce`] looks at the packets of a batch and says which of them belong together. It moves nothing: a [`Group`] names packets and
//! where their payloads lie, and writes the headers of the superpacket where it is told to, so that all of it goes by one gathered write.
//!
//! # What merges
//!
//! TCP and UDP over IPv4 and IPv6. A packet joins the run of its flow if it is what would come next out of cutting the superpacket again:
//!
//! | compared | rule | kernel source |
//! |---|---|---|
//! | addresses, ports, IPv6 extension headers, flow label | equal | `inet_gro_receive`, `ipv6_gro_receive` |
//! | TTL or hop limit, TOS or traffic class, DF | equal | `inet_gro_flush`, `ipv6_gro_flush` |
//! | IPv4 identification | counts up; with DF it may stay the same | `inet_gro_flush` |
//! | IPv4 header checksum | right | `inet_gro_receive` |
//! | TCP sequence number | follows | `tcp_gro_receive` |
//! | TCP acknowledgement, window, options, flags but FIN and PSH | equal | `tcp_gro_receive` |
//! | TCP urgent pointer, although URG is not set | equal | none: it is taken from the first |
//! | TCP FIN, PSH, a shorter payload | ends the run, and is in it | `tcp_gro_receive` |
//! | TCP SYN, RST, URG, no payload | alone | `tcp_gro_receive` |
//! | TCP CWR | alone | below |
//! | TCP payload below 8 bytes | begins no run, may end one | below |
//! | UDP payload | equal length; a shorter one ends the run, and is in it; none: alone | `udp_gro_receive_segment` |
//! | TCP or UDP checksum | right ([`Limits::verify`]); none: alone | `skb_gro_checksum_validate` |
//! | IPv4 options, fragments | alone | `inet_gro_receive` |
//! | IPv6 extension headers before TCP | alone | below |
//! | length of the superpacket, number of its segments | [`Limits`] | `skb_gro_receive` |
//!
//! So a packet with a wrong checksum stays as wrong as it was. UDP without a checksum (IPv4) goes alone, because a superpacket has no way to say that
//! its segments have none. A checksum of TCP or of an IPv4 header written as 0xFFFF comes out of cutting as 0, which is the same number (RFC 1071).
//! Where the identification stays the same, cutting the superpacket again makes it count up, which with DF nobody minds (RFC 6864). What lies behind a
//! packet's end by IP's own length is left out.
//!
//! CWR means two things. For classic ECN (RFC 3168) it is said once, and may stand for a whole run; for accurate ECN (RFC 9768) it is a digit of a
//! counter, which a receiver of the superpacket would read wrong if packets with and without were one. The driver's header knows the former only, so
//! such packets are left alone. Kernels before 6.15 merged what followed.
//!
//! # Where the kernel does otherwise
//!
//! Held against Linux 6.18 by `tests/oracle.rs`, batch by batch. None of it changes what the library's packets are once they are cut:
//!
//! | what | the kernel | here |
//! |---|---|---|
//! | wrong or no checksum, IPv4 options, fragments | goes by at once, before what is held of its flow | ends the run |
//! | UDP without payload, or whose length is not IP's | the same | ends the run |
//! | another flow label or other IPv6 extension headers | another flow, with a run of its own beside | ends the run |
//! | IPv4 identification stays, without DF | merges since 6.18, and cuts UDP to other numbers | alone |
//! | IPv4 reserved bit | alone | equal |
//! | padding behind the packet | looked at before it is cut off: ends TCP's run, goes by with UDP | left out |
//! | TCP urgent pointer without URG | that of the first packet in all | ends the run where it differs |
//! | TCP CWR | merges if on all; cut again before a TUN device, whose header cannot say it | alone |
//! | IPv6 extension headers before TCP | merges; 6.12.117 then drops it where it is forwarded (`qdisc_pkt_len_init`) | alone |
//! | TCP payload below 8 bytes | merges; newer kernels then cut to 8 ([`GsoType::size_min`]) | begins no run |
//! | many flows | eight runs per hash (`MAX_GRO_SKBS`); one more drives out the oldest | all of the batch |
//! | many segments | 64 of UDP, any number of TCP | [`Limits::segments`] of either |
//! | order of different flows | runs that ended, then those that were held | that of their first packets |
//!
//! # How far it sees
//!
//! Packets join within one batch of at most the table's capacity. A port's sender
//! ([`Worker::send_many`](crate::Worker::send_many)) looks at 128 packets at a time: two packets of
//! a flow with more than that between them in a batch go apart, and no run goes on from one window
//! to the next.
//!
//! # Order
//!
//! Groups come in the order of their first packets. No packet overtakes another of its flow: what does not join ends the flow's run. A packet
//! whose ports cannot be seen (a fragment) ends all runs between its two addresses, and one whose headers contradict themselves ends all there are.
//!
//! # Cost
//!
//! Nothing is allocated after [`GroTable::new`]. A packet is hashed and compared; its checksum is looked at only if all else fits.
//!
//! ```
//! use tun_driver::offload::{GroTable, Limits, Link, coalesce::HEADERS_MAX};
//!
//! # fn write(_: &[std::io::IoSlice<'_>]) {}
//! fn send(table: &mut GroTable, packets: &[Vec<u8>]) {
//!     for group in table.coalesce(packets, Link::None) {
//!         let mut headers = [0; HEADERS_MAX];
//!         match group.headers(packets, &mut headers) {
//!             // One packet, as it is.
//!             None => write(&[std::io::IoSlice::new(&packets[group.first()])]),
//!             Some((vnet, headers)) => {
//!                 let vnet = vnet.to_bytes();
//!                 let mut parts = vec![std::io::IoSlice::new(&vnet), std::io::IoSlice::new(headers)];
//!                 parts.extend(group.parts().map(|(index, payload)| std::io::IoSlice::new(&packets[index][payload])));
//!                 write(&parts);
//!             }
//!         }
//!     }
//! }
//! # let _ = send;
//! ```

use std::ops::{Deref, Range};

use super::checksum::{pseudo_header, sum};
use super::headers::{HeaderFault, Headers, Link, TCP, UDP, Version};
use super::vnet::{Gso, GsoType, VnetHdr};

pub use super::split::HEADERS_MAX;

/// What may become of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Segments of one superpacket. Kernels before 6.9 take 64 datagrams of UDP, later ones 128, and refuse more (EINVAL); of TCP any number.
    pub segments: usize,
    /// Bytes of a superpacket from its IP header on, at most 65,535.
    pub bytes: usize,
    /// Whether TCP is merged.
    pub tcp: bool,
    /// Whether UDP is merged.
    pub udp: bool,
    /// Whether TCP and UDP checksums are looked at. Without, a wrong one in the middle of a run is replaced by a right one: only for packets whose
    /// integrity is known by other means.
    pub verify: bool,
}

/// What is known of a packet beforehand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trust {
    /// Nothing.
    None,
    /// Its TCP or UDP checksum is right, or its field holds the sum over the pseudo-header and is to be finished: not looked at.
    Whole,
    /// It goes alone, as a superpacket does, and ends its flow's run.
    Alone,
}

/// Finds runs in batches of packets.
#[derive(Debug)]
pub struct GroTable {
    limits: Limits,
    /// In the order of their first packets.
    runs: Vec<Run>,
    /// Of each packet: its payload, and the next one of its run.
    parts: Vec<Part>,
    /// The last run of a flow, by the flow's hash; 0 for none.
    slots: Vec<u32>,
    capacity: usize,
}

/// Packets that go together: one that goes alone, or a superpacket.
#[derive(Clone, Copy, Debug)]
pub struct Group<'a> {
    run: &'a Run,
    parts: &'a [Part],
}

#[derive(Clone, Copy, Debug)]
struct Part {
    start: u32,
    end: u32,
    next: u32,
}

#[derive(Clone, Debug)]
struct Run {
    first: u32,
    last: u32,
    count: u32,
    /// Payload of its packets together.
    payload: usize,
    /// Payload of its first packet.
    size: usize,
    /// Of its first packet, if it may be joined at all or seals others.
    headers: Option<Headers>,
    /// More may join.
    open: bool,
    /// The checksum of its first packet is known to be right.
    whole: bool,
    /// The checksums of its first packet were found right.
    verified: bool,
    /// Its packets have all the same IPv4 identification.
    same_identification: bool,
    /// FIN and PSH of its last packet.
    last_flags: u8,
}

const NONE: u32 = u32::MAX;

const FIN: u8 = 0x01;
const SYN: u8 = 0x02;
const RST: u8 = 0x04;
const PSH: u8 = 0x08;
const URG: u8 = 0x20;
const CWR: u8 = 0x80;

/// Flags of TCP with which a packet goes alone.
const ALONE: u8 = SYN | RST | URG | CWR;

impl Default for Limits {
    /// 64 segments, 65,535 bytes, TCP and UDP, verified.
    fn default() -> Self {
        Self {
            segments: 64,
            bytes: 65_535,
            tcp: true,
            udp: true,
            verify: true,
        }
    }
}

impl GroTable {
    /// A table for batches of up to `capacity` packets.
    ///
    /// # Panics
    /// If `capacity` is 0 or above 65,536.
    pub fn new(capacity: usize, limits: Limits) -> Self {
        assert!((1..=65_536).contains(&capacity), "a table for {capacity} packets");
        Self {
            limits,
            runs: Vec::with_capacity(capacity),
            parts: Vec::with_capacity(capacity),
            slots: vec![0; (2 * capacity).next_power_of_two()],
            capacity,
        }
    }

    /// What merges from now on.
    pub fn set_limits(&mut self, limits: Limits) {
        self.limits = limits;
    }

    /// Groups the packets of a batch. Each is in exactly one group; packets behind the table's capacity are in none, and are for the next call.
    pub fn coalesce<P: Deref<Target = [u8]>>(
        &mut self,
        packets: &[P],
        link: Link,
    ) -> impl ExactSizeIterator<Item = Group<'_>> + use<'_, P> {
        self.coalesce_trusting(packets, link, |_| Trust::None)
    }

    /// The same, with what is known of each packet by its place in the batch.
    pub fn coalesce_trusting<P: Deref<Target = [u8]>, F: Fn(usize) -> Trust>(
        &mut self,
        packets: &[P],
        link: Link,
        trust: F,
    ) -> impl ExactSizeIterator<Item = Group<'_>> + use<'_, P, F> {
        let packets = &packets[..packets.len().min(self.capacity)];
        self.runs.clear();
        self.parts.clear();
        // No more slots than the batch needs, so that a short one is cheap.
        let slots = (2 * packets.len()).next_power_of_two().min(self.slots.len());
        self.slots[..slots].fill(0);
        for index in 0..packets.len() {
            self.add(packets, index, link, slots - 1, trust(index));
        }
        let parts = &self.parts[..];
        self.runs.iter().map(move |run| Group { run, parts })
    }

    /// Finds the place of one packet.
    #[inline]
    fn add<P: Deref<Target = [u8]>>(&mut self, packets: &[P], index: usize, link: Link, mask: usize, trust: Trust) {
        let packet = &*packets[index];
        let headers = match Headers::parse(packet, link) {
            Ok(headers) => headers,
            Err(fault) => {
                // Of which flow it is cannot be seen; of none, if it is not even IP.
                if fault != HeaderFault::NotIp {
                    self.runs.iter_mut().for_each(|run| run.open = false);
                }
                return self.start(index, 0..packet.len(), None, false, 0, trust);
            }
        };
        let payload = headers.payload..headers.end;
        if headers.fragment {
            self.seal_between(packets, packet, &headers);
            return self.start(index, payload, None, false, 0, trust);
        }
        let merges = match headers.protocol {
            TCP => self.limits.tcp,
            UDP => self.limits.udp,
            _ => false,
        };
        if !merges {
            return self.start(index, payload, None, false, 0, trust);
        }
        let (open, flags) = can_begin(packet, &headers, &payload);
        let (slot, run) = self.find(packets, packet, &headers, mask);
        if let Some(run) = run {
            if trust != Trust::Alone && self.joins(packets, run, index, &headers, &payload, flags, trust) {
                let ends = payload.len() < self.runs[run].size || flags & (FIN | PSH) != 0;
                let run = &mut self.runs[run];
                self.parts[run.last as usize].next = index as u32;
                run.last = index as u32;
                run.count += 1;
                run.payload += payload.len();
                run.last_flags = flags & (FIN | PSH);
                run.open = !ends;
                self.parts.push(Part {
                    start: payload.start as u32,
                    end: payload.end as u32,
                    next: NONE,
                });
                return;
            }
            self.runs[run].open = false;
        }
        self.slots[slot] = self.runs.len() as u32 + 1;
        self.start(
            index,
            payload,
            Some(headers),
            open && trust != Trust::Alone,
            flags & (FIN | PSH),
            trust,
        );
    }

    fn start(
        &mut self,
        index: usize,
        payload: Range<usize>,
        headers: Option<Headers>,
        open: bool,
        last_flags: u8,
        trust: Trust,
    ) {
        self.runs.push(Run {
            first: index as u32,
            last: index as u32,
            count: 1,
            payload: payload.len(),
            size: payload.len(),
            headers,
            open,
            whole: trust == Trust::Whole,
            verified: false,
            same_identification: false,
            last_flags,
        });
        self.parts.push(Part {
            start: payload.start as u32,
            end: payload.end as u32,
            next: NONE,
        });
    }

    /// The slot of a packet's flow, and its last run.
    #[inline]
    fn find<P: Deref<Target = [u8]>>(
        &self,
        packets: &[P],
        packet: &[u8],
        headers: &Headers,
        mask: usize,
    ) -> (usize, Option<usize>) {
        let mut slot = hash(packet, headers) as usize & mask;
        // Ends: at least half of the slots are free.
        loop {
            let Some(run) = (self.slots[slot] as usize).checked_sub(1) else {
                return (slot, None);
            };
            let other = &self.runs[run];
            if let Some(theirs) = &other.headers
                && same_flow(packet, headers, &packets[other.first as usize], theirs)
            {
                return (slot, Some(run));
            }
            slot = (slot + 1) & mask;
        }
    }

    /// Whether a packet of the run's flow is what comes next in it.
    #[expect(clippy::too_many_arguments, reason = "what is known of one packet")]
    #[inline]
    fn joins<P: Deref<Target = [u8]>>(
        &mut self,
        packets: &[P],
        run: usize,
        index: usize,
        headers: &Headers,
        payload: &Range<usize>,
        flags: u8,
        trust: Trust,
    ) -> bool {
        let run = &mut self.runs[run];
        let (packet, first) = (&*packets[index], &*packets[run.first as usize]);
        let Some(theirs) = run.headers.filter(|_| run.open) else {
            return false;
        };
        let bytes = headers.payload - headers.network + run.payload + payload.len();
        if run.count as usize >= self.limits.segments || bytes > self.limits.bytes.min(65_535) {
            return false;
        }
        if payload.is_empty() || payload.len() > run.size || goes_alone(headers) {
            return false;
        }
        let Some(same_identification) = network_follows(packet, headers, first, &theirs, run) else {
            return false;
        };
        if headers.protocol == TCP && (flags & ALONE != 0 || !tcp_follows(packet, headers, first, &theirs, run)) {
            return false;
        }
        if headers.protocol == UDP && !(udp_is_sound(packet, headers) && udp_is_sound(first, &theirs)) {
            return false;
        }
        // The first one is looked at when it is worth it.
        if !run.verified {
            let whole =
                has_sound_header(first, &theirs) && (!self.limits.verify || run.whole || is_whole(first, &theirs));
            if !whole {
                run.open = false;
                return false;
            }
            run.verified = true;
        }
        if self.limits.verify && trust != Trust::Whole && !is_whole(packet, headers) {
            return false;
        }
        run.same_identification = same_identification;
        true
    }

    /// Ends all runs between the addresses of a packet.
    #[cold]
    fn seal_between<P: Deref<Target = [u8]>>(&mut self, packets: &[P], packet: &[u8], headers: &Headers) {
        for run in self.runs.iter_mut().filter(|run| run.open) {
            if let Some(theirs) = &run.headers {
                run.open = theirs.addresses(&packets[run.first as usize]) != headers.addresses(packet);
            }
        }
    }
}

impl<'a> Group<'a> {
    /// The place of its first packet in the batch.
    pub fn first(&self) -> usize {
        self.run.first as usize
    }

    /// How many packets it has.
    #[expect(clippy::len_without_is_empty, reason = "there is always one")]
    pub fn len(&self) -> usize {
        self.run.count as usize
    }

    /// Its packets in order: the place in the batch, and where the payload of TCP or UDP lies in the packet. For one that goes alone, and is of
    /// another protocol, the payload says nothing.
    pub fn parts(&self) -> impl Iterator<Item = (usize, Range<usize>)> + use<'a> {
        let parts = self.parts;
        let mut next = self.run.first;
        std::iter::from_fn(move || {
            let part = parts.get(next as usize)?;
            let index = std::mem::replace(&mut next, part.next);
            Some((index as usize, part.start as usize..part.end as usize))
        })
    }

    /// Writes the headers of the superpacket, and returns what the driver is to be told of it. `None` if there is one packet only, which goes as it
    /// is. `packets` is the batch that was grouped.
    pub fn headers<'h, P: Deref<Target = [u8]>>(
        &self,
        packets: &[P],
        to: &'h mut [u8; HEADERS_MAX],
    ) -> Option<(VnetHdr, &'h [u8])> {
        let run = self.run;
        if run.count < 2 {
            return None;
        }
        let headers = run.headers?;
        let first = packets.get(run.first as usize)?;
        let to = to.get_mut(..headers.payload)?;
        to.copy_from_slice(first.get(..headers.payload)?);
        let end = headers.payload + run.payload;
        let behind = |from: usize| (end - from) as u16;
        let network = &mut to[headers.network..headers.transport];
        match headers.version {
            Version::V4 => {
                network[2..4].copy_from_slice(&behind(headers.network).to_be_bytes());
                network[10..12].fill(0);
                let checksum = sum(network).checksum();
                network[10..12].copy_from_slice(&checksum);
            }
            Version::V6 => network[4..6].copy_from_slice(&behind(headers.network + 40).to_be_bytes()),
        }
        let (source, target) = headers.addresses(first)?;
        let length = behind(headers.transport);
        let seed = pseudo_header(source, target, headers.protocol, length.into()).seed();
        let transport = &mut to[headers.transport..];
        let kind = if headers.protocol == UDP {
            transport[4..6].copy_from_slice(&length.to_be_bytes());
            GsoType::Udp
        } else {
            transport[13] |= run.last_flags;
            match headers.version {
                Version::V4 => GsoType::Tcp4,
                Version::V6 => GsoType::Tcp6,
            }
        };
        let field = kind.checksum_offset();
        transport[field..field + 2].copy_from_slice(&seed);
        let gso = Gso {
            kind,
            size: run.size as u16,
            ecn: false, // CWR goes alone
            headers: Headers { end, ..headers },
        };
        Some((VnetHdr::of(&gso), to))
    }
}

/// Whether its network headers keep a packet out of every run.
#[inline]
fn goes_alone(headers: &Headers) -> bool {
    headers.options && (headers.version == Version::V4 || headers.protocol == TCP)
}

/// Whether a packet may be the first of a run; and its TCP flags.
#[inline]
fn can_begin(packet: &[u8], headers: &Headers, payload: &Range<usize>) -> (bool, u8) {
    let flags = match headers.protocol {
        TCP => packet[headers.transport + 13],
        _ => 0,
    };
    let least = if headers.protocol == TCP {
        GsoType::Tcp4.size_min()
    } else {
        1
    };
    let open = payload.len() >= usize::from(least)
        && flags & (FIN | PSH | ALONE) == 0
        && !goes_alone(headers)
        && headers.payload <= HEADERS_MAX;
    (open, flags)
}

/// Addresses, ports and protocol.
#[inline]
fn same_flow(packet: &[u8], headers: &Headers, first: &[u8], theirs: &Headers) -> bool {
    let ports = |packet: &[u8], headers: &Headers| packet.get(headers.transport..headers.transport + 4).map(word);
    headers.version == theirs.version
        && headers.protocol == theirs.protocol
        && ports(packet, headers) == ports(first, theirs)
        && headers.addresses(packet) == theirs.addresses(first)
}

/// Whether the IP header is that of the next packet of a run. Says whether the IPv4 identification stays the same from now on.
#[inline]
fn network_follows(packet: &[u8], headers: &Headers, first: &[u8], theirs: &Headers, run: &Run) -> Option<bool> {
    // The same link header, and as many bytes of each other.
    if (headers.network, headers.transport, headers.payload) != (theirs.network, theirs.transport, theirs.payload) {
        return None;
    }
    let (ours, old) = (
        packet.get(headers.network..headers.transport)?,
        first.get(headers.network..headers.transport)?,
    );
    if packet.get(..headers.network)? != first.get(..headers.network)? {
        return None;
    }
    match headers.version {
        Version::V4 => {
            // TOS, fragment field with DF, TTL; the protocol is the flow's.
            if ours[1] != old[1] || ours[6..9] != old[6..9] || !sum(ours).is_whole() {
                return None;
            }
            let identification = |header: &[u8]| u16::from_be_bytes([header[4], header[5]]);
            let ahead = identification(ours).wrapping_sub(identification(old));
            let keeps = ours[6] & 0x40 != 0;
            match (run.count, run.same_identification) {
                (1, _) if ahead == 0 && keeps => Some(true),
                (_, true) => (ahead == 0).then_some(true),
                (count, false) => (u32::from(ahead) == count).then_some(false),
            }
        }
        Version::V6 => {
            // Traffic class and flow label, hop limit, extension headers.
            (ours[..4] == old[..4] && ours[6..8] == old[6..8] && ours[40..] == old[40..]).then_some(false)
        }
    }
}

/// Whether the TCP header is that of the next packet of a run.
#[inline]
fn tcp_follows(packet: &[u8], headers: &Headers, first: &[u8], theirs: &Headers, run: &Run) -> bool {
    let (Some(ours), Some(old)) = (
        packet.get(headers.transport..headers.payload),
        first.get(theirs.transport..theirs.payload),
    ) else {
        return false;
    };
    let sequence = |header: &[u8]| word(&header[4..8]);
    ours.len() == old.len()
        && sequence(ours) == sequence(old).wrapping_add(run.payload as u32)
        && ours[8..13] == old[8..13]
        && (ours[13] ^ old[13]) & !(FIN | PSH) == 0
        && ours[14..16] == old[14..16]
        && ours[18..] == old[18..]
}

/// Whether UDP's own length is that of the packet, and there is a checksum.
#[inline]
fn udp_is_sound(packet: &[u8], headers: &Headers) -> bool {
    packet
        .get(headers.transport..headers.end)
        .and_then(<[u8]>::first_chunk::<8>)
        .is_some_and(|udp| {
            let length = u16::from_be_bytes([udp[4], udp[5]]);
            usize::from(length) == headers.end - headers.transport && udp[6..] != [0, 0]
        })
}

/// Whether the IPv4 header's checksum is right.
#[inline]
fn has_sound_header(packet: &[u8], headers: &Headers) -> bool {
    headers.version == Version::V6
        || packet
            .get(headers.network..headers.transport)
            .is_some_and(|header| sum(header).is_whole())
}

/// Whether the checksum of TCP or UDP is right.
#[inline]
fn is_whole(packet: &[u8], headers: &Headers) -> bool {
    let (Some((source, target)), Some(segment)) =
        (headers.addresses(packet), packet.get(headers.transport..headers.end))
    else {
        return false;
    };
    let pseudo = pseudo_header(source, target, headers.protocol, segment.len() as u32);
    (pseudo + sum(segment)).is_whole()
}

/// Of a packet's flow.
#[inline]
fn hash(packet: &[u8], headers: &Headers) -> u32 {
    let Some((source, target)) = headers.addresses(packet) else {
        return 0;
    };
    let ports = packet.get(headers.transport..headers.transport + 4).map_or(0, word);
    // Different multipliers, so that swapped ends and neighbours do not meet.
    let mut hash = u64::from(ports).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    for (source, target) in source.chunks_exact(4).zip(target.chunks_exact(4)) {
        hash = (hash ^ u64::from(word(source))).wrapping_mul(0xff51_afd7_ed55_8ccd);
        hash = (hash ^ u64::from(word(target)).rotate_left(32)).wrapping_mul(0xc4ce_b9fe_1a85_ec53);
    }
    (hash >> 32) as u32
}

#[inline]
fn word(bytes: &[u8]) -> u32 {
    bytes.first_chunk::<4>().map_or(0, |bytes| u32::from_be_bytes(*bytes))
}
