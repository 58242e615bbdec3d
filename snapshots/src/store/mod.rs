//! The chunk store: every chunk of this host, once.
//!
//! ```text
//!  <dir>/
//!    lock                   held by the process that owns the store
//!    packs/00000001.pack    chunks, appended one after the other (see `pack`), up to 256 MiB or so
//!    packs/00000002.pack
//!    index.redb             chunk -> (pack, offset, lengths); pack -> length that is on the disk for sure;
//!                           and what the image store adds: layers, images, references
//!    tables/<digest>        what the VMM reads of each image (see the image store)
//!    accesses/<diff id>     how each layer can be read in part from where it came (see the image store)
//!
//!   put ──> compress ──> append to the newest pack ──> fresh, in memory
//!                                                        │ commit: 1. fdatasync the packs
//!                                                        ▼         2. one transaction of the index
//!                                                      known ──> may be referred to
//! ```
//!
//! # Why a crash does no harm
//! 1. *Data before index.* A chunk gets into the index only after its pack was synced, and the transaction that brings it
//!    also notes how long the pack then was. So whatever the index names is on the disk.
//! 2. *What is past that length is rubbish* that nothing refers to: a torn record, or whole ones that were never committed.
//!    Opening cuts it off; a pack that the index does not know at all is deleted.
//! 3. *The index is one file that changes by transactions* (redb, copy on write, checksummed, synced at commit): after a
//!    crash it is as before or after a transaction. An image becomes visible in the one transaction that also names all
//!    its layers and its references, after all its chunks were committed.
//! 4. *Packs are deleted after* the transaction that no longer needs them. A crash in between leaves a file that the index
//!    does not know: see 2. Who has a pack open (a VMM) keeps reading it.
//! 5. *A lost index* is made again from the packs: each record names itself and is checked against its name.
//!
//! # When is synced
//! Not for each chunk: a crash during a pull costs the pull. Once for each layer and whenever 64 MiB have gathered, so
//! that the disk works while the network does.
//!
//! # What goes away when
//! [`ChunkStore::collect`] marks what the caller says is alive and what a session in progress has put or found, then
//! sweeps: packs without a live chunk are deleted, and those that are mostly dead are copied together.

mod collect;
mod error;
mod examine;
mod index;
mod lock;
mod pack;
mod session;
pub(crate) mod space;

use std::collections::{BTreeMap, HashMap};
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, Weak};

pub use collect::Collected;
pub use error::StoreError;
pub use examine::{Examined, Usage};
pub(crate) use index::Index;
use lock::DirLock;
use pack::Pack;
pub(crate) use pack::{compress, unpack};
use session::Pins;
pub use session::{Session, Sink};

use crate::chunk::{ChunkId, MAX_CHUNK_LEN};
use crate::device::{FoundChunk, PackId, PackLocation};

/// How a store is kept.
#[derive(Debug, Clone)]
pub struct StoreOptions {
    /// A pack that has this many bytes is not appended to any more.
    pub pack_bytes: u64,
    /// What stays free on the disk, so that the index can always be changed and images be removed.
    pub reserve_bytes: u64,
    /// zstd's level for chunks. 3 makes chunks as small as gzip makes a layer, at several hundred MB/s for each core.
    pub zstd_level: i32,
    /// Chunks that have gathered this many bytes are committed.
    pub commit_bytes: u64,
}

impl Default for StoreOptions {
    fn default() -> Self {
        Self {
            pack_bytes: 256 << 20,
            reserve_bytes: 64 << 20,
            zstd_level: 3,
            commit_bytes: 64 << 20,
        }
    }
}

/// The chunk store of a host. Clones are the same store.
#[derive(Clone)]
pub struct ChunkStore {
    inner: Arc<Inner>,
}

struct Inner {
    dir: PathBuf,
    packs_dir: PathBuf,
    options: StoreOptions,
    index: Index,
    packs: RwLock<BTreeMap<PackId, Arc<Pack>>>,
    writer: Mutex<Writer>,
    /// One commit at a time.
    committing: Mutex<()>,
    /// Held for reading from the moment a chunk is pinned until it is found or appended; for writing by a sweep, which
    /// thus sees every pin of a chunk that somebody relies on.
    gate: RwLock<()>,
    sessions: Mutex<Vec<Weak<Pins>>>,
    /// A sweep moved chunks, and those who keep places of chunks have not looked them up again.
    moved: AtomicBool,
    _lock: DirLock,
}

/// What only one thread may do: append.
struct Writer {
    active: Option<Arc<Pack>>,
    next: u32,
    /// Appended, not yet committed.
    fresh: HashMap<ChunkId, PackLocation>,
    /// Packs that were appended to since the last commit.
    dirty: Vec<Arc<Pack>>,
    uncommitted: u64,
    /// Bytes that may be written before the free space is looked at again.
    allowance: u64,
}

/// How often the free space is looked at.
const SPACE_CHECK_BYTES: u64 = 8 << 20;

impl ChunkStore {
    /// Opens the store in `dir`, making it if it is not there, and mends what a crash left.
    ///
    /// # Errors
    /// [`StoreError::Locked`] when another process owns it; otherwise when files cannot be read or written.
    pub fn open(dir: &Path, options: StoreOptions) -> Result<Self, StoreError> {
        let packs_dir = dir.join("packs");
        fs::create_dir_all(&packs_dir).map_err(StoreError::io("creating", &packs_dir))?;
        let lock = DirLock::take(dir)?;
        let (index, fresh_index) = Index::open(dir)?;
        let packs = if fresh_index {
            rebuild(&packs_dir, &index)?
        } else {
            open_packs(&packs_dir, &index)?
        };
        let next = packs.keys().next_back().map_or(1, |id| id.0 + 1);
        let active = packs
            .values()
            .next_back()
            .filter(|pack| pack.len() < options.pack_bytes)
            .cloned();
        let writer = Writer {
            active,
            next,
            fresh: HashMap::new(),
            dirty: Vec::new(),
            uncommitted: 0,
            allowance: 0,
        };
        let inner = Inner {
            dir: dir.to_path_buf(),
            packs_dir,
            options,
            index,
            packs: RwLock::new(packs),
            writer: Mutex::new(writer),
            committing: Mutex::new(()),
            gate: RwLock::new(()),
            sessions: Mutex::new(Vec::new()),
            moved: AtomicBool::new(false),
            _lock: lock,
        };
        Ok(Self { inner: Arc::new(inner) })
    }

    /// The store's folder.
    pub fn dir(&self) -> &Path {
        &self.inner.dir
    }

    pub(crate) fn index(&self) -> &Index {
        &self.inner.index
    }

    /// Where `id` lies, committed or not.
    fn find(&self, id: ChunkId) -> Result<Option<PackLocation>, StoreError> {
        if let Some(location) = self.inner.writer().fresh.get(&id) {
            return Ok(Some(*location));
        }
        self.inner.index.locate(id)
    }

    pub(crate) fn zstd_level(&self) -> i32 {
        self.inner.options.zstd_level
    }

    /// Whether the store has `id`.
    ///
    /// # Errors
    /// When the index cannot be read.
    pub fn contains(&self, id: ChunkId) -> Result<bool, StoreError> {
        self.find(id).map(|found| found.is_some())
    }

    /// The chunk `id`, checked against its name.
    ///
    /// # Errors
    /// [`StoreError::Missing`] and [`StoreError::Damaged`]; when files cannot be read.
    pub fn get(&self, id: ChunkId) -> Result<Vec<u8>, StoreError> {
        let location = self.find(id)?.ok_or(StoreError::Missing(id))?;
        self.pack(location.pack)
            .ok_or(StoreError::Missing(id))?
            .read(id, location)
    }

    /// The chunk `id` as it is stored, checked against its name: itself, or a zstd frame that is shorter.
    ///
    /// # Errors
    /// As [`ChunkStore::get`].
    pub fn get_stored(&self, id: ChunkId) -> Result<Vec<u8>, StoreError> {
        let location = self.find(id)?.ok_or(StoreError::Missing(id))?;
        let pack = self.pack(location.pack).ok_or(StoreError::Missing(id))?;
        pack.read(id, location)?;
        pack.read_stored(location)
    }

    /// Where each of `ids` lies, in the same order. Only what is committed counts.
    ///
    /// # Errors
    /// [`StoreError::Missing`] for the first that is not there; when the index cannot be read.
    pub fn locate(&self, ids: &[ChunkId]) -> Result<Vec<PackLocation>, StoreError> {
        self.inner.index.locate_all(ids)
    }

    /// A pack, opened for reading: it can be read as long as the file is open, whatever becomes of its name.
    ///
    /// # Errors
    /// When the pack is not there or cannot be opened.
    pub fn open_pack(&self, id: PackId) -> Result<File, StoreError> {
        Pack::open_for_readers(&self.inner.packs_dir, id)
    }

    fn pack(&self, id: PackId) -> Option<Arc<Pack>> {
        self.inner
            .packs
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .get(&id)
            .cloned()
    }

    /// Puts `stored` under `id` unless it came in between. The caller holds the gate.
    fn append(&self, id: ChunkId, raw_len: u32, stored: &[u8]) -> Result<PackLocation, StoreError> {
        let inner = &*self.inner;
        let mut writer = inner.writer();
        if let Some(location) = writer.fresh.get(&id) {
            return Ok(*location);
        }
        // Another one may have put and committed it since the caller looked.
        if let Some(location) = inner.index.locate(id)? {
            return Ok(location);
        }
        inner.append_locked(&mut writer, id, raw_len, stored, inner.options.reserve_bytes)
    }

    /// Puts `stored` under `id` unless a copy is there that can be read. The caller holds the gate.
    fn append_unless_good(&self, id: ChunkId, raw_len: u32, stored: &[u8]) -> Result<PackLocation, StoreError> {
        let inner = &*self.inner;
        let mut writer = inner.writer();
        let known = match writer.fresh.get(&id) {
            Some(location) => Some(*location),
            None => inner.index.locate(id)?,
        };
        if let Some(location) = known {
            if self
                .pack(location.pack)
                .is_some_and(|pack| pack.read(id, location).is_ok())
            {
                return Ok(location);
            }
            tracing::warn!(chunk = %id, pack = location.pack.0, "a damaged chunk is replaced");
            // Tables that name the old place are made again before its pack can go.
            inner.moved.store(true, Ordering::Relaxed);
        }
        inner.append_locked(&mut writer, id, raw_len, stored, inner.options.reserve_bytes)
    }

    /// Chunk `id` where it lies, with the pack opened for reading, if the store has it and it is what its name says. It need not
    /// be committed yet: after a crash its place may have something else, which its name tells.
    ///
    /// # Errors
    /// When the index cannot be read.
    pub fn find_good(&self, id: ChunkId) -> Result<Option<FoundChunk>, StoreError> {
        let Some(location) = self.find(id)? else {
            return Ok(None);
        };
        let Some(pack) = self.pack(location.pack) else {
            return Ok(None);
        };
        if let Err(error) = pack.read(id, location) {
            tracing::warn!(%error, "a chunk of the store cannot be read");
            return Ok(None);
        }
        // A sweep may have taken it just now.
        let file = self.open_pack(location.pack).ok();
        Ok(file.map(|file| FoundChunk { file, location }))
    }

    /// Makes all chunks put so far durable and known.
    ///
    /// # Errors
    /// When syncing fails; chunks that may not be on the disk are forgotten, and whoever relied on them fails when it
    /// looks them up. When the index cannot be written; then the next commit tries again.
    pub fn commit(&self) -> Result<(), StoreError> {
        let inner = &*self.inner;
        let _one = inner.committing.lock().unwrap_or_else(PoisonError::into_inner);
        let (chunks, packs) = inner.writer().take_dirty();
        for (at, (pack, _)) in packs.iter().enumerate() {
            if let Err(error) = pack.sync() {
                inner
                    .writer()
                    .give_up(pack, packs[at + 1..].iter().map(|(pack, _)| pack));
                return Err(error);
            }
        }
        if chunks.is_empty() {
            return Ok(());
        }
        sync_dir(&inner.packs_dir)?;
        let lengths: Vec<_> = packs.iter().map(|(pack, len)| (pack.id, *len)).collect();
        if let Err(error) = inner.index.add(&chunks, &lengths) {
            inner.writer().dirty.extend(packs.into_iter().map(|(pack, _)| pack));
            return Err(error);
        }
        let mut writer = inner.writer();
        for (id, _) in &chunks {
            writer.fresh.remove(id);
        }
        Ok(())
    }

    fn commit_if_much(&self) -> Result<(), StoreError> {
        let much = self.inner.writer().uncommitted >= self.inner.options.commit_bytes;
        if much { self.commit() } else { Ok(()) }
    }
}

impl Inner {
    fn writer(&self) -> MutexGuard<'_, Writer> {
        // What a panic in between could leave is at worst a chunk that was appended and is not listed: dead bytes.
        self.writer.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn append_locked(
        &self,
        writer: &mut Writer,
        id: ChunkId,
        raw_len: u32,
        stored: &[u8],
        reserve: u64,
    ) -> Result<PackLocation, StoreError> {
        let size = stored.len() as u64 + pack::RECORD_HEADER_LEN;
        self.check_space(writer, size, reserve)?;
        let pack = self.active_pack(writer)?;
        let location = pack.append(id, raw_len, stored)?;
        if !writer.dirty.iter().any(|dirty| dirty.id == pack.id) {
            writer.dirty.push(pack);
        }
        writer.fresh.insert(id, location);
        writer.uncommitted += size;
        writer.allowance = writer.allowance.saturating_sub(size);
        Ok(location)
    }

    /// Whether `size` bytes can be written such that `reserve` stay free.
    fn check_space(&self, writer: &mut Writer, size: u64, reserve: u64) -> Result<(), StoreError> {
        if writer.allowance >= size {
            return Ok(());
        }
        let free = space::free(&self.packs_dir).map_err(StoreError::io("examining", &self.packs_dir))?;
        let room = free.saturating_sub(reserve);
        if room < size {
            return Err(StoreError::DiskFull {
                dir: self.dir.clone(),
                free,
                needed: Some(size + reserve),
            });
        }
        writer.allowance = room.min(SPACE_CHECK_BYTES.max(size));
        Ok(())
    }

    fn active_pack(&self, writer: &mut Writer) -> Result<Arc<Pack>, StoreError> {
        if let Some(pack) = writer
            .active
            .as_ref()
            .filter(|pack| pack.len() < self.options.pack_bytes)
        {
            return Ok(Arc::clone(pack));
        }
        let pack = Arc::new(Pack::create(&self.packs_dir, PackId(writer.next))?);
        writer.next += 1;
        self.packs
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .insert(pack.id, Arc::clone(&pack));
        writer.active = Some(Arc::clone(&pack));
        Ok(pack)
    }
}

/// Chunks to make known, and the packs they are in with their lengths.
type Batch = (Vec<(ChunkId, PackLocation)>, Vec<(Arc<Pack>, u64)>);

impl Writer {
    fn take_dirty(&mut self) -> Batch {
        self.uncommitted = 0;
        let chunks = self.fresh.iter().map(|(id, location)| (*id, *location)).collect();
        let packs = self
            .dirty
            .drain(..)
            .map(|pack| {
                let len = pack.len();
                (pack, len)
            })
            .collect();
        (chunks, packs)
    }

    /// After a failed sync the kernel may have dropped the dirty pages and say "fine" next time: the pack's uncommitted
    /// chunks are not trusted any more, nor is anything appended to it.
    fn give_up<'a>(&mut self, pack: &Pack, untouched: impl Iterator<Item = &'a Arc<Pack>>) {
        self.fresh.retain(|_, location| location.pack != pack.id);
        self.active = self.active.take().filter(|active| active.id != pack.id);
        self.dirty.extend(untouched.cloned());
    }
}

/// Opens the packs that the index knows, and deletes the others.
fn open_packs(packs_dir: &Path, index: &Index) -> Result<BTreeMap<PackId, Arc<Pack>>, StoreError> {
    let known: BTreeMap<_, _> = index.packs()?.into_iter().collect();
    for id in files(packs_dir)? {
        if !known.contains_key(&id) {
            let path = Pack::path(packs_dir, id);
            tracing::info!(pack = id.0, "deleting a pack that was never committed");
            fs::remove_file(&path).map_err(StoreError::io("deleting", &path))?;
        }
    }
    let mut packs = BTreeMap::new();
    // Pack to the length that is left of it, where the file system lost some.
    let mut short = BTreeMap::new();
    for (id, len) in known {
        match Pack::open(packs_dir, id, len) {
            Ok((pack, found)) => {
                if found < len {
                    short.insert(id, found);
                }
                packs.insert(id, Arc::new(pack));
            }
            Err(StoreError::Io { source, .. })
                if matches!(
                    source.kind(),
                    std::io::ErrorKind::NotFound | std::io::ErrorKind::InvalidData
                ) =>
            {
                short.insert(id, 0);
            }
            Err(error) => return Err(error),
        }
    }
    if !short.is_empty() {
        forget_lost(index, &short)?;
    }
    Ok(packs)
}

/// Takes chunks out of the index whose bytes are gone. The image store finds the images that needed them.
fn forget_lost(index: &Index, short: &BTreeMap<PackId, u64>) -> Result<(), StoreError> {
    tracing::error!(packs = ?short.keys(), "packs are missing or shorter than they were: forgetting the chunks that were lost");
    let lost = |at: &PackLocation| {
        short
            .get(&at.pack)
            .is_some_and(|len| at.offset + u64::from(at.stored_len) > *len)
    };
    let dead: Vec<_> = index
        .chunks()?
        .into_iter()
        .filter(|(_, at)| lost(at))
        .map(|(id, _)| id)
        .collect();
    let gone: Vec<_> = short.iter().filter(|(_, len)| **len == 0).map(|(id, _)| *id).collect();
    let kept: Vec<_> = short
        .iter()
        .filter(|(_, len)| **len > 0)
        .map(|(id, len)| (*id, *len))
        .collect();
    index.sweep(&dead, &gone, &[], &kept)
}

/// Makes the index again from the packs.
fn rebuild(packs_dir: &Path, index: &Index) -> Result<BTreeMap<PackId, Arc<Pack>>, StoreError> {
    let mut packs = BTreeMap::new();
    for id in files(packs_dir)? {
        let pack = match Pack::open_whole(packs_dir, id) {
            Ok(pack) => pack,
            Err(error) => {
                tracing::warn!(%error, pack = id.0, "deleting a pack that is none");
                let path = Pack::path(packs_dir, id);
                fs::remove_file(&path).map_err(StoreError::io("deleting", &path))?;
                continue;
            }
        };
        let mut chunks = Vec::new();
        let len = pack.scan(|id, location| chunks.push((id, location)))?;
        index.add(&chunks, &[(id, len)])?;
        packs.insert(id, Arc::new(Pack::open(packs_dir, id, len)?.0));
    }
    Ok(packs)
}

/// The numbers of the pack files in the folder, ascending.
fn files(packs_dir: &Path) -> Result<Vec<PackId>, StoreError> {
    let entries = fs::read_dir(packs_dir).map_err(StoreError::io("listing", packs_dir))?;
    let mut found = Vec::new();
    for entry in entries {
        let name = entry.map_err(StoreError::io("listing", packs_dir))?.file_name();
        found.extend(name.to_str().and_then(Pack::id_of));
    }
    found.sort_unstable();
    Ok(found)
}

/// Makes the names in a folder durable.
pub(crate) fn sync_dir(dir: &Path) -> Result<(), StoreError> {
    File::open(dir)
        .and_then(|dir| dir.sync_all())
        .map_err(StoreError::io("syncing", dir))
}

fn check_len(data: &[u8]) -> Result<u32, StoreError> {
    match u32::try_from(data.len()) {
        Ok(len @ 1..) if data.len() <= MAX_CHUNK_LEN => Ok(len),
        _ => Err(StoreError::Length(data.len())),
    }
}

#[cfg(test)]
mod tests;
