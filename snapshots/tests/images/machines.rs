//! Machine snapshots: kept as chunks, laid out again, sent to other hosts.

use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use flint_snapshots::machines::{MachineError, Machines, Notes, Transfer, Watcher};
use flint_snapshots::registry::{Credentials, RegistryError};

use crate::build::{noise, simple};
use crate::crash::SmallDisk;
use crate::proxy::{Fault, Proxy};
use crate::registry::Registry;
use crate::*;

pub const UNIT: u64 = 256 << 10;
pub const MEMORY: u64 = 64 << 20;

/// A state file, and a memory file with holes: 24 units of noise, a page in the middle of a unit, and the last byte.
pub fn make_machine(dir: &Path) -> Vec<(String, File)> {
    let make = |name: &str| {
        let options = File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .to_owned();
        options.open(dir.join(name)).unwrap()
    };
    let (state, memory) = (make("state"), make("memory"));
    state.write_all_at(&noise(20_001, 1), 0).unwrap();
    memory.set_len(MEMORY).unwrap();
    for unit in 0..24 {
        let bytes = noise(usize::try_from(UNIT).unwrap(), 100 + unit);
        memory.write_all_at(&bytes, (unit * 3 + 1) * UNIT).unwrap();
    }
    memory.write_all_at(&[7; 4096], 200 * UNIT + 8192).unwrap();
    memory.write_all_at(&[1], MEMORY - 1).unwrap();
    vec![("state".to_owned(), state), ("memory".to_owned(), memory)]
}

pub fn files(dir: &Path) -> Vec<(String, File)> {
    let open = |name: &str| (name.to_owned(), File::open(dir.join(name)).unwrap());
    vec![open("state"), open("memory")]
}

/// Lays a machine's memory out in a new file.
async fn laid_out(machines: &Machines, name: &str, at: &Path) -> File {
    let options = File::options().read(true).write(true).create_new(true).to_owned();
    let file = options.open(at).unwrap();
    machines
        .lay_out(name, "memory", file.try_clone().unwrap())
        .await
        .unwrap();
    file
}

pub fn assert_same(left: &File, right: &File) {
    assert_eq!(left.metadata().unwrap().len(), right.metadata().unwrap().len());
    let (mut a, mut b) = (vec![0; 1 << 20], vec![0; 1 << 20]);
    for at in (0..left.metadata().unwrap().len()).step_by(1 << 20) {
        left.read_exact_at(&mut a, at).unwrap();
        right.read_exact_at(&mut b, at).unwrap();
        assert!(a == b, "differs in the MiB at {at}");
    }
}

pub fn unwatched() -> Watcher {
    Arc::new(|_| ())
}

/// A watcher, and what it heard last.
pub fn watched() -> (Watcher, Arc<Mutex<Transfer>>) {
    let last = Arc::new(Mutex::new(Transfer::default()));
    let heard = Arc::clone(&last);
    let watcher = move |transfer: Transfer| {
        let mut heard = heard.lock().unwrap();
        // Several tell at a time, each what is true at its moment.
        if transfer.bytes_done >= heard.bytes_done {
            *heard = transfer;
        }
    };
    (Arc::new(watcher), last)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_machine_is_kept_and_laid_out_with_its_holes() {
    let dir = tempfile::tempdir().unwrap();
    let original = make_machine(dir.path());
    let path = dir.path().join("store");
    let notes = Notes::from([("kernel".to_owned(), "6.12".to_owned())]);
    let kept = {
        let machines = open(&path).await.machines();
        machines
            .keep("template-1", files(dir.path()), notes.clone())
            .await
            .unwrap()
    };
    assert_eq!(
        kept.file("memory").unwrap().data_len(),
        26 * UNIT,
        "what is zero is not kept"
    );

    let store = open(&path).await;
    let machines = store.machines();
    assert_eq!(
        machines.list().await.unwrap(),
        [("template-1".to_owned(), kept.clone())]
    );
    assert_eq!(
        (machines.get("template-1").await.unwrap(), kept.notes()),
        (kept.clone(), &notes)
    );
    let out = laid_out(&machines, "template-1", &dir.path().join("out")).await;
    assert_same(&out, &original[1].1);
    let (room, data) = (out.metadata().unwrap().blocks() * 512, 24 * UNIT + 2 * 4096);
    assert!(room <= data + (1 << 20), "{room} bytes for {data} that are not zero");

    assert!(machines.remove("template-1").await.unwrap() >= 24 * UNIT);
    assert!(matches!(
        machines.get("template-1").await,
        Err(MachineError::NotHere(_))
    ));
    assert!(matches!(
        machines.remove("template-1").await,
        Err(MachineError::NotHere(_))
    ));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_kept_or_laid_out_is_named() {
    let dir = tempfile::tempdir().unwrap();
    make_machine(dir.path());
    let machines = open(&dir.path().join("store")).await.machines();
    let refused = machines
        .keep("../x", files(dir.path()), Notes::new())
        .await
        .unwrap_err();
    assert!(matches!(refused, MachineError::Name(_)), "{refused}");
    machines.keep("m", files(dir.path()), Notes::new()).await.unwrap();
    let full = File::options()
        .read(true)
        .write(true)
        .open(dir.path().join("state"))
        .unwrap();
    let refused = machines.lay_out("m", "memory", full).await.unwrap_err();
    assert!(text(&refused).contains("something in it already"), "{}", text(&refused));
    let into = tempfile::tempfile().unwrap();
    let refused = machines.lay_out("m", "disk", into).await.unwrap_err();
    assert!(matches!(refused, MachineError::NoFile { .. }), "{refused}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_machine_reaches_another_host_and_a_changed_one_sends_what_changed() {
    let (dir, registry) = (tempfile::tempdir().unwrap(), Registry::start());
    let original = make_machine(dir.path());
    let (here, there) = (
        open(&dir.path().join("here")).await,
        open(&dir.path().join("there")).await,
    );
    let (here, there) = (here.machines(), there.machines());
    here.keep("m", files(dir.path()), Notes::new()).await.unwrap();
    let reference = registry.reference("t/machine:1");

    let (watcher, last) = watched();
    let digest = here.push("m", &reference, None, &watcher).await.unwrap();
    let all = *last.lock().unwrap();
    assert_eq!((all.bytes_done, all.bytes_sent), (all.bytes_total, all.bytes_total));
    let (watcher, last) = watched();
    let pulled = there.pull("n", &reference, None, &watcher).await.unwrap();
    assert_eq!(pulled, here.get("m").await.unwrap());
    assert_eq!(*last.lock().unwrap(), all);
    let out = laid_out(&there, "n", &dir.path().join("out")).await;
    assert_same(&out, &original[1].1);

    // Again: nothing is sent. By digest, too.
    let (watcher, last) = watched();
    here.push("m", &reference, None, &watcher).await.unwrap();
    assert_eq!(last.lock().unwrap().bytes_sent, 0);
    let by_digest = registry.reference(&format!("t/machine@{digest}"));
    there.pull("o", &by_digest, None, &watcher).await.unwrap();
    assert_eq!(last.lock().unwrap().bytes_sent, 0);

    original[1].1.write_all_at(b"changed", 10 * UNIT).unwrap();
    here.keep("m", files(dir.path()), Notes::new()).await.unwrap();
    let reference = registry.reference("t/machine:2");
    here.push("m", &reference, None, &watcher).await.unwrap();
    let (watcher, last) = watched();
    there.pull("n", &reference, None, &watcher).await.unwrap();
    assert_eq!(last.lock().unwrap().bytes_sent, UNIT, "one chunk");
    let out = laid_out(&there, "n", &dir.path().join("out2")).await;
    assert_same(&out, &original[1].1);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_is_no_machine_and_a_machine_no_image() {
    let (dir, registry) = (tempfile::tempdir().unwrap(), Registry::start());
    make_machine(dir.path());
    let image = registry.push(&simple(&dir.path().join("oci"), b"x"), "t/app:1");
    let store = open(&dir.path().join("store")).await;
    let error = store
        .machines()
        .pull("m", &image, None, &unwatched())
        .await
        .unwrap_err();
    assert!(
        error.to_string().contains("machine snapshot") && error.to_string().contains("image.config"),
        "{error}"
    );
    let machine = registry.reference("t/machine:1");
    store
        .machines()
        .keep("m", files(dir.path()), Notes::new())
        .await
        .unwrap();
    store.machines().push("m", &machine, None, &unwatched()).await.unwrap();
    let error = pull(&store, &machine).await.unwrap_err();
    assert_eq!(
        error.kind(),
        flint_snapshots::images::ErrorKind::Unsupported,
        "{}",
        text(&*error)
    );
    let error = store
        .machines()
        .pull("n", &registry.reference("t/none:1"), None, &unwatched())
        .await
        .unwrap_err();
    assert!(error.to_string().contains("t/none:1"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_push_shows_credentials_and_says_so_where_it_has_none() {
    let (dir, registry) = (tempfile::tempdir().unwrap(), Registry::with_password());
    make_machine(dir.path());
    let machines = open(&dir.path().join("store")).await.machines();
    machines.keep("m", files(dir.path()), Notes::new()).await.unwrap();
    let reference = registry.reference("t/machine:1");
    let error = machines.push("m", &reference, None, &unwatched()).await.unwrap_err();
    assert!(
        matches!(error, MachineError::Registry(RegistryError::CredentialsNeeded { .. })),
        "{error}"
    );
    let login = |password: &str| {
        Some(Credentials {
            username: "user".to_owned(),
            password: password.to_owned(),
        })
    };
    let error = machines
        .push("m", &reference, login("guess"), &unwatched())
        .await
        .unwrap_err();
    assert!(
        matches!(error, MachineError::Registry(RegistryError::WrongCredentials { .. })),
        "{error}"
    );
    machines
        .push("m", &reference, login("secret"), &unwatched())
        .await
        .unwrap();
    machines
        .pull("n", &reference, login("secret"), &unwatched())
        .await
        .unwrap();
}

/// What the network does to a bundle once, or always.
#[tokio::test(flavor = "multi_thread")]
async fn a_bundle_that_breaks_off_goes_on_and_one_that_is_altered_is_refused() {
    let (dir, registry) = (tempfile::tempdir().unwrap(), Registry::start());
    let original = make_machine(dir.path());
    let here = open(&dir.path().join("here")).await.machines();
    here.keep("m", files(dir.path()), Notes::new()).await.unwrap();
    here.push("m", &registry.reference("t/machine:1"), None, &unwatched())
        .await
        .unwrap();
    for (name, always, good) in [("broken", false, true), ("altered", true, false)] {
        // The first blob is the record; it is let through.
        let blobs = AtomicUsize::new(0);
        let proxy = Proxy::start(&registry.address, move |head, _| {
            let of_blob = head.starts_with("GET") && head.contains("/blobs/");
            match of_blob.then(|| blobs.fetch_add(1, Ordering::SeqCst)) {
                Some(1) if !always => Fault::Reset(120_000),
                Some(1..) if always => Fault::Flip(120_000),
                _ => Fault::Pass,
            }
        });
        let there = open(&dir.path().join(name)).await;
        let pulled = there
            .machines()
            .pull("m", &proxy.reference("t/machine:1"), None, &unwatched())
            .await;
        if good {
            pulled.unwrap();
            let out = laid_out(&there.machines(), "m", &dir.path().join("out")).await;
            assert_same(&out, &original[1].1);
        } else {
            let error = pulled.unwrap_err();
            assert!(matches!(error, MachineError::Bundle { .. }), "{}", text(&error));
            assert!(matches!(there.machines().get("m").await, Err(MachineError::NotHere(_))));
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_ends_a_pull_and_gives_back_what_came() {
    let (dir, registry) = (tempfile::tempdir().unwrap(), Registry::start());
    make_machine(dir.path());
    let here = open(&dir.path().join("here")).await.machines();
    here.keep("m", files(dir.path()), Notes::new()).await.unwrap();
    let reference = registry.reference("t/machine:1");
    here.push("m", &reference, None, &unwatched()).await.unwrap();

    let disk = SmallDisk::mount(6 << 20);
    let there = open(&disk.0.path().join("store")).await;
    let error = there
        .machines()
        .pull("m", &reference, None, &unwatched())
        .await
        .unwrap_err();
    assert!(text(&error).contains("no room"), "{}", text(&error));
    assert_eq!(there.machines().list().await.unwrap(), []);
    let packs = std::fs::read_dir(there.chunks().dir().join("packs")).unwrap();
    let left: u64 = packs.map(|pack| pack.unwrap().metadata().unwrap().len()).sum();
    assert!(left < UNIT, "{left} bytes are still there");
}
