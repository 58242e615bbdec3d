//! The superblock: at byte 1024, 128 bytes, with a checksum over the rest of its block.

use super::{BLOCK, ErofsError};
use crate::layer::Timestamp;

const SUPERBLOCK_AT: usize = 1024;
const SUPERBLOCK_LEN: usize = 128;
/// The first inode: numbers count from the image's start, so it is number 36.
pub(super) const INODES_AT: usize = SUPERBLOCK_AT + SUPERBLOCK_LEN;

const MAGIC: u32 = 0xe0f5_e1e2;
const BLOCK_BITS: u8 = 12;
/// The superblock has a checksum; times are those of the last change of content.
const COMPATIBLE_CHECKSUM: u32 = 1;
const COMPATIBLE_MTIME: u32 = 2;
/// There are files in units (chunks, as EROFS says).
const INCOMPATIBLE_CHUNKED: u32 = 4;

/// What the superblock says.
pub(super) struct Superblock {
    pub(super) root: u64,
    pub(super) inodes: u64,
    pub(super) epoch: Timestamp,
    pub(super) blocks: u32,
    pub(super) has_sparse_files: bool,
}

impl Superblock {
    /// Writes it into `image`, all of whose metadata is there already: the file system's UUID comes from it.
    pub(super) fn write(&self, image: &mut [u8]) -> Result<(), ErofsError> {
        // The root comes first in the area of inodes, so its number is far below 2^16.
        let root = u16::try_from(self.root).map_err(|_| ErofsError::TooManyBlocks)?;
        let mut put = |at: usize, bytes: &[u8]| image[SUPERBLOCK_AT + at..][..bytes.len()].copy_from_slice(bytes);
        put(0, &MAGIC.to_le_bytes());
        put(8, &(COMPATIBLE_CHECKSUM | COMPATIBLE_MTIME).to_le_bytes());
        put(12, &[BLOCK_BITS, 0]);
        put(14, &root.to_le_bytes());
        put(16, &self.inodes.to_le_bytes());
        put(24, &self.epoch.seconds.to_le_bytes());
        put(32, &self.epoch.nanoseconds.to_le_bytes());
        put(36, &self.blocks.to_le_bytes());
        put(
            80,
            &(if self.has_sparse_files { INCOMPATIBLE_CHUNKED } else { 0 }).to_le_bytes(),
        );
        let uuid = uuid_of(image);
        image[SUPERBLOCK_AT + 48..][..16].copy_from_slice(&uuid);
        let checksum = crc32c(&image[SUPERBLOCK_AT..BLOCK]);
        image[SUPERBLOCK_AT + 4..][..4].copy_from_slice(&checksum.to_le_bytes());
        Ok(())
    }
}

/// A UUID that depends on the metadata only (RFC 9562, version 8).
fn uuid_of(image: &[u8]) -> [u8; 16] {
    let mut uuid: [u8; 16] = crate::bytes::array_at(blake3::hash(image).as_bytes(), 0);
    uuid[6] = uuid[6] & 0x0f | 0x80;
    uuid[8] = uuid[8] & 0x3f | 0x80;
    uuid
}

/// CRC-32C as Linux computes it for EROFS: begun with all ones and not inverted at the end.
fn crc32c(bytes: &[u8]) -> u32 {
    bytes.iter().fold(!0, |crc, &byte| {
        (0..8).fold(crc ^ u32::from(byte), |crc, _| {
            if crc & 1 == 1 {
                (crc >> 1) ^ 0x82f6_3b78
            } else {
                crc >> 1
            }
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn crc32c_gives_the_check_value_of_rfc_3720() {
        // The appendix' value is inverted at the end.
        assert_eq!(!crc32c(b"123456789"), 0xe306_9283);
        assert_eq!(!crc32c(&[0; 32]), 0x8a91_36aa);
    }
}
