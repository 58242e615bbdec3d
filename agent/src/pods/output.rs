//! Carries a container's output from the guest into its log, and to those who are attached.
//!
//! The guest keeps what was not acknowledged, and only what the log has is acknowledged: whatever fails on the way holds the
//! container up and loses nothing. Output is over when the guest says so, or when the sandbox has ended; no clock ends it.

use std::{
    io,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use flint_api::{guest, host::OutputStream};
use thiserror::Error;
use tokio::task::{JoinError, spawn_blocking};
use tonic::{Code, Status};
use tracing::{error, warn};

use super::{
    attached::{Attached, Piece},
    retry::Retry,
};
use crate::{
    backend::Sandbox,
    logs::{Logs, RunWriter},
    metrics::Metrics,
};

/// One run's output on its way.
pub(super) struct Pump {
    pub(super) sandbox: Arc<dyn Sandbox>,
    pub(super) logs: Arc<Logs>,
    pub(super) metrics: Arc<Metrics>,
    pub(super) uid: String,
    pub(super) container: String,
    pub(super) run: u32,
    pub(super) guest_id: String,
    pub(super) attached: Attached,
}

/// Why output does not flow.
#[derive(Debug, Error)]
enum PumpError {
    #[error("opening the container's log")]
    Open(#[source] io::Error),
    #[error("writing the container's log")]
    Write(#[source] io::Error),
    #[error("reading the output from the guest: {}", .0.message())]
    Guest(#[from] Status),
    #[error("the thread that writes the log")]
    Thread(#[from] JoinError),
}

impl PumpError {
    /// The guest has not what it must have by its contract: no try will find it.
    fn is_for_good(&self) -> bool {
        let codes = [Code::NotFound, Code::OutOfRange, Code::InvalidArgument];
        matches!(self, Self::Guest(status) if codes.contains(&status.code()))
    }
}

impl Pump {
    /// Runs until the output is over or the sandbox is gone. `first` is called at the first byte.
    pub(super) async fn run(&self, first: impl FnOnce()) {
        let mut first = Some(first);
        let mut writer = None;
        let mut retry = Retry::default();
        while let Err(failure) = self.carry(&mut writer, &mut retry, &mut first).await {
            let (uid, container) = (&self.uid, &self.container);
            if failure.is_for_good() {
                error!(uid, container, error = %crate::chain(&failure), "output is lost, ending the sandbox");
                self.sandbox.kill().await;
                self.sandbox.exited().await;
                return;
            }
            if !retry.again(&*self.sandbox).await {
                return;
            }
            warn!(uid, container, error = %crate::chain(&failure), "the output is held up, trying again");
        }
    }

    async fn carry(
        &self,
        writer: &mut Option<Shared>,
        retry: &mut Retry,
        first: &mut Option<impl FnOnce()>,
    ) -> Result<(), PumpError> {
        let writer = match writer {
            Some(writer) => writer,
            None => {
                let opened = self.logs.begin(&self.uid, &self.container, self.run);
                writer.insert(Arc::new(Mutex::new(opened.map_err(PumpError::Open)?)))
            }
        };
        while self.stream(writer, first).await? {
            retry.worked();
        }
        Ok(())
    }

    /// Reads one stream to its end; false when it brought nothing, which says that the output is over.
    async fn stream(&self, writer: &Shared, first: &mut Option<impl FnOnce()>) -> Result<bool, PumpError> {
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
            let run = self.run;
            self.attached.send(Piece { run, stream, data });
        }
        Ok(any)
    }

    async fn write(
        &self,
        writer: &Shared,
        offset: u64,
        time_ns: u64,
        stream: OutputStream,
        data: Arc<[u8]>,
    ) -> Result<(), PumpError> {
        self.metrics.log_bytes.inc_by(data.len() as u64);
        let writer = writer.clone();
        spawn_blocking(move || lock(&writer).append(offset, time_ns, stream, &data))
            .await?
            .map_err(PumpError::Write)?;
        self.logs.wrote(&self.uid, &self.container);
        Ok(())
    }
}

/// Lent to the thread that writes; never contended.
type Shared = Arc<Mutex<RunWriter>>;

fn lock(writer: &Shared) -> MutexGuard<'_, RunWriter> {
    writer.lock().unwrap_or_else(PoisonError::into_inner)
}
