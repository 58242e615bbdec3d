//! The page server: one thread, one template, any number of sandboxes.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};

use flint_api::vmm::pages_served::Progress;
use flint_api::vmm::{PageRange, PagesServed, ServePages};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, SealFlag, fcntl};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use prost::Message;
use thiserror::Error;

use super::PageSource;
use super::uffd::Uffd;
use crate::control::packet::{self, Received};
use crate::memory::pages::PAGE;

/// What is filled at once: a chunk, as memory is stored.
pub const UNIT: u64 = 256 << 10;
const DOOR: u64 = 0;
/// A sandbox's tokens: twice its number for its socket, one more for its userfaultfd. Numbers begin with 1.
const FIRST: u64 = 1;

/// A server that cannot begin, or go on.
#[derive(Debug, Error)]
pub enum Error {
    /// The memfd.
    #[error("the memory file has {found} bytes, its source {expected}")]
    Size {
        /// The source's.
        expected: u64,
        /// The memfd's.
        found: u64,
    },
    /// The source.
    #[error("reading guest memory at {offset:#x} from its chunks")]
    Source {
        /// Where in the memory file.
        offset: u64,
        /// Why not.
        source: io::Error,
    },
    /// The host.
    #[error("{what}")]
    Host {
        /// What was being done.
        what: &'static str,
        /// What the host said.
        source: io::Error,
    },
}

fn host<E: Into<io::Error>>(what: &'static str) -> impl FnOnce(E) -> Error {
    move |error| Error::Host {
        what,
        source: error.into(),
    }
}

fn said(progress: Progress) -> PagesServed {
    PagesServed {
        progress: progress.into(),
        detail: String::new(),
    }
}

/// A sandbox that takes pages.
struct Client {
    socket: OwnedFd,
    memory: Option<(Uffd, Vec<PageRange>)>,
}

/// Fills a memfd for those who have mapped it.
pub struct Server {
    source: Box<dyn PageSource>,
    memory: File,
    /// Where sandboxes come in. None: no more can come.
    door: Option<OwnedFd>,
    epoll: Epoll,
    clients: BTreeMap<u64, Client>,
    next: u64,
    /// Which units are there.
    filled: Vec<bool>,
    /// The first one that may not be.
    behind: usize,
    buffer: Vec<u8>,
}

impl Server {
    /// A server for sandboxes whose connections come through `door`, a SOCK_SEQPACKET socket: one with each packet. `memory` is a
    /// memfd of the source's size that allows sealing; its last page is there when this returns.
    ///
    /// # Errors
    /// Sizes differ, the source cannot be read, or the host refuses.
    pub fn new(source: Box<dyn PageSource>, memory: File, door: OwnedFd) -> Result<Self, Error> {
        let (expected, found) = (
            source.size(),
            memory.metadata().map_err(host("looking at the memory file"))?.len(),
        );
        if expected != found || expected < PAGE {
            return Err(Error::Size { expected, found });
        }
        // Else somebody could cut it off under everybody's feet.
        let seals = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW;
        fcntl(&memory, FcntlArg::F_ADD_SEALS(seals)).map_err(host("sealing the size of the memory file"))?;
        never_wait(&door).map_err(host("preparing the socket that sandboxes come through"))?;
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).map_err(host("making an epoll"))?;
        epoll
            .add(&door, EpollEvent::new(EpollFlags::EPOLLIN, DOOR))
            .map_err(host("watching the socket that sandboxes come through"))?;
        let units = usize::try_from(expected.div_ceil(UNIT)).unwrap_or(usize::MAX);
        let mut server = Self {
            source,
            memory,
            door: Some(door),
            epoll,
            clients: BTreeMap::new(),
            next: FIRST,
            filled: vec![false; units],
            behind: 0,
            // A unit is a buffer's length.
            buffer: vec![0; usize::try_from(UNIT).unwrap_or(0)],
        };
        server.fill(units - 1)?;
        Ok(server)
    }

    /// Serves until no sandbox needs it and none can come any more: the other end of the door is closed.
    ///
    /// # Errors
    /// A page cannot be had, of which all sandboxes were told that still need the server; or the host fails.
    pub fn serve(mut self) -> Result<(), Error> {
        while self.door.is_some() || !self.clients.is_empty() {
            if let Err(error) = self.turn() {
                let detail = crate::control::commands::chain(&error);
                self.tell(&PagesServed {
                    progress: Progress::Failed.into(),
                    detail,
                });
                return Err(error);
            }
        }
        Ok(())
    }

    fn turn(&mut self) -> Result<(), Error> {
        let mut events = [EpollEvent::empty(); 16];
        let patience = if self.has_work() {
            EpollTimeout::ZERO
        } else {
            EpollTimeout::NONE
        };
        let count = match self.epoll.wait(&mut events, patience) {
            Err(Errno::EINTR) => 0,
            outcome => outcome.map_err(host("waiting for faults"))?,
        };
        for event in &events[..count] {
            match event.data() {
                DOOR => self.admit()?,
                token if token % 2 == 0 => self.hear(token / 2)?,
                token => self.faults(token / 2)?,
            }
        }
        // Who waits goes first.
        if count == 0 && self.has_work() {
            self.fill_next()
        } else {
            Ok(())
        }
    }

    /// Whether there is something to fill that nobody waits for: for a template that nobody uses, nothing is.
    fn has_work(&self) -> bool {
        !self.is_complete() && self.clients.values().any(|client| client.memory.is_some())
    }

    fn is_complete(&self) -> bool {
        self.behind >= self.filled.len()
    }

    fn fill_next(&mut self) -> Result<(), Error> {
        let next = self.filled[self.behind..].iter().position(|filled| !filled);
        let Some(next) = next.map(|more| self.behind + more) else {
            self.behind = self.filled.len();
            return self.complete();
        };
        self.behind = next;
        self.fill(next)
    }

    /// All is there: from here on it is a file in memory like any other, which nobody can change.
    fn complete(&mut self) -> Result<(), Error> {
        let seals = SealFlag::F_SEAL_WRITE | SealFlag::F_SEAL_SEAL;
        // The kernel refuses while somebody's I/O has hold of a page. Nobody else can write to it anyway: sandboxes have it
        // open for reading.
        let _ = fcntl(&self.memory, FcntlArg::F_ADD_SEALS(seals));
        self.tell(&said(Progress::Complete));
        // Those that have not said yet which pages are theirs are told when they do.
        let served = self.clients.iter().filter(|(_, client)| client.memory.is_some());
        for number in served.map(|(number, _)| *number).collect::<Vec<_>>() {
            self.remove(number);
        }
        Ok(())
    }

    fn tell(&self, message: &PagesServed) {
        let bytes = message.encode_to_vec();
        for client in self.clients.values().filter(|client| client.memory.is_some()) {
            // One that has gone, or does not listen, harms itself only.
            let _ = packet::send(client.socket.as_fd(), &bytes, &[]);
        }
    }

    /// Has a unit in the memfd: only its pages that are not zeros, whole and verified.
    fn fill(&mut self, unit: usize) -> Result<(), Error> {
        if self.filled[unit] {
            return Ok(());
        }
        let start = unit as u64 * UNIT;
        let length = usize::try_from(self.source.size().saturating_sub(start).min(UNIT)).unwrap_or(0);
        let data = &mut self.buffer[..length];
        let read = self.source.read_at(start, data);
        read.map_err(|source| Error::Source { offset: start, source })?;
        crate::memory::writer::put_pages(&self.memory, start, data).map_err(host("filling the memory file"))?;
        self.filled[unit] = true;
        Ok(())
    }

    /// Lets a sandbox in, or finds that no more will come.
    fn admit(&mut self) -> Result<(), Error> {
        let Some(door) = &self.door else { return Ok(()) };
        let fds = match packet::receive(door.as_fd()) {
            Ok(Received::Packet { fds, .. }) => fds,
            // Whoever holds the other end is who started this; what else it may say means nothing.
            Ok(Received::Oversized { .. }) => return Ok(()),
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {
                return Ok(());
            }
            Ok(Received::End) | Err(_) => {
                // Closed, it leaves the epoll.
                self.door = None;
                return Ok(());
            }
        };
        for socket in fds {
            never_wait(&socket).map_err(host("preparing a sandbox's connection"))?;
            let number = self.next;
            self.next += 1;
            self.epoll
                .add(&socket, EpollEvent::new(EpollFlags::EPOLLIN, 2 * number))
                .map_err(host("watching a sandbox"))?;
            self.clients.insert(number, Client { socket, memory: None });
        }
        Ok(())
    }

    /// A sandbox says which pages are its own, or has gone.
    fn hear(&mut self, number: u64) -> Result<(), Error> {
        let complete = self.is_complete();
        let Some(client) = self.clients.get_mut(&number) else {
            return Ok(());
        };
        let introduced = match packet::receive(client.socket.as_fd()) {
            Ok(Received::Packet { bytes, fds }) if client.memory.is_none() => introduce(&bytes, fds),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
            _ => None,
        };
        let Some((uffd, ranges)) = introduced else {
            self.remove(number);
            return Ok(());
        };
        let answer = said(if complete {
            Progress::Complete
        } else {
            Progress::Serving
        });
        self.epoll
            .add(&uffd, EpollEvent::new(EpollFlags::EPOLLIN, 2 * number + 1))
            .map_err(host("watching a sandbox's faults"))?;
        let told = packet::send(client.socket.as_fd(), &answer.encode_to_vec(), &[]);
        client.memory = Some((uffd, ranges));
        if complete || told.is_err() {
            self.remove(number);
        }
        Ok(())
    }

    fn remove(&mut self, number: u64) {
        if let Some((uffd, _)) = self.clients.remove(&number).and_then(|client| client.memory) {
            // The sandbox has it too, so that our closing it does not take it out of the epoll.
            let _ = self.epoll.delete(&uffd);
        }
    }

    fn faults(&mut self, number: u64) -> Result<(), Error> {
        while let Some((uffd, ranges)) = self.clients.get(&number).and_then(|client| client.memory.as_ref()) {
            let fault = uffd
                .next_fault()
                .map(|address| address.map(|address| (address, place(address, ranges))));
            match fault {
                Ok(None) => break,
                Ok(Some((address, Some(offset)))) => {
                    let unit = usize::try_from(offset / UNIT).unwrap_or(usize::MAX);
                    if unit >= self.filled.len() {
                        self.remove(number);
                        break;
                    }
                    self.fill(unit)?;
                    self.answer(number, address & !(PAGE - 1), offset & !(PAGE - 1));
                }
                // The sandbox has gone, or told of other ranges than it registered.
                Ok(Some((_, None))) | Err(_) => {
                    self.remove(number);
                }
            }
        }
        Ok(())
    }

    /// Wakes who waits for a page that is there now, or gets zeros.
    fn answer(&mut self, number: u64, address: u64, offset: u64) {
        let Some((uffd, _)) = self.clients.get(&number).and_then(|client| client.memory.as_ref()) else {
            return;
        };
        let zeros = !crate::memory::mapped::has_data(&self.memory, offset, offset + PAGE);
        let answered = match uffd {
            uffd if zeros => match uffd.zero(address, PAGE) {
                Err(error) if error.raw_os_error() == Some(libc::EEXIST) => uffd.wake(address, PAGE),
                outcome => outcome,
            },
            uffd => uffd.wake(address, PAGE),
        };
        if answered.is_err() {
            // Its process is ending, or the mapping is not what it said: the connection's end tells it.
            self.remove(number);
        }
    }
}

/// What a sandbox says of itself, if it makes sense.
fn introduce(bytes: &[u8], fds: Vec<OwnedFd>) -> Option<(Uffd, Vec<PageRange>)> {
    let ranges = ServePages::decode(bytes).ok()?.ranges;
    let sound = ranges.iter().all(|range| {
        let ends = [range.address, range.offset].map(|start| start.checked_add(range.length));
        ends.iter().all(Option::is_some) && (range.address | range.offset | range.length) % PAGE == 0
    });
    let uffd = Uffd::received(fds.into_iter().next()?).ok()?;
    never_wait(&uffd).ok()?;
    sound.then_some((uffd, ranges))
}

/// Has calls on a descriptor return at once.
fn never_wait(fd: impl AsFd) -> nix::Result<()> {
    let flags = OFlag::from_bits_retain(fcntl(&fd, FcntlArg::F_GETFL)?);
    fcntl(&fd, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK)).map(drop)
}

/// Where in the memory file an address is.
fn place(address: u64, ranges: &[PageRange]) -> Option<u64> {
    ranges.iter().find_map(|range| {
        let within = address
            .checked_sub(range.address)
            .filter(|within| *within < range.length)?;
        Some(range.offset + within)
    })
}
