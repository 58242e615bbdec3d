//! vCPUs: what they are made of, how the first one begins, and the thread that runs each.
//!
//! - `cpuid`: what the guest learns of its processors; `level`: what of the host's it may learn of; `features`: where that stands;
//! - `registers`: state at the first instruction;
//! - `state`: all that is saved of a vCPU;
//! - `first_pages`: what a loaded one touches first; `prefault`: KVM's own tables for it;
//! - `thread`: the loop around KVM_RUN.

pub mod cpuid;
pub(crate) mod features;
pub mod first_pages;
pub mod level;
pub mod prefault;
pub mod registers;
pub mod state;
pub mod thread;

use kvm_ioctls::{VcpuFd, VmFd};
use thiserror::Error;

use self::cpuid::Processor;

/// What KVM refused to do with a vCPU.
#[derive(Debug, Error)]
#[error("vCPU {vcpu}: {what}")]
pub struct Error {
    /// Which vCPU.
    pub vcpu: u8,
    /// What was being done.
    pub what: &'static str,
    /// What KVM said.
    pub source: kvm_ioctls::Error,
}

/// Makes vCPU `id` of `count`, with everything set that does not depend on the kernel.
///
/// # Errors
/// KVM refuses something.
pub fn create(processor: &Processor, vm: &VmFd, id: u8, count: u8) -> Result<VcpuFd, Error> {
    let at = |what| move |source| Error { vcpu: id, what, source };
    let vcpu = vm.create_vcpu(id.into()).map_err(at("creating it"))?;
    vcpu.set_cpuid2(&processor.vcpu(id, count))
        .map_err(at("setting CPUID"))?;
    registers::set_common(&vcpu).map_err(|(what, source)| Error { vcpu: id, what, source })?;
    Ok(vcpu)
}
