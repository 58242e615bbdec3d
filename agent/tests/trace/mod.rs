//! System calls of this process and of VMMs, by strace(1).

use std::{
    fs,
    path::{Path, PathBuf},
    process::Stdio,
};

use nix::unistd::Pid;
use tokio::{
    io::{AsyncBufReadExt, BufReader},
    process::{Child, Command},
};

/// A call that changes nothing and that nobody else makes.
const MARK: &str = "/flint-test-mark";

/// A trace that is being taken.
pub struct Trace {
    output: PathBuf,
    strace: Child,
}

impl Trace {
    /// Begins to trace all threads of these processes and of this one.
    pub async fn of(processes: &[Pid], output: &Path) -> Self {
        let mut command = Command::new("strace");
        command.args(["-f", "-ttt", "-yy", "-o"]).arg(output);
        for pid in processes.iter().copied().chain([Pid::this()]) {
            command.arg("-p").arg(pid.to_string());
        }
        let mut strace = command
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .expect("install the package strace");
        let mut lines = BufReader::new(strace.stderr.take().unwrap()).lines();
        for _ in 0..=processes.len() {
            let line = lines.next_line().await.unwrap().unwrap();
            assert!(line.contains("attached"), "{line}");
        }
        // Whatever else it says must not fill the pipe.
        tokio::spawn(async move { while let Ok(Some(_)) = lines.next_line().await {} });
        Self {
            output: output.to_owned(),
            strace,
        }
    }

    /// All calls from the mark to the first one by which a vCPU runs.
    pub fn until_first_run(mut self) -> Vec<String> {
        // It detaches, and writes what it has.
        self.strace.start_kill().unwrap();
        let text = fs::read_to_string(&self.output).unwrap();
        let lines = text.lines().skip_while(|line| !line.contains(MARK)).skip(1);
        let calls: Vec<_> = lines
            .take_while(|line| !line.contains("KVM_RUN"))
            .map(String::from)
            .collect();
        assert!(
            text.contains(MARK) && text.contains("KVM_RUN"),
            "the trace has both ends"
        );
        calls
    }
}

/// Marks the place in the trace.
pub fn mark() {
    let _ = nix::unistd::access(MARK, nix::unistd::AccessFlags::F_OK);
}

/// Whether nothing of the kind may happen on a pod's way.
pub fn is_forbidden(call: &str) -> bool {
    const NAMES: [&str; 23] = [
        "open(",
        "openat(",
        "openat2(",
        "creat(",
        "stat(",
        "newfstatat(",
        "access(",
        "mkdir(",
        "rename(",
        "unlink(",
        "clone(",
        "clone3(",
        "fork(",
        "vfork(",
        "execve(",
        "mount(",
        "umount2(",
        "unshare(",
        "setns(",
        "KVM_CREATE",
        "KVM_SET_USER_MEMORY",
        "NETLINK",
        "cgroup",
    ];
    NAMES
        .iter()
        .any(|name| call.contains(&format!(" {name}")) || (!name.ends_with('(') && call.contains(name)))
}
