//! Block requests as a driver makes them, good and hostile, without KVM.

use std::fs::File;
use std::os::unix::fs::FileExt;

use flint_snapshots::chunk::ChunkId;
use flint_snapshots::device::FoundChunk;
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use super::*;
use crate::memory::dirty;
use crate::memory::pages::Pages;
use crate::virtio::rate_limit::RateLimit;
use crate::virtio::testing::{NEXT, Numbers, TestQueue, WRITE, activation, memory};

const HEADER: u64 = 0x10000;
const DATA: u64 = 0x20000;
const STATUS: u64 = 0x30000;
const DISK_SECTORS: u64 = 64;

struct Rig {
    memory: GuestMemory,
    queue: TestQueue,
    device: Block,
    file: File,
}

fn slot(read_only: bool) -> BlockSlot {
    BlockSlot {
        serial: "scratch".to_owned(),
        read_only,
        queues: 1,
    }
}

fn disk_file() -> File {
    let file = tempfile::tempfile().unwrap();
    let contents: Vec<u8> = (0..DISK_SECTORS)
        .flat_map(|n| [u8::try_from(n).unwrap(); 512])
        .collect();
    file.write_all_at(&contents, 0).unwrap();
    file
}

fn rig_with(read_only: bool, features: u64, limit: RateLimit) -> Rig {
    let memory = memory();
    let queue = TestQueue::new(&memory, 0x1000, QUEUE_SIZE);
    let mut device = Block::new(slot(read_only)).unwrap();
    let file = disk_file();
    device
        .bind(BlockResource::raw_file(file.try_clone().unwrap(), false, limit).unwrap())
        .unwrap();
    device
        .activate(activation(&memory, features | feature(VIRTIO_F_VERSION_1), &[&queue]))
        .unwrap();
    Rig {
        memory,
        queue,
        device,
        file,
    }
}

fn rig() -> Rig {
    rig_with(false, slot(false).features(), RateLimit::default())
}

impl Rig {
    fn header(&self, kind: u32, sector: u64) {
        self.memory.write_obj(kind, GuestAddress(HEADER)).unwrap();
        self.memory.write_obj(0_u32, GuestAddress(HEADER + 4)).unwrap();
        self.memory.write_obj(sector, GuestAddress(HEADER + 8)).unwrap();
        self.memory.write_obj(0xff_u8, GuestAddress(STATUS)).unwrap();
    }

    fn status(&self) -> u8 {
        self.memory.read_obj(GuestAddress(STATUS)).unwrap()
    }

    fn run(&mut self) -> Vec<(u32, u32)> {
        self.device.queue_event(0).unwrap();
        self.device.quiesce().unwrap();
        self.queue.used()
    }

    /// One request with these parts between header and status; returns status and used length.
    fn request(&mut self, kind: u32, sector: u64, data: &[(u64, u32, u16)]) -> (u8, u32) {
        self.header(kind, sector);
        let mut parts = vec![(HEADER, 16, 0)];
        parts.extend_from_slice(data);
        parts.push((STATUS, 1, WRITE));
        let head = self.queue.add(&parts);
        let used = self.run();
        assert_eq!(used.len(), 1);
        assert_eq!(used[0].0, u32::from(head));
        (self.status(), used[0].1)
    }
}

#[test]
fn a_read_fills_several_descriptors_in_order() {
    let mut rig = rig();
    let outcome = rig.request(
        blk::VIRTIO_BLK_T_IN,
        3,
        &[(DATA, 100, WRITE), (DATA + 0x1000, 924, WRITE)],
    );
    assert_eq!(outcome, (0, 1025));
    let mut data = [0; 924];
    rig.memory.read_slice(&mut data, GuestAddress(DATA + 0x1000)).unwrap();
    assert_eq!((data[0], data[411], data[412], data[923]), (3, 3, 4, 4));
}

#[test]
fn what_the_kernel_writes_for_a_read_is_logged() {
    let mut rig = rig();
    let regions = rig.memory.clone();
    let region = regions.iter().next().unwrap();
    dirty(region).begin();
    assert_eq!(rig.request(blk::VIRTIO_BLK_T_IN, 3, &[(DATA, 0x1200, WRITE)]).0, 0);
    let mut pages = Pages::default();
    dirty(region).take(0, &mut pages);
    assert_eq!(pages.and(&Pages::run(0x20..0x28)), Pages::run(0x20..0x22));
}

#[test]
fn a_write_reaches_the_file_and_a_flush_succeeds() {
    let mut rig = rig();
    rig.memory.write_slice(&[0xab; 512], GuestAddress(DATA)).unwrap();
    assert_eq!(rig.request(blk::VIRTIO_BLK_T_OUT, 63, &[(DATA, 512, 0)]), (0, 1));
    assert_eq!(rig.request(blk::VIRTIO_BLK_T_FLUSH, 0, &[]), (0, 1));
    let mut data = [0; 512];
    rig.file.read_exact_at(&mut data, 63 * 512).unwrap();
    assert_eq!(data, [0xab; 512]);
}

#[test]
fn without_flush_negotiated_writes_are_durable_and_still_work() {
    let mut rig = rig_with(false, 0, RateLimit::default());
    rig.memory.write_slice(&[0xcd; 512], GuestAddress(DATA)).unwrap();
    assert_eq!(rig.request(blk::VIRTIO_BLK_T_OUT, 0, &[(DATA, 512, 0)]), (0, 1));
}

#[test]
fn header_and_status_may_share_descriptors_with_data() {
    let mut rig = rig();
    rig.header(blk::VIRTIO_BLK_T_IN, 1);
    rig.queue
        .add(&[(HEADER, 10, 0), (HEADER + 10, 6, 0), (DATA, 513, WRITE)]);
    assert_eq!(rig.run(), [(0, 513)]);
    assert_eq!(rig.memory.read_obj::<u8>(GuestAddress(DATA + 511)).unwrap(), 1);
    assert_eq!(rig.memory.read_obj::<u8>(GuestAddress(DATA + 512)).unwrap(), 0);
}

#[test]
fn the_serial_is_given_and_ends_with_zero() {
    let mut rig = rig();
    assert_eq!(rig.request(blk::VIRTIO_BLK_T_GET_ID, 0, &[(DATA, 20, WRITE)]).0, 0);
    let mut serial = [1; 20];
    rig.memory.read_slice(&mut serial, GuestAddress(DATA)).unwrap();
    assert_eq!(&serial[..8], b"scratch\0");
    assert_eq!(rig.request(blk::VIRTIO_BLK_T_GET_ID, 0, &[(DATA, 19, WRITE)]).0, 1);
}

#[test]
fn discard_and_write_zeroes_clear_their_range_only() {
    let mut rig = rig();
    for (kind, sector, flags) in [
        (blk::VIRTIO_BLK_T_DISCARD, 8_u64, 0_u32),
        (blk::VIRTIO_BLK_T_WRITE_ZEROES, 24, 1),
    ] {
        rig.memory.write_obj(sector, GuestAddress(DATA)).unwrap();
        rig.memory.write_obj(8_u32, GuestAddress(DATA + 8)).unwrap();
        rig.memory.write_obj(flags, GuestAddress(DATA + 12)).unwrap();
        assert_eq!(rig.request(kind, 0, &[(DATA, 16, 0)]), (0, 1));
        let mut data = [9; 10 * 512];
        rig.file.read_exact_at(&mut data, (sector - 1) * 512).unwrap();
        assert_ne!(data[511], 0);
        assert!(data[512..9 * 512].iter().all(|byte| *byte == 0));
        assert_ne!(data[9 * 512], 0);
    }
}

#[test]
fn requests_beyond_the_end_or_uneven_are_refused() {
    let mut rig = rig();
    for (sector, len) in [
        (64, 512),
        (63, 1024),
        (u64::MAX, 512),
        (u64::MAX >> 9, 512),
        (1 << 55, 512),
        (0, 100),
    ] {
        assert_eq!(
            rig.request(blk::VIRTIO_BLK_T_IN, sector, &[(DATA, len, WRITE)]),
            (1, 1),
            "{sector} {len}"
        );
    }
    assert_eq!(rig.device.core.counters.get("refused_request"), 6);
}

#[test]
fn data_in_the_wrong_direction_is_refused() {
    let mut rig = rig();
    assert_eq!(rig.request(blk::VIRTIO_BLK_T_IN, 0, &[(DATA, 512, 0)]).0, 1);
    assert_eq!(rig.request(blk::VIRTIO_BLK_T_OUT, 0, &[(DATA, 512, WRITE)]).0, 1);
    assert_eq!(rig.request(77, 0, &[]).0, 2);
}

#[test]
fn a_read_only_slot_refuses_all_that_writes() {
    let mut rig = rig_with(true, slot(true).features(), RateLimit::default());
    assert_eq!(rig.request(blk::VIRTIO_BLK_T_OUT, 0, &[(DATA, 512, 0)]).0, 1);
    assert_eq!(rig.request(blk::VIRTIO_BLK_T_DISCARD, 0, &[(DATA, 16, 0)]).0, 2);
    assert_eq!(rig.request(blk::VIRTIO_BLK_T_IN, 0, &[(DATA, 512, WRITE)]).0, 0);
}

#[test]
fn bad_chains_come_back_unused_and_are_counted() {
    let mut rig = rig();
    let loops = |queue: &TestQueue| queue.descriptor(0, HEADER, 16, NEXT, 0);
    let beyond_table = |queue: &TestQueue| queue.descriptor(0, HEADER, 16, NEXT, QUEUE_SIZE);
    let beyond_memory = |queue: &TestQueue| queue.descriptor(0, (1 << 20) - 8, 16, 0, 0);
    let wraps = |queue: &TestQueue| queue.descriptor(0, u64::MAX - 7, 16, 0, 0);
    let empty = |queue: &TestQueue| queue.descriptor(0, HEADER, 0, 0, 0);
    let no_status = |queue: &TestQueue| queue.descriptor(0, HEADER, 16, 0, 0);
    let order = |queue: &TestQueue| {
        queue.descriptor(0, DATA, 16, NEXT | WRITE, 1);
        queue.descriptor(1, HEADER, 16, 0, 0);
    };
    let huge_table = |queue: &TestQueue| queue.descriptor(0, DATA, !15, 4, 0);
    let tricks: [&dyn Fn(&TestQueue); 8] = [
        &loops,
        &beyond_table,
        &beyond_memory,
        &wraps,
        &empty,
        &no_status,
        &order,
        &huge_table,
    ];
    for (index, trick) in (1..).zip(tricks) {
        trick(&rig.queue);
        rig.queue.offer(0);
        assert_eq!(rig.run(), [(0, 0)]);
        assert_eq!(rig.device.core.counters.get("bad_chain"), index);
    }
    // And the device still works.
    assert_eq!(rig.request(blk::VIRTIO_BLK_T_IN, 0, &[(DATA, 512, WRITE)]).0, 0);
}

#[test]
fn a_head_beyond_the_table_or_a_leaping_index_stops_the_device() {
    let mut rig = rig();
    rig.queue.offer(QUEUE_SIZE);
    assert!(rig.device.queue_event(0).is_err());

    let mut rig = self::rig();
    rig.queue.set_available(QUEUE_SIZE + 1);
    assert!(rig.device.queue_event(0).is_err());
}

#[test]
fn a_header_rewritten_in_flight_changes_nothing() {
    let mut rig = rig();
    rig.header(blk::VIRTIO_BLK_T_IN, 5);
    rig.queue
        .add(&[(HEADER, 16, 0), (DATA, 512, WRITE), (STATUS, 1, WRITE)]);
    rig.device.queue_event(0).unwrap();
    rig.header(blk::VIRTIO_BLK_T_OUT, u64::MAX);
    for index in 0..3 {
        rig.queue.descriptor(index, u64::MAX, u32::MAX, NEXT, index);
    }
    rig.device.quiesce().unwrap();
    assert_eq!(rig.queue.used(), [(0, 513)]);
    assert_eq!(rig.status(), 0);
    assert_eq!(rig.memory.read_obj::<u8>(GuestAddress(DATA)).unwrap(), 5);
}

#[test]
fn more_requests_than_the_ring_holds_all_finish() {
    let mut rig = rig();
    rig.header(blk::VIRTIO_BLK_T_IN, 2);
    for index in 0..100 {
        // All chains share three descriptors; each has its own place in the available ring.
        if index == 0 {
            rig.queue
                .add(&[(HEADER, 16, 0), (DATA, 512, WRITE), (STATUS, 1, WRITE)]);
        } else {
            rig.queue.offer(0);
        }
    }
    rig.device.queue_event(0).unwrap();
    let mut used = 0;
    // Each round: wait for what is in flight, then go on as on the ring's event.
    while used < 100 {
        rig.device.quiesce().unwrap();
        let count = rig.queue.used().len();
        assert!(count > 0 && count <= 64);
        used += count;
        rig.device.device_event(TOKEN_RING, EventSet::IN).unwrap();
    }
    assert_eq!(used, 100);
}

#[test]
fn an_exhausted_rate_limit_holds_requests_back_until_its_timer_fires() {
    let limit = RateLimit {
        operations_per_second: 1000,
        burst_operations: 1,
        ..RateLimit::default()
    };
    let mut rig = rig_with(false, slot(false).features(), limit);
    rig.header(blk::VIRTIO_BLK_T_IN, 0);
    for _ in 0..3 {
        rig.queue
            .add(&[(HEADER, 16, 0), (DATA, 512, WRITE), (STATUS, 1, WRITE)]);
    }
    let mut used = 0;
    rig.device.queue_event(0).unwrap();
    while used < 3 {
        rig.device.complete(true).unwrap();
        used += rig.queue.used().len();
        if used < 3 {
            // Blocks until the timer fires: if it were not armed, the test would hang.
            wait_readable(rig.device.bound.as_ref().unwrap().limiter.timer().unwrap());
            rig.device.device_event(TOKEN_LIMITER, EventSet::IN).unwrap();
        }
    }
    assert!(rig.device.core.counters.get("rate_limited") >= 1);
}

fn wait_readable(fd: i32) {
    let mut poll = libc::pollfd {
        fd,
        events: libc::POLLIN,
        revents: 0,
    };
    // SAFETY: one valid pollfd.
    assert_eq!(unsafe { libc::poll(&raw mut poll, 1, -1) }, 1);
}

#[test]
fn a_reset_lets_go_of_guest_memory_with_requests_in_flight() {
    let mut rig = rig();
    rig.header(blk::VIRTIO_BLK_T_IN, 0);
    for _ in 0..20 {
        rig.queue
            .add(&[(HEADER, 16, 0), (DATA, 512, WRITE), (STATUS, 1, WRITE)]);
    }
    rig.device.queue_event(0).unwrap();
    rig.device.reset();
    // Ours and the queue's: the device has none left.
    assert_eq!(Arc::strong_count(&rig.memory), 2);
    assert_eq!(rig.queue.used(), []);
    // A new driver starts from nothing.
    let fresh = TestQueue::new(&rig.memory, 0x8000, QUEUE_SIZE);
    rig.device.activate(activation(&rig.memory, 0, &[&fresh])).unwrap();
    rig.queue = fresh;
    assert_eq!(rig.request(blk::VIRTIO_BLK_T_IN, 7, &[(DATA, 512, WRITE)]).0, 0);
}

#[test]
fn a_slot_bound_late_changes_capacity_and_tells_the_driver() {
    let memory = memory();
    let queue = TestQueue::new(&memory, 0x1000, QUEUE_SIZE);
    let mut device = Block::new(slot(false)).unwrap();
    device.core.driver_ready();
    device
        .activate(activation(&memory, slot(false).features(), &[&queue]))
        .unwrap();
    let mut rig = Rig {
        memory,
        queue,
        device,
        file: disk_file(),
    };
    assert_eq!(rig.request(blk::VIRTIO_BLK_T_IN, 0, &[(DATA, 512, WRITE)]).0, 1);
    assert_eq!(rig.request(blk::VIRTIO_BLK_T_FLUSH, 0, &[]).0, 0);

    let disk = BlockResource::raw_file(rig.file.try_clone().unwrap(), true, RateLimit::default()).unwrap();
    rig.device.bind(disk).unwrap();
    let mut capacity = [0; 8];
    rig.device.core.config.read(0, &mut capacity);
    assert_eq!(u64::from_le_bytes(capacity), DISK_SECTORS);
    assert_eq!(rig.device.core.interrupt.status() & 2, 2);
    assert_eq!(rig.request(blk::VIRTIO_BLK_T_IN, 0, &[(DATA, 512, WRITE)]).0, 0);

    let again = BlockResource::raw_file(rig.file.try_clone().unwrap(), false, RateLimit::default()).unwrap();
    assert!(matches!(rig.device.bind(again), Err(DeviceError::AlreadyBound)));
}

struct FakeImage;

impl ImageSource for FakeImage {
    fn size(&self) -> u64 {
        (1 << 20) + 17
    }

    fn read_at(&mut self, offset: u64, data: &mut [u8]) -> Result<(), ImageReadError> {
        if offset >= 512 << 10 {
            return Err(ImageReadError::Failed(std::io::Error::other("the table is damaged")));
        }
        data.fill(u8::try_from(offset >> 12 & 0xff).unwrap());
        Ok(())
    }

    fn learn(&mut self, _: ChunkId, _: FoundChunk) -> std::io::Result<()> {
        Ok(())
    }
}

#[test]
fn an_image_is_read_through_and_its_failures_are_io_errors() {
    let memory = memory();
    let queue = TestQueue::new(&memory, 0x1000, QUEUE_SIZE);
    let mut device = Block::new(slot(true)).unwrap();
    device
        .bind(BlockResource::image(Box::new(FakeImage), None, RateLimit::default()).unwrap())
        .unwrap();
    device
        .activate(activation(&memory, slot(true).features(), &[&queue]))
        .unwrap();
    let mut rig = Rig {
        memory,
        queue,
        device,
        file: disk_file(),
    };
    assert_eq!(
        rig.request(blk::VIRTIO_BLK_T_IN, 8, &[(0x40000, 160 << 10, WRITE)]),
        (0, (160 << 10) + 1)
    );
    assert_eq!(rig.memory.read_obj::<u8>(GuestAddress(0x40000)).unwrap(), 1);
    assert_eq!(rig.request(blk::VIRTIO_BLK_T_IN, 1024, &[(DATA, 512, WRITE)]).0, 1);
    assert_eq!(rig.request(blk::VIRTIO_BLK_T_IN, 2047, &[(DATA, 512, WRITE)]).0, 1);
    assert!(rig.device.core.counters.get("image_read_failed") >= 1);
}

#[test]
fn a_read_only_disk_does_not_go_behind_a_writable_slot() {
    let mut device = Block::new(slot(false)).unwrap();
    let image = BlockResource::image(Box::new(FakeImage), None, RateLimit::default()).unwrap();
    assert!(matches!(device.bind(image), Err(DeviceError::Refused(_))));
}

#[test]
fn slots_and_files_that_cannot_be_are_refused() {
    for bad in [
        BlockSlot {
            serial: "x".repeat(21),
            ..slot(false)
        },
        BlockSlot {
            queues: 0,
            ..slot(false)
        },
        BlockSlot {
            queues: 17,
            ..slot(false)
        },
    ] {
        assert!(Block::new(bad).is_err());
    }
    let uneven = tempfile::tempfile().unwrap();
    uneven.set_len(1000).unwrap();
    assert!(BlockResource::raw_file(uneven, false, RateLimit::default()).is_err());
    let null = File::open("/dev/null").unwrap();
    assert!(BlockResource::raw_file(null, false, RateLimit::default()).is_err());
}

#[test]
fn a_file_cut_short_behind_our_back_is_an_io_error() {
    let mut rig = rig();
    rig.file.set_len(512).unwrap();
    assert_eq!(rig.request(blk::VIRTIO_BLK_T_IN, 0, &[(DATA, 1024, WRITE)]), (1, 1));
}

#[test]
fn save_restore_save_is_equal_and_the_restored_device_goes_on() {
    let mut rig = rig();
    rig.request(blk::VIRTIO_BLK_T_IN, 0, &[(DATA, 512, WRITE)]);
    let saved = rig.device.save();
    let disk = BlockResource::raw_file(rig.file.try_clone().unwrap(), false, RateLimit::default()).unwrap();
    rig.device = Block::new(rig.device.slot.clone()).unwrap();
    rig.device.restore(saved.clone(), rig.memory.clone()).unwrap();
    rig.device.bind(disk).unwrap();
    assert_eq!(rig.device.save(), saved);
    assert_eq!(rig.request(blk::VIRTIO_BLK_T_IN, 1, &[(DATA, 512, WRITE)]).0, 0);
}

#[test]
fn random_chains_never_end_the_process() {
    let mut numbers = Numbers(1);
    let mut rig = rig();
    for _ in 0..20_000 {
        rig.header(u32::try_from(numbers.below(16)).unwrap(), numbers.below(80));
        let parts: Vec<_> = (0..numbers.below(6))
            .map(|_| {
                let addr = [HEADER, DATA, STATUS, numbers.next()][usize::try_from(numbers.below(4)).unwrap()];
                let len = [16, 512, 1, numbers.below(1 << 32)][usize::try_from(numbers.below(4)).unwrap()];
                (
                    addr,
                    u32::try_from(len).unwrap(),
                    u16::try_from(numbers.below(8)).unwrap() & !NEXT,
                )
            })
            .collect();
        if parts.is_empty() {
            rig.queue
                .offer(u16::try_from(numbers.below(u64::from(QUEUE_SIZE))).unwrap());
        } else {
            rig.queue.add(&parts);
        }
        rig.device.queue_event(0).unwrap();
        rig.device.quiesce().unwrap();
        assert_eq!(rig.queue.used().len(), 1);
    }
}
