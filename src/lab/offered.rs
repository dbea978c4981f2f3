//! Middling load: packets come at a set rate, and a way has to wait for them well.
//!
//! A [`Generator`] on the first CPU sends stamped packets on a fixed schedule into the way's device; the way receives them on the last CPU,
//! waiting as it waits. What counts is the receiving thread's CPU time per packet, the latency from the time at which each packet was meant
//! to be sent (so that a slow receiver cannot hide what it delays), and that nothing is lost, doubled, reordered or changed.

use std::io;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use hdrhistogram::Histogram;

use super::Sandbox;
use super::cases::{DISCARD, Progress, Stage, Way, names, told};
use super::generator::{Config, Generated, Generator, Limit};
use super::measure::{self, Clock, Elapsed, Plan, Report, Sample, Spread, Stopped, Turn};
use super::process::MachineCpu;
use super::receiver::Receiver;
use super::results::{Curve, Line, Point};
use crate::sys::cpu;

/// What is offered in one sample.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Offer {
    /// Packets per second; `None`: as many as the generator can.
    pub rate: Option<u64>,
    /// Length of each IP packet in bytes.
    pub packet_len: usize,
    /// How many flows take turns.
    pub flows: usize,
    /// How long.
    pub time: Duration,
}

impl Offer {
    /// 64-byte packets of 8 flows for 200 ms.
    pub fn at(rate: Option<u64>) -> Self {
        Self {
            rate,
            packet_len: 64,
            flows: 8,
            time: Duration::from_millis(200),
        }
    }
}

/// How the ways did at one rate.
#[derive(Clone, Debug)]
pub struct Served {
    /// Per round and way, besides the usual: `offered_pps`, `p50_us`, `p99_us`, `rest_ns_per_packet` (what the whole machine spent besides the
    /// generator's thread, above idle), `lost_ppm`.
    pub report: Report,
    /// Per way: latency in nanoseconds of all packets of the rounds that count.
    pub latency: Vec<Histogram<u64>>,
    /// Per way: what was sent in the rounds that count.
    pub tallies: Vec<Tally>,
}

/// What was sent to one way, over all rounds that count.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tally {
    /// Whether the generator kept the rate in every sample.
    pub kept_rate: bool,
    /// Packets that were sent.
    pub sent: u64,
    /// Packets of these that did not arrive: the queue was full.
    pub lost: u64,
}

/// Packets that are due within this time may go together. Little, as they would else come in bursts that the network did not make.
const WINDOW: Duration = Duration::from_micros(5);

/// Offers packets to each way in turn.
///
/// # Errors
/// What the way or the kernel says; InvalidData where packets were doubled, reordered within a flow, or changed.
pub fn offered(
    _: &Sandbox,
    ways: &[&dyn Way],
    offer: Offer,
    plan: &Plan,
    progress: Progress<'_>,
) -> io::Result<Served> {
    let empty = Histogram::new_with_bounds(1, 1 << 32, 3).map_err(io::Error::other)?;
    let mut latency = vec![empty; ways.len()];
    let nothing = Tally {
        kept_rate: true,
        sent: 0,
        lost: 0,
    };
    let mut tallies = vec![nothing; ways.len()];
    let idle = idle_share()?;
    let report = measure::compare(plan, &names(ways), |turn| {
        progress(turn)?;
        let one = one_offer(ways[turn.way], offer, idle)?;
        if turn.round >= plan.warm_up {
            latency[turn.way]
                .add(one.receiver.latency())
                .map_err(io::Error::other)?;
            let tally = &mut tallies[turn.way];
            tally.kept_rate &= one.generated.kept_rate();
            tally.sent += one.generated.sent;
            tally.lost += one.generated.sent - one.sample.packets;
        }
        Ok(one.sample)
    })?;
    Ok(Served {
        report,
        latency,
        tallies,
    })
}

/// The rates of a [`curve`]: packets per second, and as many as can be sent.
pub const RATES: [Option<u64>; 6] = [
    Some(20_000),
    Some(50_000),
    Some(100_000),
    Some(200_000),
    Some(400_000),
    None,
];

/// Offers each of the rates to each way in turn. `chosen` is the way that a verdict should speak of.
///
/// If `progress` fails with [`Stopped`], the curve has the rates and rounds that were complete by
/// then.
///
/// # Errors
/// As [`offered`].
pub fn curve(
    sandbox: &Sandbox,
    ways: &[&dyn Way],
    chosen: usize,
    rates: &[Option<u64>],
    offer: Offer,
    plan: &Plan,
    progress: Progress<'_>,
) -> io::Result<Curve> {
    let mut lines: Vec<Line> = names(ways)
        .into_iter()
        .map(|way| Line {
            way: way.to_owned(),
            points: Vec::with_capacity(rates.len()),
        })
        .collect();
    for (number, &rate) in rates.iter().enumerate() {
        let served = offered(sandbox, ways, Offer { rate, ..offer }, plan, &mut |turn: Turn| {
            progress(Turn {
                done: number * turn.total + turn.done,
                total: rates.len() * turn.total,
                ..turn
            })
        });
        let served = match served {
            // The rates before are worth having.
            Err(error) if Stopped::is(&error) && number > 0 => break,
            served => served?,
        };
        for (way, line) in lines.iter_mut().enumerate() {
            line.points.push(served.point(way, rate, plan.baseline)?);
        }
    }
    let fastest = lines
        .iter()
        .flat_map(|line| &line.points)
        .filter(|point| point.offered_pps.is_none());
    let ceiling = fastest.map(|point| point.sent_pps.median).reduce(f64::max);
    Ok(Curve {
        title: format!("receive and count, {} B, one queue", offer.packet_len),
        packet_bytes: offer.packet_len,
        generator_ceiling_pps: ceiling,
        baseline: plan.baseline,
        chosen,
        lines,
    })
}

impl Served {
    fn point(&self, way: usize, rate: Option<u64>, baseline: usize) -> io::Result<Point> {
        let (own, base) = (&self.report.ways[way], &self.report.ways[baseline]);
        let no_figure = || io::Error::other("a figure is missing");
        let spread = |name: &str| own.figure(name).map(|figure| figure.value).ok_or_else(no_figure);
        let each =
            |samples: &[Sample], name: &str| -> Vec<f64> { samples.iter().map(|sample| sample.figure(name)).collect() };
        let achieved: Vec<f64> = each(&own.samples, "offered_pps")
            .iter()
            .zip(each(&own.samples, "lost_ppm"))
            .map(|(sent, lost)| sent * (1.0 - lost / 1e6))
            .collect();
        let above: Vec<f64> = each(&own.samples, "p99_us")
            .iter()
            .zip(each(&base.samples, "p99_us"))
            .map(|(own, base)| own - base)
            .collect();
        let tally = self.tallies[way];
        Ok(Point {
            offered_pps: rate,
            sent_pps: spread("offered_pps")?,
            achieved_pps: Spread::of(&achieved).ok_or_else(no_figure)?,
            cpu_ns_per_packet: spread(measure::CPU_NS)?,
            machine_cpu_ns_per_packet: spread("rest_ns_per_packet")?,
            cpu_ratio: own.cpu_ratio(),
            p50_us: spread("p50_us")?,
            p99_us: spread("p99_us")?,
            p99_above_baseline_us: if way == baseline { None } else { Spread::of(&above) },
            sent: tally.sent,
            lost: tally.lost,
            // A sample with any of these ends the run.
            late: 0,
            duplicates: 0,
            damaged: 0,
            generator_bound: match rate {
                Some(_) => !tally.kept_rate,
                None => tally.lost == 0,
            },
            latency: Some(self.latency[way].clone()),
        })
    }
}

struct One {
    sample: Sample,
    receiver: Receiver,
    generated: Generated,
}

/// What part of its time the machine is busy while nothing is measured: the least of several looks, as others may be at work in one of them.
fn idle_share() -> io::Result<f64> {
    let mut least = 1.0f64;
    for _ in 0..5 {
        let before = MachineCpu::now()?;
        thread::sleep(Duration::from_millis(100));
        let idle = MachineCpu::now()?.since(&before);
        least = least.min(idle.busy().as_nanos() as f64 / idle.capacity_ns.max(1) as f64);
    }
    Ok(least)
}

fn one_offer(way: &dyn Way, offer: Offer, idle: f64) -> io::Result<One> {
    let cpus = cpu::allowed()?;
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        let (ready, opened) = mpsc::channel::<SocketAddr>();
        let (over, last) = (&over, cpus[cpus.len() - 1]);
        let receive = thread::Builder::new()
            .name("receive".to_owned())
            .spawn_scoped(scope, move || {
                cpu::pin_thread(last)?;
                let mut stage = Stage::open(way, 1)?;
                let mut receiver = Receiver::new(offer.flows).verify(false);
                let _ = ready.send(stage.nets[0].peer(DISCARD).into());
                let clock = Clock::start();
                stage
                    .runner
                    .serve(
                        &mut |packet, now| {
                            // What comes afterwards is there to wake the way.
                            if !over.load(Ordering::Relaxed) {
                                receiver.packet(packet, now);
                            }
                        },
                        over,
                    )
                    .map_err(|error| told(way, &error))?;
                io::Result::Ok((clock.elapsed(), receiver))
            })?;
        let Ok(target) = opened.recv() else {
            // It says why.
            let ended: io::Result<(Elapsed, Receiver)> =
                receive.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            return Err(ended
                .err()
                .unwrap_or_else(|| io::Error::other("the receiver ended early")));
        };
        let config = Config {
            flows: offer.flows,
            length: offer.packet_len,
            rate: offer.rate,
            limit: Limit::Time(offer.time),
            window: WINDOW,
            cpu: Some(cpus[0]),
            ..Config::new(target)
        };
        let generate = thread::Builder::new()
            .name("generate".to_owned())
            .spawn_scoped(scope, move || {
                let mut generator = Generator::new(&config)?;
                let before = MachineCpu::now()?;
                let generated = generator.run(&AtomicBool::new(false))?;
                let machine = MachineCpu::now()?.since(&before);
                let above_idle = machine.busy().as_nanos() as f64 - idle * machine.capacity_ns as f64;
                io::Result::Ok((generated, Duration::from_nanos(above_idle.max(0.0) as u64)))
            })?;
        let generated = generate.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        // What is under way arrives.
        thread::sleep(Duration::from_millis(5));
        over.store(true, Ordering::Release);
        let knock = std::net::UdpSocket::bind("0.0.0.0:0")?;
        while !receive.is_finished() {
            // Wakes the way so that it looks at the flag.
            // It fails once the device is gone with its receiver.
            let _ = knock.send_to(&[0], target);
            thread::sleep(Duration::from_millis(1));
        }
        let (elapsed, receiver) = receive
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
        let (generated, machine) = generated?;
        sample(way, elapsed, receiver, generated, machine)
    })
}

fn sample(
    way: &dyn Way,
    elapsed: Elapsed,
    mut receiver: Receiver,
    generated: Generated,
    machine: Duration,
) -> io::Result<One> {
    generated.tell(receiver.tracker_mut());
    let summary = receiver.summary();
    if summary.late + summary.duplicates + summary.damaged + summary.invented > 0 {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            format!("{}: {summary}", way.name()),
        ));
    }
    let mut sample = Sample::default();
    sample.add(elapsed, summary.received);
    let micros = |share: f64| receiver.latency().value_at_quantile(share) as f64 / 1e3;
    let rest = machine.saturating_sub(generated.cpu).as_nanos() as f64 / summary.received.max(1) as f64;
    sample.figures = vec![
        ("offered_pps", generated.rate()),
        ("p50_us", micros(0.5)),
        ("p99_us", micros(0.99)),
        ("rest_ns_per_packet", rest),
        ("lost_ppm", summary.lost as f64 * 1e6 / generated.sent.max(1) as f64),
    ];
    Ok(One {
        sample,
        receiver,
        generated,
    })
}
