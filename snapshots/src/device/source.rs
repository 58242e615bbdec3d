//! Where a device's chunks come from.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::{Mutex, PoisonError};

use crate::chunk::{ChunkId, MAX_CHUNK_LEN};

/// A pack file's number in the chunk store.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PackId(pub u32);

/// Where a chunk lies on this host.
///
/// `stored_len == raw_len` says that the chunk is stored as it is; otherwise `stored_len` is smaller and the bytes are one
/// zstd frame. A chunk that zstd does not make smaller is thus stored as it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PackLocation {
    /// The pack file.
    pub pack: PackId,
    /// Where in the pack the stored bytes begin.
    pub offset: u64,
    /// How many bytes are stored.
    pub stored_len: u32,
    /// How many bytes the chunk has.
    pub raw_len: u32,
}

/// A chunk that a device needs, and what its table knows about it.
#[derive(Debug, Clone, Copy)]
pub struct ChunkRequest {
    /// The chunk's name.
    pub id: ChunkId,
    /// Where it lies. `pack` is the place of the pack among the device's packs, not its number in the store.
    pub location: PackLocation,
}

/// A read-only source of chunks: the packs of this host now; memory, peers and registries fit in beside them.
///
/// Sources are not trusted: the device checks length and digest of what they deliver before anybody sees it.
pub trait ChunkSource: Send + Sync {
    /// Fills `chunk`, whose length is the chunk's, with the chunk's uncompressed bytes.
    ///
    /// # Errors
    /// [`SourceError`] when the source cannot deliver; `chunk` then holds rubbish.
    fn read(&self, request: &ChunkRequest, chunk: &mut [u8]) -> Result<(), SourceError>;
}

/// Why a source did not deliver a chunk.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// The table names a pack that was not handed over.
    #[error("pack {0} of the device is not there")]
    NoSuchPack(u32),
    /// Reading the pack failed.
    #[error("reading {len} bytes at {offset} of pack {pack}")]
    Read {
        /// Which of the device's packs.
        pack: u32,
        /// Where the stored bytes begin.
        offset: u64,
        /// How many they are.
        len: u32,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The stored bytes are no zstd frame of the right length.
    #[error("unpacking {len} bytes at {offset} of pack {pack}")]
    Decompress {
        /// Which of the device's packs.
        pack: u32,
        /// Where the stored bytes begin.
        offset: u64,
        /// How many they are.
        len: u32,
        /// What zstd said.
        #[source]
        source: io::Error,
    },
    /// Lengths that cannot be.
    #[error("a chunk of {raw} bytes cannot be stored in {stored}")]
    Lengths {
        /// The chunk's length.
        raw: u64,
        /// The stored length.
        stored: u64,
    },
}

/// The pack files of this host.
///
/// A zstd context and a buffer for stored bytes are kept for each lane, so memory is bounded; a lane serves one chunk at a
/// time, and a chunk always takes the same lane.
pub struct Packs {
    files: Vec<File>,
    lanes: [Mutex<Lane>; Packs::LANES],
}

struct Lane {
    zstd: zstd::bulk::Decompressor<'static>,
    stored: Vec<u8>,
}

impl Packs {
    const LANES: usize = 2;

    /// A source over `files`, in the order in which the device's table names them.
    ///
    /// # Errors
    /// When zstd cannot allocate its context.
    pub fn new(files: Vec<File>) -> io::Result<Self> {
        let lane = || {
            Ok::<_, io::Error>(Mutex::new(Lane {
                zstd: zstd::bulk::Decompressor::new()?,
                stored: Vec::new(),
            }))
        };
        Ok(Self {
            files,
            lanes: [lane()?, lane()?],
        })
    }
}

impl ChunkSource for Packs {
    fn read(&self, request: &ChunkRequest, chunk: &mut [u8]) -> Result<(), SourceError> {
        let PackLocation {
            pack: PackId(pack),
            offset,
            stored_len,
            raw_len,
        } = request.location;
        let file = self.files.get(pack as usize).ok_or(SourceError::NoSuchPack(pack))?;
        let stored = stored_len as usize;
        if chunk.len() != raw_len as usize || chunk.len() > MAX_CHUNK_LEN || stored > chunk.len() || stored == 0 {
            return Err(SourceError::Lengths {
                raw: chunk.len() as u64,
                stored: stored_len.into(),
            });
        }
        let read_error = |source| SourceError::Read {
            pack,
            offset,
            len: stored_len,
            source,
        };
        if stored == chunk.len() {
            return file.read_exact_at(chunk, offset).map_err(read_error);
        }
        let lane = &self.lanes[usize::from(request.id.as_bytes()[0]) % Self::LANES];
        // A lane has no state that a panic could leave half-done: the buffer is overwritten, zstd starts each frame anew.
        let mut lane = lane.lock().unwrap_or_else(PoisonError::into_inner);
        let Lane { zstd, stored: buffer } = &mut *lane;
        buffer.resize(stored, 0);
        file.read_exact_at(buffer, offset).map_err(read_error)?;
        let decompress_error = |source| SourceError::Decompress {
            pack,
            offset,
            len: stored_len,
            source,
        };
        let unpacked = zstd
            .decompress_to_buffer(buffer.as_slice(), chunk)
            .map_err(decompress_error)?;
        if unpacked != raw_len as usize {
            let short = io::Error::new(
                io::ErrorKind::InvalidData,
                format!("{unpacked} bytes came out, not {raw_len}"),
            );
            return Err(decompress_error(short));
        }
        Ok(())
    }
}
