//! From a layer's tar to a layer index and chunks.

mod chunker;
mod encoding;
mod index;
mod ingest;
mod places;
mod tar;
#[cfg(test)]
mod tests;

use std::io;

pub use encoding::DecodeError;
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) use encoding::seal;
pub(crate) use encoding::{HEADER_LEN, Reader, close, count, open, put_int};
pub use index::{Attributes, DeviceNumber, Entry, EntryKind, Extent, LayerIndex, Timestamp, Xattr};
pub use ingest::{ingest, ingest_placed};
pub use places::{Piece, Places};

use crate::chunk::SinkError;

/// Linux's PATH_MAX less the final zero byte: a longer path cannot be unpacked by any engine.
pub(crate) const MAX_PATH_LEN: usize = 4095;
/// Linux's NAME_MAX.
pub(crate) const MAX_NAME_LEN: usize = 255;

/// How much a layer may ask for. Each limit is checked before anything is allocated.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limits {
    /// Members of the tar.
    pub max_entries: usize,
    /// Bytes of the uncompressed tar.
    pub max_stream_len: u64,
    /// Length of one file, holes included.
    pub max_file_len: u64,
    /// Pieces of one sparse file.
    pub max_segments: usize,
    /// Bytes of the extended headers (PAX, GNU long names) of one member.
    pub max_extension_len: usize,
    /// Names and values of the extended attributes of one file.
    pub max_xattrs_len: usize,
    /// Memory that the layer's index takes: paths, targets, attributes and maps of its members.
    pub max_index_len: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            max_entries: 2_000_000,
            max_stream_len: 256 << 30,
            max_file_len: 1 << 40,
            max_segments: 100_000,
            max_extension_len: 1 << 20,
            max_xattrs_len: 128 << 10,
            max_index_len: 256 << 20,
        }
    }
}

impl Limits {
    /// A layer of this many bytes is not suspected of being a bomb, however small it is when compressed.
    const HARMLESS_LEN: u64 = 1 << 30;
    /// How many times bigger than compressed a layer may be beyond that. Real ones are two to four times bigger, DEFLATE
    /// ends at 1032 and zstd at several thousand.
    const MAX_EXPANSION: u64 = 200;

    /// These limits for a layer that has `len` bytes when compressed: it may not be a decompression bomb.
    #[must_use]
    pub fn for_compressed_len(mut self, len: u64) -> Self {
        let plausible = len.saturating_mul(Self::MAX_EXPANSION).max(Self::HARMLESS_LEN);
        self.max_stream_len = self.max_stream_len.min(plausible);
        self
    }
}

/// Why a layer could not be read.
#[derive(Debug, thiserror::Error)]
pub enum LayerError {
    /// The stream failed.
    #[error("reading the layer's tar at byte {at}")]
    Read {
        /// How far it was read.
        at: u64,
        /// What the stream said.
        #[source]
        source: io::Error,
    },
    /// The stream ends inside of a member.
    #[error("the layer's tar is cut off at byte {at}: pull the image again")]
    Truncated {
        /// Where it ends.
        at: u64,
    },
    /// It is not a tar, or not a valid one.
    #[error("the layer's tar is malformed before byte {at}: {what}; build the image again")]
    Malformed {
        /// How far it was read.
        at: u64,
        /// What is wrong.
        what: &'static str,
    },
    /// It asks for more than allowed.
    #[error(
        "the layer has more than {limit} {what}, which is the limit: if it is no bomb, build the image with less in one layer"
    )]
    Limit {
        /// What there is too much of.
        what: &'static str,
        /// How much is allowed.
        limit: u64,
    },
    /// A member is of a kind that no engine unpacks.
    #[error("{path:?} in the layer's tar is of unknown type {kind:?}; leave it out of the image")]
    UnknownType {
        /// Path of the member.
        path: String,
        /// Its type, as the tar has it.
        kind: char,
    },
    /// A path is longer than Linux allows.
    #[error(
        "the path {path:?} in the layer, or a name in it, is longer than Linux allows (4095 bytes, 255 for a name)"
    )]
    PathTooLong {
        /// The path, cut.
        path: String,
    },
    /// A symbolic link leads nowhere at all.
    #[error("{path:?} in the layer is a symbolic link without a target")]
    EmptySymlink {
        /// Path of the link.
        path: String,
    },
    /// A whiteout of nothing, of `.` or of `..`.
    #[error("{path:?} in the layer is a whiteout that names no file")]
    BadWhiteout {
        /// Path of the whiteout.
        path: String,
    },
    /// More extended attributes than a file can have.
    #[error("{path:?} in the layer has extended attributes that are too long or too many for a file")]
    TooManyXattrs {
        /// Path of the file.
        path: String,
    },
    /// The sink refused a chunk.
    #[error("storing the layer's content")]
    Store(#[source] SinkError),
}

/// `path` for a message: a hostile one may be very long.
pub(crate) fn shown(path: &[u8]) -> String {
    const MAX_SHOWN: usize = 200;
    match path.get(..MAX_SHOWN) {
        Some(start) if path.len() > MAX_SHOWN => format!("{}...", String::from_utf8_lossy(start)),
        _ => String::from_utf8_lossy(path).into_owned(),
    }
}
