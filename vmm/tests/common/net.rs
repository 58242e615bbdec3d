//! A tap for a test.

use std::fs::{self, File};
use std::os::fd::{AsRawFd, OwnedFd};

use nix::sched::{CloneFlags, unshare};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};

/// The tap's name.
pub const TAP: &str = "tap0";

fn ifreq(flags: i32) -> libc::ifreq {
    // SAFETY: ifreq is plain numbers.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(TAP.bytes()) {
        *to = from.cast_signed();
    }
    request.ifr_ifru.ifru_flags = u16::try_from(flags).unwrap().cast_signed();
    request
}

/// A tap that is up, in a network namespace of this thread's own.
pub fn tap() -> OwnedFd {
    unshare(CloneFlags::CLONE_NEWNET).unwrap();
    // The host's own neighbour discovery would be in the way.
    fs::write("/proc/sys/net/ipv6/conf/default/disable_ipv6", "1").unwrap();
    let tun = File::options().read(true).write(true).open("/dev/net/tun").unwrap();
    let request = ifreq(libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR);
    // SAFETY: a valid ifreq.
    let made = unsafe { libc::ioctl(tun.as_raw_fd(), libc::TUNSETIFF, &raw const request) };
    assert_eq!(made, 0);
    let any = socket(AddressFamily::Inet, SockType::Datagram, SockFlag::empty(), None).unwrap();
    let request = ifreq(libc::IFF_UP);
    // SAFETY: a valid ifreq.
    let up = unsafe { libc::ioctl(any.as_raw_fd(), libc::SIOCSIFFLAGS, &raw const request) };
    assert_eq!(up, 0);
    tun.into()
}
