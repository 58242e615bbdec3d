//! Devices on the port bus, and where they are.
//!
//! Every register here is a byte wide.

pub mod power;
pub mod serial;

/// Keyboard controller: data at 0x60, command and status at 0x64.
pub const I8042: u16 = 0x60;
/// First serial line.
pub const COM1: u16 = 0x3f8;
/// Interrupt of the first serial line.
pub const COM1_IRQ: u32 = 4;
/// Panic notification, as QEMU has it.
pub const PVPANIC: u16 = 0x505;
/// ACPI reset register (ACPI 6.5, 4.8.3.6).
pub const ACPI_RESET: u16 = 0x600;
/// ACPI sleep control register (ACPI 6.5, 4.8.3.7); the status register follows it.
pub const ACPI_SLEEP_CONTROL: u16 = 0x601;
/// ACPI sleep status register.
pub const ACPI_SLEEP_STATUS: u16 = 0x602;
