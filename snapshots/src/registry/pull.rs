//! A pull: where to ask, in which order, and whom to believe.

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use super::artifact::{Artifact, ArtifactKind, parse_artifact};
use super::auth::Authorizer;
use super::credentials::Login;
use super::endpoint::Endpoint;
use super::push::Push;
use super::source::Source;
use super::{
    Blob, BlobStream, Choice, Credentials, Digest, Document, ImageReference, Manifest, RegistryConfig, RegistryError,
    Resolved, credentials, http, parse_config, parse_document,
};

/// The client. It keeps connections, and nothing about anybody's credentials.
pub struct Registry {
    client: reqwest::Client,
    config: Arc<RegistryConfig>,
}

impl Registry {
    /// A client for `config`.
    ///
    /// # Errors
    /// When the extra CA file cannot be used.
    pub fn new(config: RegistryConfig) -> Result<Self, RegistryError> {
        Ok(Self {
            client: http::client(&config)?,
            config: Arc::new(config),
        })
    }

    /// How it was configured.
    pub fn config(&self) -> &RegistryConfig {
        &self.config
    }

    /// Prepares a pull of `reference`; asks nobody yet. Reads docker's configuration, so it may block.
    ///
    /// # Errors
    /// When an address or docker's configuration cannot be used.
    pub fn pull(&self, reference: &ImageReference, given: Option<Credentials>) -> Result<Pull, RegistryError> {
        let host = reference.registry();
        let own = self.config.hosts.get(host);
        let mut sources = Vec::new();
        for mirror in own.map(|own| &own.mirrors[..]).unwrap_or_default() {
            let endpoint = Endpoint::of_mirror(mirror, self.config.hosts.get(mirror))?;
            let login = self.docker_login(&endpoint.host)?;
            sources.push(self.source(endpoint, login, reference));
        }
        let login = match given {
            Some(given) => given.into(),
            None => self.docker_login(host)?,
        };
        sources.push(self.source(Endpoint::of_registry(host, own)?, login, reference));
        Ok(Pull {
            reference: reference.clone(),
            sources,
        })
    }

    /// Prepares a push to `reference`, at the registry itself; asks nobody yet. Reads docker's configuration, so it may block.
    ///
    /// # Errors
    /// When an address or docker's configuration cannot be used.
    pub fn push(&self, reference: &ImageReference, given: Option<Credentials>) -> Result<Push, RegistryError> {
        let host = reference.registry();
        let login = match given {
            Some(given) => given.into(),
            None => self.docker_login(host)?,
        };
        let endpoint = Endpoint::of_registry(host, self.config.hosts.get(host))?;
        Ok(Push::new(self.source(endpoint, login, reference), reference.clone()))
    }

    fn docker_login(&self, host: &str) -> Result<Login, RegistryError> {
        credentials::from_docker(self.config.docker_config.as_deref().map(Path::new), host)
    }

    fn source(&self, endpoint: Endpoint, login: Login, reference: &ImageReference) -> Arc<Source> {
        Arc::new(Source {
            endpoint,
            authorizer: Authorizer::new(login),
            repository: reference.repository().to_owned(),
            client: self.client.clone(),
            config: Arc::clone(&self.config),
        })
    }
}

/// A pull of one image.
pub struct Pull {
    reference: ImageReference,
    /// Mirrors in their order, then the registry: never empty.
    sources: Vec<Arc<Source>>,
}

impl Pull {
    /// Finds the image for this machine and checks its documents against their digests.
    ///
    /// # Errors
    /// The registry's own, when neither it nor a mirror could serve the image.
    pub async fn resolve(&self) -> Result<Resolved, RegistryError> {
        let mut last = None;
        for source in &self.sources {
            match self.resolve_at(source).await {
                Ok(resolved) => return Ok(resolved),
                Err(error) => {
                    tracing::debug!(%error, source = %source.endpoint, "this source cannot serve the image");
                    last = Some(error);
                }
            }
        }
        Err(last.unwrap_or_else(|| self.no_source()))
    }

    /// Finds an artifact whose configuration is of the given media type, and checks its documents against their digests.
    ///
    /// # Errors
    /// The registry's own, when neither it nor a mirror could serve it; [`RegistryError::Unsupported`] if it is something else.
    pub async fn artifact(&self, kind: &ArtifactKind) -> Result<Artifact, RegistryError> {
        let mut last = None;
        for source in &self.sources {
            match self.artifact_at(source, kind).await {
                Ok(artifact) => return Ok(artifact),
                Err(error) => {
                    tracing::debug!(%error, source = %source.endpoint, "this source cannot serve the artifact");
                    last = Some(error);
                }
            }
        }
        Err(last.unwrap_or_else(|| self.no_source()))
    }

    async fn artifact_at(&self, source: &Source, kind: &ArtifactKind) -> Result<Artifact, RegistryError> {
        let name_of = format!("{} {}", kind.name, self.reference);
        let bytes = source
            .manifest(&self.reference.manifest_key())
            .await
            .map_err(|error| name(error, &name_of))?;
        let bytes = match self.reference.digest() {
            Some(digest) => source.verify(bytes, digest, &format!("the manifest of {name_of}"))?,
            None => bytes,
        };
        let (config, layers) = parse_artifact(&bytes, kind, &name_of)?;
        let what = format!("the record of {name_of}");
        Ok(Artifact {
            digest: Digest::of(&bytes),
            config: source.small_blob(config.digest, &what).await?,
            layers,
        })
    }

    fn no_source(&self) -> RegistryError {
        RegistryError::Address {
            address: self.reference.to_string(),
            reason: "no source".to_owned(),
        }
    }

    async fn resolve_at(&self, source: &Source) -> Result<Resolved, RegistryError> {
        let image = self.reference.to_string();
        let limits = &source.config.limits;
        let bytes = source
            .manifest(&self.reference.manifest_key())
            .await
            .map_err(|error| name(error, &format!("image {image}")))?;
        let bytes = match self.reference.digest() {
            Some(digest) => source.verify(bytes, digest, &format!("the manifest of {image}"))?,
            None => bytes,
        };
        let (digest, manifest) = match parse_document(&bytes, &image, limits)? {
            Document::Manifest(manifest) => (Digest::of(&bytes), manifest),
            Document::Index(choices) => self.chosen(source, Choice::pick(&choices, &image)?).await?,
        };
        let what = format!("the configuration of {image}");
        let config = source.small_blob(manifest.config.digest, &what).await?;
        let (config, diff_ids) = parse_config(&config, manifest.layers.len(), &image)?;
        Ok(Resolved {
            digest,
            manifest,
            config,
            diff_ids,
        })
    }

    async fn chosen(&self, source: &Source, digest: Digest) -> Result<(Digest, Manifest), RegistryError> {
        let what = format!("the linux/amd64 manifest of {}", self.reference);
        let bytes = source.manifest(&digest.to_string()).await?;
        let bytes = source.verify(bytes, digest, &what)?;
        match parse_document(&bytes, &what, &source.config.limits)? {
            Document::Manifest(manifest) => Ok((digest, manifest)),
            Document::Index(_) => Err(RegistryError::Unsupported {
                what: format!("{what} being an index again"),
                hint: None,
            }),
        }
    }

    /// How many sources there are.
    pub fn sources(&self) -> usize {
        self.sources.len()
    }

    /// The bytes of `blob` from source number `source`; mirrors come first, the registry is the last. `None`: there are no more.
    pub fn blob(&self, blob: Blob, source: usize) -> Option<BlobStream> {
        self.part(blob, 0..blob.size, source)
    }

    /// The same for a part of it, which must lie within the blob.
    pub fn part(&self, blob: Blob, part: Range<u64>, source: usize) -> Option<BlobStream> {
        self.sources
            .get(source)
            .map(|source| BlobStream::new(Arc::clone(source), blob, part))
    }
}

/// An unknown manifest is an unknown image or artifact, to people.
fn name(error: RegistryError, what: &str) -> RegistryError {
    match error {
        RegistryError::NotFound { registry, .. } => RegistryError::NotFound {
            registry,
            what: what.to_owned(),
        },
        other => other,
    }
}
