//! Images from local files: an OCI layout as folder or tar (oci-archive), or what `docker save` writes (docker-archive).
//!
//! An archive is not unpacked: its members are found once and layers are read where they lie in it.

mod docker;
mod files;
mod oci;

use std::io::{self, Read};
use std::path::Path;

use oci_spec::image::ImageConfiguration;

use files::{Files, Section};

use crate::registry::{Digest, Limits, RegistryError};

/// An image in local files.
#[derive(Debug)]
pub(crate) struct Archive {
    pub(crate) digest: Digest,
    /// The names that it has there, complete.
    pub(crate) names: Vec<String>,
    pub(crate) config: ImageConfiguration,
    pub(crate) diff_ids: Vec<Digest>,
    pub(crate) layers: Vec<LayerFile>,
}

/// A layer in a local file.
#[derive(Debug)]
pub(crate) struct LayerFile {
    /// Of the bytes as they lie there; docker archives do not tell.
    pub(crate) digest: Option<Digest>,
    pub(crate) size: u64,
    section: Section,
}

impl LayerFile {
    /// The bytes.
    pub(crate) fn open(&self) -> io::Result<impl Read + Send + use<>> {
        self.section.open()
    }
}

/// Why a file or folder is not an image.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ImportError {
    #[error("{0}")]
    Files(#[from] io::Error),
    #[error("{0}")]
    Document(#[from] RegistryError),
    #[error(
        "it is neither an OCI layout (no index.json) nor a docker archive (no manifest.json); a compressed archive has to be decompressed first"
    )]
    Neither,
    #[error("it holds {0} images: unpack the one that is wanted, or save it alone")]
    Several(usize),
    #[error("it has no {0}")]
    Missing(String),
    #[error("{what} is altered: expected {expected}, got {found}")]
    Altered {
        what: String,
        expected: Digest,
        found: Digest,
    },
}

impl Archive {
    /// Finds out what is at `path`.
    pub(crate) fn open(path: &Path, limits: &Limits) -> Result<Self, ImportError> {
        let files = Files::open(path)?;
        // docker writes both since version 25; then the OCI layout says more.
        if files.has("index.json") {
            oci::open(&files, limits)
        } else if files.has("manifest.json") {
            docker::open(&files, limits)
        } else {
            Err(ImportError::Neither)
        }
    }
}
