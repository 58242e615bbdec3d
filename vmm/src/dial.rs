//! Streams that the guest opens towards the host: from the vsock device's thread to the control thread.
//!
//! At most [`PENDING`] wait for flintd to connect; further ones are refused, so a guest cannot fill the host with them.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::virtio::vsock;

/// Most streams that wait.
pub const PENDING: usize = 16;

/// A stream that the guest opened to (CID 2, `port`).
#[derive(Debug)]
pub struct Dialled {
    /// Port on the host's side.
    pub port: u32,
    /// The host's end: a connected unix stream socket.
    pub stream: OwnedFd,
}

/// The device's end.
#[derive(Clone)]
pub struct Dialer {
    queue: SyncSender<Dialled>,
    wake: Arc<EventFd>,
}

/// The control thread's end.
pub struct Dials {
    queue: Receiver<Dialled>,
    wake: Arc<EventFd>,
}

/// Both ends.
///
/// # Errors
/// The process is out of file descriptors.
pub fn channel() -> io::Result<(Dialer, Dials)> {
    let wake = Arc::new(EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)?);
    let (sender, receiver) = sync_channel(PENDING);
    Ok((
        Dialer {
            queue: sender,
            wake: wake.clone(),
        },
        Dials { queue: receiver, wake },
    ))
}

impl Dialer {
    /// Hands a stream over.
    ///
    /// # Errors
    /// Too many wait: the stream comes back.
    pub fn dial(&self, dialled: Dialled) -> Result<(), Dialled> {
        self.queue.try_send(dialled).map_err(|error| match error {
            std::sync::mpsc::TrySendError::Full(dialled) | std::sync::mpsc::TrySendError::Disconnected(dialled) => {
                dialled
            }
        })?;
        // The only failure of a non-blocking eventfd is a full counter, and then it is readable all the same.
        let _ = self.wake.write(1);
        Ok(())
    }
}

impl vsock::Dialer for Dialer {
    fn dial(&mut self, dial: vsock::Dial) -> io::Result<()> {
        let vsock::Dial { port, fd: stream } = dial;
        // What comes back is closed here, by which the guest's end learns that nobody took it.
        Self::dial(self, Dialled { port, stream }).map_err(|_| io::ErrorKind::ConnectionRefused.into())
    }
}

impl Dials {
    /// The next stream, if one waits.
    #[must_use]
    pub fn next(&self) -> Option<Dialled> {
        self.queue.try_recv().ok()
    }

    /// Makes the descriptor unreadable until the next stream comes.
    pub fn clear(&self) {
        // The only failure of a non-blocking eventfd is that it is clear already.
        let _ = self.wake.read();
    }
}

impl AsFd for Dials {
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the descriptor belongs to the eventfd in `self`, which outlives the borrow.
        unsafe { BorrowedFd::borrow_raw(self.wake.as_raw_fd()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixStream;

    #[test]
    fn a_guest_cannot_pile_up_streams() {
        let (dialer, dials) = channel().unwrap();
        let stream = || OwnedFd::from(UnixStream::pair().unwrap().0);
        for port in 0..16 {
            dialer.dial(Dialled { port, stream: stream() }).unwrap();
        }
        assert!(
            dialer
                .dial(Dialled {
                    port: 99,
                    stream: stream()
                })
                .is_err()
        );
        assert_eq!(dials.next().unwrap().port, 0);
        dialer
            .dial(Dialled {
                port: 100,
                stream: stream(),
            })
            .unwrap();
    }
}
