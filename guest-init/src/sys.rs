//! The system calls that nix has no safe form of. All of flint-init's `unsafe` is here.

use std::{
    io,
    os::{
        fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
        unix::process::ExitStatusExt,
    },
    process::ExitStatus,
};

use nix::errno::Errno;
use tokio::io::{Interest, unix::AsyncFd};

/// Takes one ended child, if there is one. nix's `waitpid` loses an exit by a real-time signal, which its `Signal` cannot say.
pub fn wait_any() -> Option<(i32, ExitStatus)> {
    let mut status = 0;
    // SAFETY: `status` is a valid place for an int; waitpid keeps no reference to it.
    let pid = unsafe { libc::waitpid(-1, &raw mut status, libc::WNOHANG) };
    (pid > 0).then(|| (pid, ExitStatus::from_raw(status)))
}

/// kill(2) with any signal number, real-time ones too.
pub fn kill(pid: i32, signal: i32) -> io::Result<()> {
    // SAFETY: kill touches no memory of ours.
    Errno::result(unsafe { libc::kill(pid, signal) })?;
    Ok(())
}

/// Mixes `seed` into the kernel's pool and credits it (RNDADDENTROPY), then has the CRNG take it up at once
/// (RNDRESEEDCRNG); see random(4).
pub fn add_entropy(random: BorrowedFd<'_>, seed: &[u8]) -> io::Result<()> {
    // struct rand_pool_info { int entropy_count; int buf_size; __u32 buf[]; }
    const RNDADDENTROPY: libc::c_ulong = 0x4008_5203;
    const RNDRESEEDCRNG: libc::c_ulong = 0x5207;
    let too_long = |_| io::Error::new(io::ErrorKind::InvalidInput, "more entropy than one call takes");
    let bytes = i32::try_from(seed.len()).map_err(too_long)?;
    let bits = bytes
        .checked_mul(8)
        .ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?;
    let mut request = Vec::with_capacity(8 + seed.len());
    request.extend_from_slice(&bits.to_ne_bytes());
    request.extend_from_slice(&bytes.to_ne_bytes());
    request.extend_from_slice(seed);
    // SAFETY: the kernel reads the two ints and `buf_size` bytes after them, which is exactly `request`.
    Errno::result(unsafe { libc::ioctl(random.as_raw_fd(), RNDADDENTROPY, request.as_ptr()) })?;
    // SAFETY: takes no argument.
    Errno::result(unsafe { libc::ioctl(random.as_raw_fd(), RNDRESEEDCRNG, 0) })?;
    Ok(())
}

/// Sets a terminal's window size (TIOCSWINSZ); the foreground process group gets SIGWINCH.
pub fn set_window_size(terminal: BorrowedFd<'_>, rows: u16, columns: u16) -> io::Result<()> {
    let size = libc::winsize {
        ws_row: rows,
        ws_col: columns,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    // SAFETY: the kernel reads one winsize from the pointer, which is valid for the call.
    Errno::result(unsafe { libc::ioctl(terminal.as_raw_fd(), libc::TIOCSWINSZ, &raw const size) })?;
    Ok(())
}

/// Takes ownership of a descriptor that this process inherited under a number given on its command line.
///
/// Refused below 3 and for numbers that are not open, so that a wrong command line cannot close somebody else's.
pub fn inherited_fd(number: RawFd) -> io::Result<OwnedFd> {
    if number < 3 {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "a standard stream is not an inherited descriptor",
        ));
    }
    // SAFETY: F_GETFD touches no memory; it only says whether the number is open.
    Errno::result(unsafe { libc::fcntl(number, libc::F_GETFD) })?;
    // SAFETY: it is open, and the helper is called once at its start for each number, when nothing else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

/// Takes ownership of a descriptor that has just come by SCM_RIGHTS.
pub fn received_fd(number: RawFd) -> io::Result<OwnedFd> {
    if number < 0 {
        return Err(io::Error::from(io::ErrorKind::InvalidInput));
    }
    // SAFETY: the kernel made this descriptor for this process with the message; nobody else knows its number.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

/// Registers a descriptor with the event loop.
pub fn async_fd(fd: OwnedFd, interest: Interest) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an OwnedFd gives the same number each time, and keeps it open until the AsyncFd that owns it is dropped.
    Ok(unsafe { AsyncFd::register_with_interest(fd, interest) }?)
}

/// A borrowed descriptor by number.
///
/// Used in the forked child that libcontainer calls back, where the owner lives in the same process image's copy.
pub fn borrowed_fd<'a>(number: RawFd) -> Option<BorrowedFd<'a>> {
    if number < 0 {
        return None;
    }
    // SAFETY: the number is not -1, which is all that the type demands of its value; the callers use it only while the
    // owner, which outlives the container's set-up, is alive.
    Some(unsafe { BorrowedFd::borrow_raw(number) })
}

/// Undoes what Rust's start-up and libcontainer did to signals: SIGPIPE ends a program again, nothing is blocked.
pub fn reset_signals() {
    // SAFETY: called in a single-threaded child right before exec; the set is initialised by sigemptyset.
    unsafe {
        libc::signal(libc::SIGPIPE, libc::SIG_DFL);
        let mut none: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut none);
        libc::sigprocmask(libc::SIG_SETMASK, &raw const none, std::ptr::null_mut());
    }
}

/// fork(2) for a process that has one thread; `None` in the child.
pub fn fork_single_threaded() -> io::Result<Option<i32>> {
    // SAFETY: the callers are helper processes that have started no thread, so the child finds every lock free.
    let pid = Errno::result(unsafe { libc::fork() })?;
    Ok((pid != 0).then_some(pid))
}

/// unshare(CLONE_NEWPID): the next child is the first process of a new PID namespace.
pub fn unshare_pid_namespace() -> io::Result<()> {
    // SAFETY: unshare touches no memory.
    Errno::result(unsafe { libc::unshare(libc::CLONE_NEWPID) })?;
    Ok(())
}

/// unshare(CLONE_NEWNET): this thread, and what it starts, get a network of their own.
#[cfg(test)]
pub fn unshare_network() -> io::Result<()> {
    // SAFETY: unshare touches no memory.
    Errno::result(unsafe { libc::unshare(libc::CLONE_NEWNET) })?;
    Ok(())
}

/// Asks the kernel to reap this process's children by itself.
pub fn ignore_children() {
    // SAFETY: SIG_IGN is a valid disposition of SIGCHLD (POSIX: children are then not turned into zombies).
    unsafe { libc::signal(libc::SIGCHLD, libc::SIG_IGN) };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn standard_streams_and_closed_numbers_are_not_inherited() {
        assert!(inherited_fd(1).is_err());
        assert!(inherited_fd(-1).is_err());
        assert!(inherited_fd(9999).is_err());
    }

    #[test]
    fn a_signal_to_nobody_is_an_error() {
        assert!(kill(i32::MAX, 0).is_err());
    }
}
