//! A connection's state machine over a socket pair, with no device around it.

use super::*;
use crate::virtio::vsock::packet::{HOST_CID, STREAM};

const GRANT: u32 = 8192;

fn packet(op: Op, flags: u32, len: usize) -> Header {
    Header {
        source_cid: 3,
        destination_cid: HOST_CID,
        source_port: 7,
        destination_port: 9,
        len: u32::try_from(len).unwrap(),
        kind: STREAM,
        op: Some(op),
        flags,
        buffer_size: 1000,
        forwarded: 0,
    }
}

fn accepted() -> (Connection, UnixStream) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    ours.set_nonblocking(true).unwrap();
    theirs.set_nonblocking(true).unwrap();
    let mut connection = Connection::accepted(ours, GRANT, &packet(Op::Request, 0, 0));
    assert_eq!(connection.next(&mut [0; 8]).unwrap().op, Op::Response);
    (connection, theirs)
}

fn data(connection: &mut Connection, payload: &[u8]) -> Result<(), Violation> {
    connection.receive(&packet(Op::Data, 0, payload.len()), payload, 9)
}

#[test]
fn no_more_is_read_than_the_guest_has_room_for_and_credit_is_asked_once() {
    let (mut connection, mut host) = accepted();
    host.write_all(&[5; 1500]).unwrap();
    let mut buffer = [0; 4096];
    assert_eq!(
        connection.next(&mut buffer).unwrap(),
        Outgoing {
            op: Op::Data,
            flags: 0,
            len: 1000
        }
    );
    assert_eq!(connection.next(&mut buffer).unwrap().op, Op::CreditRequest);
    assert!(!connection.has_news());
    assert_eq!(connection.next(&mut buffer), None);
    let update = Header {
        forwarded: 1000,
        ..packet(Op::CreditUpdate, 0, 0)
    };
    connection.receive(&update, &[], 9).unwrap();
    assert_eq!(connection.next(&mut buffer).unwrap().len, 500);
}

#[test]
fn a_guest_that_lies_about_credit_gets_nothing() {
    let (mut connection, mut host) = accepted();
    host.write_all(b"x").unwrap();
    let lie = Header {
        forwarded: 5000,
        buffer_size: 100,
        ..packet(Op::CreditUpdate, 0, 0)
    };
    connection.receive(&lie, &[], 9).unwrap();
    assert_eq!(connection.next(&mut [0; 8]), None);
}

#[test]
fn what_the_socket_does_not_take_waits_within_the_grant_and_no_further() {
    let (mut connection, mut host) = accepted();
    let chunk = vec![1; GRANT as usize];
    let mut sent = 0;
    // The kernel's socket buffer fills first, then ours.
    while data(&mut connection, &chunk).is_ok() {
        sent += chunk.len();
        assert!(connection.backlog.len() <= GRANT as usize);
        assert!(sent < 64 << 20, "the grant does not bound the guest");
    }
    assert_eq!(connection.next(&mut [0; 8]).unwrap().op, Op::Reset);
    assert!(connection.is_done());
    assert_eq!(connection.backlog.capacity(), 0);
    assert!(host.read(&mut [0; 1]).is_ok());
}

#[test]
fn the_end_of_what_the_guest_sends_comes_after_all_of_it() {
    let (mut connection, mut host) = accepted();
    let chunk = vec![2; 4096];
    let mut sent = 0;
    while connection.backlog.is_empty() {
        data(&mut connection, &chunk).unwrap();
        sent += chunk.len();
    }
    connection
        .receive(&packet(Op::Shutdown, NO_SEND | NO_RECEIVE, 0), &[], 9)
        .unwrap();
    assert!(!connection.owes_reset, "reset before all is forwarded");
    let (mut got, mut buffer) = (0, vec![0; 1 << 16]);
    loop {
        match host.read(&mut buffer) {
            Ok(0) => break,
            Ok(count) => got += count,
            Err(_) => connection.socket_event(false, true, false),
        }
    }
    assert_eq!(got, sent);
    assert_eq!(connection.next(&mut [0; 8]).unwrap().op, Op::Reset);
    assert!(connection.is_done());
}

#[test]
fn a_host_that_half_closes_still_hears_the_guest() {
    let (mut connection, mut host) = accepted();
    host.write_all(b"question").unwrap();
    host.shutdown(Shutdown::Write).unwrap();
    let mut buffer = [0; 64];
    assert_eq!(connection.next(&mut buffer).unwrap().len, 8);
    assert_eq!(
        connection.next(&mut buffer).unwrap(),
        Outgoing {
            op: Op::Shutdown,
            flags: NO_SEND,
            len: 0
        }
    );
    data(&mut connection, b"answer").unwrap();
    assert_eq!(host.read(&mut buffer).unwrap(), 6);
}

#[test]
fn a_host_that_goes_shuts_both_ways() {
    let (mut connection, host) = accepted();
    drop(host);
    connection.socket_event(true, true, true);
    let out = connection.next(&mut [0; 8]).unwrap();
    assert_eq!(
        out,
        Outgoing {
            op: Op::Shutdown,
            flags: NO_SEND | NO_RECEIVE,
            len: 0
        }
    );
    // And what the guest still sends resets the stream.
    data(&mut connection, b"late").unwrap();
    assert_eq!(connection.next(&mut [0; 8]).unwrap().op, Op::Reset);
}

#[test]
fn data_after_the_guest_said_that_it_sends_no_more_is_a_violation() {
    let (mut connection, _host) = accepted();
    connection.receive(&packet(Op::Shutdown, NO_SEND, 0), &[], 9).unwrap();
    assert_eq!(data(&mut connection, b"x"), Err(Violation));
}

#[test]
fn forwarded_bytes_are_told_at_half_of_the_grant() {
    let (mut connection, _host) = accepted();
    data(&mut connection, &vec![0; GRANT as usize / 2 - 1]).unwrap();
    assert_eq!(connection.next(&mut [0; 8]), None);
    assert!(!connection.has_news());
    data(&mut connection, &[0]).unwrap();
    assert_eq!(connection.next(&mut [0; 8]).unwrap().op, Op::CreditUpdate);
    assert_eq!(connection.tell_forwarded(), GRANT / 2);
}

#[test]
fn a_caller_says_its_port_and_no_byte_of_the_stream_is_lost() {
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    let mut caller = Caller::new(ours).unwrap();
    assert_eq!(caller.port().unwrap(), None);
    theirs.write_all(b"CONNECT 10").unwrap();
    assert_eq!(caller.port().unwrap(), None);
    theirs.write_all(b"24\nrest").unwrap();
    assert_eq!(caller.port().unwrap(), Some(1024));
    let mut rest = [0; 4];
    caller.into_stream().read_exact(&mut rest).unwrap();
    assert_eq!(&rest, b"rest");
}

#[test]
fn callers_that_say_something_else_are_refused() {
    for line in [
        "HELLO 1\n",
        "CONNECT\n",
        "CONNECT -1\n",
        "CONNECT 4294967296\n",
        "CONNECT 1\u{fffd}\n",
        &"x".repeat(40),
    ] {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        theirs.write_all(line.as_bytes()).unwrap();
        assert!(Caller::new(ours).unwrap().port().is_err(), "{line:?}");
    }
    let (ours, theirs) = UnixStream::pair().unwrap();
    drop(theirs);
    assert!(Caller::new(ours).unwrap().port().is_err());
}
