//! Ratios between any two ways of a report, and who loses to whom.

use tun_driver::lab::measure::{Report, Spread};

use crate::ways::{Entry, Whose};

/// Which direction is good.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Better {
    /// As time and CPU.
    Lower,
    /// As throughput.
    Higher,
    /// Nobody wins or loses by it.
    Told,
}

/// A figure that a table shows.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shown {
    pub(crate) name: &'static str,
    pub(crate) better: Better,
}

/// What was measured in one case.
pub(crate) struct Table {
    pub(crate) case: &'static str,
    pub(crate) title: String,
    pub(crate) notes: Vec<String>,
    /// As in the report, without the second run of the baseline.
    pub(crate) entries: Vec<Entry>,
    pub(crate) report: Report,
    pub(crate) figures: Vec<Shown>,
}

/// One way beaten, or not, by the best of the others.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Against {
    /// The best peer.
    pub(crate) peer: String,
    /// Its tier.
    pub(crate) tier: u8,
    /// This way's figure divided by the peer's of the same round.
    pub(crate) ratio: Spread,
    /// The median is on the wrong side of 1.
    pub(crate) loses: bool,
    /// 1 lies between the quartiles.
    pub(crate) unsure: bool,
}

impl Table {
    /// `way`'s figure divided by that of `other` in each round; `None` where one of them is not there or 0.
    pub(crate) fn ratio(&self, figure: &str, way: usize, other: usize) -> Option<Spread> {
        let (own, other) = (&self.report.ways[way].samples, &self.report.ways[other].samples);
        let ratios = own
            .iter()
            .zip(other)
            .map(|(own, other)| own.figure(figure) / other.figure(figure));
        Spread::of(&ratios.collect::<Vec<f64>>())
    }

    /// The place of a way.
    pub(crate) fn place(&self, name: &str) -> Option<usize> {
        self.entries.iter().position(|entry| entry.name == name)
    }

    /// The peer with the best median, of those up to this tier.
    pub(crate) fn best_peer(&self, shown: Shown, tier: u8) -> Option<usize> {
        self.best_peer_of(shown, |entry| entry.tier <= tier)
    }

    /// The same of those that `wanted` says yes to.
    pub(crate) fn best_peer_of(&self, shown: Shown, wanted: impl Fn(&Entry) -> bool) -> Option<usize> {
        let peers = self.entries.iter().enumerate();
        let peers = peers.filter(|(_, entry)| entry.whose == Whose::Peer && wanted(entry));
        let valued = peers.filter_map(|(place, _)| {
            let median = self.report.ways[place].figure(shown.name)?.value.median;
            Some((
                place,
                if shown.better == Better::Higher {
                    -median
                } else {
                    median
                },
            ))
        });
        valued
            .min_by(|one, two| one.1.total_cmp(&two.1))
            .map(|(place, _)| place)
    }

    /// One of our ways against the best peers: of tier 1, and of all where that is another.
    pub(crate) fn against(&self, shown: Shown, way: usize) -> Vec<Against> {
        let ours = self.entries.get(way).is_some_and(|entry| entry.whose == Whose::Ours);
        if !ours || shown.better == Better::Told {
            return Vec::new();
        }
        let mut best = vec![self.best_peer(shown, 1), self.best_peer(shown, 2)];
        best.dedup();
        best.into_iter()
            .flatten()
            .filter_map(|peer| {
                let ratio = self.ratio(shown.name, way, peer)?;
                let worse = match shown.better {
                    Better::Higher => ratio.median < 1.0,
                    Better::Lower | Better::Told => ratio.median > 1.0,
                };
                let entry = &self.entries[peer];
                Some(Against {
                    peer: entry.name.clone(),
                    tier: entry.tier,
                    ratio,
                    loses: worse,
                    unsure: (ratio.lower_quartile..=ratio.upper_quartile).contains(&1.0),
                })
            })
            .collect()
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::time::Duration;

    use tun_driver::lab::measure::{CPU_NS, Plan, Sample, compare};

    use super::*;

    /// Ways with these CPU times per packet in each round, and with `rate` a hundredth of it.
    pub(crate) fn table(ways: &[(&str, Whose, u8, [u64; 3])]) -> Table {
        let names: Vec<&str> = ways.iter().map(|way| way.0).collect();
        let plan = Plan {
            warm_up: 0,
            against_itself: true,
            ..Plan::quick()
        };
        let report = compare(&plan, &names, |turn| {
            let nanos = ways[turn.way].3[turn.round];
            Ok(Sample {
                packets: 1,
                cpu: Duration::from_nanos(nanos),
                wall: Duration::from_nanos(1),
                figures: vec![("rate", nanos as f64 / 100.0), ("none", 0.0)],
            })
        });
        Table {
            case: "drain",
            title: "a title".to_owned(),
            notes: vec!["a note".to_owned()],
            entries: ways
                .iter()
                .map(|&(name, whose, tier, _)| Entry {
                    name: name.to_owned(),
                    whose,
                    tier,
                })
                .collect(),
            report: report.expect("nothing fails"),
            figures: vec![
                Shown {
                    name: CPU_NS,
                    better: Better::Lower,
                },
                Shown {
                    name: "rate",
                    better: Better::Higher,
                },
                Shown {
                    name: "none",
                    better: Better::Told,
                },
            ],
        }
    }

    #[test]
    fn the_best_peer_depends_on_direction_and_tier_and_is_no_floor() {
        let table = table(&[
            ("a", Whose::Peer, 1, [100; 3]),
            ("b", Whose::Peer, 1, [200; 3]),
            ("c", Whose::Peer, 2, [50; 3]),
            ("floor", Whose::Floor, 1, [10; 3]),
            ("we", Whose::Ours, 1, [80, 80, 80]),
        ]);
        assert_eq!(table.best_peer(table.figures[0], 1), Some(0));
        assert_eq!(table.best_peer(table.figures[0], 2), Some(2));
        assert_eq!(
            table.best_peer(table.figures[1], 2),
            Some(1),
            "the greatest rate is the best"
        );
        let cpu = table.against(table.figures[0], 4);
        assert_eq!(cpu.len(), 2);
        assert!(!cpu[0].loses && cpu[0].peer == "a" && cpu[0].ratio.median == 0.8);
        assert!(
            cpu[1].loses && !cpu[1].unsure && cpu[1].peer == "c" && cpu[1].tier == 2,
            "{cpu:?}"
        );
        let rate = table.against(table.figures[1], 4);
        assert!(rate.len() == 1 && rate[0].loses && rate[0].peer == "b", "{rate:?}");
        assert!(
            table.against(table.figures[0], 0).is_empty(),
            "peers are not held against each other"
        );
        assert!(
            table.against(table.figures[2], 4).is_empty(),
            "what is only told is not judged"
        );
    }

    #[test]
    fn ratios_are_formed_within_rounds() {
        let table = table(&[
            ("a", Whose::Peer, 1, [100, 200, 400]),
            ("we", Whose::Ours, 1, [50, 210, 500]),
        ]);
        let ratio = table.ratio(CPU_NS, 1, 0).expect("both are there");
        assert_eq!((ratio.min, ratio.median, ratio.max), (0.5, 1.05, 1.25));
        let against = table.against(table.figures[0], 1);
        assert!(against[0].loses && against[0].unsure, "{against:?}");
        assert_eq!(table.ratio("none", 1, 0), None, "nothing is divided by 0");
        assert_eq!(table.ratio(CPU_NS, 2, 0).map(|ratio| ratio.median), Some(1.0), "A/A");
    }
}
