//! The memory file of a snapshot: guest memory as it lies, so that a clone can map it.
//!
//! ```text
//!   0      the ranges of guest memory, one after the other (see `layout`); pages of zeros are holes
//!   size   one page that says what this is:
//!            magic "FLINTMEM", format u32, zero u32, snapshot id 16 bytes, size u64     all numbers little endian
//!            format 1, all of guest memory:  BLAKE3 of these 40 bytes
//!            format 2, what differs from the base:  base's id 16 bytes, number of runs u64, BLAKE3 of the table,
//!                                            BLAKE3 of these 96 bytes
//!   then   format 2 only: a table of the runs of pages that are in here: first page u64, number of pages u64
//! ```
//!
//! In a file of format 2 a hole within a run is zeros, and what is in no run is the base's. That the runs are told, and not read
//! off the file's holes, lets it be copied by any program. The last page ties the file to its state file, and to its base. It
//! does not vouch for the pages: to hash them all would cost more than the whole rest of a restore, so who stores the file
//! keeps it from changing (and verifies it when it comes from elsewhere).
//!
//! `writer` writes it, `mapped` uses it.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use thiserror::Error;

use super::pages::{PAGE, PAGE_BYTES, Pages, RUN};

/// What names a snapshot.
pub type Id = [u8; 16];

const MAGIC: [u8; 8] = *b"FLINTMEM";
const FULL: u32 = 1;
const DIFFERENCE: u32 = 2;
/// What the digest of a full file's last page covers.
const COVERED: usize = 40;
const COVERED_DIFFERENCE: usize = 96;
const DIGEST: usize = blake3::OUT_LEN;
/// Most runs of a difference. A clone has a mapping for each, and another between two of them, of which Linux allows 65530
/// (Documentation/admin-guide/sysctl/vm.rst, `max_map_count`).
pub const MAX_RUNS: usize = 8192;

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
    /// The page tables tell nothing.
    #[error("asking the kernel which pages of guest memory are in use")]
    Pagemap(#[source] io::Error),
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
    /// The table of runs.
    #[error("the memory file's table of pages is damaged")]
    Table,
    /// The other half of another snapshot.
    #[error("the memory file belongs to another snapshot than the state file")]
    Foreign,
    /// The base is another snapshot.
    #[error(
        "base {place} is the memory of snapshot {}, but {} is needed: pass the memory files that this snapshot was taken \
         against, the nearest first", name(.found), name(.expected)
    )]
    Base {
        /// Counted from 1.
        place: usize,
        /// What the state file names.
        expected: Id,
        /// What the memory file is.
        found: Id,
    },
    /// State file and memory file disagree about what a file is based on.
    #[error("the memory file of snapshot {} is not based on what the state file says", name(.0))]
    Chain(Id),
    /// Too few or too many files.
    #[error("the snapshot has {expected} bases, {found} came: pass the memory files of all of them, the nearest first")]
    Bases {
        /// As the state file names them.
        expected: usize,
        /// How many there are.
        found: usize,
    },
    /// The host refuses.
    #[error("mapping the memory file over {size:#x} bytes of guest memory")]
    Map {
        /// How much of it.
        size: u64,
        /// What the host said.
        source: io::Error,
    },
}

/// An id as people read it.
#[must_use]
pub fn name(id: &Id) -> String {
    id.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// What the last page says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Trailer {
    /// The snapshot that the file belongs to.
    pub id: Id,
    /// None: all of guest memory is in it.
    pub difference: Option<Difference>,
}

/// What is in a file that is not all of guest memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Difference {
    /// Where the rest is.
    pub base: Id,
    /// The pages that are in the file.
    pub pages: Pages,
}

impl Trailer {
    /// Of a file with all of guest memory.
    #[must_use]
    pub fn full(id: Id) -> Self {
        Self { id, difference: None }
    }

    /// The last page, and the table.
    fn encode(&self, size: u64) -> Vec<u8> {
        let mut page = vec![0; PAGE_BYTES];
        let format = if self.difference.is_some() { DIFFERENCE } else { FULL };
        page[..8].copy_from_slice(&MAGIC);
        page[8..12].copy_from_slice(&format.to_le_bytes());
        page[16..32].copy_from_slice(&self.id);
        page[32..COVERED].copy_from_slice(&size.to_le_bytes());
        let mut covered = COVERED;
        let mut table = Vec::new();
        if let Some(Difference { base, pages }) = &self.difference {
            table = pages.table();
            page[40..56].copy_from_slice(base);
            page[56..64].copy_from_slice(&(pages.runs().len() as u64).to_le_bytes());
            page[64..COVERED_DIFFERENCE].copy_from_slice(blake3::hash(&table).as_bytes());
            covered = COVERED_DIFFERENCE;
        }
        let digest = blake3::hash(&page[..covered]);
        page[covered..covered + DIGEST].copy_from_slice(digest.as_bytes());
        page.extend(table);
        page
    }

    /// Reads the end of a file for `size` bytes of guest memory.
    ///
    /// # Errors
    /// It is none, damaged, or for another size.
    pub fn read(file: &File, size: u64) -> Result<Self, Error> {
        let metadata = file.metadata().map_err(Error::Read)?;
        if !metadata.is_file() {
            return Err(Error::Kind);
        }
        let (least, found) = (size.saturating_add(PAGE), metadata.len());
        let length = |expected| {
            if expected == found {
                Ok(())
            } else {
                Err(Error::Length { expected, found })
            }
        };
        if found < least {
            length(least)?;
        }
        let mut page = [0; PAGE_BYTES];
        file.read_exact_at(&mut page, size).map_err(Error::Read)?;
        let mut id = Id::default();
        id.copy_from_slice(&page[16..32]);
        if page[..] == Self::full(id).encode(size) {
            length(least)?;
            return Ok(Self::full(id));
        }
        let count = u64::from_le_bytes(page[56..64].try_into().map_err(|_| Error::Trailer)?);
        let runs = usize::try_from(count).ok().filter(|count| *count <= MAX_RUNS);
        let digest = blake3::hash(&page[..COVERED_DIFFERENCE]);
        let Some(runs) = runs.filter(|_| page[COVERED_DIFFERENCE..][..DIGEST] == digest.as_bytes()[..]) else {
            // An old, full file is not longer than its last page.
            length(least)?;
            return Err(Error::Trailer);
        };
        length(least.saturating_add((runs * RUN) as u64))?;
        let mut table = vec![0; runs * RUN];
        file.read_exact_at(&mut table, least).map_err(Error::Read)?;
        let mut base = Id::default();
        base.copy_from_slice(&page[40..56]);
        let pages = Pages::from_table(&table, size / PAGE).ok_or(Error::Table)?;
        let trailer = Self {
            id,
            difference: Some(Difference { base, pages }),
        };
        // Whatever differs, a byte that has no meaning or the table's digest: it was not written by us.
        match trailer.encode(size).split_at(PAGE_BYTES) {
            (again, _) if again != page => Err(Error::Table),
            (_, again) if again != table => Err(Error::Table),
            _ => Ok(trailer),
        }
    }
}

/// Writes the end of a file for `size` bytes of guest memory: from then on it is one.
///
/// # Errors
/// The host cannot write it.
pub fn write_trailer(file: &File, size: u64, trailer: &Trailer) -> Result<(), Error> {
    file.write_all_at(&trailer.encode(size), size).map_err(Error::Write)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZE: u64 = 4 << 20;

    fn difference() -> Trailer {
        let mut pages = Pages::run(3..9);
        pages.push(100..1024);
        Trailer {
            id: [1; 16],
            difference: Some(Difference { base: [2; 16], pages }),
        }
    }

    fn file(bytes: &[u8]) -> File {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(bytes, SIZE).unwrap();
        file
    }

    #[test]
    fn what_is_written_is_read_again() {
        for trailer in [Trailer::full([1; 16]), difference()] {
            let file = file(&[]);
            write_trailer(&file, SIZE, &trailer).unwrap();
            assert_eq!(Trailer::read(&file, SIZE).unwrap(), trailer);
        }
    }

    #[test]
    fn every_altered_byte_and_every_other_length_is_refused() {
        for trailer in [Trailer::full([1; 16]), difference()] {
            let good = trailer.encode(SIZE);
            for at in (0..200).chain(4000..good.len()) {
                let mut bad = good.clone();
                bad[at.min(good.len() - 1)] ^= 0x10;
                assert!(Trailer::read(&file(&bad), SIZE).is_err(), "byte {at}");
            }
            for length in (0..good.len()).step_by(7) {
                assert!(Trailer::read(&file(&good[..length]), SIZE).is_err(), "{length} bytes");
            }
            assert!(Trailer::read(&file(&[&good[..], &[0]].concat()), SIZE).is_err());
            assert!(matches!(
                Trailer::read(&file(&good), SIZE + PAGE).unwrap_err(),
                Error::Length { .. }
            ));
        }
    }

    #[test]
    fn a_folder_is_no_memory_file() {
        assert!(matches!(
            Trailer::read(&File::open("/").unwrap(), SIZE),
            Err(Error::Kind)
        ));
    }
}
