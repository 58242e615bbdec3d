//! Which pages of private memory hold something of this process's own, as the kernel's page tables tell it.
//!
//! A page of a private mapping is the file's until it is written to; then it is an anonymous page. So what a clone changed since
//! it was loaded is what is anonymous, whoever changed it: the guest, a device, the kernel on behalf of either. It needs no
//! log, costs nothing while the guest runs, and a page that was given back to the host is the file's again.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use super::pages::{PAGE, Pages};

/// One entry for each page of the address space (Linux, Documentation/admin-guide/mm/pagemap.rst).
const ENTRY: usize = 8;
const PRESENT: u64 = 1 << 63;
const SWAPPED: u64 = 1 << 62;
/// A page of a file, or of shared memory.
const OF_A_FILE: u64 = 1 << 61;
/// Entries that are read at once.
const BATCH: usize = 4096;

/// The page tables of a process, for reading.
#[derive(Debug)]
pub struct Pagemap(File);

impl Pagemap {
    /// Those of the calling process. In a jail there is no /proc: they are opened on the way into it.
    ///
    /// # Errors
    /// There is no /proc, or the process is not dumpable.
    pub fn of_this_process() -> io::Result<Self> {
        File::open("/proc/self/pagemap").map(Self)
    }

    /// Adds to `own` the pages at `address`, whose numbers are `pages`, that are this process's own, or may be: a page of
    /// zeros that was only read counts too.
    ///
    /// # Errors
    /// The kernel cannot be asked.
    pub fn own(&self, address: *const u8, pages: Range<u64>, own: &mut Pages) -> io::Result<()> {
        self.each(address, pages, |page, state| {
            if state == State::Own {
                own.push(page..page + 1);
            }
        })
    }

    /// As [`own`](Self::own); and adds to `shared` those that are mapped and a file's.
    ///
    /// # Errors
    /// The kernel cannot be asked.
    pub fn used(&self, address: *const u8, pages: Range<u64>, own: &mut Pages, shared: &mut Pages) -> io::Result<()> {
        self.each(address, pages, |page, state| match state {
            State::Own => own.push(page..page + 1),
            State::Shared => shared.push(page..page + 1),
            State::Absent => {}
        })
    }

    fn each(&self, address: *const u8, pages: Range<u64>, mut tell: impl FnMut(u64, State)) -> io::Result<()> {
        let mut entries = vec![0; BATCH * ENTRY];
        let start = address as u64 / PAGE;
        for first in pages.clone().step_by(BATCH) {
            let count = usize::try_from(pages.end - first).map_or(BATCH, |left| left.min(BATCH));
            let entries = &mut entries[..count * ENTRY];
            self.0
                .read_exact_at(entries, (start + first - pages.start) * ENTRY as u64)?;
            let entries = entries.as_chunks::<ENTRY>().0.iter().copied().map(u64::from_ne_bytes);
            (first..)
                .zip(entries)
                .for_each(|(page, entry)| tell(page, State::of(entry)));
        }
        Ok(())
    }
}

/// What a page is to the process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// Nothing, as far as is known: the next access to it faults.
    Absent,
    /// A file's.
    Shared,
    /// Its own.
    Own,
}

impl State {
    fn of(entry: u64) -> Self {
        match (entry & (PRESENT | SWAPPED), entry & OF_A_FILE) {
            (0, _) => Self::Absent,
            (_, 0) => Self::Own,
            _ => Self::Shared,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt as _;

    use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

    use super::*;
    use crate::memory::file::{Trailer, write_trailer};
    use crate::memory::mapped::MappedFiles;
    use crate::memory::{GuestMemory, MemorySource, Range as Addresses, reserve};

    fn own(memory: &GuestMemory) -> Pages {
        let pagemap = Pagemap::of_this_process().unwrap();
        let region = memory.iter().next().unwrap();
        let mut own = Pages::default();
        pagemap
            .own(region.as_ptr(), 100..100 + region.len() / PAGE, &mut own)
            .unwrap();
        own
    }

    /// More pages than one batch.
    const BOOT: Addresses = Addresses {
        start: 0,
        size: 20 << 20,
    };

    #[test]
    fn what_was_written_over_a_file_is_own_until_it_is_given_back() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(BOOT.size).unwrap();
        file.write_all_at(&[7; 1 << 20], 0).unwrap();
        let memory = reserve(&[BOOT]).unwrap();
        write_trailer(&file, BOOT.size, &Trailer::full([1; 16])).unwrap();
        let source = MappedFiles::open(vec![file], vec![[1; 16]], BOOT.size).unwrap();
        source.fill(&memory).unwrap();
        assert_eq!(memory.read_obj::<u8>(GuestAddress(0x3000)).unwrap(), 7);
        assert_eq!(own(&memory), Pages::default(), "read, not written");
        for page in [3, 5000, 5001] {
            memory.write_obj(1u8, GuestAddress(page * PAGE)).unwrap();
        }
        let mut expected = Pages::run(103..104);
        expected.push(5100..5102);
        assert_eq!(own(&memory), expected);
        crate::virtio::discard::discard(&memory, GuestAddress(0x3000), PAGE).unwrap();
        assert_eq!(own(&memory), Pages::run(5100..5102));
    }

    #[test]
    fn untouched_memory_is_nobodys() {
        let memory = reserve(&[BOOT]).unwrap();
        memory.write_obj(1u8, GuestAddress(0x9000)).unwrap();
        assert_eq!(own(&memory), Pages::run(109..110));
    }
}
