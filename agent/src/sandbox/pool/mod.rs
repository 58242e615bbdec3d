//! Sandboxes ahead of need. A pod's machine is not booted on its way: it is a clone of a template, parked before anybody asks.
//!
//! ```text
//!            once a host                     off the start path, a bounded number           on the start path
//!   boot --> pause --> save         reserve --> load --> bind vsock, serial            claim --> identity --> fence
//!            Template (two files)           Parked (VMM, cgroup, address, tap,         Claimed            Sandbox
//!                                                   scratch disk; nothing has run)
//! ```
//!
//! - [`shape`]: what every clone has, and which wishes fit it;
//! - [`template`]: the saved machine: made, sealed, verified, made anew;
//! - [`exchange`]: templates to other hosts and from them;
//! - [`growth`]: from a clone's size to its pod's, once it has woken up;
//! - [`parked`]: one clone: made, claimed, given its identity. A claim consumes it, so that no two pods get the same one;
//! - [`keeper`]: the task that fills the pool;
//! - [`working_set`]: what the first clones used of the template's memory, for later ones;
//! - [`metrics`]: what became of all this.
//!
//! A parked clone's folder and intent are those of a sandbox whose start is not complete: a flintd that finds one after the
//! death of an earlier one ends it.

mod exchange;
mod growth;
mod keeper;
mod metrics;
mod parked;
mod shape;
mod template;
mod working_set;

use std::{
    collections::{HashMap, VecDeque},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Instant,
};

use tokio::{
    sync::{Notify, watch},
    task::JoinHandle,
};
use tokio_util::sync::CancellationToken;

pub(super) use self::working_set::WorkingSet;
pub use self::{
    exchange::{TemplateFiles, TemplateRecord, Templates},
    metrics::PoolMetrics,
    template::TemplateError,
};
use self::{
    keeper::Keeper,
    parked::{ClaimFailure, Claimed, Disks, Parked},
    shape::Shape,
};
use super::{SandboxError, SandboxSpec, means::Means, supervisor::End};
use crate::{backend::Ready, timeline::Timeline};

/// One address in so many may lie parked: the others are the pods'.
const ADDRESS_SHARE: usize = 8;

/// What is parked.
#[derive(Clone, Debug)]
pub struct Config {
    /// How many clones; 0: none, and every sandbox is booted.
    pub size: usize,
    /// Most vCPUs of a pod, at most 32. Each costs a parked clone some tens of KiB.
    pub vcpus: u32,
    /// Memory of a parked clone and of the smallest pod, a multiple of 2 MiB.
    pub memory_bytes: u64,
    /// Memory of the largest pod.
    pub largest_bytes: u64,
    /// Size of the scratch disk that a clone has ready.
    pub scratch_bytes: u64,
    /// Most images of a pod.
    pub images: u32,
    /// Memory that a parked clone may copy ahead of what clones were seen to write, if that is to be looked at at all.
    pub working_sets: Option<u64>,
    /// Where to count.
    pub metrics: PoolMetrics,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            size: 0,
            vcpus: 16,
            memory_bytes: 128 << 20,
            largest_bytes: 32 << 30,
            scratch_bytes: 4 << 30,
            images: 8,
            working_sets: Some(0),
            metrics: PoolMetrics::default(),
        }
    }
}

/// The parked clones of one host.
#[derive(Debug)]
pub struct Pool {
    shared: Arc<Shared>,
    stop: CancellationToken,
    keeper: Mutex<Option<JoinHandle<()>>>,
}

/// What the pool's handle and its keeper have in common.
#[derive(Debug)]
struct Shared {
    shape: Shape,
    size: usize,
    parked: Mutex<VecDeque<Parked>>,
    /// How many there are, for those who wait for it.
    count: watch::Sender<usize>,
    /// Of all sandboxes that belong to the pool and to no pod, by name.
    ends: Mutex<HashMap<String, End>>,
    /// There may be something to refill.
    changed: Notify,
    /// Held by who makes, opens or replaces the template.
    arranging: tokio::sync::Mutex<()>,
    /// Another template has taken the place of the one that clones are made of.
    replaced: Notify,
    metrics: PoolMetrics,
}

impl Pool {
    /// Begins to fill a pool.
    pub(super) fn start(means: &Arc<Means>) -> Self {
        let config = &means.config.pool;
        let addresses = usize::try_from(means.config.network.range.capacity()).unwrap_or(usize::MAX);
        let shared = Arc::new(Shared {
            shape: Shape::of(config, means.config.cpu_level),
            size: config.size.min(addresses / ADDRESS_SHARE),
            parked: Mutex::default(),
            count: watch::Sender::new(0),
            ends: Mutex::default(),
            changed: Notify::new(),
            arranging: tokio::sync::Mutex::default(),
            replaced: Notify::new(),
            metrics: config.metrics.clone(),
        });
        let stop = CancellationToken::new();
        let keeper = Keeper::new(Arc::clone(means), Arc::clone(&shared));
        let keeper = (shared.size > 0).then(|| tokio::spawn(keeper.run(stop.clone())));
        Self {
            shared,
            stop,
            keeper: Mutex::new(keeper),
        }
    }

    /// A handle on the template.
    pub(super) fn templates(&self, means: &Arc<Means>) -> Templates {
        Templates {
            means: Arc::clone(means),
            shared: Arc::clone(&self.shared),
        }
    }

    /// How many clones are parked now.
    pub fn parked(&self) -> usize {
        *self.shared.count.borrow()
    }

    /// How many should be, and are.
    pub fn ready(&self) -> Ready {
        Ready {
            size: self.shared.size,
            parked: self.shared.count.subscribe(),
        }
    }

    /// Waits until the pool is full.
    pub async fn filled(&self) {
        let Ready { size, mut parked } = self.ready();
        // The sender lives as long as this.
        let _ = parked.wait_for(|parked| *parked >= size).await;
    }

    /// A handle that drains the pool when its owner has been given away.
    pub fn drainer(&self) -> impl Future<Output = ()> + Send + use<> {
        let stop = self.stop.clone();
        let keeper = lock(&self.keeper).take();
        async move {
            stop.cancel();
            if let Some(keeper) = keeper {
                // It does not panic, and nobody aborts it.
                let _ = keeper.await;
            }
        }
    }

    /// Ends everything that is parked or being made, and waits until nothing of it is left. The pool stays empty.
    pub async fn drain(&self) {
        self.drainer().await;
    }

    /// Gives a pod a clone that goes on at once; `None` if the pod does not fit one, or none is there.
    pub(super) async fn claim(
        &self,
        means: &Means,
        spec: &SandboxSpec,
        timeline: &Timeline,
    ) -> Result<Option<Claimed>, SandboxError> {
        let Shared { shape, metrics, .. } = &*self.shared;
        if self.shared.size == 0 {
            return Ok(None);
        }
        if let Err(misfit) = shape.fits(spec) {
            tracing::debug!(sandbox = spec.id, %misfit, "no clone fits");
            metrics.misfits.inc();
            timeline.mark("pool.unfit");
            return Ok(None);
        }
        let stage = timeline.begin("pool.claim");
        let begun = Instant::now();
        let disks = Disks::of(spec, shape, means).await?;
        while let Some(parked) = self.shared.take() {
            match parked.claim(spec, shape, &disks, &self.shared).await {
                Ok(claimed) => {
                    metrics.hits.inc();
                    metrics.claim.observe(begun.elapsed().as_secs_f64());
                    stage.end();
                    return Ok(Some(claimed));
                }
                Err(ClaimFailure::Gone(error)) => {
                    tracing::warn!(sandbox = spec.id, %error, "a parked clone has ended; the next one is taken");
                    metrics.failures.inc();
                }
                Err(ClaimFailure::Refused(error)) => return Err(error),
            }
        }
        metrics.misses.inc();
        timeline.mark("pool.empty");
        Ok(None)
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

impl Shared {
    fn take(&self) -> Option<Parked> {
        let parked = lock(&self.parked).pop_front();
        self.recount();
        parked
    }

    /// Takes the last one that has something to learn: it would be claimed last.
    fn take_learner(&self) -> Option<Parked> {
        let mut all = lock(&self.parked);
        let place = all.iter().rposition(Parked::can_learn)?;
        let learner = all.remove(place);
        drop(all);
        self.recount();
        learner
    }

    fn put(&self, parked: Parked) {
        lock(&self.parked).push_back(parked);
        self.recount();
    }

    /// Takes one out that has ended; whether it was still there.
    fn forget(&self, name: &str) -> bool {
        let mut all = lock(&self.parked);
        let before = all.len();
        all.retain(|parked| parked.name() != name);
        let gone = all.len() < before;
        drop(all);
        self.recount();
        gone
    }

    /// Ends all that are parked.
    fn clear(&self) {
        lock(&self.parked).clear();
        self.recount();
    }

    fn recount(&self) {
        let count = lock(&self.parked).len();
        self.count.send_replace(count);
        self.metrics.parked.set(i64::try_from(count).unwrap_or(i64::MAX));
    }

    /// Has the pool answer for a sandbox.
    fn answer_for(&self, name: &str, end: &End) {
        let mut ends = lock(&self.ends);
        ends.retain(|_, end| end.watch().borrow().is_none());
        ends.insert(name.to_owned(), end.clone());
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Every change under these locks is whole.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
