//! The peer: QEMU's `microvm`, the machine type made for quick boots, with KVM.
//!
//! Booted, the boundary is the one that Flint has: from the spawn of the process until flint-init dials the host over vsock. Here
//! the host's kernel carries the vsock (vhost-vsock), so this program listens on it. Restored by `-incoming`, QEMU's machine has no
//! generation id, so flint-init does not know of it and does not dial: it is asked something as soon as QEMU says that the guest
//! runs, and its answer is the end.

mod qmp;

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{AddressFamily, Backlog, SockFlag, SockType, VsockAddr, accept, bind, listen, socket};

use flint_api::guest::ListContainersRequest;
use flint_api::guest::guest_client::GuestClient;
use hyper_util::rt::TokioIo;
use serde_json::json;
use tempfile::TempDir;
use tokio::task::JoinSet;
use tokio_vsock::VsockStream;
use tonic::transport::Endpoint;

use self::qmp::Qmp;
use crate::Error;

/// What flintd tells the guest's kernel, less what only its own devices need.
pub const CMDLINE: &str = "console=ttyS0 quiet panic=-1 pci=off";
/// Any context id will do; only one machine runs at a time.
const GUEST_CID: u32 = 5005;
/// VMADDR_CID_ANY (vsock(7)).
const ANY_CID: u32 = u32::MAX;
const LIMIT_MS: u16 = 60_000;
/// A small part of what a restored guest takes in an emulated host, where it takes longest.
const ASK_AGAIN: Duration = Duration::from_millis(20);

/// What to boot.
pub struct Machine<'a> {
    pub qemu: &'a Path,
    pub kernel: &'a Path,
    /// It must leave the end of its last page free for QEMU's ACPI tables; those of hack/build do.
    pub initrd: &'a Path,
    pub cmdline: &'a str,
    pub memory_mib: u32,
}

impl Machine<'_> {
    /// Boots it once; the time from the spawn until flint-init dials.
    pub fn boot(&self) -> Result<Duration, Error> {
        let listener = Listener::new()?;
        let start = Instant::now();
        let mut machine = Running(self.command().spawn().map_err(|error| self.cannot_run(&error))?);
        listener.wait()?;
        let elapsed = start.elapsed();
        machine.0.kill()?;
        Ok(elapsed)
    }

    /// Boots it, and saves it when flint-init has dialled.
    pub fn save(&self) -> Result<Saved<'_>, Error> {
        let listener = Listener::new()?;
        let folder = tempfile::tempdir()?;
        let mut machine = self.spawn(&[])?;
        let mut qmp = Qmp::open(&mut machine.0)?;
        listener.wait()?;
        qmp.command("migrate", &json!({ "uri": uri(&folder) }))?;
        qmp.saved()?;
        Ok(Saved { machine: self, folder })
    }

    /// Starts QEMU with its control on pipes.
    fn spawn(&self, arguments: &[&str]) -> Result<Running, Error> {
        let mut command = self.command();
        command.args(["-qmp", "stdio"]).args(arguments);
        let child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn();
        Ok(Running(child.map_err(|error| self.cannot_run(&error))?))
    }

    fn cannot_run(&self, error: &io::Error) -> Error {
        format!("cannot run {}: {error}", self.qemu.display()).into()
    }

    fn command(&self) -> Command {
        let mut command = Command::new(self.qemu);
        command
            .args([
                "-M",
                "microvm,acpi=on,rtc=off,pit=off,pic=off,isa-serial=on",
                "-accel",
                "kvm",
                "-cpu",
                "host",
            ])
            .args([
                "-m",
                &self.memory_mib.to_string(),
                "-smp",
                "1",
                "-nodefaults",
                "-no-user-config",
                "-no-reboot",
                "-display",
                "none",
            ])
            .args(["-global", "virtio-mmio.force-legacy=off", "-serial", "null"])
            .args(["-device", &format!("vhost-vsock-device,guest-cid={GUEST_CID}")])
            .arg("-kernel")
            .arg(self.kernel)
            .arg("-initrd")
            .arg(self.initrd)
            .args(["-append", self.cmdline])
            .stdin(Stdio::null())
            .stdout(Stdio::null());
        command
    }
}

/// A machine in a file.
pub struct Saved<'a> {
    machine: &'a Machine<'a>,
    folder: TempDir,
}

/// How long a restored machine took until flint-init answered.
pub struct Restored {
    /// From the spawn of QEMU.
    pub from_spawn: Duration,
    /// From the command to a QEMU that was there already.
    pub from_command: Duration,
}

impl Saved<'_> {
    /// Restores it once.
    pub async fn restore(&self) -> Result<Restored, Error> {
        let spawned = Instant::now();
        let mut machine = self.machine.spawn(&["-incoming", "defer"])?;
        let mut qmp = Qmp::open(&mut machine.0)?;
        let told = Instant::now();
        qmp.command("migrate-incoming", &json!({ "uri": uri(&self.folder) }))?;
        qmp.resumed()?;
        answer().await?;
        Ok(Restored {
            from_spawn: spawned.elapsed(),
            from_command: told.elapsed(),
        })
    }
}

fn uri(folder: &TempDir) -> String {
    format!("file:{}", folder.path().join("machine").display())
}

/// Asks flint-init something until it answers. A restored guest is told that its host is another one, and drops the connections that
/// it has when it hears of it, without a word to the other side: so it is asked again and again, and the first answer counts.
async fn answer() -> Result<(), Error> {
    let mut asked = JoinSet::new();
    let first = async {
        loop {
            asked.spawn(async { ask().await.is_ok() });
            if let Ok(Some(Ok(true))) = tokio::time::timeout(ASK_AGAIN, asked.join_next()).await {
                return;
            }
        }
    };
    let limit = Duration::from_millis(LIMIT_MS.into());
    let answered = tokio::time::timeout(limit, first).await;
    answered.map_err(|_| "QEMU's restored guest did not answer within a minute".into())
}

async fn ask() -> Result<(), Error> {
    let connector = tower::service_fn(|_| async {
        let address = tokio_vsock::VsockAddr::new(GUEST_CID, flint_api::guest::PORT);
        VsockStream::connect(address).await.map(TokioIo::new)
    });
    let channel = Endpoint::from_static("http://guest")
        .connect_with_connector(connector)
        .await?;
    GuestClient::new(channel)
        .list_containers(ListContainersRequest {})
        .await?;
    Ok(())
}

/// A machine that does not outlive its measurement.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

struct Listener(OwnedFd);

impl Listener {
    fn new() -> Result<Self, Error> {
        let fd = socket(AddressFamily::Vsock, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)
            .map_err(|error| format!("this host has no vsock ({error}); modprobe vhost_vsock"))?;
        bind(fd.as_raw_fd(), &VsockAddr::new(ANY_CID, flint_api::guest::PORT))?;
        listen(&fd, Backlog::new(1)?)?;
        Ok(Self(fd))
    }

    fn wait(&self) -> Result<(), Error> {
        let mut fds = [PollFd::new(self.0.as_fd(), PollFlags::POLLIN)];
        if poll(&mut fds, PollTimeout::from(LIMIT_MS))? == 0 {
            return Err("QEMU's guest did not announce itself within a minute".into());
        }
        let stream = accept(self.0.as_raw_fd())?;
        nix::unistd::close(stream).map_err(io::Error::from)?;
        Ok(())
    }
}
