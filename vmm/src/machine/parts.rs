//! How the parts of a machine are made.

use std::sync::{Arc, Mutex};

use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::{Kvm, VmFd};
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::config::Disk;
use super::devices::{Builder, Slot};
use super::{Error, chipset, host, kvm};
use crate::bus::Bus;
use crate::exit::ExitLatch;
use crate::memory::{self, GuestMemory};
use crate::platform;
use crate::platform::generation::Generation;
use crate::ports;
use crate::ports::power::{ACPI_SIZE, AcpiRegisters, I8042_SIZE, I8042Reset, PvPanic};
use crate::ports::serial::{self, Serial};
use crate::virtio::block::{Block, BlockSlot};
use crate::virtio::net::{Net, NetSlot};
use crate::virtio::rate_limit::RateLimit;
use crate::virtio::{Device, DeviceError};

/// What a guest may draw from the host's generator: enough for any seeding, too little to keep the host busy.
pub(super) const ENTROPY: RateLimit = RateLimit {
    bytes_per_second: 64 << 10,
    operations_per_second: 0,
    burst_bytes: 0,
    burst_operations: 0,
};

/// Makes a VM that has neither memory nor interrupt controllers nor vCPUs.
///
/// # Errors
/// KVM refuses.
pub fn create_vm(host: &Kvm) -> Result<VmFd, Error> {
    let vm = host.create_vm().map_err(kvm("creating the VM"))?;
    vm.set_identity_map_address(memory::IDENTITY_MAP_BASE)
        .map_err(kvm("placing KVM's identity map"))?;
    vm.set_tss_address(memory::TSS_BASE)
        .map_err(kvm("placing KVM's task state segment"))?;
    Ok(vm)
}

/// Gives the VM its interrupt controllers. After its memory: their registers go on KVM's buses, whose older versions are freed
/// after an unhurried grace period of the same SRCU domain for which a new memory slot waits (Linux 6.18,
/// kvm_io_bus_register_dev, kvm_swap_active_memslots). Slots that come first take 0.1 ms instead of 7.
///
/// # Errors
/// KVM refuses.
pub fn create_interrupt_controllers(vm: &VmFd) -> Result<(), Error> {
    vm.create_irq_chip()
        .map_err(kvm("creating the interrupt controllers"))?;
    chipset::mask_pics(vm)
}

/// Gives the VM its memory, or its memory slots other flags.
pub(super) fn register_memory(vm: &VmFd, memory: &GuestMemory, flags: u32) -> Result<(), Error> {
    for (slot, region) in (0..).zip(memory.iter()) {
        let area = kvm_userspace_memory_region {
            slot,
            flags,
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

pub(super) fn port_bus(vm: &VmFd, exit: &ExitLatch) -> Result<(Bus, Arc<Mutex<Serial>>), Error> {
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

pub(super) fn generation(vm: &VmFd, memory: &GuestMemory) -> Result<Generation, Error> {
    let interrupt = EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK).map_err(host("making the event device's interrupt"))?;
    vm.register_irqfd(&interrupt, platform::EVENT_IRQ)
        .map_err(kvm("connecting the event device"))?;
    Ok(Generation::new(memory.clone(), interrupt))
}

pub(super) fn add_disks(builder: &mut Builder<'_>, disks: &[Disk]) -> Result<Vec<Slot<Block>>, Error> {
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

pub(super) fn add_nets(builder: &mut Builder<'_>, macs: &[[u8; 6]]) -> Result<Vec<Slot<Net>>, Error> {
    let macs = macs.iter().enumerate();
    macs.map(|(index, mac)| add(builder, &format!("net{index}"), Net::new(&NetSlot { mac: *mac })))
        .collect()
}

pub(super) fn add<D: Device>(
    builder: &mut Builder<'_>,
    name: &str,
    device: Result<D, DeviceError>,
) -> Result<Slot<D>, Error> {
    let device = device.map_err(|source| Error::Device {
        name: name.to_owned(),
        source,
    })?;
    Ok(builder.add(name.to_owned(), device)?)
}
