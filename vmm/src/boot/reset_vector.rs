//! What is at the processor's old reset vector, 0xffff0: code that resets the machine, in place of a firmware.
//!
//! Linux built with EFI takes hardware-reduced ACPI to mean EFI runtime services and then uses neither the ACPI reset register
//! nor the keyboard controller for a reboot; for want of the services it goes to real mode and jumps to 0xf000:0xfff0
//! (arch/x86/kernel/reboot.c). With nothing there it would run through its own memory for ever.

use super::{Error, put};
use crate::memory::GuestMemory;
use crate::ports;
use crate::ports::power::ACPI_RESET_VALUE;

/// Where a processor of real mode begins (SDM volume 3, 21.1.4: 0xffff0 as 0xf000:0xfff0).
pub const ADDRESS: u64 = 0xf_fff0;

const REGISTER: [u8; 2] = ports::ACPI_RESET.to_le_bytes();

/// cli; mov dx, register; mov al, value; out dx, al; hlt; jmp to the hlt
const CODE: [u8; 10] = [
    0xfa,
    0xba,
    REGISTER[0],
    REGISTER[1],
    0xb0,
    ACPI_RESET_VALUE,
    0xee,
    0xf4,
    0xeb,
    0xfd,
];

/// Writes the code.
pub(super) fn write(memory: &GuestMemory) -> Result<(), Error> {
    put(memory, "the reset vector", ADDRESS, &CODE)
}
