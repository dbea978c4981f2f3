//! The UDP side of a worker, the same for both backends: batches of datagrams by recvmmsg and sendmmsg.
#![allow(unsafe_code)]

use super::Context;
use super::burst::LONGEST;
use super::port::{Port, Sent, Weight, judge};
use crate::buf::{Batch, PacketBuf};

/// Socket errors that tell of an earlier datagram (ICMP): they are taken note of and the call is made again, that often.
const RETRIES: usize = 8;

/// Receives what is there, at most the room of the batch. Never blocks.
pub(super) fn receive(cx: &mut Context, port: &mut Port, batch: &mut Batch) {
    let mut retries = 0;
    while !batch.is_full() {
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
        }
        port.tally.system_calls.add(1);
        // SAFETY: each entry points into a slot that was just checked out and is in nobody else's hands.
        let result = unsafe { cx.datagrams.receive(port.fd, ready) };
        let arrived = *result.as_ref().unwrap_or(&0);
        let (mut packets, mut bytes) = (0, 0);
        for (index, &slot) in slots[..ready].iter().enumerate() {
            if index >= arrived {
                cx.arena.release(slot);
                continue;
            }
            let datagram = cx.datagrams.arrived(index);
            if datagram.truncated {
                port.truncated();
                cx.arena.release(slot);
                continue;
            }
            let mut packet = PacketBuf::whole_slot(&cx.arena, slot, datagram.len as u32);
            packet.set_peer(datagram.peer);
            bytes += datagram.len as u64;
            packets += 1;
            let _ = batch.push(packet);
        }
        port.tally.received(packets, bytes);
        match result.map_err(|error| error.raw_os_error().unwrap_or(libc::EIO)) {
            Ok(arrived) if arrived < ready => {
                port.readable = false;
                return;
            }
            Ok(_) => {}
            Err(libc::ECONNREFUSED | libc::EHOSTUNREACH | libc::ENETUNREACH | libc::EINTR) if retries < RETRIES => {
                retries += 1;
            }
            Err(errno) => {
                port.readable = false;
                port.failed("recvmmsg", errno);
                return;
            }
        }
    }
    port.more = true;
}

/// Sends the packets, at most [`LONGEST`] of them. Never blocks.
pub(super) fn send(cx: &mut Context, port: &mut Port, batch: &mut [PacketBuf]) -> Sent {
    let count = batch.len().min(cx.datagrams.capacity()).min(LONGEST as usize);
    for (index, packet) in batch[..count].iter_mut().enumerate() {
        let (len, peer) = (packet.len(), packet.peer());
        cx.datagrams
            .set(index, std::ptr::NonNull::from(&mut packet[..]).cast(), len, peer);
    }
    let mut results = [0i32; LONGEST as usize];
    let (mut done, mut retries) = (0, 0);
    while done < count {
        port.tally.system_calls.add(1);
        // SAFETY: each entry points into a packet of the batch, which is not touched until the call returns.
        match unsafe { cx.datagrams.send(port.fd, done, count) } {
            Ok(sent) => {
                for index in done..done + sent {
                    results[index] = batch[index].len() as i32;
                }
                done += sent.max(1);
            }
            Err(error) => match error.raw_os_error().unwrap_or(libc::EIO) {
                // Told about an earlier datagram; this one was not tried.
                libc::ECONNREFUSED | libc::EINTR if retries < RETRIES => retries += 1,
                errno @ (libc::EAGAIN | libc::ENOBUFS | libc::ENOMEM) => {
                    results[done..count].fill(-errno);
                    done = count;
                }
                errno => {
                    results[done] = -errno;
                    done += 1;
                }
            },
        }
    }
    judge(port, "sendmmsg", &results[..count], |index| {
        Weight::of(batch[index].len())
    })
}
