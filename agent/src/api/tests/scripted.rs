//! A sandbox without a VMM: its guest is a gRPC server in this process that does what a script says.

use std::{
    collections::{BTreeMap, HashSet},
    io::{Read as _, Write as _},
    path::PathBuf,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
    time::Instant,
};

use flint_api::{
    guest::{
        self,
        container_status::State,
        guest_client::GuestClient,
        guest_server::{Guest, GuestServer},
    },
    host,
    vmm::ExitReason,
};
use hyper_util::rt::TokioIo;
use tokio::sync::{mpsc, watch};
use tokio_stream::{StreamExt as _, wrappers::ReceiverStream};
use tonic::{
    Request, Response, Status, Streaming, async_trait,
    transport::{Channel, Endpoint, Server},
};

use crate::{
    backend::{
        ImageConfig, ImageError, ImageInfo, Images, Origin, PullOrder, Ready, RestoreError, Sandbox, SandboxError,
        SandboxExit, SandboxPlan, Sandboxes, SaveError, SavedMachine, Stopped, TakeOver,
    },
    saved::SavedFiles,
    timeline::Timeline,
};

/// One container in the scripted guest: runs until told otherwise; what it writes is `output`.
#[derive(Clone, Debug, Default)]
struct Container {
    started: bool,
    output: Vec<u8>,
    exit: Option<guest::ContainerExit>,
}

/// Containers and programs that were run in them.
type Executed = Vec<(String, Vec<String>)>;

/// The guest: a table of containers that tests reach into.
#[derive(Clone, Debug, Default)]
pub(super) struct ScriptedGuest {
    containers: Arc<watch::Sender<BTreeMap<String, Container>>>,
    created: Arc<Mutex<Vec<guest::CreateContainerRequest>>>,
    end: Arc<watch::Sender<Option<SandboxExit>>>,
    /// Whether it stands still: a call waits for it to go on.
    paused: Arc<watch::Sender<bool>>,
    save_error: Arc<Mutex<Option<SaveError>>>,
    pub(super) executed: Arc<watch::Sender<Executed>>,
    restless: Arc<AtomicBool>,
    signals: Arc<Mutex<Vec<u32>>>,
    failures: Arc<AtomicU32>,
    refusal: Arc<Mutex<Option<String>>>,
    /// As they were handed over.
    pub(super) materials: Arc<watch::Sender<guest::SetMaterialsRequest>>,
}

impl ScriptedGuest {
    pub(super) fn print(&self, id: &str, text: &str) {
        self.containers
            .send_modify(|all| all.entry(id.into()).or_default().output.extend(text.as_bytes()));
    }

    pub(super) fn exit(&self, id: &str, exit_code: u32) {
        let exit = guest::ContainerExit {
            exit_code,
            ..Default::default()
        };
        self.containers
            .send_modify(|all| all.entry(id.into()).or_default().exit = Some(exit));
    }

    /// A container runs in it that was not created here: it came with a saved machine's memory.
    pub(super) fn has_running(&self, id: &str) {
        self.containers
            .send_modify(|all| all.entry(id.into()).or_default().started = true);
    }

    /// Writes and ends in one step, so that nobody sees one without the other.
    pub(super) fn print_and_exit(&self, id: &str, text: &str, exit_code: u32) {
        self.containers.send_modify(|all| {
            let container = all.entry(id.into()).or_default();
            container.output.extend(text.as_bytes());
            container.exit = Some(guest::ContainerExit {
                exit_code,
                ..Default::default()
            });
        });
    }

    /// The next so many readings of output break off after they have begun.
    pub(super) fn fail_readings(&self, count: u32) {
        self.failures.store(count, Ordering::Relaxed);
    }

    pub(super) fn die(&self, reason: ExitReason) {
        self.end.send_replace(Some(SandboxExit {
            reason,
            detail: String::new(),
        }));
    }

    pub(super) fn is_paused(&self) -> bool {
        *self.paused.borrow()
    }

    /// Its snapshots are not for this host.
    pub(super) fn refuse_restoring(&self, line: &str) {
        *self.refusal.lock().unwrap() = Some(line.into());
    }

    /// How the next saving ends.
    pub(super) fn fail_saving(&self, error: SaveError) {
        *self.save_error.lock().unwrap() = Some(error);
    }

    fn save(&self, files: &SavedFiles) -> Result<Stopped, SaveError> {
        self.paused.send_replace(true);
        if let Some(error) = self.save_error.lock().unwrap().take() {
            return Err(error);
        }
        for (mut file, text) in [
            (&files.state, "state"),
            (&files.memory, "memory"),
            (&files.scratch, "disk"),
        ] {
            file.write_all(text.as_bytes()).unwrap();
        }
        Ok(Stopped {
            machine: SavedMachine::default(),
            at: Instant::now(),
        })
    }

    /// It cannot be paused any more.
    pub(super) fn refuse_pauses(&self) {
        self.restless.store(true, Ordering::Relaxed);
    }

    /// What containers were sent, oldest first.
    pub(super) fn signals(&self) -> Vec<u32> {
        self.signals.lock().unwrap().clone()
    }

    /// Waits until the guest runs.
    async fn goes(&self) {
        let mut news = self.paused.subscribe();
        news.wait_for(|paused| !paused).await.unwrap();
    }

    /// The first secret that an environment refers to and that was not handed over.
    fn missing(&self, request: &guest::CreateContainerRequest) -> Option<String> {
        let known = self.materials.borrow().materials.clone().unwrap_or_default();
        let variables = &request.environment.as_ref()?.variables;
        variables.iter().find_map(|variable| match &variable.source {
            Some(guest::env_var::Source::SecretKey(key)) if !known.secrets.contains_key(&key.name) => {
                Some(format!("secret {:?} not found", key.name))
            }
            _ => None,
        })
    }

    pub(super) fn created(&self) -> Vec<guest::CreateContainerRequest> {
        self.created.lock().unwrap().clone()
    }

    /// Waits until the container fulfils a condition.
    async fn until(&self, id: &str, condition: impl Fn(&Container) -> bool) -> Result<Container, Status> {
        self.goes().await;
        let mut news = self.containers.subscribe();
        let all = news.wait_for(|all| all.get(id).is_none_or(&condition)).await;
        let found = all.map_err(|_| Status::unavailable("gone"))?.get(id).cloned();
        self.goes().await;
        found.ok_or_else(|| Status::not_found(format!("no container {id}")))
    }
}

type Chunks<T> = ReceiverStream<Result<T, Status>>;

#[async_trait]
impl Guest for ScriptedGuest {
    async fn adopt_identity(
        &self,
        _: Request<guest::AdoptIdentityRequest>,
    ) -> Result<Response<guest::AdoptIdentityResponse>, Status> {
        Ok(Response::new(Default::default()))
    }
    async fn set_resources(
        &self,
        _: Request<guest::SetResourcesRequest>,
    ) -> Result<Response<guest::SetResourcesResponse>, Status> {
        Ok(Response::new(Default::default()))
    }
    async fn mount_image(
        &self,
        _: Request<guest::MountImageRequest>,
    ) -> Result<Response<guest::MountImageResponse>, Status> {
        self.goes().await;
        Ok(Response::new(Default::default()))
    }
    async fn set_materials(
        &self,
        request: Request<guest::SetMaterialsRequest>,
    ) -> Result<Response<guest::SetMaterialsResponse>, Status> {
        self.goes().await;
        let request = request.into_inner();
        let mut version = 0;
        self.materials.send_modify(|known| {
            let newer = request.version == 0 || request.version > known.version;
            if let (true, Some(materials)) = (newer, &request.materials) {
                known.version = if request.version == 0 {
                    known.version + 1
                } else {
                    request.version
                };
                known.materials = Some(materials.clone());
            }
            known.volumes.clone_from(&request.volumes);
            version = known.version;
        });
        Ok(Response::new(guest::SetMaterialsResponse { version }))
    }
    async fn create_container(
        &self,
        request: Request<guest::CreateContainerRequest>,
    ) -> Result<Response<guest::CreateContainerResponse>, Status> {
        let request = request.into_inner();
        if let Some(config_error) = self.missing(&request) {
            return Ok(Response::new(guest::CreateContainerResponse { config_error }));
        }
        self.containers
            .send_modify(|all| drop(all.insert(request.container_id.clone(), Container::default())));
        self.created.lock().unwrap().push(request);
        Ok(Response::new(Default::default()))
    }
    async fn start_container(
        &self,
        request: Request<guest::StartContainerRequest>,
    ) -> Result<Response<guest::StartContainerResponse>, Status> {
        let id = request.into_inner().container_id;
        self.containers
            .send_modify(|all| all.entry(id).or_default().started = true);
        Ok(Response::new(Default::default()))
    }
    async fn signal_container(
        &self,
        request: Request<guest::SignalContainerRequest>,
    ) -> Result<Response<guest::SignalContainerResponse>, Status> {
        self.goes().await;
        let request = request.into_inner();
        self.signals.lock().unwrap().push(request.signal);
        self.exit(&request.container_id, 128 + request.signal);
        Ok(Response::new(Default::default()))
    }
    async fn wait_container(
        &self,
        request: Request<guest::WaitContainerRequest>,
    ) -> Result<Response<guest::ContainerExit>, Status> {
        let found = self
            .until(&request.into_inner().container_id, |container| container.exit.is_some())
            .await?;
        Ok(Response::new(found.exit.unwrap()))
    }
    async fn delete_container(
        &self,
        request: Request<guest::DeleteContainerRequest>,
    ) -> Result<Response<guest::DeleteContainerResponse>, Status> {
        self.containers
            .send_modify(|all| drop(all.remove(&request.into_inner().container_id)));
        Ok(Response::new(Default::default()))
    }
    async fn list_containers(
        &self,
        _: Request<guest::ListContainersRequest>,
    ) -> Result<Response<guest::ListContainersResponse>, Status> {
        self.goes().await;
        let all = self.containers.borrow().clone();
        let status = |(id, container): (String, Container)| guest::ContainerStatus {
            container_id: id,
            state: match (&container.exit, container.started) {
                (Some(_), _) => State::Exited,
                (None, true) => State::Running,
                (None, false) => State::Created,
            }
            .into(),
            exit: container.exit,
        };
        Ok(Response::new(guest::ListContainersResponse {
            containers: all.into_iter().map(status).collect(),
        }))
    }
    type ReadOutputStream = Chunks<guest::OutputChunk>;
    async fn read_output(
        &self,
        request: Request<guest::ReadOutputRequest>,
    ) -> Result<Response<Self::ReadOutputStream>, Status> {
        let guest::ReadOutputRequest {
            container_id,
            from_offset,
        } = request.into_inner();
        let from = usize::try_from(from_offset).unwrap();
        let found = self
            .until(&container_id, |c| c.output.len() > from || c.exit.is_some())
            .await?;
        let (out, chunks) = mpsc::channel(1);
        let failing = |left: u32| left.checked_sub(1);
        if self
            .failures
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, failing)
            .is_ok()
        {
            out.send(Err(Status::unavailable("broke off"))).await.unwrap();
            return Ok(Response::new(ReceiverStream::new(chunks)));
        }
        if let Some(data) = found.output.get(from..).filter(|data| !data.is_empty()) {
            let stream = guest::output_chunk::Stream::Stdout.into();
            let chunk = guest::OutputChunk {
                offset: from_offset,
                stream,
                data: data.to_vec(),
                time_ns: 1,
            };
            out.send(Ok(chunk)).await.unwrap();
        }
        Ok(Response::new(ReceiverStream::new(chunks)))
    }
    async fn write_input(
        &self,
        _: Request<Streaming<guest::InputFrame>>,
    ) -> Result<Response<guest::WriteInputResponse>, Status> {
        Ok(Response::new(Default::default()))
    }
    type ExecStream = Chunks<guest::ExecResponse>;
    /// Echoes standard input as standard output and ends with its number of bytes at the end of the input; killed, with 137.
    async fn exec(
        &self,
        request: Request<Streaming<guest::ExecRequest>>,
    ) -> Result<Response<Self::ExecStream>, Status> {
        use guest::{exec_request::Frame, exec_response::Frame as Answer};
        let mut frames = request.into_inner();
        let (out, answers) = mpsc::channel(4);
        let executed = self.executed.clone();
        tokio::spawn(async move {
            let (mut exit_code, mut hangs) = (0, false);
            while let Ok(Some(message)) = frames.message().await {
                let answer = match message.frame {
                    Some(Frame::Stdin(bytes)) => {
                        exit_code += u32::try_from(bytes.len()).unwrap();
                        Answer::Stdout(bytes)
                    }
                    Some(Frame::Start(start)) => {
                        let args = start.process.unwrap().args;
                        // `exit CODE WORDS` does so; `hang` ends when it is killed.
                        hangs = args[0] == "hang";
                        let fails = args[0] == "exit";
                        let words = args.get(2).cloned().unwrap_or_default();
                        if fails {
                            exit_code = args[1].parse().unwrap();
                        }
                        executed.send_modify(|all| all.push((start.container_id, args)));
                        if !fails {
                            continue;
                        }
                        Answer::Stderr(words.into_bytes())
                    }
                    Some(Frame::StdinEof(_)) if hangs => continue,
                    Some(Frame::StdinEof(_)) => break,
                    Some(Frame::Signal(signal)) => {
                        exit_code = 128 + signal;
                        executed.send_modify(|all| all.push(("killed".into(), Vec::new())));
                        break;
                    }
                    _ => continue,
                };
                let _ = out.send(Ok(guest::ExecResponse { frame: Some(answer) })).await;
            }
            let exit = guest::ContainerExit {
                exit_code,
                ..Default::default()
            };
            let _ = out
                .send(Ok(guest::ExecResponse {
                    frame: Some(Answer::Exit(exit)),
                }))
                .await;
        });
        Ok(Response::new(ReceiverStream::new(answers)))
    }
    async fn stats(&self, _: Request<guest::StatsRequest>) -> Result<Response<guest::StatsResponse>, Status> {
        Ok(Response::new(Default::default()))
    }
    async fn shutdown(&self, _: Request<guest::ShutdownRequest>) -> Result<Response<guest::ShutdownResponse>, Status> {
        self.die(ExitReason::Poweroff);
        Ok(Response::new(Default::default()))
    }
}

struct ScriptedSandbox {
    guest: ScriptedGuest,
    channel: Channel,
}

#[async_trait]
impl Sandbox for ScriptedSandbox {
    fn guest(&self) -> GuestClient<Channel> {
        GuestClient::new(self.channel.clone())
    }
    fn addresses(&self) -> Vec<String> {
        vec!["10.0.0.2".into()]
    }
    async fn exited(&self) -> SandboxExit {
        let mut end = self.guest.end.subscribe();
        end.wait_for(Option::is_some).await.unwrap().clone().unwrap()
    }
    async fn pause(&self) -> Result<(), SandboxError> {
        if self.guest.restless.load(Ordering::Relaxed) {
            return Err(SandboxError("a disk does not come to rest".into()));
        }
        self.guest.paused.send_replace(true);
        Ok(())
    }
    async fn resume(&self) -> Result<(), SandboxError> {
        self.guest.paused.send_replace(false);
        Ok(())
    }
    async fn save(&self, files: Arc<SavedFiles>) -> Result<Stopped, SaveError> {
        self.guest.save(&files)
    }
    async fn is_paused(&self) -> Result<bool, SandboxError> {
        Ok(self.guest.is_paused())
    }
    async fn kill(&self) {
        self.guest.die(ExitReason::Killed);
    }
}

/// All sandboxes share one guest, so that a test can hold it before there is a sandbox; a flintd that follows finds them.
#[derive(Clone, Default)]
pub(super) struct ScriptedSandboxes {
    pub(super) guest: ScriptedGuest,
    pub(super) plans: Arc<Mutex<Vec<SandboxPlan>>>,
    /// How many are parked, of two.
    pub(super) parked: Arc<watch::Sender<usize>>,
}

impl ScriptedSandboxes {
    async fn connect(&self) -> Arc<dyn Sandbox> {
        let (client, server) = tokio::io::duplex(64 << 10);
        let incoming = tokio_stream::once(Ok::<_, std::io::Error>(server)).chain(tokio_stream::pending());
        let service = GuestServer::new(self.guest.clone());
        tokio::spawn(Server::builder().add_service(service).serve_with_incoming(incoming));
        let mut client = Some(client);
        let connector = tower::service_fn(move |_| {
            let client = client.take();
            async move { client.map(TokioIo::new).ok_or_else(|| std::io::Error::other("gone")) }
        });
        let channel = Endpoint::from_static("http://guest")
            .connect_with_connector(connector)
            .await
            .unwrap();
        Arc::new(ScriptedSandbox {
            guest: self.guest.clone(),
            channel,
        })
    }
}

#[async_trait]
impl Sandboxes for ScriptedSandboxes {
    fn pool(&self) -> Ready {
        Ready {
            size: 2,
            parked: self.parked.subscribe(),
        }
    }
    async fn ready(&self) -> Result<crate::probe::KvmKind, SandboxError> {
        Ok(crate::probe::KvmKind::Native)
    }
    async fn launch(&self, plan: SandboxPlan, timeline: Timeline) -> Result<Arc<dyn Sandbox>, SandboxError> {
        timeline.mark("vmm.boot");
        self.plans.lock().unwrap().push(plan);
        self.guest.end.send_replace(None);
        Ok(self.connect().await)
    }
    async fn restore(&self, plan: SandboxPlan, origin: Origin, _: Timeline) -> Result<Arc<dyn Sandbox>, RestoreError> {
        if let Some(line) = self.guest.refusal.lock().unwrap().clone() {
            return Err(RestoreError::Refused(line));
        }
        let mut memory = String::new();
        (&origin.files.memory).read_to_string(&mut memory).unwrap();
        assert_eq!(memory, "memory");
        self.plans.lock().unwrap().push(plan);
        let sandbox = self.connect().await;
        if let Some(hook) = origin.hook {
            let ran = hook.run(sandbox.guest()).await;
            ran.map_err(|error| RestoreError::Hook(error.to_string()))?;
        }
        Ok(sandbox)
    }
    async fn take_over(&self, _: &str) -> Result<TakeOver, SandboxError> {
        let end = self.guest.end.borrow().clone();
        Ok(match end {
            Some(end) => TakeOver::Ended(end),
            None => TakeOver::Running(self.connect().await),
        })
    }
    async fn end_unknown(&self, _: &HashSet<String>) -> Result<(), SandboxError> {
        Ok(())
    }
}

/// Knows one image, `busybox`; a registry called `down` is down.
#[derive(Clone, Default)]
pub(super) struct ScriptedImages {
    /// It has to be pulled first.
    pub(super) absent: Arc<AtomicBool>,
    /// Its registry is down.
    pub(super) down: Arc<AtomicBool>,
    /// Its registry does not answer.
    pub(super) silent: Arc<watch::Sender<bool>>,
    /// Its device is another one.
    pub(super) differs: Arc<AtomicBool>,
}

fn busybox() -> ImageInfo {
    let image = host::Image {
        digest: "sha256:b".into(),
        references: vec!["busybox".into()],
        ..Default::default()
    };
    let config = ImageConfig {
        cmd: vec!["sh".into()],
        stop_signal: "SIGQUIT".into(),
        ..Default::default()
    };
    ImageInfo { image, config }
}

#[async_trait]
impl Images for ScriptedImages {
    async fn pull(
        &self,
        order: PullOrder,
        progress: mpsc::Sender<host::PullProgress>,
    ) -> Result<ImageInfo, ImageError> {
        let _ = progress.try_send(host::PullProgress {
            stage: "resolve".into(),
            ..Default::default()
        });
        self.silent.subscribe().wait_for(|silent| !silent).await.unwrap();
        match order.reference.as_str() {
            _ if self.down.load(Ordering::Relaxed) => Err(ImageError::Unavailable("the registry is down".into())),
            "busybox" | "busybox@sha256:b" => {
                self.absent.store(false, Ordering::Relaxed);
                Ok(busybox())
            }
            reference if reference.starts_with("down") => Err(ImageError::Unavailable("the registry is down".into())),
            reference => Err(ImageError::NotFound(format!("no image {reference}"))),
        }
    }
    async fn import(
        &self,
        path: PathBuf,
        _: Option<String>,
        _: mpsc::Sender<host::PullProgress>,
    ) -> Result<ImageInfo, ImageError> {
        Err(ImageError::Invalid(format!("{} is no archive", path.display())))
    }
    async fn get(&self, name: &str) -> Result<Option<ImageInfo>, ImageError> {
        let known = ["busybox", "sha256:b"].contains(&name) && !self.absent.load(Ordering::Relaxed);
        Ok(known.then(busybox))
    }
    async fn list(&self) -> Result<Vec<host::Image>, ImageError> {
        Ok(vec![busybox().image])
    }
    async fn device_name(&self, digest: &str) -> Result<String, ImageError> {
        let differs = self.differs.load(Ordering::Relaxed);
        Ok(format!("device {differs} of {digest}"))
    }
    async fn remove(&self, _: &str) -> Result<u64, ImageError> {
        Ok(1000)
    }
    async fn usage(&self) -> Result<host::StoreUsage, ImageError> {
        Ok(host::StoreUsage::default())
    }
    async fn verify(&self, _: bool, _: mpsc::Sender<host::VerifyProgress>) -> Result<host::VerifyProgress, ImageError> {
        Ok(host::VerifyProgress::default())
    }
}
