//! A balloon driven by a driver, good and bad.

use vm_memory::Bytes;

use super::*;
use crate::virtio::testing::{Numbers, TestQueue, WRITE, activation, memory};

const DATA: u64 = 0x20000;
const FEATURES: u64 = 1 << 2 | 1 << 5;

struct Rig {
    memory: GuestMemory,
    queues: [TestQueue; 5],
    device: Balloon,
}

fn rig_with(features: u64) -> Rig {
    let memory = memory();
    let queues = [0u64, 1, 2, 3, 4].map(|index| TestQueue::new(&memory, 0x1000 + index * 0x3000, QUEUE_SIZE));
    let mut device = Balloon::new().unwrap();
    device.core.driver_ready();
    let mut activation = activation(&memory, features, &queues.each_ref());
    activation.queues[3].ready = false;
    device.activate(activation).unwrap();
    // The first 8 bytes of each page from DATA on are set.
    for page in 0..16 {
        memory.write_obj(!0u64, GuestAddress(DATA + page * PAGE)).unwrap();
    }
    Rig { memory, queues, device }
}

impl Rig {
    fn word(&self, page: u64) -> u64 {
        self.memory.read_obj(GuestAddress(DATA + page * PAGE)).unwrap()
    }

    /// Sends page numbers, which lie at the end of memory, to the inflate queue.
    fn inflate(&mut self, numbers: &[u32]) {
        let bytes: Vec<u8> = numbers.iter().flat_map(|number| number.to_le_bytes()).collect();
        self.memory.write_slice(&bytes, GuestAddress(0xf_0000)).unwrap();
        self.queues[INFLATE].add(&[(0xf_0000, u32::try_from(bytes.len()).unwrap(), 0)]);
        self.device.queue_event(INFLATE).unwrap();
    }

    fn count(&self, name: &str) -> u64 {
        self.device.core.counters.get(name)
    }
}

#[test]
fn pages_that_the_driver_gives_are_dropped_in_whatever_order_it_names_them() {
    let mut rig = rig_with(FEATURES);
    let first = u32::try_from(DATA / PAGE).unwrap();
    rig.inflate(&[first + 3, first + 2, first + 7, first + 3]);
    let left: Vec<u64> = (0..8).filter(|page| rig.word(*page) != 0).collect();
    assert_eq!(left, [0, 1, 4, 5, 6]);
    assert_eq!(rig.queues[INFLATE].used(), [(0, 0)]);
    rig.queues[DEFLATE].add(&[(0xf_0000, 4, 0)]);
    rig.device.queue_event(DEFLATE).unwrap();
    assert_eq!(rig.queues[DEFLATE].used(), [(0, 0)]);
}

#[test]
fn pages_outside_of_memory_are_refused_and_the_others_dropped() {
    let mut rig = rig_with(FEATURES);
    let first = u32::try_from(DATA / PAGE).unwrap();
    rig.inflate(&[u32::MAX, first, 0x100_0000]);
    assert_eq!((rig.word(0), rig.word(1)), (0, !0));
    assert_eq!(rig.count("bad_page"), 2);
    rig.queues[INFLATE].add(&[(0xf_0000, 6, 0)]);
    rig.queues[INFLATE].add(&[(0xf_0000, 4, WRITE)]);
    rig.queues[INFLATE].add(&[(0x8_0000, 0x8000, 0)]);
    rig.device.queue_event(INFLATE).unwrap();
    assert_eq!(rig.queues[INFLATE].used(), [(0, 0), (1, 0), (2, 0), (3, 0)]);
    assert_eq!(rig.count("bad_chain"), 3);
}

#[test]
fn reported_ranges_are_dropped_by_either_number_of_the_queue() {
    for (index, page) in [(2, 4), (4, 9)] {
        let mut rig = rig_with(FEATURES);
        rig.queues[index].add(&[(DATA + page * PAGE, 0x2000, WRITE), (DATA, 0x1000, WRITE)]);
        rig.device.queue_event(index).unwrap();
        let dropped: Vec<u64> = (0..16).filter(|page| rig.word(*page) == 0).collect();
        assert_eq!(dropped, [0, page, page + 1]);
        assert_eq!(rig.count("reported_bytes"), 0x3000);
        assert_eq!(rig.queues[index].used(), [(0, 0)]);
    }
}

#[test]
fn ranges_that_are_no_pages_or_no_memory_are_counted_and_left_alone() {
    let mut rig = rig_with(FEATURES);
    rig.queues[2].add(&[(DATA + 8, 0x1000, WRITE)]);
    rig.queues[2].add(&[(DATA, 8, WRITE)]);
    // The chain itself cannot be read: it leaves memory.
    rig.queues[2].add(&[(0xf_f000, 0x2000, WRITE)]);
    rig.device.queue_event(2).unwrap();
    assert_eq!(rig.queues[2].used(), [(0, 0), (1, 0), (2, 0)]);
    assert_eq!(
        (rig.count("bad_range"), rig.count("bad_chain"), rig.word(0)),
        (2, 1, !0)
    );
}

#[test]
fn without_reporting_negotiated_nothing_is_dropped() {
    let mut rig = rig_with(0);
    rig.queues[2].add(&[(DATA, 0x1000, WRITE)]);
    rig.device.queue_event(2).unwrap();
    assert_eq!((rig.word(0), rig.queues[2].used()), (!0, vec![]));
}

#[test]
fn a_target_is_told_to_the_driver_and_stays_over_a_reset() {
    let mut rig = rig_with(FEATURES);
    rig.device.bind(Target { pages: 300 }).unwrap();
    assert_eq!(rig.device.core.interrupt.status(), 2);
    assert!(rig.device.core.config.write(ACTUAL as u64, &200u32.to_le_bytes()));
    assert_eq!(Balloon::sizes(&rig.device.core), (300 * PAGE, 200 * PAGE));
    rig.device.reset();
    assert_eq!(Balloon::sizes(&rig.device.core), (300 * PAGE, 0));
}

#[test]
fn the_driver_writes_nothing_but_what_it_gave() {
    let rig = rig_with(FEATURES);
    for (at, bytes) in [
        (0, vec![1; 4]),
        (3, vec![1; 2]),
        (6, vec![1; 4]),
        (8, vec![1]),
        (u64::MAX, vec![1; 2]),
    ] {
        assert!(!rig.device.core.config.write(at, &bytes), "{at}");
    }
    assert_eq!(Balloon::sizes(&rig.device.core), (0, 0));
}

#[test]
fn save_restore_save_is_equal() {
    let mut rig = rig_with(FEATURES);
    rig.device.bind(Target { pages: 300 }).unwrap();
    rig.inflate(&[0x20]);
    assert!(rig.device.core.config.write(ACTUAL as u64, &1u32.to_le_bytes()));
    let saved = rig.device.save();
    let mut restored = Balloon::new().unwrap();
    restored.restore(saved.clone(), rig.memory).unwrap();
    assert_eq!(restored.save(), saved);
}

#[test]
fn rings_of_a_hostile_driver_do_no_harm() {
    let mut numbers = Numbers(7);
    for _ in 0..200 {
        let mut rig = rig_with(FEATURES);
        for _ in 0..8 {
            let index = usize::try_from(numbers.below(5)).unwrap();
            for slot in 0..4 {
                let len = u32::try_from(numbers.below(0x3000)).unwrap();
                let flags = u16::try_from(numbers.below(4)).unwrap();
                rig.queues[index].descriptor(slot, numbers.below(0x18_0000), len, flags, slot + 1);
            }
            rig.queues[index].offer(u16::try_from(numbers.below(5)).unwrap());
            // Rings that the driver had overwritten by its own request are an error on the device, not a panic.
            let _ = rig.device.queue_event(index);
        }
    }
}
