//! Images from files.

use flint_snapshots::images::ErrorKind;

use crate::build::{Compression, layout, noise, simple, tar};
use crate::registry::skopeo;
use crate::*;

#[tokio::test(flavor = "multi_thread")]
async fn layouts_and_archives_give_the_same_device() {
    let dir = tempfile::tempdir().unwrap();
    let image = layout(
        &dir.path().join("oci"),
        &[
            (tar("a", &noise(100_000, 20)), Compression::Gzip),
            (tar("b", b"upper"), Compression::Gzip),
        ],
    );
    let oci_archive = dir.path().join("oci.tar");
    let docker_archive = dir.path().join("docker.tar");
    let source = format!("oci:{}", image.path.display());
    skopeo(&[
        "copy",
        &source,
        &format!("oci-archive:{}:some/app:1", oci_archive.display()),
    ]);
    skopeo(&[
        "copy",
        &source,
        &format!("docker-archive:{}:some/app:1", docker_archive.display()),
    ]);
    let mut devices = Vec::new();
    for (path, name) in [
        (&image.path, Some("some/app:1")),
        (&oci_archive, None),
        (&docker_archive, None),
    ] {
        let store = open(&dir.path().join(format!("store{}", devices.len()))).await;
        let imported = store.import(path.clone(), name).unwrap().finish().await;
        let imported = imported.unwrap_or_else(|error| panic!("{}: {}", path.display(), text(&*error)));
        assert_eq!(imported.references, ["docker.io/some/app:1"], "{}", path.display());
        assert_eq!(imported.config.entrypoint, ["/bin/app"]);
        devices.push(read_device(store.device(imported.digest).await.unwrap()));
    }
    assert!(devices.windows(2).all(|pair| pair[0] == pair[1]));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_no_image_or_a_damaged_one_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(&dir.path().join("store")).await;
    let image = simple(&dir.path().join("oci"), &noise(50_000, 21));
    let layer = image.path.join("blobs/sha256").join(image.layers[0].hex());
    let mut bytes = std::fs::read(&layer).unwrap();
    bytes[20_000] ^= 1;
    std::fs::write(&layer, bytes).unwrap();
    std::fs::write(dir.path().join("text"), "not a tar").unwrap();
    std::fs::create_dir(dir.path().join("empty")).unwrap();
    for (name, kind) in [
        ("text", ErrorKind::Invalid),
        ("empty", ErrorKind::Invalid),
        ("missing", ErrorKind::Invalid),
        ("oci", ErrorKind::BadImage),
    ] {
        let error = store
            .import(dir.path().join(name), Some("x"))
            .unwrap()
            .finish()
            .await
            .unwrap_err();
        assert_eq!(error.kind(), kind, "{name}: {}", text(&*error));
        assert!(name == "oci" || text(&*error).contains(name), "{}", text(&*error));
    }
    assert_clean(&store).await;
}
