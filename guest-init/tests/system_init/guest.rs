//! The guest: a machine under QEMU, a connection to its flint-init, the identity it is given.

use std::{
    env,
    fs::File,
    process::{Child, Command, Stdio},
    time::Duration,
};

use flint_api::guest::{guest_client::GuestClient, *};
use hyper_util::rt::TokioIo;
use tokio_vsock::{VsockAddr, VsockStream};
use tonic::transport::{Channel, Endpoint};

pub type Client = GuestClient<Channel>;

/// An emulated machine boots in seconds; this is for one that hangs.
pub const BOOT_TIMEOUT: Duration = Duration::from_secs(120);
pub const CID: u32 = 42;
pub const MAC: &str = "02:00:00:00:00:01";

/// A guest that ends with the test.
pub struct Guest(pub Child);

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

pub fn file(name: &str) -> String {
    env::var(name).unwrap_or_else(|_| panic!("{name} is not set; run hack/test system"))
}

pub fn start_guest() -> Guest {
    let disk = |serial: &str, path: &str, options: &str| {
        [
            "-drive".to_owned(),
            format!("if=none,id={serial},format=raw,file={path}{options}"),
            "-device".to_owned(),
            format!("virtio-blk-device,drive={serial},serial={serial}"),
        ]
    };
    let mut command = Command::new("qemu-system-x86_64");
    command
        .args([
            "-accel",
            "kvm",
            "-cpu",
            "host",
            "-M",
            "microvm,rtc=off",
            "-m",
            "256",
            "-nodefaults",
            "-no-user-config",
        ])
        .args(["-nographic", "-no-reboot", "-serial", "stdio"])
        .args(["-kernel", &file("FLINT_KERNEL"), "-initrd", &file("FLINT_INITRD")])
        .args(["-append", "console=ttyS0 quiet panic=-1 reboot=t"])
        .args(["-device", &format!("vhost-vsock-device,guest-cid={CID}")])
        .args([
            "-netdev",
            "user,id=net,restrict=on",
            "-device",
            &format!("virtio-net-device,netdev=net,mac={MAC}"),
        ])
        .args(["-device", "virtio-rng-device"])
        .args(disk("image-0", &file("FLINT_TEST_IMAGE"), ",readonly=on"))
        .args(disk("scratch", &file("FLINT_TEST_SCRATCH"), ""));
    let log = File::create(env::var("FLINT_TEST_GUEST_LOG").unwrap_or("/dev/stderr".into())).unwrap();
    Guest(
        command
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap(),
    )
}

pub async fn connect() -> Client {
    let endpoint = Endpoint::from_static("http://guest");
    let connector = tower::service_fn(|_| async {
        let stream = VsockStream::connect(VsockAddr::new(CID, PORT)).await?;
        Ok::<_, std::io::Error>(TokioIo::new(stream))
    });
    GuestClient::new(endpoint.connect_with_connector(connector).await.unwrap())
}

pub fn identity() -> AdoptIdentityRequest {
    AdoptIdentityRequest {
        hostname: "pod-7".into(),
        machine_id: "0123456789abcdef0123456789abcdef".into(),
        realtime_ns: 1_900_000_000_000_000_000,
        entropy: vec![7; 64],
        interfaces: vec![Interface {
            mac: vec![2, 0, 0, 0, 0, 1],
            name: "eth0".into(),
            addresses: vec!["10.0.2.15/24".into(), "fd00::15/64".into()],
            gateways: vec!["10.0.2.2".into(), "fd00::2".into()],
            mtu: 1400,
            ..Interface::default()
        }],
        dns: Some(Dns {
            nameservers: vec!["10.0.2.3".into()],
            searches: vec!["svc".into()],
            options: vec![],
        }),
        host_aliases: vec![HostAlias {
            ip: "10.9.9.9".into(),
            hostnames: vec!["db".into()],
        }],
        sysctls: [("net.ipv4.ip_unprivileged_port_start".to_owned(), "0".to_owned())].into(),
        ..AdoptIdentityRequest::default()
    }
}

pub fn step(text: &str) {
    eprintln!("system_init: {text}");
}
