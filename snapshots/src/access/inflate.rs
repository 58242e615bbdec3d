//! DEFLATE, stoppable between two blocks and startable there: what zlib's C interface can do and flate2's does not offer.
//!
//! All of this crate's calls into zlib are here. zlib-rs is the same code that flate2 uses, reached by its C interface.

use std::ffi::c_int;

use libz_rs_sys::{
    Z_BLOCK, Z_BUF_ERROR, Z_NO_FLUSH, Z_OK, Z_STREAM_END, inflate, inflateEnd, inflateGetDictionary, inflateInit2_,
    inflatePrime, inflateReset2, inflateSetDictionary, z_stream, zlibVersion,
};

/// How far back DEFLATE can refer (RFC 1951, section 2).
pub(super) const WINDOW_LEN: usize = 32 << 10;

/// What surrounds the DEFLATE stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Wrapping {
    /// A gzip member with header, checksum and length (RFC 1952), all of which zlib checks.
    Gzip,
    /// Nothing.
    Raw,
}

impl Wrapping {
    /// zlib's `windowBits`: 15 for 32 KiB, negative for none, 16 more for gzip.
    fn window_bits(self) -> c_int {
        match self {
            Self::Gzip => 15 + 16,
            Self::Raw => -15,
        }
    }
}

/// Where a step ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stop {
    /// Within a block, for want of input or of room.
    Within,
    /// Before a block; so many bits of the input that was taken belong to it already.
    Block {
        /// Bits taken and not used.
        unused_bits: u64,
    },
    /// Behind the last block and whatever the wrapping has after it.
    End,
}

/// What a step did.
#[derive(Debug, Clone, Copy)]
pub(super) struct Step {
    /// Bytes taken from the input.
    pub(super) taken: usize,
    /// Bytes put into the output.
    pub(super) put: usize,
    /// Where it ended.
    pub(super) stop: Stop,
}

/// The input is not what it has to be, by zlib's return code.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the DEFLATE stream is damaged (zlib's code {0})")]
pub(super) struct InflateError(c_int);

fn checked(code: c_int) -> Result<(), InflateError> {
    match code {
        Z_OK => Ok(()),
        other => Err(InflateError(other)),
    }
}

/// zlib's state for decompressing.
pub(super) struct Inflate {
    /// Boxed: zlib's state may point back to it.
    stream: Box<z_stream>,
}

// SAFETY: the state behind the stream belongs to it alone and is tied to no thread; every use needs `&mut self` (or, for the
// window, is a read by the only owner).
unsafe impl Send for Inflate {}

impl Inflate {
    pub(super) fn new(wrapping: Wrapping) -> Result<Self, InflateError> {
        let mut stream = Box::new(z_stream::default());
        // z_stream has about 112 bytes; its size is how zlib tells that both sides mean the same structure.
        let size = c_int::try_from(size_of::<z_stream>()).map_err(|_| InflateError(0))?;
        // SAFETY: the stream is initialised with null pointers and no allocator, for which zlib takes its own; the version is
        // the library's own string.
        checked(unsafe { inflateInit2_(&raw mut *stream, wrapping.window_bits(), zlibVersion(), size) })?;
        Ok(Self { stream })
    }

    /// Begins anew, with what is in `wrapping`.
    pub(super) fn reset(&mut self, wrapping: Wrapping) -> Result<(), InflateError> {
        // SAFETY: the stream was initialised by `new`, and nothing has ended it.
        checked(unsafe { inflateReset2(&raw mut *self.stream, wrapping.window_bits()) })
    }

    /// Makes the lowest `bits` of `value` the first of the input. Only for [`Wrapping::Raw`], before the first step.
    pub(super) fn prime(&mut self, bits: u8, value: u8) -> Result<(), InflateError> {
        // SAFETY: as in `reset`; what zlib does not like it says.
        checked(unsafe { inflatePrime(&raw mut *self.stream, bits.into(), value.into()) })
    }

    /// Sets the output before the next byte. Only for [`Wrapping::Raw`], before the first step.
    pub(super) fn set_window(&mut self, window: &[u8]) -> Result<(), InflateError> {
        let len = u32::try_from(window.len()).map_err(|_| InflateError(0))?;
        // SAFETY: as in `reset`; zlib reads `len` bytes, which the slice has, and keeps a copy.
        checked(unsafe { inflateSetDictionary(&raw mut *self.stream, window.as_ptr(), len) })
    }

    /// The output before the next byte: at most [`WINDOW_LEN`] bytes.
    pub(super) fn window(&mut self) -> Result<Vec<u8>, InflateError> {
        let mut window = vec![0; WINDOW_LEN];
        let mut len = 0;
        // SAFETY: as in `reset`; zlib writes no more than its window holds, which is 32 KiB by `window_bits`, and the length.
        checked(unsafe { inflateGetDictionary(&raw const *self.stream, window.as_mut_ptr(), &raw mut len) })?;
        window.truncate(len as usize);
        Ok(window)
    }

    /// Decompresses as much as there is input and room for, or up to the next block if `to_block`.
    pub(super) fn step(&mut self, input: &[u8], output: &mut [u8], to_block: bool) -> Result<Step, InflateError> {
        let stream = &mut *self.stream;
        stream.next_in = input.as_ptr();
        stream.avail_in = u32::try_from(input.len()).unwrap_or(u32::MAX);
        stream.next_out = output.as_mut_ptr();
        stream.avail_out = u32::try_from(output.len()).unwrap_or(u32::MAX);
        let (given, room) = (stream.avail_in, stream.avail_out);
        let flush = if to_block { Z_BLOCK } else { Z_NO_FLUSH };
        // SAFETY: the stream was initialised by `new`; input and output are as long as said, and live until the call is over.
        // Afterwards zlib uses neither: its next call gets new ones, and the other functions here use only its own window.
        let code = unsafe { inflate(stream, flush) };
        // Neither too little input nor too little room is a fault.
        let stop = match code {
            Z_STREAM_END => Stop::End,
            Z_OK | Z_BUF_ERROR => stop_at(stream.data_type),
            other => return Err(InflateError(other)),
        };
        Ok(Step {
            taken: (given - stream.avail_in) as usize,
            put: (room - stream.avail_out) as usize,
            stop,
        })
    }
}

/// What `data_type` says (zlib.h, at `inflate`): unused bits, 64 in the last block, 128 right before a block or behind the
/// last one.
fn stop_at(data_type: c_int) -> Stop {
    const BITS: c_int = 63;
    const LAST: c_int = 64;
    const BOUNDARY: c_int = 128;
    match data_type & (LAST | BOUNDARY) {
        BOUNDARY => Stop::Block {
            unused_bits: u64::from((data_type & BITS).unsigned_abs()),
        },
        _ => Stop::Within,
    }
}

impl Drop for Inflate {
    fn drop(&mut self) {
        // SAFETY: the stream was initialised by `new`, and this is the only place that ends it.
        let _ = unsafe { inflateEnd(&raw mut *self.stream) };
    }
}
