//! Why a request about a pod is refused.

use thiserror::Error;

use super::{admission::Shortage, validate::Violation};
use crate::{hook::HookError, saved::SavedError};

/// A request about a pod was refused.
#[derive(Debug, Error)]
pub enum PodError {
    /// The pod can never run.
    #[error("the pod is not valid: {}", .0.iter().map(|v| format!("{} {}", v.field, v.description)).collect::<Vec<_>>().join("; "))]
    Invalid(Vec<Violation>),
    /// There is no room.
    #[error(transparent)]
    Shortage(#[from] Shortage),
    /// No new pods just now.
    #[error("the host is draining and takes no new pods; resume it, or use another host")]
    Draining,
    /// No sandbox can be made just now.
    #[error("this host cannot start pods just now: {0}")]
    NotReady(String),
    /// Its own program failed.
    #[error("pod {uid} is not saved, because its hook before the snapshot has failed: {source}")]
    Hook {
        /// The pod.
        uid: String,
        /// Why.
        source: HookError,
    },
    /// The uid is not known.
    #[error("no pod with uid {0} is known on this host")]
    NotFound(String),
    /// Another pod has it.
    #[error("there is a pod {0} on this host already: choose another uid and name, or remove it first")]
    Taken(String),
    /// The request is for too few or too many.
    #[error("a pod is forked into 1 to {most} others at a time, not into {asked}")]
    ForkCount {
        /// So many were wanted.
        asked: usize,
        /// So many are possible.
        most: usize,
    },
    /// An older generation than the one known.
    #[error("pod {uid}: generation {given} is older than {known}, which is known")]
    Stale {
        /// Which pod.
        uid: String,
        /// The request's.
        given: u64,
        /// The host's.
        known: u64,
    },
    /// Materials older than those known.
    #[error("pod {uid}: version {given} of its materials is older than {known}, which is known")]
    StaleMaterials {
        /// Which pod.
        uid: String,
        /// The request's.
        given: u64,
        /// The pod's.
        known: u64,
    },
    /// There is no sandbox to do it with.
    #[error("pod {0} has no running sandbox just now: `flint ps -a` shows what it is doing")]
    NotUp(String),
    /// It is on its way to its end.
    #[error("pod {0} is being ended")]
    Terminating(String),
    /// A container is on its way.
    #[error("a container of pod {0} is being started just now: try again when it runs")]
    Starting(String),
    /// Its snapshot could not be made.
    #[error(transparent)]
    Saved(#[from] SavedError),
    /// It stands still.
    #[error("pod {0} is paused: resume it first")]
    Paused(String),
    /// The sandbox did not do as asked.
    #[error("pod {uid}: {doing} failed: {why}")]
    Sandbox {
        /// Which pod.
        uid: String,
        /// What was asked for.
        doing: &'static str,
        /// Why not.
        why: String,
    },
    /// The pod still runs.
    #[error("pod {0} has not ended: terminate it first")]
    NotEnded(String),
    /// The container is not one of the pod's.
    #[error("pod {uid} has no container {container:?}; it has {known}")]
    NoContainer {
        /// Which pod.
        uid: String,
        /// The request's.
        container: String,
        /// The pod's.
        known: String,
    },
    /// The container does not run just now.
    #[error("container {container} of pod {uid} is not running")]
    NotRunning {
        /// Which pod.
        uid: String,
        /// Which container.
        container: String,
    },
    /// There is no earlier run.
    #[error("container {0} has not run before its present run")]
    NoPrevious(String),
    /// The store failed.
    #[error("{0}")]
    Store(String),
    /// Removing logs failed.
    #[error("removing the logs of pod {uid}: {source}")]
    Logs {
        /// Which pod.
        uid: String,
        /// Why not.
        source: std::io::Error,
    },
}
