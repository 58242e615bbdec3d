//! Spawns a program into a cgroup with exactly the descriptors it is meant to have, and waits for processes by pidfd.
//!
//! `clone3` with `CLONE_INTO_CGROUP` makes the child inside its cgroup. Writing `cgroup.procs` instead would take the
//! host-wide thread-group lock for writing and wait for an RCU grace period, milliseconds of each start, and the program
//! would have run outside its limits first. `CLONE_PIDFD` names the child without the race that process ids have.
//!
//! The child of `clone3` is a copy of one thread of a threaded program, so between clone and exec it may make
//! async-signal-safe calls only (signal-safety(7)): everything that allocates is done before, by the parent.

use std::{
    ffi::{CString, NulError},
    fs::{self, File},
    io::{self, Read},
    os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
    path::{Path, PathBuf},
    process::ExitStatus,
};

use nix::{
    errno::Errno,
    fcntl::OFlag,
    sys::{
        prctl,
        wait::{Id, WaitPidFlag, WaitStatus, waitid},
    },
    unistd::Pid,
};
use std::os::unix::process::ExitStatusExt;
use thiserror::Error;
use tokio::io::{Interest, unix::AsyncFd};

use crate::cgroup::Cgroup;

/// A program and what it gets.
pub struct Program<'a> {
    /// Absolute path.
    pub path: &'a Path,
    /// Arguments after the program's own name.
    pub args: &'a [String],
    /// Become descriptors 3, 4, ... in this order. All others are closed.
    pub fds: &'a [BorrowedFd<'a>],
    /// Where standard output and error go; standard input is `/dev/null`.
    pub log: BorrowedFd<'a>,
    /// Folder of the cgroup to run in.
    pub cgroup: BorrowedFd<'a>,
}

/// A program could not be started.
#[derive(Debug, Error)]
pub enum SpawnError {
    /// An argument has a NUL byte.
    #[error("{0:?} has a NUL byte and cannot be passed to a program")]
    Nul(PathBuf, #[source] NulError),
    /// The kernel made no process.
    #[error("could not make a process in the sandbox's cgroup (Linux 5.7 or newer is needed)")]
    Clone(#[source] io::Error),
    /// The process could not become the program.
    #[error("could not run {0}: is it installed and executable? See --vmm")]
    Exec(PathBuf, #[source] io::Error),
    /// Something before that failed.
    #[error("could not prepare to run {0}")]
    Prepare(PathBuf, #[source] io::Error),
}

/// A process, named by pidfd.
#[derive(Debug)]
pub struct Process {
    pid: i32,
    pidfd: AsyncFd<OwnedFd>,
}

impl Process {
    /// The process that has `pid` now. The caller proves that the id has not passed to another process.
    pub fn open(pid: i32) -> io::Result<Self> {
        // SAFETY: pidfd_open takes two integers and touches no memory of ours.
        let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
        let fd = RawFd::try_from(Errno::result(fd)?).map_err(io::Error::other)?;
        // SAFETY: the kernel just gave us this descriptor, nobody else has it.
        Self::from_pidfd(pid, unsafe { OwnedFd::from_raw_fd(fd) })
    }

    fn from_pidfd(pid: i32, pidfd: OwnedFd) -> io::Result<Self> {
        // SAFETY: an owned descriptor stays the same one for as long as it is registered.
        let pidfd = unsafe { AsyncFd::register_with_interest(pidfd, Interest::READABLE)? };
        Ok(Self { pid, pidfd })
    }

    /// Process id on this host.
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// Waits until the process has ended. `None` if it is no child of ours, so that its status went to somebody else.
    pub async fn ended(&self) -> io::Result<Option<ExitStatus>> {
        // A pidfd turns readable when the process ends (pidfd_open(2)) and stays so.
        let _readable = self.pidfd.readable().await?;
        let options = WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG;
        match waitid(Id::PIDFd(self.pidfd.as_fd()), options) {
            Ok(status) => Ok(exit_status(status)),
            Err(Errno::ECHILD) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }
}

fn exit_status(status: WaitStatus) -> Option<ExitStatus> {
    match status {
        WaitStatus::Exited(_, code) => Some(ExitStatus::from_raw(code << 8)),
        WaitStatus::Signaled(_, signal, _) => Some(ExitStatus::from_raw(signal as i32)),
        _ => None,
    }
}

/// Makes this process the parent of orphaned descendants (prctl(2), `PR_SET_CHILD_SUBREAPER`), so that it sees the exit
/// status of a VMM whose launcher has left. Holds for processes that are spawned afterwards.
pub fn become_subreaper() -> io::Result<()> {
    prctl::set_child_subreaper(true)?;
    Ok(())
}

/// Reaps the children of ours that ended in a cgroup and that nobody waits for. Only children are looked at, so no id can
/// have passed to another process. Call it once the cgroup is empty: a process leaves its cgroup a moment before it can be
/// reaped, and hands its own children to us after that moment, so this waits for each, and looks again until there is none.
pub fn reap_children_in(cgroup: &Cgroup) -> Vec<ExitStatus> {
    let mut statuses = Vec::new();
    loop {
        let before = statuses.len();
        reap_those_known(cgroup, &mut statuses);
        if statuses.len() == before {
            return statuses;
        }
    }
}

fn reap_those_known(cgroup: &Cgroup, statuses: &mut Vec<ExitStatus>) {
    let Ok(tasks) = fs::read_dir("/proc/self/task") else {
        return;
    };
    for task in tasks.flatten() {
        // A task that has ended has handed its children to another one, which is looked at later or was there before.
        let children = fs::read_to_string(task.path().join("children")).unwrap_or_default();
        let children = children.split_whitespace().filter_map(|pid| pid.parse().ok());
        for pid in children.filter(|pid| cgroup.is_home_of(*pid)) {
            // Somebody may have been quicker, which is as good.
            let reaped = waitid(Id::Pid(Pid::from_raw(pid)), WaitPidFlag::WEXITED);
            statuses.extend(reaped.ok().and_then(exit_status));
        }
    }
}

/// Spawns a program. Blocks until it has been executed, or has not.
pub fn spawn(program: &Program<'_>) -> Result<Process, SpawnError> {
    let prepare = |error: io::Error| SpawnError::Prepare(program.path.to_owned(), error);
    let c_string = |text: &str| CString::new(text).map_err(|error| SpawnError::Nul(text.into(), error));
    let path = c_string(&program.path.to_string_lossy())?;
    let args = program
        .args
        .iter()
        .map(|arg| c_string(arg))
        .collect::<Result<Vec<_>, _>>()?;
    let argv: Vec<*const libc::c_char> = std::iter::once(path.as_ptr())
        .chain(args.iter().map(|arg| arg.as_ptr()))
        .chain([std::ptr::null()])
        .collect();
    let envp = [std::ptr::null()];

    let null = File::open("/dev/null").map_err(prepare)?;
    let (result, report) = nix::unistd::pipe2(OFlag::O_CLOEXEC).map_err(|error| prepare(error.into()))?;
    let mut wanted = vec![null.as_raw_fd(), program.log.as_raw_fd(), program.log.as_raw_fd()];
    wanted.extend(program.fds.iter().map(AsRawFd::as_raw_fd));
    wanted.push(report.as_raw_fd());

    let child = ChildPlan {
        argv: &argv,
        envp: &envp,
        wanted: &mut wanted,
    };
    let process = clone_into(program.cgroup, child).map_err(SpawnError::Clone)?;
    drop(report);
    let failed = |error| SpawnError::Exec(program.path.to_owned(), error);
    match read_report(result).map_err(prepare)? {
        None => Ok(process),
        Some(error) => {
            // It has called _exit: reap it, so that no zombie stays.
            let _ = waitid(Id::PIDFd(process.pidfd.as_fd()), WaitPidFlag::WEXITED);
            Err(failed(error))
        }
    }
}

/// Nothing on success, because the pipe closes on exec; else the errno that the child met.
fn read_report(result: OwnedFd) -> io::Result<Option<io::Error>> {
    let mut bytes = Vec::new();
    File::from(result).read_to_end(&mut bytes)?;
    Ok(<[u8; 4]>::try_from(bytes)
        .ok()
        .map(|errno| io::Error::from_raw_os_error(i32::from_ne_bytes(errno))))
}

/// What the child needs, all of it allocated by the parent.
struct ChildPlan<'a> {
    argv: &'a [*const libc::c_char],
    envp: &'a [*const libc::c_char],
    /// Descriptors that become 0, 1, 2, ...; the last is where an errno is reported and closes on exec.
    wanted: &'a mut [RawFd],
}

/// `struct clone_args` of clone(2), as Linux 5.7 has it.
#[repr(C)]
#[derive(Default)]
struct CloneArgs {
    flags: u64,
    pidfd: u64,
    child_tid: u64,
    parent_tid: u64,
    exit_signal: u64,
    stack: u64,
    stack_size: u64,
    tls: u64,
    set_tid: u64,
    set_tid_size: u64,
    cgroup: u64,
}

const _: () = assert!(size_of::<CloneArgs>() == 88, "CLONE_ARGS_SIZE_VER2");

fn clone_into(cgroup: BorrowedFd<'_>, mut child: ChildPlan<'_>) -> io::Result<Process> {
    const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;
    let mut pidfd: RawFd = -1;
    let args = CloneArgs {
        flags: CLONE_INTO_CGROUP | u64::from(libc::CLONE_PIDFD.cast_unsigned()),
        pidfd: (&raw mut pidfd) as u64,
        exit_signal: u64::from(libc::SIGCHLD.cast_unsigned()),
        cgroup: u64::from(cgroup.as_raw_fd().cast_unsigned()),
        ..CloneArgs::default()
    };
    // SAFETY: without CLONE_VM and with no stack this is a fork: the child runs on its own copy of this stack and memory.
    // `args` and `pidfd` outlive the call. The child goes to `run_child`, which makes async-signal-safe calls only, touches
    // memory that the parent made, and never returns.
    let pid = unsafe { libc::syscall(libc::SYS_clone3, &raw const args, size_of::<CloneArgs>()) };
    match Errno::result(pid)? {
        0 => run_child(&mut child),
        pid => {
            // SAFETY: with CLONE_PIDFD a successful clone3 stores a new descriptor there; nobody else has it.
            let pidfd = unsafe { OwnedFd::from_raw_fd(pidfd) };
            Process::from_pidfd(i32::try_from(pid).map_err(io::Error::other)?, pidfd)
        }
    }
}

/// The child's life. Every call in here is a plain system call.
fn run_child(child: &mut ChildPlan<'_>) -> ! {
    let report = child.wanted.len() - 1;
    // SAFETY: integers and pointers into memory that the parent prepared and that this copy of it keeps until exec.
    unsafe {
        let errno = become_program(child.argv, child.envp, child.wanted, report);
        let bytes = errno.to_ne_bytes();
        // The report descriptor may or may not have been moved yet; its first place is always valid.
        libc::write(child.wanted[report], bytes.as_ptr().cast(), bytes.len());
        libc::_exit(127)
    }
}

/// Arranges the descriptors, resets signals and executes. Returns the errno of what failed.
///
/// # Safety
/// Only in a just forked child; `argv` and `envp` end with null and point to C strings.
unsafe fn become_program(
    argv: &[*const libc::c_char],
    envp: &[*const libc::c_char],
    wanted: &mut [RawFd],
    report: usize,
) -> i32 {
    let count = libc::c_int::try_from(wanted.len()).unwrap_or(libc::c_int::MAX);
    // SAFETY: see the function's contract; all calls take integers or such pointers.
    unsafe {
        // First out of the way of the final numbers, then to them.
        for fd in wanted.iter_mut() {
            let moved = libc::fcntl(*fd, libc::F_DUPFD_CLOEXEC, count);
            if moved < 0 {
                return Errno::last_raw();
            }
            *fd = moved;
        }
        for (number, fd) in (0..).zip(wanted.iter()).take(report) {
            if libc::dup2(*fd, number) < 0 {
                return Errno::last_raw();
            }
        }
        // Close all others, but let the report work until exec.
        if libc::syscall(
            libc::SYS_close_range,
            count - 1,
            libc::c_uint::MAX,
            libc::CLOSE_RANGE_CLOEXEC,
        ) < 0
        {
            return Errno::last_raw();
        }
        // Rust ignores SIGPIPE, and ignored signals stay ignored over exec.
        libc::signal(libc::SIGPIPE, libc::SIG_DFL);
        let mut none = std::mem::zeroed();
        libc::sigemptyset(&raw mut none);
        libc::sigprocmask(libc::SIG_SETMASK, &raw const none, std::ptr::null_mut());
        // A session of its own: what is typed at flintd's terminal does not reach the sandboxes.
        libc::setsid();
        libc::execve(argv[0], argv.as_ptr(), envp.as_ptr());
        Errno::last_raw()
    }
}
