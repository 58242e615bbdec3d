//! Machines that are saved to files, and clones of them.

use std::fs::{self, File};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;

use flint_api::vmm::request::Command;
use flint_api::vmm::{Saved as SavedAnswer, *};
use flint_vmm::snapshot::Snapshot;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use tempfile::TempDir;

use super::Vmm;

/// A snapshot's two files.
pub struct Saved {
    pub folder: TempDir,
    pub state: PathBuf,
    pub memory: PathBuf,
}

impl Saved {
    /// Two empty files.
    pub fn empty() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = |name| {
            let path = folder.path().join(name);
            File::create(&path).unwrap();
            path
        };
        let (state, memory) = (path("state"), path("memory"));
        Self { folder, state, memory }
    }

    /// Saves a machine that stands still.
    pub fn of(vmm: &mut Vmm) -> Self {
        let saved = Self::empty();
        saved.save(vmm).unwrap();
        saved
    }

    pub fn save(&self, vmm: &mut Vmm) -> Result<(), Error> {
        self.save_against(None, vmm).map(drop)
    }

    /// Saves what differs from `base`, or all.
    pub fn save_against(&self, base: Option<&Self>, vmm: &mut Vmm) -> Result<SavedAnswer, Error> {
        let base = base.map(Self::id).unwrap_or_default();
        let how = SaveSnapshot {
            base,
            ..Default::default()
        };
        self.save_as(how, vmm)
    }

    pub fn save_as(&self, how: SaveSnapshot, vmm: &mut Vmm) -> Result<SavedAnswer, Error> {
        let write = |path| File::options().write(true).open(path).unwrap();
        let (state, memory) = (write(&self.state), write(&self.memory));
        vmm.save(how, &[state.as_fd(), memory.as_fd()])
    }

    /// The id in the state file.
    pub fn id(&self) -> Vec<u8> {
        Snapshot::decode(&self.state()).unwrap().id.to_vec()
    }

    /// Loads it, open for reading only.
    pub fn load(&self, vmm: &mut Vmm) -> Result<(), Error> {
        self.load_over(&[], vmm)
    }

    /// Loads it with its bases.
    pub fn load_over(&self, bases: &[&Self], vmm: &mut Vmm) -> Result<(), Error> {
        let mut files = vec![File::open(&self.state).unwrap(), File::open(&self.memory).unwrap()];
        files.extend(bases.iter().map(|base| File::open(&base.memory).unwrap()));
        let fds: Vec<_> = files.iter().map(AsFd::as_fd).collect();
        let loaded = vmm.call(Command::LoadSnapshot(LoadSnapshot::default()), &fds);
        loaded.map(drop)
    }

    /// A parked clone of it with its bases.
    pub fn parked_over(&self, bases: &[&Self], machine: CreateMachine) -> Vmm {
        let mut vmm = reserved(machine);
        self.load_over(bases, &mut vmm).unwrap();
        vmm
    }

    /// A parked clone.
    pub fn parked(&self, machine: CreateMachine) -> Vmm {
        let mut vmm = reserved(machine);
        self.load(&mut vmm).unwrap();
        vmm
    }

    /// A clone that goes on, and its serial line.
    pub fn cloned(&self, machine: CreateMachine) -> (Vmm, UnixStream) {
        let mut vmm = self.parked(machine);
        let serial = claim(&mut vmm, Claim::default(), &[]);
        (vmm, serial)
    }

    pub fn state(&self) -> Vec<u8> {
        fs::read(&self.state).unwrap()
    }

    pub fn memory(&self) -> Vec<u8> {
        fs::read(&self.memory).unwrap()
    }
}

/// A shell with all that a clone will need.
pub fn reserved(machine: CreateMachine) -> Vmm {
    let mut vmm = Vmm::spawn();
    let machine = Some(machine);
    vmm.ok(Command::ReserveMachine(ReserveMachine { machine, paged: false }), &[]);
    vmm
}

/// Claims a parked clone, with a serial line beside what the claim names.
pub fn claim(vmm: &mut Vmm, claim: Claim, fds: &[&File]) -> UnixStream {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let mut all: Vec<_> = fds.iter().map(|file| file.as_fd()).collect();
    all.push(theirs.as_fd());
    let serial = Some(BindSerial {});
    vmm.ok(Command::Claim(Claim { serial, ..claim }), &all);
    ours
}

/// Stops a running guest and saves it.
pub fn pause_and_save(vmm: &mut Vmm) -> Saved {
    vmm.ok(Command::Pause(Pause {}), &[]);
    Saved::of(vmm)
}

/// A claim of the first disk.
pub fn claim_disk(slot: u32) -> ClaimDisk {
    let source = Some(bind_disk::Source::RawFile(RawFile { direct: false }));
    ClaimDisk {
        disk: Some(BindDisk {
            slot,
            source,
            rate_limit: None,
        }),
        fds: 1,
    }
}

/// A file on a file system of 1 MiB.
pub fn small_file() -> File {
    let folder = tempfile::tempdir().unwrap();
    let nothing: Option<&str> = None;
    mount(nothing, folder.path(), Some("tmpfs"), MsFlags::empty(), Some("size=1m")).unwrap();
    let file = File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .open(folder.path().join("file"));
    // The file system is gone with the file.
    umount2(folder.path(), MntFlags::MNT_DETACH).unwrap();
    file.unwrap()
}
