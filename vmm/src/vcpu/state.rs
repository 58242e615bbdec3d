//! All of a vCPU that is saved, in the order in which KVM wants it back (KVM API 4.x; events last, they look at the rest).
//!
//! What goes on by itself is kept apart, in [`VcpuTime`]: it is set at the last moment before the guest goes on.

use kvm_bindings::{
    CpuId, KVM_MAX_CPUID_ENTRIES, Msrs, kvm_cpuid_entry2, kvm_debugregs, kvm_lapic_state, kvm_mp_state, kvm_msr_entry,
    kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::VcpuFd;
use zerocopy::{FromBytes, Immutable, IntoBytes};

/// What KVM refused, and its word.
pub type Failure = (&'static str, kvm_ioctls::Error);

/// Of an XSAVE area without features that a process must ask for.
const XSAVE_WORDS: usize = 1024;
/// The local APIC's timer: where its LVT entry is, and its mode (SDM volume 3, 11.5.4).
const APIC_LVT_TIMER: usize = 0x320;
const LVT_TIMER_MODE: u32 = 3 << 17;
const LVT_DEADLINE: u32 = 2 << 17;
const MSR_TSC: u32 = 0x10;
/// KVM_MP_STATE_UNINITIALIZED: as KVM makes it, without a start signal since.
const NEVER_STARTED: u32 = 1;
const MSR_TSC_DEADLINE: u32 = 0x6e0;

/// A stopped vCPU.
#[derive(Clone, Debug, PartialEq)]
pub struct VcpuState {
    /// What it was told of itself.
    pub cpuid: Vec<kvm_cpuid_entry2>,
    /// Model specific registers, those of [`VcpuTime`] left out.
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
    /// What goes on by itself.
    pub time: VcpuTime,
}

/// What of a vCPU's state goes on while nobody runs it.
#[derive(Clone, Copy, PartialEq, prost::Message)]
pub struct VcpuTime {
    /// Time stamp counter.
    #[prost(fixed64, tag = "1")]
    pub tsc: u64,
    /// When the local APIC's timer is due, in time stamps (SDM volume 3, 11.5.4.1); 0: not armed.
    #[prost(fixed64, tag = "2")]
    pub deadline: u64,
}

impl VcpuState {
    /// Whether its guest has never started it.
    #[must_use]
    pub fn was_never_started(&self) -> bool {
        self.mp_state.mp_state == NEVER_STARTED
    }

    /// The time to go on with. A timer in deadline mode that is not armed is armed to fire at once: KVM clears the deadline when
    /// it expires, and a vCPU that is stopped right then was seen without deadline and without interrupt, after which its guest
    /// waits for something else to happen. To a kernel an interrupt too many is a look at its clock.
    #[must_use]
    pub fn time_to_go_on(&self) -> VcpuTime {
        let mut timer = [0; 4];
        for (byte, register) in timer.iter_mut().zip(&self.lapic.regs[APIC_LVT_TIMER..]) {
            *byte = register.cast_unsigned();
        }
        let lost = u32::from_le_bytes(timer) & LVT_TIMER_MODE == LVT_DEADLINE && self.time.deadline == 0;
        VcpuTime {
            deadline: if lost { self.time.tsc.max(1) } else { self.time.deadline },
            ..self.time
        }
    }
}

/// A vCPU in a state file. KVM's structures are part of Linux' user space ABI and go in as their bytes.
#[derive(Clone, PartialEq, prost::Message)]
pub struct VcpuRecord {
    /// `kvm_cpuid_entry2`, one after the other.
    #[prost(bytes = "vec", tag = "1")]
    pub cpuid: Vec<u8>,
    /// Model specific registers.
    #[prost(message, repeated, tag = "2")]
    pub msrs: Vec<MsrRecord>,
    /// `kvm_regs`.
    #[prost(bytes = "vec", tag = "3")]
    pub regs: Vec<u8>,
    /// `kvm_sregs`.
    #[prost(bytes = "vec", tag = "4")]
    pub sregs: Vec<u8>,
    /// The XSAVE area.
    #[prost(bytes = "vec", tag = "5")]
    pub xsave: Vec<u8>,
    /// `kvm_xcrs`.
    #[prost(bytes = "vec", tag = "6")]
    pub xcrs: Vec<u8>,
    /// `kvm_debugregs`.
    #[prost(bytes = "vec", tag = "7")]
    pub debug: Vec<u8>,
    /// `kvm_lapic_state`.
    #[prost(bytes = "vec", tag = "8")]
    pub lapic: Vec<u8>,
    /// `kvm_mp_state`.
    #[prost(uint32, tag = "9")]
    pub mp_state: u32,
    /// `kvm_vcpu_events`.
    #[prost(bytes = "vec", tag = "10")]
    pub events: Vec<u8>,
}

/// A model specific register.
#[derive(Clone, Copy, PartialEq, prost::Message)]
pub struct MsrRecord {
    /// Its number.
    #[prost(uint32, tag = "1")]
    pub index: u32,
    /// What is in it.
    #[prost(fixed64, tag = "2")]
    pub data: u64,
}

impl From<&VcpuState> for VcpuRecord {
    fn from(state: &VcpuState) -> Self {
        fn bytes(part: &(impl IntoBytes + Immutable + ?Sized)) -> Vec<u8> {
            part.as_bytes().to_vec()
        }
        let msr = |msr: &kvm_msr_entry| MsrRecord {
            index: msr.index,
            data: msr.data,
        };
        Self {
            cpuid: bytes(&state.cpuid[..]),
            msrs: state.msrs.iter().map(msr).collect(),
            regs: bytes(&state.regs),
            sregs: bytes(&state.sregs),
            xsave: bytes(&state.xsave),
            xcrs: bytes(&state.xcrs),
            debug: bytes(&state.debug),
            lapic: bytes(&state.lapic),
            mp_state: state.mp_state.mp_state,
            events: bytes(&state.events),
        }
    }
}

impl VcpuRecord {
    /// The state, with its time from elsewhere.
    ///
    /// # Errors
    /// Names the part that has a wrong length.
    pub fn to_state(&self, time: VcpuTime) -> Result<VcpuState, &'static str> {
        fn part<T: FromBytes>(bytes: &[u8], name: &'static str) -> Result<T, &'static str> {
            T::read_from_bytes(bytes).map_err(|_| name)
        }
        let mut entries = self.cpuid.chunks_exact(size_of::<kvm_cpuid_entry2>());
        let cpuid = entries
            .by_ref()
            .map(|entry| part(entry, "CPUID"))
            .collect::<Result<_, _>>()?;
        if !entries.remainder().is_empty() {
            return Err("CPUID");
        }
        let msr = |msr: &MsrRecord| kvm_msr_entry {
            index: msr.index,
            data: msr.data,
            ..Default::default()
        };
        Ok(VcpuState {
            cpuid,
            msrs: self.msrs.iter().map(msr).collect(),
            regs: part(&self.regs, "registers")?,
            sregs: part(&self.sregs, "system registers")?,
            xsave: part(&self.xsave, "XSAVE area")?,
            xcrs: part(&self.xcrs, "extended control registers")?,
            debug: part(&self.debug, "debug registers")?,
            lapic: part(&self.lapic, "local APIC")?,
            mp_state: kvm_mp_state {
                mp_state: self.mp_state,
            },
            events: part(&self.events, "events")?,
            time,
        })
    }
}

/// Saves a vCPU that is not running. `msrs` names the MSRs that KVM lists as worth saving.
///
/// # Errors
/// What KVM refused.
pub fn save(vcpu: &VcpuFd, msrs: &[u32]) -> Result<VcpuState, Failure> {
    let at = |what| move |error| (what, error);
    // First: it makes KVM settle what is pending (KVM API 4.38).
    let mp_state = vcpu.get_mp_state().map_err(at("saving its MP state"))?;
    // Before the local APIC: a timer that fires in between is in both then. Once too often is harmless, never is not.
    let (msrs, time) = split(save_msrs(vcpu, msrs)?);
    Ok(VcpuState {
        mp_state,
        cpuid: vcpu
            .get_cpuid2(KVM_MAX_CPUID_ENTRIES)
            .map_err(at("saving CPUID"))?
            .as_slice()
            .to_vec(),
        msrs,
        regs: vcpu.get_regs().map_err(at("saving its registers"))?,
        sregs: vcpu.get_sregs().map_err(at("saving its system registers"))?,
        xsave: vcpu.get_xsave().map_err(at("saving its FPU"))?.region,
        xcrs: vcpu.get_xcrs().map_err(at("saving its extended control registers"))?,
        debug: vcpu.get_debug_regs().map_err(at("saving its debug registers"))?,
        lapic: vcpu.get_lapic().map_err(at("saving its local APIC"))?,
        events: vcpu.get_vcpu_events().map_err(at("saving its events"))?,
        time,
    })
}

/// Takes what goes on by itself out of the MSRs.
fn split(mut msrs: Vec<kvm_msr_entry>) -> (Vec<kvm_msr_entry>, VcpuTime) {
    let data = |index| msrs.iter().find(|msr| msr.index == index).map_or(0, |msr| msr.data);
    let time = VcpuTime {
        tsc: data(MSR_TSC),
        deadline: data(MSR_TSC_DEADLINE),
    };
    msrs.retain(|msr| ![MSR_TSC, MSR_TSC_DEADLINE].contains(&msr.index));
    (msrs, time)
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

/// Gives a vCPU that has not run a saved state, but for its time. `tsc_khz`: another pace of time than the host's.
///
/// # Errors
/// What KVM refused: the state is another host's or was altered.
pub fn restore(vcpu: &VcpuFd, state: &VcpuState, tsc_khz: Option<u32>) -> Result<(), Failure> {
    let at = |what| move |error| (what, error);
    if let Some(khz) = tsc_khz {
        vcpu.set_tsc_khz(khz)
            .map_err(at("setting the pace of its time stamps"))?;
    }
    let here = vcpu.get_cpuid2(KVM_MAX_CPUID_ENTRIES).map_err(at("reading CPUID"))?;
    // It is the host's work of 20 us, and a template is mostly of the very host.
    if !same_processor(here.as_slice(), &state.cpuid) {
        let cpuid =
            CpuId::from_entries(&state.cpuid).map_err(|_| ("listing CPUID", kvm_ioctls::Error::new(libc::E2BIG)))?;
        vcpu.set_cpuid2(&cpuid).map_err(at("restoring CPUID"))?;
    }
    vcpu.set_mp_state(state.mp_state)
        .map_err(at("restoring its MP state"))?;
    vcpu.set_regs(&state.regs).map_err(at("restoring its registers"))?;
    vcpu.set_sregs(&state.sregs)
        .map_err(at("restoring its system registers"))?;
    // Not on the stack, whose pages stay: a machine may have many vCPUs.
    let mut xsave = Box::<kvm_xsave>::default();
    xsave.region = state.xsave;
    // SAFETY: no feature of dynamic size (AMX) was enabled for this process, so the state fits `kvm_xsave`.
    unsafe { vcpu.set_xsave(&xsave) }.map_err(at("restoring its FPU"))?;
    vcpu.set_xcrs(&state.xcrs)
        .map_err(at("restoring its extended control registers"))?;
    vcpu.set_debug_regs(&state.debug)
        .map_err(at("restoring its debug registers"))?;
    vcpu.set_lapic(&state.lapic).map_err(at("restoring its local APIC"))?;
    set_msrs(vcpu, &state.msrs)?;
    vcpu.set_vcpu_events(&state.events)
        .map_err(at("restoring its events"))?;
    match vcpu.kvmclock_ctrl() {
        Ok(()) => Ok(()),
        // A guest without that clock.
        Err(error) if error.errno() == libc::EINVAL => Ok(()),
        // The guest's watchdogs overlook the time that it was gone (KVM API 4.70).
        Err(error) => Err(("telling the guest that it was stopped", error)),
    }
}

/// Whether two lists of CPUID leaves are of the same processor, whatever state it is in.
fn same_processor(one: &[kvm_cpuid_entry2], other: &[kvm_cpuid_entry2]) -> bool {
    let pairs = one.iter().zip(other);
    one.len() == other.len()
        && pairs
            .map(|(one, other)| (fixed(one), fixed(other)))
            .all(|(one, other)| one == other)
}

/// A leaf without what KVM derives from a vCPU's registers whenever these are set (Linux, arch/x86/kvm/cpuid.c,
/// kvm_update_cpuid_runtime; SDM volume 2, CPUID).
fn fixed(leaf: &kvm_cpuid_entry2) -> kvm_cpuid_entry2 {
    const MONITOR: u32 = 1 << 3;
    const OSXSAVE: u32 = 1 << 27;
    const APIC: u32 = 1 << 9;
    const OSPKE: u32 = 1 << 4;
    let mut leaf = *leaf;
    match (leaf.function, leaf.index) {
        (1, _) => {
            leaf.ecx &= !(MONITOR | OSXSAVE);
            leaf.edx &= !APIC;
        }
        (7, 0) => leaf.ecx &= !OSPKE,
        // The size of the XSAVE area for what is enabled.
        (0xd, 0 | 1) => leaf.ebx = 0,
        _ => {}
    }
    leaf
}

/// Lets a vCPU's time go on where it stood: right before it runs.
///
/// # Errors
/// What KVM refused.
pub fn restore_time(vcpu: &VcpuFd, time: VcpuTime) -> Result<(), Failure> {
    let msr = |index, data| kvm_msr_entry {
        index,
        data,
        ..Default::default()
    };
    let both = [msr(MSR_TSC, time.tsc), msr(MSR_TSC_DEADLINE, time.deadline)];
    // Zero disarms, which a restored timer is already; and a guest may not have this timer.
    set_msrs(vcpu, if time.deadline == 0 { &both[..1] } else { &both })
}

/// Gives a vCPU that has not run the time of those that run. To KVM a counter that is set to 0 is a vCPU that is plugged in, and it
/// gets the offset that was given last, to the tick (`kvm_synchronize_tsc`).
///
/// # Errors
/// What KVM refused.
pub fn join_time(vcpu: &VcpuFd) -> Result<(), Failure> {
    let plugged_in = VcpuTime { tsc: 0, deadline: 0 };
    restore_time(vcpu, plugged_in)
}

fn set_msrs(vcpu: &VcpuFd, entries: &[kvm_msr_entry]) -> Result<(), Failure> {
    let set = vcpu
        .set_msrs(&list(entries)?)
        .map_err(|error| ("restoring MSRs", error))?;
    if set == entries.len() {
        return Ok(());
    }
    let refused = "restoring MSRs: KVM does not take one of them";
    Err((refused, kvm_ioctls::Error::new(libc::EINVAL)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leaf(function: u32, index: u32, [eax, ebx, ecx, edx]: [u32; 4]) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 {
            function,
            index,
            eax,
            ebx,
            ecx,
            edx,
            ..Default::default()
        }
    }

    #[test]
    fn what_follows_from_registers_makes_no_other_processor_and_all_else_does() {
        let list = [
            leaf(1, 0, [1, 2, 0, 0]),
            leaf(7, 0, [0, 5, 0, 0]),
            leaf(0xd, 0, [7, 576, 832, 0]),
        ];
        let running = [
            leaf(1, 0, [1, 2, 1 << 27 | 1 << 3, 1 << 9]),
            leaf(7, 0, [0, 5, 1 << 4, 0]),
            leaf(0xd, 0, [7, 832, 832, 0]),
        ];
        assert!(same_processor(&list, &running));
        assert!(!same_processor(&list, &running[..2]));
        for place in 0..list.len() {
            for change in [
                |leaf: &mut kvm_cpuid_entry2| leaf.function += 0x40,
                |leaf: &mut kvm_cpuid_entry2| leaf.index += 2,
                |leaf: &mut kvm_cpuid_entry2| leaf.eax ^= 1,
                |leaf: &mut kvm_cpuid_entry2| leaf.ecx ^= 1,
                |leaf: &mut kvm_cpuid_entry2| leaf.edx ^= 1,
            ] {
                let mut other = running;
                change(&mut other[place]);
                assert!(!same_processor(&list, &other), "{place}: {other:?}");
            }
        }
        let mut features = running;
        features[1].ebx ^= 1 << 3;
        assert!(!same_processor(&list, &features));
    }
}
