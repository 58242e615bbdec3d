//! A host for tests of sandboxes: a network namespace, folders and a cgroup of its own, the real flint-vmm, and an audit at
//! the end that nothing was left behind.

// The assembler of tiny guests has its home with those who use most of it.
#[allow(dead_code, reason = "each test program uses a part")]
pub mod dialler;
#[allow(dead_code, reason = "each test program uses a part")]
#[path = "../../../vmm/tests/common/guest.rs"]
pub mod guest;

use std::{
    env, fs,
    future::Future,
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Duration,
};

use flintd::sandbox::{Config, Identity, Manager, NetSpec, SandboxSpec};
use nix::{
    sched::{CloneFlags, unshare},
    sys::{
        inotify::{AddWatchFlags, InitFlags, Inotify},
        signal::{Signal, kill},
    },
    unistd::Pid,
};
use tempfile::TempDir;

/// Longest wait for anything; a test must not hang.
pub const LIMIT: Duration = Duration::from_secs(60);
/// Where a daemon process finds the folder of its host.
const FOLDER: &str = "FLINT_TEST_SANDBOX_HOST";

/// One host.
pub struct Host {
    folder: PathBuf,
    _keep: Option<TempDir>,
}

/// Runs a test on a thread in a new network namespace, which ends with it, and then looks for what was left behind.
pub fn on_a_host<F: Future<Output = ()>>(kernel: &[u8], test: impl FnOnce(Host) -> F + Send + 'static) {
    let keep = tempfile::Builder::new().prefix("flint-kvm-").tempdir().unwrap();
    let folder = keep.path().to_owned();
    fs::write(folder.join("kernel"), kernel).unwrap();
    let run = move || {
        unshare(CloneFlags::CLONE_NEWNET).expect("these tests need CAP_SYS_ADMIN");
        let host = Host {
            folder: folder.clone(),
            _keep: Some(keep),
        };
        let cgroup = host.cgroup();
        runtime().block_on(test(host));
        assert!(!cgroup.exists(), "the manager's cgroup is still there");
        let left = ask("ip -o link | grep flt; ip -o link show flint0; nft list ruleset");
        assert_eq!(left, "", "of the network is left");
    };
    std::thread::spawn(run).join().unwrap();
}

fn runtime() -> tokio::runtime::Runtime {
    // One thread: all that happens, happens in its network namespace.
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap()
}

/// In a daemon's process: what it does until it is killed. `None` in a process that is none.
pub fn as_daemon<F: Future<Output = ()>>(work: impl FnOnce(Host) -> F) -> Option<()> {
    let folder = PathBuf::from(env::var_os(FOLDER)?);
    runtime().block_on(work(Host { folder, _keep: None }));
    Some(())
}

#[allow(dead_code, reason = "each test program uses a part")]
impl Host {
    pub fn config(&self) -> Config {
        let path = |name| self.folder.join(name);
        Config {
            cgroup: self.cgroup_name(),
            boot_timeout: LIMIT,
            ..Config::new(path("run"), path("state"), vmm(), path("kernel"), None)
        }
    }

    pub async fn manager(&self) -> Manager {
        Manager::new(self.config()).await.unwrap()
    }

    /// A file of the sandbox that all tests here use.
    pub fn file(&self, name: &str) -> PathBuf {
        self.folder.join("run/sandboxes/a").join(name)
    }

    /// A name beside the sandboxes' folders.
    pub fn stray(&self) -> PathBuf {
        self.folder.join("run/sandboxes/stray")
    }

    /// Starts this test program once more, as a process that runs `test` as a daemon, in this network namespace.
    pub fn daemon(&self, test: &str) -> Daemon {
        let child = Command::new(env::current_exe().unwrap())
            .args(["--exact", test, "--ignored", "--nocapture"])
            .env(FOLDER, &self.folder)
            .stdout(Stdio::null())
            .process_group(0)
            .spawn();
        Daemon(child.unwrap())
    }

    /// Its own folder.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Process ids of the sandbox's cgroup.
    pub fn processes(&self) -> Vec<Pid> {
        self.processes_of("a")
    }

    /// Process ids of a cgroup.
    pub fn processes_of(&self, cgroup: &str) -> Vec<Pid> {
        let text = fs::read_to_string(self.cgroup().join(cgroup).join("cgroup.procs")).unwrap_or_default();
        text.lines().map(|line| Pid::from_raw(line.parse().unwrap())).collect()
    }

    /// Fails if anything of any sandbox is left, with the manager still there.
    pub fn assert_clean(&self) {
        let folders: Vec<_> = fs::read_dir(self.folder.join("run/sandboxes")).unwrap().collect();
        assert!(folders.is_empty(), "folders: {folders:?}");
        let cgroups = fs::read_dir(self.cgroup()).unwrap().flatten();
        let cgroups: Vec<_> = cgroups.filter(|entry| entry.path().is_dir()).collect();
        assert!(cgroups.is_empty(), "cgroups: {cgroups:?}");
        assert_eq!(self.children(), Vec::<String>::new(), "processes or zombies");
        assert_eq!(ask("ip -o link | grep flt"), "", "taps");
        let sources = ask("nft list set bridge flint sources");
        assert!(
            sources.contains("sources") && !sources.contains("elements"),
            "{sources}"
        );
    }

    /// Children of this process that run or ran in a cgroup of this host, zombies too.
    fn children(&self) -> Vec<String> {
        let name = self.cgroup_name();
        let tasks = fs::read_dir("/proc/self/task").unwrap().flatten();
        let children = tasks.map(|task| fs::read_to_string(task.path().join("children")).unwrap_or_default());
        let children: Vec<_> = children
            .flat_map(|pids| pids.split_whitespace().map(String::from).collect::<Vec<_>>())
            .collect();
        let of_host =
            |pid: &String| fs::read_to_string(format!("/proc/{pid}/cgroup")).is_ok_and(|text| text.contains(&name));
        children.into_iter().filter(of_host).collect()
    }

    /// Removes the manager, after which nothing of it may be left.
    pub async fn end(self, manager: Manager) {
        self.assert_clean();
        manager.remove().await.unwrap();
    }

    fn cgroup_name(&self) -> String {
        self.folder.file_name().unwrap().to_str().unwrap().to_owned()
    }

    /// The folder of the manager's cgroup.
    pub fn cgroup(&self) -> PathBuf {
        let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
        let mount = mounts
            .lines()
            .map(|line| line.split(' ').collect::<Vec<_>>())
            .find(|parts| parts[2] == "cgroup2");
        Path::new(mount.expect("cgroup2")[1]).join(self.cgroup_name())
    }
}

/// The process of a daemon. Killed when dropped.
pub struct Daemon(Child);

impl Daemon {
    /// Ends it as a crash would.
    pub fn kill_9(mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // Both fail where it was killed already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The wish that all tests here have.
pub fn spec(net: bool) -> SandboxSpec {
    SandboxSpec {
        id: "a".into(),
        vcpus: 1,
        memory_bytes: 32 << 20,
        disks: Vec::new(),
        net: net.then(NetSpec::default),
        identity: Identity::default(),
    }
}

/// Kills a process with a signal.
pub fn signal(pid: Pid, signal: Signal) {
    kill(pid, signal).unwrap();
}

/// Blocks until a file, whose folders may be missing too, contains a text.
pub fn wait_for(file: &Path, text: &str) {
    wait_until(file, || {
        fs::read_to_string(file).is_ok_and(|content| content.contains(text))
    });
}

/// Blocks until a file is there.
#[allow(dead_code, reason = "each test program uses a part")]
pub fn wait_there(file: &Path) {
    wait_until(file, || file.symlink_metadata().is_ok());
}

/// Blocks until something holds that changes with a file or the folders that it is to be in.
fn wait_until(file: &Path, has: impl Fn() -> bool) {
    while !has() {
        let watch = Inotify::init(InitFlags::IN_CLOEXEC).unwrap();
        let there = file.ancestors().skip(1).find(|folder| folder.exists()).unwrap();
        let events = AddWatchFlags::IN_CREATE | AddWatchFlags::IN_MODIFY | AddWatchFlags::IN_MOVED_TO;
        // Gone again, or deeper by now: look anew.
        if watch.add_watch(there, events).is_err()
            || file.ancestors().skip(1).find(|folder| folder.exists()) != Some(there)
        {
            continue;
        }
        if !has() {
            watch.read_events().unwrap();
        }
    }
}

/// Blocks until a folder is no more.
pub fn wait_gone(folder: &Path) {
    let watch = Inotify::init(InitFlags::empty()).unwrap();
    watch
        .add_watch(folder.parent().unwrap(), AddWatchFlags::IN_DELETE)
        .unwrap();
    while folder.exists() {
        watch.read_events().unwrap();
    }
}

/// Output of a shell command.
pub fn ask(command: &str) -> String {
    let output = Command::new("sh").args(["-c", command]).output().unwrap();
    String::from_utf8(output.stdout).unwrap()
}

/// flint-vmm: from the folder that FLINT_BIN names, or of the same build as this test.
fn vmm() -> PathBuf {
    let built = env::current_exe().unwrap();
    let folders = [
        env::var_os("FLINT_BIN").map(PathBuf::from),
        built.ancestors().nth(2).map(Path::to_owned),
        env::var_os("CARGO_TARGET_DIR").map(|folder| Path::new(&folder).join("debug")),
    ];
    let found = folders
        .into_iter()
        .flatten()
        .map(|folder| folder.join("flint-vmm"))
        .find(|path| path.exists());
    found.expect("no flint-vmm: cargo build -p flint-vmm")
}
