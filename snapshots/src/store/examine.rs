//! What the store holds, and whether it is still what it was.

use super::{ChunkStore, StoreError, space};
use crate::chunk::ChunkId;

/// What a store holds, as far as it is committed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Usage {
    /// Chunks.
    pub chunks: u64,
    /// Their bytes, uncompressed.
    pub raw_bytes: u64,
    /// Their bytes as they are stored.
    pub stored_bytes: u64,
    /// Pack files.
    pub packs: u64,
    /// Length of the pack files: with headers, and with chunks that nothing needs any more.
    pub pack_bytes: u64,
    /// What the disk has left.
    pub free_bytes: u64,
}

/// How far an examination is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Examined {
    /// Chunks that were read and compared with their names.
    pub chunks: u64,
    /// Of so many.
    pub chunks_total: u64,
    /// Their bytes as they are stored.
    pub bytes: u64,
    /// Of so many.
    pub bytes_total: u64,
}

impl ChunkStore {
    /// What the store holds.
    ///
    /// # Errors
    /// When the index or the file system cannot be asked.
    pub fn usage(&self) -> Result<Usage, StoreError> {
        let packs = self.inner.index.packs()?;
        let dir = &self.inner.packs_dir;
        let usage = Usage {
            packs: packs.len() as u64,
            pack_bytes: packs.iter().map(|(_, length)| length).sum(),
            free_bytes: space::free(dir).map_err(StoreError::io("examining", dir))?,
            ..Usage::default()
        };
        let chunks = self.inner.index.chunks()?.into_iter();
        Ok(chunks.fold(usage, |sum, (_, at)| Usage {
            chunks: sum.chunks + 1,
            raw_bytes: sum.raw_bytes + u64::from(at.raw_len),
            stored_bytes: sum.stored_bytes + u64::from(at.stored_len),
            ..sum
        }))
    }

    /// Reads every chunk, in the order in which they lie, and compares it with its name. `each` is told how far it is, and of a
    /// chunk that is not what it was why; when it answers no, that is the end.
    ///
    /// # Errors
    /// When the index cannot be read.
    pub fn examine(
        &self,
        mut each: impl FnMut(Examined, Option<(ChunkId, StoreError)>) -> bool,
    ) -> Result<(), StoreError> {
        let mut chunks = self.inner.index.chunks()?;
        chunks.sort_unstable_by_key(|(_, at)| (at.pack, at.offset));
        let mut done = Examined {
            chunks_total: chunks.len() as u64,
            bytes_total: chunks.iter().map(|(_, at)| u64::from(at.stored_len)).sum(),
            ..Examined::default()
        };
        for (id, at) in chunks {
            let bad = match self.pack(at.pack).map(|pack| pack.read(id, at)) {
                Some(Ok(_)) => None,
                // A sweep may have moved it since the list was made, or taken it: as it is now counts.
                _ => self.get(id).err(),
            };
            let bad = bad.filter(|_| self.contains(id).unwrap_or(true));
            done.chunks += 1;
            done.bytes += u64::from(at.stored_len);
            if !each(done, bad.map(|error| (id, error))) {
                break;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::unix::fs::FileExt;

    use super::*;
    use crate::store::StoreOptions;

    /// A store with these chunks.
    fn store(dir: &tempfile::TempDir, chunks: &[&[u8]]) -> ChunkStore {
        let store = ChunkStore::open(dir.path(), StoreOptions::default()).unwrap();
        let session = store.session();
        let mut sink = session.sink().unwrap();
        for chunk in chunks {
            sink.put(chunk).unwrap();
        }
        session.commit().unwrap();
        store
    }

    fn damaged(store: &ChunkStore) -> Vec<ChunkId> {
        let mut damaged = Vec::new();
        let mut last = Examined::default();
        let all = |done, bad: Option<(ChunkId, StoreError)>| {
            last = done;
            damaged.extend(bad.map(|(id, _)| id));
            true
        };
        store.examine(all).unwrap();
        assert_eq!((last.chunks, last.bytes), (last.chunks_total, last.bytes_total));
        damaged
    }

    #[test]
    fn usage_counts_chunks_once_and_packs_whole() {
        let dir = tempfile::tempdir().unwrap();
        let zeros = vec![0; 100_000];
        let store = store(&dir, &[b"one", &zeros, b"one"]);
        let usage = store.usage().unwrap();
        assert_eq!((usage.chunks, usage.raw_bytes, usage.packs), (2, 100_003, 1));
        assert!(usage.stored_bytes < 1000, "{usage:?}");
        let on_disk = std::fs::metadata(dir.path().join("packs/00000001.pack")).unwrap().len();
        assert_eq!(usage.pack_bytes, on_disk);
        assert!(usage.free_bytes > 0);
    }

    #[test]
    fn a_chunk_that_is_not_what_it_was_is_found_and_others_are_not_blamed() {
        let dir = tempfile::tempdir().unwrap();
        let store = store(&dir, &[b"one", b"two", b"three"]);
        assert_eq!(damaged(&store), []);
        let two = ChunkId::of(b"two");
        let at = store.locate(&[two]).unwrap()[0];
        let pack = File::options()
            .write(true)
            .open(dir.path().join("packs/00000001.pack"))
            .unwrap();
        pack.write_all_at(b"!", at.offset).unwrap();
        assert_eq!(damaged(&store), [two]);
    }

    #[test]
    fn a_pack_that_was_cut_off_costs_its_last_chunks_and_is_no_panic() {
        let dir = tempfile::tempdir().unwrap();
        let store = store(&dir, &[b"one", b"two", b"three"]);
        let pack = File::options()
            .write(true)
            .open(dir.path().join("packs/00000001.pack"))
            .unwrap();
        let at = store.locate(&[ChunkId::of(b"two")]).unwrap()[0];
        pack.set_len(at.offset + 1).unwrap();
        assert_eq!(damaged(&store), [ChunkId::of(b"two"), ChunkId::of(b"three")]);
    }

    #[test]
    fn whoever_has_heard_enough_ends_it() {
        let dir = tempfile::tempdir().unwrap();
        let store = store(&dir, &[b"one", b"two", b"three"]);
        let mut told = 0;
        let twice = |_, _| {
            told += 1;
            told < 2
        };
        store.examine(twice).unwrap();
        assert_eq!(told, 2);
    }
}
