//! Why a sandbox ends: the one place that decides and documents it.
//!
//! | reason         | what happened in the machine                                                     | process exit code |
//! |----------------|----------------------------------------------------------------------------------|-------------------|
//! | `POWEROFF`     | the guest wrote sleep type S5 with SLP_EN to the ACPI sleep control register     | 65 |
//! | `RESET`        | the guest wrote to the ACPI reset register or sent 0xfe to the keyboard controller | 66 |
//! | `TRIPLE_FAULT` | KVM_EXIT_SHUTDOWN: a fault while delivering a double fault                       | 67 |
//! | `PANIC`        | the guest wrote bit 0 to the pvpanic port                                        | 68 |
//! | `KVM_ERROR`    | KVM_RUN failed, or KVM_EXIT_INTERNAL_ERROR, FAIL_ENTRY, or an exit nobody asked for | 69 |
//! | `VMM_ERROR`    | a thread of the VMM ended that must not, or the control loop failed              | 70 |
//! | `STOPPED`      | `Stop` came over the control connection                                          | 71 |
//! | `MEMORY_LOST`  | KVM_RUN gave EFAULT, or a thread of the VMM got SIGBUS: a page cannot be had any more; or the page server said so, or has gone | 74 |
//!
//! `SECCOMP` and `KILLED` are seen from outside only. The first reason wins: a guest that panics and then reboots has
//! panicked. A guest that halts (HLT with interrupts off) has not ended: it sleeps inside KVM until it is stopped.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::sync::{Arc, OnceLock};

use flint_api::vmm::{EXIT_CODE_BASE, ExitReason, Exited};
use prost::Message;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};
use vmm_sys_util::signal::register_signal_handler;

/// The end of a sandbox.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Exit {
    /// Why.
    pub reason: ExitReason,
    /// More of it, for people.
    pub detail: String,
}

impl Exit {
    /// An end with its reason and a sentence for people.
    pub fn new(reason: ExitReason, detail: impl Into<String>) -> Self {
        Self {
            reason,
            detail: detail.into(),
        }
    }

    /// What the process exits with.
    #[must_use]
    pub fn code(&self) -> i32 {
        EXIT_CODE_BASE + self.reason as i32
    }

    /// As it goes over the wire and into the exit file.
    #[must_use]
    pub fn to_message(&self) -> Exited {
        Exited {
            reason: self.reason.into(),
            detail: self.detail.clone(),
        }
    }
}

/// Where any thread says that the sandbox has ended. The first one is heard; the control thread is woken by an eventfd.
#[derive(Clone)]
pub struct ExitLatch {
    inner: Arc<Inner>,
}

struct Inner {
    exit: OnceLock<Exit>,
    wake: EventFd,
}

impl ExitLatch {
    /// A latch that nobody has set.
    ///
    /// # Errors
    /// The process is out of file descriptors.
    pub fn new() -> io::Result<Self> {
        let inner = Inner {
            exit: OnceLock::new(),
            wake: EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)?,
        };
        Ok(Self { inner: Arc::new(inner) })
    }

    /// Ends the sandbox, unless it has ended already.
    pub fn set(&self, exit: Exit) {
        if self.inner.exit.set(exit).is_ok() {
            // The only failure of a non-blocking eventfd is a full counter, and then it is readable all the same.
            let _ = self.inner.wake.write(1);
        }
    }

    /// The end, if it has come.
    #[must_use]
    pub fn get(&self) -> Option<&Exit> {
        self.inner.exit.get()
    }

    /// Becomes readable when the end has come.
    #[must_use]
    pub fn wake_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the descriptor belongs to the eventfd in `self`, which outlives the borrow.
        unsafe { BorrowedFd::borrow_raw(self.inner.wake.as_raw_fd()) }
    }
}

impl AsFd for ExitLatch {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.wake_fd()
    }
}

/// What a thread leaves that finds guest memory gone: no lock may be taken then, and nothing be allocated.
struct LastWords {
    exit_file: RawFd,
    message: Vec<u8>,
    code: i32,
}

static LAST_WORDS: OnceLock<LastWords> = OnceLock::new();

/// Makes SIGBUS, which a thread gets that touches a page of a mapped file that is not there any more, end the process with a
/// word in the exit file. Once for the process, before its threads are made. The descriptor must stay open.
///
/// # Errors
/// The signal cannot be handled.
pub fn on_lost_memory(exit_file: BorrowedFd<'_>) -> io::Result<()> {
    extern "C" fn end(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
        let code = LAST_WORDS.get().map_or(libc::SIGBUS, |words| {
            // SAFETY: the buffer is a whole vector that nobody changes; write(2) may be called in a signal handler.
            unsafe { libc::write(words.exit_file, words.message.as_ptr().cast(), words.message.len()) };
            words.code
        });
        // SAFETY: may be called in a signal handler, and does not return.
        unsafe { libc::_exit(code) };
    }
    let exit = Exit::new(ExitReason::MemoryLost, LOST);
    let words = LastWords {
        exit_file: exit_file.as_raw_fd(),
        message: exit.to_message().encode_to_vec(),
        code: exit.code(),
    };
    // Set already: by an earlier call, with the same words.
    let _ = LAST_WORDS.set(words);
    register_signal_handler(libc::SIGBUS, end).map_err(Into::into)
}

/// Ends the process then and there, with its last word in the exit file: for a thread that cannot wait for the control thread,
/// which may be waiting for what has just been found lost.
pub fn end_now(exit: &Exit) -> ! {
    let message = exit.to_message().encode_to_vec();
    if let Some(words) = LAST_WORDS.get() {
        // SAFETY: the buffer is a whole vector.
        unsafe { libc::write(words.exit_file, message.as_ptr().cast(), message.len()) };
    }
    // SAFETY: does not return; what other threads are in the middle of ends with the process.
    unsafe { libc::_exit(exit.code()) };
}

/// What people read of lost memory.
pub const LOST: &str =
    "a page of guest memory cannot be had any more: was its memory file cut off, or does its disk fail?";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_reason_wins() {
        let latch = ExitLatch::new().unwrap();
        assert_eq!(latch.get(), None);
        latch.set(Exit::new(ExitReason::Panic, "first"));
        latch.set(Exit::new(ExitReason::Reset, "second"));
        assert_eq!(latch.get(), Some(&Exit::new(ExitReason::Panic, "first")));
    }

    #[test]
    fn every_reason_has_an_exit_code_of_its_own() {
        let code = |reason| Exit::new(reason, "").code();
        assert_eq!(code(ExitReason::Poweroff), 65);
        assert_eq!(code(ExitReason::Stopped), 71);
    }
}
