//! A machine and its life. Each phase is a type of its own, so a step that is not allowed does not compile:
//!
//! ```text
//! Shell --create--> Created --load_kernel, start--> Running --pause--> Paused
//!                                                      ^                 |
//!                                                      +-----resume------+
//! ```
//!
//! A step that fails hands the phase back that it began in. Disks, taps and sockets are bound in any phase but the first.

// A failed step hands its phase back by value: it happens at most a few times in a sandbox's life.
#![allow(clippy::result_large_err)]

pub mod chipset;
pub mod config;
pub mod devices;

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::sync::{Arc, Mutex, PoisonError};

use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::{Kvm, VmFd};
use thiserror::Error;
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use self::config::{Config, Disk};
use self::devices::{AnyDevice, Builder, Slot};
use crate::acpi::{self, VirtioWindow};
use crate::boot::{self, Entry};
use crate::bus::{self, Bus};
use crate::dial::Dialer;
use crate::exit::ExitLatch;
use crate::jail::Confine;
use crate::memory::{self, Anonymous, GuestMemory, MemorySource};
use crate::platform;
use crate::platform::generation::{self, Generation};
use crate::ports;
use crate::ports::power::{ACPI_SIZE, AcpiRegisters, I8042_SIZE, I8042Reset, PvPanic};
use crate::ports::serial::{self, Serial};
use crate::vcpu;
use crate::vcpu::thread::{Context, Vcpu};
use crate::virtio::block::{Block, BlockResource, BlockSlot};
use crate::virtio::net::{Net, NetResource, NetSlot};
use crate::virtio::rate_limit::RateLimit;
use crate::virtio::rng::Rng;
use crate::virtio::vsock::{Vsock, VsockResource};
use crate::virtio::{Device, DeviceError};

/// What a guest may draw from the host's generator: enough for any seeding, too little to keep the host busy.
const ENTROPY: RateLimit = RateLimit {
    bytes_per_second: 64 << 10,
    operations_per_second: 0,
    burst_bytes: 0,
    burst_operations: 0,
};

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
        /// Disk, net or vsock.
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
    /// Start without a kernel.
    #[error("no kernel is loaded: send LoadKernel first")]
    NoKernel,
}

fn kvm(what: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> Error {
    move |source| Error::Kvm { what, source }
}

fn host(what: &'static str) -> impl FnOnce(io::Error) -> Error {
    move |source| Error::Host { what, source }
}

/// Before a machine is asked for.
pub struct Shell {
    kvm: Kvm,
    exit: ExitLatch,
    confine: Confine,
    dialer: Dialer,
}

/// All parts are there; nothing has run.
pub struct Created {
    machine: Machine,
    entry: Option<Entry>,
}

/// The guest runs.
pub struct Running {
    machine: Machine,
}

/// The guest was running and stands still; so do its devices.
pub struct Paused {
    machine: Machine,
}

impl Shell {
    /// A process that can make one machine.
    #[must_use]
    pub fn new(kvm: Kvm, exit: ExitLatch, confine: Confine, dialer: Dialer) -> Self {
        Self {
            kvm,
            exit,
            confine,
            dialer,
        }
    }

    /// Makes VM, memory, vCPUs and devices.
    ///
    /// # Errors
    /// Something cannot be had; what was made is gone again, and the shell can be asked once more.
    pub fn create(self, config: &Config) -> Result<Created, (Self, Error)> {
        match Machine::new(&self, config) {
            Ok(machine) => Ok(Created { machine, entry: None }),
            Err(error) => Err((self, error)),
        }
    }
}

impl Created {
    /// Puts a kernel into memory; a later one takes its place.
    ///
    /// # Errors
    /// It cannot be used, or does not fit.
    pub fn load_kernel(&mut self, request: boot::Request<'_>) -> Result<(), Error> {
        self.entry = None;
        let entry = boot::load(&self.machine.memory, request)?;
        boot::write_tables(&self.machine.memory, entry)?;
        acpi::write(&self.machine.memory, self.machine.vcpu_count(), &self.machine.windows)?;
        self.machine.generation.begin()?;
        self.entry = Some(entry);
        Ok(())
    }

    /// Lets the first vCPU enter the kernel; the others wait for its start signal.
    ///
    /// # Errors
    /// No kernel is loaded, or KVM refuses the state.
    pub fn start(self) -> Result<Running, (Self, Error)> {
        let outcome = match self.entry {
            Some(entry) => self.machine.enter(entry),
            None => Err(Error::NoKernel),
        };
        match outcome {
            Ok(()) => Ok(Running { machine: self.machine }),
            Err(error) => Err((self, error)),
        }
    }
}

impl Running {
    /// Stops vCPUs, then devices.
    ///
    /// # Errors
    /// A device cannot come to rest; the guest runs on.
    pub fn pause(self) -> Result<Paused, (Self, Error)> {
        match self.machine.pause() {
            Ok(()) => Ok(Paused { machine: self.machine }),
            Err(error) => match self.machine.resume() {
                Ok(()) => Err((self, error)),
                // Both failures have the same cause; the first tells it.
                Err(_) => Err((self, error)),
            },
        }
    }
}

impl Paused {
    /// Lets devices, then vCPUs go on.
    ///
    /// # Errors
    /// A device cannot go on; all stands still.
    pub fn resume(self) -> Result<Running, (Self, Error)> {
        match self.machine.resume() {
            Ok(()) => Ok(Running { machine: self.machine }),
            Err(error) => Err((self, error)),
        }
    }
}

impl AsRef<Machine> for Created {
    fn as_ref(&self) -> &Machine {
        &self.machine
    }
}

impl AsRef<Machine> for Running {
    fn as_ref(&self) -> &Machine {
        &self.machine
    }
}

impl AsRef<Machine> for Paused {
    fn as_ref(&self) -> &Machine {
        &self.machine
    }
}

/// What all phases with a machine share.
pub struct Machine {
    // Dropped in this order: nothing runs before the memory goes.
    vcpus: Vec<Vcpu>,
    disks: Vec<Slot<Block>>,
    nets: Vec<Slot<Net>>,
    vsock: Option<Slot<Vsock>>,
    rng: Option<Slot<Rng>>,
    dialer: Dialer,
    serial: Arc<Mutex<Serial>>,
    generation: Generation,
    windows: Vec<VirtioWindow>,
    memory: GuestMemory,
    _vm: VmFd,
}

impl Machine {
    fn new(shell: &Shell, config: &Config) -> Result<Self, Error> {
        let vm = create_vm(&shell.kvm)?;
        let memory = Anonymous.map(&memory::layout(config.memory))?;
        register_memory(&vm, &memory)?;
        let (ports, serial) = port_bus(&vm, &shell.exit)?;
        let generation = generation(&vm, &memory)?;
        let mut mmio = Bus::new();
        let hook = shell.confine.device_hook();
        let mut builder = Builder::new(&vm, &memory, &mut mmio, hook);
        let disks = add_disks(&mut builder, &config.disks)?;
        let nets = add_nets(&mut builder, &config.nets)?;
        let vsock = config.vsock.map(|cid| add(&mut builder, "vsock", Vsock::new(cid)));
        let rng = config.rng.then(|| add(&mut builder, "rng", Rng::new(ENTROPY)));
        let (vsock, rng) = (vsock.transpose()?, rng.transpose()?);
        let windows = builder.finish();
        let context = Context {
            ports: Arc::new(ports),
            mmio: Arc::new(mmio),
            exit: shell.exit.clone(),
        };
        let vcpus = (0..config.vcpus)
            .map(|id| {
                let fd = vcpu::create(&shell.kvm, &vm, id, config.vcpus)?;
                Vcpu::spawn(id, fd, context.clone(), shell.confine.vcpu()).map_err(host("starting a vCPU's thread"))
            })
            .collect::<Result<Vec<_>, Error>>()?;
        Ok(Self {
            vcpus,
            disks,
            nets,
            vsock,
            rng,
            dialer: shell.dialer.clone(),
            serial,
            generation,
            windows,
            memory,
            _vm: vm,
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

    /// Puts a disk behind a slot.
    ///
    /// # Errors
    /// There is no such slot, or the disk does not fit it.
    pub fn bind_disk(&self, slot: u32, disk: BlockResource) -> Result<(), Error> {
        bind("disk", &self.disks, slot, disk)
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

    /// Counts of what went wrong, by name.
    #[must_use]
    pub fn counters(&self) -> Vec<(String, u64)> {
        let dropped = self.serial.lock().unwrap_or_else(PoisonError::into_inner).dropped();
        let mut counters = vec![("serial.dropped".to_owned(), dropped)];
        for device in self.devices() {
            let of_device = device.counters().into_iter();
            counters.extend(of_device.map(|(name, count)| (format!("{}.{name}", device.name()), count)));
        }
        counters
    }

    fn devices(&self) -> impl Iterator<Item = &dyn AnyDevice> {
        let disks = self.disks.iter().map(|slot| slot as &dyn AnyDevice);
        disks
            .chain(self.nets.iter().map(|slot| slot as &dyn AnyDevice))
            .chain(self.vsock.iter().map(|slot| slot as &dyn AnyDevice))
            .chain(self.rng.iter().map(|slot| slot as &dyn AnyDevice))
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

    fn pause(&self) -> Result<(), Error> {
        for vcpu in &self.vcpus {
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
    let found = usize::try_from(slot).ok().and_then(|index| slots.get(index));
    let Some(device) = found else {
        return Err(Error::NoSlot {
            kind,
            slot,
            count: slots.len(),
        });
    };
    device.bind(resource).map_err(|source| named(device, source))
}

/// Makes a VM with its interrupt controllers, and neither memory nor vCPUs.
///
/// # Errors
/// KVM refuses.
pub fn create_vm(host: &Kvm) -> Result<VmFd, Error> {
    let vm = host.create_vm().map_err(kvm("creating the VM"))?;
    vm.set_identity_map_address(memory::IDENTITY_MAP_BASE)
        .map_err(kvm("placing KVM's identity map"))?;
    vm.set_tss_address(memory::TSS_BASE)
        .map_err(kvm("placing KVM's task state segment"))?;
    vm.create_irq_chip()
        .map_err(kvm("creating the interrupt controllers"))?;
    chipset::mask_pics(&vm)?;
    Ok(vm)
}

fn register_memory(vm: &VmFd, memory: &GuestMemory) -> Result<(), Error> {
    for (slot, region) in (0..).zip(memory.iter()) {
        let area = kvm_userspace_memory_region {
            slot,
            flags: 0,
            guest_phys_addr: region.start_addr().0,
            memory_size: region.len(),
            userspace_addr: region.as_ptr() as u64,
        };
        // SAFETY: the region is mapped as long as `memory` lives, which the machine keeps longer than its vCPUs; guest memory
        // is accessed by volatile means only.
        unsafe { vm.set_user_memory_region(area) }.map_err(kvm("giving the VM its memory"))?;
    }
    Ok(())
}

fn port_bus(vm: &VmFd, exit: &ExitLatch) -> Result<(Bus, Arc<Mutex<Serial>>), Error> {
    let interrupt = EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK).map_err(host("making the serial line's interrupt"))?;
    vm.register_irqfd(&interrupt, ports::COM1_IRQ)
        .map_err(kvm("connecting the serial line"))?;
    let serial = Arc::new(Mutex::new(Serial::new(serial::Interrupt(interrupt))));
    let mut bus = Bus::new();
    bus.insert(ports::COM1.into(), serial::SIZE, serial.clone())?;
    bus.insert(
        ports::I8042.into(),
        I8042_SIZE,
        Arc::new(Mutex::new(I8042Reset(exit.clone()))),
    )?;
    bus.insert(ports::PVPANIC.into(), 1, Arc::new(Mutex::new(PvPanic(exit.clone()))))?;
    bus.insert(
        ports::ACPI_RESET.into(),
        ACPI_SIZE,
        Arc::new(Mutex::new(AcpiRegisters(exit.clone()))),
    )?;
    Ok((bus, serial))
}

fn generation(vm: &VmFd, memory: &GuestMemory) -> Result<Generation, Error> {
    let interrupt = EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK).map_err(host("making the event device's interrupt"))?;
    vm.register_irqfd(&interrupt, platform::EVENT_IRQ)
        .map_err(kvm("connecting the event device"))?;
    Ok(Generation::new(memory.clone(), interrupt))
}

fn add_disks(builder: &mut Builder<'_>, disks: &[Disk]) -> Result<Vec<Slot<Block>>, Error> {
    let disks = disks.iter().enumerate();
    disks
        .map(|(index, disk)| {
            let name = format!("disk{index}");
            let slot = BlockSlot {
                serial: disk.serial.clone(),
                read_only: disk.read_only,
                queues: disk.queues,
            };
            add(builder, &name, Block::new(slot))
        })
        .collect()
}

fn add_nets(builder: &mut Builder<'_>, macs: &[[u8; 6]]) -> Result<Vec<Slot<Net>>, Error> {
    let macs = macs.iter().enumerate();
    macs.map(|(index, mac)| add(builder, &format!("net{index}"), Net::new(&NetSlot { mac: *mac })))
        .collect()
}

fn add<D: Device>(builder: &mut Builder<'_>, name: &str, device: Result<D, DeviceError>) -> Result<Slot<D>, Error> {
    let device = device.map_err(|source| Error::Device {
        name: name.to_owned(),
        source,
    })?;
    Ok(builder.add(name.to_owned(), device)?)
}
