//! virtio-mem (virtio 1.3, 5.15): memory that is plugged and unplugged while the guest runs, in blocks of 2 MiB.
//!
//! ```text
//!   HOTPLUG_START                            + region size
//!   |##########|##|----|###|------------------|     # plugged  - unplugged
//!   requested size: what the host wants. The driver plugs and unplugs block after block until it has that much.
//! ```
//!
//! The region's addresses and its KVM slot are there from the machine's making; only pages that are touched cost memory. What
//! is unplugged is dropped. The driver may not touch unplugged blocks (UNPLUGGED_INACCESSIBLE). A hostile one that does finds
//! zeros, and what it writes there is charged to its sandbox like all of its memory: what keeps a guest to its size is the
//! sandbox's memory cgroup. Taking the pages away by mprotect would make such a guest fault this process instead, by any
//! address that it hands to a device.
//!
//! Requests that make no sense are answered with an error and counted ("bad_request").
//!
//! System calls of the thread, beside those of every device thread: none (`madvise` is everybody's).

mod plugged;
mod request;
#[cfg(test)]
mod tests;

use std::ops::Range;
use std::sync::Arc;

use virtio_bindings::virtio_ids::VIRTIO_ID_MEM;
use vm_memory::GuestAddress;
use vmm_sys_util::epoll::EventSet;

pub use self::plugged::Plugged;
use self::request::{REQUEST_BYTES, RESPONSE_BYTES, Request, Response};
use super::core::Core;
use super::device::{Activation, Device, DeviceError, Guest, GuestState};
use super::discard::discard;
use super::feature;
use super::queue::VirtQueue;
use super::worker::ThreadKind;
use crate::memory::GuestMemory;

/// What is plugged at once: a huge page of the host.
pub const BLOCK: u64 = 2 << 20;
const QUEUE_SIZE: u16 = 128;

/// VIRTIO_MEM_F_UNPLUGGED_INACCESSIBLE (virtio 1.3, 5.15.3).
const UNPLUGGED_INACCESSIBLE: u32 = 1;

// ---- config space (virtio 1.3, 5.15.4); the NUMA node at 8 is left zero, for want of ACPI_PXM

const BLOCK_SIZE: usize = 0;
const ADDRESS: usize = 16;
const REGION_SIZE: usize = 24;
const USABLE_SIZE: usize = 32;
const PLUGGED_SIZE: usize = 40;
const REQUESTED_SIZE: usize = 48;
const CONFIG_BYTES: usize = 56;

fn put(config: &mut [u8], at: usize, value: u64) {
    config[at..at + 8].copy_from_slice(&value.to_le_bytes());
}

fn number(core: &Core, at: usize) -> u64 {
    let mut bytes = [0; 8];
    core.config.read(at as u64, &mut bytes);
    u64::from_le_bytes(bytes)
}

// ---- state

/// Where plugged memory comes from: a region of guest memory that nothing else uses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemSlot {
    /// Its first address.
    pub start: u64,
    /// Its length, a multiple of [`BLOCK`].
    pub size: u64,
}

/// A virtio-mem device.
pub struct Mem {
    core: Arc<Core>,
    slot: MemSlot,
    plugged: Plugged,
    guest: Option<Guest>,
}

/// How much the guest is to have plugged. It may be bound any number of times.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Requested {
    /// A multiple of [`BLOCK`].
    pub bytes: u64,
}

/// What is saved of a virtio-mem device. The content of plugged blocks is saved with the memory.
#[derive(Clone, PartialEq, prost::Message)]
pub struct MemState {
    /// The driver's side.
    #[prost(message, optional, tag = "1")]
    pub guest: Option<GuestState>,
    /// First address of the region.
    #[prost(uint64, tag = "2")]
    pub start: u64,
    /// Its length.
    #[prost(uint64, tag = "3")]
    pub size: u64,
    /// What the guest is to have.
    #[prost(uint64, tag = "4")]
    pub requested: u64,
    /// Plugged blocks, 64 in a word.
    #[prost(fixed64, repeated, tag = "5")]
    pub plugged: Vec<u64>,
}

impl MemState {
    /// Guest addresses that are plugged, in order: all else in the region has no content to save.
    ///
    /// # Errors
    /// The state contradicts itself.
    pub fn plugged_ranges(&self) -> Result<Vec<Range<u64>>, DeviceError> {
        let ranges = self.blocks()?.ranges().into_iter();
        // Within the region, whose end `blocks` found to be an address.
        let address = |block: usize| self.start + block as u64 * BLOCK;
        Ok(ranges.map(|range| address(range.start)..address(range.end)).collect())
    }

    fn blocks(&self) -> Result<Plugged, DeviceError> {
        let fits = self.size.is_multiple_of(BLOCK) && self.start.checked_add(self.size).is_some();
        let blocks = usize::try_from(self.size / BLOCK).ok().filter(|_| fits);
        blocks
            .and_then(|blocks| Plugged::from_words(self.plugged.clone(), blocks))
            .ok_or_else(|| {
                let (words, size) = (self.plugged.len(), self.size);
                DeviceError::State(format!("{words} words of plugged blocks for a region of {size} bytes"))
            })
    }
}

impl Mem {
    /// A device with nothing plugged.
    ///
    /// # Errors
    /// When the region is not made of blocks, or the process is out of file descriptors.
    pub fn new(slot: MemSlot) -> Result<Self, DeviceError> {
        let MemSlot { start, size } = slot;
        let blocks = usize::try_from(size / BLOCK).unwrap_or(usize::MAX);
        if !size.is_multiple_of(BLOCK) || !start.is_multiple_of(BLOCK) || start.checked_add(size).is_none() {
            return Err(DeviceError::Refused(format!(
                "{size:#x} bytes at {start:#x} are no region of blocks of 2 MiB"
            )));
        }
        let mut config = vec![0; CONFIG_BYTES];
        for (at, value) in [
            (BLOCK_SIZE, BLOCK),
            (ADDRESS, start),
            (REGION_SIZE, size),
            (USABLE_SIZE, size),
        ] {
            put(&mut config, at, value);
        }
        let core = Core::new(1, config).map_err(DeviceError::host("make eventfds"))?;
        Ok(Self {
            core: Arc::new(core),
            slot,
            plugged: Plugged::none(blocks),
            guest: None,
        })
    }

    /// What the guest is to have and what it has, in bytes, for whoever holds a device's shared part.
    #[must_use]
    pub fn sizes(core: &Core) -> (u64, u64) {
        (number(core, REQUESTED_SIZE), number(core, PLUGGED_SIZE))
    }

    // ---- process

    fn process(&mut self) -> Result<(), DeviceError> {
        // The queue leaves the device for the time, so that requests can change the rest of it.
        let Some(guest) = self.guest.as_mut() else {
            return Ok(());
        };
        let memory = guest.memory.clone();
        let Some(mut queue) = guest.queues.get_mut(0).and_then(Option::take) else {
            return Ok(());
        };
        let outcome = self.serve(&mut queue, &memory);
        if let Some(place) = self.guest.as_mut().and_then(|guest| guest.queues.get_mut(0)) {
            *place = Some(queue);
        }
        outcome
    }

    fn serve(&mut self, queue: &mut VirtQueue, memory: &GuestMemory) -> Result<(), DeviceError> {
        queue.begin()?;
        while let Some(chain) = queue.next_chain()? {
            let mut bytes = [0; REQUEST_BYTES];
            let read = chain.readable.read_at(memory, 0, &mut bytes)?;
            if read < REQUEST_BYTES || chain.writable.len() < RESPONSE_BYTES as u64 {
                self.core.counters.bump("bad_chain");
                queue.push(chain.head, 0)?;
                continue;
            }
            let response = self.answer(Request::parse(&bytes), memory);
            let written = chain.writable.write_at(memory, 0, &response.to_bytes())?;
            queue.push(chain.head, u32::try_from(written).unwrap_or(0))?;
        }
        queue.end()?;
        queue.signal()
    }

    fn answer(&mut self, request: Request, memory: &GuestMemory) -> Response {
        let answer = match request {
            Request::Plug { address, blocks } => self.plug(address, blocks),
            Request::Unplug { address, blocks } => self.unplug(address, blocks, memory),
            Request::UnplugAll => Some(self.drop_blocks(0..self.plugged.capacity(), memory)),
            Request::State { address, blocks } => self.state(address, blocks),
            Request::Unknown => None,
        };
        answer.unwrap_or_else(|| {
            self.core.counters.bump("bad_request");
            Response::Error
        })
    }

    /// Numbers of blocks. None: there are no such, or none at all (5.15.6).
    fn blocks(&self, address: u64, blocks: u16) -> Option<Range<usize>> {
        let offset = address.checked_sub(self.slot.start)?;
        let first = usize::try_from(offset / BLOCK).ok()?;
        let end = first.checked_add(blocks.into())?;
        (offset.is_multiple_of(BLOCK) && blocks > 0 && end <= self.plugged.capacity()).then_some(first..end)
    }

    fn plug(&mut self, address: u64, blocks: u16) -> Option<Response> {
        let range = self.blocks(address, blocks)?;
        if self.plugged.count_in(range.clone()) > 0 {
            return None;
        }
        let (requested, plugged) = Self::sizes(&self.core);
        if plugged + u64::from(blocks) * BLOCK > requested {
            return Some(Response::Refused);
        }
        self.plugged.set(range, true);
        self.show();
        Some(Response::Done)
    }

    fn unplug(&mut self, address: u64, blocks: u16, memory: &GuestMemory) -> Option<Response> {
        let range = self.blocks(address, blocks)?;
        let all_plugged = self.plugged.count_in(range.clone()) == range.len();
        all_plugged.then(|| self.drop_blocks(range, memory))
    }

    fn drop_blocks(&mut self, range: Range<usize>, memory: &GuestMemory) -> Response {
        let start = GuestAddress(self.slot.start + range.start as u64 * BLOCK);
        if discard(memory, start, range.len() as u64 * BLOCK).is_err() {
            self.core.counters.bump("discard_failed");
            return Response::Busy;
        }
        self.plugged.set(range, false);
        self.show();
        Response::Done
    }

    fn state(&self, address: u64, blocks: u16) -> Option<Response> {
        let range = self.blocks(address, blocks)?;
        Some(match self.plugged.count_in(range.clone()) {
            0 => Response::Unplugged,
            all if all == range.len() => Response::Plugged,
            _ => Response::Mixed,
        })
    }

    /// Shows what is plugged. The driver did it and needs no notification.
    fn show(&self) {
        let bytes = self.plugged.count() * BLOCK;
        self.core.config.update(|config| put(config, PLUGGED_SIZE, bytes));
    }
}

impl Device for Mem {
    type Resource = Requested;
    type State = MemState;
    const KIND: ThreadKind = ThreadKind::Mem;

    fn core(&self) -> &Arc<Core> {
        &self.core
    }

    fn device_id(&self) -> u32 {
        VIRTIO_ID_MEM
    }

    fn features(&self) -> u64 {
        feature(UNPLUGGED_INACCESSIBLE)
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE]
    }

    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError> {
        self.guest = Some(Guest::new(activation, &self.core)?);
        Ok(())
    }

    fn queue_event(&mut self, _index: usize) -> Result<(), DeviceError> {
        self.process()
    }

    fn device_event(&mut self, _token: u64, _events: EventSet) -> Result<(), DeviceError> {
        // It watches nothing of its own.
        Ok(())
    }

    fn bind(&mut self, Requested { bytes }: Requested) -> Result<(), DeviceError> {
        if !bytes.is_multiple_of(BLOCK) || bytes > self.slot.size {
            let most = self.slot.size;
            return Err(DeviceError::Invalid(format!(
                "{bytes} bytes cannot be plugged: a multiple of 2 MiB up to {most} can"
            )));
        }
        self.core.change_config(|config| put(config, REQUESTED_SIZE, bytes));
        Ok(())
    }

    fn quiesce(&mut self) -> Result<(), DeviceError> {
        // Everything here happens within one event: nothing is ever in flight.
        Ok(())
    }

    fn resume(&mut self) -> Result<(), DeviceError> {
        self.process()
    }

    fn has_work(&self) -> bool {
        self.guest.as_ref().is_some_and(Guest::has_chains)
    }

    /// What is plugged stays plugged: a device's reset is not the machine's (5.15.5).
    fn reset(&mut self) {
        self.guest = None;
    }

    // ---- save and restore

    fn save(&self) -> MemState {
        MemState {
            guest: self.guest.as_ref().map(Guest::state),
            start: self.slot.start,
            size: self.slot.size,
            requested: Self::sizes(&self.core).0,
            plugged: self.plugged.to_words(),
        }
    }

    fn restore(&mut self, state: MemState, memory: GuestMemory) -> Result<(), DeviceError> {
        self.reset();
        let MemSlot { start, size } = self.slot;
        if (state.start, state.size) != (start, size)
            || state.requested > size
            || !state.requested.is_multiple_of(BLOCK)
        {
            return Err(DeviceError::State(format!(
                "the snapshot wants {} of {} bytes at {:#x} plugged, the machine has {size} bytes at {start:#x}",
                state.requested, state.size, state.start
            )));
        }
        self.plugged = state.blocks()?;
        let guest = state.guest.map(|guest| Guest::restore(guest, memory, &self.core));
        self.guest = guest.transpose()?;
        let requested = state.requested;
        self.core.config.update(|config| put(config, REQUESTED_SIZE, requested));
        self.show();
        Ok(())
    }
}
