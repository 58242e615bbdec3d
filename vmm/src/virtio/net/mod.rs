//! virtio-net (virtio 1.3, 5.1): a network slot, behind which a tap is bound at any time.
//!
//! - [`tap`]: what can be bound.
//! - [`header`]: what goes before each frame, and what it may ask for.
//! - [`rx`] and [`tx`]: the two directions.
//!
//! An unbound slot has its link down. Binding brings it up, which a running driver learns by a configuration change
//! interrupt. A tap that goes away takes the link down again.
//!
//! System calls of the thread, beside those of every device thread: `timerfd_settime`, and `ioctl` for TUNSETOFFLOAD.

mod header;
mod rx;
mod tap;
#[cfg(test)]
mod tests;
mod tx;
#[cfg(test)]
mod wire;

use std::os::fd::AsRawFd;
use std::sync::Arc;

use virtio_bindings::virtio_ids::VIRTIO_ID_NET;
use virtio_bindings::virtio_net as net;
use vmm_sys_util::epoll::{ControlOperation, EpollEvent, EventSet};

use self::rx::{Frame, Receive};
pub use self::tap::Tap;
use self::tx::Send;
use super::core::{Core, raise};
use super::device::{Activation, Device, DeviceError, Guest, GuestState};
use super::feature;
use super::rate_limit::{RateLimit, RateLimiter};
use super::worker::{DEVICE_TOKENS, ThreadKind};
use crate::memory::GuestMemory;

/// Entries of each queue.
const QUEUE_SIZE: u16 = 256;
const RX: usize = 0;
const TX: usize = 1;

const TOKEN_TAP: u64 = DEVICE_TOKENS;
const TOKEN_RX_LIMITER: u64 = DEVICE_TOKENS + 1;
const TOKEN_TX_LIMITER: u64 = DEVICE_TOKENS + 2;

/// Where `status` lies in struct virtio_net_config (5.1.4).
const CONFIG_STATUS: std::ops::Range<usize> = 6..8;

/// What a slot is before anything is bound to it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NetSlot {
    /// The guest's address.
    pub mac: [u8; 6],
}

// ---- config space

impl NetSlot {
    fn features() -> u64 {
        [
            net::VIRTIO_NET_F_CSUM,
            net::VIRTIO_NET_F_GUEST_CSUM,
            net::VIRTIO_NET_F_MAC,
            net::VIRTIO_NET_F_GUEST_TSO4,
            net::VIRTIO_NET_F_GUEST_TSO6,
            net::VIRTIO_NET_F_HOST_TSO4,
            net::VIRTIO_NET_F_HOST_TSO6,
            net::VIRTIO_NET_F_MRG_RXBUF,
            net::VIRTIO_NET_F_STATUS,
        ]
        .into_iter()
        .map(feature)
        .sum()
    }

    /// struct virtio_net_config (5.1.4) with the link down; what follows `status` belongs to features not on offer.
    fn config(&self) -> Vec<u8> {
        let mut config = self.mac.to_vec();
        config.resize(CONFIG_STATUS.end, 0);
        config
    }
}

fn link_status(config: &mut [u8], up: bool) {
    let status = if up { net::VIRTIO_NET_S_LINK_UP } else { 0 };
    // One bit of the lower half.
    #[allow(clippy::cast_possible_truncation)]
    config[CONFIG_STATUS].copy_from_slice(&(status as u16).to_le_bytes());
}

// ---- what can be bound

/// A tap to be bound to a slot.
#[derive(Debug)]
pub struct NetResource {
    tap: Tap,
    rx_limiter: RateLimiter,
    tx_limiter: RateLimiter,
}

impl NetResource {
    /// A tap, with how fast frames reach the guest and how fast they leave it. The timers for that are made here, by whoever
    /// binds: the device's own thread may not.
    ///
    /// # Errors
    /// When the process is out of file descriptors.
    pub fn new(tap: Tap, rx_limit: RateLimit, tx_limit: RateLimit) -> Result<Self, DeviceError> {
        let limiter = |limit| RateLimiter::new(limit).map_err(DeviceError::host("make a timer for the rate limit"));
        Ok(Self {
            tap,
            rx_limiter: limiter(rx_limit)?,
            tx_limiter: limiter(tx_limit)?,
        })
    }
}

/// A tap in its place.
#[derive(Debug)]
struct Bound {
    tap: Tap,
    rx_limiter: RateLimiter,
    tx_limiter: RateLimiter,
    /// The frame at the head of the transmit queue has paid its tokens and waits for the tap.
    tx_paid: bool,
    /// What the tap is watched for.
    watched: EventSet,
}

impl From<NetResource> for Bound {
    fn from(resource: NetResource) -> Self {
        Self {
            tap: resource.tap,
            rx_limiter: resource.rx_limiter,
            tx_limiter: resource.tx_limiter,
            tx_paid: false,
            watched: EventSet::empty(),
        }
    }
}

impl Bound {
    /// Watches the tap for `events` only. For none it leaves the epoll: an error is reported unasked, over and over.
    fn watch(&mut self, core: &Core, events: EventSet) -> Result<(), DeviceError> {
        let operation = match (self.watched.is_empty(), events.is_empty()) {
            _ if self.watched == events => return Ok(()),
            (true, _) => ControlOperation::Add,
            (false, true) => ControlOperation::Delete,
            (false, false) => ControlOperation::Modify,
        };
        core.epoll()
            .ctl(operation, self.tap.as_raw_fd(), EpollEvent::new(events, TOKEN_TAP))
            .map_err(DeviceError::host("watch the tap"))?;
        self.watched = events;
        Ok(())
    }

    fn watch_for(&mut self, core: &Core, event: EventSet, wanted: bool) -> Result<(), DeviceError> {
        let mut events = self.watched;
        events.set(event, wanted);
        self.watch(core, events)
    }

    /// Nothing of it wakes the thread any more.
    fn rest(&mut self, core: &Core) -> Result<(), DeviceError> {
        self.rx_limiter.acknowledge();
        self.tx_limiter.acknowledge();
        self.watch(core, EventSet::empty())
    }
}

// ---- state

/// A network device.
pub struct Net {
    core: Arc<Core>,
    bound: Option<Bound>,
    guest: Option<Guest>,
    rx_frame: Frame,
    tx_buffer: Box<[u8]>,
}

/// What is saved of a network device.
#[derive(Clone, PartialEq, prost::Message)]
pub struct NetState {
    /// The driver's side.
    #[prost(message, optional, tag = "1")]
    pub guest: Option<GuestState>,
    /// A frame with its header that waits for the driver's buffers; empty: none.
    #[prost(bytes = "vec", tag = "2")]
    pub rx_frame: Vec<u8>,
}

impl Net {
    /// An unbound slot.
    ///
    /// # Errors
    /// When the process is out of file descriptors.
    pub fn new(slot: &NetSlot) -> Result<Self, DeviceError> {
        let core = Core::new(2, slot.config()).map_err(DeviceError::host("make eventfds"))?;
        Ok(Self {
            core: Arc::new(core),
            bound: None,
            guest: None,
            rx_frame: Frame::empty(),
            tx_buffer: tx::buffer(),
        })
    }

    /// The tap is gone: its link is down, and another may be bound.
    fn lose_tap(&mut self) -> Result<(), DeviceError> {
        if let Some(mut bound) = self.bound.take() {
            self.core.counters.bump("tap_lost");
            bound.rest(&self.core)?;
            self.core.change_config(|config| link_status(config, false));
        }
        Ok(())
    }

    // ---- process

    fn receive(&mut self) -> Result<(), DeviceError> {
        let (Some(bound), Some(guest)) = (self.bound.as_mut(), self.guest.as_mut()) else {
            return Ok(());
        };
        let (memory, features) = (guest.memory.clone(), guest.features);
        let Some(queue) = guest.queue(RX) else {
            return Ok(());
        };
        let mut receive = Receive {
            core: &self.core,
            bound,
            frame: &mut self.rx_frame,
            memory: &memory,
            features,
        };
        match receive.run(queue)? {
            rx::Stop::TapFailed => self.lose_tap(),
            stop => bound.watch_for(&self.core, EventSet::IN, stop == rx::Stop::TapEmpty),
        }
    }

    fn send(&mut self) -> Result<(), DeviceError> {
        let Some(guest) = self.guest.as_mut() else {
            return Ok(());
        };
        let (memory, features) = (guest.memory.clone(), guest.features);
        let Some(queue) = guest.queue(TX) else {
            return Ok(());
        };
        let mut send = Send {
            core: &self.core,
            bound: self.bound.as_mut(),
            buffer: &mut self.tx_buffer,
            memory: &memory,
            features,
        };
        let stop = send.run(queue)?;
        match &mut self.bound {
            Some(bound) => bound.watch_for(&self.core, EventSet::OUT, stop == tx::Stop::TapFull),
            None => Ok(()),
        }
    }

    fn tap_event(&mut self, events: EventSet) -> Result<(), DeviceError> {
        // An event that came before the tap was let go of.
        if self.bound.as_ref().is_none_or(|bound| bound.watched.is_empty()) {
            return Ok(());
        }
        if events.intersects(EventSet::ERROR | EventSet::HANG_UP) {
            return self.lose_tap();
        }
        if events.contains(EventSet::OUT) {
            self.send()?;
        }
        if events.contains(EventSet::IN) {
            self.receive()?;
        }
        Ok(())
    }
}

impl Device for Net {
    type Resource = NetResource;
    type State = NetState;
    const KIND: ThreadKind = ThreadKind::Net;

    fn core(&self) -> &Arc<Core> {
        &self.core
    }

    fn device_id(&self) -> u32 {
        VIRTIO_ID_NET
    }

    fn features(&self) -> u64 {
        NetSlot::features()
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE; 2]
    }

    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError> {
        let features = activation.features;
        self.guest = Some(Guest::new(activation, &self.core)?);
        match &self.bound {
            Some(bound) => bound.tap.offload(features),
            None => Ok(()),
        }
    }

    fn queue_event(&mut self, index: usize) -> Result<(), DeviceError> {
        match index {
            RX => self.receive(),
            _ => self.send(),
        }
    }

    fn device_event(&mut self, token: u64, events: EventSet) -> Result<(), DeviceError> {
        match (token, &mut self.bound) {
            (TOKEN_TAP, _) => self.tap_event(events),
            (TOKEN_RX_LIMITER, Some(bound)) => {
                bound.rx_limiter.acknowledge();
                self.receive()
            }
            (TOKEN_TX_LIMITER, Some(bound)) => {
                bound.tx_limiter.acknowledge();
                self.send()
            }
            _ => Ok(()),
        }
    }

    fn bind(&mut self, resource: NetResource) -> Result<(), DeviceError> {
        if self.bound.is_some() {
            return Err(DeviceError::AlreadyBound);
        }
        let bound = Bound::from(resource);
        if let Some(guest) = &self.guest {
            bound.tap.offload(guest.features)?;
        }
        for (limiter, token) in [
            (&bound.rx_limiter, TOKEN_RX_LIMITER),
            (&bound.tx_limiter, TOKEN_TX_LIMITER),
        ] {
            if let Some(timer) = limiter.timer() {
                self.core
                    .watch(timer, EventSet::IN, token)
                    .map_err(DeviceError::host("watch the rate limit's timer"))?;
            }
        }
        self.bound = Some(bound);
        self.core.change_config(|config| link_status(config, true));
        if self.guest.is_some() {
            // Buffers of the driver may wait already. A paused device does not see this; its resume looks by itself.
            raise(&self.core.notify()[RX]);
        }
        Ok(())
    }

    fn quiesce(&mut self) -> Result<(), DeviceError> {
        match &mut self.bound {
            Some(bound) => bound.rest(&self.core),
            None => Ok(()),
        }
    }

    fn resume(&mut self) -> Result<(), DeviceError> {
        self.send()?;
        self.receive()
    }

    fn has_work(&self) -> bool {
        // The tap is watched from then on.
        self.guest.is_some()
    }

    fn reset(&mut self) {
        self.guest = None;
        self.rx_frame.clear();
        let Some(bound) = &mut self.bound else {
            return;
        };
        bound.tx_paid = false;
        let rested = bound.rest(&self.core).and_then(|()| bound.tap.offload(0));
        // A tap that was deleted under us refuses both.
        if rested.is_err() && self.lose_tap().is_err() {
            self.core.counters.bump("tap_failed");
        }
    }

    fn save(&self) -> NetState {
        NetState {
            guest: self.guest.as_ref().map(Guest::state),
            rx_frame: self.rx_frame.bytes().to_vec(),
        }
    }

    fn restore(&mut self, state: NetState, memory: GuestMemory) -> Result<(), DeviceError> {
        self.reset();
        let frame = Frame::restore(&state.rx_frame)?;
        let Some(guest) = state.guest else { return Ok(()) };
        let guest = Guest::restore(guest, memory, &self.core)?;
        if let Some(bound) = &self.bound {
            bound.tap.offload(guest.features)?;
        }
        self.guest = Some(guest);
        self.rx_frame = frame;
        Ok(())
    }
}
