//! Pauses between tries: 10 s, doubling up to 5 min, as a kubelet makes them.

use std::time::Duration;

const FIRST: Duration = Duration::from_secs(10);
const LONGEST: Duration = Duration::from_secs(300);
/// A container that ran this long has recovered: its next failure counts as the first.
const RECOVERED: Duration = Duration::from_secs(600);

/// Counts failures. Plain data, so that it outlives flintd.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Backoff {
    failures: u32,
}

impl Backoff {
    /// As it was saved by [`failures`](Self::failures).
    pub fn resume(failures: u32) -> Self {
        Self { failures }
    }

    /// Failures in a row so far.
    pub fn failures(self) -> u32 {
        self.failures
    }

    /// The pause after a failed try.
    pub fn after_failure(&mut self) -> Duration {
        let pause = pause(self.failures);
        self.failures = self.failures.saturating_add(1);
        pause
    }

    /// The pause before something that ran for a while is run again: none the first time.
    pub fn after_run(&mut self, ran: Duration) -> Duration {
        if ran >= RECOVERED {
            self.failures = 0;
        }
        let pause = self.failures.checked_sub(1).map_or(Duration::ZERO, pause);
        self.failures = self.failures.saturating_add(1);
        pause
    }

    /// The pause that the last call gave, for a flintd that has to wait for it anew.
    pub fn current(self) -> Duration {
        self.failures.checked_sub(2).map_or(Duration::ZERO, pause)
    }
}

/// The pause after `earlier` failures: doubled for each.
fn pause(earlier: u32) -> Duration {
    2u32.checked_pow(earlier)
        .and_then(|factor| FIRST.checked_mul(factor))
        .map_or(LONGEST, |pause| pause.min(LONGEST))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tries_are_10_seconds_apart_then_double_up_to_5_minutes() {
        let mut backoff = Backoff::default();
        let pauses: Vec<_> = (0..7).map(|_| backoff.after_failure().as_secs()).collect();
        assert_eq!(pauses, [10, 20, 40, 80, 160, 300, 300]);
        assert_eq!(Backoff::resume(u32::MAX).after_failure(), LONGEST);
    }

    #[test]
    fn the_first_restart_is_immediate_and_a_long_run_starts_the_count_again() {
        let mut backoff = Backoff::default();
        let short = Duration::from_secs(1);
        let pauses: Vec<_> = (0..4).map(|_| backoff.after_run(short).as_secs()).collect();
        assert_eq!(pauses, [0, 10, 20, 40]);
        assert_eq!(backoff.current().as_secs(), 40);
        assert_eq!(backoff.after_run(RECOVERED), Duration::ZERO);
        assert_eq!(backoff.after_run(short).as_secs(), 10);
    }
}
