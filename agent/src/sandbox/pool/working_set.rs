//! What the first clones of a template have used of its memory, for those that come later.
//!
//! ```text
//!   templates/KEY/working-set     written by a VMM, which checks it when another one replays it: a digest, the template's id
//! ```
//!
//! It is a hint. A record that is refused is removed with a warning, and the next clone that is claimed makes a new one; no start
//! fails for it. A VMM that writes one gets a file in memory for that, and none of the template's.

use std::{
    fs::{self, File},
    io::{self, Read as _, Seek as _, Write as _},
    os::fd::AsFd as _,
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
};

use flint_api::vmm::{self, request::Command};
use nix::sys::memfd::{MFdFlags, memfd_create};
use thiserror::Error;
use tokio::sync::Notify;

use super::{lock, metrics::PoolMetrics};
use crate::{
    chain,
    sandbox::control::{Control, ControlError},
};

const NAME: &str = "working-set";
/// No VMM writes more.
const MOST: u64 = 1 << 20;

/// No record could be made.
#[derive(Debug, Error)]
enum RecordError {
    /// The VMM cannot say.
    #[error(transparent)]
    Vmm(#[from] ControlError),
    /// It says too much.
    #[error("it has more than {MOST} bytes")]
    Large,
    /// A file.
    #[error("could not {0}")]
    File(&'static str, #[source] io::Error),
}

/// The record of one template.
#[derive(Debug)]
pub(in crate::sandbox) struct WorkingSet {
    path: PathBuf,
    /// Memory that a parked clone may copy ahead.
    copy_bytes: u64,
    /// Open for reading; none: nobody has made one.
    record: Mutex<Option<Arc<File>>>,
    recorded: Notify,
    metrics: PoolMetrics,
}

impl WorkingSet {
    /// That of the template in a folder.
    pub(super) fn open(template: &Path, copy_bytes: u64, metrics: &PoolMetrics) -> Self {
        let path = template.join(NAME);
        // None there is the usual case; one that cannot be opened is made anew, which says why if it cannot.
        let record = File::open(&path).ok().map(Arc::new);
        Self {
            path,
            copy_bytes,
            record: Mutex::new(record),
            recorded: Notify::new(),
            metrics: metrics.clone(),
        }
    }

    /// Whether there is one.
    pub(super) fn is_recorded(&self) -> bool {
        lock(&self.record).is_some()
    }

    /// Waits until somebody has made one.
    pub(super) async fn recorded(&self) {
        self.recorded.notified().await;
    }

    /// Gives a parked clone what others have used; whether there is a record. An error is that the VMM is gone.
    pub(super) async fn replay(&self, control: &Control) -> Result<bool, ControlError> {
        let Some(record) = lock(&self.record).clone() else {
            return Ok(false);
        };
        let copy_bytes = self.copy_bytes;
        let replay = Command::ReplayWorkingSet(vmm::ReplayWorkingSet { copy_bytes });
        let Err(error) = control.command(replay, &[record.as_fd()]).await else {
            self.metrics.replays.inc();
            return Ok(true);
        };
        tracing::warn!(
            path = %self.path.display(),
            error = chain(&error),
            "a working set cannot be used, and is made anew"
        );
        self.forget(&record);
        match error {
            ControlError::Refused { .. } => Ok(false),
            gone => Err(gone),
        }
    }

    fn forget(&self, record: &Arc<File>) {
        let mut kept = lock(&self.record);
        if kept.as_ref().is_none_or(|kept| !Arc::ptr_eq(kept, record)) {
            return;
        }
        *kept = None;
        if let Err(error) = fs::remove_file(&self.path) {
            tracing::warn!(path = %self.path.display(), %error, "it is still there");
        }
    }

    /// Has a clone to which nothing was replayed tell what it has used by now, unless another one has.
    pub(in crate::sandbox) async fn record(&self, control: &Control) {
        if self.is_recorded() {
            return;
        }
        match self.try_record(control).await {
            Ok(bytes) => {
                tracing::info!(path = %self.path.display(), bytes, "recorded a working set");
                self.recorded.notify_one();
            }
            // The pod's end is no surprise.
            Err(RecordError::Vmm(error @ (ControlError::Closed(_) | ControlError::Send(_)))) => {
                tracing::debug!(error = chain(&error), "a pod ended before its working set was recorded");
            }
            Err(error) => tracing::warn!(
                path = %self.path.display(),
                error = chain(&error),
                "could not record a working set; the next clone tries again"
            ),
        }
    }

    async fn try_record(&self, control: &Control) -> Result<usize, RecordError> {
        let failed = |what| move |source| RecordError::File(what, source);
        let said = memfd_create("working-set", MFdFlags::MFD_CLOEXEC);
        let said = said.map_err(|errno| failed("make a file in memory")(errno.into()))?;
        let record = Command::RecordWorkingSet(vmm::RecordWorkingSet {});
        control.command(record, &[said.as_fd()]).await?;
        let (mut said, mut bytes) = (File::from(said), Vec::new());
        let read = said.rewind().and_then(|()| said.take(MOST + 1).read_to_end(&mut bytes));
        if read.map_err(failed("read it"))? as u64 > MOST {
            return Err(RecordError::Large);
        }
        self.keep(&bytes).map_err(failed("keep it"))?;
        self.metrics.working_sets.inc();
        Ok(bytes.len())
    }

    /// Puts it beside the template, whole or not at all. What a crash leaves of it is refused when it is replayed.
    fn keep(&self, bytes: &[u8]) -> io::Result<()> {
        let folder = self.path.parent().unwrap_or(&self.path);
        let mut file = tempfile::NamedTempFile::new_in(folder)?;
        file.write_all(bytes)?;
        let mut kept = lock(&self.record);
        file.persist(&self.path)?;
        *kept = Some(Arc::new(File::open(&self.path)?));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(folder: &Path) -> WorkingSet {
        WorkingSet::open(folder, 0, &PoolMetrics::default())
    }

    fn record(set: &WorkingSet) -> Option<Arc<File>> {
        lock(&set.record).clone()
    }

    #[test]
    fn what_was_kept_is_there_for_the_next_flintd_and_what_was_refused_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let set = of(folder.path());
        assert!(record(&set).is_none());
        set.keep(b"first").unwrap();
        let first = record(&set).unwrap();

        let next = of(folder.path());
        assert_eq!(io::read_to_string(&*record(&next).unwrap()).unwrap(), "first");

        set.keep(b"second").unwrap();
        set.forget(&first);
        assert_eq!(fs::read(folder.path().join(NAME)).unwrap(), b"second", "another one's");
        set.forget(&record(&set).unwrap());
        assert!(record(&set).is_none() && record(&of(folder.path())).is_none());
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
    }
}
