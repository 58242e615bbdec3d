//! A machine: what it consists of, and what is done to it as a whole.
//!
//! - [`life`]: the phases that it goes through, each a type of its own, and [`loader`], the thread of one of them;
//! - [`parts`]: how its parts are made, [`config`] of what was asked for, [`devices`] in their windows;
//! - [`snapshot`]: saving and loading it, with the interrupt controllers of [`chipset`]; [`saving`]: while the guest runs;
//! - [`working_set`]: what clones use, recorded and replayed.

pub mod chipset;
pub mod config;
pub mod devices;
pub mod life;
mod loader;
pub mod parts;
pub mod saving;
pub mod snapshot;
mod working_set;

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::sync::{Arc, Mutex, PoisonError};

use flint_api::vmm::{CreateMachine, MemoryState};
use kvm_ioctls::VmFd;
use thiserror::Error;

use self::config::Config;
use self::devices::{AnyDevice, Builder, Slot};
pub use self::life::{Created, HostFiles, Parked, Paused, Reserved, Running, Saving, Shell, Start, Step};
pub use self::parts::{create_interrupt_controllers, create_vm};
use self::working_set::Replayed;
use crate::acpi::{self, VirtioWindow};
use crate::boot::{self, Entry};
use crate::bus::{self, Bus};
use crate::dial::Dialer;
use crate::exit::ExitLatch;
use crate::memory::pagemap::Pagemap;
use crate::memory::{self, Anonymous, GuestMemory, MemorySource};
use crate::platform::generation::{self, Generation};
use crate::ports::serial::{self, Serial};
use crate::snapshot::passport::{Host, Mismatch};
use crate::vcpu;
use crate::vcpu::cpuid::Processor;
use crate::vcpu::thread::{Context, Vcpu};
use crate::virtio::balloon::{Balloon, Target};
use crate::virtio::block::{Block, BlockResource, Ring};
use crate::virtio::mem::{Mem, MemSlot, Requested};
use crate::virtio::net::{Net, NetResource};
use crate::virtio::rng::Rng;
use crate::virtio::vsock::{Vsock, VsockResource};
use crate::virtio::{Device, DeviceError};

/// A machine that cannot be made, or a step that failed.
#[derive(Debug, Error)]
pub enum Error {
    /// KVM refused something of the VM.
    #[error("{what}")]
    Kvm {
        /// What was being done.
        what: &'static str,
        /// What KVM said.
        source: kvm_ioctls::Error,
    },
    /// A vCPU.
    #[error(transparent)]
    Vcpu(#[from] vcpu::Error),
    /// The guest cannot be told of a processor.
    #[error(transparent)]
    Processor(#[from] vcpu::cpuid::Error),
    /// Memory.
    #[error(transparent)]
    Memory(#[from] memory::Error),
    /// A virtio device cannot be made.
    #[error(transparent)]
    Place(#[from] devices::Error),
    /// A virtio device refuses.
    #[error("{name}")]
    Device {
        /// Which one.
        name: String,
        /// Why.
        source: DeviceError,
    },
    /// A slot that is not there.
    #[error("there is no {kind} slot {slot}: the machine has {count}")]
    NoSlot {
        /// Disk, net, vsock, memory or balloon.
        kind: &'static str,
        /// What was asked for.
        slot: u32,
        /// How many there are.
        count: usize,
    },
    /// The port bus.
    #[error(transparent)]
    Bus(#[from] bus::Error),
    /// The host is out of something.
    #[error("{what}")]
    Host {
        /// What was being done.
        what: &'static str,
        /// What the host said.
        source: io::Error,
    },
    /// The kernel.
    #[error(transparent)]
    Boot(#[from] boot::Error),
    /// ACPI tables.
    #[error(transparent)]
    Acpi(#[from] acpi::Error),
    /// The VM generation id.
    #[error(transparent)]
    Generation(#[from] generation::Error),
    /// The serial line.
    #[error(transparent)]
    Serial(#[from] serial::Error),
    /// A state file.
    #[error(transparent)]
    Snapshot(#[from] crate::snapshot::Error),
    /// A snapshot of another host.
    #[error(transparent)]
    Passport(#[from] Mismatch),
    /// A snapshot of another machine.
    #[error("the snapshot is of another machine: {what} is {theirs} there, {ours} here")]
    Shape {
        /// What differs.
        what: &'static str,
        /// In the snapshot.
        theirs: String,
        /// In what was reserved.
        ours: String,
    },
    /// A base that nothing is known of.
    #[error(
        "the machine was not loaded from snapshot {}, so there is no telling what differs from it: leave `base` empty{}",
        memory::file::name(.asked), alternatives(.known)
    )]
    NoBase {
        /// What was asked for.
        asked: memory::file::Id,
        /// What there is.
        known: Vec<memory::file::Id>,
    },
    /// A file that would be taken away from under the guest.
    #[error("the {0} file is one that this machine was loaded from, and its guest lives in it: save into another one")]
    InUse(&'static str),
    /// A file that cannot be written to at any place of it.
    #[error("the {0} file cannot be written to: it must be open for writing and without O_APPEND")]
    Unwritable(&'static str),
    /// vCPUs that are not there.
    #[error("vcpus is {asked}: the machine has {count}, and one at least is used")]
    NoVcpu {
        /// What was asked for.
        asked: u32,
        /// How many there are.
        count: usize,
    },
    /// A working set of memory that is no snapshot's.
    #[error("the machine was not loaded from a snapshot, of which there could be a working set")]
    NotLoaded,
    /// Start without a kernel.
    #[error("no kernel is loaded: send LoadKernel first")]
    NoKernel,
}

fn alternatives(known: &[memory::file::Id]) -> String {
    known
        .iter()
        .map(|id| format!(", or take {}", memory::file::name(id)))
        .collect()
}

fn kvm(what: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> Error {
    move |source| Error::Kvm { what, source }
}

fn host(what: &'static str) -> impl FnOnce(io::Error) -> Error {
    move |source| Error::Host { what, source }
}

/// What all phases with a machine share.
pub struct Machine {
    // Dropped in this order: nothing runs before the memory goes.
    vcpus: Vec<Vcpu>,
    disks: Vec<Slot<Block>>,
    nets: Vec<Slot<Net>>,
    vsock: Option<Slot<Vsock>>,
    rng: Option<Slot<Rng>>,
    mem: Option<Slot<Mem>>,
    balloon: Option<Slot<Balloon>>,
    dialer: Dialer,
    serial: Arc<Mutex<Serial>>,
    generation: Generation,
    windows: Vec<VirtioWindow>,
    memory: GuestMemory,
    /// Where its memory came from.
    source: Mutex<Arc<dyn MemorySource>>,
    /// Of a machine that is to be loaded: the ring for the raw disk that its claim brings.
    ring: Mutex<Option<Ring>>,
    pagemap: Arc<Pagemap>,
    replayed: Replayed,
    /// KVM can be told to map pages ahead of the guest.
    prefaults: bool,
    shape: CreateMachine,
    host: Host,
    exit: ExitLatch,
    vm: VmFd,
}

impl Machine {
    /// Makes all parts, with memory that is zero. Its vCPUs' threads are confined to what is ahead of them.
    fn new(shell: &Shell, config: &Config, start: Start) -> Result<Self, Error> {
        let vm = create_vm(&shell.kvm)?;
        let mut ranges = memory::layout(config.memory);
        ranges.extend(memory::hotplug(config.hotplug));
        let memory = memory::reserve(&ranges)?;
        parts::register_memory(&vm, &memory, 0)?;
        create_interrupt_controllers(&vm)?;
        let (ports, serial) = parts::port_bus(&vm, &shell.exit)?;
        let generation = parts::generation(&vm, &memory)?;
        let mut mmio = Bus::new();
        let mut builder = Builder::new(&vm, &memory, &mut mmio, shell.confine.device_hook());
        let disks = parts::add_disks(&mut builder, &config.disks)?;
        let nets = parts::add_nets(&mut builder, &config.nets)?;
        let vsock = config
            .vsock
            .map(|cid| parts::add(&mut builder, "vsock", Vsock::new(cid)));
        let rng = config
            .rng
            .then(|| parts::add(&mut builder, "rng", Rng::new(parts::ENTROPY)));
        let mem = memory::hotplug(config.hotplug).map(|memory::Range { start, size }| MemSlot { start, size });
        let mem = mem.map(|slot| parts::add(&mut builder, "mem", Mem::new(slot)));
        let balloon = config
            .balloon
            .then(|| parts::add(&mut builder, "balloon", Balloon::new()));
        let (vsock, rng) = (vsock.transpose()?, rng.transpose()?);
        let (mem, balloon) = (mem.transpose()?, balloon.transpose()?);
        let windows = builder.finish();
        // A host without io_uring says so to whoever binds a disk.
        let ring = (start == Start::Load).then(Ring::new).and_then(Result::ok);
        let context = Context {
            ports: Arc::new(ports),
            mmio: Arc::new(mmio),
            exit: shell.exit.clone(),
        };
        let processor = Processor::of(&shell.kvm, config.level)?;
        let first = vcpu::create(&processor, &vm, 0, config.vcpus)?;
        let host_facts = Host::of(&shell.kvm, &first).map_err(kvm("asking what this host offers"))?;
        let others = (1..config.vcpus).map(|id| vcpu::create(&processor, &vm, id, config.vcpus));
        let vcpus = (0..)
            .zip(std::iter::once(Ok(first)).chain(others))
            .map(|(id, fd)| {
                let confine = shell.confine.vcpu();
                Vcpu::spawn(id, fd?, start, context.clone(), confine).map_err(host("starting a vCPU's thread"))
            })
            .collect::<Result<Vec<_>, Error>>()?;
        Ok(Self {
            vcpus,
            disks,
            nets,
            vsock,
            rng,
            mem,
            balloon,
            dialer: shell.dialer.clone(),
            serial,
            generation,
            windows,
            memory,
            source: Mutex::new(Arc::new(Anonymous)),
            ring: Mutex::new(ring),
            pagemap: shell.pagemap.clone(),
            replayed: Replayed::default(),
            prefaults: vcpu::prefault::is_offered(&shell.kvm),
            shape: config.shape.clone(),
            host: host_facts,
            exit: shell.exit.clone(),
            vm,
        })
    }

    /// Gives the guest a generation id that no machine had before, and tells it: after a snapshot was loaded, before the guest
    /// runs.
    ///
    /// # Errors
    /// The host has no random numbers.
    pub fn renew_generation(&self) -> Result<(), Error> {
        Ok(self.generation.renew()?)
    }

    /// Lets the guest's serial output go to `sink`.
    ///
    /// # Errors
    /// The descriptor cannot be used.
    pub fn bind_serial(&self, sink: OwnedFd) -> Result<(), Error> {
        Ok(self.serial.lock().unwrap_or_else(PoisonError::into_inner).bind(sink)?)
    }

    /// A ring that was made ahead for a disk, if there is one left.
    #[must_use]
    pub fn take_ring(&self) -> Option<Ring> {
        self.ring.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// Puts a disk behind a slot.
    ///
    /// # Errors
    /// There is no such slot, or the disk does not fit it.
    pub fn bind_disk(&self, slot: u32, disk: BlockResource) -> Result<(), Error> {
        bind("disk", &self.disks, slot, disk)
    }

    /// Gives the image behind a slot another connection to its chunk server.
    ///
    /// # Errors
    /// There is no such slot, or no such image behind it.
    pub fn serve_chunks(&self, slot: u32, server: OwnedFd) -> Result<(), Error> {
        let disk = slot_of("disk", &self.disks, slot)?;
        disk.with(|disk| disk.serve_chunks(server))
            .map_err(|source| named(disk, source))
    }

    /// Puts a tap behind a slot.
    ///
    /// # Errors
    /// There is no such slot, or it is bound already.
    pub fn bind_net(&self, slot: u32, net: NetResource) -> Result<(), Error> {
        bind("net", &self.nets, slot, net)
    }

    /// Gives the guest's vsock the socket where host programs connect. What the guest opens goes to the control connection.
    ///
    /// # Errors
    /// There is no vsock device, or it is bound already.
    pub fn bind_vsock(&self, listener: UnixListener) -> Result<(), Error> {
        let dialer = Box::new(self.dialer.clone());
        bind("vsock", self.vsock.as_slice(), 0, VsockResource { listener, dialer })
    }

    /// Says how much memory beyond the first the guest is to have plugged; it follows when it can.
    ///
    /// # Errors
    /// The machine has no such memory, or not so much.
    pub fn set_memory(&self, bytes: u64) -> Result<(), Error> {
        bind("memory", self.mem.as_slice(), 0, Requested { bytes })
    }

    /// Says how many pages of 4 KiB the guest is to give up; it follows when it can.
    ///
    /// # Errors
    /// The machine has no balloon.
    pub fn set_balloon(&self, pages: u32) -> Result<(), Error> {
        bind("balloon", self.balloon.as_slice(), 0, Target { pages })
    }

    /// What it was made as, without what is an identity.
    #[must_use]
    pub fn shape(&self) -> &CreateMachine {
        &self.shape
    }

    /// How far the guest has followed [`Self::set_memory`] and [`Self::set_balloon`].
    #[must_use]
    pub fn memory_state(&self) -> MemoryState {
        let mem = self.mem.as_ref().map(|slot| Mem::sizes(slot.core()));
        let balloon = self.balloon.as_ref().map(|slot| Balloon::sizes(slot.core()));
        let (requested_bytes, plugged_bytes) = mem.unwrap_or_default();
        let (balloon_target_bytes, balloon_bytes) = balloon.unwrap_or_default();
        MemoryState {
            requested_bytes,
            plugged_bytes,
            balloon_target_bytes,
            balloon_bytes,
        }
    }

    /// Counts of what went wrong, by name.
    #[must_use]
    pub fn counters(&self) -> Vec<(String, u64)> {
        let dropped = self.serial.lock().unwrap_or_else(PoisonError::into_inner).dropped();
        let mut counters = vec![("serial.dropped".to_owned(), dropped)];
        for device in self.devices() {
            let of_device = device.counters().into_iter();
            counters.extend(of_device.map(|(name, count)| (format!("{}.{name}", device.name()), count)));
        }
        counters.extend(self.working_set_counters());
        counters
    }

    fn devices(&self) -> impl Iterator<Item = &dyn AnyDevice> {
        let disks = self.disks.iter().map(|slot| slot as &dyn AnyDevice);
        disks
            .chain(self.nets.iter().map(|slot| slot as &dyn AnyDevice))
            .chain(self.vsock.iter().map(|slot| slot as &dyn AnyDevice))
            .chain(self.rng.iter().map(|slot| slot as &dyn AnyDevice))
            .chain(self.mem.iter().map(|slot| slot as &dyn AnyDevice))
            .chain(self.balloon.iter().map(|slot| slot as &dyn AnyDevice))
    }

    // `new` makes one vCPU for each number of a u8's range.
    #[allow(clippy::cast_possible_truncation)]
    fn vcpu_count(&self) -> u8 {
        self.vcpus.len() as u8
    }

    fn enter(&self, entry: Entry) -> Result<(), Error> {
        if let Some(first) = self.vcpus.first() {
            first.enter(entry)?;
        }
        self.run()
    }

    fn run(&self) -> Result<(), Error> {
        self.vcpus.iter().try_for_each(|vcpu| Ok(vcpu.run()?))
    }

    /// Lets the guest start vCPUs that it never had started when it was saved, as far as they are among the first `count`.
    pub(super) fn use_vcpus(&self, count: u32) -> Result<(), Error> {
        let used = usize::try_from(count).ok().and_then(|count| self.vcpus.get(..count));
        let Some(used) = used.filter(|used| !used.is_empty()) else {
            return Err(Error::NoVcpu {
                asked: count,
                count: self.vcpus.len(),
            });
        };
        let mut held = used.iter().filter(|vcpu| vcpu.is_held());
        held.try_for_each(|vcpu| Ok(vcpu.join()?))
    }

    fn pause(&self) -> Result<(), Error> {
        for vcpu in self.vcpus.iter().filter(|vcpu| !vcpu.is_held()) {
            vcpu.pause()?;
        }
        self.devices()
            .try_for_each(|device| device.pause().map_err(|source| named(device, source)))
    }

    fn resume(&self) -> Result<(), Error> {
        self.devices()
            .try_for_each(|device| device.resume().map_err(|source| named(device, source)))?;
        self.run()
    }
}

fn named(device: &dyn AnyDevice, source: DeviceError) -> Error {
    Error::Device {
        name: device.name().to_owned(),
        source,
    }
}

fn bind<D: Device>(kind: &'static str, slots: &[Slot<D>], slot: u32, resource: D::Resource) -> Result<(), Error> {
    let device = slot_of(kind, slots, slot)?;
    device.bind(resource).map_err(|source| named(device, source))
}

fn slot_of<'a, D: Device>(kind: &'static str, slots: &'a [Slot<D>], slot: u32) -> Result<&'a Slot<D>, Error> {
    let found = usize::try_from(slot).ok().and_then(|index| slots.get(index));
    found.ok_or(Error::NoSlot {
        kind,
        slot,
        count: slots.len(),
    })
}
