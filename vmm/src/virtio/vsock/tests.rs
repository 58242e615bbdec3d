//! The device as a driver and host programs use and misuse it, without KVM.

use std::io::{Read, Write};
use std::sync::mpsc::{Receiver, Sender, channel};

use vm_memory::{Bytes, GuestAddress};

use super::packet::{NO_RECEIVE, NO_SEND};
use super::streams::{BUFFER_BUDGET, MAX_CONNECTIONS, MIN_GRANT};
use super::*;
use crate::virtio::testing::{Numbers, TestQueue, WRITE, activation, memory};

const CID: u64 = 3;
const TX: u64 = 0x20000;
const RX: u64 = 0x40000;
const RX_BYTES: u32 = 4096;

struct Rig {
    memory: GuestMemory,
    queues: [TestQueue; 3],
    device: Vsock,
    dialled: Receiver<Dial>,
    path: std::path::PathBuf,
    _folder: tempfile::TempDir,
}

struct Forward(Sender<Dial>);

impl Dialer for Forward {
    fn dial(&mut self, dial: Dial) -> io::Result<()> {
        if dial.port == 666 {
            return Err(io::ErrorKind::ConnectionRefused.into());
        }
        self.0.send(dial).map_err(io::Error::other)
    }
}

fn rig() -> Rig {
    let memory = memory();
    let queues = [0x1000, 0x4000, 0x7000].map(|base| TestQueue::new(&memory, base, QUEUE_SIZE));
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("vsock.sock");
    let mut device = Vsock::new(CID).unwrap();
    let (sender, dialled) = channel();
    let listener = UnixListener::bind(&path).unwrap();
    device
        .bind(VsockResource {
            listener,
            dialer: Box::new(Forward(sender)),
        })
        .unwrap();
    device
        .activate(activation(&memory, 0, &[&queues[0], &queues[1], &queues[2]]))
        .unwrap();
    let mut rig = Rig {
        memory,
        queues,
        device,
        dialled,
        path,
        _folder: folder,
    };
    rig.give_buffers(32);
    rig
}

fn packet(op: Op, host_port: u32, guest_port: u32) -> Header {
    Header {
        source_cid: CID,
        destination_cid: HOST_CID,
        source_port: guest_port,
        destination_port: host_port,
        len: 0,
        kind: STREAM,
        op: Some(op),
        flags: 0,
        buffer_size: 1 << 16,
        forwarded: 0,
    }
}

impl Rig {
    fn give_buffers(&mut self, count: u32) {
        for index in 0..count {
            self.queues[RECEIVE].add(&[(RX + u64::from(index * RX_BYTES), RX_BYTES, WRITE)]);
        }
    }

    fn send(&mut self, header: Header, payload: &[u8]) {
        let header = Header {
            len: u32::try_from(payload.len()).unwrap(),
            ..header
        };
        self.send_raw(&header.to_bytes(), payload);
        assert_eq!(self.queues[TRANSMIT].used().len(), 1);
    }

    fn send_raw(&mut self, header: &[u8], payload: &[u8]) {
        self.memory.write_slice(header, GuestAddress(TX)).unwrap();
        self.memory.write_slice(payload, GuestAddress(TX + 0x100)).unwrap();
        let mut parts = vec![(TX, u32::try_from(header.len()).unwrap(), 0)];
        if !payload.is_empty() {
            parts.push((TX + 0x100, u32::try_from(payload.len()).unwrap(), 0));
        }
        self.queues[TRANSMIT].add(&parts);
        self.device.queue_event(TRANSMIT).unwrap();
    }

    /// What the device sent to the guest; its buffers are given back.
    fn received(&mut self) -> Vec<(Header, Vec<u8>)> {
        let used = self.queues[RECEIVE].used();
        let packets = used.iter().map(|&(head, len)| {
            let at: u64 = self
                .memory
                .read_obj(GuestAddress(0x1000 + u64::from(head) * 16))
                .unwrap();
            let mut bytes = vec![0; len as usize];
            self.memory.read_slice(&mut bytes, GuestAddress(at)).unwrap();
            let payload = bytes.split_off(HEADER_BYTES);
            (Header::parse(&bytes.try_into().unwrap()), payload)
        });
        let packets = packets.collect();
        self.give_buffers(u32::try_from(used.len()).unwrap());
        packets
    }

    /// Lets the device handle what its sockets have, as its thread would.
    fn sockets(&mut self) {
        let mut events = [vmm_sys_util::epoll::EpollEvent::default(); 64];
        loop {
            let count = self.device.core.epoll().wait(0, &mut events).unwrap();
            for event in &events[..count] {
                self.device.device_event(event.data(), event.event_set()).unwrap();
            }
            if count == 0 {
                break;
            }
        }
    }

    fn only(&mut self) -> (Header, Vec<u8>) {
        let mut packets = self.received();
        assert_eq!(packets.len(), 1, "{packets:?}");
        packets.remove(0)
    }
}

#[test]
fn a_host_program_reaches_a_port_in_the_guest() {
    let mut rig = rig();
    let mut host = UnixStream::connect(&rig.path).unwrap();
    host.write_all(b"CONNECT 1024\nhello").unwrap();
    rig.sockets();
    let (request, _) = rig.only();
    assert_eq!(
        (request.op, request.destination_port, request.source_cid),
        (Some(Op::Request), 1024, HOST_CID)
    );
    assert_eq!(request.buffer_size, MAX_GRANT);

    rig.send(packet(Op::Response, request.source_port, 1024), &[]);
    let (data, payload) = rig.only();
    assert_eq!((data.op, payload.as_slice()), (Some(Op::Data), b"hello".as_slice()));

    rig.send(packet(Op::Data, request.source_port, 1024), b"world");
    let expected = format!("OK {}\nworld", request.source_port);
    let mut answer = vec![0; expected.len()];
    host.read_exact(&mut answer).unwrap();
    assert_eq!(answer, expected.as_bytes());
}

#[test]
fn a_guest_program_reaches_whoever_takes_its_dial() {
    let mut rig = rig();
    rig.send(packet(Op::Request, 1024, 5000), &[]);
    assert_eq!(rig.only().0.op, Some(Op::Response));
    let dial = rig.dialled.try_recv().unwrap();
    assert_eq!(dial.port, 1024);
    let mut host = UnixStream::from(dial.fd);
    host.write_all(b"hi").unwrap();
    rig.sockets();
    assert_eq!(rig.only().1, b"hi");
    drop(host);
    rig.sockets();
    let (bye, _) = rig.only();
    assert_eq!((bye.op, bye.flags), (Some(Op::Shutdown), NO_SEND | NO_RECEIVE));
    rig.send(packet(Op::Reset, 1024, 5000), &[]);
    assert!(rig.device.streams.connections.is_empty());
    assert_eq!(rig.device.streams.granted, 0);
}

#[test]
fn a_dial_that_nobody_takes_and_packets_for_no_stream_are_reset() {
    let mut rig = rig();
    for (op, port) in [(Op::Request, 666), (Op::Data, 5), (Op::Response, 5), (Op::Shutdown, 5)] {
        rig.send(packet(op, port, 9), &[]);
        let (reset, _) = rig.only();
        assert_eq!(
            (reset.op, reset.source_port, reset.destination_port),
            (Some(Op::Reset), port, 9)
        );
    }
    rig.send(packet(Op::Reset, 5, 9), &[]);
    assert!(rig.received().is_empty());
}

#[test]
fn a_guest_that_does_not_listen_ends_the_callers_wait() {
    let mut rig = rig();
    let mut host = UnixStream::connect(&rig.path).unwrap();
    host.write_all(b"CONNECT 1\n").unwrap();
    rig.sockets();
    let (request, _) = rig.only();
    rig.send(packet(Op::Reset, request.source_port, 1), &[]);
    assert_eq!(host.read(&mut [0; 1]).unwrap(), 0);
    assert!(rig.device.streams.connections.is_empty());
}

#[test]
fn a_caller_that_goes_before_the_guest_answers_is_forgotten() {
    let mut rig = rig();
    let mut host = UnixStream::connect(&rig.path).unwrap();
    host.write_all(b"CONNECT 1\n").unwrap();
    rig.sockets();
    rig.received();
    drop(host);
    rig.sockets();
    assert_eq!(rig.only().0.op, Some(Op::Reset));
    assert!(rig.device.streams.connections.is_empty());
}

#[test]
fn malformed_packets_are_counted_and_dropped() {
    let mut rig = rig();
    let good = packet(Op::Request, 1, 1);
    rig.send_raw(&[0; 43], &[]);
    for bad in [
        Header { source_cid: 4, ..good },
        Header {
            destination_cid: 1,
            ..good
        },
        Header { len: 1, ..good },
        Header { len: u32::MAX, ..good },
    ] {
        rig.send_raw(&bad.to_bytes(), &[]);
    }
    assert_eq!(rig.device.core.counters.get("bad_packet"), 5);
    assert!(rig.received().is_empty());
    rig.send_raw(&Header { kind: 2, ..good }.to_bytes(), &[]);
    assert_eq!(rig.only().0.op, Some(Op::Reset));
}

#[test]
fn connections_memory_and_resets_are_bounded_whatever_the_guest_does() {
    let mut rig = rig();
    for port in 0..1000 {
        rig.send(packet(Op::Request, 1024, port), &[]);
        rig.send(packet(Op::Data, 99, port), &[]);
    }
    let streams = &rig.device.streams;
    assert_eq!(streams.connections.len(), MAX_CONNECTIONS);
    assert!(streams.granted <= BUFFER_BUDGET, "{}", streams.granted);
    assert!(streams.connections.values().all(|(_, c)| c.granted() >= MIN_GRANT));
    assert!(streams.resets.len() <= MAX_RESETS);
    assert!(streams.ready.len() <= MAX_CONNECTIONS);
    assert!(rig.device.core.counters.get("too_many_connections") > 0);
    assert!(rig.device.core.counters.get("resets_dropped") > 0);
    rig.device.reset();
    assert_eq!(rig.device.streams.granted, 0);
    assert_eq!(rig.dialled.try_iter().count(), MAX_CONNECTIONS);
}

#[test]
fn nothing_is_lost_while_the_guest_has_no_buffers() {
    let mut rig = rig();
    rig.send(packet(Op::Request, 1024, 1), &[]);
    let mut host = UnixStream::from(rig.dialled.try_recv().unwrap().fd);
    rig.received();
    let message: Vec<u8> = (0..60_000_u32).map(|n| n.to_le_bytes()[0]).collect();
    host.write_all(&message).unwrap();
    rig.queues[RECEIVE].used();
    let mut got = Vec::new();
    rig.sockets();
    while got.len() < message.len() {
        let packets = rig.received();
        assert!(!packets.is_empty());
        got.extend(packets.into_iter().flat_map(|(_, payload)| payload));
        rig.device.queue_event(RECEIVE).unwrap();
    }
    assert_eq!(got, message);
}

#[test]
fn save_restore_save_is_equal_and_the_driver_hears_of_lost_streams() {
    let mut rig = rig();
    rig.send(packet(Op::Request, 1024, 1), &[]);
    let saved = rig.device.save();
    rig.device = Vsock::new(CID).unwrap();
    rig.device.restore(saved.clone(), rig.memory.clone()).unwrap();
    assert_eq!(rig.device.save(), saved);
    // The driver gives event buffers late; it is told as soon as it does.
    rig.device.resume().unwrap();
    rig.memory.write_obj(7_u32, GuestAddress(TX)).unwrap();
    rig.queues[EVENT].add(&[(TX, 8, WRITE)]);
    rig.device.queue_event(EVENT).unwrap();
    assert_eq!(rig.queues[EVENT].used(), [(0, 4)]);
    assert_eq!(rig.memory.read_obj::<u32>(GuestAddress(TX)).unwrap(), 0);
}

#[test]
fn reserved_context_ids_are_refused() {
    for cid in [0, 1, 2, u64::from(u32::MAX), 1 << 40] {
        assert!(Vsock::new(cid).is_err());
    }
}

#[test]
fn random_packets_keep_every_bound() {
    let mut rig = rig();
    let mut numbers = Numbers(2);
    let mut hosts = Vec::new();
    for _ in 0..20_000 {
        let op = u16::try_from(numbers.below(9)).unwrap();
        let mut header = packet(
            Op::Request,
            1024 + u32::try_from(numbers.below(3)).unwrap(),
            u32::try_from(numbers.below(6)).unwrap(),
        );
        header.flags = u32::try_from(numbers.below(5)).unwrap();
        header.buffer_size = u32::try_from(numbers.below(1 << 32) >> numbers.below(32)).unwrap();
        header.forwarded = u32::try_from(numbers.below(1 << 32) >> numbers.below(32)).unwrap();
        let payload = vec![0; usize::try_from(numbers.below(3000)).unwrap()];
        header.len = u32::try_from(payload.len()).unwrap();
        let mut bytes = header.to_bytes();
        bytes[30..32].copy_from_slice(&op.to_le_bytes());
        rig.send_raw(&bytes, &payload);
        hosts.extend(rig.dialled.try_iter().map(|dial| UnixStream::from(dial.fd)));
        if numbers.below(4) == 0 && !hosts.is_empty() {
            let index = usize::try_from(numbers.next()).unwrap() % hosts.len();
            hosts[index].set_nonblocking(true).unwrap();
            match numbers.below(3) {
                0 => drop(hosts.swap_remove(index)),
                1 => drop(hosts[index].write(&payload)),
                _ => drop(hosts[index].read(&mut vec![0; 1 << 17])),
            }
            rig.sockets();
        }
        if numbers.below(8) == 0 {
            rig.received();
        }
        rig.queues[TRANSMIT].used();
        let streams = &rig.device.streams;
        assert!(streams.connections.len() <= 18 && streams.by_token.len() == streams.connections.len());
        assert!(streams.ready.len() <= streams.connections.len());
        assert_eq!(
            streams.granted,
            streams.connections.values().map(|(_, c)| c.granted()).sum::<u32>()
        );
    }
}
