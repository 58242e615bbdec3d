//! `ps`, `stop`, `rm`.

use clap::Args;
use flint_api::host::{
    ContainerStatus, ForgetPodRequest, ListPodsRequest, Pod, TerminatePodRequest, WatchPodsRequest, container_status,
    pod_event, pod_status::Phase,
};
use prost_types::Duration;
use tonic::Code;

use crate::client::Client;
use crate::failure::Failure;
use crate::output::{self, Format};

/// List pods.
#[derive(Debug, Args)]
pub struct Ps {
    /// Also pods that have ended.
    #[arg(short, long)]
    all: bool,
    /// Only the uids.
    #[arg(short, long)]
    quiet: bool,
}

impl Ps {
    pub async fn execute(self, client: Client, format: Format) -> Result<u8, Failure> {
        let mut response = client.pods().list_pods(ListPodsRequest {}).await?.into_inner();
        response.pods.retain(|pod| self.all || !is_over(pod));
        if format == Format::Json {
            output::print_json("ListPodsResponse", &response)?;
        } else if self.quiet {
            response.pods.iter().try_for_each(|pod| output::print_line(&uid(pod)))?;
        } else {
            let rows: Vec<_> = response.pods.iter().map(row).collect();
            output::print_table(
                &["NAMESPACE", "NAME", "READY", "STATUS", "RESTARTS", "IP", "AGE", "UID"],
                &rows,
            )?;
        }
        Ok(0)
    }
}

fn row(pod: &Pod) -> Vec<String> {
    let (meta, status) = (
        pod.meta.clone().unwrap_or_default(),
        pod.status.clone().unwrap_or_default(),
    );
    let ready = status.containers.iter().filter(|container| container.ready).count();
    let restarts: u32 = status.containers.iter().map(|container| container.restart_count).sum();
    let wanted = pod.spec.as_ref().map_or(0, |spec| spec.containers.len());
    vec![
        meta.namespace,
        meta.name,
        format!("{ready}/{wanted}"),
        condition(pod),
        restarts.to_string(),
        status.pod_ips.first().cloned().unwrap_or_else(|| "-".into()),
        output::age(status.created_at.as_ref()),
        meta.uid,
    ]
}

/// One word for a pod's state, as kubectl prints it: the most telling reason first.
pub fn condition(pod: &Pod) -> String {
    let status = pod.status.clone().unwrap_or_default();
    if status.terminating && !is_over(pod) {
        return "Terminating".into();
    }
    if status.paused_at.is_some() {
        return "Paused".into();
    }
    if !status.reason.is_empty() {
        return status.reason;
    }
    let telling = status.containers.iter().find_map(reason_of);
    match (status.phase(), telling) {
        (Phase::Succeeded, _) => "Completed".into(),
        (Phase::Failed | Phase::Pending, Some(reason)) => reason,
        (Phase::Running, Some(reason)) if reason != "Completed" => reason,
        (Phase::Running, _) => "Running".into(),
        (Phase::Failed, None) => "Failed".into(),
        (Phase::Pending | Phase::Unspecified, _) => "Pending".into(),
    }
}

fn reason_of(container: &ContainerStatus) -> Option<String> {
    let reason = match container.state.as_ref()? {
        container_status::State::Waiting(waiting) => &waiting.reason,
        container_status::State::Terminated(terminated) => &terminated.reason,
        container_status::State::Running(_) => return None,
    };
    (!reason.is_empty()).then(|| reason.clone())
}

/// Whether the pod has ended for good.
pub fn is_over(pod: &Pod) -> bool {
    pod.status
        .as_ref()
        .is_some_and(|status| matches!(status.phase(), Phase::Succeeded | Phase::Failed))
}

pub fn uid(pod: &Pod) -> String {
    pod.meta.as_ref().map(|meta| meta.uid.clone()).unwrap_or_default()
}

/// End pods: TERM, the grace period, KILL.
#[derive(Debug, Args)]
pub struct Stop {
    /// Pods to end.
    #[arg(required = true, value_name = "POD")]
    pods: Vec<String>,
    /// Seconds between TERM and KILL, instead of the pod's own; 0 kills at once.
    #[arg(short = 't', long, value_name = "SECONDS")]
    grace_period: Option<u32>,
    /// Return at once instead of when the pods have ended.
    #[arg(long)]
    no_wait: bool,
}

impl Stop {
    pub async fn execute(self, client: Client) -> Result<u8, Failure> {
        for name in &self.pods {
            let pod = client.pod(name).await?;
            terminate(&client, &pod, self.grace_period).await?;
            if !self.no_wait {
                until(&client, &pod, is_over).await?;
            }
            output::print_line(name)?;
        }
        Ok(0)
    }
}

/// Begins a pod's end.
pub async fn terminate(client: &Client, pod: &Pod, grace_seconds: Option<u32>) -> Result<(), Failure> {
    let grace_period = grace_seconds.map(|seconds| Duration {
        seconds: seconds.into(),
        nanos: 0,
    });
    let request = TerminatePodRequest {
        uid: uid(pod),
        grace_period,
        lease_epoch: 0,
    };
    client.pods().terminate_pod(request).await?;
    Ok(())
}

/// Follows a pod from where it is now until `reached`; a pod that is removed meanwhile is an error.
pub async fn until(client: &Client, pod: &Pod, reached: impl Fn(&Pod) -> bool) -> Result<Pod, Failure> {
    loop {
        // A pod's own revision is no place to begin at: flintd forgets what was before it was started anew.
        let listed = client.pods().list_pods(ListPodsRequest {}).await?.into_inner();
        let now = listed.pods.into_iter().find(|known| uid(known) == uid(pod));
        let now = now.ok_or_else(removed)?;
        if let Some(pod) = follow(client, now, listed.revision, &reached).await? {
            return Ok(pod);
        }
    }
}

/// Follows a pod from a revision on; `None`: flintd has forgotten what came after that.
async fn follow(
    client: &Client,
    mut now: Pod,
    from_revision: u64,
    reached: impl Fn(&Pod) -> bool,
) -> Result<Option<Pod>, Failure> {
    let watched = client.pods().watch_pods(WatchPodsRequest { from_revision }).await;
    let mut events = match watched {
        Err(status) if status.code() == Code::OutOfRange => return Ok(None),
        watched => watched?.into_inner(),
    };
    while !reached(&now) {
        let event = match events.message().await {
            Err(status) if status.code() == Code::OutOfRange => return Ok(None),
            event => event?,
        };
        let Some(event) = event else {
            return Err(Failure::new("flintd ended the watch").hint("is it shutting down? The pod goes on running"));
        };
        let Some(changed) = event.pod.filter(|changed| uid(changed) == uid(&now)) else {
            continue;
        };
        if event.r#type == pod_event::Type::Removed as i32 {
            return Err(removed());
        }
        now = changed;
    }
    Ok(Some(now))
}

fn removed() -> Failure {
    Failure::new("the pod was removed by somebody else")
}

/// Remove ended pods with their logs.
#[derive(Debug, Args)]
pub struct Rm {
    /// Pods to remove.
    #[arg(required_unless_present = "all", value_name = "POD")]
    pods: Vec<String>,
    /// Kill those that still run, then remove them.
    #[arg(short, long)]
    force: bool,
    /// All pods that have ended.
    #[arg(short, long, conflicts_with = "pods")]
    all: bool,
}

impl Rm {
    pub async fn execute(self, client: Client) -> Result<u8, Failure> {
        let mut pods = Vec::new();
        if self.all {
            let listed = client.pods().list_pods(ListPodsRequest {}).await?.into_inner().pods;
            pods.extend(listed.into_iter().filter(|pod| self.force || is_over(pod)));
        }
        for name in &self.pods {
            pods.push(client.pod(name).await?);
        }
        for pod in &pods {
            self.remove(&client, pod).await?;
        }
        Ok(0)
    }

    async fn remove(&self, client: &Client, pod: &Pod) -> Result<(), Failure> {
        if self.force && !is_over(pod) {
            terminate(client, pod, Some(0)).await?;
            until(client, pod, is_over).await?;
        }
        forget(client, pod).await?;
        output::print_line(&uid(pod))
    }
}

/// Drops an ended pod's record and logs.
pub async fn forget(client: &Client, pod: &Pod) -> Result<(), Failure> {
    client
        .pods()
        .forget_pod(ForgetPodRequest {
            uid: uid(pod),
            lease_epoch: 0,
        })
        .await
        .map_err(|status| {
            let failure = Failure::from(status.clone());
            match status.code() {
                Code::FailedPrecondition => failure.hint("stop it first, or add --force"),
                _ => failure,
            }
        })?;
    Ok(())
}
