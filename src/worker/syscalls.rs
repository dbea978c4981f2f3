//! The backend without io_uring: poll(2) and non-blocking calls until empty. The same behaviour on any kernel and in any sandbox.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::ptr::NonNull;
use std::time::{Duration, Instant};

use super::Context;
use super::burst::LONGEST;
use super::config::Wait;
use super::outgoing::{Outbox, Unperformed, Writer};
use super::port::{POLLED, Port, Ports};
use super::{handoff, udp};
use crate::buf::Batch;
use crate::error::PortError;
use crate::sys::cpu::TimerSlack;
use crate::sys::fd;

pub(super) struct SyscallBackend {
    /// For poll(2): the doorbell first, then the ports asked about.
    poll_set: Vec<libc::pollfd>,
    /// The port of each entry behind the doorbell.
    polled: Vec<usize>,
    /// A pause ends when it should, not up to 50 µs later.
    _slack: Option<TimerSlack>,
}

impl Writer for SyscallBackend {
    fn fault(&mut self, _cx: &Context) -> Option<PortError> {
        None
    }

    fn perform(
        &mut self,
        _cx: &mut Context,
        ports: &mut Ports,
        index: usize,
        outbox: &mut Outbox,
    ) -> Result<(), Unperformed> {
        let port = ports.at(index);
        if port.linked {
            // Where back-pressure is to be expected, a write could wait for room.
            port.assure_nonblocking();
        }
        let mut over = false;
        for (write, result) in outbox.writes.iter().zip(&mut outbox.results) {
            if over {
                *result = -libc::ECANCELED;
                continue;
            }
            port.tally.foreign_sent.add(u64::from(write.foreign));
            *result = loop {
                port.tally.system_calls.add(1);
                // SAFETY: the outbox names bytes of packets of the batch that is being sent, and iovecs and headers of its own; none of them is touched
                // until this returns.
                let result = unsafe {
                    match write.parts {
                        0 => fd::write_raw(port.fd, write.at, write.len as usize),
                        parts => fd::write_parts(port.fd, write.at.cast(), parts as usize),
                    }
                };
                match result {
                    Ok(len) => break len as i32,
                    Err(error) => match error.raw_os_error().unwrap_or(libc::EIO) {
                        libc::EINTR => {}
                        errno => break -errno,
                    },
                }
            };
            // A packet that is bad by itself stands in nobody's way.
            over = *result < 0 && (write.kind.is_some() || *result != -libc::EINVAL);
        }
        Ok(())
    }
}

impl SyscallBackend {
    pub(super) fn new(wait: Wait) -> Self {
        Self {
            poll_set: Vec::new(),
            polled: Vec::new(),
            _slack: matches!(wait, Wait::Moderate { .. }).then(TimerSlack::least),
        }
    }

    /// Receives: waits for the first packet if `block`, then takes what is there, up to the batch's room.
    pub(super) fn receive(
        &mut self,
        cx: &mut Context,
        ports: &mut Ports,
        index: usize,
        batch: &mut Batch,
        block: bool,
    ) -> Result<usize, PortError> {
        let before = batch.len();
        loop {
            let port = ports.at(index);
            port.more = false;
            if port.is_udp() {
                udp::receive(cx, port, batch);
            } else if port.is_handoff() {
                handoff::receive(&cx.arena, port, batch);
            } else {
                read_until_empty(cx, ports, index, batch);
            }
            let port = ports.at(index);
            let got = batch.len() - before;
            if got > 0 || !block || port.has_news() || batch.is_full() {
                return port.conclude(got);
            }
            if cx.interrupted() {
                return Ok(0);
            }
            if let Some(pause) = cx.moderation.pause(None) {
                pause_for(cx, ports, pause);
                continue;
            }
            cx.doze(ports, Some(index), |cx, ports| self.sleep(cx, ports, Some(index), None))
                .unwrap_or(Ok(()))
                .map_err(|error| PortError::from_errno("ppoll", error.raw_os_error().unwrap_or(libc::EIO)))?;
        }
    }

    /// Waits until a port is ready, the deadline, or the doorbell. Spurious returns are possible.
    pub(super) fn wait(&mut self, cx: &mut Context, ports: &mut Ports, deadline: Option<Instant>) -> io::Result<()> {
        if ports.any_ready() || cx.interrupted() {
            // Others may have become ready meanwhile, and the doorbell wants to be heard.
            return self.look(cx, ports, None, Some(Duration::ZERO)).map(drop);
        }
        if let Some(pause) = cx.moderation.pause(deadline) {
            pause_for(cx, ports, pause);
            // The ports that were not busy, and the doorbell.
            return self.look(cx, ports, None, Some(Duration::ZERO)).map(drop);
        }
        cx.doze(ports, None, |cx, ports| self.sleep(cx, ports, None, deadline))
            .unwrap_or(Ok(()))
    }

    fn sleep(
        &mut self,
        cx: &mut Context,
        ports: &mut Ports,
        only: Option<usize>,
        deadline: Option<Instant>,
    ) -> io::Result<()> {
        ports.iter_mut().for_each(|port| port.recent = false);
        if let Wait::Spin { duration } = cx.wait {
            let end = Instant::now().checked_add(duration);
            loop {
                if self.look(cx, ports, only, Some(Duration::ZERO))? || cx.interrupted() {
                    return Ok(());
                }
                let now = Instant::now();
                if deadline.is_some_and(|deadline| now >= deadline) {
                    return Ok(());
                }
                if end.is_some_and(|end| now >= end) {
                    break;
                }
            }
        }
        let timeout = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
        if timeout != Some(Duration::ZERO) {
            cx.books.worker.sleeps.add(1);
        }
        self.look(cx, ports, only, timeout).map(drop)
    }

    /// Polls the doorbell and the ports (or one of them). Returns whether anything was there.
    fn look(
        &mut self,
        cx: &mut Context,
        ports: &mut Ports,
        only: Option<usize>,
        timeout: Option<Duration>,
    ) -> io::Result<bool> {
        if self.gather(cx, ports, only, 1) {
            cx.arena.announce_hunger();
            // What came back until now rang no doorbell.
            self.gather(cx, ports, only, 0);
        }
        let found = fd::poll(&mut self.poll_set, timeout)?;
        if self.poll_set[0].revents != 0 {
            cx.doorbell_rang();
        }
        for (entry, &index) in self.poll_set[1..].iter().zip(&self.polled) {
            if entry.revents != 0 {
                ports.at(index).polled(entry.revents);
            }
        }
        Ok(found > 0)
    }

    /// Puts the doorbell and the ports to ask about into the poll set. A port without a free buffer is left out and
    /// `count` is added to its counter. Returns whether there was one.
    fn gather(&mut self, cx: &Context, ports: &mut Ports, only: Option<usize>, count: u64) -> bool {
        self.poll_set.clear();
        self.polled.clear();
        self.poll_set.push(libc::pollfd {
            fd: cx.waker.as_fd().as_raw_fd(),
            events: libc::POLLIN,
            revents: 0,
        });
        let mut starved = false;
        for index in 0..ports.len() {
            if !ports.exists(index) || only.is_some_and(|only| only != index) {
                continue;
            }
            let port = ports.at(index);
            if port.is_gone() || port.readable {
                continue;
            }
            let can = if port.is_handoff() {
                port.lend(&cx.arena)
            } else {
                cx.arena.available(port.account, port.class, 1) > 0
            };
            if !can {
                port.tally.no_buffers.add(count);
                starved = true;
                continue;
            }
            if port.is_handoff() {
                continue;
            }
            self.poll_set.push(libc::pollfd {
                fd: port.fd,
                events: POLLED,
                revents: 0,
            });
            self.polled.push(index);
        }
        starved
    }
}

/// Sleeps for a set time, so that packets gather on the ports that were busy; these are looked at again then.
fn pause_for(cx: &Context, ports: &mut Ports, pause: Duration) {
    cx.books.worker.lingers.add(1);
    std::thread::sleep(pause);
    ports.paused(&cx.arena);
}

/// Receives until the queue is empty or the batch full.
fn read_until_empty(cx: &mut Context, ports: &mut Ports, index: usize, batch: &mut Batch) {
    let port = ports.at(index);
    port.assure_nonblocking();
    read_some(cx, port, batch);
    // What the kernel is to be asked about first, once for all.
    port.hand_over(&cx.arena, batch);
}

/// Reads until the queue is empty or there is enough for the batch. Some may lie in the inbox.
///
/// Another holder may make the descriptor blocking right after that was checked. A read that finds
/// a packet does not wait all the same. So the reads that are expected to find one are made by
/// read(2), and those after them by preadv2(2) with RWF_NOWAIT, which takes 41 ns longer (305 for
/// 264).
fn read_some(cx: &mut Context, port: &mut Port, batch: &mut Batch) {
    let mut plain = port.reads.plain(port.readable);
    let mut run = 0;
    // A flood of packets that are dropped does not fill the batch, and must not keep the worker.
    let mut drops = LONGEST;
    while !port.fills(batch) && drops > 0 {
        if port.is_gone() {
            return;
        }
        if cx.arena.available(port.account, port.class, 1) == 0 {
            return port.starved();
        }
        let Some(slot) = cx.arena.check_out(port.account, port.class) else {
            return port.starved();
        };
        let at = cx.arena.address(slot, port.read_at);
        port.tally.system_calls.add(1);
        let may_wait = plain > 0;
        plain = plain.saturating_sub(1);
        // SAFETY: the slot was just checked out, so nobody else has these bytes; `read_len` of them are there.
        let result = match unsafe { read_one(port, at, may_wait) } {
            Ok(len) => len as i32,
            Err(error) => -error.raw_os_error().unwrap_or(libc::EIO),
        };
        if port.read_ended(&cx.arena, slot, result) {
            run += 1;
            if !port.holds_back() {
                port.hand_over(&cx.arena, batch);
            }
        } else if result > 0 || result == -libc::EINTR || result == -libc::EINVAL && port.is_in_doubt() {
            drops -= 1;
        } else {
            port.readable = false;
            port.reads.expected = run;
            return;
        }
    }
    port.reads.expected = u32::MAX;
    port.more = true;
}

/// One read, which must not wait unless it `may_wait`.
///
/// # Safety
/// As of [`fd::read_raw`], with the port's `read_len`.
#[inline]
unsafe fn read_one(port: &mut Port, at: NonNull<u8>, may_wait: bool) -> io::Result<usize> {
    let len = port.read_len as usize;
    if !may_wait {
        if !port.reads.refused {
            // SAFETY: as the caller says.
            match unsafe { fd::read_nowait(port.fd, at, len) } {
                Err(error) if is_refused(&error) => port.reads.refused = true,
                result => return result,
            }
        }
        // Before Linux 6.4, or in a sandbox. What poll(2) finds is still there for the read.
        port.tally.system_calls.add(1);
        let mut asked = [libc::pollfd {
            fd: port.fd,
            events: libc::POLLIN,
            revents: 0,
        }];
        if fd::poll(&mut asked, Some(Duration::ZERO))? == 0 {
            return Err(io::Error::from_raw_os_error(libc::EAGAIN));
        }
    }
    // SAFETY: as the caller says.
    unsafe { fd::read_raw(port.fd, at, len) }
}

/// Whether RWF_NOWAIT or the whole call is not to be had.
fn is_refused(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EOPNOTSUPP | libc::ENOSYS | libc::EPERM | libc::EACCES)
    )
}

#[cfg(all(test, feature = "lab"))]
mod tests {
    use std::net::UdpSocket;
    use std::sync::mpsc;

    use super::*;
    use crate::lab::{Sandbox, sysctl};
    use crate::worker::Imp;
    use crate::{Backend, Builder, Mode, Worker, WorkerConfig};

    /// Made blocking after the check, which this leaves out.
    fn make_blocking(fd: libc::c_int) {
        let off: libc::c_int = 0;
        // SAFETY: the request reads one int.
        assert_eq!(unsafe { libc::ioctl(fd, libc::FIONBIO, &raw const off) }, 0);
    }

    fn receives_without_a_check(refused: bool) {
        let _ = sysctl("net/ipv6/conf/default/disable_ipv6", 1);
        let builder = Builder::new("", Mode::Tun).address(std::net::Ipv4Addr::new(10, 0, 0, 1), 24);
        let queue = builder.up(true).open().unwrap().into_queues().remove(0);
        let mut worker = Worker::new(&WorkerConfig {
            backend: Some(Backend::Syscalls),
            ..WorkerConfig::default()
        })
        .unwrap();
        worker.attach(queue).unwrap();
        assert!(matches!(worker.backend, Imp::Syscalls(_)));
        let socket = UdpSocket::bind("10.0.0.1:0").unwrap();
        let (cx, port) = (&mut worker.cx, worker.ports.at(0));
        port.reads.refused = refused;
        let mut batch = Batch::with_capacity(16);
        make_blocking(port.fd);
        for count in [0, 3, 3, 5, 0, 1, 1, 0] {
            if count < port.reads.expected {
                // What is noticed by then.
                port.assure_nonblocking();
                make_blocking(port.fd);
            }
            (0..count).for_each(|_| assert_eq!(socket.send_to(b"one", "10.0.0.2:9").unwrap(), 3));
            read_some(cx, port, &mut batch);
            assert_eq!(batch.len() as u32, count);
            batch.clear();
        }
        assert_eq!(
            port.reads.refused,
            refused || Some(false) == crate::Support::probe().tun_nowait
        );
    }

    // T13, O_NONBLOCK taken away between the check and the read.
    #[test]
    fn a_descriptor_made_blocking_after_the_check_does_not_hold_up_a_receive() {
        for refused in [false, true] {
            let (done, outcome) = mpsc::channel();
            // Not joined: a read that sleeps would hold up the test as well.
            let thread = std::thread::spawn(move || {
                let sandbox = std::fs::File::open("/dev/net/tun").and_then(|_| Sandbox::enter());
                if let Err(error) = sandbox {
                    assert!(std::env::var_os("TUN_DRIVER_REQUIRE_NETNS").is_none(), "{error}");
                    eprintln!("skipped: no device in a namespace can be had: {error}");
                } else {
                    receives_without_a_check(refused);
                }
                done.send(()).unwrap();
            });
            let outcome = outcome.recv_timeout(Duration::from_secs(60));
            assert_eq!(outcome, Ok(()), "it sleeps, or failed: {}", thread.is_finished());
        }
    }
}
