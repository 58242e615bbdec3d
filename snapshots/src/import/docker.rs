//! What `docker save` writes: manifest.json, a configuration, layers; no manifest of a registry.

use serde::Deserialize;

use super::files::Files;
use super::{Archive, ImportError, LayerFile};
use crate::registry::{Blob, Digest, ImageReference, Limits, RegistryError, check_layers, parse_config};

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Saved {
    config: String,
    #[serde(default)]
    repo_tags: Option<Vec<String>>,
    layers: Vec<String>,
}

/// Opens the image in a docker archive.
pub(crate) fn open(files: &Files, limits: &Limits) -> Result<Archive, ImportError> {
    let bytes = files.read("manifest.json", limits.manifest_bytes)?;
    let saved: Vec<Saved> = serde_json::from_slice(&bytes).map_err(|error| RegistryError::Malformed {
        what: "manifest.json".to_owned(),
        reason: error.to_string(),
    })?;
    let [saved] = &saved[..] else {
        return Err(ImportError::Several(saved.len()));
    };
    let config_bytes = files.read(&saved.config, limits.config_bytes)?;
    let (config, diff_ids) = parse_config(&config_bytes, saved.layers.len(), "the saved image")?;
    let layers = saved.layers.iter().map(|name| {
        let section = files.section(name)?;
        Ok(LayerFile {
            digest: None,
            size: section.len,
            section,
        })
    });
    let layers: Vec<_> = layers.collect::<Result<_, ImportError>>()?;
    let blobs: Vec<_> = layers
        .iter()
        .zip(&diff_ids)
        .map(|(layer, diff_id)| Blob {
            digest: *diff_id,
            size: layer.size,
        })
        .collect();
    check_layers(&blobs, "the saved image", limits)?;
    let names = saved
        .repo_tags
        .iter()
        .flatten()
        .filter_map(|name| name.parse::<ImageReference>().ok());
    let names = names.map(|name| name.to_string()).collect();
    Ok(Archive {
        digest: digest(&config_bytes, &blobs),
        names,
        config,
        diff_ids,
        layers,
    })
}

/// The digest of the manifest that this image would have in a registry with its layers uncompressed. The image needs a
/// digest as its identity, and the same archive has to give the same one.
fn digest(config: &[u8], layers: &[Blob]) -> Digest {
    let layers: Vec<_> = layers
        .iter()
        .map(|layer| serde_json::json!({"mediaType": "application/vnd.oci.image.layer.v1.tar", "digest": layer.digest, "size": layer.size}))
        .collect();
    let manifest = serde_json::json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": {"mediaType": "application/vnd.oci.image.config.v1+json", "digest": Digest::of(config), "size": config.len()},
        "layers": layers,
    });
    Digest::of(manifest.to_string().as_bytes())
}
