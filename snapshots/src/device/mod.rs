//! An image as a read-only block device made of chunks.

mod source;

pub use source::{ChunkRequest, ChunkSource, PackId, PackLocation, Packs, SourceError};
