//! [`Sandboxes`] over the microVM manager.

use std::{collections::HashSet, os::fd::OwnedFd, sync::Arc};

use flint_api::guest::guest_client::GuestClient;
use flint_snapshots::{
    images::{DeviceFiles, ImageStore, InUse},
    machines::{ChunkedFile, MachineError},
};
use tonic::{async_trait, transport::Channel};
use tracing::warn;

use crate::{
    backend::{
        Origin, Ready, RestoreError, Sandbox, SandboxError, SandboxExit, SandboxPlan, Sandboxes, SaveError, Stopped,
        TakeOver,
    },
    chain,
    probe::KvmKind,
    sandbox::{self, DiskSource, DiskSpec, Exited, MAX_PACKS, Manager, NetSpec, SandboxSpec, TakenOver, is_disk_full},
    saved::SavedFiles,
    timeline::Timeline,
    travel::MEMORY,
};

/// Sandboxes that are microVMs, with disks from the image store.
pub struct MicroVms {
    manager: Manager,
    images: ImageStore,
}

/// A microVM. What it reads is kept in the store as long as this value lives, which the pod's task holds to the end.
struct MicroVm {
    sandbox: sandbox::Sandbox,
    _images: Vec<InUse>,
}

impl MicroVms {
    /// Over a manager and the store.
    pub fn new(manager: Manager, images: ImageStore) -> Self {
        Self { manager, images }
    }

    async fn device(&self, digest: &str) -> Result<DeviceFiles, SandboxError> {
        let parsed = digest
            .parse()
            .map_err(|error| SandboxError(format!("image {digest}: {}", chain(&error))))?;
        let device = self.images.device(parsed).await;
        device.map_err(|error| SandboxError(format!("opening image {digest}: {}", chain(&error))))
    }

    /// What the manager makes of a plan, and what keeps its images in the store.
    async fn spec(&self, plan: SandboxPlan) -> Result<(SandboxSpec, Vec<InUse>), SandboxError> {
        let mut disks = Vec::new();
        let mut guards = Vec::new();
        for (number, digest) in plan.images.iter().enumerate() {
            let DeviceFiles { table, packs, guard } = self.device(digest).await?;
            guards.push(guard);
            disks.push(DiskSpec {
                serial: format!("image-{number}"),
                source: DiskSource::Image {
                    name: digest.clone(),
                    table: Arc::new(OwnedFd::from(table)),
                    packs: packs.into_iter().map(|pack| Arc::new(OwnedFd::from(pack))).collect(),
                },
                read_only: true,
                rate_limit: None,
            });
        }
        disks.push(DiskSpec {
            serial: "scratch".into(),
            source: DiskSource::Scratch {
                bytes: plan.scratch_bytes,
            },
            read_only: false,
            rate_limit: None,
        });
        let spec = SandboxSpec {
            id: plan.id,
            vcpus: plan.vcpus,
            memory_bytes: plan.memory_bytes,
            disks,
            net: Some(NetSpec::default()),
            identity: sandbox::Identity {
                hostname: plan.identity.hostname,
                dns: plan.identity.dns.unwrap_or_default(),
                aliases: plan.identity.host_aliases,
                sysctls: plan.identity.sysctls,
            },
        };
        Ok((spec, guards))
    }

    /// The memory of a saved sandbox where it is chunks; where this host cannot bring them while the guest runs, they become the
    /// origin's file, as long as the sandbox uses it.
    async fn memory_of(&self, mut origin: Origin) -> Result<(Origin, Option<ChunkedFile>), RestoreError> {
        let Some(name) = &origin.memory_in_store else {
            return Ok((origin, None));
        };
        let machines = self.images.machines();
        let gone = |error: MachineError| {
            let error = chain(&error);
            RestoreError::Refused(format!("its memory cannot be read, pull the snapshot again: {error}"))
        };
        let memory = machines.open(name, MEMORY).await.map_err(gone)?;
        if self.manager.can_page() && memory.packs.len() <= MAX_PACKS {
            return Ok((origin, Some(memory)));
        }
        let failed = |error: &dyn std::error::Error| RestoreError::Failed(format!("laying its memory out: {error}"));
        let file = self.manager.unnamed_file().map_err(|error| failed(&error))?;
        let [into, state, scratch] = [&file, &origin.files.state, &origin.files.scratch]
            .map(|file| file.try_clone().map_err(|error| failed(&error)));
        machines.lay_out(name, MEMORY, into?).await.map_err(gone)?;
        origin.files = Arc::new(SavedFiles {
            state: state?,
            memory: file,
            scratch: scratch?,
        });
        Ok((origin, None))
    }

    /// Keeps the images of a sandbox that was found running. One that is gone from the store, which takes a hand from
    /// outside, costs the sandbox nothing: its VMM has the files open.
    async fn hold(&self, sandbox: &sandbox::Sandbox) -> Vec<InUse> {
        let mut guards = Vec::new();
        for name in sandbox.images() {
            let Ok(digest) = name.parse() else {
                warn!(
                    sandbox = sandbox.id(),
                    image = name,
                    "the sandbox reads an image without a digest"
                );
                continue;
            };
            match self.images.hold(digest).await {
                Ok(guard) => guards.push(guard),
                Err(error) => {
                    warn!(
                        sandbox = sandbox.id(),
                        image = name,
                        error = chain(&error),
                        "an image in use is not in the store"
                    );
                }
            }
        }
        guards
    }
}

#[async_trait]
impl Sandboxes for MicroVms {
    fn pool(&self) -> Ready {
        self.manager.pool().ready()
    }

    async fn ready(&self) -> Result<KvmKind, SandboxError> {
        let ready = self.manager.ready().await;
        ready.map_err(|error| SandboxError(chain(&error)))
    }

    async fn launch(&self, plan: SandboxPlan, timeline: Timeline) -> Result<Arc<dyn Sandbox>, SandboxError> {
        let (spec, guards) = self.spec(plan).await?;
        let sandbox = self
            .manager
            .launch(spec, &timeline)
            .await
            .map_err(|error| SandboxError(chain(&error)))?;
        Ok(Arc::new(MicroVm {
            sandbox,
            _images: guards,
        }))
    }

    async fn restore(
        &self,
        plan: SandboxPlan,
        origin: Origin,
        timeline: Timeline,
    ) -> Result<Arc<dyn Sandbox>, RestoreError> {
        let (spec, _images) = self
            .spec(plan)
            .await
            .map_err(|error| RestoreError::Failed(error.to_string()))?;
        let (origin, memory) = self.memory_of(origin).await?;
        let restored = self.manager.restore(spec, &origin, memory, &timeline).await;
        let sandbox = restored.map_err(|error| match &error {
            sandbox::SandboxError::Snapshot(_) => RestoreError::Refused(chain(&error)),
            sandbox::SandboxError::Hook(_) => RestoreError::Hook(chain(&error)),
            _ => RestoreError::Failed(chain(&error)),
        })?;
        Ok(Arc::new(MicroVm { sandbox, _images }))
    }

    async fn take_over(&self, id: &str) -> Result<TakeOver, SandboxError> {
        match self
            .manager
            .take_over(id)
            .await
            .map_err(|error| SandboxError(chain(&error)))?
        {
            TakenOver::Running(sandbox) => {
                let _images = self.hold(&sandbox).await;
                Ok(TakeOver::Running(Arc::new(MicroVm { sandbox, _images })))
            }
            TakenOver::Ended(exited) => Ok(TakeOver::Ended(exit(exited))),
        }
    }

    async fn end_unknown(&self, known: &HashSet<String>) -> Result<(), SandboxError> {
        self.manager.end_unknown(known).await;
        Ok(())
    }
}

#[async_trait]
impl Sandbox for MicroVm {
    fn guest(&self) -> GuestClient<Channel> {
        self.sandbox.guest()
    }

    fn addresses(&self) -> Vec<String> {
        self.sandbox.addresses().iter().map(ToString::to_string).collect()
    }

    async fn exited(&self) -> SandboxExit {
        exit(self.sandbox.wait().await)
    }

    async fn settled(&self) {
        self.sandbox.settled().await;
    }

    async fn pause(&self) -> Result<(), SandboxError> {
        self.sandbox.pause().await.map_err(|error| SandboxError(chain(&error)))
    }

    async fn resume(&self) -> Result<(), SandboxError> {
        self.sandbox.resume().await.map_err(|error| SandboxError(chain(&error)))
    }

    async fn save(&self, files: Arc<SavedFiles>) -> Result<Stopped, SaveError> {
        self.sandbox.save(files).await.map_err(|error| {
            if is_disk_full(&error) {
                SaveError::NoSpace
            } else {
                SaveError::Failed(chain(&error))
            }
        })
    }

    async fn is_paused(&self) -> Result<bool, SandboxError> {
        self.sandbox
            .is_paused()
            .await
            .map_err(|error| SandboxError(chain(&error)))
    }

    async fn kill(&self) {
        self.sandbox.kill();
    }
}

fn exit(exited: Exited) -> SandboxExit {
    SandboxExit {
        reason: exited.reason,
        detail: exited.detail,
    }
}
