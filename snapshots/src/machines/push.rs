//! Machines to a registry: from the store, or straight from files.

use std::collections::HashMap;
use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::sync::Arc;

use futures::{StreamExt as _, TryStreamExt as _, stream};

use super::bundle::{Bundle, Entry, divide};
use super::files::{cut, failed};
use super::record::encode;
use super::transfer::{MACHINE, Meter, Watcher};
use super::{Machine, MachineError, Machines, Notes, blocking, shelf};
use crate::chunk::{Chunk, ChunkId};
use crate::registry::{Blob, Credentials, Digest, ImageReference, Push};
use crate::store::{ChunkStore, compress};

/// Where the chunks of a push come from.
enum Chunks {
    /// The store, which has them as they travel.
    Store(ChunkStore),
    /// Files that nobody changes: nothing is kept for the push, and nothing is left of one that is killed.
    Files {
        files: Vec<(String, File)>,
        places: HashMap<ChunkId, Place>,
        zstd_level: i32,
    },
}

/// Where a chunk is in files.
#[derive(Clone, Copy)]
struct Place {
    /// Which of them.
    file: usize,
    offset: u64,
    len: u32,
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
        let (machine, session) = blocking(move || {
            let machine = shelf::get(inner.chunks(), &name)?;
            // So that the machine may be removed meanwhile.
            let session = inner.chunks().session();
            let ids: Vec<_> = machine.chunks().iter().map(|chunk| chunk.id).collect();
            session.pin_all(&ids)?;
            Ok((machine, session))
        })
        .await?;
        let chunks = Chunks::Store(self.inner.chunks().clone());
        let pushed = self.send(&machine, chunks, reference, credentials, watcher).await;
        drop(session);
        pushed
    }

    /// Pushes files as a machine, without keeping anything of them here; else as [`Machines::push`]. Whoever changes one of them
    /// meanwhile has the push fail.
    ///
    /// # Errors
    /// When a name is none, a file cannot be read, or the registry does not take it.
    pub async fn push_files(
        &self,
        files: Vec<(String, File)>,
        notes: Notes,
        reference: &str,
        credentials: Option<Credentials>,
        watcher: &Watcher,
    ) -> Result<Digest, MachineError> {
        let zstd_level = self.inner.chunks().zstd_level();
        let (machine, chunks) = blocking(move || {
            let mut machine = Machine::new(notes);
            for (name, file) in &files {
                let (len, pieces) = cut(name, file, |unit| Ok(ChunkId::of(unit)))?;
                machine.add(name, len, pieces)?;
            }
            let places = places(&machine);
            Ok((
                machine,
                Chunks::Files {
                    files,
                    places,
                    zstd_level,
                },
            ))
        })
        .await?;
        self.send(&machine, chunks, reference, credentials, watcher).await
    }

    async fn send(
        &self,
        machine: &Machine,
        from: Chunks,
        reference: &str,
        credentials: Option<Credentials>,
        watcher: &Watcher,
    ) -> Result<Digest, MachineError> {
        let (inner, reference): (_, ImageReference) = (Arc::clone(&self.inner), reference.parse()?);
        let push = blocking(move || Ok(inner.registry().push(&reference, credentials)?)).await?;
        let (chunks, from) = (machine.chunks(), Arc::new(from));
        let meter = Meter::new(machine.chunk_bytes(), watcher);
        let parallel = self.inner.registry().config().parallel_layers;
        let bundles: Vec<Vec<Chunk>> = divide(&chunks).into_iter().map(<[Chunk]>::to_vec).collect();
        let sent: Vec<(Bundle, Blob)> = stream::iter(bundles)
            .map(|chunks| send_bundle(Arc::clone(&from), chunks, &push, &meter))
            .buffered(parallel)
            .try_collect()
            .await?;
        let (bundles, blobs): (Vec<_>, Vec<_>) = sent.into_iter().unzip();
        Ok(push.artifact(&MACHINE, &encode(machine, &bundles), &blobs).await?)
    }
}

async fn send_bundle(
    from: Arc<Chunks>,
    chunks: Vec<Chunk>,
    push: &Push,
    meter: &Meter,
) -> Result<(Bundle, Blob), MachineError> {
    let raw = chunks.iter().map(|chunk| u64::from(chunk.len)).sum();
    let ids: Vec<_> = chunks.iter().map(|chunk| chunk.id).collect();
    let (bundle, bytes) = blocking(move || from.gather(&ids)).await?;
    let blob = Blob {
        digest: Digest::of(&bytes),
        size: bytes.len() as u64,
    };
    let was_sent = push.blob(blob.digest, &bytes).await?;
    meter.add(raw, if was_sent { raw } else { 0 });
    Ok((bundle, blob))
}

/// Where each chunk is, the first time that it is.
fn places(machine: &Machine) -> HashMap<ChunkId, Place> {
    let mut places = HashMap::new();
    for (file, of) in machine.files().iter().enumerate() {
        for (offset, Chunk { id, len }) in of.placed() {
            places.entry(id).or_insert(Place { file, offset, len });
        }
    }
    places
}

impl Chunks {
    /// The chunks one after the other, as the store has them or would have them.
    fn gather(&self, ids: &[ChunkId]) -> Result<(Bundle, Vec<u8>), MachineError> {
        let (mut bundle, mut bytes) = (Bundle::default(), Vec::new());
        for id in ids {
            let stored = self.stored(*id)?;
            // A chunk is never longer than MAX_CHUNK_LEN.
            let stored_len = u32::try_from(stored.len()).unwrap_or(u32::MAX);
            bundle.entries.push(Entry { id: *id, stored_len });
            bytes.extend(stored);
        }
        Ok((bundle, bytes))
    }

    fn stored(&self, id: ChunkId) -> Result<Vec<u8>, MachineError> {
        let (files, places, zstd_level) = match self {
            Self::Store(store) => return Ok(store.get_stored(id)?),
            Self::Files {
                files,
                places,
                zstd_level,
            } => (files, places, *zstd_level),
        };
        // The ids are those of the places.
        let Place { file, offset, len } = places[&id];
        let (name, file) = &files[file];
        let mut chunk = vec![0; len as usize];
        file.read_exact_at(&mut chunk, offset)
            .map_err(failed("reading", name))?;
        if ChunkId::of(&chunk) != id {
            let changed = std::io::Error::other("it is being changed: push it again when nobody writes to it");
            return Err(failed("pushing", name)(changed));
        }
        compress(&chunk, zstd_level).map_err(failed("compressing", name))
    }
}
