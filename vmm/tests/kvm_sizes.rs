//! One snapshot serves guests of any size: vCPUs that were never started are the clone's when it is told that it may use them,
//! and memory is plugged after its claim.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::fs;
use std::io::{ErrorKind, Read};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use common::driver::*;
use common::saved::{Saved, claim, pause_and_save, reserved};
use common::{Vmm, guest, machine, read};
use flint_api::vmm::error::Code;
use flint_api::vmm::request::Command;
use flint_api::vmm::*;
use flint_vmm::memory::HOTPLUG_START;

const MEMORY: u64 = 16 << 20;
const VCPUS: u32 = 16;
const MEM_BLOCK: u64 = 2 << 20;
/// The high half of it, in virtio-mem's config space (virtio 1.3, 5.15.4).
const REQUESTED_SIZE: u32 = 52;

/// mov rcx, [generation id]; print "T"; then cmp rcx, [generation id] until it is another one: this is a clone.
fn until_cloned() -> Vec<u8> {
    const GENERATION: [u8; 4] = 0x000f_e000u32.to_le_bytes();
    let mut code = [&[0x48, 0x8b, 0x0c, 0x25], &GENERATION[..]].concat();
    code.extend(guest::print("T"));
    code.extend([&[0x48, 0x3b, 0x0c, 0x25], &GENERATION[..], &[0x74, 0xf6]].concat());
    code
}

/// A snapshot of a guest that has told that it waits for its clones.
fn template(machine: CreateMachine, elf: &[u8]) -> Saved {
    let (mut vmm, mut serial) = Vmm::with_machine(machine);
    vmm.load(elf);
    vmm.ok(Command::Start(Start {}), &[]);
    assert_eq!(read(&mut serial, 1), "T");
    pause_and_save(&mut vmm)
}

fn set_vcpus(vmm: &mut Vmm, vcpus: u32) {
    vmm.ok(Command::SetVcpus(SetVcpus { vcpus }), &[]);
}

/// Nothing comes for a while in which a vCPU that ran would have said something a hundred times.
fn assert_silent(serial: &mut UnixStream) {
    serial.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
    let error = serial.read_exact(&mut [0]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::WouldBlock);
    serial.set_read_timeout(None).unwrap();
}

// ---- vCPUs

#[test]
fn a_vcpu_that_was_never_started_waits_until_the_clone_may_use_it() {
    let second = [0xba, 0xf8, 0x03, 0xb0, b'2', 0xee, 0xf4];
    let code = [
        until_cloned(),
        guest::start_second(&second),
        guest::print("s"),
        guest::halt(),
    ];
    let saved = template(machine(VCPUS, MEMORY), &guest::elf(&code.concat()));
    let (mut clone, mut serial) = saved.cloned(machine(VCPUS, MEMORY));
    assert_eq!(read(&mut serial, 1), "s", "the signal is sent");
    assert_silent(&mut serial);
    // Neither does it run because the machine stood still for a moment.
    clone.ok(Command::Pause(Pause {}), &[]);
    clone.ok(Command::Resume(Resume {}), &[]);
    set_vcpus(&mut clone, 1);
    assert_silent(&mut serial);
    for vcpus in [0, VCPUS + 1] {
        let (code, message) = clone.refused(Command::SetVcpus(SetVcpus { vcpus }), &[]);
        assert_eq!(code, Code::Invalid, "{message}");
    }
    set_vcpus(&mut clone, VCPUS);
    assert_eq!(read(&mut serial, 1), "2");
    clone.ok(Command::Pause(Pause {}), &[]);
    let (code, message) = clone.refused(Command::SetVcpus(SetVcpus { vcpus: 2 }), &[]);
    assert_eq!(code, Code::WrongPhase, "{message}");
}

#[test]
fn vcpus_that_were_running_run_in_the_clone() {
    // jmp to where it says '2' again.
    let second = [0xba, 0xf8, 0x03, 0xb0, b'2', 0xee, 0xeb, 0xfd];
    let code = [guest::start_second(&second), guest::halt()].concat();
    let (mut vmm, mut serial) = Vmm::with_machine(machine(3, MEMORY));
    vmm.load(&guest::elf(&code));
    vmm.ok(Command::Start(Start {}), &[]);
    assert_eq!(read(&mut serial, 2), "22");
    let saved = pause_and_save(&mut vmm);
    let (_clone, mut serial) = saved.cloned(machine(3, MEMORY));
    assert_eq!(read(&mut serial, 2), "22");
}

// ---- memory

/// Waits until 4 GiB or more are requested, plugs a block, and writes into it.
fn plugger() -> Vec<u8> {
    // Of 1 GiB each, in the page that follows the root's.
    let root_entry = 0xa000 + 8 * u32::try_from(HOTPLUG_START >> 30).unwrap();
    const DIRECTORY: u32 = BLOCK_STATUS;
    let mut code = [until_cloned(), drive(1)].concat();
    // mov ebx, requested size; cmp dword [rbx], 0; je to the comparison
    code.push(0xbb);
    code.extend((WINDOW + CONFIG + REQUESTED_SIZE).to_le_bytes());
    code.extend([0x83, 0x3b, 0x00, 0x74, 0xfb]);
    code.extend(guest::store(WINDOW + QUEUE_NOTIFY, 0));
    // mov ebx, the used ring's index; cmp word [rbx], 0; je to the comparison
    code.push(0xbb);
    code.extend((RINGS[0] + 0x2002).to_le_bytes());
    code.extend([0x66, 0x83, 0x3b, 0x00, 0x74, 0xfa]);
    code.extend(print_word(IN));
    // The boot's page tables end at 4 GiB: another page directory, present and writable, with one page of 2 MiB.
    for (at, value) in [
        (root_entry, DIRECTORY | 3),
        (DIRECTORY, 0x83),
        (DIRECTORY + 4, (HOTPLUG_START >> 32) as u32),
    ] {
        code.extend(guest::store(at, value));
    }
    code.extend(guest::store_and_print(HOTPLUG_START + 4096, b'p'));
    code.extend(guest::halt());
    let mut image = Image::new(&code, &[]);
    image.put(OUT + 8, &HOTPLUG_START.to_le_bytes());
    image.put(OUT + 16, &1u16.to_le_bytes());
    image.put(IN, &[0xff; 4]);
    image.ring(0, &[(OUT, 24, NEXT), (IN, 10, WRITE)], &[0]);
    image.0
}

fn memory_of(vmm: &mut Vmm) -> MemoryState {
    let state = vmm.call(Command::GetState(GetState {}), &[]).unwrap().unwrap();
    state.memory.unwrap()
}

#[test]
fn memory_is_plugged_after_the_claim() {
    let machine = || CreateMachine {
        hotplug_bytes: 32 << 30,
        ..machine(1, MEMORY)
    };
    let saved = template(machine(), &guest::elf(&plugger()));
    let (mut clone, mut serial) = saved.cloned(machine());
    assert_silent(&mut serial);
    assert_eq!(memory_of(&mut clone), MemoryState::default());
    let plugged_bytes = 32 << 30;
    clone.ok(Command::SetMemory(SetMemory { plugged_bytes }), &[]);
    // ACK (virtio 1.3, 5.15.6).
    assert_eq!(words(&mut serial), [0]);
    assert_eq!(read(&mut serial, 1), "p");
    let memory = memory_of(&mut clone);
    assert_eq!(
        (memory.requested_bytes, memory.plugged_bytes),
        (plugged_bytes, MEM_BLOCK)
    );
    // One write has brought the whole block, if the host has huge pages for whoever asks for them.
    let huge = fs::read_to_string("/sys/kernel/mm/transparent_hugepage/enabled");
    let expected = if huge.is_ok_and(|on| !on.contains("[never]")) {
        MEM_BLOCK >> 10
    } else {
        0
    };
    assert_eq!(kib(&clone, "AnonHugePages:"), expected);
    // It is saved with the clone, and nobody else has it.
    let again = pause_and_save(&mut clone);
    let parked = again.parked(machine());
    drop(parked);
    assert_eq!(memory_of(&mut saved.parked(machine())), MemoryState::default());
}

// ---- what it costs to be ready for any size

/// Memory of a process, in KiB, as smaps_rollup calls it.
fn kib(vmm: &Vmm, name: &str) -> u64 {
    let rollup = vmm.proc("smaps_rollup");
    let line = rollup.lines().find_map(|line| line.strip_prefix(name));
    line.unwrap().trim().trim_end_matches(" kB").parse().unwrap()
}

/// Its own, whatever it shares.
fn own_kib(vmm: &Vmm) -> u64 {
    kib(vmm, "Anonymous:")
}

#[test]
fn a_parked_clone_for_any_size_costs_little_more_than_one_of_the_least() {
    let largest = || CreateMachine {
        hotplug_bytes: 32 << 30,
        ..machine(VCPUS, 128 << 20)
    };
    let least = || machine(1, 128 << 20);
    let elf = guest::elf(&[until_cloned(), guest::print("C"), guest::halt()].concat());
    let mut own = Vec::new();
    for shape in [least(), largest()] {
        let saved = template(shape.clone(), &elf);
        let begin = Instant::now();
        let mut vmm = reserved(shape.clone());
        let made = begin.elapsed();
        saved.load(&mut vmm).unwrap();
        own.push(own_kib(&vmm));
        println!(
            "{} vCPUs, {} GiB to plug: reserved in {made:?}, parked in {:?}, {} KiB its own, state file of {} bytes",
            shape.vcpus,
            shape.hotplug_bytes >> 30,
            begin.elapsed(),
            own_kib(&vmm),
            fs::metadata(&saved.state).unwrap().len(),
        );
        let mut serial = claim(&mut vmm, Claim::default(), &[]);
        assert_eq!(read(&mut serial, 1), "C");
    }
    let [least, largest] = own[..] else {
        panic!("two machines")
    };
    assert!(largest < least + 1024, "{own:?} KiB");
}
