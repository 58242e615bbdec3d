//! What the store keeps of a pod: what was asked for, the status as the API shows it, and what a later flintd needs to go
//! on. Protobuf, so that a record can grow. Secrets are not in it.

use std::time::{Duration, SystemTime};

use flint_api::host;
use prost::Message;

use super::{
    backoff::Backoff,
    container::{Container, ImageStep, State},
    machine::{Life, Machine, Pause},
    system_time, timestamp,
};

/// A pod as the store keeps it.
#[derive(Clone, PartialEq, Message)]
pub struct PodRecord {
    /// As the API shows it.
    #[prost(message, optional, tag = "1")]
    pub pod: Option<host::Pod>,
    /// Empty: no sandbox was asked for yet.
    #[prost(string, tag = "2")]
    pub sandbox_id: String,
    /// In the order of the spec.
    #[prost(message, repeated, tag = "3")]
    pub containers: Vec<ContainerRecord>,
    /// Failures in a row of making the sandbox.
    #[prost(uint32, tag = "4")]
    pub sandbox_failures: u32,
    /// When the grace period is over, for a pod that is to end.
    #[prost(message, optional, tag = "5")]
    pub terminate_by: Option<prost_types::Timestamp>,
    /// Whether nothing will happen any more.
    #[prost(bool, tag = "6")]
    pub ended: bool,
    /// The snapshot that its sandbox is to be made of; empty: its images, because it was not made of one, or its sandbox was there.
    #[prost(string, tag = "7")]
    pub from: String,
    /// Memory of the saved machine that it was made of, which may be more than its spec says.
    #[prost(uint64, tag = "8")]
    pub saved_memory_bytes: u64,
}

/// A container as the store keeps it, beside its status.
#[derive(Clone, PartialEq, Message)]
pub struct ContainerRecord {
    /// Number of the present run.
    #[prost(uint32, tag = "1")]
    pub run: u32,
    /// Whether a run was begun at all.
    #[prost(bool, tag = "2")]
    pub begun: bool,
    /// Failures in a row.
    #[prost(uint32, tag = "3")]
    pub failures: u32,
}

impl PodRecord {
    /// Notes the machine's state. `terminate_by` was noted when the wish came and stays.
    pub fn note(&mut self, machine: &Machine, timeline: Vec<host::Stage>) {
        let Some(pod) = &mut self.pod else { return };
        let earlier = pod.status.take().unwrap_or_default();
        pod.status = Some(host::PodStatus {
            created_at: earlier.created_at,
            observed_generation: pod.meta.as_ref().map_or(0, |meta| meta.generation),
            timeline,
            ..machine.status()
        });
        self.sandbox_failures = machine.sandbox_backoff.failures();
        self.ended = machine.life == Life::Ended;
        if !machine.restoring || self.ended {
            self.from.clear();
        }
        self.containers = machine
            .containers
            .iter()
            .map(|container| ContainerRecord {
                run: container.run,
                begun: container.begun,
                failures: container.backoff.failures(),
            })
            .collect();
    }

    /// The machine as it was when the record was written, but for what depends on the sandbox: that is found out anew.
    pub fn machine(&self, now: SystemTime) -> Machine {
        let pod = self.pod.clone().unwrap_or_default();
        let status = pod.status.unwrap_or_default();
        let mut machine = Machine::new(&pod.spec.unwrap_or_default());
        machine.sandbox_backoff = Backoff::resume(self.sandbox_failures);
        machine.started_at = status.started_at.map(system_time);
        machine.finished_at = status.finished_at.map(system_time);
        machine.reason = status.reason;
        machine.message = status.message;
        machine.terminating = self.grace_left(now);
        machine.restoring = !self.from.is_empty();
        if self.ended {
            machine.life = Life::Ended;
        } else if !self.sandbox_id.is_empty() {
            machine.life = Life::Launching;
            // Whether it does stand still is found out with the sandbox.
            machine.pause = status.paused_at.map(|at| Pause::new(system_time(at), true));
        }
        for ((container, record), status) in machine
            .containers
            .iter_mut()
            .zip(&self.containers)
            .zip(status.containers)
        {
            restore(container, record, status);
        }
        machine
    }

    /// What is left of the grace period of a pod that is to end.
    pub fn grace_left(&self, now: SystemTime) -> Option<Duration> {
        self.terminate_by
            .map(|by| system_time(by).duration_since(now).unwrap_or_default())
    }

    /// Notes that the pod is to end.
    pub fn terminate(&mut self, grace: Duration, now: SystemTime) {
        let by = now.checked_add(grace).unwrap_or(now);
        if self.terminate_by.is_none_or(|earlier| system_time(earlier) > by) {
            self.terminate_by = Some(timestamp(by));
        }
    }
}

fn restore(container: &mut Container, record: &ContainerRecord, status: host::ContainerStatus) {
    use host::container_status::State as Shown;
    container.run = record.run;
    container.begun = record.begun;
    container.backoff = Backoff::resume(record.failures);
    container.restarts = status.restart_count;
    container.last = status.last_termination;
    if !status.image_digest.is_empty() {
        container.image = ImageStep::Ready(status.image_digest);
    }
    container.state = match status.state {
        Some(Shown::Running(running)) => State::Running {
            since: running.started_at.map_or(SystemTime::UNIX_EPOCH, system_time),
        },
        Some(Shown::Terminated(terminated)) => State::Ended(terminated),
        Some(Shown::Waiting(waiting)) => State::Waiting {
            reason: waiting.reason,
            message: waiting.message,
        },
        None => State::Waiting {
            reason: "PodInitializing".into(),
            message: String::new(),
        },
    };
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pods::machine::{Action, Event};

    fn record(machine: &Machine) -> PodRecord {
        let spec = host::PodSpec {
            containers: vec![host::Container {
                name: "web".into(),
                ..Default::default()
            }],
            ..Default::default()
        };
        let mut record = PodRecord {
            pod: Some(host::Pod {
                spec: Some(spec),
                ..Default::default()
            }),
            ..Default::default()
        };
        record.note(machine, Vec::new());
        PodRecord::decode(record.encode_to_vec().as_slice()).expect("what was encoded decodes")
    }

    fn running() -> Machine {
        let spec = host::PodSpec {
            containers: vec![host::Container {
                name: "web".into(),
                ..Default::default()
            }],
            ..Default::default()
        };
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1000);
        let mut machine = Machine::new(&spec);
        machine.handle(Event::Start, now);
        machine.handle(
            Event::Pulled {
                container: 0,
                result: Ok("sha256:1".into()),
            },
            now,
        );
        machine.handle(Event::Launched(Ok(vec!["10.0.0.2".into()])), now);
        machine.handle(Event::Started { container: 0, run: 0 }, now);
        machine
    }

    #[test]
    fn a_running_pod_comes_back_with_the_same_status_when_its_sandbox_is_found() {
        let before = running();
        let mut record = record(&before);
        record.sandbox_id = "s".into();
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(2000);
        let mut after = record.machine(now);
        let actions = after.handle(
            Event::TakenOver {
                addresses: vec!["10.0.0.2".into()],
                started: vec![0],
            },
            now,
        );
        assert_eq!(actions, []);
        assert_eq!(after.status(), before.status());
    }

    #[test]
    fn the_grace_period_goes_on_over_a_restart_of_flintd() {
        let start = SystemTime::UNIX_EPOCH + Duration::from_secs(1000);
        let mut record = record(&running());
        record.sandbox_id = "s".into();
        record.terminate(Duration::from_secs(30), start);
        let later = start + Duration::from_secs(12);
        let mut machine = record.machine(later);
        let actions = machine.handle(
            Event::TakenOver {
                addresses: Vec::new(),
                started: vec![0],
            },
            later,
        );
        assert!(actions.contains(&Action::Stop(0)));
        assert!(actions.contains(&Action::Arm(
            crate::pods::machine::Timer::Grace,
            Duration::from_secs(18)
        )));
    }
}
