//! ConfigMaps and secrets on their way through flintd, and where they must not be.

use super::*;

const SECRET: &str = "correct-horse-battery-staple";

fn materials(version: u64, value: &str) -> host::PodMaterials {
    let secret = host::Secret {
        data: [("password".to_owned(), value.as_bytes().to_vec())].into(),
    };
    host::PodMaterials {
        secrets: [("login".to_owned(), secret)].into(),
        version,
        ..Default::default()
    }
}

/// A pod whose environment and files need the secret.
fn secretive(uid: &str) -> (host::PodMeta, host::PodSpec) {
    use host::{env_source, projected_source, volume};
    let (meta, mut spec) = pod(uid);
    let key = host::KeyRef {
        name: "login".into(),
        key: "password".into(),
        optional: false,
    };
    spec.containers[0].env = vec![host::EnvVar {
        name: "PASSWORD".into(),
        source: Some(host::EnvSource {
            source: Some(env_source::Source::SecretKey(key)),
        }),
        ..Default::default()
    }];
    let object = host::ProjectedObject {
        name: "login".into(),
        ..Default::default()
    };
    let source = host::ProjectedSource {
        source: Some(projected_source::Source::Secret(object)),
    };
    let labels = host::ProjectedSource {
        source: Some(projected_source::Source::Downward(host::DownwardFiles {
            items: vec![host::DownwardFile {
                path: "labels".into(),
                source: Some(host::downward_file::Source::Field("metadata.labels".into())),
                mode: None,
            }],
        })),
    };
    spec.volumes = vec![host::Volume {
        name: "login".into(),
        source: Some(volume::Source::Projected(host::Projected {
            sources: vec![source, labels],
            default_mode: Some(0o400),
        })),
    }];
    spec.containers[0].volume_mounts = vec![host::VolumeMount {
        name: "login".into(),
        mount_path: "/login".into(),
        ..Default::default()
    }];
    (meta, spec)
}

impl Flintd {
    async fn apply_secretive(&self, uid: &str, materials: Option<host::PodMaterials>) -> Result<(), Status> {
        let (meta, spec) = secretive(uid);
        let request = host::ApplyPodRequest {
            meta: Some(meta),
            spec: Some(spec),
            materials,
            ..Default::default()
        };
        self.pods().apply_pod(request).await.map(drop)
    }

    async fn update(&self, uid: &str, materials: host::PodMaterials) -> Result<u64, Status> {
        let request = host::UpdateMaterialsRequest {
            uid: uid.into(),
            materials: Some(materials),
            ..Default::default()
        };
        Ok(self.pods().update_materials(request).await?.into_inner().version)
    }

    /// What the guest has.
    fn password(&self) -> Option<String> {
        let known = self.guest.materials.borrow().materials.clone()?;
        let bytes = known.secrets.get("login")?.data.get("password")?.clone();
        Some(String::from_utf8(bytes).unwrap())
    }
}

/// Whether any file below has the text.
fn is_on_disk(folder: &Path, text: &str) -> bool {
    std::fs::read_dir(folder).unwrap().any(|entry| {
        let path = entry.unwrap().path();
        if path.is_dir() {
            return is_on_disk(&path, text);
        }
        // A socket has no bytes.
        let bytes = std::fs::read(&path).unwrap_or_default();
        bytes.windows(text.len()).any(|window| window == text.as_bytes())
    })
}

#[tokio::test]
async fn a_secret_reaches_the_guest_and_no_file_of_the_host() {
    let folder = tempfile::tempdir().unwrap();
    let flintd = Flintd::start(folder.path()).await;
    flintd.apply_secretive("a", Some(materials(1, SECRET))).await.unwrap();
    let running = flintd.running("a").await;

    assert_eq!(flintd.password().as_deref(), Some(SECRET));
    let created = flintd.guest.created()[0].clone();
    let source = created.environment.unwrap().variables[0].source.clone();
    assert!(
        matches!(source, Some(flint_api::guest::env_var::Source::SecretKey(_))),
        "{source:?}"
    );
    assert!(!format!("{running:?}").contains(SECRET), "the pod as the API shows it");
    assert!(
        is_on_disk(folder.path(), "login"),
        "the name is, so the search finds what is there"
    );
    assert!(!is_on_disk(folder.path(), SECRET));
    flintd.guest.exit("web-0", 0);
    flintd.until("a", |status| status.phase() == Phase::Succeeded).await;
    assert!(!is_on_disk(folder.path(), SECRET));
}

#[tokio::test]
async fn a_container_waits_for_a_missing_secret_and_runs_when_it_comes() {
    let folder = tempfile::tempdir().unwrap();
    let flintd = Flintd::start(folder.path()).await;
    // The restart policy is Never: what is missing is no failure of the program.
    flintd.apply_secretive("a", None).await.unwrap();
    let waits = |status: &host::PodStatus| {
        matches!(&status.containers[0].state, Some(State::Waiting(waiting))
            if waiting.reason == "CreateContainerConfigError" && waiting.message == "secret \"login\" not found")
    };
    flintd.until("a", waits).await;

    assert_eq!(flintd.update("a", materials(0, SECRET)).await.unwrap(), 1);

    flintd.running("a").await;
    assert_eq!(flintd.password().as_deref(), Some(SECRET));
}

#[tokio::test]
async fn an_older_update_is_refused_and_changes_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let flintd = Flintd::start(folder.path()).await;
    flintd.apply_secretive("a", Some(materials(5, "five"))).await.unwrap();
    flintd.running("a").await;

    let stale = flintd.update("a", materials(4, "four")).await.unwrap_err();

    assert_eq!(
        (stale.code(), reason(&stale).as_str()),
        (Code::Aborted, "STALE_MATERIALS")
    );
    assert_eq!(flintd.password().as_deref(), Some("five"));
    assert_eq!(flintd.update("a", materials(6, "six")).await.unwrap(), 6);
    assert_eq!(flintd.update("a", materials(0, "next")).await.unwrap(), 7);
    assert_eq!(flintd.password().as_deref(), Some("next"));
}

#[tokio::test]
async fn a_later_flintd_knows_no_secret_and_its_guest_still_refuses_older_ones() {
    let folder = tempfile::tempdir().unwrap();
    let first = Flintd::start(folder.path()).await;
    first.apply_secretive("a", Some(materials(5, "five"))).await.unwrap();
    first.running("a").await;
    let later = tempfile::tempdir().unwrap();
    std::fs::copy(folder.path().join("state.redb"), later.path().join("state.redb")).unwrap();

    let second = Flintd::with(later.path(), first.sandboxes.clone()).await;
    second.running("a").await;
    assert_eq!(second.password().as_deref(), Some("five"));
    let stale = second.update("a", materials(4, "four")).await.unwrap_err();
    assert_eq!(reason(&stale), "STALE_MATERIALS");
    assert_eq!(second.password().as_deref(), Some("five"));
    // The same generation with its materials, as a client does that connects anew.
    second.apply_secretive("a", Some(materials(6, "six"))).await.unwrap();
    assert_eq!(second.password().as_deref(), Some("six"));
}

#[tokio::test]
async fn files_that_show_labels_follow_them() {
    let folder = tempfile::tempdir().unwrap();
    let flintd = Flintd::start(folder.path()).await;
    flintd.apply_secretive("a", Some(materials(1, SECRET))).await.unwrap();
    flintd.running("a").await;
    let (mut meta, spec) = secretive("a");
    meta.generation = 2;
    meta.labels.insert("tier".into(), "web".into());

    flintd.apply(meta, spec).await.unwrap();

    let shows =
        |request: &flint_api::guest::SetMaterialsRequest| format!("{:?}", request.volumes[0].sources).contains("tier=");
    flintd.guest.materials.subscribe().wait_for(shows).await.unwrap();
    assert_eq!(
        flintd.password().as_deref(),
        Some(SECRET),
        "volumes alone change no secret"
    );
}

#[tokio::test]
async fn materials_that_are_too_large_are_refused_by_their_path() {
    let folder = tempfile::tempdir().unwrap();
    let flintd = Flintd::start(folder.path()).await;
    let huge = "x".repeat((1 << 20) + 1);
    let refused = flintd
        .apply_secretive("a", Some(materials(1, &huge)))
        .await
        .unwrap_err();
    assert_eq!(refused.code(), Code::InvalidArgument);
    let details = refused.get_error_details();
    assert_eq!(
        details.bad_request().unwrap().field_violations[0].field,
        "materials.secrets[\"login\"]"
    );
    assert!(!refused.message().contains("xxx"), "{refused}");
    let gone = flintd.update("b", materials(1, "x")).await.unwrap_err();
    assert_eq!(reason(&gone), "POD_NOT_FOUND");
}
