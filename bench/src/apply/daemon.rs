//! A flintd of this program's own: folders, cgroup and bridge go with it.

use std::fs::{self, File};
use std::io::{self, BufRead, BufReader};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStderr, Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::TempDir;

use crate::Error;

/// How long a guest's port write may take.
const PATIENCE: Duration = Duration::from_secs(60);
/// Lines of its log that an error comes with.
const TAIL_LINES: usize = 20;

/// A running flintd. It ends its pods and itself when dropped.
pub struct Daemon {
    folder: TempDir,
    child: Child,
    tail: Arc<Mutex<Vec<String>>>,
    reader: Option<JoinHandle<()>>,
}

impl Daemon {
    /// Starts one whose guests' kernel is `kernel`, and waits until it answers.
    pub fn start(flintd: &Path, vmm: &Path, kernel: &[u8], pool: u32) -> Result<Self, Error> {
        let folder = tempfile::Builder::new().prefix("flint-bench-").tempdir()?;
        let path = |name: &str| folder.path().join(name);
        fs::write(path("kernel"), kernel)?;
        // The guest has no use for it.
        fs::write(path("initrd"), "none")?;
        // flintd takes it for a file and looks nowhere else.
        let vmm = fs::canonicalize(vmm).map_err(|error| format!("flint-vmm, {}: {error}", vmm.display()))?;
        let mut command = Command::new(flintd);
        for (option, value) in [
            ("--state-dir", path("state")),
            ("--run-dir", path("run")),
            ("--cgroup", cgroup(&folder).into()),
            ("--vmm", vmm),
            ("--kernel", path("kernel")),
            ("--initrd", path("initrd")),
            ("--pool", pool.to_string().into()),
        ] {
            command.arg(option).arg(value);
        }
        command.arg("--stop-pods").stdin(Stdio::null());
        let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
        let mut child = child.map_err(|error| format!("cannot run {}: {error}", flintd.display()))?;
        let tail = Arc::default();
        let reader = child.stderr.take().map(|log| read(log, Arc::clone(&tail)));
        let ready = child.stdout.take();
        let daemon = Self {
            folder,
            child,
            tail,
            reader,
        };
        let mut line = String::new();
        ready.map_or(Ok(0), |ready| BufReader::new(ready).read_line(&mut line))?;
        if line.starts_with("ready") {
            Ok(daemon)
        } else {
            Err(daemon.explain(&"flintd did not start".into()))
        }
    }

    pub fn socket(&self) -> PathBuf {
        self.folder.path().join("run/flintd.sock")
    }

    /// The consoles of all that is there now.
    pub fn consoles(&self) -> Result<Consoles, Error> {
        let watch = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK)?;
        for sandbox in fs::read_dir(self.folder.path().join("run/sandboxes"))? {
            match watch.add_watch(&sandbox?.path().join("serial.log"), AddWatchFlags::IN_MODIFY) {
                // That of the last run is on its way out.
                Err(Errno::ENOENT) => {}
                watched => drop(watched?),
            }
        }
        Ok(Consoles(watch))
    }

    /// The error, with what flintd had to say last.
    pub fn explain(&self, error: &Error) -> Error {
        let tail = self.tail.lock().unwrap_or_else(PoisonError::into_inner);
        format!("{error}\nflintd's log ends with:\n{}", tail.join("\n")).into()
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if let Ok(pid) = i32::try_from(self.child.id()) {
            let _ = kill(Pid::from_raw(pid), Signal::SIGTERM);
        }
        let _ = self.child.wait();
        // The log ends with flintd.
        if let Some(reader) = self.reader.take() {
            let _ = reader.join();
        }
        for mount in cgroup_mounts().unwrap_or_default() {
            let _ = fs::remove_dir(mount.join(cgroup(&self.folder)));
        }
    }
}

/// Consoles on which nothing has been written since they were looked for.
pub struct Consoles(Inotify);

impl Consoles {
    /// When something was written on one.
    pub fn written(self) -> io::Result<Instant> {
        let patience = PollTimeout::try_from(PATIENCE).unwrap_or(PollTimeout::MAX);
        loop {
            if poll(&mut [PollFd::new(self.0.as_fd(), PollFlags::POLLIN)], patience)? == 0 {
                return Err(io::Error::other("no clone has written anything"));
            }
            let now = Instant::now();
            // That one is removed is told as well.
            let events = self.0.read_events()?;
            if events.iter().any(|event| event.mask.contains(AddWatchFlags::IN_MODIFY)) {
                return Ok(now);
            }
        }
    }
}

/// Reads flintd's log on a thread of its own, so that flintd never waits.
fn read(log: ChildStderr, tail: Arc<Mutex<Vec<String>>>) -> JoinHandle<()> {
    thread::spawn(move || {
        for line in BufReader::new(log).lines().map_while(Result::ok) {
            let mut tail = tail.lock().unwrap_or_else(PoisonError::into_inner);
            if tail.len() == TAIL_LINES {
                tail.remove(0);
            }
            tail.push(line);
        }
    })
}

fn cgroup(folder: &TempDir) -> String {
    let name = folder.path().file_name().unwrap_or_default();
    name.to_string_lossy().replace('.', "-")
}

fn cgroup_mounts() -> io::Result<Vec<PathBuf>> {
    let mounts = io::read_to_string(File::open("/proc/self/mounts")?)?;
    let fields = mounts.lines().map(|line| line.split(' ').collect::<Vec<_>>());
    let cgroups = fields.filter(|fields| fields.get(2) == Some(&"cgroup2"));
    Ok(cgroups.filter_map(|fields| fields.get(1).map(PathBuf::from)).collect())
}
