//! Memory files, mapped privately: what a clone writes is its own, what it only reads it shares with all others in the page
//! cache.
//!
//! ```text
//!   difference   |        [ 12..20 )      [ 31..32 )            |     mapped last, over the others
//!   difference   |  [ 5 .. 14 )                                 |
//!   full file    |##############################################|     mapped first
//! ```
//!
//! Large holes of the full file are not mapped: there, memory stays as it was reserved. So what a load costs goes with what is in the
//! memory and not with how large it is: over a registered slot the kernel takes its time for every page that is mapped, used or
//! not. Most of these holes are memory that may be plugged and is not.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;

use vm_memory::GuestMemoryRegion;

use super::file::{Error, Id, Trailer};
use super::pages::{PAGE, Pages};
use super::{GuestMemory, MemorySource, Region, numbered, size};

/// Most files below a snapshot's own. Each costs mappings; whoever would need more saves against an older base.
pub const MAX_BASES: usize = 4;

/// A hole that is worth a mapping more around it: parts of the file of this size, aligned to it, are mapped or left out.
const PART: u64 = 32 << 20;

/// A snapshot's memory file and those that it is based on.
#[derive(Debug)]
pub struct MappedFiles {
    /// The newest first; the last one is full.
    layers: Vec<Layer>,
    ids: Vec<Id>,
    size: u64,
}

#[derive(Debug)]
struct Layer {
    file: File,
    /// None: all of them.
    pages: Option<Pages>,
}

impl MappedFiles {
    /// Looks whether `files` are the memory, `size` bytes of it, of the snapshot that `ids` begins with, and of those that it
    /// is based on, in their order.
    ///
    /// # Errors
    /// They are not.
    pub fn open(files: Vec<File>, ids: Vec<Id>, size: u64) -> Result<Self, Error> {
        if files.len() != ids.len() || ids.is_empty() {
            return Err(Error::Bases {
                expected: ids.len().saturating_sub(1),
                found: files.len().saturating_sub(1),
            });
        }
        let mut layers = Vec::new();
        for (place, (file, id)) in files.into_iter().zip(&ids).enumerate() {
            let trailer = Trailer::read(&file, size)?;
            match trailer.id {
                found if found == *id => {}
                _ if place == 0 => return Err(Error::Foreign),
                found => {
                    let expected = *id;
                    return Err(Error::Base { place, expected, found });
                }
            }
            if trailer.difference.as_ref().map(|difference| difference.base) != ids.get(place + 1).copied() {
                return Err(Error::Chain(*id));
            }
            let pages = trailer.difference.map(|difference| difference.pages);
            layers.push(Layer { file, pages });
        }
        Ok(Self { layers, ids, size })
    }

    /// Maps the full file: the `whole` of it, or without its large holes.
    ///
    /// # Errors
    /// It is no file for this memory, or the host refuses.
    pub fn map_base(&self, reserved: &GuestMemory, whole: bool) -> Result<(), super::Error> {
        let expected = size(reserved);
        if expected != self.size {
            let found = self.size;
            return Err(Error::Length { expected, found }.into());
        }
        let full = self.layers.iter().filter(|layer| layer.pages.is_none());
        for (layer, (first, region)) in full.flat_map(|layer| numbered(reserved).map(move |it| (layer, it))) {
            let all = first..first + region.len() / PAGE;
            let pages = if whole {
                Pages::run(all)
            } else {
                parts_with_data(&layer.file, all)
            };
            pages
                .runs()
                .iter()
                .try_for_each(|run| map(&layer.file, region, first, run))?;
        }
        Ok(())
    }

    /// Maps differences over what is there.
    ///
    /// # Errors
    /// The host refuses.
    pub fn map_differences(&self, reserved: &GuestMemory) -> Result<(), super::Error> {
        let differences = self.layers.iter().rev();
        let mut differences = differences.filter_map(|layer| Some((layer, layer.pages.as_ref()?)));
        differences.try_for_each(|(layer, pages)| Self::map_some(layer, pages, reserved))
    }

    /// All pages of guest memory.
    #[must_use]
    pub fn all(&self) -> Pages {
        Pages::run(0..self.size / PAGE)
    }

    fn map_some(layer: &Layer, pages: &Pages, reserved: &GuestMemory) -> Result<(), super::Error> {
        for (first, region) in numbered(reserved) {
            let end = first + region.len() / PAGE;
            for run in pages.runs() {
                let run = run.start.max(first)..run.end.min(end);
                if !run.is_empty() {
                    map(&layer.file, region, first, &run)?;
                }
            }
        }
        Ok(())
    }
}

impl MemorySource for MappedFiles {
    fn fill(&self, reserved: &GuestMemory) -> Result<(), super::Error> {
        self.map_base(reserved, false)?;
        self.map_differences(reserved)
    }

    fn snapshots(&self) -> &[Id] {
        &self.ids
    }

    fn since(&self, base: &Id) -> Option<Pages> {
        let place = self.ids.iter().position(|id| id == base)?;
        let newer = self.layers[..place].iter().filter_map(|layer| layer.pages.as_ref());
        Some(newer.fold(Pages::default(), |all, pages| all.or(pages)))
    }

    fn content(&self) -> Pages {
        self.layers
            .iter()
            .fold(Pages::default(), |all, layer| match &layer.pages {
                Some(pages) => all.or(pages),
                None => all.or(&data(&layer.file, self.size)),
            })
    }
    fn uses(&self, file: &File) -> io::Result<bool> {
        let asked = identity(file)?;
        let ours = self.layers.iter().map(|layer| identity(&layer.file));
        Ok(ours.collect::<io::Result<Vec<_>>>()?.contains(&asked))
    }
}

/// What a file is, whatever it is called.
fn identity(file: &File) -> io::Result<(u64, u64)> {
    let metadata = file.metadata()?;
    Ok((metadata.dev(), metadata.ino()))
}

/// Maps pages of `file` to where they belong in a region whose first page has the number `first`.
fn map(file: &File, region: &Region, first: u64, pages: &Range<u64>) -> Result<(), super::Error> {
    let size = (pages.end - pages.start) * PAGE;
    let too_large = super::Error::TooLarge(size);
    let place = usize::try_from((pages.start - first) * PAGE).ok();
    let numbers = place
        .zip(usize::try_from(size).ok())
        .zip(i64::try_from(pages.start * PAGE).ok());
    let ((place, length), offset) = numbers.ok_or(too_large)?;
    // SAFETY: a part of a reserved region is replaced, which stays mapped at its address for as long as it lives; its contents
    // change as guest memory always may.
    let mapped = unsafe {
        libc::mmap(
            region.as_ptr().wrapping_add(place).cast(),
            length,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_NORESERVE | libc::MAP_FIXED,
            file.as_raw_fd(),
            offset,
        )
    };
    if mapped == libc::MAP_FAILED {
        let source = io::Error::last_os_error();
        return Err(Error::Map { size, source }.into());
    }
    Ok(())
}

/// The pages before `end` that are no holes. A file system that does not know of holes says that there are none.
fn data(file: &File, end: u64) -> Pages {
    let mut pages = Pages::default();
    let mut at = 0;
    while let Some(start) = next_data(file, at, end) {
        let hole = seek(file, start, libc::SEEK_HOLE).ok().unwrap_or(end).min(end);
        // From whole page to whole page, whatever the file system's unit.
        pages.push((start / PAGE).max(at.div_ceil(PAGE))..hole.div_ceil(PAGE));
        at = hole.next_multiple_of(PAGE);
    }
    pages
}

/// Of these pages, the [`PART`]s of the file in which there is something.
fn parts_with_data(file: &File, pages: Range<u64>) -> Pages {
    const PAGES: u64 = PART / PAGE;
    let mut parts = Pages::default();
    let mut at = pages.start;
    while let Some(data) = next_data(file, at * PAGE, pages.end * PAGE) {
        let part = data / PAGE / PAGES * PAGES;
        let end = (part + PAGES).min(pages.end);
        parts.push(part.max(at)..end);
        at = end;
    }
    parts
}

/// Whether the file has something between two offsets.
pub fn has_data(file: &File, offset: u64, end: u64) -> bool {
    next_data(file, offset, end).is_some()
}

/// Where, from `offset` to `end`, the file has something.
fn next_data(file: &File, offset: u64, end: u64) -> Option<u64> {
    if offset >= end {
        return None;
    }
    match seek(file, offset, libc::SEEK_DATA) {
        Ok(data) => Some(data).filter(|data| *data < end),
        // Nothing up to the end of the file.
        Err(error) if error.raw_os_error() == Some(libc::ENXIO) => None,
        Err(_) => Some(offset),
    }
}

/// lseek. Where it leaves the file does not matter: all reading here is by offset.
fn seek(file: &File, offset: u64, whence: i32) -> io::Result<u64> {
    let offset = i64::try_from(offset).map_err(io::Error::other)?;
    // SAFETY: takes no pointers.
    let found = unsafe { libc::lseek(file.as_raw_fd(), offset, whence) };
    u64::try_from(found).map_err(|_| io::Error::last_os_error())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use vm_memory::{Bytes, GuestAddress};

    use super::*;
    use crate::memory::file::{Difference, write_trailer};
    use crate::memory::writer::{Over, Writer};
    use crate::memory::{HOTPLUG_START, Range as Addresses, reserve};

    const RANGES: [Addresses; 2] = [
        Addresses {
            start: 0,
            size: 2 << 20,
        },
        Addresses {
            start: 1 << 32,
            size: 4 << 20,
        },
    ];
    const SIZE: u64 = 6 << 20;

    fn read(memory: &GuestMemory, page: u64) -> u8 {
        let address = if page < 512 {
            page << 12
        } else {
            (1 << 32) + ((page - 512) << 12)
        };
        memory.read_obj(GuestAddress(address)).unwrap()
    }

    /// A file with `value` in the first byte of these pages.
    fn layer(value: u8, pages: &Pages, trailer: &Trailer) -> File {
        let memory = reserve(&RANGES).unwrap();
        let file = tempfile::tempfile().unwrap();
        let mut writer = Writer::begin(file.try_clone().unwrap(), &memory).unwrap();
        writer.copy(&memory, pages, Over::Holes).unwrap();
        for page in pages.runs().iter().cloned().flatten() {
            file.write_all_at(&[value], page * PAGE).unwrap();
        }
        writer.finish(trailer).unwrap();
        file
    }

    fn difference(id: u8, base: u8, pages: Pages) -> Trailer {
        Trailer {
            id: [id; 16],
            difference: Some(Difference {
                base: [base; 16],
                pages,
            }),
        }
    }

    fn chain() -> Vec<File> {
        let (newer, older) = (Pages::run(511..514), Pages::run(500..512));
        vec![
            layer(3, &newer, &difference(3, 2, newer.clone())),
            layer(2, &older, &difference(2, 1, older.clone())),
            layer(1, &Pages::run(490..600), &Trailer::full([1; 16])),
        ]
    }

    const IDS: [Id; 3] = [[3; 16], [2; 16], [1; 16]];

    #[test]
    fn a_difference_lies_over_its_base_and_what_a_clone_writes_is_its_own() {
        let files = chain();
        let newest = files[0].try_clone().unwrap();
        let source = MappedFiles::open(files, IDS.to_vec(), SIZE).unwrap();
        let memory = reserve(&RANGES).unwrap();
        source.fill(&memory).unwrap();
        let pages = [489, 490, 499, 500, 510, 511, 512, 513, 514, 599, 600];
        assert_eq!(pages.map(|page| read(&memory, page)), [0, 1, 1, 2, 2, 3, 3, 3, 1, 1, 0]);
        memory.write_obj(9u8, GuestAddress(511 << 12)).unwrap();
        let mut byte = [0];
        newest.read_exact_at(&mut byte, 511 * PAGE).unwrap();
        assert_eq!(byte, [3]);
    }

    #[test]
    fn it_is_known_what_changed_since_which_snapshot() {
        let source = MappedFiles::open(chain(), IDS.to_vec(), SIZE).unwrap();
        assert_eq!(source.snapshots(), IDS);
        assert_eq!(source.since(&[3; 16]), Some(Pages::default()));
        assert_eq!(source.since(&[2; 16]), Some(Pages::run(511..514)));
        assert_eq!(source.since(&[1; 16]), Some(Pages::run(500..514)));
        assert_eq!(source.since(&[9; 16]), None);
        assert_eq!(source.content(), Pages::run(490..600));
    }

    #[test]
    fn files_that_do_not_belong_together_are_told_apart() {
        let open = |files, ids: &[Id]| MappedFiles::open(files, ids.to_vec(), SIZE).unwrap_err();
        let mut missing = chain();
        missing.pop();
        assert!(matches!(open(missing, &IDS), Error::Bases { expected: 2, found: 1 }));
        assert!(matches!(open(chain(), &[[4; 16], IDS[1], IDS[2]]), Error::Foreign));
        assert!(matches!(open(chain(), &[IDS[0], [7; 16], IDS[2]]), Error::Chain(_)));
        let mut files = chain();
        files[1] = layer(2, &Pages::run(0..1), &difference(7, 1, Pages::run(0..1)));
        let error = open(files, &IDS);
        assert!(matches!(error, Error::Base { place: 1, .. }));
        let message = error.to_string();
        assert!(
            message.contains(&"02".repeat(16)) && message.contains(&"07".repeat(16)),
            "{message}"
        );
        // A difference alone, a full file in the middle, and one that has another base than the next.
        let mut files = chain();
        files.truncate(1);
        assert!(matches!(open(files, &IDS[..1]), Error::Chain(_)));
        let full = Trailer::full([3; 16]);
        let mut files = chain();
        files[0] = layer(3, &Pages::run(0..1), &full);
        assert!(matches!(open(files, &IDS), Error::Chain(_)));
        let mut files = chain();
        write_trailer(&files[0], SIZE, &difference(3, 1, Pages::run(511..514))).unwrap();
        assert!(matches!(open(files.split_off(0), &IDS), Error::Chain(_)));
    }

    #[test]
    fn only_parts_of_a_file_with_something_in_them_are_mapped() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(5 * PART).unwrap();
        for at in [PART - 1, PART, 3 * PART + 5] {
            file.write_all_at(&[7], at).unwrap();
        }
        let pages = PART / PAGE;
        let mut expected = Pages::run(0..2 * pages);
        expected.push(3 * pages..4 * pages);
        assert_eq!(parts_with_data(&file, 0..5 * pages), expected);
        // Regions end where they do, and parts are the file's.
        let mut expected = Pages::run(pages + 1..2 * pages);
        expected.push(3 * pages..3 * pages + 1);
        let odd = file.try_clone().unwrap();
        odd.write_all_at(&[7], (pages + 9) * PAGE).unwrap();
        assert_eq!(parts_with_data(&file, pages + 1..3 * pages + 1), expected);
        assert_eq!(parts_with_data(&file, 4 * pages..5 * pages), Pages::default());
    }

    #[test]
    fn only_plugged_memory_is_mapped() {
        let ranges = [
            Addresses {
                start: 0,
                size: 2 << 20,
            },
            Addresses {
                start: HOTPLUG_START,
                size: 8 << 20,
            },
        ];
        for (page, mapped) in [(100, false), (900, true)] {
            let memory = reserve(&ranges).unwrap();
            let file = tempfile::tempfile().unwrap();
            file.set_len(10 << 20).unwrap();
            file.write_all_at(&[7], page * PAGE).unwrap();
            write_trailer(&file, 10 << 20, &Trailer::full([1; 16])).unwrap();
            // Stays, if nothing is mapped over it.
            let place = GuestAddress(HOTPLUG_START + 0x1000);
            memory.write_obj(1u8, place).unwrap();
            let source = MappedFiles::open(vec![file], vec![[1; 16]], 10 << 20).unwrap();
            source.fill(&memory).unwrap();
            assert_eq!(memory.read_obj::<u8>(place).unwrap() == 0, mapped);
            assert_eq!(source.content(), Pages::run(page..page + 1));
        }
    }
}
