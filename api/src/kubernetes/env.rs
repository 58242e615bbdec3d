//! A container's environment: `env`, `envFrom` and what they refer to.

use super::fields::{Field, Findings, Object};
use super::pod::dns_name;
use crate::host::{EnvFrom, EnvSource, EnvVar, KeyRef, ObjectRef, ResourceField, env_from, env_source};

/// Fields that environments can have (Kubernetes, "Downward API").
const OF_ENVIRONMENTS: [&str; 9] = [
    "metadata.name",
    "metadata.namespace",
    "metadata.uid",
    "spec.nodeName",
    "spec.serviceAccountName",
    "status.hostIP",
    "status.hostIPs",
    "status.podIP",
    "status.podIPs",
];
/// And files.
const OF_FILES: [&str; 5] = [
    "metadata.name",
    "metadata.namespace",
    "metadata.uid",
    "metadata.labels",
    "metadata.annotations",
];
const RESOURCES: [&str; 4] = ["limits.cpu", "limits.memory", "requests.cpu", "requests.memory"];
const DIVISORS_OF_MEMORY: [&str; 13] = [
    "1", "1k", "1M", "1G", "1T", "1P", "1E", "1Ki", "1Mi", "1Gi", "1Ti", "1Pi", "1Ei",
];

pub(super) fn variable(field: Field, findings: &mut Findings) -> EnvVar {
    let mut object = field.object(findings);
    let name = object
        .require("name", findings)
        .map(|field| field.text(findings))
        .unwrap_or_default();
    if name.contains('=') || name.contains('\0') {
        findings.invalid(&object.join("name"), format!("{name:?} must not contain '=' or NUL"));
    }
    let value = object.text("value", findings);
    let from = object.take("valueFrom");
    if let (false, Some(from)) = (value.is_empty(), &from) {
        findings.invalid(&from.path, "must not be there beside a value");
    }
    let source = from.and_then(|field| source(field, findings));
    object.finish(findings);
    EnvVar { name, value, source }
}

fn source(field: Field, findings: &mut Findings) -> Option<EnvSource> {
    use env_source::Source;
    let mut object = field.object(findings);
    let before = findings.problems.len();
    let mut found = Vec::new();
    if let Some(field) = object.take("fieldRef") {
        found.push(Source::Field(field_ref(field, &OF_ENVIRONMENTS, findings)));
    }
    if let Some(field) = object.take("resourceFieldRef") {
        found.push(Source::Resource(resource_ref(field, findings)));
    }
    if let Some(field) = object.take("configMapKeyRef") {
        found.push(Source::ConfigMapKey(key_ref(field, findings)));
    }
    if let Some(field) = object.take("secretKeyRef") {
        found.push(Source::SecretKey(key_ref(field, findings)));
    }
    let path = object.path.clone();
    object.finish(findings);
    if found.len() != 1 && findings.problems.len() == before {
        let kinds = "fieldRef, resourceFieldRef, configMapKeyRef, secretKeyRef";
        findings.invalid(&path, format!("must have exactly one of {kinds}"));
    }
    let source = found.pop();
    source.map(|source| EnvSource { source: Some(source) })
}

/// The path of a field of the pod: one of `plain`, or a label or annotation.
fn field_ref(field: Field, plain: &[&str], findings: &mut Findings) -> String {
    let mut object = field.object(findings);
    object.only("apiVersion", &["v1"], findings);
    let path = object.join("fieldPath");
    let field_path = object
        .require("fieldPath", findings)
        .map(|field| field.text(findings))
        .unwrap_or_default();
    object.finish(findings);
    let of_map = |map: &str| {
        let key = field_path.strip_prefix(map)?.strip_prefix("['")?.strip_suffix("']")?;
        (!key.is_empty()).then_some(())
    };
    let known = plain.contains(&field_path.as_str())
        || of_map("metadata.labels")
            .or_else(|| of_map("metadata.annotations"))
            .is_some();
    if !known && !field_path.is_empty() {
        let rule = "metadata.labels['KEY'] or metadata.annotations['KEY']";
        findings.unsupported(&path, format!("{field_path:?} is none of {}, {rule}", plain.join(", ")));
    }
    field_path
}

/// The field of a file of a downward API volume.
pub(super) fn file_field_ref(field: Field, findings: &mut Findings) -> String {
    field_ref(field, &OF_FILES, findings)
}

pub(super) fn resource_ref(field: Field, findings: &mut Findings) -> ResourceField {
    let mut object = field.object(findings);
    let path = object.join("resource");
    let resource = object
        .require("resource", findings)
        .map(|field| field.text(findings))
        .unwrap_or_default();
    if !RESOURCES.contains(&resource.as_str()) && !resource.is_empty() {
        findings.unsupported(&path, format!("{resource:?} is none of {}", RESOURCES.join(", ")));
    }
    let of = ResourceField {
        container: object.text("containerName", findings),
        divisor: divisor(&mut object, &resource, findings),
        resource,
    };
    object.finish(findings);
    of
}

/// In the units that the resource is counted in; 0 if it is not said, or said to be 0, which means the same.
fn divisor(object: &mut Object, resource: &str, findings: &mut Findings) -> u64 {
    let Some(field) = object.take("divisor") else { return 0 };
    let path = field.path.clone();
    let Some(quantity) = field.quantity(findings) else {
        return 0;
    };
    let of_cpu = resource.ends_with(".cpu");
    let units = if of_cpu { quantity.milli() } else { quantity.units() };
    let known = match of_cpu {
        true => [0, 1, 1000].contains(&quantity.milli()),
        false => units == 0 || DIVISORS_OF_MEMORY.iter().any(|known| known.parse() == Ok(quantity)),
    };
    if !known {
        let choice = if of_cpu {
            "1m or 1".to_owned()
        } else {
            DIVISORS_OF_MEMORY.join(", ")
        };
        findings.invalid(&path, format!("must be {choice}"));
    }
    units
}

fn key_ref(field: Field, findings: &mut Findings) -> KeyRef {
    let mut object = field.object(findings);
    let reference = KeyRef {
        name: object_name(&mut object, findings),
        key: object
            .require("key", findings)
            .map(|field| key(field, findings))
            .unwrap_or_default(),
        optional: object.boolean("optional", findings),
    };
    object.finish(findings);
    reference
}

pub(super) fn from(field: Field, findings: &mut Findings) -> EnvFrom {
    use env_from::Source;
    let mut object = field.object(findings);
    let prefix = object.text("prefix", findings);
    if prefix.contains('=') || prefix.contains('\0') {
        findings.invalid(
            &object.join("prefix"),
            format!("{prefix:?} must not contain '=' or NUL"),
        );
    }
    let before = findings.problems.len();
    let mut found = Vec::new();
    if let Some(field) = object.take("configMapRef") {
        found.push(Source::ConfigMap(object_ref(field, findings)));
    }
    if let Some(field) = object.take("secretRef") {
        found.push(Source::Secret(object_ref(field, findings)));
    }
    let path = object.path.clone();
    object.finish(findings);
    if found.len() != 1 && findings.problems.len() == before {
        findings.invalid(&path, "must have exactly one of configMapRef, secretRef");
    }
    EnvFrom {
        prefix,
        source: found.pop(),
    }
}

fn object_ref(field: Field, findings: &mut Findings) -> ObjectRef {
    let mut object = field.object(findings);
    let reference = ObjectRef {
        name: object_name(&mut object, findings),
        optional: object.boolean("optional", findings),
    };
    object.finish(findings);
    reference
}

/// The name of a configMap or secret.
pub(super) fn object_name(object: &mut Object, findings: &mut Findings) -> String {
    object
        .require("name", findings)
        .map(|field| dns_name(field, 253, findings))
        .unwrap_or_default()
}

/// A key of a configMap or secret.
pub(super) fn key(field: Field, findings: &mut Findings) -> String {
    let path = field.path.clone();
    let key = field.text(findings);
    check_key(&path, &key, findings);
    key
}

pub(super) fn check_key(path: &str, key: &str, findings: &mut Findings) {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
    if !(1..=253).contains(&key.len()) || !key.bytes().all(plain) || key == "." || key.starts_with("..") {
        let short: String = key.chars().take(64).collect();
        let rule = "a key has 1 to 253 of a-z A-Z 0-9 - _ . and does not begin with '..'";
        findings.invalid(path, format!("{short:?}: {rule}"));
    }
}
