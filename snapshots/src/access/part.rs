//! Which chunks of a layer are read together.

use super::{Compression, LayerAccess};
use crate::chunk::{Chunk, ChunkId};
use crate::layer::Piece;

/// A plain layer has no spans: so much of it is read together.
const PLAIN_SPAN: u64 = 1 << 20;
/// The most chunks of a part: 16 MiB at most.
const MAX_CHUNKS: usize = 64;

/// Chunks that one read of a layer brings.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Part {
    /// Which of the layer's parts it is: the span, and which group of its chunks.
    pub(crate) number: (u64, usize),
    /// The chunks, in the order of the stream.
    pub(crate) chunks: Vec<Chunk>,
}

impl LayerAccess {
    /// The part with chunk `id`: it and those that are made on the way to it, or behind it out of what has been read for it.
    /// A chunk that takes a second span is only in the part that is asked for by its own name.
    pub(crate) fn part_with(&self, id: ChunkId) -> Option<Part> {
        let asked = self.chunks.iter().position(|chunk| chunk.id == id)?;
        let (span, end) = self.span_of(self.stream_start(asked));
        let mut members: Vec<_> = (0..self.chunks.len())
            .map(|number| (self.stream_start(number), number))
            .filter(|(start, _)| self.span_of(*start).0 == span)
            .collect();
        members.sort_unstable();
        let place = members.iter().position(|(_, number)| *number == asked)?;
        let group = place / MAX_CHUNKS;
        let members = members.chunks(MAX_CHUNKS).nth(group)?.iter().map(|(_, number)| *number);
        let chunks = members.filter(|&number| number == asked || self.stream_end(number) <= end);
        Some(Part {
            number: (span, group),
            chunks: chunks.filter_map(|number| self.chunks.get(number).copied()).collect(),
        })
    }

    fn stream_start(&self, chunk: usize) -> u64 {
        self.places
            .of(chunk)
            .iter()
            .map(|piece| piece.stream)
            .min()
            .unwrap_or(0)
    }

    fn stream_end(&self, chunk: usize) -> u64 {
        self.places.of(chunk).iter().map(Piece::stream_end).max().unwrap_or(0)
    }

    /// Number and end of the span in which the stream has `at`.
    fn span_of(&self, at: u64) -> (u64, u64) {
        if self.compression == Compression::Plain {
            let span = at / PLAIN_SPAN;
            return (span, (span + 1).saturating_mul(PLAIN_SPAN));
        }
        let after = self.checkpoints.partition_point(|checkpoint| checkpoint.stream <= at);
        let end = self.checkpoints.get(after).map_or(self.stream_len, |next| next.stream);
        (after as u64, end)
    }
}
