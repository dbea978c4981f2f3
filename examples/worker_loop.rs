//! The worker's loop on one queue: packets come and go in batches. Echoes UDP datagrams, whatever the address and port in its subnet.
//!
//! As root, and then in another terminal (the echo comes back to it):
//!
//! ```text
//! cargo run --features netlink --example worker_loop
//! socat - UDP:198.18.1.2:7
//! ```

mod cli;

use std::error::Error;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::process::ExitCode;

use tun_driver::{Batch, Builder, Mode};

fn main() -> ExitCode {
    cli::end(run())
}

fn run() -> Result<(), Box<dyn Error>> {
    let mut cli = cli::Cli::parse("worker_loop [NAME [IPV4 [IPV6]]] [--seconds N] [--backend io_uring|syscalls]");
    let (name, ipv4, ipv6): (String, Ipv4Addr, Ipv6Addr) =
        (cli.word("echo0"), cli.word("198.18.1.1"), cli.word("fd00:18:1::1"));
    cli.end_of_words();

    // All settings of the device in one act: if one is refused, there is no device, and the error says why.
    let builder = Builder::new(&name, Mode::Tun).address(ipv4, 24).address(ipv6, 64);
    let device = builder.up(true).open()?;
    let handle = device.device().cloned();
    let queue = device.into_queues().remove(0);
    // The worker lives on this thread, and the queue becomes its one port.
    // Not always the name that was asked for: with "tun%d" the kernel puts a number.
    let name = queue.name().to_owned();
    let mut port = queue.drive(&cli.worker_config())?;
    cli.stop_at_the_end(port.worker().waker())?;
    cli::print_ready(port.worker(), format_args!("{ipv4}/24 and {ipv6}/64 on {name}"));

    let mut watch = cli::Watch::new([(port.id(), handle)]);
    let mut batch = Batch::with_capacity(64);
    // `wait` sleeps until there is a packet, or until somebody uses the waker. (`recv_many` alone would wait too, but under a flood it never
    // comes back empty-handed, and would not tell of the stop.)
    while !port.wait(Some(watch.due()))?.stopped {
        watch.look(port.worker());
        match port.try_recv_many(&mut batch) {
            Ok(_) => {}
            // The device was deleted: it stays so, and asking again would spin.
            Err(error) if error.is_permanent() => return Err(cli::named(port.worker(), port.id(), &error).into()),
            // A packet too long for the buffers, or no buffer free just now. It is in the counters, and the next packets come.
            Err(error) => cli::print_passing(port.worker(), port.id(), &error),
        }
        // What is not kept is dropped, and counted as discarded.
        batch.retain_mut(|packet| turn_round(packet).is_some());
        let sent = port.send_many(&mut batch);
        if let Some(error) = sent.refusal {
            cli::print_passing(port.worker(), port.id(), &error);
        }
        if let Some(error) = sent.stopped.filter(|error| error.is_permanent()) {
            return Err(cli::named(port.worker(), port.id(), &error).into());
        }
        // Accepted and refused packets are gone from the batch. What is left (the device is down, or takes no more) could be sent later;
        // a late echo is of no use to anybody.
        batch.clear();
    }
    cli::print_counters(port.worker());
    Ok(())
}

/// Sends a UDP datagram back to where it came from. `None`: not UDP, or not whole.
///
/// Addresses and ports only change places, so no checksum changes: a sum does not depend on the order.
fn turn_round(packet: &mut [u8]) -> Option<()> {
    const UDP: u8 = 17;
    let (addresses, length, ports) = match packet.first()? >> 4 {
        // Of a fragment (more to come, or not the first), only one has the ports.
        4 if *packet.get(9)? == UDP && packet[6] & 0x3f == 0 && packet[7] == 0 => {
            (12, 4, usize::from(packet[0] & 0xf) * 4)
        }
        6 if *packet.get(6)? == UDP => (8, 16, 40),
        _ => return None,
    };
    swap(packet, addresses, length)?;
    swap(packet, ports, 2)
}

/// Lets `length` bytes at `at` change places with those behind them.
fn swap(packet: &mut [u8], at: usize, length: usize) -> Option<()> {
    let (first, second) = packet.get_mut(at..at + 2 * length)?.split_at_mut(length);
    first.swap_with_slice(second);
    Some(())
}
