//! A machine's file as a device of chunks: for a reader that brings it piece by piece, and needs nobody then.

use std::fs::File;
use std::sync::Arc;

use super::{MachineError, Machines, blocking, shelf};
use crate::chunk::Chunk;
use crate::device::Table;
use crate::image::Image;

/// A machine's file, opened where its chunks are. It can be read whatever becomes of the machine and of the store.
#[derive(Debug)]
pub struct ChunkedFile {
    /// Names what is in it: the same for files that are alike.
    pub content: String,
    /// Its length in bytes.
    pub len: u64,
    /// The device table, see [`crate::device`].
    pub table: Vec<u8>,
    /// The packs that the table names, in its order.
    pub packs: Vec<File>,
}

impl Machines {
    /// Opens a file of a machine, a multiple of 4096 bytes long.
    ///
    /// # Errors
    /// When there is no such machine or file, a chunk is missing, or the file is not what a device can be.
    pub async fn open(&self, name: &str, file: &str) -> Result<ChunkedFile, MachineError> {
        let (inner, name, file) = (Arc::clone(&self.inner), name.to_owned(), file.to_owned());
        blocking(move || {
            let machine = shelf::get(inner.chunks(), &name)?;
            let found = machine.file(&file).ok_or_else(|| MachineError::NoFile {
                machine: name.clone(),
                file: file.clone(),
            })?;
            let pieces: Vec<(u64, Chunk)> = found.placed().collect();
            let device = Image::of_pieces(found.len(), &pieces);
            let (table, packs) = inner.open_device(&device, &format!("file {file} of machine snapshot {name}"))?;
            Ok(ChunkedFile {
                content: content(found.len(), &pieces),
                len: found.len(),
                table: Table::as_bytes(&table).to_vec(),
                packs,
            })
        })
        .await
    }
}

fn content(len: u64, pieces: &[(u64, Chunk)]) -> String {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&len.to_le_bytes());
    for (offset, chunk) in pieces {
        hasher.update(&offset.to_le_bytes());
        hasher.update(chunk.id.as_bytes());
    }
    hasher.finalize().to_hex().to_string()
}
