//! Taps, in a network namespace of this program's own: they are gone when it is.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use nix::errno::Errno;
use nix::libc;
use nix::sched::{CloneFlags, unshare};

use crate::Error;

/// Enters a network namespace of its own. The process must have one thread.
pub fn isolate() -> Result<(), Error> {
    unshare(CloneFlags::CLONE_NEWNET).map_err(|errno| format!("no network namespace can be had: {errno}"))?;
    Ok(())
}

/// A tap as flintd hands it over.
pub fn open() -> Result<OwnedFd, Error> {
    let tun = File::options().read(true).write(true).open("/dev/net/tun");
    let tun = tun.map_err(|error| format!("/dev/net/tun cannot be opened: {error}"))?;
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    // The kernel chooses the name.
    let mut request = libc::ifreq {
        ifr_name: [0; libc::IFNAMSIZ],
        ifr_ifru: libc::__c_anonymous_ifr_ifru {
            ifru_flags: libc::c_short::try_from(flags).map_err(io::Error::other)?,
        },
    };
    // SAFETY: TUNSETIFF reads and writes one ifreq, which lives through the call.
    Errno::result(unsafe { libc::ioctl(tun.as_raw_fd(), libc::TUNSETIFF, &raw mut request) })
        .map_err(|errno| format!("a tap cannot be made: {errno}"))?;
    Ok(tun.into())
}
