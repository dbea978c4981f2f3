//! Throw-away network namespaces, virtual links, sinks and test traffic, for tests, benchmarks and the tool.
//!
//! Nothing here touches the host: a [`Sandbox`] moves the caller into a network namespace of its own, and everything made in it vanishes
//! with its last thread and descriptor.
//!
//! **No stability promise.** This module serves this crate's own tests, benchmarks and tool, and may change in any release.
//!
//! ```no_run
//! use tun_driver::lab::{Namespace, Sandbox};
//!
//! # fn main() -> std::io::Result<()> {
//! let _sandbox = Sandbox::enter()?; // first thing in main, before any thread
//! let other = Namespace::new()?;
//! let socket = other.run(|| std::net::UdpSocket::bind("127.0.0.1:0"))??;
//! # drop(socket);
//! # Ok(())
//! # }
//! ```

pub mod acts;
pub mod cases;
pub mod generator;
pub mod measure;
pub mod offered;
pub mod offload_cases;
pub mod packet;
pub mod process;
pub mod receiver;
pub mod results;
pub mod scaling;
pub mod throughput;
pub mod ways;
#[cfg(feature = "cli")]
pub mod wire;

mod sandbox;
mod sink;
mod tracker;
mod traffic;

pub use sandbox::{Namespace, Sandbox, sysctl};
pub use sink::Sink;
pub use tracker::{Summary, Tracker};
pub use traffic::{Catcher, Filled, Filler};

use crate::sys;

/// Nanoseconds of CLOCK_MONOTONIC, the clock of [`packet::Stamp::sent`]; comparable between processes.
pub fn monotonic_ns() -> u64 {
    sys::lab::monotonic_ns()
}
