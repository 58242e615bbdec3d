//! The peer: QEMU's `microvm`, the machine type made for quick boots, with KVM.
//!
//! The boundary is the one that Flint has: from the spawn of the process until flint-init dials the host over vsock. Here
//! the host's kernel carries the vsock (vhost-vsock), so this program listens on it.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{AddressFamily, Backlog, SockFlag, SockType, VsockAddr, accept, bind, listen, socket};

use crate::Error;

/// What flintd tells the guest's kernel, less what only its own devices need.
pub const CMDLINE: &str = "console=ttyS0 quiet panic=-1 pci=off";
/// What a sandbox of flintd has when its pod asks for nothing: a guest with more memory has more to set up.
const MEMORY_MIB: &str = "320";
/// Any context id will do; only one machine runs at a time.
const GUEST_CID: u32 = 5005;
/// VMADDR_CID_ANY (vsock(7)).
const ANY_CID: u32 = u32::MAX;
const LIMIT_MS: u16 = 60_000;

/// What to boot.
pub struct Machine<'a> {
    pub qemu: &'a Path,
    pub kernel: &'a Path,
    /// It must leave the end of its last page free for QEMU's ACPI tables; those of hack/build do.
    pub initrd: &'a Path,
    pub cmdline: &'a str,
}

impl Machine<'_> {
    /// Boots it once; the time from the spawn until flint-init dials.
    pub fn boot(&self) -> Result<Duration, Error> {
        let listener = Listener::new()?;
        let start = Instant::now();
        let mut machine = Running(
            self.command()
                .spawn()
                .map_err(|error| format!("cannot run {}: {error}", self.qemu.display()))?,
        );
        listener.wait()?;
        let elapsed = start.elapsed();
        machine.0.kill()?;
        Ok(elapsed)
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
                MEMORY_MIB,
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
