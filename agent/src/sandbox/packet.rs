//! Packets with descriptors on a `SOCK_SEQPACKET` unix socket (unix(7)), without blocking.

use std::{
    io::{self, IoSlice, IoSliceMut},
    os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
    path::Path,
};

use flint_api::vmm::MAX_PACKET;
use nix::{
    cmsg_space,
    fcntl::{FcntlArg, OFlag, fcntl},
    sys::socket::{
        AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, UnixAddr, connect, recvmsg,
        sendmsg, setsockopt, socket, sockopt,
    },
};
use tokio::io::{Interest, unix::AsyncFd};

/// Most descriptors that the kernel passes at once (`SCM_MAX_FD`). With room for all of them none can be cut off and stay
/// open unseen; whether so many are allowed is for the protocol to say.
const SCM_MAX_FD: usize = 253;

/// One packet that was received.
#[derive(Debug)]
pub(super) struct Packet {
    pub bytes: Vec<u8>,
    pub fds: Vec<OwnedFd>,
    /// Who sent it, as this process sees it.
    pub pid: Option<i32>,
}

/// A connected socket.
#[derive(Debug)]
pub(super) struct PacketSocket(AsyncFd<OwnedFd>);

impl PacketSocket {
    /// Connects by path, and asks the kernel to say with each packet who sent it.
    pub(super) fn connect(path: &Path) -> io::Result<Self> {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let fd = socket(AddressFamily::Unix, SockType::SeqPacket, flags, None)?;
        // Before anything can arrive, so that the first packet has its sender already.
        setsockopt(&fd, sockopt::PassCred, &true)?;
        connect(fd.as_raw_fd(), &UnixAddr::new(path)?)?;
        // SAFETY: an owned descriptor stays the same one for as long as it is registered.
        Ok(Self(unsafe { AsyncFd::register(fd)? }))
    }

    /// One end of a pair.
    pub(super) fn of(socket: OwnedFd) -> io::Result<Self> {
        fcntl(&socket, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
        // SAFETY: an owned descriptor stays the same one for as long as it is registered.
        Ok(Self(unsafe { AsyncFd::register(socket)? }))
    }

    pub(super) async fn send(&self, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        let fds: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
        let rights = [ControlMessage::ScmRights(&fds)];
        let control = if fds.is_empty() { &rights[..0] } else { &rights[..] };
        let send = |fd: &OwnedFd| {
            let flags = MsgFlags::MSG_NOSIGNAL;
            Ok(sendmsg::<()>(
                fd.as_raw_fd(),
                &[IoSlice::new(bytes)],
                control,
                flags,
                None,
            )?)
        };
        self.0.async_io(Interest::WRITABLE, send).await?;
        Ok(())
    }

    /// The next packet; `None` at the end of the connection.
    pub(super) async fn receive(&self) -> io::Result<Option<Packet>> {
        let packet = self.0.async_io(Interest::READABLE, receive_now).await?;
        Ok((!packet.bytes.is_empty()).then_some(packet))
    }
}

fn receive_now(fd: &OwnedFd) -> io::Result<Packet> {
    let mut bytes = vec![0; MAX_PACKET];
    let mut control = cmsg_space!([RawFd; SCM_MAX_FD], nix::sys::socket::UnixCredentials);
    let (length, truncated, fds, pid) = {
        let mut slices = [IoSliceMut::new(&mut bytes)];
        let flags = MsgFlags::MSG_CMSG_CLOEXEC;
        let message = recvmsg::<()>(fd.as_raw_fd(), &mut slices, Some(&mut control), flags)?;
        let (mut fds, mut pid) = (Vec::new(), None);
        for part in message.cmsgs()? {
            match part {
                ControlMessageOwned::ScmRights(raw) => {
                    // SAFETY: the kernel has just made these descriptors for us, nobody else has them.
                    fds.extend(raw.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
                }
                ControlMessageOwned::ScmCredentials(sender) => pid = Some(sender.pid()),
                _ => {}
            }
        }
        (message.bytes, message.flags.contains(MsgFlags::MSG_TRUNC), fds, pid)
    };
    if truncated {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "a packet larger than the protocol allows",
        ));
    }
    bytes.truncate(length);
    Ok(Packet { bytes, fds, pid })
}
