//! A pod's sandbox is made of a snapshot, with its containers in the middle of what they do.
//!
//! Those containers run from the moment in which the sandbox does: so the record names the sandbox before it is made. A
//! flintd that is killed on the way leaves one that the next one ends and makes again, if its guest had no identity yet, and takes
//! over like any other, if it had.

use tokio::{sync::oneshot, task::spawn_blocking};
use tracing::warn;

use super::{
    super::{
        machine::{Event, SNAPSHOT_REFUSED, StepError},
        steps,
    },
    Actor, Input,
};
use crate::{
    backend::SandboxPlan,
    saved::{Held, SavedPods},
};

/// The snapshot that a pod is to be made of.
#[derive(Default)]
pub(super) struct Source {
    held: Option<Held>,
    /// To be told when the record with the sandbox's name is on its way to the disk.
    waiting: Option<oneshot::Sender<()>>,
}

impl Source {
    /// Holds a record's snapshot. One that is gone is missed when it is needed.
    pub(super) fn of(saved: &SavedPods, name: &str) -> Self {
        let held = Some(name).filter(|name| !name.is_empty()).map(|name| saved.hold(name));
        let held = held.and_then(|held| {
            held.inspect_err(|error| warn!(%error, "a pod cannot be made of its snapshot"))
                .ok()
        });
        Self { held, waiting: None }
    }
}

impl Actor {
    /// Makes the sandbox, when the record is durable that names it.
    pub(super) fn restore(&mut self, mut plan: SandboxPlan) {
        let refused = |error: String| Event::Launched(Err(StepError::new(SNAPSHOT_REFUSED, error)));
        let held = self.source.held.as_ref();
        let origin = held.map(|held| Ok((held.record().clone(), held.files()?)));
        let (record, files) = match origin {
            Some(Ok(origin)) => origin,
            other => {
                let error: Option<crate::saved::SavedError> = other.and_then(Result::err);
                let error = error.map_or_else(
                    || format!("there is no snapshot {} on this host any more", self.record.from),
                    |error| crate::chain(&error),
                );
                self.spawn(async move { Some(Input::Event(refused(error))) });
                return;
            }
        };
        self.disks.clone_from(&record.disks);
        plan.images.clone_from(&record.disks);
        let (waiting, recorded) = oneshot::channel();
        self.source.waiting = Some(waiting);
        let (context, timeline, uid) = (self.context.clone(), self.timeline.clone(), self.uid.clone());
        let abandoned = self.abandoned.clone();
        self.spawn(async move {
            // The sender goes only with the actor.
            recorded.await.ok()?;
            context.journal.flush().await;
            Some(
                match steps::restore(&context, &uid, plan, record, files, &abandoned, timeline).await {
                    Ok((sandbox, containers)) => Input::Found(sandbox, containers),
                    Err(error) => Input::Event(Event::Launched(Err(error))),
                },
            )
        });
    }

    /// The record is as the machine is, and on its way to the disk.
    pub(super) fn recorded(&mut self) {
        if let Some(waiting) = self.source.waiting.take() {
            // Who waited is gone only with its pod.
            let _ = waiting.send(());
        }
        if self.record.from.is_empty()
            && let Some(held) = self.source.held.take()
        {
            let journal = self.context.journal.clone();
            self.spawn(async move {
                journal.flush().await;
                // Nobody waits for it.
                let _ = spawn_blocking(move || held.release()).await;
                None
            });
        }
    }
}
