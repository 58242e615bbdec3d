//! flint-init: PID 1 of Flint's guests.
//!
//! ```text
//! kernel -> flint-init            boot::bring_up: modules, mounts, a tmpfs root
//!             | vsock 1024        server: the guest API (api/proto/flint/guest/v1)
//!             +-> flint-init container create|exec     short-lived, runs libcontainer
//!             |     +-> the container's first process  reparented to PID 1 when the helper ends
//!             +-> flint-init pause                     first process of a PID namespace that a pod shares
//! ```
//!
//! PID 1 itself is one thread that only waits for events: it forks nothing but itself, mounts nothing that a container
//! chose, and parses nothing that comes from an image. All of that happens in the helpers, whose end it survives.

mod boot;
mod cgroup;
mod container;
mod error_chain;
mod exec;
mod identity;
mod idle;
mod kernel_log;
mod materials;
mod output;
mod paths;
mod pid1;
mod reaper;
mod resources;
mod server;
mod stats;
mod storage;
mod stream_fd;
mod sys;
mod uevent;

use std::process::ExitCode;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match words.as_slice() {
        [_, "container", rest @ ..] => container::helper::main(rest),
        [_, "pause"] => container::pause::main(),
        _ if std::process::id() == 1 => pid1::main(),
        _ => {
            eprintln!("flint-init: is PID 1 of a Flint guest; it does nothing when it is started otherwise");
            ExitCode::from(2)
        }
    }
}
