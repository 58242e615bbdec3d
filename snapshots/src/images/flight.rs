//! Work that several may wait for: begun by the first, ended when nobody waits any more.

use std::collections::HashMap;
use std::future::Future;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use tokio::sync::watch;
use tokio::task::AbortHandle;

use super::{Image, ImageError, PullPolicy};
use crate::registry::Credentials;

/// What work on an image is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Stage {
    /// Asking what the image consists of.
    #[default]
    Resolve,
    /// Fetching layers.
    Fetch,
    /// Making one device of the layers.
    Assemble,
    /// The image is here.
    Done,
}

impl Stage {
    /// As the host API has it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Resolve => "resolve",
            Self::Fetch => "fetch",
            Self::Assemble => "assemble",
            Self::Done => "done",
        }
    }
}

/// How far work is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Progress {
    /// What it is doing.
    pub stage: Stage,
    /// Bytes of layers, compressed, that are here.
    pub bytes_done: u64,
    /// Bytes of all layers; 0: not known yet.
    pub bytes_total: u64,
    /// Layers that are complete.
    pub layers_done: u32,
    /// All layers; 0: not known yet.
    pub layers_total: u32,
}

/// What makes two requests the same work. Credentials belong to it: who joins has shown the same ones.
#[derive(Clone, PartialEq, Eq, Hash)]
pub(crate) enum Key {
    Pull(String, Option<Credentials>, PullPolicy),
    Import(PathBuf, Option<String>),
}

type Outcome = Result<Image, Arc<ImageError>>;

#[derive(Default, Clone)]
struct Seen {
    progress: Progress,
    outcome: Option<Outcome>,
}

/// Where work tells how far it is.
#[derive(Clone)]
pub(crate) struct Reporter(watch::Sender<Seen>);

impl Reporter {
    pub(crate) fn update(&self, change: impl FnOnce(&mut Progress)) {
        self.0.send_modify(|seen| change(&mut seen.progress));
    }
}

/// Ends the task with the last one who waits for it.
struct Task(AbortHandle);

impl Drop for Task {
    fn drop(&mut self) {
        self.0.abort();
    }
}

struct Flight {
    seen: watch::Receiver<Seen>,
    task: Weak<Task>,
}

/// All work under way.
#[derive(Default)]
pub(crate) struct Flights {
    flights: Arc<Mutex<HashMap<Key, Flight>>>,
}

impl Flights {
    fn lock(&self) -> MutexGuard<'_, HashMap<Key, Flight>> {
        self.flights.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether any work is under way.
    pub(crate) fn any(&self) -> bool {
        self.lock().values().any(Flight::is_under_way)
    }

    /// Whether work beside the asking one is under way.
    pub(crate) fn others(&self) -> bool {
        self.lock().values().filter(|flight| flight.is_under_way()).count() > 1
    }

    /// Joins the work `key`, or begins it with `begin`.
    pub(crate) fn join<F>(&self, key: Key, begin: impl FnOnce(Reporter) -> F) -> Work
    where
        F: Future<Output = Result<Image, ImageError>> + Send + 'static,
    {
        let mut flights = self.lock();
        flights.retain(|_, flight| flight.is_under_way());
        if let Some((task, seen)) = flights
            .get(&key)
            .and_then(|flight| Some((flight.task.upgrade()?, flight.seen.clone())))
        {
            return Work {
                seen,
                ended: false,
                _task: task,
            };
        }
        let (sender, seen) = watch::channel(Seen::default());
        let work = begin(Reporter(sender.clone()));
        let task = tokio::spawn(async move {
            let outcome = work.await.map_err(Arc::new);
            sender.send_modify(|seen| {
                if outcome.is_ok() {
                    seen.progress.stage = Stage::Done;
                }
                seen.outcome = Some(outcome);
            });
        });
        let task = Arc::new(Task(task.abort_handle()));
        flights.insert(
            key,
            Flight {
                seen: seen.clone(),
                task: Arc::downgrade(&task),
            },
        );
        Work {
            seen,
            ended: false,
            _task: task,
        }
    }
}

impl Flight {
    fn is_under_way(&self) -> bool {
        self.task.strong_count() > 0 && self.seen.borrow().outcome.is_none() && self.seen.has_changed().is_ok()
    }
}

/// A pull or an import, as one who waits for it sees it. Dropping it gives up waiting; the work ends when nobody waits.
pub struct Work {
    seen: watch::Receiver<Seen>,
    ended: bool,
    _task: Arc<Task>,
}

impl std::fmt::Debug for Work {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Work")
            .field("progress", &self.seen.borrow().progress)
            .finish_non_exhaustive()
    }
}

impl Work {
    /// The next news about how far it is; `None` when it has ended: then ask [`Work::finish`]. May be cancelled. Steps that
    /// nobody had time to look at are left out.
    pub async fn progress(&mut self) -> Option<Progress> {
        if self.ended || self.seen.changed().await.is_err() {
            return None;
        }
        let seen = self.seen.borrow_and_update();
        self.ended = seen.outcome.is_some();
        (seen.outcome.as_ref().is_none_or(Result::is_ok)).then_some(seen.progress)
    }

    /// Waits for the end.
    ///
    /// # Errors
    /// What hindered the work; the same value for all who waited.
    pub async fn finish(mut self) -> Outcome {
        let ended = self.seen.wait_for(|seen| seen.outcome.is_some()).await;
        ended
            .ok()
            .and_then(|seen| seen.outcome.clone())
            .unwrap_or_else(|| Err(Arc::new(ImageError::Worker("the work was dropped".to_owned()))))
    }
}
