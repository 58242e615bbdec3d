//! A descriptor chain, read once into owned values and checked.
//!
//! A guest can rewrite its descriptors at any time, also between two looks of the device. So there is one look: what
//! [`Chain::read`] returns is all that the device ever acts on.

use std::ops::Deref;

use virtio_queue::DescriptorChain;
use vm_memory::{Bytes, GuestAddress, GuestMemory, GuestMemoryBackend, GuestMemoryError, Permissions};

use crate::memory::{GuestMemoryMmap, mark_written};

/// Why a chain was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ChainError {
    /// No descriptor, or one that says that another follows which cannot be had (a loop, an index beyond the table, a
    /// table outside of memory, more than 2^32 bytes).
    #[error("descriptor chain is empty or broken off")]
    Broken,
    /// Longer than the queue (virtio 1.3, 2.7.5.3.1).
    #[error("descriptor chain is longer than its queue")]
    TooLong,
    /// A descriptor without a byte.
    #[error("descriptor of length zero")]
    ZeroLength,
    /// Device-readable after device-writable (virtio 1.3, 2.7.4.2).
    #[error("device-readable descriptor after a device-writable one")]
    Order,
    /// Outside of guest memory.
    #[error("descriptor outside of guest memory")]
    OutOfRange,
}

/// One contiguous piece of guest memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment {
    /// Where it begins.
    pub addr: GuestAddress,
    /// Its length in bytes.
    pub len: u32,
}

/// A descriptor chain: what the device may read, then what it may write.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chain {
    /// Index of the first descriptor; it goes back to the driver in the used ring.
    pub head: u16,
    /// Device-readable part.
    pub readable: GuestBuffer,
    /// Device-writable part.
    pub writable: GuestBuffer,
}

impl Chain {
    /// Reads all descriptors of a chain, at most `limit`.
    ///
    /// # Errors
    /// When the chain cannot be used; see [`ChainError`].
    pub fn read<M>(chain: DescriptorChain<M>, memory: &GuestMemoryMmap, limit: u16) -> Result<Self, ChainError>
    where
        M: Deref,
        M::Target: GuestMemory,
    {
        let head = chain.head_index();
        let (mut readable, mut writable) = (GuestBuffer::default(), GuestBuffer::default());
        let mut more = true;
        for (index, descriptor) in chain.enumerate() {
            if index >= usize::from(limit) {
                return Err(ChainError::TooLong);
            }
            more = descriptor.has_next();
            let segment = Segment {
                addr: descriptor.addr(),
                len: descriptor.len(),
            };
            segment.check(memory)?;
            if descriptor.is_write_only() {
                writable.push(segment);
            } else if writable.is_empty() {
                readable.push(segment);
            } else {
                return Err(ChainError::Order);
            }
        }
        // The iterator ends early on anything broken; then the last descriptor still announces another.
        if more {
            Err(ChainError::Broken)
        } else {
            Ok(Self {
                head,
                readable,
                writable,
            })
        }
    }
}

impl Segment {
    fn check(&self, memory: &GuestMemoryMmap) -> Result<(), ChainError> {
        let len = usize::try_from(self.len).map_err(|_| ChainError::OutOfRange)?;
        match len {
            0 => Err(ChainError::ZeroLength),
            _ if GuestMemory::check_range(memory, self.addr, len, Permissions::ReadWrite) => Ok(()),
            _ => Err(ChainError::OutOfRange),
        }
    }
}

/// Guest memory in pieces, seen as one run of bytes. All pieces lie in guest memory and none is empty.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct GuestBuffer {
    segments: Vec<Segment>,
    len: u64,
}

impl GuestBuffer {
    fn push(&mut self, segment: Segment) {
        self.segments.push(segment);
        // A chain has at most 2^32 bytes and 2^16 descriptors: the virtio-queue iterator ends before more.
        self.len += u64::from(segment.len);
    }

    /// Bytes in all.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether there are no bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The pieces.
    pub fn segments(&self) -> &[Segment] {
        &self.segments
    }

    /// Splits at byte `at`: what lies before stays, what follows is returned. Beyond the end: nothing is returned.
    pub fn split_off(&mut self, at: u64) -> GuestBuffer {
        let whole = std::mem::take(self);
        let mut tail = GuestBuffer::default();
        for segment in whole.segments {
            // `at - self.len` does not underflow: self only grows while it is at most `at`.
            let room = u32::try_from(at - self.len).unwrap_or(u32::MAX).min(segment.len);
            if room > 0 {
                self.push(Segment {
                    addr: segment.addr,
                    len: room,
                });
            }
            if room < segment.len {
                // Within a segment that was found to lie in guest memory, so it does not wrap.
                let addr = GuestAddress(segment.addr.0 + u64::from(room));
                tail.push(Segment {
                    addr,
                    len: segment.len - room,
                });
            }
        }
        tail
    }

    /// Takes `count` bytes from the front into `data`, if there are that many.
    pub fn take_front(&mut self, memory: &GuestMemoryMmap, data: &mut [u8]) -> Result<bool, GuestMemoryError> {
        if self.len < data.len() as u64 {
            return Ok(false);
        }
        let rest = self.split_off(data.len() as u64);
        let front = std::mem::replace(self, rest);
        front.read_at(memory, 0, data)?;
        Ok(true)
    }

    /// Copies out of guest memory, from byte `offset` on, as much as there is; returns how much that was.
    pub fn read_at(&self, memory: &GuestMemoryMmap, offset: u64, data: &mut [u8]) -> Result<usize, GuestMemoryError> {
        let mut done = 0;
        self.for_each_piece(offset, data.len(), |addr, len| {
            // `for_each_piece` hands out at most data.len() bytes in all.
            memory.read_slice(&mut data[done..done + len], addr)?;
            done += len;
            Ok(())
        })?;
        Ok(done)
    }

    /// Copies into guest memory, from byte `offset` on, as much as fits; returns how much that was.
    pub fn write_at(&self, memory: &GuestMemoryMmap, offset: u64, data: &[u8]) -> Result<usize, GuestMemoryError> {
        let mut done = 0;
        self.for_each_piece(offset, data.len(), |addr, len| {
            memory.write_slice(&data[done..done + len], addr)?;
            done += len;
            Ok(())
        })?;
        Ok(done)
    }

    fn for_each_piece(
        &self,
        offset: u64,
        count: usize,
        mut visit: impl FnMut(GuestAddress, usize) -> Result<(), GuestMemoryError>,
    ) -> Result<(), GuestMemoryError> {
        let (mut skip, mut left) = (offset, count);
        for segment in &self.segments {
            let len = u64::from(segment.len);
            if skip >= len {
                skip -= len;
                continue;
            }
            let piece = usize::try_from(len - skip).unwrap_or(usize::MAX).min(left);
            if piece == 0 {
                break;
            }
            visit(GuestAddress(segment.addr.0 + skip), piece)?;
            left -= piece;
            skip = 0;
        }
        Ok(())
    }

    /// Tells of all pieces that the kernel may have written to them.
    pub(crate) fn mark_written(&self, memory: &GuestMemoryMmap) -> Result<(), GuestMemoryError> {
        let mut segments = self.segments.iter();
        segments.try_for_each(|segment| {
            mark_written(memory, segment.addr, usize::try_from(segment.len).unwrap_or(usize::MAX))
        })
    }

    /// The pieces as this process's addresses, for the kernel to read or write.
    ///
    /// Whoever hands them to the kernel keeps a clone of `memory` until the kernel is done, and then, if it wrote, calls
    /// [`Self::mark_written`].
    pub(crate) fn iovecs(&self, memory: &GuestMemoryMmap) -> Result<Vec<GuestIovec>, GuestMemoryError> {
        let mut iovecs = Vec::with_capacity(self.segments.len());
        for segment in &self.segments {
            let len = usize::try_from(segment.len).unwrap_or(usize::MAX);
            // A segment may straddle two regions: it then becomes several.
            for slice in GuestMemoryBackend::get_slices(memory, segment.addr, len) {
                let slice = slice?;
                iovecs.push(GuestIovec(libc::iovec {
                    iov_base: slice.ptr_guard_mut().as_ptr().cast(),
                    iov_len: slice.len(),
                }));
            }
        }
        Ok(iovecs)
    }
}

/// An iovec that points into guest memory.
#[derive(Debug, Clone, Copy)]
#[repr(transparent)]
pub(crate) struct GuestIovec(pub(crate) libc::iovec);

// SAFETY: it is an address and a length; nothing in this process dereferences it. The kernel does, for whichever thread
// makes the system call.
unsafe impl Send for GuestIovec {}

#[cfg(test)]
mod tests {
    use super::*;

    fn memory() -> GuestMemoryMmap {
        GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x1000), (GuestAddress(0x1000), 0x1000)]).unwrap()
    }

    fn buffer(segments: &[(u64, u32)]) -> GuestBuffer {
        let mut buffer = GuestBuffer::default();
        for &(addr, len) in segments {
            buffer.push(Segment {
                addr: GuestAddress(addr),
                len,
            });
        }
        buffer
    }

    #[test]
    fn splitting_keeps_every_byte_in_order() {
        for at in 0..=12 {
            let mut front = buffer(&[(0x100, 4), (0x200, 1), (0x300, 5)]);
            let tail = front.split_off(at);
            assert_eq!(front.len(), at.min(10));
            assert_eq!(front.len() + tail.len(), 10);
            let bytes: Vec<u64> = front
                .segments()
                .iter()
                .chain(tail.segments())
                .flat_map(|s| s.addr.0..s.addr.0 + u64::from(s.len))
                .collect();
            assert_eq!(
                bytes,
                [0x100, 0x101, 0x102, 0x103, 0x200, 0x300, 0x301, 0x302, 0x303, 0x304]
            );
        }
    }

    #[test]
    fn copies_cross_segments_and_stop_at_the_end() {
        let memory = memory();
        let buffer = buffer(&[(0x100, 3), (0xffe, 4)]);
        assert_eq!(buffer.write_at(&memory, 1, b"abcdefgh").unwrap(), 6);
        let mut data = [0; 10];
        assert_eq!(buffer.read_at(&memory, 0, &mut data).unwrap(), 7);
        assert_eq!(&data[..7], b"\0abcdef");
    }

    #[test]
    fn a_segment_over_two_regions_becomes_two_iovecs() {
        let memory = memory();
        let iovecs = buffer(&[(0xf00, 0x200)]).iovecs(&memory).unwrap();
        assert_eq!(
            iovecs.iter().map(|iovec| iovec.0.iov_len).collect::<Vec<_>>(),
            [0x100, 0x100]
        );
    }
}
