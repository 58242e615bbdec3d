//! What can go wrong in the chunk store.

use std::io;
use std::path::{Path, PathBuf};

use crate::chunk::ChunkId;
use crate::device::PackId;

/// Why the chunk store could not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// Another process owns the folder.
    #[error("the image store {} is in use by {owner}: stop it, or give this one a folder of its own", dir.display())]
    Locked {
        /// The store's folder.
        dir: PathBuf,
        /// "process 123", as far as it is known.
        owner: String,
    },
    /// The disk is full, or so nearly that the rest is kept for the index.
    #[error(
        "no room in the image store {}: {free} bytes free{}; remove images that are not needed (flint images rm) or enlarge the disk",
        dir.display(),
        needed.map(|needed| format!(", {needed} needed with the reserve")).unwrap_or_default()
    )]
    DiskFull {
        /// The store's folder, or the one of its folders that could not be written to.
        dir: PathBuf,
        /// What the file system has left.
        free: u64,
        /// What was to be written, with what must stay free; absent where the kernel said that the disk is full.
        needed: Option<u64>,
    },
    /// A file of the store could not be read or written.
    #[error("{action} {}", path.display())]
    Io {
        /// What was being done.
        action: &'static str,
        /// With which file.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The index could not be read or written.
    #[error("{action} in the image store's index")]
    Index {
        /// What was being done.
        action: &'static str,
        /// What the database said.
        #[source]
        source: Box<redb::Error>,
    },
    /// The store does not have this chunk.
    #[error("chunk {0} is not in the image store; pull the image again")]
    Missing(ChunkId),
    /// A chunk's bytes are not what its name says.
    #[error("chunk {id} in pack {} is damaged ({reason}); remove the image and pull it again", pack.0)]
    Damaged {
        /// Which chunk.
        id: ChunkId,
        /// Where it lies.
        pack: PackId,
        /// What is wrong with it.
        reason: String,
    },
    /// Keeping a chunk failed, as told by whoever offered it.
    #[error("keeping chunks in the image store: {0}")]
    Sink(String),
    /// A chunk of impossible length was offered.
    #[error("a chunk of {0} bytes was offered; 1 to {max} are possible", max = crate::chunk::MAX_CHUNK_LEN)]
    Length(usize),
}

/// Whether the file system, or what the user may have of it, is full.
pub(super) fn is_full(kind: io::ErrorKind) -> bool {
    matches!(kind, io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}

impl StoreError {
    /// Names the action and file of an I/O error; a full disk becomes [`StoreError::DiskFull`].
    pub(crate) fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_path_buf();
        move |source| match source.kind() {
            kind if is_full(kind) => Self::full(&path),
            _ => Self::Io { action, path, source },
        }
    }

    /// The disk had no room when `path`, a file of the store or a folder of it, was written to.
    pub(crate) fn full(path: &Path) -> Self {
        let dir = match path.parent() {
            Some(parent) if !path.is_dir() => parent,
            _ => path,
        };
        Self::DiskFull {
            dir: dir.to_path_buf(),
            free: super::space::free(dir).unwrap_or(0),
            needed: None,
        }
    }

    /// Whether more room on the disk would help.
    pub fn is_disk_full(&self) -> bool {
        match self {
            Self::DiskFull { .. } => true,
            Self::Index { source, .. } => {
                matches!(&**source, redb::Error::Io(error) if is_full(error.kind()))
            }
            _ => false,
        }
    }
}
