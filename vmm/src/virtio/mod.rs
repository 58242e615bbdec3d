//! Virtio devices (virtio 1.3) behind the MMIO transport.
//!
//! ```text
//!   vCPU threads            control thread                 one thread for each device
//!   MmioTransport  ------>  DeviceHandle  -- commands -->  Worker
//!        |                       |  lock                      |  lock, once for each event
//!        |                       +--------> Device <----------+
//!        +------------------- Core (shared) ------------------+
//!          config space, interrupt, counters, one notify eventfd for each queue
//! ```
//!
//! - [`mmio`]: registers, status machine, feature negotiation: all that is the same for every device.
//! - [`worker`]: the thread that serves a [`device::Device`]; its commands are activate, reset, pause, resume. To bind, save
//!   and restore a device nobody has to wake it.
//! - [`queue`] and [`chain`]: rings and descriptors. Descriptors are read once, into owned values, and checked there.
//! - [`block`], [`net`], [`vsock`], [`rng`], [`balloon`], [`mem`]: the devices; each has the same parts in the same order: config space, state,
//!   activate, process, save and restore.
//!
//! What a guest writes is hostile. A malformed chain is handed back unused and counted; a malformed ring stops the
//! device, which then asks for a reset (virtio 1.3, 2.1.2). Neither ends the VMM.

pub mod balloon;
pub mod block;
pub mod chain;
pub mod core;
pub mod device;
pub(crate) mod discard;
pub mod mem;
pub mod mmio;
pub mod net;
pub mod queue;
pub mod rate_limit;
pub mod rng;
pub mod vsock;
pub mod worker;

#[cfg(test)]
pub(crate) mod testing;

pub use self::core::{Core, Counters};
pub use device::{Device, DeviceError};
pub use mmio::MmioTransport;
pub use worker::{DeviceHandle, ThreadHook, ThreadKind};

/// Bit `n` of a 64-bit feature set, for the feature numbers that virtio-bindings gives as `u32`.
pub(crate) const fn feature(bit: u32) -> u64 {
    1 << bit
}
