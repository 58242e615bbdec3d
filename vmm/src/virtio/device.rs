//! What a virtio device is to its thread.

use std::fmt::Debug;
use std::io;
use std::sync::Arc;

use virtio_queue::QueueState;
use vm_memory::GuestMemoryError;
use vmm_sys_util::epoll::EventSet;

use super::core::Core;
use super::queue::VirtQueue;
use super::worker::ThreadKind;
use crate::memory::GuestMemory;

/// What stops a device until its driver resets it, or what a request to it failed of.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// The rings are broken.
    #[error("queue {index} is broken")]
    Queue {
        /// Which queue.
        index: usize,
        /// What is wrong with it.
        source: virtio_queue::Error,
    },
    /// A queue was made ready with rings that cannot be used.
    #[error("queue {index} was set up outside of guest memory or not at all")]
    QueueSetup {
        /// Which queue.
        index: usize,
    },
    /// Guest memory that was checked cannot be accessed.
    #[error("guest memory cannot be accessed")]
    Memory(#[from] GuestMemoryError),
    /// The host failed.
    #[error("cannot {what}")]
    Host {
        /// What was being done.
        what: &'static str,
        /// Why it failed.
        source: io::Error,
    },
    /// What was to be bound does not fit the slot.
    #[error("{0}")]
    Refused(String),
    /// There is something behind the slot already.
    #[error("the slot is bound already")]
    AlreadyBound,
    /// A saved state contradicts itself or the machine.
    #[error("saved device state does not fit: {0}")]
    State(String),
    /// The device's thread has ended.
    #[error("the device's thread has ended")]
    Gone,
}

impl DeviceError {
    /// For `map_err`: the host failed at `what`.
    pub(crate) fn host(what: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Host { what, source }
    }
}

/// What a driver and its device agreed on, handed over at DRIVER_OK.
#[derive(Debug)]
pub struct Activation {
    /// Guest memory.
    pub memory: GuestMemory,
    /// Negotiated features.
    pub features: u64,
    /// The queues by index; those that the driver did not make ready are not `ready`.
    pub queues: Vec<QueueState>,
}

/// A running driver's side of a device: what an [`Activation`] becomes once its queues are checked.
#[derive(Debug)]
pub struct Guest {
    /// Guest memory.
    pub memory: GuestMemory,
    /// Negotiated features.
    pub features: u64,
    /// The queues by index; `None` for those that the driver did not make ready.
    pub queues: Vec<Option<VirtQueue>>,
    saved: Vec<QueueState>,
}

impl Guest {
    /// Checks the queues.
    ///
    /// # Errors
    /// When one that is ready cannot be used.
    pub fn new(activation: Activation, core: &Arc<Core>) -> Result<Self, DeviceError> {
        let Activation {
            memory,
            features,
            queues: saved,
        } = activation;
        let queues = saved
            .iter()
            .enumerate()
            .map(|(index, state)| {
                state
                    .ready
                    .then(|| VirtQueue::new(*state, index, memory.clone(), core.clone()))
                    .transpose()
            })
            .collect::<Result<Vec<_>, _>>()?;
        Ok(Self {
            memory,
            features,
            queues,
            saved,
        })
    }

    /// Whether a feature was negotiated.
    pub fn has(&self, bit: u32) -> bool {
        self.features & super::feature(bit) != 0
    }

    /// A queue that the driver made ready.
    pub fn queue(&mut self, index: usize) -> Option<&mut VirtQueue> {
        self.queues.get_mut(index).and_then(Option::as_mut)
    }

    /// What to save of it.
    pub fn state(&self) -> GuestState {
        let queues = self.queues.iter().zip(&self.saved);
        GuestState {
            features: self.features,
            queues: queues
                .map(|(queue, saved)| queue.as_ref().map_or(*saved, VirtQueue::state))
                .collect(),
        }
    }

    /// The driver's side as it was when it was saved.
    ///
    /// # Errors
    /// When the queues do not fit the memory.
    pub fn restore(state: &GuestState, memory: GuestMemory, core: &Arc<Core>) -> Result<Self, DeviceError> {
        if state.queues.len() != core.notify().len() {
            return Err(DeviceError::State(format!(
                "{} queues saved, {} expected",
                state.queues.len(),
                core.notify().len()
            )));
        }
        Self::new(
            Activation {
                memory,
                features: state.features,
                queues: state.queues.clone(),
            },
            core,
        )
    }
}

/// The driver's side of a device in a saved machine. Absent in a device's state: no driver had come.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GuestState {
    /// Negotiated features.
    pub features: u64,
    /// The queues by index.
    pub queues: Vec<QueueState>,
}

/// A virtio device. It is owned by one thread ([`super::worker`]), which calls these in turn.
pub trait Device: Send + 'static {
    /// What is put behind the slot.
    type Resource: Send + 'static;
    /// What is saved.
    type State: Send + Clone + Debug + PartialEq + 'static;

    /// Which system call filter the device's thread gets.
    const KIND: ThreadKind;

    /// The shared part.
    fn core(&self) -> &Arc<Core>;

    /// Virtio device id (virtio 1.3, section 5).
    fn device_id(&self) -> u32;

    /// Features on offer, those of the transport left aside.
    fn features(&self) -> u64;

    /// The largest size of each queue.
    fn queue_sizes(&self) -> Vec<u16>;

    /// A driver said DRIVER_OK.
    ///
    /// # Errors
    /// When its set-up cannot be used.
    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError>;

    /// The driver added buffers to a queue.
    ///
    /// # Errors
    /// When the device cannot go on.
    fn queue_event(&mut self, index: usize) -> Result<(), DeviceError>;

    /// Something that the device watches itself is ready.
    ///
    /// # Errors
    /// When the device cannot go on.
    fn device_event(&mut self, token: u64, events: EventSet) -> Result<(), DeviceError>;

    /// Puts something behind the slot.
    ///
    /// # Errors
    /// When it does not fit, or there is something already.
    fn bind(&mut self, resource: Self::Resource) -> Result<(), DeviceError>;

    /// Lets everything in flight come to its end, so that guest memory stays as it is.
    ///
    /// # Errors
    /// When the host fails.
    fn quiesce(&mut self) -> Result<(), DeviceError>;

    /// The device goes on after a pause: it looks at all its queues and sources again.
    ///
    /// # Errors
    /// When the device cannot go on.
    fn resume(&mut self) -> Result<(), DeviceError>;

    /// Forgets the driver. Nothing touches guest memory after this returns. What is bound stays bound.
    fn reset(&mut self);

    /// Saves a quiet device.
    fn save(&self) -> Self::State;
}
