//! What is known of a machine: its files, and the chunks that they consist of.
//!
//! As JSON, because it is small beside what it describes, and because others will want to look into a registry:
//!
//! ```text
//!   { "version": 1, "notes": {..},
//!     "files": [ { "name": "memory", "len": 536870912, "chunks": [ [0, "<64 hex digits>"], [7, ".."], .. ] }, .. ],
//!     "bundles": [ [ ["<64 hex digits>", 81342], .. ], .. ] }              only in a registry
//! ```
//!
//! A chunk's first number is its place in the file, in units of 256 KiB; what no chunk covers is zero. A bundle names its chunks
//! in their order, each with the bytes that it takes there. A record may come from anybody: [`decode`] believes nothing.

use std::collections::{BTreeMap, HashSet};

use serde::{Deserialize, Serialize};

use super::MachineError;
use super::bundle::{Bundle, Entry};
use crate::chunk::{Chunk, ChunkId, MAX_CHUNK_LEN};

/// Bytes of a file that one chunk holds; the last one of a file may be shorter.
pub(crate) const UNIT: u64 = MAX_CHUNK_LEN as u64;
const VERSION: u32 = 1;
/// The longest file: more than the memory of any host.
const MAX_LEN: u64 = 1 << 46;
const MAX_NAME: usize = 128;

/// What goes along with a machine: words of whoever made it to whoever uses it.
pub type Notes = BTreeMap<String, String>;

/// A machine snapshot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Machine {
    files: Vec<MachineFile>,
    notes: Notes,
}

/// One of its files.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MachineFile {
    name: String,
    len: u64,
    pieces: Vec<Piece>,
}

/// A chunk and its place in a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Piece {
    /// In units.
    pub(crate) place: u32,
    pub(crate) id: ChunkId,
}

/// A record that is none.
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    /// Not the JSON it should be.
    #[error("it is not the JSON it should be")]
    Json(#[source] serde_json::Error),
    /// Of another version.
    #[error(
        "it has version {0}, this program reads version {VERSION}: make the snapshot again, or use a Flint that knows it"
    )]
    Version(u32),
    /// It contradicts itself.
    #[error("it contradicts itself: {0}")]
    Sense(String),
}

fn sense(what: impl Into<String>) -> RecordError {
    RecordError::Sense(what.into())
}

impl Machine {
    pub(super) fn new(notes: Notes) -> Self {
        let files = Vec::new();
        Self { files, notes }
    }

    /// Its files.
    pub fn files(&self) -> &[MachineFile] {
        &self.files
    }

    /// A file by its name.
    pub fn file(&self, name: &str) -> Option<&MachineFile> {
        self.files.iter().find(|file| file.name == name)
    }

    /// What whoever made it said about it.
    pub fn notes(&self) -> &Notes {
        &self.notes
    }

    /// Its chunks, each once, in the order in which its files have them.
    pub(super) fn chunks(&self) -> Vec<Chunk> {
        let mut seen = HashSet::new();
        let chunks = self.files.iter().flat_map(MachineFile::chunks);
        chunks.filter(|chunk| seen.insert(chunk.id)).collect()
    }

    /// How many bytes these have.
    pub(super) fn chunk_bytes(&self) -> u64 {
        self.chunks().iter().map(|chunk| u64::from(chunk.len)).sum()
    }

    /// Adds a file whose pieces were just cut.
    pub(super) fn add(&mut self, name: &str, len: u64, pieces: Vec<Piece>) -> Result<(), MachineError> {
        let name = checked_name(name)?;
        if self.file(&name).is_some() {
            return Err(MachineError::Name(name));
        }
        self.files.push(MachineFile { name, len, pieces });
        Ok(())
    }
}

impl MachineFile {
    /// Its name: "memory".
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its length in bytes, holes included.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether it has no bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// How many bytes of it are not in holes.
    pub fn data_len(&self) -> u64 {
        self.chunks().map(|chunk| u64::from(chunk.len)).sum()
    }

    /// Its chunks with their offsets, ascending.
    pub(super) fn placed(&self) -> impl Iterator<Item = (u64, Chunk)> {
        self.pieces.iter().map(|piece| {
            let offset = u64::from(piece.place) * UNIT;
            // The file is longer than that, see `file_of`, and a unit's bytes fit.
            let len = u32::try_from(UNIT.min(self.len - offset)).unwrap_or(u32::MAX);
            (offset, Chunk { id: piece.id, len })
        })
    }

    fn chunks(&self) -> impl Iterator<Item = Chunk> {
        self.placed().map(|(_, chunk)| chunk)
    }

    pub(super) fn ids(&self) -> Vec<ChunkId> {
        self.pieces.iter().map(|piece| piece.id).collect()
    }
}

/// A name that is one: of a machine, or of a file.
pub(super) fn checked_name(name: &str) -> Result<String, MachineError> {
    let good = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || matches!(byte, b'.' | b'_' | b'-');
    if (1..=MAX_NAME).contains(&name.len()) && name.bytes().all(good) {
        return Ok(name.to_owned());
    }
    Err(MachineError::Name(name.chars().take(2 * MAX_NAME).collect()))
}

#[derive(Serialize, Deserialize)]
struct Wire {
    version: u32,
    #[serde(default)]
    notes: Notes,
    files: Vec<WireFile>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    bundles: Vec<Vec<(String, u32)>>,
}

#[derive(Serialize, Deserialize)]
struct WireFile {
    name: String,
    len: u64,
    chunks: Vec<(u32, String)>,
}

/// The record as JSON, with the bundles that a registry has. The same record gives the same bytes.
pub(super) fn encode(machine: &Machine, bundles: &[Bundle]) -> Vec<u8> {
    let file = |file: &MachineFile| WireFile {
        name: file.name.clone(),
        len: file.len,
        chunks: file
            .pieces
            .iter()
            .map(|piece| (piece.place, piece.id.to_string()))
            .collect(),
    };
    let bundle = |bundle: &Bundle| -> Vec<_> {
        let entries = bundle.entries.iter();
        entries.map(|entry| (entry.id.to_string(), entry.stored_len)).collect()
    };
    let wire = Wire {
        version: VERSION,
        notes: machine.notes.clone(),
        files: machine.files.iter().map(file).collect(),
        bundles: bundles.iter().map(bundle).collect(),
    };
    // Strings, numbers and lists: there is nothing in it that JSON does not have.
    serde_json::to_vec(&wire).unwrap_or_default()
}

/// The machine, and the bundles that a registry has of it.
pub(super) fn decode(bytes: &[u8]) -> Result<(Machine, Vec<Bundle>), RecordError> {
    let wire: Wire = serde_json::from_slice(bytes).map_err(RecordError::Json)?;
    if wire.version != VERSION {
        return Err(RecordError::Version(wire.version));
    }
    let mut names = HashSet::new();
    let files = wire.files.into_iter().map(|file| {
        if checked_name(&file.name).is_err() || !names.insert(file.name.clone()) {
            return Err(sense(format!("the file name {:?}", file.name)));
        }
        file_of(file)
    });
    let machine = Machine {
        files: files.collect::<Result<_, _>>()?,
        notes: wire.notes,
    };
    let bundles = wire.bundles.into_iter().map(bundle_of).collect::<Result<_, _>>()?;
    Ok((machine, bundles))
}

/// Whether a record that is taken is the same once it was written and read again.
#[cfg(feature = "fuzzing")]
pub(crate) fn comes_back(bytes: &[u8]) -> bool {
    match decode(bytes) {
        Ok(read) => matches!(decode(&encode(&read.0, &read.1)), Ok(again) if again == read),
        Err(_) => true,
    }
}

fn file_of(wire: WireFile) -> Result<MachineFile, RecordError> {
    let WireFile { name, len, chunks } = wire;
    if len > MAX_LEN {
        return Err(sense(format!("{name} has {len} bytes")));
    }
    let mut next = 0;
    let piece = |(place, id): (u32, String)| {
        let inside = u64::from(place) * UNIT < len;
        if !inside || u64::from(place) < next {
            return Err(sense(format!("chunk {place} of {name} is out of its place")));
        }
        next = u64::from(place) + 1;
        Ok(Piece { place, id: id_of(&id)? })
    };
    let pieces = chunks.into_iter().map(piece).collect::<Result<_, _>>()?;
    Ok(MachineFile { name, len, pieces })
}

fn bundle_of(entries: Vec<(String, u32)>) -> Result<Bundle, RecordError> {
    let entries = entries.into_iter().map(|(id, stored_len)| {
        if stored_len == 0 || u64::from(stored_len) > UNIT {
            return Err(sense(format!("a chunk takes {stored_len} bytes in its bundle")));
        }
        Ok(Entry {
            id: id_of(&id)?,
            stored_len,
        })
    });
    let bundle = Bundle {
        entries: entries.collect::<Result<_, _>>()?,
    };
    if bundle.entries.len() > super::bundle::MAX_CHUNKS {
        return Err(sense(format!("a bundle has {} chunks", bundle.entries.len())));
    }
    Ok(bundle)
}

fn id_of(text: &str) -> Result<ChunkId, RecordError> {
    text.parse().map_err(|error| sense(format!("{error}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn machine() -> Machine {
        let piece = |place| Piece {
            place,
            id: ChunkId::of(&place.to_le_bytes()),
        };
        let mut machine = Machine::new(Notes::from([("kernel".to_owned(), "6.12".to_owned())]));
        machine.add("state", 5, vec![piece(0)]).unwrap();
        machine.add("memory", 9 * UNIT + 1, vec![piece(0), piece(9)]).unwrap();
        machine
    }

    fn bundles() -> Vec<Bundle> {
        let entry = |n: u32| Entry {
            id: ChunkId::of(&n.to_le_bytes()),
            stored_len: n + 1,
        };
        vec![Bundle {
            entries: vec![entry(0), entry(9)],
        }]
    }

    #[test]
    fn a_record_that_was_written_is_read_with_and_without_bundles() {
        let (machine, bundles) = (machine(), bundles());
        assert_eq!(decode(&encode(&machine, &bundles)).unwrap(), (machine.clone(), bundles));
        assert_eq!(decode(&encode(&machine, &[])).unwrap(), (machine.clone(), vec![]));
        assert_eq!(machine.file("memory").unwrap().data_len(), UNIT + 1);
        assert_eq!(machine.chunks().len(), 2, "each once");
    }

    #[test]
    fn a_record_without_sense_is_refused() {
        let good = String::from_utf8(encode(&machine(), &bundles())).unwrap();
        let id = ChunkId::of(&9_u32.to_le_bytes()).to_string();
        for (from, to, said) in [
            (r#""version":1"#, r#""version":2"#, "version 2"),
            (r#""name":"state""#, r#""name":"memory""#, "memory"),
            (r#""name":"state""#, r#""name":"../state""#, "../state"),
            (r#""len":5"#, r#""len":70368744177665"#, "70368744177665 bytes"),
            (r#""len":5"#, r#""len":0"#, "chunk 0 of state"),
            (
                &format!(r#"[9,"{id}"]"#),
                &format!(r#"[0,"{id}"]"#),
                "chunk 0 of memory",
            ),
            (
                &format!(r#"[9,"{id}"]"#),
                &format!(r#"[10,"{id}"]"#),
                "chunk 10 of memory",
            ),
            (&format!(r#"[9,"{id}"]"#), r#"[9,"00"]"#, "64 hexadecimal"),
            (
                &format!(r#"["{id}",10]"#),
                &format!(r#"["{id}",0]"#),
                "0 bytes in its bundle",
            ),
            (
                &format!(r#"["{id}",10]"#),
                &format!(r#"["{id}",262145]"#),
                "262145 bytes",
            ),
            (r#""files""#, r#""flies""#, "JSON"),
        ] {
            let bad = good.replace(from, to);
            assert_ne!(bad, good, "{from}");
            let error = decode(bad.as_bytes()).expect_err(from).to_string();
            assert!(error.contains(said), "{from}: {error}");
        }
    }

    #[test]
    fn names_are_words() {
        for name in ["", "A", "a/b", "a b", "ä", &"a".repeat(129)] {
            assert!(checked_name(name).is_err(), "{name}");
        }
        assert_eq!(checked_name("web-1.2_x").unwrap(), "web-1.2_x");
    }
}
