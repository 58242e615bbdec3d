//! A flint-vmm, driven as flintd drives it.

use std::fs::File;
use std::io::{IoSlice, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::path::Path;
use std::process::{Command as Program, Stdio};

use flint_api::vmm::request::Command;
use flint_api::vmm::{FromVmm, GetState, MAX_PACKET, Request, from_vmm, response};
use nix::cmsg_space;
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::sys::prctl::set_child_subreaper;
use nix::sys::signal::{Signal, kill};
use nix::sys::socket::sockopt::{PassCred, ReceiveTimeout};
use nix::sys::socket::{
    AddressFamily, Backlog, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, UnixAddr,
    UnixCredentials, bind, connect, listen, recvmsg, sendmsg, setsockopt, socket,
};
use nix::sys::time::TimeVal;
use nix::sys::wait::waitpid;
use nix::unistd::Pid;
use prost::Message;
use tempfile::TempDir;

use crate::Error;

/// User and group of the jail: nobody's on Debian; any but root serves.
const UID: &str = "65534";
/// How long one answer may take.
const PATIENCE: TimeVal = TimeVal::new(60, 0);

/// A VMM process. Killed and reaped when dropped.
pub struct Vmm {
    socket: OwnedFd,
    pid: Option<Pid>,
    next: u64,
    _folder: TempDir,
}

impl Vmm {
    /// Spawns one and waits until it answers.
    pub fn spawn(program: &Path) -> Result<Self, Error> {
        // Its launcher leaves when the jail is in place; the VMM becomes a child of this process then.
        set_child_subreaper(true)?;
        let folder = tempfile::tempdir()?;
        let address = UnixAddr::new(&folder.path().join("control.sock"))?;
        let listener = packets()?;
        bind(listener.as_raw_fd(), &address)?;
        listen(&listener, Backlog::new(1)?)?;
        let exit = File::create(folder.path().join("exit"))?;
        launch(program, listener.as_fd(), exit.as_fd())?;
        // Our copy closes here: if the VMM has died, the connection ends instead of waiting.
        let socket = packets()?;
        setsockopt(&socket, PassCred, &true)?;
        setsockopt(&socket, ReceiveTimeout, &PATIENCE)?;
        connect(socket.as_raw_fd(), &address)?;
        drop(listener);
        let mut vmm = Self {
            socket,
            pid: None,
            next: 0,
            _folder: folder,
        };
        vmm.call(Command::GetState(GetState {}), &[])?;
        Ok(vmm)
    }

    /// Its process, which it told with its first answer.
    pub fn pid(&self) -> Option<i32> {
        self.pid.map(Pid::as_raw)
    }

    /// Sends a command and waits for its answer.
    pub fn call(&mut self, command: Command, fds: &[BorrowedFd<'_>]) -> Result<(), Error> {
        self.begin(command, fds)?;
        self.answer()
    }

    /// Sends a command.
    pub fn begin(&mut self, command: Command, fds: &[BorrowedFd<'_>]) -> Result<(), Error> {
        self.next += 1;
        let request = Request {
            id: self.next,
            command: Some(command),
        };
        let bytes = request.encode_to_vec();
        let fds: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
        let rights = [ControlMessage::ScmRights(&fds)];
        let control = if fds.is_empty() { &rights[..0] } else { &rights[..] };
        let slices = [IoSlice::new(&bytes)];
        sendmsg::<()>(self.socket.as_raw_fd(), &slices, control, MsgFlags::MSG_NOSIGNAL, None)?;
        Ok(())
    }

    /// Waits for the answer to the last command.
    pub fn answer(&mut self) -> Result<(), Error> {
        loop {
            match self.receive()?.message {
                Some(from_vmm::Message::Response(response)) => {
                    return match response.result {
                        Some(response::Result::Error(error)) => {
                            Err(format!("flint-vmm refuses: {}", error.message).into())
                        }
                        Some(response::Result::Ok(_) | response::Result::State(_)) => Ok(()),
                        None => Err("flint-vmm's answer is of a kind that this program does not know".into()),
                    };
                }
                Some(from_vmm::Message::Event(event)) => eprintln!("flint-bench: flint-vmm tells: {event:?}"),
                None => {}
            }
        }
    }

    fn receive(&mut self) -> Result<FromVmm, Error> {
        let mut bytes = vec![0; MAX_PACKET];
        let mut control = cmsg_space!(UnixCredentials);
        let mut slices = [IoSliceMut::new(&mut bytes)];
        let received = recvmsg::<()>(
            self.socket.as_raw_fd(),
            &mut slices,
            Some(&mut control),
            MsgFlags::MSG_CMSG_CLOEXEC,
        )?;
        for part in received.cmsgs()? {
            if let ControlMessageOwned::ScmCredentials(sender) = part {
                self.pid = Some(Pid::from_raw(sender.pid()));
            }
        }
        let length = received.bytes;
        if length == 0 {
            return Err("flint-vmm has ended".into());
        }
        Ok(FromVmm::decode(bytes.get(..length).unwrap_or_default())?)
    }
}

impl Drop for Vmm {
    fn drop(&mut self) {
        if let Some(pid) = self.pid {
            // Both fail for a process that is gone already.
            let _ = kill(pid, Signal::SIGKILL);
            let _ = waitpid(pid, None);
        }
    }
}

fn packets() -> Result<OwnedFd, Error> {
    Ok(socket(
        AddressFamily::Unix,
        SockType::SeqPacket,
        SockFlag::SOCK_CLOEXEC,
        None,
    )?)
}

/// Starts a launcher on these descriptors, and waits until it has left its VMM.
fn launch(program: &Path, control: BorrowedFd<'_>, exit: BorrowedFd<'_>) -> Result<(), Error> {
    // This process has one thread, so nobody else's program gets them meanwhile.
    for fd in [control, exit] {
        fcntl(fd, FcntlArg::F_SETFD(FdFlag::empty()))?;
    }
    let number = |fd: BorrowedFd<'_>| fd.as_raw_fd().to_string();
    let status = Program::new(program)
        .args(["--id", "bench", "--uid", UID, "--gid", UID])
        .args(["--control-fd", &number(control), "--exit-fd", &number(exit)])
        .stdin(Stdio::null())
        .status()
        .map_err(|error| format!("cannot run {}: {error}; name it by --vmm", program.display()))?;
    if status.success() {
        Ok(())
    } else {
        Err(format!(
            "{} ended at once: {status}; it needs root and /dev/kvm",
            program.display()
        )
        .into())
    }
}
