//! Mark and sweep: gives back the room of chunks that nothing refers to.

use std::collections::{BTreeMap, HashSet};
use std::fs;
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};

use super::pack::{Pack, RECORD_HEADER_LEN};
use super::{ChunkStore, StoreError, sync_dir};
use crate::chunk::ChunkId;
use crate::device::{PackId, PackLocation};

/// What a sweep did.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Collected {
    /// Chunks that are gone.
    pub chunks: u64,
    /// How much shorter the packs are together.
    pub bytes: u64,
    /// Chunks that lie elsewhere now.
    pub moved: u64,
}

/// What a sweep is going to do.
#[derive(Default)]
struct Plan {
    dead: Vec<ChunkId>,
    /// Packs in which nothing lives.
    empty: Vec<PackId>,
    /// Packs of which at least half is dead.
    sparse: Vec<PackId>,
    /// What lives in those.
    moving: Vec<(ChunkId, PackLocation)>,
}

impl ChunkStore {
    /// Deletes what neither `live` nor a session in progress refers to. A pack of which at least half is dead ends: its
    /// live chunks are copied. Dead chunks in other packs are forgotten, and their room comes back when the pack ends.
    ///
    /// `live` is asked when nobody can put or pin any more until the sweep is done; putting waits that long. Whoever
    /// keeps places of chunks has to look them up again if some have moved; the packs that end are deleted only after
    /// `moved` has returned. If it fails they stay, and the next sweep begins with it.
    ///
    /// # Errors
    /// When files cannot be read or written; nothing that lives is lost.
    pub fn collect<E: From<StoreError>>(
        &self,
        live: impl FnOnce() -> Result<HashSet<ChunkId>, E>,
        moved: impl Fn() -> Result<(), E>,
    ) -> Result<Collected, E> {
        let _shut = self.inner.gate.write().unwrap_or_else(PoisonError::into_inner);
        // So that every chunk is in the index: the sweep need not know of fresh ones.
        self.commit()?;
        let mut live = live()?;
        for session in self
            .inner
            .sessions
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .iter()
        {
            if let Some(pins) = session.upgrade() {
                pins.copy_into(&mut live);
            }
        }
        // Packs that ended in a sweep before are still read by who did not look again.
        let look_again = || -> Result<(), E> {
            if self.inner.moved.load(Ordering::Relaxed) {
                moved()?;
                self.inner.moved.store(false, Ordering::Relaxed);
            }
            Ok(())
        };
        look_again()?;
        let before = self.packed_bytes();
        let plan = self.plan(&live)?;
        self.inner.index.sweep(&plan.dead, &plan.empty, &[], &[])?;
        self.delete(&plan.empty)?;
        let moved = match self.compact(&plan) {
            Ok(places) => {
                look_again()?;
                self.delete(&plan.sparse)?;
                places
            }
            // What was copied so far is dead weight until the next sweep; nothing was lost, and something was won already.
            Err(error) if error.is_disk_full() => {
                tracing::warn!(%error, "packs that are mostly dead stay for now");
                0
            }
            Err(error) => return Err(error.into()),
        };
        let after = self.packed_bytes();
        Ok(Collected {
            chunks: plan.dead.len() as u64,
            bytes: before.saturating_sub(after),
            moved,
        })
    }

    fn packed_bytes(&self) -> u64 {
        self.inner
            .packs
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .values()
            .map(|pack| pack.len())
            .sum()
    }

    fn plan(&self, live: &HashSet<ChunkId>) -> Result<Plan, StoreError> {
        let mut plan = Plan::default();
        let mut living: BTreeMap<PackId, (u64, Vec<(ChunkId, PackLocation)>)> = BTreeMap::new();
        for (id, location) in self.inner.index.chunks()? {
            if live.contains(&id) {
                let (bytes, chunks) = living.entry(location.pack).or_default();
                *bytes += u64::from(location.stored_len) + RECORD_HEADER_LEN;
                chunks.push((id, location));
            } else {
                plan.dead.push(id);
            }
        }
        for pack in self.inner.packs.read().unwrap_or_else(PoisonError::into_inner).values() {
            match living.remove(&pack.id) {
                None => plan.empty.push(pack.id),
                Some((bytes, chunks)) if bytes * 2 <= pack.len() => {
                    plan.sparse.push(pack.id);
                    plan.moving.extend(chunks);
                }
                Some(_) => {}
            }
        }
        Ok(plan)
    }

    /// Copies what lives in sparse packs to the newest one and makes it known; returns how many chunks that were. Bytes are
    /// copied as they are stored: they were checked when they were put, and are again when they are read.
    fn compact(&self, plan: &Plan) -> Result<u64, StoreError> {
        if plan.sparse.is_empty() {
            return Ok(0);
        }
        // Copying gives more room than it takes, so it may use most of the reserve.
        let reserve = self.inner.options.reserve_bytes / 4;
        let mut writer = self.inner.writer();
        writer.allowance = 0;
        writer.active = writer.active.take().filter(|active| !plan.sparse.contains(&active.id));
        let mut places = Vec::with_capacity(plan.moving.len());
        for (id, from) in &plan.moving {
            let pack = self.pack(from.pack).ok_or(StoreError::Missing(*id))?;
            let stored = pack.read_stored(*from)?;
            let to = self
                .inner
                .append_locked(&mut writer, *id, from.raw_len, &stored, reserve)?;
            // The index knows it where it was: it is not fresh.
            writer.fresh.remove(id);
            places.push((*id, to));
        }
        writer.allowance = 0;
        let lengths = writer.sync_dirty()?;
        drop(writer);
        sync_dir(&self.inner.packs_dir)?;
        self.inner.index.sweep(&[], &plan.sparse, &places, &lengths)?;
        self.inner.moved.store(true, Ordering::Relaxed);
        Ok(places.len() as u64)
    }

    fn delete(&self, gone: &[PackId]) -> Result<(), StoreError> {
        if gone.is_empty() {
            return Ok(());
        }
        let mut writer = self.inner.writer();
        writer.active = writer.active.take().filter(|active| !gone.contains(&active.id));
        drop(writer);
        let mut packs = self.inner.packs.write().unwrap_or_else(PoisonError::into_inner);
        for id in gone {
            packs.remove(id);
            let path = Pack::path(&self.inner.packs_dir, *id);
            fs::remove_file(&path).map_err(StoreError::io("deleting", &path))?;
        }
        drop(packs);
        sync_dir(&self.inner.packs_dir)
    }
}

impl super::Writer {
    /// Syncs what a sweep copied and returns the lengths of the packs it went to.
    fn sync_dirty(&mut self) -> Result<Vec<(PackId, u64)>, StoreError> {
        let dirty: Vec<Arc<Pack>> = std::mem::take(&mut self.dirty);
        self.uncommitted = 0;
        for pack in &dirty {
            if let Err(error) = pack.sync() {
                self.give_up(pack, std::iter::empty());
                return Err(error);
            }
        }
        Ok(dirty.iter().map(|pack| (pack.id, pack.len())).collect())
    }
}
