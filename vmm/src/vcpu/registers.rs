//! A vCPU's registers: what all vCPUs have in common, and how the first one stands at the kernel's entry.

use kvm_bindings::{Msrs, kvm_fpu, kvm_lapic_state, kvm_msr_entry, kvm_regs, kvm_segment};
use kvm_ioctls::VcpuFd;

use crate::boot::{Entry, GDT, PAGE_TABLES, PVH_START_INFO, ZERO_PAGE, descriptors};

type Failure = (&'static str, kvm_ioctls::Error);

const MSR_IA32_MISC_ENABLE: u32 = 0x1a0;
const MISC_ENABLE_FAST_STRING: u64 = 1;
const MSR_MTRR_DEF_TYPE: u32 = 0x2ff;
/// MTRRs on, write-back by default (SDM volume 3, 12.11.2.1).
const MTRR_WRITE_BACK: u64 = 1 << 11 | 6;

/// LVT entries of the local APIC (SDM volume 3, 11.5.1).
const APIC_LVT0: usize = 0x350;
const APIC_LVT1: usize = 0x360;
const DELIVERY_EXTINT: u32 = 7 << 8;
const DELIVERY_NMI: u32 = 4 << 8;
const DELIVERY_MASK: u32 = 7 << 8;

const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
/// Bit 1 of RFLAGS is always set.
const RFLAGS: u64 = 2;
/// Below the zero page; a kernel sets its own at once.
const STACK: u64 = ZERO_PAGE - 16;

/// Sets MSRs, FPU and the local APIC's pins.
///
/// # Errors
/// What KVM refused.
pub(super) fn set_common(vcpu: &VcpuFd) -> Result<(), Failure> {
    let entries = [
        kvm_msr_entry {
            index: MSR_IA32_MISC_ENABLE,
            data: MISC_ENABLE_FAST_STRING,
            ..Default::default()
        },
        kvm_msr_entry {
            index: MSR_MTRR_DEF_TYPE,
            data: MTRR_WRITE_BACK,
            ..Default::default()
        },
    ];
    // Two entries are far below what the structure can hold.
    let msrs = Msrs::from_entries(&entries).map_err(|_| ("building its MSRs", kvm_ioctls::Error::new(libc::E2BIG)))?;
    let set = vcpu.set_msrs(&msrs).map_err(|error| ("setting MSRs", error))?;
    if set != entries.len() {
        return Err((
            "setting MSRs: KVM does not know one of them",
            kvm_ioctls::Error::new(libc::EINVAL),
        ));
    }
    let fpu = kvm_fpu {
        fcw: 0x37f,
        mxcsr: 0x1f80,
        ..Default::default()
    };
    vcpu.set_fpu(&fpu).map_err(|error| ("setting the FPU", error))?;
    let mut lapic = vcpu.get_lapic().map_err(|error| ("reading its local APIC", error))?;
    set_delivery(&mut lapic, APIC_LVT0, DELIVERY_EXTINT);
    set_delivery(&mut lapic, APIC_LVT1, DELIVERY_NMI);
    vcpu.set_lapic(&lapic)
        .map_err(|error| ("setting its local APIC", error))
}

fn set_delivery(lapic: &mut kvm_lapic_state, register: usize, mode: u32) {
    let field = &mut lapic.regs[register..register + 4];
    let mut bytes = [0; 4];
    for (byte, from) in bytes.iter_mut().zip(field.iter()) {
        *byte = from.cast_unsigned();
    }
    let value = (u32::from_le_bytes(bytes) & !DELIVERY_MASK) | mode;
    for (to, byte) in field.iter_mut().zip(value.to_le_bytes()) {
        *to = byte.cast_signed();
    }
}

/// Puts the first vCPU to the kernel's entry.
///
/// # Errors
/// What KVM refused.
pub fn set_entry(vcpu: &VcpuFd, entry: Entry) -> Result<(), Failure> {
    let (regs, code, paging) = match entry {
        Entry::Linux64 { address } => (
            kvm_regs {
                rip: address,
                rsi: ZERO_PAGE,
                ..kvm_regs::default()
            },
            descriptors::CODE64,
            true,
        ),
        Entry::Pvh { address } => (
            kvm_regs {
                rip: address,
                rbx: PVH_START_INFO,
                ..kvm_regs::default()
            },
            descriptors::CODE32,
            false,
        ),
    };
    let mut sregs = vcpu
        .get_sregs()
        .map_err(|error| ("reading its system registers", error))?;
    sregs.cs = segment(descriptors::CODE, code);
    let data = segment(descriptors::DATA, descriptors::DATA32);
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.tr = segment(descriptors::TASK, descriptors::TSS);
    sregs.gdt.base = GDT;
    sregs.gdt.limit = 6 * 8 - 1;
    sregs.cr0 = CR0_PE | CR0_ET;
    if paging {
        sregs.cr0 |= CR0_PG;
        sregs.cr3 = PAGE_TABLES;
        sregs.cr4 |= CR4_PAE;
        sregs.efer |= EFER_LME | EFER_LMA;
    }
    vcpu.set_sregs(&sregs)
        .map_err(|error| ("setting its system registers", error))?;
    let regs = kvm_regs {
        rflags: RFLAGS,
        rsp: STACK,
        rbp: STACK,
        ..regs
    };
    vcpu.set_regs(&regs).map_err(|error| ("setting its registers", error))
}

/// A segment register as the processor would load it from `descriptor` (SDM volume 3, 3.4.5).
fn segment(selector: u16, descriptor: u64) -> kvm_segment {
    let bit = |at: u32| u8::from(descriptor >> at & 1 != 0);
    // Both values are masked to their fields.
    #[allow(clippy::cast_possible_truncation)]
    let (limit, kind) = (
        ((descriptor >> 32 & 0xf_0000) | (descriptor & 0xffff)) as u32,
        (descriptor >> 40 & 0xf) as u8,
    );
    kvm_segment {
        base: 0,
        limit: if bit(55) == 1 { limit << 12 | 0xfff } else { limit },
        selector,
        type_: kind,
        s: bit(44),
        present: bit(47),
        avl: bit(52),
        l: bit(53),
        db: bit(54),
        g: bit(55),
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn segments_are_what_their_descriptors_say() {
        let code = segment(descriptors::CODE, descriptors::CODE64);
        assert_eq!(
            (code.limit, code.type_, code.s, code.present, code.l, code.db, code.g),
            (u32::MAX, 11, 1, 1, 1, 0, 1)
        );
        let code = segment(descriptors::CODE, descriptors::CODE32);
        assert_eq!((code.l, code.db), (0, 1));
        let task = segment(descriptors::TASK, descriptors::TSS);
        assert_eq!((task.limit, task.type_, task.s, task.present), (0x67, 11, 0, 1));
    }
}
