//! Images against those who know better: `fsck.erofs`, the kernel, and `umoci unpack`, file for file.
//!
//! `fsck.erofs` and `umoci` have to be installed (packages erofs-utils and umoci), and the tests run as root, for owners and
//! devices. Tests that mount run when `FLINT_TEST_MOUNT=1`.

use std::collections::BTreeMap;
use std::ffi::CString;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::Command;

use sha2::{Digest, Sha256};
use tempfile::TempDir;

use super::*;
use crate::layer::{Limits, ingest};
use crate::testing::{Meta, Numbers, TarBuilder, TestPacks};

fn run(command: &mut Command) -> String {
    let output = command
        .output()
        .unwrap_or_else(|error| panic!("{command:?} (is it installed?): {error}"));
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert!(
        output.status.success(),
        "{command:?}: {}{}",
        text(&output.stdout),
        text(&output.stderr)
    );
    text(&output.stdout)
}

/// The image's device as a file, read through the device table from packs.
fn device_file(tars: &[Vec<u8>], folder: &Path) -> PathBuf {
    let mut packs = TestPacks::new();
    let layers: Vec<_> = tars
        .iter()
        .map(|tar| ingest(&tar[..], &mut packs, &Limits::default()).unwrap())
        .collect();
    let image = assemble(&layers).unwrap();
    let device = packs.device(&image);
    let path = folder.join("device");
    let mut file = File::create(&path).unwrap();
    let mut buffer = vec![0; 1 << 20];
    let mut at = 0;
    while at < device.size() {
        let len = buffer.len().min(usize::try_from(device.size() - at).unwrap());
        device.read_at(at, &mut buffer[..len]).unwrap();
        file.write_all(&buffer[..len]).unwrap();
        at += len as u64;
    }
    path
}

/// What a comparison looks at.
#[derive(Clone, Copy)]
struct Look {
    /// With hard links, extended attributes, set-user-id and set-group-id.
    exact: bool,
    folder_times: bool,
}

/// Path below `root` -> everything about the file.
fn describe(root: &Path, look: Look) -> BTreeMap<PathBuf, String> {
    let mut found = BTreeMap::new();
    let mut todo = vec![root.to_path_buf()];
    while let Some(path) = todo.pop() {
        let meta = path.symlink_metadata().unwrap();
        let kind = meta.file_type();
        let mode = if look.exact { meta.mode() } else { meta.mode() & !0o6000 };
        let mut text = format!("{mode:o} {}:{}", meta.uid(), meta.gid());
        if look.folder_times || !kind.is_dir() {
            text += &format!(" {}.{:09}", meta.mtime(), meta.mtime_nsec());
        }
        if kind.is_dir() {
            todo.extend(fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path()));
        } else if kind.is_file() {
            let content = blake3::hash(&fs::read(&path).unwrap());
            text += &format!(" {} {content}", meta.len());
        } else if kind.is_symlink() {
            text += &format!(" -> {:?}", fs::read_link(&path).unwrap());
        } else if kind.is_char_device() || kind.is_block_device() {
            text += &format!(" {:x}", meta.rdev());
        }
        let relative = path.strip_prefix(root).unwrap().to_path_buf();
        if look.exact && !kind.is_dir() {
            text += &format!(" links {}", meta.nlink());
        }
        if look.exact {
            text += &format!(" {:?}", xattrs(&path));
        }
        found.insert(relative, text);
    }
    found
}

fn xattrs(path: &Path) -> BTreeMap<String, Vec<u8>> {
    let path = CString::new(path.as_os_str().as_bytes()).unwrap();
    let mut names = vec![0u8; 65_536];
    // SAFETY: the path ends in a zero byte, and the kernel writes at most the buffer's length.
    let len = unsafe { libc::llistxattr(path.as_ptr(), names.as_mut_ptr().cast(), names.len()) };
    names.truncate(usize::try_from(len).unwrap());
    let get = |name: &[u8]| {
        let name = CString::new(name).unwrap();
        let mut value = vec![0u8; 65_536];
        // SAFETY: as above, for both strings and the value.
        let len = unsafe { libc::lgetxattr(path.as_ptr(), name.as_ptr(), value.as_mut_ptr().cast(), value.len()) };
        value.truncate(usize::try_from(len).unwrap());
        value
    };
    let names = names.split(|&byte| byte == 0).filter(|name| !name.is_empty());
    names
        .map(|name| (String::from_utf8_lossy(name).into_owned(), get(name)))
        .collect()
}

fn assert_same(expected: &BTreeMap<PathBuf, String>, found: &BTreeMap<PathBuf, String>) {
    for path in expected.keys().chain(found.keys()) {
        assert_eq!(expected.get(path), found.get(path), "{}", path.display());
    }
}

/// `tars` as an OCI layout, unpacked by umoci; the root file system's path.
fn umoci(tars: &[Vec<u8>], folder: &Path) -> PathBuf {
    let blobs = folder.join("oci/blobs/sha256");
    fs::create_dir_all(&blobs).unwrap();
    let put = |bytes: &[u8]| {
        let digest: String = Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect();
        fs::write(blobs.join(&digest), bytes).unwrap();
        format!("sha256:{digest}")
    };
    let descriptor = |kind: &str, bytes: &[u8]| serde_json::json!({"mediaType": format!("application/vnd.oci.image.{kind}"), "digest": put(bytes), "size": bytes.len()});
    let layers: Vec<_> = tars.iter().map(|tar| descriptor("layer.v1.tar", tar)).collect();
    let config = serde_json::json!({"architecture": "amd64", "os": "linux", "config": {},
        "rootfs": {"type": "layers", "diff_ids": layers.iter().map(|layer| &layer["digest"]).collect::<Vec<_>>()}});
    let config = descriptor("config.v1+json", config.to_string().as_bytes());
    let manifest = serde_json::json!({"schemaVersion": 2, "config": config, "layers": layers});
    let mut manifest = descriptor("manifest.v1+json", manifest.to_string().as_bytes());
    manifest["annotations"] = serde_json::json!({"org.opencontainers.image.ref.name": "t"});
    let index = serde_json::json!({"schemaVersion": 2, "manifests": [manifest]});
    fs::write(folder.join("oci/index.json"), index.to_string()).unwrap();
    fs::write(folder.join("oci/oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).unwrap();
    let bundle = folder.join("bundle");
    run(Command::new("umoci")
        .args(["unpack", "--image"])
        .arg(format!("{}:t", folder.join("oci").display()))
        .arg(&bundle));
    bundle.join("rootfs")
}

/// The device as `fsck.erofs` reads it.
fn extract(device: &Path, folder: &Path) -> PathBuf {
    let tree = folder.join("extracted");
    run(Command::new("fsck.erofs")
        .arg("--preserve")
        .arg(format!("--extract={}", tree.display()))
        .arg(device));
    tree
}

/// A mount that ends with the value.
struct Mounted(PathBuf);

impl Mounted {
    /// `None` if tests are not to mount.
    fn new(device: &Path, folder: &Path) -> Option<Self> {
        if std::env::var_os("FLINT_TEST_MOUNT").is_none_or(|value| value != "1") {
            return None;
        }
        let point = folder.join("mounted");
        fs::create_dir(&point).unwrap();
        run(Command::new("mount")
            .args(["-t", "erofs", "-o", "loop,ro"])
            .arg(device)
            .arg(&point));
        Some(Self(point))
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        run(Command::new("umount").arg(&self.0));
    }
}

/// Compares what umoci unpacks with what fsck.erofs and, if it may mount, the kernel find on the device.
///
/// umoci gives a folder the present time when a whiteout changes what is in it; `folder_times` says that none does. fsck.erofs
/// does not bring back hard links and extended attributes, and loses set-user-id when it gives a file its owner; files with
/// holes are compared by the kernel only, because its version 1.5 leaves out what comes after a hole.
fn compare(tars: &[Vec<u8>], folder_times: bool) {
    let extracted = Look {
        exact: false,
        folder_times,
    };
    let all = Look {
        exact: true,
        folder_times,
    };
    let folder = TempDir::new().unwrap();
    let device = device_file(tars, folder.path());
    let rootfs = umoci(tars, folder.path());
    let (mut expected, mut found) = (
        describe(&rootfs, extracted),
        describe(&extract(&device, folder.path()), extracted),
    );
    let holed: Vec<_> = expected
        .keys()
        .filter(|path| has_hole(&rootfs.join(path)))
        .cloned()
        .collect();
    for path in holed {
        assert!(expected.remove(&path).is_some() && found.remove(&path).is_some());
    }
    assert_same(&expected, &found);
    if let Some(mounted) = Mounted::new(&device, folder.path()) {
        assert_same(&describe(&rootfs, all), &describe(&mounted.0, all));
    }
}

/// Whether a file has a block of zeros, which is not stored.
fn has_hole(path: &Path) -> bool {
    let is_file = path.symlink_metadata().unwrap().is_file();
    is_file
        && fs::read(path)
            .unwrap()
            .chunks(4096)
            .any(|block| block.iter().all(|&byte| byte == 0))
}

fn folder_meta() -> Meta {
    Meta {
        mode: 0o755,
        ..Meta::default()
    }
}

/// A layer with everything a file can be.
fn everything() -> Vec<u8> {
    let mut numbers = Numbers::new(11);
    let mut tar = TarBuilder::default();
    tar.dir("./")
        .dir("dir")
        .dir("empty")
        .dir("-before-dot")
        .file("!", b"1")
        .dir("many");
    for len in [0, 1, 4095, 4096, 4097, 131_071, 131_072, 262_144, 262_145, 1_000_000] {
        tar.file(&format!("dir/{len}"), &numbers.bytes(len));
    }
    for number in 0..700 {
        tar.file(
            &format!("many/{number:05}{}", "n".repeat(number % 200)),
            format!("{number}").as_bytes(),
        );
    }
    tar.symlink("short", "dir/1")
        .symlink("long", &"x".repeat(2500))
        .symlink("longest", &"y/".repeat(2047));
    tar.hard_link("dir/linked", "dir/4096").hard_link("linked", "short");
    tar.device("null", b'3', 1, 3)
        .device("disk", b'4', 259, 70_000)
        .device("fifo", b'6', 0, 0);
    tar.member(
        "suid",
        b'0',
        b"x",
        "",
        Meta {
            mode: 0o6755,
            uid: 1000,
            gid: 100,
            mtime: 1,
        },
    );
    tar.member(
        "sticky",
        b'5',
        b"",
        "",
        Meta {
            mode: 0o1777,
            ..folder_meta()
        },
    );
    tar.pax("uid", b"3000000")
        .pax("mtime", b"1700000000.123456789")
        .file("far", b"x");
    tar.pax("mtime", b"-100").file("old", b"x");
    let capability = [1, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    tar.pax("SCHILY.xattr.security.capability", &capability)
        .pax("SCHILY.xattr.user.long", &[b'v'; 3000])
        .file("caps", b"x");
    tar.pax("SCHILY.xattr.user.dir", b"")
        .pax("SCHILY.xattr.trusted.t", b"t")
        .dir("xattrs");
    tar.finish()
}

#[test]
fn everything_a_file_can_be_survives() {
    compare(&[everything()], true);
}

#[test]
fn holes_are_zeros_to_the_kernel() {
    let mut data = Numbers::new(2).bytes(800_000);
    data[262_144..700_000].fill(0);
    let mut tar = TarBuilder::default();
    tar.file("holes", &data).file("zeros", &[0; 10_000]);
    tar.pax("GNU.sparse.size", b"400000000")
        .pax("GNU.sparse.map", b"300000000,5")
        .file("sparse", b"hello");
    let folder = TempDir::new().unwrap();
    let device = device_file(&[tar.finish()], folder.path());
    run(Command::new("fsck.erofs").arg(&device));
    let Some(mounted) = Mounted::new(&device, folder.path()) else {
        return;
    };
    assert!(fs::read(mounted.0.join("holes")).unwrap() == data);
    assert!(fs::read(mounted.0.join("zeros")).unwrap() == [0; 10_000]);
    let sparse = fs::read(mounted.0.join("sparse")).unwrap();
    assert_eq!(
        (sparse.len(), &sparse[300_000_000..300_000_005]),
        (400_000_000, &b"hello"[..])
    );
    assert_eq!(sparse.iter().filter(|&&byte| byte != 0).count(), 5);
}

#[test]
fn whiteouts_and_opaque_folders_are_umocis() {
    let mut upper = TarBuilder::default();
    upper
        .file("dir/.wh.4095", b"")
        .file("many/.wh..wh..opq", b"")
        .dir("many")
        .file("many/new", b"n");
    upper
        .file(".wh.empty", b"")
        .hard_link("kept", "dir/4096")
        .file("dir/4096", b"other")
        .file("short", b"file now");
    upper.file("deep/under/nothing", b"x");
    let mut third = TarBuilder::default();
    third
        .file(".wh.kept", b"")
        .dir("empty")
        .file("empty/again", b"")
        .file(".wh.not-there", b"")
        .dir("deep")
        .dir("deep/under");
    third.file(".wh.sticky", b"").file("sticky", b"a file");
    compare(&[everything(), upper.finish(), third.finish()], false);
}

#[test]
fn random_layers_are_umocis() {
    for seed in 0..12 {
        let mut numbers = Numbers::new(seed);
        let tars: Vec<_> = (0..1 + numbers.below(3)).map(|_| random_layer(&mut numbers)).collect();
        compare(&tars, false);
    }
}

/// Folders come before what is in them, as all builders write them, so that no time is left to the unpacker.
fn random_layer(numbers: &mut Numbers) -> Vec<u8> {
    let mut tar = TarBuilder::default();
    tar.dir("./");
    let mut folders = vec![String::new()];
    let mut links: Vec<String> = Vec::new();
    for number in 0..20 + numbers.below(100) {
        let parent = folders[numbers.below(folders.len())].clone();
        // Few names for folders, so that layers meet; a file's name has a mark that a folder's has not.
        let folder = format!("{parent}d{}", numbers.below(4));
        let file = format!("{parent}f{}{}", numbers.below(30), "x".repeat(numbers.below(90)));
        let meta = Meta {
            mode: 0o600 + 0o11 * u16::try_from(numbers.below(8)).unwrap(),
            mtime: 1_600_000_000 + i64::try_from(number).unwrap(),
            ..Meta::default()
        };
        match numbers.below(12) {
            0..=3 => {
                tar.member(&folder, b'5', b"", "", folder_meta());
                folders.push(folder + "/");
            }
            4 => {
                tar.symlink(&file, &"../x".repeat(1 + numbers.below(200)));
            }
            5 if !links.is_empty() => {
                tar.hard_link(&format!("{file}h"), &links[numbers.below(links.len())]);
            }
            6 => {
                tar.file(&format!("{parent}.wh.d{}", numbers.below(4)), b"");
            }
            7 if number % 3 == 0 && !parent.is_empty() => {
                tar.file(&format!("{parent}.wh..wh..opq"), b"");
            }
            8 => {
                tar.file(&format!("{parent}.wh.f{}", numbers.below(30)), b"");
            }
            kind => {
                let len = numbers.below(if kind == 9 { 600_000 } else { 9000 });
                let file = format!("{file}-{number}");
                tar.member(&file, b'0', &numbers.bytes(len), "", meta);
                links.push(file);
            }
        }
    }
    tar.finish()
}

/// The Debian packages of which the test images are made, one layer each, and a layer that changes them.
#[test]
fn an_image_of_real_packages_is_umocis() {
    let folder = TempDir::new().unwrap();
    let mut tars = Vec::new();
    for package in [
        "busybox-static",
        "python3-minimal",
        "libpython3-stdlib",
        "python3.11-minimal",
        "libpython3.11-minimal",
    ] {
        run(Command::new("apt-get")
            .args(["download", "-q", package])
            .current_dir(folder.path()));
        let deb = fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().path());
        let deb = deb.filter(|path| path.extension().is_some_and(|extension| extension == "deb"));
        let deb = deb
            .max_by_key(|path| path.metadata().unwrap().modified().unwrap())
            .unwrap();
        let output = Command::new("dpkg-deb")
            .arg("--fsys-tarfile")
            .arg(&deb)
            .output()
            .unwrap();
        assert!(output.status.success());
        tars.push(output.stdout);
        fs::remove_file(deb).unwrap();
    }
    let mut upper = TarBuilder::default();
    upper
        .dir("./")
        .dir("usr")
        .dir("usr/share")
        .dir("usr/share/doc")
        .file("usr/share/doc/.wh..wh..opq", b"");
    upper
        .dir("usr/bin")
        .file("usr/bin/.wh.python3", b"")
        .symlink("usr/bin/python", "python3.11");
    tars.push(upper.finish());
    compare(&tars, false);
}

/// The images that system tests run, where `hack/registry images` has built them.
#[test]
fn the_test_images_are_umocis() {
    let cache = std::env::var_os("FLINT_CACHE").map(PathBuf::from);
    let home = || std::env::var_os("HOME").map(|home| Path::new(&home).join(".cache/flint"));
    let Some(layout) = cache.or_else(home).map(|cache| cache.join("images/layout")) else {
        return;
    };
    let Ok(index) = fs::read(layout.join("index.json")) else {
        eprintln!(
            "left out: {} is not there; hack/registry images makes it",
            layout.display()
        );
        return;
    };
    let blob = |descriptor: &serde_json::Value| {
        let digest = descriptor["digest"].as_str().unwrap().replace(':', "/");
        fs::read(layout.join("blobs").join(digest)).unwrap()
    };
    let index: serde_json::Value = serde_json::from_slice(&index).unwrap();
    for image in index["manifests"].as_array().unwrap() {
        let manifest: serde_json::Value = serde_json::from_slice(&blob(image)).unwrap();
        let unpack = |layer| {
            let stored = blob(layer);
            let mut tar = Vec::new();
            let unpacked = crate::access::Decompress::new(&stored[..]).and_then(|mut all| all.read_to_end(&mut tar));
            unpacked.unwrap();
            tar
        };
        let tars: Vec<_> = manifest["layers"].as_array().unwrap().iter().map(unpack).collect();
        compare(&tars, false);
    }
}

#[test]
fn the_same_layers_give_the_same_bytes() {
    let build = || {
        let mut packs = TestPacks::new();
        let index = ingest(&everything()[..], &mut packs, &Limits::default()).unwrap();
        (assemble(&[&index]).unwrap(), index.encode())
    };
    let (first, second) = (build(), build());
    assert!(first == second);
}

#[test]
fn one_time_for_all_files_makes_short_inodes() {
    let metadata_of = |mtime: &dyn Fn(u32) -> i64| {
        let mut tar = TarBuilder::default();
        for number in 0..1000 {
            tar.member(
                &format!("{number}"),
                b'0',
                b"",
                "",
                Meta {
                    mtime: mtime(number),
                    ..Meta::default()
                },
            );
        }
        let index = ingest(&tar.finish()[..], &mut TestPacks::new(), &Limits::default()).unwrap();
        assemble(&[&index]).unwrap().metadata().len()
    };
    assert!(metadata_of(&|_| 7) + 28_000 < metadata_of(&i64::from));
}
