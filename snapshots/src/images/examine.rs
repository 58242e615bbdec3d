//! The store as an operator sees it: what is in it, whether all of it is whole, and making it whole again.

use tokio::sync::mpsc;

use super::demand::DemandError;
use super::{ImageError, ImageStore, blocking};
use crate::chunk::ChunkId;
use crate::registry::Digest;
use crate::store::{Examined, StoreError, Usage};

/// What images and snapshots take.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct StoreUsage {
    /// The chunks, and the files that hold them.
    pub chunks: Usage,
    /// Images.
    pub images: u64,
    /// What the images' chunks would take if none were shared.
    pub image_bytes: u64,
}

/// What is found while the store is read.
#[derive(Debug)]
pub enum Finding {
    /// So far it is.
    Progress(Examined),
    /// A chunk is not what its name says.
    Damaged(DamagedChunk),
}

/// A chunk that cannot be used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DamagedChunk {
    /// Its name.
    pub id: ChunkId,
    /// What is wrong with it.
    pub reason: String,
    /// The images that have it. None: it is a machine's, or nothing needs it.
    pub images: Vec<Digest>,
}

/// Why a chunk stays damaged.
#[derive(Debug, thiserror::Error)]
pub enum MendError {
    /// Nobody to ask.
    #[error("no image of this host has it: pull the snapshot or template that has it again")]
    NoImage,
    /// Nobody had it.
    #[error(transparent)]
    Demand(#[from] DemandError),
}

/// What is wrong, without the chunk's name and what to do, which are said elsewhere.
fn reason(error: StoreError) -> String {
    match error {
        StoreError::Damaged { reason, .. } => reason,
        error => super::error::chain(&error),
    }
}

/// Chunks between two words of progress.
const OFTEN: u64 = 256;

impl ImageStore {
    /// What the store holds.
    ///
    /// # Errors
    /// When the index or the file system cannot be asked.
    pub async fn usage(&self) -> Result<StoreUsage, ImageError> {
        let inner = self.inner.clone();
        blocking(move || {
            let images = inner.catalog.list()?;
            Ok(StoreUsage {
                chunks: inner.chunks().usage()?,
                images: images.len() as u64,
                image_bytes: images.iter().map(|image| image.stored_bytes).sum(),
            })
        })
        .await
    }

    /// Reads every chunk and tells `findings` of those that are damaged, until nobody listens any more.
    ///
    /// # Errors
    /// When the index cannot be read.
    pub async fn examine(&self, findings: mpsc::Sender<Finding>) -> Result<(), ImageError> {
        let inner = self.inner.clone();
        blocking(move || {
            let mut failed = None;
            inner.chunks().examine(|done, bad| {
                let finding = match bad {
                    Some((id, error)) => match inner.catalog.images_with(id) {
                        Ok(images) => Finding::Damaged(DamagedChunk {
                            id,
                            reason: reason(error),
                            images,
                        }),
                        Err(error) => {
                            failed = Some(error);
                            return false;
                        }
                    },
                    None if done.chunks % OFTEN == 0 || done.chunks == done.chunks_total => Finding::Progress(done),
                    None => return true,
                };
                findings.blocking_send(finding).is_ok()
            })?;
            failed.map_or(Ok(()), Err)
        })
        .await
    }

    /// Brings a good copy of a damaged chunk from where an image that has it came from.
    ///
    /// # Errors
    /// [`MendError`]: of the last image that was tried.
    pub async fn mend(&self, chunk: &DamagedChunk) -> Result<(), MendError> {
        let mut outcome = Err(MendError::NoImage);
        for image in &chunk.images {
            outcome = self.demand(*image, chunk.id).await.map(drop).map_err(Into::into);
            if outcome.is_ok() {
                break;
            }
        }
        outcome
    }
}
