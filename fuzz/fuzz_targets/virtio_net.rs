//! A network interface under a driver that does whatever it likes. With root there is a tap behind it, in a network
//! namespace of its own; without, the slot stays empty.
#![no_main]

use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::OnceLock;

use flint_fuzz::virtio::{Script, run};
use flint_vmm::virtio::Device;
use flint_vmm::virtio::net::{Net, NetResource, NetSlot, Tap};
use flint_vmm::virtio::rate_limit::RateLimit;
use libfuzzer_sys::fuzz_target;

static TAP: OnceLock<Option<OwnedFd>> = OnceLock::new();

/// A tap that nobody else sees, made once.
fn tap() -> Option<OwnedFd> {
    // SAFETY: unshare takes no memory.
    if unsafe { libc::unshare(libc::CLONE_NEWNET) } != 0 {
        return None;
    }
    let tun = File::options().read(true).write(true).open("/dev/net/tun").ok()?;
    // SAFETY: all zeros are a valid ifreq.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    request.ifr_name[0] = b't'.cast_signed();
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    request.ifr_ifru.ifru_flags = libc::c_short::try_from(flags).ok()?;
    // SAFETY: the kernel reads an ifreq, which is valid.
    let made = unsafe { libc::ioctl(tun.as_raw_fd(), libc::TUNSETIFF, &raw const request) };
    (made == 0).then(|| tun.into())
}

fuzz_target!(|script: Script| {
    let mut device = Net::new(&NetSlot {
        mac: [2, 0, 0, 0, 0, 1],
    })
    .expect("descriptors");
    if let Some(tap) = TAP.get_or_init(tap) {
        let tap = Tap::from_fd(tap.try_clone().expect("descriptors")).expect("a good tap");
        let limit = RateLimit::default;
        let resource = NetResource::new(tap, limit(), limit()).expect("descriptors");
        device.bind(resource).expect("an empty slot");
    }
    run(&mut device, &script, |_| ());
});
