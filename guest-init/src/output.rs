//! A container's output, kept until its reader has acknowledged it.
//!
//! ```text
//!   forgotten      retained (at most BOUND)         not read yet: the pipe fills, the container's write waits
//! ------------|===chunk===|=chunk=|====chunk====|- - - - - - -
//!           start                              end
//! ```
//!
//! Offsets count the bytes of both streams together. A reader asks from an offset, which acknowledges all before it;
//! it is given half of the bound at most and has to ask again, so an unacknowledged byte is never dropped and a
//! container that floods costs the guest BOUND. Each chunk is charged its bookkeeping too: one-byte writes cannot blow
//! the buffer up.

use std::{
    collections::VecDeque,
    sync::{Mutex, MutexGuard, PoisonError},
    time::SystemTime,
};

use tokio::sync::Notify;

use crate::stream_fd::{Read, StreamFd};

/// Most that one container's unacknowledged output may cost.
pub const BOUND: usize = 1 << 20;
/// What a chunk costs beside its bytes.
const CHUNK_COST: usize = 128;
/// Most that is read from a pipe at once.
const READ_SIZE: usize = 32 << 10;
/// Most that is read from one of a container's streams after its end: what a program may make a pipe hold
/// (`fs.pipe-max-size`, pipe(7)). Whoever was handed the pipe and writes on is not listened to.
const READ_AFTER_END: usize = 1 << 20;

/// Which of a program's streams.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stream {
    /// Standard output, and everything of a terminal.
    Stdout,
    /// Standard error.
    Stderr,
}

/// Some output as it was read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chunk {
    /// Of its first byte.
    pub offset: u64,
    /// Where it was written to.
    pub stream: Stream,
    /// The bytes.
    pub data: Vec<u8>,
    /// When they were read.
    pub time: SystemTime,
}

impl Chunk {
    fn end(&self) -> u64 {
        self.offset + self.data.len() as u64
    }

    fn cost(&self) -> usize {
        self.data.len() + CHUNK_COST
    }
}

/// An offset that cannot be read from.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum BadOffset {
    /// Everything before `start` was acknowledged earlier.
    #[error("output before offset {start} was acknowledged and forgotten; {asked} was asked for")]
    Forgotten { asked: u64, start: u64 },
    /// The reader is ahead of the program.
    #[error("output ends at offset {end}; {asked} was asked for")]
    Ahead { asked: u64, end: u64 },
}

/// The buffer of one container.
#[derive(Debug)]
pub struct OutputBuffer {
    retained: Mutex<Retained>,
    appended: Notify,
    room: Notify,
}

#[derive(Debug)]
struct Retained {
    chunks: VecDeque<Chunk>,
    start: u64,
    end: u64,
    cost: usize,
    writers: usize,
}

impl OutputBuffer {
    /// For a program with `writers` output streams.
    pub fn new(writers: usize) -> Self {
        let retained = Retained {
            chunks: VecDeque::new(),
            start: 0,
            end: 0,
            cost: 0,
            writers,
        };
        Self {
            retained: Mutex::new(retained),
            appended: Notify::new(),
            room: Notify::new(),
        }
    }

    /// Reads `source` into the buffer, no faster than readers acknowledge, to its end or to what is in it when the
    /// container has `ended`: a process elsewhere that was handed the pipe can keep it open for ever. One call for each
    /// writer.
    pub async fn fill_from(&self, stream: Stream, source: &StreamFd, ended: impl Future<Output = ()>) {
        // Whatever ends this reading, readers must not wait for it any longer.
        let _done = WriterDone(self);
        let mut buffer = vec![0; READ_SIZE];
        tokio::pin!(ended);
        let mut after_end = None;
        loop {
            self.wait_for_room().await;
            let read = match after_end {
                Some(0) => return,
                Some(_) => source.try_read(&mut buffer),
                None => tokio::select! {
                    biased;
                    () = &mut ended => {
                        after_end = Some(READ_AFTER_END);
                        continue;
                    }
                    read = source.read(&mut buffer) => read.map(Read::from_count),
                },
            };
            match read {
                Ok(Read::Bytes(count)) => {
                    after_end = after_end.map(|left: usize| left.saturating_sub(count));
                    self.append(stream, buffer.get(..count).unwrap_or_default(), SystemTime::now());
                }
                Ok(Read::Empty | Read::End) => return,
                Err(error) => {
                    eprintln!("flint-init: reading a container's output: {error}");
                    return;
                }
            }
        }
    }

    async fn wait_for_room(&self) {
        loop {
            let room = self.room.notified();
            tokio::pin!(room);
            // Listening begins before the look, or an acknowledgement between the two would be missed.
            room.as_mut().enable();
            if self.lock().cost < BOUND {
                return;
            }
            room.await;
        }
    }

    fn append(&self, stream: Stream, data: &[u8], time: SystemTime) {
        let mut retained = self.lock();
        let chunk = Chunk {
            offset: retained.end,
            stream,
            data: data.to_vec(),
            time,
        };
        retained.end = chunk.end();
        retained.cost += chunk.cost();
        retained.chunks.push_back(chunk);
        drop(retained);
        self.appended.notify_waiters();
    }

    /// Acknowledges all before `from` and starts a reading there.
    pub fn read_from(&self, from: u64) -> Result<Reading<'_>, BadOffset> {
        let mut retained = self.lock();
        if from < retained.start {
            return Err(BadOffset::Forgotten {
                asked: from,
                start: retained.start,
            });
        }
        if from > retained.end {
            return Err(BadOffset::Ahead {
                asked: from,
                end: retained.end,
            });
        }
        retained.forget_before(from);
        drop(retained);
        self.room.notify_waiters();
        Ok(Reading {
            buffer: self,
            next: from,
            given: 0,
        })
    }

    fn lock(&self) -> MutexGuard<'_, Retained> {
        self.retained.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Retained {
    fn forget_before(&mut self, offset: u64) {
        while let Some(first) = self.chunks.front_mut() {
            if first.end() <= offset {
                self.cost -= first.cost();
                self.chunks.pop_front();
                continue;
            }
            // Less than the chunk's length, which is a usize.
            let acknowledged = usize::try_from(offset.saturating_sub(first.offset)).unwrap_or(0);
            first.data.drain(..acknowledged);
            first.offset += acknowledged as u64;
            self.cost -= acknowledged;
            break;
        }
        self.start = offset;
    }

    fn chunk_at(&self, offset: u64) -> Option<Chunk> {
        let index = self.chunks.partition_point(|chunk| chunk.end() <= offset);
        let chunk = self.chunks.get(index)?;
        let skipped = usize::try_from(offset.checked_sub(chunk.offset)?).ok()?;
        let data = chunk.data.get(skipped..)?.to_vec();
        Some(Chunk {
            offset,
            stream: chunk.stream,
            data,
            time: chunk.time,
        })
    }
}

/// Counts a writer off when it ends.
struct WriterDone<'a>(&'a OutputBuffer);

impl Drop for WriterDone<'_> {
    fn drop(&mut self) {
        let mut retained = self.0.lock();
        retained.writers = retained.writers.saturating_sub(1);
        drop(retained);
        self.0.appended.notify_waiters();
    }
}

/// One reader's way through the buffer.
#[derive(Debug)]
pub struct Reading<'a> {
    buffer: &'a OutputBuffer,
    next: u64,
    given: usize,
}

impl Reading<'_> {
    /// The next chunk, waited for; `None` when the output is over or half of the bound was given.
    pub async fn next(&mut self) -> Result<Option<Chunk>, BadOffset> {
        if self.given >= BOUND / 2 {
            return Ok(None);
        }
        loop {
            let appended = self.buffer.appended.notified();
            tokio::pin!(appended);
            appended.as_mut().enable();
            {
                let retained = self.buffer.lock();
                // Another reader may have acknowledged what this one has not been given. To end here without a word would
                // say that the output is over.
                if self.next < retained.start {
                    return Err(BadOffset::Forgotten {
                        asked: self.next,
                        start: retained.start,
                    });
                }
                if let Some(chunk) = retained.chunk_at(self.next) {
                    self.next = chunk.end();
                    self.given += chunk.cost();
                    return Ok(Some(chunk));
                }
                if retained.writers == 0 {
                    return Ok(None);
                }
            }
            appended.await;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{future::Future, os::fd::OwnedFd};

    use futures::FutureExt;
    use nix::{fcntl::OFlag, unistd::pipe2};

    use super::*;

    /// A small, seeded generator: failures repeat.
    struct Random(u64);

    impl Random {
        fn below(&mut self, bound: u64) -> u64 {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            self.0 % bound
        }
    }

    fn now<F: Future>(future: F) -> Option<F::Output> {
        future.now_or_never()
    }

    #[test]
    fn every_byte_is_read_once_in_order_whatever_the_cuts() {
        for seed in 1..200 {
            let mut random = Random(seed);
            let buffer = OutputBuffer::new(1);
            let (mut written, mut seen, mut from) = (Vec::<u8>::new(), Vec::<u8>::new(), 0_u64);
            for _ in 0..40 {
                for _ in 0..random.below(4) {
                    let length = random.below(5000);
                    let data: Vec<u8> = (0..length).map(|_| u8::try_from(random.below(256)).unwrap()).collect();
                    if !data.is_empty() {
                        buffer.append(Stream::Stdout, &data, SystemTime::UNIX_EPOCH);
                        written.extend(data);
                    }
                }
                let mut reading = buffer.read_from(from).unwrap();
                while let Some(Ok(Some(chunk))) = now(reading.next()) {
                    assert_eq!(chunk.offset, from);
                    // Acknowledge in the middle of a chunk now and then: the rest has to come again.
                    let taken = usize::try_from(random.below(chunk.data.len() as u64 + 1)).unwrap();
                    seen.extend(&chunk.data[..taken]);
                    from += taken as u64;
                    if taken < chunk.data.len() {
                        break;
                    }
                }
            }
            assert_eq!(seen, written[..seen.len()], "seed {seed}");
            let retained = buffer.lock();
            let cost: usize = retained.chunks.iter().map(Chunk::cost).sum();
            assert_eq!(retained.cost, cost, "seed {seed}");
            assert_eq!(retained.end, written.len() as u64);
        }
    }

    #[test]
    fn offsets_outside_the_buffer_are_refused() {
        let buffer = OutputBuffer::new(1);
        buffer.append(Stream::Stderr, b"0123456789", SystemTime::UNIX_EPOCH);
        buffer.read_from(4).unwrap();
        assert_eq!(
            buffer.read_from(3).unwrap_err(),
            BadOffset::Forgotten { asked: 3, start: 4 }
        );
        assert_eq!(
            buffer.read_from(11).unwrap_err(),
            BadOffset::Ahead { asked: 11, end: 10 }
        );
        assert!(buffer.read_from(10).is_ok());
    }

    #[test]
    fn a_reading_ends_at_half_of_the_bound_and_the_next_goes_on() {
        let buffer = OutputBuffer::new(1);
        for _ in 0..BOUND / READ_SIZE * 3 / 4 {
            buffer.append(Stream::Stdout, &[1; READ_SIZE], SystemTime::UNIX_EPOCH);
        }
        let mut reading = buffer.read_from(0).unwrap();
        let mut next = 0;
        while let Some(chunk) = now(reading.next()).unwrap().unwrap() {
            next = chunk.end();
        }
        assert!(
            next >= (BOUND / 2 - 2 * READ_SIZE) as u64 && next <= (BOUND / 2 + READ_SIZE) as u64,
            "{next}"
        );
        let mut reading = buffer.read_from(next).unwrap();
        assert!(now(reading.next()).unwrap().unwrap().is_some());
    }

    #[test]
    fn output_is_over_when_every_writer_is_done_and_all_is_given() {
        let buffer = OutputBuffer::new(2);
        buffer.append(Stream::Stdout, b"x", SystemTime::UNIX_EPOCH);
        drop(WriterDone(&buffer));
        let mut reading = buffer.read_from(1).unwrap();
        assert!(now(reading.next()).is_none(), "one writer is left: wait");
        drop(WriterDone(&buffer));
        assert_eq!(now(reading.next()), Some(Ok(None)));
    }

    fn pipe() -> (StreamFd, OwnedFd) {
        let (reader, writer) = pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK).unwrap();
        (StreamFd::reading(reader).unwrap(), writer)
    }

    #[tokio::test]
    async fn a_flood_stops_at_the_bound_and_goes_on_when_acknowledged() {
        let buffer = OutputBuffer::new(1);
        let (source, sink) = pipe();
        let flood = async {
            let sink = StreamFd::writing(sink).unwrap();
            for _ in 0..100 {
                sink.write_all(&[9; 64 << 10]).await.unwrap();
            }
        };
        let read = async {
            let (mut from, mut total) = (0, 0);
            loop {
                let mut reading = buffer.read_from(from).unwrap();
                let before = total;
                while let Some(chunk) = reading.next().await.unwrap() {
                    total += chunk.data.len();
                    from = chunk.end();
                    assert!(buffer.lock().cost < BOUND + READ_SIZE + CHUNK_COST);
                }
                if total == before {
                    return total;
                }
            }
        };
        let ((), (), total) = tokio::join!(
            flood,
            buffer.fill_from(Stream::Stdout, &source, std::future::pending()),
            read
        );
        assert_eq!(total, 100 * (64 << 10));
    }

    #[tokio::test]
    async fn output_is_over_with_its_container_though_somebody_holds_the_pipe() {
        let buffer = OutputBuffer::new(1);
        let (source, holder) = pipe();
        nix::unistd::write(&holder, b"last words").unwrap();
        buffer.fill_from(Stream::Stdout, &source, std::future::ready(())).await;
        let mut reading = buffer.read_from(0).unwrap();
        assert_eq!(now(reading.next()).unwrap().unwrap().unwrap().data, b"last words");
        assert_eq!(now(reading.next()), Some(Ok(None)));
    }

    #[tokio::test]
    async fn who_writes_on_into_an_ended_containers_pipe_is_not_listened_to_for_ever() {
        let buffer = OutputBuffer::new(1);
        let (source, sink) = pipe();
        let sink = StreamFd::writing(sink).unwrap();
        let flood = async {
            loop {
                sink.write_all(&[9; 4096]).await.unwrap();
            }
        };
        let read = async {
            let mut from = 0;
            loop {
                let mut reading = buffer.read_from(from).unwrap();
                let before = from;
                while let Some(chunk) = reading.next().await.unwrap() {
                    from = chunk.end();
                }
                if from == before {
                    return from;
                }
            }
        };
        let fill = buffer.fill_from(Stream::Stdout, &source, std::future::ready(()));
        let total = tokio::select! {
            () = flood => 0,
            ((), total) = async { tokio::join!(fill, read) } => total,
        };
        assert!(total < (READ_AFTER_END + READ_SIZE) as u64, "{total}");
    }

    #[test]
    fn a_reading_that_another_reader_overtook_says_so() {
        let buffer = OutputBuffer::new(1);
        buffer.append(Stream::Stdout, b"0123456789", SystemTime::UNIX_EPOCH);
        let mut slow = buffer.read_from(0).unwrap();
        buffer.read_from(5).unwrap();
        let overtaken = BadOffset::Forgotten { asked: 0, start: 5 };
        assert_eq!(now(slow.next()), Some(Err(overtaken)));
    }

    #[tokio::test]
    async fn a_flood_nobody_reads_blocks_its_writer() {
        let buffer = OutputBuffer::new(1);
        let (source, sink) = pipe();
        let sink = StreamFd::writing(sink).unwrap();
        let flood = async {
            loop {
                sink.write_all(&[9; 4096]).await.unwrap();
            }
        };
        let filling = buffer.fill_from(Stream::Stdout, &source, std::future::pending());
        tokio::pin!(flood, filling);
        // Both make progress until neither can: then a thousand polls change nothing.
        for _ in 0..1000 {
            let () = tokio::select! { biased; () = &mut flood => (), () = &mut filling => (), () = tokio::task::yield_now() => () };
        }
        let cost = buffer.lock().cost;
        assert!((BOUND..BOUND + READ_SIZE + CHUNK_COST).contains(&cost), "{cost}");
    }
}
