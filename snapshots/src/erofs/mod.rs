//! Writing EROFS metadata: the Linux read-only file system in which the guest sees an image.
//!
//! Source for the format: Linux `Documentation/filesystems/erofs.rst` and `fs/erofs/erofs_fs.h`. Everything is uncompressed
//! and in blocks of 4 KiB; what is written can be read by any kernel since 5.15. Where data lies is the caller's affair: an
//! inode says which block it begins at, counted from the end of the metadata.
//!
//! ```text
//!      0 +----------------------------------------------------------------+
//!        | zeros                                                          |
//!   1024 | superblock (128 bytes)                                         |
//!   1152 | inodes, at multiples of 32 bytes; the root comes first:        |  number of an inode = its place / 32
//!        |   inode (32 or 64 bytes)                                       |
//!        |   extended attributes                                          |
//!        |   one of: last part of a directory | target of a symlink |     |  never crosses a block's end
//!        |           block numbers of a sparse file                       |
//!   n*4K +----------------------------------------------------------------+
//!        | blocks of big directories and of long symlinks                 |
//!   m*4K +----------------------------------------------------------------+
//!        | the caller's data                                              |
//! ```

mod directory;
mod inode;
mod superblock;

use std::collections::BTreeMap;

use directory::encode_directory;
pub(crate) use directory::{Dirent, FileType};
use inode::{Placement, encode_inode, inode_len, is_compact, xattrs_len};
use superblock::{INODES_AT, Superblock};

use crate::layer::{DeviceNumber, Timestamp, Xattr};

/// A block, the unit of addresses.
pub(crate) const BLOCK: usize = 4096;
/// Inodes lie at multiples of this.
const INODE_SLOT: usize = 32;
/// The last part of a directory, or a symlink's target, follows its inode if it is not longer than this; a longer one would
/// waste more of the inode's block than it saves.
const MAX_INLINE: usize = BLOCK / 2;

/// A file to write.
#[derive(Debug)]
pub(crate) struct Inode<'a> {
    /// Permissions; the type follows from the body.
    pub(crate) mode: u16,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) mtime: Timestamp,
    pub(crate) xattrs: &'a [Xattr],
    pub(crate) links: u32,
    pub(crate) body: Body<'a>,
}

/// What a file is.
#[derive(Debug)]
pub(crate) enum Body<'a> {
    /// A directory with these entries; `.` and `..` are among them.
    Directory(Vec<Dirent<'a>>),
    /// A file whose blocks follow each other from this one on, counted from the end of the metadata.
    Plain {
        size: u64,
        first_block: u32,
    },
    /// A file in units of 2^`unit_bits` blocks. Each unit begins at a block, counted as above, or is a hole.
    Sparse {
        size: u64,
        unit_bits: u8,
        units: Vec<Option<u32>>,
    },
    Symlink(&'a [u8]),
    CharDevice(DeviceNumber),
    BlockDevice(DeviceNumber),
    Fifo,
}

/// Why EROFS cannot hold a tree.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ErofsError {
    /// Addresses have 32 bits.
    #[error("the image needs more than 2^32 blocks of 4 KiB")]
    TooManyBlocks,
    /// Extended attributes of one file are counted in 16 bits.
    #[error("a file has {0} bytes of extended attributes, at most 262136 are possible")]
    TooManyXattrs(usize),
    /// An attribute's name or value is too long.
    #[error("the extended attribute {name:?} has a name or a value that is too long")]
    XattrTooLong {
        /// Its name.
        name: String,
    },
}

/// The metadata of a file system: a multiple of [`BLOCK`] bytes. `inodes[0]` is the root, directory entries name inodes by
/// their place in `inodes`; `data_blocks` blocks of data follow.
pub(crate) fn write(inodes: &[Inode<'_>], data_blocks: u32) -> Result<Vec<u8>, ErofsError> {
    let epoch = most_common_mtime(inodes);
    let layout = Layout::of(inodes, epoch)?;
    let metadata_blocks = u32::try_from(layout.end / BLOCK).map_err(|_| ErofsError::TooManyBlocks)?;
    let blocks = metadata_blocks
        .checked_add(data_blocks)
        .ok_or(ErofsError::TooManyBlocks)?;
    let mut image = vec![0; layout.end];
    for (number, (inode, placement)) in inodes.iter().zip(&layout.placements).enumerate() {
        let encoded = encode_inode(inode, number, placement, metadata_blocks, epoch)?;
        image[placement.at..][..encoded.len()].copy_from_slice(&encoded);
        let contents = match &inode.body {
            Body::Directory(entries) => &encode_directory(entries, |inode| layout.number_of(inode)),
            Body::Symlink(target) => *target,
            _ => continue,
        };
        let (blocks, tail) = contents.split_at(contents.len() - placement.inline);
        image[placement.block as usize * BLOCK..][..blocks.len()].copy_from_slice(blocks);
        image[placement.at + encoded.len()..][..tail.len()].copy_from_slice(tail);
    }
    let superblock = Superblock {
        root: layout.number_of(0),
        inodes: inodes.len() as u64,
        epoch,
        blocks,
        has_sparse_files: inodes.iter().any(|inode| matches!(inode.body, Body::Sparse { .. })),
    };
    superblock.write(&mut image)?;
    Ok(image)
}

/// Where everything lies.
struct Layout {
    placements: Vec<Placement>,
    end: usize,
}

impl Layout {
    fn of(inodes: &[Inode<'_>], epoch: Timestamp) -> Result<Self, ErofsError> {
        let mut placements = Vec::with_capacity(inodes.len());
        let mut at = INODES_AT;
        let mut blocks = 0;
        for inode in inodes {
            let head = inode_len(is_compact(inode, epoch)) + xattrs_len(inode.xattrs)?;
            let (own_blocks, inline) = contents_split(&inode.body);
            // An inline tail may not cross a block's end; it is at most half a block, so a place is found soon.
            while inline > 0 && (at + head) % BLOCK + inline > BLOCK {
                at += INODE_SLOT;
            }
            placements.push(Placement {
                at,
                inline,
                block: blocks,
            });
            blocks = blocks.checked_add(own_blocks).ok_or(ErofsError::TooManyBlocks)?;
            at = (at + head + inline + map_len(&inode.body)).next_multiple_of(INODE_SLOT);
        }
        let first = u32::try_from(at.div_ceil(BLOCK)).map_err(|_| ErofsError::TooManyBlocks)?;
        let end = first.checked_add(blocks).ok_or(ErofsError::TooManyBlocks)?;
        for placement in &mut placements {
            placement.block += first;
        }
        Ok(Self {
            placements,
            end: end as usize * BLOCK,
        })
    }

    fn number_of(&self, inode: usize) -> u64 {
        (self.placements[inode].at / INODE_SLOT) as u64
    }
}

/// How many blocks of its own a body's contents take, and how many bytes follow the inode.
fn contents_split(body: &Body<'_>) -> (u32, usize) {
    let len = match body {
        Body::Directory(entries) => directory::encoded_len(entries),
        Body::Symlink(target) => target.len(),
        _ => 0,
    };
    let tail = len % BLOCK;
    let inline = if tail <= MAX_INLINE { tail } else { 0 };
    // More blocks than 32 bits count cannot be reached with names that are in memory; saturating makes the sum fail.
    (
        u32::try_from((len - inline).div_ceil(BLOCK)).unwrap_or(u32::MAX),
        inline,
    )
}

/// Bytes of a sparse file's block numbers.
fn map_len(body: &Body<'_>) -> usize {
    match body {
        Body::Sparse { units, .. } => units.len() * 4,
        _ => 0,
    }
}

/// Files with this time can do with a short inode, whose time is the file system's. Many images have one time for
/// all files (SOURCE_DATE_EPOCH); of several equally common ones it is the earliest.
fn most_common_mtime(inodes: &[Inode<'_>]) -> Timestamp {
    let mut counts = BTreeMap::new();
    for inode in inodes {
        *counts.entry(inode.mtime).or_insert(0u64) += 1;
    }
    counts
        .into_iter()
        .rev()
        .max_by_key(|&(_, count)| count)
        .map(|(mtime, _)| mtime)
        .unwrap_or_default()
}
