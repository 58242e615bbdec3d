//! How a layer can be read in part, which may come from another host, with its digest made good, and a layer to read by it.
//! What is taken has one form only, and what comes out has the name that was asked for.
#![no_main]

use std::io::{self, Read};
use std::ops::Range;
use std::sync::Arc;

use flint_snapshots::access::{BlobRanges, LayerAccess, LayerSource};
use flint_snapshots::chunk::ChunkId;
use flint_snapshots::fuzzing::seal_index;
use libfuzzer_sys::fuzz_target;

struct Bytes(Vec<u8>);

impl BlobRanges for Bytes {
    fn open(&self, range: Range<u64>) -> io::Result<Box<dyn Read + '_>> {
        let end = usize::try_from(range.end).map_or(self.0.len(), |end| end.min(self.0.len()));
        let start = usize::try_from(range.start).map_or(end, |start| start.min(end));
        Ok(Box::new(&self.0[start..end]))
    }
}

// Two bytes say how long the access is; the layer follows it.
fuzz_target!(|data: &[u8]| {
    let Some((len, rest)) = data.split_first_chunk::<2>() else {
        return;
    };
    let (access, layer) = rest.split_at(usize::from(u16::from_le_bytes(*len)).min(rest.len()));
    let mut access = access.to_vec();
    seal_index(&mut access);
    let Ok(access) = LayerAccess::decode(&access) else {
        return;
    };
    assert_eq!(LayerAccess::decode(&access.encode()).as_ref(), Ok(&access));
    let ids: Vec<_> = access.chunks.iter().map(|chunk| chunk.id).take(8).collect();
    let source = LayerSource::new(Arc::new(access), vec![Box::new(Bytes(layer.to_vec()))]);
    for id in ids {
        if let Ok(bytes) = source.chunk(id) {
            assert_eq!(ChunkId::of(&bytes), id);
        }
    }
});
