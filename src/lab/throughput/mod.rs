//! Throughput runs: a generator, links, an engine, a receiver, and books that balance.

pub mod search;
