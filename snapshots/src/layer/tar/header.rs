//! The 512 bytes before each member.

use super::sparse::Segment;
use super::{BLOCK_LEN, c_string};

/// A block of a tar stream.
pub(super) struct Block([u8; BLOCK_LEN]);

/// What a header says, before extended headers correct it.
pub(super) struct Header {
    pub(super) path: Vec<u8>,
    pub(super) link: Vec<u8>,
    pub(super) kind: u8,
    pub(super) mode: u16,
    pub(super) uid: u32,
    pub(super) gid: u32,
    pub(super) size: u64,
    pub(super) mtime: i64,
    pub(super) major: u32,
    pub(super) minor: u32,
    /// GNU's old sparse format, kind `S`: the first pieces, whether more follow, and the file's length.
    pub(super) sparse: Vec<Segment>,
    pub(super) sparse_continues: bool,
    pub(super) sparse_size: u64,
}

const CHECKSUM: std::ops::Range<usize> = 148..156;
const USTAR_MAGIC: &[u8] = b"ustar\0";
const SEGMENT_LEN: usize = 24;

impl Block {
    pub(super) fn zeroed() -> Self {
        Self([0; BLOCK_LEN])
    }

    pub(super) fn bytes_mut(&mut self) -> &mut [u8; BLOCK_LEN] {
        &mut self.0
    }

    pub(super) fn is_zero(&self) -> bool {
        self.0.iter().all(|&byte| byte == 0)
    }

    /// Reads a block of further pieces of a sparse file into `map`; whether one more such block follows.
    pub(super) fn sparse_extension(&self, map: &mut Vec<Segment>) -> Result<bool, &'static str> {
        push_segments(&self.0[..21 * SEGMENT_LEN], map)?;
        Ok(self.0[504] != 0)
    }

    /// The sum of all bytes, the checksum's own counted as spaces. Some old writers summed signed bytes.
    fn has_checksum(&self, expected: i64) -> bool {
        let counted = |at: usize| if CHECKSUM.contains(&at) { b' ' } else { self.0[at] };
        let unsigned: i64 = (0..BLOCK_LEN).map(|at| i64::from(counted(at))).sum();
        let signed: i64 = (0..BLOCK_LEN).map(|at| i64::from(counted(at).cast_signed())).sum();
        expected == unsigned || expected == signed
    }
}

impl Header {
    pub(super) fn parse(block: &Block) -> Result<Self, &'static str> {
        let bytes = &block.0;
        if !block.has_checksum(number(&bytes[CHECKSUM])?) {
            return Err("a header's checksum does not match");
        }
        let kind = bytes[156];
        let mut path = c_string(&bytes[..100]);
        if &bytes[257..263] == USTAR_MAGIC {
            // The variant of star has two times at the prefix' end, and says so in the last four bytes.
            let prefix_end = if &bytes[508..512] == b"tar\0" { 476 } else { 500 };
            let prefix = c_string(&bytes[345..prefix_end]);
            if !prefix.is_empty() {
                path = [prefix, path].join(&b'/');
            }
        }
        let is_device = matches!(kind, b'3' | b'4');
        let device = |range: std::ops::Range<usize>| if is_device { number_as(&bytes[range]) } else { Ok(0) };
        let mut header = Self {
            path,
            link: c_string(&bytes[157..257]),
            kind,
            mode: permissions(number(&bytes[100..108])?),
            uid: number_as(&bytes[108..116])?,
            gid: number_as(&bytes[116..124])?,
            size: number_as(&bytes[124..136])?,
            mtime: number(&bytes[136..148])?,
            major: device(329..337)?,
            minor: device(337..345)?,
            sparse: Vec::new(),
            sparse_continues: false,
            sparse_size: 0,
        };
        if kind == b'S' {
            push_segments(&bytes[386..386 + 4 * SEGMENT_LEN], &mut header.sparse)?;
            header.sparse_continues = bytes[482] != 0;
            header.sparse_size = number_as(&bytes[483..495])?;
        }
        Ok(header)
    }
}

/// The twelve bits of permissions; some writers put the type above them.
fn permissions(mode: i64) -> u16 {
    u16::try_from(mode & 0o7777).unwrap_or(0)
}

fn push_segments(fields: &[u8], map: &mut Vec<Segment>) -> Result<(), &'static str> {
    for field in fields.chunks_exact(SEGMENT_LEN) {
        if field[0] == 0 {
            break;
        }
        map.push(Segment {
            offset: number_as(&field[..12])?,
            len: number_as(&field[12..])?,
        });
    }
    Ok(())
}

fn number_as<T: TryFrom<i64>>(field: &[u8]) -> Result<T, &'static str> {
    T::try_from(number(field)?).map_err(|_| "a number in a header is out of range")
}

/// A number field: octal digits with spaces or zero bytes around them, or, if the highest bit is set, the rest of the field
/// in base 256 as a two's complement (GNU).
fn number(field: &[u8]) -> Result<i64, &'static str> {
    if field[0] & 0x80 == 0 {
        return octal(field);
    }
    let negative = field[0] & 0x40 != 0;
    let first = i64::from(field[0] & 0x3f) - if negative { 0x40 } else { 0 };
    field[1..]
        .iter()
        .try_fold(first, |value, &byte| value.checked_mul(256)?.checked_add(byte.into()))
        .ok_or("a number in a header is too great")
}

fn octal(field: &[u8]) -> Result<i64, &'static str> {
    let is_filler = |byte: &u8| matches!(byte, b' ' | 0);
    let digits = field
        .iter()
        .skip_while(|byte| is_filler(byte))
        .take_while(|byte| !is_filler(byte));
    digits
        .map(|&digit| matches!(digit, b'0'..=b'7').then(|| i64::from(digit - b'0')))
        .try_fold(0i64, |value, digit| value.checked_mul(8)?.checked_add(digit?))
        .ok_or("a number in a header is not octal")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_read_in_both_forms() {
        assert_eq!(number(b"0000644\0"), Ok(0o644));
        assert_eq!(number(b"  755 \0 "), Ok(0o755));
        assert_eq!(number(&[0; 8]), Ok(0));
        assert_eq!(number(&[0x80, 0, 0, 1, 0]), Ok(256));
        assert_eq!(number(&[0xff; 12]), Ok(-1));
        assert_eq!(number(&[0xff, 0xff, 0xfe]), Ok(-2));
    }

    #[test]
    fn numbers_that_are_none_or_too_great_are_refused() {
        assert!(number(b"0000648\0").is_err());
        assert!(number(b"-1").is_err());
        assert!(number(&[0xbf; 12]).is_err());
        assert!(number_as::<u32>(&[0x80, 1, 0, 0, 0, 0]).is_err());
        assert!(number_as::<u64>(&[0xff; 12]).is_err());
    }
}
