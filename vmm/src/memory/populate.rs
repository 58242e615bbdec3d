//! Making pages present ahead of whoever would fault on them.
//!
//! It is a hint: what the kernel cannot do, for want of a page of the file or because it is older than Linux 5.14, is left to the
//! fault that comes to need it.

use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use super::pages::{PAGE, PAGE_BYTES, Pages};
use super::{GuestMemory, numbered};

/// What a page is made present for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// To be read: a page of a file is mapped, and stays shared.
    Read,
    /// To be written: a page of a file becomes a copy of this process's own.
    Write,
}

/// Makes one page present.
pub fn page(memory: &GuestMemory, page: GuestAddress, access: Access) {
    if let Ok(address) = memory.get_host_address(page) {
        advise(address, PAGE_BYTES, access);
    }
}

/// Makes pages present; those that are no guest memory are none.
pub fn pages(memory: &GuestMemory, pages: &Pages, access: Access) {
    each_run(memory, pages, |address, length| advise(address, length, access));
}

/// Has pages be absent again that are a file's, and hold nothing of this process's own.
pub fn forget(memory: &GuestMemory, pages: &Pages) {
    each_run(memory, pages, |address, length| {
        // SAFETY: whole pages of guest memory, which the next access finds as they are now.
        unsafe { libc::madvise(address.cast(), length, libc::MADV_DONTNEED) };
    });
}

fn each_run(memory: &GuestMemory, pages: &Pages, mut tell: impl FnMut(*mut u8, usize)) {
    for (first, region) in numbered(memory) {
        let here = pages.and(&Pages::run(first..first + region.len() / PAGE));
        for run in here.runs() {
            let place = usize::try_from((run.start - first) * PAGE);
            let length = usize::try_from((run.end - run.start) * PAGE);
            // A region is mapped as a whole: offsets in it are this host's.
            if let (Ok(place), Ok(length)) = (place, length) {
                tell(region.as_ptr().wrapping_add(place), length);
            }
        }
    }
}

/// Of whole pages of guest memory.
fn advise(address: *mut u8, length: usize, access: Access) {
    let advice = match access {
        Access::Read => libc::MADV_POPULATE_READ,
        Access::Write => libc::MADV_POPULATE_WRITE,
    };
    // SAFETY: whole pages of guest memory, whose content stays. What fails costs time alone.
    unsafe { libc::madvise(address.cast(), length, advice) };
}
