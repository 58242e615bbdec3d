//! What pods need from below, as traits: machines to run in and images to run. flintd puts the microVM manager and the
//! image store behind them; the tests of the pod state machine put scripted ones.

use std::{collections::HashSet, fmt, sync::Arc, time::Instant};

use flint_api::{
    guest,
    guest::guest_client::GuestClient,
    host,
    vmm::{self, ExitReason},
};
use thiserror::Error;
use tokio::sync::{mpsc, watch};
use tonic::{async_trait, transport::Channel};

use crate::{hook::Hook, probe::KvmKind, saved::SavedFiles, timeline::Timeline};

/// What a sandbox is made of.
#[derive(Clone, Debug)]
pub struct SandboxPlan {
    /// The sandbox's own name: another one for each time a pod's sandbox is made.
    pub id: String,
    /// vCPUs.
    pub vcpus: u32,
    /// Guest memory.
    pub memory_bytes: u64,
    /// Digests of the images; the one at `n` becomes the disk with serial `image-n`.
    pub images: Vec<String>,
    /// Size of the disk with serial `scratch`.
    pub scratch_bytes: u64,
    /// What tells this machine from others; the sandbox adds address and entropy.
    pub identity: Identity,
}

/// A pod's part of what the guest is told about itself.
#[derive(Clone, Debug, Default)]
pub struct Identity {
    /// Host name.
    pub hostname: String,
    /// Name service; absent: what the host uses.
    pub dns: Option<guest::Dns>,
    /// Further lines of /etc/hosts.
    pub host_aliases: Vec<guest::HostAlias>,
    /// Kernel parameters of the guest.
    pub sysctls: std::collections::HashMap<String, String>,
}

/// Why a sandbox is no more.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SandboxExit {
    /// Kind of end.
    pub reason: ExitReason,
    /// For people; may be empty.
    pub detail: String,
}

impl fmt::Display for SandboxExit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let reason = match self.reason {
            ExitReason::Unspecified => "for an unknown reason",
            ExitReason::Poweroff => "the guest powered itself off",
            ExitReason::Reset => "the guest asked for a reset",
            ExitReason::TripleFault => "the guest's CPU met a triple fault",
            ExitReason::Panic => "the guest kernel panicked",
            ExitReason::KvmError => "KVM could not go on",
            ExitReason::VmmError => "the VMM could not go on",
            ExitReason::Stopped => "it was stopped",
            ExitReason::Seccomp => "the VMM made a forbidden system call",
            ExitReason::Killed => "the VMM was killed",
            ExitReason::MemoryLost => "a page of the guest's memory was lost",
        };
        write!(f, "{reason}")?;
        if !self.detail.is_empty() {
            write!(f, ": {}", self.detail)?;
        }
        Ok(())
    }
}

/// A sandbox could not be had.
#[derive(Debug, Error)]
#[error("{0}")]
pub struct SandboxError(pub String);

/// What a saved sandbox was, for another one that is to load it.
#[derive(Clone, Debug, Default)]
pub struct SavedMachine {
    /// The machine.
    pub machine: vmm::CreateMachine,
    /// Address of its network interface; empty: it has none.
    pub mac: Vec<u8>,
    /// Memory that it had plugged, beyond what it was made with.
    pub plugged_bytes: u64,
}

/// What was saved of a sandbox.
#[derive(Debug)]
pub struct Stopped {
    /// What it was.
    pub machine: SavedMachine,
    /// Since when it stands still, if it ran before.
    pub at: Instant,
}

/// A saved sandbox, to make another one of.
#[derive(Clone, Debug)]
pub struct Origin {
    /// Its files, open for reading; none changes as long as a sandbox uses it.
    pub files: Arc<SavedFiles>,
    /// The machine in the chunk store that has its memory; absent: the file has it.
    pub memory_in_store: Option<String>,
    /// What it was.
    pub machine: SavedMachine,
    /// What its guest is to run when it has its identity, and before anything that it sends leaves it.
    pub hook: Option<Hook>,
}

/// No sandbox could be made of a saved one.
#[derive(Debug, Error)]
pub enum RestoreError {
    /// This host cannot run it, now or later; says why, for example which line of its passport differs.
    #[error("{0}")]
    Refused(String),
    /// The hook has failed.
    #[error("{0}")]
    Hook(String),
    /// Something failed.
    #[error("{0}")]
    Failed(String),
}

/// A sandbox could not be saved.
#[derive(Debug, Error)]
pub enum SaveError {
    /// There is no room for its files.
    #[error("no room")]
    NoSpace,
    /// Something else.
    #[error("{0}")]
    Failed(String),
}

/// What was found where a sandbox of an earlier flintd should be.
pub enum TakeOver {
    /// It runs.
    Running(Arc<dyn Sandbox>),
    /// It ended meanwhile.
    Ended(SandboxExit),
}

/// Makes sandboxes.
#[async_trait]
pub trait Sandboxes: Send + Sync + 'static {
    /// What lies ready for pods to come.
    fn pool(&self) -> Ready;
    /// Whether a sandbox could be launched now, and on what kind of KVM; an error says what is missing and what to do. Cheap.
    async fn ready(&self) -> Result<KvmKind, SandboxError>;
    /// Starts a sandbox whose guest has taken its identity and waits for containers. An error leaves nothing behind.
    async fn launch(&self, plan: SandboxPlan, timeline: Timeline) -> Result<Arc<dyn Sandbox>, SandboxError>;
    /// Starts a sandbox that goes on where a saved one stood, once its guest has taken its identity; nothing that it sends leaves it
    /// before. Of the plan, the sizes are those of the saved one. An error leaves nothing behind.
    async fn restore(
        &self,
        plan: SandboxPlan,
        origin: Origin,
        timeline: Timeline,
    ) -> Result<Arc<dyn Sandbox>, RestoreError>;
    /// Finds a sandbox that an earlier flintd launched.
    async fn take_over(&self, id: &str) -> Result<TakeOver, SandboxError>;
    /// Ends every sandbox on this host that is not among `known`: an earlier flintd died before it could note them.
    async fn end_unknown(&self, known: &HashSet<String>) -> Result<(), SandboxError>;
}

/// Clones that are parked.
#[derive(Clone, Debug)]
pub struct Ready {
    /// How many there should be.
    pub size: usize,
    /// How many there are.
    pub parked: watch::Receiver<usize>,
}

/// One running sandbox.
#[async_trait]
pub trait Sandbox: Send + Sync + 'static {
    /// A client of its guest; cheap.
    fn guest(&self) -> GuestClient<Channel>;
    /// The pod's addresses, without prefix length.
    fn addresses(&self) -> Vec<String>;
    /// Answers when it is no more and everything it held on the host is gone; any number of callers may wait.
    async fn exited(&self) -> SandboxExit;
    /// Its containers have started: what can be learnt of that for others is noted.
    async fn settled(&self) {}
    /// Has it stand still; answers when it does. One that stands still already does so further.
    async fn pause(&self) -> Result<(), SandboxError>;
    /// Has it go on where it stood. One that runs goes on running.
    async fn resume(&self) -> Result<(), SandboxError>;
    /// Writes it into files, and leaves it standing still where that was. After an error it may do so too.
    async fn save(&self, files: Arc<SavedFiles>) -> Result<Stopped, SaveError>;
    /// Whether it stands still.
    async fn is_paused(&self) -> Result<bool, SandboxError>;
    /// Ends it without asking the guest. Answers at once: [`exited`](Sandbox::exited) tells when it is done.
    async fn kill(&self);
}

/// An image on this host.
#[derive(Clone, Debug, Default)]
pub struct ImageInfo {
    /// As the API shows it; `in_use` is not set here.
    pub image: host::Image,
    /// How to run it.
    pub config: ImageConfig,
}

/// What an image says about running it (OCI image specification, "Image Configuration").
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ImageConfig {
    /// First part of the command line.
    pub entrypoint: Vec<String>,
    /// Default arguments.
    pub cmd: Vec<String>,
    /// `NAME=value`.
    pub env: Vec<String>,
    /// Empty: `/`.
    pub working_dir: String,
    /// `user`, `uid`, `user:group` or `uid:gid`; empty: root.
    pub user: String,
    /// Name or number; empty: SIGTERM.
    pub stop_signal: String,
}

/// An image could not be had, by what the caller can do about it.
#[derive(Clone, Debug, Error)]
pub enum ImageError {
    /// The reference, path or archive is wrong.
    #[error("{0}")]
    Invalid(String),
    /// There is no such image.
    #[error("{0}")]
    NotFound(String),
    /// The registry wants other credentials.
    #[error("{0}")]
    Denied(String),
    /// The registry cannot be reached just now, or fails.
    #[error("{0}")]
    Unavailable(String),
    /// What came is not what was asked for: a digest does not match, a layer is truncated or malformed.
    #[error("{0}")]
    Corrupt(String),
    /// It needs something that Flint does not do.
    #[error("{0}")]
    Unsupported(String),
    /// A sandbox reads it.
    #[error("{0}")]
    InUse(String),
    /// No room on this host.
    #[error("{0}")]
    NoSpace(String),
    /// Something on this host failed.
    #[error("{0}")]
    Internal(String),
}

/// A pull.
#[derive(Clone, Debug, Default)]
pub struct PullOrder {
    /// What to pull.
    pub reference: String,
    /// For its registry.
    pub credentials: Option<host::RegistryCredentials>,
    /// Take what is here if the reference is known.
    pub if_not_present: bool,
}

/// The images of this host.
#[async_trait]
pub trait Images: Send + Sync + 'static {
    /// Brings an image here. Progress goes to `progress`; a receiver that is slow or gone does not hold up the pull.
    async fn pull(&self, order: PullOrder, progress: mpsc::Sender<host::PullProgress>)
    -> Result<ImageInfo, ImageError>;
    /// Takes an image from an OCI layout folder or an archive on this host.
    async fn import(
        &self,
        path: std::path::PathBuf,
        reference: Option<String>,
        progress: mpsc::Sender<host::PullProgress>,
    ) -> Result<ImageInfo, ImageError>;
    /// The image by digest or reference, if it is here.
    async fn get(&self, name: &str) -> Result<Option<ImageInfo>, ImageError>;
    /// All images.
    async fn list(&self) -> Result<Vec<host::Image>, ImageError>;
    /// Names the bytes that the image's block device has: the same on all hosts where a guest sees the same.
    async fn device_name(&self, digest: &str) -> Result<String, ImageError>;
    /// Removes an image and says how many bytes that freed.
    async fn remove(&self, digest: &str) -> Result<u64, ImageError>;
    /// What the store of images and machines holds.
    async fn usage(&self) -> Result<host::StoreUsage, ImageError>;
    /// Reads the whole store; damage goes to `progress` chunk by chunk, and is repaired where that is asked for.
    async fn verify(
        &self,
        repair: bool,
        progress: mpsc::Sender<host::VerifyProgress>,
    ) -> Result<host::VerifyProgress, ImageError>;
}
