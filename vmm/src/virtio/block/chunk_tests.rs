//! An image that lacks chunks, and chunk servers of every kind.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::time::Duration;

use flint_api::vmm::{ChunkAnswer, ChunkPlace, ChunkWanted, chunk_answer};
use flint_snapshots::chunk::ChunkId;
use flint_snapshots::device::FoundChunk;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use prost::Message;
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::control::packet::{self, Received};
use crate::virtio::rate_limit::RateLimit;
use crate::virtio::testing::{TestQueue, WRITE, activation, memory};

const HEADER: u64 = 0x10000;
const DATA: u64 = 0x20000;
const STATUS: u64 = 0x30000;
const CHUNK: [u8; 512] = [7; 512];

/// A disk of one chunk of 512 bytes, which it lacks.
struct Lacking(Option<FoundChunk>);

impl ImageSource for Lacking {
    fn size(&self) -> u64 {
        512
    }

    fn read_at(&mut self, _: u64, data: &mut [u8]) -> Result<(), ImageReadError> {
        let id = ChunkId::of(&CHUNK);
        let found = self.0.as_ref().ok_or(ImageReadError::Missing(id))?;
        let read = found.file.read_exact_at(data, found.location.offset);
        if read.is_err() || ChunkId::of(data) != id || found.location.raw_len != 512 {
            self.0 = None;
            return Err(ImageReadError::Missing(id));
        }
        Ok(())
    }

    fn learn(&mut self, id: ChunkId, chunk: FoundChunk) -> io::Result<()> {
        assert_eq!(id, ChunkId::of(&CHUNK));
        self.0 = Some(chunk);
        Ok(())
    }
}

fn pair() -> (OwnedFd, OwnedFd) {
    socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC).unwrap()
}

fn file(bytes: &[u8]) -> File {
    let file = tempfile::tempfile().unwrap();
    file.write_all_at(bytes, 0).unwrap();
    file
}

fn place(len: u32) -> chunk_answer::Result {
    chunk_answer::Result::Place(ChunkPlace {
        pack: 1,
        offset: 0,
        stored_length: len,
        length: len,
    })
}

struct Rig {
    queue: TestQueue,
    memory: GuestMemory,
    device: Block,
    server: OwnedFd,
}

impl Rig {
    fn new(deadline: Duration) -> Self {
        let memory = memory();
        let queue = TestQueue::new(&memory, 0x1000, QUEUE_SIZE);
        let slot = BlockSlot {
            serial: "image-0".to_owned(),
            read_only: true,
            queues: 1,
        };
        let features = slot.features();
        let mut device = Block::new(slot).unwrap();
        let (server, ours) = pair();
        let chunks = Chunks::new(ours, deadline).unwrap();
        let resource = BlockResource::image(Box::new(Lacking(None)), Some(chunks), RateLimit::default());
        device.bind(resource.unwrap()).unwrap();
        device.activate(activation(&memory, features, &[&queue])).unwrap();
        Self {
            queue,
            memory,
            device,
            server,
        }
    }

    fn patient() -> Self {
        Self::new(Duration::from_secs(600))
    }

    /// The guest reads the sector.
    fn read(&mut self) {
        self.memory
            .write_obj(blk::VIRTIO_BLK_T_IN, GuestAddress(HEADER))
            .unwrap();
        self.memory.write_obj(0_u64, GuestAddress(HEADER + 8)).unwrap();
        self.memory.write_obj(0xff_u8, GuestAddress(STATUS)).unwrap();
        self.queue
            .add(&[(HEADER, 16, 0), (DATA, 512, WRITE), (STATUS, 1, WRITE)]);
        self.device.queue_event(0).unwrap();
    }

    fn question(&self) -> ChunkId {
        question(&self.server)
    }

    fn answer(&mut self, result: chunk_answer::Result, files: &[&File]) {
        self.send(&of(ChunkId::of(&CHUNK), result), files);
    }

    fn send(&mut self, bytes: &[u8], files: &[&File]) {
        let files: Vec<_> = files.iter().map(|file| file.as_fd()).collect();
        packet::send(self.server.as_fd(), bytes, &files).unwrap();
        self.hear();
    }

    fn hear(&mut self) {
        self.device.device_event(TOKEN_CHUNKS, EventSet::IN).unwrap();
    }

    fn expire(&mut self) {
        wait_readable(self.device.chunks().unwrap().0.timer());
        self.device.device_event(TOKEN_CHUNK_TIMER, EventSet::IN).unwrap();
    }

    fn waits(&mut self) -> bool {
        self.queue.used().is_empty()
    }

    /// The status of the read, which has ended.
    fn status(&mut self) -> u8 {
        assert_eq!(self.queue.used().len(), 1, "the read has not ended");
        self.memory.read_obj(GuestAddress(STATUS)).unwrap()
    }

    fn count(&self, name: &str) -> u64 {
        self.device.core.counters.get(name)
    }
}

fn question(server: &OwnedFd) -> ChunkId {
    wait_readable(server.as_raw_fd());
    let Received::Packet { bytes, fds } = packet::receive(server.as_fd()).unwrap() else {
        panic!("no question")
    };
    assert!(fds.is_empty());
    let id = ChunkWanted::decode(&bytes[..]).unwrap().id;
    ChunkId::from_bytes(id.try_into().unwrap())
}

fn of(id: ChunkId, result: chunk_answer::Result) -> Vec<u8> {
    let answer = ChunkAnswer {
        id: id.as_bytes().to_vec(),
        result: Some(result),
    };
    answer.encode_to_vec()
}

fn wait_readable(fd: i32) {
    let mut poll = libc::pollfd {
        fd,
        events: libc::POLLIN,
        revents: 0,
    };
    // SAFETY: one valid pollfd.
    assert_eq!(unsafe { libc::poll(&raw mut poll, 1, 10_000) }, 1, "nothing to read");
}

#[test]
fn a_read_waits_for_its_chunk_in_the_ring_and_gets_its_bytes() {
    let mut rig = Rig::patient();
    rig.read();
    assert!(rig.waits());
    assert_eq!(rig.question(), ChunkId::of(&CHUNK));
    rig.answer(place(512), &[&file(&CHUNK)]);
    assert_eq!(rig.status(), 0);
    assert_eq!(rig.memory.read_obj::<[u8; 32]>(GuestAddress(DATA)).unwrap(), [7; 32]);
    rig.read();
    assert_eq!((rig.status(), rig.count("chunk_asked")), (0, 1));
}

#[test]
fn what_cannot_be_had_is_an_error_of_that_read_and_asked_for_by_the_next() {
    let mut rig = Rig::patient();
    rig.read();
    rig.question();
    rig.answer(chunk_answer::Result::Refused("no layer has it".into()), &[]);
    assert_eq!(rig.status(), 1);
    rig.read();
    assert!(rig.waits());
    rig.question();
    rig.answer(place(512), &[&file(&CHUNK)]);
    assert_eq!(rig.status(), 0);
}

#[test]
fn other_bytes_and_other_lengths_never_reach_the_guest() {
    let (wrong, short) = (file(&[8; 512]), file(&[7; 100]));
    for (result, file) in [(place(512), &wrong), (place(512), &short), (place(100), &short)] {
        let mut rig = Rig::patient();
        rig.read();
        rig.answer(result, &[file]);
        assert_eq!((rig.status(), rig.count("chunk_wrong")), (1, 1));
    }
}

#[test]
fn a_server_that_says_nothing_costs_a_read_its_deadline_and_no_more() {
    let mut rig = Rig::new(Duration::from_millis(20));
    rig.read();
    assert!(rig.waits());
    rig.expire();
    assert_eq!((rig.status(), rig.count("chunk_timed_out")), (1, 1));
    rig.read();
    assert_eq!(
        (rig.question(), rig.question()),
        (ChunkId::of(&CHUNK), ChunkId::of(&CHUNK))
    );
    rig.answer(place(512), &[&file(&CHUNK)]);
    assert_eq!(rig.status(), 0);
}

#[test]
fn a_read_outlives_the_server_and_the_next_one_is_asked() {
    let mut rig = Rig::patient();
    rig.read();
    rig.question();
    let (next, theirs) = pair();
    rig.server = next;
    rig.hear();
    assert!(rig.waits());
    assert_eq!(rig.count("chunk_server_lost"), 1);
    rig.device.serve_chunks(theirs).unwrap();
    rig.question();
    rig.answer(place(512), &[&file(&CHUNK)]);
    assert_eq!(rig.status(), 0);
}

#[test]
fn a_read_that_begins_while_there_is_no_server_waits_for_one() {
    let mut rig = Rig::patient();
    let (next, theirs) = pair();
    rig.server = next;
    rig.hear();
    rig.read();
    assert!(rig.waits());
    rig.device.serve_chunks(theirs).unwrap();
    rig.question();
    rig.answer(place(512), &[&file(&CHUNK)]);
    assert_eq!(rig.status(), 0);
}

#[test]
fn answers_that_break_the_protocol_are_counted_and_the_read_waits_on() {
    let mut rig = Rig::patient();
    rig.read();
    let (id, good) = (ChunkId::of(&CHUNK), file(&CHUNK));
    let other = ChunkId::of(b"another");
    let empty = ChunkAnswer {
        id: id.as_bytes().to_vec(),
        result: None,
    };
    let hostile: [(Vec<u8>, &[&File]); 7] = [
        (b"\xff\xff\xff".to_vec(), &[]),
        (empty.encode_to_vec(), &[]),
        (of(other, place(512)), &[&good]),
        (of(id, place(512)), &[]),
        (of(id, place(512)), &[&good, &good]),
        (of(id, chunk_answer::Result::Refused("no".into())), &[&good]),
        (vec![0; 100_000], &[]),
    ];
    for (number, (bytes, files)) in (1..).zip(hostile) {
        rig.send(&bytes, files);
        assert!(rig.waits(), "packet {number} ended the read");
        assert_eq!(rig.count("chunk_bad_answer"), number);
    }
    rig.answer(place(512), &[&good]);
    assert_eq!(rig.status(), 0);
    // Nobody has asked for this one.
    rig.answer(place(512), &[&good]);
    assert_eq!(rig.count("chunk_bad_answer"), 8);
}

#[test]
fn a_server_that_sends_without_end_is_let_go() {
    let mut rig = Rig::patient();
    rig.read();
    // One behind the other, as fast as it can: the socket of a test holds fewer, so the device listens more than once.
    for _ in 0..4 {
        while packet::send(rig.server.as_fd(), b"x", &[]).is_ok() {}
        rig.hear();
    }
    assert_eq!(rig.count("chunk_server_lost"), 1);
    assert!(rig.waits());
}

#[test]
fn a_device_that_waits_can_be_paused_and_saved_and_asks_again_when_it_goes_on() {
    let mut rig = Rig::patient();
    rig.read();
    rig.question();
    rig.device.quiesce().unwrap();
    assert!(rig.waits());
    assert!(rig.device.has_work(), "the request is not in the ring");
    let saved = rig.device.save();
    // What comes meanwhile is left where it is.
    packet::send(
        rig.server.as_fd(),
        &of(ChunkId::of(&CHUNK), place(512)),
        &[file(&CHUNK).as_fd()],
    )
    .unwrap();
    assert_eq!(rig.device.save(), saved);
    rig.device.resume().unwrap();
    rig.question();
    rig.answer(place(512), &[&file(&CHUNK)]);
    assert_eq!(rig.status(), 0);
}

#[test]
fn a_reset_forgets_who_waited() {
    let mut rig = Rig::patient();
    rig.read();
    rig.device.reset();
    rig.answer(place(512), &[&file(&CHUNK)]);
    assert!(rig.waits());
    assert_eq!(rig.count("chunk_bad_answer"), 1);
}

#[test]
fn only_an_image_with_a_server_takes_another() {
    let mut device = Block::new(BlockSlot {
        serial: "image-0".to_owned(),
        read_only: true,
        queues: 1,
    })
    .unwrap();
    assert!(matches!(device.serve_chunks(pair().0), Err(DeviceError::Refused(_))));
    let image = BlockResource::image(Box::new(Lacking(None)), None, RateLimit::default());
    device.bind(image.unwrap()).unwrap();
    assert!(matches!(device.serve_chunks(pair().0), Err(DeviceError::Refused(_))));
}
