//! The tool as its user meets it: exit codes, JSON and nothing else on standard output, the files it says it writes.

mod common;

use std::process::{Command, Output};

use common::{need_tun, trial};
use serde_json::Value;

fn main() {
    common::run(vec![
        trial("doctor tells about this host, also as JSON", doctor),
        trial("bench measures, and writes what it says", bench),
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
        "--rounds",
        "1",
        "--only",
        "drain,round-trip",
        "--json",
        "--out",
        out,
    ]);
    assert!(told.status.success(), "{}", String::from_utf8_lossy(&told.stderr));
    let printed: Value = serde_json::from_slice(&told.stdout).unwrap();
    let written: Value = serde_json::from_slice(&std::fs::read(folder.join("bench.json")).unwrap()).unwrap();
    assert_eq!(printed, written);
    let cases: Vec<&str> = printed["cases"]
        .as_array()
        .unwrap()
        .iter()
        .map(|case| case["case"].as_str().unwrap())
        .collect();
    assert_eq!(cases, ["drain", "drain", "round_trip"]);
    let latency = printed["cases"][2]["latency"].as_array().unwrap();
    assert!(latency.len() >= 3);
    for way in latency {
        assert_eq!(way["trips"], 1_000);
        assert!(way["p50_ns"].as_u64() > Some(0) && way["p50_ns"].as_u64() <= way["p99_ns"].as_u64());
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
    assert_eq!(histograms.count(), latency.len());
    std::fs::remove_dir_all(&folder).unwrap();
}

fn usage() {
    for wrong in [
        &["nonsense"][..],
        &["bench", "--rounds", "0"],
        &["bench", "--only", "nothing"],
    ] {
        assert_eq!(tool(wrong).status.code(), Some(2), "{wrong:?}");
    }
    let nowhere = tool(&["bench", "--quick", "--out", "/proc/nowhere"]);
    assert!(matches!(nowhere.status.code(), Some(1 | 77)), "{:?}", nowhere.status);
}
