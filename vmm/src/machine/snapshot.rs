//! A whole machine into its two files, and out of them.
//!
//! Loading goes from the inside out, because each part may say something to the one before it: interrupt controllers, vCPUs
//! with their local APICs, and then whatever raises interrupts. One thread does all of it, the loader, and gives the vCPUs to their threads
//! when nothing can fail any more. What cannot be right is refused before anything is touched.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use flint_api::vmm::{CreateMachine, ExitReason};
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use super::devices::{AnyDevice, DeviceRecord};
use super::loader::Paging;
use super::{Error, Machine, chipset, host, named};
use crate::control::commands;
use crate::exit::Exit;
use crate::memory::file::{self, Difference, Id, MAX_RUNS, Trailer};
use crate::memory::mapped::MappedFiles;
use crate::memory::paged::PagedFiles;
use crate::memory::pagemap::Pagemap;
use crate::memory::pages::{PAGE, Pages};
use crate::memory::populate::{self, Access};
use crate::memory::writer::{Over, Writer};
use crate::memory::{self, HOTPLUG_START, MemorySource, Range, Region};
use crate::platform::GENERATION_PAGE;
use crate::snapshot::{MachineRecord, RangeRecord, Snapshot};
use crate::vcpu::first_pages::{self, Place};
use crate::vcpu::state::{VcpuState, VcpuTime};
use crate::vcpu::thread::Vcpu;
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

/// What is to be loaded.
#[derive(Debug)]
pub struct LoadRequest {
    /// The state file.
    pub state: File,
    /// Its memory file, then those of its bases.
    pub memory: Vec<File>,
    /// A connection to whoever fills the last memory file.
    pub server: Option<OwnedFd>,
}

/// What a save is asked for.
#[derive(Debug)]
pub struct SaveRequest {
    /// Where the state goes.
    pub state: File,
    /// Where the memory goes.
    pub memory: File,
    /// The snapshot that the memory file is to be the difference to.
    pub base: Option<Id>,
    /// A guest that ran is to stand still afterwards.
    pub stay_paused: bool,
}

/// What a save came to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// What names the snapshot.
    pub id: Id,
    /// How long the guest stood still, if it ran before; so far, if it still does.
    pub paused: Option<Duration>,
    /// Bytes of guest memory that were written.
    pub written: u64,
    /// Of these, while the guest stood still.
    pub written_paused: u64,
    /// How often the pages were gone through while the guest ran.
    pub rounds: u32,
}

/// Two files in the making.
#[derive(Debug)]
pub(super) struct Save {
    pub(super) id: Id,
    pub(super) memory: Writer,
    state: File,
    base: Option<Base>,
}

#[derive(Debug)]
struct Base {
    /// It and those that it is based on.
    ids: Vec<Id>,
    /// What this machine was loaded with that differs from it.
    loaded: Pages,
}

/// Gaps of so many pages are saved with the runs around them: a mapping costs a clone more than so much of the page cache.
const GAP: u64 = 8;

impl Save {
    /// Looks at what is asked for, and empties both files: what is there is no snapshot any more, from before the first byte of
    /// its memory goes.
    pub(super) fn begin(machine: &Machine, request: SaveRequest) -> Result<Self, Error> {
        let SaveRequest {
            state, memory, base, ..
        } = request;
        writable(&state, "state")?;
        writable(&memory, "memory")?;
        let source = lock(&machine.source).clone();
        for (file, name) in [(&state, "state"), (&memory, "memory")] {
            if source.uses(file).map_err(host("looking at a file"))? {
                return Err(Error::InUse(name));
            }
        }
        let known = source.snapshots();
        let base = base.map(|asked| {
            let place = known.iter().position(|id| *id == asked);
            place
                .zip(source.since(&asked))
                .map(|(place, loaded)| Base {
                    ids: known[place..].to_vec(),
                    loaded,
                })
                .ok_or_else(|| Error::NoBase {
                    asked,
                    known: known.to_vec(),
                })
        });
        let base = base.transpose()?;
        let id = random_id().map_err(host("making a snapshot's id"))?;
        state.set_len(0).map_err(crate::snapshot::Error::Write)?;
        let memory = Writer::begin(memory, &machine.memory).map_err(memory::Error::File)?;
        Ok(Self {
            id,
            memory,
            state,
            base,
        })
    }

    /// The pages that belong into the memory file, as it is now.
    pub(super) fn pages(&self, machine: &Machine, plugged: &[Range]) -> Result<Pages, Error> {
        let places = machine.places(plugged);
        let own = machine.own_pages(&places)?;
        Ok(match &self.base {
            None => own.or(&lock(&machine.source).content().and(&places)),
            Some(base) => own.or(&base.loaded.and(&places)).in_runs(MAX_RUNS, GAP),
        })
    }

    /// Makes the two files a snapshot: `pages` are in the memory file.
    pub(super) fn finish(&self, mut snapshot: Snapshot, pages: Pages, time: Option<&Time>) -> Result<(), Error> {
        if let Some(time) = time {
            snapshot.clock = time.clock;
            for (vcpu, time) in snapshot.vcpus.iter_mut().zip(&time.vcpus) {
                vcpu.time = *time;
            }
        }
        let bases = self.base.iter().flat_map(|base| &base.ids);
        snapshot.machine.bases = bases.map(|id| id.to_vec()).collect();
        let base = self.base.as_ref().and_then(|base| base.ids.first());
        let trailer = Trailer {
            id: self.id,
            difference: base.map(|base| Difference { base: *base, pages }),
        };
        self.memory.finish(&trailer).map_err(memory::Error::File)?;
        Ok(snapshot.write(&self.state)?)
    }

    /// Leaves both files empty.
    pub(super) fn abandon(&self) {
        // A state file that is cut short is no state file, whether this works or not.
        let _ = self.state.set_len(0);
        self.memory.abandon();
    }
}

impl Machine {
    /// Saves a machine that stands still: memory first, so that a state file that is whole has a memory file that is. `time`
    /// is that of a machine which has not run since it was loaded.
    ///
    /// # Errors
    /// A file cannot be written, or KVM refuses.
    pub(super) fn save(&self, request: SaveRequest, time: Option<&Time>) -> Result<Report, Error> {
        let mut save = Save::begin(self, request)?;
        let saved = self.save_all(&mut save, time);
        if saved.is_err() {
            save.abandon();
        }
        saved
    }

    fn save_all(&self, save: &mut Save, time: Option<&Time>) -> Result<Report, Error> {
        // First, because its clocks go on: what copying takes is not to pass for the guest.
        let state = self.take(save.id)?;
        let pages = save.pages(self, &self.plugged()?)?;
        let written = save.memory.copy(&self.memory, &pages, Over::Holes);
        let written = written.map_err(memory::Error::File)?;
        save.finish(state, pages, time)?;
        Ok(Report {
            id: save.id,
            written,
            written_paused: written,
            ..Report::default()
        })
    }

    /// Where there may be something in guest memory. Of what lies from [`HOTPLUG_START`] on this is `plugged` alone: the rest,
    /// which may be a hundred times as much, has no content.
    pub(super) fn places(&self, plugged: &[Range]) -> Pages {
        let mut places = Pages::default();
        for (first, region) in memory::numbered(&self.memory) {
            for (start, end) in parts(region, plugged) {
                places.push(first + start / PAGE..first + end / PAGE);
            }
        }
        places
    }

    /// Of these, the pages that are not as they were loaded, or were read before there was anything in them.
    pub(super) fn own_pages(&self, places: &Pages) -> Result<Pages, Error> {
        let mut own = Pages::default();
        self.look_at(places, |pagemap, address, pages| pagemap.own(address, pages, &mut own))?;
        Ok(own)
    }

    /// Asks the page tables about these pages, run by run: each with the address of its first page.
    pub(super) fn look_at(
        &self,
        places: &Pages,
        mut ask: impl FnMut(&Pagemap, *const u8, std::ops::Range<u64>) -> io::Result<()>,
    ) -> Result<(), Error> {
        for (first, region) in memory::numbered(&self.memory) {
            let here = places.and(&Pages::run(first..first + region.len() / PAGE));
            for run in here.runs() {
                // An offset within a region, which is mapped as a whole.
                let offset = usize::try_from((run.start - first) * PAGE).unwrap_or(0);
                let address = region.as_ptr().wrapping_add(offset);
                let asked = ask(&self.pagemap, address, run.clone());
                asked.map_err(|error| memory::Error::File(file::Error::Pagemap(error)))?;
            }
        }
        Ok(())
    }

    /// Where the guest has plugged memory, or may, as far as can be told while it runs.
    pub(super) fn plugged_somewhere(&self) -> Vec<Range> {
        let plugged = self.memory_state().plugged_bytes > 0;
        let all = memory::hotplug(self.shape.hotplug_bytes);
        all.filter(|_| plugged).into_iter().collect()
    }

    /// Memory that the guest has plugged: the rest of where it could be has no content. The device must be paused.
    pub(super) fn plugged(&self) -> Result<Vec<Range>, Error> {
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

    /// A state file like that which is to be loaded, of one vCPU and no devices: for whoever is to read that soon.
    pub(super) fn rehearsal(&self) -> Result<Vec<u8>, Error> {
        Ok(self.take_core(Id::default(), 1)?.encode())
    }

    pub(super) fn take(&self, id: Id) -> Result<Snapshot, Error> {
        let core = self.take_core(id, self.vcpus.len())?;
        let devices = self.devices();
        let devices = devices.map(|device| device.save().map_err(|source| named(device, source)));
        Ok(Snapshot {
            devices: devices.collect::<Result<_, Error>>()?,
            ..core
        })
    }

    /// Everything but the devices' state, and of so many vCPUs.
    fn take_core(&self, id: Id, vcpus: usize) -> Result<Snapshot, Error> {
        let vcpus = self.vcpus.iter().take(vcpus).map(|vcpu| vcpu.save(self.host.msrs()));
        let vcpus = vcpus.collect::<Result<Vec<Box<VcpuState>>, _>>()?;
        let names = self.devices().map(|device| device.name().to_owned());
        Ok(Snapshot {
            id,
            passport: self.host.passport(&vcpus, names.collect()),
            machine: self.record(),
            chipset: chipset::save(&self.vm)?,
            clock: chipset::save_clock(&self.vm)?,
            serial: lock(&self.serial).save(),
            generation: self.generation.save(),
            devices: Vec::new(),
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
            bases: Vec::new(),
        }
    }

    /// Loads a snapshot into a machine that has not run. What fails leaves memory as it was reserved, for another one.
    pub(super) fn load(&self, request: LoadRequest, paging: Option<&Paging>) -> Result<Time, Error> {
        let LoadRequest { state, memory, server } = request;
        let snapshot = Snapshot::read(&state)?;
        let khz = self.host.check(&snapshot.passport)?;
        self.fits(&snapshot)?;
        let ids = snapshot.machine.files(snapshot.id)?;
        let files = MappedFiles::open(memory, ids, memory::size(&self.memory)).map_err(memory::Error::File)?;
        // Pages that are still to come are waited for by whoever needs them, not here.
        let here = server.is_none();
        let source: Arc<dyn MemorySource> = match server {
            None => Arc::new(files),
            Some(socket) => {
                let (device, watcher) = (paging.and_then(|it| it.device.as_ref()), paging.map(|it| &it.watcher));
                Arc::new(PagedFiles::new(files, socket, device, watcher).map_err(memory::Error::Paged)?)
            }
        };
        let loaded = self.fill_and_restore(&source, &snapshot, khz, here);
        if loaded.is_err() {
            // A hole of the next one's must not show what was in this one.
            memory::clear(&self.memory).map_err(host("giving back the memory of a snapshot that cannot be loaded"))?;
        }
        let time = loaded?;
        *lock(&self.source) = source;
        Ok(time)
    }

    fn fill_and_restore(
        &self,
        source: &Arc<dyn MemorySource>,
        snapshot: &Snapshot,
        khz: Option<u32>,
        here: bool,
    ) -> Result<Time, Error> {
        source.fill(&self.memory)?;
        let time = Time {
            clock: snapshot.clock,
            vcpus: snapshot.vcpus.iter().map(|vcpu| vcpu.time).collect(),
            going_on: snapshot.vcpus.iter().map(|vcpu| vcpu.time_to_go_on()).collect(),
        };
        let places: Vec<_> = snapshot.vcpus.iter().map(|vcpu| Place::from(&**vcpu)).collect();
        for (vcpu, state) in self.vcpus.iter().zip(&snapshot.vcpus) {
            vcpu.hold(state.was_never_started());
        }
        chipset::restore(&self.vm, &snapshot.chipset)?;
        for (vcpu, state) in self.vcpus.iter().zip(&snapshot.vcpus) {
            vcpu.restore(state, khz)?;
        }
        if here {
            places
                .iter()
                .for_each(|place| first_pages::populate(place, &self.memory));
            populate::page(&self.memory, GuestAddress(GENERATION_PAGE), Access::Write);
        }
        self.restore_devices(&snapshot.devices)?;
        self.devices().for_each(AnyDevice::repeat_interrupt);
        lock(&self.serial).restore(&snapshot.serial)?;
        self.generation.restore(&snapshot.generation)?;
        self.vcpus.iter().try_for_each(Vcpu::hand_over)?;
        Ok(time)
    }

    fn restore_devices(&self, records: &[DeviceRecord]) -> Result<(), Error> {
        let mut devices = self.devices().zip(records);
        devices.try_for_each(|(device, record)| device.restore(record).map_err(|source| named(device, source)))
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

    /// Lets a loaded machine go on, its time where it stood.
    pub(super) fn claim(&self, time: &Time) -> Result<(), Error> {
        self.renew_generation()?;
        chipset::restore_clock(&self.vm, time.clock)?;
        let (Some((first, others)), Some((first_time, times))) =
            (self.vcpus.split_first(), time.going_on.split_first())
        else {
            return Ok(());
        };
        // No vCPU may see the time of another that is not right yet. The first one is spared the wait, for it may be alone; those
        // that are held have nothing to do with this.
        let others: Vec<_> = others.iter().zip(times).filter(|(vcpu, _)| !vcpu.is_held()).collect();
        let set = others.iter().map(|(vcpu, time)| vcpu.restore_time(**time));
        for answer in set.collect::<Result<Vec<_>, _>>()? {
            answer.wait()??;
        }
        let mut late = Vec::new();
        for device in self.devices() {
            if !device.begin_idle().map_err(|source| named(device, source))? {
                late.push(device);
            }
        }
        first.claim(*first_time)?;
        let others = others.iter().try_for_each(|(vcpu, _)| Ok(vcpu.run()?));
        // After the vCPUs, on whose way they would be: whatever the guest asks of a device until then, it finds as it begins.
        let begun = others.and_then(|()| {
            late.into_iter()
                .try_for_each(|device| device.begin().map_err(|source| named(device, source)))
        });
        // The guest runs: there is no way back from here.
        if let Err(error) = begun {
            self.exit.set(Exit::new(ExitReason::VmmError, commands::chain(&error)));
        }
        Ok(())
    }
}

/// The parts of a region that have a content, as offsets in it.
fn parts(region: &Region, plugged: &[Range]) -> Vec<(u64, u64)> {
    let (GuestAddress(start), length) = (region.start_addr(), region.len());
    if start < HOTPLUG_START {
        return vec![(0, length)];
    }
    let offset = |address: u64| address.saturating_sub(start).min(length);
    let parts = plugged.iter().map(|range| {
        let end = range.start.saturating_add(range.size);
        (offset(range.start), offset(end))
    });
    parts.filter(|(start, end)| start < end).collect()
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
            ("cpu_level", machine.cpu_level().as_str_name().to_owned()),
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

pub(super) fn writable(file: &File, name: &'static str) -> Result<(), Error> {
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

fn random_id() -> io::Result<Id> {
    let mut id = Id::default();
    // SAFETY: the buffer is ours and as long as we say; so few bytes come whole (getrandom(2)).
    let count = unsafe { libc::getrandom(id.as_mut_ptr().cast(), id.len(), 0) };
    if usize::try_from(count) == Ok(id.len()) {
        Ok(id)
    } else {
        Err(io::Error::last_os_error())
    }
}
