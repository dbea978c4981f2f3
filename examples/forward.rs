//! A wire between two TUN devices, the second one perhaps in another network namespace. One worker serves both, and a packet is sent from
//! the buffer it was received into.
//!
//! As root:
//!
//! ```text
//! ip netns add blue
//! cargo run --features netlink --example forward
//! ping 198.18.3.2                                  # in another terminal
//! ```

mod cli;

use std::error::Error;
use std::net::Ipv4Addr;
use std::process::ExitCode;
use std::thread;
use std::time::Duration;

use tun_driver::{Batch, Builder, Device, Mode, Offloads, PortErrorKind, PortId, Queue, Worker};

/// How soon to try again when a device took no more.
const RETRY: Duration = Duration::from_millis(1);

/// One direction of the wire, with what is on its way.
struct Way {
    from: PortId,
    to: PortId,
    batch: Batch,
}

fn main() -> ExitCode {
    cli::end(run())
}

fn run() -> Result<(), Box<dyn Error>> {
    let mut cli = cli::Cli::parse(
        "forward [LEFT [RIGHT [LEFT_IPV4 [RIGHT_IPV4 [NETNS_OF_RIGHT]]]]] [--seconds N] [--backend io_uring|syscalls]",
    );
    let (left, right): (String, String) = (cli.word("left0"), cli.word("right0"));
    let (left_address, right_address): (Ipv4Addr, Ipv4Addr) = (cli.word("198.18.3.1"), cli.word("198.18.3.2"));
    let netns = cli.path("/run/netns/blue");
    cli.end_of_words();

    let mut worker = Worker::new(&cli.worker_config())?;
    let (queue, left_device) = open(Builder::new(&left, Mode::Tun), left_address)?;
    let left = worker.attach(queue)?;
    let (queue, right_device) = open(Builder::new(&right, Mode::Tun).netns_path(netns), right_address)?;
    let right = worker.attach(queue)?;
    let mut watch = cli::Watch::new([(left, left_device), (right, right_device)]);
    cli.stop_at_the_end(worker.waker())?;
    // Not always the names that were asked for: with "tun%d" the kernel puts a number.
    let name = |port| worker.queue(port).map_or("", |queue| queue.name());
    let ends = format!(
        "{left_address} on {} <-> {right_address} on {}",
        name(left),
        name(right)
    );
    cli::print_ready(&worker, ends);

    let mut ways = [(left, right), (right, left)].map(|(from, to)| Way {
        from,
        to,
        batch: Batch::with_capacity(64),
    });
    loop {
        // `wait` tells of packets to receive, not of room to send. So whoever still has packets comes back soon to try again.
        let waiting = ways.iter().any(|way| !way.batch.is_empty());
        let deadline = if waiting { worker.now() + RETRY } else { watch.due() };
        if worker.wait(Some(deadline))?.stopped {
            break;
        }
        watch.look(&worker);
        for way in &mut ways {
            forward(&mut worker, way)?;
        }
        // A full batch leaves its packets in the kernel, whose queue drops when it is full in turn. Their port stays ready, so that the
        // next `wait` would not sleep.
        if ways.iter().any(|way| way.batch.is_full()) {
            thread::sleep(RETRY);
        }
    }
    cli::print_counters(&worker);
    Ok(())
}

/// Moves what is there, as far as it goes. Fails if a device is gone.
fn forward(worker: &mut Worker, way: &mut Way) -> Result<(), String> {
    // What is received goes behind what the last round left, so that the order stays. A full batch receives nothing.
    match worker.try_recv_many(way.from, &mut way.batch) {
        Err(error) if error.is_permanent() => return Err(cli::named(worker, way.from, &error)),
        // Others are returned once and are over: a packet was too long, or buffers ran out. The
        // counters have them.
        Err(error) => cli::print_passing(worker, way.from, &error),
        Ok(_) => {}
    }
    let sent = worker.send_many(way.to, &mut way.batch);
    // Dropped and counted.
    if let Some(error) = sent.refusal {
        cli::print_passing(worker, way.to, &error);
    }
    match sent.stopped {
        Some(error) if error.is_permanent() => return Err(cli::named(worker, way.to, &error)),
        // A wire to a device that is down does not store packets: they would arrive when nobody expects them any more.
        Some(error) if error.kind() == PortErrorKind::Down => way.batch.clear(),
        // Back-pressure: what was not accepted is still in front, for the next round.
        Some(_) | None => {}
    }
    Ok(())
}

fn open(builder: Builder, address: Ipv4Addr) -> Result<(Queue, Option<Device>), Box<dyn Error>> {
    // Superpackets go from one device to the other as they are.
    let device = builder.offloads(Offloads::all()).address(address, 24).up(true).open()?;
    let handle = device.device().cloned();
    Ok((device.into_queues().remove(0), handle))
}
