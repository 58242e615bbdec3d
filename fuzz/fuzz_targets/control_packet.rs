//! Packets of the control protocol: bytes and a number of descriptors over a real socket pair, then decoded.
#![no_main]

use std::os::fd::{AsFd, OwnedFd};

use flint_api::vmm::{FromVmm, Request};
use flint_vmm::control::packet::{Received, receive, send};
use libfuzzer_sys::fuzz_target;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use prost::Message;

fuzz_target!(|input: (u8, &[u8])| {
    let (count, bytes) = input;
    let flags = SockFlag::SOCK_CLOEXEC;
    let (ours, theirs): (OwnedFd, OwnedFd) =
        socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags).expect("descriptors");
    let fds = vec![ours.as_fd(); usize::from(count) % 80];
    if bytes.is_empty() || send(ours.as_fd(), bytes, &fds).is_err() {
        return;
    }
    match receive(theirs.as_fd()).expect("there is a packet") {
        Received::Packet {
            bytes: came,
            fds: taken,
        } => {
            assert_eq!((&came[..], taken.len()), (bytes, fds.len()));
            if let Ok(request) = Request::decode(&came[..]) {
                assert_eq!(Request::decode(&request.encode_to_vec()[..]).as_ref(), Ok(&request));
            }
            let _ = FromVmm::decode(&came[..]);
        }
        Received::Oversized { bytes: came } => assert!(bytes.starts_with(&came)),
        Received::End => panic!("nobody has closed"),
    }
});
