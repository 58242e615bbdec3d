//! flint-vmm: one process, one sandbox, one virtual machine.
//!
//! ```text
//! flintd --control socket--> control --> machine --> vcpu threads --> bus --> ports (serial, power), virtio
//!                               |           +-----> boot (kernel, initrd), acpi
//!                               +<-- exit latch, dials
//! ```
//!
//! `README.md` tells of threads, exit reasons and the jail.

#![cfg(all(target_os = "linux", target_arch = "x86_64"))]

pub mod acpi;
pub mod boot;
pub mod bus;
pub mod control;
pub mod descriptors;
pub mod dial;
pub mod exit;
pub mod jail;
pub mod machine;
pub mod memory;
pub mod pages;
pub mod platform;
pub mod ports;
pub mod snapshot;
pub mod vcpu;
pub mod virtio;
