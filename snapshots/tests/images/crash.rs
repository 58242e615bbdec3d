//! Ends that come without warning: the process is killed, the disk is full.

use std::path::PathBuf;
use std::process::Command;

use flint_snapshots::images::ErrorKind;

use crate::build::{noise, simple};
use crate::proxy::{Fault, Proxy};
use crate::registry::Registry;
use crate::*;

const CHILD_DIR: &str = "FLINT_TEST_CHILD_DIR";
const CHILD_REFERENCE: &str = "FLINT_TEST_CHILD_REFERENCE";

/// Not a test: what the next one kills.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "run by killed_in_the_middle_of_a_pull"]
async fn child() {
    let Some(dir) = std::env::var_os(CHILD_DIR).map(PathBuf::from) else {
        return;
    };
    let store = open(&dir).await;
    let _ = pull(&store, &std::env::var(CHILD_REFERENCE).unwrap()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn killed_in_the_middle_of_a_pull_the_store_opens_and_pulls() {
    let (dir, registry) = (tempfile::tempdir().unwrap(), Registry::start());
    let kept = registry.push(&simple(&dir.path().join("1"), b"was here before"), "t/kept:1");
    let image = simple(&dir.path().join("2"), &noise(3_000_000, 10));
    let direct = registry.push(&image, "t/app:1");
    let path = dir.path().join("store");
    let kept = pull(&open(&path).await, &kept).await.unwrap();

    let hex = image.layers[0].hex();
    let proxy = Proxy::start(&registry.address, move |head, _| {
        if head.contains(&hex) {
            Fault::Stall(2_500_000)
        } else {
            Fault::Pass
        }
    });
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "crash::child", "--ignored"])
        .env(CHILD_DIR, &path)
        .env(CHILD_REFERENCE, proxy.reference("t/app:1"))
        .stdout(std::process::Stdio::null())
        .spawn()
        .unwrap();
    proxy
        .stalled
        .recv_timeout(Duration::from_secs(60))
        .expect("the child did not pull");
    child.kill().unwrap();
    child.wait().unwrap();

    let store = open(&path).await;
    assert_eq!(store.list().await.unwrap(), std::slice::from_ref(&kept));
    assert_serves(&store, &kept, b"was here before").await;
    let pulled = pull(&store, &direct).await.unwrap();
    assert_serves(&store, &pulled, &noise(3_000_000, 10)[..4096]).await;
}

/// A small tmpfs, unmounted with the value.
struct SmallDisk(tempfile::TempDir);

impl SmallDisk {
    fn mount(bytes: u64) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let status = Command::new("mount")
            .args(["-t", "tmpfs", "-o", &format!("size={bytes}"), "tmpfs"])
            .arg(dir.path())
            .status();
        assert!(status.unwrap().success(), "mounting a tmpfs needs root");
        Self(dir)
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(self.0.path()).status();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_is_told_and_the_store_stays_usable() {
    let (dir, registry) = (tempfile::tempdir().unwrap(), Registry::start());
    let small = registry.push(&simple(&dir.path().join("1"), &noise(100_000, 11)), "t/small:1");
    let big = registry.push(&simple(&dir.path().join("2"), &noise(30_000_000, 12)), "t/big:1");
    let disk = SmallDisk::mount(16 << 20);
    let path = disk.0.path().join("store");
    let store = open(&path).await;
    let small = pull(&store, &small).await.unwrap();

    let error = pull(&store, &big).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::DiskFull, "{}", text(&*error));
    assert!(
        text(&*error).contains("no room") && text(&*error).contains("remove images"),
        "{}",
        text(&*error)
    );
    assert_eq!(store.list().await.unwrap(), std::slice::from_ref(&small));
    assert_serves(&store, &small, &noise(100_000, 11)[..4096]).await;

    let medium = registry.push(&simple(&dir.path().join("3"), &noise(5_000_000, 13)), "t/medium:1");
    let medium = pull(&store, &medium)
        .await
        .expect("what the failed pull took was not given back");
    store.remove(&medium.digest.to_string()).await.unwrap();
    drop(store);
    assert_eq!(open(&path).await.list().await.unwrap(), [small]);
}
