//! `tun-driver generate`: stamped packets on a fixed schedule, from the network namespace in which it is started.

use std::io::{self, Write};
use std::net::SocketAddr;
use std::time::Duration;

use clap::{Args, ValueEnum};
use serde_json::{Value, json};
use tun_driver::lab::generator::{self, Config, Generated, Generator, Limit, Way};

use crate::{Failure, address, destination, number, per_second, positive, seconds, shown, until_interrupted};

#[derive(Args)]
pub(crate) struct Options {
    /// Where to: an address that is routed into the device under test, and a port.
    #[arg(long, value_name = "ADDRESS:PORT", value_parser = destination)]
    target: SocketAddr,
    /// The source address, and the source port of flow 0; flow N has the Nth port after it. Unless given, the kernel chooses.
    #[arg(long, value_name = "ADDRESS:PORT", value_parser = address)]
    source: Option<SocketAddr>,
    /// Flows, each with a source port and a sequence of its own.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=65_536))]
    flows: u32,
    /// Bytes of each packet from the IP header on.
    #[arg(long, value_name = "BYTES", default_value_t = 64)]
    length: usize,
    /// Packets per second of all flows together, such as 200000, 200k or 1.5M, or `max`.
    #[arg(long, value_name = "N|max", default_value = "10000", value_parser = rate)]
    rate: Rate,
    /// For how long, in seconds.
    #[arg(long, value_name = "SECONDS", default_value = "1", value_parser = seconds, conflicts_with = "count")]
    duration: Duration,
    /// How many packets, however long it takes.
    #[arg(long, value_name = "N", value_parser = positive)]
    count: Option<u64>,
    /// The CPU to send from.
    #[arg(long, value_name = "N")]
    cpu: Option<usize>,
    /// How packets that go together are sent; the cheapest that this kernel has unless given.
    #[arg(long, value_enum)]
    way: Option<WayName>,
    /// Packets that are due within this time go together, in microseconds; 0 sends each alone.
    #[arg(long, value_name = "US", default_value_t = 20)]
    window_us: u64,
    /// How long before a packet's time to wake up and watch the clock, in microseconds; 0 only sleeps, and is late by what a wake-up takes.
    #[arg(long, value_name = "US", default_value_t = 60)]
    wake_ahead_us: u64,
    /// Send as fast as possible for 300 ms before, and tell how fast that was.
    #[arg(long)]
    ceiling: bool,
    /// End with exit code 3 if fewer packets per second were sent.
    #[arg(long, value_name = "N", value_parser = per_second)]
    min_rate: Option<f64>,
    /// Print JSON instead of a line.
    #[arg(long)]
    json: bool,
}

/// Packets per second; none where there is no bound.
#[derive(Clone, Copy)]
struct Rate(Option<u64>);

#[derive(Clone, Copy, ValueEnum)]
enum WayName {
    /// A system call per packet.
    Single,
    /// sendmmsg(2).
    Batch,
    /// UDP GSO: one large packet, which the kernel cuts.
    Gso,
}

pub(crate) fn run(options: &Options) -> Result<(), Failure> {
    let config = Config {
        source: options.source,
        flows: options.flows as usize,
        length: options.length,
        rate: options.rate.0,
        limit: options.count.map_or(Limit::Time(options.duration), Limit::Packets),
        window: Duration::from_micros(options.window_us),
        way: options.way.map(|way| match way {
            WayName::Single => Way::Single,
            WayName::Batch => Way::Batch,
            WayName::Gso => Way::Gso,
        }),
        cpu: options.cpu,
        wake_ahead: Duration::from_micros(options.wake_ahead_us),
        ..Config::new(options.target)
    };
    let stop = until_interrupted()?;
    let told = |error: io::Error| match (error.kind(), error.raw_os_error()) {
        (io::ErrorKind::InvalidInput, None) => Failure::Usage(error.to_string()),
        (_, Some(libc::ENOPROTOOPT)) => Failure::Lacking(format!("UDP GSO (Linux 4.18): {error}")),
        (_, Some(libc::EAFNOSUPPORT)) => Failure::Lacking(format!("the address family of {}: {error}", options.target)),
        (_, Some(libc::EMFILE)) => Failure::Failed(format!(
            "{error}: each flow takes a descriptor; raise the limit (ulimit -n) or ask for fewer flows"
        )),
        (_, Some(libc::EADDRNOTAVAIL | libc::EADDRINUSE)) if options.source.is_some() => Failure::Failed(format!(
            "--source {}: {error}: give this host the address, or name an address and a port \
                 that are free here, for {} flows",
            options.source.unwrap_or(options.target),
            options.flows
        )),
        (_, Some(libc::ENETUNREACH | libc::EHOSTUNREACH)) => {
            Failure::Failed(format!("--target {}: {error}: add a route to it", options.target))
        }
        _ => Failure::Failed(format!("--target {}: {error}", options.target)),
    };
    let ceiling = options
        .ceiling
        .then(|| generator::ceiling(&config, Duration::from_millis(300)).map_err(told))
        .transpose()?;
    let generated = Generator::new(&config)
        .and_then(|mut generator| generator.run(stop))
        .map_err(told)?;

    let mut out = io::stdout().lock();
    let report = match (options.json, &ceiling) {
        (true, _) => format!("{:#}", to_json(options, &generated, ceiling.as_ref())),
        (false, Some(ceiling)) => format!("ceiling: {ceiling}\n{generated}"),
        (false, None) => generated.to_string(),
    };
    shown(writeln!(out, "{report}"))?;
    if generated.sent == 0 && !generated.stopped && generated.due > 0 {
        return Err(Failure::Failed(match generated.refused.keys().next() {
            Some(&errno) => format!(
                "no packet was taken: {}; is the route's MTU below {} bytes, or its device down?",
                io::Error::from_raw_os_error(errno),
                options.length
            ),
            None => "no packet was sent".to_owned(),
        }));
    }
    match options.min_rate {
        Some(least) if generated.rate() < least => Err(Failure::Missed(format!(
            "{:.0} packets per second were sent, fewer than {least}",
            generated.rate()
        ))),
        _ => Ok(()),
    }
}

fn rate(text: &str) -> Result<Rate, String> {
    match text {
        "max" => Ok(Rate(None)),
        _ => match number(text) {
            Ok(rate) if rate > 0 => Ok(Rate(Some(rate))),
            _ => Err("not packets per second from 1 on, such as 200000, 200k or 1.5M, or max".to_owned()),
        },
    }
}

fn to_json(options: &Options, generated: &Generated, ceiling: Option<&Generated>) -> Value {
    let refused: Vec<Value> = generated
        .refused
        .iter()
        .map(|(errno, packets)| json!({ "errno": errno, "packets": packets }))
        .collect();
    let lateness = &generated.lateness;
    json!({
        "schema_version": 1,
        "tool_version": env!("CARGO_PKG_VERSION"),
        "verb": "generate",
        "target": options.target.to_string(),
        "length_bytes": options.length,
        "asked_packets_per_s": options.rate.0,
        "packets_per_s": generated.rate(),
        "kept_rate": generated.kept_rate(),
        "ceiling_packets_per_s": ceiling.map(Generated::rate),
        "interrupted": generated.stopped,
        "due_packets": generated.due,
        "sent_packets": generated.sent,
        "unsent_packets": generated.unsent(),
        "sent_packets_by_flow": generated.flows,
        "refused": refused,
        "told_refused_by_target": generated.answers,
        "stalls": generated.stalls,
        "way": format!("{:?}", generated.way).to_lowercase(),
        "group_packets": generated.group,
        "system_calls": generated.calls,
        "wall_s": generated.wall.as_secs_f64(),
        "cpu_s": generated.cpu.as_secs_f64(),
        "cpu_ns_per_packet": generated.cpu_ns_per_packet(),
        "lateness": (!lateness.is_empty()).then(|| json!({
            "p50_ns": lateness.value_at_quantile(0.5), "p99_ns": lateness.value_at_quantile(0.99), "max_ns": lateness.max(),
        })),
    })
}
