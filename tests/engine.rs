//! The engine on real devices: placement, packets, control, events, panics, the end.

mod common;
mod device;

use std::net::UdpSocket;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use common::{Trial, again, need_backend, need_locked_memory, need_tun, once_quiet, repeats, trial};
use device::{ping, ping_back};
use tun_driver::lab::generator::{self, Generator, Limit};
use tun_driver::lab::packet::Framing;
use tun_driver::lab::{Filler, Namespace, Tracker, process, sysctl};
use tun_driver::netlink::Handle;
use tun_driver::{
    Backend, Batch, Builder, ControlError, Counters, Device, Ended, Endpoint, Engine, Event, Handler, Mode, MultiQueue,
    OnPanic, OpenErrorKind, Pin, Placement, PortErrorKind, PortId, Wait, Worker, WorkerConfig, WorkerEnd,
    leaked_arenas,
};

fn main() {
    type Check = (&'static str, fn(Backend));
    let each: [Check; 22] = [
        (
            "every packet reaches a handler once, in order, queue by queue",
            delivers,
        ),
        ("answers go back where they came from", echoes),
        ("commands run between rounds, on the worker's thread", commands),
        ("statistics are read while a handler is stuck", stuck_is_seen),
        (
            "a stuck worker is reported, and found clean once it came back",
            stuck_is_reported,
        ),
        ("a stop under load is clean, and leaves nothing", stops_under_load),
        (
            "a panic stops the engine, and its queues are closed at once",
            panic_stops,
        ),
        (
            "a panic on one worker lets the others go on, with its flows",
            panic_continues,
        ),
        ("a panic in any call is told, and closes the device", other_panics),
        ("a device that is deleted is told once, the rest goes on", device_gone),
        (
            "a device that is moved to another namespace is reported as moved, and served",
            device_moved,
        ),
        (
            "a move is reported as one though no worker answers",
            device_moved_unanswered,
        ),
        (
            "a namespace that goes takes its device, which is reported once, and the rest goes on",
            namespace_gone,
        ),
        (
            "a namespace that goes with the engine that watches in it leaves nothing",
            watched_namespace_gone,
        ),
        (
            "a device of queues attached at run time is watched, and gone once",
            watches_attached,
        ),
        ("queues move from one worker to another", moves_queues),
        ("packets from outside and between workers", handoffs),
        ("timers and flush", timers),
        ("sockets: worker k serves the k-th", sockets),
        ("an MTU raised at run time brings longer buffers", mtu_raised),
        (
            "an MTU beyond all buffers is reported, and what was lost by it",
            mtu_beyond_all_buffers,
        ),
        ("what a handler discarded is in the report", discarded_is_reported),
    ];
    let mut trials: Vec<Trial> = Vec::new();
    for (name, work) in each {
        for backend in [Backend::IoUring, Backend::Syscalls] {
            let trial = trial(format!("{name} {backend:?}"), move || {
                need_backend(backend);
                work(backend);
            });
            trials.push(if name.contains("leaves nothing") {
                trial.alone()
            } else {
                trial
            });
        }
    }
    let single: [(&str, fn()); 18] = [
        ("workers are pinned, and say so", placement),
        ("four queues on two workers", shares_workers),
        ("a factory that fails or panics leaves nothing", factory_fails),
        ("impossible settings are refused", bad_settings),
        ("up, down, MTU, rename and gone are told", events),
        ("an engine in another namespace tells events too", events_elsewhere),
        ("a stop from a handler, from another thread, and by dropping", stops),
        ("histograms count every batch", histograms),
        ("a handler may hold what is not Send", not_send),
        ("bounds without end are allowed", endless_bounds),
        ("a stop is bounded while another one waits longer", two_stops),
        ("a stop is bounded while a worker's thread takes long to end", slow_exit),
        ("a handler may stop the engine and wait for the others", stops_itself),
        ("a worker that is stopped by its own waker stops all", own_waker),
        ("the row of events ends though a stopper is kept", kept_stopper),
        (
            "commands are answered before the handler's destructor is waited for",
            unanswered,
        ),
        ("renaming a device again and again is not its end", renames),
        ("a device that is gone has the name that it had last", last_name),
    ];
    for (name, work) in single {
        trials.push(trial(name, move || {
            need_tun();
            work();
        }));
    }
    trials.push(trial("an idle engine sleeps", idle).alone());
    let paced: [Check; 4] = [
        ("packets gather where many come, and all come", lingers),
        ("packets do not gather where few come", lingers_not),
        ("a partner that waits is not kept waiting", ping_pong),
        ("commands and a stop are taken between pauses", taken_between_pauses),
    ];
    for (name, work) in paced {
        for backend in [Backend::IoUring, Backend::Syscalls] {
            let paced = trial(format!("{name} (paced, {backend:?})"), move || {
                need_backend(backend);
                work(backend);
            });
            trials.push(paced.alone());
        }
    }
    trials.push(trial("out of descriptors, an engine says so and leaves nothing", descriptors).alone());
    for errno in ["EINTR", "EAGAIN", "ENOMEM"] {
        let name = format!("entries into rings that fail with {errno} are made again by engines");
        let trial = trial(name, move || entries_fail(errno, each.len()));
        trials.push(trial.alone().bound(Duration::from_secs(400)));
    }
    common::run(trials);
}

const HERE: &str = "10.6.0.1";
/// Behind the device: what is sent there comes to the handlers.
const THERE: &str = "10.6.0.2";
const FAR: &str = "10.7.0.2";

fn config(backend: Backend) -> WorkerConfig {
    WorkerConfig {
        backend: Some(backend),
        ..WorkerConfig::default()
    }
}

fn quiet() {
    let _ = sysctl("net/ipv6/conf/default/disable_ipv6", 1);
}

fn device(name: &str, queues: usize, here: &str) -> MultiQueue {
    quiet();
    let device = Builder::new(name, Mode::Tun)
        .queues(queues)
        .address(here.parse::<std::net::Ipv4Addr>().unwrap(), 24)
        .up(true)
        .open()
        .unwrap();
    // Longer than what any test offers: on a busy machine a worker may be late. Not by the builder, whose ioctl wants privilege over the host.
    Handle::new()
        .unwrap()
        .set_txqueuelen(device.index().unwrap(), 8_000)
        .unwrap();
    device
}

fn index(device: &MultiQueue) -> u32 {
    device.index().unwrap()
}

/// Sends `count` packets of each of `flows` flows, and not more at once than a queue takes.
fn offer(index: u32, flows: usize, count: u64) -> Filler {
    let mut filler = Filler::new(index, THERE.parse().unwrap(), flows).unwrap();
    let mut left = count * flows as u64;
    while left > 0 {
        let part = left.min(100);
        filler.fill(part, 100).unwrap();
        left -= part;
        thread::sleep(Duration::from_millis(1));
    }
    filler
}

fn eventually(what: &str, mut done: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(20) * common::slowness();
    while !done() {
        assert!(Instant::now() < end, "never: {what}");
        thread::sleep(Duration::from_millis(1));
    }
}

/// Counts what it sees in a tracker of its own.
struct Counting {
    tracker: Tracker,
}

impl Counting {
    fn new() -> Self {
        Self {
            tracker: Tracker::new(64),
        }
    }
}

impl Handler for Counting {
    fn packets(&mut self, _: &mut Worker, _: PortId, batch: &mut Batch) {
        assert!(!batch.is_empty());
        for packet in batch.drain() {
            self.tracker.record(Framing::NONE.check(&packet));
        }
    }
}

fn received(engine: &Engine<Counting>) -> u64 {
    engine.stats().total().received_packets
}

fn delivers(backend: Backend) {
    let device = device("e0", 2, HERE);
    let number = index(&device);
    let engine = Engine::builder()
        .device(device)
        .workers(2)
        .config(config(backend))
        .start(|_| Ok(Counting::new()))
        .unwrap();
    let filler = offer(number, 16, 200);
    eventually("all packets", || received(&engine) >= 3200);
    let mut seen = 0;
    for worker in 0..2 {
        let summary = engine.run_on(worker, |handler, _| handler.tracker.summary()).unwrap();
        summary.assert_orderly();
        assert_eq!(summary.lost, 0, "a flow keeps its queue: {summary}");
        seen += summary.received;
    }
    assert_eq!(seen, filler_total(&filler));
    let stats = engine.stats();
    assert_eq!(stats.workers.len(), 2);
    assert!(
        stats.workers.iter().all(|worker| worker.total().received_packets > 0),
        "both queues had flows: {stats:?}"
    );
    assert_eq!(stats.workers[1].ports[0].name, "e0:q1");
    let report = engine.stop_within(Duration::from_secs(5));
    assert!(report.is_clean(), "{report}");
    assert_eq!(report.stats.total().received_packets, filler_total(&filler));
    assert!(report.workers.iter().all(|worker| worker.undelivered == 0), "{report}");
}

fn filler_total(filler: &Filler) -> u64 {
    let mut tracker = Tracker::new(64);
    filler.tell(&mut tracker);
    tracker.summary().lost
}

fn echoes(backend: Backend) {
    let engine = Engine::builder()
        .device(device("e0", 2, HERE))
        .config(config(backend))
        .start_fn(|worker: &mut Worker, port: PortId, batch: &mut Batch| {
            batch.retain_mut(|packet| {
                if packet[0] != 0x45 {
                    return false;
                }
                let (source, target) = packet[12..20].split_at_mut(4);
                source.swap_with_slice(target);
                let (source, target) = packet[20..24].split_at_mut(2);
                source.swap_with_slice(target);
                true
            });
            let sent = worker.send_many(port, batch);
            assert_eq!(sent.refusal, None);
        })
        .unwrap();
    let client = UdpSocket::bind((HERE, 0)).unwrap();
    client
        .set_read_timeout(Some(Duration::from_secs(10) * common::slowness()))
        .unwrap();
    client.connect((THERE, 7)).unwrap();
    for number in 0..200u32 {
        client.send(&number.to_be_bytes()).unwrap();
        let mut answer = [0; 4];
        again(|| client.recv(&mut answer)).unwrap();
        assert_eq!(answer, number.to_be_bytes());
    }
    // It is counted after it was sent.
    eventually("all are counted", || engine.stats().total().sent_packets == 200);
}

fn commands(backend: Backend) {
    let device = device("e0", 2, HERE);
    let engine = Engine::builder()
        .device(device)
        .workers(2)
        .config(config(backend))
        .start(|_| Ok(Counting::new()))
        .unwrap();
    let names: Vec<Option<String>> = (0..2)
        .map(|worker| {
            engine
                .run_on(worker, |_, worker| {
                    assert_eq!(worker.ports().count(), 1);
                    thread::current().name().map(str::to_owned)
                })
                .unwrap()
        })
        .collect();
    assert_eq!(names, [Some("e0:q0".to_owned()), Some("e0:q1".to_owned())]);
    assert!(matches!(engine.run_on(2, |_, _| ()), Err(ControlError::NoSuchWorker)));
    // Many at once, from several threads, in the order of each.
    let engine = Arc::new(engine);
    thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for number in 0..200 {
                    assert_eq!(engine.run_on(number % 2, move |_, _| number).unwrap(), number);
                }
            });
        }
    });
    let own = engine.run_on(0, {
        let engine = Arc::clone(&engine);
        move |_, _| matches!(engine.run_on(0, |_, _| ()), Err(ControlError::OwnThread))
    });
    assert!(own.unwrap());
    assert!(engine.stop_within(Duration::from_secs(5)).is_clean());
    assert!(matches!(engine.run_on(0, |_, _| ()), Err(ControlError::WorkerEnded)));
}

/// A handler that stays in its first batch until it is let go.
fn stuck(
    backend: Backend,
) -> (
    Engine<impl Handler + 'static>,
    u32,
    mpsc::Sender<()>,
    mpsc::Receiver<()>,
) {
    let device = device("e0", 1, HERE);
    let number = index(&device);
    let (let_go, wait) = mpsc::channel::<()>();
    let (entered, entering) = mpsc::channel();
    let wait = std::sync::Mutex::new(Some(wait));
    let engine = Engine::builder()
        .device(device)
        .config(config(backend))
        .start(move |_| {
            let (wait, entered) = (wait.lock().unwrap().take().unwrap(), entered.clone());
            Ok(move |_: &mut Worker, _: PortId, _: &mut Batch| {
                let _ = entered.send(());
                let _ = wait.recv();
            })
        })
        .unwrap();
    (engine, number, let_go, entering)
}

fn stuck_is_seen(backend: Backend) {
    let (engine, number, let_go, entering) = stuck(backend);
    offer(number, 1, 1);
    entering.recv().unwrap();
    let stats = engine.stats();
    assert_eq!(stats.total().received_packets, 1);
    let refused = engine.run_on_within(0, Duration::from_millis(20), |_, _| ());
    assert!(matches!(refused, Err(ControlError::TimedOut)));
    assert!(matches!(
        engine.histograms(Duration::from_millis(20)),
        Err(ControlError::TimedOut)
    ));
    drop(let_go);
    // What was asked meanwhile is still done.
    engine.run_on(0, |_, _| ()).unwrap();
}

fn stuck_is_reported(backend: Backend) {
    let (engine, number, let_go, entering) = stuck(backend);
    offer(number, 1, 1);
    entering.recv().unwrap();
    let report = engine.stop_within(Duration::from_millis(50));
    assert_eq!(report.workers[0].end, WorkerEnd::Stuck);
    assert!(!report.is_clean() && report.to_string().contains("stuck"));
    let_go.send(()).unwrap();
    let report = engine.stop_within(Duration::from_secs(10));
    assert!(report.is_clean(), "{report}");
    assert!(
        Handle::new().unwrap().index_of("e0").is_err(),
        "the device is gone with its queue"
    );
}

fn stops_under_load(backend: Backend) {
    const ROUNDS: usize = 10;
    let descriptors = process::open_descriptors().unwrap();
    for round in 0..ROUNDS {
        let device = device("e0", 2, HERE);
        let number = index(&device);
        let engine = Engine::builder()
            .device(device)
            .workers(2)
            .config(config(backend))
            .start(|_| Ok(Counting::new()))
            .unwrap();
        let netns = tun_driver::lab::Namespace::current().unwrap();
        let over = AtomicU64::new(0);
        let report = thread::scope(|scope| {
            scope.spawn(|| {
                netns
                    .run(|| {
                        let Ok(mut filler) = Filler::new(number, THERE.parse().unwrap(), 16) else {
                            return;
                        };
                        while over.load(Ordering::Relaxed) == 0 && filler.fill(64, 100).is_ok() {}
                    })
                    .unwrap();
            });
            eventually("load", || received(&engine) > 500 + 100 * round as u64);
            let report = engine.stop_within(Duration::from_secs(10));
            over.store(1, Ordering::Relaxed);
            report
        });
        assert!(report.is_clean(), "{report}");
        assert!(
            Handle::new().unwrap().index_of("e0").is_err(),
            "somebody holds the device"
        );
    }
    eventually("no descriptor is left", || {
        process::open_descriptors().unwrap() <= descriptors
    });
    assert_eq!(leaked_arenas(), 0);
    eventually("no thread is left", || {
        process::threads().unwrap().iter().all(|name| !name.starts_with("e0:"))
    });
}

/// Panics at the first packet, on this worker only.
struct Fragile {
    fragile: bool,
    counting: Counting,
}

impl Handler for Fragile {
    fn packets(&mut self, worker: &mut Worker, port: PortId, batch: &mut Batch) {
        assert!(!self.fragile, "as the test wants it");
        self.counting.packets(worker, port, batch);
    }
}

fn fragile(backend: Backend, on_panic: OnPanic) -> (Engine<Fragile>, u32, Device) {
    let device = device("e0", 2, HERE);
    let (number, settings) = (index(&device), device.device().unwrap().clone());
    let engine = Engine::builder()
        .device(device)
        .workers(2)
        .config(config(backend))
        .on_panic(on_panic)
        .start(|seat| {
            Ok(Fragile {
                fragile: seat.number() == 1,
                counting: Counting::new(),
            })
        })
        .unwrap();
    (engine, number, settings)
}

fn panic_stops(backend: Backend) {
    let (engine, _, _) = fragile(backend, OnPanic::Stop);
    let socket = UdpSocket::bind((HERE, 0)).unwrap();
    // One flow after the other, until one comes to the fragile worker; then there is no way any more.
    for port in 1..100 {
        let _ = socket.send_to(b"x", (THERE, port));
    }
    let Ended::WorkerFailed { worker: 1, why } = engine.wait() else {
        panic!("the panic is what ends the wait")
    };
    assert!(why.contains("as the test wants it"), "{why}");
    assert_eq!(engine.wait(), Ended::Stopped);
    let report = engine.stop_within(Duration::from_secs(10));
    assert_eq!(report.workers[0].end, WorkerEnd::Clean);
    assert!(
        matches!(&report.workers[1].end, WorkerEnd::Failed(why) if why.contains("panicked")),
        "{report}"
    );
    assert!(Handle::new().unwrap().index_of("e0").is_err());
    assert!(
        engine
            .events()
            .any(|event| matches!(event, Event::WorkerFailed { worker: 1, .. }))
    );
}

fn panic_continues(backend: Backend) {
    let (engine, number, _settings) = fragile(backend, OnPanic::Continue);
    let first = offer(number, 16, 1);
    assert!(matches!(engine.wait(), Ended::WorkerFailed { worker: 1, .. }));
    // All flows come to the other one now; none is lost.
    let before = engine
        .run_on(0, |handler, _| handler.counting.tracker.received())
        .unwrap();
    assert!(before < filler_total(&first), "worker 1 had flows");
    let second = offer(number, 16, 50);
    let total = filler_total(&second);
    eventually("all flows on one worker", || {
        engine
            .run_on(0, |handler, _| handler.counting.tracker.received())
            .unwrap()
            >= before + total
            || engine.stats().workers[0].total().received_packets >= before + total
    });
    assert!(matches!(engine.run_on(1, |_, _| ()), Err(ControlError::WorkerEnded)));
    assert_eq!(engine.wait_within(Duration::from_millis(10)), None, "it goes on");
    let report = engine.stop_within(Duration::from_secs(10));
    assert_eq!(report.workers[0].end, WorkerEnd::Clean);
    assert!(matches!(report.workers[1].end, WorkerEnd::Failed(_)));
}

fn other_panics(backend: Backend) {
    /// Panics in the call of this name.
    struct BadEnd(&'static str);
    impl BadEnd {
        fn call(&self, name: &str) {
            assert!(self.0 != name, "in {name}");
        }
    }
    impl Handler for BadEnd {
        fn packets(&mut self, _: &mut Worker, _: PortId, _: &mut Batch) {
            self.call("packets");
        }
        fn flush(&mut self, _: &mut Worker) {
            self.call("flush");
        }
        fn deadline(&mut self) -> Option<Instant> {
            self.call("deadline");
            (self.0 == "timer").then(Instant::now)
        }
        fn timer(&mut self, _: &mut Worker) {
            self.call("timer");
        }
        fn attached(&mut self, _: &mut Worker, _: PortId) {
            self.call("attached");
        }
        fn detached(&mut self, _: &mut Worker, _: PortId) {
            self.call("detached");
        }
        fn stopping(&mut self, _: &mut Worker) {
            self.call("stopping");
        }
    }
    impl Drop for BadEnd {
        fn drop(&mut self) {
            self.call("drop");
        }
    }
    for name in [
        "packets", "flush", "deadline", "timer", "attached", "detached", "command", "stopping", "drop",
    ] {
        let engine = Engine::builder()
            .device(device("e0", 1, HERE))
            .config(config(backend))
            .start(move |_| Ok(BadEnd(name)))
            .unwrap();
        // What happens in a life; some of it brings the panic.
        let answer = engine.run_on(0, move |_, _| assert!(name != "command", "in command"));
        assert!(answer.is_ok() || name != "stopping" && name != "drop");
        UdpSocket::bind("0.0.0.0:0")
            .and_then(|socket| socket.send_to(b"x", (THERE, 9)))
            .ok();
        drop(engine.handoff(0, 8));
        if !matches!(name, "stopping" | "drop") {
            assert!(matches!(engine.wait(), Ended::WorkerFailed { worker: 0, .. }), "{name}");
        }
        let report = engine.stop_within(Duration::from_secs(10));
        let WorkerEnd::Failed(why) = &report.workers[0].end else {
            panic!("{name}: {report}")
        };
        assert!(why.contains(&format!("in {name}")), "{why}");
        assert!(
            Handle::new().unwrap().index_of("e0").is_err(),
            "{name}: somebody holds the device"
        );
    }
}

fn device_gone(backend: Backend) {
    let (left, right) = (device("e0", 2, HERE), device("e1", 2, "10.7.0.1"));
    let (gone, stays) = (index(&left), index(&right));
    let engine = Engine::builder()
        .device(left)
        .device(right)
        .workers(2)
        .config(config(backend))
        .start(|_| Ok(Counting::new()))
        .unwrap();
    Handle::new().unwrap().delete(gone).unwrap();
    let ended = engine.wait();
    assert_eq!(
        ended,
        Ended::DeviceGone {
            device: "e0".to_owned()
        }
    );
    eventually("the ports of the gone device are detached", || {
        engine.stats().workers.iter().all(|worker| worker.ports.len() == 1)
    });
    assert_eq!(
        engine.wait_within(Duration::from_millis(20)),
        None,
        "told once, though two workers found out"
    );
    let mut filler = Filler::new(stays, FAR.parse().unwrap(), 4).unwrap();
    filler.fill(40, 100).unwrap();
    eventually("the other device goes on", || received(&engine) >= 40);
    // The kernel sets it down first; whether that is seen is a matter of chance.
    let mut gone: Vec<Event> = std::iter::from_fn(|| engine.events().try_next()).collect();
    gone.retain(|event| !matches!(event, Event::Down { .. }));
    assert_eq!(
        gone,
        [Event::Gone {
            device: "e0".to_owned()
        }]
    );
    assert!(engine.stop_within(Duration::from_secs(10)).is_clean());
}

/// The events up to the first that `last` says; without those of the link going up and down, which
/// a move and an end bring or hide.
fn events_until<H>(engine: &Engine<H>, last: impl Fn(&Event) -> bool) -> Vec<Event> {
    let events = engine.events();
    let mut seen = Vec::new();
    loop {
        let event = events.next_within(Duration::from_secs(20)).expect("an event");
        let is_last = last(&event);
        if !matches!(event, Event::Up { .. } | Event::Down { .. }) {
            seen.push(event);
        }
        if is_last {
            return seen;
        }
    }
}

fn device_moved(backend: Backend) {
    // T8, T9.
    let device = device("e0", 2, HERE);
    let index = index(&device);
    let engine = Engine::builder()
        .device(device)
        .workers(2)
        .config(config(backend))
        .start(|_| Ok(Counting::new()))
        .unwrap();
    let there = tun_driver::lab::Namespace::new().unwrap();
    let netlink = Handle::new().unwrap();
    netlink
        .move_to_namespace(index, std::os::fd::AsFd::as_fd(&there))
        .unwrap();
    let moved = |event: &Event| matches!(event, Event::Moved { .. } | Event::Gone { .. });
    let e0 = || "e0".to_owned();
    assert_eq!(
        events_until(&engine, moved),
        [Event::Moved {
            device: e0(),
            watched: true
        }]
    );
    assert_eq!(engine.wait_within(Duration::from_millis(50)), None, "it is not gone");
    assert!(engine.stats().workers.iter().all(|worker| worker.ports.len() == 1));
    // It is served and watched where it is now, also under another name.
    let netlink = there.run(|| Handle::new().unwrap()).unwrap();
    netlink.rename(index, "e8").unwrap();
    netlink.set_up(index, true).unwrap();
    netlink.set_mtu(index, 1300).unwrap();
    assert_eq!(
        events_until(&engine, |event| matches!(event, Event::MtuChanged { .. })),
        [Event::MtuChanged {
            device: "e8".to_owned(),
            mtu: 1300
        }]
    );
    netlink.add_address(index, HERE.parse().unwrap(), 24).unwrap();
    there
        .run(|| {
            let mut filler = Filler::new(index, THERE.parse().unwrap(), 4).unwrap();
            filler.fill(40, 100).unwrap();
        })
        .unwrap();
    eventually("its packets come", || received(&engine) >= 40);
    // Its deletion there is its end.
    netlink.delete(index).unwrap();
    assert!(matches!(engine.wait(), Ended::DeviceGone { .. }));
    assert_eq!(
        events_until(&engine, |event| matches!(event, Event::Gone { .. })).len(),
        1
    );
    eventually("its ports are detached", || {
        engine.stats().workers.iter().all(|worker| worker.ports.is_empty())
    });
    assert_eq!(engine.wait_within(Duration::from_millis(20)), None, "reported once");
    assert!(engine.stop_within(Duration::from_secs(10)).is_clean());
}

fn device_moved_unanswered(backend: Backend) {
    let device = device("e0", 1, HERE);
    let index = index(&device);
    let engine = Engine::builder()
        .device(device)
        .config(config(backend))
        .start(|_| Ok(Counting::new()))
        .unwrap();
    let (release, held) = mpsc::channel::<()>();
    let stuck = engine.run_on_within(0, Duration::from_millis(1), move |_, _| {
        let _ = held.recv_timeout(Duration::from_secs(30));
    });
    assert!(matches!(stuck, Err(ControlError::TimedOut)));
    let there = tun_driver::lab::Namespace::new().unwrap();
    let netlink = Handle::new().unwrap();
    netlink
        .move_to_namespace(index, std::os::fd::AsFd::as_fd(&there))
        .unwrap();
    assert_eq!(
        events_until(&engine, |event| matches!(
            event,
            Event::Moved { .. } | Event::Gone { .. }
        )),
        [Event::Moved {
            device: "e0".to_owned(),
            watched: false
        }]
    );
    drop(release);
    // Not watched there, so nothing of ours keeps the namespace; the device ends with it, and the
    // data path finds out.
    drop(there);
    assert!(matches!(engine.wait(), Ended::DeviceGone { .. }));
    assert!(engine.stop_within(Duration::from_secs(10)).is_clean());
}

/// Sends each answer to a ping back as the next ping.
struct Pinging;

impl Handler for Pinging {
    fn packets(&mut self, worker: &mut Worker, port: PortId, batch: &mut Batch) {
        batch.retain_mut(|packet| ping_back(packet));
        // A device on its way out refuses them.
        let _ = worker.send_many(port, batch);
        batch.clear();
    }
}

/// A new namespace with the device `e0` in it.
fn moved_to_a_namespace(index: u32) -> Namespace {
    let there = Namespace::new().unwrap();
    Handle::new().unwrap().move_to_namespace(index, there.as_fd()).unwrap();
    let furnish = || {
        let netlink = Handle::new().unwrap();
        let index = netlink.index_of("e0").unwrap();
        netlink.add_address(index, HERE.parse().unwrap(), 24).unwrap();
        netlink.set_up(index, true).unwrap();
    };
    there.run(furnish).unwrap();
    there
}

/// Waits for so many more packets from a device that pings keep busy.
fn more_answers(engine: &Engine<Pinging>, more: u64) {
    let received = || engine.stats().total().received_packets;
    let before = received();
    eventually("answers to pings", || received() >= before + more);
}

/// Each queue that is attached in a namespace holds the one that it was opened in, and not the one
/// that its device was moved to.
fn namespace_gone(backend: Backend) {
    // T7.
    for _ in 0..repeats(5, 200) {
        let (left, right) = (device("e0", 2, HERE), device("e1", 2, "10.7.0.1"));
        let there = moved_to_a_namespace(index(&left));
        let settings = right.device().unwrap().clone();
        let engine = Engine::builder()
            .device(right)
            .workers(2)
            .config(config(backend))
            .start(|_| Ok(Pinging))
            .unwrap();
        let ping = ping(THERE.parse().unwrap(), HERE.parse().unwrap(), 1);
        for (worker, queue) in left.into_queues().into_iter().enumerate() {
            let port = engine.attach(worker, queue).unwrap();
            let ping = ping.clone();
            engine
                .run_on(worker, move |_, worker| worker.send(port, &ping).unwrap())
                .unwrap();
        }
        // In the middle of the traffic.
        more_answers(&engine, 100);
        drop(there);
        let e0 = || "e0".to_owned();
        assert_eq!(engine.wait(), Ended::DeviceGone { device: e0() });
        eventually("its ports are detached", || {
            engine.stats().workers.iter().all(|worker| worker.ports.len() == 1)
        });
        assert_eq!(
            engine.wait_within(Duration::from_millis(20)),
            None,
            "reported once, though two workers found out"
        );
        // The other device is served and watched, and nothing else was said.
        settings.set_mtu(1300).unwrap();
        let changed = |event: &Event| matches!(event, Event::MtuChanged { .. });
        assert_eq!(
            events_until(&engine, changed),
            [
                Event::Gone { device: e0() },
                Event::MtuChanged {
                    device: "e1".to_owned(),
                    mtu: 1300
                }
            ]
        );
        let before = engine.stats().total().received_packets;
        Filler::new(settings.index(), "10.7.0.2".parse().unwrap(), 4)
            .unwrap()
            .fill(40, 100)
            .unwrap();
        eventually("the other device goes on", || {
            engine.stats().total().received_packets >= before + 40
        });
        // The workers sleep; a queue that is gone does not wake them.
        let sleeps = || -> u64 {
            let workers = engine.stats().workers;
            workers.iter().map(|worker| worker.counters.sleeps).sum()
        };
        once_quiet(|| {
            let before = sleeps();
            thread::sleep(Duration::from_millis(20));
            let more = sleeps() - before;
            if more < 5 {
                return Ok(());
            }
            Err(format!("the workers were woken {more} times"))
        });
        assert!(engine.stop_within(Duration::from_secs(10)).is_clean());
    }
    assert_eq!(leaked_arenas(), 0);
}

/// A watch keeps the namespace, as its event says; it ends with the engine, and the device with it.
fn watched_namespace_gone(backend: Backend) {
    // T7.
    for _ in 0..repeats(5, 200) {
        let device = device("e0", 2, HERE);
        let index = index(&device);
        let witness = device.device().unwrap().add_queue().unwrap();
        witness.disable().unwrap();
        let engine = Engine::builder()
            .device(device)
            .workers(2)
            .config(config(backend))
            .start(|_| Ok(Pinging))
            .unwrap();
        let there = moved_to_a_namespace(index);
        let moved = |event: &Event| matches!(event, Event::Moved { .. } | Event::Gone { .. });
        assert_eq!(
            events_until(&engine, moved),
            [Event::Moved {
                device: "e0".to_owned(),
                watched: true
            }]
        );
        drop(there);
        let ping = ping(THERE.parse().unwrap(), HERE.parse().unwrap(), 1);
        for worker in 0..2 {
            let ping = ping.clone();
            let send = move |_: &mut Pinging, worker: &mut Worker| {
                let port = worker.ports().next().unwrap();
                worker.send(port, &ping).unwrap();
            };
            engine.run_on(worker, send).unwrap();
        }
        more_answers(&engine, 100);
        assert_eq!(engine.wait_within(Duration::from_millis(20)), None);
        assert!(engine.stop_within(Duration::from_secs(10)).is_clean());
        eventually("the namespace is gone, and the device with it", || {
            let name = witness.current_name();
            name.is_err_and(|error| error.raw_os_error() == Some(libc::EBADFD))
        });
    }
    assert_eq!(leaked_arenas(), 0);
}

fn watches_attached(backend: Backend) {
    let first = device("e0", 2, HERE);
    let later = device("e1", 2, "10.7.0.1");
    let settings = later.device().unwrap().clone();
    let engine = Engine::builder()
        .device(first)
        .workers(2)
        .config(config(backend))
        .start(|_| Ok(Counting::new()))
        .unwrap();
    for (worker, queue) in later.into_queues().into_iter().enumerate() {
        engine.attach(worker, queue).unwrap();
    }
    let device = || "e1".to_owned();
    settings.set_mtu(1300).unwrap();
    let changed = |event: &Event| matches!(event, Event::MtuChanged { .. });
    assert_eq!(
        events_until(&engine, changed),
        [Event::MtuChanged {
            device: device(),
            mtu: 1300
        }]
    );
    Handle::new().unwrap().delete(settings.index()).unwrap();
    assert_eq!(engine.wait(), Ended::DeviceGone { device: device() });
    eventually("its ports are detached", || {
        engine.stats().workers.iter().all(|worker| worker.ports.len() == 1)
    });
    assert_eq!(
        engine.wait_within(Duration::from_millis(50)),
        None,
        "reported once, though two workers found out"
    );
    assert!(engine.stop_within(Duration::from_secs(10)).is_clean());
}

fn moves_queues(backend: Backend) {
    let device = device("e0", 2, HERE);
    let number = index(&device);
    let settings = device.device().unwrap().clone();
    let engine = Engine::builder()
        .device(device)
        .workers(2)
        .config(config(backend))
        .start(|_| Ok(Counting::new()))
        .unwrap();
    let port = engine.run_on(1, |_, worker| worker.ports().next().unwrap()).unwrap();
    assert!(matches!(engine.detach(0, port), Err(ControlError::Port(error)) if error.kind() == PortErrorKind::Gone));
    let released = engine.detach(1, port).unwrap();
    assert!(matches!(released.endpoint, Endpoint::Queue(_)));
    assert_eq!(released.counters.received_packets, released.undelivered.len() as u64);
    assert_eq!(engine.stats().workers[1].ports.len(), 0);
    let moved = engine.attach(0, released.endpoint).unwrap();
    assert_ne!(moved, port);
    engine.attach(0, settings.add_queue().unwrap()).unwrap();
    // So many that no queue is left out by chance.
    let filler = offer(number, 48, 20);
    eventually("all on one worker", || {
        engine.stats().workers[0].total().received_packets >= filler_total(&filler)
    });
    let ports = engine.stats().workers[0].ports.clone();
    assert_eq!(ports.len(), 3);
    assert!(ports.iter().all(|port| port.counters.received_packets > 0), "{ports:?}");
    let summary = engine.run_on(0, |handler, _| handler.tracker.summary()).unwrap();
    summary.assert_all();
}

/// Worker 0 gives all that comes to worker 1.
struct Passing {
    next: Option<tun_driver::Handoff>,
    attached: Vec<PortId>,
    tracker: Tracker,
}

impl Handler for Passing {
    fn packets(&mut self, _: &mut Worker, _: PortId, batch: &mut Batch) {
        match &mut self.next {
            Some(next) => {
                while !batch.is_empty() {
                    let sent = next.send_many(batch);
                    assert!(
                        sent.stopped
                            .is_none_or(|error| error.kind() == PortErrorKind::Backpressure)
                    );
                }
            }
            None => batch
                .drain()
                .for_each(|packet| self.tracker.record(Framing::NONE.check(&packet))),
        }
    }

    fn attached(&mut self, _: &mut Worker, port: PortId) {
        self.attached.push(port);
    }

    fn detached(&mut self, _: &mut Worker, port: PortId) {
        self.attached.retain(|&attached| attached != port);
    }
}

fn handoffs(backend: Backend) {
    let device = device("e0", 1, HERE);
    let number = index(&device);
    let engine = Engine::builder()
        .device(device)
        .workers(2)
        .config(config(backend))
        .start(|_| {
            Ok(Passing {
                next: None,
                attached: Vec::new(),
                tracker: Tracker::new(8),
            })
        })
        .unwrap();
    let (port, handoff) = engine.handoff(1, 64).unwrap();
    assert_eq!(engine.run_on(1, |handler, _| handler.attached.clone()).unwrap(), [port]);
    engine.run_on(0, |handler, _| handler.next = Some(handoff)).unwrap();
    let filler = offer(number, 8, 100);
    eventually("all have come over", || {
        engine.stats().workers[1].total().received_packets >= 800
    });
    let mut tracker = engine
        .run_on(1, |handler, _| std::mem::take(&mut handler.tracker))
        .unwrap();
    filler.tell(&mut tracker);
    tracker.summary().assert_all();
    assert_eq!(engine.stats().workers[1].ports[0].counters.received_packets, 800);
    // The sender's end is the port's end.
    engine.run_on(0, |handler, _| handler.next = None).unwrap();
    eventually("the port is gone", || engine.stats().workers[1].ports.is_empty());
    assert!(engine.run_on(1, |handler, _| handler.attached.is_empty()).unwrap());
    assert_eq!(
        engine.wait_within(Duration::from_millis(5)),
        None,
        "that is no device's end"
    );
    assert!(engine.stop_within(Duration::from_secs(10)).is_clean());
}

fn timers(backend: Backend) {
    #[derive(Default)]
    struct Ticking {
        next: Option<Instant>,
        ticks: u32,
        flushes: u32,
        stopped: Option<mpsc::Sender<(u32, u32)>>,
    }
    impl Handler for Ticking {
        fn packets(&mut self, _: &mut Worker, _: PortId, _: &mut Batch) {}
        fn flush(&mut self, _: &mut Worker) {
            self.flushes += 1;
        }
        fn deadline(&mut self) -> Option<Instant> {
            self.next
        }
        fn timer(&mut self, worker: &mut Worker) {
            assert!(worker.now() >= self.next.unwrap());
            self.ticks += 1;
            self.next = (self.ticks < 10).then(|| Instant::now() + Duration::from_millis(1));
        }
        fn stopping(&mut self, worker: &mut Worker) {
            assert_eq!(worker.ports().count(), 1, "what is left to send can be sent");
            let _ = self.stopped.take().unwrap().send((self.ticks, self.flushes));
        }
    }
    let (stopped, ended) = mpsc::channel();
    let engine = Engine::builder()
        .device(device("e0", 1, HERE))
        .config(config(backend))
        .start(move |_| {
            Ok(Ticking {
                next: Some(Instant::now()),
                stopped: Some(stopped.clone()),
                ..Ticking::default()
            })
        })
        .unwrap();
    eventually("ten ticks", || {
        engine.run_on(0, |handler, _| handler.ticks).unwrap() == 10
    });
    assert!(engine.stop_within(Duration::from_secs(10)).is_clean());
    let (ticks, flushes) = ended.recv().unwrap();
    assert!(ticks == 10 && flushes >= 10, "{ticks} {flushes}");
}

fn sockets(backend: Backend) {
    let bound: Vec<UdpSocket> = (0..3).map(|_| UdpSocket::bind("127.0.0.1:0").unwrap()).collect();
    let addresses: Vec<_> = bound.iter().map(|socket| socket.local_addr().unwrap()).collect();
    let engine = Engine::builder()
        .sockets(bound)
        .workers(2)
        .config(config(backend))
        .start_fn(|worker: &mut Worker, port: PortId, batch: &mut Batch| {
            assert_eq!(worker.send_many(port, batch).refusal, None);
        })
        .unwrap();
    let client = UdpSocket::bind("127.0.0.1:0").unwrap();
    client
        .set_read_timeout(Some(Duration::from_secs(10) * common::slowness()))
        .unwrap();
    for address in &addresses {
        client.send_to(b"hello", address).unwrap();
        let mut answer = [0; 16];
        let (length, from) = again(|| client.recv_from(&mut answer)).unwrap();
        assert_eq!((&answer[..length], from), (&b"hello"[..], *address));
    }
    let stats = engine.stats();
    assert_eq!((stats.workers[0].ports.len(), stats.workers[1].ports.len()), (2, 1));
    assert_eq!(stats.workers[1].ports[0].name, format!("udp {}", addresses[1]));
    eventually("it is counted", || {
        engine.stats().workers[0].ports[1].counters.sent_packets == 1
    });
}

fn placement() {
    let cores: Vec<usize> = core_affinity::get_core_ids()
        .unwrap()
        .iter()
        .map(|core| core.id)
        .collect();
    let last = *cores.last().unwrap();
    let pins = |placement: Placement, workers: usize| -> Vec<Pin> {
        let engine = Engine::builder().workers(workers).placement(placement).start(|seat| {
            let allowed: Vec<usize> = core_affinity::get_core_ids()
                .unwrap()
                .iter()
                .map(|core| core.id)
                .collect();
            match seat.pin() {
                Pin::Core(core) => assert_eq!(allowed, [*core]),
                Pin::Unpinned => assert!(!allowed.is_empty()),
                other => panic!("{other:?}"),
            }
            Ok(Counting::new())
        });
        engine
            .unwrap()
            .workers()
            .iter()
            .map(|worker| worker.pin.clone())
            .collect()
    };
    let in_turn: Vec<Pin> = (0..3).map(|worker| Pin::Core(cores[worker % cores.len()])).collect();
    assert_eq!(pins(Placement::OnePerCore, 3), in_turn);
    assert_eq!(
        pins(Placement::Cores(vec![last]), 2),
        [Pin::Core(last), Pin::Core(last)]
    );
    assert_eq!(pins(Placement::Unpinned, 1), [Pin::Unpinned]);
    // A thread that may use one core only starts workers there only.
    let confined = thread::spawn(move || {
        assert!(core_affinity::set_for_current(core_affinity::CoreId { id: last }));
        let engine = Engine::builder().workers(2).start(|_| Ok(Counting::new())).unwrap();
        engine
            .workers()
            .iter()
            .map(|worker| worker.pin.clone())
            .collect::<Vec<_>>()
    });
    assert_eq!(confined.join().unwrap(), [Pin::Core(last), Pin::Core(last)]);
}

fn shares_workers() {
    let device = device("e0", 4, HERE);
    let number = index(&device);
    let engine = Engine::builder()
        .device(device)
        .workers(2)
        .start(|seat| {
            let members: Vec<usize> = seat.ports().iter().map(|port| port.number).collect();
            assert_eq!(members, [seat.number(), seat.number() + 2]);
            assert_eq!(seat.port(0), Some(seat.ports()[0].id));
            assert_eq!((seat.port(1), seat.worker().ports().count()), (None, 2));
            Ok(Counting::new())
        })
        .unwrap();
    let filler = offer(number, 64, 20);
    eventually("all packets", || received(&engine) >= filler_total(&filler));
    for worker in engine.stats().workers {
        assert!(
            worker.ports.iter().all(|port| port.counters.received_packets > 0),
            "{worker:?}"
        );
    }
}

fn factory_fails() {
    for panics in [false, true] {
        let started = Arc::new(AtomicU64::new(0));
        let error = Engine::builder()
            .device(device("ff", 2, HERE))
            .workers(2)
            .start({
                let started = Arc::clone(&started);
                move |seat| {
                    started.fetch_add(1, Ordering::Relaxed);
                    if seat.number() == 1 {
                        assert!(!panics, "no key");
                        return Err("no key".into());
                    }
                    Ok(Counting::new())
                }
            })
            .unwrap_err();
        assert_eq!(error.kind(), OpenErrorKind::Factory);
        assert!(
            error.to_string().contains("no key") && error.to_string().contains("worker 1"),
            "{error}"
        );
        assert_eq!(started.load(Ordering::Relaxed), 2);
        assert!(Handle::new().unwrap().index_of("ff").is_err(), "all queues are closed");
        // A thread that was joined is in the list for a moment longer.
        eventually("no thread is left", || {
            process::threads().unwrap().iter().all(|name| !name.starts_with("ff:"))
        });
    }
}

fn bad_settings() {
    let refused = |builder: tun_driver::EngineBuilder| {
        let error = builder.start(|_| Ok(Counting::new())).unwrap_err();
        assert_eq!(error.kind(), OpenErrorKind::InvalidSetting, "{error}");
    };
    refused(Engine::builder().workers(0));
    refused(Engine::builder().workers(100_000));
    refused(Engine::builder().batch(0));
    refused(Engine::builder().placement(Placement::Cores(vec![])));
    refused(Engine::builder().placement(Placement::Cores(vec![5_000])));
    refused(Engine::builder().config(WorkerConfig {
        buffers: 1,
        ..WorkerConfig::default()
    }));
    refused(Engine::builder().config(WorkerConfig {
        wait: Wait::Moderate { max: Duration::MAX },
        ..WorkerConfig::default()
    }));
    // A device of longer packets gets longer buffers.
    need_locked_memory(WorkerConfig::default().memory().total_with_large_buffers() as u64);
    let big = Builder::new("e1", Mode::Tun).mtu(9000).open().unwrap();
    let engine = Engine::builder().device(big).start(|_| Ok(Counting::new())).unwrap();
    assert_eq!(engine.workers()[0].backend.large_buffers, 128);
}

/// Sends packets of `len` bytes until one was received, or truncated if there are no buffers for
/// it.
fn until_counted(engine: &Engine<Counting>, len: usize, counted: impl Fn(&Counters) -> u64) {
    let socket = std::net::UdpSocket::bind("0.0.0.0:0").unwrap();
    let mut sequence = 0;
    eventually("a long packet", || {
        let mut payload = vec![0; len - 28];
        tun_driver::lab::packet::write_payload(&mut payload, 0, sequence, 0);
        sequence += 1;
        socket.send_to(&payload, (THERE, 9)).unwrap();
        counted(&engine.stats().total()) > 0
    });
}

/// T20, as an operator meets it: the MTU is raised while the engine runs, and its buffers were for
/// the old one.
fn mtu_raised(backend: Backend) {
    let device = device("e0", 1, HERE);
    let settings = device.device().unwrap().clone();
    let engine = Engine::builder()
        .device(device)
        .config(config(backend))
        .start(|_| Ok(Counting::new()))
        .unwrap();
    let events = engine.events();
    offer(settings.index(), 4, 10);
    eventually("short packets", || received(&engine) >= 10);
    settings.set_mtu(9_000).unwrap();
    assert!(matches!(
        events.next_within(Duration::from_secs(10)),
        Some(Event::MtuChanged { mtu: 9_000, .. })
    ));
    let longest = || {
        engine.run_on(0, |_, worker| {
            let port = worker.ports().next().unwrap();
            worker.port_info(port).unwrap().longest
        })
    };
    eventually("longer buffers", || longest().unwrap() >= 9_000);
    let before = received(&engine);
    until_counted(&engine, 9_000, |total| total.received_packets - before);
    // Short ones still come, and nothing was lost from then on.
    offer(settings.index(), 4, 10);
    eventually("all", || received(&engine) >= before + 11);
    let report = engine.stop_within(Duration::from_secs(10));
    assert!(report.is_clean(), "{report}");
    assert_eq!(report.workers[0].truncated, 0);
}

fn mtu_beyond_all_buffers(backend: Backend) {
    let device = device("e0", 1, HERE);
    let settings = device.device().unwrap().clone();
    let engine = Engine::builder()
        .device(device)
        .config(WorkerConfig {
            // Of which no port can be promised any.
            large_buffers: 1,
            ..config(backend)
        })
        .start(|_| Ok(Counting::new()))
        .unwrap();
    settings.set_mtu(9_000).unwrap();
    let events = engine.events();
    assert!(matches!(events.next(), Some(Event::MtuChanged { .. })));
    let event = events.next_within(Duration::from_secs(10));
    let Some(Event::BuffersTooShort {
        device,
        worker: 0,
        longest,
    }) = &event
    else {
        panic!("{event:?}");
    };
    assert_eq!(device, "e0");
    assert!((1_500..9_000).contains(longest), "{longest}");
    until_counted(&engine, 9_000, |total| total.truncated);
    let report = engine.stop_within(Duration::from_secs(10));
    let truncated = report.stats.total().truncated;
    assert_eq!(report.workers[0].truncated, truncated);
    let said = format!(", {truncated} truncated");
    assert_eq!(
        report.to_string().matches(&said).count(),
        2,
        "for the worker and in all: {report}"
    );
}

/// What a handler leaves is not forgotten in the end.
fn discarded_is_reported(backend: Backend) {
    let device = device("e0", 1, HERE);
    let index = index(&device);
    let engine = Engine::builder()
        .device(device)
        .config(config(backend))
        .start_fn(|_: &mut Worker, _: PortId, _: &mut Batch| {})
        .unwrap();
    offer(index, 4, 10);
    eventually("all", || engine.stats().total().received_packets >= 40);
    let report = engine.stop_within(Duration::from_secs(10));
    assert_eq!((report.workers[0].discarded, report.workers[0].truncated), (40, 0));
    assert!(report.to_string().contains(", 40 discarded; stopped"), "{report}");
    assert!(!report.to_string().contains("truncated"), "{report}");
}

fn watch(engine: &Engine<Counting>, settings: &Device, netlink: &Handle) {
    let events = engine.events();
    let next = || events.next_within(Duration::from_secs(10)).expect("an event");
    let name = |name: &str| name.to_owned();
    settings.set_mtu(1300).unwrap();
    assert_eq!(
        next(),
        Event::MtuChanged {
            device: name("e0"),
            mtu: 1300
        }
    );
    settings.set_up(false).unwrap();
    assert_eq!(next(), Event::Down { device: name("e0") });
    netlink.rename(settings.index(), "e9").unwrap();
    settings.set_up(true).unwrap();
    assert_eq!(next(), Event::Up { device: name("e9") });
    netlink.delete(settings.index()).unwrap();
    // The kernel sets it down first; whether that is seen is a matter of chance.
    let gone = std::iter::from_fn(|| Some(next())).find(|event| !matches!(event, Event::Down { .. }));
    assert!(matches!(gone, Some(Event::Gone { .. })));
    assert_eq!(events.next_within(Duration::from_millis(20)), None);
}

fn events() {
    let device = device("e0", 1, HERE);
    let settings = device.device().unwrap().clone();
    let engine = Engine::builder().device(device).start(|_| Ok(Counting::new())).unwrap();
    assert!(engine.watches_devices());
    watch(&engine, &settings, &Handle::new().unwrap());
    let events = engine.events();
    drop(engine);
    assert_eq!(events.next(), Some(Event::Stopping));
    assert_eq!(events.next(), None, "the engine is gone, and the row ends");
}

fn events_elsewhere() {
    let elsewhere = tun_driver::lab::Namespace::new().unwrap();
    let device = elsewhere.run(|| device("e0", 1, HERE)).unwrap();
    let settings = device.device().unwrap().clone();
    let engine = Engine::builder().device(device).start(|_| Ok(Counting::new())).unwrap();
    let netlink = elsewhere.run(|| Handle::new().unwrap()).unwrap();
    // Opened there and started here: the way back is not known, and this is said.
    if engine.watches_devices() {
        watch(&engine, &settings, &netlink);
    } else {
        netlink.delete(settings.index()).unwrap();
        assert!(matches!(engine.wait(), Ended::DeviceGone { .. }));
    }
}

fn stops() {
    // From a handler.
    let device = device("e0", 1, HERE);
    let engine = Engine::builder()
        .device(device)
        .start(|seat| {
            let stopper = seat.stopper();
            Ok(move |_: &mut Worker, _: PortId, _: &mut Batch| stopper.stop())
        })
        .unwrap();
    UdpSocket::bind((HERE, 0))
        .unwrap()
        .send_to(b"stop", (THERE, 9))
        .unwrap();
    assert_eq!(engine.wait(), Ended::Stopped);
    assert!(engine.stop_within(Duration::from_secs(10)).is_clean());
    // From another thread, while one waits.
    let engine = Engine::builder().workers(2).start(|_| Ok(Counting::new())).unwrap();
    let stopper = engine.stopper();
    let other = thread::spawn(move || stopper.stop());
    assert_eq!(engine.wait(), Ended::Stopped);
    other.join().unwrap();
    // By dropping.
    let device = self::device("e0", 2, HERE);
    drop(Engine::builder().device(device).start(|_| Ok(Counting::new())).unwrap());
    assert!(Handle::new().unwrap().index_of("e0").is_err());
}

fn histograms() {
    let device = device("e0", 2, HERE);
    let number = index(&device);
    let engine = Engine::builder()
        .device(device)
        .workers(2)
        .histograms(true)
        .start(|_| Ok(Counting::new()))
        .unwrap();
    let filler = offer(number, 16, 50);
    eventually("all packets", || received(&engine) >= filler_total(&filler));
    let bound = Duration::from_secs(10);
    let merged = engine.histograms(bound).unwrap();
    let batches = engine.stats().total().batches;
    assert_eq!(merged.batch_packets.len(), batches);
    assert_eq!(
        (merged.handler_ns.len(), merged.wake_to_handler_ns.len()),
        (batches, batches)
    );
    let packets: u64 = merged
        .batch_packets
        .iter_recorded()
        .map(|step| step.value_iterated_to() * step.count_since_last_iteration())
        .sum();
    assert_eq!(packets, received(&engine), "batches of at most 64 are kept exactly");
    let own: u64 = (0..2)
        .map(|worker| engine.worker_histograms(worker, bound).unwrap().batch_packets.len())
        .sum();
    assert_eq!(own, batches);
    let without = Engine::builder().workers(1).start(|_| Ok(Counting::new())).unwrap();
    assert!(matches!(without.histograms(bound), Err(ControlError::NotEnabled)));
}

fn not_send() {
    struct Local(std::rc::Rc<std::cell::Cell<u32>>);
    impl Handler for Local {
        fn packets(&mut self, _: &mut Worker, _: PortId, _: &mut Batch) {
            self.0.set(self.0.get() + 1);
        }
    }
    let device = device("e0", 1, HERE);
    let number = index(&device);
    let engine = Engine::builder()
        .device(device)
        .start(|_| Ok(Local(Default::default())))
        .unwrap();
    offer(number, 1, 1);
    eventually("it was called", || {
        engine.run_on(0, |handler, _| handler.0.get()).unwrap() == 1
    });
}

fn idle() {
    need_tun();
    let engine = Engine::builder()
        .device(device("e0", 4, HERE))
        .workers(4)
        .config(WorkerConfig {
            wait: Wait::default(),
            ..WorkerConfig::default()
        })
        .start(|_| Ok(Counting::new()))
        .unwrap();
    thread::sleep(Duration::from_millis(100));
    let sleeps = |stats: tun_driver::Stats| -> Vec<u64> {
        let each = stats.workers.iter();
        each.map(|worker| worker.counters.sleeps + worker.counters.lingers + worker.counters.wake_ups)
            .collect()
    };
    once_quiet(|| {
        let (before, cpu) = (sleeps(engine.stats()), process::process_cpu_time());
        thread::sleep(Duration::from_millis(500));
        let (after, used) = (sleeps(engine.stats()), process::process_cpu_time() - cpu);
        if after == before && used < Duration::from_millis(50) {
            return Ok(());
        }
        Err(format!(
            "woken: {before:?} to {after:?}, {used:?} in half a second of nothing"
        ))
    });
}

fn endless_bounds() {
    let engine = Engine::builder().workers(2).start(|_| Ok(Counting::new())).unwrap();
    let stopper = engine.stopper();
    let other = thread::spawn(move || stopper.stop());
    assert_eq!(engine.wait_within(Duration::MAX), Some(Ended::Stopped));
    other.join().unwrap();
    assert!(engine.stop_within(Duration::MAX).is_clean());
}

fn two_stops() {
    let (engine, number, let_go, entering) = stuck(Backend::Syscalls);
    offer(number, 1, 1);
    entering.recv().unwrap();
    thread::scope(|scope| {
        let patient = scope.spawn(|| engine.stop_within(Duration::from_secs(600)));
        eventually("the first stop has begun", || {
            engine.wait_within(Duration::ZERO) == Some(Ended::Stopped)
        });
        thread::sleep(Duration::from_millis(20));
        let report = engine.stop_within(Duration::from_millis(20));
        assert_eq!(report.workers[0].end, WorkerEnd::Stuck);
        let_go.send(()).unwrap();
        assert!(patient.join().unwrap().is_clean());
    });
}

/// A thread that has closed everything may still be kept: by the kernel, or here by a destructor.
fn slow_exit() {
    struct Slow(std::sync::mpsc::Receiver<()>);
    impl Drop for Slow {
        fn drop(&mut self) {
            // Until the sender is gone.
            let _ = self.0.recv();
        }
    }
    thread_local! {
        static SLOW: std::cell::RefCell<Option<Slow>> = const { std::cell::RefCell::new(None) };
    }
    let (let_go, held) = std::sync::mpsc::channel();
    let held = std::sync::Mutex::new(Some(held));
    let engine = Engine::builder()
        .device(device("e0", 1, HERE))
        .start(move |_| {
            SLOW.set(held.lock().unwrap().take().map(Slow));
            Ok(Counting::new())
        })
        .unwrap();
    // Without the bound it waits for what only this thread can do later.
    let report = engine.stop_within(Duration::from_millis(200));
    assert!(report.is_clean(), "{report}");
    drop(Builder::new("e0", Mode::Tun).open().unwrap());
    drop(let_go);
    assert!(engine.stop_within(Duration::from_secs(60)).is_clean());
}

fn stops_itself() {
    let engine = Arc::new(
        Engine::builder()
            .device(device("e0", 2, HERE))
            .workers(2)
            .start(|_| Ok(Counting::new()))
            .unwrap(),
    );
    let inner = Arc::clone(&engine);
    let report = engine
        .run_on(0, move |_, _| inner.stop_within(Duration::from_secs(3600)))
        .unwrap();
    assert_eq!(report.workers[0].end, WorkerEnd::Stuck, "it was busy with the stop");
    assert_eq!(report.workers[1].end, WorkerEnd::Clean);
    assert!(engine.stop_within(Duration::from_secs(10)).is_clean());
}

fn own_waker() {
    let engine = Engine::builder()
        .device(device("e0", 2, HERE))
        .workers(2)
        .start(|_| Ok(Counting::new()))
        .unwrap();
    engine.run_on(0, |_, worker| worker.waker().stop()).unwrap();
    assert_eq!(engine.wait(), Ended::Stopped);
    assert!(engine.stop_within(Duration::from_secs(10)).is_clean());
}

fn kept_stopper() {
    let engine = Engine::builder().workers(1).start(|_| Ok(Counting::new())).unwrap();
    let (stopper, events) = (engine.stopper(), engine.events());
    drop(engine);
    assert_eq!(events.next(), Some(Event::Stopping));
    assert_eq!(events.next(), None);
    stopper.stop();
}

fn unanswered() {
    /// Waits at its end for somebody who waits for its worker.
    struct Waiting(mpsc::Receiver<()>);
    impl Handler for Waiting {
        fn packets(&mut self, _: &mut Worker, _: PortId, _: &mut Batch) {}
    }
    impl Drop for Waiting {
        fn drop(&mut self) {
            self.0.recv_timeout(Duration::from_secs(20)).unwrap();
        }
    }
    let (answered, answer) = mpsc::channel();
    let answer = std::sync::Mutex::new(Some(answer));
    let engine = Engine::builder()
        .workers(1)
        .start(move |_| Ok(Waiting(answer.lock().unwrap().take().unwrap())))
        .unwrap();
    thread::scope(|scope| {
        let (entered, entering) = mpsc::channel();
        let (let_go, wait) = mpsc::channel::<()>();
        let engine = &engine;
        scope.spawn(move || {
            let blocking = move |_: &mut Waiting, _: &mut Worker| {
                entered.send(()).unwrap();
                let _ = wait.recv();
            };
            engine.run_on(0, blocking).unwrap();
        });
        entering.recv().unwrap();
        scope.spawn(move || {
            assert!(matches!(engine.run_on(0, |_, _| ()), Err(ControlError::WorkerEnded)));
            answered.send(()).unwrap();
        });
        // The second command lies in the channel by then, or is refused: it is not carried out either way.
        thread::sleep(Duration::from_millis(20));
        engine.stopper().stop();
        drop(let_go);
        let report = engine.stop_within(Duration::from_secs(60));
        assert!(report.is_clean(), "{report}");
    });
}

fn renames() {
    let device = device("e0", 1, HERE);
    let settings = device.device().unwrap().clone();
    let engine = Engine::builder().device(device).start(|_| Ok(Counting::new())).unwrap();
    let netlink = Handle::new().unwrap();
    settings.set_up(false).unwrap();
    for round in 0..2_000 / common::slowness() {
        netlink
            .rename(settings.index(), if round % 2 == 0 { "e1" } else { "e0" })
            .unwrap();
    }
    settings.set_mtu(1400).unwrap();
    let events: Vec<Event> = std::iter::from_fn(|| engine.events().next_within(Duration::from_secs(10)))
        .take_while(|event| !matches!(event, Event::MtuChanged { .. }))
        .collect();
    assert!(
        events.iter().all(|event| matches!(event, Event::Down { .. })),
        "{events:?}"
    );
    assert_eq!(engine.wait_within(Duration::ZERO), None);
}

fn last_name() {
    // The watch or the worker may find out first, and the worker knows the first name only.
    for _ in 0..10 {
        let device = device("e0", 1, HERE);
        let settings = device.device().unwrap().clone();
        let engine = Engine::builder().device(device).start(|_| Ok(Counting::new())).unwrap();
        let netlink = Handle::new().unwrap();
        if let Err(error) = netlink.rename(settings.index(), "e2") {
            assert!(common::kernel() < (6, 2), "{error}");
            common::skip("this kernel renames no device that is up (Linux 6.2)");
        }
        settings.set_mtu(1300).unwrap();
        // What comes after the rename was seen.
        events_until(&engine, |event| matches!(event, Event::MtuChanged { .. }));
        netlink.delete(settings.index()).unwrap();
        let device = "e2".to_owned();
        assert_eq!(engine.wait(), Ended::DeviceGone { device: device.clone() });
        let gone = |event: &Event| matches!(event, Event::Gone { .. });
        assert_eq!(events_until(&engine, gone), [Event::Gone { device }]);
    }
}

/// An engine with one queue that holds all that is sent, and a generator of packets to it.
fn paced(backend: Backend, wait: Wait, rate: u64, time: Duration) -> (Engine<Counting>, Generator) {
    quiet();
    let device = Builder::new("e0", Mode::Tun)
        .address(HERE.parse::<std::net::Ipv4Addr>().unwrap(), 24)
        .txqueuelen(32_000)
        .up(true)
        .open()
        .unwrap();
    let engine = Engine::builder()
        .device(device)
        .config(WorkerConfig {
            wait,
            ..config(backend)
        })
        .start(|_| Ok(Counting::new()))
        .unwrap();
    let generator = Generator::new(&generator::Config {
        rate: Some(rate),
        limit: Limit::Time(time),
        ..generator::Config::new((THERE.parse::<std::net::IpAddr>().unwrap(), 9).into())
    });
    (engine, generator.unwrap())
}

/// Sends at this rate; all packets must come, in order. Returns how many these were, and how often the worker paused.
fn pauses(backend: Backend, wait: Wait, rate: u64) -> (u64, u64) {
    let (engine, mut generator) = paced(backend, wait, rate, Duration::from_millis(150));
    let generated = generator.run(&Default::default()).unwrap();
    // Whether packets gather is a matter of the rate at which they come.
    if common::slowness() > 1 && generated.sent < rate * 15 / 100 / 2 {
        common::skip(format!("this machine is too slow for {rate} packets per second"));
    }
    assert!(generated.sent > rate / 50, "{generated:?}");
    eventually("all packets", || received(&engine) >= generated.sent);
    let mut tracker = engine
        .run_on(0, |handler, _| std::mem::take(&mut handler.tracker))
        .unwrap();
    generated.tell(&mut tracker);
    tracker.summary().assert_all();
    (generated.sent, engine.stats().workers[0].counters.lingers)
}

fn lingers(backend: Backend) {
    // A worker that others keep from its core always finds more than it takes, and has no occasion.
    let mut runs = Vec::<(u64, u64)>::new();
    while runs.len() < 20 && runs.last().is_none_or(|run| run.1 == 0) {
        runs.push(pauses(backend, Wait::default(), 200_000));
    }
    let paused = runs.last().is_some_and(|run| run.1 > 0);
    assert!(paused, "packets and pauses: {runs:?}");
    let (packets, pauses) = pauses(backend, Wait::Block, 200_000);
    assert_eq!(pauses, 0, "{packets} packets");
}

fn lingers_not(backend: Backend) {
    let (packets, pauses) = pauses(backend, Wait::default(), 2_000);
    // A worker that does not run for a moment sees several at once.
    assert!(pauses * 20 < packets, "{pauses} pauses for {packets} packets");
}

fn ping_pong(backend: Backend) {
    const TRIPS: u64 = 2_000;
    let engine = Engine::builder()
        .device(device("e0", 1, HERE))
        .config(config(backend))
        .start_fn(|worker: &mut Worker, port: PortId, batch: &mut Batch| {
            for packet in batch.iter_mut() {
                let (source, target) = packet[12..20].split_at_mut(4);
                source.swap_with_slice(target);
                let (source, target) = packet[20..24].split_at_mut(2);
                source.swap_with_slice(target);
            }
            let _sent = worker.send_many(port, batch);
        })
        .unwrap();
    let client = UdpSocket::bind((HERE, 0)).unwrap();
    client
        .set_read_timeout(Some(Duration::from_secs(10) * common::slowness()))
        .unwrap();
    client.connect((THERE, 7)).unwrap();
    for number in 0..TRIPS {
        client.send(&number.to_be_bytes()).unwrap();
        let mut answer = [0; 8];
        again(|| client.recv(&mut answer)).unwrap();
        assert_eq!(answer, number.to_be_bytes());
    }
    let pauses = engine.stats().workers[0].counters.lingers;
    assert!(pauses * 10 < TRIPS, "{pauses} of {TRIPS} answers were delayed");
}

fn taken_between_pauses(backend: Backend) {
    if common::slowness() > 1 {
        common::skip("a slow machine has no time for pauses at this rate");
    }
    let (engine, mut generator) = paced(backend, Wait::default(), 100_000, Duration::from_millis(200));
    let over = std::sync::atomic::AtomicBool::new(false);
    thread::scope(|scope| {
        // A new schedule now and then: one that is far behind on a busy machine leaves no time for pauses.
        scope.spawn(|| {
            while !over.load(Ordering::Relaxed) {
                generator.run(&over).unwrap();
            }
        });
        let pauses = || engine.stats().workers[0].counters.lingers;
        // Without an occasion for one, commands are taken all the same; whether the worker pauses is
        // what another test asks.
        let deadline = Instant::now() + Duration::from_secs(10);
        while pauses() < 10 && Instant::now() < deadline {
            thread::sleep(Duration::from_millis(1));
        }
        for number in 0..200 {
            assert_eq!(engine.run_on(0, move |_, _| number).unwrap(), number);
        }
        let report = engine.stop_within(Duration::from_secs(10));
        over.store(true, Ordering::Relaxed);
        assert!(report.is_clean(), "{report}");
    });
}

/// Sets how many descriptors this process may have, until dropped.
struct DescriptorLimit(libc::rlimit);

impl DescriptorLimit {
    fn set(most: u64) -> Self {
        let mut before = libc::rlimit {
            rlim_cur: 0,
            rlim_max: 0,
        };
        // SAFETY: the kernel writes one such struct to where one is.
        assert_eq!(unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut before) }, 0);
        let limit = libc::rlimit {
            rlim_cur: most,
            ..before
        };
        // SAFETY: the kernel reads one such struct.
        assert_eq!(unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit) }, 0);
        Self(before)
    }
}

impl Drop for DescriptorLimit {
    fn drop(&mut self) {
        // SAFETY: the kernel reads one such struct.
        unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &raw const self.0) };
    }
}

fn descriptors() {
    need_tun();
    for forced in [None, Some(Backend::IoUring), Some(Backend::Syscalls)] {
        let (mut failed, mut started) = (0, 0);
        for spare in 0..16 {
            let before = process::open_descriptors().unwrap();
            let device = device("e0", 2, HERE);
            // The listing of the folder took one that is free again.
            let limit = DescriptorLimit::set(process::open_descriptors().unwrap() as u64 - 1 + spare);
            let engine = Engine::builder()
                .device(device)
                .workers(2)
                .config(WorkerConfig {
                    backend: forced,
                    ..WorkerConfig::default()
                })
                .start(|_| Ok(Counting::new()));
            drop(limit);
            match engine {
                Ok(engine) => {
                    started += 1;
                    assert!(engine.stop_within(Duration::from_secs(10)).is_clean());
                }
                Err(error) => {
                    failed += 1;
                    assert_eq!(error.kind(), OpenErrorKind::DescriptorLimit, "{error}");
                    assert!(error.to_string().contains("ulimit -n"), "{error}");
                }
            }
            assert!(Handle::new().unwrap().index_of("e0").is_err());
            eventually("no descriptor is left", || {
                process::open_descriptors().unwrap() <= before
            });
            eventually("no thread is left", || {
                process::threads().unwrap().iter().all(|name| !name.starts_with("e0:"))
            });
        }
        assert!(failed > 0, "{forced:?}");
        // A ring's table of files wants a limit above 257.
        assert!(started > 0 || forced == Some(Backend::IoUring), "{forced:?}");
    }
}

/// The engine's trials on rings, with entries that fail now and then.
fn entries_fail(errno: &str, trials: usize) {
    need_backend(Backend::IoUring);
    common::need_program("strace", "strace");
    let output = std::process::Command::new("strace")
        .args(["-f", "-o", "/dev/null", "-e", "trace=io_uring_enter"])
        .args(["-e", &format!("inject=io_uring_enter:error={errno}:when=3+4")])
        .arg(std::env::current_exe().unwrap())
        .args(["IoUring", "--skip", "paced"])
        // Each call of each thread waits for strace, so that the bounds are those of a slower
        // machine.
        .env("TUN_DRIVER_SLOWNESS", (5 * common::slowness()).to_string())
        .output()
        .unwrap();
    let told = String::from_utf8_lossy(&output.stdout);
    let errors = String::from_utf8_lossy(&output.stderr);
    if errors.contains("ptrace(PTRACE") {
        common::skip("strace may not trace here");
    }
    assert!(
        output.status.success() && told.contains(&format!("{trials} passed")),
        "{told}{errors}"
    );
}
