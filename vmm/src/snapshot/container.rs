//! The state file: sections of bytes under checksums, so that nothing of a damaged file is ever looked at.
//!
//! ```text
//!   0  magic "FLINTVM\0"
//!   8  format version                u32     all numbers little endian
//!  12  number of sections            u32
//!  16  snapshot id                   16 bytes, in the memory file too
//!  32  one entry for each section    kind u32, zero u32, length u64, BLAKE3 of its bytes: 48 bytes
//!      BLAKE3 of all of the above    32 bytes
//!      the sections' bytes, in the order of their entries, up to the file's end
//! ```
//!
//! BLAKE3 and not a CRC: it is what names chunks, so a state file's digest is its name in the store, and it is quick enough to
//! be nothing beside the ioctls (a vCPU's state has 8 KiB). It finds damage, not forgery: whoever may write a state file
//! decides what the guest is, as with a kernel.

use thiserror::Error;

use super::VERSION;

const MAGIC: [u8; 8] = *b"FLINTVM\0";
/// The oldest format that can be read: the newest one and the one before it.
const OLDEST: u32 = 1;
const HEADER: usize = 32;
const ENTRY: usize = 48;
const DIGEST: usize = blake3::OUT_LEN;
/// A machine of 32 vCPUs and 40 devices has a tenth of this.
pub const MAX_BYTES: u64 = 8 << 20;

/// What a section tells. The numbers are those in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Section {
    /// What the snapshot needs of a host.
    Passport = 1,
    /// What the machine consists of, and where its memory lies.
    Machine = 2,
    /// vCPUs.
    Vcpus = 3,
    /// Interrupt controllers, serial line.
    Chipset = 4,
    /// Virtio devices.
    Devices = 5,
    /// All that goes on by itself: time stamp counters, timers' deadlines, the guest's clock.
    Time = 6,
}

impl Section {
    /// In the order of the file.
    pub const ALL: [Self; 6] = [
        Self::Passport,
        Self::Machine,
        Self::Vcpus,
        Self::Chipset,
        Self::Devices,
        Self::Time,
    ];
}

impl std::fmt::Display for Section {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.write_str(match self {
            Self::Passport => "passport",
            Self::Machine => "machine",
            Self::Vcpus => "vCPU",
            Self::Chipset => "chipset",
            Self::Devices => "device",
            Self::Time => "time",
        })
    }
}

/// Bytes that are no state file.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum Error {
    /// Something else.
    #[error("this is no Flint state file")]
    Magic,
    /// From another time.
    #[error("the state file has format {0}; this flint-vmm reads {OLDEST} to {VERSION}: take the snapshot anew")]
    Version(u32),
    /// Altered, or cut off.
    #[error("the state file's header is damaged")]
    Header,
    /// Altered, or cut off.
    #[error("the state file's {0} section is damaged")]
    Damaged(Section),
    /// More than the sections.
    #[error("the state file goes on behind its last section")]
    Surplus,
}

/// The sections of a file by [`Section::ALL`], and its id.
#[derive(Debug, PartialEq, Eq)]
pub struct Container<'a> {
    /// Which memory file belongs to it.
    pub id: [u8; 16],
    sections: [&'a [u8]; Section::ALL.len()],
}

impl<'a> Container<'a> {
    /// Checks the whole file.
    ///
    /// # Errors
    /// It is no state file that this program reads, or one that is damaged.
    pub fn parse(file: &'a [u8]) -> Result<Self, Error> {
        let header = file.first_chunk::<HEADER>().ok_or(Error::Magic)?;
        if header[..8] != MAGIC {
            return Err(Error::Magic);
        }
        let version = word(header, 8);
        if !(OLDEST..=VERSION).contains(&version) {
            return Err(Error::Version(version));
        }
        // All formats until now have the same sections.
        if usize::try_from(word(header, 12)) != Ok(Section::ALL.len()) {
            return Err(Error::Header);
        }
        let table_end = HEADER + Section::ALL.len() * ENTRY;
        let (covered, rest) = file.split_at_checked(table_end).ok_or(Error::Header)?;
        let (digest, mut rest) = rest.split_at_checked(DIGEST).ok_or(Error::Header)?;
        if blake3::hash(covered).as_bytes()[..] != *digest {
            return Err(Error::Header);
        }
        let mut sections = [&[][..]; Section::ALL.len()];
        for ((kind, entry), section) in Section::ALL
            .iter()
            .zip(covered[HEADER..].chunks(ENTRY))
            .zip(&mut sections)
        {
            if word(entry, 0) != *kind as u32 || word(entry, 4) != 0 {
                return Err(Error::Header);
            }
            let length = u64::from(word(entry, 12)) << 32 | u64::from(word(entry, 8));
            let split = usize::try_from(length)
                .ok()
                .and_then(|length| rest.split_at_checked(length));
            (*section, rest) = split.ok_or(Error::Damaged(*kind))?;
            if blake3::hash(section).as_bytes()[..] != entry[16..] {
                return Err(Error::Damaged(*kind));
            }
        }
        if !rest.is_empty() {
            return Err(Error::Surplus);
        }
        let mut id = [0; 16];
        id.copy_from_slice(&header[16..]);
        Ok(Self { id, sections })
    }

    /// The bytes of one section.
    #[must_use]
    pub fn section(&self, section: Section) -> &'a [u8] {
        let index = Section::ALL.iter().position(|other| *other == section);
        index.map_or(&[], |index| self.sections[index])
    }
}

/// A file of these sections, in the order of [`Section::ALL`].
#[must_use]
pub fn build(version: u32, id: [u8; 16], sections: &[Vec<u8>; Section::ALL.len()]) -> Vec<u8> {
    let mut file = Vec::new();
    file.extend(MAGIC);
    file.extend(version.to_le_bytes());
    // A handful.
    #[allow(clippy::cast_possible_truncation)]
    file.extend((Section::ALL.len() as u32).to_le_bytes());
    file.extend(id);
    for (kind, bytes) in Section::ALL.iter().zip(sections) {
        file.extend((*kind as u32).to_le_bytes());
        file.extend(0u32.to_le_bytes());
        file.extend((bytes.len() as u64).to_le_bytes());
        file.extend(blake3::hash(bytes).as_bytes());
    }
    let digest = blake3::hash(&file);
    file.extend(digest.as_bytes());
    for bytes in sections {
        file.extend(bytes);
    }
    file
}

/// A number of the header or table, whose lengths were checked.
fn word(bytes: &[u8], at: usize) -> u32 {
    bytes[at..].first_chunk().map_or(0, |bytes| u32::from_le_bytes(*bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sections() -> [Vec<u8>; 6] {
        [0u8, 1, 2, 3, 4, 5].map(|n| vec![n; usize::from(n) * 7])
    }

    #[test]
    fn what_is_built_is_read_again() {
        let file = build(VERSION, [9; 16], &sections());
        let container = Container::parse(&file).unwrap();
        assert_eq!(container.id, [9; 16]);
        for (section, bytes) in Section::ALL.into_iter().zip(sections()) {
            assert_eq!(container.section(section), bytes);
        }
    }

    #[test]
    fn every_altered_byte_and_every_shorter_file_is_refused() {
        let file = build(VERSION, [9; 16], &sections());
        for at in 0..file.len() {
            let mut bad = file.clone();
            bad[at] ^= 0x40;
            assert!(Container::parse(&bad).is_err(), "byte {at}");
            assert!(Container::parse(&file[..at]).is_err(), "{at} bytes");
        }
        assert_eq!(Container::parse(&[&file[..], &[0]].concat()), Err(Error::Surplus));
    }

    #[test]
    fn damage_is_named_and_another_format_is_told_from_it() {
        let mut file = build(VERSION, [9; 16], &sections());
        let last = file.len() - 1;
        file[last] ^= 1;
        assert_eq!(Container::parse(&file), Err(Error::Damaged(Section::Time)));
        file[8] = 99;
        assert_eq!(Container::parse(&file), Err(Error::Version(99)));
        assert_eq!(Container::parse(b"#!/bin/sh"), Err(Error::Magic));
    }

    #[test]
    fn a_length_beyond_the_file_allocates_nothing_and_is_refused() {
        let mut file = build(VERSION, [9; 16], &sections());
        file[HEADER + 8..HEADER + 16].fill(0xff);
        let end = HEADER + 6 * ENTRY;
        let digest = blake3::hash(&file[..end]);
        file[end..end + DIGEST].copy_from_slice(digest.as_bytes());
        assert_eq!(Container::parse(&file), Err(Error::Damaged(Section::Passport)));
    }
}
