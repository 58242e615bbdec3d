//! Network interfaces, by rtnetlink: found by MAC, named, addressed, brought up, routed.
//!
//! An interface may come from a template, whose address, routes and neighbours it still has, and whose MAC its driver read: it is
//! taken down first, which ends its routes and neighbours, and loses every address that is not this machine's.

use std::net::IpAddr;

use flint_api::guest::Interface;
use futures::TryStreamExt;
use rtnetlink::{
    Handle, LinkUnspec, RouteMessageBuilder,
    packet_route::{
        address::{AddressAttribute, AddressHeaderFlags, AddressMessage},
        link::{LinkAttribute, LinkMessage},
    },
};

use super::IdentityError;

/// Linux' IFNAMSIZ, with its final zero.
const MAX_NAME: usize = 15;
/// RFC 791's and RFC 8200's bounds are both within it; Linux' virtio-net accepts 68 to 65535.
const MTU: std::ops::RangeInclusive<u32> = 68..=65_535;

/// Why the kernel did not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// The netlink socket.
    #[error("opening a netlink socket")]
    Socket(#[source] std::io::Error),
    /// The kernel said no.
    #[error(transparent)]
    Netlink(#[from] rtnetlink::Error),
    /// No device has the MAC.
    #[error("no network device has the address {mac}; the machine has {present}")]
    Absent { mac: String, present: String },
}

/// One interface, checked.
#[derive(Debug)]
pub struct Plan {
    mac: Vec<u8>,
    /// Empty: the machine is no clone.
    template_mac: Vec<u8>,
    name: String,
    addresses: Vec<(IpAddr, u8)>,
    gateways: Vec<IpAddr>,
    mtu: Option<u32>,
}

impl Plan {
    /// Its addresses without their prefix.
    pub fn addresses(&self) -> impl Iterator<Item = IpAddr> {
        self.addresses.iter().map(|(address, _)| *address)
    }

    /// Whether the interface was another machine's.
    pub fn is_of_clone(&self) -> bool {
        !self.template_mac.is_empty()
    }

    fn has(&self, message: &AddressMessage) -> bool {
        let address = message.attributes.iter().find_map(|attribute| match attribute {
            AddressAttribute::Address(address) => Some((*address, message.header.prefix_len)),
            _ => None,
        });
        address.is_some_and(|address| self.addresses.contains(&address))
    }

    fn error(&self, step: impl Into<String>) -> impl FnOnce(LinkError) -> IdentityError {
        let (interface, step) = (self.name.clone(), step.into());
        move |source| IdentityError::Network {
            interface,
            step,
            source,
        }
    }
}

/// Checks what the request says before anything is changed.
pub fn parse(interfaces: &[Interface]) -> Result<Vec<Plan>, IdentityError> {
    interfaces
        .iter()
        .enumerate()
        .map(|(index, interface)| parse_one(index, interface))
        .collect()
}

fn parse_one(index: usize, interface: &Interface) -> Result<Plan, IdentityError> {
    let invalid =
        |field: &str, problem: String| IdentityError::invalid(format!("interfaces[{index}].{field}"), problem);
    if interface.mac.len() != 6 {
        return Err(invalid(
            "mac",
            format!("{} bytes; an Ethernet address has 6", interface.mac.len()),
        ));
    }
    if !matches!(interface.template_mac.len(), 0 | 6) {
        let length = interface.template_mac.len();
        return Err(invalid(
            "template_mac",
            format!("{length} bytes; an Ethernet address has 6"),
        ));
    }
    let name = &interface.name;
    let allowed = |c: char| c.is_ascii_graphic() && c != '/' && c != ':';
    if name.is_empty() || name.len() > MAX_NAME || name == "." || name == ".." || !name.chars().all(allowed) {
        return Err(invalid(
            "name",
            format!("{name:?} is not an interface name of 1 to {MAX_NAME} characters"),
        ));
    }
    let mtu = (interface.mtu != 0).then_some(interface.mtu);
    if let Some(mtu) = mtu.filter(|mtu| !MTU.contains(mtu)) {
        return Err(invalid("mtu", format!("{mtu} is outside {MTU:?}")));
    }
    let mut addresses = Vec::with_capacity(interface.addresses.len());
    for (at, text) in interface.addresses.iter().enumerate() {
        let parsed = parse_cidr(text);
        addresses.push(
            parsed.ok_or_else(|| invalid(&format!("addresses[{at}]"), format!("{text:?} is not address/prefix")))?,
        );
    }
    let mut gateways = Vec::with_capacity(interface.gateways.len());
    for (at, text) in interface.gateways.iter().enumerate() {
        let field = format!("gateways[{at}]");
        let gateway: IpAddr = text
            .parse()
            .map_err(|_| invalid(&field, format!("{text:?} is not an IP address")))?;
        if gateways
            .iter()
            .any(|other: &IpAddr| other.is_ipv4() == gateway.is_ipv4())
        {
            return Err(invalid(&field, "is the second gateway of its family".to_owned()));
        }
        gateways.push(gateway);
    }
    Ok(Plan {
        template_mac: interface.template_mac.clone(),
        mac: interface.mac.clone(),
        name: name.clone(),
        addresses,
        gateways,
        mtu,
    })
}

fn parse_cidr(text: &str) -> Option<(IpAddr, u8)> {
    let (address, prefix) = text.split_once('/')?;
    let (address, prefix): (IpAddr, u8) = (address.parse().ok()?, prefix.parse().ok()?);
    let longest = if address.is_ipv4() { 32 } else { 128 };
    (prefix <= longest).then_some((address, prefix))
}

/// Brings `lo` up; done once at start, it is nobody's identity.
pub async fn bring_up_loopback() -> Result<(), LinkError> {
    with_netlink(async |handle| {
        let mut links = handle.link().get().match_name("lo".to_owned()).execute();
        if let Some(link) = links.try_next().await? {
            handle
                .link()
                .set(LinkUnspec::new_with_index(link.header.index).up().build())
                .execute()
                .await?;
        }
        Ok(())
    })
    .await
}

/// An interface that was found and is down.
pub struct Link<'a> {
    index: u32,
    plan: &'a Plan,
}

/// Finds the interfaces, and ends what they were before.
pub async fn take_down(plans: &[Plan]) -> Result<Vec<Link<'_>>, IdentityError> {
    let mut links = Vec::with_capacity(plans.len());
    for plan in plans {
        let index = with_netlink(async |handle| find(handle, plan).await)
            .await
            .map_err(plan.error("finding it"))?;
        with_netlink(async |handle| reset(handle, index, plan).await)
            .await
            .map_err(plan.error("ending what it was before"))?;
        links.push(Link { index, plan });
    }
    Ok(links)
}

/// Does what the plans say.
pub async fn configure(links: &[Link<'_>]) -> Result<(), IdentityError> {
    for link in links {
        configure_one(link).await?;
    }
    Ok(())
}

async fn configure_one(&Link { index, plan }: &Link<'_>) -> Result<(), IdentityError> {
    let mut rename = LinkUnspec::new_with_index(index)
        .name(plan.name.clone())
        .address(plan.mac.clone());
    if let Some(mtu) = plan.mtu {
        rename = rename.mtu(mtu);
    }
    with_netlink(async |handle| Ok(handle.link().set(rename.build()).execute().await?))
        .await
        .map_err(plan.error("naming it"))?;
    for (address, prefix) in &plan.addresses {
        with_netlink(async |handle| {
            let mut add = handle.address().add(index, *address, *prefix).replace();
            // The host gave this address to this machine alone: no time is spent on asking whether another has it
            // (RFC 4862, 5.4), and the address can be used at once.
            add.message_mut().header.flags |= AddressHeaderFlags::Nodad;
            Ok(add.execute().await?)
        })
        .await
        .map_err(plan.error(format!("adding address {address}/{prefix}")))?;
    }
    with_netlink(async |handle| {
        Ok(handle
            .link()
            .set(LinkUnspec::new_with_index(index).up().build())
            .execute()
            .await?)
    })
    .await
    .map_err(plan.error("bringing it up"))?;
    for gateway in &plan.gateways {
        // On-link: the gateway need not be inside an address's prefix (a /32 for each pod).
        let route = match gateway {
            IpAddr::V4(address) => RouteMessageBuilder::<std::net::Ipv4Addr>::new()
                .gateway(*address)
                .output_interface(index)
                .onlink()
                .build(),
            IpAddr::V6(address) => RouteMessageBuilder::<std::net::Ipv6Addr>::new()
                .gateway(*address)
                .output_interface(index)
                .onlink()
                .build(),
        };
        with_netlink(async |handle| Ok(handle.route().add(route).replace().execute().await?))
            .await
            .map_err(plan.error(format!("adding the default route by {gateway}")))?;
    }
    Ok(())
}

/// The device with the plan's MAC, or else the one that had the template's.
async fn find(handle: &Handle, plan: &Plan) -> Result<u32, LinkError> {
    let mut present = Vec::new();
    let mut links = handle.link().get().execute();
    while let Some(link) = links.try_next().await? {
        if let Some(address) = hardware_address(&link) {
            present.push((address.to_vec(), link.header.index));
        }
    }
    choose(&present, plan).ok_or_else(|| LinkError::Absent {
        mac: format_mac(&plan.mac),
        present: present
            .iter()
            .map(|(mac, _)| format_mac(mac))
            .collect::<Vec<_>>()
            .join(", "),
    })
}

fn choose(present: &[(Vec<u8>, u32)], plan: &Plan) -> Option<u32> {
    let with = |mac: &[u8]| present.iter().find(|(address, _)| address == mac);
    let found = with(&plan.mac).or_else(|| with(&plan.template_mac))?;
    Some(found.1)
}

/// Takes a link down, and takes away the addresses that are not the plan's. A link that was never up has none.
async fn reset(handle: &Handle, index: u32, plan: &Plan) -> Result<(), LinkError> {
    let down = LinkUnspec::new_with_index(index).down().build();
    handle.link().set(down).execute().await?;
    let addresses: Vec<AddressMessage> = handle
        .address()
        .get()
        .set_link_index_filter(index)
        .execute()
        .try_collect()
        .await?;
    for message in addresses {
        if !plan.has(&message) {
            handle.address().del(message).execute().await?;
        }
    }
    Ok(())
}

fn hardware_address(link: &LinkMessage) -> Option<&[u8]> {
    link.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::Address(address) => Some(address.as_slice()),
        _ => None,
    })
}

fn format_mac(mac: &[u8]) -> String {
    mac.iter()
        .map(|byte| format!("{byte:02x}"))
        .collect::<Vec<_>>()
        .join(":")
}

/// Runs `work` with a netlink connection that is gone afterwards: identity is adopted once, and an idle connection is memory.
async fn with_netlink<T>(work: impl AsyncFnOnce(&Handle) -> Result<T, LinkError>) -> Result<T, LinkError> {
    let (connection, handle, _) = rtnetlink::new_connection().map_err(LinkError::Socket)?;
    tokio::select! {
        // Serving the connection ends only when its handle is dropped, which the work borrows.
        () = connection => Err(LinkError::Socket(std::io::ErrorKind::ConnectionAborted.into())),
        result = work(&handle) => result,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn interface() -> Interface {
        Interface {
            mac: vec![2, 0, 0, 0, 0, 1],
            name: "eth0".into(),
            addresses: vec!["10.88.0.5/16".into(), "fd00::5/64".into()],
            gateways: vec!["10.88.0.1".into(), "fd00::1".into()],
            mtu: 1500,
            template_mac: vec![],
        }
    }

    #[test]
    fn a_dual_stack_interface_is_understood() {
        let plans = parse(&[interface()]).unwrap();
        assert_eq!(plans[0].addresses().count(), 2);
        assert_eq!(plans[0].gateways.len(), 2);
    }

    #[test]
    fn each_bad_field_is_named() {
        let bad = |change: fn(&mut Interface)| {
            let mut interface = interface();
            change(&mut interface);
            parse(&[self::interface(), interface]).unwrap_err().to_string()
        };
        assert!(bad(|i| i.mac.truncate(5)).starts_with("interfaces[1].mac:"));
        assert!(bad(|i| i.template_mac = vec![2]).starts_with("interfaces[1].template_mac:"));
        assert!(bad(|i| i.name = "a/b".into()).starts_with("interfaces[1].name:"));
        assert!(bad(|i| i.name = "sixteen-letters!".into()).starts_with("interfaces[1].name:"));
        assert!(bad(|i| i.mtu = 1).starts_with("interfaces[1].mtu:"));
        assert!(bad(|i| i.addresses[1] = "fd00::5/129".into()).starts_with("interfaces[1].addresses[1]:"));
        assert!(bad(|i| i.addresses[0] = "10.88.0.5".into()).starts_with("interfaces[1].addresses[0]:"));
        assert!(bad(|i| i.gateways[1] = "10.88.0.2".into()).starts_with("interfaces[1].gateways[1]:"));
    }

    #[test]
    fn a_clone_finds_its_device_by_the_templates_address_and_later_by_its_own() {
        let [own, template, other] = [1, 2, 3].map(|last| vec![2, 0, 0, 0, 0, last]);
        let plan = |template_mac: &[u8]| {
            let interface = Interface {
                template_mac: template_mac.to_vec(),
                ..interface()
            };
            parse(&[interface]).unwrap().remove(0)
        };
        let fresh = [(other.clone(), 1), (template.clone(), 2)];
        assert_eq!(choose(&fresh, &plan(&template)), Some(2));
        assert_eq!(choose(&fresh, &plan(&[])), None);
        let adopted = [(template.clone(), 1), (own, 2)];
        assert_eq!(choose(&adopted, &plan(&template)), Some(2));
    }

    #[test]
    fn only_the_plans_own_addresses_stay() {
        let plan = parse(&[interface()]).unwrap().remove(0);
        let message = |address: &str, prefix| {
            let mut message = AddressMessage::default();
            message.header.prefix_len = prefix;
            message
                .attributes
                .push(AddressAttribute::Address(address.parse().unwrap()));
            message
        };
        assert!(plan.has(&message("10.88.0.5", 16)) && plan.has(&message("fd00::5", 64)));
        assert!(!plan.has(&message("10.88.0.5", 24)) && !plan.has(&message("10.88.0.6", 16)));
        assert!(!plan.has(&AddressMessage::default()));
    }

    /// In a network namespace of its own; None where that, or a bridge in place of an interface, cannot be had.
    async fn template_interface(handle: &Handle, mac: &[u8]) -> Option<u32> {
        use rtnetlink::LinkBridge;
        let bridge = LinkBridge::new("template0").address(mac.to_vec()).up().build();
        handle.link().add(bridge).execute().await.ok()?;
        let mut links = handle.link().get().match_name("template0".to_owned()).execute();
        let index = links.try_next().await.ok()??.header.index;
        let address = "10.88.0.99".parse().ok()?;
        handle.address().add(index, address, 16).execute().await.ok()?;
        let route = RouteMessageBuilder::<std::net::Ipv4Addr>::new()
            .gateway("10.88.0.98".parse().ok()?)
            .output_interface(index)
            .build();
        handle.route().add(route).execute().await.ok()?;
        Some(index)
    }

    #[tokio::test]
    async fn a_clones_interface_keeps_nothing_of_its_template() {
        if crate::sys::unshare_network().is_err() {
            return;
        }
        let (connection, handle, _) = rtnetlink::new_connection().unwrap();
        tokio::spawn(connection);
        let template_mac = vec![2, 0, 0, 0, 0, 9];
        let Some(index) = template_interface(&handle, &template_mac).await else {
            return;
        };
        let plans = parse(&[Interface {
            template_mac,
            addresses: vec!["10.88.0.5/16".into()],
            gateways: vec!["10.88.0.1".into()],
            ..interface()
        }])
        .unwrap();
        // The second time finds everything as it is to be.
        for _ in 0..2 {
            configure(&take_down(&plans).await.unwrap()).await.unwrap();
            let mut links = handle.link().get().match_name("eth0".to_owned()).execute();
            let link = links.try_next().await.unwrap().unwrap();
            assert_eq!(
                (link.header.index, hardware_address(&link)),
                (index, Some(&plans[0].mac[..]))
            );
            let addresses = handle.address().get().set_link_index_filter(index).execute();
            let addresses: Vec<AddressMessage> = addresses.try_collect().await.unwrap();
            let v4 = addresses.iter().filter(|message| message.header.prefix_len == 16);
            assert_eq!(v4.filter(|message| plans[0].has(message)).count(), 1, "{addresses:?}");
            assert!(!format!("{addresses:?}").contains("10.88.0.99"), "{addresses:?}");
            let routes = handle
                .route()
                .get(RouteMessageBuilder::<std::net::Ipv4Addr>::new().build());
            let routes: Vec<_> = routes.execute().try_collect().await.unwrap();
            let text = format!("{routes:?}");
            assert!(text.contains("10.88.0.1") && !text.contains("10.88.0.98"), "{text}");
        }
    }
}
