//! Virtio over MMIO, version 2 (virtio 1.3, 4.2): the registers through which a driver finds and sets up a device.
//!
//! ```text
//!   status:  0 -> ACKNOWLEDGE -> DRIVER -> FEATURES_OK -> DRIVER_OK          (virtio 1.3, 3.1.1)
//!            ^       feature bits |  queue rings  |          |
//!            |                                               +-> activate: the device's thread takes the queues
//!            +----- reset: the thread has let go of guest memory when the write returns
//! ```
//!
//! Registers are 32 bits wide and accessed as such (4.2.2.2); another access is counted as "bad_access" and does nothing.
//! A write out of order is counted as "bad_order" and does nothing.

use std::sync::Arc;

use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_DRIVER_OK, VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET,
    VIRTIO_F_VERSION_1,
};
use virtio_bindings::virtio_mmio as reg;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::QueueState;

use super::core::{Core, raise};
use super::device::{Activation, Device};
use super::feature;
use super::worker::DeviceControl;
use crate::bus::BusDevice;
use crate::memory::GuestMemory;

/// "virt", little endian (virtio 1.3, 4.2.2, MagicValue).
const MAGIC: u32 = 0x7472_6976;
const VERSION: u32 = 2;
/// "FLNT", little endian. Drivers do not look at it.
const VENDOR: u32 = 0x544e_4c46;

/// What the transport itself offers for every device.
const TRANSPORT_FEATURES: u64 =
    feature(VIRTIO_F_VERSION_1) | feature(VIRTIO_RING_F_EVENT_IDX) | feature(VIRTIO_RING_F_INDIRECT_DESC);

/// What a device is, as its driver finds it out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceInfo {
    /// Virtio device id (virtio 1.3, section 5).
    pub device_id: u32,
    /// The device's own features.
    pub features: u64,
    /// The largest size of each queue.
    pub queue_sizes: Vec<u16>,
}

impl DeviceInfo {
    /// Asks a device.
    pub fn of<D: Device>(device: &D) -> Self {
        Self {
            device_id: device.device_id(),
            features: device.features(),
            queue_sizes: device.queue_sizes(),
        }
    }
}

/// What a driver has written so far.
#[derive(Clone, PartialEq, prost::Message)]
pub struct MmioState {
    /// Device status.
    #[prost(uint32, tag = "1")]
    pub status: u32,
    /// Features that the driver accepted.
    #[prost(uint64, tag = "2")]
    pub driver_features: u64,
    /// Selectors.
    #[prost(uint32, tag = "3")]
    pub device_features_select: u32,
    /// Which half of the driver's features is written.
    #[prost(uint32, tag = "4")]
    pub driver_features_select: u32,
    /// Which queue the queue registers mean.
    #[prost(uint32, tag = "5")]
    pub queue_select: u32,
    /// Queue set-up.
    #[prost(message, repeated, tag = "6")]
    pub queues: Vec<QueueRegisters>,
    /// InterruptStatus.
    #[prost(uint32, tag = "7")]
    pub interrupt_status: u32,
    /// ConfigGeneration.
    #[prost(uint32, tag = "8")]
    pub config_generation: u32,
    /// DEVICE_NEEDS_RESET.
    #[prost(bool, tag = "9")]
    pub needs_reset: bool,
    /// The configuration space has changed, and the driver has not set DRIVER_OK yet, on which it will be told.
    #[prost(bool, tag = "10")]
    pub change_untold: bool,
}

/// The registers of one queue.
#[derive(Clone, Copy, PartialEq, prost::Message)]
pub struct QueueRegisters {
    /// QueueNum.
    #[prost(uint32, tag = "1")]
    pub size: u32,
    /// QueueReady.
    #[prost(bool, tag = "2")]
    pub ready: bool,
    /// QueueDesc.
    #[prost(uint64, tag = "3")]
    pub descriptors: u64,
    /// QueueDriver.
    #[prost(uint64, tag = "4")]
    pub driver: u64,
    /// QueueDevice.
    #[prost(uint64, tag = "5")]
    pub device: u64,
}

/// One device on the MMIO bus.
pub struct MmioTransport {
    info: DeviceInfo,
    control: Arc<dyn DeviceControl>,
    core: Arc<Core>,
    memory: GuestMemory,
    state: MmioState,
}

impl MmioTransport {
    /// Puts a device behind registers. Its queue notifications arrive at `core.notify()`, to be registered as ioeventfds
    /// on [`Self::NOTIFY_OFFSET`] with the queue's index as datamatch; its interrupts leave by `core.interrupt.irq()`.
    pub fn new(info: DeviceInfo, control: Arc<dyn DeviceControl>, core: Arc<Core>, memory: GuestMemory) -> Self {
        let state = fresh_state(info.queue_sizes.len());
        Self {
            info,
            control,
            core,
            memory,
            state,
        }
    }

    /// Where a driver writes a queue's index to notify the device.
    pub const NOTIFY_OFFSET: u64 = reg::VIRTIO_MMIO_QUEUE_NOTIFY as u64;

    /// The part shared with the device's thread.
    pub fn core(&self) -> &Arc<Core> {
        &self.core
    }

    /// The registers, for a snapshot; the device saves its own part.
    pub fn save(&self) -> MmioState {
        MmioState {
            interrupt_status: self.core.interrupt.status(),
            config_generation: self.core.config.generation(),
            needs_reset: self.core.needs_reset(),
            change_untold: self.core.change_untold(),
            ..self.state.clone()
        }
    }

    /// Takes saved registers over; the device takes its own part. An interrupt that was pending waits for
    /// [`Self::repeat_interrupt`].
    ///
    /// # Errors
    /// The state is another device's.
    pub fn restore(&mut self, state: MmioState) -> Result<(), super::DeviceError> {
        if state.queues.len() != self.info.queue_sizes.len() {
            let message = format!(
                "{} queues saved, {} expected",
                state.queues.len(),
                self.info.queue_sizes.len()
            );
            return Err(super::DeviceError::State(message));
        }
        let driver_ok = state.status & VIRTIO_CONFIG_S_DRIVER_OK != 0;
        self.core.restore(driver_ok, state.needs_reset, state.change_untold);
        self.core.config.set_generation(state.config_generation);
        self.state = state;
        Ok(())
    }

    /// Raises an interrupt again that was pending when the registers were saved: its edge was lost with the old machine. Its
    /// vCPUs must be able to take it.
    pub fn repeat_interrupt(&self) {
        if self.state.interrupt_status != 0 {
            self.core.interrupt.trigger(self.state.interrupt_status);
        }
    }

    fn offered(&self) -> u64 {
        self.info.features | TRANSPORT_FEATURES
    }

    fn has(&self, status: u32) -> bool {
        self.state.status & status == status
    }

    fn status(&self) -> u32 {
        let needs_reset = if self.core.needs_reset() {
            VIRTIO_CONFIG_S_NEEDS_RESET
        } else {
            0
        };
        self.state.status | needs_reset
    }

    fn queue(&self) -> Option<(&QueueRegisters, u16)> {
        let index = usize::try_from(self.state.queue_select).ok()?;
        Some((self.state.queues.get(index)?, *self.info.queue_sizes.get(index)?))
    }

    fn read_register(&self, offset: u32) -> u32 {
        match offset {
            reg::VIRTIO_MMIO_MAGIC_VALUE => MAGIC,
            reg::VIRTIO_MMIO_VERSION => VERSION,
            reg::VIRTIO_MMIO_DEVICE_ID => self.info.device_id,
            reg::VIRTIO_MMIO_VENDOR_ID => VENDOR,
            reg::VIRTIO_MMIO_DEVICE_FEATURES => half(self.offered(), self.state.device_features_select),
            // Zero: there is no such queue.
            reg::VIRTIO_MMIO_QUEUE_NUM_MAX => self.queue().map_or(0, |(_, max)| u32::from(max)),
            reg::VIRTIO_MMIO_QUEUE_READY => self.queue().map_or(0, |(queue, _)| u32::from(queue.ready)),
            reg::VIRTIO_MMIO_INTERRUPT_STATUS => self.core.interrupt.status(),
            reg::VIRTIO_MMIO_STATUS => self.status(),
            reg::VIRTIO_MMIO_CONFIG_GENERATION => self.core.config.generation(),
            // No shared memory region: its length reads as all ones (4.2.2).
            reg::VIRTIO_MMIO_SHM_LEN_LOW..=reg::VIRTIO_MMIO_SHM_BASE_HIGH => u32::MAX,
            _ => {
                self.core.counters.bump("bad_access");
                0
            }
        }
    }

    fn write_register(&mut self, offset: u32, value: u32) {
        match offset {
            reg::VIRTIO_MMIO_DEVICE_FEATURES_SEL => self.state.device_features_select = value,
            reg::VIRTIO_MMIO_DRIVER_FEATURES_SEL => self.state.driver_features_select = value,
            reg::VIRTIO_MMIO_DRIVER_FEATURES => self.write_features(value),
            reg::VIRTIO_MMIO_QUEUE_SEL => self.state.queue_select = value,
            reg::VIRTIO_MMIO_QUEUE_NUM..=reg::VIRTIO_MMIO_QUEUE_READY
            | reg::VIRTIO_MMIO_QUEUE_DESC_LOW..=reg::VIRTIO_MMIO_QUEUE_USED_HIGH => self.write_queue(offset, value),
            reg::VIRTIO_MMIO_QUEUE_NOTIFY => self.notify(value),
            reg::VIRTIO_MMIO_INTERRUPT_ACK => self.core.interrupt.acknowledge(value),
            reg::VIRTIO_MMIO_STATUS => self.write_status(value),
            // Regions of shared memory: there are none to select.
            reg::VIRTIO_MMIO_SHM_SEL => {}
            _ => self.core.counters.bump("bad_access"),
        }
    }

    fn write_features(&mut self, value: u32) {
        // Settled once FEATURES_OK is set (3.1.1, step 5).
        if !self.has(VIRTIO_CONFIG_S_DRIVER) || self.has(VIRTIO_CONFIG_S_FEATURES_OK) {
            return self.core.counters.bump("bad_order");
        }
        let features = &mut self.state.driver_features;
        match self.state.driver_features_select {
            0 => set_low(features, value),
            1 => set_high(features, value),
            // There are no features from 64 on; saying so is fine.
            _ if value == 0 => {}
            _ => self.core.counters.bump("bad_features"),
        }
    }

    fn write_queue(&mut self, offset: u32, value: u32) {
        let settled = !self.has(VIRTIO_CONFIG_S_FEATURES_OK) || self.has(VIRTIO_CONFIG_S_DRIVER_OK);
        // A driver that lets go of a device also says that its queues are not ready, which they are not after a reset.
        let retreat = offset == reg::VIRTIO_MMIO_QUEUE_READY && value == 0 && !self.has(VIRTIO_CONFIG_S_DRIVER_OK);
        if settled && !retreat {
            return self.core.counters.bump("bad_order");
        }
        let selected = usize::try_from(self.state.queue_select).ok();
        let Some(queue) = selected.and_then(|index| self.state.queues.get_mut(index)) else {
            return self.core.counters.bump("bad_queue");
        };
        match offset {
            reg::VIRTIO_MMIO_QUEUE_NUM => queue.size = value,
            reg::VIRTIO_MMIO_QUEUE_READY => queue.ready = value & 1 != 0,
            reg::VIRTIO_MMIO_QUEUE_DESC_LOW => set_low(&mut queue.descriptors, value),
            reg::VIRTIO_MMIO_QUEUE_DESC_HIGH => set_high(&mut queue.descriptors, value),
            reg::VIRTIO_MMIO_QUEUE_AVAIL_LOW => set_low(&mut queue.driver, value),
            reg::VIRTIO_MMIO_QUEUE_AVAIL_HIGH => set_high(&mut queue.driver, value),
            reg::VIRTIO_MMIO_QUEUE_USED_LOW => set_low(&mut queue.device, value),
            reg::VIRTIO_MMIO_QUEUE_USED_HIGH => set_high(&mut queue.device, value),
            _ => self.core.counters.bump("bad_access"),
        }
    }

    /// Only without an ioeventfd does a notification come this way.
    fn notify(&self, value: u32) {
        match usize::try_from(value)
            .ok()
            .and_then(|index| self.core.notify().get(index))
        {
            Some(notify) => raise(notify),
            None => self.core.counters.bump("bad_queue"),
        }
    }

    fn write_status(&mut self, value: u32) {
        if value == 0 {
            return self.reset();
        }
        let value = value & !VIRTIO_CONFIG_S_NEEDS_RESET;
        // Bits are only added, until a reset (2.1.1).
        if value & self.state.status != self.state.status {
            return self.core.counters.bump("bad_order");
        }
        let added = value & !self.state.status;
        if added & VIRTIO_CONFIG_S_FEATURES_OK != 0 && !self.features_acceptable() {
            // The bit does not stick: so the driver learns that it cannot use this device (3.1.1, step 6).
            self.core.counters.bump("bad_features");
            self.state.status = value & !(VIRTIO_CONFIG_S_FEATURES_OK | VIRTIO_CONFIG_S_DRIVER_OK);
            return;
        }
        if added & VIRTIO_CONFIG_S_DRIVER_OK != 0 && value & VIRTIO_CONFIG_S_FEATURES_OK == 0 {
            return self.core.counters.bump("bad_order");
        }
        self.state.status = value;
        if added & VIRTIO_CONFIG_S_DRIVER_OK != 0 {
            self.core.driver_ready();
            self.activate();
        }
    }

    fn features_acceptable(&self) -> bool {
        let features = self.state.driver_features;
        features & !self.offered() == 0 && features & feature(VIRTIO_F_VERSION_1) != 0
    }

    fn activate(&self) {
        let outcome = match self.activation() {
            Some(activation) => self.control.activate(activation).is_ok(),
            None => false,
        };
        if !outcome {
            self.core.counters.bump("bad_setup");
            self.core.demand_reset();
        }
    }

    fn activation(&self) -> Option<Activation> {
        let event_idx = self.state.driver_features & feature(VIRTIO_RING_F_EVENT_IDX) != 0;
        let queues = self.state.queues.iter().zip(&self.info.queue_sizes);
        let queues = queues
            .map(|(queue, max)| queue.to_state(*max, event_idx))
            .collect::<Option<Vec<_>>>()?;
        Some(Activation {
            memory: self.memory.clone(),
            features: self.state.driver_features,
            queues,
        })
    }

    fn reset(&mut self) {
        // A driver that has written DRIVER_OK may have I/O in flight. This waits until it is done: drivers free their
        // buffers after this write without looking at the status again.
        if self.control.reset().is_err() {
            self.core.counters.bump("thread_gone");
            self.core.demand_reset();
        }
        self.state = fresh_state(self.info.queue_sizes.len());
    }
}

impl QueueRegisters {
    fn to_state(self, max_size: u16, event_idx_enabled: bool) -> Option<QueueState> {
        let size = match self.size {
            // A driver that does not say takes the largest.
            0 => max_size,
            size => u16::try_from(size).ok().filter(|size| *size <= max_size)?,
        };
        Some(QueueState {
            max_size,
            size,
            event_idx_enabled,
            ready: self.ready,
            desc_table: self.descriptors,
            avail_ring: self.driver,
            used_ring: self.device,
            ..QueueState::default()
        })
    }
}

impl BusDevice for MmioTransport {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        if let Some(offset) = offset.checked_sub(u64::from(reg::VIRTIO_MMIO_CONFIG)) {
            return self.core.config.read(offset, data);
        }
        match (u32::try_from(offset), data.len()) {
            (Ok(offset), 4) if offset % 4 == 0 => data.copy_from_slice(&self.read_register(offset).to_le_bytes()),
            _ => {
                self.core.counters.bump("bad_access");
                data.fill(0);
            }
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if let Some(offset) = offset.checked_sub(u64::from(reg::VIRTIO_MMIO_CONFIG)) {
            if !self.core.config.write(offset, data) {
                self.core.counters.bump("bad_access");
            }
            return;
        }
        match (u32::try_from(offset), <[u8; 4]>::try_from(data)) {
            (Ok(offset), Ok(value)) if offset % 4 == 0 => {
                self.write_register(offset, u32::from_le_bytes(value));
            }
            _ => self.core.counters.bump("bad_access"),
        }
    }
}

fn fresh_state(queues: usize) -> MmioState {
    MmioState {
        status: 0,
        driver_features: 0,
        device_features_select: 0,
        driver_features_select: 0,
        queue_select: 0,
        queues: vec![QueueRegisters::default(); queues],
        interrupt_status: 0,
        config_generation: 0,
        needs_reset: false,
        change_untold: false,
    }
}

const LOW: u64 = u32::MAX as u64;

fn half(value: u64, select: u32) -> u32 {
    let half = match select {
        0 => value & LOW,
        1 => value >> 32,
        _ => 0,
    };
    // Either is below 2^32 by now.
    u32::try_from(half).unwrap_or(0)
}

fn set_low(field: &mut u64, value: u32) {
    *field = *field & !LOW | u64::from(value);
}

fn set_high(field: &mut u64, value: u32) {
    *field = *field & LOW | u64::from(value) << 32;
}

#[cfg(test)]
#[path = "mmio_tests.rs"]
mod tests;
