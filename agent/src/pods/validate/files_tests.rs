use super::{super::tests::good, *};

fn broken(break_it: impl FnOnce(&mut host::PodSpec)) -> Vec<String> {
    let (meta, mut spec) = good();
    break_it(&mut spec);
    super::super::pod(&meta, &spec)
        .into_iter()
        .map(|violation| violation.field)
        .collect()
}

fn item(key: &str, path: &str, mode: Option<u32>) -> host::KeyToPath {
    host::KeyToPath {
        key: key.into(),
        path: path.into(),
        mode,
    }
}

fn config_map(name: &str, items: Vec<host::KeyToPath>) -> Option<Source> {
    let object = host::ProjectedObject {
        name: name.into(),
        items,
        optional: false,
    };
    Some(Source::Projected(host::Projected {
        sources: vec![host::ProjectedSource {
            source: Some(projected_source::Source::ConfigMap(object)),
        }],
        default_mode: None,
    }))
}

#[test]
fn each_wrong_part_of_a_volume_is_named_by_its_path() {
    let at = |rest: &str| vec![format!("spec.volumes[0].projected.{rest}")];
    let with = |source: Option<Source>| broken(|spec| spec.volumes[0].source = source);
    assert_eq!(
        with(config_map("config", vec![item("a", "b/c", Some(0o400))])),
        Vec::<String>::new()
    );
    for name in ["", "a/b", "..", "a\0b", &"x".repeat(300)] {
        assert_eq!(
            with(config_map(name, Vec::new())),
            at("sources[0].config_map.name"),
            "{name:?}"
        );
    }
    for key in ["", "a/b", "..", "..data", "a\0b", &"x".repeat(300)] {
        assert_eq!(
            with(config_map("c", vec![item(key, "f", None)])),
            at("sources[0].config_map.items[0].key"),
            "{key:?}"
        );
    }
    for path in ["", "/etc", "../x", "a/../x", "..data", "a//b", "a\0b", &"x".repeat(300)] {
        assert_eq!(
            with(config_map("c", vec![item("k", path, None)])),
            at("sources[0].config_map.items[0].path"),
            "{path:?}"
        );
    }
    assert_eq!(
        with(config_map("c", vec![item("k", "f", Some(0o1000))])),
        at("sources[0].config_map.items[0].mode")
    );
    assert_eq!(
        with(config_map("c", vec![item("k", "f", None), item("l", "f", None)])),
        at("sources[0].config_map.items[1].path")
    );
}

#[test]
fn each_wrong_part_of_a_mount_is_named_by_its_path() {
    let with = |change: fn(&mut host::VolumeMount)| broken(|spec| change(&mut spec.containers[0].volume_mounts[0]));
    for sub_path in ["/etc", "..", "a/../../b", "a\0"] {
        let fields = broken(|spec| spec.containers[0].volume_mounts[0].sub_path = sub_path.into());
        assert_eq!(fields, ["spec.containers[0].volume_mounts[0].sub_path"], "{sub_path:?}");
    }
    assert_eq!(
        with(|mount| mount.mount_path = "/a\0".into()),
        ["spec.containers[0].volume_mounts[0].mount_path"]
    );
    let twice = broken(|spec| {
        let mut again = spec.containers[0].volume_mounts[0].clone();
        again.mount_path.push('/');
        spec.containers[0].volume_mounts.push(again);
    });
    assert_eq!(twice, ["spec.containers[0].volume_mounts[1].mount_path"]);
}

#[test]
fn a_thousand_volumes_are_too_many() {
    let fields = broken(|spec| {
        let volume = |n: usize| host::Volume {
            name: format!("v{n}"),
            source: Some(Source::EmptyDir(host::EmptyDir::default())),
        };
        spec.volumes.extend((0..1000).map(volume));
    });
    assert_eq!(fields, ["spec.volumes"]);
}

#[test]
fn each_wrong_part_of_an_environment_is_named_by_its_path() {
    let with = |value: &str, source: Option<env_source::Source>| {
        let source = source.map(|source| host::EnvSource { source: Some(source) });
        let variable = host::EnvVar {
            name: "A".into(),
            value: value.into(),
            source,
        };
        broken(|spec| spec.containers[0].env = vec![variable])
    };
    let field = |path: &str| Some(env_source::Source::Field(path.into()));
    let path = |rest: &str| vec![format!("spec.containers[0].env[0].{rest}")];
    assert_eq!(with("", field("status.podIP")), Vec::<String>::new());
    assert_eq!(with(&"x".repeat(1 << 20), None), path("value"));
    assert_eq!(with("x", field("status.podIP")), path("source"));
    for unknown in ["", "spec.containers", "metadata.labels", "metadata.labels['']"] {
        assert_eq!(with("", field(unknown)), path("source.field"), "{unknown}");
    }
    let key = |name: &str, key: &str| {
        Some(env_source::Source::SecretKey(host::KeyRef {
            name: name.into(),
            key: key.into(),
            optional: true,
        }))
    };
    assert_eq!(with("", key("..", "k")), path("source.secret_key.name"));
    assert_eq!(with("", key("s", "../k")), path("source.secret_key.key"));
    let resource = |container: &str, resource: &str| {
        Some(env_source::Source::Resource(host::ResourceField {
            container: container.into(),
            resource: resource.into(),
            divisor: 0,
        }))
    };
    assert_eq!(
        with("", resource("other", "limits.cpu")),
        path("source.resource.container")
    );
    assert_eq!(with("", resource("", "limits.gpu")), path("source.resource.resource"));
}

#[test]
fn materials_are_bounded_and_their_names_are_checked() {
    let of = |name: &str, key: &str, size: usize| {
        let secret = host::Secret {
            data: [(key.to_owned(), vec![0; size])].into(),
        };
        let secrets = [(name.to_owned(), secret)].into();
        let all = host::PodMaterials {
            secrets,
            ..Default::default()
        };
        materials(&all)
            .into_iter()
            .map(|violation| violation.field)
            .collect::<Vec<_>>()
    };
    assert_eq!(of("s", "k", MOST_OF_ONE), Vec::<String>::new());
    assert_eq!(of("s", "k", MOST_OF_ONE + 1), ["materials.secrets[\"s\"]"]);
    assert_eq!(of("../s", "k", 1), ["materials.secrets[\"../s\"]"]);
    assert_eq!(of("s", "../k", 1), ["materials.secrets[\"s\"].data[\"../k\"]"]);
    let many = (0..4).map(|n| {
        let map = host::ConfigMap {
            data: [("k".to_owned(), "x".repeat(MOST_OF_ONE))].into(),
            ..Default::default()
        };
        (format!("m{n}"), map)
    });
    let many = host::PodMaterials {
        config_maps: many.collect(),
        ..Default::default()
    };
    let fields: Vec<_> = materials(&many).into_iter().map(|violation| violation.field).collect();
    assert_eq!(fields, ["materials"]);
}
