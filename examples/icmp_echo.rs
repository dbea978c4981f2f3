//! Answers pings: a host that is nowhere but in this program. IPv4 and IPv6.
//!
//! As root, and then in another terminal:
//!
//! ```text
//! cargo run --features netlink --example icmp_echo
//! ping 198.18.2.2; ping fd00:18:2::2
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
    let mut cli = cli::Cli::parse("icmp_echo [NAME [IPV4 [IPV6]]] [--seconds N] [--backend io_uring|syscalls]");
    let (name, ipv4, ipv6): (String, Ipv4Addr, Ipv6Addr) =
        (cli.word("ping0"), cli.word("198.18.2.1"), cli.word("fd00:18:2::1"));
    cli.end_of_words();

    // The kernel's own addresses; it sends the rest of both subnets to us, and we answer for all of it.
    let builder = Builder::new(&name, Mode::Tun).address(ipv4, 24).address(ipv6, 64);
    let device = builder.up(true).open()?;
    let handle = device.device().cloned();
    let queue = device.into_queues().remove(0);
    // Not always the name that was asked for: with "tun%d" the kernel puts a number.
    let name = queue.name().to_owned();
    let mut port = queue.drive(&cli.worker_config())?;
    cli.stop_at_the_end(port.worker().waker())?;
    cli::print_ready(port.worker(), format_args!("{ipv4}/24 and {ipv6}/64 on {name}"));

    let mut watch = cli::Watch::new([(port.id(), handle)]);
    let mut batch = Batch::with_capacity(64);
    while !port.wait(Some(watch.due()))?.stopped {
        watch.look(port.worker());
        match port.try_recv_many(&mut batch) {
            Ok(_) => {}
            // The device was deleted.
            Err(error) if error.is_permanent() => return Err(cli::named(port.worker(), port.id(), &error).into()),
            Err(error) => cli::print_passing(port.worker(), port.id(), &error),
        }
        // The request becomes the reply where it lies; what is no request is dropped.
        batch.retain_mut(|packet| reply(packet).is_some());
        let sent = port.send_many(&mut batch);
        if let Some(error) = sent.refusal {
            cli::print_passing(port.worker(), port.id(), &error);
        }
        if let Some(error) = sent.stopped.filter(|error| error.is_permanent()) {
            return Err(cli::named(port.worker(), port.id(), &error).into());
        }
        batch.clear(); // what was not taken: nobody wants a late reply
    }
    cli::print_counters(port.worker());
    Ok(())
}

/// Makes an echo request into its reply. `None`: it is none.
fn reply(packet: &mut [u8]) -> Option<()> {
    match packet.first()? >> 4 {
        4 => reply_v4(packet),
        6 => reply_v6(packet),
        _ => None,
    }
}

fn reply_v4(packet: &mut [u8]) -> Option<()> {
    const ICMP: u8 = 1;
    let icmp = usize::from(packet[0] & 0xf) * 4;
    // No fragments: only the first has the ICMP header, and it is not whole.
    let fragment = *packet.get(6)? & 0x3f != 0 || *packet.get(7)? != 0;
    if icmp < 20 || fragment || *packet.get(9)? != ICMP || packet.get(16)? >> 4 == 0xe {
        return None; // 0xe: to a multicast group, which must not be the source of a reply
    }
    turn(packet.get_mut(icmp..icmp + 8)?, (8, 0))?;
    swap(packet, 12, 4)
}

fn reply_v6(packet: &mut [u8]) -> Option<()> {
    const ICMPV6: u8 = 58;
    if *packet.get(6)? != ICMPV6 || *packet.get(24)? == 0xff {
        return None;
    }
    turn(packet.get_mut(40..48)?, (128, 129))?;
    swap(packet, 8, 16)
}

/// Changes the type of an ICMP message, if it is `from` and the code is 0, and its checksum by just that (RFC 1624).
///
/// The rest of the message is not looked at: a reply has all of it, and a message damaged before stays recognisable as such. Swapped
/// addresses do not change a sum, neither that of the IPv4 header nor the one that ICMPv6 makes over its addresses.
fn turn(icmp: &mut [u8], (from, to): (u8, u8)) -> Option<()> {
    if icmp[..2] != [from, 0] {
        return None;
    }
    icmp[0] = to;
    let old = u16::from_be_bytes([icmp[2], icmp[3]]);
    let mut sum = u32::from(!old) + u32::from(!(u16::from(from) << 8)) + (u32::from(to) << 8);
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    icmp[2..4].copy_from_slice(&(!(sum as u16)).to_be_bytes());
    Some(())
}

/// Lets `length` bytes at `at` change places with those behind them.
fn swap(packet: &mut [u8], at: usize, length: usize) -> Option<()> {
    let (first, second) = packet.get_mut(at..at + 2 * length)?.split_at_mut(length);
    first.swap_with_slice(second);
    Some(())
}
