//! What a helper, and the container process that it leaves behind, tell PID 1: one JSON object a line, on a pipe.
//!
//! ```text
//! create:  created | failed        then, after start:  exec_failed | (end of file: the program runs)
//! exec:    exec_failed?, created | failed
//! ```
//!
//! The pipe is close-on-exec in the container's process: its end says that the program has been executed.

use std::{fs::File, io::Write, os::fd::OwnedFd};

use nix::unistd;
use serde::{Deserialize, Serialize};

use crate::{stream_fd::StreamFd, sys};

/// A report cannot be longer: messages hold paths, and paths have PATH_MAX.
const MAX_REPORT: usize = 64 << 10;

/// One line.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Report {
    /// The container's or exec's process exists.
    Created {
        /// In the guest's PID namespace.
        pid: i32,
    },
    /// It could not be made.
    Failed {
        /// Says what and why.
        message: String,
    },
    /// It was made, but the program could not be executed.
    ExecFailed {
        /// As shells have it: 126 or 127.
        code: u8,
        /// Says what and why.
        message: String,
    },
}

impl Report {
    /// Code and text of a program that could not be executed.
    pub fn exec_failed(self) -> Option<(u8, String)> {
        match self {
            Self::ExecFailed { code, message } => Some((code, message)),
            Self::Created { .. } | Self::Failed { .. } => None,
        }
    }
}

/// Writes a report by descriptor number, in a helper or in the process that libcontainer forked from it.
pub fn send(number: i32, report: &Report) -> std::io::Result<()> {
    let fd = sys::borrowed_fd(number).ok_or_else(|| std::io::Error::from(std::io::ErrorKind::InvalidInput))?;
    let mut line = serde_json::to_vec(report)?;
    line.push(b'\n');
    let mut rest = line.as_slice();
    while !rest.is_empty() {
        rest = rest.get(unistd::write(fd, rest)?..).unwrap_or_default();
    }
    Ok(())
}

/// As [`send`], for the owner of the descriptor.
pub fn send_to(fd: &OwnedFd, report: &Report) -> std::io::Result<()> {
    let mut line = serde_json::to_vec(report)?;
    line.push(b'\n');
    File::from(fd.try_clone()?).write_all(&line)
}

/// PID 1's end of the pipe.
#[derive(Debug)]
pub struct Reports {
    pipe: StreamFd,
    pending: Vec<u8>,
}

impl Reports {
    /// Reads from `pipe`.
    pub fn new(pipe: StreamFd) -> Self {
        Self {
            pipe,
            pending: Vec::new(),
        }
    }

    /// The next report; `None` when all writers are gone, or what came is none.
    pub async fn next(&mut self) -> Option<Report> {
        loop {
            if let Some(end) = self.pending.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.pending.drain(..=end).collect();
                return serde_json::from_slice(&line).ok();
            }
            if self.pending.len() > MAX_REPORT {
                return None;
            }
            let mut buffer = [0; 512];
            match self.pipe.read(&mut buffer).await {
                Ok(0) | Err(_) => return None,
                Ok(count) => self.pending.extend_from_slice(buffer.get(..count).unwrap_or_default()),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use nix::{fcntl::OFlag, unistd::pipe2};

    use super::*;

    #[tokio::test]
    async fn reports_come_one_by_one_and_then_the_end() {
        let (reader, writer) = pipe2(OFlag::O_CLOEXEC).unwrap();
        let failed = Report::ExecFailed {
            code: 127,
            message: "exec /bin/nope: \"none\"\n".into(),
        };
        send_to(&writer, &Report::Created { pid: 12 }).unwrap();
        send_to(&writer, &failed).unwrap();
        drop(writer);
        let mut reports = Reports::new(StreamFd::reading(reader).unwrap());
        assert_eq!(reports.next().await, Some(Report::Created { pid: 12 }));
        assert_eq!(reports.next().await, Some(failed));
        assert_eq!(reports.next().await, None);
    }

    #[tokio::test]
    async fn garbage_and_endless_lines_are_an_end() {
        let (reader, writer) = pipe2(OFlag::O_CLOEXEC).unwrap();
        File::from(writer).write_all(b"garbage\n").unwrap();
        assert_eq!(Reports::new(StreamFd::reading(reader).unwrap()).next().await, None);

        let (reader, writer) = pipe2(OFlag::O_CLOEXEC).unwrap();
        let writer = StreamFd::writing(writer).unwrap();
        let mut reports = Reports::new(StreamFd::reading(reader).unwrap());
        let endless = vec![b'x'; 8 * MAX_REPORT];
        tokio::select! {
            _ = writer.write_all(&endless) => panic!("nobody reads so much"),
            report = reports.next() => assert_eq!(report, None),
        }
    }
}
