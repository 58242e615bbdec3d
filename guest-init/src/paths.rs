//! Where things are in the guest. PID 1 and its helpers agree on these, so that only ids pass between them.
//!
//! ```text
//! /run/flint/images/<image id>          an image's EROFS, read-only
//!           /scratch/<serial>           a scratch disk's ext4; "memory" is a tmpfs in its place
//!               containers/<id>/{upper,work}, pods/<name>
//!           /memory/<name>              pod directories that are kept in memory
//!           /volumes/<name>             files made from materials, each volume a tmpfs
//!           /sub-paths/<id>/<n>         what the mounts of a container show of a volume that they do not show whole
//!           /containers/<id>/           request, config.json, rootfs (the overlay), tty.sock
//!           /oci/<id>/                  libcontainer's own state; notify.sock starts the container
//!           /etc/{resolv.conf,hosts,hostname,machine-id}   bound into every container
//!           /shm                        the pod's /dev/shm
//! ```

use std::path::{Path, PathBuf};

use tonic::Status;

/// Folder of everything that flint-init keeps.
pub const RUN: &str = "/run/flint";
/// libcontainer's state folder.
pub const OCI: &str = "/run/flint/oci";
/// Files that each container sees in its /etc.
pub const ETC: &str = "/run/flint/etc";
/// The /dev/shm that a pod's containers share, as they share the IPC namespace.
pub const SHM: &str = "/run/flint/shm";
/// cgroup v2's mount point.
pub const CGROUP_ROOT: &str = "/sys/fs/cgroup";
/// The cgroup that holds the containers' cgroups and no process itself.
pub const CGROUP_PARENT: &str = "/flint";
/// Name of the tmpfs that stands in for a scratch disk.
const MEMORY_SCRATCH: &str = "memory";
/// Longest identifier: notify.sock's path has to fit a sockaddr_un (108 bytes).
const MAX_NAME: usize = 64;

/// An identifier chosen by the host that is safe as one path component.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Name(String);

/// Why a text is no [`Name`].
#[derive(Debug, thiserror::Error)]
#[error("{what} {text:?} is not a name: 1 to {MAX_NAME} of A-Z a-z 0-9 . _ -, not starting with a dot")]
pub struct BadName {
    what: &'static str,
    text: String,
}

impl Name {
    /// Checks `text`; `what` says in the error what it was meant to name.
    pub fn parse(what: &'static str, text: &str) -> Result<Self, BadName> {
        let fits = !text.is_empty() && text.len() <= MAX_NAME && !text.starts_with('.');
        let allowed = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-');
        if fits && text.bytes().all(allowed) {
            return Ok(Self(text.to_owned()));
        }
        let text = text.chars().take(MAX_NAME + 1).collect();
        Err(BadName { what, text })
    }

    /// The text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl std::fmt::Display for Name {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str(&self.0)
    }
}

impl From<BadName> for Status {
    fn from(error: BadName) -> Self {
        Self::invalid_argument(error.to_string())
    }
}

/// Mount point of an image.
pub fn image(image: &Name) -> PathBuf {
    Path::new(RUN).join("images").join(image.as_str())
}

/// Mount point of a scratch disk, or of the tmpfs used without one.
pub fn scratch(serial: Option<&Name>) -> PathBuf {
    Path::new(RUN)
        .join("scratch")
        .join(serial.map_or(MEMORY_SCRATCH, Name::as_str))
}

/// A container's folder on its scratch: upper and work directories of its overlay.
pub fn container_scratch(serial: Option<&Name>, container: &Name) -> PathBuf {
    scratch(serial).join("containers").join(container.as_str())
}

/// A pod directory: a tmpfs of its own, or a folder on the scratch disk.
pub fn pod_directory(serial: Option<&Name>, name: &Name, memory: bool) -> PathBuf {
    if memory || serial.is_none() {
        return Path::new(RUN).join("memory").join(name.as_str());
    }
    scratch(serial).join("pods").join(name.as_str())
}

/// A volume of files made from materials.
pub fn projected_volume(name: &Name) -> PathBuf {
    Path::new(RUN).join("volumes").join(name.as_str())
}

/// Where parts of volumes are bound for a container. Not in its bundle, which is removed with all that is in it.
pub fn sub_paths(container: &Name) -> PathBuf {
    Path::new(RUN).join("sub-paths").join(container.as_str())
}

/// The part of a volume that the container's mount of this number shows.
pub fn sub_path(container: &Name, mount: usize) -> PathBuf {
    sub_paths(container).join(mount.to_string())
}

/// A container's bundle.
pub fn bundle(container: &Name) -> PathBuf {
    Path::new(RUN).join("containers").join(container.as_str())
}

/// Where a container's overlay is mounted.
pub fn rootfs(container: &Name) -> PathBuf {
    bundle(container).join("rootfs")
}

/// libcontainer's folder of a container.
pub fn oci_state(container: &Name) -> PathBuf {
    Path::new(OCI).join(container.as_str())
}

/// A container's cgroup, below the cgroup mount point, as the runtime spec wants it.
pub fn cgroup_path(container: &Name) -> PathBuf {
    Path::new(CGROUP_PARENT).join(container.as_str())
}

/// A container's cgroup folder.
pub fn cgroup(container: &Name) -> PathBuf {
    Path::new(CGROUP_ROOT)
        .join(CGROUP_PARENT.trim_start_matches('/'))
        .join(container.as_str())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_leave_their_folder_are_refused() {
        for text in [
            "",
            ".",
            "..",
            ".hidden",
            "a/b",
            "../x",
            "a b",
            "a\0",
            "ä",
            &"x".repeat(65),
        ] {
            assert!(Name::parse("container", text).is_err(), "{text:?}");
        }
    }

    #[test]
    fn the_longest_name_leaves_room_for_its_notify_socket() {
        let name = Name::parse("container", &"x".repeat(64)).unwrap();
        assert!(oci_state(&name).join("notify.sock").as_os_str().len() < 108);
        assert!(bundle(&name).join("tty-4294967295.sock").as_os_str().len() < 108);
    }
}
