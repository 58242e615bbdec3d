//! What a guest is told of its machine by a page of memory and an interrupt, where no virtio device is needed for it.
//!
//! - [`generation`]: the VM generation id, by which a clone learns that it is one.
//!
//! ACPI names these to the guest ([`crate::acpi`]): a device for each, and one generic event device (ACPI 6.5, 5.6.9), whose
//! interrupt means "look again" for all of them.

pub mod generation;

/// Interrupt of the generic event device. On a PC it is the second serial line's, which these machines do not have.
pub const EVENT_IRQ: u32 = 3;
/// The page with the generation id: below 1 MiB, in what the memory map calls reserved, behind the ACPI tables.
pub const GENERATION_PAGE: u64 = 0xf_e000;
