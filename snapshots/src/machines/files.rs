//! From files to chunks and back. What is zero takes no room on either side: whole units of zeros are not kept, and zeros within
//! a unit become holes again, page by page.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use super::MachineError;
use super::record::{MachineFile, Piece, UNIT};
use crate::chunk::{Chunk, ChunkId, MAX_CHUNK_LEN};
use crate::store::ChunkStore;

/// A page of the guest, and a block of the host's file systems.
const PAGE: usize = 4096;

pub(super) fn failed<'a>(action: &'static str, file: &'a str) -> impl FnOnce(io::Error) -> MachineError + use<'a> {
    move |source| MachineError::File {
        action,
        file: file.to_owned(),
        source,
    }
}

/// Hands a file's chunks to `put`, which names them; returns the file's length, and which chunks are where.
pub(super) fn cut(
    name: &str,
    file: &File,
    mut put: impl FnMut(&[u8]) -> Result<ChunkId, MachineError>,
) -> Result<(u64, Vec<Piece>), MachineError> {
    let len = file.metadata().map_err(failed("examining", name))?.len();
    let mut pieces = Vec::new();
    let mut unit = vec![0; MAX_CHUNK_LEN];
    let mut at = 0;
    while let Some(data) = next_data(file, at).map_err(failed("looking for data in", name))? {
        // Units lie where they lie, wherever the data begins.
        at = data / UNIT * UNIT;
        // No more than UNIT.
        let unit = &mut unit[..usize::try_from(UNIT.min(len.saturating_sub(at))).unwrap_or(0)];
        if unit.is_empty() {
            break;
        }
        file.read_exact_at(unit, at).map_err(failed("reading", name))?;
        if !is_zero(unit) {
            let place =
                u32::try_from(at / UNIT).map_err(|_| failed("cutting", name)(io::ErrorKind::FileTooLarge.into()))?;
            let id = put(unit)?;
            pieces.push(Piece { place, id });
        }
        at += UNIT;
    }
    Ok((len, pieces))
}

/// Writes a file from its chunks, each of which is verified.
pub(super) fn lay_out(file: &MachineFile, into: &File, store: &ChunkStore) -> Result<(), MachineError> {
    let name = file.name();
    if into.metadata().map_err(failed("examining", name))?.len() != 0 {
        return Err(failed("laying out", name)(io::Error::other(
            "there is something in it already",
        )));
    }
    into.set_len(file.len()).map_err(failed("making room for", name))?;
    for (offset, Chunk { id, len }) in file.placed() {
        let bytes = store.get(id)?;
        if bytes.len() != len as usize {
            let reason = format!("chunk {id} has {} bytes, its place has {len}", bytes.len());
            return Err(failed("laying out", name)(io::Error::other(reason)));
        }
        write_pages(into, &bytes, offset).map_err(failed("writing", name))?;
    }
    Ok(())
}

/// Writes what is not zero, as few times as can be.
fn write_pages(file: &File, chunk: &[u8], at: u64) -> io::Result<()> {
    let mut begun: Option<usize> = None;
    for start in (0..chunk.len()).step_by(PAGE) {
        let page = &chunk[start..chunk.len().min(start + PAGE)];
        match (is_zero(page), begun) {
            (false, None) => begun = Some(start),
            (true, Some(from)) => {
                file.write_all_at(&chunk[from..start], at + from as u64)?;
                begun = None;
            }
            _ => {}
        }
    }
    match begun {
        Some(from) => file.write_all_at(&chunk[from..], at + from as u64),
        None => Ok(()),
    }
}

fn is_zero(bytes: &[u8]) -> bool {
    bytes.iter().all(|byte| *byte == 0)
}

/// Where the next bytes are that are in no hole (lseek(2), `SEEK_DATA`); `None`: there are none.
fn next_data(file: &File, from: u64) -> io::Result<Option<u64>> {
    let from = libc::off_t::try_from(from).map_err(io::Error::other)?;
    // SAFETY: lseek takes integers; nobody relies on this file's position, all reads and writes say where.
    match unsafe { libc::lseek(file.as_raw_fd(), from, libc::SEEK_DATA) } {
        found if found >= 0 => Ok(Some(found.cast_unsigned())),
        _ => match io::Error::last_os_error() {
            error if error.raw_os_error() == Some(libc::ENXIO) => Ok(None),
            error => Err(error),
        },
    }
}
