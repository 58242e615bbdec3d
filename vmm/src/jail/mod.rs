//! The jail: what is left to a VMM that its guest has taken over.
//!
//! ```text
//! launcher (root): open /dev/kvm --> setgid, setuid --> new user, mount, network, PID, IPC, UTS namespaces --> fork
//!                                                                                                       |
//!   exits 0 when the child is in place <---- pipe ---- child: empty root, no capabilities, no_new_privs,
//!                                                             Landlock (no paths, no TCP), seccomp --> serves
//! ```
//!
//! `namespaces` does the first part; `seccomp` has the list of calls of each kind of thread, `filter` makes programs of them.

mod filter;
mod namespaces;
pub mod seccomp;

use std::io;
use std::sync::Arc;

use landlock::{ABI, Access, AccessFs, AccessNet, Ruleset, RulesetAttr, Scope};
use thiserror::Error;

pub use self::namespaces::{Placed, enter};
use self::seccomp::{Filters, Kind};
use crate::virtio::ThreadHook;

/// A jail that cannot be built. The process must not go on.
#[derive(Debug, Error)]
pub enum Error {
    /// A step of it.
    #[error("building the jail: {what}")]
    Step {
        /// Which step.
        what: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
    /// Landlock.
    #[error("building the jail: Landlock")]
    Landlock(#[from] landlock::RulesetError),
}

/// Denies all paths, all TCP ports and all signals and abstract sockets of others, as far as the host's kernel knows how.
///
/// # Errors
/// The kernel refuses what it says it knows.
pub fn landlock() -> Result<(), Error> {
    let abi = ABI::V6;
    Ruleset::default()
        .handle_access(AccessFs::from_all(abi))?
        .handle_access(AccessNet::from_all(abi))?
        .scope(Scope::from_all(abi))?
        .create()?
        .restrict_self()?;
    Ok(())
}

/// Puts system call filters on threads; without a jail, none.
#[derive(Clone)]
pub struct Confine(Option<Arc<Filters>>);

impl Confine {
    /// No filters: for debugging.
    #[must_use]
    pub fn off() -> Self {
        Self(None)
    }

    /// Builds all filters, and confines the calling thread to what the making of a machine needs.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn on() -> Result<Self, Error> {
        let filters = Filters::default();
        filters.apply(Kind::Setup).map_err(|source| Error::Step {
            what: "confining the main thread",
            source,
        })?;
        Ok(Self(Some(Arc::new(filters))))
    }

    /// Confines the control thread further, once all other threads are there.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn control(&self) -> io::Result<()> {
        self.apply(Kind::Control)
    }

    /// What a vCPU's thread does first.
    pub fn vcpu(&self) -> impl FnOnce() -> io::Result<()> + Send + 'static {
        let confine = self.clone();
        move || confine.apply(Kind::Vcpu)
    }

    /// What the thread does first that loads snapshots.
    pub fn loader(&self) -> impl FnOnce() -> io::Result<()> + Send + 'static {
        let confine = self.clone();
        move || confine.apply(Kind::Loader)
    }

    /// What the thread does first that listens to a page server.
    pub fn watcher(&self) -> impl FnOnce() -> io::Result<()> + Send + 'static {
        let confine = self.clone();
        move || confine.apply(Kind::Watcher)
    }

    /// What a device's thread does first.
    #[must_use]
    pub fn device_hook(&self) -> ThreadHook {
        let confine = self.clone();
        Arc::new(move |kind| confine.apply(Kind::Device(kind)))
    }

    fn apply(&self, kind: Kind) -> io::Result<()> {
        self.0.as_ref().map_or(Ok(()), |filters| filters.apply(kind))
    }
}
