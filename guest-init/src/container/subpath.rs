//! `subPath`: a file or folder within a volume is mounted instead of the volume.
//!
//! Containers write to their volumes, so a path in one is as hostile as a program can make it, and it may change while it is
//! looked at. It is walked with openat2(2) and RESOLVE_BENEATH, which refuses every link that leads out, and what is mounted
//! is the very thing that was found, by its descriptor: bound to a place that no container sees, and from there as any
//! other volume.

use std::{
    fs, io,
    os::fd::{AsRawFd, OwnedFd},
    os::unix::fs::OpenOptionsExt,
    path::{Component, Path, PathBuf},
};

use flint_api::guest::CreateContainerRequest;
use nix::{
    errno::Errno,
    fcntl::{OFlag, OpenHow, ResolveFlag, openat2},
    mount::{MntFlags, MsFlags, mount, umount2},
    sys::stat::{FchmodatFlags, Mode, fchmodat, mkdirat},
};

use super::spec::{self, SpecError};
use crate::paths::{self, Name};

/// Why a sub-path could not be mounted.
#[derive(Debug, thiserror::Error)]
pub enum SubPathError {
    /// Which mount.
    #[error("mounts[{index}].sub_path {path:?}: {problem}")]
    Path {
        index: usize,
        path: String,
        problem: &'static str,
        #[source]
        source: io::Error,
    },
    /// Where the volume is.
    #[error(transparent)]
    Spec(#[from] SpecError),
}

/// Binds what each mount with a sub-path shows to its place.
pub fn bind_all(container: &Name, request: &CreateContainerRequest) -> Result<(), SubPathError> {
    for (index, requested) in request.mounts.iter().enumerate() {
        if requested.sub_path.is_empty() {
            continue;
        }
        let Some(volume) = spec::volume(request, requested)? else {
            continue;
        };
        let failed = |problem| {
            move |source| SubPathError::Path {
                index,
                path: requested.sub_path.clone(),
                problem,
                source,
            }
        };
        let found = open(&volume, Path::new(&requested.sub_path)).map_err(|error| {
            let problem = match error {
                Errno::EXDEV => "leads out of its volume",
                Errno::ELOOP => "leads in a circle",
                _ => "cannot be opened or made",
            };
            failed(problem)(error.into())
        })?;
        bind(&found, &paths::sub_path(container, index)).map_err(failed("cannot be mounted"))?;
    }
    Ok(())
}

/// Opens a path within a volume; folders that are missing are made, as open to all as the volume itself.
fn open(volume: &Path, path: &Path) -> nix::Result<OwnedFd> {
    let root = fs::File::options()
        .read(true)
        .custom_flags(libc::O_PATH | libc::O_DIRECTORY | libc::O_CLOEXEC)
        .open(volume)
        .map_err(|error| Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO)))?;
    let beneath = |path: &Path, flags: OFlag| {
        let how = OpenHow::new()
            .flags(flags | OFlag::O_PATH | OFlag::O_CLOEXEC)
            .resolve(ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_MAGICLINKS);
        openat2(&root, path, how)
    };
    let mode = Mode::from_bits_truncate(fs_mode(volume));
    let mut walked = PathBuf::from(".");
    let mut found = beneath(&walked, OFlag::O_DIRECTORY)?;
    for part in path.components() {
        let name = match part {
            Component::Normal(name) => name,
            Component::CurDir => continue,
            Component::ParentDir | Component::RootDir | Component::Prefix(_) => return Err(Errno::EXDEV),
        };
        walked.push(name);
        found = match beneath(&walked, OFlag::empty()) {
            Err(Errno::ENOENT) => {
                match mkdirat(&found, name, mode) {
                    // Past the umask; a link that somebody put there meanwhile is not followed.
                    Ok(()) => fchmodat(&found, name, mode, FchmodatFlags::NoFollowSymlink)
                        .or_else(|error| if error == Errno::EOPNOTSUPP { Ok(()) } else { Err(error) })?,
                    // A link that leads nowhere, or somebody was faster.
                    Err(Errno::EEXIST) => {}
                    Err(error) => return Err(error),
                }
                beneath(&walked, OFlag::empty())?
            }
            other => other?,
        };
    }
    Ok(found)
}

fn fs_mode(volume: &Path) -> u32 {
    use std::os::unix::fs::PermissionsExt;
    fs::metadata(volume).map_or(0o755, |metadata| metadata.permissions().mode() & 0o7777)
}

fn bind(found: &OwnedFd, place: &Path) -> io::Result<()> {
    let source = PathBuf::from(format!("/proc/self/fd/{}", found.as_raw_fd()));
    if let Some(folder) = place.parent() {
        fs::create_dir_all(folder)?;
    }
    if fs::metadata(&source)?.is_dir() {
        fs::create_dir(place)?;
    } else {
        fs::File::create_new(place)?;
    }
    let nothing = None::<&str>;
    Ok(mount(Some(&source), place, nothing, MsFlags::MS_BIND, nothing)?)
}

/// Takes the places of a container away again, and nothing of what was shown there.
pub fn release(container: &Name) -> io::Result<()> {
    let folder = paths::sub_paths(container);
    let entries = match fs::read_dir(&folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
    };
    for entry in entries {
        let path = entry?.path();
        match umount2(&path, MntFlags::MNT_DETACH) {
            Ok(()) | Err(Errno::EINVAL) => {}
            Err(error) => return Err(error.into()),
        }
        // Not recursively: what is still mounted must stay.
        if path.is_dir() {
            fs::remove_dir(&path)?;
        } else {
            fs::remove_file(&path)?;
        }
    }
    fs::remove_dir(&folder)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    fn opened(volume: &Path, path: &str) -> nix::Result<PathBuf> {
        let found = open(volume, Path::new(path))?;
        Ok(fs::read_link(format!("/proc/self/fd/{}", found.as_raw_fd())).unwrap())
    }

    #[test]
    fn files_folders_and_links_within_a_volume_are_found() {
        let volume = tempfile::tempdir().unwrap();
        let root = volume.path();
        fs::create_dir_all(root.join("a/b")).unwrap();
        fs::write(root.join("a/file"), "x").unwrap();
        symlink("a/file", root.join("link")).unwrap();
        symlink("../a/b", root.join("a/up")).unwrap();
        assert_eq!(opened(root, "a/b").unwrap(), root.join("a/b"));
        assert_eq!(opened(root, "link").unwrap(), root.join("a/file"));
        assert_eq!(opened(root, "a/up").unwrap(), root.join("a/b"));
        assert_eq!(opened(root, "./a/").unwrap(), root.join("a"));
    }

    #[test]
    fn what_is_missing_is_made_as_open_as_the_volume() {
        use std::os::unix::fs::PermissionsExt;
        let volume = tempfile::tempdir().unwrap();
        fs::set_permissions(volume.path(), fs::Permissions::from_mode(0o777)).unwrap();
        assert_eq!(
            opened(volume.path(), "new/deep").unwrap(),
            volume.path().join("new/deep")
        );
        let mode = fs::metadata(volume.path().join("new/deep"))
            .unwrap()
            .permissions()
            .mode();
        assert_eq!(mode & 0o7777, 0o777);
    }

    #[test]
    fn no_link_leads_out_of_the_volume() {
        let outside = tempfile::tempdir().unwrap();
        let root = outside.path().join("volume");
        fs::create_dir_all(root.join("a")).unwrap();
        fs::write(outside.path().join("secret"), "x").unwrap();
        symlink("/etc", root.join("absolute")).unwrap();
        symlink("../secret", root.join("up")).unwrap();
        symlink("../../secret", root.join("a/up")).unwrap();
        symlink("up", root.join("chain")).unwrap();
        symlink("/proc/self/root", root.join("magic")).unwrap();
        for path in [
            "absolute",
            "absolute/passwd",
            "up",
            "a/up",
            "chain",
            "magic",
            "magic/etc",
            "../secret",
            "/etc",
        ] {
            assert_eq!(opened(&root, path), Err(Errno::EXDEV), "{path}");
        }
        symlink("loop", root.join("loop")).unwrap();
        assert_eq!(opened(&root, "loop"), Err(Errno::ELOOP));
    }

    #[test]
    fn nothing_is_made_through_a_link_that_leads_out() {
        let outside = tempfile::tempdir().unwrap();
        let root = outside.path().join("volume");
        fs::create_dir(&root).unwrap();
        symlink("../new", root.join("dangling")).unwrap();
        symlink("..", root.join("parent")).unwrap();
        assert!(opened(&root, "dangling").is_err());
        assert!(opened(&root, "dangling/x").is_err());
        assert!(opened(&root, "parent/new").is_err());
        assert!(!outside.path().join("new").exists());
    }

    #[test]
    fn a_way_through_a_file_is_an_error() {
        let volume = tempfile::tempdir().unwrap();
        fs::write(volume.path().join("file"), "x").unwrap();
        assert_eq!(opened(volume.path(), "file/x"), Err(Errno::ENOTDIR));
    }
}
