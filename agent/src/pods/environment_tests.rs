use super::*;

fn meta() -> host::PodMeta {
    host::PodMeta {
        uid: "uid-1".into(),
        namespace: "shop".into(),
        name: "web".into(),
        labels: [
            ("tier".to_owned(), "front".to_owned()),
            ("app".to_owned(), "a \"b\"\n".to_owned()),
        ]
        .into(),
        annotations: [("note/x".to_owned(), "hi".to_owned())].into(),
        ..Default::default()
    }
}

fn spec() -> host::PodSpec {
    let resources = host::Resources {
        cpu_limit_milli: 1500,
        cpu_request_milli: 250,
        memory_limit_bytes: 65 << 20,
        ..Default::default()
    };
    let container = |name: &str, resources| host::Container {
        name: name.into(),
        resources,
        ..Default::default()
    };
    host::PodSpec {
        containers: vec![container("main", Some(resources)), container("free", None)],
        node_name: "node-7".into(),
        host_ips: vec!["192.0.2.7".into(), "2001:db8::7".into()],
        ..Default::default()
    }
}

fn with<T>(spec: &host::PodSpec, look: impl FnOnce(&Downward<'_>) -> T) -> T {
    let size = Size {
        vcpus: 2,
        memory_bytes: 256 << 20,
        scratch_bytes: 0,
        cpu_milli: 0,
    };
    let addresses = ["10.88.0.5".to_owned(), "fd00::5".to_owned()];
    look(&Downward {
        meta: &meta(),
        spec,
        addresses: &addresses,
        size,
    })
}

#[test]
fn each_field_has_its_value() {
    let spec = spec();
    for (path, value) in [
        ("metadata.name", "web"),
        ("metadata.namespace", "shop"),
        ("metadata.uid", "uid-1"),
        ("metadata.labels['tier']", "front"),
        ("metadata.labels['none']", ""),
        ("metadata.annotations['note/x']", "hi"),
        ("metadata.labels", "app=\"a \\\"b\\\"\\n\"\ntier=\"front\""),
        ("spec.nodeName", "node-7"),
        ("spec.serviceAccountName", "default"),
        ("status.hostIP", "192.0.2.7"),
        ("status.hostIPs", "192.0.2.7,2001:db8::7"),
        ("status.podIP", "10.88.0.5"),
        ("status.podIPs", "10.88.0.5,fd00::5"),
    ] {
        assert_eq!(
            with(&spec, |downward| downward.field(path)).as_deref(),
            Some(value),
            "{path}"
        );
    }
    for path in [
        "",
        "spec.containers",
        "metadata.labels['']",
        "metadata.finalizers['x']",
        "status.phase",
    ] {
        assert_eq!(with(&spec, |downward| downward.field(path)), None, "{path}");
    }
}

#[test]
fn what_nobody_says_of_the_host_is_its_own() {
    let bare = host::PodSpec::default();
    assert!(
        !with(&bare, |downward| downward.field("spec.nodeName"))
            .unwrap()
            .is_empty()
    );
    let address = with(&bare, |downward| downward.field("status.hostIP")).unwrap();
    assert!(address.parse::<IpAddr>().is_ok(), "{address}");
}

#[test]
fn resources_are_counted_in_their_divisor_and_default_to_the_machine() {
    let spec = spec();
    for (container, resource, divisor, value) in [
        ("", "limits.cpu", 0, "2"),
        ("main", "limits.cpu", 1, "1500"),
        ("main", "requests.cpu", 1000, "1"),
        ("main", "limits.memory", 0, "68157440"),
        ("main", "limits.memory", 1 << 20, "65"),
        ("main", "limits.memory", 1 << 30, "1"),
        ("free", "limits.cpu", 0, "2"),
        ("free", "limits.memory", 1 << 20, "256"),
        ("free", "requests.memory", 0, "0"),
    ] {
        let wanted = host::ResourceField {
            container: container.into(),
            resource: resource.into(),
            divisor,
        };
        let shown = with(&spec, |downward| downward.resource(&wanted, spec.containers.first()));
        assert_eq!(shown, value, "{container} {resource} {divisor}");
    }
}

fn only_user(downward: &super::Downward<'_>) -> Option<u32> {
    downward.only_user()
}

#[test]
fn tokens_are_for_the_one_user_that_all_containers_have() {
    let mut spec = spec();
    let of_user = |user| {
        Some(host::SecurityContext {
            run_as_user: Some(user),
            ..Default::default()
        })
    };
    assert_eq!(with(&spec, only_user), None);
    spec.containers[0].security_context = of_user(7);
    assert_eq!(with(&spec, only_user), None, "the other one's is the image's");
    spec.containers[1].security_context = of_user(8);
    assert_eq!(with(&spec, only_user), None);
    spec.containers[1].security_context = of_user(7);
    assert_eq!(with(&spec, only_user), Some(7));
}
