//! From a layer's tar to a layer index and chunks.

mod encoding;
mod index;

pub use encoding::DecodeError;
pub use index::{Attributes, DeviceNumber, Entry, EntryKind, Extent, LayerIndex, Timestamp, Xattr};
