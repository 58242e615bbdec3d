//! The machines of this host, in the store's index.

use std::collections::HashSet;

use redb::{ReadTransaction, ReadableTable, TableDefinition, WriteTransaction};

use super::record::{decode, encode};
use super::{Machine, MachineError};
use crate::chunk::ChunkId;
use crate::store::{ChunkStore, StoreError};

const MACHINES: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("machines");
const MACHINE_CHUNKS: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("machine chunks");

/// Makes the tables, and drops machines whose chunks are not all there any more.
pub(crate) fn open(store: &ChunkStore) -> Result<(), StoreError> {
    store.index().write("making tables", |txn| {
        txn.open_table(MACHINES)?;
        txn.open_table(MACHINE_CHUNKS)?;
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

/// Adds the chunks that machines need.
pub(crate) fn live(txn: &ReadTransaction, live: &mut HashSet<ChunkId>) -> Result<(), redb::Error> {
    for row in txn.open_table(MACHINE_CHUNKS)?.iter()? {
        live.extend(ids_of(row?.1.value()));
    }
    Ok(())
}

/// Makes a machine visible, all of whose chunks are committed.
pub(super) fn put(store: &ChunkStore, name: &str, machine: &Machine) -> Result<(), MachineError> {
    let record = encode(machine, &[]);
    let ids: Vec<u8> = machine.chunks().iter().flat_map(|chunk| *chunk.id.as_bytes()).collect();
    let added = store.index().write("adding a machine snapshot", |txn| {
        txn.open_table(MACHINES)?.insert(name, record.as_slice())?;
        txn.open_table(MACHINE_CHUNKS)?.insert(name, ids.as_slice())?;
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

fn ids_of(bytes: &[u8]) -> Vec<ChunkId> {
    bytes.as_chunks().0.iter().map(|id| ChunkId::from_bytes(*id)).collect()
}
