//! The tool `tun-driver`: what this host can do, and how fast it does it.
//!
//! Exit codes: 0 done, 1 failed, 2 wrong usage, 3 a limit was missed,
//! the caller's or a promised one, 77 the
//! host lacks something, 130 interrupted before it was complete (what was measured by then is
//! written, and marked).

mod bench;
mod doctor;
mod generate;
mod receive;
mod report;
mod throughput;

use std::any::TypeId;
use std::ffi::CString;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::net::{AddrParseError, SocketAddr};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::{self, ExitCode};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use std::{fs, io};

use clap::{CommandFactory, FromArgMatches, Parser, Subcommand};

const EXIT_CODES: &str = "Exit codes: 0 done, 1 failed, 2 wrong usage, 3 a limit or a promised time was missed, \
                          77 the host lacks something, 130 interrupted before it was complete.";

/// Packet I/O for Linux gateways: look at this host, and measure it.
#[derive(Parser)]
#[command(name = "tun-driver", version, arg_required_else_help = true, after_help = EXIT_CODES)]
struct Arguments {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Measures the library in a throw-away network namespace, each backend against the plain loop.
    ///
    /// Receive, send, forward, superpackets, round trips, set rates, several queues and workers,
    /// and how long it takes to reach a worker and to stop an engine; `--only` selects among them.
    ///
    /// Changes nothing on the host: devices, addresses and packets live in a namespace that ends with the run. Needs root, or user
    /// namespaces and a /dev/net/tun that may be opened.
    ///
    /// Ctrl-C ends it early with exit code 130: what was measured by then is written, and marked as
    /// incomplete.
    ///
    /// Exit code 3 if a promised time was missed: "NOT KEPT" in the report. Where a thread that only
    /// slept woke late, the machine was too busy, and no miss of that run counts.
    Bench(bench::Options),
    /// Reports what this host supports, a line each, with the remedy for what is missing.
    ///
    /// Exit code 77 if something is missing; what only works less well is "reduced", and no
    /// failure.
    Doctor(doctor::Options),
    /// Sends stamped test packets on a fixed schedule, from the network namespace in which it is started.
    ///
    /// A packet carries the time when it was due, so that `receive` counts what a late one waited. Ends early, with its report, on Ctrl-C.
    Generate(generate::Options),
    /// Receives what `generate` sends, in the network namespace in which it is started: loss, order, duplicates, damage, latency.
    ///
    /// Both have to run on one machine: latencies are by its monotonic clock. Ends with its report on Ctrl-C.
    Receive(receive::Options),
    /// Measures over links that the caller has made what an engine takes, sends, or passes on without loss, and how long packets take.
    ///
    /// `bench-scripts/pktgen.sh` makes the links in namespaces of its own and calls this.
    Throughput(Box<throughput::Options>),
}

/// How a verb ended, if not well.
enum Failure {
    /// The run failed.
    Failed(String),
    /// The options contradict each other or the kernel.
    Usage(String),
    /// It ran, and a limit that the caller set was missed.
    Missed(String),
    /// The host lacks something, so nothing was done.
    Lacking(String),
    /// It ran, and reports that the host lacks these.
    Missing(Vec<&'static str>),
    /// It was interrupted before it was complete.
    Interrupted(String),
}

impl From<std::io::Error> for Failure {
    fn from(error: std::io::Error) -> Self {
        Failure::Failed(error.to_string())
    }
}

fn main() -> ExitCode {
    let arguments = Arguments::from_arg_matches(&command().get_matches()).unwrap_or_else(|error| error.exit());
    let outcome = match arguments.verb {
        Verb::Bench(options) => bench::run(&options),
        Verb::Doctor(options) => doctor::run(&options),
        Verb::Generate(options) => generate::run(&options),
        Verb::Receive(options) => receive::run(&options),
        Verb::Throughput(options) => throughput::run(&options),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(Failure::Failed(why)) => {
            eprintln!("tun-driver: {why}");
            ExitCode::FAILURE
        }
        Err(Failure::Usage(why)) => {
            eprintln!("tun-driver: {why}");
            ExitCode::from(2)
        }
        Err(Failure::Missed(what)) => {
            eprintln!("tun-driver: missed: {what}");
            ExitCode::from(3)
        }
        Err(Failure::Lacking(what)) => {
            eprintln!("tun-driver: skipped: {what}\n`tun-driver doctor` tells what this host can do.");
            ExitCode::from(77)
        }
        Err(Failure::Missing(what)) => {
            eprintln!("tun-driver: missing: {}", what.join(", "));
            ExitCode::from(77)
        }
        Err(Failure::Interrupted(place)) => {
            eprintln!("tun-driver: {place}; what was measured is written, and marked as incomplete");
            ExitCode::from(130)
        }
    }
}

/// The command line. A word that begins with a hyphen is the value of an option that takes no text,
/// so that `--duration -1` is refused as a duration, by name, and not as an unknown option.
fn command() -> clap::Command {
    Arguments::command().mut_subcommands(|verb| {
        verb.mut_args(|option| {
            let kind = option.get_value_parser().type_id();
            let text = kind == TypeId::of::<String>() || kind == TypeId::of::<PathBuf>();
            if option.get_action().takes_values() && !text {
                option.allow_hyphen_values(true)
            } else {
                option
            }
        })
    })
}

/// Makes the folder for the results, and makes sure that files can be written there.
fn results_folder(folder: &Path) -> Result<(), Failure> {
    let failed = |error: io::Error| {
        let remedy = match error.kind() {
            io::ErrorKind::AlreadyExists | io::ErrorKind::NotADirectory => "a file is in the way; name a folder",
            _ => "name a folder that can be written to",
        };
        Failure::Failed(format!("--out {}: {error}: {remedy}", folder.display()))
    };
    fs::create_dir_all(folder).map_err(failed)?;
    // A folder that is there may refuse files, and a run must not end with nowhere to write.
    let probe = folder.join(format!(".tun-driver-{}", process::id()));
    fs::write(&probe, "")
        .and_then(|()| fs::remove_file(&probe))
        .map_err(failed)
}

/// What came of writing to standard output. A reader that has seen enough is no failure.
fn shown(written: io::Result<()>) -> Result<(), Failure> {
    match written.and_then(|()| io::stdout().flush()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
            Err(Failure::Failed(format!("standard output: {error}")))
        }
        _ => Ok(()),
    }
}

/// A file that will be written. What it has stays until then.
struct Output<'a> {
    path: &'a Path,
    /// Of a FIFO: its reader would see an end if this was closed meanwhile.
    fifo: Option<File>,
}

impl<'a> Output<'a> {
    /// Makes sure that it can be written.
    fn open(path: &'a Path) -> Result<Self, String> {
        let is_fifo = fs::metadata(path).is_ok_and(|known| known.file_type().is_fifo());
        let mut options = OpenOptions::new();
        options.write(true).create(true).truncate(false);
        if is_fifo {
            // Else this waits for a reader, and Ctrl-C does not end that.
            options.custom_flags(libc::O_NONBLOCK);
        }
        match options.open(path) {
            Ok(file) => Ok(Self {
                path,
                fifo: is_fifo.then_some(file),
            }),
            Err(error) if is_fifo && error.raw_os_error() == Some(libc::ENXIO) => Err(format!(
                "{}: no process reads this FIFO: start its reader first, or name a file",
                path.display()
            )),
            Err(error) => Err(format!("{}: {error}", path.display())),
        }
    }

    fn write(self, text: &str) -> Result<(), String> {
        let path = self.path;
        match self.fifo {
            Some(mut fifo) => fifo.write_all(text.as_bytes()),
            None => fs::write(path, text),
        }
        .map_err(|error| format!("{}: {error}", path.display()))
    }
}

/// Writes the files of a report, and goes on after one that fails.
struct Files<'a> {
    folder: &'a Path,
    written: Vec<String>,
    failed: Vec<String>,
}

impl<'a> Files<'a> {
    fn new(folder: &'a Path) -> Self {
        Self {
            folder,
            written: Vec::new(),
            failed: Vec::new(),
        }
    }

    fn write(&mut self, name: &str, text: &str) {
        let path = self.folder.join(name);
        match Output::open(&path).and_then(|output| output.write(text)) {
            Ok(()) => self.written.push(name.to_owned()),
            Err(why) => self.failed.push(why),
        }
    }

    /// Fails with a line for each file that is missing.
    fn end(self) -> Result<(), Failure> {
        match self.failed.is_empty() {
            true => Ok(()),
            false => Err(Failure::Failed(format!(
                "not all of the report is written:\n{}",
                self.failed.join("\n")
            ))),
        }
    }
}

/// An address and a port on the command line. A link-local address has a scope, by name or number.
fn address(text: &str) -> Result<SocketAddr, String> {
    let parsed = match text.split_once('%') {
        // The standard library reads numbers only.
        Some((address, rest)) if !rest.starts_with(char::is_numeric) => {
            let (name, port) = rest.split_once("]:").ok_or("not an address and a port")?;
            let index = interface_index(name).ok_or_else(|| format!("there is no interface {name} here"))?;
            format!("{address}%{index}]:{port}").parse()
        }
        _ => text.parse(),
    };
    match parsed.map_err(|error: AddrParseError| error.to_string())? {
        SocketAddr::V6(parsed) if parsed.ip().is_unicast_link_local() && parsed.scope_id() == 0 => Err(format!(
            "a link-local address wants the interface as its scope, such as [{}%eth0]:{}",
            parsed.ip(),
            parsed.port()
        )),
        parsed => Ok(parsed),
    }
}

/// As [`address`], for where packets go to.
fn destination(text: &str) -> Result<SocketAddr, String> {
    match address(text)? {
        parsed if parsed.port() == 0 => Err("no packet can be sent to port 0; name another port".to_owned()),
        parsed => Ok(parsed),
    }
}

fn interface_index(name: &str) -> Option<u32> {
    let name = CString::new(name).ok()?;
    // SAFETY: the call reads a string that ends with a zero and outlives it.
    let index = unsafe { libc::if_nametoindex(name.as_ptr()) };
    (index != 0).then_some(index)
}

/// Whether this program was built without optimisation.
const DEBUG_BUILD: bool = cfg!(debug_assertions);

/// Says on standard error that figures of a debug build mean nothing.
fn warn_of_debug_build() {
    if DEBUG_BUILD {
        eprintln!("debug build: figures mean nothing; build with --release");
    }
}

/// A flag that Ctrl-C sets, or SIGTERM or SIGHUP. Once per process.
fn until_interrupted() -> Result<&'static AtomicBool, Failure> {
    static STOP: AtomicBool = AtomicBool::new(false);
    ctrlc::set_handler(|| STOP.store(true, Ordering::Relaxed))
        .map_err(|error| Failure::Failed(format!("no handler for Ctrl-C: {error}")))?;
    Ok(&STOP)
}

/// A time on the command line, in seconds, such as 0.5; less than a year.
fn seconds(text: &str) -> Result<Duration, String> {
    text.parse()
        .ok()
        .filter(|&seconds| seconds > 0.0 && seconds < 31_536_000.0)
        .and_then(|seconds| Duration::try_from_secs_f64(seconds).ok())
        .filter(|time| !time.is_zero())
        .ok_or_else(|| "not a time in seconds above 0 and below a year, such as 10 or 0.5".to_owned())
}

/// A number on the command line that may be large: 200000, 200k, 1.5M or 1G.
fn number(text: &str) -> Result<u64, String> {
    let unknown = || "not a whole number, such as 200000, 200k or 1.5M".to_owned();
    let (digits, factor) = match text.char_indices().last() {
        Some((end, 'k' | 'K')) => (&text[..end], 1_000),
        Some((end, 'M')) => (&text[..end], 1_000_000),
        Some((end, 'G')) => (&text[..end], 1_000_000_000),
        _ => (text, 1),
    };
    if let Ok(whole) = digits.parse::<u64>() {
        return whole.checked_mul(factor).ok_or_else(|| "more than 2^64".to_owned());
    }
    // With a point. Written without sign and exponent, so that only what a person would write is
    // taken.
    if factor == 1 || digits.starts_with('.') || !digits.chars().all(|digit| digit.is_ascii_digit() || digit == '.') {
        return Err(unknown());
    }
    let value = digits.parse::<f64>().map_err(|_| unknown())? * factor as f64;
    if value.fract() != 0.0 || value >= 2_f64.powi(53) {
        return Err(unknown());
    }
    Ok(value as u64)
}

/// As [`number`], from 1 on.
fn positive(text: &str) -> Result<u64, String> {
    number(text).and_then(|number| {
        if number > 0 {
            Ok(number)
        } else {
            Err("0, but at least 1 is needed".to_owned())
        }
    })
}

/// As [`number`], for what may have a fraction: packets per second.
fn per_second(text: &str) -> Result<f64, String> {
    match (number(text), text.parse::<f64>()) {
        (Ok(whole), _) => Ok(whole as f64),
        (Err(_), Ok(value)) if value.is_finite() && value >= 0.0 => Ok(value),
        _ => Err("not a rate in packets per second, such as 200000, 200k or 1.5M".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_take_k_m_and_g() {
        for (text, value) in [
            ("0", 0),
            ("200000", 200_000),
            ("200k", 200_000),
            ("200K", 200_000),
            ("1.5M", 1_500_000),
            ("0.25k", 250),
            ("3G", 3_000_000_000),
            ("18446744073709551615", u64::MAX),
        ] {
            assert_eq!(number(text), Ok(value), "{text}");
        }
        for wrong in [
            "",
            "k",
            "M",
            "-1",
            "-1k",
            "1.5",
            "1.0001k",
            ".5M",
            "1e6",
            "1e3k",
            "1 k",
            "1kk",
            "nan",
            "infM",
            "20000000000G",
            "µ",
            "5µ",
            "1m",
        ] {
            assert!(number(wrong).is_err(), "{wrong}: {:?}", number(wrong));
        }
        assert_eq!((per_second("1.5M"), per_second("0.5")), (Ok(1_500_000.0), Ok(0.5)));
        for wrong in ["-1", "nan", "inf", "", "1m"] {
            assert!(per_second(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn times_are_above_zero_and_below_a_year() {
        assert_eq!(seconds("0.5"), Ok(Duration::from_millis(500)));
        for wrong in [
            "", "0", "-1", "-0.5", "nan", "inf", "1s", "1e-300", "1e9", "31536000", "x",
        ] {
            assert!(seconds(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn link_local_addresses_have_a_scope() {
        for text in ["[fe80::1%lo]:9", "[fe80::1%1]:9"] {
            let scope = match address(text) {
                Ok(SocketAddr::V6(parsed)) => parsed.scope_id(),
                other => panic!("{text}: {other:?}"),
            };
            assert_eq!(scope, 1, "{text}");
        }
        for wrong in [
            "[fe80::1]:9",
            "[fe80::1%nowhere0]:9",
            "[fe80::1%lo",
            "[fe80::1%]:9",
            "1.2.3.4%lo:9",
        ] {
            assert!(address(wrong).is_err(), "{wrong}");
        }
        assert!(address("127.0.0.1:0").is_ok() && destination("127.0.0.1:0").is_err());
    }

    #[test]
    fn the_command_line_is_consistent() {
        command().debug_assert();
    }
}
