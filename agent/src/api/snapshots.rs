//! `flint.host.v1.Snapshots`.

use flint_api::host::{self, snapshots_server::Snapshots};
use tonic::{Code, Request, Response, Status, async_trait};

use super::{Api, fault::fault};

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
        let saved = self.pods.context().saved.clone();
        let removed = tokio::task::spawn_blocking(move || saved.remove(&request.name)).await;
        let freed_bytes = removed.map_err(|error| fault(Code::Internal, "SNAPSHOTS", error.to_string()))??;
        Ok(Response::new(host::RemoveSnapshotResponse { freed_bytes }))
    }
}
