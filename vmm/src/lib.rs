//! flint-vmm: one process, one sandbox, one virtual machine.

pub mod bus;
pub mod memory;
pub mod virtio;
