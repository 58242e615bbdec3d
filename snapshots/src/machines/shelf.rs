//! The machines of this host, in the store's index, and what pulls that were begun want of it.

use std::collections::HashSet;
use std::time::{Duration, SystemTime};

use redb::{ReadTransaction, ReadableTable, TableDefinition, WriteTransaction};

use super::record::{decode, encode};
use super::{Machine, MachineError};
use crate::chunk::{Chunk, ChunkId};
use crate::registry::Digest;
use crate::store::{ChunkStore, StoreError};

const MACHINES: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("machines");
const MACHINE_CHUNKS: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("machine chunks");
/// By the artifact's digest: when a pull of it began, in seconds since 1970, and the chunks that it wants.
const BEGUN: TableDefinition<'_, &str, (u64, &[u8])> = TableDefinition::new("machine pulls");
/// For how long what came of a pull that was not finished is kept for another attempt.
const PATIENCE: Duration = Duration::from_hours(24);

/// Makes the tables, and drops machines whose chunks are not all there any more.
pub(crate) fn open(store: &ChunkStore) -> Result<(), StoreError> {
    store.index().write("making tables", |txn| {
        txn.open_table(MACHINES)?;
        txn.open_table(MACHINE_CHUNKS)?;
        txn.open_table(BEGUN)?.retain(|_, (begun, _)| is_awaited(begun))?;
        Ok(())
    })?;
    let all = store.index().read("listing machine snapshots", |txn| {
        let table = txn.open_table(MACHINE_CHUNKS)?;
        let rows = table.iter()?.map(|row| {
            let (name, ids) = row?;
            Ok((name.value().to_owned(), ids_of(ids.value())))
        });
        rows.collect::<Result<Vec<_>, redb::Error>>()
    })?;
    for (name, ids) in all {
        match store.locate(&ids) {
            Ok(_) => {}
            Err(StoreError::Missing(chunk)) => {
                tracing::error!(name, %chunk, "dropping a machine snapshot whose chunks are not all there");
                store
                    .index()
                    .write("dropping a machine snapshot", |txn| delete(txn, &name).map(drop))?;
            }
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Adds the chunks that machines need, and those that came of pulls that somebody may want to finish.
pub(crate) fn live(txn: &ReadTransaction, live: &mut HashSet<ChunkId>) -> Result<(), redb::Error> {
    for row in txn.open_table(MACHINE_CHUNKS)?.iter()? {
        live.extend(ids_of(row?.1.value()));
    }
    for row in txn.open_table(BEGUN)?.iter()? {
        let (_, row) = row?;
        let (begun, ids) = row.value();
        if is_awaited(begun) {
            live.extend(ids_of(ids));
        }
    }
    Ok(())
}

/// Notes that a pull of the artifact `digest` has begun: what comes of it is kept, whatever becomes of the pull.
pub(super) fn begin(store: &ChunkStore, digest: Digest, chunks: &[Chunk]) -> Result<(), MachineError> {
    let ids = bytes_of(chunks);
    let noted = store.index().write("noting the pull of a machine snapshot", |txn| {
        let mut table = txn.open_table(BEGUN)?;
        table.insert(digest.to_string().as_str(), (now(), ids.as_slice()))?;
        Ok(())
    });
    Ok(noted?)
}

/// Forgets the pulls that were begun: what came of them is the next sweep's.
pub(super) fn forget_begun(store: &ChunkStore) -> Result<(), MachineError> {
    let forgotten = store.index().write("forgetting pulls of machine snapshots", |txn| {
        txn.open_table(BEGUN)?.retain(|_, _| false)?;
        Ok(())
    });
    Ok(forgotten?)
}

/// Makes a machine visible, all of whose chunks are committed; with it the pull of the artifact `of`, if any, is done.
pub(super) fn put(store: &ChunkStore, name: &str, machine: &Machine, of: Option<Digest>) -> Result<(), MachineError> {
    let record = encode(machine, &[]);
    let ids = bytes_of(&machine.chunks());
    let added = store.index().write("adding a machine snapshot", |txn| {
        txn.open_table(MACHINES)?.insert(name, record.as_slice())?;
        txn.open_table(MACHINE_CHUNKS)?.insert(name, ids.as_slice())?;
        if let Some(digest) = of {
            txn.open_table(BEGUN)?.remove(digest.to_string().as_str())?;
        }
        Ok(())
    });
    Ok(added?)
}

pub(super) fn get(store: &ChunkStore, name: &str) -> Result<Machine, MachineError> {
    let record = store.index().read("looking up a machine snapshot", |txn| {
        Ok(txn.open_table(MACHINES)?.get(name)?.map(|row| row.value().to_vec()))
    })?;
    let record = record.ok_or_else(|| MachineError::NotHere(name.to_owned()))?;
    parse(name, &record)
}

pub(super) fn list(store: &ChunkStore) -> Result<Vec<(String, Machine)>, MachineError> {
    let records = store.index().read("listing machine snapshots", |txn| {
        let table = txn.open_table(MACHINES)?;
        let rows = table.iter()?.map(|row| {
            let (name, record) = row?;
            Ok((name.value().to_owned(), record.value().to_vec()))
        });
        rows.collect::<Result<Vec<_>, redb::Error>>()
    })?;
    let parsed = records.into_iter().map(|(name, record)| {
        let machine = parse(&name, &record)?;
        Ok((name, machine))
    });
    parsed.collect()
}

pub(super) fn remove(store: &ChunkStore, name: &str) -> Result<(), MachineError> {
    match store
        .index()
        .write("removing a machine snapshot", |txn| delete(txn, name))?
    {
        true => Ok(()),
        false => Err(MachineError::NotHere(name.to_owned())),
    }
}

fn delete(txn: &WriteTransaction, name: &str) -> Result<bool, redb::Error> {
    txn.open_table(MACHINE_CHUNKS)?.remove(name)?;
    let there = txn.open_table(MACHINES)?.remove(name)?.is_some();
    Ok(there)
}

fn parse(name: &str, record: &[u8]) -> Result<Machine, MachineError> {
    let (machine, _) = decode(record).map_err(|source| MachineError::Record {
        name: name.to_owned(),
        source,
    })?;
    Ok(machine)
}

fn is_awaited(begun: u64) -> bool {
    now().saturating_sub(begun) < PATIENCE.as_secs()
}

/// Seconds since 1970.
fn now() -> u64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    since.map_or(0, |since| since.as_secs())
}

fn bytes_of(chunks: &[Chunk]) -> Vec<u8> {
    chunks.iter().flat_map(|chunk| *chunk.id.as_bytes()).collect()
}

fn ids_of(bytes: &[u8]) -> Vec<ChunkId> {
    bytes.as_chunks().0.iter().map(|id| ChunkId::from_bytes(*id)).collect()
}
