//! Which pod has which address. Kept in memory only: what must survive flintd is in the sandboxes' intent files.

use std::{
    collections::HashSet,
    fmt,
    net::Ipv4Addr,
    str::FromStr,
    sync::{Arc, Mutex, PoisonError},
};

use super::{NetworkError, fence::Gate};

/// A range of IPv4 addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    base: u32,
    prefix: u8,
}

impl Range {
    /// 10.88.0.0/16.
    pub const DEFAULT: Self = Self {
        base: 0x0a58_0000,
        prefix: 16,
    };

    /// Prefix length.
    pub fn prefix(self) -> u8 {
        self.prefix
    }

    /// The first usable address: the host's own.
    pub fn gateway(self) -> Ipv4Addr {
        Ipv4Addr::from(self.base + 1)
    }

    /// How many pods it has room for: all but network, gateway and broadcast address.
    pub fn capacity(self) -> u32 {
        (1 << (32 - self.prefix)) - 3
    }

    /// The address of the pod at `index`.
    fn nth(self, index: u32) -> Ipv4Addr {
        Ipv4Addr::from(self.base + 2 + index)
    }

    fn has_pod(self, address: Ipv4Addr) -> bool {
        u32::from(address)
            .checked_sub(self.base + 2)
            .is_some_and(|index| index < self.capacity())
    }
}

impl FromStr for Range {
    type Err = NetworkError;

    fn from_str(text: &str) -> Result<Self, NetworkError> {
        let wrong = || NetworkError::Range(text.to_owned());
        let (address, prefix) = text.split_once('/').ok_or_else(wrong)?;
        let address: Ipv4Addr = address.parse().map_err(|_| wrong())?;
        let prefix: u8 = prefix.parse().map_err(|_| wrong())?;
        let base = u32::from(address);
        if !(8..=29).contains(&prefix) || base & (u32::MAX >> prefix) != 0 {
            return Err(wrong());
        }
        Ok(Self { base, prefix })
    }
}

impl fmt::Display for Range {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", Ipv4Addr::from(self.base), self.prefix)
    }
}

/// MAC of the interface with an address: locally administered, unicast.
pub fn mac_of(address: Ipv4Addr) -> [u8; 6] {
    let [a, b, c, d] = address.octets();
    [0x02, 0x00, a, b, c, d]
}

/// Name of the tap of an address. At most 15 bytes (IFNAMSIZ); the guard's rules know all of them by their first letters.
pub fn tap_name_of(address: Ipv4Addr) -> String {
    format!("{TAP_PREFIX}{:08x}", u32::from(address))
}

/// What every tap's name begins with.
pub(super) const TAP_PREFIX: &str = "flt";

/// The addresses in use.
#[derive(Debug)]
pub(super) struct Addresses {
    range: Range,
    used: HashSet<Ipv4Addr>,
    /// Where to look next: a freed address is taken again as late as possible.
    next: u32,
}

impl Addresses {
    pub(super) fn new(range: Range) -> Self {
        Self {
            range,
            used: HashSet::new(),
            next: 0,
        }
    }

    pub(super) fn used(&self) -> usize {
        self.used.len()
    }

    fn take(&mut self) -> Result<Ipv4Addr, NetworkError> {
        let capacity = self.range.capacity();
        for step in 0..capacity {
            let index = (self.next + step) % capacity;
            let address = self.range.nth(index);
            if self.used.insert(address) {
                self.next = (index + 1) % capacity;
                return Ok(address);
            }
        }
        Err(NetworkError::Exhausted(capacity))
    }

    fn reserve(&mut self, address: Ipv4Addr) -> Result<(), NetworkError> {
        if !self.range.has_pod(address) || !self.used.insert(address) {
            return Err(NetworkError::Taken(address));
        }
        Ok(())
    }
}

/// An address that nobody else gets while this lives.
#[derive(Debug)]
pub struct Lease {
    address: Ipv4Addr,
    gate: Arc<Gate>,
    addresses: Arc<Mutex<Addresses>>,
}

impl Lease {
    pub(super) fn take(addresses: &Arc<Mutex<Addresses>>) -> Result<Self, NetworkError> {
        let address = addresses.lock().unwrap_or_else(PoisonError::into_inner).take()?;
        Ok(Self::of(address, addresses))
    }

    pub(super) fn reserve(addresses: &Arc<Mutex<Addresses>>, address: Ipv4Addr) -> Result<Self, NetworkError> {
        addresses
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .reserve(address)?;
        Ok(Self::of(address, addresses))
    }

    fn of(address: Ipv4Addr, addresses: &Arc<Mutex<Addresses>>) -> Self {
        Self {
            address,
            gate: Arc::new(Gate::new(address)),
            addresses: Arc::clone(addresses),
        }
    }

    /// The pod's address.
    pub fn address(&self) -> Ipv4Addr {
        self.address
    }

    /// What lets the sandbox send: for whoever starts it, while the lease is held by whoever cleans up.
    pub fn gate(&self) -> &Arc<Gate> {
        &self.gate
    }

    /// The guest's MAC.
    pub fn mac(&self) -> [u8; 6] {
        mac_of(self.address)
    }

    /// Name of the tap on the host.
    pub fn tap_name(&self) -> String {
        tap_name_of(self.address)
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.addresses
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .used
            .remove(&self.address);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pool(range: &str) -> Arc<Mutex<Addresses>> {
        Arc::new(Mutex::new(Addresses::new(range.parse().unwrap())))
    }

    #[test]
    fn ranges_that_cannot_be_served_are_refused() {
        for text in [
            "10.88.0.0",
            "10.88.0.1/16",
            "10.0.0.0/7",
            "10.0.0.0/30",
            "10.0.0.0/33",
            "fd00::/64",
            "x/16",
        ] {
            assert!(text.parse::<Range>().is_err(), "{text}");
        }
        assert_eq!("10.88.0.0/16".parse::<Range>().unwrap(), Range::DEFAULT);
        assert_eq!(Range::DEFAULT.to_string(), "10.88.0.0/16");
    }

    #[test]
    fn each_pod_gets_another_address_until_none_is_left() {
        let pool = pool("192.168.7.0/29");
        let leases: Vec<_> = (0..5).map(|_| Lease::take(&pool).unwrap()).collect();
        let addresses: Vec<_> = leases.iter().map(|lease| lease.address().octets()[3]).collect();
        assert_eq!(
            addresses,
            [2, 3, 4, 5, 6],
            "neither network, gateway nor broadcast address"
        );
        assert!(matches!(Lease::take(&pool), Err(NetworkError::Exhausted(5))));
    }

    #[test]
    fn a_freed_address_is_taken_again_last() {
        let pool = pool("192.168.7.0/29");
        drop(Lease::take(&pool).unwrap());
        let next = Lease::take(&pool).unwrap();
        assert_eq!(next.address(), Ipv4Addr::new(192, 168, 7, 3));
        let held: Vec<_> = (0..4).map(|_| Lease::take(&pool).unwrap()).collect();
        assert_eq!(held[3].address(), Ipv4Addr::new(192, 168, 7, 2));
    }

    #[test]
    fn a_survivor_keeps_its_address() {
        let pool = pool("192.168.7.0/29");
        let survivor = Lease::reserve(&pool, Ipv4Addr::new(192, 168, 7, 2)).unwrap();
        assert!(matches!(
            Lease::reserve(&pool, survivor.address()),
            Err(NetworkError::Taken(_))
        ));
        assert!(matches!(
            Lease::reserve(&pool, Ipv4Addr::new(192, 168, 7, 1)),
            Err(NetworkError::Taken(_))
        ));
        assert_eq!(Lease::take(&pool).unwrap().address(), Ipv4Addr::new(192, 168, 7, 3));
        assert_eq!(survivor.tap_name(), "fltc0a80702");
        assert_eq!(survivor.mac(), [2, 0, 192, 168, 7, 2]);
    }
}
