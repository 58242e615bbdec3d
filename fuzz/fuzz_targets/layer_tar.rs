//! The tar of a layer, and the image that is made of it: one byte says where the second layer begins.
#![no_main]

use flint_fuzz::chunks::{Chunks, limits};
use flint_snapshots::image::assemble;
use flint_snapshots::layer::{LayerIndex, ingest};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let Some((&cut, tars)) = data.split_first() else { return };
    let (lower, upper) = tars.split_at(tars.len().min(usize::from(cut) * 512));
    let mut chunks = Chunks::default();
    let layers: Vec<_> = [lower, upper]
        .into_iter()
        .filter_map(|tar| ingest(tar, &mut chunks, &limits()).ok())
        .collect();
    for layer in &layers {
        assert_eq!(LayerIndex::decode(&layer.encode()).as_ref(), Ok(layer));
    }
    if let Ok(image) = assemble(&layers) {
        assert_eq!(
            assemble(&layers).as_ref(),
            Ok(&image),
            "the same layers gave another image"
        );
        chunks.read(&image);
    }
});
