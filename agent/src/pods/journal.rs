//! Every change of a pod goes through here: first to the store, then to those who watch.
//!
//! ```text
//!   actors --changes--> [ writer thread: one commit for all that waits ] --> pods by uid, history --> watchers
//! ```
//!
//! A watcher holds no queue: it reads the bounded history from its own revision on. One that is too slow finds its place
//! gone and is told to list again; it cannot make flintd grow.

use std::{
    collections::{HashMap, VecDeque},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread,
};

use flint_api::host;
use tokio::sync::{mpsc, oneshot, watch};
use tracing::error;

use super::PodRecord;
use crate::store::{Change, HostState, Loaded, Store};

/// Events kept for watchers.
const HISTORY: usize = if cfg!(test) { 32 } else { 4096 };
/// Changes in one commit.
const BATCH: usize = 256;

/// The revision asked for is no longer, or not yet, in the history.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OutOfRange {
    /// The oldest revision that a watch can begin after.
    pub oldest: u64,
    /// The present revision.
    pub newest: u64,
}

/// Handle to the journal.
#[derive(Clone, Debug)]
pub struct Journal {
    changes: mpsc::Sender<Entry>,
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Entry {
    /// Together or not at all. None: only to know that all earlier ones are written.
    changes: Vec<Change>,
    done: Option<oneshot::Sender<Result<u64, String>>>,
}

#[derive(Debug)]
struct Shared {
    view: Mutex<View>,
    revision: watch::Sender<u64>,
}

#[derive(Debug, Default)]
struct View {
    pods: HashMap<String, Arc<host::Pod>>,
    events: VecDeque<Arc<host::PodEvent>>,
    /// The revision before the first event of the history.
    oldest: u64,
    revision: u64,
}

impl Journal {
    /// Takes the store over. The writer thread ends when the last handle is dropped and everything is written.
    pub fn start(store: Store, loaded: &Loaded) -> std::io::Result<(Self, thread::JoinHandle<()>)> {
        let pods = loaded
            .pods
            .iter()
            .filter_map(|record| record.pod.clone())
            .map(|pod| (uid(&pod), Arc::new(pod)));
        let view = View {
            pods: pods.collect(),
            events: VecDeque::new(),
            oldest: loaded.revision,
            revision: loaded.revision,
        };
        let shared = Arc::new(Shared {
            view: Mutex::new(view),
            revision: watch::Sender::new(loaded.revision),
        });
        let (changes, queue) = mpsc::channel(1024);
        let writer = Writer {
            store,
            shared: shared.clone(),
            unwritten: Vec::new(),
            revision: loaded.revision,
        };
        let thread = thread::Builder::new()
            .name("journal".into())
            .spawn(move || writer.run(queue))?;
        Ok((Self { changes, shared }, thread))
    }

    /// Records a change and answers with its revision when it is durable.
    pub async fn commit(&self, change: Change) -> Result<u64, String> {
        self.commit_all(vec![change]).await
    }

    /// Records changes, all of them or none, and answers when they are durable.
    pub async fn commit_all(&self, changes: Vec<Change>) -> Result<u64, String> {
        let (done, answer) = oneshot::channel();
        let entry = Entry {
            changes,
            done: Some(done),
        };
        self.changes
            .send(entry)
            .await
            .map_err(|_| "the journal has ended".to_owned())?;
        answer.await.unwrap_or_else(|_| Err("the journal has ended".into()))
    }

    /// Records a change without waiting for the disk. Changes of one pod stay in order; of several that wait, the last
    /// stands for all.
    pub async fn record(&self, record: PodRecord) {
        let Some(uid) = record.pod.as_ref().map(uid) else {
            return;
        };
        let entry = Entry {
            changes: vec![Change::Put(uid, Box::new(record))],
            done: None,
        };
        // The receiver ends only with the process.
        let _ = self.changes.send(entry).await;
    }

    /// Waits until everything recorded before is durable. A disk that does not take it holds nobody up: the record is kept,
    /// the failure is in the log, and pods must be able to end on a full disk.
    pub async fn flush(&self) {
        let (done, answer) = oneshot::channel();
        let entry = Entry {
            changes: Vec::new(),
            done: Some(done),
        };
        if self.changes.send(entry).await.is_ok() {
            let _ = answer.await;
        }
    }

    /// A pod.
    pub fn get(&self, uid: &str) -> Option<Arc<host::Pod>> {
        self.shared.view().pods.get(uid).cloned()
    }

    /// All pods, and the revision to watch from.
    pub fn list(&self) -> (Vec<Arc<host::Pod>>, u64) {
        let view = self.shared.view();
        (view.pods.values().cloned().collect(), view.revision)
    }

    /// Changes after a revision; 0 means from now on.
    pub fn watch(&self, from: u64) -> Result<Watcher, OutOfRange> {
        let view = self.shared.view();
        let at = if from == 0 { view.revision } else { from };
        view.check(at)?;
        Ok(Watcher {
            shared: self.shared.clone(),
            news: self.shared.revision.subscribe(),
            at,
        })
    }
}

impl Shared {
    fn view(&self) -> MutexGuard<'_, View> {
        // A panic elsewhere leaves the view consistent: every change to it is a few infallible moves.
        self.view.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl View {
    fn check(&self, at: u64) -> Result<(), OutOfRange> {
        if at < self.oldest || at > self.revision {
            return Err(OutOfRange {
                oldest: self.oldest,
                newest: self.revision,
            });
        }
        Ok(())
    }

    fn publish(&mut self, event: host::PodEvent) {
        self.revision = event.revision;
        self.events.push_back(Arc::new(event));
        if self.events.len() > HISTORY
            && let Some(first) = self.events.pop_front()
        {
            self.oldest = first.revision;
        }
    }
}

/// Reads the history from a revision on.
#[derive(Debug)]
pub struct Watcher {
    shared: Arc<Shared>,
    news: watch::Receiver<u64>,
    at: u64,
}

impl Watcher {
    /// The revision up to which everything was read.
    pub fn at(&self) -> u64 {
        self.at
    }

    /// Waits for the next changes; never empty.
    pub async fn next(&mut self) -> Result<Vec<Arc<host::PodEvent>>, OutOfRange> {
        loop {
            self.news.borrow_and_update();
            {
                let view = self.shared.view();
                view.check(self.at)?;
                let events: Vec<_> = view
                    .events
                    .iter()
                    .filter(|event| event.revision > self.at)
                    .take(BATCH)
                    .cloned()
                    .collect();
                if let Some(last) = events.last() {
                    self.at = last.revision;
                    return Ok(events);
                }
            }
            // The sender lives in what `self.shared` points to.
            let _ = self.news.changed().await;
        }
    }
}

/// The only one who writes.
struct Writer {
    store: Store,
    shared: Arc<Shared>,
    /// Changes that a failing disk did not take; they go with the next commit.
    unwritten: Vec<Change>,
    revision: u64,
}

impl Writer {
    fn run(mut self, mut queue: mpsc::Receiver<Entry>) {
        while let Some(first) = queue.blocking_recv() {
            let mut batch = vec![first];
            while batch.len() < BATCH
                && let Ok(entry) = queue.try_recv()
            {
                batch.push(entry);
            }
            self.commit(batch);
        }
    }

    fn commit(&mut self, batch: Vec<Entry>) {
        let mut changes = std::mem::take(&mut self.unwritten);
        let mut waiting = Vec::new();
        for entry in batch {
            for change in entry.changes {
                supersede(&mut changes, &change);
                changes.push(change);
            }
            waiting.extend(entry.done);
        }
        if changes.is_empty() {
            for done in waiting {
                let _ = done.send(Ok(self.revision));
            }
            return;
        }
        let mut revision = self.revision;
        for change in &mut changes {
            if !matches!(change, Change::Host(_)) {
                revision += 1;
            }
            if let Change::Put(_, record) = change
                && let Some(pod) = &mut record.pod
            {
                pod.revision = revision;
            }
        }
        match self.store.commit(&changes, revision) {
            Ok(()) => {
                self.publish(changes);
                for done in waiting {
                    // Whoever does not wait any more needs no answer.
                    let _ = done.send(Ok(self.revision));
                }
            }
            Err(failure) => {
                error!("{failure}");
                // What somebody waits for is refused; what just happened is kept for the next commit.
                changes.retain(
                    |change| matches!(change, Change::Put(uid, _) if self.shared.view().pods.contains_key(uid)),
                );
                self.unwritten = changes;
                for done in waiting {
                    let _ = done.send(Err(failure.to_string()));
                }
            }
        }
    }

    fn publish(&mut self, changes: Vec<Change>) {
        let mut view = self.shared.view();
        for change in changes {
            let (kind, pod) = match change {
                Change::Put(uid, record) => {
                    let Some(pod) = record.pod else { continue };
                    let kind = match view.pods.insert(uid, Arc::new(pod.clone())) {
                        Some(_) => host::pod_event::Type::Modified,
                        None => host::pod_event::Type::Added,
                    };
                    (kind, Some(pod))
                }
                Change::Remove(uid) => {
                    let pod = view.pods.remove(&uid).map(Arc::unwrap_or_clone);
                    (host::pod_event::Type::Removed, pod)
                }
                Change::Host(HostState { .. }) => continue,
            };
            self.revision += 1;
            view.publish(host::PodEvent {
                r#type: kind.into(),
                pod,
                revision: self.revision,
            });
        }
        drop(view);
        self.shared.revision.send_replace(self.revision);
    }
}

/// Drops what a newer change of the same thing makes pointless.
fn supersede(changes: &mut Vec<Change>, newer: &Change) {
    changes.retain(|older| match (older, newer) {
        (Change::Put(older, _), Change::Put(newer, _) | Change::Remove(newer)) => older != newer,
        (Change::Host(_), Change::Host(_)) => false,
        _ => true,
    });
}

fn uid(pod: &host::Pod) -> String {
    pod.meta.as_ref().map(|meta| meta.uid.clone()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(uid: &str, reason: &str) -> PodRecord {
        let meta = host::PodMeta {
            uid: uid.into(),
            ..Default::default()
        };
        let status = host::PodStatus {
            reason: reason.into(),
            ..Default::default()
        };
        let pod = host::Pod {
            meta: Some(meta),
            status: Some(status),
            ..Default::default()
        };
        PodRecord {
            pod: Some(pod),
            ..Default::default()
        }
    }

    fn put(uid: &str, reason: &str) -> Change {
        Change::Put(uid.into(), Box::new(record(uid, reason)))
    }

    fn journal(folder: &tempfile::TempDir) -> (Journal, thread::JoinHandle<()>) {
        let path = folder.path().join("state.redb");
        let opened = Store::open(&path).unwrap();
        let loaded = opened.load().unwrap();
        Journal::start(opened, &loaded).unwrap()
    }

    #[tokio::test]
    async fn a_watcher_sees_added_modified_removed_in_order_with_growing_revisions() {
        let folder = tempfile::tempdir().unwrap();
        let (journal, _thread) = journal(&folder);
        let mut watcher = journal.watch(0).unwrap();
        for change in [put("a", "x"), put("a", "y"), Change::Remove("a".into())] {
            journal.commit(change).await.unwrap();
        }
        let mut seen = Vec::new();
        while seen.len() < 3 {
            seen.extend(watcher.next().await.unwrap());
        }
        let types: Vec<_> = seen.iter().map(|event| event.r#type()).collect();
        use host::pod_event::Type;
        assert_eq!(types, [Type::Added, Type::Modified, Type::Removed]);
        assert_eq!(seen.iter().map(|event| event.revision).collect::<Vec<_>>(), [1, 2, 3]);
        assert_eq!(seen[1].pod.as_ref().unwrap().revision, 2);
    }

    #[tokio::test]
    async fn a_watch_from_a_forgotten_or_future_revision_is_out_of_range() {
        let folder = tempfile::tempdir().unwrap();
        let (journal, _thread) = journal(&folder);
        let mut slow = journal.watch(0).unwrap();
        let mut newest = 0;
        for count in 0..HISTORY + 2 {
            newest = journal.commit(put("a", &count.to_string())).await.unwrap();
        }
        assert_eq!(journal.watch(1).unwrap_err(), OutOfRange { oldest: 2, newest });
        assert_eq!(journal.watch(newest + 1).unwrap_err().newest, newest);
        assert!(journal.watch(newest).is_ok());
        assert!(slow.next().await.is_err());
    }

    #[tokio::test]
    async fn revisions_go_on_over_a_restart_and_older_ones_are_out_of_range() {
        let folder = tempfile::tempdir().unwrap();
        let (first, thread) = journal(&folder);
        first.commit(put("a", "x")).await.unwrap();
        let last = first.commit(put("a", "y")).await.unwrap();
        drop(first);
        thread.join().unwrap();
        let (reopened, _thread) = journal(&folder);
        assert_eq!(reopened.list().1, last);
        assert_eq!(reopened.watch(last - 1).unwrap_err().oldest, last);
        assert!(reopened.watch(last).is_ok());
        assert_eq!(reopened.commit(put("a", "z")).await.unwrap(), last + 1);
    }
}
