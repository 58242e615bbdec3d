//! The serial line: `vm-superio`'s UART between the port bus and whatever flintd binds behind it.
//!
//! The guest never waits for the reader: what cannot be written at once is dropped and counted.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use thiserror::Error;
use vm_superio::serial::{NoEvents, SerialState as UartState};
use vm_superio::{Serial as Uart, Trigger};
use vmm_sys_util::eventfd::EventFd;

use crate::bus::BusDevice;

/// Number of registers.
pub const SIZE: u64 = 8;

/// A serial line that cannot be set up.
#[derive(Debug, Error)]
pub enum Error {
    /// The descriptor to write to does not take O_NONBLOCK.
    #[error("making the serial line's output non-blocking")]
    Output(#[source] nix::Error),
    /// The process is out of descriptors.
    #[error("sharing the serial line's interrupt")]
    Interrupt(#[source] io::Error),
    /// A saved state that no UART can have, or an interrupt that cannot be raised.
    #[error("restoring the serial line: {0}")]
    Restore(String),
}

/// The line's interrupt: an eventfd that is registered as irqfd.
pub struct Interrupt(pub EventFd);

impl Trigger for Interrupt {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

/// What the guest's output goes to.
struct Output {
    sink: Option<File>,
    dropped: Arc<AtomicU64>,
}

impl Write for Output {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        let written = match &mut self.sink {
            Some(sink) => sink.write(data).unwrap_or(0),
            None => 0,
        };
        let lost = u64::try_from(data.len() - written).unwrap_or(u64::MAX);
        self.dropped.fetch_add(lost, Ordering::Relaxed);
        Ok(data.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// What of a serial line is saved. Its output is bound anew.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct State {
    /// Registers and receive buffer.
    pub uart: UartState,
    /// Bytes that were dropped so far.
    pub dropped: u64,
}

/// A serial line in a state file.
#[derive(Clone, PartialEq, prost::Message)]
pub struct SerialRecord {
    /// Registers as [`UartState`] names them, one byte each: divisor low and high, interrupt enable and identification, line
    /// control and status, modem control and status, scratch.
    #[prost(bytes = "vec", tag = "1")]
    pub registers: Vec<u8>,
    /// Receive buffer.
    #[prost(bytes = "vec", tag = "2")]
    pub received: Vec<u8>,
    /// Bytes that were dropped so far.
    #[prost(uint64, tag = "3")]
    pub dropped: u64,
}

impl From<&State> for SerialRecord {
    fn from(State { uart, dropped }: &State) -> Self {
        Self {
            registers: vec![
                uart.baud_divisor_low,
                uart.baud_divisor_high,
                uart.interrupt_enable,
                uart.interrupt_identification,
                uart.line_control,
                uart.line_status,
                uart.modem_control,
                uart.modem_status,
                uart.scratch,
            ],
            received: uart.in_buffer.clone(),
            dropped: *dropped,
        }
    }
}

impl TryFrom<&SerialRecord> for State {
    type Error = &'static str;

    fn try_from(record: &SerialRecord) -> Result<Self, &'static str> {
        let [
            low,
            high,
            enable,
            identification,
            line_control,
            line_status,
            modem_control,
            modem_status,
            scratch,
        ] = record.registers[..]
        else {
            return Err("serial line's registers");
        };
        Ok(Self {
            uart: UartState {
                baud_divisor_low: low,
                baud_divisor_high: high,
                interrupt_enable: enable,
                interrupt_identification: identification,
                line_control,
                line_status,
                modem_control,
                modem_status,
                scratch,
                in_buffer: record.received.clone(),
            },
            dropped: record.dropped,
        })
    }
}

/// A 16550A.
pub struct Serial {
    uart: Uart<Interrupt, NoEvents, Output>,
    dropped: Arc<AtomicU64>,
}

impl Serial {
    /// A line in its reset state, with nothing behind it.
    #[must_use]
    pub fn new(interrupt: Interrupt) -> Self {
        let dropped = Arc::new(AtomicU64::new(0));
        let uart = Uart::new(
            interrupt,
            Output {
                sink: None,
                dropped: dropped.clone(),
            },
        );
        Self { uart, dropped }
    }

    /// Lets the guest's output go to `sink`, from now on.
    ///
    /// # Errors
    /// The descriptor cannot be made non-blocking.
    pub fn bind(&mut self, sink: OwnedFd) -> Result<(), Error> {
        let flags = fcntl(&sink, FcntlArg::F_GETFL).map_err(Error::Output)?;
        let flags = OFlag::from_bits_retain(flags) | OFlag::O_NONBLOCK;
        fcntl(&sink, FcntlArg::F_SETFL(flags)).map_err(Error::Output)?;
        self.uart.writer_mut().sink = Some(sink.into());
        Ok(())
    }

    /// Bytes that nobody took.
    #[must_use]
    pub fn dropped(&self) -> u64 {
        self.dropped.load(Ordering::Relaxed)
    }

    /// All that the guest could see of the line.
    #[must_use]
    pub fn save(&self) -> State {
        State {
            uart: self.uart.state(),
            dropped: self.dropped(),
        }
    }

    /// Takes a saved state over; what is bound stays bound. A pending interrupt is raised again.
    ///
    /// # Errors
    /// The state is none that [`Self::save`] makes, or the host refuses.
    pub fn restore(&mut self, state: &State) -> Result<(), Error> {
        let interrupt = self.uart.interrupt_evt().0.try_clone().map_err(Error::Interrupt)?;
        self.dropped.store(state.dropped, Ordering::Relaxed);
        let output = Output {
            sink: self.uart.writer_mut().sink.take(),
            dropped: self.dropped.clone(),
        };
        self.uart = Uart::from_state(&state.uart, Interrupt(interrupt), NoEvents, output)
            .map_err(|error| Error::Restore(format!("{error:?}")))?;
        Ok(())
    }
}

impl BusDevice for Serial {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let ([value], Ok(register)) = (data, u8::try_from(offset)) {
            *value = self.uart.read(register);
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if let ([value], Ok(register)) = (data, u8::try_from(offset)) {
            // The output never fails; an interrupt that cannot be raised is pending already: the eventfd's counter is full.
            let _ = self.uart.write(register, *value);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;
    use std::os::unix::net::UnixStream;
    use vmm_sys_util::eventfd::EFD_NONBLOCK;

    fn interrupt() -> Interrupt {
        Interrupt(EventFd::new(EFD_NONBLOCK).unwrap())
    }

    #[test]
    fn output_reaches_what_is_bound_and_is_counted_before() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let mut serial = Serial::new(interrupt());

        serial.write(0, b"x");
        serial.bind(ours.into()).unwrap();
        serial.write(0, b"y");

        let mut seen = [0; 1];
        theirs.read_exact(&mut seen).unwrap();
        assert_eq!(&seen, b"y");
        assert_eq!(serial.dropped(), 1);
    }

    #[test]
    fn a_reader_that_does_not_read_never_blocks_the_guest() {
        let (ours, _theirs) = UnixStream::pair().unwrap();
        let mut serial = Serial::new(interrupt());
        serial.bind(ours.into()).unwrap();

        while serial.dropped() == 0 {
            serial.write(0, b"x");
        }
    }

    #[test]
    fn save_restore_save_is_the_same() {
        let mut serial = Serial::new(interrupt());
        serial.write(1, &[2]);
        serial.write(7, &[0x5a]);
        serial.write(0, b"z");
        let saved = serial.save();
        let mut restored = Serial::new(interrupt());
        let record = SerialRecord::from(&saved);
        restored.restore(&State::try_from(&record).unwrap()).unwrap();
        assert_eq!(restored.save(), saved);
        assert_eq!(saved.dropped, 1);
    }

    #[test]
    fn accesses_of_an_odd_width_are_harmless() {
        let mut serial = Serial::new(interrupt());
        let mut data = [1; 4];
        serial.read(0, &mut data);
        serial.write(0, &data);
        serial.write(0, &[]);
        assert_eq!(data, [0; 4]);
    }
}
