//! Carries a container's output from the guest into its log, and to those who are attached.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use flint_api::{guest, host::OutputStream};
use tokio::{sync::broadcast, task::spawn_blocking};
use tonic::Status;
use tracing::warn;

use crate::{
    backend::Sandbox,
    logs::{Logs, RunWriter},
    metrics::Metrics,
};

/// Chunks kept for attached clients that are slower than the container.
const ATTACH_BACKLOG: usize = 256;
/// Between two tries to reach a guest that should be there.
const RETRY: Duration = Duration::from_secs(1);

/// A piece of output for attached clients.
#[derive(Clone, Debug)]
pub struct Piece {
    /// Which of the two.
    pub stream: OutputStream,
    /// The bytes; shared by all clients.
    pub data: Arc<[u8]>,
}

/// Sends a container's output to whoever is attached.
pub type Attached = broadcast::Sender<Piece>;

/// A sender that nobody listens to yet.
pub fn attached() -> Attached {
    broadcast::Sender::new(ATTACH_BACKLOG)
}

/// One run's output on its way.
pub(super) struct Pump {
    pub(super) sandbox: Arc<dyn Sandbox>,
    pub(super) logs: Arc<Logs>,
    pub(super) metrics: Arc<Metrics>,
    pub(super) uid: String,
    pub(super) container: String,
    pub(super) guest_id: String,
    pub(super) attached: Attached,
}

impl Pump {
    /// Runs until the output is over or the sandbox is gone. `first` is called at the first byte.
    pub(super) async fn run(self, writer: RunWriter, first: impl FnOnce()) {
        let writer = Arc::new(Mutex::new(writer));
        let mut first = Some(first);
        loop {
            match self.stream(&writer, &mut first).await {
                Ok(true) => {}
                Ok(false) => return,
                Err(status) => {
                    // The guest may have been restored or be busy; its end is told by the sandbox.
                    tokio::select! {
                        _ = self.sandbox.exited() => return,
                        () = tokio::time::sleep(RETRY) => {}
                    }
                    let (uid, container) = (&self.uid, &self.container);
                    warn!(uid, container, %status, "reading output failed, trying again");
                }
            }
        }
    }

    /// Reads one stream to its end; false when it brought nothing, which says that the output is over.
    async fn stream(&self, writer: &Shared, first: &mut Option<impl FnOnce()>) -> Result<bool, Status> {
        let request = guest::ReadOutputRequest {
            container_id: self.guest_id.clone(),
            from_offset: lock(writer).offset(),
        };
        let mut stream = self.sandbox.guest().read_output(request).await?.into_inner();
        let mut any = false;
        while let Some(chunk) = stream.message().await? {
            any = true;
            let stream = match chunk.stream() {
                guest::output_chunk::Stream::Stderr => OutputStream::Stderr,
                guest::output_chunk::Stream::Stdout | guest::output_chunk::Stream::Unspecified => OutputStream::Stdout,
            };
            let data: Arc<[u8]> = chunk.data.into();
            self.write(writer, chunk.offset, chunk.time_ns, stream, data.clone())
                .await?;
            if let Some(first) = first.take() {
                first();
            }
            // Nobody may be attached.
            let _ = self.attached.send(Piece { stream, data });
        }
        Ok(any)
    }

    /// Appends a chunk. A disk that does not take it holds the container up rather than lose it: the guest keeps what was
    /// not acknowledged.
    async fn write(
        &self,
        writer: &Shared,
        offset: u64,
        time_ns: u64,
        stream: OutputStream,
        data: Arc<[u8]>,
    ) -> Result<(), Status> {
        self.metrics.log_bytes.inc_by(data.len() as u64);
        let writer = writer.clone();
        spawn_blocking(move || lock(&writer).append(offset, time_ns, stream, &data))
            .await
            .map_err(|error| Status::internal(error.to_string()))?
            .map_err(|error| Status::internal(format!("writing the log: {error}")))?;
        self.logs.wrote(&self.uid, &self.container);
        Ok(())
    }
}

/// Lent to the thread that writes; never contended.
type Shared = Arc<Mutex<RunWriter>>;

fn lock(writer: &Shared) -> MutexGuard<'_, RunWriter> {
    writer.lock().unwrap_or_else(PoisonError::into_inner)
}
