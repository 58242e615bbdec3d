//! Snapshots go to a registry, and from there to another flintd.

use std::{fs, path::Path, sync::atomic::Ordering};

use flint_api::host::{self, SnapshotProgress, pod_status::Phase};
use nix::sys::signal::Signal;
use tonic::{Code, Status, Streaming};

use super::{Flintd, reason, registry::Registry};

/// The stages that a push or pull told, and its last message.
async fn end(mut progress: Streaming<SnapshotProgress>) -> Result<(Vec<String>, SnapshotProgress), Status> {
    let (mut stages, mut last) = (Vec::new(), None);
    while let Some(step) = progress.message().await? {
        stages.push(step.stage.clone());
        last = Some(step);
    }
    stages.dedup();
    Ok((stages, last.expect("the last message has the result")))
}

impl Flintd {
    async fn begin_push(&self, name: &str, reference: &str) -> Result<Streaming<SnapshotProgress>, Status> {
        let request = host::PushSnapshotRequest {
            name: name.into(),
            reference: reference.into(),
            credentials: None,
        };
        Ok(self.snapshots().push(request).await?.into_inner())
    }

    async fn begin_pull(&self, reference: &str, name: &str) -> Result<Streaming<SnapshotProgress>, Status> {
        let request = host::PullSnapshotRequest {
            reference: reference.into(),
            name: name.into(),
            ..Default::default()
        };
        Ok(self.snapshots().pull(request).await?.into_inner())
    }

    async fn push(&self, name: &str, reference: &str) -> Result<(Vec<String>, SnapshotProgress), Status> {
        end(self.begin_push(name, reference).await?).await
    }

    async fn pull(&self, reference: &str, name: &str) -> Result<(Vec<String>, SnapshotProgress), Status> {
        end(self.begin_pull(reference, name).await?).await
    }

    async fn pull_refused(&self, reference: &str) -> (Code, String, String) {
        let error = self.pull(reference, "").await.unwrap_err();
        (error.code(), reason(&error), error.message().to_owned())
    }

    async fn remove_snapshot(&self, name: &str) -> Result<u64, Status> {
        let request = host::RemoveSnapshotRequest {
            name: name.into(),
            ..Default::default()
        };
        Ok(self.snapshots().remove(request).await?.into_inner().freed_bytes)
    }
}

/// A registry that has a snapshot of a running pod; its reference.
async fn pushed(folder: &Path) -> (Registry, String) {
    let registry = Registry::start();
    let flintd = Flintd::with_running_pod(folder).await;
    flintd.save("a", "warm").await.unwrap();
    let reference = registry.reference("t/web:1");
    flintd.push("warm", &reference).await.unwrap();
    (registry, reference)
}

/// Nothing of a snapshot is there.
async fn assert_none(flintd: &Flintd, folder: &Path) {
    assert_eq!(flintd.saved().await, []);
    assert_eq!(fs::read_dir(folder.join("snapshots")).unwrap().count(), 0);
}

#[tokio::test]
async fn a_snapshot_that_one_host_pushes_another_pulls_and_runs() {
    let (here, there) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let registry = Registry::start();
    let flintd = Flintd::with_running_pod(here.path()).await;
    let mut saved = flintd.save("a", "warm").await.unwrap();
    let reference = registry.reference("t/web:1");

    let (stages, last) = flintd.push("warm", &reference).await.unwrap();

    assert_eq!(stages, ["read", "send", "done"]);
    assert_eq!(last.snapshot.as_ref(), Some(&saved));
    let by_digest = last.pushed;
    assert!(
        by_digest.starts_with(&registry.reference("t/web@sha256:")),
        "{by_digest}"
    );

    let flintd = Flintd::start(there.path()).await;
    let (stages, last) = flintd.pull(&by_digest, "").await.unwrap();
    assert_eq!(stages, ["resolve", "fetch", "write", "done"], "the image is here");
    let pulled = last.snapshot.unwrap();
    saved.stored_bytes = pulled.stored_bytes;
    assert_eq!(pulled, saved);
    assert_eq!(flintd.saved().await, [saved]);
    flintd.pull(&reference, "second").await.unwrap();
    let request = host::ApplyPodRequest {
        meta: Some(super::pod("b").0),
        from_snapshot: "warm".into(),
        ..Default::default()
    };
    flintd.guest.has_running("web-0");
    flintd.pods().apply_pod(request).await.unwrap();
    flintd.running("b").await;
    flintd.guest.print_and_exit("web-0", "bye", 3);
    flintd.until("b", |status| status.phase() == Phase::Failed).await;

    for name in ["warm", "second"] {
        flintd.remove_snapshot(name).await.unwrap();
    }
    assert_none(&flintd, there.path()).await;
    let packs = fs::read_dir(there.path().join("images/packs")).unwrap();
    assert_eq!(packs.count(), 0, "its chunks went with it");
}

#[tokio::test]
async fn an_image_that_cannot_be_had_or_is_another_device_leaves_nothing_until_it_can() {
    let (here, there) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (_registry, reference) = pushed(here.path()).await;
    let flintd = Flintd::start(there.path()).await;
    let images = &flintd.images;
    images.absent.store(true, Ordering::Relaxed);
    images.down.store(true, Ordering::Relaxed);
    let (code, name, message) = flintd.pull_refused(&reference).await;
    assert_eq!((code, name.as_str()), (Code::Unavailable, "REGISTRY_UNAVAILABLE"));
    assert!(message.contains("busybox") && message.contains("sha256:b"), "{message}");
    assert_none(&flintd, there.path()).await;

    images.down.store(false, Ordering::Relaxed);
    images.differs.store(true, Ordering::Relaxed);
    let (code, name, message) = flintd.pull_refused(&reference).await;
    assert_eq!((code, name.as_str()), (Code::FailedPrecondition, "IMAGE_DIFFERS"));
    assert!(message.contains("version of flintd"), "{message}");
    assert_none(&flintd, there.path()).await;

    images.absent.store(true, Ordering::Relaxed);
    images.differs.store(false, Ordering::Relaxed);
    let (stages, _) = flintd.pull(&reference, "").await.unwrap();
    assert_eq!(stages, ["resolve", "images", "fetch", "write", "done"]);
}

#[tokio::test]
async fn a_name_is_pulled_once_at_a_time_and_free_again_when_a_client_hangs_up() {
    let (here, there) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (_registry, reference) = pushed(here.path()).await;
    let flintd = Flintd::start(there.path()).await;
    flintd.images.absent.store(true, Ordering::Relaxed);
    flintd.images.silent.send_replace(true);
    let mut first = flintd.begin_pull(&reference, "").await.unwrap();
    assert_eq!(first.message().await.unwrap().unwrap().stage, "resolve");
    while first.message().await.unwrap().unwrap().stage != "images" {}

    let (code, name, _) = flintd.pull_refused(&reference).await;
    assert_eq!((code, name.as_str()), (Code::AlreadyExists, "SNAPSHOT_EXISTS"));
    let mut images = host::images_client::ImagesClient::new(flintd.channel.clone());
    let request = host::RemoveImageRequest {
        image: "busybox".into(),
    };
    flintd.images.absent.store(false, Ordering::Relaxed);
    let refused = images.remove(request).await.unwrap_err();
    assert_eq!(reason(&refused), "IMAGE_IN_USE", "it is needed already");
    assert_eq!(flintd.saved().await, [], "nothing half-made is seen");

    drop(first);
    flintd.images.silent.send_replace(false);
    let pulled = loop {
        // When flintd hears of the hang-up is the network's affair.
        match flintd.pull(&reference, "").await {
            Err(error) if reason(&error) == "SNAPSHOT_EXISTS" => tokio::task::yield_now().await,
            done => break done,
        }
    };
    pulled.unwrap();
}

#[tokio::test]
async fn what_is_not_there_damaged_or_out_of_reach_says_so_and_leaves_nothing() {
    let (here, there) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (registry, reference) = pushed(here.path()).await;
    let flintd = Flintd::start(there.path()).await;
    let missing = flintd.push("none", &reference).await.unwrap_err();
    assert_eq!(reason(&missing), "SNAPSHOT_NOT_FOUND");
    let hidden = flintd.push(".fork-0", &reference).await.unwrap_err();
    assert_eq!(reason(&hidden), "SNAPSHOT_NOT_FOUND");
    for (reference, code, name) in [
        (registry.reference("t/web:2"), Code::NotFound, "REFERENCE_NOT_FOUND"),
        // The discard port of loopback.
        ("127.0.0.1:9/t/web:1".into(), Code::Unavailable, "REGISTRY_UNAVAILABLE"),
        ("Not A Reference".into(), Code::InvalidArgument, "INVALID"),
        (String::new(), Code::InvalidArgument, "INVALID"),
    ] {
        let (found, of, message) = flintd.pull_refused(&reference).await;
        assert_eq!((found, of.as_str()), (code, name), "{reference}: {message}");
    }
    for text in ["flint.pod", "disk"] {
        let [blob] = &registry.blobs_with(text)[..] else {
            panic!("one blob has it")
        };
        let good = fs::read(blob).unwrap();
        let mut bad = good.clone();
        bad[10] ^= 1;
        fs::write(blob, bad).unwrap();
        let (code, name, message) = flintd.pull_refused(&reference).await;
        assert_eq!((code, name.as_str()), (Code::DataLoss, "SNAPSHOT_CORRUPT"), "{message}");
        assert!(message.contains("push it again"), "{message}");
        assert_none(&flintd, there.path()).await;
        fs::write(blob, good).unwrap();
    }
    flintd.pull(&reference, "").await.unwrap();
}

#[tokio::test]
async fn a_snapshot_that_is_removed_while_it_is_pushed_arrives() {
    let (here, there) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let registry = Registry::start();
    let flintd = Flintd::with_running_pod(here.path()).await;
    flintd.save("a", "warm").await.unwrap();
    registry.signal(Signal::SIGSTOP);
    let reference = registry.reference("t/web:1");
    let mut push = flintd.begin_push("warm", &reference).await.unwrap();
    assert_eq!(push.message().await.unwrap().unwrap().stage, "read");

    flintd.remove_snapshot("warm").await.unwrap();

    registry.signal(Signal::SIGCONT);
    end(push).await.unwrap();
    let flintd = Flintd::start(there.path()).await;
    flintd.pull(&reference, "").await.unwrap();
    let scratch = there.path().join("snapshots/warm/scratch");
    assert_eq!(fs::read_to_string(scratch).unwrap(), "disk");
}
