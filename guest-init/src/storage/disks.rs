//! Disks by serial (virtio 1.3, 5.2.6.1: VIRTIO_BLK_T_GET_ID), waited for by kernel events.
//!
//! A clone of a template has all its disks from the start, and the host puts something on them when it is claimed: its
//! driver learns the new capacity by an interrupt, and sets it some time later. Of that Linux makes no uevent, because the disk was
//! empty before (`set_capacity_and_notify` in block/genhd.c). But it tells of it in its log, which can be waited for.

use std::{
    fs::{self, OpenOptions},
    io::{self, Read, Seek, SeekFrom},
    os::{fd::OwnedFd, unix::fs::OpenOptionsExt},
    path::{Path, PathBuf},
    time::Duration,
};

use tokio::io::{Interest, unix::AsyncFd};

use super::StorageError;
use crate::{paths::Name, uevent::Uevents};

/// How long a disk may take to be probed; on an idle machine it is milliseconds.
const TIMEOUT: Duration = Duration::from_secs(20);

/// The device node of the disk with `serial`, as soon as it exists and there is something on it.
pub async fn find_disk(serial: &Name) -> Result<PathBuf, StorageError> {
    let failed = |source| StorageError::Search {
        serial: serial.to_string(),
        source,
    };
    // Listening begins before the first look, or a disk that comes between the two would be missed.
    let events = Uevents::listen().map_err(failed)?;
    let log = KernelLog::from_now_on();
    let waiting = async {
        loop {
            if let Some(device) = look(Path::new("/sys/block"), serial.as_str())? {
                return Ok(device);
            }
            tokio::select! {
                event = events.wait_for("SUBSYSTEM=block") => drop(event?),
                grown = log.grown() => grown?,
            }
        }
    };
    match tokio::time::timeout(TIMEOUT, waiting).await {
        Ok(found) => found.map_err(failed),
        Err(_) => Err(StorageError::NoDisk {
            serial: serial.to_string(),
            seconds: TIMEOUT.as_secs(),
            present: serials(Path::new("/sys/block")).map_err(failed)?.join(", "),
        }),
    }
}

fn look(block: &Path, serial: &str) -> io::Result<Option<PathBuf>> {
    for entry in fs::read_dir(block)? {
        let entry = entry?;
        let disk = entry.path();
        if serial_of(&disk).is_some_and(|found| found == serial) && !is_empty(&disk) {
            return Ok(Some(Path::new("/dev").join(entry.file_name())));
        }
    }
    Ok(None)
}

/// Whether nothing is on it yet. A disk that does not say is taken for one that has something.
fn is_empty(disk: &Path) -> bool {
    fs::read_to_string(disk.join("size")).is_ok_and(|sectors| sectors.trim_end() == "0")
}

/// The kernel's log (Linux' Documentation/ABI/testing/dev-kmsg).
#[derive(Debug)]
struct KernelLog(Option<AsyncFd<OwnedFd>>);

impl KernelLog {
    /// Nothing is ever heard of a kernel that keeps no log: then disks have to be there already.
    fn from_now_on() -> Self {
        let open = || {
            let mut log = OpenOptions::new()
                .read(true)
                .custom_flags(libc::O_NONBLOCK)
                .open("/dev/kmsg")?;
            log.seek(SeekFrom::End(0))?;
            crate::sys::async_fd(log.into(), Interest::READABLE)
        };
        Self(open().ok())
    }

    /// Waits until a disk's capacity has changed, or may have.
    async fn grown(&self) -> io::Result<()> {
        const MOST: usize = 8192;
        let Some(log) = &self.0 else {
            return std::future::pending().await;
        };
        let mut reader = fs::File::from(log.get_ref().try_clone()?);
        let mut message = vec![0; MOST];
        loop {
            let mut ready = log.readable().await?;
            match reader.read(&mut message) {
                Ok(length) if tells_of_capacity(message.get(..length).unwrap_or_default()) => return Ok(()),
                Ok(_) => {}
                Err(error) => match error.raw_os_error() {
                    Some(libc::EAGAIN) => ready.clear_ready(),
                    // Messages were overwritten before they were read.
                    Some(libc::EPIPE) => return Ok(()),
                    _ => return Err(error),
                },
            }
        }
    }
}

fn tells_of_capacity(message: &[u8]) -> bool {
    String::from_utf8_lossy(message).contains("detected capacity change")
}

fn serials(block: &Path) -> io::Result<Vec<String>> {
    let entries: Vec<_> = fs::read_dir(block)?.collect::<Result<_, _>>()?;
    Ok(entries.iter().filter_map(|entry| serial_of(&entry.path())).collect())
}

/// Disks of other kinds have no such file.
fn serial_of(disk: &Path) -> Option<String> {
    let text = fs::read_to_string(disk.join("serial")).ok()?;
    let text = text.trim_end_matches(['\0', '\n', ' ']);
    (!text.is_empty()).then(|| text.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_with_nothing_on_it_is_not_there_yet() {
        let block = tempfile::tempdir().unwrap();
        disk(block.path(), "vda", Some("scratch"));
        let size = |sectors| fs::write(block.path().join("vda/size"), sectors).unwrap();
        size("0\n");
        assert_eq!(look(block.path(), "scratch").unwrap(), None);
        size("8192\n");
        assert_eq!(look(block.path(), "scratch").unwrap(), Some("/dev/vda".into()));
    }

    #[test]
    fn the_kernels_word_for_a_new_capacity_is_understood() {
        let message =
            b"5,512,9021340,-;virtio_blk virtio3: [vda] new size: 8192 512-byte logical blocks (4.19 MB/4.00 MiB)\n";
        assert!(!tells_of_capacity(message), "this comes before the capacity is set");
        assert!(tells_of_capacity(
            b"6,513,9021377,-;vda: detected capacity change from 0 to 8192\n"
        ));
    }

    fn disk(folder: &Path, name: &str, serial: Option<&str>) {
        fs::create_dir(folder.join(name)).unwrap();
        if let Some(serial) = serial {
            fs::write(folder.join(name).join("serial"), serial).unwrap();
        }
    }

    #[test]
    fn a_disk_is_found_by_its_whole_serial() {
        let block = tempfile::tempdir().unwrap();
        disk(block.path(), "loop0", None);
        disk(block.path(), "vda", Some("image-1\n"));
        disk(block.path(), "vdb", Some("image-10\n"));
        disk(block.path(), "vdc", Some(""));
        assert_eq!(look(block.path(), "image-10").unwrap(), Some("/dev/vdb".into()));
        assert_eq!(look(block.path(), "image-1").unwrap(), Some("/dev/vda".into()));
        assert_eq!(look(block.path(), "image").unwrap(), None);
        let mut found = serials(block.path()).unwrap();
        found.sort();
        assert_eq!(found, ["image-1", "image-10"]);
    }
}
