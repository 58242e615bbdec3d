//! Merging layers, seen through a plain listing of the tree.

use std::collections::BTreeMap;

use super::tree::{Directory, Inode};
use super::*;
use crate::layer::{Limits, ingest};
use crate::testing::{TarBuilder, TestPacks};

fn layers(tars: &[&TarBuilder]) -> Vec<LayerIndex> {
    let mut packs = TestPacks::new();
    tars.iter()
        .map(|tar| ingest(&tar.finish()[..], &mut packs, &Limits::default()).unwrap())
        .collect()
}

/// Path -> what is there: `d`, `f` with size and links, `l` with target, and so on.
fn list(tars: &[&TarBuilder]) -> Result<BTreeMap<String, String>, ImageError> {
    let layers = layers(tars);
    assemble(&layers)?;
    let mut tree = Tree::new();
    for (number, layer) in layers.iter().enumerate() {
        layer
            .entries
            .iter()
            .for_each(|entry| tree.apply(entry, number).unwrap());
    }
    let mut found = BTreeMap::new();
    let mut todo: Vec<(String, &Directory<'_>)> = tree
        .directory(ROOT)
        .map(|root| (String::new(), root))
        .into_iter()
        .collect();
    while let Some((path, directory)) = todo.pop() {
        for (name, child) in &directory.children {
            let path = format!("{path}{}", String::from_utf8_lossy(name));
            found.insert(path.clone(), show(&tree.inodes[child.inode]));
            todo.extend(tree.directory(child.inode).map(|directory| (path + "/", directory)));
        }
    }
    Ok(found)
}

fn show(inode: &Inode<'_>) -> String {
    match inode.kind {
        Kind::Directory(_) => format!("d{:o}", inode.attributes.mode),
        Kind::File { size, .. } => format!("f{size}x{}", inode.links),
        Kind::Symlink(target) => format!("l{}", shown(target)),
        Kind::CharDevice(_) => "c".into(),
        Kind::BlockDevice(_) => "b".into(),
        Kind::Fifo => "p".into(),
    }
}

fn tar(make: impl FnOnce(&mut TarBuilder) -> &mut TarBuilder) -> TarBuilder {
    let mut tar = TarBuilder::default();
    make(&mut tar);
    tar
}

fn assert_list(tars: &[&TarBuilder], expected: &[(&str, &str)]) {
    let expected = expected
        .iter()
        .map(|(path, what)| ((*path).to_string(), (*what).to_string()))
        .collect();
    assert_eq!(list(tars).unwrap(), expected);
}

fn misfit(tars: &[&TarBuilder]) -> (usize, String, Misfit) {
    match list(tars) {
        Err(ImageError::Entry { layer, path, source }) => (layer, path, source),
        other => panic!("{other:?}"),
    }
}

#[test]
fn upper_layers_replace_and_keep_what_they_should() {
    let lower = tar(|t| {
        t.dir("d")
            .file("d/a", b"1")
            .file("d/b", b"12")
            .file("f", b"1")
            .dir("g")
            .file("g/x", b"")
    });
    let upper = tar(|t| {
        t.member(
            "d",
            b'5',
            b"",
            "",
            crate::testing::Meta {
                mode: 0o700,
                ..Default::default()
            },
        )
        .file("d/b", b"123")
        .dir("f")
        .file("f/new", b"")
        .file("g", b"12")
    });
    assert_list(
        &[&lower, &upper],
        &[
            ("d", "d700"),
            ("d/a", "f1x1"),
            ("d/b", "f3x1"),
            ("f", "d755"),
            ("f/new", "f0x1"),
            ("g", "f2x1"),
        ],
    );
}

#[test]
fn file_to_folder_and_back_within_one_layer() {
    let t = tar(|t| {
        t.file("a", b"1")
            .dir("a")
            .file("a/b", b"2")
            .file("a", b"333")
            .file("a", b"4444")
    });
    assert_list(&[&t], &[("a", "f4x1")]);
}

#[test]
fn whiteouts_concern_lower_layers_wherever_they_stand() {
    let lower = tar(|t| {
        t.dir("d")
            .file("d/old", b"")
            .file("d/both", b"1")
            .dir("e")
            .file("e/x", b"")
    });
    let upper = tar(|t| {
        t.file("d/new", b"")
            .file("d/.wh..wh..opq", b"")
            .file("d/both", b"22")
            .file(".wh.e", b"")
            .file(".wh.none", b"")
    });
    assert_list(
        &[&lower, &upper],
        &[("d", "d755"), ("d/both", "f2x1"), ("d/new", "f0x1")],
    );
    let before = tar(|t| t.file(".wh.d", b"").file("d/new", b""));
    assert_list(
        &[&lower, &before],
        &[("d", "d755"), ("d/new", "f0x1"), ("e", "d755"), ("e/x", "f0x1")],
    );
    let after = tar(|t| t.file("d/new", b"").file(".wh.d", b""));
    assert_list(
        &[&lower, &after],
        &[("d", "d755"), ("d/new", "f0x1"), ("e", "d755"), ("e/x", "f0x1")],
    );
    let all = tar(|t| t.file(".wh..wh..opq", b"").file("n", b""));
    assert_list(&[&lower, &all], &[("n", "f0x1")]);
}

#[test]
fn a_whiteout_of_a_whiteout_and_of_a_file_that_came_back() {
    let file = tar(|t| t.file("a", b"1"));
    let gone = tar(|t| t.file(".wh.a", b""));
    let of_whiteout = tar(|t| t.file(".wh..wh.a", b""));
    assert_list(&[&file, &gone, &of_whiteout], &[]);
    assert_list(&[&file, &gone, &file, &gone, &file], &[("a", "f1x1")]);
}

#[test]
fn a_hard_link_outlives_its_target() {
    let lower = tar(|t| t.file("a", b"123").hard_link("b", "a").hard_link("c", "./b"));
    let upper = tar(|t| t.file(".wh.a", b"").hard_link("x/d", "/b"));
    assert_list(&[&lower], &[("a", "f3x3"), ("b", "f3x3"), ("c", "f3x3")]);
    assert_list(
        &[&lower, &upper],
        &[("b", "f3x3"), ("c", "f3x3"), ("x", "d755"), ("x/d", "f3x3")],
    );
    let replaced = tar(|t| t.file("a", b""));
    assert_list(&[&lower, &replaced], &[("a", "f0x1"), ("b", "f3x2"), ("c", "f3x2")]);
}

#[test]
fn hard_links_to_nothing_are_named() {
    let missing = tar(|t| t.hard_link("b", "a"));
    assert_eq!(misfit(&[&missing]), (1, "b".into(), Misfit::MissingTarget("a".into())));
    let lower = tar(|t| t.file("a", b""));
    let after_whiteout = tar(|t| t.file(".wh.a", b"").hard_link("b", "a"));
    assert_eq!(
        misfit(&[&lower, &after_whiteout]),
        (2, "b".into(), Misfit::MissingTarget("a".into()))
    );
    let itself = tar(|t| t.file("a", b"").hard_link("a", "a"));
    assert_eq!(misfit(&[&itself]).2, Misfit::MissingTarget("a".into()));
    let inside = tar(|t| t.file("d/a", b"").hard_link("d", "d/a"));
    assert_eq!(misfit(&[&inside]).2, Misfit::MissingTarget("d/a".into()));
    for target in ["d", "/", "../.."] {
        let folder = tar(|t| t.dir("d").hard_link("b", target));
        assert!(matches!(misfit(&[&folder]).2, Misfit::LinkToDirectory(_)), "{target}");
    }
}

#[test]
fn symbolic_links_are_followed_inside_the_image_only() {
    let lower = tar(|t| {
        t.symlink("lib", "usr/lib")
            .symlink("out", "../../../../etc")
            .symlink("abs", "/usr/./share")
    });
    let upper = tar(|t| t.file("lib/a", b"1").file("out/passwd", b"22").file("abs/s", b"333"));
    let expected = [
        ("abs", "l/usr/./share"),
        ("etc", "d755"),
        ("etc/passwd", "f2x1"),
        ("lib", "lusr/lib"),
        ("out", "l../../../../etc"),
        ("usr", "d755"),
        ("usr/lib", "d755"),
        ("usr/lib/a", "f1x1"),
        ("usr/share", "d755"),
        ("usr/share/s", "f3x1"),
    ];
    assert_list(&[&lower, &upper], &expected);
}

#[test]
fn loops_and_files_on_the_way_are_named() {
    let around = tar(|t| t.symlink("a", "b").symlink("b", "a").file("a/x", b""));
    assert_eq!(misfit(&[&around]), (1, "a/x".into(), Misfit::SymlinkLoop));
    let itself = tar(|t| t.symlink("a", "a/a/a").file("a/x", b""));
    assert_eq!(misfit(&[&itself]).2, Misfit::SymlinkLoop);
    let file = tar(|t| t.file("a", b"").file("a/x", b""));
    assert_eq!(misfit(&[&file]), (1, "a/x".into(), Misfit::NotADirectory("a".into())));
    let root = tar(|t| t.file("./", b"").symlink("/", "x"));
    assert_eq!(misfit(&[&root]).2, Misfit::Root);
}

#[test]
fn links_lead_no_deeper_than_linux_can_name() {
    let deep = "d/".repeat(1000);
    let t = tar(|t| {
        t.dir(&deep)
            .symlink("l", &deep)
            .dir(&format!("l/{deep}"))
            .symlink("m", &format!("l/{deep}"))
            .file("m/d/d/d/d/d/d/d/x", b"")
            .dir(&format!("m/{}", "d/".repeat(100)))
    });
    assert_eq!(misfit(&[&t]).2, Misfit::TooLong);
}

#[test]
fn many_opaque_marks_on_a_deep_tree_are_quick() {
    let deep = |n: usize, name: &str| format!("{}{name}", "d/".repeat(n));
    let lower = tar(|t| (0..2000).fold(t, |t, n| t.file(&deep(n % 1000, &format!("f{n}")), b"")));
    let upper = tar(|t| {
        (0..1000).rev().fold(t, |t, n| {
            t.file(&deep(n, "new"), b"").file(&deep(n, ".wh..wh..opq"), b"")
        })
    });
    assert_eq!(list(&[&lower, &upper]).unwrap().len(), 1000 + 999);
}

#[test]
fn many_opaque_marks_on_a_wide_folder_are_quick() {
    let lower = tar(|t| (0..100).fold(t, |t, n| t.file(&format!("d/old{n}"), b"")));
    let upper = tar(|t| (0..30_000).fold(t, |t, n| t.file(&format!("d/{n}"), b"").file("d/.wh..wh..opq", b"")));
    let begin = std::time::Instant::now();
    assert_eq!(list(&[&lower, &upper]).unwrap().len(), 30_001);
    // Looking at the folder once for each mark would be 900 million names, twice.
    assert!(begin.elapsed().as_secs() < 20, "it took {:?}", begin.elapsed());
}

/// Applies one layer to a tree with little `room` and few `steps`; the first misfit.
fn apply_within(room: usize, steps: u64, layer: &TarBuilder) -> Result<(), Misfit> {
    let layers = layers(&[layer]);
    let mut tree = Tree::new();
    tree.room = room;
    tree.steps.set(steps);
    layers[0].entries.iter().try_for_each(|entry| tree.apply(entry, 0))
}

#[test]
fn folders_that_no_layer_describes_count_as_well() {
    let deep = tar(|t| t.file(&format!("{}x", "d/".repeat(1500)), b""));
    assert_eq!(apply_within(1500, u64::MAX, &deep), Err(Misfit::TooManyFiles));
    assert_eq!(apply_within(1501, u64::MAX, &deep), Ok(()));
    // What is replaced has cost memory, too.
    let again = tar(|t| (0..10).fold(t, |t, _| t.file("a", b"")));
    assert_eq!(apply_within(9, u64::MAX, &again), Err(Misfit::TooManyFiles));
}

#[test]
fn paths_over_long_symbolic_links_end() {
    let around = "d/../".repeat(400);
    let links = tar(|t| {
        let t = t.dir("d").symlink("l0", "d");
        let t = (1..200).fold(t, |t, n| t.symlink(&format!("l{n}"), &format!("{around}l{}", n - 1)));
        (0..20).fold(t, |t, n| t.file(&format!("l199/{n}"), b""))
    });
    assert_eq!(apply_within(usize::MAX, 1_000_000, &links), Err(Misfit::TooManySteps));
    assert_eq!(apply_within(usize::MAX, 20_000_000, &links), Ok(()));
}

#[test]
fn many_files_with_holes_are_refused_before_their_maps_take_memory() {
    // 64 MiB with a byte in each: 16384 block numbers, out of less than 2 KiB of tar.
    let holes = |count: usize| {
        tar(|t| {
            (0..count).fold(t, |t, n| {
                t.pax("GNU.sparse.size", b"67108864")
                    .pax("GNU.sparse.map", b"67108863,1")
                    .file(&format!("{n}"), b"x")
            })
        })
    };
    assert!(assemble(&layers(&[&holes(10)])).is_ok());
    assert_eq!(assemble(&layers(&[&holes(2049)])), Err(ImageError::TooManyHoles));
}

#[test]
fn too_many_layers_and_contradicting_indexes_are_refused() {
    let empty = vec![LayerIndex::default(); MAX_LAYERS + 1];
    assert_eq!(assemble(&empty), Err(ImageError::TooManyLayers(1001)));
    let mut index = layers(&[&tar(|t| t.file("a", b"1"))]);
    index[0].chunks.clear();
    assert_eq!(assemble(&index), Err(ImageError::Inconsistent));
}

#[test]
fn a_file_of_a_tebibyte_is_a_hole_and_a_longer_image_is_refused() {
    let sparse = |name: &str| {
        tar(|t| {
            t.pax("GNU.sparse.size", (1u64 << 40).to_string().as_bytes())
                .pax("GNU.sparse.map", b"1099511627000,5")
                .file(name, b"hello")
        })
    };
    let image = assemble(&layers(&[&sparse("a")])).unwrap();
    assert!(image.size() < 1 << 28, "{} bytes of addresses for a hole", image.size());
    assert!(image.metadata().len() < 128 << 10);
}
