//! Where in a layer's uncompressed stream its chunks lie.

/// A run of a chunk's bytes as the stream has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Piece {
    /// Where in the stream.
    pub stream: u64,
    /// Where in the chunk.
    pub offset: u32,
    /// How many bytes; more than none.
    pub len: u32,
}

impl Piece {
    /// Where in the stream it ends.
    pub fn stream_end(&self) -> u64 {
        self.stream.saturating_add(self.len.into())
    }
}

/// The pieces of each chunk of a layer, in the order of [`LayerIndex::chunks`](super::LayerIndex::chunks), by ascending
/// offset in the chunk. A chunk of many small files has a piece for each; what no piece covers is zero (sparse files).
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Places {
    pieces: Vec<Piece>,
    /// For each chunk the end of its pieces.
    ends: Vec<usize>,
}

impl Places {
    /// Adds the pieces of the next chunk.
    pub(crate) fn push(&mut self, pieces: &[Piece]) {
        self.pieces.extend_from_slice(pieces);
        self.ends.push(self.pieces.len());
    }

    /// The pieces of chunk number `chunk`; none for one that there is not.
    pub fn of(&self, chunk: usize) -> &[Piece] {
        let start = chunk.checked_sub(1).and_then(|before| self.ends.get(before)).copied();
        let end = self.ends.get(chunk).copied().unwrap_or(0);
        self.pieces.get(start.unwrap_or(0)..end).unwrap_or_default()
    }

    /// All pieces, chunk by chunk.
    pub fn pieces(&self) -> &[Piece] {
        &self.pieces
    }

    /// How many chunks are placed.
    pub fn chunks(&self) -> usize {
        self.ends.len()
    }
}
