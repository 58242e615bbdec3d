//! Events of the kernel's device model: "action@devpath" and KEY=value lines, each ended by a zero byte.

use std::{
    io,
    os::fd::{AsRawFd, OwnedFd},
};

use nix::{
    errno::Errno,
    sys::socket::{
        AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, setsockopt, socket, sockopt,
    },
};
use tokio::io::{Interest, unix::AsyncFd};

/// The kernel's own multicast group; udev's is 2.
const KERNEL_GROUP: u32 = 1;
/// Room for events that nobody has read yet.
const BUFFER: usize = 1 << 20;

/// What a wait ended by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Seen {
    /// The event.
    Event,
    /// More events than the socket holds, of which some were dropped: only a look can say what happened.
    Loss,
}

/// Events from the time on that this was made.
#[derive(Debug)]
pub struct Uevents(AsyncFd<OwnedFd>);

impl Uevents {
    /// Begins to listen. Whoever waits for a state listens first and looks then, or misses what happens between the two.
    pub fn listen() -> io::Result<Self> {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let socket = socket(
            AddressFamily::Netlink,
            SockType::Datagram,
            flags,
            SockProtocol::NetlinkKObjectUEvent,
        )?;
        bind(socket.as_raw_fd(), &NetlinkAddr::new(0, KERNEL_GROUP))?;
        // Memory is plugged with hundreds of events at once.
        setsockopt(&socket, sockopt::RcvBufForce, &BUFFER)
            .or_else(|_| setsockopt(&socket, sockopt::RcvBuf, &BUFFER))?;
        crate::sys::async_fd(socket, Interest::READABLE).map(Self)
    }

    /// Waits for the next event that has this line, or for the loss of events.
    pub async fn wait_for(&self, line: &str) -> io::Result<Seen> {
        let mut message = [0; 4096];
        loop {
            let mut ready = self.0.readable().await?;
            match recv(self.0.get_ref().as_raw_fd(), &mut message, MsgFlags::empty()) {
                Ok(length) if has(message.get(..length).unwrap_or_default(), line) => {
                    return Ok(Seen::Event);
                }
                Ok(_) | Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => ready.clear_ready(),
                Err(Errno::ENOBUFS) => return Ok(Seen::Loss),
                Err(error) => return Err(error.into()),
            }
        }
    }
}

fn has(message: &[u8], line: &str) -> bool {
    message.split(|byte| *byte == 0).any(|other| other == line.as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_whole_line_counts() {
        assert!(has(b"add@/devices/x\0ACTION=add\0SUBSYSTEM=block\0", "SUBSYSTEM=block"));
        assert!(!has(b"add@/devices/x\0SUBSYSTEM=blocked\0", "SUBSYSTEM=block"));
        assert!(!has(b"", "SUBSYSTEM=block"));
    }

    #[tokio::test]
    async fn the_kernel_lets_us_listen() {
        Uevents::listen().unwrap();
    }
}
