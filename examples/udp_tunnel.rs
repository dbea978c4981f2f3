//! A tunnel: IP packets of a TUN device travel in UDP datagrams to one peer, behind a header of eight bytes. One worker serves the device
//! and the socket; the header is put in front and taken off where the packet lies, in both directions.
//!
//! As root, on two hosts that reach each other as 10.0.0.1 and 10.0.0.2:
//!
//! ```text
//! cargo run --features netlink --example udp_tunnel -- tunnel0 198.18.4.1 10.0.0.1:4789 10.0.0.2:4789
//! cargo run --features netlink --example udp_tunnel -- tunnel0 198.18.4.2 10.0.0.2:4789 10.0.0.1:4789
//! ```
//!
//! There is neither encryption nor authentication: this shows how packets move.

mod cli;

use std::error::Error;
use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::process::ExitCode;
use std::thread;
use std::time::Duration;

use tun_driver::{Batch, Builder, Mode, PacketBuf, PortErrorKind, PortId, Worker};

/// How soon to try again when the socket took no more.
const RETRY: Duration = Duration::from_millis(1);

fn main() -> ExitCode {
    cli::end(run())
}

fn run() -> Result<(), Box<dyn Error>> {
    let mut cli = cli::Cli::parse(
        "udp_tunnel [NAME [IPV4 [LOCAL [PEER]]]] [--keepalive-ms N] [--seconds N] [--backend io_uring|syscalls]",
    );
    let (name, address): (String, Ipv4Addr) = (cli.word("tunnel0"), cli.word("198.18.4.1"));
    let (local, peer): (SocketAddr, SocketAddr) = (cli.word("10.0.0.1:4789"), cli.word("10.0.0.2:4789"));
    cli.end_of_words();
    check(local, peer)?;

    let mut worker = Worker::new(&cli.worker_config())?;
    // An MTU with which a packet, our header, and those of UDP and IP fit into 1500 bytes.
    let builder = Builder::new(&name, Mode::Tun).mtu(1400).address(address, 24);
    let device = builder.up(true).open()?;
    let handle = device.device().cloned();
    let queue = device.into_queues().remove(0);
    // Not always the name that was asked for: with "tun%d" the kernel puts a number.
    let name = queue.name().to_owned();
    let tun = worker.attach(queue)?;
    let mut watch = cli::Watch::new([(tun, handle)]);
    let socket = UdpSocket::bind(local).map_err(|error| {
        format!("bind({local}): {error}: give this host the address, or name one that it has as LOCAL")
    })?;
    // With port 0 the kernel chose one, which the peer has to know.
    let local = socket.local_addr()?;
    // A connected socket takes datagrams from the peer only, and what we send needs no address (else: `PacketBuf::set_peer`).
    socket
        .connect(peer)
        .map_err(|error| format!("connect({peer}): {error}: add a route to PEER, or name another"))?;
    let udp = worker.attach(socket)?;
    cli.stop_at_the_end(worker.waker())?;
    cli::print_ready(&worker, format_args!("{address}/24 on {name}, {local} to {peer}"));

    let mut link = Link::default();
    let mut to_peer = Batch::with_capacity(64);
    let mut to_tun = Batch::with_capacity(64);
    let mut keepalive_due = worker.now(); // the first one at once
    loop {
        // `wait` tells of packets to receive, not of room to send: with packets left over, come back soon to try again.
        let retry = (!to_peer.is_empty() || !to_tun.is_empty()).then(|| worker.now() + RETRY);
        let due = keepalive_due.min(watch.due());
        if worker.wait(Some(retry.unwrap_or(due)))?.stopped {
            break;
        }
        watch.look(&worker);
        // `now` is when `wait` returned, and costs nothing.
        if worker.now() >= keepalive_due {
            keepalive_due = worker.now() + cli.keepalive();
            link.keep_alive(&worker, &mut to_peer);
        }
        while let Some(port) = worker.next_ready() {
            if port == tun {
                link.encapsulate(&mut worker, tun, &mut to_peer)?;
            } else {
                link.decapsulate(&mut worker, udp, &mut to_tun)?;
            }
        }
        send(&mut worker, udp, &mut to_peer)?;
        send(&mut worker, tun, &mut to_tun)?;
        if to_peer.is_full() || to_tun.is_full() {
            // The rest waits in the kernel. Its port is still ready, so the next `wait` would not sleep.
            thread::sleep(RETRY);
        }
    }
    cli::print_counters(&worker);
    link.print_counters();
    Ok(())
}

/// What no route would mend.
fn check(local: SocketAddr, peer: SocketAddr) -> Result<(), String> {
    let family = |address: SocketAddr| if address.is_ipv4() { "IPv4" } else { "IPv6" };
    if family(local) != family(peer) {
        return Err(format!(
            "LOCAL {local} is of {}, PEER {peer} of {}: name two addresses of one family",
            family(local),
            family(peer)
        ));
    }
    if peer.port() == 0 {
        return Err(format!(
            "PEER {peer}: nothing can be sent to port 0: name the peer's port"
        ));
    }
    for (word, address) in [("LOCAL", local), ("PEER", peer)] {
        if let SocketAddr::V6(address) = address
            && address.ip().is_unicast_link_local()
            && address.scope_id() == 0
        {
            return Err(format!(
                "{word} {address}: a link-local address wants the number of its interface: write \
                 [{}%2]:{} for interface 2 of `ip link`",
                address.ip(),
                address.port()
            ));
        }
    }
    Ok(())
}

/// What is in front of each packet on its way, in network byte order: two bytes of magic, one of [`DATA`] or [`KEEP_ALIVE`], a zero, and
/// four bytes of a number that rises by one with each datagram.
const HEADER: usize = 8;
const MAGIC: [u8; 2] = *b"TD";
const DATA: u8 = 0;
const KEEP_ALIVE: u8 = 1;

/// Both ends' numbers.
#[derive(Default)]
struct Link {
    /// The number of the next datagram to send.
    next: u32,
    /// The number that the peer's next datagram should have; `None` before its first.
    expected: Option<u32>,
    keepalives_received: u64,
    missing: u64,
    late: u64,
}

impl Link {
    /// Receives from the device, and puts the header in front of what came.
    fn encapsulate(&mut self, worker: &mut Worker, tun: PortId, to_peer: &mut Batch) -> Result<(), Box<dyn Error>> {
        // What is received goes behind what could not be sent yet, which has its header already.
        let old = to_peer.len();
        receive(worker, tun, to_peer)?;
        for packet in &mut to_peer[old..] {
            // It grows into the packet's headroom; nothing is copied but these eight bytes.
            packet.prepend(&self.header(DATA))?;
        }
        Ok(())
    }

    /// Receives from the socket, takes the header off, and keeps what is a packet of the peer's network.
    fn decapsulate(&mut self, worker: &mut Worker, udp: PortId, to_tun: &mut Batch) -> Result<(), String> {
        let mut old = to_tun.len();
        receive(worker, udp, to_tun)?;
        to_tun.retain_mut(|packet| {
            let is_new = old == 0;
            old = old.saturating_sub(1);
            !is_new || self.accept(packet)
        });
        Ok(())
    }

    /// Tells the peer that we are there, and keeps the way through firewalls open.
    fn keep_alive(&mut self, worker: &Worker, to_peer: &mut Batch) {
        // Without a free buffer, or room in the batch, there is traffic enough to tell.
        if let Some(mut packet) = worker.packet(HEADER)
            && !to_peer.is_full()
        {
            packet.copy_from_slice(&self.header(KEEP_ALIVE));
            let _ = to_peer.push(packet); // has room, as seen above
        }
    }

    fn header(&mut self, kind: u8) -> [u8; HEADER] {
        let number = self.next.to_be_bytes();
        self.next = self.next.wrapping_add(1);
        [MAGIC[0], MAGIC[1], kind, 0, number[0], number[1], number[2], number[3]]
    }

    /// Whether the datagram carries a packet, which it then is. Whatever the network sends must be taken without a panic.
    fn accept(&mut self, datagram: &mut PacketBuf) -> bool {
        let Some(&[magic, magic2, kind, 0, a, b, c, d]) = datagram.first_chunk::<HEADER>() else {
            return false;
        };
        if [magic, magic2] != MAGIC || kind > KEEP_ALIVE {
            return false;
        }
        let number = u32::from_be_bytes([a, b, c, d]);
        match self.expected.map(|expected| number.wrapping_sub(expected)) {
            None => cli::say("the peer is there"),
            Some(ahead) if ahead < 1 << 31 => self.missing += u64::from(ahead),
            // Overtaken on the way, or the peer began anew.
            Some(_) => self.late += 1,
        }
        self.expected = Some(number.wrapping_add(1));
        self.keepalives_received += u64::from(kind == KEEP_ALIVE);
        datagram.trim_front(HEADER);
        kind == DATA
    }

    fn print_counters(&self) {
        cli::say(format_args!(
            "datagrams {} missing {} late {} keepalives {}",
            self.next, self.missing, self.late, self.keepalives_received
        ));
    }
}

/// Sends from the front of the batch; what the kernel has no room for stays, in order. Fails if the port is gone.
fn send(worker: &mut Worker, port: PortId, batch: &mut Batch) -> Result<(), String> {
    let sent = worker.send_many(port, batch);
    // Dropped and counted: a datagram that is longer than the path takes, say.
    if let Some(error) = sent.refusal {
        cli::print_passing(worker, port, &error);
    }
    match sent.stopped {
        Some(error) if error.is_permanent() => Err(cli::named(worker, port, &error)),
        // A device that is down takes nothing for as long as it likes; late packets would be of no use.
        Some(error) if error.kind() == PortErrorKind::Down => {
            batch.clear();
            Ok(())
        }
        // Back-pressure, or all was taken.
        Some(_) | None => Ok(()),
    }
}

/// Receives what is there. What passes is printed: a packet that was too long, buffers that ran
/// out. What is permanent is an error.
fn receive(worker: &mut Worker, port: PortId, batch: &mut Batch) -> Result<(), String> {
    match worker.try_recv_many(port, batch) {
        Err(error) if error.is_permanent() => return Err(cli::named(worker, port, &error)),
        Err(error) => cli::print_passing(worker, port, &error),
        Ok(_) => {}
    }
    Ok(())
}
