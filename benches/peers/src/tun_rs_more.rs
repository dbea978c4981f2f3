//! What tun-rs has besides one packet per call: its asynchronous device on tokio, and its offload mode.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::runtime::{self, Runtime};
use tun_driver::lab::Namespace;
use tun_driver::lab::cases::{Drained, Reply, Runner, Way, turn_around};
use tun_driver::lab::monotonic_ns;
use tun_driver::lab::wire::{Carrier, Carrying, CarryingThreads, Opened, open_both};
use tun_rs::{AsyncDevice, DeviceBuilder, GROTable, IDEAL_BATCH_SIZE, SyncDevice, VIRTIO_NET_HDR_LEN};

use crate::packets::BUFFER_LEN;

/// Longer than anything here takes.
const BOUND: Duration = Duration::from_secs(10);

fn runtime() -> io::Result<Runtime> {
    runtime::Builder::new_current_thread().enable_io().enable_time().build()
}

fn builder(name: &str, offload: bool) -> DeviceBuilder {
    DeviceBuilder::new().name(name).inherit_enable_state().with(|builder| {
        builder.offload(offload);
    })
}

/// `AsyncDevice` in tokio's runtime for the current thread.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ByTokio {
    pub(crate) offload: bool,
}

impl ByTokio {
    fn told(&self) -> &'static str {
        if self.offload {
            "tun-rs async, offload"
        } else {
            "tun-rs async"
        }
    }
}

impl Way for ByTokio {
    fn name(&self) -> &str {
        self.told()
    }

    fn open(&self, devices: &[&str]) -> io::Result<Box<dyn Runner>> {
        let runtime = runtime()?;
        let devices = {
            let _entered = runtime.enter();
            let devices = devices.iter().map(|name| builder(name, self.offload).build_async());
            devices.collect::<io::Result<Vec<AsyncDevice>>>()?
        };
        Ok(Box::new(TokioRunner {
            devices,
            runtime,
            buffer: vec![0; BUFFER_LEN],
            filled: (0, 0),
        }))
    }
}

struct TokioRunner {
    // Dropped before the runtime that they are registered with.
    devices: Vec<AsyncDevice>,
    runtime: Runtime,
    buffer: Vec<u8>,
    /// Length and number of the packets to send.
    filled: (usize, usize),
}

impl Runner for TokioRunner {
    fn drain(&mut self, device: usize, expected: usize) -> io::Result<Drained> {
        let (device, buffer) = (&self.devices[device], &mut self.buffer);
        let receive = async {
            let mut drained = Drained::default();
            while drained.packets < expected {
                drained.bytes += device.recv(buffer).await?;
                drained.packets += 1;
            }
            io::Result::Ok(drained)
        };
        // One timer for all of them, which matters only if one is missing.
        self.runtime
            .block_on(async { tokio::time::timeout(BOUND, receive).await })
            .map_err(|_| io::Error::new(io::ErrorKind::TimedOut, format!("fewer than {expected} packets came")))?
    }

    fn fill(&mut self, _device: usize, packet: &[u8], count: usize) -> io::Result<()> {
        self.buffer[..packet.len()].copy_from_slice(packet);
        self.filled = (packet.len(), count);
        Ok(())
    }

    fn send(&mut self, device: usize) -> io::Result<usize> {
        let (len, count) = self.filled;
        let (device, buffer) = (&self.devices[device], &self.buffer);
        self.runtime.block_on(async {
            let mut accepted = 0;
            for _ in 0..count {
                if device.send(&buffer[..len]).await? == len {
                    accepted += 1;
                }
            }
            Ok(accepted)
        })
    }

    fn echo(&mut self) -> io::Result<()> {
        let (device, buffer) = (&self.devices[0], &mut self.buffer);
        self.runtime.block_on(async {
            loop {
                let len = device.recv(buffer).await?;
                let packet = &mut buffer[..len];
                match turn_around(packet) {
                    Reply::Send => drop(device.send(packet).await?),
                    Reply::Ignore => {}
                    Reply::Stop => return Ok(()),
                }
            }
        })
    }

    fn serve(&mut self, each: &mut dyn FnMut(&[u8], u64), over: &AtomicBool) -> io::Result<()> {
        let (device, buffer) = (&self.devices[0], &mut self.buffer);
        self.runtime.block_on(async {
            while !over.load(Ordering::Acquire) {
                let len = device.recv(buffer).await?;
                each(&buffer[..len], monotonic_ns());
            }
            Ok(())
        })
    }
}

impl Carrier for ByTokio {
    fn name(&self) -> &str {
        self.told()
    }

    fn open(&self, ends: [&Namespace; 2], device: &str) -> io::Result<Opened> {
        let offload = self.offload;
        let pair = open_both(ends, || builder(device, offload).build_sync())?;
        Ok(Box::new(move |cpu| {
            let carry: Box<dyn FnOnce() -> io::Result<()> + Send> = Box::new(move || {
                runtime()?.block_on(async {
                    let [near, far] = pair;
                    let (near, far) = (Arc::new(AsyncDevice::new(near)?), Arc::new(AsyncDevice::new(far)?));
                    let there = tokio::spawn(copy_async(Arc::clone(&near), Arc::clone(&far), offload));
                    let back = tokio::spawn(copy_async(far, near, offload));
                    for direction in [there, back] {
                        direction.await.map_err(io::Error::other)??;
                    }
                    Ok(())
                })
            });
            Ok(Box::new(CarryingThreads::start(cpu, vec![carry])?) as Box<dyn Carrying>)
        }))
    }
}

async fn copy_async(from: Arc<AsyncDevice>, to: Arc<AsyncDevice>, offload: bool) -> io::Result<()> {
    if offload {
        let mut segments = Segments::new();
        loop {
            let Segments { whole, parts, lens, .. } = &mut segments;
            let count = from.recv_multiple(whole, parts, lens, VIRTIO_NET_HDR_LEN).await?;
            segments.cut(count);
            let sent = to
                .send_multiple(&mut segments.table, &mut segments.parts[..count], VIRTIO_NET_HDR_LEN)
                .await;
            gone(sent)?;
            segments.restore(count);
        }
    }
    let mut buffer = vec![0; BUFFER_LEN];
    loop {
        let len = from.recv(&mut buffer).await?;
        gone(to.send(&buffer[..len]).await)?;
    }
}

/// What the device refuses is dropped, as it would be on any wire; that it is gone ends the loop.
fn gone(sent: io::Result<usize>) -> io::Result<()> {
    match sent {
        Err(error) if error.raw_os_error() == Some(libc::EBADFD) => Err(error),
        _ => Ok(()),
    }
}

/// Offload mode, a thread per direction: superpackets are split by `recv_multiple` and put together again by `send_multiple`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ByOffload;

impl Carrier for ByOffload {
    fn name(&self) -> &str {
        "tun-rs sync, offload"
    }

    fn open(&self, ends: [&Namespace; 2], device: &str) -> io::Result<Opened> {
        let pair = Arc::new(open_both(ends, || builder(device, true).build_sync())?);
        Ok(Box::new(move |cpu| {
            let other = Arc::clone(&pair);
            let loops: Vec<Box<dyn FnOnce() -> io::Result<()> + Send>> = vec![
                Box::new(move || copy_multiple(&pair[0], &pair[1])),
                Box::new(move || copy_multiple(&other[1], &other[0])),
            ];
            Ok(Box::new(CarryingThreads::start(cpu, loops)?) as Box<dyn Carrying>)
        }))
    }
}

fn copy_multiple(from: &SyncDevice, to: &SyncDevice) -> io::Result<()> {
    let mut segments = Segments::new();
    loop {
        let Segments { whole, parts, lens, .. } = &mut segments;
        let count = from.recv_multiple(whole, parts, lens, VIRTIO_NET_HDR_LEN)?;
        segments.cut(count);
        gone(to.send_multiple(&mut segments.table, &mut segments.parts[..count], VIRTIO_NET_HDR_LEN))?;
        segments.restore(count);
    }
}

/// What `recv_multiple` and `send_multiple` want, as tun-rs's documentation has it.
struct Segments {
    whole: Vec<u8>,
    parts: Vec<Vec<u8>>,
    lens: Vec<usize>,
    table: GROTable,
}

impl Segments {
    /// Room for a segment behind a header.
    const PART: usize = VIRTIO_NET_HDR_LEN + BUFFER_LEN;
    /// Room for the greatest packet that segments can be put together to.
    const WHOLE: usize = VIRTIO_NET_HDR_LEN + 65_535;

    fn new() -> Self {
        let part = || {
            let mut part = Vec::with_capacity(Self::WHOLE);
            part.resize(Self::PART, 0);
            part
        };
        Self {
            whole: vec![0; Self::WHOLE],
            parts: (0..IDEAL_BATCH_SIZE).map(|_| part()).collect(),
            lens: vec![0; IDEAL_BATCH_SIZE],
            table: GROTable::default(),
        }
    }

    fn cut(&mut self, count: usize) {
        for (part, len) in self.parts[..count].iter_mut().zip(&self.lens) {
            part.truncate(VIRTIO_NET_HDR_LEN + len);
        }
    }

    fn restore(&mut self, count: usize) {
        for part in &mut self.parts[..count] {
            part.resize(Self::PART, 0);
        }
    }
}
