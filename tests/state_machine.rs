//! A device with its queues and a worker against a model: any sequence of acts, on real devices,
//! checked after every step.
//!
//! The model knows what tun.c does with its queues: an enabled one has a number, and one that is
//! disabled or closed gives its number to the last. A flow that was written to through a queue
//! comes back on the queue that has that number.

mod common;
mod device;

use std::collections::HashMap;
use std::net::UdpSocket;
use std::os::fd::AsFd;
use std::panic;
use std::thread;
use std::time::{Duration, Instant};

use common::{again, need_backend, repeats, trial};
use device::{try_read, udp_packet, udp_payload, write};
use proptest::prelude::*;
use proptest::test_runner::{Config, TestCaseError, TestError, TestRunner};
use tun_driver::lab::{Namespace, Sandbox, sysctl};
use tun_driver::netlink::Handle;
use tun_driver::{
    Backend, Batch, Builder, Device, Mode, PortErrorKind, PortId, Queue, Worker, WorkerConfig, leaked_arenas,
};

fn main() {
    // T10
    let trials = [Backend::IoUring, Backend::Syscalls].map(|backend| {
        trial(
            format!("any sequence of acts leaves device, queues and worker as the model says {backend:?}"),
            move || {
                need_backend(backend);
                sequences(backend);
            },
        )
        .bound(Duration::from_secs(180))
        .alone()
    });
    common::run(trials.into());
}

/// The flows that traffic is of: a port each.
const FLOWS: usize = 4;
/// The queues to begin with.
const QUEUES: usize = 4;
const FIRST_PORT: u16 = 20_000;
/// How long anything may take that the kernel does a little later.
const PATIENCE: Duration = Duration::from_secs(20);
/// The kernel forgets a flow three seconds after the last write.
const REMEMBERED: Duration = Duration::from_secs(2);

/// One act. Numbers choose among what there is.
#[derive(Clone, Copy, Debug)]
enum Act {
    /// Opens one more queue.
    Add,
    /// Gives a queue to the worker.
    Attach(usize),
    /// Takes one from the worker.
    Detach(usize),
    /// Takes a queue out of use.
    Disable(usize),
    Enable(usize),
    /// Closes a queue, wherever it is.
    Close(usize),
    Delete,
    Up,
    Down,
    Mtu(u32),
    /// Moves the device to the other namespace.
    Move,
    Rename,
    /// The stack sends a packet of a flow through the device.
    Send(usize),
    /// A packet of a flow is written through a queue.
    Write(usize, usize),
}

fn acts() -> impl Strategy<Value = Vec<Act>> {
    let any = 0_usize..16;
    let act = prop_oneof![
        6 => Just(Act::Add),
        10 => any.clone().prop_map(Act::Attach),
        6 => any.clone().prop_map(Act::Detach),
        8 => any.clone().prop_map(Act::Disable),
        8 => any.clone().prop_map(Act::Enable),
        5 => any.clone().prop_map(Act::Close),
        1 => Just(Act::Delete),
        10 => Just(Act::Up),
        2 => Just(Act::Down),
        3 => (600_u32..1500).prop_map(Act::Mtu),
        3 => Just(Act::Move),
        3 => Just(Act::Rename),
        30 => (0..FLOWS).prop_map(Act::Send),
        30 => (any, 0..FLOWS).prop_map(|(queue, flow)| Act::Write(queue, flow)),
    ];
    prop::collection::vec(act, 1..80)
}

/// Threads share the sequences, each in its own namespaces: a sequence mostly waits for the kernel,
/// which lets readers finish (RCU) before it moves a device or closes a queue.
fn sequences(backend: Backend) {
    // Without privilege all of them would share one limit of locked memory.
    const SIDE_BY_SIDE: usize = 6;
    let threads = if common::in_initial_user_namespace() {
        SIDE_BY_SIDE
    } else {
        1
    };
    let cases = repeats(30, 5_000).div_ceil(threads) as u32;
    thread::scope(|scope| {
        let share = || {
            Sandbox::enter().expect("a namespace for this thread");
            share(backend, cases);
        };
        let shares: Vec<_> = (0..threads).map(|_| scope.spawn(share)).collect();
        for share in shares {
            share.join().unwrap_or_else(|panic| panic::resume_unwind(panic));
        }
    });
}

fn share(backend: Backend, cases: u32) {
    let places = [Place::here(), Place::there()];
    let config = Config {
        cases,
        failure_persistence: None,
        max_shrink_iters: 200,
        max_shrink_time: 60_000,
        ..Config::default()
    };
    let outcome = TestRunner::new(config).run(&acts(), |acts| {
        let mut machine = Machine::new(backend, &places);
        for (step, &act) in acts.iter().enumerate() {
            machine
                .step(act)
                .map_err(|why| TestCaseError::fail(format!("step {step}, {act:?}: {why}")))?;
        }
        machine
            .end()
            .map_err(|why| TestCaseError::fail(format!("at the end: {why}")))
    });
    match outcome {
        Ok(()) => {}
        Err(TestError::Fail(why, acts)) => panic!("{why}\nthe shortest sequence found: {acts:?}"),
        Err(error) => panic!("{error}"),
    }
}

/// A namespace that the device may be in, with its traffic.
struct Place {
    namespace: Namespace,
    netlink: Handle,
    sockets: Vec<UdpSocket>,
}

impl Place {
    fn here() -> Self {
        let _ = sysctl("net/ipv6/conf/default/disable_ipv6", 1);
        let sockets = (0..FLOWS as u16).map(|flow| {
            let socket = UdpSocket::bind(("0.0.0.0", FIRST_PORT + flow)).unwrap();
            socket.set_read_timeout(Some(PATIENCE * common::slowness())).unwrap();
            socket
        });
        Self {
            namespace: Namespace::current().unwrap(),
            netlink: Handle::new().unwrap(),
            sockets: sockets.collect(),
        }
    }

    fn there() -> Self {
        device::namespace().run(Self::here).unwrap()
    }
}

/// A queue and what the model knows of it.
struct Member {
    number: usize,
    seat: Seat,
}

enum Seat {
    /// Not with the worker.
    Held(Queue),
    Port(PortId),
}

/// The device and the model of it.
struct Machine<'a> {
    places: &'a [Place; 2],
    worker: Worker,
    batch: Batch,
    handle: Device,
    members: Vec<Member>,
    next_number: usize,
    next_packet: u32,
    /// The enabled queues by their number in the kernel.
    slots: Vec<usize>,
    disabled: Vec<usize>,
    /// Where each flow was written to last, and when.
    flows: HashMap<usize, (usize, Instant)>,
    alive: bool,
    place: usize,
    /// The handle speaks of the device where it was made.
    moved: bool,
    up: bool,
    addressed: bool,
    mtu: u32,
    name: String,
}

type Step = Result<(), String>;

macro_rules! ensure {
    ($condition:expr, $($words:tt)+) => {
        if !$condition {
            return Err(format!($($words)+));
        }
    };
}

impl<'a> Machine<'a> {
    fn new(backend: Backend, places: &'a [Place; 2]) -> Self {
        let device = Builder::new("sm0", Mode::Tun)
            .queues(QUEUES)
            .address([198, 18, 0, 1], 24)
            .up(true)
            .open()
            .unwrap();
        let config = WorkerConfig {
            backend: Some(backend),
            ..WorkerConfig::default()
        };
        let handle = device.device().unwrap().clone();
        let held = device.into_queues().into_iter().enumerate();
        let members = held.map(|(number, queue)| Member {
            number,
            seat: Seat::Held(queue),
        });
        Self {
            places,
            worker: Worker::new(&config).unwrap(),
            batch: Batch::with_capacity(64),
            handle,
            members: members.collect(),
            next_number: QUEUES,
            next_packet: 0,
            slots: (0..QUEUES).collect(),
            disabled: Vec::new(),
            flows: HashMap::new(),
            alive: true,
            place: 0,
            moved: false,
            up: true,
            addressed: true,
            mtu: 1500,
            name: "sm0".to_owned(),
        }
    }

    fn place(&self) -> &'a Place {
        &self.places[self.place]
    }

    fn index(&self) -> u32 {
        self.place().netlink.index_of(&self.name).unwrap()
    }

    fn step(&mut self, act: Act) -> Step {
        match act {
            Act::Add => self.add()?,
            Act::Attach(which) => self.attach(which)?,
            Act::Detach(which) => self.detach(which)?,
            Act::Disable(which) => self.switch(which, false)?,
            Act::Enable(which) => self.switch(which, true)?,
            Act::Close(which) => self.close(which)?,
            Act::Send(flow) => self.send(flow)?,
            Act::Write(which, flow) => self.write(which, flow)?,
            Act::Delete if self.alive => {
                self.place().netlink.delete(self.index()).unwrap();
                self.alive = false;
            }
            Act::Up | Act::Down if self.alive => self.set_up(matches!(act, Act::Up))?,
            Act::Mtu(mtu) => {
                let set = self.handle.set_mtu(mtu);
                let here = self.alive && !self.moved;
                ensure!(set.is_ok() == here, "set_mtu gave {set:?}");
                if here {
                    self.mtu = mtu;
                }
            }
            Act::Move if self.alive => {
                let to = 1 - self.place;
                let there = self.places[to].namespace.as_fd();
                self.place().netlink.move_to_namespace(self.index(), there).unwrap();
                (self.place, self.moved, self.up, self.addressed) = (to, true, false, false);
            }
            // One that is up keeps its name before Linux 6.2.
            Act::Rename if self.alive && (!self.up || common::kernel() >= (6, 2)) => {
                let name = if self.name == "sm0" { "sm1" } else { "sm0" };
                self.place().netlink.rename(self.index(), name).unwrap();
                name.clone_into(&mut self.name);
            }
            Act::Delete | Act::Up | Act::Down | Act::Move | Act::Rename => {}
        }
        self.check()
    }

    fn add(&mut self) -> Step {
        let added = self.handle.add_queue();
        ensure!(
            added.is_ok() == (self.alive && !self.moved),
            "add_queue gave {:?}",
            added.map(drop)
        );
        if let Ok(queue) = added {
            self.slots.push(self.next_number);
            self.members.push(Member {
                number: self.next_number,
                seat: Seat::Held(queue),
            });
            self.next_number += 1;
        }
        Ok(())
    }

    fn attach(&mut self, which: usize) -> Step {
        let held: Vec<usize> = (0..self.members.len())
            .filter(|&at| matches!(self.members[at].seat, Seat::Held(_)))
            .collect();
        let Some(&at) = held.get(which % held.len().max(1)) else {
            return Ok(());
        };
        let member = self.members.remove(at);
        let Seat::Held(queue) = member.seat else { unreachable!() };
        match self.worker.attach(queue) {
            Ok(port) => {
                ensure!(self.alive, "a queue of a deleted device was attached");
                self.members.push(Member {
                    number: member.number,
                    seat: Seat::Port(port),
                });
            }
            Err(error) => {
                ensure!(!self.alive, "attach: {error}");
                // It was closed with the error.
            }
        }
        Ok(())
    }

    fn detach(&mut self, which: usize) -> Step {
        let ports: Vec<usize> = (0..self.members.len())
            .filter(|&at| matches!(self.members[at].seat, Seat::Port(_)))
            .collect();
        let Some(&at) = ports.get(which % ports.len().max(1)) else {
            return Ok(());
        };
        let Seat::Port(port) = self.members[at].seat else {
            unreachable!()
        };
        // Also of a disabled queue, whose read in flight nothing but its cancellation ends.
        let detached = self.worker.detach(port).map_err(|error| format!("detach: {error}"))?;
        ensure!(
            detached.undelivered.iter().all(|packet| packet_of(packet).is_none()),
            "packets were left undelivered"
        );
        let queue = detached.endpoint.into_queue().ok_or("not a queue any more")?;
        self.members[at].seat = Seat::Held(queue);
        Ok(())
    }

    fn queue(&self, at: usize) -> &Queue {
        match &self.members[at].seat {
            Seat::Held(queue) => queue,
            Seat::Port(port) => self.worker.queue(*port).expect("the port is there"),
        }
    }

    fn switch(&mut self, which: usize, on: bool) -> Step {
        let Some(at) = which.checked_rem(self.members.len()) else {
            return Ok(());
        };
        let number = self.members[at].number;
        let queue = self.queue(at);
        let switched = if on { queue.enable() } else { queue.disable() };
        let possible = self.alive && self.slots.contains(&number) != on;
        ensure!(switched.is_ok() == possible, "queue {number}: {switched:?}");
        if possible && on {
            self.disabled.retain(|&disabled| disabled != number);
            self.slots.push(number);
        } else if possible {
            self.leave_slot(number);
            self.disabled.push(number);
        }
        Ok(())
    }

    fn close(&mut self, which: usize) -> Step {
        let Some(at) = which.checked_rem(self.members.len()) else {
            return Ok(());
        };
        if let Seat::Port(port) = self.members[at].seat {
            drop(self.worker.detach(port).map_err(|error| format!("detach: {error}"))?);
        }
        let member = self.members.remove(at);
        let number = member.number;
        drop(member);
        self.leave_slot(number);
        self.disabled.retain(|&disabled| disabled != number);
        self.alive &= !self.members.is_empty();
        Ok(())
    }

    /// The last queue takes the number of one that leaves.
    fn leave_slot(&mut self, number: usize) {
        if let Some(slot) = self.slots.iter().position(|&enabled| enabled == number) {
            self.slots.swap_remove(slot);
            let left = self.slots.len();
            // What the kernel makes of these differs.
            self.flows.retain(|_, (slot, _)| *slot < left);
        }
    }

    fn set_up(&mut self, up: bool) -> Step {
        let (netlink, index) = (&self.place().netlink, self.index());
        if !self.moved {
            self.handle.set_up(up).map_err(|error| format!("set_up: {error}"))?;
        } else {
            ensure!(self.handle.set_up(up).is_err(), "the handle followed a move");
            netlink.set_up(index, up).unwrap();
        }
        if !self.addressed && up {
            netlink.add_address(index, [198, 18, 0, 1].into(), 24).unwrap();
            self.addressed = true;
        }
        self.up = up;
        Ok(())
    }

    fn next_packet(&mut self) -> [u8; 6] {
        self.next_packet += 1;
        let mut payload = *b"sm\0\0\0\0";
        payload[2..].copy_from_slice(&self.next_packet.to_be_bytes());
        payload
    }

    fn send(&mut self, flow: usize) -> Step {
        if !(self.alive && self.up) {
            return Ok(());
        }
        let payload = self.next_packet();
        let sent = self.place().sockets[flow].send_to(&payload, "198.18.0.2:1111");
        if self.slots.is_empty() {
            // Nothing takes it, and whether that is an error is the kernel's to say.
            return Ok(());
        }
        sent.map_err(|error| format!("the stack refuses to send: {error}"))?;
        let deadline = Instant::now() + PATIENCE * common::slowness();
        let came = loop {
            let mut came = self.take()?;
            if let Some(first) = came.pop() {
                ensure!(came.is_empty(), "more than one packet came");
                break first;
            }
            ensure!(Instant::now() < deadline, "the packet did not come");
        };
        let (number, packet) = came;
        ensure!(
            packet == self.next_packet,
            "packet {packet} came, not {}",
            self.next_packet
        );
        ensure!(
            self.slots.contains(&number),
            "it came by queue {number}, which is disabled; enabled: {:?}",
            self.slots
        );
        if let Some(&(slot, when)) = self.flows.get(&flow)
            && when.elapsed() < REMEMBERED
        {
            ensure!(
                self.slots[slot] == number,
                "it came by queue {number}, but slot {slot} of {:?} was written to",
                self.slots
            );
        }
        Ok(())
    }

    fn write(&mut self, which: usize, flow: usize) -> Step {
        let Some(at) = which.checked_rem(self.members.len()) else {
            return Ok(());
        };
        let payload = self.next_packet();
        let packet = udp_packet(FIRST_PORT + flow as u16, &payload);
        // (accepted, the device is down, the device is gone)
        let (ok, down, gone) = match &self.members[at].seat {
            Seat::Held(queue) => match write(queue, &packet) {
                Ok(_) => (true, false, false),
                Err(error) => (
                    false,
                    error.raw_os_error() == Some(libc::EIO),
                    error.raw_os_error() == Some(libc::EBADFD),
                ),
            },
            &Seat::Port(port) => match self.worker.send(port, &packet) {
                Ok(_) => (true, false, false),
                Err(error) => (
                    false,
                    error.kind() == PortErrorKind::Down,
                    error.kind() == PortErrorKind::Gone,
                ),
            },
        };
        let expected = (self.alive && self.up, self.alive && !self.up, !self.alive);
        ensure!(
            (ok, down, gone) == expected,
            "written, down, gone: {:?}, not {expected:?}",
            (ok, down, gone)
        );
        if !ok {
            return Ok(());
        }
        let mut arrived = [0; 64];
        let socket = &self.place().sockets[flow];
        let len = again(|| socket.recv(&mut arrived))
            .map_err(|error| format!("the stack did not get the packet: {error}"))?;
        ensure!(arrived[..len] == payload, "the stack got another packet");
        let slot = self.slots.iter().position(|&slot| slot == self.members[at].number);
        if let Some(slot) = slot
            && self.slots.len() > 1
        {
            self.flows.insert(flow, (slot, Instant::now()));
        }
        Ok(())
    }

    /// All packets of ours that are there, with the queues that they came by.
    fn take(&mut self) -> Result<Vec<(usize, u32)>, String> {
        let mut came = Vec::new();
        let _ = self
            .worker
            .wait(Some(Instant::now()))
            .map_err(|error| format!("wait: {error}"))?;
        for member in &self.members {
            match &member.seat {
                Seat::Held(queue) => {
                    let mut buf = [0; 2048];
                    while let Ok(len) = try_read(queue, &mut buf) {
                        came.extend(packet_of(&buf[..len]).map(|packet| (member.number, packet)));
                    }
                }
                &Seat::Port(port) => {
                    let result = self.worker.try_recv_many(port, &mut self.batch);
                    came.extend(
                        self.batch
                            .iter()
                            .filter_map(|packet| Some((member.number, packet_of(packet)?))),
                    );
                    self.batch.clear();
                    if let Err(error) = result {
                        ensure!(error.is_permanent() && !self.alive, "try_recv_many: {error}");
                    }
                }
            }
        }
        Ok(came)
    }

    /// The kernel's view is the model's.
    fn check(&mut self) -> Step {
        // A file that a ring had registered is closed a moment after its descriptor.
        let deadline = Instant::now() + PATIENCE * common::slowness();
        loop {
            let came = self.take()?;
            ensure!(came.is_empty(), "packets came that were not sent: {came:?}");
            let Err(why) = self.compare() else { return Ok(()) };
            ensure!(Instant::now() < deadline, "{why}");
            thread::sleep(Duration::from_millis(1));
        }
    }

    fn compare(&mut self) -> Step {
        for (place, at) in self.places.iter().zip(0..) {
            for name in ["sm0", "sm1"] {
                let found = place.netlink.index_of(name).is_ok();
                let expected = self.alive && at == self.place && name == self.name;
                ensure!(found == expected, "{name} in place {at}: {found}");
            }
        }
        let here = self.alive && !self.moved;
        ensure!(
            self.handle.current_name().is_ok() == here,
            "the handle: {:?}",
            self.handle.current_name()
        );
        if !self.alive {
            for at in 0..self.members.len() {
                let name = self.queue(at).current_name();
                ensure!(name.is_err(), "a queue of a deleted device says {name:?}");
                // The kernel does not wake who reads from a disabled queue when its device goes.
                if let Seat::Port(port) = self.members[at].seat
                    && self.slots.contains(&self.members[at].number)
                {
                    let gone = self.worker.try_recv_many(port, &mut self.batch);
                    ensure!(
                        gone.is_err_and(|error| error.is_permanent()),
                        "the port does not say that it is gone"
                    );
                }
            }
            return Ok(());
        }
        let link = self.place().netlink.link(self.index()).unwrap();
        ensure!(
            (link.up, link.mtu) == (self.up, self.mtu),
            "up and MTU: {:?}",
            (link.up, link.mtu)
        );
        let tun = link.tun.ok_or("not a TUN device")?;
        let expected = (self.slots.len() as u32, self.disabled.len() as u32);
        ensure!(
            (tun.queues, tun.disabled_queues) == expected,
            "enabled, disabled: {:?}, not {expected:?}",
            (tun.queues, tun.disabled_queues)
        );
        for at in 0..self.members.len() {
            let (queue, number) = (self.queue(at), self.members[at].number);
            let name = queue
                .current_name()
                .map_err(|error| format!("queue {number}: {error}"))?;
            ensure!(name == self.name, "queue {number} says {name}");
            let disabled = queue
                .is_disabled()
                .map_err(|error| format!("queue {number}: {error}"))?;
            ensure!(
                disabled == self.disabled.contains(&number),
                "queue {number}, disabled: {disabled}"
            );
        }
        Ok(())
    }

    fn end(self) -> Step {
        let Self {
            places,
            worker,
            members,
            ..
        } = self;
        drop(worker);
        drop(members);
        ensure!(leaked_arenas() == 0, "memory was leaked");
        let deadline = Instant::now() + PATIENCE * common::slowness();
        let left = || {
            let mut names = places.iter().flat_map(|place| ["sm0", "sm1"].map(|name| (place, name)));
            names.any(|(place, name)| place.netlink.index_of(name).is_ok())
        };
        while left() {
            ensure!(Instant::now() < deadline, "the device stays");
            thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }
}

/// The number of a packet of ours.
fn packet_of(bytes: &[u8]) -> Option<u32> {
    let payload = udp_payload(bytes)?;
    let number = payload.strip_prefix(b"sm")?;
    Some(u32::from_be_bytes(number.try_into().ok()?))
}
