//! Chunks for the way: a registry is no place for a thousand blobs of a few kilobytes.
//!
//! A bundle ends behind a chunk whose name says so, or when it is full. So two machines that differ in a few chunks have most of
//! their bundles in common, whatever came before the difference, and a registry that has one needs little for the other.

use std::ops::Range;

use crate::chunk::{Chunk, ChunkId};

/// The most chunks of a bundle: 16 MiB of them, before they are packed.
pub(super) const MAX_CHUNKS: usize = 64;
/// One chunk of so many ends a bundle.
const MEAN_CHUNKS: u8 = 24;
/// Bytes that are not wanted and yet fetched with what is before and behind them: cheaper than another request.
const MAX_GAP: u64 = 256 << 10;

/// Chunks one after the other, as the store has them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Bundle {
    pub(super) entries: Vec<Entry>,
}

/// A chunk in a bundle.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Entry {
    pub(super) id: ChunkId,
    /// Bytes that it takes there: as many as it has, or fewer if it is a zstd frame.
    pub(super) stored_len: u32,
}

/// Neighbours in a bundle that are fetched together.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Part {
    /// Bytes of the bundle.
    pub(super) bytes: Range<u64>,
    /// Which entries they are.
    pub(super) entries: Range<usize>,
}

/// Which chunks travel together.
pub(super) fn divide(chunks: &[Chunk]) -> Vec<&[Chunk]> {
    let ends = |chunk: &Chunk| chunk.id.as_bytes()[0].is_multiple_of(MEAN_CHUNKS);
    let bundles = chunks.split_inclusive(ends);
    bundles.flat_map(|bundle| bundle.chunks(MAX_CHUNKS)).collect()
}

impl Bundle {
    pub(super) fn len(&self) -> u64 {
        self.entries.iter().map(|entry| u64::from(entry.stored_len)).sum()
    }

    /// What to fetch for the entries that are wanted.
    pub(super) fn parts(&self, wanted: impl Fn(ChunkId) -> bool) -> Vec<Part> {
        let mut parts: Vec<Part> = Vec::new();
        let mut start = 0;
        for (at, entry) in self.entries.iter().enumerate() {
            let end = start + u64::from(entry.stored_len);
            if wanted(entry.id) {
                match parts.last_mut() {
                    Some(part) if start - part.bytes.end <= MAX_GAP => {
                        part.bytes.end = end;
                        part.entries.end = at + 1;
                    }
                    _ => parts.push(Part {
                        bytes: start..end,
                        entries: at..at + 1,
                    }),
                }
            }
            start = end;
        }
        parts
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ids(range: Range<u32>) -> Vec<ChunkId> {
        range.map(|n| ChunkId::of(&n.to_le_bytes())).collect()
    }

    #[test]
    fn a_difference_changes_the_bundles_around_it_only() {
        let chunks = |range| -> Vec<_> { ids(range).into_iter().map(|id| Chunk { id, len: 1 }).collect() };
        let before = chunks(0..4000);
        let mut after = before.clone();
        after.splice(2000..2003, chunks(5000..5001));
        let (before, after) = (divide(&before), divide(&after));
        assert_eq!(before.concat().len(), 4000);
        assert!(before.iter().all(|bundle| (1..=MAX_CHUNKS).contains(&bundle.len())));
        let new = after.iter().filter(|bundle| !before.contains(bundle)).count();
        assert!((1..=4).contains(&new), "{new} of {}", after.len());
        assert!(divide(&[]).is_empty());
    }

    #[test]
    fn neighbours_are_fetched_together_and_small_gaps_with_them() {
        let entries = [100_000, 200_000, 200_000, 200_000, 50];
        let ids = ids(0..5);
        let entries = entries
            .into_iter()
            .zip(&ids)
            .map(|(stored_len, id)| Entry { id: *id, stored_len });
        let bundle = Bundle {
            entries: entries.collect(),
        };
        let parts = |wanted: &[usize]| bundle.parts(|id| wanted.iter().any(|at| ids[*at] == id));
        let part = |bytes, entries| Part { bytes, entries };
        assert_eq!(parts(&[]), []);
        assert_eq!(parts(&[0, 1, 2, 3, 4]), [part(0..700_050, 0..5)]);
        assert_eq!(
            parts(&[0, 2]),
            [part(0..500_000, 0..3)],
            "200,000 bytes between them are no harm"
        );
        assert_eq!(parts(&[0, 3]), [part(0..100_000, 0..1), part(500_000..700_000, 3..4)]);
    }
}
