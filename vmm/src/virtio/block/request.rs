//! One block request as types: chain -> [`Parsed`] -> [`Pending`] -> [`Finished`].
//!
//! ```text
//!   Chain --parse--> Parsed { pending, command } --admit(disk)--> Pending + Operation --I/O--> finish(status) --> Finished
//!                                                        \--refused: status-----------------------/
//! ```
//!
//! The header is read once. Whatever the guest does to it later changes nothing (virtio 1.3, 5.2.6).

use virtio_bindings::virtio_blk as blk;
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use crate::memory::GuestMemoryMmap;
use crate::virtio::chain::{Chain, GuestBuffer};

/// Unit of all positions in requests (virtio 1.3, 5.2.4).
pub const SECTOR_BYTES: u64 = 512;
const SECTOR_SHIFT: u32 = 9;
const HEADER_BYTES: usize = 16;
/// struct virtio_blk_discard_write_zeroes.
const RANGE_BYTES: usize = 16;
/// Longest range of one discard or write-zeroes request: 2 GiB in sectors.
pub const MAX_RANGE_SECTORS: u32 = 1 << 22;

/// Status byte of a request (virtio 1.3, 5.2.6).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Status {
    /// VIRTIO_BLK_S_OK.
    Ok,
    /// VIRTIO_BLK_S_IOERR.
    IoError,
    /// VIRTIO_BLK_S_UNSUPP.
    Unsupported,
}

impl Status {
    fn byte(self) -> u8 {
        match self {
            Self::Ok => 0,
            Self::IoError => 1,
            Self::Unsupported => 2,
        }
    }
}

/// A request that waits for its end: where its status goes and which chain it is.
#[derive(Debug, PartialEq, Eq)]
pub struct Pending {
    /// Index of the queue that it came by.
    pub queue: usize,
    /// First descriptor of its chain.
    pub head: u16,
    status: GuestAddress,
    /// Bytes that the device writes if all goes well, the status left aside.
    data_len: u32,
}

/// A request that has ended: what goes into the used ring.
#[derive(Debug, PartialEq, Eq)]
pub struct Finished {
    /// Index of the queue that it came by.
    pub queue: usize,
    /// First descriptor of its chain.
    pub head: u16,
    /// Bytes written into the chain.
    pub len: u32,
}

impl Pending {
    /// Writes the status.
    ///
    /// # Errors
    /// When guest memory fails, which it does not: the place was checked.
    pub fn finish(self, memory: &GuestMemoryMmap, status: Status) -> Result<Finished, GuestMemoryError> {
        memory.write_obj(status.byte(), self.status)?;
        let data = if status == Status::Ok { self.data_len } else { 0 };
        Ok(Finished {
            queue: self.queue,
            head: self.head,
            len: data.saturating_add(1),
        })
    }
}

/// A request as its header says it.
#[derive(Debug, PartialEq, Eq)]
pub struct Parsed {
    pending: Pending,
    command: Command,
}

#[derive(Debug, PartialEq, Eq)]
enum Command {
    In { sector: u64, buffer: GuestBuffer },
    Out { sector: u64, buffer: GuestBuffer },
    Flush,
    GetId { buffer: GuestBuffer },
    Discard(Range),
    WriteZeroes(Range),
    Malformed,
    Unknown,
}

#[derive(Debug, PartialEq, Eq)]
struct Range {
    sector: u64,
    sectors: u32,
    flags: u32,
}

/// What to do for a request. All positions lie on the disk.
#[derive(Debug, PartialEq, Eq)]
pub enum Operation {
    /// Disk to guest.
    Read {
        /// First byte on the disk.
        offset: u64,
        /// Where it goes.
        buffer: GuestBuffer,
    },
    /// Guest to disk.
    Write {
        /// First byte on the disk.
        offset: u64,
        /// Where it is.
        buffer: GuestBuffer,
    },
    /// What was written must last.
    Flush,
    /// The serial is asked for.
    GetId {
        /// Where it goes.
        buffer: GuestBuffer,
    },
    /// The range may lose its contents.
    Discard {
        /// First byte on the disk.
        offset: u64,
        /// Length in bytes.
        len: u64,
    },
    /// The range reads as zero from now on.
    WriteZeroes {
        /// First byte on the disk.
        offset: u64,
        /// Length in bytes.
        len: u64,
        /// It need not stay allocated.
        unmap: bool,
    },
}

impl Operation {
    /// Bytes that move, for rate limits.
    pub fn bytes(&self) -> u64 {
        match self {
            Self::Read { buffer, .. } | Self::Write { buffer, .. } => buffer.len(),
            Self::Flush | Self::GetId { .. } | Self::Discard { .. } | Self::WriteZeroes { .. } => 0,
        }
    }
}

/// What a request is checked against.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Disk {
    /// Size in bytes.
    pub size: u64,
    /// Nothing may be written.
    pub read_only: bool,
    /// Features that the driver took, beside read-only.
    pub features: u64,
}

impl Parsed {
    /// Reads a request's header. `None`: there is no room for the status, so nothing can be said to the driver.
    ///
    /// # Errors
    /// When guest memory fails.
    pub fn parse(queue: usize, chain: Chain, memory: &GuestMemoryMmap) -> Result<Option<Self>, GuestMemoryError> {
        let Chain {
            head,
            mut readable,
            mut writable,
        } = chain;
        // Descriptors may be cut anywhere (2.7.4): the status is the last byte, wherever it lies.
        let Some(data_len) = writable.len().checked_sub(1) else {
            return Ok(None);
        };
        let status = writable.split_off(data_len);
        let (Some(status), Ok(data_len)) = (status.segments().first(), u32::try_from(data_len)) else {
            return Ok(None);
        };
        let pending = Pending {
            queue,
            head,
            status: status.addr,
            data_len,
        };
        let mut header = [0; HEADER_BYTES];
        if !readable.take_front(memory, &mut header)? {
            return Ok(Some(Self {
                pending,
                command: Command::Malformed,
            }));
        }
        let command = Command::parse(&header, readable, writable, memory)?;
        Ok(Some(Self { pending, command }))
    }

    /// Checks a request against the disk.
    ///
    /// # Errors
    /// With the status to be told to the driver.
    pub fn admit(self, disk: &Disk) -> Result<(Pending, Operation), (Pending, Status)> {
        match self.command.admit(disk) {
            Ok(operation) => Ok((self.pending, operation)),
            Err(status) => Err((self.pending, status)),
        }
    }
}

impl Command {
    fn parse(
        header: &[u8; HEADER_BYTES],
        readable: GuestBuffer,
        writable: GuestBuffer,
        memory: &GuestMemoryMmap,
    ) -> Result<Self, GuestMemoryError> {
        // struct virtio_blk_req: le32 type, le32 reserved, le64 sector.
        let [t0, t1, t2, t3, _, _, _, _, sector @ ..] = *header;
        let (kind, sector) = (u32::from_le_bytes([t0, t1, t2, t3]), u64::from_le_bytes(sector));
        Ok(match kind {
            blk::VIRTIO_BLK_T_IN if readable.is_empty() => Self::In {
                sector,
                buffer: writable,
            },
            blk::VIRTIO_BLK_T_OUT if writable.is_empty() => Self::Out {
                sector,
                buffer: readable,
            },
            blk::VIRTIO_BLK_T_FLUSH => Self::Flush,
            blk::VIRTIO_BLK_T_GET_ID if readable.is_empty() => Self::GetId { buffer: writable },
            blk::VIRTIO_BLK_T_DISCARD => Range::parse(readable, memory)?.map_or(Self::Malformed, Self::Discard),
            blk::VIRTIO_BLK_T_WRITE_ZEROES => {
                Range::parse(readable, memory)?.map_or(Self::Malformed, Self::WriteZeroes)
            }
            blk::VIRTIO_BLK_T_IN | blk::VIRTIO_BLK_T_OUT | blk::VIRTIO_BLK_T_GET_ID => Self::Malformed,
            _ => Self::Unknown,
        })
    }

    fn admit(self, disk: &Disk) -> Result<Operation, Status> {
        match self {
            Self::In { sector, buffer } => Ok(Operation::Read {
                offset: disk.check(sector, buffer.len())?,
                buffer,
            }),
            Self::Out { sector, buffer } => {
                disk.check_writable()?;
                Ok(Operation::Write {
                    offset: disk.check(sector, buffer.len())?,
                    buffer,
                })
            }
            Self::Flush => Ok(Operation::Flush),
            Self::GetId { buffer } => Ok(Operation::GetId { buffer }),
            Self::Discard(range) => {
                disk.check_feature(blk::VIRTIO_BLK_F_DISCARD)?;
                // "unmap" is for write-zeroes only (5.2.6.2).
                let (offset, len) = range.check(disk, 0)?;
                Ok(Operation::Discard { offset, len })
            }
            Self::WriteZeroes(range) => {
                disk.check_feature(blk::VIRTIO_BLK_F_WRITE_ZEROES)?;
                let unmap = range.flags & blk::VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0;
                let (offset, len) = range.check(disk, blk::VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP)?;
                Ok(Operation::WriteZeroes { offset, len, unmap })
            }
            Self::Malformed => Err(Status::IoError),
            Self::Unknown => Err(Status::Unsupported),
        }
    }
}

impl Range {
    /// Exactly one: more are not offered (max_discard_seg, max_write_zeroes_seg).
    fn parse(mut readable: GuestBuffer, memory: &GuestMemoryMmap) -> Result<Option<Self>, GuestMemoryError> {
        let mut bytes = [0; RANGE_BYTES];
        if !readable.take_front(memory, &mut bytes)? || !readable.is_empty() {
            return Ok(None);
        }
        let [s0, s1, s2, s3, s4, s5, s6, s7, n0, n1, n2, n3, flags @ ..] = bytes;
        Ok(Some(Self {
            sector: u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]),
            sectors: u32::from_le_bytes([n0, n1, n2, n3]),
            flags: u32::from_le_bytes(flags),
        }))
    }

    fn check(&self, disk: &Disk, flags: u32) -> Result<(u64, u64), Status> {
        disk.check_writable()?;
        if self.flags & !flags != 0 {
            return Err(Status::Unsupported);
        }
        if self.sectors == 0 || self.sectors > MAX_RANGE_SECTORS {
            return Err(Status::IoError);
        }
        let len = u64::from(self.sectors) << SECTOR_SHIFT;
        Ok((disk.check(self.sector, len)?, len))
    }
}

impl Disk {
    /// The byte at which `len` bytes from `sector` on begin, if they lie on the disk and are whole sectors.
    fn check(&self, sector: u64, len: u64) -> Result<u64, Status> {
        let offset = sector.checked_mul(SECTOR_BYTES).ok_or(Status::IoError)?;
        let end = offset.checked_add(len).ok_or(Status::IoError)?;
        let whole = len > 0 && len.is_multiple_of(SECTOR_BYTES);
        if whole && end <= self.size {
            Ok(offset)
        } else {
            Err(Status::IoError)
        }
    }

    fn check_writable(&self) -> Result<(), Status> {
        if self.read_only { Err(Status::IoError) } else { Ok(()) }
    }

    fn check_feature(&self, bit: u32) -> Result<(), Status> {
        if self.features & crate::virtio::feature(bit) == 0 {
            Err(Status::Unsupported)
        } else {
            Ok(())
        }
    }
}
