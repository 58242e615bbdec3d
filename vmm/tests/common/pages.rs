//! Page servers: memory files as chunks in a store, and who brings them.

use std::fs::{self, File};
use std::io::Write;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::path::Path;
use std::process::{Child, Command as Process, Stdio};

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
use nix::sys::socket::*;
use prost::Message;
use tempfile::TempDir;

use super::Vmm;
use super::saved::Saved;

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
        let memory = memory_file(self.size);
        let (listener, address) = listener(self.folder.path());
        let mut table = tempfile::tempfile().unwrap();
        table.write_all(self.table.as_bytes()).unwrap();
        let packs: Vec<_> = self
            .table
            .packs()
            .iter()
            .map(|pack| self.store.open_pack(*pack).unwrap())
            .collect();
        // Not closed on exec: these are handed over.
        let pass = |fd: BorrowedFd<'_>| fcntl(fd, FcntlArg::F_DUPFD(100)).unwrap();
        let mut passed = vec![];
        let mut command = Process::new(env!("CARGO_BIN_EXE_flint-pages"));
        let fds = [
            ("--listen-fd", listener.as_fd()),
            ("--memory-fd", memory.as_fd()),
            ("--table-fd", table.as_fd()),
        ];
        for (name, fd) in fds
            .into_iter()
            .chain(packs.iter().map(|pack| ("--pack-fd", pack.as_fd())))
        {
            let fd = pass(fd);
            passed.push(fd);
            command.args([name, &fd.to_string()]);
        }
        let child = command.stdin(Stdio::null()).spawn().unwrap();
        // SAFETY: made above and nobody else's.
        passed
            .into_iter()
            .for_each(|fd| drop(unsafe { OwnedFd::from_raw_fd(fd) }));
        PageServer { child, memory, address }
    }
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

/// A socket to listen on, and where.
pub fn listener(folder: &Path) -> (OwnedFd, UnixAddr) {
    let listener = socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None).unwrap();
    let path = folder.join(format!("pages-{}.sock", listener.as_raw_fd()));
    let _ = fs::remove_file(&path);
    let address = UnixAddr::new(&path).unwrap();
    bind(listener.as_raw_fd(), &address).unwrap();
    listen(&listener, Backlog::new(8).unwrap()).unwrap();
    (listener, address)
}

/// A page server's process. Killed when dropped.
pub struct PageServer {
    pub child: Child,
    pub memory: File,
    address: UnixAddr,
}

impl PageServer {
    pub fn connect(&self) -> OwnedFd {
        let socket = socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None).unwrap();
        connect(socket.as_raw_fd(), &self.address).unwrap();
        socket
    }

    /// A parked clone whose memory it brings.
    pub fn parked(&self, saved: &Saved, machine: CreateMachine) -> Vmm {
        let mut vmm = reserved(machine);
        // The last page is there only once it listens for faults.
        let socket = self.connect();
        self.wait_until_it_has_begun();
        load(saved, &self.memory, &socket, &mut vmm).unwrap();
        vmm
    }

    /// It has sealed the size of its memory file and filled the last page: it answers whoever knocks by hanging up.
    pub fn wait_until_it_has_begun(&self) {
        let socket = self.connect();
        send(socket.as_raw_fd(), b"nonsense", MsgFlags::empty()).unwrap();
        assert_eq!(recv(socket.as_raw_fd(), &mut [0; 8], MsgFlags::empty()).unwrap(), 0);
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
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for PageServer {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
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
