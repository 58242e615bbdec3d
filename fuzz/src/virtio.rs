//! A virtio driver made of the fuzzer's bytes: it puts them into guest memory wherever it likes, changes them while the device
//! works, and notifies.
//!
//! The rings lie where a driver may put them; what is in them, and all that they point to, comes from the input. A share of
//! the descriptors is made such that they point into memory, or few inputs would get past the first check.

use std::sync::Arc;

use flint_vmm::memory::{GuestMemory, GuestMemoryMmap};
use flint_vmm::virtio::Device;
use flint_vmm::virtio::device::Activation;
use libfuzzer_sys::arbitrary::{self, Arbitrary};
use prost::Message;
use virtio_queue::QueueState;
use vm_memory::{Bytes, GuestAddress};

/// Guest memory: a few pages in two regions with a gap between.
const LOW: u64 = 0x1_0000;
const HIGH: u64 = 0x2_0000;
const HIGH_LEN: usize = 0x8000;
/// Where the rings of queue `n` begin: descriptors, available, used, a page each.
const RINGS: u64 = 0x1000;
const QUEUE_SPAN: u64 = 0x3000;
const SIZE: u16 = 16;
/// Where descriptors' data goes.
const DATA: u64 = 0xa000;

/// One thing that the driver does.
#[derive(Debug, Arbitrary)]
pub enum Step {
    /// Writes into memory, wherever.
    Poke(u16, Vec<u8>),
    /// Writes a descriptor as it is.
    Descriptor {
        /// In which queue.
        queue: u8,
        /// Which.
        index: u8,
        /// Address, length, flags, next.
        raw: (u64, u32, u16, u16),
    },
    /// Makes a well-formed chain available, with this in its readable parts.
    Chain {
        /// In which queue.
        queue: u8,
        /// Device-readable parts.
        readable: Vec<Vec<u8>>,
        /// Lengths of device-writable parts.
        writable: Vec<u16>,
    },
    /// Moves the index of the available ring.
    Available(u8, u16),
    /// Notifies a queue.
    Notify(u8),
    /// Resets the device and comes again.
    Reset,
    /// Saves the device and goes on with what was saved.
    Restore,
    /// Goes on with a saved state that may be anything.
    RestoreBytes(Vec<u8>),
}

/// What one run does.
#[derive(Debug, Arbitrary)]
pub struct Script {
    /// Feature bits, as far as the device offers them.
    pub features: u64,
    /// Steps.
    pub steps: Vec<Step>,
}

/// The driver's side.
struct Driver {
    memory: GuestMemory,
    queues: usize,
    next: [u16; 4],
    available: [u16; 4],
    data: u64,
}

/// Runs `script` on `device`, which may have been bound before; `each` comes after each step, for what else the device
/// watches.
///
/// # Panics
/// When guest memory cannot be made.
pub fn run<D: Device>(device: &mut D, script: &Script, mut each: impl FnMut(&mut D)) {
    let ranges = [
        (GuestAddress(0), usize::try_from(LOW).expect("64 KiB")),
        (GuestAddress(HIGH), HIGH_LEN),
    ];
    let memory: GuestMemory = Arc::new(GuestMemoryMmap::from_ranges(&ranges).expect("memory"));
    let queues = device.queue_sizes().len().min(3);
    let mut driver = Driver {
        memory,
        queues,
        next: [0; 4],
        available: [0; 4],
        data: DATA,
    };
    driver.activate(device, script.features);
    for step in script.steps.iter().take(64) {
        match step {
            Step::Reset => {
                device.reset();
                driver.next = [0; 4];
                driver.available = [0; 4];
                driver.activate(device, script.features);
            }
            Step::Restore => {
                if device.quiesce().is_ok() {
                    let state = device.save();
                    if device.restore(state.clone(), driver.memory.clone()).is_ok() {
                        assert!(device.save() == state, "a restored device saves another state");
                        let _ = device.resume();
                    }
                }
            }
            Step::RestoreBytes(bytes) => {
                let _ = device.quiesce();
                if let Ok(state) = D::State::decode(&bytes[..])
                    && device.restore(state, driver.memory.clone()).is_ok()
                {
                    let _ = device.resume();
                }
            }
            // An error stops the device until its driver resets it; so does the worker that calls it.
            Step::Notify(queue) => {
                if device.queue_event(usize::from(*queue) % queues.max(1)).is_err() {
                    device.reset();
                    driver.activate(device, script.features);
                }
            }
            other => driver.write(other),
        }
        each(device);
    }
    let _ = device.quiesce();
    let _ = device.save();
    device.reset();
}

impl Driver {
    fn activate<D: Device>(&self, device: &mut D, features: u64) {
        let sizes = device.queue_sizes();
        let states = sizes.iter().enumerate().map(|(index, &max_size)| {
            let base = RINGS + index as u64 * QUEUE_SPAN;
            QueueState {
                max_size,
                size: SIZE.min(max_size),
                ready: index < self.queues,
                desc_table: base,
                avail_ring: base + 0x1000,
                used_ring: base + 0x2000,
                ..QueueState::default()
            }
        });
        let _ = device.activate(Activation {
            memory: self.memory.clone(),
            features: features & device.features(),
            queues: states.collect(),
        });
    }

    fn base(&self, queue: u8) -> (usize, u64) {
        let queue = usize::from(queue) % self.queues.max(1);
        (queue, RINGS + queue as u64 * QUEUE_SPAN)
    }

    fn put(&self, at: u64, bytes: &[u8]) {
        let _ = self.memory.write(bytes, GuestAddress(at));
    }

    fn descriptor(&self, base: u64, index: u16, (addr, len, flags, next): (u64, u32, u16, u16)) {
        let at = base + u64::from(index % SIZE) * 16;
        let raw = [
            &addr.to_le_bytes()[..],
            &len.to_le_bytes(),
            &flags.to_le_bytes(),
            &next.to_le_bytes(),
        ];
        self.put(at, &raw.concat());
    }

    fn write(&mut self, step: &Step) {
        match step {
            Step::Poke(at, bytes) => self.put(u64::from(*at), &bytes[..bytes.len().min(4096)]),
            Step::Descriptor { queue, index, raw } => {
                let (_, base) = self.base(*queue);
                self.descriptor(base, (*index).into(), *raw);
            }
            Step::Chain {
                queue,
                readable,
                writable,
            } => self.chain(*queue, readable, writable),
            Step::Available(queue, index) => {
                let (number, base) = self.base(*queue);
                self.available[number] = *index;
                self.put(base + 0x1002, &index.to_le_bytes());
            }
            Step::Notify(_) | Step::Reset | Step::Restore | Step::RestoreBytes(_) => {}
        }
    }

    fn chain(&mut self, queue: u8, readable: &[Vec<u8>], writable: &[u16]) {
        let (number, base) = self.base(queue);
        let head = self.next[number];
        let mut parts = Vec::new();
        for bytes in readable.iter().take(8) {
            let len = bytes.len().min(4096);
            self.put(self.data, &bytes[..len]);
            parts.push((self.data, u32::try_from(len).unwrap_or(0), 0));
            self.advance(len as u64);
        }
        for len in writable.iter().take(8) {
            parts.push((self.data, (*len).into(), 2));
            self.advance((*len).into());
        }
        let count = parts.len();
        for (at, (addr, len, flags)) in parts.into_iter().enumerate() {
            let this = self.next[number];
            self.next[number] = (this + 1) % SIZE;
            let more = u16::from(at + 1 < count);
            self.descriptor(base, this, (addr, len, flags | more, self.next[number]));
        }
        let slot = base + 0x1004 + u64::from(self.available[number] % SIZE) * 2;
        self.put(slot, &head.to_le_bytes());
        self.available[number] = self.available[number].wrapping_add(1);
        self.put(base + 0x1002, &self.available[number].to_le_bytes());
    }

    /// Data wraps around before the end of memory, so that parts overlap sooner or later.
    fn advance(&mut self, len: u64) {
        self.data += len;
        if self.data >= LOW - 0x100 {
            self.data = DATA;
        }
    }
}
