//! What is saved of the parts that KVM keeps beside the vCPUs: interrupt controllers and the guest's clock. There is no PIT:
//! a guest of hardware-reduced ACPI takes its ticks from the local APICs.

use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, kvm_clock_data, kvm_irqchip, kvm_pic_state,
};
use kvm_ioctls::VmFd;
use zerocopy::{FromBytes, IntoBytes};

use super::{Error, kvm};

/// Pins of the IOAPIC (KVM_IOAPIC_NUM_PINS).
const PINS: usize = 24;

/// The IOAPIC.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct IoapicState {
    /// Where its registers are.
    pub base: u64,
    /// IOREGSEL.
    pub select: u32,
    /// Its APIC id.
    pub id: u32,
    /// Pins that are high.
    pub requests: u32,
    /// Redirection table (82093AA data sheet, 3.2.4).
    pub redirections: [u64; PINS],
}

/// Interrupt controllers of a machine whose vCPUs stand still.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ChipsetState {
    /// Both 8259As, the master first.
    pub pics: [kvm_pic_state; 2],
    /// The IOAPIC.
    pub ioapic: IoapicState,
}

/// Interrupt controllers in a state file.
#[derive(Clone, PartialEq, prost::Message)]
pub struct ChipsetRecord {
    /// `kvm_pic_state` of both 8259As, the master first.
    #[prost(bytes = "vec", repeated, tag = "1")]
    pub pics: Vec<Vec<u8>>,
    /// Where the IOAPIC's registers are.
    #[prost(uint64, tag = "2")]
    pub ioapic_base: u64,
    /// IOREGSEL.
    #[prost(uint32, tag = "3")]
    pub ioapic_select: u32,
    /// The IOAPIC's id.
    #[prost(uint32, tag = "4")]
    pub ioapic_id: u32,
    /// Pins that are high.
    #[prost(uint32, tag = "5")]
    pub ioapic_requests: u32,
    /// Redirection table.
    #[prost(fixed64, repeated, tag = "6")]
    pub redirections: Vec<u64>,
}

impl From<&ChipsetState> for ChipsetRecord {
    fn from(state: &ChipsetState) -> Self {
        Self {
            pics: state.pics.iter().map(|pic| pic.as_bytes().to_vec()).collect(),
            ioapic_base: state.ioapic.base,
            ioapic_select: state.ioapic.select,
            ioapic_id: state.ioapic.id,
            ioapic_requests: state.ioapic.requests,
            redirections: state.ioapic.redirections.to_vec(),
        }
    }
}

impl TryFrom<&ChipsetRecord> for ChipsetState {
    type Error = &'static str;

    fn try_from(record: &ChipsetRecord) -> Result<Self, &'static str> {
        let [master, slave] = &record.pics[..] else {
            return Err("number of 8259As");
        };
        let pic = |bytes: &[u8]| kvm_pic_state::read_from_bytes(bytes).map_err(|_| "8259A");
        let redirections = record.redirections[..].try_into();
        Ok(Self {
            pics: [pic(master)?, pic(slave)?],
            ioapic: IoapicState {
                base: record.ioapic_base,
                select: record.ioapic_select,
                id: record.ioapic_id,
                requests: record.ioapic_requests,
                redirections: redirections.map_err(|_| "IOAPIC's redirection table")?,
            },
        })
    }
}

/// Saves them.
///
/// # Errors
/// What KVM refused.
pub fn save(vm: &VmFd) -> Result<ChipsetState, Error> {
    let pic = |id| {
        let chip = read(vm, id)?;
        // SAFETY: KVM filled the union's PIC for these ids, and all of its bytes are initialized.
        Ok::<_, Error>(unsafe { chip.chip.pic })
    };
    Ok(ChipsetState {
        pics: [pic(KVM_IRQCHIP_PIC_MASTER)?, pic(KVM_IRQCHIP_PIC_SLAVE)?],
        ioapic: save_ioapic(vm)?,
    })
}

/// kvmclock: the guest's nanoseconds since its machine was made.
///
/// # Errors
/// What KVM refused.
pub fn save_clock(vm: &VmFd) -> Result<u64, Error> {
    Ok(vm.get_clock().map_err(kvm("saving the guest's clock"))?.clock)
}

/// Lets kvmclock go on where it stood: time between saving and restoring did not pass for the guest.
///
/// # Errors
/// What KVM refused.
pub fn restore_clock(vm: &VmFd, clock: u64) -> Result<(), Error> {
    let data = kvm_clock_data {
        clock,
        ..Default::default()
    };
    vm.set_clock(&data).map_err(kvm("restoring the guest's clock"))
}

/// Puts a VM's controllers to a saved state.
///
/// # Errors
/// What KVM refused.
pub fn restore(vm: &VmFd, state: &ChipsetState) -> Result<(), Error> {
    for (id, pic) in [KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE]
        .into_iter()
        .zip(state.pics)
    {
        let mut chip = kvm_irqchip {
            chip_id: id,
            ..Default::default()
        };
        chip.chip.pic = pic;
        write(vm, &chip)?;
    }
    restore_ioapic(vm, &state.ioapic)
}

/// Masks all lines of both 8259As, as a firmware leaves them (8259A data sheet, OCW1). A guest of hardware-reduced ACPI uses
/// the IOAPIC and never looks at the PICs, which get the same edges and, unmasked, would interrupt it at vector 0 and up.
///
/// # Errors
/// What KVM refused.
pub fn mask_pics(vm: &VmFd) -> Result<(), Error> {
    for id in [KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE] {
        let mut chip = read(vm, id)?;
        chip.chip.pic.imr = 0xff;
        write(vm, &chip)?;
    }
    Ok(())
}

fn save_ioapic(vm: &VmFd) -> Result<IoapicState, Error> {
    let chip = read(vm, KVM_IRQCHIP_IOAPIC)?;
    // SAFETY: KVM filled the union's IOAPIC for this id, and all of its bytes are initialized.
    let ioapic = unsafe { chip.chip.ioapic };
    Ok(IoapicState {
        base: ioapic.base_address,
        select: ioapic.ioregsel,
        id: ioapic.id,
        requests: ioapic.irr,
        // SAFETY: both forms of an entry are 64 bits without padding.
        redirections: ioapic.redirtbl.map(|entry| unsafe { entry.bits }),
    })
}

fn restore_ioapic(vm: &VmFd, state: &IoapicState) -> Result<(), Error> {
    let mut chip = kvm_irqchip {
        chip_id: KVM_IRQCHIP_IOAPIC,
        ..Default::default()
    };
    let mut ioapic = kvm_bindings::kvm_ioapic_state {
        base_address: state.base,
        ioregsel: state.select,
        id: state.id,
        irr: state.requests,
        ..Default::default()
    };
    for (entry, bits) in ioapic.redirtbl.iter_mut().zip(state.redirections) {
        entry.bits = bits;
    }
    chip.chip.ioapic = ioapic;
    write(vm, &chip)
}

fn read(vm: &VmFd, id: u32) -> Result<kvm_irqchip, Error> {
    let mut chip = kvm_irqchip {
        chip_id: id,
        ..Default::default()
    };
    vm.get_irqchip(&mut chip)
        .map_err(kvm("reading an interrupt controller"))?;
    Ok(chip)
}

fn write(vm: &VmFd, chip: &kvm_irqchip) -> Result<(), Error> {
    vm.set_irqchip(chip).map_err(kvm("setting an interrupt controller"))
}
