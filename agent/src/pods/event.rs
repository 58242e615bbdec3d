//! What a pod's state machine hears, and what it asks for.

use std::time::Duration;

use flint_api::guest;

use crate::backend::SandboxExit;

/// What happened.
#[derive(Clone, Debug)]
pub enum Event {
    /// Begin; also for a pod that an earlier flintd had not launched yet.
    Start,
    /// An image came, or did not.
    Pulled {
        /// Index of the container.
        container: usize,
        /// Digest of the image's manifest.
        result: Result<String, StepError>,
    },
    /// The sandbox is there, or is not.
    Launched(Result<Vec<String>, StepError>),
    /// An earlier flintd's sandbox runs, with these containers in it.
    TakenOver {
        /// Addresses of the pod.
        addresses: Vec<String>,
        /// Indices of the containers whose present run is known to the guest and was started.
        started: Vec<usize>,
    },
    /// An earlier flintd's sandbox is there and stands still, as that flintd had been asked for.
    FoundPaused {
        /// Addresses of the pod.
        addresses: Vec<String>,
    },
    /// The sandbox stands still.
    Paused,
    /// It goes on.
    Resumed,
    /// The container's program runs.
    Started {
        /// Index of the container.
        container: usize,
        /// Which run of it.
        run: u32,
    },
    /// The container could not be made.
    StartFailed {
        /// Index of the container.
        container: usize,
        /// Which run of it.
        run: u32,
        /// Why.
        error: StepError,
    },
    /// The container ended and all of its output is in the log.
    Exited {
        /// Index of the container.
        container: usize,
        /// Which run of it.
        run: u32,
        /// How.
        exit: guest::ContainerExit,
    },
    /// The sandbox is no more.
    SandboxGone(SandboxExit),
    /// A pause is over.
    Timer(Timer),
    /// End the pod, with this long between TERM and KILL.
    Terminate(Duration),
}

/// What to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Bring the container's image here; leads to [`Event::Pulled`].
    Pull(usize),
    /// Make a sandbox with all images mounted; leads to [`Event::Launched`], and at its end to [`Event::SandboxGone`].
    Launch,
    /// Make no sandbox after all; leads to [`Event::Launched`] with an error, unless it is there already.
    Abandon,
    /// Create and start a run of a container; leads to `Started` or `StartFailed`, later to `Exited`.
    Run(usize, u32),
    /// Send a container its stop signal.
    Stop(usize),
    /// Send all processes of a container SIGKILL.
    Kill(usize),
    /// Ask the guest to power off.
    Shutdown,
    /// End the VMM.
    KillSandbox,
    /// Have the sandbox go on; leads to [`Event::Resumed`], or to [`Event::TakenOver`] if it was found standing still.
    Resume,
    /// Come back with [`Event::Timer`] after a pause; replaces the timer of that name.
    Arm(Timer, Duration),
}

impl Action {
    /// Whether the guest alone may know something that it will not know any more: how a container ended, which run of it was
    /// the last. Such an action waits until the record is durable.
    pub(super) fn makes_the_guest_forget(&self) -> bool {
        match self {
            Self::Shutdown | Self::KillSandbox => true,
            // The run before it is removed first.
            Self::Run(_, run) => *run > 0,
            Self::Pull(_)
            | Self::Launch
            | Self::Abandon
            | Self::Stop(_)
            | Self::Kill(_)
            | Self::Resume
            | Self::Arm(..) => false,
        }
    }
}

/// Names of pauses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Timer {
    /// `ErrImagePull` has stood long enough.
    PullFailed(usize),
    /// Pull again.
    Pull(usize),
    /// Run the container again.
    Restart(usize),
    /// Make the sandbox again.
    Relaunch,
    /// The grace period is over.
    Grace,
    /// Even killing and shutting down took too long.
    Patience,
}

/// A step failed, in words that Kubernetes users know.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StepError {
    /// CamelCase, for example `ErrImagePull`.
    pub reason: String,
    /// What failed and why.
    pub message: String,
    /// Whether it is tried again whatever the restart policy, because what is missing may come.
    pub may_come: bool,
}

impl StepError {
    /// A failed step.
    pub fn new(reason: &str, message: impl Into<String>) -> Self {
        Self {
            reason: reason.to_owned(),
            message: message.into(),
            may_come: false,
        }
    }

    /// What a container's configuration refers to is not there (yet), in words that Kubernetes users know.
    pub fn missing(message: impl Into<String>) -> Self {
        Self {
            may_come: true,
            ..Self::new("CreateContainerConfigError", message)
        }
    }
}
