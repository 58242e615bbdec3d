//! One process owns a store: a lock on a file, which the kernel gives back when the owner ends, however it ends.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{Read, Write};
use std::path::Path;

use super::StoreError;

/// The lock; dropping it gives the store free.
#[derive(Debug)]
pub(crate) struct DirLock(#[allow(dead_code, reason = "held for its lock")] File);

impl DirLock {
    /// Takes the lock of the store in `dir`.
    pub(crate) fn take(dir: &Path) -> Result<Self, StoreError> {
        let path = dir.join("lock");
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(&path)
            .map_err(StoreError::io("opening", &path))?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                return Err(StoreError::Locked {
                    dir: dir.to_path_buf(),
                    owner: owner(&mut file),
                });
            }
            Err(TryLockError::Error(source)) => return Err(StoreError::io("locking", &path)(source)),
        }
        // For the other side's message only. A full disk must not keep a store from opening: something may want to be removed.
        let written = file.set_len(0).and_then(|()| write!(file, "{}", std::process::id()));
        if let Err(error) = written {
            tracing::debug!(%error, "the owner's process id could not be written to the lock file");
        }
        Ok(Self(file))
    }
}

fn owner(file: &mut File) -> String {
    let mut text = String::new();
    match file.take(20).read_to_string(&mut text) {
        Ok(_) if !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit()) => format!("process {text}"),
        _ => "another process".to_owned(),
    }
}
