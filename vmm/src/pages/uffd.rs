//! userfaultfd, as far as it is used here (Linux, Documentation/admin-guide/mm/userfaultfd.rst; linux/userfaultfd.h).
//!
//! Faults of KVM come from within the kernel, which an unprivileged userfaultfd(2) does not get. `/dev/userfaultfd` gives the
//! right to them to whoever may open it (Linux 6.1); it is opened before the jail, like `/dev/kvm`.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use crate::memory::pages::PAGE;

/// The device.
pub const DEVICE: &str = "/dev/userfaultfd";

const API: u64 = 0xaa;
const FEATURE_MISSING_SHMEM: u64 = 1 << 5;
const MODE_MISSING: u64 = 1 << 0;
const EVENT_PAGEFAULT: u8 = 0x12;

#[repr(C)]
#[derive(Default)]
struct ApiArgument {
    api: u64,
    features: u64,
    ioctls: u64,
}

#[repr(C)]
#[derive(Default)]
struct RangeArgument {
    start: u64,
    len: u64,
}

#[repr(C)]
#[derive(Default)]
struct RegisterArgument {
    range: RangeArgument,
    mode: u64,
    ioctls: u64,
}

#[repr(C)]
#[derive(Default)]
struct ZeroArgument {
    range: RangeArgument,
    mode: u64,
    zeroed: i64,
}

/// _IOC of linux/ioctl.h for type 0xaa: direction in bits 30 and 31, size from bit 16 on.
const fn request<T>(direction: u64, number: u64) -> u64 {
    direction << 30 | (size_of::<T>() as u64) << 16 | API << 8 | number
}

const READ: u64 = 2;
const READ_WRITE: u64 = 3;
const NEW: u64 = request::<()>(0, 0x00);
const SET_API: u64 = request::<ApiArgument>(READ_WRITE, 0x3f);
const REGISTER: u64 = request::<RegisterArgument>(READ_WRITE, 0x00);
const UNREGISTER: u64 = request::<RangeArgument>(READ, 0x01);
const WAKE: u64 = request::<RangeArgument>(READ, 0x02);
const ZERO: u64 = request::<ZeroArgument>(READ_WRITE, 0x04);

// As the kernel's header has them.
const _: () = assert!(SET_API == 0xc018_aa3f && REGISTER == 0xc020_aa00 && ZERO == 0xc020_aa04);
const _: () = assert!(UNREGISTER == 0x8010_aa01 && WAKE == 0x8010_aa02 && NEW == 0xaa00);

/// A message about a fault: 32 bytes, the event in the first, the address from the 17th on.
const MESSAGE: usize = 32;

/// An address that every process might use (it need not): above vm.mmap_min_addr.
const ANYWHERE: u64 = 1 << 30;

/// A userfaultfd.
#[derive(Debug)]
pub struct Uffd(File);

fn ioctl<T>(fd: BorrowedFd<'_>, request: u64, argument: &mut T) -> io::Result<()> {
    // SAFETY: each request is used with the type that it was made of, which the kernel reads, or writes, and keeps nothing of.
    let done = unsafe { libc::ioctl(fd.as_raw_fd(), request, std::ptr::from_mut(argument)) };
    if done < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

impl Uffd {
    /// One for this process's address space.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn new(device: &File) -> io::Result<Self> {
        // SAFETY: the argument is flags; the result is a new descriptor that is nobody's.
        let fd = unsafe {
            match libc::ioctl(device.as_raw_fd(), NEW, libc::O_CLOEXEC | libc::O_NONBLOCK) {
                fd if fd < 0 => return Err(io::Error::last_os_error()),
                fd => OwnedFd::from_raw_fd(fd),
            }
        };
        let mut argument = ApiArgument {
            api: API,
            features: FEATURE_MISSING_SHMEM,
            ioctls: 0,
        };
        ioctl(fd.as_fd(), SET_API, &mut argument)?;
        Ok(Self(fd.into()))
    }

    /// One that somebody else made, for the other's address space.
    ///
    /// # Errors
    /// It is something else.
    pub fn received(fd: OwnedFd) -> io::Result<Self> {
        let uffd = Self(fd.into());
        // Who is woken for nothing looks again, and nothing else knows this request.
        uffd.wake(ANYWHERE, PAGE)
            .map_err(|_| io::Error::other("the descriptor is no userfaultfd that faults can be answered by"))?;
        Ok(uffd)
    }

    /// Has faults in a range told to whoever reads from this.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn register(&self, start: u64, len: u64) -> io::Result<()> {
        let mut argument = RegisterArgument {
            range: RangeArgument { start, len },
            mode: MODE_MISSING,
            ioctls: 0,
        };
        ioctl(self.0.as_fd(), REGISTER, &mut argument)
    }

    /// Leaves a range to the kernel again, and wakes who waits there.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn unregister(&self, start: u64, len: u64) -> io::Result<()> {
        ioctl(self.0.as_fd(), UNREGISTER, &mut RangeArgument { start, len })
    }

    /// Has those who wait for a page in a range look again.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn wake(&self, start: u64, len: u64) -> io::Result<()> {
        ioctl(self.0.as_fd(), WAKE, &mut RangeArgument { start, len })
    }

    /// Puts the page of zeros to where nothing is, and wakes who waits there.
    ///
    /// # Errors
    /// The kernel refuses; `EEXIST` if something is there by now.
    pub fn zero(&self, start: u64, len: u64) -> io::Result<()> {
        let mut argument = ZeroArgument {
            range: RangeArgument { start, len },
            ..ZeroArgument::default()
        };
        ioctl(self.0.as_fd(), ZERO, &mut argument)
    }

    /// The address of the next fault; None if there is none.
    ///
    /// # Errors
    /// The process whose memory it is has gone.
    pub fn next_fault(&self) -> io::Result<Option<u64>> {
        let mut message = [0; MESSAGE];
        loop {
            match io::Read::read(&mut &self.0, &mut message) {
                Ok(MESSAGE) if message[0] == EVENT_PAGEFAULT => {
                    let address = message[16..]
                        .first_chunk()
                        .map_or(0, |bytes| u64::from_ne_bytes(*bytes));
                    return Ok(Some(address));
                }
                // No other event was asked for.
                Ok(_) => return Err(io::ErrorKind::InvalidData.into()),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }
}

impl AsFd for Uffd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
