//! Layers that whole images are attacked with. What a tar can do to its reader is tested beside the reader; here is what comes
//! of it: an error that names the layer and what to do, and nothing left.

use std::io::Write;

use flint_snapshots::images::ErrorKind;
use flint_snapshots::registry::Digest;

use crate::build::{Compression, layout, noise, tar};
use crate::*;

/// `bytes` as gzip makes them smallest.
fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::best());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

/// A header for a file of so many MiB.
fn header_of_zeros(mebibytes: u64) -> Vec<u8> {
    let mut header = tar::Header::new_gnu();
    header.set_path("zeros").unwrap();
    header.set_size(mebibytes << 20);
    header.set_mode(0o644);
    header.set_cksum();
    header.as_bytes().to_vec()
}

/// Makes an OCI layout of one gzip layer that is given as it is stored.
fn stored_layout(path: &Path, layer: &[u8], diff_id: Digest) {
    let made = layout(path, &[(tar("replaced", b""), Compression::Gzip)]);
    let blobs = path.join("blobs/sha256");
    let read = |digest: Digest| -> serde_json::Value {
        serde_json::from_slice(&std::fs::read(blobs.join(digest.hex())).unwrap()).unwrap()
    };
    let put = |bytes: &[u8]| {
        let digest = Digest::of(bytes);
        std::fs::write(blobs.join(digest.hex()), bytes).unwrap();
        serde_json::json!({"digest": digest, "size": bytes.len()})
    };
    let merge = |target: &mut serde_json::Value, from: serde_json::Value| {
        target
            .as_object_mut()
            .unwrap()
            .extend(from.as_object().unwrap().clone());
    };
    let mut manifest = read(made.digest);
    let mut config = read(manifest["config"]["digest"].as_str().unwrap().parse().unwrap());
    config["rootfs"]["diff_ids"] = serde_json::json!([diff_id]);
    merge(&mut manifest["config"], put(config.to_string().as_bytes()));
    merge(&mut manifest["layers"][0], put(layer));
    let mut index: serde_json::Value =
        serde_json::from_slice(&std::fs::read(path.join("index.json")).unwrap()).unwrap();
    merge(&mut index["manifests"][0], put(manifest.to_string().as_bytes()));
    std::fs::write(path.join("index.json"), index.to_string()).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_gzip_bomb_ends_at_the_limit_and_says_so() {
    let dir = tempfile::tempdir().unwrap();
    // 1.1 GiB out of a megabyte, in as many gzip members as MiB: beyond the GiB that any layer may have, and more than 200
    // times its stored size.
    let zeros = gzip(&vec![0; 1 << 20]);
    let layer = [gzip(&header_of_zeros(1100)), zeros.repeat(1100)].concat();
    assert!(layer.len() < (1 << 30) / 200, "{} bytes are no bomb", layer.len());
    let diff_id = Digest::of(b"it does not come to that");
    stored_layout(&dir.path().join("oci"), &layer, diff_id);
    let store = open(&dir.path().join("store")).await;
    let error = store
        .import(dir.path().join("oci"), Some("x"))
        .unwrap()
        .finish()
        .await
        .unwrap_err();
    let text = text(&*error);
    assert_eq!(error.kind(), ErrorKind::BadImage, "{text}");
    for part in [
        "more than 1073741824 bytes",
        "limit",
        "bomb",
        &Digest::of(&layer).to_string(),
    ] {
        assert!(text.contains(part), "{part:?} is not in {text:?}");
    }
    assert_clean(&store).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_layer_that_was_cut_before_it_was_pushed_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let content = noise(200_000, 60);
    let unpacked = tar("a", &content);
    let (whole, diff_id) = (gzip(&unpacked), Digest::of(&unpacked));
    // Its digest is that of what is left: only gzip and the tar can tell.
    for (name, len) in [
        ("in the header", 5),
        ("in the middle", whole.len() / 2),
        ("in the checksum", whole.len() - 4),
    ] {
        let layer = &whole[..len];
        stored_layout(&dir.path().join(name), layer, diff_id);
        let store = open(&dir.path().join(format!("store {name}"))).await;
        let error = store
            .import(dir.path().join(name), Some("x"))
            .unwrap()
            .finish()
            .await
            .unwrap_err();
        let text = text(&*error);
        assert_eq!(error.kind(), ErrorKind::BadImage, "{name}: {text}");
        assert!(text.contains(&Digest::of(layer).to_string()), "{name}: {text}");
        assert_clean(&store).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_entry_that_cannot_be_unpacked_names_image_layer_and_entry() {
    let dir = tempfile::tempdir().unwrap();
    let mut builder = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_gnu();
    header.set_entry_type(tar::EntryType::Link);
    header.set_size(0);
    builder.append_link(&mut header, "b", "nowhere").unwrap();
    let bad = builder.into_inner().unwrap();
    layout(
        &dir.path().join("oci"),
        &[(tar("a", b"x"), Compression::Gzip), (bad, Compression::Gzip)],
    );
    let store = open(&dir.path().join("store")).await;
    let error = store
        .import(dir.path().join("oci"), Some("some/app:1"))
        .unwrap()
        .finish()
        .await
        .unwrap_err();
    let text = text(&*error);
    assert_eq!(error.kind(), ErrorKind::BadImage, "{text}");
    for part in [
        "some/app:1",
        "\"b\" of layer 2",
        "hard link to \"nowhere\"",
        "does not exist",
    ] {
        assert!(text.contains(part), "{part:?} is not in {text:?}");
    }
    assert_clean(&store).await;
}
