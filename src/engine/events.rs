//! What happens to an engine's devices and workers, told to who wants to know.

use std::fmt;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use crossbeam_channel::{Receiver, Sender, TrySendError};

use super::shared::Shared;
use crate::device::Device;
use crate::offload::Offloads;
use crate::queue::Queue;
use crate::sys::fd;
use crate::sys::notices::{self, Departure};

/// Something that happened to an engine.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Event {
    /// A device was set up.
    Up {
        /// What it is called.
        device: String,
    },
    /// A device was set down: nothing comes, sending fails with [`PortErrorKind::Down`](crate::PortErrorKind::Down).
    Down {
        /// What it is called.
        device: String,
    },
    /// A device's MTU was changed. Its ports take larger buffers if they need them; if they cannot,
    /// [`BuffersTooShort`](Self::BuffersTooShort) follows.
    MtuChanged {
        /// What it is called.
        device: String,
        /// The new MTU in bytes.
        mtu: u32,
    },
    /// A device's MTU lets packets come that are longer than the buffers of a worker: they are
    /// dropped and counted as truncated. Raise
    /// [`WorkerConfig::large_buffers`](crate::WorkerConfig::large_buffers), or lower the MTU.
    BuffersTooShort {
        /// What the device is called.
        device: String,
        /// Which worker it is.
        worker: usize,
        /// The longest packet that its port takes, in bytes.
        longest: usize,
    },
    /// Another holder of a device changed the size of its virtio-net header, switched on offloads
    /// that were not granted here, or made a queue's descriptor blocking. This was set back. What
    /// came in between in the wrong shape was dropped and counted
    /// ([`Counters::bad_headers`](crate::Counters::bad_headers)).
    SetBack {
        /// What the device is called.
        device: String,
        /// The size of the header that was found, in bytes, if it was not ten.
        header: Option<u32>,
        /// The offloads that were found, if there were more than granted.
        offloads: Option<Offloads>,
        /// The descriptor was blocking (`O_NONBLOCK` belongs to the open file, which copies of a
        /// descriptor share).
        blocking: bool,
    },
    /// A device was deleted. Its ports are detached.
    Gone {
        /// What it was called.
        device: String,
    },
    /// A device was moved to another network namespace, where it is down and has no addresses at
    /// first. Its ports go on.
    Moved {
        /// What it was called.
        device: String,
        /// Whether its further changes are reported, which takes CAP_NET_ADMIN and CAP_SYS_ADMIN
        /// over the other namespace, and keeps that namespace alive until the engine stops or the
        /// device is gone. That it is deleted is reported in any case.
        watched: bool,
    },
    /// A worker's handler panicked, or the worker could not go on. Its queues and sockets are closed.
    WorkerFailed {
        /// Which one.
        worker: usize,
        /// The message of the panic, or the error.
        why: String,
    },
    /// The kernel refuses superpackets of a device in spite of what it granted. They go in pieces from now on, and nothing was lost.
    OffloadsRefused {
        /// What the device is called.
        device: String,
        /// What the worker that found out still passes on.
        passes: Offloads,
    },
    /// The engine was asked to stop, or stops because a worker failed. Told once; workers may still fail while they stop.
    Stopping,
}

impl fmt::Display for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Up { device } => write!(f, "{device} is up"),
            Self::Down { device } => write!(f, "{device} is down"),
            Self::MtuChanged { device, mtu } => write!(f, "{device} has an MTU of {mtu} bytes now"),
            Self::BuffersTooShort {
                device,
                worker,
                longest,
            } => {
                write!(
                    f,
                    "worker {worker} takes at most {longest} bytes from {device}, and drops the longer packets that its MTU allows; \
                     raise WorkerConfig::large_buffers or lower the MTU"
                )
            }
            Self::SetBack {
                device,
                header,
                offloads,
                blocking,
            } => {
                write!(f, "another holder of {device} changed")?;
                let mut and = "";
                if let Some(header) = header {
                    write!(f, " its header to {header} bytes")?;
                    and = " and";
                }
                if let Some(offloads) = offloads {
                    write!(f, "{and} its offloads to {offloads}")?;
                    and = " and";
                }
                if *blocking {
                    write!(f, "{and} a descriptor to blocking")?;
                }
                f.write_str("; this was set back, keep other programs from it")
            }
            Self::Gone { device } => write!(f, "{device} is gone"),
            Self::Moved { device, watched } => {
                let outlook = if *watched { "still watched" } else { "no longer watched" };
                write!(f, "{device} was moved to another network namespace; {outlook}")
            }
            Self::OffloadsRefused { device, passes } => {
                write!(
                    f,
                    "the kernel refuses superpackets of {device}; passed on from now on: {passes}"
                )
            }
            Self::WorkerFailed { worker, why } => write!(f, "worker {worker} failed: {why}"),
            Self::Stopping => f.write_str("the engine stops"),
        }
    }
}

/// Events that nobody took are kept up to that many; then the oldest are dropped.
const KEPT: usize = 1024;

/// The events of an engine, in order. Made by [`Engine::events`](crate::Engine::events); clones share the same events.
#[derive(Clone, Debug)]
pub struct Events(Receiver<Event>);

impl Events {
    pub(super) fn channel() -> (EventSender, Self) {
        let (sender, receiver) = crossbeam_channel::bounded(KEPT);
        (
            EventSender(Mutex::new(Some((sender, receiver.clone())))),
            Self(receiver),
        )
    }

    /// The next event; waits for it. `None` once the engine is gone and all events were taken.
    pub fn next(&self) -> Option<Event> {
        self.0.recv().ok()
    }

    /// The next event, if there is one by now.
    pub fn try_next(&self) -> Option<Event> {
        self.0.try_recv().ok()
    }

    /// The next event; waits for it, but not longer.
    pub fn next_within(&self, bound: Duration) -> Option<Event> {
        self.0.recv_timeout(bound).ok()
    }
}

impl Iterator for Events {
    type Item = Event;

    fn next(&mut self) -> Option<Event> {
        Events::next(self)
    }
}

/// `None` once the engine is gone: stoppers and stuck workers outlive it, and must not keep those waiting that listen.
#[derive(Debug)]
pub(super) struct EventSender(Mutex<Option<(Sender<Event>, Receiver<Event>)>>);

impl EventSender {
    pub(super) fn send(&self, event: Event) {
        let row = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let Some((sender, receiver)) = &*row else { return };
        if let Err(TrySendError::Full(event)) = sender.try_send(event) {
            // Nobody has listened for a long time, and nobody waits for them: the oldest makes room. Only this thread sends meanwhile.
            let _ = receiver.try_recv();
            let _ = sender.try_send(event);
        }
    }

    /// Nothing more will happen.
    pub(super) fn close(&self) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }
}

/// The thread that watches the devices' settings.
#[derive(Debug)]
pub(super) struct Watch {
    control: Arc<WatchControl>,
    thread: Option<JoinHandle<()>>,
}

/// What the engine and the watch share.
#[derive(Debug)]
struct WatchControl {
    over: AtomicBool,
    /// To be watched too.
    joining: Mutex<Vec<Watched>>,
    bell: OwnedFd,
}

/// Asks the queues of a device what became of it. `None` if no worker that has one answers in time.
pub(super) type Ask = Box<dyn Fn(&Device) -> Option<Answer> + Send>;

/// What a queue says of its device.
pub(super) enum Answer {
    /// It is not there any more.
    Deleted,
    /// It lives; with a handle for it where it is now, if that can be had.
    Lives(Option<Device>),
}

impl Answer {
    /// Asked on the worker's thread.
    pub(super) fn of(queue: &Queue, device: &Device) -> Self {
        match queue.current_name() {
            Err(error) if error.raw_os_error() == Some(libc::EBADFD) => Self::Deleted,
            _ => Self::Lives(device.follow(queue).ok()),
        }
    }
}

/// A device under watch.
#[derive(Debug)]
struct Watched {
    device: Device,
    notices: OwnedFd,
    name: String,
    up: bool,
    mtu: u32,
}

/// What there is to do with a device after a look at it.
enum Look {
    Stays,
    /// It is not where it was.
    Left,
}

impl Watch {
    /// Watches these devices, and those added later, until it is dropped.
    pub(super) fn start(devices: Vec<Device>, shared: Arc<Shared>, ask: Ask) -> io::Result<Self> {
        let control = Arc::new(WatchControl {
            over: AtomicBool::new(false),
            joining: Mutex::default(),
            bell: fd::eventfd()?,
        });
        let mut watched = Vec::new();
        let mut refusal = None;
        for device in devices {
            // One that cannot be listened to is not watched, as in `add`; the others are.
            if shared.is_new_device(device.mark()) {
                match Watched::new(device) {
                    Ok(device) => watched.push(device),
                    Err(error) => refusal = Some(error),
                }
            }
        }
        if watched.is_empty()
            && let Some(error) = refusal
        {
            return Err(error);
        }
        let with_thread = Arc::clone(&control);
        let thread = thread::Builder::new()
            .name("tun-events".to_owned())
            .spawn(move || watch(&with_thread, watched, &shared, &ask))?;
        Ok(Self {
            control,
            thread: Some(thread),
        })
    }

    /// Watches one more device, unless it is under watch already: what changes after this call is
    /// reported.
    pub(super) fn add(&self, device: Device, shared: &Shared) {
        if !shared.is_new_device(device.mark()) {
            return;
        }
        // One that cannot be listened to is not watched; the data path finds out when it is gone.
        let Ok(watched) = Watched::new(device) else {
            return;
        };
        let mut joining = self.control.joining.lock().unwrap_or_else(PoisonError::into_inner);
        joining.push(watched);
        drop(joining);
        fd::eventfd_ring(self.control.bell.as_fd());
    }
}

impl Watch {
    /// Ends it soon, and lets go of the namespaces that it watches in.
    pub(super) fn end(&self) {
        self.control.over.store(true, Ordering::Release);
        fd::eventfd_ring(self.control.bell.as_fd());
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.end();
        if let Some(thread) = self.thread.take() {
            // It cannot panic, and if it did nothing is lost.
            let _ = thread.join();
        }
    }
}

fn watch(control: &WatchControl, mut devices: Vec<Watched>, shared: &Shared, ask: &Ask) {
    let mut poll_set: Vec<libc::pollfd> = Vec::new();
    while !control.over.load(Ordering::Acquire) {
        devices.append(&mut control.joining.lock().unwrap_or_else(PoisonError::into_inner));
        devices = devices
            .into_iter()
            .filter_map(|mut watched| match watched.look(shared) {
                Look::Stays => Some(watched),
                Look::Left => watched.leave(shared, ask),
            })
            .collect();
        poll_set.clear();
        let fds = std::iter::once(&control.bell).chain(devices.iter().map(|watched| &watched.notices));
        poll_set.extend(fds.map(|fd| libc::pollfd {
            fd: fd.as_raw_fd(),
            events: libc::POLLIN,
            revents: 0,
        }));
        if fd::poll(&mut poll_set, None).is_err() {
            return;
        }
        fd::eventfd_reset(control.bell.as_fd());
        for watched in &devices {
            notices::discard(watched.notices.as_fd());
        }
    }
}

impl Watched {
    fn new(device: Device) -> io::Result<Self> {
        // First the notices, then the state, so that no change falls in between.
        let notices = device.in_its_namespace(notices::of_links)??;
        Ok(Self {
            name: device.current_name()?,
            up: device.is_up()?,
            mtu: device.mtu()?,
            notices,
            device,
        })
    }

    /// Compares what the kernel says now with what it said before.
    fn look(&mut self, shared: &Shared) -> Look {
        let ask = || io::Result::Ok((self.device.current_name()?, self.device.is_up()?, self.device.mtu()?));
        let (name, up, mtu) = match ask() {
            Ok(answers) => answers,
            Err(_) => {
                // Its index does not change with its name, so this is no matter of a rename.
                let error = self.device.current_name().err();
                let left = error.is_some_and(|error| error.raw_os_error() == Some(libc::ENODEV));
                return if left { Look::Left } else { Look::Stays };
            }
        };
        if name != self.name {
            self.name = name;
            shared.device_renamed(self.device.mark(), &self.name);
        }
        let grew = mtu > self.mtu;
        if mtu != self.mtu {
            self.mtu = mtu;
            shared.events.send(Event::MtuChanged {
                device: self.name.clone(),
                mtu,
            });
        }
        if up != self.up {
            self.up = up;
            let device = self.name.clone();
            shared.events.send(if up {
                Event::Up { device }
            } else {
                Event::Down { device }
            });
        }
        let offloads = self.device.active_offloads().unwrap_or_default();
        // After the event, which is the cause of what the workers report.
        if grew || !self.device.offloads().contains(offloads) {
            shared.look_at_devices();
        }
        Look::Stays
    }

    /// The device is not where it was: reports whether it was deleted or moved. Returns how it is
    /// watched where it is now, if it may be.
    fn leave(mut self, shared: &Shared, ask: &Ask) -> Option<Self> {
        loop {
            let follower = match ask(&self.device) {
                Some(Answer::Lives(follower)) => follower,
                // No queue is left to be asked, or its worker is stuck: the kernel's notice says
                // what it was.
                None if self.departure() == Departure::Moved => None,
                Some(Answer::Deleted) | None => {
                    shared.device_gone(self.device.mark(), &self.name);
                    return None;
                }
            };
            let follower = follower.and_then(|device| Self::new(device).ok());
            shared.device_moved(&self.name, follower.is_some());
            let mut follower = follower?;
            shared.device_renamed(follower.device.mark(), &follower.name);
            // What changed on the way is compared with what was known before.
            (follower.up, follower.mtu) = (self.up, self.mtu);
            match follower.look(shared) {
                Look::Stays => return Some(follower),
                Look::Left => self = follower,
            }
        }
    }

    /// The kernel takes a link out of its tables a moment before it sends the notice.
    fn departure(&self) -> Departure {
        for _ in 0..100 {
            if let Ok(Some(departure)) = self.device.departed() {
                return departure;
            }
            thread::sleep(Duration::from_millis(1));
        }
        Departure::Deleted
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_nobody_takes_makes_room_for_what_is_new() {
        let (sender, events) = Events::channel();
        for mtu in 0..KEPT as u32 {
            let device = "e0".to_owned();
            sender.send(Event::MtuChanged { device, mtu });
        }
        sender.send(Event::Stopping);
        sender.close();
        sender.send(Event::Stopping);
        let kept: Vec<Event> = events.collect();
        assert_eq!(kept.len(), KEPT);
        assert!(matches!(kept[0], Event::MtuChanged { mtu: 1, .. }));
        assert_eq!(kept[KEPT - 1], Event::Stopping);
    }
}
