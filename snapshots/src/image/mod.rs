//! From layers to one file tree, and from the tree to an EROFS device.

use crate::chunk::{Chunk, ChunkSink, SinkError};
use crate::device::DeviceExtent;

/// How long metadata chunks are: they are read in single blocks all over, so shorter than data.
pub(crate) const METADATA_CHUNK_LEN: usize = 64 * 1024;

/// An image as a device: EROFS metadata, and which chunk holds which of the device's bytes.
///
/// The same layers give the same image, byte for byte.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Image {
    pub(crate) metadata: Vec<u8>,
    pub(crate) size: u64,
    pub(crate) chunks: Vec<Chunk>,
    pub(crate) extents: Vec<DeviceExtent>,
}

impl Image {
    /// The device's length in bytes: a multiple of 4096.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// All chunks of the device, each once; those of the metadata first, then data in the order in which it lies on the device.
    pub fn chunks(&self) -> &[Chunk] {
        &self.chunks
    }

    /// Where chunks lie on the device, by ascending offset, not overlapping; all the rest is zeros.
    pub fn extents(&self) -> &[DeviceExtent] {
        &self.extents
    }

    /// The EROFS metadata: the device's first bytes, a multiple of 4096.
    pub fn metadata(&self) -> &[u8] {
        &self.metadata
    }

    /// Puts the metadata into `sink`: data is there since the layers were read, metadata is not. To be done before
    /// [`Table::build`](crate::device::Table::build) looks for it.
    ///
    /// # Errors
    /// Those of `sink`.
    pub fn store_metadata(&self, sink: &mut impl ChunkSink) -> Result<(), SinkError> {
        self.metadata
            .chunks(METADATA_CHUNK_LEN)
            .try_for_each(|chunk| sink.put(chunk).map(drop))
    }
}
