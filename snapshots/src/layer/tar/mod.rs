//! Reading tar streams: ustar, PAX (POSIX.1-2001), GNU long names and both kinds of sparse files, as Go's `archive/tar`
//! reads them, since that is what other engines unpack images with.
//!
//! A layer is hostile until proven otherwise: nothing is allocated by a length from the stream before a limit was asked.

mod header;
mod pax;
mod sparse;

use std::io::{self, Read};

use header::{Block, Header};
use pax::Extensions;
pub(super) use sparse::Segment;

use super::{LayerError, Limits};
use crate::layer::{DeviceNumber, Timestamp, Xattr};

/// The unit of a tar stream.
const BLOCK_LEN: usize = 512;

/// A member of a tar, without its data.
#[derive(Debug)]
pub(super) struct Member {
    pub(super) path: Vec<u8>,
    pub(super) kind: MemberKind,
    pub(super) mode: u16,
    pub(super) uid: u32,
    pub(super) gid: u32,
    pub(super) mtime: Timestamp,
    pub(super) xattrs: Vec<Xattr>,
}

#[derive(Debug)]
pub(super) enum MemberKind {
    /// The stream has the segments' bytes one after the other; the rest of the file is zeros.
    File {
        size: u64,
        segments: Vec<Segment>,
    },
    Directory,
    Symlink {
        target: Vec<u8>,
    },
    HardLink {
        target: Vec<u8>,
    },
    CharDevice(DeviceNumber),
    BlockDevice(DeviceNumber),
    Fifo,
}

/// A tar stream, member by member.
pub(super) struct TarReader<'l, R> {
    input: R,
    limits: &'l Limits,
    /// Bytes read so far.
    at: u64,
    /// What is left of the current member's data, and of the zeros that fill its last block.
    data: u64,
    padding: u64,
}

impl<'l, R: Read> TarReader<'l, R> {
    pub(super) fn new(input: R, limits: &'l Limits) -> Self {
        Self {
            input,
            limits,
            at: 0,
            data: 0,
            padding: 0,
        }
    }

    /// The next member; what was not read of the one before is skipped. `None` at the end of the archive.
    pub(super) fn next_member(&mut self) -> Result<Option<Member>, LayerError> {
        let mut extensions = Extensions::default();
        let mut extended = 0;
        loop {
            self.skip_rest()?;
            let Some(header) = self.next_header()? else {
                return Ok(None);
            };
            self.data = header.size;
            self.padding = padding_of(header.size);
            match header.kind {
                b'x' => extensions
                    .read_pax(&self.read_extension(&mut extended)?)
                    .map_err(|what| self.malformed(what))?,
                b'L' => extensions.path = Some(c_string(&self.read_extension(&mut extended)?)),
                b'K' => extensions.link = Some(c_string(&self.read_extension(&mut extended)?)),
                // A global header (git writes one with the commit's id): engines ignore it.
                b'g' => {}
                _ => return self.member(&header, extensions).map(Some),
            }
        }
    }

    /// Where in the stream the next byte is read.
    pub(super) fn position(&self) -> u64 {
        self.at
    }

    /// Reads all of `buffer` from the current member's data.
    pub(super) fn read_data(&mut self, buffer: &mut [u8]) -> Result<(), LayerError> {
        let len = buffer.len() as u64;
        if len > self.data {
            return Err(self.malformed("a file is shorter than its map says"));
        }
        self.fill(buffer)?;
        self.data -= len;
        Ok(())
    }

    /// Reads what follows the end of the archive, so that who computes a digest of the stream sees all of it.
    pub(super) fn drain(&mut self) -> Result<(), LayerError> {
        let mut buffer = [0; 8192];
        while self.read_some(&mut buffer)? > 0 {}
        Ok(())
    }

    fn malformed(&self, what: &'static str) -> LayerError {
        LayerError::Malformed { at: self.at, what }
    }

    fn member(&mut self, header: &Header, extensions: Extensions) -> Result<Member, LayerError> {
        let path = extensions
            .sparse
            .name
            .clone()
            .or(extensions.path.clone())
            .unwrap_or_else(|| header.path.clone());
        if path.contains(&0) || extensions.link.as_ref().is_some_and(|link| link.contains(&0)) {
            return Err(self.malformed("a path has a zero byte in it"));
        }
        let kind = self.member_kind(header, &extensions, &path)?;
        Ok(Member {
            path,
            kind,
            mode: header.mode,
            uid: extensions.uid.unwrap_or(header.uid),
            gid: extensions.gid.unwrap_or(header.gid),
            mtime: extensions.mtime.unwrap_or(Timestamp {
                seconds: header.mtime,
                nanoseconds: 0,
            }),
            xattrs: extensions.into_xattrs(),
        })
    }

    fn member_kind(&mut self, header: &Header, extensions: &Extensions, path: &[u8]) -> Result<MemberKind, LayerError> {
        let link = || extensions.link.clone().unwrap_or_else(|| header.link.clone());
        let device = || {
            let number = DeviceNumber {
                major: header.major,
                minor: header.minor,
            };
            let fits = number.major <= DeviceNumber::MAX_MAJOR && number.minor <= DeviceNumber::MAX_MINOR;
            fits.then_some(number)
                .ok_or_else(|| self.malformed("a device's number is greater than Linux has"))
        };
        let kind = match header.kind {
            // Before ustar, a folder was a file whose name ends in a slash.
            0 | b'0' | b'7' | b'S' if path.ends_with(b"/") => MemberKind::Directory,
            0 | b'0' | b'7' | b'S' => return self.file(header, extensions),
            b'1' => MemberKind::HardLink { target: link() },
            b'2' => MemberKind::Symlink { target: link() },
            b'3' => MemberKind::CharDevice(device()?),
            b'4' => MemberKind::BlockDevice(device()?),
            b'5' => MemberKind::Directory,
            b'6' => MemberKind::Fifo,
            other => {
                return Err(LayerError::UnknownType {
                    path: super::shown(path),
                    kind: char::from(other),
                });
            }
        };
        // Some writers leave the target's size in a link's header; no data follows (so reads Go).
        (self.data, self.padding) = (0, 0);
        Ok(kind)
    }

    fn file(&mut self, header: &Header, extensions: &Extensions) -> Result<MemberKind, LayerError> {
        // A PAX size replaces the header's, which has 33 bits in the old format.
        self.data = extensions.size.unwrap_or(header.size);
        self.padding = padding_of(self.data);
        let map = match (header.kind, extensions.sparse.is_used()) {
            (b'S', _) => Some(self.read_old_gnu_map(header)?),
            (_, true) => Some(self.pax_map(extensions)?),
            _ => None,
        };
        let (size, segments) = match map {
            None if self.data == 0 => (0, Vec::new()),
            None => (
                self.data,
                vec![Segment {
                    offset: 0,
                    len: self.data,
                }],
            ),
            Some((size, segments)) => {
                let segments = sparse::checked(segments, size, self.data).map_err(|what| self.malformed(what))?;
                (size, segments)
            }
        };
        if size > self.limits.max_file_len {
            return Err(LayerError::Limit {
                what: "bytes of one file",
                limit: self.limits.max_file_len,
            });
        }
        Ok(MemberKind::File { size, segments })
    }

    /// GNU's old format has the map in the header and in blocks that follow it.
    fn read_old_gnu_map(&mut self, header: &Header) -> Result<(u64, Vec<Segment>), LayerError> {
        let mut map = header.sparse.clone();
        let mut more = header.sparse_continues;
        while more {
            let mut block = Block::zeroed();
            self.fill(block.bytes_mut())?;
            more = block.sparse_extension(&mut map).map_err(|what| self.malformed(what))?;
            self.check_map(map.len())?;
        }
        Ok((header.sparse_size, map))
    }

    fn pax_map(&mut self, extensions: &Extensions) -> Result<(u64, Vec<Segment>), LayerError> {
        let size = extensions
            .sparse
            .size
            .ok_or_else(|| self.malformed("a sparse file has no size"))?;
        let segments = if extensions.sparse.map_is_in_data() {
            self.read_map_from_data()?
        } else {
            extensions.sparse.segments().map_err(|what| self.malformed(what))?
        };
        self.check_map(segments.len())?;
        Ok((size, segments))
    }

    /// PAX format 1.0: decimal numbers, one a line, in whole blocks before the data; the first is how many pairs follow.
    fn read_map_from_data(&mut self) -> Result<Vec<Segment>, LayerError> {
        let mut numbers = sparse::Lines::default();
        loop {
            let mut block = [0; BLOCK_LEN];
            self.read_data(&mut block)?;
            let done = numbers.add(&block).map_err(|what| self.malformed(what))?;
            self.check_map(numbers.len() / 2)?;
            if done {
                return numbers.into_segments().map_err(|what| self.malformed(what));
            }
        }
    }

    fn check_map(&self, segments: usize) -> Result<(), LayerError> {
        match segments > self.limits.max_segments {
            true => Err(LayerError::Limit {
                what: "pieces of a sparse file",
                limit: self.limits.max_segments as u64,
            }),
            false => Ok(()),
        }
    }

    /// The data of a member that describes the next one, of whose description `extended` bytes have come: there may be
    /// several such members, and they add up.
    fn read_extension(&mut self, extended: &mut usize) -> Result<Vec<u8>, LayerError> {
        let limit = self.limits.max_extension_len;
        match usize::try_from(self.data) {
            Ok(len) if len <= limit - *extended => {
                *extended += len;
                let mut data = vec![0; len];
                self.read_data(&mut data)?;
                Ok(data)
            }
            _ => Err(LayerError::Limit {
                what: "bytes of an extended header",
                limit: limit as u64,
            }),
        }
    }

    /// The next header; `None` after two blocks of zeros, or when the stream ends where a header could begin.
    fn next_header(&mut self) -> Result<Option<Header>, LayerError> {
        for _ in 0..2 {
            let mut block = Block::zeroed();
            let first = self.read_some(block.bytes_mut())?;
            if first == 0 {
                return Ok(None);
            }
            self.fill(&mut block.bytes_mut()[first..])?;
            if !block.is_zero() {
                return Header::parse(&block).map(Some).map_err(|what| self.malformed(what));
            }
        }
        Ok(None)
    }

    fn skip_rest(&mut self) -> Result<(), LayerError> {
        let mut rest = self.data.saturating_add(self.padding);
        (self.data, self.padding) = (0, 0);
        let mut buffer = [0; 8192];
        while rest > 0 {
            let len = usize::try_from(rest).map_or(buffer.len(), |rest| rest.min(buffer.len()));
            self.fill(&mut buffer[..len])?;
            rest -= len as u64;
        }
        Ok(())
    }

    fn fill(&mut self, mut buffer: &mut [u8]) -> Result<(), LayerError> {
        while !buffer.is_empty() {
            match self.read_some(buffer)? {
                0 => return Err(LayerError::Truncated { at: self.at }),
                len => buffer = &mut buffer[len..],
            }
        }
        Ok(())
    }

    fn read_some(&mut self, buffer: &mut [u8]) -> Result<usize, LayerError> {
        loop {
            match self.input.read(buffer) {
                Ok(len) => {
                    self.at += len as u64;
                    if self.at > self.limits.max_stream_len {
                        return Err(LayerError::Limit {
                            what: "bytes of an unpacked layer",
                            limit: self.limits.max_stream_len,
                        });
                    }
                    return Ok(len);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(source) => return Err(LayerError::Read { at: self.at, source }),
            }
        }
    }
}

fn padding_of(size: u64) -> u64 {
    size.wrapping_neg() % BLOCK_LEN as u64
}

/// What comes before the first zero byte.
fn c_string(bytes: &[u8]) -> Vec<u8> {
    bytes.iter().copied().take_while(|&byte| byte != 0).collect()
}
