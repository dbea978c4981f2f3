//! A wire in user space: TCP between two namespaces, each with a TUN device, and an engine that carries what comes out of one into the other.
//!
//! iperf3 is the load; its two ends and the engine share the machine's cores, so what the engine spends is taken from them. Needs the program
//! iperf3.

use std::io;
use std::net::Ipv4Addr;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;

use super::cases::Progress;
use super::measure::{self, Plan, Report, Sample};
use super::{Namespace, Sandbox, process};
use crate::{Batch, Builder, Engine, Handler, Mode, PortId, Seat, Worker, WorkerConfig};

/// One transfer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Transfer {
    /// TCP connections at once.
    pub streams: usize,
    /// How long.
    pub time: Duration,
}

/// Carries packets from each of its two ports to the other.
#[derive(Debug)]
pub struct Wire {
    ends: [PortId; 2],
}

impl Wire {
    /// Between the first ports of an engine's first two sources.
    pub fn new(seat: &mut Seat<'_>) -> Option<Self> {
        Some(Self {
            ends: [seat.port(0)?, seat.port(1)?],
        })
    }
}

impl Handler for Wire {
    fn packets(&mut self, worker: &mut Worker, port: PortId, batch: &mut Batch) {
        let other = self.ends[usize::from(port == self.ends[0])];
        let _sent = worker.send_many(other, batch);
    }
}

/// Two namespaces with an engine between them.
struct Stage {
    engine: Engine<Wire>,
    near: Namespace,
    /// Ended with the stage.
    _server: Server,
}

struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

const NEAR: Ipv4Addr = Ipv4Addr::new(10, 250, 0, 1);
const FAR: Ipv4Addr = Ipv4Addr::new(10, 250, 0, 2);

/// Runs a transfer over a wire of each configuration in turn. Per round, besides the usual: `gbit_per_s` as received, `cpu_s_per_gb` of the
/// worker, `retransmits`.
///
/// # Errors
/// `NotFound` if there is no iperf3; what the engine, the kernel or iperf3 says.
pub fn wire(
    _: &Sandbox,
    ways: &[(&str, WorkerConfig)],
    transfer: Transfer,
    plan: &Plan,
    progress: Progress<'_>,
) -> io::Result<Report> {
    let stages = ways
        .iter()
        .map(|(_, config)| Stage::open(config))
        .collect::<io::Result<Vec<_>>>()?;
    let names: Vec<&str> = ways.iter().map(|(name, _)| *name).collect();
    measure::compare(plan, &names, |turn| {
        progress(turn);
        stages[turn.way].run(transfer)
    })
}

impl Stage {
    fn open(config: &WorkerConfig) -> io::Result<Self> {
        let (near, far) = (Namespace::new()?, Namespace::new()?);
        let device = |address| move || Builder::new("wire0", Mode::Tun).address(address, 24).up(true).open();
        let (one, other) = (near.run(device(NEAR))??, far.run(device(FAR))??);
        let engine = Engine::builder()
            .device(one)
            .device(other)
            .config(config.clone())
            .start(|seat| Wire::new(seat).ok_or_else(|| "two devices are needed".into()))?;
        let server = far.run(|| {
            Command::new("iperf3")
                .args(["-s", "-B", &FAR.to_string()])
                .stdout(Stdio::null())
                .spawn()
        })??;
        Ok(Self {
            engine,
            near,
            _server: Server(server),
        })
    }

    fn run(&self, transfer: Transfer) -> io::Result<Sample> {
        let cpu = || {
            self.engine
                .run_on(0, |_, _| process::thread_cpu_time())
                .map_err(io::Error::from)
        };
        let before = cpu()?;
        let answer = self.transfer(transfer)?;
        let spent = cpu()? - before;
        let found = |pointer: &str| {
            let end = answer.pointer(pointer).and_then(Value::as_f64);
            end.ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, format!("iperf3 said nothing of {pointer}")))
        };
        let (bytes, seconds) = (found("/end/sum_received/bytes")?, found("/end/sum_received/seconds")?);
        let mut sample = Sample {
            packets: (bytes / SEGMENT) as u64,
            cpu: spent,
            wall: Duration::from_secs_f64(seconds),
            ..Sample::default()
        };
        sample.figures = vec![
            ("gbit_per_s", bytes * 8e-9 / seconds),
            ("cpu_s_per_gb", spent.as_secs_f64() / (bytes * 1e-9)),
            ("retransmits", found("/end/sum_sent/retransmits")?),
        ];
        Ok(sample)
    }

    /// What the client says, as JSON. The server may still be busy with its start or with the client before.
    fn transfer(&self, transfer: Transfer) -> io::Result<Value> {
        let deadline = Instant::now() + Duration::from_secs(10);
        let seconds = transfer.time.as_secs_f64().to_string();
        loop {
            let output = self.near.run(|| {
                Command::new("iperf3")
                    .args([
                        "-c",
                        &FAR.to_string(),
                        "-t",
                        &seconds,
                        "-P",
                        &transfer.streams.to_string(),
                        "-J",
                    ])
                    .output()
            })??;
            let said = String::from_utf8_lossy(&output.stdout).into_owned();
            if output.status.success() {
                return serde_json::from_str(&said).map_err(io::Error::from);
            }
            if Instant::now() > deadline {
                return Err(io::Error::other(format!("iperf3 failed: {said}")));
            }
            thread::sleep(Duration::from_millis(50));
        }
    }
}

/// Bytes of a TCP segment at an MTU of 1500 with timestamps.
const SEGMENT: f64 = 1448.0;
