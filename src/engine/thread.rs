//! The thread of one worker: its round, and its end.

use std::any::Any;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use crossbeam_channel::Receiver;

use super::control::Command;
use super::events::Event;
use super::handler::Handler;
use super::report::{WorkerEnd, WorkerReport};
use super::shared::Shared;
use crate::buf::Batch;
use crate::queue::Changed;
use crate::worker::{Detached, DeviceNews, PortId, Worker};

#[cfg(feature = "metrics")]
use super::histograms::Histograms;

/// A worker with all that its thread needs besides the handler.
pub(super) struct Thread<H> {
    pub(super) number: usize,
    pub(super) name: String,
    pub(super) worker: Worker,
    pub(super) commands: Receiver<Command<H>>,
    pub(super) batch: Batch,
    pub(super) shared: Arc<Shared>,
    /// Of the times that workers were asked to look at their devices' settings, those that this one
    /// did.
    pub(super) looked: u64,
    /// Ports whose buffers are too short for their device's MTU, as reported, and that MTU.
    pub(super) too_short: Vec<(PortId, Option<u32>)>,
    #[cfg(feature = "metrics")]
    pub(super) histograms: Option<Box<Histograms>>,
}

/// Packets that are taken out of a port at the end, so that they can be counted.
const MOST_UNDELIVERED: u64 = 4096;

impl<H: Handler> Thread<H> {
    /// Serves until the engine stops or the handler panics, and closes everything.
    pub(super) fn run(mut self, mut handler: H) -> WorkerReport {
        let served = catch_unwind(AssertUnwindSafe(|| {
            self.serve(&mut handler)?;
            handler.stopping(&mut self.worker);
            self.batch.clear();
            io::Result::Ok(())
        }));
        let failure = match served {
            Ok(Ok(())) => None,
            Ok(Err(error)) => Some(format!("the kernel refuses to wait: {error}")),
            Err(panic) => Some(format!("the handler panicked: {}", message(&*panic))),
        };
        if failure.is_some() {
            self.shared.worker_failing();
        }
        let ports = self.worker.stats().ports.into_iter().map(|port| port.name);
        let ports = ports.collect();
        // Before it is reported: the queues, so that their flows go elsewhere.
        let undelivered = self.take_rest();
        let stats = self.worker.stats();
        let closed = self.worker.close();
        if let Some(why) = &failure {
            self.shared.worker_failed(self.number, why);
        }
        // Who waits for a command is not kept waiting by the handler's destructor.
        let commands = self.commands;
        // Destructors may fail as well, and what the handler holds outlives the worker without harm.
        let dropped = catch_unwind(AssertUnwindSafe(move || drop(commands)))
            .and(catch_unwind(AssertUnwindSafe(move || drop(handler))));
        let failure = failure.or_else(|| {
            let why = format!("a destructor panicked: {}", message(&*dropped.err()?));
            self.shared.worker_failed(self.number, &why);
            Some(why)
        });
        let end = match (closed, failure) {
            (false, _) => WorkerEnd::Leaked,
            (true, Some(why)) => WorkerEnd::Failed(why),
            (true, None) => WorkerEnd::Clean,
        };
        WorkerReport {
            ports,
            ..WorkerReport::new(&self.name, end, undelivered, &stats)
        }
    }

    fn serve(&mut self, handler: &mut H) -> io::Result<()> {
        loop {
            let wake = self.worker.wait(handler.deadline())?;
            if wake.stopped {
                // Mostly it knows; not if this worker alone was stopped, by its own waker.
                self.shared.stop();
                return Ok(());
            }
            if wake.woken {
                self.obey(handler);
                self.look_at_devices();
            }
            while let Some(port) = self.worker.next_ready() {
                match self.worker.try_recv_many(port, &mut self.batch) {
                    Ok(0) => {}
                    Ok(_) => self.hand_over(handler, port),
                    Err(error) if error.is_permanent() => self.forget(handler, port),
                    Err(error) => handler.trouble(&mut self.worker, port, &error),
                }
            }
            if wake.timer {
                handler.timer(&mut self.worker);
            }
            handler.flush(&mut self.worker);
            if let Some((device, news)) = self.worker.device_news() {
                self.shared.events.send(match news {
                    DeviceNews::GivenUp(passes) => Event::OffloadsRefused { device, passes },
                    DeviceNews::Changed(Changed {
                        header,
                        offloads,
                        blocking,
                    }) => Event::SetBack {
                        device,
                        header,
                        offloads,
                        blocking,
                    },
                });
            }
        }
    }

    #[cfg(not(feature = "metrics"))]
    fn hand_over(&mut self, handler: &mut H, port: PortId) {
        handler.packets(&mut self.worker, port, &mut self.batch);
        self.batch.clear();
    }

    #[cfg(feature = "metrics")]
    fn hand_over(&mut self, handler: &mut H, port: PortId) {
        let Some(histograms) = &mut self.histograms else {
            handler.packets(&mut self.worker, port, &mut self.batch);
            self.batch.clear();
            return;
        };
        let packets = self.batch.len();
        let start = std::time::Instant::now();
        handler.packets(&mut self.worker, port, &mut self.batch);
        self.batch.clear();
        histograms.record(packets, start - self.worker.now(), start.elapsed());
    }

    /// Carries out the commands that are there by now; those that come meanwhile wake the worker again.
    fn obey(&mut self, handler: &mut H) {
        for _ in 0..self.commands.len() {
            match self.commands.try_recv() {
                Ok(Command::Run(work)) => work(handler, &mut self.worker),
                #[cfg(feature = "metrics")]
                Ok(Command::Histograms(reply)) => {
                    // Whoever asked may have given up.
                    let _ = reply.send(self.histograms.clone());
                }
                Err(_) => return,
            }
        }
    }

    /// The settings of a device were changed: gives its ports buffers that are long enough, and
    /// sets back what only this side may change.
    fn look_at_devices(&mut self) {
        let looks = self.shared.looks();
        if std::mem::replace(&mut self.looked, looks) == looks {
            return;
        }
        let ports: Vec<PortId> = self.worker.ports().collect();
        for port in ports {
            // It is there, and has something to say only if it was changed.
            let _ = self.worker.restore(port);
            let fits = self.worker.fit(port).is_ok();
            let Some(queue) = self.worker.queue(port) else {
                continue;
            };
            let short = (port, queue.mtu_now());
            let reported = self.too_short.contains(&short);
            self.too_short.retain(|&(other, _)| other != port);
            if fits {
                continue;
            }
            self.too_short.push(short);
            // Once for each MTU, whatever else is changed on whatever device.
            if !reported && let Some(info) = self.worker.port_info(port) {
                self.shared.events.send(Event::BuffersTooShort {
                    device: queue.current_name().unwrap_or_else(|_| queue.name().to_owned()),
                    worker: self.number,
                    longest: info.longest,
                });
            }
        }
    }

    /// A port's device or sender is gone.
    fn forget(&mut self, handler: &mut H, port: PortId) {
        let device = self
            .worker
            .queue(port)
            .map(|queue| (Arc::clone(queue.mark()), queue.name().to_owned()));
        // If it cannot be detached, it stays and is silent: the end was told.
        if self.worker.detach(port).is_ok() {
            handler.detached(&mut self.worker, port);
        }
        if let Some((mark, name)) = device {
            self.shared.device_gone(&mark, &name);
        }
    }

    /// Takes out what nobody has seen, and counts it.
    fn take_rest(&mut self) -> u64 {
        let mut undelivered = self.batch.len() as u64;
        drop(self.batch.drain());
        let ports: Vec<PortId> = self.worker.ports().collect();
        for port in ports {
            let mut taken = 0;
            while taken < MOST_UNDELIVERED
                && let Ok(packets @ 1..) = self.worker.try_recv_many(port, &mut self.batch)
            {
                taken += packets as u64;
                drop(self.batch.drain());
            }
            undelivered += taken;
            if let Ok(Detached { undelivered: rest, .. }) = self.worker.detach(port) {
                undelivered += rest.len() as u64;
            }
        }
        undelivered
    }
}

/// What a panic said.
pub(super) fn message(panic: &(dyn Any + Send)) -> String {
    match (panic.downcast_ref::<&str>(), panic.downcast_ref::<String>()) {
        (Some(text), _) => (*text).to_owned(),
        (_, Some(text)) => text.clone(),
        _ => "without a message".to_owned(),
    }
}
