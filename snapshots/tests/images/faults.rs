//! Bad days: each ends in an error that names the thing, and nothing is left.

use flint_snapshots::images::ErrorKind;

use crate::build::{noise, simple};
use crate::proxy::{Fault, Proxy, answer};
use crate::registry::Registry;
use crate::*;

fn is_blob(head: &str, hex: &str) -> bool {
    head.contains(&format!("/blobs/sha256:{hex} "))
}

#[tokio::test(flavor = "multi_thread")]
async fn faults_that_pass_are_not_noticed() {
    let (dir, registry) = (tempfile::tempdir().unwrap(), Registry::start());
    let image = simple(&dir.path().join("oci"), &noise(400_000, 7));
    registry.push(&image, "t/app:1");
    let faults = [
        ("truncated", Fault::Truncate(100_000)),
        ("reset", Fault::Reset(100_000)),
        ("429", answer("429 Too Many Requests", "Retry-After: 0\r\n", "")),
        ("500", answer("500 Internal Server Error", "", "")),
        ("503", answer("503 Service Unavailable", "", "")),
    ];
    for (name, fault) in faults {
        let hex = image.layers[0].hex();
        let proxy = Proxy::start(&registry.address, move |head, number| {
            if is_blob(head, &hex) && number == 1 {
                fault.clone()
            } else {
                Fault::Pass
            }
        });
        let store = open(&dir.path().join(name)).await;
        let pulled = pull(&store, &proxy.reference("t/app:1")).await;
        let pulled = pulled.unwrap_or_else(|error| panic!("{name}: {}", text(&*error)));
        assert_serves(&store, &pulled, &noise(400_000, 7)[..4096]).await;
        assert_eq!(proxy.count(&image.layers[0].hex()), 2, "{name}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn faults_that_stay_name_the_layer_and_leave_nothing() {
    let (dir, registry) = (tempfile::tempdir().unwrap(), Registry::start());
    let image = simple(&dir.path().join("oci"), &noise(400_000, 8));
    registry.push(&image, "t/app:1");
    let layer = image.layers[0];
    let faults = [
        (
            "truncated",
            Fault::Truncate(2_000),
            ErrorKind::Unavailable,
            "cannot be reached",
        ),
        ("reset", Fault::Reset(0), ErrorKind::Unavailable, "cannot be reached"),
        ("stalled", Fault::Stall(2_000), ErrorKind::Unavailable, "silent"),
        ("altered", Fault::Flip(30_000), ErrorKind::BadImage, "altered"),
        (
            "500",
            answer("500 Internal Server Error", "", "oh"),
            ErrorKind::Unavailable,
            "answered 500",
        ),
        (
            "gone",
            answer("404 Not Found", "", ""),
            ErrorKind::NotFound,
            "unknown to registry",
        ),
    ];
    for (name, fault, kind, said) in faults {
        let hex = layer.hex();
        let proxy = Proxy::start(&registry.address, move |head, _| {
            if is_blob(head, &hex) {
                fault.clone()
            } else {
                Fault::Pass
            }
        });
        let path = dir.path().join(name);
        let mut options = options(&path);
        options.registry.timeouts.stall = Duration::from_millis(100);
        options.registry.retries.attempts = 2;
        let store = ImageStore::open(&path, options).await.unwrap();
        let reference = proxy.reference("t/app:1");
        let error = pull(&store, &reference).await.unwrap_err();
        let text = text(&*error);
        assert_eq!(error.kind(), kind, "{name}: {text}");
        for part in [said, &layer.to_string(), &reference] {
            assert!(text.contains(part), "{name}: {part:?} is not in {text:?}");
        }
        assert_clean(&store).await;
        pull(&store, &registry.reference("t/app:1")).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_blob_altered_on_the_registrys_disk_is_found_out() {
    let (dir, registry) = (tempfile::tempdir().unwrap(), Registry::start());
    let image = simple(&dir.path().join("oci"), &noise(200_000, 9));
    let reference = registry.push(&image, "t/app:1");
    let file = registry.blob_file(image.layers[0]);
    let mut bytes = std::fs::read(&file).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 0x10;
    std::fs::write(&file, &bytes).unwrap();
    let store = open(&dir.path().join("store")).await;
    let error = pull(&store, &reference).await.unwrap_err();
    let text = text(&*error);
    assert_eq!(error.kind(), ErrorKind::BadImage, "{text}");
    assert!(
        text.contains(&image.layers[0].to_string()) && text.contains("altered"),
        "{text}"
    );
    assert_clean(&store).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn unknown_images_and_dead_registries_are_told_apart() {
    let (dir, mut registry) = (tempfile::tempdir().unwrap(), Registry::start());
    let store = open(&dir.path().join("store")).await;
    let reference = registry.reference("t/nothing:1");
    let error = pull(&store, &reference).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound);
    assert!(text(&*error).contains(&reference), "{}", text(&*error));

    registry.kill();
    let error = pull(&store, &reference).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable);
    assert!(
        text(&*error).contains(&registry.address) && text(&*error).contains("refused"),
        "{}",
        text(&*error)
    );

    let error = store.pull(request("Not A Name")).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Invalid);
    assert_clean(&store).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn documents_without_end_are_refused_before_they_are_in_memory() {
    let dir = tempfile::tempdir().unwrap();
    let huge = answer("200 OK", "", &format!("\"{}\"", "x".repeat(5 << 20)));
    let proxy = Proxy::start("127.0.0.1:1", move |_, _| huge.clone());
    let store = open(&dir.path().join("store")).await;
    let error = pull(&store, &proxy.reference("t/app:1")).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::BadImage, "{}", text(&*error));
    assert!(text(&*error).contains("larger than"), "{}", text(&*error));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pull_ends_at_its_deadline() {
    let (dir, registry) = (tempfile::tempdir().unwrap(), Registry::start());
    let proxy = Proxy::start(&registry.address, |_, _| Fault::Stall(0));
    let path = dir.path().join("store");
    let mut options = options(&path);
    options.registry.timeouts.deadline = Duration::from_millis(200);
    let store = ImageStore::open(&path, options).await.unwrap();
    let error = pull(&store, &proxy.reference("t/app:1")).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Deadline, "{}", text(&*error));
}
