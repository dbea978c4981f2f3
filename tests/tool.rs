//! The tool as its user meets it: exit codes, JSON and nothing else on standard output, the files it says it writes.

mod common;

use std::io::{BufRead, BufReader, Read};
use std::process::{Child, Command, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use common::{need_tun, trial};
use serde_json::Value;

fn main() {
    common::run(vec![
        trial("doctor tells about this host, also as JSON", doctor),
        trial("bench measures, and writes what it says", bench),
        trial(
            "what generate sends, receive counts, and both tell",
            generate_and_receive,
        ),
        trial("generate and receive tell a missed limit by exit code 3", missed_limits),
        trial("Ctrl-C ends generate and receive with a report", interrupted),
        trial("generate and receive tell why they cannot", refused),
        trial("wrong usage is exit code 2", usage),
    ])
}

fn tool(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_tun-driver"))
        .args(arguments)
        .output()
        .unwrap()
}

fn doctor() {
    let told = tool(&["doctor", "--json"]);
    assert!(told.status.success());
    let told: Value = serde_json::from_slice(&told.stdout).unwrap();
    assert_eq!(told["schema_version"], 1);
    let names: Vec<&str> = told["findings"]
        .as_array()
        .unwrap()
        .iter()
        .map(|one| one["name"].as_str().unwrap())
        .collect();
    for name in ["kernel", "/dev/net/tun", "io_uring", "backend", "sandbox"] {
        assert!(names.contains(&name), "{names:?}");
    }
    let lines = tool(&["doctor"]);
    assert!(String::from_utf8(lines.stdout).unwrap().lines().count() >= names.len());
}

fn bench() {
    need_tun();
    let folder = std::env::temp_dir().join(format!("tun-driver-tool-{}", std::process::id()));
    let out = folder.to_str().unwrap();
    let told = tool(&[
        "bench",
        "--quick",
        "--rounds",
        "1",
        "--only",
        "drain,round-trip,rates,scaling,acts",
        "--json",
        "--out",
        out,
    ]);
    assert!(told.status.success(), "{}", String::from_utf8_lossy(&told.stderr));
    let printed: Value = serde_json::from_slice(&told.stdout).unwrap();
    let written: Value = serde_json::from_slice(&std::fs::read(folder.join("bench.json")).unwrap()).unwrap();
    assert_eq!(printed, written);
    let schema: Value = serde_json::from_str(include_str!("../docs/bench.schema.json")).unwrap();
    let errors: Vec<String> = jsonschema::draft202012::new(&schema)
        .unwrap()
        .iter_errors(&printed)
        .map(|error| format!("{}: {error}", error.instance_path()))
        .collect();
    assert!(errors.is_empty(), "{errors:#?}");
    let cases: Vec<&str> = printed["cases"]
        .as_array()
        .unwrap()
        .iter()
        .map(|case| case["case"].as_str().unwrap())
        .collect();
    assert_eq!(cases, ["drain", "drain", "round_trip", "engine"]);
    let latency = printed["cases"][2]["latency"].as_array().unwrap();
    assert!(latency.len() >= 3);
    for way in latency {
        assert_eq!(way["count"], 1_000);
        assert!(way["p50_ns"].as_u64() > Some(0) && way["p50_ns"].as_u64() <= way["p99_ns"].as_u64());
    }
    for section in ["curves", "scaling", "acts"] {
        assert_eq!(printed[section].as_array().unwrap().len(), 1, "{section}");
    }
    let report = std::fs::read_to_string(folder.join("report.md")).unwrap();
    assert!(
        report.contains("worker, io_uring") || report.contains("is not measured"),
        "{report}"
    );
    let histograms = std::fs::read_dir(&folder).unwrap().filter(|file| {
        file.as_ref()
            .unwrap()
            .path()
            .extension()
            .is_some_and(|extension| extension == "hgrm")
    });
    assert!(histograms.count() > latency.len(), "those over rates and of acts, too");
    let page = std::fs::read_to_string(folder.join("report.html")).unwrap();
    for way in latency {
        assert!(page.contains(way["way"].as_str().unwrap()), "{way}");
    }
    for log in ["round_trip.hlog", "rates.hlog", "acts.hlog"] {
        assert!(folder.join(log).is_file(), "{log}");
    }
    std::fs::remove_dir_all(&folder).unwrap();
}

fn usage() {
    for wrong in [
        &["nonsense"][..],
        &["bench", "--rounds", "0"],
        &["bench", "--only", "nothing"],
        &["generate"],
        &["generate", "--target", "127.0.0.1"],
        &["generate", "--target", "127.0.0.1:9", "--rate", "0"],
        &["generate", "--target", "127.0.0.1:9", "--length", "43"],
        &["generate", "--target", "127.0.0.1:9", "--count", "1", "--duration", "1"],
        &["generate", "--target", "127.0.0.1:9", "--source", "[::1]:0"],
        &["generate", "--target", "127.0.0.1:9", "--cpu", "100000"],
        &["receive"],
        &["receive", "--listen", "127.0.0.1:0", "--cpu", "100000"],
        &["receive", "--listen", "127.0.0.1:0", "--duration", "-1"],
    ] {
        assert_eq!(tool(wrong).status.code(), Some(2), "{wrong:?}");
    }
    let nowhere = tool(&["bench", "--quick", "--out", "/proc/nowhere"]);
    assert!(matches!(nowhere.status.code(), Some(1 | 77)), "{:?}", nowhere.status);
}

fn generate_and_receive() {
    let histogram = std::env::temp_dir().join(format!("tun-driver-tool-{}.hgrm", std::process::id()));
    let path = histogram.to_str().unwrap();
    for (listen, least, verify) in [("127.0.0.1:0", "44", "true"), ("[::1]:0", "64", "false")] {
        let receiver = Running::receive(
            &[
                &["--listen", listen, "--flows", "3", "--count", "600", "--max-loss", "0"][..],
                &["--json", "--hgrm", path, "--verify", verify],
            ]
            .concat(),
        );
        let sent = tool(
            &[
                &[
                    "generate",
                    "--target",
                    &receiver.address,
                    "--flows",
                    "3",
                    "--count",
                    "600",
                ][..],
                &["--rate", "100000", "--length", least, "--json"],
            ]
            .concat(),
        );
        assert!(
            sent.status.code() == Some(0),
            "{}",
            String::from_utf8_lossy(&sent.stderr)
        );
        let sent: Value = serde_json::from_slice(&sent.stdout).unwrap();
        assert_eq!(sent["schema_version"], 1);
        assert_eq!(
            (&sent["sent_packets"], &sent["unsent_packets"]),
            (&Value::from(600), &Value::from(0))
        );
        assert_eq!(sent["sent_packets_by_flow"], serde_json::json!([200, 200, 200]));
        assert_eq!(
            (&sent["way"], &sent["group_packets"]),
            (&Value::from("gso"), &Value::from(2))
        );
        assert_eq!(sent["ceiling_packets_per_s"], Value::Null);
        assert!(sent["lateness"]["p99_ns"].as_u64() <= sent["lateness"]["max_ns"].as_u64());

        let came = receiver.end();
        assert!(
            came.status.code() == Some(0),
            "{}",
            String::from_utf8_lossy(&came.stderr)
        );
        let came: Value = serde_json::from_slice(&came.stdout).unwrap();
        assert_eq!(came["schema_version"], 1);
        assert_eq!(
            (&came["received_packets"], &came["flows"]),
            (&Value::from(600), &Value::from(3))
        );
        for none in ["lost_packets", "late_packets", "duplicate_packets", "damaged_packets"] {
            assert_eq!(came[none], 0, "{none}");
        }
        assert_eq!(
            (&came["payload_bytes"], &came["verified"]),
            (&Value::from(600 * 16), &Value::from(verify == "true"))
        );
        assert!(came["latency"]["p50_ns"].as_u64() > Some(0), "{came}");
        let table = std::fs::read_to_string(&histogram).unwrap();
        assert!(table.contains("Total count    =          600"), "{table}");
    }
    std::fs::remove_file(&histogram).unwrap();
    let told = tool(&[
        "generate",
        "--target",
        "127.0.0.1:9",
        "--ceiling",
        "--count",
        "1",
        "--json",
    ]);
    let told: Value = serde_json::from_slice(&told.stdout).unwrap();
    assert!(told["ceiling_packets_per_s"].as_f64() > Some(0.0), "{told}");
}

fn missed_limits() {
    let slow = tool(&[
        "generate",
        "--target",
        "127.0.0.1:9",
        "--count",
        "3",
        "--rate",
        "1000",
        "--min-rate",
        "2000",
        "--json",
    ]);
    assert_eq!(slow.status.code(), Some(3));
    let told: Value = serde_json::from_slice(&slow.stdout).unwrap();
    assert_eq!(told["sent_packets"], 3);
    assert!(String::from_utf8_lossy(&slow.stderr).contains("missed"));
    // Nothing is all lost.
    for limit in [["--max-loss", "99"], ["--min-rate", "1"]] {
        let nothing = tool(
            &[
                &["receive", "--listen", "127.0.0.1:0", "--duration", "0.05"][..],
                &limit[..],
            ]
            .concat(),
        );
        assert_eq!(nothing.status.code(), Some(3), "{limit:?}");
        assert!(String::from_utf8_lossy(&nothing.stdout).contains("0 received"));
    }
    // Three of four.
    let receiver = Running::receive(&[
        "--listen",
        "127.0.0.1:0",
        "--count",
        "4",
        "--quiet-ms",
        "100",
        "--max-loss",
        "24",
        "--json",
    ]);
    assert!(
        tool(&["generate", "--target", &receiver.address, "--count", "3"])
            .status
            .success()
    );
    let told = receiver.end();
    assert_eq!(told.status.code(), Some(3));
    let told: Value = serde_json::from_slice(&told.stdout).unwrap();
    assert_eq!(
        (&told["lost_packets"], &told["loss_percent"]),
        (&Value::from(1), &Value::from(25.0))
    );
}

fn interrupted() {
    let mut receiver = Running::receive(&["--listen", "127.0.0.1:0", "--quiet-ms", "0", "--json"]);
    let target = receiver.address.clone();
    let mut generator = Running::start(&[
        "generate",
        "--target",
        &target,
        "--rate",
        "5000",
        "--duration",
        "60",
        "--json",
    ]);
    // When it has sent, it listens to Ctrl-C.
    let deadline = Instant::now() + Duration::from_secs(20);
    while datagrams_received() == 0 {
        assert!(Instant::now() < deadline, "nothing is sent");
        thread::sleep(Duration::from_millis(5));
    }
    generator.interrupt();
    let sent = generator.end();
    assert_eq!(sent.status.code(), Some(0), "{}", String::from_utf8_lossy(&sent.stderr));
    let sent: Value = serde_json::from_slice(&sent.stdout).unwrap();
    assert_eq!(sent["interrupted"], true);
    assert!(sent["due_packets"].as_u64() < Some(300_000));
    receiver.interrupt();
    let came = receiver.end();
    assert_eq!(came.status.code(), Some(0), "{}", String::from_utf8_lossy(&came.stderr));
    let came: Value = serde_json::from_slice(&came.stdout).unwrap();
    assert_eq!(came["received_packets"], sent["sent_packets"]);
}

/// Of the calling thread's namespace.
fn datagrams_received() -> u64 {
    let text = std::fs::read_to_string("/proc/thread-self/net/snmp").unwrap();
    let values = text.lines().rfind(|line| line.starts_with("Udp:")).unwrap(); // below the line of their names
    values.split_whitespace().nth(1).unwrap().parse().unwrap()
}

fn refused() {
    let nowhere = tool(&["generate", "--target", "198.18.0.1:9", "--json"]);
    assert_eq!(nowhere.status.code(), Some(1));
    assert!(nowhere.stdout.is_empty());
    assert!(String::from_utf8_lossy(&nowhere.stderr).contains("198.18.0.1:9"));
    assert_eq!(tool(&["receive", "--listen", "198.18.0.1:9"]).status.code(), Some(1));
    let file = tool(&["receive", "--listen", "127.0.0.1:0", "--hgrm", "/proc/nowhere/x"]);
    assert_eq!(file.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&file.stderr).contains("/proc/nowhere/x"));
}

/// The tool at work. Dropping it kills it.
struct Running {
    child: Child,
    address: String,
}

impl Running {
    fn start(arguments: &[&str]) -> Self {
        let child = Command::new(env!("CARGO_BIN_EXE_tun-driver"))
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        Self {
            child,
            address: String::new(),
        }
    }

    /// `receive`, and the address that it says it listens on.
    fn receive(options: &[&str]) -> Self {
        let mut running = Self::start(&[&["receive"], options].concat());
        let mut line = String::new();
        // Its end closes the pipe, so this ends in any case.
        BufReader::new(running.child.stderr.as_mut().unwrap())
            .read_line(&mut line)
            .unwrap();
        running.address = line.strip_prefix("listening on ").expect(&line).trim().to_owned();
        running
    }

    fn interrupt(&mut self) {
        let pid = libc::pid_t::try_from(self.child.id()).unwrap();
        // SAFETY: no memory is passed; the child was not waited for yet, so the number is still its own.
        assert_eq!(unsafe { libc::kill(pid, libc::SIGINT) }, 0);
    }

    /// What it said, once it has ended on its own.
    fn end(mut self) -> Output {
        let deadline = Instant::now() + Duration::from_secs(20);
        let status = loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                break status;
            }
            assert!(Instant::now() < deadline, "it does not end");
            thread::sleep(Duration::from_millis(5));
        };
        let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
        self.child.stdout.take().unwrap().read_to_end(&mut stdout).unwrap();
        self.child.stderr.take().unwrap().read_to_end(&mut stderr).unwrap();
        Output { status, stdout, stderr }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
