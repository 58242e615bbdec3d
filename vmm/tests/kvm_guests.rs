//! Tiny guests on the real /dev/kvm: what they do ends up where it must, and each end has its own reason.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::io::Read;
use std::os::fd::AsFd;

use common::{Connection, Vmm, file, guest, machine, read};
use flint_api::vmm::error::Code;
use flint_api::vmm::request::Command;
use flint_api::vmm::*;
use nix::sys::wait::WaitStatus;

fn end_of(code: &[u8]) -> ExitReason {
    let (mut vmm, _serial) = Vmm::running(code);
    vmm.end().reason()
}

#[test]
fn a_guest_sees_another_generation_id_after_each_renewal() {
    let (mut vmm, mut serial) = Vmm::with_machine(machine(1, 16 << 20));
    let code = [
        &[0xbe, 0x00, 0xe0, 0x0f, 0x00][..],              // mov esi, 0xfe000
        &[0x66, 0xba, 0xf8, 0x03, 0x48, 0x8b, 0x06],      // again: mov dx, 0x3f8; mov rax, [rsi]
        &[0xb9, 16, 0, 0, 0, 0xf3, 0x6e, 0x83, 0xee, 16], // mov ecx, 16; rep outsb; sub esi, 16
        &[0x48, 0x3b, 0x06, 0x74, 0xfb, 0xeb, 0xe8],      // wait: cmp rax, [rsi]; je wait; jmp again
    ]
    .concat();
    vmm.load(&guest::elf(&code));
    vmm.ok(Command::Start(Start {}), &[]);
    let mut id = || {
        let mut id = [0; 16];
        serial.read_exact(&mut id).unwrap();
        id
    };
    let first = id();
    vmm.ok(Command::Pause(Pause {}), &[]);
    vmm.ok(Command::RenewGeneration(RenewGeneration {}), &[]);
    vmm.ok(Command::Resume(Resume {}), &[]);
    let second = id();
    assert!(first != [0; 16] && second != [0; 16] && first != second);
}

/// Prints bit 28 of CPUID 1 ECX (AVX), then bits 5 (AVX2) and 16 (AVX-512) of CPUID 7 EBX, as digits.
fn print_features() -> Vec<u8> {
    // bt r32, bit; setc al; add al, '0'; mov dx, 0x3f8; out dx, al
    let print_bit = |register: u8, bit: u8| {
        [
            0x0f,
            0xba,
            0xe0 | register,
            bit,
            0x0f,
            0x92,
            0xc0,
            0x04,
            b'0',
            0x66,
            0xba,
            0xf8,
            0x03,
            0xee,
        ]
    };
    [
        &[0xb8, 1, 0, 0, 0, 0x31, 0xc9, 0x0f, 0xa2][..], // mov eax, 1; xor ecx, ecx; cpuid
        &print_bit(1, 28),
        &[0xb8, 7, 0, 0, 0, 0x31, 0xc9, 0x0f, 0xa2], // mov eax, 7; xor ecx, ecx; cpuid
        &print_bit(3, 5),
        &print_bit(3, 16),
        &guest::halt(),
    ]
    .concat()
}

#[test]
fn a_guest_is_told_of_what_its_cpu_level_has() {
    let levels = [
        (CpuLevel::X8664V2, "000", "v2"),
        (CpuLevel::X8664V3, "110", "v3"),
        (CpuLevel::X8664V4, "111", "v4"),
    ];
    for (level, expected, name) in levels {
        let machine = CreateMachine {
            cpu_level: level.into(),
            ..machine(1, 16 << 20)
        };
        let mut vmm = Vmm::spawn();
        match vmm.call(Command::CreateMachine(machine.clone()), &[]) {
            Ok(_) => {
                let (mut vmm, mut serial) = Vmm::with_machine(machine);
                vmm.load(&guest::elf(&print_features()));
                vmm.ok(Command::Start(Start {}), &[]);
                assert_eq!(read(&mut serial, 3), expected, "{name}");
            }
            // Not every host is of every level; one that emulates may say of none that it is.
            Err(error) => {
                assert_eq!(error.code(), Code::Unsupported, "{}", error.message);
                let told = format!("no x86-64-{name}: it lacks CPUID");
                assert!(error.message.contains(&told), "{}", error.message);
            }
        }
    }
}

#[test]
fn what_a_guest_writes_to_its_serial_line_arrives() {
    let (mut vmm, mut serial) = Vmm::running(&[guest::print("hello"), guest::out(0x601, 0x34)].concat());
    assert_eq!(read(&mut serial, 5), "hello");
    assert_eq!(vmm.end().reason(), ExitReason::Poweroff);
}

#[test]
fn poweroff_reset_panic_and_triple_fault_are_told_apart() {
    assert_eq!(end_of(&guest::out(0x601, 0x34)), ExitReason::Poweroff);
    assert_eq!(end_of(&guest::out(0x600, 1)), ExitReason::Reset);
    assert_eq!(end_of(&guest::out(0x64, 0xfe)), ExitReason::Reset);
    assert_eq!(end_of(&guest::out(0x505, 1)), ExitReason::Panic);
    assert_eq!(end_of(&guest::triple_fault()), ExitReason::TripleFault);
}

#[test]
fn stop_ends_a_guest_that_spins_and_one_that_never_ran() {
    let (mut vmm, _serial) = Vmm::running(&guest::spin());
    vmm.ok(Command::Stop(Stop {}), &[]);
    assert_eq!(vmm.end().reason(), ExitReason::Stopped);

    let mut shell = Vmm::spawn();
    shell.ok(Command::Stop(Stop {}), &[]);
    assert_eq!(shell.end().reason(), ExitReason::Stopped);
}

#[test]
fn a_spinning_guest_is_paused_and_goes_on() {
    let (mut vmm, mut serial) = Vmm::running(&[guest::print("a"), guest::spin()].concat());
    assert_eq!(read(&mut serial, 1), "a");
    for _ in 0..20 {
        vmm.ok(Command::Pause(Pause {}), &[]);
        assert_eq!(vmm.phase(), state::Phase::Paused);
        vmm.ok(Command::Resume(Resume {}), &[]);
        assert_eq!(vmm.phase(), state::Phase::Running);
    }
}

#[test]
fn two_vcpus_run() {
    let second = [0xba, 0xf8, 0x03, 0xb0, b'2', 0xee, 0xf4];
    let (mut vmm, mut serial) = Vmm::with_machine(machine(2, 16 << 20));
    vmm.load(&guest::elf(&[guest::start_second(&second), guest::halt()].concat()));
    vmm.ok(Command::Start(Start {}), &[]);
    assert_eq!(read(&mut serial, 1), "2");
    vmm.ok(Command::Pause(Pause {}), &[]);
    vmm.ok(Command::Resume(Resume {}), &[]);
}

/// A guest of hardware-reduced ACPI enables interrupts before it has set up any controller: a device that has said something
/// by then must not get through.
#[test]
fn nothing_interrupts_a_guest_that_has_set_up_no_controller() {
    let sti = vec![0xfb, 0x90, 0x90];
    let code = [guest::empty_interrupt_table(), sti, guest::out(0x601, 0x34)].concat();
    let disk = DiskSlot {
        serial: "disk".into(),
        ..Default::default()
    };
    let (mut vmm, _serial) = Vmm::with_machine(CreateMachine {
        disks: vec![disk],
        ..machine(1, 16 << 20)
    });
    // The device tells that it has a capacity now.
    let bind = BindDisk {
        slot: 0,
        source: Some(bind_disk::Source::RawFile(RawFile { direct: false })),
        rate_limit: None,
    };
    vmm.ok(Command::BindDisk(bind), &[file(&[0; 512]).as_fd()]);
    vmm.load(&guest::elf(&code));
    vmm.ok(Command::Start(Start {}), &[]);
    assert_eq!(vmm.end().reason(), ExitReason::Poweroff);
}

#[test]
fn a_guest_that_jumps_to_the_reset_vector_resets() {
    // jmp 0xf000:0xfff0
    let jump = [0xea, 0xf0, 0xff, 0x00, 0xf0];
    let (mut vmm, _serial) = Vmm::with_machine(machine(2, 16 << 20));
    vmm.load(&guest::elf(&[guest::start_second(&jump), guest::halt()].concat()));
    vmm.ok(Command::Start(Start {}), &[]);
    assert_eq!(vmm.end().reason(), ExitReason::Reset);
}

#[test]
fn memory_goes_on_above_the_gap() {
    // Page directory pointer 4, and a directory at 2 MiB, map the first 2 MiB above 4 GiB.
    let map = [
        guest::store(0xa020, 0x20_0003),
        guest::store(0x20_0000, 0x83),
        guest::store(0x20_0004, 1),
    ]
    .concat();
    let code = [map, guest::store_and_print(1 << 32, b'H'), guest::out(0x601, 0x34)].concat();
    let (mut vmm, mut serial) = Vmm::with_machine(machine(1, (3 << 30) + (64 << 20)));
    vmm.load(&guest::elf(&code));
    vmm.ok(Command::Start(Start {}), &[]);
    assert_eq!(read(&mut serial, 1), "H");
    assert_eq!(vmm.end().reason(), ExitReason::Poweroff);
}

#[test]
fn what_is_no_kernel_is_refused_and_another_may_follow() {
    let (mut vmm, _serial) = Vmm::with_machine(machine(1, 16 << 20));
    let (text, empty, folder) = (file(b"#!/bin/sh\n"), file(b""), std::fs::File::open("/").unwrap());
    for bad in [text.as_fd(), empty.as_fd(), folder.as_fd()] {
        let (code, message) = vmm.refused(Command::LoadKernel(LoadKernel::default()), &[bad]);
        assert_eq!(code, Code::Resource);
        assert!(message.contains("kernel"), "{message}");
    }
    assert_eq!(vmm.refused(Command::Start(Start {}), &[]).0, Code::WrongPhase);
    vmm.load(&guest::elf(&guest::out(0x601, 0x34)));
    vmm.ok(Command::Start(Start {}), &[]);
    assert_eq!(vmm.end().reason(), ExitReason::Poweroff);
}

#[test]
fn steps_out_of_order_are_refused_and_change_nothing() {
    let mut vmm = Vmm::spawn();
    let kernel = file(b"");
    for command in [
        Command::Start(Start {}),
        Command::Pause(Pause {}),
        Command::Resume(Resume {}),
    ] {
        assert_eq!(vmm.refused(command, &[]).0, Code::WrongPhase);
    }
    for command in [
        Command::LoadKernel(LoadKernel::default()),
        Command::BindSerial(BindSerial {}),
    ] {
        assert_eq!(vmm.refused(command, &[kernel.as_fd()]).0, Code::WrongPhase);
    }
    assert_eq!(vmm.phase(), state::Phase::Shell);
    vmm.ok(Command::CreateMachine(machine(1, 16 << 20)), &[]);
    assert_eq!(
        vmm.refused(Command::CreateMachine(machine(1, 16 << 20)), &[]).0,
        Code::WrongPhase
    );
    assert_eq!(vmm.phase(), state::Phase::Created);
}

#[test]
fn bad_requests_are_refused_and_the_vmm_lives_on() {
    let mut vmm = Vmm::spawn();
    let kernel = file(b"");
    assert_eq!(
        vmm.refused(Command::CreateMachine(machine(0, 16 << 20)), &[]).0,
        Code::Invalid
    );
    assert_eq!(vmm.refused(Command::CreateMachine(machine(1, 1)), &[]).0, Code::Invalid);
    assert_eq!(
        vmm.refused(Command::GetState(GetState {}), &[kernel.as_fd()]).0,
        Code::Invalid
    );
    vmm.ok(Command::CreateMachine(machine(1, 16 << 20)), &[]);
    assert_eq!(
        vmm.refused(Command::LoadKernel(LoadKernel::default()), &[]).0,
        Code::Invalid
    );
    assert_eq!(
        vmm.refused(Command::BindDisk(BindDisk::default()), &[kernel.as_fd()]).0,
        Code::Invalid
    );
    let long = LoadKernel {
        cmdline: "x".repeat(4000),
        has_initrd: false,
    };
    assert_eq!(
        vmm.refused(Command::LoadKernel(long), &[kernel.as_fd()]).0,
        Code::Invalid
    );
    for garbage in [&b"\xff\xff\xff"[..], b"\x08\x07"] {
        vmm.connection.send(garbage, &[]);
        let response = vmm.connection.response();
        assert!(matches!(response.result, Some(response::Result::Error(error)) if error.code() == Code::Invalid));
    }
    assert_eq!(vmm.phase(), state::Phase::Created);
}

#[test]
fn a_newer_connection_takes_the_sandbox_over() {
    let (mut vmm, _serial) = Vmm::running(&guest::spin());
    let mut newer = Connection::open(&vmm.folder);
    assert!(newer.call(Command::GetState(GetState {}), &[]).is_ok());
    assert!(vmm.connection.receive().is_none(), "the older connection is closed");

    drop(newer);
    vmm.connection = Connection::open(&vmm.folder);
    assert_eq!(vmm.phase(), state::Phase::Running);
    assert_eq!(vmm.connection.pid, Some(vmm.pid));
}

#[test]
fn kill_9_leaves_nothing() {
    let (mut vmm, mut serial) = Vmm::running(&[guest::print("a"), guest::spin()].concat());
    assert_eq!(read(&mut serial, 1), "a");
    assert!(matches!(
        vmm.kill(),
        WaitStatus::Signaled(_, nix::sys::signal::Signal::SIGKILL, _)
    ));
    assert!(vmm.connection.receive().is_none());
    assert!(!std::path::Path::new(&format!("/proc/{}", vmm.pid)).exists());
}

#[test]
fn output_that_nobody_takes_is_counted() {
    let mut vmm = Vmm::spawn();
    vmm.ok(Command::CreateMachine(machine(1, 16 << 20)), &[]);
    let (mut ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
    vmm.load(&guest::elf(
        &[guest::print("abc"), guest::out(0x600, 0), guest::spin()].concat(),
    ));
    vmm.ok(Command::Start(Start {}), &[]);
    loop {
        let state = vmm.call(Command::GetState(GetState {}), &[]).unwrap().unwrap();
        if state.counters["serial.dropped"] == 3 {
            break;
        }
    }
    vmm.ok(Command::BindSerial(BindSerial {}), &[theirs.as_fd()]);
    drop(theirs);
    vmm.ok(Command::Stop(Stop {}), &[]);
    vmm.end();
    assert_eq!(std::io::Read::read(&mut ours, &mut [0]).unwrap(), 0);
}
