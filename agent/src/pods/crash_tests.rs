//! flintd killed at every commit of its journal and at random instants, while a pod begins, runs, ends and is forgotten.
//!
//! A world of scripted sandboxes outlives each flintd; a disk in memory keeps what was written. A kill freezes both: no write
//! and no call of the killed flintd has any effect from that moment on. The next one gets the same disk and the same world,
//! and the client goes on as a client does that had no answer: it asks for the same again.

use std::{
    io,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use tokio::sync::watch;

use super::{crash_world::World, *};
use crate::store::Store;

/// A flintd's life, until it is killed.
#[derive(Clone, Debug)]
pub(super) struct Life(Arc<watch::Sender<bool>>);

impl Life {
    fn new() -> Self {
        Self(Arc::new(watch::Sender::new(false)))
    }

    fn kill(&self) {
        self.0.send_replace(true);
    }

    pub(super) fn is_over(&self) -> bool {
        *self.0.borrow()
    }

    async fn over(&self) {
        // The sender is this very value.
        let _ = self.0.subscribe().wait_for(|over| *over).await;
    }

    /// Never comes back to one who is dead.
    pub(super) async fn gate(&self) {
        if self.is_over() {
            std::future::pending::<()>().await;
        }
    }
}

/// What the disk holds; a kill of the process loses nothing that was written.
type Image = Arc<Mutex<Vec<u8>>>;

/// Kills its flintd at its nth write or sync.
#[derive(Debug)]
struct Disk {
    image: Image,
    life: Life,
    done: Arc<AtomicUsize>,
    most: usize,
}

impl Disk {
    fn operation(&self) -> io::Result<()> {
        if self.done.fetch_add(1, Ordering::SeqCst) >= self.most {
            // A disk may take its time: whatever does not wait for it goes on before the kill.
            if !self.life.is_over() {
                std::thread::sleep(Duration::from_millis(5));
            }
            self.life.kill();
        }
        if self.life.is_over() {
            return Err(io::Error::other("flintd was killed"));
        }
        Ok(())
    }
}

impl redb::StorageBackend for Disk {
    fn len(&self) -> Result<u64, io::Error> {
        Ok(self.image.lock().unwrap().len() as u64)
    }
    fn read(&self, offset: u64, out: &mut [u8]) -> Result<(), io::Error> {
        let image = self.image.lock().unwrap();
        let start = usize::try_from(offset).unwrap();
        let bytes = image.get(start..start + out.len());
        out.copy_from_slice(bytes.ok_or_else(|| io::Error::other("beyond the end"))?);
        Ok(())
    }
    fn set_len(&self, len: u64) -> Result<(), io::Error> {
        self.operation()?;
        self.image.lock().unwrap().resize(usize::try_from(len).unwrap(), 0);
        Ok(())
    }
    fn sync_data(&self) -> Result<(), io::Error> {
        self.operation()
    }
    fn write(&self, offset: u64, data: &[u8]) -> Result<(), io::Error> {
        self.operation()?;
        let start = usize::try_from(offset).unwrap();
        self.image.lock().unwrap()[start..start + data.len()].copy_from_slice(data);
        Ok(())
    }
}

/// How the pod is to end.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Course {
    ByItself,
    Terminated,
    /// It is paused, goes on and ends by itself.
    Paused,
    /// It is forked, and all end by themselves.
    Forked,
}

impl Course {
    fn pods(self) -> &'static [&'static str] {
        match self {
            Self::Forked => &["u", "fork-1", "fork-2"],
            Self::ByItself | Self::Terminated | Self::Paused => &["u"],
        }
    }
}

/// What the client has had an answer to.
#[derive(Debug, Default)]
struct Client {
    paused: bool,
    resuming: bool,
    end: Option<host::pod_status::Phase>,
    forgotten: bool,
}

impl Client {
    /// Everything from the first wish to the last, as far as it is not done yet.
    async fn drive(&mut self, world: &World, pods: &Pods, course: Course) -> Result<(), PodError> {
        if self.end.is_none() {
            pods.apply(meta(), spec(), host::PodMaterials::default(), false).await?;
            let running = until(pods, |status| has_ended_as(status).is_some() || runs(status));
            running.await;
            match course {
                Course::Paused if !self.pause(world, pods).await? => return Ok(()),
                Course::Paused => {}
                Course::ByItself => world.finish(),
                Course::Forked => fork(world, pods).await?,
                Course::Terminated => pods.terminate("u", Some(Duration::from_secs(5))).await?,
            }
            let mut ends = Vec::new();
            for uid in course.pods() {
                until_of(pods, uid, |status| has_ended_as(status).is_some()).await;
                ends.push(has_ended_as(&pods.get(uid)?.status.unwrap()));
            }
            assert!(ends.iter().all(|end| *end == ends[0]), "{ends:?}: {world:?}");
            self.end = ends[0];
        }
        for uid in course.pods() {
            self.forget(pods, uid).await?;
        }
        self.forgotten = true;
        Ok(())
    }

    /// Pauses the pod, and is gone; the next time it finds it paused, and has it go on and end.
    async fn pause(&mut self, world: &World, pods: &Pods) -> Result<bool, PodError> {
        if !self.paused {
            pods.pause("u").await?;
            self.paused = true;
            assert!(world.all_stand_still(), "a pod is said to be paused and runs");
            return Ok(false);
        }
        if !self.resuming {
            until(pods, |status| status.paused_at.is_some()).await;
            assert!(world.all_stand_still(), "a paused pod goes on by itself");
        }
        self.resuming = true;
        // What its program does in the pause is seen after it.
        world.finish();
        match pods.resume("u").await {
            // It went on, and the answer was lost.
            Ok(_) | Err(PodError::NotUp(_)) => Ok(true),
            Err(error) => Err(error),
        }
    }

    async fn forget(&self, pods: &Pods, uid: &str) -> Result<(), PodError> {
        match pods.forget(uid).await {
            // The earlier call was done, and its answer lost.
            Ok(()) | Err(PodError::NotFound(_)) => Ok(()),
            Err(error) => Err(error),
        }
    }
}

/// Makes its forks, and has all come to their ends when they run.
async fn fork(world: &World, pods: &Pods) -> Result<(), PodError> {
    let forks = ["fork-1", "fork-2"].map(|name| host::PodMeta {
        uid: name.into(),
        name: name.into(),
        ..meta()
    });
    for pod in pods.fork("u", forks.to_vec(), false).await? {
        let uid = pod.meta.unwrap_or_default().uid;
        until_of(pods, &uid, |status| has_ended_as(status).is_some() || runs(status)).await;
    }
    world.finish();
    Ok(())
}

fn runs(status: &host::PodStatus) -> bool {
    matches!(
        status.containers[0].state,
        Some(host::container_status::State::Running(_))
    )
}

fn has_ended_as(status: &host::PodStatus) -> Option<host::pod_status::Phase> {
    use host::pod_status::Phase;
    Some(status.phase()).filter(|phase| matches!(phase, Phase::Succeeded | Phase::Failed))
}

async fn until(pods: &Pods, condition: impl Fn(&host::PodStatus) -> bool) {
    until_of(pods, "u", condition).await;
}

async fn until_of(pods: &Pods, uid: &str, condition: impl Fn(&host::PodStatus) -> bool) {
    let journal = &pods.context.journal;
    let (_, revision) = journal.list();
    let mut watcher = journal.watch(revision).unwrap();
    while !pods
        .get(uid)
        .is_ok_and(|pod| pod.status.as_ref().is_some_and(&condition))
    {
        watcher.next().await.unwrap();
    }
}

fn meta() -> host::PodMeta {
    host::PodMeta {
        uid: "u".into(),
        namespace: "default".into(),
        name: "web".into(),
        generation: 1,
        ..Default::default()
    }
}

fn spec() -> host::PodSpec {
    host::PodSpec {
        containers: vec![host::Container {
            name: "web".into(),
            image: "busybox".into(),
            ..Default::default()
        }],
        restart_policy: host::RestartPolicy::Never.into(),
        ..Default::default()
    }
}

fn context(world: &World, life: &Life, journal: Journal, folder: &std::path::Path) -> Context {
    let amounts = host::Amounts {
        cpu_milli: 2000,
        memory_bytes: 1 << 30,
        scratch_bytes: 0,
        pods: 3,
    };
    Context {
        sandboxes: Arc::new(world.seen_by(life.clone())),
        images: Arc::new(world.seen_by(life.clone())),
        journal,
        logs: Arc::new(Logs::new(folder.join("logs"))),
        metrics: Arc::new(Metrics::new()),
        ledger: Ledger::new(amounts),
        sizing: Sizing {
            overhead_bytes: 64 << 20,
            default_memory_bytes: 256 << 20,
            default_scratch_bytes: 1 << 20,
            host_cpus: 2,
        },
        saved: SavedPods::open(&folder.join("snapshots"), 2).unwrap(),
        host_changed: watch::Sender::new(0),
    }
}

/// One flintd over the disk and the world, killed at an operation of its disk. Says how many there were.
fn live(
    world: &World,
    image: &Image,
    logs: &std::path::Path,
    client: &mut Client,
    course: Course,
    most: usize,
) -> usize {
    let life = Life::new();
    let done = Arc::new(AtomicUsize::new(0));
    let disk = Disk {
        image: image.clone(),
        life: life.clone(),
        done: done.clone(),
        most,
    };
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .unwrap();
    // A flintd that is killed while it opens its state never was.
    if let Ok(store) = Store::with_backend(disk)
        && let Ok(loaded) = store.load()
    {
        let (journal, thread) = Journal::start(store, &loaded).unwrap();
        runtime.block_on(async {
            let driven = async {
                let pods = Pods::start(Arc::new(context(world, &life, journal, logs)), loaded).await;
                match client.drive(world, &pods, course).await {
                    // What is refused because of the kill counts as not answered.
                    Err(PodError::Store(_)) => life.over().await,
                    other => other.unwrap(),
                }
            };
            tokio::select! {
                biased;
                () = life.over() => {}
                driven = tokio::time::timeout(Duration::from_secs(30), driven) => driven.expect("no flintd hangs"),
            }
        });
        life.kill();
        runtime.shutdown_timeout(Duration::from_secs(10));
        thread.join().unwrap();
    }
    done.load(Ordering::SeqCst)
}

/// A whole story with kills at these operations of the successive flintds; the last one is left alone.
fn story(course: Course, kills: &[usize]) -> usize {
    let outer = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .unwrap();
    let world = World::new(outer.handle().clone());
    let (image, folder, mut client) = (Image::default(), tempfile::tempdir().unwrap(), Client::default());
    // The file is made whole, or under another name; see `store`.
    let first = Disk {
        image: image.clone(),
        life: Life::new(),
        done: Arc::default(),
        most: usize::MAX,
    };
    drop(Store::with_backend(first).unwrap());
    let mut operations = 0;
    // Who pauses the pod leaves it to the next one.
    let last: &[usize] = match course {
        Course::Paused => &[usize::MAX, usize::MAX],
        Course::ByItself | Course::Terminated | Course::Forked => &[usize::MAX],
    };
    for most in kills.iter().chain(last).copied() {
        operations = operations.max(live(&world, &image, folder.path(), &mut client, course, most));
    }
    assert!(client.forgotten, "{kills:?}: {client:?}");
    let phase = match course {
        Course::ByItself | Course::Paused | Course::Forked => host::pod_status::Phase::Succeeded,
        Course::Terminated => host::pod_status::Phase::Failed,
    };
    assert_eq!(client.end, Some(phase), "{kills:?}: {world:?}");
    world.assert_clean(&format!("{course:?} killed at {kills:?}"), course.pods().len());
    let saved: Vec<_> = std::fs::read_dir(folder.path().join("snapshots"))
        .unwrap()
        .flatten()
        .collect();
    assert!(saved.is_empty(), "{kills:?}: snapshots that nobody sees: {saved:?}");
    let logs: Vec<_> = std::fs::read_dir(folder.path().join("logs"))
        .map_or_else(|_| Vec::new(), |entries| entries.flatten().collect());
    assert!(logs.is_empty(), "{kills:?}: logs of a forgotten pod: {logs:?}");
    operations
}

fn at_every_operation(course: Course) {
    let operations = story(course, &[]);
    assert!(operations > 20, "{operations}");
    for kill in 0..operations {
        story(course, &[kill]);
    }
}

#[test]
fn a_pod_that_ends_by_itself_does_so_once_wherever_flintd_is_killed() {
    at_every_operation(Course::ByItself);
}

#[test]
fn a_pod_that_was_paused_is_found_so_and_goes_on_when_asked_wherever_flintd_is_killed() {
    at_every_operation(Course::Paused);
}

#[test]
fn all_forks_of_a_pod_or_none_begin_once_wherever_flintd_is_killed() {
    at_every_operation(Course::Forked);
}

#[test]
fn a_pod_that_is_terminated_ends_wherever_flintd_is_killed() {
    at_every_operation(Course::Terminated);
}

#[test]
fn a_pod_survives_flintds_that_are_killed_one_after_the_other() {
    let seed = fastrand::u64(..);
    println!("seed {seed}");
    let mut random = fastrand::Rng::with_seed(seed);
    for _ in 0..20 {
        let kills: Vec<_> = (0..random.usize(2..6)).map(|_| random.usize(..60)).collect();
        story(Course::ByItself, &kills);
    }
}
