//! The report as text for the terminal, and as Markdown.

use std::fmt::Write;

use comfy_table::{CellAlignment, presets};

use super::tables::{self, Cell, Table};
use super::{READING, SILENCE, provenance, verdict};
use crate::bench::Results;

/// For the terminal: the verdict, and a table per case.
pub(crate) fn text(results: &Results) -> String {
    render(results, "").replace("**", "")
}

/// The same as Markdown, with how it was measured.
pub(super) fn markdown(results: &Results) -> String {
    let mut out = String::from("# tun-driver bench\n\n");
    out.push_str(&render(results, "## "));
    for (heading, points) in [("How to read this", READING), ("What it does not show", SILENCE)] {
        let _ = writeln!(out, "\n## {heading}\n");
        for (about, told) in points {
            let _ = writeln!(out, "- {about}: {told}");
        }
    }
    out
}

fn render(results: &Results, heading: &str) -> String {
    let mut out = String::new();
    for sentence in verdict::sentences(results) {
        let _ = writeln!(out, "{sentence}");
    }
    let _ = writeln!(out);
    for (about, told) in provenance(results) {
        let _ = writeln!(out, "{about}: {told}{}", if heading.is_empty() { "" } else { "  " });
    }
    let mut section = |title: &str, table: &Table| {
        let _ = writeln!(out, "\n{heading}{title}\n\n{}", rendered(table));
    };
    for outcome in &results.outcomes {
        let note = outcome.note.map(|note| format!(" ({note})")).unwrap_or_default();
        section(&format!("{}{note}", outcome.title), &tables::outcome(outcome));
    }
    for curve in &results.curves {
        section(&curve.title, &tables::curve(curve));
    }
    for scaling in &results.scalings {
        section(&scaling.title, &tables::scaling(scaling));
    }
    for acts in &results.acts {
        section(&acts.title, &tables::acts(acts));
    }
    out
}

pub(super) fn rendered(table: &Table) -> comfy_table::Table {
    let mut drawn = comfy_table::Table::new();
    drawn
        .load_style(presets::ASCII_MARKDOWN)
        .set_header(table.columns.iter().map(|column| &column.name));
    for row in &table.rows {
        drawn.add_row(row.iter().map(|Cell { value, range }| match range {
            Some(range) => format!("{value} [{range}]"),
            None => value.clone(),
        }));
    }
    for column in drawn.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    drawn
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::sample;

    #[test]
    fn every_section_and_way_is_in_both_forms() {
        let results = sample::results();
        for told in [text(&results), markdown(&results)] {
            for outcome in &results.outcomes {
                assert!(told.contains(&outcome.title));
                assert!(outcome.report.ways.iter().all(|way| told.contains(&way.name)));
            }
            let curve = &results.curves[0];
            assert!(told.contains(&curve.title) && curve.lines.iter().all(|line| told.contains(&line.way)));
            let scaling = &results.scalings[0];
            assert!(told.contains(&scaling.title) && scaling.rows.iter().all(|row| told.contains(&row.name)));
            let acts = &results.acts[0];
            assert!(told.contains(&acts.title) && acts.rows.iter().all(|row| told.contains(&row.name)));
        }
        assert!(!text(&results).contains("INCOMPLETE") && !text(&results).contains("DEBUG BUILD"));
        let debug = Results {
            debug_build: true,
            ..sample::results()
        };
        for told in [text(&debug), markdown(&debug)] {
            assert!(told.contains("DEBUG BUILD: the figures mean nothing"), "{told}");
        }
        let cut = Results {
            incomplete: Some("interrupted in “receive”".to_owned()),
            ..sample::results()
        };
        for told in [text(&cut), markdown(&cut)] {
            assert!(told.contains("INCOMPLETE: interrupted in “receive”"), "{told}");
        }
        assert!(!text(&results).contains("**"));
        assert!(markdown(&results).contains("**"));
    }
}
