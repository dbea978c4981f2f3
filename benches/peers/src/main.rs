//! tun_driver beside other TUN/TAP libraries: one process, one topology, one packet trace, the ways in turn.
//!
//! ```sh
//! cargo run --release -p tun_driver_peers -- --help
//! cargo run --release -p tun_driver_peers                       # all cases, ten rounds: about twenty minutes
//! cargo run --release -p tun_driver_peers -- --quick --case drain
//! ```
//!
//! Needs root (or user namespaces), `/dev/net/tun`, a C compiler for tun-tap (`--no-default-features` leaves it out), iperf3 for `wire-tcp`.
//! Everything happens in network namespaces that vanish with the process. Leaves `peers.json` and `peers.md` in `--out`.
//!
//! # Who takes part
//!
//! | way | what it is |
//! |---|---|
//! | tun-rs sync | `SyncDevice::recv` and `send`; where packets go both ways, a thread per direction, as in its own benchmark. **The baseline** |
//! | plain read/write | the same loop over read(2) and write(2) |
//! | poll + drain | the same calls, non-blocking: poll(2), then until EAGAIN; one thread for both directions |
//! | tun-rs async | `AsyncDevice` in tokio's current-thread runtime; a task per direction |
//! | tun-tap | `Iface::recv` and `send`, a thread per direction |
//! | tun-rs sync / async, offload | `recv_multiple` and `send_multiple`; tier 2, where the traffic is TCP |
//! | tun-rs sync, busy | non-blocking receives, again and again; tier 2, what spinning has to be held against |
//! | floor (raw ring) | hand-written on `io-uring`, everything fixed beforehand. No peer: the least that can be done with a ring |
//! | tun_driver io_uring, syscalls | a `Worker` on each backend; between two devices an `Engine` with one worker. The default way of waiting unless `Block` or `Spin` is told; where nobody waits, it makes no difference |
//! | tun_driver …, offload | superpackets go on as they came; tier 2, as the next |
//! | tun_driver …, cut and merge | superpackets are cut (`Batch::split_into`), and the segments merged where they are sent |
//! | tun_driver …, 2 threads | over the wire: a `Worker` per direction, as many threads as the loops that block have |
//!
//! Tier 1 has the same device flags for everybody: TUN, no packet info, no vnet header, one queue, MTU 1500, queue length 500. Tier 2 is what a
//! library documents as its best beyond that. Of tun_driver: `Offloads::all()` on both devices.
//!
//! # Method
//!
//! - Each round gives each way one turn, in rotating order, after one round of warm-up; ratios are formed within rounds. The baseline runs twice
//!   in each round: what is told of its second run is the ratio of a thing to itself.
//! - One code brings the devices up and gives them addresses; a library only creates them. The loops that take one packet per call are one text
//!   over a trait, so they differ by what the library adds. A receive is given 1536 bytes everywhere (the floor: 2048), a batch is 64 packets.
//! - Threads: `drain` and `sink` on the last CPU. `latency` and `rates`: the client or generator on the first, the way on the last. `wire-udp`:
//!   generator on the first, all carrying threads on the last. `wire-tcp` twice: `free` leaves all to the scheduler, `apart` has all carrying
//!   threads on the last CPU, and iperf3's client on the first.
//! - CPU time is that of the way's own threads, added up. Beside it, where interrupts and wake-ups matter, what the whole machine spent.
//! - Every packet of `drain` and `sink` is accounted for, or the run fails; over the wire, what is lost is told by place,
//!   and `unexplained` has to be 0. That nothing is reordered, doubled or changed there, the tests of this package check.
//!
//! | case | what is timed |
//! |---|---|
//! | drain | emptying a queue that was filled with 256 packets |
//! | sink | writing 256 packets, which a program drops right behind the device |
//! | latency | one small packet from a socket through the way and back, one at a time |
//! | rates | waiting for 100, 200, 400 thousand packets per second and counting them |
//! | wire-udp | 64, 512, 1400 B from one namespace to another, at 50,000 per second and as many as can be sent |
//! | wire-tcp | iperf3 from one namespace to another, 1 and 8 streams |
//!
//! # What the figures do not show
//!
//! - `drain`, `sink`: how a way waits. The loops without batches send one warm buffer again and again, ours a buffer per packet.
//! - `latency`: behaviour under load; and that a spinning way takes a whole core, which only the CPU time tells.
//! - `rates`: the loops that block read the clock for each packet, those that drain for every eighth, batches once: some 25 ns a packet on the
//!   side of the batches.
//! - `wire-udp`: what a receiver costs, as a program drops the packets behind the far device. Where as many are sent as can be, the near device's
//!   queue is always full, and the generator's cost of running into it is on another CPU.
//! - `wire-tcp`: the ends of TCP run on the same machine and compete with the carrier, more so `free`; so a carrier that saves CPU gains throughput
//!   twice. `free` with one stream, the loops that block use two CPUs and our default one thread, which is what limits it: `2 threads` is the like of
//!   the baseline there. With superpackets the ends are what limits: look at CPU time per gigabyte. `machine_cpu_s_per_gb` counts everything on the machine.
//! - All: one queue, one machine. Mitigations make system calls dear, which favours batches; nothing is said of network cards.

#![deny(unsafe_code)]

mod cases;
mod compare;
#[allow(unsafe_code, dead_code)] // a ring by hand; its plain loop serves other benchmarks
#[path = "../../floor/mod.rs"]
mod floor;
mod options;
#[allow(unsafe_code)] // poll(2)
mod packets;
mod report;
mod tun_rs_more;
mod two_workers;
mod ways;

#[cfg(test)]
mod tests;

use std::io;
use std::path::Path;
use std::process::{Command, ExitCode};
use std::{env, fs};

use tun_driver::lab::Sandbox;
use tun_driver::lab::measure::Machine;

use crate::compare::Table;
use crate::options::{Options, USAGE};
use crate::report::{Context, Missing};

/// Something that was asked for cannot be measured here.
const SKIPPED: u8 = 77;

fn main() -> ExitCode {
    let options = match options::parse(env::args().skip(1)) {
        Ok(Some(options)) => options,
        Ok(None) => {
            println!("{USAGE}");
            return ExitCode::SUCCESS;
        }
        Err(told) => {
            eprintln!("{told}\n\n{USAGE}");
            return ExitCode::from(2);
        }
    };
    if !Path::new("/dev/net/tun").exists() {
        eprintln!("there is no /dev/net/tun: modprobe tun, or give the container the device");
        return ExitCode::from(SKIPPED);
    }
    // Before any thread.
    let sandbox = match Sandbox::enter() {
        Ok(sandbox) => sandbox,
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            eprintln!("no network namespace to measure in: {error}");
            return ExitCode::from(SKIPPED);
        }
        Err(error) => {
            eprintln!("{error}");
            return ExitCode::FAILURE;
        }
    };
    match measure(&sandbox, &options) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("{}: {error}", options.out.display());
            ExitCode::FAILURE
        }
    }
}

/// Runs the cases, and writes what they gave after each: a later failure loses nothing.
fn measure(sandbox: &Sandbox, options: &Options) -> io::Result<ExitCode> {
    let context = context(options);
    let head = context.markdown();
    println!("{head}");
    let (mut tables, mut missing) = (Vec::new(), Vec::new());
    let mut code = 0;
    for &case in &options.cases {
        let result = cases::run(case, sandbox, options, &mut |table: Table| {
            println!("{}", table.markdown());
            tables.push(table);
        });
        if let Err(error) = result {
            let cannot = matches!(
                error.kind(),
                io::ErrorKind::NotFound | io::ErrorKind::PermissionDenied | io::ErrorKind::Unsupported
            );
            // A failure is worse than something that cannot be done.
            code = if cannot && code != 1 { SKIPPED } else { 1 };
            eprintln!("{case}: {error}");
            missing.push(Missing {
                case,
                why: error.to_string(),
            });
        }
        write(&context, &head, &tables, &missing, &options.out)?;
    }
    println!("{}", report::conclusion(&tables, &missing));
    eprintln!("written to {}", options.out.display());
    Ok(ExitCode::from(code))
}

fn write(context: &Context, head: &str, tables: &[Table], missing: &[Missing], out: &Path) -> io::Result<()> {
    fs::create_dir_all(out)?;
    let body: String = tables.iter().map(Table::markdown).collect();
    let text = format!("{head}{body}{}", report::conclusion(tables, missing));
    fs::write(out.join("peers.md"), text)?;
    let told = serde_json::to_string_pretty(&report::json(context, tables, missing))?;
    fs::write(out.join("peers.json"), told)
}

fn context(options: &Options) -> Context {
    let arguments: Vec<String> = env::args().skip(1).collect();
    Context {
        machine: Machine::read(),
        commit: commit(),
        command: format!("cargo run --release -p tun_driver_peers -- {}", arguments.join(" ")),
        quick: options.quick,
        rounds: options.rounds,
        versions: versions(),
    }
}

/// What was compiled in, from the lock file.
fn versions() -> Vec<(String, String)> {
    let lock = include_str!("../../../Cargo.lock");
    let mut found = Vec::new();
    for package in lock.split("[[package]]") {
        let field = |key: &str| {
            let line = package.lines().find_map(|line| line.strip_prefix(key))?;
            Some(line.trim_start_matches(" = ").trim_matches('"').to_owned())
        };
        if let (Some(name), Some(version)) = (field("name"), field("version"))
            && ["tun_driver", "tun-rs", "tun-tap", "tokio", "io-uring"].contains(&name.as_str())
        {
            found.push((name, version));
        }
    }
    found
}

/// The commit of the sources, `-dirty` where they differ from it; `None` outside a repository.
fn commit() -> Option<String> {
    let output = Command::new("git")
        .args([
            "-C",
            env!("CARGO_MANIFEST_DIR"),
            "describe",
            "--always",
            "--dirty",
            "--exclude=*",
        ])
        .output()
        .ok()?;
    let told = String::from_utf8(output.stdout).ok()?;
    (output.status.success() && !told.trim().is_empty()).then(|| told.trim().to_owned())
}
