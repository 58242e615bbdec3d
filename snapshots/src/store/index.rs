//! The index: a redb database that says where each chunk lies, and keeps what the image store knows.
//!
//! After an I/O error redb answers nothing any more until it is opened again. The disk being full is such an error, and it
//! passes; so the index opens its database anew, and the one that asked gets the error.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::{PoisonError, RwLock};

use redb::{Database, ReadTransaction, ReadableDatabase, ReadableTable, TableDefinition, WriteTransaction};

use super::StoreError;
use super::error::is_full;
use crate::chunk::ChunkId;
use crate::device::{PackId, PackLocation};

/// Chunk to place: pack, offset, stored length, raw length.
const CHUNKS: TableDefinition<'_, [u8; 32], (u32, u64, u32, u32)> = TableDefinition::new("chunks");
/// Pack to the length that is on the disk for sure.
const PACKS: TableDefinition<'_, u32, u64> = TableDefinition::new("packs");

/// The database, and how to get it back.
pub(crate) struct Index {
    path: PathBuf,
    database: RwLock<Option<Database>>,
}

impl Index {
    /// Opens or makes the index. A damaged one is put aside; the flag says that the packs have to be read again.
    pub(crate) fn open(dir: &Path) -> Result<(Self, bool), StoreError> {
        let path = dir.join("index.redb");
        let mut fresh = !path.exists();
        let database = match Database::create(&path) {
            Ok(database) => database,
            Err(redb::DatabaseError::Storage(redb::StorageError::Io(error)))
                if error.kind() != io::ErrorKind::InvalidData =>
            {
                return Err(StoreError::io("opening", &path)(error));
            }
            Err(error) => {
                let aside = dir.join("index.redb.damaged");
                tracing::error!(%error, aside = %aside.display(), "the index is damaged: putting it aside, reading all packs; images have to be pulled again");
                std::fs::rename(&path, &aside).map_err(StoreError::io("renaming", &path))?;
                fresh = true;
                Database::create(&path).map_err(failed("making a new index"))?
            }
        };
        let index = Self {
            path,
            database: RwLock::new(Some(database)),
        };
        index.write("making tables", |txn| {
            txn.open_table(CHUNKS)?;
            txn.open_table(PACKS)?;
            Ok(())
        })?;
        Ok((index, fresh))
    }

    /// Reads in one consistent view.
    pub(crate) fn read<T>(
        &self,
        action: &'static str,
        body: impl FnOnce(&ReadTransaction) -> Result<T, redb::Error>,
    ) -> Result<T, StoreError> {
        self.with(action, |database| body(&database.begin_read()?))
    }

    /// Changes something: everything or nothing, and on the disk when this returns.
    pub(crate) fn write<T>(
        &self,
        action: &'static str,
        body: impl FnOnce(&WriteTransaction) -> Result<T, redb::Error>,
    ) -> Result<T, StoreError> {
        self.with(action, |database| {
            let txn = database.begin_write()?;
            let value = body(&txn)?;
            txn.commit()?;
            Ok(value)
        })
    }

    fn with<T>(
        &self,
        action: &'static str,
        body: impl FnOnce(&Database) -> Result<T, redb::Error>,
    ) -> Result<T, StoreError> {
        let result = {
            let guard = self.database.read().unwrap_or_else(PoisonError::into_inner);
            guard.as_ref().map_or(Err(redb::Error::DatabaseClosed), body)
        };
        if let Err(redb::Error::Io(_) | redb::Error::PreviousIo | redb::Error::DatabaseClosed) = &result {
            self.reopen();
        }
        result.map_err(|error| match error {
            redb::Error::Io(error) if is_full(error.kind()) => StoreError::full(&self.path),
            error => StoreError::Index {
                action,
                source: Box::new(error),
            },
        })
    }

    fn reopen(&self) {
        let mut guard = self.database.write().unwrap_or_else(PoisonError::into_inner);
        // The old one holds a lock on the file: it goes first.
        *guard = None;
        match Database::open(&self.path) {
            Ok(database) => *guard = Some(database),
            Err(error) => tracing::error!(%error, "the index cannot be opened again; the next access tries once more"),
        }
    }

    /// Where `id` lies, if it is committed.
    pub(crate) fn locate(&self, id: ChunkId) -> Result<Option<PackLocation>, StoreError> {
        self.read("looking up a chunk", |txn| {
            Ok(txn
                .open_table(CHUNKS)?
                .get(id.as_bytes())?
                .map(|row| place(row.value())))
        })
    }

    /// Where all of `ids` lie; the first that is missing is an error.
    pub(crate) fn locate_all(&self, ids: &[ChunkId]) -> Result<Vec<PackLocation>, StoreError> {
        let found = self.read("looking up chunks", |txn| {
            let table = txn.open_table(CHUNKS)?;
            ids.iter()
                .map(|id| Ok(table.get(id.as_bytes())?.map(|row| place(row.value()))))
                .collect::<Result<Vec<_>, redb::Error>>()
        })?;
        found
            .into_iter()
            .zip(ids)
            .map(|(place, id)| place.ok_or(StoreError::Missing(*id)))
            .collect()
    }

    /// Every chunk and its place.
    pub(crate) fn chunks(&self) -> Result<Vec<(ChunkId, PackLocation)>, StoreError> {
        self.read("listing chunks", |txn| {
            let rows = txn.open_table(CHUNKS)?;
            rows.iter()?
                .map(|row| {
                    row.map(|(id, row)| (ChunkId::from_bytes(id.value()), place(row.value())))
                        .map_err(redb::Error::from)
                })
                .collect()
        })
    }

    /// Every pack and its length on the disk.
    pub(crate) fn packs(&self) -> Result<Vec<(PackId, u64)>, StoreError> {
        self.read("listing packs", |txn| {
            let rows = txn.open_table(PACKS)?;
            rows.iter()?
                .map(|row| {
                    row.map(|(id, len)| (PackId(id.value()), len.value()))
                        .map_err(redb::Error::from)
                })
                .collect()
        })
    }

    /// Makes chunks known, whose packs are on the disk up to the lengths given.
    pub(crate) fn add(&self, chunks: &[(ChunkId, PackLocation)], packs: &[(PackId, u64)]) -> Result<(), StoreError> {
        self.write("adding chunks", |txn| put(txn, chunks, packs))
    }

    /// Forgets chunks and packs, and adds chunks that have moved, all at once.
    pub(crate) fn sweep(
        &self,
        dead: &[ChunkId],
        gone: &[PackId],
        moved: &[(ChunkId, PackLocation)],
        packs: &[(PackId, u64)],
    ) -> Result<(), StoreError> {
        self.write("removing chunks", |txn| {
            {
                let mut table = txn.open_table(CHUNKS)?;
                for id in dead {
                    table.remove(id.as_bytes())?;
                }
                let mut table = txn.open_table(PACKS)?;
                for id in gone {
                    table.remove(id.0)?;
                }
            }
            put(txn, moved, packs)
        })
    }
}

fn put(txn: &WriteTransaction, chunks: &[(ChunkId, PackLocation)], packs: &[(PackId, u64)]) -> Result<(), redb::Error> {
    let mut table = txn.open_table(CHUNKS)?;
    for (id, at) in chunks {
        table.insert(id.as_bytes(), (at.pack.0, at.offset, at.stored_len, at.raw_len))?;
    }
    let mut table = txn.open_table(PACKS)?;
    for (id, len) in packs {
        table.insert(id.0, *len)?;
    }
    Ok(())
}

fn place((pack, offset, stored_len, raw_len): (u32, u64, u32, u32)) -> PackLocation {
    PackLocation {
        pack: PackId(pack),
        offset,
        stored_len,
        raw_len,
    }
}

fn failed<E: Into<redb::Error>>(action: &'static str) -> impl FnOnce(E) -> StoreError {
    move |error| StoreError::Index {
        action,
        source: Box::new(error.into()),
    }
}
