//! What a snapshot needs of the host that it runs on, checked before anything of it is touched.
//!
//! A guest looks at its processor once and relies on what it saw for ever. So a host must have every feature that the guest was
//! told of, know every register that was saved, and count time at the same pace, or be able to scale it. It may have more.

use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use kvm_ioctls::{Cap, Kvm, VcpuFd};
use nix::sys::utsname::uname;
use thiserror::Error;

use crate::vcpu::features::WORDS;
use crate::vcpu::state::VcpuState;

/// How far two frequencies may be apart and still be the same: as KVM sees it (250 parts in a million).
const TOLERANCE_PPM: u64 = 250;

/// What a snapshot needs.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Passport {
    /// CPU vendor, as CPUID leaf 0 spells it.
    #[prost(string, tag = "1")]
    pub vendor: String,
    /// CPU family.
    #[prost(uint32, tag = "2")]
    pub family: u32,
    /// For people.
    #[prost(uint32, tag = "3")]
    pub model: u32,
    /// Feature bits that the guest was told of, a word for each register in the order of this format's list.
    #[prost(fixed32, repeated, tag = "4")]
    pub features: Vec<u32>,
    /// Pace of the time stamp counter.
    #[prost(uint32, tag = "5")]
    pub tsc_khz: u32,
    /// Registers that were saved.
    #[prost(uint32, repeated, tag = "6")]
    pub msrs: Vec<u32>,
    /// Kernel of the host that it was taken on, for people.
    #[prost(string, tag = "7")]
    pub kernel: String,
    /// Virtio devices by name.
    #[prost(string, repeated, tag = "8")]
    pub devices: Vec<String>,
}

/// The line of a passport that this host does not meet.
#[derive(Debug, Error, PartialEq, Eq)]
#[error("this host cannot run the snapshot: {line}: it needs {needed}, this host has {found}")]
pub struct Mismatch {
    /// Which one.
    pub line: String,
    /// What the snapshot says.
    pub needed: String,
    /// What the host says.
    pub found: String,
}

fn mismatch(line: impl Into<String>, needed: &impl ToString, found: &impl ToString) -> Mismatch {
    Mismatch {
        line: line.into(),
        needed: needed.to_string(),
        found: found.to_string(),
    }
}

/// What this host offers to guests.
#[derive(Clone, Debug)]
pub struct Host {
    cpuid: CpuId,
    msrs: Vec<u32>,
    tsc_khz: u32,
    tsc_scaling: bool,
    kernel: String,
}

impl Host {
    /// Asks KVM, by means of a vCPU that was made here: what that one was told is what this host offers. (A KVM may tell a guest
    /// more than it says it supports.)
    ///
    /// # Errors
    /// KVM does not answer.
    pub fn of(kvm: &Kvm, vcpu: &VcpuFd) -> Result<Self, kvm_ioctls::Error> {
        let kernel = uname().map(|name| name.release().to_string_lossy().into_owned());
        Ok(Self {
            cpuid: vcpu.get_cpuid2(KVM_MAX_CPUID_ENTRIES)?,
            msrs: kvm.get_msr_index_list()?.as_slice().to_vec(),
            tsc_khz: vcpu.get_tsc_khz()?,
            tsc_scaling: kvm.check_extension(Cap::TscControl),
            // Only people look at it.
            kernel: kernel.unwrap_or_default(),
        })
    }

    /// MSRs that KVM here knows how to save.
    #[must_use]
    pub fn msrs(&self) -> &[u32] {
        &self.msrs
    }

    /// The passport of a machine on this host with these vCPUs and devices.
    #[must_use]
    pub fn passport(&self, vcpus: &[Box<VcpuState>], devices: Vec<String>) -> Passport {
        let cpuid = vcpus.first().map_or(&[][..], |vcpu| &vcpu.cpuid);
        let (family, model) = family_and_model(cpuid);
        let mut msrs: Vec<u32> = vcpus
            .iter()
            .flat_map(|vcpu| vcpu.msrs.iter().map(|msr| msr.index))
            .collect();
        msrs.sort_unstable();
        msrs.dedup();
        Passport {
            vendor: vendor(cpuid),
            family,
            model,
            features: WORDS.iter().map(|word| word.of(cpuid)).collect(),
            tsc_khz: self.tsc_khz,
            msrs,
            kernel: self.kernel.clone(),
            devices,
        }
    }

    /// Looks whether a snapshot can run here. Ok: the pace that its vCPUs' time stamp counters must be set to, if another.
    ///
    /// # Errors
    /// The first line that differs.
    pub fn check(&self, passport: &Passport) -> Result<Option<u32>, Mismatch> {
        let ours = self.cpuid.as_slice();
        let (family, _) = family_and_model(ours);
        if passport.vendor != vendor(ours) {
            return Err(mismatch("CPU vendor", &passport.vendor, &vendor(ours)));
        }
        if passport.family != family {
            return Err(mismatch("CPU family", &passport.family, &family));
        }
        // Fewer come from an older VMM, whose guests were told of no others.
        if passport.features.len() > WORDS.len() {
            return Err(mismatch("CPU feature words", &passport.features.len(), &WORDS.len()));
        }
        for (word, needed) in WORDS.iter().zip(&passport.features) {
            let found = word.of(ours);
            let missing = needed & !found;
            if missing != 0 {
                return Err(mismatch(
                    format!("{} bits {missing:#010x}", word.name()),
                    &format!("{needed:#010x}"),
                    &format!("{found:#010x}"),
                ));
            }
        }
        if let Some(msr) = passport.msrs.iter().find(|msr| !self.msrs.contains(msr)) {
            let found = format!(
                "none, with kernel {} (the snapshot's: {})",
                self.kernel, passport.kernel
            );
            return Err(mismatch(format!("MSR {msr:#x}"), &"it", &found));
        }
        self.pace(passport.tsc_khz)
    }

    fn pace(&self, needed: u32) -> Result<Option<u32>, Mismatch> {
        let apart = u64::from(self.tsc_khz.abs_diff(needed));
        if apart * 1_000_000 <= u64::from(self.tsc_khz) * TOLERANCE_PPM {
            return Ok(None);
        }
        if self.tsc_scaling {
            return Ok(Some(needed));
        }
        let found = format!("{} kHz, and cannot scale it", self.tsc_khz);
        Err(mismatch("TSC frequency", &format!("{needed} kHz"), &found))
    }
}

fn vendor(cpuid: &[kvm_cpuid_entry2]) -> String {
    let leaf = cpuid.iter().find(|entry| entry.function == 0);
    let bytes = leaf.map(|leaf| [leaf.ebx, leaf.edx, leaf.ecx].map(u32::to_le_bytes).concat());
    String::from_utf8_lossy(&bytes.unwrap_or_default()).into_owned()
}

/// As displayed: base and extended parts together (SDM volume 2, CPUID, figure 3-6).
fn family_and_model(cpuid: &[kvm_cpuid_entry2]) -> (u32, u32) {
    let leaf = cpuid.iter().find(|entry| entry.function == 1);
    let eax = leaf.map_or(0, |leaf| leaf.eax);
    let base = eax >> 8 & 0xf;
    let family = if base == 0xf { base + (eax >> 20 & 0xff) } else { base };
    (family, eax >> 4 & 0xf | eax >> 12 & 0xf0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leaf(function: u32, [eax, ebx, ecx, edx]: [u32; 4]) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 {
            function,
            eax,
            ebx,
            ecx,
            edx,
            ..Default::default()
        }
    }

    fn host() -> Host {
        let [ebx, edx, ecx] = [*b"Genu", *b"ineI", *b"ntel"].map(u32::from_le_bytes);
        let leaves = [leaf(0, [7, ebx, ecx, edx]), leaf(1, [0x806f8, 0, 0b111, 1])];
        Host {
            cpuid: CpuId::from_entries(&leaves).unwrap(),
            msrs: vec![0x10, 0xc000_0080],
            tsc_khz: 2_000_000,
            tsc_scaling: false,
            kernel: "6.18".into(),
        }
    }

    fn passport() -> Passport {
        let mut features = vec![0; WORDS.len()];
        features[0] = 0b101;
        Passport {
            vendor: "GenuineIntel".into(),
            family: 6,
            model: 0x8f,
            features,
            tsc_khz: 2_000_300,
            msrs: vec![0xc000_0080],
            ..Default::default()
        }
    }

    #[test]
    fn a_host_that_has_more_than_is_needed_will_do() {
        assert_eq!(family_and_model(host().cpuid.as_slice()), (6, 0x8f));
        assert_eq!(host().check(&passport()), Ok(None));
    }

    #[test]
    fn the_line_that_differs_is_named() {
        type Spoil = fn(&mut Passport);
        let cases: [(Spoil, &str); 6] = [
            (
                |p| p.vendor = "AuthenticAMD".into(),
                "CPU vendor: it needs AuthenticAMD, this host has GenuineIntel",
            ),
            (|p| p.family = 25, "CPU family: it needs 25, this host has 6"),
            (|p| p.features[0] = 1 << 20, "CPUID 0x1.0 ECX bits 0x00100000"),
            (|p| p.features.push(0), "feature words"),
            (|p| p.msrs.push(0x48), "MSR 0x48"),
            (|p| p.tsc_khz = 2_100_000, "TSC frequency: it needs 2100000 kHz"),
        ];
        for (spoil, named) in cases {
            let mut passport = passport();
            spoil(&mut passport);
            let error = host().check(&passport).unwrap_err().to_string();
            assert!(error.contains(named), "{error}");
        }
    }

    #[test]
    fn another_pace_is_set_where_the_processor_can_scale() {
        let host = Host {
            tsc_scaling: true,
            ..host()
        };
        let passport = Passport {
            tsc_khz: 2_100_000,
            ..passport()
        };
        assert_eq!(host.check(&passport), Ok(Some(2_100_000)));
    }
}
