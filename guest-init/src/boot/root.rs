//! The guest's root: a tmpfs, entered before anything is mounted for good.
//!
//! pivot_root(2), which libcontainer uses to enter a container's root, refuses to work while the current root is the
//! initramfs itself: that mount has no parent. So PID 1 moves to a tmpfs first, as every initramfs does that goes on to a
//! disk.

use std::{fs, path::Path};

use nix::{
    errno::Errno,
    mount::{MsFlags, mount as mount_raw},
    unistd::{chdir, chroot},
};

use super::{BootError, mount};

const NONE: Option<&str> = None;
const NEW_ROOT: &str = "/newroot";
/// Mounted in the initramfs, moved to the new root.
const EARLY: [&str; 2] = ["/proc", "/dev"];

/// What errors need to be seen and modules to be loaded.
pub fn mount_early() -> Result<(), BootError> {
    let restricted = MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC | MsFlags::MS_NODEV;
    match mount("devtmpfs", "/dev", MsFlags::MS_NOSUID, Some("mode=0755")) {
        // The kernel mounts it by itself where CONFIG_DEVTMPFS_MOUNT applies.
        Ok(())
        | Err(BootError::Mount {
            source: Errno::EBUSY, ..
        }) => {}
        Err(error) => return Err(error),
    }
    mount("proc", "/proc", restricted, None)
}

/// Leaves the initramfs for a tmpfs.
pub fn switch_to_tmpfs() -> Result<(), BootError> {
    mount("tmpfs", NEW_ROOT, MsFlags::empty(), Some("mode=0755,size=10%"))?;
    let failed = |step| move |source| BootError::SwitchRoot { step, source };
    for early in EARLY {
        let target = format!("{NEW_ROOT}{early}");
        fs::create_dir_all(&target).map_err(|source| BootError::Create {
            path: target.clone().into(),
            source,
        })?;
        mount_raw(Some(early), target.as_str(), NONE, MsFlags::MS_MOVE, NONE)
            .map_err(failed("moving /proc and /dev"))?;
    }
    free_initramfs();
    // Containers can reach this program's file through /proc/<pid>/exe while they start; it must not be writable
    // (CVE-2019-5736).
    let read_only = MsFlags::MS_REMOUNT | MsFlags::MS_BIND | MsFlags::MS_RDONLY;
    mount_raw(NONE, "/", NONE, read_only, NONE).map_err(failed("making it read-only"))?;
    chdir(NEW_ROOT).map_err(failed("entering the new root"))?;
    mount_raw(Some("."), "/", NONE, MsFlags::MS_MOVE, NONE).map_err(failed("moving the new root to /"))?;
    chroot(".").map_err(failed("making it the root"))?;
    chdir("/").map_err(failed("entering /"))
}

/// Modules are in the kernel now: their files are memory that containers can use. This program's own file goes too; it lives
/// on while it runs and is started again through /proc/self/exe.
fn free_initramfs() {
    for path in ["/lib/modules", "/init"] {
        let path = Path::new(path);
        let removed = if path.is_dir() {
            fs::remove_dir_all(path)
        } else {
            fs::remove_file(path)
        };
        match removed {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                eprintln!("flint-init: freeing {}: {error}", path.display());
            }
            _ => {}
        }
    }
}

/// Everything else a container runtime expects.
pub fn mount_rest() -> Result<(), BootError> {
    let plain = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    let restricted = plain | MsFlags::MS_NOEXEC;
    mount("sysfs", "/sys", restricted, None)?;
    mount("cgroup2", crate::paths::CGROUP_ROOT, restricted, Some("nsdelegate"))?;
    mount(
        "devpts",
        "/dev/pts",
        MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC,
        Some("mode=0620,gid=5,ptmxmode=0666"),
    )?;
    mount("tmpfs", "/dev/shm", plain, Some("mode=1777"))?;
    mount("tmpfs", "/run", plain, Some("mode=0755,size=20%"))?;
    mount("tmpfs", "/tmp", plain, Some("mode=1777,size=10%"))?;
    mount("tmpfs", crate::paths::SHM, restricted, Some("mode=1777,size=64m"))?;
    for folder in ["images", "scratch", "memory", "containers", "oci", "etc"] {
        let path = Path::new(crate::paths::RUN).join(folder);
        fs::create_dir_all(&path).map_err(|source| BootError::Create { path, source })?;
    }
    fs::create_dir_all("/etc").map_err(|source| BootError::Create {
        path: "/etc".into(),
        source,
    })
}
