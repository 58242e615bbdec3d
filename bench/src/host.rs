//! flintd, driven through its API.

use std::path::Path;
use std::time::{Duration, Instant};

use flint_api::host::host_client::HostClient;
use flint_api::host::images_client::ImagesClient;
use flint_api::host::pods_client::PodsClient;
use flint_api::host::{
    ApplyPodRequest, Container, ForgetPodRequest, GetHostRequest, Image, ImagePullPolicy, Pod, PodMeta, PodSpec,
    PullRequest, RemoveImageRequest, RestartPolicy, Stage, TerminatePodRequest, WatchHostRequest, WatchPodsRequest,
    pod_status::Phase,
};
use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;
use tonic::Code;
use tonic::transport::{Channel, Endpoint, Uri};

use crate::Error;

/// What the container of each pod is called.
pub const CONTAINER: &str = "main";
/// How long it may take to fill a pool.
const PATIENCE: Duration = Duration::from_secs(120);

/// A connection to flintd. Clones are the same connection.
#[derive(Clone)]
pub struct Host {
    channel: Channel,
}

impl Host {
    pub async fn connect(socket: &Path) -> Result<Self, Error> {
        let channel = channel(socket.to_owned()).await;
        let hint = || format!("cannot reach flintd at {}; is it running?", socket.display());
        Ok(Self {
            channel: channel.map_err(|_| hint())?,
        })
    }

    /// What a reader must know of this host.
    pub async fn facts(&self) -> Result<Vec<(String, String)>, Error> {
        let info = HostClient::new(self.channel.clone())
            .get_host(GetHostRequest {})
            .await?
            .into_inner();
        let load = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
        Ok(vec![
            ("cpu".into(), info.cpu_model),
            ("kernel".into(), info.kernel_version),
            ("kvm".into(), info.kvm),
            ("load".into(), load.trim().to_owned()),
        ])
    }

    /// Waits until as many clones are parked as there should be.
    pub async fn pool_is_full(&self) -> Result<(), Error> {
        let mut client = HostClient::new(self.channel.clone());
        let mut hosts = client.watch_host(WatchHostRequest {}).await?.into_inner();
        let full = async {
            while let Some(host) = hosts.message().await? {
                let pool = host.pool.unwrap_or_default();
                if pool.parked >= pool.size {
                    return Ok(());
                }
            }
            Err("flintd ended the watch".into())
        };
        let waited = tokio::time::timeout(PATIENCE, full).await;
        waited.unwrap_or_else(|_| Err(format!("the pool is not full after {PATIENCE:?}; see flintd's log").into()))
    }

    /// Removes an image if it is here.
    pub async fn remove_image(&self, image: &str) -> Result<(), Error> {
        match ImagesClient::new(self.channel.clone())
            .remove(RemoveImageRequest { image: image.into() })
            .await
        {
            Err(status) if status.code() != Code::NotFound => Err(status.into()),
            _ => Ok(()),
        }
    }

    /// Pulls an image, and how long that took.
    pub async fn pull(&self, image: &str) -> Result<(Duration, Image), Error> {
        let start = Instant::now();
        let request = PullRequest {
            reference: image.into(),
            credentials: None,
            if_not_present: true,
        };
        let mut progress = ImagesClient::new(self.channel.clone())
            .pull(request)
            .await?
            .into_inner();
        let mut pulled = None;
        while let Some(step) = progress.message().await? {
            pulled = step.image.or(pulled);
        }
        Ok((start.elapsed(), pulled.ok_or("the pull ended without an image")?))
    }

    /// Starts a pod, waits for its end, removes it, and returns how its start went.
    pub async fn start(&self, image: &str, command: &[String]) -> Result<Vec<Stage>, Error> {
        let uid = self.apply(image, command).await?;
        let ended = self
            .until(&uid, |pod| matches!(phase(pod), Phase::Succeeded | Phase::Failed))
            .await?;
        self.remove(&uid).await?;
        let status = ended.status.unwrap_or_default();
        if status.phase() != Phase::Succeeded {
            return Err(format!("the pod failed: {} {}", status.reason, status.message).into());
        }
        Ok(status.timeline)
    }

    /// Starts a pod and returns its uid when it runs.
    pub async fn start_and_keep(&self, image: &str, command: &[String]) -> Result<String, Error> {
        let uid = self.apply(image, command).await?;
        let pod = self.until(&uid, |pod| phase(pod) != Phase::Pending).await?;
        if phase(&pod) != Phase::Running {
            return Err(format!("the pod did not stay: {:?}", pod.status).into());
        }
        Ok(uid)
    }

    /// Kills a pod and removes it; how its start went.
    pub async fn kill(&self, uid: &str) -> Result<Vec<Stage>, Error> {
        let grace_period = Some(prost_types::Duration::default());
        let request = TerminatePodRequest {
            uid: uid.into(),
            grace_period,
            lease_epoch: 0,
        };
        self.pods().terminate_pod(request).await?;
        let ended = self
            .until(uid, |pod| matches!(phase(pod), Phase::Succeeded | Phase::Failed))
            .await?;
        self.remove(uid).await?;
        Ok(ended.status.unwrap_or_default().timeline)
    }

    /// Asks for a pod with one container and returns its uid.
    pub async fn apply(&self, image: &str, command: &[String]) -> Result<String, Error> {
        let uid = std::fs::read_to_string("/proc/sys/kernel/random/uuid")?
            .trim()
            .to_owned();
        let container = Container {
            name: CONTAINER.into(),
            image: image.into(),
            image_pull_policy: ImagePullPolicy::PullIfNotPresent.into(),
            command: command.to_vec(),
            ..Container::default()
        };
        let name = format!("bench-{}", uid.get(..8).unwrap_or(&uid));
        let meta = PodMeta {
            uid: uid.clone(),
            namespace: "bench".into(),
            name,
            generation: 1,
            ..PodMeta::default()
        };
        let spec = PodSpec {
            containers: vec![container],
            restart_policy: RestartPolicy::Never.into(),
            ..PodSpec::default()
        };
        let request = ApplyPodRequest {
            meta: Some(meta),
            spec: Some(spec),
            ..ApplyPodRequest::default()
        };
        self.pods().apply_pod(request).await?;
        Ok(uid)
    }

    async fn until(&self, uid: &str, reached: impl Fn(&Pod) -> bool) -> Result<Pod, Error> {
        let list = self
            .pods()
            .list_pods(flint_api::host::ListPodsRequest {})
            .await?
            .into_inner();
        let is_it = |pod: &Pod| pod.meta.as_ref().is_some_and(|meta| meta.uid == uid);
        let mut now = list.pods.into_iter().find(is_it).ok_or("the pod is gone")?;
        let request = WatchPodsRequest {
            from_revision: list.revision,
        };
        let mut events = self.pods().watch_pods(request).await?.into_inner();
        while !reached(&now) {
            let event = events.message().await?.ok_or("flintd ended the watch")?;
            now = event.pod.filter(is_it).unwrap_or(now);
        }
        Ok(now)
    }

    async fn remove(&self, uid: &str) -> Result<(), Error> {
        self.pods()
            .forget_pod(ForgetPodRequest {
                uid: uid.into(),
                lease_epoch: 0,
            })
            .await?;
        Ok(())
    }

    fn pods(&self) -> PodsClient<Channel> {
        PodsClient::new(self.channel.clone())
    }
}

fn phase(pod: &Pod) -> Phase {
    pod.status
        .as_ref()
        .map_or(Phase::Unspecified, flint_api::host::PodStatus::phase)
}

async fn channel(socket: std::path::PathBuf) -> Result<Channel, tonic::transport::Error> {
    let connector = tower::service_fn(move |_: Uri| {
        let socket = socket.clone();
        async move { UnixStream::connect(socket).await.map(TokioIo::new) }
    });
    Endpoint::from_static("http://flintd")
        .connect_with_connector(connector)
        .await
}
