//! Limits in instructions. They are a tenth above what was counted when they were set: raise one only with a reason, lower it after a gain.

use std::hint::black_box;

use gungraun::{Callgrind, EventKind, LibraryBenchmarkConfig, library_benchmark, library_benchmark_group, main};
use tun_driver::lab::Tracker;
use tun_driver::lab::packet::{Framing, Spec, Stamp};
use tun_driver::lab::receiver::Receiver;
use tun_driver::lab::throughput::search::{Outcome, Search, Settings};
use tun_driver::{Backend, Batch, Worker, WorkerConfig};

const BATCH: usize = 64;

fn limited(instructions: u64) -> LibraryBenchmarkConfig {
    let mut config = LibraryBenchmarkConfig::default();
    config.tool(Callgrind::default().hard_limits([(EventKind::Ir, instructions)]));
    config
}

/// A worker that has no device and never enters the kernel here, and an empty batch.
fn worker() -> (Worker, Batch) {
    let config = WorkerConfig {
        backend: Some(Backend::Syscalls),
        ..WorkerConfig::default()
    };
    (Worker::new(&config).expect("a worker"), Batch::with_capacity(BATCH))
}

fn spec() -> Spec {
    Spec::new(
        "198.18.0.1:20000".parse().expect("an address"),
        "198.18.0.2:9".parse().expect("an address"),
    )
}

fn built(length: usize) -> (Receiver, Vec<u8>) {
    let mut packet = vec![0; length];
    spec().build(&mut packet, length, 0, 0);
    (Receiver::new(1), packet)
}

// 64 packets out of the arena, a header in front and off again, and back.
#[library_benchmark(config = limited(LIMITS.packets))]
#[bench::batch(setup = worker)]
fn packets((worker, mut batch): (Worker, Batch)) -> (Worker, Batch) {
    for _ in 0..BATCH {
        let mut packet = worker.packet(black_box(60)).expect("a buffer");
        packet.prepend(black_box(&[0; 16])).expect("headroom");
        packet.trim_front(16);
        let _room = batch.push(packet);
    }
    batch.clear();
    (worker, batch)
}

#[library_benchmark(config = limited(LIMITS.build))]
#[bench::of_1400_bytes(vec![0; 1_400])]
fn build(mut packet: Vec<u8>) -> Vec<u8> {
    black_box(spec()).build(&mut packet, 1_400, 7, 9);
    packet
}

#[library_benchmark(config = limited(LIMITS.check))]
#[bench::of_1400_bytes(built(1_400))]
fn check((mut receiver, packet): (Receiver, Vec<u8>)) -> Receiver {
    receiver.packet(black_box(&packet), 10);
    receiver
}

#[library_benchmark(config = limited(LIMITS.track))]
#[bench::in_order(Tracker::new(8))]
fn track(mut tracker: Tracker) -> Tracker {
    for number in 0..1_024u32 {
        tracker.record(Ok(Stamp {
            flow: (number % 8) as u16,
            sequence: number / 8,
            length: 64,
            sent: number,
        }));
    }
    tracker
}

#[library_benchmark(config = limited(LIMITS.headers))]
#[bench::behind_ethernet()]
fn headers() -> [u8; 28] {
    let mut bytes = [0; 28];
    black_box(spec().framing(Framing::NONE)).write_headers(&mut bytes, 1_372);
    bytes
}

#[library_benchmark(config = limited(LIMITS.search))]
#[bench::two_goals()]
fn search() -> usize {
    let mut search = Search::new(&Settings::default(), &[0.0, 0.005], black_box(2e6));
    while let Some(trial) = search.next() {
        let loss = (1.0 - 700_000.0 / trial.rate).max(0.0);
        search.record(
            trial,
            Outcome {
                rate: trial.rate,
                kept: true,
                loss,
            },
        );
    }
    search.trials()
}

struct Limits {
    packets: u64,
    build: u64,
    check: u64,
    track: u64,
    headers: u64,
    search: u64,
}

const LIMITS: Limits = Limits {
    packets: 22_400,
    build: 7_600,
    check: 2_900,
    track: 58_600,
    headers: 1_000,
    search: 176_500,
};

library_benchmark_group!(name = cpu, benchmarks = [packets, build, check, track, headers, search]);
main!(library_benchmark_groups = cpu);
