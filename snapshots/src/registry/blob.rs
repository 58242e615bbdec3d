//! A blob, or a part of it, as one stream of bytes, however often the connection breaks.

use std::ops::Range;
use std::sync::Arc;

use reqwest::{Response, StatusCode};

use super::source::{Source, next_piece};
use super::{Blob, RegistryError};

/// The bytes of a blob, or of a part of it, from one source. After a fault that may pass it goes on where it was; the reader does not notice.
/// Bytes are as they came: whoever reads them compares their digest.
pub struct BlobStream {
    source: Arc<Source>,
    blob: Blob,
    response: Option<Response>,
    /// How far it is: all before this is handed out, or was not asked for.
    done: u64,
    /// Where it ends.
    end: u64,
    /// Bytes to drop, where the source ignored from where it was asked to go on.
    skip: u64,
    /// Attempts without much progress.
    attempt: u32,
    /// Bytes since the last fault.
    since_fault: u64,
}

/// A source that breaks off again and again is given up, unless at least this much comes each time.
const MUCH: u64 = 1 << 20;

impl BlobStream {
    pub(crate) fn new(source: Arc<Source>, blob: Blob, part: Range<u64>) -> Self {
        Self {
            source,
            blob,
            response: None,
            done: part.start,
            end: part.end,
            skip: 0,
            attempt: 1,
            since_fault: 0,
        }
    }

    /// Where the bytes come from.
    pub fn registry(&self) -> String {
        self.source.endpoint.to_string()
    }

    /// The next bytes; `None` after the last one. There are exactly as many as were asked for, or an error.
    ///
    /// # Errors
    /// When the source does not have the blob or refuses it, or when a fault does not pass.
    pub async fn next(&mut self) -> Result<Option<Vec<u8>>, RegistryError> {
        while self.done < self.end {
            match self.piece().await {
                Ok(piece) if piece.is_empty() => {}
                Ok(piece) => {
                    self.since_fault += piece.len() as u64;
                    if self.since_fault >= MUCH {
                        self.attempt = 1;
                    }
                    return Ok(Some(piece));
                }
                Err(error) => {
                    self.response = None;
                    self.since_fault = 0;
                    self.source.pause(&mut self.attempt, error).await?;
                }
            }
        }
        Ok(None)
    }

    async fn piece(&mut self) -> Result<Vec<u8>, RegistryError> {
        let registry = self.registry();
        let mut response = match self.response.take() {
            Some(response) => response,
            None => self.open().await?,
        };
        let Some(piece) = next_piece(&mut response, &registry, &self.source.config).await? else {
            let reason = format!(
                "blob {} ended after {} of {} bytes",
                self.blob.digest, self.done, self.blob.size
            );
            return Err(RegistryError::Unreachable { registry, reason });
        };
        self.response = Some(response);
        let piece = piece.as_ref();
        let dropped = self.skip.min(piece.len() as u64);
        self.skip -= dropped;
        // No more than the whole piece is dropped, so it fits.
        let piece = &piece[usize::try_from(dropped).unwrap_or(piece.len())..];
        let rest = self.end - self.done;
        if piece.len() as u64 <= rest {
            self.done += piece.len() as u64;
            return Ok(piece.to_vec());
        }
        // Whoever ignores what part was asked for sends on behind it; behind the blob there must be nothing.
        if self.end == self.blob.size {
            return Err(RegistryError::TooLong {
                registry,
                what: format!("blob {}", self.blob.digest),
                expected: self.blob.size,
            });
        }
        self.done = self.end;
        Ok(piece[..usize::try_from(rest).unwrap_or(piece.len())].to_vec())
    }

    async fn open(&mut self) -> Result<Response, RegistryError> {
        let path = format!("{}/blobs/{}", self.source.repository, self.blob.digest);
        let what = format!("blob {}", self.blob.digest);
        let range = match (self.done, self.end) {
            (0, end) if end == self.blob.size => None,
            (start, end) if end == self.blob.size => Some(format!("bytes={start}-")),
            (start, end) => Some(format!("bytes={start}-{}", end - 1)),
        };
        let response = self.source.open(&path, None, range, &what).await?;
        self.skip = if response.status() == StatusCode::PARTIAL_CONTENT {
            0
        } else {
            self.done
        };
        Ok(response)
    }
}
