//! Writing device tables.

use std::collections::BTreeMap;
use std::io::{self, Write};

use super::source::{PackId, PackLocation};
use super::table::{
    CHUNK_RECORD_LEN, CHUNKS_PER_PAGE, DIRECTORY_ENTRY_LEN, EXTENT_RECORD_LEN, EXTENTS_PER_PAGE, HASHED_HEADER_LEN,
    HEADER_LEN, MAGIC, MAX_PACKS, PAGE_LEN, Shape, VERSION, VERSION_WHOLE, extent_record, page_digest,
};
use crate::chunk::{Chunk, ChunkId};
use crate::image::Image;

/// A device table, ready to be written to a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Table {
    bytes: Vec<u8>,
    packs: Vec<PackId>,
}

/// Why a table could not be made.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// The store does not have a chunk.
    #[error("chunk {0} of the image is not in the chunk store: pull the image again")]
    MissingChunk(ChunkId),
    /// The store has something else under that name.
    #[error("chunk {id} has {expected} bytes in the image and {found} in the chunk store")]
    WrongLength {
        /// The chunk.
        id: ChunkId,
        /// Its length in the image.
        expected: u32,
        /// Its length in the store.
        found: u32,
    },
    /// Too many packs for one device.
    #[error("the image's chunks are scattered over {0} packs, a device can have {MAX_PACKS}: compact the chunk store")]
    TooManyPacks(usize),
    /// Too many chunks or extents for one device.
    #[error("the image has {chunks} chunks and {extents} pieces of files, more than a device table holds")]
    TooBig {
        /// Chunks.
        chunks: usize,
        /// Pieces.
        extents: usize,
    },
}

impl Table {
    /// The table of `image`, whose chunks lie where `locate` says. Those that it says are [absent](PackLocation::absent) have to be
    /// fetched by whoever reads the device.
    ///
    /// # Errors
    /// [`BuildError`] when a chunk is not there, or the image is beyond what one device can have.
    pub fn build(image: &Image, locate: impl Fn(&ChunkId) -> Option<PackLocation>) -> Result<Self, BuildError> {
        let locations = image
            .chunks()
            .iter()
            .map(|chunk| locate_one(chunk, &locate))
            .collect::<Result<Vec<_>, _>>()?;
        let here = locations.iter().filter(|location| !location.is_absent());
        let mut packs: BTreeMap<PackId, u32> = here.map(|location| (location.pack, 0)).collect();
        for (slot, number) in packs.values_mut().zip(0..) {
            *slot = number;
        }
        if packs.len() > MAX_PACKS {
            return Err(BuildError::TooManyPacks(packs.len()));
        }
        let (chunks, extents) = (image.chunks().len(), image.extents().len());
        let shape = Shape::new(packs.len(), chunks, extents).ok_or(BuildError::TooBig { chunks, extents })?;
        let mut bytes = vec![0; shape.pages_at + shape.pages * PAGE_LEN];
        let (head, pages) = bytes.split_at_mut(shape.pages_at);
        let (chunk_pages, extent_pages) = pages.split_at_mut(shape.chunk_pages * PAGE_LEN);
        write_chunks(chunk_pages, image.chunks(), &locations, &packs);
        write_extents(extent_pages, image);
        let whole = !locations.iter().any(PackLocation::is_absent);
        let version = if whole { VERSION_WHOLE } else { VERSION };
        write_head(head, pages, image, &packs, &shape, version);
        Ok(Self {
            bytes,
            packs: packs.into_keys().collect(),
        })
    }

    /// The packs that the device needs, in the order in which it wants their files.
    pub fn packs(&self) -> &[PackId] {
        &self.packs
    }

    /// The table as it is to be in its file.
    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Writes the table to `out`, which is not flushed.
    ///
    /// # Errors
    /// Those of `out`.
    pub fn write_to(&self, mut out: impl Write) -> io::Result<()> {
        out.write_all(&self.bytes)
    }
}

/// Makes the digests of a changed table good again, as somebody would who wants to deceive. A table that is too short for
/// its counts stays as it is.
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) fn seal(table: &mut [u8]) {
    use crate::bytes::u32_at;
    if table.len() < HEADER_LEN {
        return;
    }
    let count = |at| u32_at(table, at) as usize;
    let packs = count(12);
    let Some(shape) = Shape::new(packs, count(24), count(28)) else {
        return;
    };
    if table.len() < shape.pages_at + shape.pages * PAGE_LEN {
        return;
    }
    for page in 0..shape.pages {
        let digest = page_digest(&table[shape.pages_at + page * PAGE_LEN..][..PAGE_LEN]);
        table[HEADER_LEN + packs * 4 + page * DIRECTORY_ENTRY_LEN + 8..][..digest.len()].copy_from_slice(&digest);
    }
    let mut hasher = blake3::Hasher::new();
    hasher
        .update(&table[..HASHED_HEADER_LEN])
        .update(&table[HEADER_LEN..HEADER_LEN + shape.directory_len]);
    table[HASHED_HEADER_LEN..HEADER_LEN].copy_from_slice(hasher.finalize().as_bytes());
}

fn locate_one(chunk: &Chunk, locate: impl Fn(&ChunkId) -> Option<PackLocation>) -> Result<PackLocation, BuildError> {
    let location = locate(&chunk.id).ok_or(BuildError::MissingChunk(chunk.id))?;
    if location.raw_len != chunk.len {
        return Err(BuildError::WrongLength {
            id: chunk.id,
            expected: chunk.len,
            found: location.raw_len,
        });
    }
    Ok(location)
}

fn write_chunks(pages: &mut [u8], chunks: &[Chunk], locations: &[PackLocation], packs: &BTreeMap<PackId, u32>) {
    const { assert!(CHUNKS_PER_PAGE * CHUNK_RECORD_LEN == PAGE_LEN) };
    for ((record, chunk), location) in pages.chunks_exact_mut(CHUNK_RECORD_LEN).zip(chunks).zip(locations) {
        record[..32].copy_from_slice(chunk.id.as_bytes());
        let pack = packs.get(&location.pack).copied().unwrap_or(0);
        record[32..36].copy_from_slice(&pack.to_le_bytes());
        record[36..40].copy_from_slice(&location.stored_len.to_le_bytes());
        record[40..44].copy_from_slice(&location.raw_len.to_le_bytes());
        record[48..56].copy_from_slice(&location.offset.to_le_bytes());
    }
}

fn write_extents(pages: &mut [u8], image: &Image) {
    for (page, extents) in pages
        .chunks_exact_mut(PAGE_LEN)
        .zip(image.extents().chunks(EXTENTS_PER_PAGE))
    {
        for (record, extent) in page.chunks_exact_mut(EXTENT_RECORD_LEN).zip(extents) {
            record[..8].copy_from_slice(&extent.device_offset.to_le_bytes());
            record[8..12].copy_from_slice(&extent.chunk.to_le_bytes());
            record[12..16].copy_from_slice(&extent.offset.to_le_bytes());
            record[16..20].copy_from_slice(&extent.len.to_le_bytes());
        }
    }
}

fn write_head(
    head: &mut [u8],
    pages: &[u8],
    image: &Image,
    packs: &BTreeMap<PackId, u32>,
    shape: &Shape,
    version: u32,
) {
    let mut directory = Vec::with_capacity(shape.directory_len);
    for pack in packs.keys() {
        directory.extend_from_slice(&pack.0.to_le_bytes());
    }
    for (number, page) in pages.chunks_exact(PAGE_LEN).enumerate() {
        let first = if number < shape.chunk_pages {
            0
        } else {
            extent_record(page, 0).device_offset
        };
        directory.extend_from_slice(&first.to_le_bytes());
        directory.extend_from_slice(&page_digest(page));
    }
    debug_assert_eq!(directory.len(), packs.len() * 4 + shape.pages * DIRECTORY_ENTRY_LEN);
    // The shape has checked that counts fit into 32 bits.
    let count = |len: usize| u32::try_from(len).unwrap_or(u32::MAX).to_le_bytes();
    head[..8].copy_from_slice(MAGIC);
    head[8..12].copy_from_slice(&version.to_le_bytes());
    head[12..16].copy_from_slice(&count(packs.len()));
    head[16..24].copy_from_slice(&image.size().to_le_bytes());
    head[24..28].copy_from_slice(&count(image.chunks().len()));
    head[28..32].copy_from_slice(&count(image.extents().len()));
    let mut hasher = blake3::Hasher::new();
    hasher.update(&head[..HASHED_HEADER_LEN]).update(&directory);
    head[HASHED_HEADER_LEN..HEADER_LEN].copy_from_slice(hasher.finalize().as_bytes());
    head[HEADER_LEN..HEADER_LEN + directory.len()].copy_from_slice(&directory);
}
