//! A layer's bytes on their way into chunks: counted, hashed, decompressed, hashed again, cut.
//!
//! ```text
//!   source ─> Tap (size, digest) ─> access::Decompress ─> Tap (diff id) ─> layer::ingest ─> chunks
//! ```
//!
//! Both digests are compared at the end, also when something in the middle did not like the bytes: that they are altered
//! explains it best.

use std::io::{self, BufReader, Read};

use tokio::sync::mpsc;

use super::error::{ImageError, LayerError};
use crate::access::{Checkpoint, Compression, Decompress, LayerAccess};
use crate::chunk::ChunkSink;
use crate::image::Image as DeviceImage;
use crate::layer::{self, LayerIndex, Places};
use crate::registry::{Digest, Hasher};
use crate::store::StoreError;

/// What a layer has to be.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Expected {
    /// Digest and size as stored; a docker archive does not tell them.
    pub(crate) blob: Option<(Digest, u64)>,
    pub(crate) diff_id: Digest,
}

/// Reads a layer of `stored_len` bytes from `source` into `sink`; its index, and how its chunks can be had from it again.
pub(crate) fn layer(
    source: impl Read,
    stored_len: u64,
    expected: Expected,
    sink: &mut impl ChunkSink,
    advanced: &dyn Fn(u64),
) -> Result<(LayerIndex, LayerAccess), LayerError> {
    let mut stored = Tap::new(source, advanced);
    let limits = layer::Limits::default().for_compressed_len(stored_len);
    let unpacked = unpack(&mut stored, sink, &limits);
    if let Some(error) = unpacked.result.as_ref().err().and_then(find_store_error) {
        return Err(error.into());
    }
    let drained = io::copy(&mut stored, &mut io::sink());
    let (_, len, digest) = stored.finish();
    if let (Some((expected, size)), Ok(_)) = (expected.blob, drained) {
        if len != size {
            return Err(LayerError::Length {
                expected: size,
                found: len,
            });
        }
        if digest != expected {
            return Err(LayerError::Altered {
                expected,
                found: digest,
            });
        }
    }
    let found = unpacked.diff_id;
    let ingested = unpacked
        .into_access(digest, len)
        .map_err(|error| LayerError::Tar(describe(&*error)))?;
    if found != expected.diff_id {
        return Err(LayerError::DiffId {
            expected: expected.diff_id,
            found,
        });
    }
    Ok(ingested)
}

type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// A layer that was read to its end, or as far as it made sense.
pub(crate) struct Unpacked {
    pub(crate) result: Result<(LayerIndex, Places), BoxError>,
    diff_id: Digest,
    stream_len: u64,
    compression: Compression,
    checkpoints: Vec<Checkpoint>,
}

impl Unpacked {
    /// The layer's index, and how its chunks can be had of the blob that it was read from.
    pub(crate) fn into_access(self, blob: Digest, blob_len: u64) -> Result<(LayerIndex, LayerAccess), BoxError> {
        let (index, places) = self.result?;
        let access = LayerAccess {
            blob,
            blob_len,
            diff_id: self.diff_id,
            stream_len: self.stream_len,
            compression: self.compression,
            checkpoints: self.checkpoints,
            chunks: index.chunks.clone(),
            places,
        };
        Ok((index, access))
    }
}

pub(crate) fn unpack(stored: &mut impl Read, sink: &mut impl ChunkSink, limits: &layer::Limits) -> Unpacked {
    let stored = BufReader::with_capacity(128 << 10, stored);
    let decompress = match Decompress::new(stored) {
        Ok(decompress) => decompress,
        Err(error) => {
            return Unpacked {
                result: Err(error.into()),
                diff_id: Digest::of(b""),
                stream_len: 0,
                compression: Compression::Plain,
                checkpoints: Vec::new(),
            };
        }
    };
    let mut tar = Tap::new(decompress, &|_| ());
    // It reads to the stream's end: padding behind the archive belongs to the diff id.
    let result = layer::ingest_placed(&mut tar, sink, limits).map_err(BoxError::from);
    let (decompress, stream_len, diff_id) = tar.finish();
    let (compression, checkpoints) = decompress.finish();
    Unpacked {
        result,
        diff_id,
        stream_len,
        compression,
        checkpoints,
    }
}

/// Makes one device of an image's layers.
pub(crate) fn assemble(layers: &[LayerIndex], image: &str) -> Result<DeviceImage, ImageError> {
    crate::image::assemble(layers).map_err(|error| ImageError::Assemble {
        image: image.to_owned(),
        reason: describe(&error),
    })
}

/// An error and its causes on one line.
fn describe(error: &(dyn std::error::Error + 'static)) -> String {
    causes(error).map(ToString::to_string).collect::<Vec<_>>().join(": ")
}

/// An error, its cause, its cause's cause, ...
fn causes<'a>(
    error: &'a (dyn std::error::Error + 'static),
) -> impl Iterator<Item = &'a (dyn std::error::Error + 'static)> {
    std::iter::successors(Some(error), |error: &&'a (dyn std::error::Error + 'static)| {
        error.source()
    })
}

/// The error of the sink, which is the store.
pub(crate) fn sink_error(error: &BoxError) -> StoreError {
    find_store_error(error).unwrap_or_else(|| StoreError::Sink(describe(&**error)))
}

/// The store's error, if that is what is behind `error`. It cannot be moved out of there, so it is told again.
fn find_store_error(error: &BoxError) -> Option<StoreError> {
    let found = causes(&**error).find_map(|error| error.downcast_ref::<StoreError>())?;
    Some(match found {
        StoreError::DiskFull { dir, free, needed } => StoreError::DiskFull {
            dir: dir.clone(),
            free: *free,
            needed: *needed,
        },
        other => StoreError::Sink(describe(other)),
    })
}

/// Passes bytes on, counting and hashing them.
struct Tap<'a, R> {
    inner: R,
    hasher: Hasher,
    len: u64,
    advanced: &'a dyn Fn(u64),
}

impl<'a, R: Read> Tap<'a, R> {
    fn new(inner: R, advanced: &'a dyn Fn(u64)) -> Self {
        Self {
            inner,
            hasher: Hasher::default(),
            len: 0,
            advanced,
        }
    }

    fn finish(self) -> (R, u64, Digest) {
        (self.inner, self.len, self.hasher.finish())
    }
}

impl<R: Read> Read for Tap<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.inner.read(buffer)?;
        self.hasher.update(&buffer[..read]);
        self.len += read as u64;
        (self.advanced)(read as u64);
        Ok(read)
    }
}

/// Bytes that an asynchronous task sends, for a thread to read.
pub(crate) struct ChannelReader {
    pieces: mpsc::Receiver<io::Result<Vec<u8>>>,
    piece: io::Cursor<Vec<u8>>,
}

impl ChannelReader {
    pub(crate) fn new(pieces: mpsc::Receiver<io::Result<Vec<u8>>>) -> Self {
        Self {
            pieces,
            piece: io::Cursor::default(),
        }
    }
}

impl Read for ChannelReader {
    /// The sender going away without an end is an end as well: digest and size then tell that something is missing.
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            let read = self.piece.read(buffer)?;
            if read > 0 || buffer.is_empty() {
                return Ok(read);
            }
            match self.pieces.blocking_recv() {
                Some(piece) => self.piece = io::Cursor::new(piece?),
                None => return Ok(0),
            }
        }
    }
}
