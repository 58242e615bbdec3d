//! The machine: its identity, its images, its connections, and what it costs.

use flint_api::guest::*;
use tokio::io::AsyncWriteExt;
use tokio_vsock::{VsockAddr, VsockStream};
use tonic::Code;

use crate::{
    calls::{container, create_and_start, delete_ended, first_output, output, run, shell},
    guest::{CID, Client, MAC, connect, identity, step},
};

/// What flint-init may take of each guest's memory, whatever it has done before.
const RSS_LIMIT: u64 = 8 << 20;

pub async fn refuses_containers_before_it_has_an_identity(client: &mut Client) {
    step("no identity");
    let refused = client
        .create_container(container("early", shell("true")))
        .await
        .unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition);
}

pub async fn adopts_its_identity(client: &mut Client) {
    step("identity");
    let absent = Interface {
        mac: vec![2, 9, 9, 9, 9, 9],
        name: "eth9".into(),
        ..Interface::default()
    };
    let wrong = AdoptIdentityRequest {
        interfaces: vec![absent],
        ..identity()
    };
    let refused = client.adopt_identity(wrong).await.unwrap_err();
    assert!(
        refused.message().contains("eth9") && refused.message().contains(MAC),
        "{refused}"
    );
    let adopted = client.adopt_identity(identity()).await.unwrap().into_inner();
    assert!(adopted.kernel_uptime_us > adopted.init_uptime_us && adopted.init_uptime_us > 0);
    step(&format!(
        "kernel up {} ms, init up {} ms",
        adopted.kernel_uptime_us / 1000,
        adopted.init_uptime_us / 1000
    ));
}

/// A clone's connections with other machines are its template's; those within it are its own.
pub async fn ends_the_connections_of_the_machine_it_was_cloned_from(client: &mut Client) {
    step("connections");
    // Each end of the one connection has this machine's address, each end of the other loopback's.
    let talk = "mkfifo /tmp/one /tmp/other
        sleep 1000 | nc -l -p 9101 &
        { echo joined; sleep 1000; } | nc -l -p 9100 &
        sleep 1
        { nc 127.0.0.1 9101 <>/tmp/other; echo never; } &
        sleep 1
        nc 10.0.2.15 9100 <>/tmp/one
        echo ended";
    create_and_start(client, container("talker", shell(talk))).await;
    first_output(client, "talker").await;
    let mut clone = AdoptIdentityRequest {
        generation: vec![3; 16],
        ..identity()
    };
    clone.interfaces[0].template_mac = clone.interfaces[0].mac.clone();
    client.adopt_identity(clone).await.unwrap();
    let (out, err) = output(client, "talker").await;
    assert_eq!(
        String::from_utf8_lossy(&out),
        "joined\nended\n",
        "{}",
        String::from_utf8_lossy(&err)
    );
    delete_ended(client, "talker").await;
}

pub async fn mounts_images_once(client: &mut Client) {
    step("images");
    let request = |disk_serial: &str| MountImageRequest {
        image_id: "busybox".into(),
        disk_serial: disk_serial.into(),
    };
    let refused = client
        .create_container(container("early", shell("true")))
        .await
        .unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition, "{refused}");
    client.mount_image(request("image-0")).await.unwrap();
    client.mount_image(request("image-0")).await.unwrap();
    assert_eq!(
        client.mount_image(request("scratch")).await.unwrap_err().code(),
        Code::FailedPrecondition
    );
}

pub async fn survives_garbage_and_reconnects(client: &mut Client) {
    step("garbage");
    for round in 0..20_u8 {
        let mut stream = VsockStream::connect(VsockAddr::new(CID, PORT)).await.unwrap();
        let garbage: Vec<u8> = (0..4096_u32)
            .map(|byte| u8::try_from(byte % 251).unwrap() ^ round)
            .collect();
        // The guest may hang up before it has read all.
        let _ = stream.write_all(&garbage).await;
    }
    *client = connect().await;
    let list = client
        .list_containers(ListContainersRequest {})
        .await
        .unwrap()
        .into_inner()
        .containers;
    assert_eq!(list.len(), 1);
    assert_eq!(
        (list[0].container_id.as_str(), list[0].state()),
        ("twice", container_status::State::Running)
    );
    let kill = SignalContainerRequest {
        container_id: "twice".into(),
        signal: 9,
        all_processes: true,
    };
    client.signal_container(kill).await.unwrap();
    assert_eq!(output(client, "twice").await.0, b"x\n");
    delete_ended(client, "twice").await;
}

pub async fn leaves_nothing_behind(client: &mut Client) {
    step("traces");
    let look = shell("cat /proc/mounts | grep -c overlay; ls /guest/sys/fs/cgroup 2>/dev/null; cat /proc/self/cgroup");
    let (_, out, _) = run(client, container("look", look)).await;
    assert!(out.starts_with("1\n"), "only its own overlay: {out}");
    let stats = client.stats(StatsRequest {}).await.unwrap().into_inner();
    step(&format!(
        "resident {} of {} bytes",
        stats.init_rss_bytes, stats.memory_total_bytes
    ));
    assert!(stats.containers.is_empty());
    assert!(
        stats.init_rss_bytes <= RSS_LIMIT,
        "flint-init takes {} bytes",
        stats.init_rss_bytes
    );
}
