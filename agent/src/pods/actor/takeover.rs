//! A pod's sandbox that an earlier flintd made is found, and what became of its containers.

use std::{sync::Arc, time::Duration};

use flint_api::{guest, vmm::ExitReason};
use tracing::warn;

use super::{
    super::{machine::Event, run::guest_id, steps::survey},
    Actor, Input, follow,
};
use crate::backend::{Sandbox, SandboxExit, TakeOver};

/// What the record says that the pod is to do.
#[derive(Clone, Copy)]
enum Wish {
    Run,
    StandStill,
    /// At once.
    End,
}

impl Actor {
    /// Looks for the sandbox that an earlier flintd made.
    pub(super) fn take_over(&mut self) {
        self.early = Some(Vec::new());
        let context = self.context.clone();
        let id = self.record.sandbox_id.clone();
        for digest in self.machine.digests().unwrap_or_default() {
            if !self.disks.iter().any(|known| known == digest) {
                self.disks.push(digest.to_owned());
            }
        }
        let (images, restoring) = (self.disks.len(), self.machine.restoring);
        let wish = match (self.machine.pause.is_some(), self.machine.terminating) {
            (true, None) => Wish::StandStill,
            (true, Some(Duration::ZERO)) => Wish::End,
            _ => Wish::Run,
        };
        self.spawn(async move {
            Some(match context.sandboxes.take_over(&id).await {
                Ok(TakeOver::Running(sandbox)) => look_into(sandbox, &id, images, wish).await,
                Ok(TakeOver::Ended(exit)) => Input::Event(Event::SandboxGone(exit)),
                // A sandbox that was to be restored was named before it was made.
                Err(error) => Input::Event(Event::SandboxGone(SandboxExit {
                    reason: if restoring {
                        ExitReason::Stopped
                    } else {
                        ExitReason::Killed
                    },
                    detail: format!("it could not be taken over: {error}"),
                })),
            })
        });
    }

    pub(super) async fn found(&mut self, sandbox: Arc<dyn Sandbox>, listed: &[guest::ContainerStatus]) {
        self.hold(&sandbox);
        self.refresh_volumes();
        self.seen(&sandbox, listed).await;
    }

    /// What became of the containers of a sandbox whose guest answers.
    pub(super) async fn seen(&mut self, sandbox: &Arc<dyn Sandbox>, listed: &[guest::ContainerStatus]) {
        use guest::container_status::State;
        let runs: Vec<_> = self.machine.runs().map(|(run, _)| run).collect();
        let known = |index: usize, run: u32| {
            let id = self
                .spec
                .containers
                .get(index)
                .map(|container| guest_id(&container.name, run));
            listed.iter().any(|status| {
                Some(&status.container_id) == id.as_ref() && matches!(status.state(), State::Running | State::Exited)
            })
        };
        let started: Vec<_> = runs
            .iter()
            .enumerate()
            .filter(|(index, run)| known(*index, **run))
            .map(|(index, _)| index)
            .collect();
        let event = Event::TakenOver {
            addresses: sandbox.addresses(),
            started: started.clone(),
        };
        self.handle(event).await;
        let going: Vec<_> = self.machine.runs().collect();
        for index in started {
            let Some((run, true)) = going.get(index).copied() else {
                continue;
            };
            let Some(this) = self.the_run(index, run) else { continue };
            let sender = self.sender.clone();
            self.spawn(async move { follow(&this, sender).await });
        }
    }
}

/// Has a sandbox that was found do as the record says. One that stands still although the record does not say so was being
/// paused, or saved, and nobody was told that it was.
async fn look_into(sandbox: Arc<dyn Sandbox>, id: &str, images: usize, wish: Wish) -> Input {
    let stands_still = sandbox.is_paused().await;
    let going = match (stands_still, wish) {
        (Ok(true), Wish::StandStill) => return Input::FoundPaused(sandbox),
        (Ok(true), Wish::End) => Err("it was to be killed where it stood".to_owned()),
        (Ok(true), Wish::Run) => sandbox.resume().await.map_err(|error| error.to_string()),
        (Ok(false), _) => Ok(()),
        (Err(error), _) => Err(error.to_string()),
    };
    let listed = match going {
        Ok(()) => survey(&sandbox, images).await,
        Err(error) => Err(error),
    };
    match listed {
        Ok(containers) => Input::Found(sandbox, containers),
        Err(error) => {
            warn!(
                sandbox = id,
                error, "the guest cannot be taken over, ending the sandbox"
            );
            sandbox.kill().await;
            Input::Event(Event::SandboxGone(sandbox.exited().await))
        }
    }
}
