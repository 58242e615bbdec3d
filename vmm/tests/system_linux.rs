//! Linux guests: the kernel and initrd named by FLINT_TEST_KERNEL and FLINT_TEST_INITRD. They need a KVM that runs guests
//! natively, which `hack/test system` provides.
//!
//! The initrd's init prints "flint-test: cpus=N memory_kib=M" and then does what `flint_test=` on the command line says:
//! poweroff, reboot, panic or unreported-panic, a panic without the driver that tells the VMM.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::env;
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::os::fd::AsFd;

use common::{Vmm, machine};
use flint_api::vmm::request::Command;
use flint_api::vmm::*;

/// Boots Linux; returns what it printed and how it ended.
fn boot(vcpus: u32, memory: u64, action: &str) -> (Vec<String>, ExitReason) {
    let named = |name: &str| {
        let path = env::var(name).unwrap_or_else(|_| panic!("{name} must name a file: run hack/test system"));
        File::open(&path).unwrap_or_else(|error| panic!("{path}: {error}"))
    };
    let (kernel, initrd) = (named("FLINT_TEST_KERNEL"), named("FLINT_TEST_INITRD"));
    let (mut vmm, serial) = Vmm::with_machine(machine(vcpus, memory));
    // Quiet: each byte of kernel log is an exit, which an emulated host pays dearly for.
    let cmdline = format!("console=ttyS0 quiet panic=-1 flint_test={action}");
    vmm.ok(
        Command::LoadKernel(LoadKernel {
            cmdline,
            has_initrd: true,
        }),
        &[kernel.as_fd(), initrd.as_fd()],
    );
    vmm.ok(Command::Start(Start {}), &[]);
    // Printed as it comes, so that a guest that hangs shows where.
    let reader = std::thread::spawn(move || {
        let lines = BufReader::new(serial).lines().map_while(Result::ok);
        lines.inspect(|line| println!("{line}")).collect::<Vec<_>>()
    });
    let reason = vmm.end().reason();
    let lines = reader.join().unwrap();
    (lines, reason)
}

/// A number that init printed.
fn told(lines: &[String], name: &str) -> u64 {
    let line = lines
        .iter()
        .find(|line| line.contains("flint-test:"))
        .expect("init's line");
    let (_, rest) = line.split_once(&format!("{name}=")).unwrap();
    rest.split_whitespace().next().unwrap().parse().unwrap()
}

#[test]
fn linux_sees_its_vcpus_and_memory_and_powers_off() {
    let (lines, reason) = boot(2, 256 << 20, "poweroff");
    assert_eq!(told(&lines, "cpus"), 2);
    let memory = told(&lines, "memory_kib");
    assert!((128 << 10..256 << 10).contains(&memory), "{memory} KiB");
    assert_eq!(reason, ExitReason::Poweroff);
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
