//! From the driver to the tap: header and frame are read once, into a buffer of ours, checked there, and written from there.

use super::Bound;
use super::header::{FROM_GUEST, HEADER_BYTES, MAX_FRAME_BYTES};
use crate::memory::GuestMemory;
use crate::virtio::chain::Chain;
use crate::virtio::core::Core;
use crate::virtio::device::DeviceError;
use crate::virtio::queue::VirtQueue;

/// Why sending stopped, which says what it goes on by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stop {
    /// The tap takes no more now: it is to be watched.
    TapFull,
    /// The driver adds frames, or the rate limit's timer fires.
    Elsewhere,
}

/// Everything that the way of frames to the tap needs.
pub(super) struct Send<'a> {
    pub(super) core: &'a Core,
    pub(super) bound: Option<&'a mut Bound>,
    pub(super) buffer: &'a mut [u8],
    pub(super) memory: &'a GuestMemory,
    pub(super) features: u64,
}

/// What became of a frame.
enum Sent {
    /// It went, or will never go.
    Done,
    /// It waits in the ring.
    Stop(Stop),
}

/// Room for the largest frame.
pub(super) fn buffer() -> Box<[u8]> {
    vec![0; MAX_FRAME_BYTES].into_boxed_slice()
}

impl Send<'_> {
    /// Sends until the driver's frames, the tap's room, the rate limit or this round's budget is at its end.
    pub(super) fn run(&mut self, queue: &mut VirtQueue) -> Result<Stop, DeviceError> {
        queue.begin()?;
        let mut stop = Stop::Elsewhere;
        while let Some(chain) = queue.next_chain()? {
            match self.send(&chain)? {
                Sent::Done => queue.push(chain.head, 0)?,
                Sent::Stop(why) => {
                    queue.undo();
                    stop = why;
                    break;
                }
            }
        }
        queue.end()?;
        queue.signal()?;
        Ok(stop)
    }

    fn send(&mut self, chain: &Chain) -> Result<Sent, DeviceError> {
        let len = usize::try_from(chain.readable.len()).unwrap_or(usize::MAX);
        if !chain.writable.is_empty() || len <= HEADER_BYTES {
            return Ok(self.dropped("bad_chain"));
        }
        if len > MAX_FRAME_BYTES {
            return Ok(self.dropped("tx_oversize"));
        }
        let Some(bound) = self.bound.as_deref_mut() else {
            return Ok(self.dropped("tx_dropped"));
        };
        if !bound.tx_paid {
            if !bound
                .tx_limiter
                .take(len as u64)
                .map_err(DeviceError::host("set the rate limit's timer"))?
            {
                self.core.counters.bump("tx_rate_limited");
                return Ok(Sent::Stop(Stop::Elsewhere));
            }
            bound.tx_paid = true;
        }
        let frame = &mut self.buffer[..len];
        chain.readable.read_at(self.memory, 0, frame)?;
        // The kernel checks the rest of the header against the frame.
        let sent = if FROM_GUEST.allow(self.features, frame) {
            bound.tap.write(frame)
        } else {
            bound.tx_paid = false;
            return Ok(self.dropped("bad_header"));
        };
        if let Ok(None) = sent {
            return Ok(Sent::Stop(Stop::TapFull));
        }
        bound.tx_paid = false;
        // The interface is down or gone, or the kernel does not believe the header: a network loses frames.
        Ok(if sent.is_ok() {
            Sent::Done
        } else {
            self.dropped("tx_dropped")
        })
    }

    fn dropped(&self, counter: &'static str) -> Sent {
        self.core.counters.bump(counter);
        Sent::Done
    }
}
