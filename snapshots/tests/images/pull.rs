//! Good days.

use flint_snapshots::images::{ErrorKind, PullPolicy, Stage};
use flint_snapshots::registry::HostConfig;

use crate::build::{Compression, layout, noise, simple, tar};
use crate::proxy::{Fault, Proxy};
use crate::registry::Registry;
use crate::*;

#[tokio::test(flavor = "multi_thread")]
async fn layers_of_every_compression_are_pulled_and_served() {
    let (dir, registry) = (tempfile::tempdir().unwrap(), Registry::start());
    let busybox = std::fs::read("/bin/busybox").expect("busybox-static is installed");
    let image = layout(
        &dir.path().join("oci"),
        &[
            (tar("bin/busybox", &busybox), Compression::Gzip),
            (tar("b", &noise(300_000, 1)), Compression::Zstd),
            (tar("c", b"uncompressed"), Compression::None),
        ],
    );
    let reference = registry.push(&image, "t/app:1");
    let store = open(&dir.path().join("store")).await;
    let mut work = store.pull(request(&*reference)).unwrap();
    let mut last = None;
    while let Some(progress) = work.progress().await {
        last = Some(progress);
    }
    let last = last.unwrap();
    assert_eq!((last.stage, last.layers_done, last.layers_total), (Stage::Done, 3, 3));
    assert_eq!(last.bytes_done, last.bytes_total);

    let pulled = work.finish().await.unwrap();
    assert_eq!(pulled.digest, image.digest);
    assert_eq!(pulled.references, std::slice::from_ref(&reference));
    assert_eq!(
        (pulled.config.entrypoint.as_slice(), pulled.config.cmd.as_slice()),
        (&["/bin/app".to_owned()][..], &["--help".to_owned()][..])
    );
    assert_eq!(
        (
            pulled.config.user.as_str(),
            pulled.config.working_dir.as_str(),
            pulled.config.stop_signal.as_str()
        ),
        ("1000:1000", "/srv", "SIGINT")
    );
    assert_eq!(pulled.config.exposed_ports, ["80/tcp"]);
    assert_serves(&store, &pulled, &noise(300_000, 1)[..4096]).await;
    assert_serves(&store, &pulled, b"uncompressed").await;
    for name in [reference, pulled.digest.to_string()] {
        assert_eq!(store.get(&name).await.unwrap().as_ref(), Some(&pulled));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_index_gives_the_image_for_this_platform() {
    let (dir, registry) = (tempfile::tempdir().unwrap(), Registry::start());
    let image = simple(&dir.path().join("oci"), b"amd64");
    let index = serde_json::json!({"schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json", "manifests": [
        {"mediaType": "application/vnd.oci.image.manifest.v1+json", "digest": image.digest, "size": std::fs::metadata(image.path.join("blobs/sha256").join(image.digest.hex())).unwrap().len(), "platform": {"os": "linux", "architecture": "amd64"}},
    ]});
    registry.push(&image, "t/app:1");
    // An index that names other platforms only differs in one word.
    for (platform, fits) in [("amd64", true), ("arm64", false)] {
        let text = index
            .to_string()
            .replace(r#""architecture":"amd64""#, &format!(r#""architecture":"{platform}""#));
        let served = crate::proxy::answer(
            "200 OK",
            "Content-Type: application/vnd.oci.image.index.v1+json\r\n",
            &text,
        );
        let proxy = Proxy::start(&registry.address, move |head, _| {
            if head.contains("/manifests/2 ") {
                served.clone()
            } else {
                Fault::Pass
            }
        });
        let store = open(&dir.path().join(platform)).await;
        match pull(&store, &proxy.reference("t/app:2")).await {
            Ok(pulled) => assert!(fits && pulled.digest == image.digest),
            Err(error) => {
                assert!(!fits && error.kind() == ErrorKind::Unsupported, "{}", text_of(&error));
                assert!(text_of(&error).contains("linux/arm64"), "{}", text_of(&error));
            }
        }
    }
}

fn text_of(error: &ImageError) -> String {
    text(error)
}

#[tokio::test(flavor = "multi_thread")]
async fn those_who_pull_the_same_share_the_work() {
    let (dir, registry) = (tempfile::tempdir().unwrap(), Registry::start());
    let image = simple(&dir.path().join("oci"), &noise(2_000_000, 2));
    registry.push(&image, "t/app:1");
    let proxy = Proxy::start(&registry.address, |_, _| Fault::Pass);
    let store = open(&dir.path().join("store")).await;
    let reference = proxy.reference("t/app:1");
    let works: Vec<_> = (0..8).map(|_| store.pull(request(&*reference)).unwrap()).collect();
    // Three lose their patience: the others do not notice.
    let mut works = works.into_iter();
    works.by_ref().take(3).for_each(drop);
    for work in works {
        assert_eq!(work.finish().await.unwrap().digest, image.digest);
    }
    assert_eq!(proxy.count(&image.layers[0].hex()), 1);
    assert_eq!(proxy.count("/manifests/"), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_here_is_not_fetched_again() {
    let (dir, registry) = (tempfile::tempdir().unwrap(), Registry::start());
    let base = (tar("base", &noise(500_000, 3)), Compression::Gzip);
    let first = layout(
        &dir.path().join("1"),
        &[base.clone(), (tar("a", b"first"), Compression::Gzip)],
    );
    let second = layout(&dir.path().join("2"), &[base, (tar("a", b"second"), Compression::Gzip)]);
    registry.push(&first, "t/app:1");
    registry.push(&second, "t/app:2");
    let proxy = Proxy::start(&registry.address, |_, _| Fault::Pass);
    let store = open(&dir.path().join("store")).await;
    pull(&store, &proxy.reference("t/app:1")).await.unwrap();
    let pulled = pull(&store, &proxy.reference("t/app:2")).await.unwrap();
    assert_eq!(
        proxy.count(&first.layers[0].hex()),
        1,
        "the common layer was fetched twice"
    );
    assert_serves(&store, &pulled, b"second").await;

    let before = proxy.count("");
    let policy = PullPolicy::IfNotPresent;
    store
        .pull(PullRequest {
            policy,
            ..request(proxy.reference("t/app:2"))
        })
        .unwrap()
        .finish()
        .await
        .unwrap();
    assert_eq!(
        proxy.count(""),
        before,
        "the registry was asked for an image that is here"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_removed_image_gives_its_room_back_and_others_stay() {
    let (dir, registry) = (tempfile::tempdir().unwrap(), Registry::start());
    let keep = registry.push(&simple(&dir.path().join("1"), &noise(300_000, 4)), "t/keep:1");
    let gone = registry.push(&simple(&dir.path().join("2"), &noise(3_000_000, 5)), "t/gone:1");
    let store = open(&dir.path().join("store")).await;
    let keep = pull(&store, &keep).await.unwrap();
    let gone = pull(&store, &gone).await.unwrap();

    let files = store.device(gone.digest).await.unwrap();
    let error = store.remove(&gone.references[0]).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InUse);
    assert!(store.get(&gone.references[0]).await.unwrap().unwrap().in_use);
    let DeviceFiles { table, packs, guard } = files;
    drop(guard);

    assert!(store.remove(&gone.references[0]).await.unwrap() > 2_900_000);
    assert_eq!(store.get(&gone.references[0]).await.unwrap(), None);
    assert_eq!(store.remove("t/gone:1").await.unwrap_err().kind(), ErrorKind::NotFound);
    assert_serves(&store, &keep, &noise(300_000, 4)[..4096]).await;
    // Who has the files open does not notice.
    let device = ImageDevice::open(table, packs).unwrap();
    let mut bytes = vec![0; usize::try_from(device.size()).unwrap()];
    device.read_at(0, &mut bytes).unwrap();
    let content = noise(3_000_000, 5);
    assert!(bytes.windows(4096).any(|window| window == &content[..4096]));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_opened_again_has_its_images() {
    let (dir, registry) = (tempfile::tempdir().unwrap(), Registry::start());
    let reference = registry.push(&simple(&dir.path().join("oci"), b"kept"), "t/app:1");
    let store = open(&dir.path().join("store")).await;
    let pulled = pull(&store, &reference).await.unwrap();
    let error = ImageStore::open(&dir.path().join("store"), options(&dir.path().join("store")))
        .await
        .err()
        .unwrap();
    assert!(text(&error).contains("in use by process"), "{}", text(&error));
    drop(store);
    let store = open(&dir.path().join("store")).await;
    assert_eq!(store.list().await.unwrap(), std::slice::from_ref(&pulled));
    assert_serves(&store, &pulled, b"kept").await;

    // A sandbox that was found running has its files; the store learns again that they are in use.
    let first = store.hold(pulled.digest).await.unwrap();
    let second = store.hold(pulled.digest).await.unwrap();
    drop(first);
    assert_eq!(store.remove(&reference).await.unwrap_err().kind(), ErrorKind::InUse);
    drop(second);
    store.remove(&reference).await.unwrap();
    assert_eq!(store.hold(pulled.digest).await.unwrap_err().kind(), ErrorKind::NotFound);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_mirror_is_asked_first_and_the_registry_when_it_fails() {
    let (dir, mut registry, mirror) = (tempfile::tempdir().unwrap(), Registry::start(), Registry::start());
    let image = simple(&dir.path().join("oci"), &noise(100_000, 6));
    let reference = registry.push(&image, "t/app:1");
    mirror.push(&image, "t/app:1");
    let good = Proxy::start(&mirror.address, |_, _| Fault::Pass);
    let bad = Proxy::start(&mirror.address, |head, _| {
        if head.contains("/blobs/") {
            Fault::Flip(50)
        } else {
            Fault::Pass
        }
    });
    for (name, mirrors) in [
        ("altered", vec![bad.address.clone()]),
        (
            "good",
            vec!["127.0.0.1:1".to_owned(), format!("http://{}", good.address)],
        ),
    ] {
        let path = dir.path().join(name);
        let mut options = options(&path);
        options.registry.hosts.insert(
            registry.address.clone(),
            HostConfig {
                plain_http: None,
                mirrors,
            },
        );
        if name == "good" {
            registry.kill();
        }
        let store = ImageStore::open(&path, options).await.unwrap();
        let mut work = store.pull(request(&*reference)).unwrap();
        let mut last = None;
        while let Some(progress) = work.progress().await {
            last = Some(progress);
        }
        let last = last.unwrap();
        assert_eq!(
            last.bytes_done, last.bytes_total,
            "{name}: what a bad source sent was counted"
        );
        let pulled = work.finish().await.unwrap();
        assert_eq!(
            (pulled.digest, pulled.references),
            (image.digest, vec![reference.clone()]),
            "{name}"
        );
    }
    assert!(bad.count("/blobs/") > 0 && good.count("/blobs/") > 0);
}
