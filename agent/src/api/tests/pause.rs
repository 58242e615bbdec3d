//! A pod is paused and goes on.

use flint_api::host::{self, exec_request, exec_response, pod_event, pod_status::Phase, streams_client::StreamsClient};
use tonic::{Code, Status};

use super::{Flintd, pod, reason};

const SIGQUIT: u32 = 3;

impl Flintd {
    pub(super) async fn pause(&self, uid: &str) -> Result<host::Pod, Status> {
        let request = host::PausePodRequest {
            uid: uid.into(),
            ..Default::default()
        };
        let paused = self.pods().pause_pod(request).await?.into_inner();
        Ok(paused.pod.unwrap())
    }

    pub(super) async fn resume(&self, uid: &str) -> Result<host::Pod, Status> {
        let request = host::ResumePodRequest {
            uid: uid.into(),
            ..Default::default()
        };
        let resumed = self.pods().resume_pod(request).await?.into_inner();
        Ok(resumed.pod.unwrap())
    }

    async fn terminate(&self, uid: &str, seconds: i64) {
        let request = host::TerminatePodRequest {
            uid: uid.into(),
            grace_period: Some(prost_types::Duration { seconds, nanos: 0 }),
            ..Default::default()
        };
        self.pods().terminate_pod(request).await.unwrap();
    }
}

fn is_paused(pod: &host::Pod) -> bool {
    pod.status.as_ref().unwrap().paused_at.is_some()
}

async fn exec(flintd: &Flintd) -> Result<tonic::Streaming<host::ExecResponse>, Status> {
    let start = host::ExecStart {
        uid: "a".into(),
        command: vec!["true".into()],
        ..Default::default()
    };
    let frame = Some(exec_request::Frame::Start(start));
    let mut streams = StreamsClient::new(flintd.channel.clone());
    let answers = streams.exec(tokio_stream::once(host::ExecRequest { frame })).await?;
    Ok(answers.into_inner())
}

#[tokio::test]
async fn a_paused_pod_stands_still_and_goes_on_when_it_is_resumed() {
    let folder = tempfile::tempdir().unwrap();
    let flintd = Flintd::with_running_pod(folder.path()).await;
    let from_revision = flintd.pods().list_pods(host::ListPodsRequest {}).await.unwrap();
    let from_revision = from_revision.into_inner().revision;

    for _ in 0..2 {
        let paused = flintd.pause("a").await.unwrap();
        assert!(is_paused(&paused) && flintd.guest.is_paused());
        assert_eq!(paused.status.unwrap().phase(), Phase::Running);
    }
    let refused = exec(&flintd).await.unwrap_err();
    assert_eq!(
        (refused.code(), reason(&refused).as_str()),
        (Code::FailedPrecondition, "POD_PAUSED")
    );

    for _ in 0..2 {
        let resumed = flintd.resume("a").await.unwrap();
        assert!(!is_paused(&resumed) && !flintd.guest.is_paused());
    }
    let answer = exec(&flintd).await.unwrap().message().await.unwrap().unwrap();
    assert!(matches!(answer.frame, Some(exec_response::Frame::Exit(_))));

    let request = host::WatchPodsRequest { from_revision };
    let mut events = flintd.pods().watch_pods(request).await.unwrap().into_inner();
    let mut seen = Vec::new();
    while seen.len() < 2 {
        let event = events.message().await.unwrap().unwrap();
        assert_eq!(event.r#type(), pod_event::Type::Modified);
        seen.push(is_paused(&event.pod.unwrap()));
    }
    assert_eq!(seen, [true, false]);
}

#[tokio::test]
async fn what_cannot_be_paused_says_why() {
    let folder = tempfile::tempdir().unwrap();
    let flintd = Flintd::with_running_pod(folder.path()).await;
    let unknown = flintd.pause("b").await.unwrap_err();
    assert_eq!(reason(&unknown), "POD_NOT_FOUND");

    let (meta, mut spec) = pod("b");
    spec.containers[0].image = "down/x".into();
    flintd.apply(meta, spec).await.unwrap();
    let no_sandbox = flintd.pause("b").await.unwrap_err();
    assert_eq!(
        (no_sandbox.code(), reason(&no_sandbox).as_str()),
        (Code::FailedPrecondition, "POD_NOT_RUNNING")
    );

    flintd.guest.exit("web-0", 0);
    flintd.until("a", |status| status.phase() == Phase::Succeeded).await;
    for refused in [flintd.pause("a").await, flintd.resume("a").await] {
        assert_eq!(reason(&refused.unwrap_err()), "POD_NOT_RUNNING");
    }
}

#[tokio::test]
async fn a_sandbox_that_does_not_stand_still_leaves_its_pod_running() {
    let folder = tempfile::tempdir().unwrap();
    let flintd = Flintd::with_running_pod(folder.path()).await;
    flintd.guest.refuse_pauses();
    let failed = flintd.pause("a").await.unwrap_err();
    assert_eq!((failed.code(), reason(&failed).as_str()), (Code::Internal, "SANDBOX"));
    assert!(failed.message().contains("does not come to rest"), "{failed:?}");
    assert!(!is_paused(&flintd.running("a").await));
}

#[tokio::test]
async fn a_paused_pod_that_is_stopped_ends_in_good_order() {
    let folder = tempfile::tempdir().unwrap();
    let flintd = Flintd::with_running_pod(folder.path()).await;
    flintd.pause("a").await.unwrap();
    flintd.terminate("a", 30).await;
    flintd.until("a", |status| status.phase() == Phase::Failed).await;
    assert_eq!(flintd.guest.signals(), [SIGQUIT], "the image's stop signal");
}

#[tokio::test]
async fn a_paused_pod_that_is_killed_does_not_run_again() {
    let folder = tempfile::tempdir().unwrap();
    let flintd = Flintd::with_running_pod(folder.path()).await;
    flintd.pause("a").await.unwrap();
    flintd.terminate("a", 0).await;
    let ended = flintd.until("a", |status| status.phase() == Phase::Failed).await;
    assert!(flintd.guest.is_paused(), "it never went on");
    assert!(!is_paused(&ended));
}

#[tokio::test]
async fn a_stale_lease_pauses_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let flintd = Flintd::with_running_pod(folder.path()).await;
    let lease = host::AcquireLeaseRequest {
        holder: "node-a".into(),
        duration: Some(prost_types::Duration { seconds: 60, nanos: 0 }),
    };
    let mut host = host::host_client::HostClient::new(flintd.channel.clone());
    host.acquire_lease(lease).await.unwrap();
    assert_eq!(reason(&flintd.pause("a").await.unwrap_err()), "LEASE_LOST");
    assert_eq!(reason(&flintd.resume("a").await.unwrap_err()), "LEASE_LOST");
    assert!(!flintd.guest.is_paused());
}
