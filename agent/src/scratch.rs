//! Scratch disks: the writable part of a sandbox, an ext4 file system in a sparse file of fixed size, so that what a guest
//! writes to the host is bounded by it.
//!
//! `mkfs.ext4` runs once for each size; a sandbox gets a copy of that template, by reflink or else of its few data ranges.
//! The copy never has a name: it ends with the last descriptor on it, which is the VMM's. So nothing is left behind,
//! whenever flintd or the VMM is killed, and nothing needs to be cleaned up.
//!
//! How the file system is made, and why:
//! - no journal: the disk does not outlive its machine, so there is no crash to recover from, and each write happens once;
//! - inode tables and journal not initialised lazily: the guest's first seconds have no background writes;
//! - one inode for 64 KiB: a small template (the tables are its bulk), yet 16 thousand files for each GiB;
//! - no blocks reserved for root: containers commonly run as root, and the whole disk is theirs.

use std::{
    collections::HashMap,
    ffi::OsStr,
    fs::{self, File},
    io,
    os::{fd::AsRawFd, unix::fs::FileExt},
    path::{Path, PathBuf},
    process::{Command, Output},
    sync::{Arc, Mutex, PoisonError},
};

use nix::{
    errno::Errno,
    unistd::{Whence, lseek},
};
use thiserror::Error;

/// Smallest scratch disk: below it ext4 has no room for its own structures.
pub const MIN_BYTES: u64 = 16 << 20;
/// Sizes are rounded up to this, so that few templates serve all pods.
const GRANULE: u64 = 1 << 20;

/// A scratch disk could not be made.
#[derive(Debug, Error)]
pub enum ScratchError {
    /// No such program.
    #[error("mkfs.ext4 cannot be run: install the package e2fsprogs")]
    NoMkfs(#[source] io::Error),
    /// It did not like the order.
    #[error("mkfs.ext4 could not make a file system of {bytes} bytes: {output}")]
    Mkfs {
        /// Size asked for.
        bytes: u64,
        /// What it said.
        output: String,
    },
    /// A file in the folder did not do as asked.
    #[error("could not {action} {path}: is there room on that file system?")]
    File {
        /// What was tried.
        action: &'static str,
        /// On which file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
}

fn failed(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> ScratchError {
    let path = path.to_owned();
    move |source| ScratchError::File { action, path, source }
}

/// Makes scratch disks in one folder.
#[derive(Debug)]
pub struct Scratch {
    folder: PathBuf,
    templates: Mutex<HashMap<u64, Arc<File>>>,
}

impl Scratch {
    /// Scratch disks in `folder`, which is made if it is missing.
    pub fn open(folder: impl Into<PathBuf>) -> Result<Self, ScratchError> {
        let folder = folder.into();
        fs::create_dir_all(&folder).map_err(failed("make", &folder))?;
        Ok(Self {
            folder,
            templates: Mutex::default(),
        })
    }

    /// Makes the template of a size, so that no start has to wait for it. Blocks.
    pub fn prepare(&self, bytes: u64) -> Result<(), ScratchError> {
        self.template(round(bytes)).map(drop)
    }

    /// A new scratch disk of at least `bytes`. Blocks.
    pub fn make(&self, bytes: u64) -> Result<File, ScratchError> {
        let bytes = round(bytes);
        let template = self.template(bytes)?;
        let copy = tempfile::tempfile_in(&self.folder).map_err(failed("make a file in", &self.folder))?;
        copy_sparse(&template, &copy, bytes).map_err(failed("copy a template in", &self.folder))?;
        Ok(copy)
    }

    /// A scratch disk with what is on another one, whose size may be any. Blocks.
    pub fn copy_of(&self, disk: &File) -> Result<File, ScratchError> {
        let copy = tempfile::tempfile_in(&self.folder).map_err(failed("make a file in", &self.folder))?;
        let copied = disk.metadata().and_then(|data| copy_sparse(disk, &copy, data.len()));
        copied.map_err(failed("copy a saved disk in", &self.folder))?;
        Ok(copy)
    }

    fn template(&self, bytes: u64) -> Result<Arc<File>, ScratchError> {
        // The lock is held over mkfs: of many pods that want a new size at once, one makes it.
        let mut templates = self.templates.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(template) = templates.get(&bytes) {
            return Ok(Arc::clone(template));
        }
        let path = self.folder.join(format!("template-1-{bytes}.ext4"));
        let template = match File::open(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => self.make_template(bytes, &path)?,
            other => other.map_err(failed("open", &path))?,
        };
        let template = Arc::new(template);
        templates.insert(bytes, Arc::clone(&template));
        Ok(template)
    }

    /// A file under the final name is always whole: it gets the name last.
    fn make_template(&self, bytes: u64, path: &Path) -> Result<File, ScratchError> {
        let draft = tempfile::NamedTempFile::new_in(&self.folder).map_err(failed("make a file in", &self.folder))?;
        draft.as_file().set_len(bytes).map_err(failed("size", draft.path()))?;
        let output = make_file_system(draft.path()).map_err(ScratchError::NoMkfs)?;
        if !output.status.success() {
            let output = String::from_utf8_lossy(&output.stderr).trim().to_owned();
            return Err(ScratchError::Mkfs { bytes, output });
        }
        draft.persist(path).map_err(|error| failed("name", path)(error.error))
    }
}

fn round(bytes: u64) -> u64 {
    bytes
        .max(MIN_BYTES)
        .checked_next_multiple_of(GRANULE)
        .unwrap_or(u64::MAX - u64::MAX % GRANULE)
}

fn make_file_system(path: &Path) -> io::Result<Output> {
    let options = ["-q", "-F", "-m", "0", "-i", "65536", "-O", "^has_journal", "-E"];
    let extended = "lazy_itable_init=0,nodiscard,root_owner=0:0";
    Command::new("mkfs.ext4")
        .args(options)
        .args([OsStr::new(extended), path.as_os_str()])
        .output()
}

/// Copies a file so that its holes stay holes.
pub(crate) fn copy_sparse(from: &File, to: &File, bytes: u64) -> io::Result<()> {
    if reflink(from, to).is_ok() {
        return Ok(());
    }
    to.set_len(bytes)?;
    let mut buffer = vec![0; 256 << 10];
    let mut position = 0;
    while let Some((start, end)) = next_data(from, position)? {
        let mut at = start;
        while at < end {
            let wanted = usize::try_from(end - at).unwrap_or(usize::MAX).min(buffer.len());
            let length = from.read_at(&mut buffer[..wanted], at)?;
            if length == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            to.write_all_at(&buffer[..length], at)?;
            at += length as u64;
        }
        position = end;
    }
    Ok(())
}

/// Shares the blocks, where the file system can (ioctl_ficlone(2)).
fn reflink(from: &File, to: &File) -> io::Result<()> {
    // SAFETY: FICLONE takes two descriptors, both open here, and no memory of ours.
    Errno::result(unsafe { libc::ioctl(to.as_raw_fd(), libc::FICLONE, from.as_raw_fd()) })?;
    Ok(())
}

/// The next range that is no hole (lseek(2), `SEEK_DATA`). Each lseek names its own start and data is read at explicit
/// offsets, so concurrent copies do not disturb one another although they share the file's position.
fn next_data(file: &File, position: u64) -> io::Result<Option<(u64, u64)>> {
    let position = i64::try_from(position).map_err(io::Error::other)?;
    let start = match lseek(file, position, Whence::SeekData) {
        Err(Errno::ENXIO) => return Ok(None),
        other => other?,
    };
    let end = lseek(file, start, Whence::SeekHole)?;
    Ok(Some((start.cast_unsigned(), end.cast_unsigned())))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    #[test]
    fn a_copy_equals_its_template_and_stays_sparse() {
        let folder = tempfile::tempdir().unwrap();
        let scratch = Scratch::open(folder.path()).unwrap();
        let disk = scratch.make(256 << 20).unwrap();
        let template = scratch.template(256 << 20).unwrap();
        assert_eq!(disk.metadata().unwrap().len(), 256 << 20);
        assert!(
            disk.metadata().unwrap().blocks() * 512 < 8 << 20,
            "the copy has no holes"
        );
        let (mut left, mut right) = (vec![0; 1 << 20], vec![0; 1 << 20]);
        for offset in (0..256 << 20).step_by(1 << 20) {
            template.read_exact_at(&mut left, offset).unwrap();
            disk.read_exact_at(&mut right, offset).unwrap();
            assert!(left == right, "differs in the MiB at {offset}");
        }
    }

    #[test]
    fn a_scratch_disk_is_a_sound_file_system_and_leaves_no_name() {
        let folder = tempfile::tempdir().unwrap();
        let scratch = Scratch::open(folder.path()).unwrap();
        let disk = scratch.make(0).unwrap();
        let path = format!("/proc/{}/fd/{}", std::process::id(), disk.as_raw_fd());
        let check = Command::new("e2fsck").args(["-fn", &path]).output().unwrap();
        assert!(check.status.success(), "{}", String::from_utf8_lossy(&check.stdout));
        drop(disk);
        let names: Vec<_> = fs::read_dir(folder.path())
            .unwrap()
            .map(|entry| entry.unwrap().file_name())
            .collect();
        assert_eq!(names, [format!("template-1-{MIN_BYTES}.ext4").as_str()]);
    }
}
