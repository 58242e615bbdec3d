//! A raw file by io_uring: requests go in, finished requests come out, the thread never blocks on the disk.
//!
//! The ring is restricted (io_uring_register(2), IORING_REGISTER_RESTRICTIONS) to vectored reads and writes, fsync and
//! fallocate on one registered file. Guest memory that the kernel reads or writes is kept alive by each request in flight.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, RawFd};

use io_uring::register::Restriction;
use io_uring::squeue::{Entry, Flags};
use io_uring::types::{Fixed, FsyncFlags};
use io_uring::{IoUring, opcode};
use vm_memory::GuestMemoryError;

use super::request::{Finished, Operation, Pending, Status};
use crate::memory::GuestMemory;
use crate::virtio::chain::{GuestBuffer, GuestIovec};
use crate::virtio::device::DeviceError;

/// Requests in flight at once. What does not fit waits in the guest's own ring.
const DEPTH: u16 = 64;

const FILE: Fixed = Fixed(0);

/// One request in the kernel's hands.
#[derive(Debug)]
struct InFlight {
    pending: Pending,
    transfer: Transfer,
    /// Where the kernel writes to.
    written: Option<GuestBuffer>,
    memory: GuestMemory,
}

/// What is left to do of a request.
#[derive(Debug)]
enum Transfer {
    Data {
        write: bool,
        durable: bool,
        offset: u64,
        iovecs: Vec<GuestIovec>,
    },
    Other(Box<Entry>),
}

/// An io_uring that knows no file yet: most of what a disk costs when it is bound, and can be made ahead.
pub struct Ring(IoUring);

impl Ring {
    /// Makes one.
    ///
    /// # Errors
    /// When the kernel has no io_uring for us.
    pub fn new() -> io::Result<Self> {
        let ring = IoUring::builder()
            .dontfork()
            .setup_r_disabled()
            .build(u32::from(DEPTH))?;
        Ok(Self(ring))
    }
}

/// The io_uring of one disk.
pub struct Engine {
    ring: IoUring,
    slots: Vec<Option<InFlight>>,
    free: Vec<u16>,
    // Registered with the ring; kept for whoever looks at the process's descriptors.
    _file: File,
}

/// What became of a submission.
#[derive(Debug, PartialEq, Eq)]
pub enum Submitted {
    /// It is in flight.
    Yes,
    /// There is no room: to be tried again once something has finished.
    Full,
}

impl Engine {
    /// Gives a ring its file, and lets it do nothing else.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn new(Ring(ring): Ring, file: File) -> io::Result<Self> {
        ring.submitter().register_files(&[file.as_raw_fd()])?;
        let operations = [
            opcode::Readv::CODE,
            opcode::Writev::CODE,
            opcode::Fsync::CODE,
            opcode::Fallocate::CODE,
        ];
        let mut restrictions: Vec<_> = operations.into_iter().map(Restriction::sqe_op).collect();
        restrictions.push(Restriction::sqe_flags_required(Flags::FIXED_FILE.bits()));
        ring.submitter().register_restrictions(&mut restrictions)?;
        ring.submitter().register_enable_rings()?;
        Ok(Self {
            ring,
            slots: (0..DEPTH).map(|_| None).collect(),
            free: (0..DEPTH).collect(),
            _file: file,
        })
    }

    /// Whether another request fits.
    pub fn has_room(&self) -> bool {
        !self.free.is_empty()
    }

    /// Whether nothing is in flight.
    pub fn is_idle(&self) -> bool {
        self.free.len() == self.slots.len()
    }

    /// Takes up a request. `durable`: what it writes must last when it is finished.
    ///
    /// # Errors
    /// When the memory that was checked cannot be accessed.
    pub fn submit(
        &mut self,
        pending: Pending,
        operation: &Operation,
        memory: &GuestMemory,
        durable: bool,
    ) -> Result<Submitted, GuestMemoryError> {
        let transfer = Transfer::new(operation, memory, durable)?;
        let Some(slot) = self.free.pop() else {
            return Ok(Submitted::Full);
        };
        let written = match operation {
            Operation::Read { buffer, .. } => Some(buffer.clone()),
            _ => None,
        };
        self.slots[usize::from(slot)] = Some(InFlight {
            pending,
            transfer,
            written,
            memory: memory.clone(),
        });
        self.push(slot);
        Ok(Submitted::Yes)
    }

    /// Tells the kernel of all that was submitted since the last time.
    ///
    /// # Errors
    /// When the kernel cannot take it; to be tried again.
    pub fn kick(&self) -> io::Result<()> {
        loop {
            match self.ring.submit() {
                Ok(_) => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// Hands what has finished to `each`.
    ///
    /// # Errors
    /// When the kernel or guest memory fails, or `each` does.
    pub fn reap(&mut self, mut each: impl FnMut(Finished) -> Result<(), DeviceError>) -> Result<(), DeviceError> {
        let mut again = false;
        while let Some((slot, result)) = self.completion() {
            let Some(mut in_flight) = self.slots.get_mut(usize::from(slot)).and_then(Option::take) else {
                continue;
            };
            match in_flight.transfer.advance(result) {
                None => {
                    self.slots[usize::from(slot)] = Some(in_flight);
                    self.push(slot);
                    again = true;
                }
                Some(status) => {
                    self.free.push(slot);
                    if let Some(buffer) = &in_flight.written {
                        buffer.mark_written(&in_flight.memory)?;
                    }
                    each(in_flight.pending.finish(&in_flight.memory, status)?)?;
                }
            }
        }
        if again {
            self.kick().map_err(DeviceError::host("submit to io_uring"))
        } else {
            Ok(())
        }
    }

    /// Waits until nothing is in flight; hands what has finished to `each`.
    ///
    /// # Errors
    /// As for [`Self::reap`].
    pub fn drain(&mut self, mut each: impl FnMut(Finished) -> Result<(), DeviceError>) -> Result<(), DeviceError> {
        while !self.is_idle() {
            match self.ring.submit_and_wait(1) {
                Ok(_) => self.reap(&mut each)?,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(DeviceError::host("wait for io_uring")(error)),
            }
        }
        Ok(())
    }

    fn completion(&mut self) -> Option<(u16, i32)> {
        let entry = self.ring.completion().next()?;
        // User data is always a slot's index, see `push`.
        Some((u16::try_from(entry.user_data()).ok()?, entry.result()))
    }

    fn push(&mut self, slot: u16) {
        let Some(in_flight) = &self.slots[usize::from(slot)] else {
            return;
        };
        let entry = in_flight.transfer.entry().user_data(u64::from(slot));
        // SAFETY: the entry points to iovecs on the heap, owned by the slot, and these to guest memory, of which the slot
        // holds a share. The slot is emptied only when the entry's completion is here (`reap`); `Drop` waits for it.
        let pushed = unsafe { self.ring.submission().push(&entry) };
        // There are as many entries in the submission ring as slots, and each slot is in it at most once.
        debug_assert!(pushed.is_ok(), "submission ring is full though a slot was free");
    }
}

impl AsRawFd for Engine {
    fn as_raw_fd(&self) -> RawFd {
        self.ring.as_raw_fd()
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        if self.drain(|_| Ok(())).is_err() {
            // The kernel may still write to these buffers: they must outlive this process's interest in them.
            std::mem::forget(std::mem::take(&mut self.slots));
        }
    }
}

impl Transfer {
    fn new(operation: &Operation, memory: &GuestMemory, durable: bool) -> Result<Self, GuestMemoryError> {
        let punch = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        let zero = libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE;
        Ok(match operation {
            Operation::Read { offset, buffer } => Self::Data {
                write: false,
                durable,
                offset: *offset,
                iovecs: buffer.iovecs(memory)?,
            },
            Operation::Write { offset, buffer } => Self::Data {
                write: true,
                durable,
                offset: *offset,
                iovecs: buffer.iovecs(memory)?,
            },
            Operation::Discard { offset, len } => Self::fallocate(*offset, *len, punch),
            Operation::WriteZeroes { offset, len, unmap } => {
                Self::fallocate(*offset, *len, if *unmap { punch } else { zero })
            }
            // The serial needs no I/O: the device answers before it comes here; then this is a harmless barrier.
            Operation::Flush | Operation::GetId { .. } => {
                Self::Other(Box::new(opcode::Fsync::new(FILE).flags(FsyncFlags::DATASYNC).build()))
            }
        })
    }

    fn fallocate(offset: u64, len: u64, mode: i32) -> Self {
        Self::Other(Box::new(
            opcode::Fallocate::new(FILE, len).offset(offset).mode(mode).build(),
        ))
    }

    fn entry(&self) -> Entry {
        match self {
            Self::Data {
                write,
                durable,
                offset,
                iovecs,
            } => {
                // GuestIovec is a transparent iovec.
                let first = iovecs.as_ptr().cast::<libc::iovec>();
                // A chain is no longer than its queue, and that is at most 2^15.
                let count = u32::try_from(iovecs.len()).unwrap_or(u32::MAX);
                if *write {
                    let flags = if *durable { libc::RWF_DSYNC } else { 0 };
                    opcode::Writev::new(FILE, first, count)
                        .offset(*offset)
                        .rw_flags(flags)
                        .build()
                } else {
                    opcode::Readv::new(FILE, first, count).offset(*offset).build()
                }
            }
            Self::Other(entry) => (**entry).clone(),
        }
    }

    /// Takes a completion's result. `None`: there is more to do.
    fn advance(&mut self, result: i32) -> Option<Status> {
        let retry = [-libc::EAGAIN, -libc::EINTR].contains(&result);
        match (self, usize::try_from(result)) {
            _ if retry => None,
            (Self::Data { offset, iovecs, .. }, Ok(done)) if done > 0 => {
                *offset = offset.saturating_add(done as u64);
                consume(iovecs, done);
                iovecs.is_empty().then_some(Status::Ok)
            }
            // The file ends before the disk does: it was cut short behind our back.
            (Self::Data { .. }, Ok(_)) => Some(Status::IoError),
            (Self::Other(_), Ok(_)) => Some(Status::Ok),
            (_, Err(_)) if [-libc::EOPNOTSUPP, -libc::ENOSYS].contains(&result) => Some(Status::Unsupported),
            (_, Err(_)) => Some(Status::IoError),
        }
    }
}

/// Drops the first `done` bytes of what the iovecs point to.
fn consume(iovecs: &mut Vec<GuestIovec>, mut done: usize) {
    let whole = iovecs
        .iter()
        .take_while(|iovec| {
            let fits = iovec.0.iov_len <= done;
            done -= if fits { iovec.0.iov_len } else { 0 };
            fits
        })
        .count();
    iovecs.drain(..whole);
    if let Some(first) = iovecs.first_mut() {
        first.0.iov_base = first.0.iov_base.wrapping_byte_add(done);
        first.0.iov_len -= done;
    }
}
