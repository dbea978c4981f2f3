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
}

impl fmt::Display for Pin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Core(core) => write!(f, "on core {core}"),
            Self::Failed { core, why } => write!(f, "on any core, as core {core} was refused: {why}"),
            Self::Unpinned => f.write_str("on any core"),
        }
    }
}

/// The cores that the calling thread may use, in rising order.
pub(super) fn usable_cores() -> Vec<usize> {
    let mut cores: Vec<usize> = core_affinity::get_core_ids()
        .unwrap_or_default()
        .into_iter()
        .map(|core| core.id)
        .collect();
    cores.sort_unstable();
    cores
}

impl Placement {
    /// A core for each worker.
    pub(super) fn assign(&self, workers: usize, usable: &[usize]) -> Result<Vec<Option<usize>>, OpenError> {
        let cores = match self {
            Placement::Unpinned => return Ok(vec![None; workers]),
            Placement::OnePerCore => usable,
            Placement::Cores(cores) => {
                if let Some(core) = cores.iter().find(|core| !usable.contains(core)) {
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
        Ok((0..workers).map(|worker| Some(cores[worker % cores.len()])).collect())
    }
}

/// Puts the calling thread on `core`, and asks the kernel whether it is there.
pub(super) fn pin(core: Option<usize>) -> Pin {
    let Some(core) = core else { return Pin::Unpinned };
    let asked = core_affinity::set_for_current(CoreId { id: core });
    match cpu::allowed() {
        Ok(cores) if cores == [core] => Pin::Core(core),
        Ok(cores) => Pin::Failed {
            core,
            why: if asked {
                format!("it may run on {cores:?}")
            } else {
                // For the errno, which the crate does not tell.
                cpu::pin_thread(core).err().map_or_else(
                    || format!("it may run on {cores:?}"),
                    |error| format!("sched_setaffinity: {error}"),
                )
            },
        },
        Err(error) => Pin::Failed {
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
            Placement::OnePerCore.assign(3, &[4, 7]).unwrap(),
            [Some(4), Some(7), Some(4)]
        );
        assert_eq!(
            Placement::Cores(vec![7]).assign(2, &[4, 7]).unwrap(),
            [Some(7), Some(7)]
        );
        assert_eq!(Placement::Unpinned.assign(1, &[]).unwrap(), [None]);
    }

    #[test]
    fn a_core_out_of_reach_is_refused_by_name() {
        let error = Placement::Cores(vec![0, 900]).assign(1, &[0, 1]).unwrap_err();
        assert_eq!(error.kind(), OpenErrorKind::InvalidSetting);
        assert!(error.to_string().contains("900"), "{error}");
        assert!(Placement::Cores(vec![]).assign(1, &[0]).is_err());
    }

    #[test]
    fn a_pin_is_read_back() {
        std::thread::spawn(|| {
            let core = *usable_cores().last().expect("this thread runs somewhere");
            assert_eq!(pin(Some(core)), Pin::Core(core));
            assert_eq!(pin(None), Pin::Unpinned);
            assert!(matches!(pin(Some(1023)), Pin::Failed { core: 1023, .. }));
            assert_eq!(usable_cores(), [core]);
        })
        .join()
        .expect("no panic");
    }
}
