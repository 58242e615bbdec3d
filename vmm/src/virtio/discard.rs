//! Guest memory given back to the host.

use std::io;

use vm_memory::bitmap::Bitmap;
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use super::device::DeviceError;
use crate::memory::GuestMemory;

/// The unit that the host takes back.
pub(crate) const PAGE: u64 = 4096;

/// Drops what is in `len` bytes of guest memory. Afterwards they hold zeros, or, in private memory that was mapped from a
/// file, what the file has; either way they cost no memory of this sandbox until they are written again.
///
/// # Errors
/// Not whole pages, outside of guest memory, or the host refuses.
pub(crate) fn discard(memory: &GuestMemory, start: GuestAddress, len: u64) -> Result<(), DeviceError> {
    let refused = || {
        DeviceError::Refused(format!(
            "{len:#x} bytes at {:#x} are not pages of guest memory",
            start.0
        ))
    };
    let end = start.0.checked_add(len).ok_or_else(refused)?;
    if !start.0.is_multiple_of(PAGE) || !len.is_multiple_of(PAGE) {
        return Err(refused());
    }
    let mut at = start.0;
    while at < end {
        let region = memory.find_region(GuestAddress(at)).ok_or_else(refused)?;
        let offset = at - region.start_addr().0;
        let here = (end - at).min(region.len() - offset);
        let (Ok(offset), Ok(length)) = (usize::try_from(offset), usize::try_from(here)) else {
            return Err(refused());
        };
        let advice = if region.flags() & libc::MAP_SHARED != 0 {
            libc::MADV_REMOVE
        } else {
            libc::MADV_DONTNEED
        };
        let address = region.as_ptr().wrapping_add(offset);
        // SAFETY: the range lies in a mapping of guest memory, which lives as long as `memory`; what is in it is accessed by
        // volatile means only, so that it may change at any time.
        if unsafe { libc::madvise(address.cast(), length, advice) } != 0 {
            return Err(DeviceError::host("give guest memory back")(io::Error::last_os_error()));
        }
        // What a save has copied of it is not what is there now.
        region.bitmap().mark_dirty(offset, length);
        at += here;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use vm_memory::Bytes;

    use super::*;
    use crate::memory::GuestMemoryMmap;

    fn two_regions() -> GuestMemory {
        Arc::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x4000), (GuestAddress(0x4000), 0x4000)]).unwrap())
    }

    #[test]
    fn what_is_discarded_reads_as_zero_and_its_neighbours_stay() {
        let memory = two_regions();
        for page in 0..8 {
            memory.write_obj(!0u64, GuestAddress(page * PAGE)).unwrap();
        }
        discard(&memory, GuestAddress(0x3000), 0x2000).unwrap();
        let read = |page: u64| memory.read_obj::<u64>(GuestAddress(page * PAGE)).unwrap();
        assert_eq!([2, 3, 4, 5].map(read), [!0, 0, 0, !0]);
    }

    #[test]
    fn parts_of_pages_and_what_is_no_memory_are_refused() {
        let memory = two_regions();
        for (start, len) in [
            (0x10, 0x1000),
            (0, 0x10),
            (0x7000, 0x2000),
            (0x10_0000, 0x1000),
            (!0xfff, 0x2000),
        ] {
            assert!(
                discard(&memory, GuestAddress(start), len).is_err(),
                "{start:#x}+{len:#x}"
            );
        }
    }
}
