//! flintd, Flint's host agent: pods in microVMs on one host, behind a gRPC API.
//!
//! ```text
//!   daemon     flintd put together
//!    |
//!   api/       host API: sockets, TLS, limits, the four services
//!    |
//!   pods/      a state machine and a task for each pod; admission, validation, what a container runs
//!    |   \
//!    |   logs/   container output in files, followed without polling
//!    |   journal  every change: to the store first, then to the watchers
//!   probe/     what this host can do, measured
//!   backend    what pods need from below: sandboxes and images, as two traits; runtime/ has them over sandbox/ and the image store
//!    |
//!   sandbox/   microVMs: launch, guard, take over, end
//!    |   \   \
//!    |   \   network/  bridge, addresses, taps, rules
//!    |   cgroup, scratch   what bounds a sandbox
//!   saved      pods saved as they ran, on this host's disk; travel/ moves them to and from registries
//!   process    a VMM in its cgroup, named by pidfd
//! ```
//!
//! `README.md` in this crate follows one pod through these modules.

pub mod api;
pub mod backend;
pub mod cgroup;
pub mod daemon;
pub mod hook;
pub mod host;
pub mod logs;
pub mod metrics;
pub mod network;
pub mod pods;
pub mod probe;
pub mod process;
pub mod runtime;
pub mod sandbox;
pub mod saved;
pub mod scratch;
pub mod store;
pub mod timeline;
pub mod travel;

/// An error with all its causes, outermost first. A cause that its parent's message has already is left out.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let next = error.to_string();
        if !text.contains(&next) {
            text = format!("{text}: {next}");
        }
        cause = error.source();
    }
    text
}
