//! Machine snapshots: all of a machine that stands still, in two files.
//!
//! - [`container`]: the state file's frame: versions, sections, checksums;
//! - [`passport`]: what a snapshot needs of a host, and the check of it;
//! - this module: what the sections hold. The parts themselves are told where they live: `vcpu::state`, `machine::chipset`,
//!   `machine::devices`, `ports::serial`, and each virtio device's `State`;
//! - `memory::file`: the memory file; `machine::saving`: both files while the guest runs.
//!
//! Sections are protobuf messages written as Rust structures: tagged fields, so that a field that is added does not end older
//! snapshots, and an encoding that is the same for the same state. KVM's own structures are in them as bytes. What changes the
//! meaning of what is there makes a new format: then [`VERSION`] moves on, and the one before it can still be read.

pub mod container;
pub mod passport;

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use flint_api::vmm::CreateMachine;
use prost::Message;
use thiserror::Error;

use self::container::{Container, MAX_BYTES, Section};
use self::passport::Passport;
use crate::machine::chipset::{ChipsetRecord, ChipsetState};
use crate::machine::devices::DeviceRecord;
use crate::memory::Range;
use crate::memory::file::Id;
use crate::memory::mapped::MAX_BASES;
use crate::platform::generation::GenerationState;
use crate::ports::serial::{self, SerialRecord};
use crate::vcpu::state::{VcpuRecord, VcpuState, VcpuTime};

/// The newest format. Each snapshot is written in the oldest one that can tell it, so that older programs can load it.
///
/// - 1: all of guest memory is in the memory file;
/// - 2: it may be in several, see [`MachineRecord::bases`].
pub const VERSION: u32 = 2;

/// A state file that cannot be written or used.
#[derive(Debug, Error)]
pub enum Error {
    /// Not a file with bytes.
    #[error("the state file is no regular file")]
    Kind,
    /// Reading failed.
    #[error("reading the state file")]
    Read(#[source] io::Error),
    /// Writing failed.
    #[error("writing the state file")]
    Write(#[source] io::Error),
    /// More than any machine has.
    #[error("the state file has {0} bytes, more than any machine's")]
    TooLong(u64),
    /// Damaged, or something else.
    #[error(transparent)]
    Container(#[from] container::Error),
    /// A section that contradicts itself. Its checksum is right, so it was made like this.
    #[error("the state file's {section} section has a bad {what}")]
    Section {
        /// Which one.
        section: Section,
        /// What of it.
        what: String,
    },
}

fn bad(section: Section, what: impl Into<String>) -> Error {
    let what = what.into();
    Error::Section { section, what }
}

/// A saved machine.
#[derive(Clone, Debug, PartialEq)]
pub struct Snapshot {
    /// Ties the state file to its memory file.
    pub id: Id,
    /// What it needs of a host.
    pub passport: Passport,
    /// What it consists of.
    pub machine: MachineRecord,
    /// vCPUs, the first one first.
    pub vcpus: Vec<Box<VcpuState>>,
    /// Interrupt controllers.
    pub chipset: ChipsetState,
    /// The serial line.
    pub serial: serial::State,
    /// The generation id, which a clone replaces.
    pub generation: GenerationState,
    /// Virtio devices in their order.
    pub devices: Vec<DeviceRecord>,
    /// kvmclock.
    pub clock: u64,
}

/// What a machine consists of.
#[derive(Clone, PartialEq, Message)]
pub struct MachineRecord {
    /// As it was asked for, without what is an identity: MAC addresses and the CID.
    #[prost(message, optional, tag = "1")]
    pub shape: Option<CreateMachine>,
    /// Where its memory lies; in the memory file the ranges follow each other.
    #[prost(message, repeated, tag = "2")]
    pub ranges: Vec<RangeRecord>,
    /// Ids of the snapshots whose memory files are needed beside its own, the nearest first. Empty: all is in its own. Older
    /// programs would overlook them, so a snapshot that has any is of format 2.
    #[prost(bytes = "vec", repeated, tag = "3")]
    pub bases: Vec<Vec<u8>>,
}

impl MachineRecord {
    /// Ids of this snapshot's memory files: its own, then its bases'.
    ///
    /// # Errors
    /// They are none, or too many.
    pub fn files(&self, id: Id) -> Result<Vec<Id>, Error> {
        let bases = self.bases.iter().map(|base| Id::try_from(&base[..]));
        let ids = std::iter::once(Ok(id)).chain(bases).collect::<Result<Vec<_>, _>>();
        ids.ok()
            .filter(|ids| ids.len() <= 1 + MAX_BASES)
            .ok_or_else(|| bad(Section::Machine, "list of bases"))
    }
}

/// A range of guest memory.
#[derive(Clone, Copy, PartialEq, Message)]
pub struct RangeRecord {
    /// First guest address.
    #[prost(uint64, tag = "1")]
    pub start: u64,
    /// Length in bytes.
    #[prost(uint64, tag = "2")]
    pub size: u64,
}

impl From<Range> for RangeRecord {
    fn from(Range { start, size }: Range) -> Self {
        Self { start, size }
    }
}

#[derive(Clone, PartialEq, Message)]
struct VcpusRecord {
    #[prost(message, repeated, tag = "1")]
    vcpus: Vec<VcpuRecord>,
}

#[derive(Clone, PartialEq, Message)]
struct PlatformRecord {
    #[prost(message, optional, tag = "1")]
    chipset: Option<ChipsetRecord>,
    #[prost(message, optional, tag = "2")]
    serial: Option<SerialRecord>,
    #[prost(message, optional, tag = "3")]
    generation: Option<GenerationState>,
}

#[derive(Clone, PartialEq, Message)]
struct DevicesRecord {
    #[prost(message, repeated, tag = "1")]
    devices: Vec<DeviceRecord>,
}

#[derive(Clone, PartialEq, Message)]
struct TimeRecord {
    /// Nanoseconds.
    #[prost(fixed64, tag = "1")]
    clock: u64,
    #[prost(message, repeated, tag = "2")]
    vcpus: Vec<VcpuTime>,
}

impl Snapshot {
    /// The state file's bytes.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let vcpus = self.vcpus.iter().map(|vcpu| VcpuRecord::from(&**vcpu)).collect();
        let platform = PlatformRecord {
            chipset: Some((&self.chipset).into()),
            serial: Some((&self.serial).into()),
            generation: Some(self.generation.clone()),
        };
        let devices = DevicesRecord {
            devices: self.devices.clone(),
        };
        let time = TimeRecord {
            clock: self.clock,
            vcpus: self.vcpus.iter().map(|vcpu| vcpu.time).collect(),
        };
        let sections = [
            self.passport.encode_to_vec(),
            self.machine.encode_to_vec(),
            VcpusRecord { vcpus }.encode_to_vec(),
            platform.encode_to_vec(),
            devices.encode_to_vec(),
            time.encode_to_vec(),
        ];
        let version = if self.machine.bases.is_empty() { 1 } else { 2 };
        container::build(version, self.id, &sections)
    }

    /// Reads a state file's bytes.
    ///
    /// # Errors
    /// They are none, of an unknown format, damaged, or contradict themselves.
    pub fn decode(bytes: &[u8]) -> Result<Self, Error> {
        let container = Container::parse(bytes)?;
        let VcpusRecord { vcpus } = message(&container, Section::Vcpus)?;
        let platform: PlatformRecord = message(&container, Section::Chipset)?;
        let DevicesRecord { devices } = message(&container, Section::Devices)?;
        let time: TimeRecord = message(&container, Section::Time)?;
        if time.vcpus.len() != vcpus.len() {
            return Err(bad(Section::Time, "number of vCPUs"));
        }
        let vcpus = vcpus
            .iter()
            .zip(time.vcpus)
            .map(|(vcpu, time)| vcpu.to_state(time).map(Box::new));
        let chipset = platform
            .chipset
            .as_ref()
            .ok_or("interrupt controllers, which are missing");
        let serial = platform.serial.as_ref().ok_or("serial line, which is missing");
        Ok(Self {
            id: container.id,
            passport: message(&container, Section::Passport)?,
            machine: message(&container, Section::Machine)?,
            vcpus: vcpus
                .collect::<Result<_, _>>()
                .map_err(|what| bad(Section::Vcpus, what))?,
            chipset: chipset
                .and_then(ChipsetState::try_from)
                .map_err(|what| bad(Section::Chipset, what))?,
            serial: serial
                .and_then(serial::State::try_from)
                .map_err(|what| bad(Section::Chipset, what))?,
            generation: platform.generation.unwrap_or_default(),
            devices,
            clock: time.clock,
        })
    }

    /// Writes the state file, in place of what is in `file`.
    ///
    /// # Errors
    /// The host cannot write it. A file that was begun is refused by [`Self::read`].
    pub fn write(&self, file: &File) -> Result<(), Error> {
        file.set_len(0).map_err(Error::Write)?;
        file.write_all_at(&self.encode(), 0).map_err(Error::Write)
    }

    /// Reads a state file.
    ///
    /// # Errors
    /// As [`Self::decode`], or the host cannot read it.
    pub fn read(file: &File) -> Result<Self, Error> {
        let metadata = file.metadata().map_err(Error::Read)?;
        if !metadata.is_file() {
            return Err(Error::Kind);
        }
        let length = metadata.len();
        let fitting = usize::try_from(length).ok().filter(|_| length <= MAX_BYTES);
        let mut bytes = vec![0; fitting.ok_or(Error::TooLong(length))?];
        file.read_exact_at(&mut bytes, 0).map_err(Error::Read)?;
        Self::decode(&bytes)
    }
}

fn message<M: Message + Default>(container: &Container<'_>, section: Section) -> Result<M, Error> {
    M::decode(container.section(section)).map_err(|error| bad(section, error.to_string()))
}

#[cfg(test)]
mod tests;
