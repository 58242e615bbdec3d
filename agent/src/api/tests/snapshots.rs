//! Pods are saved, and what was saved is listed and removed.

use flint_api::host::{self, pod_status::Phase, snapshots_client::SnapshotsClient};
use tonic::{Code, Status, transport::Channel};

use super::{Flintd, reason};
use crate::backend::SaveError;

impl Flintd {
    pub(super) fn snapshots(&self) -> SnapshotsClient<Channel> {
        SnapshotsClient::new(self.channel.clone())
    }

    pub(super) async fn save(&self, uid: &str, name: &str) -> Result<host::Snapshot, Status> {
        let request = host::CreateSnapshotRequest {
            uid: uid.into(),
            name: name.into(),
            ..Default::default()
        };
        let created = self.snapshots().create(request).await?.into_inner();
        Ok(created.snapshot.unwrap())
    }

    pub(super) async fn saved(&self) -> Vec<host::Snapshot> {
        let listed = self.snapshots().list(host::ListSnapshotsRequest {}).await.unwrap();
        listed.into_inner().snapshots
    }
}

#[tokio::test]
async fn a_running_pod_is_saved_and_goes_on_and_its_image_is_kept() {
    let folder = tempfile::tempdir().unwrap();
    let flintd = Flintd::with_running_pod(folder.path()).await;

    let saved = flintd.save("a", "").await.unwrap();

    assert_eq!(saved.name, "web-1");
    assert_eq!(saved.pod.as_ref().unwrap().uid, "a");
    assert_eq!(saved.images, ["sha256:b"]);
    assert!(!flintd.guest.is_paused(), "it goes on");
    let files = folder.path().join("snapshots/web-1");
    assert_eq!(std::fs::read_to_string(files.join("scratch")).unwrap(), "disk");
    assert_eq!(flintd.saved().await, [saved]);

    flintd.guest.exit("web-0", 0);
    flintd.until("a", |status| status.phase() == Phase::Succeeded).await;
    let mut images = host::images_client::ImagesClient::new(flintd.channel.clone());
    let remove_image = || host::RemoveImageRequest {
        image: "busybox".into(),
    };
    let refused = images.remove(remove_image()).await.unwrap_err();
    assert_eq!(reason(&refused), "IMAGE_IN_USE");
    let remove = || host::RemoveSnapshotRequest {
        name: "web-1".into(),
        ..Default::default()
    };
    flintd.snapshots().remove(remove()).await.unwrap();
    assert!(!files.exists() && flintd.saved().await.is_empty());
    images.remove(remove_image()).await.unwrap();
    let gone = flintd.snapshots().remove(remove()).await.unwrap_err();
    assert_eq!(
        (gone.code(), reason(&gone).as_str()),
        (Code::NotFound, "SNAPSHOT_NOT_FOUND")
    );
}

#[tokio::test]
async fn a_paused_pod_is_saved_and_stays_paused() {
    let folder = tempfile::tempdir().unwrap();
    let flintd = Flintd::with_running_pod(folder.path()).await;
    let request = host::PausePodRequest {
        uid: "a".into(),
        ..Default::default()
    };
    flintd.pods().pause_pod(request).await.unwrap();

    let saved = flintd.save("a", "still").await.unwrap();

    assert_eq!(saved.paused_for, Some(prost_types::Duration::default()));
    assert!(flintd.guest.is_paused());
}

#[tokio::test]
async fn a_pod_whose_saving_fails_goes_on_and_nothing_is_left() {
    let folder = tempfile::tempdir().unwrap();
    let flintd = Flintd::with_running_pod(folder.path()).await;
    let failures = [
        (SaveError::NoSpace, Code::ResourceExhausted, "NO_SPACE"),
        (SaveError::Failed("KVM is gone".into()), Code::Internal, "SANDBOX"),
    ];
    for (error, code, name) in failures {
        flintd.guest.fail_saving(error);
        let failed = flintd.save("a", "x").await.unwrap_err();
        assert_eq!((failed.code(), reason(&failed).as_str()), (code, name), "{failed:?}");
        assert!(!flintd.guest.is_paused());
        assert!(flintd.saved().await.is_empty());
        assert_eq!(std::fs::read_dir(folder.path().join("snapshots")).unwrap().count(), 0);
    }
    flintd.save("a", "x").await.unwrap();
}

#[tokio::test]
async fn what_cannot_be_saved_says_why() {
    let folder = tempfile::tempdir().unwrap();
    let flintd = Flintd::with_running_pod(folder.path()).await;
    assert_eq!(reason(&flintd.save("b", "").await.unwrap_err()), "POD_NOT_FOUND");
    assert_eq!(reason(&flintd.save("a", "../x").await.unwrap_err()), "INVALID");
    flintd.save("a", "x").await.unwrap();
    let taken = flintd.save("a", "x").await.unwrap_err();
    assert_eq!(
        (taken.code(), reason(&taken).as_str()),
        (Code::AlreadyExists, "SNAPSHOT_EXISTS")
    );
    flintd.save("a", "y").await.unwrap();
    let many = flintd.save("a", "z").await.unwrap_err();
    assert_eq!(reason(&many), "TOO_MANY_SNAPSHOTS");

    flintd.guest.exit("web-0", 0);
    flintd.until("a", |status| status.phase() == Phase::Succeeded).await;
    assert_eq!(reason(&flintd.save("a", "w").await.unwrap_err()), "POD_NOT_RUNNING");
}
