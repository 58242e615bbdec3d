//! Who is asked for a chunk that an image lacks, and how long a read waits for it.
//!
//! ```text
//!              question sent, timer set        place came          read, verified
//!   Idle ----------------------------> Asked -----------> Found --------------------> Idle
//!     ^                                  |                  | other bytes there
//!     |                                  | refused, or      v
//!     +---- error of the guest's read ---+ the time is over: Lost
//! ```
//!
//! The request that misses the chunk goes back into the ring, and all behind it in this disk wait; the thread does not, so the device
//! can be paused, saved and reset meanwhile. A server that ends is nobody who answers: the next one is asked again.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::time::Duration;

use flint_api::vmm::{ChunkAnswer, ChunkPlace, ChunkWanted, chunk_answer};
use flint_snapshots::chunk::ChunkId;
use flint_snapshots::device::{FoundChunk, PackId, PackLocation};
use prost::Message;
use vmm_sys_util::timerfd::TimerFd;

use super::backend::ImageSource;
use crate::control::packet::{self, Received};
use crate::memory::paged::nonblocking;
use crate::virtio::core::Counters;

/// Packets that are taken from a server at once: one that sends without end keeps no thread.
const MAX_PACKETS: usize = 64;
/// Chunks that one read may miss. A request has some hundred pages at most; one that misses more gets nowhere, because what was found
/// for its beginning is forgotten before its end.
const MAX_MISSES: u32 = 1024;

/// A connection to a chunk server, and what is asked of it.
#[derive(Debug)]
pub struct Chunks {
    server: Option<OwnedFd>,
    timer: TimerFd,
    deadline: Duration,
    state: State,
    /// Since a read has gone well or failed.
    misses: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Idle,
    Asked(ChunkId),
    Found(ChunkId),
    Lost(ChunkId),
}

/// What a read does that misses a chunk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Miss {
    /// It is tried again later.
    Wait,
    /// It fails.
    Fail,
}

impl Chunks {
    /// Asks `server`, and waits so long for each chunk.
    ///
    /// # Errors
    /// When the process is out of file descriptors, or the socket is none.
    pub fn new(server: OwnedFd, deadline: Duration) -> io::Result<Self> {
        Ok(Self {
            server: Some(nonblocking(server)?),
            timer: TimerFd::new()?,
            deadline,
            state: State::Idle,
            misses: 0,
        })
    }

    pub(super) fn server(&self) -> Option<RawFd> {
        self.server.as_ref().map(AsRawFd::as_raw_fd)
    }

    pub(super) fn timer(&self) -> RawFd {
        self.timer.as_raw_fd()
    }

    /// Whether a question has no answer yet: no read is worth a try.
    pub(super) fn is_waiting(&self) -> bool {
        matches!(self.state, State::Asked(_))
    }

    /// Takes another server, and asks it what has no answer yet.
    pub(super) fn replace(&mut self, server: OwnedFd, counters: &Counters) -> io::Result<()> {
        self.server = Some(nonblocking(server)?);
        if let State::Asked(id) = self.state {
            self.send(id, counters);
        }
        Ok(())
    }

    /// A read misses `id`.
    pub(super) fn miss(&mut self, id: ChunkId, counters: &Counters) -> io::Result<Miss> {
        match self.state {
            State::Asked(_) => return Ok(Miss::Wait),
            // It was there a moment ago, and is not what it should be.
            State::Found(found) if found == id => {
                counters.bump("chunk_wrong");
                return Ok(self.fail());
            }
            State::Lost(lost) if lost == id => return Ok(self.fail()),
            _ if self.misses >= MAX_MISSES => return Ok(self.fail()),
            State::Idle | State::Found(_) | State::Lost(_) => {}
        }
        self.misses += 1;
        self.timer.reset(self.deadline, None)?;
        self.state = State::Asked(id);
        counters.bump("chunk_asked");
        self.send(id, counters);
        Ok(Miss::Wait)
    }

    /// A read has gone well: what is missed from here on is missed anew.
    pub(super) fn hit(&mut self) {
        self.state = State::Idle;
        self.misses = 0;
    }

    fn fail(&mut self) -> Miss {
        self.hit();
        Miss::Fail
    }

    fn send(&mut self, id: ChunkId, counters: &Counters) {
        let Some(server) = &self.server else { return };
        let question = ChunkWanted {
            id: id.as_bytes().to_vec(),
        };
        if packet::send(server.as_fd(), &question.encode_to_vec(), &[]).is_err() {
            // It has ended, or does not read what it is asked.
            counters.bump("chunk_server_lost");
            self.server = None;
        }
    }

    /// Takes what the server has sent. The socket is watched by its edges, so all of it, or as much as a good server ever sends.
    pub(super) fn receive(&mut self, source: &mut dyn ImageSource, counters: &Counters) {
        for _ in 0..MAX_PACKETS {
            let Some(server) = &self.server else { return };
            match packet::receive(server.as_fd()) {
                Ok(Received::Packet { bytes, fds }) => {
                    if self.take(&bytes, fds, source).is_none() {
                        counters.bump("chunk_bad_answer");
                    }
                }
                Ok(Received::Oversized { .. }) => counters.bump("chunk_bad_answer"),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Ok(Received::End) | Err(_) => {
                    counters.bump("chunk_server_lost");
                    self.server = None;
                    return;
                }
            }
        }
        counters.bump("chunk_server_lost");
        self.server = None;
    }

    /// None: it is no answer to what was asked last.
    fn take(&mut self, bytes: &[u8], fds: Vec<OwnedFd>, source: &mut dyn ImageSource) -> Option<()> {
        let answer = ChunkAnswer::decode(bytes).ok()?;
        let State::Asked(id) = self.state else { return None };
        let mut fds = fds.into_iter();
        if answer.id != id.as_bytes() {
            return None;
        }
        match (answer.result?, fds.next(), fds.next()) {
            (chunk_answer::Result::Place(place), Some(file), None) => {
                let chunk = FoundChunk {
                    file: file.into(),
                    location: location(&place),
                };
                self.state = match source.learn(id, chunk) {
                    Ok(()) => State::Found(id),
                    Err(_) => State::Lost(id),
                };
            }
            (chunk_answer::Result::Refused(_), None, None) => self.state = State::Lost(id),
            _ => return None,
        }
        self.stop_timer();
        Some(())
    }

    /// The time is over.
    pub(super) fn expire(&mut self, counters: &Counters) {
        self.stop_timer();
        if let State::Asked(id) = self.state {
            counters.bump("chunk_timed_out");
            self.state = State::Lost(id);
        }
    }

    /// Nobody waits any more.
    pub(super) fn forget(&mut self) {
        self.stop_timer();
        self.hit();
    }

    fn stop_timer(&mut self) {
        // Stopping the timer is what clears it without ever blocking; it can only fail for a bad descriptor.
        let _ = self.timer.clear();
    }
}

fn location(place: &ChunkPlace) -> PackLocation {
    PackLocation {
        pack: PackId(place.pack),
        offset: place.offset,
        stored_len: place.stored_length,
        raw_len: place.length,
    }
}
