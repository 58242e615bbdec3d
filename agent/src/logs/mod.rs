//! Containers' output in files: `<state>/logs/<pod uid>/<container>/<run>/`, in the format that Kubernetes' tools read.
//!
//! Readers that follow are told by the writers, in memory: no polling.

mod cri;
mod reader;
mod tail;
mod writer;

use std::{
    collections::HashMap,
    fs, io,
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard, PoisonError},
    time::SystemTime,
};

use flint_api::host::LogBatch;
use tokio::{
    sync::{mpsc, watch},
    task::spawn_blocking,
};

pub(crate) use cri::parse_rfc3339;
pub use reader::RunReader;
pub use writer::RunWriter;

/// All containers' logs.
#[derive(Debug)]
pub struct Logs {
    root: PathBuf,
    containers: Mutex<HashMap<(String, String), watch::Sender<Progress>>>,
}

/// How far a container's log is, for those who follow it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Progress {
    run: Option<u32>,
    writes: u64,
}

/// What of a container's log to read.
#[derive(Clone, Copy, Debug, Default)]
pub struct Query {
    /// The run to begin with; none began yet if absent.
    pub run: Option<u32>,
    /// Go on until the container has ended for good.
    pub follow: bool,
    /// Only the last lines.
    pub tail: Option<u64>,
    /// Only what is not older.
    pub since: Option<SystemTime>,
    /// Stop after so many bytes; 0: no limit.
    pub limit_bytes: u64,
}

impl Logs {
    /// Logs below a folder.
    pub fn new(root: PathBuf) -> Self {
        Self {
            root,
            containers: Mutex::default(),
        }
    }

    fn containers(&self) -> MutexGuard<'_, HashMap<(String, String), watch::Sender<Progress>>> {
        // Every change under the lock is one infallible step.
        self.containers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The folder of one run. The names were validated with the pod.
    pub fn folder(&self, uid: &str, container: &str, run: u32) -> PathBuf {
        self.root.join(uid).join(container).join(run.to_string())
    }

    /// The youngest run that has a log.
    pub fn youngest(&self, uid: &str, container: &str) -> Option<u32> {
        let entries = fs::read_dir(self.root.join(uid).join(container)).ok()?;
        entries
            .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
            .max()
    }

    /// A container will have output: followers may wait for it.
    pub fn expect(&self, uid: &str, container: &str) {
        self.containers().entry((uid.into(), container.into())).or_default();
    }

    /// A run begins. Of the runs before it the last one is kept.
    pub fn begin(&self, uid: &str, container: &str, run: u32) -> io::Result<RunWriter> {
        let folder = self.folder(uid, container, run);
        let writer = RunWriter::open(&folder)?;
        if let Some(container_folder) = folder.parent() {
            remove_before(container_folder, run.saturating_sub(1))?;
        }
        self.containers()
            .entry((uid.into(), container.into()))
            .or_default()
            .send_modify(|progress| progress.run = Some(run));
        Ok(writer)
    }

    /// How far into a run's output its log is; 0 if it has none.
    pub fn offset(&self, uid: &str, container: &str, run: u32) -> io::Result<u64> {
        writer::offset(&self.folder(uid, container, run))
    }

    /// The log of a run that began elsewhere: it begins at this place of the run's output. One that has begun stays as it is.
    pub fn begin_at(&self, uid: &str, container: &str, run: u32, offset: u64) -> io::Result<()> {
        RunWriter::open(&self.folder(uid, container, run))?.begin_at(offset)
    }

    /// Something was written.
    pub fn wrote(&self, uid: &str, container: &str) {
        if let Some(progress) = self.containers().get(&(uid.into(), container.into())) {
            progress.send_modify(|progress| progress.writes += 1);
        }
    }

    /// The pod has ended: followers come to the end.
    pub fn ended(&self, uid: &str) {
        self.containers().retain(|(of, _), _| of != uid);
    }

    /// Removes a pod's logs.
    pub async fn forget(&self, uid: &str) -> io::Result<()> {
        self.ended(uid);
        match tokio::fs::remove_dir_all(self.root.join(uid)).await {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }

    /// Reads a log into `out`, until its end or until nobody listens.
    pub async fn read(&self, uid: &str, container: &str, query: Query, out: mpsc::Sender<io::Result<LogBatch>>) {
        // Subscribed before the first read, so that nothing falls in between. No sender: the container has ended.
        let news = self
            .containers()
            .get(&(uid.into(), container.into()))
            .map(watch::Sender::subscribe);
        let reading = Reading {
            logs: self,
            uid,
            container,
            query,
            news: news.filter(|_| query.follow),
            out: &out,
        };
        if let Err(error) = reading.run().await {
            // The listener may have gone meanwhile.
            let _ = out.send(Err(error)).await;
        }
    }
}

/// One reader's work.
struct Reading<'a> {
    logs: &'a Logs,
    uid: &'a str,
    container: &'a str,
    query: Query,
    news: Option<watch::Receiver<Progress>>,
    out: &'a mpsc::Sender<io::Result<LogBatch>>,
}

impl Reading<'_> {
    async fn run(mut self) -> io::Result<()> {
        let mut left = match self.query.limit_bytes {
            0 => u64::MAX,
            limit => limit,
        };
        let mut run = self.query.run;
        let mut reader = match run {
            Some(run) => Some(self.open(run, self.query.tail).await?),
            None => None,
        };
        loop {
            // Looked at before the read: what is written after it wakes us again.
            let newest = self.news.as_mut().map(|news| news.borrow_and_update().run);
            let mut batch = LogBatch::default();
            if let Some(idle) = reader.take() {
                let (used, read) = in_background(move || {
                    let mut idle = idle;
                    idle.batch().map(|batch| (idle, batch))
                })
                .await?;
                (reader, batch) = (Some(used), read);
            }
            if !batch.entries.is_empty() {
                if !self.send(batch, &mut left).await {
                    return Ok(());
                }
                continue;
            }
            // All of this run is read; runs follow one another without a gap.
            if let Some(Some(newest)) = newest
                && run.is_none_or(|run| run < newest)
            {
                let next = run.map_or(newest, |run| run + 1);
                run = Some(next);
                reader = Some(self.open(next, None).await?);
                continue;
            }
            let Some(news) = &mut self.news else { return Ok(()) };
            tokio::select! {
                changed = news.changed() => if changed.is_err() {
                    // Ended for good; what was written before that is still to be read.
                    self.news = None;
                },
                () = self.out.closed() => return Ok(()),
            }
        }
    }

    async fn open(&self, run: u32, tail: Option<u64>) -> io::Result<RunReader> {
        let folder = self.logs.folder(self.uid, self.container, run);
        let since = self.query.since;
        in_background(move || RunReader::open(&folder, tail, since)).await
    }

    /// Sends what fits within the limit; false when that is all.
    async fn send(&self, mut batch: LogBatch, left: &mut u64) -> bool {
        let mut fitting = 0;
        for entry in &mut batch.entries {
            entry.line.truncate(usize::try_from(*left).unwrap_or(usize::MAX));
            *left -= entry.line.len() as u64;
            fitting += 1;
            if *left == 0 {
                break;
            }
        }
        batch.entries.truncate(fitting);
        self.out.send(Ok(batch)).await.is_ok() && *left > 0
    }
}

async fn in_background<T: Send + 'static>(work: impl FnOnce() -> io::Result<T> + Send + 'static) -> io::Result<T> {
    spawn_blocking(work).await.map_err(io::Error::other)?
}

/// Removes the folders of runs before `first`.
fn remove_before(folder: &Path, first: u32) -> io::Result<()> {
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let run = entry.file_name().to_str().and_then(|name| name.parse::<u32>().ok());
        if run.is_some_and(|run| run < first) {
            fs::remove_dir_all(entry.path())?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use flint_api::host::OutputStream;

    use super::*;

    fn write(logs: &Logs, writer: &mut RunWriter, text: &str) {
        let at = writer.offset();
        writer.append(at, 1, OutputStream::Stdout, text.as_bytes()).unwrap();
        logs.wrote("u", "web");
    }

    fn follow(logs: &Arc<Logs>, query: Query) -> mpsc::Receiver<io::Result<LogBatch>> {
        let (out, batches) = mpsc::channel(4);
        let logs = logs.clone();
        tokio::spawn(async move { logs.read("u", "web", query, out).await });
        batches
    }

    /// The next batch, joined.
    async fn text(batches: &mut mpsc::Receiver<io::Result<LogBatch>>) -> Option<String> {
        let entries = batches.recv().await?.unwrap().entries;
        let text: Vec<u8> = entries.into_iter().flat_map(|entry| entry.line).collect();
        Some(String::from_utf8(text).unwrap())
    }

    #[tokio::test]
    async fn a_follower_waits_for_the_start_goes_over_restarts_and_ends_with_the_container() {
        let folder = tempfile::tempdir().unwrap();
        let logs = Arc::new(Logs::new(folder.path().into()));
        logs.expect("u", "web");
        let mut batches = follow(
            &logs,
            Query {
                follow: true,
                ..Query::default()
            },
        );
        let mut writer = logs.begin("u", "web", 0).unwrap();
        write(&logs, &mut writer, "first\n");
        assert_eq!(text(&mut batches).await.unwrap(), "first\n");
        write(&logs, &mut writer, "second\n");
        assert_eq!(text(&mut batches).await.unwrap(), "second\n");
        let mut writer = logs.begin("u", "web", 1).unwrap();
        write(&logs, &mut writer, "after the restart\n");
        logs.ended("u");
        assert_eq!(text(&mut batches).await.unwrap(), "after the restart\n");
        assert_eq!(text(&mut batches).await, None);
    }

    #[tokio::test]
    async fn without_follow_a_log_ends_where_it_ends_now_and_at_the_limit() {
        let folder = tempfile::tempdir().unwrap();
        let logs = Arc::new(Logs::new(folder.path().into()));
        let mut writer = logs.begin("u", "web", 0).unwrap();
        write(&logs, &mut writer, "one\ntwo\n");
        let mut batches = follow(
            &logs,
            Query {
                run: Some(0),
                limit_bytes: 6,
                ..Query::default()
            },
        );
        assert_eq!(text(&mut batches).await.unwrap(), "one\ntw");
        assert_eq!(text(&mut batches).await, None);
    }

    #[tokio::test]
    async fn of_earlier_runs_the_last_one_is_kept_and_all_go_with_the_pod() {
        let folder = tempfile::tempdir().unwrap();
        let logs = Logs::new(folder.path().into());
        for run in 0..4 {
            logs.begin("u", "web", run).unwrap();
        }
        let kept = [0, 1, 2, 3].map(|run| logs.folder("u", "web", run).exists());
        assert_eq!(kept, [false, false, true, true]);
        logs.forget("u").await.unwrap();
        assert!(!folder.path().join("u").exists());
        logs.forget("u").await.unwrap();
    }
}
