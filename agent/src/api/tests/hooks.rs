//! A pod's own programs run when it is saved and when it goes on.

use flint_api::host::{self, pod_status::Phase};

use super::{Flintd, forks::runs, pod, reason};

fn hook(command: &[&str]) -> host::Hook {
    host::Hook {
        container: "web".into(),
        command: command.iter().map(|word| (*word).into()).collect(),
        timeout: None,
    }
}

/// A running pod with hooks.
async fn with_hooks(folder: &std::path::Path, before: Option<host::Hook>, after: Option<host::Hook>) -> Flintd {
    let flintd = Flintd::start(folder).await;
    let (meta, spec) = pod("a");
    let hooks = host::SnapshotHooks {
        before_snapshot: before,
        after_restore: after,
    };
    let spec = host::PodSpec {
        snapshot_hooks: Some(hooks),
        ..spec
    };
    flintd.apply(meta, spec).await.unwrap();
    flintd.running("a").await;
    flintd
}

impl Flintd {
    /// What was run in `web-0`.
    fn executed(&self) -> Vec<String> {
        let all = self.guest.executed.borrow();
        assert!(all.iter().all(|(container, _)| container == "web-0"));
        all.iter().map(|(_, command)| command.join(" ")).collect()
    }
}

#[tokio::test]
async fn a_pod_puts_itself_in_order_before_it_is_saved_and_when_it_goes_on() {
    let folder = tempfile::tempdir().unwrap();
    let flintd = with_hooks(folder.path(), Some(hook(&["sync", "-f"])), Some(hook(&["renew"]))).await;

    flintd.save("a", "x").await.unwrap();

    assert_eq!(flintd.executed(), ["sync -f"]);
    flintd.apply_from("x", "b", None).await.unwrap();
    flintd.until("b", runs).await;
    assert_eq!(flintd.executed(), ["sync -f", "renew"]);
    flintd.fork(&["c"]).await.unwrap();
    flintd.until("c", runs).await;
    assert_eq!(flintd.executed(), ["sync -f", "renew", "sync -f", "renew"]);
}

#[tokio::test]
async fn a_pod_whose_hook_fails_is_not_saved_and_goes_on() {
    let folder = tempfile::tempdir().unwrap();
    let flintd = with_hooks(folder.path(), Some(hook(&["exit", "3", "no room\n"])), None).await;
    let failed = flintd.save("a", "x").await.unwrap_err();
    assert_eq!(reason(&failed), "HOOK_FAILED");
    assert!(
        failed.message().ends_with("ended with exit code 3: no room"),
        "{failed:?}"
    );
    assert!(!flintd.guest.is_paused() && flintd.saved().await.is_empty());
    assert_eq!(reason(&flintd.fork(&["b"]).await.unwrap_err()), "HOOK_FAILED");
    flintd.running("a").await;
}

#[tokio::test]
async fn a_hook_that_does_not_end_is_killed() {
    let folder = tempfile::tempdir().unwrap();
    let hang = host::Hook {
        timeout: Some(prost_types::Duration {
            seconds: 0,
            nanos: 50_000_000,
        }),
        ..hook(&["hang"])
    };
    let flintd = with_hooks(folder.path(), Some(hang), None).await;
    let failed = flintd.save("a", "x").await.unwrap_err();
    assert!(failed.message().contains("did not end within 50ms"), "{failed:?}");
    let mut executed = flintd.guest.executed.subscribe();
    let killed = executed.wait_for(|all| all.iter().any(|(container, _)| container == "killed"));
    killed.await.unwrap();
}

#[tokio::test]
async fn a_paused_pod_with_a_hook_is_not_saved() {
    let folder = tempfile::tempdir().unwrap();
    let flintd = with_hooks(folder.path(), Some(hook(&["sync"])), None).await;
    flintd.pause("a").await.unwrap();
    assert_eq!(reason(&flintd.save("a", "x").await.unwrap_err()), "POD_PAUSED");
    flintd.resume("a").await.unwrap();
    flintd.save("a", "x").await.unwrap();
}

#[tokio::test]
async fn a_pod_that_cannot_be_made_ready_where_it_goes_on_ends_with_the_reason() {
    let folder = tempfile::tempdir().unwrap();
    let flintd = with_hooks(folder.path(), None, Some(hook(&["exit", "1", "no lease"]))).await;
    flintd.save("a", "x").await.unwrap();
    flintd.apply_from("x", "b", None).await.unwrap();
    let ended = flintd.until("b", |status| status.phase() == Phase::Failed).await;
    let status = ended.status.unwrap();
    assert_eq!(status.reason, "AfterRestoreFailed");
    assert!(status.message.ends_with("exit code 1: no lease"), "{status:?}");
}

#[tokio::test]
async fn a_hook_names_a_container_a_program_and_a_time() {
    let folder = tempfile::tempdir().unwrap();
    let flintd = Flintd::start(folder.path()).await;
    let negative = Some(prost_types::Duration { seconds: -1, nanos: 0 });
    let hooks = host::SnapshotHooks {
        before_snapshot: Some(host::Hook {
            container: "other".into(),
            ..hook(&["x"])
        }),
        after_restore: Some(host::Hook {
            timeout: negative,
            ..hook(&[])
        }),
    };
    let (meta, spec) = pod("a");
    let spec = host::PodSpec {
        snapshot_hooks: Some(hooks),
        ..spec
    };
    let refused = flintd.apply(meta, spec).await.unwrap_err();
    for field in [
        "before_snapshot.container",
        "after_restore.command",
        "after_restore.timeout",
    ] {
        assert!(refused.message().contains(field), "{field}: {refused:?}");
    }
}
