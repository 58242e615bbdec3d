//! A template of the tiny guest, and sandboxes on their way to being its clones.

use std::cell::RefCell;
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::Duration;

use flint_api::vmm::request::Command;
use flint_api::vmm::{
    BindDisk, BindNet, BindSerial, BindVsock, Claim, ClaimDisk, CreateMachine, DiskSlot, ImageDevice, LoadKernel,
    LoadSnapshot, NetSlot, Pause, RawFile, ReserveMachine, SaveSnapshot, Start, VsockSlot, bind_disk,
};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use tempfile::TempDir;

use super::guest;
use super::tap;
use super::vmm::Vmm;
use crate::Error;

const PATIENCE_MS: u16 = 10_000;
const IMAGES: u32 = 8;
const DISK_BYTES: u64 = 16 << 20;

/// A template, and what its clones get.
pub struct Template {
    program: PathBuf,
    folder: TempDir,
    machine: CreateMachine,
    image: File,
    scratch: File,
    taps: Taps,
}

/// What is around a sandbox whatever becomes of it, and costs the host and not the VMM.
pub struct Outside {
    serial: UnixStream,
    theirs: UnixStream,
    vsock: UnixListener,
    tap: Option<OwnedFd>,
    taps: Taps,
    _folder: TempDir,
}

/// Taps that nobody has now. They are made ahead and kept: making and removing one holds a lock of the kernel that a new network
/// namespace needs, too.
type Taps = Rc<RefCell<Vec<OwnedFd>>>;

/// A sandbox on its way to its first instruction.
pub struct Sandbox {
    vmm: Vmm,
    outside: Outside,
}

impl Template {
    /// Makes one of a machine with so much memory.
    pub fn new(program: &Path, memory_bytes: u64) -> Result<Self, Error> {
        Self::of(program, machine(memory_bytes))
    }

    /// Makes one of this machine.
    pub fn of(program: &Path, machine: CreateMachine) -> Result<Self, Error> {
        let template = Self {
            program: program.to_owned(),
            folder: tempfile::tempdir()?,
            machine,
            image: empty_image()?,
            scratch: scratch()?,
            taps: Taps::default(),
        };
        template.make()?;
        Ok(template)
    }

    fn make(&self) -> Result<(), Error> {
        let mut sandbox = self.spawn(self.outside()?)?;
        let vmm = &mut sandbox.vmm;
        vmm.call(Command::CreateMachine(self.machine.clone()), &[])?;
        let mut kernel = tempfile::tempfile()?;
        kernel.write_all(&guest::kernel())?;
        vmm.call(Command::LoadKernel(LoadKernel::default()), &[kernel.as_fd()])?;
        sandbox.bind()?;
        sandbox.vmm.call(Command::Start(Start {}), &[])?;
        sandbox.told(guest::TEMPLATE)?;
        sandbox.vmm.call(Command::Pause(Pause {}), &[])?;
        let [state, memory] = ["state", "memory"].map(|name| File::create_new(self.folder.path().join(name)));
        let (state, memory) = (state?, memory?);
        let save = Command::SaveSnapshot(SaveSnapshot::default());
        sandbox.vmm.call(save, &[state.as_fd(), memory.as_fd()])
    }

    /// What a sandbox will have around it.
    pub fn outside(&self) -> Result<Outside, Error> {
        let (serial, theirs) = UnixStream::pair()?;
        serial.set_read_timeout(Some(Duration::from_millis(PATIENCE_MS.into())))?;
        let folder = tempfile::tempdir()?;
        let kept = self.taps.borrow_mut().pop();
        Ok(Outside {
            serial,
            theirs,
            vsock: UnixListener::bind(folder.path().join("vsock.sock"))?,
            tap: Some(kept.map_or_else(tap::open, Ok)?),
            taps: Rc::clone(&self.taps),
            _folder: folder,
        })
    }

    /// A process that answers.
    pub fn spawn(&self, outside: Outside) -> Result<Sandbox, Error> {
        let vmm = Vmm::spawn(&self.program)?;
        Ok(Sandbox { vmm, outside })
    }

    /// Makes it a shell: it has a machine that waits for a template.
    pub fn reserve(&self, sandbox: &mut Sandbox) -> Result<(), Error> {
        let machine = Some(self.machine.clone());
        let reserve = Command::ReserveMachine(ReserveMachine {
            machine,
            ..ReserveMachine::default()
        });
        sandbox.vmm.call(reserve, &[])?;
        sandbox.bind()
    }

    /// Makes a shell a parked clone.
    pub fn load(&self, sandbox: &mut Sandbox) -> Result<(), Error> {
        self.begin_load(sandbox)?;
        sandbox.vmm.answer()
    }

    /// The same; whoever wants to know waits for the answer. The claim may follow at once: requests are answered in their order.
    pub fn begin_load(&self, sandbox: &mut Sandbox) -> Result<(), Error> {
        let [state, memory] = ["state", "memory"].map(|name| File::open(self.folder.path().join(name)));
        let (state, memory) = (state?, memory?);
        let load = Command::LoadSnapshot(LoadSnapshot::default());
        sandbox.vmm.begin(load, &[state.as_fd(), memory.as_fd()])
    }

    /// A parked clone from nothing.
    pub fn parked(&self) -> Result<Sandbox, Error> {
        let mut sandbox = self.spawn(self.outside()?)?;
        self.reserve(&mut sandbox)?;
        self.load(&mut sandbox)?;
        Ok(sandbox)
    }

    /// Claims a parked clone, with an image, a scratch disk and a tap; whoever wants to know waits for it.
    pub fn claim(&self, sandbox: &mut Sandbox) -> Result<(), Error> {
        let disk = |slot, source| ClaimDisk {
            disk: Some(BindDisk {
                slot,
                source: Some(source),
                rate_limit: None,
            }),
            fds: 1,
        };
        let claim = Claim {
            disks: vec![
                disk(0, bind_disk::Source::Image(ImageDevice::default())),
                disk(IMAGES, bind_disk::Source::RawFile(RawFile { direct: false })),
            ],
            nets: vec![BindNet::default()],
            ..Claim::default()
        };
        let files = [self.image.as_fd(), self.scratch.as_fd()].into_iter();
        let fds: Vec<_> = files.chain(sandbox.outside.tap.as_ref().map(OwnedFd::as_fd)).collect();
        sandbox.vmm.begin(Command::Claim(claim), &fds)
    }
}

impl Drop for Outside {
    fn drop(&mut self) {
        self.taps.borrow_mut().extend(self.tap.take());
    }
}

impl Sandbox {
    fn bind(&mut self) -> Result<(), Error> {
        let Self { vmm, outside } = self;
        vmm.call(Command::BindVsock(BindVsock {}), &[outside.vsock.as_fd()])?;
        vmm.call(Command::BindSerial(BindSerial {}), &[outside.theirs.as_fd()])
    }

    /// Waits until the clone writes that it goes on, and for the answers that are still to come.
    pub fn wait(&mut self, answers: u32, now: impl FnOnce()) -> Result<(), Error> {
        let told = self.told(guest::CLONE);
        now();
        // A claim that was refused tells why; then nobody has to be told that its guest is silent.
        (0..answers).try_for_each(|_| self.vmm.answer())?;
        told
    }

    /// Sends a command without descriptors; whoever wants to know waits for its answer.
    pub fn begin(&mut self, command: Command) -> Result<(), Error> {
        self.vmm.begin(command, &[])
    }

    /// Waits for the answer to what was begun.
    pub fn answer(&mut self) -> Result<(), Error> {
        self.vmm.answer()
    }

    /// Of the VMM.
    pub fn pid(&self) -> Option<i32> {
        self.vmm.pid()
    }

    fn told(&mut self, what: u8) -> Result<(), Error> {
        let mut byte = [0];
        let read = self.outside.serial.read_exact(&mut byte);
        read.map_err(|error| format!("the guest does not write to its serial line: {error}"))?;
        if byte == [what] {
            Ok(())
        } else {
            Err(format!("the guest wrote {byte:?} instead of {what}").into())
        }
    }
}

fn scratch() -> Result<File, Error> {
    let disk = tempfile::tempfile()?;
    disk.set_len(DISK_BYTES)?;
    Ok(disk)
}

/// The device table of an image that is all zeros: no packs, no chunks, no extents (flint-snapshots, `device::table`).
fn empty_image() -> Result<File, Error> {
    let mut head = [0; 64];
    head[..8].copy_from_slice(b"FLINTDEV");
    head[8] = 1; // version
    head[16..24].copy_from_slice(&DISK_BYTES.to_le_bytes());
    let mut table = tempfile::tempfile()?;
    table.write_all(&head)?;
    table.write_all(blake3::hash(&head).as_bytes())?;
    table.set_len(4096)?;
    Ok(table)
}

/// Waits until at least one has written; which have.
pub fn ready(sandboxes: &[&mut Sandbox]) -> Result<Vec<bool>, Error> {
    let mut lines: Vec<_> = sandboxes
        .iter()
        .map(|sandbox| PollFd::new(sandbox.outside.serial.as_fd(), PollFlags::POLLIN))
        .collect();
    if poll(&mut lines, PollTimeout::from(PATIENCE_MS))? == 0 {
        return Err(format!("{} clones do not go on", lines.len()).into());
    }
    Ok(lines.iter().map(|line| line.any().unwrap_or_default()).collect())
}

/// A machine with the slots of a pod's.
pub fn machine(memory_bytes: u64) -> CreateMachine {
    let slot = |serial: String, read_only| DiskSlot {
        serial,
        read_only,
        queues: 0,
    };
    CreateMachine {
        vcpus: 1,
        memory_bytes,
        disks: (0..IMAGES)
            .map(|number| slot(format!("image-{number}"), true))
            .chain([slot("scratch".into(), false)])
            .collect(),
        nets: vec![NetSlot {
            mac: vec![2, 0, 0, 0, 0, 1],
        }],
        vsock: Some(VsockSlot { guest_cid: 3 }),
        rng: true,
        ..CreateMachine::default()
    }
}
