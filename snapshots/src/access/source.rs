//! Chunks out of ranged reads of an unmodified layer.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, BufReader, Read};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use super::{Checkpoint, Compression, Decompress, LayerAccess};
use crate::chunk::{Chunk, ChunkId, SinkError};
use crate::layer::Piece;
use crate::registry::Digest;

/// Reads of neighbours are merged up to this length; a span that is longer is one read all the same.
const MAX_READ: u64 = 4 << 20;
/// What may lie between two that are merged: cheaper to read than to ask twice.
const MAX_GAP: u64 = 128 << 10;
/// Chunks that are under way at a time: 32 MiB at most.
const BATCH: usize = 128;
const INPUT_LEN: usize = 128 << 10;

/// Something that has a layer as it is stored, and reads parts of it: a registry, or a file.
pub trait BlobRanges: Send + Sync {
    /// The bytes of `range`, which lies within the layer, one after the other.
    ///
    /// # Errors
    /// When it cannot be asked; what comes later is an error of the reader.
    fn open(&self, range: Range<u64>) -> io::Result<Box<dyn Read + '_>>;
}

impl BlobRanges for File {
    fn open(&self, range: Range<u64>) -> io::Result<Box<dyn Read + '_>> {
        Ok(Box::new(FileRange { file: self, range }))
    }
}

struct FileRange<'a> {
    file: &'a File,
    range: Range<u64>,
}

impl Read for FileRange<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let rest = self.range.end.saturating_sub(self.range.start);
        let len = usize::try_from(rest).map_or(buffer.len(), |rest| rest.min(buffer.len()));
        let read = self.file.read_at(&mut buffer[..len], self.range.start)?;
        self.range.start += read as u64;
        Ok(read)
    }
}

/// Why a chunk could not be had from a layer.
#[derive(Debug, thiserror::Error)]
pub enum LayerSourceError {
    /// The layer has no such chunk.
    #[error("chunk {id} is not one of layer {layer}")]
    NoSuchChunk {
        /// Name of the chunk.
        id: ChunkId,
        /// The layer.
        layer: Digest,
    },
    /// Reading or decompressing failed.
    #[error("reading bytes {} to {} of layer {layer}: it is altered, or its index is of another layer, or its source failed", range.start, range.end)]
    Read {
        /// The layer.
        layer: Digest,
        /// Which bytes of it, as it is stored.
        range: Range<u64>,
        /// What went wrong.
        #[source]
        source: io::Error,
    },
    /// What came has another name.
    #[error("chunk {id} is not where the index of layer {layer} says, or altered: found {found} there")]
    Altered {
        /// Name of the chunk.
        id: ChunkId,
        /// The layer.
        layer: Digest,
        /// Name of what came.
        found: ChunkId,
    },
    /// Whoever was to take the chunk refused it.
    #[error("keeping a chunk of layer {layer}")]
    Keep {
        /// The layer.
        layer: Digest,
        /// Why.
        #[source]
        source: SinkError,
    },
    /// There is nobody to ask.
    #[error("nobody is known who has layer {layer}")]
    NoSource {
        /// The layer.
        layer: Digest,
    },
}

/// Chunks of one layer, made of the layer itself.
pub struct LayerSource {
    access: Arc<LayerAccess>,
    numbers: HashMap<ChunkId, usize>,
    /// Who has the layer; those in front are asked first.
    blobs: Vec<Box<dyn BlobRanges>>,
}

/// A piece that is wanted, and for which of a batch's chunks.
type Wanted = (Piece, usize);

/// One read: a part of the stored layer, and what is wanted of it by place in the stream.
struct Part {
    stored: Range<u64>,
    pieces: Vec<Wanted>,
}

impl LayerSource {
    /// A source of the chunks that `access` tells of, out of `blobs`.
    pub fn new(access: Arc<LayerAccess>, blobs: Vec<Box<dyn BlobRanges>>) -> Self {
        let chunks = access.chunks.iter().enumerate();
        let numbers = chunks.map(|(number, chunk)| (chunk.id, number)).collect();
        Self { access, numbers, blobs }
    }

    /// How the layer can be accessed.
    pub fn access(&self) -> &LayerAccess {
        &self.access
    }

    /// The chunk `id`. Blocks for the time of a ranged read.
    ///
    /// # Errors
    /// [`LayerSourceError`] of the last blob that was asked.
    pub fn chunk(&self, id: ChunkId) -> Result<Vec<u8>, LayerSourceError> {
        let mut found = Vec::new();
        self.chunks(&[id], |_, bytes| {
            found = bytes;
            Ok(())
        })?;
        Ok(found)
    }

    /// Gives each of the chunks `ids` to `keep`, verified, by their places in the layer: neighbours are one read.
    ///
    /// # Errors
    /// [`LayerSourceError`] of the last blob that was asked; some chunks may have been given by then.
    pub fn chunks(
        &self,
        ids: &[ChunkId],
        mut keep: impl FnMut(Chunk, Vec<u8>) -> Result<(), SinkError>,
    ) -> Result<(), LayerSourceError> {
        let mut numbers = ids.iter().map(|&id| self.number(id)).collect::<Result<Vec<_>, _>>()?;
        numbers
            .sort_unstable_by_key(|&number| (self.access.places.of(number).first().map(|piece| piece.stream), number));
        numbers.dedup();
        for batch in numbers.chunks(BATCH) {
            for (chunk, bytes) in self.batch(batch)? {
                keep(chunk, bytes).map_err(|source| LayerSourceError::Keep {
                    layer: self.access.blob,
                    source,
                })?;
            }
        }
        Ok(())
    }

    fn number(&self, id: ChunkId) -> Result<usize, LayerSourceError> {
        self.numbers.get(&id).copied().ok_or(LayerSourceError::NoSuchChunk {
            id,
            layer: self.access.blob,
        })
    }

    /// Asks one blob after the other: what a mirror cannot serve, or serves wrongly, the registry may.
    fn batch(&self, numbers: &[usize]) -> Result<Vec<(Chunk, Vec<u8>)>, LayerSourceError> {
        let mut last = LayerSourceError::NoSource {
            layer: self.access.blob,
        };
        for blob in &self.blobs {
            match self.batch_from(&**blob, numbers) {
                Ok(chunks) => return Ok(chunks),
                Err(error) => last = error,
            }
        }
        Err(last)
    }

    fn batch_from(&self, blob: &dyn BlobRanges, numbers: &[usize]) -> Result<Vec<(Chunk, Vec<u8>)>, LayerSourceError> {
        let empty = |&number: &usize| {
            let chunk = self.access.chunks[number];
            (chunk, vec![0; chunk.len as usize])
        };
        let mut chunks: Vec<_> = numbers.iter().map(empty).collect();
        for part in self.parts(numbers) {
            self.read(blob, &part, &mut chunks)
                .map_err(|source| LayerSourceError::Read {
                    layer: self.access.blob,
                    range: part.stored.clone(),
                    source,
                })?;
        }
        for (chunk, bytes) in &chunks {
            let found = ChunkId::of(bytes);
            if found != chunk.id {
                return Err(LayerSourceError::Altered {
                    id: chunk.id,
                    layer: self.access.blob,
                    found,
                });
            }
        }
        Ok(chunks)
    }

    /// The reads that bring the chunks of those numbers.
    fn parts(&self, numbers: &[usize]) -> Vec<Part> {
        let mut pieces: Vec<Wanted> = Vec::new();
        for (slot, &number) in numbers.iter().enumerate() {
            for piece in self.access.places.of(number) {
                self.split(*piece, |piece| pieces.push((piece, slot)));
            }
        }
        pieces.sort_unstable_by_key(|(piece, _)| piece.stream);
        let mut parts: Vec<Part> = Vec::new();
        for wanted in pieces {
            let stored = self.stored(&wanted.0);
            match parts.last_mut().filter(|part| is_near(&part.stored, &stored)) {
                Some(part) => {
                    part.stored.end = part.stored.end.max(stored.end);
                    part.pieces.push(wanted);
                }
                None => parts.push(Part {
                    stored,
                    pieces: vec![wanted],
                }),
            }
        }
        parts
    }

    /// Cuts `piece` at checkpoints, so that two reads share no span.
    fn split(&self, mut piece: Piece, mut give: impl FnMut(Piece)) {
        let checkpoints = &self.access.checkpoints;
        let after = checkpoints.partition_point(|checkpoint| checkpoint.stream <= piece.stream);
        for checkpoint in checkpoints.get(after..).unwrap_or_default() {
            let Some(len) = u32::try_from(checkpoint.stream - piece.stream)
                .ok()
                .filter(|&len| len < piece.len)
            else {
                break;
            };
            give(Piece { len, ..piece });
            piece = Piece {
                stream: checkpoint.stream,
                offset: piece.offset.saturating_add(len),
                len: piece.len - len,
            };
        }
        give(piece);
    }

    /// What has to be read for `piece`: from the checkpoint before it to the one after it.
    fn stored(&self, piece: &Piece) -> Range<u64> {
        if self.access.compression == Compression::Plain {
            return piece.stream..piece.stream_end();
        }
        let checkpoints = &self.access.checkpoints;
        let after = checkpoints.partition_point(|checkpoint| checkpoint.stream < piece.stream_end());
        let end = checkpoints
            .get(after)
            .map(|checkpoint| checkpoint.stored_bits.div_ceil(8));
        let start = self
            .checkpoint(piece.stream)
            .map_or(0, |checkpoint| checkpoint.stored_bits / 8);
        start..end.unwrap_or(self.access.blob_len).min(self.access.blob_len)
    }

    /// The last checkpoint that is not after `stream`.
    fn checkpoint(&self, stream: u64) -> Option<&Checkpoint> {
        let checkpoints = &self.access.checkpoints;
        let after = checkpoints.partition_point(|checkpoint| checkpoint.stream <= stream);
        checkpoints.get(after.checked_sub(1)?)
    }

    /// Reads a part, and puts its pieces where they belong. No more is made than up to the last of them.
    fn read(&self, blob: &dyn BlobRanges, part: &Part, chunks: &mut [(Chunk, Vec<u8>)]) -> io::Result<()> {
        let input = BufReader::with_capacity(INPUT_LEN, blob.open(part.stored.clone())?);
        let start = part.pieces.first().map_or(0, |(piece, _)| piece.stream);
        let plain = Checkpoint {
            stored_bits: start.saturating_mul(8),
            stream: start,
            window: Vec::new(),
        };
        let checkpoint = self.checkpoint(start).unwrap_or(&plain);
        let mut stream = Decompress::resume(input, self.access.compression, checkpoint)?;
        let mut at = checkpoint.stream;
        for (piece, slot) in &part.pieces {
            let gap = piece.stream.checked_sub(at);
            let gap = gap.ok_or_else(|| io::Error::other("pieces overlap"))?;
            if io::copy(&mut stream.by_ref().take(gap), &mut io::sink())? < gap {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            let place = piece.offset as usize..(piece.offset as usize).saturating_add(piece.len as usize);
            let bytes = chunks.get_mut(*slot).and_then(|(_, bytes)| bytes.get_mut(place));
            stream.read_exact(bytes.ok_or_else(|| io::Error::other("a piece lies outside of its chunk"))?)?;
            at = piece.stream_end();
        }
        Ok(())
    }
}

/// Whether `next`, which does not begin before `part`, is read with it.
fn is_near(part: &Range<u64>, next: &Range<u64>) -> bool {
    next.end <= part.end || (next.start <= part.end.saturating_add(MAX_GAP) && next.end - part.start <= MAX_READ)
}
