//! All of a vCPU that is saved, in the order in which KVM wants it back (KVM API 4.x; events last, they look at the rest).

use kvm_bindings::{
    CpuId, KVM_MAX_CPUID_ENTRIES, Msrs, kvm_debugregs, kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_regs,
    kvm_sregs, kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::VcpuFd;

type Failure = (&'static str, kvm_ioctls::Error);

/// Of an XSAVE area without features that a process must ask for.
const XSAVE_WORDS: usize = 1024;

/// A stopped vCPU.
#[derive(Clone, Debug, PartialEq)]
pub struct VcpuState {
    /// What it was told of itself.
    pub cpuid: Vec<kvm_bindings::kvm_cpuid_entry2>,
    /// Model specific registers.
    pub msrs: Vec<kvm_msr_entry>,
    /// General registers.
    pub regs: kvm_regs,
    /// Segments and control registers.
    pub sregs: kvm_sregs,
    /// FPU, SSE, AVX and beyond: the XSAVE area (SDM volume 1, 13.4).
    pub xsave: [u32; XSAVE_WORDS],
    /// Which of these are on.
    pub xcrs: kvm_xcrs,
    /// Debug registers.
    pub debug: kvm_debugregs,
    /// Local APIC.
    pub lapic: kvm_lapic_state,
    /// Running, halted, or waiting for its start.
    pub mp_state: kvm_mp_state,
    /// Pending exceptions and interrupts.
    pub events: kvm_vcpu_events,
}

/// Saves a vCPU that is not running. `msrs` names the MSRs that KVM lists as worth saving.
///
/// # Errors
/// What KVM refused.
pub fn save(vcpu: &VcpuFd, msrs: &[u32]) -> Result<VcpuState, Failure> {
    let at = |what| move |error| (what, error);
    Ok(VcpuState {
        // First: it makes KVM settle what is pending (KVM API 4.38).
        mp_state: vcpu.get_mp_state().map_err(at("saving its MP state"))?,
        cpuid: vcpu
            .get_cpuid2(KVM_MAX_CPUID_ENTRIES)
            .map_err(at("saving CPUID"))?
            .as_slice()
            .to_vec(),
        msrs: save_msrs(vcpu, msrs)?,
        regs: vcpu.get_regs().map_err(at("saving its registers"))?,
        sregs: vcpu.get_sregs().map_err(at("saving its system registers"))?,
        xsave: vcpu.get_xsave().map_err(at("saving its FPU"))?.region,
        xcrs: vcpu.get_xcrs().map_err(at("saving its extended control registers"))?,
        debug: vcpu.get_debug_regs().map_err(at("saving its debug registers"))?,
        lapic: vcpu.get_lapic().map_err(at("saving its local APIC"))?,
        events: vcpu.get_vcpu_events().map_err(at("saving its events"))?,
    })
}

/// KVM stops at the first MSR that this guest does not have; those are left out.
fn save_msrs(vcpu: &VcpuFd, indices: &[u32]) -> Result<Vec<kvm_msr_entry>, Failure> {
    let mut saved = Vec::with_capacity(indices.len());
    let mut rest = indices;
    while !rest.is_empty() {
        let wanted: Vec<_> = rest
            .iter()
            .map(|index| kvm_msr_entry {
                index: *index,
                ..Default::default()
            })
            .collect();
        let mut msrs = list(&wanted)?;
        let read = vcpu.get_msrs(&mut msrs).map_err(|error| ("saving MSRs", error))?;
        saved.extend_from_slice(&msrs.as_slice()[..read]);
        rest = rest.get(read + 1..).unwrap_or_default();
    }
    Ok(saved)
}

fn list(entries: &[kvm_msr_entry]) -> Result<Msrs, Failure> {
    Msrs::from_entries(entries).map_err(|_| ("listing MSRs", kvm_ioctls::Error::new(libc::E2BIG)))
}

/// Gives a fresh vCPU a saved state.
///
/// # Errors
/// What KVM refused: the state is another host's or was altered.
pub fn restore(vcpu: &VcpuFd, state: &VcpuState) -> Result<(), Failure> {
    let at = |what| move |error| (what, error);
    let cpuid =
        CpuId::from_entries(&state.cpuid).map_err(|_| ("listing CPUID", kvm_ioctls::Error::new(libc::E2BIG)))?;
    vcpu.set_cpuid2(&cpuid).map_err(at("restoring CPUID"))?;
    vcpu.set_mp_state(state.mp_state)
        .map_err(at("restoring its MP state"))?;
    vcpu.set_regs(&state.regs).map_err(at("restoring its registers"))?;
    vcpu.set_sregs(&state.sregs)
        .map_err(at("restoring its system registers"))?;
    let xsave = kvm_xsave {
        region: state.xsave,
        ..Default::default()
    };
    // SAFETY: no feature of dynamic size (AMX) was enabled for this process, so the state fits `kvm_xsave`.
    unsafe { vcpu.set_xsave(&xsave) }.map_err(at("restoring its FPU"))?;
    vcpu.set_xcrs(&state.xcrs)
        .map_err(at("restoring its extended control registers"))?;
    vcpu.set_debug_regs(&state.debug)
        .map_err(at("restoring its debug registers"))?;
    vcpu.set_lapic(&state.lapic).map_err(at("restoring its local APIC"))?;
    let msrs = list(&state.msrs)?;
    let set = vcpu.set_msrs(&msrs).map_err(at("restoring MSRs"))?;
    if set != state.msrs.len() {
        return Err((
            "restoring MSRs: KVM does not take one of them",
            kvm_ioctls::Error::new(libc::EINVAL),
        ));
    }
    vcpu.set_vcpu_events(&state.events).map_err(at("restoring its events"))
}
