//! Starting workers and engines where something is missing: CPU masks, memory, privilege, and each
//! system call of the start in turn.

mod common;
mod device;
mod offer;

use std::collections::BTreeMap;
use std::fs;
use std::io::{Read, Write};
use std::net::{IpAddr, UdpSocket};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use common::{need_backend, need_locked_memory, need_program, need_tun, repeats, skip, trial};
use offer::{HERE, THERE, both, quiet};
use tun_driver::lab::{Filler, process, sysctl};
use tun_driver::netlink::Handle;
use tun_driver::{
    Backend, Batch, Builder, Engine, Handler, Mode, MultiQueue, Offloads, OpenErrorKind, Pin, Placement, PortId,
    Worker, WorkerConfig,
};

fn main() {
    // What the fault trials run in a process that may fail.
    match std::env::var(CHILD).as_deref() {
        Ok("start") => return child(),
        Ok("panic") => return panicking_child(),
        _ => {}
    }
    let mut trials = Vec::new();
    for check in [
        (
            "a default engine serves 22 and 256 queues on one worker",
            many_queues as fn(Backend),
        ),
        (
            "a default engine serves 22 and 256 queues with offloads on one worker",
            many_offloads,
        ),
    ] {
        trials.extend(both(check.0, check.1).map(|trial| trial.bound(Duration::from_secs(120))));
    }
    trials.extend(both("256 ports fit a default worker, and each receives", many_ports));
    let single: [(&str, fn()); 5] = [
        ("more possible CPUs than cpu_set_t holds do not matter", wide_mask),
        (
            "an engine starts unpinned where the CPU mask cannot be asked, and says so",
            no_mask,
        ),
        (
            "a core that the kernel refuses is reported, and the worker runs",
            refused_core,
        ),
        ("a core outside the cpuset is a typed error", outside_cpuset),
        (
            "a panic that aborts a process leaves the other queues of the device working",
            abort,
        ),
    ];
    for (name, work) in single {
        trials.push(trial(name, move || {
            need_tun();
            work();
        }));
    }
    trials.push(
        trial(
            "a user without rights gets fewer or unregistered buffers, and the reason",
            no_memlock,
        )
        .alone(),
    );
    for (call, errnos, most) in CALLS {
        let name = format!("a start in which {call} fails once works or says why");
        trials.push(trial(name, move || call_fails(call, errnos, *most)).bound(Duration::from_secs(240)));
    }
    common::run(trials);
}

struct Counting;

impl Handler for Counting {
    fn packets(&mut self, _: &mut Worker, _: PortId, batch: &mut Batch) {
        batch.clear();
    }
}

fn eventually(what: &str, mut done: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(20) * common::slowness();
    while !done() {
        assert!(Instant::now() < end, "never: {what}");
        thread::sleep(Duration::from_millis(1));
    }
}

fn device(queues: usize, offloads: Offloads) -> MultiQueue {
    quiet();
    Builder::new("s0", Mode::Tun)
        .queues(queues)
        .offloads(offloads)
        .address(HERE.parse::<IpAddr>().unwrap(), 24)
        .up(true)
        .open()
        .unwrap()
}

fn received(engine: &Engine<Counting>) -> u64 {
    engine.stats().total().received_packets
}

/// Offers packets of many flows, a few at a time, and expects them all.
fn all_come(engine: &Engine<Counting>, index: u32, flows: usize) {
    let mut filler = Filler::new(index, THERE.parse().unwrap(), flows).unwrap();
    let before = received(engine);
    for part in 1..=(4 * flows as u64).div_ceil(50) {
        filler.fill(50, 100).unwrap();
        eventually("the packets come", || received(engine) >= before + 50 * part);
    }
}

// ---- budgets ----

fn many_queues(backend: Backend) {
    serves(backend, Offloads::none());
}

fn many_offloads(backend: Backend) {
    if backend == Backend::IoUring {
        need_locked_memory(WorkerConfig::default().memory().total_with_large_buffers() as u64);
    }
    serves(backend, Offloads::TSO4 | Offloads::TSO6);
}

fn serves(backend: Backend, offloads: Offloads) {
    for queues in [22, 256] {
        let device = device(queues, offloads);
        let index = device.index().unwrap();
        let engine = Engine::builder()
            .device(device)
            .workers(1)
            .config(WorkerConfig {
                backend: Some(backend),
                ..WorkerConfig::default()
            })
            .start(|_| Ok(Counting))
            .unwrap();
        all_come(&engine, index, 2 * queues);
        let stats = engine.stats();
        assert_eq!(stats.workers[0].ports.len(), queues);
        let used = stats.workers[0]
            .ports
            .iter()
            .filter(|port| port.counters.received_packets > 0)
            .count();
        assert!(used > queues / 4, "{used} of {queues} queues");
        assert!(engine.stop_within(Duration::from_secs(20)).is_clean());
    }
}

fn many_ports(backend: Backend) {
    let config = WorkerConfig {
        backend: Some(backend),
        ..WorkerConfig::default()
    };
    let mut worker = Worker::new(&config).unwrap();
    let ports: Vec<PortId> = (0..256)
        .map(|_| worker.attach(UdpSocket::bind("127.0.0.1:0").unwrap()).unwrap())
        .collect();
    // Half of the buffers held elsewhere starve nobody.
    let held: Vec<_> = std::iter::from_fn(|| worker.packet(1)).collect();
    assert!(held.len() >= 500, "{}", held.len());
    let sender = UdpSocket::bind("127.0.0.1:0").unwrap();
    let mut batch = Batch::with_capacity(4);
    for &port in &ports {
        sender
            .send_to(b"you", worker.udp(port).unwrap().local_addr().unwrap())
            .unwrap();
        assert_eq!(worker.try_recv_many(port, &mut batch), Ok(1));
        batch.clear();
    }
    // What was shrunk is given back with the ports.
    for port in ports {
        worker.detach(port).unwrap();
    }
    drop(held);
    assert_eq!(worker.buffers(), (1024, 1024));
    let all: Vec<_> = std::iter::from_fn(|| worker.packet(1)).collect();
    assert_eq!(all.len(), 1024);
}

// ---- CPU masks ----

/// Answers a system call of this thread and of those it starts with `errno`: always, or where
/// argument `below.0` is less than `below.1`.
fn refuse(call: i64, errno: i32, below: Option<(u32, u32)>) {
    let step = |code: u32, jt, jf, k| libc::sock_filter {
        code: code as u16,
        jt,
        jf,
        k,
    };
    let load = libc::BPF_LD | libc::BPF_W | libc::BPF_ABS;
    let (argument, limit) = below.unwrap_or((0, 0));
    let always = u8::from(below.is_none());
    let mut filter = [
        step(load, 0, 0, 0), // the system call's number
        step(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, 0, 4, call as u32),
        step(libc::BPF_JMP | libc::BPF_JA, 0, 0, 2 * u32::from(always)),
        step(load, 0, 0, 16 + 8 * argument), // its low half, on a little-endian machine
        step(libc::BPF_JMP | libc::BPF_JGE | libc::BPF_K, 1, 0, limit),
        step(
            libc::BPF_RET | libc::BPF_K,
            0,
            0,
            libc::SECCOMP_RET_ERRNO | errno as u32,
        ),
        step(libc::BPF_RET | libc::BPF_K, 0, 0, libc::SECCOMP_RET_ALLOW),
    ];
    let program = libc::sock_fprog {
        len: filter.len() as u16,
        filter: filter.as_mut_ptr(),
    };
    // SAFETY: prctl reads the program, which lives through the call. Both settings are of this
    // thread and end with it.
    unsafe {
        assert_eq!(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), 0);
        let mode = libc::SECCOMP_MODE_FILTER;
        assert_eq!(libc::prctl(libc::PR_SET_SECCOMP, mode, &raw const program), 0);
    }
}

/// The pins of a default engine with two workers, which serves.
fn pins(placement: Placement) -> Vec<Pin> {
    let device = device(2, Offloads::none());
    let index = device.index().unwrap();
    let engine = Engine::builder()
        .device(device)
        .workers(2)
        .placement(placement)
        .start(|_| Ok(Counting))
        .unwrap();
    all_come(&engine, index, 8);
    let pins = engine.workers().iter().map(|worker| worker.pin.clone()).collect();
    assert!(engine.stop_within(Duration::from_secs(20)).is_clean());
    pins
}

fn wide_mask() {
    let cores = process::allowed_cpus().unwrap();
    // As a kernel that is made for 8,192 CPUs and boots with as many possible ones.
    refuse(libc::SYS_sched_getaffinity, libc::EINVAL, Some((1, 1024)));
    assert_eq!(process::allowed_cpus().unwrap(), cores);
    for (worker, pin) in pins(Placement::default()).into_iter().enumerate() {
        assert_eq!(pin, Pin::Core(cores[worker % cores.len()]));
    }
}

fn no_mask() {
    for errno in [libc::EINVAL, libc::EPERM] {
        let pins = thread::spawn(move || {
            refuse(libc::SYS_sched_getaffinity, errno, None);
            // Without a number of workers as well.
            let engine = Engine::builder().start(|_| Ok(Counting)).unwrap();
            assert_eq!(engine.workers().len(), 1);
            drop(engine);
            pins(Placement::default())
        });
        // The thread's namespace is that of this trial.
        for pin in pins.join().unwrap() {
            assert!(
                matches!(&pin, Pin::Unknown { why } if why.contains("sched_getaffinity")),
                "{pin}"
            );
            assert!(pin.to_string().starts_with("on any core"), "{pin}");
        }
    }
}

fn refused_core() {
    refuse(libc::SYS_sched_setaffinity, libc::EPERM, None);
    for pin in pins(Placement::default()) {
        let told = pin.to_string();
        assert!(
            matches!(pin, Pin::Failed { .. }) && told.contains("sched_setaffinity"),
            "{told}"
        );
    }
}

// T34
fn outside_cpuset() {
    let cores = process::allowed_cpus().unwrap();
    let confined = thread::spawn(move || {
        process::pin_thread(cores[0]).unwrap();
        let mut outside = vec![1023, 1024, 5000, 1 << 20, usize::MAX];
        outside.extend(cores.get(1));
        for core in outside {
            let placement = Placement::Cores(vec![core]);
            let error = Engine::builder()
                .placement(placement)
                .start(|_| Ok(Counting))
                .unwrap_err();
            assert_eq!(error.kind(), OpenErrorKind::InvalidSetting);
            assert!(error.to_string().contains(&core.to_string()), "{error}");
        }
    });
    confined.join().unwrap();
}

// ---- privilege and memory ----

// T26
fn no_memlock() {
    need_backend(Backend::IoUring);
    let opened = device(2, Offloads::none());
    let index = opened.index().unwrap();
    let limit = libc::rlimit {
        rlim_cur: 64 << 10,
        rlim_max: 64 << 10,
    };
    let mut before = limit;
    // SAFETY: prlimit reads one rlimit and writes another, which live through the call.
    let result = unsafe { libc::prlimit(0, libc::RLIMIT_MEMLOCK, std::ptr::null(), &raw mut before) };
    assert_eq!(result, 0);
    let lowered = libc::rlimit {
        rlim_cur: limit.rlim_cur,
        ..before
    };
    // SAFETY: as above.
    let result = unsafe { libc::prlimit(0, libc::RLIMIT_MEMLOCK, &raw const lowered, std::ptr::null_mut()) };
    assert_eq!(result, 0);
    let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        device::unprivileged(device::NOBODY, device::Node::Mode(0o666), move || {
            let names_the_limit = |text: &str| text.to_lowercase().contains("memlock");
            let config = WorkerConfig {
                backend: Some(Backend::IoUring),
                ..WorkerConfig::default()
            };
            // Newer kernels count the ring itself against the limit too.
            match Engine::builder().workers(2).config(config).start(|_| Ok(Counting)) {
                Ok(engine) => {
                    for worker in engine.workers() {
                        let report = &worker.backend;
                        assert!(!report.registered_buffers || report.buffers < 64, "{report:?}");
                        assert!(names_the_limit(&report.why), "{}", report.why);
                    }
                }
                Err(error) => {
                    assert_eq!(error.kind(), OpenErrorKind::MemoryLimit, "{error}");
                    assert!(names_the_limit(&error.to_string()), "{error}");
                }
            }
            let engine = Engine::builder()
                .device(opened)
                .workers(2)
                .start(|_| Ok(Counting))
                .unwrap();
            for worker in engine.workers() {
                assert!(names_the_limit(&worker.backend.why), "{}", worker.backend.why);
            }
            engine
        })
    }));
    // SAFETY: as above.
    unsafe { libc::prlimit(0, libc::RLIMIT_MEMLOCK, &raw const before, std::ptr::null_mut()) };
    let engine = outcome.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
    all_come(&engine, index, 8);
    assert!(engine.stop_within(Duration::from_secs(20)).is_clean());
}

// ---- each system call of a start ----

/// In the environment of a process that this file starts from itself: what it is to do.
const CHILD: &str = "TUN_DRIVER_STARTUP_CHILD";
/// The backend that it forces; empty for none.
const FORCED: &str = "TUN_DRIVER_STARTUP_BACKEND";

/// System calls of a start, errors of their man pages, and how many calls are failed in CI at most.
type Call = (&'static str, &'static [&'static str], usize);
const CALLS: &[Call] = &[
    (
        "openat",
        &["EMFILE", "EACCES", "ENOENT", "ENFILE", "ENOMEM", "EINTR"],
        12,
    ),
    ("ioctl", &["EPERM", "EBUSY", "ENOMEM", "EINVAL", "ENOTTY", "EINTR"], 40),
    ("mmap", &["ENOMEM", "EAGAIN", "EPERM"], 40),
    ("io_uring_setup", &["ENOMEM", "EPERM", "ENOSYS", "EMFILE", "EINVAL"], 8),
    (
        "io_uring_register",
        &["ENOMEM", "EPERM", "EINVAL", "EMFILE", "EBUSY", "EINTR"],
        16,
    ),
    ("eventfd2", &["EMFILE", "ENFILE", "ENOMEM", "ENODEV"], 8),
    ("sched_setaffinity", &["EPERM", "EINVAL", "ESRCH"], 8),
    ("sched_getaffinity", &["EPERM", "EINVAL"], 8),
    ("clone3", &["EAGAIN", "ENOMEM", "EPERM"], 8),
    ("socket", &["EMFILE", "ENOBUFS", "EPERM", "EAFNOSUPPORT"], 8),
    ("bind", &["EPERM", "ENOMEM"], 4),
    ("setsockopt", &["EPERM", "ENOMEM"], 8),
    ("getsockopt", &["EPERM", "ENOBUFS"], 8),
    ("fcntl", &["EPERM", "ENOMEM"], 12),
];

/// Starts an engine on a device, moves packets, and stops; prints what came of it. Whatever fails
/// is reported by an error, and leaves nothing.
fn child() {
    let backend = match std::env::var(FORCED).as_deref() {
        Ok("ring") => Some(Backend::IoUring),
        Ok("syscalls") => Some(Backend::Syscalls),
        _ => None,
    };
    // What is in use before does not count, and what the allocator and the thread library take at
    // first use.
    thread::spawn(|| vec![1_u8; 1 << 20].len()).join().unwrap();
    let before = process::open_descriptors().unwrap();
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    let outside = UdpSocket::bind("0.0.0.0:0").unwrap();
    // SAFETY: takes nothing. It marks where the start begins in the tracer's log.
    unsafe { libc::getppid() };
    let outcome = start_once(backend, socket, &outside);
    drop(outside);
    // SAFETY: as above; where it is over.
    unsafe { libc::getppid() };
    println!("{}", outcome.unwrap_or_else(|error| format!("error: {error}")));
    std::io::stdout().flush().unwrap();
    let end = Instant::now() + Duration::from_secs(5) * common::slowness();
    while process::open_descriptors().unwrap() > before || process::threads().unwrap().len() > 1 {
        assert!(Instant::now() < end, "left behind: {:?}", process::threads());
        thread::sleep(Duration::from_millis(1));
    }
    let links = fs::read_to_string("/proc/thread-self/net/dev").unwrap();
    assert!(!links.contains("s0:"), "the device is left behind");
    println!("nothing left");
}

fn start_once(
    backend: Option<Backend>,
    socket: UdpSocket,
    outside: &UdpSocket,
) -> Result<String, Box<dyn std::error::Error>> {
    let device = Builder::new("s0", Mode::Tun)
        .queues(2)
        .address(HERE.parse::<IpAddr>()?, 24)
        .up(true)
        .open()?;
    let config = WorkerConfig {
        backend,
        ..WorkerConfig::default()
    };
    let target = socket.local_addr()?;
    let engine = Engine::builder()
        .device(device)
        .sockets([socket])
        .workers(2)
        .config(config)
        .start(|_| Ok(Counting))?;
    outside.send_to(b"in", target)?;
    outside.send_to(b"through the device", (THERE, 9))?;
    let end = Instant::now() + Duration::from_secs(10) * common::slowness();
    while received(&engine) < 2 {
        assert!(Instant::now() < end, "the packets do not come: {:?}", engine.stats());
        thread::sleep(Duration::from_millis(1));
    }
    let backends: Vec<Backend> = engine.workers().iter().map(|worker| worker.backend.backend).collect();
    let report = engine.stop_within(Duration::from_secs(10));
    assert!(report.is_clean(), "{report}");
    Ok(format!("works: {backends:?}"))
}

/// A child of this file, under a tracer or not.
fn this_file(mut command: Command, what: &str, backend: &str) -> Child {
    command
        .env(CHILD, what)
        .env(FORCED, backend)
        .env("RUST_BACKTRACE", "0")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        // So that a child that hangs can be ended with its tracer.
        .process_group(0)
        .spawn()
        .unwrap()
}

/// Waits for a child of its own process group; ends it if it hangs. Returns how it ended, and what
/// it said.
fn ended(mut child: Child) -> (Option<ExitStatus>, String, String) {
    let end = Instant::now() + Duration::from_secs(40) * common::slowness();
    let mut status = child.try_wait().unwrap();
    while status.is_none() && Instant::now() < end {
        thread::sleep(Duration::from_millis(2));
        status = child.try_wait().unwrap();
    }
    if status.is_none() {
        // SAFETY: no pointers; the group is that of this child, which was not waited for.
        unsafe { libc::kill(-(child.id() as i32), libc::SIGKILL) };
        let _ = child.wait();
    }
    let (mut out, mut err) = (String::new(), String::new());
    child.stdout.take().unwrap().read_to_string(&mut out).unwrap();
    child.stderr.take().unwrap().read_to_string(&mut err).unwrap();
    (status, out, err)
}

// T30
fn call_fails(call: &str, errnos: &[&str], most: usize) {
    need_tun();
    need_program("strace", "strace");
    quiet();
    let _ = sysctl("net/ipv6/conf/all/disable_ipv6", 1);
    static LOG: AtomicU32 = AtomicU32::new(0);
    let log = std::env::temp_dir().join(format!(
        "startup-{}-{}",
        std::process::id(),
        LOG.fetch_add(1, Ordering::Relaxed)
    ));
    let backends: &[&str] = if repeats(0, 1) > 0 {
        &["", "ring", "syscalls"]
    } else {
        &[""]
    };
    let errnos = &errnos[..repeats(2, errnos.len()).min(errnos.len())];
    let mut outcomes: BTreeMap<String, u32> = BTreeMap::new();
    for &backend in backends {
        for errno in errnos {
            let (mut hits, mut misses) = (0, 0);
            for k in 1..2000 {
                let mut strace = Command::new("strace");
                strace
                    .args(["-f", "-o"])
                    .arg(&log)
                    .args(["-e", &format!("trace={call},getppid")])
                    .args(["-e", &format!("inject={call}:error={errno}:when={k}")])
                    .arg(std::env::current_exe().unwrap());
                let what = format!("{call} {errno} {k} {backend}");
                let (status, out, err) = ended(this_file(strace, "start", backend));
                if err.contains("ptrace(PTRACE") || err.contains("invalid system call") {
                    skip(format!("strace may not trace here: {err}"));
                }
                let trace = fs::read_to_string(&log).unwrap_or_default();
                let begun = trace.find("getppid(");
                let over = trace.rfind("getppid(").filter(|over| Some(*over) != begun);
                let injected = trace.rfind("(INJECTED)");
                // In the loader of programs or in the standard library, before the start.
                if begun.is_none() || injected.is_some_and(|at| begun.is_some_and(|begun| at < begun)) {
                    continue;
                }
                let injected = injected.filter(|at| over.is_none_or(|over| *at < over));
                if injected.is_none() {
                    misses += 1;
                    assert!(
                        trace.contains("(INJECTED)") || status.is_some_and(|status| status.success()),
                        "{what}: {status:?} {out}{err}"
                    );
                    break;
                }
                hits += 1;
                let status = status.unwrap_or_else(|| panic!("{what}: hangs: {out}{err}"));
                // The allocator has no memory: nothing in Rust survives that.
                if call == "mmap" && status.signal() == Some(libc::SIGABRT) && err.contains("memory allocation of") {
                    *outcomes.entry("the allocator's own".to_owned()).or_default() += 1;
                    continue;
                }
                assert!(status.success(), "{what}: {status}: {out}{err}");
                assert!(out.ends_with("nothing left\n"), "{what}: {out}{err}");
                assert!(!err.contains("panicked"), "{what}: {out}{err}");
                let line = out.lines().next().unwrap_or_default().to_owned();
                *outcomes.entry(line).or_default() += 1;
                if hits >= repeats(most, usize::MAX) {
                    break;
                }
            }
            assert!(hits > 0 || misses > 0, "{call} {errno}: never begun");
        }
    }
    let _ = fs::remove_file(&log);
    for (outcome, count) in &outcomes {
        println!("{call}: {count} x {outcome}");
        if let Some(error) = outcome.strip_prefix("error: ") {
            // It names a call or a step, and more than its errno.
            assert!(error.contains(": "), "{call}: {error}");
            // Those that a library function makes among others: it names the one that failed.
            if matches!(call, "socket" | "bind" | "setsockopt" | "getsockopt" | "fcntl") {
                assert!(error.starts_with(call), "{call}: {error}");
            }
        }
    }
}

// ---- panic = "abort" ----

/// Serves a queue of the parent's device; its handler panics at the first packet, which ends the
/// process as with `panic = "abort"`.
fn panicking_child() {
    std::panic::set_hook(Box::new(|_| std::process::abort()));
    let device = Builder::new("s0", Mode::Tun)
        .multi_queue(true)
        .attach_existing(true)
        .open()
        .unwrap();
    let engine = Engine::builder()
        .device(device)
        .start_fn(|_: &mut Worker, _: PortId, _: &mut Batch| panic!("the handler's fault"))
        .unwrap();
    println!("ready");
    std::io::stdout().flush().unwrap();
    thread::sleep(Duration::from_secs(30));
    drop(engine);
}

// T23
fn abort() {
    for _ in 0..repeats(3, 100) {
        let device = device(2, Offloads::none());
        let index = device.index().unwrap();
        let engine = Engine::builder()
            .device(device)
            .workers(2)
            .start(|_| Ok(Counting))
            .unwrap();
        let mut child = this_file(Command::new(std::env::current_exe().unwrap()), "panic", "");
        let mut ready = [0; 6];
        child.stdout.as_mut().unwrap().read_exact(&mut ready).unwrap();
        // Flows until one goes to the child's queue.
        let mut filler = Filler::new(index, THERE.parse().unwrap(), 64).unwrap();
        eventually("the child dies", || {
            filler.fill(64, 100).unwrap();
            child.try_wait().unwrap().is_some()
        });
        let (status, _, _) = ended(child);
        assert_eq!(status.unwrap().signal(), Some(libc::SIGABRT));
        // Its queue went with it: every flow comes to us.
        // A ring's files are closed a little after its process is gone.
        let netlink = Handle::new().unwrap();
        eventually("the child's queue goes", || {
            netlink.link(index).unwrap().tun.is_some_and(|tun| tun.queues == 2)
        });
        eventually("what was offered until then is over", || {
            let before = received(&engine);
            thread::sleep(Duration::from_millis(100));
            received(&engine) == before
        });
        all_come(&engine, index, 64);
        assert!(engine.stop_within(Duration::from_secs(20)).is_clean());
    }
}
