//! The UDP side of a worker, the same for both backends: batches of datagrams by recvmmsg and sendmmsg.
#![allow(unsafe_code)]

use super::Context;
use super::burst::LONGEST;
use super::port::{Port, Sent, Weight, judge};
use crate::buf::{Batch, PacketBuf};
use crate::error::{PortError, PortErrorKind, SocketErrno};
use crate::sys::socket_options::SocketOptions;

/// Reports of earlier datagrams (ICMP) that one receive takes note of before it gives up.
const REPORTS: usize = 8;

/// How often a datagram is sent again after reports of earlier ones: one can come for each datagram
/// that is still on its way.
const ATTEMPTS: usize = 4 * LONGEST as usize;

/// EMSGSIZE in a row that is taken to be about the datagram itself: the first of a batch, and the
/// next ones.
const TOO_LONG: [u64; 2] = [16, 4];

/// Receives what is there, at most the room of the batch. Never blocks.
pub(super) fn receive(cx: &mut Context, port: &mut Port, batch: &mut Batch) {
    let mut reports = 0;
    let wildcard = is_wildcard(port);
    while !batch.is_full() {
        // A call before this one may have found it out.
        let ancillary = wildcard || port.socket.as_ref().is_some_and(|socket| socket.talkative);
        let want = batch.room().min(cx.datagrams.capacity()) as u32;
        // A stack of slots for one call; never more than LONGEST.
        let mut slots = [0u32; LONGEST as usize];
        let count = cx.arena.available(port.account, port.class, want) as usize;
        let mut ready = 0;
        for entry in &mut slots[..count] {
            let Some(slot) = cx.arena.check_out(port.account, port.class) else {
                break;
            };
            *entry = slot;
            ready += 1;
        }
        if ready == 0 {
            port.starved();
            return;
        }
        for (index, &slot) in slots[..ready].iter().enumerate() {
            let at = cx.arena.address(slot, cx.arena.config().data_offset() as u32);
            cx.datagrams.set(index, at, port.read_len as usize - 1, None);
            cx.datagrams.want_peer(index);
            if ancillary {
                cx.datagrams.want_ancillary(index);
            }
        }
        port.tally.system_calls.add(1);
        // SAFETY: each entry points into a slot that was just checked out and is in nobody else's hands.
        let result = unsafe { cx.datagrams.receive(port.fd, ready) };
        let arrived = *result.as_ref().unwrap_or(&0);
        let mut asked = false;
        let (mut packets, mut bytes) = (0, 0);
        let mut coalesced = None;
        for (index, &slot) in slots[..ready].iter().enumerate() {
            if index >= arrived {
                cx.arena.release(slot);
                continue;
            }
            let datagram = cx.datagrams.arrived(index);
            if (datagram.coalesced || datagram.unsaid) && !asked {
                asked = true;
                port.tally.system_calls.add(1);
                coalesced = port.socket.as_ref().and_then(SocketOptions::recheck);
            }
            if datagram.unsaid
                && coalesced.is_none()
                && let Some(socket) = &mut port.socket
            {
                // Another option's. From the next call on there is room, and nothing to ask.
                socket.talkative = true;
                cx.datagrams.expect_ancillary();
            }
            // By the datagram's own word also where the option is off again.
            if coalesced.is_some() || datagram.coalesced {
                // Any of them may be several.
                port.coalesced(1);
                cx.arena.release(slot);
                continue;
            }
            if datagram.truncated {
                port.truncated();
                cx.arena.release(slot);
                continue;
            }
            let mut packet = PacketBuf::whole_slot(&cx.arena, slot, datagram.len as u32);
            packet.set_addresses(datagram.peer, datagram.local.filter(|_| wildcard));
            bytes += datagram.len as u64;
            packets += 1;
            let _ = batch.push(packet);
        }
        port.coalesced(coalesced.unwrap_or(0));
        port.tally.received(packets, bytes);
        match result.map_err(|error| error.raw_os_error().unwrap_or(libc::EIO)) {
            Ok(arrived) if arrived < ready => {
                port.readable = false;
                return;
            }
            Ok(_) => {}
            Err(errno) if reports < REPORTS && is_passing(errno) => {
                reports += 1;
                if errno != libc::EINTR {
                    port.tally.reported.add(errno);
                }
            }
            Err(errno) => {
                port.readable = false;
                if std::mem::take(&mut port.errored) {
                    // What lies there (IP_RECVERR, SO_TIMESTAMPING) would end every wait at once.
                    port.tally.system_calls.add(cx.datagrams.clear_errors(port.fd));
                }
                port.failed("recvmmsg", errno);
                if port.shut && errno == libc::EAGAIN {
                    // It stays readable, so that every wait would end at once: it cannot be waited
                    // for any more.
                    port.set_gone(PortError::new(PortErrorKind::Gone, "shutdown", libc::ESHUTDOWN));
                }
                return;
            }
        }
    }
    port.more = true;
}

/// Sends the packets, at most [`LONGEST`] of them. Never blocks.
pub(super) fn send(cx: &mut Context, port: &mut Port, batch: &mut [PacketBuf]) -> Sent {
    let count = batch.len().min(cx.datagrams.capacity()).min(LONGEST as usize);
    let wildcard = is_wildcard(port);
    for (index, packet) in batch[..count].iter_mut().enumerate() {
        let (len, peer) = (packet.len(), packet.peer());
        cx.datagrams
            .set(index, std::ptr::NonNull::from(&mut packet[..]).cast(), len, peer);
        if wildcard && let Some(local) = packet.local() {
            cx.datagrams.set_local(index, local);
        }
    }
    let mut results = [0i32; LONGEST as usize];
    let (mut done, mut doubt, mut too_long) = (0, Doubt::default(), TOO_LONG[0]);
    while done < count {
        port.tally.system_calls.add(1);
        // SAFETY: each entry points into a packet of the batch, which is not touched until the call returns.
        let errno = match unsafe { cx.datagrams.send(port.fd, done, count) } {
            Ok(sent) => {
                for index in done..done + sent {
                    results[index] = batch[index].len() as i32;
                }
                done += sent.max(1);
                doubt.settle(port);
                continue;
            }
            Err(error) => error.raw_os_error().unwrap_or(libc::EIO),
        };
        let verdict = match SocketErrno::of(errno) {
            SocketErrno::Full | SocketErrno::Dead => {
                results[done..count].fill(-errno);
                break;
            }
            SocketErrno::Datagram => Some(errno),
            _ if doubt.attempts >= ATTEMPTS => Some(errno),
            SocketErrno::Interrupted => {
                doubt.attempts += 1;
                continue;
            }
            SocketErrno::Reported => None,
            SocketErrno::Ambiguous if errno == libc::EMSGSIZE => {
                (doubt.last == errno && doubt.in_a_row + 1 >= too_long).then_some(errno)
            }
            SocketErrno::Ambiguous => {
                port.tally.system_calls.add(1);
                // SAFETY: as above.
                let probed = unsafe { cx.datagrams.probe(port.fd, done) };
                probed.err().and_then(|error| error.raw_os_error())
            }
        };
        match verdict {
            None => {
                doubt.note(port, errno);
                // Right before the next attempt, so that only what comes between the two calls can
                // fail it: under a flood of ICMP there is one for each datagram that is tried
                // otherwise.
                port.tally.system_calls.add(1);
                if let Some(report) = SocketOptions::take_report(port.fd) {
                    port.tally.reported.add(report);
                }
            }
            Some(own) => {
                if own == libc::EMSGSIZE {
                    too_long = TOO_LONG[1];
                    doubt.in_a_row = 0;
                }
                doubt.settle(port);
                results[done] = -own;
                done += 1;
            }
        }
    }
    doubt.settle(port);
    judge(port, "sendmmsg", &results[..count], |index| {
        Weight::of(batch[index].len())
    })
}

/// Whether datagrams carry local addresses.
fn is_wildcard(port: &Port) -> bool {
    port.socket.as_ref().is_some_and(|socket| socket.wildcard)
}

/// Whether a receive that failed with `errno` is to be made again: the errno is not about what
/// there is to receive.
fn is_passing(errno: i32) -> bool {
    matches!(
        SocketErrno::of(errno),
        SocketErrno::Reported | SocketErrno::Ambiguous | SocketErrno::Interrupted
    )
}

/// Errors of one datagram that may be reports about earlier ones: known once the datagram was sent,
/// or failed in another way.
#[derive(Default)]
struct Doubt {
    last: i32,
    in_a_row: u64,
    attempts: usize,
}

impl Doubt {
    /// The datagram failed, perhaps for what the network reported of another one.
    fn note(&mut self, port: &Port, errno: i32) {
        if self.last != errno {
            let attempts = self.attempts;
            self.settle(port);
            (self.last, self.attempts) = (errno, attempts);
        }
        self.in_a_row += 1;
        self.attempts += 1;
    }

    /// The datagram is done with: what was noted were reports.
    fn settle(&mut self, port: &Port) {
        (0..self.in_a_row).for_each(|_| port.tally.reported.add(self.last));
        *self = Self::default();
    }
}
