//! What every sandbox is made from: `/dev/kvm`, flint-vmm, the guests' kernel and initrd.
//!
//! flintd starts without them: an upgrade that is just replacing a file, or a module that is not loaded yet, must not keep it
//! from the sandboxes that run. It looks again whenever somebody wants a sandbox, and says what is missing and what to do.
//!
//! ```text
//!   KVM      measured once, some 20 ms; then opened each time, some microseconds; measured again after a failed start
//!   VMM      looked at each time
//!   kernel   opened once; what was opened stays, so that a kernel and an initrd that belong together stay together
//! ```

use std::{
    fs::{self, File},
    io,
    os::{
        fd::AsRawFd,
        unix::fs::{FileExt, OpenOptionsExt, PermissionsExt},
    },
    path::{Path, PathBuf},
    sync::Arc,
};

use tokio::sync::Mutex;

use super::{SandboxError, blocking, file_error};
use crate::probe::{self, KvmKind};

/// Finds and keeps the supplies.
#[derive(Debug)]
pub(super) struct Supplies {
    vmm: PathBuf,
    kernel: PathBuf,
    initrd: Option<PathBuf>,
    found: Mutex<Found>,
}

#[derive(Debug, Default)]
struct Found {
    kvm: Option<KvmKind>,
    files: Option<Files>,
}

#[derive(Clone, Debug)]
struct Files {
    kernel: Arc<File>,
    initrd: Option<Arc<File>>,
}

/// All that a sandbox is made from.
#[derive(Debug)]
pub(super) struct Supply {
    pub kvm: KvmKind,
    files: Files,
}

impl Supply {
    /// The kernel, for one VMM alone: VMMs that read it at the same time must not share a file position.
    pub(super) fn kernel(&self) -> Result<File, SandboxError> {
        reopen(&self.files.kernel, "kernel")
    }

    /// The initrd, likewise.
    pub(super) fn initrd(&self) -> Result<Option<File>, SandboxError> {
        let initrd = self.files.initrd.as_deref();
        initrd.map(|file| reopen(file, "initrd")).transpose()
    }
}

impl Supplies {
    pub(super) fn new(vmm: PathBuf, kernel: PathBuf, initrd: Option<PathBuf>) -> Self {
        Self {
            vmm,
            kernel,
            initrd,
            found: Mutex::default(),
        }
    }

    pub(super) fn vmm(&self) -> &Path {
        &self.vmm
    }

    /// Everything, or the first thing that is missing.
    pub(super) async fn take(&self) -> Result<Supply, SandboxError> {
        let mut found = self.found.lock().await;
        let kvm = match found.kvm {
            Some(kind) => {
                // No promise: a device that has gone away meanwhile shows itself here, a busy one by a failed start.
                probe::present()?;
                kind
            }
            None => *found.kvm.insert(blocking(probe::measure).await??.kind),
        };
        check_vmm(&self.vmm)?;
        let files = match &found.files {
            Some(files) => files.clone(),
            None => found.files.insert(self.open()?).clone(),
        };
        Ok(Supply { kvm, files })
    }

    /// After a failed start: whether it is KVM that does not work any more.
    pub(super) async fn look_again(&self) -> Result<(), SandboxError> {
        self.found.lock().await.kvm = None;
        self.take().await.map(drop)
    }

    fn open(&self) -> Result<Files, SandboxError> {
        Ok(Files {
            kernel: Arc::new(open_kernel(&self.kernel)?),
            initrd: self.initrd.as_deref().map(open_initrd).transpose()?.map(Arc::new),
        })
    }
}

fn reopen(file: &File, name: &'static str) -> Result<File, SandboxError> {
    File::open(format!("/proc/self/fd/{}", file.as_raw_fd())).map_err(file_error("open once more the guest's", name))
}

fn unusable(role: &'static str, path: &Path, advice: &'static str, source: Option<io::Error>) -> SandboxError {
    SandboxError::Unusable {
        role,
        path: path.to_owned(),
        advice,
        source,
    }
}

/// A pipe by that name must not keep flintd waiting for a writer.
fn open(path: &Path) -> io::Result<File> {
    File::options().read(true).custom_flags(libc::O_NONBLOCK).open(path)
}

fn check_vmm(path: &Path) -> Result<(), SandboxError> {
    let error = |advice, source| unusable("VMM", path, advice, source);
    let data = fs::metadata(path).map_err(|source| error("install flint-vmm, or name it by --vmm", Some(source)))?;
    if !data.is_file() || data.permissions().mode() & 0o111 == 0 {
        return Err(error("it is no executable file; name flint-vmm by --vmm", None));
    }
    Ok(())
}

fn open_kernel(path: &Path) -> Result<File, SandboxError> {
    let error = |advice, source| unusable("guest kernel", path, advice, source);
    let advice = "install the guest kernel, or name it by --kernel";
    let file = open(path).map_err(|source| error(advice, Some(source)))?;
    let (mut elf, mut bz_image) = ([0; 4], [0; 4]);
    let read = |bytes: &mut [u8], offset| file.read_exact_at(bytes, offset).is_ok();
    // The magic of ELF, and the header's of the Linux x86 boot protocol at 0x202.
    let is_kernel = (read(&mut elf, 0) && &elf == b"\x7fELF") || (read(&mut bz_image, 0x202) && &bz_image == b"HdrS");
    is_kernel
        .then_some(file)
        .ok_or_else(|| error("it is neither an ELF vmlinux nor a bzImage; see --kernel", None))
}

fn open_initrd(path: &Path) -> Result<File, SandboxError> {
    let error = |advice, source| unusable("guest initrd", path, advice, source);
    let file = open(path).map_err(|source| error("install it, or name it by --initrd", Some(source)))?;
    let has_bytes = file.metadata().is_ok_and(|data| data.is_file() && data.len() > 0);
    has_bytes.then_some(file).ok_or_else(|| {
        error(
            "it is empty or no file; name the initrd with flint-init by --initrd",
            None,
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_be_used_is_named_together_with_the_next_step() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("file");
        fs::write(&file, "no kernel, no program").unwrap();
        let empty = folder.path().join("empty");
        fs::write(&empty, "").unwrap();
        let missing = folder.path().join("missing");
        for (path, found) in [(&missing, true), (&file, false), (&folder.path().to_owned(), false)] {
            for (error, option) in [
                (open_kernel(path).unwrap_err(), "--kernel"),
                (check_vmm(path).unwrap_err(), "--vmm"),
            ] {
                let message = crate::chain(&error);
                assert!(message.contains(option), "{message}");
                assert!(message.contains(&path.display().to_string()), "{message}");
                assert_eq!(message.contains("No such file"), found, "{message}");
            }
        }
        for path in [&missing, &empty, &folder.path().to_owned()] {
            let message = crate::chain(&open_initrd(path).unwrap_err());
            assert!(message.contains("--initrd"), "{message}");
        }
    }

    #[tokio::test]
    async fn files_that_were_missing_are_found_when_they_are_there_and_then_kept() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name| folder.path().join(name);
        let supplies = Supplies::new("/bin/true".into(), path("kernel"), Some(path("initrd")));
        assert!(supplies.open().is_err());
        fs::write(path("kernel"), "\x7fELF").unwrap();
        assert!(supplies.open().unwrap_err().to_string().contains("initrd"));
        fs::write(path("initrd"), "x").unwrap();
        let files = supplies.open().unwrap();
        fs::remove_file(path("initrd")).unwrap();
        let supply = Supply {
            kvm: KvmKind::Native,
            files,
        };
        let mut one = [0];
        supply.initrd().unwrap().unwrap().read_exact_at(&mut one, 0).unwrap();
        assert_eq!(&one, b"x");
    }
}
