//! Decompressing a layer from start to end, noting on the way from where it can be read another time.

use std::io::{self, BufRead, Read};

use zstd::stream::raw::{DParameter, Decoder, InBuffer, Operation, OutBuffer};

use super::inflate::{Inflate, InflateError, Stop, WINDOW_LEN, Wrapping};
use super::{Checkpoint, Compression};

/// Output from one checkpoint with a window to the next: reaching its last byte costs about 15 ms of CPU.
const WINDOW_SPAN: u64 = 4 << 20;
/// Output from a checkpoint to one without a window, which costs a few bytes only.
const FRAME_SPAN: u64 = 1 << 20;
/// zstd's level for windows.
const WINDOW_LEVEL: i32 = 3;
/// Decompressed at a time: many times zlib's window, which it copies each time.
const OUTPUT_LEN: usize = 256 << 10;
/// Checksum and length, RFC 1952, section 2.3.
const GZIP_TRAILER_LEN: u64 = 8;
/// A frame that wants a larger window is refused: 128 MiB is what zstd's own tool allows without being asked.
const ZSTD_WINDOW_LOG_MAX: u32 = 27;

/// The uncompressed stream of a layer, and the checkpoints passed so far.
pub(crate) struct Decompress<R> {
    input: R,
    codec: Codec,
    output: Vec<u8>,
    /// What of the output the reader has not had.
    ready: std::ops::Range<usize>,
    /// Bytes taken and made so far.
    taken: u64,
    made: u64,
    checkpoints: Vec<Checkpoint>,
    /// Whether checkpoints are noted at all.
    notes: bool,
    /// The last step filled the output: there may be more to come without further input.
    full: bool,
}

enum Codec {
    Plain,
    Gzip {
        inflate: Inflate,
        wrapping: Wrapping,
        between: bool,
    },
    Zstd {
        decoder: Box<Decoder<'static>>,
        between: bool,
    },
}

/// Tells the compression by the first bytes: media types are wrong too often, and archives have none.
fn compression_of(head: &[u8]) -> Compression {
    let skippable = |magic: &[u8]| magic[0] & 0xf0 == 0x50 && magic[1..] == [0x2a, 0x4d, 0x18];
    if head.starts_with(&[0x1f, 0x8b]) {
        Compression::Gzip
    } else if head.starts_with(&[0x28, 0xb5, 0x2f, 0xfd]) || head.get(..4).is_some_and(skippable) {
        Compression::Zstd
    } else {
        Compression::Plain
    }
}

impl<R: BufRead> Decompress<R> {
    /// Decompresses `input`, whatever its first bytes say it is.
    pub(crate) fn new(mut input: R) -> io::Result<Self> {
        let codec = match compression_of(input.fill_buf()?) {
            Compression::Plain => Codec::Plain,
            Compression::Gzip => Codec::Gzip {
                inflate: Inflate::new(Wrapping::Gzip).map_err(damaged)?,
                wrapping: Wrapping::Gzip,
                between: true,
            },
            Compression::Zstd => unzstd_codec()?,
        };
        Ok(Self::with(input, codec, true))
    }

    /// Decompresses a layer's bytes from those of `checkpoint` on, which are what `input` has.
    ///
    /// # Errors
    /// When `input` ends before a byte came, and when the checkpoint's window is none.
    pub(super) fn resume(mut input: R, compression: Compression, checkpoint: &Checkpoint) -> io::Result<Self> {
        let codec = match compression {
            Compression::Plain => Codec::Plain,
            Compression::Zstd => unzstd_codec()?,
            Compression::Gzip if checkpoint.window.is_empty() => Codec::Gzip {
                inflate: Inflate::new(Wrapping::Gzip).map_err(damaged)?,
                wrapping: Wrapping::Gzip,
                between: true,
            },
            Compression::Gzip => Codec::Gzip {
                inflate: resume_inflate(&mut input, checkpoint)?,
                wrapping: Wrapping::Raw,
                between: false,
            },
        };
        Ok(Self::with(input, codec, false))
    }

    fn with(input: R, codec: Codec, notes: bool) -> Self {
        let output = match codec {
            Codec::Plain => Vec::new(),
            _ => vec![0; OUTPUT_LEN],
        };
        Self {
            input,
            codec,
            output,
            ready: 0..0,
            taken: 0,
            made: 0,
            checkpoints: Vec::new(),
            notes,
            full: false,
        }
    }

    /// How the layer is stored, and the checkpoints in what was read.
    pub(crate) fn finish(self) -> (Compression, Vec<Checkpoint>) {
        let compression = match self.codec {
            Codec::Plain => Compression::Plain,
            Codec::Gzip { .. } => Compression::Gzip,
            Codec::Zstd { .. } => Compression::Zstd,
        };
        (compression, self.checkpoints)
    }

    /// Whether the last checkpoint is `span` or more behind, or there is none.
    fn is_due(&self, span: u64) -> bool {
        let is_behind = |last: &Checkpoint| self.made - last.stream >= span;
        self.notes && self.checkpoints.last().is_none_or(is_behind)
    }

    fn add_start(&mut self) {
        if self.is_due(FRAME_SPAN) {
            self.checkpoints.push(Checkpoint {
                stored_bits: self.taken * 8,
                stream: self.made,
                window: Vec::new(),
            });
        }
    }

    /// Makes output until some is there; false at the end.
    fn refill(&mut self) -> io::Result<bool> {
        loop {
            let ended = match &self.codec {
                Codec::Plain => return Ok(false),
                Codec::Gzip { between, .. } | Codec::Zstd { between, .. } => *between,
            };
            if !self.full && self.input.fill_buf()?.is_empty() {
                return if ended {
                    Ok(false)
                } else {
                    Err(io::ErrorKind::UnexpectedEof.into())
                };
            }
            if ended {
                self.add_start();
            }
            let put = match self.codec {
                Codec::Plain => 0,
                Codec::Gzip { .. } => self.gunzip()?,
                Codec::Zstd { .. } => self.unzstd()?,
            };
            self.made += put as u64;
            self.full = put == self.output.len();
            self.ready = 0..put;
            if put > 0 {
                return Ok(true);
            }
        }
    }

    /// One step, up to a block's end.
    fn gunzip(&mut self) -> io::Result<usize> {
        let due = self.is_due(WINDOW_SPAN);
        let Codec::Gzip {
            inflate,
            wrapping,
            between,
        } = &mut self.codec
        else {
            return Ok(0);
        };
        let input = self.input.fill_buf()?;
        let step = inflate.step(input, &mut self.output, due).map_err(damaged)?;
        self.input.consume(step.taken);
        self.taken += step.taken as u64;
        *between = step.stop == Stop::End;
        match step.stop {
            Stop::End => {
                if *wrapping == Wrapping::Raw {
                    self.taken += skip(&mut self.input, GZIP_TRAILER_LEN)?;
                    *wrapping = Wrapping::Gzip;
                }
                inflate.reset(Wrapping::Gzip).map_err(damaged)?;
            }
            Stop::Block { unused_bits } if due => {
                let window = inflate.window().map_err(damaged)?;
                self.checkpoints.push(Checkpoint {
                    stored_bits: self.taken * 8 - unused_bits,
                    stream: self.made + step.put as u64,
                    window: zstd::bulk::compress(&window, WINDOW_LEVEL)?,
                });
            }
            Stop::Block { .. } | Stop::Within => {}
        }
        Ok(step.put)
    }

    /// One step, up to a frame's end.
    fn unzstd(&mut self) -> io::Result<usize> {
        let Codec::Zstd { decoder, between } = &mut self.codec else {
            return Ok(0);
        };
        let mut input = InBuffer::around(self.input.fill_buf()?);
        let mut output = OutBuffer::around(&mut self.output[..]);
        *between = decoder.run(&mut input, &mut output)? == 0;
        let (taken, put) = (input.pos(), output.pos());
        self.input.consume(taken);
        self.taken += taken as u64;
        Ok(put)
    }
}

fn unzstd_codec() -> io::Result<Codec> {
    let mut decoder = Decoder::new()?;
    decoder.set_parameter(DParameter::WindowLogMax(ZSTD_WINDOW_LOG_MAX))?;
    Ok(Codec::Zstd {
        decoder: Box::new(decoder),
        between: true,
    })
}

/// zlib in the state that it had at `checkpoint`, with the bits of the first byte that belong to what follows.
fn resume_inflate(input: &mut impl Read, checkpoint: &Checkpoint) -> io::Result<Inflate> {
    let mut inflate = Inflate::new(Wrapping::Raw).map_err(damaged)?;
    let used_bits = u8::try_from(checkpoint.stored_bits % 8).unwrap_or_default();
    if used_bits > 0 {
        let mut byte = [0];
        input.read_exact(&mut byte)?;
        inflate.prime(8 - used_bits, byte[0] >> used_bits).map_err(damaged)?;
    }
    let window = zstd::bulk::decompress(&checkpoint.window, WINDOW_LEN)?;
    if !window.is_empty() {
        inflate.set_window(&window).map_err(damaged)?;
    }
    Ok(inflate)
}

/// Drops `len` bytes; how many that were.
fn skip(input: &mut impl BufRead, len: u64) -> io::Result<u64> {
    match io::copy(&mut input.take(len), &mut io::sink())? {
        skipped if skipped == len => Ok(len),
        _ => Err(io::ErrorKind::UnexpectedEof.into()),
    }
}

fn damaged(error: InflateError) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error)
}

impl<R: BufRead> Read for Decompress<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if let Codec::Plain = self.codec {
            return self.input.read(buffer);
        }
        if buffer.is_empty() || (self.ready.is_empty() && !self.refill()?) {
            return Ok(0);
        }
        let len = self.ready.len().min(buffer.len());
        let start = self.ready.start;
        buffer[..len].copy_from_slice(&self.output[start..start + len]);
        self.ready.start += len;
        Ok(len)
    }
}
