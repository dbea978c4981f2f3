//! `tun-driver receive`: counts the stamped packets that come to an address of the network namespace in which it is started.

use std::io::{self, Write};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use clap::{ArgAction, Args};
use serde_json::{Value, json};
use tun_driver::lab::process;
use tun_driver::lab::receiver::{Receiver, SocketReceiver, Until};

use crate::{Failure, Output, address, per_second, positive, report, seconds, shown, until_interrupted};

#[derive(Args)]
pub(crate) struct Options {
    /// The address and port to receive at; port 0 takes a free one, which is told on standard error.
    #[arg(long, value_name = "ADDRESS:PORT", value_parser = address)]
    listen: SocketAddr,
    /// Flows that are expected; more are counted, too.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=65_536))]
    flows: u32,
    /// End when as many packets have come. Those of them that are missing at the end count as lost.
    #[arg(long, value_name = "N", value_parser = positive)]
    count: Option<u64>,
    /// End after this time, in seconds.
    #[arg(long, value_name = "SECONDS", value_parser = seconds)]
    duration: Option<Duration>,
    /// End when nothing has come for so long after the first packet, in milliseconds; 0 waits on.
    #[arg(long, value_name = "MS", default_value_t = 1_000)]
    quiet_ms: u64,
    /// The CPU to receive on.
    #[arg(long, value_name = "N")]
    cpu: Option<usize>,
    /// Verify each packet's checksum; without, damage is not found and each packet costs less.
    #[arg(long, value_name = "BOOL", default_value_t = true, action = ArgAction::Set)]
    verify: bool,
    /// Write all latencies to this file, as HdrHistogram's plotters read it.
    #[arg(long, value_name = "FILE")]
    hgrm: Option<PathBuf>,
    /// End with exit code 3 if more was lost, in percent.
    #[arg(long, value_name = "PERCENT", value_parser = percent)]
    max_loss: Option<f64>,
    /// End with exit code 3 if fewer packets per second came, from the first to the last.
    #[arg(long, value_name = "N", value_parser = per_second)]
    min_rate: Option<f64>,
    /// Print JSON instead of a line.
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(options: &Options) -> Result<(), Failure> {
    let stop = until_interrupted()?;
    if let Some(cpu) = options.cpu {
        process::pin_thread(cpu).map_err(|error| Failure::Usage(format!("CPU {cpu}: {error}")))?;
    }
    let books = Receiver::new(options.flows as usize).verify(options.verify);
    let mut receiver = SocketReceiver::bind(options.listen, books).map_err(|error| match error.raw_os_error() {
        Some(libc::EAFNOSUPPORT) => Failure::Lacking(format!("the address family of {}: {error}", options.listen)),
        Some(libc::EADDRNOTAVAIL) => Failure::Failed(format!(
            "--listen {}: {error}: give this host the address, or name one that it has",
            options.listen
        )),
        _ => Failure::Failed(format!("--listen {}: {error}", options.listen)),
    })?;
    // So that a run does not end with nowhere to write.
    let histogram = options
        .hgrm
        .as_deref()
        .map(|path| Output::open(path).map_err(|why| Failure::Failed(format!("--hgrm {why}"))))
        .transpose()?;
    eprintln!("listening on {}", receiver.address()?);
    let cpu = process::thread_cpu_time();
    receiver.run(
        Until {
            packets: options.count,
            quiet: (options.quiet_ms > 0).then(|| Duration::from_millis(options.quiet_ms)),
            time: options.duration,
        },
        stop,
    )?;
    let results = Results {
        cpu: process::thread_cpu_time().saturating_sub(cpu),
        dropped: receiver.dropped()?,
        receiver: receiver.into_receiver(),
        expected: options.count,
    };

    let mut out = io::stdout().lock();
    shown(match options.json {
        true => writeln!(out, "{:#}", to_json(options, &results)),
        false => writeln!(out, "{}", results.line()),
    })?;
    if let Some(histogram) = histogram {
        histogram
            .write(&report::hgrm(results.receiver.latency()))
            .map_err(|why| Failure::Failed(format!("--hgrm {why}")))?;
    }
    match (options.max_loss, results.loss_percent()) {
        (Some(most), Some(loss)) if loss > most => {
            return Err(Failure::Missed(format!("{loss:.4} % were lost, more than {most} %")));
        }
        (Some(most), None) => {
            return Err(Failure::Missed(format!(
                "no packet came, so it is unknown whether more than {most} % were lost"
            )));
        }
        _ => {}
    }
    match options.min_rate {
        Some(least) if results.rate() < least => Err(Failure::Missed(format!(
            "{:.0} packets per second came, fewer than {least}",
            results.rate()
        ))),
        _ => Ok(()),
    }
}

/// A share from 0 to 100.
fn percent(text: &str) -> Result<f64, String> {
    text.parse()
        .ok()
        .filter(|percent| (0.0..=100.0).contains(percent))
        .ok_or_else(|| "not a number from 0 to 100".to_owned())
}

struct Results {
    receiver: Receiver,
    cpu: Duration,
    /// For want of room in the socket.
    dropped: u64,
    expected: Option<u64>,
}

impl Results {
    /// The gaps, or what is missing from what was expected, where that is more.
    fn lost(&self) -> u64 {
        let summary = self.receiver.summary();
        let missing = self
            .expected
            .map_or(0, |expected| expected.saturating_sub(summary.received));
        summary.lost.max(missing)
    }

    /// Of what was sent as far as can be known; `None` where nothing is known to have been sent.
    fn loss_percent(&self) -> Option<f64> {
        let (lost, received) = (self.lost(), self.receiver.summary().received);
        let sent = lost + received;
        (sent > 0).then(|| lost as f64 / sent as f64 * 100.0)
    }

    fn line(&self) -> String {
        let summary = self.receiver.summary();
        if summary.received + summary.damaged + summary.foreign > 0 {
            let dropped = self.dropped;
            let loss = match self.loss_percent() {
                Some(loss) => format!("{loss:.4} % lost ({dropped} of them at this socket)"),
                None => format!("{dropped} dropped at this socket"),
            };
            return format!("{}; {loss}, {:.0}/s", self.receiver, self.rate());
        }
        let expected = self.expected.map(|count| format!(" of {count}")).unwrap_or_default();
        let dropped = match self.dropped {
            0 => "check the route to this address, and that `generate` sends to it".to_owned(),
            dropped => format!("{dropped} were dropped at this socket"),
        };
        format!("no packet came{expected}: {dropped}")
    }

    fn rate(&self) -> f64 {
        let packets = self.receiver.latency().len().saturating_sub(1); // as many as there are gaps between them
        packets as f64 / self.receiver.span().as_secs_f64().max(1e-9)
    }
}

fn to_json(options: &Options, results: &Results) -> Value {
    let summary = results.receiver.summary();
    let latency = results.receiver.latency();
    let at = |share| latency.value_at_quantile(share);
    json!({
        "schema_version": 1,
        "tool_version": env!("CARGO_PKG_VERSION"),
        "verb": "receive",
        "listen": options.listen.to_string(),
        "verified": options.verify,
        "flows": summary.flows,
        "received_packets": summary.received,
        "payload_bytes": results.receiver.bytes(),
        "packets_per_s": results.rate(),
        "lost_packets": results.lost(),
        "loss_percent": results.loss_percent(),
        "dropped_at_socket_packets": results.dropped,
        "late_packets": summary.late,
        "duplicate_packets": summary.duplicates,
        "damaged_packets": summary.damaged,
        "damaged_packets_by_kind": summary.faults,
        "span_s": results.receiver.span().as_secs_f64(),
        "cpu_s": results.cpu.as_secs_f64(),
        "latency": (!latency.is_empty()).then(|| json!({
            "min_ns": latency.min(), "p50_ns": at(0.5), "p90_ns": at(0.9), "p99_ns": at(0.99), "p99_9_ns": at(0.999),
            "p99_99_ns": at(0.9999), "max_ns": latency.max(), "mean_ns": latency.mean(),
        })),
    })
}
