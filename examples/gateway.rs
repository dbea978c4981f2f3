//! A gateway between two TUN devices, the second one perhaps in another network namespace, by an engine: a worker on each core serves a
//! queue of both devices, so that both directions of a flow stay on one core. It prints what goes through each worker.
//!
//! As root:
//!
//! ```text
//! ip netns add blue
//! cargo run --features netlink --example gateway
//! ping 198.18.5.2                                  # in another terminal
//! ```

mod cli;

use std::error::Error;
use std::net::Ipv4Addr;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use tun_driver::{Batch, Builder, Ended, Engine, Event, FactoryError, Handler, Mode, PortError, PortId, Seat, Worker};

/// How often each worker says what it did.
const REPORT: Duration = Duration::from_secs(1);

/// What one worker knows. Each has its own, so that nothing is locked and nothing is shared.
struct Gateway {
    number: usize,
    left: PortId,
    right: PortId,
    forwarded: u64,
    dropped: u64,
    next_report: Instant,
}

impl Gateway {
    /// On the worker's own thread, when its ports are attached.
    fn new(seat: &mut Seat<'_>) -> Result<Self, FactoryError> {
        let missing = "both devices need a queue for each worker";
        Ok(Self {
            number: seat.number(),
            // The devices in the order in which the builder got them.
            left: seat.port(0).ok_or(missing)?,
            right: seat.port(1).ok_or(missing)?,
            forwarded: 0,
            dropped: 0,
            next_report: Instant::now() + REPORT,
        })
    }
}

impl Handler for Gateway {
    fn packets(&mut self, worker: &mut Worker, port: PortId, batch: &mut Batch) {
        let out = if port == self.left { self.right } else { self.left };
        let sent = worker.send_many(out, batch);
        self.forwarded += sent.accepted as u64;
        // What found no room is dropped when this returns, as routers do. To keep it, move it into a batch of our own.
        self.dropped += (sent.refused + batch.len()) as u64;
    }

    fn deadline(&mut self) -> Option<Instant> {
        Some(self.next_report)
    }

    fn timer(&mut self, worker: &mut Worker) {
        self.next_report = worker.now() + REPORT;
        let Self {
            number,
            forwarded,
            dropped,
            ..
        } = self;
        cli::say(format_args!("worker {number}: forwarded {forwarded} dropped {dropped}"));
    }

    fn trouble(&mut self, worker: &mut Worker, port: PortId, error: &PortError) {
        cli::print_passing(worker, port, error);
    }
}

fn main() -> ExitCode {
    cli::end(run())
}

fn run() -> Result<(), Box<dyn Error>> {
    let mut cli = cli::Cli::parse("gateway [NETNS_OF_RIGHT [QUEUES]] [--seconds N] [--backend io_uring|syscalls]");
    let netns = cli.path("/run/netns/blue");
    let queues: usize = cli.word("2");
    cli.end_of_words();
    let (here, there) = (Ipv4Addr::new(198, 18, 5, 1), Ipv4Addr::new(198, 18, 5, 2));
    let device = |name, address| {
        Builder::new(name, Mode::Tun)
            .queues(queues)
            .address(address, 24)
            .up(true)
    };

    let engine = Engine::builder()
        .device(device("left0", here).open()?)
        .device(device("right0", there).netns_path(netns).open()?)
        .workers(queues)
        .config(cli.worker_config())
        .start(Gateway::new)?;
    for worker in engine.workers() {
        cli::say(worker);
    }
    let stopper = engine.stopper();
    cli.call_at_the_end(move || stopper.stop())?;
    cli::say(format_args!("ready: {here} <-> {there}"));

    // A gateway with one side is none: it ends with either device. A worker that fails stops the engine.
    for event in engine.events() {
        cli::say(&event);
        if matches!(event, Event::Gone { .. } | Event::Stopping) {
            break;
        }
    }
    let ended = engine.wait();
    cli::say(engine.stop_within(Duration::from_secs(5)));
    match ended {
        Ended::Stopped => Ok(()),
        ended => Err(ended.to_string().into()),
    }
}
