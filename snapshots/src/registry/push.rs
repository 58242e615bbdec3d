//! The other half of the distribution specification: blobs and manifests to a registry ("Pushing").

use std::sync::Arc;
use std::time::Duration;

use reqwest::header::{CONTENT_TYPE, LOCATION};
use reqwest::{Response, StatusCode, Url};

use super::artifact::{ArtifactKind, MANIFEST, encode_manifest};
use super::auth::send;
use super::source::Source;
use super::{Blob, Digest, ImageReference, RegistryError};

/// What the slowest line that is waited for carries, in bytes a second.
const SLOWEST: u64 = 128 << 10;

/// A push to one repository.
pub struct Push {
    source: Arc<Source>,
    reference: ImageReference,
}

impl Push {
    pub(crate) fn new(source: Arc<Source>, reference: ImageReference) -> Self {
        Self { source, reference }
    }

    /// Puts a blob there, unless the repository has it. Says whether it was sent.
    ///
    /// # Errors
    /// When the registry refuses it, or a fault does not pass.
    pub async fn blob(&self, digest: Digest, bytes: &[u8]) -> Result<bool, RegistryError> {
        let mut attempt = 1;
        loop {
            let result = async {
                if self.has(digest).await? {
                    return Ok(false);
                }
                self.upload(digest, bytes).await.map(|()| true)
            };
            match result.await {
                Err(error) => self.source.pause(&mut attempt, error).await?,
                done => return done,
            }
        }
    }

    /// Makes the artifact visible, all of whose blobs but its configuration are there. Returns its manifest's digest.
    ///
    /// # Errors
    /// When the registry refuses it, or a fault does not pass.
    pub async fn artifact(&self, kind: &ArtifactKind, config: &[u8], layers: &[Blob]) -> Result<Digest, RegistryError> {
        let described = Blob {
            digest: Digest::of(config),
            size: config.len() as u64,
        };
        self.blob(described.digest, config).await?;
        let manifest = encode_manifest(kind, described, layers);
        let mut attempt = 1;
        loop {
            match self.manifest(&manifest).await {
                Ok(()) => return Ok(Digest::of(&manifest)),
                Err(error) => self.source.pause(&mut attempt, error).await?,
            }
        }
    }

    async fn has(&self, digest: Digest) -> Result<bool, RegistryError> {
        let Source { client, endpoint, .. } = &*self.source;
        let url = endpoint.url(&format!("{}/blobs/{digest}", self.source.repository));
        let response = self
            .source
            .exchange(|| client.head(url.clone()), self.patience(0))
            .await?;
        match response.status() {
            StatusCode::OK => Ok(true),
            StatusCode::NOT_FOUND => Ok(false),
            _ => Err(self.source.refusal(response, &format!("blob {digest}")).await),
        }
    }

    /// A session, then the blob in one piece ("POST then PUT").
    async fn upload(&self, digest: Digest, bytes: &[u8]) -> Result<(), RegistryError> {
        let Source { client, endpoint, .. } = &*self.source;
        let what = format!("the upload of blob {digest}");
        let url = endpoint.url(&format!("{}/blobs/uploads/", self.source.repository));
        let begin = || client.post(url.clone()).body(Vec::new());
        let begun = self.source.exchange(begin, self.patience(0)).await?;
        if begun.status() != StatusCode::ACCEPTED {
            return Err(self.source.refusal(begun, &what).await);
        }
        let mut place = self.place(&begun)?;
        place.query_pairs_mut().append_pair("digest", &digest.to_string());
        let put = || {
            let request = client
                .put(place.clone())
                .header(CONTENT_TYPE, "application/octet-stream");
            request.body(bytes.to_vec())
        };
        let patience = self.patience(bytes.len() as u64);
        // Credentials are the registry's own, wherever it keeps its blobs.
        let done = if place.origin() == url.origin() {
            self.source.exchange(put, patience).await?
        } else {
            send(put(), &endpoint.to_string(), patience).await?
        };
        match done.status() {
            StatusCode::CREATED => Ok(()),
            _ => Err(self.source.refusal(done, &what).await),
        }
    }

    /// Where the registry wants the bytes.
    fn place(&self, begun: &Response) -> Result<Url, RegistryError> {
        let base = self.source.endpoint.url("");
        let given = begun.headers().get(LOCATION).and_then(|value| value.to_str().ok());
        let place = given
            .and_then(|given| base.join(given).ok())
            .ok_or_else(|| RegistryError::Malformed {
                what: format!("the answer of registry {} to an upload", self.source.endpoint),
                reason: "it does not say where to upload to".to_owned(),
            })?;
        if base.scheme() == "https" && place.scheme() != "https" {
            return Err(RegistryError::Redirect {
                registry: self.source.endpoint.to_string(),
                reason: "it wants an upload at an unencrypted address".to_owned(),
            });
        }
        Ok(place)
    }

    async fn manifest(&self, manifest: &[u8]) -> Result<(), RegistryError> {
        let Source { client, endpoint, .. } = &*self.source;
        let url = endpoint.url(&format!(
            "{}/manifests/{}",
            self.source.repository,
            self.reference.manifest_key()
        ));
        let put = || {
            let request = client.put(url.clone()).header(CONTENT_TYPE, MANIFEST);
            request.body(manifest.to_vec())
        };
        let done = self.source.exchange(put, self.patience(manifest.len() as u64)).await?;
        match done.status() {
            StatusCode::CREATED => Ok(()),
            _ => Err(self
                .source
                .refusal(done, &format!("the manifest of {}", self.reference))
                .await),
        }
    }

    fn patience(&self, bytes: u64) -> Duration {
        self.source.config.timeouts.first_byte + Duration::from_secs(bytes / SLOWEST)
    }
}
