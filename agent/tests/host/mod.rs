//! A host for whole-system tests: a flintd of its own in folders of its own, driven by the `flint` command line as a user
//! would, and an audit at the end that nothing was left behind.
//!
//! What it needs comes from the environment, set by `hack/test system`:
//!
//! | variable | what |
//! |---|---|
//! | `FLINT_BIN` | folder of `flintd`, `flint`, `flint-vmm` |
//! | `FLINT_KERNEL`, `FLINT_INITRD` | the guest's kernel and initrd |
//! | `FLINT_TEST_REGISTRY` | `address:port` of a registry that has the test images |
//! | `FLINT_TEST_DRAWS` | a program that draws random numbers (guest-init/examples) |

// Each test binary uses its own part of this; a harness that cannot go on fails its test.
#![allow(dead_code, clippy::expect_used, clippy::unwrap_used)]

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs;
use std::io::{self, BufRead, BufReader, Read};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use nix::mount::{self, MsFlags};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::{self, CloneFlags};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use nix::sys::signal::{self, Signal};
use nix::unistd::Pid;
use serde_json::Value;
use tempfile::TempDir;

/// Longest wait for anything. Emulated hosts are slow, and a test must not hang.
pub const LIMIT: Duration = Duration::from_secs(120);

/// A program that counts, some a second, and ends with 7 when it is told to.
pub const COUNTS: &str = "trap 'echo bye; exit 7' TERM; n=0; while :; do n=$((n+1)); echo $n; sleep 0.2; done";

/// How much of a log is shown of a test that failed.
const LAST_WORDS: usize = 8 << 10;

/// A running flintd with everything that belongs to it.
pub struct Host {
    dir: TempDir,
    daemon: Option<Child>,
    /// Where a file system of its own is mounted.
    disk: Option<PathBuf>,
    /// How many clones flintd keeps parked.
    pool: usize,
    /// More of flintd's arguments.
    more: Vec<String>,
    /// Name of flintd's cgroup.
    cgroup: &'static str,
    /// A network namespace of its own.
    network: Option<Network>,
    before: Traces,
}

/// What a program printed and how it ended.
#[derive(Debug)]
pub struct Done {
    pub code: i32,
    pub stdout: String,
    pub stderr: String,
}

impl Host {
    /// Starts flintd and waits until it answers. Its pods are booted, each the same way.
    pub fn start() -> Self {
        Self::start_with_pool(0)
    }

    /// The same, with more arguments.
    pub fn start_with<const N: usize>(arguments: [&str; N]) -> Self {
        let mut host = Self::new(0);
        host.more = arguments.map(String::from).to_vec();
        host.start_daemon();
        host
    }

    /// The same, with flintd's state on a file system of its own.
    pub fn start_on_disk(bytes: u64) -> Self {
        let mut host = Self::new(0);
        let state = host.path("state");
        fs::create_dir(&state).expect("a folder");
        let size = format!("size={bytes}");
        mount::mount(
            Some("tmpfs"),
            &state,
            Some("tmpfs"),
            MsFlags::empty(),
            Some(size.as_str()),
        )
        .expect("mount a tmpfs");
        host.disk = Some(state);
        host.start_daemon();
        host
    }

    /// Starts a flintd that keeps clones parked, and waits until it has them.
    pub fn with_pool(pool: usize) -> Self {
        let host = Self::start_with_pool(pool);
        host.wait_pool_full(1);
        host
    }

    /// The same, with more arguments; the folder is the host's.
    pub fn with_pool_and(pool: usize, more: impl FnOnce(&Path) -> Vec<String>) -> Self {
        let mut host = Self::new(pool);
        host.more = more(host.dir.path());
        host.start_daemon();
        host.wait_pool_full(1);
        host
    }

    fn start_with_pool(pool: usize) -> Self {
        let mut host = Self::new(pool);
        host.start_daemon();
        host
    }

    /// A further one beside others: what must differ does, and it has a network namespace of its own, in which the registry is at the
    /// same address.
    pub fn start_beside(cgroup: &'static str) -> Self {
        let mut host = Self::new(0);
        host.cgroup = cgroup;
        host.network = Some(Network::with_registry());
        host.start_daemon();
        host
    }

    fn new(pool: usize) -> Self {
        let before = Traces::now();
        let dir = tempfile::Builder::new()
            .prefix("flint-system-")
            .tempdir_in("/run")
            .expect("a folder in /run");
        Self {
            dir,
            daemon: None,
            disk: None,
            pool,
            more: Vec::new(),
            cgroup: "flint",
            network: None,
            before,
        }
    }

    /// Starts flintd over the folders there are: after a kill, or for the first time.
    pub fn start_daemon(&mut self) {
        let log = fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(self.path("flintd.log"))
            .expect("a log");
        let mut command = match &self.network {
            Some(network) => network.command(bin("flintd")),
            None => Command::new(bin("flintd")),
        };
        let mut daemon = command
            .arg("--state-dir")
            .arg(self.path("state"))
            .arg("--run-dir")
            .arg(self.path("run"))
            .arg("--listen")
            .arg(self.socket())
            // Small enough for a host whose disk is in memory to be filled.
            .args(["--pod-scratch", "96"])
            .args(["--pool", &self.pool.to_string()])
            .args(["--cgroup", self.cgroup])
            .args(&self.more)
            .env("FLINT_VMM", bin("flint-vmm"))
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(log)
            .spawn()
            .expect("flintd starts");
        let ready = lines_of(daemon.stdout.take().expect("piped"));
        match ready.recv_timeout(LIMIT) {
            Ok(line) if line.contains("ready") => {}
            other => panic!("flintd did not get ready: {other:?}\n{}", self.daemon_log()),
        }
        self.daemon = Some(daemon);
    }

    pub fn socket(&self) -> PathBuf {
        self.path("flintd.sock")
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn daemon_log(&self) -> String {
        fs::read_to_string(self.path("flintd.log")).unwrap_or_default()
    }

    /// Waits until flintd has said so often that its pool is full.
    pub fn wait_pool_full(&self, times: usize) {
        self.wait_for_log("the pool is full", times);
    }

    /// Waits until flintd has said something so many times.
    pub fn wait_for_log(&self, text: &str, times: usize) {
        let said = || self.daemon_log().matches(text).count() >= times;
        self.wait_for_change(&self.path("flintd.log"), AddWatchFlags::IN_MODIFY, said);
    }

    /// Waits until a file or folder is there.
    pub fn wait_for_path(&self, path: &Path) {
        let folder = path.parent().expect("it is in a folder");
        self.wait_for_change(folder, AddWatchFlags::IN_CREATE, || path.exists());
    }

    /// Waits until a parked clone has become a pod's.
    pub fn wait_for_sandbox(&self) {
        let folder = self.path("run/sandboxes");
        let claimed = || names_in(&folder).any(|name| !name.starts_with("parked-"));
        self.wait_for_change(&folder, AddWatchFlags::IN_MOVED_TO, claimed);
    }

    fn wait_for_change(&self, path: &Path, change: AddWatchFlags, done: impl Fn() -> bool) {
        let watch = Inotify::init(InitFlags::IN_CLOEXEC).expect("inotify");
        watch.add_watch(path, change).expect("a watch");
        while !done() {
            let mut readable = [PollFd::new(watch.as_fd(), PollFlags::POLLIN)];
            let timeout = PollTimeout::try_from(LIMIT).expect("it is short");
            assert_eq!(poll(&mut readable, timeout), Ok(1), "no change: {}", self.daemon_log());
            watch.read_events().expect("events");
        }
    }

    /// Kills flintd as a crash would; its sandboxes go on.
    pub fn kill_daemon(&mut self) {
        let mut daemon = self.daemon.take().expect("flintd runs");
        daemon.kill().expect("kill");
        daemon.wait().expect("wait");
    }

    /// Runs `flint` with these arguments to its end.
    pub fn flint<S: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = S>) -> Done {
        run(self.command(args))
    }

    /// `flint`, which must succeed.
    pub fn ok<S: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = S>) -> String {
        let done = self.flint(args);
        assert_eq!(done.code, 0, "{done:?}\n{}", self.daemon_log());
        done.stdout
    }

    /// `flint --json`, which must succeed.
    pub fn json<S: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = S>) -> Value {
        let args: Vec<_> = args.into_iter().map(|arg| arg.as_ref().to_owned()).collect();
        let text = self.ok(std::iter::once(OsStr::new("--json").to_owned()).chain(args));
        serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error} in {text:?}"))
    }

    pub fn command<S: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = S>) -> Command {
        let mut command = Command::new(bin("flint"));
        command
            .env("FLINT_SOCKET", self.socket())
            .args(args)
            .stdin(Stdio::null());
        command
    }

    /// Runs a shell line in a pod of its own, removed afterwards.
    pub fn sh(&self, line: &str) -> Done {
        self.flint(["run", "--rm", &busybox(), "--", "sh", "-c", line])
    }

    /// Starts a pod that stays, and returns its uid when it runs.
    pub fn start_pod(&self, name: &str, line: &str, more: &str) -> String {
        let image = busybox();
        self.apply(&format!(
            "apiVersion: v1\nkind: Pod\nmetadata: {{name: {name}}}\nspec:\n  terminationGracePeriodSeconds: 2\n  containers:\n  \
             - name: main\n    image: {image}\n    command: [sh, -c, {}]\n{more}",
            serde_json::to_string(line).expect("JSON")
        ));
        self.pod(name)["meta"]["uid"].as_str().expect("a uid").to_owned()
    }

    /// Applies a manifest and waits until its pods run or have ended.
    pub fn apply(&self, manifest: &str) {
        let file = self.path("manifest.yaml");
        fs::write(&file, manifest).expect("write the manifest");
        self.ok([
            OsStr::new("apply"),
            OsStr::new("--wait"),
            OsStr::new("-f"),
            file.as_os_str(),
        ]);
    }

    /// A pod by name, as JSON.
    pub fn pod(&self, name: &str) -> Value {
        let pods = self.json(["ps", "-a"]);
        let found = pods["pods"]
            .as_array()
            .expect("pods")
            .iter()
            .find(|pod| pod["meta"]["name"] == name);
        found.unwrap_or_else(|| panic!("no pod {name} in {pods}")).clone()
    }

    /// A pod's log as it grows: its lines, to be taken within [`LIMIT`] each, and `flint` itself.
    pub fn follow(&self, name: &str) -> (Child, mpsc::Receiver<String>) {
        let mut child = self
            .command(["logs", "-f", name])
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("it starts");
        let lines = lines_of(child.stdout.take().expect("piped"));
        (child, lines)
    }

    /// Follows a pod's log, which must be the numbers from 0 on, as far as `end`.
    pub fn assert_counts(&self, name: &str, end: u32) {
        let (mut child, lines) = self.follow(name);
        for expected in 0..end {
            assert_eq!(lines.recv_timeout(LIMIT).as_deref(), Ok(expected.to_string().as_str()));
        }
        child.kill().expect("kill");
        child.wait().expect("wait");
    }

    /// The next numbers of a pod's log, which must follow one another; the first of them.
    pub fn next_numbers(&self, name: &str, lines: usize) -> u64 {
        let (mut follower, log) = self.follow(name);
        let next = || {
            let line = log
                .recv_timeout(LIMIT)
                .unwrap_or_else(|_| panic!("{name} does not go on"));
            line.parse::<u64>().unwrap_or_else(|_| panic!("{name} says {line:?}"))
        };
        let numbers: Vec<_> = (0..lines).map(|_| next()).collect();
        follower.kill().expect("kill");
        follower.wait().expect("wait");
        let first = numbers[0];
        let follow = numbers.iter().zip(first..).all(|(number, next)| *number == next);
        assert!(follow, "{name}: {numbers:?}");
        first
    }

    /// The most memory that flintd has had, in KiB.
    pub fn daemon_peak(&self) -> u64 {
        peak(i32::try_from(self.daemon.as_ref().expect("flintd runs").id()).expect("a pid"))
    }

    /// How many files flintd has open.
    pub fn daemon_files(&self) -> usize {
        files(i32::try_from(self.daemon.as_ref().expect("flintd runs").id()).expect("a pid"))
    }

    /// Process ids of this host's VMMs.
    pub fn vmms(&self) -> Vec<i32> {
        self.vmms_and_logs().map(|(pid, _)| pid).collect()
    }

    /// Of those of pods.
    pub fn running_vmms(&self) -> Vec<i32> {
        let parked = |log: &Path| {
            log.components()
                .any(|part| part.as_os_str().as_encoded_bytes().starts_with(b"parked-"))
        };
        self.vmms_and_logs()
            .filter(|(_, log)| !parked(log))
            .map(|(pid, _)| pid)
            .collect()
    }

    fn vmms_and_logs(&self) -> impl Iterator<Item = (i32, PathBuf)> {
        let marker = self.path("run");
        processes("flint-vmm")
            .into_iter()
            .filter(move |(_, log)| log.starts_with(&marker))
    }
}

impl Host {
    /// For whoever reads of a test that failed: what flintd said, what became of the pods, the last words of each guest.
    fn tell_what_is_there(&self) {
        eprintln!("--- flintd's log\n{}", self.daemon_log());
        eprintln!("--- pods\n{}", self.flint(["--json", "ps", "--all"]).stdout);
        for sandbox in names_in(self.path("run").join("sandboxes")) {
            for log in ["vmm.log", "serial.log"] {
                let path = self.path("run").join("sandboxes").join(&sandbox).join(log);
                let words = fs::read(&path).unwrap_or_default();
                let last = &words[words.len().saturating_sub(LAST_WORDS)..];
                eprintln!("--- {log} of {sandbox}\n{}", String::from_utf8_lossy(last));
            }
        }
    }
}

impl Drop for Host {
    /// Ends all pods and flintd, then looks for what is left.
    fn drop(&mut self) {
        if thread::panicking() {
            self.tell_what_is_there();
        }
        if self.daemon.is_some() {
            let _ = self.flint(["rm", "--all", "--force"]);
        }
        if let Some(mut daemon) = self.daemon.take() {
            let _ = signal::kill(pid_of(&daemon), Signal::SIGTERM);
            let _ = daemon.wait();
        }
        if let Some(disk) = &self.disk {
            let _ = mount::umount(disk);
        }
        if self.network.is_some() {
            let _ = fs::remove_dir(Path::new("/sys/fs/cgroup").join(self.cgroup));
        }
        if !thread::panicking() {
            let left: Vec<_> = Traces::now().0.difference(&self.before.0).cloned().collect();
            assert!(left.is_empty(), "left behind: {left:#?}");
        }
    }
}

/// A network namespace that is there as long as this value.
struct Network {
    keeper: Child,
}

impl Network {
    /// One whose loopback has the test registry, too.
    fn with_registry() -> Self {
        let mut keeper = Command::new("unshare")
            .args(["--net", "sh", "-c", "ip link set lo up && echo up && exec cat"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("unshare starts");
        let said = lines_of(keeper.stdout.take().expect("piped"));
        assert_eq!(said.recv_timeout(LIMIT).as_deref(), Ok("up"));
        let network = Self { keeper };
        let (path, registry) = (network.path(), variable("FLINT_TEST_REGISTRY"));
        let address = registry.clone();
        // A socket stays in the namespace that its thread was in when it was made.
        let inside = thread::spawn(move || {
            let namespace = fs::File::open(path).expect("it is there");
            sched::setns(namespace, CloneFlags::CLONE_NEWNET).expect("enter it");
            TcpListener::bind(address).expect("nobody has the port in there")
        });
        let listener = inside.join().expect("no panic");
        // Ends with the test's process.
        thread::spawn(move || {
            for client in listener.incoming().map_while(Result::ok) {
                let server = TcpStream::connect(&registry).expect("the registry is there");
                pass_on(&client, &server);
                pass_on(&server, &client);
            }
        });
        network
    }

    fn path(&self) -> PathBuf {
        format!("/proc/{}/ns/net", self.keeper.id()).into()
    }

    /// A program in it.
    fn command(&self, program: PathBuf) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--net={}", self.path().display())).arg(program);
        command
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        drop(self.keeper.stdin.take());
        let _ = self.keeper.wait();
    }
}

/// Copies what one end says to the other, until it has said all.
fn pass_on(from: &TcpStream, to: &TcpStream) {
    let mut from = from.try_clone().expect("a descriptor");
    let mut to = to.try_clone().expect("a descriptor");
    thread::spawn(move || {
        let _ = io::copy(&mut from, &mut to);
        let _ = to.shutdown(Shutdown::Write);
    });
}

/// Everything that a sandbox leaves traces in.
struct Traces(BTreeSet<String>);

impl Traces {
    fn now() -> Self {
        let mut traces = BTreeSet::new();
        for name in ["flint-vmm", "flint-pages"] {
            let pids = processes(name).into_iter().map(|(pid, _)| pid);
            traces.extend(pids.map(|pid| format!("process {name} {pid}")));
        }
        let interfaces = names_in("/sys/class/net").filter(|name| name.starts_with("flt"));
        traces.extend(interfaces.map(|name| format!("interface {name}")));
        traces.extend(
            names_in("/sys/fs/cgroup/flint")
                .filter(|name| !name.contains('.'))
                .map(|n| format!("cgroup {n}")),
        );
        let beside = names_in("/sys/fs/cgroup").filter(|name| name.starts_with("flint-"));
        traces.extend(beside.map(|name| format!("cgroup {name}")));
        let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
        traces.extend(
            mounts
                .lines()
                .filter(|line| line.contains("flint-system-"))
                .map(|line| format!("mount {line}")),
        );
        Self(traces)
    }
}

fn names_in(dir: impl AsRef<Path>) -> impl Iterator<Item = String> {
    fs::read_dir(dir)
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| entry.file_name().into_string().ok())
}

/// Processes by name, each with the file that its stderr goes to, which tells whose it is.
fn processes(name: &str) -> Vec<(i32, PathBuf)> {
    names_in("/proc")
        .filter_map(|entry| entry.parse().ok())
        .filter(|pid: &i32| fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|comm| comm.trim() == name))
        .map(|pid| (pid, fs::read_link(format!("/proc/{pid}/fd/2")).unwrap_or_default()))
        .collect()
}

/// The most memory that a process has had, in KiB.
pub fn peak(pid: i32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("it is there");
    let line = status.lines().find(|line| line.starts_with("VmHWM:")).expect("proc(5)");
    line.split_whitespace()
        .nth(1)
        .expect("a size")
        .parse()
        .expect("a number")
}

/// How many files a process has open.
pub fn files(pid: i32) -> usize {
    names_in(&format!("/proc/{pid}/fd")).count()
}

pub fn kill(pid: i32) {
    signal::kill(Pid::from_raw(pid), Signal::SIGKILL).expect("it is there to be killed");
}

fn pid_of(child: &Child) -> Pid {
    Pid::from_raw(i32::try_from(child.id()).expect("a pid"))
}

/// Runs a program to its end, within the limit.
pub fn run(mut command: Command) -> Done {
    let mut child = command
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("it starts");
    let pid = pid_of(&child);
    let (ended, watchdog) = mpsc::channel::<()>();
    let killer = thread::spawn(move || {
        if watchdog.recv_timeout(LIMIT) == Err(mpsc::RecvTimeoutError::Timeout) {
            // The child is not waited for before this thread has ended, so its pid is its own.
            let _ = signal::kill(pid, Signal::SIGKILL);
        }
    });
    let mut stderr = child.stderr.take().expect("piped");
    let errors = thread::spawn(move || {
        let mut text = Vec::new();
        stderr.read_to_end(&mut text).map(|_| text)
    });
    let mut stdout = Vec::new();
    child
        .stdout
        .take()
        .expect("piped")
        .read_to_end(&mut stdout)
        .expect("read its output");
    let stderr = errors.join().expect("no panic").expect("read its errors");
    drop(ended);
    killer.join().expect("no panic");
    let status = child.wait().expect("wait");
    let output = Output { status, stdout, stderr };
    Done {
        code: output.status.code().unwrap_or(-1),
        stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
    }
}

/// The lines that something prints, as they come.
pub fn lines_of(stream: impl Read + Send + 'static) -> mpsc::Receiver<String> {
    let (send, lines) = mpsc::channel();
    thread::spawn(move || {
        for line in BufReader::new(stream).lines().map_while(Result::ok) {
            // Reading on keeps the writer from blocking when nobody listens any more.
            let _ = send.send(line);
        }
    });
    lines
}

pub fn bin(name: &str) -> PathBuf {
    Path::new(&variable("FLINT_BIN")).join(name)
}

/// A reference to a test image.
pub fn image(name: &str) -> String {
    format!("{}/{name}", variable("FLINT_TEST_REGISTRY"))
}

pub fn busybox() -> String {
    image("busybox:1")
}

pub fn variable(name: &str) -> String {
    std::env::var(name).unwrap_or_else(|_| panic!("{name} is not set: run these tests by `hack/test system`"))
}
