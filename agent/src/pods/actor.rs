//! One task for each pod: performs what its state machine asks for and feeds back what came of it.
//!
//! [`standstill`] is what it does to have the sandbox pause and go on, [`save`] how it makes a snapshot of it, [`restore`] how it makes
//! one of a snapshot, [`takeover`] how it finds one of an earlier flintd.

mod materials;
mod restore;
mod save;
mod standstill;
mod takeover;

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, SystemTime},
};

use flint_api::{guest, host, vmm::ExitReason};
use tokio::{
    sync::{mpsc, oneshot},
    task::{AbortHandle, JoinSet},
};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::{
    Context, PodError, PodRecord,
    attached::Attached,
    machine::{Action, Event, Life, Machine, StepError, Timer},
    materials::Materials,
    process,
    run::{Run, guest_id, signal},
    steps::{launch, pull, registry},
    timestamp,
};
use crate::{
    backend::{Identity, Sandbox, SandboxError, SandboxExit, SandboxPlan},
    saved::Draft,
    timeline::Timeline,
};

use materials::MaterialsReply;
use restore::Source;
use standstill::Going;

/// Words for an actor that may wait; senders beyond it wait.
const QUEUE: usize = 64;

/// What others may say to a pod's task.
#[derive(Debug)]
pub(super) enum Command {
    /// A newer generation, checked already.
    Update(Box<(host::PodMeta, host::PodSpec)>),
    /// End the pod.
    Terminate(Duration),
    /// Something about its sandbox as a whole.
    Ask(Ask, Reply),
    /// Save it.
    Save(Box<SaveOrder>),
    /// Newer configMaps and secrets, checked already.
    Materials(Box<host::PodMaterials>, MaterialsReply),
}

/// A snapshot that is to be made of the pod.
#[derive(Debug)]
pub(super) struct SaveOrder {
    pub(super) draft: Draft,
    pub(super) reply: oneshot::Sender<Result<host::Snapshot, PodError>>,
}

/// What a sandbox can be asked for.
#[derive(Clone, Copy, Debug)]
pub(super) enum Ask {
    /// To stand still.
    Pause,
    /// To go on.
    Resume,
}

/// Hears whether it was done, once it is.
pub(super) type Reply = oneshot::Sender<Result<(), PodError>>;

/// What the task hears.
enum Input {
    Command(Command),
    Event(Event),
    /// The sandbox is there.
    Sandbox(Arc<dyn Sandbox>),
    /// An earlier flintd's sandbox is there, with these containers in it.
    Found(Arc<dyn Sandbox>, Vec<guest::ContainerStatus>),
    /// An earlier flintd's sandbox is there and stands still.
    FoundPaused(Arc<dyn Sandbox>),
    /// The sandbox stands still, or could not be brought to it.
    Stood(Result<(), SandboxError>, Reply),
    /// The sandbox goes on, or cannot.
    Went(Result<Going, SandboxError>, Option<Reply>),
    /// The timeline grew.
    Refresh,
}

/// What streams need of a pod while it runs.
#[derive(Default)]
pub(super) struct Live {
    pub(super) sandbox: Option<Arc<dyn Sandbox>>,
    /// Whether it stands still.
    pub(super) paused: bool,
    /// By container: its present run, whether that runs, its output.
    pub(super) containers: Vec<(u32, bool, Attached)>,
}

/// A pod's task as others see it.
#[derive(Clone)]
pub(super) struct Handle {
    commands: mpsc::Sender<Input>,
    live: Arc<Mutex<Live>>,
}

impl Handle {
    /// Says something to the pod; a pod that has ended does not listen.
    pub(super) async fn send(&self, command: Command) {
        let _ = self.commands.send(Input::Command(command)).await;
    }

    pub(super) fn live(&self) -> MutexGuard<'_, Live> {
        self.live.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

pub(super) struct Actor {
    context: Arc<Context>,
    record: PodRecord,
    uid: String,
    spec: Arc<host::PodSpec>,
    credentials: HashMap<String, host::RegistryCredentials>,
    materials: Arc<Materials>,
    machine: Machine,
    timeline: Timeline,
    sandbox: Option<Arc<dyn Sandbox>>,
    disks: Vec<String>,
    inputs: mpsc::Receiver<Input>,
    sender: mpsc::Sender<Input>,
    live: Arc<Mutex<Live>>,
    timers: HashMap<Timer, AbortHandle>,
    tasks: JoinSet<()>,
    /// Whoever has the sandbox stand still or go on: one at a time.
    turn: Arc<tokio::sync::Mutex<()>>,
    /// While an earlier flintd's sandbox is being looked for: what was asked of it meanwhile.
    early: Option<Vec<Command>>,
    source: Source,
    /// That no sandbox is to be made any more.
    abandoned: CancellationToken,
}

impl Actor {
    /// The task of a pod, new or loaded.
    pub(super) fn new(
        context: Arc<Context>,
        record: PodRecord,
        mut materials: host::PodMaterials,
        timeline: Timeline,
    ) -> (Self, Handle) {
        let pod = record.pod.clone().unwrap_or_default();
        let spec = Arc::new(pod.spec.unwrap_or_default());
        let (sender, inputs) = mpsc::channel(QUEUE);
        let containers = spec.containers.iter().map(|_| (0, false, Attached::new())).collect();
        let live = Arc::new(Mutex::new(Live {
            containers,
            ..Live::default()
        }));
        let handle = Handle {
            commands: sender.clone(),
            live: live.clone(),
        };
        let machine = record.machine(SystemTime::now());
        let uid = pod.meta.unwrap_or_default().uid;
        let source = Source::of(&context.saved, &record.from);
        for container in &spec.containers {
            context.logs.expect(&uid, &container.name);
        }
        let actor = Self {
            context,
            record,
            uid,
            spec,
            credentials: std::mem::take(&mut materials.registry_credentials),
            materials: Arc::new(Materials::new(materials)),
            machine,
            timeline,
            sandbox: None,
            disks: Vec::new(),
            inputs,
            sender,
            live,
            timers: HashMap::new(),
            tasks: JoinSet::new(),
            turn: Arc::default(),
            early: None,
            source,
            abandoned: CancellationToken::new(),
        };
        (actor, handle)
    }

    /// Runs until the pod has ended.
    pub(super) async fn run(mut self) {
        if self.record.sandbox_id.is_empty() {
            self.handle(Event::Start).await;
        } else {
            self.take_over();
        }
        while self.machine.life() != Life::Ended {
            // Never `None`: the actor has a sender of its own.
            let Some(input) = self.inputs.recv().await else { break };
            self.input(input).await;
            while self.tasks.try_join_next().is_some() {}
        }
        self.context.logs.ended(&self.uid);
        self.context.ledger.release(&self.uid);
        self.context.changed();
        info!(uid = self.uid, phase = ?self.machine.phase(), "pod ended");
    }

    async fn input(&mut self, input: Input) {
        match input {
            Input::Event(event) => {
                if let Event::SandboxGone(exit) = &event {
                    self.note_end(exit);
                    self.sandbox = None;
                    self.record.sandbox_id.clear();
                }
                self.handle(event).await;
                self.answer_early();
            }
            Input::Sandbox(sandbox) => {
                self.hold(&sandbox);
                self.handle(Event::Launched(Ok(sandbox.addresses()))).await;
            }
            Input::Found(sandbox, containers) => {
                self.found(sandbox, &containers).await;
                self.answer_early();
            }
            Input::FoundPaused(sandbox) => {
                self.hold(&sandbox);
                let addresses = sandbox.addresses();
                self.handle(Event::FoundPaused { addresses }).await;
                self.answer_early();
            }
            Input::Stood(result, reply) => self.stood(result, reply).await,
            Input::Went(result, reply) => self.went(result, reply).await,
            Input::Command(command @ (Command::Save(_) | Command::Ask(..) | Command::Materials(..))) => {
                match &mut self.early {
                    Some(early) => early.push(command),
                    None => self.do_with_sandbox(command),
                }
            }
            Input::Command(Command::Terminate(grace)) => {
                self.record.terminate(grace, SystemTime::now());
                self.handle(Event::Terminate(grace)).await;
            }
            Input::Command(Command::Update(update)) => {
                let (meta, spec) = *update;
                self.spec = Arc::new(spec.clone());
                if let Some(pod) = &mut self.record.pod {
                    pod.meta = Some(meta);
                    pod.spec = Some(spec);
                }
                self.publish().await;
                self.refresh_volumes();
            }
            Input::Refresh => self.publish().await,
        }
    }

    /// Says why a sandbox ended that nobody had asked to: the pod's status is gone with the pod, the daemon's log is not.
    fn note_end(&self, exit: &SandboxExit) {
        let (uid, sandbox) = (&self.uid, &self.record.sandbox_id);
        if matches!(exit.reason, ExitReason::Poweroff | ExitReason::Stopped) {
            info!(uid, sandbox, %exit, "sandbox ended");
        } else {
            warn!(uid, sandbox, %exit, "sandbox failed");
        }
    }

    async fn handle(&mut self, event: Event) {
        let actions = self.machine.handle(event, SystemTime::now());
        let (forgetful, others): (Vec<_>, Vec<_>) = actions.into_iter().partition(Action::makes_the_guest_forget);
        for action in others {
            self.perform(action);
        }
        self.publish().await;
        if !forgetful.is_empty() {
            // Killed after the guest has forgotten and before the disk knows, a flintd would leave nobody who does.
            self.context.journal.flush().await;
            for action in forgetful {
                self.perform(action);
            }
        }
    }

    async fn publish(&mut self) {
        let before = self.record.clone();
        self.record.note(&self.machine, self.timeline.stages());
        {
            let mut live = self.live.lock().unwrap_or_else(PoisonError::into_inner);
            live.sandbox.clone_from(&self.sandbox);
            live.paused = self.machine.is_paused();
            for (shown, (run, runs)) in live.containers.iter_mut().zip(self.machine.runs()) {
                (shown.0, shown.1) = (run, runs);
            }
        }
        if self.record != before {
            self.context.journal.record(self.record.clone()).await;
        }
        self.recorded();
    }

    /// Does something beside the actor and feeds the result back.
    fn spawn(&mut self, work: impl Future<Output = Option<Input>> + Send + 'static) -> AbortHandle {
        let sender = self.sender.clone();
        self.tasks.spawn(async move {
            if let Some(input) = work.await {
                // The actor may have ended meanwhile.
                let _ = sender.send(input).await;
            }
        })
    }

    fn perform(&mut self, action: Action) {
        match action {
            Action::Pull(container) => self.pull(container),
            Action::Launch => self.launch(),
            Action::Abandon => self.abandoned.cancel(),
            Action::Run(container, run) => self.run_container(container, run),
            Action::Stop(container) => self.stop(container),
            Action::Kill(container) => {
                if let (Some(sandbox), Some(id)) = (self.sandbox.clone(), self.guest_id(container)) {
                    self.spawn(async move {
                        signal(sandbox, id, 9, true).await;
                        None
                    });
                }
            }
            Action::Shutdown => {
                if let Some(sandbox) = self.sandbox.clone() {
                    self.spawn(async move {
                        // The answer may be lost with the machine.
                        let _ = sandbox.guest().shutdown(guest::ShutdownRequest {}).await;
                        None
                    });
                }
            }
            Action::KillSandbox => {
                if let Some(sandbox) = self.sandbox.clone() {
                    self.spawn(async move {
                        sandbox.kill().await;
                        None
                    });
                }
            }
            Action::Resume => self.resume(None),
            Action::Arm(timer, pause) => {
                let handle = self.spawn(async move {
                    tokio::time::sleep(pause).await;
                    Some(Input::Event(Event::Timer(timer)))
                });
                if let Some(earlier) = self.timers.insert(timer, handle) {
                    earlier.abort();
                }
            }
        }
    }

    fn guest_id(&self, container: usize) -> Option<String> {
        let (run, _) = self.machine.runs().nth(container)?;
        Some(guest_id(&self.spec.containers.get(container)?.name, run))
    }

    fn pull(&mut self, index: usize) {
        let Some(container) = self.spec.containers.get(index).cloned() else {
            return;
        };
        let context = self.context.clone();
        let credentials = self.credentials.get(registry(&container.image)).cloned();
        let timeline = self.timeline.clone();
        self.spawn(async move {
            let stage = timeline.begin("image.pull");
            let result = pull(&context, &container, credentials).await;
            if result.is_ok() {
                stage.end();
            }
            Some(Input::Event(Event::Pulled {
                container: index,
                result,
            }))
        });
    }

    fn launch(&mut self) {
        let digests = self.machine.digests().unwrap_or_default();
        self.disks.clear();
        for digest in digests {
            if !self.disks.iter().any(|known| known == digest) {
                self.disks.push(digest.to_owned());
            }
        }
        let id = match new_sandbox_id() {
            Ok(id) => id,
            Err(error) => {
                let error = StepError::new("FailedCreatePodSandBox", format!("making a sandbox id: {error}"));
                self.spawn(async move { Some(Input::Event(Event::Launched(Err(error)))) });
                return;
            }
        };
        self.record.sandbox_id.clone_from(&id);
        let size = self.context.sizing.of(&self.spec);
        let plan = SandboxPlan {
            id,
            vcpus: size.vcpus,
            memory_bytes: size.memory_bytes,
            images: self.disks.clone(),
            scratch_bytes: size.scratch_bytes,
            identity: self.identity(),
        };
        if self.machine.restoring {
            return self.restore(plan);
        }
        let (context, timeline) = (self.context.clone(), self.timeline.clone());
        let abandoned = self.abandoned.clone();
        self.spawn(async move {
            Some(match launch(&context, plan, &abandoned, timeline).await {
                Ok(sandbox) => Input::Sandbox(sandbox),
                Err(error) => Input::Event(Event::Launched(Err(error))),
            })
        });
    }

    fn identity(&self) -> Identity {
        let name = self
            .record
            .pod
            .as_ref()
            .and_then(|pod| pod.meta.as_ref())
            .map(|meta| meta.name.as_str());
        // A pod's name may have dots and be longer than a host name can be (Kubernetes cuts it, too).
        let hostname = if self.spec.hostname.is_empty() {
            name.unwrap_or_default()
        } else {
            &self.spec.hostname
        };
        let hostname: String = hostname.chars().take(63).collect();
        Identity {
            hostname: hostname.trim_end_matches(['-', '.']).to_owned(),
            dns: self.spec.dns.clone().map(|dns| guest::Dns {
                nameservers: dns.nameservers,
                searches: dns.searches,
                options: dns.options,
            }),
            host_aliases: self
                .spec
                .host_aliases
                .iter()
                .map(|alias| guest::HostAlias {
                    ip: alias.ip.clone(),
                    hostnames: alias.hostnames.clone(),
                })
                .collect(),
            sysctls: self.spec.security_context.clone().unwrap_or_default().sysctls,
        }
    }

    /// Keeps a sandbox, and hears of its end.
    fn hold(&mut self, sandbox: &Arc<dyn Sandbox>) {
        self.sandbox = Some(sandbox.clone());
        let sandbox = sandbox.clone();
        self.spawn(async move { Some(Input::Event(Event::SandboxGone(sandbox.exited().await))) });
    }

    fn the_run(&self, index: usize, run: u32) -> Option<Run> {
        let digest = self.machine.digests()?.get(index).map(|digest| (*digest).to_owned())?;
        let attached = self
            .live
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .containers
            .get(index)?
            .2
            .clone();
        Some(Run {
            context: self.context.clone(),
            sandbox: self.sandbox.clone()?,
            timeline: self.timeline.clone(),
            uid: self.uid.clone(),
            meta: self.meta(),
            spec: self.spec.clone(),
            materials: self.materials.clone(),
            index,
            run,
            digest,
            disks: self.disks.clone(),
            attached,
        })
    }

    fn run_container(&mut self, container: usize, run: u32) {
        let Some(this) = self.the_run(container, run) else {
            return;
        };
        let sender = self.sender.clone();
        self.spawn(async move {
            // What a container does cannot be taken back: nobody may run it again because the disk does not know this sandbox.
            let (created, ()) = tokio::join!(this.create(), this.context.journal.flush());
            if let Err(error) = created {
                return Some(Input::Event(Event::StartFailed { container, run, error }));
            }
            if let Err(exit) = this.start().await {
                return Some(Input::Event(Event::Exited { container, run, exit }));
            }
            this.context.metrics.container_starts.inc();
            let _ = sender.send(Input::Event(Event::Started { container, run })).await;
            follow(&this, sender).await
        });
    }

    fn stop(&mut self, container: usize) {
        let (Some(sandbox), Some(id)) = (self.sandbox.clone(), self.guest_id(container)) else {
            return;
        };
        let digest = self
            .machine
            .digests()
            .and_then(|digests| digests.get(container).map(|digest| (*digest).to_owned()));
        let context = self.context.clone();
        self.spawn(async move {
            let image = match digest {
                Some(digest) => context.images.get(&digest).await.ok().flatten(),
                None => None,
            };
            signal(
                sandbox,
                id,
                process::stop_signal(&image.unwrap_or_default().config),
                false,
            )
            .await;
            None
        });
    }
}

/// A program that says nothing has started after so long.
const SETTLING: Duration = Duration::from_secs(1);

/// Waits for a run's end.
async fn follow(run: &Run, sender: mpsc::Sender<Input>) -> Option<Input> {
    let (timeline, stage) = (
        run.timeline.clone(),
        format!("container.{}.first-output", run.spec.containers[run.index].name),
    );
    let first_run = run.run == 0;
    let (spoke, silence) = oneshot::channel();
    let finish = run.finish(move || {
        // Nobody listens any more to one that was silent for long.
        let _ = spoke.send(());
        if first_run {
            timeline.mark(stage);
            // A full queue will be followed by another publication.
            let _ = sender.try_send(Input::Refresh);
        }
    });
    let settle = async {
        // Until its first words, its end, or long enough.
        let _ = tokio::time::timeout(SETTLING, silence).await;
        run.sandbox.settled().await;
    };
    let (exit, ()) = tokio::join!(finish, settle);
    let exit = exit?;
    Some(Input::Event(Event::Exited {
        container: run.index,
        run: run.run,
        exit,
    }))
}

/// 16 hex digits that no other sandbox of this host has, short enough for a socket's path.
fn new_sandbox_id() -> std::io::Result<String> {
    let uuid = std::fs::read_to_string("/proc/sys/kernel/random/uuid")?;
    Ok(uuid.chars().rev().filter(char::is_ascii_hexdigit).take(16).collect())
}

/// A record for a pod that was just accepted.
pub(super) fn new_record(meta: host::PodMeta, spec: host::PodSpec) -> PodRecord {
    let status = host::PodStatus {
        created_at: Some(timestamp(SystemTime::now())),
        observed_generation: meta.generation,
        ..Machine::new(&spec).status()
    };
    let pod = host::Pod {
        meta: Some(meta),
        spec: Some(spec),
        status: Some(status),
        revision: 0,
    };
    PodRecord {
        pod: Some(pod),
        ..PodRecord::default()
    }
}
