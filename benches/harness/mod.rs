//! What the benchmarks have in common: options, progress, table, JSON.

#[path = "../floor/mod.rs"]
pub(crate) mod floor;

use std::error::Error;
use std::fs;
use std::io::{self, IsTerminal, Write};
use std::path::PathBuf;
use std::process::{Command, ExitCode};

use serde_json::{Value, json};
use tun_driver::lab::Sandbox;
use tun_driver::lab::cases::Way;
use tun_driver::lab::measure::{Machine, Plan, Turn};
use tun_driver::lab::ways::{ByWorker, IfaceLoop};
use tun_driver::{Backend, Wait};

/// What the command line asks for.
pub(crate) struct Options {
    pub(crate) plan: Plan,
    pub(crate) quick: bool,
    only: Vec<String>,
    against: Option<String>,
    /// Show what each choice of the floor is worth.
    pub(crate) variants: bool,
}

impl Options {
    /// The ways whose names contain one of the words given with `--only` (without any, all), and the plan with the baseline among them: the
    /// first way whose name contains the word given with `--against`, or the first of all.
    #[allow(dead_code)] // the benchmark of scaling has no choice
    pub(crate) fn choose<'a>(&self, ways: &'a [Box<dyn Way>]) -> io::Result<(Vec<&'a dyn Way>, Plan)> {
        let against = self.against.as_deref().unwrap_or_default();
        let Some(baseline) = ways.iter().position(|way| way.name().contains(against)) else {
            return Err(io::Error::new(
                io::ErrorKind::NotFound,
                format!("--against {against}: no such way here"),
            ));
        };
        let wanted = |name: &str| self.only.is_empty() || self.only.iter().any(|word| name.contains(word));
        let chosen: Vec<usize> = (0..ways.len())
            .filter(|&index| index == baseline || wanted(ways[index].name()))
            .collect();
        let place = chosen.iter().position(|&index| index == baseline).unwrap_or_default();
        let plan = Plan {
            baseline: place,
            ..self.plan.clone()
        };
        Ok((chosen.into_iter().map(|index| &*ways[index]).collect(), plan))
    }
}

/// The ways that the benchmarks of throughput compare. The first is the usual baseline.
#[allow(dead_code)] // the benchmark of latency has its own
pub(crate) fn moving_ways(options: &Options) -> Vec<Box<dyn Way>> {
    let mut ways: Vec<Box<dyn Way>> = vec![
        Box::new(IfaceLoop { nonblocking: true }),
        Box::new(floor::PlainLoop { nonblocking: true }),
        Box::new(floor::Floor::default()),
        Box::new(ByWorker::new(Backend::IoUring, Wait::Block)),
        Box::new(ByWorker::new(Backend::Syscalls, Wait::Block)),
    ];
    if options.variants {
        ways.extend(
            floor::Floor::variants()
                .into_iter()
                .map(|floor| Box::new(floor) as Box<dyn Way>),
        );
    }
    ways
}

/// A benchmark's main: options, sandbox, the cases (each a JSON object), a file under `target/bench`.
pub(crate) fn run(name: &str, cases: impl FnOnce(&Options, &Sandbox) -> io::Result<Vec<Value>>) -> ExitCode {
    let options = match parse(std::env::args().skip(1)) {
        Ok(Some(options)) => options,
        Ok(None) => return ExitCode::SUCCESS,
        Err(told) => {
            eprintln!("{name}: {told}\n{USAGE}");
            return ExitCode::from(2);
        }
    };
    match measured(name, &options, cases) {
        Ok(path) => {
            eprintln!("written to {}", path.display());
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("{name}: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Shows which sample is being taken, on a terminal.
#[allow(dead_code)] // not everything takes long
pub(crate) fn progress(case: &str) -> impl FnMut(Turn) -> io::Result<()> + Send + use<> {
    let case = case.to_owned();
    let terminal = io::stderr().is_terminal();
    move |turn: Turn| {
        if terminal {
            eprint!("\r{case}: {}/{} ", turn.done + 1, turn.total);
            if turn.done + 1 == turn.total {
                eprint!("\r\x1b[K");
            }
            let _ = io::stderr().flush();
        }
        Ok(())
    }
}

const USAGE: &str = "options: [--quick] [--rounds N] [--only WAY]… [--against WAY] [--variants] [--again]
  --quick     3 rounds instead of 20: shows that everything works, not to be quoted
  --rounds N  rounds that count, after one of warm-up
  --only WAY  only ways whose name contains WAY (and the baseline)
  --against WAY  the baseline: the first way whose name contains WAY
  --variants  the floor with one choice altered each
  --again     run the baseline twice in each round, to see how far ratios can be trusted";

/// `None` where nothing is to be run: `cargo test --benches` starts the program without `--bench`.
fn parse(arguments: impl Iterator<Item = String>) -> Result<Option<Options>, String> {
    let mut options = Options {
        plan: Plan {
            rounds: 20,
            ..Plan::default()
        },
        quick: false,
        only: Vec::new(),
        against: None,
        variants: false,
    };
    let mut bench = false;
    let mut rounds = None;
    let mut arguments = arguments.into_iter();
    while let Some(argument) = arguments.next() {
        match argument.as_str() {
            "--bench" => bench = true,
            "--quick" => options.quick = true,
            "--variants" => options.variants = true,
            "--again" => options.plan.against_itself = true,
            "--rounds" => {
                let number = arguments.next().ok_or("--rounds needs a number")?;
                match number.parse::<usize>() {
                    Ok(number) if number > 0 => rounds = Some(number),
                    _ => return Err(format!("--rounds {number}: not a number above 0")),
                }
            }
            "--only" => options
                .only
                .push(arguments.next().ok_or("--only needs a part of a way's name")?),
            "--against" => options.against = Some(arguments.next().ok_or("--against needs a part of a way's name")?),
            other => return Err(format!("{other}: unknown option")),
        }
    }
    if !bench {
        println!("not measured: run it with cargo bench");
        return Ok(None);
    }
    options.plan.rounds = rounds.unwrap_or(if options.quick {
        Plan::quick().rounds
    } else {
        options.plan.rounds
    });
    Ok(Some(options))
}

fn measured(
    name: &str,
    options: &Options,
    cases: impl FnOnce(&Options, &Sandbox) -> io::Result<Vec<Value>>,
) -> Result<PathBuf, Box<dyn Error>> {
    let machine = Machine::read();
    println!("{machine}");
    let commit = commit();
    let sandbox = Sandbox::enter()?;
    let told = json!({
        "schema_version": 1,
        "benchmark": name,
        "quick": options.quick,
        "commit": commit,
        "machine": machine.to_json(),
        "cases": cases(options, &sandbox)?,
    });
    let folder = PathBuf::from(std::env::var_os("CARGO_TARGET_DIR").unwrap_or_else(|| "target".into())).join("bench");
    fs::create_dir_all(&folder)?;
    let path = folder.join(format!("{name}.json"));
    fs::write(&path, serde_json::to_string_pretty(&told)?)?;
    Ok(path)
}

/// The commit of the sources, `-dirty` where they differ from it; `None` outside a repository.
fn commit() -> Option<String> {
    let output = Command::new("git")
        .args([
            "-C",
            env!("CARGO_MANIFEST_DIR"),
            "describe",
            "--always",
            "--dirty",
            "--exclude=*",
        ])
        .output()
        .ok()?;
    let told = String::from_utf8(output.stdout).ok()?;
    (output.status.success() && !told.trim().is_empty()).then(|| told.trim().to_owned())
}
