//! What became of numbered packets: order, loss, duplicates, damage, flow by flow.

use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;

use super::packet::{Fault, Stamp};

/// Takes every packet that arrives and keeps the books of each flow. Sequences of each flow start at 0.
///
/// In steady state (packets in order, flows known) it allocates nothing; each gap takes 8 bytes while it is open.
#[derive(Clone, Debug, Default)]
pub struct Tracker {
    flows: Vec<Flow>,
    foreign: u64,
    faults: BTreeMap<&'static str, u64>,
}

/// The books of all flows together. `Display` says them in one line.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Summary {
    /// Whole packets that came, each counted once.
    pub received: u64,
    /// Packets that did not come: gaps in the sequence, and with [`Tracker::sent`] the missing end.
    pub lost: u64,
    /// Packets that came after one with a higher number of the same flow.
    pub late: u64,
    /// Packets that had come before.
    pub duplicates: u64,
    /// Packets that were never sent, as far as [`Tracker::sent`] was told.
    pub invented: u64,
    /// Damaged packets: cut, padded or changed.
    pub damaged: u64,
    /// Packets that are none of ours (ARP, neighbour discovery, …).
    pub foreign: u64,
    /// Flows that something came from.
    pub flows: usize,
    /// The damaged ones by kind.
    pub faults: BTreeMap<&'static str, u64>,
}

#[derive(Clone, Debug, Default)]
struct Flow {
    /// One above the highest number that came.
    next: u32,
    received: u64,
    late: u64,
    duplicates: u64,
    /// Numbers below `next` that did not come, in rising order.
    missing: Vec<Range<u32>>,
    /// How many were sent, where the caller said so.
    sent: Option<u32>,
}

impl Tracker {
    /// Room for flows 0 … `flows` - 1. More are taken, at the price of an allocation.
    pub fn new(flows: usize) -> Self {
        Self {
            flows: vec![Flow::default(); flows],
            ..Self::default()
        }
    }

    /// Takes what [`check`](super::packet::Framing::check) said of a packet.
    pub fn record(&mut self, packet: Result<Stamp, Fault>) {
        match packet {
            Ok(stamp) => self.flow(stamp.flow).record(stamp.sequence),
            Err(Fault::Foreign) => self.foreign += 1,
            Err(fault) => {
                let name = match fault {
                    Fault::Length => "length",
                    Fault::Header => "header",
                    Fault::HeaderChecksum => "header checksum",
                    _ => "corrupted",
                };
                *self.faults.entry(name).or_default() += 1;
            }
        }
    }

    /// Says that numbers 0 … `count` - 1 of `flow` were sent: those that did not come by the time of the summary count as lost.
    pub fn sent(&mut self, flow: u16, count: u32) {
        self.flow(flow).sent = Some(count);
    }

    /// Takes over the books of another tracker of the same flows, such as another thread's.
    ///
    /// As if one tracker had seen all packets, also where both saw packets of one flow: what one lacks and the other has is not missing, and
    /// what both have is a duplicate. Only [`Summary::late`] is not exact then: in which order the two saw theirs is not known, so it counts
    /// what was late where it came. Where both were told how many were sent, the greater number holds.
    pub fn merge(&mut self, other: &Self) {
        self.foreign += other.foreign;
        for (&name, count) in &other.faults {
            *self.faults.entry(name).or_default() += count;
        }
        for (index, flow) in other.flows.iter().enumerate() {
            self.flow(index as u16).merge(flow);
        }
    }

    /// Whole packets so far, duplicates not counted.
    pub fn received(&self) -> u64 {
        self.flows.iter().map(|flow| flow.received).sum()
    }

    /// The books as they stand.
    pub fn summary(&self) -> Summary {
        let mut summary = Summary {
            foreign: self.foreign,
            damaged: self.faults.values().sum(),
            faults: self.faults.clone(),
            ..Summary::default()
        };
        for flow in &self.flows {
            let gaps: u64 = flow.missing.iter().map(|gap| u64::from(gap.end - gap.start)).sum();
            summary.received += flow.received;
            summary.late += flow.late;
            summary.duplicates += flow.duplicates;
            summary.flows += usize::from(flow.received > 0);
            match flow.sent {
                None => summary.lost += gaps,
                Some(sent) => {
                    let invented = flow.received_from(sent);
                    summary.invented += invented;
                    summary.lost += u64::from(sent) - (flow.received - invented);
                }
            }
        }
        summary
    }

    fn flow(&mut self, flow: u16) -> &mut Flow {
        let index = usize::from(flow);
        if index >= self.flows.len() {
            self.flows.resize(index + 1, Flow::default());
        }
        &mut self.flows[index]
    }
}

impl Summary {
    /// Panics unless what came was whole, in order, and came once. Loss is allowed.
    pub fn assert_orderly(&self) {
        assert!(
            self.late == 0 && self.duplicates == 0 && self.invented == 0 && self.damaged == 0,
            "{self}"
        );
    }

    /// Panics unless all came, whole, in order, once. Foreign packets are allowed.
    pub fn assert_all(&self) {
        self.assert_orderly();
        assert!(self.lost == 0 && self.received > 0, "{self}");
    }
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            received,
            lost,
            late,
            duplicates,
            invented,
            damaged,
            foreign,
            flows,
            faults,
        } = self;
        write!(
            f,
            "{received} received of {flows} flows, {lost} lost, {late} late, {duplicates} duplicates, {invented} invented, \
             {damaged} damaged"
        )?;
        if !faults.is_empty() {
            write!(f, " {faults:?}")?;
        }
        write!(f, ", {foreign} foreign")
    }
}

impl Flow {
    fn record(&mut self, sequence: u32) {
        if sequence >= self.next {
            if sequence > self.next {
                self.missing.push(self.next..sequence);
            }
            self.next = sequence.saturating_add(1);
            self.received += 1;
            return;
        }
        let at = self.missing.partition_point(|gap| gap.end <= sequence);
        match self.missing.get(at).cloned() {
            Some(gap) if gap.contains(&sequence) => {
                self.late += 1;
                self.received += 1;
                let parts = [gap.start..sequence, sequence + 1..gap.end];
                self.missing
                    .splice(at..=at, parts.into_iter().filter(|part| !part.is_empty()));
            }
            _ => self.duplicates += 1,
        }
    }

    fn merge(&mut self, other: &Self) {
        let next = self.next.max(other.next);
        // Behind its highest number, a flow lacks all.
        let gaps = |flow: &Self| {
            let end = (flow.next < next).then_some(flow.next..next);
            flow.missing.iter().cloned().chain(end).collect::<Vec<_>>()
        };
        let (mine, others) = (gaps(self), gaps(other));
        self.missing.clear();
        let (mut one, mut two) = (0, 0);
        while let (Some(a), Some(b)) = (mine.get(one), others.get(two)) {
            let both = a.start.max(b.start)..a.end.min(b.end);
            if !both.is_empty() {
                self.missing.push(both);
            }
            if a.end <= b.end {
                one += 1;
            } else {
                two += 1;
            }
        }
        self.next = next;
        let came = self.received + other.received;
        self.received = self.received_from(0);
        self.duplicates += other.duplicates + (came - self.received);
        self.late += other.late;
        self.sent = self.sent.max(other.sent);
    }

    /// How many numbers from `from` on have come.
    fn received_from(&self, from: u32) -> u64 {
        let missing: u64 = self
            .missing
            .iter()
            .map(|gap| u64::from(gap.end.saturating_sub(gap.start.max(from))))
            .sum();
        u64::from(self.next.saturating_sub(from)) - missing
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::HashSet;

    fn stamp(flow: u16, sequence: u32) -> Result<Stamp, Fault> {
        Ok(Stamp {
            flow,
            sequence,
            length: 16,
            sent: 0,
        })
    }

    proptest! {
        /// Against books kept the slow way.
        #[test]
        fn books_agree_with_a_plain_model(
            packets in prop::collection::vec((0u16..3, 0u32..40), 0..200),
            sent in prop::collection::vec(prop::option::of(0u32..50), 3),
        ) {
            let mut tracker = Tracker::new(1);
            let mut expected = Summary::default();
            let mut seen = [HashSet::new(), HashSet::new(), HashSet::new()];
            let mut highest = [None; 3];
            for &(flow, sequence) in &packets {
                tracker.record(stamp(flow, sequence));
                let index = usize::from(flow);
                if !seen[index].insert(sequence) {
                    expected.duplicates += 1;
                    continue;
                }
                expected.received += 1;
                expected.late += u64::from(highest[index].is_some_and(|highest| sequence < highest));
                highest[index] = highest[index].max(Some(sequence));
            }
            for (index, &sent) in sent.iter().enumerate() {
                if let Some(sent) = sent {
                    tracker.sent(index as u16, sent);
                }
                let end = sent.unwrap_or(highest[index].map_or(0, |highest| highest + 1));
                expected.lost += (0..end).filter(|sequence| !seen[index].contains(sequence)).count() as u64;
                expected.invented += seen[index].iter().filter(|&&sequence| sequence >= end).count() as u64;
                expected.flows += usize::from(!seen[index].is_empty());
            }
            prop_assert_eq!(tracker.summary(), expected);
        }

        /// Against one tracker that saw the packets of both.
        #[test]
        fn merged_books_are_those_of_one_tracker(
            packets in prop::collection::vec((0u16..3, 0u32..40, any::<bool>()), 0..200),
            sent in prop::collection::vec(prop::option::of(0u32..50), 3),
        ) {
            let mut whole = Tracker::new(3);
            let mut parts = [Tracker::new(1), Tracker::new(3)];
            for &(flow, sequence, second) in &packets {
                whole.record(stamp(flow, sequence));
                parts[usize::from(second)].record(stamp(flow, sequence));
            }
            for part in &mut parts {
                part.record(Err(Fault::Foreign));
                part.record(Err(Fault::Corrupted));
                whole.record(Err(Fault::Foreign));
                whole.record(Err(Fault::Corrupted));
            }
            for (flow, &sent) in sent.iter().enumerate() {
                if let Some(sent) = sent {
                    whole.sent(flow as u16, sent);
                    parts[flow % 2].sent(flow as u16, sent);
                }
            }
            let [mut merged, other] = parts;
            merged.merge(&other);
            let mut summary = merged.summary();
            summary.late = whole.summary().late;
            prop_assert_eq!(&summary, &whole.summary());
            // The books can be gone on with: what is missing is known number by number.
            for sequence in 0..50 {
                whole.record(stamp(0, sequence));
                merged.record(stamp(0, sequence));
            }
            let mut summary = merged.summary();
            summary.late = whole.summary().late;
            prop_assert_eq!(summary, whole.summary());
        }
    }

    #[test]
    fn each_wrong_makes_the_assertion_fail() {
        let mut good = Tracker::new(1);
        (0..10).for_each(|sequence| good.record(stamp(0, sequence)));
        good.record(Err(Fault::Foreign));
        good.sent(0, 10);
        good.summary().assert_all();

        type Wrong = (&'static str, fn(&mut Tracker));
        let wrongs: [Wrong; 5] = [
            ("late or duplicate", |tracker| tracker.record(stamp(0, 3))),
            ("damaged", |tracker| tracker.record(Err(Fault::Corrupted))),
            ("cut", |tracker| tracker.record(Err(Fault::Length))),
            ("invented", |tracker| tracker.record(stamp(0, 10))),
            ("lost", |tracker| tracker.sent(0, 11)),
        ];
        for (name, wrong) in wrongs {
            let mut tracker = good.clone();
            wrong(&mut tracker);
            assert!(
                std::panic::catch_unwind(|| tracker.summary().assert_all()).is_err(),
                "{name}"
            );
        }
        let nothing = std::panic::catch_unwind(|| Tracker::new(1).summary().assert_all());
        assert!(nothing.is_err(), "nothing received is not everything received");
    }
}
