//! What push and pull have in common: what a machine is in a registry, and how far it is on its way.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::registry::ArtifactKind;

/// What a machine is in a registry.
pub(super) const MACHINE: ArtifactKind = ArtifactKind {
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
pub(super) struct Meter {
    done: AtomicU64,
    sent: AtomicU64,
    total: u64,
    watcher: Watcher,
}

impl Meter {
    pub(super) fn new(total: u64, watcher: &Watcher) -> Self {
        let meter = Self {
            done: AtomicU64::new(0),
            sent: AtomicU64::new(0),
            total,
            watcher: Arc::clone(watcher),
        };
        meter.add(0, 0);
        meter
    }

    pub(super) fn add(&self, done: u64, sent: u64) {
        (self.watcher)(Transfer {
            bytes_done: self.done.fetch_add(done, Ordering::Relaxed) + done,
            bytes_sent: self.sent.fetch_add(sent, Ordering::Relaxed) + sent,
            bytes_total: self.total,
        });
    }
}
