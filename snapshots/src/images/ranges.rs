//! Parts of a layer out of a registry, for threads that read.

use std::io::{self, Read};
use std::ops::Range;
use std::sync::Arc;

use tokio::runtime::Handle;
use tokio::sync::mpsc;

use super::ingest::ChannelReader;
use crate::access::BlobRanges;
use crate::registry::{Blob, BlobStream, Pull};

/// Pieces that wait for the reader.
const AHEAD: usize = 16;

/// A layer at one of the places where it can be pulled from.
pub(super) struct RegistryRanges {
    pull: Arc<Pull>,
    blob: Blob,
    source: usize,
    runtime: Handle,
}

impl RegistryRanges {
    /// The layer at each of its sources: mirrors, then the registry.
    pub(super) fn all(pull: &Arc<Pull>, blob: Blob, runtime: &Handle) -> Vec<Box<dyn BlobRanges>> {
        let of_source = |source| Self {
            pull: Arc::clone(pull),
            blob,
            source,
            runtime: runtime.clone(),
        };
        (0..pull.sources())
            .map(|source| Box::new(of_source(source)) as Box<dyn BlobRanges>)
            .collect()
    }
}

impl BlobRanges for RegistryRanges {
    fn open(&self, range: Range<u64>) -> io::Result<Box<dyn Read + '_>> {
        let stream = self.pull.part(self.blob, range, self.source);
        let stream = stream.ok_or_else(|| io::Error::other("there is no such source"))?;
        let (sender, pieces) = mpsc::channel(AHEAD);
        self.runtime.spawn(feed(stream, sender));
        Ok(Box::new(ChannelReader::new(pieces)))
    }
}

/// Passes on what comes, and at last why no more comes. Ends when the reader has gone.
async fn feed(mut stream: BlobStream, sender: mpsc::Sender<io::Result<Vec<u8>>>) {
    loop {
        let piece = match stream.next().await {
            Ok(None) => return,
            Ok(Some(piece)) => Ok(piece),
            Err(error) => Err(io::Error::other(error)),
        };
        let failed = piece.is_err();
        if sender.send(piece).await.is_err() || failed {
            return;
        }
    }
}
