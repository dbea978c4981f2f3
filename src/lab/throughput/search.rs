//! The search for the highest rate at which no more than a given share is lost, in the manner of RFC 2544 and FD.io CSIT.
//!
//! Loss near the limit is a matter of luck, and a machine that is shared stops now and then for reasons of its own. So a rate is judged by
//! several trials: it passes or fails by the majority, a failure always by two at least (MLRsearch calls that an exceed ratio of one half). A
//! search ends with two bounds per goal: the lower one passed as often as [`Settings::confirmations`] says in trials of full length, the
//! upper one failed. Several goals share their trials.
//!
//! Rates are halved apart on a logarithmic scale; while the bounds are far apart, trials are short. The search itself does no I/O: it asks
//! for a trial ([`Search::next`]) and is told what came of it ([`Search::record`]).
//!
//! ```
//! use tun_driver::lab::throughput::search::{Outcome, Search, Settings};
//!
//! let mut search = Search::new(&Settings::default(), &[0.0, 0.005], 1_000_000.0);
//! while let Some(trial) = search.next() {
//!     // A device that forwards 700,000 packets per second and drops the rest.
//!     let loss = (1.0 - 700_000.0 / trial.rate).max(0.0);
//!     search.record(trial, Outcome { rate: trial.rate, kept: true, loss });
//! }
//! let [ndr, pdr] = search.bounds()[..] else { panic!() };
//! assert!(ndr.lower.unwrap() <= 700_000.0 && 700_000.0 < ndr.upper);
//! assert!(pdr.lower.unwrap() > ndr.lower.unwrap());
//! ```

use std::time::Duration;

/// How thorough a search is.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Settings {
    /// Length of the trials that decide.
    pub time: Duration,
    /// Length of the trials that only bring the bounds near.
    pub short: Duration,
    /// The bounds of a goal are at most this far apart, as a share of the lower one.
    pub resolution: f64,
    /// How often a lower bound has to pass in trials of full length.
    pub confirmations: u32,
    /// After as many trials it ends, with what it has.
    pub most_trials: u32,
}

/// What to send next.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Trial {
    /// Packets per second.
    pub rate: f64,
    /// For how long.
    pub time: Duration,
    /// Whether it is of full length.
    pub decides: bool,
}

/// What came of a trial.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Outcome {
    /// Packets per second that were sent.
    pub rate: f64,
    /// Whether that is what was asked for. If not, the generator is at its end.
    pub kept: bool,
    /// The share that was lost, 0 to 1.
    pub loss: f64,
}

/// What is known of one goal.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Bounds {
    /// The share that may be lost.
    pub goal: f64,
    /// The highest rate that passed, below all that failed; none if nothing did.
    pub lower: Option<f64>,
    /// The lowest rate that failed; where none did, the most that could be offered.
    pub upper: f64,
    /// Nothing failed: the generator, not the device, sets the bound.
    pub generator_bound: bool,
    /// The bounds are as near and as often confirmed as was asked for.
    pub complete: bool,
}

/// The trials so far, and what to try next.
#[derive(Clone, Debug)]
pub struct Search {
    settings: Settings,
    goals: Vec<Goal>,
    /// All that was tried: rate, loss, whether of full length.
    tried: Vec<(f64, f64, bool)>,
    /// The most that the generator can offer, as far as is known.
    ceiling: f64,
    start: f64,
}

#[derive(Clone, Copy, Debug)]
struct Goal {
    share: f64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    Passed,
    Failed,
    /// It takes another trial to tell.
    Open,
}

/// Between these the bounds are near enough for trials of full length.
const NEAR: f64 = 0.04;

/// Trials of two rates this near (as a share) count as of one rate.
const SAME: f64 = 1e-6;

/// One second, one half per cent, twice: for a look. RFC 2544 wants a minute.
impl Default for Settings {
    fn default() -> Self {
        Self {
            time: Duration::from_secs(1),
            short: Duration::from_millis(250),
            resolution: 0.005,
            confirmations: 2,
            most_trials: 60,
        }
    }
}

impl Search {
    /// For some goals (shares of loss, 0 for none), below `ceiling`: what the generator can offer.
    ///
    /// # Panics
    /// If the ceiling is not above zero.
    pub fn new(settings: &Settings, goals: &[f64], ceiling: f64) -> Self {
        assert!(ceiling > 0.0, "nothing can be searched below {ceiling}");
        let goals = goals.iter().map(|&share| Goal { share });
        Self {
            settings: *settings,
            goals: goals.collect(),
            tried: Vec::new(),
            ceiling,
            start: ceiling,
        }
    }

    /// Begins at this rate instead of the ceiling: what an earlier search found, or what came through of too much.
    pub fn starting_at(mut self, rate: f64) -> Self {
        self.start = rate.clamp(1.0, self.ceiling);
        self
    }

    /// The next trial; none when all goals are reached, or after [`Settings::most_trials`].
    #[allow(clippy::should_implement_trait)] // each step needs the answer to the one before
    pub fn next(&self) -> Option<Trial> {
        if self.tried.len() >= self.settings.most_trials as usize {
            return None;
        }
        let (rate, decides) = self.goals.iter().find_map(|goal| self.step(goal))?;
        Some(Trial {
            rate,
            decides,
            time: if decides {
                self.settings.time
            } else {
                self.settings.short
            },
        })
    }

    /// Takes what came of a trial.
    pub fn record(&mut self, trial: Trial, outcome: Outcome) {
        let rate = if outcome.kept {
            trial.rate
        } else {
            // More cannot be offered, and what was asked for is not what was measured.
            self.ceiling = self.ceiling.min(outcome.rate);
            outcome.rate.min(trial.rate)
        };
        self.tried.push((rate, outcome.loss, trial.decides));
    }

    /// What is known of each goal, in the order given.
    pub fn bounds(&self) -> Vec<Bounds> {
        self.goals
            .iter()
            .map(|goal| Bounds {
                goal: goal.share,
                lower: self.passed(goal).map(|(rate, _)| rate),
                // A generator that could less later has not made the engine fail at what passed.
                upper: self.failed(goal).unwrap_or_else(|| {
                    let lower = self.passed(goal).map_or(0.0, |(rate, _)| rate);
                    self.ceiling.max(lower)
                }),
                generator_bound: self.failed(goal).is_none() && self.passed(goal).is_some(),
                complete: self.step(goal).is_none(),
            })
            .collect()
    }

    /// How many trials there were.
    pub fn trials(&self) -> usize {
        self.tried.len()
    }

    /// What this goal wants to know next.
    fn step(&self, goal: &Goal) -> Option<(f64, bool)> {
        let failed = self.failed(goal);
        let below = |rate: f64| failed.is_none_or(|failed| rate < failed * (1.0 - SAME));
        let lower = self.passed(goal);
        let above = |rate: f64| lower.is_none_or(|(lower, _)| rate > lower * (1.0 + SAME));
        // What is not decided is asked again.
        let open = self
            .tried
            .iter()
            .find(|&&(rate, ..)| below(rate) && above(rate) && self.verdict(goal, rate) == Verdict::Open);
        if let Some(&(rate, _, decides)) = open {
            return Some((rate, decides));
        }
        let Some((lower, confirmed)) = lower else {
            // Nothing passed yet: down by half from the lowest that failed.
            let rate = failed.map_or(self.start, |failed| failed / 2.0);
            return (rate >= 1.0).then_some((rate, false));
        };
        let upper = match failed {
            Some(failed) => failed,
            // All passed so far: up to what the generator can.
            None if lower < self.ceiling * (1.0 - SAME) => return Some((self.ceiling, false)),
            None => lower,
        };
        let apart = upper / lower - 1.0;
        if apart > self.settings.resolution {
            let wide = apart > NEAR.max(self.settings.resolution);
            return Some(((lower * upper).sqrt(), !wide));
        }
        (confirmed < self.settings.confirmations).then_some((lower, true))
    }

    /// The lowest rate that failed.
    fn failed(&self, goal: &Goal) -> Option<f64> {
        let rates = self.tried.iter().map(|&(rate, ..)| rate);
        rates
            .filter(|&rate| self.verdict(goal, rate) == Verdict::Failed)
            .reduce(f64::min)
    }

    /// The highest rate that passed below all that failed, and how often it did at full length.
    fn passed(&self, goal: &Goal) -> Option<(f64, u32)> {
        let failed = self.failed(goal);
        let rates = self.tried.iter().map(|&(rate, ..)| rate);
        let highest = rates
            .filter(|&rate| failed.is_none_or(|failed| rate < failed * (1.0 - SAME)))
            .filter(|&rate| self.verdict(goal, rate) == Verdict::Passed)
            .reduce(f64::max)?;
        let confirmed = self
            .at(highest)
            .filter(|&(loss, decides)| decides && loss <= goal.share);
        Some((highest, confirmed.count() as u32))
    }

    fn verdict(&self, goal: &Goal, rate: f64) -> Verdict {
        let passes = self.at(rate).filter(|&(loss, _)| loss <= goal.share).count();
        let fails = self.at(rate).count() - passes;
        match (passes, fails) {
            (_, fails) if fails >= 2 && fails > passes => Verdict::Failed,
            (passes, fails) if passes > fails => Verdict::Passed,
            _ => Verdict::Open,
        }
    }

    /// Loss, and whether of full length, of all trials at a rate.
    fn at(&self, rate: f64) -> impl Iterator<Item = (f64, bool)> + '_ {
        let same = move |other: f64| (other / rate - 1.0).abs() <= SAME;
        let trials = self.tried.iter().filter(move |&&(other, ..)| same(other));
        trials.map(|&(_, loss, decides)| (loss, decides))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn run(search: &mut Search, mut loss: impl FnMut(f64) -> f64, can: f64) -> Vec<Bounds> {
        while let Some(trial) = search.next() {
            let rate = trial.rate.min(can);
            search.record(
                trial,
                Outcome {
                    rate,
                    kept: trial.rate <= can,
                    loss: loss(rate),
                },
            );
        }
        search.bounds()
    }

    proptest! {
        #[test]
        fn the_limit_of_a_steady_device_lies_between_the_bounds(limit in 1_000.0..5e6f64, above in 1.01..20.0f64, start in 0.01..1.0f64) {
            let settings = Settings::default();
            let ceiling = limit * above;
            let mut search = Search::new(&settings, &[0.0, 0.005], ceiling).starting_at(ceiling * start);
            let bounds = run(&mut search, |rate| (1.0 - limit / rate).max(0.0), f64::INFINITY);
            prop_assert!(search.trials() < settings.most_trials as usize, "{} trials", search.trials());
            for (bounds, limit) in bounds.iter().zip([limit, limit / 0.995]) {
                prop_assert!(bounds.complete && bounds.generator_bound == (limit >= ceiling), "{bounds:?}");
                let lower = bounds.lower.unwrap();
                prop_assert!(lower <= limit * (1.0 + 1e-9));
                if !bounds.generator_bound {
                    prop_assert!(bounds.upper >= limit && bounds.upper / lower - 1.0 <= settings.resolution, "{bounds:?}");
                }
            }
        }

        #[test]
        fn a_device_that_loses_at_random_gets_bounds_in_order_and_an_end(limit in 1_000.0..5e6f64, luck in proptest::collection::vec(0.0..1.0f64, 64)) {
            let settings = Settings::default();
            let mut search = Search::new(&settings, &[0.0, 0.005], limit * 2.0);
            let mut luck = luck.into_iter().cycle();
            let bounds = run(&mut search, |rate| {
                let accident = if luck.next().unwrap() < rate / limit / 4.0 { 1e-4 } else { 0.0 };
                (1.0 - limit / rate).max(accident)
            }, f64::INFINITY);
            prop_assert!(search.trials() <= settings.most_trials as usize);
            let [ndr, pdr] = bounds[..] else { panic!() };
            prop_assert!(ndr.upper <= pdr.upper);
            prop_assert!(ndr.lower.unwrap_or(0.0) <= pdr.lower.unwrap_or(0.0));
            prop_assert!(limit <= pdr.upper * 1.0001 || search.trials() == settings.most_trials as usize, "{pdr:?}");
            for bounds in [ndr, pdr] {
                prop_assert!(bounds.lower.is_none_or(|lower| lower <= bounds.upper), "{bounds:?}");
            }
        }

        #[test]
        fn what_the_generator_cannot_offer_is_told(limit in 1_000.0..5e6f64, share in 0.05..0.99f64) {
            // The generator promised twice the limit and manages less than the limit.
            let can = limit * share;
            let mut search = Search::new(&Settings::default(), &[0.0], limit * 2.0);
            let bounds = run(&mut search, |rate| (1.0 - limit / rate).max(0.0), can)[0];
            prop_assert!(bounds.generator_bound && bounds.complete, "{bounds:?}");
            prop_assert!((bounds.lower.unwrap() / can - 1.0).abs() < 1e-9);
        }
    }

    #[test]
    fn a_device_that_passes_nothing_ends_the_search() {
        let mut search = Search::new(&Settings::default(), &[0.0], 1e6);
        let bounds = run(&mut search, |_| 1.0, f64::INFINITY)[0];
        assert_eq!(bounds.lower, None);
        assert!(!bounds.generator_bound && bounds.upper <= 2.0, "{bounds:?}");
    }

    #[test]
    fn a_bound_that_fails_later_is_given_up() {
        let mut search = Search::new(&Settings::default(), &[0.0], 1e6);
        let mut seen = 0;
        // 500,000 passes once, by luck, and so does one accident at a rate that passes else not count.
        let bounds = run(
            &mut search,
            |rate| {
                if (499_999.0..500_001.0).contains(&rate) {
                    seen += 1;
                    if seen == 1 { 0.0 } else { 0.01 }
                } else if rate > 400_000.0 {
                    0.01
                } else {
                    0.0
                }
            },
            f64::INFINITY,
        )[0];
        assert!(bounds.lower.unwrap() <= 400_000.0, "{bounds:?}");
        assert!(bounds.complete, "{bounds:?}");
    }

    #[test]
    fn a_generator_that_can_less_later_leaves_the_upper_bound_above_the_lower() {
        let mut search = Search::new(&Settings::default(), &[0.0], 700_000.0).starting_at(690_000.0);
        let mut asked = 0;
        while let Some(trial) = search.next() {
            asked += 1;
            let kept = asked <= 2;
            let rate = if kept { trial.rate } else { 600_000.0 };
            search.record(trial, Outcome { rate, kept, loss: 0.0 });
        }
        let bounds = search.bounds()[0];
        assert!(bounds.upper >= bounds.lower.unwrap(), "{bounds:?}");
    }
}
