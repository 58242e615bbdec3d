//! Snapshots on a disk.

use super::*;

fn open(folder: &tempfile::TempDir) -> SavedPods {
    SavedPods::open(&folder.path().join("snapshots"), 3).unwrap()
}

fn save(saved: &SavedPods, name: &str) -> Result<host::Snapshot, SavedError> {
    finish(saved.begin(name, "web.blue")?)
}

fn finish(draft: Draft) -> Result<host::Snapshot, SavedError> {
    let files = draft.files()?;
    files.memory.set_len(64 << 20).unwrap();
    (&files.memory).write_all(b"memory").unwrap();
    draft.finish(
        &files,
        SavedRecord {
            disks: vec!["sha256:b".into()],
            ..SavedRecord::default()
        },
    )
}

fn names(saved: &SavedPods) -> Vec<String> {
    saved.list().into_iter().map(|snapshot| snapshot.name).collect()
}

#[test]
fn a_snapshot_is_there_after_a_restart_until_it_is_removed() {
    let folder = tempfile::tempdir().unwrap();
    let saved = open(&folder);
    let first = save(&saved, "").unwrap();
    assert_eq!(first.name, "web-blue-1");
    assert!(
        (1..1 << 20).contains(&first.stored_bytes),
        "holes cost nothing: {first:?}"
    );
    assert_eq!(save(&saved, "").unwrap().name, "web-blue-2");

    let saved = open(&folder);
    assert_eq!(saved.list()[0], first);
    assert_eq!(saved.images(), ["sha256:b", "sha256:b"]);
    assert_eq!(saved.remove("web-blue-1").unwrap(), first.stored_bytes);
    assert!(matches!(saved.remove("web-blue-1"), Err(SavedError::NotFound(_))));
    assert_eq!(names(&open(&folder)), ["web-blue-2"]);
    assert_eq!(names(&saved), ["web-blue-2"]);
}

#[test]
fn what_is_not_finished_leaves_nothing_now_or_at_the_next_start() {
    let folder = tempfile::tempdir().unwrap();
    let saved = open(&folder);
    drop(saved.begin("a", "").unwrap());
    let killed = saved.begin("b", "").unwrap();
    killed.files().unwrap();
    std::mem::forget(killed);

    let saved = open(&folder);

    assert!(names(&saved).is_empty());
    let left = fs::read_dir(folder.path().join("snapshots")).unwrap().count();
    assert_eq!(left, 0);
    save(&saved, "b").unwrap();
}

#[test]
fn a_name_is_taken_once_checked_and_their_number_bounded() {
    let folder = tempfile::tempdir().unwrap();
    let saved = open(&folder);
    let being_made = saved.begin("a", "").unwrap();
    assert!(matches!(save(&saved, "a"), Err(SavedError::Exists(_))));
    assert!(names(&saved).is_empty(), "it is not there yet");
    drop(being_made);
    save(&saved, "a").unwrap();
    assert!(matches!(save(&saved, "a"), Err(SavedError::Exists(_))));
    for wrong in ["A", "a/b", "..", ".new-a", "-a", "a-", &"a".repeat(64)] {
        assert!(matches!(save(&saved, wrong), Err(SavedError::Name(_))), "{wrong}");
    }
    save(&saved, "b").unwrap();
    save(&saved, "c").unwrap();
    assert!(matches!(save(&saved, "d"), Err(SavedError::TooMany(3))));
}

#[test]
fn a_folder_whose_record_is_damaged_is_no_snapshot_and_is_not_touched() {
    let folder = tempfile::tempdir().unwrap();
    save(&open(&folder), "a").unwrap();
    let path = folder.path().join("snapshots/a");
    fs::write(path.join(RECORD), [0xff; 40]).unwrap();

    let saved = open(&folder);

    assert!(names(&saved).is_empty());
    assert!(matches!(save(&saved, "a"), Err(SavedError::Exists(_))));
    assert!(path.join("memory").exists());
}

#[test]
fn an_unlisted_snapshot_goes_when_all_pods_are_made_of_it() {
    let folder = tempfile::tempdir().unwrap();
    let saved = open(&folder);
    let hidden = finish(saved.begin_unlisted().unwrap()).unwrap().name;
    assert!(names(&saved).is_empty(), "people do not see it");
    assert_eq!(saved.images(), ["sha256:b"], "it needs its images all the same");
    assert!(matches!(saved.remove(&hidden), Err(SavedError::NotFound(_))));
    let holds = [saved.hold(&hidden).unwrap(), saved.hold(&hidden).unwrap()];
    assert_eq!(holds[0].files().unwrap().memory.metadata().unwrap().len(), 64 << 20);
    for held in holds {
        saved
            .hold(&hidden)
            .expect("it is there as long as anybody holds it")
            .release();
        held.release();
    }
    assert!(matches!(saved.hold(&hidden), Err(SavedError::NotFound(_))));
    assert_eq!(fs::read_dir(folder.path().join("snapshots")).unwrap().count(), 0);
}

#[test]
fn an_unlisted_snapshot_of_which_a_pod_is_still_to_be_made_is_left_to_the_next_flintd() {
    let folder = tempfile::tempdir().unwrap();
    let saved = open(&folder);
    let hidden = finish(saved.begin_unlisted().unwrap()).unwrap().name;
    let (made, stopped) = (saved.hold(&hidden).unwrap(), saved.hold(&hidden).unwrap());
    drop(stopped);
    made.release();

    let saved = open(&folder);
    let held = saved.hold(&hidden).unwrap();
    saved.remove_orphans();
    drop(held);
    let saved = open(&folder);
    assert!(saved.hold(&hidden).is_ok());

    let saved = open(&folder);
    saved.remove_orphans();
    assert_eq!(fs::read_dir(folder.path().join("snapshots")).unwrap().count(), 0);
}

#[test]
fn a_snapshot_that_is_held_cannot_be_removed() {
    let folder = tempfile::tempdir().unwrap();
    let saved = open(&folder);
    save(&saved, "a").unwrap();
    let held = saved.hold("a").unwrap();
    assert!(matches!(saved.remove("a"), Err(SavedError::InUse(_))));
    drop(held);
    saved.remove("a").unwrap();
}
