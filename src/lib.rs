#![doc = include_str!("../README.md")]
#![deny(missing_docs)]
#![deny(unsafe_code)]

mod sync;
mod sys;

mod error;

mod attach;
mod builder;
mod device;
mod iface;
mod queue;
mod support;

pub mod offload;

mod buf;
mod stats;
mod worker;

#[cfg(feature = "engine")]
mod engine;

#[cfg(feature = "netlink")]
pub mod netlink;

#[cfg(feature = "lab")]
pub mod lab;

pub use buf::{Batch, Drain, LocalAddr, NoRoom, PacketBuf, RemoteBuf, leaked_arenas};
pub use error::{OpenError, OpenErrorKind, PortError, PortErrorKind};
pub use stats::{Counters, ErrnoCounts, PortStats, StatsReader, WorkerCounters, WorkerStats};
pub use worker::{
    Backend, BackendReport, Detached, Endpoint, Handoff, HandoffCounters, HandoffEnd, MemoryBudget, PortId, PortInfo,
    Sent, SinglePort, Superpackets, Wait, Wake, Waker, Worker, WorkerConfig,
};

#[cfg(feature = "metrics")]
pub use engine::Histograms;
#[cfg(feature = "engine")]
pub use engine::{
    ControlError, Ended, Engine, EngineBuilder, Event, Events, FactoryError, Handler, OnPanic, Pin, Placement,
    Released, Seat, SeatPort, Stats, StopReport, Stopper, WorkerEnd, WorkerInfo, WorkerReport,
};

pub use builder::Builder;
pub use device::Device;
pub use iface::{Iface, Mode};
pub use offload::Offloads;
pub use queue::{Granted, MultiQueue, Queue};
pub use support::{IoUringSupport, Support, TunNode};
