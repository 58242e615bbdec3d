//! What this process itself writes into guest memory while a log is kept: devices, and who sets the generation id.
//!
//! KVM logs what the guest writes; what devices write, it does not see. `vm-memory` tells of every write that goes through it;
//! what the kernel writes for a device (`readv`) is told by the device once it is done. While no log is kept this costs a
//! fence and a load.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering, fence};

use vm_memory::bitmap::{Bitmap, NewBitmap, RefSlice, WithBitmapSlice};

use super::pages::{PAGE_BYTES, Pages};

const BITS: usize = u64::BITS as usize;

/// The log of one region of guest memory.
#[derive(Debug, Default)]
pub struct Dirty {
    on: AtomicBool,
    pages: usize,
    /// A bit for each page; there from the first time that a log is kept.
    words: OnceLock<Box<[AtomicU64]>>,
}

impl Dirty {
    /// Begins a log, with nothing in it.
    pub fn begin(&self) {
        let words = self.words.get_or_init(|| {
            let words = std::iter::repeat_with(AtomicU64::default);
            words.take(self.pages.div_ceil(BITS)).collect()
        });
        words.iter().for_each(|word| word.store(0, Ordering::Relaxed));
        // With the fence in `mark_dirty`: whoever wrote and did not find the log on, wrote before anybody reads who turned it on.
        self.on.store(true, Ordering::SeqCst);
        fence(Ordering::SeqCst);
    }

    /// Whether a log is kept.
    pub fn is_on(&self) -> bool {
        self.on.load(Ordering::Relaxed)
    }

    /// Ends the log.
    pub fn end(&self) {
        self.on.store(false, Ordering::Relaxed);
    }

    /// Adds to `pages` what was written since the log began or this was last asked for; page 0 of the region has the number
    /// `first`.
    pub fn take(&self, first: u64, pages: &mut Pages) {
        let words = self.words.get().into_iter().flatten();
        pages.push_bits(first, words.map(|word| word.swap(0, Ordering::AcqRel)));
    }
}

impl NewBitmap for Dirty {
    fn with_len(len: usize) -> Self {
        Self {
            pages: len.div_ceil(PAGE_BYTES),
            ..Self::default()
        }
    }
}

impl<'a> WithBitmapSlice<'a> for Dirty {
    type S = RefSlice<'a, Self>;
}

impl Bitmap for Dirty {
    fn mark_dirty(&self, offset: usize, len: usize) {
        fence(Ordering::SeqCst);
        if len == 0 || !self.on.load(Ordering::Acquire) {
            return;
        }
        let last = offset.saturating_add(len - 1) / PAGE_BYTES;
        for page in offset / PAGE_BYTES..=last {
            if let Some(word) = self.words.get().and_then(|words| words.get(page / BITS)) {
                word.fetch_or(1 << (page % BITS), Ordering::Release);
            }
        }
    }

    fn dirty_at(&self, offset: usize) -> bool {
        let page = offset / PAGE_BYTES;
        let word = self.words.get().and_then(|words| words.get(page / BITS));
        word.is_some_and(|word| word.load(Ordering::Acquire) & 1 << (page % BITS) != 0)
    }

    fn slice_at(&self, offset: usize) -> RefSlice<'_, Self> {
        RefSlice::new(self, offset)
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

    use super::*;
    use crate::memory::pages::PAGE;
    use crate::memory::{GuestMemory, Range, dirty as log, mark_written, numbered, reserve};

    fn range(start: u64, pages: u64) -> Range {
        Range {
            start,
            size: pages * PAGE,
        }
    }

    #[test]
    fn a_log_has_what_was_written_while_it_was_kept_and_nothing_else() {
        let memory = reserve(&[range(0, 100), range(1 << 32, 3)]).unwrap();
        let dirty = |memory: &GuestMemory| {
            let mut pages = Pages::default();
            for (first, region) in numbered(memory) {
                log(region).take(first, &mut pages);
            }
            pages
        };
        let each = |act: fn(&Dirty)| memory.iter().for_each(|region| act(log(region)));
        memory.write_obj(1u8, GuestAddress(0)).unwrap();
        each(Dirty::begin);
        memory.write_slice(&[1; 4097], GuestAddress(0x5fff)).unwrap();
        memory.write_obj(1u64, GuestAddress((1 << 32) + 0x1000)).unwrap();
        mark_written(&memory, GuestAddress(70 * PAGE), 2 * 4096).unwrap();
        let mut expected = Pages::run(5..7);
        expected.push(70..72);
        expected.push(101..102);
        assert_eq!(dirty(&memory), expected);
        assert_eq!(dirty(&memory), Pages::default(), "taken");
        memory.write_obj(1u8, GuestAddress(0)).unwrap();
        each(Dirty::end);
        memory.write_obj(1u8, GuestAddress(0x1000)).unwrap();
        assert_eq!(dirty(&memory), Pages::run(0..1));
        each(Dirty::begin);
        assert_eq!(dirty(&memory), Pages::default());
    }
}
