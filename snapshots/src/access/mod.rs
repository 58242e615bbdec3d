//! Random access into layers as registries have them.
//!
//! A compressed layer can only be read from its start. Whoever did so once can tell others where to begin in the middle:
//! [`Decompress`] notes *checkpoints* while a layer is ingested, and a [`LayerAccess`] keeps them, together with where each
//! chunk lies in the uncompressed stream. With it, a [`LayerSource`] makes any chunk from a ranged read of the unmodified layer.
//!
//! ```text
//!   blob (as stored)   |------------|-----------|------------|------|    checkpoints, about 4 MiB of output apart
//!                      v            v window    v window     v member
//!   stream (tar)       |..h ffff h f|fff h ff...|............|......|
//!                           \__ pieces __/
//!   chunk                    [ffff|ffff|ff]      verified by BLAKE3 before anybody gets it
//! ```
//!
//! | layer | a checkpoint is | it has |
//! |---|---|---|
//! | plain tar | not needed | - |
//! | gzip | a DEFLATE block's start, to the bit | the 32 KiB of output before it, by zstd |
//! | gzip of several members (eStargz) | also a member's start | nothing |
//! | zstd of several frames (zstd:chunked) | a frame's start | nothing |
//!
//! A layer that is one zstd frame has one checkpoint, its start: [`LayerAccess::longest_span`] tells what that costs.

mod decompress;
mod encoding;
mod inflate;
mod part;
mod source;
#[cfg(test)]
mod tests;

pub(crate) use decompress::Decompress;
pub(crate) use part::Part;
pub use source::{BlobRanges, LayerSource, LayerSourceError};

use crate::chunk::Chunk;
use crate::layer::Places;
use crate::registry::Digest;

/// How a layer is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compression {
    /// As it is.
    Plain,
    /// gzip, RFC 1952; one member or several.
    Gzip,
    /// zstd, RFC 8878; one frame or several.
    Zstd,
}

/// A place in a compressed layer from where it can be read on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Checkpoint {
    /// Where in the layer as it is stored, in bits.
    pub stored_bits: u64,
    /// Where in the uncompressed stream.
    pub stream: u64,
    /// zstd of the output before; empty at the start of a gzip member or a zstd frame, which refer to nothing before.
    pub window: Vec<u8>,
}

/// How to get any chunk of a layer from the layer as a registry has it.
///
/// Nothing in it is to be believed but the chunks' names: it says where to look, and what is found there is verified.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayerAccess {
    /// Digest of the layer as it is stored.
    pub blob: Digest,
    /// Its length.
    pub blob_len: u64,
    /// Digest of the uncompressed stream.
    pub diff_id: Digest,
    /// The stream's length.
    pub stream_len: u64,
    /// How it is stored.
    pub compression: Compression,
    /// By ascending place, the first at the start; none for a plain layer.
    pub checkpoints: Vec<Checkpoint>,
    /// The layer's distinct chunks, in the order of its index.
    pub chunks: Vec<Chunk>,
    /// Where each of the chunks lies in the stream.
    pub places: Places,
}

impl LayerAccess {
    /// The most bytes of output that have to be made to reach one byte.
    pub fn longest_span(&self) -> u64 {
        if self.compression == Compression::Plain {
            return 0;
        }
        let ends = self.checkpoints.iter().skip(1).map(|checkpoint| checkpoint.stream);
        let ends = ends.chain([self.stream_len]);
        let spans = self.checkpoints.iter().zip(ends).map(|(start, end)| end - start.stream);
        spans.max().unwrap_or(0)
    }

    /// Bytes of the checkpoints' windows, which are most of an encoded access.
    pub fn windows_len(&self) -> usize {
        self.checkpoints.iter().map(|checkpoint| checkpoint.window.len()).sum()
    }
}
