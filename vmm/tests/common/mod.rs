//! What the tests of whole VMM processes share: a process with its control connection, and tiny guests.
#![allow(dead_code, missing_docs)]

pub mod alphabet;
pub mod driver;
pub mod guest;
pub mod linux;
pub mod net;
pub mod pages;
pub mod saved;

use std::fs::{self, File};
use std::io::{IoSliceMut, Read, Seek, SeekFrom, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::process::{Child, Command as Process, Stdio};

use flint_api::vmm::request::Command;
use flint_api::vmm::*;
use nix::cmsg_space;
use nix::fcntl::{FcntlArg, fcntl};
use nix::sys::prctl::set_child_subreaper;
use nix::sys::signal::{Signal, kill};
use nix::sys::socket::sockopt::{PassCred, ReceiveTimeout};
use nix::sys::socket::*;
use nix::sys::time::TimeVal;
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::Pid;
use prost::Message;
use tempfile::TempDir;

/// Nobody on Debian; any user but root serves.
pub const UID: u32 = 65534;
/// So long may any one answer take before a test fails.
const PATIENCE: TimeVal = TimeVal::new(60, 0);

/// A VMM process. Killed and reaped when dropped.
pub struct Vmm {
    pub folder: TempDir,
    pub exit_file: File,
    pub connection: Connection,
    pub pid: Pid,
    reaped: bool,
}

impl Vmm {
    pub fn spawn() -> Self {
        assert!(fs::metadata("/dev/kvm").is_ok(), "these tests need /dev/kvm");
        set_child_subreaper(true).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let listener = socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None).unwrap();
        bind(
            listener.as_raw_fd(),
            &UnixAddr::new(&folder.path().join("control.sock")).unwrap(),
        )
        .unwrap();
        listen(&listener, Backlog::new(4).unwrap()).unwrap();
        let exit_file = File::options()
            .read(true)
            .write(true)
            .create_new(true)
            .open(folder.path().join("exit"))
            .unwrap();
        let launcher = start(listener.as_fd(), exit_file.as_fd());
        assert!({ launcher }.wait().unwrap().success(), "the launcher failed");
        let mut connection = Connection::open(&folder);
        connection.call(Command::GetState(GetState {}), &[]).unwrap();
        let pid = connection.pid.expect("credentials of the VMM");
        Self {
            folder,
            exit_file,
            connection,
            pid,
            reaped: false,
        }
    }

    /// A created machine with a serial line, whose other end comes back.
    pub fn with_machine(machine: CreateMachine) -> (Self, UnixStream) {
        let mut vmm = Self::spawn();
        vmm.ok(Command::CreateMachine(machine), &[]);
        let (ours, theirs) = UnixStream::pair().unwrap();
        vmm.ok(Command::BindSerial(BindSerial {}), &[theirs.as_fd()]);
        (vmm, ours)
    }

    /// A guest of one vCPU that runs.
    pub fn running(code: &[u8]) -> (Self, UnixStream) {
        let (mut vmm, serial) = Self::with_machine(machine(1, 16 << 20));
        vmm.load(&guest::elf(code));
        vmm.ok(Command::Start(Start {}), &[]);
        (vmm, serial)
    }

    pub fn load(&mut self, kernel: &[u8]) {
        let kernel = file(kernel);
        self.ok(Command::LoadKernel(LoadKernel::default()), &[kernel.as_fd()]);
    }

    pub fn call(&mut self, command: Command, fds: &[BorrowedFd<'_>]) -> Result<Option<State>, Error> {
        self.connection.call(command, fds)
    }

    pub fn ok(&mut self, command: Command, fds: &[BorrowedFd<'_>]) {
        self.call(command, fds).unwrap();
    }

    /// SaveSnapshot, into a state and a memory file.
    pub fn save(&mut self, how: SaveSnapshot, files: &[BorrowedFd<'_>]) -> Result<Saved, Error> {
        match self.connection.ask(Command::SaveSnapshot(how), files) {
            response::Result::Ok(ok) => Ok(ok.saved.expect("what was saved")),
            response::Result::Error(error) => Err(error),
            response::Result::State(state) => panic!("{state:?} is no answer to SaveSnapshot"),
        }
    }

    pub fn refused(&mut self, command: Command, fds: &[BorrowedFd<'_>]) -> (error::Code, String) {
        let error = self.call(command, fds).unwrap_err();
        (error.code(), error.message)
    }

    pub fn phase(&mut self) -> state::Phase {
        self.call(Command::GetState(GetState {}), &[]).unwrap().unwrap().phase()
    }

    /// Waits for the end and returns its reason, having checked that event, exit file and exit code agree.
    pub fn end(&mut self) -> Exited {
        let Some(event::Event::Exited(exited)) = self.connection.event().event else {
            panic!("not an end")
        };
        let code = EXIT_CODE_BASE + exited.reason;
        self.reaped = true;
        assert_eq!(waitpid(self.pid, None).unwrap(), WaitStatus::Exited(self.pid, code));
        let mut bytes = Vec::new();
        self.exit_file.seek(SeekFrom::Start(0)).unwrap();
        self.exit_file.read_to_end(&mut bytes).unwrap();
        assert_eq!(Exited::decode(&bytes[..]).unwrap(), exited);
        exited
    }

    pub fn kill(&mut self) -> WaitStatus {
        kill(self.pid, Signal::SIGKILL).unwrap();
        self.wait()
    }

    /// Waits for its end, however it comes.
    pub fn wait(&mut self) -> WaitStatus {
        self.reaped = true;
        waitpid(self.pid, None).unwrap()
    }

    /// A file of the process in /proc.
    pub fn proc(&self, name: &str) -> String {
        fs::read_to_string(format!("/proc/{}/{name}", self.pid)).unwrap()
    }
}

impl Drop for Vmm {
    fn drop(&mut self) {
        if !self.reaped {
            self.kill();
        }
    }
}

/// Starts a launcher on these descriptors.
fn start(listener: BorrowedFd<'_>, exit: BorrowedFd<'_>) -> Child {
    // Not closed on exec: these two are handed over. flint-vmm closes whatever else it gets.
    let pass = |fd| fcntl(fd, FcntlArg::F_DUPFD(100)).unwrap();
    let (control, exit) = (pass(listener), pass(exit));
    let child = Process::new(env!("CARGO_BIN_EXE_flint-vmm"))
        .args([
            "--id",
            "test",
            "--control-fd",
            &control.to_string(),
            "--exit-fd",
            &exit.to_string(),
        ])
        .args(["--uid", &UID.to_string(), "--gid", &UID.to_string()])
        .stdin(Stdio::null())
        .spawn()
        .unwrap();
    // SAFETY: both were made above and are nobody else's.
    drop(unsafe { [OwnedFd::from_raw_fd(control), OwnedFd::from_raw_fd(exit)] });
    child
}

/// A control connection, as flintd has it.
pub struct Connection {
    socket: OwnedFd,
    next: u64,
    pub pid: Option<Pid>,
    events: Vec<Event>,
}

impl Connection {
    pub fn open(folder: &TempDir) -> Self {
        let socket = socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None).unwrap();
        setsockopt(&socket, PassCred, &true).unwrap();
        setsockopt(&socket, ReceiveTimeout, &PATIENCE).unwrap();
        connect(
            socket.as_raw_fd(),
            &UnixAddr::new(&folder.path().join("control.sock")).unwrap(),
        )
        .unwrap();
        Self {
            socket,
            next: 1,
            pid: None,
            events: Vec::new(),
        }
    }

    pub fn call(&mut self, command: Command, fds: &[BorrowedFd<'_>]) -> Result<Option<State>, Error> {
        match self.ask(command, fds) {
            response::Result::Ok(_) => Ok(None),
            response::Result::State(state) => Ok(Some(state)),
            response::Result::Error(error) => Err(error),
        }
    }

    pub fn ask(&mut self, command: Command, fds: &[BorrowedFd<'_>]) -> response::Result {
        let id = self.begin(command, fds);
        let response = self.response();
        assert_eq!(response.id, id);
        response.result.unwrap()
    }

    /// Sends a request and waits for nothing.
    pub fn begin(&mut self, command: Command, fds: &[BorrowedFd<'_>]) -> u64 {
        let id = self.next;
        self.next += 1;
        let command = Some(command);
        self.send(&Request { id, command }.encode_to_vec(), fds);
        id
    }

    pub fn send(&self, bytes: &[u8], fds: &[BorrowedFd<'_>]) {
        let raw: Vec<_> = fds.iter().map(AsRawFd::as_raw_fd).collect();
        let rights = [ControlMessage::ScmRights(&raw)];
        let control = if raw.is_empty() { &rights[..0] } else { &rights[..] };
        let iov = [std::io::IoSlice::new(bytes)];
        sendmsg::<()>(self.socket.as_raw_fd(), &iov, control, MsgFlags::MSG_NOSIGNAL, None).unwrap();
    }

    pub fn response(&mut self) -> Response {
        loop {
            match self.receive().expect("an answer").message.unwrap() {
                from_vmm::Message::Response(response) => return response,
                from_vmm::Message::Event(event) => self.events.push(event),
            }
        }
    }

    pub fn event(&mut self) -> Event {
        if !self.events.is_empty() {
            return self.events.remove(0);
        }
        match self.receive().expect("an event").message.unwrap() {
            from_vmm::Message::Event(event) => event,
            from_vmm::Message::Response(response) => panic!("{response:?} is no event"),
        }
    }

    /// None: the VMM closed the connection.
    pub fn receive(&mut self) -> Option<FromVmm> {
        let mut bytes = vec![0; MAX_PACKET];
        let mut control = cmsg_space!(UnixCredentials, [i32; 4]);
        let (length, pid) = {
            let mut iov = [IoSliceMut::new(&mut bytes)];
            let flags = MsgFlags::MSG_CMSG_CLOEXEC;
            let message = recvmsg::<()>(self.socket.as_raw_fd(), &mut iov, Some(&mut control), flags).unwrap();
            let pid = message.cmsgs().unwrap().find_map(|control| match control {
                ControlMessageOwned::ScmCredentials(credentials) => Some(Pid::from_raw(credentials.pid())),
                _ => None,
            });
            (message.bytes, pid)
        };
        if self.pid.is_none() {
            self.pid = pid;
        }
        (length > 0).then(|| FromVmm::decode(&bytes[..length]).unwrap())
    }
}

pub fn machine(vcpus: u32, memory_bytes: u64) -> CreateMachine {
    CreateMachine {
        vcpus,
        memory_bytes,
        ..Default::default()
    }
}

pub fn file(content: &[u8]) -> File {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(content).unwrap();
    file
}

/// Reads so many bytes of serial output.
pub fn read(serial: &mut UnixStream, length: usize) -> String {
    serial
        .set_read_timeout(Some(std::time::Duration::from_secs(60)))
        .unwrap();
    let mut bytes = vec![0; length];
    serial.read_exact(&mut bytes).unwrap();
    String::from_utf8(bytes).unwrap()
}
