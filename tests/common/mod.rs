//! The runner of tests on real devices: each trial in a network namespace of its own.
//!
//! A test file is declared with `harness = false` and `required-features = ["lab"]`, and reads
//!
//! ```ignore
//! mod common;
//! use common::trial;
//!
//! fn main() {
//!     common::run(vec![
//!         trial("what holds", || { … assert!(…) … }),
//!         trial("what takes long", || { … }).bound(Duration::from_secs(300)),
//!         trial("what counts descriptors", || { … }).alone(),
//!     ])
//! }
//! ```
//!
//! The process enters a sandbox before its first thread (root: a network namespace; otherwise a user namespace too). Each trial then runs on
//! a thread of its own in a fresh namespace with loopback up, so trials neither see each other nor the host, and run side by side.
//!
//! - A panic fails the trial with its message. [`skip`] ends a trial as ignored, with a reason.
//! - A trial that outlasts its bound fails by name; its thread is left behind.
//! - If no namespace can be had, all trials are ignored with the reason; `TUN_DRIVER_REQUIRE_NETNS=1` makes that a failure.
//! - `TUN_DRIVER_SLOWNESS=5` makes the bounds five times as long.
//! - `TUN_DRIVER_ANNOUNCE=1` prints a line as a trial begins, so that a log shows which one was running.
//! - `TUN_DRIVER_REQUIRE_ALL=1` makes each [`skip`] a failure.
//! - `TUN_DRIVER_LONG=1` raises [`repeats`] to the counts of a long run, 0.1 to a tenth of them; bounds grow, too.
#![allow(dead_code, unreachable_pub)] // each test file uses its share

use std::any::Any;
use std::env;
use std::fs::{self, OpenOptions};
use std::io;
use std::net::IpAddr;
use std::panic::{self, AssertUnwindSafe};
use std::process;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, LazyLock, PoisonError, RwLock};
use std::thread;
use std::time::{Duration, Instant};

use libtest_mimic::{Arguments, Completion, Failed};
use tun_driver::lab::Sandbox;
use tun_driver::{Backend, Support};

/// How long a trial may take unless it says otherwise.
const BOUND: Duration = Duration::from_secs(60);

/// The bounds are multiplied by this number, on an emulated machine.
const SLOWNESS: &str = "TUN_DRIVER_SLOWNESS";

/// Selects the repeat counts of a long run.
const LONG: &str = "TUN_DRIVER_LONG";

/// One check, run in a namespace of its own.
pub struct Trial {
    name: String,
    bound: Duration,
    alone: bool,
    work: Box<dyn FnOnce() + Send>,
}

/// A check by name; it fails by panicking.
pub fn trial(name: impl Into<String>, work: impl FnOnce() + Send + 'static) -> Trial {
    Trial {
        name: name.into(),
        bound: BOUND,
        alone: false,
        work: Box::new(work),
    }
}

impl Trial {
    /// Sets how long it may take (60 s unless set).
    pub fn bound(mut self, bound: Duration) -> Self {
        self.bound = bound;
        self
    }

    /// Runs it with no other trial beside it: for what is counted per process (descriptors, threads, memory).
    pub fn alone(mut self) -> Self {
        self.alone = true;
        self
    }
}

/// Runs the trials that the command line selects, prints what came of each, and ends the process.
pub fn run(trials: Vec<Trial>) -> ! {
    let arguments = Arguments::from_args();
    let refusal = if arguments.list {
        None
    } else {
        Sandbox::enter().err().map(|error| error.to_string())
    };
    let required = is_set("TUN_DRIVER_REQUIRE_NETNS");
    if let Some(reason) = &refusal {
        eprintln!("no network namespace: {reason}");
    }
    // Without privilege all trials share one limit of locked memory, which is counted per user.
    // Side by side they would take it from each other.
    let serial = refusal.is_none() && !arguments.list && !in_initial_user_namespace();
    let arguments = Arguments {
        test_threads: if serial { Some(1) } else { arguments.test_threads },
        ..arguments
    };
    let turn = Arc::new(RwLock::new(()));
    let trials = trials
        .into_iter()
        .map(|trial| {
            let refusal = refusal.clone();
            let turn = Arc::clone(&turn);
            libtest_mimic::Trial::ignorable_test(trial.name.clone(), move || match refusal {
                Some(reason) if required => Err(Failed::from(format!("no network namespace: {reason}"))),
                Some(reason) => Ok(Completion::ignored_with(format!("no network namespace: {reason}"))),
                None if trial.alone => {
                    let _turn = turn.write().unwrap_or_else(PoisonError::into_inner);
                    run_one(trial)
                }
                None => {
                    let _turn = turn.read().unwrap_or_else(PoisonError::into_inner);
                    run_one(trial)
                }
            })
        })
        .collect();
    let conclusion = libtest_mimic::run(&arguments, trials);
    // Not by returning: a trial that hangs must not hold the process.
    process::exit(if conclusion.has_failed() { 101 } else { 0 })
}

/// Ends the calling trial as ignored: this host lacks what it needs (a kernel feature, a program, a privilege). Call it on the trial's thread.
pub fn skip(reason: impl Into<String>) -> ! {
    // Not a panic to the hook: nothing is printed until the runner does.
    panic::resume_unwind(Box::new(Skip(reason.into())))
}

/// Skips the trial unless TUN/TAP devices can be made here.
pub fn need_tun() {
    if let Err(error) = OpenOptions::new().read(true).write(true).open("/dev/net/tun") {
        skip(format!(
            "/dev/net/tun cannot be opened ({error}); as another user than root it must be writable (usually mode 0666)"
        ));
    }
}

/// Skips the trial unless these numbers mean users and groups here: in a user namespace made
/// without privilege only 0 does.
pub fn need_ids(ids: &[u32]) {
    let mapped = |map: &str, id: u32| {
        let text = fs::read_to_string(map).expect("procfs");
        text.lines().any(|line| {
            let mut numbers = line
                .split_whitespace()
                .map(|number| number.parse::<u64>().expect("a number"));
            let (first, _outside, count) = (numbers.next(), numbers.next(), numbers.next());
            first
                .zip(count)
                .is_some_and(|(first, count)| (first..first + count).contains(&id.into()))
        })
    };
    for &id in ids {
        if !["/proc/self/uid_map", "/proc/self/gid_map"]
            .iter()
            .all(|map| mapped(map, id))
        {
            skip(format!("this user namespace has no id {id}; run as root"));
        }
    }
}

/// Whether capabilities count for what the kernel asks of the initial user namespace: locked memory
/// and buffers beyond the limits.
pub fn in_initial_user_namespace() -> bool {
    let map = fs::read_to_string("/proc/self/uid_map").expect("procfs");
    map.split_whitespace().eq(["0", "0", "4294967295"])
}

/// Skips the trial unless the process may lock so much memory: a ring's registered buffers count,
/// and a worker takes fewer beyond the limit.
pub fn need_locked_memory(bytes: u64) {
    let support = Support::probe();
    if support.cap_ipc_lock && in_initial_user_namespace() {
        return;
    }
    if let Some(limit) = support.memlock_limit.filter(|&limit| limit < bytes) {
        skip(format!(
            "{} KiB may be locked, and the trial needs {} KiB; run as root, or raise RLIMIT_MEMLOCK (ulimit -l)",
            limit / 1024,
            bytes / 1024
        ));
    }
}

/// Skips the trial unless a socket may have a receive buffer of so many bytes, by privilege or by
/// the host's limit.
pub fn need_receive_buffer(bytes: u64) {
    const LIMIT: &str = "/proc/sys/net/core/rmem_max";
    // In a network namespace that is not the initial one, older kernels do not show it; the limit
    // is the host's then.
    let limit = fs::read_to_string(LIMIT).map_or(0, |text| text.trim().parse().expect(LIMIT));
    if !in_initial_user_namespace() && limit < bytes {
        skip(format!(
            "a socket may buffer {limit} bytes (net.core.rmem_max), and the trial needs {bytes}; run as root"
        ));
    }
}

/// Skips the trial unless `backend` can drive a device here: a ring wants Linux 6.4.
pub fn need_backend(backend: Backend) {
    need_tun();
    if backend == Backend::IoUring && Support::probe().tun_nowait == Some(false) {
        skip("this kernel's TUN driver does not take reads that never block (Linux 6.4), which the ring backend needs");
    }
}

/// How often to repeat a fault: `short` times by default, `long` times in a long run, or a share of
/// that.
pub fn repeats(short: usize, long: usize) -> usize {
    if !is_set(LONG) {
        return short;
    }
    let share: f64 = env::var(LONG).ok().and_then(|share| share.parse().ok()).expect(LONG);
    short.max((long as f64 * share) as usize)
}

/// How many times slower than usual this machine is taken to be.
pub fn slowness() -> u32 {
    // Once, as it allocates, and one test counts allocations.
    static TIMES: LazyLock<u32> =
        LazyLock::new(|| env::var(SLOWNESS).map_or(1, |times| times.parse().expect(SLOWNESS)));
    *TIMES
}

/// Receives, also where the process was stopped meanwhile: a call with a time-out is not resumed
/// then (signal(7)). Gives up after 20 seconds of interruptions.
pub fn again<T>(mut receive: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    let deadline = Instant::now() + Duration::from_secs(20) * slowness();
    loop {
        match receive() {
            Err(error) if error.kind() == io::ErrorKind::Interrupted && Instant::now() < deadline => (),
            outcome => return outcome,
        }
    }
}

/// Looks at up to five stretches of time, of which one must be quiet: a process that is stopped and
/// goes on is woken for that alone.
pub fn once_quiet(mut look: impl FnMut() -> Result<(), String>) {
    let disturbances: Vec<String> = (0..5).map_while(|_| look().err()).collect();
    assert!(disturbances.len() < 5, "never quiet: {disturbances:?}");
}

/// Waits until an address takes packets: the kernel makes the route of one of IPv6 a little after
/// the address was added, on one of its own threads. Nothing is sent, as a device would see it.
pub fn await_address(address: IpAddr) {
    let IpAddr::V6(address) = address else {
        return;
    };
    let route = format!("{:032x} 80 ", address.to_bits());
    loop_until(|| {
        let routes = fs::read_to_string("/proc/thread-self/net/ipv6_route").unwrap();
        routes.lines().any(|line| line.starts_with(&route)).then_some(())
    });
}

/// Asks every millisecond, for at most ten seconds.
pub fn loop_until<T>(mut ask: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + Duration::from_secs(10) * slowness();
    loop {
        if let Some(answer) = ask() {
            return answer;
        }
        assert!(Instant::now() < deadline, "it does not come");
        thread::sleep(Duration::from_millis(1));
    }
}

/// The running kernel's version, for what is asked of it by no other means.
pub fn kernel() -> (u32, u32) {
    let release = Support::probe().kernel_release.expect("uname(2)");
    let mut numbers = release.split(['.', '-', '+']).map_while(|number| number.parse().ok());
    (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0))
}

/// Skips the trial unless `program` is in the search path. `package` is the Debian package that has it.
pub fn need_program(program: &str, package: &str) {
    let found =
        env::var_os("PATH").is_some_and(|path| env::split_paths(&path).any(|folder| folder.join(program).is_file()));
    if !found {
        skip(format!("the program `{program}` is missing; apt-get install {package}"));
    }
}

/// Runs a trial of the calling test file once more, under strace, and returns its calls of `call`,
/// one a line.
#[allow(dead_code)] // each test file uses its share
pub fn traced(trial: &str, call: &str) -> String {
    need_program("strace", "strace");
    let output = process::Command::new("strace")
        .args(["-f", "-e", &format!("trace={call}")])
        .arg(env::current_exe().expect("this program"))
        .args(["--exact", trial])
        .output()
        .expect("strace");
    let said = String::from_utf8_lossy(&output.stdout);
    let trace = String::from_utf8_lossy(&output.stderr).into_owned();
    if trace.contains("ptrace(PTRACE") {
        skip("strace may not trace here");
    }
    assert!(output.status.success() && said.contains("1 passed"), "{said}{trace}");
    trace
}

/// What a skipped trial unwinds with.
struct Skip(String);

fn run_one(trial: Trial) -> Result<Completion, Failed> {
    if is_set("TUN_DRIVER_ANNOUNCE") {
        eprintln!("running: {}", trial.name);
    }
    let (sender, receiver) = mpsc::channel();
    let work = trial.work;
    thread::Builder::new()
        .name(trial.name.clone())
        .spawn(move || {
            let outcome = panic::catch_unwind(AssertUnwindSafe(|| {
                Sandbox::enter().expect("a namespace for this trial");
                work();
            }));
            // The runner is gone only if the bound is over: nobody left to tell.
            let _ = sender.send(outcome);
        })
        .map_err(|error| Failed::from(format!("no thread for the trial: {error}")))?;
    // The repeats of a long run take up to an hour.
    let bound = trial.bound * slowness() * if is_set(LONG) { 60 } else { 1 };
    match receiver.recv_timeout(bound) {
        Ok(Ok(())) => Ok(Completion::Completed),
        Ok(Err(payload)) => match payload.downcast::<Skip>() {
            Ok(skip) if is_set("TUN_DRIVER_REQUIRE_ALL") => {
                Err(Failed::from(format!("skipped, but all are required: {}", skip.0)))
            }
            Ok(skip) => Ok(Completion::ignored_with(skip.0)),
            Err(payload) => Err(Failed::from(message(&*payload))),
        },
        Err(RecvTimeoutError::Timeout) => Err(Failed::from(format!(
            "`{}` hangs: it did not end within {:?}; its thread is left behind",
            trial.name, bound
        ))),
        Err(RecvTimeoutError::Disconnected) => Err(Failed::from("the trial's thread ended without an outcome")),
    }
}

/// The text of a panic; the place is on stderr, printed by the panic hook.
fn message(payload: &(dyn Any + Send)) -> String {
    if let Some(text) = payload.downcast_ref::<&str>() {
        (*text).to_owned()
    } else if let Some(text) = payload.downcast_ref::<String>() {
        text.clone()
    } else {
        "panicked with something that is not text".to_owned()
    }
}

fn is_set(variable: &str) -> bool {
    env::var_os(variable).is_some_and(|value| !value.is_empty() && value != "0")
}
