//! What outlives a flintd in [`super::crash_tests`]: sandboxes with guests, of which each life sees its own view.

use std::{
    collections::{BTreeMap, HashSet},
    io::{Read as _, Write as _},
    path::PathBuf,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::Instant,
};

use flint_api::{
    guest::{self, container_status::State, guest_client::GuestClient, guest_server::Guest, guest_server::GuestServer},
    host,
    vmm::ExitReason,
};
use hyper_util::rt::TokioIo;
use tokio::{
    runtime::Handle,
    sync::{mpsc, watch},
};
use tokio_stream::{StreamExt as _, wrappers::ReceiverStream};
use tonic::{
    Request, Response, Status, Streaming, async_trait,
    transport::{Channel, Endpoint, Server},
};

use super::crash_tests::Life;
use crate::{
    backend::{
        ImageError, ImageInfo, Images, Origin, PullOrder, Ready, RestoreError, Sandbox, SandboxError, SandboxExit,
        SandboxPlan, Sandboxes, SaveError, SavedMachine, Stopped, TakeOver,
    },
    probe::KvmKind,
    saved::SavedFiles,
    timeline::Timeline,
};

/// All sandboxes of a host.
#[derive(Clone, Debug)]
pub(super) struct World {
    machines: Arc<Mutex<BTreeMap<String, Machine>>>,
    /// Where guests live, which no flintd takes along.
    home: Handle,
}

/// One sandbox.
#[derive(Clone, Debug, Default)]
struct Machine {
    containers: Arc<watch::Sender<BTreeMap<String, Container>>>,
    end: Arc<watch::Sender<Option<SandboxExit>>>,
    /// Whether the image is mounted, without which no container can be made.
    mounted: Arc<AtomicBool>,
    /// Whether it stands still: a call waits for it to go on.
    paused: Arc<watch::Sender<bool>>,
    /// Whether its start was completed; otherwise whoever finds it ends it.
    ready: bool,
}

#[derive(Clone, Debug, Default)]
struct Container {
    started: bool,
    exit: Option<guest::ContainerExit>,
}

impl Machine {
    fn die(&self, reason: ExitReason, detail: &str) {
        self.end.send_if_modified(|end| {
            let first = end.is_none();
            if first {
                *end = Some(SandboxExit {
                    reason,
                    detail: detail.into(),
                });
            }
            first
        });
    }

    fn alive(&self) -> bool {
        self.end.borrow().is_none()
    }
}

impl World {
    pub(super) fn new(home: Handle) -> Self {
        Self {
            machines: Arc::default(),
            home,
        }
    }

    /// As one flintd sees it.
    pub(super) fn seen_by(&self, life: Life) -> View {
        View {
            world: self.clone(),
            life,
        }
    }

    /// All programs that run come to their end.
    pub(super) fn finish(&self) {
        for machine in self.machines.lock().unwrap().values().filter(|machine| machine.alive()) {
            machine.containers.send_modify(|all| {
                for container in all.values_mut().filter(|container| container.started) {
                    container.exit.get_or_insert_default();
                }
            });
        }
    }

    /// Whether no guest runs.
    pub(super) fn all_stand_still(&self) -> bool {
        let machines = self.machines.lock().unwrap();
        machines
            .values()
            .all(|machine| !machine.alive() || *machine.paused.borrow())
    }

    /// Nothing runs, and nothing ran twice: as many machines as pods had containers that ran.
    pub(super) fn assert_clean(&self, when: &str, pods: usize) {
        let machines = self.machines.lock().unwrap();
        let alive: Vec<_> = machines.iter().filter(|(_, machine)| machine.alive()).collect();
        assert!(alive.is_empty(), "{when}: still there: {alive:?}");
        // One that was restored and never had an identity was heard by nobody.
        let ran = machines
            .values()
            .filter(|machine| machine.ready)
            .flat_map(|machine| machine.containers.borrow().clone());
        let ran: Vec<_> = ran.filter(|(_, container)| container.started).collect();
        assert_eq!(ran.len(), pods, "{when}: {machines:?}");
    }
}

/// The world, until its flintd is killed.
#[derive(Clone, Debug)]
pub(super) struct View {
    world: World,
    life: Life,
}

/// A start that ends its machine where it is given up. One whose flintd was killed is found by the next.
struct Unfinished {
    machine: Option<Machine>,
    life: Life,
}

impl Drop for Unfinished {
    fn drop(&mut self) {
        if let Some(machine) = self.machine.take().filter(|_| !self.life.is_over()) {
            machine.die(ExitReason::Stopped, "its start was given up");
        }
    }
}

impl View {
    fn machine(&self, id: &str) -> Option<Machine> {
        self.world.machines.lock().unwrap().get(id).cloned()
    }

    /// A sandbox whose start is completed a while after it began.
    async fn begin(&self, plan: SandboxPlan, machine: Machine, _: Timeline) -> Result<Arc<dyn Sandbox>, SandboxError> {
        self.life.gate().await;
        self.world
            .machines
            .lock()
            .unwrap()
            .insert(plan.id.clone(), machine.clone());
        let mut unfinished = Unfinished {
            machine: Some(machine),
            life: self.life.clone(),
        };
        self.life.gate().await;
        let machine = {
            let mut machines = self.world.machines.lock().unwrap();
            let machine = machines.get_mut(&plan.id).unwrap();
            machine.ready = true;
            machine.clone()
        };
        unfinished.machine = None;
        Ok(self.connect(machine).await)
    }

    async fn connect(&self, machine: Machine) -> Arc<dyn Sandbox> {
        let (client, server) = tokio::io::duplex(64 << 10);
        let incoming = tokio_stream::once(Ok::<_, std::io::Error>(server)).chain(tokio_stream::pending());
        let service = GuestServer::new(InGuest {
            machine: machine.clone(),
            life: self.life.clone(),
        });
        self.world
            .home
            .spawn(Server::builder().add_service(service).serve_with_incoming(incoming));
        let mut client = Some(client);
        let connector = tower::service_fn(move |_| {
            let client = client.take();
            async move { client.map(TokioIo::new).ok_or_else(|| std::io::Error::other("gone")) }
        });
        let endpoint = Endpoint::from_static("http://guest");
        let channel = endpoint.connect_with_connector(connector).await.unwrap();
        Arc::new(Held {
            machine,
            channel,
            life: self.life.clone(),
        })
    }
}

#[async_trait]
impl Sandboxes for View {
    fn pool(&self) -> Ready {
        Ready {
            size: 0,
            parked: watch::channel(0).1,
        }
    }
    async fn ready(&self) -> Result<KvmKind, SandboxError> {
        Ok(KvmKind::Native)
    }
    async fn launch(&self, plan: SandboxPlan, timeline: Timeline) -> Result<Arc<dyn Sandbox>, SandboxError> {
        self.begin(plan, Machine::default(), timeline).await
    }
    async fn restore(
        &self,
        plan: SandboxPlan,
        mut origin: Origin,
        timeline: Timeline,
    ) -> Result<Arc<dyn Sandbox>, RestoreError> {
        let machine = Machine::default();
        let mut running = String::new();
        let files = Arc::get_mut(&mut origin.files).unwrap();
        files.memory.read_to_string(&mut running).unwrap();
        machine.containers.send_modify(|all| {
            let container = Container {
                started: true,
                exit: None,
            };
            all.extend(running.lines().map(|id| (id.to_owned(), container.clone())));
        });
        machine.mounted.store(true, Ordering::SeqCst);
        self.begin(plan, machine, timeline)
            .await
            .map_err(|error| RestoreError::Failed(error.0))
    }
    async fn take_over(&self, id: &str) -> Result<TakeOver, SandboxError> {
        self.life.gate().await;
        let Some(machine) = self.machine(id) else {
            return Err(SandboxError(format!("there is no sandbox {id}")));
        };
        if !machine.ready {
            machine.die(ExitReason::Stopped, "its start was not complete");
        }
        let end = machine.end.borrow().clone();
        match end {
            Some(end) => Ok(TakeOver::Ended(end)),
            None => Ok(TakeOver::Running(self.connect(machine).await)),
        }
    }
    async fn end_unknown(&self, known: &HashSet<String>) -> Result<(), SandboxError> {
        self.life.gate().await;
        for (id, machine) in &*self.world.machines.lock().unwrap() {
            if !known.contains(id) {
                machine.die(ExitReason::Stopped, "nobody claims it");
            }
        }
        Ok(())
    }
}

#[async_trait]
impl Images for View {
    async fn pull(&self, _: PullOrder, _: mpsc::Sender<host::PullProgress>) -> Result<ImageInfo, ImageError> {
        self.life.gate().await;
        self.get("").await.map(Option::unwrap)
    }
    async fn import(
        &self,
        _: PathBuf,
        _: Option<String>,
        _: mpsc::Sender<host::PullProgress>,
    ) -> Result<ImageInfo, ImageError> {
        Err(ImageError::Invalid("no test imports".into()))
    }
    async fn get(&self, _: &str) -> Result<Option<ImageInfo>, ImageError> {
        let mut info = ImageInfo::default();
        info.image.digest = "sha256:b".into();
        info.config.cmd = vec!["sh".into()];
        Ok(Some(info))
    }
    async fn list(&self) -> Result<Vec<host::Image>, ImageError> {
        Ok(Vec::new())
    }
    async fn device_name(&self, _: &str) -> Result<String, ImageError> {
        Ok(String::new())
    }
    async fn remove(&self, _: &str) -> Result<u64, ImageError> {
        Ok(0)
    }
    async fn usage(&self) -> Result<host::StoreUsage, ImageError> {
        Err(ImageError::Internal("no test asks".into()))
    }
    async fn verify(&self, _: bool, _: mpsc::Sender<host::VerifyProgress>) -> Result<host::VerifyProgress, ImageError> {
        Err(ImageError::Internal("no test asks".into()))
    }
}

struct Held {
    machine: Machine,
    channel: Channel,
    life: Life,
}

#[async_trait]
impl Sandbox for Held {
    fn guest(&self) -> GuestClient<Channel> {
        GuestClient::new(self.channel.clone())
    }
    fn addresses(&self) -> Vec<String> {
        vec!["10.0.0.2".into()]
    }
    async fn exited(&self) -> SandboxExit {
        let mut end = self.machine.end.subscribe();
        let end = end.wait_for(Option::is_some).await.unwrap().clone().unwrap();
        self.life.gate().await;
        end
    }
    async fn pause(&self) -> Result<(), SandboxError> {
        self.life.gate().await;
        self.machine.paused.send_replace(true);
        Ok(())
    }
    async fn resume(&self) -> Result<(), SandboxError> {
        self.life.gate().await;
        self.machine.paused.send_replace(false);
        Ok(())
    }
    async fn save(&self, files: Arc<SavedFiles>) -> Result<Stopped, SaveError> {
        self.life.gate().await;
        self.machine.paused.send_replace(true);
        let all = self.machine.containers.borrow().clone();
        let running = all
            .iter()
            .filter(|(_, container)| container.started && container.exit.is_none());
        let running: String = running.map(|(id, _)| format!("{id}\n")).collect();
        (&files.memory).write_all(running.as_bytes()).unwrap();
        Ok(Stopped {
            machine: SavedMachine::default(),
            at: Instant::now(),
        })
    }
    async fn is_paused(&self) -> Result<bool, SandboxError> {
        self.life.gate().await;
        Ok(*self.machine.paused.borrow())
    }
    async fn kill(&self) {
        self.life.gate().await;
        self.machine.die(ExitReason::Killed, "");
    }
}

/// A guest, over the connection of one life.
#[derive(Clone)]
struct InGuest {
    machine: Machine,
    life: Life,
}

impl InGuest {
    /// Waits until the guest runs and somebody is there to hear it.
    async fn goes(&self) {
        let mut news = self.machine.paused.subscribe();
        news.wait_for(|paused| !paused).await.unwrap();
        self.life.gate().await;
    }

    async fn change(&self, change: impl FnOnce(&mut BTreeMap<String, Container>)) {
        self.goes().await;
        self.machine.containers.send_modify(change);
    }

    /// Waits for a container's end.
    async fn exit(&self, id: &str) -> Result<guest::ContainerExit, Status> {
        let mut news = self.machine.containers.subscribe();
        let all = news
            .wait_for(|all| all.get(id).is_none_or(|container| container.exit.is_some()))
            .await;
        let exit = all.map_err(|_| Status::unavailable("gone"))?.get(id).cloned();
        self.goes().await;
        exit.and_then(|container| container.exit)
            .ok_or_else(|| Status::not_found(format!("no container {id}")))
    }
}

type Chunks<T> = ReceiverStream<Result<T, Status>>;
type Answer<T> = Result<Response<T>, Status>;

#[async_trait]
impl Guest for InGuest {
    async fn adopt_identity(&self, _: Request<guest::AdoptIdentityRequest>) -> Answer<guest::AdoptIdentityResponse> {
        Ok(Response::new(Default::default()))
    }
    async fn set_resources(
        &self,
        _: Request<guest::SetResourcesRequest>,
    ) -> Result<Response<guest::SetResourcesResponse>, Status> {
        Ok(Response::new(Default::default()))
    }
    async fn mount_image(&self, _: Request<guest::MountImageRequest>) -> Answer<guest::MountImageResponse> {
        self.goes().await;
        self.machine.mounted.store(true, Ordering::SeqCst);
        Ok(Response::new(Default::default()))
    }
    async fn set_materials(
        &self,
        request: Request<guest::SetMaterialsRequest>,
    ) -> Result<Response<guest::SetMaterialsResponse>, Status> {
        let version = request.into_inner().version;
        Ok(Response::new(guest::SetMaterialsResponse { version }))
    }
    async fn create_container(
        &self,
        request: Request<guest::CreateContainerRequest>,
    ) -> Answer<guest::CreateContainerResponse> {
        if !self.machine.mounted.load(Ordering::SeqCst) {
            return Err(Status::failed_precondition("the image is not mounted"));
        }
        let id = request.into_inner().container_id;
        self.change(|all| drop(all.insert(id, Container::default()))).await;
        Ok(Response::new(Default::default()))
    }
    async fn start_container(
        &self,
        request: Request<guest::StartContainerRequest>,
    ) -> Answer<guest::StartContainerResponse> {
        let id = request.into_inner().container_id;
        self.change(|all| all.get_mut(&id).unwrap().started = true).await;
        Ok(Response::new(Default::default()))
    }
    async fn signal_container(
        &self,
        request: Request<guest::SignalContainerRequest>,
    ) -> Answer<guest::SignalContainerResponse> {
        let guest::SignalContainerRequest {
            container_id, signal, ..
        } = request.into_inner();
        let exit = guest::ContainerExit {
            exit_code: 128 + signal,
            ..Default::default()
        };
        self.change(|all| {
            all.get_mut(&container_id).unwrap().exit.get_or_insert(exit);
        })
        .await;
        Ok(Response::new(Default::default()))
    }
    async fn wait_container(&self, request: Request<guest::WaitContainerRequest>) -> Answer<guest::ContainerExit> {
        Ok(Response::new(self.exit(&request.into_inner().container_id).await?))
    }
    async fn delete_container(
        &self,
        request: Request<guest::DeleteContainerRequest>,
    ) -> Answer<guest::DeleteContainerResponse> {
        // Kept, for the tests to see that it ran.
        Err(Status::not_found(request.into_inner().container_id))
    }
    async fn list_containers(&self, _: Request<guest::ListContainersRequest>) -> Answer<guest::ListContainersResponse> {
        self.goes().await;
        let all = self.machine.containers.borrow().clone();
        let status = |(container_id, container): (String, Container)| guest::ContainerStatus {
            container_id,
            state: match (&container.exit, container.started) {
                (Some(_), _) => State::Exited,
                (None, true) => State::Running,
                (None, false) => State::Created,
            }
            .into(),
            exit: container.exit,
        };
        let containers = all.into_iter().map(status).collect();
        Ok(Response::new(guest::ListContainersResponse { containers }))
    }
    type ReadOutputStream = Chunks<guest::OutputChunk>;
    async fn read_output(&self, request: Request<guest::ReadOutputRequest>) -> Answer<Self::ReadOutputStream> {
        self.exit(&request.into_inner().container_id).await?;
        Ok(Response::new(ReceiverStream::new(mpsc::channel(1).1)))
    }
    async fn write_input(&self, _: Request<Streaming<guest::InputFrame>>) -> Answer<guest::WriteInputResponse> {
        Ok(Response::new(Default::default()))
    }
    type ExecStream = Chunks<guest::ExecResponse>;
    async fn exec(&self, _: Request<Streaming<guest::ExecRequest>>) -> Answer<Self::ExecStream> {
        Err(Status::unimplemented("no test executes"))
    }
    async fn stats(&self, _: Request<guest::StatsRequest>) -> Answer<guest::StatsResponse> {
        Ok(Response::new(Default::default()))
    }
    async fn shutdown(&self, _: Request<guest::ShutdownRequest>) -> Answer<guest::ShutdownResponse> {
        self.goes().await;
        self.machine.die(ExitReason::Poweroff, "");
        Ok(Response::new(Default::default()))
    }
}
