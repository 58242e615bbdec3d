//! A layer as it is stored: gzip, zstd or plain. What comes out of it is hashed and read as a tar.
#![no_main]

use flint_fuzz::chunks::{Chunks, limits};
use flint_snapshots::fuzzing::compressed_layer;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|stored: &[u8]| {
    let first = compressed_layer(stored, &mut Chunks::default(), &limits());
    assert_eq!(first, compressed_layer(stored, &mut Chunks::default(), &limits()));
});
