//! What clones use of their memory: recorded of one, replayed into others.

#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::fs::{self, File};
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;

use common::alphabet::jump_back;
use common::saved::{Saved, claim, pause_and_save};
use common::*;
use flint_api::vmm::request::Command;
use flint_api::vmm::*;
use flint_vmm::memory::file::Id;
use flint_vmm::memory::pages::{PAGE, Pages};
use flint_vmm::memory::working_set::WorkingSet;

const SIZE: u64 = 16 << 20;
/// What the guest writes in each round, and the page that it reads.
const FIRST: u64 = 0x400;
const COUNT: u64 = 64;
const READ: u64 = 0x800;

/// Writes every second one of its pages, reads one, prints a letter, and does so again.
fn rounds() -> Vec<u8> {
    let mut code = vec![0x48, 0xbb]; // mov rbx, first page
    code.extend((FIRST * PAGE).to_le_bytes());
    code.push(0xb9); // mov ecx, count
    code.extend(u32::try_from(COUNT).unwrap().to_le_bytes());
    code.extend([0xc6, 0x03, 1]); // mov byte [rbx], 1
    code.extend([0x48, 0x81, 0xc3, 0, 0x20, 0, 0]); // add rbx, two pages
    code.extend([0xe2, 0xf4]); // loop to the write
    code.extend([0x8a, 0x04, 0x25]); // mov al, [read]
    code.extend(u32::try_from(READ * PAGE).unwrap().to_le_bytes());
    code.extend(guest::out(0x3f8, b'r'));
    jump_back(&mut code, 0);
    code
}

fn written() -> Pages {
    let mut pages = Pages::default();
    (0..COUNT).for_each(|number| {
        let page = FIRST + 2 * number;
        pages.push(page..page + 1);
    });
    pages
}

/// A snapshot of the guest in the middle of its rounds.
fn template() -> Saved {
    let (mut vmm, mut serial) = Vmm::running(&rounds());
    read(&mut serial, 2);
    pause_and_save(&mut vmm)
}

fn id(saved: &Saved) -> Id {
    saved.id().try_into().unwrap()
}

fn parked(saved: &Saved) -> Vmm {
    saved.parked(machine(1, SIZE))
}

fn record(saved: &Saved, vmm: &mut Vmm) -> (File, WorkingSet) {
    let file = tempfile::tempfile().unwrap();
    vmm.ok(Command::RecordWorkingSet(RecordWorkingSet {}), &[file.as_fd()]);
    let set = WorkingSet::load(&file, &id(saved), SIZE).unwrap();
    (file, set)
}

fn replay(copy_bytes: u64) -> Command {
    Command::ReplayWorkingSet(ReplayWorkingSet { copy_bytes })
}

fn counter(vmm: &mut Vmm, name: &str) -> u64 {
    let state = vmm.call(Command::GetState(GetState {}), &[]).unwrap().unwrap();
    state.counters[name]
}

/// Minor faults that the vCPU's thread has met (proc(5), /proc/PID/stat).
fn faults(vmm: &Vmm) -> u64 {
    let tasks = fs::read_dir(format!("/proc/{}/task", vmm.pid)).unwrap();
    let stats = tasks.map(|task| fs::read_to_string(task.unwrap().path().join("stat")).unwrap());
    let vcpu = stats.filter(|stat| stat.contains("(vcpu0)"));
    let faults = vcpu.map(|stat| {
        stat.rsplit_once(") ")
            .unwrap()
            .1
            .split(' ')
            .nth(7)
            .unwrap()
            .parse::<u64>()
    });
    faults.sum::<Result<u64, _>>().unwrap()
}

/// Lets a clone go on for two whole rounds; how many faults its vCPU meets.
fn go_on(vmm: &mut Vmm) -> (UnixStream, u64) {
    let before = faults(vmm);
    let mut serial = claim(vmm, Claim::default(), &[]);
    read(&mut serial, 2);
    let met = faults(vmm) - before;
    (serial, met)
}

#[test]
fn a_record_has_exactly_what_the_guest_wrote_and_what_it_read() {
    let saved = template();
    let mut vmm = parked(&saved);
    let (_, at_first) = record(&saved, &mut vmm);
    let (_serial, _) = go_on(&mut vmm);
    let (file, set) = record(&saved, &mut vmm);
    assert_eq!(set.written().without(at_first.written()), written());
    assert!(at_first.written().and(&written()).is_empty());
    let it = Pages::run(READ..READ + 1);
    assert_eq!(set.read().and(&it), it);
    assert!(at_first.read().and(&it).is_empty());
    // As long as it is written anew; and paused machines tell as well.
    file.write_all_at(&[1; 40_000], 0).unwrap();
    vmm.ok(Command::Pause(Pause {}), &[]);
    vmm.ok(Command::RecordWorkingSet(RecordWorkingSet {}), &[file.as_fd()]);
    assert_eq!(WorkingSet::load(&file, &id(&saved), SIZE).unwrap(), set);
}

#[test]
fn what_was_replayed_is_there_before_the_first_instruction() {
    let saved = template();
    let mut first = parked(&saved);
    let (_serial, without) = go_on(&mut first);
    let (file, set) = record(&saved, &mut first);
    let mut second = parked(&saved);
    second.ok(replay(SIZE), &[file.as_fd()]);
    let (_, there) = record(&saved, &mut second);
    assert_eq!(there.written(), set.written());
    assert_eq!(set.read().without(there.read()), Pages::default());
    assert_eq!(counter(&mut second, "working_set.copied_bytes"), set.written().bytes());
    assert_eq!(counter(&mut second, "working_set.mapped_bytes"), set.read().bytes());
    let (_serial, with) = go_on(&mut second);
    println!("{without} faults without, {with} with");
    assert!(without >= COUNT, "{without}");
    assert!(with <= COUNT / 8, "{with} of {without}");
}

#[test]
fn only_so_much_is_copied_while_parked_and_the_rest_when_it_goes_on() {
    let saved = template();
    // Pages that this guest never touches; more than one step of them, and beside them some that are only read.
    let pages = Pages::run(0x905..0xa05);
    let file = tempfile::tempfile().unwrap();
    let set = WorkingSet::new(pages.clone(), &Pages::run(0x900..0x905));
    set.write(&file, &id(&saved), SIZE).unwrap();
    let mut vmm = parked(&saved);
    vmm.ok(replay(3 * PAGE), &[file.as_fd()]);
    let (_, there) = record(&saved, &mut vmm);
    assert_eq!(there.written().and(&pages), Pages::run(0x905..0x908));
    assert_eq!(there.read().and(&Pages::run(0x900..0xa05)), Pages::run(0x900..0x905));
    let (mut serial, _) = go_on(&mut vmm);
    // Its rounds tell the time.
    let done = (0..10_000).any(|_| {
        read(&mut serial, 1);
        counter(&mut vmm, "working_set.copied_bytes") == pages.bytes()
    });
    assert!(done);
    let (_, there) = record(&saved, &mut vmm);
    assert_eq!(there.written().and(&pages), pages);
}

#[test]
fn a_record_that_is_damaged_or_of_another_snapshot_is_refused_and_nothing_is_lost() {
    let saved = template();
    let mut vmm = parked(&saved);
    let (file, _) = record(&saved, &mut vmm);
    file.write_all_at(&[0xff], 60).unwrap();
    let (code, message) = vmm.refused(replay(SIZE), &[file.as_fd()]);
    assert_eq!(code, error::Code::Resource, "{message}");
    assert!(message.contains("damaged"), "{message}");
    let set = WorkingSet::new(written(), &Pages::default());
    set.write(&file, &[9; 16], SIZE).unwrap();
    let (code, message) = vmm.refused(replay(SIZE), &[file.as_fd()]);
    assert_eq!(code, error::Code::Resource, "{message}");
    assert!(message.contains("0909"), "{message}");
    assert_eq!(counter(&mut vmm, "working_set.copied_bytes"), 0);
    go_on(&mut vmm);
    let (code, _) = vmm.refused(replay(SIZE), &[file.as_fd()]);
    assert_eq!(code, error::Code::WrongPhase);
}

#[test]
fn a_machine_that_was_not_loaded_has_no_working_set_and_its_memory_file_is_not_written_to() {
    let (mut booted, _serial) = Vmm::running(&rounds());
    let file = tempfile::tempfile().unwrap();
    let ask = Command::RecordWorkingSet(RecordWorkingSet {});
    let (code, message) = booted.refused(ask.clone(), &[file.as_fd()]);
    assert_eq!(code, error::Code::WrongPhase, "{message}");
    let saved = template();
    let mut vmm = parked(&saved);
    let memory = File::options().read(true).write(true).open(&saved.memory).unwrap();
    let (code, message) = vmm.refused(ask.clone(), &[memory.as_fd()]);
    assert_eq!(code, error::Code::Invalid, "{message}");
    let read_only = File::open(&saved.state).unwrap();
    let (code, message) = vmm.refused(ask, &[read_only.as_fd()]);
    assert_eq!(code, error::Code::Invalid, "{message}");
    go_on(&mut vmm);
}
