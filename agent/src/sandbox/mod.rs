//! Sandboxes: from a wish to a microVM whose guest answers, and back to nothing.
//!
//! ```text
//!   Manager::launch   Shell ------> Claimed ------> Running           Sandbox (a handle; clones share it)
//!                     a jailed      machine,        guest dialled,       |
//!                     VMM process   kernel, disks,  identity taken     supervisor (a task): the VMM's events and end,
//!                                   tap bound                          then removes what the sandbox held
//! ```
//!
//! - [`pool`]: sandboxes ahead of need: the template, the clones that are parked, and the claim of one.
//! - [`means`]: what the host gives to each: folder, cgroup, user id, address, tap, scratch disk.
//! - [`manager`]: launches sandboxes, hands out those that were taken over.
//! - [`takeover`]: finds the sandboxes of an earlier flintd and takes them over.
//! - [`supplies`]: KVM, VMM, kernel and initrd: whether they are there, and what to do if not.
//! - [`shell`]: the steps of a start, as types.
//! - [`control`], [`packet`]: the VMM control protocol.
//! - [`supervisor`]: one task for each sandbox; says why it ended.
//! - [`save`]: a sandbox that stands still, written into files.
//! - [`restore`]: a sandbox that is made of such files.
//! - [`chunks`]: who brings what images lack while guests read them.
//! - [`pages`]: who brings a sandbox's memory while it runs, from chunks.
//! - [`intent`]: what a sandbox holds on this host, on disk before it is taken.
//! - [`guest`]: gRPC to flint-init over the VMM's vsock socket.

mod chunks;
pub mod control;
mod guest;
mod intent;
mod manager;
mod means;
mod packet;
mod pages;
pub mod pool;
mod restore;
mod save;
mod shell;
mod supervisor;
mod supplies;
mod takeover;
mod uids;

use std::{
    collections::HashMap,
    io,
    net::Ipv4Addr,
    os::fd::OwnedFd,
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use flint_api::{
    guest::{Dns, HostAlias, guest_client::GuestClient},
    vmm::{self, ExitReason, RateLimit, State, request::Command, state::Phase},
};
use thiserror::Error;
use tokio::sync::watch;
use tonic::transport::Channel;

pub use self::{
    chunks::{ChunkFile, ChunkServer, ChunkSource},
    manager::{Config, Manager},
};
pub(crate) use self::{pages::MAX_PACKS, save::is_disk_full};
use crate::{
    cgroup::CgroupError, hook::HookError, network::NetworkError, probe::KvmError, process::SpawnError,
    scratch::ScratchError,
};

/// What a sandbox is to be made of.
#[derive(Clone, Debug)]
pub struct SandboxSpec {
    /// Its name: 1 to 63 bytes of `a-z A-Z 0-9 - _ .`, not beginning with a dot. Never used twice.
    pub id: String,
    /// 1 to 32.
    pub vcpus: u32,
    /// Guest memory; rounded up to 2 MiB.
    pub memory_bytes: u64,
    /// In the order in which the guest sees them.
    pub disks: Vec<DiskSpec>,
    /// Absent: no network.
    pub net: Option<NetSpec>,
    /// What the guest is told about itself. Address and entropy are added.
    pub identity: Identity,
}

/// A disk of a sandbox.
#[derive(Clone, Debug)]
pub struct DiskSpec {
    /// How the guest finds it: at most 20 ASCII bytes, `image-0` ... or `scratch`.
    pub serial: String,
    /// What is on it.
    pub source: DiskSource,
    /// Whether the guest may only read it. Images always are.
    pub read_only: bool,
    /// Absent: no limit.
    pub rate_limit: Option<RateLimit>,
}

/// What is on a disk. Open files, not paths: what the VMM gets is what the caller opened.
#[derive(Clone, Debug)]
pub enum DiskSource {
    /// An image: its device table, and its pack files in the order that the table names them.
    Image {
        /// What whoever keeps images calls it; a sandbox that is taken over still knows it.
        name: String,
        /// The device table.
        table: Arc<OwnedFd>,
        /// At most 62.
        packs: Vec<Arc<OwnedFd>>,
    },
    /// A file or block device as it is.
    Raw {
        /// Open for reading, and for writing unless the disk is read-only.
        file: Arc<OwnedFd>,
    },
    /// A new scratch file system of at least this size, which ends with the sandbox.
    Scratch {
        /// Its size.
        bytes: u64,
    },
}

/// A sandbox's network interface.
#[derive(Clone, Debug, Default)]
pub struct NetSpec {
    /// Limit of what the guest receives.
    pub rx_limit: Option<RateLimit>,
    /// Limit of what the guest sends.
    pub tx_limit: Option<RateLimit>,
}

/// What the guest is told about itself.
#[derive(Clone, Debug, Default)]
pub struct Identity {
    /// Host name.
    pub hostname: String,
    /// Name service.
    pub dns: Dns,
    /// Further lines of /etc/hosts.
    pub aliases: Vec<HostAlias>,
    /// Kernel parameters of the guest, by dotted name.
    pub sysctls: HashMap<String, String>,
}

/// Why a sandbox is no more.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Exited {
    /// Kind of end.
    pub reason: ExitReason,
    /// For people; may be empty.
    pub detail: String,
}

/// What became of a sandbox that an earlier flintd launched.
#[derive(Debug)]
pub enum TakenOver {
    /// It runs, and is ours now.
    Running(Sandbox),
    /// It ended meanwhile; nothing of it is left on this host.
    Ended(Exited),
}

/// A running sandbox. Clones are the same sandbox; dropping them does not end it.
#[derive(Clone, Debug)]
pub struct Sandbox(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    id: String,
    address: Option<Ipv4Addr>,
    images: Vec<String>,
    control: control::Control,
    guest: Channel,
    end: supervisor::End,
    /// Where to note what it uses of its memory.
    lesson: Mutex<Option<Arc<pool::WorkingSet>>>,
}

/// How long a sandbox may take to say what it uses: its end may wait for that.
const LESSON_TIMEOUT: Duration = Duration::from_secs(5);

impl Sandbox {
    fn new(spec: &SandboxSpec, address: Option<Ipv4Addr>, ready: shell::Ready, end: supervisor::End) -> Self {
        Self(Arc::new(Inner {
            id: spec.id.clone(),
            address,
            images: means::image_names(spec),
            control: ready.control,
            guest: ready.channel,
            end,
            lesson: Mutex::default(),
        }))
    }

    /// What it uses of its memory until its containers have started is to be noted there.
    fn teaching(self, lesson: Option<Arc<pool::WorkingSet>>) -> Self {
        *self.lesson() = lesson;
        self
    }

    fn lesson(&self) -> std::sync::MutexGuard<'_, Option<Arc<pool::WorkingSet>>> {
        self.0.lesson.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Its containers have started: what later sandboxes can learn of that is noted, once.
    pub async fn settled(&self) {
        let lesson = self.lesson().take();
        if let Some(lesson) = lesson {
            let recorded = tokio::time::timeout(LESSON_TIMEOUT, lesson.record(&self.0.control));
            if recorded.await.is_err() {
                tracing::warn!(sandbox = self.id(), "it has not said what it uses of its memory");
            }
        }
    }

    /// Its name.
    pub fn id(&self) -> &str {
        &self.0.id
    }

    /// Its addresses on the pod network.
    pub fn addresses(&self) -> Vec<Ipv4Addr> {
        self.0.address.into_iter().collect()
    }

    /// Names of the images that it reads.
    pub fn images(&self) -> &[String] {
        &self.0.images
    }

    /// A client of its guest; cheap, and reconnects by itself.
    pub fn guest(&self) -> GuestClient<Channel> {
        GuestClient::new(self.0.guest.clone())
    }

    /// Waits until it has ended and everything it held on this host is gone. Any number of callers may wait.
    pub async fn wait(&self) -> Exited {
        self.0.end.wait().await
    }

    /// The end as it becomes known, for those who select over many.
    pub fn exited(&self) -> watch::Receiver<Option<Exited>> {
        self.0.end.watch()
    }

    /// Ends it without asking the guest. Returns at once; [`wait`](Sandbox::wait) says when it is done.
    pub fn kill(&self) {
        self.0.end.kill();
    }

    /// Has its vCPUs and devices stand still; nothing happens to one that does. Not to be called twice at a time.
    pub async fn pause(&self) -> Result<(), SandboxError> {
        if !self.is_paused().await? {
            self.0.control.command(Command::Pause(vmm::Pause {}), &[]).await?;
        }
        Ok(())
    }

    /// Has it go on where it stood; nothing happens to one that runs. Not to be called twice at a time.
    pub async fn resume(&self) -> Result<(), SandboxError> {
        if self.is_paused().await? {
            self.0.control.command(Command::Resume(vmm::Resume {}), &[]).await?;
        }
        Ok(())
    }

    /// Whether it stands still.
    pub async fn is_paused(&self) -> Result<bool, SandboxError> {
        Ok(self.state().await?.phase() == Phase::Paused)
    }

    /// Phase and counters, from the VMM.
    pub async fn state(&self) -> Result<State, SandboxError> {
        Ok(self.0.control.state().await?)
    }
}

/// A sandbox could not be had, or something of it failed.
#[derive(Debug, Error)]
pub enum SandboxError {
    /// A template cannot be used.
    #[error("the template {path} cannot be used")]
    Template {
        /// Its folder.
        path: PathBuf,
        /// Why not.
        #[source]
        source: pool::TemplateError,
    },
    /// There is no template yet, or never will be.
    #[error(
        "this host has no template: its pool is off (--pool 0), or its first guest has not come up yet; flintd's log says more"
    )]
    NoTemplate,
    /// Another host's template is not for this one.
    #[error("this host cannot use the template: {0}")]
    ForeignTemplate(String),
    /// A snapshot cannot be run on this host.
    #[error("this host cannot run the snapshot: {0}")]
    Snapshot(String),
    /// The wish cannot be fulfilled.
    #[error("sandbox {id:?}: {what}")]
    Spec {
        /// Of the sandbox.
        id: String,
        /// What is wrong with it.
        what: String,
    },
    /// There is no KVM to run a guest on.
    #[error("{error}; {}", .error.remedy())]
    Kvm {
        /// Why.
        #[from]
        error: KvmError,
    },
    /// A file that flintd was told to use cannot be used.
    #[error("cannot use the {role} {path}: {advice}")]
    Unusable {
        /// What it is for.
        role: &'static str,
        /// The file.
        path: PathBuf,
        /// What to do.
        advice: &'static str,
        /// What went wrong, where the kernel said so.
        #[source]
        source: Option<io::Error>,
    },
    /// A file or folder of a sandbox did not do as asked.
    #[error("could not {action} {path}")]
    File {
        /// What was tried.
        action: &'static str,
        /// On which file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// Processes.
    #[error("could not start a VMM")]
    Spawn(#[from] SpawnError),
    /// cgroups.
    #[error("could not set up the sandbox's cgroup")]
    Cgroup(#[from] CgroupError),
    /// The network.
    #[error("could not set up the sandbox's network")]
    Network(#[from] NetworkError),
    /// Scratch disk.
    #[error("could not make a scratch disk")]
    Scratch(#[from] ScratchError),
    /// The VMM refused or broke the protocol.
    #[error("the VMM could not do its part")]
    Control(#[from] control::ControlError),
    /// The VMM's process or guest came to an end before the start was done.
    #[error("the sandbox ended while it was starting: {} {} {}", .exited.reason.as_str_name(), .exited.detail, .log)]
    Ended {
        /// How.
        exited: Exited,
        /// The last lines of the VMM's log and of the guest's console.
        log: String,
    },
    /// The guest did not come up.
    #[error(
        "the guest has not dialled within {0:?}: see serial.log; is the kernel one for flint, and the initrd flint-init's?"
    )]
    BootTimeout(Duration),
    /// A clone has not said that it is another machine than the one that it was cloned from. Its random numbers may be that one's.
    #[error(
        "the guest has not noticed within {0:?} that it is a clone, and may still draw the random numbers of the machine that it was cloned from: its network stays closed; does its kernel have the driver of VMGenID (CONFIG_VMGENID)?"
    )]
    WakeTimeout(Duration),
    /// flint-init could not be reached.
    #[error("could not connect to flint-init in the guest")]
    Connect(#[source] tonic::transport::Error),
    /// The guest came up, and then did not answer.
    #[error("the guest has not taken its identity within {0:?}: see serial.log")]
    IdentityTimeout(Duration),
    /// flint-init refused.
    #[error("the guest could not take its identity: {0}")]
    Identity(#[source] Box<tonic::Status>),
    /// The pod's own program failed that was to make it ready for where it is.
    #[error("the hook after the restore has failed")]
    Hook(#[source] HookError),
    /// flint-init could not bring up the pod's vCPUs or memory.
    #[error("the guest could not take its size: {0}")]
    Size(#[source] Box<tonic::Status>),
    /// The guest did not answer.
    #[error("the guest has not taken its size within {0:?}: see serial.log")]
    SizeTimeout(Duration),
    /// The VMM is gone; [`SandboxError::Ended`] tells more, where more is known.
    #[error("the sandbox ended while it was starting")]
    Died,
    /// There is no such sandbox here.
    #[error("there is no sandbox {0:?} on this host")]
    Unknown(String),
}

pub(crate) fn file_error(action: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> SandboxError {
    let path = path.into();
    move |source| SandboxError::File { action, path, source }
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, SandboxError> {
    // It fails only while the runtime is shutting down.
    tokio::task::spawn_blocking(work).await.map_err(|_| SandboxError::Died)
}
