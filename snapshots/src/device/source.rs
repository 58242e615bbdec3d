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

impl PackLocation {
    /// A chunk of so many bytes that is not on this host: nothing is stored of it.
    pub const fn absent(raw_len: u32) -> Self {
        Self {
            pack: PackId(0),
            offset: 0,
            stored_len: 0,
            raw_len,
        }
    }

    /// Whether the chunk was not on this host when this was written.
    pub const fn is_absent(&self) -> bool {
        self.stored_len == 0
    }
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
    /// It was not on this host when the table was written.
    #[error("it was not on this host when the device's table was written")]
    Absent,
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

/// What it takes to read chunks out of files, one at a time. It has no state that a panic could leave half-done: the buffer is
/// overwritten, zstd starts each frame anew.
pub(super) struct Lane {
    zstd: zstd::bulk::Decompressor<'static>,
    stored: Vec<u8>,
}

impl Lane {
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self {
            zstd: zstd::bulk::Decompressor::new()?,
            stored: Vec::new(),
        })
    }

    /// Fills `chunk` with what `location` says that `file` has.
    pub(super) fn read(&mut self, file: &File, location: PackLocation, chunk: &mut [u8]) -> Result<(), SourceError> {
        let PackLocation {
            pack: PackId(pack),
            offset,
            stored_len,
            raw_len,
        } = location;
        let read_error = |source| SourceError::Read {
            pack,
            offset,
            len: stored_len,
            source,
        };
        check_lengths(location, chunk.len())?;
        if stored_len == raw_len {
            return file.read_exact_at(chunk, offset).map_err(read_error);
        }
        self.stored.resize(stored_len as usize, 0);
        file.read_exact_at(&mut self.stored, offset).map_err(read_error)?;
        let decompress_error = |source| SourceError::Decompress {
            pack,
            offset,
            len: stored_len,
            source,
        };
        let unpacked = self
            .zstd
            .decompress_to_buffer(self.stored.as_slice(), chunk)
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

/// Whether a chunk of `len` bytes can be stored as `location` says.
fn check_lengths(location: PackLocation, len: usize) -> Result<(), SourceError> {
    let stored = location.stored_len as usize;
    if len != location.raw_len as usize || len > MAX_CHUNK_LEN || stored > len || stored == 0 {
        return Err(SourceError::Lengths {
            raw: len as u64,
            stored: location.stored_len.into(),
        });
    }
    Ok(())
}

impl Packs {
    const LANES: usize = 2;

    /// A source over `files`, in the order in which the device's table names them.
    ///
    /// # Errors
    /// When zstd cannot allocate its context.
    pub fn new(files: Vec<File>) -> io::Result<Self> {
        let lane = || Lane::new().map(Mutex::new);
        Ok(Self {
            files,
            lanes: [lane()?, lane()?],
        })
    }
}

impl ChunkSource for Packs {
    fn read(&self, request: &ChunkRequest, chunk: &mut [u8]) -> Result<(), SourceError> {
        let location = request.location;
        let PackId(pack) = location.pack;
        let file = self.files.get(pack as usize).ok_or(SourceError::NoSuchPack(pack))?;
        if location.stored_len == location.raw_len {
            // Needs no lane.
            check_lengths(location, chunk.len())?;
            let read = file.read_exact_at(chunk, location.offset);
            return read.map_err(|source| SourceError::Read {
                pack,
                offset: location.offset,
                len: location.stored_len,
                source,
            });
        }
        let lane = &self.lanes[usize::from(request.id.as_bytes()[0]) % Self::LANES];
        let mut lane = lane.lock().unwrap_or_else(PoisonError::into_inner);
        lane.read(file, location, chunk)
    }
}
