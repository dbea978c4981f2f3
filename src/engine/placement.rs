//! Which core a worker runs on.

use std::fmt;

use core_affinity::CoreId;

use crate::error::{OpenError, OpenErrorKind};
use crate::sys::cpu;

/// Where the workers of an engine run.
///
/// Only cores are used that the thread which starts the engine may use: cpusets and taskset(1) are respected. A thread that is pinned itself
/// may use one core only.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Placement {
    /// Worker k on the k-th core, beginning anew where there are more workers than cores.
    #[default]
    OnePerCore,
    /// Worker k on the k-th core of this list, beginning anew at its end.
    Cores(Vec<usize>),
    /// Wherever the scheduler puts them.
    Unpinned,
}

/// What became of a worker's placement.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Pin {
    /// It runs on this core and no other: the kernel said so when it was asked.
    Core(usize),
    /// It was to run on this core, and the kernel did not agree; it runs wherever the scheduler puts it.
    Failed {
        /// The core.
        core: usize,
        /// What the kernel says instead.
        why: String,
    },
    /// It was not to be pinned.
    Unpinned,
    /// It was to be pinned, and the kernel does not say which cores the thread may use; it runs
    /// wherever the scheduler puts it.
    Unknown {
        /// What the kernel says instead.
        why: String,
    },
}

impl fmt::Display for Pin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Core(core) => write!(f, "on core {core}"),
            Self::Failed { core, why } => write!(f, "on any core, as core {core} was refused: {why}"),
            Self::Unpinned => f.write_str("on any core"),
            Self::Unknown { why } => write!(f, "on any core, as the usable ones are not known: {why}"),
        }
    }
}

/// The cores that the calling thread may use, in rising order; or why they are not known.
///
/// `core_affinity` holds 1,024 cores. On a machine with more possible cores the kernel refuses its
/// mask, and a longer one is tried.
pub(super) fn usable_cores() -> Result<Vec<usize>, String> {
    if let Some(cores) = core_affinity::get_core_ids().filter(|cores| !cores.is_empty()) {
        let mut cores: Vec<usize> = cores.into_iter().map(|core| core.id).collect();
        cores.sort_unstable();
        return Ok(cores);
    }
    cpu::allowed().map_err(|error| format!("sched_getaffinity: {error}"))
}

/// Where a worker is to run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Place {
    Core(usize),
    Anywhere,
    /// The cores are not known.
    Unknown(String),
}

impl Placement {
    /// A place for each worker.
    pub(super) fn assign(&self, workers: usize, usable: &Result<Vec<usize>, String>) -> Result<Vec<Place>, OpenError> {
        let cores = match (self, usable) {
            (Placement::Unpinned, _) => return Ok(vec![Place::Anywhere; workers]),
            (Placement::OnePerCore, Err(why)) => return Ok(vec![Place::Unknown(why.clone()); workers]),
            (Placement::OnePerCore, Ok(usable)) => usable,
            (Placement::Cores(cores), usable) => {
                if let Ok(usable) = usable
                    && let Some(core) = cores.iter().find(|core| !usable.contains(core))
                {
                    let detail = format!("core {core} is not one of those that this thread may use: {usable:?}");
                    return Err(OpenError::refused(OpenErrorKind::InvalidSetting, "placement", detail));
                }
                cores
            }
        };
        if cores.is_empty() {
            let detail = "no core to place workers on; give at least one, or Placement::Unpinned";
            return Err(OpenError::refused(OpenErrorKind::InvalidSetting, "placement", detail));
        }
        Ok((0..workers)
            .map(|worker| Place::Core(cores[worker % cores.len()]))
            .collect())
    }
}

/// Puts the calling thread where it belongs, and asks the kernel whether it is there.
pub(super) fn pin(place: Place) -> Pin {
    let core = match place {
        Place::Core(core) => core,
        Place::Anywhere => return Pin::Unpinned,
        Place::Unknown(why) => return Pin::Unknown { why },
    };
    // `core_affinity` does not return the errno, so a refusal is asked for again.
    let asked = if core < libc::CPU_SETSIZE as usize && core_affinity::set_for_current(CoreId { id: core }) {
        Ok(())
    } else {
        cpu::pin_thread(core)
    };
    match (cpu::allowed(), asked) {
        (Ok(cores), _) if cores == [core] => Pin::Core(core),
        (_, Err(error)) => Pin::Failed {
            core,
            why: format!("sched_setaffinity: {error}"),
        },
        (Ok(cores), Ok(())) => Pin::Failed {
            core,
            why: format!("it may run on {cores:?}"),
        },
        (Err(error), Ok(())) => Pin::Failed {
            core,
            why: format!("sched_getaffinity: {error}"),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn workers_take_turns_on_the_cores() {
        assert_eq!(
            Placement::OnePerCore.assign(3, &Ok(vec![4, 7])).unwrap(),
            [4, 7, 4].map(Place::Core)
        );
        assert_eq!(
            Placement::Cores(vec![7]).assign(2, &Ok(vec![4, 7])).unwrap(),
            [7, 7].map(Place::Core)
        );
        assert_eq!(Placement::Unpinned.assign(1, &Ok(vec![])).unwrap(), [Place::Anywhere]);
        // Not knowing the cores keeps no engine from starting.
        let unknown = Err("why".to_owned());
        assert_eq!(
            Placement::OnePerCore.assign(1, &unknown).unwrap(),
            [Place::Unknown("why".to_owned())]
        );
        assert_eq!(Placement::Cores(vec![7]).assign(1, &unknown).unwrap(), [Place::Core(7)]);
        assert_eq!(Placement::Unpinned.assign(1, &unknown).unwrap(), [Place::Anywhere]);
    }

    #[test]
    fn a_core_out_of_reach_is_refused_by_name() {
        let error = Placement::Cores(vec![0, 900]).assign(1, &Ok(vec![0, 1])).unwrap_err();
        assert_eq!(error.kind(), OpenErrorKind::InvalidSetting);
        assert!(error.to_string().contains("900"), "{error}");
        assert!(Placement::Cores(vec![]).assign(1, &Ok(vec![0])).is_err());
    }

    #[test]
    fn a_pin_is_read_back() {
        std::thread::spawn(|| {
            let core = *usable_cores()
                .expect("a mask")
                .last()
                .expect("this thread runs somewhere");
            assert_eq!(pin(Place::Core(core)), Pin::Core(core));
            assert_eq!(pin(Place::Anywhere), Pin::Unpinned);
            for core in [1023, 1024, usize::MAX] {
                assert!(matches!(pin(Place::Core(core)), Pin::Failed { .. }));
            }
            assert_eq!(usable_cores(), Ok(vec![core]));
        })
        .join()
        .expect("no panic");
    }
}
