//! A split virtqueue in use: chains out of the available ring, used elements back, notifications both ways.
//!
//! ```text
//!   begin()                 notifications off, budget full
//!   while next_chain()?     a checked chain; bad ones go straight back to the driver and are counted
//!       undo()              back into the ring: no room now; the device comes again by itself
//!       push(head, len)     a used element
//!   end()?                  notifications on again, or the queue kicks itself if the driver was quicker
//!   signal()?               one interrupt for all that was pushed, if the driver wants one
//! ```

use std::sync::Arc;
use std::sync::atomic::Ordering;

use virtio_queue::{Queue, QueueOwnedT, QueueState, QueueT};
use vm_memory::{Bytes, GuestAddress};

use super::chain::Chain;
use super::core::{Core, raise};
use super::device::DeviceError;
use crate::memory::GuestMemory;

/// A queue that the driver has set up.
#[derive(Debug)]
pub struct VirtQueue {
    queue: Queue,
    index: usize,
    memory: GuestMemory,
    core: Arc<Core>,
    /// Chains that may still be taken in this round, so that no guest keeps its device's thread from its other work.
    budget: u16,
    held_back: bool,
    interrupt_owed: bool,
    /// Something was pushed since the last signal: a device that only looks at its queue does not interrupt.
    pushed: bool,
}

/// Flags and index of the used ring, and the size of an element (virtio 1.3, 2.7.8).
const USED_HEADER_BYTES: u64 = 4;
const USED_ELEMENT_BYTES: u64 = 8;

impl VirtQueue {
    /// Checks a queue's set-up against guest memory.
    ///
    /// # Errors
    /// When size, alignment or place of one of its rings is wrong.
    pub fn new(state: QueueState, index: usize, memory: GuestMemory, core: Arc<Core>) -> Result<Self, DeviceError> {
        let queue = Queue::try_from(state).map_err(|source| DeviceError::Queue { index, source })?;
        // `is_valid` takes a ring at address 0 for one that was never set, and so does the queue's iterator.
        if !queue.is_valid(&*memory) || state.avail_ring == 0 {
            return Err(DeviceError::QueueSetup { index });
        }
        Ok(Self {
            queue,
            index,
            memory,
            core,
            budget: 0,
            held_back: false,
            interrupt_owed: false,
            pushed: false,
        })
    }

    /// Starts a round of processing.
    pub fn begin(&mut self) -> Result<(), DeviceError> {
        self.budget = self.queue.size();
        self.held_back = false;
        self.queue.disable_notification(&*self.memory).map_err(self.error())
    }

    /// The next usable chain.
    ///
    /// # Errors
    /// When the ring itself is broken; the device cannot go on.
    pub fn next_chain(&mut self) -> Result<Option<Chain>, DeviceError> {
        let index = self.index;
        while self.budget > 0 {
            let next = self
                .queue
                .iter(&*self.memory)
                .map_err(|source| DeviceError::Queue { index, source })?
                .next();
            let Some(chain) = next else { return Ok(None) };
            self.budget -= 1;
            self.held_back = false;
            let head = chain.head_index();
            match Chain::read(chain, &self.memory, self.queue.size()) {
                Ok(chain) => return Ok(Some(chain)),
                Err(_) => {
                    self.core.counters.bump("bad_chain");
                    self.push(head, 0)?;
                }
            }
        }
        Ok(None)
    }

    /// Puts the chain that was taken last back into the available ring. It is read and checked anew when it is taken again.
    pub fn undo(&mut self) {
        self.queue.go_to_previous_position();
        self.held_back = true;
    }

    /// Hands a chain back to the driver, of whose writable part `len` bytes were written.
    ///
    /// # Errors
    /// When `head` is no index of a descriptor: a guest made it up.
    pub fn push(&mut self, head: u16, len: u32) -> Result<(), DeviceError> {
        self.pushed = true;
        self.queue.add_used(&*self.memory, head, len).map_err(self.error())
    }

    /// As [`Self::push`] for several chains of (head, length) that the driver is to see at once: merged receive buffers
    /// (virtio 1.3, 5.1.6.4) are useless to it before the last is there.
    ///
    /// # Errors
    /// When a head is no index of a descriptor.
    pub fn push_together(&mut self, used: &[(u16, u32)]) -> Result<(), DeviceError> {
        let Some((&(last, last_len), before)) = used.split_last() else {
            return Ok(());
        };
        // Elements beyond the used index are not the driver's yet; the last one's `push` moves the index over them all.
        for &(head, len) in before {
            let slot = self.queue.next_used();
            let at =
                self.queue.used_ring() + USED_HEADER_BYTES + u64::from(slot % self.queue.size()) * USED_ELEMENT_BYTES;
            let element = (u64::from(len) << 32 | u64::from(head)).to_le_bytes();
            self.memory.write_slice(&element, GuestAddress(at))?;
            self.queue.set_next_used(slot.wrapping_add(1));
            // The queue counts only what it pushed itself, so it may not see that the driver's mark was passed.
            self.interrupt_owed = true;
        }
        self.push(last, last_len)
    }

    /// Puts the `count` chains that were taken last back into the available ring.
    pub fn give_back(&mut self, count: usize) {
        for _ in 0..count {
            self.undo();
        }
    }

    /// As [`Self::give_back`], for one who needs more chains than there are: the driver is asked to notify when it adds any.
    ///
    /// # Errors
    /// When the ring is broken.
    pub fn wait_for_more(&mut self, count: usize) -> Result<(), DeviceError> {
        // The driver's mark is set behind the chains that go back, or it would count these as what is waited for.
        if self.budget == 0 || self.want_buffers()? {
            raise(&self.core.notify()[self.index]);
        }
        self.give_back(count);
        Ok(())
    }

    /// Ends a round of processing.
    pub fn end(&mut self) -> Result<(), DeviceError> {
        // What was held back is taken up again when there is room, not when the driver adds more.
        if self.held_back {
            return Ok(());
        }
        if self.budget == 0 || self.want_buffers()? {
            raise(&self.core.notify()[self.index]);
        }
        Ok(())
    }

    /// Asks the driver to notify when it adds buffers. True: there are some already.
    pub fn want_buffers(&mut self) -> Result<bool, DeviceError> {
        self.queue.enable_notification(&*self.memory).map_err(self.error())
    }

    /// Interrupts the driver if it wants to hear of what was pushed since the last time.
    pub fn signal(&mut self) -> Result<(), DeviceError> {
        if !std::mem::take(&mut self.pushed) {
            return Ok(());
        }
        let owed = std::mem::take(&mut self.interrupt_owed);
        let due = self.queue.needs_notification(&*self.memory).map_err(self.error())?;
        if due || owed {
            self.core.interrupt.used_buffers();
        }
        Ok(())
    }

    /// Whether there is a chain that was not taken yet. A ring that cannot be read counts as one: who takes from it is told.
    pub fn has_chains(&self) -> bool {
        self.queue
            .avail_idx(&*self.memory, Ordering::Acquire)
            .map_or(true, |next| next.0 != self.queue.next_avail())
    }

    /// Where the queue stands.
    pub fn state(&self) -> QueueState {
        self.queue.state()
    }

    /// How many chains the queue holds.
    pub fn size(&self) -> u16 {
        self.queue.size()
    }

    /// Which of the device's queues this is.
    pub fn index(&self) -> usize {
        self.index
    }

    fn error(&self) -> impl Fn(virtio_queue::Error) -> DeviceError + use<> {
        let index = self.index;
        move |source| DeviceError::Queue { index, source }
    }
}
