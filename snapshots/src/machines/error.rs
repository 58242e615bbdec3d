//! What can go wrong with machine snapshots.

use std::io;

use super::record::RecordError;
use crate::images::{ErrorKind, ImageError, registry_kind, store_kind};
use crate::registry::{ParseReferenceError, RegistryError};
use crate::store::StoreError;

/// Why a machine snapshot could not be kept, had or sent.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    /// Not a name.
    #[error("{0:?} is no name for a machine snapshot: it takes 1 to 128 of a-z, 0-9, '.', '_' and '-'")]
    Name(String),
    /// There is no such machine.
    #[error("there is no machine snapshot {0:?} on this host")]
    NotHere(String),
    /// It has no such file.
    #[error("machine snapshot {machine:?} has no file {file:?}")]
    NoFile {
        /// Which machine.
        machine: String,
        /// Which file.
        file: String,
    },
    /// A file could not be read or written.
    #[error("{action} the file {file:?} of a machine snapshot")]
    File {
        /// What was being done.
        action: &'static str,
        /// With which file.
        file: String,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The record makes no sense.
    #[error("the record of machine snapshot {name:?} cannot be used")]
    Record {
        /// Of which machine.
        name: String,
        /// What is wrong with it.
        #[source]
        source: RecordError,
    },
    /// Chunks of a bundle are not what the record says.
    #[error(
        "what registry {registry} sent of {reference} is damaged: {reason}; push it again, or mend the registry's storage"
    )]
    Bundle {
        /// Where it came from.
        registry: String,
        /// What was pulled.
        reference: String,
        /// What is wrong.
        reason: String,
    },
    /// The reference is none.
    #[error(transparent)]
    Reference(#[from] ParseReferenceError),
    /// The registry could not serve or take it.
    #[error(transparent)]
    Registry(#[from] RegistryError),
    /// Chunks could not be kept or found.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// Giving back room failed.
    #[error(transparent)]
    Sweep(#[from] ImageError),
    /// A thread died.
    #[error("a worker thread failed: {0}")]
    Worker(String),
}

impl MachineError {
    /// What kind of mishap it was.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Name(_) | Self::Reference(_) => ErrorKind::Invalid,
            Self::NotHere(_) => ErrorKind::NotFound,
            Self::NoFile { .. } | Self::Record { .. } | Self::Bundle { .. } => ErrorKind::BadImage,
            Self::File { source, .. } => match source.kind() {
                io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => ErrorKind::DiskFull,
                _ => ErrorKind::Internal,
            },
            Self::Registry(error) => registry_kind(error),
            Self::Store(error) => store_kind(error),
            Self::Sweep(error) => error.kind(),
            Self::Worker(_) => ErrorKind::Internal,
        }
    }

    pub(super) fn is_disk_full(&self) -> bool {
        self.kind() == ErrorKind::DiskFull
    }
}
