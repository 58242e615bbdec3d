//! Saved pods on this host's disk.
//!
//! ```text
//!   <state>/snapshots/.new-<name>/   being made; whatever is found of it at a start is removed
//!                     <name>/state   the machine (vmm.proto, SaveSnapshot)
//!                            memory  its memory, with holes
//!                            scratch the pod's writable disk, with holes
//!                            record  what was saved, written last
//! ```
//!
//! A snapshot gets its name when all of it is on the disk; one that is removed loses the name first. So what has a name is whole.

use std::{
    collections::BTreeMap,
    fs::{self, DirBuilder, File},
    io::{self, Write as _},
    os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use flint_api::{host, vmm};
use prost::Message;
use thiserror::Error;
use tracing::warn;

use crate::pods::PodRecord;

/// Prefix of what has no name: no snapshot's begins like this.
const UNNAMED: &str = ".new-";
const RECORD: &str = "record";

/// What is known of a saved pod beside its files.
#[derive(Clone, PartialEq, Message)]
pub struct SavedRecord {
    /// As the API shows it.
    #[prost(message, optional, tag = "1")]
    pub snapshot: Option<host::Snapshot>,
    /// The pod as flintd knew it.
    #[prost(message, optional, tag = "2")]
    pub pod: Option<PodRecord>,
    /// The machine that can load it.
    #[prost(message, optional, tag = "3")]
    pub machine: Option<vmm::CreateMachine>,
    /// The images in the order of the machine's disks.
    #[prost(string, repeated, tag = "4")]
    pub disks: Vec<String>,
    /// Address that its network interface had.
    #[prost(bytes = "vec", tag = "5")]
    pub mac: Vec<u8>,
}

impl SavedRecord {
    fn name(&self) -> &str {
        self.snapshot.as_ref().map_or("", |snapshot| &snapshot.name)
    }
}

/// A request about snapshots failed.
#[derive(Debug, Error)]
pub enum SavedError {
    /// The name cannot be one.
    #[error("{0:?} is no name for a snapshot: it has 1 to 63 of a-z 0-9 -, and does not begin or end with -")]
    Name(String),
    /// It is taken.
    #[error("there is a snapshot {0} already, or it is being made: remove it, or choose another name")]
    Exists(String),
    /// It is not there.
    #[error("there is no snapshot {0} on this host; `flint snapshots` lists them")]
    NotFound(String),
    /// There are enough.
    #[error("this host has {0} snapshots, as many as it may have (flintd --max-snapshots): remove one")]
    TooMany(usize),
    /// The disk is full.
    #[error("no room for the snapshot in {0}: make room, for example by removing another snapshot, and try again")]
    NoSpace(PathBuf),
    /// A file or folder did not do as asked.
    #[error("could not {action} {path}")]
    File {
        /// What was tried.
        action: &'static str,
        /// On which.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
}

fn failed(action: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> SavedError {
    let path = path.into();
    move |source| match source.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => SavedError::NoSpace(path),
        _ => SavedError::File { action, path, source },
    }
}

/// The snapshots of one host.
#[derive(Clone, Debug)]
pub struct SavedPods(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    folder: PathBuf,
    most: usize,
    /// Absent values are being made.
    known: Mutex<BTreeMap<String, Option<SavedRecord>>>,
}

/// A snapshot that is being made. Dropped unfinished, it is removed.
#[derive(Debug)]
pub struct Draft {
    inner: Arc<Inner>,
    name: String,
    path: PathBuf,
    finished: bool,
}

/// The files of a snapshot.
#[derive(Debug)]
pub struct SavedFiles {
    /// The machine.
    pub state: File,
    /// Its memory.
    pub memory: File,
    /// The pod's writable disk.
    pub scratch: File,
}

impl SavedPods {
    /// Snapshots in `folder`, which is made if it is missing; at most so many. What an earlier flintd left unfinished is removed.
    pub fn open(folder: &Path, most: usize) -> Result<Self, SavedError> {
        let made = DirBuilder::new().recursive(true).mode(0o700).create(folder);
        made.map_err(failed("make the folder", folder))?;
        let mut known = BTreeMap::new();
        for entry in fs::read_dir(folder).map_err(failed("list", folder))? {
            let entry = entry.map_err(failed("list", folder))?;
            let Ok(name) = entry.file_name().into_string() else {
                continue;
            };
            if name.starts_with(UNNAMED) {
                fs::remove_dir_all(entry.path()).map_err(failed("remove the unfinished snapshot", entry.path()))?;
                continue;
            }
            match read(&entry.path()) {
                Ok(record) if record.name() == name => drop(known.insert(name, Some(record))),
                Ok(_) => warn!(
                    name,
                    "a folder among the snapshots has the record of another one and is left alone"
                ),
                Err(error) => {
                    warn!(name, %error, "a folder among the snapshots has no record that can be read and is left alone");
                }
            }
        }
        Ok(Self(Arc::new(Inner {
            folder: folder.to_owned(),
            most,
            known: Mutex::new(known),
        })))
    }

    /// Begins one; without a name, under the pod's with a number.
    pub fn begin(&self, name: &str, pod: &str) -> Result<Draft, SavedError> {
        let mut known = self.0.known();
        if known.len() >= self.0.most {
            return Err(SavedError::TooMany(known.len()));
        }
        let name = match name {
            "" => free_name(pod, &known),
            name if is_label(name) => name.to_owned(),
            name => return Err(SavedError::Name(name.to_owned())),
        };
        let path = self.0.folder.join(format!("{UNNAMED}{name}"));
        // A folder that could not be read at the start has its name, too.
        if known.contains_key(&name) || self.0.folder.join(&name).exists() {
            return Err(SavedError::Exists(name));
        }
        match fs::remove_dir_all(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(failed("remove", &path)(error))?,
            _ => {}
        }
        DirBuilder::new()
            .mode(0o700)
            .create(&path)
            .map_err(failed("make the folder", &path))?;
        known.insert(name.clone(), None);
        Ok(Draft {
            inner: Arc::clone(&self.0),
            name,
            path,
            finished: false,
        })
    }

    /// All of them, by name.
    pub fn list(&self) -> Vec<host::Snapshot> {
        let known = self.0.known();
        known
            .values()
            .flatten()
            .filter_map(|record| record.snapshot.clone())
            .collect()
    }

    /// Digests of the images that they need.
    pub fn images(&self) -> Vec<String> {
        let known = self.0.known();
        known
            .values()
            .flatten()
            .flat_map(|record| record.disks.clone())
            .collect()
    }

    /// Removes one and says how much that freed. Blocks.
    pub fn remove(&self, name: &str) -> Result<u64, SavedError> {
        let mut known = self.0.known();
        let Some(Some(record)) = known.get(name) else {
            return Err(SavedError::NotFound(name.to_owned()));
        };
        let freed = record.snapshot.as_ref().map_or(0, |snapshot| snapshot.stored_bytes);
        let (path, gone) = (self.0.folder.join(name), self.0.folder.join(format!("{UNNAMED}{name}")));
        fs::rename(&path, &gone).map_err(failed("remove", &path))?;
        known.remove(name);
        // Under the lock, so that none of that name is begun meanwhile. What is left here goes at the next start.
        fs::remove_dir_all(&gone).map_err(failed("remove", &gone))?;
        Ok(freed)
    }
}

impl Inner {
    fn known(&self) -> MutexGuard<'_, BTreeMap<String, Option<SavedRecord>>> {
        // Every change under the lock is one infallible step.
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Draft {
    /// What it will be called.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its files, empty.
    pub fn files(&self) -> Result<SavedFiles, SavedError> {
        let make = |name: &str| {
            let path = self.path.join(name);
            let file = File::options()
                .create_new(true)
                .read(true)
                .write(true)
                .mode(0o600)
                .open(&path);
            file.map_err(failed("make", path))
        };
        Ok(SavedFiles {
            state: make("state")?,
            memory: make("memory")?,
            scratch: make("scratch")?,
        })
    }

    /// Puts everything on the disk, and gives it its name. Blocks.
    pub fn finish(mut self, files: &SavedFiles, mut record: SavedRecord) -> Result<host::Snapshot, SavedError> {
        let mut stored = 0;
        for file in [&files.state, &files.memory, &files.scratch] {
            file.sync_all().map_err(failed("write the files of", &self.path))?;
            let data = file.metadata().map_err(failed("look at the files of", &self.path))?;
            stored += data.blocks() * 512;
        }
        let mut snapshot = record.snapshot.unwrap_or_default();
        snapshot.name.clone_from(&self.name);
        snapshot.stored_bytes = stored;
        record.snapshot = Some(snapshot.clone());
        let path = self.path.join(RECORD);
        let written = File::create_new(&path).and_then(|mut file| {
            file.write_all(&record.encode_to_vec())?;
            file.sync_all()
        });
        written.map_err(failed("write", &path))?;
        let named = self.inner.folder.join(&self.name);
        sync_folder(&self.path)?;
        fs::rename(&self.path, &named).map_err(failed("name", &named))?;
        // It has its name: from here on it is one, whatever fails.
        self.finished = true;
        self.inner.known().insert(self.name.clone(), Some(record));
        sync_folder(&self.inner.folder)?;
        Ok(snapshot)
    }

    /// The error of one who could not write into its files.
    pub fn refused(&self, source: io::Error) -> SavedError {
        failed("write the files of", &self.path)(source)
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        if self.finished {
            return;
        }
        if let Err(error) = fs::remove_dir_all(&self.path) {
            warn!(path = %self.path.display(), %error, "an unfinished snapshot stays until flintd is started again");
        }
        self.inner.known().remove(&self.name);
    }
}

fn sync_folder(path: &Path) -> Result<(), SavedError> {
    let synced = File::open(path).and_then(|folder| folder.sync_all());
    synced.map_err(failed("write the folder", path))
}

fn read(folder: &Path) -> io::Result<SavedRecord> {
    let bytes = fs::read(folder.join(RECORD))?;
    SavedRecord::decode(bytes.as_slice()).map_err(io::Error::other)
}

fn is_label(name: &str) -> bool {
    let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    (1..=63).contains(&name.len()) && name.chars().all(plain) && !name.starts_with('-') && !name.ends_with('-')
}

/// The pod's name, as far as it can be one, and the first number that is free.
fn free_name(pod: &str, known: &BTreeMap<String, Option<SavedRecord>>) -> String {
    let stem: String = pod.chars().map(|c| if c == '.' { '-' } else { c }).take(50).collect();
    let stem = stem.trim_matches('-');
    // One more than there are: one of them is free.
    (1..=known.len() + 1)
        .map(|number| format!("{stem}-{number}"))
        .find(|name| !known.contains_key(name))
        .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn open(folder: &tempfile::TempDir) -> SavedPods {
        SavedPods::open(&folder.path().join("snapshots"), 3).unwrap()
    }

    fn save(saved: &SavedPods, name: &str) -> Result<host::Snapshot, SavedError> {
        let draft = saved.begin(name, "web.blue")?;
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
}
