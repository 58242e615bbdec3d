//! CPUID: what KVM supports on this host, as far as the guest's level allows it, changed where the guest's machine differs from the
//! host's.
//!
//! APIC id = vCPU number; one package, one thread for each core.

use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use kvm_ioctls::{Cap, Kvm};
use thiserror::Error;

use super::level::{Level, Missing};

const ECX1_VMX: u32 = 1 << 5;
const ECX8000_0001_SVM: u32 = 1 << 2;
const ECX1_X2APIC: u32 = 1 << 21;
const ECX1_TSC_DEADLINE: u32 = 1 << 24;
const ECX1_HYPERVISOR: u32 = 1 << 31;
const EDX1_HTT: u32 = 1 << 28;
/// Level types of leaf 0xb (SDM volume 2, CPUID).
const LEVEL_SMT: u32 = 1;
const LEVEL_CORE: u32 = 2;

/// Guests cannot be told of a processor.
#[derive(Debug, Error)]
pub enum Error {
    /// KVM does not say what it supports.
    #[error("reading the CPUID that KVM supports")]
    Kvm(#[from] kvm_ioctls::Error),
    /// The host's is not of the level.
    #[error(transparent)]
    Level(#[from] Missing),
}

/// The processor that a machine has, but for what differs from vCPU to vCPU.
pub struct Processor {
    cpuid: CpuId,
    tsc_deadline: bool,
}

impl Processor {
    /// The host's, as far as a level allows it.
    ///
    /// # Errors
    /// KVM does not say what it supports, or it is not of this level.
    pub fn of(kvm: &Kvm, level: Level) -> Result<Self, Error> {
        let mut cpuid = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)?;
        level.apply(cpuid.as_mut_slice())?;
        let tsc_deadline = kvm.check_extension(Cap::TscDeadlineTimer);
        Ok(Self { cpuid, tsc_deadline })
    }

    /// The CPUID of one vCPU.
    #[must_use]
    pub fn vcpu(&self, id: u8, count: u8) -> CpuId {
        let mut cpuid = self.cpuid.clone();
        let topology = Topology {
            id: id.into(),
            count: count.into(),
        };
        for entry in cpuid.as_mut_slice() {
            topology.apply(entry, self.tsc_deadline);
        }
        cpuid
    }
}

#[derive(Clone, Copy)]
struct Topology {
    id: u32,
    count: u32,
}

impl Topology {
    /// Bits of the APIC id that number the cores.
    fn core_bits(self) -> u32 {
        self.count.next_power_of_two().trailing_zeros()
    }

    fn apply(self, entry: &mut kvm_cpuid_entry2, tsc_deadline: bool) {
        match entry.function {
            0x1 => self.features(entry, tsc_deadline),
            0x4 => self.intel_cache(entry),
            // No performance counters: saving them costs time at every switch, and a template could not be moved.
            0xa => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0),
            0xb | 0x1f => self.levels(entry),
            // No virtual machines in virtual machines: what KVM keeps of them is not saved.
            0x8000_0001 => entry.ecx &= !ECX8000_0001_SVM,
            0x8000_0008 => {
                entry.ecx = (entry.ecx & !0xf0ff) | (self.core_bits() << 12) | (self.count - 1);
            }
            0x8000_001d => self.amd_cache(entry),
            0x8000_001e => {
                entry.eax = self.id;
                entry.ebx = (entry.ebx & !0xffff) | self.id;
                entry.ecx &= !0x7ff;
            }
            _ => {}
        }
    }

    fn features(self, entry: &mut kvm_cpuid_entry2, tsc_deadline: bool) {
        entry.ebx = (entry.ebx & 0xffff) | (self.id << 24) | (self.count.next_power_of_two() << 16);
        entry.ecx = (entry.ecx & !ECX1_VMX) | ECX1_X2APIC | ECX1_HYPERVISOR;
        if tsc_deadline {
            entry.ecx |= ECX1_TSC_DEADLINE;
        }
        entry.edx = if self.count > 1 {
            entry.edx | EDX1_HTT
        } else {
            entry.edx & !EDX1_HTT
        };
    }

    fn intel_cache(self, entry: &mut kvm_cpuid_entry2) {
        if entry.eax & 0x1f != 0 {
            let cores = (1 << self.core_bits()) - 1;
            entry.eax = (entry.eax & 0x3fff) | (cores << 26) | (self.sharing(entry.eax) << 14);
        }
    }

    fn amd_cache(self, entry: &mut kvm_cpuid_entry2) {
        if entry.eax & 0x1f != 0 {
            entry.eax = (entry.eax & 0x3fff) | (self.sharing(entry.eax) << 14);
        }
    }

    /// Cores that share a cache, less one: all share level 3, nobody the others.
    fn sharing(self, eax: u32) -> u32 {
        if (eax >> 5) & 0x7 >= 3 { self.count - 1 } else { 0 }
    }

    fn levels(self, entry: &mut kvm_cpuid_entry2) {
        (entry.eax, entry.ebx, entry.ecx) = match entry.index {
            0 => (0, 1, LEVEL_SMT << 8),
            1 => (self.core_bits(), self.count, LEVEL_CORE << 8 | 1),
            index => (0, 0, index),
        };
        entry.edx = self.id;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn applied(id: u32, count: u32, function: u32, index: u32, eax: u32) -> kvm_cpuid_entry2 {
        let mut entry = kvm_cpuid_entry2 {
            function,
            index,
            eax,
            ..Default::default()
        };
        Topology { id, count }.apply(&mut entry, true);
        entry
    }

    #[test]
    fn leaf_1_tells_the_apic_id_and_that_there_is_a_hypervisor() {
        let entry = applied(3, 4, 1, 0, 0);
        assert_eq!((entry.ebx >> 24, (entry.ebx >> 16) & 0xff), (3, 4));
        assert_eq!(entry.ecx, ECX1_X2APIC | ECX1_TSC_DEADLINE | ECX1_HYPERVISOR);
        assert_eq!(entry.edx, EDX1_HTT);
        assert_eq!(applied(0, 1, 1, 0, 0).edx, 0);
    }

    #[test]
    fn leaf_b_has_a_level_of_threads_and_one_of_cores() {
        let smt = applied(5, 6, 0xb, 0, 9);
        assert_eq!((smt.eax, smt.ebx, smt.ecx, smt.edx), (0, 1, 0x100, 5));
        let core = applied(5, 6, 0xb, 1, 9);
        assert_eq!((core.eax, core.ebx, core.ecx, core.edx), (3, 6, 0x201, 5));
        assert_eq!(applied(5, 6, 0x1f, 2, 9).ebx, 0);
    }

    #[test]
    fn only_the_last_cache_is_shared() {
        assert_eq!(applied(0, 4, 4, 0, 0x3c << 14 | 0x21).eax >> 14 & 0xfff, 0);
        assert_eq!(applied(0, 4, 4, 3, 0x63).eax >> 14 & 0xfff, 3);
        assert_eq!(applied(0, 4, 0x8000_001d, 3, 0x63).eax >> 14 & 0xfff, 3);
    }
}
