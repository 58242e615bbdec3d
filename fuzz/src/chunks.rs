//! Chunks in memory, and devices over them.

use std::collections::HashMap;
use std::fs::File;
use std::io::Write;
use std::os::fd::FromRawFd;

use flint_snapshots::chunk::{ChunkId, ChunkSink, SinkError};
use flint_snapshots::device::{ImageDevice, PackId, PackLocation, Table};
use flint_snapshots::image::Image;
use flint_snapshots::layer::Limits;

/// What a target's layers may ask for: enough for every path through the code, little enough to be quick.
pub fn limits() -> Limits {
    Limits {
        max_entries: 2_000,
        max_stream_len: 4 << 20,
        max_file_len: 1 << 32,
        max_segments: 200,
        max_extension_len: 64 << 10,
        max_xattrs_len: 64 << 10,
        max_index_len: 4 << 20,
    }
}

/// A pack in memory: chunks one after the other, as they are.
#[derive(Default)]
pub struct Chunks {
    bytes: Vec<u8>,
    places: HashMap<ChunkId, PackLocation>,
}

impl ChunkSink for Chunks {
    fn put(&mut self, data: &[u8]) -> Result<ChunkId, SinkError> {
        let id = ChunkId::of(data);
        if !self.places.contains_key(&id) {
            let len = u32::try_from(data.len())?;
            let place = PackLocation {
                pack: PackId(0),
                offset: self.bytes.len() as u64,
                stored_len: len,
                raw_len: len,
            };
            self.bytes.extend_from_slice(data);
            self.places.insert(id, place);
        }
        Ok(id)
    }
}

impl Chunks {
    /// The block device of `image`, whose layers were put in here.
    ///
    /// # Panics
    /// When a device cannot be made of an image that was assembled: that is a finding.
    pub fn device(&mut self, image: &Image) -> ImageDevice {
        image.store_metadata(self).expect("memory takes every chunk");
        let table = Table::build(image, |id| self.places.get(id).copied()).expect("all chunks are there");
        let packs = table.packs().iter().map(|_| file_with(&self.bytes)).collect();
        ImageDevice::open(file_with(table.as_bytes()), packs).expect("a table that was just built is good")
    }

    /// Reads the whole device, if it is not too long for a target.
    ///
    /// # Panics
    /// When something cannot be read: that is a finding.
    pub fn read(&mut self, image: &Image) -> Vec<u8> {
        let device = self.device(image);
        let len = usize::try_from(device.size().min(8 << 20)).expect("8 MiB");
        let mut bytes = vec![0; len];
        device.read_at(0, &mut bytes).expect("all chunks are good");
        bytes
    }
}

/// A file in memory with `bytes` in it.
///
/// # Panics
/// When the host has no memory left.
pub fn file_with(bytes: &[u8]) -> File {
    // SAFETY: the name is a NUL-terminated string.
    let fd = unsafe { libc::memfd_create(c"fuzz".as_ptr(), libc::MFD_CLOEXEC) };
    assert!(fd >= 0, "memfd_create");
    // SAFETY: the descriptor is new, and nobody else has it.
    let mut file = unsafe { File::from_raw_fd(fd) };
    file.write_all(bytes).expect("memory");
    file
}
