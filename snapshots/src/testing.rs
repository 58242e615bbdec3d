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

/// Writes tars, good ones and bad ones.
#[derive(Default, Clone)]
pub(crate) struct TarBuilder {
    bytes: Vec<u8>,
    records: Vec<u8>,
}

/// The attributes of a member.
#[derive(Clone, Copy)]
pub(crate) struct Meta {
    pub(crate) mode: u16,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) mtime: i64,
}

impl Default for Meta {
    fn default() -> Self {
        Self {
            mode: 0o644,
            uid: 0,
            gid: 0,
            mtime: 1_700_000_000,
        }
    }
}

impl TarBuilder {
    /// A record of an extended header for the next member.
    pub(crate) fn pax(&mut self, key: &str, value: &[u8]) -> &mut Self {
        let body = key.len() + value.len() + 3;
        let len = (body + 1..).find(|len| len - body == len.to_string().len()).unwrap();
        self.records.extend_from_slice(format!("{len} {key}=").as_bytes());
        self.records.extend_from_slice(value);
        self.records.push(b'\n');
        self
    }

    pub(crate) fn file(&mut self, path: &str, data: &[u8]) -> &mut Self {
        self.member(path, b'0', data, "", Meta::default())
    }

    pub(crate) fn dir(&mut self, path: &str) -> &mut Self {
        self.member(
            path,
            b'5',
            b"",
            "",
            Meta {
                mode: 0o755,
                ..Meta::default()
            },
        )
    }

    pub(crate) fn symlink(&mut self, path: &str, target: &str) -> &mut Self {
        self.member(
            path,
            b'2',
            b"",
            target,
            Meta {
                mode: 0o777,
                ..Meta::default()
            },
        )
    }

    pub(crate) fn hard_link(&mut self, path: &str, target: &str) -> &mut Self {
        self.member(path, b'1', b"", target, Meta::default())
    }

    pub(crate) fn device(&mut self, path: &str, kind: u8, major: u32, minor: u32) -> &mut Self {
        self.flush(path, "");
        let mut header = header(path, kind, 0, "", Meta::default());
        header[329..336].copy_from_slice(format!("{major:07o}").as_bytes());
        header[337..344].copy_from_slice(format!("{minor:07o}").as_bytes());
        self.raw(header, b"")
    }

    /// Any member. What does not fit into the header goes into an extended one.
    pub(crate) fn member(&mut self, path: &str, kind: u8, data: &[u8], link: &str, meta: Meta) -> &mut Self {
        self.flush(path, link);
        self.raw(header(path, kind, data.len() as u64, link, meta), data)
    }

    /// A header whose checksum is made good, and its data.
    pub(crate) fn raw(&mut self, mut header: [u8; 512], data: &[u8]) -> &mut Self {
        header[148..156].fill(b' ');
        let sum: u32 = header.iter().map(|&byte| u32::from(byte)).sum();
        header[148..155].copy_from_slice(format!("{sum:06o}\0").as_bytes());
        self.bytes.extend_from_slice(&header);
        self.bytes.extend_from_slice(data);
        self.bytes.resize(self.bytes.len().next_multiple_of(512), 0);
        self
    }

    fn flush(&mut self, path: &str, link: &str) {
        if path.len() > 100 {
            self.pax("path", path.as_bytes());
        }
        if link.len() > 100 {
            self.pax("linkpath", link.as_bytes());
        }
        let records = std::mem::take(&mut self.records);
        if !records.is_empty() {
            self.raw(header("pax", b'x', records.len() as u64, "", Meta::default()), &records);
        }
    }

    pub(crate) fn finish(&self) -> Vec<u8> {
        [&self.bytes[..], &[0; 1024]].concat()
    }
}

/// A ustar header without its checksum.
pub(crate) fn header(path: &str, kind: u8, size: u64, link: &str, meta: Meta) -> [u8; 512] {
    let mut header = [0; 512];
    let mut put = |at: usize, text: &str| header[at..at + text.len()].copy_from_slice(text.as_bytes());
    put(0, path.get(..100).unwrap_or(path));
    put(100, &format!("{:07o}", meta.mode));
    put(108, &format!("{:07o}", meta.uid));
    put(116, &format!("{:07o}", meta.gid));
    put(124, &format!("{size:011o}"));
    put(136, &format!("{:011o}", meta.mtime));
    put(157, link.get(..100).unwrap_or(link));
    put(257, "ustar\x0000");
    header[156] = kind;
    header
}
