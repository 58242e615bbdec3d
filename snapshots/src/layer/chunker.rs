//! Cutting files into chunks so that a layer that is built anew shares most of them with the one before.
//!
//! A long file is cut at fixed distances from its start. Short files are gathered, in the tar's order, into packs that are
//! cut between two files only: where depends on the path of the file before the cut, so a file that changes, comes or
//! goes moves no cut but those next to it.
//!
//! ```text
//!   files   | a | b | c  |d|   long file          | e |  f  | g |
//!                          \                      /
//!   chunks  [a b c d e f][g ...   [256 KiB][256 KiB][rest]
//! ```

use std::collections::HashMap;

use super::index::{Entry, EntryKind, Extent, LayerIndex};
use super::places::{Piece, Places};
use super::{LayerError, Limits};
use crate::chunk::{Chunk, ChunkId, ChunkSink, MAX_CHUNK_LEN};

/// Files from this length on have chunks of their own.
pub(super) const LONG_FILE: usize = 128 * 1024;
/// The distance of cuts in a long file.
pub(super) const CUT: usize = MAX_CHUNK_LEN;
/// A pack is never longer, because each of its files is shorter than a long file.
const MAX_PACK: usize = LONG_FILE;
/// A pack of at least this length may end after a file that says so.
const MIN_PACK: usize = 64 * 1024;
/// One path in four says so.
const CUT_MASK: u8 = 3;

/// Builds a layer index, and puts chunks into a sink. Beside it is kept where in the stream each chunk came from.
pub(super) struct Chunker<'s, S> {
    sink: &'s mut S,
    limits: &'s Limits,
    index: LayerIndex,
    places: Places,
    /// Memory that the entries take.
    index_len: usize,
    numbers: HashMap<ChunkId, u32>,
    pack: Vec<u8>,
    /// Entries whose content is in the pack, with offset and length there.
    waiting: Vec<(usize, u32, u32)>,
    /// Where the pack's content came from.
    pack_pieces: Vec<Piece>,
}

impl<'s, S: ChunkSink> Chunker<'s, S> {
    pub(super) fn new(sink: &'s mut S, limits: &'s Limits) -> Self {
        Self {
            sink,
            limits,
            index: LayerIndex::default(),
            places: Places::default(),
            index_len: 0,
            numbers: HashMap::new(),
            pack: Vec::new(),
            waiting: Vec::new(),
            pack_pieces: Vec::new(),
        }
    }

    /// Adds an entry whose content, if it has any, is put already.
    pub(super) fn push(&mut self, entry: Entry) -> Result<(), LayerError> {
        let Limits {
            max_entries,
            max_index_len,
            ..
        } = *self.limits;
        let limit = |what, limit: usize| LayerError::Limit {
            what,
            limit: limit as u64,
        };
        if self.index.entries.len() >= max_entries {
            return Err(limit("files in a layer", max_entries));
        }
        self.index_len += entry.memory_len();
        if self.index_len > max_index_len {
            return Err(limit("bytes of paths and attributes", max_index_len));
        }
        self.index.entries.push(entry);
        Ok(())
    }

    /// Adds a file that is shorter than [`LONG_FILE`], whose content is `data`, which came in `pieces`.
    pub(super) fn push_short(&mut self, entry: Entry, data: &[u8], pieces: &[Piece]) -> Result<(), LayerError> {
        if is_zero(data) {
            return self.push(entry);
        }
        if self.pack.len() + data.len() > MAX_PACK {
            self.cut()?;
        }
        let cut_after = blake3::hash(&entry.path).as_bytes()[0] & CUT_MASK == 0;
        self.waiting
            .push((self.index.entries.len(), len32(self.pack.len()), len32(data.len())));
        self.push(entry)?;
        let start = len32(self.pack.len());
        self.pack_pieces.extend(pieces.iter().map(|piece| Piece {
            offset: start + piece.offset,
            ..*piece
        }));
        self.pack.extend_from_slice(data);
        if self.pack.len() >= MIN_PACK && cut_after {
            self.cut()
        } else {
            Ok(())
        }
    }

    /// The extent of a long file's piece at `file_offset`, which came in `pieces`; `None` if it is all zeros, which need no storing.
    pub(super) fn put_piece(
        &mut self,
        file_offset: u64,
        data: &[u8],
        pieces: &[Piece],
    ) -> Result<Option<Extent>, LayerError> {
        if is_zero(data) {
            return Ok(None);
        }
        let chunk = self.put(data, pieces)?;
        Ok(Some(Extent {
            file_offset,
            chunk,
            offset: 0,
            len: len32(data.len()),
        }))
    }

    /// The index, and where the chunks lie, when all files have come.
    pub(super) fn finish(mut self) -> Result<(LayerIndex, Places), LayerError> {
        self.cut()?;
        Ok((self.index, self.places))
    }

    fn cut(&mut self) -> Result<(), LayerError> {
        if self.pack.is_empty() {
            return Ok(());
        }
        let pack = std::mem::take(&mut self.pack);
        let pieces = std::mem::take(&mut self.pack_pieces);
        let chunk = self.put(&pack, &pieces)?;
        for (entry, offset, len) in self.waiting.drain(..) {
            if let EntryKind::File { extents, .. } = &mut self.index.entries[entry].kind {
                extents.push(Extent {
                    file_offset: 0,
                    chunk,
                    offset,
                    len,
                });
            }
        }
        (self.pack, self.pack_pieces) = (pack, pieces);
        self.pack.clear();
        self.pack_pieces.clear();
        Ok(())
    }

    fn put(&mut self, data: &[u8], pieces: &[Piece]) -> Result<u32, LayerError> {
        let id = self.sink.put(data).map_err(LayerError::Store)?;
        if let Some(&number) = self.numbers.get(&id) {
            return Ok(number);
        }
        let number = u32::try_from(self.index.chunks.len()).map_err(|_| LayerError::Limit {
            what: "chunks",
            limit: u32::MAX.into(),
        })?;
        self.numbers.insert(id, number);
        self.index_len += size_of_val(pieces);
        self.places.push(pieces);
        self.index.chunks.push(Chunk {
            id,
            len: len32(data.len()),
        });
        Ok(number)
    }
}

/// For lengths of packs and pieces, which are not longer than a chunk.
fn len32(len: usize) -> u32 {
    u32::try_from(len).unwrap_or(u32::MAX)
}

fn is_zero(data: &[u8]) -> bool {
    data.iter().all(|&byte| byte == 0)
}
