//! A Linux guest that uses each of its devices, under the filters of their threads: one system call that is not on a thread's
//! list would end the VMM. Needs what `system_linux` needs, and the disks named by FLINT_TEST_IMAGE and FLINT_TEST_SCRATCH.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::fs::{self, File};
use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener};
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::Command as Process;
use std::thread;

use common::linux::{self, named, told};
use common::{Vmm, machine, net};
use flint_api::vmm::request::Command;
use flint_api::vmm::*;

fn every_device() -> CreateMachine {
    let disk = |serial: &str, read_only| DiskSlot {
        serial: serial.into(),
        read_only,
        queues: 1,
    };
    CreateMachine {
        disks: vec![disk("image-0", true), disk("scratch", false)],
        nets: vec![NetSlot {
            mac: vec![2, 0, 0, 0, 0, 2],
        }],
        vsock: Some(VsockSlot { guest_cid: 3 }),
        rng: true,
        ..machine(1, 256 << 20)
    }
}

fn bind_disks(vmm: &mut Vmm) {
    // Each run has a scratch disk of its own.
    let scratch = vmm.folder.path().join("scratch");
    fs::copy(named("FLINT_TEST_SCRATCH"), &scratch).unwrap();
    let image = File::open(named("FLINT_TEST_IMAGE")).unwrap();
    let scratch = File::options().read(true).write(true).open(scratch).unwrap();
    for (slot, file) in [(0, image), (1, scratch)] {
        let disk = BindDisk {
            slot,
            source: Some(bind_disk::Source::RawFile(RawFile { direct: false })),
            rate_limit: None,
        };
        vmm.ok(Command::BindDisk(disk), &[file.as_fd()]);
    }
}

/// Gives the guest a tap, behind which a server sends back what it got.
fn bind_net(vmm: &mut Vmm) {
    let tap = net::tap();
    let address = ["address", "add", "10.9.0.1/24", "dev", net::TAP];
    assert!(Process::new("ip").args(address).status().unwrap().success());
    let listener = TcpListener::bind("10.9.0.1:9000").unwrap();
    thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut bytes = Vec::new();
        stream.read_to_end(&mut bytes).unwrap();
        stream.write_all(&bytes).unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
    });
    vmm.ok(Command::BindNet(BindNet::default()), &[tap.as_fd()]);
}

/// A host program that calls a port where nobody listens: the guest refuses, and the stream ends.
fn call_vsock(vmm: &mut Vmm) -> thread::JoinHandle<Vec<u8>> {
    let path = vmm.folder.path().join("vsock.sock");
    let listener = UnixListener::bind(&path).unwrap();
    vmm.ok(Command::BindVsock(BindVsock {}), &[listener.as_fd()]);
    let mut caller = UnixStream::connect(&path).unwrap();
    thread::spawn(move || {
        caller.write_all(b"CONNECT 1024\n").unwrap();
        let mut answer = Vec::new();
        caller.read_to_end(&mut answer).unwrap();
        answer
    })
}

#[test]
fn linux_uses_every_device() {
    let (mut vmm, serial) = Vmm::with_machine(every_device());
    bind_disks(&mut vmm);
    bind_net(&mut vmm);
    let caller = call_vsock(&mut vmm);
    let (lines, reason) = linux::boot(vmm, serial, "devices");
    for (device, outcome) in [
        ("image", "read"),
        ("scratch", "kept"),
        ("discard", "done"),
        ("rng", "64"),
        ("net", "echoed"),
    ] {
        assert_eq!(told(&lines, device), outcome, "{device}");
    }
    assert_eq!(caller.join().unwrap(), b"", "refused");
    assert_eq!(reason, ExitReason::Reset);
}
