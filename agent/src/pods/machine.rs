//! A pod's state machine: events in, actions out, no input or output of its own.
//!
//! ```text
//!            Start              all images           Launched            all containers ended,
//!   (new) ----------> Pulling ------------> Launching --------> Up ----------------------------> Stopping --> Ended
//!                        ^                   |    ^             |    or asked to terminate           |          ^
//!                        | retry             | err| relaunch    | sandbox died, policy: again        | sandbox  |
//!                     (timers)               v    |             v                                    | gone     |
//!                                         BackingOff <----------+                                    +----------+
//! ```
//!
//! A pod that is up may be paused: its sandbox stands still, and what would have it do something waits.
//!
//! Whoever owns a machine performs the actions and brings their results back as events; an action may be performed
//! again at any time (a new flintd does so), and an event that no longer fits is ignored.

use std::time::{Duration, SystemTime};

use flint_api::{guest, host, vmm::ExitReason};

pub use super::event::{Action, Event, StepError, Timer};
use super::{
    backoff::Backoff,
    container::{Container, ImageStep, State},
    timestamp,
};
use crate::backend::SandboxExit;

/// How long a pod that was shut down may take until its VMM is killed.
const SHUTDOWN_PATIENCE: Duration = Duration::from_secs(10);
/// Why a pod ends whose snapshot this host cannot run.
pub(super) const SNAPSHOT_REFUSED: &str = "SnapshotRefused";
/// Why a pod ends that could not be made ready for where it goes on.
pub(super) const AFTER_RESTORE_FAILED: &str = "AfterRestoreFailed";
/// How long `ErrImagePull` stands before it becomes `ImagePullBackOff`.
const PULL_ERROR_STANDS: Duration = Duration::from_secs(1);

/// Where a pod is in its life; the module's picture shows the ways.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Life {
    /// Waits for its images.
    Pulling,
    /// The sandbox is being made.
    Launching,
    /// The sandbox runs.
    Up,
    /// There is no sandbox; one will be made when the pause is over.
    BackingOff,
    /// The guest was asked to shut down.
    Stopping,
    /// Nothing will happen any more.
    Ended,
}

/// A pod that stands still.
#[derive(Clone, Debug)]
pub(super) struct Pause {
    pub(super) since: SystemTime,
    /// What became of its containers is not known yet: a guest that stands still cannot be asked.
    pub(super) unseen: bool,
    /// Timers that came meanwhile.
    held: Vec<Timer>,
}

impl Pause {
    pub(super) fn new(since: SystemTime, unseen: bool) -> Self {
        Self {
            since,
            unseen,
            held: Vec::new(),
        }
    }
}

/// The state of one pod.
#[derive(Clone, Debug)]
pub struct Machine {
    pub(super) policy: host::RestartPolicy,
    pub(super) life: Life,
    pub(super) containers: Vec<Container>,
    pub(super) addresses: Vec<String>,
    pub(super) sandbox_backoff: Backoff,
    pub(super) launched_at: Option<SystemTime>,
    pub(super) started_at: Option<SystemTime>,
    pub(super) finished_at: Option<SystemTime>,
    pub(super) terminating: Option<Duration>,
    pub(super) pause: Option<Pause>,
    /// The sandbox is to be made of a snapshot, with containers that run already.
    pub(super) restoring: bool,
    pub(super) reason: String,
    pub(super) message: String,
}

impl Machine {
    /// The machine of a new pod.
    pub fn new(spec: &host::PodSpec) -> Self {
        let policy = match spec.restart_policy() {
            host::RestartPolicy::Unspecified => host::RestartPolicy::Always,
            other => other,
        };
        Self {
            policy,
            life: Life::Pulling,
            containers: spec.containers.iter().map(Container::new).collect(),
            addresses: Vec::new(),
            sandbox_backoff: Backoff::default(),
            launched_at: None,
            started_at: None,
            finished_at: None,
            terminating: None,
            pause: None,
            restoring: false,
            reason: String::new(),
            message: String::new(),
        }
    }

    /// Where the pod is.
    pub fn life(&self) -> Life {
        self.life
    }

    /// Digests of the images, by container, once all are here.
    pub fn digests(&self) -> Option<Vec<&str>> {
        self.containers.iter().map(Container::digest).collect()
    }

    /// Whether the pod was asked to end.
    pub fn is_terminating(&self) -> bool {
        self.terminating.is_some()
    }

    /// Whether a container is being made or started just now.
    pub fn is_starting(&self) -> bool {
        self.containers.iter().any(|container| match &container.state {
            State::Starting => true,
            State::Waiting { reason, .. } => reason == "ContainerCreating" || reason == "PodInitializing",
            State::Running { .. } | State::Ended(_) => false,
        })
    }

    /// Whether the pod stands still.
    pub fn is_paused(&self) -> bool {
        self.pause.is_some()
    }

    /// The present run of each container, with whether it was started and has not ended.
    pub fn runs(&self) -> impl Iterator<Item = (u32, bool)> {
        self.containers
            .iter()
            .map(|container| (container.run, container.is_running()))
    }

    /// Takes an event in and says what to do about it.
    pub fn handle(&mut self, event: Event, now: SystemTime) -> Vec<Action> {
        let mut actions = Vec::new();
        if self.life == Life::Ended {
            return actions;
        }
        match event {
            Event::Start => self.start(&mut actions),
            Event::Pulled { container, result } => self.pulled(container, result, &mut actions),
            Event::Launched(_) if self.life != Life::Launching => {}
            Event::Launched(Ok(addresses)) => self.launched(addresses, None, now, &mut actions),
            Event::Launched(Err(error)) => self.launch_failed(error, now, &mut actions),
            Event::TakenOver { addresses, started } => self.launched(addresses, Some(&started), now, &mut actions),
            Event::FoundPaused { addresses } => {
                self.life = Life::Up;
                self.addresses = addresses;
            }
            Event::Paused => self.paused(now, &mut actions),
            Event::Resumed => self.resumed(&mut actions),
            Event::Started { container, run } => self.started(container, run, now, &mut actions),
            Event::StartFailed { container, run, error } => self.start_failed(container, run, error, now, &mut actions),
            Event::Exited { container, run, exit } => self.exited(container, run, &exit, now, &mut actions),
            Event::SandboxGone(exit) => self.sandbox_gone(&exit, now, &mut actions),
            Event::Timer(timer) => self.timer(timer, &mut actions),
            Event::Terminate(grace) => self.terminate(grace, now, &mut actions),
        }
        actions
    }

    fn start(&mut self, actions: &mut Vec<Action>) {
        self.life = Life::Pulling;
        for (index, container) in self.containers.iter_mut().enumerate() {
            if container.digest().is_none() {
                container.image = ImageStep::Pulling;
                actions.push(Action::Pull(index));
            }
        }
        self.launch_when_ready(actions);
    }

    fn pulled(&mut self, index: usize, result: Result<String, StepError>, actions: &mut Vec<Action>) {
        let Some(container) = self.containers.get_mut(index).filter(|c| c.image == ImageStep::Pulling) else {
            return;
        };
        match result {
            Ok(digest) => {
                container.image = ImageStep::Ready(digest);
                container.wait("ContainerCreating", "");
                self.launch_when_ready(actions);
            }
            Err(error) => {
                container.image = ImageStep::Failed;
                container.wait(&error.reason, &error.message);
                // Without this name nothing will come, however often it is asked for.
                if error.reason != "ErrImageNeverPull" {
                    actions.push(Action::Arm(Timer::PullFailed(index), PULL_ERROR_STANDS));
                    actions.push(Action::Arm(Timer::Pull(index), container.pull_backoff.after_failure()));
                }
            }
        }
    }

    fn launch_when_ready(&mut self, actions: &mut Vec<Action>) {
        if self.life == Life::Pulling && self.containers.iter().all(|container| container.digest().is_some()) {
            self.launch(actions);
        }
    }

    fn launch(&mut self, actions: &mut Vec<Action>) {
        self.life = Life::Launching;
        for container in &mut self.containers {
            if matches!(container.state, State::Waiting { .. }) && container.restarts == 0 {
                container.wait("ContainerCreating", "");
            }
        }
        actions.push(Action::Launch);
    }

    /// The sandbox is there: new, or found with these containers started already.
    fn launched(
        &mut self,
        addresses: Vec<String>,
        found: Option<&[usize]>,
        now: SystemTime,
        actions: &mut Vec<Action>,
    ) {
        self.life = Life::Up;
        self.pause = None;
        self.restoring = false;
        self.addresses = addresses;
        self.reason.clear();
        self.message.clear();
        self.launched_at = Some(now);
        self.started_at.get_or_insert(now);
        let terminating = self.terminating.is_some();
        for (index, container) in self.containers.iter_mut().enumerate() {
            match &container.state {
                State::Ended(_) => {}
                _ if found.is_some_and(|found| found.contains(&index)) => container.found_running(now),
                _ if terminating => container.never_ran(now),
                State::Waiting { reason, .. } if found.is_some() && reason == "CrashLoopBackOff" => {
                    actions.push(Action::Arm(Timer::Restart(index), container.backoff.current()));
                }
                _ => actions.push(container.begin_run(index)),
            }
        }
        if let Some(grace) = self.terminating {
            self.stop_containers(grace, now, actions);
        }
        self.stop_when_done(actions);
    }

    fn launch_failed(&mut self, error: StepError, now: SystemTime, actions: &mut Vec<Action>) {
        // No later try would find the host or the snapshot another one.
        let for_good = [SNAPSHOT_REFUSED, AFTER_RESTORE_FAILED].contains(&error.reason.as_str());
        self.reason = error.reason;
        self.message = error.message;
        if self.policy == host::RestartPolicy::Never || self.terminating.is_some() || for_good {
            self.end_all(|container| container.never_ran(now));
            self.finish(now);
        } else {
            self.life = Life::BackingOff;
            actions.push(Action::Arm(Timer::Relaunch, self.sandbox_backoff.after_failure()));
        }
    }

    fn started(&mut self, index: usize, run: u32, now: SystemTime, actions: &mut Vec<Action>) {
        let Some(container) = self.current(index, run) else {
            return;
        };
        container.state = State::Running { since: now };
        if self.terminating.is_some() {
            actions.push(Action::Stop(index));
        }
    }

    fn start_failed(&mut self, index: usize, run: u32, error: StepError, now: SystemTime, actions: &mut Vec<Action>) {
        let again = (self.policy != host::RestartPolicy::Never || error.may_come) && self.terminating.is_none();
        let Some(container) = self.current(index, run) else {
            return;
        };
        if again {
            container.wait(&error.reason, &error.message);
            actions.push(Action::Arm(Timer::Restart(index), container.backoff.after_failure()));
        } else {
            container.state = State::Ended(host::Terminated {
                exit_code: 128,
                reason: error.reason,
                message: error.message,
                finished_at: Some(timestamp(now)),
                ..host::Terminated::default()
            });
        }
        self.stop_when_done(actions);
    }

    fn exited(
        &mut self,
        index: usize,
        run: u32,
        exit: &guest::ContainerExit,
        now: SystemTime,
        actions: &mut Vec<Action>,
    ) {
        let policy = self.policy;
        let terminating = self.terminating.is_some();
        let Some(container) = self.current(index, run) else {
            return;
        };
        let ran = container.ran_for(now);
        let terminated = container.terminated(exit, now);
        let again = match policy {
            host::RestartPolicy::Never => false,
            host::RestartPolicy::OnFailure => terminated.exit_code != 0,
            host::RestartPolicy::Always | host::RestartPolicy::Unspecified => true,
        };
        if again && !terminating {
            let pause = container.backoff.after_run(ran);
            container.restart_after(terminated, pause);
            if pause.is_zero() {
                actions.push(container.begin_run(index));
            } else {
                actions.push(Action::Arm(Timer::Restart(index), pause));
            }
        } else {
            container.state = State::Ended(terminated);
        }
        self.stop_when_done(actions);
    }

    fn sandbox_gone(&mut self, exit: &SandboxExit, now: SystemTime, actions: &mut Vec<Action>) {
        if !matches!(self.life, Life::Up | Life::Stopping | Life::Launching) {
            return;
        }
        self.addresses.clear();
        self.pause = None;
        // An earlier flintd was killed while it made the sandbox. That is no try of the pod's own: nothing of it has run, or what was
        // restored had no identity yet and has been ended. A pod that was restored and then lost its sandbox is not sent back in time.
        let untouched = match self.restoring {
            true => exit.reason == ExitReason::Stopped,
            false => self.containers.iter().all(|container| !container.begun),
        };
        if self.life == Life::Launching && untouched && self.terminating.is_none() {
            self.launch(actions);
            return;
        }
        self.restoring = false;
        let expected = self.life == Life::Stopping || self.terminating.is_some();
        let message = format!("the sandbox ended: {exit}");
        if expected || self.policy == host::RestartPolicy::Never {
            if !expected {
                self.reason = "SandboxKilled".into();
                self.message.clone_from(&message);
            }
            self.end_all(|container| container.killed_with_sandbox(&message, now));
            self.finish(now);
            return;
        }
        let up_for = self
            .launched_at
            .and_then(|at| now.duration_since(at).ok())
            .unwrap_or_default();
        let pause = self.sandbox_backoff.after_run(up_for);
        self.life = Life::BackingOff;
        self.reason = "SandboxKilled".into();
        self.message = message.clone();
        for container in self
            .containers
            .iter_mut()
            .filter(|c| !matches!(c.state, State::Ended(_)))
        {
            if container.is_running() || matches!(container.state, State::Starting) {
                let ran = container.ran_for(now);
                container.killed_with_sandbox(&message, now);
                if let State::Ended(terminated) = container.state.clone() {
                    container.backoff.after_run(ran);
                    container.restart_after(terminated, pause);
                }
            }
        }
        actions.push(Action::Arm(Timer::Relaunch, pause));
    }

    /// The sandbox stands still. One that is to end must not.
    fn paused(&mut self, now: SystemTime, actions: &mut Vec<Action>) {
        if self.life != Life::Up || self.terminating.is_some() {
            actions.push(Action::Resume);
        } else if self.pause.is_none() {
            self.pause = Some(Pause::new(now, false));
        }
    }

    fn resumed(&mut self, actions: &mut Vec<Action>) {
        let held = self.pause.take().map(|pause| pause.held);
        for timer in held.into_iter().flatten() {
            self.timer(timer, actions);
        }
        self.stop_when_done(actions);
    }

    fn timer(&mut self, timer: Timer, actions: &mut Vec<Action>) {
        if let Some(pause) = self.pause.as_mut().filter(|_| matches!(timer, Timer::Restart(_))) {
            pause.held.push(timer);
            return;
        }
        match timer {
            Timer::PullFailed(index) => {
                if let Some(container) = self.containers.get_mut(index).filter(|c| c.image == ImageStep::Failed) {
                    container.pull_backs_off();
                }
            }
            Timer::Pull(index) => {
                if let Some(container) = self.containers.get_mut(index).filter(|c| c.image == ImageStep::Failed) {
                    container.image = ImageStep::Pulling;
                    actions.push(Action::Pull(index));
                }
            }
            Timer::Restart(index) if self.life == Life::Up && self.terminating.is_none() => {
                if let Some(container) = self.containers.get_mut(index)
                    && matches!(container.state, State::Waiting { .. })
                {
                    actions.push(container.begin_run(index));
                }
            }
            Timer::Relaunch if self.life == Life::BackingOff => self.launch(actions),
            Timer::Grace if self.life == Life::Up => {
                for index in 0..self.containers.len() {
                    actions.push(Action::Kill(index));
                }
                actions.push(Action::Arm(Timer::Patience, SHUTDOWN_PATIENCE));
            }
            Timer::Patience if matches!(self.life, Life::Up | Life::Stopping) => actions.push(Action::KillSandbox),
            Timer::Restart(_) | Timer::Relaunch | Timer::Grace | Timer::Patience => {}
        }
    }

    fn terminate(&mut self, grace: Duration, now: SystemTime, actions: &mut Vec<Action>) {
        // A later call may shorten the grace period, never lengthen it.
        let grace = self.terminating.map_or(grace, |earlier| earlier.min(grace));
        self.terminating = Some(grace);
        match self.life {
            Life::Pulling | Life::BackingOff => {
                self.end_all(|container| container.never_ran(now));
                self.finish(now);
            }
            // Nothing more of it is to run.
            Life::Up if self.pause.is_some() && grace.is_zero() => actions.push(Action::KillSandbox),
            Life::Up => {
                if let Some(pause) = &self.pause {
                    actions.push(Action::Resume);
                    if pause.unseen {
                        // Its containers are told to stop when it is known which there are.
                        actions.push(Action::Arm(Timer::Grace, grace));
                        return;
                    }
                }
                self.stop_containers(grace, now, actions);
            }
            // What it was being made for will not run. If it is there already, its arrival finds the wish.
            Life::Launching => actions.push(Action::Abandon),
            // The sandbox's end finds it.
            Life::Stopping | Life::Ended => {}
        }
    }

    /// Begins the end of what runs in the sandbox.
    fn stop_containers(&mut self, grace: Duration, now: SystemTime, actions: &mut Vec<Action>) {
        for (index, container) in self.containers.iter_mut().enumerate() {
            match container.state {
                State::Running { .. } if grace.is_zero() => actions.push(Action::Kill(index)),
                State::Running { .. } => actions.push(Action::Stop(index)),
                State::Waiting { .. } => container.never_ran(now),
                State::Starting | State::Ended(_) => {}
            }
        }
        actions.push(Action::Arm(Timer::Grace, grace));
        self.stop_when_done(actions);
    }

    /// Shuts the sandbox down when no container will run in it any more; one that stands still, when it goes on.
    fn stop_when_done(&mut self, actions: &mut Vec<Action>) {
        let goes = self.life == Life::Up && self.pause.is_none();
        if goes && self.containers.iter().all(|c| matches!(c.state, State::Ended(_))) {
            self.life = Life::Stopping;
            actions.push(Action::Shutdown);
            actions.push(Action::Arm(Timer::Patience, SHUTDOWN_PATIENCE));
        }
    }

    fn end_all(&mut self, mut end: impl FnMut(&mut Container)) {
        for container in self
            .containers
            .iter_mut()
            .filter(|c| !matches!(c.state, State::Ended(_)))
        {
            end(container);
        }
    }

    fn finish(&mut self, now: SystemTime) {
        self.life = Life::Ended;
        self.finished_at = Some(now);
    }

    /// The container, if `run` is the one that it is in now: an event of an earlier run says nothing about this one.
    fn current(&mut self, index: usize, run: u32) -> Option<&mut Container> {
        self.containers.get_mut(index).filter(|container| {
            container.run == run && matches!(container.state, State::Starting | State::Running { .. })
        })
    }

    /// The pod's phase, as Kubernetes defines it ("Pod Lifecycle").
    pub fn phase(&self) -> host::pod_status::Phase {
        use host::pod_status::Phase;
        if self.life == Life::Ended {
            let good = self
                .containers
                .iter()
                .all(|c| matches!(&c.state, State::Ended(end) if end.exit_code == 0));
            return if good { Phase::Succeeded } else { Phase::Failed };
        }
        let ran = |c: &Container| c.last.is_some() || matches!(c.state, State::Running { .. } | State::Ended(_));
        if self.containers.iter().any(ran) {
            Phase::Running
        } else {
            Phase::Pending
        }
    }

    /// The status as the API shows it, but for what the pod's record adds.
    pub fn status(&self) -> host::PodStatus {
        let mut containers: Vec<_> = self.containers.iter().map(Container::status).collect();
        for container in &mut containers {
            container.ready &= self.pause.is_none();
        }
        host::PodStatus {
            phase: self.phase().into(),
            reason: self.reason.clone(),
            message: self.message.clone(),
            pod_ips: self.addresses.clone(),
            containers,
            started_at: self.started_at.map(timestamp),
            finished_at: self.finished_at.map(timestamp),
            terminating: self.terminating.is_some(),
            paused_at: self.pause.as_ref().map(|pause| timestamp(pause.since)),
            ..host::PodStatus::default()
        }
    }
}

#[cfg(test)]
#[path = "machine_tests.rs"]
mod tests;
