//! Writes one run's output into files, so that a flintd that is killed at any moment loses nothing and doubles nothing.
//!
//! ```text
//!   <container>/<run>/000003.log   sealed at 10 MiB; the five youngest are kept
//!                     000004.log   grows
//!                     checkpoint   { file, length, offset in the container's output }
//! ```
//!
//! First the file grows, then the checkpoint follows. What stands beyond the checkpoint is cut off by the next flintd,
//! which reads it from the guest again: the guest keeps what was not acknowledged, and is acknowledged only what the
//! checkpoint covers. (A power failure ends the guest too, so the page cache is durable enough.)

use std::{
    fs::{self, File, OpenOptions},
    io,
    os::unix::fs::FileExt as _,
    path::{Path, PathBuf},
};

use flint_api::host::OutputStream;

use super::cri;

/// Size at which a file is sealed.
const FILE_BYTES: u64 = 10 << 20;
/// Files kept for one run.
const FILES: u64 = 5;
const CHECKPOINT: &str = "checkpoint";

/// Writer of one run's log.
#[derive(Debug)]
pub struct RunWriter {
    folder: PathBuf,
    limit: u64,
    file: File,
    checkpoint: File,
    number: u64,
    length: u64,
    offset: u64,
    buffer: Vec<u8>,
}

impl RunWriter {
    /// Opens the run's log where its last writer left off.
    pub fn open(folder: &Path) -> io::Result<Self> {
        Self::with_limit(folder, FILE_BYTES)
    }

    pub(super) fn with_limit(folder: &Path, limit: u64) -> io::Result<Self> {
        fs::create_dir_all(folder)?;
        let checkpoint = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(folder.join(CHECKPOINT))?;
        let [number, length, offset] = read_checkpoint(&checkpoint)?;
        for later in numbers(folder)?.into_iter().filter(|found| *found > number) {
            fs::remove_file(folder.join(file_name(later)))?;
        }
        let file = open(folder, number)?;
        file.set_len(length)?;
        Ok(Self {
            folder: folder.to_owned(),
            limit,
            file,
            checkpoint,
            number,
            length,
            offset,
            buffer: Vec::new(),
        })
    }

    /// Where in the container's output to go on reading.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// Goes on at a later place of the output, if nothing was written yet.
    pub fn begin_at(&mut self, offset: u64) -> io::Result<()> {
        if self.offset == 0 {
            self.offset = offset;
            write_checkpoint(&self.checkpoint, [self.number, self.length, self.offset])?;
        }
        Ok(())
    }

    /// Appends a chunk that began at `offset`; what is known already is left out.
    pub fn append(&mut self, offset: u64, time_ns: u64, stream: OutputStream, data: &[u8]) -> io::Result<()> {
        let known = usize::try_from(self.offset.saturating_sub(offset)).unwrap_or(usize::MAX);
        let Some(data) = data.get(known..).filter(|data| !data.is_empty()) else {
            return Ok(());
        };
        let end = self.offset.max(offset).saturating_add(data.len() as u64);
        self.buffer.clear();
        cri::format(&mut self.buffer, time_ns, stream, data);
        if self.length >= self.limit {
            self.rotate()?;
        }
        self.file.write_all_at(&self.buffer, self.length)?;
        self.length += self.buffer.len() as u64;
        self.offset = end;
        write_checkpoint(&self.checkpoint, [self.number, self.length, self.offset])
    }

    fn rotate(&mut self) -> io::Result<()> {
        let next = self.number + 1;
        self.file = open(&self.folder, next)?;
        // A failed write of an earlier try may have left something.
        self.file.set_len(0)?;
        self.number = next;
        self.length = 0;
        write_checkpoint(&self.checkpoint, [self.number, 0, self.offset])?;
        if let Some(old) = next.checked_sub(FILES) {
            match fs::remove_file(self.folder.join(file_name(old))) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
        Ok(())
    }
}

pub(super) fn file_name(number: u64) -> String {
    format!("{number:06}.log")
}

/// Numbers of the run's files, ascending.
pub(super) fn numbers(folder: &Path) -> io::Result<Vec<u64>> {
    let mut numbers = Vec::new();
    for entry in fs::read_dir(folder)? {
        let name = entry?.file_name();
        let number: Option<u64> = name
            .to_str()
            .and_then(|name| name.strip_suffix(".log"))
            .and_then(|number| number.parse().ok());
        numbers.extend(number);
    }
    numbers.sort_unstable();
    Ok(numbers)
}

fn open(folder: &Path, number: u64) -> io::Result<File> {
    OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .open(folder.join(file_name(number)))
}

/// Three numbers in one write of 24 bytes, which a kill cannot cut in two.
fn write_checkpoint(file: &File, numbers: [u64; 3]) -> io::Result<()> {
    let mut bytes = [0; 24];
    for (place, number) in bytes.chunks_exact_mut(8).zip(numbers) {
        place.copy_from_slice(&number.to_le_bytes());
    }
    file.write_all_at(&bytes, 0)
}

/// How far a run's log is; 0 if there is none.
pub(super) fn offset(folder: &Path) -> io::Result<u64> {
    match File::open(folder.join(CHECKPOINT)) {
        Ok(checkpoint) => read_checkpoint(&checkpoint).map(|[_, _, offset]| offset),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(0),
        Err(error) => Err(error),
    }
}

fn read_checkpoint(file: &File) -> io::Result<[u64; 3]> {
    let mut bytes = [0; 24];
    let mut numbers = [0; 3];
    if file.metadata()?.len() < 24 {
        return Ok(numbers);
    }
    file.read_exact_at(&mut bytes, 0)?;
    for (number, place) in numbers.iter_mut().zip(bytes.chunks_exact(8)) {
        *number = u64::from_le_bytes(place.try_into().unwrap_or_default());
    }
    Ok(numbers)
}

#[cfg(test)]
mod tests {
    use super::*;

    const OUT: OutputStream = OutputStream::Stdout;

    fn text(folder: &Path) -> String {
        let mut text = String::new();
        for number in numbers(folder).unwrap() {
            text += &fs::read_to_string(folder.join(file_name(number))).unwrap();
        }
        text
    }

    #[test]
    fn a_new_writer_goes_on_where_the_last_one_was_killed() {
        let folder = tempfile::tempdir().unwrap();
        let mut writer = RunWriter::open(folder.path()).unwrap();
        writer.append(0, 1, OUT, b"one\n").unwrap();
        // Killed after the file grew and before the checkpoint followed.
        writer
            .file
            .write_all_at(b"1970-01-01T00:00:00.000000002Z stdout F tw", writer.length)
            .unwrap();
        drop(writer);
        let mut writer = RunWriter::open(folder.path()).unwrap();
        assert_eq!(writer.offset(), 4);
        writer.append(4, 2, OUT, b"two\n").unwrap();
        let lines: Vec<_> = text(folder.path()).lines().map(|line| line[38..].to_owned()).collect();
        assert_eq!(lines, ["F one", "F two"]);
    }

    #[test]
    fn what_the_guest_sends_again_is_written_once() {
        let folder = tempfile::tempdir().unwrap();
        let mut writer = RunWriter::open(folder.path()).unwrap();
        writer.append(0, 1, OUT, b"one\n").unwrap();
        writer.append(0, 1, OUT, b"one\ntwo\n").unwrap();
        writer.append(2, 1, OUT, b"e\n").unwrap();
        assert_eq!(text(folder.path()).matches("F one").count(), 1);
        assert_eq!(text(folder.path()).matches("F two").count(), 1);
        assert_eq!(writer.offset(), 8);
    }

    #[test]
    fn a_flood_fills_five_files_and_no_more() {
        let folder = tempfile::tempdir().unwrap();
        let mut writer = RunWriter::with_limit(folder.path(), 1000).unwrap();
        for _ in 0..500 {
            let at = writer.offset();
            writer.append(at, 1, OUT, b"a line of thirty-two characters\n").unwrap();
        }
        let kept = numbers(folder.path()).unwrap();
        assert_eq!(kept.len(), 5);
        assert!(*kept.last().unwrap() > 10);
        assert!(text(folder.path()).len() < 5 * 1100);
        drop(writer);
        assert_eq!(RunWriter::open(folder.path()).unwrap().offset(), 500 * 32);
    }

    #[test]
    #[ignore = "a measurement, best of an optimised build: cargo test --release -p flint-agent --lib how_fast -- --ignored --nocapture"]
    fn how_fast_a_log_is_written() {
        const TOTAL: usize = 512 << 20;
        for length in [28, 200] {
            let folder = tempfile::tempdir().unwrap();
            let mut writer = RunWriter::open(folder.path()).unwrap();
            // As the guest gives it.
            let chunk: Vec<u8> = (1..=32 << 10)
                .map(|place| if place % length == 0 { b'\n' } else { b'x' })
                .collect();
            let begun = std::time::Instant::now();
            while writer.offset() < TOTAL as u64 {
                writer.append(writer.offset(), 1, OUT, &chunk).unwrap();
            }
            let rate = writer.offset() as f64 / begun.elapsed().as_secs_f64() / 1e6;
            println!("lines of {length} bytes: {rate:.0} MB/s of output");
        }
    }
}
