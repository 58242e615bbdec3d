//! Disks by serial (virtio 1.3, 5.2.6.1: VIRTIO_BLK_T_GET_ID), waited for by kernel events.
//!
//! A clone of a template has all its disks from the start, and the host puts something on them when it is claimed: its
//! driver learns the new capacity by an interrupt, and sets it some time later. Of that Linux makes no uevent, because the disk was
//! empty before (`set_capacity_and_notify` in block/genhd.c). But it tells of it in its log, which can be waited for.

use std::{
    fs, io,
    path::{Path, PathBuf},
    time::Duration,
};

use super::StorageError;
use crate::{kernel_log::KernelLog, paths::Name, uevent::Uevents};

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
    // Nothing is ever heard of a kernel that keeps no log: then disks have to be there already.
    let log = KernelLog::listen().ok();
    let waiting = async {
        loop {
            if let Some(device) = look(Path::new("/sys/block"), serial.as_str())? {
                return Ok(device);
            }
            tokio::select! {
                event = events.wait_for("SUBSYSTEM=block") => drop(event?),
                grown = grown(log.as_ref()) => grown?,
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

/// Waits until a disk's capacity has changed, or may have.
async fn grown(log: Option<&KernelLog>) -> io::Result<()> {
    match log {
        Some(log) => log.wait_for("detected capacity change").await.map(drop),
        None => std::future::pending().await,
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
