//! Pods that begin as another one was: made of a snapshot, or forked from a pod that runs.
//!
//! ```text
//!   from a snapshot   snapshot ------------------------> record(from = its name) --> actor: sandbox of its files
//!   fork              parent --saved once--> unlisted --> N records, committed together --> N actors, the same way
//! ```
//!
//! The snapshot is held by each pod that is still to be made of it; the last one to let an unlisted one go removes it. A
//! flintd that is killed before the records are there leaves an unlisted snapshot that the next one removes.

use std::{collections::HashSet, time::SystemTime};

use flint_api::host;

use super::{ContainerRecord, PodError, PodRecord, Pods, admission::Size, timestamp, validate, validate::Violation};
use crate::{
    saved::{Held, SavedRecord},
    store::Change,
    timeline::Timeline,
};

/// Most forks of one call.
const MOST: usize = 64;

impl Pods {
    /// Makes a pod of a snapshot; one that is known already is changed as any other. Without a spec it has the saved one.
    pub async fn apply_from(
        &self,
        snapshot: &str,
        meta: host::PodMeta,
        spec: Option<host::PodSpec>,
        draining: bool,
    ) -> Result<host::Pod, PodError> {
        let timeline = Timeline::new();
        let _turn = self.turn.lock().await;
        if let Some(known) = self.context.journal.get(&meta.uid) {
            let spec = spec.or_else(|| known.spec.clone()).unwrap_or_default();
            check(&meta, &spec)?;
            return self.update(&known, meta, spec).await;
        }
        let held = self.context.saved.hold(snapshot)?;
        let record = forked(held.record(), snapshot, meta, spec)?;
        let mut made = self.make(vec![record], &timeline, draining).await?;
        drop(held);
        // As many come out as go in.
        made.pop().ok_or_else(|| PodError::NotFound(snapshot.to_owned()))
    }

    /// Makes pods of one that runs. All or none. To be driven to its end whether somebody waits for the answer or not.
    pub async fn fork(&self, uid: &str, forks: Vec<host::PodMeta>, draining: bool) -> Result<Vec<host::Pod>, PodError> {
        if !(1..=MOST).contains(&forks.len()) {
            let asked = forks.len();
            return Err(PodError::ForkCount { asked, most: MOST });
        }
        let timeline = Timeline::new();
        let parent = self.get(uid)?;
        {
            let _turn = self.turn.lock().await;
            if let Some(made) = self.made_before(&forks) {
                return Ok(made);
            }
            self.check_room(&parent, &forks, draining).await?;
        }
        let stage = timeline.begin("parent.save");
        let snapshot = self.save_as(uid, self.context.saved.begin_unlisted()?).await?;
        stage.end();
        // It goes with whoever releases it last.
        let held = self.context.saved.hold(&snapshot.name)?;
        let made = self.fork_of(&held, &snapshot.name, forks, &timeline, draining).await;
        if matches!(made, Err(PodError::Store(_))) {
            // A disk that failed may have the records all the same: the next flintd finds out.
            return made;
        }
        // Files of gigabytes take a while to go. It fails only with the runtime.
        let _ = tokio::task::spawn_blocking(move || held.release()).await;
        made
    }

    async fn fork_of(
        &self,
        held: &Held,
        snapshot: &str,
        forks: Vec<host::PodMeta>,
        timeline: &Timeline,
        draining: bool,
    ) -> Result<Vec<host::Pod>, PodError> {
        let records = forks
            .into_iter()
            .map(|meta| forked(held.record(), snapshot, meta, None));
        let records = records.collect::<Result<_, _>>()?;
        let _turn = self.turn.lock().await;
        self.make(records, timeline, draining).await
    }

    /// The pods of a call that is made again because its answer was lost.
    fn made_before(&self, forks: &[host::PodMeta]) -> Option<Vec<host::Pod>> {
        let same = |meta: &host::PodMeta| {
            let pod = self.get(&meta.uid).ok()?;
            let known = pod.meta.as_ref()?;
            (known.namespace == meta.namespace && known.name == meta.name).then_some(pod)
        };
        forks.iter().map(same).collect()
    }

    /// Looks, before the parent stands still for it, whether its forks would be taken.
    async fn check_room(&self, parent: &host::Pod, forks: &[host::PodMeta], draining: bool) -> Result<(), PodError> {
        let spec = parent.spec.clone().unwrap_or_default();
        for meta in forks {
            check(meta, &spec)?;
        }
        self.check_free(forks, draining).await?;
        let size = self.context.sizing.of(&spec);
        let room = forks.iter().map(|meta| (meta.uid.as_str(), size)).collect();
        Room::take(self, room).map(drop)
    }

    /// Whether pods of these names can be made now.
    async fn check_free(&self, metas: &[host::PodMeta], draining: bool) -> Result<(), PodError> {
        if draining {
            return Err(PodError::Draining);
        }
        self.ready().await.map_err(PodError::NotReady)?;
        let (pods, _) = self.context.journal.list();
        let known = pods.iter().filter_map(|pod| pod.meta.as_ref());
        let (mut uids, mut names): (HashSet<_>, HashSet<_>) = known
            .map(|meta| (meta.uid.as_str(), (&meta.namespace, &meta.name)))
            .unzip();
        for meta in metas {
            if !uids.insert(meta.uid.as_str()) {
                return Err(PodError::Taken(meta.uid.clone()));
            }
            if !names.insert((&meta.namespace, &meta.name)) {
                return Err(PodError::Taken(format!("{}/{}", meta.namespace, meta.name)));
            }
        }
        Ok(())
    }

    /// Accepts all records, or none, and begins with their pods. The caller has the turn.
    async fn make(
        &self,
        records: Vec<PodRecord>,
        timeline: &Timeline,
        draining: bool,
    ) -> Result<Vec<host::Pod>, PodError> {
        let metas: Vec<_> = records.iter().map(meta_of).collect();
        self.check_free(&metas, draining).await?;
        let sizes = metas.iter().zip(&records);
        let sizes = sizes.map(|(meta, record)| (meta.uid.as_str(), self.size_of(record)));
        let room = Room::take(self, sizes.collect())?;
        let put =
            |(meta, record): (&host::PodMeta, &PodRecord)| Change::Put(meta.uid.clone(), Box::new(record.clone()));
        let changes = metas.iter().zip(&records).map(put).collect();
        self.context
            .journal
            .commit_all(changes)
            .await
            .map_err(PodError::Store)?;
        room.keep();
        timeline.mark("api.accepted");
        self.context.metrics.pods_accepted.inc_by(metas.len() as u64);
        self.context.changed();
        for (meta, record) in metas.iter().zip(records) {
            self.spawn(&meta.uid, record, host::PodMaterials::default(), timeline.branch());
        }
        metas.iter().map(|meta| self.get(&meta.uid)).collect()
    }

    /// What a pod takes: what its spec says, and no less memory than the saved machine that it is made of has.
    pub(super) fn size_of(&self, record: &PodRecord) -> Size {
        let spec = record.pod.as_ref().and_then(|pod| pod.spec.clone());
        let size = self.context.sizing.of(&spec.unwrap_or_default());
        Size {
            memory_bytes: size.memory_bytes.max(record.saved_memory_bytes),
            ..size
        }
    }
}

/// Room in the ledger that is given back unless it is kept.
struct Room<'a> {
    pods: &'a Pods,
    taken: Vec<String>,
}

impl<'a> Room<'a> {
    fn take(pods: &'a Pods, wanted: Vec<(&str, Size)>) -> Result<Self, PodError> {
        let mut room = Self {
            pods,
            taken: Vec::new(),
        };
        for (uid, size) in wanted {
            pods.context.ledger.take(uid, size)?;
            room.taken.push(uid.to_owned());
        }
        Ok(room)
    }

    fn keep(mut self) {
        self.taken.clear();
    }
}

impl Drop for Room<'_> {
    fn drop(&mut self) {
        for uid in &self.taken {
            self.pods.context.ledger.release(uid);
        }
    }
}

fn meta_of(record: &PodRecord) -> host::PodMeta {
    record.pod.as_ref().and_then(|pod| pod.meta.clone()).unwrap_or_default()
}

fn check(meta: &host::PodMeta, spec: &host::PodSpec) -> Result<(), PodError> {
    let violations = validate::pod(meta, spec);
    if violations.is_empty() {
        Ok(())
    } else {
        Err(PodError::Invalid(violations))
    }
}

/// A record for a pod that begins as the saved one was.
fn forked(
    saved: &SavedRecord,
    snapshot: &str,
    meta: host::PodMeta,
    spec: Option<host::PodSpec>,
) -> Result<PodRecord, PodError> {
    let of = saved.pod.clone().unwrap_or_default();
    let pod = of.pod.unwrap_or_default();
    let known = pod.spec.unwrap_or_default();
    let spec = spec.unwrap_or_else(|| known.clone());
    check(&meta, &spec)?;
    let same = host::PodSpec {
        termination_grace_period: spec.termination_grace_period,
        ..known
    };
    if same != spec {
        return Err(PodError::Invalid(vec![Violation {
            field: "spec".into(),
            description: "is not that of the snapshot, whose programs run already: leave it out, or give the saved one"
                .into(),
            unsupported: false,
        }]));
    }
    let status = pod.status.unwrap_or_default();
    let status = host::PodStatus {
        phase: host::pod_status::Phase::Pending.into(),
        created_at: Some(timestamp(SystemTime::now())),
        observed_generation: meta.generation,
        containers: status.containers.into_iter().map(not_yet).collect(),
        ..host::PodStatus::default()
    };
    let machine = saved.machine.as_ref().map_or(0, |machine| machine.memory_bytes);
    Ok(PodRecord {
        pod: Some(host::Pod {
            meta: Some(meta),
            spec: Some(spec),
            status: Some(status),
            revision: 0,
        }),
        containers: of
            .containers
            .into_iter()
            .map(|container| ContainerRecord {
                failures: 0,
                ..container
            })
            .collect(),
        from: snapshot.to_owned(),
        saved_memory_bytes: machine.saturating_add(saved.plugged_bytes),
        ..PodRecord::default()
    })
}

/// A container as it is until the sandbox is there: what has ended has, and the rest waits.
fn not_yet(container: host::ContainerStatus) -> host::ContainerStatus {
    use host::container_status::State;
    let state = match container.state {
        Some(State::Terminated(terminated)) => State::Terminated(terminated),
        _ => State::Waiting(host::Waiting {
            reason: "ContainerCreating".into(),
            message: String::new(),
        }),
    };
    host::ContainerStatus {
        state: Some(state),
        restart_count: 0,
        last_termination: None,
        ready: false,
        ..container
    }
}
