//! A pod is saved as it runs.
//!
//! Memory, disk and how far the logs are have to be of the same moment: the sandbox stands still when most of its memory is
//! written, until the rest of all that is. The record does not say so: a flintd that is killed over it leaves a sandbox that
//! the next one has go on, and files without a name that it removes.

use std::{
    io,
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use flint_api::host;
use tracing::{info, warn};

use super::{
    super::{PodError, PodRecord, machine::Life, timestamp},
    Actor, SaveOrder,
};
use crate::{
    backend::{Sandbox, SandboxError, SaveError, SavedMachine, Stopped},
    hook::Hook,
    logs::Logs,
    saved::{Draft, SavedFiles, SavedOutput, SavedRecord},
};

/// What a snapshot is made of.
struct Job {
    uid: String,
    logs: Arc<Logs>,
    /// Each container's present run.
    runs: Vec<(String, u32)>,
    sandbox: Arc<dyn Sandbox>,
    hook: Option<Hook>,
    draft: Draft,
    record: PodRecord,
    disks: Vec<String>,
}

impl Actor {
    /// Makes a snapshot, beside the actor.
    pub(super) fn save(&mut self, order: SaveOrder) {
        let SaveOrder { draft, reply } = order;
        let refusal = match &self.sandbox {
            Some(_) if self.machine.is_terminating() => PodError::Terminating(self.uid.clone()),
            Some(_) if self.machine.is_starting() => PodError::Starting(self.uid.clone()),
            Some(sandbox) if self.machine.life() == Life::Up => {
                let job = Job {
                    uid: self.uid.clone(),
                    logs: self.context.logs.clone(),
                    runs: self.present_runs(),
                    sandbox: sandbox.clone(),
                    hook: self.before_snapshot(),
                    draft,
                    record: self.record.clone(),
                    disks: self.disks.clone(),
                };
                let turn = self.turn.clone();
                self.spawn(async move {
                    // Whoever asked may have hung up; the snapshot is there all the same.
                    let _ = reply.send(job.run(&turn).await);
                    None
                });
                return;
            }
            _ => PodError::NotUp(self.uid.clone()),
        };
        let _ = reply.send(Err(refusal));
    }

    fn before_snapshot(&self) -> Option<Hook> {
        let hook = self.spec.snapshot_hooks.as_ref()?.before_snapshot.as_ref()?;
        let mut containers = self.spec.containers.iter();
        let container = containers.position(|container| container.name == hook.container)?;
        Some(Hook::of(hook, self.guest_id(container)?))
    }

    fn present_runs(&self) -> Vec<(String, u32)> {
        let names = self.spec.containers.iter().map(|container| container.name.clone());
        names.zip(self.machine.runs().map(|(run, _)| run)).collect()
    }
}

impl Job {
    async fn run(self, turn: &tokio::sync::Mutex<()>) -> Result<host::Snapshot, PodError> {
        let files = Arc::new(self.draft.files()?);
        let stood = {
            let _turn = turn.lock().await;
            self.stand_and_save(&files).await
        };
        let (machine, outputs, paused_for) = stood?;
        let Self {
            uid,
            draft,
            record,
            disks,
            ..
        } = self;
        let record = SavedRecord {
            outputs,
            ..describe(record, disks, machine, paused_for)
        };
        let finished = tokio::task::spawn_blocking(move || draft.finish(&files, record)).await;
        let snapshot = finished.map_err(|error| failed(&uid, "saving it", &error.to_string()))??;
        info!(uid, snapshot = snapshot.name, ?paused_for, "saved a pod");
        Ok(snapshot)
    }

    /// Saves the sandbox, which goes on afterwards as before. Says for how long it stood still.
    async fn stand_and_save(&self, files: &Arc<SavedFiles>) -> Result<Stood, PodError> {
        let pausing = |error: SandboxError| failed(&self.uid, "pausing it", &error.to_string());
        if self.sandbox.is_paused().await.map_err(pausing)? {
            if self.hook.is_some() {
                return Err(PodError::Paused(self.uid.clone()));
            }
            let (machine, outputs, _) = self.save(files).await?;
            return Ok((machine, outputs, Duration::ZERO));
        }
        if let Some(hook) = &self.hook {
            let ran = hook.run(self.sandbox.guest()).await;
            ran.map_err(|source| PodError::Hook {
                uid: self.uid.clone(),
                source,
            })?;
        }
        let saved = self.save(files).await;
        if let Err(error) = self.sandbox.resume().await {
            // If its end is why, this changes nothing.
            warn!(uid = self.uid, %error, "the sandbox cannot go on after it was saved, ending it");
            self.sandbox.kill().await;
        }
        let (machine, outputs, stopped) = saved?;
        Ok((machine, outputs, stopped.elapsed()))
    }

    /// Saves it; tells since when it stands still.
    async fn save(&self, files: &Arc<SavedFiles>) -> Result<(SavedMachine, Vec<SavedOutput>, Instant), PodError> {
        let Stopped { machine, at } = self.sandbox.save(files.clone()).await.map_err(|error| match error {
            SaveError::NoSpace => self.draft.refused(io::ErrorKind::StorageFull.into()).into(),
            SaveError::Failed(why) => failed(&self.uid, "saving it", &why),
        })?;
        Ok((machine, self.outputs().await?, at))
    }

    /// How far the logs are, of a guest that stands still: it has given what is in them, and what it was told to forget is in them.
    async fn outputs(&self) -> Result<Vec<SavedOutput>, PodError> {
        let (logs, uid, runs) = (self.logs.clone(), self.uid.clone(), self.runs.clone());
        let read = tokio::task::spawn_blocking(move || {
            let of = |(container, run): (String, u32)| {
                let offset = logs.offset(&uid, &container, run)?;
                Ok(SavedOutput { container, run, offset })
            };
            runs.into_iter().map(of).collect::<io::Result<_>>()
        });
        let read = read.await.unwrap_or_else(|error| Err(io::Error::other(error)));
        read.map_err(|error| failed(&self.uid, "reading how far its logs are", &error.to_string()))
    }
}

/// What was saved of a pod that stood still, and for how long it did.
type Stood = (SavedMachine, Vec<SavedOutput>, Duration);

fn failed(uid: &str, doing: &'static str, why: &str) -> PodError {
    PodError::Sandbox {
        uid: uid.to_owned(),
        doing,
        why: why.to_owned(),
    }
}

fn describe(record: PodRecord, disks: Vec<String>, saved: SavedMachine, paused_for: Duration) -> SavedRecord {
    let meta = record.pod.as_ref().and_then(|pod| pod.meta.clone());
    let snapshot = host::Snapshot {
        created_at: Some(timestamp(SystemTime::now())),
        pod: meta,
        images: disks.clone(),
        vcpus: saved.machine.vcpus,
        memory_bytes: saved.machine.memory_bytes,
        // A duration of this process fits.
        paused_for: paused_for.try_into().ok(),
        ..host::Snapshot::default()
    };
    SavedRecord {
        snapshot: Some(snapshot),
        pod: Some(record),
        machine: Some(saved.machine),
        disks,
        mac: saved.mac,
        plugged_bytes: saved.plugged_bytes,
        outputs: Vec::new(),
        memory_in_store: false,
    }
}
