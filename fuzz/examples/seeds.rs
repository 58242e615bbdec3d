//! Writes the binary seeds again, after a format has changed: `hack/fuzz --seeds`. The others are written by hand.

use std::fs;
use std::path::Path;

use flint_fuzz::chunks::{Chunks, limits};
use flint_snapshots::device::{PackId, PackLocation, Table};
use flint_snapshots::fuzzing::layer_access;
use flint_snapshots::image::assemble;
use flint_snapshots::layer::ingest;

fn main() -> std::io::Result<()> {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus");
    let tar = fs::read(corpus.join("layer_tar/everything.bin"))?;
    let mut chunks = Chunks::default();
    // The first byte says where a second layer begins.
    let layer = ingest(&tar[1..], &mut chunks, &limits()).map_err(std::io::Error::other)?;
    fs::create_dir_all(corpus.join("layer_index"))?;
    fs::write(corpus.join("layer_index/everything.bin"), layer.encode())?;
    fs::create_dir_all(corpus.join("layer_access"))?;
    for seed in fs::read_dir(corpus.join("layer_compressed"))? {
        let seed = seed?;
        let layer = fs::read(seed.path())?;
        let Some(access) = layer_access(&layer, &mut Chunks::default(), &limits()) else {
            continue;
        };
        let len = u16::try_from(access.len()).map_err(std::io::Error::other)?;
        let whole = [&len.to_le_bytes(), &access[..], &layer].concat();
        fs::write(corpus.join("layer_access").join(seed.file_name()), whole)?;
    }
    let image = assemble(&[&layer]).map_err(std::io::Error::other)?;
    let table = Table::build(&image, |id| {
        let chunk = image.chunks().iter().find(|chunk| chunk.id == *id)?;
        Some(PackLocation {
            pack: PackId(1),
            offset: 0,
            stored_len: chunk.len,
            raw_len: chunk.len,
        })
    });
    let table = table.map_err(std::io::Error::other)?;
    let reads = [[0u8; 8].as_slice(), &[0, 16]].concat().repeat(4);
    fs::create_dir_all(corpus.join("device_table"))?;
    fs::write(
        corpus.join("device_table/everything.bin"),
        [table.as_bytes(), &reads].concat(),
    )
}
