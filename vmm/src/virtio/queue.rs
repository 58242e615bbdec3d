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

use virtio_queue::{Queue, QueueOwnedT, QueueState, QueueT};

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
}

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
        self.queue.add_used(&*self.memory, head, len).map_err(self.error())
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
        if self.queue.needs_notification(&*self.memory).map_err(self.error())? {
            self.core.interrupt.used_buffers();
        }
        Ok(())
    }

    /// Where the queue stands.
    pub fn state(&self) -> QueueState {
        self.queue.state()
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
