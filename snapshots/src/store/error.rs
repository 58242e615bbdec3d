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
    #[error("no room in the image store {}: {free} bytes free, {needed} wanted; remove images or enlarge the disk", dir.display())]
    DiskFull {
        /// The store's folder.
        dir: PathBuf,
        /// What the file system has left.
        free: u64,
        /// What was to be written, with what must stay free.
        needed: u64,
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

impl StoreError {
    /// Names the action and file of an I/O error; a full disk becomes [`StoreError::DiskFull`].
    pub(crate) fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_path_buf();
        move |source| match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Self::full(&path, 0),
            _ => Self::Io { action, path, source },
        }
    }

    /// The disk below `dir` has no room for `needed` bytes.
    pub(crate) fn full(dir: &Path, needed: u64) -> Self {
        Self::DiskFull {
            dir: dir.to_path_buf(),
            free: super::space::free(dir).unwrap_or(0),
            needed,
        }
    }

    /// Whether more room on the disk would help.
    pub fn is_disk_full(&self) -> bool {
        match self {
            Self::DiskFull { .. } => true,
            Self::Index { source, .. } => {
                matches!(&**source, redb::Error::Io(error) if error.kind() == io::ErrorKind::StorageFull)
            }
            _ => false,
        }
    }
}
