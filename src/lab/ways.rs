//! The ways that this library offers, for the [`cases`](super::cases): its plain `Iface`, and its worker on either backend.

use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use super::cases::{Drained, Reply, Runner, Way, turn_around};
use super::monotonic_ns;
use super::offload_cases::granted;
use crate::offload::{Link, VnetHdr};
use crate::sys::{fd, tun};
use crate::{
    Backend, Batch, Builder, Iface, Mode, Offloads, PacketBuf, PortError, PortId, Sent, Wait, Worker, WorkerConfig,
};

/// A loop over [`Iface::recv`] and [`Iface::send`] with one buffer: what the worker is compared with.
#[derive(Clone, Copy, Debug)]
pub struct IfaceLoop {
    /// Whether the descriptor is made O_NONBLOCK, as [`cases::drain`](super::cases::drain) needs it. A blocking one is for the round trip,
    /// where a non-blocking one cannot serve.
    pub nonblocking: bool,
}

impl Way for IfaceLoop {
    fn name(&self) -> &str {
        if self.nonblocking {
            "Iface, non-blocking"
        } else {
            "Iface, blocking"
        }
    }

    fn open(&self, devices: &[&str]) -> io::Result<Box<dyn Runner>> {
        let mut ifaces = Vec::with_capacity(devices.len());
        for name in devices {
            let iface = Iface::without_packet_info(name, Mode::Tun)?;
            if self.nonblocking {
                tun::change_status_flags(iface.as_fd(), libc::O_NONBLOCK, 0)?;
            }
            ifaces.push(iface);
        }
        Ok(Box::new(IfaceRunner {
            ifaces,
            nonblocking: self.nonblocking,
            buffer: vec![0; BUFFER_LEN],
            filled: (0, 0),
        }))
    }
}

struct IfaceRunner {
    ifaces: Vec<Iface>,
    nonblocking: bool,
    buffer: Vec<u8>,
    /// Length and number of the packets to send.
    filled: (usize, usize),
}

impl Runner for IfaceRunner {
    fn drain(&mut self, device: usize, expected: usize) -> io::Result<Drained> {
        if !self.nonblocking {
            return Err(io::Error::new(
                io::ErrorKind::Unsupported,
                "draining a blocking descriptor would wait at its end",
            ));
        }
        let mut drained = Drained::default();
        while drained.packets < expected {
            match self.ifaces[device].recv(&mut self.buffer) {
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
            if self.ifaces[device].send(&self.buffer[..len])? == len {
                accepted += 1;
            }
        }
        Ok(accepted)
    }

    fn echo(&mut self) -> io::Result<()> {
        if self.nonblocking {
            return Err(io::Error::new(
                io::ErrorKind::Unsupported,
                "a loop over a non-blocking descriptor would not wait",
            ));
        }
        loop {
            let len = self.ifaces[0].recv(&mut self.buffer)?;
            let packet = &mut self.buffer[..len];
            match turn_around(packet) {
                Reply::Send => drop(self.ifaces[0].send(packet)?),
                Reply::Ignore => {}
                Reply::Stop => return Ok(()),
            }
        }
    }

    fn serve(&mut self, each: &mut dyn FnMut(&[u8], u64), over: &AtomicBool) -> io::Result<()> {
        let iface = &self.ifaces[0];
        let mut poll_set = [libc::pollfd {
            fd: iface.as_raw_fd(),
            events: libc::POLLIN,
            revents: 0,
        }];
        let mut now = 0;
        while !over.load(Ordering::Acquire) {
            fd::poll(&mut poll_set, None)?;
            for place in 0.. {
                // Now and then, so that the clock costs this loop no more than others, which read it once a batch.
                if place % CLOCK_EVERY == 0 {
                    now = monotonic_ns();
                }
                match iface.recv(&mut self.buffer) {
                    Ok(len) => each(&self.buffer[..len], now),
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                    Err(error) => return Err(error),
                }
            }
        }
        Ok(())
    }
}

/// A loop over poll(2) and, once it tells of packets, non-blocking reads until there are none: what a careful program does without a ring.
#[derive(Clone, Copy, Debug)]
pub struct PollLoop;

impl Way for PollLoop {
    fn name(&self) -> &str {
        "poll + read"
    }

    fn open(&self, devices: &[&str]) -> io::Result<Box<dyn Runner>> {
        IfaceLoop { nonblocking: true }.open(devices)
    }
}

/// A [`Worker`] with [`recv_many`](Worker::recv_many) and [`send_many`](Worker::send_many).
#[derive(Clone, Debug)]
pub struct ByWorker {
    name: String,
    config: WorkerConfig,
    offloads: Offloads,
}

impl ByWorker {
    /// A worker in its default configuration, apart from the backend, which is forced, and the wait.
    pub fn new(backend: Backend, wait: Wait) -> Self {
        let backend_name = match backend {
            Backend::IoUring => "io_uring",
            Backend::Syscalls => "system calls",
        };
        let name = match wait {
            Wait::Block => format!("worker, {backend_name}"),
            Wait::Spin {
                duration: Duration::MAX,
            } => format!("worker, {backend_name}, busy"),
            Wait::Spin { duration } => format!("worker, {backend_name}, spin {duration:?}"),
            Wait::Moderate { .. } => format!("worker, {backend_name}, moderate"),
        };
        Self {
            name,
            config: WorkerConfig {
                backend: Some(backend),
                wait,
                ..WorkerConfig::default()
            },
            offloads: Offloads::none(),
        }
    }

    /// The same on devices with these offloads. What is put into it by [`Runner::fill`] has the driver's header in front then.
    pub fn with_offloads(self, offloads: Offloads) -> Self {
        Self {
            name: format!("{}, offloads", self.name),
            offloads,
            ..self
        }
    }

    /// The same under another name.
    pub fn renamed(self, name: &str) -> Self {
        Self {
            name: name.to_owned(),
            ..self
        }
    }
}

impl Way for ByWorker {
    fn name(&self) -> &str {
        &self.name
    }

    fn open(&self, devices: &[&str]) -> io::Result<Box<dyn Runner>> {
        let mut worker = Worker::new(&self.config)?;
        let mut ports = Vec::with_capacity(devices.len());
        for name in devices {
            let device = Builder::new(name, Mode::Tun).offloads(self.offloads).open()?;
            granted(device.granted().offloads, self.offloads)?;
            for queue in device.into_queues() {
                ports.push(worker.attach(queue)?);
            }
        }
        Ok(Box::new(WorkerRunner {
            worker,
            ports,
            received: Batch::with_capacity(BATCH),
            filled: Vec::new(),
            header: !self.offloads.is_empty(),
        }))
    }
}

struct WorkerRunner {
    worker: Worker,
    ports: Vec<PortId>,
    received: Batch,
    filled: Vec<Batch>,
    /// The driver's header is in front of what is filled in.
    header: bool,
}

impl WorkerRunner {
    /// A packet of these bytes, with what the driver's header says of it.
    fn packet(&self, bytes: &[u8]) -> io::Result<PacketBuf> {
        let (header, bytes) = match bytes.split_first_chunk() {
            Some((header, bytes)) if self.header => (VnetHdr::from_bytes(*header), bytes),
            _ => (VnetHdr::plain(), bytes),
        };
        let mut packet = self
            .worker
            .packet_from(bytes)
            .ok_or_else(|| io::Error::other("no buffer is free"))?;
        let meta = header.check(bytes, Link::None).map_err(io::Error::other)?;
        packet.set_meta(meta).map_err(io::Error::other)?;
        Ok(packet)
    }
}

impl Runner for WorkerRunner {
    fn drain(&mut self, device: usize, expected: usize) -> io::Result<Drained> {
        let mut drained = Drained::default();
        while drained.packets < expected && self.worker.try_recv_many(self.ports[device], &mut self.received)? > 0 {
            for packet in self.received.drain() {
                drained.packets += 1;
                drained.bytes += packet.len();
            }
        }
        Ok(drained)
    }

    fn fill(&mut self, _device: usize, packet: &[u8], count: usize) -> io::Result<()> {
        self.filled
            .resize_with(count.div_ceil(BATCH), || Batch::with_capacity(BATCH));
        for number in 0..count {
            let no_room = |_| io::Error::other("the batch is full");
            let packet = self.packet(packet)?;
            self.filled[number / BATCH].push(packet).map_err(no_room)?;
        }
        Ok(())
    }

    fn send(&mut self, device: usize) -> io::Result<usize> {
        let mut accepted = 0;
        for batch in &mut self.filled {
            let sent = self.worker.send_many(self.ports[device], batch);
            accepted += sent.accepted;
            refused(&sent)?;
        }
        Ok(accepted)
    }

    fn echo(&mut self) -> io::Result<()> {
        let mut stop = false;
        while !stop {
            self.worker.recv_many(self.ports[0], &mut self.received)?;
            self.received.retain_mut(|packet| {
                let reply = turn_around(packet);
                stop |= reply == Reply::Stop;
                reply == Reply::Send
            });
            let sent = self.worker.send_many(self.ports[0], &mut self.received);
            refused(&sent)?;
        }
        Ok(())
    }

    fn serve(&mut self, each: &mut dyn FnMut(&[u8], u64), over: &AtomicBool) -> io::Result<()> {
        while !over.load(Ordering::Acquire) {
            self.worker.wait(None)?;
            while let Some(port) = self.worker.next_ready() {
                self.worker.try_recv_many(port, &mut self.received)?;
                let now = monotonic_ns();
                self.received.drain().for_each(|packet| each(&packet, now));
            }
        }
        Ok(())
    }
}

/// Packets that a loop without batches receives by one reading of the clock.
const CLOCK_EVERY: usize = 8;

/// Packets per batch, as a worker loop would have it.
const BATCH: usize = 64;

/// A packet of up to 1500 bytes fits.
const BUFFER_LEN: usize = 2048;

fn refused(sent: &Sent) -> Result<(), PortError> {
    sent.refusal.or(sent.stopped).map_or(Ok(()), Err)
}
