//! PID 1's side of a helper: start it, hear its report, take the terminal.

use std::{
    io,
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::{net::UnixListener, process::CommandExt},
    },
    path::PathBuf,
    process::{Command, Stdio},
};

use nix::{
    cmsg_space,
    fcntl::{FcntlArg, FdFlag, OFlag, fcntl},
    sys::socket::{ControlMessageOwned, MsgFlags, recvmsg},
    unistd::pipe2,
};

use super::{
    helper::console_socket,
    report::{Report, Reports},
};
use crate::{
    paths::Name,
    reaper::{EndReceiver, Reaper},
    stream_fd::StreamFd,
    sys,
};

/// Why there is no process.
#[derive(Debug, thiserror::Error)]
pub enum LaunchError {
    /// Before the helper ran.
    #[error("{step}")]
    Start {
        step: &'static str,
        #[source]
        source: io::Error,
    },
    /// The helper says why.
    #[error("{0}")]
    Refused(String),
    /// It did not come so far.
    #[error("the helper {0} before it had made the process; the guest's console may say why")]
    Died(String),
}

impl LaunchError {
    fn start(step: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Start { step, source }
    }
}

/// What is to be launched.
#[derive(Debug)]
pub struct Launch<'a> {
    /// In which, or as which, container.
    pub container: &'a Name,
    /// Number of the exec; `None` creates the container.
    pub exec: Option<u32>,
    /// The process's ends of its pipes; none with a terminal.
    pub stdio: [Option<OwnedFd>; 3],
    /// Does it get a terminal?
    pub terminal: bool,
    /// First process of the PID namespace to join.
    pub pause: Option<i32>,
}

/// A process that exists.
#[derive(Debug)]
pub struct Launched {
    /// In the guest's PID namespace.
    pub pid: i32,
    /// Comes when it has ended.
    pub end: EndReceiver,
    /// Says whether its program could be executed.
    pub reports: Reports,
    /// The code and text of a program that could not be executed, if that is known already.
    pub exec_failed: Option<(u8, String)>,
    /// The terminal's master.
    pub terminal: Option<OwnedFd>,
}

impl Launch<'_> {
    /// Runs the helper.
    pub async fn run(self, reaper: &Reaper) -> Result<Launched, LaunchError> {
        let console = self
            .terminal
            .then(|| Console::listen(console_socket(self.container, self.exec)))
            .transpose();
        let console = console.map_err(LaunchError::start("listening for the terminal"))?;
        let (reader, writer) =
            pipe2(OFlag::O_CLOEXEC).map_err(|error| LaunchError::start("making a pipe")(error.into()))?;
        let reader = StreamFd::reading(reader).map_err(LaunchError::start("making a pipe"))?;
        let birth = reaper.birth();
        let helper = self.spawn(writer).map_err(LaunchError::start("starting the helper"))?;
        let helper_end = birth.claim(helper);
        let mut reports = Reports::new(reader);
        let mut exec_failed = None;
        let pid = loop {
            match reports.next().await {
                Some(Report::Created { pid }) => break pid,
                Some(Report::ExecFailed { code, message }) => exec_failed = Some((code, message)),
                Some(Report::Failed { message }) => return Err(LaunchError::Refused(message)),
                None => {
                    let status = helper_end
                        .await
                        .map_or("vanished".to_owned(), |ended| ended.status.to_string());
                    return Err(LaunchError::Died(format!("ended ({status})")));
                }
            }
        };
        let end = birth.claim(pid);
        let terminal = console.map(|console| console.receive()).transpose();
        let terminal = terminal.map_err(LaunchError::start("receiving the terminal"))?;
        Ok(Launched {
            pid,
            end,
            reports,
            exec_failed,
            terminal,
        })
    }

    /// The descriptors lose their close-on-exec flag here. Nothing else is forked meanwhile: PID 1 spawns on one thread only,
    /// and this function does not wait.
    fn spawn(self, report: OwnedFd) -> io::Result<i32> {
        let mut command = Command::new("/proc/self/exe");
        command.arg0("flint-init").arg("container");
        command
            .arg(if self.exec.is_some() { "exec" } else { "create" })
            .arg(self.container.as_str());
        command.stdin(Stdio::null()).env_clear().current_dir("/");
        let named = ["stdin", "stdout", "stderr"].into_iter().zip(&self.stdio);
        let named = named.filter_map(|(name, fd)| Some((name, fd.as_ref()?)));
        for (name, fd) in named.chain([("report", &report)]) {
            fcntl(fd, FcntlArg::F_SETFD(FdFlag::empty()))?;
            command.arg(format!("{name}={}", fd.as_raw_fd()));
        }
        if let Some(number) = self.exec {
            command.arg(format!("exec={number}"));
        }
        if let Some(pid) = self.pause {
            command.arg(format!("pause={pid}"));
        }
        let pid = spawn(&mut command);
        // Its only writers are the helper's now: the pipe ends with them.
        drop(report);
        pid
    }
}

/// Starts a child that the reaper will wait for.
pub fn spawn(command: &mut Command) -> io::Result<i32> {
    let child = command.spawn()?;
    i32::try_from(child.id()).map_err(|_| io::Error::other("a pid that is no pid_t"))
}

/// A socket that the process's set-up sends its terminal's master to; removed when it has been used.
struct Console {
    listener: UnixListener,
    path: PathBuf,
}

impl Console {
    fn listen(path: PathBuf) -> io::Result<Self> {
        let listener = UnixListener::bind(&path)?;
        listener.set_nonblocking(true)?;
        Ok(Self { listener, path })
    }

    /// Called after the helper's success: connection and message are there by then, so nothing waits.
    fn receive(&self) -> io::Result<OwnedFd> {
        let (stream, _) = self.listener.accept()?;
        stream.set_nonblocking(true)?;
        let mut name = [0; 64];
        let mut parts = [std::io::IoSliceMut::new(&mut name)];
        let mut space = cmsg_space!([i32; 1]);
        let message = recvmsg::<()>(
            stream.as_raw_fd(),
            &mut parts,
            Some(&mut space),
            MsgFlags::MSG_CMSG_CLOEXEC,
        )?;
        let received = message.cmsgs()?.find_map(|control| match control {
            ControlMessageOwned::ScmRights(fds) => fds.first().copied(),
            _ => None,
        });
        sys::received_fd(received.ok_or_else(|| io::Error::other("no descriptor came"))?)
    }
}

impl Drop for Console {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}
