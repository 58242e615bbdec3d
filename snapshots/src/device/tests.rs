//! Reading devices: good ones, damaged ones, and ones made to deceive.

use std::os::unix::fs::FileExt;

use super::table::{CHUNK_RECORD_LEN, DIRECTORY_ENTRY_LEN, EXTENT_RECORD_LEN, HEADER_LEN, PAGE_LEN};
use super::*;
use crate::chunk::{Chunk, ChunkSink, MAX_CHUNK_LEN};
use crate::image::Image;
use crate::testing::{Numbers, TestPacks, file_with};

/// An image of 700 chunks, so that there are several pages of each kind, some sharing, and gaps.
fn sample(packs: &mut TestPacks) -> (Image, Vec<u8>) {
    let mut numbers = Numbers::new(7);
    let metadata = numbers.bytes(2 * PAGE_LEN);
    let mut content = metadata.clone();
    let mut image = Image {
        chunks: vec![Chunk {
            id: packs.put(&metadata).unwrap(),
            len: 2 * 4096,
        }],
        extents: vec![DeviceExtent {
            device_offset: 0,
            chunk: 0,
            offset: 0,
            len: 2 * 4096,
        }],
        metadata,
        size: 0,
    };
    for number in 1..700u32 {
        let len = if number == 350 {
            MAX_CHUNK_LEN
        } else {
            1 + numbers.below(6000)
        };
        let data = numbers.bytes(len);
        image.chunks.push(Chunk {
            id: packs.put(&data).unwrap(),
            len: u32::try_from(len).unwrap(),
        });
        let (offset, end) = if number % 3 == 0 { (len / 2, len) } else { (0, len) };
        image.extents.push(DeviceExtent {
            device_offset: content.len() as u64,
            chunk: number,
            offset: u32::try_from(offset).unwrap(),
            len: u32::try_from(end - offset).unwrap(),
        });
        content.extend_from_slice(&data[offset..end]);
        let gap = if number % 50 == 0 { 3 * PAGE_LEN } else { 0 };
        content.resize(content.len().next_multiple_of(PAGE_LEN) + gap, 0);
    }
    image.size = content.len() as u64;
    (image, content)
}

fn table_of(image: &Image, packs: &TestPacks) -> Table {
    Table::build(image, |id| packs.locate(id)).unwrap()
}

fn read_all(device: &ImageDevice) -> Result<Vec<u8>, ReadError> {
    let mut bytes = vec![0xaa; usize::try_from(device.size()).unwrap()];
    device.read_at(0, &mut bytes).map(|()| bytes)
}

#[test]
fn every_byte_reads_as_it_was_written_from_any_offset() {
    let mut packs = TestPacks::new();
    let (image, content) = sample(&mut packs);
    let device = packs.device(&image);
    assert_eq!(device.size(), content.len() as u64);
    assert!(read_all(&device).unwrap() == content);
    let mut numbers = Numbers::new(1);
    for _ in 0..300 {
        let at = numbers.below(content.len());
        let len = numbers.below(70_000).min(content.len() - at);
        let mut read = vec![0xaa; len];
        device.read_at(at as u64, &mut read).unwrap();
        assert!(read == content[at..at + len], "{len} bytes at {at} differ");
    }
}

#[test]
fn several_threads_read_the_same() {
    let mut packs = TestPacks::new();
    let (image, content) = sample(&mut packs);
    let device = packs.device(&image);
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| assert!(read_all(&device).unwrap() == content));
        }
    });
}

#[test]
fn a_read_beyond_the_end_is_refused_and_one_of_nothing_is_not() {
    let mut packs = TestPacks::new();
    let (image, _) = sample(&mut packs);
    let device = packs.device(&image);
    for (offset, len) in [
        (device.size(), 1),
        (device.size() - 1, 2),
        (u64::MAX, 1),
        (u64::MAX, 4096),
    ] {
        let read = device.read_at(offset, &mut vec![0; len]);
        assert!(
            matches!(read, Err(ReadError::OutOfRange { .. })),
            "{len} bytes at {offset}: {read:?}"
        );
    }
    device.read_at(device.size(), &mut []).unwrap();
}

#[test]
fn the_cache_stays_within_its_bound_and_spares_the_source() {
    struct Counting(Packs, std::sync::Arc<std::sync::atomic::AtomicUsize>);
    impl ChunkSource for Counting {
        fn read(&self, request: &ChunkRequest, chunk: &mut [u8]) -> Result<(), SourceError> {
            self.1.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            self.0.read(request, chunk)
        }
    }
    let mut packs = TestPacks::new();
    let (image, content) = sample(&mut packs);
    let table = table_of(&image, &packs);
    let count = std::sync::Arc::default();
    let source = Counting(
        Packs::new(packs.files_for(&table)).unwrap(),
        std::sync::Arc::clone(&count),
    );
    let device = ImageDevice::with_source(file_with(table.as_bytes()), Box::new(source), DEFAULT_CACHE_LEN).unwrap();
    for at in (0..8 * PAGE_LEN).step_by(512) {
        let mut sector = [0; 512];
        device.read_at(at as u64, &mut sector).unwrap();
        assert!(sector == content[at..at + 512]);
    }
    let touched = image
        .extents
        .iter()
        .filter(|extent| extent.device_offset < 8 * PAGE_LEN as u64)
        .count();
    assert_eq!(count.load(std::sync::atomic::Ordering::Relaxed), touched);
}

#[test]
fn packs_are_named_in_the_order_of_the_files() {
    let mut packs = TestPacks::new();
    let (image, _) = sample(&mut packs);
    let table = table_of(&image, &packs);
    assert_eq!(table.packs(), [PackId(0), PackId(7)]);
    assert_eq!(packs_of(file_with(table.as_bytes())).unwrap(), table.packs());
    let one = packs.files_for(&table).pop().into_iter().collect();
    let opened = ImageDevice::open(file_with(table.as_bytes()), one).err();
    assert!(matches!(opened, Some(OpenError::PackCount { named: 2, given: 1 })));
}

#[test]
fn a_missing_chunk_or_one_of_another_length_is_named_when_the_table_is_built() {
    let mut packs = TestPacks::new();
    let (image, _) = sample(&mut packs);
    let gone = image.chunks[42].id;
    let built = Table::build(&image, |id| packs.locate(id).filter(|_| *id != gone));
    assert!(matches!(built, Err(BuildError::MissingChunk(id)) if id == gone));
    let built = Table::build(&image, |id| {
        packs.locate(id).map(|at| PackLocation { raw_len: 1, ..at })
    });
    assert!(matches!(built, Err(BuildError::WrongLength { found: 1, .. })));
}

#[test]
fn a_flipped_byte_in_the_table_is_an_error_and_never_wrong_bytes() {
    let mut packs = TestPacks::new();
    let (image, content) = sample(&mut packs);
    let good = table_of(&image, &packs);
    let mut found = 0;
    for at in (0..HEADER_LEN).chain((HEADER_LEN..good.as_bytes().len()).step_by(497)) {
        let mut bytes = good.as_bytes().to_vec();
        bytes[at] ^= 0x40;
        match ImageDevice::open(file_with(&bytes), packs.files_for(&good)).map(|device| read_all(&device)) {
            Ok(Ok(read)) => assert!(read == content, "byte {at} gave wrong bytes"),
            Ok(Err(ReadError::Table { .. })) | Err(_) => found += 1,
            Ok(Err(other)) => panic!("byte {at}: {other}"),
        }
    }
    assert!(found > 150, "only {found} flips were found");
}

#[test]
fn a_table_cut_short_is_an_error_at_every_length() {
    let mut packs = TestPacks::new();
    let (image, _) = sample(&mut packs);
    let good = table_of(&image, &packs);
    for len in (0..200).chain((200..good.as_bytes().len()).step_by(1000)) {
        let cut = file_with(&good.as_bytes()[..len]);
        let opened = ImageDevice::open(cut, packs.files_for(&good));
        assert!(
            matches!(opened, Err(OpenError::NotATable | OpenError::Damaged)),
            "a table of {len} bytes was opened"
        );
    }
}

#[test]
fn damage_in_a_pack_names_the_chunk_and_spares_the_others() {
    let mut packs = TestPacks::new();
    let (image, content) = sample(&mut packs);
    let table = table_of(&image, &packs);
    for victim in [10, 11] {
        let location = packs.locate(&image.chunks[victim].id).unwrap();
        let files = packs.files_for(&table);
        let file = &files[(location.pack.0 / 7) as usize];
        let mut byte = [0];
        let middle = location.offset + u64::from(location.stored_len / 2);
        file.read_exact_at(&mut byte, middle).unwrap();
        file.write_all_at(&[byte[0] ^ 1], middle).unwrap();
        let device = ImageDevice::open(file_with(table.as_bytes()), packs.files_for(&table)).unwrap();
        let mut read = [0; 16];
        let extent = image.extents[victim];
        let error = device.read_at(extent.device_offset, &mut read).unwrap_err();
        assert!(
            error.to_string().contains(&image.chunks[victim].id.to_string()),
            "{error}"
        );
        device.read_at(0, &mut read).unwrap();
        assert_eq!(read, content[..16]);
    }
}

#[test]
fn a_pack_cut_short_is_an_error() {
    let mut packs = TestPacks::new();
    let (image, _) = sample(&mut packs);
    let table = table_of(&image, &packs);
    for file in packs.files_for(&table) {
        file.set_len(100).unwrap();
    }
    let device = ImageDevice::open(file_with(table.as_bytes()), packs.files_for(&table)).unwrap();
    assert!(matches!(
        read_all(&device),
        Err(ReadError::Source {
            source: SourceError::Read { .. },
            ..
        })
    ));
}

#[test]
fn a_table_with_good_digests_and_bad_values_is_an_error() {
    let mut packs = TestPacks::new();
    let (image, _) = sample(&mut packs);
    let good = table_of(&image, &packs);
    let bytes = good.as_bytes();
    let shape = super::table::Shape::new(2, image.chunks.len(), image.extents.len()).unwrap();
    let chunk = |number: usize| shape.pages_at + number * CHUNK_RECORD_LEN;
    let extent = |number: usize| shape.pages_at + shape.chunk_pages * PAGE_LEN + number * EXTENT_RECORD_LEN;
    let first_page_entry = HEADER_LEN + 8 + shape.chunk_pages * DIRECTORY_ENTRY_LEN;
    let max = u64::MAX.to_le_bytes();
    let cases: &[(&str, usize, &[u8])] = &[
        ("a chunk's name", chunk(3), &[0; 32]),
        ("a chunk's pack", chunk(3) + 32, &2u32.to_le_bytes()),
        ("a chunk's stored length, none", chunk(3) + 36, &[0; 4]),
        ("a chunk's stored length, huge", chunk(3) + 36, &max[..4]),
        ("a chunk's length, none", chunk(3) + 40, &[0; 4]),
        ("a chunk's length, huge", chunk(3) + 40, &max[..4]),
        (
            "a chunk's length, one more",
            chunk(3) + 40,
            &(image.chunks[3].len + 1).to_le_bytes(),
        ),
        ("a chunk's offset", chunk(3) + 48, &max),
        ("an extent's device offset, overlapping", extent(3), &0u64.to_le_bytes()),
        ("an extent's device offset, far out", extent(3), &max),
        ("an extent's chunk", extent(3) + 8, &700u32.to_le_bytes()),
        ("an extent's offset in the chunk", extent(3) + 12, &max[..4]),
        ("an extent's length, none", extent(3) + 16, &[0; 4]),
        ("an extent's length, huge", extent(3) + 16, &max[..4]),
        (
            "the first device offset of a page",
            first_page_entry,
            &1u64.to_le_bytes(),
        ),
        ("the device's size", 16, &(image.size - 4096).to_le_bytes()),
    ];
    for (what, at, value) in cases {
        let mut table = bytes.to_vec();
        table[*at..at + value.len()].copy_from_slice(value);
        seal(&mut table);
        let read = ImageDevice::open(file_with(&table), packs.files_for(&good)).map(|device| read_all(&device));
        assert!(!matches!(read, Ok(Ok(_))), "{what} was believed");
    }
}

#[test]
fn impossible_headers_are_refused_before_anything_is_allocated() {
    let mut packs = TestPacks::new();
    let (image, _) = sample(&mut packs);
    let good = table_of(&image, &packs);
    let open = |at: usize, value: &[u8]| {
        let mut bytes = good.as_bytes().to_vec();
        bytes[at..at + value.len()].copy_from_slice(value);
        ImageDevice::open(file_with(&bytes), packs.files_for(&good))
            .err()
            .unwrap()
    };
    assert!(matches!(open(0, b"ELF"), OpenError::NotATable));
    assert!(matches!(open(8, &[9]), OpenError::Version(9)));
    for at in [12, 24, 28] {
        assert!(matches!(open(at, &[0xff; 4]), OpenError::Malformed(_)), "count at {at}");
    }
    assert!(matches!(open(16, &[0xff; 8]), OpenError::Malformed(_)));
    assert!(matches!(open(16, &4095u64.to_le_bytes()), OpenError::Malformed(_)));
}

/// The sample with chunk 350 left out of its table, and what the store has of it.
fn lacking(packs: &mut TestPacks) -> (Image, Vec<u8>, ImageDevice) {
    let (image, content) = sample(packs);
    let absent = image.chunks[350];
    let locate = |id: &ChunkId| match *id == absent.id {
        true => Some(PackLocation::absent(absent.len)),
        false => packs.locate(id),
    };
    let table = Table::build(&image, locate).unwrap();
    let files = packs.files_for(&table);
    let device = ImageDevice::open(file_with(table.as_bytes()), files).unwrap();
    (image, content, device)
}

/// A chunk as it is, in a file of its own.
fn found(bytes: &[u8], pack: u32) -> FoundChunk {
    let len = u32::try_from(bytes.len()).unwrap();
    FoundChunk {
        file: file_with(bytes),
        location: PackLocation {
            pack: PackId(pack),
            offset: 0,
            stored_len: len,
            raw_len: len,
        },
    }
}

/// What the sample has in chunk 350.
fn missing_bytes(image: &Image, content: &[u8]) -> Vec<u8> {
    let extent = image.extents.iter().find(|extent| extent.chunk == 350).unwrap();
    assert_eq!((extent.offset, extent.len), (0, image.chunks[350].len));
    let start = usize::try_from(extent.device_offset).unwrap();
    content[start..start + extent.len as usize].to_vec()
}

#[test]
fn a_chunk_that_is_not_here_is_named_and_read_where_it_was_found() {
    let mut packs = TestPacks::new();
    let (image, content, device) = lacking(&mut packs);
    let id = image.chunks[350].id;
    let error = read_all(&device).unwrap_err();
    assert_eq!(error.missing_chunk(), Some(id), "{error:?}");
    let bytes = missing_bytes(&image, &content);
    for pack in [0, 9] {
        device.learn(id, found(&bytes, pack)).unwrap();
        assert!(read_all(&device).unwrap() == content);
    }
}

#[test]
fn what_was_found_is_believed_no_more_than_what_the_table_names() {
    let mut packs = TestPacks::new();
    let (image, content, device) = lacking(&mut packs);
    let id = image.chunks[350].id;
    let good = missing_bytes(&image, &content);
    let mut other = good.clone();
    other[7] ^= 1;
    let mut cut = found(&good, 1);
    cut.location.raw_len -= 1;
    cut.location.stored_len -= 1;
    let mut beyond = found(&good, 1);
    beyond.location.offset = u64::MAX;
    let mut garbage = found(&good, 1);
    garbage.location.stored_len = 100;
    for wrong in [found(&other, 1), cut, beyond, garbage, found(&good[..100], 1)] {
        device.learn(id, wrong).unwrap();
        assert_eq!(read_all(&device).unwrap_err().missing_chunk(), Some(id));
    }
    // It was forgotten each time.
    let again = read_all(&device).unwrap_err();
    assert!(
        matches!(
            again,
            ReadError::Source {
                source: SourceError::Absent,
                ..
            }
        ),
        "{again:?}"
    );
    device.learn(id, found(&good, 1)).unwrap();
    assert!(read_all(&device).unwrap() == content);
}

#[test]
fn only_so_many_files_are_held_open_for_what_was_found() {
    let mut packs = TestPacks::new();
    let (image, content, device) = lacking(&mut packs);
    let id = image.chunks[350].id;
    device.learn(id, found(&missing_bytes(&image, &content), 0)).unwrap();
    for number in 0..100_u32 {
        let bytes = number.to_le_bytes();
        device.learn(ChunkId::of(&bytes), found(&bytes, 0)).unwrap();
    }
    assert_eq!(read_all(&device).unwrap_err().missing_chunk(), Some(id));
}

#[test]
fn a_table_says_by_its_version_whether_all_chunks_are_here() {
    let mut packs = TestPacks::new();
    let (image, _) = sample(&mut packs);
    let version = |table: &Table| u32::from_le_bytes(table.as_bytes()[8..12].try_into().unwrap());
    assert_eq!(version(&table_of(&image, &packs)), 1);
    let nowhere = Table::build(&image, |id| packs.locate(id).map(|at| PackLocation::absent(at.raw_len))).unwrap();
    assert_eq!((version(&nowhere), nowhere.packs().len()), (2, 0));
    let name = |table: &Table| content_name(file_with(table.as_bytes())).unwrap();
    assert_eq!(
        name(&nowhere),
        name(&table_of(&image, &packs)),
        "the same bytes have two names"
    );
    let placed = placed_chunks(file_with(nowhere.as_bytes())).unwrap();
    assert!(placed.iter().all(|(_, location)| location.is_absent()));
    let placed = placed_chunks(file_with(table_of(&image, &packs).as_bytes())).unwrap();
    assert!(placed.iter().all(|(id, location)| packs.locate(id) == Some(*location)));
}
