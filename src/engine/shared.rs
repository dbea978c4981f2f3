//! What the threads of an engine share. Nothing here is on the data path.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::events::{Event, EventSender};
use super::report::{Ended, OnPanic, WorkerReport};
use crate::queue::SharedOffloads;
use crate::worker::Waker;

#[derive(Debug)]
pub(super) struct Shared {
    pub(super) events: EventSender,
    pub(super) on_panic: OnPanic,
    wakers: Vec<Waker>,
    /// How often the workers were asked to look at their devices' settings.
    looks: AtomicU64,
    /// The engine closes its devices: that they go is no news.
    ending: AtomicBool,
    /// The devices that the engine has or had queues of.
    devices: Mutex<Vec<Known>>,
    causes: Mutex<Causes>,
    news: Condvar,
}

/// A device of the engine.
#[derive(Debug)]
struct Known {
    /// See [`Device::mark`](crate::device::Device::mark). Held, so that no other device gets the
    /// same.
    mark: Arc<SharedOffloads>,
    /// Its newest name, once the watch found another one than it had at first.
    name: Option<String>,
    /// That it is gone was reported.
    gone: bool,
}

/// What ends a wait.
#[derive(Debug, Default)]
struct Causes {
    untold: VecDeque<Ended>,
    stopped: bool,
    /// What became of each worker that has ended.
    reports: Vec<Option<WorkerReport>>,
}

impl Shared {
    pub(super) fn new(events: EventSender, on_panic: OnPanic, wakers: Vec<Waker>) -> Self {
        let causes = Causes {
            reports: vec![None; wakers.len()],
            ..Causes::default()
        };
        Self {
            events,
            on_panic,
            wakers,
            looks: AtomicU64::new(0),
            ending: AtomicBool::new(false),
            devices: Mutex::new(Vec::new()),
            causes: Mutex::new(causes),
            news: Condvar::new(),
        }
    }

    pub(super) fn waker(&self, worker: usize) -> Option<&Waker> {
        self.wakers.get(worker)
    }

    /// Asks all workers to stop.
    pub(super) fn stop(&self) {
        self.ending.store(true, Ordering::Release);
        self.wakers.iter().for_each(Waker::stop);
        if !std::mem::replace(&mut self.causes().stopped, true) {
            self.events.send(Event::Stopping);
        }
        self.news.notify_all();
    }

    /// Asks all workers to look at their devices' settings.
    pub(super) fn look_at_devices(&self) {
        // Release: a worker that sees it asks the kernel after the change that is meant.
        self.looks.fetch_add(1, Ordering::Release);
        self.wakers.iter().for_each(Waker::wake);
    }

    /// How often they were asked.
    pub(super) fn looks(&self) -> u64 {
        self.looks.load(Ordering::Acquire)
    }

    /// Whether the engine meets this device for the first time.
    pub(super) fn is_new_device(&self, mark: &Arc<SharedOffloads>) -> bool {
        let mut devices = self.devices();
        let is_new = devices.iter().all(|known| !Arc::ptr_eq(&known.mark, mark));
        if is_new {
            // Of those that only this list remembers, neither queue nor handle is left.
            devices.retain(|known| Arc::strong_count(&known.mark) > 1);
            devices.push(Known {
                mark: Arc::clone(mark),
                name: None,
                gone: false,
            });
        }
        is_new
    }

    /// The watch found a device under another name.
    pub(super) fn device_renamed(&self, mark: &Arc<SharedOffloads>, name: &str) {
        let mut devices = self.devices();
        if let Some(known) = devices.iter_mut().find(|known| Arc::ptr_eq(&known.mark, mark)) {
            known.name = Some(name.to_owned());
        }
    }

    /// A device is gone: reported once, by the first that finds out.
    pub(super) fn device_gone(&self, mark: &Arc<SharedOffloads>, name: &str) {
        if self.ending.load(Ordering::Acquire) {
            return;
        }
        self.is_new_device(mark);
        let device = {
            let mut devices = self.devices();
            let Some(known) = devices.iter_mut().find(|known| Arc::ptr_eq(&known.mark, mark)) else {
                return;
            };
            if std::mem::replace(&mut known.gone, true) {
                return;
            }
            known.name.clone().unwrap_or_else(|| name.to_owned())
        };
        self.events.send(Event::Gone { device: device.clone() });
        self.tell(Ended::DeviceGone { device });
    }

    /// A device was moved to another namespace.
    pub(super) fn device_moved(&self, name: &str, watched: bool) {
        if !self.ending.load(Ordering::Acquire) {
            self.events.send(Event::Moved {
                device: name.to_owned(),
                watched,
            });
        }
    }

    /// A worker is about to close its queues and sockets because it cannot go on.
    pub(super) fn worker_failing(&self) {
        if self.on_panic == OnPanic::Stop {
            self.ending.store(true, Ordering::Release);
        }
    }

    /// A worker could not go on; its queues and sockets are closed.
    pub(super) fn worker_failed(&self, worker: usize, why: &str) {
        self.events.send(Event::WorkerFailed {
            worker,
            why: why.to_owned(),
        });
        self.tell(Ended::WorkerFailed {
            worker,
            why: why.to_owned(),
        });
        if self.on_panic == OnPanic::Stop {
            self.stop();
        }
    }

    /// The last word of a worker's thread.
    pub(super) fn worker_ended(&self, worker: usize, report: WorkerReport) {
        if let Some(place) = self.causes().reports.get_mut(worker) {
            *place = Some(report);
        }
        self.news.notify_all();
    }

    /// Waits until all workers but one have ended, at most until `deadline`. Returns what is known by then.
    pub(super) fn wait_for_ends(&self, deadline: Option<Instant>, but: Option<usize>) -> Vec<Option<WorkerReport>> {
        let ends = |causes: &mut Causes| {
            let mut reports = causes.reports.iter().enumerate();
            reports
                .all(|(worker, report)| report.is_some() || Some(worker) == but)
                .then_some(())
        };
        self.wait_until(deadline, ends);
        self.causes().reports.clone()
    }

    /// Waits for the next cause, at most until `deadline`.
    pub(super) fn wait(&self, deadline: Option<Instant>) -> Option<Ended> {
        self.wait_until(deadline, |causes| {
            let untold = causes.untold.pop_front();
            untold.or_else(|| causes.stopped.then_some(Ended::Stopped))
        })
    }

    fn wait_until<T>(&self, deadline: Option<Instant>, mut found: impl FnMut(&mut Causes) -> Option<T>) -> Option<T> {
        let mut causes = self.causes();
        loop {
            if let Some(found) = found(&mut causes) {
                return Some(found);
            }
            let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
            causes = match left {
                Some(Duration::ZERO) => return None,
                Some(left) => self
                    .news
                    .wait_timeout(causes, left)
                    .map(|(causes, _)| causes)
                    .unwrap_or_else(|poisoned| poisoned.into_inner().0),
                None => self.news.wait(causes).unwrap_or_else(PoisonError::into_inner),
            };
        }
    }

    fn tell(&self, cause: Ended) {
        self.causes().untold.push_back(cause);
        self.news.notify_all();
    }

    fn devices(&self) -> MutexGuard<'_, Vec<Known>> {
        self.devices.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn causes(&self) -> MutexGuard<'_, Causes> {
        // Nothing that is done under the lock leaves it half done.
        self.causes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
