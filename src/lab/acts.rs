//! How long it takes to reach a worker, and to stop an engine.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;

use super::Sandbox;
use super::cases::{DISCARD, Net};
use super::generator::{Config, Generator, Limit};
use super::results::{Act, Acts};
use crate::{Batch, Builder, Engine, Handler, Mode, PortId, Wait, Worker, WorkerConfig};

/// What a stop of a loaded engine must keep.
pub const STOP_BOUND: Duration = Duration::from_millis(100);

/// Throws packets away.
struct Nothing;

impl Handler for Nothing {
    fn packets(&mut self, _: &mut Worker, _: PortId, _: &mut Batch) {}
}

/// Measures: how long a command takes to a worker that sleeps, that spins, and that is busy with 200,000
/// packets per second; and how long it takes to stop an engine of two workers, idle and under load. `wakes` and `stops` of each.
///
/// # Errors
/// What the engine or the kernel says; `TimedOut` if a stop was not clean.
pub fn acts(_: &Sandbox, wakes: usize, stops: usize) -> io::Result<Acts> {
    let block = Wait::Block;
    let spin = Wait::Spin {
        duration: Duration::from_millis(1),
    };
    let mut rows = vec![
        act("command to a sleeping worker", None, || wake(block, false, wakes))?,
        act("command to a spinning worker", None, || wake(spin, false, wakes))?,
        act("command to a busy worker, default waiting", None, || {
            wake(Wait::default(), true, wakes)
        })?,
        act("stop, 2 idle workers", Some(STOP_BOUND), || stop(false, stops))?,
        act("stop, 2 loaded workers", Some(STOP_BOUND), || stop(true, stops))?,
    ];
    share_delay(&mut rows);
    Ok(Acts {
        title: "reach a worker, stop an engine".to_owned(),
        rows,
    })
}

/// Measures an act; where something is promised, beside a thread that shows how busy the machine
/// is.
fn act(name: &str, bound: Option<Duration>, measure: impl FnOnce() -> io::Result<Histogram<u64>>) -> io::Result<Act> {
    let (took, delay) = match bound {
        Some(_) => beside_a_sleeper(measure),
        None => (measure(), Duration::ZERO),
    };
    Ok(Act {
        name: name.to_owned(),
        took: took?,
        bound,
        delay,
    })
}

/// A machine that is busy in one act may be so in the next one, for moments that its sleeper did not
/// see: the longest delay counts for every promise.
fn share_delay(rows: &mut [Act]) {
    let worst = rows.iter().map(|row| row.delay).max().unwrap_or_default();
    for row in rows.iter_mut().filter(|row| row.bound.is_some()) {
        row.delay = worst;
    }
}

/// Ends the thread beside an act, also where the act panics: the scope would wait for it.
struct End<'a>(&'a AtomicBool);

impl Drop for End<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Release);
    }
}

/// Runs `work`. Returns also how late a thread that only sleeps woke meanwhile, at worst.
fn beside_a_sleeper<T>(work: impl FnOnce() -> T) -> (T, Duration) {
    const NAP: Duration = Duration::from_millis(1);

    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        let end = End(&over);
        let sleeper = scope.spawn(|| {
            let mut worst = Duration::ZERO;
            while !over.load(Ordering::Acquire) {
                let began = Instant::now();
                thread::sleep(NAP);
                worst = worst.max(began.elapsed().saturating_sub(NAP));
            }
            worst
        });
        let result = work();
        drop(end);
        let worst = sleeper.join();
        (result, worst.unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
    })
}

fn histogram() -> io::Result<Histogram<u64>> {
    Histogram::new_with_bounds(1, 60_000_000_000, 3).map_err(io::Error::other)
}

fn start(wait: Wait, queues: usize) -> io::Result<(Engine<Nothing>, Net)> {
    let net = Net::next();
    let device = Builder::new(&net.name, Mode::Tun)
        .queues(queues)
        .address(net.address(1), 24)
        .up(true)
        .open()?;
    let config = WorkerConfig {
        wait,
        ..WorkerConfig::default()
    };
    let engine = Engine::builder()
        .device(device)
        .workers(queues)
        .config(config)
        .start(|_| Ok(Nothing))?;
    Ok((engine, net))
}

/// Runs `work` while packets come to the device.
fn under_load<T>(net: &Net, load: bool, work: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
    if !load {
        return work();
    }
    let config = Config {
        flows: 8,
        rate: Some(200_000),
        limit: Limit::Time(Duration::from_secs(60)),
        wake_ahead: Duration::MAX,
        ..Config::new(net.peer(DISCARD).into())
    };
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        let end = End(&over);
        let generate = scope.spawn(|| Generator::new(&config)?.run(&over).map(drop));
        thread::sleep(Duration::from_millis(5));
        let result = work();
        drop(end);
        // The device may be gone by now, which the generator takes for an error.
        let _ = generate.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        result
    })
}

fn wake(wait: Wait, load: bool, count: usize) -> io::Result<Histogram<u64>> {
    let (engine, net) = start(wait, 1)?;
    let mut took = histogram()?;
    under_load(&net, load, || {
        for _ in 0..count {
            // So that it sleeps again, or is in the middle of something else.
            thread::sleep(Duration::from_micros(300));
            let asked = Instant::now();
            let answered = engine.run_on(0, |_, _| Instant::now())?;
            took.saturating_record((answered - asked).as_nanos() as u64);
        }
        Ok(())
    })?;
    Ok(took)
}

fn stop(load: bool, count: usize) -> io::Result<Histogram<u64>> {
    let mut took = histogram()?;
    for _ in 0..count {
        let (engine, net) = start(Wait::default(), 2)?;
        let report = under_load(&net, load, || Ok(engine.stop_within(Duration::from_secs(10))))?;
        if !report.is_clean() {
            return Err(io::Error::new(
                io::ErrorKind::TimedOut,
                format!("not a clean stop: {report}"),
            ));
        }
        took.saturating_record(report.took.as_nanos() as u64);
    }
    Ok(took)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_that_is_busy_in_one_act_excuses_the_others() {
        let mut took = histogram().unwrap();
        took.record(STOP_BOUND.as_nanos() as u64 * 2).unwrap();
        let row = |bound, delay| Act {
            name: "stop".to_owned(),
            took: took.clone(),
            bound,
            delay,
        };
        let judged = |delay| {
            let mut rows = [
                row(None, Duration::ZERO),
                row(Some(STOP_BOUND), Duration::ZERO),
                row(Some(STOP_BOUND), delay),
            ];
            share_delay(&mut rows);
            assert_eq!(rows[0].delay, Duration::ZERO);
            rows.map(|row| row.kept())
        };
        assert_eq!(judged(Duration::ZERO), [None, Some(false), Some(false)]);
        assert_eq!(judged(STOP_BOUND), [None, None, None]);
    }

    #[test]
    fn an_act_that_panics_ends_the_sleeper_beside_it() {
        let (done, outcome) = std::sync::mpsc::channel();
        // Not joined: one that does not end would hold up the test as well.
        thread::spawn(move || {
            let panicked = std::panic::catch_unwind(|| beside_a_sleeper(|| panic!("an act failed"))).is_err();
            let _ = done.send(panicked);
        });
        assert_eq!(outcome.recv_timeout(Duration::from_secs(60)), Ok(true));
    }
}
