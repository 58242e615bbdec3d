//! Bridge and taps, by rtnetlink and `/dev/net/tun` (kernel documentation, "Universal TUN/TAP device driver").

use std::{
    fs::File,
    io,
    net::IpAddr,
    os::fd::{AsRawFd, OwnedFd},
};

use futures::TryStreamExt;
use nix::{errno::Errno, net::if_::if_nametoindex};
use rtnetlink::{Handle, LinkBridge, LinkUnspec};

use super::{Config, NetworkError, addresses::mac_of};

/// Header that precedes each frame: `struct virtio_net_hdr_v1` (virtio 1.3, 5.1.6), twelve bytes.
static VNET_HEADER_BYTES: libc::c_int = 12;

/// Makes and removes interfaces.
#[derive(Debug)]
pub(super) struct Links {
    handle: Handle,
    connection: tokio::task::JoinHandle<()>,
    bridge_index: u32,
    bridge: String,
    mtu: u32,
}

impl Links {
    /// Connects to rtnetlink and makes the bridge, or adopts the one that is there.
    pub(super) async fn start(config: &Config) -> Result<Self, NetworkError> {
        let (connection, handle, _) =
            rtnetlink::new_connection().map_err(|error| NetworkError::System("open a netlink socket", error))?;
        let connection = tokio::spawn(connection);
        let mut links = Self {
            handle,
            connection,
            bridge_index: 0,
            bridge: config.bridge.clone(),
            mtu: config.mtu,
        };
        links.bridge_index = links.make_bridge(config).await?;
        Ok(links)
    }

    async fn make_bridge(&self, config: &Config) -> Result<u32, NetworkError> {
        if !self.exists(&config.bridge).await? {
            // A MAC of its own: otherwise the bridge takes the lowest of its ports' and changes it as pods come and go.
            let mac = mac_of(config.range.gateway()).to_vec();
            let message = LinkBridge::new(&config.bridge).address(mac).mtu(config.mtu).build();
            self.handle
                .link()
                .add(message)
                .execute()
                .await
                .map_err(failed("make", &config.bridge))?;
        }
        let index = index_of(&config.bridge)?;
        let gateway = IpAddr::V4(config.range.gateway());
        let address = self
            .handle
            .address()
            .add(index, gateway, config.range.prefix())
            .replace();
        address
            .execute()
            .await
            .map_err(failed("give an address to", &config.bridge))?;
        let up = LinkUnspec::new_with_index(index).mtu(config.mtu).up().build();
        self.handle
            .link()
            .set(up)
            .execute()
            .await
            .map_err(failed("bring up", &config.bridge))?;
        Ok(index)
    }

    async fn exists(&self, name: &str) -> Result<bool, NetworkError> {
        match self.handle.link().get().match_name(name).execute().try_next().await {
            Ok(found) => Ok(found.is_some()),
            Err(rtnetlink::Error::NetlinkError(message)) if message.raw_code() == -libc::ENODEV => Ok(false),
            Err(error) => Err(failed("look for", name)(error)),
        }
    }

    /// A tap on the bridge, up. It exists as long as the descriptor or a copy of it.
    pub(super) async fn add_tap(&self, name: &str) -> Result<OwnedFd, NetworkError> {
        let tap = open_tap(name).map_err(|error| NetworkError::System("open /dev/net/tun and make a tap", error))?;
        let message = LinkUnspec::new_with_index(index_of(name)?)
            .controller(self.bridge_index)
            .mtu(self.mtu)
            .up()
            .build();
        self.handle
            .link()
            .set(message)
            .execute()
            .await
            .map_err(failed("attach to the bridge", name))?;
        Ok(tap)
    }

    /// Removes the bridge.
    pub(super) async fn remove(self) -> Result<(), NetworkError> {
        let removed = self.handle.link().del(self.bridge_index).execute().await;
        removed.map_err(failed("remove", &self.bridge))
    }
}

fn failed(action: &'static str, name: &str) -> impl FnOnce(rtnetlink::Error) -> NetworkError + use<> {
    let name = name.to_owned();
    move |source| NetworkError::Link {
        action,
        name,
        source: Box::new(source),
    }
}

impl Drop for Links {
    fn drop(&mut self) {
        self.connection.abort();
    }
}

fn index_of(name: &str) -> Result<u32, NetworkError> {
    if_nametoindex(name).map_err(|error| NetworkError::System("find the interface that was just made", error.into()))
}

nix::ioctl_write_ptr_bad!(
    /// Sets the length of the header before each frame.
    tun_set_header_length,
    libc::TUNSETVNETHDRSZ,
    libc::c_int
);

fn open_tap(name: &str) -> io::Result<OwnedFd> {
    let tun = File::options().read(true).write(true).open("/dev/net/tun")?;
    let mut request = libc::ifreq {
        ifr_name: [0; libc::IFNAMSIZ],
        ifr_ifru: libc::__c_anonymous_ifr_ifru {
            ifru_flags: libc::c_short::try_from(libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR)
                .map_err(io::Error::other)?,
        },
    };
    if name.len() >= libc::IFNAMSIZ {
        return Err(Errno::ENAMETOOLONG.into());
    }
    for (place, byte) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *place = byte.cast_signed();
    }
    // SAFETY: TUNSETIFF reads and writes one ifreq, which lives through the call.
    Errno::result(unsafe { libc::ioctl(tun.as_raw_fd(), libc::TUNSETIFF, &raw mut request) })?;
    // SAFETY: TUNSETVNETHDRSZ reads one int.
    unsafe { tun_set_header_length(tun.as_raw_fd(), &raw const VNET_HEADER_BYTES)? };
    Ok(tun.into())
}
