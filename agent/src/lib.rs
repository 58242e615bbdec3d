//! flintd, Flint's host agent: pods in microVMs on one host, behind a gRPC API.
//!
//! ```text
//!   api/       host API: sockets, TLS, limits, the four services
//!    |
//!   pods/      a state machine and a task for each pod; admission, validation, what a container runs
//!    |   \
//!    |   logs/   container output in files, followed without polling
//!    |   journal  every change: to the store first, then to the watchers
//!   probe/     what this host can do, measured
//!   backend    what pods need from below: sandboxes and images, as two traits
//! ```
//!
//! `README.md` in this crate follows one pod through these modules.

pub mod probe;
pub mod timeline;
