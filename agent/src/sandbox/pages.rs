//! Who brings a sandbox's memory while it runs: one `flint-pages` for all sandboxes of the same memory (docs/adr/0011).
//!
//! ```text
//!   sandbox ──holds──┐
//!   sandbox ──holds──┴─> PageServer: the door, the memory file     dropped: the door closes, and the server ends when those
//!                              |                                   that are inside have all that they need;
//!                              |                                   the last sandbox's end waits until it is gone
//!                        flint-pages, in the cgroup `pages:...`    empty: a task reaps it and removes its cgroup
//! ```
//!
//! A server is no child of its sandboxes' lives: when flintd ends, or is killed, the doors close, and the servers go on for those that
//! are inside. The next flintd knows them by their cgroups' names, and leaves them alone until they have ended.

use std::{
    collections::HashMap,
    fs::{self, File},
    io::{self, IoSlice, Read as _, Seek as _, Write as _},
    os::fd::{AsFd, AsRawFd, OwnedFd},
    path::{Path, PathBuf},
    sync::{Arc, Weak},
};

use flint_snapshots::machines::ChunkedFile;
use nix::{
    sys::{
        memfd::{MFdFlags, memfd_create},
        socket::{AddressFamily, ControlMessage, MsgFlags, SockFlag, SockType, sendmsg, socketpair},
    },
    unistd::{AccessFlags, access},
};
use tokio::{sync::Mutex, task::JoinHandle};

use super::{
    SandboxError, blocking, file_error,
    manager::spec_error,
    means::Means,
    shell::random,
    uids::{Uid, Uids},
};
use crate::{
    cgroup::{Cgroup, Cgroups, Limits},
    chain,
    process::{self, Program},
};

/// How many packs a server takes: its table of descriptors is small, and it has some others.
pub(crate) const MAX_PACKS: usize = 252;
/// The device by which a VMM hears of faults, as root.
const DEVICE: &str = "/dev/userfaultfd";
/// Prefix of servers' cgroups; no sandbox's id has a colon.
const CGROUP: &str = "pages:";

/// The servers of this flintd.
#[derive(Debug)]
pub(super) struct PageServers {
    program: PathBuf,
    /// By the content of the memory.
    known: Mutex<HashMap<String, Weak<PageServer>>>,
}

/// A running server, to which sandboxes can come.
#[derive(Debug)]
pub(super) struct PageServer {
    door: OwnedFd,
    /// What it fills.
    memory: File,
    cgroup: Cgroup,
    /// Ends when nothing is left of it.
    buried: JoinHandle<()>,
}

/// What a VMM needs of a server.
pub(super) struct Pages {
    pub server: Arc<PageServer>,
    /// The memory file, for reading.
    pub memory: File,
    /// The VMM's end.
    pub connection: OwnedFd,
}

/// What a server is started with.
struct Start {
    program: PathBuf,
    memory: ChunkedFile,
    cgroup: Cgroup,
    uid: Uid,
}

/// Whether a cgroup is a page server's.
pub(super) fn is_cgroup(name: &str) -> bool {
    name.starts_with(CGROUP)
}

/// Cleans up after the servers of an earlier flintd, when they have ended.
pub(super) fn look_after(cgroups: &Cgroups, names: &[String], uids: &Uids) {
    for name in names.iter().filter(|name| is_cgroup(name)) {
        let cgroup = cgroups.of(name);
        let processes = cgroup.processes();
        let uids = processes
            .iter()
            .filter_map(|pid| user_of(*pid))
            .map(|uid| uids.reserve(uid));
        tokio::spawn(bury(cgroup, uids.collect()));
    }
}

/// Ends all servers there are. Only when no sandbox is left.
pub(super) async fn end_all(cgroups: &Cgroups) -> Result<(), SandboxError> {
    for name in cgroups.list()?.into_iter().filter(|name| is_cgroup(name)) {
        let cgroup = cgroups.of(&name);
        blocking(move || cgroup.destroy()).await??;
    }
    Ok(())
}

impl Means {
    /// Whoever brings this memory, with a connection for one more VMM. A server that is there is used again.
    pub(super) async fn serve_pages(&self, memory: ChunkedFile) -> Result<Pages, SandboxError> {
        let mut known = self.pages.known.lock().await;
        if let Some(server) = known.get(&memory.content).and_then(Weak::upgrade)
            // One that has died lets nobody in.
            && let Ok(pages) = server.admit()
        {
            return Ok(pages);
        }
        known.retain(|_, server| server.strong_count() > 0);
        let content = memory.content.clone();
        let uid = self.uids.take();
        let uid = uid.ok_or_else(|| spec_error("page server", "all user ids for VMMs are in use"))?;
        let number = u64::from_ne_bytes(random()?);
        let limits = Limits {
            guest_memory_bytes: memory.len,
            vcpus: 1,
        };
        let start = Start {
            program: self.pages.program.clone(),
            memory,
            cgroup: self.cgroups.create(&format!("{CGROUP}{number:016x}"), limits)?,
            uid,
        };
        // A task of its own: whoever is not waited for any more leaves no server behind that nobody knows.
        let server = tokio::spawn(start.run()).await.map_err(|_| SandboxError::Died)??;
        let server = Arc::new(server);
        known.insert(content, Arc::downgrade(&server));
        server.admit().map_err(file_error("talk to", &self.pages.program))
    }
}

impl PageServers {
    /// With the program that lies beside flint-vmm.
    pub(super) fn new(vmm: &Path) -> Self {
        Self {
            program: vmm.with_file_name("flint-pages"),
            known: Mutex::default(),
        }
    }

    /// Whether this host has what it takes.
    pub(super) fn can_serve(&self) -> bool {
        let may = |path: &Path, how| access(path, how).is_ok();
        may(Path::new(DEVICE), AccessFlags::R_OK | AccessFlags::W_OK) && may(&self.program, AccessFlags::X_OK)
    }
}

impl PageServer {
    /// Its last sandbox has ended: waits until nothing is left of it.
    pub(super) async fn end(self) {
        // It ends as its door closes; one that is stuck does so, too.
        drop((self.door, self.memory));
        if let Err(error) = self.cgroup.kill() {
            tracing::warn!(error = chain(&error), "a page server that nobody needs cannot be ended");
        }
        // It tells itself what went wrong, and is cut short with the runtime only.
        let _ = self.buried.await;
    }

    fn admit(self: Arc<Self>) -> io::Result<Pages> {
        let (ours, theirs) = pair()?;
        let rights = [theirs.as_raw_fd()];
        let rights = [ControlMessage::ScmRights(&rights)];
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
        sendmsg::<()>(self.door.as_raw_fd(), &[IoSlice::new(b"sandbox")], &rights, flags, None)?;
        let memory = File::open(format!("/proc/self/fd/{}", self.memory.as_raw_fd()))?;
        Ok(Pages {
            memory,
            connection: ours,
            server: self,
        })
    }
}

impl Start {
    /// Answers when the memory file can be mapped.
    async fn run(self) -> Result<PageServer, SandboxError> {
        let program = self.program.clone();
        let failed = |what: &'static str| file_error(what, program.clone());
        let (door, theirs) = pair().map_err(failed("make a socket for"))?;
        let memory = memory_file("memory", self.memory.len).map_err(failed("make a memory file for"))?;
        let mut log = memory_file("log", 0).map_err(failed("make a log for"))?;
        let (log_of_it, for_it) = (log.try_clone(), memory.try_clone());
        let (log_of_it, for_it) = (
            log_of_it.map_err(failed("share the log of"))?,
            for_it.map_err(failed("share the memory file of"))?,
        );
        let cgroup = self.cgroup.clone();
        let spawned = blocking(move || {
            let spawned = self.spawn(&theirs, &for_it, &log_of_it);
            (spawned, self.uid)
        });
        let (spawned, uid) = spawned.await?;
        // From here on its cgroup is looked after, whether there is a process in it or not.
        let buried = tokio::spawn(bury(cgroup.clone(), vec![uid]));
        let launched = spawned?.ended().await.map_err(failed("wait for"))?;
        if launched.is_some_and(|status| status.success()) {
            return Ok(PageServer {
                door,
                memory,
                cgroup,
                buried,
            });
        }
        let mut words = String::new();
        let _ = log.rewind().and_then(|()| log.read_to_string(&mut words));
        Err(failed("start")(io::Error::other(words.trim_end().to_owned())))
    }

    fn spawn(&self, door: &OwnedFd, memory: &File, log: &File) -> Result<process::Process, SandboxError> {
        let mut table = memory_file("table", 0).map_err(file_error("make a table for", &self.program))?;
        table
            .write_all(&self.memory.table)
            .map_err(file_error("write the table of", &self.program))?;
        let uid = self.uid.get().to_string();
        let mut args = ["--uid", &uid, "--gid", &uid].map(String::from).to_vec();
        let mut fds = vec![door.as_fd(), memory.as_fd(), table.as_fd()];
        fds.extend(self.memory.packs.iter().map(AsFd::as_fd));
        let names = ["--door-fd", "--memory-fd", "--table-fd"].into_iter();
        for (number, name) in (3..).zip(names.chain(std::iter::repeat("--pack-fd"))).take(fds.len()) {
            args.extend([name.to_owned(), i32::to_string(&number)]);
        }
        Ok(process::spawn(&Program {
            path: &self.program,
            args: &args,
            fds: &fds,
            log: log.as_fd(),
            cgroup: self.cgroup.folder()?.as_fd(),
        })?)
    }
}

/// Waits for the end of a server, and removes what it held. Its user id is nobody else's until then.
async fn bury(cgroup: Cgroup, uids: Vec<Uid>) {
    let removed = async {
        cgroup.emptied().await?;
        let of = cgroup.clone();
        blocking(move || {
            process::reap_children_in(&of);
            of.destroy()
        })
        .await??;
        Ok::<_, SandboxError>(())
    };
    if let Err(error) = removed.await {
        tracing::warn!(
            error = chain(&error),
            "the cgroup of a page server stays until flintd is started again"
        );
    }
    drop(uids);
}

fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
    Ok(socketpair(
        AddressFamily::Unix,
        SockType::SeqPacket,
        None,
        SockFlag::SOCK_CLOEXEC,
    )?)
}

pub(super) fn memory_file(name: &str, len: u64) -> io::Result<File> {
    let file = File::from(memfd_create(name, MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING)?);
    file.set_len(len)?;
    Ok(file)
}

/// The real user of a process (proc_pid_status(5)).
fn user_of(pid: i32) -> Option<u32> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("Uid:"))?;
    line.split_whitespace().next()?.parse().ok()
}
