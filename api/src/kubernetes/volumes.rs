//! Volumes and their mounts.

use super::env::{file_field_ref, key, object_name, resource_ref};
use super::fields::{Field, Findings, Object};
use super::pod::{absolute, dns_name, list};
use crate::host::{
    DownwardFile, DownwardFiles, EmptyDir, KeyToPath, Projected, ProjectedObject, ProjectedSource, TokenFile, Volume,
    VolumeMount, downward_file, projected_source, volume,
};

/// Of permissions: setuid and its like are not for such files.
const MODES: std::ops::RangeInclusive<u64> = 0..=0o777;
/// Kubernetes' shortest and longest life of a token.
const EXPIRATIONS: std::ops::RangeInclusive<u64> = 600..=1 << 32;

pub(super) fn volume(field: Field, findings: &mut Findings) -> Volume {
    let mut object = field.object(findings);
    let name = object
        .require("name", findings)
        .map(|field| dns_name(field, 63, findings))
        .unwrap_or_default();
    let before = findings.problems.len();
    let mut sources = Vec::new();
    for kind in ["emptyDir", "configMap", "secret", "downwardAPI", "projected"] {
        if let Some(field) = object.take(kind) {
            sources.push(source(kind, field, findings));
        }
    }
    let path = object.path.clone();
    object.finish(findings);
    if findings.problems.len() == before {
        match sources.len() {
            0 => findings.invalid(&path, "has no source; write for example emptyDir: {}"),
            1 => {}
            _ => findings.invalid(&path, "has more than one source"),
        }
    }
    Volume {
        name,
        source: sources.pop(),
    }
}

fn source(kind: &str, field: Field, findings: &mut Findings) -> volume::Source {
    use projected_source::Source;
    let mut object = field.object(findings);
    if kind == "emptyDir" {
        return empty_dir(object, findings);
    }
    let default_mode = mode(&mut object, "defaultMode", findings);
    let sources = match kind {
        "configMap" => vec![Source::ConfigMap(projected_object(&mut object, "name", findings))],
        "secret" => vec![Source::Secret(projected_object(&mut object, "secretName", findings))],
        "downwardAPI" => vec![Source::Downward(downward(&mut object, findings))],
        _ => list(&mut object, "sources", findings, projected_source)
            .into_iter()
            .flatten()
            .collect(),
    };
    object.finish(findings);
    let sources = sources
        .into_iter()
        .map(|source| ProjectedSource { source: Some(source) });
    volume::Source::Projected(Projected {
        sources: sources.collect(),
        default_mode,
    })
}

fn empty_dir(mut object: Object, findings: &mut Findings) -> volume::Source {
    let medium = object
        .take("medium")
        .and_then(|field| field.word(&[("", false), ("Memory", true)], findings));
    let limit = object.take("sizeLimit").and_then(|field| field.quantity(findings));
    object.finish(findings);
    volume::Source::EmptyDir(EmptyDir {
        memory: medium.unwrap_or_default(),
        size_limit_bytes: limit.map(super::Quantity::units).unwrap_or_default(),
    })
}

fn projected_source(field: Field, findings: &mut Findings) -> Option<projected_source::Source> {
    use projected_source::Source;
    let mut object = field.object(findings);
    let before = findings.problems.len();
    let mut found = Vec::new();
    let mut take = |kind: &str, findings: &mut Findings, map: fn(&mut Object, &mut Findings) -> Source| {
        if let Some(field) = object.take(kind) {
            let mut inner = field.object(findings);
            found.push(map(&mut inner, findings));
            inner.finish(findings);
        }
    };
    take("configMap", findings, |object, findings| {
        Source::ConfigMap(projected_object(object, "name", findings))
    });
    take("secret", findings, |object, findings| {
        Source::Secret(projected_object(object, "name", findings))
    });
    take("downwardAPI", findings, |object, findings| {
        Source::Downward(downward(object, findings))
    });
    take("serviceAccountToken", findings, |object, findings| {
        Source::Token(token(object, findings))
    });
    let path = object.path.clone();
    object.finish(findings);
    if found.len() != 1 && findings.problems.len() == before {
        let kinds = "configMap, secret, downwardAPI, serviceAccountToken";
        findings.invalid(&path, format!("must have exactly one of {kinds}"));
    }
    found.pop()
}

fn projected_object(object: &mut Object, name: &str, findings: &mut Findings) -> ProjectedObject {
    let name = if name == "name" {
        object_name(object, findings)
    } else {
        object
            .require(name, findings)
            .map(|field| dns_name(field, 253, findings))
            .unwrap_or_default()
    };
    ProjectedObject {
        name,
        items: list(object, "items", findings, key_to_path),
        optional: object.boolean("optional", findings),
    }
}

fn key_to_path(field: Field, findings: &mut Findings) -> KeyToPath {
    let mut object = field.object(findings);
    let item = KeyToPath {
        key: object
            .require("key", findings)
            .map(|field| key(field, findings))
            .unwrap_or_default(),
        path: file_path(&mut object, findings),
        mode: mode(&mut object, "mode", findings),
    };
    object.finish(findings);
    item
}

fn downward(object: &mut Object, findings: &mut Findings) -> DownwardFiles {
    DownwardFiles {
        items: list(object, "items", findings, downward_file),
    }
}

fn downward_file(field: Field, findings: &mut Findings) -> DownwardFile {
    use downward_file::Source;
    let mut object = field.object(findings);
    let path = file_path(&mut object, findings);
    let mode = mode(&mut object, "mode", findings);
    let before = findings.problems.len();
    let mut found = Vec::new();
    if let Some(field) = object.take("fieldRef") {
        found.push(Source::Field(file_field_ref(field, findings)));
    }
    if let Some(field) = object.take("resourceFieldRef") {
        let whose = format!("{}.containerName", field.path);
        let resource = resource_ref(field, findings);
        if resource.container.is_empty() {
            findings.invalid(&whose, "is required in a volume");
        }
        found.push(Source::Resource(resource));
    }
    let at = object.path.clone();
    object.finish(findings);
    if found.len() != 1 && findings.problems.len() == before {
        findings.invalid(&at, "must have exactly one of fieldRef, resourceFieldRef");
    }
    DownwardFile {
        path,
        mode,
        source: found.pop(),
    }
}

fn token(object: &mut Object, findings: &mut Findings) -> TokenFile {
    TokenFile {
        path: file_path(object, findings),
        audience: object.text("audience", findings),
        expiration_seconds: object
            .take("expirationSeconds")
            .map(|field| field.number(EXPIRATIONS, findings))
            .unwrap_or_default(),
    }
}

/// Permissions; a number, as JSON has no octal ones. YAML's 0644 is read as octal.
fn mode(object: &mut Object, name: &str, findings: &mut Findings) -> Option<u32> {
    let number = object.take(name)?.number(MODES, findings);
    u32::try_from(number).ok()
}

/// Where a file stands in a volume: relative, and not among the volume's own names, which begin with `..`.
fn file_path(object: &mut Object, findings: &mut Findings) -> String {
    let Some(field) = object.require("path", findings) else {
        return String::new();
    };
    let at = field.path.clone();
    let path = field.text(findings);
    if path.is_empty() || path.starts_with("..") {
        findings.invalid(&at, "must be a path that does not begin with '..'");
    } else {
        relative(&at, &path, findings);
    }
    path
}

fn relative(at: &str, path: &str, findings: &mut Findings) {
    let climbs = path.split('/').any(|part| part == "..");
    if path.starts_with('/') || climbs || path.contains('\0') || path.len() > 4095 {
        let short: String = path.chars().take(64).collect();
        findings.invalid(at, format!("{short:?} must be a relative path without '..'"));
    }
}

pub(super) fn mount(field: Field, findings: &mut Findings) -> VolumeMount {
    let mut object = field.object(findings);
    let (sub_path, expression) = (object.take("subPath"), object.take("subPathExpr"));
    if let (Some(_), Some(expression)) = (&sub_path, &expression) {
        findings.invalid(&expression.path, "must not be there beside subPath");
    }
    let expand_sub_path = expression.is_some();
    let sub_path = expression.or(sub_path).map(|field| {
        let at = field.path.clone();
        let path = field.text(findings);
        relative(&at, &path, findings);
        path
    });
    let mount = VolumeMount {
        name: object
            .require("name", findings)
            .map(|field| field.text(findings))
            .unwrap_or_default(),
        mount_path: object
            .require("mountPath", findings)
            .map(|field| absolute(field, findings))
            .unwrap_or_default(),
        read_only: object.boolean("readOnly", findings),
        sub_path: sub_path.unwrap_or_default(),
        expand_sub_path,
    };
    object.only("recursiveReadOnly", &["Disabled"], findings);
    object.only("mountPropagation", &["None"], findings);
    object.finish(findings);
    mount
}
