//! What flintd remembers over its own death: pods, the revision, the lease. One redb file; a commit is there wholly or not
//! at all.

use std::{
    fs,
    path::{Path, PathBuf},
};

use prost::Message;
use redb::{Database, ReadableDatabase, ReadableTable, TableDefinition};
use thiserror::Error;

use crate::pods::PodRecord;

const PODS: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("pods");
const HOST: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("host");
const REVISION: &str = "revision";
const HOST_STATE: &str = "state";

/// The store failed.
#[derive(Debug, Error)]
pub enum StoreError {
    /// redb refused.
    #[error("{doing} the state file {path}: {source}; if the disk is full, make room and try again")]
    Database {
        /// What was being done.
        doing: &'static str,
        /// Which file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: Box<redb::Error>,
    },
    /// A record cannot be read.
    #[error(
        "the state file {path} holds a record of pod {uid} that cannot be decoded ({source}): was it written by a newer flintd?"
    )]
    Record {
        /// Which file.
        path: PathBuf,
        /// Whose record.
        uid: String,
        /// Why not.
        #[source]
        source: prost::DecodeError,
    },
}

/// The host's own part of the state.
#[derive(Clone, PartialEq, Message)]
pub struct HostState {
    /// Of the present or last lease; 0: there never was one.
    #[prost(uint64, tag = "1")]
    pub lease_epoch: u64,
    /// Who holds it.
    #[prost(string, tag = "2")]
    pub lease_holder: String,
    /// Until when.
    #[prost(message, optional, tag = "3")]
    pub lease_until: Option<prost_types::Timestamp>,
    /// No new pods.
    #[prost(bool, tag = "4")]
    pub draining: bool,
}

/// One change.
#[derive(Clone, Debug)]
pub enum Change {
    /// A pod is as this record says.
    Put(String, Box<PodRecord>),
    /// A pod is forgotten.
    Remove(String),
    /// The host's own part.
    Host(HostState),
}

/// What was found at the start.
#[derive(Debug, Default)]
pub struct Loaded {
    /// All pods.
    pub pods: Vec<PodRecord>,
    /// The last revision given out.
    pub revision: u64,
    /// Lease and drain.
    pub host: HostState,
}

/// The state file.
#[derive(Debug)]
pub struct Store {
    path: PathBuf,
    /// Absent after a failed commit: redb wants to be opened anew after an input or output error.
    database: Option<Database>,
}

impl Store {
    /// Opens the state file, or makes it.
    pub fn open(path: &Path) -> Result<Self, StoreError> {
        let mut store = Self {
            path: path.to_owned(),
            database: None,
        };
        store.database()?;
        Ok(store)
    }

    /// Over a storage of the test's own.
    #[cfg(test)]
    pub(crate) fn with_backend(backend: impl redb::StorageBackend) -> Result<Self, StoreError> {
        let database = Database::builder()
            .create_with_backend(backend)
            .map_err(|source| StoreError::Database {
                doing: "opening",
                path: PathBuf::new(),
                source: Box::new(source.into()),
            })?;
        Ok(Self {
            path: PathBuf::new(),
            database: Some(database),
        })
    }

    fn database(&mut self) -> Result<&Database, StoreError> {
        let database = match self.database.take() {
            Some(database) => database,
            None => open(&self.path).map_err(|error| self.error("opening", error))?,
        };
        Ok(self.database.insert(database))
    }

    /// Everything in it.
    pub fn load(&self) -> Result<Loaded, StoreError> {
        let Some(database) = &self.database else {
            return Ok(Loaded::default());
        };
        let raw = read(database).map_err(|error| self.error("reading", error))?;
        let mut loaded = Loaded {
            revision: raw.revision,
            ..Loaded::default()
        };
        for (uid, bytes) in raw.pods {
            let record = PodRecord::decode(bytes.as_slice());
            loaded.pods.push(record.map_err(|source| StoreError::Record {
                path: self.path.clone(),
                uid,
                source,
            })?);
        }
        loaded.host = HostState::decode(raw.host.as_slice()).map_err(|source| StoreError::Record {
            path: self.path.clone(),
            uid: "(host)".into(),
            source,
        })?;
        Ok(loaded)
    }

    /// Makes all changes and the revision durable, or none of them.
    pub fn commit(&mut self, changes: &[Change], revision: u64) -> Result<(), StoreError> {
        let result = write(self.database()?, changes, revision);
        result.map_err(|error| {
            // A file-backed store is opened anew by the next commit.
            if !self.path.as_os_str().is_empty() {
                self.database = None;
            }
            self.error("writing", error)
        })
    }

    fn error(&self, doing: &'static str, source: redb::Error) -> StoreError {
        StoreError::Database {
            doing,
            path: self.path.clone(),
            source: Box::new(source),
        }
    }
}

/// Opens the file, or makes it under another name first: of a file that is half made redb says that it is none of its own, and
/// a flintd that was killed in its first moment must not keep the next one from starting.
fn open(path: &Path) -> Result<Database, redb::Error> {
    if !path.try_exists()? {
        let draft = path.with_extension("new");
        // Left by one that was killed here.
        if draft.try_exists()? {
            fs::remove_file(&draft)?;
        }
        drop(Database::create(&draft)?);
        fs::rename(&draft, path)?;
    }
    Ok(Database::create(path)?)
}

#[derive(Default)]
struct Raw {
    pods: Vec<(String, Vec<u8>)>,
    revision: u64,
    host: Vec<u8>,
}

fn read(database: &Database) -> Result<Raw, redb::Error> {
    let transaction = database.begin_read()?;
    let mut raw = Raw::default();
    let pods = match transaction.open_table(PODS) {
        Ok(pods) => pods,
        // Nothing was ever committed.
        Err(redb::TableError::TableDoesNotExist(_)) => return Ok(raw),
        Err(error) => return Err(error.into()),
    };
    for entry in pods.iter()? {
        let (uid, bytes) = entry?;
        raw.pods.push((uid.value().to_owned(), bytes.value().to_owned()));
    }
    let host = transaction.open_table(HOST)?;
    if let Some(bytes) = host.get(REVISION)? {
        raw.revision = bytes.value().try_into().map_or(0, u64::from_le_bytes);
    }
    if let Some(bytes) = host.get(HOST_STATE)? {
        raw.host = bytes.value().to_owned();
    }
    Ok(raw)
}

fn write(database: &Database, changes: &[Change], revision: u64) -> Result<(), redb::Error> {
    let transaction = database.begin_write()?;
    {
        let mut pods = transaction.open_table(PODS)?;
        let mut host = transaction.open_table(HOST)?;
        host.insert(REVISION, revision.to_le_bytes().as_slice())?;
        for change in changes {
            match change {
                Change::Put(uid, record) => drop(pods.insert(uid.as_str(), record.encode_to_vec().as_slice())?),
                Change::Remove(uid) => drop(pods.remove(uid.as_str())?),
                Change::Host(state) => drop(host.insert(HOST_STATE, state.encode_to_vec().as_slice())?),
            }
        }
    }
    transaction.commit()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::{
        io,
        sync::{Arc, Mutex},
    };

    use flint_api::host;

    use super::*;

    /// A disk that fails for good after some number of operations, and keeps of what was written only what was synced, or
    /// all of it: both happen when power fails.
    #[derive(Clone, Debug, Default)]
    struct Disk(Arc<Mutex<Platter>>);

    #[derive(Debug, Default)]
    struct Platter {
        written: Vec<u8>,
        synced: Vec<u8>,
        operations_left: usize,
    }

    impl Disk {
        fn failing_after(image: Vec<u8>, operations: usize) -> Self {
            let platter = Platter {
                written: image.clone(),
                synced: image,
                operations_left: operations,
            };
            Self(Arc::new(Mutex::new(platter)))
        }

        fn after_power_failure(&self, keep_unsynced: bool) -> Vec<u8> {
            let platter = self.0.lock().unwrap();
            if keep_unsynced {
                platter.written.clone()
            } else {
                platter.synced.clone()
            }
        }

        fn spend(platter: &mut Platter) -> io::Result<()> {
            platter.operations_left = platter
                .operations_left
                .checked_sub(1)
                .ok_or_else(|| io::Error::other("the power failed"))?;
            Ok(())
        }
    }

    impl redb::StorageBackend for Disk {
        fn len(&self) -> Result<u64, io::Error> {
            Ok(self.0.lock().unwrap().written.len() as u64)
        }
        fn read(&self, offset: u64, out: &mut [u8]) -> Result<(), io::Error> {
            let platter = self.0.lock().unwrap();
            let start = usize::try_from(offset).unwrap();
            let bytes = platter
                .written
                .get(start..start + out.len())
                .ok_or_else(|| io::Error::other("beyond the end"))?;
            out.copy_from_slice(bytes);
            Ok(())
        }
        fn set_len(&self, len: u64) -> Result<(), io::Error> {
            let mut platter = self.0.lock().unwrap();
            Self::spend(&mut platter)?;
            platter.written.resize(usize::try_from(len).unwrap(), 0);
            Ok(())
        }
        fn sync_data(&self) -> Result<(), io::Error> {
            let mut platter = self.0.lock().unwrap();
            Self::spend(&mut platter)?;
            platter.synced = platter.written.clone();
            Ok(())
        }
        fn write(&self, offset: u64, data: &[u8]) -> Result<(), io::Error> {
            let mut platter = self.0.lock().unwrap();
            Self::spend(&mut platter)?;
            let start = usize::try_from(offset).unwrap();
            platter.written[start..start + data.len()].copy_from_slice(data);
            Ok(())
        }
    }

    fn record(name: &str) -> PodRecord {
        let meta = host::PodMeta {
            uid: "u".into(),
            name: name.into(),
            ..Default::default()
        };
        PodRecord {
            pod: Some(host::Pod {
                meta: Some(meta),
                ..Default::default()
            }),
            ..Default::default()
        }
    }

    fn name(loaded: &Loaded) -> String {
        loaded.pods[0].pod.as_ref().unwrap().meta.as_ref().unwrap().name.clone()
    }

    #[test]
    fn what_was_committed_is_there_for_the_next_flintd() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("state.redb");
        let mut store = Store::open(&path).unwrap();
        assert_eq!(store.load().unwrap().revision, 0);
        let host = HostState {
            lease_epoch: 3,
            draining: true,
            ..Default::default()
        };
        store
            .commit(
                &[
                    Change::Put("u".into(), Box::new(record("one"))),
                    Change::Host(host.clone()),
                ],
                7,
            )
            .unwrap();
        drop(store);
        let mut store = Store::open(&path).unwrap();
        let loaded = store.load().unwrap();
        assert_eq!((name(&loaded).as_str(), loaded.revision, loaded.host), ("one", 7, host));
        store.commit(&[Change::Remove("u".into())], 8).unwrap();
        assert!(store.load().unwrap().pods.is_empty());
    }

    #[test]
    fn wherever_the_power_fails_a_commit_is_there_wholly_or_not_at_all() {
        let healthy = Disk::failing_after(Vec::new(), usize::MAX);
        let mut store = Store::with_backend(healthy.clone()).unwrap();
        store
            .commit(&[Change::Put("u".into(), Box::new(record("before")))], 1)
            .unwrap();
        drop(store);
        let image = healthy.after_power_failure(false);
        let (mut before, mut after) = (0, 0);
        for operations in 0.. {
            let disk = Disk::failing_after(image.clone(), operations);
            let committed = Store::with_backend(disk.clone())
                .and_then(|mut store| store.commit(&[Change::Put("u".into(), Box::new(record("after")))], 2));
            for keep_unsynced in [false, true] {
                let image = disk.after_power_failure(keep_unsynced);
                let store = Store::with_backend(Disk::failing_after(image, usize::MAX)).unwrap();
                let loaded = store.load().unwrap();
                match (name(&loaded).as_str(), loaded.revision) {
                    ("before", 1) if committed.is_err() => before += 1,
                    ("after", 2) => after += 1,
                    other => panic!("failed after {operations} operations, found {other:?}"),
                }
            }
            if committed.is_ok() {
                break;
            }
        }
        assert!(before > 2 && after > 0, "{before} {after}");
    }

    #[test]
    fn a_flintd_that_was_killed_while_it_made_the_file_does_not_keep_the_next_one_from_it() {
        let healthy = Disk::failing_after(Vec::new(), usize::MAX);
        drop(Store::with_backend(healthy.clone()).unwrap());
        for operations in 0..3 {
            let disk = Disk::failing_after(Vec::new(), operations);
            assert!(
                Store::with_backend(disk.clone()).is_err(),
                "it was killed before the file was whole"
            );
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("state.redb");
            std::fs::write(path.with_extension("new"), disk.after_power_failure(true)).unwrap();
            assert_eq!(Store::open(&path).unwrap().load().unwrap().revision, 0);
            assert!(!path.with_extension("new").exists());
        }
    }

    #[test]
    fn a_file_that_is_not_a_state_file_is_named_in_the_error() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("state.redb");
        std::fs::write(&path, vec![7; 8192]).unwrap();
        let error = Store::open(&path).unwrap_err().to_string();
        assert!(error.contains("state.redb"), "{error}");
    }
}
