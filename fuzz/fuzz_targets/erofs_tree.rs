//! File trees by our EROFS writer, read by `fsck.erofs`. Slow: a process for each input.
#![no_main]

use std::io::Write;
use std::process::Command;

use flint_fuzz::chunks::{Chunks, limits};
use flint_snapshots::image::assemble;
use flint_snapshots::layer::{Attributes, DeviceNumber, Entry, EntryKind, LayerIndex, Timestamp, Xattr, ingest};
use libfuzzer_sys::arbitrary::{self, Arbitrary};
use libfuzzer_sys::fuzz_target;

#[derive(Debug, Arbitrary)]
struct File {
    /// Folders on the way, by number; few, so that paths meet.
    folders: Vec<u8>,
    name: Vec<u8>,
    kind: Kind,
    mode: u16,
    owner: (u32, u32),
    time: (i64, u32),
    xattrs: Vec<(u8, Vec<u8>, Vec<u8>)>,
}

#[derive(Debug, Arbitrary)]
enum Kind {
    Empty,
    Hole(u32),
    Directory,
    Symlink(Vec<u8>),
    Device(u16, u32),
    Fifo,
    LinkToFirst,
    Whiteout,
}

/// A name as a layer index has it.
fn name(bytes: &[u8]) -> Vec<u8> {
    let clean: Vec<u8> = bytes
        .iter()
        .copied()
        .filter(|byte| !matches!(byte, 0 | b'/'))
        .take(255)
        .collect();
    match &clean[..] {
        b"" | b"." | b".." => b"n".to_vec(),
        _ => clean,
    }
}

fn xattrs(given: &[(u8, Vec<u8>, Vec<u8>)]) -> Vec<Xattr> {
    let prefixes: [&[u8]; 3] = [b"user.", b"trusted.", b"security."];
    let mut xattrs: Vec<_> = given
        .iter()
        .take(8)
        .map(|(prefix, rest, value)| Xattr {
            name: [
                prefixes[usize::from(prefix % 3)],
                &name(rest)[..name(rest).len().min(200)],
            ]
            .concat(),
            value: value.iter().copied().take(3000).collect(),
        })
        .collect();
    xattrs.sort_by(|a, b| a.name.cmp(&b.name));
    xattrs.dedup_by(|a, b| a.name == b.name);
    xattrs
}

fn entry(file: &File, first: Option<&[u8]>) -> Entry {
    let folders = file
        .folders
        .iter()
        .take(6)
        .map(|number| format!("d{}", number % 5).into_bytes());
    let path: Vec<_> = folders.chain([name(&file.name)]).collect();
    let kind = match &file.kind {
        Kind::Empty => EntryKind::File {
            size: 0,
            extents: vec![],
        },
        Kind::Hole(size) => EntryKind::File {
            size: (*size).into(),
            extents: vec![],
        },
        Kind::Directory => EntryKind::Directory,
        Kind::Symlink(target) => EntryKind::Symlink {
            target: [b"t", &name(target)[..]].concat(),
        },
        Kind::Device(major, minor) => EntryKind::CharDevice(DeviceNumber {
            major: u32::from(*major) % (DeviceNumber::MAX_MAJOR + 1),
            minor: minor % (DeviceNumber::MAX_MINOR + 1),
        }),
        Kind::Fifo => EntryKind::Fifo,
        Kind::LinkToFirst => match first {
            Some(target) => EntryKind::HardLink {
                target: target.to_vec(),
            },
            None => EntryKind::Fifo,
        },
        Kind::Whiteout => EntryKind::Whiteout,
    };
    Entry {
        path: path.join(&b'/'),
        kind,
        attributes: Attributes {
            mode: file.mode & 0o7777,
            uid: file.owner.0,
            gid: file.owner.1,
            mtime: Timestamp {
                seconds: file.time.0,
                nanoseconds: file.time.1 % 1_000_000_000,
            },
            xattrs: xattrs(&file.xattrs),
        },
    }
}

fuzz_target!(|files: Vec<Vec<File>>| {
    let mut chunks = Chunks::default();
    // A file with content, so that there is data on the device, too.
    let tar = tar_with_a_file();
    let mut layers = vec![ingest(&tar[..], &mut chunks, &limits()).expect("a good tar")];
    for files in files.iter().take(3) {
        let mut layer = LayerIndex::default();
        for file in files.iter().take(200) {
            let first = layer
                .entries
                .iter()
                .find(|entry| matches!(entry.kind, EntryKind::File { .. }));
            let first = first.map(|entry| entry.path.clone());
            layer.entries.push(entry(file, first.as_deref()));
        }
        layers.push(layer);
    }
    let Ok(image) = assemble(&layers) else { return };
    let device = chunks.device(&image);
    if device.size() > 16 << 20 {
        return;
    }
    let mut bytes = vec![0; usize::try_from(device.size()).expect("16 MiB")];
    device.read_at(0, &mut bytes).expect("all chunks are good");
    let path = format!("/dev/shm/flint-fuzz-{}", std::process::id());
    let mut file = std::fs::File::create(&path).expect("shared memory");
    file.write_all(&bytes).expect("shared memory");
    let output = Command::new("fsck.erofs").arg(&path).output();
    let output = output.expect("fsck.erofs is installed (apt-get install erofs-utils)");
    std::fs::remove_file(&path).expect("shared memory");
    assert!(
        output.status.success(),
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
});

/// A ustar member of 5000 bytes.
fn tar_with_a_file() -> Vec<u8> {
    let mut header = [0u8; 512];
    header[..4].copy_from_slice(b"file");
    for (at, text) in [
        (100, "0000644"),
        (108, "0000000"),
        (116, "0000000"),
        (124, "00000011610"),
        (136, "00000000001"),
    ] {
        header[at..at + text.len()].copy_from_slice(text.as_bytes());
    }
    header[156] = b'0';
    header[257..265].copy_from_slice(b"ustar\x0000");
    header[148..156].fill(b' ');
    let sum: u32 = header.iter().map(|&byte| u32::from(byte)).sum();
    header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    let mut tar = header.to_vec();
    tar.extend(std::iter::repeat_n(b'x', 5000));
    tar.resize(512 + 5120 + 1024, 0);
    tar
}
