//! What a registry keeps beside images: a manifest whose configuration says what it is (OCI image spec, "Guidelines for Artifact
//! Usage").

use oci_spec::image::ImageManifest;
use serde_json::json;

use super::manifest::{blob, parse};
use super::{Blob, RegistryError};

/// A manifest's media type, which is that of images, too.
pub(crate) const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";

/// A kind of artifact.
#[derive(Debug)]
pub struct ArtifactKind {
    /// To people: "machine".
    pub name: &'static str,
    /// The artifact's type, in the manifest.
    pub artifact_type: &'static str,
    /// Media type of its configuration.
    pub config_type: &'static str,
    /// Media type of its other blobs.
    pub layer_type: &'static str,
    /// The most blobs that it has.
    pub max_layers: usize,
}

/// An artifact but for its blobs' content.
#[derive(Debug)]
pub struct Artifact {
    /// The digest of its manifest.
    pub digest: super::Digest,
    /// Its configuration, verified.
    pub config: Vec<u8>,
    /// Its blobs, in the manifest's order.
    pub layers: Vec<Blob>,
}

/// The manifest of an artifact; the same blobs give the same bytes.
pub(crate) fn encode_manifest(kind: &ArtifactKind, config: Blob, layers: &[Blob]) -> Vec<u8> {
    let descriptor = |media_type: &str, blob: &Blob| json!({"mediaType": media_type, "digest": blob.digest.to_string(), "size": blob.size});
    let layers: Vec<_> = layers.iter().map(|layer| descriptor(kind.layer_type, layer)).collect();
    let manifest = json!({
        "schemaVersion": 2,
        "mediaType": MANIFEST,
        "artifactType": kind.artifact_type,
        "config": descriptor(kind.config_type, &config),
        "layers": layers,
    });
    manifest.to_string().into_bytes()
}

/// Its configuration and its blobs.
pub(crate) fn parse_artifact(
    bytes: &[u8],
    kind: &ArtifactKind,
    what: &str,
) -> Result<(Blob, Vec<Blob>), RegistryError> {
    let manifest: ImageManifest = parse(bytes, what)?;
    let found = manifest.config().media_type().to_string();
    if found != kind.config_type {
        let found: String = found.chars().take(100).collect();
        return Err(RegistryError::Unsupported {
            what: format!("{what}, which is of type {found:?},"),
            hint: Some("name what was pushed as such"),
        });
    }
    let count = manifest.layers().len();
    if count > kind.max_layers {
        return Err(RegistryError::Malformed {
            what: what.to_owned(),
            reason: format!("it has {count} blobs, the limit is {}", kind.max_layers),
        });
    }
    let layers = manifest.layers().iter().map(|layer| blob(layer, what));
    Ok((blob(manifest.config(), what)?, layers.collect::<Result<_, _>>()?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::registry::Digest;

    const KIND: ArtifactKind = ArtifactKind {
        name: "thing",
        artifact_type: "application/vnd.example.thing",
        config_type: "application/vnd.example.thing+json",
        layer_type: "application/vnd.example.part",
        max_layers: 2,
    };

    fn of(bytes: &[u8]) -> Blob {
        Blob {
            digest: Digest::of(bytes),
            size: bytes.len() as u64,
        }
    }

    #[test]
    fn a_manifest_that_was_written_is_read() {
        let (config, layers) = (of(b"{}"), [of(b"a"), of(b"bc")]);
        let bytes = encode_manifest(&KIND, config, &layers);
        assert_eq!(parse_artifact(&bytes, &KIND, "it").unwrap(), (config, layers.to_vec()));
    }

    #[test]
    fn something_else_and_too_much_of_it_are_refused() {
        let image = String::from_utf8(encode_manifest(&KIND, of(b"{}"), &[])).unwrap();
        let image = image.replace(KIND.config_type, "application/vnd.oci.image.config.v1+json");
        let error = parse_artifact(image.as_bytes(), &KIND, "thing x").unwrap_err();
        assert!(error.to_string().contains("image.config"), "{error}");
        let many = encode_manifest(&KIND, of(b"{}"), &[of(b"a"), of(b"b"), of(b"c")]);
        let error = parse_artifact(&many, &KIND, "thing x").unwrap_err();
        assert!(error.to_string().contains("3 blobs"), "{error}");
        assert!(parse_artifact(b"{}", &KIND, "thing x").is_err());
    }
}
