//! What a run leaves behind: text for the terminal, Markdown, JSON, one page of HTML with plots, and histograms for the usual plotters.

mod histograms;
mod html;
mod json;
mod markup;
mod numbers;
#[cfg(test)]
mod sample;
mod svg;
mod tables;
mod text;
pub(crate) mod throughput;
mod verdict;

use std::path::Path;
use std::time::{Duration, SystemTime};

pub(crate) use histograms::hgrm;
pub(crate) use json::json;
pub(crate) use text::text;

use crate::bench::Results;
use crate::{Failure, Files};

/// What [`write_files`] leaves in the folder.
pub(crate) const FILES: &str = "report.html, report.md, bench.json, *.hgrm, *.hlog";

pub(crate) fn write_files(folder: &Path, results: &Results, object: &serde_json::Value) -> Result<(), Failure> {
    let mut files = Files::new(folder);
    files.write("bench.json", &format!("{object:#}\n"));
    files.write("report.md", &text::markdown(results));
    files.write("report.html", &html::page(results));
    let took = Duration::from_secs_f64(results.seconds);
    for group in histograms::groups(results) {
        for (tag, histogram) in &group.entries {
            files.write(&format!("{}-{tag}.hgrm", group.name), &histograms::hgrm(histogram));
        }
        files.write(
            &format!("{}.hlog", group.name),
            &histograms::hlog(
                &group,
                results.began,
                took,
                "Each interval is the whole run: the ways took turns.",
            )?,
        );
    }
    files.end()
}

/// Where the figures come from, as pairs of what and how.
fn provenance(results: &Results) -> Vec<(&'static str, String)> {
    let machine = &results.machine;
    let kind = if machine.virtual_machine {
        "virtual machine"
    } else {
        "bare metal"
    };
    let measures = if machine.mitigations.is_empty() {
        "none".to_owned()
    } else {
        machine.mitigations.join("; ")
    };
    let seconds = results.seconds;
    let took = if seconds < 90.0 {
        format!("{seconds:.0} s")
    } else {
        format!("{:.0} min", seconds / 60.0)
    };
    let incomplete = results
        .incomplete
        .iter()
        .map(|why| ("INCOMPLETE", format!("{why}. What is missing here was not measured.")));
    let mut lines: Vec<_> = incomplete.collect();
    lines.extend([
        (
            "Machine",
            format!(
                "{}, {} CPUs, {kind}, Linux {}",
                machine.cpu_model, machine.cpus, machine.kernel
            ),
        ),
        ("Mitigations", measures),
        (
            "Run",
            format!(
                "{} UTC, {} rounds in {took}, {}, tun-driver {}",
                utc(results.began),
                results.rounds,
                if results.rootless {
                    "in a user namespace"
                } else {
                    "as root"
                },
                env!("CARGO_PKG_VERSION"),
            ),
        ),
        ("Command", results.command.clone()),
    ]);
    if results.debug_build {
        lines.push((
            "DEBUG BUILD",
            "the figures mean nothing; build with --release".to_owned(),
        ));
    }
    if results.quick {
        lines.push((
            "Quick run",
            "too few rounds to be cited; it shows that everything works".to_owned(),
        ));
    }
    lines.extend(results.missing.iter().map(|line| ("Missing", line.clone())));
    lines
}

/// `2026-03-01 12:34`.
fn utc(time: SystemTime) -> String {
    let seconds = time
        .duration_since(SystemTime::UNIX_EPOCH)
        .map_or(0, |since| since.as_secs());
    let (minutes, mut days) = (seconds / 60 % 1440, seconds / 86_400);
    let mut year = 1970;
    let leap = |year: u64| year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400));
    while days >= 365 + u64::from(leap(year)) {
        days -= 365 + u64::from(leap(year));
        year += 1;
    }
    let mut month = 1;
    for length in [31, 28 + u64::from(leap(year)), 31, 30, 31, 30, 31, 31, 30, 31, 30, 31] {
        if days < length {
            break;
        }
        days -= length;
        month += 1;
    }
    format!(
        "{year}-{month:02}-{:02} {:02}:{:02}",
        days + 1,
        minutes / 60,
        minutes % 60
    )
}

/// How the figures came about and what the words mean.
const READING: &[(&str, &str)] = &[
    (
        "Rounds",
        "in each round every way has one turn, in rotating order, after one round of warm-up that does not count. Figures are medians over the \
         rounds; the range beside them (in plots: the whisker) is from the lower to the upper quartile, so half of the rounds lie within it.",
    ),
    (
        "Ratios",
        "are formed inside each round against one way of the same table, so that the machine's drift cancels out. Trust a ratio more than the two \
         figures it comes from. One whose range includes 1 shows no difference.",
    ),
    (
        "Ways",
        "“Iface” is the plain loop: read(2) and write(2), one packet a call; “poll + read” polls before it reads. “worker, io_uring” is this library on a ring with registered buffers; \
         “worker, system calls” is the same library without io_uring. What follows is how it waits: nothing said: it sleeps at once; \
         “spin”: watches for so long, then sleeps; “busy”: never sleeps; “moderate”: while packets keep coming, sleeps for a set time so that several gather.",
    ),
    (
        "CPU",
        "in receive, send, forward and round trip is the measuring thread's own time, what the kernel does inside its calls included. Over offered rates it is the process's; \
         beside it stands what the whole machine spent above idle besides the generator's thread, since waking a thread and work in interrupts are charged to whoever they interrupt.",
    ),
    (
        "Percentiles",
        "p99 = 40 µs: 99 in 100 took 40 µs or less. In the plot of round trips each step to the right is ten times rarer, \
         so that rare delays are as easy to see as common ones.",
    ),
    (
        "Nothing is lost unseen",
        "each packet is accounted for. In receive, send and forward a missing one fails the run; over offered rates the loss is told.",
    ),
];

/// What must not be concluded.
const SILENCE: &[(&str, &str)] = &[
    (
        "Other machines",
        "all of it is one machine at one time. With mitigations off, system calls are cheaper, and io_uring gains less. In a virtual machine, neighbours \
         disturb the rare delays most.",
    ),
    (
        "A network",
        "there is no network card. Generator, kernel and engine share the cores, caches and memory of one host.",
    ),
    (
        "Rare delays of the round trip",
        "the next packet leaves when the last one is back, so that a delay also delays the next question and counts once only. Over \
         offered rates each packet counts from when it was due.",
    ),
    (
        "The far right of percentile plots",
        "the last step rests on a handful of packets.",
    ),
    (
        "Your packets",
        "they are small UDP packets over IPv4, or such of 1400 bytes, without encryption or other work between receiving and sending.",
    ),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn days_are_counted_over_leap_years() {
        let at = |seconds| utc(SystemTime::UNIX_EPOCH + Duration::from_secs(seconds));
        assert_eq!(at(0), "1970-01-01 00:00");
        assert_eq!(at(951_782_400), "2000-02-29 00:00", "date -u -d @951782400");
        assert_eq!(at(1_709_251_199), "2024-02-29 23:59");
        assert_eq!(at(1_767_225_599), "2025-12-31 23:59");
    }
}
