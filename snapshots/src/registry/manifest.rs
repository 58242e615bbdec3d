//! Manifests, indexes and configurations: from bytes that anybody may have written to checked values.

use oci_spec::image::{Arch, Descriptor, ImageConfiguration, ImageIndex, ImageManifest, Os};
use serde::Deserialize;

use super::{Digest, Limits, RegistryError};

/// What is asked for: OCI's and docker's (schema 2) manifests and indexes.
pub(crate) const ACCEPT: &str = "application/vnd.oci.image.manifest.v1+json, application/vnd.oci.image.index.v1+json, \
     application/vnd.docker.distribution.manifest.v2+json, application/vnd.docker.distribution.manifest.list.v2+json";

/// A blob that a manifest names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Blob {
    /// Its digest.
    pub digest: Digest,
    /// Its size in bytes.
    pub size: u64,
}

/// A checked image manifest.
#[derive(Debug, Clone)]
pub struct Manifest {
    /// The image's configuration.
    pub config: Blob,
    /// The layers, lowest first, as they are stored: gzip, zstd or plain tar, which their first bytes tell.
    pub layers: Vec<Blob>,
}

/// Everything about an image but its layers' content.
#[derive(Debug, Clone)]
pub struct Resolved {
    /// The digest of the manifest for this platform.
    pub digest: Digest,
    /// The manifest.
    pub manifest: Manifest,
    /// The configuration as OCI has it.
    pub config: ImageConfiguration,
    /// For each layer the digest of its uncompressed tar.
    pub diff_ids: Vec<Digest>,
}

/// A manifest or an index of manifests.
#[derive(Debug)]
pub enum Document {
    /// An image.
    Manifest(Manifest),
    /// Several images; which one to take.
    Index(Vec<Choice>),
}

/// An entry of an index.
#[derive(Debug, Clone)]
pub struct Choice {
    pub(crate) digest: Digest,
    pub(crate) platform: Option<(Os, Arch)>,
    pub(crate) name: Option<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Head {
    schema_version: u32,
    media_type: Option<String>,
    manifests: Option<serde::de::IgnoredAny>,
}

/// Reads a manifest or an index. What it is, its media type says, and where it has none its content (OCI image spec,
/// "Compatibility Matrix").
pub(crate) fn parse_document(bytes: &[u8], what: &str, limits: &Limits) -> Result<Document, RegistryError> {
    let head: Head = parse(bytes, what)?;
    if head.schema_version != 2 {
        return Err(RegistryError::Unsupported {
            what: format!("{what} with schema version {}", head.schema_version),
            hint: Some("such a manifest is from before 2017: push the image again"),
        });
    }
    match head.media_type.as_deref() {
        Some(
            "application/vnd.oci.image.index.v1+json" | "application/vnd.docker.distribution.manifest.list.v2+json",
        ) => index(bytes, what),
        Some("application/vnd.oci.image.manifest.v1+json" | "application/vnd.docker.distribution.manifest.v2+json") => {
            manifest(bytes, what, limits)
        }
        Some(other) => Err(RegistryError::Unsupported {
            what: format!("{what} of type {:?}", other.chars().take(100).collect::<String>()),
            hint: Some("it is no image that can be run"),
        }),
        None if head.manifests.is_some() => index(bytes, what),
        None => manifest(bytes, what, limits),
    }
}

fn index(bytes: &[u8], what: &str) -> Result<Document, RegistryError> {
    let index: ImageIndex = parse(bytes, what)?;
    let choices = index.manifests().iter().map(|entry| {
        let platform = entry
            .platform()
            .as_ref()
            .map(|platform| (platform.os().clone(), platform.architecture().clone()));
        let annotation = |key: &str| entry.annotations().as_ref().and_then(|all| all.get(key).cloned());
        let name = annotation("io.containerd.image.name").or_else(|| annotation("org.opencontainers.image.ref.name"));
        Ok(Choice {
            digest: digest(entry, what)?,
            platform,
            name,
        })
    });
    choices.collect::<Result<_, _>>().map(Document::Index)
}

fn manifest(bytes: &[u8], what: &str, limits: &Limits) -> Result<Document, RegistryError> {
    let manifest: ImageManifest = parse(bytes, what)?;
    let config = blob(manifest.config(), what)?;
    let layers = manifest.layers().iter().map(|layer| {
        let media_type = layer.media_type().to_string();
        if !is_layer(&media_type) {
            let media_type: String = media_type.chars().take(100).collect();
            return Err(RegistryError::Unsupported {
                what: format!("a layer of type {media_type:?} in {what}"),
                hint: Some("build the image with layers that are tars, as they are or by gzip or zstd"),
            });
        }
        blob(layer, what)
    });
    let layers: Vec<_> = layers.collect::<Result<_, _>>()?;
    check_layers(&layers, what, limits)?;
    Ok(Document::Manifest(Manifest { config, layers }))
}

/// Whether a media type is that of a layer: OCI's and docker's, with the compressions that there are here. A foreign layer
/// (Windows' base images) is not in the registry, and an encrypted one needs a key.
fn is_layer(media_type: &str) -> bool {
    let compressions = [".tar", ".tar+gzip", ".tar.gzip", ".tar+zstd", ".tar.zstd"];
    compressions.iter().any(|ending| media_type.ends_with(ending)) && !media_type.contains("foreign")
}

/// Applies the limits before anything is fetched.
pub(crate) fn check_layers(layers: &[Blob], what: &str, limits: &Limits) -> Result<(), RegistryError> {
    if layers.len() > limits.layers {
        let reason = format!("it has {} layers, the limit is {}", layers.len(), limits.layers);
        return Err(RegistryError::Malformed {
            what: what.to_owned(),
            reason,
        });
    }
    match layers.iter().find(|layer| layer.size > limits.layer_bytes) {
        Some(layer) => Err(RegistryError::TooLarge {
            what: format!("layer {} of {what}", layer.digest),
            limit: limits.layer_bytes,
        }),
        None => Ok(()),
    }
}

/// Reads the configuration and compares it with the manifest and with this machine.
pub(crate) fn parse_config(
    bytes: &[u8],
    layers: usize,
    what: &str,
) -> Result<(ImageConfiguration, Vec<Digest>), RegistryError> {
    let what_config = format!("the configuration of {what}");
    let config: ImageConfiguration = parse(bytes, &what_config)?;
    if *config.os() != Os::Linux || *config.architecture() != Arch::Amd64 {
        let available = format!("{}/{}", config.os(), config.architecture());
        return Err(RegistryError::NoPlatform {
            image: what.to_owned(),
            available,
        });
    }
    let malformed = |reason: String| RegistryError::Malformed {
        what: what_config.clone(),
        reason,
    };
    let diff_ids = config
        .rootfs()
        .diff_ids()
        .iter()
        .map(|id| id.parse().map_err(|error| malformed(format!("{error}"))));
    let diff_ids: Vec<Digest> = diff_ids.collect::<Result<_, _>>()?;
    if diff_ids.len() != layers {
        return Err(malformed(format!(
            "it speaks of {} layers, the manifest of {layers}",
            diff_ids.len()
        )));
    }
    Ok((config, diff_ids))
}

impl Choice {
    /// The entry for this machine. Entries without a platform fit if they are alone.
    pub(crate) fn pick(choices: &[Self], image: &str) -> Result<Digest, RegistryError> {
        let wanted = (Os::Linux, Arch::Amd64);
        match choices {
            [
                Self {
                    digest, platform: None, ..
                },
            ] => Ok(*digest),
            _ => choices
                .iter()
                .find(|choice| choice.platform.as_ref() == Some(&wanted))
                .map(|choice| choice.digest)
                .ok_or_else(|| {
                    let names: Vec<_> = choices
                        .iter()
                        .filter_map(|choice| choice.platform.as_ref())
                        .map(|(os, arch)| format!("{os}/{arch}"))
                        .collect();
                    let available = if names.is_empty() {
                        "platforms it does not name".to_owned()
                    } else {
                        names.join(", ")
                    };
                    RegistryError::NoPlatform {
                        image: image.to_owned(),
                        available,
                    }
                }),
        }
    }
}

pub(crate) fn blob(descriptor: &Descriptor, what: &str) -> Result<Blob, RegistryError> {
    Ok(Blob {
        digest: digest(descriptor, what)?,
        size: descriptor.size(),
    })
}

fn digest(descriptor: &Descriptor, what: &str) -> Result<Digest, RegistryError> {
    let malformed = |reason| RegistryError::Malformed {
        what: what.to_owned(),
        reason,
    };
    descriptor
        .digest()
        .to_string()
        .parse()
        .map_err(|error| malformed(format!("{error}")))
}

pub(crate) fn parse<'a, T: Deserialize<'a>>(bytes: &'a [u8], what: &str) -> Result<T, RegistryError> {
    serde_json::from_slice(bytes).map_err(|error| RegistryError::Malformed {
        what: what.to_owned(),
        reason: error.to_string(),
    })
}
