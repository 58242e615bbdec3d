//! The working set of a snapshot: the pages that a clone of it has used, so that later ones have them before they ask.
//!
//! ```text
//!   0    magic "FLINTWSS", format u32, number of runs written u32, number of runs read u32, zero u32,
//!        snapshot id 16 bytes, bytes of guest memory u64                                  all numbers little endian
//!   48   the runs that were written, then those that were only read: first page u64, number of pages u64
//!   then BLAKE3 of all before
//! ```
//!
//! It is a hint, and what it says comes from a guest: however much that has touched, a record is of bounded size, and so is what
//! replaying it takes.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use thiserror::Error;

use super::file::{Id, name};
use super::pages::{PAGE, Pages, RUN};

const MAGIC: [u8; 8] = *b"FLINTWSS";
const FORMAT: u32 = 1;
const HEADER: usize = 48;
const DIGEST: usize = blake3::OUT_LEN;
/// Most that a clone copies for a record: 16 MiB. A Linux guest that starts a container writes a few.
pub const MAX_WRITTEN: u64 = (16 << 20) / PAGE;
/// Most that a clone maps for a record, beside that: 64 MiB.
pub const MAX_READ: u64 = (64 << 20) / PAGE;
/// Most runs of each kind.
const MAX_RUNS: usize = 4096;
/// Gaps of so many pages are read along: to map them costs less than another call.
const GAP: u64 = 8;

/// A record that cannot be used.
#[derive(Debug, Error)]
pub enum Error {
    /// Reading failed.
    #[error("reading the working set")]
    Read(#[source] io::Error),
    /// Writing failed.
    #[error("writing the working set")]
    Write(#[source] io::Error),
    /// Altered, cut off, of another format, or something else.
    #[error("the working set is damaged, of another format, or none")]
    Damaged,
    /// Of other memory.
    #[error("the working set is of snapshot {}, the machine was loaded from {}", name(.found), name(.expected))]
    Foreign {
        /// What the machine was loaded from.
        expected: Id,
        /// What the record is of.
        found: Id,
    },
}

/// The pages that a clone has used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WorkingSet {
    written: Pages,
    read: Pages,
}

impl WorkingSet {
    /// Of pages that were `written`, and others that were `read`: as much of them as a record has.
    #[must_use]
    pub fn new(mut written: Pages, read: &Pages) -> Self {
        let mut read = read.in_runs(MAX_RUNS, GAP);
        Self {
            // So many pages are no more runs than that.
            written: written.take_first(MAX_WRITTEN),
            read: read.take_first(MAX_READ),
        }
    }

    /// The pages that were written: exactly these.
    #[must_use]
    pub fn written(&self) -> &Pages {
        &self.written
    }

    /// Runs around the pages that were only read.
    #[must_use]
    pub fn read(&self) -> &Pages {
        &self.read
    }

    /// As it is in a file, for `size` bytes of guest memory that are of snapshot `id`.
    fn encode(&self, id: &Id, size: u64) -> Vec<u8> {
        let mut bytes = Vec::from(MAGIC);
        let runs = |pages: &Pages| u32::try_from(pages.runs().len()).unwrap_or(u32::MAX);
        for number in [FORMAT, runs(&self.written), runs(&self.read), 0] {
            bytes.extend(number.to_le_bytes());
        }
        bytes.extend(id);
        bytes.extend(size.to_le_bytes());
        bytes.extend(self.written.table());
        bytes.extend(self.read.table());
        let digest = blake3::hash(&bytes);
        bytes.extend(digest.as_bytes());
        bytes
    }

    fn decode(bytes: &[u8], expected: &Id, size: u64) -> Result<Self, Error> {
        let found = bytes.get(24..40).and_then(|id| Id::try_from(id).ok());
        let found = found.ok_or(Error::Damaged)?;
        let set = Self::tables(bytes, size).ok_or(Error::Damaged)?;
        // Whatever differs: it was not written by us.
        if set.encode(&found, size) != bytes {
            return Err(Error::Damaged);
        }
        if found != *expected {
            let expected = *expected;
            return Err(Error::Foreign { expected, found });
        }
        Ok(set)
    }

    fn tables(bytes: &[u8], size: u64) -> Option<Self> {
        let count = |at: usize| {
            let number = bytes.get(at..at + 4)?;
            usize::try_from(u32::from_le_bytes(number.try_into().ok()?)).ok()
        };
        let (written, read) = (count(12)?, count(16)?);
        if written > MAX_RUNS || read > MAX_RUNS {
            return None;
        }
        let tables = bytes.get(HEADER..HEADER + (written + read) * RUN)?;
        let (written, read) = tables.split_at(written * RUN);
        let pages = |table| Pages::from_table(table, size / PAGE);
        let set = Self {
            written: pages(written)?,
            read: pages(read)?,
        };
        (set.written.bytes() <= MAX_WRITTEN * PAGE && set.read.bytes() <= MAX_READ * PAGE).then_some(set)
    }

    /// Writes it, in place of what is in the file.
    ///
    /// # Errors
    /// The host cannot write it.
    pub fn write(&self, file: &File, id: &Id, size: u64) -> Result<(), Error> {
        let written = file
            .set_len(0)
            .and_then(|()| file.write_all_at(&self.encode(id, size), 0));
        written.map_err(Error::Write)
    }

    /// Reads that of snapshot `id`, for `size` bytes of guest memory.
    ///
    /// # Errors
    /// It is not, or something else.
    pub fn load(file: &File, id: &Id, size: u64) -> Result<Self, Error> {
        const MOST: usize = HEADER + 2 * MAX_RUNS * RUN + DIGEST;
        let length = file.metadata().map_err(Error::Read)?.len();
        let length = usize::try_from(length).ok().filter(|length| *length <= MOST);
        let mut bytes = vec![0; length.ok_or(Error::Damaged)?];
        file.read_exact_at(&mut bytes, 0).map_err(Error::Read)?;
        Self::decode(&bytes, id, size)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: Id = [7; 16];
    const SIZE: u64 = 512 << 20;

    fn every(step: usize, pages: u64) -> Pages {
        let mut set = Pages::default();
        (0..pages).step_by(step).for_each(|page| set.push(page..page + 1));
        set
    }

    fn some() -> WorkingSet {
        WorkingSet::new(every(3, 40), &Pages::run(100..164))
    }

    #[test]
    fn what_is_written_is_read_again() {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&[1; 9999], 0).unwrap();
        for set in [some(), WorkingSet::new(Pages::default(), &Pages::default())] {
            set.write(&file, &ID, SIZE).unwrap();
            assert_eq!(WorkingSet::load(&file, &ID, SIZE).unwrap(), set);
        }
    }

    #[test]
    fn every_altered_byte_every_other_length_and_every_other_snapshot_is_refused() {
        let good = some().encode(&ID, SIZE);
        for at in 0..good.len() {
            let mut bad = good.clone();
            bad[at] ^= 0x10;
            assert!(WorkingSet::decode(&bad, &ID, SIZE).is_err(), "byte {at}");
            assert!(WorkingSet::decode(&good[..at], &ID, SIZE).is_err(), "{at} bytes");
        }
        let longer = [&good[..], &[0]].concat();
        assert!(matches!(WorkingSet::decode(&longer, &ID, SIZE), Err(Error::Damaged)));
        assert!(matches!(
            WorkingSet::decode(&good, &[8; 16], SIZE),
            Err(Error::Foreign { expected, found }) if expected == [8; 16] && found == ID
        ));
        // Runs behind the end of memory.
        assert!(matches!(
            WorkingSet::decode(&good, &ID, 163 * PAGE),
            Err(Error::Damaged)
        ));
        let huge = tempfile::tempfile().unwrap();
        huge.set_len(1 << 40).unwrap();
        assert!(matches!(WorkingSet::load(&huge, &ID, SIZE), Err(Error::Damaged)));
    }

    #[test]
    fn a_record_is_of_bounded_size_whatever_was_touched() {
        let all = SIZE / PAGE;
        for (written, read) in [
            (Pages::run(0..all), Pages::run(0..all)),
            (every(2, all), every(2, all)),
            (every(20, all), every(20, all)),
        ] {
            let set = WorkingSet::new(written, &read);
            assert!(set.written().bytes() <= MAX_WRITTEN * PAGE && set.read().bytes() <= MAX_READ * PAGE);
            let again = WorkingSet::decode(&set.encode(&ID, SIZE), &ID, SIZE).unwrap();
            assert_eq!(again, set);
        }
        // What is well formed and larger than what is ever written is refused too.
        let large = WorkingSet {
            written: Pages::run(0..MAX_WRITTEN + 1),
            read: Pages::default(),
        };
        assert!(WorkingSet::decode(&large.encode(&ID, SIZE), &ID, SIZE).is_err());
    }

    #[test]
    fn small_gaps_are_read_along_and_never_written() {
        let mut apart = Pages::run(0..1);
        apart.push(9..10);
        apart.push(100..101);
        let set = WorkingSet::new(apart.clone(), &apart);
        assert_eq!(set.written(), &apart);
        let mut joined = Pages::run(0..10);
        joined.push(100..101);
        assert_eq!(set.read(), &joined);
    }
}
