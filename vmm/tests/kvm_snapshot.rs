//! Machines that are saved, and go on in another process.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::fs::{self, File};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::os::unix::net::UnixStream;

use common::alphabet::{assert_alphabet, drain, letters, read_sectors};
use common::driver::*;
use common::saved::{Saved, claim, claim_disk, pause_and_save, reserved, small_file};
use common::{Vmm, file, guest, machine, read};
use flint_api::vmm::error::Code;
use flint_api::vmm::request::Command;
use flint_api::vmm::*;
use flint_vmm::snapshot::Snapshot;

const MEMORY: u64 = 16 << 20;

// ---- guests

/// mov ebx, address; cmp dword [rbx], 0; je to the comparison
fn wait_until_not_zero(address: u32) -> Vec<u8> {
    let mut code = vec![0xbb];
    code.extend(address.to_le_bytes());
    code.extend([0x83, 0x3b, 0x00, 0x74, 0xfb]);
    code
}

/// Sets the interrupt controllers up; and lets interrupts come, sleeping for ever.
fn interrupts() -> (Vec<u8>, Vec<u8>) {
    let mut set_up = interrupts_and_notify(0);
    let sleep = set_up.split_off(set_up.len() - 4);
    assert_eq!(sleep, [0xfb, 0xf4, 0xeb, 0xfd], "sti, hlt, jmp");
    (set_up, sleep)
}

fn with_disk(vcpus: u32) -> CreateMachine {
    CreateMachine {
        disks: vec![disk_slot()],
        ..machine(vcpus, MEMORY)
    }
}

fn start(vmm: &mut Vmm, image: &[u8]) {
    vmm.load(&guest::elf(image));
    vmm.ok(Command::Start(Start {}), &[]);
}

/// The letters that a guest had printed when it was saved, and it.
fn saved_letters() -> (String, Saved, Vmm) {
    let (mut vmm, mut serial) = Vmm::running(&letters());
    let mut text = read(&mut serial, 30);
    let saved = pause_and_save(&mut vmm);
    text += &drain(&mut serial);
    (text, saved, vmm)
}

// ---- going on

#[test]
fn a_clone_goes_on_where_its_template_was_saved_and_so_does_the_template() {
    let (text, saved, mut vmm) = saved_letters();
    let (_clone, mut serial) = saved.cloned(machine(1, MEMORY));
    assert_alphabet(&(text.clone() + &read(&mut serial, 30)));

    let (mut ours, theirs) = UnixStream::pair().unwrap();
    vmm.ok(Command::BindSerial(BindSerial {}), &[theirs.as_fd()]);
    vmm.ok(Command::Resume(Resume {}), &[]);
    assert_alphabet(&(text + &read(&mut ours, 30)));
}

#[test]
fn two_clones_diverge_and_leave_the_template_as_it_is() {
    let (text, saved, _vmm) = saved_letters();
    let (state, memory) = (saved.state(), saved.memory());
    let clones = [0; 2].map(|_| saved.cloned(machine(1, MEMORY)));
    for (_clone, mut serial) in clones {
        assert_alphabet(&(text.clone() + &read(&mut serial, 60)));
    }
    assert_eq!((saved.state(), saved.memory()), (state, memory));
}

#[test]
fn a_clone_of_a_clone_goes_on() {
    let (mut text, saved, _vmm) = saved_letters();
    let (mut clone, mut serial) = saved.cloned(machine(1, MEMORY));
    text += &read(&mut serial, 10);
    let again = pause_and_save(&mut clone);
    text += &drain(&mut serial);
    let (_clone, mut serial) = again.cloned(machine(1, MEMORY));
    assert_alphabet(&(text + &read(&mut serial, 30)));
}

#[test]
fn what_a_machine_says_that_it_was_made_as_loads_its_snapshot_with_another_identity() {
    let (mut vmm, mut serial) = Vmm::with_machine(CreateMachine {
        nets: vec![net_slot()],
        vsock: Some(VsockSlot { guest_cid: 3 }),
        rng: true,
        ..with_disk(2)
    });
    start(&mut vmm, &[drive(1), letters()].concat());
    let mut text = read(&mut serial, 30);
    let saved = pause_and_save(&mut vmm);
    text += &drain(&mut serial);
    let state = vmm.call(Command::GetState(GetState {}), &[]).unwrap().unwrap();
    let mut machine = state.machine.unwrap();
    assert_eq!(
        (&machine.nets, machine.vsock),
        (&vec![NetSlot::default()], Some(VsockSlot::default())),
        "an identity is not part of it"
    );

    machine.nets[0].mac = vec![2, 0, 0, 0, 0, 9];
    machine.vsock = Some(VsockSlot { guest_cid: 77 });
    let (_clone, mut serial) = saved.cloned(machine);

    assert_alphabet(&(text + &read(&mut serial, 30)));
}

#[test]
fn save_restore_save_is_equal_in_every_byte() {
    let (mut vmm, mut serial) = Vmm::with_machine(CreateMachine {
        nets: vec![net_slot()],
        vsock: Some(VsockSlot { guest_cid: 3 }),
        rng: true,
        ..with_disk(2)
    });
    start(&mut vmm, &[drive(1), letters()].concat());
    assert_eq!(read(&mut serial, 3), "abc");
    let saved = pause_and_save(&mut vmm);
    let mut parked = saved.parked(CreateMachine {
        // An identity of its own.
        nets: vec![NetSlot {
            mac: vec![2, 0, 0, 0, 0, 9],
        }],
        vsock: Some(VsockSlot { guest_cid: 77 }),
        rng: true,
        ..with_disk(2)
    });
    let again = Saved::of(&mut parked);

    let mut second = Snapshot::decode(&again.state()).unwrap();
    let first = Snapshot::decode(&saved.state()).unwrap();
    assert_ne!(first.id, second.id);
    second.id = first.id;
    assert_eq!(first, second);
    assert_eq!(second.encode(), saved.state());
    let (first, second) = (saved.memory(), again.memory());
    let size = usize::try_from(MEMORY).unwrap();
    assert!(first[..size] == second[..size], "memory differs");
    let blocks = |path| fs::metadata(path).unwrap().blocks();
    assert_eq!(blocks(&saved.memory), blocks(&again.memory));
    assert!(blocks(&saved.memory) * 512 < MEMORY / 8, "pages of zeros are holes");
}

#[test]
fn a_halted_guest_is_woken_in_its_clone_by_what_the_claim_binds() {
    let (set_up, sleep) = interrupts();
    let code = [drive(1), set_up, guest::print("h"), sleep].concat();
    let handler = [print_word(WINDOW + INTERRUPT_STATUS), poweroff()].concat();
    let (mut vmm, mut serial) = Vmm::with_machine(with_disk(1));
    start(&mut vmm, &Image::new(&code, &handler).0);
    assert_eq!(read(&mut serial, 1), "h");
    // It sleeps, or is about to.
    let saved = pause_and_save(&mut vmm);

    let mut clone = saved.parked(with_disk(1));
    let disks = vec![claim_disk(0)];
    let bound = Claim {
        disks,
        ..Default::default()
    };
    let mut serial = claim(&mut clone, bound, &[&file(&[0; 512])]);
    assert_eq!(words(&mut serial), [2], "the configuration has changed");
    assert_eq!(clone.end().reason(), ExitReason::Poweroff);
}

#[test]
fn an_interrupt_that_was_pending_comes_in_the_clone() {
    let both = CreateMachine {
        disks: vec![
            disk_slot(),
            DiskSlot {
                serial: "second".into(),
                ..Default::default()
            },
        ],
        ..machine(1, MEMORY)
    };
    // Interrupts stay off until the second disk has a capacity.
    let ready = wait_until_not_zero(WINDOW + WINDOW_BYTES + CONFIG);
    let (set_up, sleep) = interrupts();
    let first = wait_until_not_zero(WINDOW + CONFIG);
    let code = [
        drive(1),
        set_up,
        guest::print("r"),
        first,
        guest::print("p"),
        ready,
        sleep,
    ]
    .concat();
    let handler = [print_word(WINDOW + INTERRUPT_STATUS), poweroff()].concat();
    let (mut vmm, mut serial) = Vmm::with_machine(both.clone());
    start(&mut vmm, &Image::new(&code, &handler).0);
    assert_eq!(read(&mut serial, 1), "r");
    let disk = claim_disk(0).disk.unwrap();
    vmm.ok(Command::BindDisk(disk), &[file(&[0; 512]).as_fd()]);
    assert_eq!(read(&mut serial, 1), "p");
    let saved = pause_and_save(&mut vmm);

    let mut clone = saved.parked(both);
    let bound = Claim {
        disks: vec![claim_disk(1)],
        ..Default::default()
    };
    let mut serial = claim(&mut clone, bound, &[&file(&[0; 512])]);
    assert_eq!(words(&mut serial), [2]);
    assert_eq!(clone.end().reason(), ExitReason::Poweroff);
}

#[test]
fn a_stream_of_block_requests_goes_on_without_a_gap() {
    let sectors: Vec<u8> = (b'a'..=b'z').flat_map(|letter| [letter; 512]).collect();
    let disk = file(&sectors);
    let (mut vmm, mut serial) = Vmm::with_machine(with_disk(1));
    vmm.ok(Command::BindDisk(claim_disk(0).disk.unwrap()), &[disk.as_fd()]);
    start(&mut vmm, &read_sectors(&[]).0);
    let mut text = read(&mut serial, 40);
    // Each of these may find a request in flight.
    for _ in 0..5 {
        let saved = pause_and_save(&mut vmm);
        text += &drain(&mut serial);
        vmm = saved.parked(with_disk(1));
        let bound = Claim {
            disks: vec![claim_disk(0)],
            ..Default::default()
        };
        serial = claim(&mut vmm, bound, &[&disk]);
        text += &read(&mut serial, 40);
    }
    let counters = vmm.call(Command::GetState(GetState {}), &[]).unwrap().unwrap().counters;
    assert_eq!(counters["serial.dropped"], 0, "the test reads too slowly");
    assert_alphabet(&text);
}

#[test]
fn a_vcpu_that_was_never_started_is_started_in_the_clone() {
    let second = [0xba, 0xf8, 0x03, 0xb0, b'2', 0xee, 0xf4];
    let code = [
        guest::print("1"),
        wait_until_not_zero(WINDOW + CONFIG),
        guest::start_second(&second),
        guest::halt(),
    ];
    let (mut vmm, mut serial) = Vmm::with_machine(with_disk(3));
    start(&mut vmm, &code.concat());
    assert_eq!(read(&mut serial, 1), "1");
    let saved = pause_and_save(&mut vmm);
    let mut clone = saved.parked(with_disk(3));
    let bound = Claim {
        disks: vec![claim_disk(0)],
        ..Default::default()
    };
    let mut serial = claim(&mut clone, bound, &[&file(&[0; 512])]);
    clone.ok(Command::SetVcpus(SetVcpus { vcpus: 2 }), &[]);
    assert_eq!(read(&mut serial, 1), "2");
}

/// The local APIC's timer in the mode that Linux uses: a deadline in time stamps, some way ahead.
#[test]
fn a_timer_that_was_armed_fires_in_the_clone() {
    const LVT_TIMER: u32 = 0xfee0_0320;
    const DEADLINE_MODE: u32 = 2 << 17;
    let (mut code, sleep) = interrupts();
    code.extend(guest::store(LVT_TIMER, DEADLINE_MODE | VECTOR));
    // rdtsc; add edx, 1 (two seconds at 2 GHz); mov ecx, IA32_TSC_DEADLINE; wrmsr
    code.extend([0x0f, 0x31, 0x83, 0xc2, 0x01, 0xb9, 0xe0, 0x06, 0, 0, 0x0f, 0x30]);
    let code = [code, guest::print("h"), sleep].concat();
    let handler = [guest::print("t"), poweroff()].concat();
    let (mut vmm, mut serial) = Vmm::with_machine(machine(1, MEMORY));
    start(&mut vmm, &Image::new(&code, &handler).0);
    assert_eq!(read(&mut serial, 1), "h");
    let saved = pause_and_save(&mut vmm);
    assert_eq!(drain(&mut serial), "", "the timer has not fired yet");
    let armed = Snapshot::decode(&saved.state()).unwrap().vcpus[0].time;
    assert!(armed.deadline > armed.tsc, "{armed:?}");
    let (mut clone, mut serial) = saved.cloned(machine(1, MEMORY));
    assert_eq!(read(&mut serial, 1), "t");
    assert_eq!(clone.end().reason(), ExitReason::Poweroff);

    // It expired as the guest was stopped, and its interrupt was lost: KVM has done that.
    let mut lost = Snapshot::decode(&saved.state()).unwrap();
    lost.vcpus[0].time.deadline = 0;
    fs::write(&saved.state, lost.encode()).unwrap();
    let (mut clone, mut serial) = saved.cloned(machine(1, MEMORY));
    assert_eq!(read(&mut serial, 1), "t");
    assert_eq!(clone.end().reason(), ExitReason::Poweroff);
}

// ---- order

#[test]
fn steps_out_of_order_are_refused_and_a_clone_is_claimed_once() {
    let (text, saved, mut template) = saved_letters();
    assert_eq!(saved.load(&mut template).unwrap_err().code(), Code::WrongPhase);
    let mut vmm = Vmm::spawn();
    let claimed = Command::Claim(Claim::default());
    assert_eq!(saved.load(&mut vmm).unwrap_err().code(), Code::WrongPhase);
    assert_eq!(vmm.refused(claimed.clone(), &[]).0, Code::WrongPhase);
    let shape = ReserveMachine {
        machine: Some(machine(1, MEMORY)),
        paged: false,
    };
    vmm.ok(Command::ReserveMachine(shape.clone()), &[]);
    assert_eq!(vmm.phase(), state::Phase::Reserved);
    assert_eq!(vmm.refused(claimed.clone(), &[]).0, Code::WrongPhase);
    assert_eq!(vmm.refused(Command::Start(Start {}), &[]).0, Code::WrongPhase);
    assert_eq!(saved.save(&mut vmm).unwrap_err().code(), Code::WrongPhase);
    assert_eq!(vmm.refused(Command::ReserveMachine(shape), &[]).0, Code::WrongPhase);
    saved.load(&mut vmm).unwrap();
    assert_eq!(vmm.phase(), state::Phase::Parked);
    assert_eq!(saved.load(&mut vmm).unwrap_err().code(), Code::WrongPhase);
    let mut serial = claim(&mut vmm, Claim::default(), &[]);
    assert_eq!(vmm.refused(claimed, &[]).0, Code::WrongPhase);
    // Not over what it lives in.
    let error = saved.save(&mut vmm).unwrap_err();
    assert_eq!(error.code(), Code::Invalid);
    assert!(error.message.contains("was loaded from"), "{}", error.message);
    assert_alphabet(&(text + &read(&mut serial, 30)));
}

#[test]
fn a_claim_whose_binding_fails_has_not_run() {
    let (_, saved, _template) = saved_letters();
    let mut vmm = saved.parked(machine(1, MEMORY));
    let bad = Claim {
        disks: vec![claim_disk(7)],
        ..Default::default()
    };
    let (code, message) = vmm.refused(Command::Claim(bad), &[file(&[0; 512]).as_fd()]);
    assert_eq!(code, Code::Invalid);
    assert!(message.contains("disk slot 7"), "{message}");
    let (code, message) = vmm.refused(Command::Claim(Claim::default()), &[file(b"").as_fd()]);
    assert_eq!(code, Code::Invalid);
    assert!(message.contains("takes 0 file descriptors, 1 came"), "{message}");
    assert_eq!(vmm.phase(), state::Phase::Parked);
}

// ---- what does not fit

/// Saves an altered snapshot's state beside its memory, and tells how a reserved machine refuses it.
fn refusal(saved: &Saved, state: &[u8]) -> Error {
    let original = saved.state();
    fs::write(&saved.state, state).unwrap();
    let mut vmm = reserved(machine(1, MEMORY));
    let error = saved.load(&mut vmm).unwrap_err();
    assert_eq!(vmm.phase(), state::Phase::Reserved);
    // A refusal spoils nothing.
    fs::write(&saved.state, original).unwrap();
    saved.load(&mut vmm).unwrap();
    error
}

#[test]
fn a_host_that_differs_is_told_by_its_line_before_anything_is_touched() {
    let (_, saved, _template) = saved_letters();
    let good = Snapshot::decode(&saved.state()).unwrap();
    type Spoil = fn(&mut Snapshot);
    let cases: [(Spoil, &str); 4] = [
        (
            |s| s.passport.vendor = "FlintFlint99".into(),
            "CPU vendor: it needs FlintFlint99",
        ),
        (|s| s.passport.features[2] = u32::MAX, "CPUID 0x7.0 EBX bits"),
        (|s| s.passport.msrs.push(0x1234_5678), "MSR 0x12345678"),
        (|s| s.passport.family += 1, "CPU family"),
    ];
    for (spoil, named) in cases {
        let mut bad = good.clone();
        spoil(&mut bad);
        let error = refusal(&saved, &bad.encode());
        assert_eq!(error.code(), Code::Unsupported, "{}", error.message);
        assert!(error.message.contains(named), "{}", error.message);
    }
}

#[test]
fn a_machine_of_another_shape_is_refused_by_what_differs() {
    let (_, saved, _template) = saved_letters();
    for (other, named) in [
        (machine(2, MEMORY), "vcpus is 1 there, 2 here"),
        (machine(1, 2 * MEMORY), "memory_bytes"),
        (with_disk(1), "disks"),
    ] {
        let error = saved.load(&mut reserved(other)).unwrap_err();
        assert_eq!(error.code(), Code::Invalid);
        assert!(error.message.contains(named), "{}", error.message);
    }
}

#[test]
fn a_state_that_contradicts_itself_is_refused_by_what_is_wrong() {
    let (_, saved, _template) = saved_letters();
    let good = Snapshot::decode(&saved.state()).unwrap();
    type Spoil = fn(&mut Snapshot);
    let cases: [(Spoil, &str); 5] = [
        (|s| s.vcpus.clear(), "number of saved vCPUs"),
        (|s| s.vcpus[0].mp_state.mp_state = 99, "MP state"),
        (|s| s.machine.ranges.clear(), "memory layout"),
        (|s| s.devices = vec![Default::default()], "number of saved devices"),
        (|s| s.serial.uart.in_buffer = vec![0; 1000], "serial line"),
    ];
    for (spoil, named) in cases {
        let mut bad = good.clone();
        spoil(&mut bad);
        let error = refusal(&saved, &bad.encode());
        assert!(error.message.contains(named), "{}", error.message);
    }
    let mut old = saved.state();
    old[8] = 0;
    assert!(refusal(&saved, &old).message.contains("format 0"));
}

#[test]
fn no_altered_byte_and_no_cut_of_a_real_state_file_is_taken() {
    let (_, saved, _template) = saved_letters();
    let state = saved.state();
    for at in 0..state.len() {
        let mut bad = state.clone();
        bad[at] ^= 0x10;
        assert!(Snapshot::decode(&bad).is_err(), "byte {at}");
        assert!(Snapshot::decode(&state[..at]).is_err(), "{at} bytes");
    }
    for state in [&state[..1000], &[], &[0xff; 5000]] {
        let error = refusal(&saved, state);
        assert_eq!(error.code(), Code::Resource);
    }
}

#[test]
fn a_memory_file_that_is_short_or_another_snapshots_is_refused() {
    let (_, saved, mut template) = saved_letters();
    let other = Saved::of(&mut template);
    let mut vmm = reserved(machine(1, MEMORY));
    let message = |vmm: &mut Vmm, saved: &Saved| {
        let error = saved.load(vmm).unwrap_err();
        assert_eq!(error.code(), Code::Resource);
        error.message
    };
    let memory = saved.memory();
    fs::write(&saved.memory, other.memory()).unwrap();
    let foreign = message(&mut vmm, &saved);
    assert!(foreign.contains("another snapshot"), "{foreign}");
    fs::write(&saved.memory, &memory[..memory.len() - 4096]).unwrap();
    let short = message(&mut vmm, &saved);
    assert!(short.contains("cut off"), "{short}");
    fs::write(&saved.memory, &memory).unwrap();
    saved.load(&mut vmm).unwrap();
}

// ---- faults while saving

#[test]
fn a_full_disk_is_an_error_and_the_guest_goes_on() {
    // rep stosb over 4 MiB, so that there is more than the disk takes.
    let fill = vec![0xbf, 0, 0, 0x40, 0, 0xb9, 0, 0, 0x40, 0, 0xb0, 0x77, 0xf3, 0xaa];
    let (mut vmm, mut serial) = Vmm::running(&[fill, letters()].concat());
    let mut text = read(&mut serial, 5);
    vmm.ok(Command::Pause(Pause {}), &[]);
    let saved = Saved::of(&mut vmm);
    let state = File::options().write(true).open(&saved.state).unwrap();
    let save = Command::SaveSnapshot(SaveSnapshot::default());
    let (code, message) = vmm.refused(save, &[state.as_fd(), small_file().as_fd()]);
    assert_eq!(code, Code::Resource);
    assert!(message.contains("No space left"), "{message}");
    assert_eq!(saved.state().len(), 0, "what is half written is no snapshot");

    vmm.ok(Command::Resume(Resume {}), &[]);
    text += &read(&mut serial, 30);
    vmm.ok(Command::Pause(Pause {}), &[]);
    saved.save(&mut vmm).unwrap();
    text += &drain(&mut serial);
    let (_clone, mut serial) = saved.cloned(machine(1, MEMORY));
    assert_alphabet(&(text + &read(&mut serial, 30)));
}

#[test]
fn files_that_cannot_be_written_to_anywhere_are_refused() {
    let (_, saved, mut vmm) = saved_letters();
    let append = File::options().append(true).open(&saved.memory).unwrap();
    let (read_only, write) = (File::open(&saved.state).unwrap(), file(b""));
    let save = || Command::SaveSnapshot(SaveSnapshot::default());
    for (state, memory, named) in [(&read_only, &write, "state"), (&write, &append, "memory")] {
        let (code, message) = vmm.refused(save(), &[state.as_fd(), memory.as_fd()]);
        assert_eq!(code, Code::Invalid);
        assert!(message.contains(named), "{message}");
    }
    saved.load(&mut reserved(machine(1, MEMORY))).unwrap();
}

#[test]
fn a_vmm_that_is_killed_while_saving_leaves_nothing_that_is_taken_for_a_snapshot() {
    let (_, saved, mut vmm) = saved_letters();
    let write = |path| File::options().write(true).open(path).unwrap();
    let request = Request {
        id: 99,
        command: Some(Command::SaveSnapshot(SaveSnapshot::default())),
    };
    let fds = [write(&saved.state), write(&saved.memory)];
    vmm.connection.send(
        &prost::Message::encode_to_vec(&request),
        &[fds[0].as_fd(), fds[1].as_fd()],
    );
    vmm.kill();
    // However far it came: all of it, or nothing.
    let mut clone = reserved(machine(1, MEMORY));
    if let Err(error) = saved.load(&mut clone) {
        assert_eq!(error.code(), Code::Resource, "{}", error.message);
    }
    let (mut other, _serial) = Vmm::running(&letters());
    other.ok(Command::Pause(Pause {}), &[]);
    saved.save(&mut other).unwrap();
    saved.load(&mut reserved(machine(1, MEMORY))).unwrap();
}

#[test]
fn a_memory_file_that_was_half_written_is_refused() {
    let (_, saved, _vmm) = saved_letters();
    // As it is when a process dies: the right length, the pages so far, no last page.
    let memory = File::options().write(true).open(&saved.memory).unwrap();
    memory.write_all_at(&[0; 4096], MEMORY).unwrap();
    let error = saved.load(&mut reserved(machine(1, MEMORY))).unwrap_err();
    assert!(error.message.contains("last page"), "{}", error.message);
}
