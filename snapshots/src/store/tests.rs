use std::collections::HashSet;
use std::fs::{self, OpenOptions};
use std::io::Write;

use super::*;

fn open(dir: &Path) -> ChunkStore {
    let options = StoreOptions {
        pack_bytes: 64 << 10,
        reserve_bytes: 0,
        ..StoreOptions::default()
    };
    ChunkStore::open(dir, options).unwrap()
}

/// Bytes that do not compress, the same in each run.
fn noise(len: usize, seed: u64) -> Vec<u8> {
    let mut random = fastrand::Rng::with_seed(seed);
    std::iter::repeat_with(|| random.u8(..)).take(len).collect()
}

fn put(store: &ChunkStore, data: &[u8]) -> ChunkId {
    store.session().sink().unwrap().put(data).unwrap()
}

fn packed(dir: &Path) -> u64 {
    fs::read_dir(dir.join("packs"))
        .unwrap()
        .map(|entry| entry.unwrap().metadata().unwrap().len())
        .sum()
}

fn collect(store: &ChunkStore, live: &[ChunkId]) -> Collected {
    store
        .collect::<StoreError>(|| Ok(live.iter().copied().collect::<HashSet<_>>()), || Ok(()))
        .unwrap()
}

#[test]
fn what_was_put_is_there_also_after_opening_again() {
    let dir = tempfile::tempdir().unwrap();
    let chunks = [vec![7; 100_000], noise(50_000, 1), noise(MAX_CHUNK_LEN, 2), vec![1]];
    let store = open(dir.path());
    let ids: Vec<_> = chunks.iter().map(|chunk| put(&store, chunk)).collect();
    assert!(
        matches!(store.locate(&ids), Err(StoreError::Missing(_))),
        "uncommitted chunks were located"
    );
    store.commit().unwrap();
    drop(store);
    let store = open(dir.path());
    for (id, chunk) in ids.iter().zip(&chunks) {
        assert_eq!(store.get(*id).unwrap(), *chunk);
    }
    for wrong in [&[][..], &vec![0; MAX_CHUNK_LEN + 1]] {
        assert!(matches!(
            store.session().sink().unwrap().put(wrong),
            Err(StoreError::Length(_))
        ));
    }
}

#[test]
fn threads_that_put_the_same_store_it_once() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let session = store.session();
    let chunks: Vec<_> = (0..20).map(|seed| noise(10_000, seed)).collect();
    std::thread::scope(|scope| {
        for _ in 0..8 {
            let mut sink = session.sink().unwrap();
            scope.spawn({
                let chunks = &chunks;
                move || {
                    for chunk in chunks {
                        assert_eq!(sink.put(chunk).unwrap(), ChunkId::of(chunk));
                    }
                }
            });
        }
    });
    session.commit().unwrap();
    assert!(packed(dir.path()) < 20 * 11_000, "chunks were stored more than once");
}

#[test]
fn what_was_not_committed_is_dropped_at_opening() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let kept = put(&store, &noise(1000, 1));
    store.commit().unwrap();
    let len = packed(dir.path());
    let lost = put(&store, &noise(1000, 2));
    // The process ends here, in the middle of a further record; dropping the store commits nothing.
    drop(store);
    let pack = Pack::path(&dir.path().join("packs"), PackId(1));
    OpenOptions::new()
        .append(true)
        .open(&pack)
        .unwrap()
        .write_all(b"FREC torn")
        .unwrap();
    fs::write(dir.path().join("packs/00000009.pack"), "never committed").unwrap();

    let store = open(dir.path());
    assert_eq!(packed(dir.path()), len);
    assert!(store.get(kept).is_ok());
    assert!(matches!(store.get(lost), Err(StoreError::Missing(_))));
    assert_eq!(put(&store, &noise(1000, 2)), lost);
    assert!(store.get(lost).is_ok());
}

#[test]
fn a_lost_or_damaged_index_is_made_again_from_the_packs() {
    for damage in ["missing", "rubbish"] {
        let dir = tempfile::tempdir().unwrap();
        let store = open(dir.path());
        let ids: Vec<_> = (0..30).map(|seed| put(&store, &noise(5000, seed))).collect();
        store.commit().unwrap();
        drop(store);
        let index = dir.path().join("index.redb");
        match damage {
            "missing" => fs::remove_file(&index).unwrap(),
            _ => fs::write(&index, vec![0x5a; 10_000]).unwrap(),
        }
        // A record that is not whole, at the end of the last pack.
        let last = *files(&dir.path().join("packs")).unwrap().last().unwrap();
        let mut last = OpenOptions::new()
            .append(true)
            .open(Pack::path(&dir.path().join("packs"), last))
            .unwrap();
        last.write_all(b"FREC\x10\x00\x00\x00\x10\x00\x00\x00").unwrap();

        let store = open(dir.path());
        for (id, seed) in ids.iter().zip(0..) {
            assert_eq!(store.get(*id).unwrap(), noise(5000, seed), "{damage}");
        }
    }
}

#[test]
fn a_damaged_chunk_is_told_and_never_handed_out() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let id = put(&store, &noise(1000, 1));
    store.commit().unwrap();
    let path = Pack::path(&dir.path().join("packs"), PackId(1));
    let mut bytes = fs::read(&path).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(&path, bytes).unwrap();
    assert!(matches!(store.get(id), Err(StoreError::Damaged { .. })));
}

#[test]
fn chunks_of_a_shortened_pack_are_forgotten() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let (first, second) = (put(&store, &noise(1000, 1)), put(&store, &noise(1000, 2)));
    store.commit().unwrap();
    drop(store);
    let path = Pack::path(&dir.path().join("packs"), PackId(1));
    OpenOptions::new()
        .write(true)
        .open(&path)
        .unwrap()
        .set_len(packed(dir.path()) - 1)
        .unwrap();
    let store = open(dir.path());
    assert!(store.get(first).is_ok());
    assert!(!store.contains(second).unwrap());
}

#[test]
fn a_sweep_takes_what_is_dead_and_leaves_what_lives() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let ids: Vec<_> = (0..60).map(|seed| put(&store, &noise(5000, seed))).collect();
    store.commit().unwrap();
    let live: Vec<_> = ids.iter().copied().step_by(10).collect();
    let collected = collect(&store, &live);
    assert_eq!((collected.chunks, collected.moved), (54, 6));
    assert!(packed(dir.path()) < 6 * 5100, "packs that are mostly dead were kept");
    drop(store);
    let store = open(dir.path());
    for (id, seed) in ids.iter().zip(0..) {
        match store.get(*id) {
            Ok(chunk) => assert!(live.contains(id) && chunk == noise(5000, seed)),
            Err(error) => assert!(!live.contains(id), "{error}"),
        }
    }
}

#[test]
fn packs_stay_until_who_keeps_places_has_looked_again() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let ids: Vec<_> = (0..60).map(|seed| put(&store, &noise(5000, seed))).collect();
    store.commit().unwrap();
    let live: HashSet<_> = ids.iter().copied().step_by(10).collect();
    let mut before = files(&dir.path().join("packs")).unwrap();
    // In the last pack nothing lives, so nobody reads it.
    before.pop();
    let sweep = |looked: &dyn Fn() -> Result<(), StoreError>| store.collect(|| Ok(live.clone()), looked);
    // As when there is no room to write down where chunks lie now.
    let fails = || Err(StoreError::Sink("no room".to_owned()));
    sweep(&fails).unwrap_err();
    sweep(&fails).unwrap_err();
    let held = files(&dir.path().join("packs")).unwrap();
    assert!(
        before.iter().all(|pack| held.contains(pack)),
        "{before:?} became {held:?}: a pack is gone that is still read"
    );
    let looks = std::cell::Cell::new(0);
    let look = || {
        looks.set(looks.get() + 1);
        Ok(())
    };
    sweep(&look).unwrap();
    assert_eq!(looks.get(), 1);
    assert!(packed(dir.path()) < 6 * 5100);
    sweep(&look).unwrap();
    assert_eq!(looks.get(), 1, "nothing had moved");
}

#[test]
fn a_sweep_leaves_what_a_session_holds() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let old = put(&store, b"put by a session that is over");
    let session = store.session();
    let new = session.sink().unwrap().put(b"put by this one").unwrap();
    assert_eq!(
        session.sink().unwrap().put(b"put by a session that is over").unwrap(),
        old
    );
    collect(&store, &[]);
    assert!(store.get(old).is_ok() && store.get(new).is_ok());
    drop(session);
    assert_eq!(collect(&store, &[]).chunks, 2);
    assert_eq!(packed(dir.path()), 0);
}

#[test]
fn one_store_has_one_owner() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let error = ChunkStore::open(dir.path(), StoreOptions::default())
        .err()
        .unwrap()
        .to_string();
    assert!(error.contains(&format!("process {}", std::process::id())), "{error}");
    drop(store);
    open(dir.path());
}

/// Alters what the store has of a chunk.
fn damage(store: &ChunkStore, id: ChunkId) {
    let place = store.locate(&[id]).unwrap()[0];
    let path = Pack::path(&store.inner.packs_dir, place.pack);
    let pack = OpenOptions::new().write(true).open(path).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&pack, &[0xee; 16], place.offset).unwrap();
}

#[test]
fn a_damaged_copy_is_replaced_and_a_good_one_is_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let chunks = [noise(50_000, 1), vec![7; 50_000], noise(20_000, 3)];
    let ids: Vec<_> = chunks.iter().map(|chunk| put(&store, chunk)).collect();
    store.commit().unwrap();
    let before = store.locate(&ids).unwrap();
    assert!(ids.iter().all(|id| store.find_good(*id).unwrap().is_some()));
    ids[..2].iter().for_each(|id| damage(&store, *id));
    assert!(store.find_good(ids[0]).unwrap().is_none());
    let session = store.session();
    for chunk in &chunks {
        session.sink().unwrap().mend(chunk).unwrap();
        // The second time there is nothing to mend.
        session.sink().unwrap().mend(chunk).unwrap();
    }
    session.commit().unwrap();
    let after = store.locate(&ids).unwrap();
    assert!(before[0] != after[0] && before[1] != after[1] && before[2] == after[2]);
    assert_eq!(packed(dir.path()), {
        let twice = |at: usize| u64::from(after[at].stored_len) + pack::RECORD_HEADER_LEN;
        let packs = store.index().packs().unwrap().len() as u64;
        packs * pack::HEADER_LEN + 2 * (twice(0) + twice(1)) + twice(2)
    });
    drop((session, store));
    let store = open(dir.path());
    for (id, chunk) in ids.iter().zip(&chunks) {
        assert_eq!(store.get(*id).unwrap(), *chunk);
        assert_eq!(
            store.find_good(*id).unwrap().unwrap().location,
            store.locate(&[*id]).unwrap()[0]
        );
    }
    collect(&store, &ids);
    assert!(ids.iter().all(|id| store.get(*id).is_ok()));
}
