//! CPU levels: what a guest is told of its processor, when it is to run on others too.
//!
//! A snapshot needs every feature that its guest was told of (the passport), so a template that is to run on a whole fleet has to
//! be made with what all of it has. The levels are those of the x86-64 psABI ("Micro-Architecture Levels"). Each allows what came
//! with processors of its time, too: v2 Westmere, v3 Broadwell and Zen, v4 Skylake servers and Zen 4.
//!
//! Told of at every level, where the host has it: mitigations of processor faults, which no guest should run without, and what
//! KVM itself offers as of Linux 6.1. A host that lacks such a bit is told of by the passport.

use kvm_bindings::kvm_cpuid_entry2;
use thiserror::Error;

use super::features::{Register, WORDS, Word};

/// What a guest is told of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    /// Whatever the host has.
    #[default]
    Host,
    /// x86-64-v2.
    V2,
    /// x86-64-v3.
    V3,
    /// x86-64-v4.
    V4,
}

/// The host's processor is not of the level.
#[derive(Debug, Error, PartialEq, Eq)]
#[error("this host's processor is no x86-64-{level}: it lacks {word} bits {missing:#010x}")]
pub struct Missing {
    level: &'static str,
    word: String,
    missing: u32,
}

const EDX1: u32 = bits(&[
    0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 12, 13, 14, 15, 16, 17, 19, 23, 24, 25, 26, 28,
]);

/// What one register has at the levels from the given one on: what psABI demands, and what is allowed beside.
struct Row(Word, Level, u32, u32);

const ROWS: [Row; 24] = [
    // SSE3, SSSE3, CX16, SSE4.1, SSE4.2, POPCNT; PCLMULQDQ, x2APIC, TSC deadline, AES, hypervisor.
    Row(
        ECX1,
        Level::V2,
        bits(&[0, 9, 13, 19, 20, 23]),
        bits(&[1, 21, 24, 25, 31]),
    ),
    // FMA, MOVBE, XSAVE, AVX, F16C; RDRAND.
    Row(ECX1, Level::V3, bits(&[12, 22, 26, 28, 29]), bits(&[30])),
    // PCID.
    Row(ECX1, Level::V4, 0, bits(&[17])),
    Row(Word(0x1, 0, Register::Edx), Level::V2, 0, EDX1),
    // BMI1, AVX2, BMI2; FSGSBASE, SMEP, RDSEED, ADX, SMAP.
    Row(EBX7, Level::V3, bits(&[3, 5, 8]), bits(&[0, 7, 18, 19, 20])),
    // AVX-512 F, DQ, CD, BW, VL; ERMS, INVPCID, CLFLUSHOPT, CLWB.
    Row(EBX7, Level::V4, bits(&[16, 17, 28, 30, 31]), bits(&[9, 10, 23, 24])),
    // SRBDS_CTRL, MD_CLEAR, IBRS, STIBP, L1D_FLUSH, ARCH_CAPABILITIES, SSBD.
    Row(
        Word(0x7, 0, Register::Edx),
        Level::V2,
        0,
        bits(&[9, 10, 26, 27, 28, 29, 31]),
    ),
    // PSFD, IPRED, RRSBA, DDPD, BHI, MCDT_NO.
    Row(Word(0x7, 2, Register::Edx), Level::V2, 0, 0x3f),
    // x87, SSE, AVX.
    Row(STATE, Level::V3, 0x7, 0),
    // The three parts of AVX-512.
    Row(STATE, Level::V4, 0xe0, 0),
    // XSAVEOPT.
    Row(Word(0xd, 1, Register::Eax), Level::V3, 0, bits(&[0])),
    // XSAVEC, XGETBV of 1.
    Row(Word(0xd, 1, Register::Eax), Level::V4, 0, bits(&[1, 2])),
    // LAHF; CMP_LEGACY, CR8, misaligned SSE, topology.
    Row(ECX8000_0001, Level::V2, bits(&[0]), bits(&[1, 4, 7, 22])),
    // LZCNT; SSE4a, PREFETCHW.
    Row(ECX8000_0001, Level::V3, bits(&[5]), bits(&[6, 8])),
    // What AMD repeats of leaf 1; SYSCALL, NX, MMX and FXSR extensions, RDTSCP, LM.
    Row(
        EDX8000_0001,
        Level::V2,
        bits(&[11, 29]),
        0x0183_f3ff | bits(&[20, 22, 25, 27]),
    ),
    // 1 GiB pages.
    Row(EDX8000_0001, Level::V3, 0, bits(&[26])),
    // Invariant TSC.
    Row(Word(0x8000_0007, 0, Register::Edx), Level::V2, 0, bits(&[8])),
    // XSAVE of error pointers; IBPB, IBRS, STIBP and how they are used, SSBD, VIRT_SSBD, SSB_NO, PSFD, BTC_NO, IBPB_RET.
    Row(
        EBX8000_0008,
        Level::V2,
        0,
        bits(&[2, 12, 14, 15, 16, 17, 18, 19, 24, 25, 26, 28, 29, 30]),
    ),
    // LFENCE serializes, NULL_SEL_CLR_BASE, AUTOIBRS, SBPB, IBPB_BRTYPE, SRSO_NO.
    Row(
        Word(0x8000_0021, 0, Register::Eax),
        Level::V2,
        0,
        bits(&[2, 6, 8, 27, 28, 29]),
    ),
    // KVM (Documentation/virt/kvm/x86/cpuid.rst): clocks, asynchronous page faults, steal time, and what saves exits.
    Row(KVM, Level::V2, 0, bits(&[0, 1, 3, 4, 5, 6, 7, 9, 10, 11, 12, 13])),
    Row(KVM, Level::V2, 0, bits(&[14, 15, 16, 17, 24])),
    // None of these at any level; they are here so that every register has a row.
    Row(Word(0x7, 0, Register::Ecx), Level::V2, 0, 0),
    Row(Word(0x7, 1, Register::Eax), Level::V2, 0, 0),
    Row(Word(0x7, 1, Register::Edx), Level::V2, 0, 0),
];

const ECX1: Word = Word(0x1, 0, Register::Ecx);
const EBX7: Word = Word(0x7, 0, Register::Ebx);
const STATE: Word = Word(0xd, 0, Register::Eax);
const ECX8000_0001: Word = Word(0x8000_0001, 0, Register::Ecx);
const EDX8000_0001: Word = Word(0x8000_0001, 0, Register::Edx);
const EBX8000_0008: Word = Word(0x8000_0008, 0, Register::Ebx);
const KVM: Word = Word(0x4000_0001, 0, Register::Eax);

/// Without components that are switched on one by one: the legacy area and the header (SDM volume 1, 13.4).
const XSAVE_LEAST: u32 = 512 + 64;

const fn bits(numbers: &[u32]) -> u32 {
    let (mut bits, mut at) = (0, 0);
    while at < numbers.len() {
        bits |= 1 << numbers[at];
        at += 1;
    }
    bits
}

impl Level {
    fn name(self) -> &'static str {
        match self {
            Self::Host => "host",
            Self::V2 => "v2",
            Self::V3 => "v3",
            Self::V4 => "v4",
        }
    }

    /// What is demanded of a register, and what is allowed in it.
    fn of(self, word: Word) -> (u32, u32) {
        let rows = ROWS.iter().filter(|row| row.0 == word && row.1 <= self);
        rows.fold((0, 0), |(demanded, allowed), row| {
            (demanded | row.2, allowed | row.2 | row.3)
        })
    }

    /// Takes away what is not of this level.
    ///
    /// # Errors
    /// What is of it is not there.
    pub(super) fn apply(self, entries: &mut [kvm_cpuid_entry2]) -> Result<(), Missing> {
        if self == Self::Host {
            return Ok(());
        }
        for word in WORDS {
            let (demanded, allowed) = self.of(word);
            let missing = demanded & !word.of(entries);
            if missing != 0 {
                return Err(Missing {
                    level: self.name(),
                    word: word.name(),
                    missing,
                });
            }
            for register in entries.iter_mut().filter_map(|entry| word.of_mut(entry)) {
                *register &= allowed;
            }
        }
        limit_state(entries);
        Ok(())
    }
}

/// Makes the rest of leaf 0xd fit the components that are left (SDM volume 2, CPUID): others are not described, and the area for
/// all of them is no larger than it has to be.
fn limit_state(entries: &mut [kvm_cpuid_entry2]) {
    let components = STATE.of(entries);
    let mut end = XSAVE_LEAST;
    for entry in entries.iter_mut().filter(|entry| entry.function == 0xd) {
        match entry.index {
            0 | 1 => (entry.ecx, entry.edx) = (0, 0),
            component if component < 32 && components >> component & 1 == 1 => {
                end = end.max(entry.ebx.saturating_add(entry.eax));
            }
            _ => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0),
        }
    }
    for entry in entries.iter_mut() {
        if (entry.function, entry.index) == (0xd, 0) && components != 0 {
            entry.ecx = end;
        }
    }
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

    /// A processor that has all there is.
    fn all() -> Vec<kvm_cpuid_entry2> {
        let mut entries: Vec<_> = [(0x1, 0), (0x7, 0), (0x7, 1), (0x7, 2), (0xd, 0), (0xd, 1)]
            .into_iter()
            .chain([
                (0x8000_0001, 0),
                (0x8000_0007, 0),
                (0x8000_0008, 0),
                (0x8000_0021, 0),
                (0x4000_0001, 0),
            ])
            .map(|(function, index)| leaf(function, index, [u32::MAX; 4]))
            .collect();
        // Size and place of AVX, one of AVX-512, and PKRU.
        for (index, size, place) in [(2, 256, 576), (7, 1024, 1664), (9, 8, 2688)] {
            entries.push(leaf(0xd, index, [size, place, 0, 0]));
        }
        entries
    }

    fn find(entries: &[kvm_cpuid_entry2], function: u32, index: u32) -> kvm_cpuid_entry2 {
        *entries
            .iter()
            .find(|entry| (entry.function, entry.index) == (function, index))
            .unwrap()
    }

    #[test]
    fn a_higher_level_has_all_of_a_lower_one_and_none_has_all() {
        let of = |level: Level| {
            let mut entries = all();
            level.apply(&mut entries).unwrap();
            WORDS.map(|word| word.of(&entries))
        };
        let levels = [Level::V2, Level::V3, Level::V4, Level::Host].map(of);
        for pair in levels.windows(2) {
            assert!(pair[0].iter().zip(&pair[1]).all(|(less, more)| less & !more == 0));
            assert_ne!(pair[0], pair[1]);
        }
    }

    #[test]
    fn a_processor_without_what_a_level_demands_is_refused_with_the_bit() {
        let mut entries = all();
        for entry in entries
            .iter_mut()
            .filter(|entry| (entry.function, entry.index) == (7, 0))
        {
            entry.ebx &= !(1 << 16);
        }
        assert_eq!(Level::V3.apply(&mut entries.clone()), Ok(()));
        let error = Level::V4.apply(&mut entries).unwrap_err().to_string();
        assert!(
            error.contains("no x86-64-v4") && error.contains("CPUID 0x7.0 EBX bits 0x00010000"),
            "{error}"
        );
    }

    #[test]
    fn the_saved_state_is_as_large_as_what_is_left_of_it() {
        for (level, components, size) in [(Level::V2, 0, 0), (Level::V3, 7, 832), (Level::V4, 0xe7, 2688)] {
            let mut entries = all();
            level.apply(&mut entries).unwrap();
            let state = find(&entries, 0xd, 0);
            assert_eq!(
                (state.eax, state.ecx, state.edx),
                (components, if size == 0 { 0 } else { size }, 0)
            );
            assert_eq!(find(&entries, 0xd, 9).eax, 0, "PKRU is of no level");
            assert_eq!(find(&entries, 0xd, 2).eax != 0, level >= Level::V3);
        }
    }
}
