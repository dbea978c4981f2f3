//! How many packets to ask for at once.
//!
//! Asking a queue that is empty costs about half of what a packet costs, and an entry into the kernel costs more than that. So the length
//! of the next burst follows the length of the last runs: a run is what is received from one moment at which the queue was empty to the next.

/// The predictor of one port.
#[derive(Debug, Default)]
pub(super) struct Burst {
    /// Packets received since the queue was last seen empty.
    run: u32,
    /// What a run is expected to bring, from those before.
    expected: u32,
    /// The next question beyond what is expected: doubled each time that it was answered in full.
    probe: u32,
    /// Probes in a row that found nothing.
    fruitless: u32,
    /// Occasions to probe that are still to be let pass.
    passes: u32,
}

/// A burst is never longer: beyond that the entry is paid for, and the packets get cold.
pub(super) const LONGEST: u32 = 64;

/// The same of superpackets, which get cold sooner: a quarter of a mebibyte.
pub(super) const SUPERPACKETS: u32 = 4;

impl Burst {
    /// How many packets to ask for next. `may_pass`: a packet is in hand already, so that not asking is allowed (answer 0).
    #[inline]
    pub(super) fn next(&mut self, may_pass: bool) -> u32 {
        if self.run < self.expected {
            // One more, so that this question finds the end.
            return (self.expected - self.run + 1).min(LONGEST);
        }
        if may_pass && self.passes > 0 {
            self.passes -= 1;
            self.run = 0;
            return 0;
        }
        self.probe.max(1)
    }

    /// How many packets to ask for after a pause: what is expected and a little more, so that one question finds the end.
    #[inline]
    pub(super) fn gathered(&self) -> u32 {
        (self.expected + self.expected / 8 + 1).min(LONGEST)
    }

    /// Whether packets mostly come several at a time.
    #[inline]
    pub(super) fn expects_several(&self) -> bool {
        self.expected >= 2
    }

    /// What is left of a run that has begun and is expected to go on; 0 between runs.
    #[inline]
    pub(super) fn rest_of_run(&self) -> u32 {
        if self.run == 0 {
            0
        } else {
            self.expected.saturating_sub(self.run).min(LONGEST)
        }
    }

    /// A packet came by the armed read.
    #[inline]
    pub(super) fn woke(&mut self) {
        self.run += 1;
    }

    /// `asked` were asked for and `got` came.
    #[inline]
    pub(super) fn answered(&mut self, asked: u32, got: u32) {
        self.run += got;
        if got < asked {
            self.ran_dry(got);
        } else if self.run >= self.expected {
            self.probe = (self.probe.max(1) * 2).min(LONGEST);
            self.fruitless = 0;
        }
    }

    /// The queue is empty: the run is over.
    fn ran_dry(&mut self, got: u32) {
        if got == 0 && self.run <= 1 {
            self.fruitless = (self.fruitless + 1).min(3);
            self.passes = (1 << self.fruitless) - 1;
        } else {
            self.fruitless = 0;
            self.passes = 0;
        }
        self.expected = u32::midpoint(self.expected, self.run);
        self.run = 0;
        self.probe = 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Empties a queue of `waiting` packets; returns (questions, empty answers).
    fn drain(burst: &mut Burst, mut waiting: u32) -> (u32, u32) {
        let (mut questions, mut empties) = (0, 0);
        loop {
            let asked = burst.next(false);
            let got = asked.min(waiting);
            waiting -= got;
            questions += 1;
            empties += asked - got;
            burst.answered(asked, got);
            if got < asked {
                return (questions, empties);
            }
        }
    }

    #[test]
    fn a_recurring_run_is_asked_for_in_full_bursts() {
        let mut burst = Burst::default();
        for _ in 0..20 {
            drain(&mut burst, 256);
        }
        let (questions, empties) = drain(&mut burst, 256);
        assert!(questions <= 8, "{questions} entries for 256 packets");
        assert!(empties <= 4, "{empties} empty answers for 256 packets");
    }

    #[test]
    fn single_packets_are_mostly_not_probed_after() {
        let mut burst = Burst::default();
        let mut probes = 0;
        for _ in 0..800 {
            burst.woke();
            let asked = burst.next(true);
            if asked > 0 {
                probes += asked;
                burst.answered(asked, 0);
            }
        }
        assert!(probes <= 110, "{probes} probes for 800 single packets");
    }

    #[test]
    fn a_flood_after_silence_is_met_quickly() {
        let mut burst = Burst::default();
        for _ in 0..100 {
            burst.woke();
            let asked = burst.next(true);
            burst.answered(asked, 0);
        }
        let (questions, _) = drain(&mut burst, 1_000);
        assert!(questions <= 24, "{questions} entries for 1,000 packets");
    }

    #[test]
    fn a_question_is_never_longer_than_the_longest() {
        let mut burst = Burst::default();
        for _ in 0..100 {
            let asked = burst.next(false);
            assert!((1..=LONGEST).contains(&asked));
            burst.answered(asked, asked);
        }
    }
}
