//! What pods' timelines say: every stage of many starts, and the boundaries that starts are compared by.

use std::time::Duration;

use flint_api::host::Stage;

use crate::Error;
use crate::host::CONTAINER;
use crate::report::Report;
use crate::samples::StageSamples;

/// The stages of many starts.
#[derive(Debug, Default)]
pub struct Stages(Vec<StageSamples>);

impl Stages {
    pub fn add(&mut self, timeline: &[Stage]) -> Result<(), Error> {
        for stage in timeline {
            let (start, duration) = (span(stage.start)?, span(stage.duration)?);
            match self.0.iter_mut().find(|samples| samples.name() == stage.name) {
                Some(samples) => samples.push(start, duration),
                None => {
                    let mut samples = StageSamples::new(&stage.name);
                    samples.push(start, duration);
                    self.0.push(samples);
                }
            }
        }
        Ok(())
    }

    /// Puts them into the report.
    pub fn finish(self, report: &mut Report) {
        self.0.into_iter().for_each(|stage| report.add_stage(stage));
    }
}

/// How a pod's machine came to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// Its kernel booted.
    Booted,
    /// It is a clone of the pool's.
    Cloned,
}

/// Where a start was when.
#[derive(Debug, PartialEq, Eq)]
pub struct Boundaries {
    pub way: Way,
    /// From the spawn of flint-vmm until flint-init has dialled, or from the claim until it has acknowledged its identity.
    pub ready: Duration,
    /// From the pod's acceptance until its container's first output.
    pub output: Duration,
}

impl Boundaries {
    /// Those of a start that went well.
    pub fn of(timeline: &[Stage]) -> Result<Self, Error> {
        let output = end_of(timeline, &format!("container.{CONTAINER}.first-output"))?;
        let (way, begin, end) = if has(timeline, "pool.claim") {
            (Way::Cloned, "pool.claim", "guest.identity")
        } else {
            (Way::Booted, "vmm.spawn", "vmm.boot")
        };
        let ready = end_of(timeline, end)?.saturating_sub(span(find(timeline, begin)?.start)?);
        Ok(Self { way, ready, output })
    }
}

fn has(timeline: &[Stage], name: &str) -> bool {
    timeline.iter().any(|stage| stage.name == name)
}

fn find<'a>(timeline: &'a [Stage], name: &str) -> Result<&'a Stage, Error> {
    timeline
        .iter()
        .find(|stage| stage.name == name)
        .ok_or_else(|| format!("the timeline has no stage {name}").into())
}

fn end_of(timeline: &[Stage], name: &str) -> Result<Duration, Error> {
    let stage = find(timeline, name)?;
    Ok(span(stage.start)? + span(stage.duration)?)
}

fn span(duration: Option<prost_types::Duration>) -> Result<Duration, Error> {
    Ok(Duration::try_from(duration.unwrap_or_default())?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stage(name: &str, start: i32, duration: i32) -> Stage {
        let span = |ms: i32| {
            Some(prost_types::Duration {
                seconds: 0,
                nanos: ms * 1_000_000,
            })
        };
        Stage {
            name: name.into(),
            start: span(start),
            duration: span(duration),
        }
    }

    #[test]
    fn boundaries_come_from_the_stages_that_mark_them() {
        let ms = Duration::from_millis;
        let output = stage("container.main.first-output", 120, 30);
        let booted = [stage("vmm.spawn", 5, 3), stage("vmm.boot", 10, 90), output.clone()];
        let cloned = [stage("pool.claim", 4, 1), stage("guest.identity", 20, 6), output];

        let (way, ready, output) = (Way::Booted, ms(95), ms(150));
        assert_eq!(Boundaries::of(&booted).unwrap(), Boundaries { way, ready, output });
        let (way, ready) = (Way::Cloned, ms(22));
        assert_eq!(Boundaries::of(&cloned).unwrap(), Boundaries { way, ready, output });
        assert!(
            Boundaries::of(&booted[..1]).is_err(),
            "a timeline without its stages is no sample"
        );
    }
}
