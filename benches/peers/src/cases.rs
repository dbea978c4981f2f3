//! The cases: what is done, with whom, and which figures count.

use std::io;
use std::time::Duration;

use tun_driver::lab::Sandbox;
use tun_driver::lab::cases::{self, Load, Way};
use tun_driver::lab::measure::{CPU_NS, Plan, Turn, WALL_NS};
use tun_driver::lab::offered::{Offer, offered};
use tun_driver::lab::wire::{self, Carrier, Datagrams, DatagramsEnd, Places, Transfer};

use crate::compare::{Better, Shown, Table};
use crate::options::Options;
use crate::ways::{self, BASELINE, Entry, PLAIN, Taking};

/// All cases, in the order in which they run.
pub(crate) const ALL: [&str; 6] = ["drain", "sink", "latency", "rates", "wire-udp", "wire-tcp"];

/// Runs one of the cases, and gives each of its tables to `told` as soon as it is there.
pub(crate) fn run(case: &str, sandbox: &Sandbox, options: &Options, told: &mut dyn FnMut(Table)) -> io::Result<()> {
    match case {
        "drain" => drain(sandbox, options, told),
        "sink" => sink(sandbox, options, told),
        "latency" => latency(sandbox, options, told),
        "rates" => rates(sandbox, options, told),
        "wire-udp" => wire_udp(sandbox, options, told),
        "wire-tcp" => wire_tcp(sandbox, options, told),
        other => Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!("{other}: no such case"),
        )),
    }
}

const fn lower(name: &'static str) -> Shown {
    Shown {
        name,
        better: Better::Lower,
    }
}

const fn higher(name: &'static str) -> Shown {
    Shown {
        name,
        better: Better::Higher,
    }
}

const fn only_told(name: &'static str) -> Shown {
    Shown {
        name,
        better: Better::Told,
    }
}

type Told<'a> = &'a mut dyn FnMut(Table);

fn drain(sandbox: &Sandbox, options: &Options, told: Told<'_>) -> io::Result<()> {
    let chosen = choose(ways::moving(), options);
    for packet_len in [64, 1400] {
        let load = Load::of(packet_len);
        let title = format!("drain: {} packets of {packet_len} B at a time", load.packets);
        let report = cases::drain(
            sandbox,
            &on_device(&chosen),
            load,
            &plan(options),
            &mut progress(&title),
        )?;
        told(Table {
            case: "drain",
            title,
            notes: vec!["one thread on the last CPU; filling the queue is not timed".to_owned()],
            entries: entries(&chosen),
            report,
            figures: vec![lower(CPU_NS), only_told(WALL_NS)],
        });
    }
    Ok(())
}

fn sink(sandbox: &Sandbox, options: &Options, told: Told<'_>) -> io::Result<()> {
    let chosen = choose(ways::moving(), options);
    for packet_len in [64, 1400] {
        let load = Load::of(packet_len);
        let title = format!("sink: {} packets of {packet_len} B at a time", load.packets);
        let ways = on_device(&chosen);
        let (report, kind) = cases::sink(sandbox, &ways, load, &plan(options), &mut progress(&title))?;
        told(Table {
            case: "sink",
            title,
            notes: vec![format!("one thread on the last CPU; dropped by {kind}")],
            entries: entries(&chosen),
            report,
            figures: vec![lower(CPU_NS), only_told(WALL_NS)],
        });
    }
    Ok(())
}

fn latency(sandbox: &Sandbox, options: &Options, told: Told<'_>) -> io::Result<()> {
    let chosen = choose(ways::echoing(), options);
    let title = "latency: one small UDP packet there and back at a time".to_owned();
    let ways = on_device(&chosen);
    let trips = cases::round_trip(sandbox, &ways, TRIPS, &plan(options), &mut progress(&title))?;
    let mut notes = vec![format!(
        "{TRIPS} trips a round, the client's socket on the first CPU, the echo on the last"
    )];
    let micros = |nanos: u64| nanos as f64 / 1e3;
    for (taking, histogram) in chosen.iter().zip(&trips.histograms) {
        let at = |share| micros(histogram.value_at_quantile(share));
        notes.push(format!(
            "all rounds together, {}: p50 {:.1}, p99 {:.1}, p99.9 {:.1}, max {:.1} µs",
            taking.entry.name,
            at(0.5),
            at(0.99),
            at(0.999),
            micros(histogram.max())
        ));
    }
    told(Table {
        case: "latency",
        title,
        notes,
        entries: entries(&chosen),
        report: trips.report,
        figures: vec![lower("p50_us"), lower("p99_us"), lower("p99_9_us"), only_told(CPU_NS)],
    });
    Ok(())
}

/// A thousand per round, so that ten rounds say something of one in a thousand.
const TRIPS: usize = 1_000;

fn rates(sandbox: &Sandbox, options: &Options, told: Told<'_>) -> io::Result<()> {
    let chosen = choose(ways::serving(), options);
    for rate in [100_000, 200_000, 400_000] {
        let title = format!("rates: {rate} packets of 64 B per second");
        let offer = Offer::at(Some(rate));
        let ways = on_device(&chosen);
        let served = offered(sandbox, &ways, offer, &plan(options), &mut progress(&title))?;
        let mut notes = vec![
            "the generator on the first CPU, the way on the last; latency from the time at which each packet was due"
                .to_owned(),
        ];
        for (taking, tally) in chosen.iter().zip(&served.tallies) {
            if !tally.kept_rate {
                notes.push(format!(
                    "{}: the generator did not keep the rate in each round",
                    taking.entry.name
                ));
            }
        }
        told(Table {
            case: "rates",
            title,
            notes,
            entries: entries(&chosen),
            report: served.report,
            figures: vec![
                lower(CPU_NS),
                lower("rest_ns_per_packet"),
                lower("p50_us"),
                lower("p99_us"),
                only_told("lost_ppm"),
            ],
        });
    }
    Ok(())
}

fn wire_udp(sandbox: &Sandbox, options: &Options, told: Told<'_>) -> io::Result<()> {
    let chosen = choose(ways::carrying(false), options);
    let places = Places::apart()?;
    for packet_len in [64, 512, 1400] {
        for rate in [Some(100_000), None] {
            let offer = rate.map_or("as many as can be sent".to_owned(), |rate| format!("{rate} per second"));
            let title = format!("wire, UDP: packets of {packet_len} B, {offer}");
            let load = Datagrams {
                rate,
                packet_len,
                flows: 8,
                time: Duration::from_millis(200),
                end: DatagramsEnd::Sink,
            };
            let ways = between(&chosen);
            let report = wire::datagrams(sandbox, &ways, load, places, &plan(options), &mut progress(&title))?.report;
            let (rated, spent) = if rate.is_some() {
                (only_told("received_pps"), lower(CPU_NS))
            } else {
                (higher("received_pps"), lower(CPU_NS))
            };
            told(Table {
                case: "wire-udp",
                title,
                notes: vec![format!("{places}; dropped behind the far device, which counts")],
                entries: entries(&chosen),
                report,
                figures: vec![
                    rated,
                    only_told("gbit_per_s"),
                    spent,
                    only_told("sent_pps"),
                    only_told("lost_ppm"),
                    only_told("unexplained"),
                ],
            });
        }
    }
    Ok(())
}

fn wire_tcp(sandbox: &Sandbox, options: &Options, told: Told<'_>) -> io::Result<()> {
    let chosen = choose(ways::carrying(true), options);
    let version = wire::iperf3_version().map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => io::Error::new(
            io::ErrorKind::NotFound,
            "there is no iperf3; on Debian: apt-get install iperf3",
        ),
        _ => error,
    })?;
    for places in [Places::FREE, Places::apart()?] {
        for streams in [1, 8] {
            let spot = if places == Places::FREE { "free" } else { "apart" };
            let title = format!("wire, TCP: streams {streams}, {spot}");
            let transfer = Transfer {
                streams,
                time: Duration::from_secs(1),
            };
            let ways = between(&chosen);
            let report = wire::tcp(sandbox, &ways, transfer, places, &plan(options), &mut progress(&title))?;
            told(Table {
                case: "wire-tcp",
                title,
                notes: vec![
                    format!("{version}, MTU 1500, queue length 500; {places}"),
                    "tier 2 has vnet headers and offloads on: superpackets of up to 64 KiB".to_owned(),
                ],
                entries: entries(&chosen),
                report,
                figures: vec![
                    higher("gbit_per_s"),
                    lower("cpu_s_per_gb"),
                    lower("machine_cpu_s_per_gb"),
                    only_told("retransmits"),
                ],
            });
        }
    }
    Ok(())
}

/// Those whose names contain one of the words of `--only`, and always the two measures.
fn choose<W: ?Sized>(ways: Vec<Taking<W>>, options: &Options) -> Vec<Taking<W>> {
    let wanted = |name: &str| {
        name == BASELINE
            || name == PLAIN
            || options.only.is_empty()
            || options.only.iter().any(|word| name.contains(word))
    };
    ways.into_iter().filter(|taking| wanted(&taking.entry.name)).collect()
}

fn on_device(chosen: &[Taking<dyn Way>]) -> Vec<&dyn Way> {
    chosen.iter().map(|taking| &*taking.way).collect()
}

fn between(chosen: &[Taking<dyn Carrier>]) -> Vec<&dyn Carrier> {
    chosen.iter().map(|taking| &*taking.way).collect()
}

fn entries<W: ?Sized>(chosen: &[Taking<W>]) -> Vec<Entry> {
    chosen.iter().map(|taking| taking.entry.clone()).collect()
}

fn plan(options: &Options) -> Plan {
    Plan {
        rounds: options.rounds,
        warm_up: 1,
        baseline: 0,
        against_itself: true,
    }
}

/// Shows which sample is being taken, on a terminal.
fn progress(title: &str) -> impl FnMut(Turn) -> io::Result<()> + Send + use<> {
    use std::io::{IsTerminal, Write};
    let title = title.to_owned();
    let terminal = io::stderr().is_terminal();
    move |turn: Turn| {
        if terminal {
            eprint!("\r{title}: {}/{} ", turn.done + 1, turn.total);
            if turn.done + 1 == turn.total {
                eprint!("\r\x1b[K");
            }
            // Nothing is lost if it cannot be shown.
            let _ = io::stderr().flush();
        }
        Ok(())
    }
}
