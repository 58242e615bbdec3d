//! Launches sandboxes, and hands out those that were taken over.

use std::{
    collections::HashSet,
    fs,
    net::Ipv4Addr,
    ops::Range,
    os::{
        fd::{AsFd, OwnedFd},
        unix::fs::DirBuilderExt,
    },
    path::PathBuf,
    sync::Arc,
    time::Duration,
};

use flint_api::{guest::Interface, vmm::MAX_FDS};

use super::{
    DiskSource, DiskSpec, Inner, Sandbox, SandboxError, SandboxSpec, TakenOver, blocking, file_error,
    intent::{Folder, Intent},
    shell::{DiskFds, NetParts, Parts, Ready, Shell, ShellPlan, identity_of, mark_ready},
    supervisor::{End, Held, explain, supervise},
    supplies::{Supplies, Supply},
    takeover::{Home, Left, Unclaimed, end_strays, read_intents},
    uids::Uids,
};
use crate::{
    cgroup::{Cgroups, Limits},
    network::{self, Gate, Lease, Network, Survivor},
    probe::KvmKind,
    process,
    scratch::Scratch,
    timeline::Timeline,
};

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
    supplies: Supplies,
    sandboxes: PathBuf,
    cgroups: Cgroups,
    network: Arc<Network>,
    scratch: Arc<Scratch>,
    uids: Uids,
    unclaimed: Unclaimed,
}

/// A start under way.
struct Begun<'a> {
    spec: &'a SandboxSpec,
    supply: &'a Supply,
    gate: Option<&'a Gate>,
    end: &'a End,
    folder: &'a Folder,
}

impl Manager {
    /// Takes over what an earlier flintd left: the VMMs that still run are connected, the others are cleaned up. What starts
    /// will need is not looked at here, but by [`ready`](Self::ready) and each launch.
    pub async fn new(config: Config) -> Result<Self, SandboxError> {
        process::become_subreaper().map_err(file_error("become the parent of VMMs in", &config.run_dir))?;
        let sandboxes = config.run_dir.join("sandboxes");
        let make = fs::DirBuilder::new().recursive(true).mode(0o700).create(&sandboxes);
        make.map_err(file_error("make", &sandboxes))?;
        let cgroups = Cgroups::open(&config.cgroup)?;
        let scratch = Arc::new(Scratch::open(config.state_dir.join("scratch"))?);
        let left = read_intents(&sandboxes)?;
        let with_cgroup = cgroups.list()?;
        let survivors: Vec<_> = left.iter().filter_map(Left::address).map(sending).collect();
        // Nothing after this can fail: the network is there only if the manager is.
        let (network, leases) = Network::start(config.network.clone(), &survivors).await?;
        let network = Arc::new(network);
        let uids = Uids::new(config.uids.clone());
        end_strays(&cgroups, &with_cgroup, &left).await;
        let home = Home {
            cgroups: &cgroups,
            network: &network,
            uids: &uids,
        };
        let unclaimed = Unclaimed::take_over(left, leases, home).await;
        Ok(Self {
            supplies: Supplies::new(config.vmm.clone(), config.kernel.clone(), config.initrd.clone()),
            sandboxes,
            cgroups,
            network,
            scratch,
            uids,
            unclaimed,
            config,
        })
    }

    /// Whether a sandbox could be launched now, and on what kind of KVM; an error says what is missing and what to do. Takes
    /// microseconds where the last launch went well.
    pub async fn ready(&self) -> Result<KvmKind, SandboxError> {
        Ok(self.supplies.take().await?.kvm)
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
        let supply = self.supplies.take().await?;
        let (held, uid) = self.hold(&spec)?;
        let folder = held.folder.clone();
        let gate = held.lease.as_ref().map(|lease| Arc::clone(lease.gate()));
        let gate = gate.as_deref();
        let plan = ShellPlan {
            vmm: self.supplies.vmm().into(),
            id: spec.id.clone(),
            uid,
            folder: folder.clone(),
            cgroup: held.cgroup.clone(),
        };
        let (end, attach) = supervise(held);
        let guard = end.kill_on_drop();
        let shell = Shell::spawn(plan, attach, timeline);
        let begun = Begun {
            spec: &spec,
            supply: &supply,
            gate,
            end: &end,
            folder: &folder,
        };
        match self.start(&begun, shell, timeline).await {
            Ok(Ready { control, channel }) => {
                guard.disarm();
                Ok(Sandbox(Arc::new(Inner {
                    images: image_names(&spec),
                    id: spec.id,
                    address: gate.map(Gate::address),
                    control,
                    guest: channel,
                    end,
                })))
            }
            Err(error) => {
                let error = explain(&end, error).await;
                // The VMM tells what the kernel told it; if that was about KVM, a look at KVM tells what to do.
                self.supplies.look_again().await?;
                Err(error)
            }
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
            images: image_names(spec),
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
        begun: &Begun<'_>,
        shell: impl Future<Output = Result<Shell, SandboxError>>,
        timeline: &Timeline,
    ) -> Result<Ready, SandboxError> {
        let Begun {
            spec,
            supply,
            gate,
            end,
            folder,
        } = *begun;
        let address = gate.map(Gate::address);
        // None of these needs another; the slowest is the VMM's jail.
        let (shell, tap, disks) = tokio::try_join!(shell, self.plug(gate), self.open_disks(spec))?;
        let net = match (&spec.net, address, tap) {
            (Some(spec), Some(address), Some(tap)) => Some(NetParts {
                spec,
                mac: network::addresses::mac_of(address),
                tap,
            }),
            _ => None,
        };
        let (kernel, initrd) = (supply.kernel()?, supply.initrd()?);
        let parts = Parts {
            spec,
            cmdline: &self.config.cmdline,
            kernel: kernel.as_fd(),
            initrd: initrd.as_ref().map(AsFd::as_fd),
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

    async fn plug(&self, gate: Option<&Gate>) -> Result<Option<OwnedFd>, SandboxError> {
        match gate {
            Some(gate) => Ok(Some(self.network.plug(gate).await?)),
            None => Ok(None),
        }
    }

    async fn open_disks(&self, spec: &SandboxSpec) -> Result<Vec<DiskFds>, SandboxError> {
        let mut disks = Vec::with_capacity(spec.disks.len());
        for disk in &spec.disks {
            disks.push(match &disk.source {
                DiskSource::Image { table, packs, .. } => {
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
            ..Default::default()
        }
    }

    /// Finds a sandbox that an earlier flintd launched. If it has ended, waits until it is cleaned up.
    pub async fn take_over(&self, id: &str) -> Result<TakenOver, SandboxError> {
        self.unclaimed.claim(id).await
    }

    /// Ends every sandbox of an earlier flintd that is not among `known` and was not taken over, and waits until nothing of
    /// them is left.
    pub async fn end_unknown(&self, known: &HashSet<String>) {
        self.unclaimed.end_unknown(known).await;
    }

    /// Removes what the manager itself holds on the host: bridge, rules, cgroup. Only when no sandbox is left.
    pub async fn remove(self) -> Result<(), SandboxError> {
        if let Some(network) = Arc::into_inner(self.network) {
            network.remove().await?;
        }
        Ok(self.cgroups.remove()?)
    }
}

/// A sandbox that still runs was let send when it was started.
fn sending(address: Ipv4Addr) -> Survivor {
    Survivor {
        address,
        may_send: true,
    }
}

/// The images that a sandbox reads.
fn image_names(spec: &SandboxSpec) -> Vec<String> {
    let image = |disk: &DiskSpec| match &disk.source {
        DiskSource::Image { name, .. } => Some(name.clone()),
        DiskSource::Raw { .. } | DiskSource::Scratch { .. } => None,
    };
    spec.disks.iter().filter_map(image).collect()
}

pub(super) fn spec_error(id: &str, what: impl Into<String>) -> SandboxError {
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

#[cfg(test)]
#[path = "manager_tests.rs"]
mod tests;
