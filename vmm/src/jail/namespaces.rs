//! Another user, own namespaces, an empty root, no capabilities.

use std::fs;
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use nix::sys::prctl;
use nix::unistd::{ForkResult, Gid, Uid, chdir, fork, pipe, pivot_root, setgroups, setresgid, setresuid};

use super::Error;
use crate::memory::pagemap::Pagemap;

/// The namespaces that a VMM has for itself.
const NAMESPACES: CloneFlags = CloneFlags::CLONE_NEWUSER
    .union(CloneFlags::CLONE_NEWNS)
    .union(CloneFlags::CLONE_NEWNET)
    .union(CloneFlags::CLONE_NEWPID)
    .union(CloneFlags::CLONE_NEWIPC)
    .union(CloneFlags::CLONE_NEWUTS);

/// A directory that is always there, to put the new root on. Nothing under it is needed by then.
const MOUNT_POINT: &str = "/proc";

/// Which process came back from [`enter`].
pub enum Placed {
    /// The first one; its child told it how it went.
    Launcher {
        /// Whether the child is in place.
        child_in_place: bool,
    },
    /// The one in the jail.
    Jailed {
        /// It must tell the launcher when it is ready.
        ready: Ready,
        /// Its own page tables, to be read: there is no /proc in the jail.
        pagemap: Pagemap,
    },
}

/// The jailed process's word to its launcher. Dropped without a word, the launcher reports failure.
pub struct Ready(OwnedFd);

impl Ready {
    /// Lets the launcher end with success.
    ///
    /// # Errors
    /// The launcher is gone.
    pub fn tell(self) -> io::Result<()> {
        fs::File::from(self.0).write_all(&[1])
    }
}

fn step<E: Into<io::Error>>(what: &'static str) -> impl FnOnce(E) -> Error {
    move |error| Error::Step {
        what,
        source: error.into(),
    }
}

/// Becomes `uid` and `gid`, enters new namespaces, forks, and in the child empties the root and drops all capabilities.
/// The process must have one thread only.
///
/// # Errors
/// A step failed; the process must end.
pub fn enter(uid: u32, gid: u32) -> Result<Placed, Error> {
    become_user(uid, gid)?;
    unshare(NAMESPACES).map_err(step("new namespaces (are user namespaces allowed on this host?)"))?;
    map_user(uid, gid)?;
    let (reader, writer) = pipe().map_err(step("pipe to the launcher"))?;
    // SAFETY: the process has a single thread, so the child may do all that the parent might.
    match unsafe { fork() }.map_err(step("fork into the PID namespace"))? {
        ForkResult::Parent { .. } => {
            drop(writer);
            let mut word = Vec::new();
            fs::File::from(reader)
                .read_to_end(&mut word)
                .map_err(step("waiting for the child"))?;
            Ok(Placed::Launcher {
                child_in_place: word == [1],
            })
        }
        ForkResult::Child => {
            drop(reader);
            let pagemap = Pagemap::of_this_process().map_err(step("opening /proc/self/pagemap"))?;
            empty_root()?;
            drop_capabilities()?;
            prctl::set_no_new_privs().map_err(step("no_new_privs"))?;
            prctl::set_dumpable(false).map_err(step("making the process undumpable"))?;
            let ready = Ready(writer);
            Ok(Placed::Jailed { ready, pagemap })
        }
    }
}

fn become_user(uid: u32, gid: u32) -> Result<(), Error> {
    let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(gid));
    setgroups(&[]).map_err(step("dropping supplementary groups"))?;
    setresgid(gid, gid, gid).map_err(step("setgid"))?;
    setresuid(uid, uid, uid).map_err(step("setuid"))?;
    // The kernel took this away with the user; without it /proc/self/uid_map belongs to root.
    prctl::set_dumpable(true).map_err(step("making the process dumpable for its id maps"))
}

/// Maps the one user and group to themselves (user_namespaces(7)).
fn map_user(uid: u32, gid: u32) -> Result<(), Error> {
    fs::write("/proc/self/setgroups", "deny").map_err(step("denying setgroups"))?;
    fs::write("/proc/self/uid_map", format!("{uid} {uid} 1")).map_err(step("mapping the user"))?;
    fs::write("/proc/self/gid_map", format!("{gid} {gid} 1")).map_err(step("mapping the group"))
}

fn empty_root() -> Result<(), Error> {
    const NOTHING: Option<&str> = None;
    let locked = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    mount(NOTHING, "/", NOTHING, MsFlags::MS_REC | MsFlags::MS_PRIVATE, NOTHING)
        .map_err(step("making mounts private"))?;
    // One inode, the root itself: nothing can be created even before it is read-only.
    let options = Some("size=4k,nr_inodes=1,mode=0555");
    mount(Some("none"), MOUNT_POINT, Some("tmpfs"), locked, options).map_err(step("mounting an empty root"))?;
    chdir(MOUNT_POINT).map_err(step("entering the empty root"))?;
    // The old root ends up on top of the new one and is then taken off (pivot_root(2), "pivot_root(".", ".")").
    pivot_root(".", ".").map_err(step("pivot_root (is this host's root an initramfs? switch_root first)"))?;
    umount2(".", MntFlags::MNT_DETACH).map_err(step("leaving the old root"))?;
    chdir("/").map_err(step("entering the new root"))?;
    let remount = locked | MsFlags::MS_REMOUNT | MsFlags::MS_BIND | MsFlags::MS_RDONLY;
    mount(NOTHING, "/", NOTHING, remount, NOTHING).map_err(step("making the root read-only"))
}

/// Empties all five sets (capabilities(7)).
fn drop_capabilities() -> Result<(), Error> {
    /// `_LINUX_CAPABILITY_VERSION_3`: two words for each set.
    const VERSION: u32 = 0x2008_0522;
    const LAST: libc::c_ulong = 63;
    for capability in 0..=LAST {
        // SAFETY: PR_CAPBSET_DROP takes a number; one that the kernel does not know is EINVAL.
        if unsafe { libc::prctl(libc::PR_CAPBSET_DROP, capability, 0, 0, 0) } != 0 {
            let error = io::Error::last_os_error();
            if error.raw_os_error() == Some(libc::EINVAL) {
                break;
            }
            return Err(step("emptying the bounding set")(error));
        }
    }
    // SAFETY: takes no pointers.
    if unsafe { libc::prctl(libc::PR_CAP_AMBIENT, libc::PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0) } != 0 {
        return Err(step("emptying the ambient set")(io::Error::last_os_error()));
    }
    let header = [VERSION, 0];
    let data = [0u32; 6];
    // SAFETY: header and data have the layout of version 3, and the call only reads them.
    if unsafe { libc::syscall(libc::SYS_capset, header.as_ptr(), data.as_ptr()) } != 0 {
        return Err(step("dropping capabilities")(io::Error::last_os_error()));
    }
    Ok(())
}
