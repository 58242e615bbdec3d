//! Where the last lines of a log begin: read backwards in blocks, so that a tail costs what it shows and not what is kept.

use std::{collections::VecDeque, fs::File, io, os::unix::fs::FileExt as _};

use super::{cri, reader::MAX_LINE};

/// Read at once. Longer than any entry.
const BLOCK: usize = 64 << 10;

/// Where the last `lines` lines of these files begin, oldest file first: index of the file, place in it. Parts belong to
/// the line they begin. The files may grow meanwhile: what comes later is no part of the tail and follows it.
pub(super) fn begin(files: &VecDeque<(u64, File)>, lines: u64) -> io::Result<(usize, u64)> {
    let mut found = 0;
    // The oldest entry seen; it begins a line if the one before it ends one.
    let mut oldest = None;
    for (index, (_, file)) in files.iter().enumerate().rev() {
        let mut entries = Backward::new(file)?;
        if lines == 0 {
            return Ok((index, entries.end()));
        }
        while let Some((at, line)) = entries.before()? {
            let Some(entry) = cri::parse(line) else { continue };
            if let Some(begin) = oldest
                && entry.line.ends_with(b"\n")
            {
                found += 1;
                if found == lines {
                    return Ok(begin);
                }
            }
            oldest = Some((index, at));
        }
    }
    Ok((0, 0))
}

/// A file's complete lines, last first.
struct Backward<'a> {
    file: &'a File,
    /// Place of the window in the file.
    at: u64,
    /// What was read and not given out; ends with a newline or is empty.
    window: Vec<u8>,
    /// Length of what is left of the window.
    left: usize,
}

impl<'a> Backward<'a> {
    fn new(file: &'a File) -> io::Result<Self> {
        let at = file.metadata()?.len();
        let mut backward = Self {
            file,
            at,
            window: Vec::new(),
            left: 0,
        };
        // A line that is being written just now is not complete.
        while backward.left == 0 && backward.extend()? {
            let newline = backward.window.iter().rposition(|byte| *byte == b'\n');
            backward.left = newline.map_or(0, |newline| newline + 1);
        }
        Ok(backward)
    }

    /// Where the complete lines that were not given out end.
    fn end(&self) -> u64 {
        self.at + self.left as u64
    }

    /// The line before, without its newline, and its place.
    fn before(&mut self) -> io::Result<Option<(u64, &[u8])>> {
        loop {
            let Some(newline) = self.left.checked_sub(1) else {
                if self.extend()? {
                    // The block before ends where a line began, with the newline of the line before that.
                    self.left = self.window.len();
                    continue;
                }
                return Ok(None);
            };
            let start = self.window[..newline].iter().rposition(|byte| *byte == b'\n');
            // Longer than any entry: nobody here wrote it, and it is left out in bounded memory.
            if start.is_none() && self.at > 0 && self.left as u64 <= MAX_LINE {
                self.extend()?;
                self.left = self.window.len();
                continue;
            }
            let start = start.map_or(0, |newline| newline + 1);
            self.left = start;
            return Ok(Some((self.at + start as u64, &self.window[start..newline])));
        }
    }

    /// Puts the block before in front of what is left; false at the file's beginning.
    fn extend(&mut self) -> io::Result<bool> {
        let size = usize::try_from(self.at).map_or(BLOCK, |before| before.min(BLOCK));
        let at = self.at - size as u64;
        let mut block = vec![0; size];
        self.file.read_exact_at(&mut block, at)?;
        block.extend_from_slice(&self.window[..self.left]);
        self.window = block;
        self.at = at;
        Ok(size > 0)
    }
}

#[cfg(test)]
mod tests {
    use flint_api::host::OutputStream;

    use super::*;

    fn file(parts: &[&[u8]]) -> (u64, File) {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&parts.concat(), 0).unwrap();
        (0, file)
    }

    fn entry(data: &[u8]) -> Vec<u8> {
        let mut out = Vec::new();
        cri::format(&mut out, 1, OutputStream::Stdout, data);
        out
    }

    #[test]
    fn every_line_is_found_wherever_the_blocks_cut_it() {
        // Lengths around a block's, and enough of them that lines begin and end on both sides of many blocks.
        let entries: Vec<_> = (0..3000_usize)
            .map(|count| entry(format!("{}\n", "x".repeat(count * 37 % 997)).as_bytes()))
            .collect();
        let text = entries.concat();
        let files = VecDeque::from([file(&[&text])]);
        let mut at = text.len();
        for (tail, entry) in entries.iter().rev().enumerate() {
            assert_eq!(begin(&files, tail as u64).unwrap(), (0, at as u64), "tail {tail}");
            at -= entry.len();
            if tail > 200 {
                break;
            }
        }
        assert_eq!(begin(&files, 3000).unwrap(), (0, 0));
        assert_eq!(begin(&files, u64::MAX).unwrap(), (0, 0));
    }

    #[test]
    fn a_file_that_is_empty_or_has_no_complete_line_yet_is_looked_through() {
        let (one, two) = (entry(b"one\n"), entry(b"two\n"));
        let at = one.len() as u64;
        let files = VecDeque::from([file(&[&one, &two]), file(&[]), file(&[b"1970-01"])]);
        assert_eq!(begin(&files, 1).unwrap(), (0, at));
        assert_eq!(begin(&files, 0).unwrap(), (2, 0));
        assert_eq!(begin(&VecDeque::new(), 1).unwrap(), (0, 0));
    }

    #[test]
    fn a_line_longer_than_any_entry_is_passed_over() {
        let (one, two) = (entry(b"one\n"), entry(b"two\n"));
        let garbage = [vec![0; 300_000], vec![b'\n']].concat();
        let files = VecDeque::from([file(&[&one, &garbage, &two])]);
        let at = (one.len() + garbage.len()) as u64;
        // Entries right before and after it are found; it counts for none.
        assert_eq!(begin(&files, 1).unwrap(), (0, at));
        assert_eq!(begin(&files, 2).unwrap(), (0, 0));
    }
}
