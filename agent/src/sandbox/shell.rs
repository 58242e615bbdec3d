//! The steps of a start, as types: a step that is out of order does not compile.

use std::{
    fs::{self, File},
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    path::Path,
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use flint_api::{
    guest::{self, guest_client::GuestClient},
    vmm::{self, request::Command},
};
use nix::sys::socket::{AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, listen, socket};
use tonic::transport::Channel;

use super::{
    DiskSpec, Identity, NetSpec, SandboxError, SandboxSpec,
    chunks::Line,
    control::{Control, ControlError},
    file_error,
    guest::connect,
    intent::Folder,
    supervisor::{Attach, Attached, End},
};
use crate::{
    cgroup::Cgroup,
    process::{self, Process, Program},
    timeline::Timeline,
};

/// CID of every guest: each VMM has a vsock of its own.
pub(super) const GUEST_CID: u64 = 3;
/// Entropy for the guest's random number generator.
const ENTROPY_BYTES: usize = 64;
/// How long the guest may take to take its identity.
const IDENTITY_TIMEOUT: Duration = Duration::from_secs(60);

/// A jailed VMM process that answers and has no machine.
pub(super) struct Shell {
    pub(super) control: Control,
    vsock: OwnedFd,
    serial: OwnedFd,
}

/// A machine with kernel and devices that has not run yet.
pub(super) struct Claimed {
    control: Control,
}

/// A machine whose guest has dialled.
pub(super) struct Running {
    pub(super) control: Control,
}

/// A guest that is the pod's own.
pub(super) struct Ready {
    pub control: Control,
    pub channel: Channel,
}

/// What to spawn.
pub(super) struct ShellPlan {
    pub vmm: Arc<Path>,
    pub id: String,
    pub uid: u32,
    pub folder: Folder,
    pub cgroup: Cgroup,
}

/// What becomes the machine.
pub(super) struct Parts<'a> {
    pub spec: &'a SandboxSpec,
    pub cmdline: &'a str,
    pub cpu_level: vmm::CpuLevel,
    pub kernel: BorrowedFd<'a>,
    pub initrd: Option<BorrowedFd<'a>>,
    /// In the order of the disks.
    pub disks: Vec<DiskFds>,
    pub net: Option<NetParts<'a>>,
}

/// The files behind a disk.
pub(super) enum DiskFds {
    /// Device table and packs, and the connection to whoever has the chunks that are missing.
    Image(Vec<Arc<OwnedFd>>, Option<Line>),
    Raw(Arc<OwnedFd>),
}

impl DiskFds {
    pub(super) fn image(table: &Arc<OwnedFd>, packs: &[Arc<OwnedFd>], line: Option<Line>) -> Self {
        Self::Image(std::iter::once(table).chain(packs).map(Arc::clone).collect(), line)
    }
}

/// The interface.
pub(super) struct NetParts<'a> {
    pub spec: &'a NetSpec,
    pub mac: [u8; 6],
    pub tap: OwnedFd,
}

impl Shell {
    /// Spawns a VMM and waits until it answers.
    pub(super) async fn spawn(plan: ShellPlan, attach: Attach, timeline: &Timeline) -> Result<Self, SandboxError> {
        let stage = timeline.begin("vmm.spawn");
        // `attach` goes along: whoever cancels this must not have the supervisor believe that no process will come.
        let spawned = tokio::task::spawn_blocking(move || {
            let spawned = spawn_process(&plan);
            (spawned, plan, attach)
        });
        // It does not panic, and is not aborted but with the whole runtime.
        let (spawned, plan, attach) = spawned.await.map_err(|_| SandboxError::Died)?;
        let Spawned {
            launcher,
            vsock,
            serial,
        } = spawned?;
        let (control, events) = Control::connect(&plan.folder.path("control.sock"))?;
        let process = await_hello(&control, launcher, &plan.folder).await?;
        // It cannot be another process: the id came from the kernel, and a child of ours keeps it until we reap it.
        // A supervisor that is gone has ended with the runtime.
        attach
            .send(Ok(Attached { events, process }))
            .map_err(|_| SandboxError::Died)?;
        stage.end();
        Ok(Self { control, vsock, serial })
    }

    /// Makes the machine and binds everything that belongs to it.
    pub(super) async fn claim(self, parts: Parts<'_>, timeline: &Timeline) -> Result<Claimed, SandboxError> {
        let stage = timeline.begin("vmm.create");
        self.control
            .command(Command::CreateMachine(machine(&parts)), &[])
            .await?;
        stage.end();

        let stage = timeline.begin("vmm.load");
        load_kernel(&self.control, parts.cmdline, parts.kernel, parts.initrd).await?;
        stage.end();

        let stage = timeline.begin("vmm.bind");
        self.bind(&parts).await?;
        stage.end();
        Ok(Claimed { control: self.control })
    }

    async fn bind(&self, parts: &Parts<'_>) -> Result<(), SandboxError> {
        for (slot, (spec, fds)) in (0..).zip(parts.spec.disks.iter().zip(&parts.disks)) {
            let (command, fds) = bind_disk(slot, spec, fds);
            self.control.command(Command::BindDisk(command), &fds).await?;
        }
        if let Some(net) = &parts.net {
            let command = vmm::BindNet {
                slot: 0,
                rx_limit: net.spec.rx_limit,
                tx_limit: net.spec.tx_limit,
            };
            self.control
                .command(Command::BindNet(command), &[net.tap.as_fd()])
                .await?;
        }
        self.bind_host().await
    }

    /// Binds what each machine has, whatever becomes of it.
    pub(super) async fn bind_host(&self) -> Result<(), SandboxError> {
        self.control
            .command(Command::BindVsock(vmm::BindVsock {}), &[self.vsock.as_fd()])
            .await?;
        self.control
            .command(Command::BindSerial(vmm::BindSerial {}), &[self.serial.as_fd()])
            .await?;
        Ok(())
    }
}

impl Claimed {
    /// Lets the guest run, and waits until flint-init has dialled.
    pub(super) async fn boot(self, end: &End, limit: Duration, timeline: &Timeline) -> Result<Running, SandboxError> {
        let stage = timeline.begin("vmm.boot");
        self.control.command(Command::Start(vmm::Start {}), &[]).await?;
        dialled(end, limit).await?;
        stage.end();
        Ok(Running { control: self.control })
    }
}

/// Has a kernel loaded.
pub(super) async fn load_kernel(
    control: &Control,
    cmdline: &str,
    kernel: BorrowedFd<'_>,
    initrd: Option<BorrowedFd<'_>>,
) -> Result<(), ControlError> {
    let load = vmm::LoadKernel {
        cmdline: cmdline.to_owned(),
        has_initrd: initrd.is_some(),
    };
    let files: Vec<_> = std::iter::once(kernel).chain(initrd).collect();
    control.command(Command::LoadKernel(load), &files).await
}

/// Waits until flint-init has dialled.
pub(super) async fn dialled(end: &End, limit: Duration) -> Result<(), SandboxError> {
    let late = || SandboxError::BootTimeout(limit);
    dialled_within(end, limit).await?.then_some(()).ok_or_else(late)
}

/// Waits until a clone's flint-init has dialled, which it does when its kernel has taken up another generation id.
pub(super) async fn awoken(end: &End, limit: Duration) -> Result<(), SandboxError> {
    let late = || SandboxError::WakeTimeout(limit);
    dialled_within(end, limit).await?.then_some(()).ok_or_else(late)
}

async fn dialled_within(end: &End, limit: Duration) -> Result<bool, SandboxError> {
    match tokio::time::timeout(limit, end.dialled()).await {
        Ok(true) => Ok(true),
        Ok(false) => Err(SandboxError::Died),
        Err(_) => Ok(false),
    }
}

impl Running {
    /// Connects to flint-init and has the guest take its identity. A guest that ends meanwhile is not waited for.
    pub(super) async fn adopt(
        self,
        end: &End,
        vsock: &Path,
        identity: guest::AdoptIdentityRequest,
        timeline: &Timeline,
    ) -> Result<Ready, SandboxError> {
        tokio::select! {
            ready = self.acknowledged(vsock, identity, timeline) => ready,
            _ = end.wait() => Err(SandboxError::Died),
            () = tokio::time::sleep(IDENTITY_TIMEOUT) => Err(SandboxError::IdentityTimeout(IDENTITY_TIMEOUT)),
        }
    }

    async fn acknowledged(
        self,
        vsock: &Path,
        identity: guest::AdoptIdentityRequest,
        timeline: &Timeline,
    ) -> Result<Ready, SandboxError> {
        let stage = timeline.begin("guest.connect");
        let channel = connect(vsock.to_owned()).await.map_err(SandboxError::Connect)?;
        stage.end();

        let stage = timeline.begin("guest.identity");
        let adopted = GuestClient::new(channel.clone()).adopt_identity(identity).await;
        adopted.map_err(|status| SandboxError::Identity(Box::new(status)))?;
        stage.end();
        Ok(Ready {
            control: self.control,
            channel,
        })
    }
}

struct Spawned {
    launcher: Process,
    vsock: OwnedFd,
    serial: OwnedFd,
}

/// Makes the files of a sandbox's folder and the process. Blocks for some tenths of a millisecond.
fn spawn_process(plan: &ShellPlan) -> Result<Spawned, SandboxError> {
    let control_path = plan.folder.path("control.sock");
    let control = listen_packets(&control_path).map_err(file_error("listen on", control_path))?;
    let vsock_path = plan.folder.path("vsock.sock");
    let vsock = std::os::unix::net::UnixListener::bind(&vsock_path).map_err(file_error("listen on", vsock_path))?;
    let [exit, serial, log] = ["exit", "serial.log", "vmm.log"].map(|name| {
        let path = plan.folder.path(name);
        File::options()
            .append(true)
            .create(true)
            .open(&path)
            .map_err(file_error("make", path))
    });
    let (exit, serial, log) = (exit?, serial?, log?);
    let (id, uid) = (plan.id.clone(), plan.uid.to_string());
    let args = [
        "--id",
        &id,
        "--control-fd",
        "3",
        "--exit-fd",
        "4",
        "--uid",
        &uid,
        "--gid",
        &uid,
    ]
    .map(String::from);
    let launcher = process::spawn(&Program {
        path: &plan.vmm,
        args: &args,
        fds: &[control.as_fd(), exit.as_fd()],
        log: log.as_fd(),
        cgroup: plan.cgroup.folder()?.as_fd(),
    })?;
    // Our copy of the control socket closes here: if the VMM dies, a connection to it ends instead of waiting.
    Ok(Spawned {
        launcher,
        vsock: vsock.into(),
        serial: serial.into(),
    })
}

fn listen_packets(path: &Path) -> io::Result<OwnedFd> {
    let fd = socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None)?;
    bind(fd.as_raw_fd(), &UnixAddr::new(path)?)?;
    listen(&fd, Backlog::new(4)?)?;
    Ok(fd)
}

/// Waits for the VMM's first answer, and finds its process: the launcher's child, or the launcher if it did not fork. If both
/// end before that, the connection is over; the supervisor reaps them and knows why.
async fn await_hello(control: &Control, launcher: Process, folder: &Folder) -> Result<Process, SandboxError> {
    let (_, pid) = control.hello().await?;
    if pid == launcher.pid() {
        return Ok(launcher);
    }
    // It leaves as soon as its child is in place, and is reaped then.
    tokio::spawn(async move { launcher.ended().await });
    Process::open(pid).map_err(file_error("open the VMM's process of", folder.path("")))
}

fn machine(parts: &Parts<'_>) -> vmm::CreateMachine {
    let slot = |disk: &DiskSpec, fds: &DiskFds| vmm::DiskSlot {
        serial: disk.serial.clone(),
        read_only: disk.read_only || matches!(fds, DiskFds::Image(..)),
        queues: 0,
    };
    vmm::CreateMachine {
        vcpus: parts.spec.vcpus,
        memory_bytes: parts.spec.memory_bytes,
        disks: parts
            .spec
            .disks
            .iter()
            .zip(&parts.disks)
            .map(|(disk, fds)| slot(disk, fds))
            .collect(),
        nets: parts
            .net
            .iter()
            .map(|net| vmm::NetSlot { mac: net.mac.to_vec() })
            .collect(),
        vsock: Some(vmm::VsockSlot { guest_cid: GUEST_CID }),
        rng: true,
        balloon: true,
        cpu_level: parts.cpu_level.into(),
        ..Default::default()
    }
}

/// How a disk is bound, and its descriptors.
pub(super) fn bind_disk<'a>(slot: u32, spec: &DiskSpec, fds: &'a DiskFds) -> (vmm::BindDisk, Vec<BorrowedFd<'a>>) {
    let (source, fds) = match fds {
        DiskFds::Image(files, line) => (
            vmm::bind_disk::Source::Image(vmm::ImageDevice {
                chunks: line.as_ref().map(|line| line.terms),
            }),
            files
                .iter()
                .map(|file| file.as_fd())
                .chain(line.as_ref().map(|line| line.socket.as_fd()))
                .collect(),
        ),
        DiskFds::Raw(file) => (
            vmm::bind_disk::Source::RawFile(vmm::RawFile { direct: false }),
            vec![file.as_fd()],
        ),
    };
    (
        vmm::BindDisk {
            slot,
            source: Some(source),
            rate_limit: spec.rate_limit,
        },
        fds,
    )
}

/// What a guest is told about itself: the pod's part, and what makes this machine differ from all others.
pub(super) fn identity_of(
    identity: &Identity,
    interfaces: Vec<guest::Interface>,
    idle_reclaim: Duration,
) -> Result<guest::AdoptIdentityRequest, SandboxError> {
    let random: [u8; 32 + ENTROPY_BYTES] = random()?;
    let (machine_id, rest) = random.split_at(16);
    let (generation, entropy) = rest.split_at(16);
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    Ok(guest::AdoptIdentityRequest {
        hostname: identity.hostname.clone(),
        machine_id: machine_id.iter().map(|byte| format!("{byte:02x}")).collect(),
        realtime_ns: u64::try_from(now.as_nanos()).unwrap_or(u64::MAX),
        entropy: entropy.to_vec(),
        interfaces,
        dns: Some(identity.dns.clone()),
        host_aliases: identity.aliases.clone(),
        sysctls: identity.sysctls.clone(),
        generation: generation.to_vec(),
        idle_reclaim_ms: u64::try_from(idle_reclaim.as_millis()).unwrap_or(u64::MAX),
    })
}

/// Random bytes from the kernel, at most 256 of them.
pub(super) fn random<const BYTES: usize>() -> Result<[u8; BYTES], SandboxError> {
    const { assert!(BYTES <= 256, "more may come in parts (getrandom(2))") }
    let mut bytes = [0; BYTES];
    // SAFETY: the buffer is ours and as long as we say.
    let count = unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), BYTES, 0) };
    if usize::try_from(count) == Ok(BYTES) {
        return Ok(bytes);
    }
    Err(file_error("draw from", "the kernel's random numbers")(
        io::Error::last_os_error(),
    ))
}

/// Notes that a start is complete: a flintd that finds the sandbox later takes it over only then.
pub(super) fn mark_ready(folder: &Folder) -> Result<(), SandboxError> {
    let path = folder.path("ready");
    fs::write(&path, "").map_err(file_error("make", path))
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn no_two_of_a_thousand_identities_have_anything_in_common() {
        let mut given = HashSet::new();
        for number in 0..1000 {
            let identity = identity_of(&Identity::default(), Vec::new(), Duration::ZERO).unwrap();
            let (entropy, machine) = (identity.entropy, identity.machine_id);
            assert_eq!(
                (entropy.len(), machine.len(), identity.generation.len()),
                (ENTROPY_BYTES, 32, 16)
            );
            // A part of the one must not be a part of another either.
            for part in entropy.chunks(16).chain([machine.as_bytes(), &identity.generation]) {
                assert!(given.insert(part.to_vec()), "{number}: {part:02x?}");
            }
        }
    }
}
