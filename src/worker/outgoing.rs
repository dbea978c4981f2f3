//! What goes out of a port, the same for both backends: which packets may go as they are, which are merged into superpackets, which are cut.
//!
//! | packet | to a queue with offloads | elsewhere |
//! |---|---|---|
//! | plain | with an empty header; runs of a flow merged, one gathered write each | as it is |
//! | unfinished | with its header | finished |
//! | superpacket | with its header, if granted and not refused before; else cut | cut |
//!
//! The kernel may refuse a superpacket that another one would take. So nothing is written behind one before it was taken (the writes are linked),
//! and a refused one goes again in pieces, in its place.
use std::rc::Rc;

use super::Context;
use super::burst::LONGEST;
use super::port::{Endpoint, Port, Ports, Sent, Weight, judge};
use super::udp;
use crate::buf::{Account, Arena, Batch, PacketBuf, Shape, SizeClass};
use crate::error::PortError;
use crate::offload::checksum::pseudo_header;
use crate::offload::coalesce::HEADERS_MAX;
use crate::offload::headers::{self, Headers};
use crate::offload::{GroTable, Gso, GsoType, Limits, Link, Meta, Offloads, Sum, Trust, VnetHdr, vnet};

/// Packets that are looked at together, for merging.
pub(super) const WINDOW: usize = 128;

/// Refusals of one kind in a row, after which it is not tried again on this port.
const REFUSALS: u32 = 16;

/// Writes of one burst, and what they are made of. Allocated once; the part for gathered writes when the first port with offloads comes.
pub(super) struct Outbox {
    pub(super) writes: Vec<Write>,
    /// Their results, by place: what was written, or an errno below zero.
    pub(super) results: Box<[i32]>,
    /// Places in the batch of the packets of each write, one write after another.
    members: Vec<u8>,
    gather: Option<Box<Gather>>,
    segments: Batch,
}

/// One write: a packet, or several gathered into one.
#[derive(Clone, Copy)]
pub(super) struct Write {
    /// The bytes; of a gathered write, the iovecs.
    pub(super) at: *const u8,
    /// Of the bytes, all together.
    pub(super) len: u32,
    /// How many iovecs; 0: the bytes as they are.
    pub(super) parts: u32,
    /// The registered memory that the bytes lie in.
    pub(super) class: Option<SizeClass>,
    /// The driver's header, if it says that this is a superpacket.
    pub(super) kind: Option<GsoType>,
    /// Of its packets, those that are not of this worker's arena.
    pub(super) foreign: u32,
    /// Packets in it.
    packets: u32,
}

/// What gathered writes are made of.
struct Gather {
    table: GroTable,
    /// The driver's header and the superpacket's, one for each write.
    headers: [[u8; VnetHdr::LEN + HEADERS_MAX]; LONGEST as usize],
    parts: Vec<libc::iovec>,
}

/// Performs writes on a queue.
pub(super) trait Writer {
    /// Why nothing can be written now, or any more.
    fn fault(&mut self, cx: &Context) -> Option<PortError>;

    /// Performs all writes of the outbox in order, and puts down their results. What is behind one that stands in the way of others is ECANCELED.
    ///
    /// # Errors
    /// There are no results.
    fn perform(
        &mut self,
        cx: &mut Context,
        ports: &mut Ports,
        index: usize,
        outbox: &mut Outbox,
    ) -> Result<(), Unperformed>;
}

/// Why writes have no results.
pub(super) enum Unperformed {
    /// None of them was begun.
    Refused(PortError),
    /// The kernel may still read what was to be written.
    Lost(PortError),
}

/// What a port of a device with offloads does with superpackets. All on by default.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Superpackets {
    /// Superpackets of TCP are passed on as they are, as far as the device takes them. Without, none is made by merging either.
    pub tso: bool,
    /// The same of UDP.
    pub uso: bool,
    /// Runs of TCP packets are merged, as far as the device takes what comes of it.
    pub merge_tcp: bool,
    /// The same of UDP.
    pub merge_udp: bool,
    /// Checksums are looked at before packets are merged. Without, a wrong one in the middle of a run is replaced by a right one: only for packets
    /// whose integrity is known by other means, such as decryption.
    pub verify: bool,
}

impl Default for Superpackets {
    fn default() -> Self {
        Self {
            tso: true,
            uso: true,
            merge_tcp: true,
            merge_udp: true,
            verify: true,
        }
    }
}

/// What a port does with superpackets.
pub(super) struct OutgoingRules {
    /// A driver's header is in front of each packet.
    pub(super) vnet: bool,
    /// The port is a queue of a device.
    queue: bool,
    pub(super) link: Link,
    /// What the device was granted, and the kernel did not refuse.
    granted: Offloads,
    /// Of that, what is switched on.
    pub(super) pass: Offloads,
    switches: Superpackets,
    /// Something was given up, and nobody told yet.
    pub(super) untold: bool,
    /// Refusals in a row: TCP over IPv4, over IPv6, UDP.
    refusals: [u32; 3],
}

impl OutgoingRules {
    pub(super) fn new(endpoint: &Endpoint) -> Self {
        let (vnet, link, pass) = match endpoint {
            Endpoint::Queue(queue) => {
                let link = match queue.mode() {
                    crate::Mode::Tun => Link::None,
                    crate::Mode::Tap => Link::Ethernet,
                };
                (queue.vnet_hdr(), link, queue.offloads())
            }
            _ => (false, Link::None, Offloads::none()),
        };
        Self {
            vnet,
            queue: matches!(endpoint, Endpoint::Queue(_)),
            link,
            granted: pass,
            pass,
            switches: Superpackets::default(),
            untold: false,
            refusals: [0; 3],
        }
    }

    pub(super) fn passes(&self, kind: GsoType) -> bool {
        self.pass.contains(offload_of(kind))
    }

    /// Whether an unfinished packet's checksum belongs behind its IP header. What goes out of a
    /// socket is a payload, which need not be an IP packet.
    #[inline]
    fn may_finish(&self, packet: &PacketBuf) -> bool {
        match packet.meta() {
            Ok(Meta::Unfinished { start, .. }) => !self.queue || start >= Headers::network_end(packet, self.link),
            _ => false,
        }
    }

    /// What may be merged; `None` for nothing.
    fn limits(&self) -> Option<Limits> {
        if !self.vnet {
            return None;
        }
        let tcp = self.switches.merge_tcp && (self.passes(GsoType::Tcp4) || self.passes(GsoType::Tcp6));
        let udp = self.switches.merge_udp && self.passes(GsoType::Udp);
        (tcp || udp).then(|| Limits {
            tcp,
            udp,
            verify: self.switches.verify,
            ..Limits::default()
        })
    }

    pub(super) fn refused(&mut self, kind: GsoType) {
        let count = &mut self.refusals[kind as usize];
        *count += 1;
        if *count >= REFUSALS {
            self.give_up(kind);
        }
    }

    /// The kernel does not take this kind.
    pub(super) fn give_up(&mut self, kind: GsoType) {
        self.granted = self.granted - offload_of(kind);
        self.untold = true;
        self.set(self.switches);
    }

    pub(super) fn set(&mut self, switches: Superpackets) {
        self.switches = switches;
        self.pass = self.granted;
        if !switches.tso {
            self.pass = self.pass - (Offloads::TSO4 | Offloads::TSO6);
        }
        if !switches.uso {
            self.pass = self.pass - Offloads::USO;
        }
    }

    pub(super) fn switches(&self) -> Superpackets {
        self.switches
    }

    fn taken(&mut self, kind: GsoType) {
        self.refusals[kind as usize] = 0;
    }
}

/// Superpackets that a kernel takes and then drops: their IPv4 header's checksum is wrong, or their IPv6 source is a multicast address. One of each
/// kind, with the driver's header, and for TAP with an Ethernet header whose target no bridge forwards to (IEEE 802.1D, 01:80:C2:00:00:0F).
pub(super) fn probes(link: Link) -> [(GsoType, Vec<u8>); 3] {
    [GsoType::Tcp4, GsoType::Tcp6, GsoType::Udp].map(|kind| {
        const PAYLOAD: usize = 64;
        let (transport, protocol) = if kind == GsoType::Udp {
            (8, headers::UDP)
        } else {
            (20, headers::TCP)
        };
        let length = transport + PAYLOAD;
        let mut packet = Vec::new();
        if link == Link::Ethernet {
            packet.extend([0x01, 0x80, 0xc2, 0, 0, 0x0f, 0x02, 0, 0, 0, 0, 0x01]);
            packet.extend(if kind == GsoType::Tcp6 {
                [0x86, 0xdd]
            } else {
                [0x08, 0x00]
            });
        }
        if kind == GsoType::Tcp6 {
            packet.extend([0x60, 0, 0, 0, 0, length as u8, protocol, 1]);
            // Documentation's multicast and unicast prefixes (RFC 6676, RFC 3849).
            packet.extend([0xff, 0x02, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0x0d, 0xb8, 0, 1]);
            packet.extend([0x20, 0x01, 0x0d, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]);
        } else {
            packet.extend([0x45, 0, 0, (20 + length) as u8, 0, 0, 0x40, 0, 1, protocol, 0xff, 0xff]);
            packet.extend([192, 0, 2, 1, 192, 0, 2, 2]);
        }
        packet.extend([0, 9, 0, 9]);
        if kind == GsoType::Udp {
            packet.extend([0, length as u8, 0, 0]);
        } else {
            packet.extend([0, 0, 0, 0, 0, 0, 0, 0, 0x50, 0x10, 0, 0, 0, 0, 0, 0]);
        }
        packet.resize(packet.len() + PAYLOAD, 0);
        let header = Headers::parse(&packet, link).map_or(VnetHdr::plain(), |headers| {
            VnetHdr::of(&Gso {
                kind,
                size: PAYLOAD as u16 / 2,
                ecn: false,
                headers,
            })
        });
        (kind, [&header.to_bytes()[..], &packet].concat())
    })
}

fn offload_of(kind: GsoType) -> Offloads {
    match kind {
        GsoType::Tcp4 => Offloads::TSO4,
        GsoType::Tcp6 => Offloads::TSO6,
        GsoType::Udp => Offloads::USO,
    }
}

impl Outbox {
    /// Bytes that [`expect_superpackets`](Self::expect_superpackets) takes, roughly: the headers, the iovecs, the table.
    pub(super) const SUPERPACKETS: usize =
        size_of::<Gather>() + (WINDOW + LONGEST as usize) * size_of::<libc::iovec>() + WINDOW * 256;

    pub(super) fn new() -> Self {
        Self {
            writes: Vec::with_capacity(LONGEST as usize),
            results: vec![0; LONGEST as usize].into(),
            members: Vec::with_capacity(WINDOW),
            gather: None,
            segments: Batch::with_capacity(0),
        }
    }

    /// Makes room for what ports need that cut, merge, or put headers in front.
    pub(super) fn expect_superpackets(&mut self) {
        if self.gather.is_none() {
            self.segments = Batch::with_capacity(LONGEST as usize);
            self.gather = Some(Box::new(Gather {
                table: GroTable::new(WINDOW, Limits::default()),
                headers: [[0; VnetHdr::LEN + HEADERS_MAX]; LONGEST as usize],
                // Each write has a header, and each packet is in one.
                parts: Vec::with_capacity(WINDOW + LONGEST as usize),
            }));
        }
    }

    /// The kernel may still read from it.
    fn keep_for_ever(&mut self, batch: &[PacketBuf]) {
        batch.iter().for_each(PacketBuf::keep_for_ever);
        std::mem::forget(self.gather.take());
    }
}

/// What can be done with the front of a batch.
enum Next {
    /// That many packets can go as they are.
    Run(usize),
    /// The first one has to be cut.
    Cut,
    /// The first one contradicts what was said of it.
    Refuse,
}

/// How the last run ended, so that the next one does better.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Again {
    /// No difference.
    Same,
    /// The kernel refused the superpacket that stands in front: cut it.
    Cut,
    /// It refused one of this kind that was merged: send its packets as they are.
    Unmerged(GsoType),
}

/// Sends from the front of the batch.
pub(super) fn send(
    writer: &mut impl Writer,
    outbox: &mut Outbox,
    cx: &mut Context,
    ports: &mut Ports,
    index: usize,
    batch: &mut Batch,
) -> Sent {
    let mut total = Sent::default();
    let mut again = Again::Same;
    if let Endpoint::Handoff(_) = ports.at(index).endpoint {
        return Sent::one_way();
    }
    ports.at(index).sends();
    while !batch.is_empty() && total.stopped.is_none() {
        let port = ports.at(index);
        if let Some(error) = port.gone().or_else(|| writer.fault(cx)) {
            total.stopped = Some(error);
            break;
        }
        match next(&port.outgoing, batch, again == Again::Cut) {
            Next::Run(count) => {
                let refused = match again {
                    Again::Unmerged(kind) => Some(kind),
                    _ => None,
                };
                let merge = refused.is_none();
                let sent = run(writer, outbox, cx, ports, index, batch, count, merge, &mut again);
                outbox.consume(batch, sent.accepted + sent.refused);
                // What is not taken by itself either was refused for another reason.
                if let Some(kind) = refused
                    && sent.accepted > 0
                {
                    ports.at(index).offload_refused(kind);
                }
                total.add(sent);
            }
            Next::Cut => {
                let refused = again == Again::Cut;
                again = Again::Same;
                total.add(cut(writer, outbox, cx, ports, index, batch, refused));
            }
            Next::Refuse => total.add(refuse_front(port, batch)),
        }
    }
    total
}

/// Drops the first packet, which contradicts what was said of it, or cannot be cut.
fn refuse_front(port: &mut Port, batch: &mut Batch) -> Sent {
    port.tally.refuse(libc::EINVAL, 1);
    batch.consume_front(1);
    Sent {
        refused: 1,
        refusal: Some(PortError::from_errno("meta", libc::EINVAL)),
        ..Sent::default()
    }
}

/// Looks at the front of a batch. Finishes checksums where the port does not take unfinished ones.
#[inline]
fn next(rules: &OutgoingRules, batch: &mut [PacketBuf], cut: bool) -> Next {
    let most = batch.len().min(WINDOW);
    for (place, packet) in batch[..most].iter_mut().enumerate() {
        let stop = match packet.shape() {
            Shape::Plain | Shape::Verified => continue,
            Shape::Unfinished { .. }
                if rules.may_finish(packet) && (rules.vnet || packet.finish_checksum().is_ok()) =>
            {
                continue;
            }
            Shape::Gso { kind, torn, .. } => match packet.meta() {
                Ok(Meta::Gso(gso)) => {
                    // One with more headers cannot be cut.
                    let lost = gso.may_be_lost() && gso.headers.payload <= HEADERS_MAX;
                    if rules.vnet && rules.passes(kind) && torn == 0 && !lost && !(cut && place == 0) {
                        continue;
                    }
                    Next::Cut
                }
                _ => Next::Refuse,
            },
            _ => Next::Refuse,
        };
        return if place == 0 { stop } else { Next::Run(place) };
    }
    Next::Run(most)
}

/// Sends up to `count` packets from the front, in one burst. Tells what became of them in the order of the outbox's members.
#[expect(clippy::too_many_arguments, reason = "the parts of a worker, borrowed one by one")]
fn run(
    writer: &mut impl Writer,
    outbox: &mut Outbox,
    cx: &mut Context,
    ports: &mut Ports,
    index: usize,
    batch: &mut [PacketBuf],
    count: usize,
    merge: bool,
    again: &mut Again,
) -> Sent {
    let port = ports.at(index);
    *again = Again::Same;
    outbox.writes.clear();
    outbox.members.clear();
    // What was down is tried with one packet: each that is refused costs as much as one that is taken.
    let count = if port.down { 1 } else { count };
    if port.is_udp() {
        let count = count.min(LONGEST as usize);
        outbox.members.extend(0..count as u8);
        return udp::send(cx, port, &mut batch[..count]);
    }
    let limits = if merge && count > 1 {
        port.outgoing.limits()
    } else {
        None
    };
    match limits {
        Some(limits) => outbox.merge(&cx.arena, &port.outgoing, limits, &mut batch[..count]),
        None => outbox.list(&cx.arena, &port.outgoing, &mut batch[..count.min(LONGEST as usize)]),
    }
    if let Err(unperformed) = writer.perform(cx, ports, index, outbox) {
        let error = match unperformed {
            Unperformed::Refused(error) => error,
            Unperformed::Lost(error) => {
                outbox.keep_for_ever(batch);
                error
            }
        };
        return Sent {
            stopped: Some(error),
            ..Sent::default()
        };
    }
    let port = ports.at(index);
    // A refused superpacket stands in the way of all behind it.
    let results = &outbox.results[..outbox.writes.len()];
    let refused = outbox
        .writes
        .iter()
        .zip(results)
        .position(|(write, &result)| write.kind.is_some() && matches!(-result, libc::EINVAL | libc::EIO))
        // Unless one behind it was taken all the same, as where the kernel took the burst in two
        // parts: then it is refused for good, or the others would go twice.
        .filter(|&place| results[place..].iter().all(|&result| result < 0));
    let writes = &outbox.writes;
    let header = if port.outgoing.vnet { VnetHdr::LEN as u32 } else { 0 };
    let sent = judge(port, "write", &results[..refused.unwrap_or(results.len())], |place| {
        Weight {
            len: writes[place].len,
            bytes: u64::from(writes[place].len - header),
            packets: writes[place].packets,
        }
    });
    // Behind a header of another size than the device's, nothing is a packet. What is none by
    // itself raises no suspicion: a peer that sends such packets must not make this thread ask each
    // time.
    let link = port.outgoing.link;
    let is_suspect = |place: usize| {
        let first = writes[..place]
            .iter()
            .map(|write| write.packets as usize)
            .sum::<usize>();
        let member = outbox.members.get(first);
        member.is_none_or(|&member| !vnet::is_no_packet(&batch[usize::from(member)], link))
    };
    let is_refused = refused.is_some()
        || sent.refusal.is_some_and(|error| error.raw_os_error() == libc::EINVAL)
            && (0..results.len()).any(|place| results[place] == -libc::EINVAL && is_suspect(place));
    let restored = is_refused && port.restore_header();
    for (write, &result) in writes.iter().zip(results) {
        let Some(kind) = write.kind else { continue };
        if result >= 0 {
            port.outgoing.taken(kind);
            port.tally.sent_superpackets.add(1);
            if write.packets > 1 {
                port.tally.merged_packets.add(u64::from(write.packets));
                port.tally.merged_superpackets.add(1);
            }
        }
    }
    if let Some(refused) = refused
        && sent.stopped.is_none()
        // It goes again as it is, now that it can.
        && !restored
    {
        *again = match writes[refused] {
            Write {
                kind: Some(kind),
                packets: 2..,
                ..
            } => Again::Unmerged(kind),
            _ => Again::Cut,
        };
    }
    sent
}

/// Cuts the superpacket in front of the batch and sends its segments. It is one packet of the batch: accepted once all of its segments are, refused
/// if one of them was; where sending stopped, what is left of it stays a superpacket.
fn cut(
    writer: &mut impl Writer,
    outbox: &mut Outbox,
    cx: &mut Context,
    ports: &mut Ports,
    index: usize,
    batch: &mut Batch,
    was_refused: bool,
) -> Sent {
    outbox.expect_superpackets();
    let kind = match batch[0].shape() {
        Shape::Gso { kind, .. } => Some(kind),
        _ => None,
    };
    // What an earlier call said of segments that are gone.
    let torn = match batch[0].torn() {
        0 => None,
        errno => Some(ports.at(index).error("write", errno)),
    };
    let mut total = Sent::default();
    let mut segments = std::mem::replace(&mut outbox.segments, Batch::with_capacity(0));
    while total.stopped.is_none() {
        let front = &mut batch[0];
        let plan = match front.plan() {
            Ok(Some(plan)) => plan,
            // All of it is out.
            Ok(None) => break,
            // More headers than anybody needs; found before anything was sent.
            Err(_) => {
                outbox.segments = segments;
                return refuse_front(ports.at(index), batch);
            }
        };
        let most = plan.count().min(LONGEST as usize);
        while segments.len() < most
            && let Some(mut segment) = front.cut(&plan, segments.len(), Account::NONE)
        {
            segment.copy_addresses(front);
            let _ = segments.push(segment);
        }
        ports.at(index).cutting = true;
        let mut again = Again::Same;
        let sent = if segments.is_empty() {
            // No buffer is free: one at a time, in its place.
            let len = front.lend_first(&plan);
            let sent = run(writer, outbox, cx, ports, index, &mut batch[..1], 1, false, &mut again);
            batch[0].lent_back(len);
            sent
        } else {
            let count = segments.len();
            run(
                writer,
                outbox,
                cx,
                ports,
                index,
                &mut segments,
                count,
                false,
                &mut again,
            )
        };
        let port = ports.at(index);
        port.cutting = false;
        port.tally.cut_segments.add(sent.accepted as u64);
        segments.consume_front(segments.len());
        batch[0].keep_from(&plan, sent.accepted + sent.refused);
        total.add(sent);
    }
    outbox.segments = segments;
    let port = ports.at(index);
    if was_refused
        && total.accepted > 0
        && let Some(kind) = kind
    {
        port.offload_refused(kind);
    }
    let done = !batch[0].is_superpacket();
    let refusal = torn.or(total.refusal);
    if done {
        batch.consume_front(1);
        port.tally.cut_superpackets.add(1);
        match refusal {
            Some(error) => port.tally.refuse(error.raw_os_error(), 1),
            None => port.tally.sent_packets.add(1),
        }
    } else if let Some(error) = refusal {
        batch[0].tear(error.raw_os_error());
    }
    Sent {
        accepted: usize::from(done && refusal.is_none()),
        refused: usize::from(done && refusal.is_some()),
        refusal: refusal.filter(|_| done),
        stopped: total.stopped,
    }
}

impl Outbox {
    /// A write for each packet.
    fn list(&mut self, arena: &Rc<Arena>, rules: &OutgoingRules, batch: &mut [PacketBuf]) {
        self.members.extend(0..batch.len() as u8);
        if !rules.vnet {
            self.writes
                .extend(batch.iter_mut().map(|packet| Write::of(arena, packet)));
            return;
        }
        self.expect_superpackets();
        let Some(gather) = &mut self.gather else { return };
        let Gather { headers, parts, .. } = &mut **gather;
        parts.clear();
        for (packet, scratch) in batch.iter_mut().zip(headers) {
            self.writes.push(Write::with_header(arena, packet, scratch, parts));
        }
    }

    /// As few writes as the packets can be merged into.
    fn merge(&mut self, arena: &Rc<Arena>, rules: &OutgoingRules, limits: Limits, batch: &mut [PacketBuf]) {
        self.expect_superpackets();
        let Some(gather) = &mut self.gather else { return };
        let Gather { table, headers, parts } = &mut **gather;
        parts.clear();
        table.set_limits(limits);
        let trust = |place: usize| {
            let packet = &batch[place];
            match packet.shape() {
                Shape::Plain => Trust::None,
                Shape::Verified => Trust::Whole,
                Shape::Unfinished { .. } if is_of_transport(packet, rules.link) => Trust::Whole,
                _ => Trust::Alone,
            }
        };
        let mut superpacket = [0; HEADERS_MAX];
        'groups: for group in table.coalesce_trusting(batch, rules.link, trust) {
            let Some(scratch) = headers.get_mut(self.writes.len()) else {
                break;
            };
            let merged = group
                .headers(batch, &mut superpacket)
                .and_then(|(header, bytes)| Some((header, header.kind().filter(|&kind| rules.passes(kind))?, bytes)));
            let Some((header, kind, bytes)) = merged else {
                // One, or some of a kind that is not taken: each as it is, further down.
                for (member, _) in group.parts() {
                    if self.writes.len() == LONGEST as usize {
                        break 'groups;
                    }
                    self.members.push(member as u8);
                    self.writes.push(Write::EMPTY);
                }
                continue;
            };
            let (front, first) = (VnetHdr::LEN + bytes.len(), parts.len());
            scratch[..VnetHdr::LEN].copy_from_slice(&header.to_bytes());
            scratch[VnetHdr::LEN..front].copy_from_slice(bytes);
            parts.push(iovec(&scratch[..front]));
            let (mut len, mut foreign) = (front, 0);
            for (member, payload) in group.parts() {
                let payload = &batch[member][payload];
                len += payload.len();
                foreign += u32::from(!batch[member].is_home(arena));
                parts.push(iovec(payload));
                self.members.push(member as u8);
            }
            self.writes.push(Write {
                at: parts[first..].as_ptr().cast(),
                len: len as u32,
                parts: (parts.len() - first) as u32,
                kind: Some(kind),
                foreign,
                packets: group.len() as u32,
                ..Write::EMPTY
            });
        }
        let mut member = 0;
        for (write, scratch) in self.writes.iter_mut().zip(headers) {
            if write.packets == 1 {
                let packet = &mut batch[usize::from(self.members[member])];
                *write = Write::with_header(arena, packet, scratch, parts);
            }
            member += write.packets as usize;
        }
    }

    /// Takes out of the batch what the first `count` members are.
    fn consume(&self, batch: &mut Batch, count: usize) {
        let members = &self.members[..count.min(self.members.len())];
        if members
            .iter()
            .enumerate()
            .all(|(place, &member)| place == usize::from(member))
        {
            return batch.consume_front(members.len());
        }
        let mut marked = [false; WINDOW];
        members.iter().for_each(|&member| marked[usize::from(member)] = true);
        batch.consume_marked(&marked);
    }
}

impl Write {
    const EMPTY: Self = Self {
        at: std::ptr::null(),
        len: 0,
        parts: 0,
        class: None,
        foreign: 0,
        kind: None,
        packets: 1,
    };

    /// A packet as it is.
    #[inline]
    fn of(arena: &Rc<Arena>, packet: &mut PacketBuf) -> Self {
        let home = packet.is_home(arena);
        Self {
            at: packet.as_ptr(),
            len: packet.len() as u32,
            class: home.then(|| packet.class()),
            foreign: u32::from(!home),
            ..Self::EMPTY
        }
    }

    /// A packet behind the driver's header; of two parts where there is no room in front of it.
    #[inline]
    fn with_header(
        arena: &Rc<Arena>,
        packet: &mut PacketBuf,
        scratch: &mut [u8],
        parts: &mut Vec<libc::iovec>,
    ) -> Self {
        let (header, kind) = match packet.meta() {
            Ok(Meta::Unfinished { start, field }) => (VnetHdr::unfinished(start as u16, field as u16), None),
            // The last of several, left over: the kernel drops TCP superpackets of one segment now and then (payload <= size < payload + options).
            Ok(Meta::Gso(gso)) if gso.headers.end - gso.headers.payload <= usize::from(gso.size) => {
                let start = gso.headers.transport;
                let field = start + gso.kind.checksum_offset();
                (VnetHdr::unfinished(start as u16, field as u16), None)
            }
            Ok(Meta::Gso(gso)) => (VnetHdr::of(&gso), Some(gso.kind)),
            // That a checksum was verified is nothing that the driver asks for.
            _ => (VnetHdr::plain(), None),
        };
        let mut write = Self {
            kind,
            ..Self::of(arena, packet)
        };
        write.len += VnetHdr::LEN as u32;
        if let Some(bytes) = packet.with_vnet_hdr(header) {
            write.at = bytes.as_ptr();
            return write;
        }
        let first = parts.len();
        scratch[..VnetHdr::LEN].copy_from_slice(&header.to_bytes());
        parts.push(iovec(&scratch[..VnetHdr::LEN]));
        parts.push(iovec(packet));
        Self {
            at: parts[first..].as_ptr().cast(),
            parts: 2,
            class: None,
            ..write
        }
    }
}

/// Whether what is left to be finished is the packet's own TCP or UDP checksum, and its field holds
/// the sum over the pseudo-header. With another sum there (an address changed, say) the finished
/// checksum would be wrong; merging would make it right.
fn is_of_transport(packet: &PacketBuf, link: Link) -> bool {
    match (packet.meta(), Headers::parse(packet, link)) {
        (Ok(Meta::Unfinished { start, field }), Ok(headers)) => {
            let offset = match headers.protocol {
                headers::TCP => 16,
                headers::UDP => 6,
                _ => return false,
            };
            !headers.fragment
                && (start, field) == (headers.transport, headers.transport + offset)
                && headers.end == packet.len()
                && has_seed(packet, &headers, field)
        }
        _ => false,
    }
}

/// Whether a checksum field holds the sum over the pseudo-header.
fn has_seed(packet: &[u8], headers: &Headers, field: usize) -> bool {
    let (Some((source, target)), Some(&[high, low])) = (
        headers.addresses(packet),
        packet.get(field..).and_then(<[u8]>::first_chunk::<2>),
    ) else {
        return false;
    };
    let length = (headers.end - headers.transport) as u32;
    pseudo_header(source, target, headers.protocol, length) == Sum::of(u16::from_be_bytes([high, low]))
}

fn iovec(bytes: &[u8]) -> libc::iovec {
    libc::iovec {
        iov_base: bytes.as_ptr().cast_mut().cast(),
        iov_len: bytes.len(),
    }
}
