//! `run`: one container in a pod of its own, to its end.

use std::io::{self, IsTerminal};
use std::path::Path;

use clap::{Args, ValueEnum};
use flint_api::host::{
    ApplyPodRequest, AttachRequest, AttachStart, Container, ContainerStatus, EnvVar, ImagePullPolicy, LogsRequest, Pod,
    PodMeta, PodSpec, Resources, RestartPolicy, SecurityContext, StdinEof, TerminalSize, Terminated, attach_request,
    container_status,
};
use flint_api::kubernetes::Quantity;
use tokio::sync::mpsc;
use tokio_stream::StreamExt as _;
use tokio_stream::wrappers::ReceiverStream;

use crate::apply;
use crate::client::Client;
use crate::exec::{self, InputFrames};
use crate::failure::Failure;
use crate::images;
use crate::logs;
use crate::output::{self, Format};
use crate::pods;
use crate::terminal::{self, RawMode};

const CONTAINER: &str = "main";

/// Run one container in a pod of its own and take its exit code.
///
/// IMAGE is a registry reference, or a path: an OCI layout folder, or an oci-archive or docker-archive file. With --from-snapshot the pod
/// goes on where a saved one stood, with all of its containers; the log and the exit code are those of the first.
#[derive(Debug, Args)]
pub struct Run {
    /// The pod's name; made up if left out.
    #[arg(long)]
    name: Option<String>,
    /// Remove the pod when it has ended.
    #[arg(long)]
    rm: bool,
    /// Print the pod's uid and return as soon as it is accepted.
    #[arg(short, long, conflicts_with_all = ["stdin", "tty", "rm"])]
    detach: bool,
    /// Pass standard input on.
    #[arg(short = 'i', long)]
    stdin: bool,
    /// Give the program a terminal.
    #[arg(short = 't', long)]
    tty: bool,
    /// Set an environment variable; a name alone passes this shell's value on.
    #[arg(short, long, value_name = "NAME[=VALUE]")]
    env: Vec<String>,
    /// Working directory.
    #[arg(short, long, value_name = "PATH", default_value = "", hide_default_value = true)]
    workdir: String,
    /// User and group ids.
    #[arg(short, long, value_name = "UID[:GID]", value_parser = user)]
    user: Option<(u32, Option<u32>)>,
    /// CPUs, as a Kubernetes quantity (500m, 2).
    #[arg(long, value_name = "QUANTITY", value_parser = quantity)]
    cpus: Option<Quantity>,
    /// Memory, as a Kubernetes quantity (256Mi, 2Gi).
    #[arg(short, long, value_name = "QUANTITY", value_parser = quantity)]
    memory: Option<Quantity>,
    /// When to look the image up in its registry.
    #[arg(long, value_enum, default_value_t = Pull::Missing)]
    pull: Pull,
    /// Mount the root file system read-only.
    #[arg(long)]
    read_only: bool,
    /// Replace the image's entrypoint.
    #[arg(long, value_name = "PROGRAM")]
    entrypoint: Option<String>,
    /// Go on where a saved pod stood, instead of beginning with an image.
    #[arg(
        long,
        value_name = "SNAPSHOT",
        conflicts_with_all = [
            "image", "command", "stdin", "tty", "env", "workdir", "user", "cpus", "memory", "pull", "read_only", "entrypoint",
        ]
    )]
    from_snapshot: Option<String>,
    /// The image.
    #[arg(
        required_unless_present = "from_snapshot",
        default_value = "",
        hide_default_value = true
    )]
    image: String,
    /// The program's arguments, instead of the image's; a program of its own with no entrypoint in the image.
    #[arg(last = true)]
    pub command: Vec<String>,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Pull {
    Always,
    Missing,
    Never,
}

impl Run {
    pub async fn execute(mut self, client: Client, format: Format) -> Result<u8, Failure> {
        if self.from_snapshot.is_none() && Path::new(&self.image).exists() {
            self.image = images::import(&client, Path::new(&self.image), None).await?;
            self.pull = Pull::Never;
        }
        let raw = if self.tty && self.stdin {
            Some(RawMode::enter()?)
        } else {
            None
        };
        let pod = match &self.from_snapshot {
            Some(snapshot) => self.restore(&client, snapshot).await?,
            None => apply::apply(&client, self.meta()?, self.spec()).await?,
        };
        if self.detach {
            return detached(&pod, format).map(|()| 0);
        }
        let result = tokio::select! {
            result = self.follow(&client, &pod) => result,
            signal = interrupted() => Err(signal),
        };
        drop(raw);
        let result = finish(&client, &pod, result, self.rm).await;
        if let (Ok((_, ended)), Format::Json) = (&result, format) {
            output::print_json("Pod", ended)?;
        }
        result.map(|(code, _)| code)
    }

    fn meta(&self) -> Result<PodMeta, Failure> {
        let uid = apply::new_uid()?;
        let name = self
            .name
            .clone()
            .unwrap_or_else(|| format!("run-{}", uid.get(..8).unwrap_or(&uid)));
        Ok(PodMeta {
            namespace: "default".into(),
            name,
            uid,
            generation: 1,
            ..PodMeta::default()
        })
    }

    /// A new pod that goes on where a saved one stood.
    async fn restore(&self, client: &Client, snapshot: &str) -> Result<Pod, Failure> {
        let request = ApplyPodRequest {
            meta: Some(self.meta()?),
            from_snapshot: snapshot.to_owned(),
            ..ApplyPodRequest::default()
        };
        let response = client.pods().apply_pod(request).await?.into_inner();
        response.pod.ok_or_else(|| Failure::new("flintd's answer holds no pod"))
    }

    fn spec(&self) -> PodSpec {
        let policy = match self.pull {
            Pull::Always => ImagePullPolicy::PullAlways,
            Pull::Missing => ImagePullPolicy::PullIfNotPresent,
            Pull::Never => ImagePullPolicy::PullNever,
        };
        let cpu = self.cpus.map(Quantity::milli).unwrap_or_default();
        let memory = self.memory.map(Quantity::units).unwrap_or_default();
        let container = Container {
            name: CONTAINER.into(),
            image: self.image.clone(),
            image_pull_policy: policy.into(),
            command: self.entrypoint.iter().map(|word| verbatim(word)).collect(),
            args: self.command.iter().map(|word| verbatim(word)).collect(),
            env: self.env.iter().map(|text| env_var(text)).collect(),
            working_dir: self.workdir.clone(),
            tty: self.tty,
            stdin: self.stdin,
            resources: Some(Resources {
                cpu_request_milli: cpu,
                cpu_limit_milli: cpu,
                memory_request_bytes: memory,
                memory_limit_bytes: memory,
            }),
            security_context: Some(SecurityContext {
                run_as_user: self.user.map(|(user, _)| user),
                run_as_group: self.user.and_then(|(_, group)| group),
                read_only_root_filesystem: self.read_only,
                ..SecurityContext::default()
            }),
            ..Container::default()
        };
        PodSpec {
            containers: vec![container],
            restart_policy: RestartPolicy::Never.into(),
            ..PodSpec::default()
        }
    }

    /// Streams until the pod has ended.
    async fn follow(&self, client: &Client, pod: &Pod) -> Result<Pod, Failure> {
        let shows_progress = self.from_snapshot.is_none() && self.shows_progress();
        let progress = shows_progress.then(|| tokio::spawn(images::show_pull(client.clone(), self.image.clone())));
        let started = pods::until(client, pod, |pod| {
            pods::is_over(pod) || has_run(pod) || pull_failed(pod).is_some()
        })
        .await;
        if let Some(progress) = progress {
            progress.abort();
            images::clear_progress();
        }
        let started = started?;
        if let Some(why) = pull_failed(&started) {
            return Err(Failure::new(why));
        }
        if self.stdin || self.tty {
            self.attach(client, &started).await?;
        } else {
            self.print_log(client, &started).await?;
        }
        pods::until(client, &started, pods::is_over).await
    }

    fn shows_progress(&self) -> bool {
        io::stderr().is_terminal() && !matches!(self.pull, Pull::Never)
    }

    async fn print_log(&self, client: &Client, pod: &Pod) -> Result<(), Failure> {
        let containers = pod.spec.iter().flat_map(|spec| &spec.containers);
        let request = LogsRequest {
            uid: pods::uid(pod),
            container: containers
                .map(|container| container.name.clone())
                .next()
                .unwrap_or_default(),
            follow: true,
            ..LogsRequest::default()
        };
        let mut batches = client.streams().log_batches(request).await?.into_inner();
        while let Some(batch) = batches.message().await? {
            logs::print(&batch, false)?;
        }
        Ok(())
    }

    async fn attach(&self, client: &Client, pod: &Pod) -> Result<(), Failure> {
        let (frames, requests) = mpsc::channel(16);
        let start = AttachStart {
            uid: pods::uid(pod),
            container: CONTAINER.into(),
            stdin: self.stdin,
        };
        let _ = frames.try_send(attach_request::Frame::Start(start));
        if let (true, Some(size)) = (self.tty, terminal::size()) {
            let _ = frames.try_send(attach_request::Frame::Resize(size));
        }
        let requests = ReceiverStream::new(requests).map(|frame| AttachRequest { frame: Some(frame) });
        let mut responses = client.streams().attach(requests).await?.into_inner();
        let input = tokio::spawn(exec::send_input(frames, self.stdin, self.tty, AttachFrames));
        let exit = exec::receive(&mut responses).await;
        input.abort();
        exit.map(|_| ())
    }
}

struct AttachFrames;

impl InputFrames for AttachFrames {
    type Frame = attach_request::Frame;

    fn stdin(&self, data: Vec<u8>) -> Self::Frame {
        attach_request::Frame::Stdin(data)
    }

    fn eof(&self) -> Self::Frame {
        attach_request::Frame::StdinEof(StdinEof {})
    }

    fn resize(&self, size: TerminalSize) -> Self::Frame {
        attach_request::Frame::Resize(size)
    }
}

fn detached(pod: &Pod, format: Format) -> Result<(), Failure> {
    match format {
        Format::Json => output::print_json("Pod", pod),
        Format::Text => output::print_line(&pods::uid(pod)),
    }
}

/// Ends what still runs, removes what shall not stay, and says how the program ended.
async fn finish(client: &Client, pod: &Pod, result: Result<Pod, Failure>, remove: bool) -> Result<(u8, Pod), Failure> {
    let outcome = match result {
        Ok(ended) => ending(&ended).map(|code| (code, ended)),
        Err(failure) => {
            // The first failure is the one to tell; a pod that is gone already needs no end.
            if pods::terminate(client, pod, Some(0)).await.is_ok() {
                let _ = pods::until(client, pod, pods::is_over).await;
            }
            Err(failure)
        }
    };
    if remove || outcome.is_err() {
        let _ = pods::forget(client, pod).await;
    }
    outcome
}

fn ending(pod: &Pod) -> Result<u8, Failure> {
    let status = pod.status.clone().unwrap_or_default();
    if status.started_at.is_none() {
        return Err(Failure::new(format!("{}: {}", status.reason, status.message)));
    }
    let Some(terminated) = status.containers.first().and_then(terminated) else {
        return Err(Failure::new(format!(
            "the pod ended before its container ran: {}",
            status.message
        )));
    };
    if !terminated.message.is_empty() {
        eprintln!("flint: {}", terminated.message);
    }
    Ok(u8::try_from(terminated.exit_code).unwrap_or(u8::MAX))
}

fn terminated(container: &ContainerStatus) -> Option<&Terminated> {
    match container.state.as_ref()? {
        container_status::State::Terminated(terminated) => Some(terminated),
        container_status::State::Waiting(_) | container_status::State::Running(_) => None,
    }
}

fn has_run(pod: &Pod) -> bool {
    pod.status
        .iter()
        .flat_map(|status| &status.containers)
        .any(|container| {
            matches!(
                container.state,
                Some(container_status::State::Running(_) | container_status::State::Terminated(_))
            )
        })
}

/// Why the image cannot be had; `run` does not wait for a registry to come back as a pod does.
fn pull_failed(pod: &Pod) -> Option<String> {
    let waiting = pod
        .status
        .iter()
        .flat_map(|status| &status.containers)
        .find_map(|container| match container.state.as_ref()? {
            container_status::State::Waiting(waiting) => Some(waiting),
            container_status::State::Running(_) | container_status::State::Terminated(_) => None,
        })?;
    let reasons = [
        "ErrImagePull",
        "ImagePullBackOff",
        "ErrImageNeverPull",
        "InvalidImageName",
        "CreateContainerError",
    ];
    reasons
        .contains(&waiting.reason.as_str())
        .then(|| format!("{}: {}", waiting.reason, waiting.message))
}

/// INT or TERM for `flint run` ends the pod.
async fn interrupted() -> Failure {
    use tokio::signal::unix::{SignalKind, signal};
    let (Ok(mut int), Ok(mut term)) = (signal(SignalKind::interrupt()), signal(SignalKind::terminate())) else {
        return std::future::pending().await;
    };
    tokio::select! { _ = int.recv() => {}, _ = term.recv() => {} }
    Failure::new("interrupted; the pod was ended")
}

fn env_var(text: &str) -> EnvVar {
    let (name, value) = text.split_once('=').map_or_else(
        || (text, std::env::var(text).unwrap_or_default()),
        |(name, value)| (name, value.to_owned()),
    );
    EnvVar {
        name: name.to_owned(),
        value: verbatim(&value),
        source: None,
    }
}

/// As the user's shell gave it: a pod's `$$` is a `$`, and nothing of it is a reference.
fn verbatim(text: &str) -> String {
    text.replace('$', "$$")
}

fn quantity(text: &str) -> Result<Quantity, String> {
    text.parse()
        .map_err(|error: flint_api::kubernetes::QuantityError| error.to_string())
}

fn user(text: &str) -> Result<(u32, Option<u32>), String> {
    let id = |text: &str| text.parse::<u32>().map_err(|_| format!("{text:?} is no numeric id"));
    match text.split_once(':') {
        Some((user, group)) => Ok((id(user)?, Some(id(group)?))),
        None => Ok((id(text)?, None)),
    }
}
