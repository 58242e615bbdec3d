//! All streams of one driver: which there are, what of the host's memory each has, and who has something for the guest.

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    hash::{BuildHasher as _, RandomState},
};

use super::connection::{Caller, Connection};
use super::packet::{HOST_CID, Header, Op, STREAM};
use crate::virtio::worker::DEVICE_TOKENS;

/// Streams and callers at once.
pub(super) const MAX_CONNECTIONS: usize = 256;
/// Buffer space for all streams.
pub(super) const BUFFER_BUDGET: u32 = 2 << 20;
/// The least that a stream is granted.
pub(super) const MIN_GRANT: u32 = 4 << 10;
/// The most that a stream is granted.
pub(super) const MAX_GRANT: u32 = 64 << 10;
/// Host ports are given from here on; what is below is for listeners that people name.
const FIRST_HOST_PORT: u32 = 1 << 30;

/// The listener's token comes before.
const FIRST_SOCKET_TOKEN: u64 = DEVICE_TOKENS + 1;

/// Which stream: host port, guest port.
pub(super) type Ports = (u32, u32);

/// All that goes with one driver; a reset forgets it.
#[derive(Default)]
pub(super) struct Streams {
    pub(super) connections: BTreeMap<Ports, (u64, Connection)>,
    pub(super) callers: HashMap<u64, Caller>,
    pub(super) by_token: HashMap<u64, Ports>,
    /// Streams that may have something for the guest, in turn. Each is in it at most once, but for ended ones.
    pub(super) ready: VecDeque<Ports>,
    pub(super) resets: VecDeque<Ports>,
    pub(super) granted: u32,
    sockets: u64,
    ports: NextPort,
    pub(super) scratch: Vec<u8>,
}

/// The host port to be given next, counted from the first. It begins anywhere: the driver of a restored machine has the sockets of the
/// streams from before until its programs close them, and refuses a stream between the same two ports.
struct NextPort(u32);

impl Default for NextPort {
    fn default() -> Self {
        let random = RandomState::new().hash_one(0) % u64::from(FIRST_HOST_PORT);
        // It is below 2^30.
        Self(u32::try_from(random).unwrap_or_default())
    }
}

impl Streams {
    pub(super) fn is_full(&self) -> bool {
        self.connections.len() + self.callers.len() >= MAX_CONNECTIONS
    }

    /// Buffer space for one more stream: a share of what is left when every further one gets the least.
    pub(super) fn grant(&self) -> u32 {
        // There is room for at least this one.
        let further = MAX_CONNECTIONS.saturating_sub(self.connections.len());
        let reserved = MIN_GRANT.saturating_mul(u32::try_from(further).unwrap_or(u32::MAX));
        let left = BUFFER_BUDGET.saturating_sub(self.granted).saturating_sub(reserved);
        (left / 8).clamp(MIN_GRANT, MAX_GRANT)
    }

    pub(super) fn next_token(&mut self) -> u64 {
        // 2^64 sockets are never opened.
        self.sockets += 1;
        FIRST_SOCKET_TOKEN + self.sockets
    }

    pub(super) fn free_port(&mut self, guest_port: u32) -> u32 {
        loop {
            let port = FIRST_HOST_PORT + self.ports.0;
            self.ports.0 = (self.ports.0 + 1) % FIRST_HOST_PORT;
            // There are more ports than connections.
            if !self.connections.contains_key(&(port, guest_port)) {
                return port;
            }
        }
    }

    pub(super) fn insert(&mut self, ports: Ports, token: u64, connection: Connection) {
        self.granted += connection.granted();
        self.by_token.insert(token, ports);
        self.connections.insert(ports, (token, connection));
        self.ready.push_back(ports);
    }

    fn remove(&mut self, ports: Ports) {
        if let Some((token, connection)) = self.connections.remove(&ports) {
            self.granted -= connection.granted();
            self.by_token.remove(&token);
        }
        self.ready.retain(|ready| *ready != ports);
    }

    /// After something happened to a stream.
    pub(super) fn settle(&mut self, ports: Ports) {
        let Some((_, connection)) = self.connections.get(&ports) else {
            return;
        };
        if connection.is_done() {
            self.remove(ports);
        } else if connection.has_news() && !self.ready.contains(&ports) {
            self.ready.push_back(ports);
        }
    }

    /// Forgets everything. Tokens go on, so that no late event meets a new socket.
    pub(super) fn clear(&mut self) {
        // Dropping the sockets takes them out of the epoll.
        *self = Self {
            sockets: self.sockets,
            ..Self::default()
        };
    }

    pub(super) fn has_news(&self) -> bool {
        !self.ready.is_empty() || !self.resets.is_empty()
    }

    /// The next packet for the guest; its payload is at the start of `scratch`.
    pub(super) fn next_packet(&mut self, guest_cid: u64, room: usize) -> Option<Header> {
        let header = |ports: Ports, op, flags, len| Header {
            source_cid: HOST_CID,
            destination_cid: guest_cid,
            source_port: ports.0,
            destination_port: ports.1,
            len,
            kind: STREAM,
            op: Some(op),
            flags,
            buffer_size: 0,
            forwarded: 0,
        };
        if let Some(ports) = self.resets.pop_front() {
            return Some(header(ports, Op::Reset, 0, 0));
        }
        let ports = self.ready.pop_front()?;
        let (_, connection) = self.connections.get_mut(&ports)?;
        if self.scratch.len() < room {
            self.scratch.resize(room, 0);
        }
        let outgoing = connection.next(&mut self.scratch[..room]);
        let packet = outgoing.map(|out| Header {
            buffer_size: connection.granted(),
            forwarded: connection.tell_forwarded(),
            // At most `room`, which is at most MAX_GRANT.
            ..header(ports, out.op, out.flags, u32::try_from(out.len).unwrap_or(0))
        });
        self.settle(ports);
        packet
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_devices_give_out_ports_that_differ_and_each_goes_on_with_the_next() {
        let (mut one, mut other) = (Streams::default(), Streams::default());
        let first = one.free_port(1024);
        assert!((FIRST_HOST_PORT..2 * FIRST_HOST_PORT).contains(&first));
        assert_ne!(first, other.free_port(1024), "one time in 2^30 they are the same");
        let wrapped = if first == 2 * FIRST_HOST_PORT - 1 {
            FIRST_HOST_PORT
        } else {
            first + 1
        };
        assert_eq!(one.free_port(1024), wrapped);
    }
}
