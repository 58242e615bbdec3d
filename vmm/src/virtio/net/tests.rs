use std::fs::File;
use std::os::fd::AsRawFd;

use nix::sys::socket::{MsgFlags, send};
use vm_memory::{Bytes, GuestAddress};

use super::header::{HEADER_BYTES, MAX_FRAME_BYTES};
use super::wire::{MAC, Wire, delete_link, frame, limited, make_tap, private_network, wire};
use super::*;
use crate::virtio::testing::{NEXT, Numbers, TestQueue, WRITE, activation, memory};

const RX_RINGS: u64 = 0x1000;
const TX_RINGS: u64 = 0x5000;
const DATA: u64 = 0x10000;
struct Rig {
    memory: GuestMemory,
    rx: TestQueue,
    tx: TestQueue,
    device: Net,
}

fn rig(features: u64) -> Rig {
    let memory = memory();
    let rx = TestQueue::new(&memory, RX_RINGS, QUEUE_SIZE);
    let tx = TestQueue::new(&memory, TX_RINGS, QUEUE_SIZE);
    let mut device = Net::new(&NetSlot { mac: MAC }).unwrap();
    device.core.driver_ready();
    device.activate(activation(&memory, features, &[&rx, &tx])).unwrap();
    Rig { memory, rx, tx, device }
}

fn bound(features: u64) -> Option<(Rig, Wire)> {
    let mut wire = wire()?;
    let mut rig = rig(features);
    rig.device.bind(wire.resource()).unwrap();
    Some((rig, wire))
}

const MERGE: u64 = feature(net::VIRTIO_NET_F_MRG_RXBUF);

impl Rig {
    fn counter(&self, name: &str) -> u64 {
        self.device.core.counters.get(name)
    }

    fn receive(&mut self) {
        self.device.queue_event(RX).unwrap();
    }

    /// Sends a frame from DATA, without offloads.
    fn transmit(&mut self, frame: &[u8]) {
        self.memory.write_slice(&[0; HEADER_BYTES], GuestAddress(DATA)).unwrap();
        let at = DATA + HEADER_BYTES as u64;
        self.memory.write_slice(frame, GuestAddress(at)).unwrap();
        self.tx
            .add(&[(DATA, 12, 0), (at, u32::try_from(frame.len()).unwrap(), 0)]);
        self.device.queue_event(TX).unwrap();
    }

    fn bytes(&self, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory.read_slice(&mut bytes, GuestAddress(at)).unwrap();
        bytes
    }

    fn watched(&self) -> EventSet {
        self.device.bound.as_ref().unwrap().watched
    }

    fn status(&self) -> [u8; 2] {
        let mut status = [9; 2];
        self.device.core.config.read(6, &mut status);
        status
    }

    /// Waits as the device's thread does, and does what it would.
    fn event(&mut self) {
        let mut events = [EpollEvent::default(); 8];
        let count = self.device.core.epoll().wait(-1, &mut events).unwrap();
        for event in &events[..count] {
            self.device.device_event(event.data(), event.event_set()).unwrap();
        }
    }
}

#[test]
fn config_space_has_the_address_and_a_link_that_goes_up_when_bound() {
    let Some(mut wire) = wire() else { return };
    let mut rig = rig(0);
    let mut mac = [0; 6];
    rig.device.core.config.read(0, &mut mac);
    assert_eq!((mac, rig.status()), (MAC, [0, 0]));
    assert_eq!(rig.device.core.interrupt.status(), 0);
    rig.device.bind(wire.resource()).unwrap();
    assert_eq!(rig.status(), [1, 0]);
    assert_eq!(rig.device.core.interrupt.status() & 2, 2);
    assert_eq!(rig.device.core.config.generation(), 1);
}

#[test]
fn a_frame_reaches_the_guest_whole_with_its_header() {
    let Some((mut rig, wire)) = bound(MERGE) else { return };
    let sent = frame(7, 900);
    rig.rx.add(&[(DATA, 5, WRITE), (DATA + 0x1000, 2000, WRITE)]);
    rig.receive();
    assert_eq!(rig.rx.used(), []);
    assert_eq!(rig.watched(), EventSet::IN);
    wire.send(&sent);
    rig.event();
    assert_eq!(rig.rx.used(), [(0, 912)]);
    let header = [rig.bytes(DATA, 5), rig.bytes(DATA + 0x1000, 7)].concat();
    assert_eq!(header, [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0]);
    assert_eq!(rig.bytes(DATA + 0x1007, 900), sent);
    assert_eq!(rig.device.core.interrupt.status() & 1, 1);
}

#[test]
fn a_frame_leaves_the_guest_whole_without_its_header() {
    let Some((mut rig, wire)) = bound(0) else { return };
    let sent = frame(9, 1400);
    rig.transmit(&sent);
    assert_eq!(wire.receive(), sent);
    assert_eq!(rig.tx.used(), [(0, 0)]);
}

#[test]
fn without_buffers_the_tap_is_left_alone_and_nothing_is_lost() {
    let Some((mut rig, wire)) = bound(MERGE) else { return };
    rig.receive();
    assert_eq!(rig.watched(), EventSet::empty());
    for number in 0..3 {
        wire.send(&frame(number, 60));
    }
    for number in 0..4 {
        rig.rx.add(&[(DATA + number * 0x100, 0x100, WRITE)]);
    }
    rig.receive();
    assert_eq!(rig.rx.used(), [(0, 72), (1, 72), (2, 72)]);
    for number in 0..3 {
        assert_eq!(rig.bytes(DATA + u64::from(number) * 0x100 + 12, 60), frame(number, 60));
    }
    assert_eq!(rig.watched(), EventSet::IN);
}

#[test]
fn a_frame_goes_over_merged_buffers_which_appear_at_once() {
    let Some((mut rig, wire)) = bound(MERGE) else { return };
    let sent = frame(3, 1000);
    wire.send(&sent);
    for number in 0..2 {
        rig.rx.add(&[(DATA + number * 0x200, 0x180, WRITE)]);
    }
    rig.receive();
    assert_eq!(rig.rx.used(), [], "two buffers are too few");
    assert_eq!(rig.watched(), EventSet::empty());
    rig.receive();
    assert_eq!(rig.rx.used(), [], "and stay too few");
    rig.rx.add(&[(DATA + 0x400, 0x180, WRITE)]);
    rig.receive();
    assert_eq!(rig.rx.used(), [(0, 0x180), (1, 0x180), (2, 1012 - 0x300)]);
    assert_eq!(rig.bytes(DATA + 10, 2), [3, 0]);
    let got = [
        rig.bytes(DATA + 12, 0x180 - 12),
        rig.bytes(DATA + 0x200, 0x180),
        rig.bytes(DATA + 0x400, 1012 - 0x300),
    ];
    assert_eq!(got.concat(), sent);
}

#[test]
fn what_does_not_fit_is_dropped_and_the_next_frame_takes_its_buffer() {
    // Without merging, and merged when the whole queue is too small.
    let Some((mut rig, wire)) = bound(0) else { return };
    wire.send(&frame(1, 1000));
    wire.send(&frame(2, 60));
    rig.rx.add(&[(DATA, 100, WRITE)]);
    rig.receive();
    assert_eq!(rig.rx.used(), [(0, 72)]);
    assert_eq!(rig.bytes(DATA + 12, 60), frame(2, 60));
    assert_eq!(rig.counter("rx_oversize"), 1);
}

#[test]
fn a_queue_full_of_tiny_buffers_does_not_hold_a_frame_up_for_ever() {
    let Some((mut rig, wire)) = bound(MERGE) else { return };
    for _ in 0..4 {
        wire.send(&frame(1, 1500));
        wire.send(&frame(1, 1500));
    }
    wire.send(&frame(2, 0x40));
    let small = TestQueue::new(&rig.memory, RX_RINGS, 4);
    let fresh = TestQueue::new(&rig.memory, TX_RINGS, QUEUE_SIZE);
    rig.device.reset();
    rig.device
        .activate(activation(&rig.memory, MERGE, &[&small, &fresh]))
        .unwrap();
    rig.rx = small;
    for number in 0..4 {
        rig.rx.add(&[(DATA + number * 0x100, 0x20, WRITE)]);
    }
    // A round's budget is the queue's size: it asks to be called again, as the thread does.
    let notify = rig.device.core.notify()[RX].as_raw_fd();
    while rig.watched().is_empty() {
        assert!(rig.rx.used().is_empty() || rig.counter("rx_oversize") == 8);
        rig.receive();
        if rig.rx.used().len() == 3 {
            break;
        }
        assert!(readable(notify), "neither watching the tap nor coming again");
    }
    assert_eq!(rig.counter("rx_oversize"), 8);
    assert_eq!(rig.bytes(DATA + 12, 20), frame(2, 0x40)[..20]);
}

fn readable(fd: i32) -> bool {
    let mut poll = libc::pollfd {
        fd,
        events: libc::POLLIN,
        revents: 0,
    };
    // SAFETY: one valid pollfd.
    unsafe { libc::poll(&raw mut poll, 1, 0) == 1 }
}

#[test]
fn bad_receive_buffers_go_back_unused() {
    let Some((mut rig, wire)) = bound(MERGE) else { return };
    wire.send(&frame(1, 60));
    rig.rx.add(&[(DATA, 11, WRITE)]);
    rig.rx.add(&[(DATA, 100, 0), (DATA, 100, WRITE)]);
    rig.rx.add(&[(DATA, 100, 0)]);
    rig.rx.add(&[(1 << 40, 100, WRITE)]);
    rig.rx.add(&[(DATA, 100, WRITE)]);
    rig.receive();
    assert_eq!(rig.rx.used(), [(0, 0), (1, 0), (3, 0), (4, 0), (5, 72)]);
    assert_eq!(rig.counter("bad_chain"), 4);
}

#[test]
fn bad_frames_are_counted_and_the_next_goes_out() {
    let Some((mut rig, wire)) = bound(0) else { return };
    let max = u32::try_from(MAX_FRAME_BYTES).unwrap();
    rig.memory.write_slice(&[0; 12], GuestAddress(DATA)).unwrap();
    rig.tx.add(&[(DATA, 12, 0)]);
    rig.tx.add(&[(DATA, 100, WRITE)]);
    rig.tx.add(&[(DATA, 100, 0), (DATA, 100, WRITE)]);
    rig.device.queue_event(TX).unwrap();
    assert_eq!(rig.counter("bad_chain"), 3);
    rig.tx.add(&[(DATA, max + 1, 0)]);
    rig.device.queue_event(TX).unwrap();
    assert_eq!(rig.counter("tx_oversize"), 1);
    // Offloads that were not negotiated, then one that nobody has.
    for header in [[1, 0], [0, 1], [0, 0xff]] {
        rig.memory.write_slice(&header, GuestAddress(DATA)).unwrap();
        rig.tx.add(&[(DATA, 100, 0)]);
        rig.device.queue_event(TX).unwrap();
    }
    assert_eq!(rig.counter("bad_header"), 3);
    // Shorter than an Ethernet header: the kernel refuses.
    rig.transmit(&[1]);
    assert_eq!(rig.counter("tx_dropped"), 1);
    rig.transmit(&frame(5, 60));
    assert_eq!(wire.receive(), frame(5, 60));
    assert_eq!(rig.tx.used().len(), 9);
}

#[test]
fn an_unbound_slot_loses_what_is_sent_and_keeps_buffers() {
    let mut rig = rig(0);
    rig.rx.add(&[(DATA, 2000, WRITE)]);
    rig.receive();
    rig.transmit(&frame(1, 60));
    assert_eq!((rig.rx.used(), rig.tx.used()), (vec![], vec![(0, 0)]));
    assert_eq!(rig.counter("tx_dropped"), 1);
}

#[test]
fn a_slot_bound_late_serves_the_buffers_that_wait() {
    let Some(mut wire) = wire() else { return };
    let mut rig = rig(0);
    rig.rx.add(&[(DATA, 2000, WRITE)]);
    rig.receive();
    wire.send(&frame(1, 60));
    rig.device.bind(wire.resource()).unwrap();
    // The device's own notification is what the thread would act on.
    assert!(readable(rig.device.core.notify()[RX].as_raw_fd()));
    rig.receive();
    assert_eq!(rig.rx.used(), [(0, 72)]);
}

#[test]
fn both_directions_wait_for_their_rate_and_go_on_by_their_timers() {
    let Some(mut wire) = wire() else { return };
    let mut rig = rig(0);
    let limit = RateLimit {
        operations_per_second: 50,
        burst_operations: 1,
        ..RateLimit::default()
    };
    rig.device.bind(limited(wire.tap.take().unwrap(), limit)).unwrap();
    for number in 0..3u8 {
        rig.rx.add(&[(DATA + 0x1000 * u64::from(number), 0x1000, WRITE)]);
        wire.send(&frame(number, 60));
    }
    rig.receive();
    let mut got = rig.rx.used().len();
    assert_eq!((got, rig.watched()), (1, EventSet::empty()));
    for number in 3..6 {
        rig.transmit(&frame(number, 60));
    }
    let mut sent = rig.tx.used().len();
    while got < 3 || sent < 3 {
        rig.event();
        got += rig.rx.used().len();
        sent += rig.tx.used().len();
    }
    assert!(rig.counter("rx_rate_limited") >= 1 && rig.counter("tx_rate_limited") >= 1);
}

#[test]
fn a_tap_that_goes_away_takes_the_link_down_and_another_may_come() {
    let Some((mut rig, wire)) = bound(0) else { return };
    rig.rx.add(&[(DATA, 2000, WRITE)]);
    rig.receive();
    delete_link();
    rig.event();
    assert_eq!(rig.status(), [0, 0]);
    assert_eq!(rig.counter("tap_lost"), 1);
    assert_eq!(rig.device.core.interrupt.status() & 2, 2);
    drop(wire);
    let fd = make_tap(libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR);
    let resource = limited(Tap::from_fd(fd).unwrap(), RateLimit::default());
    rig.device.bind(resource).unwrap();
    assert_eq!(rig.status(), [1, 0]);
}

#[test]
fn a_second_tap_and_what_is_no_tap_are_refused() {
    let null = File::open("/dev/null").unwrap();
    assert!(matches!(Tap::from_fd(null.into()), Err(DeviceError::Refused(_))));
    if private_network().is_none() {
        return;
    }
    for flags in [
        libc::IFF_TUN | libc::IFF_NO_PI | libc::IFF_VNET_HDR,
        libc::IFF_TAP | libc::IFF_NO_PI,
    ] {
        let error = Tap::from_fd(make_tap(flags)).unwrap_err().to_string();
        assert!(error.contains("IFF_VNET_HDR"), "{error}");
    }
    let resource = || {
        limited(
            Tap::from_fd(make_tap(
                libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR | libc::IFF_MULTI_QUEUE,
            ))
            .unwrap(),
            RateLimit::default(),
        )
    };
    let mut device = Net::new(&NetSlot { mac: MAC }).unwrap();
    device.bind(resource()).unwrap();
    assert!(matches!(device.bind(resource()), Err(DeviceError::AlreadyBound)));
}

#[test]
fn save_restore_save_is_equal_and_a_frame_in_hand_is_not_lost() {
    let Some((mut rig, wire)) = bound(MERGE) else { return };
    wire.send(&frame(4, 300));
    rig.rx.add(&[(DATA, 100, WRITE)]);
    rig.receive();
    rig.device.quiesce().unwrap();
    let saved = rig.device.save();
    assert_eq!(saved.rx_frame.len(), 312);
    let bound = rig.device.bound.take().unwrap();
    rig.device = Net::new(&NetSlot { mac: MAC }).unwrap();
    rig.device.restore(saved.clone(), rig.memory.clone()).unwrap();
    rig.device.bind(limited(bound.tap, RateLimit::default())).unwrap();
    assert_eq!(rig.device.save(), saved);
    rig.rx.add(&[(DATA + 0x1000, 0x1000, WRITE)]);
    rig.device.resume().unwrap();
    assert_eq!(rig.rx.used(), [(0, 100), (1, 212)]);
    for bytes in [vec![0; 3], vec![0; MAX_FRAME_BYTES + 1]] {
        let state = NetState {
            rx_frame: bytes,
            ..saved.clone()
        };
        let refused = rig.device.restore(state, rig.memory.clone());
        assert!(matches!(refused, Err(DeviceError::State(_))));
    }
}

#[test]
fn a_flood_in_both_directions_is_bounded_in_each_event() {
    let Some((mut rig, wire)) = bound(MERGE) else { return };
    // More than the tap's own queue holds: the host drops the rest.
    for number in 0..2000u32 {
        let flags = MsgFlags::MSG_DONTWAIT;
        let _ = send(
            wire.host.as_raw_fd(),
            &frame(u8::try_from(number % 251).unwrap(), 60),
            flags,
        );
    }
    for _ in 0..QUEUE_SIZE {
        rig.rx.add(&[(DATA, 0x100, WRITE)]);
    }
    rig.receive();
    assert_eq!(rig.rx.used().len(), usize::from(QUEUE_SIZE));
    assert_eq!(rig.watched(), EventSet::empty());
    rig.memory.write_slice(&[0; 12], GuestAddress(DATA)).unwrap();
    for _ in 0..QUEUE_SIZE {
        rig.tx.add(&[(DATA, 72, 0)]);
    }
    let mut left = usize::from(QUEUE_SIZE);
    rig.device.queue_event(TX).unwrap();
    left -= rig.tx.used().len();
    while left > 0 {
        rig.event();
        left -= rig.tx.used().len();
    }
}

#[test]
fn a_reset_lets_go_of_guest_memory_and_the_tap() {
    let Some((mut rig, wire)) = bound(MERGE) else { return };
    rig.rx.add(&[(DATA, 2000, WRITE)]);
    rig.receive();
    rig.device.reset();
    assert_eq!(rig.watched(), EventSet::empty());
    // Ours and the two queues': the device has none left.
    assert_eq!(Arc::strong_count(&rig.memory), 3);
    wire.send(&frame(1, 60));
    rig.receive();
    assert_eq!(rig.rx.used(), []);
}

#[test]
fn random_chains_never_end_the_process() {
    let Some((mut rig, wire)) = bound(MERGE) else { return };
    let mut numbers = Numbers(1);
    for round in 0..10_000 {
        if round % 16 == 0 {
            let flags = MsgFlags::MSG_DONTWAIT;
            let len = usize::try_from(14 + numbers.below(1400)).unwrap();
            let _ = send(wire.host.as_raw_fd(), &frame(1, len), flags);
        }
        for index in [RX, TX] {
            let queue = if index == RX { &mut rig.rx } else { &mut rig.tx };
            let parts: Vec<_> = (0..numbers.below(5))
                .map(|_| {
                    let addr = [DATA, DATA + 0x8000, numbers.next()][usize::try_from(numbers.below(3)).unwrap()];
                    let len = [12, 100, 70_000, numbers.below(1 << 32)][usize::try_from(numbers.below(4)).unwrap()];
                    let flags = u16::try_from(numbers.below(8)).unwrap() & !NEXT;
                    (addr, u32::try_from(len).unwrap(), flags)
                })
                .collect();
            if parts.is_empty() {
                queue.offer(u16::try_from(numbers.below(u64::from(QUEUE_SIZE))).unwrap());
            } else {
                queue.add(&parts);
            }
            // A ring that overflows with what was held back is the driver's fault: it resets, as the worker asks it to.
            if rig.device.queue_event(index).is_err() {
                rig.device.reset();
                rig.rx = TestQueue::new(&rig.memory, RX_RINGS, QUEUE_SIZE);
                rig.tx = TestQueue::new(&rig.memory, TX_RINGS, QUEUE_SIZE);
                for base in [RX_RINGS, TX_RINGS] {
                    rig.memory.write_slice(&[0; 0x3000], GuestAddress(base)).unwrap();
                }
                let queues = activation(&rig.memory, MERGE, &[&rig.rx, &rig.tx]);
                rig.device.activate(queues).unwrap();
            }
        }
    }
}
