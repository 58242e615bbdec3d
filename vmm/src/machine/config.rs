//! `CreateMachine`, checked: nothing behind this point sees a value that the contract does not allow.

use std::collections::BTreeSet;

use flint_api::vmm::{CpuLevel, CreateMachine, NetSlot, VsockSlot};
use thiserror::Error;

use crate::vcpu::level::Level;

/// Most vCPUs.
pub const MAX_VCPUS: u32 = 32;
const MIN_MEMORY: u64 = 16 << 20;
/// More would come near to where memory is plugged.
const MAX_MEMORY: u64 = 128 << 30;
/// Linux' memory block on x86: it takes hot-plugged memory in pieces of this size.
const HOTPLUG_STEP: u64 = 128 << 20;
const MAX_HOTPLUG: u64 = 64 << 30;
const MEMORY_STEP: u64 = 2 << 20;
const MAX_QUEUES: u32 = 16;
const MAX_SERIAL: usize = 20;
const MIN_CID: u64 = 3;
/// More devices than this have no window and no place in the DSDT.
pub const MAX_DEVICES: usize = 40;

/// A request that asks for a machine that cannot be.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum Error {
    /// vCPUs.
    #[error("vcpus is {0}: must be 1 to {MAX_VCPUS}")]
    Vcpus(u32),
    /// Memory.
    #[error("memory_bytes is {0}: must be a multiple of 2 MiB from 16 MiB to 128 GiB")]
    Memory(u64),
    /// Memory to be plugged.
    #[error("hotplug_bytes is {0}: must be a multiple of 128 MiB and at most 64 GiB")]
    Hotplug(u64),
    /// Too many slots.
    #[error("{0} devices asked for: at most {MAX_DEVICES} fit")]
    Devices(usize),
    /// A disk's serial.
    #[error("disks[{0}].serial {1:?}: must be 1 to {MAX_SERIAL} printable ASCII characters, unique in the machine")]
    Serial(usize, String),
    /// A disk's queues.
    #[error("disks[{0}].queues is {1}: must be at most {MAX_QUEUES}")]
    Queues(usize, u32),
    /// A MAC address.
    #[error("nets[{0}].mac: must be six bytes, locally administered and unicast")]
    Mac(usize),
    /// A CPU level.
    #[error("cpu_level is {0}, which is none")]
    Level(i32),
    /// A CID.
    #[error("vsock.guest_cid is {0}: must be 3 to 4294967294")]
    Cid(u64),
}

/// A machine that can be made.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// Number of vCPUs.
    pub vcpus: u8,
    /// Guest memory in bytes.
    pub memory: u64,
    /// Disk slots.
    pub disks: Vec<Disk>,
    /// MAC address of each network slot.
    pub nets: Vec<[u8; 6]>,
    /// Guest CID of the vsock device, if there is one.
    pub vsock: Option<u64>,
    /// Whether there is an entropy source.
    pub rng: bool,
    /// Memory that may be plugged, in bytes; 0: none.
    pub hotplug: u64,
    /// Whether there is a balloon.
    pub balloon: bool,
    /// What its guest is told of the processor.
    pub level: Level,
    /// All of it as it was asked for, without what is an identity and may differ between a snapshot and its clones: MAC
    /// addresses and the CID.
    pub shape: CreateMachine,
}

/// A disk slot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Disk {
    /// What the guest finds it by.
    pub serial: String,
    /// The guest may not write.
    pub read_only: bool,
    /// Request queues.
    pub queues: u16,
}

impl TryFrom<CreateMachine> for Config {
    type Error = Error;

    fn try_from(message: CreateMachine) -> Result<Self, Error> {
        let shape = shape(&message);
        let CreateMachine {
            vcpus,
            memory_bytes,
            disks,
            nets,
            vsock,
            rng,
            hotplug_bytes,
            balloon,
            cpu_level,
        } = message;
        let others = [vsock.is_some(), rng, hotplug_bytes > 0, balloon];
        let devices = disks.len() + nets.len() + others.into_iter().filter(|there| *there).count();
        if devices > MAX_DEVICES {
            return Err(Error::Devices(devices));
        }
        if !(MIN_MEMORY..=MAX_MEMORY).contains(&memory_bytes) || memory_bytes % MEMORY_STEP != 0 {
            return Err(Error::Memory(memory_bytes));
        }
        if hotplug_bytes > MAX_HOTPLUG || hotplug_bytes % HOTPLUG_STEP != 0 {
            return Err(Error::Hotplug(hotplug_bytes));
        }
        let mut serials = BTreeSet::new();
        let disks = disks.into_iter().enumerate().map(|(index, slot)| {
            let proper = slot.serial.bytes().all(|byte| byte.is_ascii_graphic());
            if !proper || !(1..=MAX_SERIAL).contains(&slot.serial.len()) || !serials.insert(slot.serial.clone()) {
                return Err(Error::Serial(index, slot.serial));
            }
            if slot.queues > MAX_QUEUES {
                return Err(Error::Queues(index, slot.queues));
            }
            // At most MAX_QUEUES.
            #[allow(clippy::cast_possible_truncation)]
            let queues = slot.queues.max(1) as u16;
            Ok(Disk {
                serial: slot.serial,
                read_only: slot.read_only,
                queues,
            })
        });
        Ok(Self {
            vcpus: u8::try_from(vcpus)
                .ok()
                .filter(|count| (1..=MAX_VCPUS).contains(&u32::from(*count)))
                .ok_or(Error::Vcpus(vcpus))?,
            memory: memory_bytes,
            disks: disks.collect::<Result<_, _>>()?,
            nets: nets
                .iter()
                .enumerate()
                .map(|(index, slot)| mac(index, &slot.mac))
                .collect::<Result<_, _>>()?,
            vsock: vsock.map(|slot| cid(slot.guest_cid)).transpose()?,
            rng,
            shape,
            hotplug: hotplug_bytes,
            balloon,
            level: level(cpu_level)?,
        })
    }
}

fn shape(message: &CreateMachine) -> CreateMachine {
    let mut shape = message.clone();
    for disk in &mut shape.disks {
        disk.queues = disk.queues.max(1);
    }
    shape.nets.fill(NetSlot::default());
    shape.vsock = message.vsock.map(|_| VsockSlot::default());
    shape
}

fn level(number: i32) -> Result<Level, Error> {
    match CpuLevel::try_from(number) {
        Ok(CpuLevel::Host) => Ok(Level::Host),
        Ok(CpuLevel::X8664V2) => Ok(Level::V2),
        Ok(CpuLevel::X8664V3) => Ok(Level::V3),
        Ok(CpuLevel::X8664V4) => Ok(Level::V4),
        Err(_) => Err(Error::Level(number)),
    }
}

fn mac(index: usize, bytes: &[u8]) -> Result<[u8; 6], Error> {
    /// Of the first byte: bit 0 group, bit 1 local (IEEE 802, 8.2.2).
    const LOCAL_UNICAST: u8 = 0b10;
    let mac = <[u8; 6]>::try_from(bytes).map_err(|_| Error::Mac(index))?;
    if mac[0] & 0b11 == LOCAL_UNICAST {
        Ok(mac)
    } else {
        Err(Error::Mac(index))
    }
}

fn cid(cid: u64) -> Result<u64, Error> {
    if (MIN_CID..u64::from(u32::MAX)).contains(&cid) {
        Ok(cid)
    } else {
        Err(Error::Cid(cid))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use flint_api::vmm::DiskSlot;

    fn good() -> CreateMachine {
        CreateMachine {
            vcpus: 2,
            memory_bytes: 64 << 20,
            disks: vec![DiskSlot {
                serial: "image-0".into(),
                read_only: true,
                queues: 0,
            }],
            nets: vec![NetSlot {
                mac: vec![2, 0, 0, 0, 0, 1],
            }],
            vsock: Some(VsockSlot { guest_cid: 3 }),
            rng: true,
            hotplug_bytes: 1 << 30,
            balloon: true,
            cpu_level: CpuLevel::Host.into(),
        }
    }

    #[test]
    fn a_good_request_is_taken_as_it_is() {
        let config = Config::try_from(good()).unwrap();
        assert_eq!((config.vcpus, config.memory, config.vsock), (2, 64 << 20, Some(3)));
        assert_eq!(
            config.disks,
            [Disk {
                serial: "image-0".into(),
                read_only: true,
                queues: 1
            }]
        );
    }

    #[test]
    fn every_bad_value_is_named() {
        type Spoil = fn(&mut CreateMachine);
        let cases: [(Spoil, &str); 15] = [
            (|m| m.vcpus = 0, "vcpus"),
            (|m| m.vcpus = 33, "vcpus"),
            (|m| m.vcpus = 257, "vcpus"),
            (|m| m.memory_bytes = 14 << 20, "memory_bytes"),
            (|m| m.memory_bytes = (64 << 20) + 4096, "memory_bytes"),
            (|m| m.memory_bytes = 1 << 40, "memory_bytes"),
            (|m| m.hotplug_bytes = 2 << 20, "hotplug_bytes"),
            (|m| m.hotplug_bytes = 65 << 30, "hotplug_bytes"),
            (|m| m.disks[0].serial = "x".repeat(21), "disks[0].serial"),
            (|m| m.disks.push(m.disks[0].clone()), "disks[1].serial"),
            (|m| m.disks[0].queues = 17, "disks[0].queues"),
            (|m| m.nets[0].mac = vec![3, 0, 0, 0, 0, 1], "nets[0].mac"),
            (|m| m.nets[0].mac = vec![2], "nets[0].mac"),
            (|m| m.vsock = Some(VsockSlot { guest_cid: 2 }), "guest_cid"),
            (|m| m.nets = vec![m.nets[0].clone(); 40], "devices"),
        ];
        for (spoil, named) in cases {
            let mut message = good();
            spoil(&mut message);
            let error = Config::try_from(message).unwrap_err().to_string();
            assert!(error.contains(named), "{error}");
        }
    }
}
