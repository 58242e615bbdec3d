//! The memory file of a snapshot: guest memory as it lies, so that a clone can map it.
//!
//! ```text
//!   0      the ranges of guest memory, one after the other (see `layout`); pages of zeros are holes
//!   size   one page: magic "FLINTMEM", format u32, zero u32, snapshot id 16 bytes, size u64, BLAKE3 of these 40 bytes
//! ```
//!
//! Where memory may be plugged, what is not plugged is a hole, and a region that is one hole is not mapped at all: it stays as
//! it was reserved. Mapped privately: what a clone writes is its own, what it only reads it shares with all others in the page cache. The last
//! page ties the file to its state file. It does not vouch for the contents: to hash them all would cost more than the whole
//! rest of a restore, so who stores the file keeps it from changing (and verifies it when it comes from elsewhere).

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::slice;

use thiserror::Error;
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use super::{GuestMemory, HOTPLUG_START, MemorySource, Range};

const MAGIC: [u8; 8] = *b"FLINTMEM";
const FORMAT: u32 = 1;
/// The unit of holes, and of the last page.
const PAGE: usize = 4096;
/// What the last page's digest covers.
const COVERED: usize = 40;
/// Longest run of pages that is written at once.
const MAX_RUN: usize = 4 << 20;

/// A memory file that cannot be written or used.
#[derive(Debug, Error)]
pub enum Error {
    /// Not a file with bytes.
    #[error("the memory file is no regular file")]
    Kind,
    /// Reading failed.
    #[error("reading the memory file")]
    Read(#[source] io::Error),
    /// Writing failed.
    #[error("writing guest memory to the memory file")]
    Write(#[source] io::Error),
    /// Of another machine, or cut off.
    #[error(
        "the memory file has {found} bytes, the snapshot's machine needs {expected}: it was cut off, or is another's"
    )]
    Length {
        /// What it should have.
        expected: u64,
        /// What it has.
        found: u64,
    },
    /// Damaged, or something else.
    #[error("the memory file's last page is damaged, or this is no memory file")]
    Trailer,
    /// The other half of another snapshot.
    #[error("the memory file belongs to another snapshot than the state file")]
    Foreign,
    /// The host refuses.
    #[error("mapping the memory file over {size:#x} bytes of guest memory")]
    Map {
        /// How much of it.
        size: u64,
        /// What the host said.
        source: io::Error,
    },
}

/// Bytes of guest memory, which is as long as the part of the file before its last page.
#[must_use]
pub fn size(memory: &GuestMemory) -> u64 {
    memory.iter().map(GuestMemoryRegion::len).sum()
}

fn trailer(id: [u8; 16], size: u64) -> [u8; PAGE] {
    let mut page = [0; PAGE];
    page[..8].copy_from_slice(&MAGIC);
    page[8..12].copy_from_slice(&FORMAT.to_le_bytes());
    page[16..32].copy_from_slice(&id);
    page[32..COVERED].copy_from_slice(&size.to_le_bytes());
    let digest = blake3::hash(&page[..COVERED]);
    page[COVERED..COVERED + blake3::OUT_LEN].copy_from_slice(digest.as_bytes());
    page
}

/// Writes guest memory into `file`, in place of what is in it. Of what lies from [`HOTPLUG_START`] on, only `plugged` is looked
/// at: to read the rest, which may be a hundred times as much, would cost time and page tables.
///
/// # Safety
/// Nobody writes to guest memory meanwhile: vCPUs and devices stand still.
///
/// # Errors
/// The host cannot write it. What is in the file then is refused by [`PrivateFile::open`].
pub unsafe fn save(memory: &GuestMemory, plugged: &[Range], file: &File, id: [u8; 16]) -> Result<(), Error> {
    let size = size(memory);
    // To nothing first: whatever was there becomes a hole, and an old last page is gone before the first new byte.
    file.set_len(0).map_err(Error::Write)?;
    file.set_len(size).map_err(Error::Write)?;
    let mut offset = 0;
    for region in memory.iter() {
        let length = usize::try_from(region.len()).unwrap_or(0);
        // SAFETY: the region is mapped for as long as `memory` lives, and nobody writes to it (the caller's promise).
        let bytes = unsafe { slice::from_raw_parts(region.as_ptr(), length) };
        for part in parts(region, plugged) {
            for (start, end) in runs(&bytes[part.clone()]) {
                let (start, end) = (part.start + start, part.start + end);
                file.write_all_at(&bytes[start..end], offset + start as u64)
                    .map_err(Error::Write)?;
            }
        }
        offset += region.len();
    }
    file.write_all_at(&trailer(id, size), size).map_err(Error::Write)
}

/// The parts of a region that have a content, as offsets in it.
fn parts(region: &impl GuestMemoryRegion, plugged: &[Range]) -> Vec<std::ops::Range<usize>> {
    let (start, length) = (region.start_addr().0, region.len());
    let offset = |address: u64| usize::try_from(address.saturating_sub(start).min(length)).unwrap_or(0);
    if start < HOTPLUG_START {
        return std::iter::once(0..offset(start + length)).collect();
    }
    let plugged = plugged.iter();
    plugged
        .map(|range| offset(range.start)..offset(range.start.saturating_add(range.size)))
        .filter(|part| !part.is_empty())
        .collect()
}

/// Whether `file` has anything from `offset` to `end`. A file system that does not know of holes says that it has.
fn has_data(file: &File, offset: i64, end: i64) -> bool {
    // SAFETY: lseek takes no pointers. What it moves is not used: all reading here is by offset.
    let data = unsafe { libc::lseek(file.as_raw_fd(), offset, libc::SEEK_DATA) };
    // ENXIO: nothing up to the end of the file.
    data < end && (data >= 0 || io::Error::last_os_error().raw_os_error() != Some(libc::ENXIO))
}

/// Runs of pages that are not all zero.
fn runs(bytes: &[u8]) -> impl Iterator<Item = (usize, usize)> {
    let mut at = 0;
    std::iter::from_fn(move || {
        let pages = |from: usize| (from..bytes.len()).step_by(PAGE);
        let is_zero = |page: &usize| zero(&bytes[*page..*page + PAGE]);
        let start = pages(at).find(|page| !is_zero(page))?;
        let most = bytes.len().min(start + MAX_RUN);
        let end = pages(start).find(|page| *page >= most || is_zero(page));
        at = end.unwrap_or(bytes.len());
        Some((start, at))
    })
}

/// Compares a page with itself, moved by some bytes: the C library does this with the widest registers that there are.
fn zero(page: &[u8]) -> bool {
    const STEP: usize = 16;
    page[..STEP] == [0; STEP] && page[..page.len() - STEP] == page[STEP..]
}

/// A memory file, mapped privately.
#[derive(Debug)]
pub struct PrivateFile {
    file: File,
    size: u64,
}

impl PrivateFile {
    /// Looks whether `file` is the memory of `size` bytes of the snapshot `id`.
    ///
    /// # Errors
    /// It is not.
    pub fn open(file: File, id: [u8; 16], size: u64) -> Result<Self, Error> {
        let metadata = file.metadata().map_err(Error::Read)?;
        if !metadata.is_file() {
            return Err(Error::Kind);
        }
        let (expected, found) = (size.saturating_add(PAGE as u64), metadata.len());
        if expected != found {
            return Err(Error::Length { expected, found });
        }
        let mut page = [0; PAGE];
        file.read_exact_at(&mut page, size).map_err(Error::Read)?;
        if page == trailer(id, size) {
            return Ok(Self { file, size });
        }
        let mut theirs = [0; 16];
        theirs.copy_from_slice(&page[16..32]);
        Err(if page == trailer(theirs, size) {
            Error::Foreign
        } else {
            Error::Trailer
        })
    }
}

impl MemorySource for PrivateFile {
    fn fill(&self, reserved: &GuestMemory) -> Result<(), super::Error> {
        let expected = size(reserved);
        if expected != self.size {
            let found = self.size;
            return Err(Error::Length { expected, found }.into());
        }
        let mut offset: i64 = 0;
        for region in reserved.iter() {
            let failed = |source| Error::Map {
                size: region.len(),
                source,
            };
            let (length, next) = usize::try_from(region.len())
                .ok()
                .zip(i64::try_from(region.len()).ok())
                .ok_or(super::Error::TooLarge(expected))?;
            if region.start_addr().0 >= HOTPLUG_START && !has_data(&self.file, offset, offset.saturating_add(next)) {
                offset += next;
                continue;
            }
            // SAFETY: exactly a reserved region is replaced, which stays mapped at its address for as long as it lives; its
            // contents change as guest memory always may.
            let mapped = unsafe {
                libc::mmap(
                    region.as_ptr().cast(),
                    length,
                    libc::PROT_READ | libc::PROT_WRITE,
                    libc::MAP_PRIVATE | libc::MAP_NORESERVE | libc::MAP_FIXED,
                    self.file.as_raw_fd(),
                    offset,
                )
            };
            if mapped == libc::MAP_FAILED {
                return Err(failed(io::Error::last_os_error()).into());
            }
            offset += next;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::{Range, reserve};
    use std::os::unix::fs::MetadataExt;
    use vm_memory::{Bytes, GuestAddress};

    const RANGES: [Range; 2] = [
        Range {
            start: 0,
            size: 2 << 20,
        },
        Range {
            start: 1 << 32,
            size: 4 << 20,
        },
    ];

    fn saved(id: [u8; 16]) -> File {
        let memory = reserve(&RANGES).unwrap();
        memory.write_obj(1u8, GuestAddress(0x5fff)).unwrap();
        memory.write_obj(2u8, GuestAddress(0x6000)).unwrap();
        memory.write_obj(3u8, GuestAddress((1 << 32) + 0x1000)).unwrap();
        let file = tempfile::tempfile().unwrap();
        // Longer than what comes: nothing of it may stay.
        file.write_all_at(&[0xff; 100], 7 << 20).unwrap();
        file.write_all_at(&[0xff; 100], 0x20000).unwrap();
        // SAFETY: nobody else has this memory.
        unsafe { save(&memory, &[], &file, id) }.unwrap();
        file
    }

    #[test]
    fn only_plugged_memory_is_saved_and_a_region_with_none_is_not_mapped() {
        let boot = Range {
            start: 0,
            size: 2 << 20,
        };
        let hotplug = Range {
            start: HOTPLUG_START,
            size: 8 << 20,
        };
        let plugged = Range {
            start: HOTPLUG_START + (2 << 20),
            size: 2 << 20,
        };
        let places = [0, 3, 4].map(|mebibytes| GuestAddress(HOTPLUG_START + (mebibytes << 20)));
        for (plugged, expected) in [(vec![plugged], [0, 7, 0]), (vec![], [0, 0, 0])] {
            let memory = reserve(&[boot, hotplug]).unwrap();
            for place in places {
                memory.write_obj(7u8, place).unwrap();
            }
            let file = tempfile::tempfile().unwrap();
            // SAFETY: nobody else has this memory.
            unsafe { save(&memory, &plugged, &file, [1; 16]) }.unwrap();
            assert_eq!(has_data(&file, 2 << 20, 10 << 20), !plugged.is_empty());
            let memory = reserve(&[boot, hotplug]).unwrap();
            let source = PrivateFile::open(file, [1; 16], size(&memory)).unwrap();
            source.fill(&memory).unwrap();
            assert_eq!(places.map(|place| memory.read_obj::<u8>(place).unwrap()), expected);
        }
    }

    #[test]
    fn what_was_written_is_mapped_and_what_was_zero_is_a_hole() {
        let file = saved([1; 16]);
        assert_eq!(file.metadata().unwrap().len(), (6 << 20) + 4096);
        assert_eq!(file.metadata().unwrap().blocks(), 4 * 8, "three pages and the last one");
        let copy = file.try_clone().unwrap();
        let memory = reserve(&RANGES).unwrap();
        let source = PrivateFile::open(file, [1; 16], size(&memory)).unwrap();
        source.fill(&memory).unwrap();
        let read = |address| memory.read_obj::<u8>(GuestAddress(address)).unwrap();
        assert_eq!([read(0x5fff), read(0x6000), read((1 << 32) + 0x1000)], [1, 2, 3]);
        assert_eq!([read(0x20000), read((2 << 20) - 1)], [0, 0]);

        memory.write_obj(9u8, GuestAddress(0x6000)).unwrap();
        let mut byte = [0];
        copy.read_exact_at(&mut byte, 0x6000).unwrap();
        assert_eq!(byte, [2], "a clone's writes are its own");
    }

    #[test]
    fn runs_end_at_zero_pages_and_at_their_longest() {
        let mut bytes = vec![0; MAX_RUN + 4 * PAGE];
        assert_eq!(runs(&bytes).count(), 0);
        bytes[PAGE - 1] = 1;
        bytes[2 * PAGE] = 1;
        bytes[4 * PAGE - 1] = 1;
        assert_eq!(runs(&bytes).collect::<Vec<_>>(), [(0, PAGE), (2 * PAGE, 4 * PAGE)]);
        bytes.fill(1);
        assert_eq!(
            runs(&bytes).collect::<Vec<_>>(),
            [(0, MAX_RUN), (MAX_RUN, MAX_RUN + 4 * PAGE)]
        );
    }

    #[test]
    fn another_snapshots_file_a_short_one_and_a_damaged_one_are_told_apart() {
        let open = |file: &File, id, size| PrivateFile::open(file.try_clone().unwrap(), id, size).unwrap_err();
        let file = saved([1; 16]);
        assert!(matches!(open(&file, [2; 16], 6 << 20), Error::Foreign));
        assert!(matches!(open(&file, [1; 16], 8 << 20), Error::Length { .. }));
        file.write_all_at(&[0], (6 << 20) + 3).unwrap();
        assert!(matches!(open(&file, [1; 16], 6 << 20), Error::Trailer));
        file.set_len(6 << 20).unwrap();
        assert!(matches!(open(&file, [1; 16], 6 << 20), Error::Length { .. }));
        let folder = File::open("/").unwrap();
        assert!(matches!(open(&folder, [1; 16], 6 << 20), Error::Kind));
    }
}
