//! Page servers: memory files as chunks in a store, and who brings them.

use std::fs::{self, File};
use std::io::Write;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::path::Path;
use std::process::{Command as Process, Stdio};

use flint_api::vmm::pages_served::Progress;
use flint_api::vmm::request::Command;
use flint_api::vmm::{CreateMachine, Error, LoadSnapshot, PageRange, PagesServed, ReserveMachine, ServePages};
use flint_snapshots::chunk::Chunk;
use flint_snapshots::device::{PackLocation, Table};
use flint_snapshots::image::Image;
use flint_snapshots::store::{ChunkStore, StoreOptions};
use flint_vmm::control::packet;
use flint_vmm::pages::UNIT;
use flint_vmm::pages::uffd::{self, Uffd};
use nix::fcntl::{FcntlArg, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::prctl::set_child_subreaper;
use nix::sys::signal::{Signal, kill};
use nix::sys::socket::*;
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::Pid;
use prost::Message;
use tempfile::TempDir;

use super::saved::Saved;
use super::{UID, Vmm};

/// A memory file that is chunks.
pub struct Chunks {
    folder: TempDir,
    store: ChunkStore,
    table: Table,
    pub locations: Vec<PackLocation>,
    size: u64,
}

impl Chunks {
    pub fn of(memory: &Path) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let store = ChunkStore::open(folder.path(), StoreOptions::default()).unwrap();
        let session = store.session();
        let mut sink = session.sink().unwrap();
        let bytes = fs::read(memory).unwrap();
        let mut pieces = Vec::new();
        let unit = usize::try_from(UNIT).unwrap();
        for (offset, piece) in (0..).step_by(unit).zip(bytes.chunks(unit)) {
            if piece.iter().any(|byte| *byte != 0) {
                let id = sink.put(piece).unwrap();
                let len = u32::try_from(piece.len()).unwrap();
                pieces.push((offset, Chunk { id, len }));
            }
        }
        session.commit().unwrap();
        let size = bytes.len() as u64;
        let image = Image::of_pieces(size, &pieces);
        let ids: Vec<_> = image.chunks().iter().map(|chunk| chunk.id).collect();
        let locations = store.locate(&ids).unwrap();
        let find = |id: &_| ids.iter().position(|other| other == id).map(|at| locations[at]);
        let table = Table::build(&image, find).unwrap();
        Self {
            folder,
            store,
            table,
            locations,
            size,
        }
    }

    /// Alters a byte of the first chunk where it is stored.
    pub fn damage(&self) {
        let path = walk(self.folder.path())
            .into_iter()
            .find(|path| path.metadata().unwrap().len() > 4096 && path.extension().is_some_and(|it| it == "pack"));
        let pack = File::options().read(true).write(true).open(path.unwrap()).unwrap();
        let at = self.locations[0].offset + u64::from(self.locations[0].stored_len / 2);
        let mut byte = [0];
        std::os::unix::fs::FileExt::read_exact_at(&pack, &mut byte, at).unwrap();
        std::os::unix::fs::FileExt::write_all_at(&pack, &[byte[0] ^ 0xff], at).unwrap();
    }

    /// A program that serves them.
    pub fn serve(&self) -> PageServer {
        set_child_subreaper(true).unwrap();
        let memory = memory_file(self.size);
        let (door, theirs) = pair();
        let mut table = tempfile::tempfile().unwrap();
        table.write_all(self.table.as_bytes()).unwrap();
        let packs = self.table.packs().iter();
        let packs: Vec<_> = packs.map(|pack| self.store.open_pack(*pack).unwrap()).collect();
        let fds = [
            ("--door-fd", theirs.as_fd()),
            ("--memory-fd", memory.as_fd()),
            ("--table-fd", table.as_fd()),
        ];
        let fds = fds
            .into_iter()
            .chain(packs.iter().map(|pack| ("--pack-fd", pack.as_fd())));
        let mut command = Process::new(env!("CARGO_BIN_EXE_flint-pages"));
        command.args(["--uid", &UID.to_string(), "--gid", &UID.to_string()]);
        let passed: Vec<_> = fds
            .map(|(name, fd)| {
                // Not closed on exec: these are handed over.
                let fd = fcntl(fd, FcntlArg::F_DUPFD(100)).unwrap();
                command.args([name, &fd.to_string()]);
                // SAFETY: just made and nobody else's.
                unsafe { OwnedFd::from_raw_fd(fd) }
            })
            .collect();
        let before = servers();
        let launcher = command.stdin(Stdio::null()).spawn().unwrap();
        drop((passed, theirs));
        assert!({ launcher }.wait().unwrap().success(), "the launcher failed");
        let pid = servers().into_iter().find(|pid| !before.contains(pid));
        PageServer {
            pid: pid.expect("a server that has not ended"),
            memory,
            door: Some(door),
            reaped: false,
        }
    }
}

/// Page servers that this process has to reap.
fn servers() -> Vec<Pid> {
    let processes = fs::read_dir("/proc").unwrap().map(|entry| entry.unwrap().path());
    let ours = format!("PPid:\t{}\n", Pid::this());
    processes
        .filter_map(|path| {
            let pid = path.file_name()?.to_str()?.parse().ok()?;
            // It may have ended since.
            let status = fs::read_to_string(path.join("status")).ok()?;
            (status.starts_with("Name:\tflint-pages\n") && status.contains(&ours)).then(|| Pid::from_raw(pid))
        })
        .collect()
}

fn walk(folder: &Path) -> Vec<std::path::PathBuf> {
    let entries = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    entries
        .flat_map(|path| if path.is_dir() { walk(&path) } else { vec![path] })
        .collect()
}

/// An empty memfd of this size.
pub fn memory_file(size: u64) -> File {
    let memory = memfd_create("memory", MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING).unwrap();
    let memory = File::from(memory);
    memory.set_len(size).unwrap();
    memory
}

fn pair() -> (OwnedFd, OwnedFd) {
    socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC).unwrap()
}

/// A page server's process. Killed when dropped.
pub struct PageServer {
    pub pid: Pid,
    pub memory: File,
    door: Option<OwnedFd>,
    reaped: bool,
}

impl PageServer {
    pub fn connect(&self) -> OwnedFd {
        let (ours, theirs) = pair();
        let door = self.door.as_ref().expect("an open door");
        packet::send(door.as_fd(), b"sandbox", &[theirs.as_fd()]).unwrap();
        ours
    }

    /// Nobody can come any more.
    pub fn close_the_door(&mut self) {
        self.door = None;
    }

    /// A parked clone whose memory it brings.
    pub fn parked(&self, saved: &Saved, machine: CreateMachine) -> Vmm {
        let mut vmm = reserved(machine);
        load(saved, &self.memory, &self.connect(), &mut vmm).unwrap();
        vmm
    }

    /// As a sandbox hears of it, one without memory.
    pub fn wait_until_all_is_there(&self) {
        let socket = self.connect();
        let device = File::options().read(true).write(true).open(uffd::DEVICE).unwrap();
        let uffd = Uffd::new(&device).unwrap();
        let ranges = vec![PageRange::default()];
        packet::send(socket.as_fd(), &ServePages { ranges }.encode_to_vec(), &[uffd.as_fd()]).unwrap();
        let mut bytes = [0; 64];
        loop {
            let length = recv(socket.as_raw_fd(), &mut bytes, MsgFlags::empty()).unwrap();
            assert_ne!(length, 0, "it has hung up");
            if PagesServed::decode(&bytes[..length]).unwrap().progress() == Progress::Complete {
                return;
            }
        }
    }

    pub fn kill(&mut self) {
        kill(self.pid, Signal::SIGKILL).unwrap();
        self.wait();
    }

    /// Waits for its end.
    pub fn wait(&mut self) -> WaitStatus {
        self.reaped = true;
        waitpid(self.pid, None).unwrap()
    }
}

impl Drop for PageServer {
    fn drop(&mut self) {
        if !self.reaped {
            // It may have ended by itself.
            let _ = kill(self.pid, Signal::SIGKILL);
            let _ = waitpid(self.pid, None);
        }
    }
}

/// Has a process that sleeps in a system call call openat instead, as somebody would who has taken it over.
pub fn make_it_open_a_path(pid: Pid) {
    const LENGTH_OF_SYSCALL: u64 = 2;
    let nothing = std::ptr::null_mut::<libc::c_void>();
    let ask = |request, data: *mut libc::c_void| {
        // SAFETY: each request reads or writes the registers that `data` points to, or ignores it.
        assert_eq!(unsafe { libc::ptrace(request, pid.as_raw(), nothing, data) }, 0);
    };
    ask(libc::PTRACE_ATTACH, nothing);
    assert_eq!(waitpid(pid, None).unwrap(), WaitStatus::Stopped(pid, Signal::SIGSTOP));
    // SAFETY: all-zero registers are registers.
    let mut registers: libc::user_regs_struct = unsafe { std::mem::zeroed() };
    ask(libc::PTRACE_GETREGS, std::ptr::from_mut(&mut registers).cast());
    registers.rip -= LENGTH_OF_SYSCALL;
    // No call that would have to be restarted.
    registers.orig_rax = u64::MAX;
    registers.rax = libc::SYS_openat.cast_unsigned();
    registers.rdi = i64::from(libc::AT_FDCWD).cast_unsigned();
    registers.rsi = registers.rsp;
    ask(libc::PTRACE_SETREGS, std::ptr::from_mut(&mut registers).cast());
    ask(libc::PTRACE_DETACH, nothing);
}

/// A shell for paged memory.
pub fn reserved(machine: CreateMachine) -> Vmm {
    let mut vmm = Vmm::spawn();
    let machine = Some(machine);
    vmm.ok(Command::ReserveMachine(ReserveMachine { machine, paged: true }), &[]);
    vmm
}

/// As [`load`], without waiting for an answer.
pub fn begin_to_load(saved: &Saved, memory: &File, socket: &OwnedFd, vmm: &mut Vmm) {
    let (request, files) = load_request(saved, memory);
    let fds = [files[0].as_fd(), files[1].as_fd(), socket.as_fd()];
    vmm.connection.begin(request, &fds);
}

fn load_request(saved: &Saved, memory: &File) -> (Command, [File; 2]) {
    let state = File::open(&saved.state).unwrap();
    let memory = File::open(format!("/proc/self/fd/{}", memory.as_raw_fd())).unwrap();
    let request = Command::LoadSnapshot(LoadSnapshot { paged: true });
    (request, [state, memory])
}

/// Loads a snapshot whose memory file is a memfd that somebody behind `socket` fills.
pub fn load(saved: &Saved, memory: &File, socket: &OwnedFd, vmm: &mut Vmm) -> Result<(), Error> {
    let (request, files) = load_request(saved, memory);
    let fds = [files[0].as_fd(), files[1].as_fd(), socket.as_fd()];
    vmm.call(request, &fds).map(drop)
}
