//! An image as a read-only block device made of chunks.
//!
//! ```text
//!   read_at(offset, buffer)
//!      | which extent?   table: directory in memory -> one page
//!      v
//!   chunk number --(cache)--> bytes -> buffer
//!      | not cached: one page of the table says name and place
//!      v
//!   ChunkSource (packs) -> private buffer -> length and BLAKE3 checked -> cache
//! ```
//!
//! Nothing reaches the reader that was not verified; damage is an error that names the chunk, never wrong bytes. A chunk that is
//! damaged, or was not here when the table was written, can be told to the device when somebody has found it ([`FoundChunk`]); it is
//! verified as any other. Memory is bounded: the cache, the table's directory, a decompressor for each of two lanes, and of chunks
//! that were found where they are.

#[cfg(feature = "store")]
mod build;
mod cache;
#[cfg(feature = "store")]
mod content;
mod found;
mod source;
mod table;
#[cfg(test)]
#[cfg(feature = "store")]
mod tests;

use std::fs::File;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

#[cfg(any(test, feature = "fuzzing"))]
#[cfg(feature = "store")]
pub(crate) use build::seal;
#[cfg(feature = "store")]
pub use build::{BuildError, Table};
use cache::{Cache, Key};
#[cfg(feature = "store")]
pub(crate) use content::{content_name, placed_chunks};
use found::Found;
pub use found::FoundChunk;
pub use source::{ChunkRequest, ChunkSource, PackId, PackLocation, Packs, SourceError};
#[cfg(feature = "store")]
pub(crate) use table::{BLOCK_LEN, MAX_DEVICE_LEN};
pub use table::{DeviceExtent, MAX_PACKS, OpenError, TableError};
use table::{OpenTable, extent_record};

use crate::chunk::ChunkId;

/// What a device keeps in memory by default.
pub const DEFAULT_CACHE_LEN: usize = 1024 * 1024;

/// Readers that may fetch at one time. Two of one chunk always take the same lane: the second finds it cached.
const LANES: usize = 2;

/// Why bytes could not be read.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// Beyond the device's end.
    #[error("reading {len} bytes at {offset} of an image device of {size} bytes")]
    OutOfRange {
        /// Where the reader began.
        offset: u64,
        /// How many bytes it wanted.
        len: usize,
        /// The device's size.
        size: u64,
    },
    /// The table is damaged or gone.
    #[error("looking up offset {offset} of an image device")]
    Table {
        /// Where on the device.
        offset: u64,
        /// What is wrong.
        #[source]
        source: TableError,
    },
    /// The table names a chunk, or a part of one, that does not exist.
    #[error("the device table says that offset {offset} is in a part of chunk {chunk} that does not exist")]
    NoSuchChunk {
        /// Where on the device.
        offset: u64,
        /// Number of the chunk.
        chunk: u32,
    },
    /// No source delivered the chunk.
    #[error("reading chunk {id}")]
    Source {
        /// Name of the chunk.
        id: ChunkId,
        /// Why not.
        #[source]
        source: SourceError,
    },
    /// A source delivered other bytes.
    #[error("chunk {id} is damaged on this host: its bytes have the name {found}")]
    Damaged {
        /// Name of the chunk.
        id: ChunkId,
        /// Name of what came.
        found: ChunkId,
    },
}

impl ReadError {
    /// The chunk with which the bytes could be read, if only it was found somewhere.
    pub fn missing_chunk(&self) -> Option<ChunkId> {
        match self {
            Self::Source { id, .. } | Self::Damaged { id, .. } => Some(*id),
            Self::OutOfRange { .. } | Self::Table { .. } | Self::NoSuchChunk { .. } => None,
        }
    }
}

/// An image's block device. Reads may come from several threads.
pub struct ImageDevice {
    table: OpenTable,
    source: Box<dyn ChunkSource>,
    cache: Mutex<Cache>,
    lanes: [Mutex<()>; LANES],
    /// Made by the first chunk that is found: a device whose chunks are all where its table says pays nothing for it.
    found: OnceLock<Mutex<Found>>,
}

impl ImageDevice {
    /// The device that `table` describes, over `packs` in the order of [`packs_of`].
    ///
    /// # Errors
    /// [`OpenError`] when the table is damaged, hostile, or does not go with the packs.
    pub fn open(table: File, packs: Vec<File>) -> Result<Self, OpenError> {
        let table = OpenTable::open(table)?;
        if table.packs().len() != packs.len() {
            return Err(OpenError::PackCount {
                named: table.packs().len(),
                given: packs.len(),
            });
        }
        let packs = Packs::new(packs).map_err(OpenError::Decompressor)?;
        Ok(Self::with_parts(table, Box::new(packs), DEFAULT_CACHE_LEN))
    }

    /// The device that `table` describes, with chunks from `source` and a cache of `cache_len` bytes.
    ///
    /// # Errors
    /// [`OpenError`] when the table is damaged or hostile.
    pub fn with_source(table: File, source: Box<dyn ChunkSource>, cache_len: usize) -> Result<Self, OpenError> {
        Ok(Self::with_parts(OpenTable::open(table)?, source, cache_len))
    }

    fn with_parts(table: OpenTable, source: Box<dyn ChunkSource>, cache_len: usize) -> Self {
        Self {
            table,
            source,
            cache: Mutex::new(Cache::new(cache_len)),
            lanes: Default::default(),
            found: OnceLock::new(),
        }
    }

    /// The device's length in bytes: a multiple of 4096.
    pub fn size(&self) -> u64 {
        self.table.size()
    }

    /// Fills `buffer` with the bytes at `offset`. Blocks for reads of local files only, as long as the source is local.
    ///
    /// # Errors
    /// [`ReadError`]; `buffer` may then be filled in part, with verified bytes only.
    pub fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<(), ReadError> {
        let size = self.size();
        if offset.checked_add(buffer.len() as u64).is_none_or(|end| end > size) {
            return Err(ReadError::OutOfRange {
                offset,
                len: buffer.len(),
                size,
            });
        }
        let (mut at, mut rest) = (offset, buffer);
        while !rest.is_empty() {
            let extent = self.extent_from(at)?;
            let gap = extent.map_or(u64::MAX, |extent| extent.device_offset.saturating_sub(at));
            let filled = match extent {
                Some(extent) if gap == 0 => self.copy_from(&extent, at, rest)?,
                _ => {
                    let zeros = usize::try_from(gap).map_or(rest.len(), |gap| gap.min(rest.len()));
                    rest[..zeros].fill(0);
                    zeros
                }
            };
            at += filled as u64;
            rest = &mut rest[filled..];
        }
        Ok(())
    }

    /// Copies what `extent` has from `at` on, as much as `buffer` takes; how much that was, at least one byte.
    fn copy_from(&self, extent: &DeviceExtent, at: u64, buffer: &mut [u8]) -> Result<usize, ReadError> {
        let missing = ReadError::NoSuchChunk {
            offset: at,
            chunk: extent.chunk,
        };
        let chunk = self.chunk(extent.chunk, at)?;
        let bytes = usize::try_from(at - extent.device_offset)
            .ok()
            .and_then(|skip| chunk.get(extent.offset as usize..)?.get(skip..extent.len as usize))
            .ok_or(missing)?;
        let len = bytes.len().min(buffer.len());
        buffer[..len].copy_from_slice(&bytes[..len]);
        Ok(len)
    }

    /// The first extent that ends after `at`.
    fn extent_from(&self, at: u64) -> Result<Option<DeviceExtent>, ReadError> {
        let mut page = self.table.extent_page_for(at);
        while let Some(number) = page {
            let bytes = self.page(number, at)?;
            let count = self.table.extents_on(number);
            let (mut low, mut high) = (0, count);
            while low < high {
                let middle = low.midpoint(high);
                match extent_record(&bytes, middle).end() <= at {
                    true => low = middle + 1,
                    false => high = middle,
                }
            }
            if low < count {
                return Ok(Some(extent_record(&bytes, low)));
            }
            page = self.table.page_after(number);
        }
        Ok(None)
    }

    fn page(&self, page: usize, offset: u64) -> Result<Arc<Vec<u8>>, ReadError> {
        if let Some(bytes) = self.cache().get(Key::Page(page)) {
            return Ok(bytes);
        }
        let bytes = Arc::new(
            self.table
                .read_page(page)
                .map_err(|source| ReadError::Table { offset, source })?,
        );
        self.cache().insert(Key::Page(page), Arc::clone(&bytes));
        Ok(bytes)
    }

    /// Chunk number `number`, from the cache or verified anew.
    fn chunk(&self, number: u32, offset: u64) -> Result<Arc<Vec<u8>>, ReadError> {
        if let Some(bytes) = self.cache().get(Key::Chunk(number)) {
            return Ok(bytes);
        }
        let _lane = self.lanes[number as usize % LANES]
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if let Some(bytes) = self.cache().get(Key::Chunk(number)) {
            return Ok(bytes);
        }
        let page = self
            .table
            .chunk_page_for(number)
            .ok_or(ReadError::NoSuchChunk { offset, chunk: number })?;
        let records = self.page(page, offset)?;
        let request = self
            .table
            .chunk_on(page, &records, number)
            .map_err(|source| ReadError::Table { offset, source })?;
        let mut bytes = vec![0; request.location.raw_len as usize];
        if let Err(error) = self.read_verified(&request, &mut bytes) {
            self.forget_found(request.id);
            return Err(error);
        }
        let bytes = Arc::new(bytes);
        self.cache().insert(Key::Chunk(number), Arc::clone(&bytes));
        Ok(bytes)
    }

    fn read_verified(&self, request: &ChunkRequest, bytes: &mut [u8]) -> Result<(), ReadError> {
        let id = request.id;
        let found = self.found.get().and_then(|found| lock(found).read(id, bytes));
        let read = match found {
            Some(read) => read,
            None if request.location.is_absent() => Err(SourceError::Absent),
            None => self.source.read(request, bytes),
        };
        read.map_err(|source| ReadError::Source { id, source })?;
        match ChunkId::of(bytes) {
            found if found == id => Ok(()),
            found => Err(ReadError::Damaged { id, found }),
        }
    }

    /// From now on chunk `id` is read from there. It is verified as any other: what is not the chunk is forgotten when it is read.
    ///
    /// # Errors
    /// When zstd cannot allocate its context.
    pub fn learn(&self, id: ChunkId, chunk: FoundChunk) -> io::Result<()> {
        let found = match self.found.get() {
            Some(found) => found,
            None => {
                let new = Mutex::new(Found::new()?);
                self.found.get_or_init(|| new)
            }
        };
        lock(found).insert(id, chunk);
        Ok(())
    }

    fn forget_found(&self, id: ChunkId) {
        if let Some(found) = self.found.get() {
            lock(found).remove(id);
        }
    }

    /// A panic cannot leave the cache half-changed in a way that matters: at worst it holds less than it could.
    fn cache(&self) -> MutexGuard<'_, Cache> {
        lock(&self.cache)
    }
}

/// What lies under these locks is changed such that a panic does no harm.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The packs that `table` names, in the order in which [`ImageDevice::open`] wants them.
///
/// # Errors
/// [`OpenError`] when the table is damaged or hostile.
pub fn packs_of(table: File) -> Result<Vec<PackId>, OpenError> {
    Ok(OpenTable::open(table)?.packs().to_vec())
}
