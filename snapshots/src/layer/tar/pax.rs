//! Extended headers: records `length key=value\n` that correct the header they precede (POSIX.1-2001 pax).

use std::collections::BTreeMap;

use super::sparse::{PaxSparse, decimal};
use crate::layer::{Timestamp, Xattr};

/// What extended headers said about the next member.
#[derive(Default)]
pub(super) struct Extensions {
    pub(super) path: Option<Vec<u8>>,
    pub(super) link: Option<Vec<u8>>,
    pub(super) size: Option<u64>,
    pub(super) uid: Option<u32>,
    pub(super) gid: Option<u32>,
    pub(super) mtime: Option<Timestamp>,
    pub(super) sparse: PaxSparse,
    xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
}

const XATTR_PREFIX: &[u8] = b"SCHILY.xattr.";
const SPARSE_PREFIX: &[u8] = b"GNU.sparse.";

impl Extensions {
    /// Reads all records of an extended header.
    pub(super) fn read_pax(&mut self, mut records: &[u8]) -> Result<(), &'static str> {
        while !records.is_empty() {
            let (record, rest) = split_record(records).ok_or("a record of an extended header has a wrong length")?;
            let equals = record
                .iter()
                .position(|&byte| byte == b'=')
                .ok_or("a record of an extended header has no '='")?;
            self.set(&record[..equals], &record[equals + 1..])?;
            records = rest;
        }
        Ok(())
    }

    fn set(&mut self, key: &[u8], value: &[u8]) -> Result<(), &'static str> {
        if let Some(name) = key.strip_prefix(XATTR_PREFIX) {
            // An empty value takes back, as everywhere here: no engine gives a file an empty attribute.
            match value {
                b"" => drop(self.xattrs.remove(name)),
                _ => drop(self.xattrs.insert(name.to_vec(), value.to_vec())),
            }
            return Ok(());
        }
        if let Some(key) = key.strip_prefix(SPARSE_PREFIX) {
            return self.sparse.set(key, value);
        }
        // An empty value takes back what was said before: the header's own value counts.
        let given = !value.is_empty();
        match key {
            b"path" => self.path = given.then(|| value.to_vec()),
            b"linkpath" => self.link = given.then(|| value.to_vec()),
            b"size" => self.size = given.then(|| decimal(value)).transpose()?,
            b"uid" => self.uid = given.then(|| small(value)).transpose()?,
            b"gid" => self.gid = given.then(|| small(value)).transpose()?,
            b"mtime" => self.mtime = given.then(|| timestamp(value)).transpose()?,
            _ => {}
        }
        Ok(())
    }

    /// Extended attributes, sorted by name.
    pub(super) fn into_xattrs(self) -> Vec<Xattr> {
        self.xattrs
            .into_iter()
            .map(|(name, value)| Xattr { name, value })
            .collect()
    }
}

/// The first record without its length and newline, and what follows it.
fn split_record(records: &[u8]) -> Option<(&[u8], &[u8])> {
    let space = records.iter().position(|&byte| byte == b' ')?;
    let len = usize::try_from(decimal(&records[..space]).ok()?).ok()?;
    if len <= space + 1 || len > records.len() {
        return None;
    }
    let (record, rest) = records.split_at(len);
    Some((record[space + 1..].strip_suffix(b"\n")?, rest))
}

fn small(value: &[u8]) -> Result<u32, &'static str> {
    u32::try_from(decimal(value)?).map_err(|_| "an owner's number is out of range")
}

/// Seconds with an optional fraction, of which nine digits count; the sign is that of the whole.
fn timestamp(value: &[u8]) -> Result<Timestamp, &'static str> {
    const WRONG: &str = "a time is not a number";
    let (negative, digits) = value.strip_prefix(b"-").map_or((false, value), |digits| (true, digits));
    let point = digits.iter().position(|&byte| byte == b'.').unwrap_or(digits.len());
    let seconds = i64::try_from(decimal(&digits[..point]).map_err(|_| WRONG)?).map_err(|_| WRONG)?;
    let fraction = digits.get(point + 1..).unwrap_or_default();
    if !fraction.iter().all(u8::is_ascii_digit) {
        return Err(WRONG);
    }
    let nanoseconds = (0..9).fold(0, |value, at| {
        value * 10 + u32::from(fraction.get(at).map_or(0, |digit| digit - b'0'))
    });
    Ok(match (negative, nanoseconds) {
        (false, _) => Timestamp { seconds, nanoseconds },
        (true, 0) => Timestamp {
            seconds: -seconds,
            nanoseconds,
        },
        (true, _) => Timestamp {
            seconds: -seconds - 1,
            nanoseconds: 1_000_000_000 - nanoseconds,
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_have_fractions_and_signs() {
        let at = |seconds, nanoseconds| Ok(Timestamp { seconds, nanoseconds });
        assert_eq!(timestamp(b"1700000000"), at(1_700_000_000, 0));
        assert_eq!(timestamp(b"1.5"), at(1, 500_000_000));
        assert_eq!(timestamp(b"1.0000000019"), at(1, 1));
        assert_eq!(timestamp(b"-1.25"), at(-2, 750_000_000));
        for wrong in [&b""[..], b"x", b"1.x", b"--1", b"99999999999999999999"] {
            assert!(timestamp(wrong).is_err());
        }
    }

    #[test]
    fn records_with_wrong_lengths_are_refused() {
        for wrong in [
            &b"5 a=\n"[..],
            b"0 a=b\n",
            b"2 \n",
            b"99 a=b\n",
            b"6 a=bc",
            b" a=b\n",
            b"8 path-\n",
        ] {
            let read = Extensions::default().read_pax(wrong);
            assert_eq!(
                read.is_err(),
                wrong != b"5 a=\n",
                "{:?}",
                String::from_utf8_lossy(wrong)
            );
        }
    }

    #[test]
    fn later_records_win_and_empty_ones_take_back() {
        let mut extensions = Extensions::default();
        extensions
            .read_pax(b"9 path=a\n9 path=b\n11 size=12\n8 size=\n")
            .unwrap();
        assert_eq!((extensions.path.as_deref(), extensions.size), (Some(&b"b"[..]), None));
    }
}
