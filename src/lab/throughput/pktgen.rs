//! The kernel's packet generator, driven by its files (Documentation/networking/pktgen.rst): `/proc/net/pktgen/` of the calling thread's network
//! namespace.
//!
//! Out of a veth it can neither send one buffer again (`clone_skb`) nor fill bursts (`burst`): the buffer goes on into the other end and is no
//! longer pktgen's. Each thread (`kpktgend_N`) sends on CPU N, on the link's queue of that CPU (`QUEUE_MAP_CPU`).

use std::fmt::Write as _;
use std::fs;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use crate::lab::packet::Ethernet;

/// What pktgen is to send.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// Out of which link.
    pub interface: String,
    /// The hardware addresses.
    pub ethernet: Ethernet,
    /// Source address, and the source port of flow 0.
    pub source: SocketAddr,
    /// Target address, and the destination port of the first thread; each further thread has the next one.
    pub target: SocketAddr,
    /// Flows of each thread: so many source ports, in turn.
    pub flows: u16,
    /// Bytes of each frame without its frame check sequence.
    pub frame: usize,
    /// The first thread's CPU.
    pub first_thread: usize,
    /// How many threads.
    pub threads: usize,
    /// Packets per second of all threads; as fast as possible unless set.
    pub rate: Option<u64>,
    /// Packets of each thread; 0 for no end.
    pub count: u64,
    /// Whether pktgen finishes UDP checksums.
    pub checksum: bool,
    /// Whether what is configured already stays (`-a`).
    pub append: bool,
}

/// What pktgen says it did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Sent {
    /// Packets sent by each thread.
    pub threads: Vec<u64>,
    /// Packets that the link refused.
    pub errors: u64,
    /// The longest time of a thread.
    pub time: Duration,
}

/// Its folder.
const FOLDER: &str = "/proc/thread-self/net/pktgen";

/// The oldest source port plus flows may not go beyond this.
const PORTS: u32 = 65_536;

/// How often the stop flag is looked at.
const LOOK: Duration = Duration::from_millis(20);

/// Whether the calling thread's namespace has pktgen and may use it; why not, otherwise.
pub fn available() -> Result<(), String> {
    let control = format!("{FOLDER}/pgctrl");
    fs::OpenOptions::new()
        .write(true)
        .open(&control)
        .map(drop)
        .map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => "the module pktgen is not loaded (modprobe pktgen)".to_owned(),
            _ => format!("/proc/net/pktgen/pgctrl: {error}"),
        })
}

/// The first of these threads that the calling thread's namespace does not have.
pub fn missing_thread(first: usize, threads: usize) -> Option<usize> {
    (first..first + threads).find(|thread| !fs::exists(format!("{FOLDER}/kpktgend_{thread}")).unwrap_or(false))
}

impl Config {
    /// The lines that are written, each with the file it goes to, in order; `start` is not among them.
    pub fn lines(&self) -> Vec<(String, String)> {
        let mut lines = Vec::new();
        let control = |line: &str| ("pgctrl".to_owned(), line.to_owned());
        if !self.append {
            lines.push(control("reset"));
        }
        for thread in 0..self.threads {
            let kernel_thread = format!("kpktgend_{}", self.first_thread + thread);
            let device = self.device(thread);
            if !self.append {
                lines.push((kernel_thread.clone(), "rem_device_all".to_owned()));
            }
            lines.push((kernel_thread, format!("add_device {device}")));
            let mut set = |line: String| lines.push((device.clone(), line));
            set(format!("count {}", self.count));
            set("clone_skb 0".to_owned());
            set("burst 1".to_owned());
            set("flag QUEUE_MAP_CPU".to_owned());
            if self.checksum {
                set("flag UDPCSUM".to_owned());
            }
            set(format!("pkt_size {}", self.frame));
            match self.rate {
                Some(rate) => set(format!("ratep {}", (rate / self.threads as u64).max(1))),
                None => set("delay 0".to_owned()),
            }
            let six = if self.target.is_ipv6() { "6" } else { "" };
            match (self.source.ip(), self.target.ip()) {
                (IpAddr::V4(source), IpAddr::V4(target)) => {
                    set(format!("src_min {source}"));
                    set(format!("src_max {source}"));
                    set(format!("dst_min {target}"));
                    set(format!("dst_max {target}"));
                }
                (source, target) => {
                    set(format!("src{six} {source}"));
                    set(format!("dst{six} {target}"));
                }
            }
            set(format!("src_mac {}", mac(self.ethernet.source)));
            set(format!("dst_mac {}", mac(self.ethernet.target)));
            let first = u32::from(self.source.port());
            let last = (first + u32::from(self.flows.max(1)) - 1).min(PORTS - 1);
            set(format!("udp_src_min {first}"));
            set(format!("udp_src_max {last}"));
            let port = u32::from(self.target.port()) + thread as u32;
            set(format!("udp_dst_min {port}"));
            set(format!("udp_dst_max {port}"));
        }
        lines
    }

    /// Configures and runs it on the calling thread's namespace, and waits for its end, which comes after `count` packets or, with none,
    /// after `time`; before that if `stop` is set.
    ///
    /// # Errors
    /// A file does not take a line: which, and what pktgen says to it.
    pub fn run(&self, time: Duration, stop: &AtomicBool) -> io::Result<Sent> {
        for (file, line) in self.lines() {
            write(&file, &line)?;
        }
        let began = Instant::now();
        // `start` comes back when all threads are done, which without a count is never.
        let over = AtomicBool::new(false);
        thread::scope(|scope| {
            let namespace = crate::lab::Namespace::current()?;
            let over = &over;
            let ender = scope.spawn(move || {
                // Told again and again: before it runs, nothing can be stopped.
                while !over.load(Ordering::Relaxed) {
                    let left = match self.count {
                        0 => time.saturating_sub(began.elapsed()),
                        _ => LOOK,
                    };
                    if left.is_zero() || stop.load(Ordering::Relaxed) {
                        let _ = namespace.enter().and_then(|()| write("pgctrl", "stop"));
                        thread::park_timeout(LOOK);
                    } else {
                        thread::park_timeout(left.min(LOOK));
                    }
                }
            });
            let done = write("pgctrl", "start");
            over.store(true, Ordering::Relaxed);
            ender.thread().unpark();
            done
        })?;
        let took = began.elapsed();
        let mut sent = Sent::default();
        for thread in 0..self.threads {
            let text = fs::read_to_string(format!("{FOLDER}/{}", self.device(thread)))?;
            let one = parse(&text).ok_or_else(|| {
                io::Error::new(
                    io::ErrorKind::InvalidData,
                    format!("pktgen's result is not understood: {text}"),
                )
            })?;
            sent.threads.push(one.0);
            sent.errors += one.1;
            sent.time = sent.time.max(one.2.unwrap_or(took));
        }
        Ok(sent)
    }

    fn device(&self, thread: usize) -> String {
        format!("{}@{}", self.interface, self.first_thread + thread)
    }
}

fn mac(address: [u8; 6]) -> String {
    let mut text = String::with_capacity(17);
    for (index, byte) in address.iter().enumerate() {
        let colon = if index == 0 { "" } else { ":" };
        let _ = write!(text, "{colon}{byte:02x}");
    }
    text
}

fn write(file: &str, line: &str) -> io::Result<()> {
    let path = format!("{FOLDER}/{file}");
    fs::write(&path, format!("{line}\n")).map_err(|error| {
        // The last answer stands at the end of a device's file.
        let answer = fs::read_to_string(&path).unwrap_or_default();
        let answer = answer.lines().rev().find(|line| line.starts_with("Result:"));
        io::Error::new(
            error.kind(),
            format!(
                "pktgen: {file}: {line}: {error}{}",
                answer.map(|told| format!(" ({told})")).unwrap_or_default()
            ),
        )
    })
}

/// Packets sent, errors, and the time, from a device's file.
fn parse(text: &str) -> Option<(u64, u64, Option<Duration>)> {
    let number_behind = |key: &str| -> Option<u64> {
        let at = text.find(key)? + key.len();
        let rest = text[at..].trim_start();
        let digits = rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(rest.len());
        rest[..digits].parse().ok()
    };
    let sent = number_behind("pkts-sofar:")?;
    let errors = number_behind("errors:")?;
    // Result: OK: 1000003(c999876+d127) usec, 500000 (60byte,0frags)
    let time = number_behind("Result: OK:").map(Duration::from_micros);
    Some((sent, errors, time.filter(|time| !time.is_zero())))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn config() -> Config {
        Config {
            interface: "gen0".to_owned(),
            ethernet: Ethernet {
                source: [2, 0, 0, 0, 0, 1],
                target: [2, 0, 0, 0, 0, 0xaf],
            },
            source: "198.18.0.2:20000".parse().unwrap(),
            target: "198.19.0.2:9".parse().unwrap(),
            flows: 8,
            frame: 60,
            first_thread: 1,
            threads: 2,
            rate: Some(100_001),
            count: 0,
            checksum: true,
            append: false,
        }
    }

    #[test]
    fn a_device_a_thread_with_ports_of_its_own() {
        let lines = config().lines();
        let of = |file: &str| -> Vec<&str> {
            let own = lines.iter().filter(|(name, _)| name == file);
            own.map(|(_, line)| line.as_str()).collect()
        };
        assert_eq!(of("pgctrl"), ["reset"]);
        assert_eq!(of("kpktgend_1"), ["rem_device_all", "add_device gen0@1"]);
        assert_eq!(of("kpktgend_2"), ["rem_device_all", "add_device gen0@2"]);
        for line in [
            "ratep 50000",
            "udp_dst_min 10",
            "udp_src_max 20007",
            "dst_mac 02:00:00:00:00:af",
            "clone_skb 0",
        ] {
            assert!(of("gen0@2").contains(&line), "{line}");
        }
        let appended = Config {
            append: true,
            ..config()
        }
        .lines();
        assert!(
            !appended
                .iter()
                .any(|(_, line)| line == "reset" || line == "rem_device_all")
        );
    }

    #[test]
    fn results_are_read() {
        let text = "Params: count 1000  min_pkt_size: 60  max_pkt_size: 60\nCurrent:\n     pkts-sofar: 998  errors: 2\n     started: 1us  stopped: 9us idle: 3us\nResult: OK: 1000003(c999876+d127) usec, 998 (60byte,0frags)\n  998pps 0Mb/sec (479040bps) errors: 2\n";
        assert_eq!(parse(text), Some((998, 2, Some(Duration::from_micros(1_000_003)))));
        assert_eq!(parse("Result: Idle"), None);
    }

    proptest! {
        #[test]
        fn whatever_the_file_says_is_no_panic(text in "(pkts-sofar:|errors:|Result: OK:|[0-9]{1,30}| |\n|\\PC){0,40}") {
            let _ = parse(&text);
        }
    }
}
