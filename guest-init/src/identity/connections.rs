//! Ends the TCP connections that a clone has from the machine it was cloned from (sock_diag(7), SOCK_DESTROY): their other ends
//! talk to that machine, and each side would take the other's segments for its own.
//!
//! Whoever holds such a connection reads ECONNABORTED. Those within the machine, over loopback, stay: both ends were cloned.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    os::fd::{AsRawFd, OwnedFd},
};

use nix::{
    errno::Errno,
    sys::socket::{AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, send, socket},
};

// ---- linux/netlink.h, linux/sock_diag.h, linux/inet_diag.h; all but the socket's id is in the machine's byte order

const HEADER_BYTES: usize = 16;
const SOCK_DIAG_BY_FAMILY: u16 = 20;
const SOCK_DESTROY: u16 = 21;
/// `struct inet_diag_sockid`: ports, addresses, interface, cookie.
const ID_BYTES: usize = 48;
/// Where the id is in `struct inet_diag_msg`; before it are family, state, timer, retransmissions.
const ID_AT: usize = 4;
/// Where the source address is in an id.
const SOURCE_AT: usize = 4;
/// All states but CLOSE (7) and LISTEN (10).
const STATES: u32 = !(1 << 7 | 1 << 10);
/// More than the kernel puts into one answer (32 KiB).
const ANSWER_BYTES: usize = 64 << 10;

/// Ends all connections with other machines.
pub fn end_all() -> io::Result<()> {
    let netlink = socket(
        AddressFamily::Netlink,
        SockType::Datagram,
        SockFlag::SOCK_CLOEXEC,
        SockProtocol::NetlinkSockDiag,
    )?;
    for family in [libc::AF_INET, libc::AF_INET6] {
        // Both fit a byte.
        let family = u8::try_from(family).unwrap_or_default();
        for id in connections(&netlink, family)? {
            end(&netlink, family, &id)?;
        }
    }
    Ok(())
}

/// The ids of a family's connections with other machines.
fn connections(netlink: &OwnedFd, family: u8) -> io::Result<Vec<[u8; ID_BYTES]>> {
    let flags = libc::NLM_F_REQUEST | libc::NLM_F_DUMP;
    ask(
        netlink,
        &request(SOCK_DIAG_BY_FAMILY, flags, family, STATES, &[0; ID_BYTES]),
    )?;
    let mut found = Vec::new();
    let mut answer = vec![0; ANSWER_BYTES];
    loop {
        let length = recv(netlink.as_raw_fd(), &mut answer, MsgFlags::empty())?;
        for message in messages(&answer[..length]) {
            match message {
                Message::Done => return Ok(found),
                // A kernel without IPv6 knows nothing of the family; it was asked for IPv4 before.
                Message::Failed(Errno::ENOENT) if i32::from(family) == libc::AF_INET6 => return Ok(found),
                Message::Failed(error) => return Err(error.into()),
                Message::Socket { id, source } if !source.is_loopback() => found.push(id),
                Message::Socket { .. } | Message::Other => {}
            }
        }
    }
}

fn end(netlink: &OwnedFd, family: u8, id: &[u8; ID_BYTES]) -> io::Result<()> {
    let flags = libc::NLM_F_REQUEST | libc::NLM_F_ACK;
    ask(netlink, &request(SOCK_DESTROY, flags, family, STATES, id))?;
    let mut answer = [0; 1024];
    let length = recv(netlink.as_raw_fd(), &mut answer, MsgFlags::empty())?;
    for message in messages(&answer[..length]) {
        match message {
            // It has ended by itself meanwhile.
            Message::Done | Message::Failed(Errno::ENOENT) => return Ok(()),
            Message::Failed(error) => return Err(error.into()),
            Message::Socket { .. } | Message::Other => {}
        }
    }
    Ok(())
}

fn ask(netlink: &OwnedFd, request: &[u8]) -> io::Result<()> {
    send(netlink.as_raw_fd(), request, MsgFlags::empty())?;
    Ok(())
}

/// A `struct nlmsghdr` and a `struct inet_diag_req_v2`.
fn request(kind: u16, flags: i32, family: u8, states: u32, id: &[u8; ID_BYTES]) -> Vec<u8> {
    // Flags have 16 bits, the protocol has 8, and the whole is short.
    let flags = u16::try_from(flags).unwrap_or_default();
    let protocol = u8::try_from(libc::IPPROTO_TCP).unwrap_or_default();
    let length = u32::try_from(HEADER_BYTES + 8 + ID_BYTES).unwrap_or_default();
    let mut bytes = Vec::new();
    bytes.extend(length.to_ne_bytes());
    bytes.extend(kind.to_ne_bytes());
    bytes.extend(flags.to_ne_bytes());
    // Sequence and port: there is one question at a time.
    bytes.extend([0; 8]);
    bytes.extend([family, protocol, 0, 0]);
    bytes.extend(states.to_ne_bytes());
    bytes.extend(id);
    bytes
}

/// What the kernel says.
#[derive(Debug, PartialEq)]
enum Message {
    /// The end of a list, or that something was done.
    Done,
    Failed(Errno),
    Socket {
        id: [u8; ID_BYTES],
        source: IpAddr,
    },
    Other,
}

/// The messages of one datagram; what is cut off is left out.
fn messages(mut bytes: &[u8]) -> Vec<Message> {
    let mut messages = Vec::new();
    while let Some((length, kind)) = header(bytes) {
        let body = bytes.get(HEADER_BYTES..length).unwrap_or_default();
        messages.push(message(kind, body));
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    messages
}

fn header(bytes: &[u8]) -> Option<(usize, u16)> {
    let length = u32::from_ne_bytes(*bytes.first_chunk()?);
    let kind = u16::from_ne_bytes(*bytes.get(4..)?.first_chunk()?);
    let length = usize::try_from(length).ok()?;
    (length >= HEADER_BYTES && length <= bytes.len()).then_some((length, kind))
}

fn message(kind: u16, body: &[u8]) -> Message {
    match i32::from(kind) {
        libc::NLMSG_DONE => Message::Done,
        libc::NLMSG_ERROR => match body.first_chunk().map(|code| i32::from_ne_bytes(*code)) {
            Some(0) => Message::Done,
            Some(code) => Message::Failed(Errno::from_raw(code.saturating_neg())),
            None => Message::Failed(Errno::EBADMSG),
        },
        _ if kind == SOCK_DIAG_BY_FAMILY => socket_of(body).unwrap_or(Message::Other),
        _ => Message::Other,
    }
}

fn socket_of(body: &[u8]) -> Option<Message> {
    let family = i32::from(*body.first()?);
    let id: [u8; ID_BYTES] = *body.get(ID_AT..)?.first_chunk()?;
    let source: &[u8; 16] = id[SOURCE_AT..].first_chunk()?;
    let source = match family {
        libc::AF_INET => Ipv4Addr::from(*source.first_chunk::<4>()?).into(),
        // An IPv4 connection of an IPv6 socket has its address mapped.
        libc::AF_INET6 => Ipv6Addr::from(*source).to_canonical(),
        _ => return None,
    };
    Some(Message::Socket { id, source })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn framed(kind: u16, body: &[u8]) -> Vec<u8> {
        let length = u32::try_from(HEADER_BYTES + body.len()).unwrap();
        let mut bytes = length.to_ne_bytes().to_vec();
        bytes.extend(kind.to_ne_bytes());
        bytes.extend([0; 10]);
        bytes.extend(body);
        bytes
    }

    fn listed(family: i32, source: [u8; 16]) -> Vec<u8> {
        let mut body = vec![0; 72];
        body[0] = u8::try_from(family).unwrap();
        body[ID_AT + SOURCE_AT..][..16].copy_from_slice(&source);
        framed(SOCK_DIAG_BY_FAMILY, &body)
    }

    fn source(bytes: &[u8]) -> IpAddr {
        match messages(bytes).remove(0) {
            Message::Socket { source, .. } => source,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_sockets_own_address_is_read_in_each_family() {
        let mut four = [0; 16];
        four[..4].copy_from_slice(&[10, 88, 0, 7]);
        assert_eq!(source(&listed(libc::AF_INET, four)), IpAddr::from([10, 88, 0, 7]));
        let mapped = Ipv4Addr::LOCALHOST.to_ipv6_mapped().octets();
        assert!(source(&listed(libc::AF_INET6, mapped)).is_loopback());
        let six: Ipv6Addr = "fd00::7".parse().unwrap();
        assert_eq!(source(&listed(libc::AF_INET6, six.octets())), IpAddr::from(six));
    }

    #[test]
    fn errors_acknowledgements_and_ends_are_told_apart() {
        let error = |code: i32| messages(&framed(2, &code.to_ne_bytes())).remove(0);
        assert_eq!(error(0), Message::Done);
        assert_eq!(error(-libc::EOPNOTSUPP), Message::Failed(Errno::EOPNOTSUPP));
        assert_eq!(messages(&framed(3, &[0; 4])), [Message::Done]);
    }

    #[test]
    fn what_is_cut_off_or_lies_about_its_length_is_no_message() {
        let whole = listed(libc::AF_INET, [1; 16]);
        assert!((0..whole.len()).all(|length| messages(&whole[..length]).is_empty()));
        let mut short = framed(SOCK_DIAG_BY_FAMILY, &[2; 20]);
        assert_eq!(messages(&short), [Message::Other]);
        short[..4].copy_from_slice(&3_u32.to_ne_bytes());
        assert!(
            messages(&short).is_empty(),
            "a length of less than a header would never end"
        );
    }

    #[test]
    fn a_question_has_the_kernels_size() {
        let bytes = request(SOCK_DESTROY, libc::NLM_F_REQUEST, 2, STATES, &[7; ID_BYTES]);
        assert_eq!(bytes.len(), 72);
        assert_eq!(bytes[..4], 72_u32.to_ne_bytes());
        assert_eq!(bytes[72 - ID_BYTES..], [7; ID_BYTES]);
    }
}
