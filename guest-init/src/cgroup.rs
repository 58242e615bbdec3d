//! A container's cgroup as PID 1 uses it: its figures, its OOM kills, and its end. See the kernel's cgroup-v2 document.

use std::{
    fs::{self, File},
    io,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    time::Duration,
};

use tokio::io::Interest;

/// How long killed processes may take to leave: one that is in uninterruptible sleep on a disk can take a while.
const EMPTY_TIMEOUT: Duration = Duration::from_secs(10);

/// Why a cgroup could not be emptied or removed.
#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    /// A file of the cgroup could not be used.
    #[error("using {path}", path = .path.display())]
    File {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    /// Something in it does not die.
    #[error("cgroup {path} still has processes {EMPTY_TIMEOUT:?} after they were killed", path = .path.display())]
    Busy { path: PathBuf },
}

/// One container's cgroup folder.
#[derive(Debug, Clone)]
pub struct Cgroup(PathBuf);

impl Cgroup {
    /// At `path`, which need not exist.
    pub fn new(path: PathBuf) -> Self {
        Self(path)
    }

    /// A single number: memory.current, pids.current...; `None` where the controller or the cgroup is absent.
    pub fn number(&self, file: &str) -> Option<u64> {
        fs::read_to_string(self.0.join(file)).ok()?.trim().parse().ok()
    }

    /// One value of a flat-keyed file: "oom_kill" of memory.events.
    pub fn keyed(&self, file: &str, key: &str) -> Option<u64> {
        keyed_value(&fs::read_to_string(self.0.join(file)).ok()?, key)
    }

    /// Kills all of its processes at once, also ones that fork (cgroup.kill). Absent: nothing to kill.
    pub fn kill(&self) -> Result<(), CgroupError> {
        let path = self.0.join("cgroup.kill");
        match fs::write(&path, "1") {
            Err(source) if source.kind() != io::ErrorKind::NotFound => Err(CgroupError::File { path, source }),
            _ => Ok(()),
        }
    }

    /// Sends `signal` to each of its processes that exists now.
    pub fn signal_all(&self, signal: i32) -> Result<(), CgroupError> {
        if signal == libc::SIGKILL {
            return self.kill();
        }
        let path = self.0.join("cgroup.procs");
        let text = fs::read_to_string(&path).map_err(|source| CgroupError::File { path, source })?;
        for pid in text.lines().filter_map(|line| line.parse().ok()).filter(|pid| *pid > 0) {
            // It may have ended since it was listed.
            let _ = crate::sys::kill(pid, signal);
        }
        Ok(())
    }

    /// Kills what is in it, waits until it is empty, removes it and the cgroups that the container made below it.
    pub async fn remove(&self) -> Result<(), CgroupError> {
        if !self.0.exists() {
            return Ok(());
        }
        self.kill()?;
        let busy = |_| CgroupError::Busy { path: self.0.clone() };
        tokio::time::timeout(EMPTY_TIMEOUT, self.wait_until_empty())
            .await
            .map_err(busy)??;
        remove_tree(&self.0).map_err(|source| CgroupError::File {
            path: self.0.clone(),
            source,
        })
    }

    async fn wait_until_empty(&self) -> Result<(), CgroupError> {
        let path = self.0.join("cgroup.events");
        let failed = |source| CgroupError::File {
            path: path.clone(),
            source,
        };
        let file = File::open(&path).map_err(failed)?;
        // kernfs signals a change of the file with POLLPRI.
        let events = crate::sys::async_fd(OwnedFd::from(file), Interest::PRIORITY).map_err(failed)?;
        loop {
            let text = fs::read_to_string(&path).map_err(failed)?;
            if keyed_value(&text, "populated") == Some(0) {
                return Ok(());
            }
            events.ready(Interest::PRIORITY).await.map_err(failed)?.clear_ready();
        }
    }
}

/// One value of a flat-keyed text.
pub fn keyed_value(text: &str, key: &str) -> Option<u64> {
    text.lines()
        .find_map(|line| line.strip_prefix(key)?.strip_prefix(' ')?.trim().parse().ok())
}

/// rmdir, deepest first; its files cannot be and need not be removed.
fn remove_tree(path: &Path) -> io::Result<()> {
    for entry in fs::read_dir(path)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            remove_tree(&entry.path())?;
        }
    }
    fs::remove_dir(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_matched_whole() {
        let text = "low 0\noom 3\noom_kill 2\noom_group_kill 1\n";
        assert_eq!(keyed_value(text, "oom_kill"), Some(2));
        assert_eq!(keyed_value(text, "oom"), Some(3));
        assert_eq!(keyed_value(text, "kill"), None);
        assert_eq!(keyed_value("oom_kill x", "oom_kill"), None);
    }

    #[tokio::test]
    async fn removing_an_absent_cgroup_is_done_already() {
        let folder = tempfile::tempdir().unwrap();
        Cgroup::new(folder.path().join("gone")).remove().await.unwrap();
    }
}
