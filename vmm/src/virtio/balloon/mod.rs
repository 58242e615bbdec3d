//! virtio-balloon (virtio 1.3, 5.5): the guest gives memory up, as much as the host asks for, and tells what it has free.
//!
//! - **Inflate**: the driver takes pages out of use and names them, 4 bytes a page; the host drops what is in them.
//!   Deflating needs nothing done: the pages fault in again. With DEFLATE_ON_OOM the driver takes pages back by itself.
//! - **Reporting** (5.5.6.7): the driver lends ranges that are free, and gets each buffer back when it was dropped. No number is
//!   agreed on: an idle guest just costs what it uses.
//!
//! The driver owns the pages that it names: a guest that names others than it should loses its own data. What is not guest
//! memory is refused and counted ("bad_page", "bad_range").
//!
//! System calls of the thread, beside those of every device thread: none (`madvise` is everybody's).

#[cfg(test)]
mod tests;

use std::sync::Arc;

use virtio_bindings::virtio_ids::VIRTIO_ID_BALLOON;
use vm_memory::GuestAddress;
use vmm_sys_util::epoll::EventSet;

use super::core::Core;
use super::device::{Activation, Device, DeviceError, Guest, GuestState};
use super::discard::{PAGE, discard};
use super::feature;
use super::worker::ThreadKind;
use crate::memory::GuestMemory;

const QUEUE_SIZE: u16 = 128;
const INFLATE: usize = 0;
const DEFLATE: usize = 1;
/// The reporting queue is the fifth (5.5.2). Linux up to 6.x numbers only the queues that are there, which makes it the third;
/// as neither statistics nor hints are on offer, nothing else can be meant by that. So both are reporting queues. There is
/// no queue of hints.
const QUEUES: [u16; 5] = [QUEUE_SIZE, QUEUE_SIZE, QUEUE_SIZE, 0, QUEUE_SIZE];

/// Page numbers in one buffer; Linux sends 256. More is not looked at.
const MAX_NUMBERS: usize = 4096;

/// VIRTIO_BALLOON_F_DEFLATE_ON_OOM and VIRTIO_BALLOON_F_REPORTING (virtio 1.3, 5.5.3).
const DEFLATE_ON_OOM: u32 = 2;
const REPORTING: u32 = 5;

// ---- config space (virtio 1.3, 5.5.4)

const NUM_PAGES: usize = 0;
const ACTUAL: usize = 4;
/// Without the fields of features that are not on offer.
const CONFIG_BYTES: usize = ACTUAL + 4;

fn put(config: &mut [u8], at: usize, value: u32) {
    config[at..at + 4].copy_from_slice(&value.to_le_bytes());
}

/// A number of pages as the configuration space has it.
fn number(core: &Core, at: usize) -> u32 {
    let mut bytes = [0; 4];
    core.config.read(at as u64, &mut bytes);
    u32::from_le_bytes(bytes)
}

// ---- state

/// A balloon.
pub struct Balloon {
    core: Arc<Core>,
    guest: Option<Guest>,
}

/// How much the guest is to give up. It may be bound any number of times.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Target {
    /// In pages of 4 KiB.
    pub pages: u32,
}

/// What is saved of a balloon.
#[derive(Clone, PartialEq, prost::Message)]
pub struct BalloonState {
    /// The driver's side.
    #[prost(message, optional, tag = "1")]
    pub guest: Option<GuestState>,
    /// What the guest is to give up, in pages.
    #[prost(uint32, tag = "2")]
    pub target: u32,
    /// What it says that it gave.
    #[prost(uint32, tag = "3")]
    pub actual: u32,
}

impl Balloon {
    /// An empty balloon.
    ///
    /// # Errors
    /// When the process is out of file descriptors.
    pub fn new() -> Result<Self, DeviceError> {
        let core = Core::new(QUEUES.len(), vec![0; CONFIG_BYTES]).map_err(DeviceError::host("make eventfds"))?;
        Ok(Self {
            // The driver writes how many pages it gave (5.5.6).
            core: Arc::new(core.with_writable(ACTUAL..ACTUAL + 4)),
            guest: None,
        })
    }

    /// What the guest is to give up and what it says that it gave, in bytes, for whoever holds a balloon's shared part.
    pub fn sizes(core: &Core) -> (u64, u64) {
        let bytes = |at| u64::from(number(core, at)) * PAGE;
        (bytes(NUM_PAGES), bytes(ACTUAL))
    }

    // ---- process

    fn process(&mut self, index: usize) -> Result<(), DeviceError> {
        match index {
            INFLATE => self.inflate(),
            DEFLATE => self.deflate(),
            _ => self.report(index),
        }
    }

    fn inflate(&mut self) -> Result<(), DeviceError> {
        let Self {
            core,
            guest: Some(guest),
        } = self
        else {
            return Ok(());
        };
        let Some(Some(queue)) = guest.queues.get_mut(INFLATE) else {
            return Ok(());
        };
        queue.begin()?;
        while let Some(chain) = queue.next_chain()? {
            let len = usize::try_from(chain.readable.len()).unwrap_or(usize::MAX);
            if len == 0 || len % 4 != 0 || len > 4 * MAX_NUMBERS {
                core.counters.bump("bad_chain");
            } else {
                let mut bytes = vec![0; len];
                chain.readable.read_at(&guest.memory, 0, &mut bytes)?;
                for (first, count) in runs(&bytes) {
                    let start = GuestAddress(u64::from(first) * PAGE);
                    if discard(&guest.memory, start, count * PAGE).is_err() {
                        core.counters.bump("bad_page");
                    }
                }
            }
            queue.push(chain.head, 0)?;
        }
        queue.end()?;
        queue.signal()
    }

    fn deflate(&mut self) -> Result<(), DeviceError> {
        let Some(queue) = self.guest.as_mut().and_then(|guest| guest.queue(DEFLATE)) else {
            return Ok(());
        };
        queue.begin()?;
        while let Some(chain) = queue.next_chain()? {
            queue.push(chain.head, 0)?;
        }
        queue.end()?;
        queue.signal()
    }

    fn report(&mut self, index: usize) -> Result<(), DeviceError> {
        let Self {
            core,
            guest: Some(guest),
        } = self
        else {
            return Ok(());
        };
        if !guest.has(REPORTING) {
            return Ok(());
        }
        let Some(Some(queue)) = guest.queues.get_mut(index) else {
            return Ok(());
        };
        queue.begin()?;
        while let Some(chain) = queue.next_chain()? {
            // Ranges are what the device may write (5.5.6.7): it may fill them with anything.
            for range in chain.writable.segments() {
                match discard(&guest.memory, range.addr, range.len.into()) {
                    Ok(()) => core.counters.add("reported_bytes", range.len.into()),
                    Err(_) => core.counters.bump("bad_range"),
                }
            }
            queue.push(chain.head, 0)?;
        }
        queue.end()?;
        queue.signal()
    }
}

/// Page numbers, little endian, as runs of (first, count), so that neighbours cost one system call.
fn runs(bytes: &[u8]) -> Vec<(u32, u64)> {
    let (words, _) = bytes.as_chunks::<4>();
    let mut numbers: Vec<u32> = words.iter().map(|word| u32::from_le_bytes(*word)).collect();
    numbers.sort_unstable();
    numbers.dedup();
    let mut runs: Vec<(u32, u64)> = Vec::new();
    for number in numbers {
        match runs.last_mut() {
            Some((first, count)) if u64::from(*first) + *count == u64::from(number) => *count += 1,
            _ => runs.push((number, 1)),
        }
    }
    runs
}

impl Device for Balloon {
    type Resource = Target;
    type State = BalloonState;
    const KIND: ThreadKind = ThreadKind::Balloon;

    fn core(&self) -> &Arc<Core> {
        &self.core
    }

    fn device_id(&self) -> u32 {
        VIRTIO_ID_BALLOON
    }

    fn features(&self) -> u64 {
        feature(DEFLATE_ON_OOM) | feature(REPORTING)
    }

    fn queue_sizes(&self) -> Vec<u16> {
        QUEUES.to_vec()
    }

    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError> {
        self.guest = Some(Guest::new(activation, &self.core)?);
        Ok(())
    }

    fn queue_event(&mut self, index: usize) -> Result<(), DeviceError> {
        self.process(index)
    }

    fn device_event(&mut self, _token: u64, _events: EventSet) -> Result<(), DeviceError> {
        // It watches nothing of its own.
        Ok(())
    }

    fn bind(&mut self, target: Target) -> Result<(), DeviceError> {
        self.core.change_config(|config| put(config, NUM_PAGES, target.pages));
        Ok(())
    }

    fn quiesce(&mut self) -> Result<(), DeviceError> {
        // Everything here happens within one event: nothing is ever in flight.
        Ok(())
    }

    fn resume(&mut self) -> Result<(), DeviceError> {
        (0..QUEUES.len()).try_for_each(|index| self.process(index))
    }

    fn has_work(&self) -> bool {
        self.guest.as_ref().is_some_and(Guest::has_chains)
    }

    /// The pages that a driver gave are its successor's; what is wanted of it stays.
    fn reset(&mut self) {
        self.guest = None;
        self.core.config.update(|config| put(config, ACTUAL, 0));
    }

    // ---- save and restore

    fn save(&self) -> BalloonState {
        BalloonState {
            guest: self.guest.as_ref().map(Guest::state),
            target: number(&self.core, NUM_PAGES),
            actual: number(&self.core, ACTUAL),
        }
    }

    fn restore(&mut self, state: BalloonState, memory: GuestMemory) -> Result<(), DeviceError> {
        self.reset();
        let guest = state.guest.map(|guest| Guest::restore(guest, memory, &self.core));
        self.guest = guest.transpose()?;
        self.core.config.update(|config| {
            put(config, NUM_PAGES, state.target);
            put(config, ACTUAL, state.actual);
        });
        Ok(())
    }
}
