//! The measured cases: every way passes them, and a way that cheats does not.

mod common;
#[path = "../benches/floor/mod.rs"]
mod floor;

use std::io;
use std::time::Duration;

use common::{Trial, need_locked_memory, need_tun, trial};
use floor::{Floor, PlainLoop};
use tun_driver::lab::Sandbox;
use tun_driver::lab::cases::{self, Drained, Load, Runner, Way};
use tun_driver::lab::measure::{CPU_NS, Plan, Report};
use tun_driver::lab::offload_cases::{self, Load64K, Traffic};
use tun_driver::lab::ways::{ByWorker, IfaceLoop};
use tun_driver::{Backend, Builder, Mode, Offloads, Wait, WorkerConfig};

fn main() {
    let mut trials: Vec<Trial> = Vec::new();
    for case in CASES {
        trials.push(trial(
            format!("{case:?}: every way accounts for every packet"),
            move || every_way_passes(case),
        ));
    }
    for traffic in [Traffic::Tcp, Traffic::Udp] {
        trials.push(trial(
            format!("superpackets of {traffic:?} come through every way"),
            move || superpackets_pass(traffic),
        ));
    }
    trials.push(trial("a packet that was not delivered fails the case", missing_packet));
    trials.push(trial("a packet delivered short fails the case", short_packet));
    trials.push(trial(
        "a packet that was only claimed to be sent fails the case",
        claimed_packet,
    ));
    trials.push(trial("an answer that never comes ends the case", silent_echo));
    trials.push(trial("a way that cannot open ends the case with its name", broken_way));
    common::run(trials)
}

#[derive(Clone, Copy, Debug)]
enum Case {
    Drain,
    Sink,
    Forward,
    RoundTrip,
}

const CASES: [Case; 4] = [Case::Drain, Case::Sink, Case::Forward, Case::RoundTrip];

/// More packets than a burst has, and not a multiple of it; short enough for every change.
const LOAD: Load = Load {
    packet_len: 100,
    packets: 150,
    stretches: 3,
};
const TRIPS: usize = 50;

fn measured(case: Case, ways: &[&dyn Way]) -> io::Result<Report> {
    need_tun();
    let sandbox = Sandbox::enter()?;
    let plan = Plan {
        rounds: 2,
        warm_up: 1,
        ..Plan::default()
    };
    let mut progress = |_| Ok(());
    match case {
        Case::Drain => cases::drain(&sandbox, ways, LOAD, &plan, &mut progress),
        Case::Sink => cases::sink(&sandbox, ways, LOAD, &plan, &mut progress).map(|(report, _)| report),
        Case::Forward => cases::forward(&sandbox, ways, LOAD, &plan, &mut progress),
        Case::RoundTrip => {
            let outcome = cases::round_trip(&sandbox, ways, TRIPS, &plan, &mut progress)?;
            for histogram in &outcome.histograms {
                assert_eq!(
                    histogram.len(),
                    2 * TRIPS as u64,
                    "all trips of the two rounds that count, no others"
                );
            }
            Ok(outcome.report)
        }
    }
}

fn ways(case: Case) -> Vec<Box<dyn Way>> {
    let nonblocking = !matches!(case, Case::RoundTrip);
    let mut ways: Vec<Box<dyn Way>> = vec![
        Box::new(IfaceLoop { nonblocking }),
        Box::new(PlainLoop { nonblocking: true }),
        Box::new(ByWorker::new(Backend::Syscalls, Wait::Block)),
    ];
    let worker = ByWorker::new(Backend::IoUring, Wait::Block);
    if tun_driver::Support::probe().tun_nowait == Some(true) {
        ways.push(Box::new(Floor::default()));
        ways.push(Box::new(worker));
    }
    ways
}

fn superpackets_pass(traffic: Traffic) {
    need_tun();
    let sandbox = Sandbox::enter().unwrap();
    let device = Builder::new("", Mode::Tun).offloads(Offloads::all()).open().unwrap();
    if traffic == Traffic::Udp && !device.granted().offloads.contains(Offloads::USO) {
        common::skip("USO wants Linux 6.2");
    }
    drop(device);
    let mut backends = vec![Backend::Syscalls];
    if tun_driver::Support::probe().tun_nowait == Some(true) {
        // For as many ways as run side by side.
        need_locked_memory(2 * WorkerConfig::default().memory().total_with_large_buffers() as u64);
        backends.push(Backend::IoUring);
    }
    let movers = offload_cases::movers(traffic, &backends);
    let load = Load64K {
        stretches: 3,
        ..Load64K::default()
    };
    let plan = Plan {
        rounds: 2,
        warm_up: 0,
        ..Plan::default()
    };
    let report = offload_cases::superpackets(&sandbox, traffic, &movers, load, &plan, &mut |_| Ok(())).unwrap();
    assert_eq!(report.ways.len(), movers.len());
    let segments = if traffic == Traffic::Tcp { 45 } else { 54 };
    for way in &report.ways[1..] {
        assert!(
            way.samples.iter().all(|sample| sample.packets == 3 * 8 * segments),
            "{}",
            way.name
        );
        assert!(way.figure(offload_cases::GBIT).unwrap().value.min > 0.0, "{}", way.name);
    }
    // The minimal one, and for each backend: those, and without USO.
    let pairs = 1 + backends.len() * if traffic == Traffic::Tcp { 3 } else { 4 };
    assert_eq!(offload_cases::rate_ratios(&report, &backends).len(), 2 * pairs);
}

fn every_way_passes(case: Case) {
    let ways = ways(case);
    let ways: Vec<&dyn Way> = ways.iter().map(|way| &**way).collect();
    let report = measured(case, &ways).unwrap();
    assert_eq!(report.ways.len(), ways.len());
    for way in &report.ways {
        assert_eq!(way.samples.len(), 2, "{}", way.name);
        assert!(
            way.figure(CPU_NS).unwrap().value.min > 0.0,
            "{} moved packets in no time",
            way.name
        );
        let expected = match case {
            Case::RoundTrip => 200 + TRIPS,
            _ => LOAD.packets * LOAD.stretches,
        };
        assert_eq!(way.samples[0].packets, expected as u64, "{}", way.name);
    }
}

/// A plain loop with one fault.
struct Faulty(Fault);

#[derive(Clone, Copy, PartialEq)]
enum Fault {
    DeliversOneLess,
    DeliversOneShort,
    ClaimsOneMore,
    NeverAnswers,
    DoesNotOpen,
}

impl Way for Faulty {
    fn name(&self) -> &str {
        "faulty"
    }

    fn open(&self, devices: &[&str]) -> io::Result<Box<dyn Runner>> {
        if self.0 == Fault::DoesNotOpen {
            return Err(io::Error::from_raw_os_error(libc::EBUSY));
        }
        let runner = PlainLoop { nonblocking: true }.open(devices)?;
        Ok(Box::new(FaultyRunner { runner, fault: self.0 }))
    }
}

struct FaultyRunner {
    runner: Box<dyn Runner>,
    fault: Fault,
}

impl Runner for FaultyRunner {
    fn drain(&mut self, device: usize, expected: usize) -> io::Result<Drained> {
        let mut drained = self.runner.drain(device, expected)?;
        drained.packets -= usize::from(self.fault == Fault::DeliversOneLess);
        drained.bytes -= usize::from(self.fault == Fault::DeliversOneShort);
        Ok(drained)
    }

    fn fill(&mut self, device: usize, packet: &[u8], count: usize) -> io::Result<()> {
        self.runner
            .fill(device, packet, count - usize::from(self.fault == Fault::ClaimsOneMore))
    }

    fn send(&mut self, device: usize) -> io::Result<usize> {
        Ok(self.runner.send(device)? + usize::from(self.fault == Fault::ClaimsOneMore))
    }

    fn echo(&mut self) -> io::Result<()> {
        // Empties the queue for longer than the client waits, so that it also meets the client's stop.
        for _ in 0..150 {
            self.runner.drain(0, 1)?;
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(())
    }
}

fn failure(case: Case, fault: Fault) -> io::Error {
    measured(case, &[&Faulty(fault)]).expect_err("the fault goes unnoticed")
}

fn missing_packet() {
    assert_eq!(
        failure(Case::Drain, Fault::DeliversOneLess).kind(),
        io::ErrorKind::InvalidData
    );
    assert_eq!(
        failure(Case::Forward, Fault::DeliversOneLess).kind(),
        io::ErrorKind::InvalidData
    );
}

fn short_packet() {
    assert_eq!(
        failure(Case::Drain, Fault::DeliversOneShort).kind(),
        io::ErrorKind::InvalidData
    );
}

fn claimed_packet() {
    assert_eq!(
        failure(Case::Sink, Fault::ClaimsOneMore).kind(),
        io::ErrorKind::InvalidData
    );
    assert_eq!(
        failure(Case::Forward, Fault::ClaimsOneMore).kind(),
        io::ErrorKind::InvalidData
    );
}

fn silent_echo() {
    let error = failure(Case::RoundTrip, Fault::NeverAnswers);
    assert_eq!(error.kind(), io::ErrorKind::TimedOut, "{error}");
}

fn broken_way() {
    for case in CASES {
        let error = failure(case, Fault::DoesNotOpen);
        assert_eq!(error.kind(), io::ErrorKind::ResourceBusy);
        assert!(error.to_string().starts_with("faulty: "), "{error}");
    }
}
