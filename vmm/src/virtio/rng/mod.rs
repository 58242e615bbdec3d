//! virtio-rng (virtio 1.3, 5.4): random bytes from the host's generator, at a limited rate.
//!
//! System calls of the thread, beside those of every device thread: `getrandom`, `timerfd_settime`.

use std::io;
use std::sync::Arc;

use virtio_bindings::virtio_ids::VIRTIO_ID_RNG;
use vmm_sys_util::epoll::EventSet;

use super::core::Core;
use super::device::{Activation, Device, DeviceError, Guest, GuestState};
use super::rate_limit::{RateLimit, RateLimiter};
use super::worker::{DEVICE_TOKENS, ThreadKind};
use crate::memory::GuestMemory;

const QUEUE_SIZE: u16 = 16;
/// The most that one request gets; a driver that wants more asks again.
const MAX_BYTES: usize = 256;
const TOKEN_LIMITER: u64 = DEVICE_TOKENS;

// ---- state

/// An entropy device. It needs nothing bound.
pub struct Rng {
    core: Arc<Core>,
    limiter: RateLimiter,
    guest: Option<Guest>,
}

/// What is saved of an entropy device.
#[derive(Clone, PartialEq, prost::Message)]
pub struct RngState {
    /// The driver's side.
    #[prost(message, optional, tag = "1")]
    pub guest: Option<GuestState>,
}

impl Rng {
    /// An entropy device.
    ///
    /// # Errors
    /// When the process is out of file descriptors.
    pub fn new(limit: RateLimit) -> Result<Self, DeviceError> {
        let core = Core::new(1, Vec::new()).map_err(DeviceError::host("make eventfds"))?;
        let limiter = RateLimiter::new(limit).map_err(DeviceError::host("make a timer for the rate limit"))?;
        if let Some(timer) = limiter.timer() {
            core.watch(timer, EventSet::IN, TOKEN_LIMITER)
                .map_err(DeviceError::host("watch the rate limit's timer"))?;
        }
        Ok(Self {
            core: Arc::new(core),
            limiter,
            guest: None,
        })
    }

    // ---- process

    fn process(&mut self) -> Result<(), DeviceError> {
        let Self {
            core,
            limiter,
            guest: Some(guest),
        } = self
        else {
            return Ok(());
        };
        let Some(Some(queue)) = guest.queues.get_mut(0) else {
            return Ok(());
        };
        queue.begin()?;
        while let Some(chain) = queue.next_chain()? {
            let len = usize::try_from(chain.writable.len())
                .unwrap_or(usize::MAX)
                .min(MAX_BYTES);
            if len == 0 {
                core.counters.bump("bad_chain");
                queue.push(chain.head, 0)?;
                continue;
            }
            if !limiter
                .take(len as u64)
                .map_err(DeviceError::host("set the rate limit's timer"))?
            {
                core.counters.bump("rate_limited");
                queue.undo();
                break;
            }
            let mut bytes = [0; MAX_BYTES];
            fill(&mut bytes[..len]).map_err(DeviceError::host("get random bytes"))?;
            let written = chain.writable.write_at(&guest.memory, 0, &bytes[..len])?;
            queue.push(chain.head, u32::try_from(written).unwrap_or(0))?;
        }
        queue.end()?;
        queue.signal()
    }
}

/// Fills `bytes` from the host's generator.
pub(crate) fn fill(bytes: &mut [u8]) -> io::Result<()> {
    let mut done = 0;
    while done < bytes.len() {
        let rest = &mut bytes[done..];
        // SAFETY: the buffer is ours and as long as we say.
        let count = unsafe { libc::getrandom(rest.as_mut_ptr().cast(), rest.len(), 0) };
        match usize::try_from(count) {
            Ok(count) => done += count,
            Err(_) => {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(error);
                }
            }
        }
    }
    Ok(())
}

impl Device for Rng {
    /// Nothing can be bound.
    type Resource = std::convert::Infallible;
    type State = RngState;
    const KIND: ThreadKind = ThreadKind::Rng;

    fn core(&self) -> &Arc<Core> {
        &self.core
    }

    fn device_id(&self) -> u32 {
        VIRTIO_ID_RNG
    }

    fn features(&self) -> u64 {
        0
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
        self.limiter.acknowledge();
        self.process()
    }

    fn bind(&mut self, resource: Self::Resource) -> Result<(), DeviceError> {
        match resource {}
    }

    fn quiesce(&mut self) -> Result<(), DeviceError> {
        self.limiter.acknowledge();
        Ok(())
    }

    fn resume(&mut self) -> Result<(), DeviceError> {
        self.process()
    }

    fn has_work(&self) -> bool {
        self.guest.as_ref().is_some_and(Guest::has_chains)
    }

    fn reset(&mut self) {
        self.limiter.acknowledge();
        self.guest = None;
    }

    fn save(&self) -> RngState {
        RngState {
            guest: self.guest.as_ref().map(Guest::state),
        }
    }

    fn restore(&mut self, state: RngState, memory: GuestMemory) -> Result<(), DeviceError> {
        self.reset();
        let guest = state.guest.map(|guest| Guest::restore(guest, memory, &self.core));
        self.guest = guest.transpose()?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::{Bytes, GuestAddress};

    use super::*;
    use crate::virtio::testing::{TestQueue, WRITE, activation, memory};

    fn rig(limit: RateLimit) -> (GuestMemory, TestQueue, Rng) {
        let memory = memory();
        let queue = TestQueue::new(&memory, 0x1000, QUEUE_SIZE);
        let mut device = Rng::new(limit).unwrap();
        device.activate(activation(&memory, 0, &[&queue])).unwrap();
        (memory, queue, device)
    }

    #[test]
    fn a_request_is_filled_up_to_the_most_that_one_gets() {
        let (memory, mut queue, mut device) = rig(RateLimit::default());
        queue.add(&[(0x10000, 16, WRITE)]);
        queue.add(&[(0x11000, 4096, WRITE)]);
        device.queue_event(0).unwrap();
        assert_eq!(queue.used(), [(0, 16), (1, 256)]);
        // 2^-128 is never.
        assert_ne!(memory.read_obj::<u128>(GuestAddress(0x10000)).unwrap(), 0);
        assert_eq!(memory.read_obj::<u128>(GuestAddress(0x11100)).unwrap(), 0);
    }

    #[test]
    fn a_request_with_no_room_comes_back_empty() {
        let (_, mut queue, mut device) = rig(RateLimit::default());
        queue.add(&[(0x10000, 16, 0)]);
        device.queue_event(0).unwrap();
        assert_eq!(queue.used(), [(0, 0)]);
        assert_eq!(device.core.counters.get("bad_chain"), 1);
    }

    #[test]
    fn what_the_rate_does_not_allow_waits_in_the_ring() {
        let limit = RateLimit {
            bytes_per_second: 1,
            burst_bytes: 256,
            ..RateLimit::default()
        };
        let (_, mut queue, mut device) = rig(limit);
        queue.add(&[(0x10000, 256, WRITE)]);
        queue.add(&[(0x10000, 256, WRITE)]);
        device.queue_event(0).unwrap();
        assert_eq!(queue.used(), [(0, 256)]);
        assert_eq!(device.core.counters.get("rate_limited"), 1);
    }

    #[test]
    fn save_restore_save_is_equal() {
        let (memory, mut queue, mut device) = rig(RateLimit::default());
        queue.add(&[(0x10000, 16, WRITE)]);
        device.queue_event(0).unwrap();
        let saved = device.save();
        let mut restored = Rng::new(RateLimit::default()).unwrap();
        restored.restore(saved.clone(), memory).unwrap();
        assert_eq!(restored.save(), saved);
    }
}
