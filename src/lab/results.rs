//! What measurements give that are more than a [`Report`](super::measure::Report): curves over the offered rate, scaling over queues, and how
//! long single acts take.
//!
//! These are plain data: whoever measures fills them, `tun-driver bench` writes them as table, JSON, histograms and plots. As in a `Report`,
//! each [`Spread`] is over the rounds, and what compares two ways was formed inside each round.

use std::time::Duration;

use hdrhistogram::Histogram;

use super::measure::Spread;

/// How ways behave over the rate at which packets are offered to them.
#[derive(Clone, Debug, PartialEq)]
pub struct Curve {
    /// What is done, for people: `receive and count, 64 B, one queue`.
    pub title: String,
    /// Length of each IP packet.
    pub packet_bytes: usize,
    /// What the generator can send when nobody holds it up, in packets per second, if that was measured.
    pub generator_ceiling_pps: Option<f64>,
    /// Index in `lines` of the way that the comparisons refer to.
    pub baseline: usize,
    /// Index in `lines` of the way that a verdict should speak of: the library's default.
    pub chosen: usize,
    /// One per way.
    pub lines: Vec<Line>,
}

/// One way's part of a [`Curve`].
#[derive(Clone, Debug, PartialEq)]
pub struct Line {
    /// The way's name.
    pub way: String,
    /// In rising order of the offered rate, the maximum last.
    pub points: Vec<Point>,
}

/// One way at one offered rate.
#[derive(Clone, Debug, PartialEq)]
pub struct Point {
    /// The rate that the generator was told to keep; `None`: as fast as it can.
    pub offered_pps: Option<u64>,
    /// What it sent.
    pub sent_pps: Spread,
    /// What arrived.
    pub achieved_pps: Spread,
    /// CPU time of the measured process (or thread) per packet that arrived.
    pub cpu_ns_per_packet: Spread,
    /// CPU time of the whole machine above idle, but for the generator's thread, per packet that arrived: the receiver's, and what the kernel
    /// does in interrupts and to put CPUs to sleep and wake them.
    pub machine_cpu_ns_per_packet: Spread,
    /// `cpu_ns_per_packet` divided by the baseline's of the same round and rate; `None` for the baseline.
    pub cpu_ratio: Option<Spread>,
    /// Half of the packets were faster, counted from the moment each one was due.
    pub p50_us: Spread,
    /// 99 in 100 were faster.
    pub p99_us: Spread,
    /// `p99_us` minus the baseline's of the same round and rate; `None` for the baseline.
    pub p99_above_baseline_us: Option<Spread>,
    /// Packets sent, over all rounds.
    pub sent: u64,
    /// Packets of those that did not arrive.
    pub lost: u64,
    /// Packets that came after a later one of the same flow.
    pub late: u64,
    /// Packets that had come before.
    pub duplicates: u64,
    /// Packets that were cut or changed.
    pub damaged: u64,
    /// The generator did not keep the rate: what is seen here is its limit, not the way's.
    pub generator_bound: bool,
    /// Latencies in nanoseconds of all packets of all rounds, from the moment each one was due.
    pub latency: Option<Histogram<u64>>,
}

impl Point {
    /// The share of packets that did not arrive, 0 to 1.
    pub fn loss(&self) -> f64 {
        self.lost as f64 / self.sent.max(1) as f64
    }
}

/// How throughput grows with queues and workers.
#[derive(Clone, Debug, PartialEq)]
pub struct Scaling {
    /// What is done, for people.
    pub title: String,
    /// Length of each IP packet.
    pub packet_bytes: usize,
    /// Flows that the traffic consists of.
    pub flows: usize,
    /// The set-ups, the first one being what the ratios refer to.
    pub rows: Vec<Setup>,
}

/// One row of a [`Scaling`].
#[derive(Clone, Debug, PartialEq)]
pub struct Setup {
    /// For people: `2 queues, 2 workers`.
    pub name: String,
    /// Queues of the device.
    pub queues: usize,
    /// Workers that serve them.
    pub workers: usize,
    /// All queues together.
    pub pps: Spread,
    /// `pps` divided by the first row's of the same round; `None` for the first row.
    pub ratio: Option<Spread>,
    /// What part of the packets each queue had; adds up to 1.
    pub per_queue_share: Vec<f64>,
    /// How long packets waited from the wake-up to the handler, in nanoseconds, one histogram per queue; empty if it was not recorded.
    pub hand_over: Vec<Histogram<u64>>,
}

/// How long single acts take: stopping an engine, waking a worker.
#[derive(Clone, Debug, PartialEq)]
pub struct Acts {
    /// What they have in common, for people: `stop and wake`.
    pub title: String,
    /// The acts.
    pub rows: Vec<Act>,
}

/// One row of [`Acts`].
#[derive(Clone, Debug, PartialEq)]
pub struct Act {
    /// For people: `stop_within, loaded, 2 workers`.
    pub name: String,
    /// How long each took, in nanoseconds.
    pub took: Histogram<u64>,
    /// What none of them may exceed, if something is promised.
    pub bound: Option<Duration>,
    /// How late a thread that only slept beside the acts of the run with a promise woke, at worst;
    /// zero where nothing is promised.
    pub delay: Duration,
}

impl Act {
    /// Whether all kept the bound; `None` if nothing is promised, or if the machine was too busy to
    /// judge: each of the many steps of an act waits as a sleeping thread does.
    pub fn kept(&self) -> Option<bool> {
        let bound = self.bound?;
        let kept = u128::from(self.took.max()) <= bound.as_nanos();
        (kept || self.delay <= bound / 10).then_some(kept)
    }
}

#[cfg(feature = "cli")]
mod json {
    use serde_json::{Value, json};

    use super::{Act, Acts, Curve, Line, Point, Scaling, Setup};
    use crate::lab::measure::{Spread, quantiles_json};

    impl Curve {
        /// The curve as JSON, with units in the key names.
        pub fn to_json(&self) -> Value {
            json!({
                "title": self.title,
                "packet_bytes": self.packet_bytes,
                "generator_ceiling_pps": self.generator_ceiling_pps,
                "baseline": self.lines.get(self.baseline).map(|line| &line.way),
                "chosen": self.lines.get(self.chosen).map(|line| &line.way),
                "lines": self.lines.iter().map(Line::to_json).collect::<Vec<_>>(),
            })
        }
    }

    impl Line {
        fn to_json(&self) -> Value {
            json!({ "way": self.way, "points": self.points.iter().map(Point::to_json).collect::<Vec<_>>() })
        }
    }

    impl Point {
        fn to_json(&self) -> Value {
            json!({
                "offered_pps": self.offered_pps,
                "sent_pps": self.sent_pps.to_json(),
                "achieved_pps": self.achieved_pps.to_json(),
                "cpu_ns_per_packet": self.cpu_ns_per_packet.to_json(),
                "machine_cpu_ns_per_packet": self.machine_cpu_ns_per_packet.to_json(),
                "cpu_ratio": self.cpu_ratio.map(Spread::to_json),
                "p50_us": self.p50_us.to_json(),
                "p99_us": self.p99_us.to_json(),
                "p99_above_baseline_us": self.p99_above_baseline_us.map(Spread::to_json),
                "sent_packets": self.sent,
                "lost_packets": self.lost,
                "late_packets": self.late,
                "duplicate_packets": self.duplicates,
                "damaged_packets": self.damaged,
                "generator_bound": self.generator_bound,
                "latency": self.latency.as_ref().map(quantiles_json),
            })
        }
    }

    impl Scaling {
        /// The scaling as JSON, with units in the key names.
        pub fn to_json(&self) -> Value {
            json!({
                "title": self.title,
                "packet_bytes": self.packet_bytes,
                "flows": self.flows,
                "rows": self.rows.iter().map(Setup::to_json).collect::<Vec<_>>(),
            })
        }
    }

    impl Setup {
        fn to_json(&self) -> Value {
            json!({
                "name": self.name,
                "queues": self.queues,
                "workers": self.workers,
                "pps": self.pps.to_json(),
                "ratio_to_first": self.ratio.map(Spread::to_json),
                "per_queue_share": self.per_queue_share,
                "hand_over": self.hand_over.iter().map(quantiles_json).collect::<Vec<_>>(),
            })
        }
    }

    impl Acts {
        /// The acts as JSON, with units in the key names.
        pub fn to_json(&self) -> Value {
            json!({ "title": self.title, "rows": self.rows.iter().map(Act::to_json).collect::<Vec<_>>() })
        }
    }

    impl Act {
        fn to_json(&self) -> Value {
            json!({
                "name": self.name,
                "bound_ms": self.bound.map(|bound| bound.as_secs_f64() * 1e3),
                "kept": self.kept(),
                "machine_delay_ms": self.delay.as_secs_f64() * 1e3,
                "took": quantiles_json(&self.took),
            })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bound_is_kept_up_to_its_last_nanosecond() {
        let mut took = Histogram::new(3).expect("three digits");
        took.record(1_000).expect("in range");
        let act = |nanos| Act {
            name: "stop".to_owned(),
            took: took.clone(),
            bound: Some(Duration::from_nanos(nanos)),
            delay: Duration::ZERO,
        };
        assert_eq!(act(1_000).kept(), Some(true));
        assert_eq!(act(999).kept(), Some(false));
        let busy = |nanos, delay| Act {
            delay: Duration::from_nanos(delay),
            ..act(nanos)
        };
        assert_eq!(busy(990, 99).kept(), Some(false), "the delay is too short to excuse it");
        assert_eq!(busy(990, 100).kept(), None, "the machine was too busy to judge");
        assert_eq!(busy(1_000, 5_000).kept(), Some(true), "kept in spite of that");
        assert_eq!(Act { bound: None, ..act(1) }.kept(), None);
    }
}
