//! virtio-vsock (virtio 1.3, 5.10) in user space: the host's ends of the guest's streams are unix sockets.
//!
//! - A host program connects to the bound listening socket, writes `CONNECT <port>\n`, reads `OK <host port>\n`, and then
//!   has a stream to that port of the guest.
//! - A guest program connects to (CID 2, port): one end of a socket pair goes out by [`Dialer`]; if nobody takes it, the
//!   guest gets a reset.
//!
//! Host memory is bounded: a few hundred streams ([`streams`]) share 2 MiB, of which each is granted its part when it begins; a guest that sends more than granted is reset. Answers to packets for no connection are bounded too.
//!
//! Streams are not saved. A restored device tells its driver by a transport reset event (5.10.6.7), which ends them.
//!
//! System calls of the thread, beside those of every device thread: `accept4`, `socketpair`, `ioctl(FIONBIO)`, `recvfrom`,
//! `sendto`, `shutdown`, and what the [`Dialer`] makes.

mod connection;
mod packet;
mod streams;
#[cfg(test)]
mod tests;

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;

use virtio_bindings::virtio_ids::VIRTIO_ID_VSOCK;
use vmm_sys_util::epoll::EventSet;

use self::connection::{Caller, Connection};
use self::packet::{HEADER_BYTES, HOST_CID, Header, Op, STREAM};
use self::streams::{MAX_GRANT, Ports, Streams};
use super::chain::Chain;
use super::core::Core;
use super::device::{Activation, Device, DeviceError, Guest, GuestState};
use super::worker::{DEVICE_TOKENS, ThreadKind};
use crate::memory::GuestMemory;

const QUEUE_SIZE: u16 = 128;
const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;
const EVENT: usize = 2;

/// Resets that wait for room in the receive queue, beyond which a guest that asks for them gets none.
const MAX_RESETS: usize = 64;

const TOKEN_LISTENER: u64 = DEVICE_TOKENS;

/// The host's end of a stream that the guest opened towards a port of the host.
#[derive(Debug)]
pub struct Dial {
    /// Which port.
    pub port: u32,
    /// A connected unix stream socket.
    pub fd: OwnedFd,
}

/// Takes streams that the guest opens.
pub trait Dialer: Send {
    /// Hands a stream on. It must not block: the device's thread calls it.
    ///
    /// # Errors
    /// When nobody takes it; the guest's attempt is refused.
    fn dial(&mut self, dial: Dial) -> io::Result<()>;
}

/// What is bound to a vsock slot.
pub struct VsockResource {
    /// Where host programs connect.
    pub listener: UnixListener,
    /// Who takes what the guest opens.
    pub dialer: Box<dyn Dialer>,
}

// ---- state

/// A vsock device.
pub struct Vsock {
    core: Arc<Core>,
    guest_cid: u64,
    bound: Option<VsockResource>,
    guest: Option<Guest>,
    streams: Streams,
    announce_reset: bool,
}

/// What is saved of a vsock device. Its streams are not: their other ends belong to host programs.
#[derive(Clone, PartialEq, prost::Message)]
pub struct VsockState {
    /// The driver's side.
    #[prost(message, optional, tag = "1")]
    pub guest: Option<GuestState>,
}

impl Vsock {
    /// An unbound device.
    ///
    /// # Errors
    /// When the context id is reserved, or the process is out of file descriptors.
    pub fn new(guest_cid: u64) -> Result<Self, DeviceError> {
        // 0 to 2 are reserved, and so is what has its upper half set (5.10.4).
        if guest_cid <= HOST_CID || guest_cid >= u64::from(u32::MAX) {
            return Err(DeviceError::Refused(format!(
                "guest CID {guest_cid} is not from 3 to 4294967294"
            )));
        }
        let core = Core::new(3, guest_cid.to_le_bytes().to_vec()).map_err(DeviceError::host("make eventfds"))?;
        let streams = Streams::default();
        Ok(Self {
            core: Arc::new(core),
            guest_cid,
            bound: None,
            guest: None,
            streams,
            announce_reset: false,
        })
    }
}

// ---- process: guest to host

impl Vsock {
    fn process_transmit(&mut self) -> Result<(), DeviceError> {
        // The queue leaves the device for the time, so that packets can be handled meanwhile.
        let Some(mut queue) = self.take_queue(TRANSMIT) else {
            return Ok(());
        };
        queue.begin()?;
        while let Some(chain) = queue.next_chain()? {
            let head = chain.head;
            self.transmit(chain)?;
            queue.push(head, 0)?;
        }
        queue.end()?;
        queue.signal()?;
        self.put_queue(TRANSMIT, queue);
        self.process_receive()
    }

    fn take_queue(&mut self, index: usize) -> Option<super::queue::VirtQueue> {
        self.guest.as_mut()?.queues.get_mut(index)?.take()
    }

    fn put_queue(&mut self, index: usize, queue: super::queue::VirtQueue) {
        if let Some(place) = self.guest.as_mut().and_then(|guest| guest.queues.get_mut(index)) {
            *place = Some(queue);
        }
    }

    fn transmit(&mut self, chain: Chain) -> Result<(), DeviceError> {
        let Some(memory) = self.guest.as_ref().map(|guest| guest.memory.clone()) else {
            return Ok(());
        };
        let mut readable = chain.readable;
        let mut header = [0; HEADER_BYTES];
        if !readable.take_front(&memory, &mut header)? {
            self.core.counters.bump("bad_packet");
            return Ok(());
        }
        let header = Header::parse(&header);
        let fits = u64::from(header.len) <= readable.len() && header.len <= MAX_GRANT;
        if header.source_cid != self.guest_cid || header.destination_cid != HOST_CID || !fits {
            self.core.counters.bump("bad_packet");
            return Ok(());
        }
        let mut payload = std::mem::take(&mut self.streams.scratch);
        // At most MAX_GRANT.
        payload.resize(usize::try_from(header.len).unwrap_or(0), 0);
        readable.read_at(&memory, 0, &mut payload)?;
        self.handle(&header, &payload);
        self.streams.scratch = payload;
        Ok(())
    }

    fn handle(&mut self, header: &Header, payload: &[u8]) {
        let ports = (header.destination_port, header.source_port);
        if header.kind == STREAM
            && let Some((_, connection)) = self.streams.connections.get_mut(&ports)
        {
            if connection.receive(header, payload, ports.0).is_err() {
                self.core.counters.bump("protocol_violation");
            }
            return self.streams.settle(ports);
        }
        let accepted = header.kind == STREAM && header.op == Some(Op::Request) && self.accept_guest(ports, header);
        // A reset for what is not there needs no answer.
        if !accepted && header.op != Some(Op::Reset) {
            self.refuse(ports);
        }
    }

    fn refuse(&mut self, ports: Ports) {
        if self.streams.resets.len() < MAX_RESETS {
            self.streams.resets.push_back(ports);
        } else {
            self.core.counters.bump("resets_dropped");
        }
    }

    fn accept_guest(&mut self, ports: Ports, request: &Header) -> bool {
        if self.streams.is_full() {
            self.core.counters.bump("too_many_connections");
            return false;
        }
        let connected = self.dial(ports.0);
        let Ok(stream) = connected else {
            self.core.counters.bump("dial_refused");
            return false;
        };
        let connection = Connection::accepted(stream, self.streams.grant(), request);
        self.adopt(ports, connection)
    }

    fn dial(&mut self, port: u32) -> io::Result<UnixStream> {
        let bound = self.bound.as_mut().ok_or(io::ErrorKind::NotConnected)?;
        let (ours, theirs) = UnixStream::pair()?;
        ours.set_nonblocking(true)?;
        bound.dialer.dial(Dial {
            port,
            fd: theirs.into(),
        })?;
        Ok(ours)
    }

    fn adopt(&mut self, ports: Ports, connection: Connection) -> bool {
        let token = self.streams.next_token();
        if self.watch(connection.as_raw_fd(), token).is_err() {
            self.core.counters.bump("epoll_failed");
            return false;
        }
        self.streams.insert(ports, token, connection);
        true
    }

    fn watch(&self, fd: i32, token: u64) -> io::Result<()> {
        let events = EventSet::IN | EventSet::OUT | EventSet::READ_HANG_UP | EventSet::EDGE_TRIGGERED;
        self.core.watch(fd, events, token)
    }
}

// ---- process: host to guest

impl Vsock {
    fn process_receive(&mut self) -> Result<(), DeviceError> {
        if !self.streams.has_news() {
            return Ok(());
        }
        let Self {
            guest: Some(guest),
            streams,
            guest_cid,
            ..
        } = self
        else {
            return Ok(());
        };
        let Some(Some(queue)) = guest.queues.get_mut(RECEIVE) else {
            return Ok(());
        };
        queue.begin()?;
        while streams.has_news() {
            let Some(chain) = queue.next_chain()? else { break };
            let Some(room) = chain.writable.len().checked_sub(HEADER_BYTES as u64) else {
                self.core.counters.bump("bad_chain");
                queue.push(chain.head, 0)?;
                continue;
            };
            let room = usize::try_from(room).unwrap_or(usize::MAX).min(MAX_GRANT as usize);
            let Some(header) = streams.next_packet(*guest_cid, room) else {
                queue.undo();
                continue;
            };
            chain.writable.write_at(&guest.memory, 0, &header.to_bytes())?;
            let payload = &streams.scratch[..header.len as usize];
            chain.writable.write_at(&guest.memory, HEADER_BYTES as u64, payload)?;
            // At most MAX_GRANT and a header.
            let len = payload.len() + HEADER_BYTES;
            queue.push(chain.head, u32::try_from(len).unwrap_or(u32::MAX))?;
        }
        if streams.has_news() {
            queue.end()?;
        }
        queue.signal()
    }

    fn announce(&mut self) -> Result<(), DeviceError> {
        let Self {
            guest: Some(guest),
            announce_reset,
            ..
        } = self
        else {
            return Ok(());
        };
        let Some(Some(queue)) = guest.queues.get_mut(EVENT) else {
            return Ok(());
        };
        if !*announce_reset {
            return Ok(());
        }
        queue.begin()?;
        if let Some(chain) = queue.next_chain()? {
            // VIRTIO_VSOCK_EVENT_TRANSPORT_RESET is 0, in 32 bits.
            let len = chain.writable.write_at(&guest.memory, 0, &[0; 4])?;
            queue.push(chain.head, u32::try_from(len).unwrap_or(0))?;
            *announce_reset = false;
        } else {
            queue.end()?;
        }
        queue.signal()
    }
}

// ---- process: sockets

impl Vsock {
    fn accept_callers(&mut self) {
        while let Some(bound) = &self.bound {
            let stream = match bound.listener.accept() {
                Ok((stream, _)) => stream,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(_) => return self.core.counters.bump("accept_failed"),
            };
            if self.guest.is_none() || self.streams.is_full() {
                // Dropping the stream is the answer: there is no guest to talk to, or too much to say.
                self.core.counters.bump("caller_refused");
                continue;
            }
            let token = self.streams.next_token();
            match Caller::new(stream) {
                Ok(caller) if self.watch(caller.as_raw_fd(), token).is_ok() => {
                    self.streams.callers.insert(token, caller);
                    self.caller_event(token);
                }
                _ => self.core.counters.bump("accept_failed"),
            }
        }
    }

    fn caller_event(&mut self, token: u64) {
        let Some(caller) = self.streams.callers.get_mut(&token) else {
            return;
        };
        match caller.port() {
            Ok(None) => {}
            Ok(Some(guest_port)) => {
                let Some(caller) = self.streams.callers.remove(&token) else {
                    return;
                };
                let ports = (self.streams.free_port(guest_port), guest_port);
                let connection = Connection::requested(caller.into_stream(), self.streams.grant());
                // It goes on being watched under the token that it has.
                self.streams.insert(ports, token, connection);
            }
            Err(_) => {
                self.core.counters.bump("caller_refused");
                self.streams.callers.remove(&token);
            }
        }
    }

    fn socket_event(&mut self, token: u64, events: EventSet) {
        if self.streams.callers.contains_key(&token) {
            return self.caller_event(token);
        }
        let Some(&ports) = self.streams.by_token.get(&token) else {
            return;
        };
        if let Some((_, connection)) = self.streams.connections.get_mut(&ports) {
            let gone = events.intersects(EventSet::HANG_UP | EventSet::ERROR);
            let readable = events.intersects(EventSet::IN | EventSet::READ_HANG_UP);
            connection.socket_event(readable, events.contains(EventSet::OUT), gone);
        }
        self.streams.settle(ports);
    }
}

impl Device for Vsock {
    type Resource = VsockResource;
    type State = VsockState;
    const KIND: ThreadKind = ThreadKind::Vsock;

    fn core(&self) -> &Arc<Core> {
        &self.core
    }

    fn device_id(&self) -> u32 {
        VIRTIO_ID_VSOCK
    }

    fn features(&self) -> u64 {
        // Streams are what every device has; VIRTIO_VSOCK_F_STREAM would say so to drivers that ask (5.10.3).
        0
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE; 3]
    }

    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError> {
        self.guest = Some(Guest::new(activation, &self.core)?);
        // Callers that came before the driver wait in the listener's queue.
        self.accept_callers();
        self.process_receive()
    }

    fn queue_event(&mut self, index: usize) -> Result<(), DeviceError> {
        match index {
            TRANSMIT => self.process_transmit(),
            EVENT => self.announce(),
            _ => self.process_receive(),
        }
    }

    fn device_event(&mut self, token: u64, events: EventSet) -> Result<(), DeviceError> {
        if token == TOKEN_LISTENER {
            if self.guest.is_some() {
                self.accept_callers();
            }
        } else {
            self.socket_event(token, events);
        }
        self.process_receive()
    }

    fn bind(&mut self, resource: VsockResource) -> Result<(), DeviceError> {
        if self.bound.is_some() {
            return Err(DeviceError::AlreadyBound);
        }
        resource
            .listener
            .set_nonblocking(true)
            .map_err(DeviceError::host("make the vsock socket non-blocking"))?;
        let events = EventSet::IN | EventSet::EDGE_TRIGGERED;
        let watched = self.core.watch(resource.listener.as_raw_fd(), events, TOKEN_LISTENER);
        watched.map_err(DeviceError::host("watch the vsock socket"))?;
        self.bound = Some(resource);
        Ok(())
    }

    fn quiesce(&mut self) -> Result<(), DeviceError> {
        // Everything here happens within one event: nothing is ever in flight.
        Ok(())
    }

    fn resume(&mut self) -> Result<(), DeviceError> {
        self.announce()?;
        if self.guest.is_some() {
            self.accept_callers();
        }
        // Edges that came during the pause were taken by the epoll and passed over: every socket is tried again.
        let tokens: Vec<u64> = self
            .streams
            .by_token
            .keys()
            .chain(self.streams.callers.keys())
            .copied()
            .collect();
        for token in tokens {
            self.socket_event(token, EventSet::IN | EventSet::OUT);
        }
        self.process_transmit()?;
        self.process_receive()
    }

    fn has_work(&self) -> bool {
        // The driver is told of the transport's reset, and callers may wait.
        self.guest.is_some()
    }

    fn reset(&mut self) {
        self.guest = None;
        self.announce_reset = false;
        self.streams.clear();
    }

    fn save(&self) -> VsockState {
        VsockState {
            guest: self.guest.as_ref().map(Guest::state),
        }
    }

    /// The driver is told that its streams are gone, and that its context id may be another one (5.10.6.7).
    fn restore(&mut self, state: VsockState, memory: GuestMemory) -> Result<(), DeviceError> {
        self.reset();
        let guest = state.guest.map(|guest| Guest::restore(guest, memory, &self.core));
        self.guest = guest.transpose()?;
        self.announce_reset = self.guest.is_some();
        Ok(())
    }
}
