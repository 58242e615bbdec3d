//! Guest memory that comes page by page: the server's side, which runs in a jail of its own.
//!
//! ```text
//!   chunks (packs, verified) --> Server --fills--> memfd <--maps privately-- flint-vmm   (many of one template)
//!                                  ^ |                                          |
//!                                  | +---- wakes, by its userfaultfd -----------+
//!                                  +------ missing page ------------------------+
//! ```
//!
//! The memfd is the template's memory file, at first empty but for its last page. A clone maps it privately, so what is in it is
//! shared by all clones, and what a clone writes is its own. Who touches a page that is not there yet, guest or VMM, waits;
//! the server fills the piece that it is in, from [`PageSource`], and wakes it. A page that is there is found by the kernel, and the
//! server never hears of it: so one clone's pages are ready for the next. In between the server fills what nobody has asked
//! for yet; when all is there it seals the memfd, says so, and is not needed any more.
//!
//! `api/proto/flint/vmm/v1/vmm.proto` (`ServePages`) has the protocol. A VMM is not trusted: what it sends can harm itself only.

mod server;
pub mod uffd;

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use flint_snapshots::device::ImageDevice;

pub use self::server::{Error, Server, UNIT};

/// Where pages come from. What it gives is verified.
pub trait PageSource: Send {
    /// Bytes of the memory file.
    fn size(&self) -> u64;

    /// Fills `data` with what lies at `offset`, or fails: never with anything else.
    ///
    /// # Errors
    /// It cannot be had, or is damaged.
    fn read_at(&self, offset: u64, data: &mut [u8]) -> io::Result<()>;
}

impl PageSource for ImageDevice {
    fn size(&self) -> u64 {
        Self::size(self)
    }

    fn read_at(&self, offset: u64, data: &mut [u8]) -> io::Result<()> {
        Self::read_at(self, offset, data).map_err(io::Error::other)
    }
}

/// A memory file that was verified before: to have its pages in memory that does not depend on its disk.
impl PageSource for File {
    fn size(&self) -> u64 {
        self.metadata().map_or(0, |metadata| metadata.len())
    }

    fn read_at(&self, offset: u64, data: &mut [u8]) -> io::Result<()> {
        self.read_exact_at(data, offset)
    }
}
