//! Distributions of what a worker does, on request.

use std::time::Duration;

use hdrhistogram::Histogram;

/// Distributions over the batches that a worker handed to its handler. Two significant digits; about 60 KiB a worker.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Histograms {
    /// Packets per batch.
    pub batch_packets: Histogram<u64>,
    /// From the return of the wait to the call of the handler, in nanoseconds: what packets wait for those of other ports.
    pub wake_to_handler_ns: Histogram<u64>,
    /// Time in the handler per batch, in nanoseconds.
    pub handler_ns: Histogram<u64>,
}

/// Longer is recorded as this: ten seconds.
const LONGEST_NS: u64 = 10_000_000_000;
const MOST_PACKETS: u64 = 65_536;

impl Histograms {
    pub(super) fn new() -> Self {
        let histogram = |highest| {
            Histogram::new_with_bounds(1, highest, 2).unwrap_or_else(|_| unreachable!("the bounds are in order"))
        };
        Self {
            batch_packets: histogram(MOST_PACKETS),
            wake_to_handler_ns: histogram(LONGEST_NS),
            handler_ns: histogram(LONGEST_NS),
        }
    }

    #[inline]
    pub(super) fn record(&mut self, packets: usize, waited: Duration, handled: Duration) {
        self.batch_packets.saturating_record(packets as u64);
        self.wake_to_handler_ns.saturating_record(waited.as_nanos() as u64);
        self.handler_ns.saturating_record(handled.as_nanos() as u64);
    }

    /// Adds what another worker recorded.
    pub fn merge(&mut self, other: &Histograms) {
        for (mine, others) in [
            (&mut self.batch_packets, &other.batch_packets),
            (&mut self.wake_to_handler_ns, &other.wake_to_handler_ns),
            (&mut self.handler_ns, &other.handler_ns),
        ] {
            // All have the same bounds.
            let _ = mine.add(others);
        }
    }
}
