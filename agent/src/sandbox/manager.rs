//! Launches sandboxes, and hands out those that were taken over.

use std::{
    collections::HashSet,
    fs,
    ops::Range,
    os::{
        fd::AsFd,
        unix::fs::{DirBuilderExt, OpenOptionsExt},
    },
    path::PathBuf,
    sync::Arc,
    time::Duration,
};

use flint_api::vmm::{CpuLevel, MAX_FDS};

use super::{
    ChunkServer, DiskSource, DiskSpec, Sandbox, SandboxError, SandboxSpec, TakenOver, blocking, file_error,
    intent::Folder,
    means::{Means, Wish, image_names},
    pages::{self, PageServers},
    pool::{self, Pool, Templates},
    shell::{NetParts, Parts, Ready, Shell, identity_of, mark_ready},
    supervisor::{End, explain, supervise},
    supplies::{Supplies, Supply},
    takeover::{Home, Left, Unclaimed, end_strays, read_intents},
    uids::Uids,
};
use crate::{
    cgroup::{Cgroups, Limits},
    network::{self, Gate, Network},
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
    /// Scratch disks go to `scratch` in here, the template of clones to `templates`; for example `/var/lib/flint`.
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
    /// How long a clone's guest may take from its first instruction to the call by which it says that it is another machine now.
    pub wake_timeout: Duration,
    /// Guests whose containers have been idle for so long give the memory of files back that they do not use; zero: they keep it.
    pub idle_reclaim: Duration,
    /// What guests are told of the processor: the less that is, the more hosts can run their snapshots.
    pub cpu_level: CpuLevel,
    /// Clones that are parked ahead of need.
    pub pool: pool::Config,
    /// Who brings chunks that images lack; absent: nobody, and a guest that reads one gets an error.
    pub chunks: Option<ChunkServer>,
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
            wake_timeout: Duration::from_secs(60),
            idle_reclaim: Duration::ZERO,
            cpu_level: CpuLevel::Host,
            pool: pool::Config::default(),
            chunks: None,
        }
    }
}

/// Makes sandboxes. One for each host.
#[derive(Debug)]
pub struct Manager {
    pub(super) means: Arc<Means>,
    pool: Pool,
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
    /// will need is not looked at here, but by [`ready`](Self::ready) and each launch. The pool begins to fill beside it.
    pub async fn new(config: Config) -> Result<Self, SandboxError> {
        process::become_subreaper().map_err(file_error("become the parent of VMMs in", &config.run_dir))?;
        let sandboxes = config.run_dir.join("sandboxes");
        let make = fs::DirBuilder::new().recursive(true).mode(0o700).create(&sandboxes);
        make.map_err(file_error("make", &sandboxes))?;
        let cgroups = Cgroups::open(&config.cgroup)?;
        let scratch = Arc::new(Scratch::open(config.state_dir.join("scratch"))?);
        let left = read_intents(&sandboxes)?;
        let with_cgroup = cgroups.list()?;
        let survivors: Vec<_> = left.iter().filter_map(Left::survivor).collect();
        // Nothing after this can fail: the network is there only if the manager is.
        let (network, leases) = Network::start(config.network.clone(), &survivors).await?;
        let network = Arc::new(network);
        let uids = Uids::new(config.uids.clone());
        end_strays(&cgroups, &with_cgroup, &left).await;
        let home = Home {
            cgroups: &cgroups,
            network: &network,
            uids: &uids,
            chunks: config.chunks.as_ref(),
        };
        let unclaimed = Unclaimed::take_over(left, leases, home).await;
        let page_servers = PageServers::new(&config.vmm);
        pages::look_after(&cgroups, &with_cgroup, &uids);
        let means = Arc::new(Means {
            supplies: Supplies::new(config.vmm.clone(), config.kernel.clone(), config.initrd.clone()),
            sandboxes,
            cgroups,
            network,
            scratch,
            pages: page_servers,
            uids,
            config,
        });
        Ok(Self {
            pool: Pool::start(&means),
            means,
            unclaimed,
        })
    }

    /// Whether a sandbox could be launched now, and on what kind of KVM; an error says what is missing and what to do. Takes
    /// microseconds where the last launch went well.
    pub async fn ready(&self) -> Result<KvmKind, SandboxError> {
        Ok(self.means.supplies.take().await?.kvm)
    }

    /// What does not work on this host as it should, for the log and for `flint doctor`.
    pub fn warnings(&self) -> &[String] {
        self.means.cgroups.warnings()
    }

    /// The pods' network.
    pub fn network(&self) -> &Network {
        &self.means.network
    }

    /// The parked clones.
    pub fn pool(&self) -> &Pool {
        &self.pool
    }

    /// What they are clones of, to be given to other hosts and taken from them.
    pub fn templates(&self) -> Templates {
        self.pool.templates(&self.means)
    }

    /// Whether memory that is chunks could be brought to a guest that runs.
    pub fn can_page(&self) -> bool {
        self.means.pages.can_serve()
    }

    /// A file without a name on the disk of scratch disks.
    pub(crate) fn unnamed_file(&self) -> Result<fs::File, SandboxError> {
        let folder = &self.means.config.state_dir;
        let file = fs::File::options()
            .read(true)
            .write(true)
            .mode(0o600)
            .custom_flags(libc::O_TMPFILE)
            .open(folder);
        file.map_err(file_error("make an unnamed file in", folder))
    }

    /// Makes what scratch disks of this size are copied from, so that no start waits for it.
    pub async fn prepare_scratch(&self, bytes: u64) -> Result<(), SandboxError> {
        let scratch = Arc::clone(&self.means.scratch);
        Ok(blocking(move || scratch.prepare(bytes)).await??)
    }

    /// Starts a sandbox whose guest has taken its identity and waits for containers: a clone, where one is parked and the wish
    /// fits it; else it is booted. An error, or dropping the future, leaves nothing behind; after an error that has happened
    /// already.
    pub async fn launch(&self, spec: SandboxSpec, timeline: &Timeline) -> Result<Sandbox, SandboxError> {
        let spec = checked(spec)?;
        match self.pool.claim(&self.means, &spec, timeline).await? {
            Some(claimed) => claimed.adopt(&self.means, spec, timeline).await,
            None => self.boot(spec, timeline).await,
        }
    }

    async fn boot(&self, spec: SandboxSpec, timeline: &Timeline) -> Result<Sandbox, SandboxError> {
        let supply = self.means.supplies.take().await?;
        let (held, plan) = self.means.hold(Wish {
            id: &spec.id,
            net: spec.net.is_some(),
            limits: Limits {
                guest_memory_bytes: spec.memory_bytes,
                vcpus: spec.vcpus,
            },
            images: image_names(&spec),
        })?;
        let folder = held.folder.clone();
        let gate = held.lease.as_ref().map(|lease| Arc::clone(lease.gate()));
        let gate = gate.as_deref();
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
            Ok(ready) => {
                guard.disarm();
                Ok(Sandbox::new(&spec, gate.map(Gate::address), ready, end))
            }
            Err(error) => {
                let error = explain(&end, error).await;
                // The VMM tells what the kernel told it; if that was about KVM, a look at KVM tells what to do.
                self.means.supplies.look_again().await?;
                Err(error)
            }
        }
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
        let means = &self.means;
        let address = gate.map(Gate::address);
        // None of these needs another; the slowest is the VMM's jail.
        let (shell, tap, disks) = tokio::try_join!(shell, means.plug(gate), means.open_disks(spec))?;
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
            cmdline: &means.config.cmdline,
            cpu_level: means.config.cpu_level,
            kernel: kernel.as_fd(),
            initrd: initrd.as_ref().map(AsFd::as_fd),
            disks,
            net,
        };
        let interfaces = address.map(|address| means.interface(address, &[]));
        let identity = identity_of(
            &spec.identity,
            interfaces.into_iter().collect(),
            means.config.idle_reclaim,
        )?;
        let claimed = shell.claim(parts, timeline).await?;
        let running = claimed.boot(end, means.config.boot_timeout, timeline).await?;
        let ready = running
            .adopt(end, &folder.path("vsock.sock"), identity, timeline)
            .await?;
        mark_ready(folder)?;
        Ok(ready)
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

    /// Removes what the manager itself holds on the host: parked clones, bridge, rules, cgroup. Only when no sandbox is left.
    pub async fn remove(self) -> Result<(), SandboxError> {
        self.pool.drain().await;
        drop(self.pool);
        // Nobody else has it: the pool's keeper has ended.
        if let Some(means) = Arc::into_inner(self.means) {
            if let Some(network) = Arc::into_inner(means.network) {
                network.remove().await?;
            }
            pages::end_all(&means.cgroups).await?;
            means.cgroups.remove()?;
        }
        Ok(())
    }
}

pub(super) fn spec_error(id: &str, what: impl Into<String>) -> SandboxError {
    SandboxError::Spec {
        id: id.to_owned(),
        what: what.into(),
    }
}

/// The wish with its sizes rounded, if it can be fulfilled.
pub(super) fn checked(mut spec: SandboxSpec) -> Result<SandboxSpec, SandboxError> {
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
        if matches!(source, DiskSource::Image { packs, .. } if packs.len() > MAX_FDS - 2) {
            return wrong("an image has at most 62 pack files");
        }
    }
    spec.memory_bytes = memory;
    Ok(spec)
}

#[cfg(test)]
#[path = "manager_tests.rs"]
mod tests;
