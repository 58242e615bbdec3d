//! Environments, volumes, mounts and materials.

use std::collections::HashSet;

use flint_api::host::{self, env_from, env_source, projected_source, volume::Source};

use super::{
    super::{
        environment::entry,
        materials::{MOST, MOST_OF_ONE},
    },
    LABEL, Report, Violation, is_label, is_path, is_subdomain,
};

/// Longest `NAME=value` of Linux (`MAX_ARG_STRLEN`, less its final zero).
const LONGEST_VARIABLE: usize = (128 << 10) - 1;
/// Most volumes of a pod, and mounts of a container.
const MOST_VOLUMES: usize = 256;
const RESOURCES: [&str; 4] = ["limits.cpu", "limits.memory", "requests.cpu", "requests.memory"];
const FIELDS: [&str; 9] = [
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
const FILE_FIELDS: [&str; 5] = [
    "metadata.name",
    "metadata.namespace",
    "metadata.uid",
    "metadata.labels",
    "metadata.annotations",
];

const NAME: &str = "must be a DNS name: labels of [a-z0-9-], joined by dots";
const KEY: &str = "must be 1 to 253 characters of [-._a-zA-Z0-9] that do not begin with '..'";
const FILE_PATH: &str = "must be a relative path without '..', of parts of 1 to 255 bytes";
const MODE: &str = "must be permissions, 0 to 0777";

/// Everything that is wrong with a pod's materials.
pub fn materials(materials: &host::PodMaterials) -> Vec<Violation> {
    let mut report = Report::default();
    let mut total = 0_usize;
    let mut object = |kind: &str, name: &str, keys: Vec<&String>, size: usize, report: &mut Report| {
        let short: String = name.chars().take(64).collect();
        let path = format!("materials.{kind}[{short:?}]");
        report.check(is_subdomain(name), &path, NAME);
        for key in keys.into_iter().filter(|key| !is_key(key)) {
            let key: String = key.chars().take(64).collect();
            report.wrong(format!("{path}.data[{key:?}]"), KEY);
        }
        report.check(
            size <= MOST_OF_ONE,
            &path,
            &format!("has {size} bytes; {MOST_OF_ONE} are the most"),
        );
        total = total.saturating_add(size);
    };
    for (name, map) in &materials.config_maps {
        let size = map
            .data
            .values()
            .map(String::len)
            .chain(map.binary_data.values().map(Vec::len))
            .sum();
        let keys = map.data.keys().chain(map.binary_data.keys()).collect();
        object("config_maps", name, keys, size, &mut report);
    }
    for (name, secret) in &materials.secrets {
        let size = secret.data.values().map(Vec::len).sum();
        object("secrets", name, secret.data.keys().collect(), size, &mut report);
    }
    total = total.saturating_add(materials.service_account_tokens.values().map(Vec::len).sum());
    report.check(
        total <= MOST,
        "materials",
        &format!("have {total} bytes together; {MOST} are the most"),
    );
    report.0
}

pub(super) fn volumes<'a>(spec: &'a host::PodSpec, report: &mut Report) -> HashSet<&'a str> {
    let mut names = HashSet::new();
    let count = spec.volumes.len();
    report.check(
        count <= MOST_VOLUMES,
        "spec.volumes",
        &format!("must have at most {MOST_VOLUMES} volumes, has {count}"),
    );
    for (index, volume) in spec.volumes.iter().enumerate().take(MOST_VOLUMES) {
        let path = format!("spec.volumes[{index}]");
        report.check(is_label(&volume.name), format!("{path}.name"), LABEL);
        report.check(
            names.insert(volume.name.as_str()),
            format!("{path}.name"),
            "must differ from those before it",
        );
        match &volume.source {
            Some(Source::EmptyDir(dir)) if dir.size_limit_bytes > 0 && !dir.memory => report.unsupported(
                format!("{path}.empty_dir.size_limit_bytes"),
                "can be kept to in memory only (medium: Memory)",
            ),
            Some(Source::EmptyDir(_)) => {}
            Some(Source::Projected(projected)) => {
                self::projected(projected, spec, &format!("{path}.projected"), report);
            }
            None => report.unsupported(
                format!("{path}.source"),
                "has a kind of source that this flintd does not know",
            ),
        }
    }
    names
}

fn projected(projected: &host::Projected, spec: &host::PodSpec, path: &str, report: &mut Report) {
    report.check(is_mode(projected.default_mode), format!("{path}.default_mode"), MODE);
    let mut seen = HashSet::new();
    for (index, source) in projected.sources.iter().enumerate() {
        let path = format!("{path}.sources[{index}]");
        match &source.source {
            Some(projected_source::Source::ConfigMap(object)) => {
                self::object(object, &format!("{path}.config_map"), &mut seen, report);
            }
            Some(projected_source::Source::Secret(object)) => {
                self::object(object, &format!("{path}.secret"), &mut seen, report);
            }
            Some(projected_source::Source::Downward(files)) => {
                for (index, file) in files.items.iter().enumerate() {
                    downward(
                        file,
                        spec,
                        &format!("{path}.downward.items[{index}]"),
                        &mut seen,
                        report,
                    );
                }
            }
            Some(projected_source::Source::Token(token)) => {
                file_path(&token.path, &format!("{path}.token.path"), &mut seen, report);
            }
            None => report.unsupported(path, "has a kind of source that this flintd does not know"),
        }
    }
}

fn object<'a>(object: &'a host::ProjectedObject, path: &str, seen: &mut HashSet<&'a str>, report: &mut Report) {
    report.check(is_subdomain(&object.name), format!("{path}.name"), NAME);
    for (index, item) in object.items.iter().enumerate() {
        let path = format!("{path}.items[{index}]");
        report.check(is_key(&item.key), format!("{path}.key"), KEY);
        report.check(is_mode(item.mode), format!("{path}.mode"), MODE);
        file_path(&item.path, &format!("{path}.path"), seen, report);
    }
}

fn downward<'a>(
    file: &'a host::DownwardFile,
    spec: &host::PodSpec,
    path: &str,
    seen: &mut HashSet<&'a str>,
    report: &mut Report,
) {
    use host::downward_file::Source;
    file_path(&file.path, &format!("{path}.path"), seen, report);
    report.check(is_mode(file.mode), format!("{path}.mode"), MODE);
    match &file.source {
        Some(Source::Field(field)) => check_field(field, &FILE_FIELDS, &format!("{path}.field"), report),
        Some(Source::Resource(resource)) => check_resource(resource, spec, false, &format!("{path}.resource"), report),
        None => report.unsupported(path, "has a kind of source that this flintd does not know"),
    }
}

fn file_path<'a>(file: &'a str, path: &str, seen: &mut HashSet<&'a str>, report: &mut Report) {
    let part = |part: &str| (1..=255).contains(&part.len()) && part != "." && part != "..";
    let right = !file.starts_with("..") && !file.contains('\0') && file.len() <= 4095 && file.split('/').all(part);
    report.check(right, path, FILE_PATH);
    report.check(seen.insert(file), path, "must differ from those before it");
}

pub(super) fn environment(container: &host::Container, spec: &host::PodSpec, path: &str, report: &mut Report) {
    for (index, from) in container.env_from.iter().enumerate() {
        let path = format!("{path}.env_from[{index}]");
        let prefix = &from.prefix;
        report.check(
            !prefix.contains(['=', '\0']) && prefix.len() <= 4096,
            format!("{path}.prefix"),
            "must be without '=' and NUL",
        );
        match &from.source {
            Some(env_from::Source::ConfigMap(object)) => {
                report.check(is_subdomain(&object.name), format!("{path}.config_map.name"), NAME);
            }
            Some(env_from::Source::Secret(object)) => {
                report.check(is_subdomain(&object.name), format!("{path}.secret.name"), NAME);
            }
            None => report.unsupported(path, "has a kind of source that this flintd does not know"),
        }
    }
    for (index, variable) in container.env.iter().enumerate() {
        self::variable(variable, spec, &format!("{path}.env[{index}]"), report);
    }
}

fn variable(variable: &host::EnvVar, spec: &host::PodSpec, path: &str, report: &mut Report) {
    let name = !variable.name.is_empty() && !variable.name.contains(['=', '\0']);
    report.check(name, format!("{path}.name"), "must be non-empty, without '=' and NUL");
    report.check(
        !variable.value.contains('\0'),
        format!("{path}.value"),
        "must not contain NUL",
    );
    let length = variable.name.len().saturating_add(variable.value.len());
    report.check(
        length < LONGEST_VARIABLE,
        format!("{path}.value"),
        "must be shorter than 128 KiB with its name: Linux takes no longer variables",
    );
    let Some(source) = &variable.source else { return };
    report.check(
        variable.value.is_empty(),
        format!("{path}.source"),
        "must not be there beside a value",
    );
    match &source.source {
        Some(env_source::Source::Field(field)) => check_field(field, &FIELDS, &format!("{path}.source.field"), report),
        Some(env_source::Source::Resource(resource)) => {
            check_resource(resource, spec, true, &format!("{path}.source.resource"), report);
        }
        Some(env_source::Source::ConfigMapKey(key)) => {
            check_key(key, &format!("{path}.source.config_map_key"), report);
        }
        Some(env_source::Source::SecretKey(key)) => check_key(key, &format!("{path}.source.secret_key"), report),
        None => report.unsupported(format!("{path}.source"), "is of a kind that this flintd does not know"),
    }
}

fn check_key(key: &host::KeyRef, path: &str, report: &mut Report) {
    report.check(is_subdomain(&key.name), format!("{path}.name"), NAME);
    report.check(is_key(&key.key), format!("{path}.key"), KEY);
}

fn check_field(field: &str, known: &[&str], path: &str, report: &mut Report) {
    if !known.contains(&field) && entry(field).is_none() {
        report.unsupported(path, "is no field that this flintd can tell");
    }
}

fn check_resource(resource: &host::ResourceField, spec: &host::PodSpec, own: bool, path: &str, report: &mut Report) {
    let named = &resource.container;
    let known = spec.containers.iter().any(|container| container.name == *named);
    report.check(
        known || (own && named.is_empty()),
        format!("{path}.container"),
        "must be a container of the pod",
    );
    if !RESOURCES.contains(&resource.resource.as_str()) {
        report.unsupported(format!("{path}.resource"), "is no resource that this flintd can tell");
    }
}

pub(super) fn mounts(container: &host::Container, path: &str, volumes: &HashSet<&str>, report: &mut Report) {
    let mut destinations = HashSet::new();
    let count = container.volume_mounts.len();
    report.check(
        count <= MOST_VOLUMES,
        format!("{path}.volume_mounts"),
        &format!("must be at most {MOST_VOLUMES}, are {count}"),
    );
    for (index, mount) in container.volume_mounts.iter().enumerate().take(MOST_VOLUMES) {
        let path = format!("{path}.volume_mounts[{index}]");
        report.check(
            volumes.contains(mount.name.as_str()),
            format!("{path}.name"),
            "must name one of spec.volumes",
        );
        let right = is_path(&mount.mount_path) && mount.mount_path != "/" && mount.mount_path.len() <= 4095;
        report.check(
            right,
            format!("{path}.mount_path"),
            "must be an absolute path without '..', and not the root",
        );
        report.check(
            destinations.insert(mount.mount_path.trim_end_matches('/')),
            format!("{path}.mount_path"),
            "must be unique",
        );
        let sub_path = &mount.sub_path;
        let climbs = sub_path.starts_with('/') || sub_path.split('/').any(|part| part == "..");
        report.check(
            !climbs && !sub_path.contains('\0') && sub_path.len() <= 4095,
            format!("{path}.sub_path"),
            "must be a relative path without '..'",
        );
    }
}

fn is_key(key: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
    (1..=253).contains(&key.len()) && key.bytes().all(plain) && key != "." && !key.starts_with("..")
}

fn is_mode(mode: Option<u32>) -> bool {
    mode.is_none_or(|mode| mode <= 0o777)
}

#[cfg(test)]
#[path = "files_tests.rs"]
mod tests;
