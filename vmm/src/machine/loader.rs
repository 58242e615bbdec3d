//! The thread that loads snapshots into a reserved machine.
//!
//! ```text
//!   control thread   ReserveMachine    LoadSnapshot ---+              +--> parked, claimed, running ...
//!   filter: Control        |                           |              |                |
//!                          v                           v              |                v
//!   loader           rehearses, waits               loads it ---------+              ends
//!   filter: Loader
//! ```
//!
//! It alone may set the state of a vCPU or of an interrupt controller, and it is gone when that is done: so nobody has to be confined
//! further between the load and the claim, which took 0.15 ms of a start that has no parked clone.

use std::fs::File;
use std::io;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;

use super::snapshot::{LoadRequest, Time};
use super::{Error, Machine, host};
use crate::memory::paged::Watcher;
use crate::snapshot::Snapshot;

/// Decoding recurses a few levels; no guest code runs on it.
const STACK_BYTES: usize = 256 << 10;

/// What a machine needs whose memory comes from a page server.
pub struct Paging {
    /// The userfaultfd device, if there is one for us.
    pub device: Option<File>,
    /// Who listens to the server.
    pub watcher: Watcher,
}

struct Job {
    machine: Arc<Machine>,
    request: LoadRequest,
    reply: Sender<Result<Time, Error>>,
}

/// The loader: its thread ends when this is dropped.
pub struct Loader {
    inbox: Sender<Job>,
}

impl Loader {
    /// Starts the thread, which first reads the state file `rehearsal`: then the code and the memory that a load takes are there
    /// before anybody waits for it. `confine` runs first in it.
    ///
    /// # Errors
    /// The thread cannot be made.
    pub fn spawn(
        paging: Option<Paging>,
        rehearsal: Vec<u8>,
        confine: impl FnOnce() -> io::Result<()> + Send + 'static,
    ) -> io::Result<Self> {
        let (inbox, jobs) = channel();
        let (ready, confined) = channel();
        thread::Builder::new()
            .name("loader".to_owned())
            .stack_size(STACK_BYTES)
            .spawn(move || {
                let outcome = confine();
                let failed = outcome.is_err();
                // What comes of it is what was put in.
                drop(Snapshot::decode(&rehearsal));
                drop(rehearsal);
                // Whoever waits for this waits until it is sent.
                let _ = ready.send(outcome);
                if !failed {
                    serve(&jobs, paging.as_ref());
                }
            })?;
        confined
            .recv()
            .unwrap_or_else(|_| Err(io::Error::other("the loader's thread ended before it began")))?;
        Ok(Self { inbox })
    }

    /// Loads a snapshot into a machine that has not run.
    ///
    /// # Errors
    /// As [`Machine::load`], or the thread is gone.
    pub fn load(&self, machine: &Arc<Machine>, request: LoadRequest) -> Result<Time, Error> {
        let (reply, answer) = channel();
        let machine = Arc::clone(machine);
        let job = Job {
            machine,
            request,
            reply,
        };
        let gone = || host("loading a snapshot")(io::Error::other("the loader's thread has ended"));
        self.inbox.send(job).map_err(|_| gone())?;
        answer.recv().unwrap_or_else(|_| Err(gone()))
    }
}

fn serve(jobs: &Receiver<Job>, paging: Option<&Paging>) {
    while let Ok(Job {
        machine,
        request,
        reply,
    }) = jobs.recv()
    {
        let loaded = machine.load(request, paging);
        drop(machine);
        // Nobody stops waiting for it.
        let _ = reply.send(loaded);
    }
}
