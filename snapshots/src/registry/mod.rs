//! A client for OCI registries: it pulls images and artifacts, and pushes artifacts.
//!
//! It speaks the OCI distribution specification over reqwest, with document types from oci-spec. Ready-made
//! clients were looked at and not taken, because a pull here must bound every document before it is in memory, read
//! `Retry-After`, resume a blob in mid-stream, renew a token in mid-pull, keep the credentials of two pulls apart, and tell
//! the user which of a dozen causes it was.
//!
//! ```text
//!   ImageReference ──> Registry::pull(reference, credentials) ──> Pull ──┬─ resolve() ─> Resolved: manifest, config, layers
//!                                                                        ├─ artifact() > Artifact: config, blobs
//!                                                                        └─ blob() ────> BlobStream: bytes, resumed
//!   Registry::push(reference, credentials) ──> Push: blobs that are not there yet, then the manifest
//!   Pull ── sources: mirrors in their order, then the registry itself
//!    └─ Source: time-outs, retries, redirects ── Authorizer: anonymous, basic, bearer
//! ```

mod artifact;
mod auth;
mod blob;
mod challenge;
mod config;
mod credentials;
mod digest;
mod endpoint;
mod error;
mod http;
mod manifest;
mod pull;
mod push;
mod reference;
mod source;

pub use artifact::{Artifact, ArtifactKind};
pub use blob::BlobStream;
#[cfg(feature = "fuzzing")]
pub(crate) use challenge::Challenge;
pub use config::{HostConfig, Limits, RegistryConfig, Retries, Timeouts};
pub use credentials::Credentials;
#[cfg(feature = "fuzzing")]
pub(crate) use credentials::login as docker_login;
pub use digest::{Digest, Hasher, ParseDigestError};
pub use error::RegistryError;
pub use manifest::{Blob, Document, Manifest, Resolved};
pub(crate) use manifest::{Choice, check_layers, parse_config, parse_document};
pub use pull::{Pull, Registry};
pub use push::Push;
pub use reference::{ImageReference, ParseReferenceError};
