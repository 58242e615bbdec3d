//! Pack files: chunks one after the other, only ever appended to.
//!
//! ```text
//!  0        8         12       16
//!  +--------+---------+--------+--------+--------+----- - - -+--------+--------+- - -
//!  |FLNTPACK| version | number | header |  id    |  stored   | header |  id    |
//!  +--------+---------+--------+--------+--------+----- - - -+--------+--------+- - -
//!                              |<------ record: 48 + stored ->|
//!  header: "FREC", stored length, raw length, zero; all numbers little-endian, 32 bits
//!  stored: the chunk itself if both lengths are equal, else one zstd frame of it
//! ```
//!
//! A record says everything about itself, and its id proves its bytes: the index can be made again from the packs alone.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use super::StoreError;
use crate::chunk::{ChunkId, MAX_CHUNK_LEN};
use crate::device::{PackId, PackLocation};

const MAGIC: &[u8; 8] = b"FLNTPACK";
const VERSION: u32 = 1;
const RECORD_MAGIC: &[u8; 4] = b"FREC";
/// Bytes before the first record.
pub(crate) const HEADER_LEN: u64 = HEADER as u64;
const HEADER: usize = 16;
/// Bytes before a record's stored bytes.
pub(crate) const RECORD_HEADER_LEN: u64 = RECORD_HEADER as u64;
const RECORD_HEADER: usize = 48;

/// A pack file, open.
#[derive(Debug)]
pub(crate) struct Pack {
    pub(crate) id: PackId,
    pub(crate) path: PathBuf,
    file: File,
    /// Where the next record begins; written under the writer's lock only.
    len: AtomicU64,
}

impl Pack {
    /// The file name of pack `id` in the folder `packs`.
    pub(crate) fn path(packs: &Path, id: PackId) -> PathBuf {
        packs.join(format!("{:08}.pack", id.0))
    }

    /// The number in a pack's file name.
    pub(crate) fn id_of(name: &str) -> Option<PackId> {
        name.strip_suffix(".pack")
            .filter(|digits| digits.len() == 8)?
            .parse()
            .ok()
            .map(PackId)
    }

    /// Makes an empty pack.
    pub(crate) fn create(packs: &Path, id: PackId) -> Result<Self, StoreError> {
        let path = Self::path(packs, id);
        // A file of that name can only be what a crash left of a pack that no commit ever named.
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .open(&path);
        let file = file.map_err(StoreError::io("creating", &path))?;
        let mut header = [0; HEADER];
        header[..8].copy_from_slice(MAGIC);
        header[8..12].copy_from_slice(&VERSION.to_le_bytes());
        header[12..].copy_from_slice(&id.0.to_le_bytes());
        file.write_all_at(&header, 0)
            .map_err(StoreError::io("writing", &path))?;
        Ok(Self {
            id,
            path,
            file,
            len: AtomicU64::new(HEADER_LEN),
        })
    }

    /// Opens a pack whose first `len` bytes are known to be good, and drops what follows them.
    ///
    /// Returns the length that is really there: a shorter one means that the file system lost bytes it had promised to keep.
    pub(crate) fn open(packs: &Path, id: PackId, len: u64) -> Result<(Self, u64), StoreError> {
        let pack = Self::open_whole(packs, id)?;
        let found = pack.len();
        if found > len {
            tracing::info!(pack = id.0, dropped = found - len, "dropping the torn tail of a pack");
            pack.file
                .set_len(len)
                .map_err(StoreError::io("truncating", &pack.path))?;
        }
        pack.len.store(found.min(len), Ordering::Relaxed);
        Ok((pack, found.min(len)))
    }

    /// Opens a pack of which nothing is known.
    pub(crate) fn open_whole(packs: &Path, id: PackId) -> Result<Self, StoreError> {
        let path = Self::path(packs, id);
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .open(&path)
            .map_err(StoreError::io("opening", &path))?;
        let len = file.metadata().map_err(StoreError::io("examining", &path))?.len();
        let mut header = [0; HEADER];
        let read = file.read_exact_at(&mut header, 0);
        let good = read.is_ok() && header[..8] == *MAGIC && header[8..12] == VERSION.to_le_bytes();
        if !good || header[12..] != id.0.to_le_bytes() {
            let source = io::Error::new(
                io::ErrorKind::InvalidData,
                "it has no pack header of this version and number",
            );
            return Err(StoreError::Io {
                action: "opening",
                path,
                source,
            });
        }
        Ok(Self {
            id,
            path,
            file,
            len: AtomicU64::new(len),
        })
    }

    /// Bytes in the pack.
    pub(crate) fn len(&self) -> u64 {
        self.len.load(Ordering::Acquire)
    }

    /// Appends a record. The caller holds the writer's lock. After an error the pack is as before: the next record goes to
    /// the same place.
    pub(crate) fn append(&self, id: ChunkId, raw_len: u32, stored: &[u8]) -> Result<PackLocation, StoreError> {
        let start = self.len();
        let stored_len = u32::try_from(stored.len()).map_err(|_| StoreError::Length(stored.len()))?;
        let mut record = Vec::with_capacity(RECORD_HEADER + stored.len());
        record.extend_from_slice(RECORD_MAGIC);
        record.extend_from_slice(&stored_len.to_le_bytes());
        record.extend_from_slice(&raw_len.to_le_bytes());
        record.extend_from_slice(&0_u32.to_le_bytes());
        record.extend_from_slice(id.as_bytes());
        record.extend_from_slice(stored);
        self.file
            .write_all_at(&record, start)
            .map_err(StoreError::io("writing", &self.path))?;
        self.len.store(start + record.len() as u64, Ordering::Release);
        Ok(PackLocation {
            pack: self.id,
            offset: start + RECORD_HEADER_LEN,
            stored_len,
            raw_len,
        })
    }

    /// Returns once everything appended so far is on the disk.
    pub(crate) fn sync(&self) -> Result<(), StoreError> {
        self.file.sync_data().map_err(StoreError::io("syncing", &self.path))
    }

    /// The stored bytes at `location`.
    pub(crate) fn read_stored(&self, location: PackLocation) -> Result<Vec<u8>, StoreError> {
        let mut stored = vec![0; location.stored_len as usize];
        self.file
            .read_exact_at(&mut stored, location.offset)
            .map_err(StoreError::io("reading", &self.path))?;
        Ok(stored)
    }

    /// The chunk at `location`, verified.
    pub(crate) fn read(&self, id: ChunkId, location: PackLocation) -> Result<Vec<u8>, StoreError> {
        let damaged = |reason: String| StoreError::Damaged {
            id,
            pack: self.id,
            reason,
        };
        if location.raw_len as usize > MAX_CHUNK_LEN || location.stored_len > location.raw_len {
            return Err(damaged(format!(
                "{} bytes stored for {}",
                location.stored_len, location.raw_len
            )));
        }
        let stored = self.read_stored(location)?;
        let chunk = unpack(&stored, location.raw_len).map_err(|error| damaged(error.to_string()))?;
        match ChunkId::of(&chunk) {
            found if found == id => Ok(chunk),
            found => Err(damaged(format!("its bytes are those of {found}"))),
        }
    }

    /// Opens the file of pack `id` read-only, to be handed to another process.
    pub(crate) fn open_for_readers(packs: &Path, id: PackId) -> Result<File, StoreError> {
        let path = Self::path(packs, id);
        File::open(&path).map_err(StoreError::io("opening", &path))
    }

    /// Reads the whole pack and tells each good record, up to the first that is not; returns where that one begins.
    pub(crate) fn scan(&self, mut each: impl FnMut(ChunkId, PackLocation)) -> Result<u64, StoreError> {
        let len = self.len();
        let mut at = HEADER_LEN;
        while let Some((id, location)) = self.record_at(at, len) {
            match self.read(id, location) {
                Ok(_) => each(id, location),
                Err(StoreError::Damaged { .. }) => break,
                Err(error) => return Err(error),
            }
            at = location.offset + u64::from(location.stored_len);
        }
        self.len.store(at, Ordering::Release);
        Ok(at)
    }

    fn record_at(&self, at: u64, len: u64) -> Option<(ChunkId, PackLocation)> {
        let mut header = [0; RECORD_HEADER];
        self.file.read_exact_at(&mut header, at).ok()?;
        let (fields, id) = header.split_first_chunk::<16>()?;
        let [magic, stored, raw, zero] = [&fields[..4], &fields[4..8], &fields[8..12], &fields[12..]];
        let number = |bytes: &[u8]| bytes.try_into().map(u32::from_le_bytes).ok();
        let (stored_len, raw_len) = (number(stored)?, number(raw)?);
        let offset = at + RECORD_HEADER_LEN;
        let fits = stored_len > 0 && offset.checked_add(stored_len.into())? <= len;
        let id = ChunkId::from_bytes(id.try_into().ok()?);
        (magic == RECORD_MAGIC && zero == [0; 4] && fits).then_some((
            id,
            PackLocation {
                pack: self.id,
                offset,
                stored_len,
                raw_len,
            },
        ))
    }
}

/// A chunk as it is stored: itself, or a zstd frame that is shorter.
pub(crate) fn compress(chunk: &[u8], level: i32) -> io::Result<Vec<u8>> {
    let packed = zstd::bulk::compress(chunk, level)?;
    Ok(if packed.len() < chunk.len() {
        packed
    } else {
        chunk.to_vec()
    })
}

/// The chunk of `raw_len` bytes that is stored as `stored`.
pub(crate) fn unpack(stored: &[u8], raw_len: u32) -> io::Result<Vec<u8>> {
    if stored.len() == raw_len as usize {
        return Ok(stored.to_vec());
    }
    let chunk = zstd::bulk::decompress(stored, raw_len as usize)?;
    if chunk.len() != raw_len as usize {
        let reason = format!("{} bytes came out of it instead of {raw_len}", chunk.len());
        return Err(io::Error::new(io::ErrorKind::InvalidData, reason));
    }
    Ok(chunk)
}
