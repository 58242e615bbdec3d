//! The table of containers, and what is done to them.

use std::{
    collections::HashMap,
    fs,
    io::Write,
    os::{fd::OwnedFd, unix::fs::OpenOptionsExt, unix::net::UnixStream},
    path::Path,
    process::{Command, Stdio},
    sync::{Arc, Mutex as TableMutex, MutexGuard, PoisonError},
    time::SystemTime,
};

use flint_api::guest::{CreateContainerRequest, mount::Source};
use nix::{
    fcntl::OFlag,
    mount::{MntFlags, umount2},
    unistd::pipe2,
};
use prost::Message;
use tokio::sync::{Mutex, watch};

use super::{
    Container, ContainerError, State, exit_of,
    launch::{self, Launch, Launched},
    report::Reports,
    spec, subpath,
};
use crate::{
    cgroup::Cgroup,
    materials::Store as Materials,
    output::{OutputBuffer, Stream},
    paths::{self, Name},
    reaper::{EndReceiver, Reaper},
    storage::Storage,
    stream_fd::StreamFd,
};

type Result<T> = std::result::Result<T, ContainerError>;

/// All containers of this guest.
#[derive(Debug, Clone)]
pub struct Containers(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    table: TableMutex<HashMap<String, Arc<Container>>>,
    reaper: Reaper,
    storage: Storage,
    materials: Materials,
    /// First process of the PID namespace that containers share, once one asked for it.
    pause: Mutex<Option<i32>>,
}

/// Both ends of the standard streams that a process gets.
#[derive(Debug, Default)]
pub struct Pipes {
    /// The process's ends.
    pub theirs: [Option<OwnedFd>; 3],
    /// Written to.
    pub stdin: Option<StreamFd>,
    /// Read from: standard output, standard error.
    pub outputs: Option<(StreamFd, StreamFd)>,
}

impl Pipes {
    /// Three pipes, or none for standard input.
    pub fn new(stdin: bool) -> std::io::Result<Self> {
        let (out_reader, out_writer) = pipe2(OFlag::O_CLOEXEC)?;
        let (err_reader, err_writer) = pipe2(OFlag::O_CLOEXEC)?;
        let (stdin, their_stdin) = if stdin {
            let (reader, writer) = pipe2(OFlag::O_CLOEXEC)?;
            (Some(StreamFd::writing(writer)?), reader)
        } else {
            (None, fs::File::open("/dev/null")?.into())
        };
        Ok(Self {
            theirs: [Some(their_stdin), Some(out_writer), Some(err_writer)],
            stdin,
            outputs: Some((StreamFd::reading(out_reader)?, StreamFd::reading(err_reader)?)),
        })
    }
}

impl Containers {
    /// None yet.
    pub fn new(reaper: Reaper, storage: Storage) -> Self {
        let pause = Mutex::new(None);
        Self(Arc::new(Inner {
            table: TableMutex::default(),
            reaper,
            storage,
            materials: Materials::default(),
            pause,
        }))
    }

    /// What environments and volumes are made from.
    pub fn materials(&self) -> &Materials {
        &self.0.materials
    }

    /// The reaper that their processes end at.
    pub fn reaper(&self) -> &Reaper {
        &self.0.reaper
    }

    /// By id.
    pub fn get(&self, id: &str) -> Result<Arc<Container>> {
        self.table()
            .get(id)
            .cloned()
            .ok_or_else(|| ContainerError::Unknown(id.chars().take(80).collect()))
    }

    /// All, by id.
    pub fn all(&self) -> Vec<Arc<Container>> {
        let mut all: Vec<_> = self.table().values().cloned().collect();
        all.sort_by(|a, b| a.id.as_str().cmp(b.id.as_str()));
        all
    }

    fn table(&self) -> MutexGuard<'_, HashMap<String, Arc<Container>>> {
        self.0.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Prepares a container up to its start.
    pub async fn create(&self, mut request: CreateContainerRequest) -> Result<()> {
        let id = Name::parse("container", &request.container_id)?;
        let image = Name::parse("image", &request.image_id)?;
        spec::check(&request)?;
        if !self.0.storage.has_image(&image).await {
            return Err(ContainerError::NoImage(image.to_string()));
        }
        self.0.materials.prepare(&mut request).await?;
        let container = self.register(&id, &request)?;
        let made = self.make(&container, &request).await;
        if made.is_err() {
            if let Err(error) = remove_traces(&container).await {
                eprintln!(
                    "flint-init: after a failed create: {}",
                    crate::error_chain::chain(&error)
                );
            }
            self.table().remove(id.as_str());
        }
        made
    }

    fn register(&self, id: &Name, request: &CreateContainerRequest) -> Result<Arc<Container>> {
        let terminal = request.process.as_ref().is_some_and(|process| process.terminal);
        let container = Arc::new(Container {
            id: id.clone(),
            cgroup: Cgroup::new(paths::cgroup(id)),
            output: OutputBuffer::new(if terminal { 1 } else { 2 }),
            stdin: Mutex::new(None),
            terminal,
            state: watch::Sender::new(State::Creating),
            scratch: spec::scratch_serial(request)?,
        });
        let mut table = self.table();
        if table.contains_key(id.as_str()) {
            return Err(ContainerError::Exists(id.to_string()));
        }
        table.insert(id.to_string(), Arc::clone(&container));
        Ok(container)
    }

    async fn make(&self, container: &Arc<Container>, request: &CreateContainerRequest) -> Result<()> {
        let scratch = container.scratch.as_ref();
        self.0.storage.mount_scratch(scratch).await?;
        for mount in &request.mounts {
            if let Some(Source::PodDirectory(directory)) = &mount.source {
                let name = Name::parse("pod directory", &directory.name)?;
                self.0
                    .storage
                    .pod_directory(scratch, &name, directory.memory, directory.size_bytes, request.fs_group)
                    .await?;
            }
        }
        let pause = if request.share_pid_namespace {
            Some(self.shared_pid_namespace(container).await?)
        } else {
            None
        };
        let bundle = paths::bundle(&container.id);
        fs::create_dir_all(&bundle).map_err(container.io("creating its folder"))?;
        write_private(&bundle.join("request"), &request.encode_to_vec())
            .map_err(container.io("passing its request on"))?;
        let pipes = if container.terminal {
            Pipes::default()
        } else {
            Pipes::new(request.stdin).map_err(container.io("making its pipes"))?
        };
        let launch = Launch {
            container: &container.id,
            exec: None,
            stdio: pipes.theirs,
            terminal: container.terminal,
            pause,
        };
        let failed = |source| ContainerError::Launch {
            id: container.id.to_string(),
            source,
        };
        let launched = launch.run(&self.0.reaper).await.map_err(failed)?;
        let Launched {
            pid,
            end,
            reports,
            exec_failed: _,
            terminal,
        } = launched;
        container.state.send_replace(State::Created { pid });
        attach(
            container,
            terminal,
            pipes.stdin.filter(|_| request.stdin),
            pipes.outputs,
        )
        .await?;
        tokio::spawn(supervise(Arc::clone(container), reports, end));
        Ok(())
    }

    /// The first process of the pod's PID namespace; made on first use.
    async fn shared_pid_namespace(&self, container: &Container) -> Result<i32> {
        let mut pause = self.0.pause.lock().await;
        if let Some(pid) = *pause {
            return Ok(pid);
        }
        let step = "making the pod's PID namespace";
        let (reader, writer) = pipe2(OFlag::O_CLOEXEC).map_err(|error| container.io(step)(error.into()))?;
        let reader = StreamFd::reading(reader).map_err(container.io(step))?;
        let mut command = Command::new("/proc/self/exe");
        command
            .arg("pause")
            .stdin(Stdio::null())
            .stdout(Stdio::from(writer))
            .env_clear();
        launch::spawn(&mut command).map_err(container.io(step))?;
        // The command keeps the pipe's other end open.
        drop(command);
        let mut text = [0; 16];
        let length = reader.read(&mut text).await.map_err(container.io(step))?;
        let pid = std::str::from_utf8(text.get(..length).unwrap_or_default())
            .ok()
            .and_then(|text| text.trim().parse().ok());
        let pid = pid.ok_or_else(|| container.io(step)(std::io::Error::other("its first process did not start")))?;
        *pause = Some(pid);
        Ok(pid)
    }

    /// Lets a created container's program run; its first process's pid.
    pub fn start(&self, id: &str) -> Result<i32> {
        let container = self.get(id)?;
        let State::Created { pid } = container.state() else {
            return Err(container.wrong_state("only a created container can be started"));
        };
        container.state.send_replace(State::Running {
            pid,
            started: SystemTime::now(),
        });
        // libcontainer's protocol: its process waits in accept(2), and takes the end of the stream as the word.
        let socket = paths::oci_state(&container.id).join("notify.sock");
        let started = UnixStream::connect(socket).and_then(|mut stream| stream.write_all(b"start"));
        started.map_err(container.io("starting its process"))?;
        Ok(pid)
    }

    /// Removes an ended container.
    pub async fn delete(&self, id: &str) -> Result<()> {
        let container = self.get(id)?;
        if !matches!(container.state(), State::Exited(_)) {
            return Err(container.wrong_state("it has to end before it can be deleted"));
        }
        remove_traces(&container).await?;
        self.table().remove(id);
        Ok(())
    }
}

/// Its contents are for PID 1 and the helper alone.
pub fn write_private(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)?
        .write_all(bytes)
}

/// Connects the process's streams: a terminal's master serves both ways.
async fn attach(
    container: &Arc<Container>,
    terminal: Option<OwnedFd>,
    stdin: Option<StreamFd>,
    outputs: Option<(StreamFd, StreamFd)>,
) -> Result<()> {
    let step = "connecting its terminal";
    let mut sources = Vec::new();
    let mut input = stdin;
    if let Some(master) = terminal {
        let writer = master
            .try_clone()
            .and_then(StreamFd::writing)
            .map_err(container.io(step))?;
        input = Some(writer);
        sources.push((Stream::Stdout, StreamFd::reading(master).map_err(container.io(step))?));
    }
    if let Some((stdout, stderr)) = outputs {
        sources.extend([(Stream::Stdout, stdout), (Stream::Stderr, stderr)]);
    }
    *container.stdin.lock().await = input;
    for (stream, source) in sources {
        let container = Arc::clone(container);
        tokio::spawn(async move {
            let ended = async { drop(container.wait().await) };
            container.output.fill_from(stream, &source, ended).await;
        });
    }
    Ok(())
}

/// Waits for a container's end and records it.
async fn supervise(container: Arc<Container>, mut reports: Reports, end: EndReceiver) {
    let mut exec_failed = None;
    // Ends when the program has been executed, or the process is gone.
    while let Some(report) = reports.next().await {
        exec_failed = report.exec_failed().or(exec_failed);
    }
    drop(reports);
    let Ok(ended) = end.await else {
        // The reaper lives as long as PID 1 does.
        return;
    };
    let started = match container.state() {
        State::Running { started, .. } => Some(started),
        _ => None,
    };
    let mut exit = exit_of(ended, started);
    exit.oom_killed = container
        .cgroup
        .keyed("memory.events", "oom_kill")
        .is_some_and(|kills| kills > 0);
    if let Some((code, message)) = exec_failed {
        exit.exit_code = u32::from(code);
        exit.start_error = message;
    }
    // What the first process leaves behind ends with it. In a PID namespace of its own it has ended already.
    if let Err(error) = container.cgroup.kill() {
        eprintln!(
            "flint-init: container {}: {}",
            container.id,
            crate::error_chain::chain(&error)
        );
    }
    *container.stdin.lock().await = None;
    container.state.send_replace(State::Exited(exit));
}

/// Cgroup, overlay and folders.
async fn remove_traces(container: &Container) -> Result<()> {
    let failed = |source| ContainerError::Cgroup {
        id: container.id.to_string(),
        source,
    };
    container.cgroup.remove().await.map_err(failed)?;
    subpath::release(&container.id).map_err(container.io("unmounting parts of its volumes"))?;
    let rootfs = paths::rootfs(&container.id);
    // EINVAL: it is no mount point (any more), ENOENT: it never came to be.
    match umount2(&rootfs, MntFlags::MNT_DETACH) {
        Ok(()) | Err(nix::errno::Errno::EINVAL | nix::errno::Errno::ENOENT) => {}
        Err(error) => return Err(container.io("unmounting its root")(error.into())),
    }
    let folders = [
        paths::container_scratch(container.scratch.as_ref(), &container.id),
        paths::oci_state(&container.id),
        paths::bundle(&container.id),
    ];
    // A container may have written millions of files.
    let removing = move || folders.iter().try_for_each(|folder| remove_folder(folder));
    let removed = tokio::task::spawn_blocking(removing).await;
    removed
        .unwrap_or_else(|error| Err(std::io::Error::other(error)))
        .map_err(container.io("removing its files"))
}

fn remove_folder(folder: &Path) -> std::io::Result<()> {
    match fs::remove_dir_all(folder) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}
