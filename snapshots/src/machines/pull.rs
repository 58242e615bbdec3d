//! Machines from a registry.
//!
//! ```text
//!   find ──> Found: its record, nothing of its content
//!     └─ fetch ──> Fetched: all its chunks are here, and held
//!          ├─ lay_out: its files
//!          └─ keep: a machine of this host
//! ```
//!
//! What came of one that was not finished is kept for a day, so that whoever tries again, after a killed process too, gets what is
//! still missing.

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::sync::Arc;

use futures::{StreamExt as _, TryStreamExt as _, stream};
use tokio::sync::RwLock;

use super::bundle::{Bundle, Entry, Part};
use super::record::{checked_name, decode};
use super::transfer::{MACHINE, Meter, Watcher};
use super::{Machine, MachineError, Machines, blocking, files, shelf};
use crate::chunk::ChunkId;
use crate::images::Inner;
use crate::registry::{Artifact, Blob, Credentials, Digest, ImageReference, Pull, RegistryError};
use crate::store::{Session, StoreError, unpack};

/// A machine that a registry has.
pub struct Found {
    inner: Arc<Inner>,
    pull: Pull,
    reference: String,
    digest: Digest,
    machine: Machine,
    bundles: Vec<(Blob, Arc<Bundle>)>,
}

/// A machine all of whose chunks are here, and stay as long as this value does.
pub struct Fetched {
    inner: Arc<Inner>,
    digest: Digest,
    machine: Machine,
    /// Lives as long as this does, and with it the chunks.
    _session: Arc<Session>,
}

impl Machines {
    /// Looks a machine up; fetches what is known of it, and nothing else. Must be called within a tokio runtime.
    ///
    /// # Errors
    /// When the registry does not have it, or has something else or nonsense.
    pub async fn find(&self, reference: &str, credentials: Option<Credentials>) -> Result<Found, MachineError> {
        let (inner, reference): (_, ImageReference) = (Arc::clone(&self.inner), reference.parse()?);
        let of = reference.clone();
        let pull = blocking(move || Ok(inner.registry().pull(&of, credentials)?)).await?;
        let artifact = pull.artifact(&MACHINE).await?;
        let reference = reference.to_string();
        let (machine, bundles) = understand(&artifact, &reference)?;
        Ok(Found {
            inner: Arc::clone(&self.inner),
            pull,
            reference,
            digest: artifact.digest,
            machine,
            bundles,
        })
    }

    /// Pulls a machine and keeps it under `name`, in the place of what had that name; only what this host does not have is
    /// fetched. Must be called within a tokio runtime.
    ///
    /// # Errors
    /// When the registry does not have it or sends something else, or its chunks cannot be kept: then nothing has changed.
    pub async fn pull(
        &self,
        name: &str,
        reference: &str,
        credentials: Option<Credentials>,
        watcher: &Watcher,
    ) -> Result<Machine, MachineError> {
        let name = checked_name(name)?;
        let fetched = self.find(reference, credentials).await?.fetch(watcher).await?;
        fetched.keep(&name).await?;
        Ok(fetched.machine)
    }
}

impl Found {
    /// What is known of it.
    pub fn machine(&self) -> &Machine {
        &self.machine
    }

    /// The digest under which the registry has it.
    pub fn digest(&self) -> Digest {
        self.digest
    }

    /// Fetches what this host does not have of it.
    ///
    /// # Errors
    /// When the registry fails or sends something else, or there is no room: then nothing is kept of it.
    pub async fn fetch(self, watcher: &Watcher) -> Result<Fetched, MachineError> {
        let inner = Arc::clone(&self.inner);
        let result = self.fetch_missing(watcher).await;
        if result.as_ref().is_err_and(MachineError::is_disk_full) {
            make_room(&inner).await;
        }
        result
    }

    async fn fetch_missing(self, watcher: &Watcher) -> Result<Fetched, MachineError> {
        let fetch = Fetch::plan(self, watcher).await?;
        let parallel = fetch.found.inner.registry().config().parallel_layers;
        let done = stream::iter(fetch.jobs())
            .map(Ok)
            .try_for_each_concurrent(parallel, |(blob, bundle, part)| fetch.part(blob, bundle, part))
            .await;
        // After a failure of one part, threads may still be writing others, and hold on to them.
        drop(fetch.keeping.write().await);
        done?;
        let Fetch { found, session, .. } = fetch;
        let held = Arc::clone(&session);
        blocking(move || Ok(held.commit()?)).await?;
        let Found {
            inner, digest, machine, ..
        } = found;
        Ok(Fetched {
            inner,
            digest,
            machine,
            _session: session,
        })
    }
}

impl Fetched {
    /// What is known of it.
    pub fn machine(&self) -> &Machine {
        &self.machine
    }

    /// Writes its files, by name, into empty ones.
    ///
    /// # Errors
    /// When there is no such file, a chunk is damaged, or one cannot be written; if there is no room, they are empty again, and
    /// nothing that came is kept.
    pub async fn lay_out(self, files: Vec<(String, File)>) -> Result<Self, MachineError> {
        let inner = Arc::clone(&self.inner);
        let result = blocking(move || match self.write(&files) {
            Ok(()) => Ok(self),
            Err(error) => {
                if error.is_disk_full() {
                    // The index is on the same disk, and wants room before it can give back any.
                    files.iter().for_each(|(name, file)| {
                        if let Err(error) = file.set_len(0) {
                            tracing::warn!(name, %error, "a file that could not be written keeps its room");
                        }
                    });
                }
                Err(error)
            }
        })
        .await;
        if result.as_ref().is_err_and(MachineError::is_disk_full) {
            make_room(&inner).await;
        }
        result
    }

    fn write(&self, files: &[(String, File)]) -> Result<(), MachineError> {
        files.iter().try_for_each(|(name, into)| {
            let file = self.machine.file(name).ok_or_else(|| MachineError::NoFile {
                machine: self.digest.to_string(),
                file: name.clone(),
            })?;
            files::lay_out(file, into, self.inner.chunks())
        })
    }

    /// Keeps it under `name`, in the place of what had that name.
    ///
    /// # Errors
    /// When the name is none, or the index cannot be written.
    pub async fn keep(&self, name: &str) -> Result<(), MachineError> {
        let (inner, name, machine) = (Arc::clone(&self.inner), checked_name(name)?, self.machine.clone());
        let digest = self.digest;
        blocking(move || shelf::put(inner.chunks(), &name, &machine, Some(digest))).await
    }
}

/// Gives back what came of pulls that were not finished.
async fn make_room(inner: &Arc<Inner>) {
    let inner = Arc::clone(inner);
    let made = blocking(move || {
        shelf::forget_begun(inner.chunks())?;
        Ok(inner.sweep()?)
    });
    if let Err(error) = made.await {
        tracing::warn!(%error, "making room after a pull that filled the disk");
    }
}

/// An artifact's layers, each with the chunks in it.
type Carried = Vec<(Blob, Arc<Bundle>)>;

/// What an artifact says, as far as it makes sense.
fn understand(artifact: &Artifact, reference: &str) -> Result<(Machine, Carried), MachineError> {
    let (machine, bundles) = decode(&artifact.config).map_err(|source| MachineError::Record {
        name: reference.to_owned(),
        source,
    })?;
    let malformed = |reason: String| {
        let what = format!("{} {reference}", MACHINE.name);
        MachineError::from(RegistryError::Malformed { what, reason })
    };
    let layers = &artifact.layers;
    if bundles.len() != layers.len() {
        let (recorded, there) = (bundles.len(), layers.len());
        return Err(malformed(format!(
            "its record has {recorded} bundles, its manifest {there}"
        )));
    }
    let bundles: Vec<_> = layers.iter().copied().zip(bundles.into_iter().map(Arc::new)).collect();
    if let Some((blob, _)) = bundles.iter().find(|(blob, bundle)| blob.size != bundle.len()) {
        return Err(malformed(format!(
            "bundle {} is not as long as its chunks",
            blob.digest
        )));
    }
    let carried = bundles.iter().flat_map(|(_, bundle)| &bundle.entries);
    let carried: HashSet<_> = carried.map(|entry| entry.id).collect();
    match machine.chunks().iter().find(|chunk| !carried.contains(&chunk.id)) {
        Some(chunk) => Err(malformed(format!("chunk {} is in none of its bundles", chunk.id))),
        None => Ok((machine, bundles)),
    }
}

/// A pull under way.
struct Fetch {
    found: Found,
    session: Arc<Session>,
    /// Chunks that were not here, with their lengths.
    missing: Arc<HashMap<ChunkId, u32>>,
    /// Held for reading by each thread that keeps chunks.
    keeping: Arc<RwLock<()>>,
    meter: Meter,
}

impl Fetch {
    /// Compares what the machine needs with what is here, and notes that what comes is wanted.
    async fn plan(found: Found, watcher: &Watcher) -> Result<Self, MachineError> {
        let (store, digest) = (found.inner.chunks().clone(), found.digest);
        let (chunks, bytes) = (found.machine.chunks(), found.machine.chunk_bytes());
        let (session, missing) = blocking(move || {
            let session = store.session();
            let missing = session.missing(&chunks)?;
            if !missing.is_empty() {
                shelf::begin(&store, digest, &chunks)?;
            }
            let missing: HashMap<_, _> = missing.into_iter().map(|chunk| (chunk.id, chunk.len)).collect();
            Ok((session, missing))
        })
        .await?;
        let meter = Meter::new(bytes, watcher);
        let to_come: u64 = missing.values().map(|len| u64::from(*len)).sum();
        meter.add(bytes - to_come, 0);
        Ok(Self {
            found,
            session: Arc::new(session),
            missing: Arc::new(missing),
            keeping: Arc::default(),
            meter,
        })
    }

    /// What is to be fetched. A chunk that several bundles have is fetched with the first.
    fn jobs(&self) -> Vec<(Blob, Arc<Bundle>, Part)> {
        let mut wanted: HashSet<_> = self.missing.keys().copied().collect();
        let mut jobs = Vec::new();
        for (blob, bundle) in &self.found.bundles {
            let parts = bundle.parts(|id| wanted.contains(&id));
            for entry in &bundle.entries {
                wanted.remove(&entry.id);
            }
            jobs.extend(parts.into_iter().map(|part| (*blob, Arc::clone(bundle), part)));
        }
        jobs
    }

    async fn part(&self, blob: Blob, bundle: Arc<Bundle>, part: Part) -> Result<(), MachineError> {
        let mut last = None;
        for source in 0..self.found.pull.sources() {
            match self.part_from(blob, &bundle, &part, source).await {
                Ok(()) => return Ok(()),
                // What comes from a mirror that is behind or broken may be right elsewhere.
                Err(error @ (MachineError::Registry(_) | MachineError::Bundle { .. })) => last = Some(error),
                Err(error) => return Err(error),
            }
        }
        last.map_or(Ok(()), Err)
    }

    async fn part_from(
        &self,
        blob: Blob,
        bundle: &Arc<Bundle>,
        part: &Part,
        source: usize,
    ) -> Result<(), MachineError> {
        let Some(mut stream) = self.found.pull.part(blob, part.bytes.clone(), source) else {
            return Ok(());
        };
        let mut bytes = Vec::new();
        while let Some(piece) = stream.next().await? {
            bytes.extend(piece);
        }
        let (session, bundle, entries) = (Arc::clone(&self.session), Arc::clone(bundle), part.entries.clone());
        let wanted = Arc::clone(&self.missing);
        let keeping = Arc::clone(&self.keeping).read_owned().await;
        let kept = blocking(move || {
            let kept = keep(&session, &bundle.entries[entries], &bytes, &wanted);
            drop(session);
            drop(keeping);
            Ok(kept)
        })
        .await?;
        match kept {
            Ok(raw) => {
                self.meter.add(raw, raw);
                Ok(())
            }
            Err(Rejected::Damaged(reason)) => Err(MachineError::Bundle {
                registry: stream.registry(),
                reference: self.found.reference.clone(),
                reason,
            }),
            Err(Rejected::Store(error)) => Err(error.into()),
        }
    }
}

/// Why chunks were not kept.
enum Rejected {
    Damaged(String),
    Store(StoreError),
}

/// Unpacks, verifies and keeps the chunks that are wanted; returns how many bytes they have.
fn keep(
    session: &Session,
    entries: &[Entry],
    mut bytes: &[u8],
    wanted: &HashMap<ChunkId, u32>,
) -> Result<u64, Rejected> {
    let mut sink = session.sink().map_err(Rejected::Store)?;
    let mut raw = 0;
    for entry in entries {
        let damaged = |reason: String| Rejected::Damaged(format!("chunk {}: {reason}", entry.id));
        let (stored, rest) = bytes
            .split_at_checked(entry.stored_len as usize)
            .ok_or_else(|| damaged("it is cut off".to_owned()))?;
        bytes = rest;
        let Some(len) = wanted.get(&entry.id) else {
            continue;
        };
        let chunk = unpack(stored, *len).map_err(|error| damaged(error.to_string()))?;
        if ChunkId::of(&chunk) != entry.id {
            return Err(damaged("its bytes are another's".to_owned()));
        }
        sink.put(&chunk).map_err(Rejected::Store)?;
        raw += u64::from(*len);
    }
    Ok(raw)
}
