//! A cgroup (version 2) for each sandbox, below `<cgroup2 mount>/flint`.
//!
//! It limits the VMM where controllers are delegated, and it is the sure handle on all processes of a sandbox whatever
//! became of the flintd that made it: `cgroup.kill` reaches those whose ids nobody wrote down, and `cgroup.events` tells
//! when the last is gone (Linux admin guide, "Control Group v2").

use std::{
    fs, io,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::fs::OpenOptionsExt,
    },
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
};
use thiserror::Error;
use tokio::io::{Interest, unix::AsyncFd};

/// Host memory that a VMM may use beyond its guest's: its own code, stacks and buffers.
const VMM_OVERHEAD_BYTES: u64 = 64 << 20;
/// Page tables are counted where memory is: an entry of 8 bytes for each page of 4 KiB, once in the VMM's own and once in KVM's.
const GUEST_BYTES_PER_TABLE_BYTE: u64 = 4096 / (2 * 8);
/// How long killed processes may take to go; the kernel frees a guest's memory in this time.
const KILL_TIMEOUT: Duration = Duration::from_secs(30);
/// Controllers that limits need.
const CONTROLLERS: [&str; 3] = ["memory", "cpu", "pids"];

/// Something about cgroups failed.
#[derive(Debug, Error)]
pub enum CgroupError {
    /// There is no cgroup v2 file system.
    #[error("no cgroup2 file system is mounted: mount one (mount -t cgroup2 none /sys/fs/cgroup)")]
    NotMounted,
    /// A file or folder did not do as asked.
    #[error("could not {action} {path}")]
    File {
        /// What was tried.
        action: &'static str,
        /// On which file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// Processes outlived SIGKILL.
    #[error("processes in {0} are still there {KILL_TIMEOUT:?} after they were killed")]
    StillPopulated(PathBuf),
}

fn failed(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> CgroupError {
    let path = path.to_owned();
    move |source| CgroupError::File { action, path, source }
}

/// Limits of one sandbox.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// The guest's memory; the VMM's own is added.
    pub guest_memory_bytes: u64,
    /// vCPUs: a sandbox's share when the host is busy is in proportion to them.
    pub vcpus: u32,
}

impl Limits {
    fn host_memory_bytes(&self) -> u64 {
        self.guest_memory_bytes
            .saturating_add(VMM_OVERHEAD_BYTES)
            .saturating_add(self.guest_memory_bytes / GUEST_BYTES_PER_TABLE_BYTE)
    }
}

/// The parent of all sandboxes' cgroups.
#[derive(Debug)]
pub struct Cgroups {
    root: PathBuf,
    warnings: Vec<String>,
}

impl Cgroups {
    /// Finds the cgroup2 mount, makes `parent` in it and hands it the controllers that limits need.
    pub fn open(parent: &str) -> Result<Self, CgroupError> {
        let info = Path::new("/proc/self/mountinfo");
        let mounts = fs::read_to_string(info).map_err(failed("read", info))?;
        let mount = find_mount(&mounts).ok_or(CgroupError::NotMounted)?;
        let root = mount.join(parent);
        make_folder(&root)?;
        let mut warnings = Vec::new();
        for controller in CONTROLLERS {
            let enabled = [mount.as_path(), root.as_path()]
                .into_iter()
                .try_for_each(|folder| fs::write(folder.join("cgroup.subtree_control"), format!("+{controller}")));
            if let Err(error) = enabled {
                warnings.push(format!(
                    "the cgroup controller {controller} cannot be used in {}: {error}; sandboxes run without its limits",
                    root.display()
                ));
            }
        }
        Ok(Self { root, warnings })
    }

    /// What will not be limited, and why.
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }

    /// Makes a sandbox's cgroup, or takes the one that is there. Limits whose controller is missing are left out.
    pub fn create(&self, id: &str, limits: Limits) -> Result<Cgroup, CgroupError> {
        let cgroup = Cgroup {
            path: self.root.join(id),
        };
        make_folder(&cgroup.path)?;
        cgroup.set_limits(limits)?;
        Ok(cgroup)
    }

    /// A sandbox's cgroup, which may or may not exist.
    pub fn of(&self, id: &str) -> Cgroup {
        Cgroup {
            path: self.root.join(id),
        }
    }

    /// Names of all sandboxes that have a cgroup.
    pub fn list(&self) -> Result<Vec<String>, CgroupError> {
        let entries = fs::read_dir(&self.root).map_err(failed("list", &self.root))?;
        let folders = entries
            .flatten()
            .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
        Ok(folders
            .filter_map(|entry| entry.file_name().into_string().ok())
            .collect())
    }

    /// Removes the parent itself, once no sandbox is left.
    pub fn remove(&self) -> Result<(), CgroupError> {
        remove_folder(&self.root)
    }
}

/// One sandbox's cgroup.
#[derive(Clone, Debug)]
pub struct Cgroup {
    path: PathBuf,
}

impl Cgroup {
    /// Its folder, for a process to be made in.
    pub fn folder(&self) -> Result<OwnedFd, CgroupError> {
        let flags = libc::O_DIRECTORY | libc::O_CLOEXEC;
        let folder = fs::OpenOptions::new().read(true).custom_flags(flags).open(&self.path);
        Ok(folder.map_err(failed("open", &self.path))?.into())
    }

    /// Whether the process is in here now.
    pub fn contains(&self, pid: i32) -> Result<bool, CgroupError> {
        let path = self.path.join("cgroup.procs");
        let processes = fs::read_to_string(&path).map_err(failed("read", &path))?;
        Ok(processes.lines().any(|line| line.parse() == Ok(pid)))
    }

    /// Whether the process was made in here and never moved, be it a zombie, and be this cgroup removed already.
    pub fn is_home_of(&self, pid: i32) -> bool {
        let Ok(memberships) = fs::read_to_string(format!("/proc/{pid}/cgroup")) else {
            return false;
        };
        // The line of version 2 is "0::" and a path from the root of our cgroup namespace (cgroups(7)). Its last two parts
        // name a sandbox; where the file system is mounted does not matter.
        let own: Vec<_> = self.path.iter().rev().take(2).collect();
        memberships
            .lines()
            .filter_map(|line| line.strip_prefix("0::"))
            .map(|path| Path::new(path.strip_suffix(" (deleted)").unwrap_or(path)))
            .any(|path| path.iter().rev().take(2).eq(own.iter().copied()))
    }

    /// Gives it other limits. Those whose controller is missing are left out.
    pub fn set_limits(&self, limits: Limits) -> Result<(), CgroupError> {
        self.limit("memory.max", limits.host_memory_bytes())?;
        self.limit(
            "cpu.weight",
            u64::from(limits.vcpus).saturating_mul(100).clamp(1, 10_000),
        )
    }

    /// Lets the processes in here have more memory than their limit, until it is given back.
    pub fn lend(&self, bytes: u64) -> Result<Loan, CgroupError> {
        let path = self.path.join("memory.max");
        let limit = match fs::read_to_string(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            // Without a limit it says "max".
            read => read.map_err(failed("read", &path))?.trim().parse::<u64>().ok(),
        };
        if let Some(limit) = limit {
            self.limit("memory.max", limit.saturating_add(bytes))?;
        }
        Ok(Loan {
            cgroup: self.clone(),
            limit,
        })
    }

    /// Kills all processes in here. None, or no cgroup, is fine.
    pub fn kill(&self) -> Result<(), CgroupError> {
        let path = self.path.join("cgroup.kill");
        match fs::write(&path, "1") {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(failed("write to", &path)(error)),
            _ => Ok(()),
        }
    }

    /// Kills all processes in here, waits until they are gone and removes the cgroup. Blocks; may be repeated.
    pub fn destroy(&self) -> Result<(), CgroupError> {
        self.kill()?;
        self.wait_empty()?;
        remove_folder(&self.path)
    }

    /// Ids of the processes in here. None, or no cgroup, is fine.
    pub fn processes(&self) -> Vec<i32> {
        let processes = fs::read_to_string(self.path.join("cgroup.procs")).unwrap_or_default();
        processes.lines().filter_map(|line| line.parse().ok()).collect()
    }

    /// Waits until no process is in here, however long that takes. No cgroup is fine.
    pub async fn emptied(&self) -> Result<(), CgroupError> {
        let path = self.path.join("cgroup.events");
        let file = match fs::File::open(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            other => other.map_err(failed("open", &path))?,
        };
        // SAFETY: an owned file's descriptor stays the same one for as long as it is registered.
        let events = unsafe { AsyncFd::register_with_interest(file, Interest::PRIORITY) };
        let events = events.map_err(|error| failed("watch", &path)(error.into()))?;
        // As in `wait_empty`.
        while is_populated(events.get_ref()).map_err(failed("read", &path))? {
            let mut changed = events.ready(Interest::PRIORITY).await.map_err(failed("watch", &path))?;
            changed.clear_ready();
        }
        Ok(())
    }

    fn wait_empty(&self) -> Result<(), CgroupError> {
        let path = self.path.join("cgroup.events");
        let deadline = Instant::now() + KILL_TIMEOUT;
        let file = match fs::File::open(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            other => other.map_err(failed("open", &path))?,
        };
        // A change raises POLLPRI until the file is read again; so read first, then wait, and no change is missed.
        while is_populated(&file).map_err(failed("read", &path))? {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(CgroupError::StillPopulated(self.path.clone()));
            }
            wait_for_change(file.as_fd(), left).map_err(failed("watch", &path))?;
        }
        Ok(())
    }

    fn limit(&self, name: &str, value: u64) -> Result<(), CgroupError> {
        let path = self.path.join(name);
        match fs::write(&path, value.to_string()) {
            // The controller is not delegated: `Cgroups::warnings` says so. Files cannot be made on a cgroup2, so this is
            // EACCES for the missing O_CREAT rather than ENOENT.
            Err(_) if !path.exists() => Ok(()),
            other => other.map_err(failed("write to", &path)),
        }
    }
}

/// Memory beyond a cgroup's limit.
#[derive(Debug)]
#[must_use]
pub struct Loan {
    cgroup: Cgroup,
    /// Absent: there is none to go back to.
    limit: Option<u64>,
}

impl Loan {
    /// Makes the limit what it was, unless more than that is still in use: the kernel would kill for it. So it is where files that
    /// were written are memory themselves, on a tmpfs.
    pub fn give_back(self) -> Result<(), CgroupError> {
        let Some(limit) = self.limit else { return Ok(()) };
        let path = self.cgroup.path.join("memory.current");
        let current = fs::read_to_string(&path).map_err(failed("read", &path))?;
        if current.trim().parse().is_ok_and(|current: u64| current <= limit) {
            self.cgroup.limit("memory.max", limit)?;
        }
        Ok(())
    }
}

fn is_populated(events: &fs::File) -> io::Result<bool> {
    use std::os::unix::fs::FileExt;
    let mut text = [0; 256];
    let length = events.read_at(&mut text, 0)?;
    Ok(String::from_utf8_lossy(&text[..length])
        .lines()
        .any(|line| line == "populated 1"))
}

fn wait_for_change(events: BorrowedFd<'_>, limit: Duration) -> io::Result<()> {
    let timeout = PollTimeout::try_from(limit).unwrap_or(PollTimeout::MAX);
    match poll(&mut [PollFd::new(events, PollFlags::POLLPRI)], timeout) {
        Ok(_) | Err(Errno::EINTR) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

fn make_folder(path: &Path) -> Result<(), CgroupError> {
    match fs::create_dir(path) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        other => other.map_err(failed("make", path)),
    }
}

fn remove_folder(path: &Path) -> Result<(), CgroupError> {
    match fs::remove_dir(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other.map_err(failed("remove", path)),
    }
}

/// The mount point of the cgroup2 file system in the text of a mountinfo (proc_pid_mountinfo(5)).
fn find_mount(mountinfo: &str) -> Option<PathBuf> {
    mountinfo.lines().find_map(|line| {
        let (mount, source) = line.split_once(" - ")?;
        let kind = source.split(' ').next()?;
        (kind == "cgroup2").then(|| mount.split(' ').nth(4).map(PathBuf::from))?
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cgroup2_mount_is_found_beside_version_1() {
        let mounts = "30 25 0:26 / /sys/fs/cgroup/cpu rw shared:9 - cgroup cgroup rw,cpu\n\
                      31 25 0:27 / /sys/fs/cgroup/unified rw,relatime shared:10 - cgroup2 cgroup2 rw\n";
        assert_eq!(find_mount(mounts), Some(PathBuf::from("/sys/fs/cgroup/unified")));
        assert_eq!(find_mount("30 25 0:26 / / rw - ext4 /dev/vda rw\n"), None);
    }

    #[test]
    fn a_limit_has_room_for_the_page_tables_of_all_memory() {
        let limits = Limits {
            guest_memory_bytes: 32 << 30,
            vcpus: 1,
        };
        assert_eq!(
            limits.host_memory_bytes(),
            (32 << 30) + VMM_OVERHEAD_BYTES + (128 << 20)
        );
    }

    #[tokio::test]
    async fn destroying_kills_what_runs_inside_and_may_be_repeated() {
        let cgroups = Cgroups::open(&format!("flint-test-cgroup-{}", std::process::id())).unwrap();
        let cgroup = cgroups
            .create(
                "one",
                Limits {
                    guest_memory_bytes: 64 << 20,
                    vcpus: 1,
                },
            )
            .unwrap();
        let null = fs::File::options().write(true).open("/dev/null").unwrap();
        let process = crate::process::spawn(&crate::process::Program {
            path: Path::new("/bin/sleep"),
            args: &["1000".into()],
            fds: &[],
            log: null.as_fd(),
            cgroup: cgroup.folder().unwrap().as_fd(),
        })
        .unwrap();
        assert!(cgroup.contains(process.pid()).unwrap(), "it begins its life inside");
        cgroup.destroy().unwrap();
        let status = process.ended().await.unwrap().expect("it is a child of ours");
        assert_eq!(
            std::os::unix::process::ExitStatusExt::signal(&status),
            Some(libc::SIGKILL)
        );
        cgroup.destroy().unwrap();
        assert!(cgroups.list().unwrap().is_empty());
        cgroups.remove().unwrap();
    }
}
