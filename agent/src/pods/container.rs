//! One container of a pod's state machine: its image, its present run, what became of the last one.

use std::time::{Duration, SystemTime};

use flint_api::{guest, host};

use super::{backoff::Backoff, machine::Action, timestamp};

/// SIGKILL's exit code, as shells count.
const KILLED: u32 = 128 + 9;

/// How far the image is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum ImageStep {
    /// On its way.
    Pulling,
    /// The last try failed.
    Failed,
    /// Here, with the digest of its manifest.
    Ready(String),
}

/// How far the present run is.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum State {
    /// Not begun, or between two runs.
    Waiting {
        /// As Kubernetes names it.
        reason: String,
        /// For people.
        message: String,
    },
    /// Asked for in the guest.
    Starting,
    /// Its program runs.
    Running {
        /// Since when.
        since: SystemTime,
    },
    /// Over for good.
    Ended(host::Terminated),
}

#[derive(Clone, Debug)]
pub(super) struct Container {
    pub(super) name: String,
    pub(super) reference: String,
    pub(super) image: ImageStep,
    pub(super) state: State,
    /// Number of the present run; the first is 0.
    pub(super) run: u32,
    /// Whether a run was begun at all.
    pub(super) begun: bool,
    pub(super) restarts: u32,
    pub(super) last: Option<host::Terminated>,
    pub(super) backoff: Backoff,
    pub(super) pull_backoff: Backoff,
}

impl Container {
    pub(super) fn new(spec: &host::Container) -> Self {
        Self {
            name: spec.name.clone(),
            reference: spec.image.clone(),
            image: ImageStep::Pulling,
            state: State::Waiting {
                reason: "PodInitializing".into(),
                message: String::new(),
            },
            run: 0,
            begun: false,
            restarts: 0,
            last: None,
            backoff: Backoff::default(),
            pull_backoff: Backoff::default(),
        }
    }

    pub(super) fn digest(&self) -> Option<&str> {
        match &self.image {
            ImageStep::Ready(digest) => Some(digest),
            ImageStep::Pulling | ImageStep::Failed => None,
        }
    }

    pub(super) fn is_running(&self) -> bool {
        matches!(self.state, State::Running { .. })
    }

    pub(super) fn wait(&mut self, reason: &str, message: &str) {
        self.state = State::Waiting {
            reason: reason.into(),
            message: message.into(),
        };
    }

    /// Turns the last pull's error into the pause that follows it.
    pub(super) fn pull_backs_off(&mut self) {
        if let State::Waiting { message, .. } = &self.state {
            let message = format!("Back-off pulling image \"{}\": {message}", self.reference);
            self.wait("ImagePullBackOff", &message);
        }
    }

    /// Begins the next run. Each has a number of its own, so that a late word about an earlier one is told apart.
    pub(super) fn begin_run(&mut self, index: usize) -> Action {
        if self.begun {
            self.run = self.run.saturating_add(1);
        }
        self.begun = true;
        self.state = State::Starting;
        Action::Run(index, self.run)
    }

    /// The run that an earlier flintd began goes on.
    pub(super) fn found_running(&mut self, now: SystemTime) {
        self.begun = true;
        if !self.is_running() {
            self.state = State::Running { since: now };
        }
    }

    pub(super) fn ran_for(&self, now: SystemTime) -> Duration {
        match self.state {
            State::Running { since } => now.duration_since(since).unwrap_or_default(),
            State::Waiting { .. } | State::Starting | State::Ended(_) => Duration::ZERO,
        }
    }

    /// How the guest's word about an end reads in Kubernetes' terms.
    pub(super) fn terminated(&self, exit: &guest::ContainerExit, now: SystemTime) -> host::Terminated {
        let reason = match exit {
            exit if !exit.start_error.is_empty() => "StartError",
            exit if exit.oom_killed => "OOMKilled",
            exit if exit.exit_code == 0 => "Completed",
            _ => "Error",
        };
        host::Terminated {
            // What could not be started has a shell's codes, 126 and 127, which tell more than a kubelet's 128.
            exit_code: exit.exit_code,
            signal: exit.signal,
            reason: reason.into(),
            message: exit.start_error.clone(),
            // The host's clock, where it saw the start: the guest's can be set by the guest.
            started_at: match self.state {
                State::Running { since } => Some(timestamp(since)),
                State::Waiting { .. } | State::Starting | State::Ended(_) => None,
            },
            finished_at: Some(timestamp(now)),
        }
    }

    /// The run is over and another one follows after a pause.
    pub(super) fn restart_after(&mut self, terminated: host::Terminated, pause: Duration) {
        let name = &self.name;
        let message = format!("back-off {} restarting failed container={name}", humane(pause));
        self.last = Some(terminated);
        self.restarts = self.restarts.saturating_add(1);
        self.wait("CrashLoopBackOff", &message);
    }

    pub(super) fn killed_with_sandbox(&mut self, message: &str, now: SystemTime) {
        let started_at = match self.state {
            State::Running { since } => Some(timestamp(since)),
            State::Waiting { .. } | State::Starting | State::Ended(_) => None,
        };
        self.state = State::Ended(host::Terminated {
            exit_code: KILLED,
            signal: 9,
            reason: "SandboxKilled".into(),
            message: message.into(),
            started_at,
            finished_at: Some(timestamp(now)),
        });
    }

    /// The pod ends before the container could run, or between two runs of it, whose last end then stands.
    pub(super) fn never_ran(&mut self, now: SystemTime) {
        let message = match &self.state {
            State::Waiting { reason, message } if !message.is_empty() => {
                format!("the pod ended before the container ran ({reason}: {message})")
            }
            _ => "the pod ended before the container ran".into(),
        };
        self.state = State::Ended(self.last.clone().unwrap_or(host::Terminated {
            exit_code: KILLED,
            reason: "Error".into(),
            message,
            finished_at: Some(timestamp(now)),
            ..host::Terminated::default()
        }));
    }

    pub(super) fn status(&self) -> host::ContainerStatus {
        use host::container_status::State as Shown;
        let state = match &self.state {
            State::Waiting { reason, message } => Shown::Waiting(host::Waiting {
                reason: reason.clone(),
                message: message.clone(),
            }),
            State::Starting => Shown::Waiting(host::Waiting {
                reason: "ContainerCreating".into(),
                message: String::new(),
            }),
            State::Running { since } => Shown::Running(host::Running {
                started_at: Some(timestamp(*since)),
            }),
            State::Ended(terminated) => Shown::Terminated(terminated.clone()),
        };
        host::ContainerStatus {
            name: self.name.clone(),
            image: self.reference.clone(),
            image_digest: self.digest().unwrap_or_default().to_owned(),
            state: Some(state),
            restart_count: self.restarts,
            last_termination: self.last.clone(),
            ready: self.is_running(),
        }
    }
}

/// A pause as a kubelet writes it: `10s`, `2m40s`.
fn humane(pause: Duration) -> String {
    match (pause.as_secs() / 60, pause.as_secs() % 60) {
        (0, seconds) => format!("{seconds}s"),
        (minutes, seconds) => format!("{minutes}m{seconds}s"),
    }
}
