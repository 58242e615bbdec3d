//! What can go wrong with images.

use std::path::PathBuf;
use std::time::Duration;

use crate::device::BuildError;
use crate::registry::{Digest, ParseReferenceError, RegistryError};
use crate::store::StoreError;

/// Why an image could not be had, used or removed.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// The name is not a reference.
    #[error(transparent)]
    Reference(#[from] ParseReferenceError),
    /// The registry could not serve it.
    #[error(transparent)]
    Registry(#[from] RegistryError),
    /// Chunks could not be kept or found.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A layer could not be had.
    #[error("layer {layer} of {image}")]
    Layer {
        /// Which image.
        image: String,
        /// The layer's digest, as the manifest has it.
        layer: Digest,
        /// What is wrong.
        #[source]
        source: Box<LayerError>,
    },
    /// The layers do not make a file tree.
    #[error("the layers of {image} do not make a file tree: {reason}")]
    Assemble {
        /// Which image.
        image: String,
        /// What is wrong.
        reason: String,
    },
    /// The device table could not be made.
    #[error("making the block device of {image}")]
    Table {
        /// Which image.
        image: String,
        /// What is wrong.
        #[source]
        source: BuildError,
    },
    /// A file or folder that was to be imported is no image.
    #[error("{} is no image that can be imported: {reason}", path.display())]
    Import {
        /// Which one.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// It took longer than a pull may.
    #[error(
        "pulling {image} was not done after {after:?}, the longest a pull may last; layers that came are kept, so try again"
    )]
    Deadline {
        /// Which image.
        image: String,
        /// How long.
        after: Duration,
    },
    /// There is no such image here.
    #[error("image {image} is not on this host: pull or import it")]
    NotHere {
        /// As it was named.
        image: String,
    },
    /// The image has no such layer.
    #[error("{image} has no layer {layer} at its registry: its name may have moved to another image")]
    NoSuchLayer {
        /// Which image.
        image: String,
        /// The layer's digest.
        layer: Digest,
    },
    /// Somebody uses it.
    #[error("image {image} is in use by a sandbox: end that first")]
    InUse {
        /// As it was named.
        image: String,
    },
    /// The record of an image cannot be read.
    #[error("the record of {what} in the image store is damaged: {reason}")]
    Record {
        /// Of what.
        what: String,
        /// What is wrong.
        reason: String,
    },
    /// A worker ended before its time.
    #[error("work on an image was given up: {0}")]
    Worker(String),
}

/// What is wrong with a layer.
#[derive(Debug, thiserror::Error)]
pub enum LayerError {
    /// Its bytes could not be had.
    #[error(transparent)]
    Registry(#[from] RegistryError),
    /// It is not what the manifest says.
    #[error(
        "its bytes are altered: expected {expected}, got {found}; nothing of the image was kept visible. Push it again, or mend the registry's storage"
    )]
    Altered {
        /// The manifest's digest.
        expected: Digest,
        /// The digest of what came.
        found: Digest,
    },
    /// It is shorter or longer than the manifest says.
    #[error("it has {found} bytes instead of {expected}; push it again, or mend the registry's storage")]
    Length {
        /// The manifest's.
        expected: u64,
        /// What came.
        found: u64,
    },
    /// Its uncompressed bytes are not what the configuration says.
    #[error(
        "its content is not what the image's configuration says: expected diff id {expected}, got {found}; the image was built or pushed wrongly"
    )]
    DiffId {
        /// The configuration's.
        expected: Digest,
        /// What came out.
        found: Digest,
    },
    /// Its tar is not acceptable.
    #[error("its tar cannot be taken: {0}")]
    Tar(String),
    /// Chunks could not be kept.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// What kind of mishap it was, for those who have to answer with a status.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ErrorKind {
    /// A name, a path or an option makes no sense.
    Invalid,
    /// There is no such image, here or there.
    NotFound,
    /// Credentials are missing or wrong.
    Denied,
    /// The registry is down or slow; later it may work.
    Unavailable,
    /// The image is damaged or malformed.
    BadImage,
    /// The image needs something that is not supported.
    Unsupported,
    /// The disk is full.
    DiskFull,
    /// It is in use.
    InUse,
    /// It took too long.
    Deadline,
    /// This host is at fault.
    Internal,
}

impl ImageError {
    /// What kind of mishap it was.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Reference(_) | Self::Import { .. } => ErrorKind::Invalid,
            Self::Registry(error) => registry_kind(error),
            Self::Store(error) => store_kind(error),
            Self::Layer { source, .. } => match &**source {
                LayerError::Registry(error) => registry_kind(error),
                LayerError::Store(error) => store_kind(error),
                LayerError::Altered { .. }
                | LayerError::Length { .. }
                | LayerError::DiffId { .. }
                | LayerError::Tar(_) => ErrorKind::BadImage,
            },
            Self::Assemble { .. } => ErrorKind::BadImage,
            Self::Table { .. } | Self::Record { .. } | Self::Worker(_) => ErrorKind::Internal,
            Self::Deadline { .. } => ErrorKind::Deadline,
            Self::NotHere { .. } | Self::NoSuchLayer { .. } => ErrorKind::NotFound,
            Self::InUse { .. } => ErrorKind::InUse,
        }
    }
}

pub(crate) fn store_kind(error: &StoreError) -> ErrorKind {
    if error.is_disk_full() {
        ErrorKind::DiskFull
    } else {
        ErrorKind::Internal
    }
}

pub(crate) fn registry_kind(error: &RegistryError) -> ErrorKind {
    match error {
        RegistryError::Address { .. } | RegistryError::DockerConfig { .. } | RegistryError::Tls(_) => {
            ErrorKind::Invalid
        }
        RegistryError::NotFound { .. } => ErrorKind::NotFound,
        RegistryError::CredentialsNeeded { .. }
        | RegistryError::WrongCredentials { .. }
        | RegistryError::InsecureRealm { .. } => ErrorKind::Denied,
        RegistryError::Unreachable { .. }
        | RegistryError::Certificate { .. }
        | RegistryError::Redirect { .. }
        | RegistryError::TimedOut { .. }
        | RegistryError::Status { .. } => ErrorKind::Unavailable,
        RegistryError::TooLarge { .. }
        | RegistryError::TooLong { .. }
        | RegistryError::Malformed { .. }
        | RegistryError::Altered { .. } => ErrorKind::BadImage,
        RegistryError::NoPlatform { .. } | RegistryError::Unsupported { .. } => ErrorKind::Unsupported,
    }
}

/// An error with its causes, for the log.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(Some(error), |error| error.source());
    causes.map(ToString::to_string).collect::<Vec<_>>().join(": ")
}
