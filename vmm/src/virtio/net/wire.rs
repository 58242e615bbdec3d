//! For tests: a tap in a network of its own, and the host's side of it.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};

use nix::net::if_::if_nametoindex;
use nix::sched::{CloneFlags, unshare};
use nix::sys::socket::{
    AddressFamily, LinkAddr, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrLike, bind, recv, send, socket,
};

use super::{NetResource, RateLimit, Tap};

pub const MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
const NAME: &str = "tap0";
/// IEEE 802 local experimental Ethertype 1: nobody else sends it.
const ETHERTYPE: [u8; 2] = [0x88, 0xb5];

/// A tap in a network namespace of this thread's own, and a socket on the host's side of it.
pub struct Wire {
    pub tap: Option<Tap>,
    pub host: OwnedFd,
}

fn ifreq(flags: i32) -> libc::ifreq {
    // SAFETY: ifreq is plain numbers.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(NAME.bytes()) {
        *to = from.cast_signed();
    }
    request.ifr_ifru.ifru_flags = u16::try_from(flags).unwrap().cast_signed();
    request
}

pub fn make_tap(flags: i32) -> OwnedFd {
    let tun = File::options().read(true).write(true).open("/dev/net/tun").unwrap();
    let request = ifreq(flags);
    // SAFETY: a valid ifreq.
    let made = unsafe { libc::ioctl(tun.as_raw_fd(), libc::TUNSETIFF, &raw const request) };
    assert_eq!(made, 0);
    tun.into()
}

/// None where the user may not make one.
pub fn private_network() -> Option<()> {
    if unshare(CloneFlags::CLONE_NEWNET).is_err() {
        eprintln!("left out: making a network namespace takes root");
        return None;
    }
    // The host's own neighbour discovery would be in the way.
    fs::write("/proc/sys/net/ipv6/conf/default/disable_ipv6", "1").unwrap();
    Some(())
}

pub fn wire() -> Option<Wire> {
    private_network()?;
    let fd = make_tap(libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR);
    let protocol = SockProtocol::EthAll;
    let host = socket(AddressFamily::Packet, SockType::Raw, SockFlag::empty(), protocol).unwrap();
    let request = ifreq(libc::IFF_UP);
    // SAFETY: a valid ifreq.
    let up = unsafe { libc::ioctl(host.as_raw_fd(), libc::SIOCSIFFLAGS, &raw const request) };
    assert_eq!(up, 0);
    // SAFETY: sockaddr_ll is plain numbers.
    let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    address.sll_family = u16::try_from(libc::AF_PACKET).unwrap();
    address.sll_protocol = u16::try_from(libc::ETH_P_ALL).unwrap().to_be();
    address.sll_ifindex = i32::try_from(if_nametoindex(NAME).unwrap()).unwrap();
    // SAFETY: the address is valid and as long as said.
    let address = unsafe {
        LinkAddr::from_raw(
            (&raw const address).cast(),
            Some(u32::try_from(size_of::<libc::sockaddr_ll>()).unwrap()),
        )
    };
    bind(host.as_raw_fd(), &address.unwrap()).unwrap();
    Some(Wire {
        tap: Some(Tap::from_fd(fd).unwrap()),
        host,
    })
}

pub fn limited(tap: Tap, limit: RateLimit) -> NetResource {
    NetResource::new(tap, limit, limit).unwrap()
}

impl Wire {
    pub fn resource(&mut self) -> NetResource {
        limited(self.tap.take().unwrap(), RateLimit::default())
    }

    pub fn send(&self, frame: &[u8]) {
        let flags = MsgFlags::empty();
        assert_eq!(send(self.host.as_raw_fd(), frame, flags).unwrap(), frame.len());
    }

    pub fn receive(&self) -> Vec<u8> {
        let mut frame = vec![0; 70_000];
        let len = recv(self.host.as_raw_fd(), &mut frame, MsgFlags::empty()).unwrap();
        frame.truncate(len);
        frame
    }
}

/// An Ethernet frame of `len` bytes that tells its number.
pub fn frame(number: u8, len: usize) -> Vec<u8> {
    let mut frame = vec![number; len];
    frame[..6].copy_from_slice(&MAC);
    frame[6..12].copy_from_slice(&[2, 0, 0, 0, 0, 2]);
    frame[12..14].copy_from_slice(&ETHERTYPE);
    frame
}

/// RTM_DELLINK for the tap (rtnetlink(7)).
pub fn delete_link() {
    let netlink = socket(
        AddressFamily::Netlink,
        SockType::Raw,
        SockFlag::empty(),
        SockProtocol::NetlinkRoute,
    )
    .unwrap();
    let index = if_nametoindex(NAME).unwrap();
    let mut message = Vec::new();
    message.extend(32u32.to_ne_bytes());
    message.extend(libc::RTM_DELLINK.to_ne_bytes());
    message.extend(
        u16::try_from(libc::NLM_F_REQUEST | libc::NLM_F_ACK)
            .unwrap()
            .to_ne_bytes(),
    );
    message.extend([0; 8]);
    message.extend([0; 4]);
    message.extend(index.to_ne_bytes());
    message.extend([0; 8]);
    let mut netlink = File::from(netlink);
    netlink.write_all(&message).unwrap();
    let mut answer = [0; 256];
    let len = netlink.read(&mut answer).unwrap();
    assert!(len >= 20);
    assert_eq!(answer[16..20], [0; 4], "netlink refused");
}
