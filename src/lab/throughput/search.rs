//! The search for the highest rate at which no more than a given share is lost, as RFC 2544 and
//! FD.io CSIT search.
//!
//! Loss near the limit is a matter of luck, and a shared machine pauses now and then for reasons
//! outside the test. So several trials judge a rate: it passes or fails by the majority, a failure
//! by two at least (MLRsearch calls that an exceed ratio of one half). A search ends with two
//! bounds per goal: the lower one passed as often as [`Settings::confirmations`] says in trials of
//! full length, the upper one failed. Several goals share their trials.
//!
//! # Rates
//!
//! All rates that are asked for lie on one logarithmic scale, [`Settings::resolution`] apart, with
//! the ceiling at its top. A trial is judged by the rate that was asked for, not by the one that
//! was measured, so that trials of one rate meet:
//!
//! | trial | counts |
//! |---|---|
//! | the generator kept the rate, nothing too much was lost | for that rate and all below |
//! | too much was lost | against the rate that was asked for |
//! | the generator fell behind, nothing too much was lost | against the rate that was asked for, and for what it offered and all below |
//!
//! The search doubles its distance from where it began until it has a rate that passes and one that
//! does not, and halves what is between them. A single bad trial is enough to go lower while the
//! bounds are far apart, where trials are short; the rate is asked for again once it is the upper
//! bound. Rates at which a short trial has fewer than 200 packets are not tried: a share of half a
//! per cent cannot be seen there. If nothing passes above, there is no lower bound.
//!
//! The search itself does no I/O: [`Search::next`] returns the trial to make, [`Search::record`]
//! takes its outcome.
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
//! assert!(pdr.lower.unwrap() >= ndr.lower.unwrap());
//! ```

use std::time::Duration;

/// How thorough a search is.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Settings {
    /// Length of the trials that decide.
    pub time: Duration,
    /// Length of the trials that only bring the bounds near.
    pub short: Duration,
    /// The bounds of a goal are at most this far apart, as a share of the lower one; at least a
    /// millionth.
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
    /// Whether that is what was asked for. If not, the generator fell behind.
    pub kept: bool,
    /// The share of what was sent that was lost, 0 to 1.
    pub loss: f64,
}

/// What is known of one goal.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Bounds {
    /// The share that may be lost.
    pub goal: f64,
    /// The highest rate that passed, below all that failed; none if nothing did.
    pub lower: Option<f64>,
    /// The lowest rate above it that failed or could not be offered; where there is none, the
    /// ceiling.
    pub upper: f64,
    /// The generator, not the device, sets the bound: nothing was lost at the most that could be
    /// offered.
    pub generator_bound: bool,
    /// The bounds are as near and as often confirmed as was asked for, or no rate passes.
    pub complete: bool,
}

/// The trials so far, and what to try next.
#[derive(Clone, Debug)]
pub struct Search {
    settings: Settings,
    goals: Vec<Goal>,
    tried: Vec<Tried>,
    ceiling: f64,
    /// Natural logarithm of the distance of two levels.
    step: f64,
    /// The level of the ceiling; level 0 is the lowest that is tried.
    top: u32,
    start: u32,
    /// Bounds no farther apart than so many levels are near enough for trials of full length.
    near: u32,
}

#[derive(Clone, Copy, Debug)]
struct Goal {
    share: f64,
}

/// A trial that was made.
#[derive(Clone, Copy, Debug)]
struct Tried {
    /// The level that was asked for.
    asked: u32,
    /// The highest level that was offered; none below the lowest.
    reached: Option<u32>,
    kept: bool,
    loss: f64,
    decides: bool,
}

/// What trials say of a level.
#[derive(Clone, Copy, Debug, Default)]
struct Tally {
    passes: u32,
    /// Those of full length among them.
    confirmations: u32,
    /// Trials that lost too much.
    losses: u32,
    /// Trials that lost nothing too much, but in which the generator fell behind.
    behind: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    Passed,
    Failed,
    /// It takes another trial to decide.
    Open,
}

/// Between these the bounds are near enough for trials of full length.
const NEAR: f64 = 0.04;

/// A short trial at the lowest rate has as many packets: fewer do not show a loss of half a per
/// cent.
const LEAST_PACKETS: f64 = 200.0;

/// One second, one half per cent, twice: for a look. RFC 2544 wants a minute.
impl Default for Settings {
    fn default() -> Self {
        Self {
            time: Duration::from_secs(1),
            short: Duration::from_millis(250),
            resolution: 0.005,
            confirmations: 2,
            most_trials: 150,
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
        // A hair less, so that rounding leaves two levels no farther apart than the resolution.
        let step = (settings.resolution.max(1e-6) * (1.0 - 1e-6)).ln_1p();
        let least = LEAST_PACKETS / settings.short.as_secs_f64().max(1e-9);
        // As a cast saturates, a ceiling below the least has one level.
        let top = ((ceiling / least).ln() / step) as u32;
        Self {
            settings: *settings,
            goals: goals.collect(),
            tried: Vec::new(),
            ceiling,
            step,
            top,
            start: top,
            near: ((NEAR.ln_1p() / step) as u32).max(1),
        }
    }

    /// Begins at this rate instead of the ceiling: what an earlier search found, or what came through of too much.
    pub fn starting_at(mut self, rate: f64) -> Self {
        self.start = self.level(rate).unwrap_or(0);
        self
    }

    /// The next trial; none when all goals are reached, or after [`Settings::most_trials`].
    #[allow(clippy::should_implement_trait)] // each step needs the answer to the one before
    pub fn next(&self) -> Option<Trial> {
        if self.tried.len() >= self.settings.most_trials as usize {
            return None;
        }
        let (level, decides) = self.goals.iter().find_map(|goal| self.step(goal))?;
        Some(Trial {
            rate: self.rate(level),
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
        let asked = self.level(trial.rate).unwrap_or(0);
        self.tried.push(Tried {
            asked,
            reached: if outcome.kept {
                Some(asked)
            } else {
                self.level(outcome.rate.min(trial.rate))
            },
            kept: outcome.kept,
            loss: outcome.loss,
            decides: trial.decides,
        });
    }

    /// What is known of each goal, in the order given.
    pub fn bounds(&self) -> Vec<Bounds> {
        let bounds = |goal: &Goal| {
            let (lower, upper) = self.around(goal);
            Bounds {
                goal: goal.share,
                lower: lower.map(|level| self.rate(level)),
                upper: self.rate(upper.unwrap_or(self.top)),
                generator_bound: lower.is_some()
                    && upper.map_or(lower == Some(self.top), |level| {
                        let tally = self.tally(goal, level);
                        tally.behind > tally.losses
                    }),
                complete: self.step(goal).is_none(),
            }
        };
        self.goals.iter().map(bounds).collect()
    }

    /// How many trials there were.
    pub fn trials(&self) -> usize {
        self.tried.len()
    }

    /// Packets per second of a level.
    fn rate(&self, level: u32) -> f64 {
        self.ceiling * (-self.step * f64::from(self.top - level)).exp()
    }

    /// The highest level whose rate is not above this one; none below the lowest.
    fn level(&self, rate: f64) -> Option<u32> {
        // With room for the rounding of a rate that was computed from a level.
        let below = ((self.ceiling / rate).ln() / self.step - 1e-6).ceil().max(0.0);
        // What is not a number is not a rate that was reached.
        (below <= f64::from(self.top)).then(|| self.top - below as u32)
    }

    /// What this goal wants to know next: a level, and whether of full length.
    fn step(&self, goal: &Goal) -> Option<(u32, bool)> {
        match self.around(goal) {
            (None, None) => Some((self.start, false)),
            // Nothing passed: down, each time twice as far from the start.
            (None, Some(upper)) if upper > 0 => {
                let stride = self.near.max(self.start.abs_diff(upper));
                Some((upper.saturating_sub(stride), false))
            }
            (None, Some(lowest)) => self.unless_failed(goal, lowest),
            // Nothing failed: up in the same way.
            (Some(lower), None) if lower < self.top => {
                let stride = self.near.max(self.start.abs_diff(lower));
                Some((self.top.min(lower.saturating_add(stride)), false))
            }
            (Some(lower), None) => self.unless_confirmed(goal, lower),
            (Some(lower), Some(upper)) if upper - lower > 1 => {
                Some((lower + (upper - lower) / 2, upper - lower <= self.near))
            }
            (Some(lower), Some(upper)) => self
                .unless_confirmed(goal, lower)
                .or_else(|| self.unless_failed(goal, upper)),
        }
    }

    fn unless_confirmed(&self, goal: &Goal, level: u32) -> Option<(u32, bool)> {
        let confirmed = self.tally(goal, level).confirmations >= self.settings.confirmations;
        (!confirmed).then_some((level, true))
    }

    fn unless_failed(&self, goal: &Goal, level: u32) -> Option<(u32, bool)> {
        (self.verdict(goal, level) != Verdict::Failed).then_some((level, true))
    }

    /// The highest level that passed below all that failed, and the lowest above it that was asked
    /// for and did not pass.
    fn around(&self, goal: &Goal) -> (Option<u32>, Option<u32>) {
        let asked = self.tried.iter().map(|tried| tried.asked);
        let failed = asked
            .clone()
            .filter(|&level| self.verdict(goal, level) == Verdict::Failed)
            .min();
        let passed = self.tried.iter().filter(|tried| tried.loss <= goal.share);
        let lower = passed
            .filter_map(|tried| tried.reached)
            .filter(|&level| failed.is_none_or(|failed| level < failed))
            .filter(|&level| self.verdict(goal, level) == Verdict::Passed)
            .max();
        let upper = asked
            .filter(|&level| lower.is_none_or(|lower| level > lower))
            .filter(|&level| self.verdict(goal, level) != Verdict::Passed)
            .min();
        (lower, upper)
    }

    fn verdict(&self, goal: &Goal, level: u32) -> Verdict {
        let tally = self.tally(goal, level);
        let against = tally.losses + tally.behind;
        match tally.passes {
            passes if passes > against => Verdict::Passed,
            passes if against >= 2 && against > passes => Verdict::Failed,
            _ => Verdict::Open,
        }
    }

    /// All that trials say of a level: what passed at a higher one passes here, too.
    fn tally(&self, goal: &Goal, level: u32) -> Tally {
        let mut tally = Tally::default();
        for tried in &self.tried {
            if tried.loss > goal.share {
                tally.losses += u32::from(tried.asked == level);
                continue;
            }
            tally.behind += u32::from(tried.asked == level && !tried.kept);
            if tried.reached.is_some_and(|reached| reached >= level) {
                tally.passes += 1;
                tally.confirmations += u32::from(tried.decides);
            }
        }
        tally
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A goal of no loss, and one of half a per cent.
    const GOALS: [f64; 2] = [0.0, 0.005];

    /// The device: what it loses at a rate. The generator: what it offers of a rate, and whether it
    /// kept it.
    fn run(
        search: &mut Search,
        mut loss: impl FnMut(f64) -> f64,
        mut generator: impl FnMut(f64) -> f64,
    ) -> Vec<Bounds> {
        let most = search.settings.most_trials as usize;
        while let Some(trial) = search.next() {
            let rate = generator(trial.rate);
            let kept = rate >= 0.98 * trial.rate;
            search.record(
                trial,
                Outcome {
                    rate,
                    kept,
                    loss: loss(rate),
                },
            );
            assert!(search.trials() <= most, "no end");
        }
        for bounds in search.bounds() {
            assert!(bounds.lower.is_none_or(|lower| lower <= bounds.upper), "{bounds:?}");
        }
        search.bounds()
    }

    /// Loses what is above a limit.
    fn sharp(limit: f64) -> impl Fn(f64) -> f64 {
        move |rate| (1.0 - limit / rate).max(0.0)
    }

    fn at_most(can: f64) -> impl Fn(f64) -> f64 {
        move |rate| rate.min(can)
    }

    fn dice() -> impl Strategy<Value = Vec<f64>> {
        proptest::collection::vec(0.0..1.0f64, 64)
    }

    fn near(bounds: &Bounds, settings: &Settings) -> bool {
        bounds
            .lower
            .is_some_and(|lower| bounds.upper / lower - 1.0 <= settings.resolution)
    }

    proptest! {
        #[test]
        fn the_limit_of_a_steady_device_lies_between_the_bounds(
            limit in 2_000.0..5e6f64, above in 1.01..20.0f64, start in 0.01..1.0f64, resolution in 0.002..0.05f64,
        ) {
            let settings = Settings { resolution, ..Settings::default() };
            let ceiling = limit * above;
            let mut search = Search::new(&settings, &GOALS, ceiling).starting_at(ceiling * start);
            let bounds = run(&mut search, sharp(limit), |rate| rate);
            prop_assert!(search.trials() <= 50, "{} trials", search.trials());
            for (bounds, limit) in bounds.iter().zip([limit, limit / 0.995]) {
                prop_assert!(bounds.complete && bounds.generator_bound == (limit >= ceiling), "{bounds:?}");
                prop_assert!(bounds.lower.unwrap() <= limit * (1.0 + 1e-9));
                if !bounds.generator_bound {
                    prop_assert!(bounds.upper >= limit && near(bounds, &settings), "{bounds:?}");
                }
            }
        }

        #[test]
        fn the_next_search_from_what_passed_takes_few_trials(limit in 10_000.0..5e6f64, drift in 0.97..1.03f64) {
            let settings = Settings::default();
            let mut search = Search::new(&settings, &[0.0], limit * 2.0);
            let found = run(&mut search, sharp(limit), |rate| rate)[0].lower.unwrap();
            let mut search = Search::new(&settings, &[0.0], limit * 2.0).starting_at(found);
            let bounds = run(&mut search, sharp(limit * drift), |rate| rate)[0];
            prop_assert!(bounds.complete && near(&bounds, &settings), "{bounds:?}");
            prop_assert!(search.trials() <= 11, "{} trials", search.trials());
        }

        #[test]
        fn a_device_that_loses_at_random_gets_bounds_in_order_and_an_end(limit in 2_000.0..5e6f64, luck in dice()) {
            let settings = Settings::default();
            let mut search = Search::new(&settings, &GOALS, limit * 2.0);
            let mut luck = luck.into_iter().cycle();
            let bounds = run(&mut search, |rate| {
                let accident = if luck.next().unwrap() < rate / limit / 4.0 { 1e-4 } else { 0.0 };
                sharp(limit)(rate).max(accident)
            }, |rate| rate);
            let [ndr, pdr] = bounds[..] else { panic!() };
            prop_assert!(ndr.upper <= pdr.upper);
            prop_assert!(ndr.lower.unwrap_or(0.0) <= pdr.lower.unwrap_or(0.0));
            // Accidents lose a fiftieth of what this goal permits.
            prop_assert!(pdr.complete || search.trials() == settings.most_trials as usize, "{pdr:?}");
            if pdr.complete {
                prop_assert!(pdr.lower.unwrap() <= limit / 0.995 && limit <= pdr.upper, "{pdr:?}");
            }
        }

        #[test]
        fn a_generator_that_cannot_offer_the_limit_bounds_the_rate(limit in 20_000.0..5e6f64, share in 0.05..0.99f64) {
            // The generator promised twice the limit and manages less than the limit.
            let can = limit * share;
            let settings = Settings::default();
            let mut search = Search::new(&settings, &GOALS, limit * 2.0);
            for bounds in run(&mut search, sharp(limit), at_most(can)) {
                prop_assert!(bounds.generator_bound && bounds.complete, "{bounds:?}");
                // What is offered within 2 % counts as kept.
                let lower = bounds.lower.unwrap() / can;
                prop_assert!((1.0 - settings.resolution..1.0 / 0.98 + 1e-9).contains(&lower), "{bounds:?} {can}");
            }
        }

        #[test]
        fn a_generator_that_falls_behind_by_chance_keeps_no_search_from_its_end(
            limit in 10_000.0..5e6f64, most in 0.0..0.3f64, above in 1.0..4.0f64, luck in dice(),
        ) {
            let settings = Settings::default();
            let mut search = Search::new(&settings, &GOALS, limit * above).starting_at(limit);
            let mut luck = luck.into_iter().cycle();
            let bounds = run(&mut search, sharp(limit), |rate| rate * (1.0 - most * luck.next().unwrap()));
            for bounds in bounds {
                prop_assert!(bounds.complete, "{bounds:?} after {}", search.trials());
                prop_assert!(near(&bounds, &settings) || bounds.generator_bound, "{bounds:?}");
                let lower = bounds.lower.unwrap() / limit;
                prop_assert!((0.5..1.0 / 0.995 / 0.98).contains(&lower), "{bounds:?} of {limit}");
            }
        }

        #[test]
        fn a_generator_that_offers_more_than_asked_gives_a_rate_on_the_safe_side(
            limit in 10_000.0..5e6f64, more in 0.0..0.3f64,
        ) {
            let settings = Settings::default();
            let mut search = Search::new(&settings, &[0.0], limit * 2.0);
            let bounds = run(&mut search, sharp(limit), |rate| rate * (1.0 + more))[0];
            prop_assert!(bounds.complete && near(&bounds, &settings), "{bounds:?}");
            let lower = bounds.lower.unwrap() * (1.0 + more) / limit;
            prop_assert!((1.0 - settings.resolution..1.0 + 1e-9).contains(&lower), "{bounds:?}");
        }

        // Two queues and the generator on two CPUs: each trial above the limit loses packets and
        // falls behind as well.
        #[test]
        fn a_generator_that_falls_behind_where_packets_are_lost_does_not_hide_the_limit(
            limit in 100_000.0..1e6f64, above in 1.1..3.0f64, luck in dice(),
        ) {
            let settings = Settings::default();
            let ceiling = limit * above;
            let mut luck = luck.into_iter().cycle();
            let mut start = ceiling * 0.9;
            for _ in 0..3 {
                let mut search = Search::new(&settings, &GOALS, ceiling * 1.05).starting_at(start);
                let bounds = run(
                    &mut search,
                    |rate| if rate > limit * 0.96 { 0.05 + 0.2 * (rate / ceiling).min(1.0) } else { 0.0 },
                    |rate| if rate > limit { rate * (0.96 + 0.001 * luck.next().unwrap()) } else { rate },
                );
                for bounds in &bounds {
                    prop_assert!(bounds.complete && !bounds.generator_bound && near(bounds, &settings), "{bounds:?}");
                    let lower = bounds.lower.unwrap() / limit;
                    prop_assert!((0.95..=0.97).contains(&lower), "{bounds:?} of {limit}");
                }
                prop_assert!(search.trials() <= 30, "{}", search.trials());
                start = bounds[0].lower.unwrap();
            }
        }

        #[test]
        fn a_device_that_always_loses_a_little_passes_one_goal_only(ceiling in 1_000.0..5e6f64, start in 0.01..1.0f64) {
            let mut search = Search::new(&Settings::default(), &GOALS, ceiling).starting_at(ceiling * start);
            let bounds = run(&mut search, |_| 0.004_2, |rate| rate);
            prop_assert!(bounds[0].lower.is_none() && bounds[0].complete && !bounds[0].generator_bound, "{bounds:?}");
            prop_assert!(bounds[1].generator_bound && bounds[1].complete, "{bounds:?}");
            prop_assert!((bounds[1].lower.unwrap() / ceiling - 1.0).abs() < 1e-9, "{bounds:?}");
            prop_assert!(search.trials() <= 40, "{}", search.trials());
        }

        #[test]
        fn whatever_comes_of_trials_the_search_ends(
            ceiling in 0.1..1e9f64, start in 0.0..2e9f64,
            outcomes in proptest::collection::vec((0.0..2.0f64, any::<bool>(), prop_oneof![Just(0.0), 0.0..1.0f64]), 1..100),
        ) {
            let mut search = Search::new(&Settings::default(), &GOALS, ceiling).starting_at(start);
            let mut outcomes = outcomes.into_iter().cycle();
            while let Some(trial) = search.next() {
                prop_assert!(trial.rate > 0.0 && trial.rate <= ceiling * (1.0 + 1e-9), "{trial:?}");
                let (share, kept, loss) = outcomes.next().unwrap();
                search.record(trial, Outcome { rate: trial.rate * share, kept, loss });
            }
            prop_assert!(search.trials() <= Settings::default().most_trials as usize);
            for bounds in search.bounds() {
                prop_assert!(bounds.lower.is_none_or(|lower| lower <= bounds.upper), "{bounds:?}");
            }
        }
    }

    #[test]
    fn a_device_that_passes_nothing_has_no_rate_instead_of_a_tiny_one() {
        for generator in [1.0, 0.8] {
            let mut search = Search::new(&Settings::default(), &GOALS, 1e6);
            for bounds in run(&mut search, |_| 1.0, |rate| rate * generator) {
                assert_eq!(bounds.lower, None);
                assert!(!bounds.generator_bound && bounds.complete, "{bounds:?}");
            }
            assert!(search.trials() <= 15, "{}", search.trials());
        }
    }

    #[test]
    fn a_device_that_passes_all_is_bound_by_the_generator() {
        let mut search = Search::new(&Settings::default(), &GOALS, 1e6);
        for bounds in run(&mut search, |_| 0.0, |rate| rate) {
            assert!(bounds.generator_bound && bounds.complete, "{bounds:?}");
            assert_eq!(bounds.lower, Some(1e6));
        }
        assert_eq!(search.trials(), 3);
    }

    #[test]
    fn a_bound_that_fails_later_is_given_up() {
        let mut search = Search::new(&Settings::default(), &[0.0], 1e6).starting_at(500_000.0);
        let mut lucky = true;
        // The first trial passes by luck.
        let bounds = run(
            &mut search,
            |rate| {
                if std::mem::take(&mut lucky) {
                    0.0
                } else {
                    sharp(400_000.0)(rate)
                }
            },
            |rate| rate,
        )[0];
        assert!(
            bounds.lower.unwrap() <= 400_000.0 && bounds.upper >= 400_000.0,
            "{bounds:?}"
        );
        assert!(bounds.complete, "{bounds:?}");
    }

    #[test]
    fn a_device_whose_losses_are_a_matter_of_luck_still_gets_its_bounds() {
        let mut state = 1u64;
        let mut luck = move || {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            (state >> 40) as f64 / (1u64 << 24) as f64
        };
        let settings = Settings {
            resolution: 0.01,
            ..Settings::default()
        };
        // From never to always over a range that is so many times as wide as the rate in its
        // middle.
        for wide in [0.1, 0.3, 1.0, 2.0] {
            let mut start = 300_000.0;
            let mut trials = Vec::new();
            for _ in 0..250 {
                let mut search = Search::new(&settings, &GOALS, 1e6).starting_at(start);
                let chance = |rate: f64| (rate / 300_000.0).ln() / wide + 0.5;
                let bounds = run(
                    &mut search,
                    |rate| {
                        if luck() < chance(rate) {
                            0.001 + 0.01 * luck()
                        } else {
                            0.0
                        }
                    },
                    |rate| rate,
                );
                assert!(bounds.iter().all(|bounds| bounds.complete), "{wide}: {bounds:?}");
                trials.push(search.trials());
                start = bounds[0].lower.unwrap_or(start);
            }
            trials.sort_unstable();
            assert!(
                trials[125] <= 30,
                "{wide}: half of the searches take {} trials",
                trials[125]
            );
        }
    }

    #[test]
    fn one_accident_far_below_the_limit_costs_no_more_than_some_trials() {
        for unlucky in 0..12 {
            let settings = Settings::default();
            let mut search = Search::new(&settings, &[0.0], 1e6).starting_at(690_000.0);
            let mut trials = 0..;
            let bounds = run(
                &mut search,
                |rate| {
                    if trials.next() == Some(unlucky) {
                        0.01
                    } else {
                        sharp(700_000.0)(rate)
                    }
                },
                |rate| rate,
            )[0];
            assert!(bounds.complete && near(&bounds, &settings), "{unlucky}: {bounds:?}");
            assert!(bounds.lower.unwrap() > 690_000.0, "{unlucky}: {bounds:?}");
            assert!(search.trials() <= 25, "{unlucky}: {}", search.trials());
        }
    }

    #[test]
    fn a_generator_that_can_less_later_leaves_the_upper_bound_above_the_lower() {
        let mut search = Search::new(&Settings::default(), &[0.0], 700_000.0).starting_at(690_000.0);
        let mut asked = 0;
        let bounds = run(
            &mut search,
            |_| 0.0,
            |rate| {
                asked += 1;
                if asked <= 2 { rate } else { rate.min(600_000.0) }
            },
        )[0];
        assert!(bounds.generator_bound, "{bounds:?}");
    }
}
