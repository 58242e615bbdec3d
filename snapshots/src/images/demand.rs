//! A chunk that somebody waits for, whose copy on this host is damaged or missing.
//!
//! ```text
//!   demand(image, chunk) ─> in the store, and good?  ──yes──> pack and place
//!                               │ no
//!                               v  one flight for each part of a layer, however many wait for it
//!               a layer of the image has it ─> ranged read at mirrors, registry; verified ─┐
//!               none has it: metadata of the file tree, made again out of the layers' ─────┴─> mended in the store
//!                              indexes
//! ```
//!
//! What may pass (a registry that is down or slow, that serves other bytes) is tried again until the deadline, what may not (no
//! such image, no access) is told at once. A part is what one ranged read brings (see [`access`](crate::access)): the neighbours of the
//! chunk are kept along with it.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures::FutureExt;
use futures::future::{BoxFuture, Shared};
use tokio::sync::Semaphore;
use tokio::time::Instant;

use super::error::ErrorKind;
use super::{ImageError, ImageStore, Inner, blocking, ingest};
use crate::access::{LayerAccess, LayerSource, LayerSourceError, Part};
use crate::chunk::{Chunk, ChunkId, ChunkSink, SinkError};
use crate::device::FoundChunk;
use crate::registry::{Credentials, Digest, ImageReference};
use crate::store::{Sink, StoreError};

/// How long a chunk is tried to be had by default.
pub const DEFAULT_DEADLINE: Duration = Duration::from_secs(120);
/// Reads at registries that go on at a time.
const PARALLEL_READS: usize = 16;
/// Layers whose access and connection are kept for the next chunk: some MB each.
const KEPT: usize = 16;
const FIRST_PAUSE: Duration = Duration::from_millis(250);
const LONGEST_PAUSE: Duration = Duration::from_secs(10);

/// How chunks that are missing are brought.
#[derive(Debug, Clone)]
pub struct DemandOptions {
    /// How long it is tried.
    pub deadline: Duration,
}

impl Default for DemandOptions {
    fn default() -> Self {
        Self {
            deadline: DEFAULT_DEADLINE,
        }
    }
}

/// A chunk that was asked for.
#[derive(Debug)]
pub enum Delivered {
    /// The store has it there.
    Stored(FoundChunk),
    /// The store has no room for it: these are its bytes.
    Bytes(Arc<Vec<u8>>),
}

/// Why a chunk could not be had.
#[derive(Debug, thiserror::Error)]
pub enum DemandError {
    /// Nobody is known who has it.
    #[error(
        "chunk {id} of image {image} is in no layer whose index is on this host: remove the image and pull it again"
    )]
    NoSource {
        /// The chunk.
        id: ChunkId,
        /// The image.
        image: Digest,
    },
    /// It is none of the image's.
    #[error("image {image} has no chunk {id}")]
    Foreign {
        /// The chunk.
        id: ChunkId,
        /// The image.
        image: Digest,
    },
    /// The image has no name by which a registry could be asked.
    #[error("image {0} has no name on this host by which a registry could be asked for its layers: pull it by name")]
    NoName(Digest),
    /// The image, its store or its registry.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// Its layer could not be read.
    #[error(transparent)]
    Layer(#[from] LayerSourceError),
    /// It was brought, and the store does not have it.
    #[error("chunk {0} was fetched and is not in the store: is its disk failing?")]
    Lost(ChunkId),
    /// A flight of somebody else has failed.
    #[error("fetching a part of a layer")]
    Flight(#[source] Arc<DemandError>),
    /// It took too long.
    #[error("chunk {id} could not be had within {after:?}")]
    Deadline {
        /// The chunk.
        id: ChunkId,
        /// How long it was tried.
        after: Duration,
        /// What the last try came to, if one has ended.
        #[source]
        last: Option<Box<DemandError>>,
    },
}

impl DemandError {
    /// Whether another try may succeed.
    fn may_pass(&self) -> bool {
        match self {
            Self::Image(error) => matches!(error.kind(), ErrorKind::Unavailable | ErrorKind::Deadline),
            Self::Layer(error) => !matches!(
                error,
                LayerSourceError::Keep { .. } | LayerSourceError::NoSuchChunk { .. }
            ),
            _ => false,
        }
    }
}

impl From<StoreError> for DemandError {
    fn from(error: StoreError) -> Self {
        Self::Image(error.into())
    }
}

/// What is fetched once for all who want it.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
enum Key {
    Part(Digest, (u64, usize)),
    Metadata(Digest),
}

/// What a flight brought that the store had no room for.
type Unstored = Arc<HashMap<ChunkId, Arc<Vec<u8>>>>;
type Flight = Shared<BoxFuture<'static, Result<Unstored, Arc<DemandError>>>>;

/// What is under way, and what is kept from one chunk to the next.
pub(crate) struct Demand {
    options: DemandOptions,
    flights: Mutex<HashMap<Key, Flight>>,
    accesses: Mutex<Kept<Digest, LayerAccess>>,
    sources: Mutex<Kept<(Digest, Digest), LayerSource>>,
    /// By complete reference; never on a disk.
    logins: Mutex<HashMap<String, Credentials>>,
    reads: Semaphore,
}

impl Demand {
    pub(crate) fn new(options: DemandOptions) -> Self {
        Self {
            options,
            flights: Mutex::default(),
            accesses: Mutex::default(),
            sources: Mutex::default(),
            logins: Mutex::default(),
            reads: Semaphore::new(PARALLEL_READS),
        }
    }

    /// Remembers how an image was pulled, for its chunks that are wanted later.
    pub(crate) fn remember(&self, reference: &ImageReference, credentials: Option<&Credentials>) {
        let mut logins = lock(&self.logins);
        match credentials {
            Some(credentials) => logins.insert(reference.to_string(), credentials.clone()),
            // Whoever pulls without any can do so again.
            None => logins.remove(&reference.to_string()),
        };
    }
}

/// The values that were put last.
struct Kept<K, V>(VecDeque<(K, Arc<V>)>);

impl<K, V> Default for Kept<K, V> {
    fn default() -> Self {
        Self(VecDeque::new())
    }
}

impl<K: PartialEq, V> Kept<K, V> {
    fn get(&self, key: &K) -> Option<Arc<V>> {
        let found = self.0.iter().find(|(kept, _)| kept == key);
        found.map(|(_, value)| Arc::clone(value))
    }

    fn put(&mut self, key: K, value: Arc<V>) {
        self.remove(&key);
        if self.0.len() >= KEPT {
            self.0.pop_front();
        }
        self.0.push_back((key, value));
    }

    fn remove(&mut self, key: &K) {
        self.0.retain(|(kept, _)| kept != key);
    }
}

/// Changed by single statements: a panic leaves them right.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl ImageStore {
    /// Chunk `id` of an image that is here: where the store has it, if that copy is good; else fetched, verified and stored, once for
    /// all who want it. Must be called within a tokio runtime.
    ///
    /// # Errors
    /// [`DemandError`]; at the latest after the deadline of the options.
    pub async fn demand(&self, image: Digest, id: ChunkId) -> Result<Delivered, DemandError> {
        let after = self.inner.demand.options.deadline;
        let late = |_| DemandError::Deadline { id, after, last: None };
        // A flight ends a little earlier, and tells what was wrong.
        let patience = after + FIRST_PAUSE;
        tokio::time::timeout(patience, self.inner.deliver(image, id))
            .await
            .map_err(late)?
    }
}

impl Inner {
    async fn deliver(self: &Arc<Self>, image: Digest, id: ChunkId) -> Result<Delivered, DemandError> {
        let inner = Arc::clone(self);
        // Who asks may be a VMM that its guest has taken over: it gets nothing of other images.
        if !blocking(move || inner.catalog.has_chunk(image, id)).await? {
            return Err(DemandError::Foreign { id, image });
        }
        loop {
            if let Some(found) = self.find_good(id).await? {
                return Ok(Delivered::Stored(found));
            }
            let (flight, own) = self.flight(image, id).await?;
            let unstored = flight.await.map_err(DemandError::Flight)?;
            if let Some(bytes) = unstored.get(&id) {
                return Ok(Delivered::Bytes(Arc::clone(bytes)));
            }
            if own {
                let found = self.find_good(id).await?;
                return found.map(Delivered::Stored).ok_or(DemandError::Lost(id));
            }
            // A flight that somebody else began may leave out what only we have asked for.
        }
    }

    async fn find_good(self: &Arc<Self>, id: ChunkId) -> Result<Option<FoundChunk>, ImageError> {
        let inner = Arc::clone(self);
        blocking(move || Ok(inner.chunks().find_good(id)?)).await
    }

    /// The flight that brings `id`, and whether it was begun for it.
    async fn flight(self: &Arc<Self>, image: Digest, id: ChunkId) -> Result<(Flight, bool), DemandError> {
        let inner = Arc::clone(self);
        let wanted = blocking(move || inner.look_up(image, id)).await?;
        let key = match &wanted {
            Some((access, part)) => Key::Part(access.diff_id, part.number),
            None => Key::Metadata(image),
        };
        let mut flights = lock(&self.demand.flights);
        if let Some(flight) = flights.get(&key) {
            return Ok((flight.clone(), false));
        }
        let (inner, of) = (Arc::clone(self), key.clone());
        let task = tokio::spawn(async move {
            let outcome = match wanted {
                Some((access, part)) => inner.bring(image, id, &access, part).await,
                None => inner.make_metadata(image, id).await,
            };
            lock(&inner.demand.flights).remove(&of);
            outcome.map_err(Arc::new)
        });
        let outcome = async move {
            let ended = task.await;
            ended.unwrap_or_else(|error| Err(Arc::new(ImageError::Worker(error.to_string()).into())))
        };
        let flight = outcome.boxed().shared();
        flights.insert(key, flight.clone());
        Ok((flight, true))
    }

    /// The layer of the image that has `id`, and the part of it that is read for that.
    fn look_up(&self, image: Digest, id: ChunkId) -> Result<Option<(Arc<LayerAccess>, Part)>, ImageError> {
        for diff_id in self.catalog.layers_of(image)? {
            let Some(access) = self.access(diff_id)? else { continue };
            if let Some(part) = access.part_with(id) {
                return Ok(Some((access, part)));
            }
        }
        Ok(None)
    }

    fn access(&self, diff_id: Digest) -> Result<Option<Arc<LayerAccess>>, ImageError> {
        if let Some(access) = lock(&self.demand.accesses).get(&diff_id) {
            return Ok(Some(access));
        }
        let access = self.catalog.layer_access(diff_id)?.map(Arc::new);
        if let Some(access) = &access {
            lock(&self.demand.accesses).put(diff_id, Arc::clone(access));
        }
        Ok(access)
    }

    /// Reads a part at the registry until that has worked, or cannot work, or the time is over.
    async fn bring(
        self: &Arc<Self>,
        image: Digest,
        id: ChunkId,
        access: &Arc<LayerAccess>,
        part: Part,
    ) -> Result<Unstored, DemandError> {
        let after = self.demand.options.deadline;
        let end = Instant::now() + after;
        let mut pause = FIRST_PAUSE;
        let part = Arc::new(part);
        let mut last = None;
        while let Ok(outcome) = tokio::time::timeout_at(end, self.read_part(image, id, access, &part)).await {
            match outcome {
                Err(error) if error.may_pass() => {
                    // What is known of the registry may be out of date.
                    lock(&self.demand.sources).remove(&(image, access.diff_id));
                    tracing::warn!(error = super::error::chain(&error), %image, "a part of a layer could not be fetched; trying again");
                    last = Some(Box::new(error));
                }
                outcome => return outcome,
            }
            // Half of it at random, so that not all hosts ask at once.
            let now = pause.mul_f64(0.5 + fastrand::f64() / 2.0);
            if Instant::now() + now >= end {
                break;
            }
            tokio::time::sleep(now).await;
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
        Err(DemandError::Deadline { id, after, last })
    }

    async fn read_part(
        self: &Arc<Self>,
        image: Digest,
        id: ChunkId,
        access: &Arc<LayerAccess>,
        part: &Arc<Part>,
    ) -> Result<Unstored, DemandError> {
        // It is never closed.
        let _permit = self.demand.reads.acquire().await;
        let source = self.source_of(image, access).await?;
        let (inner, part) = (Arc::clone(self), Arc::clone(part));
        let (unstored, damaged) = blocking(move || Ok(inner.keep_part(id, &source, &part))).await??;
        if damaged {
            self.renew_table(image);
        }
        Ok(Arc::new(unstored))
    }

    /// Puts what is missing of a part into the store; what there was no room for, and whether the store had a damaged copy.
    #[expect(clippy::type_complexity, reason = "told above, and used once")]
    fn keep_part(
        &self,
        id: ChunkId,
        source: &LayerSource,
        part: &Part,
    ) -> Result<(HashMap<ChunkId, Arc<Vec<u8>>>, bool), DemandError> {
        let session = self.chunks().session();
        let damaged = self.chunks().contains(id)?;
        // What has come since we looked is not fetched again; what is damaged beside it is.
        let bad = |chunk: &&Chunk| self.chunks().get(chunk.id).is_err();
        let ids: Vec<_> = part.chunks.iter().filter(bad).map(|chunk| chunk.id).collect();
        let mut sink = session.sink()?;
        let mut unstored = HashMap::new();
        source.chunks(&ids, |chunk, bytes| match sink.mend(&bytes) {
            Err(error) if error.is_disk_full() => {
                unstored.insert(chunk.id, Arc::new(bytes));
                Ok(())
            }
            put => put.map(drop).map_err(Into::into),
        })?;
        match session.commit() {
            // What was appended can be read all the same; the next commit tries again.
            Err(error) if error.is_disk_full() => tracing::warn!(%error, "chunks that were fetched are not kept yet"),
            committed => committed?,
        }
        Ok((unstored, damaged))
    }

    /// Who has the layer: the registries of the image's names, each by the image's digest, which no tag that moves can change.
    async fn source_of(
        self: &Arc<Self>,
        image: Digest,
        access: &Arc<LayerAccess>,
    ) -> Result<Arc<LayerSource>, DemandError> {
        let key = (image, access.diff_id);
        if let Some(source) = lock(&self.demand.sources).get(&key) {
            return Ok(source);
        }
        let known = self.get(image.to_string()).await?;
        let mut last = DemandError::NoName(image);
        for name in known.iter().flat_map(|image| &image.references) {
            let credentials = lock(&self.demand.logins).get(name).cloned();
            match self.source_at(name, image, credentials, access).await {
                Ok(source) => {
                    let source = Arc::new(source);
                    lock(&self.demand.sources).put(key, Arc::clone(&source));
                    return Ok(source);
                }
                Err(error) => last = error.into(),
            }
        }
        Err(last)
    }

    async fn source_at(
        self: &Arc<Self>,
        name: &str,
        image: Digest,
        credentials: Option<Credentials>,
        access: &Arc<LayerAccess>,
    ) -> Result<LayerSource, ImageError> {
        let name: ImageReference = name.parse()?;
        let pinned: ImageReference = format!("{}/{}@{image}", name.registry(), name.repository()).parse()?;
        self.layer_source(pinned, credentials, Arc::clone(access)).await
    }

    /// Makes the metadata of an image's file tree again, as it was made of its layers' indexes when it was pulled.
    async fn make_metadata(self: &Arc<Self>, image: Digest, id: ChunkId) -> Result<Unstored, DemandError> {
        let inner = Arc::clone(self);
        let is_there = blocking(move || {
            let device = inner.catalog.assemble(image)?;
            let session = inner.chunks().session();
            let mut sink = Mending(session.sink()?);
            let stored = device.store_metadata(&mut sink);
            stored.map_err(|error| ingest::sink_error(&error))?;
            session.commit()?;
            Ok(inner.chunks().find_good(id)?.is_some())
        });
        if !is_there.await? {
            return Err(DemandError::NoSource { id, image });
        }
        self.renew_table(image);
        Ok(Unstored::default())
    }

    /// Has those who start from now on find chunks where they are.
    fn renew_table(self: &Arc<Self>, image: Digest) {
        let inner = Arc::clone(self);
        tokio::task::spawn_blocking(move || {
            if let Err(error) = inner.catalog.renew_table(image) {
                tracing::warn!(%error, %image, "the image's device table still names damaged chunks");
            }
        });
    }
}

/// Puts chunks in place of damaged ones.
struct Mending(Sink);

impl ChunkSink for Mending {
    fn put(&mut self, data: &[u8]) -> Result<ChunkId, SinkError> {
        Ok(self.0.mend(data)?)
    }
}
