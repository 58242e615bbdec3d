//! Pod (core/v1), field by field.

use std::collections::{HashMap, HashSet};
use std::net::IpAddr;

use prost_types::Duration;
use serde_json::Value;

use super::fields::{Field, Findings, Object};
use super::{Manifest, Problem, env, volumes};
use crate::host::{
    Container, ContainerPort, Dns, Hook, HostAlias, ImagePullPolicy, PodMeta, PodSecurityContext, PodSpec, Resources,
    RestartPolicy, SecurityContext, SnapshotHooks, Volume,
};

const NO_SCHEDULER: &str = "speaks to a scheduler; the pod is already on its host";
const BEFORE_SNAPSHOT: &str = "flint.dev/before-snapshot";
const AFTER_RESTORE: &str = "flint.dev/after-restore";
const NO_CLUSTER: &str = "speaks to a cluster's control plane; there is none here";

pub(super) fn map(document: Value) -> Result<Manifest, Vec<Problem>> {
    let mut findings = Findings::default();
    let mut root = Field::root(document).object(&mut findings);
    require_word(&mut root, "apiVersion", "v1", &mut findings);
    require_word(&mut root, "kind", "Pod", &mut findings);
    let meta = root
        .require("metadata", &mut findings)
        .map(|field| metadata(field, &mut findings))
        .unwrap_or_default();
    let mut spec = root
        .require("spec", &mut findings)
        .map(|field| spec(field, &mut findings))
        .unwrap_or_default();
    spec.snapshot_hooks = snapshot_hooks(&meta, &mut findings);
    root.without_effect(&["status"], "is written by the host", &mut findings);
    root.finish(&mut findings);
    if findings.problems.is_empty() {
        Ok(Manifest {
            meta,
            spec,
            notes: findings.notes,
        })
    } else {
        Err(findings.problems)
    }
}

/// Kubernetes has no field for them.
fn snapshot_hooks(meta: &PodMeta, findings: &mut Findings) -> Option<SnapshotHooks> {
    let mut hook = |name: &str| {
        let text = meta.annotations.get(name)?;
        let mut words = serde_json::from_str::<Vec<String>>(text).unwrap_or_default();
        if words.len() < 2 {
            let rule = "must be a JSON array of a container's name, a program and its arguments";
            findings.invalid(&format!("metadata.annotations[{name}]"), format!("{text:?}: {rule}"));
            return None;
        }
        let container = words.remove(0);
        Some(Hook {
            container,
            command: words,
            timeout: None,
        })
    };
    let hooks = SnapshotHooks {
        before_snapshot: hook(BEFORE_SNAPSHOT),
        after_restore: hook(AFTER_RESTORE),
    };
    (hooks != SnapshotHooks::default()).then_some(hooks)
}

pub(super) fn require_word(object: &mut Object, name: &str, word: &str, findings: &mut Findings) {
    let Some(field) = object.require(name, findings) else {
        return;
    };
    let path = field.path.clone();
    let text = field.text(findings);
    if text != word {
        findings.unsupported(&path, format!("is {text:?}; only {word} is supported"));
    }
}

fn metadata(field: Field, findings: &mut Findings) -> PodMeta {
    let mut object = field.object(findings);
    let name = object
        .require("name", findings)
        .map(|field| dns_name(field, 253, findings))
        .unwrap_or_default();
    let namespace = object
        .take("namespace")
        .map_or_else(|| "default".into(), |field| dns_name(field, 63, findings));
    let meta = PodMeta {
        uid: object.text("uid", findings),
        namespace,
        name,
        generation: object
            .take("generation")
            .map(|field| field.number(0..=u64::MAX, findings))
            .unwrap_or_default(),
        labels: object.text_map("labels", findings),
        annotations: object.text_map("annotations", findings),
    };
    let server_side = [
        "creationTimestamp",
        "resourceVersion",
        "managedFields",
        "selfLink",
        "generateName",
    ];
    object.without_effect(&server_side, NO_CLUSTER, findings);
    object.without_effect(&["ownerReferences", "finalizers"], NO_CLUSTER, findings);
    object.finish(findings);
    meta
}

/// A name by RFC 1123: lower-case letters, digits, `-` and (between labels) `.`.
pub(super) fn dns_name(field: Field, longest: usize, findings: &mut Findings) -> String {
    let path = field.path.clone();
    let name = field.text(findings);
    let label = |label: &str| {
        (1..=63).contains(&label.len())
            && !label.starts_with('-')
            && !label.ends_with('-')
            && label
                .bytes()
                .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
    };
    if name.len() > longest || !name.split('.').all(label) {
        let rule = "must be lower-case letters, digits and '-', beginning and ending with a letter or digit (RFC 1123)";
        findings.invalid(&path, format!("{name:?}: {rule}"));
    }
    name
}

fn spec(field: Field, findings: &mut Findings) -> PodSpec {
    let mut object = field.object(findings);
    let volumes = list(&mut object, "volumes", findings, volumes::volume);
    let containers = list(&mut object, "containers", findings, container);
    if containers.is_empty() {
        findings.invalid(&object.join("containers"), "must have at least one container");
    }
    unique(&object.join("containers"), containers.iter().map(|c| &c.name), findings);
    unique(&object.join("volumes"), volumes.iter().map(|v| &v.name), findings);
    mounts_have_volumes(&object, &containers, &volumes, findings);
    let policies = [
        ("Always", RestartPolicy::Always),
        ("OnFailure", RestartPolicy::OnFailure),
        ("Never", RestartPolicy::Never),
    ];
    let restart_policy = object
        .take("restartPolicy")
        .and_then(|field| field.word(&policies, findings));
    let spec = PodSpec {
        containers,
        volumes,
        restart_policy: restart_policy.unwrap_or(RestartPolicy::Always).into(),
        termination_grace_period: object.take("terminationGracePeriodSeconds").map(|field| {
            let seconds = field.number(0..=i64::MAX.unsigned_abs(), findings);
            Duration {
                seconds: seconds.try_into().unwrap_or(i64::MAX),
                nanos: 0,
            }
        }),
        hostname: object
            .take("hostname")
            .map(|field| dns_name(field, 63, findings))
            .unwrap_or_default(),
        dns: dns(&mut object, findings),
        host_aliases: list(&mut object, "hostAliases", findings, host_alias),
        share_process_namespace: object.boolean("shareProcessNamespace", findings),
        security_context: object
            .take("securityContext")
            .map(|field| pod_security_context(field, findings)),
        scratch_bytes: 0,
        snapshot_hooks: None,
        node_name: object.text("nodeName", findings),
        service_account_name: service_account(&mut object, findings),
        host_ips: Vec::new(),
    };
    accept_defaults(&mut object, findings);
    object.finish(findings);
    spec
}

/// Fields that have no effect on one host, and those whose default value is all that is supported.
fn accept_defaults(object: &mut Object, findings: &mut Findings) {
    let placement = [
        "affinity",
        "nodeSelector",
        "preemptionPolicy",
        "priority",
        "priorityClassName",
        "schedulerName",
        "tolerations",
        "topologySpreadConstraints",
    ];
    object.without_effect(&placement, NO_SCHEDULER, findings);
    if object
        .take("automountServiceAccountToken")
        .is_some_and(|field| field.boolean(findings))
    {
        findings.unsupported(
            &object.join("automountServiceAccountToken"),
            "true is not supported without a cluster",
        );
    }
    object.without_effect(&["enableServiceLinks"], NO_CLUSTER, findings);
}

/// By its present name or its former one.
fn service_account(object: &mut Object, findings: &mut Findings) -> String {
    let former = object.text("serviceAccount", findings);
    let present = object.text("serviceAccountName", findings);
    if present.is_empty() { former } else { present }
}

fn dns(object: &mut Object, findings: &mut Findings) -> Option<Dns> {
    object.only("dnsPolicy", &["ClusterFirst", "Default", "None"], findings);
    let mut config = object.take("dnsConfig")?.object(findings);
    let nameservers = config
        .take("nameservers")
        .map(|field| addresses(field, findings))
        .unwrap_or_default();
    let searches = config.texts("searches", findings);
    let options = list(&mut config, "options", findings, |field, findings| {
        let mut option = field.object(findings);
        let name = option
            .require("name", findings)
            .map(|field| field.text(findings))
            .unwrap_or_default();
        let value = option.take("value").map(|field| field.text(findings));
        option.finish(findings);
        value.map_or(name.clone(), |value| format!("{name}:{value}"))
    });
    config.finish(findings);
    Some(Dns {
        nameservers,
        searches,
        options,
    })
}

fn addresses(field: Field, findings: &mut Findings) -> Vec<String> {
    field
        .items(findings)
        .into_iter()
        .map(|item| address(item, findings))
        .collect()
}

fn address(field: Field, findings: &mut Findings) -> String {
    let path = field.path.clone();
    let text = field.text(findings);
    if text.parse::<IpAddr>().is_err() {
        findings.invalid(&path, format!("{text:?} is no IP address"));
    }
    text
}

fn host_alias(field: Field, findings: &mut Findings) -> HostAlias {
    let mut object = field.object(findings);
    let ip = object
        .require("ip", findings)
        .map(|field| address(field, findings))
        .unwrap_or_default();
    let hostnames = object
        .take("hostnames")
        .map(|field| {
            field
                .items(findings)
                .into_iter()
                .map(|name| dns_name(name, 253, findings))
                .collect()
        })
        .unwrap_or_default();
    object.finish(findings);
    HostAlias { ip, hostnames }
}

fn container(field: Field, findings: &mut Findings) -> Container {
    let mut object = field.object(findings);
    let name = object
        .require("name", findings)
        .map(|field| dns_name(field, 63, findings))
        .unwrap_or_default();
    let image = object
        .require("image", findings)
        .map(|field| field.text(findings))
        .unwrap_or_default();
    let policies = [
        ("Always", ImagePullPolicy::PullAlways),
        ("IfNotPresent", ImagePullPolicy::PullIfNotPresent),
        ("Never", ImagePullPolicy::PullNever),
    ];
    let policy = object
        .take("imagePullPolicy")
        .and_then(|field| field.word(&policies, findings));
    let container = Container {
        name,
        image_pull_policy: policy.unwrap_or_else(|| default_pull_policy(&image)).into(),
        image,
        command: object.texts("command", findings),
        args: object.texts("args", findings),
        env: list(&mut object, "env", findings, env::variable),
        env_from: list(&mut object, "envFrom", findings, env::from),
        working_dir: object
            .take("workingDir")
            .map(|field| absolute(field, findings))
            .unwrap_or_default(),
        tty: object.boolean("tty", findings),
        stdin: object.boolean("stdin", findings),
        resources: object.take("resources").map(|field| resources(field, findings)),
        security_context: object
            .take("securityContext")
            .map(|field| security_context(field, findings)),
        volume_mounts: list(&mut object, "volumeMounts", findings, volumes::mount),
        ports: list(&mut object, "ports", findings, port),
    };
    object.only("terminationMessagePath", &["/dev/termination-log"], findings);
    object.only("terminationMessagePolicy", &["File"], findings);
    object.finish(findings);
    container
}

/// Kubernetes' rule: `:latest` or no tag at all is looked up each time, anything else only if it is not here.
fn default_pull_policy(image: &str) -> ImagePullPolicy {
    let last = image.rsplit('/').next().unwrap_or(image);
    let tag = last.split_once(':').map(|(_, tag)| tag);
    match (last.contains('@'), tag) {
        (true, _) => ImagePullPolicy::PullIfNotPresent,
        (false, None | Some("latest")) => ImagePullPolicy::PullAlways,
        (false, Some(_)) => ImagePullPolicy::PullIfNotPresent,
    }
}

pub(super) fn absolute(field: Field, findings: &mut Findings) -> String {
    let path = field.path.clone();
    let text = field.text(findings);
    if !text.starts_with('/') {
        findings.invalid(&path, format!("{text:?} must be an absolute path"));
    }
    text
}

fn resources(field: Field, findings: &mut Findings) -> Resources {
    let mut object = field.object(findings);
    let mut amounts = |name: &str, findings: &mut Findings| {
        let Some(field) = object.take(name) else {
            return (None, None);
        };
        let mut amounts = field.object(findings);
        let cpu = amounts
            .take("cpu")
            .and_then(|field| field.quantity(findings))
            .map(super::Quantity::milli);
        let memory = amounts
            .take("memory")
            .and_then(|field| field.quantity(findings))
            .map(super::Quantity::units);
        amounts.finish(findings);
        (cpu, memory)
    };
    let (cpu_limit, memory_limit) = amounts("limits", findings);
    let (cpu_request, memory_request) = amounts("requests", findings);
    for (name, request, limit) in [
        ("cpu", cpu_request, cpu_limit),
        ("memory", memory_request, memory_limit),
    ] {
        if let (Some(request), Some(limit)) = (request, limit)
            && request > limit
        {
            findings.invalid(
                &object.join(&format!("requests.{name}")),
                "must not be more than the limit",
            );
        }
    }
    object.finish(findings);
    Resources {
        // A limit without a request is a request of the same size (Kubernetes, "Requests and limits").
        cpu_request_milli: cpu_request.or(cpu_limit).unwrap_or_default(),
        cpu_limit_milli: cpu_limit.unwrap_or_default(),
        memory_request_bytes: memory_request.or(memory_limit).unwrap_or_default(),
        memory_limit_bytes: memory_limit.unwrap_or_default(),
    }
}

fn security_context(field: Field, findings: &mut Findings) -> SecurityContext {
    let mut object = field.object(findings);
    let mut context = SecurityContext {
        run_as_user: object.take("runAsUser").map(|field| field.id(findings)),
        run_as_group: object.take("runAsGroup").map(|field| field.id(findings)),
        run_as_non_root: object.boolean("runAsNonRoot", findings),
        read_only_root_filesystem: object.boolean("readOnlyRootFilesystem", findings),
        privileged: object.boolean("privileged", findings),
        allow_privilege_escalation: object
            .take("allowPrivilegeEscalation")
            .map(|field| field.boolean(findings)),
        ..SecurityContext::default()
    };
    if let Some(field) = object.take("capabilities") {
        let mut capabilities = field.object(findings);
        context.add_capabilities = capabilities.texts("add", findings);
        context.drop_capabilities = capabilities.texts("drop", findings);
        capabilities.finish(findings);
    }
    object.finish(findings);
    context
}

fn pod_security_context(field: Field, findings: &mut Findings) -> PodSecurityContext {
    let mut object = field.object(findings);
    let context = PodSecurityContext {
        run_as_user: object.take("runAsUser").map(|field| field.id(findings)),
        run_as_group: object.take("runAsGroup").map(|field| field.id(findings)),
        run_as_non_root: object.boolean("runAsNonRoot", findings),
        supplemental_groups: object
            .take("supplementalGroups")
            .map(|field| {
                field
                    .items(findings)
                    .into_iter()
                    .map(|item| item.id(findings))
                    .collect()
            })
            .unwrap_or_default(),
        sysctls: list(&mut object, "sysctls", findings, sysctl)
            .into_iter()
            .collect::<HashMap<_, _>>(),
        fs_group: object.take("fsGroup").map(|field| field.id(findings)),
    };
    // Every volume of Flint's is made for its pod, so both policies come to the same.
    object.only("fsGroupChangePolicy", &["Always", "OnRootMismatch"], findings);
    object.finish(findings);
    context
}

fn sysctl(field: Field, findings: &mut Findings) -> (String, String) {
    let mut object = field.object(findings);
    let name = object
        .require("name", findings)
        .map(|field| field.text(findings))
        .unwrap_or_default();
    let value = object
        .require("value", findings)
        .map(|field| field.text(findings))
        .unwrap_or_default();
    object.finish(findings);
    (name, value)
}

fn port(field: Field, findings: &mut Findings) -> ContainerPort {
    let mut object = field.object(findings);
    let number = object
        .require("containerPort", findings)
        .map(|field| field.number(1..=65535, findings));
    let protocols = [("TCP", "TCP"), ("UDP", "UDP"), ("SCTP", "SCTP")];
    let protocol = object
        .take("protocol")
        .and_then(|field| field.word(&protocols, findings));
    let port = ContainerPort {
        name: object.text("name", findings),
        container_port: number.and_then(|number| number.try_into().ok()).unwrap_or_default(),
        protocol: protocol.unwrap_or("TCP").to_owned(),
    };
    object.finish(findings);
    port
}

pub(super) fn list<T>(
    object: &mut Object,
    name: &str,
    findings: &mut Findings,
    mut map: impl FnMut(Field, &mut Findings) -> T,
) -> Vec<T> {
    let items = object.take(name).map(|field| field.items(findings)).unwrap_or_default();
    items.into_iter().map(|item| map(item, findings)).collect()
}

fn unique<'a>(path: &str, names: impl Iterator<Item = &'a String>, findings: &mut Findings) {
    let mut seen = HashSet::new();
    for (index, name) in names.enumerate() {
        if !name.is_empty() && !seen.insert(name) {
            findings.invalid(&format!("{path}[{index}].name"), format!("{name:?} stands twice"));
        }
    }
}

fn mounts_have_volumes(object: &Object, containers: &[Container], volumes: &[Volume], findings: &mut Findings) {
    let known: HashSet<&str> = volumes.iter().map(|volume| volume.name.as_str()).collect();
    for (c, container) in containers.iter().enumerate() {
        for (m, mount) in container.volume_mounts.iter().enumerate() {
            if !mount.name.is_empty() && !known.contains(mount.name.as_str()) {
                let path = object.join(&format!("containers[{c}].volumeMounts[{m}].name"));
                findings.invalid(&path, format!("the pod has no volume {:?}", mount.name));
            }
        }
    }
}
