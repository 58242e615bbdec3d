//! ConfigMaps and Secrets (core/v1) of a manifest, and which of them a pod uses.

use std::collections::{HashMap, HashSet};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use serde_json::Value;

use super::Problem;
use super::env::check_key;
use super::fields::{Field, Findings, Object};
use super::pod::{dns_name, require_word};
use crate::host::{
    ConfigMap, PodMaterials, PodSpec, Secret, env_from, env_source, projected_source, volume::Source as VolumeSource,
};

/// Most that the values of one object have together (Kubernetes' `MaxSecretSize`).
pub const MOST_BYTES: usize = 1 << 20;

/// ConfigMaps and Secrets by namespace and name.
#[derive(Debug, Default, Clone)]
pub struct Objects {
    config_maps: HashMap<(String, String), ConfigMap>,
    secrets: HashMap<(String, String), Secret>,
}

/// Whether a document is one of them, and not a pod.
pub(super) fn is_object(document: &Value) -> bool {
    matches!(
        document.get("kind").and_then(Value::as_str),
        Some("ConfigMap" | "Secret")
    )
}

impl Objects {
    /// Takes a document; one that was there before under the same name goes.
    pub(super) fn add(&mut self, document: Value) -> Result<(), Vec<Problem>> {
        let mut findings = Findings::default();
        let is_secret = document.get("kind").and_then(Value::as_str) == Some("Secret");
        let mut root = Field::root(document).object(&mut findings);
        require_word(&mut root, "apiVersion", "v1", &mut findings);
        require_word(
            &mut root,
            "kind",
            if is_secret { "Secret" } else { "ConfigMap" },
            &mut findings,
        );
        let name = name(&mut root, &mut findings);
        // Both say what an API server may do with the object.
        root.take("type");
        root.take("immutable");
        if is_secret {
            let secret = secret(&mut root, &mut findings);
            self.secrets.insert(name, secret);
        } else {
            let config_map = config_map(&mut root, &mut findings);
            self.config_maps.insert(name, config_map);
        }
        root.finish(&mut findings);
        if findings.problems.is_empty() {
            Ok(())
        } else {
            Err(findings.problems)
        }
    }

    /// Adds those of another manifest.
    pub fn extend(&mut self, other: Self) {
        self.config_maps.extend(other.config_maps);
        self.secrets.extend(other.secrets);
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.config_maps.is_empty() && self.secrets.is_empty()
    }

    /// Those that a pod refers to and that are here; the version is left open.
    #[must_use]
    pub fn materials_of(&self, namespace: &str, spec: &PodSpec) -> PodMaterials {
        let names = Names::of(spec);
        let key = |name: &str| (namespace.to_owned(), name.to_owned());
        let config_maps = names.config_maps.iter().filter_map(|name| {
            let found = self.config_maps.get(&key(name))?;
            Some(((*name).to_owned(), found.clone()))
        });
        let secrets = names.secrets.iter().filter_map(|name| {
            let found = self.secrets.get(&key(name))?;
            Some(((*name).to_owned(), found.clone()))
        });
        PodMaterials {
            config_maps: config_maps.collect(),
            secrets: secrets.collect(),
            ..PodMaterials::default()
        }
    }
}

/// What a pod refers to.
#[derive(Debug, Default)]
struct Names<'a> {
    config_maps: HashSet<&'a str>,
    secrets: HashSet<&'a str>,
}

impl<'a> Names<'a> {
    fn of(spec: &'a PodSpec) -> Self {
        let mut names = Self::default();
        for container in &spec.containers {
            for from in &container.env_from {
                match &from.source {
                    Some(env_from::Source::ConfigMap(object)) => names.config_maps.insert(&object.name),
                    Some(env_from::Source::Secret(object)) => names.secrets.insert(&object.name),
                    None => false,
                };
            }
            let sources = container
                .env
                .iter()
                .filter_map(|variable| variable.source.as_ref()?.source.as_ref());
            for source in sources {
                match source {
                    env_source::Source::ConfigMapKey(key) => names.config_maps.insert(&key.name),
                    env_source::Source::SecretKey(key) => names.secrets.insert(&key.name),
                    env_source::Source::Field(_) | env_source::Source::Resource(_) => false,
                };
            }
        }
        for volume in &spec.volumes {
            let Some(VolumeSource::Projected(projected)) = &volume.source else {
                continue;
            };
            for source in projected.sources.iter().filter_map(|source| source.source.as_ref()) {
                match source {
                    projected_source::Source::ConfigMap(object) => names.config_maps.insert(&object.name),
                    projected_source::Source::Secret(object) => names.secrets.insert(&object.name),
                    projected_source::Source::Downward(_) | projected_source::Source::Token(_) => false,
                };
            }
        }
        names
    }
}

/// Namespace and name.
fn name(root: &mut Object, findings: &mut Findings) -> (String, String) {
    let Some(field) = root.require("metadata", findings) else {
        return Default::default();
    };
    let mut meta = field.object(findings);
    let name = meta
        .require("name", findings)
        .map(|field| dns_name(field, 253, findings))
        .unwrap_or_default();
    let namespace = meta
        .take("namespace")
        .map_or_else(|| "default".into(), |field| dns_name(field, 63, findings));
    // The rest of it describes the object to others.
    (namespace, name)
}

fn config_map(root: &mut Object, findings: &mut Findings) -> ConfigMap {
    let data = entries(root, "data", findings, Field::text);
    let binary_data = entries(root, "binaryData", findings, base64_bytes);
    for key in binary_data.keys().filter(|key| data.contains_key(*key)) {
        findings.invalid(&root.join(&format!("binaryData.{key}")), "is a key of data, too");
    }
    let size = data
        .values()
        .map(String::len)
        .chain(binary_data.values().map(Vec::len))
        .sum();
    check_size(size, "data", findings);
    ConfigMap { data, binary_data }
}

fn secret(root: &mut Object, findings: &mut Findings) -> Secret {
    let mut data = entries(root, "data", findings, base64_bytes);
    // As an API server does it: what is written as text wins.
    data.extend(entries(root, "stringData", findings, |field, findings| {
        field.text(findings).into_bytes()
    }));
    check_size(data.values().map(Vec::len).sum(), "data", findings);
    Secret { data }
}

fn entries<T>(
    root: &mut Object,
    name: &str,
    findings: &mut Findings,
    map: impl Fn(Field, &mut Findings) -> T,
) -> HashMap<String, T> {
    let Some(field) = root.take(name) else {
        return HashMap::new();
    };
    let fields = field.object(findings).into_fields();
    fields
        .into_iter()
        .map(|(key, field)| {
            check_key(&field.path, &key, findings);
            let value = map(field, findings);
            (key, value)
        })
        .collect()
}

fn base64_bytes(field: Field, findings: &mut Findings) -> Vec<u8> {
    let path = field.path.clone();
    let mut text = field.text(findings);
    // Wrapped lines are usual in YAML.
    text.retain(|c| !c.is_ascii_whitespace());
    STANDARD.decode(text).unwrap_or_else(|_| {
        // Not why: that would show a part of it.
        findings.invalid(&path, "is no base64");
        Vec::new()
    })
}

fn check_size(size: usize, path: &str, findings: &mut Findings) {
    if size > MOST_BYTES {
        findings.invalid(path, format!("is {size} bytes long; {MOST_BYTES} are the most"));
    }
}
