//! The guard's set, one element at a time, by nfnetlink: no program has to be run while a pod waits for its network.
//!
//! ```text
//!   BATCH_BEGIN | NEWSETELEM or DELSETELEM table "flint" set "sources" { key: tap name . MAC . address } | BATCH_END   one transaction
//! ```
//!
//! Messages, attributes and their numbers: linux/netfilter/nfnetlink.h, nf_tables.h; netlink(7). What the parts of a concatenated
//! key look like: each is filled up to four bytes.

use std::{
    io,
    net::Ipv4Addr,
    os::fd::{AsRawFd, OwnedFd},
    sync::{Mutex, MutexGuard, PoisonError},
};

use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, send, socket,
};

use super::addresses::{mac_of, tap_name_of};

const NFNL_SUBSYS_NFTABLES: u16 = 10;
const NFT_MSG_NEWSETELEM: u16 = 12;
const NFT_MSG_DELSETELEM: u16 = 14;
const BATCH_BEGIN: u16 = 0x10;
const BATCH_END: u16 = 0x11;
const NFPROTO_BRIDGE: u8 = 7;
const REQUEST: u16 = 1;
const ACK: u16 = 4;
const CREATE: u16 = 0x400;
const NLMSG_ERROR: u16 = 2;
const NESTED: u16 = 1 << 15;
const IFNAMSIZ: usize = 16;

/// The way out of one sandbox. Whoever starts the sandbox may open it; whoever cleans up behind it shuts it for good. The two do not
/// wait for each other, and the address may be another sandbox's by the time that the first comes to it.
#[derive(Debug)]
pub struct Gate {
    address: Ipv4Addr,
    fate: Mutex<Fate>,
}

#[derive(Debug)]
enum Fate {
    Usable,
    Shut,
}

impl Gate {
    pub(super) fn new(address: Ipv4Addr) -> Self {
        let fate = Mutex::new(Fate::Usable);
        Self { address, fate }
    }

    /// The sandbox's address.
    pub fn address(&self) -> Ipv4Addr {
        self.address
    }

    fn lock(&self) -> MutexGuard<'_, Fate> {
        self.fate.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A connection to nftables, in the network namespace of the thread that made it.
#[derive(Debug)]
pub(super) struct Fence {
    /// Held for a question and its answer.
    socket: Mutex<OwnedFd>,
}

impl Fence {
    pub(super) fn connect() -> io::Result<Self> {
        let socket = socket(
            AddressFamily::Netlink,
            SockType::Raw,
            SockFlag::SOCK_CLOEXEC,
            SockProtocol::NetlinkNetFilter,
        )?;
        bind(socket.as_raw_fd(), &NetlinkAddr::new(0, 0))?;
        Ok(Self {
            socket: Mutex::new(socket),
        })
    }

    /// Lets an address's tap send. Done when this returns, after some tens of microseconds: the kernel commits in the call.
    pub(super) fn open(&self, gate: &Gate) -> io::Result<()> {
        let state = gate.lock();
        match *state {
            Fate::Shut => Err(io::Error::new(io::ErrorKind::NotConnected, "the sandbox has ended")),
            Fate::Usable => self.ask(&transaction(NFT_MSG_NEWSETELEM, CREATE, gate.address)),
        }
    }

    /// Takes that back, whether or not it was given, and for good: whoever still starts the sandbox comes too late. May be repeated.
    pub(super) fn shut(&self, gate: &Gate) -> io::Result<()> {
        let mut state = gate.lock();
        *state = Fate::Shut;
        match self.ask(&transaction(NFT_MSG_DELSETELEM, 0, gate.address)) {
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(()),
            outcome => outcome,
        }
    }

    fn ask(&self, transaction: &[u8]) -> io::Result<()> {
        let socket = self.socket.lock().unwrap_or_else(PoisonError::into_inner);
        send(socket.as_raw_fd(), transaction, MsgFlags::empty())?;
        // The kernel answers in the call, too: a message that is not there now will never come.
        let mut answer = [0; 1024];
        let length = recv(socket.as_raw_fd(), &mut answer, MsgFlags::MSG_DONTWAIT)?;
        outcome(&answer[..length])
    }
}

/// The errno of an acknowledgement (`struct nlmsgerr`).
fn outcome(answer: &[u8]) -> io::Result<()> {
    let word = |at: usize| answer.get(at..at + 4).and_then(|bytes| bytes.try_into().ok());
    let kind = answer
        .get(4..6)
        .and_then(|bytes| bytes.try_into().ok())
        .map(u16::from_ne_bytes);
    match (kind, word(16).map(i32::from_ne_bytes)) {
        (Some(NLMSG_ERROR), Some(0)) => Ok(()),
        (Some(NLMSG_ERROR), Some(errno)) => Err(io::Error::from_raw_os_error(-errno)),
        _ => Err(io::Error::new(io::ErrorKind::InvalidData, "no acknowledgement")),
    }
}

fn transaction(what: u16, flags: u16, address: Ipv4Addr) -> Vec<u8> {
    let batch = |kind| message(kind, REQUEST, 0, NFNL_SUBSYS_NFTABLES, &[]);
    let key = attribute(1 | NESTED, &attribute(1, &key(address)));
    let element = attribute(3 | NESTED, &attribute(1 | NESTED, &key));
    let body = [attribute(1, b"flint\0"), attribute(2, b"sources\0"), element].concat();
    let kind = NFNL_SUBSYS_NFTABLES << 8 | what;
    [
        batch(BATCH_BEGIN),
        message(kind, REQUEST | ACK | flags, NFPROTO_BRIDGE, 0, &body),
        batch(BATCH_END),
    ]
    .concat()
}

fn key(address: Ipv4Addr) -> Vec<u8> {
    // A name is shorter than IFNAMSIZ, see `tap_name_of`.
    let mut key = tap_name_of(address).into_bytes();
    key.resize(IFNAMSIZ, 0);
    key.extend(mac_of(address));
    key.extend([0; 2]);
    key.extend(address.octets());
    key
}

/// `struct nlmsghdr`, `struct nfgenmsg`, attributes.
fn message(kind: u16, flags: u16, family: u8, resource: u16, body: &[u8]) -> Vec<u8> {
    let mut message = vec![0; 4];
    message.extend(kind.to_ne_bytes());
    message.extend(flags.to_ne_bytes());
    // Sequence and port: one question at a time, and the socket's own.
    message.extend([0; 8]);
    message.extend([family, 0]);
    message.extend(resource.to_be_bytes());
    message.extend(body);
    // Some hundred bytes.
    let length = u32::try_from(message.len()).unwrap_or(u32::MAX);
    message[..4].copy_from_slice(&length.to_ne_bytes());
    message
}

fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
    let length = u16::try_from(4 + value.len()).unwrap_or(u16::MAX);
    let mut attribute = [length.to_ne_bytes(), kind.to_ne_bytes()].concat();
    attribute.extend(value);
    attribute.resize(attribute.len().next_multiple_of(4), 0);
    attribute
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_kernel_says_is_understood() {
        let answer = |kind: u16, errno: i32| {
            let mut answer = vec![0; 36];
            answer[4..6].copy_from_slice(&kind.to_ne_bytes());
            answer[16..20].copy_from_slice(&errno.to_ne_bytes());
            answer
        };
        outcome(&answer(NLMSG_ERROR, 0)).unwrap();
        assert_eq!(outcome(&answer(NLMSG_ERROR, -2)).unwrap_err().raw_os_error(), Some(2));
        assert!(outcome(&answer(3, 0)).is_err());
        assert!(outcome(&answer(NLMSG_ERROR, 0)[..18]).is_err());
    }
}
