//! Chunks that are damaged or gone beneath an image in use.

use std::os::unix::fs::FileExt;
use std::sync::Arc;

use flint_snapshots::chunk::ChunkId;
use flint_snapshots::device::{ImageDevice, PackId, ReadError};
use flint_snapshots::images::{DamagedChunk, Delivered, DemandError, Finding};
use flint_snapshots::registry::Digest;

use crate::build::{Compression, Layout, layout, noise, tar};
use crate::proxy::{Fault, Proxy, answer};
use crate::registry::Registry;
use crate::*;

/// A host with an image of one layer of 3 MB.
struct Host {
    dir: tempfile::TempDir,
    store: ImageStore,
    image: Image,
    content: Vec<u8>,
    layout: Layout,
}

fn sample(dir: &Path, compression: Compression) -> (Layout, Vec<u8>) {
    let content = noise(3_000_000, 81);
    (
        layout(&dir.join("oci"), &[(tar("data", &content), compression)]),
        content,
    )
}

impl Host {
    /// Pulled by `reference` of the image that was pushed as it.
    async fn new(dir: tempfile::TempDir, layout: Layout, content: Vec<u8>, pull: PullRequest) -> Self {
        let store = open(&dir.path().join("store")).await;
        let image = store.pull(pull).unwrap().finish().await.unwrap();
        Self {
            dir,
            store,
            image,
            content,
            layout,
        }
    }

    async fn simple(registry: &Registry, compression: Compression) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let (layout, content) = sample(dir.path(), compression);
        let reference = registry.push(&layout, "t/app:1");
        Self::new(dir, layout, content, request(reference)).await
    }

    async fn device(&self) -> ImageDevice {
        let files = self.store.device(self.image.digest).await.unwrap();
        ImageDevice::open(files.table, files.packs).unwrap()
    }

    async fn chunks(&self) -> Vec<ChunkId> {
        let access = self.store.layer_access(self.image.layers[0]).await.unwrap().unwrap();
        access.chunks.iter().map(|chunk| chunk.id).collect()
    }

    /// Alters a byte of chunk `id` where it is stored.
    fn damage(&self, id: ChunkId) {
        let place = self.store.chunks().locate(&[id]).unwrap()[0];
        let path = self.pack(place.pack);
        let pack = std::fs::File::options().read(true).write(true).open(path).unwrap();
        let at = place.offset + u64::from(place.stored_len / 2);
        let mut byte = [0];
        pack.read_exact_at(&mut byte, at).unwrap();
        pack.write_all_at(&[byte[0] ^ 1], at).unwrap();
    }

    fn pack(&self, id: PackId) -> std::path::PathBuf {
        self.store.chunks().dir().join(format!("packs/{:08}.pack", id.0))
    }

    /// Puts zeros over all that the store has of the image.
    fn damage_all(&self) {
        for entry in std::fs::read_dir(self.store.chunks().dir().join("packs")).unwrap() {
            let path = entry.unwrap().path();
            let len = usize::try_from(path.metadata().unwrap().len()).unwrap();
            let pack = std::fs::File::options().write(true).open(path).unwrap();
            pack.write_all_at(&vec![0; len - 16], 16).unwrap();
        }
    }

    /// Reads the device as a VMM does, which asks for what it misses.
    async fn read(&self, device: &ImageDevice) -> Vec<u8> {
        let mut bytes = vec![0; usize::try_from(device.size()).unwrap()];
        while let Err(error) = device.read_at(0, &mut bytes) {
            let id = error.missing_chunk().unwrap();
            let Delivered::Stored(found) = self.store.demand(self.image.digest, id).await.unwrap() else {
                panic!("the store has room")
            };
            device.learn(id, found).unwrap();
        }
        bytes
    }

    fn contains(&self, bytes: &[u8]) -> bool {
        bytes.windows(self.content.len()).any(|window| window == self.content)
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn damage_beneath_an_open_device_is_mended_from_the_registry() {
    for compression in [Compression::Gzip, Compression::Zstd, Compression::None] {
        let registry = Registry::start();
        let host = Host::simple(&registry, compression).await;
        let device = host.device().await;
        host.damage_all();
        let read = device.read_at(0, &mut vec![0; 4096]);
        assert!(read.unwrap_err().missing_chunk().is_some());

        let bytes = host.read(&device).await;

        assert!(host.contains(&bytes), "other bytes came");
        // And for all who come later, with no registry.
        drop(registry);
        for id in host.chunks().await {
            host.store.chunks().get(id).unwrap();
        }
        let Host { dir, store, image, .. } = host;
        drop((device, store));
        let store = open(&dir.path().join("store")).await;
        assert_serves(&store, &image, &host.content).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn fifty_readers_of_a_damaged_part_cost_one_read_of_the_layer() {
    let registry = Registry::start();
    let proxy = Proxy::start(&registry.address, |_, _| Fault::Pass);
    let dir = tempfile::tempdir().unwrap();
    let (layout, content) = sample(dir.path(), Compression::Gzip);
    registry.push(&layout, "t/app:1");
    let host = Host::new(dir, layout, content, request(proxy.reference("t/app:1"))).await;
    let blob = host.layout.layers[0].to_string();
    let before = proxy.count(&blob);
    let ids = host.chunks().await;
    ids.iter().for_each(|id| host.damage(*id));

    let readers = (0..50).map(|number| {
        let (store, image, id) = (host.store.clone(), host.image.digest, ids[number % 2]);
        tokio::spawn(async move { store.demand(image, id).await })
    });
    for reader in readers.collect::<Vec<_>>() {
        assert!(matches!(reader.await.unwrap().unwrap(), Delivered::Stored(_)));
    }

    assert_eq!(proxy.count(&blob) - before, 1, "reads of the layer");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_file_tree_is_made_again_without_a_registry() {
    let registry = Registry::start();
    let host = Host::simple(&registry, Compression::Gzip).await;
    drop(registry);
    let device = host.device().await;
    let layer = host.chunks().await;
    // The superblock, and all other blocks that are no layer's.
    let missing = || match device.read_at(1024, &mut [0; 4]) {
        Err(ReadError::Source { id, .. } | ReadError::Damaged { id, .. }) => Some(id),
        _ => None,
    };
    host.damage_all();
    let id = missing().unwrap();
    assert!(!layer.contains(&id));
    let Delivered::Stored(found) = host.store.demand(host.image.digest, id).await.unwrap() else {
        panic!("the store has room")
    };
    device.learn(id, found).unwrap();
    assert_eq!(missing(), None);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_that_its_registry_no_longer_has_is_told_at_once() {
    let registry = Registry::start();
    let gone = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let is_gone = Arc::clone(&gone);
    let proxy = Proxy::start(&registry.address, move |_, _| match is_gone.load(ORDER) {
        true => answer("404 Not Found", "", ""),
        false => Fault::Pass,
    });
    let dir = tempfile::tempdir().unwrap();
    let (layout, content) = sample(dir.path(), Compression::Gzip);
    registry.push(&layout, "t/app:1");
    let host = Host::new(dir, layout, content, request(proxy.reference("t/app:1"))).await;
    gone.store(true, ORDER);
    let id = host.chunks().await[0];
    host.damage(id);
    let begun = std::time::Instant::now();
    let error = host.store.demand(host.image.digest, id).await.unwrap_err();
    assert!(begun.elapsed() < Duration::from_secs(10), "{}", text(&error));
    assert!(matches!(error, DemandError::Flight(_)), "{error:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_passes_is_waited_out_and_nobody_gets_chunks_of_other_images() {
    let registry = Registry::start();
    let proxy = Proxy::start(&registry.address, |head, _| {
        if head.contains("/blobs/") && FAILURES.fetch_update(ORDER, ORDER, |left| left.checked_sub(1)).is_ok() {
            return answer("503 Service Unavailable", "", "");
        }
        Fault::Pass
    });
    let dir = tempfile::tempdir().unwrap();
    let (layout, content) = sample(dir.path(), Compression::Gzip);
    registry.push(&layout, "t/app:1");
    let host = Host::new(dir, layout, content, request(proxy.reference("t/app:1"))).await;
    let ids = host.chunks().await;
    host.damage(ids[0]);
    // More than the client tries by itself.
    FAILURES.store(5, ORDER);
    assert!(matches!(
        host.store.demand(host.image.digest, ids[0]).await.unwrap(),
        Delivered::Stored(_)
    ));
    assert_eq!(FAILURES.load(ORDER), 0);

    let foreign = host
        .store
        .demand(host.image.digest, ChunkId::of(b"no chunk of it"))
        .await;
    assert!(matches!(foreign, Err(DemandError::Foreign { .. })), "{foreign:?}");
    let nowhere = host.store.demand(Digest::of(b"no image"), ids[0]).await;
    assert!(nowhere.is_err());
}

const ORDER: std::sync::atomic::Ordering = std::sync::atomic::Ordering::SeqCst;
static FAILURES: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);

#[tokio::test(flavor = "multi_thread")]
async fn with_the_registry_down_it_is_tried_until_the_deadline_and_works_later() {
    let dir = tempfile::tempdir().unwrap();
    let (layout, content) = sample(dir.path(), Compression::Gzip);
    let registry = Registry::start();
    registry.push(&layout, "t/app:1");
    let down = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let is_down = Arc::clone(&down);
    let proxy = Proxy::start(&registry.address, move |_, _| match is_down.load(ORDER) {
        true => Fault::Reset(0),
        false => Fault::Pass,
    });
    let mut options = options(&dir.path().join("store"));
    options.demand.deadline = Duration::from_secs(2);
    let store = ImageStore::open(&dir.path().join("store"), options).await.unwrap();
    let image = pull(&store, &proxy.reference("t/app:1")).await.unwrap();
    let host = Host {
        dir,
        store,
        image,
        content,
        layout,
    };
    let id = host.chunks().await[3];
    host.damage(id);
    down.store(true, ORDER);
    let begun = std::time::Instant::now();
    let error = host.store.demand(host.image.digest, id).await.unwrap_err();
    assert!(
        begun.elapsed() >= Duration::from_secs(1),
        "given up after {:?}",
        begun.elapsed()
    );
    assert!(text(&error).contains("within 2s"), "{}", text(&error));
    down.store(false, ORDER);
    host.store.demand(host.image.digest, id).await.unwrap();
    assert_eq!(host.store.chunks().get(id).unwrap().len(), 256 << 10);
}

#[tokio::test(flavor = "multi_thread")]
async fn credentials_of_the_pull_serve_its_chunks_too() {
    let registry = Registry::with_password();
    let dir = tempfile::tempdir().unwrap();
    let (layout, content) = sample(dir.path(), Compression::Gzip);
    let reference = registry.push_with(
        &layout,
        "t/app:1",
        &[
            "--dest-tls-verify=false",
            "--preserve-digests",
            "--dest-creds=user:secret",
        ],
    );
    let pull = with_credentials(reference, "user", "secret");
    let host = Host::new(dir, layout, content, pull).await;
    let ids = host.chunks().await;
    host.damage(ids[0]);
    host.store.demand(host.image.digest, ids[0]).await.unwrap();

    // Another start of the store knows no secrets.
    let id = ids[1];
    host.damage(id);
    let Host { dir, store, image, .. } = host;
    drop(store);
    let store = open(&dir.path().join("store")).await;
    let error = store.demand(image.digest, id).await.unwrap_err();
    assert!(text(&error).contains("credentials"), "{}", text(&error));
    for secret in ["secret", "dXNlcjpzZWNyZXQ"] {
        let found = std::process::Command::new("grep")
            .args(["-rq", secret])
            .arg(dir.path().join("store"))
            .status();
        assert_eq!(found.unwrap().code(), Some(1), "{secret} is on the disk");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_mended_image_survives_the_end_of_its_damaged_pack() {
    let registry = Registry::start();
    let host = Host::simple(&registry, Compression::Gzip).await;
    let old = host.store.chunks().locate(&host.chunks().await).unwrap()[0].pack;
    // Nothing is appended to the pack by a store that is opened again with smaller ones.
    let Host {
        dir,
        store,
        image,
        content,
        ..
    } = host;
    drop(store);
    let path = dir.path().join("store");
    let mut small = options(&path);
    small.store.pack_bytes = 1 << 20;
    let store = ImageStore::open(&path, small.clone()).await.unwrap();
    let host = Host {
        layout: layout(&dir.path().join("again"), &[]),
        dir,
        store,
        image,
        content,
    };
    let device = host.device().await;
    host.damage_all();
    host.read(&device).await;
    let Host {
        dir,
        store,
        image,
        content,
        ..
    } = host;
    drop((device, store));
    // Opening sweeps.
    let store = ImageStore::open(&path, small).await.unwrap();
    assert!(
        !path.join(format!("packs/{:08}.pack", old.0)).exists(),
        "the damaged pack is still there"
    );
    assert_serves(&store, &image, &content).await;
    drop(dir);
}

/// Those chunks that an examination of the whole store finds damaged.
async fn examine(store: &ImageStore) -> Vec<DamagedChunk> {
    let (findings, mut found) = tokio::sync::mpsc::channel(1);
    let listen = async {
        let (mut damaged, mut last) = (Vec::new(), None);
        while let Some(finding) = found.recv().await {
            match finding {
                Finding::Damaged(chunk) => damaged.push(chunk),
                Finding::Progress(done) => last = Some(done),
            }
        }
        (damaged, last)
    };
    let (examined, (damaged, last)) = tokio::join!(store.examine(findings), listen);
    examined.unwrap();
    if damaged.is_empty() {
        let last = last.unwrap();
        assert_eq!((last.chunks, last.bytes), (last.chunks_total, last.bytes_total));
    }
    damaged
}

#[tokio::test(flavor = "multi_thread")]
async fn an_examination_names_damaged_chunks_with_their_images_and_they_are_mended() {
    let registry = Registry::start();
    let host = Host::simple(&registry, Compression::Gzip).await;
    assert_eq!(examine(&host.store).await, []);
    let usage = host.store.usage().await.unwrap();
    assert_eq!((usage.images, usage.image_bytes), (1, usage.chunks.stored_bytes));
    assert!(usage.chunks.raw_bytes >= 3_000_000);

    let ids = host.chunks().await;
    let bad = [ids[0], ids[2]];
    bad.iter().for_each(|id| host.damage(*id));
    let damaged = examine(&host.store).await;
    let mut found: Vec<_> = damaged.iter().map(|chunk| chunk.id).collect();
    found.sort_by_key(|id| ids.iter().position(|other| other == id));
    assert_eq!(found, bad);
    for chunk in &damaged {
        assert_eq!(chunk.images, [host.image.digest]);
        assert!(
            !chunk.reason.is_empty() && !chunk.reason.contains(&chunk.id.to_string()),
            "{}",
            chunk.reason
        );
        host.store.mend(chunk).await.unwrap();
    }
    assert_eq!(examine(&host.store).await, []);
    let bytes = host.read(&host.device().await).await;
    assert!(host.contains(&bytes), "other bytes came");

    let nobodys = DamagedChunk {
        images: Vec::new(),
        ..damaged[0].clone()
    };
    let error = host.store.mend(&nobodys).await.unwrap_err();
    assert!(text(&error).contains("pull the snapshot"), "{}", text(&error));
}
