//! Launches sandboxes, and takes over those of an earlier flintd.

use std::{
    collections::{HashMap, HashSet},
    fs::{self, File},
    io,
    net::Ipv4Addr,
    ops::Range,
    os::{
        fd::{AsFd, AsRawFd, OwnedFd},
        unix::fs::{DirBuilderExt, FileExt, FileTypeExt, PermissionsExt},
    },
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use flint_api::{
    guest::Interface,
    vmm::{ExitReason, MAX_FDS, state::Phase},
};

use super::{
    DiskSource, DiskSpec, Exited, Inner, Sandbox, SandboxError, SandboxSpec, TakenOver,
    control::Control,
    file_error,
    guest::connect_lazily,
    intent::{self, Folder, Intent},
    shell::{DiskFds, NetParts, Parts, Ready, Shell, ShellPlan, identity_of, mark_ready},
    supervisor::{Attached, End, Held, explain, from_status, supervise},
    uids::Uids,
};
use crate::{
    cgroup::{Cgroups, Limits},
    chain,
    network::{self, Lease, Network, NetworkError},
    process::{self, Process},
    scratch::Scratch,
    timeline::Timeline,
};

/// How long a VMM of an earlier flintd may take to answer.
const TAKE_OVER_TIMEOUT: Duration = Duration::from_secs(10);
/// Guest memory comes in pages of this size.
const MEMORY_GRANULE: u64 = 2 << 20;

/// What sandboxes are made with.
#[derive(Clone, Debug)]
pub struct Config {
    /// Sandboxes' folders go to `sandboxes` in here, for example `/run/flint`. A tmpfs, so that a reboot forgets them.
    pub run_dir: PathBuf,
    /// Scratch templates and disks go to `scratch` in here, for example `/var/lib/flint`.
    pub state_dir: PathBuf,
    /// flint-vmm.
    pub vmm: PathBuf,
    /// The guests' kernel: a bzImage or an ELF file.
    pub kernel: PathBuf,
    /// The guests' initrd with flint-init; absent only where the kernel has it built in.
    pub initrd: Option<PathBuf>,
    /// The guests' kernel command line.
    pub cmdline: String,
    /// User and group ids for VMMs, one each, that nothing else on this host has.
    pub uids: Range<u32>,
    /// Name of the sandboxes' parent cgroup.
    pub cgroup: String,
    /// The pod network.
    pub network: network::Config,
    /// How long a guest may take from its first instruction to its first call.
    pub boot_timeout: Duration,
}

impl Config {
    /// What the packages install, with the given folders and files.
    pub fn new(run_dir: PathBuf, state_dir: PathBuf, vmm: PathBuf, kernel: PathBuf, initrd: Option<PathBuf>) -> Self {
        Self {
            run_dir,
            state_dir,
            vmm,
            kernel,
            initrd,
            // Quiet, because each byte on the serial line is an exit; no PCI, because there is none to probe.
            cmdline: "console=ttyS0 quiet panic=-1 pci=off".into(),
            uids: 1_879_048_192..1_879_113_728,
            cgroup: "flint".into(),
            network: network::Config::default(),
            boot_timeout: Duration::from_secs(120),
        }
    }
}

/// Makes sandboxes. One for each host.
#[derive(Debug)]
pub struct Manager {
    config: Config,
    vmm: Arc<Path>,
    kernel: File,
    initrd: Option<File>,
    sandboxes: PathBuf,
    cgroups: Cgroups,
    network: Arc<Network>,
    scratch: Arc<Scratch>,
    uids: Uids,
    found: Mutex<HashMap<String, Found>>,
}

/// What a folder of an earlier flintd stands for.
#[derive(Debug)]
enum Found {
    Running(Sandbox),
    Ending(End),
}

impl Manager {
    /// Checks everything that starts will need, and takes over what an earlier flintd left: the VMMs that still run are
    /// connected, the others are cleaned up.
    pub async fn new(config: Config) -> Result<Self, SandboxError> {
        check_kvm(Path::new("/dev/kvm"))?;
        check_vmm(&config.vmm)?;
        let kernel = open_kernel(&config.kernel)?;
        let initrd = config.initrd.as_deref().map(open_initrd).transpose()?;
        process::become_subreaper().map_err(file_error("become the parent of VMMs in", &config.run_dir))?;
        let sandboxes = config.run_dir.join("sandboxes");
        let make = fs::DirBuilder::new().recursive(true).mode(0o700).create(&sandboxes);
        make.map_err(file_error("make", &sandboxes))?;
        let cgroups = Cgroups::open(&config.cgroup)?;
        let scratch = Arc::new(Scratch::open(config.state_dir.join("scratch"))?);
        let left = read_intents(&sandboxes)?;
        let with_cgroup = cgroups.list()?;
        let addresses: Vec<_> = left.iter().filter_map(Left::address).collect();
        // Nothing after this can fail: the network is there only if the manager is.
        let (network, leases) = Network::start(config.network.clone(), &addresses).await?;
        let manager = Self {
            vmm: config.vmm.as_path().into(),
            kernel,
            initrd,
            sandboxes,
            cgroups,
            network: Arc::new(network),
            scratch,
            uids: Uids::new(config.uids.clone()),
            found: Mutex::default(),
            config,
        };
        manager.end_strays(&with_cgroup, &left).await;
        manager.take_over_all(left, leases).await;
        Ok(manager)
    }

    /// What does not work on this host as it should, for the log and for `flint doctor`.
    pub fn warnings(&self) -> &[String] {
        self.cgroups.warnings()
    }

    /// The pods' network.
    pub fn network(&self) -> &Network {
        &self.network
    }

    /// Makes what scratch disks of this size are copied from, so that no start waits for it.
    pub async fn prepare_scratch(&self, bytes: u64) -> Result<(), SandboxError> {
        let scratch = Arc::clone(&self.scratch);
        Ok(blocking(move || scratch.prepare(bytes)).await??)
    }

    /// Starts a sandbox whose guest has taken its identity and waits for containers. An error, or dropping the future,
    /// leaves nothing behind; after an error that has happened already.
    pub async fn launch(&self, spec: SandboxSpec, timeline: &Timeline) -> Result<Sandbox, SandboxError> {
        let spec = checked(spec)?;
        let (held, uid) = self.hold(&spec)?;
        let (folder, address) = (held.folder.clone(), held.lease.as_ref().map(Lease::address));
        let plan = ShellPlan {
            vmm: Arc::clone(&self.vmm),
            id: spec.id.clone(),
            uid,
            folder: folder.clone(),
            cgroup: held.cgroup.clone(),
        };
        let (end, attach) = supervise(held);
        let guard = end.kill_on_drop();
        let shell = Shell::spawn(plan, attach, timeline);
        match self.start(&spec, address, shell, &end, &folder, timeline).await {
            Ok(Ready { control, channel }) => {
                guard.disarm();
                Ok(Sandbox(Arc::new(Inner {
                    id: spec.id,
                    address,
                    control,
                    guest: channel,
                    end,
                })))
            }
            Err(error) => Err(explain(&end, error).await),
        }
    }

    /// Writes down what the sandbox will hold, then takes it.
    fn hold(&self, spec: &SandboxSpec) -> Result<(Held, u32), SandboxError> {
        let uid = self
            .uids
            .take()
            .ok_or_else(|| spec_error(&spec.id, "all user ids for VMMs are in use"))?;
        let lease = spec.net.is_some().then(|| self.network.lease()).transpose()?;
        let address = lease.as_ref().map(Lease::address);
        let intent = Intent {
            id: spec.id.clone(),
            uid: uid.get(),
            address,
        };
        let folder = Folder::create(&self.sandboxes, &intent)?;
        let limits = Limits {
            guest_memory_bytes: spec.memory_bytes,
            vcpus: spec.vcpus,
        };
        let made = self.cgroups.create(&spec.id, limits).inspect_err(|_| {
            // Both may be repeated, and the error that is returned is the telling one.
            let _ = self.cgroups.of(&spec.id).destroy();
            let _ = folder.remove();
        });
        let held = Held {
            cgroup: made?,
            folder,
            lease,
            network: Arc::clone(&self.network),
            uid: Some(uid),
        };
        Ok((held, intent.uid))
    }

    async fn start(
        &self,
        spec: &SandboxSpec,
        address: Option<Ipv4Addr>,
        shell: impl Future<Output = Result<Shell, SandboxError>>,
        end: &End,
        folder: &Folder,
        timeline: &Timeline,
    ) -> Result<Ready, SandboxError> {
        // None of these needs another; the slowest is the VMM's jail.
        let (shell, tap, disks) = tokio::try_join!(shell, self.plug(address), self.open_disks(spec))?;
        let net = match (&spec.net, address, tap) {
            (Some(spec), Some(address), Some(tap)) => Some(NetParts {
                spec,
                mac: network::addresses::mac_of(address),
                tap,
            }),
            _ => None,
        };
        let kernel = reopen(&self.kernel, &self.config.kernel)?;
        let initrd = self
            .initrd
            .as_ref()
            .map(|file| reopen(file, Path::new("initrd")))
            .transpose()?;
        let initrd = initrd.as_ref().map(AsFd::as_fd);
        let parts = Parts {
            spec,
            cmdline: &self.config.cmdline,
            kernel: kernel.as_fd(),
            initrd,
            disks,
            net,
        };
        let identity = identity_of(
            &spec.identity,
            address.map(|address| self.interface(address)).into_iter().collect(),
        )?;
        let claimed = shell.claim(parts, timeline).await?;
        let running = claimed.boot(end, self.config.boot_timeout, timeline).await?;
        let vsock = folder.path("vsock.sock");
        let adopted = running.adopt(&vsock, identity, timeline);
        // A guest that dies meanwhile must not be waited for.
        let ready = tokio::select! {
            ready = adopted => ready?,
            _ = end.wait() => return Err(SandboxError::Died),
        };
        mark_ready(folder)?;
        Ok(ready)
    }

    async fn plug(&self, address: Option<Ipv4Addr>) -> Result<Option<OwnedFd>, SandboxError> {
        match address {
            Some(address) => Ok(Some(self.network.plug(address).await?)),
            None => Ok(None),
        }
    }

    async fn open_disks(&self, spec: &SandboxSpec) -> Result<Vec<DiskFds>, SandboxError> {
        let mut disks = Vec::with_capacity(spec.disks.len());
        for disk in &spec.disks {
            disks.push(match &disk.source {
                DiskSource::Image { table, packs } => {
                    DiskFds::Image(std::iter::once(table).chain(packs).map(Arc::clone).collect())
                }
                DiskSource::Raw { file } => DiskFds::Raw(Arc::clone(file)),
                DiskSource::Scratch { bytes } => {
                    let (scratch, bytes) = (Arc::clone(&self.scratch), *bytes);
                    DiskFds::Raw(Arc::new(blocking(move || scratch.make(bytes)).await??.into()))
                }
            });
        }
        Ok(disks)
    }

    fn interface(&self, address: Ipv4Addr) -> Interface {
        let network = self.network.config();
        Interface {
            mac: network::addresses::mac_of(address).to_vec(),
            name: "eth0".into(),
            addresses: vec![format!("{address}/{}", network.range.prefix())],
            gateways: vec![self.network.gateway().to_string()],
            mtu: network.mtu,
        }
    }

    /// Ends what runs in cgroups that no folder accounts for.
    async fn end_strays(&self, with_cgroup: &[String], left: &[Left]) {
        let known: HashSet<_> = left.iter().map(|left| left.id.as_str()).collect();
        for id in with_cgroup.iter().filter(|id| !known.contains(id.as_str())) {
            let cgroup = self.cgroups.of(id);
            if let Err(error) = blocking(move || cgroup.destroy()).await.and_then(|ended| Ok(ended?)) {
                tracing::error!(
                    sandbox = id,
                    error = chain(&error),
                    "a cgroup without a sandbox cannot be removed"
                );
            }
        }
    }

    async fn take_over_all(&self, all: Vec<Left>, leases: Vec<Lease>) {
        let mut leases: HashMap<_, _> = leases.into_iter().map(|lease| (lease.address(), lease)).collect();
        let mut probes = tokio::task::JoinSet::new();
        for left in all {
            let lease = left.address().and_then(|address| leases.remove(&address));
            let has_network = left.address().is_none() || lease.is_some();
            let held = Held {
                cgroup: self.cgroups.of(&left.id),
                lease,
                network: Arc::clone(&self.network),
                uid: left.intent.as_ref().ok().map(|intent| self.uids.reserve(intent.uid)),
                folder: left.folder,
            };
            let intent = left.intent.and_then(|intent| match intent.address {
                Some(address) if !has_network => Err(NetworkError::Taken(address).into()),
                _ => Ok(intent),
            });
            probes.spawn(take_over_one(left.id, held, intent));
        }
        while let Some(probe) = probes.join_next().await {
            // A probe does not panic and is not aborted.
            let Ok((id, found)) = probe else { continue };
            self.lock_found().insert(id, found);
        }
    }

    /// Finds a sandbox that an earlier flintd launched. If it has ended, waits until it is cleaned up.
    pub async fn take_over(&self, id: &str) -> Result<TakenOver, SandboxError> {
        let found = self
            .lock_found()
            .remove(id)
            .ok_or_else(|| SandboxError::Unknown(id.to_owned()))?;
        Ok(match found {
            Found::Running(sandbox) => TakenOver::Running(sandbox),
            Found::Ending(end) => TakenOver::Ended(end.wait().await),
        })
    }

    /// Ends every sandbox of an earlier flintd that is not among `known` and was not taken over, and waits until nothing of
    /// them is left.
    pub async fn end_unknown(&self, known: &HashSet<String>) {
        let unknown: Vec<_> = self.lock_found().extract_if(|id, _| !known.contains(id)).collect();
        for (_, found) in &unknown {
            if let Found::Running(sandbox) = found {
                sandbox.kill();
            }
        }
        for (id, found) in unknown {
            let exited = match found {
                Found::Running(sandbox) => sandbox.wait().await,
                Found::Ending(end) => end.wait().await,
            };
            tracing::info!(sandbox = id, ?exited, "ended a sandbox that no pod claims");
        }
    }

    /// Removes what the manager itself holds on the host: bridge, rules, cgroup. Only when no sandbox is left.
    pub async fn remove(self) -> Result<(), SandboxError> {
        if let Some(network) = Arc::into_inner(self.network) {
            network.remove().await?;
        }
        Ok(self.cgroups.remove()?)
    }

    fn lock_found(&self) -> std::sync::MutexGuard<'_, HashMap<String, Found>> {
        self.found.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Takes one sandbox over, or begins to clean it up.
async fn take_over_one(id: String, held: Held, intent: Result<Intent, SandboxError>) -> (String, Found) {
    let folder = held.folder.clone();
    let alive = match intent {
        Ok(intent) => reconnect_in_time(&held).await.map(|alive| (intent, alive)),
        Err(error) => {
            let error = chain(&error);
            tracing::error!(sandbox = id, error, "a sandbox that cannot be taken over is ended");
            Err(stopped(format!("flintd could not take it over: {error}")))
        }
    };
    let (end, attach) = supervise(held);
    // The supervisor waits for the answer, and ends with the runtime only.
    let found = match alive {
        Ok((intent, (control, attached))) => {
            let _ = attach.send(Ok(attached));
            let guest = connect_lazily(folder.path("vsock.sock"));
            Found::Running(Sandbox(Arc::new(Inner {
                id: intent.id,
                address: intent.address,
                control,
                guest,
                end,
            })))
        }
        Err(why) => {
            let _ = attach.send(Err(why));
            Found::Ending(end)
        }
    };
    (id, found)
}

async fn reconnect_in_time(held: &Held) -> Result<(Control, Attached), Exited> {
    let late = |_| Exited {
        reason: ExitReason::VmmError,
        detail: format!("the VMM did not answer within {TAKE_OVER_TIMEOUT:?} when flintd came back"),
    };
    tokio::time::timeout(TAKE_OVER_TIMEOUT, reconnect(held))
        .await
        .map_err(late)?
}

/// Connects to a VMM of an earlier flintd. An error says why the sandbox is to end, unless its VMM has said why it ended.
async fn reconnect(held: &Held) -> Result<(Control, Attached), Exited> {
    if !held.folder.path("ready").exists() {
        return Err(stopped("flintd ended before the sandbox's start was complete"));
    }
    let gone = || from_status(None);
    let (control, events) = Control::connect(&held.folder.path("control.sock")).map_err(|_| gone())?;
    let (state, pid) = control.hello().await.map_err(|_| gone())?;
    let process = Process::open(pid).map_err(|_| gone())?;
    // The id could have passed to another process since the packet; a process in the sandbox's cgroup is the VMM.
    let ours = held.cgroup.contains(pid).unwrap_or(false);
    let runs = matches!(state.phase(), Phase::Running | Phase::Paused);
    if ours && runs {
        Ok((control, Attached { events, process }))
    } else {
        Err(gone())
    }
}

fn stopped(detail: impl Into<String>) -> Exited {
    Exited {
        reason: ExitReason::Stopped,
        detail: detail.into(),
    }
}

/// What an earlier flintd left of a sandbox.
#[derive(Debug)]
struct Left {
    id: String,
    folder: Folder,
    intent: Result<Intent, SandboxError>,
}

impl Left {
    fn address(&self) -> Option<Ipv4Addr> {
        self.intent.as_ref().ok()?.address
    }
}

/// All folders with what their intents say. Those without an intent held nothing yet, and are removed.
fn read_intents(sandboxes: &Path) -> Result<Vec<Left>, SandboxError> {
    let mut left = Vec::new();
    for id in intent::list(sandboxes)? {
        let folder = Folder::of(sandboxes, &id);
        let intent = match folder.intent() {
            Ok(None) => {
                folder.remove()?;
                continue;
            }
            Ok(Some(intent)) if intent.id != id => Err(spec_error(&id, "its folder has the intent of another sandbox")),
            Ok(Some(intent)) => Ok(intent),
            Err(error) => Err(error),
        };
        left.push(Left { id, folder, intent });
    }
    Ok(left)
}

fn spec_error(id: &str, what: impl Into<String>) -> SandboxError {
    SandboxError::Spec {
        id: id.to_owned(),
        what: what.into(),
    }
}

/// The wish with its sizes rounded, if it can be fulfilled.
fn checked(mut spec: SandboxSpec) -> Result<SandboxSpec, SandboxError> {
    let wrong = |what: &str| Err(spec_error(&spec.id, what));
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    // It becomes a folder, a cgroup and an argument.
    if !(1..=63).contains(&spec.id.len()) || !spec.id.chars().all(plain) || spec.id.starts_with(['.', '-']) {
        return wrong("an id has 1 to 63 bytes of a-z A-Z 0-9 - _ . and begins with a letter, digit or _");
    }
    if !(1..=32).contains(&spec.vcpus) {
        return wrong("a sandbox has 1 to 32 vCPUs");
    }
    let Some(memory) = spec
        .memory_bytes
        .checked_next_multiple_of(MEMORY_GRANULE)
        .filter(|bytes| *bytes >= 16 << 20)
    else {
        return wrong("a sandbox has at least 16 MiB of memory");
    };
    let mut serials = HashSet::new();
    for DiskSpec { serial, source, .. } in &spec.disks {
        if serial.is_empty() || serial.len() > 20 || !serial.is_ascii() || !serials.insert(serial) {
            return wrong("each disk has a serial of its own, of 1 to 20 ASCII bytes");
        }
        if matches!(source, DiskSource::Image { packs, .. } if packs.len() >= MAX_FDS) {
            return wrong("an image has at most 63 pack files");
        }
    }
    spec.memory_bytes = memory;
    Ok(spec)
}

/// A description of its own: VMMs that read the kernel at the same time must not share a file position.
fn reopen(file: &File, path: &Path) -> Result<File, SandboxError> {
    File::open(format!("/proc/self/fd/{}", file.as_raw_fd())).map_err(file_error("open once more", path))
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, SandboxError> {
    // It fails only while the runtime is shutting down.
    tokio::task::spawn_blocking(work).await.map_err(|_| SandboxError::Died)
}

fn unusable(role: &'static str, path: &Path, advice: &'static str, source: Option<io::Error>) -> SandboxError {
    SandboxError::Unusable {
        role,
        path: path.to_owned(),
        advice,
        source,
    }
}

fn check_kvm(path: &Path) -> Result<(), SandboxError> {
    let error = |advice, source| unusable("KVM device", path, advice, source);
    match File::options().read(true).write(true).open(path) {
        Ok(file) if file.metadata().is_ok_and(|data| data.file_type().is_char_device()) => Ok(()),
        Ok(_) => Err(error("it is no device; is this a container without /dev/kvm?", None)),
        Err(source) if source.kind() == io::ErrorKind::NotFound => {
            let advice = "load the module kvm_intel or kvm_amd, and switch virtualization on in the firmware";
            Err(error(advice, Some(source)))
        }
        Err(source) if source.kind() == io::ErrorKind::PermissionDenied => Err(error(
            "run flintd as root, or as a member of the device's group",
            Some(source),
        )),
        Err(source) => Err(error("see what the kernel log says about kvm", Some(source))),
    }
}

fn check_vmm(path: &Path) -> Result<(), SandboxError> {
    let error = |advice, source| unusable("VMM", path, advice, source);
    let data = fs::metadata(path).map_err(|source| error("install flint-vmm, or name it by --vmm", Some(source)))?;
    if !data.is_file() || data.permissions().mode() & 0o111 == 0 {
        return Err(error("it is no executable file; name flint-vmm by --vmm", None));
    }
    Ok(())
}

fn open_kernel(path: &Path) -> Result<File, SandboxError> {
    let error = |advice, source| unusable("guest kernel", path, advice, source);
    let advice = "install the guest kernel, or name it by --kernel";
    let file = File::open(path).map_err(|source| error(advice, Some(source)))?;
    let (mut elf, mut bz_image) = ([0; 4], [0; 4]);
    let read = |bytes: &mut [u8], offset| file.read_exact_at(bytes, offset).is_ok();
    // The magic of ELF, and the header's of the Linux x86 boot protocol at 0x202.
    let is_kernel = (read(&mut elf, 0) && &elf == b"\x7fELF") || (read(&mut bz_image, 0x202) && &bz_image == b"HdrS");
    is_kernel
        .then_some(file)
        .ok_or_else(|| error("it is neither an ELF vmlinux nor a bzImage; see --kernel", None))
}

fn open_initrd(path: &Path) -> Result<File, SandboxError> {
    let error = |source| unusable("guest initrd", path, "install it, or name it by --initrd", source);
    let file = File::open(path).map_err(|source| error(Some(source)))?;
    let has_bytes = file.metadata().is_ok_and(|data| data.is_file() && data.len() > 0);
    has_bytes.then_some(file).ok_or_else(|| error(None))
}

#[cfg(test)]
#[path = "manager_tests.rs"]
mod tests;
