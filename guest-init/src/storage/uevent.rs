//! Disks by serial (virtio 1.3, 5.2.6.1: VIRTIO_BLK_T_GET_ID), waited for by kernel events.

use std::{
    fs, io,
    os::fd::{AsRawFd, OwnedFd},
    path::{Path, PathBuf},
    time::Duration,
};

use nix::{
    errno::Errno,
    sys::socket::{AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, socket},
};
use tokio::io::{Interest, unix::AsyncFd};

use super::StorageError;
use crate::paths::Name;

/// How long a disk may take to be probed; on an idle machine it is milliseconds.
const TIMEOUT: Duration = Duration::from_secs(20);
/// The kernel's own multicast group; udev's is 2.
const KERNEL_GROUP: u32 = 1;

/// The device node of the disk with `serial`, as soon as it exists.
pub async fn find_disk(serial: &Name) -> Result<PathBuf, StorageError> {
    let failed = |source| StorageError::Search {
        serial: serial.to_string(),
        source,
    };
    // Listening begins before the first look, or a disk that comes between the two would be missed.
    let events = listen().map_err(failed)?;
    let waiting = async {
        loop {
            if let Some(device) = look(Path::new("/sys/block"), serial.as_str())? {
                return Ok(device);
            }
            wait_for_block_device(&events).await?;
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

fn listen() -> io::Result<AsyncFd<OwnedFd>> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let socket = socket(
        AddressFamily::Netlink,
        SockType::Datagram,
        flags,
        SockProtocol::NetlinkKObjectUEvent,
    )?;
    bind(socket.as_raw_fd(), &NetlinkAddr::new(0, KERNEL_GROUP))?;
    crate::sys::async_fd(socket, Interest::READABLE)
}

async fn wait_for_block_device(events: &AsyncFd<OwnedFd>) -> io::Result<()> {
    let mut message = [0; 4096];
    loop {
        let mut ready = events.readable().await?;
        match recv(events.get_ref().as_raw_fd(), &mut message, MsgFlags::empty()) {
            Ok(length) if concerns_block_devices(message.get(..length).unwrap_or_default()) => return Ok(()),
            Ok(_) | Err(Errno::EINTR) => {}
            Err(Errno::EAGAIN) => ready.clear_ready(),
            // Events were dropped: whether ours was among them, only a look can say.
            Err(Errno::ENOBUFS) => return Ok(()),
            Err(error) => return Err(error.into()),
        }
    }
}

/// A uevent is "action@devpath" and KEY=value lines, each ended by a zero byte.
fn concerns_block_devices(message: &[u8]) -> bool {
    message.split(|byte| *byte == 0).any(|line| line == b"SUBSYSTEM=block")
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

    #[test]
    fn only_block_events_wake() {
        assert!(concerns_block_devices(b"add@/devices/x\0ACTION=add\0SUBSYSTEM=block\0"));
        assert!(!concerns_block_devices(b"add@/devices/x\0SUBSYSTEM=blocked\0"));
        assert!(!concerns_block_devices(b""));
    }

    #[tokio::test]
    async fn the_kernel_lets_us_listen() {
        listen().unwrap();
    }
}
