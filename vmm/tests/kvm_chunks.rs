//! Image disks of a whole, jailed VMM that lack a chunk: read by guests of a few instructions on the real /dev/kvm.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use common::driver::*;
use common::{Vmm, file, guest, machine};
use flint_api::vmm::request::Command;
use flint_api::vmm::*;
use flint_snapshots::chunk::{Chunk, ChunkId};
use flint_snapshots::device::{PackLocation, Table};
use flint_snapshots::image;
use flint_vmm::control::packet::{self, Received};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use prost::Message;

const LENGTH: u32 = 4096;

/// The disk's one chunk, whose second sector ends with "last".
fn content() -> Vec<u8> {
    let mut content = vec![0x11; LENGTH as usize];
    content[1020..1024].copy_from_slice(b"last");
    content
}

/// Device table of a disk whose one chunk is not on this host.
fn table() -> File {
    let id = ChunkId::of(&content());
    let image = image::Image::of_pieces(LENGTH.into(), &[(0, Chunk { id, len: LENGTH })]);
    file(
        Table::build(&image, |_| Some(PackLocation::absent(LENGTH)))
            .unwrap()
            .as_bytes(),
    )
}

fn pair() -> (OwnedFd, OwnedFd) {
    socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC).unwrap()
}

fn bind(deadline_ms: u32) -> Command {
    Command::BindDisk(BindDisk {
        slot: 0,
        source: Some(bind_disk::Source::Image(ImageDevice {
            chunks: Some(ChunkServer { deadline_ms }),
        })),
        rate_limit: None,
    })
}

/// A VMM whose guest reads the second sector, and prints status and the sector's last word; and our end of its connection.
fn reading(deadline_ms: u32) -> (Vmm, UnixStream, OwnedFd) {
    let code = [drive(1), interrupts_and_notify(1)].concat();
    let handler = [print_word(BLOCK_STATUS), print_word(IN + 508), poweroff()];
    let mut image = Image::new(&code, &handler.concat());
    image.put(OUT + 8, &1u64.to_le_bytes());
    image.put(BLOCK_STATUS, &[0xff; 4]);
    image.ring(
        0,
        &[(OUT, 16, NEXT), (IN, 512, NEXT | WRITE), (BLOCK_STATUS, 1, WRITE)],
        &[0],
    );
    let slot = DiskSlot {
        read_only: true,
        ..disk_slot()
    };
    let (mut vmm, serial) = Vmm::with_machine(CreateMachine {
        disks: vec![slot],
        ..machine(1, 16 << 20)
    });
    let (server, theirs) = pair();
    vmm.ok(bind(deadline_ms), &[table().as_fd(), theirs.as_fd()]);
    vmm.load(&guest::elf(&image.0));
    vmm.ok(Command::Start(Start {}), &[]);
    (vmm, serial, server)
}

fn await_question(server: &OwnedFd) {
    let Received::Packet { bytes, .. } = packet::receive(server.as_fd()).unwrap() else {
        panic!("no question")
    };
    assert_eq!(
        ChunkWanted::decode(&bytes[..]).unwrap().id,
        ChunkId::of(&content()).as_bytes()
    );
}

fn answer(server: &OwnedFd, bytes: &[u8]) {
    let answer = ChunkAnswer {
        id: ChunkId::of(&content()).as_bytes().to_vec(),
        result: Some(chunk_answer::Result::Place(ChunkPlace {
            pack: 1,
            offset: 0,
            stored_length: LENGTH,
            length: LENGTH,
        })),
    };
    let file = file(bytes);
    let fds: [BorrowedFd<'_>; 1] = [file.as_fd()];
    packet::send(server.as_fd(), &answer.encode_to_vec(), &fds).unwrap();
}

const GOOD: u32 = 0xffff_ff00;
const FAILED: u32 = 0xffff_ff01;

#[test]
fn a_guest_reads_a_chunk_that_is_brought_while_it_waits() {
    let (mut vmm, mut serial, server) = reading(600_000);
    await_question(&server);
    answer(&server, &content());
    let [status, data] = words(&mut serial);
    assert_eq!((status, data.to_le_bytes()), (GOOD, *b"last"));
    assert_eq!(vmm.end().reason(), ExitReason::Poweroff);
}

#[test]
fn a_read_outlives_flintd() {
    let (mut vmm, mut serial, server) = reading(600_000);
    await_question(&server);
    drop(server);
    // It waits, and what is asked of the VMM meanwhile is done.
    vmm.ok(Command::Pause(Pause {}), &[]);
    vmm.ok(Command::Resume(Resume {}), &[]);
    let (server, theirs) = pair();
    vmm.ok(Command::ServeChunks(ServeChunks { slot: 0 }), &[theirs.as_fd()]);
    await_question(&server);
    answer(&server, &content());
    let [status, data] = words(&mut serial);
    assert_eq!((status, data.to_le_bytes()), (GOOD, *b"last"));
    assert_eq!(vmm.end().reason(), ExitReason::Poweroff);
}

#[test]
fn a_chunk_that_nobody_brings_or_that_is_another_is_a_read_error() {
    let (mut vmm, mut serial, _silent) = reading(100);
    let [status, data] = words(&mut serial);
    assert_eq!((status, data), (FAILED, 0));
    assert_eq!(vmm.end().reason(), ExitReason::Poweroff);

    let (mut vmm, mut serial, server) = reading(600_000);
    await_question(&server);
    let mut other = content();
    other[0] ^= 1;
    answer(&server, &other);
    let [status, data] = words(&mut serial);
    assert_eq!((status, data), (FAILED, 0));
    assert_eq!(vmm.end().reason(), ExitReason::Poweroff);
}

#[test]
fn connections_to_chunk_servers_are_checked() {
    let (mut vmm, _serial) = Vmm::with_machine(CreateMachine {
        disks: vec![DiskSlot {
            read_only: true,
            ..disk_slot()
        }],
        ..machine(1, 16 << 20)
    });
    let (_server, theirs) = pair();
    let serve = |slot| Command::ServeChunks(ServeChunks { slot });
    let (code, message) = vmm.refused(serve(0), &[theirs.as_fd()]);
    assert!(message.contains("no image with a chunk server"), "{code:?}: {message}");
    assert_eq!(vmm.refused(serve(9), &[theirs.as_fd()]).0, error::Code::Invalid);
    assert_eq!(vmm.refused(serve(0), &[]).0, error::Code::Invalid);
    assert_eq!(
        vmm.refused(bind(0), &[table().as_fd(), theirs.as_fd()]).0,
        error::Code::Invalid
    );
    assert_eq!(vmm.refused(bind(1000), &[table().as_fd()]).0, error::Code::Invalid);
    vmm.ok(bind(1000), &[table().as_fd(), theirs.as_fd()]);
    vmm.ok(serve(0), &[pair().0.as_fd()]);
}
