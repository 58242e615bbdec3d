//! Virtio devices on the MMIO bus: each gets a window, an interrupt and a name for its counters.
//!
//! ```text
//! device n:  window VIRTIO_BASE + n * 0x1000     interrupt 5 + n mod 19
//!            queue q: ioeventfd at window + 0x50, datamatch q      interrupt eventfd: irqfd, edge triggered
//! ```
//!
//! KVM's IOAPIC has 24 pins, of which 5 to 23 are free: from the 20th device on, interrupts are shared. An edge is never
//! lost by that: each device's eventfd makes an edge of its own, and a driver looks at its own status register.

use std::sync::{Arc, Mutex};

use kvm_ioctls::{IoEventAddress, VmFd};
use prost::{DecodeError, Message};
use thiserror::Error;
use vmm_sys_util::eventfd::EventFd;

use crate::acpi::VirtioWindow;
use crate::bus::{self, Bus};
use crate::memory::{GuestMemory, VIRTIO_BASE, VIRTIO_WINDOW};
use crate::virtio::core::{Core, lock};
use crate::virtio::mmio::{DeviceInfo, MmioState};
use crate::virtio::{Device, DeviceError, DeviceHandle, MmioTransport, ThreadHook};

const FIRST_IRQ: u32 = 5;
const IRQS: u32 = 24 - FIRST_IRQ;

/// A device that cannot be put into a machine.
#[derive(Debug, Error)]
pub enum Error {
    /// Its thread.
    #[error("starting the thread of {name}")]
    Thread {
        /// Which device.
        name: String,
        /// Why not.
        source: std::io::Error,
    },
    /// Its window.
    #[error("placing {name}")]
    Window {
        /// Which device.
        name: String,
        /// Why not.
        source: bus::Error,
    },
    /// Its eventfds.
    #[error("connecting {name} to KVM")]
    Kvm {
        /// Which device.
        name: String,
        /// Why not.
        source: kvm_ioctls::Error,
    },
}

/// What a machine does with a device whatever its kind.
pub trait AnyDevice: Send {
    /// The name that its counters begin with.
    fn name(&self) -> &str;
    /// Lets it come to rest.
    ///
    /// # Errors
    /// The host fails.
    fn pause(&self) -> Result<(), DeviceError>;
    /// Lets it go on.
    ///
    /// # Errors
    /// The device cannot go on.
    fn resume(&self) -> Result<(), DeviceError>;
    /// Lets a loaded device go on that has nothing to do yet. False: it has, and waits for [`Self::begin`].
    ///
    /// # Errors
    /// The device's thread has ended.
    fn begin_idle(&self) -> Result<bool, DeviceError>;
    /// Lets it go on, without waiting for it.
    ///
    /// # Errors
    /// The device's thread has ended.
    fn begin(&self) -> Result<(), DeviceError>;
    /// What went wrong so far, by name.
    fn counters(&self) -> Vec<(&'static str, u64)>;
    /// Saves the device, which must be paused.
    ///
    /// # Errors
    /// It is not.
    fn save(&self) -> Result<DeviceRecord, DeviceError>;
    /// Gives the device a saved state, and leaves it paused.
    ///
    /// # Errors
    /// The state is another device's, or contradicts itself.
    fn restore(&self, record: &DeviceRecord) -> Result<(), DeviceError>;
    /// Raises the interrupt of a restored device again that was pending, when its vCPUs can take it.
    fn repeat_interrupt(&self);
}

/// A virtio device in a saved machine.
#[derive(Clone, PartialEq, prost::Message)]
pub struct DeviceRecord {
    /// As its counters begin.
    #[prost(string, tag = "1")]
    pub name: String,
    /// Virtio device id (virtio 1.3, section 5).
    #[prost(uint32, tag = "2")]
    pub device_id: u32,
    /// Its registers.
    #[prost(message, optional, tag = "3")]
    pub registers: Option<MmioState>,
    /// Its own state: a [`Device::State`].
    #[prost(bytes = "vec", tag = "4")]
    pub state: Vec<u8>,
}

/// A device in its place.
pub struct Slot<D: Device> {
    name: String,
    device_id: u32,
    handle: Arc<DeviceHandle<D>>,
    transport: Arc<Mutex<MmioTransport>>,
    memory: GuestMemory,
}

impl<D: Device> Slot<D> {
    /// Puts something behind the slot.
    ///
    /// # Errors
    /// It does not fit.
    pub fn bind(&self, resource: D::Resource) -> Result<(), DeviceError> {
        self.handle.bind(resource)
    }

    /// Does something to the device.
    ///
    /// # Errors
    /// As that says; the device is gone.
    pub(crate) fn with<T>(&self, act: impl FnOnce(&mut D) -> Result<T, DeviceError>) -> Result<T, DeviceError> {
        self.handle.with(act)
    }

    /// The device's own state; it must be paused.
    ///
    /// # Errors
    /// It is not.
    pub fn state(&self) -> Result<D::State, DeviceError> {
        self.handle.save()
    }

    /// What the device shows to everybody.
    pub fn core(&self) -> &Core {
        self.handle.core()
    }
}

impl<D: Device> AnyDevice for Slot<D> {
    fn name(&self) -> &str {
        &self.name
    }

    fn pause(&self) -> Result<(), DeviceError> {
        self.handle.pause()
    }

    fn resume(&self) -> Result<(), DeviceError> {
        self.handle.resume()
    }

    fn begin_idle(&self) -> Result<bool, DeviceError> {
        self.handle.begin_idle()
    }

    fn begin(&self) -> Result<(), DeviceError> {
        self.handle.begin()
    }

    fn counters(&self) -> Vec<(&'static str, u64)> {
        self.handle.core().counters.all()
    }

    fn save(&self) -> Result<DeviceRecord, DeviceError> {
        Ok(DeviceRecord {
            name: self.name.clone(),
            device_id: self.device_id,
            // After the device's part: an interrupt that it raises on its way to rest is among its registers then.
            state: self.handle.save()?.encode_to_vec(),
            registers: Some(lock(&self.transport).save()),
        })
    }

    fn restore(&self, record: &DeviceRecord) -> Result<(), DeviceError> {
        if (&record.name, record.device_id) != (&self.name, self.device_id) {
            return Err(DeviceError::State(format!(
                "the snapshot has {} of virtio id {} in its place",
                record.name, record.device_id
            )));
        }
        let unreadable = |error: DecodeError| DeviceError::State(error.to_string());
        let state = D::State::decode(&record.state[..]).map_err(unreadable)?;
        let registers = record.registers.clone();
        let registers = registers.ok_or_else(|| DeviceError::State("its registers are missing".to_owned()))?;
        self.handle.restore(state, self.memory.clone())?;
        lock(&self.transport).restore(registers)
    }

    fn repeat_interrupt(&self) {
        lock(&self.transport).repeat_interrupt();
    }
}

/// Puts devices into a machine, one after the other.
pub struct Builder<'a> {
    vm: &'a VmFd,
    memory: &'a GuestMemory,
    bus: &'a mut Bus,
    hook: ThreadHook,
    windows: Vec<VirtioWindow>,
}

impl<'a> Builder<'a> {
    /// Begins with no device. `hook` confines each device's thread.
    pub fn new(vm: &'a VmFd, memory: &'a GuestMemory, bus: &'a mut Bus, hook: ThreadHook) -> Self {
        Self {
            vm,
            memory,
            bus,
            hook,
            windows: Vec::new(),
        }
    }

    /// Starts a device and connects it.
    ///
    /// # Errors
    /// The host or KVM refuses.
    pub fn add<D: Device>(&mut self, name: String, device: D) -> Result<Slot<D>, Error> {
        let info = DeviceInfo::of(&device);
        let window = self.next_window();
        let handle = match DeviceHandle::start(&name, device, self.hook.clone()) {
            Ok(handle) => Arc::new(handle),
            Err(source) => return Err(Error::Thread { name, source }),
        };
        let core = handle.core().clone();
        self.connect(window, core.interrupt.irq(), core.notify())
            .map_err(|source| Error::Kvm {
                name: name.clone(),
                source,
            })?;
        let device_id = info.device_id;
        let transport = MmioTransport::new(info, handle.clone(), core, self.memory.clone());
        let transport = Arc::new(Mutex::new(transport));
        self.bus
            .insert(window.base.into(), VIRTIO_WINDOW, transport.clone())
            .map_err(|source| Error::Window {
                name: name.clone(),
                source,
            })?;
        self.windows.push(window);
        Ok(Slot {
            name,
            device_id,
            handle,
            transport,
            memory: self.memory.clone(),
        })
    }

    /// All windows, for the ACPI tables.
    pub fn finish(self) -> Vec<VirtioWindow> {
        self.windows
    }

    fn next_window(&self) -> VirtioWindow {
        // At most config::MAX_DEVICES are asked for, so neither value leaves its range.
        #[allow(clippy::cast_possible_truncation)]
        let index = self.windows.len() as u32;
        #[allow(clippy::cast_possible_truncation)]
        let base = (VIRTIO_BASE + u64::from(index) * VIRTIO_WINDOW) as u32;
        VirtioWindow {
            base,
            irq: FIRST_IRQ + index % IRQS,
        }
    }

    fn connect(&self, window: VirtioWindow, interrupt: &EventFd, notify: &[EventFd]) -> Result<(), kvm_ioctls::Error> {
        self.vm.register_irqfd(interrupt, window.irq)?;
        let address = IoEventAddress::Mmio(u64::from(window.base) + MmioTransport::NOTIFY_OFFSET);
        for (queue, eventfd) in (0u32..).zip(notify) {
            self.vm.register_ioevent(eventfd, &address, queue)?;
        }
        Ok(())
    }
}
