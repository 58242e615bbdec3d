//! Chunks: the unit of storage, transfer and trust.
//!
//! A chunk is a run of bytes named by its BLAKE3 digest. Everything that a sandbox starts from is made of chunks; who
//! has the name can tell good bytes from bad ones, wherever they came from. This module knows nothing about where
//! chunks are kept: the chunk store does (feature `store`), and the device's [`ChunkSource`](crate::device::ChunkSource)s.

use std::fmt;
use std::str::FromStr;

/// The longest chunk there is. Readers reject anything longer before they allocate for it.
pub const MAX_CHUNK_LEN: usize = 256 * 1024;

/// A chunk's name: the BLAKE3 digest of its (uncompressed) bytes.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ChunkId([u8; ChunkId::LEN]);

impl ChunkId {
    /// Bytes in a name.
    pub const LEN: usize = 32;

    /// The name of `data`.
    pub fn of(data: &[u8]) -> Self {
        Self(*blake3::hash(data).as_bytes())
    }

    /// The name whose digest is `digest`.
    pub const fn from_bytes(digest: [u8; Self::LEN]) -> Self {
        Self(digest)
    }

    /// The digest.
    pub const fn as_bytes(&self) -> &[u8; Self::LEN] {
        &self.0
    }
}

impl fmt::Display for ChunkId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for ChunkId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ChunkId({self})")
    }
}

/// Text that is not a chunk's name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("a chunk's name has 64 hexadecimal digits, {0:?} has not")]
pub struct ParseChunkIdError(String);

impl FromStr for ChunkId {
    type Err = ParseChunkIdError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        blake3::Hash::from_hex(text)
            .map(|hash| Self(*hash.as_bytes()))
            .map_err(|_| ParseChunkIdError(text.chars().take(80).collect()))
    }
}

/// What a chunk sink may fail with: its own error, whatever that is.
pub type SinkError = Box<dyn std::error::Error + Send + Sync + 'static>;

/// Something that keeps chunks: the chunk store, or a map in a test.
pub trait ChunkSink {
    /// Keeps `data` (1 to [`MAX_CHUNK_LEN`] bytes) and returns its name. To put the same bytes again is cheap and changes nothing.
    ///
    /// # Errors
    /// Whatever hinders the sink to keep them; the caller gives up what it was doing.
    fn put(&mut self, data: &[u8]) -> Result<ChunkId, SinkError>;
}

impl<S: ChunkSink + ?Sized> ChunkSink for &mut S {
    fn put(&mut self, data: &[u8]) -> Result<ChunkId, SinkError> {
        (**self).put(data)
    }
}

/// A chunk as lists name it: what it is called and how long it is when unpacked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Chunk {
    /// Its name.
    pub id: ChunkId,
    /// Its length in bytes, 1 to [`MAX_CHUNK_LEN`].
    pub len: u32,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_survives_the_way_through_text() {
        let id = ChunkId::of(b"flint");
        assert_eq!(id.to_string().parse(), Ok(id));
        assert_eq!(id.to_string().len(), 64);
    }

    #[test]
    fn text_that_is_no_name_is_refused() {
        for text in ["", "00", "zz", &"g".repeat(64), &"0".repeat(65)] {
            assert!(text.parse::<ChunkId>().is_err(), "{text:?} was taken");
        }
    }
}
