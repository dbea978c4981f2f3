//! Loops that receive and send one packet per system call: over bare descriptors, tun-rs's `SyncDevice`, tun-tap's `Iface`.
//!
//! One text for all of them, so that they do the same work per packet and differ by what the library adds.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use tun_driver::lab::Namespace;
use tun_driver::lab::cases::{Drained, Reply, Runner, Way, turn_around};
use tun_driver::lab::monotonic_ns;
use tun_driver::lab::wire::{Carrier, Carrying, CarryingThreads, Opened, open_both};

use crate::floor::open_tun;

/// Bytes of the buffer that each receive is given: what a worker of tun_driver gives, too.
pub(crate) const BUFFER_LEN: usize = 1536;

/// Packets that one direction may take before it is the other's turn, as in a worker's batch.
const TURN: usize = 64;

/// A TUN device of some library.
pub(crate) trait Device: AsRawFd + Send + Sync + Sized + 'static {
    /// Creates it, one queue, no packet info, without setting it up.
    fn create(name: &str, nonblocking: bool) -> io::Result<Self>;
    /// One packet.
    fn recv(&self, buffer: &mut [u8]) -> io::Result<usize>;
    /// One packet.
    fn send(&self, packet: &[u8]) -> io::Result<usize>;
}

impl Device for File {
    fn create(name: &str, nonblocking: bool) -> io::Result<Self> {
        open_tun(name, nonblocking)
    }

    #[inline]
    fn recv(&self, buffer: &mut [u8]) -> io::Result<usize> {
        (&*self).read(buffer)
    }

    #[inline]
    fn send(&self, packet: &[u8]) -> io::Result<usize> {
        (&*self).write(packet)
    }
}

impl Device for tun_rs::SyncDevice {
    fn create(name: &str, nonblocking: bool) -> io::Result<Self> {
        let device = tun_rs::DeviceBuilder::new()
            .name(name)
            .inherit_enable_state()
            .build_sync()?;
        device.set_nonblocking(nonblocking)?;
        Ok(device)
    }

    #[inline]
    fn recv(&self, buffer: &mut [u8]) -> io::Result<usize> {
        tun_rs::SyncDevice::recv(self, buffer)
    }

    #[inline]
    fn send(&self, packet: &[u8]) -> io::Result<usize> {
        tun_rs::SyncDevice::send(self, packet)
    }
}

#[cfg(feature = "tun-tap")]
impl Device for tun_tap::Iface {
    fn create(name: &str, nonblocking: bool) -> io::Result<Self> {
        let iface = Self::without_packet_info(name, tun_tap::Mode::Tun)?;
        if nonblocking {
            iface.set_non_blocking()?;
        }
        Ok(iface)
    }

    #[inline]
    fn recv(&self, buffer: &mut [u8]) -> io::Result<usize> {
        tun_tap::Iface::recv(self, buffer)
    }

    #[inline]
    fn send(&self, packet: &[u8]) -> io::Result<usize> {
        tun_tap::Iface::send(self, packet)
    }
}

/// How a loop waits for packets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Waiting {
    /// In a receive that blocks.
    Blocking,
    /// In poll(2); then non-blocking receives until there is none.
    Poll,
    /// Not at all: non-blocking receives, again and again.
    Busy,
}

/// Loops over a library's device.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ByPacket<D> {
    name: &'static str,
    waiting: Waiting,
    nonblocking: bool,
    device: std::marker::PhantomData<fn() -> D>,
}

impl<D> ByPacket<D> {
    /// Waits in this manner.
    pub(crate) fn waiting(name: &'static str, waiting: Waiting) -> Self {
        Self {
            name,
            waiting,
            nonblocking: waiting != Waiting::Blocking,
            device: std::marker::PhantomData,
        }
    }

    /// Never waits, as where a queue is emptied.
    pub(crate) fn nonblocking(name: &'static str) -> Self {
        Self {
            nonblocking: true,
            ..Self::waiting(name, Waiting::Blocking)
        }
    }
}

impl<D: Device> Way for ByPacket<D> {
    fn name(&self) -> &str {
        self.name
    }

    fn open(&self, devices: &[&str]) -> io::Result<Box<dyn Runner>> {
        let devices = devices.iter().map(|name| D::create(name, self.nonblocking));
        Ok(Box::new(PacketRunner {
            devices: devices.collect::<io::Result<Vec<D>>>()?,
            waiting: self.waiting,
            buffer: vec![0; BUFFER_LEN],
            filled: (0, 0),
        }))
    }
}

struct PacketRunner<D> {
    devices: Vec<D>,
    waiting: Waiting,
    buffer: Vec<u8>,
    /// Length and number of the packets to send.
    filled: (usize, usize),
}

impl<D: Device> PacketRunner<D> {
    /// The next packet of the first device; waits for it.
    fn next(&mut self) -> io::Result<usize> {
        loop {
            if self.waiting == Waiting::Poll {
                poll(&[self.devices[0].as_raw_fd()])?;
            }
            match self.devices[0].recv(&mut self.buffer) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => std::hint::spin_loop(),
                result => return result,
            }
        }
    }
}

impl<D: Device> Runner for PacketRunner<D> {
    fn drain(&mut self, device: usize, expected: usize) -> io::Result<Drained> {
        let mut drained = Drained::default();
        if self.waiting == Waiting::Poll {
            poll(&[self.devices[device].as_raw_fd()])?;
        }
        // A loop that drains finds the end by EAGAIN; the others know how many there are.
        while self.waiting == Waiting::Poll || drained.packets < expected {
            match self.devices[device].recv(&mut self.buffer) {
                Ok(len) => {
                    drained.packets += 1;
                    drained.bytes += len;
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => return Err(error),
            }
        }
        Ok(drained)
    }

    fn fill(&mut self, _device: usize, packet: &[u8], count: usize) -> io::Result<()> {
        self.buffer[..packet.len()].copy_from_slice(packet);
        self.filled = (packet.len(), count);
        Ok(())
    }

    fn send(&mut self, device: usize) -> io::Result<usize> {
        let (len, count) = self.filled;
        let mut accepted = 0;
        for _ in 0..count {
            if self.devices[device].send(&self.buffer[..len])? == len {
                accepted += 1;
            }
        }
        Ok(accepted)
    }

    fn echo(&mut self) -> io::Result<()> {
        loop {
            let len = self.next()?;
            let packet = &mut self.buffer[..len];
            match turn_around(packet) {
                Reply::Send => drop(self.devices[0].send(packet)?),
                Reply::Ignore => {}
                Reply::Stop => return Ok(()),
            }
        }
    }

    fn serve(&mut self, each: &mut dyn FnMut(&[u8], u64), over: &AtomicBool) -> io::Result<()> {
        let mut now = 0;
        while !over.load(Ordering::Acquire) {
            if self.waiting != Waiting::Poll {
                let len = self.next()?;
                each(&self.buffer[..len], monotonic_ns());
                continue;
            }
            poll(&[self.devices[0].as_raw_fd()])?;
            for place in 0.. {
                match self.devices[0].recv(&mut self.buffer) {
                    Ok(len) => {
                        // Now and then, so that the clock costs this loop no more than those that read it once a batch.
                        if place % CLOCK_EVERY == 0 {
                            now = monotonic_ns();
                        }
                        each(&self.buffer[..len], now);
                    }
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                    Err(error) => return Err(error),
                }
            }
        }
        Ok(())
    }
}

const CLOCK_EVERY: usize = 8;

impl<D: Device> Carrier for ByPacket<D> {
    fn name(&self) -> &str {
        self.name
    }

    fn open(&self, ends: [&Namespace; 2], device: &str) -> io::Result<Opened> {
        let pair = Arc::new(open_both(ends, || D::create(device, self.nonblocking))?);
        let waiting = self.waiting;
        Ok(Box::new(move |cpu| {
            let other = Arc::clone(&pair);
            let loops: Vec<Box<dyn FnOnce() -> io::Result<()> + Send>> = match waiting {
                Waiting::Blocking => vec![
                    Box::new(move || copy(&pair[0], &pair[1])),
                    Box::new(move || copy(&other[1], &other[0])),
                ],
                Waiting::Poll | Waiting::Busy => vec![Box::new(move || exchange(&pair, waiting))],
            };
            Ok(Box::new(CarryingThreads::start(cpu, loops)?) as Box<dyn Carrying>)
        }))
    }
}

/// One direction, on a thread of its own.
fn copy<D: Device>(from: &D, to: &D) -> io::Result<()> {
    let mut buffer = vec![0; BUFFER_LEN];
    loop {
        let len = from.recv(&mut buffer)?;
        pass_on(to, &buffer[..len])?;
    }
}

/// Both directions on one thread.
fn exchange<D: Device>(pair: &[D; 2], waiting: Waiting) -> io::Result<()> {
    let mut buffer = vec![0; BUFFER_LEN];
    let fds = [pair[0].as_raw_fd(), pair[1].as_raw_fd()];
    let mut empty = true;
    loop {
        if empty && waiting == Waiting::Poll {
            poll(&fds)?;
        }
        empty = true;
        for (from, to) in [(&pair[0], &pair[1]), (&pair[1], &pair[0])] {
            for place in 1..=TURN {
                match from.recv(&mut buffer) {
                    Ok(len) => pass_on(to, &buffer[..len])?,
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                    Err(error) => return Err(error),
                }
                empty &= place < TURN;
            }
        }
    }
}

/// What the device refuses is dropped, as it would be on any wire; that it is gone ends the loop, at the next receive if not here.
fn pass_on<D: Device>(to: &D, packet: &[u8]) -> io::Result<()> {
    match to.send(packet) {
        Err(error) if error.raw_os_error() == Some(libc::EBADFD) => Err(error),
        _ => Ok(()),
    }
}

/// Waits until one of the descriptors is readable, or tells an error.
fn poll(fds: &[RawFd]) -> io::Result<()> {
    let none = libc::pollfd {
        fd: -1, // ignored
        events: libc::POLLIN,
        revents: 0,
    };
    let mut set = [none; 2];
    for (place, &fd) in set.iter_mut().zip(fds) {
        place.fd = fd;
    }
    loop {
        // SAFETY: the array is writable, and its length is passed.
        if unsafe { libc::poll(set.as_mut_ptr(), set.len() as libc::nfds_t, -1) } >= 0 {
            return Ok(());
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

/// The hand-written ring as a carrier: one thread, one ring, both devices.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ByFloor;

impl Carrier for ByFloor {
    fn name(&self) -> &str {
        "floor (raw ring)"
    }

    fn open(&self, ends: [&Namespace; 2], device: &str) -> io::Result<Opened> {
        let pair = open_both(ends, || open_tun(device, true))?;
        Ok(Box::new(move |cpu| {
            let carry: Box<dyn FnOnce() -> io::Result<()> + Send> =
                Box::new(move || crate::floor::Floor::default().on(pair.into())?.carry());
            Ok(Box::new(CarryingThreads::start(cpu, vec![carry])?) as Box<dyn Carrying>)
        }))
    }
}
