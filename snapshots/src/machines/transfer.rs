//! Machines to and from a registry.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use futures::{StreamExt as _, TryStreamExt as _, stream};

use super::bundle::{Bundle, Entry, Part, divide};
use super::record::{checked_name, decode, encode};
use super::{Machine, MachineError, Machines, blocking, shelf};
use crate::chunk::{Chunk, ChunkId};
use crate::images::Inner;
use crate::registry::{Artifact, ArtifactKind, Blob, Credentials, Digest, ImageReference, Pull, Push, RegistryError};
use crate::store::{ChunkStore, Session, StoreError, unpack};

/// What a machine is in a registry.
const MACHINE: ArtifactKind = ArtifactKind {
    name: "machine snapshot",
    artifact_type: "application/vnd.flint.machine.v1",
    config_type: "application/vnd.flint.machine.v1+json",
    layer_type: "application/vnd.flint.chunks.v1",
    max_layers: 16_384,
};

/// How far a push or a pull is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Transfer {
    /// Bytes that are where they are to be, whether they had to be sent or not.
    pub bytes_done: u64,
    /// Of all.
    pub bytes_total: u64,
    /// What of those done was sent; the rest was there.
    pub bytes_sent: u64,
}

/// Told how far it is.
pub type Watcher = Arc<dyn Fn(Transfer) + Send + Sync>;

/// Counts, and tells.
struct Meter {
    done: AtomicU64,
    sent: AtomicU64,
    total: u64,
    watcher: Watcher,
}

impl Meter {
    fn new(total: u64, watcher: &Watcher) -> Self {
        let meter = Self {
            done: AtomicU64::new(0),
            sent: AtomicU64::new(0),
            total,
            watcher: Arc::clone(watcher),
        };
        meter.add(0, 0);
        meter
    }

    fn add(&self, done: u64, sent: u64) {
        (self.watcher)(Transfer {
            bytes_done: self.done.fetch_add(done, Ordering::Relaxed) + done,
            bytes_sent: self.sent.fetch_add(sent, Ordering::Relaxed) + sent,
            bytes_total: self.total,
        });
    }
}

impl Machines {
    /// Pushes a machine; what the repository has already is not sent. Returns the digest of what others can pull. Must be called
    /// within a tokio runtime.
    ///
    /// # Errors
    /// When there is no such machine, or the registry does not take it.
    pub async fn push(
        &self,
        name: &str,
        reference: &str,
        credentials: Option<Credentials>,
        watcher: &Watcher,
    ) -> Result<Digest, MachineError> {
        let (inner, name) = (Arc::clone(&self.inner), name.to_owned());
        let reference: ImageReference = reference.parse()?;
        let (machine, session, push) = blocking(move || {
            let machine = shelf::get(inner.chunks(), &name)?;
            // So that the machine may be removed meanwhile.
            let session = inner.chunks().session();
            let ids: Vec<_> = machine.chunks().iter().map(|chunk| chunk.id).collect();
            session.pin_all(&ids)?;
            let push = inner.registry().push(&reference, credentials)?;
            Ok((machine, session, push))
        })
        .await?;
        let chunks = machine.chunks();
        let meter = Meter::new(machine.chunk_bytes(), watcher);
        let parallel = self.inner.registry().config().parallel_layers;
        let sent: Vec<(Bundle, Blob)> = stream::iter(divide(&chunks))
            .map(|chunks| self.send(chunks, &push, &meter))
            .buffered(parallel)
            .try_collect()
            .await?;
        drop(session);
        let (bundles, blobs): (Vec<_>, Vec<_>) = sent.into_iter().unzip();
        Ok(push.artifact(&MACHINE, &encode(&machine, &bundles), &blobs).await?)
    }

    async fn send(&self, chunks: &[Chunk], push: &Push, meter: &Meter) -> Result<(Bundle, Blob), MachineError> {
        let store = self.inner.chunks().clone();
        let raw = chunks.iter().map(|chunk| u64::from(chunk.len)).sum();
        let ids: Vec<_> = chunks.iter().map(|chunk| chunk.id).collect();
        let (bundle, bytes) = blocking(move || gather(&store, &ids)).await?;
        let blob = Blob {
            digest: Digest::of(&bytes),
            size: bytes.len() as u64,
        };
        let was_sent = push.blob(blob.digest, &bytes).await?;
        meter.add(raw, if was_sent { raw } else { 0 });
        Ok((bundle, blob))
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
        let result = self.fetch(name, reference.parse()?, credentials, watcher).await;
        if matches!(&result, Err(MachineError::Store(error)) if error.is_disk_full()) {
            let inner = Arc::clone(&self.inner);
            // What came before the disk was full is nobody's.
            if let Err(error) = blocking(move || Ok(inner.sweep()?)).await {
                tracing::warn!(%error, "making room after a pull that filled the disk");
            }
        }
        result
    }

    async fn fetch(
        &self,
        name: String,
        reference: ImageReference,
        credentials: Option<Credentials>,
        watcher: &Watcher,
    ) -> Result<Machine, MachineError> {
        let inner = Arc::clone(&self.inner);
        let (asked, of) = (Arc::clone(&inner), reference.clone());
        let pull = blocking(move || Ok(asked.registry().pull(&of, credentials)?)).await?;
        let artifact = pull.artifact(&MACHINE).await?;
        let fetch = Fetch::plan(&inner, pull, &reference, &artifact, watcher).await?;
        let parallel = inner.registry().config().parallel_layers;
        stream::iter(fetch.jobs())
            .map(Ok)
            .try_for_each_concurrent(parallel, |(blob, bundle, part)| fetch.part(blob, bundle, part))
            .await?;
        let Fetch { machine, session, .. } = fetch;
        blocking(move || {
            session.commit()?;
            shelf::put(inner.chunks(), &name, &machine)?;
            Ok(machine)
        })
        .await
    }
}

/// The chunks one after the other, as the store has them.
fn gather(store: &ChunkStore, ids: &[ChunkId]) -> Result<(Bundle, Vec<u8>), MachineError> {
    let (mut bundle, mut bytes) = (Bundle::default(), Vec::new());
    for id in ids {
        let stored = store.get_stored(*id)?;
        // A chunk is never longer than MAX_CHUNK_LEN.
        let stored_len = u32::try_from(stored.len()).unwrap_or(u32::MAX);
        bundle.entries.push(Entry { id: *id, stored_len });
        bytes.extend(stored);
    }
    Ok((bundle, bytes))
}

/// A pull under way.
struct Fetch {
    pull: Pull,
    reference: String,
    machine: Machine,
    session: Arc<Session>,
    bundles: Vec<(Blob, Arc<Bundle>)>,
    /// Chunks that were not here, with their lengths.
    missing: Arc<HashMap<ChunkId, u32>>,
    meter: Meter,
}

impl Fetch {
    /// Compares what the machine needs with what is here.
    async fn plan(
        inner: &Arc<Inner>,
        pull: Pull,
        reference: &ImageReference,
        artifact: &Artifact,
        watcher: &Watcher,
    ) -> Result<Self, MachineError> {
        let reference = reference.to_string();
        let (machine, bundles) = decode(&artifact.config).map_err(|source| MachineError::Record {
            name: reference.clone(),
            source,
        })?;
        let malformed = |reason: String| RegistryError::Malformed {
            what: format!("{} {reference}", MACHINE.name),
            reason,
        };
        if bundles.len() != artifact.layers.len() {
            let reason = format!(
                "its record has {} bundles, its manifest {}",
                bundles.len(),
                artifact.layers.len()
            );
            return Err(malformed(reason).into());
        }
        let bundles: Vec<_> = artifact
            .layers
            .iter()
            .copied()
            .zip(bundles.into_iter().map(Arc::new))
            .collect();
        if let Some((blob, _)) = bundles.iter().find(|(blob, bundle)| blob.size != bundle.len()) {
            return Err(malformed(format!("bundle {} is not as long as its chunks", blob.digest)).into());
        }
        let chunks = machine.chunks();
        let carried: HashSet<_> = bundles
            .iter()
            .flat_map(|(_, bundle)| &bundle.entries)
            .map(|entry| entry.id)
            .collect();
        if let Some(chunk) = chunks.iter().find(|chunk| !carried.contains(&chunk.id)) {
            return Err(malformed(format!("chunk {} is in none of its bundles", chunk.id)).into());
        }
        let store = inner.chunks().clone();
        let (session, missing) = blocking(move || {
            let session = store.session();
            let missing: HashMap<_, _> = session
                .missing(&chunks)?
                .into_iter()
                .map(|chunk| (chunk.id, chunk.len))
                .collect();
            Ok((session, missing))
        })
        .await?;
        let meter = Meter::new(machine.chunk_bytes(), watcher);
        let to_come: u64 = missing.values().map(|len| u64::from(*len)).sum();
        meter.add(machine.chunk_bytes() - to_come, 0);
        Ok(Self {
            pull,
            reference,
            session: Arc::new(session),
            bundles,
            missing: Arc::new(missing),
            meter,
            machine,
        })
    }

    /// What is to be fetched. A chunk that several bundles have is fetched with the first.
    fn jobs(&self) -> Vec<(Blob, Arc<Bundle>, Part)> {
        let mut wanted: HashSet<_> = self.missing.keys().copied().collect();
        let mut jobs = Vec::new();
        for (blob, bundle) in &self.bundles {
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
        for source in 0..self.pull.sources() {
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
        let Some(mut stream) = self.pull.part(blob, part.bytes.clone(), source) else {
            return Ok(());
        };
        let mut bytes = Vec::new();
        while let Some(piece) = stream.next().await? {
            bytes.extend(piece);
        }
        let (session, bundle, entries) = (Arc::clone(&self.session), Arc::clone(bundle), part.entries.clone());
        let wanted = Arc::clone(&self.missing);
        let kept = blocking(move || Ok(keep(&session, &bundle.entries[entries], &bytes, &wanted))).await?;
        match kept {
            Ok(raw) => {
                self.meter.add(raw, raw);
                Ok(())
            }
            Err(Rejected::Damaged(reason)) => Err(MachineError::Bundle {
                registry: stream.registry(),
                reference: self.reference.clone(),
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
