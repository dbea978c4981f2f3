//! Made-up results of every kind, the same each time, for the tests of what is written from them.

use std::time::{Duration, SystemTime};

use hdrhistogram::Histogram;
use tun_driver::lab::measure::{Machine, Plan, Report, Sample, Spread, compare};
use tun_driver::lab::results::{Act, Acts, Curve, Line, Point, Scaling, Setup};

use crate::bench::{Outcome, Results};

pub(super) fn results() -> Results {
    let mut noise = Noise(1);
    let moving = ["Iface, non-blocking", "worker, io_uring", "worker, system calls"];
    let mut outcomes = Vec::new();
    for (key, title, costs) in [
        ("drain", "receive", [658.0, 474.0, 678.0]),
        ("sink", "send", [991.0, 684.0, 1011.0]),
        ("forward", "forward", [2385.0, 1789.0, 2456.0]),
    ] {
        for packet_len in [64, 1400] {
            let costs = costs.map(|cost| cost * if packet_len == 64 { 1.0 } else { 1.04 });
            outcomes.push(Outcome {
                title: format!("{title}, {packet_len} B"),
                note: (key == "sink").then_some("BPF at tc ingress (TCX)"),
                report: report(&mut noise, &moving, |way| (costs[way], vec![])),
                histograms: vec![],
                key,
                packet_len: Some(packet_len),
            });
        }
    }
    let supers = [
        "read/write, 1400 B",
        "read/write, superpackets",
        "read/write, superpackets, a buffer each",
        "worker, io_uring, offloads",
        "worker, system calls, offloads",
    ];
    outcomes.push(Outcome {
        title: "superpackets, TCP".to_owned(),
        note: None,
        report: report(&mut noise, &supers, |way| {
            let cost = [2600.0, 160.0, 184.0, 179.0, 190.0][way];
            (
                cost,
                vec![("gbit_per_s", 1448.0 * 8.0 / cost), ("cpu_ns_per_kib", cost / 1.41)],
            )
        }),
        histograms: vec![],
        key: "superpackets",
        packet_len: None,
    });
    let waiting = [
        ("Iface, blocking", 53.5, 9.0),
        ("worker, io_uring", 58.3, 11.0),
        ("worker, io_uring, spin 100µs", 21.2, 60.0),
        ("worker, system calls", 52.4, 9.5),
        ("worker, system calls, spin 100µs", 21.7, 60.0),
    ];
    let names = waiting.map(|(name, ..)| name);
    outcomes.push(Outcome {
        title: "round trip of one small packet at a time".to_owned(),
        note: None,
        report: report(&mut noise, &names, |way| {
            let (_, median, cpu) = waiting[way];
            (
                cpu * 1e3,
                vec![("p50_us", median), ("p99_us", median * 1.9), ("p99_9_us", median * 3.1)],
            )
        }),
        histograms: waiting
            .iter()
            .map(|(_, median, _)| histogram(&mut noise, 20_000, median * 1e3))
            .collect(),
        key: "round_trip",
        packet_len: None,
    });
    let crews = [
        "1 queue, a bare worker loop",
        "1 queue, 1 worker",
        "1 queue, 1 worker, histograms",
    ];
    outcomes.push(Outcome {
        title: "an engine beside a bare worker loop".to_owned(),
        note: None,
        report: report(&mut noise, &crews, |way| (600.0 + 5.0 * way as f64, vec![])),
        histograms: vec![],
        key: "engine",
        packet_len: Some(64),
    });
    Results {
        machine: Machine {
            cpu_model: "AMD EPYC 9B14".to_owned(),
            cpus: 2,
            kernel: "6.18.44".to_owned(),
            mitigations: vec![
                "retbleed: untrained return thunk; SMT vulnerable".to_owned(),
                "spectre_v2: Retpolines; IBPB: conditional".to_owned(),
            ],
            virtual_machine: true,
        },
        command: "tun-driver bench".to_owned(),
        began: SystemTime::UNIX_EPOCH + Duration::from_secs(1_767_225_599),
        quick: false,
        rounds: 20,
        rootless: false,
        seconds: 412.0,
        debug_build: false,
        incomplete: None,
        missing: vec![],
        outcomes,
        curves: vec![curve(&mut noise)],
        scalings: vec![scaling(&mut noise)],
        acts: vec![acts(&mut noise)],
    }
}

fn report(noise: &mut Noise, ways: &[&str], cost: impl Fn(usize) -> (f64, Vec<(&'static str, f64)>)) -> Report {
    let plan = Plan {
        rounds: 20,
        ..Plan::default()
    };
    compare(&plan, ways, |turn| {
        let (nanos, figures) = cost(turn.way);
        let factor = noise.around(1.0);
        let time = Duration::from_nanos((nanos * factor * 25_600.0) as u64);
        let figures = figures
            .into_iter()
            .map(|(name, value)| (name, value * noise.around(1.0)))
            .collect();
        Ok(Sample {
            packets: 25_600,
            cpu: time,
            wall: time.mul_f64(1.01),
            figures,
        })
    })
    .unwrap()
}

fn curve(noise: &mut Noise) -> Curve {
    // Name, CPU per packet alone and in a batch, latency, and how much a look costs that finds nothing.
    let ways = [
        ("poll + read", 9_000.0, 2_300.0, 32.0, 0.0),
        ("worker, io_uring", 9_300.0, 1_900.0, 34.0, 0.0),
        ("worker, io_uring, moderate", 7_900.0, 900.0, 46.0, 0.0),
        ("worker, io_uring, spin 100µs", 3_000.0, 800.0, 9.0, 700e6),
        ("worker, system calls", 9_400.0, 2_350.0, 35.0, 0.0),
        ("worker, system calls, moderate", 8_100.0, 1_300.0, 47.0, 0.0),
    ];
    let rates = [
        Some(20_000),
        Some(50_000),
        Some(100_000),
        Some(200_000),
        Some(400_000),
        None,
    ];
    let cpu = |way: usize, pps: f64| {
        let (_, alone, batched, _, idle) = ways[way];
        let batching = (pps / 600e3).min(1.0);
        (alone * (1.0 - batching) + batched * batching).max(idle / pps)
    };
    let lines = ways.iter().enumerate().map(|(way, (name, _, _, latency, _))| {
        let points = rates.map(|offered| {
            let most = 780e3 + 60e3 * way as f64;
            let pps = offered.map_or(most, |rate: u64| rate as f64);
            let arrived = pps * if offered.is_none() && way < 2 { 0.93 } else { 1.0 };
            let p99 = latency * (2.2 + pps / 300e3);
            Point {
                offered_pps: offered,
                sent_pps: noise.spread(pps),
                achieved_pps: noise.spread(arrived),
                cpu_ns_per_packet: noise.spread(cpu(way, pps)),
                machine_cpu_ns_per_packet: noise.spread(cpu(way, pps) + 1_400.0),
                cpu_ratio: (way > 0).then(|| noise.spread(cpu(way, pps) / cpu(0, pps))),
                p50_us: noise.spread(latency * (1.0 + pps / 900e3)),
                p99_us: noise.spread(p99),
                p99_above_baseline_us: (way > 0).then(|| noise.spread(p99 - 32.0 * (2.2 + pps / 300e3))),
                sent: (pps * 20.0) as u64,
                lost: ((pps - arrived) * 20.0) as u64,
                late: u64::from(offered.is_none() && way == 3) * 17,
                duplicates: 0,
                damaged: 0,
                generator_bound: offered.is_none() && way > 1,
                latency: Some(histogram(noise, 2_000, latency * 1e3)),
            }
        });
        Line {
            way: (*name).to_owned(),
            points: points.into(),
        }
    });
    Curve {
        title: "receive and count, one queue".to_owned(),
        packet_bytes: 64,
        generator_ceiling_pps: Some(1.13e6),
        baseline: 0,
        chosen: 2,
        lines: lines.collect(),
    }
}

fn scaling(noise: &mut Noise) -> Scaling {
    let mut setup = |name: &str, queues, workers, factor: f64, per_queue_share: Vec<f64>| Setup {
        name: name.to_owned(),
        queues,
        workers,
        pps: noise.spread(1.31e6 * factor),
        ratio: (factor != 1.0).then(|| noise.spread(factor)),
        hand_over: per_queue_share.iter().map(|_| histogram(noise, 500, 4_000.0)).collect(),
        per_queue_share,
    };
    Scaling {
        title: "receive from many flows".to_owned(),
        packet_bytes: 64,
        flows: 256,
        rows: vec![
            setup("1 queue, 1 worker", 1, 1, 1.0, vec![1.0]),
            setup("2 queues, 1 worker", 2, 1, 0.97, vec![0.53, 0.47]),
            setup("4 queues, 2 workers", 4, 2, 1.79, vec![0.31, 0.22, 0.24, 0.23]),
            setup("2 queues, 2 workers", 2, 2, 1.86, vec![0.53, 0.47]),
        ],
    }
}

fn acts(noise: &mut Noise) -> Acts {
    let mut act = |name: &str, nanos, bound| Act {
        name: name.to_owned(),
        took: histogram(noise, 200, nanos),
        bound,
        delay: Duration::ZERO,
    };
    Acts {
        title: "stop and wake".to_owned(),
        rows: vec![
            act("stop_within, idle, 2 workers", 900e3, Some(Duration::from_millis(100))),
            act("stop_within, loaded, 2 workers", 7e6, Some(Duration::from_millis(100))),
            act(
                "stop_within, loaded, handler that sleeps",
                40e6,
                Some(Duration::from_millis(100)),
            ),
            act("wake a sleeping worker", 31e3, None),
        ],
    }
}

/// Durations in nanoseconds with a long tail.
fn histogram(noise: &mut Noise, count: usize, median: f64) -> Histogram<u64> {
    let mut histogram = Histogram::new_with_bounds(1, 10_000_000_000, 3).unwrap();
    for _ in 0..count {
        let rare = 1.0 / noise.next().max(1e-6);
        histogram
            .record((median * noise.around(1.0) * (0.9 + 0.05 * rare.powf(0.6))) as u64)
            .unwrap();
    }
    histogram
}

/// Numbers between 0 and 1 that look random (a linear congruential generator, Knuth's constants).
struct Noise(u64);

impl Noise {
    fn next(&mut self) -> f64 {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 11) as f64 / (1_u64 << 53) as f64
    }

    fn around(&mut self, value: f64) -> f64 {
        value * (0.93 + 0.14 * self.next())
    }

    fn spread(&mut self, value: f64) -> Spread {
        let values: Vec<f64> = (0..20).map(|_| self.around(value)).collect();
        Spread::of(&values).unwrap()
    }
}
