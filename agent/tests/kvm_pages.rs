//! Sandboxes whose memory is chunks, with the real flint-vmm and flint-pages, and a guest of a few instructions that has something in
//! many places of its memory. It does not speak gRPC, so no restore here is ever done: the system tests have guests that do.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used)]

mod sandbox;

use std::{
    collections::HashSet,
    fs::{self, File},
    os::fd::AsFd,
    path::{Path, PathBuf},
    sync::Arc,
};

use flint_api::vmm::{ExitReason, state::Phase};
use flint_snapshots::{
    images::{ImageStore, ImageStoreOptions},
    machines::ChunkedFile,
};
use flintd::{
    backend::{Origin, SavedMachine},
    sandbox::{Exited, Manager, SandboxError, SandboxSpec, TakenOver, control::Control},
    saved::SavedFiles,
    timeline::Timeline,
};
use nix::{sys::signal::Signal, unistd::Pid};
use sandbox::{Host, LIMIT, as_daemon, guest, on_a_host, signal, spec, wait_for, wait_gone};

const MEMORY: u32 = 512 << 20;

/// A guest that puts something into every unit of most of its memory, and prints dots then.
fn dots() -> Vec<u8> {
    const FROM: u32 = 16 << 20;
    const STEP: u32 = 256 << 10;
    let mut code = [&[0xbf][..], &FROM.to_le_bytes()].concat(); // mov edi, FROM
    code.extend([0x89, 0x3f, 0x81, 0xc7]); // page: mov [rdi], edi; add edi, STEP
    code.extend(STEP.to_le_bytes());
    code.extend([0x81, 0xff]); // cmp edi, the end; jb page
    code.extend((MEMORY - FROM).to_le_bytes());
    code.extend([0x72, 0xf0]);
    code.extend(guest::print("up"));
    let dot = guest::print(".");
    let back = -i8::try_from(dot.len() + 9).unwrap();
    code.extend(dot);
    code.extend([0xb9, 0, 0x10, 0, 0, 0xe2, 0xfe]); // mov ecx, 4096; loop to itself
    code.extend([0xeb, back.cast_unsigned()]); // jmp to the next dot
    guest::elf(&code)
}

fn wish() -> SandboxSpec {
    SandboxSpec {
        memory_bytes: MEMORY.into(),
        ..spec(false)
    }
}

#[test]
#[ignore = "a process of the tests here"]
fn daemon() {
    as_daemon(|host| async move {
        let manager = host.manager().await;
        if host.folder().join("saved").exists() {
            let (origin, memory) = origin(&host).await;
            let _ = manager.restore(wish(), &origin, Some(memory), &Timeline::new()).await;
        } else {
            let _ = manager.launch(wish(), &Timeline::new()).await;
        }
    })
    .expect("other tests run this");
}

/// A daemon starts a sandbox, whose start is made out to be complete when its console has a text, and is killed.
async fn orphan(host: &Host, text: &'static str) {
    let daemon = host.daemon("daemon");
    printed(host, text).await;
    fs::write(host.file("ready"), "").unwrap();
    daemon.kill_9();
}

async fn printed(host: &Host, text: &'static str) {
    let serial = host.file("serial.log");
    let printed = tokio::task::spawn_blocking(move || wait_for(&serial, text));
    tokio::time::timeout(LIMIT, printed).await.expect("in time").unwrap();
}

/// Saves a guest that runs, into files and chunks.
async fn save(host: &Host) {
    orphan(host, "up.").await;
    let (control, _events) = Control::connect(&host.file("control.sock")).unwrap();
    let folder = host.folder().join("saved");
    fs::create_dir(&folder).unwrap();
    let (state, memory) = (file(&folder, "state"), file(&folder, "memory"));
    let fds = [state.as_fd(), memory.as_fd()];
    control.save(MEMORY.into(), &fds).await.unwrap();
    let store = store(host).await;
    let files = vec![("memory".to_owned(), memory)];
    store.machines().keep("warm", files, Default::default()).await.unwrap();
    let manager = host.manager().await;
    manager.end_unknown(&HashSet::new()).await;
    host.assert_clean();
    manager.remove().await.unwrap();
}

fn file(folder: &Path, name: &str) -> File {
    let mut options = File::options();
    options.create(true).read(true).write(true).truncate(false);
    options.open(folder.join(name)).unwrap()
}

async fn store(host: &Host) -> ImageStore {
    let folder = host.folder().join("images");
    ImageStore::open(&folder, ImageStoreOptions::default()).await.unwrap()
}

/// What was saved; the file that its memory should be in is empty.
async fn origin(host: &Host) -> (Origin, ChunkedFile) {
    let memory = store(host).await.machines().open("warm", "memory").await.unwrap();
    let folder = host.folder().join("saved");
    let files = SavedFiles {
        state: file(&folder, "state"),
        memory: file(&folder, "nothing"),
        scratch: file(&folder, "nothing"),
    };
    let machine = flint_api::vmm::CreateMachine {
        vcpus: 1,
        memory_bytes: MEMORY.into(),
        vsock: Some(flint_api::vmm::VsockSlot { guest_cid: 3 }),
        rng: true,
        balloon: true,
        ..Default::default()
    };
    let machine = SavedMachine {
        machine,
        ..SavedMachine::default()
    };
    let origin = Origin {
        files: Arc::new(files),
        memory_in_store: Some("warm".into()),
        machine,
        hook: None,
    };
    (origin, memory)
}

/// Cgroups of page servers.
fn servers(host: &Host) -> Vec<PathBuf> {
    let entries = fs::read_dir(host.cgroup()).unwrap().map(|entry| entry.unwrap());
    let servers = entries.filter(|entry| entry.file_name().to_string_lossy().starts_with("pages:"));
    servers.map(|entry| entry.path()).collect()
}

fn process_in(cgroup: &Path) -> Pid {
    let processes = fs::read_to_string(cgroup.join("cgroup.procs")).unwrap();
    Pid::from_raw(processes.trim().parse().expect("one process"))
}

/// Waits until a page server and its cgroup are gone.
async fn gone(server: PathBuf) {
    let gone = tokio::task::spawn_blocking(move || wait_gone(&server));
    tokio::time::timeout(LIMIT, gone).await.expect("in time").unwrap();
}

/// Restores what ends, with something done to its page server as soon as the guest goes on.
async fn end_after(host: &Host, manager: &Manager, deed: impl FnOnce(PathBuf)) -> (Exited, PathBuf) {
    let (origin, memory) = origin(host).await;
    let timeline = Timeline::new();
    let restored = manager.restore(wish(), &origin, Some(memory), &timeline);
    let done = async {
        printed(host, ".").await;
        let server = servers(host).pop().expect("a page server");
        deed(server.clone());
        server
    };
    let both = tokio::time::timeout(LIMIT, async { tokio::join!(restored, done) });
    match both.await.expect("in time") {
        (Err(SandboxError::Ended { exited, .. }), server) => (exited, server),
        (other, _) => panic!("{other:?}"),
    }
}

#[test]
fn a_guest_goes_on_before_its_memory_is_there_and_ends_when_nobody_brings_the_rest() {
    on_a_host(&dots(), |host| async move {
        save(&host).await;
        let manager = host.manager().await;
        let kill = |server: PathBuf| signal(process_in(&server), Signal::SIGKILL);
        let (exited, server) = end_after(&host, &manager, kill).await;
        assert_eq!(exited.reason, ExitReason::MemoryLost, "{exited:?}");
        assert!(exited.detail.contains("page server has gone"), "{}", exited.detail);
        gone(server).await;
        // The next one has a server of its own.
        let stop = |_: PathBuf| signal(host.processes()[0], Signal::SIGKILL);
        let (exited, server) = end_after(&host, &manager, stop).await;
        assert_eq!(exited.reason, ExitReason::Killed, "{exited:?}");
        gone(server).await;
        host.end(manager).await;
    });
}

#[test]
fn a_sandbox_and_its_page_server_outlive_their_daemon_and_the_server_ends_when_all_is_there() {
    on_a_host(&dots(), |host| async move {
        save(&host).await;
        orphan(&host, ".").await;
        let server = servers(&host).pop().expect("the server goes on without the daemon");
        let manager = host.manager().await;
        let TakenOver::Running(sandbox) = manager.take_over("a").await.unwrap() else {
            panic!("it runs");
        };
        gone(server).await;
        assert_eq!(sandbox.state().await.unwrap().phase(), Phase::Running);
        sandbox.kill();
        assert_eq!(sandbox.wait().await.reason, ExitReason::Stopped);
        host.end(manager).await;
    });
}
