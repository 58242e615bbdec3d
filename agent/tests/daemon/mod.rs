//! The real flintd and flint in mount and network namespaces of their own, for tests of what they say and survive. No guest
//! comes up here: the kernel is none.

use std::{
    env, fs,
    io::{self, BufRead, BufReader},
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

use hyper_util::rt::TokioIo;
use nix::{
    sys::{
        inotify::{AddWatchFlags, InitFlags, Inotify},
        signal::{Signal, kill},
    },
    unistd::Pid,
};
use tempfile::TempDir;
use tokio::net::UnixStream;
use tonic::transport::{Channel, Endpoint};

/// What a daemon is started with.
#[derive(Default)]
pub struct Start<'a> {
    /// Shell lines that arrange its mount namespace; `$T` is its folder.
    pub setup: &'a str,
    /// Further arguments.
    pub args: &'a [&'a str],
    /// Whether KVM_CREATE_VM answers EBUSY, as it does while another hypervisor has the processor.
    pub busy: bool,
}

/// A running flintd. Ended when dropped; nothing of it may be left then.
pub struct Daemon {
    folder: TempDir,
    child: Child,
}

/// What a program printed and how it ended.
#[allow(dead_code, reason = "not every test looks at all of it")]
#[derive(Debug)]
pub struct Done {
    pub code: i32,
    pub stdout: String,
    pub stderr: String,
}

impl Daemon {
    /// Starts one and waits until it answers.
    pub fn start(folder: TempDir, start: &Start<'_>) -> Self {
        let child = spawn(folder.path(), start);
        Self { folder, child }
    }

    /// Kills it as a crash would.
    #[allow(dead_code, reason = "not every test does")]
    pub fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Starts another one over its folders, in new namespaces.
    #[allow(dead_code, reason = "not every test does")]
    pub fn start_again(&mut self, start: &Start<'_>) {
        self.child = spawn(self.folder.path(), start);
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub fn log(&self) -> String {
        fs::read_to_string(self.path("flintd.log")).unwrap()
    }

    /// Waits until its log says something so often.
    #[allow(dead_code, reason = "not every test does")]
    pub fn wait_for_log(&self, words: &str, times: usize) {
        let watch = Inotify::init(InitFlags::IN_CLOEXEC).unwrap();
        watch
            .add_watch(&self.path("flintd.log"), AddWatchFlags::IN_MODIFY)
            .unwrap();
        while self.log().matches(words).count() < times {
            watch.read_events().unwrap();
        }
    }

    pub fn socket(&self) -> PathBuf {
        self.path("run/flintd.sock")
    }

    /// A connection to its unix socket, which needs no namespace.
    pub async fn channel(&self) -> Channel {
        let path = self.socket();
        let connector = tower::service_fn(move |_| {
            let path = path.clone();
            async move { UnixStream::connect(path).await.map(TokioIo::new) }
        });
        let endpoint = Endpoint::from_static("http://flintd");
        endpoint.connect_with_connector(connector).await.unwrap()
    }

    /// Runs a shell line in flintd's namespaces; `flint` is the command line with its socket.
    pub fn sh(&self, line: &str) -> Done {
        let output = Command::new("nsenter")
            .args(["-m", "-n", "-t", &self.child.id().to_string(), "sh", "-c"])
            .arg(format!("flint() {{ {} \"$@\"; }}; {line}", env!("CARGO_BIN_EXE_flint")))
            .env("FLINT", env!("CARGO_BIN_EXE_flint"))
            .env("FLINT_SOCKET", self.socket())
            .env("T", self.folder.path())
            .env("C", self.folder.path().file_name().unwrap())
            .stdin(Stdio::null())
            .output()
            .unwrap();
        Done {
            code: output.status.code().unwrap_or(-1),
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }

    /// Resident memory, in KiB.
    #[allow(dead_code, reason = "not every test asks")]
    pub fn resident_kib(&self) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
        line.trim().trim_end_matches(" kB").parse().unwrap()
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let pid = Pid::from_raw(i32::try_from(self.child.id()).unwrap());
        let _ = kill(pid, Signal::SIGTERM);
        let status = self.child.wait();
        let cgroup = cgroups().join(self.folder.path().file_name().unwrap());
        let removed = fs::remove_dir(&cgroup);
        if std::thread::panicking() {
            eprintln!("--- flintd's log\n{}", self.log());
            return;
        }
        assert!(status.is_ok_and(|status| status.success()), "{}", self.log());
        assert!(removed.is_ok(), "{}: {removed:?}", cgroup.display());
        let sandboxes: Vec<_> = fs::read_dir(self.path("run/sandboxes")).unwrap().collect();
        assert!(sandboxes.is_empty(), "{sandboxes:?}");
    }
}

/// Runs flintd, and waits until it answers.
fn spawn(path: &Path, start: &Start<'_>) -> Child {
    let line = format!(
        "set -e; ip link set lo up; {}\nexec {} --state-dir $T/state --run-dir $T/run --cgroup $C --vmm {} --kernel $T/kernel \
         --initrd $T/initrd {} \"$@\"",
        start.setup,
        env!("CARGO_BIN_EXE_flintd"),
        vmm().display(),
        if start.args.contains(&"--pool") { "" } else { "--pool 0" },
    );
    let log = fs::File::create(path.join("flintd.log")).unwrap();
    let mut command = Command::new("unshare");
    command
        .args(["-m", "-n", "sh", "-c", &line, "flintd"])
        .args(start.args)
        .env("T", path)
        .env("C", path.file_name().unwrap())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(log);
    if start.busy {
        // SAFETY: two system calls with pointers to constants and to the stack, nothing else.
        unsafe { command.pre_exec(answer_busy) };
    }
    let mut child = command.spawn().unwrap();
    let mut ready = String::new();
    BufReader::new(child.stdout.take().unwrap())
        .read_line(&mut ready)
        .unwrap();
    let log = || fs::read_to_string(path.join("flintd.log")).unwrap();
    assert!(ready.starts_with("ready"), "{}", log());
    child
}

/// A folder for a daemon, with a kernel and an initrd that look like ones.
pub fn folder() -> TempDir {
    let folder = tempfile::Builder::new().prefix("flint-kvm-daemon-").tempdir().unwrap();
    fs::write(folder.path().join("kernel"), "\x7fELF").unwrap();
    fs::write(folder.path().join("initrd"), "initrd").unwrap();
    folder
}

/// Makes ioctl(2) with KVM_CREATE_VM fail with EBUSY in this process and those that it becomes (seccomp(2)).
fn answer_busy() -> io::Result<()> {
    use nix::libc;
    const KVM_CREATE_VM: u32 = 0xae01;
    let statement = |code: u32, k: u32| libc::sock_filter {
        code: code as u16,
        jt: 0,
        jf: 0,
        k,
    };
    let unless = |k: u32, skip: u8| libc::sock_filter {
        code: (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16,
        jt: 0,
        jf: skip,
        k,
    };
    let load = |offset: u32| statement(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, offset);
    let answer = |k: u32| statement(libc::BPF_RET | libc::BPF_K, k);
    // struct seccomp_data: the call's number at 0, its second argument at 24.
    let mut filter = [
        load(0),
        unless(libc::SYS_ioctl as u32, 3),
        load(24),
        unless(KVM_CREATE_VM, 1),
        answer(libc::SECCOMP_RET_ERRNO | libc::EBUSY as u32),
        answer(libc::SECCOMP_RET_ALLOW),
    ];
    let program = libc::sock_fprog {
        len: filter.len() as u16,
        filter: filter.as_mut_ptr(),
    };
    // SAFETY: the program and its filter are on this stack and are copied by the call.
    let set = unsafe { libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const program) };
    if set == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Where cgroup2 is mounted.
fn cgroups() -> PathBuf {
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
    let mount = mounts
        .lines()
        .map(|line| line.split(' ').collect::<Vec<_>>())
        .find(|parts| parts[2] == "cgroup2");
    mount.expect("cgroup2")[1].into()
}

/// What hides the page server from a flintd, in a mount namespace of its own: a file that cannot be run is in its place.
#[allow(dead_code, reason = "not every test does")]
pub fn without_pages() -> String {
    format!(
        "mount --bind /dev/null {}",
        vmm().with_file_name("flint-pages").display()
    )
}

/// flint-vmm: from the folder that FLINT_BIN names, or of the same build as this test.
fn vmm() -> PathBuf {
    let built = Path::new(env!("CARGO_BIN_EXE_flintd")).with_file_name("flint-vmm");
    env::var_os("FLINT_BIN").map_or(built, |folder| Path::new(&folder).join("flint-vmm"))
}
