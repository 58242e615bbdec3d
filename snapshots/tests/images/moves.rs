//! Machine snapshots on their way: ways that break in the middle, and what is left then.

use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use flint_snapshots::images::ErrorKind;
use flint_snapshots::machines::{Machines, Notes, Transfer, Watcher};

use crate::build::simple;
use crate::crash::SmallDisk;
use crate::machines::{MEMORY, UNIT, assert_same, files, make_machine, unwatched, watched};
use crate::proxy::{Fault, Proxy};
use crate::registry::Registry;
use crate::*;

const CHILD_DIR: &str = "FLINT_TEST_CHILD_DIR";
const CHILD_REFERENCE: &str = "FLINT_TEST_CHILD_REFERENCE";

/// Bytes of all packs.
fn packed(store: &ImageStore) -> u64 {
    let packs = std::fs::read_dir(store.chunks().dir().join("packs")).unwrap();
    packs.map(|pack| pack.unwrap().metadata().unwrap().len()).sum()
}

/// A registry with a machine, whose files are in a folder.
async fn pushed(dir: &Path) -> (Registry, String) {
    let registry = Registry::start();
    make_machine(dir);
    let reference = registry.reference("t/machine:1");
    let machines = open(&dir.join("here")).await.machines();
    machines
        .push_files(files(dir), Notes::new(), &reference, None, &unwatched())
        .await
        .unwrap();
    (registry, reference)
}

/// How many bytes a pull had to fetch, and of how many.
async fn fetched(machines: &Machines, reference: &str) -> Transfer {
    let (watcher, last) = watched();
    machines.pull("m", reference, None, &watcher).await.unwrap();
    let last = *last.lock().unwrap();
    assert_eq!(last.bytes_done, last.bytes_total);
    last
}

#[tokio::test(flavor = "multi_thread")]
async fn files_are_pushed_as_a_kept_machine_is_and_nothing_of_them_is_kept() {
    let dir = tempfile::tempdir().unwrap();
    let (registry, reference) = pushed(dir.path()).await;
    let store = open(&dir.path().join("there")).await;
    let machines = store.machines();
    let files_pushed = machines
        .push_files(files(dir.path()), Notes::new(), &reference, None, &unwatched())
        .await
        .unwrap();
    assert_eq!((packed(&store), machines.list().await.unwrap()), (0, vec![]));

    machines.keep("m", files(dir.path()), Notes::new()).await.unwrap();
    let kept = registry.reference("t/machine:2");
    let (watcher, last) = watched();
    assert_eq!(machines.push("m", &kept, None, &watcher).await.unwrap(), files_pushed);
    assert_eq!(last.lock().unwrap().bytes_sent, 0, "the repository has all of it");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_that_is_changed_while_it_is_pushed_is_no_snapshot() {
    let (dir, registry) = (tempfile::tempdir().unwrap(), Registry::start());
    let memory = make_machine(dir.path()).remove(1).1;
    let machines = open(&dir.path().join("here")).await.machines();
    // The first word comes when the chunks have their names, and none is sent.
    let watcher: Watcher = Arc::new(move |_| memory.write_all_at(b"x", UNIT).unwrap());
    let reference = registry.reference("t/machine:1");
    let error = machines
        .push_files(files(dir.path()), Notes::new(), &reference, None, &watcher)
        .await
        .unwrap_err();
    assert!(text(&error).contains("being changed"), "{}", text(&error));
    assert!(machines.find(&reference, None).await.is_err());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_push_whose_registry_dies_shows_nothing_and_goes_on_where_it_was() {
    let (dir, registry) = (tempfile::tempdir().unwrap(), Arc::new(Mutex::new(Registry::start())));
    make_machine(dir.path());
    let path = dir.path().join("here");
    let mut options = options(&path);
    options.registry.parallel_layers = 1;
    let machines = ImageStore::open(&path, options).await.unwrap().machines();
    let dying = Arc::clone(&registry);
    let watcher: Watcher = Arc::new(move |transfer| {
        if transfer.bytes_sent > 0 {
            dying.lock().unwrap().kill();
        }
    });
    let reference = registry.lock().unwrap().reference("t/machine:1");
    let error = machines
        .push_files(files(dir.path()), Notes::new(), &reference, None, &watcher)
        .await
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable, "{}", text(&error));

    registry.lock().unwrap().start_again();
    let reference = registry.lock().unwrap().reference("t/machine:1");
    let nothing = machines.find(&reference, None).await.err().unwrap();
    assert_eq!(nothing.kind(), ErrorKind::NotFound, "{}", text(&nothing));
    let (watcher, last) = watched();
    machines
        .push_files(files(dir.path()), Notes::new(), &reference, None, &watcher)
        .await
        .unwrap();
    let last = *last.lock().unwrap();
    assert!(0 < last.bytes_sent && last.bytes_sent < last.bytes_total, "{last:?}");
    machines.pull("m", &reference, None, &unwatched()).await.unwrap();
}

/// A proxy in whose way no more than so many parts of bundles get through; then everything stalls.
fn stalling_after(registry: &Registry, parts: usize) -> Proxy {
    let blobs = AtomicUsize::new(0);
    Proxy::start(&registry.address, move |head, _| {
        let of_blob = head.starts_with("GET") && head.contains("/blobs/");
        // The first blob is the record.
        if of_blob && blobs.fetch_add(1, Ordering::SeqCst) > parts {
            Fault::Stall(0)
        } else {
            Fault::Pass
        }
    })
}

/// Not a test: what the next one kills.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "run by killed_in_the_middle_of_a_pull_only_the_rest_is_fetched"]
async fn child() {
    let Some(dir) = std::env::var_os(CHILD_DIR).map(PathBuf::from) else {
        return;
    };
    let mut options = options(&dir);
    options.registry.parallel_layers = 1;
    options.store.commit_bytes = UNIT;
    let machines = ImageStore::open(&dir, options).await.unwrap().machines();
    let reference = std::env::var(CHILD_REFERENCE).unwrap();
    let _ = machines.pull("m", &reference, None, &unwatched()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn killed_in_the_middle_of_a_pull_only_the_rest_is_fetched() {
    let dir = tempfile::tempdir().unwrap();
    let (registry, reference) = pushed(dir.path()).await;
    let path = dir.path().join("there");
    let proxy = stalling_after(&registry, 1);
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "moves::child", "--ignored"])
        .env(CHILD_DIR, &path)
        .env(CHILD_REFERENCE, proxy.reference("t/machine:1"))
        .stdout(std::process::Stdio::null())
        .spawn()
        .unwrap();
    let stalled = proxy.stalled.recv_timeout(Duration::from_secs(60));
    stalled.expect("the child did not pull");
    child.kill().unwrap();
    child.wait().unwrap();

    let store = open(&path).await;
    let machines = store.machines();
    assert_eq!(machines.list().await.unwrap(), [], "nothing half-made is seen");
    let last = fetched(&machines, &reference).await;
    assert!(0 < last.bytes_sent && last.bytes_sent < last.bytes_total, "{last:?}");
    // What was noted of the pull is gone with it: nothing holds the chunks any more.
    machines.remove("m").await.unwrap();
    assert!(packed(&store) < UNIT, "{} bytes are still there", packed(&store));
}

#[tokio::test(flavor = "multi_thread")]
async fn files_are_laid_out_before_a_machine_is_kept() {
    let dir = tempfile::tempdir().unwrap();
    let (_registry, reference) = pushed(dir.path()).await;
    let store = open(&dir.path().join("there")).await;
    let machines = store.machines();
    let found = machines.find(&reference, None).await.unwrap();
    assert_eq!(found.machine().file("memory").unwrap().len(), MEMORY);
    assert_eq!(packed(&store), 0, "only its record is here");

    let fetched = found.fetch(&unwatched()).await.unwrap();
    // Whoever sweeps meanwhile takes nothing of it.
    machines.keep("other", vec![], Notes::new()).await.unwrap();
    machines.remove("other").await.unwrap();
    let out = tempfile::tempfile().unwrap();
    let fetched = fetched.lay_out(vec![("memory".to_owned(), out.try_clone().unwrap())]);
    let fetched = fetched.await.unwrap();

    assert_same(&out, &files(dir.path())[1].1);
    assert_eq!(machines.list().await.unwrap(), []);
    fetched.keep("m").await.unwrap();
    drop(fetched);
    assert_eq!(machines.list().await.unwrap().len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_that_fills_while_files_are_laid_out_gets_everything_back() {
    let dir = tempfile::tempdir().unwrap();
    let (_registry, reference) = pushed(dir.path()).await;
    // Room for the chunks, and for little of the files.
    let disk = SmallDisk::mount(12 << 20);
    let store = open(&disk.0.path().join("store")).await;
    let fetched = store.machines().find(&reference, None).await.unwrap();
    let fetched = fetched.fetch(&unwatched()).await.unwrap();
    let into = std::fs::File::create_new(disk.0.path().join("memory")).unwrap();

    let error = fetched.lay_out(vec![("memory".to_owned(), into)]).await.err().unwrap();

    assert_eq!(error.kind(), ErrorKind::DiskFull, "{}", text(&error));
    assert!(packed(&store) < UNIT, "{} bytes are still there", packed(&store));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_device_has_one_name_on_all_hosts_and_no_other_device_has_it() {
    let (dir, registry) = (tempfile::tempdir().unwrap(), Registry::start());
    let [first, second] = [b"first", b"other"].map(|content| {
        let name = String::from_utf8_lossy(content).into_owned();
        registry.push(&simple(&dir.path().join(&name), content), &format!("t/{name}:1"))
    });
    let (here, there) = (
        open(&dir.path().join("here")).await,
        open(&dir.path().join("there")).await,
    );
    // So that its chunks lie elsewhere there.
    let other = pull(&there, &second).await.unwrap();
    let image = pull(&here, &first).await.unwrap();
    pull(&there, &first).await.unwrap();

    let name = here.device_name(image.digest).await.unwrap();

    assert!(name.starts_with("blake3:"), "{name}");
    assert_eq!(there.device_name(image.digest).await.unwrap(), name);
    assert_ne!(there.device_name(other.digest).await.unwrap(), name);
    assert!(here.device_name(other.digest).await.is_err(), "it is not there");
}
