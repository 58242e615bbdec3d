//! Chunks that were found elsewhere than the device's table says, since it was opened.

use std::collections::{BTreeMap, VecDeque};
use std::fs::File;
use std::io;

use super::source::{Lane, PackId, PackLocation, SourceError};
use crate::chunk::ChunkId;

/// The most files that are held open for this; beyond it the one that came first goes, and its chunks have to be found again.
const MAX_FILES: usize = 32;

/// A chunk in a file.
#[derive(Debug)]
pub struct FoundChunk {
    /// The file; a pack of the store as a rule.
    pub file: File,
    /// Where in it. Files with one number for a pack are taken for the same, the newer one instead of the older; number 0 is
    /// nobody's.
    pub location: PackLocation,
}

pub(super) struct Found {
    lane: Lane,
    places: BTreeMap<ChunkId, Place>,
    files: VecDeque<Open>,
    next: u64,
}

struct Place {
    /// [`Open::key`].
    file: u64,
    location: PackLocation,
}

struct Open {
    key: u64,
    pack: PackId,
    file: File,
}

impl Found {
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self {
            lane: Lane::new()?,
            places: BTreeMap::new(),
            files: VecDeque::new(),
            next: 0,
        })
    }

    pub(super) fn insert(&mut self, id: ChunkId, chunk: FoundChunk) {
        let FoundChunk { file, location } = chunk;
        let pack = location.pack;
        let known = self.files.iter_mut().find(|open| pack.0 != 0 && open.pack == pack);
        let key = match known {
            Some(open) => {
                open.file = file;
                open.key
            }
            None => self.open(pack, file),
        };
        self.places.insert(id, Place { file: key, location });
    }

    fn open(&mut self, pack: PackId, file: File) -> u64 {
        if self.files.len() >= MAX_FILES
            && let Some(oldest) = self.files.pop_front()
        {
            self.places.retain(|_, place| place.file != oldest.key);
        }
        let key = self.next;
        self.next += 1;
        self.files.push_back(Open { key, pack, file });
        key
    }

    pub(super) fn remove(&mut self, id: ChunkId) {
        self.places.remove(&id);
    }

    /// Fills `chunk`, if it is known where `id` is.
    pub(super) fn read(&mut self, id: ChunkId, chunk: &mut [u8]) -> Option<Result<(), SourceError>> {
        let place = self.places.get(&id)?;
        let open = self.files.iter().find(|open| open.key == place.file)?;
        Some(self.lane.read(&open.file, place.location, chunk))
    }
}
