//! Pipes and pseudo terminals, read and written without blocking.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use nix::{
    errno::Errno,
    fcntl::{FcntlArg, OFlag, fcntl},
    unistd,
};
use tokio::io::{Interest, unix::AsyncFd};

/// One end of a pipe, or the master of a pseudo terminal.
#[derive(Debug)]
pub struct StreamFd(AsyncFd<OwnedFd>);

/// What one attempt to read brought.
#[derive(Debug, PartialEq, Eq)]
pub enum Read {
    /// So many bytes.
    Bytes(usize),
    /// Nothing now.
    Empty,
    /// Nothing ever again: all writers are gone. A terminal says so with EIO.
    End,
}

impl Read {
    /// As [`StreamFd::read`] tells it.
    pub fn from_count(count: usize) -> Self {
        if count == 0 { Self::End } else { Self::Bytes(count) }
    }
}

impl StreamFd {
    /// For the end that is read from.
    pub fn reading(fd: OwnedFd) -> io::Result<Self> {
        Self::with(fd, Interest::READABLE)
    }

    /// For the end that is written to.
    pub fn writing(fd: OwnedFd) -> io::Result<Self> {
        Self::with(fd, Interest::WRITABLE)
    }

    fn with(fd: OwnedFd, interest: Interest) -> io::Result<Self> {
        let flags = OFlag::from_bits_truncate(fcntl(&fd, FcntlArg::F_GETFL)?);
        fcntl(&fd, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
        Ok(Self(crate::sys::async_fd(fd, interest)?))
    }

    /// Reads at least one byte; 0 says that there will be no more.
    pub async fn read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            let mut ready = self.0.readable().await?;
            match self.try_read(buffer)? {
                Read::Bytes(count) => return Ok(count),
                Read::End => return Ok(0),
                Read::Empty => ready.clear_ready(),
            }
        }
    }

    /// Reads what is there. Asks the kernel, not the cached readiness, so that what a process wrote before its end is seen
    /// after it; a terminal flushes its own queue on such a read.
    pub fn try_read(&self, buffer: &mut [u8]) -> io::Result<Read> {
        loop {
            return match unistd::read(&self.0, buffer) {
                Ok(0) | Err(Errno::EIO) => Ok(Read::End),
                Ok(count) => Ok(Read::Bytes(count)),
                Err(Errno::EAGAIN) => Ok(Read::Empty),
                Err(Errno::EINTR) => continue,
                Err(error) => Err(error.into()),
            };
        }
    }

    /// Writes all of `data`, waiting for the reader.
    pub async fn write_all(&self, mut data: &[u8]) -> io::Result<()> {
        while !data.is_empty() {
            let mut ready = self.0.writable().await?;
            match unistd::write(&self.0, data) {
                Ok(count) => data = data.get(count..).unwrap_or_default(),
                Err(Errno::EAGAIN) => ready.clear_ready(),
                Err(Errno::EINTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }
}

impl AsFd for StreamFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.get_ref().as_fd()
    }
}

#[cfg(test)]
mod tests {
    use nix::unistd::pipe2;

    use super::*;

    #[tokio::test]
    async fn bytes_come_through_and_the_end_is_seen() {
        let (reader, writer) = pipe2(OFlag::O_CLOEXEC).unwrap();
        let (reader, writer) = (StreamFd::reading(reader).unwrap(), StreamFd::writing(writer).unwrap());
        let mut buffer = [0; 16];
        assert_eq!(reader.try_read(&mut buffer).unwrap(), Read::Empty);
        writer.write_all(b"hello").await.unwrap();
        assert_eq!(reader.read(&mut buffer).await.unwrap(), 5);
        drop(writer);
        assert_eq!(reader.read(&mut buffer).await.unwrap(), 0);
    }

    #[tokio::test]
    async fn a_write_larger_than_the_pipe_waits_for_its_reader() {
        let (reader, writer) = pipe2(OFlag::O_CLOEXEC).unwrap();
        let (reader, writer) = (StreamFd::reading(reader).unwrap(), StreamFd::writing(writer).unwrap());
        let data = vec![7_u8; 300_000];
        let reading = async {
            let mut seen = 0;
            let mut buffer = [0; 4096];
            while seen < 300_000 {
                seen += reader.read(&mut buffer).await.unwrap();
            }
        };
        let (written, ()) = tokio::join!(writer.write_all(&data), reading);
        written.unwrap();
    }

    #[tokio::test]
    async fn a_terminal_whose_program_ended_reads_as_ended() {
        let pty = nix::pty::openpty(None, None).unwrap();
        let master = StreamFd::reading(pty.master).unwrap();
        unistd::write(&pty.slave, b"bye").unwrap();
        drop(pty.slave);
        let mut buffer = [0; 16];
        assert_eq!(master.read(&mut buffer).await.unwrap(), 3);
        assert_eq!(master.read(&mut buffer).await.unwrap(), 0);
    }
}
