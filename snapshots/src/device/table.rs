//! The device table: a file that says which chunk holds which bytes of an image's device, and where that chunk lies.
//!
//! Integers are little-endian. Digests are BLAKE3; those of pages are cut to 24 bytes.
//!
//! ```text
//!      0 +--------------------------------------------------------------+
//!        | "FLINTDEV" | version u32 | packs u32 | device bytes u64      |  header
//!     24 | chunks u32 | extents u32 | 0 (32 bytes)                      |
//!     64 | digest of bytes 0..64 and of the directory                   |
//!     96 +--------------------------------------------------------------+
//!        | number in the store, u32, for each pack                      |  directory: read and checked when the table
//!        | for each page: its first device offset u64 (0 for a page of  |  is opened, and kept in memory; 32 bytes a
//!        | chunks), its digest (24 bytes); pages of chunks come first   |  page, so 0.8 % of the table
//!        +--------------------------------------------------------------+
//!        | zeros up to a multiple of 4096                               |
//!   n*4K +--------------------------------------------------------------+
//!        | 64 chunks: name 32, pack u32, stored length u32, length u32, |  pages of chunks; read when needed and
//!        | 0 u32, offset in the pack u64, 0 u64                         |  checked against the directory; stored length 0
//!        |                                                              |  in version 2: not on this host
//!        +--------------------------------------------------------------+
//!        | 170 extents: device offset u64, chunk u32, offset in the     |  pages of extents, by ascending device offset;
//!        | chunk u32, length u32, 0 u32; then 16 bytes of zeros         |  what no extent covers reads as zeros
//!        +--------------------------------------------------------------+
//! ```
//!
//! So a table of a million extents opens in a few hundred microseconds, costs 200 KiB of memory, and every byte of it has
//! been verified before it is believed. The digests find damage; a table that was made to deceive has good digests, so
//! all values are checked on top.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use super::source::{ChunkRequest, PackId, PackLocation};
use crate::bytes::{array_at, u32_at, u64_at};
use crate::chunk::{ChunkId, MAX_CHUNK_LEN};

/// The unit in which a table is read and verified.
pub(super) const PAGE_LEN: usize = 4096;
/// The device's block: sizes are multiples of it.
pub(crate) const BLOCK_LEN: u64 = 4096;
/// The longest device: EROFS counts 4 KiB blocks in 32 bits.
pub(crate) const MAX_DEVICE_LEN: u64 = BLOCK_LEN * u32::MAX as u64;
/// The most packs: a device's files travel in one message, which carries 253 (SCM_MAX_FD), and the table is one of them.
pub const MAX_PACKS: usize = 252;
/// The most pages, so that the directory takes 1 MiB at most.
const MAX_PAGES: usize = 32 * 1024;

pub(super) const MAGIC: &[u8; 8] = b"FLINTDEV";
/// The version of tables of which some chunks are not on this host: a reader of version 1 cannot fetch them.
pub(super) const VERSION: u32 = 2;
/// The version of all others.
pub(super) const VERSION_WHOLE: u32 = 1;
pub(super) const HEADER_LEN: usize = 96;
pub(super) const HASHED_HEADER_LEN: usize = 64;
pub(super) const DIRECTORY_ENTRY_LEN: usize = 32;
pub(super) const CHUNK_RECORD_LEN: usize = 64;
pub(super) const CHUNKS_PER_PAGE: usize = PAGE_LEN / CHUNK_RECORD_LEN;
pub(super) const EXTENT_RECORD_LEN: usize = 24;
pub(super) const EXTENTS_PER_PAGE: usize = PAGE_LEN / EXTENT_RECORD_LEN;
pub(super) const PAGE_DIGEST_LEN: usize = 24;

/// A run of a device's bytes that a chunk holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeviceExtent {
    /// Where on the device.
    pub device_offset: u64,
    /// Which chunk, by its place in the device's list of chunks.
    pub chunk: u32,
    /// Where in the chunk.
    pub offset: u32,
    /// How many bytes.
    pub len: u32,
}

impl DeviceExtent {
    /// The first byte after it on the device.
    pub fn end(&self) -> u64 {
        self.device_offset.saturating_add(self.len.into())
    }
}

/// Why a table was not taken.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// It could not be read.
    #[error("reading the device table")]
    Read(#[source] io::Error),
    /// It does not begin as one.
    #[error("this file is not a device table")]
    NotATable,
    /// Written by another version of Flint.
    #[error("the device table has version {0}, this program reads up to version {VERSION}: have flintd write it anew")]
    Version(u32),
    /// It is cut short, or its digest does not match.
    #[error("the device table is damaged: it is cut short or its digest does not match; have flintd write it anew")]
    Damaged,
    /// The digest matches, the content makes no sense.
    #[error("the device table is malformed: {0}")]
    Malformed(&'static str),
    /// The files handed over are not those it names.
    #[error("the device table names {named} packs, {given} were handed over")]
    PackCount {
        /// How many it names.
        named: usize,
        /// How many files there are.
        given: usize,
    },
    /// The decompressor could not be set up.
    #[error("setting up zstd")]
    Decompressor(#[source] io::Error),
}

/// Why a page of a table was not believed.
#[derive(Debug, thiserror::Error)]
pub enum TableError {
    /// It could not be read.
    #[error("reading page {page} of the device table")]
    Read {
        /// Which page.
        page: usize,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// Its digest does not match.
    #[error("page {page} of the device table is damaged")]
    Damaged {
        /// Which page.
        page: usize,
    },
    /// The digest matches, the content makes no sense.
    #[error("page {page} of the device table is malformed: {what}")]
    Malformed {
        /// Which page.
        page: usize,
        /// What is wrong.
        what: &'static str,
    },
}

struct DirectoryEntry {
    first: u64,
    digest: [u8; PAGE_DIGEST_LEN],
}

/// A table that is open: its directory in memory, its pages in the file.
pub(super) struct OpenTable {
    file: File,
    size: u64,
    packs: Vec<PackId>,
    chunks: usize,
    extents: usize,
    chunk_pages: usize,
    directory: Vec<DirectoryEntry>,
    pages_at: u64,
}

/// The lengths that follow from a header's counts.
pub(super) struct Shape {
    pub(super) chunk_pages: usize,
    pub(super) pages: usize,
    pub(super) directory_len: usize,
    pub(super) pages_at: usize,
}

impl Shape {
    /// `None` if the counts are beyond the limits.
    pub(super) fn new(packs: usize, chunks: usize, extents: usize) -> Option<Self> {
        let chunk_pages = chunks.div_ceil(CHUNKS_PER_PAGE);
        let pages = chunk_pages.checked_add(extents.div_ceil(EXTENTS_PER_PAGE))?;
        if packs > MAX_PACKS || pages > MAX_PAGES {
            return None;
        }
        let directory_len = packs * 4 + pages * DIRECTORY_ENTRY_LEN;
        Some(Self {
            chunk_pages,
            pages,
            directory_len,
            pages_at: (HEADER_LEN + directory_len).next_multiple_of(PAGE_LEN),
        })
    }
}

pub(super) fn page_digest(page: &[u8]) -> [u8; PAGE_DIGEST_LEN] {
    array_at(blake3::hash(page).as_bytes(), 0)
}

impl OpenTable {
    pub(super) fn open(file: File) -> Result<Self, OpenError> {
        let mut header = [0; HEADER_LEN];
        file.read_exact_at(&mut header, 0).map_err(|error| match error.kind() {
            io::ErrorKind::UnexpectedEof => OpenError::NotATable,
            _ => OpenError::Read(error),
        })?;
        if !header.starts_with(MAGIC) {
            return Err(OpenError::NotATable);
        }
        let version = u32_at(&header, 8);
        if !(VERSION_WHOLE..=VERSION).contains(&version) {
            return Err(OpenError::Version(version));
        }
        let (pack_count, chunks, extents) = (
            u32_at(&header, 12) as usize,
            u32_at(&header, 24) as usize,
            u32_at(&header, 28) as usize,
        );
        let size = u64_at(&header, 16);
        let shape =
            Shape::new(pack_count, chunks, extents).ok_or(OpenError::Malformed("its counts are beyond the limits"))?;
        if size > MAX_DEVICE_LEN || !size.is_multiple_of(BLOCK_LEN) {
            return Err(OpenError::Malformed("the device's size is impossible"));
        }
        let table_len = (shape.pages_at + shape.pages * PAGE_LEN) as u64;
        if file.metadata().map_err(OpenError::Read)?.len() < table_len {
            return Err(OpenError::Damaged);
        }
        let mut directory = vec![0; shape.directory_len];
        file.read_exact_at(&mut directory, HEADER_LEN as u64)
            .map_err(OpenError::Read)?;
        let mut hasher = blake3::Hasher::new();
        hasher.update(&header[..HASHED_HEADER_LEN]).update(&directory);
        if hasher.finalize().as_bytes() != &header[HASHED_HEADER_LEN..] {
            return Err(OpenError::Damaged);
        }
        let (packs, pages) = directory.split_at(pack_count * 4);
        let directory: Vec<_> = pages
            .chunks_exact(DIRECTORY_ENTRY_LEN)
            .map(|entry| DirectoryEntry {
                first: u64_at(entry, 0),
                digest: array_at(entry, 8),
            })
            .collect();
        let offsets = &directory[shape.chunk_pages..];
        if !offsets.is_sorted_by(|a, b| a.first < b.first) || offsets.last().is_some_and(|last| last.first >= size) {
            return Err(OpenError::Malformed("its pages are not in order"));
        }
        Ok(Self {
            file,
            size,
            packs: packs.chunks_exact(4).map(|pack| PackId(u32_at(pack, 0))).collect(),
            chunks,
            extents,
            chunk_pages: shape.chunk_pages,
            directory,
            pages_at: shape.pages_at as u64,
        })
    }

    pub(super) fn size(&self) -> u64 {
        self.size
    }

    pub(super) fn packs(&self) -> &[PackId] {
        &self.packs
    }

    /// The page that must hold the last extent that begins at `offset` or before; the first page if there is none.
    pub(super) fn extent_page_for(&self, offset: u64) -> Option<usize> {
        let offsets = &self.directory[self.chunk_pages..];
        let after = offsets.partition_point(|entry| entry.first <= offset);
        (!offsets.is_empty()).then(|| self.chunk_pages + after.saturating_sub(1))
    }

    /// The page after `page`, if there is one.
    pub(super) fn page_after(&self, page: usize) -> Option<usize> {
        (page + 1 < self.directory.len()).then_some(page + 1)
    }

    /// The page that holds chunk number `chunk`.
    pub(super) fn chunk_page_for(&self, chunk: u32) -> Option<usize> {
        ((chunk as usize) < self.chunks).then_some(chunk as usize / CHUNKS_PER_PAGE)
    }

    /// Pages of chunks, which come before those of extents.
    #[cfg(feature = "store")]
    pub(super) fn chunk_pages(&self) -> usize {
        self.chunk_pages
    }

    /// Numbers of the chunks on a page of chunks.
    #[cfg(feature = "store")]
    pub(super) fn chunks_on(&self, page: usize) -> std::ops::Range<u32> {
        let first = page * CHUNKS_PER_PAGE;
        // The shape has checked that their number fits into 32 bits.
        let number = |chunk: usize| u32::try_from(chunk.min(self.chunks)).unwrap_or(u32::MAX);
        number(first)..number(first + CHUNKS_PER_PAGE)
    }

    /// Page `page`, verified.
    pub(super) fn read_page(&self, page: usize) -> Result<Vec<u8>, TableError> {
        let mut bytes = vec![0; PAGE_LEN];
        let at = self.pages_at + (page * PAGE_LEN) as u64;
        self.file
            .read_exact_at(&mut bytes, at)
            .map_err(|source| TableError::Read { page, source })?;
        if page_digest(&bytes) != self.directory[page].digest {
            return Err(TableError::Damaged { page });
        }
        if page >= self.chunk_pages {
            self.check_extents(page, &bytes)?;
        }
        Ok(bytes)
    }

    /// Records on an extent page.
    pub(super) fn extents_on(&self, page: usize) -> usize {
        EXTENTS_PER_PAGE.min(self.extents - (page - self.chunk_pages) * EXTENTS_PER_PAGE)
    }

    fn check_extents(&self, page: usize, bytes: &[u8]) -> Result<(), TableError> {
        let malformed = |what| Err(TableError::Malformed { page, what });
        let limit = self
            .page_after(page)
            .map_or(self.size, |next| self.directory[next].first);
        let mut end = self.directory[page].first;
        if extent_record(bytes, 0).device_offset != end {
            return malformed("it does not begin where the directory says");
        }
        for extent in (0..self.extents_on(page)).map(|at| extent_record(bytes, at)) {
            if extent.device_offset < end {
                return malformed("its extents overlap or are not in order");
            }
            if extent.len == 0 || extent.len as usize > MAX_CHUNK_LEN || extent.end() > limit {
                return malformed("an extent has an impossible length");
            }
            end = extent.end();
        }
        Ok(())
    }

    /// What chunk page `bytes` says about chunk number `chunk`.
    pub(super) fn chunk_on(&self, page: usize, bytes: &[u8], chunk: u32) -> Result<ChunkRequest, TableError> {
        let record = &bytes[(chunk as usize % CHUNKS_PER_PAGE) * CHUNK_RECORD_LEN..][..CHUNK_RECORD_LEN];
        let location = PackLocation {
            pack: PackId(u32_at(record, 32)),
            stored_len: u32_at(record, 36),
            raw_len: u32_at(record, 40),
            offset: u64_at(record, 48),
        };
        let lengths = 1..=MAX_CHUNK_LEN;
        let nowhere = !location.is_absent() && location.pack.0 as usize >= self.packs.len();
        if !lengths.contains(&(location.raw_len as usize)) || nowhere {
            return Err(TableError::Malformed {
                page,
                what: "a chunk has an impossible length or pack",
            });
        }
        Ok(ChunkRequest {
            id: ChunkId::from_bytes(array_at(record, 0)),
            location,
        })
    }
}

/// Record number `at` of an extent page.
pub(super) fn extent_record(page: &[u8], at: usize) -> DeviceExtent {
    let record = &page[at * EXTENT_RECORD_LEN..][..EXTENT_RECORD_LEN];
    DeviceExtent {
        device_offset: u64_at(record, 0),
        chunk: u32_at(record, 8),
        offset: u32_at(record, 12),
        len: u32_at(record, 16),
    }
}
