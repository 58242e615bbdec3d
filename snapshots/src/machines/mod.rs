//! Machine snapshots as chunks: kept once however many of them are alike, and carried to other hosts by any OCI registry.
//!
//! ```text
//!   state, memory, disks ──keep: cut at 256 KiB, no holes──> chunks in the store + Machine: which file has which where
//!   the same files, holes and all <──lay out: verified── Machine
//!
//!   Machine ──push──> registry: an artifact whose configuration is the Machine and what its bundles hold,
//!                     and whose layers are the bundles: chunks as the store has them, one after the other
//!   Machine <──pull── only the chunks that this host does not have, as ranges of the bundles
//! ```
//!
//! - [`record`]: what is known of a machine, as a value and as JSON;
//! - [`files`]: from files to chunks and back;
//! - [`open`]: a file as a device, for who brings it piece by piece;
//! - [`bundle`]: chunks for the way;
//! - [`shelf`]: the machines of this host, in the store's index;
//! - [`push`] and [`pull`], and what they share: [`transfer`].
//!
//! What the files mean is none of this crate's business: flint-vmm writes and reads them, and its passport says which host
//! can run them.

mod bundle;
mod error;
mod files;
mod open;
mod pull;
mod push;
mod record;
pub(crate) mod shelf;
mod transfer;

use std::fs::File;
use std::sync::Arc;

pub use error::MachineError;
pub use open::ChunkedFile;
pub use pull::{Fetched, Found};
#[cfg(feature = "fuzzing")]
pub(crate) use record::comes_back;
pub use record::{Machine, MachineFile, Notes, RecordError};
pub use transfer::{Transfer, Watcher};

use crate::images::{ImageStore, Inner};

/// The machine snapshots of a host. Clones are the same.
#[derive(Clone)]
pub struct Machines {
    inner: Arc<Inner>,
}

impl ImageStore {
    /// The machine snapshots that share this store's chunks.
    pub fn machines(&self) -> Machines {
        Machines {
            inner: Arc::clone(self.inner()),
        }
    }
}

impl Machines {
    /// Keeps files under `name`, in the place of what had that name. `notes` go along, to whoever gets the machine.
    ///
    /// # Errors
    /// When a name is none, a file cannot be read, or its chunks cannot be kept: then nothing has changed.
    pub async fn keep(&self, name: &str, files: Vec<(String, File)>, notes: Notes) -> Result<Machine, MachineError> {
        let (inner, name) = (Arc::clone(&self.inner), record::checked_name(name)?);
        blocking(move || {
            let session = inner.chunks().session();
            let mut machine = Machine::new(notes);
            let mut sink = session.sink()?;
            for (name, file) in files {
                let (len, pieces) = files::cut(&name, &file, |unit| Ok(sink.put(unit)?))?;
                machine.add(&name, len, pieces)?;
            }
            session.commit()?;
            shelf::put(inner.chunks(), &name, &machine, None)?;
            Ok(machine)
        })
        .await
    }

    /// Writes a machine's file into `into`, which must be empty.
    ///
    /// # Errors
    /// When there is no such machine or file, a chunk is missing or damaged, or `into` cannot be written.
    pub async fn lay_out(&self, name: &str, file: &str, into: File) -> Result<(), MachineError> {
        let (inner, name, file) = (Arc::clone(&self.inner), name.to_owned(), file.to_owned());
        blocking(move || {
            let machine = shelf::get(inner.chunks(), &name)?;
            let file = machine.file(&file).ok_or_else(|| MachineError::NoFile {
                machine: name,
                file: file.clone(),
            })?;
            // So that no sweep takes a chunk meanwhile, whoever removes the machine.
            let session = inner.chunks().session();
            session.pin_all(&file.ids())?;
            files::lay_out(file, &into, inner.chunks())
        })
        .await
    }

    /// A machine.
    ///
    /// # Errors
    /// [`MachineError::NotHere`]; when the index cannot be read.
    pub async fn get(&self, name: &str) -> Result<Machine, MachineError> {
        let (inner, name) = (Arc::clone(&self.inner), name.to_owned());
        blocking(move || shelf::get(inner.chunks(), &name)).await
    }

    /// All machines, by name.
    ///
    /// # Errors
    /// When the index cannot be read.
    pub async fn list(&self) -> Result<Vec<(String, Machine)>, MachineError> {
        let inner = Arc::clone(&self.inner);
        blocking(move || shelf::list(inner.chunks())).await
    }

    /// Forgets a machine and gives back what only it needed. Returns how many bytes that were.
    ///
    /// # Errors
    /// [`MachineError::NotHere`]; when the index or a pack cannot be written.
    pub async fn remove(&self, name: &str) -> Result<u64, MachineError> {
        let (inner, name) = (Arc::clone(&self.inner), name.to_owned());
        blocking(move || {
            shelf::remove(inner.chunks(), &name)?;
            Ok(inner.sweep()?)
        })
        .await
    }
}

/// Runs work that blocks where it may.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, MachineError> + Send + 'static,
) -> Result<T, MachineError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) => Err(MachineError::Worker(error.to_string())),
    }
}
