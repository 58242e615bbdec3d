//! Ends that come without warning: the process is killed, the disk is full.

use std::path::PathBuf;
use std::process::Command;

use flint_snapshots::images::ErrorKind;

use crate::build::{Compression, layout, noise, simple, tar};
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
pub struct SmallDisk(pub tempfile::TempDir);

impl SmallDisk {
    pub fn mount(bytes: u64) -> Self {
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

/// Not a test: the process that imports, again and again, until it is killed.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "run by killed_at_any_point_of_an_import"]
async fn import_child() {
    let Some(dir) = std::env::var_os(CHILD_DIR).map(PathBuf::from) else {
        return;
    };
    let mut options = options(&dir.join("store"));
    // Several packs and commits in each import.
    options.store.pack_bytes = 512 << 10;
    options.store.commit_bytes = 256 << 10;
    let store = ImageStore::open(&dir.join("store"), options).await.unwrap();
    std::fs::write(dir.join("begun"), "").unwrap();
    loop {
        store
            .import(dir.join("oci"), Some("x"))
            .unwrap()
            .finish()
            .await
            .unwrap();
        store.remove("x").await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn killed_at_any_point_of_an_import_the_store_is_whole() {
    let dir = tempfile::tempdir().unwrap();
    let layers: Vec<_> = (0..4)
        .map(|number| {
            let content = noise(600_000, 70 + number);
            (tar(&format!("file-{number}"), &content), Compression::Zstd)
        })
        .collect();
    layout(&dir.path().join("oci"), &layers);
    let path = dir.path().join("store");
    let kept = {
        let store = open(&path).await;
        let kept = simple(&dir.path().join("kept"), b"was here before");
        store.import(kept.path, Some("kept")).unwrap().finish().await.unwrap()
    };
    let mut random = fastrand::Rng::with_seed(7);
    let mut found_in_the_middle = 0;
    for round in 0..25 {
        let begun = dir.path().join("begun");
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "crash::import_child", "--ignored"])
            .env(CHILD_DIR, dir.path())
            .stdout(std::process::Stdio::null())
            .spawn()
            .unwrap();
        // The moment is to be any, so there is nothing to wait for but time.
        std::thread::sleep(Duration::from_millis(random.u64(20..400)));
        child.kill().unwrap();
        child.wait().unwrap();
        found_in_the_middle += usize::from(std::fs::remove_file(&begun).is_ok());

        let store = open(&path).await;
        let images = store.list().await.unwrap();
        assert!(images.contains(&kept) && images.len() <= 2, "round {round}: {images:?}");
        assert_serves(&store, &kept, b"was here before").await;
        let imported = store.import(dir.path().join("oci"), Some("x")).unwrap().finish().await;
        let imported = imported.unwrap_or_else(|error| panic!("round {round}: {}", text(&*error)));
        for number in 0..4 {
            assert_serves(&store, &imported, &noise(600_000, 70 + number)[..4096]).await;
        }
        store.remove("x").await.unwrap();
        assert_eq!(
            store.list().await.unwrap(),
            std::slice::from_ref(&kept),
            "round {round}"
        );
        // What is left of all that was killed: the packs of `kept`, and they are not twice what lives in them.
        assert!(
            packed(&path) < 100_000,
            "round {round}: {} bytes of packs",
            packed(&path)
        );
    }
    assert!(found_in_the_middle > 5, "the child was killed before it began");
}

/// Bytes of all packs.
fn packed(store: &Path) -> u64 {
    let packs = std::fs::read_dir(store.join("packs")).unwrap();
    packs.map(|entry| entry.unwrap().metadata().unwrap().len()).sum()
}

/// A small ext4 on a loop device, gone with the value.
struct SmallExt4(tempfile::TempDir);

impl SmallExt4 {
    fn mount(bytes: u64) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let image = dir.path().join("image");
        std::fs::File::create(&image).unwrap().set_len(bytes).unwrap();
        let run = |command: &mut Command| {
            let output = command.output().unwrap();
            assert!(
                output.status.success(),
                "{command:?}: {}",
                String::from_utf8_lossy(&output.stderr)
            );
        };
        run(Command::new("mkfs.ext4").args(["-q", "-m", "0"]).arg(&image));
        std::fs::create_dir(dir.path().join("mounted")).unwrap();
        run(Command::new("mount")
            .args(["-o", "loop"])
            .arg(&image)
            .arg(dir.path().join("mounted")));
        Self(dir)
    }

    fn path(&self) -> PathBuf {
        self.0.path().join("mounted")
    }
}

impl Drop for SmallExt4 {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(self.path()).status();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_that_somebody_else_fills_is_told_at_every_byte() {
    let dir = tempfile::tempdir().unwrap();
    let layers = [0, 1, 2].map(|number| {
        (
            tar(&format!("f{number}"), &noise(1_500_000, 80 + number)),
            Compression::Zstd,
        )
    });
    layout(&dir.path().join("oci"), &layers);
    let disk = SmallExt4::mount(24 << 20);
    let path = disk.path().join("store");
    let mut reckless = options(&path);
    // Without a reserve the kernel's own word is heard: in packs, in the index, in tables.
    reckless.store.reserve_bytes = 0;
    let kept = {
        let store = ImageStore::open(&path, reckless.clone()).await.unwrap();
        let kept = simple(&dir.path().join("kept"), b"was here before");
        store.import(kept.path, Some("kept")).unwrap().finish().await.unwrap()
    };
    let mut failed = 0;
    for room in [
        64 << 10,
        512 << 10,
        1 << 20,
        3 << 20,
        4 << 20,
        4_600 << 10,
        4_900 << 10,
        8 << 20,
    ] {
        let store = ImageStore::open(&path, reckless.clone()).await.unwrap();
        let other = disk.path().join("somebody else's");
        fill_up_to(&other, &disk.path(), room);
        match store.import(dir.path().join("oci"), Some("x")).unwrap().finish().await {
            Err(error) => {
                failed += 1;
                let text = text(&*error);
                assert_eq!(error.kind(), ErrorKind::DiskFull, "{room} bytes: {text}");
                for part in ["no room", &*path.display().to_string(), "flint images rm"] {
                    assert!(text.contains(part), "{room} bytes: {part:?} is not in {text:?}");
                }
                assert_eq!(store.list().await.unwrap(), std::slice::from_ref(&kept), "{room} bytes");
            }
            Ok(imported) => assert!(
                room > 4 << 20 && imported.layers.len() == 3,
                "it fitted into {room} bytes"
            ),
        }
        assert_serves(&store, &kept, b"was here before").await;
        // Room is back: the same store goes on, without being opened again.
        std::fs::remove_file(&other).unwrap();
        let imported = store.import(dir.path().join("oci"), Some("x")).unwrap().finish().await;
        let imported = imported.unwrap_or_else(|error| panic!("{room} bytes: {}", text(&*error)));
        assert_serves(&store, &imported, &noise(1_500_000, 82)[..4096]).await;
        store.remove("x").await.unwrap();
        let tables = std::fs::read_dir(path.join("tables")).unwrap().count();
        assert_eq!(tables, 1, "{room} bytes: tables were left");
        assert!(
            packed(&path) < 100_000,
            "{room} bytes: {} bytes of packs were left",
            packed(&path)
        );
    }
    assert!(failed >= 4, "only {failed} times there was no room");
}

/// Writes to `file` until its disk has only about `room` bytes left.
fn fill_up_to(file: &Path, disk: &Path, room: u64) {
    let output = Command::new("df")
        .args(["--output=avail", "-B1"])
        .arg(disk)
        .output()
        .unwrap();
    let free: u64 = String::from_utf8(output.stdout)
        .unwrap()
        .lines()
        .nth(1)
        .unwrap()
        .trim()
        .parse()
        .unwrap();
    let status = Command::new("fallocate")
        .arg("--length")
        .arg(free.saturating_sub(room).max(1).to_string())
        .arg(file)
        .status();
    assert!(status.unwrap().success());
}
