//! From a tar stream to a layer index, in one pass and with bounded memory.

use std::io::Read;

use super::chunker::{CUT, Chunker, LONG_FILE};
use super::index::{Attributes, Entry, EntryKind, LayerIndex, Xattr};
use super::places::{Piece, Places};
use super::tar::{Member, MemberKind, Segment, TarReader};
use super::{LayerError, Limits, shown};
use crate::chunk::ChunkSink;

/// OCI image specification, "Whiteouts".
const WHITEOUT: &[u8] = b".wh.";
const OPAQUE: &[u8] = b".wh..wh..opq";
/// What AUFS kept for itself in layers of old.
const AUFS: &[u8] = b".wh..wh.";

/// Reads the layer whose uncompressed tar is `tar`, to its end, and puts its content into `sink`.
///
/// Paths are cleaned as engines do: a leading slash goes, `.` goes, `..` takes back the component before it and stops at
/// the root. Attributes that could steer the overlay above an image (`trusted.overlay.*`), and those that depend on the
/// host it was built on (`security.selinux`, NFS ACLs), do not come along.
///
/// # Errors
/// [`LayerError`] says what is wrong with the tar, and where; chunks may have been put by then.
pub fn ingest(tar: impl Read, sink: &mut impl ChunkSink, limits: &Limits) -> Result<LayerIndex, LayerError> {
    ingest_placed(tar, sink, limits).map(|(index, _)| index)
}

/// As [`ingest`], and tells where in the stream each chunk lies.
///
/// # Errors
/// As [`ingest`].
pub fn ingest_placed(
    tar: impl Read,
    sink: &mut impl ChunkSink,
    limits: &Limits,
) -> Result<(LayerIndex, Places), LayerError> {
    let mut reader = TarReader::new(tar, limits);
    let mut chunker = Chunker::new(sink, limits);
    let mut buffer = Vec::new();
    while let Some(member) = reader.next_member()? {
        let Some(path) = clean_path(&member.path)? else {
            continue;
        };
        let (path, mark) = match whiteout(path)? {
            Name::Aufs => continue,
            Name::Plain(path) => (path, None),
            Name::Whiteout(path) => (path, Some(EntryKind::Whiteout)),
            Name::Opaque(path) => (path, Some(EntryKind::Opaque)),
        };
        if let Some(kind) = mark {
            chunker.push(Entry {
                path,
                kind,
                attributes: Attributes::default(),
            })?;
            continue;
        }
        add(member, path, &mut reader, &mut chunker, &mut buffer, limits)?;
    }
    reader.drain()?;
    chunker.finish()
}

fn add<R: Read, S: ChunkSink>(
    member: Member,
    path: Vec<u8>,
    reader: &mut TarReader<'_, R>,
    chunker: &mut Chunker<'_, S>,
    buffer: &mut Vec<u8>,
    limits: &Limits,
) -> Result<(), LayerError> {
    let Member {
        mode, uid, gid, mtime, ..
    } = member;
    let xattrs = admitted_xattrs(member.xattrs, &path, limits)?;
    let mut entry = Entry {
        path,
        kind: EntryKind::Directory,
        attributes: Attributes {
            mode,
            uid,
            gid,
            mtime,
            xattrs,
        },
    };
    entry.kind = match member.kind {
        MemberKind::File { size, segments } => return add_file(entry, size, &segments, reader, chunker, buffer),
        MemberKind::Directory => EntryKind::Directory,
        MemberKind::Symlink { target } => EntryKind::Symlink {
            target: symlink_target(target, &entry.path)?,
        },
        MemberKind::HardLink { target } => {
            entry.attributes = Attributes::default();
            EntryKind::HardLink {
                target: clean_path(&target)?.unwrap_or_default(),
            }
        }
        MemberKind::CharDevice(number) => EntryKind::CharDevice(number),
        MemberKind::BlockDevice(number) => EntryKind::BlockDevice(number),
        MemberKind::Fifo => EntryKind::Fifo,
    };
    chunker.push(entry)
}

/// Adds a file, window by window: a window is what one chunk of it can hold.
fn add_file<R: Read, S: ChunkSink>(
    mut entry: Entry,
    size: u64,
    segments: &[Segment],
    reader: &mut TarReader<'_, R>,
    chunker: &mut Chunker<'_, S>,
    buffer: &mut Vec<u8>,
) -> Result<(), LayerError> {
    let (mut extents, mut pieces) = (Vec::new(), Vec::new());
    let mut rest = segments.iter().copied().peekable();
    let mut segment = rest.next();
    while let Some(first) = segment {
        let window = first.offset - first.offset % CUT as u64;
        let window_end = size.min(window.saturating_add(CUT as u64));
        buffer.clear();
        pieces.clear();
        let in_window = |offset: u64| usize::try_from(offset - window).map_or(CUT, |place| place.min(CUT));
        buffer.resize(in_window(window_end), 0);
        while let Some(piece) = segment.filter(|piece| piece.offset < window_end) {
            let end = window_end.min(piece.offset + piece.len);
            let range = in_window(piece.offset)..in_window(end);
            pieces.extend(piece_at(reader.position(), &range));
            reader.read_data(&mut buffer[range])?;
            let left = piece.offset + piece.len - end;
            segment = if left > 0 {
                Some(Segment { offset: end, len: left })
            } else {
                rest.next()
            };
        }
        if size < LONG_FILE as u64 {
            entry.kind = EntryKind::File { size, extents };
            return chunker.push_short(entry, buffer, &pieces);
        }
        extents.extend(chunker.put_piece(window, buffer, &pieces)?);
    }
    entry.kind = EntryKind::File { size, extents };
    chunker.push(entry)
}

/// What comes at `stream` and goes to `range` of a chunk; `None` if that is nothing.
fn piece_at(stream: u64, range: &std::ops::Range<usize>) -> Option<Piece> {
    let piece = Piece {
        stream,
        offset: u32::try_from(range.start).ok()?,
        len: u32::try_from(range.len()).ok()?,
    };
    (piece.len > 0).then_some(piece)
}

/// A path in the form of [`Entry::path`]; `None` for an empty one, which names nothing.
fn clean_path(path: &[u8]) -> Result<Option<Vec<u8>>, LayerError> {
    if path.is_empty() {
        return Ok(None);
    }
    let mut names: Vec<&[u8]> = Vec::new();
    for name in path.split(|&byte| byte == b'/') {
        match name {
            b"" | b"." => {}
            b".." => drop(names.pop()),
            _ if name.len() > super::MAX_NAME_LEN => return Err(LayerError::PathTooLong { path: shown(path) }),
            _ => names.push(name),
        }
    }
    let clean = names.join(&b'/');
    if clean.len() > super::MAX_PATH_LEN {
        return Err(LayerError::PathTooLong { path: shown(path) });
    }
    Ok(Some(clean))
}

fn symlink_target(target: Vec<u8>, path: &[u8]) -> Result<Vec<u8>, LayerError> {
    match target.len() {
        1..=super::MAX_PATH_LEN => Ok(target),
        0 => Err(LayerError::EmptySymlink { path: shown(path) }),
        _ => Err(LayerError::PathTooLong { path: shown(&target) }),
    }
}

/// What a member's name says about lower layers.
enum Name {
    Plain(Vec<u8>),
    Whiteout(Vec<u8>),
    Opaque(Vec<u8>),
    Aufs,
}

fn whiteout(path: Vec<u8>) -> Result<Name, LayerError> {
    let slash = path.iter().rposition(|&byte| byte == b'/');
    let name = &path[slash.map_or(0, |slash| slash + 1)..];
    let parent = &path[..slash.unwrap_or(0)];
    if parent.split(|&byte| byte == b'/').any(|name| name.starts_with(AUFS)) {
        return Ok(Name::Aufs);
    }
    if name == OPAQUE {
        return Ok(Name::Opaque(parent.to_vec()));
    }
    if name.starts_with(AUFS) {
        return Ok(Name::Aufs);
    }
    match name.strip_prefix(WHITEOUT) {
        None => Ok(Name::Plain(path)),
        Some(b"" | b"." | b"..") => Err(LayerError::BadWhiteout { path: shown(&path) }),
        Some(hidden) if parent.is_empty() => Ok(Name::Whiteout(hidden.to_vec())),
        Some(hidden) => Ok(Name::Whiteout([parent, hidden].join(&b'/'))),
    }
}

/// The extended attributes that a guest gets to see.
fn admitted_xattrs(mut xattrs: Vec<Xattr>, path: &[u8], limits: &Limits) -> Result<Vec<Xattr>, LayerError> {
    xattrs.retain(|xattr| is_admitted(&xattr.name));
    let total: usize = xattrs.iter().map(|xattr| xattr.name.len() + xattr.value.len()).sum();
    let is_possible =
        |xattr: &Xattr| xattr.name.len() <= super::MAX_NAME_LEN && u16::try_from(xattr.value.len()).is_ok();
    if total > limits.max_xattrs_len || !xattrs.iter().all(is_possible) {
        return Err(LayerError::TooManyXattrs { path: shown(path) });
    }
    Ok(xattrs)
}

fn is_admitted(name: &[u8]) -> bool {
    let has_rest = |prefix: &[u8]| {
        name.strip_prefix(prefix)
            .is_some_and(|rest| !rest.is_empty() && !rest.contains(&0))
    };
    match name {
        b"security.selinux" => false,
        b"system.posix_acl_access" | b"system.posix_acl_default" => true,
        _ if name.starts_with(b"trusted.overlay.") => false,
        _ => [&b"user."[..], b"security.", b"trusted."].into_iter().any(has_rest),
    }
}
