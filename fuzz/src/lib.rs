//! What several fuzz targets share: chunks in memory, and a virtio driver that writes whatever it is told.

pub mod chunks;
pub mod virtio;
