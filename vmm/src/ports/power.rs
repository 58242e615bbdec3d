//! How a guest ends itself: keyboard controller, ACPI reset and sleep registers, pvpanic. None of them has a state to save.

use flint_api::vmm::ExitReason;

use super::{ACPI_RESET, ACPI_SLEEP_CONTROL, ACPI_SLEEP_STATUS, I8042};
use crate::bus::BusDevice;
use crate::exit::{Exit, ExitLatch};

/// Length of the keyboard controller's window, 0x60 to 0x64.
pub const I8042_SIZE: u64 = 5;
/// Length of the window of the ACPI registers.
pub const ACPI_SIZE: u64 = (ACPI_SLEEP_STATUS - ACPI_RESET + 1) as u64;
/// What the FADT tells the guest to write to the reset register.
pub const ACPI_RESET_VALUE: u8 = 1;
/// Sleep type of S5, as `\_S5` in the DSDT tells it.
pub const SLEEP_TYPE_S5: u8 = 5;

const I8042_COMMAND: u64 = 0x64 - I8042 as u64;
/// Pulse the reset line.
const I8042_RESET: u8 = 0xfe;
const SLEEP_TYPE_SHIFT: u8 = 2;
const SLEEP_ENABLE: u8 = 1 << 5;
const PVPANIC_PANICKED: u8 = 1 << 0;

/// The keyboard controller as far as anybody needs it: its reset line. No keyboard; its buffers are empty.
pub struct I8042Reset(pub ExitLatch);

impl BusDevice for I8042Reset {
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if offset == I8042_COMMAND && data == [I8042_RESET] {
            self.0.set(Exit::new(
                ExitReason::Reset,
                "the guest pulsed the keyboard controller's reset line",
            ));
        }
    }
}

/// Reset, sleep control and sleep status registers of hardware-reduced ACPI.
pub struct AcpiRegisters(pub ExitLatch);

impl BusDevice for AcpiRegisters {
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        const RESET: u64 = 0;
        const SLEEP: u64 = (ACPI_SLEEP_CONTROL - ACPI_RESET) as u64;
        const ENTER_S5: u8 = SLEEP_ENABLE | (SLEEP_TYPE_S5 << SLEEP_TYPE_SHIFT);
        match (offset, data) {
            (RESET, [ACPI_RESET_VALUE]) => {
                self.0
                    .set(Exit::new(ExitReason::Reset, "the guest wrote the ACPI reset register"));
            }
            (SLEEP, [ENTER_S5]) => self.0.set(Exit::new(ExitReason::Poweroff, "the guest entered ACPI S5")),
            _ => {}
        }
    }
}

/// The panic notification port. Reading it tells which events it understands.
pub struct PvPanic(pub ExitLatch);

impl BusDevice for PvPanic {
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        data.fill(PVPANIC_PANICKED);
    }

    fn write(&mut self, _offset: u64, data: &[u8]) {
        if data.first().is_some_and(|events| events & PVPANIC_PANICKED != 0) {
            self.0
                .set(Exit::new(ExitReason::Panic, "the guest kernel reported a panic"));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reason(write: impl FnOnce(ExitLatch)) -> Option<ExitReason> {
        let latch = ExitLatch::new().unwrap();
        write(latch.clone());
        latch.get().map(|exit| exit.reason)
    }

    #[test]
    fn each_register_ends_the_sandbox_for_its_own_reason() {
        assert_eq!(
            reason(|latch| I8042Reset(latch).write(4, &[0xfe])),
            Some(ExitReason::Reset)
        );
        assert_eq!(
            reason(|latch| AcpiRegisters(latch).write(0, &[1])),
            Some(ExitReason::Reset)
        );
        assert_eq!(
            reason(|latch| AcpiRegisters(latch).write(1, &[0x34])),
            Some(ExitReason::Poweroff)
        );
        assert_eq!(reason(|latch| PvPanic(latch).write(0, &[1])), Some(ExitReason::Panic));
    }

    #[test]
    fn other_values_and_registers_end_nothing() {
        assert_eq!(reason(|latch| I8042Reset(latch).write(0, &[0xfe])), None);
        assert_eq!(reason(|latch| I8042Reset(latch).write(4, &[0xaa])), None);
        assert_eq!(reason(|latch| AcpiRegisters(latch).write(0, &[0])), None);
        assert_eq!(
            reason(|latch| AcpiRegisters(latch).write(1, &[0x14])),
            None,
            "sleep type without SLP_EN"
        );
        assert_eq!(reason(|latch| AcpiRegisters(latch).write(1, &[0x20])), None, "S0");
        assert_eq!(
            reason(|latch| AcpiRegisters(latch).write(2, &[0x34])),
            None,
            "the status register"
        );
        assert_eq!(
            reason(|latch| PvPanic(latch).write(0, &[2])),
            None,
            "a crash kernel takes over"
        );
        assert_eq!(reason(|latch| PvPanic(latch).write(0, &[])), None);
    }
}
