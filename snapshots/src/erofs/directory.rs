//! Directories: blocks of fixed-size entries followed by their names.

use super::BLOCK;

const DIRENT: usize = 12;

/// A name in a directory.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Dirent<'a> {
    pub(crate) name: &'a [u8],
    /// The inode's place in the list of inodes.
    pub(crate) inode: usize,
    pub(crate) file_type: FileType,
}

/// A type as directory entries have it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum FileType {
    Regular = 1,
    Directory = 2,
    CharDevice = 3,
    BlockDevice = 4,
    Fifo = 5,
    Symlink = 7,
}

/// The entries of each block: as many as fit, in order.
fn blocks<'d, 'a>(entries: &'d [Dirent<'a>]) -> impl Iterator<Item = &'d [Dirent<'a>]> {
    let mut rest = entries;
    std::iter::from_fn(move || {
        let mut len = 0;
        let fitting = rest.iter().take_while(|entry| {
            len += DIRENT + entry.name.len();
            len <= BLOCK
        });
        let (block, after) = rest.split_at(fitting.count());
        rest = after;
        (!block.is_empty()).then_some(block)
    })
}

fn used(block: &[Dirent<'_>]) -> usize {
    block.iter().map(|entry| DIRENT + entry.name.len()).sum()
}

/// A directory's size: all blocks but the last count in full.
pub(super) fn encoded_len(entries: &[Dirent<'_>]) -> usize {
    let (count, last) = blocks(entries).fold((0, 0), |(count, _), block| (count + 1, used(block)));
    if count == 0 { 0 } else { (count - 1) * BLOCK + last }
}

/// A directory's contents. The kernel finds names by halving, over blocks and within one: entries are sorted by bytes.
pub(super) fn encode_directory(entries: &[Dirent<'_>], number_of: impl Fn(usize) -> u64) -> Vec<u8> {
    let mut out = Vec::with_capacity(encoded_len(entries));
    for block in blocks(entries) {
        out.resize(out.len().next_multiple_of(BLOCK), 0);
        let mut name_at = block.len() * DIRENT;
        for entry in block {
            out.extend_from_slice(&number_of(entry.inode).to_le_bytes());
            // Below the block's length of 4096.
            out.extend_from_slice(&u16::try_from(name_at).unwrap_or(u16::MAX).to_le_bytes());
            out.extend_from_slice(&[entry.file_type as u8, 0]);
            name_at += entry.name.len();
        }
        for entry in block {
            out.extend_from_slice(entry.name);
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entries(names: &[Vec<u8>]) -> Vec<Dirent<'_>> {
        names
            .iter()
            .map(|name| Dirent {
                name,
                inode: 0,
                file_type: FileType::Regular,
            })
            .collect()
    }

    #[test]
    fn the_length_told_is_the_length_written() {
        for count in [0, 1, 2, 14, 15, 16, 300, 1000] {
            let names: Vec<_> = (0..count)
                .map(|number| format!("{number:0>255}").into_bytes())
                .collect();
            let entries = entries(&names);
            assert_eq!(
                encode_directory(&entries, |_| 0).len(),
                encoded_len(&entries),
                "{count} names"
            );
        }
    }

    #[test]
    fn a_full_block_takes_what_fits_exactly() {
        // 15 entries of 12 + 255 bytes leave 91: an entry with 79 bytes of name fits, one with 80 does not.
        for (len, blocks) in [(79, 1), (80, 2)] {
            let mut names = vec![vec![b'a'; 255]; 15];
            names.push(vec![b'b'; len]);
            assert_eq!(encoded_len(&entries(&names)).div_ceil(BLOCK), blocks);
        }
    }
}
