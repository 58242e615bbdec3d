//! The mapping against manifests as people write them.

use super::*;
use crate::host::{ImagePullPolicy, RestartPolicy};

const SMALL: &str = "
apiVersion: v1
kind: Pod
metadata: {name: hello}
spec:
  containers:
  - {name: main, image: 'registry.test/busybox:1', command: [echo, hi]}
";

fn problems(yaml: &str) -> Vec<Problem> {
    match pods_from_yaml(yaml) {
        Err(ManifestError::Refused { problems, .. }) => problems,
        other => panic!("expected a refusal, got {other:?}"),
    }
}

fn paths(yaml: &str) -> Vec<String> {
    problems(yaml).into_iter().map(|problem| problem.path).collect()
}

#[test]
fn a_small_pod_gets_kubernetes_defaults() {
    let pods = pods_from_yaml(SMALL).unwrap();

    let pod = &pods[0];
    assert_eq!(
        (pod.meta.namespace.as_str(), pod.meta.name.as_str()),
        ("default", "hello")
    );
    assert_eq!(pod.spec.restart_policy(), RestartPolicy::Always);
    let container = &pod.spec.containers[0];
    assert_eq!(container.command, ["echo", "hi"]);
    assert_eq!(container.image_pull_policy(), ImagePullPolicy::PullIfNotPresent);
    assert!(pod.notes.is_empty());
}

#[test]
fn hooks_around_a_snapshot_are_annotations() {
    let with = |value: &str| {
        SMALL.replace(
            "{name: hello}",
            &format!("{{name: hello, annotations: {{flint.dev/after-restore: '{value}'}}}}"),
        )
    };
    let pods = pods_from_yaml(&with(r#"["main", "renew", "-a"]"#)).unwrap();
    let hooks = pods[0].spec.snapshot_hooks.clone().unwrap();
    let hook = hooks.after_restore.unwrap();
    assert_eq!(
        (hook.container.as_str(), &hook.command[..]),
        ("main", &["renew".to_owned(), "-a".to_owned()][..])
    );
    assert_eq!((hooks.before_snapshot, hook.timeout), (None, None));
    for wrong in ["renew", "[]", r#"["main"]"#, r#"["main", 1]"#] {
        assert_eq!(
            paths(&with(wrong)),
            ["metadata.annotations[flint.dev/after-restore]"],
            "{wrong}"
        );
    }
}

#[test]
fn an_image_without_a_tag_or_latest_is_always_pulled() {
    for (image, policy) in [
        ("a", ImagePullPolicy::PullAlways),
        ("host:5000/a", ImagePullPolicy::PullAlways),
        ("a:latest", ImagePullPolicy::PullAlways),
        ("a:1", ImagePullPolicy::PullIfNotPresent),
        ("host:5000/a@sha256:00", ImagePullPolicy::PullIfNotPresent),
    ] {
        let pods = pods_from_yaml(&SMALL.replace("registry.test/busybox:1", image)).unwrap();
        assert_eq!(pods[0].spec.containers[0].image_pull_policy(), policy, "{image}");
    }
}

#[test]
fn every_unsupported_field_is_refused_by_its_path() {
    let yaml = "
apiVersion: v1
kind: Pod
metadata: {name: hello}
spec:
  hostNetwork: true
  initContainers: [{name: a, image: b}]
  containers:
  - name: main
    image: a:1
    livenessProbe: {httpGet: {port: 1}}
    env: [{name: A, valueFrom: {fieldRef: {fieldPath: status.phase}}}]
    comand: [typo]
  volumes:
  - {name: data, hostPath: {path: /}}
";
    let problems = problems(yaml);

    let paths: Vec<_> = problems.iter().map(|problem| problem.path.as_str()).collect();
    for path in [
        "spec.hostNetwork",
        "spec.initContainers",
        "spec.containers[0].livenessProbe",
        "spec.containers[0].env[0].valueFrom.fieldRef.fieldPath",
        "spec.containers[0].comand",
        "spec.volumes[0].hostPath",
    ] {
        assert!(paths.contains(&path), "{path} not in {paths:?}");
    }
    assert_eq!(paths.len(), 6);
    assert!(problems.iter().all(|problem| problem.kind == ProblemKind::Unsupported));
}

#[test]
fn a_field_that_asks_for_nothing_counts_as_absent() {
    let yaml = SMALL.replace(
        "spec:",
        "status: {}\nspec:\n  hostNetwork: false\n  initContainers: []\n  hostname: null",
    );

    assert!(pods_from_yaml(&yaml).is_ok());
}

#[test]
fn scheduling_fields_are_noted_not_dropped() {
    let yaml = SMALL.replace(
        "spec:",
        "spec:\n  nodeSelector: {disk: ssd}\n  tolerations: [{operator: Exists}]",
    );

    let pods = pods_from_yaml(&yaml).unwrap();

    let noted: Vec<_> = pods[0].notes.iter().map(|note| note.path.as_str()).collect();
    assert_eq!(noted, ["spec.nodeSelector", "spec.tolerations"]);
}

#[test]
fn wrong_values_are_invalid_with_their_path() {
    let yaml = "
apiVersion: v1
kind: Pod
metadata: {name: Hello_World}
spec:
  restartPolicy: Sometimes
  terminationGracePeriodSeconds: -1
  containers:
  - name: main
    image: a:1
    resources: {limits: {cpu: much}, requests: {memory: 2Gi}}
    volumeMounts: [{name: nowhere, mountPath: relative}]
  - name: main
    image: a:1
    resources: {limits: {memory: 1Gi}, requests: {memory: 2Gi}}
";
    let problems = problems(yaml);

    assert!(
        problems.iter().all(|problem| problem.kind == ProblemKind::Invalid),
        "{problems:?}"
    );
    let paths: Vec<_> = problems.iter().map(|problem| problem.path.as_str()).collect();
    for path in [
        "metadata.name",
        "spec.restartPolicy",
        "spec.terminationGracePeriodSeconds",
        "spec.containers[0].resources.limits.cpu",
        "spec.containers[0].volumeMounts[0].mountPath",
        "spec.containers[0].volumeMounts[0].name",
        "spec.containers[1].name",
        "spec.containers[1].resources.requests.memory",
    ] {
        assert!(paths.contains(&path), "{path} not in {paths:?}");
    }
}

#[test]
fn numbers_are_not_taken_for_text() {
    let yaml = SMALL.replace("[echo, hi]", "[echo, 1]");

    assert_eq!(paths(&yaml), ["spec.containers[0].command[1]"]);
}

#[test]
fn a_limit_alone_is_also_the_request() {
    let yaml = SMALL.replace("command: [echo, hi]", "resources: {limits: {cpu: 1500m, memory: 64Mi}}");

    let pods = pods_from_yaml(&yaml).unwrap();

    let resources = pods[0].spec.containers[0].resources.unwrap();
    assert_eq!((resources.cpu_request_milli, resources.cpu_limit_milli), (1500, 1500));
    assert_eq!(
        (resources.memory_request_bytes, resources.memory_limit_bytes),
        (64 << 20, 64 << 20)
    );
}

#[test]
fn several_documents_are_several_pods_and_other_kinds_are_refused() {
    let two = format!("{SMALL}---{}", SMALL.replace("hello", "there"));
    assert_eq!(pods_from_yaml(&two).unwrap().len(), 2);

    let other = SMALL.replace("kind: Pod", "kind: Deployment");
    assert_eq!(paths(&other), ["kind"]);
}

#[test]
fn garbage_and_bombs_are_errors() {
    for text in ["", "---", "null", "# nothing"] {
        assert!(matches!(pods_from_yaml(text), Err(ManifestError::Empty)), "{text:?}");
    }
    for text in ["{", "a: b: c", "\t- x", "[1, 2", "a: &a [*a]"] {
        assert!(pods_from_yaml(text).is_err(), "{text:?}");
    }
    let bomb: String = (1..12).fold("a0: &a0 [x,x,x,x,x,x,x,x,x]\n".into(), |text, n| {
        let refs = vec![format!("*a{}", n - 1); 9].join(",");
        format!("{text}a{n}: &a{n} [{refs}]\n")
    });
    assert!(matches!(pods_from_yaml(&bomb), Err(ManifestError::Syntax(_))));
}

fn message(text: &str) -> String {
    pods_from_yaml(text).unwrap_err().to_string()
}

#[test]
fn a_syntax_error_is_told_with_its_line_and_column() {
    let broken = SMALL.replace("spec:", "spec: [1,");

    let message = message(&broken);

    assert!(message.contains("line 7") && message.contains("column"), "{message}");
}

#[test]
fn a_key_that_is_there_twice_is_refused() {
    let twice = SMALL.replace("kind: Pod", "kind: Pod\nkind: Pod");

    let message = message(&twice);

    assert!(message.contains("duplicate") && message.contains("kind"), "{message}");
    assert!(message.contains("line 4"), "{message}");
}

#[test]
fn a_wrong_type_is_refused_by_the_path_of_its_field() {
    for (field, wrong, path) in [
        ("metadata: {name: hello}", "metadata: [hello]", "metadata"),
        (
            "metadata: {name: hello}",
            "metadata: {name: {first: a}}",
            "metadata.name",
        ),
        (
            "metadata: {name: hello}",
            "metadata: {name: hello, labels: {a: 1}}",
            "metadata.labels.a",
        ),
        ("spec:\n", "spec:\n  hostAliases: {ip: 1}\n", "spec.hostAliases"),
        ("command: [echo, hi]", "command: echo", "spec.containers[0].command"),
        ("command: [echo, hi]", "tty: 'yes'", "spec.containers[0].tty"),
        ("command: [echo, hi]", "env: [A=1]", "spec.containers[0].env[0]"),
    ] {
        // A name that is not where it should be is missed, too.
        assert_eq!(paths(&SMALL.replace(field, wrong))[0], path, "{wrong}");
    }
    for document in ["[1]", "just text", "42", "true"] {
        assert!(
            matches!(pods_from_yaml(document), Err(ManifestError::Refused { .. })),
            "{document}"
        );
    }
}

#[test]
fn what_is_wrong_in_a_later_document_is_told_with_its_number() {
    let two = format!("{SMALL}---{}", SMALL.replace("kind: Pod", "kind: Job"));

    assert!(message(&two).contains("document 2"), "{}", message(&two));
}

#[test]
fn size_and_depth_are_bounded() {
    const MEGABYTES: usize = 10 << 20;
    let long = SMALL.replace("hi]", &format!("{}]", "x".repeat(MEGABYTES)));
    let many = format!("{SMALL}{}", "---\n".repeat(MEGABYTES / 4));
    let comment = format!("#{}", "-".repeat(MEGABYTES));
    // Whatever comes of them, they come to an end.
    for text in [long, many, comment] {
        let _ = pods_from_yaml(&text);
    }
    for (open, close) in [("[", "]"), ("{a: ", "}"), ("- ", "")] {
        let deep = format!("{}x{}", open.repeat(50_000), close.repeat(50_000));
        assert!(pods_from_yaml(&deep).is_err(), "{open}");
    }
}

const FULL: &str = "
apiVersion: v1
kind: ConfigMap
metadata: {name: config, labels: {a: b}}
data: {level: debug}
binaryData: {blob: AP8=}
---
apiVersion: v1
kind: Secret
type: Opaque
metadata: {name: login}
data: {password: aHVudGVyMg==, user: eA==}
stringData: {user: admin}
---
apiVersion: v1
kind: Secret
metadata: {name: other, namespace: elsewhere}
---
apiVersion: v1
kind: Pod
metadata: {name: hello}
spec:
  nodeName: node-1
  securityContext: {fsGroup: 2000}
  containers:
  - name: main
    image: a:1
    envFrom:
    - {prefix: C_, configMapRef: {name: config}}
    - {secretRef: {name: none, optional: true}}
    env:
    - {name: IP, valueFrom: {fieldRef: {fieldPath: status.podIP}}}
    - {name: MIB, valueFrom: {resourceFieldRef: {resource: limits.memory, divisor: 1Mi}}}
    - {name: PASSWORD, valueFrom: {secretKeyRef: {name: login, key: password}}}
    volumeMounts:
    - {name: all, mountPath: /all}
    - {name: all, mountPath: /one, subPathExpr: $(IP)/x}
  volumes:
  - name: all
    projected:
      defaultMode: 0440
      sources:
      - {secret: {name: login, items: [{key: user, path: deep/user, mode: 0400}]}}
      - {downwardAPI: {items: [{path: labels, fieldRef: {fieldPath: metadata.labels}}]}}
      - {serviceAccountToken: {path: token, audience: vault, expirationSeconds: 600}}
  - {name: config, configMap: {name: config, optional: true}}
";

#[test]
fn a_pod_gets_the_objects_of_its_manifest_that_it_refers_to() {
    let documents = documents_from_yaml(FULL).unwrap();
    let pod = &documents.pods[0];
    assert!(pod.notes.is_empty(), "{:?}", pod.notes);

    let materials = documents.objects.materials_of("default", &pod.spec);

    let config = &materials.config_maps["config"];
    assert_eq!(
        (config.data["level"].as_str(), &config.binary_data["blob"][..]),
        ("debug", &[0, 255][..])
    );
    let login = &materials.secrets["login"].data;
    assert_eq!(
        (&login["password"][..], &login["user"][..]),
        (&b"hunter2"[..], &b"admin"[..])
    );
    assert_eq!((materials.config_maps.len(), materials.secrets.len()), (1, 1));
    let elsewhere = documents.objects.materials_of("elsewhere", &pod.spec);
    assert!(elsewhere.secrets.is_empty() && elsewhere.config_maps.is_empty());
}

#[test]
fn environments_volumes_and_mounts_are_mapped_whole() {
    use crate::host::{env_source, projected_source, volume};
    let spec = documents_from_yaml(FULL).unwrap().pods.remove(0).spec;

    assert_eq!(
        (spec.node_name.as_str(), spec.security_context.unwrap().fs_group),
        ("node-1", Some(2000))
    );
    let container = &spec.containers[0];
    assert_eq!(container.env_from[0].prefix, "C_");
    let source = container.env[1].source.clone().unwrap().source.unwrap();
    let env_source::Source::Resource(resource) = source else {
        panic!("{source:?}")
    };
    assert_eq!(
        (resource.resource.as_str(), resource.divisor),
        ("limits.memory", 1 << 20)
    );
    let mount = &container.volume_mounts[1];
    assert_eq!((mount.sub_path.as_str(), mount.expand_sub_path), ("$(IP)/x", true));
    let Some(volume::Source::Projected(all)) = &spec.volumes[0].source else {
        panic!("{:?}", spec.volumes)
    };
    assert_eq!(all.default_mode, Some(0o440), "octal, as Kubernetes reads it");
    let Some(projected_source::Source::Secret(secret)) = &all.sources[0].source else {
        panic!("{all:?}")
    };
    assert_eq!(
        (secret.items[0].path.as_str(), secret.items[0].mode),
        ("deep/user", Some(0o400))
    );
    let Some(projected_source::Source::Token(token)) = &all.sources[2].source else {
        panic!("{all:?}")
    };
    assert_eq!((token.audience.as_str(), token.expiration_seconds), ("vault", 600));
}

#[test]
fn wrong_references_and_files_are_refused_by_their_path() {
    let env = "spec.containers[0].env[2].valueFrom";
    let source = "spec.volumes[0].projected.sources[0].secret";
    let long = "x".repeat(300);
    let cases = [
        (
            "secretKeyRef: {name: login, key: password}",
            "secretKeyRef: {name: ../a, key: k}".to_owned(),
            format!("{env}.secretKeyRef.name"),
        ),
        (
            "secretKeyRef: {name: login, key: password}",
            format!("secretKeyRef: {{name: {long}, key: k}}"),
            format!("{env}.secretKeyRef.name"),
        ),
        (
            "secretKeyRef: {name: login, key: password}",
            "secretKeyRef: {name: login, key: ../k}".to_owned(),
            format!("{env}.secretKeyRef.key"),
        ),
        (
            "secretKeyRef: {name: login, key: password}",
            "secretKeyRef: {name: login}".to_owned(),
            format!("{env}.secretKeyRef.key"),
        ),
        (
            "secretKeyRef: {name: login, key: password}",
            "fileKeyRef: {path: x}".to_owned(),
            format!("{env}.fileKeyRef"),
        ),
        (
            "{secretKeyRef: {name: login, key: password}}",
            "{}".to_owned(),
            env.to_owned(),
        ),
        (
            "divisor: 1Mi",
            "divisor: 3".to_owned(),
            "spec.containers[0].env[1].valueFrom.resourceFieldRef.divisor".to_owned(),
        ),
        (
            "path: deep/user",
            "path: ../user".to_owned(),
            format!("{source}.items[0].path"),
        ),
        (
            "path: deep/user",
            "path: /user".to_owned(),
            format!("{source}.items[0].path"),
        ),
        (
            "path: deep/user",
            "path: ..data".to_owned(),
            format!("{source}.items[0].path"),
        ),
        (
            "path: deep/user",
            "path: \"a\\0b\"".to_owned(),
            format!("{source}.items[0].path"),
        ),
        (
            "mode: 0400",
            "mode: 01000".to_owned(),
            format!("{source}.items[0].mode"),
        ),
        ("mode: 0400", "mode: -1".to_owned(), format!("{source}.items[0].mode")),
        (
            "expirationSeconds: 600",
            "expirationSeconds: 5".to_owned(),
            "spec.volumes[0].projected.sources[2].serviceAccountToken.expirationSeconds".to_owned(),
        ),
        (
            "subPathExpr: $(IP)/x",
            "subPath: ../x".to_owned(),
            "spec.containers[0].volumeMounts[1].subPath".to_owned(),
        ),
        (
            "subPathExpr: $(IP)/x",
            "subPath: a, subPathExpr: b".to_owned(),
            "spec.containers[0].volumeMounts[1].subPathExpr".to_owned(),
        ),
        (
            "configMap: {name: config, optional: true}",
            "configMap: {name: config}, emptyDir: {}".to_owned(),
            "spec.volumes[1]".to_owned(),
        ),
        (
            "prefix: C_",
            "prefix: A=".to_owned(),
            "spec.containers[0].envFrom[0].prefix".to_owned(),
        ),
        (
            "data: {level: debug}",
            "data: {../level: debug}".to_owned(),
            "data.../level".to_owned(),
        ),
        (
            "data: {level: debug}",
            "data: {blob: debug}".to_owned(),
            "binaryData.blob".to_owned(),
        ),
        (
            "data: {level: debug}",
            "data: {level: 1}".to_owned(),
            "data.level".to_owned(),
        ),
        (
            "data: {level: debug}",
            format!("data: {{level: {}}}", "x".repeat(1 << 20)),
            "data".to_owned(),
        ),
        ("aHVudGVyMg==", "'%%%'".to_owned(), "data.password".to_owned()),
        ("type: Opaque", "typo: Opaque".to_owned(), "typo".to_owned()),
    ];
    for (from, to, path) in cases {
        assert!(FULL.contains(from), "{from}");
        let refused = documents_from_yaml(&FULL.replacen(from, &to, 1));
        let Err(ManifestError::Refused { problems, .. }) = refused else {
            panic!("{path}: {refused:?}")
        };
        let paths: Vec<_> = problems.into_iter().map(|problem| problem.path).collect();
        assert_eq!(paths, [path]);
    }
}
