//! Who takes part in which case, and under which name.

use std::fs::File;
use std::io;
use std::time::Duration;

use tun_driver::lab::cases::{Runner, Way};
use tun_driver::lab::ways::ByWorker;
use tun_driver::lab::wire::{ByEngine, Carrier};
use tun_driver::{Backend, Offloads, Wait, WorkerConfig};

use crate::floor::Floor;
use crate::packets::{ByFloor, ByPacket, Waiting};
use crate::tun_rs_more::{ByOffload, ByTokio};
use crate::two_workers::ByTwoWorkers;

/// What the ratios refer to: the first way of every case.
pub(crate) const BASELINE: &str = "tun-rs sync";

/// The second measure.
pub(crate) const PLAIN: &str = "plain read/write";

/// The library as it is made by default.
pub(crate) const OURS: &str = "tun_driver io_uring";

/// The library with as many threads as the baseline has where packets go both ways.
pub(crate) const TWO_THREADS: &str = "tun_driver io_uring, Block, 2 threads";

/// The library with offloads on both devices: superpackets go on as they came. One worker, one per direction, one with system calls.
pub(crate) const PASSING: [&str; 3] = [
    "tun_driver io_uring, offload",
    "tun_driver io_uring, Block, 2 threads, offload",
    "tun_driver syscalls, offload",
];

/// The same, and each superpacket is cut into segments, which are merged again where they are sent.
pub(crate) const CUTTING: [&str; 3] = [
    "tun_driver io_uring, cut and merge",
    "tun_driver io_uring, Block, 2 threads, cut and merge",
    "tun_driver syscalls, cut and merge",
];

/// Whose way it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Whose {
    /// tun_driver's.
    Ours,
    /// Another library's, or a loop that needs none.
    Peer,
    /// The least that can be done with a ring: shown, and no peer.
    Floor,
}

/// What a report must know of a way.
#[derive(Clone, Debug)]
pub(crate) struct Entry {
    pub(crate) name: String,
    pub(crate) whose: Whose,
    /// 1: the same device flags, waiting by sleeping or (ours) as told. 2: what a library has to offer beyond that.
    pub(crate) tier: u8,
}

/// A way that takes part.
pub(crate) struct Taking<W: ?Sized> {
    pub(crate) entry: Entry,
    pub(crate) way: Box<W>,
}

/// Ways on one device.
pub(crate) type Ways = Vec<Taking<dyn Way>>;

/// Ways between two devices.
pub(crate) type Carriers = Vec<Taking<dyn Carrier>>;

/// How tun_driver spins where it does.
pub(crate) const SPIN: Wait = Wait::Spin {
    duration: Duration::from_micros(100),
};

/// For emptying a queue and for writing to a device that drops: nobody waits.
pub(crate) fn moving() -> Ways {
    let mut ways = Vec::new();
    take(
        &mut ways,
        Whose::Peer,
        1,
        ByPacket::<tun_rs::SyncDevice>::nonblocking(BASELINE),
    );
    take(&mut ways, Whose::Peer, 1, ByPacket::<File>::nonblocking(PLAIN));
    take(
        &mut ways,
        Whose::Peer,
        1,
        ByPacket::<File>::waiting("poll + drain", Waiting::Poll),
    );
    take(&mut ways, Whose::Peer, 1, ByTokio { offload: false });
    #[cfg(feature = "tun-tap")]
    take(
        &mut ways,
        Whose::Peer,
        1,
        ByPacket::<tun_tap::Iface>::nonblocking("tun-tap"),
    );
    floor(&mut ways, false);
    ours(&mut ways, OURS, Backend::IoUring, Wait::Block);
    ours(&mut ways, "tun_driver syscalls", Backend::Syscalls, Wait::Block);
    ways
}

/// For packets that come at a rate: each waits in its manner.
pub(crate) fn serving() -> Ways {
    let mut ways = waiting();
    floor(&mut ways, false);
    ours(&mut ways, OURS, Backend::IoUring, Wait::default());
    ours(&mut ways, "tun_driver io_uring, Block", Backend::IoUring, Wait::Block);
    ours(&mut ways, "tun_driver syscalls", Backend::Syscalls, Wait::default());
    ours(&mut ways, "tun_driver syscalls, Block", Backend::Syscalls, Wait::Block);
    ways
}

/// For one packet at a time.
pub(crate) fn echoing() -> Ways {
    let mut ways = waiting();
    // No library documents it, but whoever has a non-blocking device can do it, and it is what spinning has to be held against.
    take(
        &mut ways,
        Whose::Peer,
        2,
        ByPacket::<tun_rs::SyncDevice>::waiting("tun-rs sync, busy", Waiting::Busy),
    );
    floor(&mut ways, false);
    floor(&mut ways, true);
    ours(&mut ways, "tun_driver io_uring, Block", Backend::IoUring, Wait::Block);
    ours(&mut ways, "tun_driver io_uring, Spin", Backend::IoUring, SPIN);
    ours(&mut ways, "tun_driver syscalls, Block", Backend::Syscalls, Wait::Block);
    ours(&mut ways, "tun_driver syscalls, Spin", Backend::Syscalls, SPIN);
    ways
}

/// For a wire; `tcp`: those too that put TCP segments together.
pub(crate) fn carrying(tcp: bool) -> Carriers {
    let blocking = Waiting::Blocking;
    let mut ways: Carriers = Vec::new();
    let mut take = |whose, tier, way: Box<dyn Carrier>| ways.push(taking(whose, tier, way.name().to_owned(), way));
    take(
        Whose::Peer,
        1,
        Box::new(ByPacket::<tun_rs::SyncDevice>::waiting(BASELINE, blocking)),
    );
    take(Whose::Peer, 1, Box::new(ByPacket::<File>::waiting(PLAIN, blocking)));
    take(
        Whose::Peer,
        1,
        Box::new(ByPacket::<File>::waiting("poll + drain", Waiting::Poll)),
    );
    take(Whose::Peer, 1, Box::new(ByTokio { offload: false }));
    #[cfg(feature = "tun-tap")]
    take(
        Whose::Peer,
        1,
        Box::new(ByPacket::<tun_tap::Iface>::waiting("tun-tap", blocking)),
    );
    if tcp {
        take(Whose::Peer, 2, Box::new(ByOffload));
        take(Whose::Peer, 2, Box::new(ByTokio { offload: true }));
    }
    take(Whose::Floor, 1, Box::new(ByFloor));
    for (name, backend, wait) in [
        (OURS, Backend::IoUring, Wait::default()),
        ("tun_driver io_uring, Block", Backend::IoUring, Wait::Block),
        ("tun_driver syscalls", Backend::Syscalls, Wait::default()),
        ("tun_driver syscalls, Block", Backend::Syscalls, Wait::Block),
    ] {
        let config = WorkerConfig {
            backend: Some(backend),
            wait,
            ..WorkerConfig::default()
        };
        let engine = ByEngine {
            name: name.to_owned(),
            config,
            offloads: Offloads::none(),
            cut: false,
        };
        take(Whose::Ours, 1, Box::new(engine));
    }
    for (name, wait) in [
        ("tun_driver io_uring, 2 threads", Wait::default()),
        (TWO_THREADS, Wait::Block),
    ] {
        let backend = Backend::IoUring;
        let workers = ByTwoWorkers {
            name,
            backend,
            wait,
            offloads: Offloads::none(),
            cut: false,
        };
        take(Whose::Ours, 1, Box::new(workers));
    }
    if tcp {
        for [one, two, calls] in [PASSING, CUTTING] {
            let (offloads, cut) = (Offloads::all(), one == CUTTING[0]);
            let engine = |name: &str, backend| ByEngine {
                name: name.to_owned(),
                config: WorkerConfig {
                    backend: Some(backend),
                    ..WorkerConfig::default()
                },
                offloads,
                cut,
            };
            let workers = ByTwoWorkers {
                name: two,
                backend: Backend::IoUring,
                wait: Wait::Block,
                offloads,
                cut,
            };
            take(Whose::Ours, 2, Box::new(engine(one, Backend::IoUring)));
            take(Whose::Ours, 2, Box::new(workers));
            take(Whose::Ours, 2, Box::new(engine(calls, Backend::Syscalls)));
        }
    }
    ways
}

/// What is missing in a case, and why.
pub(crate) fn not_offered(case: &str) -> Vec<(&'static str, &'static str)> {
    let mut told = Vec::new();
    if !cfg!(feature = "tun-tap") {
        told.push((
            "tun-tap",
            "this program was built without it (--no-default-features); it needs a C compiler",
        ));
    }
    told.push((
        "tun-tap, asynchronous",
        "not offered: its `Async` is for tokio-core 0.1, which was given up in 2018",
    ));
    if case != "wire-tcp" {
        told.push((
            "tun-rs and tun_driver, offload",
            "not measured: what is carried here are single packets, of which nothing is put together",
        ));
    }
    told
}

/// The peers' ways of waiting.
fn waiting() -> Ways {
    let mut ways = Vec::new();
    let blocking = Waiting::Blocking;
    take(
        &mut ways,
        Whose::Peer,
        1,
        ByPacket::<tun_rs::SyncDevice>::waiting(BASELINE, blocking),
    );
    take(&mut ways, Whose::Peer, 1, ByPacket::<File>::waiting(PLAIN, blocking));
    take(
        &mut ways,
        Whose::Peer,
        1,
        ByPacket::<File>::waiting("poll + drain", Waiting::Poll),
    );
    take(&mut ways, Whose::Peer, 1, ByTokio { offload: false });
    #[cfg(feature = "tun-tap")]
    take(
        &mut ways,
        Whose::Peer,
        1,
        ByPacket::<tun_tap::Iface>::waiting("tun-tap", blocking),
    );
    ways
}

fn taking<W: ?Sized>(whose: Whose, tier: u8, name: String, way: Box<W>) -> Taking<W> {
    Taking {
        entry: Entry { name, whose, tier },
        way,
    }
}

fn take(ways: &mut Ways, whose: Whose, tier: u8, way: impl Way + 'static) {
    ways.push(taking(whose, tier, way.name().to_owned(), Box::new(way)));
}

fn floor(ways: &mut Ways, spin: bool) {
    let (name, tier) = if spin {
        ("floor (raw ring), busy", 2)
    } else {
        ("floor (raw ring)", 1)
    };
    let floor = Floor {
        name,
        spin,
        ..Floor::default()
    };
    take(ways, Whose::Floor, tier, floor);
}

fn ours(ways: &mut Ways, name: &'static str, backend: Backend, wait: Wait) {
    let inner = ByWorker::new(backend, wait);
    take(ways, Whose::Ours, 1, Renamed { name, inner });
}

struct Renamed {
    name: &'static str,
    inner: ByWorker,
}

impl Way for Renamed {
    fn name(&self) -> &str {
        self.name
    }

    fn open(&self, devices: &[&str]) -> io::Result<Box<dyn Runner>> {
        self.inner.open(devices)
    }
}
