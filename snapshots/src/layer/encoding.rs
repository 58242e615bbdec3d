//! The layer index as bytes.
//!
//! Integers in the header are little-endian; in the body they are variable-length (LEB128: seven bits a byte, lowest first).
//! Paths are front-coded: a tar walks folders in order, so most of a path repeats the one before it.
//!
//! ```text
//!   0        8         12        16        20       24            32                  64
//!   +--------+---------+---------+---------+--------+-------------+-------------------+------------------+
//!   |"FLINTLYR"|version| chunks  | entries | 0      | body length | BLAKE3 of header  | body             |
//!   |          |  u32  |  u32    |  u32    | u32    | u64         | (0..32) and body  |                  |
//!   +--------+---------+---------+---------+--------+-------------+-------------------+------------------+
//!   body  = chunk* entry*
//!   chunk = name (32 bytes), length
//!   entry = bytes shared with the path before, length of the rest, the rest, kind (1 byte), mode, uid, gid,
//!           seconds (zigzag), nanoseconds, number of xattrs, xattr*, then by kind:
//!           0 file: size, number of extents, extent*      1 directory, 4 fifo, 7 whiteout, 8 opaque: nothing
//!           2 symlink, 6 hard link: length, target        3 character, 5 block device: major, minor
//!   xattr = length, name, length, value
//!   extent = gap after the extent before, chunk, offset in the chunk, length
//! ```
//!
//! A reader believes nothing: the digest finds damage, and every count, length and order is checked as well, since an index
//! may come from another host.

use super::index::{Attributes, DeviceNumber, Entry, EntryKind, Extent, LayerIndex, Timestamp, Xattr};
use crate::bytes::u32_at;
use crate::chunk::{Chunk, ChunkId, MAX_CHUNK_LEN};

const MAGIC: &[u8; 8] = b"FLINTLYR";
const VERSION: u32 = 1;
pub(crate) const HEADER_LEN: usize = 64;
const HASHED_HEADER_LEN: usize = 32;
/// The fewest bytes that an entry takes: what a count is checked against before anything is allocated for it.
const MIN_ENTRY_LEN: usize = 9;
const MIN_EXTENT_LEN: usize = 4;
const MIN_XATTR_LEN: usize = 2;

/// Why bytes are not a layer index.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    /// They do not begin as one.
    #[error("this is not a layer index")]
    NotAnIndex,
    /// Written by another version of Flint.
    #[error("the layer index has version {0}, this program reads version {VERSION}: pull the image again")]
    Version(u32),
    /// Its digest does not match.
    #[error("the layer index is damaged: its digest does not match; pull the image again")]
    Damaged,
    /// The digest matches, the content makes no sense.
    #[error("the layer index is malformed at byte {at}: {what}")]
    Malformed {
        /// Where in the body.
        at: usize,
        /// What is wrong.
        what: &'static str,
    },
}

impl LayerIndex {
    /// The index as bytes; the same index gives the same bytes.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = vec![0; HEADER_LEN];
        for chunk in &self.chunks {
            out.extend_from_slice(chunk.id.as_bytes());
            put_int(&mut out, chunk.len.into());
        }
        let mut previous: &[u8] = &[];
        for entry in &self.entries {
            put_entry(&mut out, entry, previous);
            previous = &entry.path;
        }
        close(&mut out, MAGIC, [count(self.chunks.len()), count(self.entries.len())]);
        out
    }

    /// The index that `bytes` hold.
    ///
    /// # Errors
    /// [`DecodeError`] for anything that [`LayerIndex::encode`] would not have written.
    pub fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        let ([chunks, entries], mut body) = open(bytes, MAGIC)?;
        let chunks = body.checked_count(chunks.into(), ChunkId::LEN + 1)?;
        let chunks = (0..chunks).map(|_| body.chunk()).collect::<Result<Vec<_>, _>>()?;
        let count = body.checked_count(entries.into(), MIN_ENTRY_LEN)?;
        let mut entries: Vec<Entry> = Vec::with_capacity(count);
        for _ in 0..count {
            let previous = entries.last().map_or(&[][..], |entry| &entry.path);
            let entry = body.entry(previous, &chunks)?;
            entries.push(entry);
        }
        body.end()?;
        Ok(Self { chunks, entries })
    }
}

/// Completes what was put behind [`HEADER_LEN`] bytes: writes the header, with two counts of what is in the body.
pub(crate) fn close(out: &mut [u8], magic: &[u8; 8], counts: [u32; 2]) {
    let body_len = (out.len() - HEADER_LEN) as u64;
    out[..8].copy_from_slice(magic);
    out[8..12].copy_from_slice(&VERSION.to_le_bytes());
    out[12..16].copy_from_slice(&counts[0].to_le_bytes());
    out[16..20].copy_from_slice(&counts[1].to_le_bytes());
    out[24..32].copy_from_slice(&body_len.to_le_bytes());
    let digest = digest(out);
    out[HASHED_HEADER_LEN..HEADER_LEN].copy_from_slice(&digest);
}

/// Checks the header that [`close`] wrote; the counts in it and a reader of the body.
pub(crate) fn open<'a>(bytes: &'a [u8], magic: &[u8; 8]) -> Result<([u32; 2], Reader<'a>), DecodeError> {
    let header = bytes
        .get(..HEADER_LEN)
        .filter(|header| header.starts_with(magic))
        .ok_or(DecodeError::NotAnIndex)?;
    let version = u32_at(header, 8);
    if version != VERSION {
        return Err(DecodeError::Version(version));
    }
    if digest(bytes) != header[HASHED_HEADER_LEN..] {
        return Err(DecodeError::Damaged);
    }
    let body = Reader {
        bytes: &bytes[HEADER_LEN..],
        at: 0,
    };
    Ok(([u32_at(header, 12), u32_at(header, 16)], body))
}

/// Counts fit: the limits on a layer are far below 2^32, and memory would be gone before.
pub(crate) fn count(len: usize) -> u32 {
    u32::try_from(len).unwrap_or(u32::MAX)
}

fn digest(bytes: &[u8]) -> [u8; 32] {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&bytes[..HASHED_HEADER_LEN]).update(&bytes[HEADER_LEN..]);
    *hasher.finalize().as_bytes()
}

/// Makes the digest of a changed index good again; does nothing to what has no header.
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) fn seal(index: &mut [u8]) {
    if index.len() >= HEADER_LEN {
        let digest = digest(index);
        index[HASHED_HEADER_LEN..HEADER_LEN].copy_from_slice(&digest);
    }
}

pub(crate) fn put_int(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value.to_le_bytes()[0] | 0x80);
        value >>= 7;
    }
    out.push(value.to_le_bytes()[0]);
}

fn put_bytes(out: &mut Vec<u8>, bytes: &[u8]) {
    put_int(out, bytes.len() as u64);
    out.extend_from_slice(bytes);
}

fn put_entry(out: &mut Vec<u8>, entry: &Entry, previous: &[u8]) {
    let shared = entry.path.iter().zip(previous).take_while(|(a, b)| a == b).count();
    put_int(out, shared as u64);
    put_bytes(out, &entry.path[shared..]);
    out.push(entry.kind.tag());
    let Attributes {
        mode,
        uid,
        gid,
        mtime,
        xattrs,
    } = &entry.attributes;
    put_int(out, (*mode).into());
    put_int(out, (*uid).into());
    put_int(out, (*gid).into());
    put_int(out, ((mtime.seconds << 1) ^ (mtime.seconds >> 63)).cast_unsigned());
    put_int(out, mtime.nanoseconds.into());
    put_int(out, xattrs.len() as u64);
    for xattr in xattrs {
        put_bytes(out, &xattr.name);
        put_bytes(out, &xattr.value);
    }
    match &entry.kind {
        EntryKind::File { size, extents } => {
            put_int(out, *size);
            put_int(out, extents.len() as u64);
            let mut end = 0;
            for extent in extents {
                put_int(out, extent.file_offset.wrapping_sub(end));
                put_int(out, extent.chunk.into());
                put_int(out, extent.offset.into());
                put_int(out, extent.len.into());
                end = extent.file_offset + u64::from(extent.len);
            }
        }
        EntryKind::Symlink { target } | EntryKind::HardLink { target } => put_bytes(out, target),
        EntryKind::CharDevice(number) | EntryKind::BlockDevice(number) => {
            put_int(out, number.major.into());
            put_int(out, number.minor.into());
        }
        EntryKind::Directory | EntryKind::Fifo | EntryKind::Whiteout | EntryKind::Opaque => {}
    }
}

impl EntryKind {
    fn tag(&self) -> u8 {
        match self {
            Self::File { .. } => 0,
            Self::Directory => 1,
            Self::Symlink { .. } => 2,
            Self::CharDevice(_) => 3,
            Self::Fifo => 4,
            Self::BlockDevice(_) => 5,
            Self::HardLink { .. } => 6,
            Self::Whiteout => 7,
            Self::Opaque => 8,
        }
    }
}

/// A path as an index holds it: relative, and each component a plain name.
pub(super) fn is_clean_path(path: &[u8]) -> bool {
    path.is_empty()
        || path
            .split(|&byte| byte == b'/')
            .all(|name| !matches!(name, b"" | b"." | b"..") && !name.contains(&0))
}

/// Reads a body, field by field.
pub(crate) struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    /// Whether all was read.
    pub(crate) fn end(&self) -> Result<(), DecodeError> {
        match self.at == self.bytes.len() {
            true => Ok(()),
            false => self.malformed("bytes are left over"),
        }
    }

    pub(crate) fn malformed<T>(&self, what: &'static str) -> Result<T, DecodeError> {
        Err(DecodeError::Malformed { at: self.at, what })
    }

    pub(crate) fn take(&mut self, len: usize) -> Result<&'a [u8], DecodeError> {
        let Some(taken) = self.bytes[self.at..].get(..len) else {
            return self.malformed("it ends too early");
        };
        self.at += len;
        Ok(taken)
    }

    pub(crate) fn int(&mut self) -> Result<u64, DecodeError> {
        let mut value = 0u64;
        for shift in (0..64).step_by(7) {
            let byte = self.take(1)?[0];
            let bits = u64::from(byte & 0x7f);
            if bits << shift >> shift != bits || (byte == 0 && shift > 0) {
                return self.malformed("a number is not in its only form");
            }
            value |= bits << shift;
            if byte & 0x80 == 0 {
                return Ok(value);
            }
        }
        self.malformed("a number is longer than 64 bits")
    }

    pub(crate) fn int_as<T: TryFrom<u64>>(&mut self) -> Result<T, DecodeError> {
        let value = self.int()?;
        T::try_from(value).or_else(|_| self.malformed("a number is too great"))
    }

    /// `count`, if that many things of at least `min_len` bytes can still come.
    pub(crate) fn checked_count(&self, count: u64, min_len: usize) -> Result<usize, DecodeError> {
        match usize::try_from(count) {
            Ok(count) if count <= (self.bytes.len() - self.at) / min_len => Ok(count),
            _ => self.malformed("a count is greater than what follows can hold"),
        }
    }

    pub(crate) fn byte_string(&mut self) -> Result<&'a [u8], DecodeError> {
        let len = self.int_as()?;
        self.take(len)
    }

    pub(crate) fn chunk(&mut self) -> Result<Chunk, DecodeError> {
        let mut id = [0; ChunkId::LEN];
        id.copy_from_slice(self.take(ChunkId::LEN)?);
        let len: u32 = self.int_as()?;
        if len == 0 || len as usize > MAX_CHUNK_LEN {
            return self.malformed("a chunk has an impossible length");
        }
        Ok(Chunk {
            id: ChunkId::from_bytes(id),
            len,
        })
    }

    fn entry(&mut self, previous: &[u8], chunks: &[Chunk]) -> Result<Entry, DecodeError> {
        let shared: usize = self.int_as()?;
        let Some(shared) = previous.get(..shared) else {
            return self.malformed("a path shares more than there is");
        };
        let path = [shared, self.byte_string()?].concat();
        if !is_clean_path(&path) {
            return self.malformed("a path is not clean");
        }
        let tag = self.take(1)?[0];
        let attributes = self.attributes()?;
        let kind = match tag {
            0 => self.file(chunks)?,
            1 => EntryKind::Directory,
            2 => EntryKind::Symlink {
                target: self.byte_string()?.to_vec(),
            },
            3 => EntryKind::CharDevice(self.device_number()?),
            4 => EntryKind::Fifo,
            5 => EntryKind::BlockDevice(self.device_number()?),
            6 => EntryKind::HardLink {
                target: self.hard_link_target()?,
            },
            7 => EntryKind::Whiteout,
            8 => EntryKind::Opaque,
            _ => return self.malformed("an entry has an unknown kind"),
        };
        Ok(Entry { path, kind, attributes })
    }

    fn hard_link_target(&mut self) -> Result<Vec<u8>, DecodeError> {
        let target = self.byte_string()?.to_vec();
        if !is_clean_path(&target) {
            return self.malformed("a hard link's target is not clean");
        }
        Ok(target)
    }

    fn attributes(&mut self) -> Result<Attributes, DecodeError> {
        let mode: u16 = self.int_as()?;
        let (uid, gid) = (self.int_as()?, self.int_as()?);
        let zigzag = self.int()?;
        let seconds = (zigzag >> 1).cast_signed() ^ -((zigzag & 1).cast_signed());
        let nanoseconds: u32 = self.int_as()?;
        if mode > 0o7777 || nanoseconds >= 1_000_000_000 {
            return self.malformed("permissions or time are out of range");
        }
        let count = self.int()?;
        let count = self.checked_count(count, MIN_XATTR_LEN)?;
        let mut xattrs: Vec<Xattr> = Vec::with_capacity(count);
        for _ in 0..count {
            let xattr = Xattr {
                name: self.byte_string()?.to_vec(),
                value: self.byte_string()?.to_vec(),
            };
            if xattrs.last().is_some_and(|last| last.name >= xattr.name) {
                return self.malformed("extended attributes are not in order");
            }
            xattrs.push(xattr);
        }
        Ok(Attributes {
            mode,
            uid,
            gid,
            mtime: Timestamp { seconds, nanoseconds },
            xattrs,
        })
    }

    fn device_number(&mut self) -> Result<DeviceNumber, DecodeError> {
        let number = DeviceNumber {
            major: self.int_as()?,
            minor: self.int_as()?,
        };
        if number.major > DeviceNumber::MAX_MAJOR || number.minor > DeviceNumber::MAX_MINOR {
            return self.malformed("a device number is out of range");
        }
        Ok(number)
    }

    fn file(&mut self, chunks: &[Chunk]) -> Result<EntryKind, DecodeError> {
        let size = self.int()?;
        let count = self.int()?;
        let count = self.checked_count(count, MIN_EXTENT_LEN)?;
        let mut extents = Vec::with_capacity(count);
        let mut end = 0u64;
        for _ in 0..count {
            let gap = self.int()?;
            let (chunk, offset, len): (u32, u32, u32) = (self.int_as()?, self.int_as()?, self.int_as()?);
            let Some(chunk_len) = chunks.get(chunk as usize).map(|chunk| u64::from(chunk.len)) else {
                return self.malformed("an extent names a chunk that is not listed");
            };
            let file_offset = end.checked_add(gap);
            let file_end = file_offset
                .and_then(|at| at.checked_add(len.into()))
                .filter(|&file_end| file_end <= size);
            let (Some(file_offset), Some(file_end)) = (file_offset, file_end) else {
                return self.malformed("an extent lies beyond its file's end");
            };
            if len == 0 || u64::from(offset) + u64::from(len) > chunk_len {
                return self.malformed("an extent lies beyond its chunk's end");
            }
            extents.push(Extent {
                file_offset,
                chunk,
                offset,
                len,
            });
            end = file_end;
        }
        Ok(EntryKind::File { size, extents })
    }
}
