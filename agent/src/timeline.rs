//! Where the time of a pod's start went: named stages, each with its start and duration since the pod was accepted.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use flint_api::host;

/// Most stages kept for one pod: containers that restart for ever must not grow it.
const MAX_STAGES: usize = 256;

/// The timeline of one pod's start. Clones share it; whoever does a part of the work records its own stages.
#[derive(Clone, Debug)]
pub struct Timeline(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    /// When this flintd began to count.
    origin: Instant,
    /// How old the pod was then.
    age: Duration,
    stages: Mutex<Vec<host::Stage>>,
}

/// A stage that has begun. [`end`](Stage::end) records it; dropped, it leaves no trace, so a failed step is not shown as
/// done.
#[must_use = "a stage is recorded when it ends"]
#[derive(Debug)]
pub struct Stage {
    timeline: Timeline,
    name: String,
    start: Instant,
}

impl Timeline {
    /// A timeline that begins now.
    pub fn new() -> Self {
        Self::resume(Vec::new(), Duration::ZERO)
    }

    /// A timeline that already has stages, for a pod that an earlier flintd accepted so long ago. New stages count from there,
    /// too.
    pub fn resume(stages: Vec<host::Stage>, age: Duration) -> Self {
        Self(Arc::new(Inner {
            origin: Instant::now(),
            age,
            stages: Mutex::new(stages),
        }))
    }

    /// Another timeline that begins when this one did, with what is in it so far: of one of several pods that begin alike.
    pub fn branch(&self) -> Self {
        Self(Arc::new(Inner {
            origin: self.0.origin,
            age: self.0.age,
            stages: Mutex::new(self.stages()),
        }))
    }

    /// Begins a stage, for example `image.pull`.
    pub fn begin(&self, name: impl Into<String>) -> Stage {
        Stage {
            timeline: self.clone(),
            name: name.into(),
            start: Instant::now(),
        }
    }

    /// Records a moment: a stage without a duration.
    pub fn mark(&self, name: impl Into<String>) {
        self.record(name, Instant::now(), Duration::ZERO);
    }

    /// Records a stage that was measured elsewhere.
    pub fn record(&self, name: impl Into<String>, start: Instant, duration: Duration) {
        let stage = host::Stage {
            name: name.into(),
            start: Some(to_proto(self.0.age + start.saturating_duration_since(self.0.origin))),
            duration: Some(to_proto(duration)),
        };
        let mut stages = self.0.stages.lock().unwrap_or_else(PoisonError::into_inner);
        if stages.len() < MAX_STAGES {
            stages.push(stage);
        }
    }

    /// The stages so far, in the order in which they began.
    pub fn stages(&self) -> Vec<host::Stage> {
        let mut stages = self.0.stages.lock().unwrap_or_else(PoisonError::into_inner).clone();
        stages.sort_by_key(|stage| stage.start.map(|start| (start.seconds, start.nanos)));
        stages
    }
}

impl Default for Timeline {
    fn default() -> Self {
        Self::new()
    }
}

impl Stage {
    /// Ends the stage, records it and says how long it took.
    pub fn end(self) -> Duration {
        let duration = self.start.elapsed();
        self.timeline.record(self.name, self.start, duration);
        duration
    }
}

/// A duration as protobuf has it; capped where it does not fit, which takes 292 billion years.
fn to_proto(duration: Duration) -> prost_types::Duration {
    prost_types::Duration {
        seconds: i64::try_from(duration.as_secs()).unwrap_or(i64::MAX),
        // Below one billion by definition, so it fits.
        nanos: i32::try_from(duration.subsec_nanos()).unwrap_or(0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stages_are_listed_by_their_beginning_and_unfinished_ones_are_left_out() {
        let timeline = Timeline::new();
        let outer = timeline.begin("outer");
        timeline.begin("inner").end();
        let _never_ended = timeline.begin("failed");
        outer.end();
        let names: Vec<_> = timeline.stages().into_iter().map(|stage| stage.name).collect();
        assert_eq!(names, ["outer", "inner"]);
    }

    #[test]
    fn stages_of_a_pod_that_was_taken_over_count_from_its_true_start() {
        let first = Timeline::new();
        first.mark("image.pull");
        let hour = Duration::from_secs(3600);
        let second = Timeline::resume(first.stages(), hour);
        second.mark("container.web.start");
        let starts: Vec<_> = second
            .stages()
            .into_iter()
            .map(|stage| stage.start.unwrap().seconds)
            .collect();
        assert!(starts[0] < 60 && starts[1] >= 3600, "{starts:?}");
    }

    #[test]
    fn a_pod_that_restarts_for_ever_does_not_grow_its_timeline_without_end() {
        let timeline = Timeline::new();
        for _ in 0..2 * MAX_STAGES {
            timeline.mark("container.web.start");
        }
        assert_eq!(timeline.stages().len(), MAX_STAGES);
    }
}
