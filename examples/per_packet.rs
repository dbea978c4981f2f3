//! The plain loop: one packet per call, no configuration. Prints what the network stack sends into a TUN device.
//!
//! As root, and then in another terminal:
//!
//! ```text
//! cargo run --example per_packet -- mytun
//! ip addr add 198.18.0.1/24 dev mytun; ip link set mytun up; ping 198.18.0.2
//! ```

mod cli;

use std::error::Error;
use std::process::{self, ExitCode};

use tun_driver::{Iface, Mode};

fn main() -> ExitCode {
    cli::end(run())
}

fn run() -> Result<(), Box<dyn Error>> {
    let mut cli = cli::Cli::parse("per_packet [NAME] [--packets N] [--seconds N]");
    let name: String = cli.word("mytun");
    cli.end_of_words();

    let iface = Iface::new(&name, Mode::Tun)?;
    // Not always the name that was asked for: with "tun%d" the kernel puts a number.
    cli::say(format_args!("created {}", iface.name()));
    // `recv` waits for a packet and for nothing else. The device goes with the process.
    cli.call_at_the_end(|| process::exit(0))?;

    // The device's MTU, and four bytes of packet information in front of each packet: two of flags, and the EtherType.
    let mut buffer = vec![0; 1504];
    for _ in 0..cli.packets() {
        // Blocks until there is a packet. An error is final here: the device was deleted.
        let len = iface.recv(&mut buffer)?;
        let Some((info, packet)) = buffer[..len].split_at_checked(4) else {
            continue;
        };
        // TUN_PKT_STRIP: the packet was longer than the buffer, and its rest is lost.
        let cut = u16::from_ne_bytes([info[0], info[1]]) & 1 != 0;
        cli::say(format_args!(
            "EtherType {:02x}{:02x}, {} bytes{}: {packet:02x?}",
            info[2],
            info[3],
            packet.len(),
            if cut {
                " of a longer packet, the MTU was raised"
            } else {
                ""
            }
        ));
    }
    Ok(())
}
