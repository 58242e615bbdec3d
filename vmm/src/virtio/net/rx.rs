//! From the tap to the driver: a frame is read into a buffer of ours, then spread over as many of the driver's as it takes.
//!
//! The tap is watched only while the driver has buffers: with none, frames wait in the tap's own queue, and the host drops
//! what that does not hold.

use virtio_bindings::virtio_net as net;

use super::Bound;
use super::header::{HEADER_BYTES, MAX_FRAME_BYTES, TO_GUEST, complete};
use crate::memory::GuestMemory;
use crate::virtio::chain::Chain;
use crate::virtio::core::Core;
use crate::virtio::device::DeviceError;
use crate::virtio::feature;
use crate::virtio::queue::VirtQueue;

/// Why receiving stopped, which says what it goes on by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stop {
    /// The tap has nothing: it is to be watched.
    TapEmpty,
    /// The driver adds buffers, or the rate limit's timer fires.
    Elsewhere,
    /// The tap is gone.
    TapFailed,
}

/// The frame that was read from the tap and is not with the driver yet.
#[derive(Debug)]
pub(super) struct Frame {
    /// One byte more than the largest frame: what fills it was cut short by the tap.
    buffer: Box<[u8]>,
    len: usize,
    paid: bool,
}

impl Frame {
    pub(super) fn empty() -> Self {
        Self {
            buffer: vec![0; MAX_FRAME_BYTES + 1].into_boxed_slice(),
            len: 0,
            paid: false,
        }
    }

    /// A frame that was saved.
    pub(super) fn restore(bytes: &[u8]) -> Result<Self, DeviceError> {
        let mut frame = Self::empty();
        if bytes.len() > MAX_FRAME_BYTES || (1..HEADER_BYTES).contains(&bytes.len()) {
            return Err(DeviceError::State(format!("a frame of {} bytes", bytes.len())));
        }
        frame.buffer[..bytes.len()].copy_from_slice(bytes);
        frame.len = bytes.len();
        Ok(frame)
    }

    pub(super) fn bytes(&self) -> &[u8] {
        &self.buffer[..self.len]
    }

    pub(super) fn clear(&mut self) {
        self.len = 0;
        self.paid = false;
    }
}

/// Everything that the way of frames to the driver needs.
pub(super) struct Receive<'a> {
    pub(super) core: &'a Core,
    pub(super) bound: &'a mut Bound,
    pub(super) frame: &'a mut Frame,
    pub(super) memory: &'a GuestMemory,
    pub(super) features: u64,
}

/// What became of an attempt to get a frame.
enum Next {
    Ready,
    /// Read and thrown away: there may be another.
    Dropped,
    Stop(Stop),
}

impl Receive<'_> {
    /// Hands frames over until the tap, the driver's buffers, the rate limit or this round's budget is at its end.
    pub(super) fn run(&mut self, queue: &mut VirtQueue) -> Result<Stop, DeviceError> {
        queue.begin()?;
        let stop = loop {
            // A buffer first: what is read from the tap can then be handed over.
            let Some(first) = self.next_buffer(queue)? else {
                break Stop::Elsewhere;
            };
            match self.next_frame()? {
                Next::Ready => {
                    if !self.deliver(queue, first)? {
                        break Stop::Elsewhere;
                    }
                }
                Next::Dropped => queue.undo(),
                Next::Stop(stop) => {
                    queue.undo();
                    break stop;
                }
            }
        };
        queue.end()?;
        queue.signal()?;
        Ok(stop)
    }

    /// A chain that can take at least the header (5.1.6.3.2); others go back unused.
    fn next_buffer(&self, queue: &mut VirtQueue) -> Result<Option<Chain>, DeviceError> {
        while let Some(chain) = queue.next_chain()? {
            if chain.readable.is_empty() && chain.writable.len() >= HEADER_BYTES as u64 {
                return Ok(Some(chain));
            }
            self.core.counters.bump("bad_chain");
            queue.push(chain.head, 0)?;
        }
        Ok(None)
    }

    fn next_frame(&mut self) -> Result<Next, DeviceError> {
        if self.frame.len == 0 {
            match self.bound.tap.read(&mut self.frame.buffer) {
                Ok(Some(len)) => self.frame.len = len,
                Ok(None) => return Ok(Next::Stop(Stop::TapEmpty)),
                Err(_) => return Ok(Next::Stop(Stop::TapFailed)),
            }
            if let Some(counter) = self.unfit() {
                return Ok(self.drop_frame(counter));
            }
        }
        if !self.frame.paid {
            let limiter = &mut self.bound.rx_limiter;
            if !limiter
                .take(self.frame.len as u64)
                .map_err(DeviceError::host("set the rate limit's timer"))?
            {
                self.core.counters.bump("rx_rate_limited");
                return Ok(Next::Stop(Stop::Elsewhere));
            }
            self.frame.paid = true;
        }
        Ok(Next::Ready)
    }

    /// Why a frame cannot go to this driver, whatever its buffers.
    fn unfit(&self) -> Option<&'static str> {
        if self.frame.len > MAX_FRAME_BYTES {
            Some("rx_oversize")
        } else if self.frame.len <= HEADER_BYTES || !TO_GUEST.allow(self.features, self.frame.bytes()) {
            Some("rx_dropped")
        } else {
            None
        }
    }

    fn drop_frame(&mut self, counter: &'static str) -> Next {
        self.core.counters.bump(counter);
        self.frame.clear();
        Next::Dropped
    }

    /// Hands the frame over on `first` and what else it takes. False: the driver has too few buffers now.
    fn deliver(&mut self, queue: &mut VirtQueue, first: Chain) -> Result<bool, DeviceError> {
        let merge = self.features & feature(net::VIRTIO_NET_F_MRG_RXBUF) != 0;
        let len = self.frame.len as u64;
        let mut room = first.writable.len();
        let mut chains = vec![first];
        while room < len {
            // More than a queue holds will never be there.
            if !merge || chains.len() >= usize::from(queue.size()) {
                queue.give_back(chains.len());
                self.drop_frame("rx_oversize");
                return Ok(true);
            }
            let Some(chain) = self.next_buffer(queue)? else {
                queue.wait_for_more(chains.len())?;
                return Ok(false);
            };
            room += chain.writable.len();
            chains.push(chain);
        }
        // At most as many as the queue holds.
        let count = u16::try_from(chains.len()).unwrap_or(u16::MAX);
        complete(&mut self.frame.buffer[..self.frame.len], self.features, count);
        let mut used = Vec::with_capacity(chains.len());
        let mut done = 0;
        for chain in &chains {
            let written = chain.writable.write_at(self.memory, 0, &self.frame.bytes()[done..])?;
            done += written;
            // At most MAX_FRAME_BYTES.
            used.push((chain.head, u32::try_from(written).unwrap_or(u32::MAX)));
        }
        queue.push_together(&used)?;
        self.frame.clear();
        Ok(true)
    }
}
