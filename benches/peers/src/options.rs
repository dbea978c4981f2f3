//! The command line.

use std::path::PathBuf;

use crate::cases::ALL;

/// What is asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Options {
    /// Rounds that count.
    pub(crate) rounds: usize,
    /// Not to be quoted.
    pub(crate) quick: bool,
    /// Names of the cases, in their order.
    pub(crate) cases: Vec<&'static str>,
    /// Parts of names of the ways; all if empty.
    pub(crate) only: Vec<String>,
    /// Where the files go.
    pub(crate) out: PathBuf,
}

/// For `--help` and after a wrong option.
pub(crate) const USAGE: &str = "\
Compares tun_driver with other TUN/TAP libraries, in throw-away network namespaces. Needs root or user namespaces.

options:
  --case NAME   drain, sink, latency, rates, wire-udp or wire-tcp; may be given several times; all unless given
  --only WORD   only ways whose name contains WORD, besides tun-rs sync and the plain loop; may be given several times
  --rounds N    rounds that count, after one of warm-up; 10 unless given
  --quick       3 rounds: shows that everything works, not to be quoted
  --out DIR     where peers.json and peers.md go; target/peers unless given
  --help        this

exit codes: 0 measured, 1 something failed, 2 wrong options, 77 something that was asked for cannot be measured here";

/// Reads the arguments; `None` where help is asked for.
pub(crate) fn parse(arguments: impl IntoIterator<Item = String>) -> Result<Option<Options>, String> {
    let mut options = Options {
        rounds: 10,
        quick: false,
        cases: Vec::new(),
        only: Vec::new(),
        out: PathBuf::from("target/peers"),
    };
    let (mut rounds, mut wanted) = (None, Vec::new());
    let mut arguments = arguments.into_iter();
    while let Some(argument) = arguments.next() {
        let mut value = |what: &str| arguments.next().ok_or(format!("{argument} needs {what}"));
        match argument.as_str() {
            "--help" | "-h" => return Ok(None),
            "--quick" => options.quick = true,
            "--rounds" => {
                let number = value("a number")?;
                match number.parse::<usize>() {
                    Ok(number) if number > 0 => rounds = Some(number),
                    _ => return Err(format!("--rounds {number}: not a number above 0")),
                }
            }
            "--case" => {
                let name = value("the name of a case")?;
                if !ALL.contains(&name.as_str()) {
                    return Err(format!("--case {name}: there are {}", ALL.join(", ")));
                }
                wanted.push(name);
            }
            "--only" => {
                let word = value("a part of a name")?;
                options.only.push(word);
            }
            "--out" => options.out = value("a directory")?.into(),
            other => return Err(format!("{other}: unknown option")),
        }
    }
    options.rounds = rounds.unwrap_or(if options.quick { 3 } else { options.rounds });
    options.cases = ALL
        .into_iter()
        .filter(|case| wanted.is_empty() || wanted.iter().any(|name| name == case))
        .collect();
    Ok(Some(options))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(arguments: &str) -> Result<Option<Options>, String> {
        parse(arguments.split_whitespace().map(str::to_owned))
    }

    #[test]
    fn defaults() {
        let options = parsed("").unwrap().unwrap();
        assert_eq!((options.rounds, options.quick), (10, false));
        assert_eq!(options.cases, ALL);
        assert_eq!(parsed("--quick").unwrap().unwrap().rounds, 3);
        assert_eq!(parsed("--quick --rounds 5").unwrap().unwrap().rounds, 5);
        assert_eq!(parsed("--rounds 5 --quick").unwrap().unwrap().rounds, 5);
    }

    #[test]
    fn cases_come_in_their_own_order() {
        let options = parsed("--case wire-tcp --case drain --only tokio --out x")
            .unwrap()
            .unwrap();
        assert_eq!(options.cases, ["drain", "wire-tcp"]);
        assert_eq!(options.only, ["tokio"]);
        assert_eq!(options.out, PathBuf::from("x"));
    }

    #[test]
    fn nonsense_is_refused() {
        for wrong in [
            "--rounds 0",
            "--rounds",
            "--rounds many",
            "--case nothing",
            "--case",
            "--out",
            "--bogus",
            "x",
        ] {
            assert!(parsed(wrong).is_err(), "{wrong}");
        }
        assert_eq!(parsed("--help"), Ok(None));
    }
}
