//! Putting chunks: a session holds on to all chunks it put or found, until what refers to them is published.

use std::collections::HashSet;
use std::sync::{Arc, Mutex, PoisonError};

use super::{ChunkStore, StoreError, check_len};
use crate::chunk::{Chunk, ChunkId, ChunkSink, SinkError};
use crate::device::PackLocation;

/// Chunks that a sweep must leave alone, though nothing refers to them yet.
#[derive(Debug, Default)]
pub(crate) struct Pins(Mutex<HashSet<ChunkId>>);

impl Pins {
    pub(crate) fn add(&self, ids: impl IntoIterator<Item = ChunkId>) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).extend(ids);
    }

    pub(crate) fn copy_into(&self, live: &mut HashSet<ChunkId>) {
        live.extend(self.0.lock().unwrap_or_else(PoisonError::into_inner).iter());
    }
}

/// Work that puts chunks: one pull or import. Dropped, its chunks are left to the next sweep unless something published
/// refers to them.
pub struct Session {
    store: ChunkStore,
    pins: Arc<Pins>,
}

impl Session {
    /// A sink for one thread of the work.
    ///
    /// # Errors
    /// When zstd cannot allocate.
    pub fn sink(&self) -> Result<Sink, StoreError> {
        let zstd = zstd::bulk::Compressor::new(self.store.inner.options.zstd_level);
        let zstd = zstd.map_err(StoreError::io("preparing zstd for", self.store.dir()))?;
        Ok(Sink {
            store: self.store.clone(),
            pins: Arc::clone(&self.pins),
            zstd,
        })
    }

    /// Holds on to chunks that are there already; tells whether they all are.
    ///
    /// # Errors
    /// When the index cannot be read.
    pub fn pin_all(&self, ids: &[ChunkId]) -> Result<bool, StoreError> {
        let _open = self.store.inner.gate.read().unwrap_or_else(PoisonError::into_inner);
        self.pins.add(ids.iter().copied());
        match self.store.locate(ids) {
            Ok(_) => Ok(true),
            Err(StoreError::Missing(_)) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Holds on to `chunks`, and tells which of them the store does not have.
    ///
    /// # Errors
    /// When the index cannot be read.
    pub fn missing(&self, chunks: &[Chunk]) -> Result<Vec<Chunk>, StoreError> {
        let _open = self.store.inner.gate.read().unwrap_or_else(PoisonError::into_inner);
        self.pins.add(chunks.iter().map(|chunk| chunk.id));
        let mut missing = Vec::new();
        for chunk in chunks {
            if !self.store.contains(chunk.id)? {
                missing.push(*chunk);
            }
        }
        Ok(missing)
    }

    /// Makes all chunks put so far durable and known. See [`ChunkStore::commit`].
    ///
    /// # Errors
    /// As there.
    pub fn commit(&self) -> Result<(), StoreError> {
        self.store.commit()
    }
}

impl ChunkStore {
    /// Begins work that puts chunks.
    pub fn session(&self) -> Session {
        let pins = Arc::new(Pins::default());
        let mut sessions = self.inner.sessions.lock().unwrap_or_else(PoisonError::into_inner);
        sessions.retain(|session| session.strong_count() > 0);
        sessions.push(Arc::downgrade(&pins));
        Session {
            store: self.clone(),
            pins,
        }
    }
}

/// Puts chunks into the store, for one thread.
pub struct Sink {
    store: ChunkStore,
    pins: Arc<Pins>,
    zstd: zstd::bulk::Compressor<'static>,
}

impl Sink {
    /// Puts a chunk and returns its name. Bytes that the store has already cost a look-up.
    ///
    /// # Errors
    /// [`StoreError::DiskFull`] and other failures to write.
    pub fn put(&mut self, data: &[u8]) -> Result<ChunkId, StoreError> {
        self.put_unless(data, ChunkStore::contains, ChunkStore::append)
    }

    /// Puts a chunk and returns its name. A copy that the store has is read first: from one that is damaged the store's index
    /// turns away, and its bytes are dead until a sweep takes them.
    ///
    /// # Errors
    /// As [`Self::put`].
    pub fn mend(&mut self, data: &[u8]) -> Result<ChunkId, StoreError> {
        let is_good = |store: &ChunkStore, id| Ok(store.get(id).is_ok());
        self.put_unless(data, is_good, ChunkStore::append_unless_good)
    }

    fn put_unless(
        &mut self,
        data: &[u8],
        has: impl FnOnce(&ChunkStore, ChunkId) -> Result<bool, StoreError>,
        append: impl FnOnce(&ChunkStore, ChunkId, u32, &[u8]) -> Result<PackLocation, StoreError>,
    ) -> Result<ChunkId, StoreError> {
        let raw_len = check_len(data)?;
        let id = ChunkId::of(data);
        {
            let _open = self.store.inner.gate.read().unwrap_or_else(PoisonError::into_inner);
            self.pins.add([id]);
            if has(&self.store, id)? {
                return Ok(id);
            }
        }
        // Pinned: no sweep takes it, whoever puts it first. So the gate need not be held while compressing.
        let packed = self
            .zstd
            .compress(data)
            .map_err(StoreError::io("compressing for", self.store.dir()))?;
        let stored = if packed.len() < data.len() { &packed[..] } else { data };
        {
            let _open = self.store.inner.gate.read().unwrap_or_else(PoisonError::into_inner);
            append(&self.store, id, raw_len, stored)?;
        }
        self.store.commit_if_much()?;
        Ok(id)
    }
}

impl ChunkSink for Sink {
    fn put(&mut self, data: &[u8]) -> Result<ChunkId, SinkError> {
        Sink::put(self, data).map_err(Into::into)
    }
}
