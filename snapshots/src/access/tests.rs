use std::cell::Cell;
use std::io::{self, Read, Write};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use flate2::{Compression as Level, GzBuilder};

use super::{BlobRanges, Compression, LayerAccess, LayerSource, LayerSourceError};
use crate::chunk::{ChunkId, ChunkSink, SinkError};
use crate::images::ingest::{self, Expected};
use crate::layer::{DecodeError, LayerIndex, seal};
use crate::registry::Digest;
use crate::testing::{Numbers, TarBuilder};

/// Keeps what it got, in order.
#[derive(Default)]
struct Kept(Vec<(ChunkId, Vec<u8>)>);

impl ChunkSink for Kept {
    fn put(&mut self, data: &[u8]) -> Result<ChunkId, SinkError> {
        let id = ChunkId::of(data);
        if !self.0.iter().any(|(known, _)| *known == id) {
            self.0.push((id, data.to_vec()));
        }
        Ok(id)
    }
}

/// A blob in memory that counts what is read of it.
#[derive(Clone)]
struct Memory(Arc<Vec<u8>>, Arc<AtomicU64>, Arc<AtomicU64>);

impl Memory {
    fn new(bytes: &[u8]) -> Self {
        Self(Arc::new(bytes.to_vec()), Arc::default(), Arc::default())
    }

    fn asked(&self) -> u64 {
        self.1.load(Ordering::Relaxed)
    }

    fn bytes(&self) -> u64 {
        self.2.load(Ordering::Relaxed)
    }
}

impl BlobRanges for Memory {
    fn open(&self, range: Range<u64>) -> io::Result<Box<dyn Read + '_>> {
        self.1.fetch_add(1, Ordering::Relaxed);
        self.2.fetch_add(range.end - range.start, Ordering::Relaxed);
        let range = usize::try_from(range.start).unwrap()..usize::try_from(range.end).unwrap();
        self.0
            .get(range)
            .map(|bytes| Box::new(bytes) as Box<dyn Read>)
            .ok_or_else(|| io::ErrorKind::UnexpectedEof.into())
    }
}

/// A tree with files of all sizes, folders, a sparse file and one that is there twice.
fn tree(seed: u64, len: usize) -> Vec<u8> {
    let mut numbers = Numbers::new(seed);
    let mut tar = TarBuilder::default();
    let mut written = 0;
    let mut number = 0;
    while written < len {
        let size = match numbers.below(8) {
            0 => numbers.below(1_500_000),
            1 | 2 => numbers.below(200_000),
            _ => numbers.below(9000),
        };
        let mut data = numbers.bytes(size);
        if numbers.below(4) == 0 {
            // What does not compress, and so is stored or badly coded.
            data.iter_mut().for_each(|byte| *byte = numbers.next().to_le_bytes()[7]);
        }
        tar.file(&format!("dir{}/{number}", number % 7), &data);
        if number == 3 {
            tar.file("again", &data).dir("empty");
            tar.pax("GNU.sparse.size", b"900000")
                .pax("GNU.sparse.map", b"10,500,300000,400");
            tar.file("sparse", &numbers.bytes(900));
        }
        written += size;
        number += 1;
    }
    tar.finish()
}

fn gzip(data: &[u8], level: u32) -> Vec<u8> {
    let mut encoder = GzBuilder::new()
        .filename("layer.tar")
        .write(Vec::new(), Level::new(level));
    encoder.write_all(data).unwrap();
    encoder.finish().unwrap()
}

/// gzip with zlib's parameters for what flate2 does not offer.
fn gzip_with(data: &[u8], strategy: zlib::Strategy) -> Vec<u8> {
    zlib::gzip(data, strategy)
}

fn members(data: &[u8], len: usize) -> Vec<u8> {
    data.chunks(len).flat_map(|part| gzip(part, 6)).collect()
}

fn frames(data: &[u8], len: usize) -> Vec<u8> {
    let skippable = [0x50, 0x2a, 0x4d, 0x18, 3, 0, 0, 0, 1, 2, 3];
    let frames = data.chunks(len).flat_map(|part| zstd::bulk::compress(part, 3).unwrap());
    frames.chain(skippable).collect()
}

fn ingested(tar: &[u8], stored: &[u8]) -> (LayerIndex, LayerAccess, Kept) {
    let expected = Expected {
        blob: Some((Digest::of(stored), stored.len() as u64)),
        diff_id: Digest::of(tar),
    };
    let mut kept = Kept::default();
    let counted = Cell::new(0);
    let advanced = |bytes| counted.set(counted.get() + bytes);
    let (index, access) = ingest::layer(stored, stored.len() as u64, expected, &mut kept, &advanced).unwrap();
    (index, access, kept)
}

fn source(access: &LayerAccess, blob: &Memory) -> LayerSource {
    LayerSource::new(Arc::new(access.clone()), vec![Box::new(blob.clone())])
}

/// A layer in each form that registries have.
fn forms(tar: &[u8]) -> Vec<(&'static str, Vec<u8>)> {
    vec![
        ("plain", tar.to_vec()),
        ("gzip 1", gzip(tar, 1)),
        ("gzip 6", gzip(tar, 6)),
        ("gzip 9", gzip(tar, 9)),
        ("stored blocks", gzip(tar, 0)),
        ("fixed codes", gzip_with(tar, zlib::Strategy::Fixed)),
        ("a window of 512 bytes", gzip_with(tar, zlib::Strategy::TinyWindow)),
        ("small members", members(tar, 70_000)),
        ("large members", members(tar, 5_500_000)),
        ("zstd frames", frames(tar, 300_000)),
        ("one zstd frame", zstd::bulk::compress(tar, 3).unwrap()),
    ]
}

#[test]
fn each_chunk_read_alone_is_what_the_ingest_saw_in_each_form() {
    let tar = tree(1, 6 << 20);
    let (plain_index, ..) = ingested(&tar, &tar);
    for (form, stored) in forms(&tar) {
        let (index, access, kept) = ingested(&tar, &stored);
        assert_eq!(index, plain_index, "{form}");
        let access = LayerAccess::decode(&access.encode()).unwrap();
        let blob = Memory::new(&stored);
        let source = source(&access, &blob);
        assert_eq!(kept.0.len(), access.chunks.len(), "{form}");
        // What does not stop in between is slow to look into; the others differ little.
        let step = match form {
            "one zstd frame" => 20,
            "gzip 6" | "small members" => 1,
            _ => 4,
        };
        for (id, bytes) in kept.0.iter().step_by(step) {
            assert_eq!(source.chunk(*id).unwrap(), *bytes, "{form}");
        }
    }
}

#[test]
fn checkpoints_are_close_enough_and_small() {
    let tar = tree(2, 9 << 20);
    for (form, stored) in forms(&tar) {
        let (_, access, _) = ingested(&tar, &stored);
        let limit = match access.compression {
            Compression::Plain => 0,
            // Nowhere to begin but at the start: one frame; one block, which is what zlib-rs makes at level 1.
            _ if ["one zstd frame", "gzip 1"].contains(&form) => tar.len() as u64,
            Compression::Gzip => 5 << 20,
            Compression::Zstd => (1 << 20) + 300_000,
        };
        assert!(access.longest_span() <= limit, "{form}: {}", access.longest_span());
        let windows = access.windows_len();
        assert!(windows * 50 <= stored.len(), "{form}: {windows} of {}", stored.len());
    }
}

#[test]
fn a_chunk_costs_a_span_and_neighbours_are_one_read() {
    let tar = tree(3, 20 << 20);
    let stored = gzip(&tar, 6);
    let (_, access, kept) = ingested(&tar, &stored);
    let blob = Memory::new(&stored);
    let source = source(&access, &blob);
    source.chunk(kept.0[kept.0.len() / 2].0).unwrap();
    assert_eq!(blob.asked(), 1);
    assert!(blob.bytes() < 6 << 20, "{} bytes for one chunk", blob.bytes());
    let ids: Vec<_> = kept.0.iter().map(|(id, _)| *id).collect();
    let mut given = Vec::new();
    let blob = Memory::new(&stored);
    let all = LayerSource::new(Arc::new(access), vec![Box::new(blob.clone())]);
    all.chunks(&ids, |chunk, bytes| {
        given.push((chunk.id, bytes));
        Ok(())
    })
    .unwrap();
    given.sort_unstable();
    let mut expected = kept.0.clone();
    expected.sort_unstable();
    assert_eq!(given, expected);
    assert!(blob.asked() <= 16, "{} reads", blob.asked());
    assert!(
        blob.bytes() < 2 * stored.len() as u64,
        "{} of {}",
        blob.bytes(),
        stored.len()
    );
}

/// Every chunk is right or an error; how many were errors.
fn faults(source: &LayerSource, kept: &Kept) -> usize {
    let read = kept.0.iter().map(|(id, bytes)| match source.chunk(*id) {
        Ok(found) => {
            assert_eq!(found, *bytes, "wrong bytes were given out");
            0
        }
        Err(error) => {
            assert!(error.to_string().contains("sha256:"), "{error} does not name the layer");
            1
        }
    });
    read.sum()
}

#[test]
fn altered_blobs_windows_and_places_are_errors_and_never_wrong_bytes() {
    let tar = tree(4, 5 << 20);
    let mut numbers = Numbers::new(4);
    for (form, stored) in [
        ("gzip", gzip(&tar, 6)),
        ("members", members(&tar, 70_000)),
        ("frames", frames(&tar, 300_000)),
        ("plain", tar.clone()),
    ] {
        let (_, access, kept) = ingested(&tar, &stored);
        let mut found = 0;
        for _ in 0..2 {
            let mut altered = stored.clone();
            let at = numbers.below(altered.len());
            altered[at] ^= 1 << numbers.below(8);
            found += faults(&source(&access, &Memory::new(&altered)), &kept);
        }
        assert!(found > 0, "{form}: no alteration was found");
        let short = Memory::new(&stored[..stored.len() / 2]);
        assert!(faults(&source(&access, &short), &kept) > 0, "{form}");
        for _ in 0..2 {
            let mut shifted = access.clone();
            shifted.places = Default::default();
            for number in 0..access.chunks.len() {
                let mut pieces = access.places.of(number).to_vec();
                pieces[0].stream = pieces[0].stream.wrapping_add(1 + numbers.below(5000) as u64);
                shifted.places.push(&pieces);
            }
            assert_eq!(
                faults(&source(&shifted, &Memory::new(&stored)), &kept),
                kept.0.len(),
                "{form}"
            );
        }
    }
    let stored = gzip(&tar, 6);
    let (_, mut access, kept) = ingested(&tar, &stored);
    let blob = Memory::new(&stored);
    let window = zstd::bulk::compress(&[7; 32 << 10], 3).unwrap();
    access.checkpoints[1].window = window;
    assert!(
        faults(&source(&access, &blob), &kept) > 0,
        "another window was not found"
    );
    access.checkpoints[1].window = b"no zstd".to_vec();
    assert!(
        faults(&source(&access, &blob), &kept) > 0,
        "a broken window was not found"
    );
}

#[test]
fn the_access_of_another_layer_gives_no_chunk() {
    let (tar, other) = (tree(5, 6 << 20), tree(6, 6 << 20));
    let (_, access, kept) = ingested(&tar, &gzip(&tar, 6));
    let source = source(&access, &Memory::new(&gzip(&other, 6)));
    assert_eq!(faults(&source, &kept), kept.0.len());
    let unknown = source.chunk(ChunkId::of(b"unknown")).unwrap_err();
    assert!(matches!(unknown, LayerSourceError::NoSuchChunk { .. }), "{unknown}");
}

#[test]
fn what_one_blob_serves_wrongly_the_next_one_serves() {
    let tar = tree(7, 3 << 20);
    let stored = gzip(&tar, 6);
    let (_, access, kept) = ingested(&tar, &stored);
    let mirror = Memory::new(&vec![0; stored.len()]);
    let blobs: Vec<Box<dyn BlobRanges>> = vec![Box::new(mirror.clone()), Box::new(Memory::new(&stored))];
    let source = LayerSource::new(Arc::new(access), blobs);
    assert_eq!(faults(&source, &kept), 0);
    assert!(mirror.asked() > 0);
}

#[test]
fn an_encoded_access_comes_back_and_damage_is_found() {
    let tar = tree(8, 6 << 20);
    let (_, access, _) = ingested(&tar, &gzip(&tar, 6));
    let whole = access.encode();
    assert_eq!(LayerAccess::decode(&whole).as_ref(), Ok(&access));
    assert_eq!(whole, access.encode());
    let mut numbers = Numbers::new(8);
    for _ in 0..300 {
        let at = numbers.below(whole.len());
        assert!(LayerAccess::decode(&whole[..at]).is_err(), "cut at {at}");
        let mut damaged = whole.clone();
        damaged[at] ^= 1 << numbers.below(8);
        assert!(LayerAccess::decode(&damaged).is_err(), "a flip at {at} was not found");
        seal(&mut damaged);
        if let Ok(decoded) = LayerAccess::decode(&damaged) {
            assert_eq!(decoded.encode(), damaged, "it has a second form (flip at {at})");
        }
    }
}

#[test]
fn an_access_that_cannot_be_is_refused() {
    let tar = tree(9, 6 << 20);
    let (_, access, _) = ingested(&tar, &gzip(&tar, 6));
    let refused = |change: &dyn Fn(&mut LayerAccess)| {
        let mut changed = access.clone();
        change(&mut changed);
        let decoded = LayerAccess::decode(&changed.encode());
        assert!(matches!(decoded, Err(DecodeError::Malformed { .. })), "{decoded:?}");
    };
    refused(&|access| access.checkpoints.clear());
    refused(&|access| access.checkpoints.swap(0, 1));
    refused(&|access| access.checkpoints[0].stream = 1);
    refused(&|access| access.checkpoints[1].window = vec![0; 40_000]);
    refused(&|access| access.checkpoints[1].stream = access.stream_len + 1);
    refused(&|access| access.checkpoints[1].stored_bits = access.blob_len * 8 + 8);
    refused(&|access| access.stream_len = 1000);
    refused(&|access| access.stream_len = 1 << 50);
    refused(&|access| access.compression = Compression::Plain);
    refused(&|access| access.compression = Compression::Zstd);
    refused(&|access| {
        let mut pieces = access.places.of(0).to_vec();
        pieces.extend_from_slice(access.places.of(1));
        access.places = Default::default();
        access.places.push(&pieces);
    });
}

/// Prints what random access into a real layer costs: `FLINT_LAYER=layer.tar.gz cargo test --release -p flint-snapshots
/// --features store figures_of_a_layer -- --ignored --nocapture`.
#[test]
#[ignore = "measures a layer that FLINT_LAYER names"]
fn figures_of_a_layer() {
    struct Names;
    impl ChunkSink for Names {
        fn put(&mut self, data: &[u8]) -> Result<ChunkId, SinkError> {
            Ok(ChunkId::of(data))
        }
    }
    let stored = std::fs::read(std::env::var("FLINT_LAYER").unwrap()).unwrap();
    let timed = |name: &str, work: &mut dyn FnMut()| {
        let start = std::time::Instant::now();
        work();
        println!("{name}: {} ms", start.elapsed().as_millis());
    };
    let mut unpacked = None;
    timed("flate2", &mut || {
        io::copy(&mut flate2::bufread::MultiGzDecoder::new(&stored[..]), &mut io::sink())
            .map(drop)
            .unwrap();
    });
    timed("with checkpoints", &mut || {
        io::copy(&mut super::Decompress::new(&stored[..]).unwrap(), &mut io::sink())
            .map(drop)
            .unwrap();
    });
    timed("ingest, with names and no store", &mut || {
        unpacked = Some(ingest::unpack(
            &mut &stored[..],
            &mut Names,
            &crate::layer::Limits::default(),
        ));
    });
    let access = unpacked
        .unwrap()
        .into_access(Digest::of(&stored), stored.len() as u64)
        .unwrap()
        .1;
    let encoded = access.encode().len();
    println!(
        "layer {} bytes, stream {}, {} chunks",
        stored.len(),
        access.stream_len,
        access.chunks.len()
    );
    println!(
        "{} checkpoints with {} bytes, the rest {}",
        access.checkpoints.len(),
        access.windows_len(),
        encoded - access.windows_len()
    );
    println!("longest span {} bytes", access.longest_span());
    let (ids, blob): (Vec<_>, _) = (
        access.chunks.iter().map(|chunk| chunk.id).collect(),
        Memory::new(&stored),
    );
    let source = source(&access, &blob);
    timed("32 chunks alone", &mut || {
        ids.iter()
            .step_by(ids.len() / 32)
            .take(32)
            .for_each(|id| drop(source.chunk(*id).unwrap()));
    });
    println!("{} bytes read for them", blob.bytes());
    timed("all chunks", &mut || source.chunks(&ids, |_, _| Ok(())).unwrap());
}

/// zlib's compressor, for streams that flate2 does not make.
mod zlib {
    use std::mem::size_of;

    use libz_rs_sys::{
        Z_DEFLATED, Z_FINISH, Z_OK, Z_STREAM_END, deflate, deflateBound, deflateEnd, deflateInit2_, z_stream,
        zlibVersion,
    };

    #[derive(Clone, Copy)]
    pub(super) enum Strategy {
        /// Blocks with the fixed Huffman codes only (RFC 1951, section 3.2.6).
        Fixed,
        /// References of at most 512 bytes.
        TinyWindow,
    }

    pub(super) fn gzip(data: &[u8], strategy: Strategy) -> Vec<u8> {
        let (window_bits, strategy) = match strategy {
            Strategy::Fixed => (15 + 16, 4),
            Strategy::TinyWindow => (9 + 16, 0),
        };
        let mut stream = z_stream::default();
        let size = i32::try_from(size_of::<z_stream>()).unwrap();
        // SAFETY: the stream is fresh; input and output are as long as said and live to the end.
        unsafe {
            let code = deflateInit2_(
                &mut stream,
                6,
                Z_DEFLATED,
                window_bits,
                8,
                strategy,
                zlibVersion(),
                size,
            );
            assert_eq!(code, Z_OK);
            let mut out = vec![0; usize::try_from(deflateBound(&mut stream, data.len() as _)).unwrap() + 4096];
            stream.next_in = data.as_ptr();
            stream.avail_in = u32::try_from(data.len()).unwrap();
            stream.next_out = out.as_mut_ptr();
            stream.avail_out = u32::try_from(out.len()).unwrap();
            assert_eq!(deflate(&mut stream, Z_FINISH), Z_STREAM_END);
            let len = out.len() - stream.avail_out as usize;
            deflateEnd(&mut stream);
            out.truncate(len);
            out
        }
    }
}
