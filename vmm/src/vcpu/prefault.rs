//! Entries of KVM's own page tables, made before the guest faults for want of them (KVM_PRE_FAULT_MEMORY, KVM API 4.143; Linux 6.11,
//! with two-dimensional paging).
//!
//! It is a hint: what KVM refuses, the guest faults on.

use kvm_bindings::{KVM_CAP_PRE_FAULT_MEMORY, KVMIO, kvm_pre_fault_memory};
use kvm_ioctls::{Kvm, VcpuFd};
use libc::c_ulong;
use vmm_sys_util::ioctl::{_IOC_READ, _IOC_WRITE, ioctl_expr, ioctl_with_mut_ref};

use crate::memory::Range;

#[allow(clippy::cast_possible_truncation, reason = "64 bytes")]
const KVM_PRE_FAULT_MEMORY: c_ulong = ioctl_expr(
    _IOC_READ | _IOC_WRITE,
    KVMIO,
    0xd5,
    size_of::<kvm_pre_fault_memory>() as u32,
);

/// Whether this host's KVM can do it.
pub fn is_offered(kvm: &Kvm) -> bool {
    kvm.check_extension_raw(KVM_CAP_PRE_FAULT_MEMORY.into()) > 0
}

/// Maps ranges of guest memory, as far as KVM does.
pub fn map(vcpu: &VcpuFd, ranges: &[Range]) {
    for range in ranges {
        let mut left = kvm_pre_fault_memory {
            gpa: range.start,
            size: range.size,
            ..Default::default()
        };
        while left.size > 0 {
            let before = left.size;
            // SAFETY: KVM reads and writes the struct, which is as it wants it. The guest sees nothing of this but time.
            let outcome = unsafe { ioctl_with_mut_ref(vcpu, KVM_PRE_FAULT_MEMORY, &mut left) };
            // A signal, or a part of it, is told by what is left; whatever else there is would come again.
            if outcome < 0 || left.size >= before {
                break;
            }
        }
    }
}
