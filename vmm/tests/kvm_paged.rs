//! Clones whose memory comes page by page, from chunks.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::fs::{self, File};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;

use common::alphabet::{assert_alphabet, drain, letters};
use common::pages::{self, Chunks, memory_file};
use common::saved::{Saved, claim};
use common::{Vmm, guest, machine, read};
use flint_api::vmm::error::Code;
use flint_api::vmm::pages_served::Progress;
use flint_api::vmm::request::Command;
use flint_api::vmm::*;
use flint_vmm::control::packet::{self, Received};
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::Signal;
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, recv, send, socketpair};
use nix::sys::wait::WaitStatus;
use prost::Message;

const MEMORY: u64 = 64 << 20;

/// A guest that prints letters, in a memory with something in every tenth page of 32 MiB.
fn template() -> Saved {
    // mov edi, 16 MiB; page: mov [rdi], edi; add edi, 40960; cmp edi, 48 MiB; jb page
    let fill = [
        0xbf, 0, 0, 0, 1, 0x89, 0x3f, 0x81, 0xc7, 0, 0xa0, 0, 0, 0x81, 0xff, 0, 0, 0, 3, 0x72, 0xf0,
    ];
    let (mut vmm, mut serial) = Vmm::with_machine(machine(1, MEMORY));
    vmm.load(&guest::elf(&[fill.to_vec(), letters()].concat()));
    vmm.ok(Command::Start(Start {}), &[]);
    read(&mut serial, 5);
    vmm.ok(Command::Pause(Pause {}), &[]);
    let saved = Saved::of(&mut vmm);
    drain(&mut serial);
    saved
}

fn assert_goes_on(serial: &mut UnixStream) {
    let text = read(serial, 60);
    assert_alphabet(&text[text.find('a').unwrap()..]);
}

fn seals(memory: &File) -> SealFlag {
    SealFlag::from_bits_retain(fcntl(memory, FcntlArg::F_GET_SEALS).unwrap())
}

fn lost(vmm: &mut Vmm) -> String {
    assert_eq!(vmm.wait(), WaitStatus::Exited(vmm.pid, 74));
    let exited = fs::read(vmm.folder.path().join("exit")).unwrap();
    let exited = Exited::decode(&exited[..]).unwrap();
    assert_eq!(exited.reason(), ExitReason::MemoryLost);
    exited.detail
}

// ---- from chunks

#[test]
fn clones_go_on_with_memory_from_chunks_and_need_no_server_once_all_is_there() {
    let saved = template();
    let chunks = Chunks::of(&saved.memory);
    let mut server = chunks.serve();
    let mut clones = [0; 3].map(|_| {
        let mut vmm = server.parked(&saved, machine(1, MEMORY));
        let serial = claim(&mut vmm, Claim::default(), &[]);
        (vmm, serial)
    });
    for (_, serial) in &mut clones {
        assert_goes_on(serial);
    }
    server.wait_until_all_is_there();
    assert!(seals(&server.memory).contains(SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_WRITE));
    let size = usize::try_from(MEMORY).unwrap() + 4096;
    let mut bytes = vec![0; size];
    server.memory.read_exact_at(&mut bytes, 0).unwrap();
    assert!(bytes == saved.memory(), "the memfd is the memory file");
    // A late one, and then without any server.
    let mut late = server.parked(&saved, machine(1, MEMORY));
    server.kill();
    let mut serial = claim(&mut late, Claim::default(), &[]);
    assert_goes_on(&mut serial);
    for (vmm, serial) in &mut clones {
        assert_eq!(vmm.phase(), state::Phase::Running);
        read(serial, 60);
    }
}

#[test]
fn a_clone_with_paged_memory_is_saved_whole_and_as_a_difference() {
    let saved = template();
    let chunks = Chunks::of(&saved.memory);
    let server = chunks.serve();
    let mut vmm = server.parked(&saved, machine(1, MEMORY));
    // Before all is there.
    let (whole, difference) = (Saved::of(&mut vmm), Saved::empty());
    let size = usize::try_from(MEMORY).unwrap();
    assert!(whole.memory()[..size] == saved.memory()[..size], "memory differs");
    let mut serial = claim(&mut vmm, Claim::default(), &[]);
    read(&mut serial, 30);
    difference.save_against(Some(&saved), &mut vmm).unwrap();
    let mut again = difference.parked_over(&[&saved], machine(1, MEMORY));
    let mut serial = claim(&mut again, Claim::default(), &[]);
    assert_goes_on(&mut serial);
}

// ---- the server's own life

#[test]
fn a_server_ends_when_nobody_can_come_and_nobody_is_left() {
    let saved = template();
    let chunks = Chunks::of(&saved.memory);
    // One that nobody ever needed.
    let mut idle = chunks.serve();
    idle.close_the_door();
    assert_eq!(idle.wait(), WaitStatus::Exited(idle.pid, 0));
    // One whose sandbox came before the door was closed, and loads its memory after that.
    let mut server = chunks.serve();
    let mut vmm = pages::reserved(machine(1, MEMORY));
    let socket = server.connect();
    server.close_the_door();
    pages::load(&saved, &server.memory, &socket, &mut vmm).unwrap();
    drop(socket);
    // It ends with all there, which the sandbox is told before.
    assert_eq!(server.wait(), WaitStatus::Exited(server.pid, 0));
    let mut bytes = vec![0; usize::try_from(MEMORY).unwrap() + 4096];
    server.memory.read_exact_at(&mut bytes, 0).unwrap();
    assert!(bytes == saved.memory(), "the memfd is the memory file");
    let mut serial = claim(&mut vmm, Claim::default(), &[]);
    assert_goes_on(&mut serial);
}

#[test]
fn a_server_ends_with_a_sandbox_that_ends_before_all_is_there() {
    let saved = template();
    let chunks = Chunks::of(&saved.memory);
    let mut server = chunks.serve();
    let socket = server.connect();
    server.close_the_door();
    drop(socket);
    assert_eq!(server.wait(), WaitStatus::Exited(server.pid, 0));
    assert!(!seals(&server.memory).contains(SealFlag::F_SEAL_WRITE), "all is there");
}

#[test]
fn a_server_has_nothing_but_its_descriptors_and_dies_of_opening_a_path() {
    let saved = template();
    let mut server = Chunks::of(&saved.memory).serve();
    let process = format!("/proc/{}", server.pid);
    let status = fs::read_to_string(format!("{process}/status")).unwrap();
    let id = common::UID;
    for line in [
        "CapPrm:\t0000000000000000",
        "CapBnd:\t0000000000000000",
        "NoNewPrivs:\t1",
        "Seccomp:\t2",
        &format!("Uid:\t{id}\t{id}\t{id}\t{id}"),
    ] {
        assert!(status.lines().any(|other| other == line), "{line}: {status}");
    }
    assert_eq!(fs::read_dir(format!("{process}/root/")).unwrap().count(), 0);
    for name in ["user", "mnt", "net", "pid", "ipc", "uts"] {
        let of = |process: &str| fs::read_link(format!("{process}/ns/{name}")).unwrap();
        assert_ne!(of(&process), of("/proc/self"), "{name}");
    }
    pages::make_it_open_a_path(server.pid);
    assert_eq!(server.wait(), WaitStatus::Signaled(server.pid, Signal::SIGSYS, false));
}

// ---- faults

#[test]
fn a_damaged_chunk_ends_the_sandbox_by_its_name_and_never_reaches_the_guest() {
    let saved = template();
    let chunks = Chunks::of(&saved.memory);
    chunks.damage();
    let mut server = chunks.serve();
    let mut vmm = pages::reserved(machine(1, MEMORY));
    // It may be found while the snapshot is being loaded: there is no answer to wait for.
    pages::begin_to_load(&saved, &server.memory, &server.connect(), &mut vmm);
    let detail = lost(&mut vmm);
    assert!(detail.contains("page server") && detail.contains("chunk"), "{detail}");
    assert_eq!(server.wait(), WaitStatus::Exited(server.pid, 1));
}

/// Somebody who says that he serves, and never does: his end of the connection, and the memory file with nothing in it but its
/// last page.
fn idle_server(saved: &Saved) -> (OwnedFd, OwnedFd, File) {
    let flags = SockFlag::SOCK_CLOEXEC;
    let (ours, theirs) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags).unwrap();
    let memory = memory_file(MEMORY + 4096);
    memory
        .write_all_at(&saved.memory()[usize::try_from(MEMORY).unwrap()..], MEMORY)
        .unwrap();
    (ours, theirs, memory)
}

fn say(socket: &OwnedFd, progress: Progress, detail: &str) {
    let message = PagesServed {
        progress: progress.into(),
        detail: detail.to_owned(),
    };
    send(socket.as_raw_fd(), &message.encode_to_vec(), MsgFlags::empty()).unwrap();
}

#[test]
fn a_server_that_goes_ends_the_sandbox_even_while_its_control_thread_waits_for_a_page() {
    let saved = template();
    let (ours, theirs, memory) = idle_server(&saved);
    let mut vmm = pages::reserved(machine(1, MEMORY));
    say(&ours, Progress::Serving, "");
    pages::load(&saved, &memory, &theirs, &mut vmm).unwrap();
    drop(theirs);
    let Ok(Received::Packet { bytes, mut fds }) = packet::receive(ours.as_fd()) else {
        panic!("no introduction")
    };
    assert_eq!(ServePages::decode(&bytes[..]).unwrap().ranges[0].length, MEMORY);
    // The claim writes the generation id into guest memory: it is waited for.
    vmm.connection.begin(Command::Claim(Claim::default()), &[]);
    let uffd = fds.remove(0);
    poll(&mut [PollFd::new(uffd.as_fd(), PollFlags::POLLIN)], PollTimeout::NONE).unwrap();
    drop((ours, uffd));
    assert!(lost(&mut vmm).contains("page server has gone"));
}

#[test]
fn what_a_server_says_of_a_failure_is_told() {
    let saved = template();
    let (ours, theirs, memory) = idle_server(&saved);
    let mut vmm = pages::reserved(machine(1, MEMORY));
    say(&ours, Progress::Serving, "");
    pages::load(&saved, &memory, &theirs, &mut vmm).unwrap();
    say(&ours, Progress::Failed, "the disk is on fire");
    assert!(lost(&mut vmm).contains("the disk is on fire"));
}

#[test]
fn who_does_not_answer_or_answers_nonsense_is_no_server_and_another_can_be_tried() {
    let saved = template();
    let mut vmm = pages::reserved(machine(1, MEMORY));
    let refused = |vmm: &mut Vmm, ours: OwnedFd, theirs: OwnedFd, memory: &File| {
        drop(ours);
        let error = pages::load(&saved, memory, &theirs, vmm).unwrap_err();
        assert_eq!(error.code(), Code::Resource);
        error.message
    };
    let (ours, theirs, memory) = idle_server(&saved);
    let message = refused(&mut vmm, ours, theirs, &memory);
    assert!(message.contains("page server"), "{message}");
    let (ours, theirs, memory) = idle_server(&saved);
    send(ours.as_raw_fd(), &[0xff; 9], MsgFlags::empty()).unwrap();
    let error = pages::load(&saved, &memory, &theirs, &mut vmm).unwrap_err();
    assert!(error.message.contains("page server"), "{}", error.message);
    assert_eq!(vmm.phase(), state::Phase::Reserved);
    let chunks = Chunks::of(&saved.memory);
    let server = chunks.serve();
    pages::load(&saved, &server.memory, &server.connect(), &mut vmm).unwrap();
    let mut serial = claim(&mut vmm, Claim::default(), &[]);
    assert_goes_on(&mut serial);
}

#[test]
fn a_machine_that_was_not_reserved_for_it_takes_no_server() {
    let saved = template();
    let (_ours, theirs, memory) = idle_server(&saved);
    let mut vmm = common::saved::reserved(machine(1, MEMORY));
    let error = pages::load(&saved, &memory, &theirs, &mut vmm).unwrap_err();
    assert_eq!(error.code(), Code::Invalid);
    assert!(error.message.contains("not reserved as paged"), "{}", error.message);
    saved.load(&mut vmm).unwrap();
}

#[test]
fn a_hostile_sandbox_harms_no_other() {
    let saved = template();
    let chunks = Chunks::of(&saved.memory);
    let server = chunks.serve();
    let bad = |bytes: &[u8], fds: &[std::os::fd::BorrowedFd<'_>]| {
        let socket = server.connect();
        packet::send(socket.as_fd(), bytes, fds).unwrap();
        assert_eq!(
            recv(socket.as_raw_fd(), &mut [0; 8], MsgFlags::empty()).unwrap(),
            0,
            "hung up on"
        );
    };
    bad(b"nonsense", &[]);
    let ranges = |range| ServePages { ranges: vec![range] }.encode_to_vec();
    bad(&ranges(PageRange::default()), &[]);
    bad(&ranges(PageRange::default()), &[server.memory.as_fd()]);
    let beyond = PageRange {
        address: u64::MAX - 4095,
        offset: 0,
        length: 1 << 40,
    };
    bad(&ranges(beyond), &[server.memory.as_fd()]);
    let mut vmm = server.parked(&saved, machine(1, MEMORY));
    let mut serial = claim(&mut vmm, Claim::default(), &[]);
    assert_goes_on(&mut serial);
}
