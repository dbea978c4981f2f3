//! docs/RELIABILITY.md names every fault of the catalogue once, and only tests that exist.
//!
//! Skipped where the test runs without the repository beside it.

use std::fs;
use std::path::Path;

fn rows() -> Option<Vec<Vec<String>>> {
    if !root().join("Cargo.toml").exists() {
        eprintln!("skipped: the repository is not at {}", root().display());
        return None;
    }
    let text = fs::read_to_string(root().join("docs/RELIABILITY.md")).expect("docs/RELIABILITY.md");
    let rows = text
        .lines()
        .filter(|line| line.starts_with("| T") && !line.starts_with("| T |"));
    let cells = |row: &str| {
        row.trim_matches('|')
            .split('|')
            .map(|cell| cell.trim().to_owned())
            .collect()
    };
    Some(rows.map(cells).collect())
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

#[test]
fn every_fault_has_one_row() {
    let Some(rows) = rows() else { return };
    let faults: Vec<String> = rows.into_iter().map(|row| row[0].clone()).collect();
    let expected: Vec<String> = (1..=36).map(|number| format!("T{number}")).collect();
    assert_eq!(faults, expected);
}

#[test]
fn every_row_is_whole() {
    for row in rows().into_iter().flatten() {
        assert_eq!(row.len(), 5, "{row:?}");
        assert!(row.iter().all(|cell| !cell.is_empty()), "{row:?}");
    }
}

/// A name is looked for up to its first ellipsis, as the rest may be put together when tests run.
#[test]
fn every_named_test_exists() {
    let Some(rows) = rows() else { return };
    let mut named = 0;
    for row in rows {
        let mut file = String::new();
        for (place, part) in row[2].split(['`', '"']).enumerate() {
            // Outside of quotation marks.
            if place % 2 == 0 {
                continue;
            }
            if part.ends_with(".rs") {
                file =
                    fs::read_to_string(root().join(part)).unwrap_or_else(|error| panic!("{}: {part}: {error}", row[0]));
                continue;
            }
            if part.contains('/') {
                assert!(root().join(part).exists(), "{}: there is no {part}", row[0]);
                continue;
            }
            let words = part.split('…').find(|words| !words.trim().is_empty()).expect("a name");
            assert!(
                file.contains(words.trim()),
                "{}: no test {part:?} in the file named before it",
                row[0]
            );
            named += 1;
        }
    }
    assert!(named >= 36, "only {named} tests are named");
}
