//! Containers: their table, their life, their end.
//!
//! ```text
//! CreateContainer        StartContainer          first process ends
//!    |  helper              |  notify.sock          |  reaper
//!    v                      v                       v
//! Creating --> Created ---------> Running ------> Exited --DeleteContainer--> gone
//!    |            \_______________________________^
//!    +--(failed)--> gone          killed before its start
//! ```

mod executor;
pub mod helper;
pub mod launch;
pub mod pause;
mod report;
mod root;
pub mod runtime;
pub mod spec;
mod subpath;
mod user;

use std::{
    io,
    time::{SystemTime, UNIX_EPOCH},
};

use flint_api::guest::ContainerExit;
use tokio::sync::{Mutex, watch};
use tonic::Status;

pub use runtime::Containers;

use crate::{
    cgroup::{Cgroup, CgroupError},
    error_chain::chain,
    output::OutputBuffer,
    paths::{BadName, Name},
    reaper::Ended,
    stream_fd::StreamFd,
    sys,
};

/// Why a container could not be made, changed or removed.
#[derive(Debug, thiserror::Error)]
pub enum ContainerError {
    /// No container has the id.
    #[error("container {0} does not exist")]
    Unknown(String),
    /// The id is taken.
    #[error("container {0} exists already")]
    Exists(String),
    /// It is not in a state that allows this.
    #[error("container {id} is {state}; {wanted}")]
    State {
        id: String,
        state: &'static str,
        wanted: &'static str,
    },
    /// Its image has not been mounted.
    #[error("image {0} is not mounted; mount it with MountImage first")]
    NoImage(String),
    /// The request is wrong.
    #[error(transparent)]
    Spec(#[from] spec::SpecError),
    /// A name in it is.
    #[error(transparent)]
    Name(#[from] BadName),
    /// Disks.
    #[error(transparent)]
    Storage(#[from] crate::storage::StorageError),
    /// What its configuration refers to is not there.
    #[error(transparent)]
    Config(crate::materials::ConfigError),
    /// Materials.
    #[error(transparent)]
    Materials(crate::materials::MaterialsError),
    /// The helper failed.
    #[error("making the process of container {id}")]
    Launch {
        id: String,
        #[source]
        source: launch::LaunchError,
    },
    /// Something of it could not be used.
    #[error("container {id}: {step}")]
    Io {
        id: String,
        step: &'static str,
        #[source]
        source: io::Error,
    },
    /// Its cgroup.
    #[error("container {id}")]
    Cgroup {
        id: String,
        #[source]
        source: CgroupError,
    },
}

impl From<crate::materials::PrepareError> for ContainerError {
    fn from(error: crate::materials::PrepareError) -> Self {
        match error {
            crate::materials::PrepareError::Config(error) => Self::Config(error),
            crate::materials::PrepareError::Materials(error) => Self::Materials(error),
        }
    }
}

impl From<ContainerError> for Status {
    fn from(error: ContainerError) -> Self {
        let text = chain(&error);
        match error {
            ContainerError::Unknown(_) => Self::not_found(text),
            ContainerError::Exists(_) => Self::already_exists(text),
            ContainerError::State { .. } | ContainerError::NoImage(_) => Self::failed_precondition(text),
            ContainerError::Spec(_) | ContainerError::Name(_) => Self::invalid_argument(text),
            ContainerError::Storage(error) => error.into(),
            ContainerError::Materials(error) => error.into(),
            // CreateContainer says it in its answer.
            ContainerError::Config(_) => Self::failed_precondition(text),
            ContainerError::Launch { .. } | ContainerError::Io { .. } | ContainerError::Cgroup { .. } => {
                Self::internal(text)
            }
        }
    }
}

/// Where in its life a container is.
#[derive(Debug, Clone, PartialEq)]
pub enum State {
    /// Its helper is at work.
    Creating,
    /// Its process waits for the start.
    Created { pid: i32 },
    /// Its program runs, or is about to.
    Running { pid: i32, started: SystemTime },
    /// Its first process has ended.
    Exited(ContainerExit),
}

impl State {
    fn name(&self) -> &'static str {
        match self {
            Self::Creating => "being created",
            Self::Created { .. } => "created",
            Self::Running { .. } => "running",
            Self::Exited(_) => "exited",
        }
    }

    /// The first process, while it exists.
    pub fn pid(&self) -> Option<i32> {
        match self {
            Self::Created { pid } | Self::Running { pid, .. } => Some(*pid),
            Self::Creating | Self::Exited(_) => None,
        }
    }
}

/// One container.
#[derive(Debug)]
pub struct Container {
    /// Its id.
    pub id: Name,
    /// Its limits and figures.
    pub cgroup: Cgroup,
    /// What it has written.
    pub output: OutputBuffer,
    /// Where its standard input is written to; closed after an end of input.
    pub stdin: Mutex<Option<StreamFd>>,
    /// Does it have a terminal? Then `stdin` is the terminal's master.
    pub terminal: bool,
    state: watch::Sender<State>,
    scratch: Option<Name>,
}

impl Container {
    /// Its state now.
    pub fn state(&self) -> State {
        self.state.borrow().clone()
    }

    /// Its end, waited for. `None` if it never came to exist.
    pub async fn wait(&self) -> Option<ContainerExit> {
        let mut states = self.state.subscribe();
        let state = states.wait_for(|state| matches!(state, State::Exited(_))).await.ok()?;
        match &*state {
            State::Exited(exit) => Some(exit.clone()),
            _ => None,
        }
    }

    /// Sends a signal to the first process or to all.
    pub fn signal(&self, signal: i32, all: bool) -> Result<(), ContainerError> {
        if all && !matches!(self.state(), State::Creating) {
            let failed = |source| ContainerError::Cgroup {
                id: self.id.to_string(),
                source,
            };
            return self.cgroup.signal_all(signal).map_err(failed);
        }
        match self.state().pid() {
            Some(pid) => sys::kill(pid, signal).map_err(self.io("signalling its process")),
            None => Err(self.wrong_state("a signal needs a process")),
        }
    }

    fn wrong_state(&self, wanted: &'static str) -> ContainerError {
        ContainerError::State {
            id: self.id.to_string(),
            state: self.state().name(),
            wanted,
        }
    }

    /// An exec came too early or too late.
    pub fn not_running(&self) -> ContainerError {
        self.wrong_state("programs can be run only in a running container")
    }

    /// Names the container in an I/O error.
    pub fn io(&self, step: &'static str) -> impl FnOnce(io::Error) -> ContainerError {
        let id = self.id.to_string();
        move |source| ContainerError::Io { id, step, source }
    }
}

/// How a process ended, in the contract's terms.
pub fn exit_of(ended: Ended, started: Option<SystemTime>) -> ContainerExit {
    use std::os::unix::process::ExitStatusExt;
    let signal = ended
        .status
        .signal()
        .and_then(|signal| u32::try_from(signal).ok())
        .unwrap_or(0);
    let code = ended.status.code().and_then(|code| u32::try_from(code).ok());
    ContainerExit {
        exit_code: code.unwrap_or(128 + signal),
        signal,
        started_at_ns: started.map_or(0, nanoseconds),
        finished_at_ns: nanoseconds(ended.at),
        ..ContainerExit::default()
    }
}

/// Since the epoch; 0 before it, `u64::MAX` after the year 2554.
pub fn nanoseconds(time: SystemTime) -> u64 {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use std::{os::unix::process::ExitStatusExt, process::ExitStatus, time::Duration};

    use super::*;

    #[test]
    fn codes_and_signals_are_told_apart() {
        let at = UNIX_EPOCH + Duration::from_nanos(9);
        let started = Some(UNIX_EPOCH + Duration::from_nanos(5));
        let exited = exit_of(
            Ended {
                status: ExitStatus::from_raw(3 << 8),
                at,
            },
            started,
        );
        assert_eq!(
            (
                exited.exit_code,
                exited.signal,
                exited.started_at_ns,
                exited.finished_at_ns
            ),
            (3, 0, 5, 9)
        );
        let killed = exit_of(
            Ended {
                status: ExitStatus::from_raw(9),
                at,
            },
            None,
        );
        assert_eq!((killed.exit_code, killed.signal, killed.started_at_ns), (137, 9, 0));
        // A real-time signal with a core dump.
        let dumped = exit_of(
            Ended {
                status: ExitStatus::from_raw(0x80 | 40),
                at,
            },
            None,
        );
        assert_eq!((dumped.exit_code, dumped.signal), (168, 40));
    }
}
