//! A sandbox that stands still is written into files: machine and memory by its VMM, the writable disk by us.
//!
//! The disk has no name (`scratch`), and after a restart of flintd its VMM alone has it open. So it is looked for among the
//! VMM's descriptors (proc(5), `/proc/PID/fd`): the one file that may be written and has no name.

use std::{
    fs::{self, File},
    io,
    os::{fd::AsFd, unix::fs::MetadataExt as _},
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use super::{Sandbox, SandboxError, blocking, control::ControlError, file_error};
use crate::{
    backend::{SavedMachine, Stopped},
    chain,
    network::addresses::mac_of,
    saved::SavedFiles,
    scratch::copy_sparse,
};

impl Sandbox {
    /// Writes it into files. Most of its memory is written while it runs; then it stands still, and goes on doing so.
    pub async fn save(&self, files: Arc<SavedFiles>) -> Result<Stopped, SandboxError> {
        let (state, vmm) = self.0.control.hello().await?;
        let machine = state
            .machine
            .ok_or(ControlError::Protocol("a sandbox without a machine"))?;
        let plugged = state.memory.map_or(0, |memory| memory.plugged_bytes);
        // The pages of the files that it writes are the VMM's until they are on the disk.
        let memory = machine.memory_bytes.saturating_add(plugged);
        let loan = self.0.end.cgroup().lend(memory)?;
        let fds = [files.state.as_fd(), files.memory.as_fd()];
        let saved = self.0.control.save(memory, &fds).await;
        let now = Instant::now();
        let copied = match &saved {
            Ok(_) => blocking(move || copy_disk(vmm, &files.scratch)).await.flatten(),
            Err(error) => Err(error.clone().into()),
        };
        if let Err(error) = loan.give_back() {
            tracing::warn!(
                sandbox = self.id(),
                error = chain(&error),
                "its memory limit stays raised"
            );
        }
        copied?;
        let stood = Duration::from_micros(saved?.paused_us);
        let machine = SavedMachine {
            machine,
            mac: self
                .0
                .address
                .map(|address| mac_of(address).to_vec())
                .unwrap_or_default(),
            plugged_bytes: plugged,
        };
        let at = now.checked_sub(stood).unwrap_or(now);
        Ok(Stopped { machine, at })
    }
}

/// Whether an error is that a disk is full.
pub(crate) fn is_disk_full(error: &SandboxError) -> bool {
    match error {
        SandboxError::File { source, .. } => {
            matches!(source.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
        }
        // The VMM gives words; these are those of the errno.
        SandboxError::Control(ControlError::Refused { message, .. }) => [libc::ENOSPC, libc::EDQUOT]
            .iter()
            .any(|errno| message.contains(&format!("(os error {errno})"))),
        _ => false,
    }
}

/// Copies a VMM's writable disk; its holes stay holes.
fn copy_disk(vmm: i32, to: &File) -> Result<(), SandboxError> {
    let descriptors = PathBuf::from(format!("/proc/{vmm}/fd"));
    let all = fs::read_dir(&descriptors).map_err(file_error("list", &descriptors))?;
    let found = find_disk(vmm, all.flatten().map(|entry| entry.path()));
    let path = found.map_err(file_error("look for the writable disk in", &descriptors))?;
    let disk = File::open(&path).map_err(file_error("open", &path))?;
    let bytes = disk.metadata().map_err(file_error("look at", &path))?.len();
    copy_sparse(&disk, to, bytes).map_err(file_error("copy the writable disk", path))
}

fn find_disk(process: i32, descriptors: impl Iterator<Item = PathBuf>) -> io::Result<PathBuf> {
    let mut found = Vec::new();
    for path in descriptors {
        let number = path.file_name().unwrap_or_default().display().to_string();
        if is_disk(process, &number, &path)? {
            found.push(path);
        }
    }
    match (found.pop(), found.is_empty()) {
        (Some(path), true) => Ok(path),
        (None, _) => Err(io::Error::other("there is none")),
        (Some(_), false) => Err(io::Error::other("there is more than one")),
    }
}

fn is_disk(vmm: i32, number: &str, path: &Path) -> io::Result<bool> {
    let data = fs::metadata(path)?;
    // The name of a memfd is no path of components.
    let is_memory = || Ok::<_, io::Error>(fs::read_link(path)?.to_string_lossy().starts_with("/memfd:"));
    if !data.is_file() || data.nlink() > 0 || is_memory()? {
        return Ok(false);
    }
    let info = fs::read_to_string(format!("/proc/{vmm}/fdinfo/{number}"))?;
    let flags = info.lines().find_map(|line| line.strip_prefix("flags:"));
    let flags = flags.and_then(|flags| i32::from_str_radix(flags.trim(), 8).ok());
    Ok(flags.is_some_and(|flags| flags & libc::O_ACCMODE == libc::O_RDWR))
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd;

    use flint_api::vmm;
    use nix::sys::memfd::{MFdFlags, memfd_create};

    use super::*;

    #[test]
    fn the_disk_is_the_one_writable_file_without_a_name() {
        // As a VMM has them: a memory, a log with a name, an image, the disk.
        let folder = tempfile::tempdir().unwrap();
        let file = || tempfile::tempfile_in(folder.path()).unwrap();
        let (disk, second) = (file(), file());
        let log = File::create(folder.path().join("log")).unwrap();
        let packs = tempfile::NamedTempFile::new_in(folder.path()).unwrap();
        let image = File::open(packs.path()).unwrap();
        drop(packs);
        let memory = memfd_create("memory", MFdFlags::empty()).unwrap();
        let own = i32::try_from(std::process::id()).unwrap();
        let path = |fd: &dyn AsRawFd| PathBuf::from(format!("/proc/{own}/fd/{}", fd.as_raw_fd()));
        let others = [path(&log), path(&image), path(&memory)];
        let among = |more: &[PathBuf]| find_disk(own, others.iter().chain(more).cloned());

        assert_eq!(among(&[path(&disk)]).unwrap(), path(&disk));
        assert!(among(&[]).is_err());
        assert!(among(&[path(&disk), path(&second)]).is_err(), "no guess");
    }

    #[test]
    fn a_full_disk_is_told_from_other_failures() {
        let refused = |message: &str| {
            SandboxError::Control(ControlError::Refused {
                code: vmm::error::Code::Internal,
                message: message.into(),
            })
        };
        let full = io::Error::from_raw_os_error(libc::ENOSPC);
        assert!(is_disk_full(&refused(&format!("writing guest memory: {full}"))));
        assert!(!is_disk_full(&refused(
            "writing guest memory: Bad file descriptor (os error 9)"
        )));
        assert!(is_disk_full(&file_error("copy", "/x")(full)));
    }
}
