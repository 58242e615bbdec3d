//! What a pod must be like before anything is done for it. Everything wrong is named at once, each with its path.

mod files;

use std::{collections::HashSet, net::IpAddr, ops::RangeInclusive, time::Duration};

use flint_api::host;

use super::process::{ALL_CAPABILITIES, capability};

pub use files::materials;

/// Most containers of a pod: each image is a disk, and a VMM control packet carries 64 descriptors.
const MAX_CONTAINERS: usize = 16;
const MIN_SCRATCH: u64 = 16 << 20;
const MAX_SCRATCH: u64 = 16 << 40;
const MIN_MEMORY_LIMIT: u64 = 4 << 20;
const HOOK_TIMEOUTS: RangeInclusive<Duration> = Duration::from_millis(1)..=Duration::from_secs(600);

/// One thing that is wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Violation {
    /// Path of the field, for example `spec.containers[0].name`.
    pub field: String,
    /// What it should be.
    pub description: String,
    /// Whether it is right in itself and this flintd cannot do it.
    pub unsupported: bool,
}

#[derive(Default)]
struct Report(Vec<Violation>);

impl Report {
    fn wrong(&mut self, field: impl Into<String>, description: impl Into<String>) {
        self.0.push(Violation {
            field: field.into(),
            description: description.into(),
            unsupported: false,
        });
    }

    fn unsupported(&mut self, field: impl Into<String>, description: impl Into<String>) {
        self.0.push(Violation {
            field: field.into(),
            description: description.into(),
            unsupported: true,
        });
    }

    fn check(&mut self, right: bool, field: impl Into<String>, description: &str) {
        if !right {
            self.wrong(field, description);
        }
    }
}

/// Everything that is wrong with a pod; nothing if it can be run.
pub fn pod(meta: &host::PodMeta, spec: &host::PodSpec) -> Vec<Violation> {
    let mut report = Report::default();
    check_meta(meta, &mut report);
    check_spec(spec, &mut report);
    let containers = spec.containers.len();
    report.check(
        (1..=MAX_CONTAINERS).contains(&containers),
        "spec.containers",
        &format!("must have 1 to {MAX_CONTAINERS} containers, has {containers}"),
    );
    let volumes = files::volumes(spec, &mut report);
    let mut names = HashSet::new();
    for (index, container) in spec.containers.iter().enumerate().take(MAX_CONTAINERS) {
        let path = format!("spec.containers[{index}]");
        report.check(is_label(&container.name), format!("{path}.name"), LABEL);
        report.check(
            names.insert(&container.name),
            format!("{path}.name"),
            "must differ from those before it",
        );
        check_container(container, spec, &path, &volumes, &mut report);
    }
    check_hooks(spec, &mut report);
    report.0
}

const LABEL: &str = "must be 1 to 63 characters of [a-z0-9-], beginning and ending with [a-z0-9]";

fn check_meta(meta: &host::PodMeta, report: &mut Report) {
    report.check(
        is_uid(&meta.uid),
        "meta.uid",
        "must be 1 to 63 characters of [a-zA-Z0-9-]",
    );
    report.check(is_label(&meta.namespace), "meta.namespace", LABEL);
    report.check(
        is_subdomain(&meta.name),
        "meta.name",
        "must be a DNS name: labels of [a-z0-9-], joined by dots",
    );
}

fn check_spec(spec: &host::PodSpec, report: &mut Report) {
    report.check(
        host::RestartPolicy::try_from(spec.restart_policy).is_ok(),
        "spec.restart_policy",
        "must be ALWAYS, ON_FAILURE or NEVER",
    );
    if let Some(period) = spec.termination_grace_period {
        report.check(
            period.seconds >= 0 && (0..1_000_000_000).contains(&period.nanos),
            "spec.termination_grace_period",
            "must not be negative",
        );
    }
    report.check(
        spec.hostname.is_empty() || is_label(&spec.hostname),
        "spec.hostname",
        LABEL,
    );
    report.check(
        spec.scratch_bytes == 0 || (MIN_SCRATCH..=MAX_SCRATCH).contains(&spec.scratch_bytes),
        "spec.scratch_bytes",
        "must be 16 MiB to 16 TiB, or 0 for the host's default",
    );
    if let Some(dns) = &spec.dns {
        report.check(
            dns.nameservers.len() <= 3,
            "spec.dns.nameservers",
            "must be at most 3 (resolv.conf(5))",
        );
        for (index, server) in dns.nameservers.iter().enumerate() {
            let field = format!("spec.dns.nameservers[{index}]");
            report.check(server.parse::<IpAddr>().is_ok(), field, "must be an IP address");
        }
        report.check(dns.searches.len() <= 32, "spec.dns.searches", "must be at most 32");
        for (name, list) in [("searches", &dns.searches), ("options", &dns.options)] {
            for (index, word) in list.iter().enumerate() {
                report.check(is_word(word), format!("spec.dns.{name}[{index}]"), "must be one word");
            }
        }
    }
    for (index, alias) in spec.host_aliases.iter().enumerate() {
        let path = format!("spec.host_aliases[{index}]");
        report.check(
            alias.ip.parse::<IpAddr>().is_ok(),
            format!("{path}.ip"),
            "must be an IP address",
        );
        for (at, name) in alias.hostnames.iter().enumerate() {
            report.check(is_word(name), format!("{path}.hostnames[{at}]"), "must be a host name");
        }
    }
    for name in spec.security_context.iter().flat_map(|context| context.sysctls.keys()) {
        let right = is_word(name) && !name.split(['.', '/']).any(|part| part.is_empty() || part == "..");
        report.check(
            right,
            format!("spec.security_context.sysctls[{name:?}]"),
            "must be a dotted kernel parameter",
        );
    }
}

fn check_hooks(spec: &host::PodSpec, report: &mut Report) {
    let hooks = spec.snapshot_hooks.clone().unwrap_or_default();
    for (name, hook) in [
        ("before_snapshot", hooks.before_snapshot),
        ("after_restore", hooks.after_restore),
    ] {
        let Some(hook) = hook else { continue };
        let path = format!("spec.snapshot_hooks.{name}");
        report.check(
            spec.containers.iter().any(|container| container.name == hook.container),
            format!("{path}.container"),
            "must be a container of the pod",
        );
        report.check(
            hook.command.first().is_some_and(|program| !program.is_empty())
                && hook.command.iter().all(|word| !word.contains('\0')),
            format!("{path}.command"),
            "must name a program, without NUL",
        );
        let timeout: Option<Result<Duration, _>> = hook.timeout.map(TryInto::try_into);
        report.check(
            timeout.is_none_or(|timeout| timeout.is_ok_and(|timeout| HOOK_TIMEOUTS.contains(&timeout))),
            format!("{path}.timeout"),
            "must be 1 ms to 10 minutes",
        );
    }
}

fn check_container(
    container: &host::Container,
    spec: &host::PodSpec,
    path: &str,
    volumes: &HashSet<&str>,
    report: &mut Report,
) {
    report.check(
        is_word(&container.image),
        format!("{path}.image"),
        "must be an image reference",
    );
    report.check(
        host::ImagePullPolicy::try_from(container.image_pull_policy).is_ok(),
        format!("{path}.image_pull_policy"),
        "must be PULL_ALWAYS, PULL_IF_NOT_PRESENT or PULL_NEVER",
    );
    for (name, list) in [("command", &container.command), ("args", &container.args)] {
        for (index, word) in list.iter().enumerate() {
            report.check(
                !word.contains('\0'),
                format!("{path}.{name}[{index}]"),
                "must not contain NUL",
            );
        }
    }
    files::environment(container, spec, path, report);
    let dir = &container.working_dir;
    report.check(
        dir.is_empty() || is_path(dir),
        format!("{path}.working_dir"),
        "must be an absolute path without '..'",
    );
    check_resources(
        &container.resources.unwrap_or_default(),
        &format!("{path}.resources"),
        report,
    );
    if let Some(security) = &container.security_context {
        for (name, list) in [
            ("add_capabilities", &security.add_capabilities),
            ("drop_capabilities", &security.drop_capabilities),
        ] {
            for (index, one) in list.iter().enumerate() {
                let one = capability(one);
                let known = one == "ALL" || ALL_CAPABILITIES.contains(&one.as_str());
                report.check(
                    known,
                    format!("{path}.security_context.{name}[{index}]"),
                    "must be a Linux capability",
                );
            }
        }
        let contradiction = security.privileged && security.allow_privilege_escalation == Some(false);
        report.check(
            !contradiction,
            format!("{path}.security_context.allow_privilege_escalation"),
            "cannot be false for a privileged container",
        );
    }
    files::mounts(container, path, volumes, report);
    for (index, port) in container.ports.iter().enumerate() {
        let path = format!("{path}.ports[{index}]");
        let right = (1..=65535).contains(&port.container_port);
        report.check(right, format!("{path}.container_port"), "must be 1 to 65535");
        let known = ["", "TCP", "UDP", "SCTP"].contains(&port.protocol.as_str());
        report.check(known, format!("{path}.protocol"), "must be TCP, UDP or SCTP");
    }
}

fn check_resources(resources: &host::Resources, path: &str, report: &mut Report) {
    let within = |request: u64, limit: u64| limit == 0 || request <= limit;
    let cpu = within(resources.cpu_request_milli, resources.cpu_limit_milli);
    report.check(cpu, format!("{path}.cpu_request_milli"), "must not exceed the limit");
    let memory = within(resources.memory_request_bytes, resources.memory_limit_bytes);
    report.check(
        memory,
        format!("{path}.memory_request_bytes"),
        "must not exceed the limit",
    );
    let limit = resources.memory_limit_bytes;
    report.check(
        limit == 0 || limit >= MIN_MEMORY_LIMIT,
        format!("{path}.memory_limit_bytes"),
        "must be at least 4 MiB: no container starts with less",
    );
}

fn is_uid(text: &str) -> bool {
    (1..=63).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
}

/// A DNS label (RFC 1123).
fn is_label(text: &str) -> bool {
    let inner = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
    (1..=63).contains(&text.len()) && text.bytes().all(inner) && !text.starts_with('-') && !text.ends_with('-')
}

/// A pod's name: labels joined by dots, at most 253 characters.
fn is_subdomain(text: &str) -> bool {
    text.len() <= 253 && text.split('.').all(is_label)
}

fn is_word(text: &str) -> bool {
    !text.is_empty() && text.len() <= 4096 && text.bytes().all(|byte| byte.is_ascii_graphic())
}

fn is_path(text: &str) -> bool {
    text.starts_with('/') && !text.contains('\0') && !text.split('/').any(|part| part == "..")
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A pod that is right in every way.
    pub(crate) fn good() -> (host::PodMeta, host::PodSpec) {
        let meta = host::PodMeta {
            uid: "5c0b3d1e-1".into(),
            namespace: "default".into(),
            name: "web.0".into(),
            generation: 1,
            ..Default::default()
        };
        let container = host::Container {
            name: "web".into(),
            image: "registry.example/app:1".into(),
            volume_mounts: vec![host::VolumeMount {
                name: "data".into(),
                mount_path: "/data".into(),
                ..Default::default()
            }],
            ..Default::default()
        };
        let volume = host::Volume {
            name: "data".into(),
            source: Some(host::volume::Source::EmptyDir(host::EmptyDir::default())),
        };
        (
            meta,
            host::PodSpec {
                containers: vec![container],
                volumes: vec![volume],
                ..Default::default()
            },
        )
    }

    #[test]
    fn a_pod_that_is_right_has_no_violations() {
        let (meta, spec) = good();
        assert_eq!(pod(&meta, &spec), []);
    }

    #[test]
    fn each_wrong_field_is_named_with_its_path() {
        type Break = fn(&mut host::PodMeta, &mut host::PodSpec);
        let cases: [(&str, Break); 18] = [
            ("meta.uid", |meta, _| meta.uid = "../../etc".into()),
            ("meta.namespace", |meta, _| meta.namespace = "A".into()),
            ("meta.name", |meta, _| meta.name = "a..b".into()),
            ("spec.containers", |_, spec| spec.containers.clear()),
            ("spec.restart_policy", |_, spec| spec.restart_policy = 9),
            ("spec.hostname", |_, spec| spec.hostname = "-".into()),
            ("spec.scratch_bytes", |_, spec| spec.scratch_bytes = 1),
            ("spec.termination_grace_period", |_, spec| {
                spec.termination_grace_period = Some(prost_types::Duration { seconds: -1, nanos: 0 });
            }),
            ("spec.containers[0].name", |_, spec| {
                spec.containers[0].name = "a/b".into();
            }),
            ("spec.containers[0].image", |_, spec| {
                spec.containers[0].image = "two words".into();
            }),
            ("spec.containers[0].args[0]", |_, spec| {
                spec.containers[0].args = vec!["a\0".into()];
            }),
            ("spec.containers[0].env[0].name", |_, spec| {
                spec.containers[0].env = vec![host::EnvVar {
                    name: "A=B".into(),
                    value: String::new(),
                    ..Default::default()
                }];
            }),
            ("spec.containers[0].working_dir", |_, spec| {
                spec.containers[0].working_dir = "/a/../b".into();
            }),
            ("spec.containers[0].volume_mounts[0].name", |_, spec| {
                spec.volumes.clear();
            }),
            ("spec.containers[0].volume_mounts[0].mount_path", |_, spec| {
                spec.containers[0].volume_mounts[0].mount_path = "data".into();
            }),
            ("spec.containers[0].resources.memory_request_bytes", |_, spec| {
                spec.containers[0].resources = Some(host::Resources {
                    memory_request_bytes: 9 << 20,
                    memory_limit_bytes: 8 << 20,
                    ..Default::default()
                });
            }),
            ("spec.containers[0].security_context.add_capabilities[0]", |_, spec| {
                let add_capabilities = vec!["FLY".into()];
                spec.containers[0].security_context = Some(host::SecurityContext {
                    add_capabilities,
                    ..Default::default()
                });
            }),
            ("spec.containers[0].ports[0].container_port", |_, spec| {
                let port = host::ContainerPort {
                    container_port: 70000,
                    ..Default::default()
                };
                spec.containers[0].ports = vec![port];
            }),
        ];
        for (field, break_it) in cases {
            let (mut meta, mut spec) = good();
            break_it(&mut meta, &mut spec);
            let fields: Vec<_> = pod(&meta, &spec).into_iter().map(|violation| violation.field).collect();
            assert_eq!(fields, [field]);
        }
    }

    #[test]
    fn a_volume_of_an_unknown_kind_is_unsupported_rather_than_wrong() {
        let (meta, mut spec) = good();
        spec.volumes[0].source = None;
        let violations = pod(&meta, &spec);
        assert_eq!(violations.len(), 1);
        assert!(violations[0].unsupported);
        assert_eq!(violations[0].field, "spec.volumes[0].source");
    }

    #[test]
    fn a_limit_on_a_folder_is_kept_to_in_memory_only() {
        let (meta, mut spec) = good();
        let limited = |memory| {
            let size_limit_bytes = 1 << 20;
            Some(host::volume::Source::EmptyDir(host::EmptyDir {
                memory,
                size_limit_bytes,
            }))
        };
        spec.volumes[0].source = limited(true);
        assert_eq!(pod(&meta, &spec), []);
        spec.volumes[0].source = limited(false);
        let violations = pod(&meta, &spec);
        assert!(violations[0].unsupported);
        assert_eq!(violations[0].field, "spec.volumes[0].empty_dir.size_limit_bytes");
    }
}
