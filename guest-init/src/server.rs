//! The guest API: each rpc checked, handed to the part that does it, and its outcome translated.
//!
//! What changes the machine runs as a task of its own: a client that goes away in the middle must not leave half of it.

use std::{
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use flint_api::guest::{
    self as api, AdoptIdentityRequest, AdoptIdentityResponse, ContainerExit, ContainerStatus, CreateContainerRequest,
    CreateContainerResponse, DeleteContainerRequest, DeleteContainerResponse, ExecRequest, ExecResponse, InputFrame,
    ListContainersRequest, ListContainersResponse, MountImageRequest, MountImageResponse, OutputChunk,
    ReadOutputRequest, SetMaterialsRequest, SetMaterialsResponse, SetResourcesRequest, SetResourcesResponse,
    ShutdownRequest, ShutdownResponse, SignalContainerRequest, SignalContainerResponse, StartContainerRequest,
    StartContainerResponse, StatsRequest, StatsResponse, WaitContainerRequest, WriteInputResponse, guest_server::Guest,
};
use futures::{FutureExt, Stream};
use tokio::{
    sync::{Mutex, Notify, mpsc},
    task::AbortHandle,
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use crate::{
    container::{Container, ContainerError, Containers, State, nanoseconds},
    exec,
    identity::{self, Generation},
    idle,
    output::{self, BadOffset},
    paths::Name,
    resources, stats,
    storage::Storage,
};

/// Highest signal number of Linux.
const LAST_SIGNAL: u32 = 64;
/// How long containers may take to end on SIGTERM at Shutdown.
const TERM_GRACE: Duration = Duration::from_secs(5);
/// And on SIGKILL.
const KILL_GRACE: Duration = Duration::from_secs(5);
/// Answers that may wait for the transport; beyond it the program waits.
const QUEUE: usize = 4;

/// No number of rebirths.
const NEVER: u64 = u64::MAX;

type Reply<T> = Result<Response<T>, Status>;
type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// The service.
#[derive(Debug, Clone)]
pub struct GuestService(Arc<Parts>);

#[derive(Debug)]
struct Parts {
    containers: Containers,
    storage: Storage,
    started: Instant,
    /// The generation whose identity was adopted last, if it had one; held while one is adopted.
    generation: Mutex<Option<Generation>>,
    /// How often this machine has become another one, by being restored.
    rebirths: AtomicU64,
    /// How often it had when it adopted its identity; [`NEVER`] before.
    adopted_at: AtomicU64,
    resizing: Mutex<()>,
    /// Gives memory back while the containers are idle.
    idle: Mutex<Option<AbortHandle>>,
    power_off: Arc<Notify>,
}

impl Parts {
    fn has_identity(&self) -> bool {
        self.adopted_at.load(Ordering::Relaxed) == self.rebirths.load(Ordering::Relaxed)
    }

    /// From now on, instead of what was before.
    async fn watch_idleness(&self, period: Duration) {
        let watch = (!period.is_zero()).then(|| tokio::spawn(idle::watch(period)).abort_handle());
        if let Some(former) = std::mem::replace(&mut *self.idle.lock().await, watch) {
            former.abort();
        }
    }
}

impl GuestService {
    /// `power_off` is told when the machine is to go down.
    pub fn new(containers: Containers, storage: Storage, started: Instant, power_off: Arc<Notify>) -> Self {
        Self(Arc::new(Parts {
            containers,
            storage,
            started,
            generation: Mutex::new(None),
            rebirths: AtomicU64::new(0),
            adopted_at: AtomicU64::new(NEVER),
            resizing: Mutex::new(()),
            idle: Mutex::default(),
            power_off,
        }))
    }

    /// This machine has become another one: it has no identity until it adopts one.
    pub fn forget_identity(&self) {
        self.0.rebirths.fetch_add(1, Ordering::Relaxed);
    }

    /// Ends all containers: asks, then kills.
    pub async fn end_containers(&self) {
        for (signal, grace) in [(libc::SIGTERM, TERM_GRACE), (libc::SIGKILL, KILL_GRACE)] {
            let living: Vec<Arc<Container>> = self
                .0
                .containers
                .all()
                .into_iter()
                .filter(|container| container.state().pid().is_some())
                .collect();
            for container in &living {
                // One that has just ended, or cannot be signalled, is no reason to spare the others.
                let _ = container.signal(signal, signal == libc::SIGKILL);
            }
            let ends = futures::future::join_all(living.iter().map(|container| container.wait()));
            if tokio::time::timeout(grace, ends).await.is_ok() {
                return;
            }
        }
    }
}

/// Runs `work` to its end whether the client waits for it or not.
async fn to_the_end<T: Send + 'static>(
    work: impl Future<Output = Result<T, Status>> + Send + 'static,
) -> Result<T, Status> {
    let done = tokio::spawn(work).await;
    done.unwrap_or_else(|error| Err(Status::internal(format!("flint-init: a task failed: {error}"))))
}

#[tonic::async_trait]
impl Guest for GuestService {
    async fn adopt_identity(&self, request: Request<AdoptIdentityRequest>) -> Reply<AdoptIdentityResponse> {
        let parts = Arc::clone(&self.0);
        let response = to_the_end(async move {
            let request = request.get_ref();
            let generation = Generation::parse(&request.generation)?;
            let mut last = parts.generation.lock().await;
            if generation.is_some() && generation == *last {
                return Err(Status::already_exists(
                    "this generation has its identity already: a restored machine needs another generation",
                ));
            }
            parts.adopted_at.store(NEVER, Ordering::Relaxed);
            let rebirths = parts.rebirths.load(Ordering::Relaxed);
            identity::adopt(request).await?;
            if rebirths != parts.rebirths.load(Ordering::Relaxed) {
                return Err(Status::aborted(
                    "this machine was restored while it adopted an identity: adopt one anew",
                ));
            }
            parts
                .watch_idleness(Duration::from_millis(request.idle_reclaim_ms))
                .await;
            *last = generation;
            parts.adopted_at.store(rebirths, Ordering::Relaxed);
            Ok(AdoptIdentityResponse {
                kernel_uptime_us: kernel_uptime_us(),
                init_uptime_us: u64::try_from(parts.started.elapsed().as_micros()).unwrap_or(u64::MAX),
            })
        });
        Ok(Response::new(response.await?))
    }

    async fn set_resources(&self, request: Request<SetResourcesRequest>) -> Reply<SetResourcesResponse> {
        let parts = Arc::clone(&self.0);
        let response = to_the_end(async move {
            let _one_at_a_time = parts.resizing.lock().await;
            Ok(resources::set(request.get_ref()).await?)
        });
        Ok(Response::new(response.await?))
    }

    async fn mount_image(&self, request: Request<MountImageRequest>) -> Reply<MountImageResponse> {
        let request = request.into_inner();
        let image = Name::parse("image_id", &request.image_id)?;
        let serial = Name::parse("disk_serial", &request.disk_serial)?;
        let storage = self.0.storage.clone();
        to_the_end(async move { Ok(storage.mount_image(&image, &serial).await?) }).await?;
        Ok(Response::new(MountImageResponse {}))
    }

    async fn set_materials(&self, request: Request<SetMaterialsRequest>) -> Reply<SetMaterialsResponse> {
        let materials = self.0.containers.materials().clone();
        let version = to_the_end(async move { Ok(materials.set(request.into_inner()).await?) }).await?;
        Ok(Response::new(SetMaterialsResponse { version }))
    }

    async fn create_container(&self, request: Request<CreateContainerRequest>) -> Reply<CreateContainerResponse> {
        if !self.0.has_identity() {
            return Err(Status::failed_precondition(
                "this machine has no identity yet; call AdoptIdentity first",
            ));
        }
        let containers = self.0.containers.clone();
        let config_error = to_the_end(async move {
            match containers.create(request.into_inner()).await {
                Ok(()) => Ok(String::new()),
                Err(ContainerError::Config(error)) => Ok(error.0),
                Err(error) => Err(error.into()),
            }
        })
        .await?;
        Ok(Response::new(CreateContainerResponse { config_error }))
    }

    async fn start_container(&self, request: Request<StartContainerRequest>) -> Reply<StartContainerResponse> {
        let pid = self.0.containers.start(&request.get_ref().container_id)?;
        Ok(Response::new(StartContainerResponse {
            pid: u32::try_from(pid).unwrap_or(0),
        }))
    }

    async fn signal_container(&self, request: Request<SignalContainerRequest>) -> Reply<SignalContainerResponse> {
        let request = request.get_ref();
        if !(1..=LAST_SIGNAL).contains(&request.signal) {
            let text = format!("signal {} does not exist; 1 to {LAST_SIGNAL} do", request.signal);
            return Err(Status::invalid_argument(text));
        }
        let signal = i32::try_from(request.signal).map_err(|error| Status::invalid_argument(error.to_string()))?;
        self.0
            .containers
            .get(&request.container_id)?
            .signal(signal, request.all_processes)?;
        Ok(Response::new(SignalContainerResponse {}))
    }

    async fn wait_container(&self, request: Request<WaitContainerRequest>) -> Reply<ContainerExit> {
        let id = &request.get_ref().container_id;
        let exit = self.0.containers.get(id)?.wait().await;
        Ok(Response::new(exit.ok_or_else(|| {
            Status::not_found(format!("container {id} could not be created"))
        })?))
    }

    async fn delete_container(&self, request: Request<DeleteContainerRequest>) -> Reply<DeleteContainerResponse> {
        let containers = self.0.containers.clone();
        to_the_end(async move { Ok(containers.delete(&request.get_ref().container_id).await?) }).await?;
        Ok(Response::new(DeleteContainerResponse {}))
    }

    async fn list_containers(&self, _: Request<ListContainersRequest>) -> Reply<ListContainersResponse> {
        let containers = self
            .0
            .containers
            .all()
            .iter()
            .filter_map(|container| status(container))
            .collect();
        Ok(Response::new(ListContainersResponse { containers }))
    }

    type ReadOutputStream = Answers<OutputChunk>;

    async fn read_output(&self, request: Request<ReadOutputRequest>) -> Reply<Self::ReadOutputStream> {
        let request = request.into_inner();
        let container = self.0.containers.get(&request.container_id)?;
        // Acknowledges now, and refuses a wrong offset as the call's own error.
        container.output.read_from(request.from_offset)?;
        let (sender, receiver) = mpsc::channel(QUEUE);
        tokio::spawn(async move {
            tokio::select! {
                () = give_output(&container, request.from_offset, &sender) => {}
                () = sender.closed() => {}
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }

    async fn write_input(&self, request: Request<Streaming<InputFrame>>) -> Reply<WriteInputResponse> {
        exec::write_input(&self.0.containers, request.into_inner()).await?;
        Ok(Response::new(WriteInputResponse {}))
    }

    type ExecStream = Answers<ExecResponse>;

    async fn exec(&self, request: Request<Streaming<ExecRequest>>) -> Reply<Self::ExecStream> {
        let (sender, receiver) = mpsc::channel(QUEUE);
        tokio::spawn(exec::serve(self.0.containers.clone(), request.into_inner(), sender));
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }

    async fn stats(&self, _: Request<StatsRequest>) -> Reply<StatsResponse> {
        Ok(Response::new(stats::collect(&self.0.containers)))
    }

    async fn shutdown(&self, _: Request<ShutdownRequest>) -> Reply<ShutdownResponse> {
        let service = self.clone();
        to_the_end(async move {
            service.end_containers().await;
            service.0.power_off.notify_one();
            Ok(())
        })
        .await?;
        Ok(Response::new(ShutdownResponse {}))
    }
}

/// Gives output from an offset on. Another reader's acknowledgement makes an offset too old at any moment.
async fn give_output(container: &Container, from: u64, answers: &mpsc::Sender<Result<OutputChunk, Status>>) {
    let given = async {
        let mut reading = container.output.read_from(from)?;
        while let Some(chunk) = reading.next().await? {
            if answers.send(Ok(output_chunk(chunk))).await.is_err() {
                break;
            }
        }
        Ok::<_, BadOffset>(())
    };
    if let Err(overtaken) = given.await {
        // Whoever has hung up does not need to know.
        let _ = answers.send(Err(Status::aborted(overtaken.to_string()))).await;
    }
}

/// A container that is still being made is nobody's to see.
fn status(container: &Container) -> Option<ContainerStatus> {
    use api::container_status::State as ApiState;
    let (state, exit) = match container.state() {
        State::Creating => return None,
        State::Created { .. } => (ApiState::Created, None),
        State::Running { .. } => (ApiState::Running, None),
        State::Exited(_) => (ApiState::Exited, container.wait().now_or_never().flatten()),
    };
    Some(ContainerStatus {
        container_id: container.id.to_string(),
        state: state.into(),
        exit,
    })
}

fn output_chunk(chunk: output::Chunk) -> OutputChunk {
    let stream = match chunk.stream {
        output::Stream::Stdout => api::output_chunk::Stream::Stdout,
        output::Stream::Stderr => api::output_chunk::Stream::Stderr,
    };
    OutputChunk {
        offset: chunk.offset,
        stream: stream.into(),
        data: chunk.data,
        time_ns: nanoseconds(chunk.time),
    }
}

impl From<BadOffset> for Status {
    fn from(error: BadOffset) -> Self {
        match error {
            BadOffset::Forgotten { .. } => Self::out_of_range(error.to_string()),
            BadOffset::Ahead { .. } => Self::invalid_argument(error.to_string()),
        }
    }
}

fn kernel_uptime_us() -> u64 {
    let now = nix::time::clock_gettime(nix::time::ClockId::CLOCK_BOOTTIME).map(std::time::Duration::from);
    now.map_or(0, |uptime| u64::try_from(uptime.as_micros()).unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reaper::Reaper;

    #[test]
    fn a_machine_that_was_restored_has_no_identity_until_it_adopts_one() {
        let storage = Storage::default();
        let containers = Containers::new(Reaper::default(), storage.clone());
        let service = GuestService::new(containers, storage, Instant::now(), Arc::default());
        assert!(!service.0.has_identity(), "a fresh machine");
        service.0.adopted_at.store(0, Ordering::Relaxed);
        assert!(service.0.has_identity());
        service.forget_identity();
        assert!(!service.0.has_identity(), "a clone");
        service.0.adopted_at.store(1, Ordering::Relaxed);
        assert!(service.0.has_identity());
    }
}
