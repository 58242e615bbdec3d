//! What a clone uses of its memory: recorded, and replayed into later ones.
//!
//! ```text
//!  loaded ---------- parked ------------------ claimed -------------- its containers run
//!           replay: map what is read;            copy the rest of         record
//!                   copy as much as is allowed   what is written
//! ```
//!
//! A fault for a page that is only read costs little, because many are mapped at once and all clones share them; what is dear is the
//! first write, which copies. These copies cannot all be made ahead: they are a parked clone's own memory, of which it is to
//! have little. So most are made beside the first instructions, by the control thread while nobody asks it for anything.

use std::fs::File;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use vm_memory::GuestMemoryRegion;

use super::snapshot::writable;
use super::{Error, Machine, host};
use crate::memory::file::Id;
use crate::memory::pages::{PAGE, Pages};
use crate::memory::populate::{self, Access};
use crate::memory::working_set::{self, WorkingSet};
use crate::memory::{self, MemorySource};
use crate::virtio::core::lock;

/// What is copied at once: some tenths of a millisecond, for which a request may have to wait.
const STEP: u64 = (256 << 10) / PAGE;

/// What a machine was given of a working set.
#[derive(Debug, Default)]
pub(super) struct Replayed {
    /// To be copied when the guest runs.
    ahead: Mutex<Pages>,
    mapped: AtomicU64,
    copied: AtomicU64,
}

impl Machine {
    fn snapshot(&self) -> Result<(Arc<dyn MemorySource>, Id), Error> {
        let source = lock(&self.source).clone();
        let id = source.snapshots().first().copied().ok_or(Error::NotLoaded)?;
        Ok((source, id))
    }

    /// Writes down which pages have been used since the machine was loaded.
    ///
    /// # Errors
    /// The machine was not loaded from a snapshot, or the file cannot be written.
    pub fn record_working_set(&self, file: &File) -> Result<(), Error> {
        let (source, id) = self.snapshot()?;
        writable(file, "working set")?;
        if source.uses(file).map_err(host("looking at a file"))? {
            return Err(Error::InUse("working set"));
        }
        let (mut written, mut read) = (Pages::default(), Pages::default());
        self.look_at(&self.places(&[]), |pagemap, address, pages| {
            pagemap.used(address, pages, &mut written, &mut read)
        })?;
        let set = WorkingSet::new(written, &read);
        Ok(set.write(file, &id, memory::size(&self.memory))?)
    }

    /// Makes present what others have used: of what they wrote, so many bytes now, the rest when the guest runs.
    pub(super) fn replay_working_set(&self, file: &File, copy_bytes: u64) -> Result<(), Error> {
        let (source, id) = self.snapshot()?;
        let set = WorkingSet::load(file, &id, memory::size(&self.memory))?;
        // Nothing here may wait for a page server.
        if !source.is_local() {
            return Ok(());
        }
        let mut ahead = set.written().clone();
        let now = ahead.take_first(copy_bytes / PAGE);
        self.copy(&now);
        populate::pages(&self.memory, set.read(), Access::Read);
        self.replayed.mapped.fetch_add(set.read().bytes(), Ordering::Relaxed);
        self.unmap(&ahead)?;
        self.map_for_guest(&now.or(&set.read().without(&ahead)))?;
        *lock(&self.replayed.ahead) = ahead;
        Ok(())
    }

    /// Of pages that are to be copied beside the guest, those must not be mapped that the kernel maps along with their neighbours:
    /// to copy a mapped page is to unmap it first, at which KVM has each fault that the guest is in begin again, wherever that is
    /// (Linux, `mmu_invalidate_retry_gfn`). A guest that meets many such copies gets nowhere until they are over.
    fn unmap(&self, pages: &Pages) -> Result<(), Error> {
        let own = self.own_pages(pages)?;
        populate::forget(&self.memory, &pages.without(&own));
        Ok(())
    }

    /// Whether there is something to be copied for a guest that runs.
    pub(super) fn has_copies(&self) -> bool {
        !lock(&self.replayed.ahead).is_empty()
    }

    /// Copies some of that.
    pub(super) fn copy_some(&self) {
        let some = lock(&self.replayed.ahead).take_first(STEP);
        self.copy(&some);
    }

    fn copy(&self, pages: &Pages) {
        populate::pages(&self.memory, pages, Access::Write);
        self.replayed.copied.fetch_add(pages.bytes(), Ordering::Relaxed);
    }

    /// Has KVM's tables lead to pages that are present, where it can be asked to.
    fn map_for_guest(&self, pages: &Pages) -> Result<(), Error> {
        let Some(first) = self.vcpus.first().filter(|_| self.prefaults) else {
            return Ok(());
        };
        let mut ranges = Vec::new();
        for (number, region) in memory::numbered(&self.memory) {
            let here = pages.and(&Pages::run(number..number + region.len() / PAGE));
            ranges.extend(here.runs().iter().map(|run| memory::Range {
                start: region.start_addr().0 + (run.start - number) * PAGE,
                size: (run.end - run.start) * PAGE,
            }));
        }
        Ok(first.prefault(ranges)?.wait()?)
    }

    /// What was done of a working set, by name.
    pub(super) fn working_set_counters(&self) -> [(String, u64); 2] {
        let Replayed { mapped, copied, .. } = &self.replayed;
        [("mapped", mapped), ("copied", copied)].map(|(name, count)| {
            let name = format!("working_set.{name}_bytes");
            (name, count.load(Ordering::Relaxed))
        })
    }
}

impl From<working_set::Error> for Error {
    fn from(error: working_set::Error) -> Self {
        Self::Memory(error.into())
    }
}
