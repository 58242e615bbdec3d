//! What the kernel says of things of which it makes no event: its log, record by record (Linux'
//! Documentation/ABI/testing/dev-kmsg).
//!
//! ```text
//!   6,513,9021377,-;vda: detected capacity change from 0 to 8192
//!   |                `-- the text; below it may be lines " KEY=value"
//!   `-- facility << 3 | level. Facility 0 is the kernel's own; what is written to /dev/kmsg gets another one
//! ```

use std::{
    fs::{File, OpenOptions},
    io::{self, Read, Seek, SeekFrom},
    os::{fd::OwnedFd, unix::fs::OpenOptionsExt},
};

use tokio::io::{Interest, unix::AsyncFd};

use crate::uevent::Seen;

/// The longest record (Linux' PRINTK_MESSAGE_MAX is 2048), with room.
const MOST: usize = 8192;
const LEVELS: u32 = 8;

/// The kernel's log from the time on that this was made.
#[derive(Debug)]
pub struct KernelLog(AsyncFd<OwnedFd>);

impl KernelLog {
    /// Begins to listen.
    pub fn listen() -> io::Result<Self> {
        let mut log = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_NONBLOCK)
            .open("/dev/kmsg")?;
        log.seek(SeekFrom::End(0))?;
        crate::sys::async_fd(log.into(), Interest::READABLE).map(Self)
    }

    /// Waits until the kernel says something with these words in it, or for the loss of records.
    pub async fn wait_for(&self, words: &str) -> io::Result<Seen> {
        let mut reader = File::from(self.0.get_ref().try_clone()?);
        let mut record = vec![0; MOST];
        loop {
            let mut ready = self.0.readable().await?;
            match reader.read(&mut record) {
                Ok(length) if says(record.get(..length).unwrap_or_default(), words) => return Ok(Seen::Event),
                Ok(_) => {}
                Err(error) => match error.raw_os_error() {
                    Some(libc::EAGAIN) => ready.clear_ready(),
                    Some(libc::EINTR) => {}
                    // Records were overwritten before they were read.
                    Some(libc::EPIPE) => return Ok(Seen::Loss),
                    _ => return Err(error),
                },
            }
        }
    }
}

/// Whether a record is the kernel's own and has these words.
fn says(record: &[u8], words: &str) -> bool {
    let record = String::from_utf8_lossy(record);
    let Some((prefix, rest)) = record.split_once(';') else {
        return false;
    };
    let text = rest.lines().next().unwrap_or_default();
    let priority = prefix.split(',').next().and_then(|field| field.parse::<u32>().ok());
    priority.is_some_and(|priority| priority < LEVELS) && text.contains(words)
}

#[cfg(test)]
mod tests {
    use super::*;

    const WORDS: &str = "detected capacity change";

    #[test]
    fn the_kernels_words_are_found_in_its_text() {
        let said = b"6,513,9021377,-;vda: detected capacity change from 0 to 8192\n SUBSYSTEM=block\n";
        assert!(says(said, WORDS));
        let before =
            b"5,512,9021340,-;virtio_blk virtio3: [vda] new size: 8192 512-byte logical blocks (4.19 MB/4.00 MiB)\n";
        assert!(!says(before, WORDS), "this comes before the capacity is set");
    }

    #[test]
    fn what_a_program_writes_into_the_log_is_not_the_kernels_word() {
        assert!(!says(b"14,513,9021377,-;detected capacity change\n", WORDS));
        assert!(!says(b"6,513,9021377,-;else\n KEY=detected capacity change\n", WORDS));
        assert!(!says(b"detected capacity change\n", WORDS));
        assert!(!says(b"", WORDS));
    }
}
