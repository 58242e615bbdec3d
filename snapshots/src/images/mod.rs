//! The images of this host: pulled or imported, kept, handed to VMMs, removed.
//!
//! ```text
//!   registry ─┐                 decompress, hash          assemble            publish: one transaction
//!   mirror   ─┼─> layer bytes ─> layer::ingest ─> chunks ─> image::assemble ─> table file ─> image + references
//!   archive  ─┘   in parallel    nothing is unpacked to disk                                  │
//!                                                                                             ▼
//!                                                          device(): table + packs, as open files, for a VMM
//! ```
//!
//! A layer that the store has (by diff id) is not fetched again. Work on one name is done once, however many wait for it.
//! Until the last step nothing of an image is visible; what work that failed leaves behind is cache: complete layers serve
//! the next attempt, and the next sweep (at a removal, at opening, when the disk is full) takes whatever is left.

mod accesses;
mod catalog;
mod demand;
mod error;
mod examine;
mod fetch;
mod flight;
pub(crate) mod ingest;
mod keep;
mod ranges;
mod record;

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

pub use demand::{DEFAULT_DEADLINE, Delivered, DemandError, DemandOptions};
pub use error::{ErrorKind, ImageError, LayerError};
pub(crate) use error::{registry_kind, store_kind};
pub use examine::{DamagedChunk, Finding, MendError, StoreUsage};
pub use flight::{Progress, Stage, Work};
pub use keep::InUse;
pub use record::{Image, ImageConfig};

use catalog::Catalog;
use demand::Demand;
use flight::{Flights, Key};
use keep::Uses;
use ranges::RegistryRanges;
use tokio::runtime::Handle;

use crate::access::{LayerAccess, LayerSource};
use crate::registry::{Blob, Credentials, Digest, ImageReference, Registry, RegistryConfig};
use crate::store::{ChunkStore, StoreOptions};

/// How the image store works.
#[derive(Debug, Clone, Default)]
pub struct ImageStoreOptions {
    /// How chunks are kept.
    pub store: StoreOptions,
    /// How registries are reached.
    pub registry: RegistryConfig,
    /// How chunks that are missing are brought.
    pub demand: DemandOptions,
}

/// When to ask the registry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum PullPolicy {
    /// Always: a tag may have moved. Layers that are here are not fetched again.
    #[default]
    Always,
    /// Only when the reference is not known here.
    IfNotPresent,
}

/// An image to be pulled.
#[derive(Debug, Clone)]
pub struct PullRequest {
    /// Which, as people write it: "busybox", "registry.example:5000/app:1", "name@sha256:...".
    pub reference: String,
    /// For the registry; absent: docker's configuration is looked at.
    pub credentials: Option<Credentials>,
    /// When to ask the registry.
    pub policy: PullPolicy,
}

/// What a VMM needs to serve an image as a block device. The files stay readable whatever becomes of the image.
#[derive(Debug)]
pub struct DeviceFiles {
    /// The device table: see [`device`](crate::device).
    pub table: File,
    /// The packs, in the order in which the table names them.
    pub packs: Vec<File>,
    /// Keeps the image from being removed, as long as it lives.
    pub guard: InUse,
}

/// The images of a host. Clones are the same store.
#[derive(Clone)]
pub struct ImageStore {
    inner: Arc<Inner>,
}

pub(crate) struct Inner {
    catalog: Catalog,
    registry: Registry,
    flights: Flights,
    uses: Mutex<Uses>,
    demand: Demand,
}

impl ImageStore {
    /// Opens the store in `dir`, making it if it is not there, and mends what a crash left.
    ///
    /// # Errors
    /// When another process owns it, when files cannot be read or written, when the options make no sense.
    pub async fn open(dir: &Path, options: ImageStoreOptions) -> Result<Self, ImageError> {
        let dir = dir.to_path_buf();
        blocking(move || {
            let registry = Registry::new(options.registry)?;
            let catalog = Catalog::open(ChunkStore::open(&dir, options.store)?)?;
            let inner = Inner {
                catalog,
                registry,
                flights: Flights::default(),
                uses: Mutex::default(),
                demand: Demand::new(options.demand),
            };
            Ok(Self { inner: Arc::new(inner) })
        })
        .await
    }

    /// Pulls an image, or joins those who pull it already with the same credentials. Must be called within a tokio runtime.
    ///
    /// # Errors
    /// When the reference is none; everything else is told by [`Work::finish`].
    pub fn pull(&self, request: PullRequest) -> Result<Work, ImageError> {
        let reference: ImageReference = request.reference.parse()?;
        let key = Key::Pull(reference.to_string(), request.credentials.clone(), request.policy);
        let inner = Arc::clone(&self.inner);
        Ok(self.inner.flights.join(key, move |progress| async move {
            if request.policy == PullPolicy::IfNotPresent
                && let Some(image) = inner.get(reference.to_string()).await?
            {
                return Ok(image);
            }
            let deadline = inner.registry.config().timeouts.deadline;
            let work = fetch::pull(&inner, &reference, request.credentials.clone(), &progress);
            let result = match tokio::time::timeout(deadline, work).await {
                Ok(result) => {
                    if result.is_ok() {
                        inner.demand.remember(&reference, request.credentials.as_ref());
                    }
                    result
                }
                Err(_) => Err(ImageError::Deadline {
                    image: reference.to_string(),
                    after: deadline,
                }),
            };
            inner.after_failure(result).await
        }))
    }

    /// Takes an image from an OCI layout folder, an oci-archive or a docker-archive, under `name`, or else under the name it
    /// has there. Must be called within a tokio runtime.
    ///
    /// # Errors
    /// When the name is no reference; everything else is told by [`Work::finish`].
    pub fn import(&self, path: PathBuf, name: Option<&str>) -> Result<Work, ImageError> {
        let name = name.map(str::parse::<ImageReference>).transpose()?;
        let key = Key::Import(path.clone(), name.as_ref().map(ToString::to_string));
        let inner = Arc::clone(&self.inner);
        Ok(self.inner.flights.join(key, move |progress| async move {
            let result = fetch::import(&inner, &path, name, &progress).await;
            inner.after_failure(result).await
        }))
    }

    /// The image of that reference or digest, if it is here.
    ///
    /// # Errors
    /// When `name` is neither, or the index cannot be read.
    pub async fn get(&self, name: &str) -> Result<Option<Image>, ImageError> {
        self.inner.get(name.to_owned()).await
    }

    /// All images.
    ///
    /// # Errors
    /// When the index cannot be read.
    pub async fn list(&self) -> Result<Vec<Image>, ImageError> {
        let inner = Arc::clone(&self.inner);
        blocking(move || {
            inner
                .catalog
                .list()
                .map(|images| images.into_iter().map(|image| inner.with_use(image)).collect())
        })
        .await
    }

    /// Removes an image with all its references, and gives back what only it needed. Returns how many bytes that were.
    ///
    /// # Errors
    /// When there is no such image, or somebody uses it.
    pub async fn remove(&self, name: &str) -> Result<u64, ImageError> {
        let (inner, name) = (Arc::clone(&self.inner), name.to_owned());
        blocking(move || {
            let image = inner
                .catalog
                .get(&name)?
                .ok_or_else(|| ImageError::NotHere { image: name.clone() })?;
            inner
                .uses()
                .end(image.digest, || inner.catalog.forget(image.digest))
                .map_err(|error| error.unwrap_or(ImageError::InUse { image: name }))?;
            inner.sweep()
        })
        .await
    }

    /// The files through which a VMM serves the image as a block device.
    ///
    /// # Errors
    /// When there is no such image, or its files cannot be opened.
    pub async fn device(&self, digest: Digest) -> Result<DeviceFiles, ImageError> {
        let inner = Arc::clone(&self.inner);
        blocking(move || {
            // In this order: an image that is held is not removed.
            let guard = inner.hold(digest)?;
            let (table, packs) = inner.catalog.device(digest)?;
            Ok(DeviceFiles { table, packs, guard })
        })
        .await
    }

    /// Names the bytes of the image's device: two hosts where it has one name show a guest the same.
    ///
    /// # Errors
    /// When there is no such image, or its table cannot be read.
    pub async fn device_name(&self, digest: Digest) -> Result<String, ImageError> {
        let inner = Arc::clone(&self.inner);
        blocking(move || {
            let _guard = inner.hold(digest)?;
            inner.catalog.device_name(digest)
        })
        .await
    }

    /// Keeps an image from being removed: for a sandbox that was found running and has its files open already.
    ///
    /// # Errors
    /// When there is no such image.
    pub async fn hold(&self, digest: Digest) -> Result<InUse, ImageError> {
        let inner = Arc::clone(&self.inner);
        blocking(move || inner.hold(digest)).await
    }

    /// How the layer of that diff id can be read in part, if it was pulled or imported here.
    ///
    /// # Errors
    /// When the file that tells cannot be read.
    pub async fn layer_access(&self, diff_id: Digest) -> Result<Option<LayerAccess>, ImageError> {
        let inner = Arc::clone(&self.inner);
        blocking(move || inner.catalog.layer_access(diff_id)).await
    }

    /// A source of the chunks of the layer that `access` tells of, out of the registries that have the image `reference`.
    /// Reads of it block, and are done on the calling runtime: call it from another thread.
    ///
    /// # Errors
    /// When the registry cannot serve the image, and when the image has no such layer.
    pub async fn layer_source(
        &self,
        reference: &str,
        credentials: Option<Credentials>,
        access: Arc<LayerAccess>,
    ) -> Result<LayerSource, ImageError> {
        self.inner.layer_source(reference.parse()?, credentials, access).await
    }

    /// The chunk store below.
    pub fn chunks(&self) -> &ChunkStore {
        self.inner.chunks()
    }

    pub(crate) fn inner(&self) -> &Arc<Inner> {
        &self.inner
    }
}

impl Inner {
    pub(crate) fn chunks(&self) -> &ChunkStore {
        self.catalog.chunks()
    }

    pub(crate) fn registry(&self) -> &Registry {
        &self.registry
    }

    /// A device of chunks that are no image's: its table, and the packs that it names.
    pub(crate) fn open_device(
        &self,
        image: &crate::image::Image,
        what: &str,
    ) -> Result<(crate::device::Table, Vec<std::fs::File>), ImageError> {
        self.catalog.open_device(image, what)
    }

    /// Gives back what neither an image nor a machine needs; returns how many bytes.
    pub(crate) fn sweep(&self) -> Result<u64, ImageError> {
        self.catalog.sweep(self.flights.any())
    }

    pub(crate) async fn layer_source(
        self: &Arc<Self>,
        name: ImageReference,
        credentials: Option<Credentials>,
        access: Arc<LayerAccess>,
    ) -> Result<LayerSource, ImageError> {
        let (inner, image) = (Arc::clone(self), name.to_string());
        let pull = Arc::new(blocking(move || Ok(inner.registry.pull(&name, credentials)?)).await?);
        let layers = pull.resolve().await?.manifest.layers;
        let is_it = |blob: &&Blob| blob.digest == access.blob && blob.size == access.blob_len;
        let blob = layers.iter().find(is_it).ok_or_else(|| ImageError::NoSuchLayer {
            image,
            layer: access.blob,
        })?;
        let blobs = RegistryRanges::all(&pull, *blob, &Handle::current());
        Ok(LayerSource::new(access, blobs))
    }

    async fn get(self: &Arc<Self>, name: String) -> Result<Option<Image>, ImageError> {
        let inner = Arc::clone(self);
        blocking(move || Ok(inner.catalog.get(&name)?.map(|image| inner.with_use(image)))).await
    }

    /// Makes room again after work that ended because there was none.
    async fn after_failure(self: &Arc<Self>, result: Result<Image, ImageError>) -> Result<Image, ImageError> {
        if result.as_ref().is_err_and(|error| error.kind() == ErrorKind::DiskFull) {
            let inner = Arc::clone(self);
            // This work itself is still counted as being under way.
            let swept = blocking(move || inner.catalog.sweep(inner.flights.others())).await;
            if let Err(error) = swept {
                tracing::warn!(%error, "making room after a pull that filled the disk");
            }
        }
        result
    }

    fn with_use(self: &Arc<Self>, image: Image) -> Image {
        Image {
            in_use: self.uses().contains(image.digest),
            ..image
        }
    }
}

/// Runs work that blocks where it may.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, ImageError> + Send + 'static,
) -> Result<T, ImageError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) => Err(ImageError::Worker(error.to_string())),
    }
}
