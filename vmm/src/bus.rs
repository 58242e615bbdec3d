//! Address buses: which device answers an address of the guest.
//!
//! ```text
//! vCPU thread --KVM_EXIT_IO---> port bus --+
//!             --KVM_EXIT_MMIO-> MMIO bus --+--> Mutex<dyn BusDevice>::read / write (offset inside the window)
//! ```
//!
//! A bus is filled while a machine is made and never changes afterwards, so vCPU threads look devices up without a lock;
//! only the device itself is locked. An address that nobody owns reads as all ones, as on a PC, and a write to it is lost.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use thiserror::Error;

/// A device with registers. What a guest writes is hostile: an access never panics and never blocks.
pub trait BusDevice: Send {
    /// Fills `data` with what the guest reads at `offset` from the window's start.
    fn read(&mut self, offset: u64, data: &mut [u8]);
    /// Takes what the guest writes at `offset` from the window's start.
    fn write(&mut self, offset: u64, data: &[u8]);
}

/// A device as a bus holds it: shared with whoever binds resources to it.
pub type SharedDevice = Arc<Mutex<dyn BusDevice>>;

/// A window that cannot be put on a bus.
#[derive(Debug, Error)]
pub enum Error {
    /// Windows overlap, or one is empty or runs past the end of the address space.
    #[error("placing a device at {base:#x}+{size:#x}: the window is empty, too long or already taken")]
    BadWindow {
        /// First address.
        base: u64,
        /// Length.
        size: u64,
    },
}

struct Window {
    size: u64,
    device: SharedDevice,
}

/// A set of windows that do not overlap.
#[derive(Default)]
pub struct Bus {
    windows: BTreeMap<u64, Window>,
}

impl Bus {
    /// An empty bus.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Lets `device` answer `size` addresses from `base` on.
    ///
    /// # Errors
    /// The window is empty, wraps around, or overlaps one that is there.
    pub fn insert(&mut self, base: u64, size: u64, device: SharedDevice) -> Result<(), Error> {
        let bad = Error::BadWindow { base, size };
        let Some(end) = base.checked_add(size).filter(|_| size > 0) else {
            return Err(bad);
        };
        // Windows do not overlap, so only the last one that starts below `end` can reach into the new one.
        if let Some((start, window)) = self.windows.range(..end).next_back()
            && start + window.size > base
        {
            return Err(bad);
        }
        self.windows.insert(base, Window { size, device });
        Ok(())
    }

    /// Reads at `address`; all ones where no device is. An access that starts inside a window and leaves it is nobody's.
    pub fn read(&self, address: u64, data: &mut [u8]) {
        match self.find(address, data.len()) {
            // A device that panicked in another thread has lost that thread; its registers still answer.
            Some((offset, device)) => device.lock().unwrap_or_else(PoisonError::into_inner).read(offset, data),
            None => data.fill(0xff),
        }
    }

    /// Writes at `address`; lost where no device is.
    pub fn write(&self, address: u64, data: &[u8]) {
        if let Some((offset, device)) = self.find(address, data.len()) {
            device
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .write(offset, data);
        }
    }

    fn find(&self, address: u64, length: usize) -> Option<(u64, &SharedDevice)> {
        let (base, window) = self.windows.range(..=address).next_back()?;
        let offset = address - base;
        let end = offset.checked_add(u64::try_from(length).ok()?)?;
        (end <= window.size).then_some((offset, &window.device))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Remembers the last write and reads as its offset.
    #[derive(Default)]
    struct Probe(Option<(u64, Vec<u8>)>);

    impl BusDevice for Probe {
        fn read(&mut self, offset: u64, data: &mut [u8]) {
            data.fill(offset.to_le_bytes()[0]);
        }
        fn write(&mut self, offset: u64, data: &[u8]) {
            self.0 = Some((offset, data.to_vec()));
        }
    }

    fn probe() -> Arc<Mutex<Probe>> {
        Arc::default()
    }

    #[test]
    fn an_access_reaches_the_window_it_falls_into() {
        let (low, high) = (probe(), probe());
        let mut bus = Bus::new();
        bus.insert(0x100, 0x10, low.clone()).unwrap();
        bus.insert(0x110, 0x10, high.clone()).unwrap();

        bus.write(0x113, &[7, 8]);
        let mut data = [0; 1];
        bus.read(0x10f, &mut data);

        assert_eq!(high.lock().unwrap().0, Some((3, vec![7, 8])));
        assert_eq!(low.lock().unwrap().0, None);
        assert_eq!(data, [0xf]);
    }

    #[test]
    fn nobody_answers_outside_or_across_the_end_of_a_window() {
        let device = probe();
        let mut bus = Bus::new();
        bus.insert(0x100, 0x10, device.clone()).unwrap();

        for address in [0, 0xff, 0x10d, 0x110, u64::MAX] {
            let mut data = [0; 4];
            bus.read(address, &mut data);
            assert_eq!(data, [0xff; 4], "{address:#x}");
            bus.write(address, &data);
        }
        assert_eq!(device.lock().unwrap().0, None);
    }

    #[test]
    fn windows_that_overlap_wrap_or_are_empty_are_refused() {
        let mut bus = Bus::new();
        bus.insert(0x100, 0x10, probe()).unwrap();

        for (base, size) in [
            (0xf8, 9),
            (0x10f, 1),
            (0x100, 0x10),
            (0x80, 0x1000),
            (0x200, 0),
            (u64::MAX, 2),
        ] {
            assert!(bus.insert(base, size, probe()).is_err(), "{base:#x}+{size:#x}");
        }
        bus.insert(0xf8, 8, probe()).unwrap();
        bus.insert(0x110, 1, probe()).unwrap();
    }
}
