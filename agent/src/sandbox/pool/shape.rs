//! What all clones of a template have in common, and which sandboxes can be one.

use flint_api::vmm::{CreateMachine, DiskSlot, NetSlot, VsockSlot};
use thiserror::Error;

use super::Config;
use crate::{
    cgroup::Limits,
    sandbox::{DiskSource, DiskSpec, SandboxSpec, shell::GUEST_CID},
};

/// Serial of the last disk.
const SCRATCH: &str = "scratch";

/// The machine that a template is of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Shape {
    vcpus: u32,
    memory_bytes: u64,
    /// Image slots: `image-0` and so on.
    images: u32,
    /// Size of the scratch disk that is ready; another size fits too, but has to be made first.
    pub scratch_bytes: u64,
}

/// Why a sandbox cannot be a clone.
#[derive(Debug, Error, PartialEq, Eq)]
pub(super) enum Misfit {
    #[error("it wants {0} vCPUs")]
    Vcpus(u32),
    #[error("it wants {0} bytes of memory")]
    Memory(u64),
    #[error("it wants no network")]
    NoNet,
    #[error("there is no slot for its disk {0:?}")]
    Disk(String),
}

impl Shape {
    pub(super) fn of(config: &Config) -> Self {
        Self {
            vcpus: 1,
            memory_bytes: config.memory_bytes,
            images: config.images,
            scratch_bytes: config.scratch_bytes,
        }
    }

    /// Whether a sandbox can be a clone.
    pub(super) fn fits(&self, spec: &SandboxSpec) -> Result<(), Misfit> {
        if spec.vcpus != self.vcpus {
            return Err(Misfit::Vcpus(spec.vcpus));
        }
        if spec.memory_bytes != self.memory_bytes {
            return Err(Misfit::Memory(spec.memory_bytes));
        }
        if spec.net.is_none() {
            return Err(Misfit::NoNet);
        }
        match spec.disks.iter().find(|disk| self.slot(disk).is_none()) {
            Some(disk) => Err(Misfit::Disk(disk.serial.clone())),
            None => Ok(()),
        }
    }

    /// Where a disk goes.
    pub(super) fn slot(&self, disk: &DiskSpec) -> Option<u32> {
        let read_only = disk.read_only || matches!(disk.source, DiskSource::Image { .. });
        if disk.serial == SCRATCH {
            return (!read_only).then_some(self.images);
        }
        let number = disk.serial.strip_prefix("image-")?.parse().ok();
        // Written in no other way, or two disks could have one slot.
        number.filter(|number| read_only && *number < self.images && disk.serial == image(*number))
    }

    /// The machine, with an identity of its own.
    pub(super) fn machine(&self, mac: [u8; 6]) -> CreateMachine {
        let slot = |serial: String, read_only| DiskSlot {
            serial,
            read_only,
            queues: 0,
        };
        CreateMachine {
            vcpus: self.vcpus,
            memory_bytes: self.memory_bytes,
            disks: (0..self.images)
                .map(|number| slot(image(number), true))
                .chain([slot(SCRATCH.into(), false)])
                .collect(),
            nets: vec![NetSlot { mac: mac.to_vec() }],
            vsock: Some(VsockSlot { guest_cid: GUEST_CID }),
            rng: true,
            ..Default::default()
        }
    }

    /// Of a clone's cgroup: those of every pod that fits, so that a claim has none to set.
    pub(super) fn limits(&self) -> Limits {
        Limits {
            guest_memory_bytes: self.memory_bytes,
            vcpus: self.vcpus,
        }
    }

    /// Of the cgroup in which the template is made, which writes the guest's memory to files meanwhile.
    pub(super) fn template_limits(&self) -> Limits {
        Limits {
            guest_memory_bytes: self.memory_bytes.saturating_mul(2),
            vcpus: self.vcpus,
        }
    }
}

fn image(number: u32) -> String {
    format!("image-{number}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sandbox::{Identity, NetSpec};

    fn shape() -> Shape {
        Shape::of(&Config {
            memory_bytes: 64 << 20,
            images: 2,
            ..Config::default()
        })
    }

    fn disk(serial: &str, read_only: bool) -> DiskSpec {
        DiskSpec {
            serial: serial.into(),
            source: DiskSource::Scratch { bytes: 1 << 20 },
            read_only,
            rate_limit: None,
        }
    }

    fn spec() -> SandboxSpec {
        SandboxSpec {
            id: "a".into(),
            vcpus: 1,
            memory_bytes: 64 << 20,
            disks: vec![disk("image-0", true), disk("image-1", true), disk("scratch", false)],
            net: Some(NetSpec::default()),
            identity: Identity::default(),
        }
    }

    #[test]
    fn a_pod_fits_whose_disks_have_slots_of_their_kind() {
        let slots: Vec<_> = spec().disks.iter().map(|disk| shape().slot(disk)).collect();
        assert_eq!(slots, [Some(0), Some(1), Some(2)]);
        assert_eq!(shape().fits(&spec()), Ok(()));
        let slots: Vec<_> = shape()
            .machine([2; 6])
            .disks
            .into_iter()
            .map(|slot| slot.serial)
            .collect();
        assert_eq!(slots, ["image-0", "image-1", "scratch"]);
        for (serial, read_only) in [
            ("image-2", true),
            ("image-0", false),
            ("image-00", true),
            ("image-+1", true),
            ("scratch", true),
            ("other", true),
        ] {
            let mut spec = spec();
            spec.disks.push(disk(serial, read_only));
            assert_eq!(shape().fits(&spec), Err(Misfit::Disk(serial.into())));
        }
    }

    #[test]
    fn a_pod_of_another_size_does_not_fit() {
        let vcpus = SandboxSpec { vcpus: 2, ..spec() };
        assert_eq!(shape().fits(&vcpus), Err(Misfit::Vcpus(2)));
        let memory = SandboxSpec {
            memory_bytes: 66 << 20,
            ..spec()
        };
        assert_eq!(shape().fits(&memory), Err(Misfit::Memory(66 << 20)));
        let net = SandboxSpec { net: None, ..spec() };
        assert_eq!(shape().fits(&net), Err(Misfit::NoNet));
    }
}
