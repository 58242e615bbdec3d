//! The VM generation id (Microsoft's "Virtual Machine Generation ID", which QEMU and others follow): 16 bytes in guest memory
//! that are others after a machine was restored. The guest finds them by ACPI, and an ACPI notification tells it to look.
//!
//! ```text
//! renew: write 16 random bytes at GENERATION_PAGE -> interrupt of the event device -> Notify (VGEN, 0x80)
//!                                                                      Linux: mixes them in, reseeds, says so in its log
//! ```
//!
//! A restored machine is renewed before its first instruction, by the VMM itself: nobody can forget it, and nobody else has to
//! be trusted to choose an id that never was. The interrupt stays pending until the guest takes it.

use std::io;
use std::sync::Mutex;

use thiserror::Error;
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};
use vmm_sys_util::eventfd::EventFd;

use super::GENERATION_PAGE;
use crate::memory::GuestMemory;
use crate::virtio::core::{lock, raise};
use crate::virtio::rng;

/// A generation id.
pub type Id = [u8; 16];

/// A generation id that cannot be given.
#[derive(Debug, Error)]
pub enum Error {
    /// There is no memory for it.
    #[error("writing the generation id at {GENERATION_PAGE:#x}")]
    Write(#[source] GuestMemoryError),
    /// The host's generator failed.
    #[error("drawing a generation id")]
    Random(#[source] io::Error),
    /// A saved id is not one.
    #[error("the saved generation id has {0} bytes: an id has 16")]
    State(usize),
}

// ---- state

/// The device: it has no registers.
pub struct Generation {
    memory: GuestMemory,
    interrupt: EventFd,
    id: Mutex<Id>,
}

/// What is saved of it. The page itself is saved with the memory.
#[derive(Clone, PartialEq, prost::Message)]
pub struct GenerationState {
    /// 16 bytes.
    #[prost(bytes = "vec", tag = "1")]
    pub id: Vec<u8>,
}

impl Generation {
    /// No id yet: [`Self::begin`] gives the first. `interrupt` is the event device's.
    #[must_use]
    pub fn new(memory: GuestMemory, interrupt: EventFd) -> Self {
        Self {
            memory,
            interrupt,
            id: Mutex::default(),
        }
    }

    /// The id that the machine has.
    #[must_use]
    pub fn id(&self) -> Id {
        *lock(&self.id)
    }

    // ---- process

    /// Gives the machine an id that no machine ever had, before the guest has begun: nobody is there to be told.
    ///
    /// # Errors
    /// There is no memory for it, or the host has no random numbers.
    pub fn begin(&self) -> Result<(), Error> {
        let mut id = Id::default();
        rng::fill(&mut id).map_err(Error::Random)?;
        let page = GuestAddress(GENERATION_PAGE);
        self.memory.write_slice(&id, page).map_err(Error::Write)?;
        *lock(&self.id) = id;
        Ok(())
    }

    /// Gives the machine another such id, and tells the guest.
    ///
    /// # Errors
    /// As [`Self::begin`].
    pub fn renew(&self) -> Result<(), Error> {
        self.begin()?;
        raise(&self.interrupt);
        Ok(())
    }

    // ---- save and restore

    /// Saves it.
    #[must_use]
    pub fn save(&self) -> GenerationState {
        GenerationState { id: self.id().to_vec() }
    }

    /// Takes a saved id over. [`Self::renew`] follows before the guest runs.
    ///
    /// # Errors
    /// It is no id.
    pub fn restore(&self, state: &GenerationState) -> Result<(), Error> {
        *lock(&self.id) = Id::try_from(&state.id[..]).map_err(|_| Error::State(state.id.len()))?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::virtio::testing::memory;
    use vmm_sys_util::eventfd::EFD_NONBLOCK;

    fn generation() -> (GuestMemory, EventFd, Generation) {
        let (memory, interrupt) = (memory(), EventFd::new(EFD_NONBLOCK).unwrap());
        let generation = Generation::new(memory.clone(), interrupt.try_clone().unwrap());
        (memory, interrupt, generation)
    }

    #[test]
    fn each_renewal_is_another_id_in_the_page_and_an_interrupt() {
        let (memory, interrupt, generation) = generation();
        let ids = [(); 3].map(|()| {
            generation.renew().unwrap();
            assert_eq!(interrupt.read().unwrap(), 1);
            let id: Id = memory.read_obj(GuestAddress(GENERATION_PAGE)).unwrap();
            assert_eq!(id, generation.id());
            id
        });
        assert!(ids[0] != ids[1] && ids[1] != ids[2] && ids[0] != ids[2]);
    }

    #[test]
    fn save_restore_save_is_equal_and_the_page_is_left_to_the_memory() {
        let (_, _, generation) = generation();
        generation.renew().unwrap();
        let saved = generation.save();
        let (memory, interrupt, other) = self::generation();
        other.restore(&saved).unwrap();
        assert_eq!(other.save(), saved);
        assert!(interrupt.read().is_err());
        assert_eq!(memory.read_obj::<u128>(GuestAddress(GENERATION_PAGE)).unwrap(), 0);
        other.renew().unwrap();
        assert_ne!(other.save(), saved);
    }

    #[test]
    fn a_saved_id_of_another_length_is_refused() {
        let (_, _, generation) = generation();
        let state = GenerationState { id: vec![0; 15] };
        assert!(generation.restore(&state).unwrap_err().to_string().contains("15 bytes"));
    }
}
