//! The first process of a PID namespace that a pod's containers share.
//!
//! It keeps the namespace alive and has the kernel reap the orphans in it. Containers share this namespace rather than the
//! guest's own, so that they cannot see flint-init.

use std::process::ExitCode;

use crate::sys;

/// Makes the namespace, prints the pid of its first process and leaves it behind.
pub fn main() -> ExitCode {
    if let Err(error) = sys::unshare_pid_namespace() {
        eprintln!("flint-init pause: new PID namespace: {error}");
        return ExitCode::FAILURE;
    }
    match sys::fork_single_threaded() {
        Ok(Some(pid)) => {
            println!("{pid}");
            ExitCode::SUCCESS
        }
        Ok(None) => wait_forever(),
        Err(error) => {
            eprintln!("flint-init pause: fork: {error}");
            ExitCode::FAILURE
        }
    }
}

fn wait_forever() -> ExitCode {
    sys::ignore_children();
    // The report pipe is its parent's: holding it open would keep PID 1 waiting for its end.
    if let Ok(null) = std::fs::File::open("/dev/null") {
        let _ = nix::unistd::dup2_stdout(&null);
        let _ = nix::unistd::dup2_stdin(&null);
    }
    loop {
        nix::unistd::pause();
    }
}
