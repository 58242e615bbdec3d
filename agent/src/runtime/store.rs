//! The chunk store for [`Images`](crate::backend::Images): what it holds, and looking through it.

use flint_api::host;
use flint_snapshots::images::{DamagedChunk, Finding, ImageError, ImageStore, StoreUsage};
use tokio::sync::mpsc;

use crate::chain;

/// Findings on their way from the thread that reads.
const WINDOW: usize = 32;

pub(super) fn usage(usage: &StoreUsage) -> host::StoreUsage {
    host::StoreUsage {
        chunks: usage.chunks.chunks,
        raw_bytes: usage.chunks.raw_bytes,
        stored_bytes: usage.chunks.stored_bytes,
        packs: usage.chunks.packs,
        pack_bytes: usage.chunks.pack_bytes,
        images: usage.images,
        image_bytes: usage.image_bytes,
        free_bytes: usage.chunks.free_bytes,
    }
}

/// Reads the whole store. Each damaged chunk is reported, and of mere progress as much as `reports` takes; the last word has the sums.
pub(super) async fn verify(
    store: &ImageStore,
    repair: bool,
    reports: mpsc::Sender<host::VerifyProgress>,
) -> Result<host::VerifyProgress, ImageError> {
    let (findings, mut found) = mpsc::channel(WINDOW);
    let listen = async move {
        let mut so_far = host::VerifyProgress::default();
        while let Some(finding) = found.recv().await {
            match finding {
                Finding::Progress(done) => {
                    so_far.chunks_done = done.chunks;
                    so_far.chunks_total = done.chunks_total;
                    so_far.bytes_done = done.bytes;
                    so_far.bytes_total = done.bytes_total;
                    // Full: whoever listens is slow, and hears the next one.
                    let _ = reports.try_send(so_far.clone());
                }
                Finding::Damaged(chunk) => {
                    let told = told(store, &chunk, repair).await;
                    so_far.damaged += 1;
                    so_far.repaired += u64::from(told.repaired);
                    let report = host::VerifyProgress {
                        found: Some(told),
                        ..so_far.clone()
                    };
                    // Nobody listens any more: the reading ends too, with the call.
                    let _ = reports.send(report).await;
                }
            }
        }
        so_far
    };
    let (examined, so_far) = tokio::join!(store.examine(findings), listen);
    examined.map(|()| so_far)
}

async fn told(store: &ImageStore, chunk: &DamagedChunk, repair: bool) -> host::DamagedChunk {
    let mended = match repair {
        true => Some(store.mend(chunk).await),
        false => None,
    };
    let told = host::DamagedChunk {
        id: chunk.id.to_string(),
        reason: chunk.reason.clone(),
        images: chunk.images.iter().map(ToString::to_string).collect(),
        ..host::DamagedChunk::default()
    };
    match mended {
        None => told,
        Some(Ok(())) => host::DamagedChunk { repaired: true, ..told },
        Some(Err(error)) => host::DamagedChunk {
            not_repaired: chain(&error),
            ..told
        },
    }
}
