//! Linux guests: the kernel and initrd named by FLINT_TEST_KERNEL and FLINT_TEST_INITRD. They need a KVM that runs guests
//! natively, which `hack/test system` provides.
//!
//! The initrd's init prints "flint-test: cpus=N memory_kib=M" and of how many CPUs it was told that they have this and that, and then does what `flint_test=` on the command line says:
//! poweroff, reboot, panic or unreported-panic, a panic without the driver that tells the VMM.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used)]

mod common;

use common::linux::{self, told};
use common::{Vmm, machine};
use flint_api::vmm::{CpuLevel, CreateMachine, ExitReason};

/// Boots Linux; returns what it printed and how it ended.
fn boot(vcpus: u32, memory: u64, action: &str) -> (Vec<String>, ExitReason) {
    let (vmm, serial) = Vmm::with_machine(machine(vcpus, memory));
    linux::boot(vmm, serial, action)
}

#[test]
fn linux_sees_its_vcpus_and_memory_and_powers_off() {
    let (lines, reason) = boot(2, 256 << 20, "poweroff");
    assert_eq!(told(&lines, "cpus"), "2");
    let memory: u64 = told(&lines, "memory_kib").parse().unwrap();
    assert!((128 << 10..256 << 10).contains(&memory), "{memory} KiB");
    assert_eq!(reason, ExitReason::Poweroff);
}

#[test]
fn linux_is_told_of_what_its_cpu_level_has() {
    for (level, newer) in [(CpuLevel::X8664V2, "0"), (CpuLevel::X8664V3, "1")] {
        let machine = CreateMachine {
            cpu_level: level.into(),
            ..machine(1, 192 << 20)
        };
        let (vmm, serial) = Vmm::with_machine(machine);
        let (lines, _) = linux::boot(vmm, serial, "poweroff");
        let told = ["sse4_2", "xsave", "avx2"].map(|name| told(&lines, name));
        assert_eq!(told, ["1", newer, newer], "{level:?}");
    }
}

#[test]
fn linux_reboots() {
    assert_eq!(boot(1, 192 << 20, "reboot").1, ExitReason::Reset);
}

#[test]
fn linux_panics() {
    assert_eq!(boot(1, 192 << 20, "panic").1, ExitReason::Panic);
}

#[test]
fn linux_reboots_after_a_panic_that_nobody_reports() {
    assert_eq!(boot(1, 192 << 20, "unreported-panic").1, ExitReason::Reset);
}
