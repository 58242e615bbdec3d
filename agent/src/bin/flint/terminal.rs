//! The user's terminal: raw while a program in a pod owns it, as it was afterwards.

use std::io::{self, IsTerminal};
use std::os::fd::AsFd;

use flint_api::host::TerminalSize;
use nix::sys::termios::{self, SetArg, Termios};

use crate::failure::Failure;

/// Raw mode for as long as it lives.
#[derive(Debug)]
pub struct RawMode {
    before: Termios,
}

impl RawMode {
    /// Makes standard input raw; it must be a terminal.
    pub fn enter() -> Result<Self, Failure> {
        let stdin = io::stdin();
        if !stdin.is_terminal() {
            return Err(Failure::new("standard input is no terminal").hint("leave -t out, or run it in a terminal"));
        }
        let read = |error| Failure::local("set the terminal up", io::Error::from(error));
        let before = termios::tcgetattr(stdin.as_fd()).map_err(read)?;
        let mut raw = before.clone();
        termios::cfmakeraw(&mut raw);
        termios::tcsetattr(stdin.as_fd(), SetArg::TCSANOW, &raw).map_err(read)?;
        Ok(Self { before })
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        // Nothing is left to be done for a terminal that is gone.
        let _ = termios::tcsetattr(io::stdin().as_fd(), SetArg::TCSANOW, &self.before);
    }
}

/// The terminal's size now, if there is one.
pub fn size() -> Option<TerminalSize> {
    let mut size = libc::winsize {
        ws_row: 0,
        ws_col: 0,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    // SAFETY: TIOCGWINSZ writes one winsize to the pointer, which is valid for writes and lives past the call.
    let result = unsafe { libc::ioctl(libc::STDIN_FILENO, libc::TIOCGWINSZ, &raw mut size) };
    (result == 0).then(|| TerminalSize {
        rows: size.ws_row.into(),
        columns: size.ws_col.into(),
    })
}
