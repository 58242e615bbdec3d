//! From what every clone has to what its pod is to have: vCPUs, memory, and the cgroup's limits for them.
//!
//! ```text
//! claim ... dialled | limits, SetVcpus, SetMemory | identity | SetResources           | containers ... all memory is plugged
//!                     from here on the guest's kernel plugs    all vCPUs, FIRST of it               in the background
//! ```
//!
//! None of it is on the way to the clone's first instruction, and the limits are there before anything that needs them: a claim is
//! the same whatever its pod's size.

use std::time::Duration;

use flint_api::{
    guest::{SetResourcesRequest, guest_client::GuestClient},
    vmm::{self, request::Command},
};
use tonic::transport::Channel;

use super::shape::Shape;
use crate::{
    cgroup::Limits,
    sandbox::{SandboxError, SandboxSpec, control::Control, supervisor::End},
    timeline::Timeline,
};

/// So much of the plugged memory is there before a container begins. No program fills that faster than the guest's kernel plugs the
/// rest.
const FIRST: u64 = 512 << 20;
/// How long the guest may take until it has its vCPUs and that; it gives up sooner by itself where nothing comes.
const PATIENCE: Duration = Duration::from_secs(60);

/// What a sandbox is to have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Growth {
    vcpus: u32,
    memory_bytes: u64,
    /// Beyond the template's memory.
    plugged_bytes: u64,
}

impl Growth {
    /// To a sandbox that fits; none if it is as every clone is.
    pub(super) fn of(spec: &SandboxSpec, shape: &Shape) -> Option<Self> {
        let plugged_bytes = spec.memory_bytes.saturating_sub(shape.memory_bytes());
        (spec.vcpus > 1 || plugged_bytes > 0).then_some(Self {
            vcpus: spec.vcpus,
            memory_bytes: spec.memory_bytes,
            plugged_bytes,
        })
    }

    /// Lets a sandbox that runs grow: its limits first, so that nothing it is given can be too much.
    pub(super) async fn begin(&self, end: &End, control: &Control) -> Result<(), SandboxError> {
        let Self {
            vcpus,
            memory_bytes,
            plugged_bytes,
        } = *self;
        end.cgroup().set_limits(Limits {
            guest_memory_bytes: memory_bytes,
            vcpus,
        })?;
        if vcpus > 1 {
            let command = Command::SetVcpus(vmm::SetVcpus { vcpus });
            control.command(command, &[]).await?;
        }
        if plugged_bytes > 0 {
            let command = Command::SetMemory(vmm::SetMemory { plugged_bytes });
            control.command(command, &[]).await?;
        }
        Ok(())
    }

    /// Waits until the guest has what a container may count on from its first moment. The rest comes in the background.
    pub(super) async fn finish(&self, end: &End, guest: &Channel, timeline: &Timeline) -> Result<(), SandboxError> {
        let stage = timeline.begin("guest.size");
        tokio::select! {
            set = set(guest, self.first()) => set.map_err(|status| SandboxError::Size(Box::new(status)))?,
            _ = end.wait() => return Err(SandboxError::Died),
            () = tokio::time::sleep(PATIENCE) => return Err(SandboxError::SizeTimeout(PATIENCE)),
        }
        stage.end();
        if self.plugged_bytes > FIRST {
            tokio::spawn(watch(self.all(), end.clone(), guest.clone()));
        }
        Ok(())
    }

    fn first(&self) -> SetResourcesRequest {
        SetResourcesRequest {
            online_vcpus: self.vcpus,
            plugged_memory_bytes: self.plugged_bytes.min(FIRST),
        }
    }

    fn all(&self) -> SetResourcesRequest {
        SetResourcesRequest {
            online_vcpus: 0,
            plugged_memory_bytes: self.plugged_bytes,
        }
    }
}

async fn set(guest: &Channel, request: SetResourcesRequest) -> Result<(), tonic::Status> {
    GuestClient::new(guest.clone()).set_resources(request).await.map(drop)
}

/// Tells if a guest does not come to what it was given. It goes on with what it has: more is not its pod's limit, but its room.
async fn watch(request: SetResourcesRequest, end: End, guest: Channel) {
    let wanted = request.plugged_memory_bytes;
    tokio::select! {
        set = set(&guest, request) => match set {
            Ok(()) => tracing::debug!(wanted, "a sandbox has all of its memory"),
            Err(status) => tracing::warn!(wanted, %status, "a sandbox has less memory than its pod may use"),
        },
        _ = end.wait() => {}
    }
}

#[cfg(test)]
mod tests {
    use flint_api::vmm::CpuLevel;

    use super::*;
    use crate::sandbox::{Identity, pool::Config};

    fn growth(vcpus: u32, memory_bytes: u64) -> Option<Growth> {
        let config = Config {
            memory_bytes: 128 << 20,
            ..Config::default()
        };
        let shape = Shape::of(&config, CpuLevel::Host);
        let spec = SandboxSpec {
            id: "a".into(),
            vcpus,
            memory_bytes,
            disks: Vec::new(),
            net: None,
            identity: Identity::default(),
        };
        Growth::of(&spec, &shape)
    }

    #[test]
    fn a_pod_of_the_templates_size_does_not_grow() {
        assert_eq!(growth(1, 128 << 20), None);
    }

    #[test]
    fn a_container_waits_for_all_vcpus_and_for_some_memory() {
        let small = growth(1, 192 << 20).unwrap();
        assert_eq!(
            (small.first().online_vcpus, small.first().plugged_memory_bytes),
            (1, 64 << 20)
        );
        let large = growth(16, 32 << 30).unwrap();
        assert_eq!(
            (large.first().online_vcpus, large.first().plugged_memory_bytes),
            (16, FIRST)
        );
        assert_eq!(
            (large.all().online_vcpus, large.all().plugged_memory_bytes),
            (0, (32 << 30) - (128 << 20))
        );
        assert_eq!(growth(2, 128 << 20).unwrap().first().plugged_memory_bytes, 0);
    }
}
