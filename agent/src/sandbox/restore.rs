//! A sandbox that goes on where a saved one stood.
//!
//! It comes into being as a parked clone does, of another snapshot: memory mapped, state set, disks bound, behind a fence that is
//! shut. Its guest wakes up with another generation id and dials; the programs in it run by then, and nothing that they send
//! leaves before the guest has an identity of its own. One that does not acknowledge ends.

use std::{
    net::Ipv4Addr,
    os::fd::{AsFd, OwnedFd},
    sync::Arc,
};

use flint_api::{
    guest::guest_client::GuestClient,
    vmm::{self, CreateMachine, error::Code, request::Command},
};
use flint_snapshots::machines::ChunkedFile;

use super::{
    DiskSource, DiskSpec, Sandbox, SandboxError, SandboxSpec, blocking,
    control::ControlError,
    intent::Folder,
    manager::{Manager, checked},
    means::{Means, Wish, image_names},
    pages::Pages,
    shell::{DiskFds, GUEST_CID, Ready, Running, Shell, ShellPlan, awoken, bind_disk, identity_of, mark_ready},
    supervisor::{Attach, End, explain, supervise},
};
use crate::{
    backend::{Origin, SavedMachine},
    cgroup::Limits,
    network::{Gate, addresses::mac_of},
    timeline::Timeline,
};

/// A start under way.
struct Begun<'a> {
    means: &'a Means,
    spec: &'a SandboxSpec,
    origin: &'a Origin,
    /// Who brings its memory; absent: the file has it.
    pages: Option<&'a Pages>,
    gate: Option<&'a Gate>,
    end: &'a End,
    folder: &'a Folder,
    timeline: &'a Timeline,
}

impl Manager {
    /// Starts a sandbox that goes on where a saved one stood, and that has an identity of its own. Sizes and disks have to be the
    /// saved one's; its memory is `memory`, or in the origin's file. An error, or dropping the future, leaves nothing behind; after an error that has happened already.
    pub async fn restore(
        &self,
        mut spec: SandboxSpec,
        origin: &Origin,
        memory: Option<ChunkedFile>,
        timeline: &Timeline,
    ) -> Result<Sandbox, SandboxError> {
        let SavedMachine {
            machine, plugged_bytes, ..
        } = &origin.machine;
        // A machine may have room for more than its pod: the limits are the pod's.
        let limits = Limits {
            guest_memory_bytes: machine
                .memory_bytes
                .saturating_add(*plugged_bytes)
                .max(spec.memory_bytes),
            vcpus: spec.vcpus,
        };
        spec.vcpus = machine.vcpus;
        spec.memory_bytes = machine.memory_bytes;
        let spec = checked(spec).map_err(|error| SandboxError::Snapshot(error.to_string()))?;
        self.means.supplies.take().await?;
        let pages = match memory {
            Some(memory) => Some(self.means.serve_pages(memory).await?),
            None => None,
        };
        let (mut held, plan) = self.means.hold(Wish {
            id: &spec.id,
            net: !machine.nets.is_empty(),
            limits,
            images: image_names(&spec),
        })?;
        held.pages = pages.as_ref().map(|pages| Arc::clone(&pages.server));
        let folder = held.folder.clone();
        let gate = held.lease.as_ref().map(|lease| Arc::clone(lease.gate()));
        let gate = gate.as_deref();
        let (end, attach) = supervise(held);
        let guard = end.kill_on_drop();
        let begun = Begun {
            means: &self.means,
            spec: &spec,
            origin,
            pages: pages.as_ref(),
            gate,
            end: &end,
            folder: &folder,
            timeline,
        };
        match begun.start(plan, attach).await {
            Ok(ready) => {
                guard.disarm();
                Ok(Sandbox::new(&spec, gate.map(Gate::address), ready, end))
            }
            Err(error) => {
                let error = explain(&end, error).await;
                self.means.supplies.look_again().await?;
                Err(error)
            }
        }
    }
}

impl Begun<'_> {
    async fn start(&self, plan: ShellPlan, attach: Attach) -> Result<Ready, SandboxError> {
        let address = self.gate.map(Gate::address);
        let (shell, tap, disks) = tokio::try_join!(
            Shell::spawn(plan, attach, self.timeline),
            self.plug(address),
            self.open_disks(),
        )?;
        let stage = self.timeline.begin("vmm.load");
        self.load(&shell, address).await?;
        stage.end();

        let stage = self.timeline.begin("guest.wake");
        self.claim(&shell, &disks, tap.as_ref()).await?;
        awoken(self.end, self.means.config.wake_timeout).await?;
        stage.end();

        let mac = &self.origin.machine.mac;
        let interfaces = address.map(|address| self.means.interface(address, mac));
        let identity = identity_of(
            &self.spec.identity,
            interfaces.into_iter().collect(),
            self.means.config.idle_reclaim,
        )?;
        let running = Running { control: shell.control };
        let vsock = self.folder.path("vsock.sock");
        let ready = running.adopt(self.end, &vsock, identity, self.timeline).await?;
        self.run_hook(&ready).await?;
        if let Some(gate) = self.gate {
            self.means.network.open(gate)?;
        }
        mark_ready(self.folder)?;
        Ok(ready)
    }

    /// Has the pod put itself in order, behind the fence.
    async fn run_hook(&self, ready: &Ready) -> Result<(), SandboxError> {
        let Some(hook) = &self.origin.hook else {
            return Ok(());
        };
        let stage = self.timeline.begin("guest.hook");
        tokio::select! {
            ran = hook.run(GuestClient::new(ready.channel.clone())) => ran.map_err(SandboxError::Hook)?,
            _ = self.end.wait() => return Err(SandboxError::Died),
        }
        stage.end();
        Ok(())
    }

    async fn plug(&self, address: Option<Ipv4Addr>) -> Result<Option<OwnedFd>, SandboxError> {
        match address {
            Some(address) => Ok(Some(self.means.network.plug_fenced(address).await?)),
            None => Ok(None),
        }
    }

    /// The disks by serial; the writable one is a copy of the saved one.
    async fn open_disks(&self) -> Result<Vec<DiskFds>, SandboxError> {
        let mut disks = Vec::with_capacity(self.spec.disks.len());
        for disk in &self.spec.disks {
            disks.push(match &disk.source {
                DiskSource::Image { name, table, packs } => self.means.image(name, table, packs)?,
                DiskSource::Raw { file } => DiskFds::Raw(Arc::clone(file)),
                DiskSource::Scratch { .. } => {
                    let stage = self.timeline.begin("disk.copy");
                    let (scratch, files) = (Arc::clone(&self.means.scratch), Arc::clone(&self.origin.files));
                    let copy = blocking(move || scratch.copy_of(&files.scratch)).await??;
                    stage.end();
                    DiskFds::Raw(Arc::new(copy.into()))
                }
            });
        }
        Ok(disks)
    }

    /// Makes the shell a parked machine.
    async fn load(&self, shell: &Shell, address: Option<Ipv4Addr>) -> Result<(), SandboxError> {
        let machine = machine(&self.origin.machine.machine, address);
        let reserve = Command::ReserveMachine(vmm::ReserveMachine {
            machine: Some(machine),
            paged: self.pages.is_some(),
        });
        shell.control.command(reserve, &[]).await.map_err(refused)?;
        let files = &self.origin.files;
        let memory = self.pages.map_or(&files.memory, |pages| &pages.memory);
        let mut fds = vec![files.state.as_fd(), memory.as_fd()];
        fds.extend(self.pages.map(|pages| pages.connection.as_fd()));
        let load = Command::LoadSnapshot(vmm::LoadSnapshot {
            paged: self.pages.is_some(),
        });
        shell.control.command(load, &fds).await.map_err(refused)?;
        shell.bind_host().await
    }

    /// Binds what is the pod's, and lets it go on.
    async fn claim(&self, shell: &Shell, disks: &[DiskFds], tap: Option<&OwnedFd>) -> Result<(), SandboxError> {
        // Each in a packet of its own: an image may have as many files as a packet takes.
        for (disk, fds) in self.spec.disks.iter().zip(disks) {
            let (command, fds) = bind_disk(self.slot(disk)?, disk, fds);
            shell.control.command(Command::BindDisk(command), &fds).await?;
        }
        let net = self.spec.net.as_ref();
        let bind_net = |_: &OwnedFd| vmm::BindNet {
            slot: 0,
            rx_limit: net.and_then(|net| net.rx_limit),
            tx_limit: net.and_then(|net| net.tx_limit),
        };
        let claim = vmm::Claim {
            nets: tap.map(bind_net).into_iter().collect(),
            ..Default::default()
        };
        let fds: Vec<_> = tap.iter().map(|tap| tap.as_fd()).collect();
        Ok(shell.control.command(Command::Claim(claim), &fds).await?)
    }

    fn slot(&self, disk: &DiskSpec) -> Result<u32, SandboxError> {
        let slots = &self.origin.machine.machine.disks;
        let found = (0..).zip(slots).find(|(_, slot)| slot.serial == disk.serial);
        let missing = || SandboxError::Snapshot(format!("its machine has no disk {:?}", disk.serial));
        found.map(|(number, _)| number).ok_or_else(missing)
    }
}

/// The saved machine with an identity of its own.
fn machine(saved: &CreateMachine, address: Option<Ipv4Addr>) -> CreateMachine {
    let mut machine = saved.clone();
    for net in &mut machine.nets {
        net.mac = address.map(|address| mac_of(address).to_vec()).unwrap_or_default();
    }
    if let Some(vsock) = &mut machine.vsock {
        vsock.guest_cid = GUEST_CID;
    }
    machine
}

/// What the VMM says of a snapshot that is not for this host, or none at all.
fn refused(error: ControlError) -> SandboxError {
    match error {
        ControlError::Refused {
            code: Code::Resource | Code::Unsupported | Code::Invalid,
            message,
        } => SandboxError::Snapshot(message),
        other => other.into(),
    }
}

#[cfg(test)]
mod tests {
    use flint_api::vmm::{NetSlot, VsockSlot};

    use super::*;

    #[test]
    fn a_machine_that_is_made_again_differs_in_its_identity_alone() {
        let saved = CreateMachine {
            vcpus: 2,
            memory_bytes: 64 << 20,
            nets: vec![NetSlot::default()],
            vsock: Some(VsockSlot::default()),
            ..Default::default()
        };

        let made = machine(&saved, Some(Ipv4Addr::new(10, 88, 0, 7)));

        assert_eq!(made.nets[0].mac, mac_of(Ipv4Addr::new(10, 88, 0, 7)));
        assert_eq!(made.vsock.unwrap().guest_cid, GUEST_CID);
        assert_eq!((made.vcpus, made.memory_bytes), (2, 64 << 20));
    }

    #[test]
    fn only_what_the_vmm_says_of_the_snapshot_is_the_snapshots_fault() {
        let with = |code| ControlError::Refused {
            code,
            message: "CPU vendor".into(),
        };
        assert!(matches!(refused(with(Code::Unsupported)), SandboxError::Snapshot(line) if line == "CPU vendor"));
        assert!(matches!(refused(with(Code::Kvm)), SandboxError::Control(_)));
        assert!(matches!(
            refused(ControlError::Timeout(std::time::Duration::ZERO)),
            SandboxError::Control(_)
        ));
    }
}
