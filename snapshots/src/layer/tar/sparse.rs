//! Sparse files: which parts of a file the stream has. GNU tar has written four formats over the years.

/// A part of a file whose bytes are in the stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::layer) struct Segment {
    pub(in crate::layer) offset: u64,
    pub(in crate::layer) len: u64,
}

/// What PAX records `GNU.sparse.*` say.
#[derive(Default)]
pub(super) struct PaxSparse {
    pub(super) name: Option<Vec<u8>>,
    pub(super) size: Option<u64>,
    major: Option<u64>,
    minor: Option<u64>,
    /// Offset, length, offset, length, ...
    numbers: Vec<u64>,
    has_map: bool,
}

impl PaxSparse {
    pub(super) fn set(&mut self, key: &[u8], value: &[u8]) -> Result<(), &'static str> {
        match key {
            b"name" => self.name = Some(value.to_vec()),
            b"realsize" | b"size" => self.size = Some(decimal(value)?),
            b"major" => self.major = Some(decimal(value)?),
            b"minor" => self.minor = Some(decimal(value)?),
            // Format 0.1: all numbers in one record.
            b"map" => {
                let numbers = value.split(|&byte| byte == b',').filter(|number| !number.is_empty());
                self.numbers = numbers.map(decimal).collect::<Result<_, _>>()?;
                self.has_map = true;
            }
            // Format 0.0: a record for each number.
            b"offset" | b"numbytes" => {
                if self.numbers.len().is_multiple_of(2) != (key == b"offset") {
                    return Err("a sparse file's offsets and lengths do not alternate");
                }
                self.numbers.push(decimal(value)?);
                self.has_map = true;
            }
            _ => {}
        }
        Ok(())
    }

    pub(super) fn is_used(&self) -> bool {
        self.has_map || self.map_is_in_data()
    }

    /// Format 1.0.
    pub(super) fn map_is_in_data(&self) -> bool {
        (self.major, self.minor) == (Some(1), Some(0))
    }

    pub(super) fn segments(&self) -> Result<Vec<Segment>, &'static str> {
        pairs(&self.numbers)
    }
}

fn pairs(numbers: &[u64]) -> Result<Vec<Segment>, &'static str> {
    if !numbers.len().is_multiple_of(2) {
        return Err("a sparse file's map ends in the middle of a pair");
    }
    Ok(numbers
        .chunks_exact(2)
        .map(|pair| Segment {
            offset: pair[0],
            len: pair[1],
        })
        .collect())
}

/// The map of format 1.0, as it comes.
#[derive(Default)]
pub(super) struct Lines {
    numbers: Vec<u64>,
    line: Vec<u8>,
}

impl Lines {
    /// Adds a block; whether the map is complete.
    pub(super) fn add(&mut self, block: &[u8]) -> Result<bool, &'static str> {
        for &byte in block {
            if self.is_complete() {
                return Ok(true);
            }
            match byte {
                b'\n' => {
                    self.numbers.push(decimal(&self.line)?);
                    self.line.clear();
                }
                _ if self.line.len() < 20 => self.line.push(byte),
                _ => return Err("a number in a sparse file's map is too long"),
            }
        }
        Ok(self.is_complete())
    }

    pub(super) fn len(&self) -> usize {
        self.numbers.len()
    }

    fn is_complete(&self) -> bool {
        self.numbers
            .first()
            .is_some_and(|&pairs| (self.numbers.len() as u64 - 1) / 2 >= pairs)
    }

    pub(super) fn into_segments(self) -> Result<Vec<Segment>, &'static str> {
        pairs(self.numbers.get(1..).unwrap_or_default())
    }
}

/// `segments` without empty ones, if they are in order, within the file, and as long together as the stream says.
pub(super) fn checked(mut segments: Vec<Segment>, size: u64, stored: u64) -> Result<Vec<Segment>, &'static str> {
    // GNU tar ends a map with an empty segment at the file's end.
    segments.retain(|segment| segment.len > 0);
    let (mut end, mut total) = (0, 0u64);
    for segment in &segments {
        if segment.offset < end {
            return Err("a sparse file's pieces overlap or are not in order");
        }
        end = segment
            .offset
            .checked_add(segment.len)
            .filter(|&end| end <= size)
            .ok_or("a sparse file's piece is beyond its end")?;
        total += segment.len;
    }
    if total != stored {
        return Err("a sparse file's map does not go with its data");
    }
    Ok(segments)
}

/// A number in decimal digits, nothing else.
pub(super) fn decimal(digits: &[u8]) -> Result<u64, &'static str> {
    if digits.is_empty() {
        return Err("a number is missing");
    }
    digits
        .iter()
        .try_fold(0u64, |value, &digit| {
            let digit = digit.is_ascii_digit().then(|| u64::from(digit - b'0'))?;
            value.checked_mul(10)?.checked_add(digit)
        })
        .ok_or("a number is not decimal or too great")
}
