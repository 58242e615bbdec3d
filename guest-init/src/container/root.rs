//! Looking into a container's root from outside, without being led out of it: openat2(2) with RESOLVE_IN_ROOT treats the
//! container's root as `/` for every symlink on the way.

use std::{
    fs::File,
    io::{self, Read},
    os::{fd::OwnedFd, unix::fs::OpenOptionsExt},
    path::{Component, Path, PathBuf},
};

use nix::{
    errno::Errno,
    fcntl::{OFlag, OpenHow, ResolveFlag, openat2},
    sys::stat::{Mode, mkdirat},
};

/// Most that is read of a file that an image supplies.
const MAX_FILE: u64 = 4 << 20;

/// Why a path in a container's root could not be used.
#[derive(Debug, thiserror::Error)]
#[error("{step} {path} in the container", path = .path.display())]
pub struct RootError {
    step: &'static str,
    path: PathBuf,
    #[source]
    source: io::Error,
}

/// A container's root directory.
#[derive(Debug)]
pub struct ContainerRoot(OwnedFd);

impl ContainerRoot {
    /// Opens the root at `path`.
    pub fn open(path: &Path) -> Result<Self, RootError> {
        let flags = libc::O_PATH | libc::O_DIRECTORY | libc::O_CLOEXEC;
        let opened = File::options().read(true).custom_flags(flags).open(path);
        let file = opened.map_err(|source| RootError {
            step: "opening",
            path: path.to_owned(),
            source,
        })?;
        Ok(Self(file.into()))
    }

    /// A text file's content; empty if it is missing. What is no regular file, or too long, is an error.
    pub fn read_text(&self, path: &str) -> Result<String, RootError> {
        let failed = |source| RootError {
            step: "reading",
            path: path.into(),
            source,
        };
        // Not blocking: a FIFO in the place of passwd must not hold us.
        let file = match self.open_in(Path::new(path), OFlag::O_RDONLY | OFlag::O_NONBLOCK) {
            Ok(file) => File::from(file),
            Err(Errno::ENOENT | Errno::ENOTDIR) => return Ok(String::new()),
            Err(error) => return Err(failed(error.into())),
        };
        let metadata = file.metadata().map_err(failed)?;
        if !metadata.is_file() || metadata.len() > MAX_FILE {
            return Err(failed(io::Error::other(format!(
                "not a regular file of at most {MAX_FILE} bytes"
            ))));
        }
        let mut bytes = Vec::new();
        file.take(MAX_FILE).read_to_end(&mut bytes).map_err(failed)?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }

    /// Makes `path` and its parents exist as directories.
    pub fn create_dir_all(&self, path: &Path) -> Result<(), RootError> {
        let failed = |source| RootError {
            step: "creating directory",
            path: path.to_owned(),
            source,
        };
        let mut walked = PathBuf::from("/");
        for component in path.components() {
            match component {
                Component::Normal(name) => {
                    let parent = self.open_in(&walked, OFlag::O_PATH | OFlag::O_DIRECTORY);
                    let parent = parent.map_err(|error| failed(error.into()))?;
                    walked.push(name);
                    match self.open_in(&walked, OFlag::O_PATH | OFlag::O_DIRECTORY) {
                        Ok(_) => {}
                        Err(Errno::ENOENT) => mkdirat(&parent, name, Mode::from_bits_truncate(0o755))
                            .map_err(|error| failed(error.into()))?,
                        Err(error) => return Err(failed(error.into())),
                    }
                }
                Component::ParentDir => return Err(failed(io::Error::other("the path contains \"..\""))),
                Component::RootDir | Component::CurDir | Component::Prefix(_) => {}
            }
        }
        Ok(())
    }

    fn open_in(&self, path: &Path, flags: OFlag) -> nix::Result<OwnedFd> {
        let how = OpenHow::new()
            .flags(flags | OFlag::O_CLOEXEC)
            .resolve(ResolveFlag::RESOLVE_IN_ROOT | ResolveFlag::RESOLVE_NO_MAGICLINKS);
        openat2(&self.0, path, how)
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::symlink};

    use super::*;

    fn root() -> (tempfile::TempDir, ContainerRoot) {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir(folder.path().join("etc")).unwrap();
        let root = ContainerRoot::open(folder.path()).unwrap();
        (folder, root)
    }

    #[test]
    fn links_that_point_outside_are_followed_inside() {
        let (folder, root) = root();
        fs::write(folder.path().join("real"), "inside").unwrap();
        symlink("../../../../../../real", folder.path().join("etc/passwd")).unwrap();
        symlink("/etc/hostname", folder.path().join("etc/group")).unwrap();
        assert_eq!(root.read_text("/etc/passwd").unwrap(), "inside");
        // The machine that runs this test has /etc/hostname; the root has not.
        assert_eq!(root.read_text("/etc/group").unwrap(), "");
    }

    #[test]
    fn what_is_no_regular_file_is_refused_without_waiting() {
        let (folder, root) = root();
        nix::unistd::mkfifo(&folder.path().join("etc/passwd"), Mode::S_IRWXU).unwrap();
        assert!(
            root.read_text("/etc/passwd")
                .unwrap_err()
                .to_string()
                .contains("/etc/passwd")
        );
        assert!(root.read_text("/etc").is_err());
        symlink("loop", folder.path().join("etc/loop")).unwrap();
        assert!(root.read_text("/etc/loop").is_err());
    }

    #[test]
    fn a_file_that_is_too_long_is_refused() {
        let (folder, root) = root();
        let file = File::create(folder.path().join("etc/passwd")).unwrap();
        file.set_len(MAX_FILE + 1).unwrap();
        assert!(root.read_text("/etc/passwd").is_err());
    }

    #[test]
    fn directories_are_made_inside_through_links_too() {
        let (folder, root) = root();
        symlink("/tmp-of-container", folder.path().join("link")).unwrap();
        fs::create_dir(folder.path().join("tmp-of-container")).unwrap();
        root.create_dir_all(Path::new("/link/a/b")).unwrap();
        assert!(folder.path().join("tmp-of-container/a/b").is_dir());
        root.create_dir_all(Path::new("/link/a/b")).unwrap();
        assert!(root.create_dir_all(Path::new("/a/../b")).is_err());
    }

    #[test]
    fn a_file_in_the_way_of_a_directory_is_an_error() {
        let (folder, root) = root();
        fs::write(folder.path().join("app"), "").unwrap();
        assert!(root.create_dir_all(Path::new("/app/data")).is_err());
    }
}
