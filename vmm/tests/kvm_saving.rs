//! Machines that are saved while their guests run, and snapshots that are differences.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::fs::{self, File};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::os::unix::net::UnixStream;

use common::alphabet::{assert_alphabet, drain, letters, read_sectors};
use common::driver::disk_slot;
use common::saved::{Saved, claim, claim_disk, reserved, small_file};
use common::{Connection, Vmm, file, guest, machine, read};
use flint_api::vmm::error::Code;
use flint_api::vmm::request::Command;
use flint_api::vmm::*;
use flint_vmm::memory::file::Trailer;
use flint_vmm::snapshot::Snapshot;
use nix::sys::wait::WaitStatus;
use prost::Message;

const MEMORY: u64 = 64 << 20;
const MIB: u32 = 1 << 20;

// ---- guests

/// Writes a byte into every page of a range.
fn fill(start: u32, length: u32, value: u8) -> Vec<u8> {
    let mut code = vec![0xbf];
    code.extend(start.to_le_bytes());
    code.extend([0xc6, 0x07, value, 0x81, 0xc7, 0, 0x10, 0, 0, 0x81, 0xff]); // page: mov byte [rdi], value; add edi, 4096; cmp edi, end
    code.extend((start + length).to_le_bytes());
    code.extend([0x72, 0xef]); // jb page
    code
}

/// Where [`sweep`] writes.
const SWEPT: std::ops::Range<u32> = 8 * MIB..10 * MIB;

/// Counts in ebx, and writes each number into every page of a range before it goes on to the next number.
fn sweep(pages: std::ops::Range<u32>) -> Vec<u8> {
    let mut code = vec![0x31, 0xdb, 0xff, 0xc3, 0xbf]; // xor ebx, ebx; next: inc ebx; mov edi, start
    code.extend(pages.start.to_le_bytes());
    code.extend([0x89, 0x1f, 0x81, 0xc7, 0, 0x10, 0, 0, 0x81, 0xff]); // page: mov [rdi], ebx; add edi, 4096; cmp edi, end
    code.extend(pages.end.to_le_bytes());
    code.extend([0x72, 0xf0, 0xeb, 0xe7]); // jb page; jmp next
    code
}

/// Looks whether the memory of a guest that sweeps is of one moment, the one in which its registers are.
fn assert_one_moment(saved: &Saved) {
    let state = Snapshot::decode(&saved.state()).unwrap();
    let (count, at) = (state.vcpus[0].regs.rbx, state.vcpus[0].regs.rdi);
    let memory = File::open(&saved.memory).unwrap();
    let found = |page: u32| {
        let mut bytes = [0; 4];
        memory.read_exact_at(&mut bytes, page.into()).unwrap();
        u64::from(u32::from_le_bytes(bytes))
    };
    // Before the next sweep's first page it may have the next number already.
    let ended = at == u64::from(SWEPT.end);
    let count = if ended { found(SWEPT.start) } else { count };
    for page in SWEPT.step_by(4096) {
        let expected = match u64::from(page) {
            page if page < at => [count; 2],
            page if page > at => [count - 1; 2],
            _ => [count, count - 1],
        };
        let found = found(page);
        assert!(
            expected.contains(&found),
            "{page:#x} has {found}; the guest is at {at:#x} with {count}"
        );
    }
}

/// A guest that runs, has filled 12 MiB and said so.
fn busy(then: &[u8]) -> (Vmm, UnixStream) {
    let (mut vmm, mut serial) = Vmm::with_machine(machine(1, MEMORY));
    let code = [fill(16 * MIB, 12 * MIB, 0x77), guest::print("!"), then.to_vec()].concat();
    vmm.load(&guest::elf(&code));
    vmm.ok(Command::Start(Start {}), &[]);
    assert_eq!(read(&mut serial, 1), "!");
    (vmm, serial)
}

fn save(vmm: &mut Vmm) -> (Saved, flint_api::vmm::Saved) {
    let saved = Saved::empty();
    let answer = saved.save_against(None, vmm).unwrap();
    assert_eq!(answer.id, saved.id());
    (saved, answer)
}

fn against(base: Vec<u8>) -> SaveSnapshot {
    SaveSnapshot {
        base,
        ..Default::default()
    }
}

fn with_disk() -> CreateMachine {
    CreateMachine {
        disks: vec![disk_slot()],
        ..machine(1, MEMORY)
    }
}

// ---- while the guest runs

#[test]
fn a_guest_that_runs_is_saved_without_a_gap() {
    let (mut vmm, mut serial) = busy(&letters());
    let mut text = read(&mut serial, 10);
    let (saved, answer) = save(&mut vmm);
    assert_eq!(vmm.phase(), state::Phase::Running);
    assert!(answer.paused_us > 0 && answer.rounds >= 1, "{answer:?}");
    assert!(answer.written_bytes >= 12 << 20, "{answer:?}");
    text += &read(&mut serial, 30);
    assert_alphabet(&text);
    let (_clone, mut serial) = saved.cloned(machine(1, MEMORY));
    let theirs = read(&mut serial, 60);
    assert!(text.contains(&theirs[..10]), "{theirs} goes on somewhere in {text}");
    let from_a = &theirs[theirs.find('a').unwrap()..];
    assert_alphabet(from_a);
}

#[test]
fn what_is_saved_is_one_moment_however_the_guest_writes() {
    let (mut vmm, _serial) = busy(&sweep(SWEPT));
    let mut rewritten = 0;
    for _ in 0..6 {
        let (saved, answer) = save(&mut vmm);
        assert_one_moment(&saved);
        rewritten += answer.written_paused_bytes;
    }
    assert!(
        rewritten > 0,
        "it wrote nothing in the course of a save: this test tests nothing"
    );
}

#[test]
fn a_stream_of_block_requests_goes_on_in_clones_of_a_guest_that_runs() {
    let sectors: Vec<u8> = (b'a'..=b'z').flat_map(|letter| [letter; 512]).collect();
    let disk = file(&sectors);
    let (mut vmm, mut serial) = Vmm::with_machine(with_disk());
    vmm.ok(Command::BindDisk(claim_disk(0).disk.unwrap()), &[disk.as_fd()]);
    // Much to copy behind the rings, so that these change after they were copied.
    vmm.load(&guest::elf(&read_sectors(&fill(16 * MIB, 32 * MIB, 0x77)).0));
    vmm.ok(Command::Start(Start {}), &[]);
    assert_alphabet(&read(&mut serial, 40));
    for _ in 0..5 {
        let (saved, _) = save(&mut vmm);
        let mut clone = saved.parked(with_disk());
        let bound = Claim {
            disks: vec![claim_disk(0)],
            ..Default::default()
        };
        let mut theirs = claim(&mut clone, bound, &[&disk]);
        let text = read(&mut theirs, 60);
        assert_alphabet(&text[text.find('a').unwrap()..]);
        // It has one gap at most in what it prints itself: what this test did not read in time.
        assert_eq!(read(&mut serial, 20).len(), 20);
    }
}

#[test]
fn a_guest_that_is_to_stay_paused_stands_still_where_it_was_saved() {
    let (mut vmm, _serial) = busy(&sweep(SWEPT));
    let stay = SaveSnapshot {
        stay_paused: true,
        ..Default::default()
    };
    let saved = Saved::empty();
    let answer = saved.save_as(stay, &mut vmm).unwrap();
    assert_eq!(vmm.phase(), state::Phase::Paused);
    assert!(answer.paused_us > 0 && answer.rounds >= 1, "{answer:?}");
    assert_one_moment(&saved);
    let again = Saved::of(&mut vmm);
    let size = usize::try_from(MEMORY).unwrap();
    assert!(saved.memory()[..size] == again.memory()[..size], "it went on");
    vmm.ok(Command::Resume(Resume {}), &[]);
    assert_one_moment(&save(&mut vmm).0);
    assert_eq!(vmm.phase(), state::Phase::Running);
}

#[test]
fn requests_wait_until_a_save_has_ended() {
    let (mut vmm, _serial) = busy(&sweep(SWEPT));
    let saved = Saved::empty();
    let files = [&saved.state, &saved.memory].map(|path| File::options().write(true).open(path).unwrap());
    let fds = [files[0].as_fd(), files[1].as_fd()];
    let first = vmm
        .connection
        .begin(Command::SaveSnapshot(SaveSnapshot::default()), &fds);
    let second = vmm.connection.begin(Command::Pause(Pause {}), &[]);
    let answers = [vmm.connection.response(), vmm.connection.response()];
    assert_eq!(answers.map(|answer| answer.id), [first, second]);
    assert_eq!(vmm.phase(), state::Phase::Paused);
    assert_one_moment(&saved);
}

#[test]
fn a_save_goes_on_when_nobody_waits_for_it_any_more() {
    let (mut vmm, _serial) = busy(&sweep(SWEPT));
    let saved = Saved::empty();
    let files = [&saved.state, &saved.memory].map(|path| File::options().write(true).open(path).unwrap());
    let fds = [files[0].as_fd(), files[1].as_fd()];
    vmm.connection
        .begin(Command::SaveSnapshot(SaveSnapshot::default()), &fds);
    vmm.connection = Connection::open(&vmm.folder);
    // Answered by a VMM that has ended the save; the connection gets no answer but its own.
    assert_eq!(vmm.phase(), state::Phase::Running);
    assert_one_moment(&saved);
}

// ---- differences

/// A template of a guest that prints letters, with 12 MiB of something in it.
fn template() -> Saved {
    let (mut vmm, mut serial) = busy(&letters());
    read(&mut serial, 5);
    vmm.ok(Command::Pause(Pause {}), &[]);
    let saved = Saved::of(&mut vmm);
    drain(&mut serial);
    saved
}

fn blocks(saved: &Saved) -> u64 {
    fs::metadata(&saved.memory).unwrap().blocks()
}

/// A clone that has run, is stopped, and saved against a base. Also what it printed.
fn difference(vmm: &mut Vmm, serial: &mut UnixStream, base: &Saved) -> Saved {
    read(serial, 20);
    vmm.ok(Command::Pause(Pause {}), &[]);
    drain(serial);
    let saved = Saved::empty();
    saved.save_against(Some(base), vmm).unwrap();
    saved
}

#[test]
fn a_difference_has_what_changed_and_goes_on_over_its_base() {
    let template = template();
    let (mut clone, mut serial) = template.cloned(machine(1, MEMORY));
    let text = read(&mut serial, 30);
    let saved = Saved::empty();
    let answer = saved.save_against(Some(&template), &mut clone).unwrap();
    assert!(answer.written_bytes < 1 << 20, "{answer:?}");
    assert!(blocks(&saved) * 512 < 1 << 20 && blocks(&template) * 512 > 12 << 20);

    let mut again = saved.parked_over(&[&template], machine(1, MEMORY));
    let mut theirs = claim(&mut again, Claim::default(), &[]);
    let theirs = read(&mut theirs, 40);
    assert_alphabet(&theirs[theirs.find('a').unwrap()..]);
    assert!(!theirs.contains('X'), "{text}, then {theirs}");
}

#[test]
fn a_difference_to_a_difference_goes_on_over_both_or_over_the_first_base() {
    let template = template();
    let (mut clone, mut serial) = template.cloned(machine(1, MEMORY));
    let first = difference(&mut clone, &mut serial, &template);

    let mut second = first.parked_over(&[&template], machine(1, MEMORY));
    let mut serial = claim(&mut second, Claim::default(), &[]);
    let near = difference(&mut second, &mut serial, &first);
    let far = Saved::empty();
    far.save_against(Some(&template), &mut second).unwrap();
    for mut third in [
        near.parked_over(&[&first, &template], machine(1, MEMORY)),
        far.parked_over(&[&template], machine(1, MEMORY)),
    ] {
        let mut serial = claim(&mut third, Claim::default(), &[]);
        let text = read(&mut serial, 60);
        assert_alphabet(&text[text.find('a').unwrap()..]);
    }
}

#[test]
fn save_restore_save_of_a_difference_is_equal_in_every_byte() {
    let template = template();
    let (mut clone, mut serial) = template.cloned(machine(1, MEMORY));
    let first = difference(&mut clone, &mut serial, &template);
    let mut parked = first.parked_over(&[&template], machine(1, MEMORY));
    let again = Saved::empty();
    again.save_against(Some(&template), &mut parked).unwrap();

    let (one, mut other) = [&first, &again]
        .map(|saved| Snapshot::decode(&saved.state()).unwrap())
        .into();
    other.id = one.id;
    assert_eq!(one, other);
    let (one, other) = (first.memory(), again.memory());
    let size = usize::try_from(MEMORY).unwrap();
    assert!(one[..size] == other[..size], "memory differs");
    assert_eq!(one[size + 4096..], other[size + 4096..], "table of pages");
    assert_eq!(blocks(&first), blocks(&again));
    let end = |saved: &Saved| {
        Trailer::read(&File::open(&saved.memory).unwrap(), MEMORY)
            .unwrap()
            .difference
    };
    assert_eq!(end(&first), end(&again));
    assert!(!end(&first).unwrap().pages.is_empty());

    // All of it is all of it, whatever it was loaded from.
    let full = Saved::of(&mut parked);
    let (_alone, mut serial) = full.cloned(machine(1, MEMORY));
    let text = read(&mut serial, 60);
    assert_alphabet(&text[text.find('a').unwrap()..]);
}

#[test]
fn another_base_none_or_too_many_are_refused() {
    let (template, other) = (template(), template());
    let (mut clone, mut serial) = template.cloned(machine(1, MEMORY));
    let saved = difference(&mut clone, &mut serial, &template);
    let mut vmm = reserved(machine(1, MEMORY));
    let mut refused = |bases: &[&Saved]| {
        let error = saved.load_over(bases, &mut vmm).unwrap_err();
        assert_eq!(error.code(), Code::Resource);
        error.message
    };
    let name = |saved: &Saved| saved.id().iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    let wrong = refused(&[&other]);
    assert!(
        wrong.contains(&name(&other)) && wrong.contains(&name(&template)),
        "{wrong}"
    );
    assert!(refused(&[]).contains("has 1 bases, 0 came"));
    assert!(refused(&[&template, &template]).contains("has 1 bases, 2 came"));
    assert!(
        template
            .load_over(&[&other], &mut reserved(machine(1, MEMORY)))
            .unwrap_err()
            .message
            .contains("has 0 bases")
    );
    // A table that was altered.
    let memory = File::options().write(true).open(&saved.memory).unwrap();
    memory.write_all_at(&[0xff], MEMORY + 4096).unwrap();
    assert!(refused(&[&template]).contains("table of pages"));
    memory.set_len(MEMORY + 4096).unwrap();
    assert!(refused(&[&template]).contains("cut off"));
    assert_eq!(vmm.phase(), state::Phase::Reserved);
}

#[test]
fn only_what_a_machine_was_loaded_from_is_a_base() {
    let (template, other) = (template(), template());
    let (mut clone, _serial) = template.cloned(machine(1, MEMORY));
    let saved = Saved::empty();
    let error = saved.save_against(Some(&other), &mut clone).unwrap_err();
    assert_eq!(error.code(), Code::Invalid);
    assert!(
        error.message.contains("was not loaded from snapshot"),
        "{}",
        error.message
    );
    let (mut booted, _serial) = busy(&letters());
    let error = saved.save_against(Some(&other), &mut booted).unwrap_err();
    assert_eq!(error.code(), Code::Invalid);
    let error = clone
        .save(against(vec![1; 3]), &[file(b"").as_fd(), file(b"").as_fd()])
        .unwrap_err();
    assert!(error.message.contains("has 3 bytes"), "{}", error.message);
}

// ---- faults

#[test]
fn a_full_disk_never_stops_the_guest_and_leaves_empty_files() {
    let (mut vmm, mut serial) = busy(&letters());
    let (saved, small) = (Saved::empty(), small_file());
    let state = File::options().write(true).open(&saved.state).unwrap();
    let error = vmm
        .save(SaveSnapshot::default(), &[state.as_fd(), small.as_fd()])
        .unwrap_err();
    assert_eq!(error.code(), Code::Resource);
    assert!(error.message.contains("No space left"), "{}", error.message);
    assert_eq!(
        (state.metadata().unwrap().len(), small.metadata().unwrap().len()),
        (0, 0)
    );
    assert_eq!(vmm.phase(), state::Phase::Running);
    let (saved, _) = save(&mut vmm);
    assert_alphabet(&read(&mut serial, 60));
    let (_clone, mut serial) = saved.cloned(machine(1, MEMORY));
    let text = read(&mut serial, 60);
    assert_alphabet(&text[text.find('a').unwrap()..]);
}

#[test]
fn a_clone_that_is_killed_while_it_is_saved_leaves_its_template_good_and_no_snapshot() {
    let template = template();
    let (state, memory) = (template.state(), template.memory());
    let (mut clone, _serial) = template.cloned(machine(1, MEMORY));
    let saved = Saved::empty();
    let files = [&saved.state, &saved.memory].map(|path| File::options().write(true).open(path).unwrap());
    let fds = [files[0].as_fd(), files[1].as_fd()];
    clone
        .connection
        .begin(Command::SaveSnapshot(SaveSnapshot::default()), &fds);
    clone.kill();
    // However far it came: all of it, or nothing.
    if let Err(error) = saved.load(&mut reserved(machine(1, MEMORY))) {
        assert_eq!(error.code(), Code::Resource, "{}", error.message);
    }
    assert!((template.state(), template.memory()) == (state, memory));
    let (_again, mut serial) = template.cloned(machine(1, MEMORY));
    assert_eq!(read(&mut serial, 10).len(), 10);
}

#[test]
fn a_memory_file_that_is_replaced_in_its_folder_changes_nothing() {
    let template = template();
    let mut parked = template.parked(machine(1, MEMORY));
    let other = template.memory.with_extension("new");
    fs::write(&other, b"something else").unwrap();
    fs::rename(&other, &template.memory).unwrap();
    let mut serial = claim(&mut parked, Claim::default(), &[]);
    let text = read(&mut serial, 60);
    assert_alphabet(&text[text.find('a').unwrap()..]);
}

/// Nobody may do that; if somebody does, the sandbox ends, and says so, and does not hang.
#[test]
fn a_memory_file_that_is_cut_off_while_in_use_ends_the_sandbox() {
    let template = template();
    let mut parked = template.parked(machine(1, MEMORY));
    let (mut running, _serial) = template.cloned(machine(1, MEMORY));
    let file = File::options().write(true).open(&template.memory).unwrap();
    file.set_len(0).unwrap();
    // The VMM writes to guest memory: the generation id.
    parked.connection.begin(Command::Claim(Claim::default()), &[]);
    assert_eq!(parked.wait(), WaitStatus::Exited(parked.pid, 74));
    let exited = fs::read(parked.folder.path().join("exit")).unwrap();
    assert_eq!(Exited::decode(&exited[..]).unwrap().reason(), ExitReason::MemoryLost);
    // A guest without its page tables meets a triple fault; without other pages KVM says that it lacks them.
    let reason = running.end().reason();
    assert!(
        [ExitReason::MemoryLost, ExitReason::TripleFault].contains(&reason),
        "{reason:?}"
    );
}

// ---- figures

/// No limits, which are the benchmark's: what a save of 512 MiB costs, of which a guest has written 64 MiB and goes on to.
#[test]
fn a_save_of_512_mib_is_measured() {
    const SIZE: u64 = 512 << 20;
    let (mut vmm, mut serial) = Vmm::with_machine(machine(1, SIZE));
    let code = [
        fill(128 * MIB, 256 * MIB, 0x77),
        guest::print("!"),
        sweep(16 * MIB..80 * MIB),
    ]
    .concat();
    vmm.load(&guest::elf(&code));
    vmm.ok(Command::Start(Start {}), &[]);
    assert_eq!(read(&mut serial, 1), "!");
    let show = |what: &str, answer: &flint_api::vmm::Saved, took: std::time::Duration| {
        println!(
            "{what}: paused {:.1} ms, {} MiB written, {} of them while paused, {} rounds, {took:.1?} in all",
            answer.paused_us as f64 / 1e3,
            answer.written_bytes >> 20,
            answer.written_paused_bytes >> 20,
            answer.rounds
        );
    };
    let template = Saved::empty();
    let begun = std::time::Instant::now();
    let answer = template.save_against(None, &mut vmm).unwrap();
    show("running, all of it", &answer, begun.elapsed());
    let (mut clone, _serial) = template.cloned(machine(1, SIZE));
    for _ in 0..3 {
        let saved = Saved::empty();
        let begun = std::time::Instant::now();
        let answer = saved.save_against(Some(&template), &mut clone).unwrap();
        show("running, what differs", &answer, begun.elapsed());
    }
    clone.ok(Command::Pause(Pause {}), &[]);
    let saved = Saved::empty();
    let begun = std::time::Instant::now();
    let answer = saved.save_against(Some(&template), &mut clone).unwrap();
    show("paused, what differs", &answer, begun.elapsed());
}
