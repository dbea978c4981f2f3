//! tun_driver with a thread per direction, as the loops that block have it.

use std::io;
use std::os::fd::AsFd;

use tun_driver::lab::Namespace;
use tun_driver::lab::wire::{CUT, Carrier, Carrying, CarryingThreads, Opened, open_both, pass_on};
use tun_driver::{Backend, Batch, Builder, Mode, MultiQueue, Offloads, Queue, Wait, Worker, WorkerConfig};

/// A worker per direction: it receives from one device's queue, and sends by a copy of the other queue's descriptor, which it never reads.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ByTwoWorkers {
    pub(crate) name: &'static str,
    pub(crate) backend: Backend,
    pub(crate) wait: Wait,
    pub(crate) offloads: Offloads,
    /// Superpackets are cut before they are sent, so that they have to be merged again.
    pub(crate) cut: bool,
}

/// A device's only queue, and a second handle of it to send by.
struct End {
    receive: Queue,
    send: Queue,
}

impl End {
    fn open(name: &str, offloads: Offloads) -> io::Result<Self> {
        let missing = || io::Error::other("a device without queue");
        let receive = Builder::new(name, Mode::Tun)
            .offloads(offloads)
            .open()?
            .into_queues()
            .pop()
            .ok_or_else(missing)?;
        let copy = receive.as_fd().try_clone_to_owned()?;
        let send = MultiQueue::from_fds_with_offloads(vec![copy], offloads)?
            .into_queues()
            .pop()
            .ok_or_else(missing)?;
        Ok(Self { receive, send })
    }
}

impl Carrier for ByTwoWorkers {
    fn name(&self) -> &str {
        self.name
    }

    fn open(&self, ends: [&Namespace; 2], device: &str) -> io::Result<Opened> {
        let [near, far] = open_both(ends, || End::open(device, self.offloads))?;
        let config = WorkerConfig {
            backend: Some(self.backend),
            wait: self.wait,
            ..WorkerConfig::default()
        };
        let cut = self.cut;
        Ok(Box::new(move |cpu| {
            let there = direction(config.clone(), near.receive, far.send, cut);
            let back = direction(config, far.receive, near.send, cut);
            Ok(Box::new(CarryingThreads::start(cpu, vec![there, back])?) as Box<dyn Carrying>)
        }))
    }
}

fn direction(config: WorkerConfig, from: Queue, to: Queue, cut: bool) -> Box<dyn FnOnce() -> io::Result<()> + Send> {
    Box::new(move || {
        let mut worker = Worker::new(&config)?;
        let (from, to) = (worker.attach(from)?, worker.attach(to)?);
        let mut batch = Batch::with_capacity(64);
        let mut whole = cut.then(|| Batch::with_capacity(CUT));
        loop {
            worker.recv_many(from, &mut batch)?;
            let stopped = pass_on(&mut worker, to, &mut batch, whole.as_mut());
            // What could not be sent is dropped, as it would be on any wire.
            batch.clear();
            if let Some(error) = stopped.filter(|error| error.is_permanent()) {
                return Err(error.into());
            }
        }
    })
}
