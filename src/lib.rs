//! Packet I/O engine for Linux gateways.

#![deny(missing_docs)]
#![deny(unsafe_code)]

mod sys;

mod error;

mod builder;
mod iface;
mod queue;
mod support;

mod buf;
mod worker;

#[cfg(feature = "netlink")]
pub mod netlink;

#[cfg(feature = "lab")]
pub mod lab;

pub use error::{OpenError, OpenErrorKind, PortError, PortErrorKind};
