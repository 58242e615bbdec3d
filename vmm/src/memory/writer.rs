//! Writes a memory file, also while the guest goes on: what is copied may be copied again.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use vm_memory::{Bytes, GuestMemoryRegion, MemoryRegionAddress};

use super::file::{Error, Trailer, write_trailer};
use super::pages::{PAGE, PAGE_BYTES, Pages};
use super::{GuestMemory, numbered, size};

/// What is copied at once. It stays in the processor's cache between being read and being written.
const BUFFER: usize = 256 << 10;

/// What is known of what the file holds where pages are copied to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Over {
    /// Nothing was written there: pages of zeros are left out.
    Holes,
    /// Something was: pages of zeros become holes again.
    Anything,
}

/// A memory file in the making.
#[derive(Debug)]
pub struct Writer {
    file: File,
    size: u64,
    buffer: Vec<u8>,
}

impl Writer {
    /// Takes the place of whatever is in `file`. What is in it until [`Self::finish`] is refused by everybody who loads it.
    ///
    /// # Errors
    /// The host cannot write it.
    pub fn begin(file: File, memory: &GuestMemory) -> Result<Self, Error> {
        let size = size(memory);
        // To nothing first: whatever was there becomes a hole, and an old last page is gone before the first new byte.
        file.set_len(0).map_err(Error::Write)?;
        file.set_len(size).map_err(Error::Write)?;
        Ok(Self {
            file,
            size,
            buffer: vec![0; BUFFER],
        })
    }

    /// Copies pages. A page that is written to meanwhile is copied with a part of that: it has to be copied again.
    /// Returns how many bytes were not zero.
    ///
    /// # Errors
    /// The host cannot write it.
    pub fn copy(&mut self, memory: &GuestMemory, pages: &Pages, over: Over) -> Result<u64, Error> {
        let mut written = 0;
        for (first, region) in numbered(memory) {
            let region_end = first + region.len() / PAGE;
            for run in pages.runs() {
                let run = run.start.max(first)..run.end.min(region_end);
                for start in run.clone().step_by(BUFFER / PAGE_BYTES) {
                    let end = run.end.min(start + (BUFFER / PAGE_BYTES) as u64);
                    // At most the buffer's length.
                    let length = usize::try_from((end - start) * PAGE).unwrap_or(0).min(BUFFER);
                    let place = MemoryRegionAddress((start - first) * PAGE);
                    region
                        .read_slice(&mut self.buffer[..length], place)
                        .map_err(|error| Error::Write(io::Error::other(error)))?;
                    written += put(&self.file, start * PAGE, &self.buffer[..length], over)?;
                }
            }
        }
        Ok(written)
    }

    /// Takes out what was copied.
    ///
    /// # Errors
    /// The host cannot write it.
    pub fn remove(&self, pages: &Pages) -> Result<(), Error> {
        let mut runs = pages.runs().iter();
        runs.try_for_each(|run| hole(&self.file, run.start * PAGE..run.end * PAGE))
    }

    /// Makes it a memory file.
    ///
    /// # Errors
    /// The host cannot write it.
    pub fn finish(&self, trailer: &Trailer) -> Result<(), Error> {
        write_trailer(&self.file, self.size, trailer)
    }

    /// Gives back the space that it took.
    pub fn abandon(&self) {
        // It is no memory file, whether this works or not.
        let _ = self.file.set_len(0);
    }
}

/// Writes those pages of `bytes` that are not zeros.
///
/// # Errors
/// The host cannot write it.
pub fn put_pages(file: &File, offset: u64, bytes: &[u8]) -> io::Result<()> {
    runs(bytes).try_for_each(|run| file.write_all_at(&bytes[run.clone()], offset + run.start as u64))
}

fn put(file: &File, offset: u64, bytes: &[u8], over: Over) -> Result<u64, Error> {
    let (mut done, mut written) = (0, 0);
    let zeros = |from: usize, to: usize| match over {
        Over::Anything if from < to => hole(file, offset + from as u64..offset + to as u64),
        _ => Ok(()),
    };
    for run in runs(bytes) {
        zeros(done, run.start)?;
        done = run.end;
        written += run.len() as u64;
        let at = offset + run.start as u64;
        file.write_all_at(&bytes[run], at).map_err(Error::Write)?;
    }
    zeros(done, bytes.len())?;
    Ok(written)
}

/// Makes a range of the file read as zeros, without space on the disk where the file system can.
fn hole(file: &File, range: Range<u64>) -> Result<(), Error> {
    let offset = |at: u64| i64::try_from(at).map_err(|_| Error::Write(io::ErrorKind::FileTooLarge.into()));
    let (start, length) = (offset(range.start)?, offset(range.end - range.start)?);
    let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
    // SAFETY: takes no pointers.
    if unsafe { libc::fallocate(file.as_raw_fd(), mode, start, length) } == 0 {
        return Ok(());
    }
    let error = io::Error::last_os_error();
    if error.raw_os_error() != Some(libc::EOPNOTSUPP) {
        return Err(Error::Write(error));
    }
    for at in range.clone().step_by(BUFFER) {
        let length = usize::try_from(range.end - at).unwrap_or(BUFFER).min(BUFFER);
        file.write_all_at(&[0; BUFFER][..length], at).map_err(Error::Write)?;
    }
    Ok(())
}

/// Runs of pages that are not all zero.
fn runs(bytes: &[u8]) -> impl Iterator<Item = Range<usize>> {
    let mut at = 0;
    std::iter::from_fn(move || {
        let pages = |from: usize| (from..bytes.len()).step_by(PAGE_BYTES);
        let is_zero = |page: &usize| zero(&bytes[*page..*page + PAGE_BYTES]);
        let start = pages(at).find(|page| !is_zero(page))?;
        at = pages(start).find(is_zero).unwrap_or(bytes.len());
        Some(start..at)
    })
}

/// Compares a page with itself, moved by some bytes: the C library does this with the widest registers that there are.
fn zero(page: &[u8]) -> bool {
    const STEP: usize = 16;
    page[..STEP] == [0; STEP] && page[..page.len() - STEP] == page[STEP..]
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use vm_memory::GuestAddress;

    use super::*;
    use crate::memory::{Range as Addresses, reserve};

    fn memory() -> GuestMemory {
        let range = |start, size| Addresses { start, size };
        reserve(&[range(0, 2 << 20), range(1 << 32, 4 << 20)]).unwrap()
    }

    fn blocks(writer: &Writer) -> u64 {
        writer.file.metadata().unwrap().blocks()
    }

    fn page(writer: &Writer, page: u64) -> u8 {
        let mut byte = [0];
        writer.file.read_exact_at(&mut byte, page * PAGE).unwrap();
        byte[0]
    }

    #[test]
    fn pages_are_copied_over_the_ends_of_regions_and_zeros_are_holes() {
        let memory = memory();
        for (address, value) in [
            (511 << 12, 1u8),
            (1 << 32, 2),
            ((1 << 32) + (200 << 12), 3),
            (77 << 12, 4),
        ] {
            memory.write_obj(value, GuestAddress(address)).unwrap();
        }
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&[0xff; 100], 7 << 20).unwrap();
        file.write_all_at(&[0xff; 100], 0x20000).unwrap();
        let mut writer = Writer::begin(file, &memory).unwrap();
        let all = Pages::run(100..512 + 1024);
        assert_eq!(writer.copy(&memory, &all, Over::Holes).unwrap(), 3 * PAGE);
        assert_eq!([511, 512, 712].map(|at| page(&writer, at)), [1, 2, 3]);
        assert_eq!(page(&writer, 77), 0, "not asked for");
        assert_eq!(blocks(&writer), 3 * 8);
    }

    #[test]
    fn what_became_zero_or_is_not_wanted_any_more_is_taken_out() {
        let memory = memory();
        for at in 10..14u64 {
            memory.write_obj(9u8, GuestAddress(at << 12)).unwrap();
        }
        let mut writer = Writer::begin(tempfile::tempfile().unwrap(), &memory).unwrap();
        writer.copy(&memory, &Pages::run(0..512), Over::Holes).unwrap();
        memory.write_obj(0u8, GuestAddress(11 << 12)).unwrap();
        memory.write_obj(8u8, GuestAddress(12 << 12)).unwrap();
        writer.copy(&memory, &Pages::run(11..13), Over::Anything).unwrap();
        writer.remove(&Pages::run(13..14)).unwrap();
        assert_eq!([10, 11, 12, 13].map(|at| page(&writer, at)), [9, 0, 8, 0]);
        assert_eq!(blocks(&writer), 2 * 8);
        writer.abandon();
        assert_eq!(writer.file.metadata().unwrap().len(), 0);
    }

    #[test]
    fn runs_end_at_zero_pages() {
        let mut bytes = vec![0; 8 * PAGE_BYTES];
        assert_eq!(runs(&bytes).count(), 0);
        bytes[PAGE_BYTES - 1] = 1;
        bytes[2 * PAGE_BYTES] = 1;
        bytes[4 * PAGE_BYTES - 1] = 1;
        assert_eq!(
            runs(&bytes).collect::<Vec<_>>(),
            [0..PAGE_BYTES, 2 * PAGE_BYTES..4 * PAGE_BYTES]
        );
        bytes.fill(1);
        assert_eq!(runs(&bytes).last(), Some(0..8 * PAGE_BYTES));
    }
}
