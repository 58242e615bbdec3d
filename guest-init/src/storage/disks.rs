//! Disks by serial (virtio 1.3, 5.2.6.1: VIRTIO_BLK_T_GET_ID), waited for by kernel events.

use std::{
    fs, io,
    path::{Path, PathBuf},
    time::Duration,
};

use super::StorageError;
use crate::{paths::Name, uevent::Uevents};

/// How long a disk may take to be probed; on an idle machine it is milliseconds.
const TIMEOUT: Duration = Duration::from_secs(20);

/// The device node of the disk with `serial`, as soon as it exists.
pub async fn find_disk(serial: &Name) -> Result<PathBuf, StorageError> {
    let failed = |source| StorageError::Search {
        serial: serial.to_string(),
        source,
    };
    // Listening begins before the first look, or a disk that comes between the two would be missed.
    let events = Uevents::listen().map_err(failed)?;
    let waiting = async {
        loop {
            if let Some(device) = look(Path::new("/sys/block"), serial.as_str())? {
                return Ok(device);
            }
            let _ = events.wait_for("SUBSYSTEM=block").await?;
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
        if serial_of(&entry.path()).is_some_and(|found| found == serial) {
            return Ok(Some(Path::new("/dev").join(entry.file_name())));
        }
    }
    Ok(None)
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
