//! A pod's sandbox pauses and goes on.
//!
//! The sandbox stands still first and the record says so afterwards, and whoever asked has the answer last. So a flintd that was
//! killed on the way leaves a sandbox that stands still and a record that does not say so: the next one has it go on, for
//! nobody was told that it is paused.

use std::sync::Arc;

use flint_api::guest;
use tracing::warn;

use super::{
    super::{PodError, machine::Event, machine::Life, steps::survey},
    Actor, Ask, Command, Input, Reply,
};
use crate::backend::{Sandbox, SandboxError};

/// What is known of a sandbox that goes on.
pub(in crate::pods) enum Going {
    /// All.
    On,
    /// It was found standing still, and its guest could be asked only now.
    Seen(Vec<guest::ContainerStatus>),
    /// It was found standing still, and its guest does not answer.
    Mute(String),
}

impl Actor {
    /// Has the sandbox do what it is asked for.
    pub(super) fn ask(&mut self, ask: Ask, reply: Reply) {
        match ask {
            Ask::Pause => self.pause(reply),
            Ask::Resume => self.wish_to_resume(reply),
        }
    }

    /// Has it do what was asked for while it was being looked for.
    pub(super) fn answer_early(&mut self) {
        for command in self.early.take().into_iter().flatten() {
            self.do_with_sandbox(command);
        }
    }

    /// Has the sandbox as a whole do something, or be saved.
    pub(super) fn do_with_sandbox(&mut self, command: Command) {
        match command {
            Command::Ask(ask, reply) => self.ask(ask, reply),
            Command::Save(order) => self.save(*order),
            Command::Materials(materials, reply) => self.update_materials(*materials, reply),
            Command::Update(_) | Command::Terminate(_) => {}
        }
    }

    /// Has the sandbox stand still, if there is one that runs.
    fn pause(&mut self, reply: Reply) {
        let sandbox = match self.sandbox.clone().filter(|_| self.machine.life() == Life::Up) {
            Some(sandbox) if !self.machine.is_terminating() => sandbox,
            Some(_) => return answer(reply, Err(PodError::Terminating(self.uid.clone()))),
            None => return answer(reply, Err(PodError::NotUp(self.uid.clone()))),
        };
        if self.machine.is_paused() {
            return answer(reply, Ok(()));
        }
        let turn = self.turn.clone();
        self.spawn(async move {
            let _turn = turn.lock().await;
            Some(Input::Stood(sandbox.pause().await, reply))
        });
    }

    /// The sandbox stands still, or could not be brought to it.
    pub(super) async fn stood(&mut self, result: Result<(), SandboxError>, reply: Reply) {
        if let Err(error) = result {
            return answer(reply, Err(self.failed("pausing it", &error)));
        }
        self.handle(Event::Paused).await;
        if !self.machine.is_paused() {
            return answer(reply, Err(PodError::Terminating(self.uid.clone())));
        }
        self.answer_when_known(reply);
    }

    /// Answers when the record is durable, and shown to everybody.
    fn answer_when_known(&mut self, reply: Reply) {
        let journal = self.context.journal.clone();
        self.spawn(async move {
            journal.flush().await;
            answer(reply, Ok(()));
            None
        });
    }

    /// Has the sandbox go on, for somebody who wants to know.
    fn wish_to_resume(&mut self, reply: Reply) {
        if self.machine.is_paused() {
            self.resume(Some(reply));
        } else {
            // Whatever it is doing, it does not stand still.
            answer(reply, Ok(()));
        }
    }

    /// Has the sandbox go on.
    pub(super) fn resume(&mut self, reply: Option<Reply>) {
        let Some(sandbox) = self.sandbox.clone() else {
            if let Some(reply) = reply {
                answer(reply, Err(PodError::NotUp(self.uid.clone())));
            }
            return;
        };
        let unseen = self.machine.pause.as_ref().is_some_and(|pause| pause.unseen);
        let images = self.disks.len();
        let turn = self.turn.clone();
        self.spawn(async move {
            let _turn = turn.lock().await;
            Some(Input::Went(go_on(&sandbox, unseen, images).await, reply))
        });
    }

    /// The sandbox goes on, or cannot.
    pub(super) async fn went(&mut self, result: Result<Going, SandboxError>, reply: Option<Reply>) {
        let uid = self.uid.clone();
        let outcome = match result {
            Ok(Going::On) => {
                self.handle(Event::Resumed).await;
                Ok(())
            }
            Ok(Going::Seen(containers)) => {
                if self.machine.is_paused()
                    && let Some(sandbox) = self.sandbox.clone()
                {
                    self.seen(&sandbox, &containers).await;
                }
                Ok(())
            }
            Ok(Going::Mute(error)) => {
                warn!(
                    uid,
                    error, "the guest does not answer after its pause, ending the sandbox"
                );
                self.end_sandbox();
                Err(PodError::NotUp(uid))
            }
            Err(error) => {
                warn!(uid, %error, "the sandbox cannot go on");
                if self.machine.is_terminating() {
                    self.end_sandbox();
                }
                Err(self.failed("resuming it", &error))
            }
        };
        match (reply, outcome) {
            (Some(reply), Ok(())) => self.answer_when_known(reply),
            (Some(reply), Err(error)) => answer(reply, Err(error)),
            (None, _) => {}
        }
    }

    fn end_sandbox(&mut self) {
        if let Some(sandbox) = self.sandbox.clone() {
            self.spawn(async move {
                sandbox.kill().await;
                None
            });
        }
    }

    fn failed(&self, doing: &'static str, error: &SandboxError) -> PodError {
        PodError::Sandbox {
            uid: self.uid.clone(),
            doing,
            why: error.to_string(),
        }
    }
}

async fn go_on(sandbox: &Arc<dyn Sandbox>, unseen: bool, images: usize) -> Result<Going, SandboxError> {
    sandbox.resume().await?;
    if !unseen {
        return Ok(Going::On);
    }
    Ok(survey(sandbox, images).await.map_or_else(Going::Mute, Going::Seen))
}

fn answer(reply: Reply, outcome: Result<(), PodError>) {
    // Whoever asked may have hung up.
    let _ = reply.send(outcome);
}
