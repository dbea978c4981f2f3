//! Histograms for the usual plotters: `.hgrm` (a percentile table each) and `.hlog` (HdrHistogram's interval log, a tag each).

use std::fmt::Write;
use std::io;
use std::time::{Duration, SystemTime};

use hdrhistogram::Histogram;
use hdrhistogram::serialization::V2DeflateSerializer;
use hdrhistogram::serialization::interval_log::{IntervalLogWriterBuilder, Tag};

use crate::bench::Results;

/// Histograms that belong into one file; values in nanoseconds.
pub(super) struct Group<'a> {
    /// Its file's name without extension.
    pub(super) name: String,
    pub(super) entries: Vec<(String, &'a Histogram<u64>)>,
}

/// All histograms of a run. Names and tags are made of letters, digits and `-`, and no two are the same.
pub(super) fn groups(results: &Results) -> Vec<Group<'_>> {
    let mut groups = Vec::new();
    for outcome in &results.outcomes {
        let names = outcome.report.ways.iter().map(|way| way.name.as_str());
        groups.push((
            outcome.key.to_owned(),
            names.map(str::to_owned).zip(&outcome.histograms).collect(),
        ));
    }
    for curve in &results.curves {
        let points = curve
            .lines
            .iter()
            .flat_map(|line| line.points.iter().map(|point| (&line.way, point)));
        let entries = points.filter_map(|(way, point)| {
            let offered = point.offered_pps.map_or("max".to_owned(), |rate| format!("{rate} pps"));
            Some((format!("{way}, {offered}"), point.latency.as_ref()?))
        });
        groups.push(("rates".to_owned(), entries.collect()));
    }
    for scaling in &results.scalings {
        let queues = scaling.rows.iter().flat_map(|row| {
            row.hand_over
                .iter()
                .enumerate()
                .map(move |(queue, one)| (row, queue, one))
        });
        let entries = queues.map(|(row, queue, one)| (format!("{}, q{queue}", row.name), one));
        groups.push(("hand-over".to_owned(), entries.collect()));
    }
    for acts in &results.acts {
        let entries = acts.rows.iter().map(|act| (act.name.clone(), &act.took));
        groups.push(("acts".to_owned(), entries.collect()));
    }
    let mut names = Vec::new();
    groups
        .into_iter()
        .filter(|(_, entries): &(String, Vec<_>)| !entries.is_empty())
        .map(|(name, entries)| {
            let mut tags = Vec::new();
            let entries = entries
                .into_iter()
                .map(|(tag, histogram)| (unused(&tag, &mut tags), histogram))
                .collect();
            Group {
                name: unused(&name, &mut names),
                entries,
            }
        })
        .collect()
}

/// `name` as a file's name or tag, with a number behind it if it was used before.
fn unused(name: &str, used: &mut Vec<String>) -> String {
    let words = name.replace('µ', "u");
    let words: Vec<&str> = words
        .split(|c: char| !c.is_ascii_alphanumeric() && c != '_')
        .filter(|word| !word.is_empty())
        .collect();
    let slug = words.join("-");
    let free = (1..).map(|count| {
        if count == 1 {
            slug.clone()
        } else {
            format!("{slug}-{count}")
        }
    });
    let free = free
        .into_iter()
        .find(|candidate| !used.contains(candidate))
        .unwrap_or(slug);
    used.push(free.clone());
    free
}

/// An interval log with one interval, which `told` says a word about.
pub(super) fn hlog(group: &Group<'_>, began: SystemTime, took: Duration, told: &str) -> io::Result<String> {
    let mut out = Vec::new();
    let mut serializer = V2DeflateSerializer::new();
    let mut writer = IntervalLogWriterBuilder::new()
        .add_comment("[Histogram log format version 1.3]")
        .add_comment(&format!("Values are nanoseconds. {told}"))
        .with_start_time(began)
        .with_base_time(began)
        .with_max_value_divisor(1e6) // the log's own column for the maximum is in milliseconds, as the Java writer has it
        .begin_log_with(&mut out, &mut serializer)?;
    for (tag, histogram) in &group.entries {
        writer
            .write_histogram(histogram, Duration::ZERO, took, Tag::new(tag))
            .map_err(|error| io::Error::other(format!("histogram {tag}: {error}")))?;
    }
    String::from_utf8(out).map_err(io::Error::other)
}

/// A percentile table as HdrHistogram's plotters read it; values in microseconds.
pub(crate) fn hgrm(histogram: &Histogram<u64>) -> String {
    let mut out = String::from("       Value     Percentile TotalCount 1/(1-Percentile)\n\n");
    let mut count = 0;
    for step in histogram.iter_quantiles(5) {
        count += step.count_since_last_iteration();
        let (value, share) = (step.value_iterated_to() as f64 / 1e3, step.quantile_iterated_to());
        let _ = write!(out, "{value:12.3} {share:2.12} {count:10}");
        let _ = if share < 1.0 {
            writeln!(out, " {:14.2}", 1.0 / (1.0 - share))
        } else {
            writeln!(out)
        };
    }
    let _ = writeln!(
        out,
        "#[Mean    = {:12.3}, StdDeviation   = {:12.3}]",
        histogram.mean() / 1e3,
        histogram.stdev() / 1e3
    );
    let _ = writeln!(
        out,
        "#[Max     = {:12.3}, Total count    = {:12}]",
        histogram.max() as f64 / 1e3,
        histogram.len()
    );
    let _ = writeln!(
        out,
        "#[Buckets = {:12}, SubBuckets     = {:12}]",
        histogram.buckets(),
        histogram.distinct_values()
    );
    out
}

#[cfg(test)]
mod tests {
    use base64::Engine;
    use base64::engine::general_purpose::STANDARD;
    use hdrhistogram::serialization::Deserializer;
    use hdrhistogram::serialization::interval_log::{IntervalLogIterator, LogEntry};

    use super::*;

    #[test]
    fn percentile_table_counts_every_value_and_ends_with_the_greatest() {
        let mut histogram = Histogram::<u64>::new(3).unwrap();
        for value in 1..=1_000 {
            histogram.record(value * 1_000).unwrap();
        }
        let table = hgrm(&histogram);
        let rows: Vec<Vec<f64>> = table
            .lines()
            .skip(2)
            .filter(|line| !line.starts_with('#'))
            .map(|line| line.split_whitespace().map(|word| word.parse().unwrap()).collect())
            .collect();
        let last = rows.last().unwrap();
        assert_eq!(last[2], 1_000.0);
        assert!((last[0] - 1_000.0).abs() <= 1.0, "{last:?}");
        assert!(
            rows.windows(2)
                .all(|pair| pair[0][0] <= pair[1][0] && pair[0][2] <= pair[1][2])
        );
        assert!(rows.iter().all(|row| row.len() == if row[1] < 1.0 { 4 } else { 3 }));
    }

    #[test]
    fn interval_logs_are_read_back_as_they_were() {
        let results = crate::report::sample::results();
        let groups = groups(&results);
        assert!(groups.len() >= 4, "round trips, rates, hand-over and acts");
        for group in &groups {
            let took = Duration::from_millis(95_500);
            let log = hlog(group, results.began, took, "A word.").unwrap();
            let mut entries = IntervalLogIterator::new(log.as_bytes()).map(|entry| entry.unwrap());
            let began = results.began.duration_since(SystemTime::UNIX_EPOCH).unwrap();
            assert_eq!(entries.next(), Some(LogEntry::StartTime(began)));
            assert_eq!(entries.next(), Some(LogEntry::BaseTime(began)));
            let mut read = 0;
            for (entry, (tag, histogram)) in entries.by_ref().zip(&group.entries) {
                let LogEntry::Interval(interval) = entry else {
                    panic!("{entry:?}")
                };
                assert_eq!(interval.tag(), Tag::new(tag));
                assert_eq!(
                    (interval.start_timestamp(), interval.duration()),
                    (Duration::ZERO, took)
                );
                assert!((interval.max() - histogram.max() as f64 / 1e6).abs() < 0.001);
                let bytes = STANDARD.decode(interval.encoded_histogram()).unwrap();
                let decoded: Histogram<u64> = Deserializer::new().deserialize(&mut &bytes[..]).unwrap();
                assert_eq!(&decoded, *histogram);
                read += 1;
            }
            assert_eq!(read, group.entries.len(), "{}", group.name);
            assert_eq!(entries.next(), None);
        }
    }

    #[test]
    fn no_two_names_are_the_same() {
        let mut used = Vec::new();
        assert_eq!(
            unused("worker, io_uring, spin 100µs", &mut used),
            "worker-io_uring-spin-100us"
        );
        assert_eq!(
            unused("worker: io_uring (spin 100us)", &mut used),
            "worker-io_uring-spin-100us-2"
        );
        assert_eq!(
            unused("worker, io_uring, spin 100µs", &mut used),
            "worker-io_uring-spin-100us-3"
        );
    }
}
