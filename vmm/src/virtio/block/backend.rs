//! What lies behind a block slot: a raw file by io_uring, or an image that is verified and unpacked as it is read.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileTypeExt;

use flint_snapshots::chunk::ChunkId;
use flint_snapshots::device::{FoundChunk, ImageDevice, ReadError};

use super::chunks::Chunks;
use super::engine::{Engine, Ring};
use super::request::SECTOR_BYTES;
use crate::virtio::device::DeviceError;
use crate::virtio::rate_limit::{RateLimit, RateLimiter};

/// A read-only disk whose reads are calculated: chunks are fetched, verified and unpacked by the calling thread.
pub trait ImageSource: Send {
    /// Size in bytes.
    fn size(&self) -> u64;

    /// Fills `data` from byte `offset` on.
    ///
    /// # Errors
    /// When the contents cannot be had, or are not what they should be.
    fn read_at(&mut self, offset: u64, data: &mut [u8]) -> Result<(), ImageReadError>;

    /// Reads chunk `id` from there from now on.
    ///
    /// # Errors
    /// When there is no memory for that.
    fn learn(&mut self, id: ChunkId, chunk: FoundChunk) -> io::Result<()>;
}

/// Why an image could not be read.
#[derive(Debug, thiserror::Error)]
pub enum ImageReadError {
    /// A chunk is not there, or damaged: it may be had from elsewhere.
    #[error("chunk {0} is missing")]
    Missing(ChunkId),
    /// Nothing helps.
    #[error("reading an image")]
    Failed(#[source] io::Error),
}

impl From<ReadError> for ImageReadError {
    fn from(error: ReadError) -> Self {
        match error.missing_chunk() {
            Some(id) => Self::Missing(id),
            None => Self::Failed(io::Error::other(error)),
        }
    }
}

impl ImageSource for ImageDevice {
    fn size(&self) -> u64 {
        Self::size(self)
    }

    fn read_at(&mut self, offset: u64, data: &mut [u8]) -> Result<(), ImageReadError> {
        Ok(Self::read_at(self, offset, data)?)
    }

    fn learn(&mut self, id: ChunkId, chunk: FoundChunk) -> io::Result<()> {
        Self::learn(self, id, chunk)
    }
}

/// How reads and writes reach the data.
pub(super) enum Backend {
    Raw(Box<Engine>),
    Image {
        source: Box<dyn ImageSource>,
        bounce: Vec<u8>,
        /// Who has what it lacks; absent: nobody.
        chunks: Option<Chunks>,
    },
}

/// A disk to be bound to a slot.
pub struct BlockResource {
    pub(super) backend: Backend,
    pub(super) limiter: RateLimiter,
    pub(super) size: u64,
    pub(super) read_only: bool,
}

impl BlockResource {
    /// A regular file or block device. With `direct` the host's page cache is left aside, if the file allows that for
    /// sectors of 512 bytes.
    ///
    /// # Errors
    /// When it is neither, when its size is no multiple of 512 bytes, or when the host has no io_uring.
    pub fn raw_file(file: File, direct: bool, limit: RateLimit) -> Result<Self, DeviceError> {
        Self::raw_file_by(None, file, direct, limit)
    }

    /// The same by a ring that was made ahead, if there is one.
    ///
    /// # Errors
    /// As [`Self::raw_file`].
    pub fn raw_file_by(ring: Option<Ring>, file: File, direct: bool, limit: RateLimit) -> Result<Self, DeviceError> {
        let size = disk_size(&file)?;
        // SAFETY: F_GETFL only asks, and the descriptor is open.
        let flags = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GETFL) };
        if flags < 0 {
            return Err(DeviceError::host("read the disk file's flags")(
                io::Error::last_os_error(),
            ));
        }
        let read_only = flags & libc::O_ACCMODE == libc::O_RDONLY;
        if flags & libc::O_APPEND != 0 {
            return Err(DeviceError::Refused("the disk file is open for appending".to_owned()));
        }
        if direct && allows_direct(&file) {
            // SAFETY: F_SETFL changes this open file's flags and no memory.
            let set = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETFL, flags | libc::O_DIRECT) };
            if set < 0 {
                return Err(DeviceError::host("set O_DIRECT on the disk file")(
                    io::Error::last_os_error(),
                ));
            }
        }
        let engine = ring.map_or_else(Ring::new, Ok).and_then(|ring| Engine::new(ring, file));
        let engine = engine.map_err(DeviceError::host("set up io_uring for the disk"))?;
        Self::new(Backend::Raw(Box::new(engine)), size, read_only, limit)
    }

    /// An image: any [`ImageSource`], as [`ImageDevice::open`] makes one of a device table and its packs. `chunks` has what it lacks.
    ///
    /// # Errors
    /// When the process is out of file descriptors.
    pub fn image(source: Box<dyn ImageSource>, chunks: Option<Chunks>, limit: RateLimit) -> Result<Self, DeviceError> {
        // A last sector that is not whole cannot be seen through a block device.
        let size = source.size() / SECTOR_BYTES * SECTOR_BYTES;
        Self::new(
            Backend::Image {
                source,
                bounce: Vec::new(),
                chunks,
            },
            size,
            true,
            limit,
        )
    }

    fn new(backend: Backend, size: u64, read_only: bool, limit: RateLimit) -> Result<Self, DeviceError> {
        let limiter = RateLimiter::new(limit).map_err(DeviceError::host("make a timer for the rate limit"))?;
        Ok(Self {
            backend,
            limiter,
            size,
            read_only,
        })
    }
}

fn disk_size(mut file: &File) -> Result<u64, DeviceError> {
    let kind = file
        .metadata()
        .map_err(DeviceError::host("look at the disk file"))?
        .file_type();
    if !kind.is_file() && !kind.is_block_device() {
        return Err(DeviceError::Refused(
            "the disk is neither a regular file nor a block device".to_owned(),
        ));
    }
    // A block device's metadata has no length; its end has.
    let size = io::Seek::seek(&mut file, io::SeekFrom::End(0)).map_err(DeviceError::host("find the disk's end"))?;
    if !size.is_multiple_of(SECTOR_BYTES) {
        return Err(DeviceError::Refused(format!(
            "the disk's size, {size} bytes, is no multiple of 512"
        )));
    }
    Ok(size)
}

/// Whether direct I/O works with addresses and positions that are multiples of 512 (statx(2), STATX_DIOALIGN).
fn allows_direct(file: &File) -> bool {
    // SAFETY: statx is plain numbers, for which zero is a value.
    let mut stat: libc::statx = unsafe { std::mem::zeroed() };
    // SAFETY: the path is a valid empty string, and `stat` is ours and as large as the kernel expects.
    let result = unsafe {
        libc::statx(
            file.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            libc::STATX_DIOALIGN,
            &raw mut stat,
        )
    };
    let fits = |align: u32| (1..=512).contains(&align);
    result == 0
        && stat.stx_mask & libc::STATX_DIOALIGN != 0
        && fits(stat.stx_dio_mem_align)
        && fits(stat.stx_dio_offset_align)
}
