//! From a reference or a file to a published image.

use std::cell::Cell;
use std::convert::Infallible;
use std::path::Path;
use std::sync::Arc;
use std::time::SystemTime;

use futures::stream::{self, StreamExt, TryStreamExt};
use oci_spec::image::ImageConfiguration;
use tokio::sync::mpsc;

use super::error::{ImageError, LayerError};
use super::flight::{Reporter, Stage};
use super::ingest::{self, ChannelReader, Expected};
use super::record::{Image, ImageConfig};
use super::{Inner, blocking};
use crate::access::LayerAccess;
use crate::import::{Archive, LayerFile};
use crate::layer::LayerIndex;
use crate::registry::{Blob, BlobStream, Credentials, Digest, ImageReference, Pull};
use crate::store::Session;

/// What an image consists of, wherever its layers come from.
struct Plan {
    name: String,
    digest: Digest,
    names: Vec<String>,
    config: ImageConfiguration,
    diff_ids: Vec<Digest>,
    /// Where each layer is.
    layers: Vec<LayerOrigin>,
}

#[derive(Clone)]
enum LayerOrigin {
    Registry(Arc<Pull>, Blob),
    File(Arc<LayerFile>),
}

impl LayerOrigin {
    fn size(&self) -> u64 {
        match self {
            Self::Registry(_, blob) => blob.size,
            Self::File(file) => file.size,
        }
    }
}

/// Pulls `reference`.
pub(crate) async fn pull(
    inner: &Arc<Inner>,
    reference: &ImageReference,
    credentials: Option<Credentials>,
    progress: &Reporter,
) -> Result<Image, ImageError> {
    let pull = {
        let (inner, reference) = (Arc::clone(inner), reference.clone());
        blocking(move || Ok(inner.registry.pull(&reference, credentials)?)).await?
    };
    let pull = Arc::new(pull);
    let resolved = pull.resolve().await?;
    let layers = resolved
        .manifest
        .layers
        .iter()
        .map(|blob| LayerOrigin::Registry(Arc::clone(&pull), *blob))
        .collect();
    let name = reference.to_string();
    let plan = Plan {
        names: vec![name.clone()],
        name,
        digest: resolved.digest,
        config: resolved.config,
        diff_ids: resolved.diff_ids,
        layers,
    };
    carry_out(inner, plan, progress).await
}

/// Imports the image at `path`.
pub(crate) async fn import(
    inner: &Arc<Inner>,
    path: &Path,
    name: Option<ImageReference>,
    progress: &Reporter,
) -> Result<Image, ImageError> {
    let (path, limits) = (path.to_path_buf(), inner.registry.config().limits.clone());
    let archive = blocking(move || open_archive(&path, &limits)).await?;
    let names: Vec<_> = name.map(|name| vec![name.to_string()]).unwrap_or(archive.names);
    let name = names.first().cloned().unwrap_or_else(|| archive.digest.to_string());
    let layers = archive
        .layers
        .into_iter()
        .map(|file| LayerOrigin::File(Arc::new(file)))
        .collect();
    let plan = Plan {
        names,
        name,
        digest: archive.digest,
        config: archive.config,
        diff_ids: archive.diff_ids,
        layers,
    };
    carry_out(inner, plan, progress).await
}

fn open_archive(path: &Path, limits: &crate::registry::Limits) -> Result<Archive, ImageError> {
    Archive::open(path, limits).map_err(|error| ImageError::Import {
        path: path.to_path_buf(),
        reason: error.to_string(),
    })
}

async fn carry_out(inner: &Arc<Inner>, plan: Plan, progress: &Reporter) -> Result<Image, ImageError> {
    let known = {
        let (inner, digest, names) = (Arc::clone(inner), plan.digest, plan.names.clone());
        blocking(move || Ok(inner.catalog.name(digest, &names)?.map(|image| inner.with_use(image)))).await?
    };
    if let Some(image) = known {
        return Ok(image);
    }
    let session = Arc::new(inner.catalog.chunks().session());
    progress.update(|now| {
        now.stage = Stage::Fetch;
        now.bytes_total = plan.layers.iter().map(LayerOrigin::size).sum();
        now.layers_total = u32::try_from(plan.layers.len()).unwrap_or(u32::MAX);
    });
    let (at_work, mut all_gone) = mpsc::channel(1);
    let layers = match fetch_layers(inner, &plan, &session, progress, at_work).await {
        Ok(layers) => layers,
        Err(error) => {
            // Threads of other layers may still put chunks: a sweep before they end would leave these.
            let None::<Infallible> = all_gone.recv().await;
            return Err(error);
        }
    };
    progress.update(|now| now.stage = Stage::Assemble);
    let inner = Arc::clone(inner);
    blocking(move || publish(&inner, plan, &layers, &session)).await
}

/// Memory that the indexes of one image's layers may take together.
const MAX_INDEXES_LEN: usize = 512 << 20;

/// Fetches all layers that are not here, some at a time, and returns them in their order. Whoever works on it holds `at_work`.
async fn fetch_layers(
    inner: &Arc<Inner>,
    plan: &Plan,
    session: &Arc<Session>,
    progress: &Reporter,
    at_work: mpsc::Sender<Infallible>,
) -> Result<Vec<LayerIndex>, ImageError> {
    let jobs: Vec<_> = plan
        .layers
        .iter()
        .zip(&plan.diff_ids)
        .map(|(origin, diff_id)| Job {
            inner: Arc::clone(inner),
            session: Arc::clone(session),
            progress: progress.clone(),
            image: plan.name.clone(),
            origin: origin.clone(),
            diff_id: *diff_id,
            _at_work: at_work.clone(),
        })
        .collect();
    let parallel = inner.registry.config().parallel_layers.max(1);
    let mut fetched = stream::iter(jobs).map(Job::run).buffered(parallel);
    let (mut layers, mut memory) = (Vec::new(), 0);
    while let Some(layer) = fetched.try_next().await? {
        memory += layer.memory_len();
        if memory > MAX_INDEXES_LEN {
            return Err(ImageError::Assemble {
                image: plan.name.clone(),
                reason: format!(
                    "the paths and attributes of their files take more than {MAX_INDEXES_LEN} bytes, which is the limit"
                ),
            });
        }
        layers.push(layer);
    }
    Ok(layers)
}

/// A layer's index, and how its chunks can be had again.
type Ingested = (LayerIndex, LayerAccess);

/// One layer.
#[derive(Clone)]
struct Job {
    inner: Arc<Inner>,
    session: Arc<Session>,
    progress: Reporter,
    image: String,
    origin: LayerOrigin,
    diff_id: Digest,
    _at_work: mpsc::Sender<Infallible>,
}

impl Job {
    async fn run(self) -> Result<LayerIndex, ImageError> {
        let known = {
            let job = self.clone();
            blocking(move || job.inner.catalog.layer(job.diff_id, &job.session)).await?
        };
        let layer = match known {
            Some(layer) => {
                self.progress.update(|now| now.bytes_done += self.origin.size());
                layer
            }
            None => self.fetch().await?,
        };
        self.progress.update(|now| now.layers_done += 1);
        Ok(layer)
    }

    async fn fetch(&self) -> Result<LayerIndex, ImageError> {
        let (layer, access) = match &self.origin {
            LayerOrigin::File(file) => {
                let (job, file) = (self.clone(), Arc::clone(file));
                let expected = Expected {
                    blob: file.digest.map(|digest| (digest, file.size)),
                    diff_id: self.diff_id,
                };
                blocking(move || {
                    let reader = file
                        .open()
                        .map_err(|error| job.wrong(LayerError::Tar(error.to_string())))?;
                    job.ingest(reader, expected)
                })
                .await?
            }
            LayerOrigin::Registry(pull, blob) => self.fetch_from_registry(pull, *blob).await?,
        };
        let job = self.clone();
        blocking(move || {
            job.session.commit()?;
            job.inner.catalog.add_layer(&layer, &access)?;
            Ok(layer)
        })
        .await
    }

    /// Asks one source after the other: what a mirror cannot serve, or serves wrongly, the registry may.
    async fn fetch_from_registry(&self, pull: &Pull, blob: Blob) -> Result<Ingested, ImageError> {
        let mut source = 0;
        loop {
            let Some(stream) = pull.blob(blob, source) else {
                return Err(ImageError::Worker("there is no source".to_owned()));
            };
            source += 1;
            match self.fetch_from_source(stream, blob).await {
                Err(ImageError::Layer { source: error, .. })
                    if source < pull.sources() && !matches!(*error, LayerError::Store(_)) =>
                {
                    tracing::warn!(%error, image = self.image, layer = %blob.digest, "trying the next source for a layer");
                }
                result => return result,
            }
        }
    }

    async fn fetch_from_source(&self, mut stream: BlobStream, blob: Blob) -> Result<Ingested, ImageError> {
        let (sender, pieces) = mpsc::channel(16);
        let (job, expected) = (
            self.clone(),
            Expected {
                blob: Some((blob.digest, blob.size)),
                diff_id: self.diff_id,
            },
        );
        let ingest = blocking(move || job.ingest(ChannelReader::new(pieces), expected));
        let feed = async move {
            while let Some(piece) = stream.next().await? {
                if sender.send(Ok(piece)).await.is_err() {
                    // The reader gave up; its own error says why.
                    break;
                }
            }
            Ok(())
        };
        let (fed, ingested) = tokio::join!(feed, ingest);
        match fed {
            Err(error) => Err(self.wrong(LayerError::Registry(error))),
            Ok(()) => ingested,
        }
    }

    fn ingest(&self, reader: impl std::io::Read + Send, expected: Expected) -> Result<Ingested, ImageError> {
        let mut sink = self.session.sink()?;
        let counted = Cell::new(0);
        let advanced = |bytes| {
            counted.set(counted.get() + bytes);
            self.progress.update(|now| now.bytes_done += bytes);
        };
        ingest::layer(reader, self.origin.size(), expected, &mut sink, &advanced).map_err(|error| {
            // The next source begins anew.
            self.progress.update(|now| now.bytes_done -= counted.get());
            self.wrong(error)
        })
    }

    fn wrong(&self, source: LayerError) -> ImageError {
        let layer = match &self.origin {
            LayerOrigin::Registry(_, blob) => blob.digest,
            LayerOrigin::File(file) => file.digest.unwrap_or(self.diff_id),
        };
        ImageError::Layer {
            image: self.image.clone(),
            layer,
            source: Box::new(source),
        }
    }
}

fn publish(inner: &Arc<Inner>, plan: Plan, layers: &[LayerIndex], session: &Session) -> Result<Image, ImageError> {
    let device = ingest::assemble(layers, &plan.name)?;
    let mut sink = session.sink()?;
    device
        .store_metadata(&mut sink)
        .map_err(|error| ingest::sink_error(&error))?;
    session.commit()?;
    let image = Image {
        digest: plan.digest,
        references: Vec::new(),
        config: ImageConfig::from(&plan.config),
        layers: plan.diff_ids,
        compressed_bytes: plan.layers.iter().map(LayerOrigin::size).sum(),
        device_bytes: device.size(),
        stored_bytes: 0,
        created: plan.config.created().clone(),
        pulled_at: SystemTime::now(),
        in_use: false,
    };
    inner
        .catalog
        .publish(image, &device, layers, &plan.names)
        .map(|image| inner.with_use(image))
}
