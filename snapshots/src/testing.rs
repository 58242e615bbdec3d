//! What the tests of several modules share: a chunk sink in a file, and numbers that look random and are not.

use std::collections::HashMap;
use std::fs::File;
use std::io::Write;

use crate::chunk::{ChunkId, ChunkSink, SinkError};
use crate::device::{ImageDevice, PackId, PackLocation, Table};
use crate::image::Image;

/// A chunk store of two packs. Every other chunk is stored as it is, the rest by zstd where that helps.
pub(crate) struct TestPacks {
    files: [File; 2],
    lengths: [u64; 2],
    index: HashMap<ChunkId, PackLocation>,
}

impl TestPacks {
    pub(crate) fn new() -> Self {
        Self {
            files: [tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap()],
            lengths: [0; 2],
            index: HashMap::new(),
        }
    }

    pub(crate) fn locate(&self, id: &ChunkId) -> Option<PackLocation> {
        self.index.get(id).copied()
    }

    pub(crate) fn len(&self) -> usize {
        self.index.len()
    }

    /// The pack files in the order that `table` wants.
    pub(crate) fn files_for(&self, table: &Table) -> Vec<File> {
        table
            .packs()
            .iter()
            .map(|pack| self.files[(pack.0 / 7) as usize].try_clone().unwrap())
            .collect()
    }

    /// The device of `image`, whose metadata is put in first.
    pub(crate) fn device(&mut self, image: &Image) -> ImageDevice {
        image.store_metadata(self).unwrap();
        let table = Table::build(image, |id| self.locate(id)).unwrap();
        ImageDevice::open(file_with(table.as_bytes()), self.files_for(&table)).unwrap()
    }
}

impl ChunkSink for TestPacks {
    fn put(&mut self, data: &[u8]) -> Result<ChunkId, SinkError> {
        let id = ChunkId::of(data);
        if self.index.contains_key(&id) {
            return Ok(id);
        }
        let pack = self.index.len() % 2;
        let packed = zstd::bulk::compress(data, 1)?;
        let stored = if pack == 0 && packed.len() < data.len() {
            &packed[..]
        } else {
            data
        };
        self.files[pack].write_all(stored)?;
        let location = PackLocation {
            pack: PackId(u32::try_from(pack)? * 7),
            offset: self.lengths[pack],
            stored_len: u32::try_from(stored.len())?,
            raw_len: u32::try_from(data.len())?,
        };
        self.lengths[pack] += stored.len() as u64;
        self.index.insert(id, location);
        Ok(id)
    }
}

/// A nameless file with `bytes` in it.
pub(crate) fn file_with(bytes: &[u8]) -> File {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(bytes).unwrap();
    file
}

/// A generator whose numbers depend on its seed only (xorshift64*).
pub(crate) struct Numbers(u64);

impl Numbers {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// A number below `bound`.
    pub(crate) fn below(&mut self, bound: usize) -> usize {
        usize::try_from(self.next() >> 33).unwrap() % bound
    }

    /// `len` bytes that zstd makes smaller.
    pub(crate) fn bytes(&mut self, len: usize) -> Vec<u8> {
        (0..len).map(|_| b'a' + u8::try_from(self.below(16)).unwrap()).collect()
    }
}
