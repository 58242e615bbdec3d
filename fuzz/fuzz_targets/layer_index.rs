//! An encoded layer index, which may come from another host, with its digest made good. What is taken has one form only.
#![no_main]

use flint_snapshots::fuzzing::seal_index;
use flint_snapshots::image::assemble;
use flint_snapshots::layer::LayerIndex;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let mut index = data.to_vec();
    seal_index(&mut index);
    if let Ok(layer) = LayerIndex::decode(&index) {
        assert_eq!(LayerIndex::decode(&layer.encode()).as_ref(), Ok(&layer));
        let _ = assemble(&[&layer]);
    }
});
