//! What all clones of a template have in common, and which sandboxes can be one.

use flint_api::vmm::{CpuLevel, CreateMachine, DiskSlot, NetSlot, VsockSlot};
use thiserror::Error;

use super::Config;
use crate::{
    cgroup::Limits,
    sandbox::{DiskSource, DiskSpec, SandboxSpec, shell::GUEST_CID},
};

/// Serial of the last disk.
const SCRATCH: &str = "scratch";
/// What a machine's room for more memory is made of (`CreateMachine.hotplug_bytes`).
const ROOM_STEP: u64 = 128 << 20;
/// No machine has more (`CreateMachine`).
const MOST_ROOM: u64 = 64 << 30;
const MOST_VCPUS: u32 = 32;
/// Kernel parameters of a template: vCPUs but the first are left alone, and memory that is plugged is taken at once.
const GROWING: &str = "maxcpus=1 memhp_default_state=online";

/// The machine that a template is of: room for the largest pod, of which nothing but the least is in use.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Shape {
    /// Most vCPUs of a pod; the template runs on one.
    vcpus: u32,
    /// What the template has.
    memory_bytes: u64,
    /// What can be plugged beyond.
    room_bytes: u64,
    /// Image slots: `image-0` and so on.
    images: u32,
    /// What guests are told of the processor.
    cpu_level: CpuLevel,
    /// Size of the scratch disk that is ready; another size fits too, but has to be made first.
    pub scratch_bytes: u64,
}

/// Why a sandbox cannot be a clone.
#[derive(Debug, Error, PartialEq, Eq)]
pub(super) enum Misfit {
    #[error("it wants {wanted} vCPUs, {most} is the most")]
    Vcpus { wanted: u32, most: u32 },
    #[error("it wants {wanted} bytes of memory, {least} to {most} can be had")]
    Memory { wanted: u64, least: u64, most: u64 },
    #[error("it wants no network")]
    NoNet,
    #[error("there is no slot for its disk {0:?}")]
    Disk(String),
}

impl Shape {
    pub(super) fn of(config: &Config, cpu_level: CpuLevel) -> Self {
        Self {
            vcpus: config.vcpus.clamp(1, MOST_VCPUS),
            memory_bytes: config.memory_bytes,
            room_bytes: config
                .largest_bytes
                .saturating_sub(config.memory_bytes)
                .min(MOST_ROOM)
                .next_multiple_of(ROOM_STEP),
            images: config.images,
            cpu_level,
            scratch_bytes: config.scratch_bytes,
        }
    }

    /// Whether a sandbox can be a clone.
    pub(super) fn fits(&self, spec: &SandboxSpec) -> Result<(), Misfit> {
        if spec.vcpus > self.vcpus {
            return Err(Misfit::Vcpus {
                wanted: spec.vcpus,
                most: self.vcpus,
            });
        }
        let (least, most) = (self.memory_bytes, self.memory_bytes.saturating_add(self.room_bytes));
        if !(least..=most).contains(&spec.memory_bytes) {
            return Err(Misfit::Memory {
                wanted: spec.memory_bytes,
                least,
                most,
            });
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

    /// Of a clone that has not grown.
    pub(super) fn memory_bytes(&self) -> u64 {
        self.memory_bytes
    }

    /// The kernel command line of the template.
    pub(super) fn cmdline(&self, cmdline: &str) -> String {
        format!("{cmdline} {GROWING}")
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
            hotplug_bytes: self.room_bytes,
            balloon: true,
            cpu_level: self.cpu_level.into(),
        }
    }

    /// Of a clone's cgroup until it has woken up, so that a claim has none to set.
    pub(super) fn limits(&self) -> Limits {
        Limits {
            guest_memory_bytes: self.memory_bytes,
            vcpus: 1,
        }
    }

    /// Of the cgroup in which the template is made, which writes the guest's memory to files meanwhile.
    pub(super) fn template_limits(&self) -> Limits {
        Limits {
            guest_memory_bytes: self.memory_bytes.saturating_mul(2),
            vcpus: 1,
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
        let config = Config {
            vcpus: 4,
            memory_bytes: 64 << 20,
            largest_bytes: 1 << 30,
            images: 2,
            ..Config::default()
        };
        Shape::of(&config, CpuLevel::Host)
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
    fn a_pod_of_any_size_up_to_the_largest_fits() {
        let sized = |vcpus, memory_bytes| {
            shape().fits(&SandboxSpec {
                vcpus,
                memory_bytes,
                ..spec()
            })
        };
        // Room comes in steps of 128 MiB: a little more than was asked for.
        let most = (64 << 20) + (1 << 30);
        for (vcpus, memory) in [(1, 64 << 20), (4, 64 << 20), (1, 66 << 20), (4, most)] {
            assert_eq!(sized(vcpus, memory), Ok(()), "{vcpus} {memory}");
        }
        assert_eq!(sized(5, 64 << 20), Err(Misfit::Vcpus { wanted: 5, most: 4 }));
        for wanted in [62 << 20, most + (2 << 20)] {
            let least = 64 << 20;
            assert_eq!(sized(1, wanted), Err(Misfit::Memory { wanted, least, most }));
        }
        let net = SandboxSpec { net: None, ..spec() };
        assert_eq!(shape().fits(&net), Err(Misfit::NoNet));
    }
}
