//! The registers as a driver uses and misuses them, without a device behind.

use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::*;
use crate::memory::GuestMemoryMmap;
use crate::virtio::DeviceError;
use crate::virtio::testing::memory;

/// Remembers what the transport asked of it.
#[derive(Default)]
struct Recorder {
    activations: Mutex<Vec<Activation>>,
    resets: AtomicUsize,
    refuse: bool,
}

impl DeviceControl for Recorder {
    fn activate(&self, activation: Activation) -> Result<(), DeviceError> {
        self.activations.lock().unwrap().push(activation);
        if self.refuse { Err(DeviceError::Gone) } else { Ok(()) }
    }

    fn reset(&self) -> Result<(), DeviceError> {
        self.resets.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }
}

const INFO_FEATURES: u64 = 0b101;

fn info() -> DeviceInfo {
    DeviceInfo {
        device_id: 2,
        features: INFO_FEATURES,
        queue_sizes: vec![128, 64],
    }
}

fn transport_with(recorder: Recorder) -> (MmioTransport, Arc<Recorder>) {
    let recorder = Arc::new(recorder);
    let core = Arc::new(Core::new(2, vec![1, 2, 3, 4, 5, 6, 7, 8]).unwrap());
    (MmioTransport::new(info(), recorder.clone(), core, memory()), recorder)
}

fn transport() -> (MmioTransport, Arc<Recorder>) {
    transport_with(Recorder::default())
}

fn read(transport: &mut MmioTransport, register: u32) -> u32 {
    let mut data = [0; 4];
    transport.read(register.into(), &mut data);
    u32::from_le_bytes(data)
}

fn write(transport: &mut MmioTransport, register: u32, value: u32) {
    transport.write(register.into(), &value.to_le_bytes());
}

fn negotiate(transport: &mut MmioTransport, features: u64) {
    write(transport, reg::VIRTIO_MMIO_STATUS, 1);
    write(transport, reg::VIRTIO_MMIO_STATUS, 3);
    for select in [0, 1] {
        write(transport, reg::VIRTIO_MMIO_DRIVER_FEATURES_SEL, select);
        write(transport, reg::VIRTIO_MMIO_DRIVER_FEATURES, half(features, select));
    }
    write(transport, reg::VIRTIO_MMIO_STATUS, 11);
}

fn set_up_queue(transport: &mut MmioTransport, index: u32) {
    write(transport, reg::VIRTIO_MMIO_QUEUE_SEL, index);
    write(transport, reg::VIRTIO_MMIO_QUEUE_NUM, 32);
    write(transport, reg::VIRTIO_MMIO_QUEUE_DESC_LOW, 0x1000);
    write(transport, reg::VIRTIO_MMIO_QUEUE_AVAIL_LOW, 0x2000);
    write(transport, reg::VIRTIO_MMIO_QUEUE_USED_LOW, 0x3000);
    write(transport, reg::VIRTIO_MMIO_QUEUE_USED_HIGH, 1);
    write(transport, reg::VIRTIO_MMIO_QUEUE_READY, 1);
}

const GOOD: u64 = 1 | 1 << 32 | 1 << 29;

#[test]
fn a_driver_finds_the_device() {
    let (mut transport, _) = transport();
    assert_eq!(read(&mut transport, 0).to_le_bytes(), *b"virt");
    assert_eq!(read(&mut transport, 4), 2);
    assert_eq!(read(&mut transport, 8), 2);
    assert_eq!(
        read(&mut transport, reg::VIRTIO_MMIO_DEVICE_FEATURES),
        0b101 | 1 << 28 | 1 << 29
    );
    write(&mut transport, reg::VIRTIO_MMIO_DEVICE_FEATURES_SEL, 1);
    assert_eq!(read(&mut transport, reg::VIRTIO_MMIO_DEVICE_FEATURES), 1);
    write(&mut transport, reg::VIRTIO_MMIO_DEVICE_FEATURES_SEL, 2);
    assert_eq!(read(&mut transport, reg::VIRTIO_MMIO_DEVICE_FEATURES), 0);
    let sizes = [0, 1, 2, u32::MAX].map(|index| {
        write(&mut transport, reg::VIRTIO_MMIO_QUEUE_SEL, index);
        read(&mut transport, reg::VIRTIO_MMIO_QUEUE_NUM_MAX)
    });
    assert_eq!(sizes, [128, 64, 0, 0]);
    assert_eq!(read(&mut transport, reg::VIRTIO_MMIO_SHM_LEN_LOW), u32::MAX);
}

#[test]
fn config_space_is_read_in_any_width_and_written_only_where_a_device_lets_it() {
    let (mut transport, _) = transport();
    let mut data = [0; 8];
    transport.read(0x100, &mut data);
    assert_eq!(data, [1, 2, 3, 4, 5, 6, 7, 8]);
    let mut data = [9; 3];
    transport.read(0x106, &mut data);
    assert_eq!(data, [7, 8, 0]);
    transport.write(0x100, &[9]);
    transport.read(0x100, &mut data);
    assert_eq!(data, [1, 2, 3]);
    assert_eq!(transport.core().counters.get("bad_access"), 1);
}

#[test]
fn a_good_driver_activates_with_what_it_set_up() {
    let (mut transport, recorder) = transport();
    negotiate(&mut transport, GOOD);
    assert_eq!(read(&mut transport, reg::VIRTIO_MMIO_STATUS), 11);
    set_up_queue(&mut transport, 1);
    assert_eq!(read(&mut transport, reg::VIRTIO_MMIO_QUEUE_READY), 1);
    write(&mut transport, reg::VIRTIO_MMIO_STATUS, 15);
    let activations = recorder.activations.lock().unwrap();
    assert_eq!(activations.len(), 1);
    assert_eq!(activations[0].features, GOOD);
    assert!(!activations[0].queues[0].ready);
    let expected = QueueState {
        max_size: 64,
        size: 32,
        ready: true,
        event_idx_enabled: true,
        desc_table: 0x1000,
        avail_ring: 0x2000,
        used_ring: 0x1_0000_3000,
        ..QueueState::default()
    };
    assert_eq!(activations[0].queues[1], expected);
}

#[test]
fn features_that_are_not_offered_or_lack_version_1_do_not_stick() {
    for features in [1 << 32 | 2, 1, 1 << 32 | 1 << 40] {
        let (mut transport, _) = transport();
        negotiate(&mut transport, features);
        assert_eq!(read(&mut transport, reg::VIRTIO_MMIO_STATUS), 3, "{features:#x}");
        assert_eq!(transport.core().counters.get("bad_features"), 1);
    }
}

#[test]
fn steps_out_of_order_do_nothing() {
    let (mut transport, recorder) = transport();
    // Features and queues before their time, DRIVER_OK without FEATURES_OK.
    write(&mut transport, reg::VIRTIO_MMIO_DRIVER_FEATURES, 1);
    set_up_queue(&mut transport, 0);
    assert_eq!(read(&mut transport, reg::VIRTIO_MMIO_QUEUE_READY), 0);
    write(&mut transport, reg::VIRTIO_MMIO_STATUS, 7);
    assert_eq!(read(&mut transport, reg::VIRTIO_MMIO_STATUS), 0);
    // Bits taken back, features and queues changed after they were settled.
    negotiate(&mut transport, GOOD);
    write(&mut transport, reg::VIRTIO_MMIO_STATUS, 8);
    write(&mut transport, reg::VIRTIO_MMIO_DRIVER_FEATURES, 0);
    write(&mut transport, reg::VIRTIO_MMIO_STATUS, 15);
    set_up_queue(&mut transport, 0);
    assert_eq!(read(&mut transport, reg::VIRTIO_MMIO_QUEUE_READY), 0);
    assert_eq!(read(&mut transport, reg::VIRTIO_MMIO_STATUS), 15);
    assert_eq!(recorder.activations.lock().unwrap()[0].features, GOOD);
    assert!(transport.core().counters.get("bad_order") >= 10);
}

#[test]
fn a_queue_too_large_or_a_device_that_refuses_asks_for_a_reset() {
    let (mut transport, recorder) = transport();
    negotiate(&mut transport, GOOD);
    write(&mut transport, reg::VIRTIO_MMIO_QUEUE_NUM, 129);
    write(&mut transport, reg::VIRTIO_MMIO_STATUS, 15);
    assert_eq!(read(&mut transport, reg::VIRTIO_MMIO_STATUS), 15 | 64);
    assert_eq!(read(&mut transport, reg::VIRTIO_MMIO_INTERRUPT_STATUS), 2);
    assert!(recorder.activations.lock().unwrap().is_empty());

    let (mut transport, _) = transport_with(Recorder {
        refuse: true,
        ..Recorder::default()
    });
    negotiate(&mut transport, GOOD);
    write(&mut transport, reg::VIRTIO_MMIO_STATUS, 15);
    assert_eq!(read(&mut transport, reg::VIRTIO_MMIO_STATUS), 15 | 64);
}

#[test]
fn a_reset_resets_the_device_and_every_register() {
    let (mut transport, recorder) = transport();
    let fresh = transport.save();
    negotiate(&mut transport, GOOD);
    set_up_queue(&mut transport, 1);
    write(&mut transport, reg::VIRTIO_MMIO_STATUS, 15);
    write(&mut transport, reg::VIRTIO_MMIO_STATUS, 0);
    assert_eq!(recorder.resets.load(Ordering::Relaxed), 1);
    assert_eq!(transport.save(), fresh);
}

#[test]
fn notifications_and_acknowledgements_reach_their_queue() {
    let (mut transport, _) = transport();
    write(&mut transport, reg::VIRTIO_MMIO_QUEUE_NOTIFY, 1);
    write(&mut transport, reg::VIRTIO_MMIO_QUEUE_NOTIFY, 2);
    let core = transport.core().clone();
    assert_eq!(core.notify()[1].read().unwrap(), 1);
    assert!(core.notify()[0].read().is_err());
    assert_eq!(core.counters.get("bad_queue"), 1);
    core.interrupt.used_buffers();
    core.interrupt.config_changed();
    assert_eq!(read(&mut transport, reg::VIRTIO_MMIO_INTERRUPT_STATUS), 3);
    write(&mut transport, reg::VIRTIO_MMIO_INTERRUPT_ACK, 1);
    assert_eq!(read(&mut transport, reg::VIRTIO_MMIO_INTERRUPT_STATUS), 2);
}

#[test]
fn a_driver_is_not_interrupted_before_driver_ok() {
    let (mut transport, _) = transport();
    negotiate(&mut transport, GOOD);
    transport.core().change_config(|config| config[0] = 9);
    let core = transport.core().clone();
    assert_eq!(read(&mut transport, reg::VIRTIO_MMIO_INTERRUPT_STATUS), 0);
    assert!(core.interrupt.irq().read().is_err());
    let saved = transport.save();
    assert!(saved.change_untold);
    let mut other = self::transport().0;
    other.restore(saved).unwrap();
    for transport in [&mut transport, &mut other] {
        write(transport, reg::VIRTIO_MMIO_STATUS, 15);
        assert_eq!(read(transport, reg::VIRTIO_MMIO_INTERRUPT_STATUS), 2);
        assert_eq!(transport.core().interrupt.irq().read().unwrap(), 1);
    }
}

#[test]
fn odd_accesses_are_counted_and_harmless() {
    let (mut transport, _) = transport();
    let before = transport.save();
    let mut counted = 0;
    for (offset, len) in [(0, 1), (2, 4), (0x70, 8), (0x0c, 2), (0xff, 4), (0x70, 0)] {
        transport.read(offset, &mut vec![0xff; len]);
        transport.write(offset, &vec![0xff; len]);
        counted += 2;
    }
    assert_eq!(transport.core().counters.get("bad_access"), counted);
    assert_eq!(transport.save(), before);
    // Every register takes every kind of value.
    for register in (0..0x200).step_by(4) {
        for value in [0, 1, 0x80, u32::MAX] {
            write(&mut transport, register, value);
            read(&mut transport, register);
        }
    }
}

#[test]
fn save_restore_save_is_equal_and_a_pending_interrupt_is_raised_again() {
    let (mut transport, recorder) = transport();
    negotiate(&mut transport, GOOD);
    set_up_queue(&mut transport, 1);
    write(&mut transport, reg::VIRTIO_MMIO_STATUS, 15);
    transport.core().change_config(|config| config[0] = 9);
    let saved = transport.save();
    let core = Arc::new(Core::new(2, vec![0; 8]).unwrap());
    let mut restored = MmioTransport::new(info(), recorder, core.clone(), Arc::<GuestMemoryMmap>::clone(&memory()));
    restored.restore(saved.clone()).unwrap();
    restored.repeat_interrupt();
    assert_eq!(restored.save(), saved);
    assert_eq!(core.interrupt.irq().read().unwrap(), 1);
}
