//! `flint.host.v1.Snapshots`.

use flint_api::host::{self, snapshots_server::Snapshots};
use tokio::sync::mpsc;
use tonic::{Request, Response, Status, async_trait};

use super::{Answers, Api, WINDOW, fault::bad_field, streamed};
use crate::travel::{Progress, SnapshotOrder, TravelError};

#[async_trait]
impl Snapshots for Api {
    async fn create(
        &self,
        request: Request<host::CreateSnapshotRequest>,
    ) -> Result<Response<host::CreateSnapshotResponse>, Status> {
        let request = request.into_inner();
        self.fence(request.lease_epoch)?;
        let snapshot = Some(self.pods.save(&request.uid, &request.name).await?);
        Ok(Response::new(host::CreateSnapshotResponse { snapshot }))
    }

    async fn list(
        &self,
        _: Request<host::ListSnapshotsRequest>,
    ) -> Result<Response<host::ListSnapshotsResponse>, Status> {
        let snapshots = self.pods.context().saved.list();
        Ok(Response::new(host::ListSnapshotsResponse { snapshots }))
    }

    async fn remove(
        &self,
        request: Request<host::RemoveSnapshotRequest>,
    ) -> Result<Response<host::RemoveSnapshotResponse>, Status> {
        let request = request.into_inner();
        self.fence(request.lease_epoch)?;
        let freed_bytes = self.mover.remove(&request.name).await?;
        Ok(Response::new(host::RemoveSnapshotResponse { freed_bytes }))
    }

    type PushStream = Answers<host::SnapshotProgress>;

    async fn push(&self, request: Request<host::PushSnapshotRequest>) -> Result<Response<Self::PushStream>, Status> {
        let host::PushSnapshotRequest {
            name,
            reference,
            credentials,
        } = request.into_inner();
        if reference.is_empty() {
            return Err(bad_field("reference", "must be set"));
        }
        let mover = self.mover.clone();
        Ok(stream(|progress| async move {
            let pushed = mover.push(&name, &reference, credentials, &progress).await?;
            Ok(host::SnapshotProgress {
                snapshot: Some(pushed.snapshot),
                pushed: pushed.reference,
                environment: pushed.environment,
                ..host::SnapshotProgress::default()
            })
        }))
    }

    type PullStream = Answers<host::SnapshotProgress>;

    async fn pull(&self, request: Request<host::PullSnapshotRequest>) -> Result<Response<Self::PullStream>, Status> {
        let request = request.into_inner();
        self.fence(request.lease_epoch)?;
        if request.reference.is_empty() {
            return Err(bad_field("reference", "must be set"));
        }
        let order = SnapshotOrder {
            reference: request.reference,
            name: request.name,
            credentials: request.credentials,
        };
        let mover = self.mover.clone();
        Ok(stream(|progress| async move {
            let snapshot = mover.pull(order, &progress).await?;
            Ok(host::SnapshotProgress {
                snapshot: Some(snapshot),
                ..host::SnapshotProgress::default()
            })
        }))
    }
}

/// Streams the progress of a push or pull; its result is the last message. It ends with a client that hangs up.
pub(super) fn stream<F>(begin: impl FnOnce(Progress) -> F) -> Response<Answers<host::SnapshotProgress>>
where
    F: Future<Output = Result<host::SnapshotProgress, TravelError>> + Send + 'static,
{
    let (progress, reports) = mpsc::channel(WINDOW);
    let work = begin(progress);
    let result = async move {
        Ok(host::SnapshotProgress {
            stage: "done".into(),
            ..work.await?
        })
    };
    streamed(reports, result)
}
