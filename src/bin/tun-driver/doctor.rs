//! `tun-driver doctor`.

use std::io::{self, Write};

use clap::Args;
use serde_json::json;
use tun_driver::lab::Sandbox;
use tun_driver::{Backend, Builder, Mode, Support, TunNode, Worker, WorkerConfig};

use crate::{Failure, shown};

#[derive(Args)]
pub(crate) struct Options {
    /// Print one JSON object instead of lines.
    #[arg(long)]
    json: bool,
}

/// One thing looked at.
struct Finding {
    name: &'static str,
    state: State,
    told: String,
    /// What to do about it.
    remedy: Option<String>,
}

#[derive(Clone, Copy, PartialEq)]
enum State {
    Good,
    /// Works, but not at its best.
    Reduced,
    Missing,
}

impl State {
    fn word(self) -> &'static str {
        match self {
            State::Good => "ok",
            State::Reduced => "reduced",
            State::Missing => "missing",
        }
    }
}

pub(crate) fn run(options: &Options) -> Result<(), Failure> {
    let findings = examine();
    shown(write(options, &findings))?;
    let missing: Vec<&str> = findings
        .iter()
        .filter(|finding| finding.state == State::Missing)
        .map(|finding| finding.name)
        .collect();
    if missing.is_empty() {
        Ok(())
    } else {
        Err(Failure::Missing(missing))
    }
}

fn write(options: &Options, findings: &[Finding]) -> io::Result<()> {
    let mut out = io::stdout().lock();
    if options.json {
        let told: Vec<_> = findings
            .iter()
            .map(|finding| {
                json!({ "name": finding.name, "state": finding.state.word(), "told": finding.told, "remedy": finding.remedy })
            })
            .collect();
        let all = json!({ "schema_version": 1, "tool_version": env!("CARGO_PKG_VERSION"), "findings": told });
        writeln!(out, "{all:#}")?;
        return Ok(());
    }
    for finding in findings {
        writeln!(out, "{:<8} {:<18} {}", finding.state.word(), finding.name, finding.told)?;
        if let Some(remedy) = &finding.remedy {
            writeln!(out, "{:<27} -> {remedy}", "")?;
        }
    }
    Ok(())
}

fn examine() -> Vec<Finding> {
    let support = Support::probe();
    let mut findings = vec![
        kernel(&support),
        node(&support),
        nowait(&support),
        io_uring(&support),
        memlock(&support),
    ];
    findings.push(backend());
    findings.push(good_if(
        support.cap_net_admin,
        State::Reduced,
        "CAP_NET_ADMIN",
        (
            "this process has it",
            "this process lacks it: it can attach to existing devices it owns, but cannot create them",
        ),
        "run as root, or: setcap cap_net_admin+ep PROGRAM",
    ));
    findings.push(Finding {
        name: "processors",
        state: State::Good,
        told: format!("this process may run on {}", list(&support.allowed_cpus)),
        remedy: None,
    });
    // Last, because without root it moves the whole process into a user namespace.
    findings.push(sandbox(&support));
    findings
}

fn kernel(support: &Support) -> Finding {
    let release = support.kernel_release.clone().unwrap_or_else(|| "unknown".to_owned());
    Finding {
        name: "kernel",
        state: State::Good,
        told: release,
        remedy: None,
    }
}

fn node(support: &Support) -> Finding {
    let trouble = node_trouble(support.tun_node);
    Finding {
        name: "/dev/net/tun",
        state: match trouble {
            None => State::Good,
            Some(_) => State::Missing,
        },
        told: trouble.unwrap_or_else(|| "can be opened".to_owned()),
        remedy: node_remedy(support.tun_node).map(str::to_owned),
    }
}

/// Why a node is of no use.
fn node_trouble(node: TunNode) -> Option<String> {
    match node {
        TunNode::Opens => None,
        TunNode::Missing => Some("there is none".to_owned()),
        TunNode::Foreign => Some("a file or another device, not the character device 10:200".to_owned()),
        TunNode::Refused(errno) => Some(io::Error::from_raw_os_error(errno).to_string()),
        _ => Some("unknown".to_owned()),
    }
}

/// Fails, with the remedy, where no device can be opened for want of the node.
pub(crate) fn need_node(support: &Support) -> Result<(), Failure> {
    let Some(trouble) = node_trouble(support.tun_node) else {
        return Ok(());
    };
    let remedy = node_remedy(support.tun_node).unwrap_or_default();
    Err(Failure::Lacking(format!("/dev/net/tun: {trouble}: {remedy}")))
}

/// What to do about a node that cannot be opened.
fn node_remedy(node: TunNode) -> Option<&'static str> {
    match node {
        TunNode::Opens => None,
        TunNode::Missing => Some("modprobe tun; in a container: --device /dev/net/tun"),
        TunNode::Foreign => Some("remove it, and make the node: mknod /dev/net/tun c 10 200"),
        _ => Some("run as root, or: chmod 0666 /dev/net/tun; in a container: --device /dev/net/tun"),
    }
}

fn nowait(support: &Support) -> Finding {
    match support.tun_nowait {
        Some(yes) => good_if(
            yes,
            State::Reduced,
            "tun without waiting",
            (
                "queues can be driven through a ring",
                "queues can be driven by system calls only",
            ),
            "a kernel of 6.4 or later",
        ),
        None => Finding {
            name: "tun without waiting",
            state: State::Reduced,
            told: "cannot be asked without /dev/net/tun".to_owned(),
            remedy: None,
        },
    }
}

fn io_uring(support: &Support) -> Finding {
    let ring = &support.io_uring;
    let (state, told, remedy) = match (ring.available, ring.errno) {
        (true, _) => (State::Good, "usable".to_owned(), None),
        (false, errno) => {
            let told = errno.map_or("refused".to_owned(), |errno| {
                io::Error::from_raw_os_error(errno).to_string()
            });
            let remedy = match ring.disabled_sysctl {
                Some(level @ 1..) => format!("it is switched off: sysctl kernel.io_uring_disabled is {level}, 0 allows it"),
                _ => "in a container: a seccomp profile that allows io_uring; else a later kernel. System calls serve meanwhile".to_owned(),
            };
            (State::Reduced, told, Some(remedy))
        }
    };
    Finding {
        name: "io_uring",
        state,
        told,
        remedy,
    }
}

fn memlock(support: &Support) -> Finding {
    let need = WorkerConfig::default().memory().buffers as u64;
    let (enough, told) = match (support.cap_ipc_lock, support.memlock_limit) {
        (true, _) => (true, "no limit for this process (CAP_IPC_LOCK)".to_owned()),
        (false, None) => (true, "no limit".to_owned()),
        (false, Some(limit)) => (
            limit >= need,
            format!("{} KiB; a default worker registers {} KiB", limit / 1024, need / 1024),
        ),
    };
    good_if(
        enough,
        State::Reduced,
        "locked memory",
        (&told, &told),
        "ulimit -l unlimited, or LimitMEMLOCK= of the service",
    )
}

/// What a worker with default settings gets.
fn backend() -> Finding {
    let name = "backend";
    match Worker::new(&WorkerConfig::default()) {
        Ok(worker) => {
            let report = worker.backend();
            let best = report.backend == Backend::IoUring && report.registered_buffers;
            let state = if best { State::Good } else { State::Reduced };
            Finding {
                name,
                state,
                told: format!("{:?}: {}", report.backend, report.why),
                remedy: None,
            }
        }
        Err(error) => Finding {
            name,
            state: State::Missing,
            told: error.to_string(),
            remedy: None,
        },
    }
}

/// Whether `bench` and the tests can run here.
fn sandbox(support: &Support) -> Finding {
    let missing = |told: String, remedy: Option<&str>| Finding {
        name: "sandbox",
        state: State::Missing,
        told,
        remedy: remedy.map(str::to_owned),
    };
    let sandbox = match Sandbox::enter() {
        Ok(sandbox) => sandbox,
        Err(error) => {
            return missing(
                error.to_string(),
                Some(
                    "run as root, or allow user namespaces (sysctl kernel.unprivileged_userns_clone, kernel.apparmor_restrict_unprivileged_userns)",
                ),
            );
        }
    };
    if let Err(error) = Builder::new("doctor%d", Mode::Tun).open() {
        // The namespace was made, so only the node can be at fault, or what the error says itself.
        return missing(
            format!("a namespace can be made, but no device in it: {error}"),
            node_remedy(support.tun_node),
        );
    }
    let how = if sandbox.is_rootless() {
        "in a user namespace"
    } else {
        "as root"
    };
    Finding {
        name: "sandbox",
        state: State::Good,
        told: format!("devices can be made in a separate namespace, {how}"),
        remedy: None,
    }
}

fn good_if(good: bool, else_state: State, name: &'static str, (yes, no): (&str, &str), remedy: &str) -> Finding {
    Finding {
        name,
        state: if good { State::Good } else { else_state },
        told: if good { yes } else { no }.to_owned(),
        remedy: (!good).then(|| remedy.to_owned()),
    }
}

fn list(cpus: &[usize]) -> String {
    let words: Vec<String> = cpus.iter().map(usize::to_string).collect();
    words.join(", ")
}
