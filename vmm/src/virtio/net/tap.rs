//! A tap as the host hands it over: each read and each write is one frame behind a virtio-net header.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};

use libc::{c_int, c_uint, c_ulong};
use virtio_bindings::virtio_net as net;

use super::header::HEADER_BYTES;
use crate::virtio::device::DeviceError;
use crate::virtio::feature;

/// A tap interface's queue.
#[derive(Debug)]
pub struct Tap(File);

impl Tap {
    /// Checks what came and makes it ready: it does not block, and its header is the one of virtio 1.
    ///
    /// # Errors
    /// When it is no tap, or was made with packet information or without the virtio-net header.
    pub fn from_fd(fd: OwnedFd) -> Result<Self, DeviceError> {
        let flags = interface_flags(&fd).map_err(|_| DeviceError::Refused("the descriptor is no tap".to_owned()))?;
        if flags & libc::IFF_TAP == 0 || flags & libc::IFF_VNET_HDR == 0 || flags & libc::IFF_NO_PI == 0 {
            return Err(DeviceError::Refused(format!(
                "the tap's flags are {flags:#x}: it must be made with IFF_TAP | IFF_NO_PI | IFF_VNET_HDR"
            )));
        }
        // HEADER_BYTES is 12.
        #[allow(clippy::cast_possible_truncation, clippy::cast_possible_wrap)]
        let mut header = HEADER_BYTES as c_int;
        // SAFETY: the kernel reads one int through the pointer, which is valid.
        check(unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNSETVNETHDRSZ, &raw mut header) })
            .map_err(DeviceError::host("set the size of the tap's header"))?;
        let mut on: c_int = 1;
        // SAFETY: as above.
        check(unsafe { libc::ioctl(fd.as_raw_fd(), libc::FIONBIO, &raw mut on) })
            .map_err(DeviceError::host("make the tap non-blocking"))?;
        let tap = Self(File::from(fd));
        tap.offload(0)?;
        Ok(tap)
    }

    /// Lets the host hand over what a driver with these features takes: checksums left undone, segments left whole.
    ///
    /// # Errors
    /// When the host refuses.
    pub(super) fn offload(&self, features: u64) -> Result<(), DeviceError> {
        let offloads = [
            (net::VIRTIO_NET_F_GUEST_CSUM, libc::TUN_F_CSUM),
            (net::VIRTIO_NET_F_GUEST_TSO4, libc::TUN_F_TSO4),
            (net::VIRTIO_NET_F_GUEST_TSO6, libc::TUN_F_TSO6),
        ];
        // Without the checksum there is no segmentation either (virtio 1.3, 5.1.3.1).
        let flags: c_uint = if features & feature(net::VIRTIO_NET_F_GUEST_CSUM) == 0 {
            0
        } else {
            let wanted = offloads.iter().filter(|(bit, _)| features & feature(*bit) != 0);
            wanted.map(|(_, flag)| flag).sum()
        };
        // SAFETY: this request's argument is a number, not an address.
        check(unsafe { libc::ioctl(self.0.as_raw_fd(), libc::TUNSETOFFLOAD, c_ulong::from(flags)) })
            .map_err(DeviceError::host("set the tap's offloads"))
    }

    /// Takes the next frame. `None`: there is none now.
    pub(super) fn read(&self, frame: &mut [u8]) -> io::Result<Option<usize>> {
        without_blocking(|| (&self.0).read(frame))
    }

    /// Sends a frame. `None`: the host takes none now.
    pub(super) fn write(&self, frame: &[u8]) -> io::Result<Option<usize>> {
        without_blocking(|| (&self.0).write(frame))
    }
}

impl AsRawFd for Tap {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

fn interface_flags(fd: &OwnedFd) -> io::Result<c_int> {
    // SAFETY: ifreq is plain numbers, for which zero is a value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    // SAFETY: the kernel writes one ifreq through the pointer, which is valid and as large as it expects.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNGETIFF, &raw mut request) })?;
    // SAFETY: TUNGETIFF fills the flags.
    let flags = unsafe { request.ifr_ifru.ifru_flags };
    // Of 16 bits, of which the sign has no meaning.
    Ok(c_int::from(flags) & 0xffff)
}

fn check(result: c_int) -> io::Result<()> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

fn without_blocking(mut call: impl FnMut() -> io::Result<usize>) -> io::Result<Option<usize>> {
    loop {
        match call() {
            Ok(count) => return Ok(Some(count)),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}
