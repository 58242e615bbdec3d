//! How layers that were pulled can be read again in part: a file for each, beside the chunks.
//!
//! They are an aid that a pull does without: what cannot be written is not there, and what is torn or damaged, which its
//! digest tells, is as good as not there. So they are not synced.

use std::collections::HashSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use crate::access::LayerAccess;
use crate::registry::Digest;
use crate::store::StoreError;

/// The folder `accesses` of a store: `<diff id>` each.
pub(super) struct Accesses {
    dir: PathBuf,
    /// Two may write the same layer's at a time.
    next: AtomicU64,
}

impl Accesses {
    pub(super) fn open(store: &Path) -> Result<Self, StoreError> {
        let dir = store.join("accesses");
        fs::create_dir_all(&dir).map_err(StoreError::io("creating", &dir))?;
        let next = AtomicU64::new(0);
        Ok(Self { dir, next })
    }

    fn path(&self, diff_id: Digest) -> PathBuf {
        self.dir.join(diff_id.hex())
    }

    /// Keeps `access`, if that is possible.
    pub(super) fn put(&self, access: &LayerAccess) {
        let path = self.path(access.diff_id);
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let aside = path.with_extension(format!("{number}.new"));
        let written = fs::write(&aside, access.encode()).and_then(|()| fs::rename(&aside, &path));
        if let Err(error) = written {
            tracing::warn!(%error, layer = %access.diff_id, "a layer's index could not be kept; parts of it cannot be fetched again");
            // What there is of it only takes room; opening the store would delete it, too.
            let _ = fs::remove_file(&aside);
        }
    }

    /// How the layer can be read in part, if that is known.
    pub(super) fn get(&self, diff_id: Digest) -> Result<Option<LayerAccess>, StoreError> {
        let path = self.path(diff_id);
        let bytes = match fs::read(&path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(StoreError::io("reading", &path)(error)),
        };
        match LayerAccess::decode(&bytes) {
            Ok(access) if access.diff_id == diff_id => Ok(Some(access)),
            Ok(_) => Ok(None),
            Err(error) => {
                tracing::warn!(%error, layer = %diff_id, "a layer's index is damaged; parts of it cannot be fetched again");
                Ok(None)
            }
        }
    }

    /// Deletes those of other layers than `needed`, named by their diff ids, and what a crash left.
    pub(super) fn retain(&self, needed: &HashSet<String>) -> Result<(), StoreError> {
        let needed: HashSet<_> = needed
            .iter()
            .filter_map(|id| id.parse::<Digest>().ok())
            .map(|id| id.hex())
            .collect();
        for entry in fs::read_dir(&self.dir).map_err(StoreError::io("listing", &self.dir))? {
            let entry = entry.map_err(StoreError::io("listing", &self.dir))?;
            if !entry.file_name().to_str().is_some_and(|name| needed.contains(name)) {
                fs::remove_file(entry.path()).map_err(StoreError::io("deleting", &entry.path()))?;
            }
        }
        Ok(())
    }
}
