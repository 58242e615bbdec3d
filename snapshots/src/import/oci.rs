//! OCI image layouts (image spec, "Image Layout").

use super::files::Files;
use super::{Archive, ImportError, LayerFile};
use crate::registry::{Choice, Digest, Document, ImageReference, Limits, Manifest, parse_config, parse_document};

/// Opens the image in a layout. An index of several platforms counts as one image.
pub(crate) fn open(files: &Files, limits: &Limits) -> Result<Archive, ImportError> {
    let bytes = files.read("index.json", limits.manifest_bytes)?;
    let Document::Index(choices) = parse_document(&bytes, "index.json", limits)? else {
        return Err(ImportError::Missing("image index in index.json".to_owned()));
    };
    let choice = match &choices[..] {
        [] => return Err(ImportError::Missing("image".to_owned())),
        [only] => only,
        [first, rest @ ..] if rest.iter().all(|other| other.digest == first.digest) => first,
        several
            if several
                .iter()
                .all(|choice| choice.platform.is_some() && choice.name == several[0].name) =>
        {
            let digest = Choice::pick(several, "the layout")?;
            several
                .iter()
                .find(|choice| choice.digest == digest)
                .unwrap_or(&several[0])
        }
        several => return Err(ImportError::Several(several.len())),
    };
    let names = choices
        .iter()
        .filter(|other| other.digest == choice.digest)
        .filter_map(|choice| choice.name.as_deref());
    // A bare tag ("1.0") is no name of an image.
    let names = names
        .filter(|name| name.contains([':', '/']))
        .filter_map(|name| name.parse::<ImageReference>().ok());
    let mut names: Vec<_> = names.map(|name| name.to_string()).collect();
    names.dedup();
    let (digest, manifest) = manifest(files, choice.digest, limits)?;
    let config = blob(files, manifest.config.digest, limits.config_bytes, "the configuration")?;
    let (config, diff_ids) = parse_config(&config, manifest.layers.len(), "the layout's image")?;
    let layers = manifest.layers.iter().map(|layer| {
        let section = files.section(&path(layer.digest))?;
        Ok(LayerFile {
            digest: Some(layer.digest),
            size: layer.size,
            section,
        })
    });
    let layers = layers.collect::<Result<_, ImportError>>()?;
    Ok(Archive {
        digest,
        names,
        config,
        diff_ids,
        layers,
    })
}

fn manifest(files: &Files, digest: Digest, limits: &Limits) -> Result<(Digest, Manifest), ImportError> {
    let read = |digest| blob(files, digest, limits.manifest_bytes, "the manifest");
    match parse_document(&read(digest)?, "the manifest", limits)? {
        Document::Manifest(manifest) => Ok((digest, manifest)),
        Document::Index(choices) => {
            let digest = Choice::pick(&choices, "the layout's image")?;
            match parse_document(&read(digest)?, "the manifest", limits)? {
                Document::Manifest(manifest) => Ok((digest, manifest)),
                Document::Index(_) => Err(ImportError::Missing("manifest, only indexes".to_owned())),
            }
        }
    }
}

fn path(digest: Digest) -> String {
    format!("blobs/sha256/{}", digest.hex())
}

fn blob(files: &Files, expected: Digest, limit: u64, what: &str) -> Result<Vec<u8>, ImportError> {
    let bytes = files.read(&path(expected), limit)?;
    match Digest::of(&bytes) {
        found if found == expected => Ok(bytes),
        found => Err(ImportError::Altered {
            what: what.to_owned(),
            expected,
            found,
        }),
    }
}
