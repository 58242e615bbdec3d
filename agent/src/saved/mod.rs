//! Saved pods on this host's disk.
//!
//! ```text
//!   <state>/snapshots/.new-<name>/   being made; whatever is found of it at a start is removed
//!                     <name>/state   the machine (vmm.proto, SaveSnapshot)
//!                            memory  its memory, with holes; empty where that is chunks in the image store
//!                            scratch the pod's writable disk, with holes
//!                            record  what was saved, written last
//! ```
//!
//! A pod that is forked is saved under a name that people do not see, `.fork-<number>`, which goes with the last fork that is made of it.
//!
//! A snapshot gets its name when all of it is on the disk; one that is removed loses the name first. So what has a name is whole.

use std::{
    collections::{BTreeMap, HashMap},
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
/// Prefix of the name of a snapshot that people do not see: it is there for a fork.
const UNLISTED: &str = ".fork-";
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
    /// Memory that the machine had plugged.
    #[prost(uint64, tag = "6")]
    pub plugged_bytes: u64,
    /// How far the containers' logs were.
    #[prost(message, repeated, tag = "7")]
    pub outputs: Vec<SavedOutput>,
    /// The memory is in the chunk store, in the machine of the snapshot's name, and not in the file.
    #[prost(bool, tag = "8")]
    pub memory_in_store: bool,
}

/// How far the log of a container's run was when the pod was saved: its guest has all that follows, and not all that went before.
#[derive(Clone, PartialEq, Message)]
pub struct SavedOutput {
    /// Name of the container.
    #[prost(string, tag = "1")]
    pub container: String,
    /// Its run.
    #[prost(uint32, tag = "2")]
    pub run: u32,
    /// In bytes of output.
    #[prost(uint64, tag = "3")]
    pub offset: u64,
}

impl SavedRecord {
    /// The snapshot's name.
    pub fn name(&self) -> &str {
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
    /// It is needed.
    #[error("a pod is being made of snapshot {0} just now: try again when it runs")]
    InUse(String),
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
    known: Mutex<Known>,
}

#[derive(Debug, Default)]
struct Known {
    /// Absent values are being made.
    records: BTreeMap<String, Option<SavedRecord>>,
    /// Of which pods are still to be made.
    holds: HashMap<String, Holds>,
    /// Images that those need that are being made.
    wanted: HashMap<String, Vec<String>>,
}

#[derive(Debug, Default)]
struct Holds {
    /// How many pods.
    count: usize,
    /// One of them was not made, and will be by the next flintd.
    needed: bool,
}

impl Known {
    /// Those that people see.
    fn listed(&self) -> impl Iterator<Item = &SavedRecord> {
        let records = self.records.iter().filter(|(name, _)| !is_unlisted(name));
        records.filter_map(|(_, record)| record.as_ref())
    }
}

/// A snapshot that is being made. Dropped unfinished, it is removed.
#[derive(Debug)]
pub struct Draft {
    inner: Arc<Inner>,
    name: String,
    path: PathBuf,
    finished: bool,
}

/// A snapshot that a pod is to be made of.
#[derive(Debug)]
pub struct Held {
    inner: Arc<Inner>,
    name: String,
    record: SavedRecord,
    released: bool,
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
        let mut records = BTreeMap::new();
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
                Ok(record) if record.name() == name => drop(records.insert(name, Some(record))),
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
            known: Mutex::new(Known {
                records,
                ..Known::default()
            }),
        })))
    }

    /// Begins one; without a name, under the pod's with a number.
    pub fn begin(&self, name: &str, pod: &str) -> Result<Draft, SavedError> {
        let mut known = self.0.known();
        let count = known.records.keys().filter(|name| !is_unlisted(name)).count();
        if count >= self.0.most {
            return Err(SavedError::TooMany(count));
        }
        let name = match name {
            "" => free_name(pod, &known.records),
            name if is_label(name) => name.to_owned(),
            name => return Err(SavedError::Name(name.to_owned())),
        };
        self.draft(&mut known, name)
    }

    /// Begins one that people do not see, and that goes when the last pod was made of it.
    pub fn begin_unlisted(&self) -> Result<Draft, SavedError> {
        let mut known = self.0.known();
        // Their number is no limit: each is one of a pod's that runs.
        let free = (0..=known.records.len())
            .map(|number| format!("{UNLISTED}{number}"))
            .find(|name| !known.records.contains_key(name));
        // One more than there are: one of them is free.
        self.draft(&mut known, free.unwrap_or_default())
    }

    fn draft(&self, known: &mut Known, name: String) -> Result<Draft, SavedError> {
        let path = self.0.folder.join(format!("{UNNAMED}{name}"));
        // A folder that could not be read at the start has its name, too.
        if known.records.contains_key(&name) || self.0.folder.join(&name).exists() {
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
        known.records.insert(name.clone(), None);
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
        known.listed().filter_map(|record| record.snapshot.clone()).collect()
    }

    /// Digests of the images that they need, those that are being made too.
    pub fn images(&self) -> Vec<String> {
        let known = self.0.known();
        let disks = known.records.values().flatten().flat_map(|record| &record.disks);
        disks.chain(known.wanted.values().flatten()).cloned().collect()
    }

    /// What is known of one that people see, and its files, which can be read whatever becomes of it.
    pub fn read(&self, name: &str) -> Result<(SavedRecord, SavedFiles), SavedError> {
        if is_unlisted(name) {
            return Err(SavedError::NotFound(name.to_owned()));
        }
        let held = self.hold(name)?;
        Ok((held.record().clone(), held.files()?))
    }

    /// Removes one and says how much that freed. Blocks.
    pub fn remove(&self, name: &str) -> Result<u64, SavedError> {
        if is_unlisted(name) {
            return Err(SavedError::NotFound(name.to_owned()));
        }
        self.0.remove(&mut self.0.known(), name)
    }

    /// Holds one for a pod that is to be made of it: it cannot be removed.
    pub fn hold(&self, name: &str) -> Result<Held, SavedError> {
        let mut known = self.0.known();
        let Some(Some(record)) = known.records.get(name) else {
            return Err(SavedError::NotFound(name.to_owned()));
        };
        let record = record.clone();
        known.holds.entry(name.to_owned()).or_default().count += 1;
        Ok(Held {
            inner: Arc::clone(&self.0),
            name: name.to_owned(),
            record,
            released: false,
        })
    }

    /// Removes those that people do not see and nobody holds: an earlier flintd was killed over them. Blocks.
    pub fn remove_orphans(&self) {
        let mut known = self.0.known();
        let orphans = known.records.keys().filter(|name| is_unlisted(name));
        let orphans: Vec<_> = orphans
            .filter(|name| !known.holds.contains_key(*name))
            .cloned()
            .collect();
        for name in orphans {
            self.0.remove_or_warn(&mut known, &name);
        }
    }
}

impl Inner {
    fn known(&self) -> MutexGuard<'_, Known> {
        // Every change under the lock is one infallible step.
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Under the lock, so that none of that name is begun meanwhile.
    fn remove(&self, known: &mut Known, name: &str) -> Result<u64, SavedError> {
        let Some(Some(record)) = known.records.get(name) else {
            return Err(SavedError::NotFound(name.to_owned()));
        };
        if known.holds.contains_key(name) {
            return Err(SavedError::InUse(name.to_owned()));
        }
        let freed = record.snapshot.as_ref().map_or(0, |snapshot| snapshot.stored_bytes);
        let (path, gone) = (self.folder.join(name), self.folder.join(format!("{UNNAMED}{name}")));
        fs::rename(&path, &gone).map_err(failed("remove", &path))?;
        known.records.remove(name);
        // What is left here goes at the next start.
        fs::remove_dir_all(&gone).map_err(failed("remove", &gone))?;
        Ok(freed)
    }

    fn remove_or_warn(&self, known: &mut Known, name: &str) {
        if let Err(error) = self.remove(known, name) {
            warn!(name, %error, "a snapshot that nobody needs stays until flintd is started again");
        }
    }
}

impl Held {
    /// What is known of it.
    pub fn record(&self) -> &SavedRecord {
        &self.record
    }

    /// Its files, for reading. They can be used whatever becomes of the snapshot.
    pub fn files(&self) -> Result<SavedFiles, SavedError> {
        let open = |name: &str| {
            let path = self.inner.folder.join(&self.name).join(name);
            File::open(&path).map_err(failed("open", path))
        };
        Ok(SavedFiles {
            state: open("state")?,
            memory: open("memory")?,
            scratch: open("scratch")?,
        })
    }
}

impl Held {
    /// The pod was made, or will not be: a snapshot that people do not see goes when all who held it have said so. Blocks.
    pub fn release(mut self) {
        self.released = true;
        let (inner, name) = (Arc::clone(&self.inner), self.name.clone());
        drop(self);
        let mut known = inner.known();
        if is_unlisted(&name) && !known.holds.contains_key(&name) && known.records.contains_key(&name) {
            inner.remove_or_warn(&mut known, &name);
        }
    }
}

impl Drop for Held {
    /// Removes nothing, and nobody else will: a flintd that stops leaves to the next one what is still to be made.
    fn drop(&mut self) {
        let mut known = self.inner.known();
        if let Some(holds) = known.holds.get_mut(&self.name) {
            holds.count -= 1;
            holds.needed |= !self.released && is_unlisted(&self.name);
            if holds.count == 0 && !holds.needed {
                known.holds.remove(&self.name);
            }
        }
    }
}

impl Draft {
    /// What it will be called.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What it will need: these images cannot be removed from now on.
    pub fn needs(&self, images: Vec<String>) {
        self.inner.known().wanted.insert(self.name.clone(), images);
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
        let mut known = self.inner.known();
        known.records.insert(self.name.clone(), Some(record));
        known.wanted.remove(&self.name);
        drop(known);
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
        let mut known = self.inner.known();
        known.records.remove(&self.name);
        known.wanted.remove(&self.name);
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

fn is_unlisted(name: &str) -> bool {
    name.starts_with(UNLISTED)
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
mod tests;
