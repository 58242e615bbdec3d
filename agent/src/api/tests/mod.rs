//! The host API over a real unix socket, with scripted sandboxes.

mod forks;
mod hooks;
mod materials;
mod pause;
mod registry;
mod scripted;
mod snapshots;
mod streams;
mod travel;

use std::{path::Path, sync::Arc, time::Duration};

use flint_api::{
    host::{
        self, container_status::State, host_client::HostClient, images_client::ImagesClient, pod_status::Phase,
        pods_client::PodsClient, streams_client::StreamsClient,
    },
    vmm::ExitReason,
};
use flint_snapshots::images::{ImageStore, ImageStoreOptions};
use hyper_util::rt::TokioIo;
use tokio::{net::UnixStream, sync::oneshot, task::JoinHandle};
use tokio_stream::StreamExt as _;
use tonic::{
    Code, Status,
    transport::{Channel, Endpoint},
};
use tonic_types::StatusExt as _;

use self::scripted::{ScriptedGuest, ScriptedImages, ScriptedSandboxes};
use super::{Api, DOMAIN, listen};
use crate::{
    host::{HostControl, Reserve, describe},
    logs::Logs,
    metrics::Metrics,
    pods::{
        Context, Pods,
        admission::{Ledger, Sizing},
        journal::Journal,
    },
    saved::SavedPods,
    store::Store,
    travel::{Mover, TemplateMover},
};

const MIB: u64 = 1 << 20;

/// A flintd in this process.
struct Flintd {
    channel: Channel,
    guest: ScriptedGuest,
    sandboxes: ScriptedSandboxes,
    images: ScriptedImages,
    stop: Option<oneshot::Sender<()>>,
    server: JoinHandle<()>,
    journal: std::thread::JoinHandle<()>,
}

impl Flintd {
    async fn start(folder: &Path) -> Self {
        Self::with(folder, ScriptedSandboxes::default()).await
    }

    async fn with(folder: &Path, sandboxes: ScriptedSandboxes) -> Self {
        let store = Store::open(&folder.join("state.redb")).unwrap();
        let loaded = store.load().unwrap();
        let (journal, thread) = Journal::start(store, &loaded).unwrap();
        let amounts = host::Amounts {
            cpu_milli: 2000,
            memory_bytes: 1024 * MIB,
            scratch_bytes: 0,
            pods: 10,
        };
        let control = Arc::new(HostControl::new(journal.clone(), loaded.host.clone()));
        let images = ScriptedImages::default();
        let context = Arc::new(Context {
            sandboxes: Arc::new(sandboxes.clone()),
            images: Arc::new(images.clone()),
            journal,
            logs: Arc::new(Logs::new(folder.join("logs"))),
            metrics: Arc::new(Metrics::new()),
            ledger: Ledger::new(amounts),
            sizing: Sizing {
                overhead_bytes: 64 * MIB,
                default_memory_bytes: 256 * MIB,
                default_scratch_bytes: MIB,
                host_cpus: 2,
            },
            saved: SavedPods::open(&folder.join("snapshots"), 2).unwrap(),
            host_changed: tokio::sync::watch::Sender::new(0),
        });
        let store = ImageStore::open(&folder.join("images"), ImageStoreOptions::default()).await;
        let machines = store.unwrap().machines();
        let templates = TemplateMover::new(None, machines.clone());
        let mover = Mover::new(context.saved.clone(), context.images.clone(), machines).await;
        let pods = Pods::start(context, loaded).await;
        let info = describe(
            folder,
            Reserve {
                cpu_milli: 0,
                memory_bytes: 0,
                pods: 10,
            },
        )
        .unwrap();
        let routes = Api {
            pods,
            control,
            mover: mover.unwrap(),
            templates,
            info: Arc::new(info),
        }
        .routes()
        .await
        .unwrap();
        let path = folder.join("flintd.sock");
        let listener = listen::unix(&path, None).unwrap();
        let (stop, stopped) = oneshot::channel::<()>();
        let server = tokio::spawn(async move {
            let stopped = async { drop(stopped.await) };
            listen::serve_unix(listener, None, routes, stopped).await.unwrap();
        });
        let connector = tower::service_fn(move |_| {
            let path = path.clone();
            async move { UnixStream::connect(path).await.map(TokioIo::new) }
        });
        let channel = Endpoint::from_static("http://flintd")
            .connect_with_connector(connector)
            .await
            .unwrap();
        let guest = sandboxes.guest.clone();
        Self {
            channel,
            guest,
            sandboxes,
            images,
            stop: Some(stop),
            server,
            journal: thread,
        }
    }

    fn pods(&self) -> PodsClient<Channel> {
        PodsClient::new(self.channel.clone())
    }

    async fn apply(&self, meta: host::PodMeta, spec: host::PodSpec) -> Result<host::Pod, Status> {
        let request = host::ApplyPodRequest {
            meta: Some(meta),
            spec: Some(spec),
            ..Default::default()
        };
        self.pods()
            .apply_pod(request)
            .await
            .map(|response| response.into_inner().pod.unwrap())
    }

    /// Watches until the pod fulfils a condition.
    async fn until(&self, uid: &str, condition: impl Fn(&host::PodStatus) -> bool) -> host::Pod {
        let list = self
            .pods()
            .list_pods(host::ListPodsRequest {})
            .await
            .unwrap()
            .into_inner();
        let is = |pod: &host::Pod| pod.meta.as_ref().unwrap().uid == uid && pod.status.as_ref().is_some_and(&condition);
        if let Some(pod) = list.pods.into_iter().find(&is) {
            return pod;
        }
        let request = host::WatchPodsRequest {
            from_revision: list.revision,
        };
        let mut events = self.pods().watch_pods(request).await.unwrap().into_inner();
        loop {
            let event = events.message().await.unwrap().unwrap();
            if let Some(pod) = event.pod.filter(&is) {
                return pod;
            }
        }
    }

    /// One with a pod "a" that runs.
    async fn with_running_pod(folder: &Path) -> Self {
        let flintd = Self::start(folder).await;
        let (meta, spec) = pod("a");
        flintd.apply(meta, spec).await.unwrap();
        flintd.running("a").await;
        flintd
    }

    async fn running(&self, uid: &str) -> host::Pod {
        self.until(uid, |status| {
            matches!(status.containers[0].state, Some(State::Running(_)))
        })
        .await
    }
}

fn pod(uid: &str) -> (host::PodMeta, host::PodSpec) {
    let meta = host::PodMeta {
        uid: uid.into(),
        namespace: "default".into(),
        name: "web".into(),
        generation: 1,
        ..Default::default()
    };
    let container = host::Container {
        name: "web".into(),
        image: "busybox".into(),
        ..Default::default()
    };
    let spec = host::PodSpec {
        containers: vec![container],
        restart_policy: host::RestartPolicy::Never.into(),
        ..Default::default()
    };
    (meta, spec)
}

fn reason(status: &Status) -> String {
    let details = status.get_error_details();
    let info = details.error_info().expect("every error has an ErrorInfo");
    assert_eq!(info.domain, DOMAIN);
    info.reason.clone()
}

#[tokio::test]
async fn a_pod_runs_writes_its_log_ends_and_is_forgotten() {
    let folder = tempfile::tempdir().unwrap();
    let flintd = Flintd::start(folder.path()).await;
    let (meta, spec) = pod("a");
    let accepted = flintd.apply(meta, spec).await.unwrap();
    assert_eq!(accepted.status.unwrap().phase(), Phase::Pending);
    let running = flintd.running("a").await;
    assert_eq!(running.status.unwrap().pod_ips, ["10.0.0.2"]);
    let plan = flintd.sandboxes.plans.lock().unwrap()[0].clone();
    assert_eq!(
        (plan.vcpus, plan.memory_bytes, plan.images.as_slice()),
        (1, 320 * MIB, &["sha256:b".to_owned()][..])
    );
    assert_eq!(flintd.guest.created()[0].process.as_ref().unwrap().args, ["sh"]);

    let forget = || host::ForgetPodRequest {
        uid: "a".into(),
        ..Default::default()
    };
    assert_eq!(
        reason(&flintd.pods().forget_pod(forget()).await.unwrap_err()),
        "POD_NOT_ENDED"
    );
    flintd.guest.print("web-0", "hello\nworld\n");
    flintd.guest.exit("web-0", 3);
    let ended = flintd
        .until("a", |status| status.phase() == Phase::Failed)
        .await
        .status
        .unwrap();
    let Some(State::Terminated(end)) = &ended.containers[0].state else {
        panic!("{ended:?}")
    };
    assert_eq!((end.exit_code, end.reason.as_str()), (3, "Error"));
    let stages: Vec<_> = ended.timeline.iter().map(|stage| stage.name.as_str()).collect();
    for stage in [
        "api.accepted",
        "image.pull",
        "vmm.boot",
        "container.web.start",
        "container.web.first-output",
    ] {
        assert!(stages.contains(&stage), "{stages:?}");
    }
    let request = host::LogsRequest {
        uid: "a".into(),
        follow: true,
        ..Default::default()
    };
    let entries = StreamsClient::new(flintd.channel.clone())
        .logs(request)
        .await
        .unwrap()
        .into_inner();
    let lines: Vec<_> = entries.map(|entry| entry.unwrap().line).collect().await;
    assert_eq!(lines.concat(), b"hello\nworld\n");

    flintd.pods().forget_pod(forget()).await.unwrap();
    let gone = flintd
        .pods()
        .get_pod(host::GetPodRequest { uid: "a".into() })
        .await
        .unwrap_err();
    assert_eq!((gone.code(), reason(&gone).as_str()), (Code::NotFound, "POD_NOT_FOUND"));
}

#[tokio::test]
async fn applying_is_idempotent_and_generations_only_grow() {
    let folder = tempfile::tempdir().unwrap();
    let flintd = Flintd::start(folder.path()).await;
    let (mut meta, mut spec) = pod("a");
    meta.generation = 5;
    flintd.apply(meta.clone(), spec.clone()).await.unwrap();
    flintd.running("a").await;
    flintd.apply(meta.clone(), spec.clone()).await.unwrap();
    assert_eq!(flintd.sandboxes.plans.lock().unwrap().len(), 1);

    let old = host::PodMeta {
        generation: 4,
        ..meta.clone()
    };
    let stale = flintd.apply(old, spec.clone()).await.unwrap_err();
    assert_eq!(
        (stale.code(), reason(&stale).as_str()),
        (Code::Aborted, "STALE_GENERATION")
    );

    let mut newer = host::PodMeta { generation: 6, ..meta };
    newer.labels.insert("tier".into(), "web".into());
    flintd.apply(newer.clone(), spec.clone()).await.unwrap();
    let updated = flintd.until("a", |status| status.observed_generation == 6).await;
    assert_eq!(updated.meta.unwrap().labels["tier"], "web");

    newer.generation = 7;
    spec.containers[0].image = "other".into();
    assert_eq!(
        flintd.apply(newer, spec).await.unwrap_err().code(),
        Code::InvalidArgument
    );
}

#[tokio::test]
async fn what_is_wrong_or_does_not_fit_is_refused_with_details_a_program_can_read() {
    let folder = tempfile::tempdir().unwrap();
    let flintd = Flintd::start(folder.path()).await;
    let (meta, mut spec) = pod("a");
    spec.containers[0].name = "A".into();
    spec.hostname = "-".into();
    let wrong = flintd.apply(meta.clone(), spec).await.unwrap_err();
    assert_eq!(wrong.code(), Code::InvalidArgument);
    let details = wrong.get_error_details();
    let fields: Vec<_> = details
        .bad_request()
        .unwrap()
        .field_violations
        .iter()
        .map(|v| v.field.as_str())
        .collect();
    assert_eq!(fields, ["spec.hostname", "spec.containers[0].name"]);

    let (_, mut spec) = pod("a");
    spec.volumes = vec![host::Volume {
        name: "v".into(),
        source: None,
    }];
    assert_eq!(
        flintd.apply(meta.clone(), spec).await.unwrap_err().code(),
        Code::Unimplemented
    );

    let (_, mut spec) = pod("a");
    spec.containers[0].resources = Some(host::Resources {
        memory_limit_bytes: 4096 * MIB,
        ..Default::default()
    });
    let short = flintd.apply(meta.clone(), spec).await.unwrap_err();
    assert_eq!(
        (short.code(), reason(&short).as_str()),
        (Code::ResourceExhausted, "OutOfmemory")
    );
    assert!(short.get_error_details().quota_failure().is_some());

    let empty = flintd
        .pods()
        .apply_pod(host::ApplyPodRequest::default())
        .await
        .unwrap_err();
    assert_eq!(empty.code(), Code::InvalidArgument);
    assert!(
        flintd
            .pods()
            .list_pods(host::ListPodsRequest {})
            .await
            .unwrap()
            .into_inner()
            .pods
            .is_empty()
    );
}

#[tokio::test]
async fn a_stale_lease_is_fenced_off_and_a_draining_host_takes_no_pods() {
    let folder = tempfile::tempdir().unwrap();
    let flintd = Flintd::start(folder.path()).await;
    let mut client = HostClient::new(flintd.channel.clone());
    let lease = |holder: &str| host::AcquireLeaseRequest {
        holder: holder.into(),
        duration: Some(prost_types::Duration { seconds: 60, nanos: 0 }),
    };
    let epoch = client.acquire_lease(lease("node-a")).await.unwrap().into_inner().epoch;
    let held = client.acquire_lease(lease("node-b")).await.unwrap_err();
    assert_eq!(
        (held.code(), reason(&held).as_str()),
        (Code::FailedPrecondition, "LEASE_HELD")
    );
    assert!(held.get_error_details().retry_info().is_some());

    let (meta, spec) = pod("a");
    let fenced = flintd.apply(meta.clone(), spec.clone()).await.unwrap_err();
    assert_eq!(
        (fenced.code(), reason(&fenced).as_str()),
        (Code::FailedPrecondition, "LEASE_LOST")
    );
    let drain = host::DrainRequest {
        lease_epoch: epoch,
        ..Default::default()
    };
    client.drain(drain).await.unwrap();
    let request = host::ApplyPodRequest {
        meta: Some(meta),
        spec: Some(spec),
        lease_epoch: epoch,
        ..Default::default()
    };
    assert_eq!(
        reason(&flintd.pods().apply_pod(request.clone()).await.unwrap_err()),
        "DRAINING"
    );
    assert!(
        client
            .get_host(host::GetHostRequest {})
            .await
            .unwrap()
            .into_inner()
            .draining
    );
    client
        .drain(host::DrainRequest {
            resume: true,
            lease_epoch: epoch,
            ..Default::default()
        })
        .await
        .unwrap();
    flintd.pods().apply_pod(request).await.unwrap();
    let mut hosts = client.watch_host(host::WatchHostRequest {}).await.unwrap().into_inner();
    let host = hosts.message().await.unwrap().unwrap();
    assert_eq!(host.allocated.unwrap().pods, 1);
    assert_eq!(host.pool, Some(host::Pool { size: 2, parked: 0 }));
    flintd.sandboxes.parked.send_replace(2);
    let host = hosts.message().await.unwrap().unwrap();
    assert_eq!(host.pool, Some(host::Pool { size: 2, parked: 2 }));
}

#[tokio::test]
async fn a_watch_from_a_revision_that_is_not_there_is_out_of_range() {
    let folder = tempfile::tempdir().unwrap();
    let flintd = Flintd::start(folder.path()).await;
    let request = host::WatchPodsRequest { from_revision: 99 };
    let status = flintd.pods().watch_pods(request).await.unwrap_err();
    assert_eq!(
        (status.code(), reason(&status).as_str()),
        (Code::OutOfRange, "REVISION_OUT_OF_RANGE")
    );
}

#[tokio::test]
async fn terminating_sends_the_images_stop_signal() {
    let folder = tempfile::tempdir().unwrap();
    let flintd = Flintd::start(folder.path()).await;
    let (meta, spec) = pod("a");
    flintd.apply(meta, spec).await.unwrap();
    flintd.running("a").await;
    let terminate = host::TerminatePodRequest {
        uid: "a".into(),
        ..Default::default()
    };
    flintd.pods().terminate_pod(terminate.clone()).await.unwrap();
    let ended = flintd
        .until("a", |status| status.phase() == Phase::Failed)
        .await
        .status
        .unwrap();
    let Some(State::Terminated(end)) = &ended.containers[0].state else {
        panic!("{ended:?}")
    };
    assert_eq!(end.exit_code, 128 + 3, "the image says SIGQUIT");
    assert!(ended.terminating);
    flintd.pods().terminate_pod(terminate).await.unwrap();
}

#[tokio::test]
async fn a_sandbox_that_died_while_no_flintd_ran_ends_its_pod_with_the_reason() {
    let folder = tempfile::tempdir().unwrap();
    let first = Flintd::start(folder.path()).await;
    let (meta, spec) = pod("a");
    first.apply(meta, spec).await.unwrap();
    first.running("a").await;
    let second_folder = tempfile::tempdir().unwrap();
    std::fs::copy(
        folder.path().join("state.redb"),
        second_folder.path().join("state.redb"),
    )
    .unwrap();
    first.guest.die(ExitReason::Panic);
    let second = Flintd::with(second_folder.path(), first.sandboxes.clone()).await;
    let ended = second
        .until("a", |status| status.phase() == Phase::Failed)
        .await
        .status
        .unwrap();
    assert_eq!(ended.reason, "SandboxKilled");
    assert!(ended.message.contains("panicked"), "{}", ended.message);
}

#[tokio::test]
async fn images_are_pulled_with_progress_and_kept_while_a_pod_uses_them() {
    let folder = tempfile::tempdir().unwrap();
    let flintd = Flintd::start(folder.path()).await;
    let mut images = ImagesClient::new(flintd.channel.clone());
    let pull = |reference: &str| host::PullRequest {
        reference: reference.into(),
        ..Default::default()
    };
    let progress = images.pull(pull("busybox")).await.unwrap().into_inner();
    let progress: Vec<_> = progress.map(Result::unwrap).collect().await;
    assert_eq!(
        progress.iter().map(|p| p.stage.as_str()).collect::<Vec<_>>(),
        ["resolve", "done"]
    );
    assert_eq!(progress[1].image.as_ref().unwrap().digest, "sha256:b");
    let mut down = images.pull(pull("down/app")).await.unwrap().into_inner();
    down.message().await.unwrap();
    assert_eq!(reason(&down.message().await.unwrap_err()), "REGISTRY_UNAVAILABLE");

    let (meta, spec) = pod("a");
    flintd.apply(meta, spec).await.unwrap();
    flintd.running("a").await;
    let remove = || host::RemoveImageRequest {
        image: "busybox".into(),
    };
    assert_eq!(reason(&images.remove(remove()).await.unwrap_err()), "IMAGE_IN_USE");
    assert!(
        images
            .list(host::ListImagesRequest {})
            .await
            .unwrap()
            .into_inner()
            .images[0]
            .in_use
    );
    flintd.guest.exit("web-0", 0);
    flintd.until("a", |status| status.phase() == Phase::Succeeded).await;
    assert_eq!(images.remove(remove()).await.unwrap().into_inner().freed_bytes, 1000);
    let relative = host::ImportRequest {
        path: "x.tar".into(),
        ..Default::default()
    };
    assert_eq!(images.import(relative).await.unwrap_err().code(), Code::InvalidArgument);
}

#[tokio::test]
async fn health_is_served_and_a_stopped_server_lets_the_journal_finish() {
    let folder = tempfile::tempdir().unwrap();
    let mut flintd = Flintd::start(folder.path()).await;
    let mut health = tonic_health::pb::health_client::HealthClient::new(flintd.channel.clone());
    let service = tonic_health::pb::HealthCheckRequest {
        service: "flint.host.v1.Pods".into(),
    };
    let status = health.check(service).await.unwrap().into_inner().status();
    assert_eq!(status, tonic_health::pb::health_check_response::ServingStatus::Serving);
    flintd.stop.take().unwrap().send(()).unwrap();
    drop(health);
    drop(flintd.channel);
    tokio::time::timeout(Duration::from_secs(10), flintd.server)
        .await
        .unwrap()
        .unwrap();
    let joined = tokio::task::spawn_blocking(move || flintd.journal.join());
    tokio::time::timeout(Duration::from_secs(10), joined)
        .await
        .unwrap()
        .unwrap()
        .unwrap();
}
