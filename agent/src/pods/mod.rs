//! Pods: what each one is, what it takes, and the task that brings it there.
//!
//! [`machine`] is the state machine, [`actor`] the task that performs it, [`journal`] the way of every change to the store
//! and to watchers; [`validate`] and [`admission`] decide what comes in; [`fork`] makes pods of others.

mod actor;
pub mod admission;
pub mod attached;
mod backoff;
mod container;
mod environment;
mod error;
mod event;
mod fork;
pub mod journal;
pub mod machine;
mod materials;
mod output;
mod process;
mod record;
mod retry;
mod run;
mod steps;
pub mod validate;

use std::{
    collections::{HashMap, HashSet},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, SystemTime},
};

use flint_api::host;
use tokio::sync::{oneshot, watch};
use tracing::{info, warn};

pub use error::PodError;
pub use record::{ContainerRecord, PodRecord};
pub(crate) use steps::registry as registry_of;

use crate::{
    backend::{Images, Sandbox, Sandboxes},
    logs::{Logs, Query},
    metrics::Metrics,
    probe::KvmKind,
    saved::{Draft, SavedPods},
    store::{Change, Loaded},
    timeline::Timeline,
};
use actor::{Actor, Ask, Command, Handle, SaveOrder};
use admission::{Ledger, Sizing};
use attached::Attached;
use journal::Journal;
use validate::Violation;

/// Between TERM and KILL, where the pod does not say.
const DEFAULT_GRACE: Duration = Duration::from_secs(30);

/// What all pods share.
pub struct Context {
    /// Makes sandboxes.
    pub sandboxes: Arc<dyn Sandboxes>,
    /// Images of this host.
    pub images: Arc<dyn Images>,
    /// Way of every change.
    pub journal: Journal,
    /// Output.
    pub logs: Arc<Logs>,
    /// Counters.
    pub metrics: Arc<Metrics>,
    /// Room.
    pub ledger: Ledger,
    /// Sizes.
    pub sizing: Sizing,
    /// Snapshots of this host.
    pub saved: SavedPods,
    /// Told when what the host shows of itself changes.
    pub host_changed: watch::Sender<u64>,
}

impl Context {
    pub(crate) fn changed(&self) {
        self.metrics.allocated(self.ledger.allocated());
        self.host_changed.send_modify(|version| *version += 1);
    }
}

/// All pods of this host.
pub struct Pods {
    context: Arc<Context>,
    actors: Mutex<HashMap<String, Handle>>,
    /// One at a time: applying and forgetting decide by what is known and change it.
    turn: tokio::sync::Mutex<()>,
    /// Why no sandbox could be made when it was last looked at.
    trouble: Mutex<Option<String>>,
}

/// A running container, for streams.
pub struct RunningContainer {
    /// Where it runs.
    pub sandbox: Arc<dyn Sandbox>,
    /// What the guest calls it.
    pub guest_id: String,
    /// Which run it is.
    pub run: u32,
    /// Its output.
    pub output: Attached,
    /// As the pod asked for it.
    pub spec: host::Container,
}

impl Pods {
    /// Takes over the pods of an earlier flintd, and ends sandboxes that belong to none.
    pub async fn start(context: Arc<Context>, loaded: Loaded) -> Arc<Self> {
        let known: HashSet<_> = loaded
            .pods
            .iter()
            .filter(|record| !record.ended)
            .map(|r| r.sandbox_id.clone())
            .collect();
        if let Err(error) = context.sandboxes.end_unknown(&known).await {
            warn!(%error, "ending sandboxes that belong to no pod failed");
        }
        let pods = Self {
            context,
            actors: Mutex::default(),
            turn: tokio::sync::Mutex::default(),
            trouble: Mutex::default(),
        };
        // For the log: whoever wants a pod is told by its answer.
        let _ = pods.ready().await;
        for record in loaded.pods.into_iter().filter(|record| !record.ended) {
            let Some(pod) = &record.pod else { continue };
            let meta = pod.meta.clone().unwrap_or_default();
            pods.context.ledger.retake(&meta.uid, pods.size_of(&record));
            let status = pod.status.clone().unwrap_or_default();
            let age = status
                .created_at
                .map(|at| SystemTime::now().duration_since(system_time(at)));
            info!(uid = meta.uid, sandbox = record.sandbox_id, "going on with a pod");
            // A clock that was set back: better from now than in the future.
            let timeline = Timeline::resume(status.timeline, age.and_then(Result::ok).unwrap_or_default());
            pods.spawn(&meta.uid, record, host::PodMaterials::default(), timeline);
        }
        // Whoever still needs a snapshot holds it by now.
        let saved = pods.context.saved.clone();
        if let Err(error) = tokio::task::spawn_blocking(move || saved.remove_orphans()).await {
            warn!(%error, "removing snapshots that nobody needs failed");
        }
        Arc::new(pods)
    }

    /// Whether a sandbox could be made now; an error says what is missing and what to do. Told to the log and to those who watch
    /// the host when it changes.
    pub async fn ready(&self) -> Result<KvmKind, String> {
        let ready = self.context.sandboxes.ready().await.map_err(|error| error.to_string());
        let trouble = ready.as_ref().err().cloned();
        let before = {
            // Replaced as a whole, so a panic elsewhere leaves it consistent.
            let mut known = self.trouble.lock().unwrap_or_else(PoisonError::into_inner);
            std::mem::replace(&mut *known, trouble.clone())
        };
        if before != trouble {
            match trouble {
                Some(error) => warn!(error, "no pod can be started"),
                None => info!("pods can be started again"),
            }
            self.context.changed();
        }
        ready
    }

    fn actors(&self) -> MutexGuard<'_, HashMap<String, Handle>> {
        // Every change under the lock is one infallible step.
        self.actors.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn spawn(&self, uid: &str, record: PodRecord, materials: host::PodMaterials, timeline: Timeline) {
        let (actor, handle) = Actor::new(self.context.clone(), record, materials, timeline);
        self.actors().insert(uid.to_owned(), handle);
        tokio::spawn(actor.run());
    }

    /// Creates a pod, or changes it to a newer generation.
    pub async fn apply(
        &self,
        meta: host::PodMeta,
        spec: host::PodSpec,
        materials: host::PodMaterials,
        draining: bool,
    ) -> Result<host::Pod, PodError> {
        let timeline = Timeline::new();
        let mut violations = validate::pod(&meta, &spec);
        violations.extend(validate::materials(&materials));
        if !violations.is_empty() {
            return Err(PodError::Invalid(violations));
        }
        let _turn = self.turn.lock().await;
        if let Some(known) = self.context.journal.get(&meta.uid) {
            let updated = self.update(&known, meta, spec).await?;
            self.bring(&known, materials).await?;
            return Ok(updated);
        }
        if draining {
            return Err(PodError::Draining);
        }
        self.ready().await.map_err(PodError::NotReady)?;
        let uid = meta.uid.clone();
        self.context.ledger.take(&uid, self.context.sizing.of(&spec))?;
        let record = actor::new_record(meta, spec);
        if let Err(error) = self
            .context
            .journal
            .commit(Change::Put(uid.clone(), Box::new(record.clone())))
            .await
        {
            self.context.ledger.release(&uid);
            return Err(PodError::Store(error));
        }
        timeline.mark("api.accepted");
        self.context.metrics.pods_accepted.inc();
        self.context.changed();
        self.spawn(&uid, record, materials, timeline);
        self.get(&uid)
    }

    /// Replaces a pod's materials; answers with their version.
    pub async fn update_materials(&self, uid: &str, materials: host::PodMaterials) -> Result<u64, PodError> {
        let violations = validate::materials(&materials);
        if !violations.is_empty() {
            return Err(PodError::Invalid(violations));
        }
        let not_up = || PodError::NotUp(uid.to_owned());
        if has_ended(&self.get(uid)?) {
            return Err(not_up());
        }
        let actor = self.actors().get(uid).cloned().ok_or_else(not_up)?;
        let (reply, answer) = oneshot::channel();
        actor.send(Command::Materials(Box::new(materials), reply)).await;
        // A task that has ended meanwhile has dropped the order.
        answer.await.map_err(|_| not_up())?
    }

    /// Materials that come with a pod that is known: an earlier flintd's may have lost them before it had a sandbox. Older ones, and those
    /// of a pod that has ended, are for nobody.
    async fn bring(&self, known: &host::Pod, materials: host::PodMaterials) -> Result<(), PodError> {
        if !materials::has_objects(&materials) {
            return Ok(());
        }
        let uid = known.meta.clone().unwrap_or_default().uid;
        match self.update_materials(&uid, materials).await {
            Ok(_) | Err(PodError::StaleMaterials { .. } | PodError::NotUp(_)) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// What can change while a pod runs: what it is called by, and how long its end may take.
    async fn update(&self, known: &host::Pod, meta: host::PodMeta, spec: host::PodSpec) -> Result<host::Pod, PodError> {
        let of = known.meta.clone().unwrap_or_default();
        if meta.generation < of.generation {
            return Err(PodError::Stale {
                uid: meta.uid,
                given: meta.generation,
                known: of.generation,
            });
        }
        if meta.generation == of.generation {
            return Ok(known.clone());
        }
        let before = known.spec.clone().unwrap_or_default();
        let changed = unchangeable(&of, &before, &meta, &spec);
        if !changed.is_empty() {
            return Err(PodError::Invalid(changed));
        }
        let uid = meta.uid.clone();
        let mut now = known.clone();
        now.meta = Some(meta.clone());
        now.spec = Some(spec.clone());
        if let Some(status) = &mut now.status {
            status.observed_generation = meta.generation;
        }
        let actor = self.actors().get(&uid).cloned();
        if let Some(actor) = actor {
            actor.send(Command::Update(Box::new((meta, spec)))).await;
        }
        Ok(now)
    }

    /// Begins a pod's end.
    pub async fn terminate(&self, uid: &str, grace: Option<Duration>) -> Result<(), PodError> {
        let pod = self.get(uid)?;
        let of_pod = pod.spec.unwrap_or_default().termination_grace_period;
        let grace = grace.or_else(|| of_pod.map(duration)).unwrap_or(DEFAULT_GRACE);
        let actor = self.actors().get(uid).cloned();
        if let Some(actor) = actor {
            actor.send(Command::Terminate(grace)).await;
        }
        Ok(())
    }

    /// Has a pod stand still.
    pub async fn pause(&self, uid: &str) -> Result<host::Pod, PodError> {
        self.ask(uid, Ask::Pause).await
    }

    /// Has a pod go on.
    pub async fn resume(&self, uid: &str) -> Result<host::Pod, PodError> {
        self.ask(uid, Ask::Resume).await
    }

    /// Saves a pod under a name; an empty one is chosen.
    pub async fn save(&self, uid: &str, name: &str) -> Result<host::Snapshot, PodError> {
        let pod = self.get(uid)?;
        if has_ended(&pod) {
            return Err(PodError::NotUp(uid.to_owned()));
        }
        let draft = self.context.saved.begin(name, &pod.meta.unwrap_or_default().name)?;
        self.save_as(uid, draft).await
    }

    async fn save_as(&self, uid: &str, draft: Draft) -> Result<host::Snapshot, PodError> {
        let not_up = || PodError::NotUp(uid.to_owned());
        let actor = self.actors().get(uid).cloned().ok_or_else(not_up)?;
        if has_ended(&self.get(uid)?) {
            return Err(not_up());
        }
        let (reply, answer) = oneshot::channel();
        actor.send(Command::Save(Box::new(SaveOrder { draft, reply }))).await;
        // A task that has ended meanwhile has dropped the order.
        answer.await.map_err(|_| not_up())?
    }

    /// Has a pod's task do something, and answers with the pod after it.
    async fn ask(&self, uid: &str, ask: Ask) -> Result<host::Pod, PodError> {
        let not_up = || PodError::NotUp(uid.to_owned());
        if has_ended(&self.get(uid)?) {
            return Err(not_up());
        }
        let actor = self.actors().get(uid).cloned().ok_or_else(not_up)?;
        let (reply, answer) = oneshot::channel();
        actor.send(Command::Ask(ask, reply)).await;
        // A task that has ended meanwhile has dropped the question.
        answer.await.map_err(|_| not_up())??;
        self.get(uid)
    }

    /// Ends all pods and waits until they have ended.
    pub async fn terminate_all(&self, wait: bool) {
        let watcher = self.context.journal.watch(0);
        let (pods, _) = self.context.journal.list();
        let mut left: HashSet<String> = pods
            .iter()
            .filter(|pod| !has_ended(pod))
            .map(|pod| pod.meta.clone().unwrap_or_default().uid)
            .collect();
        for uid in &left {
            // One that is forgotten meanwhile has ended.
            let _ = self.terminate(uid, None).await;
        }
        let Ok(mut watcher) = watcher else { return };
        while wait && !left.is_empty() {
            let Ok(events) = watcher.next().await else { return };
            for pod in events
                .iter()
                .filter_map(|event| event.pod.as_ref())
                .filter(|pod| has_ended(pod))
            {
                left.remove(&pod.meta.clone().unwrap_or_default().uid);
            }
        }
    }

    /// Drops an ended pod's record and logs.
    pub async fn forget(&self, uid: &str) -> Result<(), PodError> {
        let _turn = self.turn.lock().await;
        if !has_ended(&self.get(uid)?) {
            return Err(PodError::NotEnded(uid.to_owned()));
        }
        let removed = self.context.logs.forget(uid).await;
        removed.map_err(|source| PodError::Logs {
            uid: uid.to_owned(),
            source,
        })?;
        self.context
            .journal
            .commit(Change::Remove(uid.to_owned()))
            .await
            .map_err(PodError::Store)?;
        self.actors().remove(uid);
        Ok(())
    }

    /// A pod as it is.
    pub fn get(&self, uid: &str) -> Result<host::Pod, PodError> {
        let pod = self
            .context
            .journal
            .get(uid)
            .ok_or_else(|| PodError::NotFound(uid.to_owned()))?;
        Ok((*pod).clone())
    }

    /// What all pods share.
    pub fn context(&self) -> &Context {
        &self.context
    }

    /// Digests of images that pods and snapshots need.
    pub fn images_in_use(&self) -> HashSet<String> {
        let (pods, _) = self.context.journal.list();
        let statuses = pods
            .iter()
            .filter(|pod| !has_ended(pod))
            .filter_map(|pod| pod.status.as_ref());
        statuses
            .flat_map(|status| &status.containers)
            .map(|container| container.image_digest.clone())
            .chain(self.context.saved.images())
            .collect()
    }

    /// A container by name; the name may be empty for a pod that has only one.
    fn container(&self, uid: &str, name: &str) -> Result<(usize, host::Container), PodError> {
        let mut containers = self.get(uid)?.spec.unwrap_or_default().containers;
        let index = match name {
            "" if containers.len() == 1 => Some(0),
            name => containers.iter().position(|container| container.name == name),
        };
        match index {
            Some(index) => Ok((index, containers.swap_remove(index))),
            None => {
                let known: Vec<_> = containers.into_iter().map(|container| container.name).collect();
                Err(PodError::NoContainer {
                    uid: uid.into(),
                    container: name.into(),
                    known: known.join(", "),
                })
            }
        }
    }

    /// A container that runs.
    pub fn running(&self, uid: &str, name: &str) -> Result<RunningContainer, PodError> {
        let (index, spec) = self.container(uid, name)?;
        let not_running = || PodError::NotRunning {
            uid: uid.into(),
            container: spec.name.clone(),
        };
        let actor = self.actors().get(uid).cloned().ok_or_else(not_running)?;
        let live = actor.live();
        if live.paused {
            return Err(PodError::Paused(uid.into()));
        }
        let Some((run, true, output)) = live.containers.get(index) else {
            return Err(not_running());
        };
        let sandbox = live.sandbox.clone().ok_or_else(not_running)?;
        Ok(RunningContainer {
            sandbox,
            guest_id: run::guest_id(&spec.name, *run),
            run: *run,
            output: output.clone(),
            spec,
        })
    }

    /// The name of a container, and what of its log to read.
    pub fn log(&self, request: &host::LogsRequest) -> Result<(String, Query), PodError> {
        let (index, container) = self.container(&request.uid, &request.container)?;
        let run = self.present_run(&request.uid, index, &container.name);
        let run = if request.previous {
            let previous = run.and_then(|run| run.checked_sub(1));
            Some(previous.ok_or_else(|| PodError::NoPrevious(container.name.clone()))?)
        } else {
            run
        };
        let query = Query {
            run,
            follow: request.follow && !request.previous,
            tail: request.tail_lines,
            since: request.since.map(system_time),
            limit_bytes: request.limit_bytes,
        };
        Ok((container.name, query))
    }

    /// The youngest run that has a log.
    fn present_run(&self, uid: &str, index: usize, name: &str) -> Option<u32> {
        let live = self
            .actors()
            .get(uid)
            .map(|actor| actor.live().containers.get(index).map_or(0, |live| live.0));
        match live {
            Some(run) if self.context.logs.folder(uid, name, run).exists() => Some(run),
            // Between two runs, or ended under an earlier flintd.
            Some(run) if run > 0 => Some(run - 1),
            Some(_) => None,
            None => self.context.logs.youngest(uid, name),
        }
    }
}

/// Fields that differ and cannot change while the pod runs.
fn unchangeable(
    of: &host::PodMeta,
    before: &host::PodSpec,
    meta: &host::PodMeta,
    spec: &host::PodSpec,
) -> Vec<Violation> {
    let mut allowed = before.clone();
    allowed.termination_grace_period = spec.termination_grace_period;
    let differs = [
        ("meta.namespace", of.namespace != meta.namespace),
        ("meta.name", of.name != meta.name),
        ("spec", allowed != *spec),
    ];
    let wrong = differs
        .into_iter()
        .filter(|(_, differs)| *differs)
        .map(|(field, _)| Violation {
            field: field.into(),
            description: "cannot change while the pod is known, but for labels, annotations and the grace period: \
                      terminate it and apply it under another uid"
                .into(),
            unsupported: false,
        });
    wrong.collect()
}

fn has_ended(pod: &host::Pod) -> bool {
    use host::pod_status::Phase;
    pod.status
        .as_ref()
        .is_some_and(|status| matches!(status.phase(), Phase::Succeeded | Phase::Failed))
}

/// A moment as protobuf has it; moments before 1970 are 1970.
pub(crate) fn timestamp(at: SystemTime) -> prost_types::Timestamp {
    let since = at.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    prost_types::Timestamp {
        seconds: i64::try_from(since.as_secs()).unwrap_or(i64::MAX),
        // Below one billion by definition, so it fits.
        nanos: i32::try_from(since.subsec_nanos()).unwrap_or(0),
    }
}

/// The moment that a protobuf timestamp names; what is out of range becomes 1970.
pub(crate) fn system_time(at: prost_types::Timestamp) -> SystemTime {
    let seconds = u64::try_from(at.seconds).unwrap_or(0);
    let nanos = u32::try_from(at.nanos)
        .ok()
        .filter(|nanos| *nanos < 1_000_000_000)
        .unwrap_or(0);
    SystemTime::UNIX_EPOCH
        .checked_add(Duration::new(seconds, nanos))
        .unwrap_or(SystemTime::UNIX_EPOCH)
}

/// A protobuf duration; a negative one is none at all, an endless one a century.
pub(crate) fn duration(of: prost_types::Duration) -> Duration {
    const CENTURY: Duration = Duration::from_secs(100 * 366 * 86_400);
    Duration::try_from(of).unwrap_or_default().min(CENTURY)
}

#[cfg(test)]
mod crash_tests;
#[cfg(test)]
mod crash_world;
