//! Pauses between tries of what does not work just now: reaching a guest, writing a log.
//!
//! Neither tells when it would work again: a connection that a guest refuses and a file system that is full give no event. So
//! the next try comes after a pause, doubled up to a bound, and is called off by what is told: the sandbox's end.

use std::time::Duration;

use crate::backend::Sandbox;

const FIRST: Duration = Duration::from_millis(100);
const LONGEST: Duration = Duration::from_secs(5);

/// Failures in a row.
#[derive(Debug, Default)]
pub(super) struct Retry {
    failures: u32,
}

impl Retry {
    /// It works.
    pub(super) fn worked(&mut self) {
        self.failures = 0;
    }

    /// After a failure: waits until the next try is due; false if the sandbox has ended, and there is nothing to try.
    pub(super) async fn again(&mut self, sandbox: &dyn Sandbox) -> bool {
        let pause = pause(self.failures);
        self.failures = self.failures.saturating_add(1);
        tokio::select! {
            biased;
            _ = sandbox.exited() => false,
            () = tokio::time::sleep(pause) => true,
        }
    }

    /// How many tries have failed.
    pub(super) fn failures(&self) -> u32 {
        self.failures
    }
}

fn pause(failures: u32) -> Duration {
    FIRST.saturating_mul(2_u32.saturating_pow(failures)).min(LONGEST)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_up_to_a_bound() {
        let pauses = [0, 1, 2, 5, 6, 40].map(|failures| pause(failures).as_millis());
        assert_eq!(pauses, [100, 200, 400, 3200, 5000, 5000]);
    }
}
