//! Who uses an image: it cannot be removed meanwhile.

use std::collections::HashMap;
use std::sync::{Arc, MutexGuard, PoisonError, Weak};

use super::{ImageError, Inner};
use crate::registry::Digest;

/// How many hold each image.
#[derive(Debug, Default)]
pub(crate) struct Uses(HashMap<Digest, usize>);

impl Uses {
    pub(crate) fn contains(&self, digest: Digest) -> bool {
        self.0.contains_key(&digest)
    }

    /// Runs `end` unless somebody holds the image; nobody can begin to meanwhile. `None` as error: somebody does.
    pub(crate) fn end(
        &mut self,
        digest: Digest,
        end: impl FnOnce() -> Result<(), ImageError>,
    ) -> Result<(), Option<ImageError>> {
        if self.contains(digest) {
            Err(None)
        } else {
            end().map_err(Some)
        }
    }
}

/// Holds an image; dropping it lets go.
#[derive(Debug)]
pub struct InUse {
    digest: Digest,
    uses: Weak<Inner>,
}

impl std::fmt::Debug for Inner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ImageStore").finish_non_exhaustive()
    }
}

impl InUse {
    /// Which image.
    pub fn digest(&self) -> Digest {
        self.digest
    }
}

impl Drop for InUse {
    fn drop(&mut self) {
        let Some(inner) = self.uses.upgrade() else { return };
        let mut uses = inner.uses();
        if let Some(count) = uses.0.get_mut(&self.digest) {
            *count -= 1;
            if *count == 0 {
                uses.0.remove(&self.digest);
            }
        }
    }
}

impl Inner {
    pub(crate) fn uses(&self) -> MutexGuard<'_, Uses> {
        // Counts are changed by single statements: a panic leaves them right.
        self.uses.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn hold(self: &Arc<Self>, digest: Digest) -> Result<InUse, ImageError> {
        let mut uses = self.uses();
        if !self.catalog.has(digest)? {
            return Err(ImageError::NotHere {
                image: digest.to_string(),
            });
        }
        *uses.0.entry(digest).or_default() += 1;
        Ok(InUse {
            digest,
            uses: Arc::downgrade(self),
        })
    }
}
