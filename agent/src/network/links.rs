//! Bridge and taps, by rtnetlink and `/dev/net/tun` (kernel documentation, "Universal TUN/TAP device driver").
//!
//! When a tap passes frames: its port forwards, and its own queue works, as soon as the request that attaches it and brings
//! it up is answered. The bridge's own queue may not. A bridge without a forwarding port has no carrier, and Linux makes the
//! queue of an interface without carrier drop everything. The first port brings the carrier back at once, but it is a worker
//! that puts the queue back, some time later (`linkwatch_do_dev` in net/core/link_watch.c). Until then the host sends
//! nothing: the answer to a guest's first ARP request would be lost, and guests ask again after a second. That worker ends
//! by telling everybody that the bridge is operational, and [`Links::add_tap`] waits for this. Only the first tap of a host
//! without pods ever has to wait, for some tenths of a millisecond.

use std::{
    fs::File,
    io,
    net::IpAddr,
    os::fd::{AsRawFd, OwnedFd},
    time::Duration,
};

use futures::{StreamExt, TryStreamExt};
use nix::{errno::Errno, net::if_::if_nametoindex};
use rtnetlink::{
    Handle, LinkBridge, LinkUnspec, MulticastGroup,
    packet_core::NetlinkPayload,
    packet_route::{
        AddressFamily, RouteNetlinkMessage,
        address::AddressAttribute,
        link::{LinkAttribute, LinkMessage, State},
    },
};
use tokio_util::task::AbortOnDropHandle;

use super::{Config, NetworkError, addresses::mac_of};

/// How long the bridge may take to become operational. The kernel's worker is never this late.
const CARRIER_TIMEOUT: Duration = Duration::from_secs(10);

/// Header that precedes each frame: `struct virtio_net_hdr_v1` (virtio 1.3, 5.1.6), twelve bytes.
static VNET_HEADER_BYTES: libc::c_int = 12;

/// Makes and removes interfaces.
#[derive(Debug)]
pub(super) struct Links {
    handle: Handle,
    _connection: AbortOnDropHandle<()>,
    bridge_index: u32,
    bridge: String,
    /// Whether this flintd made the bridge.
    made: bool,
    mtu: u32,
}

impl Links {
    /// Connects to rtnetlink and makes the bridge, or adopts the one that is there. After an error there is no new bridge.
    pub(super) async fn start(config: &Config) -> Result<Self, NetworkError> {
        let (connection, handle, _) =
            rtnetlink::new_connection().map_err(|error| NetworkError::System("open a netlink socket", error))?;
        let mut links = Self {
            handle,
            _connection: AbortOnDropHandle::new(tokio::spawn(connection)),
            bridge_index: 0,
            bridge: config.bridge.clone(),
            made: false,
            mtu: config.mtu,
        };
        if !links.exists(&config.bridge).await? {
            links.make_bridge(config).await?;
            links.made = true;
        }
        links.bridge_index = index_of(&config.bridge)?;
        match links.set_up_bridge(config).await {
            Ok(()) => Ok(links),
            Err(error) => {
                links.undo().await;
                Err(error)
            }
        }
    }

    /// Takes back what [`start`](Links::start) did, as far as it did it.
    pub(super) async fn undo(self) {
        if self.made
            && let Err(error) = self.remove().await
        {
            tracing::warn!(%error, "the bridge of a network that could not be set up is still there");
        }
    }

    async fn make_bridge(&self, config: &Config) -> Result<(), NetworkError> {
        // A MAC of its own: otherwise the bridge takes the lowest of its ports' and changes it as pods come and go.
        let mac = mac_of(config.range.gateway()).to_vec();
        let message = LinkBridge::new(&config.bridge).address(mac).mtu(config.mtu).build();
        let made = self.handle.link().add(message).execute().await;
        made.map_err(failed("make", &config.bridge))
    }

    /// Gives the bridge the range's first address as its only one, and brings it up.
    async fn set_up_bridge(&self, config: &Config) -> Result<(), NetworkError> {
        let gateway = IpAddr::V4(config.range.gateway());
        self.remove_addresses_but(gateway, config).await?;
        let address = self
            .handle
            .address()
            .add(self.bridge_index, gateway, config.range.prefix())
            .replace();
        address
            .execute()
            .await
            .map_err(failed("give an address to", &config.bridge))?;
        let up = LinkUnspec::new_with_index(self.bridge_index)
            .mtu(config.mtu)
            .up()
            .build();
        let set = self.handle.link().set(up).execute().await;
        set.map_err(failed("bring up", &config.bridge))
    }

    /// An earlier flintd may have had another range.
    async fn remove_addresses_but(&self, wanted: IpAddr, config: &Config) -> Result<(), NetworkError> {
        let addresses = self.handle.address().get().set_link_index_filter(self.bridge_index);
        let addresses: Vec<_> = addresses
            .execute()
            .try_collect()
            .await
            .map_err(failed("list the addresses of", &config.bridge))?;
        for message in addresses {
            let is_wanted = message.header.prefix_len == config.range.prefix()
                && message.attributes.contains(&AddressAttribute::Local(wanted));
            if message.header.family != AddressFamily::Inet || is_wanted {
                continue;
            }
            let removed = self.handle.address().del(message).execute().await;
            removed.map_err(failed("remove an old address of", &config.bridge))?;
        }
        Ok(())
    }

    async fn exists(&self, name: &str) -> Result<bool, NetworkError> {
        match self.handle.link().get().match_name(name).execute().try_next().await {
            Ok(found) => Ok(found.is_some()),
            Err(rtnetlink::Error::NetlinkError(message)) if message.raw_code() == -libc::ENODEV => Ok(false),
            Err(error) => Err(failed("look for", name)(error)),
        }
    }

    /// A tap on the bridge, up and passing frames. It exists as long as the descriptor or a copy of it.
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
        self.wait_operational().await?;
        Ok(tap)
    }

    /// Waits until the bridge sends, which it will: it has a port that is up. See the module's text.
    async fn wait_operational(&self) -> Result<(), NetworkError> {
        if self.is_operational().await? {
            return Ok(());
        }
        let (connection, _, mut messages) = rtnetlink::new_multicast_connection(&[MulticastGroup::Link])
            .map_err(|error| NetworkError::System("listen for changes of interfaces", error))?;
        let _connection = AbortOnDropHandle::new(tokio::spawn(connection));
        // Once more, now that no change can be missed.
        if self.is_operational().await? {
            return Ok(());
        }
        let told = async {
            while let Some((message, _)) = messages.next().await {
                if let NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewLink(link)) = message.payload
                    && link.header.index == self.bridge_index
                    && operational(&link)
                {
                    return true;
                }
            }
            false
        };
        match tokio::time::timeout(CARRIER_TIMEOUT, told).await {
            Ok(true) => Ok(()),
            _ => Err(NetworkError::NoCarrier(self.bridge.clone())),
        }
    }

    async fn is_operational(&self) -> Result<bool, NetworkError> {
        let link = self.handle.link().get().match_index(self.bridge_index).execute();
        let mut link = std::pin::pin!(link);
        let link = link.try_next().await.map_err(failed("ask about", &self.bridge))?;
        Ok(link.is_some_and(|link| operational(&link)))
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

/// Whether the interface sends. `IF_OPER_UP` is set and cleared by the same worker that puts the queue back and takes it away.
fn operational(link: &LinkMessage) -> bool {
    link.attributes.contains(&LinkAttribute::OperState(State::Up))
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
