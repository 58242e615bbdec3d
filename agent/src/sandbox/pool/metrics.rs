//! What the pool counts.

use prometheus_client::{
    metrics::{counter::Counter, gauge::Gauge, histogram::Histogram},
    registry::{Registry, Unit},
};

/// Counts of one pool. Clones are the same counts.
#[derive(Clone, Debug)]
pub struct PoolMetrics {
    /// Clones that are parked.
    pub parked: Gauge,
    /// Sandboxes that are clones.
    pub hits: Counter,
    /// Sandboxes that were booted although a clone would have fitted: none was parked.
    pub misses: Counter,
    /// Sandboxes that were booted because no clone fits them.
    pub misfits: Counter,
    /// Clones that could not be made, or ended before anybody claimed them.
    pub failures: Counter,
    /// Templates that were made.
    pub templates: Counter,
    /// Working sets that were recorded.
    pub working_sets: Counter,
    /// Clones that were given a working set.
    pub replays: Counter,
    /// From the request for a sandbox to the guest going on.
    pub claim: Histogram,
}

impl Default for PoolMetrics {
    fn default() -> Self {
        Self {
            parked: Gauge::default(),
            hits: Counter::default(),
            misses: Counter::default(),
            misfits: Counter::default(),
            failures: Counter::default(),
            templates: Counter::default(),
            working_sets: Counter::default(),
            replays: Counter::default(),
            // 0.1 ms to 0.8 s, doubling.
            claim: Histogram::new(prometheus_client::metrics::histogram::exponential_buckets(
                0.0001, 2.0, 14,
            )),
        }
    }
}

impl PoolMetrics {
    pub(crate) fn register(&self, registry: &mut Registry) {
        registry.register("pool_parked", "Clones that are parked", self.parked.clone());
        registry.register("pool_hits", "Sandboxes that are clones", self.hits.clone());
        registry.register(
            "pool_misses",
            "Sandboxes that were booted because no clone was parked",
            self.misses.clone(),
        );
        registry.register(
            "pool_misfits",
            "Sandboxes that were booted because no clone fits them",
            self.misfits.clone(),
        );
        registry.register(
            "pool_failures",
            "Clones that could not be made, or ended before they were claimed",
            self.failures.clone(),
        );
        registry.register("pool_templates", "Templates that were made", self.templates.clone());
        registry.register(
            "pool_working_sets",
            "Working sets that were recorded",
            self.working_sets.clone(),
        );
        registry.register(
            "pool_replays",
            "Parked clones that were given a working set",
            self.replays.clone(),
        );
        registry.register_with_unit(
            "pool_claim",
            "From the request for a sandbox to its guest going on",
            Unit::Seconds,
            self.claim.clone(),
        );
    }
}
