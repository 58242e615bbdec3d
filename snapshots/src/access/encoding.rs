//! A layer's access as bytes, in the frame of the layer index (`layer::encoding`): the same header, the same integers.
//!
//! ```text
//!   header     = "FLINTACC", version, number of checkpoints, number of chunks, body length, BLAKE3
//!   body       = layer's SHA-256, layer's length, diff id's SHA-256, stream's length, compression (0 plain, 1 gzip, 2 zstd),
//!                checkpoint*, chunk*
//!   checkpoint = bits since the one before, output since the one before, length of the window, window (zstd)
//!   chunk      = name (32 bytes), length, number of pieces, piece*
//!   piece      = distance in the stream from the end of the piece before (zigzag), in the chunk likewise, length
//! ```
//!
//! A reader believes nothing: what does not lie within the layer, the stream and the chunk, in order and without overlap,
//! is refused. That the windows and places are the right ones shows when a chunk is verified.

use super::{Checkpoint, Compression, LayerAccess};
use crate::layer::{self, DecodeError, HEADER_LEN, Limits, Piece, Places, Reader, close, count, put_int};
use crate::registry::Digest;

const MAGIC: &[u8; 8] = b"FLINTACC";
/// Fewest bytes of each, against which counts are checked before anything is allocated.
const MIN_CHECKPOINT_LEN: usize = 3;
const MIN_CHUNK_LEN: usize = 34;
const MIN_PIECE_LEN: usize = 3;
/// zstd never makes 32 KiB longer than this.
const MAX_WINDOW_LEN: usize = 33 << 10;

impl LayerAccess {
    /// The access as bytes; the same access gives the same bytes.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = vec![0; HEADER_LEN];
        out.extend_from_slice(self.blob.as_bytes());
        put_int(&mut out, self.blob_len);
        out.extend_from_slice(self.diff_id.as_bytes());
        put_int(&mut out, self.stream_len);
        out.push(self.compression.tag());
        let (mut bits, mut stream) = (0, 0);
        for checkpoint in &self.checkpoints {
            put_int(&mut out, checkpoint.stored_bits.wrapping_sub(bits));
            put_int(&mut out, checkpoint.stream.wrapping_sub(stream));
            put_int(&mut out, checkpoint.window.len() as u64);
            out.extend_from_slice(&checkpoint.window);
            (bits, stream) = (checkpoint.stored_bits, checkpoint.stream);
        }
        let mut stream = 0;
        for (number, chunk) in self.chunks.iter().enumerate() {
            let pieces = self.places.of(number);
            out.extend_from_slice(chunk.id.as_bytes());
            put_int(&mut out, chunk.len.into());
            put_int(&mut out, pieces.len() as u64);
            let mut offset = 0;
            for piece in pieces {
                put_int(&mut out, zigzag(piece.stream.wrapping_sub(stream).cast_signed()));
                put_int(&mut out, piece.offset.wrapping_sub(offset).into());
                put_int(&mut out, piece.len.into());
                (stream, offset) = (piece.stream_end(), piece.offset.wrapping_add(piece.len));
            }
        }
        close(
            &mut out,
            MAGIC,
            [count(self.checkpoints.len()), count(self.chunks.len())],
        );
        out
    }

    /// The access that `bytes` hold.
    ///
    /// # Errors
    /// [`DecodeError`] for anything that [`LayerAccess::encode`] would not have written of a layer.
    pub fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        let ([checkpoints, chunks], mut body) = layer::open(bytes, MAGIC)?;
        let (blob, blob_len) = (digest(&mut body)?, body.int()?);
        let (diff_id, stream_len) = (digest(&mut body)?, body.int()?);
        let compression = match body.take(1)?[0] {
            0 => Compression::Plain,
            1 => Compression::Gzip,
            2 => Compression::Zstd,
            _ => return body.malformed("the compression is unknown"),
        };
        let checkpoints = read_checkpoints(&mut body, checkpoints)?;
        let count = body.checked_count(chunks.into(), MIN_CHUNK_LEN)?;
        let (mut chunks, mut places) = (Vec::with_capacity(count), Places::default());
        let mut stream = 0;
        for _ in 0..count {
            let chunk = body.chunk()?;
            places.push(&read_pieces(&mut body, chunk.len, &mut stream)?);
            chunks.push(chunk);
        }
        body.end()?;
        let access = Self {
            blob,
            blob_len,
            diff_id,
            stream_len,
            compression,
            checkpoints,
            chunks,
            places,
        };
        match access.fault() {
            Some(what) => body.malformed(what),
            None => Ok(access),
        }
    }

    /// What cannot be so, if anything.
    fn fault(&self) -> Option<&'static str> {
        let lengths_agree = self.compression != Compression::Plain || self.stream_len == self.blob_len;
        if !lengths_agree || self.stream_len > Limits::default().for_compressed_len(self.blob_len).max_stream_len {
            return Some("the stream is too long for its layer");
        }
        if !self.checkpoints_are_good() {
            return Some("checkpoints are not in order, or lie outside of the layer");
        }
        let mut pieces: Vec<_> = self
            .places
            .pieces()
            .iter()
            .map(|piece| (piece.stream, piece.stream_end()))
            .collect();
        pieces.sort_unstable();
        let overlap = pieces.windows(2).any(|pair| pair[0].1 > pair[1].0);
        if overlap || pieces.last().is_some_and(|last| last.1 > self.stream_len) {
            return Some("pieces overlap, or lie outside of the stream");
        }
        None
    }

    fn checkpoints_are_good(&self) -> bool {
        let starts = match (self.compression, self.checkpoints.first()) {
            (Compression::Plain, first) => first.is_none(),
            (_, first) => first.is_some_and(|first| (first.stored_bits, first.stream, first.window.len()) == (0, 0, 0)),
        };
        let ascend = self
            .checkpoints
            .windows(2)
            .all(|pair| pair[0].stored_bits < pair[1].stored_bits && pair[0].stream < pair[1].stream);
        let is_good = |checkpoint: &Checkpoint| {
            let aligned = checkpoint.stored_bits.is_multiple_of(8);
            let fits = match self.compression {
                Compression::Gzip => aligned || !checkpoint.window.is_empty(),
                Compression::Zstd | Compression::Plain => aligned && checkpoint.window.is_empty(),
            };
            fits && checkpoint.stored_bits / 8 <= self.blob_len && checkpoint.stream <= self.stream_len
        };
        starts && ascend && self.checkpoints.iter().all(is_good)
    }
}

impl Compression {
    fn tag(self) -> u8 {
        match self {
            Self::Plain => 0,
            Self::Gzip => 1,
            Self::Zstd => 2,
        }
    }
}

fn zigzag(value: i64) -> u64 {
    ((value << 1) ^ (value >> 63)).cast_unsigned()
}

fn unzigzag(value: u64) -> i64 {
    (value >> 1).cast_signed() ^ -((value & 1).cast_signed())
}

fn digest(body: &mut Reader<'_>) -> Result<Digest, DecodeError> {
    let mut bytes = [0; 32];
    bytes.copy_from_slice(body.take(32)?);
    Ok(Digest::from_bytes(bytes))
}

fn read_checkpoints(body: &mut Reader<'_>, number: u32) -> Result<Vec<Checkpoint>, DecodeError> {
    let number = body.checked_count(number.into(), MIN_CHECKPOINT_LEN)?;
    let mut checkpoints = Vec::with_capacity(number);
    let (mut bits, mut stream) = (0u64, 0u64);
    for _ in 0..number {
        let places = (bits.checked_add(body.int()?), stream.checked_add(body.int()?));
        let (Some(stored_bits), Some(at)) = places else {
            return body.malformed("a checkpoint lies beyond all numbers");
        };
        let window = body.byte_string()?;
        if window.len() > MAX_WINDOW_LEN {
            return body.malformed("a window is too long");
        }
        checkpoints.push(Checkpoint {
            stored_bits,
            stream: at,
            window: window.to_vec(),
        });
        (bits, stream) = (stored_bits, at);
    }
    Ok(checkpoints)
}

/// The pieces of a chunk of `chunk_len` bytes; `stream` is where the piece before ends.
fn read_pieces(body: &mut Reader<'_>, chunk_len: u32, stream: &mut u64) -> Result<Vec<Piece>, DecodeError> {
    let number = body.int()?;
    let number = body.checked_count(number, MIN_PIECE_LEN)?;
    let mut pieces = Vec::with_capacity(number);
    let mut offset = 0u32;
    for _ in 0..number {
        let start = stream.checked_add_signed(unzigzag(body.int()?));
        let (at, len) = (offset.checked_add(body.int_as()?), body.int_as::<u32>()?);
        let end = at
            .and_then(|at| at.checked_add(len))
            .filter(|&end| len > 0 && end <= chunk_len);
        let stream_end = start.and_then(|start| start.checked_add(len.into()));
        let (Some(start), Some(at), Some(end), Some(stream_end)) = (start, at, end, stream_end) else {
            return body.malformed("a piece lies outside of its chunk");
        };
        pieces.push(Piece {
            stream: start,
            offset: at,
            len,
        });
        (*stream, offset) = (stream_end, end);
    }
    Ok(pieces)
}
