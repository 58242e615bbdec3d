//! Packets with file descriptors over a SOCK_SEQPACKET socket (unix(7), SCM_RIGHTS).

use std::io::{self, IoSlice};
use std::mem;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::ptr;

use flint_api::vmm::{MAX_FDS, MAX_PACKET};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};

/// Room for the header of a control message and the descriptors.
#[allow(clippy::cast_possible_truncation)] // 64 descriptors of four bytes
const CONTROL_BYTES: usize = {
    // SAFETY: CMSG_SPACE only calculates.
    unsafe { libc::CMSG_SPACE((MAX_FDS * size_of::<RawFd>()) as u32) as usize }
};

/// What came over the connection.
#[derive(Debug)]
pub enum Received {
    /// A whole packet.
    Packet {
        /// Its bytes.
        bytes: Vec<u8>,
        /// The descriptors that came with it.
        fds: Vec<OwnedFd>,
    },
    /// A packet with more bytes or descriptors than are allowed; the descriptors are closed. Begins with `bytes`.
    Oversized {
        /// As much as was read.
        bytes: Vec<u8>,
    },
    /// The other side has closed.
    End,
}

/// Receives one packet.
///
/// # Errors
/// The socket's; `WouldBlock` if none is there.
pub fn receive(socket: BorrowedFd<'_>) -> io::Result<Received> {
    // Not zeroed: a claim would pay for pages of which it uses one.
    let mut bytes = Vec::<u8>::with_capacity(MAX_PACKET);
    // Aligned as control messages want it.
    let mut control = [0u64; CONTROL_BYTES.div_ceil(8)];
    let mut iov = libc::iovec {
        iov_base: bytes.as_mut_ptr().cast(),
        iov_len: MAX_PACKET,
    };
    // SAFETY: all-zero is a valid msghdr.
    let mut header: libc::msghdr = unsafe { mem::zeroed() };
    header.msg_iov = &raw mut iov;
    header.msg_iovlen = 1;
    header.msg_control = control.as_mut_ptr().cast();
    header.msg_controllen = CONTROL_BYTES;
    // SAFETY: the header points to buffers of the lengths it tells, which live until the call returns.
    let length = unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut header, libc::MSG_CMSG_CLOEXEC) };
    let length = usize::try_from(length).map_err(|_| io::Error::last_os_error())?;
    // SAFETY: the kernel filled the header in, and this is the only place that takes the descriptors.
    let fds = unsafe { take_descriptors(&header) };
    // SAFETY: the kernel has written so many bytes, at most as many as there is room for: MSG_TRUNC was not asked for.
    unsafe { bytes.set_len(length) };
    if header.msg_flags & (libc::MSG_TRUNC | libc::MSG_CTRUNC) != 0 {
        return Ok(Received::Oversized { bytes });
    }
    Ok(if length == 0 {
        Received::End
    } else {
        Received::Packet { bytes, fds }
    })
}

/// # Safety
/// `header` was filled in by recvmsg, its buffers are alive, and nobody else takes ownership of the descriptors.
unsafe fn take_descriptors(header: &libc::msghdr) -> Vec<OwnedFd> {
    let mut fds = Vec::new();
    // SAFETY: the caller vouches for the header.
    let mut message = unsafe { libc::CMSG_FIRSTHDR(header) };
    // SAFETY: the macros return null or a message inside of the control buffer.
    while let Some(control) = unsafe { message.as_ref() } {
        if control.cmsg_level == libc::SOL_SOCKET && control.cmsg_type == libc::SCM_RIGHTS {
            // SAFETY: CMSG_DATA and CMSG_LEN only calculate.
            let (data, head) = unsafe { (libc::CMSG_DATA(message), libc::CMSG_LEN(0) as usize) };
            let count = control.cmsg_len.saturating_sub(head) / size_of::<RawFd>();
            for index in 0..count {
                // SAFETY: the kernel wrote `count` descriptors here, which are ours now.
                fds.push(unsafe { OwnedFd::from_raw_fd(ptr::read_unaligned(data.cast::<RawFd>().add(index))) });
            }
        }
        // SAFETY: `message` is a message of this header.
        message = unsafe { libc::CMSG_NXTHDR(header, message) };
    }
    fds
}

/// Sends one packet, without waiting.
///
/// # Errors
/// The socket's; `WouldBlock` if the other side does not read.
pub fn send(socket: BorrowedFd<'_>, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
    let raw: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
    let rights = [ControlMessage::ScmRights(&raw)];
    let control = if raw.is_empty() { &rights[..0] } else { &rights[..] };
    let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
    sendmsg::<()>(socket.as_raw_fd(), &[IoSlice::new(bytes)], control, flags, None)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
    use std::os::fd::AsFd;

    fn pair() -> (OwnedFd, OwnedFd) {
        socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC).unwrap()
    }

    #[test]
    fn bytes_and_descriptors_arrive_together() {
        let (ours, theirs) = pair();
        send(ours.as_fd(), b"hello", &[ours.as_fd(), theirs.as_fd()]).unwrap();
        let Received::Packet { bytes, fds } = receive(theirs.as_fd()).unwrap() else {
            panic!()
        };
        assert_eq!((&bytes[..], fds.len()), (&b"hello"[..], 2));
    }

    #[test]
    fn the_end_and_what_is_too_much_are_told_apart() {
        let (ours, theirs) = pair();
        let many = vec![ours.as_fd(); MAX_FDS + 1];
        send(ours.as_fd(), b"many", &many).unwrap();
        assert!(matches!(receive(theirs.as_fd()).unwrap(), Received::Oversized { bytes } if bytes == b"many"));
        send(ours.as_fd(), &vec![0; MAX_PACKET + 1], &[]).unwrap();
        assert!(matches!(receive(theirs.as_fd()).unwrap(), Received::Oversized { .. }));
        drop(ours);
        assert!(matches!(receive(theirs.as_fd()).unwrap(), Received::End));
    }
}
