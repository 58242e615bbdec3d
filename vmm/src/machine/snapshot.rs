//! A whole machine into its two files, and out of them.
//!
//! Loading goes from the inside out, because each part may say something to the one before it: interrupt controllers, vCPUs
//! with their local APICs, and then whatever raises interrupts. What cannot be right is refused before anything is touched.

use std::fs::File;
use std::io;

use flint_api::vmm::{CreateMachine, ExitReason};
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use super::{Error, Machine, chipset, host, named};
use crate::control::commands;
use crate::exit::Exit;
use crate::jail::Confine;
use crate::memory::file::{self, PrivateFile};
use crate::memory::{self, MemorySource, Range};
use crate::snapshot::{MachineRecord, RangeRecord, Snapshot};
use crate::vcpu::state::{VcpuState, VcpuTime};
use crate::virtio::core::lock;

/// Where a loaded machine's time stands until it is claimed.
#[derive(Clone, Debug, PartialEq)]
pub struct Time {
    /// kvmclock, in nanoseconds.
    clock: u64,
    /// As it was saved.
    vcpus: Vec<VcpuTime>,
    /// What the vCPUs go on with.
    going_on: Vec<VcpuTime>,
}

impl Machine {
    /// Saves a machine that stands still: memory first, so that a state file that is whole has a memory file that is. `time`
    /// is that of a machine which has not run since it was loaded.
    ///
    /// # Safety
    /// Neither vCPUs nor devices write to guest memory meanwhile.
    ///
    /// # Errors
    /// A file cannot be written, or KVM refuses.
    pub(super) unsafe fn save(&self, state: &File, memory: &File, time: Option<&Time>) -> Result<(), Error> {
        writable(state, "state")?;
        writable(memory, "memory")?;
        let id = random_id().map_err(host("making a snapshot's id"))?;
        let mut snapshot = self.take(id)?;
        if let Some(time) = time {
            snapshot.clock = time.clock;
            for (vcpu, time) in snapshot.vcpus.iter_mut().zip(&time.vcpus) {
                vcpu.time = *time;
            }
        }
        // What is there is no snapshot any more, from before the first byte of its memory goes.
        state.set_len(0).map_err(crate::snapshot::Error::Write)?;
        // SAFETY: the caller's promise.
        unsafe { file::save(&self.memory, &self.plugged()?, memory, id) }.map_err(memory::Error::File)?;
        Ok(snapshot.write(state)?)
    }

    /// Memory that the guest has plugged: the rest of where it could be has no content.
    fn plugged(&self) -> Result<Vec<Range>, Error> {
        let Some(mem) = &self.mem else {
            return Ok(Vec::new());
        };
        let ranges = mem.state().and_then(|state| state.plugged_ranges());
        let ranges = ranges.map_err(|source| named(mem, source))?.into_iter();
        Ok(ranges
            .map(|range| Range {
                start: range.start,
                size: range.end - range.start,
            })
            .collect())
    }

    fn take(&self, id: [u8; 16]) -> Result<Snapshot, Error> {
        let vcpus = self.vcpus.iter().map(|vcpu| vcpu.save(self.host.msrs()));
        let vcpus = vcpus.collect::<Result<Vec<Box<VcpuState>>, _>>()?;
        let names = self.devices().map(|device| device.name().to_owned());
        let devices = self.devices();
        let devices = devices.map(|device| device.save().map_err(|source| named(device, source)));
        Ok(Snapshot {
            id,
            passport: self.host.passport(&vcpus, names.collect()),
            machine: self.record(),
            chipset: chipset::save(&self.vm)?,
            clock: chipset::save_clock(&self.vm)?,
            serial: lock(&self.serial).save(),
            generation: self.generation.save(),
            devices: devices.collect::<Result<_, Error>>()?,
            vcpus,
        })
    }

    fn record(&self) -> MachineRecord {
        let ranges = self.memory.iter().map(|region| {
            let GuestAddress(start) = region.start_addr();
            RangeRecord::from(Range {
                start,
                size: region.len(),
            })
        });
        MachineRecord {
            shape: Some(self.shape.clone()),
            ranges: ranges.collect(),
        }
    }

    /// Loads a snapshot into a machine that has not run.
    pub(super) fn load(&self, state: &File, memory: File) -> Result<Time, Error> {
        let snapshot = Snapshot::read(state)?;
        let khz = self.host.check(&snapshot.passport)?;
        self.fits(&snapshot)?;
        let size = file::size(&self.memory);
        let memory = PrivateFile::open(memory, snapshot.id, size).map_err(memory::Error::File)?;
        memory.fill(&self.memory)?;
        self.set(snapshot, khz)
    }

    /// Looks whether a snapshot is of a machine like this one.
    fn fits(&self, snapshot: &Snapshot) -> Result<(), Error> {
        let ours = self.record();
        let theirs = &snapshot.machine;
        let differ = |what, theirs: String, ours: String| Err(Error::Shape { what, theirs, ours });
        let shapes = theirs.shape.iter().zip(&ours.shape);
        if let Some((what, theirs, ours)) = shapes.filter_map(|(theirs, ours)| difference(theirs, ours)).next() {
            return differ(what, theirs, ours);
        }
        if theirs.shape.is_none() || theirs.ranges != ours.ranges {
            return differ(
                "memory layout",
                format!("{:x?}", theirs.ranges),
                format!("{:x?}", ours.ranges),
            );
        }
        let (saved, there) = (snapshot.vcpus.len(), self.vcpus.len());
        if saved != there {
            return differ("number of saved vCPUs", saved.to_string(), there.to_string());
        }
        let (saved, there) = (snapshot.devices.len(), self.devices().count());
        if saved != there {
            return differ("number of saved devices", saved.to_string(), there.to_string());
        }
        Ok(())
    }

    fn set(&self, snapshot: Snapshot, khz: Option<u32>) -> Result<Time, Error> {
        let time = Time {
            clock: snapshot.clock,
            vcpus: snapshot.vcpus.iter().map(|vcpu| vcpu.time).collect(),
            going_on: snapshot.vcpus.iter().map(|vcpu| vcpu.time_to_go_on()).collect(),
        };
        chipset::restore(&self.vm, &snapshot.chipset)?;
        let restored = self
            .vcpus
            .iter()
            .zip(snapshot.vcpus)
            .map(|(vcpu, state)| vcpu.restore(state, khz));
        // All begin before the first one is waited for.
        for answer in restored.collect::<Result<Vec<_>, _>>()? {
            answer.wait()??;
        }
        for (device, record) in self.devices().zip(&snapshot.devices) {
            device.restore(record).map_err(|source| named(device, source))?;
        }
        lock(&self.serial).restore(&snapshot.serial)?;
        self.generation.restore(&snapshot.generation)?;
        Ok(time)
    }

    /// Takes from the vCPUs' threads what only loading needs.
    pub(super) fn narrow_vcpus(&self, confine: &Confine) -> Result<(), Error> {
        let narrowed = self.vcpus.iter().map(|vcpu| vcpu.narrow(confine.narrow_vcpu()));
        for answer in narrowed.collect::<Result<Vec<_>, _>>()? {
            answer.wait()?.map_err(host("narrowing a vCPU thread's filter"))?;
        }
        Ok(())
    }

    /// Lets a loaded machine go on, its time where it stood.
    pub(super) fn claim(&self, time: &Time) -> Result<(), Error> {
        self.renew_generation()?;
        chipset::restore_clock(&self.vm, time.clock)?;
        let (Some((first, others)), Some((first_time, times))) =
            (self.vcpus.split_first(), time.going_on.split_first())
        else {
            return Ok(());
        };
        // No vCPU may see the time of another that is not right yet. The first one is spared the wait, for it may be alone.
        let set = others.iter().zip(times).map(|(vcpu, time)| vcpu.restore_time(*time));
        for answer in set.collect::<Result<Vec<_>, _>>()? {
            answer.wait()??;
        }
        first.claim(*first_time)?;
        let others = others.iter().try_for_each(|vcpu| Ok(vcpu.run()?));
        // After the vCPUs, on whose way they would be: whatever the guest asks of a device until then, it finds as it begins.
        let begun = others.and_then(|()| {
            self.devices()
                .try_for_each(|device| device.begin().map_err(|source| named(device, source)))
        });
        // The guest runs: there is no way back from here.
        if let Err(error) = begun {
            self.exit.set(Exit::new(ExitReason::VmmError, commands::chain(&error)));
        }
        Ok(())
    }
}

/// The first thing in which two machines differ: its name, and how it is in each.
fn difference(theirs: &CreateMachine, ours: &CreateMachine) -> Option<(&'static str, String, String)> {
    let parts = |machine: &CreateMachine| {
        [
            ("vcpus", machine.vcpus.to_string()),
            ("memory_bytes", machine.memory_bytes.to_string()),
            ("disks", format!("{:?}", machine.disks)),
            ("number of nets", machine.nets.len().to_string()),
            ("vsock", machine.vsock.is_some().to_string()),
            ("rng", machine.rng.to_string()),
            ("hotplug_bytes", machine.hotplug_bytes.to_string()),
            ("balloon", machine.balloon.to_string()),
        ]
    };
    let both = parts(theirs).into_iter().zip(parts(ours));
    let mut different = both.filter(|(theirs, ours)| theirs != ours);
    match different.next() {
        Some(((what, theirs), (_, ours))) => Some((what, theirs, ours)),
        None if theirs != ours => Some(("the set of devices", format!("{theirs:?}"), format!("{ours:?}"))),
        None => None,
    }
}

fn writable(file: &File, name: &'static str) -> Result<(), Error> {
    let flags = fcntl(file, FcntlArg::F_GETFL).map_err(|errno| host("looking at a file")(errno.into()))?;
    let flags = OFlag::from_bits_retain(flags);
    let regular = file.metadata().map_err(host("looking at a file"))?.is_file();
    let writes = flags.intersects(OFlag::O_WRONLY | OFlag::O_RDWR) && !flags.contains(OFlag::O_APPEND);
    if regular && writes {
        Ok(())
    } else {
        Err(Error::Unwritable(name))
    }
}

fn random_id() -> io::Result<[u8; 16]> {
    let mut id = [0; 16];
    // SAFETY: the buffer is ours and as long as we say; so few bytes come whole (getrandom(2)).
    let count = unsafe { libc::getrandom(id.as_mut_ptr().cast(), id.len(), 0) };
    if usize::try_from(count) == Ok(id.len()) {
        Ok(id)
    } else {
        Err(io::Error::last_os_error())
    }
}
