//! flintd put together: its options, its start in order, its stop.

use std::{
    fs::{self, DirBuilder, File},
    io::{self, Write as _},
    net::SocketAddr,
    os::unix::fs::DirBuilderExt as _,
    path::{Path, PathBuf},
    sync::Arc,
    thread::JoinHandle,
    time::Duration,
};

use clap::{Args, ValueEnum};
use flint_api::{host::HostInfo, vmm};
use flint_snapshots::images::{DemandOptions, ImageStore, ImageStoreOptions};
use nix::fcntl::{Flock, FlockArg};
use thiserror::Error;
use tokio::{
    net::TcpListener,
    signal::unix::{SignalKind, signal},
    sync::watch,
    task::JoinSet,
};
use tonic::service::Routes;
use tracing::{info, warn};

use crate::{
    api::{
        Api,
        listen::{self, ListenError, TlsFiles},
    },
    chain,
    host::{HostControl, Reserve, describe},
    logs::Logs,
    metrics::Metrics,
    network,
    pods::{
        Context, Pods,
        admission::{Ledger, Sizing},
        journal::Journal,
    },
    runtime::{MicroVms, StoreImages},
    sandbox::{
        ChunkServer, Config, Manager, SandboxError,
        pool::{self, PoolMetrics},
    },
    saved::{SavedError, SavedPods},
    store::{Store, StoreError},
    travel::{Mover, TemplateMover},
};

const MIB: u64 = 1 << 20;
/// How long calls that have begun may take after the wish to stop; watches and followed logs would go on for ever.
const LAST_CALLS: Duration = Duration::from_secs(5);

/// What guests are told of the processor (x86-64 psABI, micro-architecture levels).
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum CpuLevel {
    /// All that this host has
    Host,
    /// Up to SSE4.2
    #[value(name = "x86-64-v2")]
    V2,
    /// AVX2; Broadwell, Zen and newer
    #[value(name = "x86-64-v3")]
    V3,
    /// AVX-512; Skylake servers, Zen 4 and newer
    #[value(name = "x86-64-v4")]
    V4,
}

impl From<CpuLevel> for vmm::CpuLevel {
    fn from(level: CpuLevel) -> Self {
        match level {
            CpuLevel::Host => Self::Host,
            CpuLevel::V2 => Self::X8664V2,
            CpuLevel::V3 => Self::X8664V3,
            CpuLevel::V4 => Self::X8664V4,
        }
    }
}

/// flintd's options. Each can be given by environment, too.
#[derive(Args, Clone, Debug)]
pub struct Options {
    /// What outlives a reboot: pods, logs, images.
    #[arg(long, env = "FLINT_STATE_DIR", default_value = "/var/lib/flint", value_name = "DIR")]
    pub state_dir: PathBuf,
    /// What does not: sockets, running sandboxes. A tmpfs.
    #[arg(long, env = "FLINT_RUN_DIR", default_value = "/run/flint", value_name = "DIR")]
    pub run_dir: PathBuf,
    /// Unix socket of the API, for root and --socket-group [default: `RUN_DIR/flintd.sock`].
    #[arg(long, env = "FLINT_LISTEN", value_name = "PATH")]
    pub listen: Option<PathBuf>,
    /// Numeric group that may use the unix socket beside root.
    #[arg(long, env = "FLINT_SOCKET_GROUP", value_name = "GID")]
    pub socket_group: Option<u32>,
    /// TCP address of the API; needs the three --tls options.
    #[arg(long, env = "FLINT_LISTEN_TLS", value_name = "ADDRESS:PORT", requires_all = ["tls_cert", "tls_key", "tls_client_ca"])]
    pub listen_tls: Option<SocketAddr>,
    /// Certificate chain of this host, PEM.
    #[arg(long, env = "FLINT_TLS_CERT", value_name = "FILE")]
    pub tls_cert: Option<PathBuf>,
    /// Key of the certificate, PEM.
    #[arg(long, env = "FLINT_TLS_KEY", value_name = "FILE")]
    pub tls_key: Option<PathBuf>,
    /// Clients must show a certificate signed by this CA, PEM.
    #[arg(long, env = "FLINT_TLS_CLIENT_CA", value_name = "FILE")]
    pub tls_client_ca: Option<PathBuf>,
    /// Serve Prometheus metrics at http://<ADDRESS:PORT>/metrics, without authentication.
    #[arg(long, env = "FLINT_METRICS", value_name = "ADDRESS:PORT")]
    pub metrics: Option<SocketAddr>,
    /// The VMM.
    #[arg(long, env = "FLINT_VMM", default_value = "/usr/bin/flint-vmm", value_name = "FILE")]
    pub vmm: PathBuf,
    /// The guests' kernel.
    #[arg(
        long,
        env = "FLINT_KERNEL",
        default_value = "/usr/lib/flint/vmlinux",
        value_name = "FILE"
    )]
    pub kernel: PathBuf,
    /// The guests' initrd, with flint-init.
    #[arg(
        long,
        env = "FLINT_INITRD",
        default_value = "/usr/lib/flint/initrd",
        value_name = "FILE"
    )]
    pub initrd: PathBuf,
    /// What guests are told of the processor. Their snapshots run on hosts that have all of it: choose what all hosts of a
    /// fleet have.
    #[arg(long, env = "FLINT_CPU_LEVEL", value_enum, default_value_t = CpuLevel::Host, value_name = "LEVEL")]
    pub cpu_level: CpuLevel,
    /// How long the guest of a clone or a fork may take until it has noticed that it is another machine; one that has not is ended. In
    /// seconds.
    #[arg(long, env = "FLINT_WAKE_TIMEOUT", default_value_t = 60, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..=3600))]
    pub wake_timeout: u64,
    /// A pod whose containers have used next to no CPU for so long gives the memory of files back that it has not read again; 0: it
    /// keeps that memory. In seconds.
    #[arg(long, env = "FLINT_IDLE_RECLAIM", default_value_t = 60, value_name = "SECONDS")]
    pub idle_reclaim: u32,
    /// Thousandths of a CPU that pods may not ask for.
    #[arg(long, env = "FLINT_RESERVE_CPU", default_value_t = 0, value_name = "MILLI")]
    pub reserve_cpu: u64,
    /// Memory that pods may not have, in MiB.
    #[arg(long, env = "FLINT_RESERVE_MEMORY", default_value_t = 256, value_name = "MIB")]
    pub reserve_memory: u64,
    /// Most pods at a time.
    #[arg(long, env = "FLINT_MAX_PODS", default_value_t = 1000, value_name = "COUNT")]
    pub max_pods: u32,
    /// Guest memory of a pod beyond what its containers may use, in MiB.
    #[arg(long, env = "FLINT_POD_OVERHEAD", default_value_t = 64, value_name = "MIB")]
    pub pod_overhead: u64,
    /// Memory for the containers that have neither limit nor request, in MiB.
    #[arg(long, env = "FLINT_POD_MEMORY", default_value_t = 256, value_name = "MIB")]
    pub pod_memory: u64,
    /// Writable disk of a pod that does not say, in MiB; sparse.
    #[arg(long, env = "FLINT_POD_SCRATCH", default_value_t = 4096, value_name = "MIB")]
    pub pod_scratch: u64,
    /// Clones that are parked for pods to come; 0: every pod's machine is booted. They grow to their pod's size when they are taken.
    #[arg(long, env = "FLINT_POOL", default_value_t = 4, value_name = "COUNT")]
    pub pool: usize,
    /// Guest memory of a parked clone, in MiB: pods that need less are booted.
    #[arg(long, env = "FLINT_POOL_MEMORY", default_value_t = 128, value_name = "MIB")]
    pub pool_memory: u64,
    /// Most vCPUs of a pod that is a clone; never more than the host has CPUs.
    #[arg(long, env = "FLINT_POOL_MAX_CPUS", default_value_t = 16, value_name = "COUNT")]
    pub pool_max_cpus: u32,
    /// Most guest memory of a pod that is a clone, in MiB; never more than the host has.
    #[arg(long, env = "FLINT_POOL_MAX_MEMORY", default_value_t = 32 << 10, value_name = "MIB")]
    pub pool_max_memory: u64,
    /// Do not look at what the first clones use of their memory, and do not have it ready in later ones.
    #[arg(long, env = "FLINT_NO_WORKING_SETS")]
    pub no_working_sets: bool,
    /// Memory that a parked clone may copy of what clones were seen to write, in MiB; the rest is copied when it is taken.
    #[arg(long, env = "FLINT_POOL_COPIES", default_value_t = 0, value_name = "MIB")]
    pub pool_copies: u64,
    /// Most snapshots at a time.
    #[arg(long, env = "FLINT_MAX_SNAPSHOTS", default_value_t = 64, value_name = "COUNT")]
    pub max_snapshots: usize,
    /// How long a guest's read waits for a part of its image that is damaged or missing on this host while the registry is asked for
    /// it; then it is an I/O error in the guest, and the next read of it waits anew. In seconds.
    #[arg(long, env = "FLINT_CHUNK_DEADLINE", default_value_t = 120, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..=86_400))]
    pub chunk_deadline: u64,
    /// Addresses of pods; the first one is the host's own.
    #[arg(long, env = "FLINT_POD_RANGE", default_value_t = network::Range::DEFAULT, value_name = "CIDR")]
    pub pod_range: network::Range,
    /// Name of the pods' bridge.
    #[arg(long, env = "FLINT_BRIDGE", default_value = "flint0", value_name = "NAME")]
    pub bridge: String,
    /// Name of the sandboxes' cgroup. Two flintds on one host need two: each ends what it finds there and does not know.
    #[arg(long, env = "FLINT_CGROUP", default_value = "flint", value_name = "NAME", value_parser = cgroup_name)]
    pub cgroup: String,
    /// At a stop, end all pods first instead of leaving them running.
    #[arg(long, env = "FLINT_STOP_PODS")]
    pub stop_pods: bool,
}

/// One folder, and none of the kernel's own files, which all have a dot in their names.
fn cgroup_name(name: &str) -> Result<String, String> {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_".contains(c);
    if (1..=63).contains(&name.len()) && name.chars().all(plain) {
        Ok(name.to_owned())
    } else {
        Err("a name has 1 to 63 of a-z A-Z 0-9 - _".into())
    }
}

/// flintd could not start or go on.
#[derive(Debug, Error)]
pub enum DaemonError {
    /// A folder or file.
    #[error("could not {action} {path}")]
    File {
        /// What was tried.
        action: &'static str,
        /// On which.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// Another one runs.
    #[error(
        "another flintd runs with state folder {0}: stop it, or give this one a --state-dir, --run-dir and --cgroup, and a network namespace, of its own"
    )]
    Running(PathBuf),
    /// The store.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The image store.
    #[error("could not open the image store")]
    Images(#[source] Box<flint_snapshots::images::ImageError>),
    /// The sandboxes.
    #[error("could not make the host ready for sandboxes; `flint doctor` says more")]
    Sandboxes(#[from] SandboxError),
    /// The snapshots.
    #[error("could not open the snapshots")]
    Snapshots(#[from] SavedError),
    /// Their chunks.
    #[error("could not look through the chunks of snapshots")]
    Chunks(#[source] Box<flint_snapshots::machines::MachineError>),
    /// A listener.
    #[error(transparent)]
    Listen(#[from] ListenError),
    /// The descriptors of the contract.
    #[error("could not set up reflection")]
    Reflection(#[from] tonic_reflection::server::Error),
    /// Something of the process itself.
    #[error("could not {0}")]
    Process(&'static str, #[source] io::Error),
}

fn file_error(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> DaemonError {
    let path = path.to_owned();
    move |source| DaemonError::File { action, path, source }
}

/// Runs flintd until it is told to stop. The thread that it answers with writes what is left to be written, and ends when
/// the runtime is gone.
///
/// # Errors
/// [`DaemonError`] where it cannot start or go on.
pub async fn run(options: Options) -> Result<JoinHandle<()>, DaemonError> {
    for folder in [&options.state_dir, &options.run_dir] {
        let made = DirBuilder::new().recursive(true).mode(0o700).create(folder);
        made.map_err(file_error("make the folder", folder))?;
    }
    // Held until the process ends.
    let _lock = lock(&options.state_dir)?;
    let store = Store::open(&options.state_dir.join("state.redb"))?;
    let loaded = store.load()?;
    let deadline = Duration::from_secs(options.chunk_deadline);
    let store_options = ImageStoreOptions {
        demand: DemandOptions { deadline },
        ..ImageStoreOptions::default()
    };
    let images = ImageStore::open(&options.state_dir.join("images"), store_options).await;
    let images = images.map_err(|error| DaemonError::Images(Box::new(error)))?;
    let metrics = Arc::new(Metrics::new());
    let reserve = Reserve {
        cpu_milli: options.reserve_cpu,
        memory_bytes: options.reserve_memory * MIB,
        pods: options.max_pods,
    };
    let info =
        describe(&options.state_dir, reserve).map_err(|error| DaemonError::Process("describe this host", error))?;
    let mut config = sandboxes(&options, &info, metrics.pool.clone());
    config.chunks = Some(ChunkServer {
        source: Arc::new(StoreImages::new(images.clone())),
        deadline,
    });
    let manager = Manager::new(config).await?;
    for warning in manager.warnings() {
        warn!("{warning}");
    }
    let (journal, journal_thread) =
        Journal::start(store, &loaded).map_err(|error| DaemonError::Process("start a thread", error))?;
    let control = Arc::new(HostControl::new(journal.clone(), loaded.host.clone()));
    let allocatable = info.allocatable.unwrap_or_default();
    let (drain_pool, templates) = (manager.pool().drainer(), manager.templates());
    let (machines, can_page) = (images.machines(), manager.can_page());
    let context = Arc::new(Context {
        sandboxes: Arc::new(MicroVms::new(manager, images.clone())),
        images: Arc::new(StoreImages::new(images)),
        journal,
        logs: Arc::new(Logs::new(options.state_dir.join("logs"))),
        metrics: metrics.clone(),
        ledger: Ledger::new(allocatable),
        sizing: Sizing {
            overhead_bytes: options.pod_overhead * MIB,
            default_memory_bytes: options.pod_memory * MIB,
            default_scratch_bytes: options.pod_scratch * MIB,
            host_cpus: info.capacity.unwrap_or_default().cpu_milli / 1000,
        },
        saved: SavedPods::open(&options.state_dir.join("snapshots"), options.max_snapshots)?,
        host_changed: watch::Sender::new(0),
    });
    let templates = TemplateMover::new(Some(templates), machines.clone());
    let mover = Mover::new(context.saved.clone(), context.images.clone(), machines).await;
    let mover = mover.map_err(|error| DaemonError::Chunks(Box::new(error)))?;
    let mover = mover.with_memory_in_store(can_page);
    let pods = Pods::start(context, loaded).await;
    let routes = Api {
        pods: pods.clone(),
        control,
        mover,
        templates,
        info: Arc::new(info),
    }
    .routes()
    .await?;
    let served = serve(&options, &pods, routes, metrics).await;
    drain_pool.await;
    served?;
    info!("stopped");
    Ok(journal_thread)
}

fn sandboxes(options: &Options, info: &HostInfo, pool_metrics: PoolMetrics) -> Config {
    let capacity = info.capacity.unwrap_or_default();
    let mut config = Config::new(
        options.run_dir.clone(),
        options.state_dir.clone(),
        options.vmm.clone(),
        options.kernel.clone(),
        Some(options.initrd.clone()),
    );
    config.cgroup.clone_from(&options.cgroup);
    config.wake_timeout = Duration::from_secs(options.wake_timeout);
    config.idle_reclaim = Duration::from_secs(options.idle_reclaim.into());
    config.pool = pool::Config {
        size: options.pool,
        // Room that no pod can use would cost each parked clone all the same.
        vcpus: u32::try_from(capacity.cpu_milli / 1000)
            .map_or(options.pool_max_cpus, |cpus| cpus.min(options.pool_max_cpus)),
        memory_bytes: (options.pool_memory * MIB).next_multiple_of(2 * MIB),
        largest_bytes: options.pool_max_memory.saturating_mul(MIB).min(capacity.memory_bytes),
        scratch_bytes: options.pod_scratch * MIB,
        working_sets: (!options.no_working_sets).then(|| options.pool_copies.saturating_mul(MIB)),
        metrics: pool_metrics,
        ..pool::Config::default()
    };
    config.cpu_level = options.cpu_level.into();
    config.network.range = options.pod_range;
    config.network.bridge.clone_from(&options.bridge);
    config
}

fn lock(state: &Path) -> Result<Flock<File>, DaemonError> {
    let path = state.join("lock");
    let file = File::options().create(true).truncate(false).write(true).open(&path);
    let file = file.map_err(file_error("open", &path))?;
    Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|_| DaemonError::Running(state.to_owned()))
}

/// One line on standard output, for whoever started this and waits. Nobody has to read it.
fn tell_ready(socket: &Path) {
    let mut out = io::stdout().lock();
    let _ = writeln!(out, "ready: {}", socket.display()).and_then(|()| out.flush());
}

/// Serves until TERM or INT.
async fn serve(options: &Options, pods: &Arc<Pods>, routes: Routes, metrics: Arc<Metrics>) -> Result<(), DaemonError> {
    let failed = |error| DaemonError::Process("listen for signals", error);
    let mut term = signal(SignalKind::terminate()).map_err(failed)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(failed)?;
    let (stop, stopping) = watch::channel(false);
    let stopped = || {
        let mut stopping = stopping.clone();
        async move {
            // The sender lives until the servers have ended.
            let _ = stopping.wait_for(|stop| *stop).await;
        }
    };
    let mut servers = JoinSet::new();
    let path = options
        .listen
        .clone()
        .unwrap_or_else(|| options.run_dir.join("flintd.sock"));
    let listener = listen::unix(&path, options.socket_group)?;
    servers.spawn(listen::serve_unix(
        listener,
        options.socket_group,
        routes.clone(),
        stopped(),
    ));
    info!(socket = %path.display(), "serving");
    if let (Some(address), Some(cert), Some(key), Some(client_ca)) = (
        options.listen_tls,
        &options.tls_cert,
        &options.tls_key,
        &options.tls_client_ca,
    ) {
        let files = TlsFiles {
            cert: cert.clone(),
            key: key.clone(),
            client_ca: client_ca.clone(),
        };
        let server = listen::tls_server(&files)?;
        let listener = listen::tcp(address).await?;
        servers.spawn(listen::serve_tls(listener, server, routes, stopped()));
        info!(%address, "serving with TLS");
    }
    if let Some(address) = options.metrics {
        let listener = TcpListener::bind(address).await;
        let listener = listener.map_err(|source| ListenError::Bind {
            address: address.to_string(),
            source,
        })?;
        tokio::spawn(metrics.serve(listener));
        info!(%address, "serving metrics");
    }
    tell_ready(&path);
    tokio::select! {
        _ = term.recv() => {}
        _ = interrupt.recv() => {}
        Some(Ok(Err(error))) = servers.join_next() => return Err(error.into()),
    }
    info!(stop_pods = options.stop_pods, "stopping");
    if options.stop_pods {
        pods.terminate_all(true).await;
    }
    stop.send_replace(true);
    let all = async { while servers.join_next().await.is_some() {} };
    if tokio::time::timeout(LAST_CALLS, all).await.is_err() {
        info!("calls that go on are cut");
    }
    if let Err(error) = fs::remove_file(&path) {
        warn!(socket = %path.display(), error = chain(&error), "removing the socket failed");
    }
    Ok(())
}
