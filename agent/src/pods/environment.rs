//! Kubernetes' environment and projected volumes, in the guest's terms.
//!
//! What the pod is (its name, address, resources) is told here, as text; what it was given (configMaps, secrets) only its guest
//! knows for sure, and resolves itself.

use std::{
    collections::{BTreeMap, HashMap},
    net::{IpAddr, UdpSocket},
};

use flint_api::{guest, host};

use super::admission::Size;

/// Permissions of a projected file that nobody says, as Kubernetes has them.
const DEFAULT_MODE: u32 = 0o644;

/// What a pod is, for itself to see.
pub(super) struct Downward<'a> {
    pub(super) meta: &'a host::PodMeta,
    pub(super) spec: &'a host::PodSpec,
    /// Of the pod, as it is now: a clone's are its own.
    pub(super) addresses: &'a [String],
    /// Of its sandbox.
    pub(super) size: Size,
}

impl Downward<'_> {
    /// The environment of a container. `image_args` of its arguments are the image's.
    pub(super) fn environment(&self, container: &host::Container, image_args: usize) -> guest::Environment {
        let from = |from: &host::EnvFrom| {
            let (object, secret) = match from.source.as_ref()? {
                host::env_from::Source::ConfigMap(object) => (object, false),
                host::env_from::Source::Secret(object) => (object, true),
            };
            Some(guest::EnvFrom {
                prefix: from.prefix.clone(),
                name: object.name.clone(),
                secret,
                optional: object.optional,
            })
        };
        let variable = |variable: &host::EnvVar| guest::EnvVar {
            name: variable.name.clone(),
            source: Some(self.source(variable, container)),
        };
        guest::Environment {
            namespace: self.meta.namespace.clone(),
            from: container.env_from.iter().filter_map(from).collect(),
            variables: container.env.iter().map(variable).collect(),
            expand_args_from: u32::try_from(image_args).unwrap_or(u32::MAX),
        }
    }

    fn source(&self, variable: &host::EnvVar, own: &host::Container) -> guest::env_var::Source {
        use guest::env_var::Source;
        use host::env_source::Source as Wanted;
        let key = |key: &host::KeyRef| guest::KeyRef {
            name: key.name.clone(),
            key: key.key.clone(),
            optional: key.optional,
        };
        match variable.source.as_ref().and_then(|source| source.source.as_ref()) {
            // As a kubelet has it, a value goes before a source; there cannot be both.
            _ if !variable.value.is_empty() => Source::Value(variable.value.clone()),
            None => Source::Value(String::new()),
            Some(Wanted::Field(path)) => Source::Literal(self.field(path).unwrap_or_default()),
            Some(Wanted::Resource(resource)) => Source::Literal(self.resource(resource, Some(own))),
            Some(Wanted::ConfigMapKey(wanted)) => Source::ConfigMapKey(key(wanted)),
            Some(Wanted::SecretKey(wanted)) => Source::SecretKey(key(wanted)),
        }
    }

    /// A field by its path; `None` for one that is unknown.
    pub(super) fn field(&self, path: &str) -> Option<String> {
        let Self { meta, spec, .. } = self;
        Some(match path {
            "metadata.name" => meta.name.clone(),
            "metadata.namespace" => meta.namespace.clone(),
            "metadata.uid" => meta.uid.clone(),
            "metadata.labels" => lines(&meta.labels),
            "metadata.annotations" => lines(&meta.annotations),
            "spec.nodeName" if spec.node_name.is_empty() => host_name(),
            "spec.nodeName" => spec.node_name.clone(),
            "spec.serviceAccountName" if spec.service_account_name.is_empty() => "default".to_owned(),
            "spec.serviceAccountName" => spec.service_account_name.clone(),
            "status.hostIP" => self.host_ips().into_iter().next().unwrap_or_default(),
            "status.hostIPs" => self.host_ips().join(","),
            "status.podIP" => self.addresses.first().cloned().unwrap_or_default(),
            "status.podIPs" => self.addresses.join(","),
            _ => {
                let (map, key) = entry(path)?;
                let map = if map == "metadata.labels" {
                    &meta.labels
                } else {
                    &meta.annotations
                };
                map.get(key).cloned().unwrap_or_default()
            }
        })
    }

    fn host_ips(&self) -> Vec<String> {
        if self.spec.host_ips.is_empty() {
            host_address().into_iter().map(|address| address.to_string()).collect()
        } else {
            self.spec.host_ips.clone()
        }
    }

    fn resource(&self, wanted: &host::ResourceField, own: Option<&host::Container>) -> String {
        let named = self
            .spec
            .containers
            .iter()
            .find(|container| container.name == wanted.container);
        let resources = named
            .or(own)
            .and_then(|container| container.resources)
            .unwrap_or_default();
        let cpus = u64::from(self.size.vcpus).saturating_mul(1000);
        let (amount, unit) = match wanted.resource.as_str() {
            "limits.cpu" => (or(resources.cpu_limit_milli, cpus), 1000),
            // What is not requested is nothing; a limit without a request is one, which the client has made it.
            "requests.cpu" => (resources.cpu_request_milli, 1000),
            "limits.memory" => (or(resources.memory_limit_bytes, self.size.memory_bytes), 1),
            _ => (resources.memory_request_bytes, 1),
        };
        amount.div_ceil(or(wanted.divisor, unit)).to_string()
    }

    /// The pod's projected volumes.
    pub(super) fn volumes(&self) -> Vec<guest::ProjectedVolume> {
        let projected = self.spec.volumes.iter().filter_map(|volume| match &volume.source {
            Some(host::volume::Source::Projected(projected)) => Some((volume, projected)),
            _ => None,
        });
        let volume = |(volume, projected): (&host::Volume, &host::Projected)| guest::ProjectedVolume {
            name: volume.name.clone(),
            sources: projected
                .sources
                .iter()
                .flat_map(|source| self.sources(source))
                .collect(),
            default_mode: projected.default_mode.unwrap_or(DEFAULT_MODE),
            token_uid: self.only_user(),
            fs_group: fs_group(self.spec),
        };
        projected.map(volume).collect()
    }

    fn sources(&self, source: &host::ProjectedSource) -> Vec<guest::ProjectedSource> {
        use guest::projected_source::Source;
        use host::projected_source::Source as Wanted;
        let sources = match &source.source {
            Some(Wanted::ConfigMap(wanted)) => vec![Source::ConfigMap(object(wanted))],
            Some(Wanted::Secret(wanted)) => vec![Source::Secret(object(wanted))],
            Some(Wanted::Downward(files)) => files.items.iter().map(|file| Source::Text(self.text(file))).collect(),
            Some(Wanted::Token(token)) => vec![Source::Token(guest::TokenFile {
                path: token.path.clone(),
                audience: token.audience.clone(),
            })],
            None => Vec::new(),
        };
        let sources = sources.into_iter();
        sources
            .map(|source| guest::ProjectedSource { source: Some(source) })
            .collect()
    }

    fn text(&self, file: &host::DownwardFile) -> guest::TextFile {
        use host::downward_file::Source;
        let text = match &file.source {
            Some(Source::Field(path)) => self.field(path).unwrap_or_default(),
            Some(Source::Resource(resource)) => self.resource(resource, None),
            None => String::new(),
        };
        guest::TextFile {
            path: file.path.clone(),
            text,
            mode: file.mode,
        }
    }

    /// The user that all containers run as, if the pod says one: its tokens are for it alone.
    fn only_user(&self) -> Option<u32> {
        let of_pod = self
            .spec
            .security_context
            .as_ref()
            .and_then(|context| context.run_as_user);
        let of = |container: &host::Container| {
            let own = container
                .security_context
                .as_ref()
                .and_then(|context| context.run_as_user);
            own.or(of_pod)
        };
        let mut users = self.spec.containers.iter().map(of);
        let first = users.next()??;
        users.all(|user| user == Some(first)).then_some(first)
    }
}

/// The group of a pod's volumes.
pub(super) fn fs_group(spec: &host::PodSpec) -> Option<u32> {
    spec.security_context.as_ref().and_then(|context| context.fs_group)
}

fn object(wanted: &host::ProjectedObject) -> guest::ProjectedObject {
    let item = |item: &host::KeyToPath| guest::KeyToPath {
        key: item.key.clone(),
        path: item.path.clone(),
        mode: item.mode,
    };
    guest::ProjectedObject {
        name: wanted.name.clone(),
        items: wanted.items.iter().map(item).collect(),
        optional: wanted.optional,
    }
}

fn or(value: u64, default: u64) -> u64 {
    if value == 0 { default } else { value }
}

/// `metadata.labels['KEY']`, or of annotations, in its parts.
pub(super) fn entry(path: &str) -> Option<(&str, &str)> {
    let (map, key) = path.strip_suffix("']")?.split_once("['")?;
    let known = ["metadata.labels", "metadata.annotations"].contains(&map) && !key.is_empty();
    known.then_some((map, key))
}

/// Labels as a kubelet writes them into a file: sorted, one a line, values quoted.
fn lines(map: &HashMap<String, String>) -> String {
    let sorted: BTreeMap<_, _> = map.iter().collect();
    let lines: Vec<String> = sorted
        .into_iter()
        .map(|(key, value)| format!("{key}={value:?}"))
        .collect();
    lines.join("\n")
}

fn host_name() -> String {
    std::fs::read_to_string("/proc/sys/kernel/hostname").map_or_else(|_| String::new(), |name| name.trim().to_owned())
}

/// The address that this host reaches others from. Nothing is sent: connecting a datagram socket only chooses a route. A host without
/// one has its loopback.
fn host_address() -> Option<IpAddr> {
    let socket = UdpSocket::bind("0.0.0.0:0").ok()?;
    // TEST-NET-1, which is nobody's (RFC 5737).
    match socket.connect("192.0.2.1:9").and_then(|()| socket.local_addr()) {
        Ok(address) => Some(address.ip()),
        Err(_) => Some(std::net::Ipv4Addr::LOCALHOST.into()),
    }
}

#[cfg(test)]
#[path = "environment_tests.rs"]
mod tests;
