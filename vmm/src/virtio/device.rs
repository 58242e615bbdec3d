//! What a virtio device is to its thread.

use std::io;
use std::sync::Arc;

use prost::Message;
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
    /// A value that cannot be.
    #[error("{0}")]
    Invalid(String),
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

    /// Whether a queue has a chain that nobody has taken yet.
    pub fn has_chains(&self) -> bool {
        self.queues.iter().flatten().any(VirtQueue::has_chains)
    }

    /// What to save of it.
    pub fn state(&self) -> GuestState {
        let queues = self.queues.iter().zip(&self.saved);
        GuestState {
            features: self.features,
            queues: queues
                .map(|(queue, saved)| queue.as_ref().map_or(*saved, VirtQueue::state).into())
                .collect(),
        }
    }

    /// The driver's side as it was when it was saved.
    ///
    /// # Errors
    /// When the queues do not fit the memory.
    pub fn restore(state: GuestState, memory: GuestMemory, core: &Arc<Core>) -> Result<Self, DeviceError> {
        if state.queues.len() != core.notify().len() {
            return Err(DeviceError::State(format!(
                "{} queues saved, {} expected",
                state.queues.len(),
                core.notify().len()
            )));
        }
        let queues = state.queues.into_iter().map(QueueState::try_from);
        Self::new(
            Activation {
                memory,
                features: state.features,
                queues: queues.collect::<Result<_, _>>()?,
            },
            core,
        )
    }
}

/// The driver's side of a device in a saved machine. Absent in a device's state: no driver had come.
#[derive(Clone, PartialEq, prost::Message)]
pub struct GuestState {
    /// Negotiated features.
    #[prost(uint64, tag = "1")]
    pub features: u64,
    /// The queues by index.
    #[prost(message, repeated, tag = "2")]
    pub queues: Vec<QueueRecord>,
}

/// A queue in a saved machine: set-up and where the device stands in the rings.
#[derive(Clone, Copy, PartialEq, prost::Message)]
pub struct QueueRecord {
    /// The largest size on offer.
    #[prost(uint32, tag = "1")]
    pub max_size: u32,
    /// What is taken next from the available ring.
    #[prost(uint32, tag = "2")]
    pub next_available: u32,
    /// Where the next used element goes.
    #[prost(uint32, tag = "3")]
    pub next_used: u32,
    /// VIRTIO_F_EVENT_IDX was negotiated.
    #[prost(bool, tag = "4")]
    pub event_idx: bool,
    /// The size that the driver chose.
    #[prost(uint32, tag = "5")]
    pub size: u32,
    /// The driver made it ready.
    #[prost(bool, tag = "6")]
    pub ready: bool,
    /// Descriptor table.
    #[prost(uint64, tag = "7")]
    pub descriptors: u64,
    /// Available ring.
    #[prost(uint64, tag = "8")]
    pub available: u64,
    /// Used ring.
    #[prost(uint64, tag = "9")]
    pub used: u64,
}

impl From<QueueState> for QueueRecord {
    fn from(state: QueueState) -> Self {
        Self {
            max_size: state.max_size.into(),
            next_available: state.next_avail.into(),
            next_used: state.next_used.into(),
            event_idx: state.event_idx_enabled,
            size: state.size.into(),
            ready: state.ready,
            descriptors: state.desc_table,
            available: state.avail_ring,
            used: state.used_ring,
        }
    }
}

impl TryFrom<QueueRecord> for QueueState {
    type Error = DeviceError;

    fn try_from(record: QueueRecord) -> Result<Self, DeviceError> {
        let short = |name: &str, value: u32| {
            u16::try_from(value).map_err(|_| DeviceError::State(format!("a queue's {name} is {value}")))
        };
        Ok(Self {
            max_size: short("largest size", record.max_size)?,
            next_avail: short("available index", record.next_available)?,
            next_used: short("used index", record.next_used)?,
            event_idx_enabled: record.event_idx,
            size: short("size", record.size)?,
            ready: record.ready,
            desc_table: record.descriptors,
            avail_ring: record.available,
            used_ring: record.used,
        })
    }
}

/// A virtio device. One thread serves it ([`super::worker`]); `bind`, `save`, `restore` and `has_work` are called by others as well,
/// one at a time, and make no system call that those may not make.
pub trait Device: Send + 'static {
    /// What is put behind the slot.
    type Resource: Send + 'static;
    /// What is saved: a message, so that what is added to it later does not end older snapshots.
    type State: Message + Default + Clone + PartialEq + 'static;

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

    /// Whether [`Self::resume`] of a device that was just loaded would find something to do. If not, it is left out: the device
    /// waits for its driver and for what it watches, as it would have.
    fn has_work(&self) -> bool;

    /// Forgets the driver. Nothing touches guest memory after this returns. What is bound stays bound.
    fn reset(&mut self);

    /// Saves a quiet device.
    fn save(&self) -> Self::State;

    /// Takes a saved driver's side over, in place of what there was. What is bound stays bound. The device is left quiet:
    /// [`Self::resume`] lets it look at its queues.
    ///
    /// # Errors
    /// When the state contradicts itself or the device; the device is as after a reset then.
    fn restore(&mut self, state: Self::State, memory: GuestMemory) -> Result<(), DeviceError>;
}
