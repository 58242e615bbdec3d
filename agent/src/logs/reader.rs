//! Reads one run's log: forward, a bounded batch at a time, on from where the last batch ended.

use std::{
    collections::VecDeque,
    fs::File,
    io::{self, BufRead as _, BufReader, Seek as _},
    path::{Path, PathBuf},
    time::SystemTime,
};

use flint_api::host::{LogBatch, LogEntry};

use super::{
    cri, tail,
    writer::{file_name, numbers},
};
use crate::pods::system_time;

/// What the entries of one batch may cost; a last one of 16 KiB may go beyond.
const BATCH: usize = 64 << 10;
/// What an entry costs beside its text, in memory or on the wire.
const ENTRY_COST: usize = 64;
/// No entry is longer; a line that is was not written by flintd.
pub(super) const MAX_LINE: u64 = (cri::MAX_TEXT + 256) as u64;

/// Reader of one run's log.
#[derive(Debug)]
pub struct RunReader {
    folder: PathBuf,
    /// Opened at the start, so that rotation does not take them away in the middle of a read.
    opened: VecDeque<(u64, File)>,
    current: Option<(u64, BufReader<File>)>,
    /// The file read last.
    last: Option<u64>,
    /// Files were rotated away since the last entry given.
    gap: bool,
    /// Comes after a gap, and so begins a batch.
    held: Option<LogEntry>,
    since: Option<SystemTime>,
}

impl RunReader {
    /// Begins at the oldest entry kept, or `tail` lines before the end. A run without a log has no entries.
    pub fn open(folder: &Path, tail: Option<u64>, since: Option<SystemTime>) -> io::Result<Self> {
        let mut reader = Self {
            folder: folder.to_owned(),
            opened: VecDeque::new(),
            current: None,
            last: None,
            gap: false,
            held: None,
            since,
        };
        reader.open_files(0)?;
        if let Some(lines) = tail {
            // A place in files that stay open, not a number of entries: rotation takes entries away under a reader.
            let (older, at) = tail::begin(&reader.opened, lines)?;
            reader.opened.drain(..older);
            if let Some((_, file)) = reader.opened.front_mut() {
                file.seek(io::SeekFrom::Start(at))?;
            }
        }
        Ok(reader)
    }

    fn open_files(&mut self, from: u64) -> io::Result<()> {
        let numbers = match numbers(&self.folder) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            other => other?,
        };
        for number in numbers.into_iter().filter(|number| *number >= from) {
            match File::open(self.folder.join(file_name(number))) {
                Ok(file) => self.opened.push_back((number, file)),
                // Rotated away just now.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// The next entries; none means that there are no more just now.
    pub fn batch(&mut self) -> io::Result<LogBatch> {
        let mut batch = LogBatch::default();
        let mut cost = 0;
        if let Some(entry) = self.held.take() {
            batch.gap = std::mem::take(&mut self.gap);
            cost += entry.line.len() + ENTRY_COST;
            batch.entries.push(entry);
        }
        while cost < BATCH
            && let Some(entry) = self.next_entry()?
        {
            if self.gap && !batch.entries.is_empty() {
                self.held = Some(entry);
                break;
            }
            batch.gap |= std::mem::take(&mut self.gap);
            cost += entry.line.len() + ENTRY_COST;
            batch.entries.push(entry);
        }
        Ok(batch)
    }

    fn next_entry(&mut self) -> io::Result<Option<LogEntry>> {
        loop {
            if self.current.is_none()
                && let Some((number, file)) = self.opened.pop_front()
            {
                self.gap |= self.last.is_some_and(|last| number > last + 1);
                self.last = Some(number);
                self.current = Some((number, BufReader::new(file)));
            }
            let Some((number, file)) = &mut self.current else {
                self.open_files(0)?;
                if self.opened.is_empty() {
                    return Ok(None);
                }
                continue;
            };
            if let Some(line) = complete_line(file)? {
                let entry = cri::parse(&line).filter(|entry| {
                    let time = entry.time.map(system_time);
                    self.since.is_none_or(|since| time.is_some_and(|time| time >= since))
                });
                match entry {
                    Some(entry) => return Ok(Some(entry)),
                    None => continue,
                }
            }
            // The end of this file: it is sealed only if there is a younger one.
            let next = *number + 1;
            if self.opened.is_empty() {
                self.open_files(next)?;
                if self.opened.is_empty() {
                    return Ok(None);
                }
                // It may have grown between our last read and the younger file's birth.
                continue;
            }
            if complete_line_is_there(file)? {
                continue;
            }
            self.current = None;
        }
    }
}

/// A line without its newline; `None`, and the place unchanged, if it is not complete yet.
fn complete_line(file: &mut BufReader<File>) -> io::Result<Option<Vec<u8>>> {
    let mut line = Vec::new();
    let read = io::Read::take(&mut *file, MAX_LINE).read_until(b'\n', &mut line)?;
    if line.pop() == Some(b'\n') {
        return Ok(Some(line));
    }
    if read as u64 == MAX_LINE {
        // Not ours; go on after it.
        return Ok(Some(Vec::new()));
    }
    file.seek_relative(-i64::try_from(read).unwrap_or(0))?;
    Ok(None)
}

/// Whether the file has grown past what was read, without moving.
fn complete_line_is_there(file: &mut BufReader<File>) -> io::Result<bool> {
    let at = file.stream_position()?;
    Ok(file.get_ref().metadata()?.len() > at && {
        let line = complete_line(file)?;
        file.seek(io::SeekFrom::Start(at))?;
        line.is_some()
    })
}

#[cfg(test)]
mod tests {
    use flint_api::host::OutputStream;

    use super::*;
    use crate::logs::writer::RunWriter;

    const OUT: OutputStream = OutputStream::Stdout;

    fn write(writer: &mut RunWriter, time: u64, data: &str) {
        let at = writer.offset();
        writer.append(at, time, OUT, data.as_bytes()).unwrap();
    }

    fn all(reader: &mut RunReader) -> String {
        let mut text = Vec::new();
        loop {
            let batch = reader.batch().unwrap();
            if batch.entries.is_empty() {
                return String::from_utf8(text).unwrap();
            }
            text.extend(batch.entries.into_iter().flat_map(|entry| entry.line));
        }
    }

    #[test]
    fn a_tail_counts_lines_and_not_their_parts() {
        let folder = tempfile::tempdir().unwrap();
        let mut writer = RunWriter::open(folder.path()).unwrap();
        for data in ["one\ntwo\n", "thr", "ee\n", "fo", "ur"] {
            write(&mut writer, 1, data);
        }
        for (tail, text) in [(0, ""), (1, "four"), (2, "three\nfour"), (9, "one\ntwo\nthree\nfour")] {
            assert_eq!(
                all(&mut RunReader::open(folder.path(), Some(tail), None).unwrap()),
                text,
                "tail {tail}"
            );
        }
    }

    #[test]
    fn since_leaves_out_what_is_older() {
        let folder = tempfile::tempdir().unwrap();
        let mut writer = RunWriter::open(folder.path()).unwrap();
        write(&mut writer, 1_000_000_000, "old\n");
        write(&mut writer, 2_000_000_000, "new\n");
        let since = SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(2);
        assert_eq!(
            all(&mut RunReader::open(folder.path(), None, Some(since)).unwrap()),
            "new\n"
        );
    }

    #[test]
    fn a_reader_that_follows_gets_everything_once_over_rotations() {
        let folder = tempfile::tempdir().unwrap();
        let mut writer = RunWriter::with_limit(folder.path(), 300).unwrap();
        let mut reader = RunReader::open(folder.path(), None, None).unwrap();
        let (mut wrote, mut read) = (String::new(), String::new());
        for count in 0..100 {
            let line = format!("line {count}\n");
            write(&mut writer, 1, &line);
            wrote += &line;
            if count % 7 == 0 {
                read += &all(&mut reader);
            }
        }
        read += &all(&mut reader);
        assert_eq!(read, wrote);
    }

    /// Writes numbered lines until the file that was written to before is rotated away.
    fn flood(writer: &mut RunWriter, folder: &Path, lines: &mut std::ops::RangeFrom<u32>) {
        let youngest = *numbers(folder).unwrap().last().unwrap();
        while numbers(folder).unwrap()[0] <= youngest {
            write(writer, 1, &format!("line {}\n", lines.next().unwrap()));
        }
    }

    #[test]
    fn a_tail_that_is_overtaken_goes_on_at_what_is_still_there_and_comes_to_the_end() {
        let folder = tempfile::tempdir().unwrap();
        let mut writer = RunWriter::with_limit(folder.path(), 300).unwrap();
        let mut lines = 0..;
        flood(&mut writer, folder.path(), &mut lines);
        let last = lines.start - 1;
        let mut reader = RunReader::open(folder.path(), Some(1), None).unwrap();
        // Nothing is read while all that was there is rotated away, twice.
        flood(&mut writer, folder.path(), &mut lines);
        flood(&mut writer, folder.path(), &mut lines);
        write(&mut writer, 1, "the end\n");
        let read = all(&mut reader);
        assert!(read.starts_with(&format!("line {last}\n")), "{read}");
        assert!(
            read.ends_with(&format!("line {}\nthe end\n", lines.start - 1)),
            "{read}"
        );
        let kept = all(&mut RunReader::open(folder.path(), None, None).unwrap());
        assert!(read.ends_with(&kept), "{read}");
        // And on, when it has caught up.
        write(&mut writer, 1, "after the end\n");
        assert_eq!(all(&mut reader), "after the end\n");
    }

    #[test]
    fn a_tail_that_is_opened_in_a_flood_comes_to_its_end() {
        let folder = tempfile::tempdir().unwrap();
        let mut writer = RunWriter::with_limit(folder.path(), 300).unwrap();
        let readers: Vec<_> = std::thread::scope(|scope| {
            let (begun, begin) = std::sync::mpsc::channel();
            scope.spawn(move || {
                for count in 0..20_000 {
                    write(&mut writer, 1, &format!("line {count}\n"));
                    if count == 100 {
                        begun.send(()).unwrap();
                    }
                }
                write(&mut writer, 1, "the end\n");
            });
            begin.recv().unwrap();
            (0..50).map(|_| RunReader::open(folder.path(), Some(1), None)).collect()
        });
        for reader in readers {
            let read = all(&mut reader.unwrap());
            assert!(read.ends_with("the end\n"), "{read}");
        }
    }

    #[test]
    fn a_reader_that_was_overtaken_is_told_where_entries_are_missing() {
        let folder = tempfile::tempdir().unwrap();
        let mut writer = RunWriter::with_limit(folder.path(), 300).unwrap();
        let mut lines = 0..;
        write(&mut writer, 1, "first\n");
        let mut reader = RunReader::open(folder.path(), None, None).unwrap();
        flood(&mut writer, folder.path(), &mut lines);
        flood(&mut writer, folder.path(), &mut lines);
        let (before, after) = (reader.batch().unwrap(), reader.batch().unwrap());
        assert_eq!((before.gap, after.gap), (false, true));
        assert_eq!(before.entries[0].line, b"first\n");
        let kept = RunReader::open(folder.path(), None, None).unwrap().batch().unwrap();
        assert_eq!((after.entries, kept.gap), (kept.entries, false));
        assert!(reader.batch().unwrap().entries.is_empty());
    }

    #[test]
    fn a_batch_is_bounded_whether_lines_are_long_or_empty() {
        let folder = tempfile::tempdir().unwrap();
        let mut writer = RunWriter::open(folder.path()).unwrap();
        write(&mut writer, 1, &"\n".repeat(5000));
        write(&mut writer, 1, &"x".repeat(200_000));
        let mut reader = RunReader::open(folder.path(), None, None).unwrap();
        let (mut entries, mut batches) = (0, 0);
        loop {
            let batch = reader.batch().unwrap().entries;
            if batch.is_empty() {
                break;
            }
            let cost: usize = batch.iter().map(|entry| entry.line.len() + ENTRY_COST).sum();
            assert!(cost < BATCH + cri::MAX_TEXT + 2 * ENTRY_COST, "{cost}");
            entries += batch.len();
            batches += 1;
        }
        assert_eq!(entries, 5000 + 200_000_usize.div_ceil(cri::MAX_TEXT));
        assert!((8..12).contains(&batches), "{batches}");
    }

    #[test]
    fn a_tail_goes_back_over_rotations() {
        let folder = tempfile::tempdir().unwrap();
        let mut writer = RunWriter::with_limit(folder.path(), 100).unwrap();
        for count in 0..7 {
            write(&mut writer, 1, &format!("line {count}\n"));
        }
        // Three entries make a file: the youngest holds one.
        assert_eq!(numbers(folder.path()).unwrap(), [0, 1, 2]);
        for tail in 0..=8 {
            let expected: String = (7_u64.saturating_sub(tail)..7)
                .map(|count| format!("line {count}\n"))
                .collect();
            let read = all(&mut RunReader::open(folder.path(), Some(tail), None).unwrap());
            assert_eq!(read, expected, "tail {tail}");
        }
    }

    #[test]
    fn a_line_that_is_still_being_written_is_read_when_it_is_complete() {
        use std::io::Write as _;
        let folder = tempfile::tempdir().unwrap();
        let mut file = File::create(folder.path().join(file_name(0))).unwrap();
        file.write_all(b"1970-01-01T00:00:00.000000001Z stdout F hel").unwrap();
        let mut reader = RunReader::open(folder.path(), None, None).unwrap();
        assert_eq!(all(&mut reader), "");
        file.write_all(b"lo\n").unwrap();
        assert_eq!(all(&mut reader), "hello\n");
    }
}
