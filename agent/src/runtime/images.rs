//! [`Images`] over the image store.

use std::{fmt, path::PathBuf};

use flint_api::{host, vmm::ChunkPlace};
use flint_snapshots::{
    chunk::ChunkId,
    images::{Delivered, ErrorKind, Image, ImageError as StoreFailure, ImageStore, PullPolicy, PullRequest, Work},
    registry::Credentials,
};
use tokio::sync::mpsc;
use tonic::async_trait;

use super::store;
use crate::{
    backend::{ImageConfig, ImageError, ImageInfo, Images, PullOrder},
    chain,
    logs::parse_rfc3339,
    pods::timestamp,
    sandbox::{ChunkFile, ChunkSource},
};

/// The images of this host, in the store.
#[derive(Clone)]
pub struct StoreImages(ImageStore);

impl StoreImages {
    /// Over an open store.
    pub fn new(store: ImageStore) -> Self {
        Self(store)
    }
}

impl fmt::Debug for StoreImages {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("StoreImages").finish_non_exhaustive()
    }
}

#[async_trait]
impl ChunkSource for StoreImages {
    async fn chunk(&self, image: &str, id: ChunkId) -> Result<ChunkFile, String> {
        let digest = image
            .parse()
            .map_err(|error| format!("image {image}: {}", chain(&error)))?;
        match self.0.demand(digest, id).await.map_err(|error| chain(&error))? {
            Delivered::Stored(found) => Ok(ChunkFile {
                file: found.file,
                place: ChunkPlace {
                    pack: found.location.pack.0,
                    offset: found.location.offset,
                    stored_length: found.location.stored_len,
                    length: found.location.raw_len,
                },
            }),
            Delivered::Bytes(bytes) => {
                let file = ChunkFile::of_bytes(&bytes);
                file.map_err(|error| format!("no room for the chunk on the disk, and none in memory: {error}"))
            }
        }
    }
}

#[async_trait]
impl Images for StoreImages {
    async fn pull(
        &self,
        order: PullOrder,
        progress: mpsc::Sender<host::PullProgress>,
    ) -> Result<ImageInfo, ImageError> {
        let work = self.0.pull(PullRequest {
            reference: order.reference,
            credentials: order.credentials.map(|given| Credentials {
                username: given.username,
                password: given.password,
            }),
            policy: if order.if_not_present {
                PullPolicy::IfNotPresent
            } else {
                PullPolicy::Always
            },
        });
        finish(work.map_err(|error| failure(&error))?, progress).await
    }

    async fn import(
        &self,
        path: PathBuf,
        reference: Option<String>,
        progress: mpsc::Sender<host::PullProgress>,
    ) -> Result<ImageInfo, ImageError> {
        let work = self.0.import(path, reference.as_deref());
        finish(work.map_err(|error| failure(&error))?, progress).await
    }

    async fn get(&self, name: &str) -> Result<Option<ImageInfo>, ImageError> {
        let image = self.0.get(name).await.map_err(|error| failure(&error))?;
        Ok(image.map(|image| info(&image)))
    }

    async fn list(&self) -> Result<Vec<host::Image>, ImageError> {
        let images = self.0.list().await.map_err(|error| failure(&error))?;
        Ok(images.iter().map(|image| info(image).image).collect())
    }

    async fn device_name(&self, digest: &str) -> Result<String, ImageError> {
        let parsed = digest.parse();
        let parsed = parsed.map_err(|error| ImageError::Invalid(format!("image {digest}: {}", chain(&error))))?;
        self.0.device_name(parsed).await.map_err(|error| failure(&error))
    }

    async fn remove(&self, name: &str) -> Result<u64, ImageError> {
        self.0.remove(name).await.map_err(|error| failure(&error))
    }

    async fn usage(&self) -> Result<host::StoreUsage, ImageError> {
        let usage = self.0.usage().await.map_err(|error| failure(&error))?;
        Ok(store::usage(&usage))
    }

    async fn verify(
        &self,
        repair: bool,
        progress: mpsc::Sender<host::VerifyProgress>,
    ) -> Result<host::VerifyProgress, ImageError> {
        let verified = store::verify(&self.0, repair, progress).await;
        verified.map_err(|error| failure(&error))
    }
}

/// Tells how far the work is until it is done. A slow receiver misses reports and holds nothing up.
async fn finish(mut work: Work, reports: mpsc::Sender<host::PullProgress>) -> Result<ImageInfo, ImageError> {
    while let Some(progress) = work.progress().await {
        let report = host::PullProgress {
            stage: progress.stage.name().into(),
            bytes_done: progress.bytes_done,
            bytes_total: progress.bytes_total,
            layers_done: progress.layers_done,
            layers_total: progress.layers_total,
            image: None,
        };
        // Full, or nobody listens.
        let _ = reports.try_send(report);
    }
    work.finish()
        .await
        .map(|image| info(&image))
        .map_err(|error| failure(&error))
}

fn info(image: &Image) -> ImageInfo {
    let created = image.created.as_deref().and_then(parse_rfc3339);
    ImageInfo {
        image: host::Image {
            digest: image.digest.to_string(),
            references: image.references.clone(),
            compressed_bytes: image.compressed_bytes,
            device_bytes: image.device_bytes,
            stored_bytes: image.stored_bytes,
            created_at: created.map(timestamp),
            pulled_at: Some(timestamp(image.pulled_at)),
            in_use: image.in_use,
        },
        config: ImageConfig {
            entrypoint: image.config.entrypoint.clone(),
            cmd: image.config.cmd.clone(),
            env: image.config.env.clone(),
            working_dir: image.config.working_dir.clone(),
            user: image.config.user.clone(),
            stop_signal: image.config.stop_signal.clone(),
        },
    }
}

/// The store's error, by what the caller can do about it.
fn failure(error: &StoreFailure) -> ImageError {
    let message = chain(error);
    match error.kind() {
        ErrorKind::Invalid => ImageError::Invalid(message),
        ErrorKind::NotFound => ImageError::NotFound(message),
        ErrorKind::Denied => ImageError::Denied(message),
        ErrorKind::Unavailable | ErrorKind::Deadline => ImageError::Unavailable(message),
        ErrorKind::BadImage => ImageError::Corrupt(message),
        ErrorKind::Unsupported => ImageError::Unsupported(message),
        ErrorKind::DiskFull => ImageError::NoSpace(message),
        ErrorKind::InUse => ImageError::InUse(message),
        ErrorKind::Internal => ImageError::Internal(message),
    }
}
