//! The jail as the host sees it, and the cost of a VMM.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::os::fd::{AsFd, FromRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixListener;
use std::{fs, io};

use common::saved::{pause_and_save, reserved};
use common::{UID, Vmm, file, guest, machine, net, read};
use flint_api::vmm::request::Command;
use flint_api::vmm::*;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

fn running() -> Vmm {
    let (mut vmm, mut serial) = Vmm::with_machine(CreateMachine {
        disks: vec![DiskSlot {
            serial: "scratch".into(),
            read_only: false,
            queues: 1,
        }],
        ..machine(2, 64 << 20)
    });
    vmm.load(&guest::elf(&[guest::print("up"), guest::spin()].concat()));
    vmm.ok(Command::Start(Start {}), &[]);
    assert_eq!(read(&mut serial, 2), "up");
    vmm
}

/// What a pod's sandbox has: an image, a scratch disk, network, vsock and entropy, all bound.
fn running_with_every_device(memory: u64) -> Vmm {
    let disk = |serial: &str, read_only| DiskSlot {
        serial: serial.into(),
        read_only,
        queues: 1,
    };
    let (mut vmm, mut serial) = Vmm::with_machine(CreateMachine {
        disks: vec![disk("image-0", true), disk("scratch", false)],
        nets: vec![NetSlot {
            mac: vec![2, 0, 0, 0, 0, 2],
        }],
        vsock: Some(VsockSlot { guest_cid: 3 }),
        rng: true,
        ..machine(1, memory)
    });
    for slot in 0..2 {
        let bind = BindDisk {
            slot,
            source: Some(bind_disk::Source::RawFile(RawFile { direct: false })),
            rate_limit: None,
        };
        vmm.ok(Command::BindDisk(bind), &[file(&[0; 4096]).as_fd()]);
    }
    vmm.ok(Command::BindNet(BindNet::default()), &[net::tap().as_fd()]);
    let listener = UnixListener::bind(vmm.folder.path().join("vsock.sock")).unwrap();
    vmm.ok(Command::BindVsock(BindVsock {}), &[listener.as_fd()]);
    vmm.load(&guest::elf(&[guest::print("up"), guest::spin()].concat()));
    vmm.ok(Command::Start(Start {}), &[]);
    assert_eq!(read(&mut serial, 2), "up");
    vmm
}

fn field<'a>(status: &'a str, name: &str) -> &'a str {
    let line = status.lines().find(|line| line.starts_with(name)).unwrap();
    line.split_once(':').unwrap().1.trim()
}

#[test]
fn a_vmm_has_no_capabilities_and_cannot_get_any() {
    let status = running().proc("status");
    for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
        assert_eq!(u64::from_str_radix(field(&status, set), 16).unwrap(), 0, "{set}");
    }
    assert_eq!(field(&status, "NoNewPrivs"), "1");
    assert_eq!(field(&status, "Uid"), [UID.to_string().as_str(); 4].join("\t"));
    assert_eq!(field(&status, "Groups"), "");
}

#[test]
fn a_vmm_has_an_empty_root() {
    let vmm = running();
    let root = format!("/proc/{}/root/", vmm.pid);
    assert_eq!(fs::read_dir(&root).unwrap().count(), 0);
    assert_eq!(
        fs::read_link(format!("/proc/{}/cwd", vmm.pid)).unwrap(),
        fs::read_link(root.trim_end_matches('/')).unwrap()
    );
    assert_ne!(fs::metadata(&root).unwrap().dev(), fs::metadata("/").unwrap().dev());
    let mounts = vmm.proc("mounts");
    assert_eq!(mounts.lines().count(), 1, "{mounts}");
    assert!(mounts.contains("/ tmpfs ro,"), "{mounts}");
}

#[test]
fn a_vmm_has_namespaces_of_its_own() {
    let vmm = running();
    for name in ["user", "mnt", "net", "pid", "ipc", "uts"] {
        let of = |process: &str| fs::read_link(format!("/proc/{process}/ns/{name}")).unwrap();
        assert_ne!(of(&vmm.pid.to_string()), of("self"), "{name}");
    }
}

#[test]
fn every_thread_is_filtered_and_no_descriptor_is_inherited() {
    let vmm = running();
    let mut names = Vec::new();
    for thread in fs::read_dir(format!("/proc/{}/task", vmm.pid)).unwrap() {
        let status = fs::read_to_string(thread.unwrap().path().join("status")).unwrap();
        let name = field(&status, "Name").to_owned();
        // KVM's own worker, which never leaves the kernel, is shown as a thread of the process.
        if name.starts_with("kvm-") {
            continue;
        }
        assert_eq!(field(&status, "Seccomp"), "2", "{name}");
        assert_eq!(field(&status, "Seccomp_filters"), "2", "{name}");
        names.push(name);
    }
    names.sort();
    assert_eq!(names, ["disk0", "flint-vmm", "vcpu0", "vcpu1"]);
    for entry in fs::read_dir(format!("/proc/{}/fd", vmm.pid)).unwrap() {
        let entry = entry.unwrap();
        let number: u32 = entry.file_name().to_str().unwrap().parse().unwrap();
        let target = fs::read_link(entry.path()).unwrap();
        let target = target.to_string_lossy();
        let ours = ["socket:", "anon_inode:", "/dev/kvm"]
            .iter()
            .any(|kind| target.starts_with(kind))
            || target.ends_with("/exit")
            || target == format!("/{}/pagemap", vmm.pid);
        assert!(number <= 2 || ours, "descriptor {number} is {target}");
    }
}

/// Each thread's name and how many filters it has.
fn filters(vmm: &Vmm) -> Vec<(String, String)> {
    let threads = fs::read_dir(format!("/proc/{}/task", vmm.pid)).unwrap();
    let statuses = threads.map(|thread| fs::read_to_string(thread.unwrap().path().join("status")).unwrap());
    let mut filters: Vec<_> = statuses
        .map(|status| {
            ["Name", "Seccomp_filters"]
                .map(|name| field(&status, name).to_owned())
                .into()
        })
        // KVM's own worker never leaves the kernel.
        .filter(|(name, _): &(String, String)| !name.starts_with("kvm-"))
        .collect();
    filters.sort();
    filters
}

/// A descriptor that is readable when a thread has ended (pidfd_open(2), PIDFD_THREAD: Linux 6.9).
fn pidfd_of_thread(vmm: &Vmm, name: &str) -> OwnedFd {
    let threads = fs::read_dir(format!("/proc/{}/task", vmm.pid)).unwrap();
    let mut threads = threads.map(|thread| thread.unwrap());
    let named = |thread: &fs::DirEntry| fs::read_to_string(thread.path().join("comm")).unwrap().trim() == name;
    let thread = threads.find(named).unwrap().file_name();
    let id: libc::pid_t = thread.to_str().unwrap().parse().unwrap();
    const PIDFD_THREAD: libc::c_int = libc::O_EXCL;
    // SAFETY: takes numbers, makes a descriptor.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, id, PIDFD_THREAD) };
    assert!(fd >= 0, "pidfd_open of a thread: {}", io::Error::last_os_error());
    // SAFETY: it was just made, and is nobody else's.
    unsafe { OwnedFd::from_raw_fd(fd.try_into().unwrap()) }
}

#[test]
fn who_may_set_state_is_gone_from_a_parked_clone() {
    let mut template = running();
    let saved = pause_and_save(&mut template);
    let shape = CreateMachine {
        disks: vec![DiskSlot {
            serial: "scratch".into(),
            read_only: false,
            queues: 1,
        }],
        ..machine(2, 64 << 20)
    };
    let two = |names: &[&str]| {
        names
            .iter()
            .map(|name| ((*name).to_owned(), "2".to_owned()))
            .collect::<Vec<_>>()
    };
    let mut vmm = reserved(shape);
    assert_eq!(filters(&vmm), two(&["disk0", "flint-vmm", "loader", "vcpu0", "vcpu1"]));
    let loader = pidfd_of_thread(&vmm, "loader");
    saved.load(&mut vmm).unwrap();
    let mut ended = [PollFd::new(loader.as_fd(), PollFlags::POLLIN)];
    assert_eq!(poll(&mut ended, PollTimeout::from(10_000_u16)).unwrap(), 1);
    assert_eq!(filters(&vmm), two(&["disk0", "flint-vmm", "vcpu0", "vcpu1"]));
}

#[test]
fn private_memory_beside_the_guests_is_at_most_5_mib() {
    const GUEST: u64 = 64 << 20;
    let vmm = running_with_every_device(GUEST);
    let mut total = 0;
    let mut guests = false;
    for line in vmm.proc("smaps").lines() {
        if let Some((range, _)) = line.split_once(' ').filter(|(first, _)| !first.ends_with(':')) {
            let (start, end) = range.split_once('-').unwrap();
            let bound = |text| u64::from_str_radix(text, 16).unwrap();
            guests = bound(end) - bound(start) == GUEST;
        } else if !guests && (line.starts_with("Private_Dirty:") || line.starts_with("Private_Clean:")) {
            total += line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap();
        }
    }
    println!("private memory beside the guest's: {total} KiB");
    assert!(total > 0 && total <= 5 << 10, "{total} KiB");
}
