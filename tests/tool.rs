//! The tool as its user meets it: exit codes, JSON and nothing else on standard output, the files it says it writes.

mod common;

use std::io::{BufRead, BufReader, Read};
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::OpenOptionsExt;
use std::process::{Child, Command, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use common::{need_program, need_tun, skip, trial};
use serde_json::Value;

fn main() {
    common::run(vec![
        trial("doctor tells about this host, also as JSON", doctor),
        trial("bench measures, and writes what it says", bench).bound(Duration::from_secs(180)),
        trial(
            "what generate sends, receive counts, and both tell",
            generate_and_receive,
        ),
        trial("generate and receive tell a missed limit by exit code 3", missed_limits),
        trial("Ctrl-C ends generate and receive with a report", interrupted),
        trial("generate and receive tell why they cannot", refused),
        trial("wrong usage is exit code 2, and names what is wrong", usage),
        trial("numbers on the command line take k and M", suffixes),
        trial("Ctrl-C ends bench with what was measured by then", interrupted_bench).bound(Duration::from_secs(180)),
        trial("bench says on standard error which case it measures", progress_lines).bound(Duration::from_secs(180)),
        trial(
            "doctor fails with 77 where the node is missing or closed",
            doctor_without_node,
        ),
        trial(
            "a file, a directory or another device as the node is named, with exit code 77",
            foreign_node,
        ),
        trial("a folder for results that cannot be is refused by name", out_folder),
        trial("receive keeps an earlier file until it has another", kept_file),
        trial(
            "a report that cannot be written is shown, and its files are named",
            lost_folder,
        )
        .bound(Duration::from_secs(180)),
        trial("a closed or full standard output is no panic", closed_output),
        trial("port 0 and a link-local address without a scope are refused", targets),
        trial("bench takes a folder of any bytes", any_bytes).bound(Duration::from_secs(180)),
        trial("help and version name the tool and all that it measures", help),
    ])
}

fn tool(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_tun-driver"))
        .args(arguments)
        .output()
        .unwrap()
}

fn any_bytes() {
    need_tun();
    let mut name = format!("tun-driver-bytes-{}-", std::process::id()).into_bytes();
    name.push(0xff);
    let folder = std::env::temp_dir().join(std::ffi::OsString::from_vec(name));
    let output = Command::new(env!("CARGO_BIN_EXE_tun-driver"))
        .args(["bench", "--quick", "--rounds", "1", "--only", "drain", "--out"])
        .arg(&folder)
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(folder.join("bench.json").is_file());
    std::fs::remove_dir_all(&folder).unwrap();
}

fn doctor() {
    let output = tool(&["doctor", "--json"]);
    let told: Value = serde_json::from_slice(&output.stdout).unwrap();
    let missing = told["findings"]
        .as_array()
        .unwrap()
        .iter()
        .any(|one| one["state"] == "missing");
    let expected = if missing { 77 } else { 0 };
    assert_eq!(output.status.code(), Some(expected), "{told:#}");
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
    let printed: Value = serde_json::from_slice(&told.stdout).unwrap();
    assert_eq!(
        told.status.code(),
        Some(promised(&printed)),
        "{}",
        String::from_utf8_lossy(&told.stderr)
    );
    // Tests and tool are of one profile.
    assert_eq!(printed["debug_build"], cfg!(debug_assertions));
    assert_eq!(
        String::from_utf8_lossy(&told.stderr).contains("debug build: figures mean nothing"),
        cfg!(debug_assertions)
    );
    let written: Value = serde_json::from_slice(&std::fs::read(folder.join("bench.json")).unwrap()).unwrap();
    assert_eq!(printed, written);
    let schema: Value = serde_json::from_str(include_str!("../docs/bench.schema.json")).unwrap();
    let errors: Vec<String> = jsonschema::draft202012::new(&schema)
        .unwrap()
        .iter_errors(&printed)
        .map(|error| format!("{}: {error}", error.instance_path()))
        .collect();
    assert!(errors.is_empty(), "{errors:#?}");
    assert_eq!(
        (&printed["complete"], &printed["incomplete_because"]),
        (&Value::from(true), &Value::Null)
    );
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
    assert_eq!(report.contains("NOT KEPT"), promised(&printed) == 3, "{report}");
    assert_eq!(report.contains("DEBUG BUILD"), cfg!(debug_assertions), "{report}");
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

/// The exit code that goes with what a run of `bench` says of its promises.
fn promised(printed: &Value) -> i32 {
    let acts = printed["acts"].as_array().unwrap();
    let mut rows = acts.iter().flat_map(|acts| acts["rows"].as_array().unwrap());
    if rows.any(|row| row["kept"] == false) { 3 } else { 0 }
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
    // What is refused is named by its option, and the remedy says what is taken instead.
    let target = ["generate", "--target", "127.0.0.1:9"];
    let listen = ["receive", "--listen", "127.0.0.1:0"];
    for (verb, option, wrong) in [
        (
            &target[..],
            "--duration",
            &["-1", "-0.5", "0", "1s", "nan", "inf", "1e-300", "1e9", "", "-1s"][..],
        ),
        (
            &target,
            "--rate",
            &[
                "-5",
                "0",
                "k",
                "1.5",
                "1m",
                "1e6",
                "99999999999G",
                "maximum",
                "-max",
                "1 k",
            ],
        ),
        (
            &target,
            "--count",
            &["-1", "0", "x", "1.0001k", "k", "", "0x10", "1e3", "½", "--json", "-"],
        ),
        (
            &target,
            "--min-rate",
            &["-1", "nan", "inf", "x", "k", "", "1m", "--json", "1,5", "-k"],
        ),
        (
            &target,
            "--flows",
            &["-1", "0", "65537", "x", "", "1.5", "1k", "--json", "-", "0x1"],
        ),
        (
            &target,
            "--source",
            &[
                "-1",
                "x",
                "127.0.0.1",
                ":0",
                "1.2.3.4.5:1",
                "[::1]",
                "::1",
                "",
                "127.0.0.1:65536",
                "host:1",
            ],
        ),
        (
            &listen,
            "--duration",
            &["-1", "0", "x", "nan", "-inf", "", "1h", "1_0", "--json", "0.0"],
        ),
        (
            &listen,
            "--max-loss",
            &["-1", "101", "nan", "x", "", "5%", "inf", "1,5", "--json", "-"],
        ),
        (
            &listen,
            "--quiet-ms",
            &[
                "-1",
                "x",
                "1.5",
                "",
                "1s",
                "nan",
                "--json",
                "-",
                "1e3",
                "99999999999999999999",
            ],
        ),
        (
            &listen,
            "--verify",
            &["-1", "yes", "0", "1", "", "TRUE!", "--json", "-", "nein", "x"],
        ),
        (
            &["bench"],
            "--rounds",
            &["-1", "0", "10001", "x", "", "1.5", "1k", "--json", "-", "nan"],
        ),
        (
            &["bench"],
            "--only",
            &[
                "-1",
                "nothing",
                "drain,",
                "",
                "Drain",
                "drain sink",
                "--json",
                "-",
                ",",
                "drain,x",
            ],
        ),
        (&listen, "--count", &["-1", "0", "x", "", "1.5", "1m", "--json", "-"]),
        (&["throughput"], "--threads", &["-1", "0", "1025", "x", "", "1k"]),
        (&["throughput"], "--sizes", &["", "x", "63", "1519"]),
        (
            &["throughput"],
            "--rate",
            &["-1", "0", "x", "", "1.5", "1m", "--json", "-", "nan", "1e6"],
        ),
        (
            &["throughput"],
            "--duration",
            &["-1", "0", "x", "", "1s", "nan", "--json", "-", "inf", "1e9"],
        ),
    ] {
        for value in wrong {
            let told = tool(&[verb, &[option, value]].concat());
            assert_eq!(told.status.code(), Some(2), "{verb:?} {option} {value:?}");
            let told = String::from_utf8(told.stderr).unwrap();
            assert!(
                told.contains(&format!("'{option} ")),
                "{verb:?} {option} {value:?}: {told}"
            );
            assert!(
                told.contains(&format!("'{value}'")) || value.is_empty() || value.contains(','),
                "{option} {value:?}: {told}"
            );
        }
    }
    let nowhere = tool(&["bench", "--quick", "--out", "/proc/nowhere"]);
    assert!(matches!(nowhere.status.code(), Some(1 | 77)), "{:?}", nowhere.status);
}

fn suffixes() {
    for (rate, count, asked, sent) in [("50k", "1k", 50_000, 1_000), ("0.05M", "0.5k", 50_000, 500)] {
        let told = tool(&[
            "generate",
            "--target",
            "127.0.0.1:9",
            "--rate",
            rate,
            "--count",
            count,
            "--min-rate",
            "0.001k",
            "--json",
        ]);
        assert_eq!(told.status.code(), Some(0), "{}", String::from_utf8_lossy(&told.stderr));
        let told: Value = serde_json::from_slice(&told.stdout).unwrap();
        assert_eq!(
            (&told["asked_packets_per_s"], &told["due_packets"]),
            (&Value::from(asked), &Value::from(sent))
        );
    }
}

fn help() {
    let version = String::from_utf8(tool(&["--version"]).stdout).unwrap();
    assert_eq!(version.trim(), format!("tun-driver {}", env!("CARGO_PKG_VERSION")));
    let help = String::from_utf8(tool(&["bench", "--help"]).stdout).unwrap();
    let about = help
        .split("Usage:")
        .next()
        .unwrap()
        .to_lowercase()
        .split_whitespace()
        .collect::<Vec<_>>()
        .join(" ");
    for case in [
        "receive",
        "send",
        "forward",
        "superpackets",
        "round trip",
        "rates",
        "queues",
        "stop an engine",
    ] {
        assert!(about.contains(case), "{case}: {about}");
    }
    assert!(about.contains("exit code 3 if a promised time was missed"), "{about}");
    let help = String::from_utf8(tool(&["--help"]).stdout).unwrap();
    assert!(help.contains("3 a limit or a promised time was missed"), "{help}");
}

fn scratch(name: &str) -> std::path::PathBuf {
    std::env::temp_dir().join(format!("tun-driver-tool-{name}-{}", std::process::id()))
}

fn out_folder() {
    need_tun();
    let folder = scratch("out");
    std::fs::create_dir_all(&folder).unwrap();
    let file = folder.join("file");
    std::fs::write(&file, "mine").unwrap();
    for (out, remedy) in [
        (file.clone(), "name a folder"),
        (file.join("below"), "name a folder"),
        ("/proc/nowhere".into(), "name a folder that can be written to"),
        ("/proc".into(), "name a folder that can be written to"),
    ] {
        let told = tool(&["bench", "--quick", "--out", out.to_str().unwrap()]);
        assert_eq!(told.status.code(), Some(1), "{}", out.display());
        let told = String::from_utf8(told.stderr).unwrap();
        assert!(
            told.contains(&format!("--out {}: ", out.display())) && told.contains(remedy),
            "{told}"
        );
        assert!(!told.contains("1 of "), "it began to measure: {told}");
    }
    assert_eq!(std::fs::read(&file).unwrap(), b"mine");
    std::fs::remove_dir_all(&folder).unwrap();
}

fn kept_file() {
    let file = scratch("keep.hgrm");
    std::fs::write(&file, "earlier").unwrap();
    let path = file.to_str().unwrap();
    for cannot in [
        &["--listen", "198.18.0.1:9"][..],
        &["--listen", "127.0.0.1:0", "--cpu", "100000"],
    ] {
        let told = tool(&[&["receive", "--hgrm", path], cannot].concat());
        assert!(matches!(told.status.code(), Some(1 | 2)), "{told:?}");
        assert_eq!(std::fs::read(&file).unwrap(), b"earlier");
    }
    std::fs::remove_file(&file).unwrap();

    // A FIFO without a reader is refused; with one it is written.
    let name = std::ffi::CString::new(path).unwrap();
    // SAFETY: the call reads a string that ends with a zero and outlives it.
    assert_eq!(unsafe { libc::mkfifo(name.as_ptr(), 0o600) }, 0);
    let options = [
        "receive",
        "--listen",
        "127.0.0.1:0",
        "--duration",
        "0.05",
        "--hgrm",
        path,
    ];
    let told = Running::start(&options).end();
    assert_eq!(told.status.code(), Some(1));
    let errors = String::from_utf8(told.stderr).unwrap();
    assert!(
        errors.contains(path) && errors.contains("start its reader first"),
        "{errors}"
    );
    let mut reader = std::fs::OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(&file)
        .unwrap();
    let told = Running::start(&options).end();
    assert_eq!(told.status.code(), Some(0), "{told:?}");
    let mut text = String::new();
    reader.read_to_string(&mut text).unwrap();
    assert!(text.contains("Total count"), "{text}");
    std::fs::remove_file(&file).unwrap();
}

fn lost_folder() {
    need_tun();
    let folder = scratch("lost");
    let mut running = Running::start(&[
        "bench",
        "--quick",
        "--rounds",
        "1",
        "--only",
        "drain",
        "--out",
        folder.to_str().unwrap(),
    ]);
    let mut lines = BufReader::new(running.child.stderr.take().unwrap());
    let mut last = String::new();
    // Its end closes the pipe, so this ends in any case.
    while !last.starts_with("1 of 2: ") {
        last.clear();
        assert_ne!(lines.read_line(&mut last).unwrap(), 0, "it ended");
    }
    std::fs::remove_dir_all(&folder).unwrap();
    let mut rest = String::new();
    lines.read_to_string(&mut rest).unwrap();
    let output = running.end();
    assert_eq!(output.status.code(), Some(1), "{rest}");
    for name in ["bench.json", "report.md", "report.html"] {
        assert!(rest.contains(&format!("{}: ", folder.join(name).display())), "{rest}");
    }
    let shown = String::from_utf8(output.stdout).unwrap();
    assert!(
        shown.contains("receive, 64 B") && !shown.contains("written to"),
        "{shown}"
    );
}

fn closed_output() {
    for verb in [
        &["generate", "--target", "127.0.0.1:9", "--count", "1"][..],
        &["receive", "--listen", "127.0.0.1:0", "--duration", "0.01"],
        &["doctor"],
        &["doctor", "--json"],
    ] {
        let output = |stdout: Stdio| {
            let mut command = Command::new(env!("CARGO_BIN_EXE_tun-driver"));
            let output = command.args(verb).stdout(stdout).output().unwrap();
            (output.status.code(), String::from_utf8(output.stderr).unwrap())
        };
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let (code, errors) = output(writer.into());
        assert!(matches!(code, Some(0 | 77)), "{verb:?}: {code:?} {errors}");
        assert!(!errors.contains("pipe") && !errors.contains("panicked"), "{errors}");
        let full = std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
        let (code, errors) = output(full.into());
        assert_eq!(code, Some(1), "{verb:?}: {errors}");
        assert!(
            errors.contains("standard output: ") && !errors.contains("panicked"),
            "{errors}"
        );
    }
}

fn targets() {
    for (arguments, told) in [
        (["generate", "--target", "127.0.0.1:0"], "port 0"),
        (["generate", "--target", "[fe80::1]:9"], "such as [fe80::1%eth0]:9"),
        (["receive", "--listen", "[fe80::1]:9"], "such as [fe80::1%eth0]:9"),
        (
            ["generate", "--target", "[fe80::1%nowhere0]:9"],
            "no interface nowhere0",
        ),
    ] {
        let output = tool(&arguments);
        let errors = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{arguments:?}: {errors}");
        assert!(errors.contains(told) && errors.contains(arguments[1]), "{errors}");
    }
}

fn progress_lines() {
    need_tun();
    let folder = scratch("lines");
    let told = tool(&[
        "bench",
        "--quick",
        "--rounds",
        "1",
        "--only",
        "drain,acts",
        "--json",
        "--out",
        folder.to_str().unwrap(),
    ]);
    let object: Value = serde_json::from_slice(&told.stdout).unwrap();
    let lines = String::from_utf8(told.stderr).unwrap();
    assert_eq!(told.status.code(), Some(promised(&object)), "{lines}");
    let lines: Vec<&str> = lines.lines().filter(|line| line.contains(" of 3: ")).collect();
    assert_eq!(lines.len(), 3, "{lines:?}");
    for (number, (line, title)) in lines
        .iter()
        .zip(["receive, 64 B", "receive, 1400 B", "reach a worker"])
        .enumerate()
    {
        assert!(line.starts_with(&format!("{} of 3: {title}", number + 1)), "{line}");
    }
    std::fs::remove_dir_all(&folder).unwrap();
}

/// The JSON that a run of `bench` printed and wrote, checked against the schema.
fn printed(output: &Output, folder: &std::path::Path) -> Value {
    let printed: Value = serde_json::from_slice(&output.stdout).unwrap();
    let written: Value = serde_json::from_slice(&std::fs::read(folder.join("bench.json")).unwrap()).unwrap();
    assert_eq!(printed, written);
    let schema: Value = serde_json::from_str(include_str!("../docs/bench.schema.json")).unwrap();
    let errors: Vec<String> = jsonschema::draft202012::new(&schema)
        .unwrap()
        .iter_errors(&printed)
        .map(|error| format!("{}: {error}", error.instance_path()))
        .collect();
    assert!(errors.is_empty(), "{errors:#?}");
    printed
}

fn interrupted_bench() {
    need_tun();
    // In the first case, and in the second one.
    for complete in [0, 1] {
        let folder = scratch(&format!("cut{complete}"));
        let rounds = if complete == 0 { "10000" } else { "30" };
        let mut running = Running::start(&[
            "bench",
            "--rounds",
            rounds,
            "--only",
            "drain,sink,acts",
            "--json",
            "--out",
            folder.to_str().unwrap(),
        ]);
        let mut lines = BufReader::new(running.child.stderr.take().unwrap());
        // Its end closes the pipe, so this ends in any case.
        let mut last = String::new();
        while !last.starts_with(&format!("{} of 5: ", complete + 1)) {
            last.clear();
            assert_ne!(lines.read_line(&mut last).unwrap(), 0, "it ended");
        }
        running.interrupt();
        let mut rest = String::new();
        lines.read_to_string(&mut rest).unwrap();
        running.child.stderr = None;
        let output = running.end();
        assert_eq!(output.status.code(), Some(130), "{rest}");
        assert!(
            rest.contains("interrupted in “receive") && rest.contains("marked as incomplete"),
            "{rest}"
        );

        let told = printed(&output, &folder);
        assert_eq!(
            (&told["complete"], &told["citable"]),
            (&Value::from(false), &Value::from(false))
        );
        let why = told["incomplete_because"].as_str().unwrap().to_owned();
        assert!(why.contains("interrupted in “receive"), "{why}");
        // The same number as in the last line of progress.
        let progress = rest.lines().rfind(|line| line.contains(" of 5: "));
        let number = progress.unwrap_or(&last).split(' ').next().unwrap();
        assert!(why.ends_with(&format!(", case {number} of 5")), "{why}: {rest}");
        assert!(rest.contains(&why), "{rest}");
        let cases = told["cases"].as_array().unwrap();
        assert!(
            (complete..=complete + 1).contains(&cases.len()),
            "{} cases",
            cases.len()
        );
        if complete == 1 {
            assert_eq!(cases[0]["report"]["rounds"], 30, "what was complete is whole");
        }
        if let Some(cut) = cases.get(complete) {
            assert!(cut["report"]["rounds"].as_u64() < Some(rounds.parse().unwrap()));
        }
        assert!(told["acts"].as_array().unwrap().is_empty());
        let page = std::fs::read_to_string(folder.join("report.html")).unwrap();
        let text = std::fs::read_to_string(folder.join("report.md")).unwrap();
        assert!(
            page.contains(&format!("Incomplete: {why}")) && text.contains(&format!("INCOMPLETE: {why}")),
            "{text}"
        );
        std::fs::remove_dir_all(&folder).unwrap();
    }
}

/// The tool in a mount namespace in which `change` was made.
fn tool_after(change: &str, arguments: &[&str]) -> Output {
    need_program("unshare", "util-linux");
    need_program("mount", "mount");
    let output = Command::new("unshare")
        .args(["--mount", "sh", "-c"])
        .arg(format!("{{ {change}; }} && echo changed >&2 && exec \"$0\" \"$@\""))
        .arg(env!("CARGO_BIN_EXE_tun-driver"))
        .args(arguments)
        .output()
        .unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    let Some((_, rest)) = stderr.split_once("changed\n") else {
        skip(format!("no mount namespace: {stderr}"))
    };
    Output {
        stderr: rest.as_bytes().to_vec(),
        ..output
    }
}

fn foreign_node() {
    let folder = scratch("foreign");
    let out = folder.to_str().unwrap();
    for node in [
        "touch /dev/net/tun",
        "mkdir /dev/net/tun",
        "mount --bind /dev/null /dev/net/tun",
    ] {
        let change = match node.starts_with("mount") {
            true => node.to_owned(),
            false => format!("mount -t tmpfs tmpfs /dev/net && {node}"),
        };
        let output = tool_after(&change, &["doctor", "--json"]);
        assert_eq!(output.status.code(), Some(77), "{node}");
        let told: Value = serde_json::from_slice(&output.stdout).unwrap();
        let find = |name: &str| {
            let all = told["findings"].as_array().unwrap();
            all.iter().find(|one| one["name"] == name).unwrap().to_string()
        };
        if node.starts_with("mount") && find("/dev/net/tun").contains("Permission denied") {
            skip("a user without rights opens no device node through a mount");
        }
        for name in ["/dev/net/tun", "sandbox"] {
            let told = find(name);
            assert!(
                told.contains("\"missing\"") && told.contains("10:200") && told.contains("mknod"),
                "{node}: {told}"
            );
        }
        let nowait = find("tun without waiting");
        assert!(!nowait.contains("6.4"), "the kernel is not to blame: {nowait}");
        for verb in [&["bench", "--quick"][..], &["throughput"]] {
            let told = tool_after(&change, &[verb, &["--out", out]].concat());
            let stderr = String::from_utf8_lossy(&told.stderr).into_owned();
            assert_eq!(told.status.code(), Some(77), "{node} {verb:?}: {stderr}");
            assert!(
                stderr.contains("/dev/net/tun: ") && stderr.contains("10:200") && stderr.contains("mknod"),
                "{stderr}"
            );
            assert!(
                !folder.exists() && told.stdout.is_empty(),
                "{node} {verb:?}: a report of nothing"
            );
        }
    }
}

/// The node is taken away, or closed to root too, in a mount namespace.
fn doctor_without_node() {
    for (change, remedy) in [
        ("mount -t tmpfs tmpfs /dev/net", "modprobe tun"),
        (
            "mount --bind /dev/net /dev/net && mount -o remount,bind,nodev /dev/net",
            "chmod 0666 /dev/net/tun",
        ),
    ] {
        let output = tool_after(change, &["doctor", "--json"]);
        assert_eq!(output.status.code(), Some(77));
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert!(stderr.contains("missing: /dev/net/tun, "), "{stderr}");
        let told: Value = serde_json::from_slice(&output.stdout).unwrap();
        let find = |name: &str| {
            told["findings"]
                .as_array()
                .unwrap()
                .iter()
                .find(|one| one["name"] == name)
                .unwrap()
                .clone()
        };
        for name in ["/dev/net/tun", "sandbox"] {
            let finding = find(name);
            assert_eq!(finding["state"], "missing");
            let told = finding["remedy"].as_str().unwrap();
            assert!(
                told.contains(remedy) && !told.contains("user namespaces"),
                "{name}: {told}"
            );
        }
    }
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
        assert_eq!(
            String::from_utf8_lossy(&nothing.stdout).trim(),
            "no packet came: check the route to this address, and that `generate` sends to it"
        );
    }
    // Nothing is known to have been sent, or all of it is missing.
    for (count, loss) in [(&[][..], Value::Null), (&["--count", "5"], Value::from(100.0))] {
        let nothing = ["receive", "--listen", "127.0.0.1:0", "--duration", "0.05"];
        let told = tool(&[&nothing, count, &["--json"]].concat());
        let told: Value = serde_json::from_slice(&told.stdout).unwrap();
        assert_eq!(told["loss_percent"], loss);
        let text = tool(&[&nothing, count].concat());
        let text = String::from_utf8(text.stdout).unwrap();
        assert!(text.starts_with("no packet came") && !text.contains('%'), "{text}");
    }
    // What is not of `generate` says nothing of what was sent.
    let receiver = Running::receive(&["--listen", "127.0.0.1:0", "--quiet-ms", "100"]);
    let sender = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    sender.send_to(b"other", &receiver.address).unwrap();
    let told = receiver.end().stdout;
    let told = String::from_utf8(told).unwrap();
    assert!(told.trim_end().ends_with("; 0 dropped at this socket, 0/s"), "{told}");
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
    let deadline = Instant::now() + Duration::from_secs(20) * common::slowness();
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
    let told = |output: &Output| String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(
        told(&nowhere).contains("--target 198.18.0.1:9: ") && told(&nowhere).contains("add a route"),
        "{}",
        told(&nowhere)
    );
    let source = tool(&[
        "generate",
        "--target",
        "127.0.0.1:9",
        "--source",
        "198.18.0.9:5000",
        "--count",
        "1",
    ]);
    assert_eq!(source.status.code(), Some(1));
    assert!(
        told(&source).contains("--source 198.18.0.9:5000: "),
        "{}",
        told(&source)
    );
    // A file that is no namespace is named.
    let folder = scratch("netns");
    let netns = tool(&[
        "throughput",
        "--gen-netns",
        "/proc/self/status",
        "--out",
        folder.to_str().unwrap(),
    ]);
    assert!(matches!(netns.status.code(), Some(1 | 77)), "{:?}", netns.status);
    assert!(
        told(&netns).contains("setns(/proc/self/status): ") || netns.status.code() == Some(77),
        "{}",
        told(&netns)
    );
    assert!(!folder.exists(), "nothing was measured");
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
        let deadline = Instant::now() + Duration::from_secs(20) * common::slowness();
        let status = loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                break status;
            }
            assert!(Instant::now() < deadline, "it does not end");
            thread::sleep(Duration::from_millis(5));
        };
        let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
        self.child.stdout.take().unwrap().read_to_end(&mut stdout).unwrap();
        if let Some(mut pipe) = self.child.stderr.take() {
            pipe.read_to_end(&mut stderr).unwrap();
        }
        Output { status, stdout, stderr }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
