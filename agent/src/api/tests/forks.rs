//! Pods begin as others were.

use flint_api::host::{self, container_status::State, pod_status::Phase};
use tonic::{Code, Status};

use super::{Flintd, pod, reason};

impl Flintd {
    pub(super) async fn apply_from(
        &self,
        snapshot: &str,
        uid: &str,
        spec: Option<host::PodSpec>,
    ) -> Result<host::Pod, Status> {
        let request = host::ApplyPodRequest {
            meta: Some(named(uid)),
            spec,
            from_snapshot: snapshot.into(),
            ..Default::default()
        };
        let applied = self.pods().apply_pod(request).await?.into_inner();
        Ok(applied.pod.unwrap())
    }

    pub(super) async fn fork(&self, names: &[&str]) -> Result<Vec<host::Pod>, Status> {
        let request = host::ForkPodRequest {
            uid: "a".into(),
            forks: names.iter().map(|name| named(name)).collect(),
            ..Default::default()
        };
        Ok(self.pods().fork_pod(request).await?.into_inner().pods)
    }

    async fn list(&self) -> usize {
        let listed = self.pods().list_pods(host::ListPodsRequest {}).await.unwrap();
        listed.into_inner().pods.len()
    }
}

/// A pod whose name is its uid.
fn named(uid: &str) -> host::PodMeta {
    host::PodMeta {
        name: uid.into(),
        ..pod(uid).0
    }
}

pub(super) fn runs(status: &host::PodStatus) -> bool {
    matches!(status.containers[0].state, Some(State::Running(_)))
}

#[tokio::test]
async fn a_pod_of_a_snapshot_goes_on_with_its_containers_under_a_name_of_its_own() {
    let folder = tempfile::tempdir().unwrap();
    let flintd = Flintd::with_running_pod(folder.path()).await;
    flintd.save("a", "x").await.unwrap();

    let pod = flintd.apply_from("x", "b", None).await.unwrap();

    assert_eq!(pod.status.unwrap().phase(), Phase::Pending, "it is not there yet");
    flintd.until("b", runs).await;
    assert_eq!(flintd.guest.created().len(), 1, "its container was there");
    let plans = flintd.sandboxes.plans.lock().unwrap().clone();
    assert_eq!(plans[1].identity.hostname, "b");
    assert_ne!(plans[0].id, plans[1].id);
    flintd.guest.print_and_exit("web-0", "bye", 3);
    let ended = flintd.until("b", |status| status.phase() == Phase::Failed).await;
    let Some(State::Terminated(end)) = ended.status.unwrap().containers.remove(0).state else {
        panic!("it has ended")
    };
    assert_eq!(end.exit_code, 3);
    assert_eq!(flintd.saved().await.len(), 1, "it stays");
}

#[tokio::test]
async fn a_snapshot_that_is_missing_another_pods_or_another_hosts_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let flintd = Flintd::with_running_pod(folder.path()).await;
    let missing = flintd.apply_from("x", "b", None).await.unwrap_err();
    assert_eq!(reason(&missing), "SNAPSHOT_NOT_FOUND");
    flintd.save("a", "x").await.unwrap();
    let other = host::PodSpec {
        hostname: "other".into(),
        ..pod("a").1
    };
    let refused = flintd.apply_from("x", "b", Some(other)).await.unwrap_err();
    assert_eq!(refused.code(), Code::InvalidArgument, "{refused:?}");
    assert!(refused.message().contains("the snapshot"), "{refused:?}");
    let taken = flintd.fork(&["b", "b"]).await.unwrap_err();
    assert_eq!(reason(&taken), "POD_EXISTS");

    flintd
        .guest
        .refuse_restoring("CPU vendor: GenuineIntel, and AuthenticAMD here");
    flintd.apply_from("x", "b", None).await.unwrap();

    let ended = flintd.until("b", |status| status.phase() == Phase::Failed).await;
    let status = ended.status.unwrap();
    assert_eq!(status.reason, "SnapshotRefused");
    assert!(status.message.contains("CPU vendor"), "{status:?}");
    let request = host::RemoveSnapshotRequest {
        name: "x".into(),
        ..Default::default()
    };
    flintd.snapshots().remove(request).await.unwrap();
}

#[tokio::test]
async fn all_forks_are_made_or_none_and_what_they_were_made_of_goes() {
    let folder = tempfile::tempdir().unwrap();
    let flintd = Flintd::with_running_pod(folder.path()).await;
    let many: Vec<_> = (0..65).map(|number| format!("f{number}")).collect();
    let many: Vec<_> = many.iter().map(String::as_str).collect();
    for (names, expected) in [
        (&[][..], "INVALID"),
        (&many, "INVALID"),
        (&["b", "a"], "POD_EXISTS"),
        // Each takes 320 MiB of 1024.
        (&["b", "c", "d"], "OutOfmemory"),
        (&["b", "not a name"], "INVALID"),
    ] {
        let refused = flintd.fork(names).await.unwrap_err();
        assert_eq!(reason(&refused), expected, "{names:?}: {refused:?}");
        assert_eq!(flintd.list().await, 1, "{names:?}");
    }

    let forks = flintd.fork(&["b", "c"]).await.unwrap();

    assert_eq!(forks.len(), 2);
    for uid in ["b", "c"] {
        flintd.until(uid, runs).await;
    }
    assert!(!flintd.guest.is_paused() && flintd.saved().await.is_empty());
    let again = flintd.fork(&["b", "c"]).await.unwrap();
    assert_eq!(
        again[1].meta, forks[1].meta,
        "a call whose answer was lost is made again"
    );
    assert_eq!(
        (flintd.list().await, flintd.sandboxes.plans.lock().unwrap().len()),
        (3, 3)
    );
}
