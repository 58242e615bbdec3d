//! Guest memory: where it lies in the guest's address space, and how it gets there.
//!
//! ```text
//!  0x0_0000_0000 +--------------------------+
//!                | low memory               |  up to 3 GiB; boot structures in its first MiB (see `boot`)
//!  0x0_c000_0000 +--------------------------+  LOW_MEMORY_END: the gap begins
//!                | nothing                  |
//!  0x0_d000_0000 +--------------------------+  VIRTIO_BASE: virtio-mmio windows, 0x1000 for each device
//!                | nothing                  |
//!  0x0_fec0_0000 | IOAPIC                   |
//!  0x0_fee0_0000 | local APICs              |
//!  0x0_ffbc_0000 | KVM's own pages          |  identity map, TSS (Intel, real mode)
//!  0x1_0000_0000 +--------------------------+  HIGH_MEMORY_START
//!                | the rest of the memory   |
//!                +--------------------------+
//!                | nothing                  |
//! 0x40_0000_0000 +--------------------------+  HOTPLUG_START
//!                | plugged by virtio-mem    |  not told of in the memory map
//!                +--------------------------+
//! ```

pub mod dirty;
pub mod file;
pub mod mapped;
pub mod paged;
pub mod pagemap;
pub mod pages;
pub mod populate;
pub mod working_set;
pub mod writer;

use std::fs::File;
use std::io;
use std::sync::Arc;

use thiserror::Error;
use vm_memory::bitmap::Bitmap;
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryError, GuestMemoryRegion, GuestRegionMmap, MmapRegion};

use self::dirty::Dirty;
use self::file::Id;
use self::pages::{PAGE, Pages};

/// Guest memory, whose writes by this process can be logged.
pub type GuestMemoryMmap = vm_memory::GuestMemoryMmap<Dirty>;
/// Guest memory as every part of the VMM holds it. Regions never change once a machine is made.
pub type GuestMemory = Arc<GuestMemoryMmap>;
/// One range of it.
pub type Region = GuestRegionMmap<Dirty>;

/// First address behind low memory.
pub const LOW_MEMORY_END: u64 = 0xc000_0000;
/// Where memory goes on above the gap.
pub const HIGH_MEMORY_START: u64 = 1 << 32;
/// Where memory begins that is plugged while the guest runs: the same place in each machine, whatever its size, and within the
/// 39 bits of address that the smallest hosts have.
pub const HOTPLUG_START: u64 = 1 << 38;
/// Window of the first virtio-mmio device.
pub const VIRTIO_BASE: u64 = 0xd000_0000;
/// Size of each virtio-mmio window.
pub const VIRTIO_WINDOW: u64 = 0x1000;
/// The IOAPIC's registers (82093AA data sheet, 3.0).
pub const IOAPIC_BASE: u32 = 0xfec0_0000;
/// The local APICs' registers (SDM volume 3, 11.4.1).
pub const LOCAL_APIC_BASE: u32 = 0xfee0_0000;
/// One page for EPT's identity map while a vCPU is in real mode (KVM API 4.43).
pub const IDENTITY_MAP_BASE: u64 = 0xffbc_0000;
/// Three pages for the task state segment of real mode (KVM API 4.30).
pub const TSS_BASE: usize = 0xffbc_1000;

/// Memory that cannot be had.
#[derive(Debug, Error)]
pub enum Error {
    /// The host refuses the mapping.
    #[error("mapping {size:#x} bytes of guest memory")]
    Map {
        /// How much was asked for.
        size: u64,
        /// What the host said.
        source: vm_memory::mmap::FromRangesError,
    },
    /// A file as memory.
    #[error(transparent)]
    File(#[from] file::Error),
    /// A page server.
    #[error(transparent)]
    Paged(#[from] paged::Error),
    /// A working set.
    #[error(transparent)]
    WorkingSet(#[from] working_set::Error),
    /// More than this host can address.
    #[error("guest memory of {0:#x} bytes is more than this host can address")]
    TooLarge(u64),
}

/// A range of guest addresses with memory behind it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    /// First guest address.
    pub start: u64,
    /// Length in bytes.
    pub size: u64,
}

/// Where `size` bytes of memory lie: below the gap, and above it what does not fit there.
#[must_use]
pub fn layout(size: u64) -> Vec<Range> {
    let low = size.min(LOW_MEMORY_END);
    let mut ranges = vec![Range { start: 0, size: low }];
    if size > low {
        ranges.push(Range {
            start: HIGH_MEMORY_START,
            size: size - low,
        });
    }
    ranges
}

/// Where memory lies that may be plugged: nowhere, if there is none.
#[must_use]
pub fn hotplug(size: u64) -> Option<Range> {
    (size > 0).then_some(Range {
        start: HOTPLUG_START,
        size,
    })
}

/// Where guest memory comes from.
///
/// Mapping has two steps, because a memory slot is registered with KVM long before it is known what will be in it: a range of
/// addresses is reserved first, and filled later.
pub trait MemorySource: Send + Sync {
    /// Maps what this source has over memory that is [`reserve`]d, whose addresses stay as they are.
    ///
    /// # Errors
    /// The source does not fit the ranges, or the host refuses the mapping.
    fn fill(&self, reserved: &GuestMemory) -> Result<(), Error>;

    /// The snapshots whose memory this is, the newest first, then what each is based on. None: it is no snapshot's.
    fn snapshots(&self) -> &[Id];

    /// The pages in which the newest snapshot may differ from an older one; None, if it is not based on that.
    fn since(&self, base: &Id) -> Option<Pages>;

    /// The pages that may be something else than zeros.
    fn content(&self) -> Pages;

    /// Whether that file is in use as memory.
    ///
    /// # Errors
    /// It cannot be looked at.
    fn uses(&self, file: &File) -> io::Result<bool>;

    /// Whether the kernel has all of it: nobody waits for a page but for the disk.
    fn is_local(&self) -> bool {
        true
    }

    /// Maps memory for `ranges`.
    ///
    /// # Errors
    /// The host refuses the mapping.
    fn map(&self, ranges: &[Range]) -> Result<GuestMemory, Error> {
        let memory = reserve(ranges)?;
        self.fill(&memory)?;
        Ok(memory)
    }
}

/// Reserves addresses for `ranges`: they read as zero and cost nothing until they are touched.
///
/// # Errors
/// The host refuses the mapping.
pub fn reserve(ranges: &[Range]) -> Result<GuestMemory, Error> {
    let total = ranges.iter().map(|range| range.size).sum();
    let ranges = ranges
        .iter()
        .map(|range| {
            Ok((
                GuestAddress(range.start),
                usize::try_from(range.size).map_err(|_| Error::TooLarge(total))?,
            ))
        })
        .collect::<Result<Vec<_>, Error>>()?;
    let memory = GuestMemoryMmap::from_ranges(&ranges).map_err(|source| Error::Map { size: total, source })?;
    memory.iter().for_each(prefer_huge_pages);
    Ok(Arc::new(memory))
}

/// Has the kernel use huge pages for memory that may be plugged, which is a sandbox's own and most of a large one's; not for the memory
/// that it boots with, which clones share page by page (docs/adr/0015-huge-pages.md).
fn prefer_huge_pages(region: &Region) {
    if region.start_addr().0 < HOTPLUG_START {
        return;
    }
    let Ok(length) = usize::try_from(region.len()) else {
        return;
    };
    // SAFETY: the whole of a region, whose content stays. A kernel without huge pages refuses, and takes small ones.
    unsafe { libc::madvise(region.as_ptr().cast(), length, libc::MADV_HUGEPAGE) };
}

/// Makes memory as [`reserve`] made it, whatever a source has put there.
///
/// # Errors
/// The host refuses the mapping; nothing is known of the memory then.
pub fn clear(memory: &GuestMemory) -> io::Result<()> {
    for region in memory.iter() {
        // A region is mapped as a whole, so its length is one of this host's.
        let length = usize::try_from(region.len()).map_err(io::Error::other)?;
        // SAFETY: a region is replaced by an empty one at its address; its contents change as guest memory always may.
        let mapped = unsafe {
            libc::mmap(
                region.as_ptr().cast(),
                length,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | libc::MAP_FIXED,
                -1,
                0,
            )
        };
        if mapped == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        prefer_huge_pages(region);
    }
    Ok(())
}

/// Bytes of guest memory, which is as long as the part of a memory file before its last page.
#[must_use]
pub fn size(memory: &GuestMemory) -> u64 {
    memory.iter().map(GuestMemoryRegion::len).sum()
}

/// The ranges of guest memory with the number that the first page of each has in a memory file.
pub fn numbered(memory: &GuestMemory) -> impl Iterator<Item = (u64, &Region)> {
    memory.iter().scan(0, |next, region| {
        let first = *next;
        *next += region.len() / PAGE;
        Some((first, region))
    })
}

/// The log of what this process writes into a range.
#[must_use]
pub fn dirty(region: &Region) -> &Dirty {
    MmapRegion::bitmap(region)
}

/// Tells the log of a write that did not go through `vm-memory`: the kernel's, for a device.
///
/// # Errors
/// That is no guest memory.
pub fn mark_written(memory: &GuestMemoryMmap, start: GuestAddress, length: usize) -> Result<(), GuestMemoryError> {
    for slice in memory.get_slices(start, length) {
        let slice = slice?;
        slice.bitmap().mark_dirty(0, slice.len());
    }
    Ok(())
}

/// Private anonymous memory: zero until touched, gone with the process.
#[derive(Debug)]
pub struct Anonymous;

impl MemorySource for Anonymous {
    fn fill(&self, _reserved: &GuestMemory) -> Result<(), Error> {
        Ok(())
    }

    fn snapshots(&self) -> &[Id] {
        &[]
    }

    fn since(&self, _base: &Id) -> Option<Pages> {
        None
    }

    fn content(&self) -> Pages {
        Pages::default()
    }

    fn uses(&self, _file: &File) -> io::Result<bool> {
        Ok(false)
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use vm_memory::Bytes;

    /// Whether huge pages are asked for at a place in memory, as smaps tells (proc(5)).
    fn wants_huge_pages(memory: &GuestMemory, place: u64) -> bool {
        let address = memory.get_host_address(GuestAddress(place)).unwrap() as usize;
        let smaps = fs::read_to_string("/proc/self/smaps").unwrap();
        let range = |line: &str| {
            let (start, end) = line.split_once(' ')?.0.split_once('-')?;
            let number = |text| usize::from_str_radix(text, 16).ok();
            Some(number(start)?..number(end)?)
        };
        let mut lines = smaps.lines();
        assert!(lines.any(|line| range(line).is_some_and(|range| range.contains(&address))));
        let flags = lines.find_map(|line| line.strip_prefix("VmFlags:")).unwrap();
        flags.split(' ').any(|flag| flag == "hg")
    }

    #[test]
    fn huge_pages_are_for_memory_that_may_be_plugged() {
        let ranges = [layout(2 << 20), hotplug(4 << 20).into_iter().collect()].concat();
        let memory = reserve(&ranges).unwrap();
        let wanted = || [0, HOTPLUG_START].map(|place| wants_huge_pages(&memory, place));
        assert_eq!(wanted(), [false, true]);
        clear(&memory).unwrap();
        assert_eq!(wanted(), [false, true]);
    }

    #[test]
    fn memory_goes_on_above_the_gap() {
        assert_eq!(
            layout(1 << 30),
            [Range {
                start: 0,
                size: 1 << 30
            }]
        );
        assert_eq!(
            layout(LOW_MEMORY_END),
            [Range {
                start: 0,
                size: LOW_MEMORY_END
            }]
        );
        assert_eq!(
            layout(5 << 30),
            [
                Range {
                    start: 0,
                    size: 3 << 30
                },
                Range {
                    start: HIGH_MEMORY_START,
                    size: 2 << 30
                }
            ]
        );
    }

    #[test]
    fn memory_that_was_cleared_is_as_it_was_reserved() {
        let memory = reserve(&layout(LOW_MEMORY_END + (2 << 20))).unwrap();
        let places = [0, HIGH_MEMORY_START + 0x1000].map(GuestAddress);
        places.iter().for_each(|place| memory.write_obj(1u8, *place).unwrap());
        let addresses = places.map(|place| memory.get_host_address(place).unwrap());
        clear(&memory).unwrap();
        assert_eq!(places.map(|place| memory.read_obj::<u8>(place).unwrap()), [0, 0]);
        assert_eq!(places.map(|place| memory.get_host_address(place).unwrap()), addresses);
    }

    #[test]
    fn anonymous_memory_has_both_ranges_and_reads_as_zero() {
        let memory = Anonymous.map(&layout(LOW_MEMORY_END + (2 << 20))).unwrap();
        assert_eq!(memory.num_regions(), 2);
        assert_eq!(memory.read_obj::<u64>(GuestAddress(HIGH_MEMORY_START)).unwrap(), 0);
        assert!(memory.read_obj::<u64>(GuestAddress(LOW_MEMORY_END)).is_err());
    }
}
