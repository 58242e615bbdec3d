//! Raw samples, and the few figures that are said of them.

use std::time::Duration;

use serde::Serialize;

/// Durations of one thing, in the order they were taken.
#[derive(Debug, Clone, Serialize)]
pub struct Samples {
    /// What was timed, from where to where.
    pub name: String,
    /// Nanoseconds.
    samples_ns: Vec<u64>,
}

impl Samples {
    pub fn new(name: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            samples_ns: Vec::new(),
        }
    }

    pub fn push(&mut self, sample: Duration) {
        self.samples_ns
            .push(u64::try_from(sample.as_nanos()).unwrap_or(u64::MAX));
    }

    pub fn len(&self) -> usize {
        self.samples_ns.len()
    }

    pub fn median(&self) -> Option<Duration> {
        self.quantile(1, 2)
    }

    /// The sample that `numerator / denominator` of all are no greater than (nearest rank): always one that was taken.
    pub fn quantile(&self, numerator: usize, denominator: usize) -> Option<Duration> {
        let mut sorted = self.samples_ns.clone();
        sorted.sort_unstable();
        let rank = (sorted.len() * numerator).div_ceil(denominator).max(1);
        sorted.get(rank - 1).copied().map(Duration::from_nanos)
    }
}

/// One stage of many starts: when it began, counted from the start's own beginning, and how long it took.
#[derive(Debug, Clone, Serialize)]
pub struct StageSamples {
    pub starts: Samples,
    pub durations: Samples,
}

impl StageSamples {
    pub fn new(name: &str) -> Self {
        Self {
            starts: Samples::new(format!("{name}: start")),
            durations: Samples::new(name),
        }
    }

    pub fn name(&self) -> &str {
        &self.durations.name
    }

    pub fn push(&mut self, start: Duration, duration: Duration) {
        self.starts.push(start);
        self.durations.push(duration);
    }

    /// A stage that never takes time is a moment, such as a program's first output: its start says all.
    pub fn is_moment(&self) -> bool {
        self.durations.quantile(1, 1) == Some(Duration::ZERO)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_stage_that_never_took_time_is_a_moment() {
        let mut stage = StageSamples::new("first-output");
        stage.push(Duration::from_millis(7), Duration::ZERO);
        assert!(stage.is_moment());

        stage.push(Duration::from_millis(7), Duration::from_nanos(1));
        assert!(!stage.is_moment());
    }

    #[test]
    fn quantiles_are_samples_that_were_taken() {
        let mut samples = Samples::new("test");
        assert_eq!(samples.median(), None);
        for ms in [30, 10, 50, 20, 40] {
            samples.push(Duration::from_millis(ms));
        }

        assert_eq!(samples.median(), Some(Duration::from_millis(30)));
        assert_eq!(samples.quantile(0, 1), Some(Duration::from_millis(10)));
        assert_eq!(samples.quantile(99, 100), Some(Duration::from_millis(50)));
        assert_eq!(samples.quantile(1, 5), Some(Duration::from_millis(10)));
    }
}
