//! flint-init as PID 1 of a real guest, driven over vsock as flintd drives it.
//!
//! QEMU's microvm stands in for flint-vmm, so that a failure here is flint-init's. Needs a host with /dev/kvm and
//! /dev/vhost-vsock; `hack/test system` makes the guest's files and runs this where there are both.
//! FLINT_KERNEL, FLINT_INITRD, FLINT_TEST_IMAGE and FLINT_TEST_SCRATCH name the files.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test")]

mod calls;
mod containers;
mod guest;
mod machine;
mod streams;

use flint_api::guest::{PORT, ShutdownRequest};
use tokio_vsock::{VMADDR_CID_ANY, VsockAddr, VsockListener};

use guest::{BOOT_TIMEOUT, CID, connect, start_guest, step};

/// One guest and its whole life; each part is a function, for the failure's name.
#[tokio::test]
async fn a_guest_lives_and_ends() {
    let announced = VsockListener::bind(VsockAddr::new(VMADDR_CID_ANY, PORT)).unwrap();
    let mut guest = start_guest();
    let (_, peer) = tokio::time::timeout(BOOT_TIMEOUT, announced.accept())
        .await
        .expect("the guest came up")
        .unwrap();
    assert_eq!(peer.cid(), CID);
    let mut client = connect().await;
    machine::refuses_containers_before_it_has_an_identity(&mut client).await;
    machine::adopts_its_identity(&mut client).await;
    machine::mounts_images_once(&mut client).await;
    containers::runs_a_container(&mut client).await;
    machine::ends_the_connections_of_the_machine_it_was_cloned_from(&mut client).await;
    containers::says_why_a_program_cannot_run(&mut client).await;
    containers::tells_signals_and_oom(&mut client).await;
    containers::keeps_users_and_limits(&mut client).await;
    containers::shares_what_a_pod_shares(&mut client).await;
    streams::holds_back_a_flood(&mut client).await;
    streams::feeds_input(&mut client).await;
    streams::gives_a_terminal(&mut client).await;
    streams::execs(&mut client).await;
    containers::refuses_bad_requests(&mut client).await;
    machine::survives_garbage_and_reconnects(&mut client).await;
    machine::leaves_nothing_behind(&mut client).await;
    step("shutdown");
    // The answer may be lost with the machine.
    let _ = client.shutdown(ShutdownRequest {}).await;
    let ended = tokio::task::spawn_blocking(move || guest.0.wait());
    assert!(
        tokio::time::timeout(BOOT_TIMEOUT, ended)
            .await
            .expect("the guest powers off")
            .unwrap()
            .unwrap()
            .success()
    );
}
