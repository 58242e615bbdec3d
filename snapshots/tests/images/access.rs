//! Chunks of a layer out of ranged reads of the layer as the registry has it.

use std::sync::Arc;

use flint_snapshots::access::LayerAccess;
use flint_snapshots::images::ErrorKind;
use flint_snapshots::registry::Digest;

use crate::build::{Compression, layout, noise, tar};
use crate::registry::Registry;
use crate::*;

/// A pulled image of one layer of 6 MB: the store, the image's name and the layer's diff id.
async fn pulled(dir: &Path, registry: &Registry, compression: Compression) -> (ImageStore, String, Digest) {
    let content = noise(6_000_000, 70);
    let image = layout(&dir.join("oci"), &[(tar("data", &content), compression)]);
    let reference = registry.push(&image, "t/app:1");
    let store = open(&dir.join("store")).await;
    let diff_id = pull(&store, &reference).await.unwrap().layers[0];
    (store, reference, diff_id)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_host_without_the_layer_reads_any_chunk_of_it_from_the_registry() {
    for compression in [Compression::Gzip, Compression::Zstd, Compression::None] {
        let (dir, registry) = (tempfile::tempdir().unwrap(), Registry::start());
        let (store, reference, diff_id) = pulled(dir.path(), &registry, compression).await;
        let access = store.layer_access(diff_id).await.unwrap().unwrap();
        // What travels to a host that has nothing.
        let access = Arc::new(LayerAccess::decode(&access.encode()).unwrap());
        let other = open(&dir.path().join("other")).await;
        assert_eq!(other.layer_access(diff_id).await.unwrap(), None);
        let source = other.layer_source(&reference, None, Arc::clone(&access)).await.unwrap();
        let ids: Vec<_> = access.chunks.iter().map(|chunk| chunk.id).collect();
        assert!(ids.len() >= 20);
        let read = tokio::task::spawn_blocking(move || {
            let last = source.chunk(ids[ids.len() - 1]).unwrap();
            let mut all = Vec::new();
            source
                .chunks(&ids, |chunk, bytes| {
                    all.push((chunk.id, bytes));
                    Ok(())
                })
                .unwrap();
            (last, all)
        });
        let (last, all) = read.await.unwrap();
        assert_eq!(all.len(), access.chunks.len());
        assert_eq!(
            last,
            store.chunks().get(access.chunks[access.chunks.len() - 1].id).unwrap()
        );
        for (id, bytes) in all {
            assert_eq!(bytes, store.chunks().get(id).unwrap());
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_registry_serves_altered_or_not_at_all_is_an_error() {
    let (dir, mut registry) = (tempfile::tempdir().unwrap(), Registry::start());
    let (store, reference, diff_id) = pulled(dir.path(), &registry, Compression::Gzip).await;
    let access = Arc::new(store.layer_access(diff_id).await.unwrap().unwrap());
    let id = access.chunks[2].id;
    let file = registry.blob_file(access.blob);
    let mut bytes = std::fs::read(&file).unwrap();
    let source = Arc::new(store.layer_source(&reference, None, Arc::clone(&access)).await.unwrap());
    let read = |id| {
        let source = Arc::clone(&source);
        async move { tokio::task::spawn_blocking(move || source.chunk(id)).await.unwrap() }
    };
    assert_eq!(read(id).await.unwrap(), store.chunks().get(id).unwrap());
    bytes[600_000] ^= 1;
    std::fs::write(&file, &bytes).unwrap();
    let error = read(id).await.unwrap_err();
    assert!(error.to_string().contains(&access.blob.to_string()), "{error}");
    registry.kill();
    let error = text(&read(id).await.unwrap_err());
    assert!(error.contains("reach"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_without_the_layer_is_no_source_of_it() {
    let (dir, registry) = (tempfile::tempdir().unwrap(), Registry::start());
    let (store, reference, diff_id) = pulled(dir.path(), &registry, Compression::Gzip).await;
    let access = store.layer_access(diff_id).await.unwrap().unwrap();
    let blob = Digest::of(b"another layer");
    let other = Arc::new(LayerAccess { blob, ..access });
    let Err(error) = store.layer_source(&reference, None, other).await else {
        panic!("a layer that is not there has a source");
    };
    assert_eq!(error.kind(), ErrorKind::NotFound, "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_known_of_a_layer_goes_with_it_and_damage_is_as_good_as_nothing() {
    let (dir, registry) = (tempfile::tempdir().unwrap(), Registry::start());
    let (store, reference, diff_id) = pulled(dir.path(), &registry, Compression::Gzip).await;
    let file = store.chunks().dir().join("accesses").join(diff_id.hex());
    let mut bytes = std::fs::read(&file).unwrap();
    bytes[100] ^= 1;
    std::fs::write(&file, &bytes).unwrap();
    assert_eq!(store.layer_access(diff_id).await.unwrap(), None);
    store.remove(&reference).await.unwrap();
    assert!(!file.exists(), "it outlived its layer");
}
