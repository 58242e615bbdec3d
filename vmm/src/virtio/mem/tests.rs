//! A virtio-mem device driven by a driver, good and bad.

use vm_memory::{Bytes, GuestMemoryMmap};

use super::*;
use crate::virtio::testing::{Numbers, TestQueue, WRITE, activation};

/// Above the rings, which are in the first MiB.
const START: u64 = 1 << 30;
const BLOCKS: u64 = 8;
const REQUEST: u64 = 0x10000;
const RESPONSE: u64 = 0x11000;

const PLUG: u16 = 0;
const UNPLUG: u16 = 1;
const UNPLUG_ALL: u16 = 2;
const STATE: u16 = 3;

const ACK: (u16, u16) = (0, 0);
const NACK: (u16, u16) = (1, 0);
const ERROR: (u16, u16) = (3, 0);

struct Rig {
    memory: GuestMemory,
    queue: TestQueue,
    device: Mem,
}

fn slot() -> MemSlot {
    MemSlot {
        start: START,
        size: BLOCKS * BLOCK,
    }
}

fn rig() -> Rig {
    let regions = [(GuestAddress(0), 1 << 20), (GuestAddress(START), 16 << 20)];
    let memory: GuestMemory = Arc::new(GuestMemoryMmap::from_ranges(&regions).unwrap());
    let queue = TestQueue::new(&memory, 0x1000, QUEUE_SIZE);
    let mut device = Mem::new(slot()).unwrap();
    device.core.driver_ready();
    device.activate(activation(&memory, 0, &[&queue])).unwrap();
    Rig { memory, queue, device }
}

impl Rig {
    /// Asks for something of `blocks` blocks from the region's block `first` on; type and state of the response.
    fn ask(&mut self, kind: u16, first: u64, blocks: u16) -> (u16, u16) {
        self.ask_at(kind, START + first * BLOCK, blocks)
    }

    fn ask_at(&mut self, kind: u16, address: u64, blocks: u16) -> (u16, u16) {
        let mut request = [0; REQUEST_BYTES];
        request[..2].copy_from_slice(&kind.to_le_bytes());
        request[8..16].copy_from_slice(&address.to_le_bytes());
        request[16..18].copy_from_slice(&blocks.to_le_bytes());
        self.memory.write_slice(&request, GuestAddress(REQUEST)).unwrap();
        self.memory.write_slice(&[0xee; 10], GuestAddress(RESPONSE)).unwrap();
        self.queue.add(&[(REQUEST, 24, 0), (RESPONSE, 10, WRITE)]);
        self.device.queue_event(0).unwrap();
        assert_eq!(self.queue.used().last().map(|used| used.1), Some(10));
        let word = |at| self.memory.read_obj(GuestAddress(RESPONSE + at)).unwrap();
        (word(0), word(8))
    }

    fn request_blocks(&mut self, blocks: u64) {
        self.device.bind(Requested { bytes: blocks * BLOCK }).unwrap();
    }

    fn sizes(&self) -> (u64, u64) {
        let (requested, plugged) = Mem::sizes(&self.device.core);
        (requested / BLOCK, plugged / BLOCK)
    }
}

#[test]
fn a_driver_plugs_as_much_as_was_requested_and_no_more() {
    let mut rig = rig();
    assert_eq!(rig.ask(PLUG, 0, 1), NACK);
    rig.request_blocks(3);
    assert_eq!(rig.device.core.interrupt.status() & 2, 2, "the driver is told");
    assert_eq!(
        (rig.ask(PLUG, 0, 2), rig.ask(PLUG, 2, 2), rig.ask(PLUG, 7, 1)),
        (ACK, NACK, ACK)
    );
    assert_eq!(rig.sizes(), (3, 3));
    assert_eq!(
        [(0, 2), (2, 5), (6, 2)].map(|(first, blocks)| rig.ask(STATE, first, blocks).1),
        [0, 1, 2]
    );
}

#[test]
fn what_is_unplugged_is_dropped_and_the_rest_stays() {
    let mut rig = rig();
    rig.request_blocks(4);
    assert_eq!(rig.ask(PLUG, 0, 4), ACK);
    for block in 0..4 {
        rig.memory
            .write_obj(!0u64, GuestAddress(START + block * BLOCK))
            .unwrap();
    }
    rig.request_blocks(2);
    assert_eq!(rig.ask(UNPLUG, 1, 2), ACK);
    let words = [0, 1, 2, 3].map(|block| rig.memory.read_obj::<u64>(GuestAddress(START + block * BLOCK)).unwrap());
    assert_eq!((words, rig.sizes()), ([!0, 0, 0, !0], (2, 2)));
    assert_eq!(rig.ask(UNPLUG_ALL, 0, 0), ACK);
    assert_eq!(
        (rig.memory.read_obj::<u64>(GuestAddress(START)).unwrap(), rig.sizes()),
        (0, (2, 0))
    );
}

#[test]
fn requests_that_make_no_sense_are_errors_and_change_nothing() {
    let mut rig = rig();
    rig.request_blocks(BLOCKS);
    assert_eq!(rig.ask(PLUG, 2, 2), ACK);
    let before = rig.device.save();
    for (kind, address, blocks) in [
        (PLUG, START + 2 * BLOCK, 1),   // plugged already
        (PLUG, START + BLOCK, 2),       // in part
        (UNPLUG, START, 1),             // not plugged
        (UNPLUG, START + 3 * BLOCK, 2), // in part
        (PLUG, START + 7 * BLOCK, 2),   // beyond the end
        (STATE, START + 8 * BLOCK, 1),
        (PLUG, START - BLOCK, 2), // before the start
        (PLUG, START + 4096, 1),  // no block
        (PLUG, START, 0),         // nothing
        (UNPLUG, u64::MAX, u16::MAX),
        (PLUG, 0, 1), // boot memory
        (4, START, 1),
        (u16::MAX, START, 1),
    ] {
        assert_eq!(rig.ask_at(kind, address, blocks), ERROR, "{kind} {address:#x} {blocks}");
    }
    assert_eq!(rig.device.core.counters.get("bad_request"), 13);
    let after = rig.device.save();
    assert_eq!((after.plugged, after.requested), (before.plugged, before.requested));
}

#[test]
fn a_chain_without_room_for_request_or_response_comes_back_empty() {
    let mut rig = rig();
    rig.queue.add(&[(REQUEST, 23, 0), (RESPONSE, 10, WRITE)]);
    rig.queue.add(&[(REQUEST, 24, 0), (RESPONSE, 9, WRITE)]);
    rig.queue.add(&[(REQUEST, 24, 0)]);
    rig.device.queue_event(0).unwrap();
    assert_eq!(rig.queue.used(), [(0, 0), (2, 0), (4, 0)]);
    assert_eq!(rig.device.core.counters.get("bad_chain"), 3);
}

#[test]
fn sizes_and_regions_that_are_no_blocks_are_refused() {
    let mut rig = rig();
    for bytes in [1, BLOCK + 4096, (BLOCKS + 1) * BLOCK, u64::MAX] {
        assert!(
            matches!(rig.device.bind(Requested { bytes }), Err(DeviceError::Invalid(_))),
            "{bytes}"
        );
    }
    for (start, size) in [(START + 4096, BLOCK), (START, 4096), (u64::MAX - BLOCK + 1, 2 * BLOCK)] {
        assert!(Mem::new(MemSlot { start, size }).is_err(), "{start:#x}+{size:#x}");
    }
}

#[test]
fn save_restore_save_is_equal_and_tells_what_is_plugged() {
    let mut rig = rig();
    rig.request_blocks(5);
    assert_eq!((rig.ask(PLUG, 1, 2), rig.ask(PLUG, 7, 1)), (ACK, ACK));
    let saved = rig.device.save();
    let ranges = saved.plugged_ranges().unwrap();
    assert_eq!(
        ranges,
        [START + BLOCK..START + 3 * BLOCK, START + 7 * BLOCK..START + 8 * BLOCK]
    );
    let mut restored = Mem::new(slot()).unwrap();
    restored.restore(saved.clone(), rig.memory.clone()).unwrap();
    assert_eq!(restored.save(), saved);
    assert_eq!(Mem::sizes(&restored.core), (5 * BLOCK, 3 * BLOCK));
}

#[test]
fn a_state_of_another_region_or_with_blocks_beyond_it_is_refused() {
    let rig = rig();
    let good = rig.device.save();
    type Spoil = fn(&mut MemState);
    let spoils: [Spoil; 5] = [
        |state| state.start += BLOCK,
        |state| state.size = 4 * BLOCK,
        |state| state.requested = 9 * BLOCK,
        |state| state.plugged = vec![1 << 8],
        |state| state.plugged.push(0),
    ];
    for spoil in spoils {
        let mut state = good.clone();
        spoil(&mut state);
        let refused = Mem::new(slot()).unwrap().restore(state, rig.memory.clone());
        assert!(matches!(refused, Err(DeviceError::State(_))));
    }
}

#[test]
fn whatever_is_asked_plugged_memory_stays_within_what_was_requested() {
    let mut rig = rig();
    let mut numbers = Numbers(11);
    for _ in 0..2000 {
        if numbers.below(8) == 0 {
            let (_, plugged) = rig.sizes();
            // Shrinking leaves what is plugged until the driver unplugs it.
            rig.request_blocks(plugged.max(numbers.below(BLOCKS + 1)));
        }
        let kind = u16::try_from(numbers.below(5)).unwrap();
        let blocks = u16::try_from(numbers.below(5)).unwrap();
        rig.ask(kind, numbers.below(BLOCKS + 2), blocks);
        let (requested, plugged) = rig.sizes();
        assert!(plugged <= requested);
        assert_eq!(plugged, rig.device.plugged.count());
    }
}
