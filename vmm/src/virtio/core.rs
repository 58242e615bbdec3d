//! What a device's thread and its transport share: config space, interrupt, counters, notification eventfds.

use std::collections::BTreeMap;
use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use virtio_bindings::virtio_mmio::{VIRTIO_MMIO_INT_CONFIG, VIRTIO_MMIO_INT_VRING};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// Locks a mutex whose data stays consistent whatever happens to its holder.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The part of a device that both its own thread and the vCPU threads touch.
#[derive(Debug)]
pub struct Core {
    /// Device configuration space (virtio 1.3, 2.5).
    pub config: ConfigSpace,
    /// Interrupt line towards the guest.
    pub interrupt: Interrupt,
    /// What went wrong, by name.
    pub counters: Counters,
    notify: Vec<EventFd>,
    epoll: Epoll,
    needs_reset: AtomicBool,
    driver_ok: AtomicBool,
    change_untold: AtomicBool,
}

impl Core {
    /// Shared parts for a device with `queues` queues and the given configuration space.
    ///
    /// # Errors
    /// When the process is out of file descriptors.
    pub fn new(queues: usize, config: Vec<u8>) -> io::Result<Self> {
        let notify = (0..queues)
            .map(|_| EventFd::new(EFD_NONBLOCK))
            .collect::<io::Result<Vec<_>>>()?;
        Ok(Self {
            config: ConfigSpace::new(config),
            interrupt: Interrupt {
                status: AtomicU32::new(0),
                irq: EventFd::new(EFD_NONBLOCK)?,
            },
            counters: Counters::default(),
            notify,
            epoll: Epoll::new()?,
            needs_reset: AtomicBool::new(false),
            driver_ok: AtomicBool::new(false),
            change_untold: AtomicBool::new(false),
        })
    }

    /// The same with bytes in its configuration space that the driver may write.
    #[must_use]
    pub fn with_writable(mut self, writable: Range<usize>) -> Self {
        self.config.writable = writable;
        self
    }

    /// One eventfd for each queue; the driver's notification (a write of the queue's index to QueueNotify) ends there.
    pub fn notify(&self) -> &[EventFd] {
        &self.notify
    }

    /// What the device's thread waits on.
    pub(crate) fn epoll(&self) -> &Epoll {
        &self.epoll
    }

    /// Adds a descriptor to what the device's thread waits on; `token` comes back with the event.
    pub(crate) fn watch(&self, fd: i32, events: EventSet, token: u64) -> io::Result<()> {
        self.epoll
            .ctl(ControlOperation::Add, fd, EpollEvent::new(events, token))
    }

    /// Tells the driver that the configuration space has changed (virtio 1.3, 2.5.2): at once if it has set DRIVER_OK, else
    /// when it does. A driver reads its configuration before that, and would not know of a change in between.
    pub fn change_config(&self, change: impl FnOnce(&mut [u8])) {
        self.config.update(change);
        self.notify_change();
    }

    /// Sets DEVICE_NEEDS_RESET (virtio 1.3, 2.1.2): the driver broke the protocol beyond what can be handed back to it.
    pub fn demand_reset(&self) {
        self.needs_reset.store(true, Ordering::Release);
        self.notify_change();
    }

    /// The driver set DRIVER_OK: from here on it may be interrupted (virtio 1.3, 3.1.1).
    pub(crate) fn driver_ready(&self) {
        self.driver_ok.store(true, Ordering::SeqCst);
        self.tell_change();
    }

    /// Whether a change of the configuration space waits for DRIVER_OK to be told.
    pub(crate) fn change_untold(&self) -> bool {
        self.change_untold.load(Ordering::SeqCst)
    }

    fn notify_change(&self) {
        self.change_untold.store(true, Ordering::SeqCst);
        if self.driver_ok.load(Ordering::SeqCst) {
            self.tell_change();
        }
    }

    /// Both sides store before they load, in one order for all (SeqCst): whoever comes second sees the other, and `swap` lets
    /// only one of them tell.
    fn tell_change(&self) {
        if self.change_untold.swap(false, Ordering::SeqCst) {
            self.interrupt.config_changed();
        }
    }

    /// Whether the device waits for a reset by its driver.
    pub fn needs_reset(&self) -> bool {
        self.needs_reset.load(Ordering::Acquire)
    }

    /// As it was saved, without an interrupt.
    pub(crate) fn restore(&self, driver_ok: bool, needs_reset: bool, change_untold: bool) {
        self.reset();
        self.driver_ok.store(driver_ok, Ordering::SeqCst);
        self.change_untold.store(change_untold, Ordering::SeqCst);
        self.needs_reset.store(needs_reset, Ordering::Release);
    }

    /// Back to what it is before a driver came.
    pub(crate) fn reset(&self) {
        self.driver_ok.store(false, Ordering::SeqCst);
        self.change_untold.store(false, Ordering::SeqCst);
        self.needs_reset.store(false, Ordering::Release);
        self.interrupt.acknowledge(u32::MAX);
        for notify in &self.notify {
            clear(notify);
        }
    }
}

/// Takes an eventfd back to zero.
pub(crate) fn clear(eventfd: &EventFd) {
    // The only error of a non-blocking eventfd is EAGAIN: it is zero already.
    let _ = eventfd.read();
}

/// Makes an eventfd readable.
pub(crate) fn raise(eventfd: &EventFd) {
    // The only error of a non-blocking eventfd is EAGAIN: its counter is full, so it is readable already.
    let _ = eventfd.write(1);
}

/// Device configuration space with the generation that lets a driver read it consistently (virtio 1.3, 2.5.1).
#[derive(Debug)]
pub struct ConfigSpace {
    bytes: Mutex<Vec<u8>>,
    writable: Range<usize>,
    generation: AtomicU32,
}

impl ConfigSpace {
    fn new(bytes: Vec<u8>) -> Self {
        Self {
            bytes: Mutex::new(bytes),
            writable: 0..0,
            generation: AtomicU32::new(0),
        }
    }

    /// Copies from `offset` on; what lies beyond the end reads as zero.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        let bytes = lock(&self.bytes);
        let from = usize::try_from(offset).unwrap_or(usize::MAX);
        for (index, byte) in data.iter_mut().enumerate() {
            *byte = from
                .checked_add(index)
                .and_then(|at| bytes.get(at))
                .copied()
                .unwrap_or(0);
        }
    }

    /// A write by the driver. False: it may not write there, and nothing has changed.
    pub fn write(&self, offset: u64, data: &[u8]) -> bool {
        let from = usize::try_from(offset).unwrap_or(usize::MAX);
        let Some(end) = from.checked_add(data.len()) else {
            return false;
        };
        if data.is_empty() || from < self.writable.start || end > self.writable.end {
            return false;
        }
        match lock(&self.bytes).get_mut(from..end) {
            Some(bytes) => bytes.copy_from_slice(data),
            None => return false,
        }
        true
    }

    /// Changes the contents and moves the generation on.
    pub fn update(&self, change: impl FnOnce(&mut [u8])) {
        let mut bytes = lock(&self.bytes);
        change(&mut bytes);
        self.generation.fetch_add(1, Ordering::AcqRel);
    }

    /// ConfigGeneration as the driver reads it.
    pub fn generation(&self) -> u32 {
        self.generation.load(Ordering::Acquire)
    }

    pub(crate) fn set_generation(&self, generation: u32) {
        self.generation.store(generation, Ordering::Release);
    }

    /// All of it.
    pub fn to_vec(&self) -> Vec<u8> {
        lock(&self.bytes).clone()
    }
}

/// The interrupt line of a device on MMIO: status bits (virtio 1.3, 4.2.2, InterruptStatus) and the irqfd.
#[derive(Debug)]
pub struct Interrupt {
    status: AtomicU32,
    irq: EventFd,
}

impl Interrupt {
    /// The eventfd to be registered as irqfd.
    pub fn irq(&self) -> &EventFd {
        &self.irq
    }

    /// Used buffer notification.
    pub fn used_buffers(&self) {
        self.trigger(VIRTIO_MMIO_INT_VRING);
    }

    /// Configuration change notification.
    pub fn config_changed(&self) {
        self.trigger(VIRTIO_MMIO_INT_CONFIG);
    }

    /// InterruptStatus as the driver reads it.
    pub fn status(&self) -> u32 {
        self.status.load(Ordering::Acquire)
    }

    /// InterruptACK.
    pub fn acknowledge(&self, bits: u32) {
        self.status.fetch_and(!bits, Ordering::AcqRel);
    }

    pub(crate) fn trigger(&self, bits: u32) {
        // The status must be there before the driver's handler runs.
        self.status.fetch_or(bits, Ordering::AcqRel);
        raise(&self.irq);
    }
}

/// Counts by name ("bad_chain", "tx_dropped", ...). A name is there once it was counted.
#[derive(Debug, Default)]
pub struct Counters(Mutex<BTreeMap<&'static str, u64>>);

impl Counters {
    /// Adds one.
    pub fn bump(&self, name: &'static str) {
        self.add(name, 1);
    }

    /// Adds some.
    pub fn add(&self, name: &'static str, number: u64) {
        let mut counts = lock(&self.0);
        let count = counts.entry(name).or_default();
        *count = count.saturating_add(number);
    }

    /// The count of one name.
    pub fn get(&self, name: &str) -> u64 {
        lock(&self.0).get(name).copied().unwrap_or(0)
    }

    /// All counts.
    pub fn all(&self) -> Vec<(&'static str, u64)> {
        lock(&self.0).iter().map(|(name, count)| (*name, *count)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn config_space_reads_zero_beyond_its_end() {
        let core = Core::new(0, vec![1, 2, 3]).unwrap();
        let mut data = [9; 4];
        core.config.read(1, &mut data);
        assert_eq!(data, [2, 3, 0, 0]);
        core.config.read(u64::MAX, &mut data);
        assert_eq!(data, [0; 4]);
    }

    #[test]
    fn a_config_change_moves_the_generation_and_interrupts_once_the_driver_is_ready() {
        let core = Core::new(0, vec![0; 4]).unwrap();
        core.driver_ready();
        assert_eq!(core.interrupt.status(), 0, "nothing has changed");
        core.change_config(|bytes| bytes[0] = 7);
        assert_eq!(core.config.generation(), 1);
        assert_eq!(core.interrupt.status(), VIRTIO_MMIO_INT_CONFIG);
        assert_eq!(core.interrupt.irq().read().unwrap(), 1);
        core.interrupt.acknowledge(VIRTIO_MMIO_INT_CONFIG);
        assert_eq!(core.interrupt.status(), 0);
    }

    #[test]
    fn a_change_before_driver_ok_is_told_then_and_once() {
        let core = Core::new(0, vec![0; 4]).unwrap();
        core.change_config(|bytes| bytes[0] = 7);
        core.change_config(|bytes| bytes[0] = 8);
        assert_eq!((core.interrupt.status(), core.interrupt.irq().read().ok()), (0, None));
        core.driver_ready();
        assert_eq!(core.interrupt.status(), VIRTIO_MMIO_INT_CONFIG);
        assert_eq!(core.interrupt.irq().read().unwrap(), 1);
        core.reset();
        core.driver_ready();
        assert_eq!(
            core.interrupt.status(),
            0,
            "a reset forgets what a former driver was not told"
        );
    }
}
