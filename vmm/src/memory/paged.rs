//! Guest memory that a page server brings, page by page, while it is in use already (see `pages` for the server's side).
//!
//! The memory file is a memfd, mapped privately like any other; what is not in it yet is a fault that a userfaultfd tells the
//! server of. The thread that faults sleeps in the kernel until the page is there. So that nobody sleeps for ever, a thread of
//! its own, which never touches guest memory, listens to the server: if that says that a page cannot be had, or goes, it
//! ends the process then and there. This process keeps its userfaultfd open: with the last one closed, the kernel would
//! hand out zeros for pages that are missing.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use flint_api::vmm::pages_served::Progress;
use flint_api::vmm::{ExitReason, PageRange, PagesServed, ServePages};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use prost::Message;
use thiserror::Error;
use vm_memory::GuestMemoryRegion;

use super::file::Id;
use super::mapped::MappedFiles;
use super::pages::{PAGE, Pages};
use super::{GuestMemory, MemorySource, numbered};
use crate::control::packet::{self, Received};
use crate::exit::{Exit, end_now};
use crate::pages::uffd::{DEVICE, Uffd};

/// How long a server may take to answer that it knows of us: it does so between two pieces.
const PATIENCE: Duration = Duration::from_secs(10);
/// The watcher calls little, and nothing of the guest's runs on it.
const STACK_BYTES: usize = 64 << 10;

/// A page server that cannot be used.
#[derive(Debug, Error)]
pub enum Error {
    /// No way to hear of faults.
    #[error(
        "a machine whose memory comes from a page server needs {DEVICE} (Linux 6.1 or newer, and the right to open it)"
    )]
    NoDevice,
    /// Not reserved for it.
    #[error("the machine was not reserved as paged, or had a page server before")]
    NotPaged,
    /// The kernel.
    #[error("{what}")]
    Kernel {
        /// What was being done.
        what: &'static str,
        /// What it said.
        source: io::Error,
    },
    /// The server.
    #[error("the page server does not answer as it should: {0}")]
    Server(String),
}

fn kernel(what: &'static str) -> impl FnOnce(io::Error) -> Error {
    move |source| Error::Kernel { what, source }
}

/// A connection to a server, and what is to be left to the kernel when all is there.
struct Served {
    socket: OwnedFd,
    uffd: Uffd,
    ranges: Vec<PageRange>,
}

/// Whoever ends the process if the page server goes. Made before there is a server, because a confined process makes no threads.
pub struct Watcher {
    inbox: Sender<Served>,
}

impl Watcher {
    /// Starts its thread. `confine` runs first in it.
    ///
    /// # Errors
    /// The thread cannot be made.
    pub fn spawn(confine: impl FnOnce() -> io::Result<()> + Send + 'static) -> io::Result<Self> {
        let (inbox, served) = channel();
        let (ready, confined) = channel();
        thread::Builder::new()
            .name("pages".to_owned())
            .stack_size(STACK_BYTES)
            .spawn(move || {
                let outcome = confine();
                let failed = outcome.is_err();
                // Whoever waits for this waits until it is sent.
                let _ = ready.send(outcome);
                if !failed {
                    watch(&served);
                }
            })?;
        confined
            .recv()
            .unwrap_or_else(|_| Err(io::Error::other("the watcher's thread ended before it began")))?;
        Ok(Self { inbox })
    }
}

/// Listens to one server until it is not needed any more.
fn watch(inbox: &Receiver<Served>) {
    let Ok(Served { socket, uffd, ranges }) = inbox.recv() else {
        return;
    };
    let lost = |detail: String| end_now(&Exit::new(ExitReason::MemoryLost, detail));
    match next(&socket) {
        Ok(Some(said)) if said.progress() == Progress::Complete => {}
        Ok(Some(said)) => lost(format!("the page server: {}", said.detail)),
        Ok(None) => lost("the page server has gone, and not all of the guest's memory was there".to_owned()),
        Err(error) => lost(format!("listening to the page server: {error}")),
    }
    if let Err(error) = hand_over(&uffd, &ranges) {
        lost(format!("{HANDING_OVER}: {error}"));
    }
}

/// The server's next word. None: it has closed.
fn next(socket: &OwnedFd) -> io::Result<Option<PagesServed>> {
    loop {
        let mut ready = [PollFd::new(socket.as_fd(), PollFlags::POLLIN)];
        match poll(&mut ready, PollTimeout::NONE) {
            Err(nix::errno::Errno::EINTR) => continue,
            outcome => outcome?,
        };
        match packet::receive(socket.as_fd()) {
            Ok(Received::Packet { bytes, .. }) => return Ok(Some(PagesServed::decode(&bytes[..])?)),
            Ok(Received::Oversized { .. }) => return Err(io::ErrorKind::InvalidData.into()),
            Ok(Received::End) => return Ok(None),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
    }
}

/// A snapshot's memory, of which the full file is a memfd that a server fills.
pub struct PagedFiles {
    files: MappedFiles,
    /// Used once, and gone then: what is not watched by then never will be.
    setup: Mutex<Option<Setup>>,
}

struct Setup {
    device: File,
    socket: OwnedFd,
    inbox: Sender<Served>,
}

impl PagedFiles {
    /// Memory from `files`, the last of which the server behind `socket` fills.
    ///
    /// # Errors
    /// The host has no userfaultfd for us, or the machine is not watched.
    pub fn new(
        files: MappedFiles,
        socket: OwnedFd,
        device: Option<&File>,
        watcher: Option<&Watcher>,
    ) -> Result<Self, Error> {
        let inbox = watcher.ok_or(Error::NotPaged)?.inbox.clone();
        let device = device.ok_or(Error::NoDevice)?;
        let device = device.try_clone().map_err(kernel("sharing the userfaultfd device"))?;
        let setup = Some(Setup { device, socket, inbox });
        Ok(Self {
            files,
            setup: Mutex::new(setup),
        })
    }

    /// Has faults in all of guest memory told to the server.
    fn connect(&self, reserved: &GuestMemory) -> Result<(), Error> {
        let setup = self.setup.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Setup { device, socket, inbox } = setup.ok_or(Error::NotPaged)?;
        let uffd = Uffd::new(&device).map_err(kernel("making a userfaultfd"))?;
        let ranges = numbered(reserved).map(|(first, region)| PageRange {
            address: region.as_ptr() as u64,
            offset: first * PAGE,
            length: region.len(),
        });
        let ranges: Vec<_> = ranges.collect();
        for range in &ranges {
            let registered = uffd.register(range.address, range.length);
            registered.map_err(kernel("registering guest memory with the userfaultfd"))?;
        }
        let introduction = ServePages { ranges: ranges.clone() }.encode_to_vec();
        packet::send(socket.as_fd(), &introduction, &[uffd.as_fd()]).map_err(kernel("talking to the page server"))?;
        if answer(&socket)? == Progress::Complete {
            // The memory is the kernel's alone again, and there is nothing to be watched.
            return hand_over(&uffd, &ranges).map_err(kernel(HANDING_OVER));
        }
        // From here on a fault can wait for the server, so it is watched before anybody touches the memory.
        let served = Served { socket, uffd, ranges };
        inbox.send(served).map_err(|_| Error::NotPaged)
    }
}

const HANDING_OVER: &str = "taking guest memory over from the page server";

fn hand_over(uffd: &Uffd, ranges: &[PageRange]) -> io::Result<()> {
    let mut ranges = ranges.iter();
    ranges.try_for_each(|range| uffd.unregister(range.address, range.length))
}

fn answer(socket: &OwnedFd) -> Result<Progress, Error> {
    let mut ready = [PollFd::new(socket.as_fd(), PollFlags::POLLIN)];
    let patience = PollTimeout::try_from(PATIENCE).unwrap_or(PollTimeout::MAX);
    match poll(&mut ready, patience) {
        Ok(0) => return Err(Error::Server(format!("nothing came for {PATIENCE:?}"))),
        Ok(_) => {}
        Err(errno) => return Err(kernel("waiting for the page server")(errno.into())),
    }
    let said = next(socket).map_err(|error| Error::Server(error.to_string()))?;
    let said = said.ok_or_else(|| Error::Server("it has closed the connection".to_owned()))?;
    match said.progress() {
        progress @ (Progress::Serving | Progress::Complete) => Ok(progress),
        Progress::Failed | Progress::Unspecified => Err(Error::Server(said.detail)),
    }
}

impl MemorySource for PagedFiles {
    fn fill(&self, reserved: &GuestMemory) -> Result<(), super::Error> {
        self.files.map_base(reserved, true)?;
        self.connect(reserved)?;
        self.files.map_differences(reserved)
    }

    fn snapshots(&self) -> &[Id] {
        self.files.snapshots()
    }

    fn since(&self, base: &Id) -> Option<Pages> {
        self.files.since(base)
    }

    fn content(&self) -> Pages {
        // What is not there yet looks like zeros.
        self.files.all()
    }

    fn uses(&self, file: &File) -> io::Result<bool> {
        self.files.uses(file)
    }

    fn is_local(&self) -> bool {
        false
    }
}

/// A descriptor as a socket that never blocks.
///
/// # Errors
/// The kernel refuses.
pub fn nonblocking(socket: OwnedFd) -> io::Result<OwnedFd> {
    // SAFETY: F_GETFL and F_SETFL take and give numbers.
    let set = unsafe {
        let flags = libc::fcntl(socket.as_raw_fd(), libc::F_GETFL);
        libc::fcntl(socket.as_raw_fd(), libc::F_SETFL, flags | libc::O_NONBLOCK)
    };
    if set < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(socket)
    }
}
