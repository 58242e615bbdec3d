//! Snapshots to and from other hosts, by way of a registry.
//!
//! ```text
//!   push   files of the snapshot ──cut, packed──> registry: bundles of chunks, and a record with what a pod needs
//!   pull   registry ──record──> checked ──images: by name and digest──> here, with the same devices
//!                   ──bundles: what is missing──> chunks ──laid out──> files without a name ──> the snapshot
//! ```
//!
//! The template of the host's pool goes the same ways ([`TemplateMover`]).
//!
//! A snapshot that was pulled keeps its chunks, so that another version of it is fetched as what differs. They go with it. Where this host can
//! bring memory while a guest runs, they are all that there is of its memory; elsewhere it has a file, too.

mod record;
mod template;

use std::{fs::File, io, sync::Arc};

use flint_api::host;
use flint_snapshots::{
    machines::{Fetched, MachineError, Machines, Transfer, Watcher},
    registry::Credentials,
};
use thiserror::Error;
use tokio::{sync::mpsc, task::spawn_blocking};
use tracing::warn;

use self::record::{TravelImage, TravelRecord, Unusable};
pub use self::template::TemplateMover;
use crate::{
    backend::{ImageError, Images, PullOrder},
    pods::registry_of,
    sandbox::SandboxError,
    saved::{Draft, SavedError, SavedFiles, SavedPods, SavedRecord},
};

/// Names of a snapshot's files on their way.
const FILES: [&str; 3] = ["state", MEMORY, "scratch"];
/// That which need not be one here.
pub(crate) const MEMORY: &str = "memory";

/// Where progress goes. A receiver that is slow or gone holds nothing up.
pub type Progress = mpsc::Sender<host::SnapshotProgress>;

/// A snapshot could not be pushed or pulled.
#[derive(Debug, Error)]
pub enum TravelError {
    /// It could not be read or kept here.
    #[error(transparent)]
    Saved(#[from] SavedError),
    /// The way is blocked.
    #[error(transparent)]
    Machine(Box<MachineError>),
    /// What is there is no saved pod, or a newer Flint's.
    #[error(
        "{reference} cannot be used as a snapshot of a pod: {reason}; name what `flint snapshots push` of a flintd no newer than this has pushed"
    )]
    Unknown {
        /// What was asked for.
        reference: String,
        /// What it is.
        reason: String,
    },
    /// What is there is no template, or a newer Flint's.
    #[error(
        "{reference} cannot be used as a template: {reason}; name what `flint template push` of a flintd no newer than this has pushed"
    )]
    UnknownTemplate {
        /// What was asked for.
        reference: String,
        /// What it is.
        reason: String,
    },
    /// A template could not be given or taken here.
    #[error(transparent)]
    Template(#[from] SandboxError),
    /// Its record is not to be believed.
    #[error("the record of {reference} makes no sense: {reason}; push the snapshot again")]
    Senseless {
        /// What was asked for.
        reference: String,
        /// What is wrong.
        reason: String,
    },
    /// The pod reads an image that cannot be had.
    #[error(
        "image {image} ({digest}), which the saved pod reads, cannot be had: {source}; once it is on this host, pulled or imported, try again"
    )]
    Image {
        /// What the pod calls it.
        image: String,
        /// Which it has to be.
        digest: String,
        /// Why not.
        source: ImageError,
    },
    /// An image is here and makes another device.
    #[error(
        "image {image} ({digest}) makes another block device on this host than the saved pod reads: this flintd lays images out in another way; pull the snapshot with the version of flintd that pushed it"
    )]
    Device {
        /// What the pod calls it.
        image: String,
        /// Which it is.
        digest: String,
    },
    /// A thread died.
    #[error("work on a snapshot was given up: {0}")]
    Worker(String),
}

impl From<MachineError> for TravelError {
    fn from(error: MachineError) -> Self {
        Self::Machine(Box::new(error))
    }
}

/// A snapshot that a registry has now.
#[derive(Debug)]
pub struct Pushed {
    /// Which one.
    pub snapshot: host::Snapshot,
    /// Where, by digest.
    pub reference: String,
    /// Names of the environment variables that went along.
    pub environment: Vec<String>,
}

/// What a pull is of, and what becomes of it.
#[derive(Clone, Debug, Default)]
pub struct SnapshotOrder {
    /// What to pull.
    pub reference: String,
    /// What to call it; empty: as it was called where it was saved.
    pub name: String,
    /// For the registry.
    pub credentials: Option<host::RegistryCredentials>,
}

/// Moves snapshots between this host and registries.
#[derive(Clone)]
pub struct Mover {
    saved: SavedPods,
    images: Arc<dyn Images>,
    machines: Machines,
    /// Whether memory that was pulled stays in the store.
    memory_in_store: bool,
}

impl Mover {
    /// Of this host's snapshots, images and chunks. Chunks of snapshots that are gone go: an earlier flintd was killed before it
    /// could see to it.
    ///
    /// # Errors
    /// When the chunk store cannot be read or written.
    pub async fn new(saved: SavedPods, images: Arc<dyn Images>, machines: Machines) -> Result<Self, MachineError> {
        let known: Vec<_> = saved.list().into_iter().map(|snapshot| snapshot.name).collect();
        for (name, _) in machines.list().await? {
            if !known.contains(&name) {
                machines.remove(&name).await?;
            }
        }
        Ok(Self {
            saved,
            images,
            machines,
            memory_in_store: false,
        })
    }

    /// Whether what is pulled from here on leaves its memory in the chunk store.
    #[must_use]
    pub fn with_memory_in_store(self, memory_in_store: bool) -> Self {
        Self {
            memory_in_store,
            ..self
        }
    }

    /// Pushes a snapshot. It may be removed meanwhile. Must be called within a tokio runtime.
    ///
    /// # Errors
    /// [`TravelError`]; the registry shows nothing of it then.
    pub async fn push(
        &self,
        name: &str,
        reference: &str,
        credentials: Option<host::RegistryCredentials>,
        progress: &Progress,
    ) -> Result<Pushed, TravelError> {
        let (record, files) = self.saved.read(name)?;
        tell(progress, "read");
        let in_store = record.memory_in_store;
        let record = TravelRecord::new(record.clone(), self.images_of(&record).await?);
        let (snapshot, environment) = (record.snapshot(), record.environment());
        let (login, watcher) = (credentials.map(login), watcher("send", progress));
        let digest = if in_store {
            // As it came: all of it is in the store.
            self.machines.push(name, reference, login, &watcher).await?
        } else {
            let files = [files.state, files.memory, files.scratch];
            let files = FILES.map(str::to_owned).into_iter().zip(files).collect();
            let notes = record.into_notes();
            self.machines
                .push_files(files, notes, reference, login, &watcher)
                .await?
        };
        Ok(Pushed {
            snapshot,
            reference: format!("{}@{digest}", without_tag(reference)),
            environment,
        })
    }

    async fn images_of(&self, record: &SavedRecord) -> Result<Vec<TravelImage>, TravelError> {
        let mut images: Vec<TravelImage> = Vec::new();
        for digest in &record.disks {
            if images.iter().any(|image| image.digest == *digest) {
                continue;
            }
            let reference = reference_of(record, digest);
            let device = self.device(&reference, digest).await?;
            images.push(TravelImage {
                digest: digest.clone(),
                reference,
                device,
            });
        }
        Ok(images)
    }

    /// Pulls a snapshot with the images that it needs. Dropped, it leaves nothing that is seen. Must be called within a tokio runtime.
    ///
    /// # Errors
    /// [`TravelError`]; nothing is seen of it then.
    pub async fn pull(&self, order: SnapshotOrder, progress: &Progress) -> Result<host::Snapshot, TravelError> {
        let SnapshotOrder {
            reference,
            name,
            credentials,
        } = order;
        tell(progress, "resolve");
        let found = self.machines.find(&reference, credentials.clone().map(login)).await?;
        let record = TravelRecord::of(found.machine().notes()).map_err(|unusable| match unusable {
            Unusable::Unknown(reason) => TravelError::Unknown {
                reference: reference.clone(),
                reason,
            },
            Unusable::Senseless(reason) => TravelError::Senseless {
                reference: reference.clone(),
                reason,
            },
        })?;
        let snapshot = record.snapshot();
        let name = if name.is_empty() { snapshot.name } else { name };
        let draft = self.saved.begin(&name, &snapshot.pod.unwrap_or_default().name)?;
        draft.needs(record.images().iter().map(|image| image.digest.clone()).collect());
        for image in record.images() {
            let credentials = credentials.clone();
            let credentials = credentials.filter(|_| registry_of(&image.reference) == registry_of(&reference));
            self.bring(image, credentials, progress).await?;
        }
        let fetched = found.fetch(&watcher("fetch", progress)).await?;
        tell(progress, "write");
        let files = draft.files()?;
        let saved = SavedRecord {
            memory_in_store: self.memory_in_store,
            ..record.into_saved()
        };
        let mut handles = handles(&draft, &files)?;
        handles.retain(|(name, _)| name != MEMORY || !saved.memory_in_store);
        let fetched = fetched.lay_out(handles).await?;
        if saved.memory_in_store {
            return self.finish_in_store(fetched, draft, files, saved).await;
        }
        let snapshot = finish(draft, files, saved).await?;
        if let Err(error) = fetched.keep(&snapshot.name).await {
            warn!(snapshot = snapshot.name, %error, "a snapshot is here without its chunks: another version of it is fetched as a whole");
        }
        Ok(snapshot)
    }

    /// Chunks first: a snapshot that has a name has its memory. Those of one that gets none go at the next start, if not now.
    async fn finish_in_store(
        &self,
        fetched: Fetched,
        draft: Draft,
        files: SavedFiles,
        saved: SavedRecord,
    ) -> Result<host::Snapshot, TravelError> {
        let name = draft.name().to_owned();
        fetched.keep(&name).await?;
        let finished = finish(draft, files, saved).await;
        if finished.is_err()
            && let Err(error) = self.machines.remove(&name).await
        {
            warn!(snapshot = name, %error, "the chunks of a snapshot that could not be kept stay until flintd is started again");
        }
        finished
    }

    /// Has an image on this host that makes the same device.
    async fn bring(
        &self,
        image: &TravelImage,
        credentials: Option<host::RegistryCredentials>,
        progress: &Progress,
    ) -> Result<(), TravelError> {
        let TravelImage {
            digest,
            reference,
            device,
        } = image;
        let failed = |source| TravelError::Image {
            image: reference.clone(),
            digest: digest.clone(),
            source,
        };
        if self.images.get(digest).await.map_err(failed)?.is_none() {
            let order = PullOrder {
                reference: format!("{}@{digest}", without_tag(reference)),
                credentials,
                if_not_present: true,
            };
            let (reports, steps) = mpsc::channel(1);
            let pull = self.images.pull(order, reports);
            let (pulled, ()) = futures::future::join(pull, forward(steps, reference, progress)).await;
            pulled.map_err(failed)?;
        }
        if self.device(reference, digest).await? != *device {
            return Err(TravelError::Device {
                image: reference.clone(),
                digest: digest.clone(),
            });
        }
        Ok(())
    }

    async fn device(&self, reference: &str, digest: &str) -> Result<String, TravelError> {
        let name = self.images.device_name(digest).await;
        name.map_err(|source| TravelError::Image {
            image: reference.to_owned(),
            digest: digest.to_owned(),
            source,
        })
    }

    /// Removes a snapshot with its chunks, and says how much that freed.
    ///
    /// # Errors
    /// [`TravelError`]; if its chunks could not be removed, the next start does.
    pub async fn remove(&self, name: &str) -> Result<u64, TravelError> {
        let (saved, of) = (self.saved.clone(), name.to_owned());
        let removed = spawn_blocking(move || saved.remove(&of)).await;
        let freed = removed.map_err(|error| TravelError::Worker(error.to_string()))??;
        match self.machines.remove(name).await {
            Ok(chunks) => Ok(freed + chunks),
            Err(MachineError::NotHere(_)) => Ok(freed),
            Err(error) => Err(error.into()),
        }
    }
}

async fn finish(draft: Draft, files: SavedFiles, record: SavedRecord) -> Result<host::Snapshot, TravelError> {
    let finished = spawn_blocking(move || draft.finish(&files, record)).await;
    Ok(finished.map_err(|error| TravelError::Worker(error.to_string()))??)
}

/// The draft's files once more, by the names that they travel under.
fn handles(draft: &Draft, files: &SavedFiles) -> Result<Vec<(String, File)>, TravelError> {
    let files = FILES.into_iter().zip([&files.state, &files.memory, &files.scratch]);
    let handles = files.map(|(name, file)| Ok((name.to_owned(), file.try_clone()?)));
    let handles: io::Result<_> = handles.collect();
    handles.map_err(|error| draft.refused(error).into())
}

/// An image's pull as a part of the snapshot's.
async fn forward(mut steps: mpsc::Receiver<host::PullProgress>, image: &str, progress: &Progress) {
    while let Some(step) = steps.recv().await {
        // Full, or nobody listens.
        let _ = progress.try_send(host::SnapshotProgress {
            stage: "images".into(),
            bytes_done: step.bytes_done,
            bytes_total: step.bytes_total,
            bytes_sent: step.bytes_done,
            image: image.to_owned(),
            ..host::SnapshotProgress::default()
        });
    }
}

fn tell(progress: &Progress, stage: &str) {
    // Full, or nobody listens.
    let _ = progress.try_send(host::SnapshotProgress {
        stage: stage.into(),
        ..host::SnapshotProgress::default()
    });
}

fn watcher(stage: &'static str, progress: &Progress) -> Watcher {
    let progress = progress.clone();
    Arc::new(move |transfer: Transfer| {
        let _ = progress.try_send(host::SnapshotProgress {
            stage: stage.into(),
            bytes_done: transfer.bytes_done,
            bytes_total: transfer.bytes_total,
            bytes_sent: transfer.bytes_sent,
            ..host::SnapshotProgress::default()
        });
    })
}

fn login(given: host::RegistryCredentials) -> Credentials {
    Credentials {
        username: given.username,
        password: given.password,
    }
}

/// What a saved pod calls an image.
fn reference_of(record: &SavedRecord, digest: &str) -> String {
    let pod = record.pod.as_ref().and_then(|record| record.pod.as_ref());
    let statuses = pod.and_then(|pod| pod.status.as_ref()).into_iter();
    let mut containers = statuses.flat_map(|status| &status.containers);
    let found = containers.find(|container| container.image_digest == digest);
    found.map_or_else(|| digest.to_owned(), |container| container.image.clone())
}

/// A reference's registry and repository.
fn without_tag(reference: &str) -> &str {
    let name = reference.split('@').next().unwrap_or_default();
    // A colon before the last slash is a port's.
    match name.rsplit_once(':') {
        Some((repository, tag)) if !tag.contains('/') => repository,
        _ => name,
    }
}

#[cfg(test)]
mod tests {
    use super::without_tag;

    #[test]
    fn a_reference_loses_its_tag_and_its_digest_and_keeps_its_port() {
        for reference in ["h:5000/a", "h:5000/a:1", "h:5000/a@sha256:0", "h:5000/a:1@sha256:0"] {
            assert_eq!(without_tag(reference), "h:5000/a");
        }
        assert_eq!(without_tag("busybox:1"), "busybox");
    }
}
