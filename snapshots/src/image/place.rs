//! Where the content of files comes to lie on the device.
//!
//! Each file begins at a block. A file's extents then follow from where its blocks are; a chunk with many small files in it
//! is thus spread over as many blocks, and nothing is stored twice or padded: what no extent covers reads as zeros.
//!
//! ```text
//!   pack chunk  [ a.py | b.py    | c.py ]
//!                  |        \          \
//!   device      [a.py.....][b.py       ][b.py......][c.py......]      . = zeros
//! ```
//!
//! Files lie in the order in which layers have them, so that reading ahead on the device reads ahead in chunks.

use std::collections::HashMap;

use super::ImageError;
use crate::chunk::{Chunk, ChunkId};
use crate::device::{BLOCK_LEN, DeviceExtent, MAX_DEVICE_LEN};
use crate::erofs::Body;
use crate::layer::{Extent, LayerIndex};

/// The most block numbers of one sparse file, so that its map takes 64 KiB at most; longer files get longer units.
const MAX_UNITS: u64 = 16 * 1024;
/// The most block numbers of all sparse files together: 128 MiB of metadata.
const MAX_ALL_UNITS: u64 = 32 << 20;
/// The longest unit that EROFS has: 2^31 blocks.
const MAX_UNIT_BITS: u8 = 31;

/// Places files one after the other. Offsets count from the end of the metadata.
#[derive(Default)]
pub(super) struct Placer {
    chunks: Vec<Chunk>,
    numbers: HashMap<ChunkId, u32>,
    extents: Vec<DeviceExtent>,
    end: u64,
    /// Block numbers of sparse files so far.
    units: u64,
}

impl Placer {
    /// Places a file of `layer`, and says how EROFS is to describe it.
    pub(super) fn place(
        &mut self,
        size: u64,
        extents: &[Extent],
        layer: &LayerIndex,
    ) -> Result<Body<'static>, ImageError> {
        if size > MAX_DEVICE_LEN {
            return Err(ImageError::TooBig);
        }
        if has_hole(size, extents) {
            self.place_sparse(size, extents, layer)
        } else {
            self.place_plain(size, extents, layer)
        }
    }

    fn place_plain(&mut self, size: u64, extents: &[Extent], layer: &LayerIndex) -> Result<Body<'static>, ImageError> {
        let start = self.allocate(size)?;
        for extent in extents {
            self.map(start + extent.file_offset, extent, layer)?;
        }
        Ok(Body::Plain {
            size,
            first_block: block_of(start)?,
        })
    }

    fn place_sparse(&mut self, size: u64, extents: &[Extent], layer: &LayerIndex) -> Result<Body<'static>, ImageError> {
        let unit_bits = (0..=MAX_UNIT_BITS).find(|bits| size.div_ceil(BLOCK_LEN << bits) <= MAX_UNITS);
        let unit_bits = unit_bits.ok_or(ImageError::TooBig)?;
        let unit_len = BLOCK_LEN << unit_bits;
        self.units += size.div_ceil(unit_len);
        if self.units > MAX_ALL_UNITS {
            return Err(ImageError::TooManyHoles);
        }
        // At most MAX_UNITS of them.
        let mut units = vec![None; usize::try_from(size.div_ceil(unit_len)).map_err(|_| ImageError::TooBig)?];
        let mut current = None;
        for extent in extents {
            let mut rest = *extent;
            while rest.len > 0 {
                let unit = rest.file_offset / unit_len;
                let unit_start = unit * unit_len;
                let start = match current {
                    Some((number, start)) if number == unit => start,
                    _ => self.allocate(unit_len.min(size - unit_start))?,
                };
                current = Some((unit, start));
                // Below MAX_UNITS, see above; extents lie within their file.
                units[usize::try_from(unit).map_err(|_| ImageError::TooBig)?] = Some(block_of(start)?);
                let within = rest.file_offset - unit_start;
                let len = u32::try_from(unit_len - within).map_or(rest.len, |room| room.min(rest.len));
                self.map(start + within, &Extent { len, ..rest }, layer)?;
                rest = Extent {
                    file_offset: rest.file_offset + u64::from(len),
                    offset: rest.offset + len,
                    len: rest.len - len,
                    ..rest
                };
            }
        }
        Ok(Body::Sparse { size, unit_bits, units })
    }

    fn allocate(&mut self, len: u64) -> Result<u64, ImageError> {
        let start = self.end;
        self.end = start + len.next_multiple_of(BLOCK_LEN);
        if self.end > MAX_DEVICE_LEN {
            Err(ImageError::TooBig)
        } else {
            Ok(start)
        }
    }

    fn map(&mut self, device_offset: u64, extent: &Extent, layer: &LayerIndex) -> Result<(), ImageError> {
        let chunk = layer
            .chunks
            .get(extent.chunk as usize)
            .ok_or(ImageError::Inconsistent)?;
        let next = u32::try_from(self.chunks.len()).map_err(|_| ImageError::TooBig)?;
        let number = *self.numbers.entry(chunk.id).or_insert(next);
        if number == next {
            self.chunks.push(*chunk);
        } else if self.chunks[number as usize].len != chunk.len {
            return Err(ImageError::Inconsistent);
        }
        self.extents.push(DeviceExtent {
            device_offset,
            chunk: number,
            offset: extent.offset,
            len: extent.len,
        });
        Ok(())
    }

    /// Blocks that data takes.
    pub(super) fn blocks(&self) -> Result<u32, ImageError> {
        block_of(self.end)
    }

    /// Chunks and extents of the whole device: first those of `metadata`, which is cut in pieces of `piece_len`.
    pub(super) fn finish(
        self,
        metadata: &[u8],
        piece_len: usize,
    ) -> Result<(Vec<Chunk>, Vec<DeviceExtent>), ImageError> {
        let data_from = metadata.len() as u64;
        let mut all = Self::default();
        let mut layer = LayerIndex::default();
        for piece in metadata.chunks(piece_len) {
            let len = u32::try_from(piece.len()).map_err(|_| ImageError::TooBig)?;
            layer.chunks = vec![Chunk {
                id: ChunkId::of(piece),
                len,
            }];
            all.map(
                all.end,
                &Extent {
                    file_offset: 0,
                    chunk: 0,
                    offset: 0,
                    len,
                },
                &layer,
            )?;
            all.end += u64::from(len);
        }
        layer.chunks = self.chunks;
        for extent in self.extents {
            let piece = Extent {
                file_offset: 0,
                chunk: extent.chunk,
                offset: extent.offset,
                len: extent.len,
            };
            all.map(data_from + extent.device_offset, &piece, &layer)?;
        }
        Ok((all.chunks, all.extents))
    }
}

fn block_of(offset: u64) -> Result<u32, ImageError> {
    u32::try_from(offset / BLOCK_LEN).map_err(|_| ImageError::TooBig)
}

/// Whether at least one whole block is not covered.
fn has_hole(size: u64, extents: &[Extent]) -> bool {
    let ends = extents.iter().map(|extent| extent.file_offset + u64::from(extent.len));
    let starts = extents.iter().map(|extent| extent.file_offset).chain([size]);
    std::iter::once(0).chain(ends).zip(starts).any(|(from, to)| {
        let (first, end) = (
            from.div_ceil(BLOCK_LEN),
            if to == size {
                to.div_ceil(BLOCK_LEN)
            } else {
                to / BLOCK_LEN
            },
        );
        to > from && first < end
    })
}
