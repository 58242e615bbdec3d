//! The documents that registries have: OCI's, docker's, old ones, and what is no image at all.

use flint_snapshots::images::ErrorKind;
use serde_json::{Value, json};

use crate::build::{Compression, layout, simple, tar};
use crate::proxy::{Fault, Proxy, answer};
use crate::registry::Registry;
use crate::*;

const DOCKER_LIST: &str = "application/vnd.docker.distribution.manifest.list.v2+json";
const OCI_INDEX: &str = "application/vnd.oci.image.index.v1+json";
const DOCKER_MANIFEST: &str = "application/vnd.docker.distribution.manifest.v2+json";
const OCI_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";

#[tokio::test(flavor = "multi_thread")]
async fn docker_manifests_and_lists_are_pulled_beside_ocis() {
    let (dir, registry) = (tempfile::tempdir().unwrap(), Registry::start());
    let image = simple(&dir.path().join("oci"), b"one content");
    registry.push(&image, "t/app:oci");
    registry.push_with(&image, "t/app:docker", &["--dest-tls-verify=false", "--format", "v2s2"]);
    let store = open(&dir.path().join("store")).await;
    let docker = pull(&store, &registry.reference("t/app:docker")).await.unwrap();
    assert_ne!(docker.digest, image.digest, "skopeo did not convert the manifest");
    assert_serves(&store, &docker, b"one content").await;

    for (tag, list, manifest, digest) in [
        ("list", DOCKER_LIST, DOCKER_MANIFEST, docker.digest),
        ("index", OCI_INDEX, OCI_MANIFEST, image.digest),
    ] {
        let size = std::fs::metadata(registry.blob_file(digest)).unwrap().len();
        let entry = |architecture: &str| json!({"mediaType": manifest, "digest": digest, "size": size, "platform": {"os": "linux", "architecture": architecture}});
        let document = |entries: Value| json!({"schemaVersion": 2, "mediaType": list, "manifests": entries});
        let both = registry.put_manifest(
            &format!("t/app:{tag}"),
            list,
            &document(json!([entry("arm64"), entry("amd64")])),
        );
        assert_eq!(pull(&store, &both).await.unwrap().digest, digest, "{tag}");
        let other = registry.put_manifest(&format!("t/app:{tag}-arm"), list, &document(json!([entry("arm64")])));
        let error = pull(&store, &other).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unsupported, "{}", text(&*error));
        assert!(text(&*error).contains("only for linux/arm64"), "{}", text(&*error));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_no_image_for_us_is_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(&dir.path().join("store")).await;
    let blob = json!({"mediaType": "application/vnd.oci.image.config.v1+json", "digest": format!("sha256:{}", "0".repeat(64)), "size": 7});
    let layer = |media_type: &str| {
        let layer = json!({"mediaType": media_type, "digest": blob["digest"], "size": 7});
        json!({"schemaVersion": 2, "mediaType": OCI_MANIFEST, "config": blob, "layers": [layer]})
    };
    let cases = [
        (
            json!({"schemaVersion": 1, "name": "t/app", "tag": "1", "fsLayers": [], "history": [], "signatures": []}),
            "schema version 1",
        ),
        (
            json!({"schemaVersion": 2, "mediaType": "application/vnd.example.thing+json"}),
            "application/vnd.example.thing+json",
        ),
        (
            layer("application/vnd.example.squashfs"),
            "application/vnd.example.squashfs",
        ),
        (layer("application/vnd.oci.image.layer.v1.tar+lz4"), "tar+lz4"),
        (
            layer("application/vnd.oci.image.layer.v1.tar+gzip+encrypted"),
            "gzip+encrypted",
        ),
        (
            layer("application/vnd.docker.image.rootfs.foreign.diff.tar.gzip"),
            "rootfs.foreign",
        ),
    ];
    for (document, named) in cases {
        let served = answer("200 OK", "Content-Type: application/json\r\n", &document.to_string());
        let registry = Proxy::start("127.0.0.1:1", move |_, _| served.clone());
        let error = pull(&store, &registry.reference("t/app:1")).await.unwrap_err();
        let text = text(&*error);
        assert_eq!(error.kind(), ErrorKind::Unsupported, "{text}");
        assert!(text.contains(named) && text.contains("t/app:1"), "{named}: {text}");
        assert_eq!(
            registry.count("/blobs/"),
            0,
            "{named}: it was fetched before it was refused"
        );
    }
    assert_clean(&store).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn documents_with_other_bytes_than_their_digests_are_refused() {
    let (dir, registry) = (tempfile::tempdir().unwrap(), Registry::start());
    let image = layout(&dir.path().join("oci"), &[(tar("a", b"content"), Compression::Gzip)]);
    registry.push(&image, "t/app:1");
    let manifest = std::fs::read(image.path.join("blobs/sha256").join(image.digest.hex())).unwrap();
    let manifest: Value = serde_json::from_slice(&manifest).unwrap();
    let configuration = manifest["config"]["digest"].as_str().unwrap().to_owned();
    for (what, part, at) in [
        ("manifest", format!("/manifests/{}", image.digest), 30),
        ("configuration", format!("/blobs/{configuration}"), 30),
    ] {
        let altered = Proxy::start(&registry.address, move |head, _| {
            if head.contains(&part) {
                Fault::Flip(at)
            } else {
                Fault::Pass
            }
        });
        let store = open(&dir.path().join(what)).await;
        let reference = altered.reference(&format!("t/app@{}", image.digest));
        let error = pull(&store, &reference).await.unwrap_err();
        let text = text(&*error);
        assert_eq!(error.kind(), ErrorKind::BadImage, "{text}");
        for part in [what, "altered", "push it again", &altered.address] {
            assert!(text.contains(part), "{part:?} is not in {text:?}");
        }
        assert_clean(&store).await;
    }
}
