//! Inodes with what follows them: extended attributes, block numbers of sparse files.

use super::{Body, ErofsError, Inode};
use crate::layer::{DeviceNumber, Timestamp, Xattr};

const COMPACT_LEN: usize = 32;
const EXTENDED_LEN: usize = 64;
/// Bit 0 of the format: an extended inode. The data layout is in the bits above.
const FORMAT_EXTENDED: u16 = 1;
const LAYOUT_PLAIN: u16 = 0;
const LAYOUT_INLINE: u16 = 2;
const LAYOUT_CHUNKED: u16 = 4;
/// A hole in the block numbers of a sparse file.
const HOLE: u32 = u32::MAX;

const XATTR_HEADER_LEN: usize = 12;
const XATTR_ENTRY_LEN: usize = 4;
/// The count in an inode has 16 bits, the unit is 4 bytes, and the header counts as one unit.
const MAX_XATTR_BODY: usize = (u16::MAX as usize - 1) * 4;
/// Prefixes of names that are stored as a number.
const XATTR_PREFIXES: [(&[u8], u8); 5] = [
    (b"user.", 1),
    (b"system.posix_acl_access", 2),
    (b"system.posix_acl_default", 3),
    (b"trusted.", 4),
    (b"security.", 6),
];

/// Where an inode and its contents lie.
pub(super) struct Placement {
    /// The inode, in bytes.
    pub(super) at: usize,
    /// How many bytes of contents follow the inode.
    pub(super) inline: usize,
    /// The first of its own blocks in the metadata.
    pub(super) block: u32,
}

/// Whether the short form can hold `inode`: it has 16 bits for owners and links, 32 for the size, and the file system's time.
pub(super) fn is_compact(inode: &Inode<'_>, epoch: Timestamp) -> bool {
    let short = |number: u32| u16::try_from(number).is_ok();
    let size = match inode.body {
        Body::Plain { size, .. } | Body::Sparse { size, .. } => size,
        // Directories and symlinks are in memory and their blocks are counted: well below 2^32 bytes, or refused.
        _ => 0,
    };
    inode.mtime == epoch && short(inode.uid) && short(inode.gid) && short(inode.links) && u32::try_from(size).is_ok()
}

pub(super) fn inode_len(compact: bool) -> usize {
    if compact { COMPACT_LEN } else { EXTENDED_LEN }
}

/// Bytes that `xattrs` take behind their inode.
pub(super) fn xattrs_len(xattrs: &[Xattr]) -> Result<usize, ErofsError> {
    let body: usize = xattrs
        .iter()
        .map(|xattr| {
            let (_, suffix) = split_name(&xattr.name);
            (XATTR_ENTRY_LEN + suffix.len() + xattr.value.len()).next_multiple_of(4)
        })
        .sum();
    match body {
        0 => Ok(0),
        1..=MAX_XATTR_BODY => Ok(XATTR_HEADER_LEN + body),
        _ => Err(ErofsError::TooManyXattrs(body)),
    }
}

fn split_name(name: &[u8]) -> (u8, &[u8]) {
    let known = XATTR_PREFIXES
        .iter()
        .find_map(|(prefix, index)| name.strip_prefix(*prefix).map(|rest| (*index, rest)));
    known.unwrap_or((0, name))
}

fn encode_xattrs(xattrs: &[Xattr], out: &mut Vec<u8>) -> Result<(), ErofsError> {
    if xattrs.is_empty() {
        return Ok(());
    }
    out.extend_from_slice(&[0; XATTR_HEADER_LEN]);
    for xattr in xattrs {
        let (index, suffix) = split_name(&xattr.name);
        let (Ok(name_len), Ok(value_len)) = (u8::try_from(suffix.len()), u16::try_from(xattr.value.len())) else {
            return Err(ErofsError::XattrTooLong {
                name: String::from_utf8_lossy(&xattr.name).into_owned(),
            });
        };
        out.extend_from_slice(&[name_len, index]);
        out.extend_from_slice(&value_len.to_le_bytes());
        out.extend_from_slice(suffix);
        out.extend_from_slice(&xattr.value);
        out.resize(out.len().next_multiple_of(4), 0);
    }
    Ok(())
}

/// Linux's encoding of device numbers in 32 bits: 12 bits of minor above 12 of major above 8 of minor.
fn encode_device(number: DeviceNumber) -> u32 {
    (number.minor & 0xff) | (number.major << 8) | ((number.minor & !0xff) << 12)
}

/// The inode, its extended attributes, and a sparse file's block numbers; `data_from` is the first block of data.
pub(super) fn encode_inode(
    inode: &Inode<'_>,
    number: usize,
    placement: &Placement,
    data_from: u32,
    epoch: Timestamp,
) -> Result<Vec<u8>, ErofsError> {
    let address = |block: u32| data_from.checked_add(block).ok_or(ErofsError::TooManyBlocks);
    let contents_layout = if placement.inline > 0 {
        LAYOUT_INLINE
    } else {
        LAYOUT_PLAIN
    };
    let (type_bits, size, layout, union) = match &inode.body {
        Body::Directory(entries) => (
            libc::S_IFDIR,
            super::directory::encoded_len(entries) as u64,
            contents_layout,
            placement.block,
        ),
        Body::Symlink(target) => (libc::S_IFLNK, target.len() as u64, contents_layout, placement.block),
        Body::Plain { size, first_block } => (libc::S_IFREG, *size, LAYOUT_PLAIN, address(*first_block)?),
        Body::Sparse { size, unit_bits, .. } => (libc::S_IFREG, *size, LAYOUT_CHUNKED, u32::from(*unit_bits)),
        Body::CharDevice(device) => (libc::S_IFCHR, 0, LAYOUT_PLAIN, encode_device(*device)),
        Body::BlockDevice(device) => (libc::S_IFBLK, 0, LAYOUT_PLAIN, encode_device(*device)),
        Body::Fifo => (libc::S_IFIFO, 0, LAYOUT_PLAIN, 0),
    };
    let xattrs = xattrs_len(inode.xattrs)?;
    let xattr_count = if xattrs == 0 {
        0
    } else {
        (xattrs - XATTR_HEADER_LEN) / 4 + 1
    };
    let compact = is_compact(inode, epoch);
    let mut out = Vec::with_capacity(inode_len(compact) + xattrs);
    let mut put = |bytes: &[u8]| out.extend_from_slice(bytes);
    put(&((layout << 1) | if compact { 0 } else { FORMAT_EXTENDED }).to_le_bytes());
    put(&low16(xattr_count as u64).to_le_bytes());
    put(&(low16(type_bits.into()) | inode.mode).to_le_bytes());
    // The number that 32-bit programs see; nothing depends on it.
    let short_number = low32(number as u64 + 1);
    if compact {
        put(&low16(inode.links.into()).to_le_bytes());
        put(&low32(size).to_le_bytes());
        put(&[0; 4]);
        put(&union.to_le_bytes());
        put(&short_number.to_le_bytes());
        put(&low16(inode.uid.into()).to_le_bytes());
        put(&low16(inode.gid.into()).to_le_bytes());
        put(&[0; 4]);
    } else {
        put(&[0; 2]);
        put(&size.to_le_bytes());
        put(&union.to_le_bytes());
        put(&short_number.to_le_bytes());
        put(&inode.uid.to_le_bytes());
        put(&inode.gid.to_le_bytes());
        put(&inode.mtime.seconds.to_le_bytes());
        put(&inode.mtime.nanoseconds.to_le_bytes());
        put(&inode.links.to_le_bytes());
        put(&[0; 16]);
    }
    encode_xattrs(inode.xattrs, &mut out)?;
    if let Body::Sparse { units, .. } = &inode.body {
        for unit in units {
            let block = unit.map_or(Ok(HOLE), address)?;
            out.extend_from_slice(&block.to_le_bytes());
        }
    }
    Ok(out)
}

/// For values that were checked to fit: by [`is_compact`], by [`xattrs_len`], or because file types have 16 bits.
fn low16(value: u64) -> u16 {
    let [a, b, ..] = value.to_le_bytes();
    u16::from_le_bytes([a, b])
}

/// As [`low16`], for 32 bits.
fn low32(value: u64) -> u32 {
    let [a, b, c, d, ..] = value.to_le_bytes();
    u32::from_le_bytes([a, b, c, d])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn device_numbers_are_encoded_as_linux_does() {
        let encode = |major, minor| encode_device(DeviceNumber { major, minor });
        assert_eq!(encode(1, 3), 0x103);
        assert_eq!(encode(0xfff, 0xf_ffff), 0xffff_ffff);
        assert_eq!(encode(8, 0x12345), 0x1230_0845);
    }

    #[test]
    fn too_many_xattrs_are_refused() {
        let xattr = |number: u8| Xattr {
            name: vec![b'u', number],
            value: vec![0; 65_000],
        };
        let many: Vec<_> = (0..5).map(xattr).collect();
        assert!(xattrs_len(&many[..4]).is_ok());
        assert!(matches!(xattrs_len(&many), Err(ErofsError::TooManyXattrs(_))));
    }
}
