//! One stream between a host program's unix socket and a port in the guest (virtio 1.3, 5.10.6.3 to 5.10.6.5).
//!
//! ```text
//!   host opens:   Requested --RESPONSE--> Established --SHUTDOWN both, all forwarded--> Closed
//!   guest opens:                          Established        RST at any time ---------> Closed
//!
//!   guest --Data--> [ backlog, at most `granted` bytes ] --> socket         credit that we give
//!   guest <--Data-- socket, read only as far as the guest has room          credit that the guest gives
//! ```
//!
//! The socket is watched edge-triggered: `readable` and `writable` hold until a call says that it would block.

use std::collections::VecDeque;
use std::io::{self, ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;

use super::packet::{Header, NO_RECEIVE, NO_SEND, Op};

/// Where a connection stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// The guest was asked and has not answered.
    Requested,
    /// Bytes may flow.
    Established,
    /// Over; what is left is to tell the guest, if it does not know.
    Closed,
}

/// What to send to the guest next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Outgoing {
    /// What it is.
    pub op: Op,
    /// Shutdown flags.
    pub flags: u32,
    /// Bytes of payload, in the buffer that was given.
    pub len: usize,
}

impl Outgoing {
    fn bare(op: Op) -> Option<Self> {
        Some(Self { op, flags: 0, len: 0 })
    }
}

/// The guest broke the protocol; the connection is reset.
#[derive(Debug, PartialEq, Eq)]
pub struct Violation;

/// A stream.
#[derive(Debug)]
pub struct Connection {
    stream: UnixStream,
    phase: Phase,
    /// Bytes that the guest may have on their way to us: our buffer size as it sees it.
    granted: u32,
    backlog: VecDeque<u8>,
    received: u32,
    forwarded: u32,
    forwarded_told: u32,
    peer_buffer: u32,
    peer_forwarded: u32,
    sent: u32,
    readable: bool,
    writable: bool,
    host_done: bool,
    host_gone: bool,
    end_forwarded: bool,
    guest_flags: u32,
    told_flags: u32,
    owes_opening: bool,
    owes_reset: bool,
    owes_credit: bool,
    asked_credit: bool,
    asks_credit: bool,
}

impl Connection {
    /// A stream that a host program opens: the guest is asked.
    pub fn requested(stream: UnixStream, granted: u32) -> Self {
        Self {
            stream,
            phase: Phase::Requested,
            granted,
            backlog: VecDeque::new(),
            received: 0,
            forwarded: 0,
            forwarded_told: 0,
            peer_buffer: 0,
            peer_forwarded: 0,
            sent: 0,
            readable: true,
            writable: true,
            host_done: false,
            host_gone: false,
            end_forwarded: false,
            guest_flags: 0,
            told_flags: 0,
            owes_opening: true,
            owes_reset: false,
            owes_credit: false,
            asked_credit: false,
            asks_credit: false,
        }
    }

    /// A stream that the guest opens, by the packet `request`: it is granted.
    pub fn accepted(stream: UnixStream, granted: u32, request: &Header) -> Self {
        Self {
            phase: Phase::Established,
            peer_buffer: request.buffer_size,
            peer_forwarded: request.forwarded,
            ..Self::requested(stream, granted)
        }
    }

    /// Bytes granted to the guest.
    pub fn granted(&self) -> u32 {
        self.granted
    }

    /// Bytes that the guest is told we have taken out of our buffer.
    pub fn tell_forwarded(&mut self) -> u32 {
        self.forwarded_told = self.forwarded;
        self.owes_credit = false;
        self.forwarded
    }

    /// Whether it is over and the guest knows.
    pub fn is_done(&self) -> bool {
        self.phase == Phase::Closed && !self.owes_reset
    }

    /// Whether [`Self::next`] may have something for the guest.
    pub fn has_news(&self) -> bool {
        self.owes_reset
            || self.phase != Phase::Closed
                && (self.owes_opening
                    || self.owes_credit
                    || self.asks_credit
                    || self.owed_flags() != 0
                    || self.can_read())
    }

    fn can_read(&self) -> bool {
        self.phase == Phase::Established
            && self.readable
            && !self.host_done
            && self.guest_flags & NO_RECEIVE == 0
            && self.peer_room() > 0
    }

    /// Room in the guest's buffer (5.10.6.3). A guest that lies about it gets no more than nothing.
    fn peer_room(&self) -> u32 {
        self.peer_buffer
            .saturating_sub(self.sent.wrapping_sub(self.peer_forwarded))
    }

    fn owed_flags(&self) -> u32 {
        let flags = match (self.host_done, self.host_gone) {
            (false, _) => 0,
            (true, false) => NO_SEND,
            (true, true) => NO_SEND | NO_RECEIVE,
        };
        flags & !self.told_flags
    }

    // ---- from the guest

    /// A packet for this connection. The caller has checked that `payload` is what the header announces.
    ///
    /// # Errors
    /// When it breaks the protocol. The connection is closed and owes the guest a reset.
    pub fn receive(&mut self, header: &Header, payload: &[u8], host_port: u32) -> Result<(), Violation> {
        self.peer_buffer = header.buffer_size;
        self.peer_forwarded = header.forwarded;
        if self.peer_room() > 0 {
            self.asked_credit = false;
        }
        let outcome = match (header.op, self.phase) {
            (Some(Op::Reset), _) => {
                self.close(false);
                Ok(())
            }
            (Some(Op::Response), Phase::Requested) => self.establish(host_port),
            (Some(Op::Data), Phase::Established) => self.receive_data(payload),
            (Some(Op::Shutdown), Phase::Established) => self.receive_shutdown(header.flags),
            (Some(Op::CreditUpdate), Phase::Established) => Ok(()),
            (Some(Op::CreditRequest), Phase::Established) => {
                self.owes_credit = true;
                Ok(())
            }
            // It crossed our own reset.
            (_, Phase::Closed) => Ok(()),
            _ => Err(Violation),
        };
        if outcome.is_err() {
            self.close(true);
        }
        outcome
    }

    fn establish(&mut self, host_port: u32) -> Result<(), Violation> {
        self.phase = Phase::Established;
        // The socket's buffer is empty yet: a line fits, or its other end is gone.
        let line = format!("OK {host_port}\n");
        if self.stream.write_all(line.as_bytes()).is_err() {
            self.close(true);
        }
        Ok(())
    }

    fn receive_data(&mut self, payload: &[u8]) -> Result<(), Violation> {
        let len = u32::try_from(payload.len()).map_err(|_| Violation)?;
        let waiting = self.received.wrapping_sub(self.forwarded);
        // What waits is at most what was granted, so this does not underflow: it is what keeps it true.
        if self.guest_flags & NO_SEND != 0 || len > self.granted - waiting {
            return Err(Violation);
        }
        self.received = self.received.wrapping_add(len);
        let done = if self.backlog.is_empty() {
            self.write(payload)
        } else {
            0
        };
        self.backlog.extend(&payload[done..]);
        Ok(())
    }

    fn receive_shutdown(&mut self, flags: u32) -> Result<(), Violation> {
        self.guest_flags |= flags & (NO_RECEIVE | NO_SEND);
        if self.guest_flags & NO_RECEIVE != 0 {
            // A host program that has gone already is no news.
            let _ = self.stream.shutdown(Shutdown::Read);
        }
        self.finish_sending();
        Ok(())
    }

    /// Once all that the guest sent has reached the socket, the end of it does too.
    fn finish_sending(&mut self) {
        if self.guest_flags & NO_SEND == 0 || !self.backlog.is_empty() || self.phase != Phase::Established {
            return;
        }
        // Once only: every shutdown of a unix socket is an event on that socket, and would bring us here again.
        if !std::mem::replace(&mut self.end_forwarded, true) {
            let _ = self.stream.shutdown(Shutdown::Write);
        }
        if self.guest_flags & NO_RECEIVE != 0 {
            // Both ways are shut: a reset is the answer (5.10.6.5).
            self.close(true);
        }
    }

    /// Ends it from our side.
    pub fn close(&mut self, tell: bool) {
        self.phase = Phase::Closed;
        self.owes_reset = tell;
        self.backlog = VecDeque::new();
        let _ = self.stream.shutdown(Shutdown::Both);
    }

    // ---- from the socket

    /// The socket has something, has room, or has lost its other end.
    pub fn socket_event(&mut self, readable: bool, writable: bool, gone: bool) {
        self.readable |= readable || gone;
        self.writable |= writable || gone;
        self.host_gone |= gone;
        if self.phase == Phase::Requested && self.readable && self.has_hung_up() {
            // Nobody waits for the guest's answer any more.
            self.close(true);
        }
        self.flush();
    }

    fn has_hung_up(&self) -> bool {
        let mut byte = 0_u8;
        // SAFETY: the descriptor is open and the buffer is one byte that we own.
        let result = unsafe {
            libc::recv(
                std::os::fd::AsRawFd::as_raw_fd(&self.stream),
                (&raw mut byte).cast(),
                1,
                libc::MSG_PEEK | libc::MSG_DONTWAIT,
            )
        };
        result == 0
    }

    fn flush(&mut self) {
        while self.writable && !self.backlog.is_empty() && self.phase == Phase::Established {
            let mut backlog = std::mem::take(&mut self.backlog);
            let done = self.write(backlog.as_slices().0);
            // A write that failed has closed the connection, and then nothing is kept.
            if self.phase == Phase::Established {
                backlog.drain(..done);
                self.backlog = backlog;
            }
        }
        if self.backlog.is_empty() {
            // A flood's buffer is not kept for a trickle.
            self.backlog.shrink_to(0);
            self.finish_sending();
        }
    }

    /// Writes what the socket takes; what it took counts as forwarded.
    fn write(&mut self, bytes: &[u8]) -> usize {
        let mut done = 0;
        while done < bytes.len() && self.writable {
            match self.stream.write(&bytes[done..]) {
                Ok(count) => done += count,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => self.writable = false,
                Err(_) => {
                    self.close(true);
                    return bytes.len();
                }
            }
        }
        // At most what the guest sent, which was counted in 32 bits.
        self.forwarded = self.forwarded.wrapping_add(u32::try_from(done).unwrap_or(u32::MAX));
        if self.forwarded.wrapping_sub(self.forwarded_told) >= self.granted / 2 {
            self.owes_credit = true;
        }
        done
    }

    // ---- to the guest

    /// The next packet for the guest; its payload goes into `buffer`.
    pub fn next(&mut self, buffer: &mut [u8]) -> Option<Outgoing> {
        if std::mem::take(&mut self.owes_reset) {
            return Outgoing::bare(Op::Reset);
        }
        if self.phase == Phase::Closed {
            return None;
        }
        if std::mem::take(&mut self.owes_opening) {
            return Outgoing::bare(if self.phase == Phase::Requested {
                Op::Request
            } else {
                Op::Response
            });
        }
        if let Some(len) = self.read(buffer) {
            return Some(Outgoing {
                op: Op::Data,
                flags: 0,
                len,
            });
        }
        let flags = self.owed_flags();
        if flags != 0 {
            self.told_flags |= flags;
            return Some(Outgoing {
                op: Op::Shutdown,
                flags,
                len: 0,
            });
        }
        if std::mem::take(&mut self.asks_credit) {
            return Outgoing::bare(Op::CreditRequest);
        }
        std::mem::take(&mut self.owes_credit).then_some(Outgoing {
            op: Op::CreditUpdate,
            flags: 0,
            len: 0,
        })
    }

    fn read(&mut self, buffer: &mut [u8]) -> Option<usize> {
        if !self.can_read() {
            return None;
        }
        let room = usize::try_from(self.peer_room())
            .unwrap_or(usize::MAX)
            .min(buffer.len());
        loop {
            match self.stream.read(&mut buffer[..room]) {
                Ok(0) => self.host_done = true,
                Ok(count) => {
                    // At most `peer_room`, which is 32 bits wide.
                    self.sent = self.sent.wrapping_add(u32::try_from(count).unwrap_or(u32::MAX));
                    self.asks_credit = self.peer_room() == 0 && !std::mem::replace(&mut self.asked_credit, true);
                    return Some(count);
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                Err(error) if error.kind() == ErrorKind::WouldBlock => self.readable = false,
                // The other end went without reading all: as good as its end.
                Err(_) => self.host_done = true,
            }
            return None;
        }
    }
}

impl std::os::fd::AsRawFd for Connection {
    fn as_raw_fd(&self) -> i32 {
        self.stream.as_raw_fd()
    }
}

/// A host program that has not said yet which port it wants.
#[derive(Debug)]
pub struct Caller(UnixStream);

/// "CONNECT 4294967295\n" and some room for spaces.
const LINE_BYTES: usize = 32;

impl Caller {
    /// From the listening socket.
    ///
    /// # Errors
    /// When the socket cannot be made non-blocking.
    pub fn new(stream: UnixStream) -> io::Result<Self> {
        stream.set_nonblocking(true)?;
        Ok(Self(stream))
    }

    /// Looks for the line `CONNECT <port>\n`, and takes no byte beyond it: what follows is the stream's. `None`: not all of
    /// it is there yet.
    ///
    /// # Errors
    /// When it says something else, or goes.
    pub fn port(&mut self) -> io::Result<Option<u32>> {
        let mut line = [0; LINE_BYTES];
        // SAFETY: the descriptor is open and the buffer is ours and as long as we say.
        let peeked = unsafe {
            libc::recv(
                std::os::fd::AsRawFd::as_raw_fd(&self.0),
                line.as_mut_ptr().cast(),
                line.len(),
                libc::MSG_PEEK | libc::MSG_DONTWAIT,
            )
        };
        let Ok(peeked) = usize::try_from(peeked) else {
            let error = io::Error::last_os_error();
            return if error.kind() == ErrorKind::WouldBlock {
                Ok(None)
            } else {
                Err(error)
            };
        };
        let Some(end) = line[..peeked].iter().position(|byte| *byte == b'\n') else {
            let hopeless = peeked == 0 || peeked == line.len();
            return if hopeless {
                Err(ErrorKind::InvalidData.into())
            } else {
                Ok(None)
            };
        };
        self.0.read_exact(&mut line[..=end])?;
        let text = std::str::from_utf8(&line[..end]).map_err(|_| ErrorKind::InvalidData)?;
        let port = text.strip_prefix("CONNECT ").and_then(|port| port.trim().parse().ok());
        port.map(Some).ok_or_else(|| ErrorKind::InvalidData.into())
    }

    /// The stream behind the line.
    pub fn into_stream(self) -> UnixStream {
        self.0
    }
}

impl std::os::fd::AsRawFd for Caller {
    fn as_raw_fd(&self) -> i32 {
        self.0.as_raw_fd()
    }
}

#[cfg(test)]
#[path = "connection_tests.rs"]
mod tests;
