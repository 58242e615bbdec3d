//! A machine whose containers do nothing gives back the memory of files that were read and not read again: the host has better use
//! for it, and free page reporting takes it there.
//!
//! ```text
//!   containers' CPU time at each look   . . 0 0 0 0 0 . . 0 0
//!                                           |         |
//!                                           |         `-- they work again; has most of it been read again meanwhile?
//!                                           `-- idle for a whole period: once, inactive file pages are reclaimed
//! ```
//!
//! What the kernel calls inactive goes, and no more: programs that are mapped, and files that were read again, stay. A machine that
//! reads most of it again was not as idle as it looked: the next time it is left alone for twice as long.

use std::{fs, io, path::Path, time::Duration};

use tokio::{task::spawn_blocking, time::sleep};

use crate::{
    cgroup::{Cgroup, keyed_value},
    paths, stats,
};

/// Of one CPU's time: containers that use less are idle. A loop that sleeps and looks is.
const IDLE_SHARE: u32 = 100;
/// Less than that is left where it is.
const WORTHWHILE: u64 = 4 << 20;
/// What is reclaimed at a time, so that whoever needs memory meanwhile does not wait for all of it.
const STEP: u64 = 16 << 20;
/// So many periods at most are waited for.
const LONGEST: u32 = 64;
const PAGE: u64 = 4096;

/// What the machine has done so far.
#[derive(Debug, Clone, Copy, Default)]
struct Look {
    /// CPU time of the containers.
    cpu: Duration,
    /// Bytes of files that were reclaimed and had to be read again.
    read_again: u64,
}

/// What was given back, and what had been read again before.
#[derive(Debug, Clone, Copy)]
struct Given {
    bytes: u64,
    read_again: u64,
}

/// How long the machine has been idle.
#[derive(Debug)]
struct Idleness {
    last: Look,
    /// Idle periods, one after the other.
    periods: u32,
    /// After so many of them memory is given back.
    wanted: u32,
    given: Option<Given>,
}

impl Idleness {
    fn new(now: Look) -> Self {
        Self {
            last: now,
            periods: 0,
            wanted: 1,
            given: None,
        }
    }

    /// Whether it is time to give memory back, at the end of a period.
    fn is_due(&mut self, now: Look, period: Duration) -> bool {
        let used = now.cpu.saturating_sub(self.last.cpu);
        self.last = now;
        if used < period / IDLE_SHARE {
            self.periods = self.periods.saturating_add(1);
            return self.given.is_none() && self.periods >= self.wanted;
        }
        self.periods = 0;
        if let Some(given) = self.given.take() {
            let again = now.read_again.saturating_sub(given.read_again);
            self.wanted = if again > given.bytes / 2 {
                (self.wanted * 2).min(LONGEST)
            } else {
                1
            };
        }
        false
    }

    fn gave(&mut self, bytes: u64) {
        let read_again = self.last.read_again;
        self.given = Some(Given { bytes, read_again });
    }
}

/// Gives memory back whenever the containers have been idle for so long. Never ends.
pub async fn watch(period: Duration) {
    let containers = Cgroup::new(Path::new(paths::CGROUP_ROOT).join(paths::CGROUP_PARENT.trim_start_matches('/')));
    let mut idleness = Idleness::new(look(&containers));
    loop {
        sleep(period).await;
        if idleness.is_due(look(&containers), period) {
            // It ends only if it panics, which it does not.
            let given = spawn_blocking(give_back).await.unwrap_or(0);
            idleness.gave(given);
        }
    }
}

fn look(containers: &Cgroup) -> Look {
    let events = fs::read_to_string("/proc/vmstat").unwrap_or_default();
    let pages = keyed_value(&events, "workingset_refault_file").unwrap_or(0);
    Look {
        cpu: Duration::from_micros(containers.keyed("cpu.stat", "usage_usec").unwrap_or(0)),
        read_again: pages.saturating_mul(PAGE),
    }
}

/// Has the kernel reclaim the file pages that are not in use; how many bytes it was asked for.
fn give_back() -> u64 {
    let inactive = stats::inactive_files();
    if inactive < WORTHWHILE {
        return 0;
    }
    let mut asked = 0;
    while asked < inactive {
        let step = STEP.min(inactive - asked);
        match reclaim(step) {
            Ok(()) => asked += step,
            // It has found less: what is dirty, or in use by now.
            Err(error) if error.raw_os_error() == Some(libc::EAGAIN) => break,
            Err(error) => {
                eprintln!("flint-init: giving memory of files back: {error}");
                break;
            }
        }
    }
    asked
}

/// cgroup v2's memory.reclaim, of all there is.
fn reclaim(bytes: u64) -> io::Result<()> {
    fs::write(Path::new(paths::CGROUP_ROOT).join("memory.reclaim"), bytes.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    const PERIOD: Duration = Duration::from_secs(60);

    fn look(cpu_ms: u64, read_again: u64) -> Look {
        Look {
            cpu: Duration::from_millis(cpu_ms),
            read_again,
        }
    }

    #[test]
    fn memory_is_given_back_once_when_a_whole_period_was_idle() {
        let mut idleness = Idleness::new(look(0, 0));
        assert!(!idleness.is_due(look(600, 0), PERIOD), "a hundredth of a CPU is work");
        assert!(idleness.is_due(look(1199, 0), PERIOD));
        idleness.gave(100);
        assert!(!idleness.is_due(look(1200, 0), PERIOD), "it has been given back");
        assert!(!idleness.is_due(look(9000, 0), PERIOD));
        assert!(idleness.is_due(look(9000, 0), PERIOD), "another time");
    }

    #[test]
    fn what_is_read_again_is_left_alone_for_longer_each_time() {
        let mut idleness = Idleness::new(look(0, 0));
        let mut cpu_ms = 0;
        // Idle until something is given back; in how many periods, and how much of it is read again then.
        let mut round = |again| {
            let mut periods = 1;
            while !idleness.is_due(look(cpu_ms, 0), PERIOD) {
                periods += 1;
            }
            idleness.gave(100);
            cpu_ms += 9000;
            assert!(!idleness.is_due(look(cpu_ms, again), PERIOD));
            idleness.last.read_again = 0;
            periods
        };
        assert_eq!([60, 60, 60, 40, 40].map(&mut round), [1, 2, 4, 8, 1]);
        let most = (0..20).map(|_| round(100)).max();
        assert_eq!(most, Some(LONGEST));
    }
}
