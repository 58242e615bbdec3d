//! The real thing, each test in a network namespace of its own, so that the machine's own network is never touched.

use std::{future::Future, process::Command};

use nix::sched::{CloneFlags, unshare};

use super::*;

/// Runs a test on a thread, and all that it starts, in a new network namespace, which ends with the thread.
fn in_private_network<F: Future<Output = ()>>(test: impl FnOnce() -> F + Send + 'static) {
    let run = || {
        unshare(CloneFlags::CLONE_NEWNET).expect("this test needs CAP_SYS_ADMIN");
        tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap()
            .block_on(test());
    };
    std::thread::spawn(run).join().unwrap();
}

fn ask(command: &str) -> String {
    let output = Command::new("sh").args(["-c", command]).output().unwrap();
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn a_port_is_on_the_bridge_until_its_last_descriptor_closes() {
    in_private_network(|| async {
        let (network, _) = Network::start(Config::default(), &[]).await.unwrap();
        assert!(ask("ip -4 addr show flint0").contains("10.88.0.1/16"));
        let lease = network.lease().unwrap();
        let tap = network.plug(lease.gate()).await.unwrap();
        assert!(ask("ip link show master flint0").contains("flt0a580002"));
        assert!(ask("nft list set bridge flint sources").contains("10.88.0.2"));
        drop(tap);
        assert!(
            !ask("ip link").contains("flt0a580002"),
            "the tap goes with its descriptor"
        );
        network.unplug(lease.gate()).unwrap();
        network.unplug(lease.gate()).unwrap();
        assert!(!ask("nft list set bridge flint sources").contains("10.88.0.2"));
        network.remove().await.unwrap();
        assert_eq!(ask("nft list ruleset"), "");
        assert!(!ask("ip link").contains("flint0"));
    });
}

#[test]
fn a_second_start_takes_over_what_the_first_left() {
    in_private_network(|| async {
        let (first, _) = Network::start(Config::default(), &[]).await.unwrap();
        let lease = first.lease().unwrap();
        let tap = first.plug(lease.gate()).await.unwrap();
        let (second, leases) = Network::start(Config::default(), &[survivor(&lease)]).await.unwrap();
        assert_eq!(leases[0].address(), lease.address());
        assert!(
            ask("ip link show master flint0").contains("flt0a580002"),
            "the survivor stays plugged"
        );
        assert!(
            ask("nft list set bridge flint sources").contains("10.88.0.2"),
            "and allowed"
        );
        assert_ne!(second.lease().unwrap().address(), lease.address());
        drop((first, tap));
    });
}

fn survivor(lease: &Lease) -> Survivor {
    Survivor {
        address: lease.address(),
        may_send: true,
    }
}

/// An ARP request for the gateway, as the guest behind `tap` would send it: header of the tap, then the frame.
fn arp_request(mac: [u8; 6], address: Ipv4Addr, gateway: Ipv4Addr) -> Vec<u8> {
    let mut frame = vec![0; 12];
    frame.extend([0xff; 6]);
    frame.extend(mac);
    frame.extend([0x08, 0x06, 0, 1, 0x08, 0, 6, 4, 0, 1]);
    frame.extend(mac);
    frame.extend(address.octets());
    frame.extend([0; 6]);
    frame.extend(gateway.octets());
    frame
}

/// Sends a request and says whether the host's answer comes. What the host sends of its own is read past.
async fn gateway_answers(tap: &OwnedFd, request: &[u8]) -> bool {
    use tokio::io::{Interest, unix::AsyncFd};
    nix::unistd::write(tap, request).unwrap();
    // SAFETY: an owned descriptor stays the same one for as long as it is registered.
    let tap = unsafe { AsyncFd::register_with_interest(tap.not_blocking(), Interest::READABLE) }.unwrap();
    let answer = async {
        loop {
            let mut frame = [0; 2048];
            let read = |fd: &OwnedFd| Ok(nix::unistd::read(fd, &mut frame)?);
            let length = tap.async_io(Interest::READABLE, read).await.unwrap();
            if length >= 34 && frame[24..26] == [0x08, 0x06] && frame[32..34] == [0, 2] {
                break;
            }
        }
    };
    tokio::time::timeout(std::time::Duration::from_millis(500), answer)
        .await
        .is_ok()
}

#[test]
fn a_fenced_tap_sends_nothing_before_it_is_opened_not_even_for_a_flintd_that_comes_anew() {
    in_private_network(|| async {
        let (network, _) = Network::start(Config::default(), &[]).await.unwrap();
        let lease = network.lease().unwrap();
        let tap = network.plug_fenced(lease.address()).await.unwrap();
        let request = arp_request(lease.mac(), lease.address(), network.gateway());
        assert!(!gateway_answers(&tap, &request).await, "a closed fence");
        let parked = Survivor {
            may_send: false,
            ..survivor(&lease)
        };
        let (anew, leases) = Network::start(Config::default(), &[parked]).await.unwrap();
        assert_eq!(leases[0].address(), lease.address(), "its address is not given away");
        assert!(!gateway_answers(&tap, &request).await, "still closed");
        anew.open(leases[0].gate()).unwrap();
        assert!(gateway_answers(&tap, &request).await, "an open one");
        drop(network);
    });
}

#[test]
fn who_comes_to_open_it_after_the_end_does_not_open_it_for_the_next_one() {
    in_private_network(|| async {
        let (network, _) = Network::start(Config::default(), &[]).await.unwrap();
        let ended = network.lease().unwrap();
        network.unplug(ended.gate()).unwrap();
        let late = Arc::clone(ended.gate());
        let address = ended.address();
        drop(ended);
        let error = network.open(&late).unwrap_err().to_string();
        assert!(error.contains(&address.to_string()), "{error}");
        assert!(network.plug(&late).await.is_err());
        assert!(!ask("nft list set bridge flint sources").contains("10.88.0.2"));
        assert!(!ask("ip link").contains("flt0a580002"));
    });
}

/// A second descriptor of the same tap, not blocking.
trait Duplicate {
    fn not_blocking(&self) -> OwnedFd;
}

impl Duplicate for OwnedFd {
    fn not_blocking(&self) -> OwnedFd {
        let copy = self.try_clone().unwrap();
        nix::fcntl::fcntl(&copy, nix::fcntl::FcntlArg::F_SETFL(nix::fcntl::OFlag::O_NONBLOCK)).unwrap();
        copy
    }
}

#[test]
fn a_tap_reaches_the_gateway_from_its_own_addresses_only() {
    in_private_network(|| async {
        let (network, _) = Network::start(Config::default(), &[]).await.unwrap();
        let lease = network.lease().unwrap();
        let tap = network.plug(lease.gate()).await.unwrap();
        let gateway = network.gateway();
        let stranger = Ipv4Addr::new(10, 88, 0, 77);
        let foreign_mac = addresses::mac_of(stranger);
        assert!(
            gateway_answers(&tap, &arp_request(lease.mac(), lease.address(), gateway)).await,
            "its own"
        );
        assert!(
            !gateway_answers(&tap, &arp_request(lease.mac(), stranger, gateway)).await,
            "another's address"
        );
        assert!(
            !gateway_answers(&tap, &arp_request(foreign_mac, lease.address(), gateway)).await,
            "another's MAC"
        );
        assert!(
            !gateway_answers(&tap, &arp_request(foreign_mac, stranger, gateway)).await,
            "both another's"
        );
        assert!(
            gateway_answers(&tap, &arp_request(lease.mac(), lease.address(), gateway)).await,
            "still its own"
        );
    });
}

#[test]
fn the_first_frame_of_every_tap_is_answered_also_when_the_bridge_was_idle() {
    in_private_network(|| async {
        let (network, _) = Network::start(Config::default(), &[]).await.unwrap();
        // Without waiting for the bridge about every fifth answer is lost.
        for round in 0..40 {
            let lease = network.lease().unwrap();
            let tap = network.plug(lease.gate()).await.unwrap();
            let request = arp_request(lease.mac(), lease.address(), network.gateway());
            assert!(gateway_answers(&tap, &request).await, "tap {round}");
        }
    });
}

#[test]
fn a_changed_range_takes_the_place_of_the_old_one() {
    in_private_network(|| async {
        let (old, _) = Network::start(Config::default(), &[]).await.unwrap();
        let lease = old.lease().unwrap();
        let config = Config {
            range: "10.99.0.0/16".parse().unwrap(),
            ..Config::default()
        };
        let (_new, leases) = Network::start(config, &[survivor(&lease)]).await.unwrap();
        assert!(leases.is_empty(), "an address of another range is nobody's");
        let addresses = ask("ip -4 addr show flint0");
        assert!(
            addresses.contains("10.99.0.1/16") && !addresses.contains("10.88"),
            "{addresses}"
        );
        assert!(!ask("nft list set bridge flint sources").contains("10.88.0.2"));
    });
}

#[test]
fn a_start_that_fails_leaves_no_bridge() {
    in_private_network(|| async {
        let config = Config {
            bridge: "flint\"0".into(),
            ..Config::default()
        };
        assert!(matches!(
            Network::start(config, &[]).await,
            Err(NetworkError::Nft { .. })
        ));
        assert!(!ask("ip link").contains("flint"));
    });
}
