//! What the examples' command lines have in common, so that each example shows the library and little else.
#![allow(dead_code, unreachable_pub)] // each example uses its share

use std::error::Error;
use std::ffi::{OsStr, OsString};
use std::io::{self, Write};
use std::num::NonZeroU64;
use std::path::PathBuf;
use std::process::{self, ExitCode};
use std::str::FromStr;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};
use std::{env, fmt, thread, vec};

use tun_driver::{Backend, Device, PortError, PortId, Waker, Worker, WorkerConfig};

/// The command line: words in their order, and options anywhere between them.
pub struct Cli {
    usage: &'static str,
    words: vec::IntoIter<OsString>,
    packets: Option<u64>,
    seconds: Option<u64>,
    keepalive_ms: u64,
    backend: Option<Backend>,
}

impl Cli {
    /// Reads it. `--help`, and what cannot be understood, print the usage and end the process.
    pub fn parse(usage: &'static str) -> Self {
        let mut cli = Self {
            usage,
            words: Vec::new().into_iter(),
            packets: None,
            seconds: None,
            keepalive_ms: 10_000,
            backend: None,
        };
        let mut words = Vec::new();
        // Not `env::args`, which panics where an argument is not UTF-8: a path may be anything.
        let mut arguments = env::args_os().skip(1);
        while let Some(argument) = arguments.next() {
            let mut value = || arguments.next().unwrap_or_default();
            match argument.to_str() {
                // Of another example.
                Some(option @ ("--packets" | "--seconds" | "--keepalive-ms" | "--backend"))
                    if !usage.contains(option) =>
                {
                    cli.refuse(&argument)
                }
                Some("--packets") => cli.packets = Some(cli.read(&value())),
                Some("--seconds") => cli.seconds = Some(cli.read(&value())),
                Some("--keepalive-ms") => cli.keepalive_ms = cli.read::<NonZeroU64>(&value()).get(),
                Some("--backend") => {
                    let name = value();
                    cli.backend = match name.to_str() {
                        Some("io_uring") => Some(Backend::IoUring),
                        Some("syscalls") => Some(Backend::Syscalls),
                        _ => cli.refuse(&name),
                    }
                }
                Some("--help") => {
                    say(format_args!("usage: {usage}"));
                    process::exit(0)
                }
                _ if argument.as_encoded_bytes().starts_with(b"-") => cli.refuse(&argument),
                _ => words.push(argument),
            }
        }
        cli.words = words.into_iter();
        cli
    }

    /// The next word, or `default` if there are no more.
    pub fn word<T: FromStr + ToString>(&mut self, default: &str) -> T {
        let word = self.path(default);
        self.read(word.as_os_str())
    }

    /// The next word as a path, which need not be UTF-8, or `default` if there are no more.
    pub fn path(&mut self, default: &str) -> PathBuf {
        self.words.next().map_or_else(|| default.into(), PathBuf::from)
    }

    /// Refuses words that are left over. After the last [`word`](Self::word).
    pub fn end_of_words(&mut self) {
        if let Some(word) = self.words.next() {
            self.refuse(&word);
        }
    }

    /// `--packets`, or without end.
    pub fn packets(&self) -> u64 {
        self.packets.unwrap_or(u64::MAX)
    }

    /// `--keepalive-ms`.
    pub fn keepalive(&self) -> Duration {
        Duration::from_millis(self.keepalive_ms)
    }

    /// The defaults, and the backend that `--backend` forces.
    pub fn worker_config(&self) -> WorkerConfig {
        WorkerConfig {
            backend: self.backend,
            ..WorkerConfig::default()
        }
    }

    /// Stops the worker at Ctrl-C (or SIGTERM), and after `--seconds`.
    ///
    /// A signal does not end a worker's wait; its waker does, from any thread.
    pub fn stop_at_the_end(&self, waker: Waker) -> Result<(), Box<dyn Error>> {
        self.call_at_the_end(move || waker.stop())
    }

    /// Calls `stop` at Ctrl-C (or SIGTERM), and after `--seconds`, on another thread.
    pub fn call_at_the_end(&self, stop: impl Fn() + Clone + Send + 'static) -> Result<(), Box<dyn Error>> {
        if let Some(seconds) = self.seconds {
            let stop = stop.clone();
            thread::spawn(move || {
                thread::sleep(Duration::from_secs(seconds));
                stop();
            });
        }
        ctrlc::set_handler(stop)?;
        Ok(())
    }

    fn read<T: FromStr>(&self, word: &OsStr) -> T {
        let read = word.to_str().and_then(|text| text.parse().ok());
        read.unwrap_or_else(|| self.refuse(word))
    }

    fn refuse(&self, what: &OsStr) -> ! {
        warn(format_args!("{what:?} is not understood\nusage: {}", self.usage));
        process::exit(2)
    }
}

/// Notices that a device was moved to another network namespace. Its port goes on there, and hears
/// nothing of it: the device is down, without addresses, and no packet comes. (An engine reports
/// it as `Event::Moved`.)
pub struct Watch {
    devices: Vec<(PortId, Device)>,
    due: Instant,
}

impl Watch {
    /// How often it looks.
    const INTERVAL: Duration = Duration::from_millis(500);

    /// Watches the devices of these ports.
    pub fn new(devices: impl IntoIterator<Item = (PortId, Option<Device>)>) -> Self {
        let devices = devices.into_iter();
        Self {
            devices: devices.filter_map(|(port, device)| Some((port, device?))).collect(),
            due: Instant::now() + Self::INTERVAL,
        }
    }

    /// When to call [`look`](Self::look) again.
    pub fn due(&self) -> Instant {
        self.due
    }

    /// Prints each move once.
    pub fn look(&mut self, worker: &Worker) {
        if worker.now() < self.due {
            return;
        }
        self.due = worker.now() + Self::INTERVAL;
        self.devices.retain(|(port, device)| {
            let Err(error) = device.current_name() else {
                return true;
            };
            // The queue still has its device, so that was not deleted. Deletion ends the port.
            if worker.queue(*port).is_some_and(|queue| queue.current_name().is_ok()) {
                let name = worker.port_name(*port).unwrap_or_default();
                warn(format_args!(
                    "{name}: {error}: the device was moved to another network namespace; move it \
                     back, or set it up there and give it its address"
                ));
            }
            false
        });
    }
}

/// Prints a line on standard output. A reader that has seen enough ends the process quietly, and
/// another error with a word about it; `println!` panics at both.
pub fn say(line: impl fmt::Display) {
    let written = writeln!(io::stdout(), "{line}").and_then(|()| io::stdout().flush());
    match written {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => process::exit(0),
        Err(error) => {
            warn(format_args!("standard output: {error}"));
            process::exit(1)
        }
    }
}

/// Prints a line on standard error, if that takes it.
pub fn warn(line: impl fmt::Display) {
    let _ = writeln!(io::stderr(), "{line}");
}

/// Says which backend runs, and that packets are served from now on.
pub fn print_ready(worker: &Worker, what: impl fmt::Display) {
    let report = worker.backend();
    say(format_args!("{:?} ({})", report.backend, report.why));
    say(format_args!("ready: {what}"));
}

/// One line per port: what went through it, and what did not.
pub fn print_counters(worker: &Worker) {
    for port in worker.ports() {
        let name = worker.queue(port).map_or("udp", |queue| queue.name());
        let Some(counters) = worker.counters(port) else {
            continue;
        };
        say(format_args!(
            "{name}: received {} (truncated {}) sent {} refused {} backpressure {}",
            counters.received_packets,
            counters.truncated,
            counters.sent_packets,
            counters.refused_packets,
            counters.backpressure
        ));
    }
    say(format_args!("discarded {}", worker.discarded()));
}

/// Prints an error of a port that passes: a packet was too long for the buffers, no buffer was
/// free, the device is down. At most one line each second, or a flood of packets becomes a flood of
/// lines; the counters have them all.
pub fn print_passing(worker: &Worker, port: PortId, error: &PortError) {
    static LAST: Mutex<Option<Instant>> = Mutex::new(None);
    let mut last = LAST.lock().unwrap_or_else(PoisonError::into_inner);
    if last.is_none_or(|last| last.elapsed() >= Duration::from_secs(1)) {
        *last = Some(Instant::now());
        warn(named(worker, port, error));
    }
}

/// The error with the name of the port's device or socket in front.
pub fn named(worker: &Worker, port: PortId, error: &PortError) -> String {
    format!("{}: {error}", worker.port_name(port).unwrap_or_default())
}

/// Ends the process with what came of it. The errors of the library say in words what to do, in their `Display`.
pub fn end(result: Result<(), Box<dyn Error>>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            warn(error);
            ExitCode::FAILURE
        }
    }
}
