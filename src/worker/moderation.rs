//! When to let packets gather before taking them, as network cards do (adaptive interrupt moderation).
//!
//! To sleep and be woken costs as much as several packets. So a worker that has emptied its ports while packets keep coming sleeps for a set
//! time instead of until the next packet: one timer wake-up brings what would have been several wake-ups. It does so only if several are to
//! be expected within the bound, and where it turns out that none came (a partner that waits for its answer), it refrains for a while.

use std::time::{Duration, Instant};

use super::config::Wait;

/// The predictor of one worker.
#[derive(Debug)]
pub(super) struct Moderation {
    /// The longest pause; zero never pauses.
    max: Duration,
    /// When the worker last had nothing to do.
    since: Instant,
    /// Packets received since then.
    received: u32,
    /// Recent packets and microseconds, older ones weighing less.
    packets: f32,
    micros: f32,
    /// The worker paused when it last had nothing to do.
    paused: bool,
    /// Pauses in a row that brought next to nothing.
    fruitless: u32,
    /// Occasions that are still to be let pass.
    passes: u32,
}

/// Fewer packets in a pause are not worth it: a pause and the question after it cost about as much as two wake-ups.
const FEWEST: f32 = 3.0;
/// More are not waited for: the wake-up is paid for by then, and the queue should not fill up.
const PLENTY: f32 = 48.0;

impl Moderation {
    pub(super) fn new(wait: Wait) -> Self {
        let max = match wait {
            Wait::Moderate { max } => max,
            _ => Duration::ZERO,
        };
        Self {
            max,
            since: Instant::now(),
            received: 0,
            packets: 0.0,
            micros: 1.0,
            paused: false,
            fruitless: 0,
            passes: 0,
        }
    }

    /// Takes note of packets that were received.
    #[inline]
    pub(super) fn received(&mut self, packets: usize) {
        self.received = self.received.saturating_add(packets as u32);
    }

    /// All ports are empty: how long to pause, at most until the deadline. `None`: sleep until something comes.
    #[inline]
    pub(super) fn pause(&mut self, deadline: Option<Instant>) -> Option<Duration> {
        if self.max.is_zero() {
            return None;
        }
        let now = Instant::now();
        match deadline.map(|deadline| deadline.saturating_duration_since(now)) {
            Some(Duration::ZERO) => None,
            Some(left) => Some(self.pause_at(now)?.min(left)),
            None => self.pause_at(now),
        }
    }

    fn pause_at(&mut self, now: Instant) -> Option<Duration> {
        let received = std::mem::take(&mut self.received);
        // A long silence must not be remembered for longer than a few packets.
        let elapsed = (now - self.since).min(self.max * 8).max(Duration::from_nanos(100));
        self.since = now;
        self.packets += (received as f32 - self.packets) / 4.0;
        self.micros += (elapsed.as_nanos() as f32 / 1e3 - self.micros) / 4.0;
        if std::mem::take(&mut self.paused) {
            if received < 2 {
                self.fruitless = (self.fruitless + 1).min(6);
                self.passes = 1 << self.fruitless;
                return None;
            }
            self.fruitless = 0;
        }
        if self.passes > 0 {
            self.passes -= 1;
            return None;
        }
        let per_micro = self.packets / self.micros;
        let max = self.max.as_nanos() as f32 / 1e3;
        if per_micro * max < FEWEST {
            return None;
        }
        self.paused = true;
        let micros = (PLENTY / per_micro).min(max);
        Some(Duration::from_nanos((micros * 1e3) as u64))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAX: Duration = Duration::from_micros(50);

    fn moderation() -> Moderation {
        Moderation::new(Wait::Moderate { max: MAX })
    }

    /// Packets come every `gap`, whatever the worker does; `cycles` times it has nothing to do. Returns (pauses, packets).
    fn steady(moderation: &mut Moderation, gap: Duration, cycles: u32) -> (u32, u32) {
        let start = moderation.since;
        let (mut now, mut taken, mut pauses, mut total) = (start, 0, 0, 0);
        for _ in 0..cycles {
            now = match moderation.pause_at(now) {
                Some(pause) => {
                    assert!(pause <= MAX);
                    pauses += 1;
                    now + pause
                }
                None => start + gap * (taken + 1),
            };
            let there = ((now - start).as_nanos() / gap.as_nanos()) as u32;
            let got = there.saturating_sub(taken);
            moderation.received(got as usize);
            taken += got;
            total += got;
        }
        (pauses, total)
    }

    #[test]
    fn few_packets_are_taken_at_once() {
        let (pauses, _) = steady(&mut moderation(), Duration::from_micros(50), 1_000);
        assert_eq!(pauses, 0);
    }

    #[test]
    fn many_packets_gather() {
        for gap in [10, 5, 2] {
            let (pauses, packets) = steady(&mut moderation(), Duration::from_micros(gap), 1_000);
            assert!(pauses > 900, "{pauses} pauses at a packet every {gap} µs");
            assert!(u64::from(packets) > 900 * (40 / gap), "{packets} packets");
        }
    }

    #[test]
    fn a_partner_that_waits_for_its_answer_is_not_kept_waiting() {
        // A trip takes 10 µs if answered at once.
        let mut moderation = moderation();
        let (mut now, mut pauses) = (moderation.since, 0);
        for _ in 0..1_000 {
            if let Some(pause) = moderation.pause_at(now) {
                pauses += 1;
                now += pause;
            }
            now += Duration::from_micros(10);
            moderation.received(1);
        }
        assert!(pauses < 40, "{pauses} of 1000 trips were delayed");
    }

    #[test]
    fn a_long_silence_is_soon_forgotten() {
        let mut moderation = moderation();
        steady(&mut moderation, Duration::from_micros(5), 100);
        moderation.received(1);
        assert!(
            moderation
                .pause_at(moderation.since + Duration::from_secs(3600))
                .is_some_and(|pause| pause <= MAX)
                || !moderation.paused
        );
        let (pauses, _) = steady(&mut moderation, Duration::from_micros(5), 100);
        assert!(pauses > 60, "{pauses} pauses after a silence");
    }

    #[test]
    fn without_leave_there_is_no_pause() {
        for wait in [
            Wait::Block,
            Wait::Spin { duration: MAX },
            Wait::Moderate { max: Duration::ZERO },
        ] {
            let mut moderation = Moderation::new(wait);
            for _ in 0..100 {
                moderation.received(64);
                assert_eq!(moderation.pause(None), None);
            }
        }
    }
}
