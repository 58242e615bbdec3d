//! One clone: parked, claimed, given its identity.
//!
//! What happens between the request for a sandbox and the clone's first instruction is one message with descriptors that are
//! open. Everything with a name on this host is made before, or after it while the guest wakes up.

use std::{
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::Arc,
};

use flint_api::vmm::{self, MAX_FDS, error::Code, request::Command};
use thiserror::Error;
use tokio_util::sync::DropGuard;

use super::{
    Shared, WorkingSet,
    growth::Growth,
    lock,
    shape::Shape,
    template::{PLACEHOLDER_MAC, Template, TemplateError},
};
use crate::{
    network::{Gate, addresses::mac_of},
    sandbox::{
        DiskSource, Sandbox, SandboxError, SandboxSpec,
        control::{Control, ControlError},
        intent::{Folder, Intent},
        means::{Means, Wish, image_names},
        shell::{DiskFds, Ready, Running, Shell, awoken, bind_disk, identity_of, mark_ready, random},
        supervisor::{End, explain, supervise},
    },
    timeline::Timeline,
};

/// What a sandbox has on this host, whoever has it.
#[derive(Debug)]
struct Body {
    /// Of its folder, as long as it is parked, and of its cgroup.
    name: String,
    uid: u32,
    gate: Arc<Gate>,
    folder: Folder,
    control: Control,
    end: End,
    /// For what it uses of its memory, if nothing was replayed to it.
    lesson: Option<Arc<WorkingSet>>,
    /// Ends it with this.
    guard: DropGuard,
}

/// A clone that has not run an instruction. Dropped, it ends.
#[derive(Debug)]
pub(super) struct Parked {
    body: Body,
    tap: OwnedFd,
    scratch: Arc<OwnedFd>,
}

/// A clone that a pod has, and that is about to wake up. Dropped, it ends.
pub(in crate::sandbox) struct Claimed {
    body: Body,
    growth: Option<Growth>,
    _refill: Refill,
}

/// Has the pool refilled when a start is over, not while it is on its way.
struct Refill(Arc<Shared>);

impl Drop for Refill {
    fn drop(&mut self) {
        self.0.changed.notify_one();
    }
}

/// A pod did not get a clone.
#[derive(Debug, Error)]
pub(super) enum ClaimFailure {
    /// The clone is no more, which says nothing about the next.
    #[error(transparent)]
    Gone(SandboxError),
    /// What the pod brings cannot be used.
    #[error(transparent)]
    Refused(SandboxError),
}

/// The disks of a pod, each with its slot's number; without files for the one that the clone has.
pub(super) struct Disks(Vec<(u32, Option<DiskFds>)>);

impl Disks {
    pub(super) async fn of(spec: &SandboxSpec, shape: &Shape, means: &Means) -> Result<Self, SandboxError> {
        let mut disks = Vec::with_capacity(spec.disks.len());
        for disk in &spec.disks {
            // It fits, or nobody would ask.
            let Some(slot) = shape.slot(disk) else { continue };
            let fds = match &disk.source {
                DiskSource::Image { name, table, packs } => Some(means.image(name, table, packs)?),
                DiskSource::Raw { file } => Some(DiskFds::Raw(Arc::clone(file))),
                DiskSource::Scratch { bytes } if *bytes == shape.scratch_bytes => None,
                DiskSource::Scratch { bytes } => Some(DiskFds::Raw(means.make_scratch(*bytes).await?)),
            };
            disks.push((slot, fds));
        }
        Ok(Self(disks))
    }
}

impl Parked {
    /// Makes one. It belongs to `shared` until it is claimed.
    pub(super) async fn make(means: &Means, shared: &Shared, template: &Template) -> Result<Self, SandboxError> {
        let name = new_name("parked")?;
        let (held, plan) = means.hold(Wish {
            id: &name,
            net: true,
            limits: shared.shape.limits(),
            images: Vec::new(),
        })?;
        let (folder, uid) = (held.folder.clone(), plan.uid);
        // It was asked for.
        let Some(gate) = held.lease.as_ref().map(|lease| Arc::clone(lease.gate())) else {
            return Err(SandboxError::Died);
        };
        let address = gate.address();
        let (end, attach) = supervise(held);
        let guard = end.kill_on_drop();
        shared.answer_for(&name, &end);
        let timeline = Timeline::new();
        let parts = async {
            let (shell, tap, scratch) = tokio::try_join!(
                Shell::spawn(plan, attach, &timeline),
                async { Ok(means.network.plug_fenced(address).await?) },
                means.make_scratch(shared.shape.scratch_bytes),
            )?;
            let loaded = load(&shell, shared.shape.machine(mac_of(address)), template.files()).await;
            loaded.map_err(|failure| match failure {
                LoadFailure::Refused(line) => template.error(TemplateError::Refused(line)),
                LoadFailure::Other(error) => error,
            })?;
            let lesson = lesson(template, &shell.control).await?;
            Ok((shell.control, tap, scratch, lesson))
        };
        match parts.await {
            Ok((control, tap, scratch, lesson)) => Ok(Self {
                body: Body {
                    name,
                    uid,
                    gate,
                    folder,
                    control,
                    end,
                    lesson,
                    guard,
                },
                tap,
                scratch,
            }),
            Err(error) => Err(explain(&end, error).await),
        }
    }

    /// Whether others have meanwhile shown what it will use of its memory.
    pub(super) fn can_learn(&self) -> bool {
        self.body.lesson.as_ref().is_some_and(|set| set.is_recorded())
    }

    /// Has it use that. None: it is no more.
    pub(super) async fn learn(mut self) -> Option<Self> {
        if let Some(set) = &self.body.lesson
            && set.replay(&self.body.control).await.ok()?
        {
            self.body.lesson = None;
        }
        Some(self)
    }

    pub(super) fn name(&self) -> &str {
        &self.body.name
    }

    /// Its end.
    pub(super) fn end(&self) -> &End {
        &self.body.end
    }

    /// Makes it a pod's, and lets it go on.
    pub(super) async fn claim(
        self,
        spec: &SandboxSpec,
        shape: &Shape,
        disks: &Disks,
        shared: &Arc<Shared>,
    ) -> Result<Claimed, ClaimFailure> {
        let refill = Refill(Arc::clone(shared));
        debug_assert!(shape.fits(spec).is_ok(), "looked at before");
        match self.bind_and_go(spec, disks).await {
            Ok(()) => {
                lock(&shared.ends).remove(&self.body.name);
                Ok(Claimed {
                    body: self.body,
                    growth: Growth::of(spec, shape),
                    _refill: refill,
                })
            }
            Err(error @ (ControlError::Closed(_) | ControlError::Send(_))) => Err(ClaimFailure::Gone(error.into())),
            Err(error) => Err(ClaimFailure::Refused(explain(&self.body.end, error.into()).await)),
        }
    }

    async fn bind_and_go(&self, spec: &SandboxSpec, disks: &Disks) -> Result<(), ControlError> {
        let control = &self.body.control;
        let own = DiskFds::Raw(Arc::clone(&self.scratch));
        let mut bound: Vec<_> = spec
            .disks
            .iter()
            .zip(&disks.0)
            .map(|(disk, (slot, fds))| bind_disk(*slot, disk, fds.as_ref().unwrap_or(&own)))
            .collect();
        // The tap, and then as much as one packet takes.
        let total = 1 + bound.iter().map(|(_, fds)| fds.len()).sum::<usize>();
        if total > MAX_FDS {
            let (large, small): (Vec<_>, Vec<_>) = bound.into_iter().partition(|(_, fds)| fds.len() > 1);
            for (command, fds) in large {
                control.command(Command::BindDisk(command), &fds).await?;
            }
            bound = small;
        }
        let mut fds = Vec::new();
        let mut claim = vmm::Claim::default();
        for (disk, its) in bound {
            claim.disks.push(vmm::ClaimDisk {
                disk: Some(disk),
                // At most MAX_FDS.
                fds: u32::try_from(its.len()).unwrap_or(u32::MAX),
            });
            fds.extend(its);
        }
        let net = spec.net.as_ref();
        claim.nets.push(vmm::BindNet {
            slot: 0,
            rx_limit: net.and_then(|net| net.rx_limit),
            tx_limit: net.and_then(|net| net.tx_limit),
        });
        fds.push(self.tap.as_fd());
        control.command(Command::Claim(claim), &fds).await
    }
}

/// A template was not loaded.
pub(super) enum LoadFailure {
    /// It is not for this host, or none at all, says the VMM.
    Refused(String),
    /// Which is not the template's fault.
    Other(SandboxError),
}

impl From<ControlError> for LoadFailure {
    fn from(error: ControlError) -> Self {
        match error {
            ControlError::Refused {
                code: Code::Resource | Code::Unsupported | Code::Invalid,
                message,
            } => Self::Refused(message),
            other => Self::Other(other.into()),
        }
    }
}

/// Makes a shell a parked machine.
pub(super) async fn load(
    shell: &Shell,
    machine: vmm::CreateMachine,
    files: [BorrowedFd<'_>; 2],
) -> Result<(), LoadFailure> {
    let reserve = Command::ReserveMachine(vmm::ReserveMachine {
        machine: Some(machine),
        ..Default::default()
    });
    let reserved = shell.control.command(reserve, &[]).await;
    reserved.map_err(|error| LoadFailure::Other(error.into()))?;
    let load = Command::LoadSnapshot(vmm::LoadSnapshot::default());
    shell.control.command(load, &files).await?;
    shell.bind_host().await.map_err(LoadFailure::Other)
}

/// Gives a parked machine what others have used of its memory, or has it be one from which that is learnt.
async fn lesson(template: &Template, control: &Control) -> Result<Option<Arc<WorkingSet>>, ControlError> {
    let Some(set) = template.working_set() else {
        return Ok(None);
    };
    let replayed = set.replay(control).await?;
    Ok((!replayed).then(|| Arc::clone(set)))
}

impl Claimed {
    /// Waits for the guest, gives it its size and identity, and then opens its network. A guest that does not acknowledge ends.
    pub(in crate::sandbox) async fn adopt(
        self,
        means: &Means,
        spec: SandboxSpec,
        timeline: &Timeline,
    ) -> Result<Sandbox, SandboxError> {
        match self.wake(means, &spec, timeline).await {
            Ok(ready) => {
                let Body {
                    guard,
                    end,
                    gate,
                    lesson,
                    ..
                } = self.body;
                guard.disarm();
                Ok(Sandbox::new(&spec, Some(gate.address()), ready, end).teaching(lesson))
            }
            Err(error) => Err(explain(&self.body.end, error).await),
        }
    }

    async fn wake(&self, means: &Means, spec: &SandboxSpec, timeline: &Timeline) -> Result<Ready, SandboxError> {
        let Body { folder, end, gate, .. } = &self.body;
        let stage = timeline.begin("guest.wake");
        // While the guest wakes up.
        folder.hand_over(&means.sandboxes, &self.intent(spec))?;
        awoken(end, means.config.wake_timeout).await?;
        stage.end();
        if let Some(growth) = &self.growth {
            growth.begin(end, &self.body.control).await?;
        }
        let interface = means.interface(gate.address(), &PLACEHOLDER_MAC);
        let identity = identity_of(&spec.identity, vec![interface], means.config.idle_reclaim)?;
        let running = Running {
            control: self.body.control.clone(),
        };
        let ready = running
            .adopt(end, &folder.path("vsock.sock"), identity, timeline)
            .await?;
        if let Some(growth) = &self.growth {
            growth.finish(end, &ready.channel, timeline).await?;
        }
        let stage = timeline.begin("network.open");
        means.network.open(gate)?;
        stage.end();
        mark_ready(folder)?;
        Ok(ready)
    }

    fn intent(&self, spec: &SandboxSpec) -> Intent {
        Intent {
            id: spec.id.clone(),
            uid: self.body.uid,
            address: Some(self.body.gate.address()),
            images: image_names(spec),
            parked_as: Some(self.body.name.clone()),
        }
    }
}

/// A name that no sandbox had before: ids of pods' sandboxes are not made of these words.
pub(super) fn new_name(kind: &str) -> Result<String, SandboxError> {
    let random = u64::from_le_bytes(random()?);
    Ok(format!("{kind}-{random:016x}"))
}
