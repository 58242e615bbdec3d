//! The descriptors that a program was started with: each is taken once, and what nobody named is closed.

use std::os::fd::{FromRawFd, OwnedFd, RawFd};

use thiserror::Error;

/// A number that is no descriptor to be taken.
#[derive(Debug, Error)]
#[error("--{name} {fd}: not an open file descriptor of this process above 2, or named twice")]
pub struct NotOpen {
    name: &'static str,
    fd: RawFd,
}

/// Takes descriptors by the options that named them, in that order, and closes all others above standard error.
///
/// # Safety
/// The process has opened nothing above standard error yet, and nobody else takes any.
///
/// # Errors
/// One is not open, or named twice: nothing is taken or closed then.
pub unsafe fn take<const COUNT: usize>(named: [(&'static str, RawFd); COUNT]) -> Result<[OwnedFd; COUNT], NotOpen> {
    // SAFETY: the caller vouches for it.
    let (taken, _) = unsafe { take_with(named, "", &[]) }?;
    Ok(taken)
}

/// As [`take`], with any number of descriptors that `more` named.
///
/// # Safety
/// As there.
///
/// # Errors
/// As there.
pub unsafe fn take_with<const COUNT: usize>(
    named: [(&'static str, RawFd); COUNT],
    more: &'static str,
    rest: &[RawFd],
) -> Result<([OwnedFd; COUNT], Vec<OwnedFd>), NotOpen> {
    let mut seen = Vec::with_capacity(named.len() + rest.len());
    for (name, fd) in named.into_iter().chain(rest.iter().map(|fd| (more, *fd))) {
        // SAFETY: F_GETFD only asks.
        if fd <= 2 || seen.contains(&fd) || unsafe { libc::fcntl(fd, libc::F_GETFD) } < 0 {
            return Err(NotOpen { name, fd });
        }
        seen.push(fd);
    }
    seen.sort_unstable();
    let mut first = 3;
    for fd in seen.into_iter().chain([RawFd::MAX]) {
        if first < fd {
            // SAFETY: the caller vouches for it that nobody owns these. The last number is never open.
            unsafe { libc::syscall(libc::SYS_close_range, first, fd - 1, 0) };
        }
        first = fd.saturating_add(1);
    }
    // SAFETY: each is open, different from the others, and by the caller's word nobody else's.
    let own = |fd: RawFd| unsafe { OwnedFd::from_raw_fd(fd) };
    Ok((named.map(|(_, fd)| own(fd)), rest.iter().map(|fd| own(*fd)).collect()))
}
