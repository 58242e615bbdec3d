//! The name of what a device shows: the same wherever its chunks lie.

use std::fs::File;

use super::source::PackLocation;
use super::table::{OpenTable, extent_record};
use super::{OpenError, TableError};
use crate::chunk::ChunkId;

/// Before everything else in the digest, so that it is none of anything else.
const CONTEXT: &[u8] = b"flint device content 1\n";

/// Why a device has no name.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ContentError {
    /// Its table was not taken.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// A page of its table was not believed.
    #[error(transparent)]
    Table(#[from] TableError),
}

/// "blake3:" and the digest of a device's size, of the names and lengths of its chunks, and of which bytes of them are where. Two tables
/// of one name show the same bytes; the same bytes cut otherwise have another name.
pub(crate) fn content_name(table: File) -> Result<String, ContentError> {
    let table = OpenTable::open(table)?;
    let mut hasher = blake3::Hasher::new();
    hasher.update(CONTEXT).update(&table.size().to_le_bytes());
    for page in 0..table.chunk_pages() {
        let bytes = table.read_page(page)?;
        for chunk in table.chunks_on(page) {
            let request = table.chunk_on(page, &bytes, chunk)?;
            hasher.update(request.id.as_bytes());
            hasher.update(&request.location.raw_len.to_le_bytes());
        }
    }
    let mut next = table.extent_page_for(0);
    while let Some(page) = next {
        let bytes = table.read_page(page)?;
        for at in 0..table.extents_on(page) {
            let extent = extent_record(&bytes, at);
            hasher.update(&extent.device_offset.to_le_bytes());
            for part in [extent.chunk, extent.offset, extent.len] {
                hasher.update(&part.to_le_bytes());
            }
        }
        next = table.page_after(page);
    }
    Ok(format!("blake3:{}", hasher.finalize()))
}

/// The chunks of a device and where its table says that they are, packs by their numbers in the store.
pub(crate) fn placed_chunks(table: File) -> Result<Vec<(ChunkId, PackLocation)>, ContentError> {
    let table = OpenTable::open(table)?;
    let mut placed = Vec::new();
    for page in 0..table.chunk_pages() {
        let bytes = table.read_page(page)?;
        for chunk in table.chunks_on(page) {
            let request = table.chunk_on(page, &bytes, chunk)?;
            let mut location = request.location;
            // An absent chunk is in no pack; of others the place in the list was checked.
            if let Some(pack) = table
                .packs()
                .get(location.pack.0 as usize)
                .filter(|_| !location.is_absent())
            {
                location.pack = *pack;
            }
            placed.push((request.id, location));
        }
    }
    Ok(placed)
}
