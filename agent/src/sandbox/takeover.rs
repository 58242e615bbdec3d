//! What an earlier flintd left: its sandboxes that still run are connected, the others are cleaned up.
//!
//! A sandbox's folder with its intent is the proof that it may exist; its VMM's answer on the control socket is the proof that
//! it does. What has neither is ended.

use std::{
    collections::{HashMap, HashSet},
    net::Ipv4Addr,
    path::Path,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use flint_api::vmm::{ExitReason, state::Phase};

use super::{
    ChunkServer, Exited, Inner, Sandbox, SandboxError, TakenOver, blocking,
    control::Control,
    guest::connect_lazily,
    intent::{self, Folder, Intent},
    manager::spec_error,
    pages,
    supervisor::{Attached, End, Held, from_status, supervise},
    uids::Uids,
};
use crate::{
    cgroup::Cgroups,
    chain,
    network::{Lease, Network, NetworkError, Survivor},
    process::Process,
};

/// How long a VMM of an earlier flintd may take to answer. One that is saving its guest's memory answers when it is done.
const TAKE_OVER_TIMEOUT: Duration = Duration::from_secs(60);

/// What a folder of an earlier flintd stands for.
#[derive(Debug)]
enum Found {
    Running(Sandbox),
    Ending(End),
}

/// The sandboxes of an earlier flintd that nobody has claimed yet.
#[derive(Debug, Default)]
pub(super) struct Unclaimed(Mutex<HashMap<String, Found>>);

/// Where what is taken over belongs.
pub(super) struct Home<'a> {
    pub cgroups: &'a Cgroups,
    pub network: &'a Arc<Network>,
    pub uids: &'a Uids,
    pub chunks: Option<&'a ChunkServer>,
}

impl Unclaimed {
    /// Connects to every sandbox that still runs, and begins to clean the others up.
    pub(super) async fn take_over(all: Vec<Left>, leases: Vec<Lease>, home: Home<'_>) -> Self {
        let mut leases: HashMap<_, _> = leases.into_iter().map(|lease| (lease.address(), lease)).collect();
        let mut probes = tokio::task::JoinSet::new();
        for left in all {
            let lease = left.address().and_then(|address| leases.remove(&address));
            let has_network = left.address().is_none() || lease.is_some();
            let held = Held {
                cgroup: home.cgroups.of(left.cgroup()),
                lease,
                network: Arc::clone(home.network),
                uid: left.intent.as_ref().ok().map(|intent| home.uids.reserve(intent.uid)),
                folder: left.folder,
                pages: None,
            };
            let intent = left.intent.and_then(|intent| match intent.address {
                Some(address) if !has_network => Err(NetworkError::Taken(address).into()),
                _ => Ok(intent),
            });
            probes.spawn(take_over_one(left.id, held, intent, home.chunks.cloned()));
        }
        let mut found = HashMap::new();
        while let Some(probe) = probes.join_next().await {
            // A probe does not panic and is not aborted.
            found.extend(probe.ok());
        }
        Self(Mutex::new(found))
    }

    /// Hands a sandbox out. If it has ended, waits until it is cleaned up.
    pub(super) async fn claim(&self, id: &str) -> Result<TakenOver, SandboxError> {
        let found = self
            .lock()
            .remove(id)
            .ok_or_else(|| SandboxError::Unknown(id.to_owned()))?;
        Ok(match found {
            Found::Running(sandbox) => TakenOver::Running(sandbox),
            Found::Ending(end) => TakenOver::Ended(end.wait().await),
        })
    }

    /// Ends every sandbox that is not among `known` and was not handed out, and waits until nothing of them is left.
    pub(super) async fn end_unknown(&self, known: &HashSet<String>) {
        let unknown: Vec<_> = self.lock().extract_if(|id, _| !known.contains(id)).collect();
        for (_, found) in &unknown {
            if let Found::Running(sandbox) = found {
                sandbox.kill();
            }
        }
        for (id, found) in unknown {
            let exited = match found {
                Found::Running(sandbox) => sandbox.wait().await,
                Found::Ending(end) => end.wait().await,
            };
            tracing::info!(sandbox = id, ?exited, "ended a sandbox that no pod claims");
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, Found>> {
        // Every change under the lock is one infallible step.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Ends what runs in cgroups that no folder accounts for.
pub(super) async fn end_strays(cgroups: &Cgroups, with_cgroup: &[String], left: &[Left]) {
    let known: HashSet<_> = left.iter().map(Left::cgroup).collect();
    let strays = with_cgroup.iter().filter(|id| !known.contains(id.as_str()));
    for id in strays.filter(|id| !pages::is_cgroup(id)) {
        let cgroup = cgroups.of(id);
        if let Err(error) = blocking(move || cgroup.destroy()).await.and_then(|ended| Ok(ended?)) {
            tracing::error!(
                sandbox = id,
                error = chain(&error),
                "a cgroup without a sandbox cannot be removed"
            );
        }
    }
}

/// Takes one sandbox over, or begins to clean it up.
async fn take_over_one(
    id: String,
    held: Held,
    intent: Result<Intent, SandboxError>,
    chunks: Option<ChunkServer>,
) -> (String, Found) {
    let folder = held.folder.clone();
    let alive = match intent {
        Ok(intent) => reconnect_in_time(&held, &intent, chunks.as_ref())
            .await
            .map(|alive| (intent, alive)),
        Err(error) => {
            let error = chain(&error);
            tracing::error!(sandbox = id, error, "a sandbox that cannot be taken over is ended");
            Err(stopped(format!("flintd could not take it over: {error}")))
        }
    };
    let (end, attach) = supervise(held);
    // The supervisor waits for the answer, and ends with the runtime only.
    let found = match alive {
        Ok((intent, (control, attached))) => {
            let _ = attach.send(Ok(attached));
            let guest = connect_lazily(folder.path("vsock.sock"));
            Found::Running(Sandbox(Arc::new(Inner {
                id: intent.id,
                address: intent.address,
                images: intent.images,
                control,
                guest,
                end,
                lesson: Mutex::default(),
            })))
        }
        Err(why) => {
            let _ = attach.send(Err(why));
            Found::Ending(end)
        }
    };
    (id, found)
}

async fn reconnect_in_time(
    held: &Held,
    intent: &Intent,
    chunks: Option<&ChunkServer>,
) -> Result<(Control, Attached), Exited> {
    let late = |_| Exited {
        reason: ExitReason::VmmError,
        detail: format!("the VMM did not answer within {TAKE_OVER_TIMEOUT:?} when flintd came back"),
    };
    tokio::time::timeout(TAKE_OVER_TIMEOUT, reconnect(held, intent, chunks))
        .await
        .map_err(late)?
}

/// Connects to a VMM of an earlier flintd. An error says why the sandbox is to end, unless its VMM has said why it ended.
async fn reconnect(held: &Held, intent: &Intent, chunks: Option<&ChunkServer>) -> Result<(Control, Attached), Exited> {
    if !is_complete(&held.folder) {
        return Err(stopped("flintd ended before the sandbox's start was complete"));
    }
    let gone = || from_status(None);
    let (control, events) = Control::connect(&held.folder.path("control.sock")).map_err(|_| gone())?;
    let (state, pid) = control.hello().await.map_err(|_| gone())?;
    let process = Process::open(pid).map_err(|_| gone())?;
    // The id could have passed to another process since the packet; a process in the sandbox's cgroup is the VMM.
    let ours = held.cgroup.contains(pid).unwrap_or(false);
    let runs = matches!(state.phase(), Phase::Running | Phase::Paused);
    if ours && runs {
        // Its guest may be waiting for a chunk.
        if let (Some(chunks), Some(machine)) = (chunks, &state.machine) {
            chunks.take_over(&control, machine, &intent.images).await;
        }
        Ok((control, Attached { events, process }))
    } else {
        Err(gone())
    }
}

/// Whether the sandbox's start was complete.
fn is_complete(folder: &Folder) -> bool {
    folder.path("ready").exists()
}

fn stopped(detail: impl Into<String>) -> Exited {
    Exited {
        reason: ExitReason::Stopped,
        detail: detail.into(),
    }
}

/// What an earlier flintd left of a sandbox.
#[derive(Debug)]
pub(super) struct Left {
    id: String,
    folder: Folder,
    intent: Result<Intent, SandboxError>,
}

impl Left {
    pub(super) fn address(&self) -> Option<Ipv4Addr> {
        self.intent.as_ref().ok()?.address
    }

    /// Name of its cgroup.
    fn cgroup(&self) -> &str {
        self.intent.as_ref().map_or(&self.id, Intent::cgroup)
    }

    /// Its address, and whether it may send: one whose start is not complete may be a clone without an identity of its own.
    pub(super) fn survivor(&self) -> Option<Survivor> {
        Some(Survivor {
            address: self.address()?,
            may_send: is_complete(&self.folder),
        })
    }
}

/// All folders with what their intents say. Those without an intent held nothing yet, and are removed.
pub(super) fn read_intents(sandboxes: &Path) -> Result<Vec<Left>, SandboxError> {
    let mut left = Vec::new();
    for id in intent::list(sandboxes)? {
        let folder = Folder::of(sandboxes, &id);
        let intent = match folder.intent() {
            Ok(None) => {
                folder.remove()?;
                continue;
            }
            Ok(Some(intent)) if !intent.may_be_in(&id) => {
                Err(spec_error(&id, "its folder has the intent of another sandbox"))
            }
            Ok(Some(intent)) => Ok(intent),
            Err(error) => Err(error),
        };
        left.push(Left { id, folder, intent });
    }
    Ok(left)
}
