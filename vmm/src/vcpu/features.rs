//! CPUID registers whose bits are features: what guests are told of, what templates need, what levels allow.

use kvm_bindings::kvm_cpuid_entry2;

/// All of them (SDM volume 2, CPUID; AMD APM volume 3, E; KVM's own leaf). Snapshots list their bits in this order.
pub(crate) const WORDS: [Word; 16] = [
    Word(0x1, 0, Register::Ecx),
    Word(0x1, 0, Register::Edx),
    Word(0x7, 0, Register::Ebx),
    Word(0x7, 0, Register::Ecx),
    Word(0x7, 0, Register::Edx),
    Word(0x7, 1, Register::Eax),
    Word(0x7, 1, Register::Edx),
    Word(0x7, 2, Register::Edx),
    Word(0xd, 0, Register::Eax),
    Word(0xd, 1, Register::Eax),
    Word(0x8000_0001, 0, Register::Ecx),
    Word(0x8000_0001, 0, Register::Edx),
    Word(0x8000_0007, 0, Register::Edx),
    Word(0x8000_0008, 0, Register::Ebx),
    Word(0x8000_0021, 0, Register::Eax),
    Word(0x4000_0001, 0, Register::Eax),
];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Register {
    Eax,
    Ebx,
    Ecx,
    Edx,
}

/// Function, index, register.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Word(pub(crate) u32, pub(crate) u32, pub(crate) Register);

impl Word {
    /// Its bits, without those that are no property of the processor.
    pub(crate) fn of(self, entries: &[kvm_cpuid_entry2]) -> u32 {
        let Self(function, index, register) = self;
        let entry = entries
            .iter()
            .find(|entry| (entry.function, entry.index) == (function, index));
        let bits = entry.map_or(0, |entry| match register {
            Register::Eax => entry.eax,
            Register::Ebx => entry.ebx,
            Register::Ecx => entry.ecx,
            Register::Edx => entry.edx,
        });
        bits & !self.follows_the_guest()
    }

    /// Its place, if it is in this entry.
    pub(crate) fn of_mut(self, entry: &mut kvm_cpuid_entry2) -> Option<&mut u32> {
        let Self(function, index, register) = self;
        ((entry.function, entry.index) == (function, index)).then_some(match register {
            Register::Eax => &mut entry.eax,
            Register::Ebx => &mut entry.ebx,
            Register::Ecx => &mut entry.ecx,
            Register::Edx => &mut entry.edx,
        })
    }

    /// Bits that KVM sets by what the guest has switched on: OSXSAVE, MWAIT, APIC, OSPKE; and HTT, which is topology.
    pub(crate) fn follows_the_guest(self) -> u32 {
        match self {
            Self(0x1, _, Register::Ecx) => 1 << 27 | 1 << 3,
            Self(0x1, _, Register::Edx) => 1 << 9 | 1 << 28,
            Self(0x7, 0, Register::Ecx) => 1 << 4,
            Self(0x8000_0001, _, Register::Edx) => 1 << 9,
            _ => 0,
        }
    }

    pub(crate) fn name(self) -> String {
        let Self(function, index, register) = self;
        let register = match register {
            Register::Eax => "EAX",
            Register::Ebx => "EBX",
            Register::Ecx => "ECX",
            Register::Edx => "EDX",
        };
        format!("CPUID {function:#x}.{index} {register}")
    }
}
