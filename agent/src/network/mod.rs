//! The pods' network on one host: a bridge, an address from the host's range and a tap for each sandbox.
//!
//! ```text
//!   guest eth0 -- flint-vmm -- tap flt0a580002 --+
//!   guest eth0 -- flint-vmm -- tap flt0a580003 --+-- flint0 10.88.0.1/16 -- routing, masquerade -- the host's uplink
//! ```
//!
//! - [`addresses`]: which address is whose. Name and MAC of a tap follow from its address, so a reused address never meets
//!   a stale ARP entry.
//! - [`links`]: bridge and taps, by rtnetlink. A tap is not persistent: it goes with the last descriptor on it, the
//!   VMM's, so none outlives its sandbox whoever was killed when.
//! - [`fence`]: opens and shuts the guard for one sandbox.
//! - [`rules`]: nftables. Masquerading, and a guard on the bridge that lets a tap send from its own addresses only.
//!
//! Everything is done in the network namespace of the thread that called [`Network::start`].

pub mod addresses;
mod fence;
mod links;
mod rules;

use std::{
    io,
    net::Ipv4Addr,
    os::fd::OwnedFd,
    sync::{Arc, Mutex, PoisonError},
};

use thiserror::Error;

use self::{addresses::Addresses, fence::Fence, links::Links};
pub use self::{
    addresses::{Lease, Range},
    fence::Gate,
};

/// What the network is made of.
#[derive(Clone, Debug)]
pub struct Config {
    /// Name of the bridge, at most 15 bytes.
    pub bridge: String,
    /// The first address is the host's own, the others are the pods'.
    pub range: Range,
    /// Of bridge, taps and guests.
    pub mtu: u32,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            bridge: "flint0".into(),
            range: Range::DEFAULT,
            mtu: 1500,
        }
    }
}

/// Something about the network failed.
#[derive(Debug, Error)]
pub enum NetworkError {
    /// A range cannot be used.
    #[error("{0:?} is no usable range of pod addresses: give IPv4 in CIDR notation with a prefix of 8 to 29")]
    Range(String),
    /// All addresses are in use.
    #[error("all {0} pod addresses of this host are in use: give flintd a larger range")]
    Exhausted(u32),
    /// The address is not in the range, or has an owner.
    #[error("the pod address {0} is outside this host's range or already in use")]
    Taken(Ipv4Addr),
    /// rtnetlink refused.
    #[error("could not {action} the interface {name} (flintd needs CAP_NET_ADMIN)")]
    Link {
        /// What was tried.
        action: &'static str,
        /// On which interface.
        name: String,
        /// Why not.
        #[source]
        source: Box<rtnetlink::Error>,
    },
    /// No netlink socket, no tap device or no sysctl.
    #[error("could not {0}")]
    System(&'static str, #[source] io::Error),
    /// The kernel does not bring the bridge into service.
    #[error("the bridge {0} has a port that is up, but is not operational: see `ip -d link show {0}`")]
    NoCarrier(String),
    /// nftables does not take or give back an address.
    #[error(
        "{1}: could not {0}: is flintd's table there? See `nft list table bridge flint`; a restart of flintd makes it anew"
    )]
    Fence(&'static str, Ipv4Addr, #[source] io::Error),
    /// The nft program is missing.
    #[error("nft cannot be run: install the package nftables")]
    NoNft(#[source] io::Error),
    /// nft refused.
    #[error("nft could not {action}: {output}")]
    Nft {
        /// What was tried.
        action: &'static str,
        /// What it said.
        output: String,
    },
}

/// A sandbox that still runs when a network is started.
#[derive(Clone, Copy, Debug)]
pub struct Survivor {
    /// Its address.
    pub address: Ipv4Addr,
    /// Whether the guard lets it send; its lease comes back in any case.
    pub may_send: bool,
}

/// The network of this host's pods.
#[derive(Debug)]
pub struct Network {
    config: Config,
    links: Links,
    fence: Fence,
    addresses: Arc<Mutex<Addresses>>,
}

impl Network {
    /// Makes the bridge and the rules, or takes over those that are there. `survivors` are sandboxes that still
    /// run: their leases come back, and the traffic of those that may send is never interrupted. One that is not in the range, or comes
    /// twice, gets no lease and may send no more. After an error there is nothing that was not there before.
    pub async fn start(config: Config, survivors: &[Survivor]) -> Result<(Self, Vec<Lease>), NetworkError> {
        let addresses = Arc::new(Mutex::new(Addresses::new(config.range)));
        let leases: Vec<_> = survivors
            .iter()
            .filter_map(|survivor| {
                Lease::reserve(&addresses, survivor.address)
                    .ok()
                    .map(|lease| (lease, survivor.may_send))
            })
            .collect();
        let senders: Vec<_> = leases
            .iter()
            .filter(|(_, may_send)| *may_send)
            .map(|(lease, _)| lease.address())
            .collect();
        let leases: Vec<_> = leases.into_iter().map(|(lease, _)| lease).collect();
        let links = Links::start(&config).await?;
        let connect = || Fence::connect().map_err(|error| NetworkError::System("open a netlink socket", error));
        let fence = match open_ways(&config, &senders).await.and_then(|()| connect()) {
            Ok(fence) => fence,
            Err(error) => {
                links.undo().await;
                return Err(error);
            }
        };
        let network = Self {
            config,
            links,
            fence,
            addresses,
        };
        Ok((network, leases))
    }

    /// What it was started with.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// The host's address on the bridge: the pods' gateway.
    pub fn gateway(&self) -> Ipv4Addr {
        self.config.range.gateway()
    }

    /// Takes a free address. In memory only: cheap.
    pub fn lease(&self) -> Result<Lease, NetworkError> {
        Lease::take(&self.addresses)
    }

    /// How many addresses are in use.
    pub fn leased(&self) -> usize {
        self.addresses.lock().unwrap_or_else(PoisonError::into_inner).used()
    }

    /// Makes the tap of a leased address: on the bridge, guarded, and passing frames from now on. Closing the last copy of the descriptor removes it.
    pub async fn plug(&self, gate: &Gate) -> Result<OwnedFd, NetworkError> {
        // The guard first: from its first moment the tap sends nothing but what it may.
        self.open(gate)?;
        self.plug_fenced(gate.address()).await
    }

    /// Makes the tap of a leased address behind a closed fence: the guard drops whatever it sends until [`open`](Network::open).
    pub async fn plug_fenced(&self, address: Ipv4Addr) -> Result<OwnedFd, NetworkError> {
        self.links.add_tap(&addresses::tap_name_of(address)).await
    }

    /// Lets a sandbox send, from its own address, unless it has been unplugged.
    pub fn open(&self, gate: &Gate) -> Result<(), NetworkError> {
        let opened = self.fence.open(gate);
        opened.map_err(|error| NetworkError::Fence("let it send", gate.address(), error))
    }

    /// Lets a sandbox send no more, now and later. The tap itself goes with its descriptors. May be repeated.
    pub fn unplug(&self, gate: &Gate) -> Result<(), NetworkError> {
        let shut = self.fence.shut(gate);
        shut.map_err(|error| NetworkError::Fence("stop it from sending", gate.address(), error))
    }

    /// Removes rules and bridge. Only when no sandbox is left.
    pub async fn remove(self) -> Result<(), NetworkError> {
        rules::remove().await?;
        self.links.remove().await
    }
}

/// Routing and rules.
async fn open_ways(config: &Config, senders: &[Ipv4Addr]) -> Result<(), NetworkError> {
    std::fs::write("/proc/sys/net/ipv4/ip_forward", "1")
        .map_err(|error| NetworkError::System("switch on net.ipv4.ip_forward", error))?;
    rules::apply(config, senders).await
}

#[cfg(test)]
mod tests;
