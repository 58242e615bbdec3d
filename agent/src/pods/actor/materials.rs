//! A pod's configMaps and secrets change while it runs.

use std::sync::Arc;

use flint_api::{guest, host};
use tokio::sync::oneshot;
use tracing::warn;

use super::{
    super::{
        PodError,
        environment::Downward,
        machine::{Event, Timer},
        materials::UpdateError,
    },
    Actor, Input,
};

/// Hears which version the pod has.
pub(in super::super) type MaterialsReply = oneshot::Sender<Result<u64, PodError>>;

impl Actor {
    /// Takes newer ones; whoever waited for what was missing tries again.
    pub(super) fn update_materials(&mut self, given: host::PodMaterials, reply: MaterialsReply) {
        if self.machine.is_paused() {
            // Its guest answers nobody.
            return drop(reply.send(Err(PodError::Paused(self.uid.clone()))));
        }
        if !given.registry_credentials.is_empty() {
            self.credentials.clone_from(&given.registry_credentials);
        }
        let (materials, sandbox) = (self.materials.clone(), self.sandbox.clone());
        let (volumes, uid) = (self.volumes(), self.uid.clone());
        let waiting = self.waiting_for_materials();
        let sender = self.sender.clone();
        self.spawn(async move {
            let asked = given.version;
            let updated = materials.update(given, sandbox.as_ref(), volumes).await;
            let taken = updated.is_ok();
            let answer = updated.map_err(|error| match error {
                UpdateError::Stale(known) => PodError::StaleMaterials {
                    uid,
                    given: asked,
                    known,
                },
                UpdateError::Guest(status) => PodError::Sandbox {
                    uid,
                    doing: "updating its materials",
                    why: status.message().to_owned(),
                },
            });
            // Whoever asked may have hung up.
            let _ = reply.send(answer);
            for index in waiting.into_iter().filter(|_| taken) {
                let due = Event::Timer(Timer::Restart(index));
                if sender.send(Input::Event(due)).await.is_err() {
                    break;
                }
            }
            None
        });
    }

    /// Has the guest's volumes show the pod as it is: its labels may have changed, or it is a fork of another one.
    pub(super) fn refresh_volumes(&mut self) {
        let volumes = self.volumes();
        let (Some(sandbox), false) = (self.sandbox.clone(), volumes.is_empty()) else {
            return;
        };
        let (materials, uid) = (self.materials.clone(), self.uid.clone());
        self.spawn(async move {
            if let Err(status) = materials.deliver(&sandbox, volumes).await {
                warn!(uid, %status, "bringing the pod's volumes up to date failed");
            }
            None
        });
    }

    fn volumes(&self) -> Vec<guest::ProjectedVolume> {
        let addresses = self
            .sandbox
            .as_ref()
            .map(|sandbox| sandbox.addresses())
            .unwrap_or_default();
        let meta = self.meta();
        let downward = Downward {
            meta: &meta,
            spec: &self.spec,
            addresses: &addresses,
            size: self.context.sizing.of(&self.spec),
        };
        downward.volumes()
    }

    pub(super) fn meta(&self) -> Arc<host::PodMeta> {
        let pod = self.record.pod.as_ref();
        Arc::new(pod.and_then(|pod| pod.meta.clone()).unwrap_or_default())
    }

    fn waiting_for_materials(&self) -> Vec<usize> {
        use host::container_status::State;
        let waits = |status: &host::ContainerStatus| matches!(&status.state, Some(State::Waiting(waiting)) if waiting.reason == "CreateContainerConfigError");
        let containers = self.machine.status().containers;
        let waiting = containers.iter().enumerate().filter(|(_, status)| waits(status));
        waiting.map(|(index, _)| index).collect()
    }
}
