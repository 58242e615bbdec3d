//! A machine's life. Each phase is a type of its own, so a step that is not allowed does not compile:
//!
//! ```text
//! Shell --create--> Created --load_kernel, start--> Running --pause--> Paused --save
//!   |                                                ^  |^ ^              |
//!   +--reserve--> Reserved --load--> Parked --claim--+  || +---resume-----+      load: by a thread of its own, the loader
//!                                          \--save      |+--- Saving, step after step
//!                                                       +---save--^
//! ```
//!
//! A step that fails hands the phase back that it began in. Disks, taps and sockets are bound in any phase but the first.

// A failed step hands its phase back by value: it happens at most a few times in a sandbox's life.
#![allow(clippy::result_large_err)]

use std::fs::File;
use std::sync::Arc;

use kvm_ioctls::Kvm;

use super::config::Config;
use super::loader::{Loader, Paging};
use super::saving::{Finished, Live, Next, resume_logged};
use super::snapshot::{LoadRequest, Report, SaveRequest, Time};
use super::{Error, Machine, host};
use crate::acpi;
use crate::boot::{self, Entry};
use crate::dial::Dialer;
use crate::exit::ExitLatch;
use crate::jail::Confine;
use crate::memory::paged::Watcher;
use crate::memory::pagemap::Pagemap;

/// What was opened of the host before the jail.
pub struct HostFiles {
    /// KVM.
    pub kvm: Kvm,
    /// This process's page tables.
    pub pagemap: Pagemap,
    /// The userfaultfd device, if there is one for us.
    pub uffd: Option<File>,
}

/// Before a machine is asked for.
pub struct Shell {
    pub(super) kvm: Kvm,
    pub(super) pagemap: Arc<Pagemap>,
    pub(super) uffd: Option<File>,
    pub(super) exit: ExitLatch,
    pub(super) confine: Confine,
    pub(super) dialer: Dialer,
}

/// All parts are there; nothing has run.
pub struct Created {
    machine: Arc<Machine>,
    entry: Option<Entry>,
}

/// All parts are there, and wait for a snapshot.
pub struct Reserved {
    machine: Arc<Machine>,
    loader: Loader,
}

/// How a machine begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Start {
    /// By a kernel.
    Boot,
    /// By the loading of a snapshot.
    Load,
}

/// A snapshot is loaded: memory is mapped and all state set but for the time, which stands still.
pub struct Parked {
    machine: Arc<Machine>,
    time: Time,
    /// Has nothing left to do. Its thread ends when nobody waits for the machine.
    loader: Option<Loader>,
}

/// The guest runs.
pub struct Running {
    machine: Arc<Machine>,
    loader: Option<Loader>,
}

/// The guest runs, and its memory is being copied.
pub struct Saving {
    machine: Arc<Machine>,
    live: Live,
}

/// What comes of a step of [`Saving`].
pub enum Step {
    /// There is more to do.
    More(Saving),
    /// It has ended, well or not; the guest runs.
    Running(Running, Result<Report, Error>),
    /// It has ended; the guest stands still, because that was asked for or because it cannot go on.
    Paused(Paused, Result<Report, Error>),
}

/// The guest was running and stands still; so do its devices.
pub struct Paused {
    machine: Arc<Machine>,
}

impl Shell {
    /// A process that can make one machine.
    #[must_use]
    pub fn new(host: HostFiles, exit: ExitLatch, confine: Confine, dialer: Dialer) -> Self {
        Self {
            kvm: host.kvm,
            pagemap: Arc::new(host.pagemap),
            uffd: host.uffd,
            exit,
            confine,
            dialer,
        }
    }

    /// Makes VM, memory, vCPUs and devices.
    ///
    /// # Errors
    /// Something cannot be had; what was made is gone again, and the shell can be asked once more.
    pub fn create(self, config: &Config) -> Result<Created, (Self, Error)> {
        match Machine::new(&self, config, Start::Boot) {
            Ok(machine) => Ok(Created {
                machine: Arc::new(machine),
                entry: None,
            }),
            Err(error) => Err((self, error)),
        }
    }

    /// Makes all that a snapshot will be loaded into.
    ///
    /// # Errors
    /// As [`Self::create`].
    pub fn reserve(self, config: &Config, paged: bool) -> Result<Reserved, (Self, Error)> {
        match self.reserved(config, paged) {
            Ok(reserved) => Ok(reserved),
            Err(error) => Err((self, error)),
        }
    }

    fn reserved(&self, config: &Config, paged: bool) -> Result<Reserved, Error> {
        let machine = Arc::new(Machine::new(self, config, Start::Load)?);
        let paging = paged.then(|| self.paging()).transpose()?;
        let loader = Loader::spawn(paging, machine.rehearsal()?, self.confine.loader());
        let loader = loader.map_err(host("starting the thread that loads snapshots"))?;
        Ok(Reserved { machine, loader })
    }

    fn paging(&self) -> Result<Paging, Error> {
        let watcher = Watcher::spawn(self.confine.watcher());
        let device = self.uffd.as_ref().map(File::try_clone).transpose();
        Ok(Paging {
            device: device.map_err(host("sharing the userfaultfd device"))?,
            watcher: watcher.map_err(host("starting the thread that listens to a page server"))?,
        })
    }
}

impl Created {
    /// Puts a kernel into memory; a later one takes its place.
    ///
    /// # Errors
    /// It cannot be used, or does not fit.
    pub fn load_kernel(&mut self, request: boot::Request<'_>) -> Result<(), Error> {
        self.entry = None;
        let entry = boot::load(&self.machine.memory, request)?;
        boot::write_tables(&self.machine.memory, entry)?;
        acpi::write(&self.machine.memory, self.machine.vcpu_count(), &self.machine.windows)?;
        self.machine.generation.begin()?;
        self.entry = Some(entry);
        Ok(())
    }

    /// Lets the first vCPU enter the kernel; the others wait for its start signal.
    ///
    /// # Errors
    /// No kernel is loaded, or KVM refuses the state.
    pub fn start(self) -> Result<Running, (Self, Error)> {
        let outcome = match self.entry {
            Some(entry) => self.machine.enter(entry),
            None => Err(Error::NoKernel),
        };
        match outcome {
            Ok(()) => Ok(Running::from(self.machine)),
            Err(error) => Err((self, error)),
        }
    }
}

impl Reserved {
    /// Loads a snapshot.
    ///
    /// # Errors
    /// It cannot be read, is another host's or another machine's, or KVM refuses what is in it. Nothing has run, and
    /// another one can be loaded.
    pub fn load(self, request: LoadRequest) -> Result<Parked, (Self, Error)> {
        match self.loader.load(&self.machine, request) {
            Ok(time) => Ok(Parked {
                machine: self.machine,
                time,
                loader: Some(self.loader),
            }),
            Err(error) => Err((self, error)),
        }
    }
}

impl Parked {
    /// Lets the guest go on, and its time.
    ///
    /// # Errors
    /// KVM refuses the clock, or a vCPU's thread is gone; nothing has run.
    pub fn claim(self) -> Result<Running, (Self, Error)> {
        match self.machine.claim(&self.time) {
            Ok(()) => Ok(Running {
                machine: self.machine,
                loader: self.loader,
            }),
            Err(error) => Err((self, error)),
        }
    }

    /// Saves the machine, whose time is still the loaded one.
    ///
    /// # Errors
    /// A file cannot be written, or KVM refuses.
    pub fn save(&self, request: SaveRequest) -> Result<Report, Error> {
        self.machine.save(request, Some(&self.time))
    }

    /// Lets the loader go, if it is still there.
    pub fn settle(&mut self) {
        self.loader = None;
    }

    /// Makes present what other clones have used, of which so many bytes may be copied before the claim.
    ///
    /// # Errors
    /// The record is damaged or another snapshot's; nothing is lost.
    pub fn replay(&self, record: &File, copy_bytes: u64) -> Result<(), Error> {
        self.machine.replay_working_set(record, copy_bytes)
    }
}

impl From<Arc<Machine>> for Running {
    fn from(machine: Arc<Machine>) -> Self {
        let loader = None;
        Self { machine, loader }
    }
}

impl Running {
    /// Whether it was claimed so soon that the loader is still there.
    #[must_use]
    pub fn is_unsettled(&self) -> bool {
        self.loader.is_some()
    }

    /// Lets the loader go, if it is still there.
    pub fn settle(&mut self) {
        self.loader = None;
    }

    /// Stops vCPUs, then devices.
    ///
    /// # Errors
    /// A device cannot come to rest; the guest runs on.
    pub fn pause(self) -> Result<Paused, (Self, Error)> {
        match self.machine.pause() {
            Ok(()) => Ok(Paused { machine: self.machine }),
            Err(error) => {
                // If that fails too, both failures have the same cause; the first tells it.
                let _ = self.machine.resume();
                Err((self, error))
            }
        }
    }

    /// Lets the guest start more vCPUs.
    ///
    /// # Errors
    /// There are not so many, or a thread is gone.
    pub fn use_vcpus(&self, count: u32) -> Result<(), Error> {
        self.machine.use_vcpus(count)
    }

    /// Whether there is memory to be copied that the guest is about to write.
    #[must_use]
    pub fn has_copies(&self) -> bool {
        self.machine.has_copies()
    }

    /// Copies some of it.
    pub fn copy_some(&self) {
        self.machine.copy_some();
    }

    /// Begins to save the machine while the guest goes on.
    ///
    /// # Errors
    /// A file cannot be written, or KVM refuses.
    pub fn save(self, request: SaveRequest) -> Result<Saving, (Self, Error)> {
        match Live::begin(&self.machine, request) {
            Ok(live) => Ok(Saving {
                machine: self.machine,
                live,
            }),
            Err(error) => Err((self, error)),
        }
    }
}

impl Paused {
    /// Lets devices, then vCPUs go on.
    ///
    /// # Errors
    /// A device cannot go on; all stands still.
    pub fn resume(self) -> Result<Running, (Self, Error)> {
        match resume_logged(&self.machine) {
            Ok(()) => Ok(Running::from(self.machine)),
            Err(error) => Err((self, error)),
        }
    }
}

impl Paused {
    /// Saves the machine.
    ///
    /// # Errors
    /// A file cannot be written, or KVM refuses. The guest can be resumed all the same.
    pub fn save(&self, request: SaveRequest) -> Result<Report, Error> {
        self.machine.save(request, None)
    }
}

impl Saving {
    /// Does a part of the work, which takes no longer than a request that is answered at once; the last one stops the guest.
    #[must_use]
    pub fn step(mut self) -> Step {
        let outcome = match self.live.step(&self.machine) {
            Ok(Next::Copy) => return Step::More(self),
            Ok(Next::Stop) => self.live.finish(&self.machine),
            Err(error) => {
                self.live.abandon(&self.machine);
                Finished::Running(Err(error))
            }
        };
        match outcome {
            Finished::Running(saved) => Step::Running(self.machine.into(), saved),
            Finished::Paused(saved) => Step::Paused(Paused { machine: self.machine }, saved),
        }
    }
}

impl AsRef<Machine> for Created {
    fn as_ref(&self) -> &Machine {
        &self.machine
    }
}

impl AsRef<Machine> for Running {
    fn as_ref(&self) -> &Machine {
        &self.machine
    }
}

impl AsRef<Machine> for Saving {
    fn as_ref(&self) -> &Machine {
        &self.machine
    }
}

impl AsRef<Machine> for Paused {
    fn as_ref(&self) -> &Machine {
        &self.machine
    }
}

impl AsRef<Machine> for Reserved {
    fn as_ref(&self) -> &Machine {
        &self.machine
    }
}

impl AsRef<Machine> for Parked {
    fn as_ref(&self) -> &Machine {
        &self.machine
    }
}
